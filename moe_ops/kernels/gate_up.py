"""First half of the experts: out[row] = act(w13[expert of row] @ x[token of row] + bias13), in expert-sorted order.

tile of rows of one expert -> gathered tokens x gate block, x up block -> activation -> one block of columns

Shapes: x [M, K], gate and up each [E, N, K] (views of w13: its halves, or every other row), out [C, N], all of one
dtype; both products accumulate in fp32 and the activation is applied to them before the one rounding, so that the
[C, 2N] between them exists nowhere. Arrays of the plan as in routing.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_configs.moe import MoeConfig

from ..routing import RoutingPlan
from .tiles import bias_operand, load_bias, load_rows, load_weight, operand, program_tile, takes_tma, weight_source


@triton.jit
def pointwise(x, ACTIVATION: tl.constexpr):
    """One of reference.POINTWISE, in fp32."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu2")
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def gated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """reference.activate of gates and ups, in fp32."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        return pointwise(gate, ACTIVATION) * up


@triton.jit(do_not_specialize=["num_tiles"])
def gate_up_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    gate,  # [E, N, K], descriptor or pointer
    up,  # as gate; unused when not GATED
    gate_bias_ptr,  # [E, N] or None
    up_bias_ptr,  # [E, N] or None
    weights_ptr,  # [C] routed weight of each choice, or None
    out_ptr,  # [C, N]
    choices_ptr,  # int32 [C]
    tile_experts_ptr,  # int32 [T]
    tile_starts_ptr,  # int32 [T]
    tile_sizes_ptr,  # int32 [T]
    num_tiles,
    x_stride,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    alpha,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles * ceil(N / BLOCK_N),). A program owns out[rows of its tile, its BLOCK_N columns].

    Rows without expert are in no tile and stay as they are. The routed weight multiplies the products: that is the
    same as multiplying x.
    """
    tile, block = program_tile(num_tiles, (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    m = tl.arange(0, BLOCK_M)
    rows = tl.load(tile_starts_ptr + tile) + m
    live = m < tl.load(tile_sizes_ptr + tile)
    choices = tl.load(choices_ptr + rows, mask=live, other=0)
    column = block * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    x_pointers = x_ptr + (choices // TOP_K)[:, None].to(tl.int64) * x_stride + ks[None, :]
    gate_source = weight_source(gate, expert, columns, ks, expert_stride, row_stride, TMA)
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_source = weight_source(up, expert, columns, ks, expert_stride, row_stride, TMA)
        ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = load_rows(x_pointers, k0, live, ks, K, BLOCK_K)
        w = load_weight(gate_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
        gates = tl.dot(x, w.T, gates, input_precision="ieee")
        if GATED:
            w = load_weight(up_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
            ups = tl.dot(x, w.T, ups, input_precision="ieee")

    if weights_ptr is not None:
        weight = tl.load(weights_ptr + choices, mask=live, other=0.0).to(tl.float32)[:, None]
        gates *= weight
        if GATED:
            ups *= weight
    if gate_bias_ptr is not None:
        gates += load_bias(gate_bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
    if GATED:
        if up_bias_ptr is not None:
            ups += load_bias(up_bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
        h = gated(gates, ups, alpha, limit, ACTIVATION)
    else:
        h = pointwise(gates, ACTIVATION)
    out = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    mask = live[:, None] if N % BLOCK_N == 0 else live[:, None] & (columns < N)[None, :]
    tl.store(out, h.to(out_ptr.dtype.element_ty), mask=mask)


def split_gate_up(w13: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gates and of the ups of a weight [E, 2N, K] or a bias [E, 2N]."""
    if interleaved:
        return w13[:, ::2], w13[:, 1::2]
    half = w13.shape[1] // 2
    return w13[:, :half], w13[:, half:]


def gate_up(
    x: torch.Tensor,
    w13: torch.Tensor,
    out: torch.Tensor,
    plan: RoutingPlan,
    config: MoeConfig,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    bias13: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> None:
    """Launch the first half of the experts.

    Args:
        x: [M, K], last dimension contiguous.
        w13: [E, 2N, K], gated; else [E, N, K]. Last dimension contiguous, the dtype of x.
        out: [C, N] contiguous. Rows without expert stay as they are.
        plan: of tiles of config.block_m rows, with at least one choice.
        activation, gated, interleaved, swiglu_alpha, swiglu_limit: as reference.activate has them.
        bias13: [E, rows of w13].
        weights: [C] contiguous, routed weight of each choice, applied to x.
    """
    gate, up = split_gate_up(w13, interleaved) if gated else (w13, w13)
    gate_bias, up_bias = (bias13, None) if bias13 is None or not gated else split_gate_up(bias13, interleaved)
    gate_bias_ptr, *bias_strides = bias_operand(gate_bias)
    tma = takes_tma(gate, up)
    num_tiles, block = plan.tile_experts.shape[0], (1, config.block_n, config.block_k)
    gate_up_kernel[(num_tiles * triton.cdiv(out.shape[1], config.block_n),)](
        x,
        operand(gate, block, tma),
        operand(up, block, tma),
        gate_bias_ptr,
        up_bias,
        weights,
        out,
        plan.choices,
        plan.tile_experts,
        plan.tile_starts,
        plan.tile_sizes,
        num_tiles,
        x.stride(0),
        gate.stride(0),
        gate.stride(1),
        *bias_strides,
        swiglu_alpha,
        swiglu_limit,
        N=out.shape[1],
        K=x.shape[1],
        TOP_K=plan.top_k,
        GATED=gated,
        ACTIVATION=activation,
        TMA=tma,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
