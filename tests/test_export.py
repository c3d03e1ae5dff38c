"The model outside Python: recording, ONNX file, word pieces, script; what is refused, and that nothing is left behind."
import ast
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from barleria_nb import export
from barleria_nb.core import BarleriaError
from barleria_nb.data import Letterbox, read_image, tokenize
from barleria_nb.inference import Segmenter
from barleria_nb.metrics import THRESHOLD
from barleria_nb.model import build_model, config
from barleria_nb.shapes import records

pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

METHODS = ("frozen", "snf", "etris", "barleria-noglobal", "barleria", "dcris", "lora", "adapter", "compacter", "detris", "full")
GUARD = """
import sys
class Guard:
    def find_spec(self, name, *_):
        if name.split(".")[0] in BLOCKED: raise ImportError(name)
sys.meta_path.insert(0, Guard())
"""


def shaken(name):
    "A model in evaluation mode whose tuned numbers are not at their start."
    model = build_model(config(name), seed=1).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p += .02 * torch.randn(p.shape, generator=g) * p.abs().mean().clamp(.1)
    return model


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    "A model, and the folder it was exported to."
    model = shaken("frozen-tiny")
    return model, export.export_onnx(model, tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    "The tokenizer without PyTorch."
    path = tmp_path_factory.mktemp("pieces") / "words.txt"
    export.write_pieces(path)
    return export.Pieces(path)


@pytest.fixture
def quick(monkeypatch):
    "A model for tests of files: its graph is a few bytes, and nothing is compared."
    monkeypatch.setattr(export, "_write_graph", lambda whole, path, digest: path.write_bytes(b"graph"))
    monkeypatch.setattr(export, "compare", lambda path, whole: 0.)
    return build_model(config("frozen-tiny"))


# ---------------------------------------------------------------- the graph

def test_any_number_of_sentences(frozen):
    model, made = frozen
    assert made.difference <= export.TOLERANCE
    assert export.compare(made.folder / "model.onnx", export.served(model), (1, 3, 4, 9)) < 1e-5


def test_the_file_describes_itself_and_names_no_paths(frozen):
    model, made = frozen
    session = export.opened_graph(made.folder / "model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["barleria"])
    assert about == export.about(model) | dict(pieces=hashlib.sha256((made.folder / "words.txt").read_bytes()).hexdigest())
    assert {"config", "size", "words", "threshold", "mean", "std", "letterbox", "licence", "opset"} <= set(about)
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("image", ["batch", 64, 64, 3], "tensor(uint8)"), ("ids", ["batch", 17], "tensor(int64)"), ("words", ["batch", 17], "tensor(bool)")]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("probability", ["batch", 32, 32])]
    stored = (made.folder / "model.onnx").read_bytes()
    assert len(stored) == made.bytes
    assert not any(w in stored for w in (b"site-packages", b'File "', b"stack_trace"))
    import onnx
    graph = onnx.load(made.folder / "model.onnx")
    onnx.checker.check_model(graph)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", export.OPSET)]


