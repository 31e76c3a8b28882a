"""Runs every op on a GPU over ragged shapes; test_compute_sanitizer.py runs it under compute-sanitizer."""

import itertools

import torch

import lora_ops
import moe_ops
from ops_configs.lora import ExpandConfig, pinned
from tests.kernels import test_moe_ops as moe
from tests.kernels import test_moe_quant as moe_quant
from tests.kernels import test_plan_ops as plan_ops
from tests.kernels.cases import CASES, assert_close, make_layer, tolerance


def lora() -> None:
    for case in CASES:
        layer = make_layer(case, torch.bfloat16, "cuda")
        x, y, plan = layer.x, layer.y, layer.plan
        rows, rank = case.tokens, case.rank
        expected = y.to(torch.float32, copy=True)
        lora_ops.reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, plan, 1.0, layer.offset)
        lora_ops.lora_linear(y, x, layer.lora_a, layer.lora_b, plan, 1.0, layer.offset)
        assert_close(y, expected, tolerance(torch.bfloat16))

        h = torch.empty(len(case.widths), rows, rank, device="cuda")
        lora_ops.lora_shrink(x, layer.lora_a, h, plan)
        lora_ops.lora_expand(h, layer.lora_b, y, plan, layer.offset, add_inputs=False)

        index = torch.from_numpy(layer.slots).cuda()
        lora_ops.bgmv_shrink(x, layer.lora_a[0], h[0], index)
        lora_ops.bgmv_expand(h[0], layer.lora_b[0], y, index)

        half = rows // 2
        starts, lengths = torch.tensor([0, half], device="cuda"), torch.tensor([half, rows - half], device="cuda")
        segments = (starts, lengths, torch.tensor([0, -1], device="cuda"), 2, rows - half, rows)
        lora_ops.sgmv_shrink(x, layer.lora_a[0], h[0], *segments)
        lora_ops.sgmv_expand(h[0], layer.lora_b[0], y, *segments, add_inputs=False)
        torch.cuda.synchronize()
        print(case, flush=True)


def aligned_lora() -> None:
    """Layers aligned as models' are: tiles of 64 rows, of few rows, products that ranks share, several steps."""
    wide = [
        (64, 64, plan_ops.WIDE_CONFIGS),
        (64, 64, plan_ops.STEPPED_WIDE_CONFIGS),
        (64, 128, plan_ops.RANK_128_CONFIGS),
        (4096, 64, plan_ops.LONG_WIDE_CONFIGS),
    ]
    for k, rank, configs in wide:
        layer = plan_ops.wide_layer(k, "cuda", torch.bfloat16, rank)
        for slots in ([2, 2, 3] * 100, [1] * 129 + [-1] * 20):
            layer.plan.update(slots)
            with pinned(300, *configs):
                lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        torch.cuda.synchronize()
        print(f"wide tiles, K{k} R{rank}", flush=True)
    for rows, rank, steps in itertools.product((1, 3, 9, 260), (8, 32), (1, 3)):
        layer = plan_ops.few_rows_layer(rows, rank, (96, 48), torch.bfloat16, "cuda")
        config = ExpandConfig(64, max(rank, 16), num_warps=4, num_stages=3, steps=steps)
        plan_ops.check_expand(layer, config, add_inputs=True)
        torch.cuda.synchronize()
        print(f"{rows} rows, R{rank}, {steps} steps", flush=True)


def experts() -> None:
    for case in moe.CASES:
        layer = moe.make_layer(case, torch.bfloat16, "cuda")
        expected = moe_ops.reference.fused_experts(**moe.in_fp32(layer))
        assert_close(moe_ops.fused_experts(**layer), expected, moe.layer_tolerance(torch.bfloat16))
        torch.cuda.synchronize()
        print(case, flush=True)
    for scheme in moe_quant.SCHEMES:
        case = moe.Case(f"quantised: {scheme}", tokens=70, experts=3, left_out=0.2, hidden=160, inner=144)
        moe_ops.fused_experts(**moe_quant.make_quantised(case, scheme, torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
        print(case, flush=True)


if __name__ == "__main__":
    lora()
    aligned_lora()
    experts()
