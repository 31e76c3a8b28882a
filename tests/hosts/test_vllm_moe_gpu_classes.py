"""vLLM's real TritonExperts and fused_experts unpatched beside patched, on CPU tensors: its kernels are the oracle."""

import functools
from pathlib import Path

import pytest

from .test_sglang_moe import assert_left, assert_ours, run_job
from .test_vllm_signatures import GPU_TREES

pytestmark = pytest.mark.host

JOB = Path(__file__).with_name("vllm_moe_job.py")
KERNEL = ["silu", "gelu_tanh", "not gated", "gpt-oss", "gates first", "expert parallel", "weights on the input"]
KERNEL += ["many experts a token", "fp8", "fp8 static", "fp8 channels", "fp8 blocks", "int8 weights"]
FUNCTION = ["function", "function, expert parallel", "function, weights on the input"]
FUNCTION += ["function, int8 channels", "function, fp8 blocks"]
KERNEL += ["fp8, DeepGEMM there", "fp8 blocks, DeepGEMM there"]
FUNCTION += ["function, int8 channels, DeepGEMM there", "function, fp8 blocks, DeepGEMM there"]
LEFT = {
    "clamped silu": "silu with a clamp",
    "function, swiglustep": "activation swiglustep",
    "subclass": "Subclass",
    "adapters": "LoRA adapters on the experts",
    "fp8 adapters": "LoRA adapters on the experts",
    "fp8 inside others": "tokens that come quantised",
}


@functools.cache
def job(tree: str) -> dict:
    return run_job(JOB, tree)


@pytest.fixture(params=[GPU_TREES[0], GPU_TREES[-1]])
def report(request) -> dict:
    return job(request.param) | {"tree": request.param}


def test_every_case_is_looked_at(report):
    assert set(report["cases"]) == {*KERNEL, *FUNCTION, *LEFT}


@pytest.mark.parametrize("name", KERNEL)
def test_a_modular_kernel_gives_the_results_of_vllm(report, name):
    assert_ours(name, report["cases"][name], "TritonExperts.apply")


@pytest.mark.parametrize("name", KERNEL)
def test_intermediates_lie_in_the_workspaces_that_vllm_has_reserved(report, name):
    """vLLM 0.26.0 puts the output at the start of one, behind which is room where a token has many experts."""
    if report["tree"] == GPU_TREES[0]:
        expected = ["h", "y", "out"] if name == "many experts a token" else ["y", "out"]
    else:
        expected = ["h", "y"]
    assert report["in workspaces"][name] == expected


@pytest.mark.parametrize("name", FUNCTION)
def test_a_function_bound_at_import_gives_the_results_of_vllm(report, name):
    assert_ours(name, report["cases"][name], "fused_experts_impl")


def test_groups_of_fp8_have_powers_of_two_as_scales_where_vllm_gives_them(report):
    """Results of the other scales would be off by 0.05; the modular kernel, which rounds to bf16 too, says less."""
    given = {name: value for name, value in report["power_of_two_scales"].items() if value is not None}
    blocks = ("fp8 blocks", "function, fp8 blocks")
    assert given == dict.fromkeys(blocks, False) | {f"{name}, DeepGEMM there": True for name in blocks}
    for name in ("function, fp8 blocks", "function, fp8 blocks, DeepGEMM there"):
        assert report["cases"][name]["whole"] <= 2.0**-5


@pytest.mark.parametrize("name", LEFT)
def test_what_we_do_not_take_stays_vllms(report, name):
    assert_left(report["cases"][name], LEFT[name])


def test_tokens_are_quantised_by_us_unless_they_are_sent_first(report):
    assert report["defers"] is True
    assert report["defers before an all-to-all"] is False
    assert report["defers before an all-gather"] is False
    assert report["defers unpatched"] is False
