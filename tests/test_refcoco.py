"Fetching RefCOCO from a server on this machine that has every fault a network can have, and reading files that were made to do harm."
import errno
import hashlib
import io
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from barleria_nb import refcoco
from barleria_nb.core import BarleriaError
from barleria_nb.data import RefDataset, RefSet
from barleria_nb.metrics import evaluate
from barleria_nb.refcoco import Letterboxed, Mirror, fetch_refcoco, letterboxed, plan_lines, read_refer_pickle, served
from common import line

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
OFFICIAL = dict(train=(8, 12, 4), val=(4, 6, 2))
NUMBERS = dict(train=(1, 2, 3, 4), val=(5, 6))
name = "COCO_train2014_{:012}.jpg".format


def jpeg(n, h=48, w=64):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (h, w, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def row(n, k=0, split="val"):
    box = [8. + k, 8, 40, 8, 40, 30, 8, 30]
    return dict(ref_id=10 * n + k, ann_id=10 * n + k, image_id=n, split=split, sentences=[dict(sent=f"thing {n} {j}", raw="Thing", sent_id=100 * n + 10 * k + j, tokens=["thing"]) for j in range(2 - k)],
        raw_anns=json.dumps(dict(id=10 * n + k, image_id=n, category_id=1, iscrowd=0, segmentation=[box])), raw_image_info=json.dumps(dict(id=n, file_name=name(n), height=48, width=64, license=4)))


def rows(split): return [row(n, k, split) for n in NUMBERS[split] for k in (0, 1)]


def parquet(records):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


class Site:
    "A server: `files` by path, `faults` by path, each used up by one question; and what was asked."
    def __init__(self):
        self.files, self.faults, self.asked, self.gate, site = {}, {}, [], threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass

            def do_GET(self):
                site.asked.append(self.path)
                body, queue = site.files.get(self.path), site.faults.get(self.path)
                fault = (queue.pop(0) if isinstance(queue, list) else queue) if queue else None
                try: getattr(self, f"do_{fault[0]}")(body, *fault[1:]) if isinstance(fault, tuple) else self.say(fault or (200 if body is not None else 404), b"" if fault else body or b"no")
                except (BrokenPipeError, ConnectionResetError): pass

            def say(self, code, body=b"", send=None, **headers):
                self.send_response(code)
                for k, v in dict(dict(Content_Length=len(body)), **headers).items():
                    if v is not None: self.send_header(k.replace("_", "-"), str(v))
                self.end_headers()
                self.wfile.write(body if send is None else send)

            def do_half(self, body): self.say(200, body, body[:len(body) // 2])
            def do_other(self, body, other): self.say(200, other)
            def do_packed(self, body): self.say(200, body, Content_Encoding="gzip")
            def do_huge(self, body): self.say(200, body, Content_Length=10**12)
            def do_to(self, body, where, stated=None): self.say(302, Location=where, X_Linked_Etag=stated and f'"{stated}"')
            def do_chunks(self, body): self.say(200, b"3\r\nabc\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")
            def do_mute(self, body): time.sleep(1.5)

            def do_endless(self, body):
                self.say(200, Content_Length=None)
                for _ in range(10**5): self.wfile.write(b"x" * 2**16)

            def do_drip(self, body):
                self.say(200, body, b"")
                for b in body: self.wfile.write(bytes([b])), self.wfile.flush(), time.sleep(.05)

            def do_creep(self, body):
                for b in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 500: self.wfile.write(bytes([b])), self.wfile.flush(), time.sleep(.05)

            def do_gate(self, body): site.gate.wait(60), self.say(200, body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()
        self.at = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, split, records=None):
        self.files[f"/t/m/{split}.parquet"] = parquet(records or rows(split))
        return self


@pytest.fixture(autouse=True)
def here_only(monkeypatch):
    "No test may reach another machine, and none need wait long."
    real = socket.create_connection

    def connect(address, *a, **k):
        assert address[0] == "127.0.0.1", f"a test asked for {address}"
        return real(address, *a, **k)

    monkeypatch.setattr(socket, "create_connection", connect)
    for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "BARLERIA_TABLES", "BARLERIA_PICTURES"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(refcoco, "PAUSE", .01)
    monkeypatch.setattr(refcoco, "PATIENCE", .5)


@pytest.fixture
def site():
    s = Site().put("train").put("val")
    for n in range(1, 7): s.files[f"/i/{name(n)}"] = jpeg(n)
    yield s
    s.server.shutdown()
    s.server.server_close()


def get(site, out, splits="val", **k):
    mirror = Mirror("m", {s: (f"{s}.parquet", None) for s in OFFICIAL})
    return fetch_refcoco("refcoco", out, splits, **dict(dict(tables=f"{site.at}/t", pictures=f"{site.at}/i", mirror=mirror, official=OFFICIAL), **k))


def left(out): return sorted(p.name for p in out.rglob("*") if p.is_file() and p.name.startswith(".") and p.name != ".lock")


def whole(out, splits=("val",)):
    data = RefSet.read(out)
    assert data.splits == {s: OFFICIAL[s] for s in splits} and not data.problems and not data.check() and not left(out)
    return data


# ---------------------------------------------------------------- all goes well

def test_a_set_arrives_and_is_read_back(site, tmp_path):
    card = get(site, tmp_path / "a", None)
    data = whole(tmp_path / "a", ("train", "val"))
    assert card["splits"] == OFFICIAL and card["images"]["count"] == 6 and not card["missing"] and data.refs[0].category == "person"
    assert card["records"]["val"]["sha256"] == hashlib.sha256(site.files["/t/m/val.parquet"]).hexdigest()
    assert json.loads((tmp_path / "a" / "card.json").read_text())["images"] == card["images"] and "| val | 4 | 6 | 2 |" in (tmp_path / "a" / "README.md").read_text()
    site.asked.clear()
    assert get(site, tmp_path / "a", "val")["images"] == card["images"] and site.asked == []  # both splits stay, nothing is fetched
    whole(tmp_path / "a", ("train", "val"))


def test_only_the_images_of_the_split(site, tmp_path):
    get(site, tmp_path / "a")
    assert sorted(site.asked) == sorted(["/t/m/val.parquet", *(f"/i/{name(n)}" for n in (5, 6))])
    assert sorted(p.name for p in (tmp_path / "a" / "images").iterdir()) == [name(5), name(6)]


def test_a_dry_run_asks_for_tables_alone(site, tmp_path):
    plan = get(site, tmp_path / "a", None, dry_run=True)
    assert sorted(site.asked) == ["/t/m/train.parquet", "/t/m/val.parquet"] and not (tmp_path / "a" / "refs.json").exists()
    assert plan["tables"] == sum(len(v) for k, v in site.files.items() if "parquet" in k)
    assert (plan["images"], plan["there"], plan["bytes"]) == (6, 0, 6 * refcoco.IMAGE_BYTES) and "estimated" in "\n".join(plan_lines(plan))


def test_addresses_from_the_environment(site, tmp_path, monkeypatch):
    monkeypatch.setenv("BARLERIA_TABLES", f"{site.at}/t/"); monkeypatch.setenv("BARLERIA_PICTURES", f"{site.at}/i")
    get(site, tmp_path / "a", tables=None, pictures=None)
    whole(tmp_path / "a")
    for bad in ("file:///etc", "ftp://x/y", "/etc", "http://"): line(lambda: get(site, tmp_path / "b", tables=bad), "base address")


def test_a_part_is_asked_for_and_said(site, tmp_path):
    card = get(site, tmp_path / "a", None, limit=1)
    assert card["splits"] == dict(train=(2, 3, 1), val=(2, 3, 1)) and "not" in (tmp_path / "a" / "README.md").read_text().split("\n")[2]
    assert RefSet.read(tmp_path / "a").splits == card["splits"]
    get(site, tmp_path / "a", None)
    whole(tmp_path / "a", ("train", "val"))
    line(lambda: get(site, tmp_path / "a", limit=1), "whole splits", "another folder")


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("fault, asked", [([500], 2), ([503, 502, 429], 4), ([("half",)], 2), ([("mute",)], 2)], ids=str)
def test_faults_that_pass(site, tmp_path, fault, asked):
    path = f"/i/{name(5)}"
    site.faults[path] = fault
    get(site, tmp_path / "a")
    whole(tmp_path / "a")
    assert site.asked.count(path) == asked


@pytest.mark.parametrize("fault, asked, words", [(404, 1, "404 Not Found"), (403, 1, "403"), (500, 4, "500 Internal Server Error, 4 times"), (("half",), 4, "broke off after"), (("drip",), 4, "bytes a second"),
    (("mute",), 4, "timed out"), (("creep",), 4, "timed out"), (("huge",), 1, "is 1,000,000,000,000 bytes long"), (("endless",), 1, "is over"), (("packed",), 1, "compressed"), (("other", b"<html>not here</html>"), 1, "no whole picture"),
    (("other", jpeg(5)[:-300]), 1, "no whole picture"), (("other", jpeg(5, 64, 48)), 1, "64×48 pixels, its annotation says 48×64"), (("to", f"/i/{name(5)}"), 3, "again and again"),
    (("to", "file:///etc/passwd"), 1, "no address"), (("to", "ftp://127.0.0.1/x"), 1, "less safe")], ids=lambda x: str(x)[:30])
def test_faults_that_stay(site, tmp_path, monkeypatch, fault, asked, words):
    path, told = f"/i/{name(5)}", []
    site.faults[path] = fault
    monkeypatch.setattr(refcoco, "PICTURE", 2**20)
    line(lambda: get(site, tmp_path / "a", tell=told.append), "1 of 2 images are missing", name(5), words, "run it again")
    assert len(told) == 1 and told[0].startswith(name(5)) and words in told[0] and site.asked.count(path) == asked
    assert [p.name for p in (tmp_path / "a" / "images").iterdir()] == [name(6)] and not left(tmp_path / "a")
    data = RefSet.read(tmp_path / "a")  # what is there can be used, what is not there is named
    assert len(data) == 2 and len(data.problems) == 2
    site.faults.clear(), site.asked.clear()
    get(site, tmp_path / "a")
    whole(tmp_path / "a")
    assert site.asked == [path]


def test_redirects_that_lead_somewhere(site, tmp_path):
    site.files["/elsewhere"] = site.files[f"/i/{name(5)}"]
    site.faults[f"/i/{name(5)}"] = ("to", "/elsewhere")
    get(site, tmp_path / "a")
    whole(tmp_path / "a")


def test_never_from_https_to_http():
    request = refcoco.urllib.request.Request("https://127.0.0.1/x")
    with pytest.raises(refcoco._Failed, match="less safe"): refcoco._Redirects().redirect_request(request, None, 302, "", {}, "http://127.0.0.1/x")


def test_a_table_of_another_sum(site, tmp_path):
    wrong, right = "0" * 64, hashlib.sha256(site.files["/t/m/val.parquet"]).hexdigest()
    line(lambda: get(site, tmp_path / "a", mirror=Mirror("m", dict(val=("val.parquet", wrong)))), right, wrong, "published")
    assert not (tmp_path / "a" / "tables").exists() and not left(tmp_path / "a")
    site.files["/cdn"] = site.files["/t/m/val.parquet"]
    site.faults["/t/m/val.parquet"] = ("to", "/cdn", wrong)
    line(lambda: get(site, tmp_path / "a"), wrong, "server's own")
    site.faults["/t/m/val.parquet"] = ("to", "/cdn", right)
    get(site, tmp_path / "a", mirror=Mirror("m", dict(val=("val.parquet", right))))
    (tmp_path / "a" / "tables" / "val.parquet").write_bytes(b"rotten")  # and on the disk
    get(site, tmp_path / "a", mirror=Mirror("m", dict(val=("val.parquet", right))))
    whole(tmp_path / "a")


def test_a_table_that_cannot_be_had(site, tmp_path):
    site.faults["/t/m/val.parquet"] = 404
    line(lambda: get(site, tmp_path / "a"), "404", "tables", "val.parquet")
    (tmp_path / "a" / "tables").mkdir()
    (tmp_path / "a" / "tables" / "val.parquet").write_bytes(site.files["/t/m/val.parquet"])  # put there by hand
    get(site, tmp_path / "a")
    whole(tmp_path / "a")


def test_nobody_there(site, tmp_path, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{s.getsockname()[1]}"
    line(lambda: get(site, tmp_path / "a", tables=nowhere), "refused", "4 times")
    monkeypatch.setattr(refcoco, "IN_A_ROW", 3)
    line(lambda: get(site, tmp_path / "a", None, pictures=nowhere, workers=1), "3 images in a row", "0 are there")
    assert not (tmp_path / "a" / "refs.json").exists()


def test_a_folder_with_some_of_the_images(site, tmp_path, monkeypatch):
    monkeypatch.setattr(refcoco, "IN_A_ROW", 1)
    line(lambda: get(site, tmp_path / "a", images=pack(tmp_path / "i", {name(6): jpeg(6)}, "folder")), "1 of 2", "is not in")
    get(site, tmp_path / "a")
    whole(tmp_path / "a")
    assert f"/i/{name(6)}" not in site.asked


# ---------------------------------------------------------------- the disk, and being stopped

def test_no_space(site, tmp_path, monkeypatch):
    real, count = os.fsync, []

    def full(fd):
        count.append(fd)
        if len(count) > 2: raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    monkeypatch.setattr(os, "fsync", full)
    line(lambda: get(site, tmp_path / "a", workers=1), "the disk is full", "free some space")
    assert not left(tmp_path / "a") and len(list((tmp_path / "a" / "images").iterdir())) == 1 and not (tmp_path / "a" / "refs.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    site.asked.clear()
    get(site, tmp_path / "a")
    whole(tmp_path / "a")
    assert len(site.asked) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission(site, tmp_path):
    (tmp_path / "a").mkdir(mode=0o500)
    line(lambda: get(site, tmp_path / "a"), "may not write")


def test_a_file_in_the_way(site, tmp_path):
    (tmp_path / "a").write_text("x")
    line(lambda: get(site, tmp_path / "a"), "cannot be filled")


def test_damaged_files_and_leftovers(site, tmp_path):
    get(site, tmp_path / "a")
    images = tmp_path / "a" / "images"
    (images / name(5)).write_bytes(jpeg(5)[:400])
    (images / f".{name(6)[:-4]}-0123abcd.jpg").write_bytes(b"half")
    (images / "mine.txt").write_text("stays")
    site.asked.clear()
    get(site, tmp_path / "a")
    whole(tmp_path / "a")
    assert site.asked == [f"/i/{name(5)}"] and (images / "mine.txt").exists()


CHILD = """
import signal, sys
from barleria_nb import refcoco
from barleria_nb.refcoco import Mirror, fetch_refcoco
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background process is started deaf to it
at, out = sys.argv[1:]
fetch_refcoco("refcoco", out, tables=f"{at}/t", pictures=f"{at}/i", workers=2, mirror=Mirror("m", {s: (f"{s}.parquet", None) for s in ("train", "val")}), official=dict(train=(8, 12, 4), val=(4, 6, 2)))
"""


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.02)
    assert true()


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)], ids=lambda s: s.name)
def test_stopped_and_started_again(site, tmp_path, sign):
    for n in (3, 4, 5, 6): site.faults[f"/i/{name(n)}"] = ("gate",)
    out = tmp_path / "a"
    child = subprocess.Popen([sys.executable, "-c", CHILD, site.at, out], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | dict(no_proxy="127.0.0.1"))
    until(lambda: (out / "images" / name(2)).exists() and all(f"/i/{name(n)}" in site.asked for n in (3, 4)))
    line(lambda: get(site, out), "another process")
    child.send_signal(sign)
    site.gate.set()
    err = child.communicate(timeout=60)[1].decode()
    assert child.returncode and (sign == signal.SIGKILL or "KeyboardInterrupt" in err)
    assert not (out / "refs.json").exists() and not (out / "images" / name(6)).exists()
    site.faults.clear(), site.asked.clear()
    get(site, out, None)
    whole(out, ("train", "val"))
    assert not any(p.startswith("/t") or name(1) in p or name(2) in p for p in site.asked)


# ---------------------------------------------------------------- what the tables say

def test_not_the_published_set(site, tmp_path):
    site.put("val", rows("val")[:-1])
    line(lambda: get(site, tmp_path / "a"), "3 refs (published: 4)", "not the published set")
    assert not list((tmp_path / "a" / "images").iterdir())


def spoilt(column, **changes): return lambda r: r | {column: json.dumps(json.loads(r[column]) | changes)}


@pytest.mark.parametrize("spoil, words", [
    *[(spoilt("raw_image_info", file_name=bad), "file_name") for bad in ("../../x.jpg", "/etc/passwd", f"../{name(6)}", f"{name(6)}/../../x", name(5), f"{name(6)}\n", name(6).upper(), "", None, 7, ["x"], "C:\\x.jpg", f"./{name(6)}", "COCO_train2014_٠٠٠٠٠٠٠٠٠٠٠٦.jpg")],
    (spoilt("raw_image_info", height=0), "size of 0"), (spoilt("raw_image_info", height=10**9), "size of"), (spoilt("raw_image_info", id=9), "another object's"), (spoilt("raw_anns", image_id=5), "another object's"),
    (spoilt("raw_anns", segmentation=None), "outline"), (spoilt("raw_anns", id="x"), "'id'"), (lambda r: r | dict(raw_anns="[" * 10**5), "raw_anns"), (lambda r: r | dict(raw_anns="[]"), "raw_anns"), (lambda r: r | dict(raw_image_info=None), "raw_image_info"),
    (lambda r: r | dict(ref_id=50), "there already"), (lambda r: r | dict(sentences=[]), "sentences"), (lambda r: r | dict(sentences=[dict(sent=None, sent_id=1)]), "without text"),
    (spoilt("raw_image_info", height=47), "two different records")])
def test_rows_that_lie(site, tmp_path, spoil, words):
    records = rows("val")
    records[-1] = spoil(records[-1])
    site.put("val", records)
    line(lambda: get(site, tmp_path / "a"), words, "row 3")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {".lock", "val.parquet"}


@pytest.mark.parametrize("column", refcoco.COLUMNS)
def test_a_missing_column_is_named(site, tmp_path, column):
    site.put("val", [{k: v for k, v in r.items() if k != column} for r in rows("val")])
    line(lambda: get(site, tmp_path / "a"), "has no column", column)


def test_files_that_are_no_tables(site, tmp_path):
    sound = site.files["/t/m/val.parquet"]
    for n, bad in enumerate((b"", b"PAR1", sound[:-9], sound[9:], b"PAR1" + b"\xff" * 99 + b"PAR1", parquet([dict(a=1)]))):
        site.files["/t/m/val.parquet"] = bad
        line(lambda: get(site, tmp_path / f"{n}"), "val.parquet")
    site.files["/t/m/val.parquet"] = b""
    rng = random.Random(0)
    for n in range(80):
        body = bytearray(sound)
        for _ in range(rng.choice((1, 2, 9))): body[-rng.randrange(1, len(body))] = rng.randrange(256)
        (tmp_path / "m.parquet").write_bytes(body)
        try: refcoco.read_table(tmp_path / "m.parquet", "val", refcoco._Records())
        except BarleriaError as e: assert "\n" not in str(e) and len(str(e)) < 500


def test_tables_that_unfold(tmp_path, monkeypatch):
    monkeypatch.setattr(refcoco, "UNPACKED", 2**26)
    ids, big = pa.array(range(1000)), pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["z" * 2**20]))
    table = pa.Table.from_pylist([row(n) for n in range(1000)])
    nested = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), pa.StructArray.from_arrays([big, ids], ["sent", "sent_id"]))
    for column, values in (("raw_anns", big), ("sentences", nested)):
        bomb = table.set_column(table.schema.get_field_index(column), column, values)
        pq.write_table(bomb, tmp_path / "b.parquet", dictionary_pagesize_limit=2**24, compression="zstd")
        assert (tmp_path / "b.parquet").stat().st_size < 2**17
        line(lambda: refcoco.read_table(tmp_path / "b.parquet", "val", refcoco._Records()), "unfolds to more")
    pq.write_table(pa.table({c: pa.array([0] * 300_000) for c in refcoco.COLUMNS}), tmp_path / "r.parquet")
    line(lambda: refcoco.read_table(tmp_path / "r.parquet", "val", refcoco._Records()), "rows")


