"""Random routed-experts layers for the jobs that run hosts' MoE code on CPU tensors, and how results are compared."""

import math
from collections.abc import Callable

import torch

from moe_ops.reference import dequantize
from ops_patches import counters

TOKENS, EXPERTS, HIDDEN, INNER, TOP_K = 7, 5, 64, 48, 2
BLOCK = (32, 32)


class RandomLayer:
    """Weights, tokens and routing of a layer in fp16; weights in fp8 or int8 with their scales when `quant` is given.

    per: "tensor", "channel" or BLOCK, what has a scale of its own; with "channel", each token has one, too, and
    magnitudes of its own. static: scales of the activations, so small that they clip.
    local: ids from there on are -1. padding: columns of rubbish after those of the weights.
    """

    def __init__(
        self, gated=True, biased=False, local=EXPERTS, top_k=TOP_K, quant=None, per="tensor", static=False, padding=0
    ) -> None:
        rows = 2 * INNER if gated else INNER
        self.w13 = torch.randn(EXPERTS, rows, HIDDEN).div(math.sqrt(HIDDEN)).half()
        self.w2 = torch.randn(EXPERTS, HIDDEN, INNER).div(math.sqrt(INNER)).half()
        self.hidden = torch.randn(TOKENS, HIDDEN).mul(2).half()
        if per == "channel":
            self.hidden *= 2.0 ** -torch.arange(TOKENS)[:, None]
        self.ids = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :top_k].int()
        self.ids[self.ids >= local] = -1
        self.weights = torch.rand(TOKENS, top_k)
        self.b13 = torch.randn(EXPERTS, rows).half() if biased else None
        self.b2 = torch.randn(EXPERTS, HIDDEN).half() if biased else None
        self.quant, self.per_channel, self.block = quant, per == "channel", list(per) if per == BLOCK else None
        self.s13 = self.s2 = None
        self.a1, self.a2 = (torch.tensor([0.002]), torch.tensor([0.001])) if static else (None, None)
        if quant is not None:
            self.w13, self.s13 = self._quantised(self.w13)
            self.w2, self.s2 = self._quantised(self.w2)
        if padding:
            pads = (torch.full((*w.shape[:2], padding), 99.0).to(w.dtype) for w in (self.w13, self.w2))
            self.w13, self.w2 = (torch.cat(pair, -1) for pair in zip((self.w13, self.w2), pads, strict=True))

    def _quantised(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = w.float()
        dtype, limit = (torch.float8_e4m3fn, 448.0) if "fp8" in self.quant else (torch.int8, 127.0)
        if self.block:
            blocks = [-(-size // side) for size, side in zip(w.shape[1:], self.block, strict=True)]
            scale = (0.5 + torch.rand(EXPERTS, *blocks)) * float(w.abs().max()) / limit
        else:
            scale = w.abs().amax(2, keepdim=True) / limit if self.per_channel else w.abs().amax((1, 2)) / limit
        q = w / dequantize(torch.ones_like(w), scale, self.block)
        return (q.round() if dtype == torch.int8 else q).clamp(-limit, limit).to(dtype), scale


def align(topk_ids, block_size, num_experts, expert_map=None, **options):
    """What the hosts' moe_align_block_size returns: choices by expert padded to blocks, the expert of each block."""
    choices = topk_ids.flatten()
    if expert_map is not None:
        choices = torch.where(choices < 0, -1, expert_map[choices.long()])
    ids, experts = [], []
    for expert in range(-1, num_experts):
        mine = torch.nonzero(choices == expert).flatten().tolist()
        mine += [choices.numel()] * (-len(mine) % block_size)
        ids += mine
        experts += [expert] * (len(mine) // block_size)
    return tuple(torch.tensor(values, dtype=torch.int32) for values in (ids, experts, [len(ids)]))


def compare(patch: Callable, status: Callable[[], dict], calls: dict[str, tuple[Callable, Callable]]) -> dict:
    """Run the first call of each case unpatched and then, patched, the second: their difference, and what was counted.

    "difference" is the largest one relative to the largest value of its row, "rms" the largest ratio of the root mean
    squares of a row, "whole" that of all rows together.
    """
    host = {name: call().double() for name, (call, _) in calls.items()}
    report = {}
    with patch(strict=True):
        for name, (_, call) in calls.items():
            counters.reset()
            before = status()["targets"]
            result = call().double()
            fired = {key.rpartition(":")[2]: count - before[key] for key, count in status()["targets"].items()}
            expected = host[name]
            assert result.shape == expected.shape
            rows, differences = expected.flatten(1), (result - expected).flatten(1)
            report[name] = {
                "difference": float((differences.abs().amax(1) / rows.abs().amax(1).clamp(min=1e-9)).max()),
                "rms": float((differences.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-9)).max()),
                "whole": float(differences.norm() / rows.norm().clamp(min=1e-9)),
                "fired": {target: count for target, count in fired.items() if count},
                **counters.snapshot(),
            }
    return report
