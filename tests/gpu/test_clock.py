"""The tuners' clock."""

import gc

import pytest
import torch

from ops_configs.clock import Clock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_garbage_does_not_break_a_capture():
    """A graph that only the garbage collector can free, and a collector that would run within the capture."""
    clock = Clock(torch.device("cuda"))
    x = torch.zeros(1024, device="cuda")
    cycle = [clock._graph(lambda: x.add_(1))]
    cycle.append(cycle)
    del cycle
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        replay = clock.capture(lambda i: [[j] for j in range(100)] and x.add_(1), 3)
    finally:
        gc.set_threshold(*thresholds)
    x.zero_()
    assert replay() > 0
    assert x.eq(3).all()
    assert gc.isenabled()
