"The bench: rounds, resuming, folders of others, hostile files, tables by hand."
import json

import pytest
from common import line
from filelock import FileLock

from barleria_nb import bench
from barleria_nb.bench import BENCH, Bench, Budget, Run
from barleria_nb.core import BarleriaError
from barleria_nb.model import config, ledger
from barleria_nb.scale import apart
from barleria_nb.shapes import make_refshapes

BUDGET = Budget(batch=16, lrs=(1e-3, 1e-4))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "refshapes"
    make_refshapes(folder, scenes=dict(train=8, val=2, testA=2, testB=1), progress=False)
    return folder


@pytest.fixture
def inside(monkeypatch):
    "Runs in this process, and few pairs; the places of what was run."
    ran = []
    def here(function, threads, **arguments):
        assert function == "barleria_nb.bench._bench_task"
        ran.append((Run(**arguments["run"]).place, arguments["whole"]))
        return json.loads(json.dumps(bench._bench_task(**json.loads(json.dumps(arguments)))))
    monkeypatch.setattr(bench, "apart", here)
    monkeypatch.setattr(bench, "PAIRS", 2)
    return ran


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*.json")}


def test_rounds_and_what_is_there_is_not_done_again(data, inside, tmp_path):
    "Grid on val alone, then the chosen ones whole; the same call changes nothing; one more seed costs one more run a method."
    out, told = tmp_path / "b", []
    make = lambda **k: Bench(out, ("frozen", "lora"), dict(refshapes=data), towers=("tiny",), budget=BUDGET, tell=told.append, **dict(dict(seeds=(0,)), **k))
    rows = make().run()
    assert [w for _, w in inside] == [False] * 4 + [True] * 2 and len(told) == 6 and len(rows) == 4
    found = bench.read_bench(out)
    assert len(found) == 4 and sum(r["whole"] for r in found) == 2
    for name in ("frozen-tiny", "lora-tiny"):
        grid = {r["run"]["lr"]: r["mIoU"] for r in found if r["run"]["config"] == name}
        (chosen,) = [r for r in found if r["run"]["config"] == name and r["whole"]]
        assert grid[chosen["run"]["lr"]] == max(grid.values()) and chosen["run"]["lr"] == bench.best_lr(found, name)
    for r in found:
        assert {"config", "data", "seed", "commit", "hardware", "budget", "mIoU", "oIoU", "Pr@0.5", "curve", "seconds", "memory", "tuned"} <= r.keys()
        assert set(r["splits"]) == ({"val", "testA", "testB"} if r["whole"] else {"val"}) and bool(r["probe"]) == r["whole"]
        assert r["memory"] > 1e8 and r["steps"] == r["curve"][-1][0] and r["mIoU"] == r["splits"]["val"]["mIoU"]
    before = files(out)
    make().run()
    assert files(out) == before
    inside.clear()
    make(seeds=(0, 1)).run()
    assert len(bench.read_bench(out)) == 6 and all(files(out)[p] == b for p, b in before.items())
    table = bench.bench_table(bench.read_bench(out), "refshapes")
    assert len(table.splitlines()) == 3 and "frozen-tiny" in table and "±" in table


def test_other_data_under_the_same_name(data, inside, tmp_path):
    other = make_refshapes(tmp_path / "refshapes", scenes=dict(train=9, val=2, testA=2, testB=1), progress=False)
    make = lambda folder, **k: Bench(tmp_path / "b", ("frozen",), {k.pop("name", "refshapes"): folder}, towers=("tiny",), seeds=(0, 0), budget=Budget(batch=16, lrs=(1e-3,)))
    make(data).run()
    assert inside == [("refshapes/frozen-tiny/seed0-lr0.001", w) for w in (False, True)]
    before = files(tmp_path / "b")
    line(make(other).run, "was made with other data")
    assert files(tmp_path / "b") == before
    for name in ("", ".", "..", "a/b"): line(lambda: make(data, name=name), "no name for a data set")
    make(data).run()
    assert len(inside) == 2 # what is there needs no process
    (tmp_path / "b/refshapes/frozen-tiny/seed0-lr0.001.json").unlink()
    with FileLock(tmp_path / "b/refshapes/frozen-tiny/seed0-lr0.001.lock"): line(make(data).run, "another process makes refshapes/frozen-tiny")


