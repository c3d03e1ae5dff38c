"Own tables, mixes and the audit: round trips, hostile rows by number, mixes and counts by hand."
import csv
import itertools
import json
import os
import random
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from barleria_nb import owndata
from barleria_nb.core import asset, read_json, write_json
from barleria_nb.data import RefSet
from barleria_nb.owndata import audit, audit_lines, from_coco, from_table, is_train, mixed, mixed_lines
from common import line

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcoco-sample"
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8] # covers 36 pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning") # pycocotools under NumPy 2


@pytest.fixture
def home(tmp_path):
    "A folder of three images of 10 × 12 pixels and a mask for each, and one file outside it."
    base = tmp_path / "mine"
    (base / "masks").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (12, 10), (80 * n, 10, 0)).save(base / f"{n}.png")
        mask(base / "masks" / f"{n}.png", n)
    Image.new("RGB", (12, 10)).save(tmp_path / "outside.png")
    return base


def mask(path, n=0, on=255, mode="L"):
    m = np.zeros((10, 12), np.uint8)
    m[2 + n:6, 3:9] = on
    Image.fromarray(m).convert(mode).save(path)
    return m > 0


def jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def row(**kw): return dict(image="0.png", sentence="a thing") | kw
def good(**kw): return row(mask="masks/0.png") | kw


# --- round trips ---

def written(path, rows, columns):
    "The same rows in each of the three formats."
    if path.suffix == ".jsonl": return jsonl(path, *rows)
    text = [{c: v if isinstance(v := r.get(c), str) or v is None else json.dumps(v) for c in columns} for r in rows]
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet
        parquet.write_table(pa.table({c: pa.array([r[c] for r in text], pa.string()) for c in columns}), path)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as f:
            out = csv.DictWriter(f, columns)
            out.writeheader(), out.writerows(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_round_trip(home, tmp_path, kind):
    "Masks, polygons and both kinds of run lengths come back pixel for pixel; refs, splits and categories as given."
    truth = [mask(home / "masks" / f"{n}.png", n) for n in range(3)]
    runs = [int(n) for n in np.diff(np.flatnonzero(np.diff(np.r_[-1, truth[2].T.ravel(), -1]) != 0))] # the first run is off
    packed = coco.encode(np.asfortranarray(truth[1].astype(np.uint8)))["counts"].decode()
    rows = [good(sentence='said "so", twice', ref="a", category="box"), row(sentence="again,\nwith a break" if kind != "jsonl" else "again, with a break", ref="a"),
            row(image="1.png", sentence="ünïcode 狗", rle=dict(size=[10, 12], counts=packed), split="val"), row(image="2.png", rle=dict(size=[10, 12], counts=runs), split="testA"),
            row(image="2.png", polygon=SQUARE, split="testA"), row(image="2.png", polygon=[SQUARE, SQUARE], split="testA", sentence="the same again")]
    table = written(tmp_path / f"t.{kind}", rows, ["image", "sentence", "mask", "polygon", "rle", "split", "ref", "category"])
    data = RefSet.read(from_table(table, home, tmp_path / "out"))
    assert data.problems == [] and data.check() == [] and data.splits == {"train": (1, 2, 1), "val": (1, 1, 1), "testA": (2, 3, 1)}
    assert [s.text for s in data.refs[0].sentences] == ['said "so", twice', "again, with a break"] and data.refs[0].category == "box"
    for ref, m in zip(data, truth): assert (data.mask(ref) == m).all()
    assert data.mask(data.refs[3]).sum() == 36 and len(data.refs[3].sentences) == 2 # same outline, so same object
    card = read_json(tmp_path / "out" / "card.json")
    assert card["rows"] == 6 and card["skipped"] == 0 and card["files"] == {"copied": 3}
    assert audit(tmp_path / "out")["sound"]


def test_same_bytes_twice_and_links(home, tmp_path):
    "The same table gives the same files; a hard link shares the image, a copy does not."
    table = jsonl(tmp_path / "t.jsonl", good(), row(image="1.png", mask="masks/1.png"))
    a, b = from_table(table, home, tmp_path / "a"), from_table(table, home, tmp_path / "b", link=True)
    for name in ("instances.json", "refs.json"): assert (a / name).read_bytes() == (b / name).read_bytes()
    assert os.path.samefile(home / "0.png", b / "images" / "0.png") and not os.path.samefile(home / "0.png", a / "images" / "0.png")
    assert read_json(b / "card.json")["files"] == {"linked": 2}


@pytest.mark.parametrize("mode,on", [("1", 255), ("L", 1), ("L", 7), ("P", 255), ("I;16", 255), ("RGB", 255)])
def test_kinds_of_mask_files(home, tmp_path, mode, on):
    m = mask(home / "m.png", 0, on, mode)
    data = RefSet.read(from_table(jsonl(tmp_path / "t.jsonl", row(mask="m.png")), home, tmp_path / "out"))
    assert (data.mask(data.refs[0]) == m).all()


def test_turned_photograph(home, tmp_path):
    "A camera's note turns the image; masks may be for either way up, but one image has one size."
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (10, 12), "red").save(home / "turned.jpg", exif=exif) # shown as 12 wide, 10 high
    data = RefSet.read(from_table(jsonl(tmp_path / "t.jsonl", row(image="turned.jpg", mask="masks/0.png")), home, tmp_path / "a"))
    assert data.image(data.refs[0]).shape == (10, 12, 3)
    flat = jsonl(tmp_path / "u.jsonl", row(image="turned.jpg", rle=dict(size=[12, 10], counts=[0, 120])), row(image="turned.jpg", mask="masks/0.png"))
    line(lambda: from_table(flat, home, tmp_path / "b"), "1 of 2 rows", "row 2", "10×12", "12×10")


