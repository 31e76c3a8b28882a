"""The quantisation of the reference against its definition, and the layer and grouped product of quantised values."""

import pytest
import torch

from moe_ops import routing_plan
from moe_ops.reference import LIMITS, QUANTS, activate, dequantize, fused_experts, grouped_gemm, quantize
from tests.kernels.cases import assert_close

FP32 = 1e-5
HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 80, 48, 5, 3, 21
ACTIVATION_QUANTS = ("fp8_w8a8", "int8_w8a8")


def steps(q: torch.Tensor) -> torch.Tensor:
    """Distance to the next value of the dtype, for each."""
    if q.dtype == torch.int8:
        return torch.ones(q.shape)
    return torch.exp2(torch.frexp(q.float().abs().clamp(min=2.0**-6)).exponent - 4.0)


@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
@pytest.mark.parametrize("how", ["tensor", "static", "static rows", "per_token", "group"])
def test_quantize(quant, how):
    """Scales are absmax / limit; every value is within half a step of what it stands for, the largest is exact."""
    x = torch.randn(TOKENS, HIDDEN) * torch.logspace(-3, 3, TOKENS)[:, None]
    limit = LIMITS[QUANTS[quant]]
    absmax = {
        "tensor": x.abs().max().view(1),
        "static": x.abs().max().view(1),
        "static rows": x.abs().amax(1, keepdim=True),
        "per_token": x.abs().amax(1, keepdim=True),
        "group": torch.stack([part.abs().amax(1) for part in x.split(32, 1)], 1),
    }[how]
    options = {
        "tensor": {},
        "static": {"scale": absmax / limit},
        "static rows": {"scale": absmax / limit},
        "per_token": {"per_token": True},
        "group": {"group": 32},
    }[how]
    q, scale = quantize(x, quant, **options)
    assert q.dtype == QUANTS[quant]
    assert scale.dtype == torch.float32
    assert torch.equal(scale, absmax / limit)
    wide = scale.repeat_interleave(32, 1)[:, :HIDDEN] if how == "group" else scale
    exact = x.double() / wide.double()
    assert ((q.double() - exact).abs() <= steps(q) * 0.50001).all()
    assert q.float().abs().max() == limit


@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
def test_power_of_two_scales_are_those_of_groups_rounded_up(quant):
    x = torch.randn(TOKENS, HIDDEN) * torch.logspace(-3, 3, TOKENS)[:, None]
    _, exact = quantize(x, quant, group=32)
    q, scale = quantize(x, quant, group=32, power_of_two_scales=True)
    assert torch.equal(scale, torch.exp2(exact.log2().ceil()))
    again, _ = quantize(x[:, :32], quant, scale=scale[:, :1])
    assert torch.equal(q[:, :32].float(), again.float())


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_power_of_two_scales_of_what_is_no_number(value):
    q, scale = quantize(torch.tensor([[1.0, value]]), "fp8_w8a8", group=2, power_of_two_scales=True)
    assert str(scale.item()) == str(value)
    assert not q.float()[0, 1].isfinite()


def test_quantize_rounds_to_even_and_saturates():
    x = torch.tensor([[0.5, 1.5, -2.5, 126.5, 127.5, 300.0, -300.0]])
    q, _ = quantize(x, "int8_w8a8", scale=torch.ones(1))
    assert q.tolist() == [[0, 2, -2, 126, 127, 127, -128]]
    x = torch.tensor([[1.0625, 1.1875, 17.0, 449.0, 1e9, -1e9, 2.0**-10]])
    q, _ = quantize(x, "fp8_w8a8", scale=torch.ones(1))
    assert q.float().tolist() == [[1.0, 1.25, 16.0, 448.0, 448.0, -448.0, 0.0]]


@pytest.mark.parametrize("quant", ACTIVATION_QUANTS)
@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"group": 32}], ids=str)
def test_zeros_and_no_rows_have_a_scale(quant, options):
    q, scale = quantize(torch.zeros(3, 40), quant, **options)
    assert not q.float().any()
    assert (scale > 0).all()
    assert scale.isfinite().all()
    q, scale = quantize(torch.zeros(0, 40), quant, **options)
    assert q.shape == (0, 40)
    assert scale.isfinite().all()


