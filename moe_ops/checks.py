"""Argument checks: one error that names what was wrong and what to do."""

from __future__ import annotations

import torch

ID_DTYPES = (torch.int32, torch.int64)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")


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


def activation(name: str, gated: bool, interleaved: bool) -> None:
    """ValueError for an unknown activation, or one that needs a gate without it."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if not gated and (interleaved or name == "swiglu_oai"):
        raise ValueError("interleaved weights and swiglu_oai have gate and up: they need gated=True")


def grouped_gemm(x, w, choices, num_experts, top_k, gather, bias, topk_weights) -> None:
    """Checks the tensors of `reference.grouped_gemm` against the plan."""
    num_rows = choices.shape[0]
    floating("grouped_gemm", "x", x, choices.device)
    floating("grouped_gemm", "w", w, choices.device)
    dims, size = ("tokens, K", num_rows // top_k) if gather else ("rows, K", num_rows)
    shape("grouped_gemm", "x", x, dims, (size, None))
    shape("grouped_gemm", "w", w, "experts, N, K", (num_experts, None, x.shape[1]))
    for name, tensor in (("bias", bias), ("topk_weights", topk_weights)):
        if tensor is not None:
            floating("grouped_gemm", name, tensor, choices.device)
    if bias is not None:
        shape("grouped_gemm", "bias", bias, "experts, N", (num_experts, w.shape[1]))
    if topk_weights is not None:
        shape("grouped_gemm", "topk_weights", topk_weights, "tokens, top_k", (num_rows // top_k, top_k))


def fused_experts(
    hidden, w13, w2, topk_weights, topk_ids, gated, bias13, bias2, expert_map, apply_router_weight_on_input
) -> None:
    """Checks the tensors of `reference.fused_experts`."""
    op = "fused_experts"
    tensors = {"hidden": hidden, "w13": w13, "w2": w2, "topk_weights": topk_weights, "bias13": bias13, "bias2": bias2}
    for name, tensor in tensors.items():
        if tensor is not None:
            floating(op, name, tensor, topk_ids.device)
    shape(op, "hidden", hidden, "tokens, H", (None, None))
    shape(op, "w2", w2, "experts, H, I", (None, hidden.shape[1], None))
    num_experts, width, inner = w2.shape
    w13_rows = 2 * inner if gated else inner
    shape(op, "w13", w13, "experts, 2 I if gated else I, H", (num_experts, w13_rows, width))
    routing(op, topk_ids, num_experts, expert_map)
    shape(op, "topk_ids", topk_ids, "tokens, top_k", (hidden.shape[0], None))
    shape(op, "topk_weights", topk_weights, "tokens, top_k", tuple(topk_ids.shape))
    if bias13 is not None:
        shape(op, "bias13", bias13, "experts, rows of w13", (num_experts, w13_rows))
    if bias2 is not None:
        shape(op, "bias2", bias2, "experts, H", (num_experts, width))
    if bias13 is not None and apply_router_weight_on_input:
        raise ValueError(
            f"{op}: with routed weights on the input it is not agreed whether they multiply bias13 too: "
            "leave out bias13 or apply_router_weight_on_input"
        )


def kernel_operands(op: str, **tensors: torch.Tensor) -> None:
    """TypeError unless all share a dtype that the kernels take, ValueError unless their rows are contiguous."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes.issubset(KERNEL_DTYPES):
        found = ", ".join(f"{name} {_dtype(tensor.dtype)}" for name, tensor in tensors.items())
        supported = ", ".join(map(_dtype, KERNEL_DTYPES))
        raise TypeError(f"{op}: dtypes are {found}; supported is one of {supported} for all of them: convert them")
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} has strides {tensor.stride()}, its last dimension must be contiguous: "
                "use .contiguous() once, when the weights are loaded"
            )


def tile_rows(op: str, rows: int, known: tuple[int, ...]) -> None:
    """ValueError unless the kernels take tiles of that many rows."""
    if rows not in known:
        raise ValueError(f"{op}: the plan has tiles of {rows} rows, the kernels take {', '.join(map(str, known))}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