def test_inner_links_are_one_image(home, tmp_path):
    (home / "again.png").symlink_to("0.png")
    data = RefSet.read(from_table(jsonl(tmp_path / "t.jsonl", good(), good(image="again.png", split="val"), good(image="./0.png", split="val")), home, tmp_path / "out"))
    assert {r.file_name for r in data} == {"0.png"} and audit(tmp_path / "out")["leaks"][0]["images"] == 1


# --- rows that must be refused, by number ---

def png(width, height):
    "The header of a PNG of any size, with nothing behind it."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


HOSTILE = {
    "escape": (row(image="../outside.png", polygon=SQUARE), "leads out"), "escape inside": (row(image="masks/../../outside.png", polygon=SQUARE), "leads out"),
    "absolute": (row(image="/etc/passwd", polygon=SQUARE), "leads out"), "drive": (row(image="C:/0.png", polygon=SQUARE), "leads out"),
    "backslash": (row(image="..\\outside.png", polygon=SQUARE), "no plain path"), "nul": (row(image="0.png\0", polygon=SQUARE), "no plain path"),
    "link": (row(image="link.png", polygon=SQUARE), "link out"), "link folder": (row(image="folder/outside.png", polygon=SQUARE), "link out"), "loop": (row(image="loop.png", polygon=SQUARE), "missing"),
    "mask escape": (row(mask="../outside.png"), "mask '../outside.png' leads out"), "mask link": (row(mask="link.png"), "link out"), "pipe": (row(image="pipe.png", polygon=SQUARE), "missing"),
    "missing": (row(image="nought.png", polygon=SQUARE), "missing"), "folder as image": (row(image="masks", polygon=SQUARE), "missing"), "long name": (row(image="a" * 5000, polygon=SQUARE), "missing"),
    "no image": (row(image=None, polygon=SQUARE), "names no image"), "number as image": (row(image=7, polygon=SQUARE), "names no image"), "text as image": (row(image="text.png", polygon=SQUARE), "not a picture"),
    "bomb": (row(image="bomb.png", polygon=SQUARE), "over 50,000,000"), "huge bomb": (row(image="huge.png", polygon=SQUARE), "over 50,000,000"), "mask bomb": (row(mask="bomb.png"), "over 50,000,000"),
    "cut mask": (row(mask="cut.png"), "broken"), "empty mask": (row(mask="empty.png"), "covers no pixel"), "small mask": (row(mask="small.png"), "9×9"), "soft mask": (row(mask="soft.png"), "besides 0"),
    "colour mask": (row(mask="colour.png"), "in colour"), "jpeg mask": (row(mask="mask.jpg"), "PNG are read"),
    "nan": ('{"image": "0.png", "sentence": "a", "polygon": [1, 1, NaN, 5, 5, 5]}', "not a finite number"), "infinity": ('{"image": "0.png", "sentence": "a", "polygon": [1, 1, Infinity, 5, 5, 5]}', "not a finite number"),
    "huge int": (row(polygon=[1, 1, 10**400, 5, 5, 5]), "polygon 0"), "thousands of digits": ('{"image": "0.png", "sentence": "a", "polygon": [1, ' + "9" * 5000 + "]}", "not JSON"),
    "far out": (row(polygon=[1, 1, 1e6, 5, 5, 5]), "far outside"), "two points": (row(polygon=[1, 1, 5, 5]), "three are the least"), "flat": (row(polygon=[1, 1, 5, 1, 9, 1]), "covers no pixel"),
    "dict polygon": (row(polygon=dict(a=1)), "no list"), "words in polygon": (row(polygon=["a", "b"] * 3), "polygon 0"), "empty polygon": (row(polygon=[]), "no list"), "parts": (row(polygon=[SQUARE] * 3000), "3,000 polygons"),
    "json in json": (row(polygon="[[1, 2"), "'polygon' is not JSON"), "nested": (row(polygon="[" * 100_000), "nested too deeply"), "nested line": ("[" * 100_000, "nested too deeply"), "no object": ("[1]", "no JSON object"), "no json": ("{image: 1}", "not JSON"),
    "rle list": (row(rle=[1]), "no run lengths"), "rle size": (row(rle=dict(size=[99, 99], counts=[0, 9801])), "run lengths are for size"), "rle sum": (row(rle=dict(size=[10, 12], counts=[0, 121])), "add up"), "rle nan": (row(rle=dict(size=[10, 12], counts=[0.5, 119.5])), "whole numbers"),
    "rle text": (row(rle=dict(size=[10, 12], counts="~~~~")), "damaged"), "rle void": (row(rle=dict(size=[10, 12], counts=[120])), "covers no pixel"), "rle negative": (row(rle=dict(size=[10, 12], counts=[-1, 121])), "whole numbers"),
    "none": (row(), "has no mask"), "two": (good(polygon=SQUARE), "mask and polygon"), "no sentence": (good(sentence=None), "no sentence"), "blank": (good(sentence=" \t"), "no sentence"), "nothing left": (good(sentence="&nbsp;"), "is empty"),
    "list sentence": (good(sentence=["a"]), "not text"), "half a letter": ('{"image": "0.png", "mask": "masks/0.png", "sentence": "\\ud800 a"}', "no text"), "control": (good(sentence="a\x1b[2J"), "no text"),
    "long sentence": (good(sentence="word " * 1000), "over 2,000"), "long field": (good(sentence="x" * 10**6), "1,000,000 characters"), "long polygon": (row(polygon="[" + "1," * 500_000 + "1]"), "over 500,000"),
    "split": (good(split="../val"), "no name"), "long split": (good(split="s" * 50), "no name"), "list split": (good(split=[1]), "not a short name"), "ref": (good(ref=True), "not a short name"), "huge ref": (good(ref=10**30), "not a short name"), "long ref": (good(ref="r" * 101), "not a short name"),
}