def test_a_killed_run_goes_on_and_a_failed_one_spares_the_others(data, inside, tmp_path, monkeypatch):
    out, task = tmp_path / "b", bench._bench_task
    def stumble(run, **a):
        if run["config"] == "lora-tiny": raise BarleriaError("no memory left")
        return task(run, **a)
    make = lambda: Bench(out, ("lora", "frozen"), dict(refshapes=data), towers=("tiny",), seeds=(0,), budget=Budget(batch=16, lrs=(1e-3,)))
    monkeypatch.setattr(bench, "_bench_task", stumble)
    line(make().run, "runs that failed: 1", "the others are kept", "lora-tiny", "no memory left")
    assert [r["run"]["config"] for r in bench.read_bench(out)] == ["frozen-tiny"]
    monkeypatch.setattr(bench, "_bench_task", task)
    evaluate = bench.evaluate
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(bench, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt): make().run()
    trained = out / "refshapes/lora-tiny/seed0-lr0.001/tuned.safetensors"
    stamp = trained.stat().st_mtime_ns
    monkeypatch.setattr(bench, "evaluate", evaluate)
    make().run()
    (row,) = [r for r in bench.read_bench(out) if r["run"]["config"] == "lora-tiny"]
    assert trained.stat().st_mtime_ns == stamp and row["whole"] and row["memory"] is None # trained before: its memory is not known any more


def test_folders_of_others(data, inside, tmp_path):
    out = tmp_path / "b"
    make = lambda budget=BUDGET, folder=out: Bench(folder, ("frozen",), dict(refshapes=data), towers=("tiny",), seeds=(0,), budget=budget)
    make()
    before = files(out)
    line(lambda: make(Budget(batch=8)), "another budget", "choose another folder")
    with FileLock(out / ".lock"): line(make().run, "another process works in")
    (out / "bench.json").write_text("[1")
    line(make, "bench.json")
    (out / "bench.json").write_bytes(next(iter(before.values())))
    place = out / "refshapes/frozen-tiny/seed0-lr0.001.json"
    for text, said in (("{}", "no run of a bench"), (json.dumps(dict(format=BENCH, run={}, budget={})), "another run")):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        line(make().run, said)
        assert place.read_text() == text
    (tmp_path / "file").write_text("x")
    line(lambda: make(folder=tmp_path / "file"), "file")


@pytest.mark.parametrize("change,words", [
    (dict(methods=("barlera",)), ("no method 'barlera'", "barleria")), (dict(towers=("tyni",)), ("no towers 'tyni'", "tiny")), (dict(methods=()), ("nothing to run",)),
    (dict(seeds=()), ("nothing to run",)), (dict(folders={}), ("nothing to run",)), (dict(jobs=0), ("jobs is 0",)), (dict(folders=dict(x="/nowhere")), ("/nowhere",)),
    (dict(budget=Budget(precision="bf61")), ("bf61", "bf16")), (dict(budget=Budget(device="gpu")), ("gpu",)), (dict(budget=Budget(lrs=())), ("nothing to run",)),
])
def test_mistakes_end_in_one_line_and_write_nothing(data, tmp_path, change, words):
    settings = dict(methods=("frozen",), folders=dict(refshapes=data), towers=("tiny",)) | change
    line(lambda: Bench(tmp_path / "b", settings.pop("methods"), settings.pop("folders"), **settings), *words)
    assert not (tmp_path / "b").exists()


def row(name, seed, score, lr=1e-3, **more):
    splits = dict(val=dict(mIoU=score, oIoU=score, **{"Pr@0.5": score}), testA=dict(mIoU=score + .1))
    return dict(dict(format=BENCH, run=dict(data="d", config=name, seed=seed, lr=lr), budget=dict(device="cpu"), seed=seed, splits=splits, mIoU=score, whole=True, probe=None, tuned=10, share=.01, seconds=3., memory=None, hardware="one"), **more)


def test_times_are_of_one_kind_of_machine():
    "Seconds of other hardware than most runs had are not set beside theirs, in the table and in the figure."
    rows = [row("snf-tiny", 0, .5, cpu=7.), row("snf-tiny", 1, .5, cpu=50., hardware="two"), row("lora-tiny", 0, .5, cpu=60., hardware="two"), row("etris-tiny", 0, .5, cpu=9.)]
    rows = [r | dict(curve=[[k, 1., .1] for k in range(1, 7)]) for r in rows]
    took = {l.split()[0]: l.split()[-2] for l in bench.bench_table(rows, "d").splitlines()}
    assert took == dict(configuration="s") | {"snf-tiny": "7", "lora-tiny": "–", "etris-tiny": "9"}
    dots = [l.get_xdata()[0] for l in bench.bench_figure(rows, "d").axes[1].lines if l.get_marker() == "o"]
    assert sorted(dots) == [7, 9]


def test_a_run_that_was_stopped_has_no_time():
    "Seconds of the clock are no processor time: on a CPU they are left out, on a GPU they are what there is."
    cells = lambda **more: bench.bench_table([row("snf-tiny", 0, .5, **more)], "d").splitlines()[1].split()
    assert cells(cpu=7.)[-2:] == ["7", "–"] and cells(cpu=None)[-2:] == ["–", "–"] and cells(cpu=None, budget=dict(device="cuda"))[-2:] == ["3", "–"]


