"""benchmarks/moe_agreement.py: what counts as agreement, and what it asks of SGLang."""

import copy
import csv
import json
import sys
from types import SimpleNamespace

import moe_agreement as ma
import numpy as np
import pytest
import serving_server as ss

REQUESTS = (1, 4, 12)
NOISE = 0.02


def answers(rng, truth: np.ndarray) -> dict:
    logprob = truth + rng.normal(0, NOISE, truth.shape)
    return {"logprob": logprob.tolist(), "best": [[7] * truth.shape[1]] * truth.shape[0]}


def engine(rng, truth: np.ndarray, hits: int = 0) -> dict:
    prefill = {str(n): answers(rng, truth[:n]) for n in REQUESTS} | {"reversed": answers(rng, truth)}
    greedy = [{"tokens": [7, 8], "logprobs": [{"7": -1.0, "9": -1.01}, {"8": -2.0}]}]
    return {
        "agreement": {"prefill": prefill, "greedy": greedy},
        "speed": {"decode_ms": {"1": [4.0, 5.0], "12": [8.0, 8.0]}, "prefill_tokens_per_s": [100.0, 110.0]},
        "faults": [],
        "counters": [{"hit": {"fused_experts": hits}}],
        **dict.fromkeys(("version", "torch", "gpu", "commit", "date"), "?"),
        "ready_s": 1.0,
    }


@pytest.fixture
def results() -> dict[str, dict]:
    rng = np.random.default_rng(0)
    truth = rng.normal(-8, 1, (12, 32))
    return {"base": engine(rng, truth), "patched": engine(rng, truth, hits=9)}


@pytest.fixture
def verdict(tmp_path, capsys):
    """Stores results and compares them: (exit status, output)."""

    def compare(results: dict[str, dict]) -> tuple[int, str]:
        arguments = ["--host", "sglang", "--model", "tiny-moe", "--out", str(tmp_path)]
        for name, result in results.items():
            ma.result_file(ma.parse(arguments), name).write_text(json.dumps(result))
        return ma.main([*arguments, "--compare"]), capsys.readouterr().out

    return compare


def test_engines_that_round_alike_agree(results, verdict):
    status, output = verdict(results)
    assert status == 0, output
    assert "nothing is wrong" in output
    assert "9 calls of our kernels" in output


def test_a_shift_of_one_batch_size_is_seen(results, verdict):
    wrong = results["patched"]["agreement"]["prefill"]["4"]
    wrong["logprob"] = (np.array(wrong["logprob"]) + 8 * NOISE).tolist()
    status, output = verdict(results)
    assert status == 1
    assert "patched against base, 4 requests: rms" in output


def test_greedy_tokens_may_part_at_a_near_tie_only(results, verdict):
    other = results["patched"]["agreement"]["greedy"][0]
    other["tokens"] = [9, 8]
    assert verdict(results)[0] == 0
    other["tokens"] = [5, 8]
    status, output = verdict(results)
    assert status == 1
    assert "parts from base at token 0" in output


def test_a_patch_that_did_not_fire_is_seen(results, verdict):
    results["patched"]["faults"] = ss.faults("patched", [], 1, ss.SGLANG_MOE)
    status, output = verdict(results)
    assert status == 1
    assert "our kernels were called in 0 of 1 workers" in output


def off_by(truth: np.ndarray, error: float, seed: int) -> dict:
    """An engine that gives the same answer in every batch, that far from the truth."""
    result = engine(np.random.default_rng(1), truth)
    logprob = truth + np.random.default_rng(seed).normal(0, error, truth.shape)
    best = [[7] * truth.shape[1]] * truth.shape[0]
    for name, answer in result["agreement"]["prefill"].items():
        rows = int(name) if name.isdigit() else len(truth)
        answer.update(logprob=logprob[:rows].tolist(), best=best[:rows])
    return result


