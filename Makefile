# `make demo` and `make test` need Python 3.11 and nothing else: they build .venv on first use.
VENV_PYTHON := .venv/bin/python
# Tests run a process on each core: threads of several would wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test lint format test-gpu bench setup clean

demo:  ## a real vLLM, three adapters, unpatched against patched
	@scripts/demo.sh

test: lint  ## everything that needs no GPU
	@scripts/setup_cpu.sh --hosts
	@echo "kernels, in Triton's interpreter:"
	@$(ONE_THREAD) TRITON_INTERPRET=1 $(VENV_PYTHON) -m pytest -q -n auto tests/kernels
	@echo "everything else:"
	@$(ONE_THREAD) LORA_OPS_HOST_SOURCES=$(CURDIR)/.hosts $(VENV_PYTHON) -m pytest -q -rs -n auto --dist loadfile \
		--no-loadscope-reorder tests --ignore=tests/gpu --ignore=tests/kernels

lint: setup
	@$(VENV_PYTHON) -m ruff check --quiet .
	@$(VENV_PYTHON) -m ruff format --check --quiet . || ($(VENV_PYTHON) -m ruff format --check .; exit 1)

format: setup
	@$(VENV_PYTHON) -m ruff check --quiet --fix .
	@$(VENV_PYTHON) -m ruff format --quiet .

test-gpu:  ## in an environment with a CUDA GPU, see CONTRIBUTING.md
	@python=$$(scripts/gpu_python.sh torch triton numba) && $$python -m pytest -q -rs tests/kernels tests/gpu

bench:  ## checks without timing where there is no GPU; options in ARGS="--quick"
	@python=$$(scripts/gpu_python.sh torch triton numba 2>/dev/null) || { scripts/setup_cpu.sh && python=$(VENV_PYTHON); } && \
	$$python benchmarks/ops_speed.py $(ARGS)

setup:
	@scripts/setup_cpu.sh

clean:
	rm -rf .venv .hosts .demo build *.egg-info
