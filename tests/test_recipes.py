"Recipes and the reproduction ledger: every own row of both papers has its trainings, the file is in step with the papers' tables, and both papers' models train and are scored on photographs."
import csv
import json
import shlex
from collections import Counter, defaultdict
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import pytest
from fastcore.script import anno_parser

from barleria_nb import cli, recipes as module
from barleria_nb.bench import read_bench
from barleria_nb.core import asset
from barleria_nb.data import RefSet, tokenize
from barleria_nb.inference import Segmenter
from barleria_nb.metrics import evaluate
from barleria_nb.model import config
from barleria_nb.papers import paper_rows
from barleria_nb.recipes import (GREF, MEASURED, PLACES, SETS, LedgerRow, command, cpu_rate, ledger_rows, ledger_table, origins, predicted_hours, read_ledger, recipes, recipes_table, record,
    reproduce, sentences_seen, write_ledger)
from barleria_nb.refcoco import OFFICIAL
from barleria_nb.shapes import make_refshapes
from barleria_nb.speed import flops
from barleria_nb.training import train
from common import line

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcoco-sample"
photographs = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is missing: photographs with sentences")
RUNS = {r.run: r for r in recipes()}
B16 = RUNS["barleria-b16-refcoco"]


def own(r):
    "Did the paper of this cell train it, or name it as a row of its ablation? By the words of print, not by numbers of rows."
    if r.paper == "dcris": return r.table > 1 or r.method.startswith("DCRIS")
    return r.method.startswith("BarLeRIa") or r.table in (4, 5) and r.method != "ReSTR" or r.method == "ETRIS" and r.backbone == "EVA-CLIP"


def data_of(recipe, **counts):
    "The data's name in a card: the official counts, or `counts`; sentences that nobody has published are made up."
    splits = OFFICIAL.get(recipe.data) or dict(train=(90_000, None, 0), val=(7000, None, 0))
    return f"{recipe.data}: " + "; ".join(f"{s} {n} refs, {m} sentences" for s, (n, m) in ({s: (n, m or 2 * n) for s, (n, m, _) in splits.items()} | counts).items()) + "; 0123456789abcdef"


def card_of(recipe, seed=0, **changes):
    "A card as a finished run of this recipe would have it."
    c = recipe.config()
    settings = dict(config=c.name, **{k: v for k, v in asdict(c).items() if k != "name"}, seed=seed, data=data_of(recipe), val="val", val_refs=None, shuffle_sentences=False)
    return dict(done=True, settings=settings | changes, commit="0123456789ab", hardware="one GPU", seconds=5400.)


def scores_of(recipe, value): return {(d, s): dict(mIoU=value, oIoU=value - .01, n=OFFICIAL[d][s][1] or 2 * OFFICIAL[d][s][0]) for d, s in recipe.cells}


# ---------------------------------------------------------------- recipes

def test_every_own_row_has_its_recipes_and_no_other_has():
    rows = {(r.paper, r.table, r.row) for r in paper_rows() if own(r)} | {("dcris", 4, n) for n in range(1, 5)}
    assert {(r.paper, r.table, r.row) for r in recipes()} == rows
    assert (len(recipes()), len(RUNS)) == (89, 59)


def test_recipes_train_on_what_the_row_is_scored_on():
    trained = defaultdict(list)
    for r in recipes(): trained[r.paper, r.table, r.row] += r.cells
    for key, cells in trained.items():
        printed = [r for r in paper_rows(*key[:2]) if r.row == key[2] and r.split != "average"] if key[:2] != ("dcris", 4) else []
        assert len(cells) == len(set(cells))
        if printed: assert set(cells) == {PLACES.get((r.dataset, r.split), (r.dataset, r.split)) for r in printed}
    assert [r.data for r in recipes("barleria", 4)] == 5 * list(SETS) and {r.data for r in recipes("dcris", 4)} == {"refcoco"}
    assert {r.run for r in recipes() if r.data == "mixed"} == {"barleria-eva02-b16-mixed", "barleria-l14-mixed", "dcris-l14-mixed"}


def test_schedules_and_sizes_are_the_printed_ones():
    for r in RUNS.values():
        c, large = r.config(), "l14" in r.configuration
        assert (c.epochs, c.drop, c.batch, c.lr) == (50, .7, 64 if large else 32, 2e-4 if large else 1e-4) and c.pretrained
        assert c.size == (448 if r.paper == "dcris" else 420 if large else 416)
        assert c.words == (22 if r.data == "refcocog" or r.paper == "barleria" and r.data in GREF else 17)
        assert dict(r.changes) == ({"words": 22} if c.words == 22 else {})


