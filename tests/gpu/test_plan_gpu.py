"""Plans on a GPU that is behind: what each step's kernels would read."""

import numpy as np
import pytest
import torch

from lora_ops.fill import compiled
from lora_ops.plan import NO_TILE, LoraPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TOKENS, SLOTS, STRIDE = 700, 6, 11
CYCLES = 200_000_000
"""That the GPU sleeps before a burst of steps: about a hundred milliseconds, for a CPU that runs other tests, too."""


def sent(plan: LoraPlan, arena: torch.Tensor) -> list[int]:
    """The part of the arena that a step writes."""
    tiles = int((plan.layout.section(arena, "tile_slots_64") != NO_TILE).sum())
    first, _ = plan.layout.offsets["tile_rows_64"]
    return arena[: first + tiles * 64].tolist()


def test_each_step_of_a_burst_has_its_own_plan():
    rng = np.random.default_rng()
    plan = LoraPlan(TOKENS, SLOTS, "cuda", has_offsets=True)
    assert plan._fill is compiled()
    assert plan._staging._memory.is_pinned()
    on_cpu = LoraPlan(TOKENS, SLOTS, "cpu", has_offsets=True)
    for steps in (3, 40, 1, 9, 100, 17, 8, 60):
        torch.cuda._sleep(CYCLES)
        seen = []
        for _ in range(steps):
            slots = rng.integers(-1, SLOTS, rng.integers(0, TOKENS + 1))
            plan.update(slots, STRIDE)
            seen.append((slots, plan.arena.clone()))
        assert not torch.cuda.current_stream().query(), "the GPU kept up: raise CYCLES"
        for slots, arena in seen:
            on_cpu.update(slots, STRIDE)
            assert sent(plan, arena.cpu()) == sent(on_cpu, on_cpu.arena)


def test_a_captured_update_is_an_error():
    plan = LoraPlan(8, 2, "cuda")
    with pytest.raises(RuntimeError, match="update it before each replay"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            plan.update([1, 0])
    plan.update([1, 0])
    assert plan.token_slots.tolist() == [1, 0]
