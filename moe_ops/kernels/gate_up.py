"""First half of the experts: out[row] = act(w13[expert of row] @ x[token of row] + bias13).

tile of rows of one expert -> gathered tokens x gate block, x up block -> activation -> one block of columns

Shapes: x [M, K], or [C, K] in row order; w13 [E, 2N, K], of which gate and up are views [E, N, K]: its halves, or
every other row; out [C, N]. All of one dtype, or x and w13 quantised, each with its scales (tiles.py). Both products
accumulate in fp32 (int8: int32) and the activation is applied to them before the one rounding, so that the [C, 2N]
between them exists nowhere; out may be quantised too, with a scale for each group of columns. Arrays of the plan as in
routing.py; without one rows are choices (choices.py).

From tiles of 64 rows on, where TMA reads w13, in the dtype of x and without scales of blocks, the gates of a program's
columns and their ups are one block of w13, and one product of twice the columns (JOINED): two would fetch each block
of x twice from shared memory, which then keeps the tensor cores waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ops_configs.moe import MoeConfig
from ops_patches.launch import cdiv, prepared

from ..reference import LIMITS
from ..routing import RoutingPlan
from .choices import Choices, most_rows, tile_arguments, tile_rows
from .quantize import magnitude, quantized, scale_of
from .tiles import (
    UNALIGNED,
    add_product,
    bias_operand,
    load_bias,
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

JOINED_ROWS = 64
"""Rows of a tile from which gates and ups may be one product."""


@triton.jit
def pointwise(x, ACTIVATION: tl.constexpr):
    """One of reference.POINTWISE, in fp32."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu2")
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def gated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """reference.activate of gates and ups, in fp32."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    else:
        return pointwise(gate, ACTIVATION) * up


@triton.jit
def gate_up_tile(
    tile,
    column,
    x,
    out,
    BLOCK_M: tl.constexpr,
    gate,
    up,
    x_scale,
    w_scale,
    gate_bias_ptr,
    up_bias_ptr,
    weights_ptr,
    out_scale_ptr,
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
    out_scale_row_stride,
    out_scale_group_stride,
    alpha,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    OUT_LIMIT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROUND_TO: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    JOINED: tl.constexpr,
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
    choices = rows if choices_ptr is None else tl.load(choices_ptr + rows, mask=live, other=0)
    columns = column + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    UP_FIRST: tl.constexpr = 1 if INTERLEAVED else N  # rows of w13: the first of ups, and from column to column
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    x_rows = rows
    if GATHER:
        x_rows = choices // TOP_K

    source = rows_source(x, x_rows, ks, x_stride, X_TMA)
    if w_scale is not None:
        scale = load_x_scale(x_scale, expert, x_rows, live, 0)
        gate_factor = load_w_scale(w_scale, expert, column, columns, 0, N, 0, STEP, SCALE_N, ONE_SCALE)
        if GATED:
            up_factor = load_w_scale(w_scale, expert, column, columns, 0, N, UP_FIRST, STEP, SCALE_N, ONE_SCALE)
    if JOINED:
        sums = tl.zeros((BLOCK_M, 2 * BLOCK_N), ACC)
        for k0 in range(0, K, BLOCK_K):
            a = load_rows(source, first_row, k0, live, ks, K, BLOCK_K, X_TMA)
            both = gate.load([expert, column, 0, k0] if INTERLEAVED else [expert, 0, column, k0])
            sums = add_product(sums, a, both.reshape(2 * BLOCK_N, BLOCK_K))
        if INTERLEAVED:
            gates, ups = sums.reshape(BLOCK_M, BLOCK_N, 2).split()
        else:
            gates, ups = sums.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    else:
        gate_source = weight_source(gate, expert, columns, ks, expert_stride, row_stride, TMA)
        gates = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if GATED:
            up_source = weight_source(up, expert, columns, ks, expert_stride, row_stride, TMA)
            ups = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k0 in range(0, K, BLOCK_K):
            a = load_rows(source, first_row, k0, live, ks, K, BLOCK_K, X_TMA)
            w = load_weight(gate_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
            if GATED:
                w_up = load_weight(up_source, expert, column, columns, k0, ks, N, K, BLOCK_N, BLOCK_K, TMA)
            if BLOCKED:  # scales of the next step come while this one multiplies, and both products run together
                group = min(k0 + BLOCK_K, K - 1) // SCALE_K
                next_scale = load_x_scale(x_scale, expert, x_rows, live, group)
                next_gate = load_w_scale(w_scale, expert, column, columns, group, N, 0, STEP, SCALE_N, ONE_SCALE)
                gate_product = product(a, w)
                if GATED:
                    next_up = load_w_scale(
                        w_scale, expert, column, columns, group, N, UP_FIRST, STEP, SCALE_N, ONE_SCALE
                    )
                    up_product = product(a, w_up)
                gates += gate_product * (scale * gate_factor)
                gate_factor = next_gate
                if GATED:
                    ups += up_product * (scale * up_factor)
                    up_factor = next_up
                scale = next_scale
            else:
                gates = add_product(gates, a, w)
                if GATED:
                    ups = add_product(ups, a, w_up)

    if w_scale is not None and not BLOCKED:
        gates = gates.to(tl.float32) * (scale * gate_factor)
        if GATED:
            ups = ups.to(tl.float32) * (scale * up_factor)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + choices, mask=live, other=0.0).to(tl.float32)[:, None]
        gates *= weight
        if GATED:
            ups *= weight
    if gate_bias_ptr is not None:
        gates += load_bias(gate_bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
    if GATED:
        if up_bias_ptr is not None:
            ups += load_bias(up_bias_ptr, expert, columns, bias_expert_stride, bias_stride, N)
        h = gated(gates, ups, alpha, limit, ACTIVATION)
    else:
        h = pointwise(gates, ACTIVATION)
    if out_scale_ptr is not None:  # columns from N on are zero: they count in no scale
        h = h.to(ROUND_TO).to(tl.float32)
        grouped = tl.reshape(h, BLOCK_M, BLOCK_N // OUT_GROUP, OUT_GROUP)
        out_scale = scale_of(tl.max(magnitude(grouped), 2), OUT_LIMIT, POWER_OF_TWO)
        grouped = quantized(grouped, out_scale[:, :, None], OUT_LIMIT, out.dtype.element_ty)
        h = tl.reshape(grouped, BLOCK_M, BLOCK_N)
        groups = column // OUT_GROUP + tl.arange(0, BLOCK_N // OUT_GROUP)
        out_scales = out_scale_ptr + rows[:, None].to(tl.int64) * out_scale_row_stride
        out_scales += groups[None, :] * out_scale_group_stride
        tl.store(out_scales, out_scale, mask=live[:, None] & (groups * OUT_GROUP < N)[None, :])
    store_rows(out, h, first_row, size, rows, live, column, columns, N, BLOCK_N, OUT_TMA)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def gate_up_kernel(
    x,  # pointer to [M, K] (GATHER) or [C, K], rows x_stride apart; X_TMA: descriptor of [C, K]
    x_half,  # x; X_TMA: descriptor of half as many rows
    gate,  # [E, N, K], descriptor or pointer; JOINED: descriptor of `joined_operand`
    up,  # as gate; unused when not GATED, or JOINED
    x_scale,  # of quantised x, see tiles.py; or None
    w_scale,  # of quantised w13, or None
    gate_bias_ptr,  # [E, N] or None
    up_bias_ptr,  # [E, N] or None
    weights_ptr,  # [C] routed weight of each choice, or None
    out,  # [C, N], pointer; OUT_TMA: descriptor of `rows_operand`
    out_half,  # out; OUT_TMA: descriptor of half as many rows
    out_scale_ptr,  # fp32 [C, ceil(N / OUT_GROUP)] of quantised out, or None
    choices_ptr,  # int32 [C], or None, as are the next three: without a plan (choices.py)
    tile_experts_ptr,  # int32 [T]
    tile_starts_ptr,  # int32 [T]
    tile_sizes_ptr,  # int32 [T]
    ids_ptr,  # [C] without a plan, else None
    expert_map_ptr,  # [GLOBAL_EXPERTS] or None
    tile_count_ptr,  # int32 [1] when PERSISTENT, else None
    num_tiles,
    x_stride,
    expert_stride,
    row_stride,
    bias_expert_stride,
    bias_stride,
    out_scale_row_stride,
    out_scale_group_stride,
    alpha,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    OUT_LIMIT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROUND_TO: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles * ceil(N / BLOCK_N),). A program owns out[rows of its tile, its BLOCK_N columns].
    PERSISTENT, grid: (programs,). A program owns every programs-th of these, and fetches one while it stores another.

    Without a plan num_tiles is the number of choices, of which some begin no tile, and rows are choices.

    Rows without expert are in no tile and stay as they are. The routed weight multiplies the products: that is the
    same as multiplying x. Quantised out is what `quantize` makes of an out of dtype ROUND_TO: BLOCK_N is a multiple of
    OUT_GROUP. A tile of 128 rows that is at most half full multiplies half the rows, unless PERSISTENT.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    operands = (  # of all tiles
        gate,
        up,
        x_scale,
        w_scale,
        gate_bias_ptr,
        up_bias_ptr,
        weights_ptr,
        out_scale_ptr,
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
        out_scale_row_stride,
        out_scale_group_stride,
        alpha,
        limit,
    )
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if PERSISTENT:
        count = tl.load(tile_count_ptr)
        for pid in tl.range(tl.program_id(0), count * BLOCKS, tl.num_programs(0), flatten=True):
            tile, block = tile_of(pid, count, BLOCKS, GROUP_M)
            gate_up_tile(
                tile,
                block * BLOCK_N,
                x,
                out,
                BLOCK_M,
                *operands,
                N,
                K,
                TOP_K,
                EXPERTS,
                GLOBAL_EXPERTS,
                CHOICES,
                GATHER,
                GATED,
                INTERLEAVED,
                ACTIVATION,
                ACC,
                BLOCKED,
                SCALE_N,
                SCALE_K,
                ONE_SCALE,
                OUT_GROUP,
                OUT_LIMIT,
                POWER_OF_TWO,
                ROUND_TO,
                X_TMA,
                TMA,
                OUT_TMA,
                JOINED,
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
                gate_up_tile(
                    tile,
                    block * BLOCK_N,
                    x_half,
                    out_half,
                    BLOCK_M // 2,
                    *operands,
                    N,
                    K,
                    TOP_K,
                    EXPERTS,
                    GLOBAL_EXPERTS,
                    CHOICES,
                    GATHER,
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    ACC,
                    BLOCKED,
                    SCALE_N,
                    SCALE_K,
                    ONE_SCALE,
                    OUT_GROUP,
                    OUT_LIMIT,
                    POWER_OF_TWO,
                    ROUND_TO,
                    X_TMA,
                    TMA,
                    OUT_TMA,
                    JOINED,
                    BLOCK_N,
                    BLOCK_K,
                )
                return
        gate_up_tile(
            tile,
            block * BLOCK_N,
            x,
            out,
            BLOCK_M,
            *operands,
            N,
            K,
            TOP_K,
            EXPERTS,
            GLOBAL_EXPERTS,
            CHOICES,
            GATHER,
            GATED,
            INTERLEAVED,
            ACTIVATION,
            ACC,
            BLOCKED,
            SCALE_N,
            SCALE_K,
            ONE_SCALE,
            OUT_GROUP,
            OUT_LIMIT,
            POWER_OF_TWO,
            ROUND_TO,
            X_TMA,
            TMA,
            OUT_TMA,
            JOINED,
            BLOCK_N,
            BLOCK_K,
        )


def split_gate_up(w13: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gates and of the ups of a weight [E, 2N, K] or a bias [E, 2N]."""
    if interleaved:
        return w13[:, ::2], w13[:, 1::2]
    half = w13.shape[1] // 2
    return w13.narrow(1, 0, half), w13.narrow(1, half, half)


