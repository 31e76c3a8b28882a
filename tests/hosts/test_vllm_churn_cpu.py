"""Adapters that come, go and change under traffic, on a real engine on the CPU: the same answers, no memory lost."""

import json
import subprocess
import sys

import pytest
import soak

pytestmark = [pytest.mark.host, pytest.mark.slow]

ADAPTERS, SLOTS, CONCURRENT = 24, 4, 16


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """Of a soak that found no fault; its speed is not judged, for other tests run on the same cores."""
    folder = tmp_path_factory.mktemp("soak")
    command = [sys.executable, soak.__file__, "--model", "tiny", "--minutes", "0.5", "--swaps", "10", "--slack", "0.9"]
    command += ["--adapters", str(ADAPTERS), "--slots", str(SLOTS), "--cpu-slots", "8"]
    command += ["--concurrency", str(CONCURRENT), "--longest-prompt", "64", "--longest-answer", "16"]
    command += ["--work", str(folder), "--out", str(folder / "soak.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "soak.json").read_text())


def found(result: dict, what: str) -> float:
    (check,) = [check for check in result["checks"] if what in check["what"]]
    assert check["holds"]
    return check["found"]


def test_answers_under_load_are_those_alone(result):
    found(result, f"{CONCURRENT} probes at once against alone")


def test_hundreds_of_swaps_leave_answers_as_they_were(result):
    windows = result["windows"]
    assert sum(window["swaps"] for window in windows) >= 100
    assert sum(window["activations"] for window in windows) >= 300
    assert sum(len(window["errors"]) for window in windows) >= 20
    assert sum(window["aborted"] for window in windows) > 0
    found(result, "alone after the soak against before")


def test_no_memory_is_lost(result):
    found(result, "resident memory")
    found(result, "new live tensors")
    found(result, "new open files")


def test_the_engine_ran_on_our_class_without_errors(result):
    (worker,) = result["workers"]
    assert worker["wrappers"] == ["ops_patches.vllm_punica_cpu.LoraOpsPunicaWrapperCPU"]
    assert worker["status"]["counters"]["error"] == worker["status"]["counters"]["fallback"] == {}
    assert result["faults"] == []
