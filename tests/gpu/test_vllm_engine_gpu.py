"""A patched vLLM agrees with an unpatched one on a GPU, in bf16, under CUDA graphs and torch.compile."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm_agreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ADAPTERS, RANK = 8, 16
REQUESTS = (1, 16, 64)


def agree(out: Path, work: Path, *arguments: str) -> dict[str, dict]:
    """Run the script; the results of its engines, when it says that they agree."""
    command = [sys.executable, vllm_agreement.__file__, "--model", "small", "--adapters", str(ADAPTERS)]
    command += ["--rank", str(RANK), "--requests", *map(str, REQUESTS), "--no-speed", "--memory", "0.3", "--compare"]
    command += ["--out", str(out), "--work", str(work), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "patched and stock agree" in done.stdout
    options = vllm_agreement.parse(command[2:])
    files = {name: vllm_agreement.result_file(options, name) for name in ("stock", "patched")}
    return {name: json.loads(file.read_text()) for name, file in files.items()}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder of the checkpoint, shared by the tests."""
    return tmp_path_factory.mktemp("checkpoint")


def test_one_gpu(tmp_path, work):
    results = agree(tmp_path, work, "--variant", "reference", "stock", "patched")
    for result in results.values():
        assert result["cuda_graphs"] != "NONE"
        assert result["torch_compile"] != "NONE"
    (worker,) = results["patched"]["workers"]
    assert worker["wrappers"] == ["ops_patches.vllm_punica_gpu.LoraOpsPunicaWrapperGPU"]
    hits = worker["status"]["counters"]["hit"]
    assert hits["lora_linear"] > 0
    assert hits["update_metadata"] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", [(), ("--fully-sharded",)], ids=["replicated", "fully_sharded"])
def test_two_gpus(tmp_path, work, sharding):
    results = agree(tmp_path, work, "--tp", "2", *sharding, "--variant", "reference", "stock", "patched")
    workers = results["patched"]["workers"]
    assert len(workers) == 2
    for worker in workers:
        hits = worker["status"]["counters"]["hit"]
        assert hits["lora_shrink" if sharding else "lora_linear"] > 0