@pytest.mark.parametrize(("error", "status"), [(0.02, 0), (0.03, 1)])
def test_the_reference_is_the_yardstick_of_a_base_that_never_changes_its_mind(tmp_path, verdict, error, status):
    truth = np.random.default_rng(0).normal(-8, 1, (12, 32))
    results = {"base": off_by(truth, 0.02, seed=2), "patched": off_by(truth, error, seed=3)}
    found, output = verdict(copy.deepcopy(results))
    assert found == 1, output  # without a reference, base's perfect repetition is the yardstick
    options = ma.parse(["--host", "sglang", "--model", "tiny-moe", "--out", str(tmp_path)])
    reference = {"prefill": {"logprob": truth[:9].tolist(), "best": [[7] * 32] * 9}}
    ma.result_file(options, "reference").write_text(json.dumps(reference))
    found, output = verdict(results)
    assert found == status, output
    assert "patched against fp32" in output
    rows = list(csv.DictReader((tmp_path / f"{ma.label(options)}.csv").open()))
    against = {row["what"]: float(row["rms"]) for row in rows}
    assert against["base against fp32"] == pytest.approx(0.02, rel=0.1)
    assert against["patched against fp32"] == pytest.approx(error, rel=0.1)
    assert {row["host"] for row in rows} == {"sglang"}


def test_dummy_weights_are_timed_alone(results, verdict):
    for result in results.values():
        result["agreement"] = None
    status, output = verdict(copy.deepcopy(results))
    assert status == 0
    assert "answers are not compared" in output
    assert "ms per decode step" in output


def test_engines_of_different_arguments_are_not_compared(results, verdict):
    results["patched"]["engine_args"] = {"dtype": "float16"}
    with pytest.raises(SystemExit, match="different --engine-args"):
        verdict(results)


def test_the_reference_needs_weights(capsys):
    with pytest.raises(SystemExit):
        ma.parse(["--host", "vllm", "--out", ".", "--variant", "reference"])
    assert "give --load-format safetensors" in capsys.readouterr().err


def test_missing_results_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"_base\.json"):
        ma.main(["--host", "vllm", "--out", str(tmp_path), "--compare"])


def test_requests_do_not_depend_on_how_many_run():
    few, many = (ma.parse(["--host", "vllm", "--out", ".", "--requests", *n]) for n in (("4",), ("1", "64")))
    assert ma.make_requests(many, 16, seed=0)[:4] == ma.make_requests(few, 16, seed=0)


class FakeSglang:
    """Answers as sglang.Engine does."""

    def generate(self, input_ids, sampling_params, return_logprob=False, top_logprobs_num=0, logprob_start_len=-1):
        self.asked = sampling_params
        outputs = []
        for prompt in input_ids:
            meta = {}
            if return_logprob:
                steps = range(sampling_params["max_new_tokens"])
                meta["output_token_logprobs"] = [(-0.5, 3 + i, None) for i in steps]
                meta["output_top_logprobs"] = [[(-0.5, 3 + i, None), (-0.6, 9, None)] for i in steps]
                if logprob_start_len == 0:
                    scores = [-float(i) for i in range(1, len(prompt))]
                    meta["input_token_logprobs"] = [(None, prompt[0], None), *zip(scores, prompt[1:], [None] * 9)]  # noqa: B905
                    meta["input_top_logprobs"] = [None, *[[(-0.1, 4, None)]] * (len(prompt) - 1)]
            outputs.append({"output_ids": [], "meta_info": meta})
        return outputs


def test_answers_of_sglang():
    found = object.__new__(ma.SglangEngine)
    found.engine, found.requests, found.vocab, found.adapters = FakeSglang(), [1, 2], 50, []
    requests = [ma.Request((5, 6, 7), None, 0), ma.Request((8, 9), None, 0)]
    assert found.prefill(requests) == {"logprob": [[-1.0, -2.0], [-1.0]], "best": [[4, 4], [4]]}
    first = found.greedy(requests)[0]
    assert first["tokens"][:2] == [3, 4]
    assert first["logprobs"][0] == {"3": -0.5, "9": -0.6}
    assert found.engine.asked["max_new_tokens"] == ma.GREEDY_TOKENS
    assert set(found.speed()["decode_ms"]) == {"1", "2"}


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_engine_arguments_reach_the_engine(monkeypatch, host):
    asked = {}
    fake = SimpleNamespace(Engine=asked.update, LLM=asked.update, __version__="0")
    monkeypatch.setitem(sys.modules, host, fake)
    options = ma.parse(["--host", host, "--out", ".", "--engine-args", '{"dtype": "float16", "extra": 3}'])
    ma.ENGINES[host](options)
    assert asked["dtype"] == "float16"
    assert asked["extra"] == 3
    assert asked["load_format"] == "dummy"
