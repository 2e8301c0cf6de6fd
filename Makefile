# Everything from nothing: each target makes the virtual environment it needs.
# VENV chooses where, PYTHON with which Python, PIP_ARGUMENTS adds options of pip (an index of CPU builds, say).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The oldest transformers that is supported, in an environment of its own.
OLDEST := 5.20
VENV_OLDEST ?= .venv-oldest
INSTALLED_OLDEST := $(VENV_OLDEST)/.installed
# `make matrix MATRIX_ARGUMENTS="--only dinov2"`; `--help` says which there are.
MATRIX_ARGUMENTS ?=
# Tests are many and small: one worker per core, one thread each.
WORKERS ?= auto

# What the oldest transformers must pass: everything but the demo, the benchmarks and the style of commands.
CORE_TESTS := tests/composition tests/configuration tests/modeling tests/processing tests/training tests/test_checkpoint.py

.PHONY: help demo test test-oldest matrix architectures combinations swaps lint format parity training-benchmark clean

help:
	@echo "make demo     make an environment, compose, train on handwritten digits, report (out/demo)"
	@echo "make test     make an environment and run the tests"
	@echo "make test-oldest  the core tests with the oldest supported transformers ($(OLDEST)), in its own environment"
	@echo "make matrix   compute which towers and language models work (docs/compatibility.md); goes on where it was"
	@echo "make architectures  compare every native family with its class of transformers (docs/architectures.md)"
	@echo "make combinations  compute which projectors, fusions and views work together (docs/combinations.md)"
	@echo "make swaps    compute which towers can be swapped for which (docs/swaps.md)"
	@echo "make lint     check the style"
	@echo "make format   put the style right"
	@echo "make parity   measure against the native LLaVA class"
	@echo "make training-benchmark  measure training against the native LLaVA class (docs/training_speed.md)"
	@echo "make clean    remove the environments and what the commands wrote"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGUMENTS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGUMENTS) -c constraints.txt -e ".[train,demo,test]"
	touch $(INSTALLED)

# The same pinned versions, but for transformers and what it pins itself.
$(INSTALLED_OLDEST): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_OLDEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(VENV_OLDEST)/constraints.txt
	echo 'transformers==$(OLDEST).*' >> $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install --quiet $(PIP_ARGUMENTS) -c $(VENV_OLDEST)/constraints.txt torch
	$(VENV_OLDEST)/bin/python -m pip install --quiet $(PIP_ARGUMENTS) -c $(VENV_OLDEST)/constraints.txt -e ".[train,test]"
	touch $(INSTALLED_OLDEST)

demo: $(INSTALLED)
	$(BIN)/anyvlm demo --output out/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

test-oldest: $(INSTALLED_OLDEST)
	$(VENV_OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(wildcard $(CORE_TESTS))

matrix: $(INSTALLED)
	$(BIN)/python -m anyvlm.compatibility.run $(MATRIX_ARGUMENTS)

architectures: $(INSTALLED)
	$(BIN)/python -m anyvlm.compatibility.architectures

combinations: $(INSTALLED)
	$(BIN)/python -m anyvlm.compatibility.combinations $(MATRIX_ARGUMENTS)

swaps: $(INSTALLED)
	$(BIN)/python -m anyvlm.compatibility.swaps $(MATRIX_ARGUMENTS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(INSTALLED)
	$(BIN)/python benchmarks/parity.py

training-benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/training.py --output out/training.json --markdown out/training.md

clean:
	rm -rf $(VENV) $(VENV_OLDEST) out
