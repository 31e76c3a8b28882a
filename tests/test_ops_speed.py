"""benchmarks/ops_speed.py: checks before speeds, the CSV, the floor, and the baselines that can run here."""

import contextlib
import csv
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import ops_speed
import plots
import pytest
import shapes
import torch
from baselines import (
    IMPLS,
    SGMV_PACKAGES,
    Missing,
    SglangTuned,
    VllmTuned,
    chunk_size,
    csgmv_batch_info,
    sglang_stand_ins,
)
from problem import copies_for, make_problem, max_rel_error, reference, tolerance
from shapes import MODELS, Case, Module
from timing import H200_CEILINGS, Timing

import lora_ops

from .hosts.test_vllm_signatures import FETCH, unpacked

QKV = MODELS["tiny"][0]
SOURCES = Path(os.environ.get("LORA_OPS_HOST_SOURCES", Path(__file__).resolve().parent.parent / ".hosts"))
VLLM_SOURCES = SOURCES / "vllm-0.26.0"
SGLANG_TREES = [f"sglang-{version}" for version in FETCH["HOSTS"]["sglang"]]


def run(*arguments: str) -> int:
    return ops_speed.main([*arguments, "--workers", "0"])


def read(folder) -> list[dict]:
    with open(folder / "ops_lora.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def fake_gpu(monkeypatch):
    """The path of a GPU run on CPU tensors: every call of graph_time is counted and answers 10 us, then 11, 12 ..."""
    calls = []

    def graph_time(function, copies, *args, **kwargs):
        for i in range(copies):
            function(i)
        calls.append(copies)
        us = 9.0 + len(calls)
        return Timing(us, us - 0.5, us + 0.5)

    monkeypatch.setattr(ops_speed, "ON_GPU", True)
    monkeypatch.setattr(ops_speed, "GPU", "NVIDIA H200")
    monkeypatch.setattr(ops_speed, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(ops_speed, "graph_time", graph_time)
    monkeypatch.setattr(ops_speed, "measured_ceilings", lambda: (1e12, 1e15))
    return calls


@pytest.fixture
def broken_op(monkeypatch):
    """lora_linear that is right but for one row, which it scales."""
    original = lora_ops.lora_linear

    def wrong(y, x, *args, **kwargs):
        before = y[-1].clone()
        original(y, x, *args, **kwargs)
        y[-1] += 0.05 * (y[-1] - before)

    monkeypatch.setattr(lora_ops, "lora_linear", wrong, raising=False)


TINY = ("--model", "tiny", "--module", "qkv", "--rank", "8", "--tokens", "9", "--adapters", "4")


def test_checks_without_a_gpu(tmp_path, capsys):
    assert run("--out", str(tmp_path), "--module", "qkv", "down", "--commit", "c0ffee") == 0
    output = capsys.readouterr().out
    assert "No GPU: checks only" in output
    assert "Nothing is timed" in output
    assert "sglang_tuned is missing: " in output
    rows = read(tmp_path)
    assert {row["module"] for row in rows} == {"qkv", "down"}
    assert {row["impl"] for row in rows} >= {"ours", "torch"}
    assert {(row["us"], row["us_min"], row["us_max"], row["cache"]) for row in rows} == {("", "", "", "")}
    assert all(0 < float(row["max_rel_err"]) <= float(row["tolerance"]) for row in rows)


def test_csv_columns(tmp_path, fake_gpu):
    assert run(*TINY, "--impl", "ours", "torch", "--dtype", "bf16", "--out", str(tmp_path), "--commit", "c0ffee") == 0
    ours_cold, ours_hot, torch_cold, torch_hot = read(tmp_path)
    wanted = "module slices k n rank tokens adapters distribution dtype cache impl config us us_min us_max floor_us "
    wanted += "max_rel_err gpu torch triton host_version commit date"
    assert set(wanted.split()) <= set(ours_cold)
    assert ours_cold["slices"] == "128+32+32"
    assert [ours_cold[c] for c in ("k", "n", "rank", "tokens", "adapters")] == ["128", "192", "8", "9", "4"]
    assert [row["cache"] for row in (ours_cold, ours_hot, torch_cold, torch_hot)] == ["cold", "hot", "cold", "hot"]
    assert [float(row["us"]) for row in (ours_cold, ours_hot, torch_cold, torch_hot)] == [10, 11, 12, 13]
    assert (ours_cold["us_min"], ours_cold["us_max"]) == ("9.500", "10.500")
    assert (ours_cold["gpu"], ours_cold["commit"], ours_cold["dtype"]) == ("NVIDIA H200", "c0ffee", "bf16")
    assert torch_cold["host_version"] == torch.__version__
    assert fake_gpu[0] > 1
    assert fake_gpu[1] == 1  # hot: one buffer


def test_no_speed_without_a_green_check(tmp_path, fake_gpu, broken_op, capsys):
    assert run(*TINY, "--impl", "ours", "torch", "--cache", "cold", "--out", str(tmp_path)) == 1
    output = capsys.readouterr().out
    ours, other = read(tmp_path)
    assert (ours["us"], ours["us_min"], ours["us_max"]) == ("", "", "")
    assert float(ours["max_rel_err"]) > float(ours["tolerance"])
    assert float(other["us"]) == 10  # the first call of the timer: ours was never timed
    assert "wrong" in output
    assert "1 checks passed, 1 failed" in output
    assert " 9.5" not in output


def test_red_check_without_a_gpu(broken_op):
    assert run("--impl", "ours", "--module", "o", "--rank", "16") == 1


def test_failing_baseline_is_shown_and_ours_goes_on(tmp_path, fake_gpu, monkeypatch, capsys):
    def bind(self, problem, config):
        raise AssertionError("rank [/8] unsupported")

    monkeypatch.setattr(IMPLS["torch"], "bind", bind)
    assert run(*TINY, "--impl", "torch", "ours", "--out", str(tmp_path)) == 1
    assert "rank [/8] unsupported" in capsys.readouterr().out
    assert [bool(row["us"]) for row in read(tmp_path)] == [False, False, True, True]


def test_resume_leaves_out_what_is_stored(tmp_path, fake_gpu):
    arguments = (*TINY, "--impl", "ours", "--out", str(tmp_path), "--commit", "c0ffee", "--resume")
    run(*arguments)
    run(*arguments)
    assert len(read(tmp_path)) == 2
    run(*arguments[:-2], "beef", "--resume")
    assert len(read(tmp_path)) == 4


def test_time_limit_stops_cleanly(tmp_path, fake_gpu, capsys):
    assert run(*TINY, "--impl", "ours", "--out", str(tmp_path), "--time-limit", "0") == 0
    assert "0 of 1 cases done" in capsys.readouterr().out


def test_report_and_plots_from_the_csv(tmp_path, fake_gpu, capsys):
    grid = ("--model", "tiny", "--tokens", "1", "9", "--adapters", "1", "3", "--cache", "cold", "--out", str(tmp_path))
    assert run(*grid, "--module", "qkv", "o", "--rank", "8", "16", "--impl", "ours", "torch") == 0
    written = sorted(path.name for path in tmp_path.glob("*.png"))
    assert written == [f"ops_lora_{kind}_tiny_bf16_uniform_cold.png" for kind in ("floor", "lead")]
    assert run(*grid, "--module", "o", "--rank", "8", "--impl", "ours") == 0
    assert len(read(tmp_path)) == 32 + 4
    assert len(plots.newest_times(tmp_path / "ops_lora.csv")) == 32
    capsys.readouterr()
    assert run("--report", "--out", str(tmp_path)) == 0
    assert "lead" in capsys.readouterr().out


def test_foreign_csv_is_not_appended_to(tmp_path):
    (tmp_path / "ops_lora.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="other columns"):
        run(*TINY, "--out", str(tmp_path))


@pytest.mark.parametrize("words", ["--rank 0", "--tokens 0", "--adapters -1", "--none-fraction 2"])
def test_bad_arguments_are_named(words, capsys):
    with pytest.raises(SystemExit):
        run(*words.split())
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_implementations_that_are_all_missing_check_nothing(capsys):
    with pytest.raises(SystemExit, match="none of --impl is there"):
        run("--impl", "sglang_tuned")
    assert "sglang_tuned is missing: " in capsys.readouterr().out


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no measurement in .*ops_lora\.csv"):
        run("--report", "--out", str(tmp_path))


def test_floor():
    # gate_up of Llama-3-8B, 64 tokens over 32 adapters of rank 16: x, A, B once, y twice, 2 bytes each
    case = Case("llama3-8b", MODELS["llama3-8b"][2], rank=16, tokens=64, adapters=32)
    slots = shapes.token_slots(case)
    moved = 2 * (64 * 4096 + 32 * 16 * 4096 * 2 + 32 * 16 * 28672 + 2 * 64 * 28672)
    assert shapes.floor_us(case, slots, *H200_CEILINGS) == pytest.approx(moved / 4.3e12 * 1e6)
    assert shapes.floor_us(case, slots, *H200_CEILINGS) == pytest.approx(10.6, abs=0.05)
    # compute-bound where the flops take longer
    flops = 2 * 64 * 16 * (4096 * 2 + 28672)
    assert shapes.floor_us(case, slots, 1e30, 790e12) == pytest.approx(flops / 790e12 * 1e6)
    # rows and adapters that are not in use cost nothing
    assert shapes.floor_us(case, np.full(64, -1), *H200_CEILINGS) == 0
    one = shapes.floor_us(case, np.zeros(64), *H200_CEILINGS)
    assert one == pytest.approx(2 * (64 * 4096 + 16 * 4096 * 2 + 16 * 28672 + 2 * 64 * 28672) / 4.3e12 * 1e6)


def test_token_slots():
    def slots(**changes):
        return shapes.token_slots(Case("tiny", QKV, 16, **({"tokens": 64, "adapters": 8} | changes)))

    assert slots().tolist() == [i % 8 for i in range(64)]
    assert set(slots(distribution="one")) == {4}
    counts = np.bincount(slots(tokens=512, distribution="zipf"), minlength=8)
    assert counts[0] > 2 * counts[7] > 0
    assert (slots(none_fraction=0.25) == -1).sum() == 16
    prefill = slots(tokens=4096, adapters=2)
    assert len(list(itertools.groupby(prefill))) == 8  # 8 sequences, tokens of one together
    with pytest.raises(ValueError, match="unknown distribution"):
        slots(distribution="normal")


def test_cold_rotation_passes_enough_bytes():
    case = Case("tiny", QKV, rank=16, tokens=1, adapters=1)
    per_call = 2 * (16 * (128 * 3 + 192) + 128 + 192)
    assert (copies_for(case, 1, 1 << 20) - 1) * per_call >= 1 << 20
    problem = make_problem(case, "cpu", 1 << 16, seed=0)
    addresses = {a.data_ptr() for a in itertools.chain(*problem.lora_a)}
    assert len(addresses) == 3 * problem.copies > 3


def test_error_of_rows():
    problem = make_problem(Case("tiny", QKV, 16, tokens=40, adapters=4, none_fraction=0.25), "cpu", 0, seed=1)
    expected = reference(problem)
    live = problem.slots >= 0
    good = expected.to(problem.y.dtype)
    assert 0 < max_rel_error(good, expected, problem) <= tolerance("bf16")

    one_row = good.clone()
    row = int(live.nonzero()[3])
    one_row[row] *= 1.1
    assert max_rel_error(one_row, expected, problem) == pytest.approx(0.1, rel=0.1)

    touched = good.clone()
    touched[int((~live).nonzero()[0]), 5] += 0.01
    assert max_rel_error(touched, expected, problem) == math.inf

    unwritten = good.clone()
    unwritten[row, 7] = math.nan
    assert not max_rel_error(unwritten, expected, problem) <= tolerance("bf16")


def test_reference_is_the_plain_formula():
    problem = make_problem(Case("tiny", QKV, 16, tokens=7, adapters=3, none_fraction=0.3), "cpu", 0, seed=2)
    expected = problem.y0.double()
    for m, slot in enumerate(problem.slots.tolist()):
        if slot >= 0:
            parts = [
                b[slot].double() @ (a[slot].double() @ problem.x[m].double())
                for a, b in zip(problem.lora_a[0], problem.lora_b[0], strict=True)
            ]
            expected[m] += torch.cat(parts)
    torch.testing.assert_close(reference(problem).double(), expected, rtol=1e-5, atol=1e-5)


def test_sglang_segments():
    case = Case("tiny", QKV, 16, tokens=70, adapters=3, none_fraction=0.2)
    problem = make_problem(case, "cpu", 0, seed=0)
    info = csgmv_batch_info(problem, chunk=16)
    bounds = info.seg_indptr.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == 70
    assert max(np.diff(bounds)) <= 16
    slots = torch.where(problem.slots < 0, 3, problem.slots)[info.permutation]
    for (first, last), slot in zip(itertools.pairwise(bounds), info.weight_indices.tolist(), strict=True):
        assert set(slots[first:last].tolist()) == {slot}
    assert info.lora_ranks.tolist() == [16, 16, 16, 0]
    assert [chunk_size(tokens, 128) for tokens in (63, 64, 255, 256)] == [16, 32, 32, 128]
    assert chunk_size(8192, 16) == 16


def test_stand_ins_leave_no_trace():
    marker = object()
    sys.modules["sglang"] = marker
    try:
        with sglang_stand_ins(SGMV_PACKAGES[0]):
            assert sys.modules["sglang"] is not marker
        assert sys.modules["sglang"] is marker
    finally:
        del sys.modules["sglang"]
    assert not [name for name in sys.modules if name.startswith("sglang")]


class FakeVllm(VllmTuned):
    """The config plumbing without vLLM: both ops append the config they look up."""

    def __init__(self):
        self.seen = []
        self.modules = {
            op: type("Op", (), {"get_lora_op_configs": lambda *a, **k: {"default": True}})
            for op in ("shrink", "expand")
        }

    def default_config(self, op, case):
        return {"default": True, "num_warps": 4}

    def bind_ops(self, problem):
        def call(op):
            def run(i, config):
                with self.using({op: config}):
                    self.seen.append((op, self.modules[op].get_lora_op_configs(op, batch=1)))

            return run

        return {op: call(op) for op in self.modules}


def test_sweep_takes_the_fastest_config_of_each_kernel(fake_gpu, monkeypatch):
    problem = make_problem(Case("tiny", QKV, 16, tokens=8, adapters=2), "cpu", 0, seed=0)
    impl = FakeVllm()
    before = {op: module.get_lora_op_configs for op, module in impl.modules.items()}

    def graph_time(run, copies, **kwargs):
        run(0)
        config = impl.seen[-1][1]
        return Timing(*[1.0 if config.get("num_warps") == 8 and config.get("num_stages") == 3 else 2.0] * 3)

    monkeypatch.setattr(ops_speed, "graph_time", graph_time)
    best = ops_speed.sweep(impl, problem, seconds=60)
    assert [best[op]["num_warps"] for op in ("shrink", "expand")] == [8, 8]
    assert [best[op]["num_stages"] for op in ("shrink", "expand")] == [3, 3]
    assert best["tried"] > 40
    assert {op: module.get_lora_op_configs for op, module in impl.modules.items()} == before
    out_of_time = ops_speed.sweep(impl, problem, seconds=-1)
    assert out_of_time["tried"] == 0
    assert out_of_time["shrink"] == {"default": True, "num_warps": 4}


def test_sampled_configs_fit_the_case():
    impl = FakeVllm()
    for case in (Case("", Module("o", 4096, (4096,)), 16, 64, 64), Case("", Module("o", 4096, (4096,)), 64, 8192, 8)):
        candidates = impl.candidates(case)
        assert candidates[0]["shrink"]["default"]
        assert len(candidates) == 36
        for config in candidates[1:]:
            assert config["shrink"]["block_m"] <= max(16, case.tokens // case.adapters)
            assert config["shrink"]["block_n"] <= case.rank
            assert config["shrink"]["block_k"] * config["shrink"]["split_k"] <= 4096


def test_compile_jobs_cover_every_config_once():
    impl = FakeVllm()
    cases = [Case("", QKV, 16, tokens, adapters) for tokens, adapters in ((1, 1), (32, 32), (64, 64))]
    jobs = ops_speed.compile_jobs(cases, [impl])
    configs = [str(config) for _, case, configs in jobs for config in configs if case.tokens > 1]
    assert len(configs) == len(set(configs))
    assert {str(config) for case in cases for config in impl.candidates(case)} == {
        str(config) for _, _, configs in jobs for config in configs
    }
    assert all(case.adapters <= 2 for _, case, _ in jobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_baseline_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for impl in ("vllm_default", "sglang_csgmv"):
        with pytest.raises(Missing, match="GPU"):
            IMPLS[impl]()


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(not VLLM_SOURCES.is_dir(), reason=f"no {VLLM_SOURCES}: python scripts/fetch_host_sources.py")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU run checks them")
def test_real_baseline_kernels_in_the_interpreter(tmp_path):
    """vLLM 0.26.0's kernels against the same reference."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(VLLM_SOURCES)}
    command = [sys.executable, ops_speed.__file__, *TINY, "--none-fraction", "0.3", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the Triton interpreter" in done.stdout
    versions = {row["impl"]: row["host_version"] for row in read(tmp_path)}
    assert versions["vllm_default"] == "0.26.0"


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("tree", SGLANG_TREES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU run checks them")
def test_real_sglang_kernels_in_the_interpreter(tmp_path, tree):
    """csgmv of each version of SGLang that we know, against the same reference."""
    site = unpacked(tree)
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OPS_SPEED_SGLANG_SITE": str(site)}
    arguments = ["--none-fraction", "0.3", "--impl", "ours", "sglang_csgmv", "--out", str(tmp_path)]
    command = [sys.executable, ops_speed.__file__, *TINY, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    versions = {row["impl"]: row["host_version"] for row in read(tmp_path)}
    assert f"sglang-{versions['sglang_csgmv']}" == tree


def test_absent_sglang_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OPS_SPEED_SGLANG_SITE", str(tmp_path))
    with pytest.raises(Missing, match="lacks lora_tuning_config"):
        SglangTuned()


def test_help_names_the_modes(capsys):
    with contextlib.suppress(SystemExit):
        ops_speed.main(["--help"])
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--quick", "--time-limit", "--none-fraction", "--report"))
