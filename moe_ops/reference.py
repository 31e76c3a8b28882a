"""Pure-torch fp32 reference of the routed-experts layer, of its grouped matrix product, and of their quantisation.

All maths is fp32, results are rounded once, to the dtype of the input. `fused_experts` needs no routing plan: it goes
expert by expert over the tokens that chose it, so that it also tells whether a plan is right.

Quantised (`quant`), an operand is what `quantize` makes of it: the weights are given so, the activations are
quantised on the way, and the products are those of the quantised values.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from . import checks
from .checks import ACTIVATIONS as ACTIVATIONS
from .checks import QUANTS as QUANTS
from .routing import RoutingPlan, local_experts

POINTWISE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Quantised dtypes, and the value that the largest magnitude under a scale becomes."""
SMALLEST_ABSMAX = 1e-10
"""Largest magnitudes below count as this, so that zeros have a scale."""


def quantize(
    x: torch.Tensor,
    quant: str,
    scale: torch.Tensor | None = None,
    per_token: bool = False,
    group: int | None = None,
    power_of_two_scales: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale in the activations' dtype of `quant`, to nearest even, beyond its range the largest it has.

    Args:
        x: floating [R, K].
        quant: "fp8_w8a8" (float8_e4m3fn) or "int8_w8a8".
        scale: fp32 of one element or [R, 1]: static. By default it follows from x: (largest magnitude) / 448 for fp8,
            / 127 for int8, of the whole tensor, or
        per_token: of each row, or
        group: of each `group` columns of a row, the last group of a row may be smaller.
        power_of_two_scales: round the scales of groups up to powers of two, which have the format UE8M0 (8 bits of
            exponent alone) of OCP microscaling and of DeepGEMM; they stay in fp32.

    Returns:
        q [R, K], and its fp32 scale: the given one, else [1], [R, 1] or [R, ceil(K / group)].

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which.
    """
    checks.quantize(x, quant, scale, per_token, group, power_of_two_scales)
    dtype = QUANTS[quant]
    x = x.float()
    if scale is None:
        magnitudes = x.abs()
        if group is not None:
            groups = -(-x.shape[1] // group)
            padded = F.pad(magnitudes, (0, groups * group - x.shape[1]))
            absmax = padded.view(-1, groups, group).amax(2)
        elif per_token:
            absmax = magnitudes.amax(1, keepdim=True)
        else:
            absmax = F.pad(magnitudes.flatten(), (0, 1)).amax(0, keepdim=True)
        limit = torch.full((), LIMITS[dtype], device=x.device)  # by a number, CUDA would multiply by its reciprocal
        scale = absmax.clamp(min=SMALLEST_ABSMAX) / limit
        if power_of_two_scales:  # the fraction carries into the exponent; infinite and NaN stay as they are
            bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
            scale = torch.where(scale.isfinite(), bits.view(torch.float32), scale)
    q = x * (1 / _row_scale(scale, group, x.shape[1]))
    if dtype == torch.int8:
        return q.round().clamp(-128, 127).to(dtype), scale
    return q.clamp(-LIMITS[dtype], LIMITS[dtype]).to(dtype), scale


def dequantize(w: torch.Tensor, scale: torch.Tensor | None, block_shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Weights [E, N, K] times their scales, fp32.

    Args:
        scale: [E] or [E, 1], per tensor; [E, N] or [E, N, 1], per output channel; with block_shape = (bn, bk)
            [E, ceil(N / bn), ceil(K / bk)], one for each bn x bk block of a weight. None: not quantised.
    """
    if scale is None:
        return w.float()
    scale = scale.reshape(scale.shape[0], -1, 1) if scale.ndim < 3 else scale
    if block_shape is not None:
        scale = scale.repeat_interleave(block_shape[0], 1).repeat_interleave(block_shape[1], 2)
        scale = scale[:, : w.shape[1], : w.shape[2]]
    return w.float() * scale.float()


def _row_scale(scale: torch.Tensor, group: int | None, columns: int) -> torch.Tensor:
    """The scale of activations [R, columns], broadcast over the columns of each group."""
    if scale.ndim < 2 or group is None:
        return scale
    return scale.repeat_interleave(group, 1)[:, :columns]


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    plan: RoutingPlan,
    gather: bool = False,
    *,
    bias: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    block_shape: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out[row] = weight of row * (w[expert of row] @ x[row] + bias[expert of row]); zero for rows without expert.

    Args:
        x: [C, K], one row each row of the plan; with gather [M, K], one row each token. Floating, or as `quantize`
            returns it.
        w: [E, N, K], floating or quantised; quantised weights may also meet floating x.
        gather: read the row of the token, x[token of row].
        bias: [E, N].
        topk_weights: floating [M, top_k], routed weight of each choice; 1 by default.
        x_scale: fp32, of quantised x: one element, or [E], one for the rows of each expert, or [R, 1], one each row of
            x, or with block_shape [R, ceil(K / bk)].
        w_scale: fp32, of quantised weights, see `dequantize`.
        block_shape: (bn, bk), when scales belong to blocks of the weights and groups of bk columns of x.
        out_dtype: floating; the dtype of x by default, must be given when x is quantised.

    Returns:
        [C, N] in out_dtype.

    Raises:
        ValueError: a shape or device that does not fit the plan, or a scale that is missing.
        TypeError: a dtype that does not fit.
    """
    checks.grouped_gemm(x, w, plan.choices, plan.counts.shape[0], plan.top_k, gather, bias, topk_weights)
    checks.grouped_gemm_scales(x, w, x_scale, w_scale, block_shape, out_dtype)
    of_expert = x_scale is not None and x_scale.ndim == 1 and x_scale.numel() > 1
    if x_scale is not None and not of_expert:
        x = x.float() * _row_scale(x_scale, None if block_shape is None else block_shape[1], x.shape[1])
    x_rows = x[plan.tokens.long()] if gather else x
    out = torch.zeros(plan.choices.shape[0], w.shape[1], dtype=torch.float32, device=x.device)
    for expert, (first, end) in enumerate(pairwise(plan.starts.tolist())):
        out[first:end] = x_rows[first:end].float() @ _weight(w, w_scale, expert, block_shape).T
        if of_expert:
            out[first:end] *= x_scale[expert]
        if bias is not None:
            out[first:end] += bias[expert].float()
        if topk_weights is not None:
            out[first:end] *= topk_weights.flatten()[plan.choices[first:end].long(), None].float()
    return out.to(out_dtype or x.dtype)


def activate(
    h: torch.Tensor,
    activation: str = "silu",
    *,
    gated: bool = True,
    interleaved: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> torch.Tensor:
    """The layer's activation: [rows, 2I] -> [rows, I] when gated, else [rows, I] -> [rows, I].

    Args:
        h: gates and ups side by side, [gate_0..., up_0...]; interleaved: [gate_0, up_0, gate_1, up_1, ...].
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu2", each act(gate) * up; "swiglu_oai" is
            gate * sigmoid(swiglu_alpha * gate) * (up + 1), the gate clamped to at most swiglu_limit and the up to
            -swiglu_limit..swiglu_limit.
        gated: False: act(h), no ups.

    Raises:
        ValueError: an unknown activation, or one that needs a gate without it.
    """
    checks.activation(activation, gated, interleaved)
    if not gated:
        return POINTWISE[activation](h)
    gate, up = (h[:, ::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
        return gate * torch.sigmoid(swiglu_alpha * gate) * (up + 1)
    return POINTWISE[activation](gate) * up


def fused_experts(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling: float = 1.0,
    quant: str | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    per_token: bool = False,
    block_shape: tuple[int, int] | None = None,
    power_of_two_scales: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[m] = routed_scaling * sum over k of topk_weights[m, k] * expert topk_ids[m, k] of hidden[m].

    An expert is x -> w2 @ act(w13 @ x + bias13) + bias2; the routed weight multiplies what it returns, bias included.

    Args:
        hidden: [M, H].
        w13: [E, 2I, H], gates and ups; not gated: [E, I, H].
        w2: [E, H, I].
        topk_weights: floating [M, top_k].
        topk_ids: int32 or int64 [M, top_k], -1 = no expert: contributes nothing.
        activation, gated, interleaved, swiglu_alpha, swiglu_limit: see `activate`.
        bias13: [E, 2I] (not gated: [E, I]), in the order of the rows of w13.
        bias2: [E, H].
        expert_map: int32 or int64 [G]: index into w13 and w2 of each global expert, -1 = not on this device.
        apply_router_weight_on_input: multiply the expert's input by the routed weight instead of its output.
        routed_scaling: factor of the sum.
        quant: "fp8_w8a8": weights and activations are float8_e4m3fn; "int8_w8a8": int8; "int8_w8a16": only weights are.
        w13_scale, w2_scale: fp32 scales of the quantised weights, see `dequantize`.
        a1_scale, a2_scale: fp32, of one element or [E], one for each expert: static scales of hidden and of what the
            activation returns. By default they are dynamic, as `quantize` finds them in these tensors (the second has
            rows for choices with an expert only):
        per_token: for each row,
        block_shape: (bn, bk): weights have a scale for each bn x bk block, activations for each bk columns of a row,
            neither: one for the whole tensor.
        power_of_two_scales: of fp8_w8a8 with block_shape: round the scales of activations up to powers of two (UE8M0),
            see `quantize`; those of the weights are as they are given.
        out: [M, H], dtype of hidden, contiguous: where the result goes; may be hidden itself.

    Returns:
        [M, H] in the dtype of hidden; `out` when given.

    Raises:
        ValueError: a shape or device that does not fit, an unknown activation or quantisation, a scale that is missing
            or not used, bias13 with routed weights on the input, and on the CPU an id out of range.
        TypeError: a dtype that does not fit.
    """
    checks.fused_experts(
        hidden, w13, w2, topk_weights, topk_ids, gated, bias13, bias2, expert_map, apply_router_weight_on_input
    )
    scales = (w13_scale, w2_scale, a1_scale, a2_scale)
    checks.fused_experts_scales(quant, w13, w2, *scales, per_token, block_shape, power_of_two_scales)
    checks.activation(activation, gated, interleaved)
    checks.out("fused_experts", out, hidden)
    num_experts, top_k = w13.shape[0], topk_ids.shape[1]
    experts = local_experts(topk_ids, num_experts, expert_map).flatten()
    weights = topk_weights.flatten()[:, None].float()
    choices_of = [torch.nonzero(experts == expert).flatten() for expert in range(num_experts)]
    act = {"gated": gated, "interleaved": interleaved, "swiglu_alpha": swiglu_alpha, "swiglu_limit": swiglu_limit}
    rounding = (quant, per_token, block_shape, power_of_two_scales)

    x_of = _activations(hidden.float(), a1_scale, *rounding)
    # zeros of choices without expert do not count in a scale
    h = torch.zeros(experts.shape[0], w2.shape[2], dtype=torch.float32, device=hidden.device)
    for expert, choices in enumerate(choices_of):
        x = x_of(choices // top_k, expert)
        if apply_router_weight_on_input:
            x = x * weights[choices]
        y = x @ _weight(w13, w13_scale, expert, block_shape).T
        if bias13 is not None:
            y = y + bias13[expert].float()
        h[choices] = activate(y, activation, **act)

    h_of = _activations(h, a2_scale, *rounding)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, choices in enumerate(choices_of):
        y = h_of(choices, expert) @ _weight(w2, w2_scale, expert, block_shape).T
        if bias2 is not None:
            y = y + bias2[expert].float()
        total.index_add_(0, choices // top_k, y if apply_router_weight_on_input else y * weights[choices])
    result = (routed_scaling * total).to(hidden.dtype)
    return result if out is None else out.copy_(result)


def _weight(w, scale, expert, block_shape) -> torch.Tensor:
    """fp32 weight [N, K] of an expert."""
    one = slice(expert, expert + 1)
    return dequantize(w[one], None if scale is None else scale[one], block_shape)[0]


def _activations(
    x, scale, quant, per_token, block_shape, power_of_two_scales
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(indices, expert) -> those rows of x [R, K], quantised and fp32 again, as the expert reads them.

    A scale of the whole tensor counts all rows of x.
    """
    if quant is None or quant == "int8_w8a16":
        return lambda rows, expert: x[rows]
    group = None if block_shape is None else block_shape[1]

    def rounded(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        q, scale = quantize(x, quant, scale, per_token and scale is None, group, power_of_two_scales)
        return q.float() * _row_scale(scale, group, x.shape[1])

    if scale is not None and scale.numel() > 1:
        return lambda rows, expert: rounded(x[rows], scale[expert])
    whole = rounded(x, scale)
    return lambda rows, expert: whole[rows]
