"The commands: as a shell runs them (a few), and as their functions with options parsed (the rest)."
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fastcore.script import anno_parser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from barleria_nb import cli, cli_data, core, inference, photos, metrics, model, protocols, training
from barleria_nb.data import RefSet, decode_mask
from barleria_nb.shapes import make_refshapes

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcoco-sample"
COMMANDS = ("barleria_demo", "barleria_train", "barleria_eval", "barleria_segment", "barleria_params", "barleria_runs", "barleria_speed", "barleria_bench", "barleria_export", "barleria_data", "barleria_table", "barleria_mix", "barleria_check", "barleria_import")
NAME = "barleria-noglobal-tiny"


def home(command):
    "The module that has a command."
    return cli if hasattr(cli, command) else cli_data


def shell(folder, command, *words, **env):
    "Run a command in a process of its own, through a script like the one pip writes."
    script = Path(folder) / command
    script.write_text(f"from {home(command).__name__} import {command}\n{command}()\n")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **env}
    return subprocess.run([sys.executable, str(script), *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=1200)


def run(line, *words):
    "Run a command in this process; its exit code."
    command, *first = line.split()
    function = getattr(home(command), command).__wrapped__
    try: function(**{k: v for k, v in vars(anno_parser(function, prog=command).parse_args([*first, *map(str, words)])).items() if k not in ("pdb", "xtra")})
    except SystemExit as e: return e.code or 0
    return 0


def error_lines(text):
    "Lines of an error stream, without the remark that no trained towers are installed."
    return [l for l in text.splitlines() if "no tiny-clip weights" not in l]


class Shop:
    "Data, a photo of odd size, and a run made by the command itself."
    def __init__(self, folder):
        self.folder, self.data, self.run, self.photo = folder, folder / "shapes", folder / "runs" / "first", folder / "photo.jpg"
        make_refshapes(self.data, scenes=dict(train=20, val=3, testA=2, testB=2), progress=False)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (75, 133, 3), np.uint8)).save(self.photo)
        self.words = (NAME, "--data", self.data, "--epochs", "2", "--batch", "16")
        self.done = shell(folder, "barleria_train", *self.words, "--out", self.run)


@pytest.fixture(scope="session")
def shop(tmp_path_factory): return Shop(tmp_path_factory.mktemp("shop"))


# ---------------------------------------------------------------------------------------------------------------- in a shell
@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, tmp_path):
    done = shell(tmp_path, command, "--help")
    assert done.returncode == 0 and not done.stderr
    wanted = set(anno_parser(getattr(home(command), command).__wrapped__)._option_string_actions) - {"-h", "--pdb", "--xtra"}
    assert wanted <= set(re.findall(r"--\w+", done.stdout)) and "--debug" in wanted


def test_train_then_eval_then_segment(shop):
    assert shop.done.returncode == 0, shop.done.stderr
    assert shop.done.stdout.startswith("training on ") and "CPU threads" in shop.done.stdout.splitlines()[0]
    assert "best on val" in shop.done.stdout and "epoch 2/2" in shop.done.stdout
    assert not error_lines(shop.done.stderr)
    assert {p.name for p in shop.run.iterdir()} == {"tuned.safetensors", "run.json", "log.jsonl", "log.csv"}

    done = shell(shop.folder, "barleria_eval", "runs/first", "--data", shop.data, "--split", "val", "--json")
    assert done.returncode == 0, done.stderr
    scores, best = json.loads(done.stdout), core.read_json(shop.run / "run.json")["best"]
    for k in ("mIoU", "oIoU", "Pr@0.5", "Pr@0.9", "n"): assert scores[k] == pytest.approx(best[k], abs=2e-3)
    assert (scores["config"], scores["split"], scores["n"]) == (NAME, "val", 27)

    done = shell(shop.folder, "barleria_segment", "runs/first/tuned.safetensors", "photo.jpg", "a red/blue circle", "x " * 150, "--out", "masks")
    assert done.returncode == 0, done.stderr
    assert error_lines(done.stderr) == ["1 of 2 sentences are longer than 17 word pieces; their ends were not read."]
    records = core.read_json(shop.folder / "masks" / "masks.json")
    assert {p.name for p in (shop.folder / "masks").iterdir()} == {"0_a-red-blue-circle.png", records[1]["file"], "masks.json", "overlays.png"}
    for r in records:
        mask = np.array(Image.open(shop.folder / "masks" / r["file"])) > 0
        assert mask.shape == (75, 133) and mask.sum() == r["area"]
        assert (decode_mask(r["rle"], 75, 133) == mask).all()


