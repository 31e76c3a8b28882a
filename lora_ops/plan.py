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

Tiles without adapter come after the others, so that live work is contiguous. Tiles of 64 rows stand in the order of
their slots, so that those of an adapter find its weights in the L2 cache. Tiles of 16 rows hold the first SMALL_BATCH
tokens and stand in the order of their first rows: whatever the step, rows below R that have an adapter are in the first
`tile_count_bound(R, L, 16)` of them, which is what a CUDA graph captured for R rows launches.

Buffers never move and never change their size: graphs captured over them stay valid, a replay reads the plan of its own
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ops_configs.lora import TILE_ROWS
from ops_configs.store import SMALL_BATCH

NO_ADAPTER = -1
NO_TILE = -2


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
        self._numbers = np.arange(max_tokens)
        self._blank = self._make_blank()
        self._built: tuple[np.ndarray, ...] = ()
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

        A step like the one before, as most decode steps are, is not built again; it is sent again, for whoever owns the
        device memory may have dropped it in between (a server that slept).

        Args:
            token_slots: slot of each token, -1 = no adapter; at most max_tokens.
            extra: one int32 array of at most max_tokens elements for each extra section.

        Raises:
            ValueError: too many tokens, or a slot outside -1..max_slots-1.
        """
        slots = np.asarray(token_slots, dtype=np.int32)
        wanted = (slots, *extra)
        if len(wanted) != len(self._built) or not all(map(np.array_equal, wanted, self._built)):
            self._check(slots)
            staging = torch.empty(self.layout.size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            used, self._num_groups, num_active = self._fill(staging.numpy(), slots, extra)
            self.counts.numpy()[:] = slots.size, num_active
            self._staging = staging[:used]  # never written again: a copy may still be under way
            self._built = tuple(np.array(values) for values in wanted)  # copies: the caller may write into its own
        self.arena[: len(self._staging)].copy_(self._staging, non_blocking=True)

    def expect_any_step(self) -> None:
        """Until the next `update`, launch what any step may need: for a CUDA graph captured before the first step."""
        self._built = ()
        self.counts.numpy()[:] = self.max_tokens, 1

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

    def _make_blank(self) -> np.ndarray:
        """What every section holds beyond a step's values, up to tile_rows_64, which a step fills as far as it goes."""
        padding = {"token_slots": NO_ADAPTER, "active_slots": NO_ADAPTER, "tile_rows_16": -1}
        padding |= {f"tile_slots_{rows}": NO_TILE for rows in TILE_ROWS}
        blank = np.zeros(self.layout.offsets["tile_rows_64"][0], dtype=np.int32)
        for name, value in padding.items():
            offset, length = self.layout.offsets[name]
            blank[offset : offset + length] = value
        return blank

    def _fill(self, arena: np.ndarray, slots: np.ndarray, extra: Sequence[np.ndarray]) -> tuple[int, int, int]:
        """Write all sections; returns the used prefix of the arena, the groups and the active adapters."""
        arena[: self._blank.size] = self._blank
        offsets = self.layout.offsets

        def write(name: str, values: np.ndarray, first: int = 0) -> None:
            start = offsets[name][0] + first
            arena[start : start + len(values)] = values

        order = slots.argsort(kind="stable")
        counts = np.bincount(slots + 1, minlength=1)  # index 0: no adapter
        groups = counts.nonzero()[0]
        group_slots, tokens = groups - 1, counts[groups]
        ends = tokens.cumsum()
        num_active = groups.size - int(counts[0] > 0)
        write("token_slots", slots)
        write("order", order)
        write("active_slots", group_slots)
        write("tokens_per_slot", tokens)
        write("slot_starts", ends, first=1)
        for i, values in enumerate(extra):
            write(f"extra_{i}", values)

        small, large = TILE_ROWS
        starts = ends - tokens
        tiles = self._write_tiles(arena, large, order, group_slots, tokens, starts)
        if slots.size > SMALL_BATCH:
            order, counts = order[order < SMALL_BATCH], np.bincount(slots[:SMALL_BATCH] + 1)
            group_slots, tokens = counts.nonzero()[0] - 1, counts[counts > 0]
            starts = tokens.cumsum() - tokens
        self._write_tiles(arena, small, order, group_slots, tokens, starts)
        return self._blank.size + tiles * large, groups.size, num_active

    def _write_tiles(self, arena: np.ndarray, rows: int, order: np.ndarray, group_slots, tokens, starts) -> int:
        """Write the tiles of `order`, sorted by slot: for each group its slot, tokens and start. Returns how many."""
        if not order.size:
            return 0
        group_tiles = (tokens + (rows - 1)) // rows
        last_tiles = group_tiles.cumsum()
        tiles = int(last_tiles[-1])
        without = int(group_slots[0] == NO_ADAPTER)  # groups without adapter: none or the first
        live = tiles - int(group_tiles[0]) * without
        first_tiles = last_tiles - group_tiles - (tiles - live)
        first_tiles[:without] = live
        (first_slot, _), (first_row, _) = (self.layout.offsets[f"tile_{name}_{rows}"] for name in ("slots", "rows"))
        tile_slots, tile_rows = arena[first_slot : first_slot + tiles], arena[first_row : first_row + tiles * rows]
        tile_slots[:live] = group_slots[without:].repeat(group_tiles[without:])
        tile_slots[live:] = NO_ADAPTER
        tile_rows[:] = -1
        tile_rows[self._numbers[: order.size] + (first_tiles * rows - starts).repeat(tokens)] = order
        if rows == TILE_ROWS[0]:
            live_rows = tile_rows[: live * rows].reshape(live, rows)
            by_first_row = live_rows[:, 0].argsort()
            tile_slots[:live] = tile_slots[by_first_row]
            live_rows[:] = live_rows[by_first_row]
        return tiles


def plan_args(plan: LoraPlan) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A plan as the ops of torch.ops.lora_ops take it: arena, counts, layout."""
    return plan.arena, plan.counts, [plan.max_tokens, plan.max_slots, plan.extra_tokens]
