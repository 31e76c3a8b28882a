"""Launches of a batch, made again for later batches of the same form.

From a call of an op to its launches, Python computes what depends on the form of the batch alone: which tensors there
are, their dtypes, shapes, strides and alignment, which of them are one, and the values of all other arguments. Checks,
launch parameters, grids, strides and the choice of binaries follow from it. `replayed` keeps the launches of a form
(recording.py); a later batch puts the addresses of its own tensors into them, and of memory that it allocates anew.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from ops_configs.store import when_forgotten

from .library import INTERPRET

KEPT = 256
"""Forms whose launches a function keeps; then the oldest goes."""
ALIGNMENT = 16
"""Triton compiles for pointers aligned to as many bytes, and for integers that are multiples of it."""
UNSEEN = object()
_recorded: contextvars.ContextVar[list | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording_to(launches: list | None) -> Iterator[None]:
    """The launches (launch.Launch) that this thread makes inside are appended to `launches`; None: to no list."""
    token = _recorded.set(launches)
    try:
        yield
    finally:
        _recorded.reset(token)


def recorded() -> list | None:
    """The list that this thread's launches are appended to."""
    return _recorded.get()


def replayed(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, whose launches are made again where it is called with a form that it was called with before.

    Its arguments are tensors of one device, hashable values, and lists and tuples of both, by position. It launches
    kernels of `launch.prepared` on that device, which is the current one, and on the current stream; which ones, and
    with what, follows from the form alone. It waits for no event and changes no stream: a replay would not. Where it
    makes torch run a kernel, or tensors overlap in the first call of a form, it runs each time; a later one is not
    looked at for what overlaps partly.
    """
    if INTERPRET:
        return function
    kept: dict[tuple, Callable[[list[int]], None] | None] = {}
    lock = threading.Lock()
    when_forgotten(kept.clear)

    @functools.wraps(function)
    def run(*arguments) -> None:
        if recorded() is not None:  # a part of another recording
            function(*arguments)
            return
        form, addresses, tensors = [], [], []
        add_form(arguments, form, addresses, tensors)
        key = tuple(form)
        replay = kept.get(key, UNSEEN)
        if replay is UNSEEN:
            from .recording import record  # imports Triton

            made = record(function, arguments, addresses, tensors)
            with lock:
                kept[key] = made
                if len(kept) > KEPT:
                    del kept[next(iter(kept))]
        elif replay is None:
            function(*arguments)
        else:
            replay(addresses)

    return run


def add_form(arguments: Sequence, form: list[Hashable], addresses: list[int], tensors: list[torch.Tensor]) -> None:
    """Append the form of arguments, their tensors, and the addresses of these, each address once."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            if address not in addresses:
                addresses.append(address)
            tensors.append(argument)
            of_memory = argument.device, addresses.index(address), address % ALIGNMENT
            form += argument.dtype, argument.shape, argument.stride(), *of_memory
        elif type(argument) in (list, tuple):
            form += type(argument), len(argument)
            add_form(argument, form, addresses, tensors)
        else:
            form += type(argument), argument  # True == 1 == 1.0
