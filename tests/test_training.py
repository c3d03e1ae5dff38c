"The training loop: what a run holds, what a killed one leaves and how it goes on; what moves, and stored loss traces, are in test_contracts.py."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import barleria_nb.training as training
from barleria_nb.data import RefDataset, RefSet, collate
from barleria_nb.model import build_model, config, load_tuned, read_about, write_tensors
from barleria_nb.shapes import make_refshapes
from barleria_nb.training import (EpochOrder, Loop, accelerator, data_name, first_refs, full_state, git_commit, load_state, lr_at, optimiser, save_state,
                                  shuffled, train, train_step)
from common import line

CPU, FILES = torch.device("cpu"), ("tuned.safetensors", "log.jsonl", "log.csv")
SHORT = dict(pretrained=False, epochs=3, batch=8, lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_refshapes(tmp_path_factory.mktemp("data") / "set", scenes=dict(train=6, val=2, testA=1, testB=1), workers=1, progress=False)


@pytest.fixture(scope="module")
def data(folder): return RefSet.read(folder)


def go(data, out, name="barleria-noglobal-tiny", **options):
    "A short run: three epochs of two steps."
    changes = {k: options.pop(k) for k in ("epochs", "batch", "lr") if k in options}
    return train(config(name, **{**SHORT, **changes}), data, out, **{**dict(val_refs=2, device="cpu", progress=False), **options})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "An uninterrupted run."
    out = tmp_path_factory.mktemp("whole") / "run"
    go(data, out)
    return out


def same_run(a, b):
    for name in FILES: assert (a / name).read_bytes() == (b / name).read_bytes(), name
    timeless = lambda p: {k: v for k, v in json.loads((p / "run.json").read_text()).items() if "seconds" not in k and k != "commit"}
    assert timeless(a) == timeless(b)
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) == sorted([*FILES, "run.json"])


def contents(path): return {p.name: p.read_bytes() for p in path.iterdir()}


# ---------------------------------------------------------------- what a run holds