@pytest.fixture
def trap(home, tmp_path):
    "The folder, with everything in it that rows should not reach."
    (home / "link.png").symlink_to(tmp_path / "outside.png"), (home / "folder").symlink_to(tmp_path), (home / "loop.png").symlink_to("loop.png")
    os.mkfifo(home / "pipe.png")
    (home / "text.png").write_text("<script>"), (home / "bomb.png").write_bytes(png(9000, 9000)), (home / "huge.png").write_bytes(png(60_000, 60_000))
    (home / "cut.png").write_bytes((home / "masks" / "0.png").read_bytes()[:50])
    Image.new("L", (12, 10)).save(home / "empty.png"), Image.new("L", (9, 9), 255).save(home / "small.png"), Image.linear_gradient("L").resize((12, 10)).save(home / "soft.png")
    Image.new("RGB", (12, 10), "red").save(home / "colour.png"), Image.new("L", (12, 10), 255).save(home / "mask.jpg")
    return home


def test_hostile_rows(trap, tmp_path):
    "Each bad row between two good ones is refused alone, by its number and reason, and nothing is written."
    table = tmp_path / "t.jsonl"
    for name, (bad, reason) in HOSTILE.items():
        text = line(lambda: from_table(jsonl(table, good(), bad, good(image="1.png", mask="masks/1.png")), trap, tmp_path / "out"), "1 of 3 rows is bad", "row 2: ")
        assert reason in text, (name, text)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*")), name


def test_all_bad_rows_at_once(trap, tmp_path):
    "One run tells the count and the first ten; skipping them keeps the good ones and lists the bad in the card."
    rows = [r for r, _ in HOSTILE.values()]
    table = jsonl(tmp_path / "t.jsonl", good(), *rows, good(split="val", image="1.png", mask="masks/1.png"))
    with pytest.raises(owndata.BarleriaError) as e: from_table(table, trap, tmp_path / "out")
    said = str(e.value)
    assert "\n" not in said and f"{len(rows)} of {len(rows) + 2} rows are bad" in said and said.count("row ") >= 10 and f"and {len(rows) - 10} more" in said and "row 12:" not in said
    data = RefSet.read(from_table(table, trap, tmp_path / "out", skip_bad=True))
    card = read_json(tmp_path / "out" / "card.json")
    assert len(data) == 2 and card["skipped"] == len(rows) and [t.split(":")[0] for t in card["skipped_rows"]] == [f"row {n}" for n in range(2, len(rows) + 2)]
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["0.png", "1.png"]
    line(lambda: from_table(jsonl(table, *rows[:3]), trap, tmp_path / "none", skip_bad=True), "no usable row of 3", "row 1: ")


