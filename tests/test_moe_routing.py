"""The routing plan's invariants, before any matrix product."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ops import RoutingPlan, routing_plan
from moe_ops.routing import NO_EXPERT, NO_TILE, tile_count_bound

CASES = {  # tokens, top_k, experts, draw
    "no tokens": (0, 4, 8, "distinct"),
    "one token": (1, 8, 128, "distinct"),
    "one expert": (37, 1, 1, "distinct"),
    "prime sizes": (127, 5, 61, "distinct"),
    "every expert": (9, 8, 8, "distinct"),
    "all tokens on one expert": (100, 1, 7, "same"),
    "the same expert twice": (50, 4, 16, "uniform"),
    "skewed": (300, 6, 64, "zipf"),
    "512 experts, most without tokens": (20, 2, 512, "distinct"),
    "some ids are -1": (77, 3, 13, "none too"),
    "only -1": (40, 2, 4, "none"),
    "many rows an expert": (1000, 8, 11, "distinct"),
}
TILE_ROWS = (1, 16, 64)


def draw_ids(tokens: int, top_k: int, experts: int, draw: str, rng: np.random.Generator) -> np.ndarray:
    shape = (tokens, top_k)
    if draw == "none":
        return np.full(shape, NO_EXPERT)
    if draw == "same":
        return np.full(shape, rng.integers(experts))
    if draw == "zipf":
        return np.minimum(rng.zipf(1.5, shape), experts) - 1
    if draw == "distinct":
        return rng.random((tokens, experts)).argsort(axis=1)[:, :top_k]
    return rng.integers(-1 if draw == "none too" else 0, experts, shape)


@pytest.fixture(params=TILE_ROWS)
def tile_rows(request) -> int:
    return request.param


@pytest.fixture(params=CASES.items(), ids=lambda case: case[0])
def planned(request, tile_rows) -> tuple[RoutingPlan, np.ndarray, int]:
    """A plan, the expert of each choice, and the number of experts."""
    tokens, top_k, experts, draw = request.param[1]
    ids = draw_ids(tokens, top_k, experts, draw, np.random.default_rng())
    plan = routing_plan(torch.from_numpy(ids).to(torch.int32), experts, tile_rows)
    return plan, ids.reshape(-1), experts


def arrays(plan: RoutingPlan) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(plan).items() if isinstance(value, torch.Tensor)}


def test_choices_are_a_stable_permutation_by_expert(planned):
    plan, ids, experts = planned
    choices = plan.choices.tolist()
    assert sorted(choices) == list(range(ids.size))
    assert choices == sorted(range(ids.size), key=lambda choice: (ids[choice] % (experts + 1), choice))
    np.testing.assert_array_equal(plan.tokens, plan.choices.numpy() // plan.top_k)


def test_rows_are_the_inverse_of_choices(planned):
    plan, ids, _ = planned
    np.testing.assert_array_equal(plan.choices[plan.rows.long()], np.arange(ids.size))
    np.testing.assert_array_equal(plan.rows[plan.choices.long()], np.arange(ids.size))


def test_counts_and_starts_describe_the_experts(planned):
    plan, ids, experts = planned
    counts = np.bincount(ids[ids != NO_EXPERT], minlength=experts)
    np.testing.assert_array_equal(plan.counts, counts)
    np.testing.assert_array_equal(plan.starts, np.concatenate([[0], np.cumsum(counts)]))


def test_tiles_cover_each_row_of_an_expert_once(planned, tile_rows):
    plan, ids, experts = planned
    tiles = int((plan.tile_experts != NO_TILE).sum())
    assert plan.tile_experts.numel() == tile_count_bound(ids.size, experts, tile_rows) >= tiles
    assert (plan.tile_experts[tiles:] == NO_TILE).all(), "tiles first, sentinels after them"
    assert (plan.tile_experts[:tiles].diff() >= 0).all(), "tiles of an expert are neighbours"
    assert not plan.tile_starts[tiles:].any()
    assert not plan.tile_sizes[tiles:].any()
    assert plan.tile_count.tolist() == [tiles]
    covered = []
    for expert, start, size in zip(
        *(x[:tiles].tolist() for x in (plan.tile_experts, plan.tile_starts, plan.tile_sizes)), strict=True
    ):
        assert 1 <= size <= tile_rows
        assert size == tile_rows or start + size == plan.starts[expert + 1], "only the last tile is not full"
        assert (ids[plan.choices[start : start + size]] == expert).all()
        covered += range(start, start + size)
    assert covered == list(range(np.count_nonzero(ids != NO_EXPERT)))


def test_arrays_are_int32(planned):
    assert {array.dtype for array in arrays(planned[0]).values()} == {torch.int32}


@pytest.mark.parametrize("top_k", range(1, 9))
def test_any_top_k(top_k):
    ids = draw_ids(31, top_k, 10, "distinct", np.random.default_rng())
    plan = routing_plan(torch.from_numpy(ids), 10, 16)
    assert plan.top_k == top_k
    per_token = np.bincount(plan.tokens, minlength=31)
    assert (per_token == top_k).all()
    for token, row in enumerate(plan.rows.reshape(31, top_k).tolist()):
        assert (plan.tokens[row] == token).all()


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_tile_bound_is_reached(tile_rows):
    experts = 5
    for choices in range(1, 4 * tile_rows + 4):
        ids = torch.arange(choices).clamp(max=experts - 1)[:, None]  # a row for each expert, the rest on the last one
        live = int((routing_plan(ids, experts, tile_rows).tile_experts != NO_TILE).sum())
        assert live == tile_count_bound(choices, experts, tile_rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ranks_of_an_expert_map_share_the_choices(dtype):
    """Expert parallel: each rank plans its own experts, by its own indices, and leaves out the others."""
    rng = np.random.default_rng()
    global_experts, ranks = 23, 3
    ids = draw_ids(90, 4, global_experts, "none too", rng)
    owner = rng.integers(0, ranks, global_experts)
    seen = []
    for rank in range(ranks):
        mine = np.flatnonzero(owner == rank)
        expert_map = torch.full((global_experts,), NO_EXPERT, dtype=dtype)
        expert_map[mine] = torch.arange(len(mine), dtype=dtype)
        plan = routing_plan(torch.from_numpy(ids), len(mine), 16, expert_map)
        for expert, start, end in zip(mine, plan.starts[:-1], plan.starts[1:], strict=True):
            choices = plan.choices[start:end]
            assert (ids.reshape(-1)[choices] == expert).all()
            seen += choices.tolist()
    assert sorted(seen) == np.flatnonzero(ids != NO_EXPERT).tolist()


class NoCopies(TorchDispatchMode):
    """Fails at an op that moves data between host and device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            assert out.is_cuda, f"{func} makes a tensor on the host"
        assert func is not torch.ops.aten._to_copy.default or args[0].is_cuda, "copies from the host"
        return out


