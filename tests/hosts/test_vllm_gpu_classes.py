"""Our GPU wrapper beside vLLM's own, both real, on CPU tensors: vLLM's Triton kernels are the oracle."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_vllm_signatures import GPU_TREES, unpacked

pytestmark = pytest.mark.host

JOB = Path(__file__).with_name("gpu_class_job.py")
# fp16 through two products: vLLM rounds the sum before it adds y, we after. Two unit roundoffs of the largest value,
# and one more for elements below it.
FP16 = 3 * 2.0**-11


@functools.cache
def job(name: str) -> dict:
    paths = [str(unpacked(name)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run([sys.executable, str(JOB)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=GPU_TREES)
def report(request) -> dict:
    return job(request.param)


def test_a_graph_captured_before_the_first_mapping_holds_the_lora_part(report):
    """Those of vision encoders are."""
    host, ours = report["launches before a mapping"]
    assert host >= 2
    assert ours == 2


def test_the_selector_builds_our_class(report):
    assert report["class"] == "LoraOpsPunicaWrapperGPU"


def test_same_results_as_the_host(report):
    differences = report["difference"]
    assert set(differences) >= {
        "linear",
        "linear, written",
        "linear of strided columns",
        "beside",
        "beside, q k v",
        "shrink",
        "fully sharded",
        "embedding",
        "logits",
    }
    assert all(value <= FP16 for value in differences.values()), differences


@pytest.mark.parametrize("batch", ["no adapter", "one token", "mixed"])
@pytest.mark.parametrize("mode", ["plain", "specialized"])
def test_the_hosts_metadata_stay_filled(report, mode, batch):
    host, ours = report["metadata"][mode][batch]
    if batch == "no adapter":  # the host leaves early and leaves the rest as it was
        keys = {"no_lora", "embedding_offsets", "token_slots"}
        host, ours = ({key: fields[key] for key in keys} for fields in (host, ours))
    assert ours == host


def test_the_tuner_measures_the_hosts_kernels(report):
    """Over other adapters each call, with the config that it is about to write."""
    tuned = report["tuned"]
    assert len(tuned["difference"]) > 1
    assert max(tuned["difference"]) <= FP16
    for op in ("shrink", "expand"):
        config, us, default_us = tuned[op]
        assert config["marker"] == op
        assert us < default_us


def test_the_layers_run_beside_their_gemm(report):
    assert report["apply"] == ["_apply_sync", "apply_beside"] * 2
    assert report["counters"]["hit"]["lora_delta"] == report["counters"]["hit"]["lora_join"] == 2
    assert report["in_place"] == [False, True]


def test_an_adapter_without_a_slot_is_named(report):
    assert "tokens use adapters [99]" in report["unknown adapter"]


def test_every_method_reached_our_ops(report):
    hits = report["counters"]["hit"]
    assert hits["lora_linear"] >= 3
    assert hits["lora_shrink"] >= 3
    assert hits["lora_expand"] >= 2
    assert report["counters"]["fallback"] == report["counters"]["error"] == {}