@pytest.mark.parametrize("shape", [(EXPERTS,), (EXPERTS, 1), (EXPERTS, 70), (EXPERTS, 70, 1)])
def test_dequantize(shape):
    w, scale = torch.randint(-127, 128, (EXPERTS, 70, 100)).to(torch.int8), torch.rand(shape)
    expected = w.float()
    for expert in range(EXPERTS):
        for n in range(70):
            expected[expert, n] *= scale[expert].flatten()[n if scale[expert].numel() > 1 else 0]
    assert torch.equal(dequantize(w, scale), expected)
    assert torch.equal(dequantize(w.half(), None), w.float())


def test_dequantize_blocks():
    w, scale = torch.randint(-127, 128, (EXPERTS, 70, 100)).to(torch.int8), torch.rand(EXPERTS, 3, 4)
    ours = dequantize(w, scale, (24, 32))
    for n, k in ((0, 0), (23, 31), (24, 32), (69, 99), (47, 64)):
        assert torch.equal(ours[:, n, k], w[:, n, k].float() * scale[:, n // 24, k // 32])


def quantised_weights(quant: str, block_shape=None, channels: bool = False) -> dict:
    """w13, w2 and their scales; every expert's weights have a size of their own."""
    layer = {}
    for name, n, k in (("w13", 2 * INNER, HIDDEN), ("w2", HIDDEN, INNER)):
        w = torch.randn(EXPERTS, n, k) * 100
        layer[name] = w.round().clamp(-127, 127).to(QUANTS[quant])
        shape = (EXPERTS, n) if channels else (EXPERTS,)
        if block_shape is not None:
            shape = (EXPERTS, -(-n // block_shape[0]), -(-k // block_shape[1]))
        layer[f"{name}_scale"] = (1 + torch.rand(shape)) * k**-0.5 / 100
    return layer


def routed() -> dict:
    ids = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
    return {
        "hidden": torch.randn(TOKENS, HIDDEN) * (1 + torch.arange(TOKENS)[:, None]),
        "topk_weights": torch.rand(TOKENS, TOP_K),
        "topk_ids": ids.masked_fill(torch.rand(TOKENS, TOP_K) < 0.2, -1),
    }


LAYERS = {
    "fp8 tensor": ("fp8_w8a8", {}, {}),
    "fp8 static": ("fp8_w8a8", {}, {"a1_scale": torch.tensor(0.1), "a2_scale": torch.tensor([0.2])}),
    "fp8 static for each expert": (
        "fp8_w8a8",
        {},
        {"a1_scale": 0.1 + torch.rand(EXPERTS), "a2_scale": 0.1 + torch.rand(EXPERTS)},
    ),
    "fp8 channel and token": ("fp8_w8a8", {"channels": True}, {"per_token": True}),
    "fp8 channel and token, static": (
        "fp8_w8a8",
        {"channels": True},
        {"per_token": True, "a1_scale": torch.tensor(0.1), "a2_scale": torch.tensor([0.2])},
    ),
    "fp8 blocks": ("fp8_w8a8", {"block_shape": (20, 32)}, {"block_shape": (20, 32)}),
    "fp8 blocks, powers of two": (
        "fp8_w8a8",
        {"block_shape": (20, 32)},
        {"block_shape": (20, 32), "power_of_two_scales": True},
    ),
    "int8 tensor": ("int8_w8a8", {}, {}),
    "int8 channel and token": ("int8_w8a8", {"channels": True}, {"per_token": True}),
    "int8 blocks": ("int8_w8a8", {"block_shape": (64, 64)}, {"block_shape": (64, 64)}),
    "int8 weights": ("int8_w8a16", {"channels": True}, {}),
    "int8 weights in groups": ("int8_w8a16", {"block_shape": (1, 32)}, {"block_shape": (1, 32)}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_layer_by_its_definition(name, on_input):
    """Token by token; scales of whole tensors over all tokens, and over the choices that have an expert."""
    quant, weights, options = LAYERS[name]
    layer = routed() | quantised_weights(quant, **weights)
    block_shape = options.get("block_shape")
    w13 = dequantize(layer["w13"], layer["w13_scale"], block_shape)
    w2 = dequantize(layer["w2"], layer["w2_scale"], block_shape)
    ids = layer["topk_ids"]
    tokens, ks = torch.nonzero(ids >= 0, as_tuple=True)

    def rounded(x: torch.Tensor, scale: torch.Tensor | None, experts: torch.Tensor) -> torch.Tensor:
        if quant == "int8_w8a16":
            return x
        if scale is not None and scale.numel() > 1:
            scale = scale[experts][:, None]
        group = None if block_shape is None else block_shape[1]
        per_token = options.get("per_token", False) and scale is None
        rounding = per_token, group, options.get("power_of_two_scales", False)
        q, scale = quantize(x, quant, scale, *rounding)
        return q.float() * (scale if group is None else scale.repeat_interleave(group, 1)[:, : x.shape[1]])

    experts = ids[tokens, ks]
    a1_scale = options.get("a1_scale")
    if a1_scale is not None and a1_scale.numel() > 1:
        x = rounded(layer["hidden"][tokens], a1_scale, experts)
    else:
        x = rounded(layer["hidden"], a1_scale, experts)[tokens]
    weight = layer["topk_weights"][tokens, ks, None]
    h = activate(torch.einsum("cnk,ck->cn", w13[experts], x * weight if on_input else x))
    y = torch.einsum("cnk,ck->cn", w2[experts], rounded(h, options.get("a2_scale"), experts))
    expected = torch.zeros(TOKENS, HIDDEN).index_add_(0, tokens, y if on_input else y * weight)
    ours = fused_experts(**layer, **options, quant=quant, apply_router_weight_on_input=on_input)
    # sums in another order: an activation between two steps may take the other, which is off by 1/8 of it at most; the
    # largest holds a tenth of the norm or so
    assert_close(ours, expected, FP32 if quant == "int8_w8a16" else 2e-2)


def test_quantised_is_near_the_exact_layer():
    """Six roundings of fp8, of x and w13 in gates and in ups, of h and of w2: 2^-4 / sqrt(3) each, or less."""
    layer = routed()
    exact = {name: torch.randn(EXPERTS, n, k) * k**-0.5 for name, n, k in (("w13", 96, HIDDEN), ("w2", HIDDEN, 48))}
    quantised = {}
    for name, w in exact.items():
        q, scale = quantize(w.flatten(0, 1), "fp8_w8a8", per_token=True)
        quantised |= {name: q.view(w.shape), f"{name}_scale": scale.view(EXPERTS, -1)}
    ours = fused_experts(**layer, **quantised, quant="fp8_w8a8", per_token=True)
    assert_close(ours, fused_experts(**layer, **exact), 6**0.5 * 2**-4 / 3**0.5)


@pytest.mark.parametrize("name", ["fp8 blocks", "int8 channel and token", "fp8 tensor", "int8 weights in groups"])
@pytest.mark.parametrize("gather", [True, False])
def test_grouped_gemm(name, gather):
    quant, weights, options = LAYERS[name]
    layer = routed() | quantised_weights(quant, **weights)
    plan = routing_plan(layer["topk_ids"], EXPERTS, 16)
    x = torch.randn(TOKENS if gather else TOKENS * TOP_K, HIDDEN)
    block_shape = options.get("block_shape")
    q, x_scale = x, None
    if quant != "int8_w8a16":
        group = None if block_shape is None else block_shape[1]
        q, x_scale = quantize(x, quant, None, options.get("per_token", False), group)
        x = q.float() * (x_scale if group is None else x_scale.repeat_interleave(group, 1)[:, :HIDDEN])
    ours = grouped_gemm(
        q,
        layer["w13"],
        plan,
        gather,
        x_scale=x_scale,
        w_scale=layer["w13_scale"],
        block_shape=block_shape,
        out_dtype=torch.float32,
    )
    w = dequantize(layer["w13"], layer["w13_scale"], block_shape)
    assert_close(ours, grouped_gemm(x, w, plan, gather), FP32)


def test_grouped_gemm_takes_a_scale_for_each_expert():
    layer = routed() | quantised_weights("fp8_w8a8")
    plan = routing_plan(layer["topk_ids"], EXPERTS, 16)
    q, scale = quantize(layer["hidden"], "fp8_w8a8", torch.ones(1))[0], torch.rand(EXPERTS)
    options = {"gather": True, "out_dtype": torch.float32}
    w, w_scale = layer["w13"], layer["w13_scale"]
    ours = grouped_gemm(q, w, plan, x_scale=scale, w_scale=w_scale, **options)
    assert_close(ours, grouped_gemm(q, w, plan, x_scale=torch.ones(1), w_scale=w_scale * scale, **options), FP32)


@pytest.mark.parametrize("alias", [True, False])
def test_out(alias):
    layer = routed() | {"w13": torch.randn(EXPERTS, 2 * INNER, HIDDEN), "w2": torch.randn(EXPERTS, HIDDEN, INNER)}
    expected = fused_experts(**layer)
    out = layer["hidden"] if alias else torch.full((TOKENS, HIDDEN), torch.nan)
    assert fused_experts(**layer, out=out) is out
    assert torch.equal(out, expected)
