"""The experts of a few tokens, choice by choice: no routing plan, no combine, one launch for each half of the layer.

topk_ids -> gate_up: act(w13[expert of choice] @ x[token]) -> down: sum over k of weight * (w2[expert] @ h[choice])

Shapes: x [M, K], w13 [E, 2N or N, K], h [C, N] in the order of the choices (choice = token * top_k + k), w2 [E, K, N],
out [M, K]. Products are matrix-vector products in fp32 on CUDA cores: so few rows are bound by reading the weights,
which each choice does for itself. Weights in block fp8 go through chunks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ops_configs.moe import DIRECT_BLOCK_K, DIRECT_ELEMENTS
from ops_patches.launch import cdiv, power_of_two, prepared

from .chunks import down_of_chunks, gate_up_of_chunks
from .gate_up import gated, pointwise, split_gate_up
from .routing import expert_constants, load_experts
from .tiles import UNALIGNED, bias_operand, row_stride, w_scale_arguments

GATE_UP_COLUMNS, DOWN_COLUMNS = 4, 2
"""Columns of a program of two warps; measured on an H200."""
FP8_GATE_UP, FP8_DOWN = (4, 1024), (8, DIRECT_ELEMENTS)
"""Of block fp8: columns of a program, and elements of K that it reads at a step, of all experts together."""


@triton.jit
def load_block(pointers, k0, live, ks, K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Block [BLOCK_N, BLOCK_K] of an expert's weight from column k0 on, fp32; EVEN: no row and no column is padding."""
    if EVEN:
        return tl.load(pointers + k0).to(tl.float32)
    else:
        return tl.load(pointers + k0, mask=live[:, None] & (ks < K - k0)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_choices(
    ids_ptr, expert_map_ptr, weights_ptr, choices, mask, EXPERTS: tl.constexpr, GLOBAL_EXPERTS: tl.constexpr
):
    """Of each choice its expert, int64, the routed weight, fp32, and whether it has an expert; expert 0 where not."""
    experts = load_experts(ids_ptr, expert_map_ptr, choices, mask, EXPERTS, GLOBAL_EXPERTS)
    here = experts < EXPERTS
    experts = tl.where(here, experts, 0).to(tl.int64)
    weights = tl.full(choices.shape, 1.0, tl.float32)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + choices, mask=here, other=0.0).to(tl.float32)
    return experts, weights, here


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def gate_up_direct_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    gate_ptr,  # [E, N, K]
    up_ptr,  # as gate; unused when not GATED
    w_scale,  # of block fp8 w13: (pointer, strides of expert, row and group of K); or None
    gate_bias_ptr,  # [E, N] or None
    up_bias_ptr,  # [E, N] or None
    weights_ptr,  # [C] routed weight of each choice, or None
    out_ptr,  # [C, N]
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    x_stride,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    alpha,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (ceil(N / BLOCK_N), choices). A program owns BLOCK_N columns of out[choice]; none without expert."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # down may come to the multiprocessors that this leaves
    choice = tl.program_id(1)
    expert = load_experts(ids_ptr, expert_map_ptr, choice, True, EXPERTS, GLOBAL_EXPERTS)
    if expert == EXPERTS:
        return
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = columns < N
    x_row = x_ptr + (choice // TOP_K).to(tl.int64) * x_stride
    if w_scale is None:
        ks = tl.arange(0, BLOCK_K)
        EVEN: tl.constexpr = N % BLOCK_N == 0 and K % BLOCK_K == 0
        block = expert.to(tl.int64) * expert_stride + columns[:, None].to(tl.int64) * row_stride + ks[None, :]
        gates = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k0 in tl.static_range(0, K, BLOCK_K):  # unrolled, so that loads are under way together
            x = tl.load(x_row + ks + k0, mask=ks < K - k0, other=0.0).to(tl.float32)[None, :]
            gates += x * load_block(gate_ptr + block, k0, live, ks, K, BLOCK_K, EVEN)
            if GATED:
                ups += x * load_block(up_ptr + block, k0, live, ks, K, BLOCK_K, EVEN)
        gate = tl.sum(gates, 1)
        up = tl.sum(ups, 1)
    else:
        gate, up = gate_up_of_chunks(
            x_row,
            gate_ptr,
            up_ptr,
            w_scale,
            expert,
            tl.program_id(0) * BLOCK_N,
            expert_stride,
            row_stride,
            N,
            K,
            GATED,
            INTERLEAVED,
            SCALE_N,
            SCALE_K,
            ONE_SCALE,
            POWER_OF_TWO,
            BLOCK_N,
            BLOCK_K,
        )
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + choice).to(tl.float32)
        gate *= weight
        up *= weight
    bias = expert.to(tl.int64) * bias_expert_stride + columns * bias_stride
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + bias, mask=live, other=0.0).to(tl.float32)
    if GATED:
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + bias, mask=live, other=0.0).to(tl.float32)
        h = gated(gate, up, alpha, limit, ACTIVATION)
    else:
        h = pointwise(gate, ACTIVATION)
    tl.store(out_ptr + choice.to(tl.int64) * N + columns, h.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def down_direct_kernel(
    h_ptr,  # [C, K]
    w_ptr,  # [E, N, K]
    w_scale,  # of block fp8 w2: (pointer, strides of expert, row and group of K); or None
    bias_ptr,  # [E, N] or None
    weights_ptr,  # [C] routed weight of each choice, or None
    out_ptr,  # [M, N]
    ids_ptr,  # [C]
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    scaling,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (ceil(N / BLOCK_N), tokens). A program owns BLOCK_N columns of out[token]: its experts in turn.

    Products of all experts add up in the same places, weighted, and are summed up once.
    """
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = columns < N
    if w_scale is None:
        ks = tl.arange(0, BLOCK_K)
        block = columns[:, None].to(tl.int64) * row_stride + ks[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()  # for h
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        biases = tl.zeros((BLOCK_N,), tl.float32)
        for k in tl.static_range(TOP_K):
            choice = token * TOP_K + k
            expert, weight, here = load_choices(
                ids_ptr, expert_map_ptr, weights_ptr, choice, True, EXPERTS, GLOBAL_EXPERTS
            )
            w_pointers = w_ptr + expert * expert_stride + block
            h_pointers = h_ptr + choice.to(tl.int64) * K + ks
            for k0 in tl.static_range(0, K, BLOCK_K):  # unrolled, so that loads are under way together
                some = ks < tl.where(here, K - k0, 0)
                h = weight * tl.load(h_pointers + k0, mask=some, other=0.0).to(tl.float32)
                w = tl.load(w_pointers + k0, mask=live[:, None] & some[None, :], other=0.0)
                sums += h[None, :] * w.to(tl.float32)
            if bias_ptr is not None:
                bias = bias_ptr + expert * bias_expert_stride + columns * bias_stride
                biases += weight * tl.load(bias, mask=columns < tl.where(here, N, 0), other=0.0).to(tl.float32)
        total = tl.sum(sums, 1) + biases
    else:
        ks = tl.arange(0, BLOCK_T)
        choices = token * TOP_K + ks
        experts, weights, here = load_choices(
            ids_ptr, expert_map_ptr, weights_ptr, choices, ks < TOP_K, EXPERTS, GLOBAL_EXPERTS
        )
        experts = experts[:, None]
        scaled = tl.program_id(0) * BLOCK_N + tl.arange(0, 1 if ONE_SCALE else BLOCK_N)[None, :]
        rows_live, scales_live = here[:, None] & live[None, :], here[:, None] & (scaled < N)
        total = down_of_chunks(
            h_ptr + choices.to(tl.int64) * K,
            weights,
            here,
            w_ptr + experts * expert_stride + columns[None, :].to(tl.int64) * row_stride,
            rows_live,
            w_scale[0] + experts * w_scale[1] + scaled // SCALE_N * w_scale[2],
            scales_live,
            w_scale[3],
            K,
            SCALE_K,
            POWER_OF_TWO,
            BLOCK_K,
            PDL,
        )
        if bias_ptr is not None:
            bias = bias_ptr + experts * bias_expert_stride + columns[None, :] * bias_stride
            bias = tl.load(bias, mask=rows_live, other=0.0).to(tl.float32)
            total += tl.sum(weights[:, None] * bias, 0)
    out = out_ptr + token.to(tl.int64) * N + columns
    tl.store(out, (scaling * total).to(out_ptr.dtype.element_ty), mask=live)


def fused_experts_direct(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    out: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    swiglu_alpha: float,
    swiglu_limit: float,
    bias13: torch.Tensor | None,
    bias2: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool,
    routed_scaling: float,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    block_shape: Sequence[int] | None,
    power_of_two_scales: bool,
    pdl: bool,
) -> None:
    """Launch both halves of the layer; arguments as `moe_ops.fused_experts` has them, out [M, H] contiguous.

    block_shape: of fp8 w13 and w2, whose x and h are quantised here; its k is a power of two, DIRECT_CHUNK (16) at
        least, and at most DIRECT_ELEMENTS (2048) over the padded experts of a token: see `runs_direct`.
    pdl: down starts under the tail of the first half (compute capability 9.0 and later).
    """
    gate, up = split_gate_up(w13, interleaved) if gated else (w13, w13)
    gate_bias, up_bias = (bias13, None) if bias13 is None or not gated else split_gate_up(bias13, interleaved)
    gate_bias_ptr, *bias13_strides = bias_operand(gate_bias)
    bias2_ptr, *bias2_strides = bias_operand(bias2)
    ids, weights = topk_ids.reshape(-1).contiguous(), topk_weights.reshape(-1).contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    experts, width, inner = w2.shape
    top_k = topk_ids.shape[1]
    experts_padded = power_of_two(top_k)
    first = half_constants(width, 1, GATE_UP_COLUMNS, FP8_GATE_UP, block_shape)
    second = half_constants(inner, experts_padded, DOWN_COLUMNS, FP8_DOWN, block_shape)
    first |= w_scale_arguments(
        w13_scale, block_shape, first["BLOCK_N"], ups=inner if gated else 0, interleaved=interleaved
    )
    second |= w_scale_arguments(w2_scale, block_shape, second["BLOCK_N"])
    constants = {
        "TOP_K": top_k,
        **expert_constants(experts, expert_map),
        "POWER_OF_TWO": power_of_two_scales,
        "PDL": pdl,
        "num_warps": 2,
        "launch_pdl": pdl,
    }
    h = x.new_empty(ids.shape[0], inner)
    first_scale, second_scale = first.pop("w_scale"), second.pop("w_scale")
    launch = prepared(
        gate_up_direct_kernel,
        N=inner,
        K=width,
        GATED=gated,
        INTERLEAVED=interleaved,
        ACTIVATION=activation,
        **first,
        **constants | {"launch_pdl": False},
    )
    launch(
        (cdiv(inner, first["BLOCK_N"]), ids.shape[0]),
        x,
        gate,
        up,
        first_scale,
        gate_bias_ptr,
        up_bias,
        weights if apply_router_weight_on_input else None,
        h,
        ids,
        expert_map,
        row_stride(x),
        gate.stride(0),
        gate.stride(1),
        *bias13_strides,
        swiglu_alpha,
        swiglu_limit,
    )
    launch = prepared(down_direct_kernel, N=width, K=inner, BLOCK_T=experts_padded, **second, **constants)
    launch(
        (cdiv(width, second["BLOCK_N"]), out.shape[0]),
        h,
        w2,
        second_scale,
        bias2_ptr,
        None if apply_router_weight_on_input else weights,
        out,
        ids,
        expert_map,
        routed_scaling,
        w2.stride(0),
        w2.stride(1),
        *bias2_strides,
    )


def half_constants(
    k: int, experts: int, columns: int, fp8: tuple[int, int], block_shape: Sequence[int] | None
) -> dict[str, int]:
    """Blocks of a program that reads k columns of so many experts together; columns: unquantised, fp8: else."""
    block_k = power_of_two(k)
    if block_shape is None:
        return {"BLOCK_N": columns, "BLOCK_K": min(DIRECT_BLOCK_K, block_k)}
    columns, elements = fp8
    return {"BLOCK_N": columns, "BLOCK_K": max(min(elements // experts, block_k), block_shape[1])}
