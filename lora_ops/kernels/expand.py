"""LoRA expand: y[m, offset_s : offset_s + N_s] (+)= B_s[slot[m]] @ h[s, m], for up to three slices s of a layer.

tile of rows with one slot -> sum of the planes of h -> one block of columns of one slice

Shapes: h [C, S, M, R] (C planes that are added up, fp32, see shrink.py, or their sum), B_s [L, N_s, R],
y [M, >= offset + sum N_s].
The sum is rounded to the dtype of B before the product, which accumulates in fp32; y is added before the one rounding.

Source: bgmv/sgmv of Punica (Chen et al. 2023, arXiv:2310.18547); programmatic dependent launch: CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ops_configs.lora import ExpandConfig
from ops_patches.launch import cdiv, prepared

from .shrink import sum_h
from .tiles import (
    FEW_ROWS,
    PLAN_TILES,
    Tiles,
    fetched_block,
    fetched_singly,
    leave,
    load_tile,
    select_slice,
    slice_pointers,
)


@triton.jit
def over_rows(values, FLIPPED: tl.constexpr):
    """Values along the first dimension of a block, rows or ranks; with FLIPPED along its second."""
    if FLIPPED:
        values = values[None, :]
    else:
        values = values[:, None]
    return values


@triton.jit
def over_columns(values, FLIPPED: tl.constexpr):
    """Values along the second dimension of a block, columns; with FLIPPED along its first."""
    if FLIPPED:
        values = values[:, None]
    else:
        values = values[None, :]
    return values


@triton.jit
def load_b(
    b_ptr, columns, ranks, width, RANK: tl.constexpr, EVEN_R: tl.constexpr, EVEN_N: tl.constexpr, FLIPPED: tl.constexpr
):
    """Block [BLOCK_R, BLOCK_N] of B^T, with FLIPPED of B; zero where the rank or the column is padding."""
    if EVEN_R and EVEN_N:
        return tl.load(b_ptr)
    mask = over_columns(columns < width, FLIPPED)
    if not EVEN_R:
        mask = mask & over_rows(ranks < RANK, FLIPPED)
    return tl.load(b_ptr, mask=mask, other=0.0)


@triton.jit
def product(h, b, acc, FLIPPED: tl.constexpr):
    """acc + h @ B^T, all but h transposed with FLIPPED."""
    if FLIPPED:
        acc = tl.dot(b, tl.trans(h), acc, input_precision="ieee")
    else:
        acc = tl.dot(h, b, acc, input_precision="ieee")
    return acc


@triton.jit
def expand_rows(
    slot,
    rows,  # [BLOCK_M], with PACKED each so many times in succession
    live,  # [BLOCK_M]
    column,  # of the slice, where the run begins
    lora_slice,
    width,  # of the slice
    first_column,  # of the slice in y
    h_ptr,
    b_ptr,  # of the slice
    y_ptr,
    slot_stride,  # of b
    num_rows,
    y_stride,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    B_ROW_STRIDE: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    ADD_INPUTS: tl.constexpr,
    ZERO_OTHERS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
    PACKED: tl.constexpr = 1,
):
    """y[rows, a run of STEPS blocks of columns of one slice].

    Fewer rows than the 16 that a product takes are its second dimension: y's blocks and B's are transposed, FLIPPED.
    With PACKED, BLOCK_R ranks are those of so many columns, one after another in memory, and a row of h comes once for
    each of them.
    The compiler fetches B of the steps ahead. y, the first summand of a product, it does not: each step fetches that of
    the next one.
    """
    EVEN_R: tl.constexpr = PACKED * RANK % BLOCK_R == 0
    BLOCK_M: tl.constexpr = rows.shape[0]
    FLIPPED: tl.constexpr = BLOCK_M < 16
    ranks = tl.arange(0, BLOCK_R)
    columns = column + tl.arange(0, BLOCK_N // PACKED) * PACKED
    live_rows = over_rows(live, FLIPPED)
    rows_of_y = rows.to(tl.int64) * y_stride
    if PACKED > 1:
        rows_of_y += tl.arange(0, BLOCK_M) % PACKED
    # [BLOCK_M, BLOCK_N], or its transpose
    y = y_ptr + over_rows(rows_of_y, FLIPPED) + over_columns(first_column + columns, FLIPPED)
    if slot < 0:
        leave(PDL)
        if ZERO_OTHERS:
            if slot == -1:
                zeros = tl.zeros(y.shape, y_ptr.dtype.element_ty)
                for step in range(STEPS):
                    y_mask = live_rows & over_columns(columns + step * BLOCK_N < width, FLIPPED)
                    tl.store(y + step * BLOCK_N, zeros, mask=y_mask)
    else:
        b_block = b_ptr + slot.to(tl.int64) * slot_stride
        # [BLOCK_R, BLOCK_N], or its transpose
        b_block += over_columns(columns * B_ROW_STRIDE, FLIPPED) + over_rows(ranks, FLIPPED)
        # B and y were complete when the shrink started: they are on their way while it still runs
        y_mask = live_rows if EVEN_N else live_rows & over_columns(columns < width, FLIPPED)
        if STEPS == 1:
            b = load_b(b_block, columns, ranks, width, RANK, EVEN_R, EVEN_N, FLIPPED)
        if ADD_INPUTS:
            y_next = tl.load(y, mask=y_mask, other=0.0)  # of the step that comes next
            if STEPS == 1:  # before the wait: after it, programs of one warp would take more registers
                y_next = y_next.to(tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        h = sum_h(h_ptr, rows, live, ranks, lora_slice, num_rows, RANK, SLICES, PLANES, GROUP, PACKED)
        h = h.to(b_ptr.dtype.element_ty)
        # fetching more than two products ahead would take more shared memory than some GPUs have
        for step in tl.range(STEPS, num_stages=1 if RANK > 2 * BLOCK_R else None):
            if STEPS > 1:
                b = load_b(b_block, columns, ranks, width, RANK, EVEN_R, EVEN_N, FLIPPED)
                y_mask = live_rows if EVEN_N else live_rows & over_columns(columns < width, FLIPPED)
            acc = tl.zeros(y.shape, tl.float32)
            if ADD_INPUTS:
                acc = y_next.to(tl.float32)
                if STEPS > 1:
                    next_mask = live_rows & (step + 1 < STEPS)
                    if not EVEN_N:
                        next_mask = next_mask & over_columns(columns + BLOCK_N < width, FLIPPED)
                    y_next = tl.load(y + BLOCK_N, mask=next_mask, other=0.0)
            acc = product(h, b, acc, FLIPPED)
            for r0 in tl.static_range(BLOCK_R, RANK, BLOCK_R):
                more = sum_h(h_ptr, rows, live, ranks + r0, lora_slice, num_rows, RANK, SLICES, PLANES, GROUP)
                b = load_b(b_block + r0, columns, ranks + r0, width, RANK, EVEN_R, EVEN_N, FLIPPED)
                acc = product(more.to(b.dtype), b, acc, FLIPPED)
            tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
            b_block += BLOCK_N * B_ROW_STRIDE
            y += BLOCK_N
            columns += BLOCK_N


@triton.jit(do_not_specialize=["tiles_per_segment", "num_rows"])
def expand_kernel(
    h_ptr,  # [C, S, M, R]
    b0_ptr,  # [L, N0, R]
    b1_ptr,  # [L, N1, R]
    b2_ptr,  # [L, N2, R]
    y_ptr,  # [M, *], rows y_stride apart
    slots_ptr,
    rows_ptr,
    lengths_ptr,
    wide_ptr,  # int32 [1], used when WIDE, as are the next two
    wide_slots_ptr,
    wide_rows_ptr,
    tiles_per_segment,
    num_rows,
    y_stride,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    B_ROW_STRIDE: tl.constexpr,
    B0_SLOT_STRIDE: tl.constexpr,
    B1_SLOT_STRIDE: tl.constexpr,
    B2_SLOT_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    ADD_INPUTS: tl.constexpr,
    ZERO_OTHERS: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * sum over slices of ceil(N_s / (STEPS * BLOCK_N)),), column runs fastest.

    A program owns y[rows of its tile, its run of STEPS blocks of columns of one slice]. With WIDE, tiles are the wide
    ones in a step that has them. Of a tile of 16 rows that holds FEW_ROWS at most, only those are computed; if it holds
    FEW_ROWS / PACKED at most, PACKED columns at a time.
    """
    RUN: tl.constexpr = STEPS * BLOCK_N
    WIDE_N: tl.constexpr = min(BLOCK_N // 2, 64)  # of a step of a wide tile, or its sums would take more registers
    RUNS0: tl.constexpr = (N0 + RUN - 1) // RUN
    RUNS1: tl.constexpr = (N1 + RUN - 1) // RUN
    RUNS2: tl.constexpr = (N2 + RUN - 1) // RUN
    RUNS: tl.constexpr = RUNS0 + RUNS1 + RUNS2
    EVEN_N: tl.constexpr = (N0 % RUN == 0) and (N1 % RUN == 0) and (N2 % RUN == 0)
    pid = tl.program_id(0)
    tile = pid // RUNS
    run = pid % RUNS

    lora_slice = 0
    first_run = 0
    width = N0
    slot_stride = B0_SLOT_STRIDE
    first_column = OFFSET
    if SLICES > 1:
        in_1 = run >= RUNS0
        lora_slice = tl.where(in_1, 1, lora_slice)
        first_run = tl.where(in_1, RUNS0, first_run)
        width = tl.where(in_1, N1, width)
        slot_stride = tl.where(in_1, B1_SLOT_STRIDE, slot_stride)
        first_column = tl.where(in_1, OFFSET + N0, first_column)
    if SLICES > 2:
        in_2 = run >= RUNS0 + RUNS1
        lora_slice = tl.where(in_2, 2, lora_slice)
        first_run = tl.where(in_2, RUNS0 + RUNS1, first_run)
        width = tl.where(in_2, N2, width)
        slot_stride = tl.where(in_2, B2_SLOT_STRIDE, slot_stride)
        first_column = tl.where(in_2, OFFSET + N0 + N1, first_column)
    column = (run - first_run) * RUN
    b_ptr = select_slice(lora_slice, b0_ptr, b1_ptr, b2_ptr, SLICES)
    operands = (lora_slice, width, first_column, h_ptr, b_ptr, y_ptr, slot_stride, num_rows, y_stride)
    if WIDE > 0:
        wide_tiles = tl.load(wide_ptr)
        if wide_tiles > 0:
            if tile < wide_tiles:
                slot, more_rows, all_live = load_tile(
                    tile, wide_slots_ptr, wide_rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, WIDE
                )
                expand_rows(
                    slot,
                    more_rows,
                    all_live,
                    column,
                    *operands,
                    RANK,
                    SLICES,
                    B_ROW_STRIDE,
                    PLANES,
                    GROUP,
                    ADD_INPUTS,
                    ZERO_OTHERS,
                    EVEN_N,
                    WIDE_N,
                    BLOCK_R,
                    RUN // WIDE_N,
                    PDL,
                )
            else:
                leave(PDL)
            return
    slot, rows, live = load_tile(tile, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, BLOCK_M)
    FEW: tl.constexpr = TILES == PLAN_TILES and BLOCK_M == 2 * FEW_ROWS
    if FEW and PACKED > 1:
        FEWER_ROWS: tl.constexpr = FEW_ROWS // PACKED
        if tl.load(rows_ptr + tile * BLOCK_M + FEWER_ROWS) < 0:  # the first part holds all rows
            PARTS: tl.constexpr = BLOCK_M // FEWER_ROWS
            slot, few_rows, few_live = load_tile(
                PARTS * tile,
                slots_ptr,
                rows_ptr,
                lengths_ptr,
                tiles_per_segment,
                num_rows,
                TILES,
                FEWER_ROWS,
                PARTS,
                PACKED,
            )
            expand_rows(
                slot,
                few_rows,
                few_live,
                column,
                *operands,
                RANK,
                SLICES,
                B_ROW_STRIDE,
                PLANES,
                GROUP,
                ADD_INPUTS,
                ZERO_OTHERS,
                EVEN_N,
                BLOCK_N,
                BLOCK_R,
                STEPS,
                PDL,
                PACKED,
            )
            return
    if FEW:
        if tl.load(rows_ptr + tile * BLOCK_M + FEW_ROWS) < 0:  # the first half does
            slot, few_rows, few_live = load_tile(
                2 * tile, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, FEW_ROWS, 2
            )
            expand_rows(
                slot,
                few_rows,
                few_live,
                column,
                *operands,
                RANK,
                SLICES,
                B_ROW_STRIDE,
                PLANES,
                GROUP,
                ADD_INPUTS,
                ZERO_OTHERS,
                EVEN_N,
                BLOCK_N,
                BLOCK_R,
                STEPS,
                PDL,
            )
            return
    expand_rows(
        slot,
        rows,
        live,
        column,
        *operands,
        RANK,
        SLICES,
        B_ROW_STRIDE,
        PLANES,
        GROUP,
        ADD_INPUTS,
        ZERO_OTHERS,
        EVEN_N,
        BLOCK_N,
        BLOCK_R,
        STEPS,
        PDL,
    )


def fetched_config(
    y: torch.Tensor, lora_b: list[torch.Tensor], offset: int, rows: int, config: ExpandConfig
) -> ExpandConfig:
    """With smaller blocks where `fetched_singly`."""
    constants = [offset, lora_b[0].shape[2], lora_b[0].stride(1)]
    for b in lora_b:
        constants += b.shape[1], b.stride(0)
    if not fetched_singly([y, *lora_b], constants, [y.stride(0)]):
        return config
    block_r = min(config.block_r, 32)
    block_n = fetched_block(config.block_n, rows + block_r, config.num_warps)
    return replace(config, block_n=block_n, block_r=block_r, steps=1)


def packed_columns(lora_b: list[torch.Tensor], config: ExpandConfig) -> int:
    """Columns whose ranks lie side by side in memory and make up a product's block_r ranks together, or 1.

    Ranks below 16 then leave no part of a product, nor of what a warp fetches of B, empty. A weight that is not finite
    makes the columns beside its own NaN, too, in the rows that are multiplied so.
    """
    rank = lora_b[0].shape[2]
    columns = config.block_r // rank
    whole = columns * rank == config.block_r and all(b.shape[1] % columns == 0 for b in lora_b)
    fits = rank < 16 and columns <= FEW_ROWS.value and config.block_n >= 16 * columns
    return columns if whole and fits and lora_b[0].stride(1) == rank else 1


def expand(
    h: torch.Tensor,
    lora_b: list[torch.Tensor],
    y: torch.Tensor,
    tiles: Tiles,
    offset: int,
    add_inputs: bool,
    config: ExpandConfig,
    *,
    group: int = 1,
    zero_others: bool | None = None,
    pdl: bool = False,
) -> None:
    """Launch the expand of up to three slices.

    Args:
        h: [C, S, M, R] contiguous, any floating dtype; C > 1 planes are added up in fp32.
        lora_b: S tensors [L, N_s, R] with equal row strides, last dimension contiguous.
        y: [M, *], last dimension contiguous; slices are written side by side from column `offset`.
        tiles: which rows belong to which slot.
        add_inputs: add to y; else write.
        group: planes that make a group, whose sums are added up: `launches.planes_of_group`.
        zero_others: zero the rows of slot -1; by default when writing.
        pdl: start before the shrink, which writes h, has finished, and wait for it inside.
    """
    if zero_others is None:
        zero_others = not add_inputs
    planes, slices, num_rows, rank = h.shape
    config = fetched_config(y, lora_b, offset, tiles.rows, config)
    widths = [b.shape[1] for b in lora_b] + [0] * (3 - slices)
    slot_strides = [b.stride(0) for b in lora_b] + [0] * (3 - slices)
    runs = sum([cdiv(width, config.steps * config.block_n) for width in widths])
    warps = 2 * config.num_warps if rank > 64 else config.num_warps  # their own tiles take as many registers
    launch = prepared(
        expand_kernel,
        RANK=rank,
        SLICES=slices,
        N0=widths[0],
        N1=widths[1],
        N2=widths[2],
        B_ROW_STRIDE=lora_b[0].stride(1),
        B0_SLOT_STRIDE=slot_strides[0],
        B1_SLOT_STRIDE=slot_strides[1],
        B2_SLOT_STRIDE=slot_strides[2],
        OFFSET=offset,
        PLANES=planes,
        GROUP=group,
        ADD_INPUTS=add_inputs,
        ZERO_OTHERS=zero_others,
        TILES=tiles.mode,
        WIDE=tiles.held_wide(rank, lora_b[0].dtype, warps) if planes == 1 and config.block_n >= 32 else 0,
        BLOCK_M=tiles.rows,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        STEPS=config.steps,
        PACKED=packed_columns(lora_b, config),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )
    launch(
        (tiles.count * runs,),
        h,
        *slice_pointers(lora_b),
        y,
        *tiles.all_pointers(),
        tiles.per_segment,
        num_rows,
        y.stride(0),
    )
