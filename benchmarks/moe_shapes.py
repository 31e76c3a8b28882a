"""Shapes of the MoE benchmarks: layers, cases, which experts each token chooses, and the floor of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUTINGS = ("uniform", "zipf")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (1, 64, 4096)
TINY_TOKENS = (1, 5, 37)


@dataclass(frozen=True)
class Layer:
    """A routed-experts layer as one GPU has it; element counts.

    activation: "silu", or "swiglu_oai": gpt-oss's clamped SwiGLU, with interleaved gates and ups and biases.
    """

    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu"


LAYERS = {
    layer.model: layer
    for layer in (
        Layer("qwen3-30b-a3b", 128, 8, 2048, 768),
        Layer("qwen3-235b-a22b-tp4", 128, 8, 4096, 384),
        Layer("mixtral-8x7b", 8, 2, 4096, 14336),
        Layer("deepseek-v3-tp8", 256, 8, 7168, 256),
        Layer("gpt-oss-20b", 32, 4, 2880, 2880),
        Layer("gpt-oss-20b-swiglu", 32, 4, 2880, 2880, "swiglu_oai"),
        Layer("tiny", 8, 2, 256, 128),
        Layer("tiny-swiglu", 8, 2, 256, 128, "swiglu_oai"),
    )
}
"""gpt-oss-20b stands for its shapes alone, with SiLU; gpt-oss-20b-swiglu is the layer with all that the model has."""
GRID = (
    *((model, "bf16") for model in ("qwen3-30b-a3b", "qwen3-235b-a22b-tp4", "mixtral-8x7b", "deepseek-v3-tp8")),
    ("gpt-oss-20b", "bf16"),
    ("deepseek-v3-tp8", "fp8"),
)
"""(model, dtype) of the whole grid."""
BLOCK = (128, 128)
"""Columns and elements of K that share a scale of fp8 weights."""


@dataclass(frozen=True)
class Case:
    """One call to be checked and timed. dtype: "bf16", "fp16", or "fp8": weights with a scale a block, bf16 hidden."""

    layer: Layer
    tokens: int
    routing: str = "uniform"
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.layer.model} {self.tokens} {self.routing} {self.dtype}"

    @property
    def flops(self) -> int:
        """Of the products: gate, up and down of each choice."""
        return 6 * self.tokens * self.layer.top_k * self.layer.hidden * self.layer.intermediate


def choose_experts(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed weights fp32 and experts int32, each [tokens, top_k]: distinct experts for a token, weights that sum to 1.

    uniform: every expert is as likely as the others; zipf: the n-th with a weight of 1 / n.
    """
    layer, device = case.layer, generator.device
    if case.routing == "uniform":
        likely = torch.zeros(layer.experts, device=device)
    elif case.routing == "zipf":
        likely = -torch.arange(1, layer.experts + 1, device=device).log()
    else:
        raise ValueError(f"unknown routing {case.routing!r}: use one of {', '.join(ROUTINGS)}")
    # The largest of log weights plus Gumbel noise are draws without replacement.
    uniform = torch.rand(case.tokens, layer.experts, generator=generator, device=device).clamp(1e-20, 1 - 1e-6)
    scores, ids = (likely - (-uniform.log()).log()).topk(layer.top_k, dim=1)
    return scores.softmax(dim=1), ids.int()


def floor_us(case: Case, touched: float, bytes_per_s: float, flops_per_s: float) -> float:
    """Least time of a call: weights of the touched experts and hidden read once, the output written once; the products.

    flops_per_s: of bf16; fp8 products are twice as fast.
    """
    layer = case.layer
    weight = 3 * layer.hidden * layer.intermediate * (1 if case.dtype == "fp8" else 2)
    moved = touched * weight + 2 * 2 * case.tokens * layer.hidden
    rate = 2 * flops_per_s if case.dtype == "fp8" else flops_per_s
    return max(moved / bytes_per_s, case.flops / rate) * 1e6
