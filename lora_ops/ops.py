"""The LoRA ops: torch custom ops over the Triton kernels on CUDA tensors, over `reference.py` on CPU tensors.

With TRITON_INTERPRET=1 in the environment, CPU tensors run the kernels too, in Triton's interpreter; but not with bf16
weights, which it would multiply as bit patterns.

L adapter slots, M rows (tokens), K input features, R rank, S slices, N_s output features of slice s. Weights are
A_s [L, R, K] and B_s [L, N_s, R] (or with a dimension of size 1 after L), fp16, bf16 or fp32; an expand takes ranks 1
to 512. Every op is deterministic, and a row's result does not depend on the other rows of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ops_configs.lora import row_buckets
from ops_patches.library import op_library, uses_kernels
from ops_patches.replay import ALIGNMENT, replayed

from . import checks, reference
from .config import MAX_SLICES
from .launches import (
    ANY_STEP,
    compile_plan,
    join_side,
    plan_tiles,
    row_tiles,
    run_add,
    run_beside,
    run_expand,
    run_linear,
    run_shrink,
    segment_tiles,
    step_of,
)
from .plan import SMALL_BATCH, LoraPlan, plan_args, plan_layout

_register = op_library("lora_ops")


class _Slots(NamedTuple):
    """What the reference needs of a plan."""

    token_slots: torch.Tensor


def _plan_slots(arena: torch.Tensor, counts: torch.Tensor, layout_args: Sequence[int]) -> _Slots:
    return _Slots(plan_layout(*layout_args).section(arena, "token_slots")[: int(counts[0])])


def _num_active(counts: torch.Tensor) -> int:
    """Adapters that the step uses. counts[1] would be a tensor, which takes as long to make as a launch."""
    return counts.tolist()[1]


def _memory_key(tensor: torch.Tensor) -> tuple:
    """What a kernel is compiled for of a pointer: dtype, and whether the address is aligned."""
    return tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0


def _layer_key(name: str, *tensors: torch.Tensor) -> tuple:
    """What a kernel is compiled for: device, and of each tensor its pointer, columns and strides."""
    return (name, tensors[0].device, *((*_memory_key(t), t.shape[1:], t.stride()) for t in tensors))


def _slice_groups(slices: int) -> Iterator[slice]:
    """Slices of a layer, as many at a time as the kernels take."""
    for first in range(0, slices, MAX_SLICES):
        yield slice(first, min(first + MAX_SLICES, slices))


def _check_plan_rows(op: str, plan: LoraPlan, x: torch.Tensor) -> None:
    if torch.compiler.is_compiling():  # the plan's numbers are data there
        return
    if x.ndim == 2 and plan.num_tokens > x.shape[0]:
        raise ValueError(
            f"{op}: the plan is for {plan.num_tokens} tokens, but there are {x.shape[0]} rows: update the plan"
        )


PLAN_SCHEMA = "Tensor arena, Tensor counts, int[] layout"


def _check_shrink(op: str, x, lora_a, out, arena, layout) -> list[torch.Tensor]:
    """A as [L, R, K], fitting x, out and the plan."""
    weights = checks.flat_weights(op, "lora_a", lora_a)
    rank = checks.shrink_rank(op, weights[0])
    checks.input_rows(op, x, weights[0])
    checks.planes(op, "out", out, len(weights), x.shape[0], rank, weights[0].device)
    checks.shrink_output(op, out)
    checks.same_shapes(op, "lora_a", weights)
    checks.plan_fits(op, weights[0], layout, arena)
    return weights


@replayed
def _shrink_kernels(op, x, lora_a, out, arena, layout, step, scale) -> None:
    """Check and compile the shrink and run it, over a plan of this step."""
    weights = _check_shrink(op, x, lora_a, out, arena, layout)
    if x.shape[0] == 0:
        return
    for group in _slice_groups(len(weights)):
        kernels = functools.partial(run_shrink, x, weights[group], out[group], scale)
        layer = _layer_key(op, x, *weights[group]), _memory_key(out[group])
        compile_plan(kernels, layer, arena, layout, row_buckets())
        kernels(plan_tiles(arena, layout, x.shape[0], step))


@_register(f"lora_shrink(Tensor x, Tensor[] lora_a, Tensor(a!) out, {PLAN_SCHEMA}, float scale)")
def _lora_shrink(x, lora_a, out, arena, counts, layout, scale):
    layer = ("lora_shrink", x, lora_a, out, arena, layout)
    if uses_kernels(x):
        _shrink_kernels(*layer, step_of(counts, x), scale)
        return
    weights = _check_shrink(*layer)
    if x.shape[0] > 0:
        reference.lora_shrink(x, weights, out, _plan_slots(arena, counts, layout), scale)


def _check_expand(op: str, h, lora_b, y, arena, layout, offset: int) -> list[torch.Tensor]:
    """B as [L, N_s, R], fitting h, y and the plan."""
    weights = checks.flat_weights(op, "lora_b", lora_b)
    rank = checks.expand_rank(op, weights[0])
    checks.output(op, "y", y, weights[0].device)
    checks.planes(op, "h", h, len(weights), y.shape[0], rank, weights[0].device)
    checks.window(op, y, offset, sum(b.shape[1] for b in weights))
    checks.plan_fits(op, weights[0], layout, arena)
    return weights


@replayed
def _expand_kernels(op, h, lora_b, y, arena, layout, step, idle, offset, add_inputs) -> None:
    """Check and compile the expand and run it, over a plan of this step; idle: none of them has an adapter."""
    weights = _check_expand(op, h, lora_b, y, arena, layout, offset)
    if y.shape[0] == 0:
        return
    for group in _slice_groups(len(weights)):
        slices = h[group].contiguous()
        kernels = functools.partial(run_expand, slices, weights[group], y, offset, add_inputs)
        layer = _layer_key(op, y, *weights[group]), _memory_key(slices), offset, add_inputs
        compile_plan(kernels, layer, arena, layout, row_buckets())
        if not (add_inputs and idle):
            kernels(plan_tiles(arena, layout, y.shape[0], step))
        offset += sum(b.shape[1] for b in weights[group])


@_register(f"lora_expand(Tensor h, Tensor[] lora_b, Tensor(a!) y, {PLAN_SCHEMA}, int offset, bool add_inputs)")
def _lora_expand(h, lora_b, y, arena, counts, layout, offset, add_inputs):
    layer = ("lora_expand", h, lora_b, y, arena, layout)
    idle = _num_active(counts) == 0
    if lora_b and uses_kernels(lora_b[0]):
        _expand_kernels(*layer, step_of(counts, y), idle, offset, add_inputs)
        return
    weights = _check_expand(*layer, offset)
    if y.shape[0] > 0 and not (add_inputs and idle):
        reference.lora_expand(h, weights, y, _plan_slots(arena, counts, layout), offset, add_inputs)


def _check_linear(op: str, out, x, lora_a, lora_b, arena, layout, offset: int, small: bool) -> tuple[list, list]:
    """Weights as [L, R, K] and [L, N_s, R] of a layer that fits x, the plan, and out: y, or if small lora_delta's."""
    if len(lora_a) != len(lora_b):
        raise ValueError(f"{op}: lora_a has {len(lora_a)} slices, lora_b has {len(lora_b)}")
    a, b = checks.flat_weights(op, "lora_a", lora_a), checks.flat_weights(op, "lora_b", lora_b)
    rank = checks.expand_rank(op, b[0])
    if a[0].shape[1] != rank or b[0].shape[0] != a[0].shape[0] or b[0].dtype != a[0].dtype:
        raise ValueError(
            f"{op}: lora_a is {a[0].dtype} {tuple(a[0].shape)} and lora_b {b[0].dtype} {tuple(b[0].shape)}: "
            "slots, rank and dtype must agree"
        )
    checks.same_shapes(op, "lora_a", a)
    checks.input_rows(op, x, a[0])
    checks.plan_fits(op, a[0], layout, arena)
    width = sum(weight.shape[1] for weight in b)
    if small:
        checks.output(op, "delta", out, b[0].device, width)
        if out.shape[0] != SMALL_BATCH:
            raise ValueError(f"{op}: delta has {out.shape[0]} rows, expected {SMALL_BATCH}")
    else:
        checks.output(op, "y", out, b[0].device)
        checks.same_rows(op, x=x.shape[0], y=out.shape[0])
        checks.window(op, out, offset, width)
        if len(a) > MAX_SLICES:  # the first launches write y, and later ones read x
            checks.apart(op, x=x, y=out)
    return a, b


