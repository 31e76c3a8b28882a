"""benchmarks/ops_speed.py --moe: checks before speeds, the CSV, the floor, the second process, and the hosts' names."""

import ast
import csv
import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import moe_baselines
import moe_measure
import moe_problem
import moe_report
import moe_shapes
import moe_speed
import moe_worker
import ops_speed
import pytest
import torch
from moe_baselines import IMPLS, Missing
from moe_shapes import BLOCK, LAYERS, Case
from rich.console import Console
from timing import H200_CEILINGS, Timing

import moe_ops

SOURCES = Path(os.environ.get("LORA_OPS_HOST_SOURCES", Path(__file__).resolve().parent.parent / ".hosts"))
TINY = LAYERS["tiny"]


def run(*arguments: str) -> int:
    return ops_speed.main(["--moe", *arguments, "--workers", "0"])


def read(folder) -> list[dict]:
    with open(folder / "ops_moe.csv", newline="") as file:
        return list(csv.DictReader(file))


class Stand:
    """A host of stand-ins: the reference in place of its kernels, wrong where told so."""

    host = ""
    version = "1.2"
    swept = False
    wrong = 0.0

    def unsuited(self, case):
        return "not with zipf" if case.routing == "zipf" and self.swept else ""

    def candidates(self, case):
        return [{"n": 1}, {"n": 2}, {"n": 3}] if self.swept else [{"n": 1}]

    def label(self, problem, config):
        return {"source": "stand-in"} | config

    def bind(self, problem, config):
        w = problem.weights

        def run(i):
            out = moe_ops.reference.fused_experts(
                problem.hidden[i],
                w.w13,
                w.w2,
                problem.topk_weights[i],
                problem.topk_ids[i],
                **moe_problem.layer_arguments(problem),
            )
            out[problem.rows[0]] *= 1 + self.wrong
            run.config = config
            return out

        return run


@pytest.fixture
def stand(monkeypatch):
    """`vllm` and `vllm_tuned` as stand-ins; the tuned one's second config is the fastest."""
    plain = type("Plain", (Stand,), {"name": "vllm"})
    tuned = type("Tuned", (Stand,), {"name": "vllm_tuned", "swept": True})
    monkeypatch.setitem(IMPLS, "vllm", plain)
    monkeypatch.setitem(IMPLS, "vllm_tuned", tuned)
    moe_measure.load.cache_clear()
    yield plain
    moe_measure.load.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch):
    """The path of a GPU run on CPU tensors: graph_time answers 10 us for ours, 12 for others, 8 for config 2."""

    def graph_time(function, copies, **kwargs):
        function(0)
        config = getattr(function, "config", None)
        us = 10.0 if config is None else 8.0 if config["n"] == 2 else 12.0
        return Timing(us, us - 0.5, us + 0.5)

    monkeypatch.setattr(moe_measure, "graph_time", graph_time)
    monkeypatch.setattr(moe_measure, "ON_GPU", True)
    monkeypatch.setattr(moe_speed, "ON_GPU", True)
    monkeypatch.setattr(moe_speed, "GPU", "NVIDIA H200")
    monkeypatch.setattr(moe_speed, "measured_ceilings", lambda: (1e12, 1e15))


SMALL = ("--model", "tiny", "--tokens", "5", "--dtype", "fp16", "--routing", "uniform")


def test_checks_without_a_gpu(tmp_path, capsys):
    assert run("--out", str(tmp_path), "--commit", "c0ffee") == 0
    output = capsys.readouterr().out
    assert "No GPU: checks only" in output
    assert "sglang is missing: needs a GPU" in output
    rows = read(tmp_path)
    assert {(row["model"], row["tokens"], row["routing"]) for row in rows} == {
        (model, str(tokens), routing)
        for model in ("tiny", "tiny-swiglu")
        for tokens in moe_shapes.TINY_TOKENS
        for routing in moe_shapes.ROUTINGS
    }
    assert {(row["us"], row["tflops"]) for row in rows} == {("", "")}
    assert all(0 < float(row["max_rel_err"]) <= float(row["tolerance"]) for row in rows)


