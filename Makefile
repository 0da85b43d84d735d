# From a clean clone to a trained model: `make train`. To a checked one: `make lint test`.
#
#   PYTHON=python3.12      the interpreter that .venv is made from (3.11 is what the pins were made for)
#   TORCH_INDEX=URL        where the package index's plain torch is a CUDA build: PyTorch's CPU index,
#                          as told by https://pytorch.org/get-started/locally
#   WORKERS=4              tests that run at a time, a file's in one process; some start ranks of their own
#   ARGS="--seed 3"        arguments of apps/train.py, of pytest or of a benchmark

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-deps $(if $(CI),--quiet)

# A stamp is written when its step is done; a step runs again when what it reads has changed.
STAMPS := .venv/.stamps
RUNTIME := $(STAMPS)/project
DEVELOPMENT := $(STAMPS)/dev

BENCHES := $(patsubst benchmarks/bench_%.py,bench-%,$(wildcard benchmarks/bench_*.py))

.PHONY: help train test test-all lint format bench $(BENCHES) clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

train: $(RUNTIME) ## train the default recipe on generated data (ARGS="--train.max_steps 50")
	$(BIN)/python apps/train.py $(ARGS)

test: $(DEVELOPMENT) ## the tests that CI runs
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(DEVELOPMENT) ## those above and the slow ones; with a GPU, those too
	$(PYTEST) $(ARGS)

lint: $(DEVELOPMENT) ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEVELOPMENT) ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCHES) ## every benchmark; a line a measurement in benchmarks/results

$(BENCHES): bench-%: $(DEVELOPMENT)
	@mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.bench_$* --out benchmarks/results/$*.jsonl $(ARGS)

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
$(STAMPS)/cpu: requirements/cpu.txt requirements/base.txt | $(STAMPS)/venv
	$(if $(TORCH_INDEX),$(PIP) --force-reinstall --index-url $(TORCH_INDEX) $$(grep '^torch==' $<))
	$(PIP) -r $<
	$(BIN)/python -P torchrec_hilomoe/doctor.py --quiet
	@touch $@

$(RUNTIME): pyproject.toml $(STAMPS)/cpu
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(DEVELOPMENT): requirements/dev.txt $(RUNTIME)
	$(PIP) -r $<
	@touch $@
