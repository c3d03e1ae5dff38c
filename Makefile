# Every target works in .venv, which `make` builds from requirements.lock the first time.
PYTHON ?= python3
PY := .venv/bin/python
NB := $(PY) .ci/notebooks.py
FLAGS ?=
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full oldest newest checks notebooks lab prepare site clean

help:  ## show this list
	@echo "barleria_nb: parameter-efficient tuning for referring image segmentation, in notebooks"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

install: .venv/.installed  ## build .venv: the locked packages and this project, editable

.venv/.installed: requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; say which: make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# Half the cores: on two, a second thread gains about a fifth, and costs many times that when anything else runs (threads spin while they wait).
demo: export OMP_NUM_THREADS := $(shell n=$$(nproc); echo $$((n > 3 ? n / 2 : 1)))
demo: .venv/.installed  ## train, score and draw a small model from scratch (minutes on a laptop); files in runs/demo
	.venv/bin/barleria_demo --out runs/demo

test: checks notebooks  ## everything a change must pass, in order, stopping at the first failure
	$(PY) -m pytest -n 2 --dist worksteal

test-full: checks notebooks  ## the same with the long tests; FLAGS="slow cuda" also runs the cells so flagged
	$(PY) -m pytest -n 2 --dist worksteal -m ""

oldest:  ## run pytest with the oldest packages that settings.ini allows, installed into build/oldest
newest:  ## the same with the newest there are, in build/newest
oldest newest:
	rm -rf build/$@
	$(PYTHON) -m venv build/$@
	$(PYTHON) .ci/versions.py $@ > build/$@/requirements.txt
	build/$@/bin/python -m pip install --disable-pip-version-check --quiet setuptools wheel --requirement build/$@/requirements.txt
	build/$@/bin/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .
	build/$@/bin/python -m pip check
	build/$@/bin/python -m pytest -n 2 --dist worksteal

# Notebooks clean, modules and their index exported, slips of style; then the notebooks' own tests; then the README.
checks: .venv/.installed
	$(NB) check clean export lint

notebooks: checks
	$(NB) test --flags "$(FLAGS)"
	$(NB) check readme

lab: .venv/.installed  ## open the notebooks in JupyterLab
	$(PY) -m jupyter lab nbs

prepare: .venv/.installed  ## after editing notebooks: export, run them for fresh outputs, clean, make the README
	$(NB) export
	$(NB) refresh
	$(NB) clean
	$(NB) readme

site: .venv/.installed  ## the chapters and the reference as web pages in _site, from the stored outputs; open _site/index.html, no network needed
	$(PY) .ci/pages/make_site.py

clean:  ## remove what builds and tests leave behind (not .venv, not runs)
	rm -rf build dist _site *.egg-info .pytest_cache .hypothesis nbs/.last_checked
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
