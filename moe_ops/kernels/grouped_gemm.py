"""Grouped GEMM: out[row] = weight[choice of row] * (w[expert of row] @ x[row] + bias[expert of row]).

tile of rows of one expert -> rows x block of the expert's weight -> one block of columns
short rows                 -> the rows stay, blocks of the weight pass by -> all columns of the tile

Shapes: x [C, K] in row order, or [M, K] gathered by token; w [E, N, K] of the same dtype, or quantised, each with its
scales (tiles.py); out [C, N]. The product accumulates in fp32, that of int8 in int32, and is rounded once, after
scales, bias and routed weight. Arrays of the plan as in routing.py; without one rows are choices (choices.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ops_configs.moe import MoeConfig, stationary_fits
from ops_patches.launch import cdiv, prepared

from ..routing import RoutingPlan
from .choices import Choices, most_rows, tile_arguments, tile_rows
from .tiles import (
    UNALIGNED,
    add_product,
    bias_operand,
    load_bias,
    load_row_weight,
    load_rows,
    load_w_scale,
    load_weight,
    load_x_scale,
    multiprocessors,
    operand,
    product,
    row_stride,
    rows_operand,
    rows_source,
    scale_arguments,
    store_rows,
    takes_tma,
    tile_of,
    weight_source,
)

WHOLE_TILES = 3
"""Tiles for each multiprocessor up to which a stationary program takes a whole one: measured on an H200."""


@triton.jit
def grouped_tile(
    tile,
    column,
    x,
    BLOCK_M: tl.constexpr,
    w,
    x_scale,
    w_scale,
    bias_ptr,
    weights_ptr,
    out,
    choices_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tile_sizes_ptr,
    ids_ptr,
    expert_map_ptr,
    num_tiles,
    x_stride,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    ACC: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[first BLOCK_M rows of a tile, BLOCK_N columns from `column` on]; arguments are the kernel's."""
    expert, size, first_row, rows, live = tile_rows(
        tile,
        tile_experts_ptr,
        tile_starts_ptr,
        tile_sizes_ptr,
        ids_ptr,
        expert_map_ptr,
        num_tiles,
        EXPERTS,
        GLOBAL_EXPERTS,
        CHOICES,
        BLOCK_M,
    )
    columns = column + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    x_rows = rows
    if GATHER:
        x_rows = tl.load(choices_ptr + rows, mask=live, other=0) // TOP_K
    source = rows_source(x, x_rows, ks, x_stride, X_TMA)
    w_source = weight_source(w, expert, columns, ks, expert_stride, row_stride, TMA)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if w_scale is not None:
        scale = load_x_scale(x_scale, expert, x_rows, live, 0)
        w_factor = load_w_scale(w_scale, expert, column, columns, 0, N, 0, 1, SCALE_N, ONE_SCALE)
    for k0 in range(0, K, BLOCK_K):
        a = load_rows(source, first_row, k0, live, ks, K, BLOCK_K, X_TMA)
        b = load_weight(w_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
        if BLOCKED:  # scales of the next step come while this one multiplies
            group = min(k0 + BLOCK_K, K - 1) // SCALE_K
            next_scale = load_x_scale(x_scale, expert, x_rows, live, group)
            next_factor = load_w_scale(w_scale, expert, column, columns, group, N, 0, 1, SCALE_N, ONE_SCALE)
            acc += product(a, b) * (scale * w_factor)
            scale = next_scale
            w_factor = next_factor
        else:
            acc = add_product(acc, a, b)

    if w_scale is not None and not BLOCKED:
        acc = acc.to(tl.float32) * (scale * w_factor)
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
    acc *= load_row_weight(weights_ptr, choices_ptr, rows, live)
    store_rows(out, acc, first_row, size, rows, live, column, columns, N, BLOCK_N, OUT_TMA)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def grouped_gemm_kernel(
    x,  # pointer to [M, K] (GATHER) or [C, K], rows x_stride apart; X_TMA: descriptor of [C, K]
    x_half,  # x; X_TMA: descriptor of half as many rows
    w,  # [E, N, K], descriptor or pointer
    x_scale,  # of quantised x, see tiles.py; or None
    w_scale,  # of quantised w, or None
    bias_ptr,  # [E, N] or None
    weights_ptr,  # [C] routed weight of each choice, or None
    out,  # [C, N], pointer; OUT_TMA: descriptor of `rows_operand`
    choices_ptr,  # int32 [C], or None, as are the next three: without a plan (choices.py)
    tile_experts_ptr,  # int32 [T]
    tile_starts_ptr,  # int32 [T]
    tile_sizes_ptr,  # int32 [T]
    ids_ptr,  # [C] without a plan, else None
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    tile_count_ptr,  # int32 [1], used when PERSISTENT
    num_tiles,
    x_stride,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    ACC: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * ceil(N / BLOCK_N),). A program owns out[rows of its tile, its BLOCK_N columns].
    Without a plan num_tiles is the number of choices, of which some begin no tile, and rows are choices.
    PERSISTENT, grid: (programs,). A program owns every programs-th of these, and fetches one while it stores another.

    Rows without expert are in no tile and stay as they are. Through TMA a tile also reads the rows that follow it:
    they end in rows of the product that are not stored. A tile of 128 rows that is at most half full multiplies half
    the rows, unless PERSISTENT.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    operands = (  # of all tiles
        w,
        x_scale,
        w_scale,
        bias_ptr,
        weights_ptr,
        out,
        choices_ptr,
        tile_experts_ptr,
        tile_starts_ptr,
        tile_sizes_ptr,
        ids_ptr,
        expert_map_ptr,
        num_tiles,
        x_stride,
        expert_stride,
        row_stride,
        bias_expert_stride,
        bias_stride,
    )
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if PERSISTENT:
        count = tl.load(tile_count_ptr)
        for pid in tl.range(tl.program_id(0), count * BLOCKS, tl.num_programs(0), flatten=True):
            tile, block = tile_of(pid, count, BLOCKS, GROUP_M)
            grouped_tile(
                tile,
                block * BLOCK_N,
                x,
                BLOCK_M,
                *operands,
                N,
                K,
                TOP_K,
                EXPERTS,
                GLOBAL_EXPERTS,
                CHOICES,
                GATHER,
                ACC,
                BLOCKED,
                SCALE_N,
                SCALE_K,
                ONE_SCALE,
                X_TMA,
                TMA,
                OUT_TMA,
                BLOCK_N,
                BLOCK_K,
            )
    else:
        tile, block = tile_of(tl.program_id(0), num_tiles, BLOCKS, GROUP_M)
        size = most_rows(tile, tile_sizes_ptr, ids_ptr, expert_map_ptr, EXPERTS, GLOBAL_EXPERTS, CHOICES, BLOCK_M)
        if size == 0:
            return
        if BLOCK_M == 128:
            if size <= BLOCK_M // 2:
                grouped_tile(
                    tile,
                    block * BLOCK_N,
                    x_half,
                    BLOCK_M // 2,
                    *operands,
                    N,
                    K,
                    TOP_K,
                    EXPERTS,
                    GLOBAL_EXPERTS,
                    CHOICES,
                    GATHER,
                    ACC,
                    BLOCKED,
                    SCALE_N,
                    SCALE_K,
                    ONE_SCALE,
                    X_TMA,
                    TMA,
                    OUT_TMA,
                    BLOCK_N,
                    BLOCK_K,
                )
                return
        grouped_tile(
            tile,
            block * BLOCK_N,
            x,
            BLOCK_M,
            *operands,
            N,
            K,
            TOP_K,
            EXPERTS,
            GLOBAL_EXPERTS,
            CHOICES,
            GATHER,
            ACC,
            BLOCKED,
            SCALE_N,
            SCALE_K,
            ONE_SCALE,
            X_TMA,
            TMA,
            OUT_TMA,
            BLOCK_N,
            BLOCK_K,
        )


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=UNALIGNED)
def stationary_kernel(
    x,  # descriptor of [C, K]
    w,  # descriptor of [E, N, K]
    x_scale,
    w_scale,
    bias_ptr,
    weights_ptr,
    out,  # descriptor of `rows_operand`
    choices_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tile_sizes_ptr,
    num_parts,
    bias_expert_stride,
    bias_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * num_parts,). A program owns out[rows of its tile, its part of the columns].

    It reads the rows once. Arguments are those of grouped_gemm_kernel. K is short: its blocks are unrolled, and what is
    fetched ahead is the weight of the next BLOCK_N columns.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    size = tl.load(tile_sizes_ptr + tile)
    if size == 0:
        return
    expert = tl.load(tile_experts_ptr + tile)
    first_row = tl.load(tile_starts_ptr + tile)
    m = tl.arange(0, BLOCK_M)
    rows = first_row + m
    live = m < size
    weight = load_row_weight(weights_ptr, choices_ptr, rows, live)

    a = ()
    scales = ()
    for k0 in tl.static_range(0, K, BLOCK_K):
        a = a + (x.load([first_row, k0]),)  # noqa: RUF005  (the compiler unpacks no tuples)
        if w_scale is not None:
            scales = scales + (load_x_scale(x_scale, expert, rows, live, k0 // SCALE_K if BLOCKED else 0),)  # noqa: RUF005
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for block in tl.range(part * BLOCKS // num_parts, (part + 1) * BLOCKS // num_parts, num_stages=STAGES):
        column = block * BLOCK_N
        columns = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for step in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            b = w.load([expert, column, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            if BLOCKED:
                group = step * BLOCK_K // SCALE_K
                w_factor = load_w_scale(w_scale, expert, column, columns, group, N, 0, 1, SCALE_N, ONE_SCALE)
                acc += product(a[step], b) * (scales[step] * w_factor)
            else:
                acc = add_product(acc, a[step], b)
        if w_scale is not None and not BLOCKED:
            w_factor = load_w_scale(w_scale, expert, column, columns, 0, N, 0, 1, SCALE_N, ONE_SCALE)
            acc = acc.to(tl.float32) * (scales[0] * w_factor)
        if bias_ptr is not None:
            acc += load_bias(bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
        store_rows(out, acc * weight, first_row, size, rows, live, column, columns, N, BLOCK_N, True)


def grouped_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    tiles: RoutingPlan | Choices,
    config: MoeConfig,
    *,
    gather: bool = False,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
    pdl: bool = False,
) -> None:
    """Launch a grouped GEMM.

    Args:
        x: [C, K], or with gather [M, K]; last dimension contiguous.
        w: [E, N, K], last dimension contiguous, the dtype of x, or int8.
        out: [C, N] contiguous. Rows without expert stay as they are.
        tiles: a plan of tiles of config.block_m rows, with at least one choice; or the choices, whose rows are in
            their order.
        gather: x has a row for each token, not for each row of the plan.
        bias: [E, N].
        weights: [C] contiguous, routed weight of each choice, applied last.
        x_scale, w_scale, block_shape: of quantised operands, as `tiles.scale_arguments` takes them.
        pdl: start under the tail of the launch before, and let the next one do so.
    """
    scales = scale_arguments(x, w, x_scale, w_scale, block_shape, config.block_k, config.block_n)
    n, k, block_k = out.shape[1], x.shape[1], scales["BLOCK_K"]
    tma = takes_tma(w)
    tile_args, tile_constants = tile_arguments(tiles)
    num_tiles, planned = tile_args[-1], isinstance(tiles, RoutingPlan)
    x_tma = tma and not gather and planned and takes_tma(x)
    programs = num_tiles * cdiv(n, config.block_n)
    persistent = config.persistent and x_tma
    stationary = config.stationary and x_tma and takes_tma(out) and stationary_fits(k, config.block_k, block_shape)
    out_tma = stationary or (persistent and takes_tma(out))
    if persistent:
        programs = min(programs, multiprocessors(x.device))
    bias_ptr, *bias_strides = bias_operand(bias)
    operands = (operand(w, (1, config.block_n, block_k), tma), scales.pop("x_scale"), scales.pop("w_scale"))
    rows = (
        bias_ptr,
        weights,
        rows_operand(out, (config.block_m, config.block_n), out_tma),
        *tile_args[:4],
    )
    constants = {
        "N": n,
        "K": k,
        **scales,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PDL": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": pdl,
    }
    if stationary:
        parts = 1 if num_tiles <= WHOLE_TILES * multiprocessors(x.device) else 2
        launch = prepared(stationary_kernel, STAGES=config.num_stages, **constants)
        rows_of_x = operand(x, (config.block_m, block_k), x_tma)
        launch((num_tiles * parts,), rows_of_x, *operands, *rows, parts, *bias_strides)
        return
    launch = prepared(
        grouped_gemm_kernel,
        TOP_K=tiles.top_k,
        **tile_constants,
        GATHER=gather,
        X_TMA=x_tma,
        TMA=tma,
        OUT_TMA=out_tma,
        GROUP_M=config.group_m,
        PERSISTENT=persistent,
        **constants,
    )
    launch(
        (programs,),
        operand(x, (config.block_m, block_k), x_tma),
        operand(x, (config.block_m // 2, block_k), x_tma and config.block_m == 128 and not persistent),
        *operands,
        *rows,
        *tile_args[4:6],
        tiles.tile_count if planned else None,
        num_tiles,
        row_stride(x),
        w.stride(0),
        w.stride(1),
        *bias_strides,
    )
