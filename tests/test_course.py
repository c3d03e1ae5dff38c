"Student copies: what is blanked, what is refused, what lies in the folder, and that it marks itself."
import ast
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import line
from hypothesis import given, strategies as st

from barleria_nb import course
from barleria_nb.core import asset
from barleria_nb.course import MARK, YOURS, blanked, chapters_in, for_students, graded, is_solution, make_course, run_chapter, source, with_answers

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("04_snf", "05_intertwine", "06_prior", "07_gst", "11_loss", "13b_scale", "18_papers")  # under half a minute each on an idle core


def notebook(*cells):
    made = [dict(cell_type="code", id=f"c{n}", execution_count=1, metadata={}, outputs=[dict(output_type="stream", name="stdout", text="9\n")], source=s) for n, s in enumerate(cells, 1)]
    return dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)


TINY = notebook("import math", "#| hide\n#| solution\ndef area(r:float # radius\n        ):\n    'Of a disc.'\n    return math.pi * r**2", "assert math.isclose(area(3), 9 * math.pi), 'a disc of radius 3'",
                "#| solution\nname = 'disc'", "assert name == 'disc', 'its name'", "import nbdev; nbdev.nbdev_export()")


@pytest.fixture
def originals(tmp_path):
    "Two chapters, one in a folder within."
    home = tmp_path / "originals"
    for path, nb in (("01_disc.ipynb", TINY), ("train/20_plain.ipynb", notebook("x = 1", "assert x == 1"))):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(json.dumps(nb))
    return home


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# ---------------------------------------------------------------- blanking

@pytest.mark.parametrize("before, after", [
    ("def f(x): return x", f"def f(x):\n    {YOURS}"),
    ("def f(x): return x # (B,)", f"def f(x): # (B,)\n    {YOURS}"),
    ("def f(\n    x:int, # a number\n)->int: # its like\n    'Doc.'\n    y = x # no\n    return y # hint", f"def f(\n    x:int, # a number\n)->int: # its like\n    'Doc.'\n    {YOURS}"),
    ("def f(x):\n    # a hint\n    return x\n", f"def f(x):\n    # a hint\n    {YOURS}\n"),
    ("class A:\n\tdef f(self):\n\t\treturn 1", f"class A:\n\tdef f(self):\n\t    {YOURS}"),
    ("def f(): 'Doc.'; return 1", f"def f():\n    'Doc.'\n    {YOURS}"),
    ("@cache\nasync def f(ä='ö'): return 'ü'\n\nz = 1", f"@cache\nasync def f(ä='ö'):\n    {YOURS}\n\nz = ..."),
    ("def f():\n    @g\n    @h\n    def k(): pass\n    return k", f"def f():\n    {YOURS}"),
    ("class A(B):\n    'Doc.'\n    n = 3\n    a:int\n    def __init__(self): self.a = 1\n    def __post_init__(self): pass\n    @property\n    def b(self): return 1\n    class C:\n        def d(self): return 2\n",
     f"class A(B):\n    'Doc.'\n    n = 3\n    a:int\n    def __init__(self): self.a = 1\n    def __post_init__(self): pass\n    @property\n    def b(self):\n        {YOURS}\n    class C:\n        def d(self):\n            {YOURS}\n"),
    ("a = [1,\n     2] # why\nb, c = 1, 2\nd:int = 3; e = 4\n(f, g) = 5, 6\nh = i = 7", "a = ... # why\nb, c = ..., ...\nd:int = ...; e = ...\n(f, g) = ..., ...\nh = i = ..."),
    ("#| hide\n#| solution\nimport os\n'A text.'\nx = os.sep", "#| hide\n#| solution\nimport os\n'A text.'\nx = ..."),
])
def test_blanked(before, after):
    assert blanked(before) == after
    assert blanked(after) == after


@pytest.mark.parametrize("cell, said", [
    ("x = 1\nassert x == 1", "line 2, `assert x == 1`"), ("print(1)", "move it into a cell of its own"), ("for k in range(3): pass", "line 1"), ("x[0] = 1", "`x[0] = 1`"), ("x.y = 1", "neither"),
    ("x += 1", "neither"), ("*a, b = 1, 2", "neither"), ("import os", "nothing in it"), ("# only words", "nothing in it"), ("class A:\n    x = 1", "nothing in it"), ("x:int", "neither"),
    ("def f(:", "line 1 is not plain Python"), ("%time x = 1", "not plain Python"), ("with open('x') as f: y = 1", "neither"), ("if True:\n    def f(): pass", "neither"), ("x = 1\0", "not plain Python"),
    ("class A:\n    if True:\n        def f(self): return 42\n    def g(self): return 1", "line 2: a class holds definitions"), ("class A:\n    for k in range(3): x = k\n    def g(self): return 1", "line 2"),
])
def test_what_cannot_be_blanked(cell, said): line(lambda: blanked(cell), said)


