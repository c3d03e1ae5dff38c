"Protocols: one pass gives many numbers, ours are those of `evaluate`; and masks from strangers are scored or refused in one line."
import json
import os
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco

from barleria_nb.data import Letterbox, RefSet, decode_mask
from barleria_nb.metrics import Scores, evaluate, iou
from barleria_nb.protocols import (NATIVE, PROTOCOLS, Protocol, ProtocolScores, breakdown, bring_back, expression_type, find_protocol, generalised, interval, interval_line, read_masks,
                                   score_masks, score_model, scores_table, sweep, true_mask, with_truth)
from common import line

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcoco-sample"
settings.register_profile("calm", deadline=None, max_examples=60)
settings.load_profile("calm")
SIZES = ((40, 64), (64, 40), (48, 48), (30, 90))
KW = dict(size=64, length=9, progress=False)


def write(folder, n=8, split="val"):
    "Images of four shapes with two objects, each of two or three sentences; every other object has two outlines that overlap."
    rng, images, notes, refs = np.random.default_rng(0), [], [], []
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        h, w = SIZES[i % len(SIZES)]
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", height=h, width=w))
        for j in range(2):
            x, y, k = j * w // 2 + 2, int(rng.integers(1, h // 3)), 2 * i + j
            box = lambda a, b: [a, y, b, y, b, y + h // 2, a, y + h // 2]
            parts = [box(x, x + w // 3)] if j else [box(x, x + w // 5), box(x + w // 8, x + w // 3)]
            notes.append(dict(id=k, image_id=i, category_id=1, segmentation=parts, area=1, bbox=[0, 0, 1, 1], iscrowd=0))
            said = [dict(sent_id=10 * k + m, sent=("left thing", "the thing next to it", "red one")[m]) for m in range(2 + j)]
            refs.append(dict(ref_id=k, ann_id=k, image_id=i, category_id=1, split=split, sentences=said, file_name=f"{i}.png"))
    (folder / "instances.json").write_text(json.dumps(dict(images=images, annotations=notes, categories=[dict(id=1, name="box")])))
    (folder / "refs.json").write_text(json.dumps(refs))
    return RefSet.read(folder)


@pytest.fixture(scope="module")
def refset(tmp_path_factory): return write(tmp_path_factory.mktemp("protocols") / "boxes")


def model(images, ids, words):
    "Logits of every size and sign from the picture and the words, smooth enough to leave masks."
    wave = torch.nn.functional.avg_pool2d(images, 8, 4, padding=2).sum(1, keepdim=True)[..., :16, :16]
    return 3 * wave + ids.sum(1).float().sin()[:, None, None, None]


# ---------------------------------------------------------------- the numbers of a model

@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("threshold", [.35, .5, 0, 1])
def test_native_is_evaluate(refset, batch, threshold):
    one = score_model(model, refset, Protocol(threshold=threshold), batch=batch, **KW)[0]
    other = evaluate(model, refset, threshold=threshold, batch=batch, **KW)
    assert one == other and one.protocol == other.protocol and one.summary() == other.summary() and repr(one) == repr(other)


def test_native_is_evaluate_for_cut_sentences(refset):
    kw = dict(KW, length=4)
    one = score_model(model, refset, NATIVE, **kw)[0]
    assert one == evaluate(model, refset, **kw) and "sentences cut" in one.protocol


def test_protocols_in_one_pass_do_not_disturb_each_other(refset):
    many = [*PROTOCOLS.values(), Protocol(place="grid"), Protocol(place=50), Protocol(sentences="first"), Protocol(sentences="random", seed=3), Protocol(truth="summed"),
            Protocol(values="logits"), Protocol(place=31, way="bicubic")]
    together = score_model(model, refset, many, **KW)
    for p, scores in zip(many, together):
        assert scores == score_model(model, refset, [p], **KW)[0], p
        assert scores.rule == p
    assert len({s.protocol for s in together}) == len(many)  # the words tell them apart


def test_every_choice_is_in_the_words():
    other = dict(threshold=.4, place=100, values="logits", way="bicubic", sentences="random", truth="summed", at_least=True, empty=0)
    said = {k: replace(NATIVE, **{k: v}).words() for k, v in other.items()}
    assert all(w != NATIVE.words() for w in said.values()) and len({tuple(w) for w in said.values()}) == len(said)
    assert Protocol(sentences="random", seed=1).words() != Protocol(sentences="random", seed=2).words()


def test_sentences_that_are_picked(refset):
    first, drawn, again, other = (score_model(model, refset, Protocol(sentences=s, seed=n), **KW)[0] for s, n in (("first", 0), ("random", 0), ("random", 0), ("random", 1)))
    assert set(first.pairs) == {r.sentences[0].sent_id for r in refset}
    assert drawn == again and set(drawn.pairs) != set(other.pairs)
    for ref in refset: assert sum(s.sent_id in drawn.pairs for s in ref.sentences) == 1


def test_argmax_of_two_logits_at_the_tie():
    nothing = torch.zeros(1, 4, 4)
    lavt, box = PROTOCOLS["lavt"], Letterbox(8, 8, 8)
    assert lavt.cut == 0 and not (bring_back(nothing, box, lavt) > lavt.cut).any()  # the background comes first in a tie
    assert (bring_back(nothing + 1e-9, box, lavt) > lavt.cut).all()
    assert Protocol(values="logits", threshold=0).cut == -np.inf and Protocol(values="logits", threshold=1).cut == np.inf


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 12))
def test_a_square_as_large_as_the_image_is_the_image(h, w, side):
    p, box = torch.rand(2, side, side), Letterbox(h, w, 32)
    whole = bring_back(p, box, Protocol(place=h))
    assert whole.shape == (2, h, h)
    if h == w: assert torch.allclose(whole, bring_back(p, box), atol=1e-5)
    assert torch.allclose(bring_back(p * 0 + .7, box, Protocol(place=5)), torch.tensor(.7))


def test_cubic_road_keeps_a_constant_inside():
    p, box = torch.full((1, 16, 16), .6), Letterbox(40, 64, 64)
    back = bring_back(p, box, PROTOCOLS["cris"])[0]
    assert torch.allclose(back[3:-3, 3:-3], torch.tensor(.6), atol=1e-5)  # beyond the square lies zero


def test_summed_outlines_lose_what_is_covered_twice(refset):
    for ref in refset:
        painted = sum(decode_mask([p], ref.height, ref.width).astype(int) for p in ref.segmentation)
        assert (true_mask(refset, ref, Protocol(truth="summed")) == (painted == 1)).all()
        assert (true_mask(refset, ref) == (painted > 0)).all()
    assert any((true_mask(refset, r) != true_mask(refset, r, Protocol(truth="summed"))).any() for r in refset)
    thrice = replace(refset.refs[0], segmentation=[refset.refs[0].segmentation[0]] * 3)
    assert not true_mask(refset, thrice, Protocol(truth="summed")).any()  # three, not one
    rle = replace(thrice, segmentation=coco_rle(refset.mask(thrice)))
    assert (true_mask(refset, rle, Protocol(truth="summed")) == refset.mask(rle)).all()


def test_a_choice_that_there_is_not():
    for field, value in dict(place="full", values="probability", way="nearest", sentences="last", truth="added", empty=2, threshold=-.1).items():
        line(lambda: Protocol(**{field: value}), "protocol" if field != "threshold" else "threshold", value)
    line(lambda: Protocol(sentences="frist"), "first")
    line(lambda: find_protocol("nativ"), "native", "cris", "lavt")
    line(lambda: find_protocol("cris", "firsts"), "first")
    assert find_protocol("native") == NATIVE and find_protocol("lavt", "first", .3) == replace(PROTOCOLS["lavt"], sentences="first", threshold=.3)
    line(lambda: Protocol(place=100_000), "4096")


# ---------------------------------------------------------------- how counts are read

pairs = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda p: (min(p), max(p)))

