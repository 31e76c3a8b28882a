"""Measurement of a MoE layer: all that `fused_experts` launches for a batch, in CUDA graphs, cold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from ops_configs.clock import GRAPH_US, LOSER, Clock, too_large
from ops_configs.moe import LayerConfig, MoeConfig, MoeLayer, pinned

from .. import reference
from ..ops import fused_experts
from .candidates import HALVES, Half
from .layers import Target

COLD_BYTES = 96 << 20
"""Of weights that pass before any are read again."""
MAX_CALLS = 32
MIN_ROUTINGS, MAX_ROUTINGS = 4, 16
SHORTLIST = 6
"""Candidates of a half that are measured again, in turns."""
CHECKED_TOKENS = 256
TOLERANCE = {"float16": 2**-9, "bfloat16": 2**-7, "float32": 1e-5}
"""Greatest relative error of a row: a unit in the last place of half precision."""
QUANT_TOLERANCE = {"fp8_w8a8": 2**-4, "int8_w8a8": 2**-5}
"""The same where activations are quantised: a row whose largest element takes another step, in fp8 of 1/8 at most."""
ROUTINGS = ("uniform", "zipf")

Candidates = dict[int, dict[Half, list[MoeConfig]]]
"""Rows of a tile -> half -> configs, the analytic default first, for the tiles and in each list."""


def routing(
    layer: MoeLayer, tokens: int, kind: str, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, weights fp32), both [tokens, top_k]: distinct experts, by uniform or by Zipf's popularity."""
    experts = layer.global_experts or layer.experts
    popularity = torch.zeros(experts, device=device)
    if kind == "zipf":
        order = torch.randperm(experts, generator=generator, device=device)
        popularity = -torch.log1p(order.float())
    noise = torch.empty(tokens, experts, device=device).exponential_(generator=generator).log_()
    keys, ids = (popularity - noise).topk(layer.top_k)  # Gumbel: a draw by popularity without replacement
    return ids.int(), torch.softmax(keys, dim=1)


