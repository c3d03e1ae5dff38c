"From a name to masks: where a model is looked for, what a folder or the hub may claim, what is written for others, how answers behave. Nothing here touches a network."
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import barleria_nb.inference as module
from barleria_nb.core import asset, read_json, write_json
from barleria_nb.data import MAX_PIXELS, Letterbox
from barleria_nb.inference import FACTS, Results, Segmenter, facts, find_model, model_card, read_card, shipped_models, split_scores
from barleria_nb.model import build_model, config, read_about, save_tuned
from barleria_nb.scale import forget_peak, peak_memory
from common import line

SCENE, SENTENCES = asset("refshapes-sample/images/val_00000.png"), ["right red circle", "left red circle", "small circle"]
CARD = dict(commit="0123abc", hardware="1 CPU threads, a processor", seconds=600., steps=30, versions=dict(torch="2.15"), best=dict(epoch=3, mIoU=.5, n=60),
    settings=dict(data="refshapes: val 20 refs", seed=7, val="val", val_refs=20, shuffle_sentences=False, precision="no"))
SCORES = dict(val={"mIoU": .51, "oIoU": .52, "Pr@0.5": .53, "n": 60}, testA={"mIoU": .61})


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    "Whoever asks the hub fails the test."
    for name in ("get_hf_file_metadata", "hf_hub_download", "HfApi"): monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def segment():
    "A model of random numbers; nothing about it is on disk."
    return Segmenter(build_model(config("barleria-tiny"), seed=1).eval(), card=CARD | dict(scores=SCORES))


@pytest.fixture(scope="module")
def saved(segment, tmp_path_factory):
    return segment.save_pretrained(tmp_path_factory.mktemp("saved") / "mine")


@pytest.fixture
def mine(saved, tmp_path):
    "A copy of the saved folder that a test may spoil."
    return Path(shutil.copytree(saved, tmp_path / "mine"))


# ------------------------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize("name", ["barleria-tiny", "dcris-tinydino", "frozen-tiny", "snf-tiny"])
def test_what_ships(name):
    assert name in shipped_models()
    segment = Segmenter.from_pretrained(name)
    answers = segment(SCENE, SENTENCES)
    assert segment.model.config.name == name and not segment.model.training and [a.sentence for a in answers] == SENTENCES
    folder = asset(f"models/{name}")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "tuned.safetensors"] and sum(p.stat().st_size for p in folder.iterdir()) < 6e6
    assert "shapes: train" in segment.card["settings"]["data"] and yaml.safe_load((folder / "README.md").read_text().split("---")[1])["license"] == "apache-2.0"
    shown = Image.open(__import__("io").BytesIO(answers._repr_png_()))
    assert max(shown.size) < 2000


def test_all_roads_to_a_model(mine, monkeypatch):
    for road in (mine, str(mine), mine / "tuned.safetensors", str(mine / "tuned.safetensors"), "mine", "mine/tuned.safetensors", "./mine"):
        assert find_model(road).samefile(mine / "tuned.safetensors")
    run = mine.rename(mine.parent / "run")
    (run / "config.json").unlink(), (run / "README.md").unlink()
    assert Segmenter.from_pretrained(run).model.config.name == "barleria-tiny"
    (run.parent / "here" / "there").mkdir(parents=True)
    shutil.copy(run / "tuned.safetensors", run.parent / "here" / "there")
    assert find_model("here/there") == Path("here/there/tuned.safetensors") # looks like a hub's name, and is a path


def test_what_is_here_comes_before_what_ships(tmp_path):
    (tmp_path / "barleria-tiny").mkdir()
    line(lambda: Segmenter.from_pretrained("barleria-tiny"), "barleria-tiny holds no tuned.safetensors")


