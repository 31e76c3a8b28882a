"""Files of MoE launch parameters: which are found, in which order, and what a bad one does (it warns, no more)."""

import json
import logging
import random
import timeit
from dataclasses import asdict, fields, replace

import pytest
import torch
from rich.console import Console

from lora_ops import doctor
from ops_configs import files, moe, store
from ops_configs.moe import QUANTS, TILE_ROWS, TOKENS, LayerConfig, MoeConfig, MoeLayer, layer_config, parse_layer
from ops_patches import state

from .conftest import GPU, properties

pytestmark = pytest.mark.usefixtures("one_gpu")

BF16, CUDA, CPU = torch.bfloat16, torch.device("cuda", 0), torch.device("cpu")
LAYER = MoeLayer(128, 8, 2048, 768)
CONFIG = LayerConfig(MoeConfig(32, 64, 128, 4, 3, 2), MoeConfig(32, 256, 32, 8, 2, 4))
OTHER = LayerConfig(MoeConfig(64, 32, 64, 4, 2, 1), MoeConfig(64, 128, 64, 4, 2, 1))
SHIPPED = store.SHIPPED
METADATA = {"gpu": GPU, "kernels": "", "date": "2026-01-01", "command": "python -m moe_ops.tune --model mixtral-8x7b"}


def metadata(**changes):
    import triton

    return {**METADATA, "triton": triton.__version__, "torch": torch.__version__, **changes}


def write(folder, config=CONFIG, tokens=64, layer=LAYER, dtype="bfloat16", **changes):
    """One entry in one file of that folder."""
    path = folder / "NVIDIA_H200" / moe.file_name(layer.hidden, dtype, layer.block_shape)
    files.write(path, metadata(**changes), {(layer.name, tokens): moe.entry(config, 1.0, 2.0)})
    return path


def use(monkeypatch, folder):
    monkeypatch.setenv(store.CONFIG_DIR, str(folder))
    store.forget()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="moe_ops")
    return caplog


def random_layer():
    """Any layer that a file may name."""
    experts = random.randint(2, 512)
    quant = random.choice([None, *QUANTS])
    return MoeLayer(
        experts,
        random.randint(1, min(experts, 32)),
        random.randint(1, 8192),
        random.randint(1, 16384),
        gated=random.random() < 0.7,
        quant=quant,
        block_shape=(128, 128) if quant and random.random() < 0.5 else None,
        global_experts=random.choice([None, 2 * experts]),
    )


def random_config(layer, itemsize):
    """Any config that the kernels take for a layer."""
    while True:
        block_m = random.choice(TILE_ROWS)
        numbers = [
            (random.choice((16, 32, 64, 128, 256)), random.choice((32, 64, 128, 256)), random.choice((1, 2, 4, 8)))
            for _ in range(2)
        ]
        halves = [MoeConfig(block_m, *n, random.randint(1, 6), random.randint(1, 64)) for n in numbers]
        try:
            moe.check(LayerConfig(*halves), layer, itemsize)
        except ValueError:
            continue
        return LayerConfig(*halves)


def test_a_bucket_holds_every_number_of_tokens():
    assert TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for tokens in [*range(1, 5000), *(random.randrange(1, 1 << 20) for _ in range(2000))]:
        bucket = moe.token_bucket(tokens)
        assert bucket in TOKENS
        assert bucket >= tokens or bucket == TOKENS[-1]
        assert bucket < 2 * tokens or bucket == 1
        assert moe.token_bucket(bucket) == bucket


def test_the_run_time_asks_for_the_bucket_that_the_tuner_wrote(monkeypatch, tmp_path):
    path = tmp_path / "NVIDIA_H200" / moe.file_name(LAYER.hidden, "bfloat16")
    configs = {tokens: random_config(LAYER, 2) for tokens in TOKENS}
    entries = {(LAYER.name, tokens): moe.entry(config, 1.0, 2.0) for tokens, config in configs.items()}
    files.write(path, metadata(), entries)
    use(monkeypatch, tmp_path)
    for tokens in [*range(1, 300), *(random.randrange(1, 40000) for _ in range(200))]:
        assert layer_config(LAYER, tokens, BF16, CUDA) == configs[moe.token_bucket(tokens)]


