# `make demo` and `make test` set everything up by themselves; what is done already is skipped.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CONSTRAINTS := constraints.txt
EXTRAS := cluster,deepspeed,demo,dev,eval,longblocks,wandb
ifneq ($(wildcard .venv/.gpu),)  # `make install-gpu` was run, and every other target keeps to its versions
CONSTRAINTS := constraints-gpu.txt
EXTRAS := $(EXTRAS),flash,quantization,vllm
endif

.DEFAULT_GOAL := help
.PHONY: help install install-gpu gpu-check demo reproduce test test-versions lint format bench

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(INSTALLED)  ## Set up .venv with the tested versions

install-gpu:  ## Set up .venv for a node with GPUs, with vLLM and FlashAttention (10 GB)
	@test -e .venv/.gpu || { $(PYTHON) -m venv .venv && rm -f $(INSTALLED) && touch .venv/.gpu; }
	@$(MAKE) --no-print-directory install

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "== Setting up .venv with the versions of $(CONSTRAINTS) (minutes, and gigabytes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		--editable '.[$(EXTRAS)]'
	@touch $(INSTALLED)

gpu-check: $(INSTALLED)  ## Check kernels, steps, memory and speed on the GPU that is there (under 10 minutes)
	@$(BIN)/python scripts/gpu_check.py

demo: $(INSTALLED)  ## Train a real model on real text: cold start, dGRPO, evaluation, comparison
	@$(BIN)/python scripts/demo.py

reproduce: $(INSTALLED)  ## Compare the methods of the paper on a small model (SIZE=gpu: on one GPU of 80 GB)
	@$(BIN)/python scripts/reproduce.py --size $(or $(SIZE),cpu)

test: $(INSTALLED)  ## Run the tests (the slow ones: `.venv/bin/python -m pytest -m slow`)
	@echo "== Running the tests"
	@$(BIN)/python -m pytest -m 'not slow and not gpu'

test-versions: $(INSTALLED)  ## Run the trainer's tests with the oldest and the newest versions that are allowed
	@$(BIN)/python .ci/versions.py gpu
	@$(BIN)/python .ci/versions.py newest

lint: $(INSTALLED)  ## Check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(INSTALLED)  ## Fix style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(INSTALLED)  ## Measure time and memory of the loss and of the shared prefix
	@$(BIN)/python scripts/benchmarks/loss.py
	@$(BIN)/python scripts/benchmarks/shared_prefix.py --figure outputs/shared_prefix.png