def test_without_pyarrow(site, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line(lambda: get(site, tmp_path / "a"), "pyarrow", "pip install", "refer")


def test_mistakes(site, tmp_path):
    line(lambda: fetch_refcoco("refcoc", tmp_path / "a"), "Did you mean refcoco")
    line(lambda: fetch_refcoco("refcoco", tmp_path / "a", "vall"), "Did you mean val")
    line(lambda: fetch_refcoco("refcocog-google", tmp_path / "a"), "refs(google).p", "refer", refcoco.ARCHIVED)
    line(lambda: get(site, tmp_path / "a", limit=0), "at least 1")
    line(lambda: get(site, tmp_path / "a", images=tmp_path / "gone"), "gone", "check the path")
    get(site, tmp_path / "a")
    mirror = Mirror("m", dict(val=("val.parquet", None)))
    line(lambda: fetch_refcoco("refcoco+", tmp_path / "a", "val", tables=f"{site.at}/t", mirror=mirror, official=OFFICIAL), "holds refcoco", "another folder")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "refs.json").write_text("[]")
    line(lambda: get(site, tmp_path / "b"), "another kind")
    assert (tmp_path / "b" / "refs.json").read_text() == "[]"


def test_the_published_tables_are_named_in_full():
    for set_, mirror in refcoco.MIRRORS.items():
        assert set(mirror.files) == set(refcoco.OFFICIAL[set_]) and len(mirror.folder.split("/resolve/")[1].split("/")[0]) == 40
        assert all(f.endswith(".parquet") and (s is None or len(s) == 64) for f, s in mirror.files.values())
    assert [c["id"] for c in refcoco.CATEGORIES][-1] == 90 and len(refcoco.CATEGORIES) == 80
    for s in ("refcoco", "refcoco+"): assert sum(t for _, t, _ in refcoco.OFFICIAL[s].values()) == dict(refcoco=142210, **{"refcoco+": 141564})[s]
    assert sum(r for r, _, _ in refcoco.OFFICIAL["refcocog"].values()) == sum(r for r, _, _ in refcoco.OFFICIAL["refcocog-google"].values()) == 49822


