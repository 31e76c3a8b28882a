"""Errors of our kernels carry the op's name and arguments; with LORA_OPS_DEBUG=1, the kernel's name too.

CUDA runs kernels behind Python's back: an illegal access shows at some later call that has nothing to do with it. With
LORA_OPS_DEBUG=1 each op of ours waits for the device before and after it, and each Triton kernel of the process after
its launch, so that the error comes from the kernel that made it. Slow, and for finding faults alone. Nothing can be
waited for inside a CUDA graph: run eagerly (vLLM: --enforce-eager).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

VARIABLE = "LORA_OPS_DEBUG"
LATE = (
    "CUDA errors show late: the kernel that failed may be an earlier one, of any library. "
    f"Set {VARIABLE}=1 and run without CUDA graphs (vLLM: --enforce-eager) to get its name."
)


class KernelError(RuntimeError):
    """A kernel of ours failed; the message names the op, its arguments and what went wrong."""


@functools.cache
def enabled() -> bool:
    """Whether LORA_OPS_DEBUG asks to wait for each kernel; the first call that finds it so hooks into Triton.

    Raises:
        ValueError: a value other than 0 and 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={value!r} is not allowed: set it to 1 (wait for each kernel) or 0 (do not)")
    if value == "1":
        from triton import knobs

        knobs.runtime.launch_exit_hook.add(_after_launch)
    return value == "1"


class watch:
    """Context of one call of an op: what fails in it is raised as a KernelError that names the op and its arguments.

    ValueError and TypeError (bad arguments, which name the op already) and torch.OutOfMemoryError (which hosts handle)
    pass unchanged.
    """

    __slots__ = ("args", "namespace", "op")

    def __init__(self, op: str, args: Sequence, namespace: str = "lora_ops") -> None:
        self.op, self.args, self.namespace = op, args, namespace

    def __enter__(self) -> None:
        if enabled():
            _wait(f"a kernel that ran before {self.op}, of any library, failed")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None and enabled():
            try:
                _wait("a kernel failed")
            except KernelError as late:
                error = late
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, (ValueError, TypeError, torch.OutOfMemoryError)):
            return
        what = str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {error}"
        hint = f"\n{LATE}" if "CUDA error" in what and not enabled() else ""
        raise KernelError(f"{self.op} failed: {what}\n{describe(self.op, self.args, self.namespace)}{hint}") from error


def describe(op: str, args: Sequence, namespace: str = "lora_ops") -> str:
    """The op's arguments in words, one a line: dtype, shape, strides and device of tensors, the value of others."""
    names = [argument.name for argument in getattr(getattr(torch.ops, namespace), op).default._schema.arguments]
    return "\n".join(f"  {name}: {_text(value)}" for name, value in zip(names, args, strict=False))


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape, strides = list(value.shape), list(value.stride())
        return f"{str(value.dtype).removeprefix('torch.')} {shape} strides {strides} on {value.device}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return "; ".join(map(_text, value))
    return repr(value)


def _wait(what: str) -> None:
    """Wait for the device, if there is one in use and no graph is being captured."""
    if not torch.cuda.is_initialized():
        return
    try:
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise KernelError(f"{what}: {error}") from error


def _after_launch(metadata: Any) -> None:
    """Triton calls this after each launch."""
    _wait(f"kernel {metadata.get()['name']} failed")