@replayed
def _linear_kernels(op, out, x, lora_a, lora_b, arena, layout, step, runs, scale, offset, add_inputs, small) -> None:
    """Check and compile the layer and if `runs` run it, over a plan of this step.

    small: out is `lora_delta`'s, x has no more rows, and nothing of the stream comes before the launches.
    """
    a, b = _check_linear(op, out, x, lora_a, lora_b, arena, layout, offset, small)
    options, batches = {}, row_buckets()
    if small:
        out = out[: x.shape[0]]
        options = {"zero_others": False, "first": True}
    if op != "lora_linear":
        batches = [rows for rows in batches if (rows <= SMALL_BATCH) == small]
    for group in _slice_groups(len(a)):
        kernels = functools.partial(run_linear, out, x, a[group], b[group], scale, offset, add_inputs, **options)
        layer = _layer_key(op, x, out, *a[group], *b[group]), offset, add_inputs
        compile_plan(kernels, layer, arena, layout, batches)
        if runs:
            kernels(plan_tiles(arena, layout, x.shape[0], step))
        offset += sum(weight.shape[1] for weight in b[group])


def _add_linear(op, y, x, lora_a, lora_b, arena, counts, layout, scale, offset, add_inputs) -> None:
    """The whole layer on the current stream."""
    layer = (op, y, x, lora_a, lora_b, arena, layout)
    if uses_kernels(x):
        runs = y.numel() > 0 and not (add_inputs and _num_active(counts) == 0)
        step = step_of(counts, x) if runs else ANY_STEP
        _linear_kernels(*layer, step, runs, scale, offset, add_inputs, False)
        return
    a, b = _check_linear(*layer, offset, False)
    if x.shape[0] > 0:
        reference.lora_linear(y, x, a, b, _plan_slots(arena, counts, layout), scale, offset, add_inputs)


