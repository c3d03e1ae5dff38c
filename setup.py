"""Packaging, read from settings.ini, the one place where nbdev and pip both look."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(HERE / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
STATUS = {"1": "Planning", "2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}


def page():
    "README.md for a page elsewhere: what links to files beside it leads to the repository instead."
    readme, home = HERE / "README.md", cfg["git_url"].rstrip("/")
    if not readme.exists(): return cfg["description"]
    there = lambda m: f"{m[1] or ''}]({home}/{'raw' if m[1] else 'blob'}/{cfg['branch']}/{m[2]})"
    parts = re.split(r"(^```.*?^```)", readme.read_text(encoding="utf-8"), flags=re.M | re.S)  # code keeps its brackets
    return "".join(p if p.startswith("```") else re.sub(r"(!\[[^\]]*)?\]\((?![a-z]+:|#|/)([^)\s]+)\)", there, p) for p in parts)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=page(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": cfg["git_url"] + "/issues",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3 :: Only",
        *[f"Programming Language :: Python :: {v}" for v in cfg["pythons"].split()],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["barleria_nb", "barleria_nb.*"]) + ["barleria_nb._assets"],
    package_dir={"barleria_nb._assets": "data"},
    package_data={"barleria_nb": ["py.typed"], "barleria_nb._assets": ["**/*"]},
    exclude_package_data={"barleria_nb._assets": ["course/*"]},  # the answers of the exam stay in the repository
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']} = {cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
