"""The plan of one routed-experts call: which rows each expert computes, cut into tiles of one expert.

topk_ids -> local expert of each choice -> stable sort by expert -> groups -> tiles of tile_rows rows

A choice is one of the top_k experts of a token: choice = token * top_k + k. A row is the place of a choice in sorted
order; the intermediates of the layer lie in row order, so that the rows of an expert are neighbours.

Arrays (int32, on the device of topk_ids), M tokens, C = M * top_k choices, E experts, T = tile_count_bound(C, E, R)
tiles of R = tile_rows rows:

    choices       [C]      choice of each row, by expert, stable (a permutation); choices without expert come last
    rows          [C]      row of each choice (the inverse permutation)
    counts        [E]      rows of each expert
    starts        [E + 1]  first row of each expert, then the first row without expert
    tile_experts  [T]      expert of each tile, ascending, -1 = no tile
    tile_starts   [T]      first row of each tile, 0 = no tile
    tile_sizes    [T]      rows of each tile, 1..R, 0 = no tile
    tile_count    [1]      tiles with an expert

A choice has no expert when its id is -1 or `expert_map` says that the expert lives elsewhere (expert parallel): no tile
covers it, its output is zero. Every shape follows from the shapes of the arguments and nothing is read back, so that a
CUDA graph captured over a plan stays valid: a replay plans the ids of its own step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import checks

NO_EXPERT = -1
NO_TILE = -1


def tile_count_bound(num_choices: int, num_experts: int, tile_rows: int) -> int:
    """Most tiles of tile_rows rows that num_choices choices over num_experts experts can need."""
    groups = min(num_choices, num_experts)
    return groups + (num_choices - groups) // tile_rows


@dataclass(frozen=True)
class RoutingPlan:
    """Choices of a call grouped by expert; the module docstring says what each array holds."""

    choices: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    tile_experts: torch.Tensor
    tile_starts: torch.Tensor
    tile_sizes: torch.Tensor
    tile_count: torch.Tensor
    top_k: int
    tile_rows: int

    @property
    def tokens(self) -> torch.Tensor:
        """int32 [C]: token of each row."""
        return self.choices // self.top_k


def local_experts(topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [M, top_k]: index into the weights for each choice, -1 = no expert here.

    An id that no expert has counts as -1. `checks.routing` refuses it where that needs no sync.
    """
    ids = topk_ids
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.take(ids.clamp(0, expert_map.shape[0] - 1).long()), NO_EXPERT)
    return torch.where((ids >= 0) & (ids < num_experts), ids, NO_EXPERT).int()


def routing_plan(
    topk_ids: torch.Tensor, num_experts: int, tile_rows: int, expert_map: torch.Tensor | None = None
) -> RoutingPlan:
    """Group the choices of a call by expert, without a sync.

    Args:
        topk_ids: int32 or int64 [M, top_k], experts of each token, -1 = none.
        num_experts: experts of the weights on this device, E.
        tile_rows: rows of a tile, R.
        expert_map: int32 or int64 [G]: index into the weights of each of G global experts, -1 = not on this device.
            topk_ids are then global ids.

    Raises:
        ValueError: a shape, size or device that does not fit; on the CPU also an id out of range.
        TypeError: ids that are not int32 or int64.
    """
    checks.routing("routing_plan", topk_ids, num_experts, expert_map)
    if tile_rows < 1:
        raise ValueError(f"routing_plan: tile_rows is {tile_rows}, expected at least 1")

    def arange(n: int) -> torch.Tensor:
        return torch.arange(n, dtype=torch.int32, device=topk_ids.device)

    experts = local_experts(topk_ids, num_experts, expert_map).flatten()
    keys, order = torch.sort(torch.where(experts == NO_EXPERT, num_experts, experts), stable=True)
    choices = order.int()
    rows = torch.empty_like(choices).scatter_(0, order, arange(choices.shape[0]))
    starts = torch.searchsorted(keys, arange(num_experts + 1), out_int32=True)
    counts = starts.diff()

    tiles_per_expert = (counts + tile_rows - 1) // tile_rows
    tile_ends = tiles_per_expert.cumsum(0, dtype=torch.int32)
    tiles = arange(tile_count_bound(choices.shape[0], num_experts, tile_rows))
    tile_experts = torch.searchsorted(tile_ends, tiles, right=True, out_int32=True)
    live = tile_experts < num_experts
    expert = tile_experts.clamp(max=num_experts - 1).long()
    row_in_expert = (tiles - (tile_ends - tiles_per_expert).take(expert)) * tile_rows
    return RoutingPlan(
        choices=choices,
        rows=rows,
        counts=counts,
        starts=starts,
        tile_experts=torch.where(live, tile_experts, NO_TILE),
        tile_starts=torch.where(live, starts.take(expert) + row_in_expert, 0),
        tile_sizes=torch.where(live, (counts.take(expert) - row_in_expert).clamp(max=tile_rows), 0),
        tile_count=tile_ends.narrow(0, num_experts - 1, 1),
        top_k=topk_ids.shape[1],
        tile_rows=tile_rows,
    )
