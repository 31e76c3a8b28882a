"""benchmarks/soak.py on a GPU, shortly: adapters in a few slots, and all of them in every batch."""

import importlib.util
import json
import subprocess
import sys

import pytest
import soak
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of the checkpoint, shared by the tests."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.mark.parametrize(("slots", "cpu_slots"), [(4, 8), (24, 32)])
def test_soak(tmp_path, work, slots, cpu_slots):
    out = tmp_path / "soak.json"
    command = [sys.executable, soak.__file__, "--minutes", "1", "--layers", "4", "--memory", "0.4"]
    command += ["--slots", str(slots), "--cpu-slots", str(cpu_slots), "--slack", "0.3"]
    command += ["--work", str(work), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=580)
    assert done.returncode == 0, done.stdout
    result = json.loads(out.read_text())
    assert result["faults"] == []
    assert sum(window["swaps"] for window in result["windows"]) > 100
    assert result["idle"]["compiled kernels"] > 0
    (worker,) = result["workers"]
    assert worker["wrappers"] == ["ops_patches.vllm_punica_gpu.LoraOpsPunicaWrapperGPU"]
