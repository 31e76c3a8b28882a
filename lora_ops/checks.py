"""Argument checks of the ops: one error that names what was wrong and what to do, before any launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ops_patches.memory import overlap

from .config import MAX_RANK
from .plan import NO_ADAPTER, plan_layout

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
INT32_ELEMENTS = 2**31
"""Elements from the first to the last of a slot at most: kernels have offsets in int32 there."""


def flat_weights(op: str, name: str, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights as [L, rows, columns] each, from [L, rows, columns] or [L, 1, rows, columns].

    Raises:
        ValueError: no weight, another number of dimensions, slices that differ in slots, dtype, device, columns or
            row stride, whose last dimension is not contiguous, or whose slots span more than INT32_ELEMENTS.
        TypeError: a dtype other than fp16, bf16, fp32.
    """
    if not weights:
        raise ValueError(f"{op}: {name} is empty, give one tensor a slice")
    flat = [w.squeeze(1) if w.ndim == 4 and w.shape[1] == 1 else w for w in weights]
    first = flat[0]
    for i, w in enumerate(flat):
        if w.ndim != 3:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(weights[i].shape)}, expected [slots, rows, columns] "
                "or [slots, 1, rows, columns]"
            )
        if w.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"{op}: {name}[{i}] is {w.dtype}, expected float16, bfloat16 or float32")
        if w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"{op}: {name}[{i}] is {w.dtype} on {w.device}, {name}[0] is {first.dtype} on {first.device}: "
                "slices must agree"
            )
        if w.shape[0] != first.shape[0] or w.shape[2] != first.shape[2] or w.stride(1) != first.stride(1):
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(w.shape)} and row stride {w.stride(1)}, {name}[0] has "
                f"{tuple(first.shape)} and {first.stride(1)}: slots, columns and row stride must agree"
            )
        if w.stride(2) != 1 and w.shape[2] > 1:
            raise ValueError(f"{op}: {name}[{i}] has strides {w.stride()}, its last dimension must be contiguous")
        if (w.shape[1] - 1) * w.stride(1) + w.shape[2] > INT32_ELEMENTS:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(w.shape)} and strides {w.stride()}, but a slot may span "
                f"{INT32_ELEMENTS} elements, which kernels address: call .contiguous(), or split it"
            )
    return flat


def same_shapes(op: str, name: str, weights: Sequence[torch.Tensor]) -> None:
    """ValueError unless all slices of A have the same shape and strides (slices of B may differ in width)."""
    for i, w in enumerate(weights):
        if w.shape != weights[0].shape or w.stride() != weights[0].stride():
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(w.shape)} and strides {w.stride()}, {name}[0] has "
                f"{tuple(weights[0].shape)} and {weights[0].stride()}: they must agree"
            )


def shrink_rank(op: str, weight: torch.Tensor) -> int:
    """Rank of A [L, R, K]: any, for vLLM shrinks whole classifier heads; ValueError if there is none."""
    if weight.shape[1] < 1:
        raise ValueError(f"{op}: lora_a has shape {tuple(weight.shape)}, its rank must be at least 1")
    return weight.shape[1]


def expand_rank(op: str, weight: torch.Tensor) -> int:
    """Rank of B [L, N, R]; ValueError outside 1..512."""
    rank = weight.shape[2]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{op}: lora_b has rank {rank}, supported ranks are 1 to {MAX_RANK}")
    return rank


def matrix(op: str, name: str, tensor: torch.Tensor, device: torch.device, columns: int | None = None) -> None:
    """ValueError unless `tensor` is a floating [rows, columns] on `device` with contiguous rows."""
    if tensor.ndim != 2 or (columns is not None and tensor.shape[1] != columns):
        expected = "[rows, columns]" if columns is None else f"[rows, {columns}]"
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the weights are on {device}: move one of them")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating dtype")
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(
            f"{op}: {name} has strides {tensor.stride()}, its last dimension must be contiguous: call .contiguous()"
        )


def output(op: str, name: str, tensor: torch.Tensor, device: torch.device, columns: int | None = None) -> None:
    """Checks a `matrix` that is written; ValueError also if its rows overlap, for several programs would write one."""
    matrix(op, name, tensor, device, columns)
    if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, its rows overlap in memory: "
            "give a tensor of separate rows, not an expanded one"
        )