def joined_operand(w13: torch.Tensor, interleaved: bool, block_n: int, block_k: int) -> TensorDescriptor:
    """Descriptor of w13 [E, 2N, K] whose blocks hold block_n gates and their ups."""
    experts, rows, k = w13.shape
    if interleaved:
        return TensorDescriptor.from_tensor(w13.view(experts, rows // 2, 2, k), [1, block_n, 2, block_k])
    return TensorDescriptor.from_tensor(w13.view(experts, 2, rows // 2, k), [1, 2, block_n, block_k])


def gate_up(
    x: torch.Tensor,
    w13: torch.Tensor,
    out: torch.Tensor,
    tiles: RoutingPlan | Choices,
    config: MoeConfig,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    bias13: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    block_shape: Sequence[int] | None = None,
    out_scale: torch.Tensor | None = None,
    power_of_two_scales: bool = False,
    round_to: torch.dtype | None = None,
    gather: bool = True,
    pdl: bool = False,
) -> None:
    """Launch the first half of the experts.

    Args:
        x: [M, K], a row for each token, or without gather [C, K] in row order; last dimension contiguous.
        w13: [E, 2N, K], gated; else [E, N, K]. Last dimension contiguous, the dtype of x, or int8.
        out: [C, N] contiguous. Rows without expert stay as they are.
        tiles: a plan of tiles of config.block_m rows, with at least one choice; or the choices, with gather: out is
            then in their order.
        activation, gated, interleaved, swiglu_alpha, swiglu_limit: as reference.activate has them.
        bias13: [E, rows of w13].
        weights: [C] contiguous, routed weight of each choice, applied to x.
        x_scale, w_scale, block_shape: of quantised x and w13, as `tiles.scale_arguments` takes them.
        out_scale: fp32 [C, ceil(N / bk)] of block_shape, scales of quantised out; bk divides config.block_n.
        power_of_two_scales: they are rounded up to powers of two.
        round_to: fp16, bf16 or fp32, which the activation is rounded to before out is quantised.
        gather: x has a row for each token, not for each row of the plan.
        pdl: start under the tail of the launch before, if there is a plan, and let the next one do so.
    """
    gate, up = split_gate_up(w13, interleaved) if gated else (w13, w13)
    gate_bias, up_bias = (bias13, None) if bias13 is None or not gated else split_gate_up(bias13, interleaved)
    gate_bias_ptr, *bias_strides = bias_operand(gate_bias)
    tma = takes_tma(gate, up)
    n, block_n = out.shape[1], config.block_n
    scales = scale_arguments(
        x, w13, x_scale, w_scale, block_shape, config.block_k, block_n, ups=n if gated else 0, interleaved=interleaved
    )
    tile_args, tile_constants = tile_arguments(tiles)
    scale_pointers = scales.pop("x_scale"), scales.pop("w_scale")
    num_tiles, block_k = tile_args[-1], scales["BLOCK_K"]
    block = (1, block_n, block_k)
    x_tma = tma and not gather and takes_tma(x)
    joined = gated and tma and w13.dtype == x.dtype and block_shape is None and config.block_m >= JOINED_ROWS
    planned = isinstance(tiles, RoutingPlan)
    out_tma = config.tma_store and planned and tma and out_scale is None and takes_tma(out)
    persistent = config.persistent and planned and tma
    programs = num_tiles * cdiv(n, block_n)
    if persistent:
        programs = min(programs, multiprocessors(x.device))
    launch = prepared(
        gate_up_kernel,
        N=n,
        K=x.shape[1],
        TOP_K=tiles.top_k,
        **tile_constants,
        GATHER=gather,
        GATED=gated,
        INTERLEAVED=interleaved,
        ACTIVATION=activation,
        **scales,
        OUT_GROUP=1 if out_scale is None else block_shape[1],
        OUT_LIMIT=LIMITS.get(out.dtype),
        POWER_OF_TWO=power_of_two_scales,
        ROUND_TO=None if round_to is None else getattr(tl, str(round_to).removeprefix("torch.")),
        X_TMA=x_tma,
        TMA=tma,
        OUT_TMA=out_tma,
        JOINED=joined,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        GROUP_M=config.group_m,
        PERSISTENT=persistent,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl and planned,  # else what comes before is not ours
    )
    launch(
        (programs,),
        operand(x, (config.block_m, block_k), x_tma),
        operand(x, (config.block_m // 2, block_k), x_tma and config.block_m == 128 and not persistent),
        joined_operand(w13, interleaved, block_n, block_k) if joined else operand(gate, block, tma),
        None if joined else operand(up, block, tma),
        *scale_pointers,
        gate_bias_ptr,
        up_bias,
        weights,
        rows_operand(out, (config.block_m, block_n), out_tma),
        rows_operand(out, (config.block_m // 2, block_n), out_tma and config.block_m == 128 and not persistent),
        out_scale,
        *tile_args[:-1],
        tiles.tile_count if persistent else None,
        num_tiles,
        row_stride(x),
        gate.stride(0),
        gate.stride(1),
        *bias_strides,
        *((0, 0) if out_scale is None else out_scale.stride()),
        swiglu_alpha,
        swiglu_limit,
    )
