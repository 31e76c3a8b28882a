"""Shapes of the LoRA benchmarks: models, cases, which adapter each token uses, and the floor of a call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_ops.tuning.layers import Layer, model_layers

DISTRIBUTIONS = ("uniform", "zipf", "one")
PREFILL_TOKENS = 1024
"""From this many tokens up a batch is made of sequences, below it each token is a request of its own."""


@dataclass(frozen=True)
class Module:
    """A linear layer with LoRA: x [M, k] -> y [M, sum(slices)], one A and B pair for each slice."""

    name: str
    k: int
    slices: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.slices)


def _modules(layers: dict[str, Layer]) -> tuple[Module, ...]:
    return tuple(Module(name, layer.k, layer.widths) for name, layer in layers.items())


TINY = {
    "qkv": Layer(128, (128, 32, 32)),
    "o": Layer(128, (128,)),
    "gate_up": Layer(128, (272, 272)),
    "down": Layer(272, (128,)),
}
MODELS: dict[str, tuple[Module, ...]] = {
    "llama3-8b": _modules(model_layers("llama3-8b")),
    "qwen3-32b": _modules(model_layers("qwen3-32b")),
    "llama3-70b-tp4": _modules(model_layers("llama3-70b", tp=4)),
    "tiny": _modules(TINY),
}

GRID = (
    (1, 1),
    (8, 8),
    (16, 16),
    (64, 1),
    (64, 32),
    (64, 64),
    (256, 1),
    (256, 32),
    (256, 64),
    (1024, 8),
    (8192, 1),
    (8192, 8),
    (8192, 64),
)
QUICK_GRID = ((1, 1), (64, 32), (8192, 8))
TINY_GRID = ((1, 1), (8, 8), (37, 5))


@dataclass(frozen=True)
class Case:
    """One call to be checked and timed. `none_fraction` is the share of requests without an adapter."""

    model: str
    module: Module
    rank: int
    tokens: int
    adapters: int
    dtype: str = "bf16"
    distribution: str = "uniform"
    none_fraction: float = 0.0

    def __str__(self) -> str:
        return f"{self.module.name} r{self.rank} {self.tokens}/{self.adapters} {self.dtype} {self.distribution_label}"

    @property
    def distribution_label(self) -> str:
        return self.distribution + (f"-none{self.none_fraction:g}" if self.none_fraction else "")


def token_slots(case: Case, seed: int = 0) -> np.ndarray:
    """int32 [tokens]: adapter slot of each token, -1 = no adapter.

    Decode batches (fewer than 1024 tokens) hold one token a request. Prefill batches hold max(adapters, 8) sequences of
    equal length, whose tokens stand together.
    """
    rng = np.random.default_rng(seed)
    requests = case.tokens if case.tokens < PREFILL_TOKENS else max(case.adapters, 8)
    if case.distribution == "uniform":
        slots = np.arange(requests) % case.adapters
    elif case.distribution == "zipf":
        weights = 1 / np.arange(1, case.adapters + 1)
        slots = rng.choice(case.adapters, size=requests, p=weights / weights.sum())
    elif case.distribution == "one":
        slots = np.full(requests, case.adapters // 2)
    else:
        raise ValueError(f"unknown distribution {case.distribution!r}: use one of {', '.join(DISTRIBUTIONS)}")
    slots[rng.permutation(requests)[: round(case.none_fraction * requests)]] = -1
    return slots[np.arange(case.tokens) * requests // case.tokens].astype(np.int32)


def floor_us(case: Case, slots: np.ndarray, bytes_per_s: float, flops_per_s: float) -> float:
    """Least time of a shrink and expand: each input read once, y read and written once, 2-byte elements."""
    live = int((slots >= 0).sum())
    active = np.unique(slots[slots >= 0]).size
    k, n, r, s = case.module.k, case.module.n, case.rank, len(case.module.slices)
    moved = 2 * (live * k + active * r * k * s + active * r * n + 2 * live * n)
    flops = 2 * live * r * (k * s + n)
    return max(moved / bytes_per_s, flops / flops_per_s) * 1e6
