"""Grouped GEMM: out[row] = weight[choice of row] * (w[expert of row] @ x[row] + bias[expert of row]).

tile of rows of one expert -> rows x block of the expert's weight -> one block of columns

Shapes: x [C, K] in row order, or [M, K] gathered by token; w [E, N, K] of the same dtype; out [C, N]. The product
accumulates in fp32 and is rounded once, after bias and routed weight. Arrays of the plan as in routing.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_configs.moe import MoeConfig

from ..routing import RoutingPlan
from .tiles import bias_operand, load_bias, load_rows, load_weight, operand, program_tile, takes_tma, weight_source


@triton.jit(do_not_specialize=["num_tiles"])
def grouped_gemm_kernel(
    x,  # pointer to [M, K] (GATHER) or [C, K], rows x_stride apart; X_TMA: descriptor of [C, K]
    w,  # [E, N, K], descriptor or pointer
    bias_ptr,  # [E, N] or None
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
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (tiles * ceil(N / BLOCK_N),). A program owns out[rows of its tile, its BLOCK_N columns].

    Rows without expert are in no tile and stay as they are. Through TMA a tile also reads the rows that follow it:
    they end in rows of the product that are not stored.
    """
    tile, block = program_tile(num_tiles, (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    m = tl.arange(0, BLOCK_M)
    first_row = tl.load(tile_starts_ptr + tile)
    rows = first_row + m
    live = m < tl.load(tile_sizes_ptr + tile)
    column = block * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    if not X_TMA:
        x_rows = rows
        if GATHER:
            x_rows = tl.load(choices_ptr + rows, mask=live, other=0) // TOP_K
        x_pointers = x + x_rows[:, None].to(tl.int64) * x_stride + ks[None, :]
    w_source = weight_source(w, expert, columns, ks, expert_stride, row_stride, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if X_TMA:
            a = x.load([first_row, k0])
        else:
            a = load_rows(x_pointers, k0, live, ks, K, BLOCK_K)
        b = load_weight(w_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")

    if bias_ptr is not None:
        acc += load_bias(bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
    if weights_ptr is not None:
        choices = tl.load(choices_ptr + rows, mask=live, other=0)
        acc *= tl.load(weights_ptr + choices, mask=live, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    mask = live[:, None] if N % BLOCK_N == 0 else live[:, None] & (columns < N)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    plan: RoutingPlan,
    config: MoeConfig,
    *,
    gather: bool = False,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> None:
    """Launch a grouped GEMM.

    Args:
        x: [C, K], or with gather [M, K]; last dimension contiguous.
        w: [E, N, K], last dimension contiguous, the dtype of x.
        out: [C, N] contiguous. Rows without expert stay as they are.
        plan: of tiles of config.block_m rows, with at least one choice.
        gather: x has a row for each token, not for each row of the plan.
        bias: [E, N].
        weights: [C] contiguous, routed weight of each choice, applied last.
    """
    tma = takes_tma(w)
    x_tma = tma and not gather and takes_tma(x)
    num_tiles = plan.tile_experts.shape[0]
    bias_ptr, *bias_strides = bias_operand(bias)
    grouped_gemm_kernel[(num_tiles * triton.cdiv(out.shape[1], config.block_n),)](
        operand(x, (config.block_m, config.block_k), x_tma),
        operand(w, (1, config.block_n, config.block_k), tma),
        bias_ptr,
        weights,
        out,
        plan.choices,
        plan.tile_experts,
        plan.tile_starts,
        plan.tile_sizes,
        num_tiles,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        *bias_strides,
        N=out.shape[1],
        K=x.shape[1],
        TOP_K=plan.top_k,
        GATHER=gather,
        X_TMA=x_tma,
        TMA=tma,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
