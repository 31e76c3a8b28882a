"""Launch parameters of the LoRA kernels: analytic defaults from the sizes of a layer.

Nothing here changes a result: the order of summation is fixed in `lora_ops.config`. The thresholds come from a sweep
over Llama-3-8B's layers on an H200 (ranks 16 and 64; 1 to 256 tokens for tiles of 16 rows, 8192 for tiles of 64).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShrinkConfig:
    """block_n: ranks of a program; block_k: elements of K a step; num_warps, num_stages: as Triton takes them."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    """block_n: output features of a program; block_r: ranks a step; num_warps, num_stages: as Triton takes them."""

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int


def _padded(size: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(1 << max(size - 1, 0).bit_length(), 16)


def shrink_config(k: int, rank: int, tile_rows: int) -> ShrinkConfig:
    """Launch parameters of the shrink for x [*, k] and A [slots, rank, k], tiles of tile_rows rows."""
    ranks = _padded(rank)
    if tile_rows == 16:
        if ranks == 16:
            return ShrinkConfig(16, min(128, _padded(k)), num_warps=2, num_stages=4)
        return ShrinkConfig(32, min(256, _padded(k)), num_warps=4, num_stages=3)
    if ranks == 16:
        return ShrinkConfig(16, min(128, _padded(k)), num_warps=4, num_stages=3)
    return ShrinkConfig(min(ranks, 64), min(64, _padded(k)), num_warps=4, num_stages=4)


def expand_config(n: int, rank: int, tile_rows: int) -> ExpandConfig:
    """Launch parameters of the expand for B [slots, n, rank], n the widest slice, tiles of tile_rows rows."""
    ranks = _padded(rank)
    warps = 4 if tile_rows > 16 or ranks > 32 else ranks // 16
    return ExpandConfig(min(128, _padded(n)), min(ranks, 64), num_warps=warps, num_stages=2)
