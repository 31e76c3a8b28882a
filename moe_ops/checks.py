"""Argument checks: one error that names what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ops_patches.memory import overlap

ID_DTYPES = (torch.int32, torch.int64)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
QUANTS = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8, "int8_w8a16": torch.int8}
"""Quantisations, and the dtype of their weights; that of the activations too, but for int8_w8a16."""
K_GRANULE = 32
"""Columns that a tensor core takes of 8-bit operands: what a group of columns under one scale must be a multiple of."""


def shape(op: str, name: str, tensor: torch.Tensor, dims: str, expected: tuple[int | None, ...]) -> None:
    """ValueError unless the shape is the expected one; None stands for any size, `dims` names the dimensions."""
    actual = tensor.shape
    fits = len(actual) == len(expected)
    for i in range(len(expected) if fits else 0):  # a generator would take as long as a launch
        fits &= expected[i] is None or expected[i] == actual[i]
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected [{dims}] = [{sizes}]")


def floating(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """TypeError unless the dtype is a floating one, ValueError unless the tensor is on `device`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating dtype")
    same_device(op, name, tensor, device)


def same_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """ValueError unless the tensor is on `device`."""
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
    for name, tensor in (("x", x), ("w", w)):
        (same_device if tensor.dtype in QUANTS.values() else floating)("grouped_gemm", name, tensor, choices.device)
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
    tensors = {"hidden": hidden, "topk_weights": topk_weights, "bias13": bias13, "bias2": bias2}
    for name, tensor in tensors.items():
        if tensor is not None:
            floating(op, name, tensor, topk_ids.device)
    for name, tensor in (("w13", w13), ("w2", w2)):
        (same_device if tensor.dtype in QUANTS.values() else floating)(op, name, tensor, topk_ids.device)
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


def quantize(x, quant, scale, per_token, group, power_of_two_scales) -> None:
    """Checks the arguments of `reference.quantize`."""
    op = "quantize"
    if quant not in QUANTS or quant == "int8_w8a16":
        raise ValueError(f"{op}: quant is {quant!r}, expected fp8_w8a8 or int8_w8a8")
    floating(op, "x", x, x.device)
    shape(op, "x", x, "rows, K", (None, None))
    if sum((scale is not None, per_token, group is not None)) > 1:
        raise ValueError(f"{op}: give at most one of scale, per_token and group")
    if group is not None and group < 1:
        raise ValueError(f"{op}: group is {group}, expected at least 1 column")
    if power_of_two_scales and group is None:
        raise ValueError(f"{op}: power_of_two_scales are scales of groups: give group, or leave it out")
    if scale is not None:
        _scale(op, "scale", scale, x.device, ((), (1,), (x.shape[0], 1)), "one element, or [rows, 1]")


def fused_experts_scales(
    quant, w13, w2, w13_scale, w2_scale, a1_scale, a2_scale, per_token, block_shape, power_of_two_scales
) -> None:
    """Checks the quantisation of `reference.fused_experts`."""
    op = "fused_experts"
    activation_scales = {"a1_scale": a1_scale, "a2_scale": a2_scale}
    if quant is None:
        given = {"w13_scale": w13_scale, "w2_scale": w2_scale} | activation_scales | {"block_shape": block_shape}
        unused = [name for name, value in given.items() if value is not None] + ["per_token"] * per_token
        unused += ["power_of_two_scales"] * power_of_two_scales
        for name, w in (("w13", w13), ("w2", w2)):
            if w.dtype in QUANTS.values():
                fitting = " or ".join(quant for quant, dtype in QUANTS.items() if dtype == w.dtype)
                raise TypeError(f"{op}: {name} is {w.dtype}: give quant = {fitting}, and the scales")
        if unused:
            raise ValueError(f"{op}: {', '.join(unused)} without quant: give quant = one of {', '.join(QUANTS)}")
        return
    if quant not in QUANTS:
        raise ValueError(f"{op}: quant is {quant!r}, expected None or one of {', '.join(QUANTS)}")
    for name, w, scale in (("w13", w13, w13_scale), ("w2", w2, w2_scale)):
        if w.dtype != QUANTS[quant]:
            raise TypeError(f"{op}: {name} is {w.dtype}, but weights of {quant} are {QUANTS[quant]}")
        weight_scale(op, f"{name}_scale", scale, w, block_shape)
    if per_token or a1_scale is not None or a2_scale is not None:
        leave_out = "leave out a1_scale, a2_scale and per_token"
        if quant == "int8_w8a16":
            raise ValueError(f"{op}: int8_w8a16 leaves activations as they are: {leave_out}")
        if block_shape is not None:
            columns = f"{block_shape[1]} columns of a row"
            raise ValueError(f"{op}: with block_shape activations get a scale for each {columns}: {leave_out}")
    if power_of_two_scales and (quant != "fp8_w8a8" or block_shape is None):
        layer = f"{quant} {'without' if block_shape is None else 'with'} block_shape"
        raise ValueError(
            f"{op}: power_of_two_scales are those of fp8_w8a8 with block_shape, this is {layer}: leave it out"
        )
    experts = w2.shape[0]
    for name, scale in activation_scales.items():
        if scale is not None:
            _scale(op, name, scale, w2.device, ((), (1,), (experts,)), f"one element, or [experts] = [{experts}]")


