"""Slots of a step's tokens, from vLLM's mapping."""

import random

import numpy as np
import pytest

from ops_patches.vllm_punica import slots_of


def test_each_adapter_has_its_slot():
    held = [7, None, 3, 40, None, 1]
    ids = tuple(random.choices([0, 1, 3, 7, 40], k=300))
    slots = slots_of(ids, held)
    assert slots.dtype == np.int32
    assert slots.tolist() == [-1 if adapter == 0 else held.index(adapter) for adapter in ids]


def test_no_token_and_no_adapter():
    assert slots_of((), ()).tolist() == []
    assert slots_of((0, 0), (None, None)).tolist() == [-1, -1]


@pytest.mark.parametrize("ids", [(1, 9, 5, 9), (0, 2), (4, 1), (1, -1)])
def test_unknown_adapters_are_named(ids):
    unknown = sorted(set(ids) - {0, 1, 3})
    with pytest.raises(ValueError, match=rf"adapters \{unknown}, but the slots hold \(3, None, 1\): activate"):
        slots_of(ids, (3, None, 1))


def test_unknown_numpy_adapters_are_named():
    with pytest.raises(ValueError, match=r"adapters \[9\], but"):
        slots_of(np.array([1, 9]), (3, None, 1))
