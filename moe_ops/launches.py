"""The launches of a routed-experts layer, in order, for launch parameters that are given.

a few tokens    gate_up choice by choice -> down over the experts of a token (kernels/direct.py)
a few choices   [quantise] -> gate_up with activation -> [quantise] -> down -> combine (kernels/choices.py)
else            plan -> [quantise or permute rows] -> gate_up with activation -> [quantise] -> down -> combine

On compute capability 9.0 and later the products, the combine and the later launches of a plan are set up under the tail
of the launch before them (PDL): every program waits for that launch before it touches any memory, and only then lets
the next one start; of a few tokens, down waits so for gate_up before it reads h and writes out. The first launch of a
batch is never set up so, for what comes before it is not ours; nor is gate_up of a few choices, quantised or not.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ops_configs.moe import (
    PLANLESS_CHOICES,
    TOKENS,
    LayerConfig,
    MoeLayer,
    layer_config,
    runs_direct,
    runs_without_plan,
)
from ops_configs.store import register_kernels

from .kernels.choices import Choices
from .kernels.combine import combine
from .kernels.direct import fused_experts_direct
from .kernels.gate_up import gate_up
from .kernels.grouped_gemm import grouped_gemm
from .kernels.permute import permute
from .kernels.quantize import group_scales, quantize
from .kernels.routing import lone_chunks, num_bins, routing_plan

register_kernels("moe_ops", Path(__file__).parent / "kernels")

OF_TILES = ("quant", "a1_scale", "a2_scale", "per_token", "h", "y")
"""Options of a layer that `runs_direct` has looked at, or that a layer which runs so does not have or need."""


@functools.cache
def _supports_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def run_layer(out, hidden, w13, w2, topk_weights, topk_ids, *, global_experts, **options) -> None:
    """Write the layer to out, which may be hidden; arguments as `moe_ops.fused_experts` has them, none left out."""
    if out.numel() == 0:
        return
    tokens, top_k = topk_ids.shape
    layer = layer_of(w2, top_k, global_experts=global_experts, **options)
    if runs_direct(layer, tokens):
        run_direct(out, hidden, w13, w2, topk_weights, topk_ids, **options)
        return
    config = layer_config(layer, tokens, hidden.dtype, hidden.device)
    planned = not runs_without_plan(layer, config, tokens)
    run_tiles(out, hidden, w13, w2, topk_weights, topk_ids, config, planned, **options)


def layer_of(w2, top_k, *, gated, quant, block_shape, expert_map, global_experts, **_) -> MoeLayer:
    """What the launch parameters of the layer depend on."""
    experts, width, inner = w2.shape
    blocks = None if block_shape is None else tuple(block_shape)
    if expert_map is not None:
        global_experts = expert_map.shape[0]
    return MoeLayer(experts, top_k, width, inner, gated, quant, blocks, global_experts)


def run_direct(out, hidden, w13, w2, topk_weights, topk_ids, **options) -> None:
    """The layer, unquantised or in block fp8, choice by choice."""
    pdl = _supports_pdl(hidden.device)
    options = {name: value for name, value in options.items() if name not in OF_TILES}
    fused_experts_direct(hidden, w13, w2, out, topk_weights, topk_ids, **options, pdl=pdl)


def run_tiles(
    out,
    hidden,
    w13,
    w2,
    topk_weights,
    topk_ids,
    config: LayerConfig,
    planned: bool,
    *,
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
    h=None,
    y=None,
    **activation,
) -> None:
    """The layer, in tiles of rows of one expert; planned: see `runs_without_plan`; h, y: `moe_ops.fused_experts`."""
    experts, width, inner = w2.shape
    choices = topk_ids.numel()
    pdl = _supports_pdl(hidden.device)
    if planned:
        tiles = plan = routing_plan(topk_ids, experts, config.gate_up.block_m, expert_map, pdl=pdl)
    else:
        tiles, plan = Choices.of(topk_ids, experts, expert_map), None
    weights = topk_weights.reshape(-1).contiguous()
    on_input, on_output = (weights, None) if apply_router_weight_on_input else (None, weights)

    group = None if block_shape is None else block_shape[1]
    gather = a1_scale is None or a1_scale.numel() == 1
    x, x_scale, h_scale, h_dtype = hidden, None, None, hidden.dtype
    if quant in ("fp8_w8a8", "int8_w8a8"):  # once for a token; with a scale for each expert, once for a choice
        how = {"group": group, "power_of_two_scales": power_of_two_scales}
        by_choice = {} if gather else {"plan": plan, "gather": True}
        x, x_scale = quantize(hidden, quant, a1_scale, per_token and a1_scale is None, **how, **by_choice)
        if group is not None and config.gate_up.block_n % group == 0:
            h_dtype, h_scale = w2.dtype, group_scales(choices, -(-inner // group), True, hidden.device)
    elif config.gate_up.permute:
        x, gather = permute(hidden, plan), False

    h = _rows_in(h, hidden, choices, inner, h_dtype)
    gate_up(
        x,
        w13,
        h,
        tiles,
        config.gate_up,
        **activation,
        weights=on_input,
        x_scale=x_scale,
        w_scale=w13_scale,
        block_shape=block_shape,
        out_scale=h_scale,
        power_of_two_scales=power_of_two_scales,
        round_to=hidden.dtype,
        gather=gather,
        pdl=pdl,
    )
    if x_scale is not None and h_scale is None:
        h, h_scale = quantize(h, quant, a2_scale, per_token and a2_scale is None, **how, plan=plan)
    y = _rows_in(y, hidden, choices, width, hidden.dtype)
    scales = {"x_scale": h_scale, "w_scale": w2_scale, "block_shape": block_shape}
    grouped_gemm(h, w2, y, tiles, config.down, bias=bias2, weights=on_output, **scales, pdl=pdl)
    combine(y, out, tiles, routed_scaling, pdl=pdl)


def _rows_in(memory: torch.Tensor | None, hidden, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] in the memory, or in new one on the device of hidden."""
    if memory is None:
        return hidden.new_empty(rows, columns, dtype=dtype)
    return memory.view(-1).view(dtype)[: rows * columns].view(rows, columns)


def compile_layer(hidden, w13, w2, topk_weights, topk_ids, *, global_experts, **options) -> None:
    """Compile all kernels that any batch of the layer runs, by running one token with each of its launch parameters."""
    top_k, expert_map = topk_ids.shape[1], options["expert_map"]
    arguments = (torch.empty_like(hidden), hidden, w13, w2, topk_weights, topk_ids)
    layer = layer_of(w2, top_k, global_experts=global_experts, **options)
    if runs_direct(layer, 1):
        run_direct(*arguments, **options)
    ways = {}
    for tokens in (*range(1, PLANLESS_CHOICES + 1), *TOKENS):
        config = layer_config(layer, tokens, hidden.dtype, hidden.device)
        ways[config, not runs_without_plan(layer, config, tokens)] = None
    for config, planned in ways:
        run_tiles(*arguments, config, planned, **options)
    experts, pdl = w2.shape[0], _supports_pdl(hidden.device)
    for tile_rows in {config.gate_up.block_m for config, planned in ways if planned}:
        for choices in lone_chunks(num_bins(experts)):  # one more than each holds
            routing_plan(topk_ids.expand(choices // top_k + 1, -1), experts, tile_rows, expert_map, pdl=pdl)
