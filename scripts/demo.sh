#!/usr/bin/env bash
# Run the demo on the vLLM of the current Python if that has a CUDA GPU, else on the CPU environment of setup_cpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

usable='
import importlib.util, sys
if not all(importlib.util.find_spec(name) for name in ("torch", "vllm")):
    sys.exit(1)
import torch
sys.exit(not torch.cuda.is_available())
'
CURRENT=${PYTHON:-python3}
if command -v "$CURRENT" >/dev/null && "$CURRENT" -c "$usable" 2>/dev/null; then
    echo "[setup] the vLLM and the GPU of $(command -v "$CURRENT")"
    # A copy beside it, so that the environment in use stays as it is; vLLM finds its entry point there.
    rm -rf .demo/site
    "$CURRENT" -m pip install --quiet --no-deps --no-build-isolation --target .demo/site .
    PYTHONPATH="$PWD/.demo/site${PYTHONPATH:+:$PYTHONPATH}" exec "$CURRENT" benchmarks/demo.py "$@"
fi
scripts/setup_cpu.sh
exec .venv/bin/python benchmarks/demo.py "$@"
