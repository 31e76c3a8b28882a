"""Measurement of a layer: shrink and expand as `lora_linear` launches them, in CUDA graphs, with cold weights."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ops_configs.clock import GRAPH_US, LOSER, Clock, too_large
from ops_configs.lora import TILE_ROWS, ExpandConfig, ShrinkConfig, pinned

from .. import reference
from ..launches import capturing_one_step, plan_tiles, run_linear
from ..ops import lora_linear
from ..plan import LoraPlan, plan_args
from .layers import Layer

PREFILL_TOKENS = 1024
"""From this many tokens up `token_slots` makes PREFILL_SEQUENCES sequences, below it each token is a request."""
PREFILL_SEQUENCES = 8
COLD_BYTES = 96 << 20
MAX_CALLS = 32

Pair = tuple[ShrinkConfig | None, ExpandConfig | None]
"""Configs of shrink and expand; None is the analytic default."""


def token_slots(tokens: int, max_loras: int) -> np.ndarray:
    """int32 [tokens]: adapter of each token; round robin for decode, sequences side by side for prefill."""
    if tokens < PREFILL_TOKENS:
        return (np.arange(tokens) % min(tokens, max_loras)).astype(np.int32)
    adapters = min(PREFILL_SEQUENCES, max_loras)
    return (np.arange(tokens) * adapters // tokens).astype(np.int32)


def mixes(tokens: int, max_loras: int) -> list[np.ndarray]:
    """What a batch of so many tokens may hold, int32 [tokens] each; all count alike.

    The batch of `token_slots`. Of decode of more rows than a tile has also one of a single adapter. Of prefill of more
    adapters than PREFILL_SEQUENCES, with a tile of rows for each or more, also one of them all, whose sequences end
    anywhere in a tile.
    """
    found = [token_slots(tokens, max_loras)]
    if TILE_ROWS[0] < tokens < PREFILL_TOKENS:
        found.append(np.zeros_like(found[0]))
    elif tokens >= TILE_ROWS[1] * max_loras and max_loras > PREFILL_SEQUENCES:
        found.append(np.sort(np.random.default_rng(tokens).integers(0, max_loras, tokens, dtype=np.int32)))
    return found


def num_adapters(tokens: int, max_loras: int) -> int:
    """Adapters in use by `token_slots`."""
    return min(tokens if tokens < PREFILL_TOKENS else PREFILL_SEQUENCES, max_loras)


def compile_pair(layer: Layer, rank: int, rows: int, pair: Pair, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels of a pair for batches like one of `rows` rows: a launch of no tiles."""
    plan = LoraPlan(1, 1, device)
    x = torch.empty(1, layer.k, dtype=dtype, device=device)
    y = torch.empty(1, sum(layer.widths), dtype=dtype, device=device)
    a = [torch.empty(1, rank, layer.k, dtype=dtype, device=device) for _ in layer.widths]
    b = [torch.empty(1, n, rank, dtype=dtype, device=device) for n in layer.widths]
    arena, _, layout = plan_args(plan)
    with torch.cuda.device(device), pinned(rows, *pair):
        run_linear(y, x, a, b, 1.0, 0, True, replace(plan_tiles(arena, layout, rows), count=0))


class Bench:
    """Random weights of one layer and rank on a GPU; `batch` gives a batch of so many tokens over them.

    Args:
        layer, rank: what is measured.
        max_loras: adapters at most.
        dtype, device: of weights, x and y.
        seed: of all data.
        cold_bytes: of weights that pass before any are read again.
        clock: False where nothing is timed.
    """

    def __init__(
        self,
        layer: Layer,
        rank: int,
        max_loras: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        cold_bytes: int = COLD_BYTES,
        clock: bool = True,
    ) -> None:
        self.layer, self.rank, self.max_loras, self.dtype, self.device = layer, rank, max_loras, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.adapter_bytes = 2 * rank * (layer.k * len(layer.widths) + sum(layer.widths))
        cold = math.ceil(cold_bytes / self.adapter_bytes)
        self.slots = max(max_loras, min(max_loras + cold, MAX_CALLS * max_loras))
        self.a = [self._randn(self.slots, rank, layer.k, scale=layer.k**-0.5) for _ in layer.widths]
        self.b = [self._randn(self.slots, n, rank, scale=rank**-0.5) for n in layer.widths]
        self.clock = Clock(device) if clock else None

    def _randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype).mul_(scale)

    def batch(self, tokens: int) -> Batch:
        return Batch(self, tokens)