def test_folder_of_a_run(data, whole):
    card = json.loads((whole / "run.json").read_text())
    rows = [json.loads(l) for l in (whole / "log.jsonl").read_text().splitlines()]
    assert card["done"] is True and card["steps"] == rows[-1]["step"] == 3 * (len(data.split("train")) // 8)
    assert card["settings"]["data"] == data_name(data) and card["settings"]["lr"] == card["config"]["lr"] == 1e-3 and len(card["epoch_seconds"]) == 3
    scores = [r for r in rows if "val_mIoU" in r]
    assert len(scores) == 3 and max(r["val_mIoU"] for r in scores) == card["best"]["mIoU"] and not any("second" in k for r in rows for k in r)
    about = read_about(whole / "tuned.safetensors")
    assert about["extra"]["epoch"] == card["best"]["epoch"] and about["extra"]["settings"] == card["settings"]
    assert (whole / "log.csv").read_text().splitlines()[0].startswith("epoch,step,loss,batch_iou,lr")
    load_tuned(whole / "tuned.safetensors")


def test_finished_run_is_returned_as_it_is(data, whole, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(training, "Loop", None)  # nothing may be built
    assert go(data, whole) == json.loads(before["run.json"])
    assert contents(whole) == before


@pytest.mark.parametrize("changes", [dict(seed=1), dict(lr=1e-2), dict(epochs=4), dict(val=None), dict(precision="bf16"), dict(shuffle_sentences=True), dict(name="snf-tiny"), dict(val_refs=1)])
def test_other_settings_are_refused(data, whole, changes):
    before = contents(whole)
    line(lambda: go(data, whole, **changes), str(whole), "other settings", {"name": "config"}.get(*changes, *changes))
    assert contents(whole) == before


def test_other_data_is_refused(data, whole):
    other = RefSet(data.root, data.refs[:-1], data.name)
    line(lambda: go(other, whole), "other settings", "data")


def test_foreign_folders_are_refused(data, tmp_path):
    (tmp_path / "file").write_text("x")
    line(lambda: go(data, tmp_path / "file"), "is a file")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.safetensors").write_bytes(b"precious")
    line(lambda: go(data, tmp_path / "models"), "no run.json")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text("my own")
    line(lambda: go(data, tmp_path / "logs"), "log.csv", "no run.json")
    assert contents(tmp_path / "logs") == {"log.csv": b"my own"}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "run.json").write_text("[1]")
    line(lambda: go(data, tmp_path / "json"), "other settings")
    assert contents(tmp_path / "models") == {"mine.safetensors": b"precious"} and contents(tmp_path / "json") == {"run.json": b"[1]"}


def test_a_lost_model_is_told(data, whole, tmp_path, monkeypatch):
    "A finished or stopped run whose tuned model is gone neither counts as finished nor goes on without it."
    shutil.copytree(whole, tmp_path / "done")
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", 4)
        with pytest.raises(Stop): go(data, tmp_path / "stopped")
    for out in (tmp_path / "done", tmp_path / "stopped"):
        (out / "tuned.safetensors").unlink()
        line(lambda: go(data, out), str(out), "has lost its tuned.safetensors")


def test_commit_only_of_tracked_files(tmp_path):
    (tmp_path / "x.py").write_text("")
    assert git_commit(tmp_path / "x.py") == ""


# ---------------------------------------------------------------- stopped and resumed

KILLED = """
import os, signal, sys
import torch
from barleria_nb.data import RefSet
from barleria_nb.model import config
from barleria_nb.training import Loop, train
plain = Loop.step
def step(self, batch, k):
    if k == 3: open(os.path.join(sys.argv[2], ".state-12345678.safetensors"), "wb").write(b"half"), os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch, k)
Loop.step = step
torch.set_num_threads(int(sys.argv[3]))
train(config("barleria-noglobal-tiny", pretrained=False, epochs=3, batch=8, lr=1e-3), RefSet.read(sys.argv[1]), sys.argv[2], val_refs=2, device="cpu", progress=False)
"""

def test_killed_in_mid_epoch(data, folder, whole, tmp_path):
    "kill -9 in the second epoch of another process; the same command then ends in the same bytes, and half-written files are gone."
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out), str(torch.get_num_threads())], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert {"state.safetensors", "run.json", ".state-12345678.safetensors"} <= set(os.listdir(out))
    assert json.loads((out / "run.json").read_text())["done"] is False
    go(data, out)
    same_run(whole, out)


class Stop(Exception): pass


def stopping(monkeypatch, name, nth):
    "Let the n-th call of a function of the training module stop the run, before it does anything."
    owner, _, attr = name.rpartition(".")
    owner = getattr(training, owner) if owner else training
    plain, calls = getattr(owner, attr), []
    def call(*a, **k):
        calls.append(1)
        if len(calls) == nth: raise Stop
        return plain(*a, **k)
    monkeypatch.setattr(owner, attr, call)


@pytest.mark.parametrize("name,nth", [("Loop.step", 1), ("evaluate", 2), ("save_tuned", 1), ("RunFolder.write_log", 2), ("save_state", 2), ("RunFolder.write_log", 3), ("write_json", 2)])
def test_stopped_anywhere(data, whole, tmp_path, monkeypatch, name, nth):
    "At the first step, while scoring, between the tuned model and the log, between log and state, before the end is noted."
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        stopping(m, name, nth)
        with pytest.raises(Stop): go(data, out)
    go(data, out)
    same_run(whole, out)


def test_loading_processes_do_not_matter(data, whole, tmp_path):
    go(data, tmp_path / "run", workers=2)
    same_run(whole, tmp_path / "run")


def test_seed_and_caller_do_matter_or_not(data, whole, tmp_path):
    "Another seed gives another run; the caller's random numbers and earlier runs do not matter."
    torch.manual_seed(123)
    go(data, tmp_path / "again")
    same_run(whole, tmp_path / "again")
    go(data, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / FILES[0]).read_bytes() != (whole / FILES[0]).read_bytes()


