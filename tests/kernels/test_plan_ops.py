"""lora_shrink, lora_expand and lora_linear against the fp32 reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lora_ops
from lora_ops import launches, ops, reference
from lora_ops.config import PLANES_BATCH
from lora_ops.kernels import expand as expand_module
from lora_ops.plan import plan_args
from ops_configs.lora import ExpandConfig, ShrinkConfig, pinned
from ops_configs.store import SMALL_BATCH

from .cases import CASES, Case, Layer, assert_close, make_layer, tolerance

every_case = pytest.mark.parametrize("case", CASES, ids=str)
nan = float("nan")


def reference_linear(layer: Layer, y: torch.Tensor, scale: float, add_inputs: bool) -> torch.Tensor:
    """fp32 result on the same inputs; y in fp32, so that only the kernel rounds."""
    y = y.float().clone()
    args = (layer.x, layer.lora_a, layer.lora_b, layer.plan, scale, layer.offset, add_inputs)
    reference.lora_linear(y, *args)
    return y


@every_case
@pytest.mark.parametrize("add_inputs", [True, False])
def test_linear(case, dtype, device, add_inputs):
    layer = make_layer(case, dtype, device)
    if not add_inputs:
        layer.y[:, layer.window] = nan
    outside = layer.y.clone()
    expected = reference_linear(layer, layer.y, 0.5, add_inputs)
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, 0.5, layer.offset, add_inputs)
    assert_close(layer.y[:, layer.window], expected[:, layer.window], tolerance(dtype))
    outside[:, layer.window] = layer.y[:, layer.window]
    assert torch.equal(layer.y, outside), "columns outside of the window stay as they are"
    none = torch.from_numpy(layer.slots == -1)
    if add_inputs:
        before = expected[:, layer.window][none].to(dtype)
        assert torch.equal(layer.y[:, layer.window][none], before), "rows without adapter keep their bits"
    else:
        assert not layer.y[:, layer.window][none].any(), "rows without adapter become zero"


@every_case
def test_shrink(case, dtype, device):
    layer = make_layer(case, dtype, device)
    shape = (len(case.widths), case.tokens, case.rank)
    out, expected = torch.full(shape, nan, device=device), torch.zeros(shape, device=device)
    lora_ops.lora_shrink(layer.x, layer.lora_a, out, layer.plan, 2.0)
    reference.lora_shrink(layer.x, layer.lora_a, expected, layer.plan, 2.0)
    assert_close(out, expected, 1e-5)  # fp32 out of exact products


@pytest.mark.parametrize("tokens", [9, 520])
def test_shrink_takes_ranks_beyond_those_of_lora(dtype, device, tokens):
    """vLLM shrinks whole classifier heads: 600 labels, in both tile sizes."""
    layer = make_layer(Case(tokens, 1100, (16,), 600, 2, "classifier head"), dtype, device)
    out, expected = torch.full((1, tokens, 600), nan, device=device), torch.zeros(1, tokens, 600, device=device)
    lora_ops.lora_shrink(layer.x, layer.lora_a, out, layer.plan)
    reference.lora_shrink(layer.x, layer.lora_a, expected, layer.plan)
    assert_close(out, expected, 1e-5)


def test_tensors_on_another_gpu_than_the_current(dtype, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = make_layer(CASES[3], dtype, "cuda:1")
    expected = reference_linear(layer, layer.y, 1.0, True)
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, 1.0, layer.offset)
    assert_close(layer.y, expected, tolerance(dtype))


@pytest.mark.parametrize("tokens", [9, 530])
def test_inputs_whose_rows_overlap(dtype, device, tokens):
    """Expanded tensors may be read, of one row for all, and of one adapter in every slot."""
    layer = make_layer(Case(tokens, 1100, (32, 16), 16, 4, "expanded"), dtype, device)
    x = layer.x[:1].expand(tokens, -1)
    a, b = ([weight[:1].expand(4, -1, -1) for weight in weights] for weights in (layer.lora_a, layer.lora_b))
    expected = layer.y.float().clone()
    reference.lora_linear(expected, x, a, b, layer.plan)
    lora_ops.lora_linear(layer.y, x, a, b, layer.plan)
    assert_close(layer.y, expected, tolerance(dtype))


@every_case
@pytest.mark.parametrize("h_dtype", [torch.float32, None], ids=["fp32 h", "h as weights"])
def test_expand(case, dtype, device, h_dtype):
    layer = make_layer(case, dtype, device)
    h = torch.randn(len(case.widths), case.tokens, case.rank, device=device).to(h_dtype or dtype)
    expected = layer.y.float().clone()
    reference.lora_expand(h, layer.lora_b, expected, layer.plan, layer.offset)
    lora_ops.lora_expand(h, layer.lora_b, layer.y, layer.plan, layer.offset)
    assert_close(layer.y, expected, tolerance(dtype))


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=str)
def test_shrink_then_expand_has_the_bits_of_linear(case, device):
    layer = make_layer(case, torch.float16, device)
    h = torch.full((len(case.widths), case.tokens, case.rank), nan, device=device)
    apart = layer.y.clone()
    lora_ops.lora_shrink(layer.x, layer.lora_a, h, layer.plan)
    lora_ops.lora_expand(h, layer.lora_b, apart, layer.plan, layer.offset)
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, 1.0, layer.offset)
    assert torch.equal(apart, layer.y)


@pytest.mark.parametrize("tokens", [5, 530])
def test_padding_rows_are_not_touched(device, tokens):
    layer = make_layer(Case(tokens, 64, (32,), 8, 3, "padding"), torch.float16, device, padding=11)
    layer.x[tokens:] = nan
    before = layer.y[tokens:].clone()
    h = torch.full((1, tokens + 11, 8), nan, device=device)
    lora_ops.lora_shrink(layer.x, layer.lora_a, h, layer.plan)
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, add_inputs=False)
    assert torch.equal(layer.y[tokens:, :32], before[:, :32])
    assert h[:, tokens:].isnan().all()
    assert not layer.y[:tokens, :32].isnan().any()
    assert not h[:, :tokens].isnan().any()


@pytest.mark.parametrize("tokens", [40, 530])
def test_fewer_rows_than_the_plan_has_tokens(device, tokens):
    """Each row uses the slot of its own token, wherever the tile of that token stands in the plan."""
    layer = make_layer(Case(tokens, 64, (32,), 8, 12, "part of a plan"), torch.float16, device)
    plan = layer.plan
    plan.update([11, 10, 9] + list(range(11)) * ((tokens - 3) // 11))
    x, y, h = layer.x[:3], layer.y[:3], torch.full((1, 3, 8), nan, device=device)
    expected, expected_h = y.float().clone(), torch.zeros_like(h)
    arguments = plan_args(plan)
    torch.ops.lora_ops.lora_shrink(x, layer.lora_a, h, *arguments, 1.0)
    torch.ops.lora_ops.lora_linear(y, x, layer.lora_a, layer.lora_b, *arguments, 1.0, 0, True)
    reference.lora_shrink(x, layer.lora_a, expected_h, plan)
    reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, plan)
    assert_close(h, expected_h, 1e-5)
    assert_close(y, expected, tolerance(torch.float16))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tokens", [40, 530])
def test_beside_of_fewer_rows_than_the_plan_has_tokens(device, tokens, in_place):
    """As in layers that see the sampled tokens alone."""
    layer = make_layer(Case(tokens, 64, (32,), 8, 12, "part of a plan"), torch.float16, device)
    layer.plan.update([11, -1, 9] + list(range(-1, 11)) * ((tokens - 3) // 12))
    x, base = layer.x[:3], torch.randn(64, 32, device=device, dtype=torch.float16)
    arguments = (x, layer.lora_a, layer.lora_b, *plan_args(layer.plan), 1.0)
    delta, y = torch.full((512, 32), nan, device=device, dtype=torch.float16), x @ base
    expected = y.to(torch.float32, copy=True)
    torch.ops.lora_ops.lora_delta(delta, *arguments)
    torch.ops.lora_ops.lora_join(delta, y, *arguments, in_place)
    if not in_place:
        with_adapter = layer.plan.section("token_slots")[:3, None] >= 0
        y += torch.where(with_adapter, delta[:3], 0)
    reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, layer.plan)
    assert_close(y, expected, 1.5 * tolerance(torch.float16))


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("captured_for", ["its rows", "any step"])
def test_launches_of_one_plan_serve_any_later_plan(device, rows, captured_for):
    """What a CUDA graph repeats: the tiles of the plan that it was captured with, filled by the step's own plan."""
    layer = make_layer(Case(600, 64, (32,), 8, 40, "graph"), torch.float16, device)
    plan = layer.plan
    if captured_for == "any step":
        plan.expect_any_step()
    else:
        plan.update([0] * rows)
    tiles = launches.plan_tiles(*plan_args(plan)[::2], rows, launches.Step(plan.num_tokens))
    x, base = layer.x[:rows], layer.y[:rows].clone()
    for tokens, lowest in ((rows, -1), (rows // 2, 0), (0, 0), (400, 0), (400, -1), (600, -1), (600, 39)):
        plan.update(np.random.default_rng().integers(lowest, 40, tokens))
        y = base.clone()
        expected = y.to(torch.float32, copy=True)
        launches.run_linear(y, x, layer.lora_a, layer.lora_b, 1.0, 0, True, tiles)
        reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, plan)
        assert_close(y, expected, tolerance(torch.float16))


@pytest.mark.parametrize(
    "slots", [[39] * 600, list(range(40)) * 15, [5, -1, 38, 0] * 150, [7] * 520 + [-1] * 9, [-1] * 600]
)
def test_large_batches_walk_the_tiles_of_their_step(device, slots):
    """Not all that a step of as many tokens may have: every row of the step is written, and none of the padding."""
    layer = make_layer(Case(600, 64, (32, 24), 8, 40, "tiles"), torch.float16, device)
    layer.plan.update([token % 41 - 1 for token in range(600)])  # more tiles, that later launches must not walk
    layer.plan.update(slots)
    expected = torch.full_like(layer.y, 3.0).float()
    layer.y.fill_(3.0)
    layer.y[: len(slots), : layer.width] = nan
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, add_inputs=False)
    reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan, add_inputs=False)
    assert_close(layer.y, expected, tolerance(torch.float16))


