"""The serving benchmarks of MoE models: what they plan and send, and all of serving_sglang.py with a fake SGLang."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import serving_report as report
import serving_server as ss
import serving_sglang
import serving_traffic as st
import serving_vllm as sv
import synthetic
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(os.environ.get("LORA_OPS_HOST_SOURCES", ROOT / ".hosts")) / "sglang-0.5.17"


def options(*words: str):
    return serving_sglang.parse([*words])


# Planning


def test_base_and_patched_get_the_same_loads():
    runs = sv.plan(options("--concurrency", "1", "64", "--request-rate", "8"))
    assert list(runs) == [ss.Setting("base"), ss.Setting("patched")]
    base, patched = runs.values()
    assert base == patched
    found = [load for traffic, load in base if traffic == st.Traffic()]
    assert [load.concurrency for load in found] == [1, 64, math.inf, 64]
    assert found[-1] == sv.PREFILL
    assert list(sv.plan(options("--variant", "patched"))) == [ss.Setting("patched")]


def test_vllm_serves_moe_without_lora():
    asked = sv.parse(["--model", "qwen3-30b-a3b", "--concurrency", "8", "--request-rate"])
    runs = sv.plan(asked)
    assert list(runs) == [ss.Setting("base"), ss.Setting("patched")]
    assert [load for _, load in runs[ss.Setting("base")]] == [st.Load(8.0, math.inf, 256, 256), sv.PREFILL]
    base, patched = (sv.server_command(asked, setting, [], 8.0, True) for setting in runs)
    assert "--enable-lora" not in patched
    assert base[base.index("--moe-backend") + 1] == "triton"
    assert patched == base  # vLLM's own kernels may compile while it serves: our own are looked for in the log
    assert int(base[base.index("--max-model-len") + 1]) >= 1025
    switches = [sv.environment(asked, name) for name in ("base", "patched")]
    assert [env.get("MOE_OPS_VLLM") for env in switches] == [None, "1"]
    assert not any("LORA_OPS_VLLM" in env for env in switches)
    assert sv.watched(asked) == ss.VLLM_MOE
    assert sv.watched(sv.parse([])) == ss.LORA


def test_curves_of_adapters_need_a_model_with_lora(capsys):
    with pytest.raises(SystemExit):
        sv.parse(["--model", "qwen3-30b-a3b", "--hot"])
    assert "served without" in capsys.readouterr().err


def test_only_the_patched_server_is_told_to_patch(monkeypatch):
    monkeypatch.setenv("MOE_OPS_SGLANG", "1")
    envs = [serving_sglang.environment(options(), name) for name in serving_sglang.VARIANTS]
    assert [env.get("MOE_OPS_SGLANG") for env in envs] == [None, "1"]


def test_commands_of_server_and_client(tmp_path):
    asked = options("--tp", "2", "--server-args=--log-level error")
    command = serving_sglang.server_command(asked, ss.Setting("patched"), [], 300.0, True)
    for name, value in {
        "--moe-runner-backend": "triton",
        "--attention-backend": "triton",
        "--tp-size": "2",
        "--max-running-requests": "300",
        "--load-format": "dummy",
    }.items():
        assert command[command.index(name) + 1] == value
    assert "--disable-radix-cache" in command
    assert command[-2:] == ["--log-level", "error"]
    load = st.Load(math.inf, 2.5, 100, 10)
    client = serving_sglang.client_command(tmp_path, 1, st.Traffic(), load, 12, tmp_path / "r.json")
    assert client[client.index("--request-rate") + 1] == "2.5"
    assert client[client.index("--num-prompts") + 1] == "12"
    assert "--max-concurrency" not in client
    closed = serving_sglang.client_command(tmp_path, 1, st.Traffic(), sv.PREFILL, 12, tmp_path / "r.json")
    assert closed[closed.index("--max-concurrency") + 1] == "64"


@pytest.mark.skipif(not SOURCES.is_dir(), reason=f"no {SOURCES}: python scripts/fetch_host_sources.py")
def test_sglang_knows_the_options(tmp_path):
    """Every option that is passed stands in its sources: as a literal, or as a field of ServerArgs."""
    server = (SOURCES / "sglang/srt/server_args.py").read_text()
    for eager in ((), ("--eager",)):
        command = serving_sglang.server_command(options(*eager), ss.Setting("base"), [], 8.0, True)
        for word in (word for word in command if word.startswith("--")):
            field = word.removeprefix("--").replace("-", "_")
            assert f'"{word}"' in server or re.search(rf"^    {field}: A\[", server, re.MULTILINE), word
    client = (SOURCES / "sglang/benchmark/serving.py").read_text()
    command = serving_sglang.client_command(tmp_path, 1, st.Traffic(), sv.PREFILL, 12, tmp_path / "r.json")
    for word in (word for word in command if word.startswith("--")):
        assert f'"{word}"' in client, word
    assert '"random-ids"' in client


# Servers


def status(pid: int, hits: int = 0, patched: bool = True, fallback: dict | None = None) -> dict:
    counters = {"hit": {"fused_experts": hits} if hits else {}, "fallback": fallback or {}, "error": {}}
    return {"pid": pid, "sglang_moe": {"patched": patched, "reasons": ["version"], "counters": counters}}


def test_a_patched_server_must_have_called_our_kernels_in_every_worker():
    def faults(variant: str, *processes: dict, workers: int = 1) -> list[str]:
        return ss.faults(variant, list(processes), workers, ss.SGLANG_MOE)

    assert faults("patched", status(1), status(2, hits=4)) == []
    assert "1 of 2 workers" in faults("patched", status(2, hits=4), status(3), workers=2)[0]
    assert "not patched" in faults("patched", status(2, hits=4), status(3, patched=False))[0]
    assert "mxfp4" in faults("patched", status(2, hits=4, fallback={"fused_experts": {"mxfp4": 1}}))[0]
    assert faults("base") == []
    assert "3 times" in faults("base", status(2, hits=3))[0]


def test_steps_that_replay_graphs_need_not_be_counted(monkeypatch, tmp_path):
    (tmp_path / "log").write_text("the log")
    server = ss.Server(ss.Setting("patched"), None, 0, tmp_path / "log", 1, ss.SGLANG_MOE)
    monkeypatch.setattr(ss.state, "INTERVAL_S", 0)
    monkeypatch.setattr(ss.state, "processes", lambda: [status(2, hits=4)])
    server.check()
    server.check()


def test_a_prefill_run_counts_the_tokens_that_go_in():
    times = {f"{kind}_{name}_ms": 1.0 for kind in ("median", "p99") for name in ("ttft", "tpot", "itl")}
    result = times | {"completed": 64, "total_output_tokens": 64, "total_input_tokens": 65536}
    columns = st.measured(result | {"output_throughput": 32.0, "duration": 2.0}, 64, 1)
    assert columns["input_tok_s"] == 32768


# The checkpoint


def test_moe_shapes_are_those_of_the_architecture(tmp_path):
    """One narrow layer of Qwen3-30B-A3B in transformers' own model: every weight is there, with its size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    full = synthetic.SHAPES["qwen3-30b-a3b"]
    sizes = {"layers": 1, "hidden": 128, "intermediate": 48, "heads": 8, "kv_heads": 2, "head_dim": 24, "vocab": 300}
    shape = replace(full, **sizes, experts=6, top_k=3)
    synthetic.write_model(tmp_path, shape)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()), loaded
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [type(model).__name__] == ["Qwen3MoeForCausalLM"]
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (6, 3, 48)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 6 * 3 * 128 * 48


