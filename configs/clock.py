"""Timing for the tuners: calls in CUDA graphs on a GPU, with a cache that holds nothing of use."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20
GRAPH_US = 300.0
"""Microseconds that a graph of short calls should take."""
LOSER = 1.3
"""A candidate this many times slower than the best so far is dropped after one replay."""


class Clock:
    """Times calls in CUDA graphs on a GPU, with a cache that holds nothing of use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.flush = torch.zeros(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.anchor = self._graph(lambda: self.flush[:1].zero_())  # keeps the pool while other graphs come and go

    def _graph(self, calls: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """torch.cuda.graph would also empty the allocator's cache, which takes longer than the measurement.

        No garbage is collected meanwhile: the end of another graph would break the capture.
        """
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    calls()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.synchronize()
        return graph

    def capture(self, run: Callable[[int], object], calls: int) -> Callable[[], float]:
        """A graph of run(0), ..., run(calls - 1); each replay starts with a flushed cache and returns us a call.

        run(0) is called before, to compile, which a capture must not.
        """
        with torch.cuda.device(self.device):
            run(0)
            graph = self._graph(lambda: [run(i) for i in range(calls)])
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            with torch.cuda.device(self.device):
                self.flush.zero_()
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
            return start.elapsed_time(end) * 1e3 / calls

        replay()
        return replay


def too_large(error: BaseException | None) -> bool:
    """Whether a launch failed because a config does not fit the GPU or its compiler, which is a miss and no fault."""
    while error is not None:
        if type(error).__name__ in ("OutOfResources", "PTXASError") or str(error).startswith("PassManager::run failed"):
            return True
        error = error.__cause__ or error.__context__
    return False
