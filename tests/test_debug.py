"""Errors of kernels name the op; with LORA_OPS_DEBUG=1 the device is waited for, and the kernel is named too."""

from types import SimpleNamespace

import pytest
import torch

from lora_ops import ops  # noqa: F401 (registers the ops that messages describe)
from ops_patches import debug


@pytest.fixture
def switch(monkeypatch):
    """Sets the variable, and afterwards leaves no hook in Triton."""
    from triton import knobs

    hooks = knobs.runtime.launch_exit_hook

    def set_to(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(debug.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(debug.VARIABLE, value)
        debug.enabled.cache_clear()

    set_to(None)
    yield set_to
    hooks.remove(debug._after_launch)
    monkeypatch.undo()
    debug.enabled.cache_clear()


class Device:
    """A CUDA device whose next waits end as told: True, or False for an illegal access."""

    def __init__(self, monkeypatch) -> None:
        self.ends: list[bool] = []
        self.waits = 0
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self) -> None:
        self.waits += 1
        if self.ends and not self.ends.pop(0):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def device(monkeypatch, switch) -> Device:
    return Device(monkeypatch)


ARGS = (torch.ones(3, 5, dtype=torch.float16), [torch.ones(2, 4, 5), torch.ones(2, 4, 5)], torch.ones(2, 3, 4))


def call(error: Exception | None = None) -> None:
    with debug.watch("lora_shrink", ARGS):
        if error:
            raise error


def test_a_failing_kernel_is_named_with_its_arguments(switch):
    cause = RuntimeError("out of resource: shared memory")
    with pytest.raises(debug.KernelError, match=r"^lora_shrink failed: RuntimeError: out of resource") as caught:
        call(cause)
    assert caught.value.__cause__ is cause
    message = str(caught.value)
    assert "x: float16 [3, 5] strides [5, 1] on cpu" in message
    assert "lora_a: float32 [2, 4, 5] strides [20, 5, 1] on cpu; float32" in message
    assert debug.VARIABLE not in message, "not an error that shows late"


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("bad"), torch.OutOfMemoryError("full")])
def test_what_names_itself_passes_unchanged(switch, error):
    with pytest.raises(type(error)) as caught:
        call(error)
    assert caught.value is error


def test_a_cuda_error_says_how_to_find_its_kernel(switch):
    with pytest.raises(debug.KernelError, match="LORA_OPS_DEBUG=1 and run without CUDA graphs"):
        call(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_nothing_is_waited_for_unless_asked(device):
    call()
    assert device.waits == 0


def test_debug_waits_before_and_after(device, switch):
    switch("1")
    call()
    assert device.waits == 2


def test_debug_finds_the_op_whose_kernel_failed(device, switch):
    switch("1")
    device.ends = [True, False]
    with pytest.raises(
        debug.KernelError, match=r"^lora_shrink failed: a kernel failed: CUDA error: an illegal"
    ) as caught:
        call()
    assert "x: float16 [3, 5]" in str(caught.value)


def test_debug_does_not_blame_an_op_for_an_earlier_kernel(device, switch):
    switch("1")
    device.ends = [False]
    with pytest.raises(debug.KernelError, match=r"^a kernel that ran before lora_shrink, of any library, failed: CUDA"):
        call()


def test_debug_leaves_a_capture_alone(device, switch):
    switch("1")
    device.capturing = True
    call()
    assert device.waits == 0


def test_debug_names_the_kernel_after_its_launch(device, switch):
    from triton import knobs

    switch("1")
    device.ends = [True, True, False]

    def launch_two() -> None:
        with debug.watch("lora_shrink", ARGS):
            for name in ("first_kernel", "shrink_kernel"):
                launched = SimpleNamespace(get=lambda name=name: {"name": name})
                knobs.runtime.launch_exit_hook(launched)

    with pytest.raises(debug.KernelError, match=r"^lora_shrink failed: kernel shrink_kernel failed: CUDA error"):
        launch_two()


def test_other_values_are_an_error(switch):
    switch("yes")
    with pytest.raises(ValueError, match=r"LORA_OPS_DEBUG='yes' is not allowed: set it to 1 .* or 0"):
        call()
