"""Launch parameters of the LoRA kernels: tuned ones from files, and analytic defaults from the sizes of a layer.

Nothing here changes a result: the order of summation is fixed in `lora_ops.config`. The thresholds come from a sweep
over Llama-3-8B's layers on an H200 (ranks 16 and 64; 1 to 256 tokens for tiles of 16 rows, 8192 for tiles of 64).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .files import expand_file, shrink_file
from .store import BUCKETS, SMALL_BATCH, cached, find, forgetting, padded, row_bucket


@dataclass(frozen=True)
class ShrinkConfig:
    """Launch parameters of the shrink.

    block_n: columns of a program, of the S * R columns of all slices; block_k: elements of K a step; num_warps,
    num_stages: as Triton takes them.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    """Launch parameters of the expand.

    block_n: output features of a step; block_r: ranks of a product; num_warps, num_stages: as Triton takes them;
    steps: steps of a program, one after another.
    """

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    steps: int


def shrink_default(k: int, slices: int, rank: int, num_rows: int) -> ShrinkConfig:
    """Launch parameters of the shrink for x [num_rows, k] and A_s [slots, rank, k], where no tuned ones are known."""
    ranks = padded(rank)
    if num_rows <= SMALL_BATCH:
        if num_rows <= 4:
            return ShrinkConfig(16, min(256, padded(k)), num_warps=4, num_stages=4)
        return ShrinkConfig(min(ranks, 32), min(128, padded(k)), num_warps=2, num_stages=4)
    columns = padded(slices * rank)
    if slices == 1 and ranks > 16 and num_rows > 4096:
        return ShrinkConfig(min(columns, 64), min(128, padded(k)), num_warps=8, num_stages=4)
    return ShrinkConfig(min(columns, 64), min(128 if columns <= 32 else 64, padded(k)), num_warps=4, num_stages=4)


def expand_default(widths: tuple[int, ...], rank: int, num_rows: int) -> ExpandConfig:
    """Launch parameters of the expand for B_s [slots, widths[s], rank], where no tuned ones are known."""
    ranks, widest = padded(rank), padded(max(widths))
    if num_rows <= SMALL_BATCH:
        block_r, warps = min(ranks, 64), min(max(ranks // 32, 1), 4)
        if num_rows <= 4:
            config = ExpandConfig(min(64, widest), block_r, warps, num_stages=2, steps=1)
        elif widest > 8192:
            config = ExpandConfig(128, block_r, max(warps, 2), num_stages=3, steps=4)
        else:
            config = ExpandConfig(min(256 if ranks <= 64 else 128, widest), block_r, warps, num_stages=2, steps=1)
    else:
        block_n, block_r = min(128, widest), min(ranks, 128)
        blocks = num_rows // 64 * sum(-(-width // block_n) for width in widths)
        steps = max(step for step in (1, 2, 4, 8) if step == 1 or step * 800 <= blocks)  # some programs for each SM
        warps = 4 if block_r <= 64 else 8
        config = ExpandConfig(block_n, block_r, warps, num_stages=3 if steps > 1 else 2, steps=steps)
    return _runnable(config, rank)


def _runnable(config: ExpandConfig, rank: int) -> ExpandConfig:
    """A step of several products leaves no shared memory to fetch the next one's operands: then one step."""
    return config if rank <= config.block_r else replace(config, steps=1)


_pinned: tuple[int, ShrinkConfig | None, ExpandConfig | None] | None = None


@contextlib.contextmanager
def pinned(num_rows: int, shrink: ShrinkConfig | None, expand: ExpandConfig | None) -> Iterator[None]:
    """For the tuner: batches of the bucket of num_rows run these configs inside, None = the analytic default."""
    global _pinned
    _pinned = (row_bucket(num_rows), shrink, expand)
    try:
        with forgetting():
            yield
    finally:
        _pinned = None


def shrink_config(k: int, slices: int, rank: int, num_rows: int, dtype, device) -> ShrinkConfig:
    """Launch parameters of the shrink for x [num_rows, k] and A_s [slots, rank, k], tuned or analytic.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder.
    """
    return _shrink_config(k, slices, rank, row_bucket(num_rows), dtype, device)


@cached
def _shrink_config(k: int, slices: int, rank: int, bucket: int, dtype, device) -> ShrinkConfig:
    if _pinned and _pinned[0] == bucket:
        tuned = _pinned[1]
    else:
        tuned = find(shrink_file(k, slices), ShrinkConfig, rank, bucket, dtype, device)
    return tuned or shrink_default(k, slices, rank, bucket)


def expand_config(widths: tuple[int, ...], rank: int, num_rows: int, dtype, device) -> ExpandConfig:
    """Launch parameters of the expand for B_s [slots, widths[s], rank] and y with num_rows rows, tuned or analytic.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder.
    """
    return _expand_config(widths, rank, row_bucket(num_rows), dtype, device)


@cached
def _expand_config(widths: tuple[int, ...], rank: int, bucket: int, dtype, device) -> ExpandConfig:
    if _pinned and _pinned[0] == bucket:
        tuned = _pinned[2]
    else:
        tuned = find(expand_file(widths), ExpandConfig, rank, bucket, dtype, device)
    return _runnable(tuned, rank) if tuned else expand_default(widths, rank, bucket)


def row_buckets() -> tuple[int, ...]:
    """Numbers of rows that stand for all others: what a layer may be asked to run. None while configs are pinned."""
    return () if _pinned else BUCKETS