@pytest.mark.parametrize("name, words", [("barleria-tni", ["is missing", "Did you mean barleria-tiny"]), ("nowhere", ["nowhere is missing", "dcris-tinydino"]), ("/no/where", ["is missing"]), ("./a/b", ["is missing"]),
    ("~/runs", ["is missing"]), ("a/b/c", ["is missing"]), ("a/b.safetensors", ["is missing"]), ("runs/mine", ["runs/mine is missing"]), ("../x", ["is missing"]), ("a/", ["is missing"]), ("", ["names no model"]), (" ", ["names no model"]),
    (None, ["None names no model"]), (7, ["7 names no model"]), (["a"], ["names no model"]), ("x" * 9999, ["is missing"]), ("x/" * 3000, ["is missing"]), ("a\0b", ["is missing"]), ("a\nb", ["is missing"]), (Path("owner/name"), ["is missing"]),
    ("..", ["holds no tuned"]), ("hf://owner/name", ["is missing"]), ("人/名", ["is missing"])])
def test_names_that_lead_nowhere_ask_nobody(name, words, tmp_path):
    (tmp_path / "runs").mkdir()
    line(lambda: Segmenter.from_pretrained(name), *words)


def test_a_revision_is_the_hubs(mine):
    line(lambda: Segmenter.from_pretrained(mine, revision="main"), "leave the revision out")
    line(lambda: Segmenter.from_pretrained("barleria-tiny", revision="main"), "leave the revision out")
    line(lambda: Segmenter.from_pretrained(mine, device="gpu"), "unknown")


# ---------------------------------------------------------------------------------------------------------------- the hub
class FakeHub:
    "A hub with one model, and a list of what was asked."
    def __init__(self, source, tmp_path):
        self.source, self.asked, self.cache, self.sizes = source, [], tmp_path / "snapshot", {}

    def metadata(self, url, timeout):
        assert timeout <= 10
        owner, name, _, revision, file = url.split("/", 3)[3].split("/")
        if (owner, name) != ("owner", "name"): raise answer(RepositoryNotFoundError)
        if revision not in ("main", "v1", "c0ffee"): raise answer(RevisionNotFoundError)
        if not (self.source / file).exists(): raise answer(RemoteEntryNotFoundError)
        return SimpleNamespace(size=self.sizes.get(file, (self.source / file).stat().st_size), commit_hash="c0ffee")

    def download(self, name, file, revision):
        self.asked.append((name, file, revision))
        self.cache.mkdir(exist_ok=True)
        return str(shutil.copy(self.source / file, self.cache / file))


def answer(kind, status=404):
    return kind("no\nsuch thing", response=httpx.Response(status, request=httpx.Request("GET", "https://a.host/x")))


@pytest.fixture
def hub(monkeypatch, mine, tmp_path):
    fake = FakeHub(mine, tmp_path)
    monkeypatch.setattr(module, "get_hf_file_metadata", fake.metadata)
    monkeypatch.setattr(module, "hf_hub_download", fake.download)
    return fake


def test_from_the_hub(hub, segment):
    (hub.source / "extra.pkl").write_bytes(b"never fetched")
    there = Segmenter.from_pretrained("owner/name", revision="v1")
    assert hub.asked == [("owner/name", "tuned.safetensors", "c0ffee"), ("owner/name", "config.json", "c0ffee")] # two files of one commit
    assert there.card == segment.card and (there(SCENE, SENTENCES)[0].grid == segment(SCENE, SENTENCES)[0].grid).all()


def test_from_the_hub_without_a_description(hub):
    (hub.source / "config.json").unlink()
    assert Segmenter.from_pretrained("owner/name").card["settings"]["seed"] == 7 # from the note beside the numbers


def test_what_the_hub_refuses(hub):
    line(lambda: Segmenter.from_pretrained("owner/nome"), "no model 'owner/nome'")
    line(lambda: Segmenter.from_pretrained("owner/name", revision="v2"), "no revision 'v2'")
    hub.sizes["tuned.safetensors"] = 2**40
    line(lambda: Segmenter.from_pretrained("owner/name"), "tuned.safetensors of 'owner/name' has", "over")
    hub.sizes = {"config.json": None}
    line(lambda: Segmenter.from_pretrained("owner/name"), "config.json", "over")
    (hub.source / "tuned.safetensors").unlink()
    line(lambda: Segmenter.from_pretrained("owner/name"), "holds no tuned.safetensors")
    assert all(file == "tuned.safetensors" for _, file, _ in hub.asked)