# ---------------------------------------------------------------- folders and archives

def release(split="val"):
    "An original release: its two files."
    refs = [{k: v for k, v in r.items() if not k.startswith("raw")} for r in rows(split)]
    instances = dict(annotations=[json.loads(r["raw_anns"]) for r in rows(split)], images=[json.loads(r["raw_image_info"]) for r in rows(split)[::2]], categories=[dict(id=1, name="person")])
    return {"refs(unc).p": pickle.dumps(refs, 2), "instances.json": json.dumps(instances).encode()}


def pack(path, members, kind):
    if kind == "folder":
        for n, data in members.items():
            (path / n).parent.mkdir(parents=True, exist_ok=True)
            (path / n).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for n, data in members.items(): z.writestr(n, data)
    else:
        with tarfile.open(path, f"w:{kind}") as t:
            for n, data in members.items():
                info = tarfile.TarInfo(n)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "", "gz"])
def test_an_original_release(tmp_path, kind):
    refer = pack(tmp_path / "r", {f"refcoco/{k}": v for k, v in release().items()} | {"refcoco+/instances.json": b"no"}, kind)
    images = pack(tmp_path / "i", {f"train2014/{name(n)}": jpeg(n) for n in (6, 5, 1)}, kind)
    card = fetch_refcoco("refcoco", tmp_path / "a", "val", refer=refer, images=images, official=OFFICIAL)
    whole(tmp_path / "a")
    assert set(card["records"]) == {"refs(unc).p", "instances.json"} and not (tmp_path / "a" / "images" / name(1)).exists()


