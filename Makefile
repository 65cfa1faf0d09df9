# Every target sets itself up: nothing but a python3 (3.11 or newer) is needed.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# The interpreter's version is part of the stamp: another PYTHON makes the environment anew.
PYTHON_TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := $(VENV)/.installed-$(PYTHON_TAG)
DEV := $(VENV)/.dev-$(PYTHON_TAG)
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

ifneq ($(wildcard ../shared/data),)
export BILEVEL_FLAX_DATA ?= $(abspath ../shared/data)
endif

# The site has an environment of its own, too; TUTORIALS=off does not run those of the gallery.
DOCS := .venv-docs/.installed-$(PYTHON_TAG)
TUTORIALS ?= cache

# Trainers that other people wrote, each in an environment of its own, with its own pins.
TRAINER_PYTHON ?= python3.12
TRAINERS := tunix kauldron levanter datasets
PACKAGE_tunix := google-tunix
PACKAGE_kauldron := kauldron
# Both it imports and does not ask for.
PACKAGE_levanter := --pre levanter==1.2.dev1644 chex gitpython
PACKAGE_datasets := datasets
TRAINER_TESTS := $(addprefix test-trainer-,$(TRAINERS))

.PHONY: help venv demo test test-core test-wheel test-trainers $(TRAINER_TESTS) docs docs-venv lint types clean

help:
	@echo "make demo         find the wrong labels of real MNIST digits, and a network without them (runs/demo)"
	@echo "make test         run the tests;  make test-core  those of the plug-in's ground floor"
	@echo "make test-wheel   the README's commands, from the built wheel in a folder of their own"
	@echo "make test-trainers  the adapters, each against the real package (Python 3.12; downloads them)"
	@echo "make docs         the site, from nothing: docs/_build/html/index.html"
	@echo "make lint         check style and formatting;  make types  check types"
	@echo "make venv         only set up $(VENV);  make clean  remove it"
	@echo "Another interpreter: make test PYTHON=python3.12"

venv: $(DEV)

define check-python
@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bilevel_flax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": pass PYTHON=python3.11")'
endef

$(INSTALLED): pyproject.toml
	$(check-python)
	@echo "setting up $(VENV) with Python $(PYTHON_TAG) (once, some minutes)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[all]'
	@touch $@

$(DEV): $(INSTALLED)
	@$(PIP) --editable '.[all,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/bilevel-flax train --config configs/mnist_hypercleaning.py:structured --workdir runs/demo

test: $(DEV)
	$(PYTEST) -n 2 --dist worksteal $(PYTEST_ARGS)

test-core: $(DEV)
	$(PYTEST) -n 2 --dist worksteal tests/core $(PYTEST_ARGS)

# In one process and in the README's order: its later commands need the earlier ones.
test-wheel: $(DEV)
	$(PYTEST) -m wheel tests/wheel $(PYTEST_ARGS)

test-trainers: $(TRAINER_TESTS)

# uv, because pip's resolver takes more than ten minutes over kauldron's requirements.
$(TRAINER_TESTS): test-trainer-%:
	@$(TRAINER_PYTHON) -c "" 2>/dev/null || { echo "$*: skipped, there is no $(TRAINER_PYTHON): pass TRAINER_PYTHON=..."; exit 0; }; \
	set -e; folder=.trainers/$*; \
	if [ ! -e $$folder/.installed ]; then \
	  rm -rf $$folder; $(TRAINER_PYTHON) -m venv $$folder; $$folder/bin/python -m pip install --quiet uv; \
	  $$folder/bin/uv pip install --quiet --python $$folder/bin/python --editable '.[train]' pytest $(PACKAGE_$*); \
	  touch $$folder/.installed; \
	fi; \
	$$folder/bin/python -m pytest -q tests/trainers/$*_test.py $(PYTEST_ARGS)

docs-venv: $(DOCS)

$(DOCS): pyproject.toml
	$(check-python)
	@echo "setting up .venv-docs with Python $(PYTHON_TAG) (once, some minutes)"
	@rm -rf .venv-docs
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# Warnings are errors: a link that leads nowhere, a name without docstring or example, a tutorial
# that raises.
docs: $(DOCS)
	BILEVEL_FLAX_TUTORIALS=$(TUTORIALS) .venv-docs/bin/python -m sphinx -W --keep-going -q -b html -c docs . docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .trainers .venv-docs .jax_cache docs/_build docs/api
