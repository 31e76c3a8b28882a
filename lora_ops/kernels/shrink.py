"""LoRA shrink: out[s, m] = scale * A_s[slot[m]] @ x[m], for up to three slices s of a layer.

tile of rows with one slot -> chunks of K -> fp32 partial sums

Shapes: x [M, K], A_s [L, R, K], out fp32 [C, S, M, R]. With C = 1 the sum over K is complete. With C > 1 each of the C
chunks of K, or groups of chunks, is a plane of its own, computed by its own program, and the reader adds the planes up
(split-K without atomics and without a zero fill). All ways multiply each chunk's sum by the scale, add the chunks of a
group in order, then the groups in order, and a row never meets another row's values, so a row's bits depend neither on
the batch nor on the tile size.

Source: bgmv/sgmv of Punica (Chen et al. 2023, arXiv:2310.18547); S-LoRA (Sheng et al. 2023, arXiv:2311.03285).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ops_configs.lora import TILE_ROWS, ShrinkConfig
from ops_patches.launch import cdiv, power_of_two, prepared

from ..config import chunk_k, group_chunks
from .tiles import WIDE_PROGRAMS, Tiles, fetched_block, fetched_singly, load_tile, select_slice, slice_pointers

SUM_RANKS = 16
"""Ranks of a program of sum_planes, of as many rows: a batch of few tiles makes enough programs."""


@triton.jit
def rows_dot(
    x_ptr,  # first step of K of each row  [BLOCK_M, BLOCK_K]
    a_ptr,  # first step of K of each column  [BLOCK_K, BLOCK_N]
    live,  # [BLOCK_M]
    in_columns,  # [BLOCK_N]
    first_k,
    scale,
    K: tl.constexpr,
    PLANE_K: tl.constexpr,  # elements of K that are summed
    EVEN_N: tl.constexpr,
    CHUNK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """scale * x @ A^T over one plane, fp32 [BLOCK_M, BLOCK_N]: a chunk of K, or several, whose sums are added up.

    One loop over all chunks: the first loads of a chunk are under way while the one before is multiplied.
    """
    tl.static_assert(CHUNK_K % BLOCK_K == 0, "a step lies in one chunk")
    end_k = tl.minimum(first_k + PLANE_K, K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # of a chunk
    group = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    for k0 in tl.range(first_k, end_k, BLOCK_K, num_stages=STAGES):
        x_mask = live[:, None]
        if K % BLOCK_K == 0:
            if EVEN_N:
                a = tl.load(a_ptr + k0)  # [BLOCK_K, BLOCK_N]
            else:
                a = tl.load(a_ptr + k0, mask=in_columns[None, :], other=0.0)
        else:
            in_k = k0 + k < K
            x_mask = x_mask & in_k[None, :]
            a = tl.load(a_ptr + k0, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        x = tl.load(x_ptr + k0, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(x, a, acc, input_precision="ieee")
        if PLANE_K > CHUNK_K:
            next_k = k0 + BLOCK_K
            if (next_k % CHUNK_K == 0) | (next_k >= end_k):
                # a select, or the compiler would fuse product and sum, and a chunk would have other bits than in its
                # own plane
                chunk = tl.where(live[:, None], acc * scale, 0.0)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if GROUP == 1:
                    total += chunk
                else:
                    group += chunk
                    if (next_k % (GROUP * CHUNK_K) == 0) | (next_k >= end_k):
                        total += group
                        group = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PLANE_K <= CHUNK_K:
        total = acc * scale
    return total


@triton.jit
def shrink_rows(
    slot,
    rows,  # [BLOCK_M]
    live,  # [BLOCK_M]
    index,  # plane
    first_column,
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    out_ptr,
    num_rows,
    x_stride,
    scale,
    K: tl.constexpr,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    A_SLOT_STRIDE: tl.constexpr,
    A_ROW_STRIDE: tl.constexpr,
    CHUNK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[index, :, rows, :] in a block of columns.

    With EARLY, in kernels whose own tiles have 16 rows, the next kernel starts at once, and fetches while this one
    multiplies. If not, when all sums are made: large tiles leave room for its programs on some multiprocessors alone,
    where they would stay together.
    """
    NUM_CHUNKS: tl.constexpr = (K + CHUNK_K - 1) // CHUNK_K
    EVEN_N: tl.constexpr = (SLICES * RANK) % BLOCK_N == 0
    BLOCK_M: tl.constexpr = rows.shape[0]
    columns = first_column + tl.arange(0, BLOCK_N)
    in_columns = columns < SLICES * RANK
    if RANK % BLOCK_N == 0:  # one slice a block
        lora_slice = first_column // RANK
    else:
        lora_slice = columns // RANK
    ranks = columns - lora_slice * RANK
    plane = ((index * SLICES + lora_slice).to(tl.int64) * num_rows) * RANK + ranks
    out = out_ptr + rows[:, None].to(tl.int64) * RANK + plane[None, :]  # [BLOCK_M, BLOCK_N]
    out_mask = live[:, None] & in_columns[None, :]
    if PDL:  # what ran before is complete, also for the kernel that starts now
        tl.extra.cuda.gdc_wait()
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    if slot < 0:
        if PLANES == 1:
            if slot == -1:
                tl.store(out, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), mask=out_mask)
    else:
        k = tl.arange(0, BLOCK_K)
        x = x_ptr + rows[:, None].to(tl.int64) * x_stride + k[None, :]
        offsets = slot.to(tl.int64) * A_SLOT_STRIDE + (ranks * A_ROW_STRIDE)[None, :] + k[:, None]
        if RANK % BLOCK_N == 0:
            a = select_slice(lora_slice, a0_ptr, a1_ptr, a2_ptr, SLICES) + offsets
        else:  # of whole addresses, or Triton 3.8 and later would not know that they are aligned
            a = select_slice(lora_slice[None, :], a0_ptr + offsets, a1_ptr + offsets, a2_ptr + offsets, SLICES)
        if PLANES == NUM_CHUNKS:
            PLANE_K: tl.constexpr = CHUNK_K
        elif PLANES > 1:
            PLANE_K: tl.constexpr = GROUP * CHUNK_K
        else:
            PLANE_K: tl.constexpr = K
        first_k = index * PLANE_K
        total = rows_dot(
            x,
            a,
            live,
            in_columns,
            first_k,
            scale,
            K,
            PLANE_K,
            EVEN_N,
            CHUNK_K,
            GROUP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
        )
        if PDL and not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.store(out, total, mask=out_mask)


