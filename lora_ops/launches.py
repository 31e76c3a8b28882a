"""From a call of an op to launches: tiles, launch parameters, planes, and what is compiled before it is needed."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ops_configs.lora import TILE_ROWS, expand_config, shrink_config, tile_rows_for
from ops_configs.store import SMALL_BATCH, register_kernels, row_bucket
from ops_patches.library import INTERPRET
from ops_patches.replay import recording_to

from .config import num_planes, planes_of_group, sums_planes
from .plan import plan_layout, tile_count_bound

register_kernels("lora_ops", Path(__file__).parent / "kernels")

TILES_STEP = 16
"""A launch for one step alone has a multiple of so many tiles; see `step_of`."""


@functools.cache
def _supports_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_one_step: contextvars.ContextVar[bool] = contextvars.ContextVar("one_step", default=False)


@contextlib.contextmanager
def capturing_one_step() -> Iterator[None]:
    """For benchmarks: CUDA graphs captured inside serve the one step, so launches are those of outside."""
    token = _one_step.set(True)
    try:
        yield
    finally:
        _one_step.reset(token)


class Step(NamedTuple):
    """What launches must know of a step; see `step_of`."""

    tokens: int = 0
    """Whose tiles a batch walks: the plan's, or with padding the rows of the batch."""
    tiles: int | None = None
    """Of TILE_ROWS[1] rows, at most; None: as many as any step of so many tokens has."""


ANY_STEP = Step()


