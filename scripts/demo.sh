#!/usr/bin/env bash
# Run the demo on the vLLM of the current Python if that has a CUDA GPU, else on the CPU environment of setup_cpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

if gpu_python=$(scripts/gpu_python.sh torch vllm 2>/dev/null); then
    echo "[setup] the vLLM and the GPU of $gpu_python"
    # A copy beside it, so that the environment in use stays as it is; vLLM finds its entry point there.
    rm -rf .demo/site
    "$gpu_python" -m pip install --quiet --no-deps --no-build-isolation --target .demo/site .
    PYTHONPATH="$PWD/.demo/site${PYTHONPATH:+:$PYTHONPATH}" exec "$gpu_python" benchmarks/demo.py "$@"
fi
scripts/setup_cpu.sh
exec .venv/bin/python benchmarks/demo.py "$@"
