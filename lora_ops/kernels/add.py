"""Sum of a layer and its LoRA part: y[m] += delta[m] for the rows m with an adapter.

tile of rows with one slot -> one block of columns

Shapes: y [M, N], delta [at least M, N]; the sum is made in fp32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_patches.launch import cdiv, prepared

from .tiles import Tiles, load_tile

BLOCK_N = 256


@triton.jit(do_not_specialize=["tiles_per_segment", "num_rows"])
def add_kernel(
    y_ptr,  # [M, N], rows y_stride apart
    delta_ptr,  # [M, N], rows delta_stride apart
    slots_ptr,
    rows_ptr,
    lengths_ptr,
    tiles_per_segment,
    num_rows,
    y_stride,
    delta_stride,
    N: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles * ceil(N / BLOCK_N),), blocks of columns fastest.

    A program owns y[rows of its tile, its block of columns]; tiles without adapter are left alone.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    slot, rows, live = load_tile(
        pid // BLOCKS, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, BLOCK_M
    )
    if slot < 0:
        return
    columns = pid % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = live[:, None] & (columns < N)[None, :]
    rows = rows[:, None].to(tl.int64)
    y_ptr += rows * y_stride + columns[None, :]  # [BLOCK_M, BLOCK_N]
    delta = tl.load(delta_ptr + rows * delta_stride + columns[None, :], mask=mask, other=0.0)
    total = tl.load(y_ptr, mask=mask, other=0.0).to(tl.float32) + delta.to(tl.float32)
    tl.store(y_ptr, total.to(y_ptr.dtype.element_ty), mask=mask)


def add(y: torch.Tensor, delta: torch.Tensor, tiles: Tiles) -> None:
    """Launch the sum: y [M, N] += delta [at least M, N], last dimensions contiguous, for the rows of the tiles."""
    num_rows, n = y.shape
    launch = prepared(
        add_kernel,
        N=n,
        TILES=tiles.mode,
        BLOCK_M=tiles.rows,
        BLOCK_N=BLOCK_N,
    )
    launch(
        (tiles.count * cdiv(n, BLOCK_N),),
        y,
        delta,
        *tiles.pointers,
        tiles.per_segment,
        num_rows,
        y.stride(0),
        delta.stride(0),
    )
