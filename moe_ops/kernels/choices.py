"""Tiles of a few tokens without a plan: every program finds the rows of its tile among the choices by itself.

experts of all choices -> those of this choice's expert from here on -> a tile, if whole tiles come before it

Shapes: ids [C]. Rows are in the order of the choices (choice = token * top_k + k), not sorted by expert, so that the
combine needs no plan either: what a plan costs is a launch, as long as all choices are a vector of one program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ops_configs.moe import PLANLESS_CHOICES
from ops_patches.launch import power_of_two

from ..routing import RoutingPlan
from .routing import expert_constants, load_experts


@triton.jit
def begins_tile(
    choice,
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Whether a tile begins with the choice: it has an expert, which a multiple of BLOCK_M choices before it have."""
    expert = load_experts(ids_ptr, expert_map_ptr, choice, True, EXPERTS, GLOBAL_EXPERTS)
    others = tl.arange(0, CHOICES)
    experts = load_experts(ids_ptr, expert_map_ptr, others, others < choice, EXPERTS, GLOBAL_EXPERTS)
    before = tl.sum(((experts == expert) & (others < choice)).to(tl.int32), 0)
    return (expert < EXPERTS) & (before % BLOCK_M == 0)


@triton.jit
def tile_from(
    choice,
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    num_choices,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(expert, size, choices [BLOCK_M]) of the tile that begins with a choice."""
    expert = load_experts(ids_ptr, expert_map_ptr, choice, True, EXPERTS, GLOBAL_EXPERTS)
    others = tl.arange(0, CHOICES)
    mask = (others >= choice) & (others < num_choices)
    experts = load_experts(ids_ptr, expert_map_ptr, others, mask, EXPERTS, GLOBAL_EXPERTS)
    same = ((experts == expert) & mask).to(tl.int32)
    place = tl.cumsum(same, 0) - same
    here = (place[None, :] == tl.arange(0, BLOCK_M)[:, None]) & (same > 0)[None, :]  # [BLOCK_M, CHOICES]
    return expert, tl.minimum(tl.sum(same, 0), BLOCK_M), tl.sum(tl.where(here, others[None, :], 0), 1)


@triton.jit
def most_rows(
    tile,
    tile_sizes_ptr,  # int32 [T] of a plan, or None
    ids_ptr,  # [C] without a plan
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows of a tile, at most, 0 where it is none: without a plan tiles are choices, and only some begin one."""
    if tile_sizes_ptr is None:
        begins = begins_tile(tile, ids_ptr, expert_map_ptr, EXPERTS, GLOBAL_EXPERTS, CHOICES, BLOCK_M)
        return tl.where(begins, BLOCK_M, 0)
    else:
        return tl.load(tile_sizes_ptr + tile)


@triton.jit
def tile_rows(
    tile,
    tile_experts_ptr,  # int32 [T] of a plan, or None
    tile_starts_ptr,  # int32 [T]
    tile_sizes_ptr,  # int32 [T]
    ids_ptr,  # [C] without a plan
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    num_tiles,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(expert, size, first row, rows [BLOCK_M], live [BLOCK_M]) of a tile; without a plan rows are choices."""
    if tile_experts_ptr is None:
        expert, size, rows = tile_from(
            tile, ids_ptr, expert_map_ptr, num_tiles, EXPERTS, GLOBAL_EXPERTS, CHOICES, BLOCK_M
        )
        m = tl.arange(0, BLOCK_M)
        first_row = 0
    else:
        expert = tl.load(tile_experts_ptr + tile)
        m = tl.arange(0, BLOCK_M)
        first_row = tl.load(tile_starts_ptr + tile)
        size = tl.load(tile_sizes_ptr + tile)
        rows = first_row + m
    return expert, size, first_row, rows, m < size


@dataclass(frozen=True)
class Choices:
    """The experts of a few tokens, in place of a plan.

    ids: of all choices [C], int32 or int64, contiguous; top_k: choices of a token; experts: on this device;
    expert_map: of all experts, int, contiguous, or None.
    """

    ids: torch.Tensor
    top_k: int
    experts: int
    expert_map: torch.Tensor | None = None

    @classmethod
    def of(cls, topk_ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> Choices:
        """Of topk_ids [M, top_k] and an expert map of any strides."""
        expert_map = None if expert_map is None else expert_map.contiguous()
        return cls(topk_ids.reshape(-1).contiguous(), topk_ids.shape[1], experts, expert_map)

    @property
    def constants(self) -> dict[str, int]:
        """Constants of the kernels that look experts up by themselves."""
        return expert_constants(self.experts, self.expert_map)

    @property
    def padded(self) -> int:
        """Choices that a program looks at, the same for all batches of a layer: see `runs_without_plan`."""
        return power_of_two(min(self.experts, PLANLESS_CHOICES))


def tile_arguments(tiles: RoutingPlan | Choices) -> tuple[tuple, dict[str, int]]:
    """The kernel arguments that say which rows a tile has, from choices_ptr to num_tiles; and constants."""
    if isinstance(tiles, Choices):
        constants = tiles.constants | {"CHOICES": tiles.padded}
        return (None, None, None, None, tiles.ids, tiles.expert_map, tiles.ids.shape[0]), constants
    arrays = (tiles.choices, tiles.tile_experts, tiles.tile_starts, tiles.tile_sizes)
    return (*arrays, None, None, tiles.tile_experts.shape[0]), {"EXPERTS": 0, "GLOBAL_EXPERTS": 0, "CHOICES": 0}
