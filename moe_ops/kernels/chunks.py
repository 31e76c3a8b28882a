"""Products of a few rows and block fp8 weights on CUDA cores, for the experts of a few tokens (direct.py).

Every program quantises what it reads of x and h, as `quantize` does, and multiplies chunks of CHUNK columns, each under
one scale. A thread has the same chunk of all rows of a weight, so that it quantises that chunk once.

Shapes: C chunks of a step of BLOCK_K columns, T experts, N rows of their weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_configs.moe import DIRECT_CHUNK

from ..reference import LIMITS
from .quantize import magnitude, rounded, scale_of

CHUNK = tl.constexpr(DIRECT_CHUNK)
FP8_LIMIT = tl.constexpr(LIMITS[torch.float8_e4m3fn])


@triton.jit
def load_x_chunks(rows, here, k0, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks [C, T, CHUNK] of rows of x (pointers [T]) from column k0 on, of BLOCK_K columns; zero unless here [T]."""
    C: tl.constexpr = BLOCK_K // CHUNK
    HALF: tl.constexpr = CHUNK // 2  # 16 bytes of half precision
    columns = k0 + tl.arange(0, C)[:, None, None] * CHUNK + tl.arange(0, HALF)[None, None, :]
    pointers = rows[None, :, None] + columns
    low = tl.load(pointers, mask=here[None, :, None] & (columns < K), other=0.0)
    high = tl.load(pointers + HALF, mask=here[None, :, None] & (columns < K - HALF), other=0.0)
    return tl.join(low, high).permute(0, 1, 3, 2).reshape(C, rows.shape[0], CHUNK)  # threads keep what they have


@triton.jit
def quantized_chunks(x, GROUP: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """What `quantize` makes of chunks [C, T, CHUNK], of groups of GROUP columns: fp32 values, and scales [C, T]."""
    C: tl.constexpr = x.shape[0]
    T: tl.constexpr = x.shape[1]
    absmax = tl.max(magnitude(x), 2).reshape(C * CHUNK // GROUP, GROUP // CHUNK, T)
    scale = scale_of(tl.max(absmax, 1), FP8_LIMIT, POWER_OF_TWO)
    scale = tl.broadcast_to(scale[:, None, :], absmax.shape).reshape(C, T)
    return rounded(x.to(tl.float32), scale[:, :, None], FP8_LIMIT, tl.float8e4nv), scale


@triton.jit
def load_w_chunks(
    rows,  # pointers [T, N] to rows of weights
    live,  # [T, N]
    scales,  # pointers [T, N] to scales of these rows, or [T, 1] of all
    scales_live,
    scale_stride,
    k0,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_K: tl.constexpr,
):
    """Chunks [C, T, N, CHUNK] of rows of fp8 weights from column k0 on, and their scales [C, T, N]; zero unless live.

    Triton 3.6 shares out the chunks to the threads first, then the experts, and gives a thread all rows; 3.9 begins
    with the rows, so that x goes through shared memory.
    """
    chunks = k0 + tl.arange(0, BLOCK_K // CHUNK) * CHUNK
    columns = chunks[:, None] + tl.arange(0, CHUNK)[None, :]
    pointers = rows[None, :, :, None] + columns[:, None, None, :]
    w = tl.load(pointers, mask=live[None, :, :, None] & (columns < K)[:, None, None, :], other=0.0)
    pointers = scales[None, :, :] + (chunks // SCALE_K * scale_stride)[:, None, None]
    return w, tl.load(pointers, mask=scales_live[None, :, :] & (chunks < K)[:, None, None], other=0.0)


@triton.jit
def add_chunks(sums, x, x_scale, w):
    """sums [C, T, N] + the products of x [C, T, CHUNK] and w, of `load_w_chunks`, each times its scales."""
    products = x[:, :, None, :] * w[0].to(tl.float32)
    return sums + tl.sum(products, 3) * (x_scale[:, :, None] * w[1])


@triton.jit
def gate_up_of_chunks(
    x_row,
    gate_ptr,
    up_ptr,
    w_scale,
    expert,
    column,
    expert_stride,
    row_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(gates, ups) [BLOCK_N] of x_row and the block fp8 weights of an expert, BLOCK_N columns from `column` on.

    ONE_SCALE: columns of the program lie in one block of gates, and in one of ups.
    """
    UP_FIRST: tl.constexpr = 1 if INTERLEAVED else N  # rows of w13: the first of ups, and from column to column
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    one = tl.arange(0, 1)  # expert
    columns = column + tl.arange(0, BLOCK_N)[None, :]
    scaled = column + tl.arange(0, 1 if ONE_SCALE else BLOCK_N)[None, :]
    live, scales_live = columns < N, scaled < N
    gate_rows = gate_ptr + expert.to(tl.int64) * expert_stride + columns.to(tl.int64) * row_stride
    up_rows = up_ptr + expert.to(tl.int64) * expert_stride + columns.to(tl.int64) * row_stride
    scale_ptr = w_scale[0] + expert.to(tl.int64) * w_scale[1]
    gate_scales = scale_ptr + scaled * STEP // SCALE_N * w_scale[2]
    up_scales = scale_ptr + (UP_FIRST + scaled * STEP) // SCALE_N * w_scale[2]
    gates = tl.zeros((BLOCK_K // CHUNK, 1, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_K // CHUNK, 1, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        gate = load_w_chunks(gate_rows, live, gate_scales, scales_live, w_scale[3], k0, K, BLOCK_K, SCALE_K)
        if GATED:
            up = load_w_chunks(up_rows, live, up_scales, scales_live, w_scale[3], k0, K, BLOCK_K, SCALE_K)
        x = load_x_chunks(x_row + one, one == 0, k0, K, BLOCK_K)
        x, x_scale = quantized_chunks(x, SCALE_K, POWER_OF_TWO)
        gates = add_chunks(gates, x, x_scale, gate)
        if GATED:
            ups = add_chunks(ups, x, x_scale, up)
    return tl.sum(tl.sum(gates, 1), 0), tl.sum(tl.sum(ups, 1), 0)


@triton.jit
def down_of_chunks(
    h_rows,  # pointers [T]
    weights,  # [T]
    here,  # [T]
    rows,  # as `load_w_chunks` takes them, as are the next four
    live,
    scales,
    scales_live,
    scale_stride,
    K: tl.constexpr,
    SCALE_K: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weighted sum [N] over the experts of a token, whose weights are block fp8.

    Only h, and out where it is hidden, depends on the launch before: the first weights are read before that has ended.
    """
    sums = tl.zeros((BLOCK_K // CHUNK, rows.shape[0], rows.shape[1]), tl.float32)
    w = load_w_chunks(rows, live, scales, scales_live, scale_stride, 0, K, BLOCK_K, SCALE_K)
    if PDL:
        tl.extra.cuda.gdc_wait()  # for h
    h, h_scale = quantized_chunks(load_x_chunks(h_rows, here, 0, K, BLOCK_K), SCALE_K, POWER_OF_TWO)
    sums = add_chunks(sums, h, h_scale * weights[None, :], w)
    for k0 in range(BLOCK_K, K, BLOCK_K):
        w = load_w_chunks(rows, live, scales, scales_live, scale_stride, k0, K, BLOCK_K, SCALE_K)
        h, h_scale = quantized_chunks(load_x_chunks(h_rows, here, k0, K, BLOCK_K), SCALE_K, POWER_OF_TWO)
        sums = add_chunks(sums, h, h_scale * weights[None, :], w)
    return tl.sum(tl.sum(sums, 1), 0)