@pytest.mark.parametrize("error", [ConnectionError("https://a.host is unknown\nRetry"), OSError(28, "No space left on device"), TimeoutError(), answer(HfHubHTTPError, 500)])
def test_no_hub(hub, monkeypatch, mine, error):
    def fails(*a, **k): raise error
    monkeypatch.setattr(module, "get_hf_file_metadata", fails)
    line(lambda: Segmenter.from_pretrained("owner/name"), "'owner/name' is missing on this machine", "the hub")
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *a, **k: str(mine / "tuned.safetensors"))
    assert Segmenter.from_pretrained("owner/name").model.config.name == "barleria-tiny" # an earlier copy


@pytest.mark.parametrize("revision", [None, "v1", "c0ffee", "../../x"])
def test_an_earlier_copy_is_found_without_a_network(hub, monkeypatch, tmp_path, revision):
    "The hub's cache as the hub's own library lays it out, with a download pinned to a commit."
    hub.cache = tmp_path / "hub" / "models--owner--name" / "snapshots" / "c0ffee"
    (tmp_path / "hub" / "models--owner--name" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr(hub, "metadata", lambda url, timeout: SimpleNamespace(size=9, commit_hash="c0ffee"))
    monkeypatch.setattr(module, "get_hf_file_metadata", hub.metadata)
    first = find_model("owner/name", revision)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if revision == "../../x": line(lambda: find_model("owner/name", revision), "is missing on this machine")
    else: assert find_model("owner/name", revision) == first
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {"models--owner--name"} and not list(tmp_path.glob("x"))


def test_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line(lambda: Segmenter.from_pretrained("owner/name"), "HF_HUB_OFFLINE is set", "'owner/name'")


def test_ctrl_c_is_not_swallowed(hub, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(module, "hf_hub_download", stop)
    with pytest.raises(KeyboardInterrupt): Segmenter.from_pretrained("owner/name")


class FakeApi:
    "Takes what is pushed."
    pushed, error = [], None
    def create_repo(self, name, exist_ok):
        if FakeApi.error: raise FakeApi.error
    def upload_folder(self, repo_id, folder_path, commit_message):
        FakeApi.pushed.append((repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}))
        return "https://a.host/commit"


def test_push(segment, monkeypatch):
    monkeypatch.setattr(module, "HfApi", FakeApi)
    assert segment.push_to_hub("owner/name") == "https://a.host/commit"
    name, files = FakeApi.pushed.pop()
    assert name == "owner/name" and sorted(files) == ["README.md", "config.json", "tuned.safetensors"] and b'from_pretrained("owner/name")' in files["README.md"]
    segment.push_to_hub("owner/name", dict(testB={"mIoU": .123, "n": 7}))
    assert json.loads(FakeApi.pushed.pop()[1]["config.json"])["scores"] == dict(testB={"mIoU": .123, "n": 7})
    for bad in ("name", "a/b/c", "", None, "../x", "-a/b"): line(lambda: segment.push_to_hub(bad), "owner/name")
    for FakeApi.error, word in ((LocalTokenNotFoundError("x"), "log in"), (answer(HfHubHTTPError, 403), "refused"), (ConnectionError("a\nb"), "cannot be reached")):
        line(lambda: segment.push_to_hub("owner/name"), "'owner/name' was not pushed", word)
    FakeApi.error = None
    assert not FakeApi.pushed


# ----------------------------------------------------------------------------------------------------------- what is saved
def test_there_and_back(segment, saved):
    there = Segmenter.from_pretrained(saved)
    assert there.card == segment.card and there.model.config == segment.model.config
    for (n, a), b in zip(segment.model.state_dict().items(), there.model.state_dict().values()): assert torch.equal(a, b), n
    lone = read_card(shutil.copy(saved / "tuned.safetensors", saved.parent / "lone.safetensors"))
    assert lone == segment.card | dict(scores={}) # the note beside the numbers has all but the scores


def test_a_run_becomes_a_model(segment, tmp_path):
    run = tmp_path / "run"
    save_tuned(segment.model, run / "tuned.safetensors", dict(settings=CARD["settings"], epoch=2, val=dict(mIoU=.4, n=60)))
    assert read_card(run / "tuned.safetensors") == dict(settings=CARD["settings"], best=dict(epoch=2, mIoU=.4, n=60), scores={})
    card = json.loads(json.dumps(CARD)) | dict(config=read_about(run / "tuned.safetensors")["config"])
    write_json(run / "run.json", card | dict(done=True)), write_json(run / "metrics.json", SCORES)
    assert read_card(run / "tuned.safetensors") == CARD | dict(scores=SCORES)
    write_json(run / "run.json", card | dict(done=False, best=None, seconds=0)) # it still trains
    assert read_card(run / "tuned.safetensors")["best"]["epoch"] == 2 and "seconds" not in read_card(run / "tuned.safetensors")
    for damaged in ('{"config": 1', "[]", "null", "[" * 99999, '{"config": {}, "done": true}'): # a run's card is for people: a broken one keeps no model from working
        (run / "run.json").write_text(damaged)
        assert read_card(run / "tuned.safetensors")["best"]["epoch"] == 2
    line(lambda: segment.save_pretrained(run), "is the folder of a run")


def test_saving_again_renews(segment, mine):
    (mine / "notes.txt").write_text("mine")
    Segmenter(segment.model).save_pretrained(mine)
    assert Segmenter.from_pretrained(mine).card == dict(scores={}) and (mine / "notes.txt").read_text() == "mine"
    page = (mine / "README.md").read_text()
    assert page.count("not recorded") >= 8 and "None" not in page


@pytest.mark.parametrize("broken", ["save_tuned", "write_json", "model_card", "atomic"])
def test_never_half_written(segment, mine, tmp_path, monkeypatch, broken):
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, broken, full)
    line(lambda: segment.save_pretrained(mine), "mine", "was not written", "disk is full")
    line(lambda: segment.save_pretrained(tmp_path / "deep" / "new"), "was not written")
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before and not (tmp_path / "deep" / "new").exists() and not list(tmp_path.rglob(".*"))