def test_csv_columns_of_a_timed_run(tmp_path, fake_gpu, stand):
    assert run(*SMALL, "--impl", "ours", "vllm", "vllm_tuned", "--out", str(tmp_path), "--commit", "c0ffee") == 0
    ours, plain, tuned = read(tmp_path)
    wanted = (
        "model experts top_k hidden intermediate tokens routing dtype impl config us us_min us_max tflops floor_us "
    )
    wanted += "max_rel_err gpu torch triton host_version commit date"
    assert list(ours)[: len(wanted.split())] == wanted.split()
    assert [ours[c] for c in ("experts", "top_k", "hidden", "intermediate")] == ["8", "2", "256", "128"]
    assert (ours["us"], ours["us_min"], ours["us_max"]) == ("10.000", "9.500", "10.500")
    assert float(ours["tflops"]) == pytest.approx(6 * 5 * 2 * 256 * 128 / 10 / 1e6, abs=0.05)
    assert (plain["impl"], plain["us"], json.loads(plain["config"])) == (
        "vllm",
        "12.000",
        {"source": "stand-in", "n": 1},
    )
    assert (tuned["us"], json.loads(tuned["config"])["n"]) == ("8.000", 2)
    assert (tuned["host_version"], tuned["commit"], tuned["gpu"]) == ("1.2", "c0ffee", "NVIDIA H200")


def test_no_speed_without_a_green_check(tmp_path, fake_gpu, stand, monkeypatch, capsys):
    monkeypatch.setattr(stand, "wrong", 0.01)
    assert run(*SMALL, "--impl", "ours", "vllm", "--out", str(tmp_path)) == 1
    ours, plain = read(tmp_path)
    assert (plain["us"], plain["us_min"], plain["tflops"]) == ("", "", "")
    assert float(plain["max_rel_err"]) == pytest.approx(0.01, rel=0.1)
    assert ours["us"] == "10.000"
    output = capsys.readouterr().out
    assert "wrong by 0.0" in output
    assert "1 checks passed, 1 failed" in output


def test_a_host_that_fails_is_shown_and_ours_goes_on(tmp_path, fake_gpu, stand, monkeypatch, capsys):
    def bind(self, problem, config):
        raise AssertionError("hidden [/8] unsupported")

    monkeypatch.setattr(stand, "bind", bind)
    assert run(*SMALL, "--impl", "vllm", "ours", "--out", str(tmp_path)) == 1
    assert "hidden [/8] unsupported" in capsys.readouterr().out
    assert [bool(row["us"]) for row in read(tmp_path)] == [False, True]