@given(st.lists(pairs, min_size=1, max_size=30), st.booleans(), st.sampled_from([0, 1]))
def test_summary_in_fractions(found, at_least, empty):
    got = ProtocolScores([(n, *p) for n, p in enumerate(found)], rule=Protocol(at_least=at_least, empty=empty)).summary()
    shares = [Fraction(I, U) if U else Fraction(empty) for I, U in found]
    I, U = (sum(x) for x in zip(*found))
    assert got["mIoU"] == pytest.approx(float(sum(shares) / len(shares))) and got["oIoU"] == (I / U if U else empty)
    for k in range(5, 10):
        t = Fraction(k, 10)
        hits = [bool(empty) if not u else (s >= t if at_least else s > t) for s, (_, u) in zip(shares, found)]
        assert got[f"Pr@0.{k}"] == pytest.approx(sum(hits) / len(hits))


def test_merged_scores_keep_their_rule():
    a, b = (ProtocolScores([(n, 7, 10)], "x", PROTOCOLS["lavt"]) for n in (1, 2))
    assert (a + b).summary()["Pr@0.7"] == 1 == a.summary()["Pr@0.7"] and len(a + b) == 2
    line(lambda: a + ProtocolScores([(3, 1, 2)], "y"), "apart")
    line(lambda: ProtocolScores(rule=PROTOCOLS["lavt"]).summary(), "nothing to score")


