"""The launches of a call, as functions of the addresses of its tensors."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch
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

    Memory is allocated in the pieces in which the recorded call allocated it, and kept until the last launch is made.
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
        self._launches = [
            (binary[(*grid, 1, 1)], Template(arguments, memory, constants))
            for binary, grid, arguments, constants in launches
        ]
        self._sizes = memory.sizes

    def __call__(self, addresses: list[int]) -> None:
        pieces = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in self._sizes]
        bases = addresses + [piece.data_ptr() for piece in pieces]
        for launch, arguments in self._launches:
            launch(*arguments(bases))


class Memory:
    """Where tensors of launches lie: in those given, or in pieces allocated, which count on behind their addresses.

    sizes: bytes of the pieces that were asked for, in order.
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

    def place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(base, offset) of a tensor that is not empty. Raises NotReplayable: it lies elsewhere."""
        address = tensor.data_ptr()
        for start, end, index in self._spans:
            if start <= address < end:
                if index not in self._bases:
                    self._bases[index] = len(self._bases)
                    self.sizes.append(end - start)
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


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
