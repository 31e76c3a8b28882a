"""What the MoE patches of the hosts share: from the arguments of a host's routed-experts function to one call of ours.

A patch turns the host's arguments into those of `moe_ops.fused_experts`, or raises `LeftToHost` with the reason why
the call is the host's. Every decision hangs on shapes, dtypes and flags alone: nothing is read from a GPU, so that a
CUDA graph captures the same path that an eager call takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

import moe_ops
from ops_configs import store
from ops_patches import counters, state

logger = logging.getLogger("moe_ops")
OP = "fused_experts"
FLOATING = (torch.float16, torch.bfloat16, torch.float32)
WEIGHTS = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8, "int8_w8a16": torch.int8}


class LeftToHost(Exception):
    """A call that our kernels do not take; the message is the reason, the same for all calls of a layer."""


def leave(reason: str) -> None:
    """Count a call that goes to the host's own kernels."""
    counters.fallback(OP, reason, "moe_ops")
    state.publish()


def or_host(original: Callable, arguments: Callable[..., dict]) -> Callable:
    """`original`, but on our kernels wherever `arguments` makes those of `moe_ops.fused_experts` of the host's."""

    def routed_experts(*args, **kwargs) -> Any:
        try:
            return run(**arguments(*args, **kwargs))
        except LeftToHost as reason:
            leave(str(reason))
            return original(*args, **kwargs)

    return routed_experts


_seen: dict[tuple, str] = {}
"""Forms of layers seen in this process, and why our kernels do not take them, if so."""


def run(hidden, w13, w2, topk_weights, topk_ids, out=None, h=None, y=None, **layer) -> torch.Tensor:
    """`moe_ops.fused_experts`, after a warm-up of the layer the first time that one like it is seen.

    A server sees all its layers while it profiles, so nothing is left to compile while it serves.

    Raises:
        LeftToHost: dtypes, shapes or a device that `moe_ops.fused_experts` does not take.
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
        Whatever compiling the layer's kernels raises.
    """
    kinds = {"dtype": hidden.dtype, "ids_dtype": topk_ids.dtype, "weights_dtype": topk_weights.dtype}
    form = hidden.device, *kinds.values(), topk_ids.shape[1], *map(_form, (w13, w2, *layer.values()))
    reason = _seen.get(form)
    if reason is None:
        reason = _seen[form] = _warmed_up(w13, w2, topk_ids.shape[1], **kinds, **layer)
    if reason:
        raise LeftToHost(reason)
    result = moe_ops.fused_experts(hidden, w13, w2, topk_weights, topk_ids, h=h, y=y, out=out, **layer)
    state.publish()
    return result


def _warmed_up(w13, w2, top_k, **layer) -> str:
    """Check the layer, compile its kernels, but not into a CUDA graph; why our kernels do not take it, or nothing."""
    if w2.is_cuda and torch.cuda.is_current_stream_capturing():
        logger.warning(
            "moe_ops: a layer was first seen while a CUDA graph is captured: its kernels compile as they come"
        )
    store.user_folder()  # raises for one that is none: that is an error, not a layer which ours do not take
    tensors, options = moe_ops.ops.one_token(w13, w2, top_k, **layer)
    try:
        moe_ops.ops.check_layer(*tensors, **options)
    except (ValueError, TypeError) as error:
        return str(error)
    moe_ops.warmup_layer(w13, w2, top_k, **layer)  # beyond the try: errors of compiling are no reason to leave a layer
    return ""


def _form(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value


def check_tensors(hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, quant: str | None) -> None:
    """Raise LeftToHost unless the dtypes and devices are those of our kernels."""
    if hidden.dtype not in FLOATING:
        raise LeftToHost(f"tokens in {_name(hidden.dtype)}")
    if {w13.dtype, w2.dtype} != {WEIGHTS.get(quant, hidden.dtype)}:
        raise LeftToHost(f"weights in {_name(w13.dtype)} and {_name(w2.dtype)} for {quant or _name(hidden.dtype)}")
    if {w13.device, w2.device} != {hidden.device}:
        raise LeftToHost(f"weights on {w13.device}")


def quantisation(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    quant: str | None,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    a1_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    per_token: bool,
    block_shape: Sequence[int] | None,
) -> dict:
    """The arguments of ours that say how the layer is quantised, from those that both hosts have.

    Raises:
        LeftToHost: dtypes, devices or shapes of scales that our kernels do not take.
    """
    check_tensors(hidden, w13, w2, quant)
    if quant is None:
        return {}
    if quant == "int8_w8a16":  # activations stay as they are
        if block_shape is not None:
            raise LeftToHost("int8_w8a16 in groups")
        a1_scale = a2_scale = None
        per_token = False
    if quant == "int8_w8a8" and per_token:  # the hosts look at no static scale then
        a1_scale = a2_scale = None
    if block_shape is not None:  # the hosts have no other activation scales beside blocks
        block_shape = tuple(block_shape)
        a1_scale = a2_scale = None
        per_token = False
    for name, scale in (("a1_scale", a1_scale), ("a2_scale", a2_scale)):
        if scale is not None and scale.numel() != 1:
            raise LeftToHost(f"{name} of shape {tuple(scale.shape)}")
    return {
        "quant": quant,
        "w13_scale": _weight_scale("w13_scale", w13_scale, w13, block_shape),
        "w2_scale": _weight_scale("w2_scale", w2_scale, w2, block_shape),
        "a1_scale": None if a1_scale is None else a1_scale.reshape(()),
        "a2_scale": None if a2_scale is None else a2_scale.reshape(()),
        "per_token": per_token,
        "block_shape": block_shape,
    }


def _weight_scale(name: str, scale: torch.Tensor | None, w: torch.Tensor, block_shape) -> torch.Tensor:
    """The scale as [E], [E, N] or [E, blocks of N, blocks of K]."""
    if scale is None or scale.dtype != torch.float32:
        raise LeftToHost(f"{name} {'is missing' if scale is None else f'in {_name(scale.dtype)}'}")
    experts, n, k = w.shape
    if block_shape is not None:
        expected = (experts, -(-n // block_shape[0]), -(-k // block_shape[1]))
        if tuple(scale.shape) == expected:
            return scale
    else:
        for shape in ((experts,), (experts, n)):
            if tuple(scale.shape) in (shape, (*shape, 1), (*shape, 1, 1)):
                return scale.view(shape) if scale.is_contiguous() else scale.reshape(shape)
    raise LeftToHost(f"{name} of shape {tuple(scale.shape)} for weights of shape {tuple(w.shape)}")


def quant_of(fp8_w8a8: bool, int8_w8a8: bool, int8_w8a16: bool, int4_w4a16: bool) -> str | None:
    """Our name for the quantisation that both hosts say with flags."""
    if int4_w4a16:
        raise LeftToHost("int4_w4a16")
    flags = {"fp8_w8a8": fp8_w8a8, "int8_w8a8": int8_w8a8, "int8_w8a16": int8_w8a16}
    return next((name for name, flag in flags.items() if flag), None)


def no_zero_points(*zero_points: torch.Tensor | None) -> None:
    """Raise LeftToHost if the weights have zero points."""
    if any(zero_point is not None for zero_point in zero_points):
        raise LeftToHost("weights with zero points")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def status() -> dict[str, dict]:
    """What is patched in this process and what it did, by host: see `PatchSet.status`."""
    from ops_patches.sglang_moe import SGLANG_MOE
    from ops_patches.vllm_moe import VLLM_MOE

    return {patches.name: patches.status() for patches in (VLLM_MOE, SGLANG_MOE)}
