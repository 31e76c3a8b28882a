"""How a package of ours registers its ops with torch, and when an op runs its Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence

import torch

from . import counters, debug

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def uses_kernels(tensor: torch.Tensor) -> bool:
    """On a GPU, and on the CPU in Triton's interpreter, but for bf16, which it would multiply as bit patterns."""
    return tensor.is_cuda or (INTERPRET and tensor.dtype != torch.bfloat16)


def _device_of(args: Sequence) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of the tensors."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def op_library(namespace: str) -> Callable[..., Callable[[Callable], Callable]]:
    """Begin torch.ops.<namespace>; returns the decorator that registers its ops.

    The decorator takes the op's schema, what it returns and its fake; by default the op mutates its arguments and
    returns nothing. Each call is counted, under its name or `counted_as`: hit, or error before the exception goes on.
    """
    library = torch.library.Library(namespace, "DEF")

    def register(
        schema: str, returns: str = "()", fake: Callable = lambda *args: None, counted_as: str = ""
    ) -> Callable:
        name = schema.split("(")[0]
        count = counted_as or name

        def decorate(function: Callable) -> Callable:
            @functools.wraps(function)
            def counted(*args):
                try:
                    with _device_of(args), debug.watch(name, args, namespace):
                        result = function(*args)
                except Exception as error:
                    counters.error(count, type(error), namespace)
                    raise
                counters.hit(count, namespace)
                return result

            library.define(f"{schema} -> {returns}", tags=(torch.Tag.needs_fixed_stride_order,))
            library.impl(name, counted, "CPU")
            library.impl(name, counted, "CUDA")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            return function

        return decorate

    return register
