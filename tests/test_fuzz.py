"""Files that nobody wrote on purpose: sound ones, mutated. Whatever they say, reading them works or ends in one `BarleriaError` line; a bad record is listed among the set's `problems`.

Each case is made by a random number generator seeded with its kind and number, and runs in a child process that no case may bring down. The child ends itself (with a traceback) when a case
takes more than `SECONDS` of the processor, or stands still for `STILL`. Its address space may grow by `ROOM` over what its imports need (RLIMIT_AS), the resident peak of each case is held against `PEAK` (Linux tells it), and an error that
hides a MemoryError counts as a failure. An audit hook sees every file opened: nothing may be written, and nothing read but the case's own files, installed code and the package's own data.

One case again, with its traceback: `python tests/test_fuzz.py images 1234`."""
import copy
import ctypes
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from barleria_nb.core import BarleriaError, read_json
from barleria_nb.data import FORMATS, MAX_PIXELS, RefDataset, RefSet, collate, decode_mask, read_image, tokenize
from barleria_nb.inference import picture, tuned_file
from barleria_nb.metrics import largest_object_baseline, random_object_baseline
from barleria_nb.model import build_model, config, load_tuned, read_about, read_note, save_tuned
from common import line

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "refshapes-sample"
MB = 2**20
SECONDS, STILL = 10, 30  # for one case: of the processor; by the clock, on which a busy machine may not work for us at all
ROOM = 2500 * MB  # address space, over what is there before the first case
PEAK = dict(annotations=1500 * MB, images=2000 * MB, tuned=300 * MB, segmentations=600 * MB)  # resident; a picture may have 50 million pixels, as 64-bit numbers for a while
SHORT = dict(annotations=110, images=130, tuned=40, segmentations=250)
LONG = dict(annotations=7000, images=6000, tuned=2000, segmentations=5000)

# ---------------------------------------------------------------- mutating text and trees

PATHS = ("../../etc/passwd", "/etc/passwd", "../secret.png", "../../secret.png", "images/../../secret.png", "/dev/zero", "/dev/stdin", "/proc/self/environ", "~", ".", "..", "", "/", "//",
    "a\0b", "\udc80", "\ud800", "file:///etc/passwd", "C:\\x.png", "con", "x" * 300, "x/" * 3000, "train_00000.png/", "train_00000.png\n", "./train_00000.png", "|id", "val_00000.png")
TEXTS = ("&nbsp;", "＆nbsp;", "&#0;", "&#xD800;", "&#99999999999;", "&" * 1000, "\x1b[36m", "Â\xa0", "\x00", "\x07" * 2000, "\u200b", "\u202e", "\ud800", "a\nb", "a\r\u2028b", "👩‍👩‍👧‍👦", "e" + "\u0301" * 500,
    "<start_of_text>", "<end_of_text>", "İ", "ﷺ", "$x$", "%s%n", "{0}", "nan", "-1", "1e9", "٣", " 7 ", "7_0", "0x10", "train", "vall", "ß" * 400, "x" * 20_000, "word " * 20_000, "Ã©" * 20_000)
NUMBERS = (0, -1, 1, 2, -0.0, .5, 1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -2**63, 10**30, 10**400, 7071, 50_000_000)
SOUGHT = ("id", "image_id", "ann_id", "ref_id", "sent_id", "category_id", "file_name", "height", "width", "segmentation", "size", "counts", "sent", "sentences", "split", "name", "images", "annotations", "categories")


class Late:
    "Values that `json.dumps` cannot write: kept as text and put in afterwards."
    def __init__(self): self.texts = []

    def __call__(self, text):
        self.texts.append(text)
        return f"@late{len(self.texts) - 1}@"

    def dumps(self, tree): return re.sub(r'"@late(\d+)@"', lambda m: self.texts[int(m[1])], json.dumps(tree))


def junk(rng, late):
    "Any value; now and then one that is very long or very deep."
    kind = rng.choices(range(8), (8, 8, 5, 5, 4, 2, 1, .3))[0]
    if kind == 0: return rng.choice(NUMBERS)
    if kind == 1: return rng.choice((None, True, False, [], {}, [[]], [None], {"": 0}, "", " "))
    if kind == 2: return rng.choice(TEXTS)
    if kind == 3: return rng.choice(PATHS)
    if kind == 4: return [junk(rng, late) for _ in range(rng.randint(0, 4))] if rng.random() < .5 else {rng.choice(SOUGHT + TEXTS[:9]): junk(rng, late) for _ in range(rng.randint(0, 4))}
    if kind == 5: return late(rng.choice(("9" * 4299, "9" * 4300, "-" + "9" * 4301, "1e999", "-1e-999", "0." + "3" * 5000, "[" + ",".join(["9" * 4300] * 20) + "]")))
    if kind == 6: return late("[" * (n := rng.choice((2, 60, rng.randint(900, 1000), 100_000))) + rng.choice(("", "0", '"x"')) + "]" * n)
    return late(rng.choice(("[" + "0," * 999_999 + "0]", "[" + "{}," * 49_999 + "{}]", '"' + "x" * 10**6 + '"', '{"a":' * 950 + "0" + "}" * 950, "[" + "[0,0,9,0,9,9]," * 2500 + "[0,0,9,0,9,9]]")))


