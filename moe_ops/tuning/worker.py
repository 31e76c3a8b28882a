"""What a process of a GPU does with a layer and a number of tokens: compile jobs, a sweep, a second measurement.

sweep of all candidates -> the best one's neighbours -> on other data, in turns with the default: `kept` or not
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ops_configs.moe import LayerConfig, MoeConfig, layer_default, runs_direct, runs_without_plan
from ops_configs.tuning import Steps, most_shared

from .candidates import HALVES, Half, block_ms, candidates, neighbours
from .layers import Target

MARGIN = 0.03
"""A tuned entry is kept if it takes at least this fraction of a layer's time away."""
NOISE = 0.01
"""With the other kind of routing it may be slower by this fraction."""


@dataclass(frozen=True)
class Settings:
    """What all measurements of a run share; deadline: on time.monotonic's clock, of the whole machine."""

    routing: str
    compile_processes: int
    deadline: float
    seed: int
    tune: bool = True


@dataclass(frozen=True)
class Unit:
    """Work that one GPU does at a time; start: for the second measurement, the best of the sweep."""

    target: Target
    tokens: int
    start: LayerConfig | None = None

    cases = 1

    @property
    def itemsize(self) -> int:
        import torch

        return self.target.layer.itemsize(getattr(torch, self.target.hidden_dtype))

    def default(self, shared: int) -> LayerConfig:
        """The analytic default for a GPU with that many bytes of shared memory."""
        return layer_default(self.target.layer, self.tokens, self.itemsize, shared=shared)

    def candidates(self, shared: int) -> dict[int, dict[Half, list[MoeConfig]]]:
        """Of the sweep, by rows of a tile and half; the analytic default first, alone where it is not used either."""
        if runs_direct(self.target.layer, self.tokens):
            default = self.default(shared)
            return {default.gate_up.block_m: {half: [getattr(default, half)] for half in HALVES}}
        arguments = self.itemsize, shared
        return {
            block_m: {half: candidates(self.target.layer, half, self.tokens, block_m, *arguments) for half in HALVES}
            for block_m in block_ms(self.target.layer, self.tokens, self.itemsize)
        }

    def neighbours(self, config: LayerConfig, half: Half, shared: int) -> list[MoeConfig]:
        if runs_direct(self.target.layer, self.tokens):
            return []
        return neighbours(self.target.layer, half, getattr(config, half), self.itemsize, shared)


def config_of(record: dict) -> LayerConfig:
    """A config from its JSON object."""
    return LayerConfig(*(MoeConfig(**record[half]) for half in HALVES))


def kept(record: dict) -> bool:
    """Whether a second measurement lets an entry stay: right, faster by MARGIN, and no slower on the other routing."""
    return (
        record["error"] <= record["tolerance"]
        and record["us"] <= (1 - MARGIN) * record["default_us"]
        and record["other_us"] <= (1 + NOISE) * record["other_default_us"]
    )


def _with_half(target: Target, half: Half, config: MoeConfig, shared: int) -> LayerConfig:
    """A half's config, beside the default of the other one for such tiles."""
    default = layer_default(target.layer, 1, Unit(target, 1).itemsize, config.block_m, shared)
    return replace(default, **{half: config})


def jobs(unit: Unit, settings: Settings, shared: int) -> Iterator[tuple[Target, Half, MoeConfig, bool]]:
    """Kernels to compile for a unit, with or without a plan; none where it runs choice by choice."""
    layer = unit.target.layer
    if not settings.tune or runs_direct(layer, unit.tokens):
        return
    for half in HALVES:
        if unit.start:
            found = unit.neighbours(unit.start, half, shared)
        else:
            found = [config for lists in unit.candidates(shared).values() for config in lists[half]]
        for config in found:
            planned = not runs_without_plan(layer, _with_half(unit.target, half, config, shared), unit.tokens)
            yield unit.target, half, config, planned


@functools.lru_cache(2)
def _small(target: Target, device: int, planned: bool):
    """A bench of little memory: over few experts, or without a plan, whose kernels are made for their number, all."""
    import torch

    from .measure import Bench

    if planned:
        target = replace(target, layer=replace(target.layer, experts=target.layer.top_k, global_experts=None))
    return Bench(target, torch.device("cuda", device), clock=False, overlapping=not planned)


def compile_job(settings: Settings, device: int, target: Target, half: Half, config: MoeConfig, planned: bool) -> None:
    """Compile one kernel, in a process of the pool, by running it on next to nothing: the smallest batch that does."""
    import torch

    from ops_configs.moe import pinned

    with contextlib.suppress(Exception):
        torch.cuda.set_device(device)
        bench, pair = _small(target, device, planned), _with_half(target, half, config, most_shared(device))
        batch = next(
            bench.batch(tokens)
            for tokens in itertools.count(1)
            if not runs_direct(bench.layer, tokens) and runs_without_plan(bench.layer, pair, tokens) != planned
        )
        with pinned(pair):
            batch.run(0)


def measure_unit(unit: Unit, settings: Settings, device, shared: int) -> Iterator[dict]:
    """The record of a unit."""
    from .measure import Bench, sweep

    bench = Bench(unit.target, device, settings.seed + bool(unit.start))
    batch = bench.batch(unit.tokens, settings.routing)
    if not settings.tune:
        batch.settle()
        yield {**identity("default", unit), "us": batch.time(None, replays=15), "error": batch.error(None)}
    elif unit.start is None:
        started = time.monotonic()
        found = sweep(batch, unit.candidates(shared))
        config = found.right()
        default_us = next(iter(found.times.values()))
        record = {"config": asdict(config), "us": found.times[config], "default_us": default_us}
        yield {**identity("sweep", unit), **record, "measured": len(found.times), "s": time.monotonic() - started}
    else:
        yield verify(unit, settings, bench, batch, shared)


def verify(unit: Unit, settings: Settings, bench, batch, shared: int) -> dict:
    """Record of a second measurement: the neighbours on one batch, the winner beside the default on two others."""
    from .measure import ROUTINGS, Sweep

    found = Sweep(batch, unit.default(shared))
    config = unit.start
    for half in HALVES:
        config = found.improve(config, half, unit.neighbours(config, half, shared))
    config = found.right()
    record = {"start": asdict(unit.start), "config": asdict(config), "error": 0.0, "tolerance": batch.tolerance}
    kinds = sorted(ROUTINGS, key=lambda kind: kind != settings.routing)
    for prefix, kind in zip(("", "other_"), kinds, strict=True):
        other = bench.batch(unit.tokens, kind)
        other.settle()
        record[f"{prefix}default_us"], record[f"{prefix}us"] = other.compare([None, config])
        error = other.error(config)
        record["error"] = max(record["error"], math.inf if math.isnan(error) else error)
    return {**identity("verify", unit), **record}


def identity(stage: str, unit: Unit) -> dict:
    """What a record is of."""
    layer = unit.target.layer
    return {
        "stage": stage,
        "hidden": layer.hidden,
        "dtype": unit.target.dtype,
        "block_shape": list(layer.block_shape) if layer.block_shape else None,
        "layer": layer.name,
        "tokens": unit.tokens,
    }


STEPS = Steps(jobs, compile_job, measure_unit)
