"""The plan's invariants, before any matrix product."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch

from lora_ops.fill import compiled
from lora_ops.plan import NO_ADAPTER, NO_TILE, SMALL_BATCH, TILE_ROWS, LoraPlan, tile_count_bound
from ops_configs.lora import tile_rows_for

CASES = {  # tokens, max_tokens, slots, draw
    "empty": (0, 8, 4, "uniform"),
    "one token": (1, 8, 4, "uniform"),
    "one token without adapter": (1, 8, 4, "none"),
    "no adapter at all": (37, 64, 4, "none"),
    "one slot": (100, 128, 1, "uniform"),
    "every token its own slot": (48, 48, 48, "distinct"),
    "prime sizes": (127, 131, 13, "uniform"),
    "skewed": (500, 700, 64, "zipf"),
    "largest small batch": (SMALL_BATCH, 1024, 32, "uniform"),
    "smallest large batch": (SMALL_BATCH + 1, 1024, 32, "uniform"),
    "segments": (2000, 2048, 8, "segments"),
    "more slots than tokens": (5, 4096, 200, "uniform"),
}


def draw_slots(tokens: int, slots: int, draw: str, rng: np.random.Generator) -> np.ndarray:
    if draw == "none":
        return np.full(tokens, NO_ADAPTER)
    if draw == "distinct":
        return rng.permutation(tokens)
    if draw == "zipf":
        return np.minimum(rng.zipf(1.5, tokens), slots + 1) - 2
    if draw == "segments":
        return np.sort(rng.integers(-1, slots, tokens))[::-1]
    return rng.integers(-1, slots, tokens)


def numba_loop():
    """The loop of plans on a GPU, not yet compiled."""
    return compiled.__wrapped__()


@pytest.fixture(params=["plain", "compiled"])
def loops(request, monkeypatch) -> None:
    """Plans of this test run the loop as plans on the CPU do, and as those on a GPU do."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr("lora_ops.plan.fill", compiled())


@pytest.fixture(params=CASES.items(), ids=lambda case: case[0])
def planned(request, loops) -> tuple[LoraPlan, np.ndarray]:
    tokens, max_tokens, slots, draw = request.param[1]
    rng = np.random.default_rng()
    plan = LoraPlan(max_tokens, slots, "cpu")
    for _ in range(3):  # something stale to overwrite, in whichever memory
        plan.update(rng.integers(-1, slots, max_tokens))
    token_slots = draw_slots(tokens, slots, draw, rng)
    plan.update(token_slots)
    return plan, token_slots


def section(plan: LoraPlan, name: str) -> np.ndarray:
    return plan.section(name).numpy()


def test_order_is_a_stable_permutation_by_slot(planned):
    plan, slots = planned
    order = section(plan, "order")[: slots.size]
    assert sorted(order) == list(range(slots.size))
    assert list(order) == sorted(range(slots.size), key=lambda token: (slots[token], token))
    np.testing.assert_array_equal(plan.token_slots, slots)


def test_counts_and_starts_describe_the_groups(planned):
    plan, slots = planned
    distinct, counts = np.unique(slots, return_counts=True)
    groups = len(distinct)
    active, per_slot, starts = (section(plan, n) for n in ("active_slots", "tokens_per_slot", "slot_starts"))
    np.testing.assert_array_equal(active[:groups], distinct)
    np.testing.assert_array_equal(per_slot[:groups], counts)
    np.testing.assert_array_equal(starts[: groups + 1], np.concatenate([[0], np.cumsum(counts)]))
    assert (active[groups:] == NO_ADAPTER).all()
    assert not per_slot[groups:].any()
    assert not starts[groups + 1 :].any()
    assert (plan.num_tokens, plan.num_groups, plan.num_active) == (slots.size, groups, (distinct >= 0).sum())


def test_per_token_sections_are_padded(planned):
    plan, slots = planned
    assert (section(plan, "token_slots")[slots.size :] == NO_ADAPTER).all()
    assert not section(plan, "order")[slots.size :].any()


