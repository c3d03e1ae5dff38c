"The training loop: what a run holds, what a killed one leaves and how it goes on; what moves, and stored loss traces, are in test_contracts.py."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes

import barleria_nb.training as training
from barleria_nb.data import RefDataset, RefSet, collate
from barleria_nb.model import build_model, config, load_tuned, read_about, write_tensors
from barleria_nb.shapes import make_refshapes
from barleria_nb.training import (EpochOrder, Interrupts, Loop, Portions, accelerator, data_name, first_refs, full_state, git_commit, load_state, lr_at, optimiser, save_state,
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


def test_bf16_that_a_gpu_only_imitates(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation))
    line(lambda: training.check_precision("bf16", torch.device("cuda")), "only imitates bf16", "fp16")
    assert asked == [False]
    training.check_precision("bf16", torch.device("cpu")), training.check_precision("fp16", torch.device("cuda"))


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

def test_a_folder_that_cannot_be_read(data, tmp_path, monkeypatch):
    line(lambda: go(data, tmp_path / ("x" * 300)), "cannot be looked into", "another folder")
    def closed(*a, **k): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(training, "read_json", closed)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    line(lambda: go(data, tmp_path / "run"), "Permission denied")


def test_a_folder_where_nothing_may_be_removed_or_written(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", 4)
        with pytest.raises(Stop): go(data, out)
    (out / ".state-12345678.safetensors").write_text("half")
    def refused(*a, **k): raise PermissionError(errno.EROFS, "Read-only file system")
    with monkeypatch.context() as m:
        for name in ("unlink", "write_text", "write_bytes"): m.setattr(Path, name, refused)
        line(lambda: go(data, out), "the file system is read-only")
    with monkeypatch.context() as m:  # removing alone fails: that ends no run
        m.setattr(Path, "unlink", refused)
        assert go(data, out)["done"] and list(out.glob("state-*"))
    for name in FILES: assert (out / name).read_bytes() == (whole / name).read_bytes()


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
    assert {"state-00000002.safetensors", "run.json", ".state-12345678.safetensors"} <= set(os.listdir(out))
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
        if target in path.name and list(out.glob("state-*")): raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content, *a, **k)
    text = Path.write_text
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", lambda self, c: full((self, plain), c))
        m.setattr(Path, "write_text", lambda self, c, **k: full((self, text), c, **k))
        m.setattr(training.Trainer, "score", lambda self, epoch: dict(mIoU=float(epoch)))  # each epoch is the best
        line(lambda: go(data, out), "the disk is full")
    for name in ("tuned.safetensors", "state-00000002.safetensors"): assert training.read_note(out / name)
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
    state = out / "state-00000002.safetensors"
    kept = state.read_bytes()
    note = training.read_note(state)
    model = build_model(config("barleria-noglobal-tiny", **SHORT))
    tensors = full_state(model, optimiser(model, .1))
    name = next(iter(tensors))
    spoil = {
        "cut": lambda: state.write_bytes(kept[:-5]), "text": lambda: state.write_text("state"),
        "other format": lambda: write_tensors(state, tensors, {**note, "format": "x"}), "no note": lambda: write_tensors(state, tensors, None),
        "other settings": lambda: write_tensors(state, tensors, {**note, "settings": {}}), "other towers": lambda: write_tensors(state, tensors, {**note, "towers": "0" * 64}),
        "too far": lambda: write_tensors(state, tensors, {**note, "step": 99}), "one bit": lambda: state.write_bytes(kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:]),
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


FINE = dict(epochs=2, batch=4)  # four steps or more in an epoch


@pytest.fixture(scope="module")
def fine(data, tmp_path_factory):
    "An uninterrupted run with some steps in each epoch."
    out = tmp_path_factory.mktemp("fine") / "run"
    card = go(data, out, **FINE)
    assert card["steps"] >= 8
    return out


