"Cases of a bench: a rule that knows no names, verdicts against a loop over pixels, a file that is checked, figures."
import copy
import json
import random

import numpy as np
import pytest
from common import line
from pycocotools import mask as coco

from barleria_nb import cases as module
from barleria_nb.bench import Budget, Run, bench_run
from barleria_nb.cases import RULE, SHARED, SORTS, VERDICTS, answer_cases, case_figure, choose_cases, count_figure, read_cases, shared_table, verdict, verdict_table, write_cases
from barleria_nb.data import RefSet
from barleria_nb.metrics import counts, evaluate
from barleria_nb.model import load_tuned
from barleria_nb.shapes import make_refshapes, split_scene

TINY = Budget(batch=16, lrs=(1e-3, 1e-4))


@pytest.fixture(scope="module")
def data(tmp_path_factory): return make_refshapes(tmp_path_factory.mktemp("cases") / "refshapes", scenes=dict(train=6, val=9, testA=2, testB=1), progress=False)


@pytest.fixture(scope="module")
def bench(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cases") / "bench"
    for name, lr in (("frozen-tiny", 1e-3), ("snf-tiny", 1e-3), ("snf-tiny", 1e-4)): bench_run(Run("refshapes", name, 0, lr), data, out, TINY, whole=False)
    return out


@pytest.fixture(scope="module")
def cases(bench, data): return answer_cases(bench, data)


def put(path, obj):
    path.write_text(obj if isinstance(obj, str) else json.dumps(obj))
    return path


# ---------------------------------------------------------------- the rule

def test_rule_by_hand():
    "Means .0, .1 … 1: the quantiles are sentences themselves; one is disputed; an image is taken once."
    means = [k / 10 for k in range(11)]
    ious = [[*means, 1., .9], [*means, 0., .1]] # the last two: means of one half, and disputed
    ids = list(range(13))
    found = choose_cases(ious, ids, ids)
    at = {s: {k for sort, k in found if sort == s} for s in SORTS}
    assert [s for s, _ in found] == [s for s in SORTS for _ in range(2)] and len({k for _, k in found}) == 8
    assert at["typical"] < {5, 11, 12} # three with that mean: the hash chooses two of them
    assert at["easy"] == {8, 9} and at["hard"] == {1, 2} # quantiles of the thirteen: .88 and .12
    assert at["disputed"] & {11, 12} == {11, 12} - at["typical"]
    assert len(choose_cases(ious, [0] * 13, ids)) == 1
    assert len(choose_cases(ious, [k // 5 for k in ids], ids)) == 3
    line(lambda: choose_cases([], [], []), "no answer")
    line(lambda: choose_cases([[], []], [], []), "no answer")


def test_rule_knows_no_names_and_no_order():
    rng = np.random.default_rng(0)
    ious = rng.choice([0., .1, .3, .7, .9], (5, 60)).tolist() # many ties
    images, ids = [k // 3 for k in range(60)], [1000 + k for k in range(60)]
    known = choose_cases(ious, images, ids)
    for seed in range(10):
        draw = random.Random(seed)
        rows, order = draw.sample(ious, 5), draw.sample(range(60), 60)
        assert [(s, order[k]) for s, k in choose_cases([[r[k] for k in order] for r in rows], [images[k] for k in order], [ids[k] for k in order])] == known
    assert choose_cases(ious, images, [f"x{i}" for i in ids]) != known # the hash decides ties


# ---------------------------------------------------------------- verdicts

def slow_verdict(mask, things, target):
    "Pixel by pixel, and the IoU above one half first."
    on, I = [0] * (len(things) + 1), 0
    for y, x in zip(*np.nonzero(mask)): on[next((k for k, t in enumerate(things) if t[y, x]), len(things))] += 1
    if not sum(on): return "nothing"
    for k, t in enumerate(things):
        if 2 * on[k] > sum(on) + int(t.sum()) - on[k]: return "right" if k == target else "other"
    k = max(range(len(on)), key=on.__getitem__)
    if 2 * on[k] <= sum(on): return "spread"
    return "ground" if k == len(things) else "right, rough" if k == target else "other, rough"


def test_verdicts_against_a_loop():
    rng, seen = np.random.default_rng(1), set()
    for i in range(30):
        things = np.stack([t.mask for t in split_scene("val", i).things])
        for share in (0, .1, .4, .6, 1):
            for _ in range(6):
                y, x, h, w = rng.integers([0, 0, 1, 1], [128, 128, 60, 60])
                mask = things[rng.integers(len(things))] & (rng.random((128, 128)) < share)
                if rng.random() < .6: mask[y:y + h, x:x + w] = rng.random() < .7
                target = int(rng.integers(len(things)))
                what, k = verdict(mask, things, target)
                assert what == slow_verdict(mask, things, target)
                assert (k is None) == (what in ("spread", "ground", "nothing")) and (k == target) == what.startswith("right")
                I, U = counts(mask, things[target])
                assert (what == "right") == (2 * I > U)
                seen.add(what)
    assert seen == set(VERDICTS)


def test_a_tie_is_no_majority():
    things = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]]], bool)
    assert verdict([[1, 1, 1, 1]], things, 0) == ("spread", None)
    assert verdict([[1, 0, 0, 0]], things, 0) == ("right, rough", 0) # IoU of exactly one half


# ---------------------------------------------------------------- answers

def test_counts_agree_with_evaluate(cases, bench, data):
    assert list(cases["runs"]) == ["frozen-tiny", "snf-tiny"] and cases["rule"] == RULE
    for name, r in cases["runs"].items():
        model = load_tuned(bench / f"refshapes/{name}/seed0-lr{r['lr']:g}/tuned.safetensors")
        scores = evaluate(model, RefSet.read(data, "val"), size=model.config.size, progress=False).summary()
        assert abs(r["mIoU"] - scores["mIoU"]) < 1e-3 and abs(r["verdicts"]["right"] / scores["n"] - scores["Pr@0.5"]) < .02
        assert sum(r["bins"]) == sum(r["verdicts"].values()) == cases["sentences"] == scores["n"] and not r["whole"]
    assert cases["runs"]["snf-tiny"]["tried"] == [1e-4, 1e-3] and cases["runs"]["frozen-tiny"]["tried"] == [1e-3]
    assert abs(sum(cases["chance"].values()) - 1) < 1e-4
    assert len({c["image"] for c in cases["cases"]}) == len(cases["cases"]) == 8


def test_one_mask_more_or_less(cases, bench, data):
    "The names asked for, in that order; the rule goes by those alone; a test split."
    alone = answer_cases(bench, data, ["snf-tiny"])
    assert list(alone["runs"]) == ["snf-tiny"] and alone["runs"]["snf-tiny"] == cases["runs"]["snf-tiny"]
    told = []
    both = answer_cases(bench, data, ["snf-tiny", "frozen-tiny", "snf-tiny"], tell=told.append)
    assert list(both["runs"]) == ["snf-tiny", "frozen-tiny"] and len(told) == 2
    assert [(c["sort"], c["sent"]) for c in both["cases"]] == [(c["sort"], c["sent"]) for c in cases["cases"]]
    assert answer_cases(bench, data, ["snf-tiny"], "testA")["split"] == "testA"


def test_missing_runs_are_named(bench, data, tmp_path):
    line(lambda: answer_cases(bench, data, ["snf-tiny", "dcris-tiny", "full-tiny"]), "no finished run of dcris-tiny, full-tiny")
    line(lambda: answer_cases(bench, data, []), "any configuration")
    line(lambda: answer_cases(bench, data, ["x" * 900, 7]), "no finished run")
    line(lambda: answer_cases(tmp_path, data), "holds no finished run")
    line(lambda: answer_cases(bench, data, split="test"), "no split 'test'")
    other = make_refshapes(tmp_path / "refshapes", scenes=dict(train=5, val=9, testA=2, testB=1), progress=False)
    line(lambda: answer_cases(bench, other), "no finished run")


def test_other_scores_or_scenes_are_refused(bench, data, tmp_path, monkeypatch):
    read = module.read_bench
    def changed(out):
        rows = read(out)
        for r in rows: r["splits"]["val"]["mIoU"] += .1
        return rows
    with monkeypatch.context() as m:
        m.setattr(module, "read_bench", changed)
        line(lambda: answer_cases(bench, data), "frozen-tiny scores")
    refs = RefSet.read(data, "val")
    refs.refs[0] = type(refs.refs[0])(**{**vars(refs.refs[0]), "ref_id": 7})
    line(lambda: module._drawn(refs, refs), "ref 7", "no thing of a drawn scene")


# ---------------------------------------------------------------- the file

def test_round_trip(cases, tmp_path):
    write_cases(tmp_path / "cases.json", cases)
    before = (tmp_path / "cases.json").read_bytes()
    assert read_cases(tmp_path / "cases.json") == cases
    bad = copy.deepcopy(cases)
    bad["cases"][0]["image"] = float("nan")
    line(lambda: write_cases(tmp_path / "cases.json", bad), "no sound cases", "/cases/0/image")
    assert (tmp_path / "cases.json").read_bytes() == before and list(tmp_path.iterdir()) == [tmp_path / "cases.json"]


def edits(c):
    "Ways to spoil a file, each with a word of the refusal."
    def at(*path, to):
        d = copy.deepcopy(c)
        x = d
        for k in path[:-1]: x = x[k]
        x[path[-1]] = to
        return d
    name, run, case = "snf-tiny", ("runs", "snf-tiny"), ("cases", 0)
    full = coco.encode(np.asfortranarray(np.ones((64, 64), np.uint8)))["counts"].decode()
    yield at("format", to="something else"), "format"
    yield at("runs", to={}), "runs or cases"
    yield at("cases", to=[]), "runs or cases"
    yield at("cases", to=c["cases"] * 2), "runs or cases"
    yield at("sentences", to=0), "runs or cases"
    yield at("cases", to=c["cases"] * 20), "/cases"
    yield at("runs", to={str(k): c["runs"][name] for k in range(200)}), "/runs"
    yield at("runs", "x" * 70, to=c["runs"][name]), "/runs"
    yield at("sentences", to=True), "/sentences"
    yield at("sentences", to=10**400), "/sentences"
    yield at(*run, "lr", to=float("nan")), "/runs/snf-tiny/lr"
    yield at(*run, "lr", to="0.1"), "/lr"
    yield at(*run, "commit", to=None), "/commit"
    yield at(*run, "whole", to=1), "/whole"
    yield at(*run, "bins", to=[0] * 21), "counts of 'snf-tiny'"
    yield at(*run, "bins", to=[c["sentences"], *[0] * 18]), "counts of"
    yield at(*run, "bins", to=[-1, *c["runs"][name]["bins"][1:]]), "/bins/0"
    yield at(*run, "verdicts", "right", to=c["sentences"] + 1), "counts of"
    yield at(*run, "verdicts", to={}), "/verdicts"
    yield at(*run, "shared", "neither", to=10**6), "counts of"
    yield at(*case, "sort", to="best"), "case 0"
    yield at(*case, "image", to=7), "case 0"
    yield at(*case, "image", to=-1), "/image"
    yield at(*case, "sentence", to="x" * 401), "/sentence"
    yield at(*case, "sentence", to=["x"]), "/sentence"
    yield at(*case, "extra", to=1), "/cases/0"
    yield at(*case, "answers", to={}), "case 0"
    yield at(*case, "answers", name, to={"iou": .5}), "/answers/snf-tiny"
    yield at(*case, "answers", name, "iou", to=2), "/iou"
    yield at(*case, "answers", name, "iou", to=.98765), "not its mask's"
    for mask in (full, "", "é", "\ud800", "PPYo0", "~~~~"): yield at(*case, "answers", name, "mask", to=mask), "case 0: "
    for mask in ("0" * 30_000, 5, [1, 2]): yield at(*case, "answers", name, "mask", to=mask), "snf-tiny/mask"
    beyond = at(*case, "ref", to=c["cases"][0]["image"] * 10 + 9)
    beyond["cases"][0]["sent"] = beyond["cases"][0]["ref"] * 10
    yield beyond, "no thing 9"
    far = at(*case, "image", to=10**8)
    far["cases"][0] |= dict(ref=10**9, sent=10**9)
    yield far, "case 0"


def test_hostile_files(cases, tmp_path):
    for k, (bad, word) in enumerate(edits(cases)): line(lambda: read_cases(put(tmp_path / f"{k}.json", bad)), f"{k}.json", "no sound cases", word)
    for text in ("null", "[]", "7", '"x"', "{}", "[" * 100_000): line(lambda: read_cases(put(tmp_path / "x.json", text)), "x.json")
    line(lambda: read_cases(put(tmp_path / "x.json", json.dumps(cases)[:-9])), "not JSON")
    line(lambda: read_cases(put(tmp_path / "x.json", " " * 2**23)), "over")
    line(lambda: read_cases(tmp_path / "none.json"), "cannot be read")
    line(lambda: read_cases(put(tmp_path / "x.json", {"a\nb" * 20: 1})), "no sound cases")
    bad = copy.deepcopy(cases)
    bad["runs"] = {"a\nb": {}}
    line(lambda: read_cases(put(tmp_path / "x.json", bad)), "/runs/a b")


# ---------------------------------------------------------------- figures and tables

def test_figures_and_tables(cases, tmp_path):
    fig = case_figure(cases)
    assert len(fig.axes) == 8 * 4
    fig.savefig(tmp_path / "a.png")
    case_figure(cases, ["snf-tiny"]).savefig(tmp_path / "b.png")
    count_figure(cases).savefig(tmp_path / "c.png")
    assert all((tmp_path / f"{n}.png").stat().st_size > 5000 for n in "abc")
    table = verdict_table(cases).splitlines()
    assert len(table) == 3 and "?" in table[1] and len({len(l) for l in table}) == 1
    for l in table[1:]:
        *_, picked, drawn = l.split()[:5]
        right = 100 * cases["runs"][l.split()[0]]["verdicts"]["right"] / cases["sentences"]
        assert drawn == "–" or abs(float(picked) * float(drawn) / 100 - right) < .2
    assert len(shared_table(cases).splitlines()) == 4 and all(s in shared_table(cases) for s in SHARED)
    for show in (case_figure, count_figure, verdict_table, shared_table):
        line(lambda: show(cases, ["snf-tiny", "nobody"]), "no answers of nobody")
        line(lambda: show(cases, []), "no method")
        line(lambda: show(cases, [f"n{k}" for k in range(999)]), "no answers")


def test_blank_methods_and_odd_words(cases, tmp_path):
    "A method that never answers, in a set where it is the only one; formulas and half characters are drawn as they are."
    blank, nothing = copy.deepcopy(cases), coco.encode(np.asfortranarray(np.zeros((128, 128), np.uint8)))["counts"].decode()
    n = blank["sentences"]
    blank["runs"] = {"$\\frac": blank["runs"]["snf-tiny"] | dict(mIoU=0., bins=[n] + [0] * 19, verdicts=dict.fromkeys(VERDICTS, 0) | dict(nothing=n), shared=dict.fromkeys(SHARED, 0), whole=True)}
    for c in blank["cases"]: c |= dict(sentence="$\\frac{ \ud83d " * 20, answers={"$\\frac": dict(iou=0., mask=nothing)})
    read = read_cases(put(tmp_path / "blank.json", blank))
    case_figure(read).savefig(tmp_path / "a.png")
    count_figure(read).savefig(tmp_path / "b.png")
    assert verdict_table(read).splitlines()[1].split()[2:] == ["0.0", "0.0", "–", *["0.0"] * 6, "100.0"]
    assert shared_table(read).splitlines()[1].split()[1:] == ["0", "–", "–", "–", "–"]


def test_names_by_a_stranger(cases, tmp_path):
    "A name keeps to its line and commands no terminal."
    odd, name = copy.deepcopy(cases), "\x1b[2Jlora-tiny@1%\n\ud800"
    odd["runs"][name] = odd["runs"].pop("snf-tiny")
    for c in odd["cases"]: c["answers"][name] = c["answers"].pop("snf-tiny")
    read = read_cases(put(tmp_path / "odd.json", odd))
    for table in (verdict_table(read), shared_table(read)): assert "\n[2Jlora-tiny@1% " in table and "\x1b" not in table and len(table.splitlines()) in (3, 4)
    line(lambda: verdict_table(read, ["lora-tiny@1%\n"]), "no answers of lora-tiny@1%;")
    case_figure(read), count_figure(read)


def test_the_saved_cases():
    from barleria_nb.core import asset
    saved = read_cases(asset("results/bench/cases.json"))
    assert saved["rule"] == RULE and saved["split"] == "val" and len(saved["runs"]) > 1
    ids = [c["image"] for c in saved["cases"]]
    assert 6 <= len(ids) <= 10 and len(set(ids)) == len(ids)
    case_figure(saved), count_figure(saved)
