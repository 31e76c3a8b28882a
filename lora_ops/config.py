"""Tile sizes and launch parameters of the LoRA kernels.

What a row's result depends on (`chunk_k`) is a function of the layer alone, never of the batch: see `shrink.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_RANK = 512
MAX_SLICES = 3


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def chunk_k(k: int) -> int:
    """Elements of K that are summed before the partial sums are added up: the split of split-K.

    More chunks are more programs for a small batch, and more planes for the expand to read.
    """
    return 512 if k < 4096 else 1024


@dataclass(frozen=True)
class ShrinkConfig:
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


def shrink_config(k: int, rank: int, tile_rows: int) -> ShrinkConfig:
    """Default launch parameters of the shrink kernel for x [*, k] and A [slots, rank, k]."""
    padded_rank = max(next_power_of_2(rank), 16)
    longest_k = max(next_power_of_2(k), 16)
    if tile_rows == 16:
        if padded_rank == 16:
            return ShrinkConfig(16, min(128, longest_k), num_warps=2, num_stages=4)
        return ShrinkConfig(32, min(256, longest_k), num_warps=4, num_stages=3)
    if padded_rank == 16:
        return ShrinkConfig(16, min(128, longest_k), num_warps=4, num_stages=3)
    return ShrinkConfig(min(padded_rank, 64), min(64, longest_k), num_warps=4, num_stages=4)


def expand_config(n: int, rank: int, tile_rows: int) -> ExpandConfig:
    """Default launch parameters of the expand kernel for B [slots, n, rank]."""
    padded_rank = max(next_power_of_2(rank), 16)
    block_n = min(128, max(next_power_of_2(n), 16))
    warps = 4 if tile_rows > 16 or padded_rank > 32 else padded_rank // 16
    return ExpandConfig(block_n, min(padded_rank, 64), num_warps=warps, num_stages=2)
