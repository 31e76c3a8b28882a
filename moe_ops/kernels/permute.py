"""Permute: out[row] = x[token of row], so that what follows reads the rows of a tile as one block.

Shapes: x [M, K], out [C, K] of the same dtype. Arrays of the plan as in routing.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_patches.launch import cdiv, power_of_two, prepared

from ..routing import RoutingPlan
from .tiles import UNALIGNED, row_stride

MAX_BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def permute_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    out_ptr,  # [C, K]
    choices_ptr,  # int32 [C]
    first_without_expert_ptr,  # int32 [1]
    x_stride,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, ceil(K / BLOCK)). A program owns BLOCK columns of a row; none without expert."""
    row = tl.program_id(0)
    if row >= tl.load(first_without_expert_ptr):
        return
    token = tl.load(choices_ptr + row) // TOP_K
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + columns, mask=columns < K)
    tl.store(out_ptr + row.to(tl.int64) * K + columns, x, mask=columns < K)


def permute(x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """x [M, K], last dimension contiguous, in row order: [C, K]. Rows without expert hold anything."""
    rows, k = plan.choices.shape[0], x.shape[1]
    out = x.new_empty(rows, k)
    block = min(power_of_two(k), MAX_BLOCK)
    launch = prepared(permute_kernel, K=k, TOP_K=plan.top_k, BLOCK=block, num_warps=4)
    launch((rows, cdiv(k, block)), x, out, plan.choices, plan.starts[-1:], row_stride(x))
    return out
