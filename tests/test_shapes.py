"""RefShapes: frozen by hashes, every sentence read back, files made whole or not at all, splits apart, the ready sample."""
import errno
import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from barleria_nb import shapes
from barleria_nb.core import asset, read_json
from barleria_nb.data import RefSet, decode_mask, tokenize
from barleria_nb.shapes import (CARD, FLAVOURS, SCENES, SIDE, VERSION, VOCABULARY, Draws, frozen_hashes, make_refshapes, records, resolve, scene_hash, sentences_for,
                                split_scene)
from common import line

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "refshapes-sample"
SAMPLE_SCENES = dict(train=4, val=4, testA=2, testB=2)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2


def draw(out, flavour="refshapes", scenes=dict(val=3), workers=1): return make_refshapes(out, flavour, dict(scenes), workers, False)
def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- the same set, always ---

def test_first_scenes_by_name():
    "Known values, written here by hand and not read from the file that ships."
    known = {("refshapes", 0): "b494cb35b771", ("refshapes", 1): "f9f330ed7b8d", ("refshapes+", 0): "0d999a39ca49", ("refshapes+", 1): "4bc020570859",
             ("refshapesg", 0): "e902d03c84eb", ("refshapesg", 1): "bbe01d36be28"}
    for (flavour, index), start in known.items(): assert scene_hash("val", index, flavour).startswith(start)


def test_frozen_first_scenes():
    kept = read_json(asset("refshapes-v1.json"))
    assert kept["version"] == VERSION and kept["all"]["scenes"] == SCENES and kept["first"]["scenes"] == 20
    assert frozen_hashes(20) == kept["first"]["hashes"]


@pytest.mark.long
def test_frozen_all_scenes():
    assert frozen_hashes(workers=2) == read_json(asset("refshapes-v1.json"))["all"]["hashes"]


def test_scenes_do_not_depend_on_each_other():
    late = scene_hash("train", 3999)
    scene_hash("train", 0)
    np.random.seed(0)
    assert scene_hash("train", 3999) == late


def test_draws_are_numpys_fractions():
    rng, again = Draws("some", 1), Draws("some", 1)
    assert rng.noise(2, 3).ravel().tolist() == [again.uniform() for _ in range(6)]
    assert Draws("some", "1").integer(1000) == Draws("some", 1).integer(1000) and Draws("a").noise(4).tolist() != Draws("b").noise(4).tolist()


# --- what is in it ---

@pytest.fixture(scope="module")
def told():
    "{flavour: [(split of the scenes, scene, annotations, refs)]} of 40 scenes, ten of each split; each is drawn once."
    found = {f: [] for f in FLAVOURS[:3]}
    for split in SCENES:
        for index in range(20, 30):
            scene = split_scene(split, index)
            for f in found:
                _, anns, refs = shapes._described(scene, split, index, f)
                found[f].append((split, scene, anns, refs))
    return found


def sentences(told, flavour): return [(s["sent"], ref, anns) for _, _, anns, refs in told[flavour] for ref in refs for s in ref["sentences"]]


@pytest.mark.parametrize("flavour", FLAVOURS[:3])
def test_sentences_read_back(told, flavour):
    "Text and annotations alone lead back to the object, also after a trip through JSON."
    rows = sentences(told, flavour)
    assert len(rows) > 250
    for sent, ref, anns in rows: assert resolve(sent, json.loads(json.dumps(anns))) == [ref["ann_id"]], sent


@pytest.mark.parametrize("flavour", FLAVOURS[:3])
def test_words_and_lengths(told, flavour):
    texts = [s for s, *_ in sentences(told, flavour)]
    assert {w for t in texts for w in t.split()} <= set(VOCABULARY)
    assert tokenize(texts, 22 if flavour == "refshapesg" else 17).truncated == 0
    if flavour == "refshapes+": assert not {"left", "right", "top", "bottom", "above", "below", "leftmost"} & {w for t in texts for w in t.split()}


@pytest.mark.parametrize("flavour", FLAVOURS[:3])
def test_records(told, flavour):
    hard = []
    for split, scene, anns, refs in told[flavour]:
        assert 3 <= len(anns) <= 7 and 1 <= len(refs) <= 3
        masks = np.stack([decode_mask(a["segmentation"], SIDE, SIDE) for a in anns])
        assert masks.sum(0).max() == 1  # no pixel has two owners
        for a, t, mask in zip(anns, scene.things, masks):
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert (mask == t.mask).all() and a["area"] == mask.sum() and .01 <= a["area"] / SIDE**2 <= .15 and a["hidden"] <= .45
            assert a["bbox"] == [cols[0], rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1]
        for r in refs:
            assert r["ann_id"] in {a["id"] for a in anns} and 1 <= len({s["sent"] for s in r["sentences"]}) == len(r["sentences"]) <= 3
            hard.append(not shapes._is_easy(scene.things, r["ann_id"] % 10))
            circle = scene.things[r["ann_id"] % 10].shape == "circle"
            if flavour != "refshapesg" and split.startswith("test"): assert circle == (split == "testA")
    assert np.mean(hard) >= .5


