"""The quantised MoE kernels against the fp32 reference of the same quantised values: on a GPU, else interpreted."""

import pytest
import torch
import triton
import triton.language as tl

import moe_ops
from moe_ops import launches, ops, reference
from moe_ops.kernels import grouped_gemm as grouped_gemm_module
from moe_ops.kernels.chunks import load_x_chunks, quantized_chunks
from moe_ops.kernels.gate_up import gate_up
from moe_ops.kernels.grouped_gemm import grouped_gemm
from moe_ops.kernels.quantize import group_scales
from moe_ops.kernels.quantize import quantize as quantize_kernel
from moe_ops.reference import LIMITS, QUANTS, dequantize, quantize
from ops_configs.moe import MoeConfig, tile_rows
from ops_patches import counters, library

from .cases import UNIT_ROUNDOFF, assert_close
from .test_moe_ops import (  # noqa: F401  (poisoned is a fixture)
    FP32,
    SWIGLU,
    WITHOUT_PLAN,
    Case,
    in_fp32,
    make_layer,
    poisoned,
    watch_launches,
    watch_plans,
)

inf, nan = float("inf"), float("nan")
ACTIVATION_QUANTS = ("fp8_w8a8", "int8_w8a8")


def product_tolerance(dtype: torch.dtype, quant: str, device: str) -> float:
    """One rounding to the dtype; fp8 tensor cores keep 13 bits of the sums within a step."""
    return UNIT_ROUNDOFF.get(dtype, FP32) + (2**-11 if quant == "fp8_w8a8" and device == "cuda" else 0.0)