def test_the_archived_release_of_g_ref(tmp_path):
    "Its zip holds both partitions in one folder, and perhaps what a Mac adds; of all objects those that refs name are kept."
    files = release()
    instances = json.loads(files["instances.json"])
    instances["annotations"].append(instances["annotations"][0] | dict(id=999))
    members = {"refs(umd).p": pickle.dumps([]), "refs(google).p": files["refs(unc).p"], "instances.json": json.dumps(instances)}
    refer = pack(tmp_path / "refcocog.zip", {f"__MACOSX/refcocog/._{k}": b"no" for k in members} | {f"refcocog/{k}": v for k, v in members.items()}, "zip")
    images = pack(tmp_path / "i", {f"train2014/{name(n)}": jpeg(n) for n in (6, 5, 1)}, "zip")
    card = fetch_refcoco("refcocog-google", tmp_path / "a", "val", refer=refer, images=images, official=OFFICIAL)
    kept = json.loads((tmp_path / "a" / "instances.json").read_text())["annotations"]
    assert card["partition"] == "google" and len(kept) == card["splits"]["val"][0] and 999 not in [a["id"] for a in kept]


@pytest.mark.parametrize("kind", ["zip", "", "gz"])
def test_archives_that_climb_out(site, tmp_path, kind):
    evil = {f"../{name(5)}": jpeg(5), f"/{tmp_path}/{name(6)}": jpeg(6), f"a/../../{name(5)}": jpeg(5), f"..\\{name(5)}": jpeg(5), f"C:\\x\\{name(5)}": jpeg(5), "../../.bashrc": b"evil"}
    line(lambda: get(site, tmp_path / "a" / "b", images=pack(tmp_path / "evil", evil, kind)), "2 of 2 images are missing")
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".jpg" or p.name == ".bashrc"]
    sound = pack(tmp_path / "sound", evil | {f"x/{name(n)}": jpeg(n) for n in (5, 6)}, kind)
    get(site, tmp_path / "a" / "b", images=sound)
    whole(tmp_path / "a" / "b")
    assert len([p for p in tmp_path.rglob("*.jpg")]) == 2


