"""Data under stress: hostile and broken files, the real sample, token parity, letterbox properties, safe writing."""
import errno, json, os, struct, time, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as coco

from barleria_nb import core
from barleria_nb.core import atomic, read_json, stable_hash, write_json
from barleria_nb.data import (Letterbox, RefDataset, RefSet, collate, decode_mask, normalise, read_image, tokenize)
from common import line

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLE, GOLDEN = SHARED / "data" / "refcoco-sample", SHARED / "golden" / "barleria"
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8] # covers 36 pixels


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning") # pycocotools under NumPy 2


def needs(path): return pytest.mark.skipif(not path.exists(), reason=f"{path} is not on this machine")


# --- a small folder that each test spoils in its own way ---

def records(n=3):
    images = [dict(id=i, file_name=f"{i}.png", height=10, width=12) for i in range(n)]
    annotations = [dict(id=100 + i, image_id=i, category_id=1, iscrowd=0, segmentation=[SQUARE]) for i in range(n)]
    refs = [dict(ref_id=i, ann_id=100 + i, image_id=i, split="val", sentences=[dict(sent_id=2 * i + k, sent=f"thing {k}") for k in range(2)]) for i in range(n)]
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name="thing")]), refs


def folder(root, instances, refs):
    (root / "images").mkdir(exist_ok=True)
    for n in range(3): Image.new("RGB", (12, 10), (50 * n, 0, 0)).save(root / "images" / f"{n}.png")
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "refs.json").write_text(json.dumps(refs))
    return root


@pytest.fixture
def spoil(tmp_path):
    "Read the small folder after `change(instances, refs)` spoilt it."
    def read(change=lambda i, r: None):
        instances, refs = records()
        change(instances, refs)
        return RefSet.read(folder(tmp_path, instances, refs))
    return read


def test_clean_folder(spoil):
    data = spoil()
    assert data.problems == [] and data.check() == [] and len(data) == 3 and data.splits == {"val": (3, 6, 3)}
    ref = data.refs[1]
    assert ref.category == "thing" and data.mask(ref).sum() == 36 and data.image(ref).shape == (10, 12, 3)
    assert [r.ref_id for r in data.split("val")] == [0, 1, 2]
    line(lambda: data.split("vall"), "vall", "Did you mean val")
    line(lambda: RefSet.read(data.root, "test"), "test", "val")


