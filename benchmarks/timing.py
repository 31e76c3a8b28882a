"""CUDA-graph timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD_BYTES = 96 << 20
"""Bytes that pass through the caches before a buffer is read again in cold timing (an H200 has 60 MB of L2)."""

H200_CEILINGS = (4.3e12, 790e12)
"""Bytes/s of a device copy and FLOP/s of a bf16 matrix product, both measured on an H200."""

MAX_CALLS = 400


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, least and greatest over the replays of a graph of many calls."""

    us: float
    us_min: float
    us_max: float


def capture(run: Callable[[int], object], copies: int, rounds: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of run(0), ..., run(copies - 1), `rounds` times over."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(copies):
                run(i)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graph_time(
    run: Callable[[int], object],
    copies: int,
    reset: Callable[[], object] = lambda: None,
    replays: int = 9,
    graph_us: float = 2000.0,
) -> Timing:
    """Time run(i) over a rotation of i = 0 .. copies - 1 in one CUDA graph.

    Args:
        run: one call on buffer i; it has run on every buffer before, so that nothing compiles or allocates tables here.
        copies: buffers of the rotation; 1 = hot.
        reset: runs before each timed replay, outside the timed region.
        replays: timed replays, after untimed ones that let the clocks rise.
        graph_us: the graph holds as many rounds as take about this long.
    """
    graph = capture(run, copies)
    replay_us(graph)
    round_us = max(replay_us(graph), 1.0)
    rounds = max(1, min(round(graph_us / round_us), MAX_CALLS // copies))
    if rounds > 1:
        graph = capture(run, copies, rounds)
        replay_us(graph)
    samples = []
    for _ in range(replays):
        reset()
        samples.append(replay_us(graph) / (copies * rounds))
    return Timing(statistics.median(samples), min(samples), max(samples))


def measured_ceilings() -> tuple[float, float]:
    """Bytes/s (read plus written) of a device copy, and FLOP/s of a bf16 matrix product, on this GPU."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time(lambda _: target.copy_(source), copies=1)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    torch.mm(a, b, out=c)  # the library makes its handle, which a capture forbids
    product = graph_time(lambda _: torch.mm(a, b, out=c), copies=1)
    return 2 * source.nbytes / (copy.us * 1e-6), 2 * 8192**3 / (product.us * 1e-6)
