"""Pure-torch fp32 reference of the routed-experts layer and of its grouped matrix product.

All maths is fp32, results are rounded once, to the dtype of the input. `fused_experts` needs no routing plan: it goes
expert by expert over the tokens that chose it, so that it also tells whether a plan is right.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from . import checks
from .checks import ACTIVATIONS as ACTIVATIONS
from .routing import RoutingPlan, local_experts

POINTWISE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    plan: RoutingPlan,
    gather: bool = False,
    *,
    bias: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[row] = weight of row * (w[expert of row] @ x[row] + bias[expert of row]); zero for rows without expert.

    Args:
        x: [C, K], one row each row of the plan; with gather [M, K], one row each token.
        w: [E, N, K].
        gather: read the row of the token, x[token of row].
        bias: [E, N].
        topk_weights: floating [M, top_k], routed weight of each choice; 1 by default.

    Returns:
        [C, N] in the dtype of x.

    Raises:
        ValueError: a shape or device that does not fit the plan.
        TypeError: x or w is not floating.
    """
    checks.grouped_gemm(x, w, plan.choices, plan.counts.shape[0], plan.top_k, gather, bias, topk_weights)
    x_rows = x[plan.tokens.long()] if gather else x
    out = torch.zeros(plan.choices.shape[0], w.shape[1], dtype=torch.float32, device=x.device)
    for expert, (first, end) in enumerate(pairwise(plan.starts.tolist())):
        out[first:end] = x_rows[first:end].float() @ w[expert].float().T
        if bias is not None:
            out[first:end] += bias[expert].float()
        if topk_weights is not None:
            out[first:end] *= topk_weights.flatten()[plan.choices[first:end].long(), None].float()
    return out.to(x.dtype)


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

    Returns:
        [M, H] in the dtype of hidden.

    Raises:
        ValueError: a shape or device that does not fit, an unknown activation, bias13 with routed weights on the
            input, and on the CPU an id out of range.
        TypeError: ids that are not int32 or int64, or another tensor that is not floating.
    """
    checks.fused_experts(
        hidden, w13, w2, topk_weights, topk_ids, gated, bias13, bias2, expert_map, apply_router_weight_on_input
    )
    checks.activation(activation, gated, interleaved)
    num_experts = w13.shape[0]
    experts = local_experts(topk_ids, num_experts, expert_map)
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in range(num_experts):
        tokens, ks = torch.nonzero(experts == expert, as_tuple=True)
        weight = topk_weights[tokens, ks, None].float()
        x = hidden[tokens].float()
        if apply_router_weight_on_input:
            x = x * weight
        h = x @ w13[expert].float().T
        if bias13 is not None:
            h = h + bias13[expert].float()
        h = activate(
            h,
            activation,
            gated=gated,
            interleaved=interleaved,
            swiglu_alpha=swiglu_alpha,
            swiglu_limit=swiglu_limit,
        )
        y = h @ w2[expert].float().T
        if bias2 is not None:
            y = y + bias2[expert].float()
        out.index_add_(0, tokens, y if apply_router_weight_on_input else y * weight)
    return (routed_scaling * out).to(hidden.dtype)
