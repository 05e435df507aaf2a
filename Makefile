# make setup   the environment in .venv, with the command `meshwright` in it
# make demo    the main job, end to end: plan, proof, training, a served stream, a report
# make test    the tests, under ten minutes        make test-slow  the long ones
# make lint    ruff, its formatter, mypy           make proof      every layout against one device
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Files in parallel; a file's tests stay in one process, for its fixtures start processes of their own.
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

test test-slow proof: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow lint format proof clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "meshwright needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (minutes the first time: torch is large)"
	@$(PIP) install -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m examples.demo

test: setup
	@$(PYTEST) -m "not slow"

test-slow: setup
	@$(PYTEST) -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proof: setup
	@$(BIN)/python -m bench.runs.proof

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info
