"""Runs every op on a GPU over ragged shapes; test_compute_sanitizer.py runs it under compute-sanitizer."""

import torch

import lora_ops
from tests.kernels.cases import CASES, assert_close, make_layer, tolerance


def main() -> None:
    for case in CASES:
        layer = make_layer(case, torch.bfloat16, "cuda")
        x, y, plan = layer.x, layer.y, layer.plan
        rows, rank = case.tokens, case.rank
        expected = y.float()
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


if __name__ == "__main__":
    main()