CHANGES = {
    "annotation missing": (lambda i, r: i["annotations"].pop(1), ["refs.json", "ref 1", "101", "annotations"]),
    "image record missing": (lambda i, r: i["images"].pop(1), ["refs.json", "ref 1", "images"]),
    "image file missing": (lambda i, r: i["images"][1].update(file_name="gone.png"), ["ref 1", "gone.png", "missing"]),
    "path climbs out": (lambda i, r: i["images"][1].update(file_name="../x.jpg"), ["ref 1", "../x.jpg", "leads out"]),
    "path absolute": (lambda i, r: i["images"][1].update(file_name="/etc/passwd"), ["ref 1", "/etc/passwd", "leads out"]),
    "path with a null byte": (lambda i, r: i["images"][1].update(file_name="a\0b"), ["ref 1", "leads out"]),
    "path too long": (lambda i, r: i["images"][1].update(file_name="a" * 5000), ["ref 1"]),
    "path is a folder": (lambda i, r: i["images"][1].update(file_name="."), ["ref 1", "missing"]),
    "path no text": (lambda i, r: i["images"][1].update(file_name=None), ["ref 1", "leads out"]),
    "no segmentation": (lambda i, r: i["annotations"][1].pop("segmentation"), ["ref 1", "101", "segmentation"]),
    "empty segmentation": (lambda i, r: i["annotations"][1].update(segmentation=[]), ["ref 1", "101"]),
    "empty mask": (lambda i, r: i["annotations"][1].update(segmentation=[[2, 2, 2, 2, 2, 2]]), ["ref 1", "101", "no pixel"]),
    "empty run lengths": (lambda i, r: i["annotations"][1].update(segmentation=dict(size=[10, 12], counts=[120])), ["ref 1", "101", "no pixel"]),
    "NaN polygon": (lambda i, r: i["annotations"][1].update(segmentation=[[float("nan")] + SQUARE[1:]]), ["ref 1", "101", "finite"]),
    "inf polygon": (lambda i, r: i["annotations"][1].update(segmentation=[[float("inf")] + SQUARE[1:]]), ["ref 1", "101", "finite"]),
    "annotation of another image": (lambda i, r: i["annotations"][1].update(image_id=2), ["ref 1", "101", "another image"]),
    "id no number": (lambda i, r: r[1].update(ann_id="abc"), ["ref 1", "ann_id", "abc"]),
    "id infinite": (lambda i, r: r[1].update(ann_id=float("inf")), ["ref 1", "ann_id"]),
    "ref without id": (lambda i, r: r[1].pop("ref_id"), ["refs.json", "record 1", "ref_id"]),
    "ref no record": (lambda i, r: r.__setitem__(1, 7), ["refs.json", "record 1"]),
    "size impossible": (lambda i, r: i["images"][1].update(height=10**9), ["ref 1", "101", "1000000000"]),
    "size endless": (lambda i, r: i["images"][1].update(height=10**400), ["ref 1", "height", "64 bits"]),
    "file name of two lines": (lambda i, r: i["images"][1].update(file_name="a\nb.png"), ["ref 1", "missing"]),
    "run lengths' size of two lines": (lambda i, r: i["annotations"][1].update(segmentation=dict(size="a\nb", counts=[120])), ["ref 1", "size"]),
    "nothing said": (lambda i, r: r[1].update(sentences=[dict(sent_id=2, sent="&nbsp;")]), ["ref 1", "no usable sentence"]),
    "size negative": (lambda i, r: i["images"][1].update(height=-1), ["ref 1", "101"]),
    "no sentences": (lambda i, r: r[1].update(sentences=[]), ["ref 1", "no usable sentence"]),
    "sentences no list": (lambda i, r: r[1].update(sentences="a cat"), ["ref 1", "no usable sentence"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_bad_record(spoil, name):
    "A bad record is told in one line with its remedy; the two others are read."
    change, words = CHANGES[name]
    data = spoil(change)
    assert [r.ref_id for r in data] == [0, 2]
    text = data.problems[-1]
    assert "\n" not in text and "; " in text and all(w in text for w in words), text
    assert all("\n" not in p and len(p) < 1000 for p in data.problems)
    if name not in ("no sentences", "ref without id", "nothing said"): assert len(data.problems) == 1


def test_link_out(tmp_path):
    (tmp_path / "secret.png").touch()
    instances, refs = records()
    root = tmp_path / "set"; root.mkdir()
    folder(root, instances, refs)
    (root / "images" / "1.png").unlink()
    (root / "images" / "1.png").symlink_to(tmp_path / "secret.png")
    data = RefSet.read(root)
    assert [r.ref_id for r in data] == [0, 2] and "leads out" in data.problems[0]


def test_linked_images_folder(tmp_path):
    "The folder `images` itself may live elsewhere."
    root = folder(tmp_path, *records())
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    assert len(RefSet.read(root)) == 3


def test_odd_but_readable(spoil):
    "Numbers as strings, a missing category and a category that is no number do no harm."
    def change(i, r):
        r[0].update(ref_id="0", ann_id="100")
        i["annotations"][1].update(id="101", category_id=[])
        i["annotations"][2].pop("category_id")
    data = spoil(change)
    assert data.problems == [] and [(r.ref_id, r.ann_id, r.category) for r in data] == [(0, 100, "thing"), (1, 101, ""), (2, 102, "")]


def test_duplicate_ids(spoil):
    "The first of two records counts, the second is told."
    def change(i, r):
        i["images"].append(dict(i["images"][0], file_name="1.png"))
        i["annotations"].append(dict(i["annotations"][0], segmentation=[]))
        r.append(dict(r[0], split="train"))
        r[2]["sentences"][0]["sent_id"] = 0
    data = spoil(change)
    assert len(data) == 3 and len(data.refs[2].sentences) == 1 and data.refs[0].file_name == "0.png"
    told = "\n".join(data.problems)
    assert len(data.problems) == 4 and all(w in told for w in ("images, record 3", "annotations, record 3", "refs.json, record 3", "ref 2: sentence 0"))


@pytest.mark.parametrize("text", ["", "   ", None, 7])
def test_empty_sentence_in_a_file(spoil, text):
    data = spoil(lambda i, r: r[1]["sentences"][0].update(sent=text))
    assert len(data) == 3 and len(data.refs[1].sentences) == 1 and "ref 1: sentence 2 is empty" in data.problems[0]


def test_nothing_usable(tmp_path):
    instances, refs = records()
    instances["annotations"] = []
    line(lambda: RefSet.read(folder(tmp_path, instances, refs)), tmp_path, "no usable ref", "ref 0")
    line(lambda: RefSet.read(tmp_path / "nowhere"), "nowhere", "images")


@pytest.mark.parametrize("name,text,words", [
    ("refs.json", '[{"ref_id": 1},\n{"ref_id"', ["refs.json", "line 2", "not JSON"]),
    ("instances.json", "", ["instances.json", "line 1"]),
    ("instances.json", "[]", ["instances.json", "COCO"]),
    ("instances.json", '{"images": {}}', ["instances.json", "images"]),
    ("refs.json", "{}", ["refs.json", "list"]),
    ("refs.json", "[" * 100_000, ["refs.json"]),
    ("refs.json", "[" + "1" * 5000 + "]", ["refs.json", "cannot be read"]),
    ("refs.json", b"\xff\xfe\x00", ["refs.json", "UTF-8"]),
])
def test_malformed_json(tmp_path, name, text, words):
    root = folder(tmp_path, *records())
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    line(lambda: RefSet.read(root), *words)
    (root / name).unlink()
    line(lambda: RefSet.read(root), name, "check the path")


def test_json_limit(tmp_path):
    write_json(tmp_path / "a.json", list(range(100)))
    line(lambda: read_json(tmp_path / "a.json", limit=50), "a.json", "50 bytes")


def test_broken_image_is_named(spoil):
    data = spoil()
    path = data.root / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    assert len(data.check()) == 1 and "1.png" in data.check()[0]
    items = RefDataset(data, 16)
    assert items[0]["image"].shape == (3, 16, 16)
    line(lambda: items[2], "1.png")


# --- pictures ---

def png_header(width, height):
    "A tiny file that claims to be huge."
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (10_000, 10_000), (1, 60_000_000)])
def test_bomb(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    start = time.perf_counter()
    line(lambda: read_image(tmp_path / "bomb.png"), "bomb.png", "pixels")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_kinds_of_image(tmp_path, mode):
    grey = np.zeros((5, 7), np.uint8); grey[:, 4:] = 255
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.fromarray(grey).convert("RGB").convert(mode).save(path)
    out = read_image(path, (5, 7))
    assert out.dtype == np.uint8 and out.shape == (5, 7, 3) and out.flags.writeable
    assert np.abs(out[:, [0, 6]].astype(int) - grey[:, [0, 6], None]).max() < 40


def test_alpha_lies_on_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8); pixels[0] = (255, 0, 0, 255); pixels[1] = (255, 0, 0, 0)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    Image.fromarray(np.uint8([[0, 1]]), "L").convert("P").save(tmp_path / "p.png", transparency=1)
    assert (read_image(tmp_path / "rgba.png")[:, 0] == [[255, 0, 0], [255, 255, 255]]).all()
    assert (read_image(tmp_path / "la.png")[1] == 255).all()
    assert read_image(tmp_path / "p.png")[0, :, 0].tolist() == [0, 255]


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif(tmp_path):
    "A picture lying on its side is turned, unless the annotation is for the unturned one."
    pixels = np.zeros((8, 16, 3), np.uint8); pixels[:, :4] = 255
    exif = Image.Exif(); exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (16, 8, 3)
    assert read_image(tmp_path / "turned.png", (16, 8))[:3].min() == 255
    assert (read_image(tmp_path / "turned.png", (8, 16)) == pixels).all()
    line(lambda: read_image(tmp_path / "turned.png", (8, 8)), "turned.png", "8×8")


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_thin_images(tmp_path, size):
    Image.new("RGB", size[::-1], "blue").save(tmp_path / "thin.png")
    image, box = read_image(tmp_path / "thin.png", size), Letterbox(*size, 64)
    assert image.shape == (*size, 3) and box.image(image).shape == (64, 64, 3)
    assert box.mask(np.ones(size)).max() == 1 and box.inverse(torch.ones(16, 16), 4).shape == size


def test_not_an_image(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(good)
    for name, content in dict(text=b"hello", empty=b"", svg=b"<svg/>", eps=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").items():
        (tmp_path / name).write_bytes(content)
        line(lambda: read_image(tmp_path / name), name, "not a picture")
    for part in (200, 700, 1500):
        (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:part])
        line(lambda: read_image(tmp_path / "cut.jpg"), "cut.jpg")
    line(lambda: read_image(tmp_path / "none.jpg"), "none.jpg", "missing")
    line(lambda: read_image(tmp_path), tmp_path.name)


# --- masks ---

def test_overlap_is_a_union():
    mask = decode_mask([SQUARE, [4, 4, 12, 4, 12, 10, 4, 10]], 10, 12)
    assert mask.dtype == np.uint8 and mask.max() == 1 and mask.sum() == 36 + 48 - 16


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_run_lengths(height, width, seed):
    "Compressed (text and bytes) and plain run lengths, crowd or not, give back the mask; so does our own counting."
    mask = (np.random.default_rng(seed).random((height, width)) < .4).astype(np.uint8)
    packed = coco.encode(np.asfortranarray(mask))
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    if counts and sum(counts) != flat.size: counts.append(flat.size - sum(counts))
    for seg in (dict(packed), dict(packed, counts=packed["counts"].decode()), dict(size=[height, width], counts=counts)):
        assert (decode_mask(seg, height, width) == mask).all()


@pytest.mark.parametrize("name,segmentation,word", [
    ("short total", dict(size=[10, 12], counts=[60, 59]), "119"),
    ("long total", dict(size=[10, 12], counts=[60, 61]), "121"),
    ("negative", dict(size=[10, 12], counts=[130, -10]), "run lengths"),
    ("fractions", dict(size=[10, 12], counts=[60.0, 60.0]), "run lengths"),
    ("truth values", dict(size=[10, 12], counts=[True, 119]), "run lengths"),
    ("huge counts", dict(size=[10, 12], counts=[2**62, 2**62]), "add up"),
    ("wrong size", dict(size=[12, 10], counts=[120]), "size"),
    ("huge size", dict(size=[10**9, 10**9], counts=[10**18]), "size"),
    ("no size", dict(counts=[120]), "neither"),
    ("size no list", dict(size=7, counts=[120]), "size"),
    ("damaged string", dict(size=[10, 12], counts="\x01\x02"), "damaged"),
    ("endless digit", dict(size=[10, 12], counts="o" * 1000), "damaged"),
    ("string of another mask", dict(size=[10, 12], counts="0000"), "add up"),
    ("unfinished string", dict(size=[10, 12], counts="o"), "add up"),
    ("text", "not a mask", "neither"),
    ("nothing", None, "neither"),
    ("two points", [[1, 1, 5, 5]], "points"),
    ("odd list", [[1, 1, 5, 5, 3]], "polygon 0"),
    ("words", [["a", "b", "c", "d", "e", "f"]], "polygon 0"),
    ("numbers not lists", [1, 2, 3, 4, 5, 6], "polygon 0"),
    ("far away", [[0, 0, 1e12, 0, 5, 5]], "far outside"),
    ("beyond float", [[0, 0, 10**400, 0, 5, 5]], "polygon 0"),
    ("too many parts", [SQUARE] * 3000, "3,000 polygons"),
    ("second part NaN", [SQUARE, [float("nan")] * 6], "polygon 1"),
])
def test_hostile_segmentations(name, segmentation, word): line(lambda: decode_mask(segmentation, 10, 12), word)


def test_endless_outline():
    start = time.perf_counter()
    line(lambda: decode_mask([[0, 0, 3000, 0] * 200_000], 10, 3000), "longer")
    line(lambda: decode_mask([SQUARE], 10**6, 10**6), "1000000")
    assert time.perf_counter() - start < 2


def test_outline_of_many_parts():
    "Parts are limited together: two hundred such polygons would take minutes and a gigabyte."
    start = time.perf_counter()
    line(lambda: decode_mask([[0, 0, 300_000, 0, 0, 50]] * 200, 100, 300_000), "longer")
    assert time.perf_counter() - start < 2


def test_letters_of_other_scripts_are_no_run_lengths():
    "Once such a letter was read as a question mark, which is a run of fifteen pixels."
    for text in ("\u0100", "\ud800"): line(lambda: decode_mask(dict(size=[3, 5], counts=text), 3, 5), "damaged")


def test_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    line(lambda: read_image(tmp_path / "pipe"), "pipe", "no file")


# --- words ---

def test_token_edges():
    for text in ("", "  \t\n"): line(lambda: tokenize(["ok", text]), repr(text), "empty")
    line(lambda: tokenize([None]), "text")
    line(lambda: tokenize(["a"], 2), "2")
    long = tokenize(["a " * 40, "a cat"], 17)
    assert long.truncated == 1 and long.ids[0, -1] == 49407 and long.words[0].all() and long.words.sum(1).tolist() == [17, 4]


def test_words_come_from_lengths():
    "Padding is counted, not guessed from the id 0, which is the piece '!' in the middle of a word."
    tokens = tokenize(["!a", "the left one !"], 9)
    ends = tokens.words.sum(1) - 1
    assert (tokens.ids[torch.arange(2), ends] == 49407).all()


def test_what_is_no_letter_pushes_no_word_out():
    "Characters that the tokenizer drops count for nothing, and a cut is counted."
    assert (tokenize(["red" + "\x07" * 900 + " ball"]).ids == tokenize(["red ball"]).ids).all()
    assert len(line(lambda: tokenize(["\x00" * 5000]), "empty")) < 300


def test_monster_sentence_is_quick():
    start = time.perf_counter()
    assert tokenize(["x" * 1_000_000, "word " * 200_000, "Ã©" * 500_000]).truncated == 3
    assert time.perf_counter() - start < 10


@needs(GOLDEN)
@pytest.mark.parametrize("length", [17, 22])
def test_token_parity(length):
    sentences = json.loads((GOLDEN / "tokenizer_sentences.json").read_text())
    golden = np.load(GOLDEN / "tokenizer_ids.npz")[f"tok{length}"]
    kept = [n for n, s in enumerate(sentences) if s.strip()] # ours refuses the empty one
    tokens = tokenize([sentences[n] for n in kept], length)
    assert (tokens.ids.numpy() == golden[kept]).all()
    assert (tokens.words.sum(1).numpy() == [np.flatnonzero(g == 49407)[0] + 1 for g in golden[kept]]).all()


# --- letterbox ---

sides = st.integers(1, 90)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(8, 64))
def test_letterbox_fits(height, width, size):
    box = Letterbox(height, width, size)
    assert max(box.nh, box.nw) == size and 0 <= box.top <= size - box.nh and 0 <= box.left <= size - box.nw
    soft = box.mask(np.ones((height, width)))
    inside = np.zeros((size, size)); inside[box.top:box.top + box.nh, box.left:box.left + box.nw] = 1
    assert soft.dtype == np.float32 and np.allclose(soft, inside, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(4, 24), st.sampled_from([1, 2, 4]), st.floats(-2, 2), st.floats(-2, 2))
def test_ramp_comes_back(height, width, cells, stride, a, b):
    "A linear ramp sampled on the output grid is exact wherever a pixel lies between samples."
    box = Letterbox(height, width, cells * stride)
    j = torch.arange(cells, dtype=torch.float64) * stride
    y = (j + .5 - box.top) * height / box.nh - .5
    x = (j + .5 - box.left) * width / box.nw - .5
    back = box.inverse(a * y[:, None] + b * x[None], stride)
    ys, xs = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    ok = ((ys >= y[0]) & (ys <= y[-1]))[:, None] & ((xs >= x[0]) & (xs <= x[-1]))[None]
    assert back.shape == (height, width)
    assert torch.allclose(back[ok], (a * ys[:, None] + b * xs[None])[ok], atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(4, 40), st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_mask_comes_back(times, height, width, seed):
    "At stride 1 and a whole enlargement, box and inverse return the very mask."
    mask = (np.random.default_rng(seed).random((height // 3 + 1, width // 3 + 1)) < .5).repeat(3, 0).repeat(3, 1)[:height, :width].astype(np.uint8)
    box = Letterbox(height, width, times * max(height, width))
    back = box.inverse(torch.from_numpy(box.mask(mask)), 1)
    assert ((back.numpy() > .5) == mask).all()


def test_half_precision_comes_back_in_place():
    "A coordinate of some hundreds does not fit into the eight bits of a bfloat16."
    grid = torch.arange(104.).expand(104, 104).contiguous() # whole numbers to 103: exact in every type
    whole = Letterbox(480, 640, 416).inverse(grid, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.int64): assert (Letterbox(480, 640, 416).inverse(grid.to(dtype), 4) == whole).all()
    assert Letterbox(4, 4, 4).inverse(torch.ones(4, 4, dtype=torch.bool), 1).dtype == torch.float32


def test_letterbox_refuses():
    for image in (np.full((4, 4, 3), .5), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)): line(lambda: Letterbox(4, 4, 4).image(image), "uint8 (H, W, 3)")
    line(lambda: Letterbox(4, 4, 4).inverse(torch.ones(1, 1, 4, 4)), "(B, h', w')")
    line(lambda: Letterbox(0, 5, 32), "0×5")
    line(lambda: Letterbox(5, 5, 32).image(np.zeros((6, 5, 3), np.uint8)), "5×5")


# --- batches ---

def test_no_sentence_gets_the_words_of_another(spoil):
    "Two sets put together by hand may repeat an id; the words still follow the text."
    data = spoil()
    a, b = data.refs[:2]
    mixed = RefSet(data.root, [a, replace(b, sentences=(replace(a.sentences[0], text="a very much longer sentence"),))])
    items = RefDataset(mixed, 16)
    assert [items[i]["words"].sum().item() for i in range(3)] == [4, 4, 7]


def test_batches(spoil):
    data = spoil()
    train, score = RefDataset(data, 32, 9, train=True), RefDataset(data, 32, 9)
    assert (len(train), len(score)) == (3, 6)
    batch = collate([score[i] for i in range(4)])
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in batch.items()}
    assert shapes["image"] == ((4, 3, 32, 32), torch.uint8) and shapes["mask"] == ((4, 1, 32, 32), torch.float32)
    assert shapes["ids"] == ((4, 9), torch.int64) and shapes["words"] == ((4, 9), torch.bool)
    bare = collate([RefDataset(data, 32, 9, masks=False)[i] for i in range(4)])
    assert bare.keys() == batch.keys() - {"mask"} and torch.equal(bare["image"], batch["image"])
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["height"].tolist() == [10] * 4
    drawn = []
    for epoch in range(12):
        train.set_epoch(epoch)
        drawn.append(tuple(train.pair(i)[1].sent_id % 2 for i in range(3)))
        assert drawn[-1] == tuple(stable_hash(0, epoch, r) % 2 for r in range(3))
    assert len(set(drawn)) > 3


def test_cache_keeps_to_its_bytes(spoil):
    data = spoil()
    items = RefDataset(data, 32, cache=2 * 3 * 32 * 32)
    first = [items[i]["image"] for i in range(6)]
    assert len(items.images) == 2 and all(torch.equal(first[i], items[i]["image"]) for i in range(6))


def test_normalise():
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(normalise(x), normalise(x.movedim(1, 3))) and normalise(x).is_contiguous()
    line(lambda: normalise(x.float()), "uint8")
    line(lambda: normalise(x[0]), "(3, 5, 7)")


# --- the real sample ---

@needs(SAMPLE)
def test_real_sample():
    data = RefSet.read(SAMPLE)
    assert len(data) == 148 and data.problems == [] and data.check() == []
    assert {s: n[0] for s, n in data.splits.items()} == dict(testA=10, testB=2, train=73, val=63)
    areas = {a["id"]: a["area"] for a in read_json(SAMPLE / "instances.json")["annotations"]}
    for ref in data:
        mask = data.mask(ref)
        assert mask.shape == (ref.height, ref.width) and set(np.unique(mask)) == {0, 1}
        assert abs(mask.sum() - areas[ref.ann_id]) <= .06 * areas[ref.ann_id] + 30
    batch = collate([RefDataset(data.split("testB"), 416)[i] for i in range(2)])
    assert batch["mask"].amax() == 1 and batch["words"].all(1).sum() == 0


# --- writing ---

@pytest.mark.parametrize("fault,word", [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not"), (errno.EIO, "Input/output")])
@pytest.mark.parametrize("where", ["replace", "fsync", "write"])
def test_atomic_faults(tmp_path, monkeypatch, fault, word, where):
    "A full disk or a read-only folder: one line, the old file whole, nothing left behind."
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    def fail(*a, **k): raise OSError(fault, os.strerror(fault))
    if where == "write": monkeypatch.setattr(Path, "write_text", fail)
    else: monkeypatch.setattr(core.os, where, fail)
    line(lambda: write_json(path, {"new": 2}), path, word)
    monkeypatch.undo()
    assert read_json(path) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_atomic_stops_half_way(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            with atomic(path) as part:
                part.write_text("half")
                raise error
        assert os.listdir(path.parent) == []
    with atomic(path) as part: part.write_text("whole")
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["a.txt"]


def test_atomic_refuses(tmp_path):
    (tmp_path / "file").touch()
    line(lambda: write_json(tmp_path, 1), tmp_path, "folder")
    line(lambda: write_json(tmp_path / "file" / "a.json", 1), "a.json")
    line(lambda: write_json(tmp_path / "n.json", float("nan")), "n.json")
    line(lambda: write_json(tmp_path / "n.json", {"a": object()}), "n.json")
    line(lambda: write_json(tmp_path / "n.json", "\ud800"), "n.json")
    line(lambda: write_json("", 1), "folder")
    write_json(tmp_path / ("n" * 250), 1); (tmp_path / ("n" * 250)).unlink()
    def forgotten():
        with atomic(tmp_path / "b"): pass
    line(forgotten, "nothing was written")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [(128, 128), (97, 31), (3, 400)])
def test_many_are_brought_back_as_each_alone(size):
    box, prob = Letterbox(*size, 64), torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    together = box.inverse(prob)
    assert together.shape == (5, *size) and all(torch.equal(a, box.inverse(p)) for a, p in zip(together, prob))