@_register(
    f"lora_linear(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, {PLAN_SCHEMA}, "
    "float scale, int offset, bool add_inputs)"
)
def _lora_linear(*args):
    _add_linear("lora_linear", *args)


def _fits_beside(x: torch.Tensor, counts: torch.Tensor) -> bool:
    """Whether a batch's LoRA part runs beside the layer itself: the batch is small, and an adapter is in use."""
    return 0 < x.shape[0] <= SMALL_BATCH and _num_active(counts) > 0


@_register(f"lora_delta(Tensor(a!) delta, Tensor x, Tensor[] lora_a, Tensor[] lora_b, {PLAN_SCHEMA}, float scale)")
def _lora_delta(delta, x, lora_a, lora_b, arena, counts, layout, scale):
    layer = ("lora_delta", delta, x, lora_a, lora_b, arena, layout)
    if not uses_kernels(x):
        a, b = _check_linear(*layer, 0, True)
        if _fits_beside(x, counts):
            slots = _plan_slots(arena, counts, layout)
            reference.lora_linear(delta[: x.shape[0]], x, a, b, slots, scale, 0, False)
        return
    if x.ndim == 2 and _fits_beside(x, counts):
        launch = functools.partial(_linear_kernels, *layer, step_of(counts, x), True, scale, 0, False, True)
        run_beside(launch, x.device)
    else:
        op, delta, x, *weights = layer
        _linear_kernels(op, delta, x[:SMALL_BATCH] if x.ndim else x, *weights, ANY_STEP, False, scale, 0, False, True)