def grouped_gemm_scales(x, w, x_scale, w_scale, block_shape, out_dtype) -> None:
    """Checks the quantisation of `reference.grouped_gemm`."""
    op = "grouped_gemm"
    quantised = tuple(QUANTS.values())
    if w.dtype in quantised:
        weight_scale(op, "w_scale", w_scale, w, block_shape)
    elif w_scale is not None or block_shape is not None:
        raise ValueError(f"{op}: w_scale and block_shape belong to quantised weights, but w is {w.dtype}")
    if x.dtype not in quantised:
        if x_scale is not None:
            raise ValueError(f"{op}: x_scale belongs to quantised x, but x is {x.dtype}")
        if w.dtype == torch.float8_e4m3fn:
            raise TypeError(f"{op}: w is {w.dtype}, x is {x.dtype}: quantise x, moe_ops.quantize does")
    else:
        if x.dtype != w.dtype:
            raise TypeError(f"{op}: x is {x.dtype}, w is {w.dtype}: quantised x needs weights of its dtype")
        rows, experts = x.shape[0], w.shape[0]
        if block_shape is None:
            expected, text = ((), (1,), (experts,), (rows, 1)), f"one element, [experts] = [{experts}] or [{rows}, 1]"
        else:
            groups = -(-x.shape[1] // block_shape[1])
            expected, text = ((rows, groups),), f"[rows, ceil(K / {block_shape[1]})] = [{rows}, {groups}]"
        _scale(op, "x_scale", x_scale, x.device, expected, text)
        if out_dtype is None:
            raise ValueError(f"{op}: x is {x.dtype}: give out_dtype, such as torch.bfloat16")
    if out_dtype is not None and out_dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: out_dtype is {out_dtype}, expected one of {', '.join(map(_dtype, KERNEL_DTYPES))}")


def blocks_of_scales(op: str, block_shape: Sequence[int]) -> None:
    """ValueError unless the kernels take weights with a scale for each such block."""
    if len(block_shape) != 2 or block_shape[0] < 1 or block_shape[1] < K_GRANULE or block_shape[1] % K_GRANULE:
        raise ValueError(
            f"{op}: block_shape is {list(block_shape)}, expected (bn, bk) with bn at least 1 and bk a multiple of "
            f"{K_GRANULE}"
        )


def weight_scale(op: str, name: str, scale: torch.Tensor | None, w: torch.Tensor, block_shape) -> None:
    """Checks the scale of quantised weights [E, N, K], see `reference.dequantize`."""
    experts, n, k = w.shape
    if block_shape is None:
        expected = ((experts,), (experts, 1), (experts, 1, 1), (experts, n), (experts, n, 1))
        text = f"[{experts}] or [{experts}, 1] (per tensor), [{experts}, {n}] or [{experts}, {n}, 1] (per channel)"
    else:
        blocks_of_scales(op, block_shape)
        blocks = (experts, -(-n // block_shape[0]), -(-k // block_shape[1]))
        expected, text = (blocks,), f"{list(blocks)}, one for each block of {block_shape[0]} x {block_shape[1]}"
    _scale(op, name, scale, w.device, expected, text)


def _scale(op, name, scale, device, expected: tuple[tuple[int, ...], ...], text: str) -> None:
    """ValueError unless the scale is there, on `device` and of an expected shape, TypeError unless it is fp32."""
    if scale is None:
        raise ValueError(f"{op}: {name} is missing, expected {text}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {scale.dtype}, expected float32: convert it once, when weights are loaded")
    if tuple(scale.shape) not in expected:
        raise ValueError(f"{op}: {name} has shape {list(scale.shape)}, expected {text}")
    same_device(op, name, scale, device)


def out(op: str, out: torch.Tensor | None, hidden: torch.Tensor) -> None:
    """ValueError unless `out` can take the result of `hidden`, TypeError for another dtype."""
    if out is None:
        return
    if out.dtype != hidden.dtype:
        raise TypeError(f"{op}: out is {out.dtype}, hidden is {hidden.dtype}: they must be the same")
    shape(op, "out", out, "tokens, H", tuple(hidden.shape))
    same_device(op, "out", out, hidden.device)
    if not out.is_contiguous():
        raise ValueError(f"{op}: out has strides {out.stride()}, it must be contiguous")


def room(op: str, hidden: torch.Tensor, out: torch.Tensor, **given: tuple[torch.Tensor | None, int]) -> None:
    """ValueError unless each of `given`, where it is not None, has room for so many elements beside all the others."""
    taken = {"hidden": hidden, "out": out}
    for name, (tensor, elements) in given.items():
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype or tensor.numel() < elements or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} of {tensor.numel()} elements with strides {tensor.stride()}, expected "
                f"contiguous {hidden.dtype} of at least {elements}: give more, or leave it out"
            )
        same_device(op, name, tensor, hidden.device)
        for other, memory in taken.items():
            if overlap(tensor, memory):
                raise ValueError(f"{op}: {name} overlaps {other}: give memory of its own, or leave it out")
        taken[name] = tensor


def kernel_operands(op: str, activations: str, **tensors: torch.Tensor) -> None:
    """TypeError unless all have dtypes that the kernels take together, ValueError unless their rows are contiguous.

    The tensor named `activations` is fp16, bf16 or fp32; the others have its dtype, or are quantised.
    """
    dtype = tensors[activations].dtype
    quantised = tuple(QUANTS.values())
    if (dtype not in KERNEL_DTYPES and dtype not in quantised) or any(
        tensor.dtype != dtype and tensor.dtype not in quantised for tensor in tensors.values()
    ):
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


def fp8_device(op: str, device: torch.device) -> None:
    """ValueError on a GPU whose tensor cores have no fp8."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        version = ".".join(map(str, capability))
        raise ValueError(f"{op}: fp8 needs compute capability 8.9 or newer, {device} has {version}: use int8 weights")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