@pytest.mark.parametrize("target", ["tuned", "state", "log", "run"])
def test_disk_full(data, whole, tmp_path, monkeypatch, target):
    "No space in the second epoch: one line, the files of the first are whole, and the run ends as if nothing had been."
    out, plain = tmp_path / "run", Path.write_bytes
    def full(kind, content, *a, **k):
        path, write = kind
        if target in path.name and (out / "state.safetensors").exists(): raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content, *a, **k)
    text = Path.write_text
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", lambda self, c: full((self, plain), c))
        m.setattr(Path, "write_text", lambda self, c, **k: full((self, text), c, **k))
        m.setattr(training.Trainer, "score", lambda self, epoch: dict(mIoU=float(epoch)))  # each epoch is the best
        line(lambda: go(data, out), "the disk is full")
    for name in ("tuned.safetensors", "state.safetensors"): assert training.read_note(out / name)
    load_tuned(out / "tuned.safetensors")
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert json.loads((out / "run.json").read_text())["done"] is False
    with monkeypatch.context() as m:
        m.setattr(training.Trainer, "score", lambda self, epoch: dict(mIoU=float(epoch)))
        assert go(data, out)["done"]


def test_damaged_state_is_refused(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", 4)
        with pytest.raises(Stop): go(data, out)
    state, kept = out / "state.safetensors", (out / "state.safetensors").read_bytes()
    note = training.read_note(state)
    model = build_model(config("barleria-noglobal-tiny", **SHORT))
    tensors = full_state(model, optimiser(model, .1))
    name = next(iter(tensors))
    spoil = {
        "cut": lambda: state.write_bytes(kept[:-5]), "text": lambda: state.write_text("state"),
        "other format": lambda: write_tensors(state, tensors, {**note, "format": "x"}), "no note": lambda: write_tensors(state, tensors, None),
        "other settings": lambda: write_tensors(state, tensors, {**note, "settings": {}}), "other towers": lambda: write_tensors(state, tensors, {**note, "towers": "0" * 64}),
        "too far": lambda: write_tensors(state, tensors, {**note, "epochs_done": 99}),
        "short": lambda: write_tensors(state, tensors, {k: v for k, v in note.items() if k != "rows"}),
        "tensor gone": lambda: write_tensors(state, {n: t for n, t in tensors.items() if n != name}, note),
        "not a number": lambda: write_tensors(state, {**tensors, name: tensors[name] * float("nan")}, note),
    }
    for what, act in spoil.items():
        act()
        before = contents(out)
        line(lambda: go(data, out), str(state))
        assert contents(out) == before, what


def test_state_round_trip(data, tmp_path):
    "Numbers, running statistics and moments come back bit for bit, moved or not."
    batch = collate([RefDataset(data.split("train"), config("snf-tiny").size, train=True)[i] for i in range(4)])
    a, b = (build_model(config("snf-tiny", **SHORT), seed) for seed in (0, 5))
    x, y = optimiser(a, 1e-3), optimiser(b, 1e-3)
    for steps in (0, 2):
        for _ in range(steps): x.zero_grad(), train_step(a, batch)[0].backward(), x.step()
        save_state(tmp_path / "s.safetensors", a, x, dict(n=steps))
        assert load_state(tmp_path / "s.safetensors", b, y) == dict(n=steps)
        for (n, t), u in zip(full_state(a, x).items(), full_state(b, y).values()): assert torch.equal(t, u), n
        assert steps == 0 or x.state_dict()["param_groups"] == y.state_dict()["param_groups"]


# ---------------------------------------------------------------- scores, losses, precision

def test_the_first_of_the_best_epochs_is_kept(data, tmp_path, monkeypatch):
    scores = iter((.2, .3, .3))
    monkeypatch.setattr(training.Trainer, "score", lambda self, epoch: dict(mIoU=next(scores)))
    assert go(data, tmp_path / "run")["best"]["epoch"] == read_about(tmp_path / "run" / "tuned.safetensors")["extra"]["epoch"] == 1


def test_non_finite_loss_stops(data, tmp_path):
    line(lambda: go(data, tmp_path / "run", lr=1e30), "no longer finite", "lower --lr")
    assert os.listdir(tmp_path / "run") == ["run.json"]


def test_weights_lost_at_the_last_step_are_not_saved(data, tmp_path, monkeypatch):
    "The loss of an epoch was fine, the last correction was not."
    plain = Loop.step
    def step(self, batch, k):
        answer = plain(self, batch, k)
        if k == 3:
            with torch.no_grad(): next(self.model.head.parameters())[0] = float("inf")
        return answer
    monkeypatch.setattr(Loop, "step", step)
    line(lambda: go(data, tmp_path / "run", val=None), "after epoch 2")
    assert training.read_note(tmp_path / "run" / "state.safetensors")["epochs_done"] == 1
    load_tuned(tmp_path / "run" / "tuned.safetensors")


def test_precision(data, tmp_path):
    assert go(data, tmp_path / "run", precision="bf16", epochs=1)["done"]
    line(lambda: accelerator("fp16", CPU), "needs a GPU")
    line(lambda: accelerator("half", CPU), "is unknown")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line(lambda: accelerator("no", CPU), "one process")


def test_too_many_words(data, tmp_path):
    line(lambda: train(config("snf-tiny", **SHORT, words=40), data, tmp_path / "run", device=CPU, progress=False), "40 word pieces", "smaller --words")
    assert not (tmp_path / "run").exists()


def test_moments_that_overflow_are_not_saved(data, tmp_path, monkeypatch):
    "Adam's mean of squares can overflow while every weight is still a number."
    plain = Loop.step
    def step(self, batch, k):
        answer = plain(self, batch, k)
        if k == 1: next(iter(self.optimiser.state.values()))["exp_avg_sq"][:] = float("inf")
        return answer
    monkeypatch.setattr(Loop, "step", step)
    line(lambda: go(data, tmp_path / "run"), "Adam", "after epoch 1")
    assert os.listdir(tmp_path / "run") == ["run.json"]


def test_no_ref_to_choose_by(data, tmp_path):
    for n in (0, -1): line(lambda: go(data, tmp_path / "run", val_refs=n), "1 or more")
    assert not (tmp_path / "run").exists()


def test_too_large_a_batch(data, tmp_path):
    line(lambda: go(data, tmp_path / "run", batch=10_000), "fewer than one batch")
    assert not (tmp_path / "run").exists()


def test_unknown_split(data, tmp_path): line(lambda: go(data, tmp_path / "run", val="vall"), "Did you mean val")


# ---------------------------------------------------------------- draws

def test_order_has_no_past():
    a, b = EpochOrder(50, 1), EpochOrder(50, 1)
    for e in range(5): a.set_epoch(e), list(a)
    b.set_epoch(4)
    assert list(a) == list(b) and sorted(a) == list(range(50))
    assert list(EpochOrder(50, 2)) != list(EpochOrder(50, 1))


def test_control_gives_every_ref_the_sentences_of_another(data):
    d = data.split("train")
    c = shuffled(d, 0)
    assert [r.ref_id for r in c] == [r.ref_id for r in d] and all(a.sentences != b.sentences for a, b in zip(c, d))
    assert sorted(s.sent_id for r in c for s in r.sentences) == sorted(s.sent_id for r in d for s in r.sentences)
    assert [r.sentences for r in shuffled(d, 0)] == [r.sentences for r in c] != [r.sentences for r in shuffled(d, 1)]
    assert len(first_refs(d, 3)) == 3 and len(first_refs(d, None)) == len(d)


def test_schedule():
    c = config("snf-b16")
    rates = [lr_at(k, 50, c) for k in range(50)]
    assert rates[:35] == [1e-4] * 35 and max(rates[35:]) == min(rates[35:]) == pytest.approx(1e-5)
    assert lr_at(0, 1, replace(c, drop=1.)) == c.lr and lr_at(0, 1, replace(c, drop=0.)) == pytest.approx(c.lr / 10)
