"""What the grouped GEMM kernels share: which tile a program computes, how it reads and multiplies its operands.

A weight, and rows in the order of the plan, are read through a TMA descriptor where their layout allows one, else
through pointers: `operand` makes the kernel argument of either kind, `load_weight` and `load_rows` read a block of
either.

Scales of quantised operands come as (pointer, strides of expert, row and group of K), 0 where all share one, so that
one address says what is per tensor, expert, row, channel or block; `scale_arguments` makes them. They multiply the sums
once, after the last step; those of blocks (BLOCKED) multiply the products of each step, whose BLOCK_K columns lie under
one scale, and are fetched a step ahead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

UNALIGNED = [
    *("ids_ptr", "weights_ptr", "choices_ptr", "rows_ptr", "counts_ptr", "starts_ptr", "first_without_expert_ptr"),
    *("tile_experts_ptr", "tile_starts_ptr", "tile_sizes_ptr", "tile_count_ptr"),
]
"""Arguments of all kernels whose alignment differs from batch to batch; none may be compiled for one of them."""
TMA_ALIGNMENT = 16
"""Bytes that TMA wants of a base address and of every stride but the last."""


@triton.jit
def tile_of(index, num_tiles, BLOCKS: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile, block of columns) of an index: GROUP_M tiles walk the columns together, so that they share them in L2."""
    first = index // (GROUP_M * BLOCKS) * GROUP_M
    size = min(num_tiles - first, GROUP_M)
    in_group = index % (GROUP_M * BLOCKS)
    return first + in_group % size, in_group // size


@triton.jit
def rows_source(x, x_rows, ks, x_stride, TMA: tl.constexpr):
    """Where `load_rows` reads: the descriptor x, or pointers [BLOCK_M, BLOCK_K] to the rows' first elements."""
    if TMA:
        return x
    else:
        return x + x_rows[:, None].to(tl.int64) * x_stride + ks[None, :]


