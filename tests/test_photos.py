"A mask tool for people's own photos: names, lists, folders of answers, and the command `barleria_segment` on top."
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common import line
from fastcore.script import anno_parser
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from barleria_nb import cli, core, photos
from barleria_nb.inference import Result, Segmenter, _record, slug
from barleria_nb.model import build_model, config
from barleria_nb.shapes import split_scene

MODEL = build_model(config("frozen-tiny"))


class Fake:
    "Answers at once: the mask is a box whose size hangs on the sentence; `a ghost` is nowhere."
    def __init__(self, model=MODEL, batch=4): self.model, self.batch, self.asked, self.live, self.peak = model, batch, [], weakref.WeakSet(), 0

    def __call__(self, image, sentences, threshold):
        assert len(sentences) <= self.batch
        self.asked += [(image.shape, s) for s in sentences]
        found = []
        for s in sentences:
            p = np.full(image.shape[:2], .1, np.float32)
            if s != "a ghost": p[:max(1, image.shape[0] // 2), :max(1, len(s) % image.shape[1])] = .9
            found.append(Result(image, s, p, threshold, len(s) > 300))
        self.live.update(found)
        self.peak = max(self.peak, len(self.live))
        return found


def picture(path, seed=0, size=(30, 40)):
    "A picture of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def album(tmp_path):
    "Four pictures, one of them broken."
    for n, name in enumerate(("a.png", "b/a.png", "b/c d.jpg")): picture(tmp_path / "photos" / name, n)
    (tmp_path / "photos" / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path / "photos"


def go(album, out, sentences=("a cat", "a ghost"), segment=None, **kw):
    return photos.segment_photos(segment or Fake(), photos.plan_photos([album], sentences), out, progress=False, **kw)


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def run(*words):
    "`barleria_segment` in this process; its exit code."
    f = cli.barleria_segment.__wrapped__
    try: f(**{k: v for k, v in vars(anno_parser(f, prog="barleria_segment").parse_args([*map(str, words)])).items() if k not in ("pdb", "xtra")})
    except SystemExit as e: return e.code or 0
    return 0


# ---------------------------------------------------------------------------------------------------------------- names
PARTS = st.one_of(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=30), st.sampled_from(["a.jpg", "A.JPG", "a_jpg", "a.png", "..", ".", "con", "nul.png", "x" * 250, "é", "e\u0301", "-", " ", "a.", "a_jpg.jsonl", "0_a.png"]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), unique=True, max_size=12))
def test_names_are_safe_and_never_meet(names):
    safe = photos.safe_names(names)
    assert list(safe) == names
    keys = [unicodedata.normalize("NFC", s).casefold() for s in safe.values()]
    assert len(set(keys)) == len(keys)
    files = {f"{k}.jsonl" for k in keys}
    assert not any(f"{k.rsplit('/', n)[0]}" in files for k in keys for n in range(1, k.count("/") + 1)) # no folder has the name of a record
    for s in safe.values():
        assert len(s.encode()) < 260
        for part in s.split("/"):
            assert part and part[0] not in "-. " and part[-1] not in ". " and part.isprintable() and not set(part) & set('\\:*?"<>|')
            part.encode()


def test_plain_names_stay():
    assert photos.safe_names(["Trip/IMG 1.JPG", "2023.05 Ü/写真.png"]) == {"Trip/IMG 1.JPG": "Trip/IMG 1_JPG", "2023.05 Ü/写真.png": "2023.05 Ü/写真_png"}
    assert photos.safe_names(["a.jpg"]) != photos.safe_names(["a.jpg", "A.jpg"])


# ---------------------------------------------------------------------------------------------------------------- pictures
def test_what_is_found(album, tmp_path):
    picture(tmp_path / "secret.png"), picture(album / ".thumb" / "x.png"), picture(album / ".x.png")
    (album / "out.png").symlink_to(tmp_path / "secret.png"), (album / "in.png").symlink_to(album / "a.png"), (album / "up").symlink_to(tmp_path), (album / "gone.png").symlink_to("nowhere.png"), (album / "loop").symlink_to("loop")
    os.mkfifo(album / "pipe.png")
    (album / "dir.png").mkdir()
    (album / "x.heic").touch()
    plan = photos.find_photos([album])
    assert [p.name for p in plan.photos] == ["a.png", "b/a.png", "b/broken.jpg", "b/c d.jpg"] and not plan.single
    assert plan.left["links"] == 3 and any("heic" in k for k in plan.left)
    assert [p.name for p in photos.find_photos([album / "b", album, album / "a.png"]).photos] == ["b/a.png", "b/broken.jpg", "b/c d.jpg", "a.png"]
    link = album / "linked.png"
    link.symlink_to(album / ".x.png") # into a hidden file of the same folder: named by somebody, so it counts
    assert ".x.png" in [p.name for p in photos.find_photos([album]).photos]
    assert photos.find_photos([album / "in.png"]).single


def test_a_link_to_an_answer_is_no_photograph(album):
    picture(album / "ans" / "masks" / "m.png"), (album / "ans" / photos.MARK).write_text("{}")
    (album / "again.png").symlink_to(album / "ans" / "masks" / "m.png")
    assert [p.name for p in photos.find_photos([album]).photos] == ["a.png", "b/a.png", "b/broken.jpg", "b/c d.jpg"]


def test_where_there_is_nothing(tmp_path):
    line(lambda: photos.find_photos([tmp_path]), "not one picture")
    line(lambda: photos.find_photos([tmp_path / "x"]), "is missing")
    line(lambda: photos.find_photos(["x" * 5000]), "cannot be read")
    (tmp_path / "only.HEIC").touch()
    line(lambda: photos.find_photos([tmp_path]), "convert to JPEG")


def test_a_folder_that_cannot_be_read(album, monkeypatch, tmp_path):
    usual = os.scandir
    def scandir(p):
        if Path(p).name == "b": raise PermissionError(errno.EACCES, "Permission denied", str(p))
        return usual(p)
    monkeypatch.setattr(photos.os, "scandir", scandir)
    plan = photos.find_photos([album])
    assert [p.name for p in plan.photos] == ["a.png"] and plan.skipped == [("b", "this folder cannot be read (Permission denied)")]
    line(lambda: photos.find_photos([album / "b"]), "cannot be read (Permission denied)")


def test_a_very_deep_folder(tmp_path):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(60):
            os.mkdir("d" * 90)
            os.chdir("d" * 90)
    finally: os.chdir(here)
    picture(tmp_path / "a.png")
    plan = photos.find_photos([tmp_path])
    assert [p.name for p in plan.photos] == ["a.png"] and len(plan.skipped) == 1


# ---------------------------------------------------------------------------------------------------------------- lists
@pytest.mark.parametrize("name, text, said", [
    ("s.txt", "", "holds no sentence"), ("s.txt", "image,sentence\na.png,cat\n", "name it .csv"), ("s.txt", "ok\n\n???&nbsp;\n&amp;nbsp;\n", "line 4"), ("s.txt", b"caf\xe9\n", "not UTF-8"), ("s.txt", "x" * 10_001, "over 10,000"),
    ("s.json", '[{"image": "a.png"}]', ".jsonl"), ("s.csv", "picture,sentence\na.png,x\n", "no column 'image'"), ("s.csv", "image\na.png\n", "no column 'sentence'"), ("s.csv", "", "is empty"), ("s.csv", "image,sentence\n", "names no picture"),
    ("s.csv", 'image,sentence\na.png,"x\n\n', "close the quotes"), ("s.csv", "image,sentence\na.png,x,y\n", "row 2 has 3 cells"), ("s.csv", "image,sentence\na.png,\n", "row 2 has no sentence"), ("s.csv", "image,sentence\nz.png,x\n", "names no picture"),
    ("s.jsonl", "nonsense\n", "row 1 is not JSON"), ("s.jsonl", "7\n", "no JSON object"), ("s.jsonl", '{"image": "a.png", "sentence": 7}\n', "row 1 has no sentence"), ("s.jsonl", "[" * 100_000, "row 1 is nested"), ("s.jsonl", '{"image": ["a"], "sentence": "x"}', "row 1 has no image"),
    ("s.parquet", "PAR1", "not parquet"), ("none.txt", None, "is missing")])
def test_lists_that_are_wrong(album, tmp_path, name, text, said):
    if text is not None: (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    line(lambda: photos.plan_photos([album], listed=tmp_path / name), said, name)


def test_a_list_without_end(album, tmp_path, monkeypatch):
    with open(tmp_path / "s.txt", "wb") as f: f.truncate(10**9)
    line(lambda: photos.plan_photos([album], listed=tmp_path / "s.txt"), "1,000,000,000 bytes")
    line(lambda: photos.plan_photos([album], listed=tmp_path), "is no file")
    os.mkfifo(tmp_path / "pipe.csv")
    line(lambda: photos.plan_photos([album], listed=tmp_path / "pipe.csv"), "is no file")
    monkeypatch.setattr(photos, "MAX_ROWS", 3)
    (tmp_path / "s.txt").write_text("a\n" * 4), (tmp_path / "s.csv").write_text("image,sentence\n" + "a.png,x\n" * 4)
    line(lambda: photos.plan_photos([album], listed=tmp_path / "s.txt"), "over 3 sentences")
    line(lambda: photos.plan_photos([album], listed=tmp_path / "s.csv"), "over 3 rows")


def test_tables_speak_of_one_folder(album, tmp_path):
    picture(tmp_path / "out.png")
    (album / "link.png").symlink_to(tmp_path / "out.png")
    rows = ["image,sentence", "b/c d.jpg,x", "../out.png,x", f"{tmp_path}/out.png,x", "link.png,x", "none.png,x", "none.png,y", "b/../a.png,x", "a.png, the  end ", "b/c d.jpg,y"]
    (tmp_path / "s.csv").write_text("\ufeff" + "\r\n".join(rows))
    plan = photos.plan_photos([album], listed=tmp_path / "s.csv")
    assert [(p.name, p.sentences) for p in plan.photos] == [("b/c d.jpg", ["x", "y"]), ("a.png", ["the  end"])]
    assert [n for n, _ in plan.skipped] == ["../out.png", f"{tmp_path}/out.png", "link.png", "none.png", "b/../a.png"]
    line(lambda: photos.plan_photos([album / "a.png"], listed=tmp_path / "s.csv"), "give the one folder")
    line(lambda: photos.plan_photos([album, album], listed=tmp_path / "s.csv"), "give the one folder")
    done = photos.segment_photos(Fake(), plan, tmp_path / "out", progress=False)
    assert (done.pictures, done.masks, len(done.skipped)) == (2, 3, 5)


# ---------------------------------------------------------------------------------------------------------------- a folder of answers
def test_what_is_written(album, tmp_path):
    done = go(album, tmp_path / "out", formats=photos.FILES, overlays=True)
    assert (done.pictures, done.masks, done.new, [n for n, _ in done.skipped]) == (3, 6, 3, ["b/broken.jpg"])
    names = set(tree(tmp_path / "out"))
    for n in ("a_png", "b/a_png", "b/c d_jpg"): assert {f"masks/{n}/0_a-cat.png", f"masks/{n}/1_a-ghost.png", f"records/{n}.jsonl", f"overlays/{n}.png"} <= names
    assert names - {n for n in names if "/" in n} == {"barleria-photos.json", "masks.jsonl", "coco.json", "sheet.png", "skipped.jsonl"} and len(names) == 5 + 3 * 4
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["image"] == "b/broken.jpg"


def test_coco_reads_it(album, tmp_path):
    picture(album / "new\nline 😀 \"q\".png", 5, (31, 17)), picture(album / "-rf.png", 6, (1, 50))
    go(album, tmp_path / "out", formats=("coco", "png", "rle"))
    with contextlib.redirect_stdout(io.StringIO()): found = COCO(str(tmp_path / "out" / "coco.json"))
    rows = [json.loads(l) for l in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()]
    assert [i["file_name"] for i in found.imgs.values()] == ["-rf.png", "a.png", 'new\nline 😀 "q".png', "b/a.png", "b/c d.jpg"] and len(found.anns) == len(rows) == 10
    for a, r in zip(found.loadAnns(found.getAnnIds()), rows):
        white = np.array(Image.open(tmp_path / "out" / r["file"])) > 0
        assert (found.annToMask(a) == white).all() and a["area"] == white.sum() == r["area"] and a["caption"] == r["sentence"]
        assert found.imgs[a["image_id"]]["file_name"] == r["image"] and white.shape == tuple(found.imgs[a["image_id"]][k] for k in ("height", "width"))
        assert (a["bbox"], a["score"]) == (([0, 0, 0, 0], 0) if r["sentence"] == "a ghost" else ([0, 0, *white.nonzero()[::-1][0].max(keepdims=True) + 1, *white.nonzero()[0].max(keepdims=True) + 1], pytest.approx(.9)))


def test_again_does_nothing_and_a_change_little(album, tmp_path):
    out, segment = tmp_path / "out", Fake()
    go(album, out, formats=photos.FILES, overlays=True)
    first, times = tree(out), {p: p.stat().st_mtime_ns for n in ("masks", "records", "overlays", "sheet.png") for p in [out / n, *(out / n).rglob("*")] if p.is_file()}
    assert go(album, out, segment=segment).new == 0 and not segment.asked
    assert tree(out) == first and {p: p.stat().st_mtime_ns for p in times} == times
    (out / "masks" / "a_png" / "0_a-cat.png").unlink(), (out / "coco.json").unlink()
    go(album, out, segment=segment)
    assert tree(out) == first and not segment.asked # drawn again from the record; coco.json was asked for once, and is kept up to date
    picture(album / "a.png", 9, (20, 20)), picture(album / "z.png", 8)
    assert go(album, out, segment=segment).new == 2 and {s for s, _ in segment.asked} == {(20, 20, 3), (30, 40, 3)}
    assert Image.open(out / "masks" / "a_png" / "0_a-cat.png").size == (20, 20)
    (album / "z.png").unlink()
    go(album, out, segment=segment)
    assert "z.png" not in (out / "coco.json").read_text() and "z.png" not in (out / "masks.jsonl").read_text()


def test_more_is_drawn_without_asking_again(album, tmp_path):
    out, segment = tmp_path / "out", Fake()
    go(album, out, formats=("rle",))
    assert not (out / "masks").exists() and "file" not in json.loads((out / "masks.jsonl").read_text().splitlines()[0])
    go(album, out, segment=segment, formats=("png",), overlays=True)
    assert not segment.asked and (out / "masks" / "b" / "c d_jpg" / "0_a-cat.png").exists() and (out / "overlays" / "a_png.png").exists()
    assert "file" in json.loads((out / "masks.jsonl").read_text().splitlines()[0])


def test_other_settings_are_refused(album, tmp_path):
    out = tmp_path / "out"
    go(album, out)
    before = tree(out)
    line(lambda: go(album, out, threshold=.5), "threshold: 0.35 there, 0.5 now")
    line(lambda: go(album, out, ["a dog", "a ghost"]), "other sentences")
    other = build_model(config("frozen-tiny"))
    with torch.no_grad(): next(p for p in other.parameters() if p.requires_grad).add_(1)
    line(lambda: go(album, out, segment=Fake(other)), "model: ")
    line(lambda: go(album / "b", out), "pictures: ")
    line(lambda: photos.segment_photos(Fake(), photos.plan_photos([album / "a.png"], ["x"]), out, progress=False), "holds the answers of a folder")
    line(lambda: go(album, out, formats=("xml",)), "not xml")
    assert tree(out) == before


def test_places_for_answers(album, tmp_path):
    line(lambda: go(album, album), "cannot hold the pictures")
    line(lambda: go(album, tmp_path / "photos" / "a.png"), "is a file")
    (tmp_path / "mine" / "masks").mkdir(parents=True)
    line(lambda: go(album, tmp_path / "mine"), "somebody else's")
    picture(tmp_path / "yours" / "sheet.png")
    line(lambda: go(album, tmp_path / "yours"), "'sheet.png' of somebody else's")
    (tmp_path / "yours" / "sheet.png").unlink()
    line(lambda: go(album, tmp_path / "x", threshold=35), "not in [0, 1)")
    assert not (tmp_path / "x").exists()
    inside = album / "b" / "answers"
    go(album, inside, overlays=True)
    assert go(album, inside).new == 0 and go(album, tmp_path / "other").pictures == 3
    photos.segment_photos(Fake(), photos.plan_photos([album / "a.png"], ["x"]), album / "b", progress=False) # its files lie among the pictures
    assert go(album, inside).pictures == 3
    done = go(tmp_path, tmp_path / "all")
    assert done.pictures == 3 and go(tmp_path, tmp_path / "all").new == 0
    picture(tmp_path / "home" / "p" / "x.png")
    assert go(tmp_path / "home" / "p", tmp_path / "home").pictures == go(tmp_path / "home" / "p", tmp_path / "home").pictures == 1 # pictures below the answers' folder
    line(lambda: go(tmp_path / "home" / "masks", tmp_path / "home"), "cannot hold the pictures")


@pytest.mark.parametrize("text", ["", "{}\n", "[]", '{"image": "a.png"\n', "\0" * 50, "[" * 50_000])
def test_half_a_record_counts_for_nothing(album, tmp_path, text):
    out = tmp_path / "out"
    go(album, out, formats=photos.FILES)
    whole, record = tree(out), out / "records" / "a_png.jsonl"
    record.write_text(text)
    assert go(album, out).new == 1 and tree(out) == whole
    for wrong in (lambda l: l[:2], lambda l: [*l, l[1]], lambda l: [l[0], "{}\n", l[2]], lambda l: [l[0], l[1].replace("masks/a_png", "../.."), l[2]], lambda l: [l[0], "[" * 50_000, l[2]]):
        record.write_text("".join(wrong(whole["records/a_png.jsonl"].decode().splitlines(True))))
        line(lambda: go(album, out), "a_png.jsonl is damaged; delete it")
    record.unlink()
    assert go(album, out).new == 1 and tree(out) == whole


def test_a_record_of_a_stranger(album, tmp_path):
    "What a record claims is checked before it is drawn, counted or handed on."
    out = tmp_path / "out"
    go(album, out, formats=photos.FILES)
    record = out / "records" / "a_png.jsonl"
    head, first, second = map(json.loads, record.read_text().splitlines())
    put = lambda *rows: record.write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = lambda h, w: dict(size=[h, w], counts="0" * 9)
    for claim in (dict(sentence="a dog"), dict(sentence=7), dict(sentence="half \ud83d"), dict(area="big"), dict(area=-1), dict(area=10**400), dict(truncated="yes"), dict(box="x"), dict(box=[0, 0, 1, "x"]), dict(probability=float("nan")), dict(probability="x"),
            dict(rle=7), dict(rle=runs(30, 41)), dict(rle=dict(size=[30, 40], counts="\ud83d")), dict(rle=runs(30, 40) | dict(more=1)), dict(height=200_000, width=200_000, rle=runs(200_000, 200_000)), dict(more="\ud83d")):
        put(head, first | claim, second)
        line(lambda: go(album, out), "a_png.jsonl is damaged; delete it")
    for claim in (dict(height="x"), dict(height=0), dict(width=10**400), dict(height=10**6, width=10**6), dict(height=True), dict(image=7), dict(stamp=7)): # nothing of use: it is made again
        put(head | claim, first, second)
        assert go(album, out).new == 1


def test_a_hostile_page(album, tmp_path):
    "Where a page of the sheet should be lies a PNG that claims billions of pixels, or a pipe."
    out = tmp_path / "out"
    go(album, out)
    page = (out / "sheet.png").read_bytes()
    ihdr = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + page[24:29]
    bomb = page[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + page[33:]
    (out / "sheet.png").write_bytes(bomb), (out / "sheet-7.png").write_bytes(bomb), os.mkfifo(out / "sheet-8.png")
    go(album, out)
    assert (out / "sheet.png").read_bytes() == page and (out / "sheet-7.png").exists()


def test_an_edited_picture_and_a_stop(album, tmp_path, monkeypatch):
    "A stop between the new record and its drawings leaves no old mask behind."
    go(album, tmp_path / "out", overlays=True)
    picture(album / "a.png", 9, (20, 25))
    def stop(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(photos._Worker, "draw", stop)
        with pytest.raises(KeyboardInterrupt): go(album, tmp_path / "out")
    go(album, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "masks" / "a_png" / "0_a-cat.png").size == (25, 20)
    go(album, tmp_path / "new", overlays=True)
    assert {k: v for k, v in tree(tmp_path / "out").items() if "/" in k} == {k: v for k, v in tree(tmp_path / "new").items() if "/" in k}


def test_a_picture_that_changes_while_it_is_read(album, tmp_path, monkeypatch):
    usual = photos.read_image
    def read(path):
        pixels = usual(path)
        if path.name == "a.png" and path.parent == album: picture(path, 9, (20, 25))
        return pixels
    with monkeypatch.context() as m:
        m.setattr(photos, "read_image", read)
        go(album, tmp_path / "out")
    assert go(album, tmp_path / "out").new == 1 and Image.open(tmp_path / "out" / "masks" / "a_png" / "0_a-cat.png").size == (25, 20)


def test_a_picture_is_not_replaced_by_its_mask(tmp_path):
    for name in ("0_a-cat.png", "overlays.png"):
        before = picture(tmp_path / name).read_bytes()
        line(lambda: photos.segment_photos(Fake(), photos.plan_photos([tmp_path / name], ["a cat"]), tmp_path, progress=False), "is the picture itself", name)
        assert (tmp_path / name).read_bytes() == before and not (tmp_path / "masks.json").exists()


def test_hostile_settings_file(album, tmp_path):
    go(album, tmp_path / "out")
    mark = core.read_json(tmp_path / "out" / photos.MARK)
    for odd in (dict(formats=7), dict(formats=[["x"], "xml"]), dict(formats=None)):
        core.write_json(tmp_path / "out" / photos.MARK, mark | odd)
        assert go(album, tmp_path / "out").new == 0
    core.write_json(tmp_path / "out" / photos.MARK, mark | dict(model="two\nlines"))
    line(lambda: go(album, tmp_path / "out"), "two lines there")
    for text in ("[]", "7", "{", "{}"):
        (tmp_path / "out" / photos.MARK).write_text(text)
        line(lambda: go(album, tmp_path / "out"))


def test_a_full_disk_stops_and_then_goes_on(album, tmp_path, monkeypatch):
    go(album, tmp_path / "whole", formats=photos.FILES)
    usual, left = os.fsync, [5]
    def fsync(f):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, "No space left on device")
        usual(f)
    with monkeypatch.context() as m:
        m.setattr(core.os, "fsync", fsync)
        line(lambda: go(album, tmp_path / "out", formats=photos.FILES), "the disk is full")
    assert 0 < len(list((tmp_path / "out" / "records").rglob("*.jsonl"))) < 3 and not [p for p in (tmp_path / "out").rglob(".*") if p.name != ".lock"]
    go(album, tmp_path / "out", formats=photos.FILES)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_one_process_at_a_time(album, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        line(lambda: go(album, tmp_path / "out"), "another process works in")
        line(lambda: go(album / "a.png", tmp_path / "out"), "another process works in")


def test_many_sentences_take_little_memory(tmp_path):
    picture(tmp_path / "p" / "a.png")
    segment = Fake(batch=8)
    said = [f"thing number {n}" for n in range(5000)]
    done = go(tmp_path / "p", tmp_path / "out", said, segment, formats=("rle", "coco"))
    assert done.masks == 5000 and [s for _, s in segment.asked] == said and segment.peak <= 17
    assert len((tmp_path / "out" / "masks.jsonl").read_text().splitlines()) == 5000 and Image.open(tmp_path / "out" / "sheet.png").height < 500


def test_long_odd_and_repeated_sentences(tmp_path):
    picture(tmp_path / "p" / "a.png")
    done = go(tmp_path / "p", tmp_path / "out", ["x" * 9_999, "half a \ud83d", "\x1b[2J red", "same", "same", "../../etc/passwd"], formats=photos.FILES, overlays=True)
    assert (done.masks, done.cut) == (6, 1)
    assert sorted(p.name[:2] for p in (tmp_path / "out" / "masks" / "a_png").iterdir()) == [f"{n}_" for n in range(6)]
    with contextlib.redirect_stdout(io.StringIO()): assert len(COCO(str(tmp_path / "out" / "coco.json")).anns) == 6
    line(lambda: photos.plan_photos([tmp_path / "p"], ["x" * 10_001]), "over 10,000")
    line(lambda: photos.plan_photos([tmp_path / "p"], [" "]), "is empty")
    line(lambda: photos.plan_photos([tmp_path / "p"], []), "no sentence")
    line(lambda: photos.plan_photos([tmp_path / "p"], ["a", None]), "of type NoneType")
    assert photos.plan_photos(tmp_path / "p", "a circle") == photos.plan_photos([tmp_path / "p"], ["a circle"])
    rows = ["image,sentence", 'a.png,"x', 'y"', "a.png,z", "image,sentence", "a.png,x", 'a.png,"y', 'z"']
    (tmp_path / "1.csv").write_text("\n".join(rows[:4])), (tmp_path / "2.csv").write_text("\n".join(rows[4:]))
    for n in (1, 2): # the same words, divided otherwise
        ask = lambda: photos.segment_photos(Fake(), photos.plan_photos([tmp_path / "p"], listed=tmp_path / f"{n}.csv"), tmp_path / "divided", progress=False)
        line(ask, "other sentences") if n == 2 else ask()


def test_odd_pictures(tmp_path):
    album = tmp_path / "p"
    picture(album / "line.png", size=(1, 3000)), picture(album / "dot.bmp", size=(1, 1)), picture(album / "tall.ppm", size=(2000, 1))
    Image.new("I;16", (30, 20), 40_000).save(album / "deep.png"), Image.new("CMYK", (30, 20)).save(album / "cmyk.jpg"), Image.new("RGBA", (30, 20)).save(album / "clear.webp")
    exif = Image.Exif(); exif[274] = 6
    Image.new("RGB", (30, 20)).save(album / "turned.jpg", exif=exif)
    Image.new("L", (8000, 8000)).save(album / "huge.png"), (album / "empty.png").touch(), (album / "text.tif").write_text("I am a text")
    (album / "movie.gif").write_bytes(b"GIF89a" + b"\xff" * 30)
    done = go(album, tmp_path / "out", ["a cat"], formats=photos.FILES, overlays=True)
    assert sorted(n for n, _ in done.skipped) == ["empty.png", "huge.png", "movie.gif", "text.tif"] and done.pictures == 7
    assert Image.open(tmp_path / "out" / "masks" / "turned_jpg" / "0_a-cat.png").size == (20, 30)


def test_nothing_but_broken_pictures(tmp_path):
    for n in range(3): (tmp_path / f"{n}.png").touch()
    line(lambda: go(tmp_path, tmp_path / "out"), "not one of 3 pictures", "0.png")


def test_pages_of_the_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "COLUMNS_OF_PAGE", 2), monkeypatch.setattr(photos, "ROWS_OF_PAGE", 2)
    for n in range(9): picture(tmp_path / "p" / f"{n:02}.png", n)
    out = tmp_path / "out"
    go(tmp_path / "p", out, formats=("rle",))
    pages = sorted(out.glob("sheet*.png"))
    assert [p.name for p in pages] == ["sheet-01.png", "sheet-02.png", "sheet-03.png"] and all(max(Image.open(p).size) < 900 for p in pages)
    drawn, usual = [], photos._cell
    monkeypatch.setattr(photos, "_cell", lambda *a: drawn.append(a[1]) or usual(*a))
    go(tmp_path / "p", out)
    assert not drawn
    pages[1].unlink()
    go(tmp_path / "p", out)
    assert drawn == [f"{n:02}.png" for n in range(4, 8)]
    for n in range(3, 9): (tmp_path / "p" / f"{n:02}.png").unlink()
    picture(out / "sheet-holiday.png") # not ours
    go(tmp_path / "p", out)
    assert {p.name for p in out.glob("sheet*.png")} == {"sheet.png", "sheet-holiday.png"}


def test_a_single_picture(tmp_path):
    segment = Segmenter.from_pretrained("barleria-tiny")
    Image.fromarray(split_scene("train", 3).image).save(tmp_path / "a.png")
    asked = ["the red circle", "a square"]
    photos.segment_photos(segment, photos.plan_photos([tmp_path / "a.png"], asked), tmp_path / "one", formats=("png", "coco"), progress=False)
    answers = segment(tmp_path / "a.png", asked)
    records = [_record(a, f"{n}_{slug(a.sentence)}.png") for n, a in enumerate(answers)]
    assert core.read_json(tmp_path / "one" / "masks.json") == records
    assert set(tree(tmp_path / "one")) == {r["file"] for r in records} | {"overlays.png", "masks.json", "coco.json"}
    for a, r in zip(answers, records): assert ((np.array(Image.open(tmp_path / "one" / r["file"])) > 0) == a.mask).all()
    plan = photos.plan_photos([tmp_path / "a.png", tmp_path / "one" / "0_the-red-circle.png"], asked)
    photos.segment_photos(segment, plan, tmp_path / "many", progress=False) # the same answers by the other way
    rows = [json.loads(l) for l in (tmp_path / "many" / "records" / "a_png.jsonl").read_text().splitlines()[1:]]
    assert [{k: v for k, v in r.items() if k != "file"} for r in rows] == [{k: v for k, v in r.items() if k != "file"} for r in records]


# ---------------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def quick(monkeypatch):
    "The command with answers that cost nothing."
    segment = Fake()
    monkeypatch.setattr(Segmenter, "from_pretrained", classmethod(lambda cls, run, device: segment))
    return segment


def test_exit_codes(album, tmp_path, quick, capsys):
    (tmp_path / "s.txt").write_text("a cat\na dog\n")
    assert run("m", album, "a cat", "--out", tmp_path / "o1") == 3
    seen = capsys.readouterr()
    assert "3 masks of 3 pictures, 3 of them new" in seen.out and seen.err.splitlines()[0].startswith("1 could not be read") and "broken.jpg" in seen.err
    (album / "b" / "broken.jpg").unlink()
    assert run("m", album, "--sentences", tmp_path / "s.txt", "--out", tmp_path / "o2", "--format", "png", "coco", "rle", "--overlays") == 0
    assert {"coco.json", "masks.jsonl", "overlays"} <= set(os.listdir(tmp_path / "o2"))
    assert run("m", album, "--out", tmp_path / "o3") == 2 and not (tmp_path / "o3").exists()
    assert run("m", album / "a.png", album / "b" / "a.png", "--sentences", tmp_path / "s.txt", "--out", tmp_path / "o3") == 0
    assert run("m", album, "a dog", "--out", tmp_path / "o1") == 1
    assert run("m", album, "a cat", "--out", tmp_path / "o4", "--format", "gif") == 2
    assert run("--sentences", tmp_path / "s.txt", "--out", tmp_path / "o5", "m", album) == 0
    assert run("m", album / "a.png", "--out", tmp_path / "o6", "a cat", "a dog") == 0 # words after options, as ever
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'o6' / 'overlays.png'}, {tmp_path / 'o6' / 'masks.json'}"
    for n in range(8): (album / f"bad{n}\x1b[2J\n.png").touch()
    assert run("m", album, "a cat", "--out", tmp_path / "o7") == 3
    seen = capsys.readouterr()
    assert "and 3 more" in seen.err and "\x1b" not in seen.err + seen.out and len(seen.err.splitlines()) == 7


@pytest.mark.parametrize("words, said", [(["m", "ALBUM/a.png", "ALBUM/none.jpg", "cat"], "missing"), (["m", "ALBUM/a.png", "cat", "ALBUM/b/a.png"], "name pictures first"), (["ALBUM/a.png", "cat", "dog"], "the model comes first"),
    (["m", "ALBUM", " "], "is empty"), (["m", "ALBUM", "x" * 20_000], "over 10,000"), (["m", "ALBUM/none", "cat"], "is missing"), (["m", "ALBUM", "--sentences", "ALBUM/none.txt"], "is missing"), (["m", "ALBUM/b/broken.jpg", "cat"], "is not a picture"), (["ALBUM", "cat", "dog"], "holds no tuned.safetensors")])
def test_mistakes_are_one_line(album, tmp_path, quick, capsys, words, said):
    assert run(*(w.replace("ALBUM", str(album)) for w in words), "--out", tmp_path / "out") == 1
    only, = capsys.readouterr().err.splitlines()
    assert only.startswith("barleria_segment: ") and said in only and not (tmp_path / "out").exists() and not quick.asked


def test_pictures_before_sentences(album, tmp_path, quick):
    assert run("m", album / "a.png", album / "b" / "a.png", f"{album}/b/", "a cat", "b", "--out", tmp_path / "out") == 3
    assert [s for _, s in quick.asked] == ["a cat", "b"] * 3


def test_a_model_that_ships(tmp_path, capsys):
    Image.fromarray(split_scene("train", 3).image).save(tmp_path / "a.png")
    assert run("barleria-tiny", tmp_path / "a.png", "a circle", "--out", tmp_path / "out") == 0
    assert run("barleria-tyni", tmp_path / "a.png", "a circle", "--out", tmp_path / "out") == 1
    assert "barleria-tiny" in capsys.readouterr().err


def test_ctrl_c_and_on(tmp_path):
    "A process that is interrupted says one line, and the same command goes on to the same files."
    for n in range(12): picture(tmp_path / "photos" / f"{n:02}.png", n, (90, 120))
    (tmp_path / "s.txt").write_text("a red circle\nthe square\n")
    (tmp_path / "cmd.py").write_text("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom barleria_nb.cli import barleria_segment\nbarleria_segment()\n")
    words = lambda out: [sys.executable, str(tmp_path / "cmd.py"), "barleria-tiny", str(tmp_path / "photos"), "--sentences", str(tmp_path / "s.txt"), "--format", "png", "coco", "--device", "cpu", "--out", str(tmp_path / out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    first = subprocess.Popen(words("stopped"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 300
    records = lambda: len(list((tmp_path / "stopped" / "records").glob("[0-9]*.jsonl")))
    while first.poll() is None and time.time() < end and records() < 3: time.sleep(.01)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert (first.returncode, said) == (1, "barleria_segment: stopped; the same command does what is missing.\n")
    kept = records()
    assert 3 <= kept < 12 and not [p for p in (tmp_path / "stopped").rglob(".*") if p.name != ".lock"]
    done = subprocess.run(words("stopped"), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"24 masks of 12 pictures, {12 - kept} of them new" in done.stdout, done.stderr
    assert len([n for n in tree(tmp_path / "stopped") if n.startswith("masks/")]) == 24


def test_export(tmp_path, quick, monkeypatch, capsys):
    export = pytest.importorskip("barleria_nb.export")
    def fake(model, out):
        assert model is quick.model
        return export.Exported(Path(out), 4_200_000, 1e-6)
    monkeypatch.setattr(export, "export_onnx", fake)
    cli.barleria_export.__wrapped__("barleria-tiny", str(tmp_path / "x"))
    assert "4.2 MB" in capsys.readouterr().out


def test_shares_of_the_bench(monkeypatch, tmp_path, capsys):
    "`--shares` reaches the bench as numbers; without methods there is nothing to run."
    from barleria_nb import bench
    got = {}
    class Spy:
        blank = {"x-tiny@1%": "no size reaches it"}
        def __init__(self, *a, **kw): got.update(kw)
        def run(self): raise core.BarleriaError("spied")
    monkeypatch.setattr(bench, "Bench", Spy), monkeypatch.setattr(cli, "open_data", lambda *_: type("Set", (), dict(root=tmp_path)))
    f = cli.barleria_bench.__wrapped__
    parse = lambda *w: {k: v for k, v in vars(anno_parser(f, prog="barleria_bench").parse_args([*w])).items() if k not in ("pdb", "xtra")}
    with pytest.raises(SystemExit): f(**parse("--out", str(tmp_path / "b"), "--methods", "snf", "--shares", "0.5", "2"))
    assert got["shares"] == [.5, 2] and "x-tiny@1% is left out: no size reaches it" in capsys.readouterr().err
    with pytest.raises(SystemExit): f(**parse("--out", str(tmp_path / "b"), "--shares", "1"))
    assert "--shares is for runs" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: parse("--out", "b", "--shares", "0")
    assert e.value.code == 2


def test_lists_of_the_command():
    from barleria_nb import inference, training
    assert (set(cli.SUFFIXES), cli.KINDS, cli.PRECISIONS, cli.LOGGERS, cli.METRICS) == (photos.SUFFIXES, photos.FILES, training.PRECISIONS, training.LOGGERS, inference.METRICS)
    assert not photos.SUFFIXES & photos.FOREIGN
