"""Random LoRA layers and the error that a dtype allows."""

from dataclasses import dataclass

import numpy as np
import torch

from lora_ops import LoraPlan


@dataclass(frozen=True)
class Case:
    """M tokens over L slots, K inputs, one width a slice, rank R."""

    tokens: int
    k: int
    widths: tuple[int, ...]
    rank: int
    slots: int
    why: str

    def __str__(self) -> str:
        widths = "+".join(map(str, self.widths))
        return f"{self.why}: M{self.tokens} K{self.k} N{widths} R{self.rank} L{self.slots}"


CASES = [
    Case(0, 64, (32,), 8, 3, "empty batch"),
    Case(1, 64, (32,), 1, 1, "smallest"),
    Case(5, 64, (32,), 8, 3, "rank below a tensor-core tile"),
    Case(17, 96, (48, 16, 16), 16, 4, "GQA slices of unequal width"),
    Case(3, 2049, (33,), 5, 2, "nothing divides anything"),
    Case(40, 1280, (80, 80), 64, 3, "two slices, more than one chunk of K"),
    Case(7, 1100, (20, 30, 40), 96, 2, "rank between powers of two, K no multiple of a chunk"),
    Case(9, 64, (160,), 300, 2, "rank of several blocks with a tail"),
    Case(6, 40, (24,), 512, 2, "largest rank"),
    Case(530, 64, (32, 16), 16, 5, "large tiles"),
    Case(30, 9000, (16,), 16, 3, "long K"),
    Case(12, 64, (8, 16, 24, 32), 8, 2, "four slices take two launches"),
    Case(9, 0, (24, 8), 96, 2, "no input features: zeros"),
    Case(9, 64, (24, 0, 8), 8, 2, "a slice without output features"),
]


@dataclass
class Layer:
    """Tensors of a case; x and y have strided rows, y has columns outside of the slices' window."""

    x: torch.Tensor
    y: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    slots: np.ndarray
    plan: LoraPlan
    offset: int = 3

    @property
    def width(self) -> int:
        return sum(b.shape[1] for b in self.lora_b)

    @property
    def window(self) -> slice:
        return slice(self.offset, self.offset + self.width)


def make_layer(case: Case, dtype: torch.dtype, device: str, padding: int = 0) -> Layer:
    """Fresh random tensors; `padding` rows follow the plan's tokens."""
    rows = case.tokens + padding

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(dtype).to(device)

    plan = LoraPlan(max(rows, 1), case.slots, device)
    slots = np.random.default_rng().integers(-1, case.slots, case.tokens)
    plan.update(slots)
    return Layer(
        x=draw(rows, case.k + 8)[:, : case.k],
        y=draw(rows, sum(case.widths) + 16)[:, : sum(case.widths) + 7],
        lora_a=[draw(case.slots, case.rank, case.k, scale=max(case.k, 1) ** -0.5) for _ in case.widths],
        lora_b=[draw(case.slots, width, case.rank, scale=case.rank**-0.5) for width in case.widths],
        slots=slots,
        plan=plan,
    )


# Relative Frobenius error. A result is rounded once to the dtype, and the inner product once before: two independent
# relative errors of at most one unit roundoff each. fp32: accumulation over K up to 16384, about sqrt(K) * 2^-24.
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def tolerance(dtype: torch.dtype) -> float:
    return 2 * UNIT_ROUNDOFF[dtype] if dtype in UNIT_ROUNDOFF else 1e-5


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float) -> None:
    """Frobenius error within tol, and no element further off than 8 tol of the largest: NaN never passes.

    Elements are sums whose terms make_layer gives a standard deviation of 1 in all. Of a lone sum that happens to
    cancel, no more is known than of others: errors count relative to at least a tenth of that deviation.
    """
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    difference = actual.double() - expected.double()
    relative = float(difference.norm() / expected.double().norm().clamp_min(0.1 * expected.numel() ** 0.5))
    worst = float(difference.abs().max() / expected.double().abs().max().clamp_min(0.1))
    where = np.unravel_index(int(difference.abs().argmax()), tuple(difference.shape))
    assert relative <= tol, f"relative error {relative:.2e} > {tol:.2e}, worst at {where}"
    assert worst <= 8 * tol, f"element error {worst:.2e} of the largest > {8 * tol:.2e} at {where}"