@pytest.mark.parametrize("mapped", [False, True], ids=["ids", "expert_map"])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_a_plan_on_a_gpu_neither_syncs_nor_depends_on_data(tokens, mapped):
    """Fake CUDA tensors hold no data: reading a value or a shape that depends on one raises."""
    with FakeTensorMode():
        ids = torch.empty(tokens, 4, dtype=torch.int32, device="cuda")
        expert_map = torch.empty(32, dtype=torch.int32, device="cuda") if mapped else None
        with NoCopies():
            plan = routing_plan(ids, 11, 16, expert_map)
        shapes = {name: tuple(array.shape) for name, array in arrays(plan).items()}
        assert all(array.is_cuda for array in arrays(plan).values())
    choices, tiles = 4 * tokens, tile_count_bound(4 * tokens, 11, 16)
    tile_arrays = ("tile_experts", "tile_starts", "tile_sizes")
    assert shapes == {
        **dict.fromkeys(("choices", "rows"), (choices,)),
        **dict.fromkeys(tile_arrays, (tiles,)),
        "counts": (11,),
        "starts": (12,),
        "tile_count": (1,),
    }


@pytest.mark.parametrize(
    ("ids", "expert_map", "options", "error", "message"),
    [
        ([[0, 4]], None, {}, ValueError, r"topk_ids spans 0\.\.4, but experts are 0\.\.3"),
        ([[-2, 0]], None, {}, ValueError, r"topk_ids spans -2\.\.0"),
        ([0, 1], None, {}, ValueError, r"topk_ids has shape \(2,\), expected \[tokens, top_k\]"),
        ([[]], None, {"dtype": torch.int32}, ValueError, "at least one expert a token"),
        ([[0.0]], None, {}, TypeError, r"topk_ids is torch.float32, expected int32 or int64"),
        ([[0]], None, {"num_experts": 0}, ValueError, "num_experts is 0, expected at least 1"),
        ([[0]], None, {"tile_rows": 0}, ValueError, "tile_rows is 0, expected at least 1"),
        ([[0, 6]], [0, 1, -1, 2, 3, -1], {}, ValueError, r"topk_ids spans 0\.\.6, but experts are 0\.\.5"),
        ([[0]], [0, 4], {}, ValueError, r"expert_map spans 0\.\.4, but experts are 0\.\.3"),
        ([[0]], [[0, 1]], {}, ValueError, r"expert_map has shape \(1, 2\)"),
        ([[-1]], [], {}, ValueError, "expert_map is empty"),
        ([[0]], [0.0], {}, TypeError, "expert_map is torch.float32"),
    ],
)
def test_bad_input_is_named(ids, expert_map, options, error, message):
    options = {"num_experts": 4, "tile_rows": 16} | options
    topk_ids = torch.tensor(ids, dtype=options.pop("dtype", None))
    with pytest.raises(error, match=message):
        routing_plan(topk_ids, expert_map=None if expert_map is None else torch.tensor(expert_map), **options)


def test_arguments_of_two_devices_are_named():
    with FakeTensorMode(), pytest.raises(ValueError, match="expert_map is on cpu, topk_ids on cuda"):
        routing_plan(torch.empty(3, 2, dtype=torch.int32, device="cuda"), 4, 16, torch.empty(8, dtype=torch.int32))