def test_one_line_without_a_traceback_and_debug_with_one(tmp_path):
    done = shell(tmp_path, "barleria_params", "snf-b61")
    assert done.returncode == 1 and not done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("barleria_params: no configuration 'snf-b61'") and "Did you mean snf-b16" in line
    done = shell(tmp_path, "barleria_params", "snf-b61", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "BarleriaError" in done.stderr


@pytest.mark.parametrize("words", [["barleria_eval"], ["barleria_eval", "x"], ["barleria_train", NAME, "--data", "d"], ["barleria_segment", "r", "i", "--out", "o"],
    ["barleria_eval", "x", "--data", "d", "--batch", "0"], ["barleria_train", NAME, "--data", "d", "--out", "o", "--lr", "nan"], ["barleria_eval", "x", "--data", "d", "--threshold", "1"],
    ["barleria_train", NAME, "--data", "d", "--out", "o", "--seed", "-1"], ["barleria_train", NAME, "--data", "d", "--out", "o", "--precision", "fp8"], ["barleria_params", "--jsn"]])
def test_misuse_is_code_2(words, capsys):
    assert run(words[0], *words[1:]) == 2
    assert f"{words[0]}: error: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- what is counted
def test_params_are_the_papers_numbers(capsys):
    assert run("barleria_params snf-b16 barleria-noglobal-b16 --json") == 0
    snf, noglobal = json.loads(capsys.readouterr().out)
    assert (snf["backbone"], noglobal["backbone"]) == (184_416, 390_656)
    assert sum(noglobal["parts"].values()) == 390_656 and noglobal["positions"] == 0
    for row in (snf, noglobal): assert (row["head"], row["head_published"]) == (21_095_425, 22_671_361)
    assert snf["positions_if_trained"] == (26 * 26 + 1) * 768 + 77 * 512


def test_params_of_all_configurations(capsys, monkeypatch):
    monkeypatch.setattr(model, "METHODS", {m: model.METHODS[m] for m in ("full", "lora", "dcris-7")})
    assert run("barleria_params --json") == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == model.configurations()
    assert run("barleria_params") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(model.configurations())


def test_runs_side_by_side(shop, tmp_path, capsys):
    assert run("barleria_runs", shop.run.parent, "--plot", tmp_path / "runs.png") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("run ") and any(NAME in r and " % " in r for r in rows) and (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
    assert run("barleria_runs", shop.run.parent, "--json") == 0
    assert any(r["folder"] == str(shop.run) and r["done"] for r in json.loads(capsys.readouterr().out))
    assert run("barleria_runs", tmp_path / "empty") == 1
    assert "no runs under" in capsys.readouterr().err


def test_other_processes_are_quiet(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run("barleria_params snf-tiny") == 0 and not capsys.readouterr().out
    assert run("barleria_params snf-tyni") == 1 and "Did you mean" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- what goes wrong
def damaged(shop, folder, how):
    "A copy of the tuned model, damaged."
    whole, path = shop.run / "tuned.safetensors", folder / "tuned.safetensors"
    path.write_bytes(whole.read_bytes()[:{"cut": 5000, "short": 5, "empty": 0}.get(how)])
    if how == "text": path.write_text("not a model\n")
    if how == "foreign": save_file({"a": np.zeros(3)}, path)
    if how == "other":
        with safe_open(whole, "np") as f: tensors, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["barleria"])
        save_file(tensors, path, {"barleria": json.dumps(about | dict(config=asdict(model.config("snf-tiny"))))})
    return path


@pytest.mark.parametrize("how, said", [("cut", "whole safetensors file"), ("short", "whole safetensors file"), ("empty", "whole safetensors file"), ("text", "whole safetensors file"),
    ("foreign", "not a tuned model of this library"), ("other", "is missing, expected")])
def test_damaged_checkpoints(shop, tmp_path, capsys, how, said):
    path = damaged(shop, tmp_path, how)
    assert run("barleria_eval", path, "--data", shop.data) == 1
    line, = error_lines(capsys.readouterr().err)
    assert line.startswith(f"barleria_eval: {path}") and said in line


CASES = {
    "configuration": ("barleria_train", ["barleria-noglobal-tyni", "--data", "DATA", "--out", "OUT"], "Did you mean barleria-noglobal-tiny"),
    "no such data": ("barleria_train", [NAME, "--data", "nowhere", "--out", "OUT"], "there are no data 'nowhere'"),
    "nearly a name": ("barleria_train", [NAME, "--data", "refshape", "--out", "OUT"], "Did you mean refshapes"),
    "not a data folder": ("barleria_train", [NAME, "--data", "RUN", "--out", "OUT"], "has no folder 'images'"),
    "batch too large": ("barleria_train", [NAME, "--data", "DATA", "--out", "OUT", "--batch", "5000"], "smaller --batch"),
    "other settings": ("barleria_train", [NAME, "--data", "DATA", "--out", "RUN", "--batch", "16", "--epochs", "3"], "other settings (epochs: 2 there, 3 now)"),
    "out is a file": ("barleria_train", [NAME, "--data", "DATA", "--out", "PHOTO"], "is a file"),
    "words": ("barleria_train", [NAME, "--data", "DATA", "--out", "OUT", "--words", "2"], "from 3 to 77"),
    "run": ("barleria_eval", ["nowhere", "--data", "DATA"], "nowhere is missing"),
    "run folder without a model": ("barleria_eval", ["DATA", "--data", "DATA"], "holds no tuned.safetensors"),
    "split": ("barleria_eval", ["RUN", "--data", "DATA", "--split", "vall"], "Did you mean val"),
    "data of eval": ("barleria_eval", ["RUN", "--data", "nowhere"], "there are no data 'nowhere'"),
    "device": ("barleria_eval", ["RUN", "--data", "DATA", "--device", "cuda:99"], "not on this machine"),
    "image": ("barleria_segment", ["RUN", "DATA/refs.json", "a circle", "--out", "OUT"], "is not a picture"),
    "no image": ("barleria_segment", ["RUN", "none.png", "a circle", "--out", "OUT"], "none.png is missing"),
    "empty sentence": ("barleria_segment", ["RUN", "PHOTO", "a circle", "  ", "--out", "OUT"], "is empty"),
    "masks into a file": ("barleria_segment", ["RUN", "PHOTO", "a circle", "--out", "PHOTO"], "is a file"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_one_line(shop, tmp_path, capsys, case):
    command, words, said = CASES[case]
    places = dict(DATA=shop.data, RUN=shop.run, OUT=tmp_path / "out", PHOTO=shop.photo)
    words = [re.sub("^(DATA|RUN|OUT|PHOTO)", lambda m: str(places[m[0]]), w) for w in words]
    assert run(command, *words) == 1
    seen = capsys.readouterr()
    line, = error_lines(seen.err)
    assert line.startswith(f"{command}: ") and said in line and "Traceback" not in seen.out
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("tuned*"))


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "you may not write there")])
def test_output_that_cannot_be_written(shop, tmp_path, capsys, monkeypatch, number, said):
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(core.os, "fsync", refuse)
    assert run("barleria_segment", shop.run, shop.photo, "a circle", "--out", tmp_path / "masks") == 1
    line, = error_lines(capsys.readouterr().err)
    assert line.startswith("barleria_segment: ") and said in line
    assert not list((tmp_path / "masks").iterdir())