def test_mean_and_overall_disagree_by_hand():
    found = ProtocolScores([(1, 80, 100), (2, 90, 100), (3, 3000, 10000)]).summary()
    assert found["mIoU"] == pytest.approx(2 / 3) and found["oIoU"] == pytest.approx(3170 / 10200)


# ---------------------------------------------------------------- sweep, interval, breakdown

def test_sweep_never_tunes_on_a_test_split(refset, tmp_path):
    curve = sweep(model, refset, thresholds=[.2, .5], **KW)
    assert list(curve) == [.2, .5] and curve[.5] == evaluate(model, refset, threshold=.5, **KW)
    for split in ("test", "testA", "TestB", "my-test"):
        tests = RefSet(refset.root, [replace(r, split=split) for r in refset.refs[:1]])
        line(lambda: sweep(model, tests, **KW), "tuned", split)


def slow_bootstrap(scores, refset, draws, seed):
    "Plain loops over images and sentences."
    image = {s.sent_id: r.image_id for r in refset for s in r.sentences}
    groups = {}
    for id, I, U in scores.records: groups.setdefault(image[id], []).append((I, U))
    images, rng, means, overalls = [groups[k] for k in sorted(groups)], np.random.default_rng(seed), [], []
    for _ in range(draws):
        drawn = [p for k in rng.integers(len(images), size=len(images)) for p in images[k]]
        means.append(np.mean([iou(*p) for p in drawn])), overalls.append(sum(I for I, _ in drawn) / sum(U for _, U in drawn))
    return [np.percentile(x, [2.5, 97.5]) for x in (means, overalls)]


def test_interval_is_a_bootstrap_by_image(refset):
    scores = score_model(model, refset, NATIVE, **KW)[0]
    found = interval(scores, refset, 200, 3)
    assert np.allclose([found["mIoU"], found["oIoU"]], slow_bootstrap(scores, refset, 200, 3))
    assert set(found) == {*scores.summary()} - {"n"} and found == interval(scores, refset, 200, 3) != interval(scores, refset, 200, 4)
    assert interval_line(found).count("–") == 7 and "\n" not in interval_line(found)
    assert interval(Scores(scores.records[::-1], scores.protocol), refset, 200, 3) == found
    line(lambda: interval(scores, RefSet(refset.root, refset.refs[:3])), "not in")
    one = RefSet(refset.root, [r for r in refset if r.image_id == 0])
    line(lambda: interval(score_model(model, one, NATIVE, **KW)[0], one), "two or more")
    for draws in (0, -1, 2.5, True): line(lambda: interval(scores, refset, draws), "draws")


def test_breakdown_is_a_partition(refset):
    scores = score_model(model, refset, PROTOCOLS["lavt"], **KW)[0]
    for kind, groups in breakdown(scores, refset).items():
        assert sum(map(len, groups.values())) == len(scores), kind
        assert {k: p for g in groups.values() for k, p in g.pairs.items()} == scores.pairs
        assert all(g.rule == scores.rule for g in groups.values())
        assert all(name in scores_table(groups) for name in groups)
    said = breakdown(scores, refset)["expression"]
    assert all(id % 10 == 0 for id in said["location"].pairs) and all(id % 10 == 1 for id in said["relation"].pairs)