@pytest.fixture
def launched_expands(monkeypatch):
    """Constants of the expands that are prepared in a test."""
    found, prepared = [], expand_module.prepared

    def spy(kernel, **constants):
        found.append(constants)
        return prepared(kernel, **constants)

    monkeypatch.setattr(expand_module, "prepared", spy)
    return found


WIDE_CONFIGS = ShrinkConfig(16, 64, num_warps=4, num_stages=3), ExpandConfig(32, 64, num_warps=4, num_stages=2, steps=1)
LONG_WIDE_CONFIGS = ShrinkConfig(16, 256, num_warps=4, num_stages=3), WIDE_CONFIGS[1]
STEPPED_WIDE_CONFIGS = WIDE_CONFIGS[0], ExpandConfig(32, 64, num_warps=4, num_stages=3, steps=2)
RANK_128_CONFIGS = WIDE_CONFIGS[0], ExpandConfig(32, 64, num_warps=2, num_stages=2, steps=1)
WIDE_STEPS = {  # slots, and the wide tiles that the plan then offers
    "one adapter": ([2] * 150, 3),
    "two adapters and none": ([3, -1, 1] * 50, 3),
    "one row in the last tile": ([0] * 129, 3),
    "many adapters": (list(range(4)) * 30, 0),
    "more tokens than rows": ([3, -1, 2] * 100, 6),
    "no adapter": ([-1] * 150, 0),
}


