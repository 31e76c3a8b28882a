"""Combine: out[m] = scaling * sum over k of y[row of choice (m, k)].

rows of a token, where they have an expert -> fp32 sum in the order of k -> the token's row

Shapes: y [C, N] in row order, out [M, N] of the same dtype. Arrays of the plan as in routing.py; without one rows are
choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_patches.launch import cdiv, power_of_two, prepared

from ..routing import RoutingPlan
from .choices import Choices
from .routing import load_experts
from .tiles import UNALIGNED

MAX_BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    y_ptr,  # [C, N]
    out_ptr,  # [M, N]
    rows_ptr,  # int32 [C], or None: rows are choices
    first_without_expert_ptr,  # int32 [1], of a plan
    ids_ptr,  # [C] without a plan
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    scaling,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tokens, ceil(N / BLOCK_N)). A program owns BLOCK_N columns of out[token], zero without any expert.

    Rows of choices without expert, from `first_without_expert` on of a plan, were never written: they are not read.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if rows_ptr is not None:
        first_without_expert = tl.load(first_without_expert_ptr)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(TOP_K):
        if rows_ptr is None:
            row = token * TOP_K + k
            here = load_experts(ids_ptr, expert_map_ptr, row, True, EXPERTS, GLOBAL_EXPERTS) < EXPERTS
        else:
            row = tl.load(rows_ptr + token * TOP_K + k)
            here = row < first_without_expert
        mask = columns < tl.where(here, N, 0)
        total += tl.load(y_ptr + row.to(tl.int64) * N + columns, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + token.to(tl.int64) * N + columns
    tl.store(out, (scaling * total).to(out_ptr.dtype.element_ty), mask=columns < N)


def combine(
    y: torch.Tensor, out: torch.Tensor, tiles: RoutingPlan | Choices, scaling: float = 1.0, pdl: bool = False
) -> None:
    """Launch the combine: y [C, N] and out [M, N] contiguous, at least one token; tiles and pdl as in grouped_gemm."""
    tokens, n = out.shape
    block_n = min(power_of_two(n), MAX_BLOCK)
    if isinstance(tiles, Choices):
        where, constants = (None, None, tiles.ids, tiles.expert_map), tiles.constants
    else:
        where, constants = (tiles.rows, tiles.starts[-1:], None, None), {"EXPERTS": 0, "GLOBAL_EXPERTS": 0}
    launch = prepared(
        combine_kernel, N=n, TOP_K=tiles.top_k, **constants, BLOCK_N=block_n, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    launch((tokens, cdiv(n, block_n)), y, out, *where, scaling)
