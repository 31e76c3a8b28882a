"""What a process of a GPU does with its layers: compile jobs, sweeps and second measurements."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ops_configs.files import MAX_SHARED_BYTES
from ops_configs.lora import ExpandConfig, ShrinkConfig
from ops_configs.tuning import Steps

from .candidates import batch_class, expand_candidates, shrink_candidates
from .decide import Case
from .layers import Layer

CHUNK = 4
"""Pairs of kernels that a process of the pool compiles at a time."""

Pair = tuple[ShrinkConfig | None, ExpandConfig | None]


@dataclass(frozen=True)
class Settings:
    """What all measurements of a run share; deadline: on time.monotonic's clock, of the whole machine."""

    max_loras: int
    dtype: str
    compile_processes: int
    deadline: float
    seed: int


@dataclass(frozen=True)
class Unit:
    """Work that one GPU does at a time: a layer and rank, with its numbers of tokens.

    tuned: for a verification, the configs of shrink and expand for each number of tokens.
    """

    layer: Layer
    rank: int
    tokens: tuple[int, ...]
    tuned: tuple[Pair, ...] | None = None

    @property
    def cases(self) -> int:
        return len(self.tokens)

    def pairs(self, tokens: int) -> list[Pair]:
        """The pairs of a verification: first the defaults, then each half tuned alone, then both."""
        shrink, expand = self.tuned[self.tokens.index(tokens)]
        halves = itertools.product({None: 0, shrink: 0}, {None: 0, expand: 0})
        return sorted(halves, key=lambda pair: sum(config is not None for config in pair))


def candidates(unit: Unit, tokens: int, shared: int) -> tuple[list[ShrinkConfig], list[ExpandConfig]]:
    """Candidates of shrink and expand of a unit, the analytic default of each first."""
    arguments = (unit.layer, unit.rank, tokens, shared)
    return shrink_candidates(*arguments), expand_candidates(*arguments)


def compile_jobs(unit: Unit, shared: int = MAX_SHARED_BYTES) -> Iterator[tuple[int, list[Pair]]]:
    """(rows, pairs) to compile for a unit: each kernel once for all batches that share it."""
    for _, group in itertools.groupby(unit.tokens, lambda tokens: batch_class(unit.layer, unit.rank, tokens)):
        batches = list(group)
        shrinks: dict[ShrinkConfig, None] = {}
        expands: dict[ExpandConfig, None] = {}
        for tokens in batches:
            for found, configs in zip((shrinks, expands), candidates(unit, tokens, shared), strict=True):
                found.update(dict.fromkeys(configs))
        pairs = list(itertools.zip_longest(shrinks, expands))
        for first in range(0, len(pairs), CHUNK):
            yield batches[0], pairs[first : first + CHUNK]


def _jobs(unit: Unit, settings: Settings, shared: int) -> Iterator[tuple]:
    for rows, pairs in [] if unit.tuned else compile_jobs(unit, shared):
        yield unit.layer, unit.rank, rows, tuple(pairs)


def _compile(settings: Settings, device: int, layer: Layer, rank: int, rows: int, pairs: tuple[Pair, ...]) -> None:
    import contextlib

    import torch

    from .measure import compile_pair

    for pair in pairs:
        with contextlib.suppress(Exception):
            compile_pair(layer, rank, rows, pair, getattr(torch, settings.dtype), torch.device("cuda", device))


def measure_unit(unit: Unit, settings: Settings, device, shared: int) -> Iterator[dict]:
    """Records of a unit, one for each number of tokens, until the deadline."""
    import torch

    from .measure import Bench, sweep

    dtype = getattr(torch, settings.dtype)
    bench = Bench(unit.layer, unit.rank, settings.max_loras, dtype, device, settings.seed + bool(unit.tuned))
    for tokens in unit.tokens:
        if time.monotonic() > settings.deadline:
            return
        batch = bench.batch(tokens)
        if unit.tuned:
            yield verify(unit, tokens, batch)
            continue
        shrinks, expands = candidates(unit, tokens, shared)
        best, times = sweep(batch, shrinks, expands, torch.finfo(dtype).eps)
        default = (shrinks[0], expands[0])
        tuned = [None if config == first else asdict(config) for config, first in zip(best, default, strict=True)]
        yield {
            **_identity("sweep", unit, tokens),
            "shrink": tuned[0],
            "expand": tuned[1],
            "us": times[best],
            "default_us": times[default],
            "measured": len(times),
        }


def verify(unit: Unit, tokens: int, batch) -> dict:
    """Record of a second measurement; a pair that disagrees with the reference counts as infinitely slow."""
    import torch

    pairs = unit.pairs(tokens)
    batch.settle()
    tolerance = torch.finfo(batch.x.dtype).eps
    errors = [batch.error(pair) for pair in pairs]
    times = batch.compare(pairs)
    shrink, expand = unit.tuned[unit.tokens.index(tokens)]
    return {
        **_identity("verify", unit, tokens),
        "shrink": shrink and asdict(shrink),
        "expand": expand and asdict(expand),
        "times": [
            [pair[0] is not None, pair[1] is not None, us if error <= tolerance else 1e9, error]
            for pair, us, error in zip(pairs, times, errors, strict=True)
        ],
    }


STEPS = Steps(_jobs, _compile, measure_unit)


def _identity(stage: str, unit: Unit, tokens: int) -> dict:
    return {"stage": stage, "layer": str(unit.layer), "rank": unit.rank, "tokens": tokens}


def case_of(record: dict, parse) -> Case:
    """The case of a record; `parse` makes a layer from its name."""
    return Case(parse(record["layer"]), record["rank"], record["tokens"])