def test_explicit_before_environment_before_shipped_before_default(monkeypatch, tmp_path):
    default = moe.layer_default(LAYER, 64)
    assert layer_config(LAYER, 60, BF16, CUDA) == default
    (choice,) = store.choices()
    assert (choice["source"], choice["reason"]) == ("default", "no file for NVIDIA_H200")
    configs = [replace(CONFIG, gate_up=replace(CONFIG.gate_up, num_stages=stages)) for stages in (1, 2, 4)]
    for name, config in zip(("shipped", "user", "explicit"), configs, strict=True):
        write(tmp_path / name, config)
    store.forget()
    assert layer_config(LAYER, 60, BF16, CUDA) == configs[0]
    use(monkeypatch, tmp_path / "user")
    assert layer_config(LAYER, 60, BF16, CUDA) == configs[1]
    store.use_configs(tmp_path / "explicit")
    assert layer_config(LAYER, 60, BF16, CUDA) == configs[2]
    (choice,) = store.choices()
    assert (choice["source"], choice["rows"], choice["reason"]) == ("use_configs", [64], "measured for it")
    assert choice["shape"] == "grouped_gemm_config_2048_bfloat16, experts=128,intermediate=768,top_k=8"
    store.use_configs(None)
    assert layer_config(LAYER, 60, BF16, CUDA) == configs[1]


def test_halves_of_null_ask_for_the_default_and_stop_the_search(monkeypatch, tmp_path):
    write(tmp_path / "shipped", CONFIG)
    path = write(tmp_path / "user", CONFIG)
    content = json.loads(path.read_text())
    content["entries"][LAYER.name]["64"] |= {"gate_up": None, "down": None}
    path.write_text(json.dumps(content))
    use(monkeypatch, tmp_path / "user")
    assert moe.read(path).problems == ()
    assert layer_config(LAYER, 64, BF16, CUDA) == moe.layer_default(LAYER, 64)
    assert "asks for it" in store.choices()[0]["reason"]
    assert layer_config(LAYER, 128, BF16, CUDA) == moe.layer_default(LAYER, 128)  # nor does another bucket's config


def test_a_missing_bucket_takes_the_nearest_of_the_same_tile_size(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path)
    for _ in range(50):
        measured = sorted(random.sample(TOKENS, 3))
        configs = {tokens: random_config(LAYER, 2) for tokens in measured}
        path = tmp_path / "NVIDIA_H200" / moe.file_name(LAYER.hidden, "bfloat16")
        entries = {(LAYER.name, tokens): moe.entry(config, 1.0, 2.0) for tokens, config in configs.items()}
        files.write(path, metadata(), entries)
        store.forget()
        for tokens in TOKENS:
            config = layer_config(LAYER, tokens, BF16, CUDA)
            same = [t for t in measured if moe.tile_rows(t, 128, 8) == moe.tile_rows(tokens, 128, 8)]
            if tokens in measured:
                assert config == configs[tokens]
            elif same:
                nearest = min(max(t, tokens) / min(t, tokens) for t in same)
                assert config in [configs[t] for t in same if max(t, tokens) / min(t, tokens) == nearest]
            else:
                assert config == moe.layer_default(LAYER, tokens)


def test_other_layers_of_the_file_do_not_stand_in(monkeypatch, tmp_path):
    write(tmp_path)
    use(monkeypatch, tmp_path)
    others = [
        replace(LAYER, experts=64),
        replace(LAYER, intermediate=1536),
        replace(LAYER, top_k=4),
        replace(LAYER, gated=False),
        replace(LAYER, global_experts=256),
    ]
    for other in others:
        assert layer_config(other, 64, BF16, CUDA) == moe.layer_default(other, 64)
    assert layer_config(replace(LAYER, global_experts=128), 64, BF16, CUDA) == CONFIG


