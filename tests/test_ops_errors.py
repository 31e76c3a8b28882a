"""Bad arguments: one clear error, before anything is written."""

import re

import pytest
import torch

import lora_ops
from lora_ops import checks
from lora_ops.plan import plan_args
from ops_patches import counters

M, K, N, R, L = 4, 32, 24, 8, 3


def good() -> dict:
    plan = lora_ops.LoraPlan(M, L, "cpu")
    plan.update([0, 1, -1, 2])
    return {
        "y": torch.randn(M, N),
        "x": torch.randn(M, K),
        "lora_a": [torch.randn(L, R, K)],
        "lora_b": [torch.randn(L, N, R)],
        "plan": plan,
    }


BAD_LINEAR = {
    "int weights": ({"lora_a": [torch.ones(L, R, K, dtype=torch.int32)]}, TypeError, r"lora_a\[0\] is torch.int32"),
    "x dtype": ({"x": torch.randn(M, K).half()}, TypeError, "x is torch.float16, lora_a is torch.float32"),
    "x columns": ({"x": torch.randn(M, K + 1)}, ValueError, r"x has shape \(4, 33\), expected \[rows, 32\]"),
    "x transposed": ({"x": torch.randn(K, M).T}, ValueError, "x has strides .* must be contiguous"),
    "x three-dimensional": ({"x": torch.randn(1, M, K)}, ValueError, r"x has shape \(1, 4, 32\)"),
    "rows differ": ({"y": torch.randn(M + 1, N)}, ValueError, "row counts differ: x 4, y 5"),
    "y too narrow": ({"y": torch.randn(M, N - 1)}, ValueError, "columns 0 to 23 do not fit into the output"),
    "negative offset": ({"offset": -1}, ValueError, "columns -1 to 22 do not fit"),
    "offset too large": ({"offset": 1}, ValueError, "columns 1 to 24 do not fit"),
    "one row for all of y": ({"y": torch.randn(1, N).expand(M, N)}, ValueError, "y has .* its rows overlap in memory"),
    "rows of y overlap": (
        {"y": torch.randn(M * N).as_strided((M, N), (N - 1, 1))},
        ValueError,
        r"y has shape \(4, 24\) and strides \(23, 1\), its rows overlap in memory: give a tensor of separate rows",
    ),
    "y integer": ({"y": torch.ones(M, N, dtype=torch.int64)}, TypeError, "y is torch.int64"),
    "no slices": ({"lora_a": [], "lora_b": []}, ValueError, "lora_a is empty"),
    "slice counts differ": ({"lora_b": []}, ValueError, "lora_a has 1 slices, lora_b has 0"),
    "rank mismatch": ({"lora_b": [torch.randn(L, N, R + 1)]}, ValueError, "slots, rank and dtype must agree"),
    "slot mismatch": ({"lora_b": [torch.randn(L + 1, N, R)]}, ValueError, "slots, rank and dtype must agree"),
    "weights' dimensions": ({"lora_a": [torch.randn(R, K)]}, ValueError, r"lora_a\[0\] has shape \(8, 32\)"),
    "weights not contiguous": (
        {"lora_a": [torch.randn(L, K, R).transpose(1, 2)]},
        ValueError,
        r"lora_a\[0\] has strides",
    ),
    "rank too large": (
        {"lora_a": [torch.randn(L, 513, K)], "lora_b": [torch.randn(L, N, 513)]},
        ValueError,
        "rank 513, supported ranks are 1 to 512",
    ),
    "plan too large for the slots": (
        {"plan": lora_ops.LoraPlan(M, L + 1, "cpu")},
        ValueError,
        "the plan has 4 slots, the weights 3",
    ),
    "slices differ": (
        {"lora_a": [torch.randn(L, R, K), torch.randn(L, R, K + 8)], "lora_b": [torch.randn(L, 8, R)] * 2},
        ValueError,
        r"lora_a\[1\] has shape \(3, 8, 40\)",
    ),
    "slices of unequal rank": (
        {"lora_a": [torch.randn(L, R, K), torch.randn(L, R + 1, K)], "lora_b": [torch.randn(L, 8, R)] * 2},
        ValueError,
        r"lora_a\[1\] has shape \(3, 9, 32\)",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_LINEAR.values(), ids=BAD_LINEAR.keys())
def test_linear(change, error, message):
    arguments = good() | change
    before = arguments["y"].clone()
    with pytest.raises(error, match=message):
        lora_ops.lora_linear(**arguments)
    assert torch.equal(arguments["y"], before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.zeros(M, N + 1), ValueError, r"y has shape \(4, 25\), expected \[rows, 24\]"),
        (torch.zeros(M, N - 1), ValueError, r"y has shape \(4, 23\), expected \[rows, 24\]"),
        (torch.zeros(M + 1, N), ValueError, "row counts differ: x 4, y 5"),
        (torch.zeros(N, M).T, ValueError, "y has strides .* must be contiguous"),
        (torch.zeros(N).expand(M, N), ValueError, r"y has .* strides \(0, 1\), its rows overlap in memory"),
        (torch.zeros(M, N, dtype=torch.int8), TypeError, "y is torch.int8"),
    ],
)
def test_output_of_the_layer_beside(y, error, message, in_place):
    arguments = good()
    del arguments["y"]
    with pytest.raises(error, match=f"^lora_join: {message}"):
        lora_ops.linear_beside(lambda: y, **arguments, in_place=in_place)
    assert not y.any()