def test_an_error_of_ours_is_raised(fake_gpu, monkeypatch):
    monkeypatch.setattr(moe_ops, "fused_experts", lambda *args, **kwargs: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        run(*SMALL, "--impl", "ours")


def test_what_an_implementation_cannot_run_leaves_no_row(tmp_path, fake_gpu, stand):
    arguments = ("--model", "tiny", "--tokens", "5", "--dtype", "fp16", "--routing", "zipf")
    assert run(*arguments, "--impl", "vllm", "vllm_tuned", "--out", str(tmp_path)) == 0
    assert [row["impl"] for row in read(tmp_path)] == ["vllm"]


def test_resume_and_time_limit(tmp_path, fake_gpu, capsys):
    arguments = (*SMALL, "--impl", "ours", "--out", str(tmp_path), "--resume")
    run(*arguments, "--commit", "c0ffee")
    run(*arguments, "--commit", "c0ffee")
    assert len(read(tmp_path)) == 1
    run(*arguments, "--commit", "beef")
    assert len(read(tmp_path)) == 2
    capsys.readouterr()
    assert run(*arguments, "--commit", "feed", "--time-limit", "0") == 0
    assert "0 of 1 cases done" in capsys.readouterr().out


def test_the_grid(monkeypatch):
    monkeypatch.setattr(moe_speed, "ON_GPU", True)
    cases = moe_speed.choose_cases(moe_speed.parse([]))
    assert len(cases) == len(set(cases)) == 6 * 15 * 2
    assert {case.layer.model for case in cases if case.dtype == "fp8"} == {"deepseek-v3-tp8"}
    quick = moe_speed.parse(["--quick"])
    assert len(moe_speed.choose_cases(quick)) == 5 * 3
    assert not any(IMPLS[name].swept for name in quick.impl)
    chosen = moe_speed.choose_cases(moe_speed.parse(["--model", "mixtral-8x7b", "--dtype", "fp8", "--tokens", "7"]))
    assert [(case.layer.model, case.dtype, case.tokens) for case in chosen] == [("mixtral-8x7b", "fp8", 7)] * 2


@pytest.mark.parametrize("model", list(LAYERS))
def test_samples_fit_the_case(model):
    for dtype in ("bf16", "fp8"):
        for tokens in moe_shapes.TOKENS:
            configs = moe_baselines.sample_configs(Case(LAYERS[model], tokens, dtype=dtype))
            assert 8 <= len(configs) <= moe_baselines.SWEEP_SIZE
            assert len({json.dumps(config) for config in configs}) == len(configs)
            for config in configs:
                size = 1 if dtype == "fp8" else 2
                step = (config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"]) * config["BLOCK_SIZE_K"] * size
                assert step * config["num_stages"] <= 227 * 1024
                assert dtype == "bf16" or config["BLOCK_SIZE_K"] == BLOCK[1]


def test_compile_jobs_cover_every_config_once(stand):
    cases = [Case(TINY, tokens, routing, "fp16") for routing in ("uniform", "zipf") for tokens in (1, 4, 8)]
    jobs = moe_measure.compile_jobs(cases, ["ours", "vllm"])
    # ours chooses by itself, for each number of tokens; a given config makes one kernel for 1 and one for more
    found = sorted((name, case.tokens) for name, case, _ in jobs)
    assert found == [("ours", 1), ("ours", 4), ("ours", 8), ("vllm", 1), ("vllm", 4)]
    moe_measure.compile_job("ours", cases[1], [None])


# Inputs


def test_floor():
    qwen = LAYERS["qwen3-30b-a3b"]
    one = moe_shapes.floor_us(Case(qwen, 1), 8, *H200_CEILINGS)
    assert one == pytest.approx((8 * 3 * 2048 * 768 * 2 + 2 * 2048 * 2) / 4.3e12 * 1e6)
    many = Case(qwen, 16384)
    assert moe_shapes.floor_us(many, 128, *H200_CEILINGS) == pytest.approx(6 * 16384 * 8 * 2048 * 768 / 790e12 * 1e6)
    fp8 = dataclasses.replace(many, dtype="fp8")
    assert moe_shapes.floor_us(fp8, 128, *H200_CEILINGS) == pytest.approx(many.flops / 1580e12 * 1e6)


def test_experts_of_a_token_are_distinct_and_spread_as_asked():
    generator = torch.Generator().manual_seed(3)
    layer = dataclasses.replace(TINY, experts=16, top_k=4)
    counts = {}
    for routing in moe_shapes.ROUTINGS:
        weights, ids = moe_shapes.choose_experts(Case(layer, 2000, routing), generator)
        assert ids.dtype == torch.int32
        assert weights.sum(1).allclose(torch.ones(2000))
        assert all(len(set(row)) == 4 for row in ids.tolist())
        counts[routing] = ids.flatten().bincount(minlength=16)
    assert (counts["uniform"] - 500).abs().max() < 6 * 500**0.5
    assert counts["zipf"][0] > 4 * counts["zipf"][15] > 0
    with pytest.raises(ValueError, match="unknown routing"):
        moe_shapes.choose_experts(Case(layer, 2, "normal"), generator)


def test_the_same_inputs_in_any_process_and_other_experts_in_each_set():
    case = Case(TINY, 5, dtype="fp16")
    first = moe_problem.make_problem(case, "cpu", 7)
    moe_problem.make_weights.cache_clear()
    second = moe_problem.make_problem(case, "cpu", 7)
    assert torch.equal(first.weights.w13, second.weights.w13)
    assert all(torch.equal(a, b) for a, b in zip(first.hidden, second.hidden, strict=True))
    assert not torch.equal(first.topk_ids[0], first.topk_ids[1])
    assert not torch.equal(first.hidden[0], first.hidden[1])
    assert first.touched() == sum(len(set(ids.flatten().tolist())) for ids in first.topk_ids) / first.copies


def test_block_scales():
    w = torch.randn(2, 200, 300) * torch.rand(2, 1, 1) * 10
    q, scale = moe_problem.quantize_blocks(w)
    assert q.shape == w.shape
    assert scale.shape == (2, 2, 3)
    spread = scale.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)[:, :, :300]
    error = (q.float() * spread - w).abs()
    assert (error <= w.abs() / 16 + spread * 2**-10).all()
    assert q[:, :128, :128].float().abs().amax((1, 2)).tolist() == [448, 448]


def test_error_of_checked_rows():
    problem = moe_problem.make_problem(Case(TINY, 50, dtype="fp16"), "cpu", 1)
    expected = moe_problem.reference(problem)
    assert expected.shape == (moe_problem.CHECKED_ROWS, 256)
    out = torch.zeros(50, 256, dtype=torch.float16)
    out[problem.rows] = expected.half()
    assert 0 < moe_problem.max_rel_error(out, expected, problem) < 2**-10
    out[problem.rows[3]] *= 1.1
    assert moe_problem.max_rel_error(out, expected, problem) == pytest.approx(0.1, rel=0.01)
    unchecked = next(row for row in range(50) if row not in problem.rows.tolist())
    out[unchecked, 5] = math.nan
    assert math.isnan(moe_problem.max_rel_error(out, expected, problem))


def test_the_reference_is_the_plain_formula():
    problem = moe_problem.make_problem(Case(LAYERS["tiny-swiglu"], 3, dtype="fp16"), "cpu", 5)
    w, expected = problem.weights, moe_problem.reference(problem)
    for place, row in enumerate(problem.rows.tolist()):
        total = torch.zeros(256, dtype=torch.float64)
        for weight, expert in zip(problem.topk_weights[0][row], problem.topk_ids[0][row].tolist(), strict=True):
            h = w.w13[expert].double() @ problem.hidden[0][row].double() + w.bias13[expert]
            gate, up = h[::2].clamp(max=7), h[1::2].clamp(-7, 7)
            y = w.w2[expert].double() @ (gate * torch.sigmoid(1.702 * gate) * (up + 1)) + w.bias2[expert]
            total += weight * y
        torch.testing.assert_close(expected[place].double(), total, rtol=1e-5, atol=1e-5)


# Report


def row(impl: str, tokens: int, us: float, model: str = "qwen3-30b-a3b", **changes) -> dict:
    case = Case(LAYERS[model], tokens)
    found = moe_measure.Measurement(impl, "1", 1e-3, None, us, us, us)
    return moe_speed.row_of(case, found, 8, H200_CEILINGS, "abc") | {"gpu": "NVIDIA H200"} | changes


def test_the_bars_are_over_the_faster_host():
    rows = [row("ours", 1, 10), row("vllm", 1, 20), row("sglang", 1, 12), row("triton_kernels", 1, 5)]
    rows += [row("ours", 8, 10), row("vllm", 8, 15), row("ours", 16384, 2000), row("sglang", 16384, 1900)]
    lines = {line[0] or line[1]: line for line in moe_report.bar_lines(rows)}
    few = lines["bf16, 1 to 8 tokens, over faster host"]
    assert few[2:4] == ("1.25", f"[green]{(1.2 * 1.5) ** 0.5:.2f}[/]")
    assert few[4].endswith("1 uniform")
    many = lines["bf16, 2048 tokens and more, over faster host"]
    assert many[3] == "[red]0.95[/]"
    assert lines["bf16, all, over triton_kernels"][3] == "[red]0.50[/]"
    (loss,) = moe_report.losses(rows)
    assert loss == "qwen3-30b-a3b bf16 uniform 16384: 0.95 of sglang"
    assert lines["TFLOP/s at 16384 tokens, uniform"][3] == "[green]618[/]"


def test_report_and_plots_from_the_csv(tmp_path, capsys):
    rows = [row(impl, tokens, 10 * tokens) for tokens in (1, 64) for impl in ("ours", "vllm", "sglang_tuned")]
    moe_speed.append_rows(tmp_path / "ops_moe.csv", moe_report.COLUMNS, [*rows, row("vllm", 1, 33)])
    assert run("--report", "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "33.0" in output, "the newest row counts"
    assert {path.name for path in tmp_path.glob("*.png")} == {"ops_moe_lead_bf16.png", "ops_moe_floor_bf16.png"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--report --out nowhere", "no measurement in nowhere/ops_moe.csv"),
        ("--tokens 4 0", "argument --tokens: 0 is not above 0"),
        ("--dtype fp8", "no layer of the grid has such a --dtype"),
    ],
)
def test_bad_arguments_are_one_error(line, said, monkeypatch, capsys):
    monkeypatch.setattr(moe_speed, "ON_GPU", False)
    with pytest.raises(SystemExit) as stopped:
        run(*line.split())
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_a_red_row_is_no_time_in_the_table():
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    rows = [
        row("ours", 1, 10),
        row("vllm", 1, math.nan, max_rel_err="0.5"),
        row("sglang", 1, math.nan, max_rel_err="nan"),
    ]
    console.print(moe_report.results_table(rows))
    text = console.export_text()
    assert "wrong: 0.5" in text
    assert "failed" in text


# The second process


def test_the_second_process_answers_like_the_first(tmp_path, monkeypatch):
    """A site with a folder sglang that is none: its implementations are missing, ours is measured there."""
    (tmp_path / "site" / "sglang").mkdir(parents=True)
    case = Case(TINY, 5, dtype="fp16")
    with moe_worker.Worker(tmp_path / "site", tmp_path / "log") as worker:
        loaded, missing = worker.load(["ours", "sglang"])
        assert loaded == ["ours"]
        assert "needs a GPU" in missing["sglang"]
        there = worker.measure(case, "ours", 0, 1.0)
        here = moe_measure.measure(case, "ours", 0, 1.0)
        assert there.error == here.error > 0
        with pytest.raises(moe_worker.WorkerError, match="unknown request 'sing'"):
            worker.ask("sing")
    assert worker.process.poll() == 0


def test_what_a_host_prints_does_not_stand_between_the_answers():
    code = "import moe_worker as w; w.answer = lambda request: print('noise') or request[0]; w.serve()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input='["a"]\n["b"]\n',
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(moe_worker.__file__).parent)},
    )
    assert done.stdout.splitlines() == ['{"result": "a"}', '{"result": "b"}']
    assert done.stderr.count("noise") == 2


