# Every target sets itself up: nothing but a python3 (3.11 or newer) is needed.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The interpreter's version is part of the stamp: another PYTHON makes the environment anew.
PYTHON_TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
STAMP := $(VENV)/.installed-$(PYTHON_TAG)

ifneq ($(wildcard ../shared/data),)
export BILEVEL_FLAX_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help venv demo test lint types clean

help:
	@echo "make demo   clean real MNIST digits by learning a weight for every example (runs/demo)"
	@echo "make test   run the tests"
	@echo "make lint   check style and formatting;  make types  check types"
	@echo "make venv   only set up $(VENV);  make clean  remove it"
	@echo "Another interpreter: make test PYTHON=python3.12"

venv: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bilevel_flax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": pass PYTHON=python3.11")'
	@echo "setting up $(VENV) with Python $(PYTHON_TAG) (once, some minutes)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/bilevel-flax train --config configs/mnist_hypercleaning.py:soba --workdir runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)