@pytest.mark.parametrize("rows", TILE_ROWS)
def test_tiles_cover_each_token_once_with_its_slot(planned, rows):
    plan, slots = planned
    tile_slots = section(plan, f"tile_slots_{rows}")
    if rows == TILE_ROWS[0]:
        slots = slots[:SMALL_BATCH]  # batches of more rows ask for larger tiles
    tile_rows = section(plan, f"tile_rows_{rows}").reshape(-1, rows)
    tiles = int((tile_slots != NO_TILE).sum())
    assert (tile_slots[tiles:] == NO_TILE).all(), "tiles first, sentinels after them"
    assert tiles <= tile_count_bound(slots.size, plan.max_slots, rows) <= tile_slots.size
    if rows == TILE_ROWS[1]:
        assert plan.counts[2] == tiles, "as many as a launch of a large batch walks"
    seen = []
    for slot, members in zip(tile_slots[:tiles], tile_rows[:tiles], strict=True):
        live = members[members >= 0]
        assert live.size, "no tile is empty"
        assert (members[: live.size] >= 0).all(), "padding stands at the end of a tile"
        assert (slots[live] == slot).all()
        assert (np.diff(live) > 0).all(), "rows ascend, so that a row's place does not depend on other slots"
        seen += list(live)
    assert sorted(seen) == list(range(slots.size))
    none = np.flatnonzero(tile_slots[:tiles] == NO_ADAPTER)
    assert (none >= tiles - none.size).all(), "tiles without adapter come last"


@pytest.mark.parametrize("tile", TILE_ROWS)
def test_the_first_rows_of_any_step_are_in_the_first_tiles(planned, tile):
    """What a graph captured for R rows launches holds those of them that have an adapter."""
    plan, slots = planned
    tile_rows = section(plan, f"tile_rows_{tile}").reshape(-1, tile)
    if tile > TILE_ROWS[0] and slots.size > SMALL_BATCH:
        pytest.skip("tiles of large batches stand in another order")
    for rows in {1, 2, 7, 16, 33, 100, 300, SMALL_BATCH}:
        launched = tile_rows[: tile_count_bound(rows, plan.max_slots, tile)]
        assert set(np.flatnonzero(slots[:rows] >= 0)) <= set(launched.ravel())


def test_tiles_of_large_batches_stand_in_the_order_of_their_slots(planned):
    plan, slots = planned
    if slots.size <= SMALL_BATCH:
        pytest.skip("tiles of small batches stand in the order of their first rows")
    tile_slots = section(plan, "tile_slots_64")
    assert (np.diff(tile_slots[tile_slots >= 0]) >= 0).all()


@pytest.mark.parametrize(
    ("slots", "wide"),
    [
        ([3] * 129, 3),
        ([3] * 64, 0),  # one would leave most of a GPU idle
        ([3] * 80, 0),  # two of 64 rows for five of 16
        ([3] * 81, 2),
        ([3, 0] * 60 + [-1] * 65, 4),  # those without adapter count as tiles
        (list(range(9)) * 16, 0),
        ([-1] * 200, 0),
        ([3] * SMALL_BATCH, 8),
        ([3] * (SMALL_BATCH + 1), 0),
    ],
)
def test_small_steps_of_few_adapters_have_wide_tiles(loops, slots, wide):
    plan = LoraPlan(SMALL_BATCH + 1, 9, "cpu")
    plan.update([5] * 400)
    plan.update(slots)
    assert section(plan, "wide_tiles") == [wide]


def test_small_batches_have_small_tiles():
    assert [tile_rows_for(n) for n in (0, 1, SMALL_BATCH, SMALL_BATCH + 1)] == [16, 16, 16, 64]


def test_a_plan_that_expects_any_step_counts_as_full_until_the_next():
    plan = LoraPlan(100, 3, "cpu")
    plan.update([2, 0])
    before = plan.arena.clone()
    plan.expect_any_step()
    assert (plan.num_tokens, plan.num_active) == (100, 1)
    assert plan.counts[2] == tile_count_bound(100, 3, 64)
    plan.update([2, 0])
    assert (plan.num_tokens, plan.num_active) == (2, 2)
    assert torch.equal(plan.arena, before)


@pytest.mark.parametrize("rows", TILE_ROWS)
def test_tile_bound_is_reached(rows):
    slots = 5
    for tokens in range(1, 4 * rows):
        groups = min(tokens, slots + 1)
        sizes = np.ones(groups, dtype=int)
        sizes[0] += tokens - groups
        worst = sum(-(-size // rows) for size in sizes)
        assert worst <= tile_count_bound(tokens, slots, rows) <= worst + 1


def test_offsets_are_filled_and_padded(loops):
    plan = LoraPlan(10, 4, "cpu", has_offsets=True)
    plan.update([2] * 10, 7)
    plan.update([1] * 10, 7)
    plan.update([0, -1, 3], 100)
    assert plan.section("offsets").tolist() == [0, 0, 300] + [0] * 7


def test_a_step_like_the_one_before_is_sent_but_not_built_again(monkeypatch):
    plan = LoraPlan(10, 3, "cpu", has_offsets=True)
    slots = np.array([2, 0, 2])
    plan.update(slots, 5)
    names = ("token_slots", "offsets", "tile_slots_16", "tile_rows_16", "order")
    expected = [plan.section(name).clone() for name in names]
    plan.arena.fill_(-7)  # the memory was dropped and mapped again
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_fill", None)
        plan.update(slots.copy(), 5)
    assert all(torch.equal(plan.section(name), old) for name, old in zip(names, expected, strict=True))
    slots[0] = 1  # in the caller's own array
    plan.update(slots, 5)
    assert plan.token_slots.tolist() == [1, 0, 2]
    plan.update(slots, 9)
    assert plan.section("offsets")[:3].tolist() == [9, 0, 18]


def test_nothing_is_compiled_twice(monkeypatch):
    """Whatever a caller gives as slots, the loop sees arrays of one kind: a server's steps compile nothing."""
    numba = pytest.importorskip("numba")
    monkeypatch.setattr("lora_ops.plan.fill", loop := numba_loop())
    plan, without_offsets = LoraPlan(64, 4, "cpu", has_offsets=True), LoraPlan(8, 2, "cpu")
    strided, frozen = np.arange(8)[::2] % 4, np.zeros(3, dtype=np.int32)
    frozen.flags.writeable = False
    for slots in ([], [1], (0, -1), np.zeros(2, np.int64), strided, frozen, frozen):
        plan.update(slots, 10)
        assert plan.token_slots.tolist() == list(slots)
    without_offsets.update([1])
    if not numba.config.DISABLE_JIT:
        assert len(loop.signatures) == 1


class Copies:
    """Stands in for the event of copies to a GPU."""

    def __init__(self):
        self.through = True
        self.records = 0

    def query(self) -> bool:
        return self.through

    def record(self, stream) -> None:
        self.through = False
        self.records += 1


def test_memory_is_written_again_once_its_copy_is_through(monkeypatch):
    """Steps that the GPU is behind with keep theirs, and one event stands for many."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    plan = LoraPlan(40, 3, "cpu")
    pool, event = plan._pool, Copies()
    pool._event, pool._free = event, [pool._make() for _ in range(pool.SPARE)]
    unread = {}  # by staging: what the GPU has not read yet, and how many events were recorded when it was sent

    def step() -> None:
        if event.through:
            for staging in [staging for staging, (_, records) in unread.items() if records < event.records]:
                del unread[staging]
        plan.update(np.random.default_rng().integers(-1, 3, 30))
        for staging, (values, _) in unread.items():
            np.testing.assert_array_equal(staging.values, values)
        assert plan._staging not in unread
        unread[plan._staging] = plan._staging.values.copy(), event.records
        plan.update(plan.token_slots.numpy().copy())  # sent again

    for _ in range(40):  # the GPU is behind
        step()
    assert len(unread) == 40
    event.through = True
    for _ in range(400):  # and now keeps up
        step()
        event.through = True
    records = event.records
    for _ in range(400):
        step()
        event.through = True
    assert event.records - records <= 2 * 400 / pool.SPARE + 1
    assert len(pool._free) + len(pool._sent) + len(pool._before_event) <= 40 + pool.SPARE + 1


def test_a_step_that_failed_is_not_sent_again(monkeypatch):
    """Nor is the one before it, whose memory may be written by the next; half-written memory is dropped."""
    plan = LoraPlan(8, 4, "cpu")
    plan.update([1, 2])
    with pytest.raises(ValueError, match="slot 9"):
        plan.update([9])
    assert plan._built is None

    def interrupted(arena, *args):
        arena[:] = -5
        raise KeyboardInterrupt

    spoilt = plan._pool.take()
    plan._pool._free.append(spoilt)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.update([3])
    for slots in ([1, 2], [3], [0, 0, 1]):
        plan.update(slots)
        assert plan._staging is not spoilt
        assert plan.token_slots.tolist() == slots
        assert (plan.arena != -5).all()


def test_a_copy_is_a_plan_of_its_own():
    plan = LoraPlan(8, 4, "cpu", has_offsets=True)
    plan.update([3, 1], 10)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        other.update([2, 2, 0], 5)
        assert other.token_slots.tolist() == [2, 2, 0]
        assert other.section("offsets").tolist() == [10, 10, 0, 0, 0, 0, 0, 0]
        assert other.counts.tolist() == [3, 2, 2]
    assert plan.token_slots.tolist() == [3, 1]


def test_offsets_must_fit():
    plan = LoraPlan(8, 4, "cpu", has_offsets=True)
    plan.update([3], (2**31 - 1) // 3)
    for stride in ((2**31 - 1) // 3 + 1, -1):
        with pytest.raises(ValueError, match=f"slot_stride is {stride}, .* do not fit into int32"):
            plan.update([3], stride)


def test_a_missing_numba_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"needs numba, .*: pip install numba"):
        numba_loop()


def test_buffers_do_not_move():
    plan = LoraPlan(64, 4, "cpu")
    before = plan.arena.data_ptr(), plan.counts.data_ptr(), plan.section("tile_rows_16").data_ptr()
    plan.update([0, 1, 2])
    assert before == (plan.arena.data_ptr(), plan.counts.data_ptr(), plan.section("tile_rows_16").data_ptr())


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 4], r"token 1 has adapter slot 4, but slots are 0\.\.3"),
        ([-2, 0], "token 0 has adapter slot -2"),
        ([0] * 9, "at most 8 tokens"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([1, 2**32], r"token 1 has adapter slot 4294967296, but slots are 0\.\.3"),
        (np.array([2**32 - 1], np.uint32), "token 0 has adapter slot 4294967295"),
        ([0.0, 1.7], "token_slots are of dtype float64, expected integers in -1..3"),
        (torch.tensor([0.9]), "token_slots are of dtype float32"),
        (["1"], "token_slots are of dtype <U1"),
        ([True], "token_slots are of dtype bool"),
        ([2**70], "token_slots are of dtype object"),
    ],
)
def test_bad_slots_are_named_and_leave_the_plan_alone(slots, message):
    plan = LoraPlan(8, 4, "cpu")
    plan.update([1, 2])
    before = plan.arena.clone()
    with pytest.raises(TypeError if "dtype" in message else ValueError, match=message):
        plan.update(slots)
    assert torch.equal(plan.arena, before)
    assert plan.num_tokens == 2


@pytest.mark.parametrize(("tokens", "slots"), [(0, 4), (4, 0)])
def test_a_plan_needs_room(tokens, slots):
    with pytest.raises(ValueError, match="max_tokens >= 1 and max_slots >= 1"):
        LoraPlan(tokens, slots, "cpu")