@triton.jit(do_not_specialize=["tiles_per_segment", "num_rows", "scale"])
def shrink_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    a0_ptr,  # [L, R, K]
    a1_ptr,  # [L, R, K]
    a2_ptr,  # [L, R, K]
    out_ptr,  # fp32 [C, S, M, R]
    slots_ptr,
    rows_ptr,
    lengths_ptr,
    wide_ptr,  # int32 [1], used when WIDE, as are the next two
    wide_slots_ptr,
    wide_rows_ptr,
    tiles_per_segment,
    num_rows,
    x_stride,
    scale,
    K: tl.constexpr,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    A_SLOT_STRIDE: tl.constexpr,
    A_ROW_STRIDE: tl.constexpr,
    CHUNK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * C * ceil(S * R / BLOCK_N),), blocks of columns fastest, then planes and tiles.

    The ranks of all slices stand side by side as S * R columns, so that a program reads x once for several slices. It
    owns out[c, :, rows of its tile, :] in its block of columns, and walks all chunks of K of its plane itself: one, a
    group of GROUP, or with C == 1 all. Rows of slot -1 become zero with C == 1, and are left alone with more planes,
    whose reader skips them. With WIDE, tiles are the wide ones in a step that has them, if they
    make enough programs.
    """
    BLOCKS: tl.constexpr = (SLICES * RANK + BLOCK_N - 1) // BLOCK_N
    EARLY: tl.constexpr = BLOCK_M == 16
    pid = tl.program_id(0)
    index = pid // BLOCKS % PLANES
    tile = pid // (BLOCKS * PLANES)
    first_column = pid % BLOCKS * BLOCK_N
    operands = (index, first_column, x_ptr, a0_ptr, a1_ptr, a2_ptr, out_ptr, num_rows, x_stride, scale)
    slot, rows, live = load_tile(tile, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, BLOCK_M)
    if WIDE > 0:
        wide_tiles = tl.load(wide_ptr)
        if wide_tiles * BLOCKS * PLANES >= WIDE_PROGRAMS:
            if tile < wide_tiles:
                slot, more_rows, all_live = load_tile(
                    tile, wide_slots_ptr, wide_rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, WIDE
                )
                shrink_rows(
                    slot,
                    more_rows,
                    all_live,
                    *operands,
                    K,
                    RANK,
                    SLICES,
                    A_SLOT_STRIDE,
                    A_ROW_STRIDE,
                    CHUNK_K,
                    GROUP,
                    PLANES,
                    BLOCK_N,
                    BLOCK_K // 4,  # and one stage more: the shared memory that the rows below take, or little more
                    STAGES + 1,
                    PDL,
                    EARLY,
                )
            elif PDL:
                tl.extra.cuda.gdc_wait()
            return
    shrink_rows(
        slot,
        rows,
        live,
        *operands,
        K,
        RANK,
        SLICES,
        A_SLOT_STRIDE,
        A_ROW_STRIDE,
        CHUNK_K,
        GROUP,
        PLANES,
        BLOCK_N,
        BLOCK_K,
        STAGES,
        PDL,
        EARLY,
    )


@triton.jit
def load_plane(
    h_ptr,  # [C, S, M, R]
    plane,
    rows,  # [BLOCK_M]
    mask,  # [BLOCK_M, BLOCK_R]
    ranks,  # [BLOCK_R]
    lora_slice,
    num_rows,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One plane of h, fp32 [BLOCK_M, BLOCK_R]; zero outside of the mask."""
    first = (plane * SLICES + lora_slice).to(tl.int64) * num_rows
    return tl.load(h_ptr + (first + rows)[:, None] * RANK + ranks[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sum_h(
    h_ptr,  # [C, S, M, R]
    rows,  # [BLOCK_M]
    live,  # [BLOCK_M]
    ranks,  # [BLOCK_R]
    lora_slice,
    num_rows,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr = 1,
):
    """Sum of the planes of h, GROUP of them making a group, fp32 [BLOCK_M, BLOCK_R]; zero where the row or the rank is
    padding.

    With PACKED, rows come so many times in succession: the first with its ranks at 0, the next at RANK and so on.
    """
    if PACKED > 1:
        column = tl.arange(0, rows.shape[0]) % PACKED
        mask = live[:, None] & (ranks[None, :] // RANK == column[:, None])
        ranks = ranks % RANK
    else:
        mask = live[:, None] & (ranks < RANK)[None, :]
    total = tl.zeros((rows.shape[0], ranks.shape[0]), tl.float32)  # and so never -0.0
    if GROUP == 1:
        for c in tl.static_range(PLANES):
            total += load_plane(h_ptr, c, rows, mask, ranks, lora_slice, num_rows, RANK, SLICES)
    else:  # a loop, or the compiler has more loads under way than registers; of a small tile the first group is not
        AHEAD: tl.constexpr = GROUP if rows.shape[0] * ranks.shape[0] <= 1024 else 0
        for c in tl.static_range(AHEAD):
            total += load_plane(h_ptr, c, rows, mask, ranks, lora_slice, num_rows, RANK, SLICES)
        for first in range(AHEAD, PLANES, GROUP):
            part = load_plane(h_ptr, first, rows, mask, ranks, lora_slice, num_rows, RANK, SLICES)
            for c in tl.static_range(1, GROUP):
                inside = mask & (first + c < PLANES)
                part += load_plane(h_ptr, first + c, rows, inside, ranks, lora_slice, num_rows, RANK, SLICES)
            total += part
    return total


@triton.jit(do_not_specialize=["tiles_per_segment", "num_rows"])
def sum_planes_kernel(
    planes_ptr,  # fp32 [C, S, M, R]
    out_ptr,  # [S, M, R], fp32 or what expand rounds to
    slots_ptr,
    rows_ptr,
    lengths_ptr,
    tiles_per_segment,
    num_rows,
    RANK: tl.constexpr,
    SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * PARTS * S * ceil(R / BLOCK_R),), blocks of R fastest, then slices, then parts of a tile.

    A program owns out[s, BLOCK_M rows of its tile, block of R]; rows of slot -1 become zero.
    """
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    lora_slice = pid // RANK_BLOCKS % SLICES
    part = pid // (RANK_BLOCKS * SLICES)
    slot, rows, live = load_tile(
        part, slots_ptr, rows_ptr, lengths_ptr, tiles_per_segment, num_rows, TILES, BLOCK_M, PARTS
    )
    if PDL:  # the planes are complete, and what ran before them
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if slot == -2:
        return
    ranks = pid % RANK_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = live[:, None] & (ranks < RANK)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if slot >= 0:
        total += sum_h(planes_ptr, rows, live, ranks, lora_slice, num_rows, RANK, SLICES, PLANES, GROUP)
    tl.store(out_ptr + (lora_slice.to(tl.int64) * num_rows + rows)[:, None] * RANK + ranks[None, :], total, mask=mask)


def sum_planes(planes: torch.Tensor, out: torch.Tensor, tiles: Tiles, *, group: int = 1, pdl: bool = False) -> None:
    """out [S, M, R] = sum of planes [C, S, M, R], `group` of them making a group, for the rows of the tiles, in the
    order in which expand adds them. pdl: as `shrink` takes it."""
    num_planes, slices, num_rows, rank = planes.shape
    block_r = min(power_of_two(rank), SUM_RANKS)
    parts = tiles.rows // TILE_ROWS[0]
    launch = prepared(
        sum_planes_kernel,
        RANK=rank,
        SLICES=slices,
        PLANES=num_planes,
        GROUP=group,
        TILES=tiles.mode,
        PARTS=parts,
        BLOCK_M=TILE_ROWS[0],
        BLOCK_R=block_r,
        PDL=pdl,
        launch_pdl=pdl,
    )
    grid = (tiles.count * parts * slices * cdiv(rank, block_r),)
    launch(grid, planes, out, *tiles.pointers, tiles.per_segment * parts, num_rows)


def fetched_config(x: torch.Tensor, lora_a: list[torch.Tensor], rows: int, config: ShrinkConfig) -> ShrinkConfig:
    """With smaller blocks where `fetched_singly`."""
    if not fetched_singly([x, *lora_a], [x.shape[1], *lora_a[0].stride()[:2]], [x.stride(0)]):
        return config
    block_n = min(config.block_n, 64)
    return replace(config, block_n=block_n, block_k=fetched_block(config.block_k, rows + block_n, config.num_warps))


def shrink(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    out: torch.Tensor,
    tiles: Tiles,
    scale: float,
    config: ShrinkConfig,
    *,
    pdl: bool = False,
    first: bool = False,
) -> None:
    """Launch the shrink of up to three slices.

    Args:
        x: [M, K], rows of stride x.stride(0), last dimension contiguous.
        lora_a: S tensors [L, R, K] of equal shape and strides, last dimension contiguous.
        out: fp32 [C, S, M, R] contiguous, C = 1 or the number of chunks of K or of groups of them.
        tiles: which rows belong to which slot.
        pdl: start before the previous kernel of the stream has finished and wait for it inside, and let the next one do
            the same: at once, or where tiles.rows is 64 when the sums are made.
        first: with pdl, what comes before is no kernel of this stream: start when it is complete.
    """
    planes, slices, num_rows, rank = out.shape
    k = x.shape[1]
    weight = lora_a[0]
    config = fetched_config(x, lora_a, tiles.rows, config)
    grid = (tiles.count * planes * cdiv(slices * rank, config.block_n),)
    block_k = min(config.block_k, chunk_k(k))  # a step stays in its chunk
    divisible = block_k >= 64  # wide tiles take a quarter of it, which is a product's 16 at least
    launch = prepared(
        shrink_kernel,
        K=k,
        RANK=rank,
        SLICES=slices,
        A_SLOT_STRIDE=weight.stride(0),
        A_ROW_STRIDE=weight.stride(1),
        CHUNK_K=chunk_k(k),
        GROUP=group_chunks(k, rank),
        PLANES=planes,
        TILES=tiles.mode,
        WIDE=tiles.held_wide(rank, weight.dtype, config.num_warps) if divisible else 0,
        BLOCK_M=tiles.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl and not first,
    )
    arguments = (
        x,
        *slice_pointers(lora_a),
        out,
        *tiles.all_pointers(),
        tiles.per_segment,
        num_rows,
        x.stride(0),
        scale,
    )
    launch(grid, *arguments)