class Batch:
    """One number of tokens over the weights of a bench, each call on other adapters than the one before.

    Plans and weights are those of a server with max_loras slots, of which a call uses the first.
    """

    def __init__(self, bench: Bench, tokens: int) -> None:
        self.bench, self.tokens = bench, tokens
        self.plans = []
        for slots in mixes(tokens, bench.max_loras):
            self.plans.append(LoraPlan(tokens, bench.max_loras, bench.device))
            self.plans[-1].update(slots)
        self.x = bench._randn(tokens, bench.layer.k)
        self.y = bench._randn(tokens, sum(bench.layer.widths))
        self.max_calls = min(self._cold_calls(plan) for plan in self.plans)
        self.calls = 1

    def copies(self, plan: LoraPlan) -> int:
        """Calls of a plan after which adapters come again."""
        return min((self.bench.slots - self.bench.max_loras) // plan.num_active + 1, MAX_CALLS)

    def _cold_calls(self, plan: LoraPlan) -> int:
        """Most calls of a plan in a graph: none finds its adapters in the cache."""
        copies = self.copies(plan)
        return MAX_CALLS if copies * plan.num_active * self.bench.adapter_bytes >= COLD_BYTES else copies

    def weights(self, plan: LoraPlan, i: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A and B of call i of a plan among the bench's, of all slices; it uses other adapters than the call before."""
        first = i % self.copies(plan) * plan.num_active
        a, b = (
            [weight[first : first + self.bench.max_loras] for weight in half] for half in (self.bench.a, self.bench.b)
        )
        return a, b

    def run(self, y: torch.Tensor, plan: LoraPlan, i: int) -> None:
        lora_linear(y, self.x, *self.weights(plan, i), plan)

    def error(self, pair: Pair) -> float:
        """Greatest relative error of a row (Euclidean norms) against fp32 in any mix; NaN when an output is NaN."""
        return max((self._error(pair, plan) for plan in self.plans), key=lambda error: (error != error, error))

    def _error(self, pair: Pair, plan: LoraPlan) -> float:
        base = self.bench._randn(*self.y.shape)
        out, expected = base.clone(), base.float()
        with pinned(self.tokens, *pair):
            self.run(out, plan, 0)
        reference.lora_linear(expected, self.x, *self.weights(plan, 0), plan)
        return float(((out.float() - expected).norm(dim=1) / expected.norm(dim=1)).max())

    def capture(self, pair: Pair) -> Callable[[], float]:
        """Replays a graph of calls with these configs for each mix: see `Clock.capture`.

        The geometric mean of their times: a part of the time saved counts alike in each of them.
        """
        with pinned(self.tokens, *pair), capturing_one_step():
            runs = [functools.partial(self.run, self.y, plan) for plan in self.plans]
            replays = [self.bench.clock.capture(run, self.calls) for run in runs]
        return lambda: statistics.geometric_mean([replay() for replay in replays])

    def settle(self, default: Pair = (None, None)) -> None:
        """Choose how many calls a graph holds, from the time of the default."""
        us = self.capture(default)()
        self.calls = max(1, min(round(GRAPH_US / us), self.max_calls))

    def time(self, pair: Pair, best_us: float = math.inf, replays: int = 5) -> float:
        """Median microseconds a call; after one replay only, if that is far slower than best_us."""
        replay = self.capture(pair)
        first = replay()
        if first > LOSER * best_us:
            return first
        return statistics.median([first, *(replay() for _ in range(replays - 1))])

    def compare(self, pairs: list[Pair], replays: int = 15) -> list[float]:
        """Median microseconds a call of each pair, replayed in turns, so that drift meets all of them alike."""
        graphs = [self.capture(pair) for pair in pairs]
        rounds = [[replay() for replay in graphs] for _ in range(replays)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def sweep(
    batch: Batch, shrinks: list[ShrinkConfig], expands: list[ExpandConfig], tolerance: float
) -> tuple[Pair, dict[Pair, float]]:
    """The fastest pair found, and the time of all measured: the best shrink beside the default expand, then the expand.

    Args:
        shrinks, expands: candidates, the analytic default first.
        tolerance: greatest relative error of a row that a winner may have.
    """
    default: Pair = (shrinks[0], expands[0])
    batch.settle(default)
    times = {default: batch.time(default)}
    best = default
    for half, candidates in enumerate((shrinks, expands)):
        for config in candidates[1:]:
            pair = (config, best[1]) if half == 0 else (best[0], config)
            try:
                times[pair] = batch.time(pair, times[best])
            except Exception as error:
                if not too_large(error):
                    raise
                continue
            if times[pair] < times[best]:
                best = pair
    for pair in sorted(times, key=times.get):
        if batch.error(pair) <= tolerance:
            return pair, times
    raise RuntimeError(f"no config of {batch.bench.layer}, rank {batch.bench.rank} agrees with the fp32 reference")