def wide_layer(k: int, device: str, dtype: torch.dtype = torch.float16, rank: int = 64) -> Layer:
    """With rows of x and y that begin at 16 bytes, as models have them, if K is a multiple of 16."""
    layer = make_layer(Case(300, k, (40, 64, 32), rank, 4, "wide tiles"), dtype, device)
    layer.x = layer.x.contiguous()
    layer.y = torch.randn(300, 144).to(dtype).to(device)
    return layer


@pytest.mark.parametrize(
    ("add_inputs", "k", "rank", "configs", "steps"),
    [
        (True, 64, 64, WIDE_CONFIGS, WIDE_STEPS),  # a shrink of so few programs has none
        (False, 64, 64, WIDE_CONFIGS, WIDE_STEPS),
        (True, 64, 64, STEPPED_WIDE_CONFIGS, ["two adapters and none", "one row in the last tile"]),
        (True, 64, 128, RANK_128_CONFIGS, ["two adapters and none", "one row in the last tile"]),
        (True, 3000, 64, WIDE_CONFIGS, ["one row in the last tile", "many adapters"]),
        (True, 4096, 64, LONG_WIDE_CONFIGS, ["one adapter", "one row in the last tile"]),
    ],
)
def test_wide_tiles_serve_the_steps_that_fill_them(device, launched_expands, add_inputs, k, rank, configs, steps):
    """Launches of one plan, of kernels that hold both sizes of tiles, over steps of either kind."""
    layer = wide_layer(k, device, rank=rank)
    plan, rows = layer.plan, 150
    plan.update([0] * rows)
    tiles = launches.plan_tiles(*plan_args(plan)[::2], rows)
    assert tiles.held_wide(rank, torch.float16, num_warps=4) == 64
    x, base, width = layer.x[:rows], layer.y[:rows], layer.width
    for slots, wide in map(WIDE_STEPS.get, steps):
        plan.update(slots)
        assert plan.section("wide_tiles") == wide
        y = base.clone()
        if not add_inputs:
            y[: min(rows, len(slots)), :width] = nan
        expected = y.to(torch.float32, copy=True)
        with pinned(rows, *configs):
            launches.run_linear(y, x, layer.lora_a, layer.lora_b, 0.5, 0, add_inputs, tiles)
        reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, plan, 0.5, 0, add_inputs)
        assert_close(y, expected, tolerance(torch.float16))
        assert launched_expands[-1]["WIDE"] == (64 if k == 64 else 0), "an expand of planes has none"


