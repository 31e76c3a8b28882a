"""The ops under torch.compile: one opaque node, its mutation seen, the plan's buffers read at run time."""

import pytest
import torch

import lora_ops.ops  # registers torch.ops.lora_ops

M, K, R, L = 6, 32, 8, 3
WIDTHS = (24, 8)


def layer():
    plan = lora_ops.LoraPlan(M + 4, L, "cpu")
    plan.update([0, 1, -1, 2, 2, 0])
    a = [torch.randn(L, R, K) for _ in WIDTHS]
    b = [torch.randn(L, n, R) for n in WIDTHS]
    return plan, a, b


def test_schemas_declare_their_mutation():
    plan, a, b = layer()
    arena = (plan.arena, plan.counts, [plan.max_tokens, plan.max_slots, plan.extra_tokens])
    x, y, h = torch.randn(M, K), torch.randn(M, sum(WIDTHS)), torch.zeros(len(WIDTHS), M, R)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.lora_ops
    torch.library.opcheck(ops.lora_linear.default, (y, x, a, b, *arena, 1.0, 0, True), test_utils=checks)
    torch.library.opcheck(ops.lora_shrink.default, (x, a, h, *arena, 1.0), test_utils=checks)
    torch.library.opcheck(ops.lora_expand.default, (h, b, y, *arena, 0, True), test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graph_follows_the_plan(backend):
    plan, a, b = layer()
    weight = torch.randn(K, sum(WIDTHS))

    def model(x):
        y = x @ weight
        lora_ops.lora_linear(y, x, a, b, plan)
        h = y.new_zeros(len(WIDTHS), x.shape[0], R)
        lora_ops.lora_shrink(x, a, h, plan)
        lora_ops.lora_expand(h, b, y, plan)
        return torch.relu(y) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for slots in ([0, 1, -1, 2, 2, 0], [2, 2, 2, 2], [-1] * 5, [1] * 10):
        plan.update(slots)
        x = torch.randn(len(slots), K)
        torch.testing.assert_close(compiled(x), model(x))