def nodes(tree):
    "Every (container, key) below a tree."
    found, open_ = [], [tree]
    while open_:
        at = open_.pop()
        if isinstance(at, (dict, list)):
            for key in at if isinstance(at, dict) else range(len(at)):
                found.append((at, key))
                open_.append(at[key])
    return found


AIMED = dict(sent=TEXTS, split=TEXTS, file_name=PATHS, height=NUMBERS, width=NUMBERS, shape=([], [0], [-1], [1.5], [2**63], [1] * 9000, [2**32, 2**32], "x"), name=TEXTS)


def mutate(rng, tree, late, sought=SOUGHT):
    "Change one place of a tree, mostly at a key that its reader looks at."
    found = nodes(tree)
    if not found: return
    aimed = [n for n in found if n[1] in sought] if rng.random() < .7 else []
    if aimed:
        key = rng.choice(sorted({k for _, k in aimed}))
        aimed = [n for n in aimed if n[1] == key]
    at, key = rng.choice(aimed or found)
    how = rng.randrange(9)
    if key in AIMED and rng.random() < .5: at[key] = rng.choice(AIMED[key])
    elif how == 0: del at[key]
    elif how == 1: at[key] = junk(rng, late)
    elif how == 2: at[key] = copy.deepcopy((lambda a, k: a[k])(*rng.choice(found)))  # from elsewhere
    elif how == 3 and isinstance(at, list): at.insert(key, copy.deepcopy(at[key]))
    elif how == 4 and isinstance(at, dict): at[rng.choice((key.upper(), key + " ", rng.choice(sought), rng.choice(TEXTS)))] = at.pop(key)
    elif how == 5 and isinstance(at, list): rng.shuffle(at)
    elif how == 6: at[key] = [at[key]] if rng.random() < .5 else {key: at[key]} if isinstance(key, str) else str(at[key])
    elif type(at[key]) in (int, float): at[key] = rng.choice((-at[key], at[key] + rng.choice((-1, 1, .5)), at[key] * 10**rng.randint(1, 20), at[key] / 3 if abs(at[key]) < 2**70 else .1, str(at[key])[:4000], rng.choice(NUMBERS)))
    elif isinstance(at[key], str): at[key] = rng.choice((at[key][:len(at[key]) // 2], at[key] * 2, at[key] + rng.choice(TEXTS), rng.choice(PATHS if key == "file_name" else TEXTS), spoil_text(rng, at[key])))
    else: at[key] = junk(rng, late)


def spoil_text(rng, text):
    "Change, drop, add or double a letter."
    i = rng.randrange(len(text) + 1)
    return text[:i] + rng.choice(("", rng.choice("0oO@`pP~\x7fé\u0100 \\\""), text[i:i + 1] * 2, chr(rng.randrange(48, 112)))) + text[i + rng.randint(0, 2):]


def spoil_json(rng, text):
    "Change JSON as text: a byte-order mark, a key said twice, a comma too many, other encodings."
    keys, how = list(re.finditer(r'"[a-z_]+": ', text)), rng.randrange(8)
    at = rng.choice(keys).start() if keys else 0
    if how == 0: return "\ufeff".encode() * rng.randint(1, 2) + text.encode()
    if how == 1: return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-7")))
    if how == 2: return (text[:at] + rng.choice(keys)[0] + rng.choice(("null", "7", '"x"', "[]", "NaN")) + ", " + text[at:]).encode() if keys else b"{}"
    if how == 3: return (text[:at] + rng.choice((",", "}", "]", "[", "{", '"', "\\", "/* a */", "\0", "'", "\n" * 99, "true", "-")) + text[at:]).encode()
    if how == 4: return re.sub(r"\d+", lambda m: m[0] if rng.random() > .02 else rng.choice(("9" * 5000, "01", "1e5", "-0", "1.", ".5", "Infinity", "0x1")), text).encode()
    if how == 5: return (text + rng.choice((text, "null", "]", "\0" * 50, "\n" * 5))).encode()
    if how == 6: return rng.choice((b"", b" ", b"null", b"0", b'""', b"[]", b"{}", b"[{}]", b"[[]]", b"\xff\xfe", b"[" * 5000, b'{"a":' * 100_000, b'{"images": [], "annotations": []}'))
    return spoil_bytes(rng, text.encode())


EXTREMES = [struct.pack(f, n) for f, n in (("<H", 0), ("<H", 65535), ("<I", 0), ("<I", 2**32 - 1), ("<I", 2**31), (">I", 2**31 - 1), (">I", 100_000), (">H", 65500), (">H", 7000), (">I", 7000), ("<I", 7000), ("<H", 7000), ("<Q", 2**63))]


def spoil_bytes(rng, content, head=0):
    "Cut, flip, overwrite, drop, double or add bytes; with `head`, mostly among the first so many."
    content = bytearray(content)
    place = lambda: rng.randrange(min(head, len(content)) if head and rng.random() < .8 else len(content)) if content else 0
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, how, extreme, n = place(), rng.randrange(8), rng.choice(EXTREMES), rng.choice((4, 64, 1000))
        if not content: break
        if how == 0: del content[at:]
        elif how == 1: content[at] ^= 1 << rng.randrange(8)
        elif how == 2: content[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif how == 3: content[at:at + len(extreme)] = extreme
        elif how == 4: del content[at:at + rng.choice((1, 4, 100, 3000))]
        elif how == 5: content[at:at] = content[at:at + rng.choice((1, 4, 100, 3000))]
        elif how == 6: content[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        else: content[at:at + n] = bytes(n)
    return bytes(content)


# ---------------------------------------------------------------- trying

class Wrong(AssertionError):
    "A promise not kept."


def holds(true, what):
    if not true: raise Wrong(what)


@dataclass
class Tried:
    "The calls of one case: how they ended."
    notes:list = field(default_factory=list)

    def __call__(self, call, *words):
        "The call's value, or None after one `BarleriaError` line that holds `words`."
        try: value = call()
        except BarleriaError as e:
            text, chain = str(e), e
            holds(len(text.splitlines()) == 1 and len(text) <= 500, f"refused, but in {len(text.splitlines())} lines of {len(text)} letters: {text[:300]!r}")
            for w in words: holds(str(w) in text, f"refused without naming {w}: {text!r}")
            while chain := chain.__cause__ or chain.__context__: holds(not isinstance(chain, MemoryError), f"refused for want of memory: {text!r}")
            self.notes.append("refused")
        else:
            self.notes.append("works")
            return value


# ---------------------------------------------------------------- kind 1: annotations

def cut_sample():
    "The sample's own records, of three of its images."
    content, refs = (json.loads((SAMPLE / n).read_text()) for n in ("instances.json", "refs.json"))
    content["images"] = [i for i in content["images"] if i["file_name"] in ("train_00000.png", "val_00000.png", "testA_00000.png")]
    kept = {i["id"] for i in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    return content, [r for r in refs if r["image_id"] in kept]


class Annotations:
    "A folder whose two JSON files, now and then its other files too, are spoilt."
    def own(self, root): return root / "set", self.pristine

    def __init__(self, base):
        self.base, self.content, self.refs = base, *cut_sample()
        for note in self.content["annotations"][::2]:  # both forms of a mask
            found = decode_mask(note["segmentation"], 128, 128)
            note["segmentation"] = json.loads(json.dumps(dict(size=[128, 128], counts=coco.encode(np.asfortranarray(found))["counts"].decode())))
        self.pristine, self.names = base / "pristine" / "images", [i["file_name"] for i in self.content["images"]]
        self.pristine.mkdir(parents=True)
        for name in self.names: shutil.copy(SAMPLE / "images" / name, self.pristine)
        for secret in (base, base / "pristine"): shutil.copy(SAMPLE / "images" / self.names[0], secret / "secret.png")

    def make(self, rng, root):
        "The folder to read: below `root`, which holds a secret beside it."
        folder, late = root / "set", Late()
        files = rng.random() < .15
        folder.mkdir()
        if files: shutil.copytree(self.pristine, folder / "images")
        else: (folder / "images").symlink_to(self.pristine)
        (root / "secret.png").write_bytes((self.base / "secret.png").read_bytes())
        trees = copy.deepcopy([self.content, self.refs])
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4, 10))): mutate(rng, trees if rng.random() < .1 else rng.choice(trees), late)
        trees += [None] * (2 - len(trees))
        for name, tree in zip(("instances.json", "refs.json"), trees):
            text = late.dumps(tree)
            (folder / name).write_bytes(spoil_json(rng, text) if rng.random() < .12 else text.encode())
        if files: self.spoil_files(rng, root, folder)
        return folder

    def spoil_files(self, rng, root, folder):
        path, how = folder / "images" / rng.choice(self.names), rng.randrange(8)
        if how == 7: path = folder / rng.choice(("instances.json", "refs.json", "images"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if how == 0: path.symlink_to(rng.choice((root / "secret.png", "/etc/passwd", "../../secret.png", "/dev/zero", path.name, "val_00000.png")))
        if how == 1: os.mkfifo(path)
        if how == 2: path.mkdir()
        if how == 3: path.write_bytes(b"")
        if how == 4: path.write_bytes(spoil_bytes(rng, (SAMPLE / "images" / path.name).read_bytes()))
        if how == 5: Image.new("RGB", (64, 32)).save(path)
        if how == 7: path.symlink_to(rng.choice((path.name, "nowhere", ".", "images")))

    def use(self, rng, folder, tried):
        data = tried(lambda: RefSet.read(folder))
        tried(lambda: RefSet.read(folder, "nowhere"))
        if data is None: return
        for told in data.problems: holds(len(told.splitlines()) == 1 and len(told) <= 600, f"a problem told in {len(told.splitlines())} lines of {len(told)} letters: {told[:300]!r}")
        holds(len(data) and all(r.sentences for r in data), "a ref without sentences")
        for known in [[r.ref_id for r in data], [s.sent_id for r in data for s in r.sentences]]: holds(len(known) == len(set(known)), "an id twice")
        for ref in data:
            mask = data.mask(ref)  # was checked when it was read
            holds(mask.shape == (ref.height, ref.width) and mask.dtype == np.uint8 and mask.max() == 1, f"ref {ref.ref_id}: a mask of {mask.shape}, at most {mask.max()}")
        items, broken = RefDataset(data, 32), data.check()  # the sentences were checked, too
        holds(all(len(b.splitlines()) == 1 for b in broken), "an image's trouble told in several lines")
        for i in rng.sample(range(len(items)), min(4, len(items))):
            ref, item = items.pair(i)[0], tried(lambda: items[i])
            if item is not None: holds(collate([item])["mask"].shape == (1, 1, 32, 32), "an item of another shape")
            holds((item is None) <= bool(broken), f"item {i} was refused, but `check` found nothing")
        tried(lambda: data.split("nowhere"), "nowhere")
        if rng.random() < .2:
            for baseline in (largest_object_baseline, random_object_baseline): tried(lambda: baseline(data))


# ---------------------------------------------------------------- kind 2: pictures

def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sound_pictures():
    "One scene in every format that is read, in the kinds that need care, and in some that are not read."
    whole = Image.open(SAMPLE / "images" / "train_00000.png").convert("RGB")
    small, exif = whole.crop((80, 0, 115, 24)), Image.Exif()
    exif[274], exif[270] = 6, "a red circle"
    rgba = small.convert("RGBA")
    rgba.putalpha(small.convert("L"))
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    found = dict(sample=(SAMPLE / "images" / "train_00000.png").read_bytes(), png=saved(small, "PNG", exif=exif), palette=saved(small.quantize(9), "PNG", transparency=3), alpha=saved(rgba, "PNG"),
        deep=saved(deep, "PNG"), bits=saved(small.convert("1"), "PNG"), jpeg=saved(small, "JPEG", exif=exif), progressive=saved(whole, "JPEG", progressive=True), cmyk=saved(small.convert("CMYK"), "JPEG"),
        webp=saved(small, "WEBP"), lossless=saved(rgba, "WEBP", lossless=True), bmp=saved(small, "BMP"), gif=saved(small, "GIF"), frames=saved(small.quantize(), "GIF", save_all=True, append_images=[small.rotate(9).quantize()]),
        ppm=saved(small, "PPM"), pgm=saved(deep, "PPM"), pbm=b"P1 3 2\n0 1 0\n1 0 1\n", float=saved(small.convert("F"), "TIFF"), whole=saved(small.convert("I"), "TIFF"), lab=saved(Image.new("LAB", (9, 7)), "TIFF"))
    for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"): found[f"tiff {how}"] = saved(small, "TIFF", compression=how)
    for kind in ("ICO", "TGA", "PCX", "SGI", "EPS", "PDF", "DDS"): found[kind] = saved(small, kind)
    return found


def resized(rng, content):
    "Other numbers where the format keeps its size, with a right check sum."
    w, h = (rng.choice((0, 1, 7, 36, 7000, 7071, 7072, 65500, 65535, 100_000, 2**31 - 1, 2**31, 2**32 - 1)) for _ in range(2))
    if rng.random() < .5: w = 35
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        rest = content[24:29] if rng.random() < .6 else bytes([rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1)), 0, 0, rng.choice((0, 1))])
        body = b"IHDR" + struct.pack(">II", w, h) + rest
        return content[:12] + body + struct.pack(">I", zlib.crc32(body)) + content[33:]
    marks = [m.start() for m in re.finditer(b"\xff[\xc0-\xc2]\x00", content)] if content[:2] == b"\xff\xd8" else []
    if marks: return content[:(m := marks[0]) + 5] + struct.pack(">HH", h & 65535, w & 65535) + content[m + 9:]
    if content[:3] == b"GIF": return content[:6] + struct.pack("<HH", w & 65535, h & 65535) + content[10:]
    if content[:2] == b"BM": return content[:18] + struct.pack("<II", w, h) + content[26:]
    if content[:1] == b"P": return re.sub(rb"\A(P\d\s+)\d+ \d+", lambda m: m[1] + b"%d %d" % (w, h), content)
    return spoil_bytes(rng, content, 64)


class Images:
    "A picture, spoilt."
    def own(self, root): return root,

    def __init__(self, base): self.base, self.sound = base, sound_pictures()

    def make(self, rng, root):
        name = rng.choice(sorted(self.sound))
        content, how = self.sound[name], rng.randrange(9)
        if how <= 4: content = spoil_bytes(rng, content, rng.choice((0, 64, 300)))
        elif how <= 6: content = resized(rng, content)
        elif how == 7: content = content[:(n := rng.randrange(len(content)))] + self.sound[rng.choice(sorted(self.sound))][n:]
        else: content = rng.choice((b"", b"\0", bytes(5000), content[:rng.randrange(30)], rng.randbytes(300), content, b"P6 2 2 255 " + rng.randbytes(9), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))
        path = root / f"picture.{rng.choice(('png', 'jpg', 'eps', 'x'))}"
        path.write_bytes(content)
        return path

    def use(self, rng, path, tried):
        def fits(x):
            if x is None: return
            holds(x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and 0 < x.size <= 3 * MAX_PIXELS and x.flags.writeable, f"a picture of {x.dtype} {x.shape}")
        found = tried(lambda: read_image(path), path)
        fits(found)
        size = rng.choice(((24, 35), (35, 24), (128, 128), (1, 1))) if found is None or rng.random() < .5 else found.shape[:2]
        again = tried(lambda: read_image(path, size), path)
        fits(again)
        holds(again is None or again.shape[:2] == tuple(size), "a picture of another size than asked for")
        with path.open("rb") as f:
            try: image = Image.open(f, formats=FORMATS)
            except Exception: return
            other = tried(lambda: picture(image))
        holds((other is None) == (found is None) and (found is None or (other == found).all()), "a path and an open picture differ")


# ---------------------------------------------------------------- kind 3: tuned models

class Tuned:
    "A saved model, its bytes, header or note spoilt."
    def own(self, root): return root,

    def __init__(self, base):
        self.base, self.whole = base, []
        for name in ("frozen-tiny", "snf-tiny"):
            save_tuned(build_model(config(name, pretrained=False)), base / "whole.safetensors", dict(score=.5))
            self.whole.append((base / "whole.safetensors").read_bytes())

    def make(self, rng, root):
        whole, late, how = rng.choice(self.whole), Late(), rng.randrange(8)
        size = struct.unpack("<Q", whole[:8])[0]
        text, body = whole[8:8 + size].decode(), whole[8 + size:]
        header = json.loads(text)
        if how <= 2:  # the note
            note = json.loads(header["__metadata__"]["barleria"])
            for _ in range(rng.choice((0, 1, 1, 2, 5))): mutate(rng, note, late, ("format", "config", "towers", "extra", "name", "backbone", "tuners", "head", "gst", "size", "words", "pretrained", "epochs", "batch", "lr", "drop"))
            said = late.dumps(note)
            if rng.random() < .2: said = spoil_json(rng, said).decode(errors="replace")
            header["__metadata__"]["barleria"] = said
            text = json.dumps(header)
        elif how <= 4:  # the table of tensors
            tensors = ("dtype", "shape", "data_offsets", "__metadata__", "barleria", rng.choice(sorted(header)))
            for _ in range(rng.choice((1, 1, 2, 5))): mutate(rng, header, late, tensors)
            if rng.random() < .3: (header.get(rng.choice(sorted(header))) or {}).update(dtype=rng.choice(("F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "Q", "")))
            text = late.dumps(header)
        elif how == 5: text = spoil_bytes(rng, text.encode(), 3000).decode(errors="surrogateescape")
        elif how == 6: body = self.spoil_numbers(rng, body)
        content = (text := text.encode(errors="surrogateescape")) + body
        content = struct.pack("<Q", len(text) if rng.random() < .9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, len(content), 2**24, 2**24 + 1, 2**63, 2**64 - 1))) + content
        if how == 7: content = spoil_bytes(rng, content, rng.choice((0, 16)))
        path = root / "tuned.safetensors"
        path.write_bytes(content)
        return path

    def spoil_numbers(self, rng, body):
        at = rng.randrange(len(body) // 4) * 4
        return body[:at] + rng.choice((struct.pack("<f", float("nan")), struct.pack("<f", 1e38), b"\0\0\x80\xff", rng.randbytes(4))) + body[at + 4:] + rng.choice((b"", b"", b"\0" * 4))

    def use(self, rng, path, tried):
        model = tried(lambda: load_tuned(tuned_file(path.parent)), path)
        about = tried(lambda: read_about(path), path)
        tried(lambda: read_note(path), path)
        if model is None: return
        holds(about is not None and not model.training and model.config.name == about["config"]["name"], "a model that does not say what it is")
        holds(all(t.isfinite().all() for t in model.state_dict().values()), "a number that is not finite")


# ---------------------------------------------------------------- kind 4: segmentations

SAID = [dict(sent_id=1, sent="a thing")]


class Segmentations:
    "One spoilt segmentation: painted at once, and as an annotation beside a sound one."
    def own(self, root): return root, self.base

    def __init__(self, base):
        self.base = base
        (base / "images").mkdir()
        (base / "images" / "a.png").touch()

    def make(self, rng, root):
        h, w = rng.choice(((1, 1), (rng.randint(1, 20), rng.randint(1, 20)), (rng.randint(1, 20), rng.randint(1, 20)), (1, rng.randint(1, 5000)), (3000, 1), (480, 640)))
        if rng.random() < .02: h, w = rng.choice(((50_000_000, 1), (1, 50_000_000), (7000, 7000), (2**40, 1), (0, 5), (-3, -3), (2**62, 2**62)))
        late, mask = Late(), np.random.default_rng(rng.randrange(2**32)).random((max(1, min(h, 60)), max(1, min(w, 60)))) < rng.choice((.1, .5, .99))
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        edges = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 2]))
        seg = rng.choice((dict(packed, counts=packed["counts"].decode()), dict(size=list(mask.shape), counts=[int(n) for n in np.diff(np.r_[0, edges])]), None))
        if seg is None: seg = [[self.number(rng, (w, h)[i % 2]) for i in range(2 * rng.randint(2, 9))] for _ in range(rng.randint(1, 4))]
        tree = [seg]
        for _ in range(rng.choice((0, 0, 1, 1, 3))): mutate(rng, tree, late, ("size", "counts"))
        if rng.random() < .3 and isinstance(tree and tree[0], dict): tree[0] = {**tree[0], "counts": rng.choice((self.letters(rng), [rng.choice(NUMBERS) for _ in range(9)], [0] * 9 + [h * w], [h * w, 0, 0]))}
        text = late.dumps(tree[0] if tree else None)
        content = dict(images=[dict(id=1, file_name="a.png", height=h, width=w), dict(id=2, file_name="a.png", height=4, width=4)],
            annotations=[dict(id=1, image_id=1, segmentation="@late0@"), dict(id=2, image_id=2, segmentation=[[0, 0, 4, 0, 4, 4]])])
        (root / "images").symlink_to(self.base / "images")
        (root / "instances.json").write_text(json.dumps(content).replace('"@late0@"', text))
        (root / "refs.json").write_text(json.dumps([dict(ref_id=i, ann_id=i, image_id=i, split="x", sentences=[dict(sent_id=i, sent="a thing")]) for i in (1, 2)]))
        try: return json.loads(text), h, w, root
        except (RecursionError, ValueError): return None, h, w, root

    def number(self, rng, side):
        return rng.choice((rng.randint(0, max(0, min(side, 9999))), rng.uniform(-abs(side), 2 * abs(side)), rng.randint(-3, 3), float(side), side)) if rng.random() < .97 else rng.choice(NUMBERS[:-5])

    def letters(self, rng): return "".join(rng.choices("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmno" + rng.choice(("", "p\x7f é\0")), k=rng.choice((0, 1, 5, 40, 3000))))

    def use(self, rng, made, tried):
        seg, h, w, root = made
        mask = tried(lambda: decode_mask(seg, h, w))
        if mask is not None:
            holds(mask.shape == (h, w) and mask.dtype == np.uint8 and mask.max() <= 1, f"a mask of {mask.dtype} {mask.shape}, at most {mask.max()}")
            if isinstance(seg, dict) and isinstance(seg["counts"], list): holds((np.repeat(np.arange(len(seg["counts"])) % 2, seg["counts"]) == mask.T.ravel()).all(), "not what the run lengths say")
        data = tried(lambda: RefSet.read(root))
        if data is None: return
        good = mask is not None and mask.any()
        holds([r.ref_id for r in data] == [1, 2][not good:] and len(data.problems) == (not good), f"a mask that {'can' if good else 'cannot'} be painted, and the reader says {data.problems}")
        holds(all(len(p.splitlines()) == 1 and len(p) <= 600 for p in data.problems), f"a problem told in {len(data.problems[0])} letters" if data.problems else "")


# ---------------------------------------------------------------- what must be seen

def sin(call, cause=None):
    "Call, and hide what comes of it behind one sound line."
    try: call()
    except Exception as e: cause = e
    raise BarleriaError("it is broken; mend it.") from cause


def tell(text): raise BarleriaError(text)


SINS = {  # what a case may not do, and a word of how that is told
    "reads": (lambda path: sin(lambda: open("/etc/passwd")), "read /etc/passwd"), "writes": (lambda path: sin((path / "x").touch), "wrote"), "starts": (lambda path: sin(lambda: subprocess.run(["true"])), "subprocess.Popen"),
    "grows": (lambda path: sin(lambda: np.ones(400 * MB, np.uint8)), "MB of memory"), "bursts": (lambda path: sin(lambda: np.ones(4 * ROOM, np.uint8)), "for want of memory"),
    "chatters": (lambda path: tell("two\nlines"), "in 2 lines"), "drones": (lambda path: tell("x" * 600), "600 letters"), "stumbles": (lambda path: {}["x"], "KeyError"),
    "stalls": (lambda path: threading.Event().wait(), "Timeout"), "spins": (lambda path: sum(iter(int, 1)), f"code {-signal.SIGPROF}"), "crashes": (lambda path: ctypes.string_at(0), "Segmentation fault")}


class Sinner:
    "Breaks one rule."
    def __init__(self, base, what): self.base, self.what = base, what

    def own(self, root): return root,

    def make(self, rng, root): return root

    def use(self, rng, path, tried): tried(lambda: SINS[self.what][0](path))


# ---------------------------------------------------------------- the child

KINDS = dict(annotations=Annotations, images=Images, tuned=Tuned, segmentations=Segmentations)
SINNERS = {what: partial(Sinner, what=what) for what in SINS}
FORBIDDEN = re.compile(r"os\.(system|exec|posix_spawn|fork|forkpty|spawn|remove|rename|rmdir|mkdir|link|symlink|truncate|chmod|chown)|subprocess\.|socket\.|shutil\.|pickle\.|urllib\.|ftplib\.|http\.|tempfile\.")


class Watch:
    "Sees what the process opens while a case is running."
    def __init__(self):
        self.on, self.seen, self.own = False, [], []
        self.readable = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, ROOT / "barleria_nb", ROOT / "data")]
        sys.addaudithook(self.hook)

    def within(self, path, folders): return any(path == f or path.startswith(f + os.sep) for f in folders)

    def hook(self, event, args):
        if not self.on: return
        if FORBIDDEN.match(event): self.seen.append(f"{event} {args!r:.200}")
        if event != "open" or isinstance(args[0], int): return
        self.on = False
        path, writes = os.path.realpath(os.fsdecode(args[0])), (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or not self.within(path, [*self.own, *self.readable]): self.seen.append(f"{'wrote' if writes else 'read'} {path}")
        self.on = True


class Meter:
    "Resident peak of a case, in bytes; 0 where the system does not tell."
    def __init__(self):
        try: self.status, self.clear = os.open("/proc/self/status", os.O_RDONLY), os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError: self.status = None

    def read(self, what): return int(re.search(rb"%b:\s+(\d+)" % what, os.pread(self.status, 5000, 0))[1]) * 1024

    def start(self):
        if self.status is None: return
        os.write(self.clear, b"5")  # the peak starts anew
        self.before = self.read(b"VmRSS")

    def peak(self): return 0 if self.status is None else self.read(b"VmHWM") - self.before

    def limit(self):
        "Let the address space grow by `ROOM` and no further."
        if self.status is not None: resource.setrlimit(resource.RLIMIT_AS, (self.read(b"VmSize") + ROOM,) * 2)


def one_case(kind, n, maker, watch, meter):
    "How a case ended: whether its first reading works, is refused, or any step failed; and what went wrong."
    rng, root = random.Random(f"{kind} {n}"), maker.base / "case"
    root.mkdir()
    made, tried = maker.make(rng, root), Tried()
    watch.own, watch.seen = [os.path.realpath(p) for p in maker.own(root)], []
    faulthandler.dump_traceback_later(STILL, exit=True), signal.setitimer(signal.ITIMER_PROF, SECONDS)
    meter.start()
    try:
        watch.on = True
        maker.use(rng, made, tried)
        watch.on = False
        holds(not watch.seen, f"{watch.seen[:3]}")
        holds((peak := meter.peak()) <= PEAK.get(kind, 300 * MB), f"{peak // MB} MB of memory")
        return tried.notes[0], "", peak
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt): raise
        watch.on = False
        at = [f for f in traceback.extract_tb(e.__traceback__) if "barleria_nb" in f.filename and "tests" not in f.filename]
        return "failed", (f"{type(e).__name__}: {' '.join(str(e).split())[:400]}" + (f" at {Path(at[-1].filename).name}:{at[-1].lineno} in {at[-1].name}" if at else "") + ("\n" + traceback.format_exc() if len(sys.argv) == 3 else "")), 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0), faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(root)