def test_a_mixture_is_noticed(segment, mine):
    other = Segmenter(build_model(config("barleria-tiny"), seed=2)).save_pretrained(mine.parent / "other")
    shutil.copy(other / "config.json", mine)
    line(lambda: Segmenter.from_pretrained(mine), "describes another file")


def test_the_folder_where_one_stands(segment, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    segment.save_pretrained(".")
    assert sorted(os.listdir()) == ["README.md", "config.json", "tuned.safetensors"] and 'from_pretrained("here")' in Path("README.md").read_text()
    assert Segmenter.from_pretrained(".").card == segment.card and os.listdir(tmp_path) == ["here"]
    line(lambda: segment.save_pretrained("/"), "is no place for a model")


def test_places_that_cannot_be(segment, tmp_path):
    (tmp_path / "file").write_text("x")
    line(lambda: segment.save_pretrained(tmp_path / "file"), "is a file")
    line(lambda: segment.save_pretrained(tmp_path / "file" / "below"), "was not written")
    own = Segmenter(build_model(replace(config("snf-tiny"), name="mine-tiny")))
    line(lambda: own.save_pretrained(tmp_path / "own"), "no configuration 'mine-tiny'")
    for bad in (dict(val=.5), dict(val=dict(mIoU=50)), {"a/b": dict(mIoU=.5)}, {1: dict(mIoU=.5)}): line(lambda: segment.save_pretrained(tmp_path / "own", bad), "are not {split")
    assert not (tmp_path / "own").exists()


# ------------------------------------------------------------------------------------------------------- hostile folders
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "[" * 99999, '{"format": "barleria_nb model, version 2"}', '{"format": ["x"]}', "9" * 9999, '{"format": "barleria_nb model, version 1"}', "x" * 2**21, "\ud800"])
def test_descriptions_that_are_none(mine, text):
    (mine / "config.json").write_text(text, errors="surrogatepass")
    line(lambda: Segmenter.from_pretrained(mine), "config.json")