def test_a_share_of_the_experts_without_a_map_runs_the_expert_parallel_entry(monkeypatch, tmp_path):
    share = MoeLayer(16, 8, 2048, 768, global_experts=128)
    write(tmp_path, layer=share)
    use(monkeypatch, tmp_path)
    assert layer_config(replace(share, global_experts=None), 64, BF16, CUDA) == CONFIG
    assert "global_experts=128" in store.choices()[0]["reason"]
    assert layer_config(replace(share, global_experts=64), 64, BF16, CUDA) != CONFIG
    assert layer_config(replace(share, global_experts=None, gated=False), 64, BF16, CUDA) != CONFIG


def test_dtypes_have_their_own_files_and_bf16_serves_fp16(monkeypatch, tmp_path):
    quantised = replace(LAYER, quant="fp8_w8a8", block_shape=(128, 128))
    write(tmp_path)
    use(monkeypatch, tmp_path)
    assert layer_config(LAYER, 64, torch.float16, CUDA) == CONFIG
    assert layer_config(LAYER, 64, torch.float32, CUDA) == moe.layer_default(LAYER, 64, 4)
    assert layer_config(quantised, 64, BF16, CUDA) == moe.layer_default(quantised, 64, 1)
    assert layer_config(LAYER, 64, BF16, CPU) == moe.layer_default(LAYER, 64)
    write(tmp_path, OTHER, dtype="float16")
    write(tmp_path, OTHER, layer=quantised, dtype="fp8_w8a8")
    store.forget()
    assert layer_config(LAYER, 64, torch.float16, CUDA) == OTHER
    assert layer_config(LAYER, 64, BF16, CUDA) == CONFIG
    for dtype in (BF16, torch.float16):
        assert layer_config(quantised, 64, dtype, CUDA) == OTHER
    assert layer_config(replace(quantised, block_shape=None), 64, BF16, CUDA) != OTHER
    assert (tmp_path / "NVIDIA_H200/grouped_gemm_config_2048_fp8_w8a8_block128x128.json").exists()


@pytest.mark.parametrize("quant", [None, *QUANTS])
def test_any_valid_file_round_trips(tmp_path, quant):
    for i in range(20):
        layer = replace(random_layer(), quant=quant, block_shape=None if quant is None else (128, 128))
        itemsize = layer.itemsize(BF16)
        path = tmp_path / str(i) / moe.file_name(layer.hidden, quant or "bfloat16", layer.block_shape)
        names = {layer.name, replace(layer, experts=layer.experts + 1, global_experts=None).name}
        configs = {(name, t): random_config(layer, itemsize) for name in names for t in random.sample(TOKENS, 4)}
        entries = {key: moe.entry(config, 10 * random.random(), 10.0) for key, config in configs.items()}
        files.write(path, metadata(), entries)
        file = moe.read(path)
        assert file.problems == ()
        assert file.entries == configs
        assert file.raw == entries
        assert set(file.metadata) == set(files.METADATA)


def test_a_layers_name_is_parsed_back():
    for _ in range(300):
        layer = random_layer()
        assert parse_layer(layer.name, layer.hidden, layer.quant, layer.block_shape) == layer


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("quant", [None, "fp8_w8a8"])
def test_defaults_fit_the_shared_memory_of_smaller_gpus(monkeypatch, kib, quant):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(kib << 10))
    for layer in (LAYER, MoeLayer(8, 2, 4096, 14336), MoeLayer(5, 2, 40, 24)):
        layer = replace(layer, quant=quant)
        for tokens in TOKENS:
            config = layer_config(layer, tokens, BF16, CUDA)
            size = layer.itemsize(BF16)
            assert moe.shared_memory(config.gate_up, 2, size, layer.hidden) <= kib << 10
            assert moe.shared_memory(config.down, 1, size, layer.intermediate) <= kib << 10
            assert config.gate_up.block_m == config.down.block_m
            if kib == 227:
                assert config == moe.layer_default(layer, tokens, size)
            else:
                assert not config.gate_up.persistent
                assert not config.down.persistent


