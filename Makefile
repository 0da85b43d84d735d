# From a clean clone to a trained model: `make train`. To a checked one: `make lint test`.
#
#   PYTHON=python3.12      the interpreter that .venv is made from (3.11 is what the pins were made for)
#   DEVICE=cpu             the pinned set; cuda where there is an NVIDIA GPU. Hide one from the tests and the
#                          doctor with CUDA_VISIBLE_DEVICES=
#   TORCH_INDEX=URL        where the package index's plain torch is a CUDA build: PyTorch's CPU index,
#                          as told by https://pytorch.org/get-started/locally
#   WORKERS=4              tests that run at a time, a file's in one process; some start ranks of their own
#   OMP_NUM_THREADS=2      threads of each of their processes
#   ARGS="--seed 3"        arguments of apps/train.py, of pytest or of a benchmark

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= $(if $(wildcard /dev/nvidia[0-9]),cuda,cpu)
BIN := .venv/bin
WORKERS ?= 2
OMP_NUM_THREADS ?= 1
# Files as they are listed, not those of most tests first: the longest runs are in files of few.
TESTS := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(TESTS)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-deps $(if $(CI),--quiet)

# A stamp is written when its step is done; a step runs again when what it reads has changed.
STAMPS := .venv/.stamps
RUNTIME := $(STAMPS)/project
DEVELOPMENT := $(STAMPS)/dev

BENCHES := $(patsubst benchmarks/bench_%.py,bench-%,$(wildcard benchmarks/bench_*.py))

# The tests that compare numbers; and the instruction sets and numbers of threads that they are run
# with, "native" being the processor's own. Kernels add up in another order in each of them.
NUMERIC := tests/numerics tests/unit/backbones tests/unit/embeddings tests/unit/hilomoe tests/unit/models \
           tests/unit/training tests/distributed
CAPABILITIES ?= default avx2 native
THREADS ?= 1 2

.PHONY: help train test test-all test-processors test-spark lint format bench $(BENCHES) figures api matrix clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

train: $(RUNTIME) ## train the default recipe on generated data (ARGS="--train.max_steps 50")
	$(BIN)/python apps/train.py $(ARGS)

test: $(DEVELOPMENT) ## the tests that CI runs
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(DEVELOPMENT) ## those above and the slow ones; with a GPU, those too
	$(PYTEST) $(ARGS)

test-processors: $(DEVELOPMENT) ## those on numbers, as other processors and two threads compute them
	set -e; for capability in $(CAPABILITIES); do for threads in $(THREADS); do \
	    kernels=ATEN_CPU_CAPABILITY=$$capability; \
	    test $$capability != native || kernels="--unset ATEN_CPU_CAPABILITY"; \
	    echo "$$capability kernels, $$threads thread(s)"; \
	    env $$kernels OMP_NUM_THREADS=$$threads $(TESTS) -q -m "not slow and not gpu" $(NUMERIC) $(ARGS); \
	done; done

test-spark: $(STAMPS)/spark ## examples/prepare_spark.py against prepare; installs PySpark, wants Java 17
	$(PYTEST) tests/integration/test_spark.py $(ARGS)

lint: $(DEVELOPMENT) ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEVELOPMENT) ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: ## train and test with every release (ARGS="--only 2.14"); hours, and 7 GB for each
	"$(PYTHON)" -m tests.matrix $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $(ARGS)

bench: $(BENCHES) ## every benchmark; a line a measurement in benchmarks/results

$(BENCHES): bench-%: $(DEVELOPMENT)
	@mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.bench_$* --out benchmarks/results/$*.jsonl $(ARGS)

figures: $(DEVELOPMENT) ## docs/architecture.png and docs/site.png
	$(BIN)/python docs/figures.py

api: $(RUNTIME) ## docs/api.md and docs/config.md, from docstrings
	$(BIN)/python docs/api.py
	$(BIN)/python -m torchrec_hilomoe.options > docs/config.md

clean: ## remove the environment and the caches; what runs have written stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, found: $(if $(PYTHON),$$("$(PYTHON)" --version 2>&1),none)." \
	           "Name one with make PYTHON=/path/to/python3.11." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

# The check at the end belongs to the step: a set that cannot be imported is not installed.
# CUDA itself comes as dependencies of torch, so that is installed first, with them.
$(STAMPS)/$(DEVICE): requirements/$(DEVICE).txt requirements/base.txt | $(STAMPS)/venv
	$(if $(TORCH_INDEX),$(PIP) --force-reinstall --index-url $(TORCH_INDEX) $$(grep '^torch==' $<))
	$(if $(filter cuda,$(DEVICE)),$(filter-out --no-deps,$(PIP)) $$(grep '^torch==' $<))
	$(PIP) -r $<
	$(BIN)/python -P torchrec_hilomoe/doctor.py --quiet
	@touch $@

# And a set that has not trained here has not been seen to work.
$(RUNTIME): pyproject.toml $(STAMPS)/$(DEVICE)
	$(PIP) --no-build-isolation --editable .
	$(BIN)/python -m torchrec_hilomoe.doctor --train --quiet
	@touch $@

$(DEVELOPMENT): requirements/dev.txt $(RUNTIME)
	$(PIP) -r $<
	@touch $@

$(STAMPS)/spark: requirements/spark.txt $(DEVELOPMENT)
	$(PIP) -r $<
	@touch $@
