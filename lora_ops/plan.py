"""The plan of one step: which adapter slot each token uses, grouped into row tiles.

token_slots -> stable sort by slot -> groups -> tiles of 16 or 64 rows -> one int32 arena -> one copy to the device

Sections of the arena (int32), L = max_slots, M = max_tokens:

    token_slots      [M]       slot of each token, -1 = no adapter, padded with -1
    order            [M]       tokens sorted by slot, stable (a permutation of 0..num_tokens-1), padded with 0
    active_slots     [L + 1]   the distinct slots, ascending, padded with -1
    tokens_per_slot  [L + 1]   tokens of each active slot, padded with 0
    slot_starts      [L + 2]   first position of each active slot in `order`, then num_tokens, padded with 0
    tile_slots_R     [T_R]     slot of each tile of R rows, -1 = rows without adapter, -2 = no tile
    tile_rows_R      [T_R, R]  token of each row of the tile, -1 = padding

Tiles without adapter come after the others, so that live work is contiguous. Buffers never move and never change their
size: CUDA graphs captured over them stay valid, a replay reads the plan of its own step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

NO_ADAPTER = -1
NO_TILE = -2
TILE_ROWS = (16, 64)
SMALL_BATCH = 512
"""Batches of up to this many rows are cut into tiles of 16 rows, larger ones into tiles of 64."""


def tile_rows_for(num_rows: int) -> int:
    """Rows of a tile for a batch of `num_rows` rows. Kernels and plan both ask here.

    It never falls with num_rows. A plan of n tokens therefore holds tiles of every size that a batch padded to more
    than n rows can ask for.
    """
    return TILE_ROWS[0] if num_rows <= SMALL_BATCH else TILE_ROWS[1]


def tile_count_bound(num_tokens: int, max_slots: int, rows: int) -> int:
    """Most tiles of `rows` rows that num_tokens tokens over max_slots slots (and none) can need."""
    groups = min(num_tokens, max_slots + 1)
    return groups + (num_tokens - groups) // rows


@dataclass(frozen=True)
class PlanLayout:
    """Where each section of the arena begins and how long it is, in int32 elements."""

    offsets: Mapping[str, tuple[int, int]]
    size: int

    def section(self, arena: torch.Tensor, name: str) -> torch.Tensor:
        offset, length = self.offsets[name]
        return arena[offset : offset + length]


@lru_cache
def plan_layout(max_tokens: int, max_slots: int, extra_tokens: int = 0) -> PlanLayout:
    """Layout of a plan; `extra_tokens` counts per-token sections that the owner of the plan adds.

    Sections that grow with the step's tokens and are seldom full stand last: a step copies a prefix of the arena.
    """
    small = min(max_tokens, SMALL_BATCH)
    caps = {TILE_ROWS[0]: tile_count_bound(small, max_slots, TILE_ROWS[0])}
    caps[TILE_ROWS[1]] = tile_count_bound(max_tokens, max_slots, TILE_ROWS[1])
    lengths = {
        "tile_slots_16": caps[16],
        "tile_slots_64": caps[64],
        "active_slots": max_slots + 1,
        "tokens_per_slot": max_slots + 1,
        "slot_starts": max_slots + 2,
        "tile_rows_16": caps[16] * 16,
        "token_slots": max_tokens,
        "order": max_tokens,
        **{f"extra_{i}": max_tokens for i in range(extra_tokens)},
        "tile_rows_64": caps[64] * 64,
    }
    offsets, position = {}, 0
    for name, length in lengths.items():
        offsets[name] = (position, length)
        position += -(-length // 32) * 32  # 128-byte aligned sections
    return PlanLayout(offsets, position)


class LoraPlan:
    """Tokens of a step grouped by adapter slot, on the device, in buffers that never move.

    Args:
        max_tokens: most rows that a step can have.
        max_slots: adapter slots of the weights (first dimension of lora_a and lora_b).
        device: where the kernels run.
        extra_tokens: int32 sections of max_tokens elements that the owner fills through `update(..., extra=...)`.

    Attributes:
        arena: int32 device tensor that holds every section.
        counts: int32 CPU tensor [2]: tokens of the step, active adapters of the step. A CPU tensor, so that
            torch.compile treats the numbers as data and an op can leave early without a sync.
    """

    def __init__(self, max_tokens: int, max_slots: int, device: torch.device | str, extra_tokens: int = 0) -> None:
        if max_tokens < 1 or max_slots < 1:
            raise ValueError(f"LoraPlan needs max_tokens >= 1 and max_slots >= 1, got {max_tokens} and {max_slots}")
        self.max_tokens = max_tokens
        self.max_slots = max_slots
        self.extra_tokens = extra_tokens
        self.device = torch.device(device)
        self.layout = plan_layout(max_tokens, max_slots, extra_tokens)
        self.counts = torch.zeros(2, dtype=torch.int32)
        self.arena = torch.zeros(self.layout.size, dtype=torch.int32, device=self.device)
        self.update(())

    def section(self, name: str) -> torch.Tensor:
        """A whole section of the arena (see the module docstring), a view that never moves."""
        return self.layout.section(self.arena, name)

    @property
    def num_tokens(self) -> int:
        return int(self.counts[0])

    @property
    def num_active(self) -> int:
        return int(self.counts[1])

    @property
    def num_groups(self) -> int:
        """Distinct slots of the step, no adapter counted as one."""
        return self._num_groups

    @property
    def token_slots(self) -> torch.Tensor:
        """int32 [num_tokens]: slot of each token of the step, -1 = no adapter."""
        return self.section("token_slots")[: self.num_tokens]

    def update(self, token_slots: Sequence[int] | np.ndarray, extra: Sequence[np.ndarray] = ()) -> None:
        """Build the plan of a step on the CPU and send it to the device with one copy, without a sync.

        Args:
            token_slots: slot of each token, -1 = no adapter; at most max_tokens.
            extra: one int32 array of at most max_tokens elements for each extra section.

        Raises:
            ValueError: too many tokens, or a slot outside -1..max_slots-1.
        """
        slots = np.asarray(token_slots, dtype=np.int32)
        self._check(slots)
        staging = torch.empty(self.layout.size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        used, self._num_groups, num_active = self._fill(staging.numpy(), slots, extra)
        self.counts.numpy()[:] = slots.size, num_active
        self.arena[:used].copy_(staging[:used], non_blocking=True)

    def _check(self, slots: np.ndarray) -> None:
        if slots.ndim != 1 or slots.size > self.max_tokens:
            raise ValueError(
                f"token_slots has shape {slots.shape}, but this plan holds one dimension of at most "
                f"{self.max_tokens} tokens: build the LoraPlan with a larger max_tokens"
            )
        if slots.size and (slots.min() < NO_ADAPTER or slots.max() >= self.max_slots):
            bad = int(np.flatnonzero((slots < NO_ADAPTER) | (slots >= self.max_slots))[0])
            raise ValueError(
                f"token {bad} has adapter slot {slots[bad]}, but slots are 0..{self.max_slots - 1} (-1 = no adapter)"
            )

    def _fill(self, arena: np.ndarray, slots: np.ndarray, extra: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Write all sections; returns the used prefix of the arena, the groups and the active adapters."""
        offsets = self.layout.offsets

        def view(name: str) -> np.ndarray:
            offset, length = offsets[name]
            return arena[offset : offset + length]

        num_tokens = slots.size
        order = np.argsort(slots, kind="stable")
        counts = np.bincount(slots + 1, minlength=1)  # index 0: no adapter
        groups = np.flatnonzero(counts)
        tokens = counts[groups]
        ends = np.cumsum(tokens)
        group_slots = groups - 1

        def write(name: str, values: np.ndarray, padding: int, first: int = 0) -> None:
            section = view(name)
            section[first : first + len(values)] = values
            section[first + len(values) :] = padding

        write("token_slots", slots, NO_ADAPTER)
        write("order", order, 0)
        write("active_slots", group_slots, NO_ADAPTER)
        write("tokens_per_slot", tokens, 0)
        write("slot_starts", ends, 0, first=1)
        view("slot_starts")[0] = 0
        for i, values in enumerate(extra):
            write(f"extra_{i}", values, 0)

        if groups.size and group_slots[0] == NO_ADAPTER:  # tiles without adapter come last
            order = np.roll(order, -tokens[0])
            group_slots, tokens = np.roll(group_slots, -1), np.roll(tokens, -1)
        group = np.repeat(np.arange(groups.size), tokens)
        index = np.arange(num_tokens) - (np.cumsum(tokens) - tokens)[group]  # of the token in its group
        tiles = 0
        for rows in TILE_ROWS:
            tile_slots = view(f"tile_slots_{rows}")
            if tile_rows_for(num_tokens) > rows:
                tile_slots[:] = NO_TILE
                continue
            group_tiles = -(-tokens // rows)
            tile = (np.cumsum(group_tiles) - group_tiles)[group] + index // rows
            tiles = int(group_tiles.sum())
            write(f"tile_slots_{rows}", np.repeat(group_slots, group_tiles), NO_TILE)
            tile_rows = view(f"tile_rows_{rows}")[: tiles * rows]
            tile_rows[:] = -1
            tile_rows[tile * rows + index % rows] = order
        num_active = int(np.count_nonzero(group_slots >= 0))
        return offsets["tile_rows_64"][0] + tiles * TILE_ROWS[1], groups.size, num_active


def plan_args(plan: LoraPlan) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A plan as the ops of torch.ops.lora_ops take it: arena, counts, layout."""
    return plan.arena, plan.counts, [plan.max_tokens, plan.max_slots, plan.extra_tokens]
