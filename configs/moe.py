"""Launch parameters of the MoE kernels: analytic defaults from the sizes of a layer.

block_m is the tile of the routing plan: one value for both halves of a layer. A row's bits depend on block_m and
block_k; block_k follows from block_m, the dtype and the layer, so they are the same for all batches of one tile size.
"""

from __future__ import annotations

from dataclasses import dataclass

from .store import padded

TILE_ROWS = (16, 32, 64, 128)
"""Rows of a tile that the kernels take."""
MIN_PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H200."""


@dataclass(frozen=True)
class MoeConfig:
    """Launch parameters of a grouped GEMM.

    block_m: rows of a tile, as the plan has them; block_n: columns of a program, of gates and ups each; block_k:
    elements of K a step; num_warps, num_stages: as Triton takes them; group_m: tiles that walk the columns together.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int


def tile_rows(tokens: int, experts: int, top_k: int, itemsize: int = 2) -> int:
    """Rows of a tile for a batch: small while experts get few rows each, large where the products dominate."""
    rows_per_expert = tokens * top_k / experts
    if rows_per_expert <= 16:
        return 16
    return 64 if rows_per_expert <= 192 or itemsize > 2 else 128


def shared_memory(config: MoeConfig, products: int, itemsize: int) -> int:
    """Bytes of shared memory that the operands of a program take."""
    step = (config.block_m + products * config.block_n) * config.block_k * itemsize
    return step * config.num_stages


def moe_default(
    block_m: int, tokens: int, experts: int, top_k: int, n: int, k: int, products: int = 1, itemsize: int = 2
) -> MoeConfig:
    """Launch parameters of a grouped GEMM where no tuned ones are known.

    Args:
        block_m: rows of the plan's tiles, one of TILE_ROWS.
        tokens, experts, top_k: of the batch and the layer.
        n: columns of the output; k: columns of x.
        products: 2 when a program computes gates and ups, else 1.
        itemsize: bytes of an element.
    """
    if itemsize > 2:  # products on CUDA cores: operands and sums live in registers
        block_n = 32 if block_m == 128 else 64 // products
        return MoeConfig(block_m, min(block_n, padded(n)), min(32, padded(k)), 8 if block_m >= 64 else 4, 2, 8)
    if block_m >= 128:
        return MoeConfig(block_m, min(256 // products, padded(n)), min(64, padded(k)), 8, 4, 8)
    if block_m >= 64:
        return MoeConfig(block_m, min(256 // products, padded(n)), min(64, padded(k)), 4, 4, 8)
    tiles = min(tokens * top_k, experts)
    block_n = 128 // products
    while block_n > 16 and tiles * -(-n // block_n) < MIN_PROGRAMS:
        block_n //= 2
    return MoeConfig(block_m, min(block_n, padded(n)), min(128, padded(k)), 4, 4, 1)
