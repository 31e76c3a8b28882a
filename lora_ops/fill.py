"""The loops over a step's tokens that write its plan, compiled by numba: numpy's calls take several times as long.

plan.py says what the sections hold, and imports this module when the first plan is made: importing numba and compiling
take some seconds. All arrays are C contiguous and writable, so that nothing is compiled for another kind while serving.
"""

from __future__ import annotations

import numba
import numpy as np

from ops_configs.lora import TILE_ROWS
from ops_configs.store import SMALL_BATCH

from .plan import NO_ADAPTER

SMALL_ROWS, LARGE_ROWS = TILE_ROWS
SECTIONS = (
    "token_slots",
    "order",
    "active_slots",
    "tokens_per_slot",
    "slot_starts",
    f"tile_slots_{SMALL_ROWS}",
    f"tile_rows_{SMALL_ROWS}",
    f"tile_slots_{LARGE_ROWS}",
    f"tile_rows_{LARGE_ROWS}",
)


@numba.njit
def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dimension hold the same."""
    if a.size != b.size:
        return False
    for i in range(a.size):  # noqa: SIM110  (numba compiles no all())
        if a[i] != b[i]:
            return False
    return True


@numba.njit
def slots_of_adapters(ids: np.ndarray, known: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, bool]:
    """Slot of each id, int32, by the ascending ids `known` and their slots; whether all are known."""
    found = np.empty(ids.size, np.int32)
    for i in range(ids.size):
        position = np.searchsorted(known, ids[i])
        if position == known.size or known[position] != ids[i]:
            return found, False
        found[i] = slots[position]
    return found, True


@numba.njit
def out_of_range(slots: np.ndarray, max_slots: int) -> int:
    """The first token whose slot is outside -1..max_slots-1, or -1."""
    for token in range(slots.size):
        if slots[token] < NO_ADAPTER or slots[token] >= max_slots:
            return token
    return -1


@numba.njit
def fill_groups(
    slots: np.ndarray,
    order: np.ndarray,
    active_slots: np.ndarray,
    tokens_per_slot: np.ndarray,
    slot_starts: np.ndarray,
) -> tuple[int, int]:
    """Sort the tokens by slot, stable; returns how many slots there are, no adapter counted as one, and adapters."""
    tokens = np.zeros(active_slots.size, np.int32)  # by slot + 1
    for slot in slots:
        tokens[slot + 1] += 1
    following = np.empty(active_slots.size, np.int32)  # place of the next token of each slot
    groups, place = 0, 0
    for i in range(tokens.size):
        following[i] = place
        if tokens[i] > 0:
            place += tokens[i]
            active_slots[groups] = i - 1
            tokens_per_slot[groups] = tokens[i]
            slot_starts[groups + 1] = place
            groups += 1
    for token in range(slots.size):
        i = slots[token] + 1
        order[following[i]] = token
        following[i] += 1
    return groups, groups - (1 if tokens[0] > 0 else 0)


@numba.njit
def fill_small_tiles(slots: np.ndarray, max_slots: int, tile_slots: np.ndarray, tile_rows: np.ndarray) -> None:
    """Tiles of 16 rows of the first SMALL_BATCH tokens, in the order of their first rows; without adapter: last."""
    seen = np.zeros(max_slots, np.int32)  # tokens of each slot
    tile_of = np.zeros(max_slots, np.int32)  # the last tile of each slot
    tiles = 0
    for token in range(min(slots.size, SMALL_BATCH)):
        slot = slots[token]
        if slot != NO_ADAPTER:
            if seen[slot] % SMALL_ROWS == 0:
                tile_of[slot] = tiles
                tile_slots[tiles] = slot
                tiles += 1
            tile_rows[tile_of[slot] * SMALL_ROWS + seen[slot] % SMALL_ROWS] = token
            seen[slot] += 1
    place = 0
    for token in range(min(slots.size, SMALL_BATCH)):
        if slots[token] == NO_ADAPTER:
            tile_slots[tiles + place // SMALL_ROWS] = NO_ADAPTER
            tile_rows[tiles * SMALL_ROWS + place] = token
            place += 1


@numba.njit
def fill_large_tiles(
    groups: int,
    order: np.ndarray,
    active_slots: np.ndarray,
    tokens_per_slot: np.ndarray,
    slot_starts: np.ndarray,
    tile_slots: np.ndarray,
    tile_rows: np.ndarray,
) -> int:
    """Tiles of 64 rows of all tokens, in the order of their slots, those without adapter last; returns how many."""
    tiles = 0
    without = 1 if groups > 0 and active_slots[0] == NO_ADAPTER else 0  # groups without adapter: the first or none
    for i in range(groups):
        group = (i + without) % groups
        first, last = slot_starts[group], slot_starts[group] + tokens_per_slot[group]
        for place in range(first, last, LARGE_ROWS):
            tile_slots[tiles] = active_slots[group]
            for row in range(LARGE_ROWS):
                tile_rows[tiles * LARGE_ROWS + row] = order[place + row] if place + row < last else -1
            tiles += 1
    return tiles


@numba.njit
def fill(
    arena: np.ndarray, blank: np.ndarray, starts: np.ndarray, slots: np.ndarray, max_slots: int
) -> tuple[int, int, int]:
    """Write all sections but the extra ones; returns tiles of 64 rows, groups and active adapters.

    Args:
        arena: int32, of a step.
        blank: what its beginning holds where the step has no values.
        starts: first elements of the sections, in the order of SECTIONS.
        slots: int32, of each token.
    """
    arena[: blank.size] = blank
    arena[starts[0] : starts[0] + slots.size] = slots
    order, active_slots, tokens_per_slot, slot_starts = (
        arena[starts[1] :],
        arena[starts[2] : starts[2] + max_slots + 1],
        arena[starts[3] :],
        arena[starts[4] :],
    )
    groups, num_active = fill_groups(slots, order, active_slots, tokens_per_slot, slot_starts)
    fill_small_tiles(slots, max_slots, arena[starts[5] :], arena[starts[6] :])
    tiles = fill_large_tiles(
        groups, order, active_slots, tokens_per_slot, slot_starts, arena[starts[7] :], arena[starts[8] :]
    )
    return tiles, groups, num_active
