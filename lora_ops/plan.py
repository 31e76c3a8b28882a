"""The plan of one step: which adapter slot each token uses, grouped into row tiles.

token_slots -> stable sort by slot -> groups -> tiles of 16 or 64 rows -> one int32 arena -> one copy to the device

Sections of the arena (int32), L = max_slots, M = max_tokens:

    token_slots      [M]       slot of each token, -1 = no adapter, padded with -1
    order            [M]       tokens sorted by slot, stable (a permutation of 0..num_tokens-1), padded with 0
    active_slots     [L + 1]   the distinct slots, ascending, padded with -1
    tokens_per_slot  [L + 1]   tokens of each active slot, padded with 0
    slot_starts      [L + 2]   first position of each active slot in `order`, then num_tokens, padded with 0
    offsets          [M]       max(slot, 0) * slot_stride of each token, padded with 0; of plans that were asked for it
    wide_tiles       [1]       tiles of 64 rows of a small step that fills them so well that kernels take them; else 0
    tile_slots_R     [T_R]     slot of each tile of R rows, -1 = rows without adapter, -2 = no tile
    tile_rows_R      [T_R, R]  token of each row of the tile, -1 = padding

Tiles without adapter come after the others, so that live work is contiguous. Tiles of 16 rows hold the first
SMALL_BATCH tokens and stand in the order of their first rows: whatever the step, rows below R that have an adapter are
in the first `tile_count_bound(R, L, 16)` of them, which is what a CUDA graph captured for R rows launches. So do tiles
of 64 rows of steps of up to SMALL_BATCH tokens, which kernels that hold both sizes take where few adapters have many
rows: each tile reads its adapter once. Those of larger steps stand in the order of their slots, so that those of an
adapter find its weights in the L2 cache.

Buffers never move and never change their size: graphs captured over them stay valid, a replay reads the plan of its own
step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ops_configs.lora import TILE_ROWS
from ops_configs.store import SMALL_BATCH

from .fill import NO_ADAPTER, compiled, fill

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


@functools.lru_cache
def plan_layout(max_tokens: int, max_slots: int, has_offsets: bool = False) -> PlanLayout:
    """Layout of a plan.

    Sections that grow with the step's tokens and are seldom full stand last: a step copies a prefix of the arena.
    """
    small = min(max_tokens, SMALL_BATCH)
    caps = {TILE_ROWS[0]: tile_count_bound(small, max_slots, TILE_ROWS[0])}
    caps[TILE_ROWS[1]] = tile_count_bound(max_tokens, max_slots, TILE_ROWS[1])
    lengths = {
        "wide_tiles": 1,
        "tile_slots_16": caps[16],
        "tile_slots_64": caps[64],
        "active_slots": max_slots + 1,
        "tokens_per_slot": max_slots + 1,
        "slot_starts": max_slots + 2,
        "tile_rows_16": caps[16] * 16,
        "token_slots": max_tokens,
        "order": max_tokens,
        "offsets": max_tokens if has_offsets else 0,
        "tile_rows_64": caps[64] * 64,
    }
    offsets, position = {}, 0
    for name, length in lengths.items():
        offsets[name] = (position, length)
        position += -(-length // 32) * 32  # 128-byte aligned sections
    return PlanLayout(offsets, position)


class Staging:
    """Memory of the host that a step's plan is written to and copied from; pinned where the copy is one to a GPU.

    Attributes:
        values: int32, laid out as the arena.
        used: int64, see `fill`.
    """

    def __init__(self, layout: PlanLayout, blank: np.ndarray, on_gpu: bool) -> None:
        self._memory = torch.empty(layout.size, dtype=torch.int32, pin_memory=on_gpu)
        self.values = self._memory.numpy()
        self.values[: blank.size] = blank
        self.used = np.zeros(len(layout.offsets) - 1, dtype=np.int64)
        self._source = self._target = self._memory[:0]

    def expect(self, arena: torch.Tensor, length: int) -> None:
        """The first `length` elements are what `send` copies to the arena."""
        if len(self._source) != length:
            self._source, self._target = self._memory[:length], arena[:length]

    def send(self) -> None:
        self._target.copy_(self._source, non_blocking=True)


class StagingPool:
    """Stagings whose copies may still be under way, and free ones; waits for no copy.

    One event stands for the copies of all stagings that were sent before it, for recording one takes several
    microseconds: it is recorded when none is free any more, and those before the last one are free if that is through.
    """

    SPARE = 8
    """Stagings made at once: as many steps go without an event."""

    def __init__(self, layout: PlanLayout, blank: np.ndarray, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._make = functools.partial(Staging, layout, blank, on_gpu)
        self._device = device
        self._event = torch.cuda.Event() if on_gpu else None
        self._free = [self._make() for _ in range(self.SPARE if on_gpu else 1)]
        self._before_event: list[Staging] = []
        self._sent: list[Staging] = []

    def take(self) -> Staging:
        """A staging that no copy reads any more, to be written and given to `sends`; no other is sent until then."""
        if not self._free and (self._event is None or self._event.query()):
            self._free, self._before_event, self._sent = self._before_event, self._sent, []
            if self._event is not None:
                self._event.record(torch.cuda.current_stream(self._device))
        return self._free.pop() if self._free else self._make()

    def sends(self, staging: Staging) -> None:
        """It is whole, and sent until the next `take`. One that failed to be written is not given back."""
        self._sent.append(staging)


class LoraPlan:
    """Tokens of a step grouped by adapter slot, on the device, in buffers that never move.

    Args:
        max_tokens: most rows that a step can have.
        max_slots: adapter slots of the weights (first dimension of lora_a and lora_b).
        device: where the kernels run.
        has_offsets: whether there is a section `offsets`.

    Attributes:
        arena: int32 device tensor that holds every section.
        counts: int32 CPU tensor [3]: tokens of the step, active adapters of the step, its tiles of 64 rows (of steps of
            up to SMALL_BATCH tokens, too). A CPU tensor, so that torch.compile treats the numbers as data and an op can
            leave early without a sync.

    One thread updates a plan, on one stream. A copy of one, or one that was pickled, is a new plan of no tokens.
    """

    def __init__(self, max_tokens: int, max_slots: int, device: torch.device | str, has_offsets: bool = False) -> None:
        if max_tokens < 1 or max_slots < 1:
            raise ValueError(f"LoraPlan needs max_tokens >= 1 and max_slots >= 1, got {max_tokens} and {max_slots}")
        self.max_tokens = max_tokens
        self.max_slots = max_slots
        self.has_offsets = has_offsets
        self.device = torch.device(device)
        self.layout = plan_layout(max_tokens, max_slots, has_offsets)
        self.counts = torch.zeros(3, dtype=torch.int32)
        self._counts = self.counts.numpy()
        self.arena = torch.zeros(self.layout.size, dtype=torch.int32, device=self.device)
        self._starts = tuple(start if length else -1 for start, length in self.layout.offsets.values())
        self._blank = self._make_blank()
        self._pool = StagingPool(self.layout, self._blank, self.arena.device)
        self._on_gpu = self.device.type == "cuda"
        self._fill = compiled() if self._on_gpu else fill
        self._built: tuple[bytes, int] | None = None
        self.update(())

    def __reduce__(self) -> tuple:
        return LoraPlan, (self.max_tokens, self.max_slots, self.device, self.has_offsets)

    def section(self, name: str) -> torch.Tensor:
        """A whole section of the arena (see the module docstring), a view that never moves."""
        return self.layout.section(self.arena, name)

    @property
    def num_tokens(self) -> int:
        return int(self._counts[0])

    @property
    def num_active(self) -> int:
        return int(self._counts[1])

    @property
    def num_groups(self) -> int:
        """Distinct slots of the step, no adapter counted as one."""
        return self._num_groups

    @property
    def token_slots(self) -> torch.Tensor:
        """int32 [num_tokens]: slot of each token of the step, -1 = no adapter."""
        return self.section("token_slots")[: self.num_tokens]

    def update(self, token_slots: Sequence[int] | np.ndarray, slot_stride: int = 0) -> None:
        """Build the plan of a step on the CPU and send it to the device with one copy, without a sync.

        A step like the one before, as most decode steps are, is not built again; it is sent again, for whoever owns the
        device memory may have dropped it in between (a server that slept).

        Args:
            token_slots: slot of each token, -1 = no adapter; at most max_tokens.
            slot_stride: what the offsets of two slots differ by, where the plan has offsets.

        Raises:
            TypeError: slots that are no integers.
            ValueError: too many tokens, a slot outside -1..max_slots-1, or offsets that do not fit into int32.
            RuntimeError: a CUDA graph is being captured, which would replay the plan of this step.
        """
        given = np.asarray(token_slots)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(f"token_slots are of dtype {given.dtype}, expected integers in -1..{self.max_slots - 1}")
        slots = given.astype(np.int32, order="C")  # a copy: contiguous and writable, as the compiled loop takes it
        if slots.ndim != 1 or slots.size > self.max_tokens:
            raise ValueError(
                f"token_slots has shape {slots.shape}, but this plan holds one dimension of at most "
                f"{self.max_tokens} tokens: build the LoraPlan with a larger max_tokens"
            )
        if given.dtype != np.int32 and given.size and not (given == slots).all():
            token = int((given != slots).argmax())
            raise ValueError(self._bad_slot(token, given[token]))
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a LoraPlan was updated while a CUDA graph is captured: update it before each replay")
        wanted = (slots.tobytes(), slot_stride)
        if wanted != self._built:
            self._built = None
            self._build(slots, slot_stride)
            self._built = wanted
        self._staging.send()

    def _build(self, slots: np.ndarray, slot_stride: int) -> None:
        """Write the step into memory that no copy reads."""
        if not 0 <= (self.max_slots - 1) * slot_stride < 2**31:
            raise ValueError(
                f"slot_stride is {slot_stride}, with which offsets of {self.max_slots} slots do not fit into int32"
            )
        staging = self._pool.take()
        tiles, groups, num_active, bad = self._fill(
            staging.values, self._blank, staging.used, self._starts, slots, self.max_slots, slot_stride
        )
        if bad >= 0:
            raise ValueError(self._bad_slot(bad, slots[bad]))
        self._pool.sends(staging)
        staging.expect(self.arena, self._blank.size + tiles * TILE_ROWS[1])
        self._staging, self._num_groups = staging, groups
        self._counts[:] = slots.size, num_active, tiles

    def _bad_slot(self, token: int, slot: int) -> str:
        return f"token {token} has adapter slot {slot}, but slots are 0..{self.max_slots - 1} (-1 = no adapter)"

    def expect_any_step(self) -> None:
        """Until the next `update`, launch what any step may need: for a CUDA graph captured before the first step."""
        self._built = None
        self._counts[:] = self.max_tokens, 1, tile_count_bound(self.max_tokens, self.max_slots, TILE_ROWS[1])

    def _make_blank(self) -> np.ndarray:
        """What every section holds beyond a step's values, up to tile_rows_64, which a step fills as far as it goes."""
        padding = {"token_slots": NO_ADAPTER, "active_slots": NO_ADAPTER, "tile_rows_16": -1}
        padding |= {f"tile_slots_{rows}": NO_TILE for rows in TILE_ROWS}
        blank = np.zeros(self.layout.offsets["tile_rows_64"][0], dtype=np.int32)
        for name, value in padding.items():
            offset, length = self.layout.offsets[name]
            blank[offset : offset + length] = value
        return blank


def plan_args(plan: LoraPlan) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A plan as the ops of torch.ops.lora_ops take it: arena, counts, layout."""
    return plan.arena, plan.counts, [plan.max_tokens, plan.max_slots, int(plan.has_offsets)]