@given(st.lists(st.sampled_from(["def f(x): return x # é\n", "def g(\n    a, # ü\n):\n    'ß'\n    return a\n", "class A:\n    def m(self): return '→'\n\n    def n(self):\n        return 2\n", "x = 'é', 1\n", "import os\n", "# ein Wort\n", "\n"]), max_size=9))
def test_any_order_of_pieces(pieces):
    text = "".join(pieces)
    if not any(w in text for w in ("def", "x =")): return
    got = blanked(text)
    assert "return" not in got and got.count("yours to write") == text.count("def ") and [c for c in ast.walk(ast.parse(got)) if isinstance(c, ast.Constant) and c.value is ...].__len__() == text.count("x =")


def test_a_mark_is_read_at_the_head_alone():
    cell = lambda s, kind="code": dict(cell_type=kind, source=s)
    assert is_solution(cell("#| hide\n#| solution\nx = 1")) and is_solution(cell(["#|solution\n", "x = 1"])) and is_solution(cell("#| solution\n#| export\nx = 1"))
    assert not any(map(is_solution, (cell("x = 1\n#| solution"), cell("#| hide\nx = 1"), cell("#| solution", "markdown"), cell("'''\n#| solution'''"), cell("#| solutions"))))


def test_a_chapter_for_students_keeps_all_but_the_answers():
    made = for_students(TINY)
    assert len(made["cells"]) == 5 and [c["outputs"] == [] for c in made["cells"]] == [False, True, False, True, False]
    assert [c["id"] for c in made["cells"]] == [f"c{n}" for n in range(1, 6)]
    assert all(source(a) == source(b) for a, b in zip(made["cells"][::2], TINY["cells"][::2])) and "math.pi" in source(TINY["cells"][1]), "and the original stays as it was"
    bad = notebook("x = 1", "#| solution\nprint(1)")
    line(lambda: for_students(bad, "05_x"), "05_x, cell 2", "move it")


# ---------------------------------------------------------------- the folder

def test_what_lies_in_the_folder(originals, tmp_path):
    out = tmp_path / "out"
    assert make_course(out, notebooks=originals) == {"01_disc": 2, "20_plain": 0}
    assert set(tree(out)) == {"README.md", "settings.ini", MARK, "nbs/01_disc.ipynb", "nbs/train/20_plain.ipynb"}
    page = (out / "README.md").read_text()
    assert "nbdev_test --path nbs/01_disc.ipynb" in page and "[20_plain](nbs/train/20_plain.ipynb) | –" in page
    assert json.loads((out / MARK).read_text())["chapters"]["01_disc"] == dict(path="01_disc.ipynb", marked=2)
    (again := tmp_path / "again").mkdir()  # empty will do
    make_course(again, ["01_disc"], originals)
    assert "nbs/train/20_plain.ipynb" not in tree(again)


def test_no_folder_but_its_own_is_written_into(originals, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("three years")
    before = tree(theirs)
    for force in (False, True): line(lambda: make_course(theirs, None, originals, force), "not empty", "choose another")
    assert tree(theirs) == before
    line(lambda: make_course(theirs / "thesis.txt", None, originals), "is a file")
    make_course(out, None, originals)
    work = out / "nbs" / "01_disc.ipynb"
    work.write_text(work.read_text().replace("yours to write", "my answer"))
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    line(lambda: make_course(out, None, originals), "--force")
    assert tree(out) == before
    make_course(out, ["20_plain"], originals, force=True)
    after = tree(out)
    assert "my answer" in work.read_text() and after["notes.txt"] == b"mine", "chapters that were not named stay"
    assert set(json.loads(after[MARK])["chapters"]) == {"01_disc", "20_plain"}
    make_course(out, ["01_disc"], originals, force=True)
    assert "my answer" not in work.read_text()


def test_refusals(originals, tmp_path):
    out = tmp_path / "out"
    line(lambda: make_course(out, ["01_disk"], originals), "no chapter '01_disk'", "01_disc")
    line(lambda: make_course(out, None, tmp_path / "nowhere"), "no chapters in", "--notebooks")
    line(lambda: make_course(originals / "out", None, originals), "among the chapters")
    line(lambda: list(graded(originals)), "no course was made")
    (originals / "02_bad.ipynb").write_text(json.dumps(notebook("#| solution\nx = 1; print(x)")))
    line(lambda: make_course(out, None, originals), "02_bad, cell 1")
    (originals / "02_bad.ipynb").write_text("{")
    line(lambda: make_course(out, None, originals), "02_bad.ipynb", "not JSON")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".out")], "nothing half done"