@pytest.mark.parametrize("said, kind", [("LEFT guy", "location"), ("man in middle", "location"), ("2nd from right", "location"), ("left of pic", "location"),
    ("man behind\nthe  woman", "relation"), ("left of the dog", "relation"), ("leftover pizza", "attributes only"), ("undershirt", "attributes only"), ("", "attributes only"),
    ("zebra" * 10_000, "attributes only")])
def test_types_of_sentences(said, kind): assert expression_type(said) == kind


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of RefCOCO is not there")
def test_types_of_real_sentences():
    said = [r["sent"] for r in json.loads((SAMPLE / "extra" / "refcoco_unc_testA_expressions.json").read_text())]
    share = {k: sum(expression_type(s) == k for s in said) / len(said) for k in ("location", "relation", "attributes only")}
    assert .4 < share["location"] < .7 and .02 < share["relation"] < .2 and .2 < share["attributes only"] < .55, share


# ---------------------------------------------------------------- sentences that mean nothing

def test_generalised_by_hand():
    found = generalised([(0, 0, 0), (0, 40, 0), (7, 10, 8), (0, 20, 20), (30, 30, 30)])
    assert found == pytest.approx({"gIoU": 2.7 / 5, "cIoU": 37 / 100, "Pr@0.7": 2 / 3, "Pr@0.8": 1 / 3, "Pr@0.9": 1 / 3, "N-acc": 1 / 2, "T-acc": 2 / 3, "n": 5, "targeted": 3})


def test_generalised_where_one_kind_is_missing():
    assert generalised([(0, 0, 0)]) == {"gIoU": 1, "cIoU": 1, "Pr@0.7": None, "Pr@0.8": None, "Pr@0.9": None, "N-acc": 1, "T-acc": None, "n": 1, "targeted": 0}
    assert generalised([(1, 2, 2)])["N-acc"] is None
    for wrong in ([], [(2, 1, 1)], [(1, 3, 4)], [(2, 3, 1)], [(1, 2)], [(1., 2, 2)], [(-1, 2, 2)]): line(lambda: generalised(wrong))


def test_no_target_from_masks(refset, tmp_path):
    nothing = replace(refset.refs[0], segmentation=dict(size=[40, 64], counts=[40 * 64]))
    mixed = RefSet(refset.root, [nothing, *refset.refs[1:3]], "mixed")
    rows = [dict(sent_id=s.sent_id, segmentation=None if n else [[0, 0, 9, 0, 9, 9, 0, 9]]) for r in mixed for n, s in enumerate(r.sentences)]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    scores = score_masks(mixed, read_masks(tmp_path / "m.json"))
    found, n = generalised(with_truth(scores, mixed)), len(nothing.sentences)
    assert found["N-acc"] == 1 / 2 and found["targeted"] == len(scores) - n and found["T-acc"] == 2 / found["targeted"]
    assert found["gIoU"] == scores.summary()["mIoU"] and found["cIoU"] == scores.summary()["oIoU"]
    for p in (PROTOCOLS["lavt"], Protocol(place=9)): line(lambda: with_truth(score_masks(mixed, read_masks(tmp_path / "m.json"), p), mixed), "own")


# ---------------------------------------------------------------- other people's masks

def coco_rle(mask, compressed=True):
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    if compressed: return dict(size=[int(n) for n in rle["size"]], counts=rle["counts"].decode())
    flat = np.asarray(mask, np.uint8).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return dict(size=list(mask.shape), counts=[0, *runs] if flat[0] else runs)