def test_archives_with_links_and_bombs(site, tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(jpeg(5))
    with tarfile.open(tmp_path / "l.tar", "w") as t:
        for kind, n in ((tarfile.SYMTYPE, 5), (tarfile.LNKTYPE, 6)):
            info = tarfile.TarInfo(name(n))
            info.type, info.linkname = kind, str(tmp_path / "secret")
            t.addfile(info)
    line(lambda: get(site, tmp_path / "a", images=tmp_path / "l.tar"), "2 of 2 images are missing")
    monkeypatch.setattr(refcoco, "PICTURE", 2**20)
    bomb = pack(tmp_path / "b.zip", {name(5): bytes(2**25), name(6): jpeg(6)}, "zip")
    line(lambda: get(site, tmp_path / "a", images=bomb), "1 of 2", "unfolds to over")
    body = bytearray((tmp_path / "b.zip").read_bytes())
    at = body.index(b"\x00" * 8) if b"\x00" * 8 in body else 60
    body[at:at + 8] = b"\xff" * 8
    for n, bad in enumerate((bytes(body), bytes(body[:500]), b"", b"PK\x05\x06" + bytes(18), b"BZh9" + bytes(99))):
        (tmp_path / "bad").write_bytes(bad)
        line(lambda: get(site, tmp_path / f"{n}", images=tmp_path / "bad"))


def test_a_picture_larger_than_it_says(site, tmp_path):
    out = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(out, "PNG")  # small to store, 240 MB as colours
    site.files[f"/i/{name(5)}"] = out.getvalue()
    line(lambda: get(site, tmp_path / "a"), "1 of 2", "9000×9000")


def test_releases_that_are_none(tmp_path):
    go = lambda members, *words: line(lambda: fetch_refcoco("refcoco", tmp_path / "a", "val", refer=pack(tmp_path / "r.zip", members, "zip"), images=tmp_path, official=OFFICIAL), *words)
    sound = release()
    go({"x": b""}, "refs(unc).p", "is not in")
    go({"refs(unc).p": sound["refs(unc).p"]}, "instances.json", "is not in")
    go(sound | {"instances.json": b"{"}, "not JSON")
    go(sound | {"instances.json": b"[" * 10**6}, "not JSON")
    go(sound | {"instances.json": b"[]"}, "COCO file")
    go(sound | {"instances.json": b'{"images": 7}'[:-2] + b"[[], {}]}"}, "record 0")
    go(sound | {"refs(unc).p": pickle.dumps([7])}, "ref 0")
    go(sound | {"refs(unc).p": pickle.dumps([dict(split="val", ann_id=[1])])}, "record 0")
    go(sound | {"refs(unc).p": pickle.dumps([])}, "not the published set")
    go(sound | {"refs(unc).p": pickle.dumps([OrderedDict()])}, "OrderedDict", "nothing in it was run")


SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "refcoco-sample"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real refs is not on this machine")
def test_real_refs_and_photographs_by_both_roads(site, tmp_path):
    known, instances = RefSet.read(SAMPLE, ("testA", "testB")), json.loads((SAMPLE / "instances.json").read_text())
    ids = {r.ref_id for r in known if r.file_name.startswith("COCO_train2014")}
    refs = [r for r in json.loads((SAMPLE / "refs.json").read_text()) if r["ref_id"] in ids]
    known = [r for r in known if r.ref_id in ids]
    find = {k: {x["id"]: x for x in instances[k]} for k in ("images", "annotations")}
    table = [r | dict(raw_anns=json.dumps(find["annotations"][r["ann_id"]]), raw_image_info=json.dumps(find["images"][r["image_id"]])) for r in refs]
    official = {s: (len(g), sum(len(r.sentences) for r in g), len({r.image_id for r in g})) for s in ("testA", "testB") for g in [[r for r in known if r.split == s]]}
    for s in official: site.put(s, [r for r in table if r["split"] == s])
    for r in known: site.files[f"/i/{r.file_name}"] = (SAMPLE / "images" / r.file_name).read_bytes()
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 0))
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(instances))
    get(site, tmp_path / "a", None, mirror=Mirror("m", {s: (f"{s}.parquet", None) for s in official}), official=official)
    fetch_refcoco("refcoco", tmp_path / "b", refer=tmp_path, images=SAMPLE, official=official)
    for out in (tmp_path / "a", tmp_path / "b"):
        data = RefSet.read(out)
        assert data.splits == official and not data.problems and not data.check()
        for mine, theirs in zip(sorted(data, key=lambda r: r.ref_id), sorted(known, key=lambda r: r.ref_id)):
            assert (mine.sentences, mine.category, mine.file_name, mine.height) == (theirs.sentences, theirs.category, theirs.file_name, theirs.height) and (data.mask(mine) == RefSet(SAMPLE, []).mask(theirs)).all()