def quantised(layer: dict, quant: str, block_shape=None, channels: bool = False) -> dict:
    """The layer with weights of `quant`; each expert, channel or block has a scale of its own."""
    changes = {"quant": quant, "block_shape": block_shape}
    for name in ("w13", "w2"):
        w = layer[name]
        experts, n, k = w.shape
        q = (torch.randn(w.shape) * 50).round().clamp(-127, 127).to(QUANTS[quant])
        shape = (experts, n) if channels else (experts,)
        if block_shape is not None:
            shape = (experts, -(-n // block_shape[0]), -(-k // block_shape[1]))
        scale = (0.5 + torch.rand(shape)) * k**-0.5 / 50
        changes |= {name: q.to(w.device), f"{name}_scale": scale.to(w.device)}
    return layer | changes


SCHEMES = {
    "fp8 tensor": {"quant": "fp8_w8a8"},
    "fp8 static": {"quant": "fp8_w8a8", "static": "one"},
    "fp8 static for each expert": {"quant": "fp8_w8a8", "static": "experts"},
    "fp8 channel and token": {"quant": "fp8_w8a8", "channels": True, "per_token": True},
    "fp8 channel and static": {"quant": "fp8_w8a8", "channels": True, "static": "one"},
    "fp8 blocks": {"quant": "fp8_w8a8", "block_shape": (32, 32)},
    "fp8 blocks of their own shape": {"quant": "fp8_w8a8", "block_shape": (24, 64)},
    "fp8 blocks, powers of two": {"quant": "fp8_w8a8", "block_shape": (32, 32), "power_of_two_scales": True},
    "int8 tensor": {"quant": "int8_w8a8"},
    "int8 static for each expert": {"quant": "int8_w8a8", "static": "experts"},
    "int8 channel and token": {"quant": "int8_w8a8", "channels": True, "per_token": True},
    "int8 blocks": {"quant": "int8_w8a8", "block_shape": (16, 32)},
    "int8 weights, tensor": {"quant": "int8_w8a16"},
    "int8 weights, channel": {"quant": "int8_w8a16", "channels": True},
    "int8 weights, groups": {"quant": "int8_w8a16", "block_shape": (1, 32)},
}


def make_quantised(case: Case, scheme: str, dtype: torch.dtype, device: str) -> dict:
    options = dict(SCHEMES[scheme])
    static = options.pop("static", None)
    rounding = {name: options.pop(name, False) for name in ("per_token", "power_of_two_scales")}
    layer = quantised(make_layer(case, dtype, device), **options) | rounding
    if static:
        shape = (1,) if static == "one" else (case.experts,)
        limit = LIMITS[QUANTS[options["quant"]]]
        for name, largest in (("a1_scale", 3.0), ("a2_scale", 2.0)):  # below what occurs: it saturates
            layer[name] = ((1 + torch.rand(shape)) * largest / limit).to(device)
    return layer


def to_another_step(
    x: torch.Tensor,
    error: float,
    quant: str,
    scale: torch.Tensor | None,
    per_token: bool,
    group: int | None,
    power_of_two_scales: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize`, but what an error, relative to the element or to the usual one, takes to another step is there."""
    q, scale = quantize(x, quant, scale, per_token, group, power_of_two_scales)
    in_steps = x / reference._row_scale(scale, group, x.shape[1])
    off = error * in_steps.abs().clamp_min(float(in_steps.square().mean().sqrt()))
    one = torch.ones(1, device=x.device)
    below, above = (quantize(moved, quant, one)[0].float() for moved in (in_steps - off, in_steps + off))
    return torch.where(below != q.float(), below, above).to(q.dtype), scale


def expected_of(layer: dict, device: str) -> tuple[torch.Tensor, float]:
    """The reference's result, and how far from it, relative to its norm, ours may be.

    Three roundings. Where activations are quantised: what goes into the second product has the error of the first, and
    so has its scale, which takes elements to another step of fp8 or int8. The reference with all of them there is as
    far away as they take it together; twice that is for those that go alone, or elsewhere.
    """
    floating = in_fp32({name: value for name, value in layer.items() if name not in ("w13", "w2")})
    weights = {"w13": layer["w13"], "w2": layer["w2"]}
    expected = reference.fused_experts(**weights, **floating)
    error = product_tolerance(layer["hidden"].dtype, layer["quant"], device)
    tolerance = 3**0.5 * error
    if layer["quant"] in ACTIVATION_QUANTS and expected.numel():
        inner, hidden = layer["w2"].shape[2], layer["w2"].shape[1]
        assert inner != hidden, "the first input is quantised without an error"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                reference,
                "quantize",
                lambda x, *args: to_another_step(x, 2 * error if x.shape[1] == inner else 0.0, *args),
            )
            moved = reference.fused_experts(**weights, **floating)
        norm = expected.double().norm().clamp_min(0.1 * expected.numel() ** 0.5)
        tolerance += 2 * float((moved.double() - expected.double()).norm() / norm)
    return expected, tolerance


def check(layer: dict, device: str) -> None:
    ours = moe_ops.fused_experts(**layer)
    expected, tolerance = expected_of(layer, device)
    assert ours.dtype == layer["hidden"].dtype
    assert_close(ours, expected, tolerance)
    assert not ours[(layer["topk_ids"] == -1).all(1)].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "case",
    [
        Case("ids of -1", left_out=0.4),
        Case("tiles of 64 rows", tokens=36, experts=2, hidden=40, inner=72),
        Case("tiles of 64 rows, through TMA", tokens=36, experts=2, hidden=160, inner=80),
    ],
    ids=str,
)
def test_schemes(scheme, case, dtype, device, poisoned):  # noqa: F811
    check(make_quantised(case, scheme, dtype, device), device)


CASES = [
    Case("one token", tokens=1, top_k=1),
    Case("no tokens", tokens=0),
    Case("two tokens, with a plan", tokens=2, left_out=0.3),
    Case("rows that TMA does not take", hidden=37, inner=21),
    Case("experts without tokens", tokens=3, experts=60, top_k=4),
    Case("all tokens on one expert", tokens=90, experts=9, top_k=1, one_expert=True),
    Case("tiles of 128 rows", tokens=200, experts=2, top_k=2, hidden=160, inner=136),
    Case("nothing is here", left_out=1.0),
    Case("biases, ids of -1", bias=True, left_out=0.4, options={"routed_scaling": 2.5}),
    Case("interleaved clamped swiglu", bias=True, options=SWIGLU | {"interleaved": True}),
    Case("interleaved, tiles of 64 rows", tokens=36, experts=2, inner=80, options={"interleaved": True}),
    Case(
        "interleaved, tiles of 64 rows, through TMA",
        tokens=36,
        experts=2,
        hidden=160,
        inner=80,
        options={"interleaved": True},
    ),
    Case("ungated relu2 with biases", bias=True, options={"gated": False, "activation": "relu2"}),
    Case("routed weight on the input", options={"apply_router_weight_on_input": True}),
    Case("as gpt-oss", tokens=3, experts=2, hidden=2880, inner=34, bias=True, options=SWIGLU | {"interleaved": True}),
]


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int8 channel and token"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, scheme, device, poisoned):  # noqa: F811
    check(make_quantised(case, scheme, torch.float16 if device == "cpu" else torch.bfloat16, device), device)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int8 blocks", "int8 weights, channel", "int8 weights, groups"])
@pytest.mark.parametrize("case", WITHOUT_PLAN, ids=str)
def test_cases_without_a_plan(monkeypatch, case, scheme, device, poisoned):  # noqa: F811
    planned = watch_plans(monkeypatch)
    check(make_quantised(case, scheme, torch.float16 if device == "cpu" else torch.bfloat16, device), device)
    assert planned == [False]


def test_scales_of_several_rows_have_a_plan(monkeypatch, device):
    """What rows without expert hold must not count in them."""
    planned = watch_plans(monkeypatch)
    check(make_quantised(WITHOUT_PLAN[0], "fp8 tensor", torch.float16, device), device)
    assert planned == [True]


DIRECT_CASES = [
    Case("one token", tokens=1),
    Case("one expert of one", tokens=1, experts=1, top_k=1, hidden=37, inner=21),
    Case("top 8, two steps of the first half", tokens=1, experts=11, top_k=8, hidden=1100, inner=12, bias=True),
    Case("top 10, two steps of the second half", tokens=1, experts=12, top_k=10, hidden=37, inner=140, left_out=0.7),
    Case("two tokens, ids of -1", tokens=2, experts=40, top_k=3, bias=True, left_out=0.5),
    Case("nothing is here", tokens=1, left_out=1.0),
    Case("interleaved", tokens=1, top_k=3, inner=70, bias=True, options=SWIGLU | {"interleaved": True}),
    Case("four tokens, ungated", tokens=4, experts=48, bias=True, options={"gated": False, "activation": "relu2"}),
    Case("weight on the input", tokens=2, experts=25, options={"apply_router_weight_on_input": True}),
    Case("routed scaling", tokens=1, hidden=260, inner=136, options={"routed_scaling": 2.5, "activation": "gelu"}),
]


POWERS_OF_TWO_CASES = ("top 8, two steps of the first half", "top 10, two steps of the second half", "interleaved")


def watch_direct(monkeypatch) -> list[int]:
    """Tokens of the batches that run choice by choice from now on."""
    ran, run_direct = [], launches.run_direct

    def watched(out, *args, **options):
        ran.append(out.shape[0])
        run_direct(out, *args, **options)

    monkeypatch.setattr(launches, "run_direct", watched)
    return ran


@pytest.mark.parametrize("block_shape", [(32, 32), (3, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("case", DIRECT_CASES, ids=str)
def test_blocks_of_few_tokens(monkeypatch, case, block_shape, dtype, device, poisoned):  # noqa: F811
    """Choice by choice: columns of a program under one scale or several, chunks of one step or more."""
    ran = watch_direct(monkeypatch)
    check(quantised(make_layer(case, dtype, device), "fp8_w8a8", block_shape), device)
    assert ran == [case.tokens]


@pytest.mark.parametrize("block_shape", [(32, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("case", [case for case in DIRECT_CASES if str(case) in POWERS_OF_TWO_CASES], ids=str)
def test_blocks_of_few_tokens_under_powers_of_two(monkeypatch, case, block_shape, dtype, device, poisoned):  # noqa: F811
    ran = watch_direct(monkeypatch)
    layer = quantised(make_layer(case, dtype, device), "fp8_w8a8", block_shape)
    check(layer | {"power_of_two_scales": True}, device)
    assert ran == [case.tokens]


@pytest.mark.parametrize("block_shape", [(32, 32), (128, 128)], ids=str)
def test_blocks_of_few_tokens_and_an_expert_map(monkeypatch, block_shape, dtype, device, poisoned):  # noqa: F811
    ran = watch_direct(monkeypatch)
    layer = quantised(make_layer(Case("", tokens=2, experts=40, top_k=3), dtype, device), "fp8_w8a8", block_shape)
    layer["expert_map"] = torch.arange(40, dtype=torch.int32, device=device).roll(7) - 9
    check(layer | {"expert_map": layer["expert_map"].clamp(min=-1)}, device)
    scales = {name: layer[name].mT.contiguous().mT for name in ("w13_scale", "w2_scale")}
    check(layer | scales | {"expert_map": None}, device)
    assert ran == [2, 2]


@pytest.mark.parametrize("change", [{"quant": "int8_w8a8"}, {"block_shape": (32, 96)}, {"block_shape": None}], ids=str)
def test_other_quantisations_of_one_token_have_a_plan(monkeypatch, change, device, poisoned):  # noqa: F811
    ran = watch_direct(monkeypatch)
    scheme = {"quant": "fp8_w8a8", "block_shape": (32, 32)} | change
    check(quantised(make_layer(Case("", tokens=1), torch.float16, device), **scheme), device)
    assert ran == []


@triton.jit
def chunks_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Rows in chunks, quantised: q and the scale of each chunk."""
    rows = tl.arange(0, ROWS)
    x = load_x_chunks(x_ptr + rows * x_stride, rows >= 0, 0, K, BLOCK_K)
    q, scale = quantized_chunks(x, GROUP, POWER_OF_TWO)
    chunks = tl.arange(0, BLOCK_K // 16)
    elements = rows[None, :, None] * BLOCK_K + chunks[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(q_ptr + elements, q)
    tl.store(scale_ptr + rows[None, :] * (BLOCK_K // 16) + chunks[:, None], scale)


@pytest.mark.parametrize("power_of_two_scales", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(256, 128), (201, 32), (70, 64)])
def test_chunks_are_quantised_as_by_the_reference(columns, group, power_of_two_scales, dtype, device):
    """Bit for bit."""
    block, x = triton.next_power_of_2(columns), wide(8, columns, dtype, device)
    q, scale = torch.full((8, block), nan, device=device), torch.full((8, block // 16), nan, device=device)
    chunks_kernel[(1,)](x, q, scale, x.stride(0), columns, 8, block, group, power_of_two_scales)
    expected, expected_scale = quantize(x, "fp8_w8a8", group=group, power_of_two_scales=power_of_two_scales)
    assert torch.equal(q[:, :columns], expected.float())
    groups = expected_scale.shape[1]
    assert torch.equal(scale[:, :: group // 16][:, :groups], expected_scale)


@pytest.mark.parametrize("tokens", [1, 3], ids=["choice by choice where it may", "with a plan"])
@pytest.mark.parametrize("value", [inf, nan], ids=str)
@pytest.mark.parametrize("scheme", [name for name, options in SCHEMES.items() if "static" not in options])
def test_a_value_that_is_no_number_stays_none(scheme, value, tokens, device, poisoned):  # noqa: F811
    """What overflowed must not come out as a number; the other tokens' rows do not know."""
    layer = make_quantised(Case("", tokens=tokens, hidden=70), scheme, torch.float16, device)
    layer["hidden"][0, 3] = value
    ours = moe_ops.fused_experts(**layer)
    assert not ours[0].isfinite().any()
    assert ours[1:].isfinite().all() or scheme.endswith("8 tensor")


def test_ranks_of_expert_parallel_sum_to_the_layer(device, poisoned):  # noqa: F811
    layer = make_quantised(Case("", experts=6, top_k=3), "fp8 static for each expert", torch.float32, device)
    total = 0
    for rank in (0, 1):
        mine = torch.arange(6)[rank::2]
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(3, dtype=torch.int32)
        local = {name: layer[name][mine.to(device)] for name in layer if name[0] == "w" or name.endswith("_scale")}
        total = total + moe_ops.fused_experts(**layer | local, expert_map=expert_map.to(device))
    assert_close(total, moe_ops.fused_experts(**layer), FP32)


@pytest.mark.parametrize("scheme", ["fp8 channel and token", "fp8 blocks", "int8 weights, channel"])
@pytest.mark.usefixtures("products_in_order")
def test_bits_of_a_token_do_not_depend_on_the_others(scheme, dtype, device):
    """Within one tile size: more tokens, in another order."""
    layer = make_quantised(Case("", tokens=16, experts=6, top_k=2, hidden=64, inner=72), scheme, dtype, device)
    assert tile_rows(16, 6, 2) == tile_rows(7, 6, 2)
    whole = moe_ops.fused_experts(**layer)
    assert torch.equal(moe_ops.fused_experts(**layer), whole)
    some = torch.randperm(16)[:7].to(device)
    part = {name: layer[name][some] for name in ("hidden", "topk_weights", "topk_ids")}
    assert torch.equal(moe_ops.fused_experts(**layer | part), whole[some])


def wide(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of many sizes, one of them zero, in a window of a wider tensor of NaN."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 2, rows)[:, None]
    x[rows // 2] = 0
    window = torch.full((rows, columns + 9), nan, dtype=dtype, device=device)
    window[:, 4 : 4 + columns] = x.to(dtype)
    return window[:, 4 : 4 + columns]


HOW = {
    "tensor": lambda device: {},
    "static": lambda device: {"scale": torch.tensor([0.013], device=device)},
    "static scalar": lambda device: {"scale": torch.tensor(0.4, device=device)},
    "per_token": lambda device: {"per_token": True},
    "group": lambda device: {"group": 32},
    "odd group": lambda device: {"group": 40},
    "group of more than a row": lambda device: {"group": 4096},
    "group, powers of two": lambda device: {"group": 32, "power_of_two_scales": True},
    "odd group, powers of two": lambda device: {"group": 40, "power_of_two_scales": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
@pytest.mark.parametrize(("rows", "columns"), [(9, 2100), (270, 33), (1, 1)])
def test_quantize_has_the_values_of_the_reference(how, quant, rows, columns, dtype, device, poisoned):  # noqa: F811
    x, options = wide(rows, columns, dtype, device), HOW[how](device)
    q, scale = moe_ops.quantize(x, quant, **options)
    expected_q, expected_scale = quantize(x, quant, **options)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected_q.float())
    assert not options.get("power_of_two_scales") or powers_of_two(scale)


def powers_of_two(scale: torch.Tensor) -> bool:
    return bool((torch.frexp(scale.float()).mantissa == 0.5).all())


def test_power_of_two_scales_are_the_next_ones(device):
    """Of exact powers, of what is just below and above, of zeros; the largest magnitude takes half the range."""
    exponents = torch.arange(-40, 119)
    exact = 448 * torch.exp2(exponents.float())
    below, above = (torch.nextafter(exact, torch.tensor(end)) for end in (0.0, inf))
    x = torch.cat([exact, below, above, torch.zeros(1)])[:, None].to(device)
    q, scale = moe_ops.quantize(x, "fp8_w8a8", group=32, power_of_two_scales=True)
    smallest = torch.tensor([-42])  # 1e-10 / 448 rounded up
    expected = torch.exp2(torch.cat([exponents, exponents, exponents + 1, smallest]).float())
    assert torch.equal(scale.cpu().flatten(), expected)
    assert (q.float()[:-1] >= 224).all()


@pytest.mark.parametrize("value", [inf, nan], ids=str)
def test_scales_of_what_is_no_number_are_none_beside_powers_of_two(value, dtype, device):
    x = torch.tensor([[1.0, value], [3.0, 4.0]], dtype=dtype, device=device)
    for run in (moe_ops.quantize, quantize):
        _, scale = run(x, "fp8_w8a8", group=32, power_of_two_scales=True)
        assert not scale[0].isfinite()
        assert scale[1] == 2.0**-6


def test_quantize_rounds_every_fp8_boundary_to_even(device):
    """Every value of e4m3, the middle between neighbours, and just beside: subnormal, carrying, saturating ones."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), torch.tensor([460.0, 1e30])])
    x = torch.cat([x, -x])[None].to(device)
    one = torch.ones(1, device=device)
    q, _ = moe_ops.quantize(x, "fp8_w8a8", scale=one)
    assert torch.equal(q.float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
@pytest.mark.parametrize("how", ["tensor", "static", "static for each expert", "per_token", "group"])
def test_quantize_leaves_out_rows_without_expert(quant, how, dtype, device, poisoned):  # noqa: F811
    plan = moe_ops.routing_plan(torch.randint(-1, 3, (20, 2), dtype=torch.int32).to(device), 3, 16)
    live = int(plan.starts[-1])
    x = torch.full((40, 100), 6e4, dtype=dtype, device=device)  # larger than all rows that count
    x[:live] = wide(live, 100, dtype, device)
    scale = torch.tensor([0.2, 3.0, 0.01], device=device)
    options = {"scale": scale} if how == "static for each expert" else HOW[how](device)
    q, found = quantize_kernel(x, quant, **options, plan=plan)
    if how == "static for each expert":
        options["scale"] = scale.repeat_interleave(plan.counts.long())[:, None]
        found = options["scale"]
    expected_q, expected = quantize(x[:live], quant, **options)
    assert torch.equal(q[:live].float(), expected_q.float())
    assert torch.equal(found[:live], expected)
    if how in ("per_token", "group"):
        assert found[live:].isnan().all(), "not written"


@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
def test_quantize_gathers_tokens_for_a_scale_of_each_expert(quant, dtype, device):
    plan = moe_ops.routing_plan(torch.randint(-1, 3, (20, 2), dtype=torch.int32).to(device), 3, 16)
    live, x = int(plan.starts[-1]), wide(20, 100, dtype, device)
    scale = torch.tensor([0.2, 3.0, 0.01], device=device)
    q, _ = quantize_kernel(x, quant, scale, plan=plan, gather=True)
    of_rows = scale.repeat_interleave(plan.counts.long())[:, None]
    expected, _ = quantize(x[plan.tokens[:live].long()], quant, of_rows)
    assert torch.equal(q[:live].float(), expected.float())


PRODUCTS = ["fp8 tensor", "fp8 channel and token", "fp8 blocks", "int8 tensor", "int8 blocks", "int8 weights, groups"]


def make_operands(scheme: str, rows: int, n: int, k: int, dtype: torch.dtype, device: str) -> dict:
    """x [rows, k] and w [4, n, k], quantised as the scheme has it, and their scales."""
    options = dict(SCHEMES[scheme])
    per_token = options.pop("per_token", False)
    layer = quantised({"w13": torch.empty(4, n, k, device=device), "w2": torch.empty(4, 1, 1)}, **options)
    x, x_scale = wide(rows, k, dtype, device), None
    if options["quant"] in ACTIVATION_QUANTS:
        block_shape = layer["block_shape"]
        x, x_scale = quantize(x, options["quant"], None, per_token, block_shape and block_shape[1])
    names = {"x": x, "w": layer["w13"], "x_scale": x_scale, "w_scale": layer["w13_scale"]}
    return names | {"block_shape": layer["block_shape"]}


@pytest.mark.parametrize("scheme", PRODUCTS)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "in row order"])
@pytest.mark.parametrize(("k", "n", "rows"), [(96, 48, 16), (75, 33, 64), (272, 130, 128)])
def test_grouped_gemm(scheme, gather, k, n, rows, dtype, device):
    """The public op: every row of the plan; rows without expert are zero."""
    quant = SCHEMES[scheme]["quant"]
    ids = torch.randint(-1, 4, (45, 3), dtype=torch.int32).to(device)
    plan = moe_ops.routing_plan(ids, 4, rows)
    operands = make_operands(scheme, 45 if gather else 135, n, k, dtype, device)
    options = {"gather": gather, "plan": plan, "topk_weights": torch.rand(45, 3, device=device)}
    options["bias"] = torch.randn(4, n, device=device)
    ours = moe_ops.grouped_gemm(**operands, **options, out_dtype=dtype)
    expected = reference.grouped_gemm(**operands | options, out_dtype=torch.float32)
    assert ours.dtype == dtype
    assert_close(ours, expected, product_tolerance(dtype, quant, device))


@pytest.mark.parametrize("scheme", PRODUCTS[:-1])
@pytest.mark.parametrize(("k", "n", "block_m"), [(96, 48, 64), (112, 1040, 128), (32, 272, 16)])
@pytest.mark.parametrize("whole", [True, False], ids=["a program a tile", "two programs a tile"])
def test_stationary_rows(monkeypatch, scheme, k, n, block_m, whole, dtype, device):
    """One block of K and several, the last one whole or not; rows without expert are not written."""
    monkeypatch.setattr(grouped_gemm_module, "WHOLE_TILES", 1000 if whole else 0)
    launched = watch_launches(monkeypatch, grouped_gemm_module, "stationary_kernel")
    quant = SCHEMES[scheme]["quant"]
    ids = torch.randint(-1, 4, (110, 3), dtype=torch.int32).to(device)
    plan = moe_ops.routing_plan(ids, 4, block_m)
    live, weights = int(plan.starts[-1]), torch.rand(330, device=device)
    operands = make_operands(scheme, 330, n, k, dtype, device)
    bias = torch.randn(4, n, device=device)
    config = MoeConfig(block_m, 64, 64, 4, 3, 1, stationary=True)
    out = torch.full((330, n), nan, dtype=dtype, device=device)
    x, w = operands.pop("x"), operands.pop("w")
    grouped_gemm(x, w, out, plan, config, weights=weights, bias=bias, **operands)
    expected = reference.grouped_gemm(
        x, w, plan, False, **operands, topk_weights=weights.view(110, 3), bias=bias, out_dtype=torch.float32
    )
    assert_close(out[:live], expected[:live], product_tolerance(dtype, quant, device))
    assert out[live:].isnan().all()
    programs = plan.tile_experts.shape[0] * (1 if whole else 2)
    grids = [grid for grid, _ in launched]
    assert grids == ([(programs,)] if dtype != torch.float32 else [])  # TMA stores no fp32 here


CONFIGS = [
    MoeConfig(16, 16, 32, 4, 2, 1),
    MoeConfig(16, 64, 32, 4, 2, 1),
    MoeConfig(64, 32, 64, 4, 2, 2),
    MoeConfig(64, 32, 64, 4, 2, 2, persistent=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("block_shape", [(32, 32), (24, 64), (64, 96), (1, 32)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_gate_up_of_blocks(config, block_shape, interleaved, device):
    """Scale blocks smaller and larger than those of a program, and across the border of gates and ups."""
    quant, ids = "fp8_w8a8", torch.randint(-1, 4, (30, 2), dtype=torch.int32).to(device)
    plan, n, k = moe_ops.routing_plan(ids, 4, config.block_m), 72, 200
    live = int(plan.starts[-1])
    layer = {"w13": torch.empty(4, 2 * n, k, device=device), "w2": torch.empty(4, 1, 1)}
    layer = quantised(layer, quant, block_shape)
    x, x_scale = quantize(wide(30, k, torch.float32, device), quant, group=block_shape[1])
    scales = {"x_scale": x_scale, "w_scale": layer["w13_scale"], "block_shape": block_shape}
    out = torch.full((60, n), nan, device=device)
    gate_up(x, layer["w13"], out, plan, config, **scales, interleaved=interleaved)
    products = reference.grouped_gemm(x, layer["w13"], plan, True, **scales, out_dtype=torch.float32)
    expected = reference.activate(products, interleaved=interleaved)
    assert_close(out[:live], expected[:live], 2 * product_tolerance(torch.float32, quant, device))
    assert out[live:].isnan().all()


@pytest.mark.parametrize(("quant", "powers"), [("fp8_w8a8", False), ("fp8_w8a8", True), ("int8_w8a8", False)])
@pytest.mark.parametrize(("n", "config"), [(72, CONFIGS[1]), (64, CONFIGS[2]), (64, CONFIGS[3])])
def test_gate_up_quantises_as_the_kernel_would(quant, powers, n, config, dtype, device):
    """Bit for bit what quantising its output in the dtype of hidden gives; rows without expert are not written."""
    ids = torch.randint(-1, 4, (30, 2), dtype=torch.int32).to(device)
    plan = moe_ops.routing_plan(ids, 4, config.block_m)
    live, block_shape = int(plan.starts[-1]), (32, 32)
    layer = {"w13": torch.empty(4, 2 * n, 96, device=device), "w2": torch.empty(4, 1, 1)}
    layer = quantised(layer, quant, block_shape)
    x, x_scale = quantize(torch.randn(30, 96, device=device), quant, group=32)
    args = {"x_scale": x_scale, "w_scale": layer["w13_scale"], "block_shape": block_shape}
    args["bias13"] = torch.randn(4, 2 * n, device=device)
    h = torch.empty(60, n, dtype=dtype, device=device)
    gate_up(x, layer["w13"], h, plan, config, **args)
    expected, expected_scale = quantize(h[:live], quant, group=32, power_of_two_scales=powers)
    q = torch.full((60, n), 77.0, device=device).to(QUANTS[quant])
    scale = group_scales(60, -(-n // 32), True, device).fill_(nan)
    gate_up(x, layer["w13"], q, plan, config, **args, out_scale=scale, power_of_two_scales=powers, round_to=dtype)
    assert powers_of_two(scale[:live]) == powers
    assert torch.equal(scale[:live], expected_scale)
    assert torch.equal(q[:live].float(), expected.float())
    assert (q[live:].float() == torch.tensor(77.0).to(QUANTS[quant]).float().item()).all()
    assert scale[live:].isnan().all()


def test_scales_may_have_any_strides(device):
    plan = moe_ops.routing_plan(torch.randint(0, 4, (20, 2), dtype=torch.int32).to(device), 4, 16)
    operands = make_operands("fp8 blocks", 20, 48, 96, torch.float32, device)
    expected = moe_ops.grouped_gemm(**operands, plan=plan, gather=True, out_dtype=torch.float32)
    for name in ("x_scale", "w_scale"):
        operands[name] = operands[name].mT.contiguous().mT
    assert torch.equal(moe_ops.grouped_gemm(**operands, plan=plan, gather=True, out_dtype=torch.float32), expected)


@pytest.mark.parametrize("scheme", ["fp8 static for each expert", "int8 static for each expert"])
def test_static_scales_may_have_any_strides(scheme, device):
    layer = make_quantised(Case("", left_out=0.3), scheme, torch.float32, device)
    expected = moe_ops.fused_experts(**layer)
    for name in ("a1_scale", "a2_scale"):
        strided = {name: torch.stack([layer[name], layer[name] * nan], 1)[:, 0]}
        assert torch.equal(moe_ops.fused_experts(**layer | strided), expected)
    one = {"a1_scale": layer["a1_scale"][:1].expand(5)}
    whole = {"a1_scale": one["a1_scale"].contiguous()}
    assert torch.equal(moe_ops.fused_experts(**layer | one), moe_ops.fused_experts(**layer | whole))


def test_channel_scales_may_have_a_dimension_more(device):
    layer = make_quantised(Case(""), "fp8 channel and token", torch.float32, device)
    deeper = {name: layer[name][..., None] for name in ("w13_scale", "w2_scale")}
    assert torch.equal(moe_ops.fused_experts(**layer | deeper), moe_ops.fused_experts(**layer))
    layer = make_quantised(Case(""), "int8 tensor", torch.float32, device)
    deeper = {name: layer[name][..., None] for name in ("w13_scale", "w2_scale")}
    assert torch.equal(moe_ops.fused_experts(**layer | deeper), moe_ops.fused_experts(**layer))


def test_out_may_be_hidden(device):
    layer = make_quantised(Case("", left_out=0.3), "fp8 blocks", torch.float32, device)
    expected = moe_ops.fused_experts(**layer)
    assert moe_ops.fused_experts(**layer, out=layer["hidden"]) is layer["hidden"]
    assert torch.equal(layer["hidden"], expected)


def test_without_kernels_the_cpu_takes_the_reference(monkeypatch):
    layer = make_quantised(Case("", bias=True), "fp8 blocks", torch.bfloat16, "cpu")
    assert torch.equal(moe_ops.fused_experts(**layer), reference.fused_experts(**layer))
    monkeypatch.setattr(library, "INTERPRET", False)
    q, scale = moe_ops.quantize(torch.randn(3, 40), "int8_w8a8", group=32)
    assert q.dtype == torch.int8
    assert scale.shape == (3, 2)


def test_schemas_and_fakes(device):
    test_utils = ("test_schema", "test_faketensor")
    for how in ("tensor", "static", "per_token", "group", "group, powers of two"):
        options = {"scale": None, "per_token": False, "group": None, "power_of_two_scales": False} | HOW[how](device)
        args = (torch.randn(3, 80, device=device), "int8_w8a8", *options.values())
        torch.library.opcheck(torch.ops.moe_ops.quantize.default, args, test_utils=test_utils)
    plan = moe_ops.routing_plan(torch.randint(0, 4, (20, 2)).to(device), 4, 16)
    operands = make_operands("int8 blocks", 20, 48, 96, torch.float32, device)
    scales = [operands[name] for name in ("x_scale", "w_scale", "block_shape")]
    args = (operands["x"], operands["w"], *ops._plan_args(plan), True, None, None, *scales, torch.float32)
    torch.library.opcheck(torch.ops.moe_ops.grouped_gemm.default, args, test_utils=test_utils)


def test_compiles_as_one_graph(device):
    layer = make_quantised(Case(""), "fp8 channel and token", torch.float32, device)

    def model(hidden):
        return moe_ops.fused_experts(**layer | {"hidden": 2 * hidden}) + hidden

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layer["hidden"]), model(layer["hidden"]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cuda_graph_without_a_sync(scheme, dtype, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    layer = make_quantised(Case("", tokens=24, experts=8, top_k=3, left_out=0.2), scheme, dtype, device)
    moe_ops.fused_experts(**layer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_ops.fused_experts(**layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ops.fused_experts(**layer)
    layer["hidden"].copy_(torch.randn_like(layer["hidden"]))
    graph.replay()
    assert torch.equal(out, moe_ops.fused_experts(**layer))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("scheme", "change", "error", "message"),
    [
        ("fp8 tensor", {"quant": "fp4"}, ValueError, "quant is 'fp4', expected None or one of fp8_w8a8, int8_w8a8"),
        ("fp8 tensor", {"quant": "int8_w8a8"}, TypeError, "w13 is torch.float8_e4m3fn, but weights of int8_w8a8 are"),
        (
            "fp8 tensor",
            {"w13_scale": None},
            ValueError,
            r"w13_scale is missing, expected \[5\] or \[5, 1\] \(per tensor",
        ),
        ("fp8 tensor", {"w2_scale": torch.ones(4)}, ValueError, r"w2_scale has shape \[4\], expected \[5\]"),
        ("fp8 tensor", {"w2_scale": torch.ones(5).half()}, TypeError, "w2_scale is torch.float16, expected float32"),
        ("fp8 tensor", {"a1_scale": torch.ones(2)}, ValueError, r"a1_scale has shape \[2\], expected one element, or"),
        ("fp8 blocks", {"w13_scale": torch.ones(5, 3, 2)}, ValueError, r"\[5, 3, 3\], one for each block of 32 x 32"),
        ("fp8 blocks", {"block_shape": (32, 40)}, ValueError, r"block_shape is \[32, 40\], .* bk a multiple of 32"),
        ("fp8 blocks", {"a2_scale": ONE}, ValueError, "a scale for each 32 columns of a row: leave out a1_scale"),
        ("fp8 blocks", {"per_token": True}, ValueError, "leave out a1_scale, a2_scale and per_token"),
        ("fp8 tensor", {"power_of_two_scales": True}, ValueError, "this is fp8_w8a8 without block_shape: leave it out"),
        ("int8 blocks", {"power_of_two_scales": True}, ValueError, "those of fp8_w8a8 with block_shape, this is int8"),
        (None, {"power_of_two_scales": True}, ValueError, "power_of_two_scales without quant: give quant"),
        ("int8 weights, channel", {"a1_scale": ONE}, ValueError, "int8_w8a16 leaves activations as they are"),
        ("int8 tensor", {"hidden": torch.randn(13, 72).double()}, TypeError, "hidden float64, w13 int8"),
        (None, {"w2_scale": ONE, "per_token": True}, ValueError, "w2_scale, per_token without quant: give quant"),
    ],
)
@pytest.mark.parametrize("interpreter", [True, False])
def test_bad_input_is_named(scheme, change, error, message, interpreter, device, monkeypatch):
    """The same error with kernels and without; it is counted."""
    monkeypatch.setattr(library, "INTERPRET", interpreter)
    case = Case("", inner=40)
    layer = make_quantised(case, scheme, torch.float16, device) if scheme else make_layer(case, torch.float16, device)
    if "w13_scale" in change and change["w13_scale"] is not None:
        assert layer["w13_scale"].shape == (5, 3, 3)
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    before = counters.snapshot()["error"].get("fused_experts", {}).get(error.__name__, 0)
    with pytest.raises(error, match=message):
        moe_ops.fused_experts(**layer | change)
    assert counters.snapshot()["error"]["fused_experts"][error.__name__] == before + 1


@pytest.mark.parametrize(
    ("scheme", "change", "error", "message"),
    [
        ("fp8 tensor", {"out_dtype": None}, ValueError, "x is torch.float8_e4m3fn: give out_dtype"),
        ("fp8 tensor", {"out_dtype": torch.int32}, TypeError, "out_dtype is torch.int32, expected one of float16"),
        ("fp8 tensor", {"x_scale": None}, ValueError, r"x_scale is missing, expected one element, \[experts\]"),
        ("fp8 tensor", {"w_scale": None}, ValueError, "w_scale is missing"),
        (
            "fp8 tensor",
            {"x": torch.zeros(20, 96)},
            ValueError,
            "x_scale belongs to quantised x, but x is torch.float32",
        ),
        ("fp8 tensor", {"x": torch.zeros(20, 96), "x_scale": None}, TypeError, "quantise x, moe_ops.quantize does"),
        ("int8 tensor", {"x": torch.zeros(20, 96).to(torch.float8_e4m3fn)}, TypeError, "x is .*fn, w is torch.int8"),
        ("fp8 blocks", {"x_scale": torch.ones(20, 2)}, ValueError, r"expected \[rows, ceil\(K / 32\)\] = \[20, 3\]"),
    ],
)
def test_bad_input_of_grouped_gemm_is_named(scheme, change, error, message, device):
    plan = moe_ops.routing_plan(torch.randint(0, 4, (20, 2)).to(device), 4, 16)
    args = make_operands(scheme, 20, 48, 96, torch.float32, device) | {"out_dtype": torch.float32} | change
    args = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    with pytest.raises(error, match=message):
        moe_ops.grouped_gemm(plan=plan, gather=True, **args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant": "int8_w8a16"}, ValueError, "quant is 'int8_w8a16', expected fp8_w8a8 or int8_w8a8"),
        ({"group": 32, "per_token": True}, ValueError, "give at most one of scale, per_token and group"),
        ({"group": 0}, ValueError, "group is 0"),
        ({"power_of_two_scales": True}, ValueError, "power_of_two_scales are scales of groups: give group, or leave"),
        ({"per_token": True, "power_of_two_scales": True}, ValueError, "power_of_two_scales are scales of groups"),
        ({"scale": torch.ones(1), "power_of_two_scales": True}, ValueError, "power_of_two_scales are scales of groups"),
        ({"scale": torch.ones(2)}, ValueError, r"scale has shape \[2\], expected one element, or \[rows, 1\]"),
        ({"x": torch.zeros(3, 4).int()}, TypeError, "x is torch.int32"),
    ],
)
def test_bad_input_of_quantize_is_named(change, error, message, device):
    args = {"x": torch.zeros(3, 40), "quant": "fp8_w8a8"} | change
    with pytest.raises(error, match=message):
        moe_ops.quantize(**args)


def test_dequantised_weights_give_the_unquantised_layer(device):
    """int8_w8a16 is the plain layer over the weights that the scales make."""
    layer = make_quantised(Case("", bias=True), "int8 weights, channel", torch.float32, device)
    plain = {name: value for name, value in layer.items() if name not in ("quant", "per_token", "block_shape")}
    for name in ("w13", "w2"):
        plain[name] = dequantize(layer[name], plain.pop(f"{name}_scale"))
    assert_close(moe_ops.fused_experts(**layer), moe_ops.fused_experts(**plain), FP32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_intermediates_in_memory_that_is_given(scheme, device):
    """What the activation returns may be quantised in it."""
    case = Case("", tokens=13, experts=5, top_k=2, hidden=96, inner=64)
    layer = make_quantised(case, scheme, torch.float16, device)
    h, y = (torch.full((26, n), float("nan"), dtype=torch.float16, device=device) for n in (64, 96))
    assert torch.equal(moe_ops.fused_experts(**layer, h=h, y=y), moe_ops.fused_experts(**layer))
    assert not y.isnan().any()
