"""The MoE ops: torch custom ops over the Triton kernels on CUDA tensors, over `reference.py` on CPU tensors.

With TRITON_INTERPRET=1 in the environment, CPU tensors run the kernels too, in Triton's interpreter; but not bf16,
which it would multiply as bit patterns.

The matrices (hidden or x, and the weights) share one of fp16, bf16 and fp32, or the weights are quantised; biases and
routed weights may have any floating dtype. Every op is deterministic: no atomics, and each sum has one order. A token's
bits depend on the rest of the batch in one way only: the size of the batch chooses the launch parameters (see
configs/moe.py). One quantisation adds another: a dynamic scale of the whole tensor.
"""

from __future__ import annotations

import torch

from ops_configs.moe import TILE_ROWS, fitted, moe_default
from ops_configs.store import shared_bytes
from ops_patches.library import op_library, uses_kernels
from ops_patches.replay import replayed

from . import checks, reference
from .routing import RoutingPlan

_register = op_library("moe_ops")


def _rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


PLAN_ARRAYS = ("choices", "rows", "counts", "starts", "tile_experts", "tile_starts", "tile_sizes", "tile_count")


def _plan_args(plan: RoutingPlan) -> tuple[list[torch.Tensor], int, int]:
    return [getattr(plan, name) for name in PLAN_ARRAYS], plan.top_k, plan.tile_rows


