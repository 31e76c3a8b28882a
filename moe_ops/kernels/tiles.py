"""What the grouped GEMM kernels share: which tile a program computes, and how it reads its operands.

A weight is read through a TMA descriptor where its layout allows one, else through pointers: `operand` makes the kernel
argument of either kind, `load_weight` reads a block of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

TMA_ALIGNMENT = 16
"""Bytes that TMA wants of a base address and of every stride but the last."""


@triton.jit
def program_tile(num_tiles, BLOCKS: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile, block of columns) of a program: GROUP_M tiles walk the columns together, so that they share them in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP_M * BLOCKS) * GROUP_M
    size = min(num_tiles - first, GROUP_M)
    in_group = pid % (GROUP_M * BLOCKS)
    return first + in_group % size, in_group // size


@triton.jit
def load_rows(pointers, k0, live, ks, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Block [BLOCK_M, BLOCK_K] of rows from column k0 on; zero where the row or the column is padding."""
    if K % BLOCK_K == 0:
        return tl.load(pointers + k0, mask=live[:, None], other=0.0)
    else:
        return tl.load(pointers + k0, mask=live[:, None] & (ks < K - k0)[None, :], other=0.0)


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


def takes_tma(*tensors: torch.Tensor) -> bool:
    """Whether all tensors can be read through TMA: a device that has it, half precision, aligned rows.

    fp32 products run on CUDA cores, whose operands gain nothing by it.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(
        t.dtype.itemsize == 2
        and t.data_ptr() % TMA_ALIGNMENT == 0
        and all(stride * t.dtype.itemsize % TMA_ALIGNMENT == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def operand(tensor: torch.Tensor, block: Sequence[int], tma: bool) -> torch.Tensor | TensorDescriptor:
    """The kernel argument of a tensor read in blocks: a descriptor, or the tensor itself."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if tma else tensor


def bias_operand(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """Kernel arguments of a bias [E, N]: pointer and strides."""
    return (None, 0, 0) if bias is None else (bias, bias.stride(0), bias.stride(1))