def test_what_a_description_adds_is_passed_over(mine):
    said = read_json(mine / "config.json")
    for more in (dict(auto_map={"AutoModel": "evil.Model"}), dict(run=[1]), dict(run=dict(commit=10**30, seconds=float("inf"), best=dict(mIoU="a"), settings=dict(data="x" * 501))), dict(scores=["val"]), dict(scores=dict(val=dict(mIoU=True)))):
        (mine / "config.json").write_text(json.dumps(said | more))
        card = Segmenter.from_pretrained(mine).card
        assert card == CARD | dict(scores=SCORES) if "auto_map" in more else True
        assert set(card) <= {*FACTS, "scores"}


def test_numbers_that_are_none(mine):
    whole, about = (mine / "tuned.safetensors").read_bytes(), read_about(mine / "tuned.safetensors")
    (mine / "config.json").unlink()
    for data, word in ((whole[:9999], "not a whole"), (b"\x80\x04pickle", "not a whole"), (b"", "not a whole"), (save({"x": torch.ones(1)}), "not a tuned model"), (save({"x": torch.ones(1)}, {"barleria": json.dumps(about)}), "tensor"),
            (save({"x": torch.ones(1)}, {"barleria": json.dumps(about | dict(extra=[[1]]))}), "tensor"), (save({"x": torch.ones(1)}, {"barleria": json.dumps(about | dict(config=7))}), "cannot be read")):
        (mine / "tuned.safetensors").write_bytes(data)
        line(lambda: Segmenter.from_pretrained(mine), "tuned.safetensors", word)


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*FACTS, *FACTS["settings"], "mIoU", "val", "x"]), x, max_size=6), max_leaves=20)


@settings(max_examples=150, deadline=None)
@given(values)
def test_facts_are_sane_whatever_is_read(card):
    kept = facts(card)
    assert facts(kept) == kept and set(kept) <= set(FACTS)
    json.dumps(kept, allow_nan=False), json.dumps(split_scores(card), allow_nan=False)
    assert split_scores(split_scores(card)) == split_scores(card)


EVIL = ["<script>alert(1)</script>", "---\nlicense: mit\n---", "`rm -rf`", "![x](https://a.host)", "| a | b |", "\u202egnp.exe", "refcoco: \"}\n- !!python/object:x", "{name}{0}", "half \ud83d", "\x1b[31m", "a" * 500]


@pytest.mark.parametrize("evil", EVIL)
def test_the_page_says_only_what_it_says(segment, evil):
    card = facts(dict(commit=evil, hardware=evil, versions=dict(torch=evil), settings=dict(data=evil, val=evil, precision=evil))) | dict(scores=split_scores({"val": dict(mIoU=.5), evil: dict(mIoU=.5)}))
    page = model_card(segment.model, "0" * 64, card, evil)
    _, front, body = page.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "apache-2.0" and head["library_name"] == "barleria_nb" and set(head) == {"license", "library_name", "pipeline_tag", "tags", "datasets", "metrics"}
    text = body.split("```")[0] + body.split("```")[-1] # the rest is code, where the place stands as a JSON string
    assert "<script" not in text and "![" not in text and "\u202e" not in text and "\x1b" not in text and not [l for l in text.splitlines() if l.strip() == "---"]
    page.encode()
    assert segment.model.config.name in page and "from_pretrained(" in page


@pytest.mark.parametrize("name", ["barleria-tiny", "dcris-tinydino", "snf-tiny"])
def test_pages_of_other_models(name):
    page = model_card(build_model(config(name)), "0" * 64, {}, "x")
    assert "{" not in page.replace("{{", "") and name in page


@pytest.mark.parametrize("backbone", list(__import__("barleria_nb.model", fromlist=["BACKBONES"]).BACKBONES))
def test_every_tower_has_a_line(backbone, segment):
    "The page of a model on published towers, without building one."
    stand_in = SimpleNamespace(config=replace(config("snf-tiny"), backbone=backbone, pretrained=True), encoder=segment.model.encoder, head=segment.model.head, parameters=segment.model.parameters)
    page = model_card(stand_in, "0" * 64, dict(settings=dict(data="refcoco: x")), "x")
    assert ("COCO's train2014" in page) and (("are fetched" in page) != backbone.startswith("tiny"))