def test_the_model_stays_as_it_was(monkeypatch):
    model = build_model(config("frozen-tiny"), seed=1)
    inputs, whole = export.random_inputs(model, 3), export.served(model)
    with torch.no_grad(): before = whole(*inputs)
    state = {n: (t.clone(), t.requires_grad) for n, t in model.named_parameters()}
    program = export.exported(model)
    assert model.training and model.head.training and not model.encoder.visual.training
    assert all(torch.equal(t, state[n][0]) and t.requires_grad == state[n][1] for n, t in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(whole(*inputs), before) # no table of positions without numbers was left in a cache
        assert (program.module()(*inputs) - before).abs().max() < 1e-6


def test_random_inputs_are_sentences():
    model = build_model(config("frozen-tiny"))
    image, ids, words = export.random_inputs(model, 40)
    assert image.shape == (40, 64, 64, 3) and image.dtype == torch.uint8 and ids.dtype == torch.int64
    assert set(words.sum(1).tolist()) == set(range(3, 18))
    assert (ids[:, 0] == 49406).all() and ((ids == 49407).sum(1) == 1).all() and (ids[~words] == 0).all()
    assert (ids[torch.arange(40), words.sum(1) - 1] == 49407).all()


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, tmp_path):
    model = shaken(f"{method}-tiny")
    made = export.export_onnx(model, tmp_path / "out")
    assert made.difference < 1e-5
    assert export.compare(made.folder / "model.onnx", export.served(model), (1, 4, 7)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_method_recorded(method):
    model = shaken(f"{method}-tiny")
    run, whole = export.exported(model).module(), export.served(model)
    for b in (1, 2, 5):
        inputs = export.random_inputs(model, b, seed=b)
        with torch.no_grad(): assert (run(*inputs) - whole(*inputs)).abs().max() < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("name", ["barleria-tiny", "dcris-tinydino", "frozen-tiny", "snf-tiny"])
def test_shipped(name, tmp_path):
    shipped = Segmenter.from_pretrained(name)
    made = export.export_onnx(shipped.model, tmp_path / "out")
    assert made.difference < 1e-5
    scene, *_, refs = records("val", 0)
    said = [s["sent"] for ref in refs for s in ref["sentences"]][:5]
    found, known = export.Segmenter(made.folder)(scene.image, said), np.stack([answer.probability for answer in shipped(scene.image, said)])
    assert found.shape == known.shape and np.abs(found - known).max() < export.TOLERANCE


@pytest.mark.long
def test_large_weights_lie_beside_the_graph(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "LARGE", 1)
    made = export.export_onnx(build_model(config("frozen-tiny")), tmp_path / "out")
    files = {f.name for f in made.folder.iterdir()} - {"words.txt", "segment.py"}
    assert len(files) == 2 and all(name.startswith("model.onnx") for name in files)
    assert export.Segmenter(made.folder)(np.zeros((30, 40, 3), np.uint8), "a circle").shape == (1, 30, 40)


@pytest.mark.long
@pytest.mark.full
@pytest.mark.parametrize("name", ["barleria-b16", "dcris-b14"])
def test_full_size(name, tmp_path):
    made = export.export_onnx(build_model(config(name)).eval(), tmp_path / "out")
    assert made.difference <= export.TOLERANCE and made.bytes < 2**31
    assert {f.name for f in made.folder.iterdir()} == {"model.onnx", "words.txt", "segment.py"}


# ---------------------------------------------------------------- words

def same(pieces, texts, length=17):
    "Do both tokenizers give the same, refusals included?"
    for text in texts:
        try: known = tokenize([text], length)
        except BarleriaError:
            line(lambda: pieces([text], length), "empty")
            continue
        ids, words = pieces([text], length)
        assert (ids == known.ids.numpy()).all() and (words == known.words.numpy()).all(), repr(text[:200])


def test_every_sentence_of_the_scenes(pieces):
    said = {s["sent"] for split, n in (("train", 300), ("val", 60), ("testA", 60), ("testB", 60)) for k in range(n) for ref in records(split, k)[3] for s in ref["sentences"]}
    assert len(said) > 500
    same(pieces, sorted(said))


def test_odd_strings(pieces):
    rng = np.random.default_rng(1)
    alphabet = [*"abzAZ019 '&;<>#_-.,!?\t\n\r", "'s", "'LL", "&amp;", "&#65;", "&amp;lt;", "<b>", "ß", "é", "e\u0301", "中", "文", "ﬁ", "Ⅷ", "²", "٣", "😀", "\u200d", "\u00a0", "\u2003",
        "\u2019", "â€™", "Ã©", "<end_of_text>", "<start_of_text>", "ſ", "İ", "K", "\x7f", "\x1c", "\x85", "\ufeff", "\u0000", "ǆ", "ª", "½", "\u0e01", "\uff21", "\U0001d400"]
    same(pieces, ["".join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(1000)])
    same(pieces, ["", " ", "\u200b", "a" * 5000, "a " * 5000, "&amp;" * 3000, "é" * 100_000, "x", "don't", "<end_of_text> a", "\x1b[31mred"])
    same(pieces, ["the large red circle", "a" * 200, "one two three four five"], 3)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text(pieces, text): same(pieces, [text], 22)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_any_ascii(pieces, text): same(pieces, [text])


def test_ascii_needs_the_standard_library_alone(tmp_path):
    (tmp_path / "segment.py").write_text(export.script(), encoding="utf-8")
    run = "BLOCKED = {'ftfy', 'regex', 'torch', 'onnxruntime'}" + GUARD + "sys.path.insert(0, '.')\nfrom segment import *\nprint(spoken(clean('The LARGE red circle\\'s 2nd edge!')))"
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.strip() == str(["the", "large", "red", "circle", "'s", "2", "nd", "edge", "!"])


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("height,width,size", [(1, 1, 64), (64, 64, 64), (75, 130, 64), (480, 31, 64), (3, 700, 64), (427, 640, 416), (33, 32, 64)])
def test_letterbox(height, width, size):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    box, border = Letterbox(height, width, size), export.about(build_model(config("frozen-tiny")))["border"]
    assert (export.square(image, size, border) == box.image(image)).all()
    grid = torch.rand(2, size // 4, size // 4, generator=torch.Generator().manual_seed(width))
    assert np.abs(export.back(grid.numpy(), height, width, size) - box.inverse(grid).numpy()).max() < 1e-4


# ---------------------------------------------------------------- the script

def test_script_without_torch(frozen, tmp_path):
    model, made = frozen
    scenes = [(scene.image[:, 5 * n:], [s["sent"] for ref in refs for s in ref["sentences"]][:9]) for n, (scene, *_, refs) in enumerate(records("val", n) for n in range(3))]
    for n, (image, _) in enumerate(scenes): Image.fromarray(image).save(tmp_path / f"{n}.png")
    run = "BLOCKED = {'torch', 'barleria_nb', 'open_clip', 'timm', 'ftfy', 'regex'}" + GUARD + """
sys.path.insert(0, sys.argv[1])
import json
import numpy as np
from segment import Segmenter
segment = Segmenter(sys.argv[1])
np.savez("answers.npz", *[segment(f"{n}.png", s) for n, s in enumerate(json.loads(sys.argv[2]))])
assert "torch" not in sys.modules
try: import torch
except ImportError: print("proved")
"""
    done = subprocess.run([sys.executable, "-c", run, str(made.folder), json.dumps([s for _, s in scenes])], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "proved", done.stderr
    answers, whole = np.load(tmp_path / "answers.npz"), export.served(model)
    for n, (image, sentences) in enumerate(scenes):
        box, tokens = Letterbox(*image.shape[:2], 64), tokenize(sentences)
        seen = torch.from_numpy(box.image(image))[None].expand(len(sentences), -1, -1, -1)
        with torch.no_grad(): known = box.inverse(whole(seen, tokens.ids, tokens.words)).numpy()
        found = answers[f"arr_{n}"]
        assert found.shape == (len(sentences), *image.shape[:2]) and found.dtype == np.float32
        assert np.abs(found - known).max() < export.TOLERANCE and ((found > THRESHOLD) == (known > THRESHOLD)).mean() > .999


def test_script_as_a_command(frozen, tmp_path):
    _, made = frozen
    Image.fromarray(records("val", 0)[0].image).save(tmp_path / "photo.png")
    done = subprocess.run([sys.executable, made.folder / "segment.py", "photo.png", "the red circle", "mask.png"], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    mask = np.array(Image.open(tmp_path / "mask.png"))
    expected = export.Segmenter(made.folder)(tmp_path / "photo.png", "the red circle")[0] > THRESHOLD
    assert (mask == expected).all()


def test_script_imports_little():
    tree = ast.parse(export.script())
    found = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert found <= set(sys.stdlib_module_names) | {"numpy", "PIL", "onnxruntime", "ftfy", "regex"}


def test_pictures_of_other_kinds(frozen, tmp_path):
    _, made = frozen
    segment, rng = export.Segmenter(made.folder), np.random.default_rng(0)
    for mode, shape in (("L", (40, 60)), ("RGBA", (40, 60, 4))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(path := tmp_path / f"{mode}.png")
        assert (segment(path, "a circle") == segment(read_image(path), "a circle")).all()
    line(lambda: segment(read_image(path), ["a circle", " "]), "empty")
    for bad in (None, 7, [], [7], [None]): line(lambda: segment(path, bad), "no sentences")
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.uint8(3) * np.ones((), np.uint8), np.broadcast_to(np.uint8(0), (10_000, 10_000, 3))):
        line(lambda: segment(np.asarray(bad), "a circle"), "no picture")
    line(lambda: segment(tmp_path / "none.png", "a circle"), "missing")


def spoilt(folder, name, change):
    "Change a file of the folder, or remove it."
    if change is None: (folder / name).unlink()
    else: (folder / name).write_bytes(change((folder / name).read_bytes()))


def strange(_):
    "A graph that somebody else made."
    from onnx import TensorProto, helper
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


SPOILT = {"no graph": ("model.onnx", None, "cannot open"), "half a graph": ("model.onnx", lambda b: b[:len(b) // 2], "cannot open"), "noise": ("model.onnx", lambda b: b"graph", "cannot open"),
    "nothing": ("model.onnx", lambda b: b"", ""), "a strange graph": ("model.onnx", strange, "not made by barleria_export"), "no words": ("words.txt", None, "words.txt"),
    "a line less": ("words.txt", lambda b: b.replace(b"\na n\n", b"\n", 1), "not the list"), "two lines changed": ("words.txt", lambda b: b.replace(b"\nt h\na n\n", b"\na n\nt h\n", 1), "not the list"),
    "a byte less": ("words.txt", lambda b: b[:-1], "not the list"), "other words": ("words.txt", lambda b: b"\xff\xfe\n\xff", "not the list"), "no picture": ("photo.png", lambda b: b"photo", "not a picture"),
    "half a picture": ("photo.png", lambda b: b[:len(b) // 2], "broken"), "missing picture": ("photo.png", None, "missing")}

@pytest.mark.parametrize("what", SPOILT)
def test_command_says_what_is_wrong(frozen, what, tmp_path):
    "One line, and 2 for the shell."
    shutil.copytree(frozen[1].folder, there := tmp_path / "there")
    Image.fromarray(records("val", 0)[0].image).save(there / "photo.png")
    name, change, said = SPOILT[what]
    spoilt(there, name, change)
    command(there, [there / "photo.png", "the red circle", "mask.png"], said)


NOTES = {"a list": lambda a: [a], "a word": lambda a: "barleria", "nothing": lambda a: None, "another kind": lambda a: a | dict(format="other"), **{f"no {k}": (lambda a, k=k: {n: v for n, v in a.items() if n != k}) for k in ("format", "size", "words", "threshold", "border", "pieces")},
    **{f"{k} of another type": (lambda a, k=k: a | {k: {}}) for k in ("size", "words", "threshold", "border", "pieces")}, "no JSON": lambda a: "{", "too deep": lambda a: "[" * 99_999}

@pytest.mark.parametrize("what", NOTES)
def test_notes_of_another_kind(frozen, what, tmp_path):
    "A graph whose notes lack something, or are none, is not ours; in the library and in the script."
    import onnx
    shutil.copytree(frozen[1].folder, there := tmp_path / "there")
    graph = onnx.load(there / "model.onnx")
    note = next(p for p in graph.metadata_props if p.key == "barleria")
    changed = NOTES[what](json.loads(note.value))
    note.value = changed if what in ("no JSON", "too deep") else json.dumps(changed)
    onnx.save(graph, there / "model.onnx")
    line(lambda: export.Segmenter(there), "model.onnx was not made by barleria_export", "give the folder")
    if what == "a list": command(there, [there / "photo.png", "the red circle", "mask.png"], "not made by barleria_export")


def test_no_list_of_pieces(frozen, tmp_path):
    shutil.copytree(frozen[1].folder, there := tmp_path / "there")
    (there / "words.txt").unlink()
    line(lambda: export.Segmenter(there), "words.txt cannot be read", "give the folder")
    (there / "words.txt").mkdir()
    line(lambda: export.Pieces(there / "words.txt"), "words.txt cannot be read")


def command(folder, arguments, said):
    "Run segment.py from elsewhere; it has to refuse in one line."
    done = subprocess.run([sys.executable, folder / "segment.py", *arguments], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("segment.py: "), done.stderr
    assert said in done.stderr and not (folder.parent / "mask.png").exists()


def test_command_takes_three_things(frozen, tmp_path):
    shutil.copytree(frozen[1].folder, there := tmp_path / "there")
    Image.fromarray(records("val", 0)[0].image).save(photo := there / "photo.png")
    for arguments, said in (([], "give three things"), ([photo, "the red circle"], "give three things"), ([photo, " ", "mask.png"], "empty"), ([photo, "the red circle", "mask.what"], "mask.what")):
        command(there, arguments, said if said != "mask.what" else "")


def test_the_folder_is_that_of_the_script(frozen, tmp_path):
    "Not the one that the program stands in."
    (tmp_path / "model.onnx").write_bytes(b"graph")
    done = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); from segment import Segmenter; print(Segmenter().about['config'])", str(frozen[1].folder)],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "frozen-tiny", done.stderr


# ---------------------------------------------------------------- what is refused

def test_import_needs_none_of_them():
    hide = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest): return None if name.split(".")[0] in ("onnx", "onnxscript", "onnxruntime") else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
from barleria_nb import export
try: export._needs("onnx", "onnxscript")
except export.BarleriaError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "onnx and onnxscript" in done.stdout and "pip install" in done.stdout


def test_missing_packages_in_one_line(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line(lambda: export.export_onnx(quick, tmp_path / "out"), "onnx and onnxscript", "pip install")
    monkeypatch.setattr(export, "find_spec", lambda name: name != "onnxruntime" or None)
    line(lambda: export.export_onnx(quick, tmp_path / "out"), "exporting needs onnxruntime,", "pip install")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [None, nn.Linear(2, 2), "barleria-tiny"])
def test_no_model(bad, tmp_path):
    line(lambda: export.export_onnx(bad, tmp_path / "out"), "cannot be exported")
    line(lambda: export.exported(bad), "cannot be exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks(quick, register, tmp_path):
    handle = getattr(quick.head.neck, register)(lambda *_: None)
    line(lambda: export.export_onnx(quick, tmp_path / "out"), "head.neck", "hooks")
    handle.remove()
    assert not list(tmp_path.iterdir())
    export.export_onnx(quick, tmp_path / "out")


def test_a_question_about_numbers(tmp_path):
    class Asks(nn.Module):
        def forward(self, x): return -x if x.sum() > 0 else x
    model = build_model(config("frozen-tiny")).eval()
    model.encoder.visual.norm_pre = Asks()
    line(lambda: export.export_onnx(model, tmp_path / "out"), "frozen-tiny", "cannot be exported")
    assert not list(tmp_path.iterdir())


def test_places(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").write_text("mine")
    (tmp_path / "empty").mkdir()
    line(lambda: export.export_onnx(quick, tmp_path / "file"), "is a file")
    line(lambda: export.export_onnx(quick, tmp_path / "file/below"), "was not written")
    line(lambda: export.export_onnx(quick, tmp_path / "full"), "is not empty")
    assert (tmp_path / "file").read_text() == (tmp_path / "full/thing").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "empty")
    line(lambda: export.export_onnx(quick, "."), "the folder you are in")
    monkeypatch.chdir(tmp_path)
    for out in ("empty", "new/deep/er"):
        assert {f.name for f in export.export_onnx(quick, str(tmp_path / out)).folder.iterdir()} == {"model.onnx", "words.txt", "segment.py"}
    assert {f.name for f in tmp_path.iterdir()} == {"file", "full", "empty", "new"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(quick, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    line(lambda: export.export_onnx(quick, tmp_path / "closed/out"), "may not write")


def test_full_disk(quick, monkeypatch, tmp_path):
    def full(path): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(export, "write_pieces", full)
    line(lambda: export.export_onnx(quick, tmp_path / "out"), "out was not written", "disk is full")
    assert not list(tmp_path.iterdir())


def test_interrupted(quick, monkeypatch, tmp_path):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(export, "compare", stop)
    with pytest.raises(KeyboardInterrupt): export.export_onnx(quick, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_something_else(frozen, monkeypatch, tmp_path):
    model, made = frozen
    other, path = shaken("frozen-tiny"), made.folder / "model.onnx"
    with torch.no_grad(): other.head.projector.text.bias += 1
    line(lambda: export.compare(path, export.served(other)), "differ from PyTorch's by")
    with torch.no_grad(): other.head.projector.text.bias[:] = float("nan")
    line(lambda: export.compare(path, export.served(other)), "nan")
    stored = path.read_bytes()
    monkeypatch.setattr(export, "_write_graph", lambda whole, path, digest: path.write_bytes(stored))
    line(lambda: export.export_onnx(other, tmp_path / "out"), "not kept")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.onnx").write_bytes(strange(None))
    line(lambda: export.compare(tmp_path / "model.onnx", export.served(model)), "cannot run")
    line(lambda: export.compare(tmp_path / "none.onnx", export.served(model)), "cannot open")