@pytest.mark.parametrize("nth,save_steps", [(2, 1), (3, 2), (7, 1), (8, 3)])
def test_stopped_within_an_epoch(data, fine, tmp_path, monkeypatch, nth, save_steps):
    "The run goes on from the last state, not from the last epoch; rows, window, statistics and best score are as if nothing had been."
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", nth)
        with pytest.raises(Stop): go(data, out, **FINE, save_steps=save_steps)
    steps, plain = [], Loop.step
    with monkeypatch.context() as m:
        m.setattr(Loop, "step", lambda self, parts, k: (steps.append(k), plain(self, parts, k))[1])
        go(data, out, **FINE, save_steps=save_steps)
    assert steps[0] == max((nth - 1) // save_steps * save_steps, (nth - 1) // 4 * 4) > 0  # the newest state: of a save, or of an epoch's end
    same_run(fine, out)


def test_two_states_are_kept_and_the_older_one_serves(data, fine, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", 7)
        with pytest.raises(Stop): go(data, out, **FINE, save_steps=1)
    states = sorted(out.glob("state-*"))
    assert [p.name for p in states] == ["state-00000005.safetensors", "state-00000006.safetensors"]
    states[1].write_bytes(states[1].read_bytes()[:-3])
    go(data, out, **FINE, save_steps=1)
    same_run(fine, out)


def torn_run(data, out, monkeypatch, nth=7, **options):
    "A run stopped at its nth step, with a state after each."
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", nth)
        with pytest.raises(Stop): go(data, out, **FINE, save_steps=1, **options)
    return sorted(out.glob("state-*"))


def test_two_damaged_states(data, fine, tmp_path, monkeypatch):
    "One line; nothing is changed; without them the run begins anew and ends the same."
    out = tmp_path / "run"
    for p in (states := torn_run(data, out, monkeypatch)): p.write_bytes(p.read_bytes()[:-3])
    before = contents(out)
    line(lambda: go(data, out, **FINE), states[0].name)
    assert contents(out) == before
    for p in states: p.unlink()
    go(data, out, **FINE)
    same_run(fine, out)


def test_states_of_another_run(data, fine, tmp_path, monkeypatch):
    "Two newer ones of another seed: the run's own serves, and is never the one that is removed."
    out = tmp_path / "run"
    for k, p in enumerate(torn_run(data, tmp_path / "other", monkeypatch, seed=1)):
        out.mkdir(exist_ok=True)
        shutil.copy(p, out / f"state-0000009{k}.safetensors")
    line(lambda: go(data, out, **FINE), "no run.json")
    (foreign := [p for p in out.iterdir()]) and [p.rename(tmp_path / p.name) for p in foreign]
    torn_run(data, out, monkeypatch, 3)
    for p in foreign: (tmp_path / p.name).rename(p)
    with monkeypatch.context() as m:
        stopping(m, "Loop.step", 3)
        with pytest.raises(Stop): go(data, out, **FINE, save_steps=1)
    assert {"state-00000003.safetensors", "state-00000004.safetensors"} <= set(os.listdir(out))
    go(data, out, **FINE)
    same_run(fine, out)


def test_a_state_of_an_earlier_version(data, fine, tmp_path, monkeypatch):
    "Told, rather than left aside with all its epochs."
    out = tmp_path / "run"
    newest = torn_run(data, out, monkeypatch)[-1]
    tensors, note = load_bytes(newest.read_bytes()), training.read_note(newest)
    write_tensors(out / "state.safetensors", tensors, {**note, "format": "barleria_nb training state, version 1"})
    for p in out.glob("state-*"): p.unlink()
    line(lambda: go(data, out, **FINE), "state.safetensors is not a training state", "remove the run's folder")


@pytest.mark.parametrize("nth", [3, 5, 8])
def test_disk_full_within_an_epoch(data, fine, tmp_path, monkeypatch, nth):
    out, plain, calls = tmp_path / "run", training.save_state, []
    def full(path, *a):
        calls.append(1)
        if len(calls) < nth: return plain(path, *a)
        with monkeypatch.context() as m:
            m.setattr(Path, "write_bytes", lambda self, c: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            plain(path, *a)
    steps = 2 * (len(data.split("train")) // 4)
    assert steps >= 8
    with monkeypatch.context() as m:
        m.setattr(training, "save_state", full)
        if nth < steps: line(lambda: go(data, out, **FINE, save_steps=1), "the disk is full")
        else: go(data, out, **FINE, save_steps=1)
    go(data, out, **FINE, save_steps=1)
    same_run(fine, out)


@pytest.mark.parametrize("name,twice", [("evaluate", False), ("save_state", False), ("save_tuned", False), ("save_state", True), ("save_tuned", True), ("evaluate", True)])
def test_interrupted_elsewhere(data, fine, tmp_path, monkeypatch, name, twice):
    "Ctrl-C while scoring and saving, once and twice: no half file, and the same bytes in the end."
    out, plain = tmp_path / "run", getattr(training, name)
    todo = [1] * (1 + twice)
    def call(*a, **k):
        while todo: todo.pop(), signal.raise_signal(signal.SIGINT)
        return plain(*a, **k)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(training, name, call)
        if twice:
            with pytest.raises(KeyboardInterrupt): go(data, out, **FINE, save_steps=1)
        else: line(lambda: go(data, out, **FINE, save_steps=2), "stopped by SIGINT", "the same command goes on")
    assert signal.getsignal(signal.SIGINT) is before and not [p for p in out.iterdir() if p.name.startswith(".")]
    go(data, out, **FINE)
    same_run(fine, out)


def test_asked_at_the_very_end(data, fine, tmp_path, monkeypatch):
    "In the last step: the run is finished rather than stopped."
    out, plain, last = tmp_path / "run", Loop.step, json.loads((fine / "run.json").read_text())["steps"] - 1
    def step(self, parts, k):
        if k == last: signal.raise_signal(signal.SIGTERM)
        return plain(self, parts, k)
    monkeypatch.setattr(Loop, "step", step)
    assert go(data, out, **FINE)["done"]
    same_run(fine, out)


def test_loading_processes_do_not_hear_signals(data, fine, tmp_path, monkeypatch):
    "Ctrl-C at a terminal reaches loading processes too: they must not die under the step that is to be finished."
    plain, here = RefDataset.item, os.getpid()
    def item(self, i):
        if os.getpid() != here: [os.kill(os.getpid(), s) for s in (signal.SIGINT, signal.SIGINT)]
        return plain(self, i)
    monkeypatch.setattr(RefDataset, "item", item)
    go(data, tmp_path / "run", workers=1, **FINE)
    same_run(fine, tmp_path / "run")
    assert Loop(config("frozen-tiny", **SHORT), data.split("train")).loader.worker_init_fn is training.deaf  # also where processes are not forked


def test_in_a_thread(data, fine, tmp_path):
    "Where no handler can be set, nothing else changes."
    found = []
    t = threading.Thread(target=lambda: found.append(go(data, tmp_path / "run", **FINE)))
    t.start(), t.join()
    assert found[0]["done"]
    same_run(fine, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end(data, fine, tmp_path, monkeypatch, number):
    "The step is finished, a state saved, one line says how to go on; the handlers are as before."
    out, plain, before = tmp_path / "run", Loop.step, signal.getsignal(number)
    def step(self, parts, k):
        if k == 2: signal.raise_signal(number)
        return plain(self, parts, k)
    with monkeypatch.context() as m:
        m.setattr(Loop, "step", step)
        assert signal.Signals(number).name in line(lambda: go(data, out, **FINE), "step 3 of", "the same command goes on")
    assert signal.getsignal(number) is before and [p.name for p in out.glob("state-*")] == ["state-00000003.safetensors"]
    go(data, out, **FINE)
    same_run(fine, out)


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt):
        with Interrupts():
            for _ in range(2): signal.raise_signal(signal.SIGINT)
    with Interrupts() as noted:
        for _ in range(2): signal.raise_signal(signal.SIGTERM)  # a cluster's and the launcher's
    assert noted.name == "SIGTERM"


ENDLESS = """
import sys, torch
from barleria_nb.data import RefSet
from barleria_nb.model import config
from barleria_nb.training import train
torch.set_num_threads(int(sys.argv[3]))
print("ready", flush=True)
train(config("barleria-noglobal-tiny", pretrained=False, epochs=2, batch=4, lr=1e-3), RefSet.read(sys.argv[1]), sys.argv[2], val_refs=2, device="cpu", progress=False, save_steps=1)
"""

@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.long)])
def test_killed_at_random_moments(data, folder, fine, tmp_path, kills):
    "kill -9 at moments that know nothing of steps, some of them within a save; whatever is left, the same command goes on, and in the end all bytes are those of the run that nobody killed."
    out, rng, states = tmp_path / "run", torch.Generator().manual_seed(kills), set()
    for _ in range(kills):
        run = subprocess.Popen([sys.executable, "-c", ENDLESS, str(folder), str(out), str(torch.get_num_threads())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, cwd=Path(__file__).parents[1])
        assert run.stdout.readline() == "ready\n", run.stderr.read()
        try: run.wait(.2 + 1.8 * torch.rand(1, generator=rng).item())
        except subprocess.TimeoutExpired: run.kill()
        run.wait()
        assert run.returncode in (0, -signal.SIGKILL), run.stderr.read()
        if out.exists(): states |= {p.name for p in out.glob("state-*")}
        if run.returncode == 0:
            same_run(fine, out)
            shutil.rmtree(out)
    print(f"{kills} kills, states seen: {sorted(states)}")
    go(data, out, **FINE)
    same_run(fine, out)


# ---------------------------------------------------------------- what machines do

def poison(monkeypatch, at):
    "The masks of one step are no numbers."
    plain = Loop.step
    def step(self, parts, k):
        if k == at: parts[0]["mask"] = parts[0]["mask"] * float("nan")
        return plain(self, parts, k)
    monkeypatch.setattr(Loop, "step", step)


def test_bad_gradient_stops_and_keeps_the_batch(data, tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    line(lambda: go(data, tmp_path / "run", **FINE), "gradient", "no longer finite at step 2", "bad-batch-0")
    note = training.read_note(tmp_path / "run" / "bad-batch-0.safetensors")
    assert note["step"] == 1 and len(note["refs"]) == len(note["sentences"]) == 4 and set(note["refs"]) <= {r.ref_id for r in data.split("train")}


def unfused(monkeypatch):
    "Adam as it is on Apple's GPUs."
    plain = training.optimiser
    def optimiser(model, lr): return torch.optim.Adam(plain(model, lr).param_groups[0]["params"], lr=lr, fused=False)
    monkeypatch.setattr(training, "optimiser", optimiser)


@pytest.mark.parametrize("fused", [True, False])
def test_bad_gradient_left_out(data, tmp_path, monkeypatch, fused):
    "Asked to skip, Adam leaves everything as it is, its count of steps included; the run ends, and says how many it left out."
    if not fused: unfused(monkeypatch)
    seen, mark = [], Loop.mark
    poison(monkeypatch, 1)
    def spy(self, step, *rest):
        mark(self, step, *rest)
        seen.append({n: t.clone() for n, t in full_state(self.model, self.optimiser).items() if "running" not in n and "num_batches" not in n})
    monkeypatch.setattr(Loop, "mark", spy)
    card = go(data, tmp_path / "run", skip=True, **FINE)
    assert card["done"] and card["left_out"] == 1 and card["settings"]["skip"] is True
    for n, t in seen[1].items(): assert torch.equal(t, seen[2][n]), n  # before the second and before the third correction
    assert any(not torch.equal(t, seen[2][n]) for n, t in seen[3].items())


def blind(monkeypatch, steps):
    "The pictures of some steps become no numbers on the way forward, running statistics included."
    plain, now, normalise = Loop.step, [], training.normalise
    def step(self, parts, k):
        now[:] = [k]
        return plain(self, parts, k)
    monkeypatch.setattr(Loop, "step", step)
    monkeypatch.setattr(training, "normalise", lambda x: normalise(x) * (float("nan") if now[0] in steps else 1))


@pytest.mark.parametrize("bad, fused", [((0,), True), ((3,), True), ((0, 1, 2, 3), True), ((2, 3, 4), True), ((0, 1, 2, 3), False)])
def test_what_is_left_out_leaves_no_trace(data, tmp_path, monkeypatch, bad, fused):
    "First and last step of an epoch, all of one, one on both sides of its end: statistics stay numbers, rows are JSON, the count survives a stop."
    def rows(out): return [json.loads(l, parse_constant=lambda c: pytest.fail(c)) for l in (out / "log.jsonl").read_text().splitlines()]
    if not fused: unfused(monkeypatch)
    blind(monkeypatch, bad)
    assert len(data.split("train")) // 4 == 4
    card = go(data, tmp_path / "run", skip=True, **FINE)
    assert card["done"] and card["left_out"] == len(bad)
    first = rows(tmp_path / "run")[0]
    assert ("loss" in first) == (bad != (0, 1, 2, 3)) and first["step"] == 4
    load_tuned(tmp_path / "run" / "tuned.safetensors")
    for nth in (2, 4):
        with monkeypatch.context() as m:
            stopping(m, "Loop.step", nth)
            with pytest.raises(Stop): go(data, tmp_path / f"torn{nth}", skip=True, **FINE, save_steps=1)
        go(data, tmp_path / f"torn{nth}", skip=True, **FINE, save_steps=1)
        same_run(tmp_path / "run", tmp_path / f"torn{nth}")


def test_statistics_of_a_step_left_out(data, monkeypatch):
    blind(monkeypatch, (0,))
    loop = Loop(config("dcris-tiny", **SHORT), data.split("train"))
    before = {n: t.clone() for n, t in full_state(loop.model, loop.optimiser).items()}
    next(loop.epoch(0))
    assert [s for s, _ in loop.bad()] == [0]
    for n, t in full_state(loop.model, loop.optimiser).items(): assert torch.equal(t, before[n]), n


def test_twenty_in_a_row_are_a_lost_run(data, tmp_path):
    loop = Loop(config("frozen-tiny", **SHORT), data.split("train"))
    t = training.Trainer(loop, None, training.RunFolder(tmp_path / "run", {}), skip=True)
    t.window = [torch.tensor(float("nan"))] * 20
    line(lambda: t.row(0, torch.zeros(8)), "no longer finite")
    t.window = [torch.tensor(float("nan"))] * 19 + [torch.tensor(2.)]
    t.row(0, torch.zeros(8))
    assert t.folder.rows[-1]["loss"] == 2


def test_no_state_after_a_bad_gradient(data, tmp_path, monkeypatch):
    "Without `skip` it is seen before the next state, so the states are from before it."
    blind(monkeypatch, (2,))
    line(lambda: go(data, tmp_path / "run", **FINE, save_steps=1), "gradient", "step 3", "bad-batch-0")
    assert sorted(p.name for p in (tmp_path / "run").glob("state-*")) == ["state-00000001.safetensors", "state-00000002.safetensors"]


@pytest.fixture
def torn(folder, tmp_path):
    "The set with one training picture cut short."
    shutil.copytree(folder, tmp_path / "torn")
    data = RefSet.read(tmp_path / "torn")
    ref = data.split("train").refs[0]
    path = next(p for p in (tmp_path / "torn" / "images").iterdir() if p.name == Path(ref.file_name).name)
    path.write_bytes(path.read_bytes()[:60])
    return RefSet.read(tmp_path / "torn"), ref


def test_a_broken_picture_of_val(folder, tmp_path):
    "A score leaves nothing out, whatever training may."
    shutil.copytree(folder, tmp_path / "torn")
    data = RefSet.read(tmp_path / "torn")
    path = next(p for p in (tmp_path / "torn" / "images").iterdir() if p.name == Path(data.split("val").refs[0].file_name).name)
    path.write_bytes(path.read_bytes()[:60])
    line(lambda: go(RefSet.read(tmp_path / "torn"), tmp_path / "run", unreadable=.9), path.name)


@pytest.mark.parametrize("workers", [0, 1, pytest.param(2, marks=pytest.mark.long)])
def test_unreadable_picture(torn, tmp_path, workers):
    data, ref = torn
    lost = sorted(r.ref_id for r in data.split("train") if r.image_id == ref.image_id)
    line(lambda: go(data, tmp_path / "strict", workers=workers, epochs=1), Path(ref.file_name).name)
    card = go(data, tmp_path / "lenient", workers=workers, epochs=1, batch=len(data.split("train")), unreadable=.5)
    assert card["done"] and card["unreadable"] == lost
    line(lambda: go(data, tmp_path / "little", workers=workers, epochs=1, unreadable=.01), "of 18 refs have pictures that cannot be read", "the share of 0.01")


def test_a_dead_loading_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(RefDataset, "item", lambda self, i: os._exit(3))
    line(lambda: go(data, tmp_path / "run", workers=1, val=None), "a loading process died", "--workers")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory(data, tmp_path, monkeypatch, error):
    def full(*a): raise error
    monkeypatch.setattr(training, "train_step", full)
    line(lambda: go(data, tmp_path / "run"), "out of memory", "--accumulate", "--recompute", "--batch")


def test_other_errors_are_not_hidden(data, tmp_path, monkeypatch):
    def wrong(*a): raise RuntimeError("a real fault")
    monkeypatch.setattr(training, "train_step", wrong)
    with pytest.raises(RuntimeError, match="a real fault"): go(data, tmp_path / "run")


# ---------------------------------------------------------------- loggers

def test_a_logger_gets_the_rows_too(data, tmp_path, monkeypatch):
    "Through Accelerate's own table; the run's files are the same ones with and without."
    seen = []
    class Fake:
        requires_logging_directory = True
        def __init__(self, name, logging_dir): seen.append((name, logging_dir))
        def start(self): seen.append("started")
        def store_init_configuration(self, settings): seen.append(settings)
        def log(self, values, step): seen.append((step, values))
        def finish(self): seen.append("finished")
    monkeypatch.setitem(training.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    told = []
    go(data, tmp_path / "run", logger="tensorboard", tell=told.append)
    rows = [json.loads(l) for l in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert seen[:2] == [("run", tmp_path / "run"), "started"] and seen[-1] == "finished" and told == rows
    assert all(isinstance(v, (int, float, str, bool)) for v in seen[2].values()) and seen[2]["seed"] == 0
    assert [dict(v, step=s) for s, v in seen[3:-1]] == [dict(r) for r in rows]


def test_a_logger_that_is_not_there(data, tmp_path, monkeypatch):
    def missing(*a, **k): raise ImportError("no such thing")
    monkeypatch.setitem(training.LOGGER_TYPE_TO_CLASS, "wandb", type("W", (), dict(requires_logging_directory=False, __new__=missing)))
    line(lambda: go(data, tmp_path / "run", logger="wandb"), "wandb is not installed", "without --logger")
    line(lambda: go(data, tmp_path / "run", logger="wnadb"), "Did you mean wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["log", "finish", "start", "store_init_configuration"])
def test_a_logger_that_fails(data, fine, tmp_path, monkeypatch, capfd, where):
    "Before the run it is an error; in the run, one line, and the run goes on."
    class Failing:
        requires_logging_directory, calls = False, 0
        def __init__(self, name): pass
    def fail(self, *a, **k):
        Failing.calls += 1
        raise ConnectionError("no route\nto host")
    for name in ("log", "finish", "start", "store_init_configuration"): setattr(Failing, name, fail if name == where else lambda self, *a, **k: None)
    monkeypatch.setitem(training.LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    if where in ("log", "finish"):
        go(data, tmp_path / "run", logger="wandb", **FINE)
        same_run(fine, tmp_path / "run")
        said = "".join(capfd.readouterr())
        assert said.count("wandb gets no more rows (no route to host)") == 1 and Failing.calls == 1
    else:
        line(lambda: go(data, tmp_path / "run", logger="wandb", **FINE), "wandb does not start (no route to host)")
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- memory, parts, processes

def test_recomputing_changes_no_bit(data, whole, tmp_path):
    go(data, tmp_path / "run", recompute=True)
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["dcris-tiny", pytest.param("detris-tiny", marks=pytest.mark.long), pytest.param("barleria-tiny", marks=pytest.mark.long)])
def test_recomputing_counts_once(data, tmp_path, name):
    "Also where batch normalisation lies inside a recomputed block, and in parts."
    for k in (False, True): go(data, tmp_path / str(k), name=name, recompute=k, accumulate=2, epochs=1)
    same_run(tmp_path / "False", tmp_path / "True")


def test_parts(data, tmp_path):
    "Gradients of the parts add up to that of a batch whose batch normalisation sees the same parts; what cannot be cut is refused."
    one, two = (Loop(config("frozen-tiny", **SHORT), data.split("train"), accumulate=n) for n in (1, 2))
    one.portions.start(0), one.data.set_epoch(0), one.net.train()
    batch = one.ready(next(iter(one.loader)))
    for i in (0, 4): (train_step(one.model, {k: t[i:i + 4] for k, t in batch.items()})[0] / 2).backward()
    next(two.epoch(0))
    mine, theirs = ({n: p.grad for n, p in loop.model.named_parameters() if p.requires_grad} for loop in (one, two))
    assert any(g.any() for g in mine.values())
    for n, g in mine.items(): assert torch.allclose(g, theirs[n], atol=1e-7), n
    assert go(data, tmp_path / "run", accumulate=2, epochs=1)["settings"]["accumulate"] == 2
    line(lambda: go(data, tmp_path / "odd", accumulate=3), "multiple of 3")


LAUNCHED = """
import json, sys, torch
from barleria_nb.data import RefSet
from barleria_nb.model import config
from barleria_nb.training import train, accelerator
from barleria_nb.metrics import evaluate
from barleria_nb.model import build_model
torch.set_num_threads(1)
data, out, name = RefSet.read(sys.argv[1]), sys.argv[2], sys.argv[3]
if name.startswith("stop-"):
    from barleria_nb.training import Loop
    name, plain = name[5:], Loop.step
    def step(self, parts, k):
        if k == 3: raise SystemExit("stopped here")
        return plain(self, parts, k)
    Loop.step = step
if name == "evaluate":
    a = accelerator("no", torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config("snf-tiny", pretrained=False))
    scores = evaluate(model, data, size=64, batch=4, threshold=.04, progress=False, shared=a.num_processes > 1)
    open(f"{out}-{a.process_index}", "w").write(json.dumps(scores.records))
else: train(config(name, pretrained=False, epochs=2, batch=8, lr=1e-4), data, out, val_refs=3, device="cpu", progress=False, save_steps=1)
if torch.distributed.is_initialized(): torch.distributed.destroy_process_group() # as the commands do
"""

def launched(folder, out, name, processes, tmp_path, fails=None):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, str(tmp_path / "launched.py"), str(folder), str(out), name], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert (done.returncode == 0) == (fails is None) and (fails or "") in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["barleria-tiny", pytest.param("dcris-ta-tiny", marks=pytest.mark.long), pytest.param("snf+etris-tiny", marks=pytest.mark.long), pytest.param("lora-tiny", marks=pytest.mark.long)])
def test_two_processes_are_one(folder, tmp_path, name):
    """The same rows within a thousandth, and the same numbers within what Adam makes of rounding: where a gradient is as small as its rounding error, Adam's step is as large as any.
    So most numbers agree to a thousandth of what they moved, and none is off by more than all steps together."""
    for n in (1, 2): launched(folder, tmp_path / f"run{n}", name, n, tmp_path)
    (a, rows), (b, others) = ((load_bytes((tmp_path / f"run{n}" / "tuned.safetensors").read_bytes()), [json.loads(l) for l in (tmp_path / f"run{n}" / "log.jsonl").read_text().splitlines()]) for n in (1, 2))
    assert [r.get("loss", 0) for r in rows] == pytest.approx([r.get("loss", 0) for r in others], rel=1e-3) and a.keys() == b.keys()
    far = torch.cat([(a[n] - b[n]).abs().flatten().double() for n in a if a[n].is_floating_point()])
    assert far.quantile(.9) < 1e-5 and far.median() < 1e-6 and far.max() < 4 * 4e-4, (far.quantile(.9), far.max())
    assert json.loads((tmp_path / "run2" / "run.json").read_text())["processes"] == 2 and sorted(os.listdir(tmp_path / "run1")) == sorted(os.listdir(tmp_path / "run2"))


@pytest.mark.long
@pytest.mark.parametrize("first,then", [(2, 1), (1, 2)])
def test_begun_by_some_finished_by_others(folder, tmp_path, first, then):
    "The number of processes is no setting: what one stopped, two finish, and the reverse; the loss is that of one within a thousandth."
    launched(folder, tmp_path / "run", "stop-barleria-noglobal-tiny", first, tmp_path, "stopped here")
    assert list((tmp_path / "run").glob("state-00000003*"))
    launched(folder, tmp_path / "run", "barleria-noglobal-tiny", then, tmp_path)
    launched(folder, tmp_path / "one", "barleria-noglobal-tiny", 1, tmp_path)
    rows = [[json.loads(l) for l in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("run", "one")]
    assert [r.get("loss", 0) for r in rows[0]] == pytest.approx([r.get("loss", 0) for r in rows[1]], rel=1e-3)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(tmp_path / "one"))


@pytest.mark.long
def test_a_batch_that_three_cannot_share(folder, tmp_path):
    launched(folder, tmp_path / "run", "barleria-noglobal-tiny", 3, tmp_path, "give a --batch that is a multiple of 3")
    assert not (tmp_path / "run").exists()


def test_scores_are_the_same_for_one_two_and_three_processes(folder, tmp_path):
    for n in (1, 2, 3): launched(folder, tmp_path / f"scores{n}", "evaluate", n, tmp_path)
    texts = {p.read_text() for p in tmp_path.glob("scores*-*")}
    assert len(list(tmp_path.glob("scores*-*"))) == 6 and len(texts) == 1 and len(json.loads(texts.pop())) > 20


# ---------------------------------------------------------------- scores, losses, precision

def test_the_first_of_the_best_epochs_is_kept(data, tmp_path, monkeypatch):
    scores = iter((.2, .3, .3))
    monkeypatch.setattr(training.Trainer, "score", lambda self, epoch: dict(mIoU=next(scores)))
    assert go(data, tmp_path / "run")["best"]["epoch"] == read_about(tmp_path / "run" / "tuned.safetensors")["extra"]["epoch"] == 1


def test_non_finite_loss_stops(data, tmp_path):
    line(lambda: go(data, tmp_path / "run", lr=1e30), "no longer finite", "lower --lr")
    assert sorted(os.listdir(tmp_path / "run")) == ["bad-batch-0.safetensors", "run.json"]


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
    assert training.read_note(tmp_path / "run" / "state-00000002.safetensors")["step"] == 2
    load_tuned(tmp_path / "run" / "tuned.safetensors")


def test_precision(data, tmp_path):
    assert go(data, tmp_path / "run", precision="bf16", epochs=1)["done"]
    line(lambda: accelerator("fp16", CPU), "needs a GPU")
    line(lambda: accelerator("half", CPU), "is unknown")


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


@pytest.mark.parametrize("world,parts", [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)])
def test_portions_make_up_the_batches(world, parts):
    "Whatever the number of processes and parts, each step has the same items in the same order; an epoch begun in the middle has what is left."
    whole = [list(p) for p in Portions(EpochOrder(50, 3), 12)]
    assert len(whole) == 4
    for first in (0, 2):
        shares = []
        for rank in range(world):
            p = Portions(EpochOrder(50, 3), 12, rank, world, parts)
            p.start(0, first)
            mine = list(p)
            assert len(mine) == len(p) == (4 - first) * parts
            shares.append([sum(mine[k * parts:(k + 1) * parts], []) for k in range(4 - first)])
        assert [sum(step, []) for step in zip(*shares)] == whole[first:]
    line(lambda: Portions(EpochOrder(50, 3), 13, 0, 2), "multiple of 2")
    line(lambda: Portions(EpochOrder(50, 3), 12, 0, 1, 0), "--accumulate 1")


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
