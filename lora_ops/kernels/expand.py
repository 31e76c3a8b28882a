"""LoRA expand: y[m, offset_s : offset_s + N_s] (+)= B_s[slot[m]] @ h[s, m], for up to three slices s of a layer.

tile of rows with one slot -> sum of the planes of h -> one block of columns of one slice

Shapes: h fp32 [C, S, M, R] (C planes that are added up, see shrink.py), B_s [L, N_s, R], y [M, >= offset + sum N_s].
The sum is rounded to the dtype of B before the product, which accumulates in fp32; y is added before the one rounding.

Source: bgmv/sgmv of Punica (Chen et al. 2023, arXiv:2310.18547); programmatic dependent launch: CUDA programming guide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_configs.lora import ExpandConfig

from .launch import Tiles, num_programs, slice_pointers
from .tiles import count_tiles, load_tile, select_slice


@triton.jit
def load_b(b_ptr, columns, ranks, width, RANK: tl.constexpr, EVEN_R: tl.constexpr, EVEN_N: tl.constexpr):
    """B^T block [BLOCK_R, BLOCK_N]; zero where the rank or the column is padding."""
    if EVEN_R and EVEN_N:
        return tl.load(b_ptr)
    return tl.load(b_ptr, mask=(ranks < RANK)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_segment", "num_rows"])
def expand_kernel(
    h_ptr,  # [C, S, M, R]
    b0_ptr,  # [L, N0, R]
    b1_ptr,  # [L, N1, R]
    b2_ptr,  # [L, N2, R]
    y_ptr,  # [M, *], rows y_stride apart
    slots_ptr,
    rows_ptr,
    lengths_ptr,
    num_tiles,
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
    ADD_INPUTS: tl.constexpr,
    ZERO_OTHERS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: any number of programs; they share the live tiles' column blocks evenly, in runs of neighbours.

    An item is y[rows of a tile, a block of columns of one slice]; a program owns its run of items.
    """
    BLOCKS0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    BLOCKS2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = BLOCKS0 + BLOCKS1 + BLOCKS2
    EVEN_N: tl.constexpr = (N0 % BLOCK_N == 0) and (N1 % BLOCK_N == 0) and (N2 % BLOCK_N == 0)
    EVEN_R: tl.constexpr = RANK % BLOCK_R == 0
    ranks = tl.arange(0, BLOCK_R)
    items = count_tiles(lengths_ptr, num_tiles, ZERO_OTHERS, TILES) * BLOCKS
    run = tl.cdiv(items, tl.num_programs(0))
    first = tl.program_id(0) * run

    for item in tl.range(first, tl.minimum(first + run, items), num_stages=1):
        tile = item // BLOCKS
        block = item % BLOCKS
        slot, rows, live = load_tile(
            tile, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, BLOCK_M
        )
        lora_slice = 0
        first_block = 0
        width = N0
        slot_stride = B0_SLOT_STRIDE
        first_column = OFFSET
        if SLICES > 1:
            in_1 = block >= BLOCKS0
            lora_slice = tl.where(in_1, 1, lora_slice)
            first_block = tl.where(in_1, BLOCKS0, first_block)
            width = tl.where(in_1, N1, width)
            slot_stride = tl.where(in_1, B1_SLOT_STRIDE, slot_stride)
            first_column = tl.where(in_1, OFFSET + N0, first_column)
        if SLICES > 2:
            in_2 = block >= BLOCKS0 + BLOCKS1
            lora_slice = tl.where(in_2, 2, lora_slice)
            first_block = tl.where(in_2, BLOCKS0 + BLOCKS1, first_block)
            width = tl.where(in_2, N2, width)
            slot_stride = tl.where(in_2, B2_SLOT_STRIDE, slot_stride)
            first_column = tl.where(in_2, OFFSET + N0 + N1, first_column)
        columns = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
        y = y_ptr + rows[:, None].to(tl.int64) * y_stride + (first_column + columns)[None, :]  # [BLOCK_M, BLOCK_N]
        if EVEN_N:
            y_mask = live[:, None]
        else:
            y_mask = live[:, None] & (columns < width)[None, :]

        if slot >= 0:
            b_ptr = select_slice(lora_slice, b0_ptr, b1_ptr, b2_ptr, SLICES) + slot.to(tl.int64) * slot_stride
            b_ptr += columns[None, :] * B_ROW_STRIDE + ranks[:, None]  # [BLOCK_R, BLOCK_N]
            b = load_b(b_ptr, columns, ranks, width, RANK, EVEN_R, EVEN_N)
            if ADD_INPUTS:
                inputs = tl.load(y, mask=y_mask, other=0.0)
            if PDL:  # B and y were complete when the shrink started; only h is still to come
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for r0 in tl.static_range(0, RANK, BLOCK_R):
                if r0 > 0:
                    b = load_b(b_ptr + r0, columns, ranks + r0, width, RANK, EVEN_R, EVEN_N)
                h_mask = live[:, None] & ((ranks + r0) < RANK)[None, :]
                h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for c in tl.static_range(PLANES):
                    plane = (c * SLICES + lora_slice).to(tl.int64) * num_rows
                    h_row = h_ptr + (plane + rows)[:, None] * RANK
                    h += tl.load(h_row + (ranks + r0)[None, :], mask=h_mask, other=0.0).to(tl.float32)
                acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
            if ADD_INPUTS:
                acc += inputs.to(tl.float32)
            tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
        elif ZERO_OTHERS:
            if slot == -1:
                tl.store(y, tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty), mask=y_mask)
    if PDL:  # also where there was nothing to do: the next kernel relies on all before this one
        tl.extra.cuda.gdc_wait()


def expand(
    h: torch.Tensor,
    lora_b: list[torch.Tensor],
    y: torch.Tensor,
    tiles: Tiles,
    offset: int,
    add_inputs: bool,
    config: ExpandConfig,
    *,
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
        zero_others: zero the rows of slot -1; by default when writing.
        pdl: start before the shrink, which writes h, has finished, and wait for it inside.
    """
    if zero_others is None:
        zero_others = not add_inputs
    planes, slices, num_rows, rank = h.shape
    widths = [b.shape[1] for b in lora_b] + [0] * (3 - slices)
    slot_strides = [b.stride(0) for b in lora_b] + [0] * (3 - slices)
    blocks = sum(triton.cdiv(width, config.block_n) for width in widths)
    programs = num_programs(tiles.count * blocks, config.programs_per_sm, y.device)
    expand_kernel[(programs,)](
        h,
        *slice_pointers(lora_b),
        y,
        *tiles.pointers,
        tiles.count,
        tiles.per_segment,
        num_rows,
        y.stride(0),
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
        ADD_INPUTS=add_inputs,
        ZERO_OTHERS=zero_others,
        TILES=tiles.mode,
        BLOCK_M=tiles.rows,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )
