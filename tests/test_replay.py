"""Launches made again: what a batch would launch by itself, and only for a batch of the same form."""

import gc
import weakref
from collections import deque

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

import lora_ops.ops
import moe_ops.ops
from lora_ops.kernels.add import add
from lora_ops.launches import Step, capturing_one_step, step_of
from lora_ops.plan import LoraPlan, plan_args
from ops_configs import store
from ops_patches import recording, replay
from ops_patches.launch import Prepared
from ops_patches.library import INTERPRET
from ops_patches.memory import extent, overlap
from ops_patches.recording import ALLOCATIONS
from ops_patches.replay import add_form, recording_to, replayed

from . import test_launch
from .test_kernels_compile import FP8_BLOCKS, HALF, SLOTS, empty, lora_layer, moe_layer, plan_tiles
from .test_launch import launches  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

SMALL = (64, 4, 512, 256)


@pytest.fixture
def raw(launches, monkeypatch):  # noqa: F811
    """What is launched, arguments as they are; CPU tensors run the kernels, whose ids nobody reads."""
    monkeypatch.setattr(test_launch, "described", lambda argument: argument)
    monkeypatch.setattr(moe_ops.checks, "_ids", lambda *args: None)
    for ops in (lora_ops.ops, moe_ops.ops):
        monkeypatch.setattr(ops, "uses_kernels", lambda tensor: True)
    return launches


def flat(arguments: object) -> list:
    """All tensors among arguments."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    return [t for argument in arguments for t in flat(argument)] if isinstance(arguments, (list, tuple)) else []


class Allocated(TorchDispatchMode):
    """Tells `saw` of each tensor that is allocated inside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS:
            self.saw(result)
        return result


class Kept(Allocated):
    """Keeps what is allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def saw(self, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)


class Alive(Allocated):
    """What is allocated inside and not let go yet. most: bytes of it, at any time at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._allocated: list[tuple[weakref.ref, int, int]] = []

    def saw(self, tensor: torch.Tensor) -> None:
        self._allocated.append((weakref.ref(tensor), tensor.data_ptr(), extent(tensor)))
        self.most = max(self.most, sum(size for tensor, _, size in self._allocated if tensor() is not None))

    def holds(self, address: int) -> bool:
        return any(tensor() is not None and 0 <= address - start < size for tensor, start, size in self._allocated)


class Batch:
    """What a call launches, and where its addresses lie."""

    def __init__(self, raw, function, arguments: tuple) -> None:
        raw.seen = []
        with Kept() as kept:
            function(*arguments)
        self.seen = raw.seen
        self.tensors = [*flat(arguments), *kept.tensors]
        self.given = len(flat(arguments))
        self.pieces: dict[int, int] = {}

    def place(self, address: int) -> tuple:
        """Which tensor of the call, or which piece of those that launches took so far, how far in, and its bytes."""
        for i, t in enumerate(self.tensors):
            if 0 <= address - t.data_ptr() < extent(t):
                piece = i if i < self.given else self.given + self.pieces.setdefault(i, len(self.pieces))
                return piece, address - t.data_ptr(), extent(t)
        raise AssertionError(f"{address} is nobody's")


def check_same(made: Batch, plain: Batch) -> None:
    """Both launch the same; of `made`, tensors are addresses."""

    def compare(ours: object, theirs: object) -> None:
        if isinstance(theirs, torch.Tensor):
            assert type(ours) is int
            assert made.place(ours) == plain.place(theirs.data_ptr())
        elif isinstance(theirs, TensorDescriptor):
            assert type(ours) is TensorDescriptor
            assert made.place(ours.base.data_ptr()) == plain.place(theirs.base.data_ptr())
            for name in ("shape", "strides", "block_shape", "padding"):
                assert list(getattr(ours, name)) == list(getattr(theirs, name))
        elif isinstance(theirs, tuple):
            assert type(ours) is tuple
            for pair in zip(ours, theirs, strict=True):
                compare(*pair)
        else:
            assert type(ours) is type(theirs)
            assert ours == theirs

    assert [launch[:3] for launch in made.seen] == [launch[:3] for launch in plain.seen]
    for (*_, ours), (*_, theirs) in zip(made.seen, plain.seen, strict=True):
        compare(tuple(ours), tuple(theirs))


def moe(tokens: int, sizes: tuple = SMALL, in_place: bool = False, room: bool = False, **options) -> tuple:
    """Arguments of moe_ops.ops._layer, in memory of their own; room: intermediates, too."""
    (_, w13, w2, _, _), options = moe_layer(*sizes, **options)
    hidden, ids = empty(tokens, sizes[2]), torch.zeros(tokens, sizes[1], dtype=torch.int32)
    out = hidden if in_place else torch.empty_like(hidden)
    if room:
        options |= {"h": empty(tokens * sizes[1] * sizes[3]), "y": empty(tokens * sizes[1] * sizes[2])}
    return out, hidden, w13, w2, torch.zeros(tokens, sizes[1]), ids, *options.values()


def lora(op: str, rows: int, layer: str = "qkv", rank: int = 16) -> tuple:
    """Arguments of lora_ops.ops._linear_kernels, in memory of their own."""
    y, x, a, b, _ = lora_layer(layer, rank, rows)
    plan = LoraPlan(rows, SLOTS, "cpu")
    arena, _, layout = plan_args(plan)
    out = empty(lora_ops.ops.SMALL_BATCH, y.shape[1]) if op == "lora_delta" else y
    return op, out, x, a, b, arena, layout, Step(rows), True, 0.5, 0, op != "lora_delta", op == "lora_delta"


def halves(rows: int) -> tuple:
    """Arguments of lora_ops.ops._shrink_kernels and those of _expand_kernels, in memory of their own."""
    y, x, a, b, h = lora_layer("qkv", 16, rows)
    arena, _, layout = plan_args(LoraPlan(rows, SLOTS, "cpu"))
    plan = arena, layout, Step(rows)
    return ("lora_shrink", x, a, h, *plan, 0.5), ("lora_expand", h, b, y, *plan, False, 0, True)


def add_of(rows: int) -> tuple:
    """Arguments of lora_ops.ops._add_kernels, in memory of their own."""
    arena, _, layout = plan_args(LoraPlan(rows, SLOTS, "cpu"))
    return "lora_join", empty(rows, 256), empty(lora_ops.ops.SMALL_BATCH, 256), arena, layout, Step(rows), True


LORA, MOE = (lora_ops.ops._linear_kernels, lora), (moe_ops.ops._replayed_layer, moe)
BATCHES = {
    "moe, a few tokens": lambda: (MOE, (2,), {}),
    "moe, a few choices": lambda: (MOE, (12,), {}),
    "moe": lambda: (MOE, (2000,), {}),
    "moe, a plan of three launches": lambda: (MOE, (3000,), {}),
    "moe, in place": lambda: (MOE, (300,), {"in_place": True}),
    "moe, intermediates given": lambda: (MOE, (300,), {"room": True}),
    "moe, fp8 blocks, intermediates given": lambda: (MOE, (300,), FP8_BLOCKS | {"room": True}),
    "moe, biases": lambda: (MOE, (300,), {"activation": "swiglu_oai", "interleaved": True, "bias": True}),
    "moe, fp8 blocks": lambda: (MOE, (300,), FP8_BLOCKS),
    "moe, fp8": lambda: (MOE, (300,), {"quant": "fp8_w8a8"}),
    "moe, int8 tokens": lambda: (MOE, (300,), {"quant": "int8_w8a8", "channels": True, "per_token": True}),
    "moe, expert map": lambda: (MOE, (2000,), {"expert_map": HALF.clone()}),
    "moe, weights on input": lambda: (MOE, (300,), {"apply_router_weight_on_input": True}),
    "moe, wide experts": lambda: (MOE, (4000, (8, 2, 512, 2048)), {}),
    "lora": lambda: (LORA, ("lora_linear", 300), {}),
    "lora, many rows": lambda: (LORA, ("lora_join", 2000), {}),
    "lora, beside": lambda: (LORA, ("lora_delta", 40), {}),
    "lora, planes": lambda: (LORA, ("lora_linear", 64, "long", 64), {}),
    "lora, shrink": lambda: ((lora_ops.ops._shrink_kernels, lambda rows: halves(rows)[0]), (300,), {}),
    "lora, expand": lambda: ((lora_ops.ops._expand_kernels, lambda rows: halves(rows)[1]), (300,), {}),
    "lora, add": lambda: ((lora_ops.ops._add_kernels, add_of), (300,), {}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_launches(raw, name):
    """Of the second and third batch of a form, whose tensors lie elsewhere."""
    (function, make), sizes, options = BATCHES[name]()
    function(*make(*sizes, **options))
    for _ in range(2):
        again = make(*sizes, **options)
        compiled = raw.through_triton
        made = Batch(raw, function, again)
        check_same(made, Batch(raw, function.__wrapped__, again))
        assert raw.through_triton == compiled
        assert len(made.seen) > 0


def test_another_form_is_another_recording():
    """Whatever a kernel may be launched otherwise for."""
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    x, y = memory[:1024].view(32, 32), memory[1024:2048].view(32, 32)
    batches = [
        (x, y, 3),
        (x, y, 4),
        (x, y, None),
        (x, y, 3.5),
        (x, x, 3),
        (x, memory[1025:2049].view(32, 32), 3),
        (memory[8:1032].view(32, 32), memory[2056:3080].view(32, 32).t(), 3),
        (x[:31], y, 3),
        (x[:, :16], y, 3),
        (x.view(torch.float16), y, 3),
        (x, None, 3),
        ([x], y, 3),
        ([x, y], 3),
        ([x], [y], 3),
        (x, y, "3"),
        (x, y, (3,)),
        (x, y, [3, 3]),
        (x.to("meta"), y, 3),
        (x, y, 1),
        (x, y, 1.0),
        (x, y, True),
        (x, y, 1, [1]),
        (x, y, [1], 1),
    ]
    forms = []
    for batch in batches:
        form = []
        add_form(batch, form, [], [])
        forms.append(tuple(form))
    assert len(set(forms)) == len(batches)
    form = []
    add_form((memory[2048:3072].view(32, 32), memory[3072:].view(32, 32), 3), form, [], [])
    assert tuple(form) == forms[0]


def test_extent():
    memory = torch.empty(4, 8, dtype=torch.int16)
    for tensor, size in ((memory, 64), (memory[:, :3], 54), (memory[1:2, ::2], 14), (memory[:0], 0), (memory.T, 64)):
        assert extent(tensor) == size


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (slice(0, 2), slice(1, 3), True),
        (slice(0, 2), slice(2, 4), False),
        (slice(0, 4), slice(2, 2), False),  # empty
    ],
)
def test_overlap(a, b, expected):
    memory = torch.empty(4, 8)
    assert overlap(memory[a], memory[b]) == overlap(memory[b], memory[a]) == expected


def test_rows_between_those_of_another_overlap():
    memory = torch.empty(4, 8)
    assert overlap(memory[:, :3], memory[:, 5:])


class Counted:
    """`add` of the rows of a plan, counted where it is not a replay; pointers of its tiles are given for the form."""

    def __init__(self, before=lambda *tensors: None) -> None:
        self.calls = 0
        self.before = before
        self.tiles = plan_tiles(64)

    def __call__(self, y, delta, pointers) -> None:
        self.calls += 1
        self.before(y, delta)
        add(y, delta, self.tiles)


@pytest.fixture
def counted(raw):
    """Replayed calls of a Counted: (object, replayed function, its arguments)."""

    def make(**options):
        once = Counted(**options)
        return once, replayed_call(once), once.tiles.pointers

    def replayed_call(once):
        def function(y, delta, pointers):
            once(y, delta, pointers)

        return replayed(function)

    return make


def test_one_call_a_form(counted, raw):
    once, run, pointers = counted()
    for _ in range(3):
        run(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == 1
    run(empty(64, 64), empty(64, 64), pointers)
    assert once.calls == 2
    assert len(raw.seen) == 4


@pytest.mark.parametrize(
    "before",
    [lambda y, delta: y.zero_(), lambda y, delta: torch.zeros(3), lambda y, delta: y.clone()],
    ids=["fill", "zeros", "copy"],
)
def test_what_torch_runs_is_run_each_time(counted, raw, before):
    once, run, pointers = counted(before=before)
    for _ in range(3):
        run(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == len(raw.seen) == 3


def test_views_are_no_work(counted):
    once, run, pointers = counted(before=lambda y, delta: (y.view(-1)[3:].unsqueeze(0), y.contiguous(), y.reshape(-1)))
    for _ in range(3):
        run(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == 1


def test_memory_that_a_launch_finds_elsewhere(counted, raw):
    """Its address may be another's next time: the call runs each time."""
    once, run, _ = counted()
    for _ in range(3):
        run(empty(64, 32), empty(64, 32), ())  # the tiles are not among the arguments
    assert once.calls == len(raw.seen) == 3


def test_tensors_that_overlap(counted, raw):
    """A replay could not tell whose an address is; one and the same tensor twice is no matter."""
    once, run, pointers = counted()
    memory = empty(96, 32)
    for _ in range(2):
        run(memory[:64], memory[32:], pointers)
    assert once.calls == 2
    for y in (memory[:64], empty(64, 32)):
        raw.seen = []
        run(y, y, pointers)
        (_, _, _, arguments), *_ = raw.seen
        addresses = [a if isinstance(a, int) else a.data_ptr() for a in arguments[:2]]
        assert addresses == [y.data_ptr()] * 2
    assert once.calls == 3


def test_a_call_that_fails_leaves_nothing(counted, raw):
    def fail(y, delta):
        if once.calls == 1:
            raise RuntimeError("broken")

    once, run, pointers = counted(before=fail)
    with pytest.raises(RuntimeError, match="broken"):
        run(empty(64, 32), empty(64, 32), pointers)
    for _ in range(2):
        run(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == 2


def test_the_oldest_form_goes(counted, monkeypatch):
    monkeypatch.setattr(replay, "KEPT", 2)
    once, run, pointers = counted()
    for columns, calls in ((32, 1), (48, 2), (32, 2), (64, 3), (48, 3), (64, 3), (32, 4)):
        run(empty(64, columns), empty(64, columns), pointers)
        assert once.calls == calls


def test_other_folders_are_other_launches(counted):
    """Launch parameters may be others then."""
    once, run, pointers = counted()
    for calls in (1, 2):
        store.forget()
        for _ in range(2):
            run(empty(64, 32), empty(64, 32), pointers)
        assert once.calls == calls


def test_what_is_compiled_ahead_is_not_made_again(raw, monkeypatch):
    """The first batch of a layer compiles for all others: by launches without programs, whose memory is let go."""
    function, arguments = lora_ops.ops._linear_kernels, lora("lora_linear", 300, "down")
    allocated, make = [], recording.Replay

    def watched(*args):
        allocated.append(len(args[-1]))
        return make(*args)

    monkeypatch.setattr(recording, "Replay", watched)
    lora_ops.launches._compiled.clear()
    first, again = Batch(raw, function, arguments), Batch(raw, function, arguments)
    assert len(first.seen) > 2
    assert len(again.seen) == 2
    assert all(x > 0 for _, _, (x, _, _), _ in again.seen)
    assert allocated == [1]


@pytest.mark.parametrize("name", BATCHES)
def test_nothing_is_kept_alive(raw, name):
    """Of a batch: its tensors, and what it allocated."""
    (function, make), sizes, options = BATCHES[name]()
    shared = {id(tensor) for tensor in flat(list(options.values()))}
    for _ in range(2):
        batch = Batch(raw, function, make(*sizes, **options))
        alive = [weakref.ref(tensor) for tensor in batch.tensors if id(tensor) not in shared]
        raw.seen = []
        del batch
        gc.collect()
        assert [tensor() for tensor in alive if tensor() is not None] == []


def test_errors_are_those_of_the_call(raw):
    """With nothing of the search for its form before them."""
    arguments = list(lora("lora_linear", 300))
    arguments[2] = arguments[2][:200]
    for _ in range(2):
        with pytest.raises(ValueError, match="row counts differ") as caught:
            lora_ops.ops._linear_kernels(*arguments)
        assert caught.value.__context__ is None


def test_a_replayed_call_in_another(counted, raw):
    """It is a part of the other's launches."""
    once, inner, pointers = counted()

    @replayed
    def outer(y, delta, pointers):
        inner(y, delta, pointers)
        inner(delta, y, pointers)

    for _ in range(3):
        outer(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == 2
    assert len(raw.seen) == 6


def test_memory_side_by_side(counted, raw):
    """Halves of one tensor: the end of the first is the beginning of the second."""
    once, run, pointers = counted()
    for ends in (1, -1):
        halves = empty(128, 32).split(64)[::ends]
        raw.seen = []
        run(*halves, pointers)
        run(*halves, pointers)
        for *_, arguments in raw.seen:
            addresses = [a if isinstance(a, int) else a.data_ptr() for a in arguments[:2]]
            assert addresses == [half.data_ptr() for half in halves]
    assert once.calls == 1


def test_empty_memory(counted, raw):
    once, run, pointers = counted()
    for _ in range(3):
        run(empty(0, 32), empty(0, 32), pointers)
    assert once.calls == 1
    assert [arguments[:2] for *_, arguments in raw.seen[1:]] == [[0, 0], [0, 0]]


def test_one_address_and_two_extents(counted, raw):
    """A launch may take the end of the longer one: whose address that is would not be clear."""
    once, run, pointers = counted()
    memory = empty(64, 32)
    for _ in range(3):
        run(memory, memory[:32], pointers)
    assert once.calls == len(raw.seen) == 3


def test_a_kernel_without_a_binary(counted, raw, monkeypatch):
    """Triton's hooks may skip a compilation: there is nothing to launch again."""
    once, run, pointers = counted()
    monkeypatch.setattr(Prepared, "through_triton", lambda self, grid, *arguments: None)
    for _ in range(2):
        run(empty(64, 32), empty(64, 32), pointers)
    assert once.calls == 2


def test_in_inference_mode(raw):
    (function, make), sizes, options = BATCHES["moe, fp8 blocks"]()
    with torch.inference_mode():
        for _ in range(2):
            raw.seen = []
            function(*make(*sizes, **options))
        assert all(type(a) is not torch.Tensor for *_, arguments in raw.seen for a in arguments), "it ran anew"


def test_an_inner_recording_is_its_own(raw):
    tiles = plan_tiles(64)
    outer, inner = [], []
    with recording_to(outer):
        add(empty(64, 32), empty(64, 32), tiles)
        with recording_to(inner):
            add(empty(64, 48), empty(64, 48), tiles)
        with recording_to(None):
            add(empty(64, 64), empty(64, 64), tiles)
        add(empty(64, 32), empty(64, 32), tiles)
    add(empty(64, 32), empty(64, 32), tiles)
    assert [len(outer), len(inner)] == [2, 1]


@pytest.mark.parametrize("op", ["lora_linear", "lora_delta", "lora_join"])
def test_what_a_linear_compiles_for(raw, monkeypatch, op):
    """lora_delta takes small batches alone, and lora_join the others."""
    batches = []
    monkeypatch.setattr(lora_ops.ops, "compile_plan", lambda *arguments: batches.extend(arguments[-1]))
    lora_ops.ops._linear_kernels(*lora(op, 2000))
    small = [rows for rows in store.BUCKETS if rows <= lora_ops.ops.SMALL_BATCH]
    large = [rows for rows in store.BUCKETS if rows > lora_ops.ops.SMALL_BATCH]
    assert batches == {"lora_linear": small + large, "lora_delta": small, "lora_join": large}[op]


def lora_ops_of(plan: LoraPlan, rows: int, add_inputs: bool) -> dict:
    """Calls of the ops that run over a plan, on fresh tensors."""
    y, x, a, b, h = lora_layer("qkv", 16, rows)
    delta = empty(lora_ops.ops.SMALL_BATCH, y.shape[1])
    ops, plan = torch.ops.lora_ops, plan_args(plan)
    return {
        "lora_linear": lambda: ops.lora_linear(y, x, a, b, *plan, 0.5, 0, add_inputs),
        "lora_expand": lambda: ops.lora_expand(h, b, y, *plan, 0, add_inputs),
        "lora_delta": lambda: ops.lora_delta(delta, x, a, b, *plan, 0.5),
        "lora_join": lambda: ops.lora_join(delta, y, x, a, b, *plan, 0.5, True),
        "lora_shrink": lambda: ops.lora_shrink(x, a, h, *plan, 0.5),
    }


@pytest.mark.parametrize("rows", [40, 700])
def test_what_the_lora_ops_launch(raw, rows):
    """Launches of each op: once compiled, in a batch whose tokens have adapters and in one whose tokens have none.

    What adds to its output has nothing to add then; what overwrites it writes zeros.
    """
    plan = LoraPlan(rows, SLOTS, "cpu")
    small = rows <= lora_ops.ops.SMALL_BATCH
    expected = {
        (True, 0): {"lora_linear": 2, "lora_expand": 1, "lora_shrink": 2},
        (True, -1): {"lora_linear": 0, "lora_expand": 0, "lora_shrink": 2},
        (False, 0): {"lora_linear": 2, "lora_expand": 1, "lora_shrink": 2},
        (False, -1): {"lora_linear": 2, "lora_expand": 1, "lora_shrink": 2},
    }
    for (add_inputs, slot), counts in expected.items():
        busy = slot == 0
        counts |= {"lora_delta": 2 * (small and busy), "lora_join": (1 if small else 2) * busy}
        plan.update([slot] * rows)
        for _ in range(2):
            for name, call in lora_ops_of(plan, rows, add_inputs).items():
                raw.seen = []
                call()
                assert sum(x > 0 for _, _, (x, _, _), _ in raw.seen) == counts[name], (name, add_inputs, slot)


def test_what_follows_nothing_of_its_stream_starts_by_itself(raw):
    """The base layer's input may still be on its way where lora_delta begins; lora_linear follows its stream."""
    for op, early in (("lora_delta", [False, True]), ("lora_linear", [True, True])):
        arguments = lora(op, 40)
        lora_ops.ops._linear_kernels(*arguments)
        raw.early = []
        lora_ops.ops._linear_kernels(*arguments)
        assert raw.early == early


def test_tiles_of_a_part_of_the_tokens(raw):
    """A batch of fewer rows than the plan has tokens walks the tiles of all: its rows may be in any of them."""
    plan = LoraPlan(300, SLOTS, "cpu")
    grids = []
    for tokens in (300, 40):
        plan.update([token % SLOTS for token in range(tokens)])
        for name, call in lora_ops_of(plan, 40, True).items():
            call()
            raw.seen = []
            call()
            grids.append((name, tokens, max((x for _, _, (x, _, _), _ in raw.seen), default=0)))
    for (name, _, all_tokens), (_, _, few) in zip(grids[:5], grids[5:], strict=True):
        assert all_tokens > few > 0, name


def test_large_batches_launch_the_tiles_of_their_step(raw, monkeypatch):
    """Rounded up to 16, so that other steps are of the same form; a CUDA graph's launches serve any step."""
    rows, any_step = 2000, 40
    plan = LoraPlan(rows, SLOTS, "cpu")
    steps = {  # slots, and the tiles launched for 32, 9 * 4, 2 * 2 and 1
        "one adapter": ([3] * rows, 32),
        "all and none": ([token % 9 - 1 for token in range(rows)], any_step),
        "few tokens": ([1, 2] * 100, 16),
        "none": ([-1] * 7, 16),
    }

    def grids() -> dict[str, list[int]]:
        """Programs of each launch of each op."""
        found = {}
        for name, call in lora_ops_of(plan, rows, False).items():
            call()
            raw.seen = []
            call()
            found[name] = [x for _, _, (x, _, _), _ in raw.seen if x > 0]
        return found

    plan.expect_any_step()
    full = grids()
    for step, (slots, tiles) in steps.items():
        plan.update(slots)
        for name, programs in grids().items():
            if programs:
                assert programs == [x // any_step * tiles for x in full[name]], (step, name)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(torch.Tensor, "is_cuda", True)
            assert step_of(plan.counts, empty(rows, 4)) == Step(rows)
            with capturing_one_step():
                assert step_of(plan.counts, empty(rows, 4)) == Step(rows, -(-tiles // 16) * 16)
    assert step_of(plan.counts, empty(512, 4)) == Step(512)
    many = lora_ops.launches.plan_tiles(*plan_args(plan)[::2], 512, Step(1000, 16))
    assert many.count == lora_ops.launches.plan_tiles(*plan_args(plan)[::2], 512, Step(1000)).count > 16, "of 16 rows"
    assert step_of(plan.counts, empty(())) == Step(7)


def test_pieces_are_those_of_the_batch(raw):
    """A server's memory was measured with them."""
    function, make = MOE
    function(*make(2000))
    again = make(2000)
    sizes = []
    for run in (function, function.__wrapped__):
        with Kept() as kept:
            run(*again)
        sizes.append([extent(tensor) for tensor in kept.tensors])
    assert sorted(sizes[0]) == sorted(sizes[1])


def addresses_in(argument: object) -> list[int]:
    """Of a launch's argument in a replay; tensors are not there."""
    if isinstance(argument, TensorDescriptor):
        return [argument.base.data_ptr()]
    if isinstance(argument, tuple):
        return [address for each in argument for address in addresses_in(each)]
    return [argument] if type(argument) is int and argument >= 2**32 else []


@pytest.mark.parametrize("name", BATCHES)
def test_memory_is_there_when_a_launch_takes_it(raw, name):
    """Nothing is let go before the last launch that takes it is made."""
    (function, make), sizes, options = BATCHES[name]()
    function(*make(*sizes, **options))
    again = make(*sizes, **options)
    alive, taken = Alive(), []

    class Looked(list):
        def append(self, launch) -> None:
            for address in addresses_in(tuple(launch[3])):
                given = any(0 <= address - tensor.data_ptr() < extent(tensor) for tensor in flat(again))
                taken.append(given)
                assert given or alive.holds(address), f"{launch[0]} takes memory that is let go"

    raw.seen = Looked()
    with alive:
        function(*again)
    assert True in taken


@pytest.mark.parametrize("name", [name for name in BATCHES if name.startswith("moe")])
def test_memory_at_most_is_that_of_the_batch(raw, name):
    """Memory is let go once the last launch that takes it is made, such as h in 16 bits once it is quantised."""
    (function, make), sizes, options = BATCHES[name]()
    function(*make(*sizes, **options))
    again = make(*sizes, **options)
    raw.seen = deque(maxlen=0)  # what is seen is kept alive
    most = []
    for run in (function, function.__wrapped__):
        with Alive() as alive:
            run(*again)
        most.append(alive.most)
    assert most[0] <= most[1]