def answers(refset):
    "{sent_id: a mask}, none of them right."
    rng = np.random.default_rng(1)
    blob = lambda h, w: np.kron(rng.random((h // 5 + 1, w // 5 + 1)) > .5, np.ones((5, 5), bool))[:h, :w]
    return {s.sent_id: blob(r.height, r.width) for r in refset for s in r.sentences}


@pytest.fixture()
def folder(refset, tmp_path):
    out = tmp_path / "masks"
    out.mkdir()
    for id, mask in answers(refset).items(): Image.fromarray(mask.astype(np.uint8) * 255).save(out / f"{id}.png")
    return out


def by_hand(refset):
    found = Scores()
    for r in refset:
        truth = refset.mask(r) > 0
        for s in r.sentences:
            mask = answers(refset)[s.sent_id]
            found.add(s.sent_id, int((mask & truth).sum()), int((mask | truth).sum()))
    return found.pairs


def test_masks_from_files_and_lists_of_every_kind(refset, folder, tmp_path):
    expected, masks = by_hand(refset), answers(refset)
    assert score_masks(refset, read_masks(folder)).pairs == expected
    for compressed in (True, False):
        (tmp_path / "m.json").write_text(json.dumps([dict(sent_id=k, segmentation=coco_rle(m, compressed)) for k, m in masks.items()]))
        assert score_masks(refset, read_masks(tmp_path / "m.json")).pairs == expected
    palette = [0, 0, 0, 128, 0, 0]
    kinds = {"1": lambda m: Image.fromarray(m), "ones": lambda m: Image.fromarray(m.astype(np.uint8)), "16": lambda m: Image.fromarray(m.astype(np.uint16) * 65535),
             "rgb": lambda m: Image.fromarray(np.stack([m * 200, m * 10, m * 0], -1).astype(np.uint8)),
             "opaque": lambda m: Image.fromarray(np.stack([m * 255] * 3 + [m * 0 + 255], -1).astype(np.uint8)),
             "grey, opaque": lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("LA")}
    for name, make in kinds.items():
        for k, m in masks.items(): make(m).save(folder / f"{k}.png")
        assert score_masks(refset, read_masks(folder)).pairs == expected, name
    for k, m in masks.items():
        im = Image.fromarray(m.astype(np.uint8)).convert("P")
        im.putpalette(palette)
        im.save(folder / f"{k}.png")
    assert score_masks(refset, read_masks(folder)).pairs == expected
    for k, m in masks.items():  # the palette in the other order: the colour decides, not its number
        im = Image.fromarray((~m).astype(np.uint8)).convert("P")
        im.putpalette([255, 255, 255, 0, 0, 0])
        im.save(folder / f"{k}.png")
    assert score_masks(refset, read_masks(folder)).pairs == expected


def test_masks_by_protocol(refset, folder):
    masks = read_masks(folder)
    lavt = score_masks(refset, masks, PROTOCOLS["lavt"])
    for r in refset.refs[:4]:
        painted = sum(decode_mask([p], r.height, r.width).astype(int) for p in r.segmentation) == 1
        small = lambda m: np.asarray(Image.fromarray(m.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST)) > 0
        for s in r.sentences:
            a, b = small(answers(refset)[s.sent_id]), small(painted)
            assert lavt.pairs[s.sent_id] == ((a & b).sum(), (a | b).sum())
    first = score_masks(refset, masks, Protocol(sentences="first"))
    assert first.pairs == {r.sentences[0].sent_id: by_hand(refset)[r.sentences[0].sent_id] for r in refset}
    assert "sigmoid" not in first.protocol and "masks as given" in first.protocol and "480" in lavt.protocol
    line(lambda: score_masks(refset, masks, Protocol(place="grid")), "grid")


def test_missing_and_surplus_masks_are_listed(refset, folder):
    lost = refset.refs[0].sentences[0].sent_id
    (folder / f"{lost}.png").rename(folder / "987654.png")
    line(lambda: score_masks(refset, read_masks(folder)), "lacks", f"1 ({lost})", "987654", "partial")
    some = score_masks(refset, read_masks(folder), partial=True)
    n = sum(len(r.sentences) for r in refset)
    assert len(some) == n - 1 and f"{n - 1} of {n} sentences answered" in some.protocol
    (folder / "987654.png").rename(folder / f"{lost}.png")
    (folder / "overlay.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not read")
    line(lambda: score_masks(refset, read_masks(folder)), "overlay.png")
    assert score_masks(refset, read_masks(folder), partial=True).pairs == by_hand(refset)  # nothing is missing
    for k in range(200): (folder / f"{10**9 + k}.png").write_bytes(b"")
    line(lambda: score_masks(refset, read_masks(folder)), "201 (")
    stranger = RefSet(refset.root, [replace(r, sentences=tuple(replace(s, sent_id=s.sent_id + 10**6) for s in r.sentences)) for r in refset])
    line(lambda: score_masks(stranger, read_masks(folder), partial=True), "another set")


def test_two_masks_for_a_sentence(folder):
    (folder / "0.PNG").write_bytes((folder / "0.png").read_bytes())
    line(lambda: read_masks(folder), "two masks", "0.PNG")


def test_names_are_not_read_twice_in_other_spellings(refset, folder):
    for name in ("00.png", "٣.png", "1e1.png", " 10.png", "+10.png", "10.png.png"): (folder / name).write_bytes(b"")
    assert len(read_masks(folder)) == sum(len(r.sentences) for r in refset) and len(read_masks(folder).strange) == 6


def png(h, w, body=None, kind=0, bits=8):
    "A PNG file's bytes with a header of any size and a body of one's own."
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, kind, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(body or b"")) + chunk(b"IEND", b"")


def hostile():
    ok = np.zeros((40, 64), np.uint8)
    ok[5:9] = 255
    grey = ok.copy()
    grey[0, 0] = 3
    alpha = np.dstack([ok, ok, ok, ok])
    yield "wrong size", Image.fromarray(ok.T.copy()), ("64×40", "40×64")
    yield "probabilities", Image.fromarray(np.arange(40 * 64, dtype=np.uint8).reshape(40, 64)), ("more colours",)
    yield "two objects", Image.fromarray(grey), ("more colours",)
    yield "16 bits of probabilities", Image.fromarray(np.arange(2560, dtype=np.uint16).reshape(40, 64)), ("more colours",)
    yield "alpha", Image.fromarray(alpha), ("transparent",)
    yield "colours that differ", Image.fromarray(np.dstack([ok, grey, ok])), ("more colours",)
    yield "a bomb", png(30_000, 30_000), ("pixels",)
    yield "a larger bomb", png(2**31 - 1, 2**31 - 1), ()
    yield "no pixel rows", png(40, 64), ("save it again",)
    yield "more rows than it says", png(40, 64, b"\0" * 50_000_000), None  # the surplus is never unpacked
    yield "no PNG", b"GIF89a" + b"\0" * 40, ("no PNG",)
    yield "nothing", b"", ("no PNG",)
    yield "a cut file", "cut", ("save it again",)
    yield "an animation", "apng", ("animation",)
    yield "a JPEG", "jpeg", ("no PNG",)
    yield "a text bomb", "ztxt", ()
    yield "a transparent palette", "trns", ("transparent",)


@pytest.mark.parametrize("name, what, words", [pytest.param(*h, id=h[0]) for h in hostile()])
def test_hostile_pictures(refset, folder, name, what, words):
    path, ok = folder / "0.png", Image.fromarray(np.pad(np.full((4, 64), 255, np.uint8), ((5, 31), (0, 0))))
    if isinstance(what, bytes): path.write_bytes(what)
    elif isinstance(what, Image.Image): what.save(path)
    elif what == "cut": path.write_bytes(png(40, 64, os.urandom(40 * 65))[:900])
    elif what == "jpeg": ok.save(path, "JPEG")
    elif what == "apng": ok.save(path, save_all=True, append_images=[Image.fromarray(255 - np.asarray(ok))])
    elif what == "trns": ok.convert("P").save(path, transparency=0)
    elif what == "ztxt":
        info = PngImagePlugin.PngInfo()
        info.add_text("k", "x" * 80_000_000, zip=True)
        ok.save(path, pnginfo=info)
    masks = read_masks(folder)
    if words is None: assert not masks.mask(0, 40, 64).any()
    else: assert len(line(lambda: score_masks(refset, masks), "0.png", *words)) < 400


def test_a_whole_picture_and_an_empty_one(refset, folder):
    for value in (0, 1, 255):
        Image.fromarray(np.full((40, 64), value, np.uint8)).save(folder / "0.png")
        assert read_masks(folder).mask(0, 40, 64).sum() == bool(value) * 40 * 64


def test_links_and_pipes(refset, folder, tmp_path):
    outside = tmp_path / "secret.png"
    (folder / "0.png").rename(outside)
    (folder / "0.png").symlink_to(outside)
    line(lambda: score_masks(refset, read_masks(folder)), "leads out")
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to("0.png")
    line(lambda: score_masks(refset, read_masks(folder)), "0.png")
    (folder / "0.png").unlink()
    os.mkfifo(folder / "0.png")
    line(lambda: score_masks(refset, read_masks(folder)), "no file")
    (folder / "0.png").unlink()
    (folder / "0.png").mkdir()
    line(lambda: score_masks(refset, read_masks(folder)), "no file")
    other = tmp_path / "link"
    other.symlink_to(folder)
    (folder / "0.png").rmdir()
    outside.rename(folder / "0.png")
    assert score_masks(refset, read_masks(other)).pairs == by_hand(refset)  # the folder itself may be a link


H, W = 40, 64
@pytest.mark.parametrize("segmentation, words", [
    (dict(size=[H, W], counts=[1]), ("add up",)), (dict(size=[H, W], counts=[H * W + 1]), ("add up",)), (dict(size=[W, H], counts=[H * W]), ("size",)),
    (dict(size=[H, W], counts=[-1, H * W + 1]), ("whole numbers",)), (dict(size=[H, W], counts=[1.5, H * W - 1.5]), ("whole numbers",)),
    (dict(size=[H, W], counts=[2**70]), ("add up",)), (dict(size=[H, W], counts="`" * 50), ("damaged",)), (dict(size=[H, W], counts=chr(200)), ("damaged",)),
    (dict(size=[10**6, 10**6], counts=[10**12]), ("size",)), (dict(size=[H, W]), ("neither",)), ([], ("neither",)), ([[1, 2]], ("points",)), ([[1, 2, 3, 4, float("nan"), 6]], ("finite",)),
    ([[0, 0, 1e9, 0, 1e9, 1e9]], ("outside",)), ([[0, 0, 5, 5, 9, 0]] * 3000, ("polygons",)), ("~/.ssh/id_rsa.png", ("text",)), (17, ("neither",)), (True, ("neither",))])
def test_hostile_segmentations(refset, tmp_path, segmentation, words):
    rows = [dict(sent_id=s.sent_id, segmentation=segmentation) for s in refset.refs[0].sentences]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    line(lambda: score_masks(RefSet(refset.root, refset.refs[:1]), read_masks(tmp_path / "m.json")), "m.json", *words)


@pytest.mark.parametrize("text, words", [("", ("not JSON",)), ("{}", ("list",)), ("[]", ("no mask",)), ("[3]", ("record 0",)), ('[{"sent_id": "x", "segmentation": null}]', ("sent_id",)),
    ('[{"sent_id": 1}]', ("segmentation", "null")), ('[{"sent_id": 1, "segmentation": null}, {"sent_id": "1", "segmentation": null}]', ("repeats",)), ("[" * 100_000, ("nested",)),
    ('[{"sent_id": 1e999, "segmentation": null}]', ("sent_id",)), ('[{"sent_id": ' + "9" * 5000 + "}]", ("m.json",)), ('[{"segmentation": null}]', ("sent_id",))])
def test_hostile_lists(tmp_path, text, words):
    (tmp_path / "m.json").write_text(text)
    line(lambda: read_masks(tmp_path / "m.json"), "m.json", *words)


def test_what_is_no_source(tmp_path):
    line(lambda: read_masks(tmp_path / "nowhere"), "missing")
    line(lambda: read_masks(tmp_path / "nowhere.json"), "nowhere.json")
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04.")
    line(lambda: read_masks(tmp_path / "m.pkl"), "no folder and no .json")
    (tmp_path / "empty").mkdir()
    line(lambda: read_masks(tmp_path / "empty"), "no mask")


def test_one_mask_at_a_time(refset, folder, monkeypatch):
    "Reading opens nothing, and scoring holds one."
    opened = []
    masks = read_masks(folder)
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a[0]) or original(*a, **k))
    read_masks(folder)
    assert not opened
    score_masks(refset, masks)
    assert len(opened) == len(masks) and all(isinstance(a, str) for a in masks.answers.values())


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of RefCOCO with published predictions is not there")
def test_published_predictions():
    path = SAMPLE / "extra" / "published_predictions_testA.json"
    scores = score_masks(RefSet.read(SAMPLE, "testA"), read_masks(path), partial=True)
    found = scores.summary()
    assert found["n"] == 10 and "10 of" in scores.protocol
    assert found["mIoU"] == pytest.approx(.2582, abs=.001) and found["oIoU"] == pytest.approx(.2578, abs=.001)
    published = {r["sent_id"]: r["published_iou"] for r in json.loads(path.read_text())}
    assert max(abs(iou(I, U) - published[id]) for id, I, U in scores.records) < .004