def test_configurations_are_the_counted_ones():
    "By the printed number of tuned parameters: rounded or cut, as in the counts of the papers."
    printed = {(r.paper, r.table, r.row): r.params for r in paper_rows() if r.params and own(r)}
    assert len(printed) == 5 + 5 + 8 + 9
    names = {(r.paper, r.table, r.row): r.configuration for r in recipes()}
    assert [names["dcris", 4, n] for n in range(1, 5)] == ["dcris-d64-64-b14", "dcris-b14", "dcris-d128-128-b14", "dcris-d256-128-b14"]
    assert [names["dcris", 3, n] for n in range(1, 5)] == ["frozen-b14", "dcris-da-b14", "dcris-ta-b14", "dcris-b14"]
    for t, n, name in ((2, 2, "frozen-b14"), (2, 1, "full-b14"), (2, 6, "etris-b14"), (2, 7, "dcris-3-b14"), (5, 6, "dcris-b14"), (5, 9, "dcris-12-b14")): assert names["dcris", t, n] == name
    assert [names["barleria", 5, n] for n in range(2, 7)] == ["etris-b16", "snf-b16", "snf+etris-b16", "barleria-noglobal-b16", "barleria-b16"]


def test_rows_with_equal_cells_are_one_run():
    "What two tables print alike, digit for digit, under one name, is one training; the ledger must not ask for it twice."
    for t, n, run in ((1, 16, "barleria-b16"), (4, 6, "barleria-b16"), (5, 6, "barleria-b16")):
        assert {r.run for r in recipes("barleria", t) if r.row == n} == {f"{run}-{d}" for d in SETS}
    assert {(r.table, r.row) for r in recipes("dcris") if r.run == "dcris-b14-refcoco"} == {(1, 21), (2, 8), (3, 4), (4, 2), (5, 6)}
    lines = {r.run: {command(x)[1] for x in recipes() if x.run == r.run} for r in recipes()}
    assert all(len(v) == 1 for v in lines.values()) and len({v for s in lines.values() for v in s}) == len(RUNS)


def test_origins_name_every_setting_once():
    for r in RUNS.values():
        found = origins(r)
        assert len({o.setting for o in found}) == len(found) and {o.origin for o in found} <= {"printed", "released", "here"} and all(o.value and o.where for o in found)
        said = {o.setting: o for o in found}
        theirs = r.paper == "dcris" and r.configuration in ("full-b14", "adapter-b14", "compacter-b14", "lora-b14", "etris-b14") # Table 2: other methods kept settings of their own
        assert {said[k].origin for k in ("epochs", "batch", "lr", "drop")} == {"here" if theirs else "printed"} and said["words"].value == str(r.config().words)
        assert (said["threshold"].value, said["threshold"].origin, said["resampling"].origin) == ("0.35", "released", "here") and ("ImageNet" in said["colours"].where) == (r.paper == "dcris") and {"letterbox", "way back"} <= said.keys()
        assert ("union" in said) == (r.data == "mixed") and (said["size"].origin == "here") == (r.configuration == "barleria-l14")


def test_refusals():
    line(lambda: recipes("barleria", 6), "barleria table 6")
    line(lambda: replace(B16, data="refcoc"), "refcoc", "refcoco")
    line(lambda: replace(B16, changes=(("epoch", 3),)).config(), "epoch")


# ---------------------------------------------------------------- commands

@lru_cache
def parser(name): return anno_parser(getattr(cli, name).__wrapped__, prog=name)


def parsed(text):
    "A shell line as its command would read it."
    name, *words = shlex.split(text)
    return name, hasattr(cli, name) and vars(parser(name).parse_args(words))


