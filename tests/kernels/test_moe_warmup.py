"""`warmup_layer` compiles all that a layer may launch, so that nothing is left to compile while a server serves."""

import pytest
import torch

import moe_ops
from moe_ops import launches

from .test_moe_ops import Case, make_layer
from .test_moe_quant import SCHEMES, make_quantised

PER_CALL = ("hidden", "topk_weights", "topk_ids")
TOKENS = (1, 2, 3, 5, 17, 60, 200, 500, 700, 1500)
CASE = Case("of sizes of its own", tokens=max(TOKENS), experts=20, top_k=3, hidden=272, inner=176)


@pytest.fixture(params=[*SCHEMES, "plain", "expert parallel"])
def layer(request, device) -> dict:
    """Arguments of fused_experts."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    if request.param in SCHEMES:
        return make_quantised(CASE, request.param, dtype, device)
    layer = make_layer(CASE, dtype, device)
    if request.param == "expert parallel":
        layer["expert_map"] = torch.arange(CASE.experts, device=device).roll(3)
    return layer


def test_runs_each_launch_parameters_once(layer, monkeypatch):
    """Without a GPU warmup_layer compiles nothing: here goes what it runs on one."""
    ran, run_tiles = [], launches.run_tiles

    def watched(*args, **options):
        ran.append(args[6:8])
        return run_tiles(*args, **options)

    direct, run_direct = [], launches.run_direct

    def watched_direct(out, *args, **options):
        direct.append(options["block_shape"])
        return run_direct(out, *args, **options)

    monkeypatch.setattr(launches, "run_tiles", watched)
    monkeypatch.setattr(launches, "run_direct", watched_direct)
    options = {**moe_ops.fused_experts.__kwdefaults__, **layer}
    del options["out"]
    tensors = [options.pop(name) for name in ("hidden", "w13", "w2", "topk_weights", "topk_ids")]
    for position in (0, 3, 4):
        tensors[position] = tensors[position][:1]
    launches.compile_layer(*tensors, **options)
    taken = options["quant"] is None or (options["quant"] == "fp8_w8a8" and options["block_shape"] is not None)
    assert direct == ([options["block_shape"]] if taken else [])
    assert len(ran) == len(set(ran)) >= 2
    assert {config.gate_up.block_m for config, planned in ran if planned} >= {16, 64}
    alone = options["quant"] in (None, "int8_w8a16") or options["block_shape"] is not None
    assert {config.gate_up.block_m for config, planned in ran if not planned} == ({16} if alone else set())


@pytest.mark.parametrize("keyword", ["foo", "topk_ids", "h", "out"])
def test_a_wrong_keyword_is_an_error_without_a_gpu_too(keyword):
    w13, w2 = torch.zeros(2, 16, 8), torch.zeros(2, 8, 8)
    with pytest.raises(TypeError, match=f"warmup_layer: {keyword} is no option of a layer, those are activation, "):
        moe_ops.warmup_layer(w13, w2, 1, dtype=torch.float32, gated=True, **{keyword: None})


def test_nothing_compiles_afterwards(layer, device):
    if device == "cpu":
        pytest.skip("needs a GPU: the interpreter compiles nothing")
    import triton

    fixed = {name: value for name, value in layer.items() if name not in PER_CALL}
    moe_ops.warmup_layer(fixed.pop("w13"), fixed.pop("w2"), CASE.top_k, dtype=layer["hidden"].dtype, **fixed)
    compiled = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for tokens in TOKENS:
            moe_ops.fused_experts(**layer | {name: layer[name][:tokens] for name in PER_CALL})
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert not compiled
