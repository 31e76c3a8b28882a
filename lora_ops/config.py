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
    """Elements of K that are summed before the partial sums are added up: the split of split-K."""
    return 512 if k <= 8192 else 1024


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
    block_n = min(max(next_power_of_2(rank), 16), 64 if tile_rows > 16 else 32)
    block_k = min(128 if tile_rows == 16 else 64, max(next_power_of_2(k), 16))
    return ShrinkConfig(block_n, block_k, num_warps=4, num_stages=4)


def expand_config(n: int, rank: int, tile_rows: int) -> ExpandConfig:
    """Default launch parameters of the expand kernel for B [slots, n, rank]."""
    block_r = min(max(next_power_of_2(rank), 16), 64)
    block_n = min(128, max(next_power_of_2(n), 16))
    return ExpandConfig(block_n, block_r, num_warps=4, num_stages=2)