def test_commands_are_read_as_they_are_meant():
    for r in RUNS.values():
        fetch, learn, score = command(r)
        for part in fetch.split(" && "): assert parsed(part)[0] in ("barleria_data", "barleria_mix")
        assert [shlex.split(p)[1] for p in fetch.split(" && ")][:len(r.sets)] == list(r.sets)
        name, a = parsed(learn)
        c = config(a["config"], **{k: a[k] for k in ("words", "epochs", "batch", "lr", "pretrained")})
        assert name == "barleria_train" and c == r.config() and a["precision"] == "bf16" and a["workers"] == 8 and a["data"] == f"data/{r.data}" in fetch and not a["train_positions"]
        evals = [parsed(p) for p in score.split(" && ")]
        assert [(Path(e["data"]).name, e["split"]) for _, e in evals] == r.cells and all(n == "barleria_eval" and e["run"] == a["out"] for n, e in evals)


def test_the_plain_union_is_called_by_its_name_everywhere():
    plain, clean = command(RUNS["dcris-l14-mixed"], as_published=True), command(RUNS["dcris-l14-mixed"])
    assert plain[0] == clean[0] + " --as_published" and "--data data/mixed-as-published --out runs/dcris-l14-mixed-as-published" in plain[1]
    assert "as-published" not in " ".join(clean) and plain[2].count("runs/dcris-l14-mixed-as-published") == 8
    assert command(B16, as_published=True) == command(B16)


# ---------------------------------------------------------------- the ledger

def test_the_file_is_in_step_with_the_papers_and_the_recipes(tmp_path):
    shipped = read_ledger()
    write_ledger(tmp_path / "new.csv", ledger_rows(shipped))
    assert (tmp_path / "new.csv").read_bytes() == asset("reproduction.csv").read_bytes()


def test_every_published_figure_is_there_once_and_nothing_else():
    ledger = {(r.paper, r.table, r.row, r.dataset, r.split): r for r in read_ledger()}
    printed = {(r.paper, r.table, r.row, r.dataset, r.split): r for r in paper_rows() if own(r)}
    assert len(ledger) == len(read_ledger()) == 237 and ledger.keys() - printed.keys() == {("dcris", 4, n, "refcoco", s) for n in range(1, 5) for s in SETS["refcoco"]}
    assert not printed.keys() - ledger.keys()
    for k, p in printed.items(): assert (ledger[k].published, ledger[k].metric, ledger[k].how, ledger[k].method, ledger[k].variant) == (p.value, p.metric, p.how, p.method, p.variant)
    assert all(r.published is None and r.how == "lost" for k, r in ledger.items() if k[:2] == ("dcris", 4))
    assert {r.metric for r in ledger.values()} == {"mIoU", "oIoU"} and Counter(r.metric for r in ledger.values())["oIoU"] == 9


def test_each_line_holds_the_command_for_its_own_figure():
    by_key = {(r.paper, r.table, r.row, r.data): r for r in recipes()}
    for r in read_ledger():
        if r.split == "average":
            assert r.command.startswith("no run of its own") and r.tflop is r.exaflop is r.h100_hours is None
            continue
        fetch, learn, score = command(by_key[r.paper, r.table, r.row, r.data])
        data, split = PLACES.get((r.dataset, r.split), (r.dataset, r.split))
        mine = next(p for p in score.split(" && ") if p.endswith(f"--data data/{data} --split {split}"))
        assert r.command == f"{fetch} && {learn} && {mine}" and split in OFFICIAL[data]


