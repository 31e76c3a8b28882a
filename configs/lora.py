"""Launch parameters of the LoRA kernels: tuned ones from files, and analytic defaults from the sizes of a layer.

Nothing here changes a result: the order of summation is fixed in `lora_ops.config`. The thresholds come from tuning
the layers of four models on an H200 (ranks 8 to 128, 1 to 8192 tokens; benchmarks/results/NVIDIA_H200/tune_lora.csv),
and from alternatives that took turns over the layers of three models on an H100.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import files
from .files import expand_file, shrink_file
from .store import (
    BUCKETS,
    SMALL_BATCH,
    Kind,
    cached,
    find,
    forgetting,
    nearest,
    padded,
    row_bucket,
    shared_bytes,
)

TILE_ROWS = (16, 64)
"""Rows of a tile: of batches of up to SMALL_BATCH rows, and of larger ones. The former may take wide tiles instead, of
as many rows as the latter: see lora_ops/plan.py."""


def tile_rows_for(num_rows: int) -> int:
    """Rows of a tile for a batch of `num_rows` rows."""
    return TILE_ROWS[num_rows > SMALL_BATCH]


@dataclass(frozen=True)
class ShrinkConfig:
    """Launch parameters of the shrink.

    block_n: columns of a program, of the S * R columns of all slices; block_k: elements of K a step; num_warps,
    num_stages: as Triton takes them. With four warps or more, kernels of 65 to SMALL_BATCH rows and ranks above 32 hold
    wide tiles, too, with a quarter of block_k and one stage more.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    """Launch parameters of the expand.

    block_n: output features of a step; block_r: ranks of a product; num_warps, num_stages: as Triton takes them;
    steps: steps of a program, one after another. With four warps or more, above rank 64 two, kernels of 65 to
    SMALL_BATCH rows and ranks above 32 that read complete sums hold wide tiles, too, in twice as many steps of half of
    block_n, of 64 at most.
    """

    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    steps: int


SIZE = r"[1-9]\d*"
SHRINK_NAME = re.compile(rf"lora_shrink,k={SIZE},slices={SIZE}\.json")
EXPAND_NAME = re.compile(rf"lora_expand,widths={SIZE}(\+{SIZE})*,planes={SIZE}\.json")


def _read(path: Path, kind: type, name: re.Pattern, example: str) -> files.ConfigFile:
    """A file of a kernel. Another name is a problem: that of an expand without planes is of an earlier version."""
    file = files.read(path, kind, BUCKETS)
    if name.fullmatch(path.name):
        return file
    return replace(file, problems=(*file.problems, files.unread(path, example)))


SHRINK = Kind("lora_ops", "lora_shrink", lambda path: _read(path, ShrinkConfig, SHRINK_NAME, shrink_file(4096, 3)))
EXPAND = Kind("lora_ops", "lora_expand", lambda path: _read(path, ExpandConfig, EXPAND_NAME, expand_file([4096], 4)))
KINDS = (SHRINK, EXPAND)