def test_slots_beyond_int32():
    """A kernel's offsets in a slot would wrap around."""
    stride = 2**27
    weight = torch.empty(17 * stride, dtype=torch.float16, device="meta").as_strided((1, 17, 64), (0, stride, 1))
    message = r"lora_b\[0\] has shape \(1, 17, 64\) and strides .*, but a slot may span 2147483648 elements"
    with pytest.raises(ValueError, match=message):
        checks.flat_weights("lora_expand", "lora_b", [weight])
    assert checks.flat_weights("lora_expand", "lora_b", [weight[:, :16]])


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_more_rows_beside_the_layer_than_a_plan_can_hold(max_tokens):
    """One token's slot would stand for all rows, among them padding whose LoRA part nobody wrote."""
    arguments = good() | {"plan": lora_ops.LoraPlan(max_tokens, L, "cpu")}
    arguments["plan"].update([0] * max_tokens)
    y = arguments.pop("y")
    with pytest.raises(ValueError, match=f"^lora_join: y has 4 rows, but the plan holds {max_tokens} tokens"):
        lora_ops.linear_beside(lambda: y, **arguments)
    expected = y.clone()
    lora_ops.reference.lora_linear(expected, **{name: arguments[name] for name in ("x", "lora_a", "lora_b", "plan")})
    assert torch.equal(lora_ops.linear_beside(lambda: y, **arguments, in_place=True), expected)


def test_every_message_names_the_op():
    with pytest.raises(ValueError, match=r"^lora_linear: "):
        lora_ops.lora_linear(**(good() | {"offset": 1}))


def test_a_plan_of_another_batch():
    arguments = good()
    arguments |= {"x": arguments["x"][:2], "y": arguments["y"][:2]}
    with pytest.raises(ValueError, match="the plan is for 4 tokens, but there are 2 rows: update the plan"):
        lora_ops.lora_linear(**arguments)


def test_an_arena_of_another_layout():
    """A compiled graph that outlives its plan must not read another plan with the old offsets."""
    arguments = good()
    plan = arguments["plan"]
    tensors = [arguments[name] for name in ("y", "x", "lora_a", "lora_b")]
    with pytest.raises(
        ValueError, match=r"arena has shape .* of \[64, 3, 0\] make .* they must be of one LoraPlan.* empty that cache"
    ):
        torch.ops.lora_ops.lora_linear(*tensors, plan.arena, plan.counts, [64, L, 0], 1.0, 0, True)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(1, M, R, dtype=torch.float16), TypeError, "out is torch.float16, expected float32"),
        (torch.zeros(2, M, R), ValueError, re.escape("expected [slices, rows, rank] = (1, 4, 8)")),
        (torch.zeros(1, R, M).transpose(1, 2), ValueError, "must be contiguous"),
    ],
)
def test_shrink_output(out, error, message):
    arguments = good()
    with pytest.raises(error, match=message):
        lora_ops.lora_shrink(arguments["x"], arguments["lora_a"], out, arguments["plan"])


def test_expand_input():
    arguments = good()
    with pytest.raises(ValueError, match=re.escape("h has shape (1, 4, 9), expected [slices, rows, rank] = (1, 4, 8)")):
        lora_ops.lora_expand(torch.zeros(1, M, R + 1), arguments["lora_b"], arguments["y"], arguments["plan"])


