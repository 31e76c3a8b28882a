"""Quantise rows: q = x / scale in fp8 or int8, with the scales and the values of `reference.quantize`.

of each row or group of a row: row -> largest magnitude of each group -> scale, q              (one launch)
of the whole tensor: rows -> largest magnitude of each program's -> scale, q                   (two)
static: row -> q                                                                               (one)

Shapes: x [R, K], q [R, K], scale fp32. With a plan the rows are its rows: those without expert were never written, so
they are not read, and no scale depends on them. Arrays of the plan as in routing.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_patches.launch import cdiv, power_of_two, prepared

from ..reference import LIMITS, QUANTS, SMALLEST_ABSMAX
from ..routing import RoutingPlan
from .tiles import UNALIGNED, row_stride

BLOCK = 2048
"""Elements that a program works on, if no group is larger."""
PARTS = 256
"""Programs that look for the largest magnitude of a tensor."""
FLOOR = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit
def magnitude(x):
    """|x| in fp32; NaN counts as infinite, so that a scale says that its values are none."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scale_of(absmax, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Scale that takes the largest magnitude to LIMIT; POWER_OF_TWO: rounded up to one, as the reference does."""
    scale = tl.div_rn(tl.maximum(absmax, FLOOR), tl.full((), LIMIT, tl.float32))
    if POWER_OF_TWO:  # the fraction carries into the exponent; infinite stays so, and `magnitude` knows no NaN
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def rounded(x, scale, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """fp32 x / scale to nearest even of the values of DTYPE, saturated, as fp32; NaN stays NaN in fp8.

    Adding and taking away 1.5 * 2^23 steps rounds to a multiple of a step: 1 for int8, for e4m3 an eighth of the power
    of two below, at least 2^-9.
    """
    one = tl.full((), 1.0, tl.float32)
    if DTYPE.is_int8():
        x = tl.minimum(tl.maximum(x * tl.div_rn(one, scale), -LIMIT - 1), LIMIT)
        step = one
    else:
        x = tl.maximum(x * tl.div_rn(one, scale), -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) * 0.125
    shift = step * 12582912.0
    return (x + shift) - shift


@triton.jit
def quantized(x, scale, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """`rounded` as DTYPE: the conversion is exact on every backend."""
    return rounded(x, scale, LIMIT, DTYPE).to(DTYPE)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def quantize_groups_kernel(
    x_ptr,  # [R, K], rows x_stride apart
    q_ptr,  # [R, K]
    scale_ptr,  # fp32 [R, ceil(K / GROUP)], any strides
    first_without_expert_ptr,  # int32 [1], or None: all rows have one
    x_stride,
    scale_row_stride,
    scale_group_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Grid: (rows, ceil(K / (GROUPS * GROUP))). A program owns GROUPS groups of a row; BLOCK is GROUP, padded."""
    row = tl.program_id(0)
    if first_without_expert_ptr is not None:
        if row >= tl.load(first_without_expert_ptr):
            return
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    offsets = tl.arange(0, BLOCK)
    columns = groups[:, None] * GROUP + offsets[None, :]
    mask = columns < K
    if BLOCK != GROUP:
        mask &= (offsets < GROUP)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(x), 1), LIMIT, POWER_OF_TWO)
    scale_pointers = scale_ptr + row.to(tl.int64) * scale_row_stride + groups * scale_group_stride
    tl.store(scale_pointers, scale, mask=groups * GROUP < K)
    q = quantized(x, scale[:, None], LIMIT, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row.to(tl.int64) * K + columns, q, mask=mask)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=UNALIGNED)
def absmax_kernel(
    x_ptr,  # [R, K], rows x_stride apart
    parts_ptr,  # fp32 [programs]
    first_without_expert_ptr,  # int32 [1], or None: all rows have one
    num_rows,
    x_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (programs,). A program owns the largest magnitude of every programs-th row."""
    if first_without_expert_ptr is not None:
        num_rows = tl.load(first_without_expert_ptr)
    largest = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        for k0 in range(0, K, BLOCK):
            columns = k0 + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0)
            largest = tl.maximum(largest, magnitude(x))
    tl.store(parts_ptr + tl.program_id(0), tl.max(largest, 0))


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=UNALIGNED)
def quantize_tensor_kernel(
    x_ptr,  # [R, K], rows x_stride apart; GATHER: [M, K], a row for each token
    q_ptr,  # [R, K]
    scale_ptr,  # fp32 [1] or [E]; written when there are parts
    parts_ptr,  # fp32 [num_parts], or None: scale is static
    choices_ptr,  # int32 [R]; used when GATHER
    starts_ptr,  # int32 [EXPERTS + 1], or None: all rows have an expert
    num_parts,
    x_stride,
    scale_stride,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Grid: (rows, ceil(K / BLOCK)). A program owns BLOCK columns of a row; the first also owns a dynamic scale.

    scale_stride 0: all rows share the scale; else each expert has one.
    """
    row = tl.program_id(0)
    if starts_ptr is not None:
        if row >= tl.load(starts_ptr + EXPERTS):
            return
    if parts_ptr is not None:
        parts = tl.arange(0, PARTS)
        scale = scale_of(tl.max(tl.load(parts_ptr + parts, mask=parts < num_parts, other=0.0), 0), LIMIT, False)
        if row + tl.program_id(1) == 0:
            tl.store(scale_ptr, scale)
    elif starts_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        experts = tl.arange(0, PADDED_EXPERTS)
        ends = tl.load(starts_ptr + 1 + experts, mask=experts < EXPERTS, other=0x7FFFFFFF)
        scale = tl.load(scale_ptr + tl.sum((ends <= row).to(tl.int32), 0) * scale_stride)
    x_row = row
    if GATHER:
        x_row = tl.load(choices_ptr + row) // TOP_K
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + x_row.to(tl.int64) * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
    q = quantized(x, scale, LIMIT, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row.to(tl.int64) * K + columns, q, mask=columns < K)


def group_scales(rows: int, groups: int, by_column: bool, device: torch.device) -> torch.Tensor:
    """Empty fp32 [rows, groups]; by_column for readers whose rows are neighbours, as those of a plan are.

    Columns are then a multiple of 16 apart: kernels are compiled for such a stride once, not for some batches.
    """
    shape = (groups, cdiv(rows, 16) * 16) if by_column else (rows, groups)
    scale = torch.empty(shape, dtype=torch.float32, device=device)
    return scale.T[:rows] if by_column else scale


def quantize(
    x: torch.Tensor,
    quant: str,
    scale: torch.Tensor | None = None,
    per_token: bool = False,
    group: int | None = None,
    power_of_two_scales: bool = False,
    plan: RoutingPlan | None = None,
    gather: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `reference.quantize` of x, or of the rows of a plan.

    Args:
        x: [R, K], last dimension contiguous, at least one row; with a plan [C, K] in row order.
        quant, scale, per_token, group, power_of_two_scales: as the reference has them; a static scale has one element,
            or with a plan [E].
        plan: rows without expert stay as they are in q and in the scales of rows and groups.
        gather: x is [M, K], a row for each token, q has the rows of the plan; with a static scale.

    Returns:
        q [R, K], [C, K] with a plan, and the scale.
    """
    columns = x.shape[1]
    dtype, starts = QUANTS[quant], None if plan is None else plan.starts
    without_expert = None if plan is None else starts[-1:]
    rows = x.shape[0] if plan is None else plan.choices.shape[0]
    q = torch.empty(rows, columns, dtype=dtype, device=x.device)
    constants = {"K": columns, "LIMIT": LIMITS[dtype]}
    if scale is None and (per_token or group is not None):
        group = min(group or columns, columns)
        block = power_of_two(group)
        groups = cdiv(columns, group)
        together = min(max(BLOCK // block, 1), power_of_two(groups))
        scale = group_scales(rows, groups, plan is not None, x.device)
        launch = prepared(
            quantize_groups_kernel,
            GROUP=group,
            GROUPS=together,
            BLOCK=block,
            **constants,
            POWER_OF_TWO=power_of_two_scales,
            num_warps=_warps(block * together),
        )
        launch((rows, cdiv(groups, together)), x, q, scale, without_expert, row_stride(x), *scale.stride())
        return q, scale
    block = min(power_of_two(columns), BLOCK)
    parts, num_parts = None, 0
    if scale is None:
        scale = torch.empty(1, dtype=torch.float32, device=x.device)
        num_parts = min(rows, PARTS)
        parts = torch.empty(num_parts, dtype=torch.float32, device=x.device)
        launch = prepared(absmax_kernel, K=columns, BLOCK=block, num_warps=_warps(block))
        launch((num_parts,), x, parts, without_expert, rows, row_stride(x))
    experts = 0 if plan is None else plan.counts.shape[0]
    launch = prepared(
        quantize_tensor_kernel,
        TOP_K=1 if plan is None else plan.top_k,
        GATHER=gather,
        EXPERTS=experts,
        PADDED_EXPERTS=power_of_two(max(experts, 1)),
        PARTS=PARTS,
        BLOCK=block,
        **constants,
        num_warps=_warps(block),
    )
    launch(
        (rows, cdiv(columns, block)),
        x,
        q,
        scale,
        parts,
        None if plan is None else plan.choices,
        starts,
        num_parts,
        row_stride(x),
        scale.stride(0) if scale.numel() > 1 else 0,
    )
    return q, scale


def _warps(elements: int) -> int:
    """Eight elements, 16 bytes of half precision, for each thread, in one to sixteen warps."""
    return min(max(elements // 256, 1), 16)