def test_a_wheel_has_no_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(course.barleria_nb, "__file__", str(tmp_path / "site-packages" / "barleria_nb" / "__init__.py"))
    line(lambda: make_course(tmp_path / "out"), "installed from a wheel", "--notebooks")


# ---------------------------------------------------------------- marking

RIGHT = {"c2": "#| solution\ndef area(r): return 3.141592653589793 * r * r", "c4": "#| solution\nname = 'disc'"}


def hand_in(out, answers, drop=(), tests=None):
    "Write a student's notebook."
    nb = for_students(TINY)
    for c in nb["cells"]: c["source"] = answers.get(c["id"], (tests or {}).get(c["id"], c["source"]))
    nb["cells"] = [c for c in nb["cells"] if c["id"] not in drop]
    (out / "nbs" / "01_disc.ipynb").write_text(json.dumps(nb))


@pytest.fixture
def handed(originals, tmp_path):
    make_course(tmp_path / "out", None, originals)
    return tmp_path / "out", originals


def test_the_copy_marks_itself(handed):
    out, originals = handed
    path = out / "nbs" / "01_disc.ipynb"
    assert re.fullmatch(r"cell 3: NotImplementedError: yours to write", run_chapter(path))
    hand_in(out, {"c2": RIGHT["c2"]})
    assert run_chapter(path).startswith("cell 5: AssertionError: its name")
    hand_in(out, RIGHT)
    assert run_chapter(path) == ""
    done = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--path", "nbs/01_disc.ipynb"], cwd=out, capture_output=True, text=True)  # as the page says
    assert done.returncode == 0 and "Success." in done.stdout


def test_marking_takes_the_answers_and_no_tests(handed):
    out, originals = handed
    mark = lambda: next(graded(out, None, originals))
    assert mark()[1:4] == (2, 0, False)
    hand_in(out, RIGHT | {"c2": "#| solution\ndef area(r): return 0"}, tests={"c3": "pass"})
    m = mark()
    assert m[1:4] == (2, 2, False) and m.said == "cell 3: AssertionError: a disc of radius 3"
    hand_in(out, RIGHT, drop={"c4"})
    assert mark()[1:4] == (2, 1, False)
    hand_in(out, RIGHT, tests={"c3": "assert False"})
    assert mark()[1:] == (2, 2, True, "")
    (out / "nbs" / "01_disc.ipynb").write_text("{")
    assert not mark().passed and "not JSON" in mark().said
    (out / "nbs" / "01_disc.ipynb").unlink()
    assert mark()[1:] == (2, 0, False, "not handed in")


def test_an_answer_that_does_not_end(tmp_path):
    (tmp_path / "settings.ini").write_text(course.SETTINGS)
    (tmp_path / "x.ipynb").write_text(json.dumps(notebook("while True: pass")))
    assert "no end after" in run_chapter(tmp_path / "x.ipynb", seconds=5)