def test_a_second_process_that_ends_is_named(tmp_path):
    (tmp_path / "sglang").mkdir()
    with moe_worker.Worker(tmp_path, tmp_path / "log") as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(moe_worker.WorkerError, match="ended with -9"):
            worker.load(["ours"])
    with pytest.raises(Missing, match="no folder sglang"):
        moe_worker.Worker(tmp_path / "nothing", tmp_path / "log")


def test_the_second_process_sees_one_engine_only(tmp_path):
    (tmp_path / "other" / "vllm").mkdir(parents=True)
    path = moe_worker.search_path(tmp_path / "site", f"{tmp_path / 'other'}{os.pathsep}/some/where")
    assert path.split(os.pathsep) == [str(tmp_path / "site"), str(Path(moe_worker.__file__).parent), "/some/where"]


def test_sglang_runs_in_the_second_process(tmp_path, fake_gpu, capsys, monkeypatch):
    """The runner sends SGLang's implementations there; a site without SGLang is said."""
    asked = []

    class FakeWorker:
        def __init__(self, site, log):
            assert site == tmp_path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def load(self, names):
            return names, {}

        def compile_ahead(self, cases, names, workers, seconds):
            asked.append(("compile", names))

        def measure(self, case, name, seed, sweep_seconds):
            asked.append((str(case), name))
            return moe_measure.Measurement(name, "0.5", 1e-4, {"source": "default"}, 5.0, 4.0, 6.0)

    monkeypatch.setattr(moe_speed, "Worker", FakeWorker)
    out = str(tmp_path / "out")
    assert run(*SMALL, "--impl", "ours", "sglang", "--sglang-site", str(tmp_path), "--out", out) == 0
    assert asked == [("compile", ["sglang"]), ("tiny 5 uniform fp16", "sglang")]
    assert [(row["impl"], row["us"]) for row in read(tmp_path / "out")] == [("ours", "10.000"), ("sglang", "5.000")]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="none of --impl is there"):
        run(*SMALL, "--impl", "sglang", "--sglang-site", str(tmp_path))
    assert f"sglang is missing: {tmp_path} holds no folder sglang" in capsys.readouterr().out


