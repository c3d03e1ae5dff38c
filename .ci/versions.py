"""The packages to test with, as settings.ini bounds them; one requirement a line, for pip.

    python .ci/versions.py oldest    every package that has a lower bound, at that bound
    python .ci/versions.py newest    every package as its range stands: pip takes the newest
"""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ranges():
    "(what the library requires, what its developers do), each a list of requirements."
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["requirements"].split(), ini["DEFAULT"]["dev_requirements"].split()


def lowest(requirement):
    "`torch>=2.11,<3` -> `torch==2.11`; what has no lower bound stays as it is."
    return re.sub(r"^([\w.-]+)>=([\w.]+).*", r"\1==\2", requirement)


if __name__ == "__main__":
    which = {"oldest": lowest, "newest": str}.get(" ".join(sys.argv[1:]))
    if not which: sys.exit(__doc__)
    print("\n".join(which(r) for part in ranges() for r in part))
