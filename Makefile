# Everything from nothing: each target makes the virtual environment it needs.
# VENV chooses where, PYTHON with which Python, PIP_ARGUMENTS adds options of pip (an index of CPU builds, say).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests are many and small: one worker per core, one thread each.
WORKERS ?= auto

.PHONY: help demo test lint format parity clean

help:
	@echo "make demo     make an environment, compose, train on handwritten digits, report (out/demo)"
	@echo "make test     make an environment and run the tests"
	@echo "make lint     check the style"
	@echo "make format   put the style right"
	@echo "make parity   measure against the native LLaVA class"
	@echo "make clean    remove the environment and what the commands wrote"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGUMENTS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGUMENTS) -c constraints.txt -e ".[train,demo,test]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/anyvlm demo --output out/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity: $(INSTALLED)
	$(BIN)/python benchmarks/parity.py

clean:
	rm -rf $(VENV) out