def test_random_weights_reach_all_experts(tmp_path):
    from transformers import AutoModelForCausalLM

    synthetic.write_model(tmp_path, synthetic.TINY_MOE, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(2, synthetic.TINY_MOE.vocab, (4, 64))
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    for layer in logits:
        chosen = layer.reshape(-1, 8).topk(2).indices.flatten().bincount(minlength=8)
        assert (chosen > 4 * 64 * 2 / 8 / 4).all(), "each expert has a quarter of its share at least"


# All of it, with a fake SGLang


LAUNCH_SERVER = """
import http.server, os, sys
from ops_patches import counters, state

hits = int(os.environ.get("FAKE_HITS", "5")) if os.environ.get("MOE_OPS_SGLANG") == "1" else 0
if os.environ.get("MOE_OPS_SGLANG") == "1":
    for _ in range(hits):
        counters.hit("fused_experts")
    state.register("sglang_moe", lambda: {"patched": True, "reasons": [], "counters": counters.snapshot()})
    state.publish(force=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
BENCH_SERVING = """
import json, pathlib, sys, urllib.request

def value(name):
    return sys.argv[sys.argv.index(name) + 1]

url = f"http://127.0.0.1:{value('--port')}/health"
assert urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).status == 200
requests, output, given = (int(value(n)) for n in ("--num-prompts", "--random-output-len", "--random-input-len"))
result = {f"{kind}_{name}_ms": 1.5 for kind in ("median", "p99") for name in ("ttft", "tpot", "itl")}
result |= {"completed": requests, "total_output_tokens": requests * output, "total_input_tokens": requests * given}
result |= {"output_throughput": 100.0, "duration": 2.0}
pathlib.Path(value("--output-file")).write_text(json.dumps(result) + "\\n")
"""


@pytest.fixture
def site(tmp_path):
    """A folder that holds a distribution sglang 0.5.17 and an entry point of ours for it."""
    folder = tmp_path / "site"
    files = {
        "sglang/__init__.py": "",
        "sglang/launch_server.py": LAUNCH_SERVER,
        "sglang/bench_serving.py": BENCH_SERVING,
        "datasets.py": "",
        "sglang-0.5.17.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.17\n",
        "ours-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: ours\nVersion: 1\n",
        "ours-1.dist-info/entry_points.txt": "[sglang.srt.plugins]\nmoe_ops = ops_patches.sglang_moe:plugin\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def serve(site, tmp_path, monkeypatch):
    """Runs serving_sglang.py on the site's SGLang; returns its exit status."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sv.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ss.state, "INTERVAL_S", 0.05)

    def run(*words: str) -> int:
        arguments = ["--model", "tiny-moe", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words]
        return sv.main(arguments, serving_sglang.SGLANG_HOST, serving_sglang.parse)

    return run