def test_costs():
    for r in read_ledger():
        if r.exaflop is None: continue
        seen = sentences_seen(next(x for x in RUNS.values() if (x.configuration, x.data) == (r.configuration, r.data)))
        assert r.exaflop == pytest.approx(r.tflop * seen / 1e6, rel=.01) and r.h100_hours == pytest.approx(predicted_hours(r.exaflop), rel=.06)
    assert sentences_seen(B16) == 50 * (42404 // 32) * 32 and sentences_seen(RUNS["dcris-l14-mixed"]) == 50 * ((42404 + 42278 + 42226) // 64) * 64
    assert 1e10 < cpu_rate("no") < cpu_rate() < 1e14 and predicted_hours(3600., 1e18) == 1


@pytest.mark.parametrize("name, words", [("barleria-b16", 17), ("dcris-l14", 22)])
def test_operations_are_the_models(name, words):
    kept = next(r.tflop for r in read_ledger() if (r.configuration, r.words) == (name, words) and r.tflop)
    assert kept == float(f"{flops(config(name, words=words)) / 1e12:.4g}")


@pytest.mark.long
def test_all_operations_are_the_models():
    "The whole file once more, with nothing kept."
    assert ledger_rows() == [replace(r, **dict.fromkeys(MEASURED, "")) for r in read_ledger()]


def test_a_run_is_entered_wherever_it_stands():
    rows = read_ledger()
    new = record(record(rows, B16, card_of(B16), scores_of(B16, .724)), B16, card_of(B16, 2), scores_of(B16, .71))
    changed = [(a, b) for a, b in zip(rows, new) if a != b]
    assert {(b.table, b.dataset, b.split) for _, b in changed} == {(t, "refcoco", s) for t in (1, 5) for s in SETS["refcoco"]} | {(4, "refcoco", "average")}
    for a, b in changed:
        assert b.measured == "72.40 71.00" and b.seeds == "0 2" and replace(b, **{k: getattr(a, k) for k in MEASURED}) == a
        if b.split != "average": assert (b.commit, b.hardware, b.hours) == ("0123456789ab 0123456789ab", "one GPU", "1.50 1.50")
    again = record(new, B16, card_of(B16), scores_of(B16, .5))
    assert {r.measured for r in again if r.measured} == {"50.00 71.00"} # a seed is replaced, not doubled
    part = record(rows, B16, card_of(B16), {("refcoco", "testA"): dict(mIoU=.5, oIoU=.4, n=5657)})
    assert {(r.table, r.split) for r in part if r.measured} == {(1, "testA"), (5, "testA")}


def test_a_row_is_averaged_when_all_its_cells_are_measured():
    rows = read_ledger()
    for value, data in zip((.70, .60, .50, .40), SETS):
        r = RUNS[f"barleria-b16-{data}"]
        rows = record(rows, r, card_of(r), scores_of(r, value))
    found = {(r.table, r.dataset): r.measured for r in rows if r.split == "average" and r.configuration == "barleria-b16"}
    expected = f"{(3 * 70 + 3 * 60 + 2 * 50 + 40) / 9:.2f}"
    assert found == {(1, "all"): expected, (5, "all"): expected, (4, "all"): expected, (4, "refcoco"): "70.00", (4, "refcoco+"): "60.00", (4, "refcocog"): f"{140 / 3:.2f}"}
    uneven = record(record(rows, B16, card_of(B16, 1), scores_of(B16, .5)), B16, card_of(B16), scores_of(B16, .9)) # RefCOCO has another seed now
    assert {(r.table, r.dataset): r.measured for r in uneven if r.split == "average" and r.configuration == "barleria-b16"} == {(t, "all"): "" for t in (1, 4, 5)} | {(4, "refcoco"): "90.00 50.00", (4, "refcoco+"): "60.00", (4, "refcocog"): f"{140 / 3:.2f}"}
    mix = RUNS["dcris-l14-mixed"]
    rows = record(rows, mix, card_of(mix), scores_of(mix, .76))
    assert {r.measured for r in rows if (r.paper, r.table, r.row) == ("dcris", 1, 25)} == {"75.00"} # that row prints oIoU


def test_what_was_measured_is_kept_when_the_ledger_is_made_anew(tmp_path):
    rows = record(read_ledger(), B16, card_of(B16), scores_of(B16, .7))
    write_ledger(tmp_path / "l.csv", rows)
    assert read_ledger(tmp_path / "l.csv") == rows == ledger_rows(read_ledger(tmp_path / "l.csv")) and " 7 " in ledger_table(rows).splitlines()[-1]
    gone = replace(next(r for r in rows if r.measured), split="testC")
    line(lambda: ledger_rows([*rows, gone]), "testC")
    assert ledger_rows([*rows, replace(gone, **dict.fromkeys(MEASURED, ""))]) == rows


@pytest.mark.parametrize("changes, said", [(dict(epochs=3), "epochs is 3, not 50"), (dict(config="snf-b16"), "snf-b16"), (dict(pretrained=False), "pretrained"), (dict(words=22), "words"), (dict(shuffle_sentences=True), "shuffle_sentences"),
    (dict(tuners=[["positions", {}]]), "tuners"), (dict(data="mixed-as-published: train 9 refs"), "held-out"), (dict(data="refcoco+: train 3 refs"), "data is refcoco+: train 3 refs, not refcoco"), (dict(data="refcoco"), "data is"), (dict(data=None), "data is None"),
    (dict(val=None), "val is None, not val"), (dict(val="testA"), "val is testA"), (dict(val_refs=500), "val_refs is 500, not None")])
def test_other_runs_are_not_entered(changes, said):
    line(lambda: record(read_ledger(), B16, card_of(B16, **changes), scores_of(B16, .7)), said)


@pytest.mark.parametrize("run, counts, said", [("barleria-b16-refcoco", dict(train=(60, 170)), "60 refs in train, not 42404"), ("barleria-b16-refcoco", dict(val=(40, 110)), "40 refs in val, not 3811"),
    ("barleria-b16-refcoco", dict(train=(42404, 42404)), "42404 sentences in train, not 120624"), ("barleria-b16-refcoco", dict(testB=(9, 9)), "9 refs in testB, not 1810"), ("barleria-b16-refcocog-google", dict(val=(4999, 9999)), "4999 refs in val, not 5000"),
    ("dcris-l14-mixed", dict(train=(900, 2500)), "900 refs in train, not 36085 to 126908"), ("dcris-l14-mixed", dict(train=(126909, 400_000)), "126909 refs in train"), ("dcris-l14-mixed", dict(val=(0, 0)), "0 refs in val, not 1 to 10189")])
def test_a_part_of_a_set_is_not_entered(run, counts, said):
    r = RUNS[run]
    line(lambda: record(read_ledger(), r, card_of(r, data=data_of(r, **counts)), scores_of(r, .7)), said, f"barleria_data {r.sets[0]} --out", "without --limit")


def test_a_set_without_its_train_split_is_not_entered(): line(lambda: record(read_ledger(), B16, card_of(B16, data="refcoco: val 3811 refs, 10834 sentences; 0"), scores_of(B16, .7)), "0 refs in train")


@pytest.mark.parametrize("run, cell, n", [("barleria-b16-refcoco", ("refcoco", "val"), 110), ("barleria-b16-refcoco", ("refcoco", "testA"), None), ("dcris-l14-mixed", ("refcoco+", "testB"), 4888), ("barleria-b16-refcocog", ("refcocog", "test"), 9)])
def test_a_score_on_a_part_of_a_split_is_not_entered(run, cell, n):
    r = RUNS[run]
    scores = scores_of(r, .7)
    line(lambda: record(read_ledger(), r, card_of(r), scores | {cell: scores[cell] | dict(n=n)}), f"{cell[0]} {cell[1]} was scored on {n} sentences", f"--data data/{cell[0]} --split {cell[1]}")


def test_counts_that_nobody_published_are_not_asked_for():
    "G-Ref's sentences: of a union, or of a run whose folder has no such split, any number will do."
    mix, r = RUNS["dcris-l14-mixed"], RUNS["barleria-b16-refcocog"]
    for run, card in ((mix, card_of(mix)), (r, card_of(r, data="refcocog: train 42226 refs, 80512 sentences; val 2573 refs, 4896 sentences; 0"))):
        scores = {("refcocog", "test"): dict(mIoU=.5, oIoU=.4, n=9602)}
        assert any(x.measured for x in record(read_ledger(), run, card, scores))


def test_a_run_that_left_something_out_is_not_entered():
    line(lambda: record(read_ledger(), B16, card_of(B16) | dict(left_out=10), scores_of(B16, .7)), "left out corrections")
    line(lambda: record(read_ledger(), B16, card_of(B16) | dict(unreadable=[7]), scores_of(B16, .7)), "left out pictures")
    assert any(r.measured for r in record(read_ledger(), B16, card_of(B16, precision="fp16") | dict(left_out=0), scores_of(B16, .7))) # how a step is computed stays free


def test_an_unfinished_run_is_not_entered():
    line(lambda: record(read_ledger(), B16, card_of(B16) | dict(done=False), scores_of(B16, .7)), "not done", "barleria_train barleria-b16")


@pytest.mark.parametrize("cut, where", [(lambda l: [*l[:4], ",".join(l[4].split(",")[:13]), *l[5:]], "line 5: not a row"), (lambda l: [*l[:4], l[4] + ",more", *l[5:]], "line 5: not a row"),
    (lambda l: [*l[:-1], l[-1][:30]], "line 238: not a row"), (lambda l: [l[0].removesuffix(",command"), *l[1:]], "line 1: not the columns"), (lambda l: [], "line 1")])
def test_rows_that_were_cut_are_no_measurements(tmp_path, cut, where):
    (tmp_path / "l.csv").write_text("\n".join(cut(asset("reproduction.csv").read_text().splitlines())))
    line(lambda: read_ledger(tmp_path / "l.csv"), "l.csv", where)


@pytest.mark.parametrize("spoil", ["bytes", "number", "column", "missing"])
def test_broken_ledgers(tmp_path, spoil):
    text = asset("reproduction.csv").read_text()
    bad = dict(bytes=b"\xff\xfe", number=text.replace("72.4,printed", "lots,printed", 1).encode(), column=text.replace("published", "printed by", 1).encode(), missing=None)[spoil]
    if bad is not None: (tmp_path / "l.csv").write_bytes(bad)
    line(lambda: read_ledger(tmp_path / "l.csv"), "l.csv")


def test_columns():
    with open(asset("reproduction.csv"), encoding="utf-8", newline="") as f: names = next(csv.reader(f))
    assert names == [f.name for f in fields(LedgerRow)] and {*MEASURED} < {*names}


def test_tables():
    shown = recipes_table().splitlines()
    assert len(shown) == 1 + len({(r.paper, r.table, r.row) for r in recipes()}) and "refcocog (22), refcocog-google (17)" in recipes_table(recipes("dcris", 1))
    total = ledger_table(read_ledger()).splitlines()
    assert len(total) == 12 and total[-1].split()[:3] == ["all", "237", "0"]


def test_reproduce_passes_on_how_a_step_is_computed(tmp_path, monkeypatch):
    seen, how = {}, dict(workers=3, accumulate=2, recompute=True, compile=True, precision="fp16")
    def train(*data, **named): seen.update(named); raise KeyboardInterrupt
    monkeypatch.setattr(module, "train", train)
    make_refshapes(tmp_path / "refcoco", "refshapes", dict(train=1), workers=1, progress=False)
    with pytest.raises(KeyboardInterrupt): reproduce(B16, tmp_path, tmp_path / "runs", **how)
    assert how.items() <= seen.items()


def test_reproduce_goes_from_a_folder_of_sets_to_scores(tmp_path):
    "On drawn sets with the real ones' names; a second seed has a run of its own, and a finished run is not trained again."
    make_refshapes(tmp_path / "refcoco", "refshapes", dict(train=6, val=2, testA=2, testB=2), workers=1, progress=False)
    tiny = replace(B16, configuration="snf-tiny", changes=(("epochs", 1), ("batch", 4), ("words", 17)))
    go = lambda seed: reproduce(tiny, tmp_path, tmp_path / "runs", seed=seed, device="cpu", precision="no", progress=False)
    first, again, other = go(0), go(0), go(1)
    assert (json.loads(json.dumps(first[0])), first[1]) == again and list(first[1]) == tiny.cells and {p.name for p in (tmp_path / "runs").iterdir()} == {"snf-tiny-refcoco", "snf-tiny-refcoco-seed1"}
    assert other[0]["settings"]["seed"] == 1 and all(0 <= s["mIoU"] <= 1 for s in other[1].values())
    line(lambda: reproduce(replace(tiny, data="refcoco+"), tmp_path, tmp_path / "runs", device="cpu", progress=False), "refcoco+")


# ---------------------------------------------------------------- photographs

def few(splits):
    "Some refs of the photographs, one sentence each where they are scored."
    data = RefSet.read(SAMPLE)
    refs = [r if r.split == "train" else replace(r, sentences=r.sentences[:1]) for s, n in splits.items() for r in data.split(s).refs[:n]]
    return RefSet(SAMPLE, refs, "photographs")


def through(name, out, splits, **changes):
    "Train, load, score every split; the card and the sentences scored."
    data = few(splits)
    card = train(config(name, **changes), data, out, val_refs=1, device="cpu", progress=False)
    model = Segmenter.from_pretrained(out, "cpu").model
    scores = {s: evaluate(model, data.split(s), size=model.config.size, length=model.config.words, batch=2, progress=False) for s in ("testA", "testB", "val")}
    assert card["done"] and all(0 <= s.summary()["mIoU"] <= 1 for s in scores.values())
    return card, {s: len(v) for s, v in scores.items()}


@photographs
@pytest.mark.parametrize("name", ["barleria-tiny", "barleria-tinydino", "dcris-tiny", "dcris-tinydino"])
def test_tiny_models_on_photographs(name, tmp_path):
    card, scored = through(name, tmp_path / "run", dict(train=24, val=4, testA=10, testB=2), epochs=1, batch=8)
    assert card["steps"] == 3 and scored == dict(testA=10, testB=2, val=4)


@photographs
@pytest.mark.full
@pytest.mark.parametrize("name", ["barleria-b16", "dcris-b14"])
def test_full_size_models_on_photographs(name, tmp_path):
    "Random towers of the real size: one step, one sentence of each split."
    card, scored = through(name, tmp_path / "run", dict(train=1, val=1, testA=1, testB=1), epochs=1, batch=1, pretrained=False)
    assert card["steps"] == 1 and scored == dict(testA=1, testB=1, val=1)


@photographs
@pytest.mark.long
@pytest.mark.parametrize("name", ["barleria-b16", "dcris-b14", "barleria-eva02-b16"])
def test_full_size_models_for_a_few_steps(name, tmp_path):
    card, scored = through(name, tmp_path / "run", dict(train=8, val=3, testA=10, testB=2), epochs=1, batch=2, pretrained=False, words=22)
    assert card["steps"] == 4 and scored == dict(testA=10, testB=2, val=3)


@photographs
def test_the_expressions_of_refcoco_become_word_pieces():
    cut = {}
    for split in SETS["refcoco"]:
        said = [r["sent"] for r in json.loads((SAMPLE / "extra" / f"refcoco_unc_{split}_expressions.json").read_text())]
        assert len(said) == OFFICIAL["refcoco"][split][1]
        for words in (17, 22):
            t = tokenize(said, words)
            assert t.ids.shape == (len(said), words) and t.words.sum(1).min() >= 3 and t.words.sum(1).max() == words
            cut[split, words] = t.truncated
    assert cut == {("val", 17): 13, ("testA", 17): 7, ("testB", 17): 8, ("val", 22): 1, ("testA", 22): 1, ("testB", 22): 1}


def test_overview_puts_only_finished_methods_beside_the_papers():
    def run(name, seed, value, whole=True): return dict(run=dict(config=name, data="refshapes", seed=seed, lr=1e-3), seed=seed, mIoU=value, whole=whole, splits=dict(val=dict(mIoU=value)), probe=None)
    ledger = [replace(r, measured="71.9") if (r.configuration, r.split, r.metric, r.table) == ("barleria-b16", "val", "mIoU", 5) and r.dataset == "refcoco" else r for r in read_ledger()]
    runs = [run("barleria-tiny", 0, .5), run("barleria-tiny", 1, .6), run("frozen-tiny", 0, .45), run("frozen-tiny", 1, .51), run("frozen-tiny", 2, .9), run("etris-tiny", 2, .8), run("dcris-tinydino", 0, .4), run("snf-tiny", 0, .3, whole=False)]
    table = module.overview_table(ledger, runs)
    read = lambda table: {tuple(l.split()[:2]): " ".join(l.split()[2:]) for l in table.splitlines()[1:]}
    rows = read(table)
    assert rows["barleria", "barleria"] == "72.4 71.9 55.0 ± 7.1 +7.0 ± 2.8 tiny 2" # against the seeds that frozen has, too
    assert rows["etris", "barleria"] == "70.5 – 80.0 −10.0 tiny 1" and rows["dcris", "dcris"] == "76.4 – 40.0 – tinydino 1" # no frozen there
    assert rows["snf", "barleria"] == "70.8 – not yet run – tiny"
    assert rows["frozen", "barleria"] == "– – 62.0 ± 24.4 – tiny 3" and rows["full", "barleria"] == "– – not yet run – tiny"
    assert rows["frozen", "dcris"] == "74.9 – not yet run – tinydino" and [l.split()[:2] for l in table.splitlines()[1:3]] == [["frozen", "barleria"], ["full", "barleria"]]
    assert len(rows) == len(table.splitlines()) - 1  # a line per method and paper
    blank = module.overview_table(read_ledger(), runs) # nothing measured on RefCOCO: no column for it
    assert " here  " not in blank and read(blank)["barleria", "barleria"] == "72.4 55.0 ± 7.1 +7.0 ± 2.8 tiny 2"


def test_the_shipped_overview_fits_a_page():
    lines = module.overview_table(read_ledger(), read_bench(asset("results/bench"))).splitlines()
    start = lines[0].index("here, tiny")
    assert max(map(len, lines)) <= 90 and all(l[start - 1] == " " != l[start] for l in lines)
