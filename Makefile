# `make demo` makes a video, `make test` and `make lint` check the code. All of them set up .venv first if it is not up to date.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moves right
VIDEO ?= outputs/demo.mp4

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint clean

help:
	@echo "make demo    a video of \"$(PROMPT)\" in $(VIDEO), from the shipped model, without network"
	@echo "make test    the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make venv    only set up $(VENV)"
	@echo "make clean   remove $(VENV), build products and caches"

# One file in .venv for each set of dependencies, newer than what it was installed from.
venv: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/cogvideox generate "$(PROMPT)" --output $(VIDEO) --overwrite
	@echo "The video is $(CURDIR)/$(VIDEO)"

test: $(VENV)/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests benchmarks examples -name __pycache__ -type d -exec rm -rf {} +
