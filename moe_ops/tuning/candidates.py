"""Which launch parameters are worth a measurement: the whole space, pruned by a model of a GPU like an H200.

all blocks and warps -> those that fit (shared memory, registers) -> those that the model finds fast enough -> sweep
-> the best one's `neighbours`: other stages, warps, orders of tiles and ways to read and store

The model knows bytes, products, waves and latency, not instructions: it leaves out what cannot win, the clock decides.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from ops_configs.files import MAX_SHARED_BYTES
from ops_configs.moe import (
    TILE_ROWS,
    MoeConfig,
    MoeLayer,
    layer_default,
    may_persist,
    persistent_fits,
    shared_memory,
    stationary_fits,
)
from ops_configs.store import padded

MAX_STAGES, USUAL_STAGES = 6, 4
COUNT = 40
"""Candidates of a half for each number of rows of a tile, at most."""
SLOWEST = 2.0
"""A candidate that the model finds this many times slower than the best is left out."""
MULTIPROCESSORS = 132
MEMORY_BYTES_US, CACHE_BYTES_US = 4.3e6, 9e6
"""Of the memory and of the level 2 cache."""
PRODUCTS_US = {1: 700e6, 2: 350e6, 4: 25e6}
"""Multiplications with addition of all multiprocessors, by bytes of an element."""
STEP_US = 0.7
"""From the load of a step's operands to their use, when nothing was loaded ahead."""
LAUNCH_US = 1.0
"""Of one wave of programs: their start, the tile map, the store."""
MAX_ACCUMULATORS = {1: 64, 2: 128, 4: 32}
"""Sums of a thread that stay in registers, by bytes of an element; 8-bit products have those of a step beside all."""

Half = str
"""gate_up or down."""
HALVES: tuple[Half, Half] = ("gate_up", "down")


def sizes(layer: MoeLayer, half: Half) -> tuple[int, int, int]:
    """(n, k, products) of a half: columns of its output, columns of its input, products of a program."""
    if half == "gate_up":
        return layer.intermediate, layer.hidden, layer.products
    return layer.hidden, layer.intermediate, 1


def expected_tiles(layer: MoeLayer, tokens: int, block_m: int) -> tuple[float, float]:
    """(tiles, touched experts) to expect on this device when the router has no favourites."""
    routed = layer.global_experts or layer.experts
    touched = layer.experts * (1 - (1 - layer.top_k / routed) ** tokens)
    rows = tokens * layer.top_k * layer.experts / routed
    return touched * max(1.0, rows / max(touched, 1e-9) / block_m + 0.5 * (rows > touched * block_m)), touched