# ---------------------------------------------------------------- pickles

class Runs:
    "Leaves a folder behind when unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_pickles_that_run_something(tmp_path):
    target = str(tmp_path / "ran").encode()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.p").write_bytes(pickle.dumps([{"a": Runs(tmp_path / "ran")}], protocol))
        line(lambda: read_refer_pickle(tmp_path / "x.p"), "posix.mkdir", "nothing in it was run")
    cases = {b"cos\nsystem\n(S'true'\ntR.": "os.system", b"(S'x'\nios\nsystem\n.": "INST", b"(cos\nsystem\nS'x'\no.": "os.system", b"\x82\x01.": "EXT1", b"\x83\x01\x00.": "EXT2", b"\x84\x01\x00\x00\x00.": "EXT4",
        b"Pevil\n.": "PERSID", b"I1\nQ.": "BINPERSID", b"]}b.": "BUILD", b"])R.": "REDUCE", b"])\x81.": "NEWOBJ", b"\x8c\x02os\x8c\x06system\x93.": "os.system", b"])}\x92.": "NEWOBJ_EX", b"]2.": "DUP", b"\x96" + bytes(8) + b".": "BYTEARRAY8",
        b"\x97.": "NEXT_BUFFER", b"B" + b"\xff" * 4 + b".": "BINBYTES", b"\x8f.": "EMPTY_SET", b"\xff.": "instruction"}
    for body, words in cases.items():
        (tmp_path / "x.p").write_bytes(body.replace(b"true", b"mkdir " + target))
        line(lambda: read_refer_pickle(tmp_path / "x.p"), words, "x.p, byte")
    assert not (tmp_path / "ran").exists()