@triton.jit
def load_rows(source, first_row, k0, live, ks, K: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Block [BLOCK_M, BLOCK_K] of the rows of `rows_source` from column k0 on; zero where the column is padding.

    A row that is not live is zero, too; through TMA, which starts at `first_row`, it is whatever follows.
    """
    if TMA:
        return source.load([first_row, k0])
    elif K % BLOCK_K == 0:
        return tl.load(source + k0, mask=live[:, None], other=0.0)
    else:
        return tl.load(source + k0, mask=live[:, None] & (ks < K - k0)[None, :], other=0.0)


@triton.jit
def weight_source(w, expert, columns, ks, expert_stride, row_stride, TMA: tl.constexpr):
    """Where `load_weight` reads: the descriptor w, or pointers [BLOCK_N, BLOCK_K] to the columns' first elements."""
    if TMA:
        return w
    else:
        return w + expert.to(tl.int64) * expert_stride + columns[:, None].to(tl.int64) * row_stride + ks[None, :]


@triton.jit
def load_weight(
    source,  # of weight_source
    expert,
    column,
    columns,
    k0,
    ks,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Block [BLOCK_N, BLOCK_K] of an expert's weight [N, K], zero beyond it; `column` is the first of `columns`."""
    if TMA:
        return source.load([expert, column, k0]).reshape(BLOCK_N, BLOCK_K)
    elif N % BLOCK_N == 0 and K % BLOCK_K == 0:
        return tl.load(source + k0)
    else:
        return tl.load(source + k0, mask=(columns < N)[:, None] & (ks < K - k0)[None, :], other=0.0)


@triton.jit
def load_bias(bias_ptr, expert, columns, expert_stride, stride, N: tl.constexpr):
    """Bias of the columns, fp32 [1, BLOCK_N]."""
    bias = tl.load(bias_ptr + expert.to(tl.int64) * expert_stride + columns * stride, mask=columns < N, other=0.0)
    return bias.to(tl.float32)[None, :]


@triton.jit
def load_x_scale(x_scale, expert, x_rows, live, group):
    """Scale of rows, (pointer, strides of expert, row, group): fp32 [BLOCK_M, 1]; 1 without."""
    if x_scale is None:
        return tl.full((), 1.0, tl.float32)
    else:
        pointer = x_scale[0] + expert.to(tl.int64) * x_scale[1] + group * x_scale[3]
        return tl.load(pointer + x_rows.to(tl.int64) * x_scale[2], mask=live, other=0.0)[:, None]


@triton.jit
def load_w_scale(
    w_scale,  # (pointer, strides of expert, row of the weight, group)
    expert,
    column,
    columns,
    group,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    SCALE_N: tl.constexpr,
    ONE_SCALE: tl.constexpr,
):
    """Scale of columns, fp32 [1, BLOCK_N]; ONE_SCALE: one number, of all columns of the program.

    Column c is row FIRST + c * STEP of the weight, SCALE_N rows share a scale.
    """
    pointer = w_scale[0] + expert.to(tl.int64) * w_scale[1] + group * w_scale[3]
    if ONE_SCALE:
        return tl.load(pointer + (FIRST + column * STEP) // SCALE_N * w_scale[2])
    else:
        rows = (FIRST + columns * STEP) // SCALE_N
        return tl.load(pointer + rows * w_scale[2], mask=columns < N, other=0.0)[None, :]


@triton.jit
def load_row_weight(weights_ptr, choices_ptr, rows, live):
    """Routed weight of rows, fp32 [BLOCK_M, 1]; 1 without. choices_ptr: of a plan, None where rows are choices."""
    if weights_ptr is None:
        return tl.full((), 1.0, tl.float32)
    else:
        choices = rows if choices_ptr is None else tl.load(choices_ptr + rows, mask=live, other=0)
        return tl.load(weights_ptr + choices, mask=live, other=0.0).to(tl.float32)[:, None]


@triton.jit
def store_rows(
    out,  # pointer to [C, N], or the descriptor of `rows_operand`
    values,
    first_row,
    size,
    rows,
    live,
    column,
    columns,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OUT_TMA: tl.constexpr,
):
    """Store a block [BLOCK_M, BLOCK_N] of a tile's rows, rounded to the dtype of out; none beyond its `size` rows.

    A descriptor's third dimension ends at 2^30: coordinates that reach it after `size` rows let TMA drop the others,
    while the first two, whose strides add up to 2^34, bring the address back by 2^64 (triton.tools.ragged_tma).
    """
    if OUT_TMA:
        block = tl.reshape(values.to(out.dtype), 1, 1, values.shape[0], values.shape[1])
        out.store([1 << 30, first_row + size, (1 << 30) - size, column], block)
    else:
        mask = live[:, None] if N % BLOCK_N == 0 else live[:, None] & (columns < N)[None, :]
        pointers = out + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(pointers, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product(x, w):
    """x @ w.T of one step, fp32; 8-bit weights of wider x are converted first."""
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    return tl.dot(x, w.T, input_precision="ieee").to(tl.float32)


@triton.jit
def add_product(acc, x, w):
    """acc + x @ w.T; 8-bit weights of wider x are converted first.

    The tensor cores of compute capability 9.0 keep about 14 bits of a running sum of fp8 products, and Triton leaves
    them to it over all of K. Asked for at most BLOCK_K imprecise additions it adds each step's sum in fp32 instead:
    the error then does not grow with K.
    """
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if x.dtype == tl.float8e4nv:
        return tl.dot(x, w.T, acc, max_num_imprecise_acc=x.shape[1])
    else:
        return tl.dot(x, w.T, acc, input_precision="ieee", out_dtype=acc.dtype)


def takes_tma(*tensors: torch.Tensor) -> bool:
    """Whether all tensors can be read through TMA: a device that has it, half precision or less, aligned rows.

    fp32 products run on CUDA cores, whose operands gain nothing by it.
    """
    return all(t.data_ptr() % TMA_ALIGNMENT == 0 and _layout_takes_tma(t.device, t.dtype, t.stride()) for t in tensors)


@functools.cache
def _layout_takes_tma(device: torch.device, dtype: torch.dtype, strides: tuple[int, ...]) -> bool:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return dtype.itemsize <= 2 and all(stride * dtype.itemsize % TMA_ALIGNMENT == 0 for stride in strides[:-1])


def row_stride(x: torch.Tensor) -> int:
    """Elements from row to row; of a lone row, whose stride may be anything, as if more followed."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few programs in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def operand(tensor: torch.Tensor, block: Sequence[int], tma: bool) -> torch.Tensor | TensorDescriptor:
    """The kernel argument of a tensor read in blocks: a descriptor, or the tensor itself."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


def rows_operand(out: torch.Tensor, block: Sequence[int], tma: bool) -> torch.Tensor | TensorDescriptor:
    """The kernel argument of an output that `store_rows` writes; its descriptor ends at a tile's last row."""
    return create_ragged_descriptor(out, list(block)) if tma else out


def bias_operand(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """Kernel arguments of a bias [E, N]: pointer and strides."""
    return (None, 0, 0) if bias is None else (bias, bias.stride(0), bias.stride(1))


def scale_arguments(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    block_shape: Sequence[int] | None,
    block_k: int,
    block_n: int,
    ups: int = 0,
    interleaved: bool = False,
) -> dict:
    """The kernel arguments that say how operands are quantised, and BLOCK_K, which stays within a block.

    Args:
        x: [R, K]; w: [E, N, K].
        x_scale: fp32, of quantised x: one element, [E], [R, 1], or with block_shape [R, ceil(K / bk)].
        w_scale: fp32, of quantised w: [E], [E, 1], [E, N], [E, N, 1], or with block_shape = (bn, bk)
            [E, ceil(N / bn), ceil(K / bk)].
        block_k: columns of a step, a power of two.
        block_n, ups, interleaved: as `w_scale_arguments` takes them.
    """
    blocked = block_shape is not None
    of_w = w_scale_arguments(w_scale, block_shape, block_n, ups, interleaved)
    return {
        "x_scale": None if x_scale is None else _x_scale_argument(x_scale),
        "ACC": tl.int32 if x.dtype == torch.int8 and not blocked else tl.float32,
        "BLOCKED": blocked,
        "BLOCK_K": math.gcd(block_k, of_w["SCALE_K"]),
        **of_w,
    }


def w_scale_arguments(
    scale: torch.Tensor | None,
    block_shape: Sequence[int] | None,
    block_n: int,
    ups: int = 0,
    interleaved: bool = False,
) -> dict:
    """The kernel arguments that say how a weight is quantised; scale and block_shape as in `scale_arguments`.

    Args:
        block_n: columns of a program; ONE_SCALE: these always lie under one scale.
        ups: rows of w13 before its ups, unless interleaved; 0 without ups.
        interleaved: gates and ups take turns in w13.
    """
    bn, bk = block_shape or (1, 0)
    rows = 2 * block_n if interleaved else block_n
    return {
        "w_scale": None if scale is None else _w_scale_argument(scale),
        "SCALE_N": bn,
        "SCALE_K": bk,
        "ONE_SCALE": bn % rows == 0 and (interleaved or ups % block_n == 0),
    }


def _x_scale_argument(scale: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """(scale, strides of expert, row and group); [R, ...] is per row, else it is per expert or one for all."""
    if scale.ndim == 2:
        return (scale, 0, *scale.stride())
    return (scale, scale.stride(0) if scale.numel() > 1 else 0, 0, 0)


def _w_scale_argument(scale: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """(scale, strides of expert, row of the weight and group)."""
    strides = [stride if size > 1 else 0 for size, stride in zip(scale.shape, scale.stride(), strict=True)]
    return (scale, *strides, *[0] * (3 - len(strides)))