def test_refs_must_agree(home, tmp_path):
    a = good(ref="a", category="box")
    for change, what in [(dict(image="1.png"), "image"), (dict(split="val"), "split"), (dict(mask="masks/1.png"), "outline"), (dict(category="ball"), "category")]:
        line(lambda: from_table(jsonl(tmp_path / "t.jsonl", a, a | change), home, tmp_path / "out"), "row 2", f"its {what} is not that", "'a'")
    line(lambda: from_table(jsonl(tmp_path / "t.jsonl", row(ref="a"), a), home, tmp_path / "out"), "row 1", "in the first row of its ref")
    numbers = jsonl(tmp_path / "n.jsonl", good(ref=7), row(ref=7.0, sentence="b"), row(ref="7", sentence="c"))
    assert RefSet.read(from_table(numbers, home, tmp_path / "out")).splits == {"train": (1, 3, 1)}


@pytest.mark.parametrize("text,words", [
    (b"", ["is empty"]), (b"image;sentence;mask\n", ["no column 'image'", "image;sentence;mask"]), (b"image,sentense,mask\n", ["no column 'sentence'", "Did you mean sentense"]),
    (b"image,sentence,mask,mask\n", ["2 columns 'mask'"]), (b"image,sentence,mask\n", ["no usable row of 0"]), (b"image,sentence,mask\n0.png,a,masks/0.png\n0.png,a\n", ["row 3", "2 cells, the head has 3"]),
    (b"image,sentence,mask\n0.png,a, b,masks/0.png\n", ["row 2", "4 cells"]), (b'image,sentence,mask\n0.png,"a"b,masks/0.png\n', ["row 2", "not CSV"]), (b"image,sentence,mask\n0.png,\xff\xfe,masks/0.png\n", ["not UTF-8"]),
    (b'image,sentence,mask\n0.png,"a,masks/0.png\n0.png,b,masks/0.png\n', ["lines 2 to 3", "close the quotes"]), (b'image,sentence,mask\n0.png,"' + b"x\n" * 3_000_000, ["line", "not CSV"]),
    (b"image,sentence,mask\n0.png," + b"x" * 5_000_000, ["line 2", "over 4,000,000 characters"]), (b"image,sentence,mask\n0.png," + b"x" * 1_000_000 + b",masks/0.png\n", ["row 2", "1,000,000 characters"])])
def test_broken_csv(home, tmp_path, text, words):
    (tmp_path / "t.csv").write_bytes(text)
    limit = csv.field_size_limit()
    line(lambda: from_table(tmp_path / "t.csv", home, tmp_path / "out"), *words)
    assert csv.field_size_limit() == limit and not (tmp_path / "out").exists()


def test_csv_row_numbers_with_breaks_and_blanks(home, tmp_path):
    "A row is what a spreadsheet shows: cells with line breaks count once, blank rows count."
    (tmp_path / "t.csv").write_text('image,sentence,mask\r\n0.png,"two\r\nlines",masks/0.png\r\n\r\nx.png,a,masks/0.png\r\n')
    line(lambda: from_table(tmp_path / "t.csv", home, tmp_path / "out"), "1 of 2 rows", "row 4: its image 'x.png'")