def test_pickles_that_eat_memory(tmp_path, monkeypatch):
    laughs = b"]q\x00" + b"".join(b"](" + b"h" + bytes([n]) * 1 + (b"h" + bytes([n])) * 9 + b"eq" + bytes([n + 1]) for n in range(60)) + b"."
    cases = dict(laughs=b"(" + laughs[:-1] + b"l.", deep=b")" + b"\x85" * 10**5 + b"a.", deeper=b"](" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"e.", own=b"]q\x00h\x00a.", memo=b"]r\xff\xff\xff\xff.", huge=b"X\xff\xff\xff\xff.",
        eight=b"\x8d" + b"\xff" * 8 + b".", frame=b"\x95" + b"\xff" * 8 + b"].", digits=b"(I" + b"9" * 10**6 + b"\nl.", mark=b"(e.", empty=b"", dot=b".", get=b"h\x00.", key=b"(](]d.", odd=b"(I1\nd.", noline=b"I7",
        text=b"(lp0\nS'\\x'\na.", float=b"Fx\n.", scalar=b"K\x01.", under=b"(]0.", top=b"\x87.", uni=b"V\\ud800\\\n.", notlist=b"}]a.", intokey=b"}}]s.")
    for label, body in cases.items():
        (tmp_path / "x.p").write_bytes(body)
        start = time.monotonic()
        try: read_refer_pickle(tmp_path / "x.p")
        except BarleriaError as e: assert "\n" not in str(e) and len(str(e)) < 300
        else: assert label in ("memo", "frame"), label  # a number that nobody uses
        assert time.monotonic() - start < 5
    monkeypatch.setattr(refcoco, "STEPS", 100)
    (tmp_path / "x.p").write_bytes(b"N" * 101)
    line(lambda: read_refer_pickle(tmp_path / "x.p"), "over 100 instructions")
    monkeypatch.setattr(refcoco, "PICKLE", 50)
    line(lambda: read_refer_pickle(tmp_path / "x.p"), "over 50 bytes")
    line(lambda: read_refer_pickle(tmp_path), "no file")
    line(lambda: read_refer_pickle(tmp_path / "gone"), "cannot be read")


def test_plain_pickles_are_what_pickle_reads(tmp_path):
    rng = random.Random(1)

    def thing(depth=0):
        kind = rng.randrange(10 if depth < 5 else 7)
        if kind < 7: return (None, True, False, rng.choice((0, -1, 255, 256, 65535, 65536, -2**31, 2**31, 2**63, -2**200)), rng.uniform(-9, 9), "", "ä\n'\"\\" * rng.randrange(99))[kind]
        items = [thing(depth + 1) for _ in range(rng.randrange(6))]
        return (items, tuple(items), {rng.choice((n, str(n))): x for n, x in enumerate(items)})[kind - 7]

    for n in range(300):
        x, protocol = [thing(), thing()], n % (pickle.HIGHEST_PROTOCOL + 1)
        (tmp_path / "x.p").write_bytes(body := (pickle._dumps if n % 2 else pickle.dumps)(x, protocol))
        assert read_refer_pickle(tmp_path / "x.p") == x == pickle.loads(body)
    (tmp_path / "x.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9 \\\\u0041'\np3\nsS'id'\np4\nL7L\nsaU\x05caf\xc3\xa9a.")  # by Python 2
    assert read_refer_pickle(tmp_path / "x.p") == [{"sent": "café \\u0041", "id": 7}, "café"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_mutated_pickles(tmp_path, protocol):
    rng, sound = random.Random(protocol), pickle.dumps([{k: v for k, v in r.items() if not k.startswith("raw")} for r in rows("val")], protocol)
    for n in range(800):
        body = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 20))): body[rng.randrange(len(body))] = rng.randrange(256)
        try: refcoco._read_plain(bytes(body[:rng.randrange(len(body))] if n % 9 == 0 else body), "x")
        except BarleriaError as e: assert "\n" not in str(e) and len(str(e)) < 400


