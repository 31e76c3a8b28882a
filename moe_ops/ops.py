"""The MoE ops: torch custom ops over the Triton kernels on CUDA tensors, over `reference.py` on CPU tensors.

With TRITON_INTERPRET=1 in the environment, CPU tensors run the kernels too, in Triton's interpreter; but not bf16,
which it would multiply as bit patterns.

The matrices (hidden or x, and the weights) share one of fp16, bf16 and fp32; biases and routed weights may have any
floating dtype. Every op is deterministic: no atomics, and each sum has one order. A token's bits depend on the rest of
the batch in one way only: the size of the batch chooses the rows of a tile (`tile_rows` in configs/moe.py).
"""

from __future__ import annotations

import torch

from ops_configs.moe import TILE_ROWS, moe_default, tile_rows
from ops_patches.library import op_library, uses_kernels

from . import checks, reference
from .routing import RoutingPlan

_register = op_library("moe_ops")


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


PLAN_ARRAYS = ("choices", "rows", "counts", "starts", "tile_experts", "tile_starts", "tile_sizes")


def _plan_args(plan: RoutingPlan) -> tuple[list[torch.Tensor], int, int]:
    return [getattr(plan, name) for name in PLAN_ARRAYS], plan.top_k, plan.tile_rows


def _fake_grouped_gemm(x, w, plan, top_k, tile_rows, gather, bias, topk_weights):
    return x.new_empty(plan[0].shape[0], w.shape[1])


@_register(
    "grouped_gemm(Tensor x, Tensor w, Tensor[] plan, int top_k, int tile_rows, bool gather, Tensor? bias, "
    "Tensor? topk_weights)",
    "Tensor",
    _fake_grouped_gemm,
)
def _grouped_gemm(x, w, plan, top_k, tile_rows, gather, bias, topk_weights):
    op = "grouped_gemm"
    plan = RoutingPlan(*plan, top_k=top_k, tile_rows=tile_rows)
    experts, choices = plan.counts.shape[0], plan.choices.shape[0]
    checks.grouped_gemm(x, w, plan.choices, experts, top_k, gather, bias, topk_weights)
    x = _rows_contiguous(x)
    checks.kernel_operands(op, x=x, w=w)
    if not uses_kernels(x):
        return reference.grouped_gemm(x, w, plan, gather, bias=bias, topk_weights=topk_weights)
    checks.tile_rows(op, tile_rows, TILE_ROWS)
    from .kernels import grouped_gemm as kernel

    out = x.new_zeros(choices, w.shape[1])  # rows without expert: no program writes them
    if out.numel() > 0:
        config = moe_default(tile_rows, choices // top_k, experts, top_k, *w.shape[1:], itemsize=x.dtype.itemsize)
        weights = None if topk_weights is None else topk_weights.reshape(-1)
        kernel.grouped_gemm(x, w, out, plan, config, gather=gather, bias=bias, weights=weights)
    return out


def _fake_fused_experts(hidden, *args):
    return hidden.new_empty(hidden.shape)


@_register(
    "fused_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, str activation, "
    "bool gated, bool interleaved, float swiglu_alpha, float swiglu_limit, Tensor? bias13, Tensor? bias2, "
    "Tensor? expert_map, bool apply_router_weight_on_input, float routed_scaling)",
    "Tensor",
    _fake_fused_experts,
)
def _fused_experts(
    hidden,
    w13,
    w2,
    topk_weights,
    topk_ids,
    activation,
    gated,
    interleaved,
    swiglu_alpha,
    swiglu_limit,
    bias13,
    bias2,
    expert_map,
    apply_router_weight_on_input,
    routed_scaling,
):
    checks.fused_experts(
        hidden, w13, w2, topk_weights, topk_ids, gated, bias13, bias2, expert_map, apply_router_weight_on_input
    )
    checks.activation(activation, gated, interleaved)
    hidden = _rows_contiguous(hidden)
    checks.kernel_operands("fused_experts", hidden=hidden, w13=w13, w2=w2)
    act = {
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "swiglu_alpha": swiglu_alpha,
        "swiglu_limit": swiglu_limit,
        "bias13": bias13,
    }
    if not uses_kernels(hidden):
        return reference.fused_experts(
            hidden,
            w13,
            w2,
            topk_weights,
            topk_ids,
            **act,
            bias2=bias2,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            routed_scaling=routed_scaling,
        )
    from .kernels.combine import combine
    from .kernels.gate_up import gate_up
    from .kernels.grouped_gemm import grouped_gemm
    from .kernels.routing import routing_plan

    out = hidden.new_empty(hidden.shape)
    if out.numel() == 0:
        return out
    experts, width, inner = w2.shape
    tokens, top_k = topk_ids.shape
    size = hidden.dtype.itemsize
    batch = (tile_rows(tokens, experts, top_k, size), tokens, experts, top_k)
    plan = routing_plan(topk_ids, experts, batch[0], expert_map)
    weights = topk_weights.reshape(-1)
    on_input, on_output = (weights, None) if apply_router_weight_on_input else (None, weights)
    h = hidden.new_empty(tokens * top_k, inner)
    config = moe_default(*batch, inner, width, products=2 if gated else 1, itemsize=size)
    gate_up(hidden, w13, h, plan, config, **act, weights=on_input)
    y = hidden.new_empty(tokens * top_k, width)
    config = moe_default(*batch, width, inner, itemsize=size)
    grouped_gemm(h, w2, y, plan, config, bias=bias2, weights=on_output)
    combine(y, out, plan, routed_scaling)
    return out


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
        w: [E, N, K], last dimension contiguous, the dtype of x.
        plan: of tiles of 16, 32, 64 or 128 rows.
        gather: read the row of the token.
        bias: [E, N].
        topk_weights: [M, top_k], routed weight of each choice.

    Returns:
        [C, N] in the dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit or has a dtype that is not supported; the message says which.
    """
    return torch.ops.moe_ops.grouped_gemm(x, w, *_plan_args(plan), gather, bias, topk_weights)


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
    """The routed-experts layer; arguments and result are those of `reference.fused_experts`.

    Intermediates are rounded to the dtype of hidden: what the activation returns, and what each expert returns for a
    token, routed weight included. Without a host sync; ids out of range are found on the CPU only, else they count
    as -1.

    Raises:
        ValueError, TypeError: an argument does not fit or has a dtype that is not supported; the message says which.
    """
    return torch.ops.moe_ops.fused_experts(
        hidden,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation,
        gated,
        interleaved,
        float(swiglu_alpha),
        float(swiglu_limit),
        bias13,
        bias2,
        expert_map,
        apply_router_weight_on_input,
        float(routed_scaling),
    )