def model_us(layer: MoeLayer, half: Half, tokens: int, config: MoeConfig, itemsize: int) -> float:
    """Microseconds that a half takes, by the model."""
    n, k, products = sizes(layer, half)
    tiles, touched = expected_tiles(layer, tokens, config.block_m)
    blocks, steps = -(-n // config.block_n), -(-k // config.block_k)
    programs = tiles * blocks
    shared = shared_memory(config, products, itemsize, k)
    registers = config.block_m * config.block_n * products / (32 * config.num_warps) + 48
    resident = min(MAX_SHARED_BYTES / shared, 65536 / (registers * 32 * config.num_warps), 64 / config.num_warps)
    slots = MULTIPROCESSORS * max(1, int(resident))
    waves = math.ceil(programs / slots)
    rows = 0 if config.stationary else config.block_m  # read once
    step_elements = (rows + products * config.block_n) * config.block_k
    wasted = 2 if config.block_m < 64 and itemsize < 4 else 1  # half the rate of wgmma
    compute = config.block_m * config.block_n * products * steps * config.block_k * wasted / PRODUCTS_US[itemsize]
    cache = step_elements * steps * itemsize / CACHE_BYTES_US
    running = min(programs, slots)
    memory = touched * n * products * k * itemsize / MEMORY_BYTES_US
    latency = steps * STEP_US / max(1, config.num_stages - 1)
    return max(waves * running * max(compute, cache), memory, waves * latency) + waves * LAUNCH_US


def runs(layer: MoeLayer, half: Half, config: MoeConfig, itemsize: int, shared: int) -> bool:
    """Whether a config fits registers and shared memory and has no needless padding."""
    n, k, products = sizes(layer, half)
    sums = config.block_m * config.block_n * products / (32 * config.num_warps)
    if not 1 <= sums <= MAX_ACCUMULATORS[itemsize] or shared_memory(config, products, itemsize, k) > shared:
        return False
    if config.stationary and (config.persistent or not stationary_fits(k, config.block_k, layer.block_shape)):
        return False
    if config.block_n > padded(n) or config.block_k > max(padded(k), 32):
        return False
    if not config.stationary and config.num_stages > max(2, -(-k // config.block_k)):
        return False
    return not (layer.block_shape and layer.block_shape[1] % config.block_k)


def warps_of(block_m: int) -> tuple[int, ...]:
    """Numbers of warps; wgmma, from tiles of 64 rows up, takes groups of four."""
    return (4, 8) if block_m >= 64 else (2, 4, 8)


def space(half: Half, block_m: int, itemsize: int, shared: int) -> list[MoeConfig]:
    """All blocks, warps and stages for tiles of block_m rows; large tiles of down in persistent programs."""
    warps = warps_of(block_m)
    grid = itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), warps, range(2, MAX_STAGES + 1))
    if itemsize == 4:  # products on CUDA cores: operands live in registers
        grid = itertools.product((16, 32, 64), (16, 32, 64), warps, (2, 3))
    persistent = half == "down" and block_m == 128 and itemsize < 4 and persistent_fits(shared)
    group_m = 8 if block_m >= 64 else 1
    found = [MoeConfig(block_m, *values, group_m=group_m, persistent=persistent) for values in grid]
    if half == "down" and block_m >= 64 and itemsize == 1:
        found += [replace(config, group_m=1, persistent=False, stationary=True) for config in found]
    return found


def block_ms(layer: MoeLayer, tokens: int, itemsize: int) -> list[int]:
    """Rows of a tile to try, the analytic default's first: those beside it, too."""
    default = layer_default(layer, tokens, itemsize).gate_up.block_m
    index = TILE_ROWS.index(default)
    near = [TILE_ROWS[i] for i in (index - 1, index + 1) if 0 <= i < len(TILE_ROWS)]
    if layer.top_k * tokens <= 16:  # a tile has one row at most
        near = []
    return [default, *near]


def candidates(
    layer: MoeLayer, half: Half, tokens: int, block_m: int, itemsize: int, shared: int = MAX_SHARED_BYTES
) -> list[MoeConfig]:
    """Configs to measure for a half: the analytic default for such tiles, then the model's favourites.

    Of those that differ in their stages alone, the deepest of USUAL_STAGES go first; the others fill the list up.
    """
    default = getattr(layer_default(layer, tokens, itemsize, block_m, shared), half)
    everything = space(half, block_m, itemsize, shared)
    fitting = [config for config in everything if runs(layer, half, config, itemsize, shared)]
    times = {config: model_us(layer, half, tokens, config, itemsize) for config in fitting if config != default}
    usual: dict[tuple[int, int, int, bool], MoeConfig] = {}
    for config in times:
        blocks = config.block_n, config.block_k, config.num_warps, config.stationary
        if config.num_stages <= USUAL_STAGES and config.num_stages > getattr(usual.get(blocks), "num_stages", 0):
            usual[blocks] = config
    first = set(usual.values())
    slowest = SLOWEST * min(times.values(), default=0.0)
    best = sorted(times, key=lambda config: (config not in first, times[config], -config.block_k))
    return [default, *(config for config in best if times[config] <= slowest)][:COUNT]


def neighbours(
    layer: MoeLayer, half: Half, config: MoeConfig, itemsize: int, shared: int = MAX_SHARED_BYTES
) -> list[MoeConfig]:
    """Configs to measure beside the best of a sweep: the same blocks with another number of one thing."""
    others = {
        "num_stages": range(2, MAX_STAGES + 1),
        "num_warps": warps_of(config.block_m),
        "group_m": (1,) if config.stationary else (1, 4, 8, 16, 32) if config.block_m >= 64 else (1, 4),
    }
    if config.block_m >= 64 and itemsize < 4:
        persistent = persistent_fits(shared) and may_persist(half, config.block_m)
        others["persistent"] = (False, True) if persistent else (False,)
        if half == "gate_up" and layer.quant is None:
            others |= {"permute": (False, True), "tma_store": (False, True)}
    found = [replace(config, **{name: value}) for name, values in others.items() for value in values]
    return [other for other in found if other != config and runs(layer, half, other, itemsize, shared)]
