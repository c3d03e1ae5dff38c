"The package as it is installed: one version, importable without the notebook tools, a wheel that carries its data."
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import barleria_nb

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **env):
    "Run a command; its output explains a failure."
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_one_version():
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert barleria_nb.__version__ == ini["DEFAULT"]["version"]


IMPORT_ALL = """
import importlib, pkgutil, sys
TOOLS = {"nbdev", "IPython", "ipywidgets", "execnb"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in TOOLS: raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Refuse())
import barleria_nb
names = [m.name for m in pkgutil.walk_packages(barleria_nb.__path__, "barleria_nb.") if "_assets" not in m.name]
for name in names: importlib.import_module(name)
assert not TOOLS & {m.split(".")[0] for m in sys.modules}
print(len(names))
"""


def test_library_imports_without_the_notebook_tools():
    assert int(run(sys.executable, "-c", IMPORT_ALL, cwd=ROOT)) >= 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy, so that the checkout gets no build folder."
    top = tmp_path_factory.mktemp("wheel")
    never = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis", ".pytest_cache")
    top_only = lambda folder, names: never(folder, names) | ({"runs"} & set(names) if Path(folder) == ROOT else set())  # data/runs is shipped
    shutil.copytree(ROOT, top / "source", ignore=top_only)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", top / "dist", cwd=top / "source")  # sdist, then the wheel from it
    return next((top / "dist").glob("*.whl"))


def test_wheel_carries_modules_and_data_but_no_notebooks(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"barleria_nb/{p.relative_to(ROOT / 'barleria_nb').as_posix()}" for p in (ROOT / "barleria_nb").rglob("*.py")}
    data = {f"barleria_nb/_assets/{p.relative_to(ROOT / 'data').as_posix()}" for p in (ROOT / "data").rglob("*")
            if p.is_file() and not p.name.startswith(".") and "__pycache__" not in p.parts}
    assert modules | data | {"barleria_nb/py.typed"} <= names
    assert not [n for n in names if n.endswith(".ipynb") or n.startswith(("nbs/", "tests/", "data/"))]
    assert any(n.endswith("LICENSE") for n in names)


def test_installed_wheel_finds_its_data(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    code = ("import barleria_nb; from importlib.resources import files; top = files('barleria_nb._assets');"
            "print(barleria_nb.__file__); print(sorted(p.name for p in top.iterdir() if not p.name.startswith('__')))")
    where, found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(where).is_relative_to(site)
    wanted = sorted(p.name for p in (ROOT / "data").iterdir() if not p.name.startswith((".", "__")))
    assert found == repr(wanted)
