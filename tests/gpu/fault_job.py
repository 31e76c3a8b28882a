"""One lora_linear whose plan names adapter slots far outside of the weights: an illegal access on the device."""

import sys

import torch

import lora_ops
from tests.kernels.cases import Case, make_layer


def main() -> None:
    layer = make_layer(Case(40, 4096, (4096,), 16, 4, "decode"), torch.bfloat16, "cuda")
    layer.plan.update([i % 4 for i in range(40)])
    call = (layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, 1.0, layer.offset)
    lora_ops.lora_linear(*call)
    torch.cuda.synchronize()
    print("works", flush=True)
    sections = [layer.plan.section(name) for name in layer.plan.layout.offsets if name.startswith("tile_slots")]
    if not sections:
        sys.exit("the plan has no section of tile slots to corrupt: fit this job to its layout")
    for slots in sections:
        slots[slots >= 0] = 2**30
    lora_ops.lora_linear(*call)
    torch.cuda.synchronize()
    print("survived", flush=True)


if __name__ == "__main__":
    main()
