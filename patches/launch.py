"""Launches of a Triton kernel that take the CPU a fraction of the time of kernel[grid](...).

Triton binds and specialises every argument of every launch and then looks up the binary: about 40 us, most of it for
what was the same the time before. `prepared` keeps the binaries of a kernel and its constants by what Triton may have
specialised them for, and launches them as Triton's fused softmax tutorial does: binary[grid](*arguments). What Triton's
knobs say of compiling (debug, instrumentation) counts when a binary is first launched, not when it is launched again.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from triton import JITFunction
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .replay import ALIGNMENT, recorded

Launch = tuple[CompiledKernel | None, tuple[int, ...], tuple, tuple]
"""Binary if there is one, grid, arguments, constants."""


class Prepared:
    """A kernel and its constants: `prepared(kernel, **constants)(grid, *arguments)` is kernel[grid](...).

    Arguments come in the order of the kernel's parameters, whose constants are the last.
    """

    def __init__(self, kernel: JITFunction, constants: dict) -> None:
        self.kernel = kernel
        self.constants = constants
        self._binaries: dict[tuple, CompiledKernel] = {}
        self._constants_in_order: tuple = ()
        if isinstance(kernel, JITFunction):
            first = next((p.num for p in kernel.params if p.is_constexpr), len(kernel.params))
            self._constants_in_order = tuple(constants[p.name] for p in kernel.params[first:])

    def __call__(self, grid: tuple[int, ...], *arguments: object) -> None:
        if not isinstance(self.kernel, JITFunction):  # Triton's interpreter runs it
            self.through_triton(grid, *arguments)
            return
        key = (driver.active.get_current_device(), *kinds(arguments))
        binary = self._binaries.get(key)
        if binary is not None:
            binary[(*grid, 1, 1)](*arguments, *self._constants_in_order)
        else:
            made = self.through_triton(grid, *arguments)
            if isinstance(made, CompiledKernel):
                binary = self._binaries[key] = made
        if (launches := recorded()) is not None:
            launches.append((binary, grid, arguments, self._constants_in_order))

    def through_triton(self, grid: tuple[int, ...], *arguments: object) -> CompiledKernel | None:
        """Compile what is not compiled, and launch; the binary, but none of the interpreter."""
        return self.kernel[grid](*arguments, **self.constants)


@functools.cache
def prepared(kernel: JITFunction, **constants: Hashable) -> Prepared:
    """Of a kernel, its constants and options (num_warps and the like); the same each time."""
    return Prepared(kernel, constants)


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up; triton.cdiv takes 2 us outside kernels."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The least power of two that n >= 1 does not exceed; triton.next_power_of_2 takes 4 us outside kernels."""
    return 1 << (n - 1).bit_length()


def kinds(arguments: tuple) -> list[Hashable]:
    """What Triton may compile a binary for, of arguments: at least all that it does, or a wrong binary would run.

    Raises:
        TypeError: an argument of a type that no kernel of ours takes.
    """
    found: list[Hashable] = []
    for a in arguments:
        if a is None:
            found.append(None)
        elif isinstance(a, torch.Tensor):
            found += a.dtype, a.data_ptr() % ALIGNMENT == 0
        elif type(a) is int:
            found += a == 1, a % ALIGNMENT == 0, (a >= -(2**31)) + (a >= 2**31) + (a >= 2**63)  # int32, int64, uint64
        elif isinstance(a, TensorDescriptor):
            found.append((a.base.dtype, *a.block_shape))
        elif type(a) is float:
            found.append(float)
        elif type(a) is tuple:
            found.append(tuple(kinds(a)))
        else:
            raise TypeError(f"a launch takes tensors, descriptors, int, float, None and tuples of them, not {type(a)}")
    return found
