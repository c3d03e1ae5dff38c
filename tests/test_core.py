"Core: what is written whole or not at all, one folder of it at a time; whose fault a message names; grids of pictures."
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from common import line
from matplotlib import pyplot as plt

from barleria_nb import core
from barleria_nb.core import BarleriaError, atomic, atomic_folder, show_grid


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_text() if p.is_file() else None for p in Path(folder).rglob("*")}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# --- whose fault it is ---

@pytest.mark.parametrize("kind", [atomic, atomic_folder])
@pytest.mark.parametrize("open_", [lambda home: open(home / "input.txt"), lambda home: ((home / "box").mkdir(), open(home / "box")), lambda home: os.replace(home / "input.txt", home / "x"), lambda home: os.listdir(home / "more")])
def test_another_file_is_named(tmp_path, kind, open_):
    "An input that is missing, or a folder: the message names it, beside what was to be written."
    def call():
        with kind(tmp_path / "out") as part:
            if kind is atomic: part.write_text("half")
            open_(tmp_path)
    text = line(call, "out was not written", f"({tmp_path}", "check that path")
    assert "atomic" not in text and "give the name of a file" not in text and not (tmp_path / "out").exists() and not list(tmp_path.rglob(".*"))


def test_the_gift_is_to_be_used(tmp_path):
    def forgotten():
        with atomic(tmp_path / "a"): pass
    line(forgotten, "nothing was written to it", "`atomic`")


@pytest.mark.parametrize("kind", [atomic, atomic_folder])
def test_what_the_system_says_of_ours_keeps_its_remedy(tmp_path, monkeypatch, kind):
    def full(*args): raise OSError(errno.ENOSPC, "full", str(args[0]))
    def call():
        with kind(tmp_path / "out") as part: part.write_text("x") if kind is atomic else (part / "a").write_text("x")
    monkeypatch.setattr(core.os, "replace", full)
    line(call, "out was not written: the disk is full")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    def below():
        with kind(tmp_path / "file" / "below"): pass
    line(below, "below was not written: a part of the path is a file")


def test_a_path_that_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic("a") as part: part.write_text("1")
    with atomic_folder("deep/er") as part: (part / "b").write_text("2")
    assert tree(tmp_path) == {"a": "1", "deep": None, "deep/er": None, "deep/er/b": "2"}
    def wrong():
        with atomic_folder("deep/er") as part: raise BarleriaError(f"{part}/b is wrong")
    assert line(wrong) == "deep/er/b is wrong"


# --- a folder at a time ---

OLD = {"a": "old a", "sub/b": "old b", "notes": "mine"}
NEW = {"a": "new", "sub/b": "new and longer", "new/er/c": "new and much longer", "d": "new and by far the longest of all"}


def test_all_files_take_their_place(tmp_path):
    write(home := tmp_path / "home", OLD)
    with atomic_folder(home) as part: write(part, NEW)
    assert tree(home) == OLD | NEW | {"sub": None, "new": None, "new/er": None} and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("fails", range(4))
@pytest.mark.parametrize("links", [True, False])
def test_one_that_cannot_move_takes_all_back(tmp_path, monkeypatch, fails, links):
    "Whichever of the moves fails, the folder is as it was, with or without hard links."
    write(home := tmp_path / "home", OLD)
    before, done, real = tree(home), [], os.replace

    def replace(a, b):
        if Path(b).is_relative_to(home) and len(done) == fails: done.append(b); raise OSError(errno.EIO, "Input/output error", str(a))
        if Path(b).is_relative_to(home): done.append(b)
        real(a, b)
    def link(*_): raise OSError(errno.EPERM, "no links")
    monkeypatch.setattr(core.os, "replace", replace)
    if not links: monkeypatch.setattr(core.os, "link", link)
    def call():
        with atomic_folder(home) as part: write(part, NEW)
    line(call, "home was not written: Input/output error")
    assert tree(home) == before and os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("there", ["d/x", "new", "sub/b/x"])
def test_what_stands_in_the_way_is_named(tmp_path, there):
    write(home := tmp_path / "home", {"a": "old a", there: "mine"})
    before = tree(home)
    def call():
        with atomic_folder(home) as part: write(part, NEW)
    line(call, "home was not written", f"({home}/", "check that path")
    assert tree(home) == before and os.listdir(tmp_path) == ["home"]


def test_missing_parents_go_again(tmp_path):
    (tmp_path / "kept").mkdir()
    for fresh in (False, True):
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "kept/new/deep/er", fresh): raise KeyboardInterrupt
    assert tree(tmp_path) == {"kept": None}


def test_links_are_followed(tmp_path):
    write(tmp_path / "elsewhere", {"a": "old"})
    (tmp_path / "home").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "home") as part: write(part, {"a": "new"})
    assert (tmp_path / "home").is_symlink() and tree(tmp_path / "elsewhere") == {"a": "new"}


@pytest.mark.parametrize("there, said", [({"x": "mine"}, "is not empty"), ("mine", "is a file"), ({}, "the folder you are in")])
def test_a_fresh_folder_is_refused_before_the_work(tmp_path, monkeypatch, there, said):
    home = tmp_path / "home"
    if isinstance(there, str): home.write_text(there)
    else: home.mkdir(); write(home, there)
    if not there: monkeypatch.chdir(home)
    before = tree(tmp_path)
    def call():
        with atomic_folder("." if not there else home, fresh=True): pytest.fail("the block was entered")
    line(call, said, "choose")
    assert tree(tmp_path) == before


def test_a_fresh_folder_that_filled_meanwhile(tmp_path):
    (home := tmp_path / "home").mkdir()
    def call():
        with atomic_folder(home, fresh=True) as part: write(part, NEW); write(home, {"x": "mine"})
    line(call, "home was not written: Directory not empty")
    assert tree(home) == {"x": "mine"} and os.listdir(tmp_path) == ["home"]


def test_all_bytes_go_to_the_disk_but_those_that_are_there(tmp_path, monkeypatch):
    "A hard link is not opened for writing: it may be read-only, and somebody else's."
    write(tmp_path, {"theirs": "photo"})
    seen, real = [], os.fsync
    monkeypatch.setattr(core.os, "fsync", lambda f: (seen.append(os.fstat(f).st_ino), real(f))[1])
    for home, fresh in (("one", True), ("two", False)):
        with atomic_folder(tmp_path / home, fresh) as part:
            write(part, NEW)
            os.link(tmp_path / "theirs", part / "photo")
        assert {p.stat().st_ino for p in (tmp_path / home).rglob("*") if p.is_file()} == {*seen, (tmp_path / "theirs").stat().st_ino} and len(seen) == 4
        seen.clear()


# --- pictures ---

@pytest.mark.parametrize("pictures, masks, titles, said", [(0, None, None, "0 pictures cannot"), (0, 0, 0, "0 pictures, 0 masks, 0 titles"), (2, 1, None, "2 pictures, 1 masks"), (2, None, 1, "2 pictures, 1 titles"), (3, 3, 2, "3 masks, 2 titles")])
def test_a_grid_of_too_few(pictures, masks, titles, said):
    picture = np.zeros((4, 4))
    line(lambda: show_grid([picture] * pictures, masks if masks is None else [None] * masks, titles if titles is None else ["t"] * titles), said)


def test_a_grid_of_tensors_and_of_more_than_is_needed():
    show_grid(torch.zeros(2, 3, 4, 4), torch.ones(3, 4, 4), ["a", None, "c"])
    assert [len(ax.images) for ax in plt.gcf().axes] == [1, 1]
    plt.close("all")
