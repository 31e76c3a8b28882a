"""Argument checks: one error that names what was wrong and what to do."""

from __future__ import annotations

import torch

ID_DTYPES = (torch.int32, torch.int64)


def shape(op: str, name: str, tensor: torch.Tensor, dims: str, expected: tuple[int | None, ...]) -> None:
    """ValueError unless the shape is the expected one; None stands for any size, `dims` names the dimensions."""
    if tensor.ndim != len(expected) or any(
        size is not None and size != actual for actual, size in zip(tensor.shape, expected, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected [{dims}] = [{sizes}]")


def floating(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """TypeError unless the dtype is a floating one, ValueError unless the tensor is on `device`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating dtype")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors are on {device}: move one of them")


def routing(op: str, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None) -> None:
    """Checks expert ids [M, top_k] and the expert map.

    Ids are read on the CPU only, reading them on a GPU would wait for it.
    """
    if num_experts < 1:
        raise ValueError(f"{op}: num_experts is {num_experts}, expected at least 1")
    shape(op, "topk_ids", topk_ids, "tokens, top_k", (None, None))
    if topk_ids.shape[1] < 1:
        raise ValueError(f"{op}: topk_ids has shape {tuple(topk_ids.shape)}, expected at least one expert a token")
    _ids(op, "topk_ids", topk_ids, num_experts if expert_map is None else expert_map.numel())
    if expert_map is not None:
        shape(op, "expert_map", expert_map, "global experts", (None,))
        if expert_map.device != topk_ids.device:
            raise ValueError(f"{op}: expert_map is on {expert_map.device}, topk_ids on {topk_ids.device}")
        if expert_map.numel() == 0:
            raise ValueError(f"{op}: expert_map is empty, expected one entry for each global expert")
        _ids(op, "expert_map", expert_map, num_experts)


def _ids(op: str, name: str, ids: torch.Tensor, num_experts: int) -> None:
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{op}: {name} is {ids.dtype}, expected int32 or int64")
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < -1 or high >= num_experts:
            raise ValueError(f"{op}: {name} spans {low}..{high}, but experts are 0..{num_experts - 1} (-1 = none here)")