# delta stands before y: torch.compile moves producers next to their reader in this order, and lora_delta must fork off
# before the GEMM that makes y starts
@_register(
    "lora_join(Tensor(a!) delta, Tensor(b!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
    f"{PLAN_SCHEMA}, float scale, bool in_place)"
)
def _lora_join(delta, y, x, lora_a, lora_b, arena, counts, layout, scale, in_place):
    op = "lora_join"
    checks.output(op, "y", y, delta.device, delta.shape[1])
    checks.same_rows(op, x=x.shape[0], y=y.shape[0])
    if not in_place and y.shape[0] > layout[0]:  # the reader of delta masks it by the plan's rows
        raise ValueError(
            f"{op}: y has {y.shape[0]} rows, but the plan holds {layout[0]} tokens: build the LoraPlan with a larger "
            "max_tokens, or give in_place"
        )
    beside = _fits_beside(x, counts)
    if beside:
        join_side(x.device)
    else:
        _add_linear(op, y, x, lora_a, lora_b, arena, counts, layout, scale, 0, True)
    if in_place and uses_kernels(x):
        _add_kernels(op, y, delta, arena, layout, step_of(counts, y) if beside else ANY_STEP, beside)
    elif in_place and beside:
        reference.lora_add(y, delta, _plan_slots(arena, counts, layout))


@replayed
def _add_kernels(op, y, delta, arena, layout, step, runs) -> None:
    """Compile the sum of `lora_join` and if `runs` run it, over a plan of this step."""
    add = functools.partial(run_add, y, delta)
    compile_plan(add, _layer_key(op, y, delta), arena, layout, [SMALL_BATCH])
    if runs:
        add(plan_tiles(arena, layout, y.shape[0], step))


def linear_beside(
    base: Callable[[], torch.Tensor],
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    plan: LoraPlan,
    scale: float = 1.0,
    in_place: bool = False,
) -> torch.Tensor:
    """base() + scale * B A x, where a small batch's LoRA part runs on a side stream, under the base layer's GEMM.

    For use under torch.compile, which puts the sum into the kernel that reads it: a decode batch then has no LoRA
    kernel on its critical path. Its LoRA part is rounded once more than `lora_linear` rounds it. Batches of more than
    SMALL_BATCH rows have the GPU filled by the GEMM: their LoRA part follows it, in place, as `lora_linear`.

    Args:
        base: makes the base layer's output y [M, sum of N_s].
        x: [M, K], M at most the plan's max_tokens but with in_place; other arguments as `lora_linear`.
        in_place: add a small batch's LoRA part to y by a kernel of its own, which batches without adapter do not run.
            For a y that is read in parts, as q, k and v are: torch.compile would write all of the sum once more.

    Raises:
        ValueError, TypeError: as `lora_linear`.
    """
    _check_plan_rows("linear_beside", plan, x)
    arguments = (x, list(lora_a), list(lora_b), *plan_args(plan), float(scale))
    delta = x.new_empty(SMALL_BATCH, sum(b.shape[-2] for b in lora_b))
    torch.ops.lora_ops.lora_delta(delta, *arguments)
    y = base()
    torch.ops.lora_ops.lora_join(delta, y, *arguments, in_place)
    if in_place:
        return y
    rows = torch.arange(y.shape[0], device=y.device)
    small = torch.full((), y.shape[0], dtype=torch.int32, device=y.device) <= SMALL_BATCH
    written = (plan.section("token_slots")[: y.shape[0]] >= 0) & small
    return y + torch.ops.aten._unsafe_masked_index(delta, written[:, None], [rows], 0)


def _check_shrink_rows(op: str, x, weight, out) -> None:
    checks.shrink_rank(op, weight)
    checks.input_rows(op, x, weight)
    checks.matrix(op, "out", out, weight.device, weight.shape[1])
    checks.shrink_output(op, out)
    checks.same_rows(op, x=x.shape[0], out=out.shape[0])


