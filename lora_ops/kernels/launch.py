"""What both kernel launches share: tiles as arguments and slice pointers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch cut into tiles, one slot a tile.

    mode: one of tiles.PLAN_TILES, ROW_TILES, SEGMENT_TILES; count: tiles launched; rows: rows of a tile; batch: rows of
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