@pytest.mark.parametrize(
    ("k", "rank", "configs"),
    [
        (64, 64, WIDE_CONFIGS),
        (64, 64, STEPPED_WIDE_CONFIGS),
        (64, 128, RANK_128_CONFIGS),
        (3000, 64, WIDE_CONFIGS),
        (4096, 64, LONG_WIDE_CONFIGS),
    ],
)
def test_wide_tiles_have_the_bits_of_others(device, dtype, k, rank, configs):
    if device == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose order of summation depends on the shape")
    layer = wide_layer(k, device, dtype, rank)
    layer.plan.update([2, 2, 3] * 100)
    assert layer.plan.section("wide_tiles") == 6
    wide, narrow = layer.y.clone(), layer.y.clone()
    for y, warps in ((wide, 4), (narrow, 1)):
        with pinned(300, *(replace(config, num_warps=warps) for config in configs)):
            lora_ops.lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.plan, offset=layer.offset)
    assert torch.equal(wide, narrow)


def few_rows_layer(rows: int, rank: int, widths: tuple[int, ...], dtype: torch.dtype, device: str) -> Layer:
    """Of as many rows with an adapter as without; y and B begin and end at 16 bytes, as those of models do."""
    layer = make_layer(Case(2 * rows, 64, widths, rank, 3, "few rows"), dtype, device)
    layer.plan.update([2, -1] * rows)
    width = sum(widths)
    return replace(layer, y=torch.randn(2 * rows, width + 16).to(dtype).to(device)[:, :width])


def check_expand(layer: Layer, config: ExpandConfig, add_inputs: bool) -> None:
    """y with this config of the expand, over NaN where it is not added to, is that of the reference."""
    expected = layer.y.to(torch.float32, copy=True)
    reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan, 0.5, 0, add_inputs)
    if not add_inputs:
        layer.y[:] = nan
    with pinned(len(layer.y), None, config):
        lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, 0.5, 0, add_inputs)
    assert_close(layer.y, expected, tolerance(layer.y.dtype))


@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize(
    ("rank", "widths", "block_n", "steps"),
    [(24, (80, 48), 64, 1), (24, (80, 48), 16, 3), (32, (96, 48), 16, 3)],
    ids=["one step", "ragged", "even"],
)
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 260])
def test_rows_and_steps(device, dtype, launched_expands, rows, rank, widths, block_n, steps, add_inputs):
    """Half a tile of 16 rows at most is multiplied the other way round; a step fetches y for the next."""
    layer = few_rows_layer(rows, rank, widths, dtype, device)
    check_expand(layer, ExpandConfig(block_n, 32, num_warps=4, num_stages=3, steps=steps), add_inputs)
    assert launched_expands[-1]["STEPS"] == steps


@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize(
    ("rank", "widths", "block_n", "steps", "packed"),
    [
        (8, (80, 48), 64, 1, 2),
        (8, (96, 48), 32, 3, 2),
        (4, (80, 48), 64, 2, 4),
        (2, (128,), 128, 1, 8),
        (1, (256,), 256, 1, 1),  # of eight columns at most
        (8, (80, 48), 16, 1, 1),  # and 16 columns
        (8, (81, 48), 64, 1, 1),
        (6, (80, 48), 64, 1, 1),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_low_ranks_of_several_columns_share_a_product(
    device, dtype, launched_expands, rows, rank, widths, block_n, steps, packed, add_inputs
):
    layer = few_rows_layer(rows, rank, widths, dtype, device)
    check_expand(layer, ExpandConfig(block_n, 16, num_warps=8, num_stages=3, steps=steps), add_inputs)
    assert launched_expands[-1]["PACKED"] == packed


def test_ranks_with_memory_between_them_share_no_product(device, launched_expands):
    """Rows of B of a stack of twice the rank."""
    layer = few_rows_layer(2, 8, (64,), torch.float16, device)
    expected = layer.y.to(torch.float32, copy=True)
    reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    stack = torch.full((3, 64, 16), nan, dtype=torch.float16, device=device)
    stack[:, :, :8] = layer.lora_b[0]
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, [stack[:, :, :8]], layer.plan)
    assert_close(layer.y, expected, tolerance(torch.float16))
    assert launched_expands[-1]["PACKED"] == 1


@pytest.mark.parametrize(("warps", "block_n"), [(1, 64), (4, 128), (8, 256)])
@pytest.mark.parametrize(("rank", "steps"), [(8, 1), (8, 2), (16, 1), (16, 2), (64, 1), (64, 2), (128, 1)])
@pytest.mark.parametrize("rows", [9, 16])
def test_few_rows_have_the_bits_of_more(device, dtype, rows, rank, steps, warps, block_n):
    if device == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose order of summation depends on the shape")
    layer = few_rows_layer(rows, rank, (512, 512), dtype, device)
    more, few = layer.y.clone(), layer.y.clone()
    config = ExpandConfig(block_n, max(16, min(rank, 64)), num_warps=warps, num_stages=3, steps=steps)
    fewest = 4 if rank == 8 else 8
    for y, slots in ((more, [2, -1] * rows), (few, [2, -1] * fewest + [-1] * 2 * (rows - fewest))):
        layer.plan.update(slots)
        with pinned(2 * rows, None, config):
            lora_ops.lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    assert torch.equal(few[: 2 * fewest], more[: 2 * fewest])


def test_bf16_weights_without_a_gpu_take_the_reference(device):
    """Triton's interpreter multiplies bf16 as bit patterns."""
    if device != "cpu":
        pytest.skip("the kernels run on the GPU")
    layer = make_layer(CASES[3], torch.bfloat16, device)
    expected = reference_linear(layer, layer.y, 1.0, True)
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, offset=layer.offset)
    assert_close(layer.y, expected, tolerance(torch.bfloat16))