def _check_expand_rows(op: str, x, weight, out, offset: int, width: int) -> None:
    checks.expand_rank(op, weight)
    checks.matrix(op, "x", x, weight.device, weight.shape[2])
    checks.output(op, "out", out, weight.device)
    checks.same_rows(op, x=x.shape[0], out=out.shape[0])
    checks.window(op, out, offset, width)
    if width != weight.shape[1]:
        raise ValueError(f"{op}: slice_size is {width}, but lora_b has {weight.shape[1]} output features")


def _check_segments(
    op: str, seq_starts, seq_lengths, slots, batches: int, max_seq_length: int, rows: int, device: torch.device
) -> None:
    if batches < 0:
        raise ValueError(f"{op}: batches is {batches}, expected the number of segments")
    for name, tensor in (("seq_starts", seq_starts), ("seq_lengths", seq_lengths), ("slot_indices", slots)):
        checks.integers(op, name, tensor, device)
        if tensor.shape[0] < batches:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected at least {batches} segments")
    checks.segments(op, seq_starts[:batches], seq_lengths[:batches], max_seq_length, rows)


@_register("bgmv_shrink(Tensor x, Tensor lora_a, Tensor(a!) out, Tensor slot_indices, float scale)")
def _bgmv_shrink(x, lora_a, out, slot_indices, scale):
    op = "bgmv_shrink"
    weight = checks.flat_weights(op, "lora_a", [lora_a])[0]
    _check_shrink_rows(op, x, weight, out)
    checks.indices(op, slot_indices, weight.shape[0], weight.device)
    checks.same_rows(op, x=x.shape[0], slot_indices=slot_indices.shape[0])
    if x.shape[0] == 0:
        return
    if uses_kernels(weight):
        run_shrink(x, [weight], out.unsqueeze(0), scale, row_tiles(slot_indices))
    else:
        reference.bgmv_shrink(x, weight, out, slot_indices, scale)


@_register(
    "bgmv_expand_slice(Tensor x, Tensor lora_b, Tensor(a!) out, Tensor slot_indices, "
    "int slice_offset, int slice_size, bool add_inputs)"
)
def _bgmv_expand_slice(x, lora_b, out, slot_indices, slice_offset, slice_size, add_inputs):
    op = "bgmv_expand_slice"
    weight = checks.flat_weights(op, "lora_b", [lora_b])[0]
    _check_expand_rows(op, x, weight, out, slice_offset, slice_size)
    checks.indices(op, slot_indices, weight.shape[0], weight.device)
    checks.same_rows(op, x=x.shape[0], slot_indices=slot_indices.shape[0])
    if x.shape[0] == 0:
        return
    if uses_kernels(weight):
        h = x.contiguous().unsqueeze(0)
        run_expand(h, [weight], out, slice_offset, add_inputs, row_tiles(slot_indices))
    else:
        reference.bgmv_expand_slice(x, weight, out, slot_indices, slice_offset, slice_size, add_inputs)


SEGMENT_SCHEMA = (
    "Tensor seq_starts, Tensor seq_lengths, Tensor slot_indices, int batches, int max_seq_length, int token_nums"
)


@_register(f"sgmv_shrink(Tensor x, Tensor lora_a, Tensor(a!) out, {SEGMENT_SCHEMA}, float scale)")
def _sgmv_shrink(x, lora_a, out, seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums, scale):
    op = "sgmv_shrink"
    weight = checks.flat_weights(op, "lora_a", [lora_a])[0]
    _check_shrink_rows(op, x, weight, out)
    _check_segments(op, seq_starts, seq_lengths, slot_indices, batches, max_seq_length, x.shape[0], x.device)
    checks.indices(op, slot_indices[:batches], weight.shape[0], weight.device)
    segments = (seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums)
    if x.shape[0] == 0 or batches == 0 or max_seq_length == 0:
        return
    if uses_kernels(weight):
        run_shrink(x, [weight], out.unsqueeze(0), scale, segment_tiles(*segments))
    else:
        reference.sgmv_shrink(x, weight, out, *segments, scale)