def step_of(counts: torch.Tensor, rows: torch.Tensor) -> Step:
    """The step of a plan, for a batch of these rows.

    A launch of a batch of more than SMALL_BATCH rows outside a CUDA graph serves this step alone, and needs no tiles of
    another. They are rounded up: few numbers, so that later batches have the same form (ops_patches/replay.py).
    """
    tokens, _, tiles = counts.tolist()  # elements would be tensors, which take as long to make as a launch
    num_rows = rows.shape[0] if rows.ndim else 0
    tokens = max(tokens, num_rows)
    if num_rows <= SMALL_BATCH or (rows.is_cuda and torch.cuda.is_current_stream_capturing() and not _one_step.get()):
        return Step(tokens)
    return Step(tokens, -(-tiles // TILES_STEP) * TILES_STEP)


def plan_tiles(arena: torch.Tensor, layout_args: Sequence[int], num_rows: int, step: Step = ANY_STEP):
    """Tiles of a plan of this step for a batch of num_rows rows: padded, or a part of the step's tokens."""
    from .kernels.tiles import PLAN_TILES, Tiles

    rows = tile_rows_for(num_rows)
    layout = plan_layout(*layout_args)
    tile_slots = layout.section(arena, f"tile_slots_{rows}")
    tile_rows = layout.section(arena, f"tile_rows_{rows}")
    count = min(tile_count_bound(max(num_rows, step.tokens), layout_args[1], rows), tile_slots.numel())
    if step.tiles is not None and rows == TILE_ROWS[1]:
        count = min(count, step.tiles)
    wide = None
    if rows == TILE_ROWS[0] and row_bucket(num_rows) > TILE_ROWS[1]:  # fewer rows fill no two of them
        wide = tuple(layout.section(arena, name) for name in ("wide_tiles", "tile_slots_64", "tile_rows_64"))
    return Tiles(PLAN_TILES.value, count, rows, num_rows, (tile_slots, tile_rows, tile_rows), wide=wide)


def row_tiles(slot_indices: torch.Tensor):
    """One tile a row (bgmv)."""
    from .kernels.tiles import ROW_TILES, Tiles

    slot_indices = slot_indices.contiguous()
    count = slot_indices.numel()
    return Tiles(ROW_TILES.value, count, tile_rows_for(1), 1, (slot_indices, slot_indices, slot_indices))


def segment_tiles(seq_starts, seq_lengths, slot_indices, batches: int, max_seq_length: int, token_nums: int):
    """Tiles of segments of rows (sgmv)."""
    from .kernels.tiles import SEGMENT_TILES, Tiles

    rows = tile_rows_for(token_nums)
    per_segment = -(-max_seq_length // rows)
    pointers = (slot_indices.contiguous(), seq_starts.contiguous(), seq_lengths.contiguous())
    return Tiles(SEGMENT_TILES.value, batches * per_segment, rows, token_nums, pointers, per_segment)


def run_shrink(x, lora_a, out, scale: float, tiles, **options) -> None:
    """Complete sums into out [S, M, R], fp32 or as expand rounds; options as `kernels.shrink.shrink` takes them."""
    from .kernels.shrink import sum_planes

    k, rank = x.shape[1], lora_a[0].shape[1]
    planes = num_planes(k, len(lora_a), rank, tiles.batch)
    if planes == 1:
        run_planes(x, lora_a, out.unsqueeze(0), scale, tiles, **options)
    else:
        partial = torch.empty((planes, *out.shape), dtype=torch.float32, device=out.device)
        run_planes(x, lora_a, partial, scale, tiles, **options)
        sum_planes(partial, out, tiles, group=planes_of_group(k, rank, planes), pdl=options.get("pdl", False))


def run_planes(x, lora_a, planes, scale: float, tiles, **options) -> None:
    """Sums over a part of K each into planes, fp32 [C, S, M, R]."""
    from .kernels.shrink import shrink

    config = shrink_config(x.shape[1], len(lora_a), lora_a[0].shape[1], tiles.batch, x.dtype, x.device)
    shrink(x, lora_a, planes, tiles, scale, config, **options)


def run_expand(h, lora_b, y, offset: int, add_inputs: bool, tiles, **options) -> None:
    """h [S, M, R], or planes [C, S, M, R] of it, into y; options as `kernels.expand.expand` takes them."""
    from .kernels.expand import expand

    planes = h if h.ndim == 4 else h.unsqueeze(0)
    widths = tuple(b.shape[1] for b in lora_b)
    config = expand_config(widths, planes.shape[3], tiles.batch, lora_b[0].dtype, y.device, planes.shape[0])
    expand(planes, lora_b, y, tiles, offset, add_inputs, config, **options)


def run_linear(
    y, x, lora_a, lora_b, scale: float, offset: int, add_inputs: bool, tiles, first=False, **options
) -> None:
    """Shrink into planes, expand from them or from their sum; on Hopper and later each kernel starts under the tail of
    the one before.

    first: nothing of this stream comes before the shrink.
    """
    k, rank = x.shape[1], lora_a[0].shape[1]
    pdl = _supports_pdl(y.device)
    planes = num_planes(k, len(lora_a), rank, tiles.batch)
    group = planes_of_group(k, rank, planes)
    widths = tuple(b.shape[1] for b in lora_b)
    if sums_planes(planes, group, widths, rank, tiles.batch):
        h = torch.empty((1, len(lora_a), x.shape[0], rank), dtype=lora_b[0].dtype, device=x.device)
        run_shrink(x, lora_a, h[0], scale, tiles, pdl=pdl, first=first)
        group = 1
    else:
        h = torch.empty((planes, len(lora_a), x.shape[0], rank), dtype=torch.float32, device=x.device)
        run_planes(x, lora_a, h, scale, tiles, pdl=pdl, first=first)
    run_expand(h, lora_b, y, offset, add_inputs, tiles, group=group, pdl=pdl, **options)


def run_add(y, delta, tiles) -> None:
    """delta into y, for the rows with an adapter."""
    from .kernels.add import add

    add(y, delta, tiles)


_compiled: set[tuple] = set()


def compile_plan(
    kernels: Callable, layer: tuple, arena: torch.Tensor, layout: Sequence[int], batches: Iterable[int]
) -> None:
    """Compile `kernels(tiles)` for these sizes of batch, the first time that a layer is seen.

    A launch of no tiles compiles. A server sees all its layers while it profiles, so nothing is left to compile while
    it serves.
    """
    if layer in _compiled or INTERPRET:
        return
    with recording_to(None):  # no batch makes them again
        for num_rows in batches:
            kernels(replace(plan_tiles(arena, layout, num_rows), count=0))
    _compiled.add(layer)


@functools.cache
def _side(device: torch.device, stream: int) -> tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]:
    """Side stream of a stream (its handle), the event from which it starts and the one at which it is done."""
    return torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event()


def run_beside(function: Callable[[], None], device: torch.device) -> None:
    """Run `function` on the current stream's side stream, after all that the current one has; see `join_side`."""
    if device.type != "cuda":
        function()
        return
    side, fork, done = _side(device, torch.cuda.current_stream(device).cuda_stream)
    fork.record()
    with torch.cuda.stream(side):
        fork.wait()
        try:
            function()
        finally:
            done.record()


def join_side(device: torch.device) -> None:
    """Let the current stream wait for its last `run_beside`, and so for those before it."""
    if device.type == "cuda":
        _side(device, torch.cuda.current_stream(device).cuda_stream)[2].wait()