def test_towers_are_drawn_apart():
    fig = bench.bench_figure([row(n, 0, .5, curve=[[k, 1., .1] for k in range(6)]) for n in ("snf-tiny", "snf-tinydino")], "d")
    assert [ax.get_title() for ax in fig.axes[::3]] == ["tiny", "tinydino"] and len(fig.axes[1].lines) == 0 # no processor time is known


def test_means_spreads_and_pairs_by_hand():
    "Seeds .5 .6 against .4 .3: differences .1 and .3."
    rows = [row("frozen-tiny", 0, .4), row("frozen-tiny", 1, .3), row("snf-tiny", 0, .5), row("snf-tiny", 1, .6), row("snf-tiny", 2, .9), row("snf-tiny", 0, .2, lr=1e-4, whole=False)]
    found = bench.summaries(rows, "d")
    assert found["snf-tiny"].values() == {0: .5, 1: .6, 2: .9} and sorted(found["snf-tiny"].against(found["frozen-tiny"])) == pytest.approx([.1, .3])
    text = bench.bench_table(rows, "d")
    assert "66.7 ± 20.8" in text and "20.0 ± 14.1" in text and "35.0 ± 7.1" in text and "45.0 ± 7.1" in text
    line(lambda: bench.bench_table(rows, "e"), "no runs on 'e'", "d")
    assert bench.best_lr(rows, "snf-tiny") == 1e-3 and bench.best_lr(rows, "lora-tiny") is None
    assert bench.best_lr([row("a", 0, .5, lr=1e-3), row("a", 0, .5, lr=1e-4)], "a") == 1e-4


def test_reading_a_folder_skips_what_is_not_a_run(tmp_path):
    line(lambda: bench.read_bench(tmp_path), "no finished run")
    (tmp_path / "seed0-lr1.json").write_text("[" * 10**5)
    (tmp_path / "seed1-lr1.json").write_text(json.dumps(row("snf-tiny", 1, .5)))
    assert [r["seed"] for r in bench.read_bench(tmp_path)] == [1]


def test_a_process_of_its_own():
    assert apart("barleria_nb.core.near", threads=1, name="trian", names=["train"]) == " Did you mean train?"
    line(lambda: apart("barleria_nb.core.pick_device", name="gpu"), "device 'gpu' is unknown")


# ---------------------------------------------------------------- equal shares

def test_runs_at_equal_shares(data, inside, tmp_path):
    "After all others, whole, seed by seed, with the learning rate chosen for the method itself; blanks are told; the same call changes nothing."
    out = tmp_path / "b"
    make = lambda **k: Bench(out, ("frozen", "lora"), dict(refshapes=data), towers=("tiny",), seeds=(0, 1), budget=Budget(batch=16, lrs=(1e-3,)), **dict(dict(shares=(.2, 1)), **k))
    first = make()
    assert first.scaled == ["lora-tiny@1%"] and list(first.blank) == ["lora-tiny@0.2%"] and "comes no nearer to 0.2 % than 0.50 % (lora rank 1)" in first.blank["lora-tiny@0.2%"]
    first.run()
    assert inside[-2:] == [(f"refshapes/lora-tiny@1%/seed{s}-lr0.001", True) for s in (0, 1)] and sum("@" in place for place, _ in inside) == 2
    found = bench.read_bench(out)
    r, other = [r for r in found if "@" in r["run"]["config"]]
    assert (r["seed"], other["seed"]) == (0, 1)
    assert r["whole"] and r["probe"] and r["tuned"] == ledger(config("lora-tiny@1%"))["backbone"] and r["run"]["lr"] == bench.best_lr(found, "lora-tiny")
    before = files(out)
    make().run()
    assert files(out) == before
    table = bench.bench_table(found, "refshapes")
    (line_,) = [l for l in table.splitlines() if l.startswith("lora-tiny@1%")]
    assert "13,824" in line_ and line_.split()[6] not in ("–", "") # rank 2: half of what rank 4 has; its difference from frozen-tiny
    assert len(bench.bench_figure(found, "refshapes").axes[2].lines) == 2 # the scaled one is not in it
    line(lambda: make(shares=(0,)), "a share of 0 per cent")
    assert files(out) == before


