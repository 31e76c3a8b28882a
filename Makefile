# `make demo` and `make test` need Python 3.11 and nothing else: they build .venv on first use.
PYTHON := .venv/bin/python
GPU_PYTHON ?= python3

.PHONY: demo test lint format test-gpu bench setup clean

demo:  ## real vLLM, three adapters, unpatched against patched
	@scripts/demo.sh

test: setup lint  ## everything that needs no GPU
	@LORA_OPS_HOST_SOURCES=$(CURDIR)/.hosts $(PYTHON) -m pytest -q -rs tests --ignore=tests/gpu

lint: setup
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m ruff format --check --quiet . || ($(PYTHON) -m ruff format --check .; exit 1)

format: setup
	@$(PYTHON) -m ruff check --quiet --fix .
	@$(PYTHON) -m ruff format --quiet .

test-gpu:  ## in an environment with a CUDA GPU: GPU_PYTHON=/path/to/python
	@$(GPU_PYTHON) -m pytest -q tests/gpu

bench:  ## same; checks without timing where there is no GPU
	@$(GPU_PYTHON) benchmarks/ops_speed.py

setup:
	@scripts/setup_cpu.sh --hosts

clean:
	rm -rf .venv .hosts .demo build *.egg-info