def shrink_default(k: int, slices: int, rank: int, num_rows: int) -> ShrinkConfig:
    """Launch parameters of the shrink for x [num_rows, k] and A_s [slots, rank, k], where no tuned ones are known."""
    ranks, columns = padded(rank), padded(slices * rank)
    if num_rows <= SMALL_BATCH:
        block_k = min(256, padded(k))
        if num_rows == 1:
            return ShrinkConfig(16, block_k, num_warps=4, num_stages=4)
        if num_rows <= 4 or ranks <= 16:
            return ShrinkConfig(16, block_k, num_warps=2, num_stages=4)
        if ranks == 32 and num_rows <= TILE_ROWS[0]:
            return ShrinkConfig(32, min(128, block_k), num_warps=2, num_stages=4)
        return ShrinkConfig(32, block_k, num_warps=4, num_stages=3)  # four warps also hold wide tiles
    if slices == 1 and num_rows <= 1024 and ranks >= 64:  # few programs: they share out the columns
        if ranks == 64:
            return ShrinkConfig(32, min(128, padded(k)), num_warps=4, num_stages=4)
        if k > 4096:
            return ShrinkConfig(64, 128, num_warps=8, num_stages=4)
        return ShrinkConfig(64, min(64, padded(k)), num_warps=4, num_stages=6)
    if columns == 256 and num_rows > 1024:  # x comes once
        return ShrinkConfig(256, min(64, padded(k)), num_warps=8, num_stages=5)
    if columns > 128 or (columns == 128 and num_rows > 1024):
        stages = 6 if num_rows > 1024 else 4
        return ShrinkConfig(128, min(64, padded(k)), num_warps=4, num_stages=stages)
    if columns == 128 or (columns == 64 and num_rows > 4096):
        return ShrinkConfig(64, min(128, padded(k)), num_warps=8, num_stages=4)
    if columns == 64:
        return ShrinkConfig(64, min(64, padded(k)), num_warps=4, num_stages=6)
    return ShrinkConfig(columns, min(128, padded(k)), num_warps=4, num_stages=4)


def expand_default(widths: tuple[int, ...], rank: int, num_rows: int, planes: int) -> ExpandConfig:
    """Launch parameters of the expand for B_s [slots, widths[s], rank], where no tuned ones are known.

    planes: of h, which it adds up; 1: complete sums.
    """
    ranks, widest, whole = padded(rank), padded(max(widths)), planes == 1
    if num_rows <= SMALL_BATCH:
        block_r, warps = min(ranks, 64), 1 if ranks <= 32 else 2
        wide = widest > 8192
        gate_up = len(widths) == 2 and widest > 4096
        if planes > 8 and ranks >= 32:  # eight warps add them up, at rank 32 once for two steps
            block_n = 128 if ranks > 64 and num_rows <= 4 else 256
            stages = 3 if ranks == 32 or block_n == 128 else 2
            steps = 2 if ranks == 32 and all(width % (2 * block_n) == 0 for width in widths) else 1
            config = ExpandConfig(min(block_n, widest), block_r, num_warps=8, num_stages=stages, steps=steps)
        elif gate_up and ((num_rows == 1 and ranks == 64) or (1 < num_rows <= 4 and ranks > 64)):
            config = ExpandConfig(256, block_r, num_warps=4, num_stages=2, steps=1)
        elif num_rows == 1 or (num_rows <= 4 and not gate_up):
            block_n, warps = (64, warps) if ranks <= 64 else (128, 4)
            config = ExpandConfig(min(block_n, widest), block_r, warps, num_stages=2, steps=1)
        elif wide and num_rows > 4 and ranks <= 64:
            warps = 4 if whole and ranks > 32 and num_rows > TILE_ROWS[1] else 2  # four warps also hold wide tiles
            config = ExpandConfig(128, block_r, warps, num_stages=3, steps=4)
        elif whole and num_rows > TILE_ROWS[0] and (ranks > 64 or (ranks > 32 and len(widths) > 1)):
            block_n = 256 if len(widths) == 1 and num_rows <= TILE_ROWS[1] else 128
            steps = 2 if ranks <= 64 and num_rows > TILE_ROWS[1] else 1
            config = ExpandConfig(min(block_n, widest), block_r, num_warps=4, num_stages=2, steps=steps)
        else:
            if 4 < planes <= 8 and not gate_up:
                warps = 4
            config = ExpandConfig(min(256, widest), block_r, warps, num_stages=2, steps=1)
        return _runnable(config, rank)
    if ranks > 64:
        block_n, stages, steps = 64, 2, 8 if num_rows > 1024 else 4
    elif ranks == 64 and whole:
        block_n, stages, steps = 64, 2, 4
    elif ranks == 64:
        block_n, stages, steps = 64, 3, 8 if num_rows > 1024 else 4
    else:
        block_n, stages, steps = 64 if whole and num_rows <= 1024 else 128, 3, 4
    block_n = min(block_n, widest)
    blocks = num_rows // TILE_ROWS[1] * sum(-(-width // block_n) for width in widths)
    while steps > 1 and blocks < 128 * steps:  # too few programs
        steps //= 2
    stages = stages if steps > 1 else 2
    return _runnable(ExpandConfig(block_n, min(ranks, 128), 4, num_stages=stages, steps=steps), rank)