def test_four_dimensional_weights(device):
    layer = make_layer(CASES[3], torch.float16, device)
    expected = layer.y.clone()
    lora_ops.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    four = [[w.unsqueeze(1) for w in weights] for weights in (layer.lora_a, layer.lora_b)]
    lora_ops.lora_linear(layer.y, layer.x, *four, layer.plan)
    assert torch.equal(layer.y, expected)


def test_views_of_one_packed_buffer(device):
    """Slices may be views of one buffer: their slots are then further apart than their size."""
    case = Case(9, 64, (32, 32), 8, 3, "packed")
    layer = make_layer(case, torch.float16, device)
    packed = [torch.cat(weights, dim=1) for weights in (layer.lora_a, layer.lora_b)]
    views = [list(p.split(p.shape[1] // 2, dim=1)) for p in packed]
    expected = layer.y.clone()
    lora_ops.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    lora_ops.lora_linear(layer.y, layer.x, *views, layer.plan)
    assert torch.equal(layer.y, expected)


@pytest.mark.parametrize("k", [600, 2048])
def test_steps_longer_than_a_chunk(device, k):
    """A file may ask for them."""
    layer = make_layer(Case(5, k, (32,), 8, 3, "long steps"), torch.float16, device)
    with pinned(5, ShrinkConfig(16, 1024, 4, 1), None):
        expected = reference_linear(layer, layer.y, 1.0, True)
        lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan, offset=layer.offset)
    assert_close(layer.y, expected, tolerance(torch.float16))


@pytest.mark.parametrize("rank", [8, 64])
def test_a_row_does_not_depend_on_its_batch(device, dtype, rank):
    """The same row alone, in a small batch and in a large one (other tiles, other kernels) has the same bits."""
    if device == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose order of summation depends on the shape")
    case = Case(600, 1600, (48, 16), rank, 4, "batch invariance")
    layer = make_layer(case, dtype, device)
    whole, y = layer.y.clone(), layer.y.clone()
    lora_ops.lora_linear(whole, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    for rows in ([0], [599], list(range(3, 40)), list(np.random.permutation(600)[:300])):
        part = y[rows].clone()
        layer.plan.update(layer.slots[rows])
        lora_ops.lora_linear(part, layer.x[rows], layer.lora_a, layer.lora_b, layer.plan)
        assert torch.equal(part, whole[rows]), f"{len(rows)} rows"


PLANES = [
    (64, 8, (1, 1)),
    (1500, 40, (3, 3)),
    (2100, 64, (5, 3)),
    (3900, 32, (8, 8)),
    (3900, 40, (8, 4)),
    (2560, 40, (5, 3)),  # of whole steps
    (9300, 64, (10, 4)),
]


@pytest.mark.parametrize("tokens", [20, 540])
@pytest.mark.parametrize(("k", "rank", "planes"), PLANES)
def test_the_number_of_planes_does_not_matter(device, dtype, monkeypatch, tokens, k, rank, planes):
    """A plane for each chunk of K, for each group of chunks, or one for all, summed before the expand or in it.

    The same bits, signs of zeros too.
    """
    layer = make_layer(Case(tokens, k, (24,), rank, 2, "planes"), dtype, device)
    layer.x[::3] = 0
    layer.y[::3] = -0.0  # a GPU may keep it where h is -0.0; the interpreter never does
    layer.lora_b = [b.abs() for b in layer.lora_b]
    found = [launches.num_planes(k, 1, rank, rows) for rows in (1, SMALL_BATCH, SMALL_BATCH + 1, PLANES_BATCH)]
    assert found == [planes[0], planes[0], planes[1], planes[1]]
    assert launches.num_planes(k, 1, rank, PLANES_BATCH + 1) == 1
    results = []
    config = ExpandConfig(32, 64, num_warps=4, num_stages=2, steps=1)  # numpy's sums depend on the shape of a product
    ways = [(count, False) for count in (*planes, 1)]
    if tokens == 20:  # once is enough for the interpreter
        ways.append((planes[0], planes[0] > 1))
    for count, summed in ways:
        monkeypatch.setattr(launches, "num_planes", lambda *args, count=count: count)
        monkeypatch.setattr(launches, "sums_planes", lambda *args, summed=summed: summed)
        y, h = layer.y.clone(), torch.full((1, tokens, rank), nan, device=device)
        lora_ops.lora_shrink(layer.x, layer.lora_a, h, layer.plan, -0.7)
        with pinned(tokens, None, config):
            lora_ops.lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.plan, -0.7)
        results.append((y, h.view(torch.int32)))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for y, h in results[1:]:
        assert torch.equal(y.view(bits), results[0][0].view(bits))
        assert torch.equal(h, results[0][1])


def test_twice_gives_the_same_bits(device, dtype):
    layer = make_layer(Case(100, 2048, (96,), 32, 6, "determinism"), dtype, device)
    first, second = layer.y.clone(), layer.y.clone()
    for y in (first, second):
        lora_ops.lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    assert torch.equal(first, second)


def test_more_than_two_to_the_31_elements(device):
    """Row and slot offsets are 64-bit: the last row and the last slot lie beyond 2^31 elements."""
    if device == "cpu":
        pytest.skip("needs 9 GB and a GPU")
    rows, k, rank, slots = 3, 64, 16, 2
    x = torch.randn(rows, k, device=device, dtype=torch.float16)
    far = torch.zeros(2**31 + 4096, device=device, dtype=torch.float16)
    a = far.as_strided((slots, rank, k), (2**31, k, 1))
    a[0].normal_(std=0.1)
    a[1].normal_(std=0.1)
    b = torch.randn(slots, 48, rank, device=device, dtype=torch.float16)
    y_far = torch.zeros(2 * (2**30 + 8) + 64, device=device, dtype=torch.float16)
    y = y_far.as_strided((rows, 48), (2**30 + 8, 1))
    plan = lora_ops.LoraPlan(rows, slots, device)
    plan.update([1, 0, 1])
    expected = torch.zeros(rows, 48, device=device)
    reference.lora_linear(expected, x, [a], [b], plan)
    lora_ops.lora_linear(y, x, [a], [b], plan)
    assert_close(y, expected, tolerance(torch.float16))


def test_tensors_on_two_devices(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    layer = make_layer(CASES[3], torch.float16, device)
    with pytest.raises(ValueError, match="x is on cpu, the weights are on cuda"):
        lora_ops.lora_linear(layer.y, layer.x.cpu(), layer.lora_a, layer.lora_b, layer.plan)
    with pytest.raises(ValueError, match="the plan is on cpu, the weights are on cuda"):
        lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, lora_ops.LoraPlan(64, 4, "cpu"))


def capture(layer: Layer) -> torch.cuda.CUDAGraph:
    """A CUDA graph of lora_linear on the layer's buffers."""

    def run():
        lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("rows", [64, 768])
def test_cuda_graph_replays_follow_the_plan(device, dtype, rows):
    """Captured once for a padded batch, then replayed for plans of other sizes, adapters and none at all."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = Case(rows, 1024, (64, 32), 16, 40, "graph")
    layer = make_layer(case, dtype, device)
    graph = capture(layer)
    for tokens in (rows, 1, rows // 2, 0, rows - 1):
        slots = np.random.default_rng().integers(-1, case.slots, tokens)
        layer.plan.update(slots)
        layer.y.normal_()
        expected = layer.y.float().clone()
        reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        graph.replay()
        assert_close(layer.y, expected, tolerance(dtype))


def test_updates_run_ahead_of_the_gpu(device):
    """Plans sent one after another without a sync: each launch sees its own."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    layer = make_layer(Case(64, 4096, (4096,), 16, 8, "race"), torch.float16, device)
    results, plans = [], []
    for _ in range(50):
        slots = np.random.default_rng().integers(-1, 8, 64)
        layer.plan.update(slots)
        y = torch.zeros(64, 4096, device=device, dtype=torch.float16)
        lora_ops.lora_linear(y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        results.append(y)
        plans.append(slots)
    for y, slots in zip(results, plans, strict=True):
        layer.plan.update(slots)
        expected = torch.zeros(64, 4096, device=device)
        reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        assert_close(y, expected, tolerance(torch.float16))


def test_torch_compile(device, dtype):
    if device == "cpu":
        pytest.skip("needs a GPU; tests/test_ops_compile.py compiles on the CPU")
    layer = make_layer(Case(48, 512, (128, 64), 16, 6, "compile"), dtype, device)
    base = torch.randn(512, layer.y.shape[1], device=device, dtype=dtype)

    def model(x):
        y = x @ base
        args = (layer.plan.arena, layer.plan.counts, [layer.plan.max_tokens, layer.plan.max_slots, 0])
        torch.ops.lora_ops.lora_linear(y, x, layer.lora_a, layer.lora_b, *args, 1.0, 0, True)
        return torch.relu(y) * 2

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (48, 7):
        layer.plan.update(np.random.default_rng().integers(-1, 6, tokens))
        x = layer.x[:tokens].contiguous()
        assert_close(compiled(x), model(x).float(), tolerance(dtype))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside(device, dtype, case, in_place):
    layer = make_layer(case, dtype, device)
    base = torch.randn(case.k, layer.width, device=device, dtype=dtype)
    y = layer.x @ base
    expected = y.to(torch.float32, copy=True)
    lora_ops.reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan, 0.5)
    arguments = (layer.x, layer.lora_a, layer.lora_b, layer.plan, 0.5, in_place)
    result = lora_ops.linear_beside(lambda: layer.x @ base, *arguments)
    assert_close(result, expected, 1.5 * tolerance(dtype))  # the LoRA part is rounded once more
    without = torch.from_numpy(layer.slots < 0).to(device)
    assert torch.equal(result[without], y[without])


@pytest.mark.parametrize("in_place", [False, True])
def test_beside_in_a_cuda_graph(device, in_place):
    """One capture serves later plans: other adapters, rows without, fewer tokens; and a step without any adapter."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    layer = make_layer(Case(48, 512, (128, 64), 16, 6, "graph"), torch.bfloat16, device)
    base = torch.randn(512, layer.width, device=device, dtype=torch.bfloat16)

    def model(x):
        arguments = (x, layer.lora_a, layer.lora_b, layer.plan, 1.0, in_place)
        return torch.relu(lora_ops.linear_beside(lambda: x @ base, *arguments)) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    x = layer.x.contiguous()
    compiled(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compiled(x)
    for tokens, lowest in ((48, 0), (48, -1), (20, -1), (1, 0), (48, 5), (30, None)):
        slots = np.random.default_rng().integers(-1 if lowest is None else lowest, 6, tokens)
        layer.plan.update(np.full(tokens, -1) if lowest is None else slots)
        x.copy_(torch.randn_like(x))
        result.fill_(torch.nan)
        graph.replay()
        expected = (x @ base).float()
        lora_ops.reference.lora_linear(expected, x, layer.lora_a, layer.lora_b, layer.plan)
        assert_close(result, torch.relu(expected) + 1, 1.5 * tolerance(torch.bfloat16))


def test_two_parts_beside_at_once(device):
    """A graph in which both layers' parts are asked for before either is waited for."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    layers = [make_layer(Case(40, 512, (96, 64), 16, 6, "two"), torch.bfloat16, device) for _ in range(2)]
    outs = [torch.empty(40, layer.width, device=device, dtype=torch.bfloat16) for layer in layers]
    deltas = [torch.empty(512, layer.width, device=device, dtype=torch.bfloat16) for layer in layers]
    bases = [torch.randn(512, layer.width, device=device, dtype=torch.bfloat16) for layer in layers]

    def run():
        arguments = [(one.x, one.lora_a, one.lora_b, *plan_args(one.plan), 1.0) for one in layers]
        for delta, rest in zip(deltas, arguments, strict=True):
            torch.ops.lora_ops.lora_delta(delta, *rest)
        for layer, base, out in zip(layers, bases, outs, strict=True):
            torch.mm(layer.x, base, out=out)
        for delta, out, rest in zip(deltas, outs, arguments, strict=True):
            torch.ops.lora_ops.lora_join(delta, out, *rest, False)
            out.add_(delta[:40])

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for layer, delta in zip(layers, deltas, strict=True):
        layer.plan.update(np.random.default_rng().integers(0, 6, 40))
        delta.fill_(torch.nan)
    graph.replay()
    for layer, base, out in zip(layers, bases, outs, strict=True):
        expected = (layer.x @ base).float()
        lora_ops.reference.lora_linear(expected, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        assert_close(out, expected, 2 * tolerance(torch.bfloat16))


def test_equal_slices_at_another_offset_are_another_layer(device, monkeypatch):
    """The offset is compiled in: the second three slices of six equal ones need kernels of their own."""
    seen = []
    monkeypatch.setattr(ops, "compile_plan", lambda kernels, layer, *plan: seen.append(layer))
    layer = make_layer(Case(4, 32, (8,) * 6, 8, 2, "two equal groups"), torch.float16, device)
    layer.plan.update([0, 1, -1, 0])
    lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    h = torch.zeros(6, 4, 8, device=device)
    lora_ops.lora_expand(h, layer.lora_b, layer.y, layer.plan)
    assert len(seen) == len(set(seen)) == 4


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, an element further on in memory."""
    memory = torch.empty(tensor.numel() + 1, device=tensor.device, dtype=tensor.dtype)[1:]
    return memory.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("which", ["x", "y", "lora_a", "lora_b", "h", "out"])
def test_unaligned_memory_is_another_layer(device, monkeypatch, which):
    """Triton compiles for addresses of 16 bytes, or for any."""
    seen = []
    monkeypatch.setattr(ops, "compile_plan", lambda kernels, layer, *plan: seen.append(layer))
    layer = make_layer(Case(4, 32, (8, 16), 8, 2, "aligned"), torch.float16, device)
    layer.plan.update([0, 1, -1, 0])
    tensors = {"x": layer.x.contiguous(), "y": layer.y.contiguous(), "lora_a": layer.lora_a, "lora_b": layer.lora_b}
    tensors["h"] = torch.zeros(2, 4, 8, device=device, dtype=torch.float16)
    tensors["out"] = torch.zeros(2, 4, 8, device=device)

    def run(x, y, lora_a, lora_b, h, out):
        if which in ("x", "lora_a", "out"):
            lora_ops.lora_shrink(x, lora_a, out, layer.plan)
        if which in ("y", "lora_b", "h"):
            lora_ops.lora_expand(h, lora_b, y, layer.plan)
        if which not in ("h", "out"):
            lora_ops.lora_linear(y, x, lora_a, lora_b, layer.plan)

    run(**tensors)
    moved = tensors[which]
    run(**tensors | {which: [shifted(t) for t in moved] if isinstance(moved, list) else shifted(moved)})
    assert len(seen) == len(set(seen)) == (2 if which in ("h", "out") else 4)


@pytest.mark.parametrize("op", ["lora_shrink", "lora_expand", "lora_linear"])
def test_a_layer_without_adapters_is_compiled(device, monkeypatch, op):
    """A server may profile without an adapter, and must compile nothing when the first one comes."""
    seen = []
    monkeypatch.setattr(ops, "compile_plan", lambda kernels, layer, *plan: seen.append(layer))
    layer = make_layer(Case(4, 32, (8, 16), 8, 2, "idle"), torch.float16, device)
    h = torch.zeros(2, 4, 8, device=device)
    for slots in ([-1] * 4, [0, 1, -1, 0]):
        layer.plan.update(slots)
        base = layer.y.clone()
        if op == "lora_shrink":
            lora_ops.lora_shrink(layer.x, layer.lora_a, h, layer.plan)
        elif op == "lora_expand":
            lora_ops.lora_expand(h, layer.lora_b, layer.y, layer.plan)
        else:
            lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
        if slots == [-1] * 4:
            assert len(seen) == 1
            assert torch.equal(layer.y, base)
    assert len(set(seen)) == 1


@pytest.mark.parametrize("warm", ["first call", "warmup"])
def test_nothing_compiles_after(device, warm):
    """The first call of a layer, or warmup(), compiles all its kernels; later batches of any size compile nothing."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    import triton

    case = Case(1030, 768, (80, 48), 24 if warm == "warmup" else 40, 5, "compile once")
    layer = make_layer(case, torch.bfloat16, device)
    layer.x, layer.y = layer.x.contiguous(), torch.randn(1030, 128, device=device, dtype=torch.bfloat16)
    if warm == "warmup":
        lora_ops.warmup([(case.k, case.widths, case.rank)], torch.bfloat16, device)
    else:
        lora_ops.lora_linear(layer.y, layer.x, layer.lora_a, layer.lora_b, layer.plan)
    compiled = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for tokens in (1, 2, 15, 16, 17, 100, 512, 513, 1030):
            layer.plan.update(np.random.default_rng().integers(-1, 5, tokens))
            rows = slice(0, tokens)
            lora_ops.lora_linear(layer.y[rows], layer.x[rows], layer.lora_a, layer.lora_b, layer.plan)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert not compiled
