"""bgmv (one slot a row) and sgmv (one slot a segment) against the fp32 reference."""

import pytest
import torch

import lora_ops
from lora_ops import reference

from .cases import assert_close, tolerance

nan = float("nan")
SHAPES = [(0, 64, 48, 8, 3), (1, 64, 48, 8, 1), (6, 1100, 33, 5, 2), (19, 640, 128, 64, 4), (6, 0, 0, 64, 3)]
"""M, K, N, R, L."""
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
adding = pytest.mark.parametrize("add_inputs", [True, False])


def draw(dtype, device, *shape, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).to(device)


@shapes
def test_bgmv_shrink(shape, dtype, device):
    m, k, _, rank, slots = shape
    x, a = draw(dtype, device, m, k), draw(dtype, device, slots, rank, k, scale=max(k, 1) ** -0.5)
    index = torch.randint(-1, slots, (m,), device=device)
    out, expected = torch.full((m, rank), nan, device=device), torch.zeros(m, rank, device=device)
    lora_ops.bgmv_shrink(x, a, out, index, 0.5)
    reference.bgmv_shrink(x, a, expected, index, 0.5)
    assert_close(out, expected, 1e-5)


@shapes
@adding
def test_bgmv_expand(shape, dtype, device, add_inputs):
    m, _, n, rank, slots = shape
    x, b = torch.randn(m, rank, device=device), draw(dtype, device, slots, n, rank, scale=rank**-0.5)
    index = torch.randint(-1, slots, (m,), device=device, dtype=torch.int32)
    out = draw(dtype, device, m, n + 5)
    expected = out.to(torch.float32, copy=True)
    lora_ops.bgmv_expand(x, b, out, index, add_inputs)
    reference.bgmv_expand(x, b, expected, index, add_inputs)
    assert_close(out, expected, tolerance(dtype))


@shapes
@adding
def test_bgmv_expand_slice(shape, dtype, device, add_inputs):
    m, _, n, rank, slots = shape
    x, b = torch.randn(m, rank, device=device), draw(dtype, device, slots, n, rank, scale=rank**-0.5)
    index = torch.randint(-1, slots, (m,), device=device)
    out = draw(dtype, device, m, n + 30)
    if not add_inputs:
        out[:, 9 : 9 + n] = nan
    expected = out.to(torch.float32, copy=True)
    lora_ops.bgmv_expand_slice(x, b, out, index, 9, n, add_inputs)
    reference.bgmv_expand_slice(x, b, expected, index, 9, n, add_inputs)
    assert_close(out, expected, tolerance(dtype))


def test_indices_may_be_strided(device):
    """Columns of a larger tensor: neighbours in memory belong to other rows."""
    x, a = draw(torch.float16, device, 6, 64), draw(torch.float16, device, 4, 8, 64, scale=0.125)
    table = torch.tensor([[0, 3, 2], [3, 3, -1], [6, 0, 3]], device=device)  # first row, rows, slot
    starts, lengths, slots = table[:2].unbind(1)
    row_slots = torch.tensor([[2, 0], [2, 0], [2, 1], [-1, 1], [-1, 3], [3, 3]], device=device)[:, 0]
    out, expected = torch.full((6, 8), nan, device=device), torch.full((6, 8), nan, device=device)
    lora_ops.bgmv_shrink(x, a, out, row_slots)
    reference.bgmv_shrink(x, a, expected, row_slots)
    assert_close(out, expected, 1e-5)
    lora_ops.sgmv_shrink(x, a, out.fill_(nan), starts, lengths, slots, 2, 3, 6)
    reference.sgmv_shrink(x, a, expected.fill_(nan), starts, lengths, slots, 2, 3, 6)
    assert_close(out, expected, 1e-5)


SEGMENTS = [([], []), ([5], [0]), ([1, 30, 0, 70], [0, -1, 2, 1]), ([600, 3], [1, 0])]  # lengths, slots


def segment_args(lengths, slots, device):
    """Segments with a gap of one uncovered row after each."""
    starts = [sum(lengths[:i]) + i for i in range(len(lengths))]
    tensors = [torch.tensor(values, dtype=torch.int64, device=device) for values in (starts, lengths, slots)]
    return (*tensors, len(lengths), max(lengths, default=0), sum(lengths)), sum(lengths) + len(lengths)


@pytest.mark.parametrize(("lengths", "slots"), SEGMENTS, ids=str)
def test_sgmv_shrink(lengths, slots, dtype, device):
    segments, rows = segment_args(lengths, slots, device)
    x, a = draw(dtype, device, rows, 640), draw(dtype, device, 3, 16, 640, scale=640**-0.5)
    out, expected = torch.full((rows, 16), nan, device=device), torch.full((rows, 16), nan, device=device)
    lora_ops.sgmv_shrink(x, a, out, *segments, 0.5)
    reference.sgmv_shrink(x, a, expected, *segments, 0.5)
    assert torch.equal(out.isnan(), expected.isnan()), "uncovered rows, and only these, stay as they are"
    assert_close(out.nan_to_num(), expected.nan_to_num(), 1e-5)


@pytest.mark.parametrize(("lengths", "slots"), SEGMENTS, ids=str)
@adding
def test_sgmv_expand_slice(lengths, slots, dtype, device, add_inputs):
    segments, rows = segment_args(lengths, slots, device)
    x, b = torch.randn(rows, 16, device=device), draw(dtype, device, 3, 40, 16, scale=0.25)
    out = draw(dtype, device, rows, 64)
    expected = out.to(torch.float32, copy=True)
    lora_ops.sgmv_expand_slice(x, b, out, *segments, 8, 40, add_inputs)
    reference.sgmv_expand_slice(x, b, expected, *segments, 8, 40, add_inputs)
    assert_close(out, expected, tolerance(dtype))


def test_sgmv_expand(dtype, device):
    segments, rows = segment_args([7, 20], [1, 0], device)
    x, b = torch.randn(rows, 16, device=device), draw(dtype, device, 3, 40, 16, scale=0.25)
    out = draw(dtype, device, rows, 40)
    expected = out.to(torch.float32, copy=True)
    lora_ops.sgmv_expand(x, b, out, *segments)
    reference.sgmv_expand(x, b, expected, *segments)
    assert_close(out, expected, tolerance(dtype))