# ---------------------------------------------------------------- letterboxed

def test_letterboxed_images_are_those_of_the_dataset(site, tmp_path):
    get(site, tmp_path / "a", None)
    data = RefSet.read(tmp_path / "a")
    ready = letterboxed(data, 32, tmp_path / "b" / "x.npy", workers=2)
    plain, mapped = RefDataset(data, 32), pickle.loads(pickle.dumps(ready)).serve(RefDataset(data, 32))
    assert len(ready) == 6 and all((plain[i]["image"] == mapped[i]["image"]).all() for i in range(len(plain)))
    assert mapped[0]["image"].dtype == plain[0]["image"].dtype and os.listdir(tmp_path / "b") == ["x.npy"]
    line(lambda: ready.serve(RefDataset(data, 64)), "32 pixels", "64")
    letterboxed(data, 32, data.root / "letterboxed-32.npy")
    assert isinstance(served(RefDataset(data, 32)).images, Letterboxed) and isinstance(served(RefDataset(data, 16)).images, dict)
    answers = lambda: evaluate(lambda image, ids, words: image.mean(1, keepdim=True), data, size=32, progress=False).records
    before = answers()
    (data.root / "letterboxed-32.npy").unlink()
    assert answers() == before
    (data.root / "letterboxed-32.npy").write_bytes(b"no array")
    line(answers, "no file of letterboxed images", "write it again")
    (data.root / "letterboxed-32.npy").unlink()
    part = letterboxed(RefSet.read(tmp_path / "a", "val"), 32, tmp_path / "v.npy")
    line(lambda: part.serve(RefDataset(data, 32)), "does not hold image")


def test_letterboxed_files_that_are_none(site, tmp_path):
    get(site, tmp_path / "a")
    letterboxed(RefSet.read(tmp_path / "a"), 16, tmp_path / "x.npy")
    sound = (tmp_path / "x.npy").read_bytes()
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    for bad in (b"", sound[:-1], sound[:100], sound + b"x", sound.replace(b"|u1", b"|i1"), sound.replace(b"(2, 3, 16, 16)", b"(2, 3, 99999, 16)"), (tmp_path / "o.npy").read_bytes(), sound.replace(b"shape", b"shade")):
        (tmp_path / "y.npy").write_bytes(bad)
        line(lambda: Letterboxed(tmp_path / "y.npy"), "y.npy", "write it again")
    line(lambda: Letterboxed(tmp_path / "gone.npy"), "gone.npy")


def test_letterboxed_stops_cleanly(site, tmp_path):
    get(site, tmp_path / "a")
    data = RefSet.read(tmp_path / "a")
    (tmp_path / "a" / "images" / name(6)).write_bytes(b"broken")
    line(lambda: letterboxed(data, 16, tmp_path / "b" / "x.npy"), name(6))
    assert os.listdir(tmp_path / "b") == []


def test_what_unfolds_without_end_is_refused():
    "Shared lists, each holding the last one many times; nested lists before a forbidden call; keys made to collide."
    shared = []
    for _ in range(6): shared = [shared] * 300
    for data in (pickle.dumps([dict(a=shared)], 2), b"\x80\x04]" + b"](" * 5000 + b"e" * 5000 + b"\x93.", pickle.dumps([{2**61: 1}], 2)):
        start = time.monotonic()
        line(lambda: refcoco._read_plain(data, "refs.p"), "refs.p")
        assert time.monotonic() - start < 5


def test_the_body_of_a_redirect_is_not_read():
    body, request = io.BytesIO(b"x" * 100), refcoco.urllib.request.Request("https://127.0.0.1/x")
    request.stated = []
    refcoco._Redirects().redirect_request(request, body, 302, "", {}, "https://127.0.0.1/y")
    assert body.closed


def test_chunks_are_refused(site, tmp_path):
    told = []
    site.faults[f"/i/{name(5)}"] = ("chunks",)
    line(lambda: get(site, tmp_path / "a", tell=told.append), "1 of 2 images are missing", "comes in chunks")


def test_killed_between_the_last_files(site, tmp_path, monkeypatch):
    "The folder is still ours: the same call goes on."
    def stumble(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(refcoco, "_readme", stumble)
        with pytest.raises(KeyboardInterrupt): get(site, tmp_path / "a")
    get(site, tmp_path / "a")
    whole(tmp_path / "a")


def test_a_damaged_xz_archive(site, tmp_path):
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as f:
        info = tarfile.TarInfo(name(5))
        info.size = 10**5
        f.addfile(info, io.BytesIO(random.Random(0).randbytes(10**5)))
    data = bytearray((tmp_path / "a.tar.xz").read_bytes())
    data[5000:5100] = bytes(100)
    (tmp_path / "a.tar.xz").write_bytes(data)
    line(lambda: get(site, tmp_path / "b", images=tmp_path / "a.tar.xz"), "a.tar.xz")