def test_a_killed_run_at_a_share_goes_on(data, inside, tmp_path, monkeypatch):
    evaluate, run = bench.evaluate, Run("refshapes", "snf-tiny@0.5%", 0, 1e-3)
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(bench, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt): bench.bench_run(run, data, tmp_path, BUDGET, whole=False)
    trained = tmp_path / "refshapes/snf-tiny@0.5%/seed0-lr0.001/tuned.safetensors"
    stamp = trained.stat().st_mtime_ns
    monkeypatch.setattr(bench, "evaluate", evaluate)
    row = bench.bench_run(run, data, tmp_path, BUDGET, whole=False)
    assert trained.stat().st_mtime_ns == stamp and row["run"]["config"] == "snf-tiny@0.5%" and row["memory"] is None
    assert bench.load_tuned(trained).config == config("snf-tiny@0.5%", epochs=1, batch=16, lr=1e-3)


@pytest.mark.parametrize("shares", [(0,), (-1,), (25,), (float("nan"),), (1e9,), (.001,), (1.234,), ("1",), (True,), (None,), (1, 1e-5)])
def test_impossible_shares_write_nothing(data, tmp_path, shares):
    line(lambda: Bench(tmp_path / "b", ("lora",), dict(refshapes=data), towers=("tiny",), shares=shares), "per cent; give a number from 0.01 to 20")
    assert not (tmp_path / "b").exists()


def at(name, percent, score, seed=0): return row(f"{name}@{percent}%", seed, score, share=float(percent) / 100)


def test_the_figure_of_equal_shares_by_hand():
    "Lines through what is there, blanks in the legend, floors of the same seeds, a panel per towers."
    rows = [row("frozen-tiny", 0, .4, share=0.), row("frozen-tiny", 1, .2, share=0.), row("full-tiny", 0, .9, share=.998), row("snf-tiny", 0, .5), row("lora-tiny", 0, .5), row("lora-tinydino", 0, .7),
        at("snf-tiny", "2", .6), at("lora-tiny", "0.5", .3), at("lora-tiny", "2", .5), at("lora-tiny", "1", .4)]
    one, two = bench.equal_figure(rows, "d").axes
    assert (one.get_title(), two.get_title()) == ("tiny", "tinydino")
    lines = {l.get_label(): l for l in one.lines if not l.get_label().startswith("_")}
    assert list(lines) == ["snf-tiny (not at 0.5%, 1%)", "lora-tiny", "frozen-tiny, 0.0 %", "full-tiny, 99.8 %"]
    assert list(lines["lora-tiny"].get_xdata()) == pytest.approx([.5, 1, 2]) and list(lines["lora-tiny"].get_ydata()) == pytest.approx([30, 40, 50])
    assert list(lines["frozen-tiny, 0.0 %"].get_ydata()) == pytest.approx([40, 40]) # seed 0's, as the others are
    assert not two.lines and "nothing was run" in two.texts[0].get_text()
    line(lambda: bench.equal_figure(rows, "e"), "no runs on 'e'", "d")
    more = bench.equal_figure([*rows, row("snf-tiny@2%", 1, .8, share=.02)], "d").axes[0].lines
    assert any(list(l.get_ydata()) == pytest.approx([60, 80]) for l in more) # a dot per seed
    assert {l.get_label(): list(l.get_ydata()) for l in more}["snf-tiny (not at 0.5%, 1%)"] == pytest.approx([60]) # but the line of the seed that all have
    apart = bench.equal_figure([*rows[:2], row("snf-tiny", 1, .5), row("lora-tiny", 0, .5), at("snf-tiny", "2", .6, 1), at("lora-tiny", "2", .4)], "d").axes[0].lines
    assert {l.get_label(): list(l.get_ydata())[0] for l in apart}["frozen-tiny, 0.0 %"] == pytest.approx(30) # no seed is shared: all
    same = bench.equal_figure([*rows, at("snf-tiny", "2", .5), row("snf-tiny@2.1%", 0, .7, share=.02)], "d").axes[0].lines # two shares that one size is nearest to
    assert sorted(l.get_xdata()[0] for l in same if l.get_mfc() == "white") == pytest.approx([1, 1]) # rings: snf and lora at their own size
    other = bench.equal_figure(rows, "d", "testB").axes[0]
    assert not other.lines and other.texts # no scores there: nothing to draw, nothing raised


def test_a_run_at_a_share_has_no_learning_rate_of_its_own():
    rows = [at("snf-tiny", "1", .9)]
    assert bench.best_lr(rows, "snf-tiny@1%") is None and bench.summaries(rows, "d") == {}
    rows += [row("snf-tiny", 0, .5, lr=1e-4), row("snf-tiny", 0, .4)]
    assert bench.best_lr(rows, "snf-tiny@1%") == bench.best_lr(rows, "snf-tiny") == 1e-4
    assert set(bench.summaries(rows, "d")) == {"snf-tiny"} # made with another learning rate: not compared