@_register(
    f"sgmv_expand_slice(Tensor x, Tensor lora_b, Tensor(a!) out, {SEGMENT_SCHEMA}, "
    "int slice_offset, int slice_size, bool add_inputs)"
)
def _sgmv_expand_slice(
    x,
    lora_b,
    out,
    seq_starts,
    seq_lengths,
    slot_indices,
    batches,
    max_seq_length,
    token_nums,
    slice_offset,
    slice_size,
    add_inputs,
):
    op = "sgmv_expand_slice"
    weight = checks.flat_weights(op, "lora_b", [lora_b])[0]
    _check_expand_rows(op, x, weight, out, slice_offset, slice_size)
    _check_segments(op, seq_starts, seq_lengths, slot_indices, batches, max_seq_length, x.shape[0], x.device)
    checks.indices(op, slot_indices[:batches], weight.shape[0], weight.device)
    segments = (seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums)
    if x.shape[0] == 0 or batches == 0 or max_seq_length == 0:
        return
    if uses_kernels(weight):
        h = x.contiguous().unsqueeze(0)
        run_expand(h, [weight], out, slice_offset, add_inputs, segment_tiles(*segments))
    else:
        reference.sgmv_expand_slice(x, weight, out, *segments, slice_offset, slice_size, add_inputs)


def lora_shrink(
    x: torch.Tensor, lora_a: Sequence[torch.Tensor], out: torch.Tensor, plan: LoraPlan, scale: float = 1.0
) -> None:
    """out[s, m] = scale * A_s[slot[m]] @ x[m], for all slices of a layer.

    Args:
        x: [M, K], the dtype of lora_a; rows may be strided. M may exceed the plan's tokens (padding): those rows of
            `out` stay as they are.
        lora_a: S tensors [L, R, K] of equal shape.
        out: fp32 [S, M, R], contiguous. Rows without adapter become zero.
        plan: slots of the tokens.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do.
    """
    _check_plan_rows("lora_shrink", plan, x)
    torch.ops.lora_ops.lora_shrink(x, list(lora_a), out, *plan_args(plan), float(scale))


