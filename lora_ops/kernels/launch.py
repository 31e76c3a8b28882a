"""What both kernel launches share: tiles as arguments and slice pointers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch cut into tiles, one slot a tile.

    mode: one of tiles.PLAN_TILES, ROW_TILES, SEGMENT_TILES; count: tiles at most; rows: rows of a tile; batch: rows of
    the batch, by which launch parameters are chosen; pointers: (slots, rows, lengths) as `load_tile` reads them;
    per_segment: tiles of a segment.
    """

    mode: int
    count: int
    rows: int
    batch: int
    pointers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    per_segment: int = 1


def slice_pointers(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three pointer arguments; slices that the layer lacks repeat the first."""
    first = weights[0]
    return first, weights[1] if len(weights) > 1 else first, weights[2] if len(weights) > 2 else first


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter one, so that its programs share work as those of a GPU do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_programs(items: int, per_multiprocessor: int, device: torch.device) -> int:
    """Programs for `items` pieces of work: one each, or as many as the GPU holds at a time."""
    return min(items, per_multiprocessor * _multiprocessors(device))
