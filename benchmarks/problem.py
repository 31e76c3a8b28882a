"""Random inputs of a case, the fp32 reference, and the check that stands before every speed."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field

import torch
from shapes import Case, token_slots

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Slices = tuple[torch.Tensor, ...]


@dataclass
class Problem:
    """Inputs of a case. Weight buffers 1.. hold the values of buffer 0 at other addresses, to rotate over.

    Attributes:
        x: [M, K].
        y0, y: [M, sum(N)]: the base output, and the buffer that a call adds to.
        lora_a, lora_b: for each buffer one tensor a slice: [adapters, rank, K] and [adapters, N, rank].
        slots: int32 [M] on the CPU: adapter of each token, -1 = none.
    """

    case: Case
    x: torch.Tensor
    y0: torch.Tensor
    y: torch.Tensor
    lora_a: list[Slices]
    lora_b: list[Slices]
    slots: torch.Tensor
    packed: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def active(self) -> list[int]:
        """The adapters in use, ascending."""
        return sorted(set(self.slots.tolist()) - {-1})

    @property
    def copies(self) -> int:
        return len(self.lora_a)

    def reset(self) -> None:
        self.y.copy_(self.y0)

    def pack(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each buffer A [adapters, slices * rank, K] and B [adapters, sum(N), rank], each contiguous."""
        if not self.packed:
            self.packed = [(torch.cat(a, 1), torch.cat(b, 1)) for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        return self.packed


def copies_for(case: Case, active: int, cold_bytes: int) -> int:
    """Buffers to rotate over, so that at least cold_bytes pass between two reads of the same weights."""
    k, n, s = case.module.k, case.module.n, len(case.module.slices)
    per_call = 2 * (active * case.rank * (k * s + n) + case.tokens * (k + n))
    return 1 + math.ceil(cold_bytes / per_call)


def make_problem(case: Case, device: str, cold_bytes: int, seed: int) -> Problem:
    """Inputs of unit variance, so that the LoRA part and the base output weigh the same in the sum."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)

    module, rank = case.module, case.rank
    slots = token_slots(case, seed)
    active = len(set(slots.tolist()) - {-1})
    a = tuple(randn(case.adapters, rank, module.k, scale=module.k**-0.5) for _ in module.slices)
    b = tuple(randn(case.adapters, n, rank, scale=rank**-0.5) for n in module.slices)
    copies = copies_for(case, active, cold_bytes) if cold_bytes else 1
    y0 = randn(case.tokens, module.n)
    return Problem(
        case=case,
        x=randn(case.tokens, module.k),
        y0=y0,
        y=torch.empty_like(y0),
        lora_a=[a] + [tuple(t.clone() for t in a) for _ in range(copies - 1)],
        lora_b=[b] + [tuple(t.clone() for t in b) for _ in range(copies - 1)],
        slots=torch.from_numpy(slots),
    )


def reference(problem: Problem) -> torch.Tensor:
    """fp32 [M, sum(N)]: y0 plus the LoRA part, in fp32 from the inputs on."""
    from lora_ops import reference

    out = problem.y0.float()
    plan = types.SimpleNamespace(token_slots=problem.slots.to(problem.device))
    reference.lora_linear(out, problem.x, problem.lora_a[0], problem.lora_b[0], plan)
    return out


def tolerance(dtype: str) -> float:
    """Greatest allowed error of a row: the dtype's eps.

    Up to three roundings to nearest (the rank-sized intermediate, the LoRA part, the sum), each at most eps / 2: their
    root sum of squares is 0.87 eps.
    """
    return torch.finfo(DTYPES[dtype]).eps


def max_rel_error(out: torch.Tensor, expected: torch.Tensor, problem: Problem) -> float:
    """Greatest |out - expected| / |expected| of a row (Euclidean norms). Rows without adapter must equal y0 bit by bit.

    NaN when an output is NaN; inf when a row without adapter was touched.
    """
    live = (problem.slots >= 0).to(problem.device)
    if not torch.equal(out[~live], problem.y0[~live]):
        return math.inf
    if not bool(live.any()):
        return 0.0
    difference = (out[live].float() - expected[live]).norm(dim=1)
    return float((difference / expected[live].norm(dim=1)).max())