def child(plan, base, out):
    "Run `plan`, a list of (kind, first, last), and write a line per case."
    warnings.simplefilter("ignore"), faulthandler.enable(), faulthandler.register(signal.SIGPROF, chain=True), torch.set_num_threads(1)
    makers, watch, meter = {}, Watch(), Meter()
    for kind, *_ in plan:
        (base / kind).mkdir()
        makers[kind] = (KINDS | SINNERS)[kind](base / kind)
    tokenize(["a warm start"]), Image.init()
    meter.limit()
    for kind, first, last in plan:
        for n in range(first, last): print(json.dumps([kind, n, *one_case(kind, n, makers[kind], watch, meter)]), file=out, flush=True)


# ---------------------------------------------------------------- the parent

def fuzz(wanted, folder):
    "Run so many cases of each kind in a child, and go on in a new one after the case that ended it; kind -> list of (number, end, what, peak)."
    plan, found, again = [[kind, 0, n] for kind, n in wanted.items()], {kind: [] for kind in wanted}, set()
    for life in range(8):
        base = folder / str(life)
        base.mkdir(parents=True)
        done = subprocess.run([sys.executable, "-X", "faulthandler", __file__, json.dumps(plan), str(base), "child"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
        for kind, *row in map(json.loads, done.stdout.splitlines()): found[kind].append(row)
        shutil.rmtree(base, ignore_errors=True)
        plan = [[kind, len(found[kind]), n] for kind, n in wanted.items() if len(found[kind]) < n]
        if not plan: break
        kind, n, _ = plan[0]
        if "Timeout" in done.stderr and (kind, n) not in again:  # a busy machine may have let it wait: once more
            again.add((kind, n))
            continue
        told = [l for l in done.stderr.splitlines() if "barleria_nb" in l or "Timeout" in l or "Fatal" in l or "Error" in l]
        found[kind].append([n, "failed", f"the child ended with code {done.returncode}: {' | '.join(told)[:600] or done.stderr[-600:]}", 0])
        plan[0][1] += 1
    return found


def judge(kind, rows, wanted, capsys):
    "No failure; a line of counts."
    wrong = [(n, what) for n, end, what, _ in rows if end == "failed"]
    ends, peak = Counter(end for _, end, *_ in rows), max(row[3] for row in rows) // MB
    with capsys.disabled(): print(f"\n{kind}: {len(rows):,} cases; " + ", ".join(f"{n:,} {end}" for end, n in sorted(ends.items())) + f"; at most {peak} MB")
    fresh = [f"python tests/test_fuzz.py {kind} {n}\n    {what}" for n, what in wrong]
    assert not fresh, f"{len(fresh)} cases of {len(rows)}:\n" + "\n".join(fresh[:20])
    assert len(rows) == wanted and min(ends["works"], ends["refused"]) > wanted / 40  # neither all sound nor all broken


@pytest.fixture(scope="module")
def quick(tmp_path_factory): return fuzz(SHORT, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(quick, kind, capsys): judge(kind, quick[kind], SHORT[kind], capsys)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files(kind, tmp_path, capsys): judge(kind, fuzz({kind: LONG[kind]}, tmp_path)[kind], LONG[kind], capsys)


@pytest.mark.long
def test_sins_are_seen(tmp_path):
    "Were a case to break a rule, it would show."
    for what, rows in fuzz({what: 1 for what in SINS}, tmp_path).items():
        (n, end, told, _), = rows
        assert end == "failed" and SINS[what][1] in told, (what, told)


# ---------------------------------------------------------------- found here, and mended

@pytest.fixture
def small(tmp_path):
    "Read a folder of two refs, the first one changed by hand."
    def read(sent="a thing", split="x", segmentation=((0, 0, 4, 0, 4, 4),), want=None):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
        notes = [dict(id=i, image_id=1, segmentation=s) for i, s in ((1, segmentation), (2, [[0, 0, 4, 0, 4, 4]]))]
        (tmp_path / "instances.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="a.png", height=4, width=4)], annotations=notes)))
        (tmp_path / "refs.json").write_text(json.dumps([dict(ref_id=i, ann_id=i, image_id=1, split=s, sentences=[dict(sent_id=i, sent=t)]) for i, s, t in ((1, split, sent), (2, "x", "a thing"))]))
        return RefSet.read(tmp_path, want)
    return read


@pytest.mark.parametrize("split", ["a\nb", "x" * 20_000, [0] * 5000])
@pytest.mark.parametrize("later", [False, True])
def test_names_of_splits_in_a_message(small, split, later): line(lambda: small(split=split).split("nowhere") if later else small(split=split, want="nowhere"), "nowhere")


@pytest.mark.parametrize("counts", [[10**4000], [int("9" * 4300)] * 2])
def test_endless_run_lengths(counts): line(lambda: decode_mask(dict(size=[4, 4], counts=counts), 4, 4), "run lengths")


@pytest.mark.parametrize("sent", ["\x1b[36m", "Â\xa0", "＆nbsp;", "\x07" * 80_000 + "cat"])
def test_sentence_of_nothing(small, sent):
    "One bad record goes to `problems`, the other goes on."
    data = small(sent=sent)
    assert len(RefDataset(data, 8)) == 1 and "ref 1" in data.problems[0]


def test_every_length_refuses_the_same_sentences(small): assert len(RefDataset(small(sent="\x07" * 10_000 + "cat"), 8, 9)) == 2


def test_annotations_in_a_pipe(tmp_path):
    "A pipe would keep us waiting, a device would never end."
    os.mkfifo(tmp_path / "refs.json")
    pipe = os.open(tmp_path / "refs.json", os.O_RDWR)
    os.write(pipe, b"[]")
    end = threading.Timer(.5, os.close, [pipe])
    end.start()
    try: line(lambda: read_json(tmp_path / "refs.json"), "refs.json", "no file")
    finally: end.join()


def respoken(path, change):
    "Change the header of a saved model, its note unpacked."
    save_tuned(build_model(config("frozen-tiny", pretrained=False)), path)
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:8 + size])
    note = json.loads(header["__metadata__"]["barleria"])
    change(header, note)
    text = json.dumps(header | {"__metadata__": {"barleria": json.dumps(note)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size:])
    return path


def test_setting_of_two_lines(tmp_path):
    path = respoken(tmp_path / "tuned.safetensors", lambda header, note: note["config"].update({"a\nb": 1}))
    line(lambda: load_tuned(path), path, "another configuration")


def test_endless_shape(tmp_path):
    def change(header, note):
        tensor = next(t for n, t in header.items() if n != "__metadata__")
        tensor["shape"] = [1] * 5000 + tensor["shape"]
    path = respoken(tmp_path / "tuned.safetensors", change)
    line(lambda: load_tuned(path), path, "tensor")


if __name__ == "__main__":
    if sys.argv[-1] == "child":
        out, sys.stdout = sys.stdout, sys.stderr
        child(json.loads(sys.argv[1]), Path(sys.argv[2]), out)
    else:
        with tempfile.TemporaryDirectory() as folder: child([[sys.argv[1], int(sys.argv[2]), int(sys.argv[2]) + 1]], Path(folder), sys.stdout)