# ------------------------------------------------------------------------------------------------------------- answers
def test_an_answer_is_its_grid(segment):
    image = np.random.default_rng(0).integers(0, 255, (90, 131, 3), np.uint8)
    for r in segment(image, SENTENCES, threshold=.04):
        lifted = Letterbox(90, 131, 64).inverse(torch.from_numpy(r.grid)).numpy()
        assert r.grid.shape == (32, 32) and r.grid.base is None and (r.probability == lifted).all() and (r.mask == (lifted > .04)).all() and r.area == (lifted > .04).sum()
        if r.area: assert r.score == pytest.approx(lifted[lifted > .04].mean(), rel=1e-5) and r.box[2] * r.box[3] >= r.area
    nothing = segment(image, SENTENCES[0], threshold=.9999)[0]
    assert (nothing.box, nothing.score, nothing.area) == (None, None, 0)


def test_pictures_of_answers(segment):
    for size in ((1, 1, 3), (1, 400, 3), (400, 1, 3), (700, 30, 3)):
        for threshold in (0, .5, .9999): assert segment(np.zeros(size, np.uint8), ["a"] * 2, threshold)._repr_png_().startswith(b"\x89PNG")
    odd = segment(SCENE, ["$\\frac{", "half \ud83d", "人 名", "x" * 300, "word " * 99, "<b>", "a \x1b[31m b"])
    assert odd._repr_png_() and odd[0]._repr_png_() and len(odd.show(.2).axes) == 8 and isinstance(odd[1:3], Results)
    for bad in (1, -1, "x", float("nan"), True, None): line(lambda: segment(SCENE, "a", bad), "not in [0, 1)")
    line(lambda: odd.show(7), "not in [0, 1)"), line(lambda: Results().show(), "no answer")


def test_sentences_that_cannot_be(segment):
    for bad, word in (("", "is empty"), (" \n", "is empty"), ([], "no sentence"), ([""], "is empty"), (["a", None], "must be text"), (7, "of type int"), (None, "of type NoneType"), (b"ab", "must be text"), (["a"] * 10_001, "over 10,000")):
        line(lambda: segment(SCENE, bad), word)
    assert [r.truncated for r in segment(SCENE, ["a circle", "circle " * 10**5, "x" * 10**6])] == [False, True, True]
    assert len(segment(SCENE, (s for s in SENTENCES))) == 3


def test_images_that_cannot_be(segment, tmp_path):
    (tmp_path / "x.png").write_bytes(SCENE.read_bytes()[:99])
    wide = torch.zeros(1, dtype=torch.uint8).expand(3, 10_000, 10_000)
    for bad, word in (("none.png", "missing"), (tmp_path / "x.png", "broken"), (wide, "shrink it"), (np.zeros((2, 2)), "convert it"), (np.zeros((0, 2, 3), np.uint8), "convert it"), (None, "of type NoneType")): line(lambda: segment(bad, "a"), word)


def test_two_thousand_sentences(segment):
    "The answers are small: a grid each, however large the image is."
    forget_peak(torch.device("cpu"))
    image, before = np.zeros((600, 800, 3), np.uint8), peak_memory(torch.device("cpu"))
    many = segment(image, [f"circle {k}" for k in range(2000)])
    assert len(many) == 2000 and sum(r.grid.nbytes for r in many) < 2000 * 4200 and all(r.image is many[0].image for r in many)
    assert peak_memory(torch.device("cpu")) - before < 6e8 # 2,000 probabilities of this size would be 3.8 GB
    assert len(repr(many)) < 2000 and "2,000 in all" in repr(many) and len(many._repr_png_()) < 3e5 and len(pickled(many)) < 2000 * 4600 + 2e6


def pickled(x): return __import__("pickle").dumps(x)


def test_fifty_megapixels(segment, tmp_path):
    "Three sentences about the largest image: one probability at a time."
    image = np.zeros((5000, MAX_PIXELS // 5000, 3), np.uint8)
    forget_peak(torch.device("cpu"))
    before = peak_memory(torch.device("cpu"))
    three = segment(image, SENTENCES, .01)
    assert [r.mask.shape for r in three] == [image.shape[:2]] * 3 and three[0].area > 0
    assert three.show() and module._record(three[2], "x.png")["height"] == 5000
    assert peak_memory(torch.device("cpu")) - before < 1.9e9