def test_hard_negatives(told):
    for _, scene, *_ in told["refshapes"]:
        main, others = scene.things[scene.main], [t for k, t in enumerate(scene.things) if k != scene.main]
        assert any(t.colour == main.colour and t.shape != main.shape for t in others)
        assert any(t.shape == main.shape and t.colour != main.colour for t in others)


@pytest.mark.parametrize("flavour", FLAVOURS[:3])
def test_blind_answers(told, flavour):
    "Within a few standard errors of what all of val gives, which is below a quarter."
    rows = sentences(told, flavour)
    assert np.mean([1 / len(anns) for *_, anns in rows]) < .25
    assert np.mean([max(anns, key=lambda a: a["area"])["id"] == ref["ann_id"] for _, ref, anns in rows]) < .33


def test_reading_what_is_not_there(told):
    *_, anns, _ = told["refshapes"][0]
    line(lambda: resolve("the red dog", anns), "dog", "sentences_for")
    assert resolve("red circle", []) == [] and resolve("the red one next to the blue one", []) == []
    assert resolve("thing", anns) == [a["id"] for a in anns]


def test_a_thing_like_another_gets_no_plain_sentence():
    twins = [shapes.Thing("red", "circle", "small", 40, 40, 380), shapes.Thing("red", "circle", "small", 42, 90, 380)]
    shapes._uncover(twins)
    for flavour in FLAVOURS:
        said = sentences_for(twins, 0, flavour, Draws("twins"))
        assert all({"top", "topmost"} & set(s.split()) for s in said) and bool(said) == (flavour == "refshapes")


# --- splits ---

