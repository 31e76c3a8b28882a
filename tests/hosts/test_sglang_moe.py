"""SGLang's real MoE runner unpatched beside patched, on CPU tensors: SGLang's Triton kernels are the oracle."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_vllm_signatures import FETCH, unpacked

pytestmark = pytest.mark.host

JOB = Path(__file__).with_name("sglang_moe_job.py")
VERSIONS = FETCH["HOSTS"]["sglang"]
TREES = [f"sglang-{version}" for version in (VERSIONS[0], VERSIONS[-1])]
OURS = ["silu", "in place", "gelu", "not gated", "gpt-oss", "gates first", "scaled", "expert parallel"]
OURS += ["weights on the input", "fp8", "fp8 padded", "fp8 static", "fp8 channels", "fp8 blocks", "int8 channels"]
OURS += ["int8 weights", "fp8 quantised once", "adapters, none in the batch"]
LEFT = {
    "no combine": "the experts' outputs are not summed up",
    "clamped silu": "silu with a clamp",
    "adapters": "LoRA adapters on the experts",
}
# fp16: SGLang rounds after each product, the activation and the sum, we once less. Unit roundoff 2^-11.
FP16 = 8 * 2.0**-11
# Root mean square. A rounding may move the activation between the products across a step of the quantised dtype.
QUANTISED = 2.0**-3


def run_job(job: Path, tree: str) -> dict:
    """What a job printed, with a host's sources on the path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(unpacked(tree)), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, str(job)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}


def assert_ours(name: str, case: dict, target: str) -> None:
    """The call ran on our kernels alone, and its result is the host's."""
    assert case["rms"] <= QUANTISED if "8" in name else case["difference"] <= FP16, case
    assert case["fired"][target] == 1
    assert sum(case["hit"].values()) >= 1
    assert case["fallback"] == case["error"] == {}


def assert_left(case: dict, reason: str) -> None:
    """The call ran on the host's kernels, to the bit, and the reason was counted."""
    assert case["difference"] == 0
    assert case["hit"] == case["error"] == {}
    assert case["fallback"] == {"fused_experts": {reason: 1}}


@functools.cache
def job(tree: str) -> dict:
    return run_job(JOB, tree)


@pytest.fixture(params=TREES)
def report(request) -> dict:
    return job(request.param)


def test_the_tuner_runs_sglangs_kernels(report):
    """With configs of its own, and no process group."""
    assert set(report["tuned"]) == {"fp16", "fp8 blocks", "int8 weights"}
    assert all(rms <= (QUANTISED if "8" in name else FP16) / 4 for name, rms in report["tuned"].items()), report[
        "tuned"
    ]


def test_every_case_is_looked_at(report):
    assert set(report["cases"]) - {"interleaved at load"} == {*OURS, *LEFT}


@pytest.mark.parametrize("name", [*OURS, "interleaved at load"])
def test_our_kernels_give_the_results_of_sglang(report, name):
    if name == "interleaved at load" and name not in report["cases"]:
        pytest.skip("came with SGLang 0.5.18")
    through_runner = name.startswith("adapters")
    assert_ours(name, report["cases"][name], "TritonRunnerCore.run" if through_runner else "fused_experts_impl")


@pytest.mark.parametrize("name", LEFT)
def test_what_we_do_not_take_stays_sglangs(report, name):
    assert_left(report["cases"][name], LEFT[name])
    assert f"moe_ops: fused_experts falls back to the host: {LEFT[name]}" in report["log"]


def test_expert_parallel_layers_are_known_as_such(report):
    """Two layers have experts on other ranks: 5 here, as many on each of the two others."""
    spread = [shape for shape in report["layers"] if "global_experts" in shape]
    assert spread == [
        f"grouped_gemm_config_64_float16, experts=5,intermediate=48,top_k={top_k},global_experts=15" for top_k in (2, 3)
    ]
    assert len(report["layers"]) > len(spread)
