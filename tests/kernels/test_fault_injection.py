"""A kernel that cannot be launched is an error that names its op, and is counted; nothing takes its place."""

import pytest
import torch

import lora_ops
from ops_patches import counters
from ops_patches.debug import KernelError

from .cases import Case, Layer, assert_close, make_layer, tolerance

CASE = Case(9, 96, (32, 16), 8, 3, "two slices")


def linear(layer: Layer) -> None:
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, offset=layer.offset)


def shrink(layer: Layer) -> None:
    out = torch.empty(2, CASE.tokens, CASE.rank, device=layer.x.device)
    lora_ops.lora_shrink(layer.x, layer.lora_a, out, layer.plan)


def expand(layer: Layer) -> None:
    h = torch.ones(2, CASE.tokens, CASE.rank, device=layer.x.device)
    lora_ops.lora_expand(h, layer.lora_b, layer.y, layer.plan, layer.offset)


def bgmv(layer: Layer) -> None:
    out = torch.empty(CASE.tokens, CASE.rank, device=layer.x.device)
    lora_ops.bgmv_shrink(layer.x, layer.lora_a[0], out, torch.from_numpy(layer.slots).to(layer.x.device))


@pytest.mark.parametrize(
    ("op", "call", "kernel"),
    [
        ("lora_linear", linear, "shrink.shrink"),
        ("lora_linear", linear, "expand.expand"),
        ("lora_shrink", shrink, "shrink.shrink"),
        ("lora_expand", expand, "expand.expand"),
        ("bgmv_shrink", bgmv, "shrink.shrink"),
    ],
)
def test_names_the_op(op, call, kernel, device, monkeypatch):
    layer = make_layer(CASE, torch.float16, device)
    layer.plan.update([0, 1, -1, 2, 0, 0, 1, 2, -1])

    def broken(*args, **kwargs):
        raise RuntimeError("injected fault")

    monkeypatch.setattr(f"lora_ops.kernels.{kernel}", broken)
    counters.reset()
    with pytest.raises(KernelError, match=rf"^{op} failed: RuntimeError: injected fault\n(.*\n)* *x|h: ") as caught:
        call(layer)
    assert str(caught.value.__cause__) == "injected fault"
    snapshot = counters.snapshot()
    assert snapshot["error"] == {op: {"KernelError": 1}}
    assert snapshot["hit"] == snapshot["fallback"] == {}


def test_the_op_works_again_without_the_fault(device, monkeypatch):
    """Nothing of the failed call is kept."""
    layer = make_layer(CASE, torch.float16, device)
    expected = layer.y.to(torch.float32, copy=True)
    lora_ops.reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan, 1.0, layer.offset)
    with monkeypatch.context() as patch:

        def broken(*args, **kwargs):
            raise RuntimeError("injected fault")

        patch.setattr("lora_ops.kernels.shrink.shrink", broken)
        with pytest.raises(KernelError):
            linear(layer)
    linear(layer)
    assert_close(layer.y, expected, tolerance(torch.float16))
