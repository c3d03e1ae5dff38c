"The package as it is installed: one version, importable without the notebook tools, a wheel that carries its data; and what is said of it elsewhere."
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import barleria_nb

ROOT = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = ini["DEFAULT"]
MEGABYTES = dict(wheel=24, sdist=32)  # most of it: four trained models, two pairs of tiny towers, a sample, stored outputs


def run(*command, cwd, **env):
    "Run a command; its output explains a failure."
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_one_version():
    version = SETTINGS["version"]
    assert barleria_nb.__version__ == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == version


def test_citation():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (said["cff-version"], said["type"], said["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert (said["version"], said["repository-code"]) == (SETTINGS["version"], SETTINGS["git_url"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"git clone {SETTINGS['git_url']} " in readme and f"git+{SETTINGS['git_url']}`" in readme
    assert [a["name"] for a in said["authors"]] == [SETTINGS["author"]]
    papers = said["references"]
    assert [p["title"].split(":")[0] for p in papers] == ["BarLeRIa", "Enhancing Fine-grained Multi-modal Alignment via Adapters"]
    assert [len(p["authors"]) for p in papers] == [8, 6]
    for p in papers:
        assert (p["type"], p["year"]) == ("conference-paper", 2024) and p["conference"]["name"]
        assert all(a.keys() == {"given-names", "family-names"} for a in p["authors"])


def test_citation_agrees_with_the_papers():
    texts = ROOT.parent / "shared" / "papers"
    if not texts.exists(): pytest.skip(f"the papers' texts are not at {texts}")
    for p, name in zip(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"], ("barleria", "dcris")):
        head = (texts / f"{name}.txt").read_text(encoding="utf-8")[:3000]
        assert p["title"].lower() in head.lower()
        places = [head.index(f"{a['given-names']} {a['family-names']}<sup>") for a in p["authors"]]
        assert places == sorted(places)


def bounds(which): return run(sys.executable, ROOT / ".ci" / "versions.py", which, cwd=ROOT).split()


def test_oldest_and_newest_are_the_bounds_of_settings():
    asked = [Requirement(r) for r in SETTINGS["requirements"].split()]
    oldest = {r.name: r for r in map(Requirement, bounds("oldest"))}
    for r in asked:
        assert str(oldest[r.name].specifier).startswith("=="), f"{r.name} has no lower bound in settings.ini"
        assert r.specifier.contains(str(oldest[r.name].specifier)[2:])
    assert bounds("newest") == SETTINGS["requirements"].split() + SETTINGS["dev_requirements"].split()


def test_locked_versions_are_within_the_bounds():
    locked = [Requirement(line) for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", "-"))]
    name = lambda r: re.sub(r"[-_.]+", "-", r.name).lower()
    pins = {}
    for r in locked: pins.setdefault(name(r), []).append(str(r.specifier)[2:])
    for r in map(Requirement, bounds("newest")):
        assert pins.get(name(r)), f"{r.name} is not in requirements.lock"
        assert all(r.specifier.contains(v) for v in pins[name(r)]), f"requirements.lock has {r.name} {pins[name(r)]}, settings.ini allows {r.specifier}"


def workflow(name): return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def test_workflows_run_the_gate_on_every_python():
    ci = workflow("ci.yml")
    assert ci["permissions"] == {"contents": "read"}
    jobs = ci["jobs"]
    steps = lambda job: [s.get("run") or s["uses"] for s in jobs[job]["steps"]]
    assert steps("gate")[-1] == steps("pythons")[-1] == ".ci/run"
    first = jobs["gate"]["steps"][1]["with"]["python-version"]
    assert sorted([first, *jobs["pythons"]["strategy"]["matrix"]["python"]]) == sorted(SETTINGS["pythons"].split())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{m['packages']}:  ##" in makefile for m in jobs["bounds"]["strategy"]["matrix"]["include"])
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in workflow(path.name)["jobs"].values():
            assert all(re.fullmatch(r"[\w/-]+@v\d+", s["uses"]) for s in job["steps"] if "uses" in s), f"{path.name}: an action without its major version"


IMPORT_ALL = """
import importlib, pkgutil, sys
TOOLS = {"nbdev", "IPython", "ipywidgets", "execnb"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in TOOLS: raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Refuse())
import barleria_nb
names = [m.name for m in pkgutil.walk_packages(barleria_nb.__path__, "barleria_nb.") if "_assets" not in m.name]
import torch
state = lambda: (torch.get_num_threads(), torch.get_rng_state().tolist())
before = state()
for name in names: importlib.import_module(name)
assert state() == before, "an import changed PyTorch's threads or random numbers"
assert not TOOLS & {m.split(".")[0] for m in sys.modules}
print(len(names))
"""


def test_library_imports_without_the_notebook_tools():
    assert int(run(sys.executable, "-c", IMPORT_ALL, cwd=ROOT)) >= 2


LATE = {("recipes", "speed")}  # flops


def test_modules_import_earlier_chapters_alone():
    "Reading order is layer order, so there can be no cycle; the commands import later chapters only when they run."
    texts = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "barleria_nb").glob("*.py")}
    chapters = {m: re.search(r"File to edit: .*?([^/]+)\.ipynb", text) for m, text in texts.items()}
    chapters = {m: found[1] for m, found in chapters.items() if found}
    assert len(chapters) == len(texts.keys() - {"__init__", "_modidx"}) > 30
    late = set()
    for module in chapters:
        for line in ast.parse(texts[module]).body:
            if not isinstance(line, ast.ImportFrom) or not line.level: continue
            names = [line.module] if line.module else [a.name for a in line.names]
            late |= {(module, n) for n in names if n in chapters and chapters[n] >= chapters[module]}
    assert late == LATE


def test_modules_say_what_they_touch():
    "The first exported cell says which siblings a module imports, and what it reads and writes; where it names the siblings, these are they."
    compared = 0
    for path in sorted((ROOT / "barleria_nb").glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        said = re.search(r"^# (Imports .*)", text, re.M)
        assert said, path.name
        names = set(re.split(r", | and ", re.match(r"Imports (.*?)(?: alone)?(?: at start.*?)?\. ", said[1])[1]))
        lines = [line for line in ast.parse(text).body if isinstance(line, ast.ImportFrom) and line.level]
        used = {n for line in lines for n in ([line.module] if line.module else [a.name for a in line.names]) if not n.startswith("_")}
        named = all((ROOT / "barleria_nb" / f"{n}.py").exists() for n in names)
        if named: assert names == used, path.name
        if names == {"no sibling"}: assert not used, path.name
        compared += named or names == {"no sibling"}
    assert compared > 20


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(wheel, sdist, the copy they were built from, so that the checkout gets no build folder); the wheel is made from the sdist."
    top = tmp_path_factory.mktemp("wheel")
    never = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis", ".pytest_cache")
    top_only = lambda folder, names: never(folder, names) | ({"runs"} & set(names) if Path(folder) == ROOT else set())  # data/runs is shipped
    shutil.copytree(ROOT, top / "source", ignore=top_only)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", top / "dist", cwd=top / "source")
    return next((top / "dist").glob("*.whl")), next((top / "dist").glob("*.tar.gz")), top / "source"


@pytest.fixture(scope="module")
def wheel(built): return built[0]


def test_wheel_carries_modules_and_data_but_no_notebooks(built):
    archive, source = zipfile.ZipFile(built[0]), built[2]
    names = set(archive.namelist())
    modules = {f"barleria_nb/{p.relative_to(source / 'barleria_nb').as_posix()}" for p in (source / "barleria_nb").rglob("*.py")}
    data = {f"barleria_nb/_assets/{p.relative_to(source / 'data').as_posix()}" for p in (source / "data").rglob("*")
            if p.is_file() and not p.name.startswith(".") and not {"__pycache__", "course"} & set(p.parts)}
    assert not [n for n in names if "_assets/course" in n]  # the answers of the exam
    assert modules | data | {"barleria_nb/py.typed"} <= names
    assert not [n for n in names if n.endswith(".ipynb") or n.startswith(("nbs/", "tests/", "data/"))]
    assert any(n.endswith("LICENSE") for n in names)
    assert {n.split("/")[3] for n in data if n.startswith("barleria_nb/_assets/models/") and n.count("/") > 3} == {"barleria-tiny", "dcris-tinydino", "frozen-tiny", "snf-tiny"}
    homes = {"barleria_nb/_assets/": source / "data", "barleria_nb/": source / "barleria_nb"}
    for n in modules | data:
        start = next(s for s in homes if n.startswith(s))
        assert archive.read(n) == (homes[start] / n[len(start):]).read_bytes(), f"{n}: not as in the checkout"


def test_sdist_carries_what_a_change_needs(built):
    source = built[2]
    names = {n.split("/", 1)[1] for n in tarfile.open(built[1]).getnames() if "/" in n}
    wanted = {"settings.ini", "setup.py", "Makefile", "requirements.lock", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", ".ci/run", ".ci/notebooks.py",
              ".github/workflows/ci.yml", *(p.relative_to(source).as_posix() for d in ("nbs", "tests") for p in (source / d).rglob("*")
                                            if p.suffix in (".ipynb", ".py") and not any(s[0] in "._" for s in p.relative_to(source).parts))}
    assert wanted <= names
    assert not [n for n in names if "__pycache__" in n or n.startswith((".venv", "runs", ".git/", ".hypothesis"))]


def test_archives_stay_small(built):
    for (kind, limit), path in zip(MEGABYTES.items(), built[:2]):
        assert path.stat().st_size < limit * 1e6, f"the {kind} has {path.stat().st_size / 1e6:.1f} MB, more than {limit}"


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    m = Metadata.from_email(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))  # raises at what an index would refuse
    assert (m.name, str(m.version), m.license_expression, m.description_content_type) == ("barleria_nb", SETTINGS["version"], "Apache-2.0", "text/markdown")
    assert [c.rsplit(" ", 1)[1] for c in m.classifiers if "Python :: 3." in c] == SETTINGS["pythons"].split()
    assert m.requires_python.contains(SETTINGS["pythons"].split()[0]) and SETTINGS["pythons"].split()[0] == SETTINGS["min_python"]
    assert all(url.startswith(("https://", SETTINGS["git_url"])) for url in m.project_urls.values()) and m.project_urls["Source"] == SETTINGS["git_url"]
    text = re.sub(r"^```.*?^```", "", m.description, flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert not [l for l in links if not re.match(r"https?:|#|mailto:", l)], "an index page cannot follow links to files beside README.md"
    start = re.escape(f"{SETTINGS['git_url']}/") + "(?:blob|raw)/" + re.escape(SETTINGS["branch"]) + "/([^#]+)"
    ours = [found[1] for l in links if (found := re.match(start, l))]
    assert ours and not [p for p in ours if not (ROOT / p).exists()]


def test_installed_wheel_finds_its_data(built, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[0], cwd=tmp_path)
    code = ("import barleria_nb; from importlib.resources import files; top = files('barleria_nb._assets');"
            "print(barleria_nb.__file__); print(sorted(p.name for p in top.iterdir() if not p.name.startswith('__')))")
    where, found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(where).is_relative_to(site)
    wanted = sorted(p.name for p in (built[2] / "data").iterdir() if not p.name.startswith((".", "__")) and p.name != "course")
    assert found == repr(wanted)