def test_a_second_process_that_ends_costs_its_own_rows_alone(tmp_path, fake_gpu, capsys, monkeypatch):
    class DyingWorker(moe_worker.Worker):
        def load(self, names):
            return names, {}

        def compile_ahead(self, cases, names, workers, seconds):
            raise moe_worker.WorkerError("no memory to compile")

        def measure(self, *arguments):
            self.process.kill()
            self.process.wait()
            return super().measure(*arguments)

    (tmp_path / "sglang").mkdir()
    monkeypatch.setattr(moe_speed, "Worker", DyingWorker)
    out = str(tmp_path / "out")
    assert run(*SMALL, "--impl", "sglang", "ours", "--sglang-site", str(tmp_path), "--out", out) == 1
    output = capsys.readouterr().out
    assert "not compiled ahead: no memory to compile" in output
    assert "the second process ended with -9" in output
    assert [(row["impl"], row["us"]) for row in read(tmp_path / "out")] == [("sglang", ""), ("ours", "10.000")]


# The hosts' own functions, by their sources


def parameters(path: Path, name: str) -> list[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            arguments = node.args
            return [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
    raise AssertionError(f"{path} has no {name}")


VLLM_MOE = "vllm/model_executor/layers/fused_moe"
VLLM_CALLS = [
    (f"{VLLM_MOE}/fused_moe.py", "fused_experts", {"activation", "quant_config"}),
    (f"{VLLM_MOE}/fused_moe.py", "get_moe_configs", {"E", "N", "dtype", "block_n", "block_k"}),
    (f"{VLLM_MOE}/fused_moe.py", "try_get_optimal_moe_config", {"block_shape"}),
    (f"{VLLM_MOE}/__init__.py", "override_config", {"config"}),
    (f"{VLLM_MOE}/config.py", "biased_moe_quant_config", {"w1_bias", "w2_bias"}),
    (f"{VLLM_MOE}/config.py", "fp8_w8a8_moe_quant_config", {"w1_scale", "w2_scale", "w1_bias", "block_shape"}),
    (f"{VLLM_MOE}/experts/gpt_oss_triton_kernels_moe.py", "make_routing_data", {"topk_ids", "topk_weights"}),
    (
        f"{VLLM_MOE}/experts/gpt_oss_triton_kernels_moe.py",
        "triton_kernel_fused_experts",
        {"topk", "quant_config", "swiglu_alpha", "swiglu_limit"},
    ),
    (
        f"{VLLM_MOE}/deep_gemm_utils.py",
        "compute_aligned_M_and_alignment",
        {"local_num_experts", "alignment", "expert_tokens_meta"},
    ),
    (
        f"{VLLM_MOE}/deep_gemm_utils.py",
        "deepgemm_moe_permute",
        {"aq", "aq_scale", "topk_ids", "local_num_experts", "expert_map", "expert_tokens_meta"},
    ),
    (
        f"{VLLM_MOE}/deep_gemm_utils.py",
        "deepgemm_unpermute_and_reduce",
        {"a", "topk_ids", "topk_weights", "inv_perm", "expert_map", "output"},
    ),
    (
        "vllm/model_executor/layers/quantization/utils/fp8_utils.py",
        "silu_mul_per_token_group_quant_fp8_colmajor",
        {"input", "output", "use_ue8m0", "group_size"},
    ),
    ("vllm/utils/deep_gemm.py", "mk_alignment_scope", {"value"}),
    ("vllm/utils/deep_gemm.py", "get_mk_alignment_for_contiguous_layout", set()),
]
SGLANG_MOE = "sglang/srt/layers/moe/moe_runner"
SGLANG_CALLS = [
    (
        f"{SGLANG_MOE}/triton_utils/fused_moe.py",
        "fused_experts",
        {"b1", "b2", "use_fp8_w8a8", "w1_scale", "w2_scale", "block_shape", "topk_output", "moe_runner_config"},
    ),
    (f"{SGLANG_MOE}/triton_utils/__init__.py", "override_config", {"config"}),
    (f"{SGLANG_MOE}/triton_utils/fused_moe_triton_config.py", "get_moe_configs", {"block_n", "block_k", "down_moe"}),
    (
        f"{SGLANG_MOE}/triton_utils/fused_moe_triton_config.py",
        "try_get_optimal_moe_config",
        {"block_shape", "return_down_config"},
    ),
    (
        f"{SGLANG_MOE}/base.py",
        "MoeRunnerConfig",
        {"num_experts", "num_local_experts", "top_k", "activation", "is_gated", "inplace", "gemm1_alpha"}
        | {"gemm1_clamp_limit"},
    ),
    ("sglang/srt/runtime_context.py", "override_server_args", set()),
]


@pytest.mark.parametrize(
    ("site", "file", "name", "used"),
    [("vllm-0.26.0", *call) for call in VLLM_CALLS] + [("sglang-0.5.17", *call) for call in SGLANG_CALLS],
)
def test_the_hosts_have_what_is_called(site, file, name, used):
    if not (SOURCES / site).is_dir():
        pytest.skip(f"no {SOURCES / site}: python scripts/fetch_host_sources.py")
    assert used <= set(parameters(SOURCES / site / file, name))


def test_every_implementation_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, impl in IMPLS.items():
        assert impl.name == name
        assert {"unsuited", "candidates", "bind", "label"} <= {member for member, _ in inspect.getmembers(impl)}
        if name != "ours":
            with pytest.raises(Missing, match="GPU"):
                impl()


def test_help_names_the_modes(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--quick", "--sglang-site", "--time-limit", "--report"))
