"""Which launch parameters are worth a measurement: short lists, from sweeps over Llama-3-8B's layers on an H200.

A list serves every layer and rank: blocks are cut to the layer's sizes, and what needs more shared memory than the GPU
has is left out.
"""

from __future__ import annotations

from ops_configs.files import MAX_SHARED_BYTES, shared_bytes
from ops_configs.lora import (
    TILE_ROWS,
    ExpandConfig,
    ShrinkConfig,
    expand_default,
    fitted,
    shrink_default,
    tile_rows_for,
)
from ops_configs.store import SMALL_BATCH, padded

from ..config import CHUNKS_BATCH, PLANES_BATCH, planes_read
from .layers import Layer

# (block_n, block_k, num_warps, num_stages)
SMALL_SHRINKS = (  # few rows: the adapters' weights have to come, a program brings a strip of them
    (16, 64, 2, 6),
    (16, 128, 1, 4),
    (16, 128, 2, 4),
    (16, 256, 2, 4),
    (16, 256, 4, 4),
    (32, 64, 1, 4),
    (32, 128, 2, 4),
    (32, 128, 4, 4),  # four warps and more also hold tiles of 64 rows, for one adapter with many rows
    (32, 256, 4, 3),
    (64, 64, 2, 4),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 128, 2, 4),
    (64, 256, 4, 3),
)
LARGE_SHRINKS = (  # many rows: x has to come, once for as many columns as fit; one program fills a multiprocessor
    (16, 128, 4, 4),
    (16, 128, 4, 6),
    (32, 64, 4, 4),
    (32, 64, 4, 8),
    (32, 128, 4, 4),
    (32, 128, 8, 4),
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 8, 4),
    (128, 64, 4, 4),
    (128, 64, 4, 6),
    (128, 128, 8, 4),
    (256, 64, 8, 5),
)
# (block_n, num_warps, num_stages, steps)
SMALL_EXPANDS = (
    (64, 1, 2, 1),
    (128, 1, 2, 1),
    (256, 1, 2, 1),
    (128, 2, 2, 1),
    (256, 2, 2, 1),
    (128, 4, 2, 1),
    (256, 4, 2, 1),
    (256, 8, 2, 1),
    (256, 1, 2, 2),
    (128, 1, 3, 4),
    (128, 2, 2, 2),
    (128, 4, 2, 2),
    (128, 2, 3, 4),
    (64, 2, 3, 8),
    (64, 4, 3, 4),  # several steps: many planes are added up once for all of them
    (128, 4, 3, 4),
    (256, 4, 2, 2),
    (128, 8, 3, 4),
    (256, 8, 3, 2),
)
LARGE_EXPANDS = (
    (64, 4, 2, 1),
    (128, 4, 2, 1),
    (128, 4, 2, 2),
    (64, 4, 2, 4),
    (64, 4, 3, 4),
    (64, 4, 3, 8),
    (64, 4, 2, 8),
    (64, 4, 2, 16),
    (128, 4, 2, 4),
    (128, 4, 3, 4),
    (128, 8, 3, 4),
    (128, 8, 3, 8),
    (128, 8, 3, 16),
)
COUNT = 1 + max(map(len, (SMALL_SHRINKS, LARGE_SHRINKS, SMALL_EXPANDS, LARGE_EXPANDS)))
"""Candidates of a kernel at most, the analytic default among them."""


def _is_small(rows: int) -> bool:
    return tile_rows_for(rows) == tile_rows_for(1)


def batch_class(layer: Layer, rank: int, rows: int) -> tuple[int, int]:
    """The same for all batches of a layer whose kernels are compiled alike: by tiles, planes and their sum."""
    limits = (TILE_ROWS[1], SMALL_BATCH, CHUNKS_BATCH, PLANES_BATCH)
    most = next((most for most in limits if rows <= most), PLANES_BATCH + 1)
    return most, planes_read(layer.k, layer.widths, rank, rows)


def _fitting(default, configs: list, most_shared: int) -> list:
    """The default and those of the others that fit into shared memory, each once."""
    return [default, *(c for c in dict.fromkeys(configs) if c != default and shared_bytes(c) <= most_shared)]


def shrink_candidates(layer: Layer, rank: int, rows: int, most_shared: int = MAX_SHARED_BYTES) -> list[ShrinkConfig]:
    """Configs to measure for the shrink of `rows` rows; the analytic default comes first."""
    default = fitted(shrink_default(layer.k, len(layer.widths), rank, rows), rows, 2, most_shared)
    columns, k = padded(len(layer.widths) * rank), padded(layer.k)
    found = SMALL_SHRINKS if _is_small(rows) else LARGE_SHRINKS
    return _fitting(default, [ShrinkConfig(min(n, columns), min(bk, k), *rest) for n, bk, *rest in found], most_shared)


def expand_candidates(layer: Layer, rank: int, rows: int, most_shared: int = MAX_SHARED_BYTES) -> list[ExpandConfig]:
    """Configs to measure for the expand of `rows` rows; the analytic default comes first."""
    default = expand_default(layer.widths, rank, rows, planes_read(layer.k, layer.widths, rank, rows))
    small = _is_small(rows)
    widest, block_r = padded(max(layer.widths)), min(padded(rank), 64 if small else 128)
    found = SMALL_EXPANDS if small else LARGE_EXPANDS
    if rank > block_r:  # a step of several products leaves no room for the next one's operands
        found = [(*rest, 1) for *rest, _ in found]
    return _fitting(default, [ExpandConfig(min(n, widest), block_r, *rest) for n, *rest in found], most_shared)