def apart(op: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """ValueError if one lies in the other, or between its rows."""
    if overlap(x, y):
        raise ValueError(
            f"{op}: y overlaps x, or lies between its rows, and later slices read x when earlier ones are written: "
            "give y memory of its own"
        )


def input_rows(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Checks x [M, K] against A [L, R, K]."""
    matrix(op, "x", x, weight.device, weight.shape[2])
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: x is {x.dtype}, lora_a is {weight.dtype}: they must agree")


def planes(op: str, name: str, h: torch.Tensor, slices: int, rows: int, rank: int, device: torch.device) -> None:
    """ValueError unless h is a floating [slices, rows, rank] on `device`."""
    if h.shape != (slices, rows, rank):
        raise ValueError(
            f"{op}: {name} has shape {tuple(h.shape)}, expected [slices, rows, rank] = {(slices, rows, rank)}"
        )
    if h.device != device:
        raise ValueError(f"{op}: {name} is on {h.device}, the weights are on {device}: move one of them")
    if not h.is_floating_point():
        raise TypeError(f"{op}: {name} is {h.dtype}, expected a floating dtype")


def shrink_output(op: str, out: torch.Tensor) -> None:
    """The shrink writes fp32 through contiguous storage."""
    if out.dtype != torch.float32:
        raise TypeError(f"{op}: out is {out.dtype}, expected float32")
    if not out.is_contiguous():
        raise ValueError(f"{op}: out has strides {out.stride()}, it must be contiguous")


def window(op: str, y: torch.Tensor, offset: int, width: int) -> None:
    """ValueError unless columns offset..offset+width-1 exist in y."""
    if offset < 0 or offset + width > y.shape[1]:
        raise ValueError(
            f"{op}: columns {offset} to {offset + width - 1} do not fit into the output, which has {y.shape[1]}: "
            "check offset and the slice widths"
        )


def same_rows(op: str, **rows: int) -> None:
    """ValueError unless all row counts agree."""
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(f"{op}: row counts differ: {listed}")


def plan_fits(op: str, weight: torch.Tensor, layout: Sequence[int], arena: torch.Tensor) -> None:
    """The plan must be on the device of the weights, laid out as `layout` says, and not name slots that they lack."""
    if arena.device != weight.device:
        raise ValueError(f"{op}: the plan is on {arena.device}, the weights are on {weight.device}: build it there")
    if arena.shape != (plan_layout(*layout).size,):
        raise ValueError(
            f"{op}: the plan's arena has shape {tuple(arena.shape)}, but max_tokens, max_slots and has_offsets of "
            f"{list(layout)} make {plan_layout(*layout).size} elements: they must be of one LoraPlan. If torch.compile "
            "or vLLM took this graph from a cache, it is of another plan: empty that cache"
        )
    max_slots = layout[1]
    if max_slots > weight.shape[0]:
        raise ValueError(
            f"{op}: the plan has {max_slots} slots, the weights {weight.shape[0]}: build the LoraPlan with "
            f"max_slots={weight.shape[0]}"
        )


def integers(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """ValueError unless `tensor` is one dimension of integers on `device`."""
    if tensor.ndim != 1:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected one dimension")
    if tensor.device != device or tensor.dtype not in INDEX_DTYPES:
        raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, expected int32 or int64 on {device}")


def indices(op: str, slots: torch.Tensor, num_slots: int, device: torch.device) -> None:
    """Slot indices must be integers in -1..num_slots-1 on `device`.

    Reading them back from a GPU waits for it, so a capturing stream is not checked.
    """
    integers(op, "slot_indices", slots, device)
    if slots.numel() == 0 or (slots.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(value) for value in torch.aminmax(slots))
    if low < NO_ADAPTER or high >= num_slots:
        raise ValueError(f"{op}: slot_indices span {low}..{high}, but slots are 0..{num_slots - 1} (-1 = no adapter)")


def segments(op: str, starts: torch.Tensor, lengths: torch.Tensor, max_length: int, rows: int) -> None:
    """Segments must lie inside the batch, be no longer than max_length and not overlap; not checked while a stream
    captures."""
    if starts.numel() == 0 or (starts.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    first, end, longest = int(starts.min()), int((starts.long() + lengths).max()), int(lengths.max())
    if first < 0 or end > rows or longest > max_length or int(lengths.min()) < 0:
        raise ValueError(
            f"{op}: segments span rows {first} to {end - 1} with up to {longest} rows, but the batch has {rows} rows "
            f"and max_seq_length is {max_length}"
        )
    used = lengths > 0
    begins, order = starts[used].sort()
    ends = begins + lengths[used][order]
    if bool((ends[:-1] > begins[1:]).any()):
        raise ValueError(f"{op}: segments overlap: each row may have one slot, check seq_starts and seq_lengths")