def test_servers_clients_and_rows(serve, tmp_path, capsys):
    words = ("--concurrency", "2", "4", "--request-rate")
    assert serve(*words) == 0, capsys.readouterr().out
    rows = report.read(tmp_path / "out" / "serving_sglang.csv")
    assert list(rows["variant"]) == ["base"] * 2 + ["patched"] * 2
    assert (rows["retention"] == 1).all()
    assert set(rows["versions"].str.split(",").str[0]) == {"sglang 0.5.17"}
    assert (rows["input_tok_s"] == rows["requests"] * 16 / 2).all()
    assert "serving_sglang_tiny-moe_tp1_tpot_16+8.png" in capsys.readouterr().out
    assert serve(*words, "--resume", "--no-plots") == 0
    assert "starting" not in capsys.readouterr().out


def test_a_server_without_our_kernels_is_no_measurement(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_HITS", "0")
    assert serve("--variant", "patched", "--request-rate") == 1
    assert "our kernels were called in 0 of 1 workers" in capsys.readouterr().out
    assert not (tmp_path / "out" / "serving_sglang.csv").exists()


def test_a_missing_sglang_is_named():
    host = replace(serving_sglang.SGLANG_HOST, distributions=("no-such-engine",))
    with pytest.raises(SystemExit, match="has no sglang: install it there"):
        sv.look_at_machine(None, host, "moe_ops")


def test_what_the_client_needs_is_named_before_a_server_starts():
    host = replace(serving_sglang.SGLANG_HOST, distributions=("pytest",), client_needs=("json", "no_such_package"))
    with pytest.raises(SystemExit, match=r"sglang.bench_serving cannot be imported: pip install no_such_package$"):
        sv.look_at_machine(None, host, "moe_ops")
