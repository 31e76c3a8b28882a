"""Pure-torch fp32 reference of every op, with the signatures of `ops.py`; the CPU path of the ops runs it.

All maths is fp32; results are rounded once, to the dtype of the output. Rows are grouped by slot: one matrix product
a slot, as for a dense layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from .plan import NO_ADAPTER, NO_TILE


class HasTokenSlots(Protocol):
    token_slots: torch.Tensor  # int [num_tokens], -1 = no adapter


def _groups(slots: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(slot, rows that use it) for each distinct slot, without the rows that no tile covers."""
    for slot in torch.unique(slots).tolist():
        if slot != NO_TILE:
            yield slot, torch.nonzero(slots == slot).flatten()


def _weight(weight: torch.Tensor, slot: int) -> torch.Tensor:
    """fp32 [rows, columns] of one slot of a [L, rows, columns] or [L, 1, rows, columns] weight."""
    return (weight[slot].squeeze(0) if weight.ndim == 4 else weight[slot]).float()


def _shrink(x: torch.Tensor, lora_a: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, scale: float) -> None:
    for slot, rows in _groups(slots):
        if slot == NO_ADAPTER:
            out[rows] = 0.0
        else:
            out[rows] = (x[rows].float() @ _weight(lora_a, slot).T * scale).to(out.dtype)


def _expand(h: torch.Tensor, lora_b: torch.Tensor, y: torch.Tensor, slots: torch.Tensor, add_inputs: bool) -> None:
    for slot, rows in _groups(slots):
        if slot != NO_ADAPTER:
            delta = h[rows].float() @ _weight(lora_b, slot).T
            y[rows] = (y[rows].float() + delta if add_inputs else delta).to(y.dtype)
        elif not add_inputs:
            y[rows] = 0.0


def _segment_slots(
    num_rows: int, seq_starts: torch.Tensor, seq_lengths: torch.Tensor, slot_indices: torch.Tensor, batches: int
) -> torch.Tensor:
    """Slot of each row; rows that no segment covers are marked as such."""
    slots = torch.full((num_rows,), NO_TILE, dtype=torch.int64, device=slot_indices.device)
    segments = (tensor[:batches].tolist() for tensor in (seq_starts, seq_lengths, slot_indices))
    for start, length, slot in zip(*segments, strict=True):
        slots[start : start + length] = slot
    return slots


def lora_shrink(
    x: torch.Tensor, lora_a: Sequence[torch.Tensor], out: torch.Tensor, plan: HasTokenSlots, scale: float = 1.0
) -> None:
    """out[s, m] = scale * A_s[slot[m]] @ x[m]; zero for rows without adapter."""
    slots = plan.token_slots[: x.shape[0]]
    for s, weight in enumerate(lora_a):
        _shrink(x, weight, out[s], slots, scale)


def lora_expand(
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    y: torch.Tensor,
    plan: HasTokenSlots,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """y[m, columns of slice s] (+)= B_s[slot[m]] @ h[s, m], slices side by side from column `offset`."""
    slots = plan.token_slots[: y.shape[0]]
    for s, weight in enumerate(lora_b):
        width = weight.shape[-2]
        _expand(h[s], weight, y[:, offset : offset + width], slots, add_inputs)
        offset += width


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    plan: HasTokenSlots,
    scale: float = 1.0,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """y[m, columns of slice s] (+)= B_s[slot[m]] @ (scale * A_s[slot[m]] @ x[m]), the inner product kept in fp32."""
    h = torch.zeros(len(lora_a), x.shape[0], lora_a[0].shape[-2], dtype=torch.float32, device=x.device)
    lora_shrink(x, lora_a, h, plan, scale)
    lora_expand(h, lora_b, y, plan, offset, add_inputs)


def lora_add(y: torch.Tensor, delta: torch.Tensor, plan: HasTokenSlots) -> None:
    """y[m] += delta[m] for the plan's rows with an adapter, summed in fp32; delta may have more rows than y."""
    rows = (plan.token_slots[: y.shape[0]] >= 0).nonzero()[:, 0]
    y[rows] = (y[rows].float() + delta[rows].float()).to(y.dtype)


def bgmv_shrink(
    x: torch.Tensor, lora_a: torch.Tensor, out: torch.Tensor, slot_indices: torch.Tensor, scale: float = 1.0
) -> None:
    """out[m] = scale * A[slot_indices[m]] @ x[m]; zero for index -1."""
    _shrink(x, lora_a, out, slot_indices, scale)


def bgmv_expand(
    x: torch.Tensor, lora_b: torch.Tensor, out: torch.Tensor, slot_indices: torch.Tensor, add_inputs: bool = True
) -> None:
    """out[m, :N] (+)= B[slot_indices[m]] @ x[m]; index -1: untouched when adding, zero when writing."""
    _expand(x, lora_b, out[:, : lora_b.shape[-2]], slot_indices, add_inputs)


def bgmv_expand_slice(
    x: torch.Tensor,
    lora_b: torch.Tensor,
    out: torch.Tensor,
    slot_indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """bgmv_expand into the column window [slice_offset, slice_offset + slice_size)."""
    _expand(x, lora_b, out[:, slice_offset : slice_offset + slice_size], slot_indices, add_inputs)


def sgmv_shrink(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    out: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lengths: torch.Tensor,
    slot_indices: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scale: float = 1.0,
) -> None:
    """bgmv_shrink with one slot a segment of rows; rows that no segment covers stay as they are."""
    _shrink(x, lora_a, out, _segment_slots(x.shape[0], seq_starts, seq_lengths, slot_indices, batches), scale)


def sgmv_expand(
    x: torch.Tensor,
    lora_b: torch.Tensor,
    out: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lengths: torch.Tensor,
    slot_indices: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = True,
) -> None:
    """bgmv_expand with one slot a segment of rows; rows that no segment covers stay as they are."""
    slots = _segment_slots(x.shape[0], seq_starts, seq_lengths, slot_indices, batches)
    _expand(x, lora_b, out[:, : lora_b.shape[-2]], slots, add_inputs)


def sgmv_expand_slice(
    x: torch.Tensor,
    lora_b: torch.Tensor,
    out: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lengths: torch.Tensor,
    slot_indices: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """sgmv_expand into the column window [slice_offset, slice_offset + slice_size)."""
    slots = _segment_slots(x.shape[0], seq_starts, seq_lengths, slot_indices, batches)
    _expand(x, lora_b, out[:, slice_offset : slice_offset + slice_size], slots, add_inputs)