def test_broken_parquet(home, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    table, make = tmp_path / "t.parquet", lambda **c: parquet.write_table(pa.table(c), table)
    fails = lambda *words: line(lambda: from_table(table, home, tmp_path / "out"), *words)
    table.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    fails("not parquet")
    make(image=["0.png"], sentences=["a"])
    fails("no column 'sentence'", "Did you mean sentences")
    make(image=["0.png"] * 3, sentence=["a"] * 3, mask=["masks/0.png", "masks/0.png", None])
    fails("row 3", "has no mask")
    make(image=["0.png"] * 2, sentence=["a"] * 2, mask=[b"\x89PNG", b"x"])
    fails("2 of 2 rows", "row 1", "names no mask")
    make(image=["0.png"] * 200, sentence=["x" * 10**6] * 200, mask=["masks/0.png"] * 200) # a small file: the same cell 200 times
    assert table.stat().st_size < 3 * 10**6
    text = pytest.raises(owndata.BarleriaError, from_table, table, home, tmp_path / "out").value
    assert "200 of 200 rows" in str(text) and "1,000,000 characters" in str(text)
    parquet.write_table(pa.table(dict(image=["0.png", "1.png"], sentence=["a", "b"], polygon=[[[float(x) for x in SQUARE]]] * 2, ref=[1.0, float("nan")])), table) # lists as such, and a number where it is given
    assert len(RefSet.read(from_table(table, home, tmp_path / "out"))) == 2
    whole = table.read_bytes()
    for n in range(40): # mutated: read, or refused in one line
        draw = random.Random(n)
        bad = bytearray(whole)
        for _ in range(draw.randint(1, 20)): bad[draw.randrange(len(bad))] = draw.randrange(256)
        table.write_bytes(bad)
        try: from_table(table, home, tmp_path / f"m{n}")
        except owndata.BarleriaError as e: assert "\n" not in str(e)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    line(lambda: from_table(table, home, tmp_path / "none"), "needs pyarrow", "pip install pyarrow")


def test_refusals_beside_rows(home, tmp_path):
    table = jsonl(tmp_path / "t.jsonl", good())
    line(lambda: from_table(tmp_path / "t.xlsx", home, tmp_path / "out"), "no table that is read", ".csv")
    line(lambda: from_table(tmp_path / "u.csv", home, tmp_path / "out"), "missing")
    line(lambda: from_table(table, home / "nought", tmp_path / "out"), "no folder of images")
    from_table(table, home, tmp_path / "out")
    before = (tmp_path / "out" / "refs.json").read_bytes()
    line(lambda: from_table(table, home, tmp_path / "out"), "is not empty")
    assert (tmp_path / "out" / "refs.json").read_bytes() == before


def test_full(home, tmp_path, monkeypatch):
    "A set too large to be read back is refused while it grows, whether or not rows may be skipped."
    monkeypatch.setattr(owndata, "MAX_SET", 1000)
    table = jsonl(tmp_path / "t.jsonl", *[good(sentence=f"sentence {n}") for n in range(50)])
    for skip in (False, True): line(lambda: from_table(table, home, tmp_path / "out", skip_bad=skip), "t.jsonl, row 8", "two sets")


def test_no_space_leaves_nothing(home, tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(owndata.shutil, "copyfile", full)
    line(lambda: from_table(jsonl(tmp_path / "t.jsonl", good()), home, tmp_path / "out"), "was not written", "disk is full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "outside.png", "t.jsonl"]


# --- COCO and sentences ---

@pytest.fixture
def coco_file(home, tmp_path):
    content = dict(images=[dict(id=i, file_name=f"{i}.png", height=10, width=12) for i in range(3)], categories=[dict(id=18, name="dog")],
        annotations=[dict(id=70 + i, image_id=i % 3, category_id=18, iscrowd=0, segmentation=[[x + (i > 2) for x in SQUARE]]) for i in range(5)] + [dict(id=90, image_id=0, segmentation=[[1, 1]]), dict(id=91, image_id=[]), dict(id=92, image_id=77)])
    write_json(tmp_path / "coco.json", content)
    return tmp_path / "coco.json"


def test_coco(home, tmp_path, coco_file):
    "Ids stay, neighbours come along, those that cannot be painted are counted."
    table = tmp_path / "t.csv"
    table.write_text("ann_id,sentence,split\n70,a dog,train\n70,the dog,train\n71,dog,val\n")
    data = RefSet.read(from_coco(coco_file, table, home, tmp_path / "out"))
    assert data.splits == {"train": (1, 2, 1), "val": (1, 1, 1)} and [(r.ann_id, r.image_id, r.category) for r in data] == [(70, 0, "dog"), (71, 1, "dog")]
    assert [a["id"] for a in read_json(tmp_path / "out" / "instances.json")["annotations"]] == [70, 71, 73, 74]
    assert read_json(tmp_path / "out" / "card.json")["unpaintable_neighbours"] == 2 and data.mask(data.refs[0]).sum() == 36


@pytest.mark.parametrize("cells,words", [("99,a", "99 is not among the annotations"), ("90,a", "annotation 90"), ("x,a", "'x', not a whole number"), (",a", "not a whole number"), ("70,", "no sentence"), ("9" * 40 + ",a", "64 bits")])
def test_coco_bad_rows(home, tmp_path, coco_file, cells, words):
    (tmp_path / "t.csv").write_text(f"ann_id,sentence\n71,dog\n{cells}\n")
    line(lambda: from_coco(coco_file, tmp_path / "t.csv", home, tmp_path / "out"), "1 of 2 rows", "row 3", words)


@pytest.mark.parametrize("change,words", [
    (lambda c: c["images"][0].update(height=11), "10×12"), (lambda c: c["images"][0].update(file_name="../outside.png"), "leads out"), (lambda c: c["images"][0].update(file_name=3), "names no image"),
    (lambda c: c["images"].pop(0), "not among the images"), (lambda c: c["annotations"][0].pop("segmentation"), "neither polygons"), (lambda c: c["annotations"][0].update(image_id="x"), "'image_id'"), (lambda c: c["images"][0].update(width=10**30), "64 bits")])
def test_coco_bad_records(home, tmp_path, coco_file, change, words):
    change(content := read_json(coco_file))
    write_json(coco_file, content)
    table = jsonl(tmp_path / "t.jsonl", dict(ann_id=71, sentence="dog"), dict(ann_id=70, sentence="dog"))
    line(lambda: from_coco(coco_file, table, home, tmp_path / "out"), "row 2", words)
    for content in ([], dict(images=1), dict(images=[], annotations=None)):
        write_json(coco_file, content)
        line(lambda: from_coco(coco_file, table, home, tmp_path / "out"), "coco.json")


# --- mixes ---

def small_set(root, images, refs):
    "A set by hand: images {id: (name, colour)}, refs [(image id, split, sentence)]."
    (root / "images").mkdir(parents=True)
    for name, colour in images.values(): Image.new("RGB", (12, 10), colour).save(root / "images" / name)
    annotations = [dict(id=n, image_id=i, category_id=1, segmentation=[[x + n % 2 for x in SQUARE]]) for n, (i, _, _) in enumerate(refs)]
    write_json(root / "instances.json", dict(images=[dict(id=i, file_name=name, height=10, width=12) for i, (name, _) in images.items()], annotations=annotations, categories=[dict(id=1, name="thing")]))
    write_json(root / "refs.json", [dict(ref_id=n, ann_id=n, image_id=i, split=s, sentences=[dict(sent_id=n, sent=t)]) for n, (i, s, t) in enumerate(refs)])
    return root


def test_mixed_by_hand(tmp_path):
    "Held out by number, by name, by bytes; ids unique; the leaky union labelled."
    a = small_set(tmp_path / "a", {1: ("one.png", "red"), 2: ("two.png", "green"), 3: ("three.png", "blue"), 4: ("four.png", "white")}, [(1, "train", "red"), (2, "train", "green"), (3, "train", "blue"), (4, "val", "white")])
    b = small_set(tmp_path / "b", {1: ("b1.png", "black"), 12: ("two.png", "yellow"), 13: ("b3.png", "blue"), 14: ("four.png", "white"), 15: ("five.png", "pink")},
        [(1, "testA", "number 1"), (12, "test", "name two"), (13, "val", "bytes three"), (14, "train", "white again"), (15, "train", "pink"), (15, "train", "pink too")])
    clean = mixed([a, b], tmp_path / "mix")
    data = RefSet.read(clean)
    assert sorted(s.text for r in data for s in r.sentences if is_train(r.split)) == ["pink", "pink too"] and data.splits == {"train": (2, 2, 1), "val": (2, 2, 2)}
    card = read_json(clean / "card.json")
    first = card["sets"][0]
    assert not card["leaky"] and first["before"]["images"] == 3 and first["after"]["images"] == 0 and first["held_out"] == dict(images=3, by_id=1, by_name=1, by_bytes=1, by_id_alone=1)
    assert audit(clean)["sound"] and "nothing but their id" in mixed_lines(clean)[-1]
    leaky = mixed([a, b], tmp_path / "mix", as_published=True)
    data = RefSet.read(leaky)
    assert leaky.name == data.name == "mix-as-published" and read_json(leaky / "card.json")["leaky"] and "LEAKY" in mixed_lines(leaky)[0]
    assert sorted(s.text for r in data for s in r.sentences if is_train(r.split)) == ["blue", "green", "pink", "pink too", "red", "white again"]
    assert [(l["by_id"], l["by_name"], l["by_pixels"]) for l in audit(leaky)["leaks"]] == [(2, 2, 2)] # blue and white, one image each now


def test_mixed_keeps_pictures_apart(tmp_path):
    "One number or one name for two pictures: every ref keeps its own picture."
    a = small_set(tmp_path / "a", {1: ("x.png", "red"), 2: ("y.png", "green")}, [(1, "train", "red"), (2, "train", "green")])
    b = small_set(tmp_path / "b", {1: ("x.png", "blue"), 2: ("z.png", "green"), 3: ("x-2.png", "white")}, [(1, "train", "blue"), (2, "train", "green"), (3, "train", "white")])
    data = RefSet.read(mixed([a, b], tmp_path / "mix"))
    colours = dict(red=(255, 0, 0), green=(0, 128, 0), blue=(0, 0, 255), white=(255, 255, 255))
    for r in data: assert tuple(data.image(r)[0, 0]) == colours[r.sentences[0].text]
    assert len({r.image_id for r in data}) == 4 and len({s.sent_id for r in data for s in r.sentences}) == len(data) == 5 and [r.extra["source"] for r in data] == ["a", "a", "b", "b", "b"]


def test_mixed_never_writes_outside(tmp_path):
    "A name that is absolute, or has dots, and yet lies inside its set, becomes a plain one."
    a = small_set(tmp_path / "a", {1: ("x.png", "red"), 2: ("y.png", "green")}, [(1, "train", "red"), (2, "train", "green")])
    b = small_set(tmp_path / "b", {5: ("v.png", "blue")}, [(5, "train", "blue")])
    content = read_json(a / "instances.json")
    content["images"][0]["file_name"], content["images"][1]["file_name"] = str(a / "images" / "x.png"), "../images/y.png"
    write_json(a / "instances.json", content)
    before = {p: p.read_bytes() for p in a.rglob("*") if p.is_file()}
    assert {r.file_name for r in RefSet.read(mixed([a, b], tmp_path / "mix"))} == {"x.png", "y.png", "v.png"}
    assert before == {p: p.read_bytes() for p in a.rglob("*") if p.is_file()}


def test_mixed_refusals(tmp_path):
    a = small_set(tmp_path / "a", {1: ("x.png", "red")}, [(1, "train", "red")])
    b = small_set(tmp_path / "b", {1: ("x.png", "red")}, [(1, "val", "red")])
    c = small_set(tmp_path / "c", {1: ("x.png", "red"), 2: ("y.png", "blue")}, [(1, "val", "red"), (2, "train", "blue")])
    d = small_set(tmp_path / "d", {2: ("y.png", "blue"), 1: ("x.png", "red")}, [(2, "testB", "blue"), (1, "train", "x")])
    line(lambda: mixed([a], tmp_path / "m"), "two or more"), line(lambda: mixed([a, a], tmp_path / "m"), "two or more")
    line(lambda: mixed([a, b], tmp_path / "m"), "no train split"), line(lambda: mixed([c, d], tmp_path / "m"), "nothing is left to train on")
    line(lambda: mixed([a, tmp_path / "none"], tmp_path / "m"), "none"), line(lambda: mixed([a, c], a), "is not empty"), line(lambda: mixed_lines(tmp_path / "a"), "card.json")
    assert not (tmp_path / "m").exists()


# --- the audit ---

def test_audit_by_hand(tmp_path):
    "A broken set whose every count is known."
    images = {n: (f"{n}.png", c) for n, c in enumerate(["red", "green", "blue", "white", "black", "red", "yellow", "pink"])} # 5 has the pixels of 0
    root = small_set(tmp_path / "s", images, [(0, "train", "Red  one"), (1, "train", "green"), (2, "train", "blue"), (5, "val", "red one"), (1, "val", "again"), (6, "val", "long " * 19), (3, "testA", "white"), (4, "testA", "black"), (7, "testA", "pink")])
    content, refs = read_json(root / "instances.json"), read_json(root / "refs.json")
    shapes = [a for a in content["annotations"]]
    shapes[2]["segmentation"] = [[1, 1, 7, 1, 7, 7, 1, 7], [4, 4, 9, 4, 9, 9, 4, 9]] # 3 × 3 twice
    shapes[4]["segmentation"] = shapes[1]["segmentation"] # one object, two splits, two annotations
    shapes[5]["segmentation"] = [[8, 5, 16, 5, 16, 9, 8, 9]] # runs out on the right
    shapes[6]["segmentation"] = dict(size=[10, 12], counts=[120])
    shapes[3]["segmentation"] = shapes[0]["segmentation"]
    refs[1]["sentences"] += [dict(sent_id=100, sent="Green"), dict(sent_id=101, sent="  "), dict(sent_id=102, sent=7)]
    refs.append(dict(ref_id=50, ann_id=2, image_id=2, split="train", sentences=[dict(sent_id=103, sent="other")]))
    shapes.append(dict(id=60, image_id=0, category_id=1, segmentation=[[4, 4, 10, 4, 10, 9, 4, 9]]))
    refs.append(dict(ref_id=60, ann_id=60, image_id=0, split="train", sentences=[dict(sent_id=104, sent="red one")]))
    (root / "images" / "4.png").write_bytes((root / "images" / "4.png").read_bytes()[:45])
    Image.new("RGB", (20, 20)).save(root / "images" / "7.png")
    content["annotations"] = shapes
    write_json(root / "instances.json", content), write_json(root / "refs.json", refs)
    r = audit(root, words=17)
    n = lambda part, kind: r[part][kind]["count"]
    assert not r["sound"] and r["readable"] and r["problem_count"] == 3
    assert r["splits"] == dict(train=dict(refs=5, sentences=6, images=3, objects=4), val=dict(refs=3, sentences=3, images=3, objects=3), testA=dict(refs=2, sentences=2, images=2, objects=2))
    assert (n("outlines", "empty"), n("outlines", "outside"), n("outlines", "overlapping")) == (1, 1, 1) and r["outlines"]["overlapping"]["examples"] == ["annotation 2, 9 px"] and "tiny" not in r["outlines"]
    assert (r["images"]["checked"], n("images", "broken"), n("images", "other_size")) == (8, 1, 1)
    assert n("sentences", "empty") == 2 and n("sentences", "repeated") == 1 and r["sentences"]["cut"] == {"17": 1, "22": 0} and r["sentences"]["words_max"] == 19
    leak = r["leaks"][0]
    assert len(r["leaks"]) == 1 and leak | dict(examples=0) == dict(train="train", split="val", images=2, of=3, by_id=1, by_name=1, by_pixels=2, sentences=1, objects=2, examples=0)
    assert r["doubles"]["objects_in_several_splits"] == 2 and n("doubles", "objects_of_several_refs") == 2 and n("doubles", "sentences_for_several_objects") == 1
    assert audit(root, words=22)["sentences"]["cut"] == {"22": 0} and audit(root, images=3)["images"]["checked"] == 3
    assert json.loads(json.dumps(r)) == r and all("\n" not in l for l in audit_lines(r)) and sum(l[0] == "!" for l in audit_lines(r)) == 6


def test_audit_tiny(tmp_path):
    "An object below one cell of the grid of 104: 36 pixels do in an image 12 wide, not in one 640 wide."
    root = small_set(tmp_path / "s", {0: ("0.png", "red")}, [(0, "train", "red")])
    content = read_json(root / "instances.json")
    content["images"][0].update(width=640, height=480)
    write_json(root / "instances.json", content), Image.new("RGB", (640, 480)).save(root / "images" / "0.png")
    assert audit(root)["outlines"]["tiny"]["count"] == 1 and audit(root)["sound"]


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not on this machine")
def test_audit_of_the_real_sample():
    r = audit(SAMPLE)
    data = RefSet.read(SAMPLE)
    assert r["problem_count"] == 0 and {s: (n["refs"], n["sentences"], n["images"]) for s, n in r["splits"].items()} == data.splits and r["images"]["checked"] == len({x.image_id for x in data})


def test_audit_of_the_shipped_sample(): assert audit(asset("refshapes-sample"))["sound"]


JUNK = [None, True, -1, 2**63, 10**300, 1e308, "", "x" * 300, "\ud800", "\x1b[2J", "../../etc/passwd", "/etc/passwd", [], {}, [[]], [1] * 7, {"size": [10, 12], "counts": [120]}, {"size": "a", "counts": {}}, [SQUARE], [[1e9] * 6], [["a"] * 6], [None]]


def test_audit_of_hostile_folders(tmp_path):
    "Every field of every record replaced by junk, records and files replaced as a whole: a report, never an exception."
    root = small_set(tmp_path / "s", {0: ("0.png", "red"), 1: ("1.png", "blue")}, [(0, "train", "red"), (1, "val", "blue")])
    good = {f: read_json(root / f) for f in ("instances.json", "refs.json")}
    places = [("instances.json", t, 0, k) for t in ("images", "annotations", "categories") for k in good["instances.json"][t][0]] + [("refs.json", None, 0, k) for k in good["refs.json"][0]]
    def look():
        r = audit(root)
        json.dumps(r), audit_lines(r)
        return r
    for (file, table, n, key), junk in itertools.product(places, JUNK):
        content = json.loads(json.dumps(good[file]))
        (content[table] if table else content)[n][key] = junk
        (root / file).write_text(json.dumps(content))
        look()
        (root / file).write_text(json.dumps(good[file]))
    for file, junk in itertools.product(good, [*JUNK, [None], [[]], {"images": {}, "annotations": []}]):
        (root / file).write_text(json.dumps(junk))
        assert not look()["sound"]
        (root / file).write_text(json.dumps(good[file]))
    for file, raw in itertools.product(good, [b"", b"\xff\xfe", b"[" * 10**5, b"{", b"1" * 5000, b"[NaN]"]):
        (root / file).write_bytes(raw)
        assert not look()["readable"]
        (root / file).write_text(json.dumps(good[file]))
    assert look()["sound"]
    (root / "images" / "0.png").unlink(), (root / "images" / "0.png").symlink_to("/etc/passwd")
    assert look()["images"]["outside"]["count"] == 1
    shutil.rmtree(root / "images")
    assert not look()["readable"] and not audit(tmp_path / "nowhere")["readable"] and not audit(root / "refs.json")["readable"]
    line(lambda: audit(root, words=2), "3 is the least")


def test_audit_of_many_splits(tmp_path):
    "A split for every ref costs no comparison of every pair."
    refs = [(n % 2, f"train{n}" if n % 2 else f"val{n}", "a thing") for n in range(4000)]
    r = audit(small_set(tmp_path / "s", {0: ("0.png", "red"), 1: ("1.png", "blue")}, refs))
    assert r["split_count"] == 4000 and len(r["splits"]) == 40 and any("smaller splits" in l for l in audit_lines(r))
