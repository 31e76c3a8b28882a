"""The ops under torch.compile: one opaque node, its mutation seen, the plan's buffers read at run time."""

import pytest
import torch

import lora_ops.ops  # registers torch.ops.lora_ops
from lora_ops.plan import SMALL_BATCH, plan_args

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
    arena = plan_args(plan)
    x, y, h = torch.randn(M, K), torch.randn(M, sum(WIDTHS)), torch.zeros(len(WIDTHS), M, R)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.lora_ops
    torch.library.opcheck(ops.lora_linear.default, (y, x, a, b, *arena, 1.0, 0, True), test_utils=checks)
    delta = torch.randn(SMALL_BATCH, sum(WIDTHS))
    torch.library.opcheck(ops.lora_delta.default, (delta, x, a, b, *arena, 1.0), test_utils=checks)
    for in_place in (False, True):
        torch.library.opcheck(ops.lora_join.default, (delta, y, x, a, b, *arena, 1.0, in_place), test_utils=checks)
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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("v2", [False, True])  # vLLM switches it off
def test_beside_compiles_to_one_fused_sum(v2, in_place):
    """The LoRA part is asked for before the GEMM starts; torch.compile makes no kernel for its sum, and no copy."""
    torch._dynamo.reset()
    plan, a, b = layer()
    weight = torch.randn(K, sum(WIDTHS))

    def model(x):
        return torch.relu(lora_ops.linear_beside(lambda: x @ weight, x, a, b, plan, in_place=in_place)) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        _, (code,) = torch._inductor.utils.run_and_get_code(compiled, torch.randn(M, K))
    body = code[code.index("def call(") :]
    order = [
        body.index(call) for call in ("lora_delta.default(", "extern_kernels.mm(", "lora_join.default(", "cpp_fused")
    ]
    assert order == sorted(order)
    assert body.count("cpp_fused") == 1
    assert "clone" not in body
    assert "copy_" not in body


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_beside_follows_the_plan(backend, in_place):
    """Batches on both sides of SMALL_BATCH, rows with, without and beyond the plan's tokens; through one graph."""
    sizes = (2, 6, SMALL_BATCH, SMALL_BATCH + 1, 700)
    _, a, b = layer()
    plan = lora_ops.LoraPlan(max(sizes) + 3, L, "cpu")
    weight = torch.randn(K, sum(WIDTHS))

    def model(x):
        return torch.relu(lora_ops.linear_beside(lambda: x @ weight, x, a, b, plan, in_place=in_place)) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for tokens in sizes:
        for lowest in (-1, 0, None):
            slots = [-1] * tokens if lowest is None else torch.randint(lowest, L, (tokens,)).tolist()
            plan.update(slots)
            padding = 3 if tokens + 3 <= SMALL_BATCH or tokens > SMALL_BATCH else 0
            x = torch.randn(tokens + padding, K)
            y = x @ weight
            lora_ops.reference.lora_linear(y, x, a, b, plan)
            torch.testing.assert_close(compiled(x), torch.relu(y) + 1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tokens", [M + 2, SMALL_BATCH + 1])
def test_beside_with_a_plan_larger_than_the_batch(tokens, in_place):
    """Rows of a batch that is smaller than its plan, as a layer that takes a part of the rows sees it."""
    _, a, b = layer()
    plan = lora_ops.LoraPlan(SMALL_BATCH + 100, L, "cpu")
    plan.update(torch.randint(0, L, (tokens,)).tolist())
    x, y = torch.randn(M, K), torch.randn(M, sum(WIDTHS))
    arguments = (x, a, b, *plan_args(plan), 1.0)
    delta = torch.full((SMALL_BATCH, sum(WIDTHS)), torch.nan)
    expected = y.clone()
    lora_ops.reference.lora_linear(expected, x, a, b, plan)
    torch.ops.lora_ops.lora_delta(delta, *arguments)
    assert delta[M:].isnan().all()
    torch.ops.lora_ops.lora_join(delta, y, *arguments, in_place)
    torch.testing.assert_close(y if in_place else y + delta[:M], expected)


def test_beside_leaves_rows_that_nobody_wrote_out():
    """What the buffer held before shows nowhere, NaN included."""
    plan, a, b = layer()
    x, delta = torch.randn(M, K), torch.full((SMALL_BATCH, sum(WIDTHS)), torch.nan)
    torch.ops.lora_ops.lora_delta(delta, x, a, b, *plan_args(plan), 1.0)
    assert delta[[0, 1, 3, 4, 5]].isfinite().all()
    with pytest.raises(ValueError, match=f"delta has 5 rows, expected {SMALL_BATCH}"):
        torch.ops.lora_ops.lora_delta(delta[:5], x, a, b, *plan_args(plan), 1.0)
    with pytest.raises(ValueError, match="lora_delta"):
        torch.ops.lora_ops.lora_delta(delta[:, :-1], x, a, b, *plan_args(plan), 1.0)
