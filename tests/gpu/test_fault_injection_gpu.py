"""Faults on a GPU: an illegal access ends the process, LORA_OPS_DEBUG=1 names its kernel, a broken launch ends vLLM."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from engine_job import Job, run_job

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def corrupted(**variables: str) -> str:
    """Error output of a process that reads far outside of the weights."""
    environment = {name: value for name, value in os.environ.items() if name != "LORA_OPS_DEBUG"} | variables
    command = [sys.executable, "-m", "tests.gpu.fault_job"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "works" in run.stdout, run.stderr
    assert "survived" not in run.stdout
    assert run.returncode != 0
    assert "illegal memory access" in run.stderr
    return run.stderr


def test_an_illegal_access_ends_the_process():
    corrupted()


def test_debug_names_the_kernel_of_an_illegal_access():
    errors = corrupted(LORA_OPS_DEBUG="1")
    assert re.search(r"KernelError: lora_linear failed: kernel \w*shrink\w* failed: .*illegal memory access", errors)
    assert "lora_a: bfloat16 [4, 16, 4096]" in errors


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_broken_launch_ends_vllms_request(checkpoint, requests):
    """Eagerly, for a captured graph launches its kernels without Python."""
    model, adapters = checkpoint
    adapters = dict(list(adapters.items())[:2])
    requests = [[prompt, name] for prompt, name in requests if name in (None, *adapters)]
    engine = {"gpu_memory_utilization": 0.3}
    job = Job(model, adapters, requests, patch="environment", own_process=True, dtype="bfloat16", engine=engine)
    result = run_job(job, script=ROOT / "tests" / "hosts" / "fault_job.py", timeout=300)
    assert result["device"] != "CPU"
    assert result["worker"]["status"], "vLLM found no plugin of ours: install this project into its environment"
    assert len(result["before"]) == len(requests)
    assert result["error"] is not None, "a request was answered without our kernels"
    assert re.search(r"KernelError: lora_\w+ failed: RuntimeError: injected fault", result["output"])
