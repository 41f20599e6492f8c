# Every target sets up what it needs: a virtual environment in .venv, with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help quickstart test test-slow check bench docs recipes oracle policies clean

help:
	@echo "make quickstart   set up, train the tiny policy with GTPO, draw the report (a few minutes on 2 cores)"
	@echo "make test         set up, run the tests"
	@echo "make test-slow    those that kill runs and take two processes (some minutes)"
	@echo "make check        lint, types, layer contracts"
	@echo "make bench        cost of the frame against a bare loop, for docs/benchmarks.md; of logits in chunks; rlmod-plan against measured memory"
	@echo "make docs         write the index of the algorithms, docs/algorithms.md"
	@echo "make recipes      run every recipe on the embedded task; writes docs/recipes.md (half an hour)"
	@echo "make oracle       our losses, advantages and gradients against TRL's and verl's; writes docs/oracle.md"
	@echo "make policies     train the two shipped policies again"
	@echo "make clean        remove the virtual environment and build leftovers"

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes, most of them quiet"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(READY)
	$(BIN)/rlmod-train experiment=quickstart

# One worker a core, each with one thread: more threads only get in each other's way.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench.py
	$(BIN)/python tools/bench_head.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_plan.py

docs: $(READY)
	$(BIN)/python tools/algorithms.py

recipes: $(READY)
	$(BIN)/python tools/recipes.py

oracle: $(READY) .venv-trl/.ready .venv-verl/.ready
	$(BIN)/python tools/oracle/compare.py --trl .venv-trl/bin/python --verl .venv-verl/bin/python

.venv-trl/.ready:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --constraint constraints.txt trl==1.16.0 torch jinja2
	touch $@

.venv-verl/.ready:
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install --quiet verl==0.9.1 torch==2.13.0
	touch $@

policies: $(READY)
	$(BIN)/python tools/tiny_policies.py

clean:
	rm -rf $(VENV) .venv-trl .venv-verl build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
