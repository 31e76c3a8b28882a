"""Which configs are worth a measurement: those that fit, by the time that a simple model of the GPU gives them.

A kernel is waves of programs; a program is steps, each of which takes the longer of its share of the bandwidth and of a
memory latency spread over the stages in flight. The model only has to sort: the best few are measured.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

from ops_configs.files import MAX_SHARED_BYTES, shared_bytes
from ops_configs.lora import ExpandConfig, ShrinkConfig, expand_default, shrink_default
from ops_configs.store import padded

from ..config import PLANES_BATCH, chunk_k
from ..plan import tile_rows_for
from .layers import Layer

COUNT = 10
"""Candidates of a kernel, the analytic default among them."""
LATENCY_US = 0.9
START_US = 1.5


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know; the defaults are an H200's."""

    multiprocessors: int = 132
    shared_bytes: int = MAX_SHARED_BYTES
    registers: int = 65536
    bytes_per_us: float = 4.3e6


def batch_class(rows: int) -> int:
    """The number of rows that stands for all batches whose kernels are compiled alike."""
    if tile_rows_for(rows) == tile_rows_for(1):
        return 1
    return PLANES_BATCH if rows <= PLANES_BATCH else PLANES_BATCH + 1


def compile_key(config: ShrinkConfig | ExpandConfig) -> tuple:
    """What of a config is compiled in."""
    return tuple(getattr(config, f.name) for f in fields(config) if f.name != "programs_per_sm")


def _occupancy(gpu: Gpu, config: ShrinkConfig | ExpandConfig, rows: int) -> int:
    """Programs that a multiprocessor holds at a time, 0 when not one fits."""
    threads = 32 * config.num_warps
    registers = 40 * threads + rows * config.block_n + (config.block_n * getattr(config, "block_r", 0)) // 2
    if registers / threads > 255:
        return 0
    shared = max(shared_bytes(config), 1)
    return min(gpu.shared_bytes // shared, gpu.registers // registers, 2048 // threads, 32)


def _balance(config: ShrinkConfig | ExpandConfig) -> float:
    """Factor for the vector loads of a thread and step: four is a good number, fewer or more cost a little."""
    elements = math.prod(getattr(config, f.name) for f in fields(config) if f.name.startswith("block_"))
    return 1 + 0.05 * abs(math.log2(elements / (8 * 32 * config.num_warps) / 4))


def _waves_us(gpu: Gpu, programs: int, resident: int, steps: float, step_bytes: float, in_flight: int) -> float:
    """Time of `programs` programs of `steps` steps, `resident` on a multiprocessor at a time."""
    resident = min(resident, math.ceil(programs / gpu.multiprocessors))
    waves = math.ceil(programs / (resident * gpu.multiprocessors))
    bandwidth_us = step_bytes * resident * gpu.multiprocessors / gpu.bytes_per_us
    return waves * (START_US + steps * max(bandwidth_us, LATENCY_US / in_flight))


def shrink_us(gpu: Gpu, config: ShrinkConfig, layer: Layer, rank: int, rows: int, tiles: int) -> float:
    """Modelled time of the shrink; infinite for a config that does not fit."""
    tile = tile_rows_for(rows)
    if shared_bytes(config) > gpu.shared_bytes or not (resident := _occupancy(gpu, config, tile)):
        return math.inf
    planes = -(-layer.k // chunk_k(layer.k)) if rows <= PLANES_BATCH else 1
    programs = tiles * planes * -(-len(layer.widths) * rank // config.block_n)
    steps = math.ceil(layer.k / planes / config.block_k)
    step_bytes = 2 * config.block_k * (config.block_n + min(tile, rows / tiles))
    us = _waves_us(gpu, programs, resident, steps, step_bytes, max(config.num_stages - 1, 1))
    return us * _balance(config)


def expand_us(gpu: Gpu, config: ExpandConfig, layer: Layer, rank: int, rows: int, tiles: int) -> float:
    """Modelled time of the expand; infinite for a config that does not fit."""
    tile = tile_rows_for(rows)
    if shared_bytes(config) > gpu.shared_bytes or not (resident := _occupancy(gpu, config, tile)):
        return math.inf
    items = tiles * sum(-(-width // config.block_n) for width in layer.widths)
    programs = min(items, config.programs_per_sm * gpu.multiprocessors)
    live = min(tile, rows / tiles)
    item_bytes = 2 * config.block_n * (rank + 2 * live) + 4 * live * rank
    steps = math.ceil(items / programs) * math.ceil(rank / config.block_r)
    step_bytes = item_bytes / math.ceil(rank / config.block_r)
    return _waves_us(gpu, programs, min(resident, config.programs_per_sm), steps, step_bytes, 1) * _balance(config)


def _shrink_space(layer: Layer, rank: int) -> list[ShrinkConfig]:
    columns = padded(len(layer.widths) * rank)
    sizes = (
        [n for n in (16, 32, 64, 128) if n <= columns],
        [k for k in (64, 128, 256) if k <= padded(layer.k)],
        (1, 2, 4, 8),
        (2, 3, 4, 6),
    )
    return [ShrinkConfig(*values) for values in itertools.product(*sizes)]


def _expand_space(layer: Layer, rank: int) -> list[ExpandConfig]:
    ranks = padded(rank)
    sizes = (
        [n for n in (32, 64, 128, 256) if n <= padded(max(layer.widths))],
        sorted({min(ranks, 64), min(ranks, 128)}),
        (1, 2, 4, 8),
        (2,),
        (2, 4, 6, 8, 16),
    )
    return [ExpandConfig(*values) for values in itertools.product(*sizes)]


def _best(space: list, default, predicted) -> list:
    """The default and the best COUNT - 1 others, at most three of them with the same block sizes."""
    timed = sorted((predicted(config), i) for i, config in enumerate(space) if config != default)
    chosen, blocks = [default], {}
    for us, i in timed:
        config = space[i]
        key = tuple(getattr(config, f.name) for f in fields(config) if f.name.startswith("block_"))
        if us < math.inf and blocks.get(key, 0) < 3 and len(chosen) < COUNT:
            blocks[key] = blocks.get(key, 0) + 1
            chosen.append(config)
    return chosen


def shrink_candidates(gpu: Gpu, layer: Layer, rank: int, rows: int, adapters: int) -> list[ShrinkConfig]:
    """Configs to measure for the shrink of `rows` rows over `adapters` adapters; the analytic default comes first."""
    tiles = max(adapters, -(-rows // tile_rows_for(rows)))
    default = shrink_default(layer.k, len(layer.widths), rank, rows)
    space = _shrink_space(layer, rank)
    return _best(space, default, lambda config: shrink_us(gpu, config, layer, rank, rows, tiles))


def expand_candidates(gpu: Gpu, layer: Layer, rank: int, rows: int, adapters: int) -> list[ExpandConfig]:
    """Configs to measure for the expand of `rows` rows over `adapters` adapters; the analytic default comes first."""
    tiles = max(adapters, -(-rows // tile_rows_for(rows)))
    default = expand_default(layer.widths, rank, rows)
    space = _expand_space(layer, rank)
    return _best(space, default, lambda config: expand_us(gpu, config, layer, rank, rows, tiles))