@pytest.mark.parametrize("trick", ["os.write(1, b'Success.\\n'); os._exit(0)", "os.execv(sys.executable, [sys.executable, '-c', 'print(\"Success.\")'])", "os.write(1, b'Success.\\n' + os.read(0, 99)); os._exit(0)",
    "os.fork() and os._exit(0)", "signal.signal(signal.SIGTERM, lambda *_: (print('Success.', flush=True), os._exit(0))); os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_success_that_is_only_said(handed, trick):
    "An answer that leaves before the tests is told so, whatever it printed."
    out, originals = handed
    hand_in(out, {"c2": "#| solution\nimport os, signal, sys\n" + trick})
    assert next(graded(out, None, originals))[1:] == (2, 1, False, "the process ended before its tests did")


def test_a_child_left_behind_fails_nothing_and_is_ended(tmp_path):
    (tmp_path / "settings.ini").write_text(course.SETTINGS)
    (tmp_path / "x.ipynb").write_text(json.dumps(notebook("import subprocess, pathlib\nchild = subprocess.Popen(['sleep', '600'])\npathlib.Path('pid').write_text(str(child.pid))")))
    assert run_chapter(tmp_path / "x.ipynb", seconds=60) == ""
    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z": break
        time.sleep(.1)
    else: raise AssertionError("the child lives on")


def test_marking_trusts_the_originals_alone(handed, tmp_path, monkeypatch, capsys):
    out, originals = handed
    monkeypatch.setattr(course, "run_chapter", lambda path: "")
    hand_in(out, RIGHT)
    said = json.loads((out / MARK).read_text())
    (tmp_path / "elsewhere.ipynb").write_text(json.dumps(TINY))
    said["chapters"]["01_disc"] = dict(path="../../elsewhere.ipynb", marked=0)
    (out / MARK).write_text(json.dumps(said))
    assert list(graded(out, None, originals)) == [("01_disc", 2, 2, True, "")]
    (out / "nbs" / "01_disc.ipynb").unlink()
    (out / "nbs" / "01_disc.ipynb").symlink_to(tmp_path / "elsewhere.ipynb")
    assert "leads out of the folder" in next(graded(out, None, originals)).said
    del said["chapters"]["01_disc"]
    (out / "nbs" / "01_disc.ipynb").unlink()
    (out / MARK).write_text(json.dumps(said))
    assert list(graded(out, ["01_disc"], originals)) == [("01_disc", 2, 0, False, "not handed in")]
    with pytest.raises(SystemExit) as e: course.barleria_course.__wrapped__(str(out), notebooks=str(originals), grade=True)
    assert e.value.code == 1 and "0 of 0" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["{}", "[]", "3", '{"chapters": null}', '{"chapters": [1]}', '{"chapters": {"01_disc": 1}}', '{"chapters": {"01_disc": {"path": 1, "marked": 2}}}', '{"chapters": {"01_disc": {"path": "x"}}}'])
def test_a_damaged_course(handed, bad):
    out, originals = handed
    (out / MARK).write_text(bad)
    line(lambda: list(graded(out, None, originals)), "is damaged; make the copies anew")
    for force in (False, True): line(lambda: make_course(out, None, originals, force), "is damaged; make the copies anew")


@pytest.mark.parametrize("bad", [[1, 2], {}, dict(cells=None), dict(cells=[1]), *(dict(cells=[dict(cell_type="code", id="c2", source="x") | wrong]) for wrong in (dict(source=None), dict(source=[1, 2]), dict(source=3), dict(id=["a"])))])
def test_what_is_no_notebook_fails_alone(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(course, "run_chapter", lambda path: "")
    (originals := tmp_path / "originals").mkdir()
    for n in ("01_disc", "02_disc"): (originals / f"{n}.ipynb").write_text(json.dumps(TINY))
    make_course(tmp_path / "out", None, originals)
    (tmp_path / "out" / "nbs" / "01_disc.ipynb").write_text(json.dumps(bad))
    first, second = graded(tmp_path / "out", None, originals)
    assert first[:4] == ("01_disc", 2, 0, False) and "is no notebook" in first.said and second.passed


@pytest.mark.parametrize("link", ["nbs", "nbs/train", "nbs/01_disc.ipynb"])
def test_a_link_to_the_originals_is_not_written_through(handed, link):
    out, originals = handed
    before, there = tree(originals), out / link
    shutil.rmtree(there) if there.is_dir() else there.unlink()
    there.symlink_to(originals / Path(link).relative_to("nbs"))
    line(lambda: make_course(out, None, originals, force=True), "leads to another folder")
    assert tree(originals) == before


def test_an_emptied_cell_is_blank():
    theirs = for_students(TINY)
    theirs["cells"][1]["source"], theirs["cells"][3]["source"] = " \n", []
    assert with_answers(TINY, theirs) == (for_students(TINY), 0)


def test_answers_are_put_back_by_id():
    filled, worked = with_answers(TINY, for_students(TINY))
    assert worked == 0 and filled == for_students(TINY)
    filled, worked = with_answers(TINY, TINY)
    assert worked == 2 and [source(c) for c in filled["cells"]] == [source(c) for c in TINY["cells"][:-1]]


def test_command(handed, tmp_path, capsys):
    out, originals = handed
    command = course.barleria_course.__wrapped__
    command(str(tmp_path / "new"), chapters=["01_disc"], notebooks=str(originals))
    assert "1 chapters, 2 cells to write" in capsys.readouterr().out
    for bad, said in ((dict(out=str(out)), "--force"), (dict(out=str(tmp_path / "newer"), chapters=["x"]), "no chapter 'x'"), (dict(out=str(originals), grade=True), "no course was made")):
        with pytest.raises(SystemExit) as e: command(**{"notebooks": str(originals)} | bad)
        told = capsys.readouterr().err.strip()
        assert e.value.code == 1 and told.startswith("barleria_course: ") and said in told and "\n" not in told
    with pytest.raises(SystemExit) as e: command(str(out), notebooks=str(originals), grade=True)
    assert e.value.code == 1 and "FAILED  01_disc" in capsys.readouterr().out
    hand_in(out, RIGHT)
    command(str(out), notebooks=str(originals), grade=True)
    assert "1 of 1 chapters passed" in capsys.readouterr().out


def test_help_comes_without_pytorch():
    code = "import sys, barleria_nb.course; print([m for m in ('torch', 'nbdev', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


# ---------------------------------------------------------------- this library's chapters

def chapters(): return {n: json.loads(p.read_text(encoding="utf-8")) for n, p in chapters_in(ROOT / "nbs").items()}


def test_every_chapter_can_be_blanked_and_every_answer_has_a_test_below():
    for name, nb in chapters().items():
        made = for_students(nb, name)
        code = [c for c in made["cells"] if c["cell_type"] == "code"]
        for n, c in enumerate(code):
            if not is_solution(c): continue
            ast.parse(source(c))
            names = {t.id for a in ast.parse(source(c)).body if isinstance(a, ast.Assign) for t in ast.walk(a.targets[0]) if isinstance(t, ast.Name)}
            names |= {d.name for d in ast.parse(source(c)).body if hasattr(d, "name")}
            below = "\n".join(source(x) for x in code[n + 1:] if not is_solution(x))
            checks = [x for x in re.split(r"\n(?=\S)", below) if "test_" in x or "assert" in x]
            assert checks and any(re.search(rf"\b{re.escape(w)}\b", below) for w in names), f"{name}: {names} is never used below"


def test_the_central_chapters_are_open_inside():
    inside = {n: [c for c in nb["cells"] if is_solution(c) and re.search(r"#\| exports?\b", source(c))] for n, nb in chapters().items()}
    for n in ("01_data", "04_snf", "05_intertwine", "06_prior", "07_gst", "08_densecross", "09_baselines", "10_head", "11_loss", "13_metrics"): assert inside[n], n
    for p in (ROOT / "barleria_nb").glob("*.py"): assert not re.search(r"^#\s*\|\s*solution", p.read_text(encoding="utf-8"), re.M), f"{p} carries a mark"


def test_teaching_names_what_there_is():
    "Links lead somewhere, exercises named in the table are blanks of that session's chapters, each question has one answer, and the answers' cells hold."
    text = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text): assert target[1:] in headings if target[0] == "#" else (ROOT / target).exists(), target
    blanks = {n: set(re.findall(r"(?:def|class) (\w+)|^(\w+) = ", "\n".join(source(c) for c in nb["cells"] if is_solution(c)), re.M)) for n, nb in chapters().items()}
    for row in re.findall(r"^\| \d [^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", text, re.M):
        there = {w for n in re.findall(r"/(\w+)\.ipynb", row[0]) for pair in blanks[n] for w in pair if w}
        assert set(re.findall(r"`(\w+)`", row[1] + row[2])) <= there, row
    answers = asset("course/answers.md").read_text(encoding="utf-8")
    asked, answered = (re.findall(pattern, t, re.M) for pattern, t in ((r"^(\d\.\d) \*\(", text), (r"^\*\*(\d\.\d)\*\*", answers)))
    assert asked == answered and len(asked) == len(set(asked)) >= 27


def test_the_answers_compute():
    scope = {}
    for cell in re.findall(r"^```python\n(.*?)^```", asset("course/answers.md").read_text(encoding="utf-8"), re.M | re.S): exec(cell, scope)


@pytest.mark.long
def test_the_whole_course(tmp_path):
    "All chapters are copied; in each of the quick ones the blank copy fails under its first blank, and the filled one passes."
    made = make_course(tmp_path / "blank")
    assert set(made) == set(chapters_in()) and sum(made.values()) > 30
    for n in QUICK:
        path = tmp_path / "blank" / "nbs" / f"{n}.ipynb"
        first = next(k for k, c in enumerate(json.loads(path.read_text())["cells"], 1) if is_solution(c))
        said = run_chapter(path)
        assert int(re.match(r"cell (\d+): ", said)[1]) > first and made[n] > 0, f"{n}: {said}"
        filled, worked = with_answers(json.loads(chapters_in()[n].read_text(encoding="utf-8")), json.loads(chapters_in()[n].read_text(encoding="utf-8")))
        path.write_text(json.dumps(filled))
        assert worked == made[n] and run_chapter(path) == "", n