def _fake_quantize(x, quant, scale, per_token, group, power_of_two_scales):
    shape = (1,)
    if scale is not None:
        shape = scale.shape
    elif per_token:
        shape = (x.shape[0], 1)
    elif group is not None:
        shape = (x.shape[0], -(-x.shape[1] // group))
    return x.new_empty(x.shape, dtype=reference.QUANTS[quant]), x.new_empty(shape, dtype=torch.float32)


@_register(
    "quantize(Tensor x, str quant, Tensor? scale, bool per_token, int? group, bool power_of_two_scales)",
    "(Tensor, Tensor)",
    _fake_quantize,
)
def _quantize(x, quant, scale, per_token, group, power_of_two_scales):
    checks.quantize(x, quant, scale, per_token, group, power_of_two_scales)
    x = _rows_contiguous(x)
    checks.kernel_operands("quantize", "x", x=x)
    if quant == "fp8_w8a8":
        checks.fp8_device("quantize", x.device)
    if not uses_kernels(x) or x.numel() == 0 or (scale is not None and scale.numel() > 1):
        q, found = reference.quantize(x, quant, scale, per_token, group, power_of_two_scales)
    else:
        from .kernels.quantize import quantize as kernel

        q, found = kernel(x, quant, scale, per_token, group, power_of_two_scales)
    return q, found if scale is None else found.clone()  # an op returns nothing that it was given


def _fake_grouped_gemm(x, w, plan, top_k, tile_rows, gather, bias, topk_weights, x_scale, w_scale, block_shape, dtype):
    return x.new_empty(plan[0].shape[0], w.shape[1], dtype=dtype or x.dtype)


@_register(
    "grouped_gemm(Tensor x, Tensor w, Tensor[] plan, int top_k, int tile_rows, bool gather, Tensor? bias, "
    "Tensor? topk_weights, Tensor? x_scale, Tensor? w_scale, int[]? block_shape, ScalarType? out_dtype)",
    "Tensor",
    _fake_grouped_gemm,
)
def _grouped_gemm(x, w, plan, top_k, tile_rows, gather, bias, topk_weights, x_scale, w_scale, block_shape, out_dtype):
    op = "grouped_gemm"
    plan = RoutingPlan(*plan, top_k=top_k, tile_rows=tile_rows)
    experts, choices = plan.counts.shape[0], plan.choices.shape[0]
    checks.grouped_gemm(x, w, plan.choices, experts, top_k, gather, bias, topk_weights)
    checks.grouped_gemm_scales(x, w, x_scale, w_scale, block_shape, out_dtype)
    x = _rows_contiguous(x)
    checks.kernel_operands(op, "x", x=x, w=w)
    if x.dtype == torch.float8_e4m3fn:
        checks.fp8_device(op, x.device)
    scales = {"x_scale": x_scale, "w_scale": w_scale, "block_shape": block_shape}
    if not uses_kernels(x):
        options = {"bias": bias, "topk_weights": topk_weights, "out_dtype": out_dtype}
        return reference.grouped_gemm(x, w, plan, gather, **options, **scales)
    checks.tile_rows(op, tile_rows, TILE_ROWS)
    from .kernels import grouped_gemm as kernel

    out = x.new_zeros(choices, w.shape[1], dtype=out_dtype)  # rows without expert: no program writes them
    if out.numel() > 0:
        itemsize, k = x.dtype.itemsize, w.shape[2]
        config = moe_default(tile_rows, choices // top_k, experts, top_k, *w.shape[1:], itemsize=itemsize)
        config = fitted(config, 1, itemsize, k, shared_bytes(x.device))
        weights = None if topk_weights is None else topk_weights.reshape(-1).contiguous()
        kernel.grouped_gemm(x, w, out, plan, config, gather=gather, bias=bias, weights=weights, **scales)
    return out


LAYER = (
    "Tensor hidden, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, str activation, bool gated, "
    "bool interleaved, float swiglu_alpha, float swiglu_limit, Tensor? bias13, Tensor? bias2, Tensor? expert_map, "
    "bool apply_router_weight_on_input, float routed_scaling, str? quant, Tensor? w13_scale, Tensor? w2_scale, "
    "Tensor? a1_scale, Tensor? a2_scale, bool per_token, int[]? block_shape, bool power_of_two_scales, "
    "int? global_experts"
)


def _fake_fused_experts(hidden, *args):
    return hidden.new_empty(hidden.shape)


@_register(f"fused_experts({LAYER})", "Tensor", _fake_fused_experts)
def _fused_experts(hidden, *args):
    out = hidden.new_empty(hidden.shape)
    _run_layer(out, hidden, *args)
    return out


@_register(
    f"fused_experts_out(Tensor(a!) out, {LAYER}, Tensor(b!)? h=None, Tensor(c!)? y=None)", counted_as="fused_experts"
)
def _fused_experts_out(out, hidden, *args):
    _run_layer(out, hidden, *args)


def _run_layer(out, hidden, *args):
    (_replayed_layer if uses_kernels(hidden) else _layer)(out, hidden, *args)


def check_layer(
    hidden,
    w13,
    w2,
    topk_weights,
    topk_ids,
    *,
    activation,
    gated,
    interleaved,
    bias13,
    bias2,
    expert_map,
    apply_router_weight_on_input,
    quant,
    w13_scale,
    w2_scale,
    a1_scale,
    a2_scale,
    per_token,
    block_shape,
    power_of_two_scales,
    **_,
) -> torch.Tensor:
    """Check a layer's arguments; hidden as the kernels take it."""
    op = "fused_experts"
    checks.fused_experts(
        hidden, w13, w2, topk_weights, topk_ids, gated, bias13, bias2, expert_map, apply_router_weight_on_input
    )
    scales = (w13_scale, w2_scale, a1_scale, a2_scale)
    checks.fused_experts_scales(quant, w13, w2, *scales, per_token, block_shape, power_of_two_scales)
    checks.activation(activation, gated, interleaved)
    hidden = _rows_contiguous(hidden)
    checks.kernel_operands(op, "hidden", hidden=hidden, w13=w13, w2=w2)
    if quant == "fp8_w8a8":
        checks.fp8_device(op, hidden.device)
    return hidden


def _layer(
    out,
    hidden,
    w13,
    w2,
    topk_weights,
    topk_ids,
    activation,
    gated,
    interleaved,
    swiglu_alpha,
    swiglu_limit,
    bias13,
    bias2,
    expert_map,
    apply_router_weight_on_input,
    routed_scaling,
    quant,
    w13_scale,
    w2_scale,
    a1_scale,
    a2_scale,
    per_token,
    block_shape,
    power_of_two_scales,
    global_experts,
    h=None,
    y=None,
):
    """Write the layer to out, which may be hidden: nothing reads hidden once out is written."""
    checks.out("fused_experts", out, hidden)
    options = {
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "swiglu_alpha": swiglu_alpha,
        "swiglu_limit": swiglu_limit,
        "bias13": bias13,
        "bias2": bias2,
        "expert_map": expert_map,
        "apply_router_weight_on_input": apply_router_weight_on_input,
        "routed_scaling": routed_scaling,
        "quant": quant,
        "w13_scale": w13_scale,
        "w2_scale": w2_scale,
        "a1_scale": a1_scale,
        "a2_scale": a2_scale,
        "per_token": per_token,
        "block_shape": block_shape,
        "power_of_two_scales": power_of_two_scales,
    }
    hidden = check_layer(hidden, w13, w2, topk_weights, topk_ids, **options)
    checks.room(
        "fused_experts", hidden, out, h=(h, topk_ids.numel() * w2.shape[2]), y=(y, topk_ids.numel() * w2.shape[1])
    )
    if not uses_kernels(hidden):
        reference.fused_experts(hidden, w13, w2, topk_weights, topk_ids, **options, out=out)
        return
    from .launches import run_layer

    run_layer(out, hidden, w13, w2, topk_weights, topk_ids, global_experts=global_experts, h=h, y=y, **options)


_replayed_layer = replayed(_layer)


def quantize(
    x: torch.Tensor,
    quant: str,
    scale: torch.Tensor | None = None,
    per_token: bool = False,
    group: int | None = None,
    power_of_two_scales: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, K] in 8 bits and its scale, the very values of `reference.quantize`; x is fp16, bf16 or fp32."""
    return torch.ops.moe_ops.quantize(x, quant, scale, per_token, group, power_of_two_scales)


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    plan: RoutingPlan,
    gather: bool = False,
    *,
    bias: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    block_shape: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out[row] = weight of row * (w[expert of row] @ x[row] + bias[expert of row]); zero for rows without expert.

    Args:
        x: [C, K], one row each row of the plan; with gather [M, K], one row each token.
        w: [E, N, K], last dimension contiguous, the dtype of x; or int8, which is converted to the dtype of x.
        plan: of tiles of 16, 32, 64 or 128 rows.
        gather: read the row of the token.
        bias: [E, N].
        topk_weights: [M, top_k], routed weight of each choice.
        x_scale, w_scale, block_shape: of quantised x and w, see `reference.grouped_gemm`; `quantize` makes such x.
        out_dtype: fp16, bf16 or fp32; the dtype of x by default, must be given when x is quantised.

    Returns:
        [C, N] in out_dtype.

    Raises:
        ValueError, TypeError: an argument does not fit or has a dtype that is not supported; the message says which.
    """
    return torch.ops.moe_ops.grouped_gemm(
        x, w, *_plan_args(plan), gather, bias, topk_weights, x_scale, w_scale, block_shape, out_dtype
    )


def fused_experts(
    hidden: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    routed_scaling: float = 1.0,
    quant: str | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    per_token: bool = False,
    block_shape: tuple[int, int] | None = None,
    power_of_two_scales: bool = False,
    global_experts: int | None = None,
    h: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed-experts layer; arguments and result are those of `reference.fused_experts`, and three more.

    Intermediates are rounded to the dtype of hidden: what the activation returns (before it is quantised, too), and
    what each expert returns for a token, routed weight included (not of a few tokens, whose
    experts are summed up in fp32). Without a host sync; ids out of range are found on the
    CPU only, else they count as -1.

    Args:
        global_experts: that the router chooses from, where -1 stands for those of other devices; what an expert_map
            says by itself. Launch parameters depend on it.
        h, y: memory for the intermediates, which is allocated otherwise: contiguous tensors of the dtype of hidden, of
            at least M * top_k * I and M * top_k * H elements. Whatever they hold is lost, or left.

    Raises:
        ValueError, TypeError: an argument does not fit or has a dtype that is not supported; the message says which.
    """
    args = (
        hidden,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation,
        gated,
        interleaved,
        float(swiglu_alpha),
        float(swiglu_limit),
        bias13,
        bias2,
        expert_map,
        apply_router_weight_on_input,
        float(routed_scaling),
        quant,
        w13_scale,
        w2_scale,
        a1_scale,
        a2_scale,
        per_token,
        block_shape,
        power_of_two_scales,
        global_experts,
    )
    if out is None and h is None and y is None:
        return torch.ops.moe_ops.fused_experts(*args)
    if out is None:
        out = hidden.new_empty(hidden.shape)
    torch.ops.moe_ops.fused_experts_out(out, *args, h, y)
    return out


def warmup_layer(
    w13: torch.Tensor,
    w2: torch.Tensor,
    top_k: int,
    *,
    dtype: torch.dtype,
    ids_dtype: torch.dtype = torch.int32,
    weights_dtype: torch.dtype = torch.float32,
    **layer,
) -> None:
    """Compile whatever `fused_experts` may launch for this layer, at any number of tokens; on a GPU only.

    A server calls it once for each kind of layer, before it takes requests. Counts no hit. While a CUDA graph is
    captured it checks the arguments and compiles nothing.

    Args:
        w13, w2: of the layer.
        top_k: experts of a token.
        dtype, ids_dtype, weights_dtype: of hidden, topk_ids and topk_weights.
        layer: the other keyword arguments of the layer's calls of `fused_experts`, but for h, y and out.

    Raises:
        ValueError, TypeError: an argument does not fit or has a dtype that is not supported; the message says which.
    """
    from .launches import compile_layer

    tensors, options = one_token(w13, w2, top_k, dtype, ids_dtype, weights_dtype, **layer)
    check_layer(*tensors, **options)
    if w2.is_cuda and not torch.cuda.is_current_stream_capturing():
        with torch.cuda.device(w2.device):
            compile_layer(*tensors, **options)


def one_token(
    w13, w2, top_k, dtype, ids_dtype, weights_dtype, **layer
) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    """The tensors and options of a call of the layer with one token, from the arguments of `warmup_layer`."""
    options = {name: value for name, value in fused_experts.__kwdefaults__.items() if name not in ("h", "y", "out")}
    if unknown := sorted(layer.keys() - options.keys()):
        raise TypeError(f"warmup_layer: {', '.join(unknown)} is no option of a layer, those are {', '.join(options)}")
    options |= layer
    options |= {name: float(options[name]) for name in ("swiglu_alpha", "swiglu_limit", "routed_scaling")}  # as the op
    capturing = w2.is_cuda and torch.cuda.is_current_stream_capturing()
    filled = torch.empty if capturing else torch.zeros  # a graph would fill with zeros each time
    hidden = filled(1, w2.shape[1], dtype=dtype, device=w2.device)
    weights = filled(1, top_k, dtype=weights_dtype, device=w2.device)
    ids = filled(1, top_k, dtype=ids_dtype, device=w2.device)
    return (hidden, w13, w2, weights, ids), options