def test_x_in_the_memory_of_y():
    """Up to three slices are read by one launch before another writes them; of more, later ones would read y."""
    memory, slices = torch.randn(M, K), 4
    a, b = [torch.randn(L, R, K)] * slices, [torch.randn(L, K // slices, R)] * slices
    plan, x = good()["plan"], memory.clone()
    expected = x.clone()
    lora_ops.lora_linear(expected, x, a[:3], b[:3], plan)
    lora_ops.lora_linear(memory, memory, a[:3], b[:3], plan)
    assert torch.equal(memory, expected)
    before = memory.clone()
    with pytest.raises(ValueError, match="lora_linear: y overlaps x, or lies between its rows"):
        lora_ops.lora_linear(memory, memory, a, b, plan)
    assert torch.equal(memory, before)


def test_outputs_whose_rows_overlap():
    """Programs of several rows would write one address, in any order."""
    arguments, index, one = good(), torch.zeros(M, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    x, h, a, b, plan = arguments["x"], torch.randn(M, R), arguments["lora_a"], arguments["lora_b"], arguments["plan"]
    segments = (one, torch.tensor([M]), one, 1, M, M)
    out, y = torch.zeros(R).expand(M, R), torch.zeros(N).expand(M, N)
    delta = torch.zeros(N).expand(512, N)
    calls = [
        lambda: lora_ops.lora_shrink(x, a, out[None], plan),
        lambda: lora_ops.lora_expand(h[None], b, y, plan),
        lambda: torch.ops.lora_ops.lora_delta(delta, x, a, b, *plan_args(plan), 1.0),
        lambda: lora_ops.bgmv_shrink(x, a[0], out, index),
        lambda: lora_ops.bgmv_expand(h, b[0], y, index),
        lambda: lora_ops.sgmv_shrink(x, a[0], out, *segments),
        lambda: lora_ops.sgmv_expand(h, b[0], y, *segments),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"its rows overlap in memory|it must be contiguous"):
            call()
    assert not out.any()
    assert not y.any()
    lora_ops.bgmv_expand(h[:1], b[0], y[:1], index[:1])  # one row has none to overlap with


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), r"slot_indices span 0\.\.3, but slots are 0\.\.2"),
        (torch.tensor([0, -2, 1, 0]), r"slot_indices span -2\.\.1"),
        (torch.tensor([0.0, 1, 1, 0]), "slot_indices is torch.float32"),
        (torch.tensor([True, True, False, True]), "slot_indices is torch.bool"),
        (torch.tensor([[0, 1], [1, 1], [0, 0], [2, 1]]), r"slot_indices has shape \(4, 2\), expected one dimension"),
        (torch.tensor([0, 1]), "row counts differ: x 4, slot_indices 2"),
    ],
)
def test_bgmv_indices(index, message):
    x, a, b = torch.randn(M, K), torch.randn(L, R, K), torch.randn(L, N, R)
    with pytest.raises(ValueError, match=message):
        lora_ops.bgmv_shrink(x, a, torch.zeros(M, R), index)
    with pytest.raises(ValueError, match=message):
        lora_ops.bgmv_expand(torch.randn(M, R), b, torch.zeros(M, N), index)


@pytest.mark.parametrize(
    ("starts", "lengths", "batches", "longest", "message"),
    [
        ([0, 2], [2, 3], 2, 3, "segments span rows 0 to 4 with up to 3 rows, but the batch has 4 rows"),
        ([0, 1], [1, 3], 2, 2, "max_seq_length is 2"),
        ([-1, 0], [1, 3], 2, 3, "segments span rows -1"),
        ([0], [4], 2, 4, r"seq_starts has shape \(1,\), expected at least 2 segments"),
        ([2**31 - 1, 0], [3, 1], 2, 3, "segments span rows 0 to 2147483649"),
        ([0, 2], [2, 2], -1, 2, "batches is -1"),
        ([0, 2], [3, 2], 2, 3, "segments overlap: each row may have one slot"),
        ([2, 0], [2, 3], 2, 3, "segments overlap"),
        ([1, 1], [1, 1], 2, 1, "segments overlap"),
    ],
)
def test_sgmv_segments(starts, lengths, batches, longest, message):
    starts, lengths = (torch.tensor(values, dtype=torch.int32) for values in (starts, lengths))
    segments = (starts, lengths, torch.tensor([0, 1]), batches, longest, M)
    with pytest.raises(ValueError, match=message):
        lora_ops.sgmv_shrink(torch.randn(M, K), torch.randn(L, R, K), torch.zeros(M, R), *segments)


def test_sgmv_segments_in_any_order_and_empty_ones():
    """None of these overlap: an empty one has no row, wherever it begins."""
    starts, lengths, slots = torch.tensor([2, 1, 0]), torch.tensor([2, 0, 2]), torch.tensor([0, 2, 1])
    x, a, out = torch.randn(M, K), torch.randn(L, R, K), torch.full((M, R), torch.nan)
    lora_ops.sgmv_shrink(x, a, out, starts, lengths, slots, 3, 2, M)
    expected = torch.empty(M, R)
    lora_ops.bgmv_shrink(x, a, expected, torch.tensor([1, 1, 0, 0]))
    assert torch.equal(out, expected)


def test_slice_size_must_match():
    with pytest.raises(ValueError, match="slice_size is 8, but lora_b has 24 output features"):
        lora_ops.bgmv_expand_slice(
            torch.randn(M, R), torch.randn(L, N, R), torch.zeros(M, 64), torch.zeros(M, dtype=torch.int64), 0, 8
        )


def test_errors_and_hits_are_counted():
    counters.reset()
    lora_ops.lora_linear(**good())
    with pytest.raises(ValueError, match="do not fit"):
        lora_ops.lora_linear(**(good() | {"offset": 1}))
    snapshot = counters.snapshot()
    assert snapshot["hit"]["lora_linear"] == 1
    assert snapshot["error"]["lora_linear"] == {"ValueError": 1}