class Bench:
    """Random weights of a layer on a device.

    Args:
        target: layer and dtype.
        device, seed: of all data.
        clock: False where nothing is timed.
        overlapping: experts share most of their memory, where kernels run and nobody looks at what they make.
    """

    def __init__(
        self, target: Target, device: torch.device, seed: int = 0, clock: bool = True, overlapping: bool = False
    ) -> None:
        self.target, self.layer, self.device = target, target.layer, device
        self.dtype, self.overlapping = getattr(torch, target.hidden_dtype), overlapping
        self.generator = torch.Generator(device).manual_seed(seed)
        layer = target.layer
        rows, itemsize = layer.products * layer.intermediate, 1 if layer.quant else self.dtype.itemsize
        self.expert_bytes = layer.hidden * (rows + layer.intermediate) * itemsize
        self.copies = min(math.ceil(COLD_BYTES / (layer.experts * self.expert_bytes)), MAX_CALLS) if clock else 1
        self.w13, self.w13_scale = self._weight(rows, layer.hidden)
        self.w2, self.w2_scale = self._weight(layer.hidden, layer.intermediate)
        self.expert_map = None
        if layer.global_experts:
            ids = torch.arange(layer.global_experts, dtype=torch.int32, device=device)
            self.expert_map = torch.where(ids < layer.experts, ids, -1)
        self.clock = Clock(device) if clock else None

    def _weight(self, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, count = self.layer, self.copies * self.layer.experts
        dtype = {None: self.dtype, "fp8_w8a8": torch.float8_e4m3fn}.get(layer.quant, torch.int8)
        if self.overlapping:
            rows = min(n, 16 + n % 16)  # from expert to expert: as aligned as n rows, which kernels are compiled for
            memory = torch.zeros(((count - 1) * rows + n) * k, dtype=dtype, device=self.device)
            weight = memory.as_strided((count, n, k), (rows * k, k, 1))
        else:
            weight = torch.empty(count, n, k, dtype=dtype, device=self.device)
            for expert in weight:  # one after another: fp32 numbers of all would take four times the memory
                values = torch.randn(n, k, generator=self.generator, device=self.device)
                expert.copy_(values * k**-0.5 if layer.quant is None else (values * 32).clamp_(-127, 127))
        if layer.quant is None:
            return weight, None
        blocks = layer.block_shape
        shape = (count, -(-n // blocks[0]), -(-k // blocks[1])) if blocks else (count, n)
        scale = torch.rand(shape, generator=self.generator, device=self.device) + 0.5
        return weight, scale * (k**-0.5 / 32)

    def batch(self, tokens: int, kind: str = "uniform") -> Batch:
        return Batch(self, tokens, kind)


class Batch:
    """One number of tokens over the weights of a bench; each call goes to other experts, or to other copies of them."""

    def __init__(self, bench: Bench, tokens: int, kind: str) -> None:
        self.bench, self.tokens = bench, tokens
        layer, generator, device = bench.layer, bench.generator, bench.device
        self.hidden = torch.randn(tokens, layer.hidden, generator=generator, device=device).to(bench.dtype)
        touched = min(tokens * layer.top_k, layer.experts) * bench.expert_bytes
        count = min(max(math.ceil(COLD_BYTES / touched), MIN_ROUTINGS), MAX_ROUTINGS)
        self.routings = [routing(layer, tokens, kind, generator, device) for _ in range(count)]
        self.calls = 1

    def arguments(self, i: int) -> tuple[tuple, dict]:
        """(positional, keyword) arguments of `fused_experts` for call i."""
        bench, layer = self.bench, self.bench.layer
        first = i % bench.copies * layer.experts
        mine = slice(first, first + layer.experts)
        ids, weights = self.routings[i % len(self.routings)]
        keywords: dict = {"gated": layer.gated, "expert_map": bench.expert_map}
        if layer.quant:
            keywords |= {"quant": layer.quant, "w13_scale": bench.w13_scale[mine], "w2_scale": bench.w2_scale[mine]}
            keywords |= {"block_shape": layer.block_shape, "per_token": layer.quant != "int8_w8a16"}
            if layer.block_shape:
                keywords["per_token"] = False
        return (self.hidden, bench.w13[mine], bench.w2[mine], weights, ids), keywords

    def run(self, i: int) -> torch.Tensor:
        positional, keywords = self.arguments(i)
        return fused_experts(*positional, **keywords)

    def error(self, config: LayerConfig | None) -> float:
        """Greatest relative error of a row (Euclidean norms) against fp32; NaN when an output is NaN."""
        (hidden, w13, w2, weights, ids), keywords = self.arguments(0)
        with pinned(config):
            out = self.run(0)
        rows = torch.randperm(self.tokens, device=hidden.device)[:CHECKED_TOKENS]
        expected = reference.fused_experts(hidden[rows], w13, w2, weights[rows], ids[rows], **keywords).float()
        norms = expected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return float(((out[rows].float() - expected).norm(dim=1) / norms).max())

    @property
    def tolerance(self) -> float:
        """Of `error`."""
        return QUANT_TOLERANCE.get(self.bench.layer.quant, TOLERANCE[self.bench.target.hidden_dtype])

    def capture(self, config: LayerConfig | None) -> Callable[[], float]:
        """Replays a graph of calls with this config: see `Clock.capture`."""
        with pinned(config):
            return self.bench.clock.capture(self.run, self.calls)

    def settle(self, config: LayerConfig | None = None) -> None:
        """Choose how many calls a graph holds, from the time of a config."""
        us = self.capture(config)()
        self.calls = max(1, min(round(GRAPH_US / us), MAX_CALLS))

    def time(self, config: LayerConfig | None, best_us: float = math.inf, replays: int = 3) -> float:
        """Median microseconds a call; after one replay only, if that is far slower than best_us."""
        replay = self.capture(config)
        first = replay()
        if first > LOSER * best_us:
            return first
        return statistics.median([first, *(replay() for _ in range(replays - 1))])

    def compare(self, configs: list[LayerConfig | None], replays: int = 11) -> list[float]:
        """Median microseconds a call of each config, replayed in turns, so that drift meets all of them alike."""
        graphs = [self.capture(config) for config in configs]
        rounds = [[replay() for replay in graphs] for _ in range(replays)]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


class Sweep:
    """Times of the configs of a batch, as they are found; `best` is the fastest so far."""

    def __init__(self, batch: Batch, default: LayerConfig) -> None:
        batch.settle(default)
        self.batch = batch
        self.times = {default: batch.time(default)}

    @property
    def best(self) -> LayerConfig:
        return min(self.times, key=self.times.get)

    def measure(self, config: LayerConfig) -> float:
        """Microseconds of a config, infinite where it does not fit the GPU."""
        if config not in self.times:
            try:
                self.times[config] = self.batch.time(config, self.times[self.best])
            except Exception as error:
                if not too_large(error):
                    raise
                self.times[config] = math.inf
        return self.times[config]

    def improve(self, start: LayerConfig, half: Half, configs: list[MoeConfig]) -> LayerConfig:
        """The fastest of `start` and its variants with another half: all in one pass, the best of them in turns."""
        tried = dict.fromkeys([start, *(replace(start, **{half: config}) for config in configs)])
        ranked = sorted((config for config in tried if self.measure(config) < math.inf), key=self.times.get)
        if not ranked:
            return start
        shortlist = ranked[:SHORTLIST]
        self.times |= zip(shortlist, self.batch.compare(shortlist, replays=5), strict=True)
        return min(shortlist, key=self.times.get)

    def right(self) -> LayerConfig:
        """The fastest config whose result agrees with the reference.

        Raises:
            RuntimeError: none does.
        """
        for config in sorted(self.times, key=self.times.get):
            if self.times[config] < math.inf and self.batch.error(config) <= self.batch.tolerance:
                return config
        raise RuntimeError(f"no config of {self.batch.bench.target} agrees with the fp32 reference")


def sweep(batch: Batch, candidates: Candidates) -> Sweep:
    """Measure the candidates: for each number of rows of a tile the first half, then beside its best the second."""
    first = next(iter(candidates.values()))
    found = Sweep(batch, LayerConfig(*(first[half][0] for half in HALVES)))
    for lists in candidates.values():
        config = LayerConfig(*(lists[half][0] for half in HALVES))
        for half in HALVES:
            config = found.improve(config, half, lists[half])
            if found.times[config] > LOSER * found.times[found.best]:
                break
    return found