def test_ids_of_splits_are_apart():
    spans = [range(shapes._FIRST_ID[s], shapes._FIRST_ID[s] + n) for s, n in SCENES.items()]
    assert not any(range(max(a[0], b[0]), min(a[-1], b[-1]) + 1) for a, b in combinations(spans, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One small folder of each flavour, drawn by two processes."
    top = tmp_path_factory.mktemp("sets")
    return {f: draw(top / f, f, dict(train=12, val=4, testA=3, testB=3), workers=2) for f in FLAVOURS}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_splits(folders, flavour):
    data = RefSet.read(folders[flavour])
    assert data.problems == [] and data.check() == []
    names = dict(refshapesg=["train", "val", "test"]) | {"refshapesg-google": ["train", "val"]}
    assert set(data.splits) == set(names.get(flavour, SCENES))
    parts = {s: data.split(s) for s in data.splits}
    for a, b in combinations(parts, 2):
        pictures, objects = ({f(r) for r in parts[a]} & {f(r) for r in parts[b]} for f in (lambda r: r.image_id, lambda r: r.ann_id))
        assert not objects and bool(pictures) == (flavour == "refshapesg-google")


def test_google_holds_the_train_scenes_of_umd(folders):
    umd, google = RefSet.read(folders["refshapesg"]), RefSet.read(folders["refshapesg-google"])
    assert [r.sentences for r in google] == [r.sentences for r in umd.split("train")]
    assert {p.name for p in (google.root / "images").iterdir()} == {r.file_name for r in umd.split("train")}


def test_masks_and_pictures_survive_the_files(folders):
    data = RefSet.read(folders["refshapes"], "testA")
    for ref in data:
        scene = split_scene("testA", ref.image_id - shapes._FIRST_ID["testA"])
        assert (data.image(ref) == scene.image).all() and (data.mask(ref) == scene.things[ref.ann_id % 10].mask).all() and ref.category == "circle"


# --- folders: whole or not at all ---

def test_one_and_two_processes_write_the_same(folders, tmp_path):
    assert contents(draw(tmp_path / "one", scenes=dict(train=12, val=4, testA=3, testB=3))) == contents(folders["refshapes"])


def test_second_call_reuses(tmp_path, monkeypatch):
    out = draw(tmp_path / "set")
    monkeypatch.setattr(shapes, "_draw_folder", lambda *a: pytest.fail("drawn again"))
    assert draw(str(tmp_path / "set")) == out
    line(lambda: draw(out, "refshapes+"), out, "is not empty")
    line(lambda: draw(out, scenes=dict(val=4)), out, "is not empty")


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    for name, said in dict(mine="is not empty", file="is a file").items(): line(lambda: draw(tmp_path / name), name, said, "choose a")
    line(lambda: draw(tmp_path / "file" / "below"), "below")
    assert contents(tmp_path) == before


def test_empty_and_deep_folders_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(RefSet.read(draw(tmp_path / "empty"))) and len(RefSet.read(draw(tmp_path / "a" / "b" / "c")))


@pytest.mark.parametrize("call, words", [
    (lambda out: draw(out, "refshape"), ["flavour", "Did you mean refshapes"]),
    (lambda out: draw(out, scenes=dict(vall=3)), ["vall", "Did you mean val"]),
    (lambda out: draw(out, scenes=dict(val=401)), ["400 scenes of val", "401"]),
    (lambda out: draw(out, scenes=dict(val=-1)), ["-1"]),
    (lambda out: draw(out, scenes=dict(val=2.5)), ["2.5"]),
    (lambda out: draw(out, scenes={}), ["no scenes"]),
    (lambda out: draw(out, "refshapesg-google", dict(val=5)), ["no scenes"]),
    (lambda out: records("val", 0, "refcoco"), ["refcoco", "flavour"]),
    (lambda out: scene_hash("test", 0), ["test", "Did you mean test"]),
])
def test_impossible_wishes(tmp_path, call, words):
    line(lambda: call(tmp_path / "set"), *words)
    assert not list(tmp_path.iterdir())


class Interrupt(BaseException): pass


@pytest.mark.parametrize("error, told_as", [(OSError(errno.ENOSPC, "full"), "disk is full"), (OSError(errno.EROFS, "read-only"), "read-only"),
                                            (OSError(errno.EDQUOT, "quota"), "quota"), (RuntimeError("a bug"), None), (Interrupt(), None)])
def test_a_drawing_that_fails_midway_leaves_nothing(tmp_path, monkeypatch, error, told_as):
    done, real = [], shapes.records

    def fail_third(*args):
        done.append(args)
        if len(done) == 3: raise error
        return real(*args)

    monkeypatch.setattr(shapes, "records", fail_third)
    if told_as: line(lambda: draw(tmp_path / "set", scenes=dict(val=5)), tmp_path / "set", told_as)
    else:
        with pytest.raises(type(error)): draw(tmp_path / "set", scenes=dict(val=5))
    assert len(done) == 3 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert len(RefSet.read(draw(tmp_path / "set")))  # and the next call works


def test_full_disk_at_the_last_file(tmp_path, monkeypatch):
    "The records fail after all pictures were written."
    real = os.replace

    def full(a, b):
        if str(b).endswith(CARD): raise OSError(errno.ENOSPC, "full")
        return real(a, b)

    monkeypatch.setattr(os, "replace", full)
    (tmp_path / "set").mkdir()
    line(lambda: draw(tmp_path / "set"), "disk is full")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"] and not list((tmp_path / "set").iterdir())


def test_read_only_parent(tmp_path):
    if os.geteuid() == 0: pytest.skip("root may write anywhere; the same refusal is simulated above")
    tmp_path.chmod(0o555)
    try: line(lambda: draw(tmp_path / "set"), "may not write")
    finally: tmp_path.chmod(0o755)


# --- the sample that ships ---

def test_sample_is_what_is_drawn(tmp_path):
    here, fresh = contents(SAMPLE), contents(draw(tmp_path / "sample", scenes=SAMPLE_SCENES))
    assert here.pop("README.md") and sum(map(len, here.values())) < 400_000
    pictures = [n for n in fresh if n.endswith(".png")]
    assert {n: v for n, v in here.items() if n not in pictures} == {n: v for n, v in fresh.items() if n not in pictures}
    kept = RefSet.read(SAMPLE)
    assert here.keys() == fresh.keys() and len(pictures) == 12 and kept.problems == []
    for r in kept:  # pixels, not bytes: PNG files of one picture may differ between versions of zlib
        split, index = r.file_name.removesuffix(".png").split("_")
        assert (kept.image(r) == split_scene(split, int(index)).image).all()


def test_sample_is_an_asset():
    data = RefSet.read(asset("refshapes-sample"))
    assert {s: n for s, (_, _, n) in data.splits.items()} == SAMPLE_SCENES and make_refshapes(data.root, scenes=SAMPLE_SCENES) == data.root
