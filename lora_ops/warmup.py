"""Compile the kernels of given layers before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .ops import lora_linear
from .plan import LoraPlan


def warmup(
    layers: Iterable[tuple[int, Sequence[int], int]],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    add_inputs: bool = True,
) -> None:
    """Compile what `lora_linear` needs for these layers, for batches of every size.

    A patched vLLM needs no call: it meets each of its layers while it profiles, and the first call of a layer compiles
    all of that layer's kernels.

    Args:
        layers: (K, widths of the slices, R) of each layer, contiguous weights assumed.
        dtype: of x, y and the weights.
        device: where the kernels will run; on a CPU there is nothing to compile.
        add_inputs: as the later calls have it.

    Raises:
        ValueError, TypeError: a layer that `lora_linear` does not take.
    """
    plan = LoraPlan(1, 1, device)
    plan.update([0])
    for k, widths, rank in layers:
        x = torch.zeros(1, k, dtype=dtype, device=device)
        y = torch.zeros(1, sum(widths), dtype=dtype, device=device)
        lora_a = [torch.zeros(1, rank, k, dtype=dtype, device=device) for _ in widths]
        lora_b = [torch.zeros(1, n, rank, dtype=dtype, device=device) for n in widths]
        lora_linear(y, x, lora_a, lora_b, plan, add_inputs=add_inputs)
