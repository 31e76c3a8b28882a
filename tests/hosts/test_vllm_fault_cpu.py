"""A fault in our kernels ends the request with an error that names the op; vLLM's own path does not take over."""

from pathlib import Path

import pytest
from engine_job import Job, run_job

pytestmark = pytest.mark.host

JOB = Path(__file__).with_name("fault_job.py")
FAULT = "lora_linear failed: RuntimeError: injected fault"


def serve(checkpoint, requests, own_process: bool) -> dict:
    model, adapters = checkpoint
    job = Job(model, adapters, requests, patch="environment", own_process=own_process)
    result = run_job(job, script=JOB, timeout=120)
    assert len(result["before"]) == len(requests), "it works before the fault"
    assert result["error"] is not None, "a request was answered without our kernels"
    return result


def test_in_the_callers_process(checkpoint, requests):
    result = serve(checkpoint, requests, own_process=False)
    assert result["error"].startswith(f"KernelError: {FAULT}")
    assert "lora_a: float32" in result["error"]
    counters = result["worker"]["status"]["counters"]
    assert counters["error"] == {"lora_linear": {"KernelError": 1}}
    assert counters["fallback"] == {}


def test_in_a_process_of_its_own(checkpoint, requests):
    """vLLM says that its core died, and its log why."""
    result = serve(checkpoint, requests, own_process=True)
    assert result["error"].startswith("EngineDeadError")
    assert f"KernelError: {FAULT}" in result["output"]
