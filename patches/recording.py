"""The launches of a call, as functions of the addresses of its tensors."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch
from .memory import extent
from .replay import recorded, recording_to

logger = logging.getLogger("lora_ops")
ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class NotReplayable(Exception):
    """A call whose launches are not to be made again; the message says why."""


class Address(int):
    """An address, where a descriptor has its tensor."""

    def data_ptr(self) -> int:
        return self


class Allocations(TorchDispatchMode):
    """What is allocated inside for launches that are recorded, kept alive; foreign: the first other op but views.

    In inference mode some copies count as views: `Memory.place` finds that a launch takes memory of nobody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self.foreign = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS:
            if recorded() is not None:
                self.tensors.append(result)
        elif not function.is_view:
            self.foreign = self.foreign or str(function)
        return result


def record(
    function: Callable[..., None], arguments: tuple, addresses: list[int], tensors: Sequence[torch.Tensor]
) -> Replay | None:
    """Call `function`; how to make its launches again, or None. addresses: of tensors, those among the arguments."""
    launches: list[Launch] = []
    with recording_to(launches), Allocations() as allocations:
        function(*arguments)
    try:
        if allocations.foreign:
            raise NotReplayable(f"{allocations.foreign} ran among the launches")
        return Replay(launches, addresses, tensors, allocations.tensors)
    except NotReplayable as reason:
        logger.debug("%s computes its launches in each such call: %s", function.__name__, reason)
        return None


class Replay:
    """Launches to be made again: `replay(addresses)` with those of other tensors of the same form.

    Memory is allocated in the pieces in which the recorded call allocated it, each from the first launch that takes it
    to the last one.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        addresses: list[int],
        tensors: Sequence[torch.Tensor],
        allocated: Sequence[torch.Tensor],
    ) -> None:
        """Raises NotReplayable: a launch takes memory of nobody or has no binary, or tensors overlap.

        Args:
            launches: in order.
            addresses: of tensors, in the order in which a replay is given others.
            tensors: that the launches' function was given.
            allocated: by that function, all alive.
        """
        if any(binary is None for binary, *_ in launches):
            raise NotReplayable("a kernel was not compiled")
        memory = Memory(addresses, tensors, allocated)
        self._device = tensors[0].device
        self._steps: list[Step] = []
        last_step: dict[int, int] = {}  # of a base
        for step, (binary, grid, arguments, constants) in enumerate(launches):
            sizes, taken = len(memory.sizes), len(memory.taken)
            template = Template(arguments, memory, constants)
            self._steps.append(Step(binary[(*grid, 1, 1)], template, memory.sizes[sizes:], []))
            last_step |= dict.fromkeys(memory.taken[taken:], step)
        for base, step in last_step.items():
            if base >= len(addresses):
                self._steps[step].takes_last.append(base)

    def __call__(self, addresses: list[int]) -> None:
        bases, pieces = addresses.copy(), {}
        for launch, arguments, takes_first, takes_last in self._steps:
            for size in takes_first:
                pieces[len(bases)] = torch.empty(size, dtype=torch.uint8, device=self._device)
                bases.append(pieces[len(bases)].data_ptr())
            launch(*arguments(bases))
            for base in takes_last:
                del pieces[base]


class Step(NamedTuple):
    """A launch.

    takes_first: bytes of pieces that no launch before it takes; takes_last: bases of those that none after it takes.
    """

    launch: Callable[..., None]
    arguments: Template
    takes_first: list[int]
    takes_last: list[int]


class Memory:
    """Where tensors of launches lie: in those given, or in pieces allocated, which count on behind their addresses.

    sizes: bytes of the pieces that were asked for, in order. taken: bases of all tensors that were, in order.
    """

    def __init__(self, addresses: list[int], given: Sequence[torch.Tensor], allocated: Sequence[torch.Tensor]) -> None:
        """Raises NotReplayable: they overlap, but for tensors that are the same memory."""
        spans = {(t.data_ptr(), t.data_ptr() + extent(t), addresses.index(t.data_ptr())) for t in given}
        spans |= {(t.data_ptr(), t.data_ptr() + extent(t), i) for i, t in enumerate(allocated, len(addresses))}
        self._spans = sorted(span for span in spans if span[0] < span[1])
        if any(end > start for (_, end, _), (start, *_) in itertools.pairwise(self._spans)):
            raise NotReplayable("tensors overlap")
        self._bases = {i: i for i in range(len(addresses))}
        self.sizes: list[int] = []
        self.taken: list[int] = []

    def place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(base, offset) of a tensor that is not empty. Raises NotReplayable: it lies elsewhere."""
        address = tensor.data_ptr()
        for start, end, index in self._spans:
            if start <= address < end:
                if index not in self._bases:
                    self._bases[index] = len(self._bases)
                    self.sizes.append(end - start)
                self.taken.append(self._bases[index])
                return self._bases[index], address - start
        raise NotReplayable("a launch takes memory that was neither given nor allocated")


class Template:
    """Arguments that addresses are put into, and constants behind them: `template(bases)`."""

    def __init__(self, arguments: Sequence, memory: Memory, constants: Sequence = ()) -> None:
        self._arguments = [*arguments, *constants]
        self._pointers: list[tuple[int, int, int]] = []  # position, base, offset
        self._others: list[tuple[int, Callable[[list[int]], object]]] = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self._arguments[position] = 0  # of an empty tensor
                if argument.numel() > 0:
                    self._pointers.append((position, *memory.place(argument)))
            elif isinstance(argument, TensorDescriptor):
                rest = {name: value for name, value in vars(argument).items() if name != "base"}
                self._arguments[position] = None
                self._others.append((position, functools.partial(_descriptor, *memory.place(argument.base), rest)))
            elif isinstance(argument, tuple):
                self._arguments[position] = None
                self._others.append((position, functools.partial(_tuple, Template(argument, memory))))

    def __call__(self, bases: list[int]) -> list:
        arguments = self._arguments.copy()
        for position, base, offset in self._pointers:
            arguments[position] = bases[base] + offset
        for position, make in self._others:
            arguments[position] = make(bases)
        return arguments


def _descriptor(base: int, offset: int, rest: dict, bases: list[int]) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)  # one of its form was checked
    descriptor.__dict__.update(rest, base=Address(bases[base] + offset))
    return descriptor


def _tuple(template: Template, bases: list[int]) -> tuple:
    return tuple(template(bases))
