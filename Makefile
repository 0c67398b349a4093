# make quickstart and make test do all the set-up they need. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# All tests run in two processes of one thread each, a file in one of them; some tests in one process.
SPREAD := $(if $(ARGS),,-n 2 --dist loadfile --no-loadscope-reorder)
# Newer than what it was installed from: nothing to install.
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow fuzz chaos quickstart bench lint clean

help:
	@echo "make quickstart   train and evaluate a small model here, offline, in about 6 minutes"
	@echo "make test         run the tests (ARGS='tests/test_loss.py -x' for some)"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make chaos        inject faults into real runs and rewrite the table of docs/reliability.md"
	@echo "make fuzz         hostile input for 10 minutes (ARGS='--seconds 3600' for an hour, '--target sources --seed 7' for one case)"
	@echo "make bench        short versions of all benchmarks, about 20 minutes (ARGS=step for one)"
	@echo "make lint         ruff check, ruff format --check and mypy"
	@echo "make setup        only make the environment in $(VENV)"
	@echo "make clean        remove caches, builds and quickstart/ ($(VENV) and runs/ stay)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gist_dist needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make setup PYTHON=python3.11")'
	@echo "Installing into $(VENV): about 1.5 GB (more if pip's torch comes with CUDA), 2-3 minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@# torch first and alone: the largest download, and where an installation fails if it does.
	@$(BIN)/python -m pip install -qq -c constraints.txt torch
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not chaos" $(SPREAD) $(ARGS)

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

# GIST_CHAOS_SEED draws other moments, GIST_CHAOS_REPEATS injects the repeated faults so often.
chaos: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m chaos tests/faults $(ARGS)
	$(BIN)/python tests/faults/records.py

fuzz: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py $(ARGS)

quickstart: $(STAMP)
	@$(BIN)/python examples/quickstart.py
	@# All it needs is in ./quickstart now: no hub is asked.
	@HF_HUB_OFFLINE=1 $(BIN)/gist-dist train quickstart $(ARGS)

bench: $(STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf quickstart build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find gist_dist tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
