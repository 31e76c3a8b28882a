"""How a program finds its rows: the tiles of a plan, single rows (bgmv) or segments (sgmv)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ops_configs.lora import TILE_ROWS
from ops_patches.launch import power_of_two
from ops_patches.replay import ALIGNMENT

PLAN_TILES = tl.constexpr(0)
ROW_TILES = tl.constexpr(1)
SEGMENT_TILES = tl.constexpr(2)

WIDE_ROWS = TILE_ROWS[1]
WIDE_PROGRAMS = tl.constexpr(90)
"""Programs that wide tiles must make for a shrink to take them: for two thirds of an H200's multiprocessors."""

FEW_ROWS = tl.constexpr(8)
"""Rows that tensor cores take as the second dimension of a product, at least; as the first they take 16."""

FETCHED = 16
"""Elements that a thread fetches a step at most, where it fetches each by itself: `fetched_singly`."""


@triton.jit
def load_tile(
    tile,
    slots_ptr,  # int [T] (plan), [M] (rows) or [segments]
    rows_ptr,  # int32 [T, BLOCK_M] (plan) or int [segments] first rows (segments)
    lengths_ptr,  # int [segments] (segments)
    tiles_per_segment,
    num_rows,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr = 1,
    REPEATED: tl.constexpr = 1,
):
    """Slot of a tile (-1: rows without adapter, -2: no tile), its rows [BLOCK_M] and which of them are live [BLOCK_M].

    Rows outside 0..num_rows-1 are never live, whatever the tile says. With PARTS, tiles are cut into so many parts of
    BLOCK_M rows, which `tile` and tiles_per_segment count. With REPEATED, each row comes so many times in succession.
    """
    m = tl.arange(0, BLOCK_M * REPEATED) // REPEATED
    if TILES == PLAN_TILES:
        slot = tl.load(slots_ptr + tile // PARTS).to(tl.int32)
        rows = tl.load(rows_ptr + tile * BLOCK_M + m)
        live = (rows >= 0) & (rows < num_rows)
    elif TILES == ROW_TILES:
        slot = tl.load(slots_ptr + tile).to(tl.int32)
        rows = tile + m
        live = (m == 0) & (rows < num_rows)
    else:
        segment = tile // tiles_per_segment
        first = (tile % tiles_per_segment) * BLOCK_M
        length = tl.load(lengths_ptr + segment).to(tl.int32)
        slot = tl.load(slots_ptr + segment).to(tl.int32)
        slot = tl.where(first < length, slot, -2)
        rows = tl.load(rows_ptr + segment).to(tl.int32) + first + m
        live = (first + m < length) & (rows < num_rows)
    return slot, rows, live


@triton.jit
def select_slice(index, p0, p1, p2, SLICES: tl.constexpr):
    """The pointer of slice `index`; all of them are 16-byte aligned or none is assumed to be."""
    p = p0
    if SLICES > 1:
        p = tl.where(index == 1, p1, p)
    if SLICES > 2:
        p = tl.where(index == 2, p2, p)
    return p


@triton.jit
def leave(PDL: tl.constexpr):
    """Of a program without work: the kernel before may still run, and holds up none but the first.

    The next kernel relies on all before this one, which the first ends after.
    """
    if PDL:
        if tl.program_id(0) == 0:
            tl.extra.cuda.gdc_wait()


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch cut into tiles, one slot a tile.

    mode: one of PLAN_TILES, ROW_TILES, SEGMENT_TILES; count: tiles launched; rows: rows of a tile; batch: rows of
    the batch, by which launch parameters are chosen; pointers: (slots, rows, lengths) as `load_tile` reads them;
    per_segment: tiles of a segment; wide: (number, slots, rows) of the tiles of WIDE_ROWS rows that a step takes
    instead, in a kernel that holds them, if the number is not 0.
    """

    mode: int
    count: int
    rows: int
    batch: int
    pointers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    per_segment: int = 1
    wide: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def all_pointers(self) -> tuple[torch.Tensor, ...]:
        """Arguments of a kernel that may hold wide tiles; where there are none it reads the last three not."""
        return (*self.pointers, *(self.wide or self.pointers))

    def held_wide(self, rank: int, dtype: torch.dtype, num_warps: int) -> int:
        """Rows of the wide tiles that a kernel holds beside its own, or 0.

        Higher ranks gain by them; four warps have the registers for them, if tensor cores multiply. An expand asks for
        twice its warps above rank 64, where its own tiles take as many registers.
        """
        return WIDE_ROWS if self.wide and rank > 32 and dtype.itemsize == 2 and num_warps >= 4 else 0


def slice_pointers(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three pointer arguments; slices that the layer lacks repeat the first."""
    first = weights[0]
    return first, weights[1] if len(weights) > 1 else first, weights[2] if len(weights) > 2 else first


def fetched_singly(tensors: list[torch.Tensor], constants: list[int], strides: list[int]) -> bool:
    """Whether rows of these tensors, of which some have 2-byte elements, begin or end anywhere in memory.

    Each element of those is a load of its own that waits in a register, not in shared memory. With more than there are,
    the ptxas of CUDA 13.0, which Triton runs once torch.compile did, takes a wrong register for an address. So blocks
    must be small.

    constants: sizes and strides, in elements, that a kernel is compiled for: Triton knows whether they are of 16 bytes;
    strides: those passed to it, of which it knows whether they are multiples of 16.
    """
    if all(tensor.element_size() > 2 for tensor in tensors):
        return False
    vector = ALIGNMENT // 2
    anywhere = any(size % vector for size in constants) or any(stride % ALIGNMENT for stride in strides)
    return anywhere or any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)


def fetched_block(block: int, lines: int, num_warps: int) -> int:
    """Elements of each of `lines` rows and columns that a program fetches at a time: `block`, or so many fewer that a
    thread fetches FETCHED at most; 16 at least, as a product takes."""
    most = FETCHED * 32 * num_warps // lines
    return max(16, min(block, power_of_two(most + 1) // 2))