def _runnable(config: ExpandConfig, rank: int) -> ExpandConfig:
    """A step of several products leaves no shared memory to fetch the next one's operands: then one step, of the
    kernel's own tiles."""
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


def fitted(config: ShrinkConfig, num_rows: int, itemsize: int, shared: int) -> ShrinkConfig:
    """With fewer stages, then shorter steps, if a program would need more than `shared` bytes of shared memory."""
    rows = tile_rows_for(num_rows)
    while config.num_stages * (rows + config.block_n) * config.block_k * itemsize > shared:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, block_k=config.block_k // 2)
    return config


def _fitted(config, num_rows: int, dtype, device):
    """A default that fits the GPU; see `fitted`.

    For fp32, multiplied on CUDA cores, with fewer columns and ranks, whose sums and factors a thread keeps: the
    defaults are made for 2-byte elements, which tensor cores multiply.
    """
    if dtype.itemsize > 2:
        config = replace(config, block_n=min(config.block_n, 64))
    if isinstance(config, ShrinkConfig):
        return fitted(config, num_rows, dtype.itemsize, shared_bytes(device))
    return replace(config, block_r=min(config.block_r, 16)) if dtype.itemsize > 2 else config


def _nearest_expand(entries: files.Entries, rank: int, bucket: int) -> files.Key | None:
    """Of up to twice or half as many rows: a file may hold only those batches in which a layer reads so many planes."""
    return nearest({key: entries[key] for key in entries if bucket / 2 <= key[1] <= 2 * bucket}, rank, bucket)


def _find(kind: Kind, name: str, rank: int, bucket: int, dtype, device):
    near = nearest if kind is SHRINK else _nearest_expand
    needed = functools.partial(files.shared_bytes, rows=tile_rows_for(bucket))
    unfit = "" if dtype.itemsize == 2 else f"files are for fp16 and bf16, not {dtype}"
    return find(kind, [name], rank, bucket, device, near, needed, unfit)


def shrink_config(k: int, slices: int, rank: int, num_rows: int, dtype, device) -> ShrinkConfig:
    """Launch parameters of the shrink for x [num_rows, k] and A_s [slots, rank, k], tuned or analytic.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
    """
    return _shrink_config(k, slices, rank, row_bucket(num_rows), dtype, device)


@cached
def _shrink_config(k: int, slices: int, rank: int, bucket: int, dtype, device) -> ShrinkConfig:
    if _pinned and _pinned[0] == bucket:
        tuned = _pinned[1]
    else:
        tuned = _find(SHRINK, shrink_file(k, slices), rank, bucket, dtype, device)
    return tuned or _fitted(shrink_default(k, slices, rank, bucket), bucket, dtype, device)


def expand_config(widths: tuple[int, ...], rank: int, num_rows: int, dtype, device, planes: int) -> ExpandConfig:
    """Launch parameters of the expand for B_s [slots, widths[s], rank] and y with num_rows rows, tuned or analytic.

    planes: of h, which it adds up; 1: complete sums.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
    """
    return _expand_config(widths, rank, row_bucket(num_rows), dtype, device, planes)


@cached
def _expand_config(widths: tuple[int, ...], rank: int, bucket: int, dtype, device, planes: int) -> ExpandConfig:
    if _pinned and _pinned[0] == bucket:
        tuned = _pinned[2]
    else:
        tuned = _find(EXPAND, expand_file(widths, planes), rank, bucket, dtype, device)
    return _runnable(tuned or _fitted(expand_default(widths, rank, bucket, planes), bucket, dtype, device), rank)


def row_buckets() -> tuple[int, ...]:
    """Numbers of rows that stand for all others: what a layer may be asked to run. None while configs are pinned."""
    return () if _pinned else BUCKETS
