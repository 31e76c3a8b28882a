"""The demo's verdict: it must not look right when the patch did not fire, or when answers differ."""

import copy
import io

import pytest
from demo import OURS, PLACES, faults_of_run, faults_of_tokens, table
from engine_job import compare
from rich.console import Console

ADAPTERS = (None, "a", "b")


def answer(adapter: str | None, first: int) -> dict:
    """Three tokens, each with a log-prob of -0.5, the runner-up 0.2 behind."""
    tokens = [first, first + 1, first + 2]
    logprobs = [{str(token): -0.5, str(token + 100): -0.7} for token in tokens]
    return {"prompt": "p", "adapter": adapter, "tokens": tokens, "logprobs": logprobs}


def good(patched: bool) -> dict:
    status = {
        "patched": patched,
        "reasons": [],
        "never_fired": [],
        "counters": {"hit": {"lora_linear": 9} if patched else {}, "fallback": {}, "error": {}},
    }
    wrapper = f"{OURS}cpu.Ours" if patched else "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    return {
        "pid": 1,
        "worker": {"pid": 1, "wrappers": [wrapper], "status": status},
        "requests": [answer(adapter, 10 * i) for i, adapter in enumerate(ADAPTERS, 1)],
    }


def test_a_good_run_has_no_faults():
    assert faults_of_run(good(True), patched=True, own_process=False) == []
    assert faults_of_run(good(False), patched=False, own_process=False) == []
    assert faults_of_tokens(good(False), good(True), "float32") == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r["worker"].update(wrappers=good(False)["worker"]["wrappers"]), "patched worker runs"),
        (lambda r: r["worker"].update(wrappers=[]), "patched worker runs"),
        (lambda r: r["worker"].update(wrappers=r["worker"]["wrappers"] + ["vllm.Other"]), "patched worker runs"),
        (lambda r: r["worker"]["status"]["counters"].update(hit={}), "never called"),
        (lambda r: r["worker"]["status"]["counters"].update(hit={"update_metadata": 5}), "never called"),
        (lambda r: r["worker"]["status"].update(patched=False), "not patched"),
        (lambda r: r["worker"].update(status=None), "not patched"),
        (lambda r: r["worker"]["status"].update(never_fired=["t"]), "never called by vLLM"),
        (lambda r: r["worker"]["status"]["counters"].update(fallback={"lora_linear": {"why": 1}}), "fallback"),
        (lambda r: r["worker"]["status"]["counters"].update(error={"lora_linear": {"ValueError": 1}}), "error"),
        (lambda r: r["worker"].update(pid=2), "did not run where"),
    ],
)
def test_a_patch_that_did_not_fire_is_a_fault(spoil, says):
    result = good(True)
    spoil(result)
    assert any(says in fault for fault in faults_of_run(result, patched=True, own_process=False))


def test_our_kernels_in_the_unpatched_engine_are_a_fault():
    assert len(faults_of_run(good(True), patched=False, own_process=False)) == 2


def test_another_token_is_a_fault():
    patched = good(True)
    patched["requests"][1]["tokens"][2] = 99
    (fault,) = faults_of_tokens(good(False), patched, "float32")
    assert fault.startswith("a: tokens differ from position 2 on")


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_another_logprob_is_a_fault(error):
    patched = good(True)
    patched["requests"][0]["logprobs"][1]["11"] = -0.5 + error
    (fault,) = faults_of_tokens(good(False), patched, "float32")
    assert fault.startswith("base: a log-prob differs")


def test_adapters_without_effect_are_a_fault():
    runs = [good(False), good(True)]
    for run in runs:
        run["requests"][1] = answer("a", 10)
    assert faults_of_tokens(*runs, "float32") == ["base and a give the same tokens: the adapters prove nothing"] * 2


def test_a_near_tie_is_told_from_a_wrong_answer():
    expected, got = answer("a", 10), copy.deepcopy(answer("a", 10))
    got["tokens"][1] = 111
    assert not compare(expected, got, tie=0.1).tie
    assert compare(expected, got, tie=0.3).tie
    got["tokens"][1] = 55
    assert not compare(expected, got, tie=0.3).tie
    assert compare(expected, got).tokens == 1


@pytest.mark.parametrize(("gap", "dtype", "cell"), [(0.05, "bfloat16", "2/3, 1 near-tie"), (0.3, "bfloat16", "2/3")])
def test_the_table_tells_near_ties_from_differences(gap, dtype, cell):
    results = {(place, patched): copy.deepcopy(good(patched)) for place in PLACES for patched in (False, True)}
    expected, got = (results["in process", patched]["requests"][1] for patched in (False, True))
    got["tokens"] = [*got["tokens"][:2], got["tokens"][2] + 100]
    expected["logprobs"][2] = {str(expected["tokens"][2]): -0.5, str(got["tokens"][2]): -0.5 - gap}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(results, dtype))
    rows = [line for line in console.export_text().splitlines() if "│ a " in line]
    assert [row.split("│")[4].strip() for row in rows] == [cell, "3/3"]