def lora_expand(
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    y: torch.Tensor,
    plan: LoraPlan,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """y[m, columns of slice s] (+)= B_s[slot[m]] @ h[s, m]; slices stand side by side from column `offset`.

    Args:
        h: [S, M, R], any floating dtype; rounded to the dtype of lora_b before the product.
        lora_b: S tensors [L, N_s, R]; the widths may differ.
        y: [M, at least offset + sum of N_s]; rows may be strided, but may not overlap. Rows without adapter stay as
            they are with add_inputs, and become zero without.
        plan: slots of the tokens.
        add_inputs: add to y (rounded once, after the sum in fp32) or overwrite it.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do.
    """
    _check_plan_rows("lora_expand", plan, y)
    torch.ops.lora_ops.lora_expand(h, list(lora_b), y, *plan_args(plan), offset, add_inputs)


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    plan: LoraPlan,
    scale: float = 1.0,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """y[m, columns of slice s] (+)= scale * B_s[slot[m]] @ (A_s[slot[m]] @ x[m]): one call a layer, all slices.

    Shapes and rules are those of `lora_shrink` and `lora_expand`; the inner product [S, M, R] is kept in fp32 and
    rounded to the dtype of lora_b once.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what to do.
    """
    _check_plan_rows("lora_linear", plan, x)
    torch.ops.lora_ops.lora_linear(y, x, list(lora_a), list(lora_b), *plan_args(plan), float(scale), offset, add_inputs)


def bgmv_shrink(
    x: torch.Tensor, lora_a: torch.Tensor, out: torch.Tensor, slot_indices: torch.Tensor, scale: float = 1.0
) -> None:
    """out[m] = scale * A[slot_indices[m]] @ x[m]: one slot a row (decode).

    Args:
        x: [M, K], the dtype of lora_a; rows may be strided.
        lora_a: [L, R, K].
        out: fp32 [M, R], contiguous; zero for index -1.
        slot_indices: int [M] on the device of the weights, -1 = no adapter.

    Raises:
        ValueError, TypeError: an argument does not fit. Indices are checked too, which waits for the GPU; inside a
            CUDA graph capture they are not.
    """
    torch.ops.lora_ops.bgmv_shrink(x, lora_a, out, slot_indices, float(scale))


def bgmv_expand(
    x: torch.Tensor, lora_b: torch.Tensor, out: torch.Tensor, slot_indices: torch.Tensor, add_inputs: bool = True
) -> None:
    """out[m, :N] (+)= B[slot_indices[m]] @ x[m], with x [M, R] and B [L, N, R]; see `bgmv_expand_slice`."""
    bgmv_expand_slice(x, lora_b, out, slot_indices, 0, lora_b.shape[-2], add_inputs)


def bgmv_expand_slice(
    x: torch.Tensor,
    lora_b: torch.Tensor,
    out: torch.Tensor,
    slot_indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """out[m, slice_offset : slice_offset + slice_size] (+)= B[slot_indices[m]] @ x[m].

    Args:
        x: [M, R], any floating dtype.
        lora_b: [L, slice_size, R].
        out: [M, at least slice_offset + slice_size]; rows may be strided, but may not overlap. Index -1: untouched with
            add_inputs, zero without.
        slot_indices: int [M] on the device of the weights, -1 = no adapter.

    Raises:
        ValueError, TypeError: as `bgmv_shrink`.
    """
    torch.ops.lora_ops.bgmv_expand_slice(x, lora_b, out, slot_indices, slice_offset, slice_size, add_inputs)


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
    """bgmv_shrink with one slot a segment of rows (prefill).

    Args:
        x, lora_a, out: as `bgmv_shrink`; rows that no segment covers stay as they are.
        seq_starts, seq_lengths, slot_indices: int [at least batches], first row, rows and slot of each segment; no two
            segments may overlap.
        batches: segments; max_seq_length: rows of the longest; token_nums: rows of all.

    Raises:
        ValueError, TypeError: as `bgmv_shrink`; also segments that leave the batch, exceed max_seq_length or overlap.
    """
    torch.ops.lora_ops.sgmv_shrink(
        x, lora_a, out, seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums, float(scale)
    )


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
    """bgmv_expand with one slot a segment of rows; arguments as `sgmv_shrink` and `bgmv_expand_slice`."""
    segments = (seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums)
    sgmv_expand_slice(x, lora_b, out, *segments, 0, lora_b.shape[-2], add_inputs)


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
    """bgmv_expand_slice with one slot a segment of rows; arguments as `sgmv_shrink` and `bgmv_expand_slice`."""
    segments = (seq_starts, seq_lengths, slot_indices, batches, max_seq_length, token_nums)
    torch.ops.lora_ops.sgmv_expand_slice(x, lora_b, out, *segments, slice_offset, slice_size, add_inputs)


def warmup(
    layers: Iterable[tuple[int, Sequence[int], int]],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    add_inputs: bool = True,
) -> None:
    """Compile what `lora_linear` needs for these layers, for batches of every size.

    A patched vLLM needs no call: it meets each of its layers while it profiles, and the first call of a layer compiles
    all of that layer's kernels.

    Args:
        layers: (K, widths of the slices, R) of each layer, contiguous weights assumed.
        dtype: of x, y and the weights.
        device: where the kernels will run; on a CPU there is nothing to compile.
        add_inputs: as the later calls have it.

    Raises:
        ValueError, TypeError: a layer that `lora_linear` does not take.
    """
    plan = LoraPlan(1, 1, device)
    plan.update([0])
    for k, widths, rank in layers:
        x = torch.zeros(1, k, dtype=dtype, device=device)
        y = torch.zeros(1, sum(widths), dtype=dtype, device=device)
        lora_a = [torch.zeros(1, rank, k, dtype=dtype, device=device) for _ in widths]
        lora_b = [torch.zeros(1, n, rank, dtype=dtype, device=device) for n in widths]
        lora_linear(y, x, lora_a, lora_b, plan, add_inputs=add_inputs)
