"`.ci/notebooks.py` on a small tree of its own: the line below a chapter's title and the cell for Colab come from settings.ini and the order of the files."
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"00_first": "The first", "train/20_second": "The second", "index": "All of it"}


def notebook(title):
    cells = [dict(cell_type="markdown", id="t", metadata={}, source=[f"# {title}\n", "\n", "> What it is about."]),
             dict(cell_type="code", id="c", metadata={}, execution_count=3, outputs=[], source=["1 + 1"])]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


@pytest.fixture
def tree(tmp_path):
    "Three notebooks, the tool and settings.ini."
    (tmp_path / "nbs" / "train").mkdir(parents=True)
    (tmp_path / "barleria_nb").mkdir()
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    move(tmp_path, "https://a.host/old/home", "stem")
    for name, title in TITLES.items(): (tmp_path / "nbs" / f"{name}.ipynb").write_text(notebook(title), encoding="utf-8")
    return tmp_path


def move(tree, url, branch):
    "Say in settings.ini that the repository lives elsewhere."
    path = tree / "settings.ini"
    new = dict(git_url=url, branch=branch)
    lines = [f"{key} = {new[key]}" if (key := line.split(" = ")[0]) in new else line for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def clean(tree):
    "{notebook: its sources} after `clean`, and the files' bytes."
    done = subprocess.run([sys.executable, tree / ".ci" / "notebooks.py", "clean"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = {name: (tree / "nbs" / f"{name}.ipynb").read_bytes() for name in TITLES}
    return {name: ["".join(c["source"]) for c in json.loads(b)["cells"]] for name, b in stored.items()}, stored


def test_lead_names_the_neighbours_the_badge_and_the_install(tree):
    cells, stored = clean(tree)
    first, second = cells["00_first"], cells["train/20_second"]
    assert first[0].startswith("# The first\n\n> What it is about.\n\n[all chapters](index.ipynb) · [The second →](train/20_second.ipynb) · ")
    assert "\n\n[← The first](../00_first.ipynb) · [all chapters](../index.ipynb) · [![Open in Colab]" in second[0]
    assert first[0].endswith("/github/old/home/blob/stem/nbs/00_first.ipynb)")
    assert second[0].endswith("/github/old/home/blob/stem/nbs/train/20_second.ipynb)")
    for said in (first, second):
        assert len(said) == 3 and said[1].startswith("#| hide\n") and '"install -q git+https://a.host/old/home@stem"' in said[1]
        compile(said[1], "cell", "exec")
    assert len(cells["index"]) == 2 and "colab" not in "".join(cells["index"])
    assert clean(tree)[1] == stored  # a second time changes nothing


def test_lead_follows_a_repository_that_moved(tree):
    clean(tree)
    move(tree, "https://b.host/new/place/", "main")
    cells, stored = clean(tree)
    for name in ("00_first", "train/20_second"):
        said = "\n".join(cells[name])
        assert f"/github/new/place/blob/main/nbs/{name}.ipynb)" in said and "git+https://b.host/new/place@main" in said
        assert "old/home" not in said and said.count("Open in Colab") == said.count("google.colab\"") == 1
    assert clean(tree)[1] == stored


@pytest.mark.parametrize("source, outputs, said", [("x = 1\n#\n# ## A heading", [], "a heading inside a code cell"), ("print(1);", [], "keeps what the cell prints"),
    ("print(1);", [dict(output_type="stream", name="stdout", text="1")], None), ("x = 1 # a remark\n# another", [], None)])
def test_cells_that_hide_what_they_say(source, outputs, said):
    "Prose in a code cell, and prints that a ';' keeps out of the page."
    spec = importlib.util.spec_from_file_location("notebook_tools", ROOT / ".ci" / "notebooks.py")
    spec.loader.exec_module(tools := importlib.util.module_from_spec(spec))
    slips = list(tools.lint_cell(dict(cell_type="code", source=source, outputs=outputs, metadata={}), [0, 0]))
    assert [said in s for s in slips] == [True] if said else not slips
