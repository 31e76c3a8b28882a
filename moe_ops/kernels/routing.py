"""The routing plan in one launch (three for many choices), array for array that of `moe_ops.routing_plan`.

experts of all choices -> counts -> starts -> row of each choice = start + choices of the expert before it -> tiles
choices without expert -> behind all others, in order

Shapes: topk_ids int32 or int64 [C]; arrays of the plan as in routing.py. No atomics on results: every integer follows
from the ids alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ops_patches.launch import cdiv, power_of_two, prepared

from .. import checks
from ..routing import RoutingPlan, tile_count_bound
from .tiles import UNALIGNED

BLOCK = 128
"""Choices that a program places."""
CHUNK = 1024
"""Choices that a program counts, where there are many."""
SCAN_BINS, SCAN_CHUNKS = 16, 128
"""Experts that a program scans, and chunks in a step."""


@triton.jit
def load_experts(ids_ptr, expert_map_ptr, choices, mask, EXPERTS: tl.constexpr, GLOBAL_EXPERTS: tl.constexpr):
    """Local expert of each choice, EXPERTS where it has none."""
    ids = tl.load(ids_ptr + choices, mask=mask, other=-1)
    if expert_map_ptr is not None:
        ids = tl.load(expert_map_ptr + ids, mask=(ids >= 0) & (ids < GLOBAL_EXPERTS), other=-1)
    return tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS).to(tl.int32)


def expert_constants(experts: int, expert_map: torch.Tensor | None) -> dict[str, int]:
    """What `load_experts` is compiled for: experts on this device, and entries of the map, 0 without one."""
    return {"EXPERTS": experts, "GLOBAL_EXPERTS": 0 if expert_map is None else expert_map.shape[0]}


@triton.jit(do_not_specialize=["num_choices"], do_not_specialize_on_alignment=UNALIGNED)
def count_kernel(
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    chunk_counts_ptr,  # int32 [chunks + 1, BINS]
    num_choices,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (ceil(C / CHUNK),). A program owns the counts of one chunk of choices."""
    chunk = tl.program_id(0)
    choices = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = choices < num_choices
    experts = load_experts(ids_ptr, expert_map_ptr, choices, mask, EXPERTS, GLOBAL_EXPERTS)
    counts = tl.histogram(experts, BINS, mask=mask & (experts < EXPERTS))
    tl.store(chunk_counts_ptr + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_chunks"])
def scan_kernel(
    chunk_counts_ptr,  # int32 [chunks + 1, BINS]
    num_chunks,
    BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    SCAN_CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (BINS / SCAN_BINS,). A program owns SCAN_BINS experts: counts of the chunks before each, then of all."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pointers = chunk_counts_ptr + tl.program_id(0) * SCAN_BINS + tl.arange(0, SCAN_BINS)
    total = tl.zeros((SCAN_BINS,), tl.int32)
    for first in range(0, num_chunks, SCAN_CHUNKS):
        chunks = first + tl.arange(0, SCAN_CHUNKS)
        rows = pointers[None, :] + chunks[:, None] * BINS
        mask = (chunks < num_chunks)[:, None]
        counts = tl.load(rows, mask=mask, other=0)
        tl.store(rows, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(pointers + num_chunks * BINS, total)


@triton.jit(
    do_not_specialize=["num_choices", "num_tiles", "num_chunks"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def place_kernel(
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    chunk_counts_ptr,  # int32 [chunks + 1, BINS] after the scan, or None: one chunk
    choices_ptr,  # int32 [C]
    rows_ptr,  # int32 [C]
    counts_ptr,  # int32 [E]
    starts_ptr,  # int32 [E + 1]
    tile_experts_ptr,  # int32 [T]
    tile_starts_ptr,  # int32 [T]
    tile_sizes_ptr,  # int32 [T]
    tile_count_ptr,  # int32 [1]
    num_choices,
    num_tiles,
    num_chunks,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (ceil(C / BLOCK),). A program owns rows and choices of its BLOCK choices, every ceil(C / BLOCK)-th tile of
    each expert, and the padding among its BLOCK places in the list of tiles; the first also owns counts, starts and
    the count of tiles.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    mine = pid * BLOCK + tl.arange(0, BLOCK)
    is_choice = mine < num_choices
    experts = load_experts(ids_ptr, expert_map_ptr, mine, is_choice, EXPERTS, GLOBAL_EXPERTS)

    chunk = pid * BLOCK // CHUNK
    chunk_choices = chunk * CHUNK + tl.arange(0, CHUNK)
    in_chunk = chunk_choices < num_choices
    chunk_experts = load_experts(ids_ptr, expert_map_ptr, chunk_choices, in_chunk, EXPERTS, GLOBAL_EXPERTS)
    counted = in_chunk & (chunk_experts < EXPERTS)
    before = tl.histogram(chunk_experts, BINS, mask=counted & (chunk_choices < pid * BLOCK))
    if chunk_counts_ptr is None:
        counts = tl.histogram(chunk_experts, BINS, mask=counted)
    else:
        counts = tl.load(chunk_counts_ptr + num_chunks * BINS + bins)
        before += tl.load(chunk_counts_ptr + chunk * BINS + bins)

    starts = tl.cumsum(counts, 0) - counts
    live_rows = tl.sum(counts, 0)
    first_without = live_rows + pid * BLOCK - tl.sum(before, 0)
    earlier = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    rank = tl.sum(((experts[:, None] == experts[None, :]) & earlier).to(tl.int32), 1)
    first = tl.gather(starts + before, tl.where(experts < EXPERTS, experts, 0), 0)
    rows = tl.where(experts < EXPERTS, first, first_without) + rank
    tl.store(rows_ptr + mine, rows, mask=is_choice)
    tl.store(choices_ptr + rows, mine, mask=is_choice)
    if pid == 0:
        tl.store(counts_ptr + bins, counts, mask=bins < EXPERTS)
        tl.store(starts_ptr + bins, starts, mask=bins < EXPERTS)
        tl.store(starts_ptr + EXPERTS, live_rows)

    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.cumsum(tiles, 0) - tiles
    if pid == 0:
        tl.store(tile_count_ptr, tl.sum(tiles, 0))
    for t in range(pid, tl.max(tiles, 0), tl.num_programs(0)):
        mask = t < tiles
        tl.store(tile_experts_ptr + first_tile + t, bins, mask=mask)
        tl.store(tile_starts_ptr + first_tile + t, starts + t * TILE_ROWS, mask=mask)
        tl.store(tile_sizes_ptr + first_tile + t, tl.minimum(counts - t * TILE_ROWS, TILE_ROWS), mask=mask)
    padding = (mine >= tl.sum(tiles, 0)) & (mine < num_tiles)
    zeros = tl.zeros((BLOCK,), tl.int32)
    tl.store(tile_experts_ptr + mine, zeros - 1, mask=padding)
    tl.store(tile_starts_ptr + mine, zeros, mask=padding)
    tl.store(tile_sizes_ptr + mine, zeros, mask=padding)


def lone_chunks(bins: int) -> tuple[int, ...]:
    """Sizes of a chunk that holds all choices, so that the plan is one launch: measured on an H200."""
    return (1024, 2048, 4096) if bins <= 128 else (1024, 2048)


def num_bins(num_experts: int) -> int:
    """Bins of a histogram of the experts; choices without expert are in none."""
    return max(power_of_two(num_experts), 32)


def routing_plan(
    topk_ids: torch.Tensor,
    num_experts: int,
    tile_rows: int,
    expert_map: torch.Tensor | None = None,
    pdl: bool = False,
) -> RoutingPlan:
    """`moe_ops.routing_plan` of at least one choice; the rest is the same, pdl as in launches.py."""
    checks.routing("routing_plan", topk_ids, num_experts, expert_map)
    ids = topk_ids.reshape(-1).contiguous()  # a view of one column keeps its stride
    expert_map = None if expert_map is None else expert_map.contiguous()
    num_choices = ids.shape[0]
    num_tiles = tile_count_bound(num_choices, num_experts, tile_rows)
    sizes = [num_choices, num_choices, num_experts, num_experts + 1, num_tiles, num_tiles, num_tiles, 1]
    arrays = torch.empty(sum(sizes), dtype=torch.int32, device=ids.device).split_with_sizes(sizes)
    bins = num_bins(num_experts)
    chunk = next((chunk for chunk in lone_chunks(bins) if num_choices <= chunk), CHUNK)
    num_chunks = cdiv(num_choices, chunk)
    constants = {
        **expert_constants(num_experts, expert_map),
        "BINS": bins,
        "CHUNK": chunk,
    }
    chunk_counts = None
    if num_chunks > 1:
        chunk_counts = torch.empty(num_chunks + 1, bins, dtype=torch.int32, device=ids.device)
        count = prepared(count_kernel, **constants, num_warps=8)
        count((num_chunks,), ids, expert_map, chunk_counts, num_choices)
        sizes_of_scan = {"BINS": bins, "SCAN_BINS": SCAN_BINS, "SCAN_CHUNKS": SCAN_CHUNKS}
        scan = prepared(scan_kernel, **sizes_of_scan, PDL=pdl, num_warps=4, launch_pdl=pdl)
        scan((bins // SCAN_BINS,), chunk_counts, num_chunks)
    pdl = pdl and num_chunks > 1  # what comes before the plan is not ours
    place = prepared(place_kernel, TILE_ROWS=tile_rows, BLOCK=BLOCK, PDL=pdl, **constants, num_warps=8, launch_pdl=pdl)
    grid = (cdiv(num_choices, BLOCK),)
    place(grid, ids, expert_map, chunk_counts, *arrays, num_choices, num_tiles, num_chunks)
    return RoutingPlan(*arrays, top_k=topk_ids.shape[1], tile_rows=tile_rows)
