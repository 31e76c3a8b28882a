"""Random inputs of an MoE case, the fp32 reference, and the check that stands before every speed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from moe_shapes import BLOCK, Case, Layer, choose_experts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Of hidden and the output."""
FP8 = torch.float8_e4m3fn
SETS = (8, 2)
"""Sets of hidden states and routing to rotate over: below SETS_TOKENS tokens, and above or without a GPU."""
SETS_TOKENS = 512
CHECKED_ROWS = 32


@dataclass(frozen=True)
class Weights:
    """w13 [E, 2I, H], w2 [E, H, I]; fp8 with scales fp32 [E, ceil(N / 128), ceil(K / 128)]; biases or None."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Inputs of a case. Set i of hidden states and routing is what call i of a rotation gets.

    The experts of a set are others than those of the sets before, as far as there are others: so few tokens, too, find
    their weights outside the L2 cache. A whole layer is larger than that.

    Attributes:
        hidden: of each set [M, H].
        topk_weights, topk_ids: of each set [M, top_k], fp32 and int32.
        rows: tokens of set 0 that are checked.
    """

    case: Case
    weights: Weights
    hidden: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    rows: torch.Tensor

    @property
    def copies(self) -> int:
        return len(self.hidden)

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    def touched(self) -> float:
        """Experts that have a token, mean over the sets."""
        return sum(ids.unique().numel() for ids in self.topk_ids) / self.copies


def quantize_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 of w [E, N, K], and fp32 scales, one for each 128 x 128 block: its largest magnitude over 448."""
    (rows, columns), (block_n, block_k) = w.shape[1:], BLOCK
    pad = (0, -columns % block_k, 0, -rows % block_n)
    blocks = torch.nn.functional.pad(w.float(), pad).unflatten(2, (-1, block_k)).unflatten(1, (-1, block_n))
    scale = blocks.abs().amax(dim=(2, 4)).clamp(min=1e-10) / torch.finfo(FP8).max
    q = (blocks / scale[:, :, None, :, None]).to(FP8).flatten(3, 4).flatten(1, 2)
    return q[:, :rows, :columns].contiguous(), scale


@functools.lru_cache(maxsize=1)
def make_weights(layer: Layer, dtype: str, device: str, seed: int, blank: bool) -> Weights:
    """Of variance 1 / K, so that activations keep their scale; kept for the next case. `blank`: memory alone."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        store = FP8 if dtype == "fp8" else DTYPES[dtype]
        w = torch.empty(layer.experts, n, k, dtype=store, device=device)
        scale = None
        if dtype == "fp8":
            blocks = (math.ceil(n / BLOCK[0]), math.ceil(k / BLOCK[1]))
            scale = torch.ones(layer.experts, *blocks, dtype=torch.float32, device=device)
        for expert in () if blank else range(layer.experts):
            values = torch.randn(1, n, k, generator=generator, device=device) * k**-0.5
            if scale is None:
                w[expert] = values[0]
            else:
                w[expert : expert + 1], scale[expert : expert + 1] = quantize_blocks(values)
        return w, scale

    def bias(n: int) -> torch.Tensor | None:
        if layer.activation != "swiglu_oai":
            return None
        values = torch.randn(layer.experts, n, generator=generator, device=device) * 0.1
        return values.to(DTYPES[dtype])

    w13, w13_scale = draw(2 * layer.intermediate, layer.hidden)
    w2, w2_scale = draw(layer.hidden, layer.intermediate)
    return Weights(w13, w2, w13_scale, w2_scale, bias(2 * layer.intermediate), bias(layer.hidden))


def make_problem(case: Case, device: str, seed: int, blank: bool = False) -> Problem:
    """The same numbers for the same arguments, in any process. `blank`: weights whose values are left open."""
    weights = make_weights(case.layer, case.dtype, device, seed, blank)
    generator = torch.Generator(device).manual_seed(seed + 1)
    many = device != "cpu" and case.tokens < SETS_TOKENS
    copies = 1 if blank else SETS[0] if many else SETS[1]
    shape, dtype = (case.tokens, case.layer.hidden), DTYPES[case.dtype]
    hidden = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(copies)]
    routing = [choose_experts(case, generator) for _ in range(copies)]
    rows = torch.randperm(case.tokens, generator=generator, device=device)[:CHECKED_ROWS]
    return Problem(case, weights, hidden, [w for w, _ in routing], [ids for _, ids in routing], rows)


def layer_arguments(problem: Problem) -> dict:
    """Keyword arguments of moe_ops.fused_experts, and of its reference, beside the five tensors."""
    weights = problem.weights
    arguments: dict = {}
    if problem.case.layer.activation != "silu":
        arguments |= {"activation": problem.case.layer.activation, "interleaved": True}
        arguments |= {"bias13": weights.bias13, "bias2": weights.bias2}
    if problem.case.dtype == "fp8":
        arguments |= {"quant": "fp8_w8a8", "block_shape": BLOCK}
        arguments |= {"w13_scale": weights.w13_scale, "w2_scale": weights.w2_scale}
    return arguments


def reference(problem: Problem) -> torch.Tensor:
    """The checked rows of set 0, [rows, H], in fp32 from the inputs on; fp8: over activations in fp8, as the hosts'."""
    from moe_ops import reference

    rows, weights = problem.rows, problem.weights
    hidden, topk_weights, topk_ids = (of[0][rows] for of in (problem.hidden, problem.topk_weights, problem.topk_ids))
    # Rounded in the end to the dtype of hidden: fp32 keeps what the sum has. bf16 values are the same in fp32.
    return reference.fused_experts(
        hidden.float(), weights.w13, weights.w2, topk_weights, topk_ids, **layer_arguments(problem)
    )


def tolerance(dtype: str) -> float:
    """Greatest allowed error of a row, relative to its norm.

    bf16 and fp16: the dtype's eps. Up to five roundings to nearest (gate, up, their product, the expert's output, the
    sum) of 0.2 eps each, root mean square over a binade: 0.45 eps.

    fp8: half of e4m3's eps. The reference rounds the intermediate to fp8 from fp32, the hosts from bf16, and values
    near the middle of a step go the other way, by up to eps; where one of them makes up most of a row, so does the row.
    On an H200 rows of vLLM, SGLang and DeepGEMM are off by up to 0.040, ours by 0.027.
    """
    return torch.finfo(FP8).eps / 2 if dtype == "fp8" else torch.finfo(DTYPES[dtype]).eps


def max_rel_error(out: torch.Tensor, expected: torch.Tensor, problem: Problem) -> float:
    """Greatest |out - expected| / |expected| of a checked row (Euclidean norms); NaN if the output has any, or inf."""
    if not bool(torch.isfinite(out).all()):
        return math.nan
    difference = (out[problem.rows].float() - expected).norm(dim=1)
    return float((difference / expected.norm(dim=1)).max())