def test_an_entry_that_does_not_fit_the_gpu_is_left_out_and_named(monkeypatch, tmp_path, warnings):
    """Of a file from a larger GPU."""
    most = 99 << 10
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(most))
    large = replace(CONFIG, gate_up=replace(CONFIG.gate_up, num_stages=4))
    path = tmp_path / "NVIDIA_H200" / moe.file_name(LAYER.hidden, "bfloat16")
    entries = {(LAYER.name, tokens): moe.entry(config, 1.0, 2.0) for tokens, config in ((64, large), (512, OTHER))}
    files.write(path, metadata(), entries)
    use(monkeypatch, tmp_path)
    assert layer_config(LAYER, 512, BF16, CUDA) == OTHER
    assert layer_config(LAYER, 64, BF16, CUDA) == moe.layer_default(LAYER, 64, shared=most)
    (problem,) = store.problems()
    size = moe.shared_memory(large.gate_up, 2, 2, LAYER.hidden)
    said = f"{path}: entry for {LAYER.name}, 64 tokens: it needs up to {size} bytes of shared memory, a block of this"
    assert f"{said} {GPU} has {most}" in problem
    assert [problem in record.getMessage() for record in warnings.records].count(True) == 1


HALF = asdict(CONFIG.gate_up)
BAD = {
    "no object": 7,
    "no halves": {"us": 1.0},
    "one half": {"gate_up": HALF},
    "null": {"gate_up": None, "down": HALF},
    "null alone": {"gate_up": None},
    "unknown field": {"gate_up": {**HALF, "block_q": 16}, "down": HALF},
    "missing field": {"gate_up": {"block_m": 16}, "down": HALF},
    "tiles that no kernel has": {"gate_up": {**HALF, "block_m": 256}, "down": {**HALF, "block_m": 256}},
    "tiles that differ": {"gate_up": {**HALF, "block_m": 16}, "down": HALF},
    "no power of two": {"gate_up": {**HALF, "block_n": 48}, "down": HALF},
    "text": {"gate_up": {**HALF, "num_warps": "4"}, "down": HALF},
    "true": {"gate_up": HALF, "down": {**HALF, "num_warps": True}},
    "negative": {"gate_up": HALF, "down": {**HALF, "num_stages": -1}},
    "too wide for TMA": {"gate_up": HALF, "down": {**HALF, "block_n": 512, "block_k": 16}},
    "more than a GPU holds": {"gate_up": {**HALF, "block_n": 256, "block_k": 256}, "down": HALF},
    "more than a GPU holds, with the output": {
        "gate_up": {**HALF, "block_m": 128},
        "down": asdict(MoeConfig(128, 256, 64, 8, 4, 8, persistent=True)),
    },
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_a_bad_entry_is_left_out_and_named(monkeypatch, tmp_path, warnings, entry):
    path = write(tmp_path)
    content = json.loads(path.read_text())
    content["entries"][LAYER.name]["32"] = entry
    path.write_text(json.dumps(content))
    use(monkeypatch, tmp_path)
    assert layer_config(LAYER, 64, BF16, CUDA) == CONFIG  # its neighbours stand
    assert layer_config(LAYER, 32, BF16, CUDA) == CONFIG  # the nearest
    (problem,) = store.problems()
    assert str(path) in problem
    assert f"layer {LAYER.name}, 32 tokens" in problem
    assert len(warnings.records) == 1


def test_each_half_takes_its_own_switches():
    for half, switch in (
        ("gate_up", "stationary"),
        ("down", "permute"),
        ("down", "tma_store"),
    ):
        wrong = replace(CONFIG, **{half: replace(getattr(CONFIG, half), **{switch: True})})
        with pytest.raises(ValueError, match="for gate_up"):
            moe.check(wrong, LAYER, 2)
    moe.check(replace(CONFIG, down=replace(CONFIG.down, persistent=True)), LAYER, 2)
    with pytest.raises(ValueError, match="tiles of 128 rows, here of 32"):
        moe.check(replace(CONFIG, gate_up=replace(CONFIG.gate_up, persistent=True)), LAYER, 2)
    with pytest.raises(ValueError, match="either persistent or stationary"):
        moe.check(replace(CONFIG, down=replace(CONFIG.down, persistent=True, stationary=True)), LAYER, 2)
    long = replace(LAYER, intermediate=moe.STATIONARY_STEPS * CONFIG.down.block_k + 1)
    with pytest.raises(ValueError, match="stationary is for up to"):
        moe.check(replace(CONFIG, down=replace(CONFIG.down, stationary=True)), long, 2)
    wide = replace(CONFIG, down=replace(CONFIG.down, block_k=64, stationary=True))
    blocks = replace(LAYER, quant="fp8_w8a8", block_shape=(128, 32), intermediate=moe.STATIONARY_STEPS * 32)
    moe.check(wide, blocks, 1)
    with pytest.raises(ValueError, match="stationary is for up to"):  # a block of scales ends a step
        moe.check(wide, replace(blocks, intermediate=blocks.intermediate + 16), 1)


def test_a_file_is_checked_with_the_blocks_of_its_name(tmp_path):
    down = replace(CONFIG.down, block_n=64, block_k=128, stationary=True)
    entry = moe.entry(replace(CONFIG, down=down), 1.0, 2.0)
    layer = replace(LAYER, intermediate=moe.STATIONARY_STEPS * 128)
    for block, problems in ((128, 0), (64, 1)):
        path = tmp_path / moe.file_name(layer.hidden, "fp8_w8a8", (128, block))
        path.write_text(json.dumps({"entries": {layer.name: {"64": entry}}}))
        assert len(moe.read(path).problems) == problems


@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_stationary_default_counts_the_steps_that_scale_blocks_leave(block_k):
    layer = MoeLayer(64, 8, 2048, 4 * block_k, quant="fp8_w8a8", block_shape=(128, block_k))
    for longer, expected in ((0, True), (16, False)):
        config = moe.layer_default(replace(layer, intermediate=layer.intermediate + longer), 4096, 1)
        assert config.down.stationary == expected


def test_which_layers_run_choice_by_choice():
    """A lone token; few where each expert is probably chosen once; unquantised, or fp8 in blocks that fit a step."""
    layer = MoeLayer(256, 8, 7168, 256)
    blocks = replace(layer, quant="fp8_w8a8", block_shape=(128, 128))
    for each in (layer, blocks, replace(blocks, block_shape=(24, 32))):
        assert [tokens for tokens in (1, 2, 4, 5, 6, 8) if moe.runs_direct(each, tokens)] == [1, 2, 4]
        assert moe.runs_direct(replace(each, experts=8), 1)
        assert not moe.runs_direct(replace(each, experts=8), 2)
        assert not moe.runs_direct(replace(each, intermediate=8192), 1)
    for change in ({"block_shape": None}, *({"block_shape": (128, group)} for group in (8, 96, 256))):
        assert not moe.runs_direct(replace(blocks, **change), 1)
    for quant in ("int8_w8a8", "int8_w8a16"):
        assert not moe.runs_direct(replace(blocks, quant=quant), 1)
    assert moe.runs_direct(replace(blocks, top_k=16), 1)
    assert not moe.runs_direct(replace(blocks, top_k=17), 1)  # its second half would keep too much in registers


@pytest.mark.parametrize("end", ["2048", "2048_bf16", "2048_mxfp4", "bfloat16", "2048_bfloat16 (1)"])
def test_a_file_that_no_launch_reads_is_a_problem(tmp_path, end):
    path = write(tmp_path)
    assert moe.read(path).problems == ()
    renamed = path.rename(path.with_name(f"grouped_gemm_config_{end}.json"))
    (problem,) = moe.read(renamed).problems
    assert problem.startswith(f"{renamed}: no launch reads a file of this name, but such as {path.name}")


def test_restrictions_of_quantised_layers():
    narrow = replace(CONFIG, down=replace(CONFIG.down, block_k=16))
    with pytest.raises(ValueError, match="32 of 8-bit"):
        moe.check(narrow, replace(LAYER, quant="fp8_w8a8"), 1)
    moe.check(narrow, LAYER, 2)


def nonsense(depth=0):
    """Any JSON value, some of it looking like ours."""
    kinds = ["number", "text", "null", "true"] + (["list", "object"] * 2 if depth < 5 else [])
    kind = random.choice(kinds)
    if kind == "number":
        return random.choice([0, -1, 16, 2**70, 1e300, 0.5])
    if kind == "text":
        return random.choice(["", "16", "²", LAYER.name, "experts=0,intermediate=1,top_k=1", "9" * 5000])
    if kind == "list":
        return [nonsense(depth + 1) for _ in range(random.randrange(3))]
    if kind == "object":
        names = ["entries", "gpu", "kernels", LAYER.name, "64", "gate_up", "down", "config", *HALF, "experts=²"]
        return {random.choice(names): nonsense(depth + 1) for _ in range(random.randrange(5))}
    return {"null": None, "true": True}[kind]


def test_nonsense_never_crashes(monkeypatch, tmp_path):
    path = write(tmp_path)
    good = path.read_text()
    use(monkeypatch, tmp_path)
    texts = [json.dumps(nonsense()) for _ in range(200)]
    texts += [json.dumps({**json.loads(good), "entries": {LAYER.name: {"64": nonsense(3)}}}) for _ in range(200)]
    texts += [good[: random.randrange(len(good))] for _ in range(50)]
    texts += ["", "[" * 100000, good.replace('"block_m": 32', '"block_m": ' + "9" * 5000)]
    for text in texts:
        path.write_text(text)
        store.forget()
        assert layer_config(LAYER, 64, BF16, CUDA) in (moe.layer_default(LAYER, 64), CONFIG)
        store.available(GPU, moe.KINDS)
    path.write_bytes(random.randbytes(200))
    store.forget()
    assert layer_config(LAYER, 64, BF16, CUDA) == moe.layer_default(LAYER, 64)


def test_fields_with_a_default_may_be_left_out(monkeypatch, tmp_path):
    from dataclasses import make_dataclass

    wider = make_dataclass(
        "Wider", [("programs", int, 0), ("persistent", bool, False)], bases=(MoeConfig,), frozen=True
    )
    assert files.parse_fields(HALF, wider) == wider(**HALF)
    full = {**HALF, "programs": 0, "persistent": True}
    assert files.parse_fields(full, wider) == wider(**full)
    for bad in ({"programs": 5000}, {"programs": True}, {"persistent": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            files.parse_fields({**HALF, **bad}, wider)
    assert {field.name for field in fields(MoeConfig)} == set(HALF)


@pytest.mark.parametrize("change", [{"triton": "0.1"}, {"torch": "0.1"}, {"gpu": "NVIDIA A10"}, {"kernels": "abc"}])
def test_a_mismatch_is_one_warning_with_the_command(monkeypatch, tmp_path, warnings, change):
    monkeypatch.setattr(store, "_kernels", {"moe_ops": tmp_path})
    matching = {"kernels": store.kernels_hash("moe_ops")} | change
    write(tmp_path, **matching)
    write(tmp_path, layer=replace(LAYER, hidden=4096), **matching)
    use(monkeypatch, tmp_path)
    assert layer_config(LAYER, 64, BF16, CUDA) == CONFIG
    assert layer_config(replace(LAYER, hidden=4096), 64, BF16, CUDA) == CONFIG
    (record,) = warnings.records
    assert METADATA["command"] in record.getMessage()
    assert next(iter(change.values())).replace(" ", "_") in record.getMessage()


def test_a_file_of_this_software_warns_of_nothing(monkeypatch, tmp_path, warnings):
    monkeypatch.setattr(store, "_kernels", {"moe_ops": tmp_path})
    write(tmp_path, kernels=store.kernels_hash("moe_ops"))
    use(monkeypatch, tmp_path)
    assert layer_config(LAYER, 64, BF16, CUDA) == CONFIG
    assert not warnings.records


def test_pinned_configs_go_before_all_files(monkeypatch, tmp_path):
    write(tmp_path)
    use(monkeypatch, tmp_path)
    with moe.pinned(OTHER):
        assert layer_config(LAYER, 64, BF16, CUDA) == OTHER
    with moe.pinned(None):
        assert layer_config(LAYER, 64, BF16, CUDA) == moe.layer_default(LAYER, 64)
    assert layer_config(LAYER, 64, BF16, CUDA) == CONFIG


def test_a_bad_folder_is_an_error_before_any_launch(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path / "nowhere")
    for device in (CUDA, CPU):
        with pytest.raises(ValueError, match=store.CONFIG_DIR):
            layer_config(LAYER, 64, BF16, device)


def test_every_default_is_one_that_the_kernels_take():
    for _ in range(400):
        layer = random_layer()
        for dtype in (BF16, torch.float32):
            itemsize = layer.itemsize(dtype)
            config = moe.layer_default(layer, random.choice(TOKENS), itemsize)
            moe.check(config, layer, itemsize)


def test_programs_of_gate_up_are_persistent_where_few_tiles_are_half_full():
    wide = MoeLayer(8, 2, 4096, 14336)
    for layer, tokens, expected in (
        (wide, 4096, True),
        (wide, 2048, False),
        (MoeLayer(128, 8, 2048, 768), 16384, False),  # rows are gathered
        (replace(wide, quant="fp8_w8a8"), 16384, False),
    ):
        config = moe.layer_default(layer, tokens, layer.itemsize(BF16))
        assert config.gate_up.persistent == expected, (layer, tokens)


def test_the_doctor_shows_files_and_what_processes_use(monkeypatch, tmp_path, capsys):
    path = write(tmp_path)
    content = json.loads(path.read_text())
    content["entries"][LAYER.name]["8"] = {}
    path.write_text(json.dumps(content))
    use(monkeypatch, tmp_path)
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "status"))
    (file,) = doctor.config_files([GPU])
    assert (file["source"], file["path"], file["entries"]) == (store.CONFIG_DIR, str(path), 1)
    assert f"layer {LAYER.name}, 8 tokens" in file["problems"][0]
    layer_config(LAYER, 64, BF16, CUDA)
    process = {"pid": 7, "vllm": {"configs": store.choices()}}
    doctor.show_configs({"processes": [process], "fit": {"vllm": {}}, "configs": []}, Console())
    shown = capsys.readouterr().out
    assert LAYER.name in shown
    assert str(path) in shown


def test_a_lookup_costs_little():
    layer_config(LAYER, 60, BF16, CUDA)
    lookup = lambda: layer_config(MoeLayer(128, 8, 2048, 768), 60, BF16, CUDA)  # noqa: E731
    assert min(timeit.repeat(lookup, number=2000, repeat=5)) / 2000 < 1e-5


def test_every_shipped_file_is_valid(monkeypatch):
    monkeypatch.undo()
    for path in store.SHIPPED.glob("*/grouped_gemm_config_*.json"):
        file = moe.read(path)
        assert file.problems == ()
        assert set(file.metadata) == set(files.METADATA)
        assert files.gpu_folder(file.metadata["gpu"]) == path.parent.name
        for entry in file.raw.values():
            assert entry["us"] == entry["default_us"] or entry["us"] <= 0.97 * entry["default_us"] + 0.01


@pytest.mark.parametrize(
    ("layer", "tokens"), [(MoeLayer(8, 2, 4096, 14336), 4096), (MoeLayer(32, 4, 2880, 2880), 8192)]
)
def test_many_rows_of_wide_experts_are_persistent_as_shipped(monkeypatch, layer, tokens):
    monkeypatch.setattr(store, "SHIPPED", SHIPPED)
    store.forget()
    for bucket in (tokens, 16384):
        config = layer_config(layer, bucket, BF16, CUDA)
        assert config.gate_up.persistent
        assert config.down.persistent
    assert not layer_config(layer, tokens // 2, BF16, CUDA).gate_up.persistent
