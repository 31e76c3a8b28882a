#!/usr/bin/env bash
# Print the current Python if it has the named modules and sees a CUDA GPU, else fail: scripts/gpu_python.sh torch vllm
set -euo pipefail

PYTHON=$(command -v "${PYTHON:-python3}") || { echo "there is no ${PYTHON:-python3}" >&2; exit 1; }
"$PYTHON" - "$@" <<'EOF'
import importlib.util
import sys

missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} has no {', '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit(f"{sys.executable} sees no CUDA GPU")
EOF
echo "$PYTHON"