@pytest.mark.parametrize("error, said", [(MemoryError(), "smaller --batch"), (RuntimeError("CUDA out of memory. Tried to\nallocate"), "smaller --batch"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"), (ZeroDivisionError("odd\nbug"), "ZeroDivisionError: odd bug")])
def test_what_the_system_refuses(shop, capsys, monkeypatch, error, said):
    def refuse(*_, **__): raise error
    monkeypatch.setattr(protocols, "score_model", refuse)
    assert run("barleria_eval", shop.run, "--data", shop.data) == 1
    line, = error_lines(capsys.readouterr().err)
    assert said in line
    with pytest.raises(type(error)): run("barleria_eval", shop.run, "--data", shop.data, "--debug")


def test_odd_sentences_and_many(shop, tmp_path, capsys, monkeypatch):
    "Half a character, a command to the terminal, more answers than one figure shows: each gets its mask, and the screen stays as it is."
    monkeypatch.setattr(photos, "OVERVIEW", 3)
    assert run("barleria_segment", shop.run, shop.photo, "half a \ud83d circle", "\x1b[2J red", *["a circle"] * 8, "--out", tmp_path / "masks") == 0
    seen = capsys.readouterr()
    assert "\x1b" not in seen.out + seen.err and "half a ? circle" in seen.out
    records = core.read_json(tmp_path / "masks" / "masks.json")
    assert len(records) == 10 and all((tmp_path / "masks" / r["file"]).is_file() for r in records)
    assert Image.open(tmp_path / "masks" / "overlays.png").height < 4 * 160
    assert run("barleria_eval", shop.run, "--data", shop.data, "--split", "\x1b[2J") == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_stopped_training_goes_on(shop, tmp_path, capsys, monkeypatch):
    step, left = training.train_step, [core.read_json(shop.run / "run.json")["steps"] - 1]
    def interrupted(*words):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return step(*words)
    with monkeypatch.context() as m:
        m.setattr(training, "train_step", interrupted)
        assert run("barleria_train", *shop.words, "--out", tmp_path / "run") == 1
    assert error_lines(capsys.readouterr().err)[-1] == "barleria_train: stopped; the same command goes on from the last saved state."
    assert run("barleria_train", *shop.words, "--out", tmp_path / "run") == 0
    assert "epoch 1/2" not in capsys.readouterr().out
    losses = lambda folder: [r["loss"] for r in inference.read_log(folder) if "loss" in r]
    assert losses(tmp_path / "run") == pytest.approx(losses(shop.run), abs=1e-3)


def test_problems_in_the_data_are_reported(shop, tmp_path, capsys):
    shutil.copytree(shop.data, tmp_path / "data")
    refs = json.loads((tmp_path / "data" / "refs.json").read_text())
    mine = [r for r in refs if r["split"] == "testA"]
    mine[0]["ann_id"] = 10**9
    mine[1]["sentences"][0]["sent"] = "the red circle " * 20
    (tmp_path / "data" / "refs.json").write_text(json.dumps(refs))
    assert run("barleria_eval", shop.run, "--data", tmp_path / "data", "--split", "testA", "--json") == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out)["n"] == sum(len(r["sentences"]) for r in mine[1:])
    first, second, third = error_lines(seen.err)
    assert first.startswith("1 problem") and f"ref {mine[0]['ref_id']}" in second and third.startswith("1 of ")


def test_what_torch_says_of_the_gpu_is_passed_on(capsys):
    "A driver that is too old would else mean a run on the processor without a word; other libraries' warnings stay out."
    import warnings
    with cli.told("barleria_train"):
        for module in ("torch.cuda", "torch.nn.functional"): warnings.warn_explicit(f"a word from {module}", UserWarning, "file.py", 1, module)
    assert capsys.readouterr().err == "barleria_train: a word from torch.cuda\n"


# ---------------------------------------------------------------------------------------------------------------- larger pieces
def test_demo_and_what_it_uses_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BARLERIA_DATA", str(tmp_path / "drawn"))
    monkeypatch.setattr(cli, "QUICK", cli.QUICK | dict(scenes=dict(train=12, val=9, testA=2, testB=2), epochs=1, batch=16))
    out = tmp_path / "demo"
    assert run("barleria_demo --quick --out", out) == 0
    first = capsys.readouterr().out
    for row in ("this run", "towers frozen", "shuffled sentences", "at random", "largest object", "ceiling", "s in total"): assert row in first
    scores = core.read_json(out / "metrics.json")
    assert {s: set(v) for s, v in scores.items()} == {s: {"mIoU", "oIoU", "Pr@0.5"} for s in ("val", "testA", "testB")}
    assert all(0 <= x <= 1 for v in scores.values() for x in v.values())
    assert all(Image.open(out / n).width > 300 for n in ("overlays.png", "curve.png"))
    chosen = inference.chosen(RefSet.read(tmp_path / "drawn" / "refshapes-quick", "val"))
    assert len({r.image_id for r, _ in chosen}) == 8

    def not_again(*_, **__): raise AssertionError("done before")
    with monkeypatch.context() as m:
        m.setattr(training, "Trainer", not_again), m.setattr(metrics, "evaluate", not_again)
        assert run("barleria_demo --quick --out", out) == 0
    assert capsys.readouterr().out.splitlines()[-11:-2] == first.splitlines()[-11:-2]
    assert core.read_json(out / "metrics.json") == scores

    numbers = core.read_json(out / "demo.json")
    core.write_json(out / "demo.json", numbers | dict(mark="another run", rows={}))
    assert run("barleria_demo --quick --out", out) == 0
    assert core.read_json(out / "metrics.json") == scores


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is missing: photographs with sentences")
def test_photographs(tmp_path, capsys):
    assert run("barleria_train", NAME, "--data", SAMPLE, "--out", tmp_path / "run", "--epochs", "1", "--batch", "24", "--val_refs", "6") == 0
    for split in ("val", "testA"):
        capsys.readouterr()
        assert run("barleria_eval", tmp_path / "run", "--data", SAMPLE, "--split", split, "--json") == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["n"] == RefSet.read(SAMPLE, split).splits[split][1] and 0 <= scores["mIoU"] <= 1


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_slugs_are_safe(sentence):
    assert re.fullmatch("[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", inference.slug(sentence))
