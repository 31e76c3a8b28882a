"""The MoE kernels against the fp32 reference: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import moe_ops
from moe_ops import launches, ops, reference
from moe_ops.kernels import gate_up as gate_up_module
from moe_ops.kernels.combine import combine
from moe_ops.kernels.gate_up import JOINED_ROWS, gate_up
from moe_ops.kernels.grouped_gemm import grouped_gemm
from moe_ops.kernels.routing import routing_plan
from moe_ops.kernels.tiles import takes_tma
from ops_configs.moe import TILE_ROWS, MoeLayer, moe_default, runs_direct, shared_memory, tile_rows
from ops_patches import counters, library
from ops_patches.debug import KernelError
from tests import test_moe_routing

from .cases import UNIT_ROUNDOFF, assert_close

nan = float("nan")
FP32 = 1e-5


def layer_tolerance(dtype: torch.dtype) -> float:
    """Three independent roundings, of the activation, of an expert's result and of the sum: sqrt(3) unit roundoffs."""
    return 3**0.5 * UNIT_ROUNDOFF[dtype] if dtype in UNIT_ROUNDOFF else FP32


@dataclass(frozen=True)
class Case:
    """M tokens over E experts, `hidden` inputs, `inner` columns of the activation; options of fused_experts."""

    why: str
    tokens: int = 13
    experts: int = 5
    top_k: int = 2
    hidden: int = 72
    inner: int = 40
    bias: bool = False
    left_out: float = 0.0
    one_expert: bool = False
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.why

    def __or__(self, options: dict) -> "Case":
        return replace(self, options=self.options | options)


SWIGLU = {"activation": "swiglu_oai", "swiglu_alpha": 1.3, "swiglu_limit": 0.8}
WITHOUT_PLAN = [
    Case("a few choices", tokens=5, experts=40, top_k=3),
    Case("a few choices, ids of -1 and biases", tokens=9, experts=50, top_k=4, bias=True, left_out=0.5),
    Case("a few choices, nothing is here", tokens=9, experts=50, top_k=4, left_out=1.0),
    Case("a few choices, all on one expert", tokens=20, experts=64, top_k=3, one_expert=True),
    Case("a few choices, ungated, rows that TMA does not take", tokens=7, experts=40, top_k=5, hidden=37, inner=21)
    | {"gated": False, "apply_router_weight_on_input": True},
    Case("a few choices, interleaved", tokens=6, experts=17, bias=True) | SWIGLU | {"interleaved": True},
    Case("a few choices, scaled", tokens=6, experts=13, hidden=272, inner=136) | {"routed_scaling": 2.5},
    Case("as many choices as a plan is left out for", tokens=32, experts=256, top_k=8, hidden=24, inner=12),
]
"""Batches whose tiles find their rows by themselves."""
CASES = [
    *WITHOUT_PLAN,
    Case("plain"),
    Case("one token", tokens=1, top_k=1),
    Case("no tokens", tokens=0),
    Case("two tokens, choice by choice", tokens=2, experts=40, top_k=3, bias=True, options={"routed_scaling": 2.5}),
    Case("two tokens, ids of -1", tokens=2, experts=33, top_k=4, left_out=0.5, hidden=37, inner=21),
    Case("two tokens, interleaved", tokens=2, experts=17, bias=True, options=SWIGLU | {"interleaved": True}),
    Case("four tokens, ungated", tokens=4, experts=48, options={"gated": False, "apply_router_weight_on_input": True}),
    Case("rows that TMA does not take", hidden=37, inner=21),
    Case("experts without tokens", tokens=3, experts=60, top_k=4),
    Case("one expert of one", experts=1, top_k=1),
    Case("all tokens on one expert", tokens=90, experts=9, top_k=1, one_expert=True),
    Case("tiles of 64 rows", tokens=70, experts=3, top_k=2),
    Case("tiles of 128 rows", tokens=200, experts=2, top_k=2, hidden=160, inner=136),
    Case("a tile of 128 rows, at most half full", tokens=165, experts=1, top_k=1, hidden=160, inner=136),
    Case("top 8", experts=16, top_k=8),
    Case("top 32 of few", tokens=4, experts=3, top_k=32),
    Case("ids of -1, tokens without expert", tokens=20, left_out=0.6),
    Case("nothing is here", left_out=1.0),
    Case("biases", bias=True),
    Case("biases, ids of -1", bias=True, left_out=0.4, options={"routed_scaling": 2.5}),
    Case("gelu", options={"activation": "gelu"}),
    Case("gelu_tanh", options={"activation": "gelu_tanh"}),
    Case("relu2", options={"activation": "relu2"}),
    Case("clamped swiglu", bias=True, options=SWIGLU),
    Case("interleaved clamped swiglu", bias=True, options=SWIGLU | {"interleaved": True}),
    Case("interleaved, rows that TMA does not take", hidden=41, options={"interleaved": True}),
    Case("interleaved, tiles of 64 rows", tokens=30, experts=3, inner=90, options={"interleaved": True}),
    Case(
        "interleaved, a full tile of 128 rows and a short one",
        tokens=165,
        experts=1,
        top_k=1,
        hidden=160,
        inner=136,
        bias=True,
        options=SWIGLU | {"interleaved": True},
    ),
    Case("biases, tiles of 64 rows", tokens=30, experts=3, inner=90, bias=True),
    Case(
        "routed weight on the input, tiles of 64 rows",
        tokens=30,
        experts=3,
        options={"apply_router_weight_on_input": True},
    ),
    Case("ungated silu", options={"gated": False}),
    Case("ungated relu2 with biases", bias=True, options={"gated": False, "activation": "relu2"}),
    Case("routed weight on the input", options={"apply_router_weight_on_input": True}),
    Case("routed weight on the input, ungated", options={"gated": False, "apply_router_weight_on_input": True}),
    Case("as gpt-oss", tokens=5, experts=3, hidden=2880, inner=90, bias=True, options=SWIGLU | {"interleaved": True}),
]


def draw(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype).to(device)


def make_layer(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Fresh random arguments of fused_experts. Weights of choices without expert are NaN: nobody may read them."""
    ids = torch.rand(case.tokens, max(case.experts, case.top_k)).argsort(1)[:, : case.top_k] % case.experts
    if case.one_expert:
        ids = torch.full_like(ids, case.experts - 2)
    left_out = torch.rand(ids.shape) < case.left_out
    weights = torch.rand(ids.shape).masked_fill(left_out, nan)
    rows = case.inner * (2 if case.options.get("gated", True) else 1)
    layer = {
        "hidden": draw(case.tokens, case.hidden, dtype=dtype, device=device),
        "w13": draw(case.experts, rows, case.hidden, dtype=dtype, device=device, scale=case.hidden**-0.5),
        "w2": draw(case.experts, case.hidden, case.inner, dtype=dtype, device=device, scale=case.inner**-0.5),
        "topk_weights": weights.to(device),
        "topk_ids": ids.masked_fill(left_out, -1).int().to(device),
    }
    if case.bias:
        layer["bias13"] = draw(case.experts, rows, dtype=dtype, device=device)
        layer["bias2"] = draw(case.experts, case.hidden, dtype=dtype, device=device)
    return layer | case.options


def in_fp32(layer: dict) -> dict:
    return {
        name: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in layer.items()
    }


@pytest.fixture
def poisoned():
    """Whatever is allocated and not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("tokens", [1, 20], ids=["choice by choice", "with a plan"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_stays_nan(activation, gated, tokens, device):
    """What is no number must not be clamped to one."""
    if activation == "swiglu_oai" and not gated:
        pytest.skip("it needs a gate")
    case = Case("", tokens=tokens, options={"activation": activation, "gated": gated})
    layer = make_layer(case, torch.float16, device)
    layer["hidden"][0, 3] = nan
    ours = moe_ops.fused_experts(**layer)
    assert ours[0].isnan().all()
    assert ours[1:].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case, dtype, device, poisoned):
    layer = make_layer(case, dtype, device)
    before = counters.snapshot()["hit"].get("fused_experts", 0)
    ours = moe_ops.fused_experts(**layer)
    assert ours.dtype == dtype
    assert_close(ours, reference.fused_experts(**in_fp32(layer)), layer_tolerance(dtype))
    alone = (layer["topk_ids"] == -1).all(1)
    assert not ours[alone].any(), "tokens without expert are zero"
    assert counters.snapshot()["hit"]["fused_experts"] == before + 1


def test_cases_reach_every_tile_and_both_ways_to_read(device):
    """That the cases are what they say."""
    tiles = {tile_rows(case.tokens, case.experts, case.top_k) for case in CASES}
    assert tiles == {16, 64, 128}
    large = [c for c in CASES if tile_rows(c.tokens, c.experts, c.top_k) >= JOINED_ROWS and c.hidden % 8 == 0]
    joined = {(tile_rows(c.tokens, c.experts, c.top_k), c.options.get("interleaved", False)) for c in large}
    assert joined == {(64, False), (64, True), (128, False), (128, True)}, "gates and ups are one product"
    direct = [c for c in CASES if runs_direct(MoeLayer(c.experts, c.top_k, c.hidden, c.inner), c.tokens)]
    assert {case.tokens for case in direct} >= {1, 2, 4}
    if device == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        read = {takes_tma(make_layer(case, torch.float16, device)["w13"]) for case in CASES}
        assert read == {True, False}


def watch_plans(monkeypatch) -> list[bool]:
    """Whether the batches that run in tiles from now on have a plan."""
    planned, run_tiles = [], launches.run_tiles

    def watched(*args, **options):
        planned.append(args[7])
        run_tiles(*args, **options)

    monkeypatch.setattr(launches, "run_tiles", watched)
    return planned


def watch_launches(monkeypatch, module, name: str) -> list[tuple[tuple, dict]]:
    """Grid and constants of the launches of a kernel from now on."""
    kernel, launched = getattr(module, name), []

    class Watched:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                launched.append((grid, constants))
                return kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(module, name, Watched())
    return launched


def test_without_a_plan_are_the_bits_of_a_plan(monkeypatch, dtype, device, poisoned):
    planned = watch_plans(monkeypatch)
    for case in WITHOUT_PLAN:
        layer = make_layer(case, dtype, device)
        layer["topk_ids"] = layer["topk_ids"].long()
        ours = moe_ops.fused_experts(**layer)
        with monkeypatch.context() as patch:
            patch.setattr(launches, "runs_without_plan", lambda *_: False)
            assert torch.equal(moe_ops.fused_experts(**layer), ours), case
    assert planned == [False, True] * len(WITHOUT_PLAN)


@pytest.mark.parametrize("tokens", [16, 17])
def test_more_choices_have_a_plan(monkeypatch, tokens, device):
    planned = watch_plans(monkeypatch)
    layer = make_layer(Case("", tokens=tokens, experts=64, top_k=4), torch.float16, device)
    moe_ops.fused_experts(**layer)
    assert planned == [tokens == 17]


def test_wide_ids_and_strided_rows(dtype, device, poisoned):
    """int64 ids, hidden as a window of a wider tensor, or transposed: as the reference."""
    layer = make_layer(Case("plain"), dtype, device)
    expected = reference.fused_experts(**in_fp32(layer))
    layer["topk_ids"] = layer["topk_ids"].long()
    wide = torch.full((layer["hidden"].shape[0], 100), nan, dtype=dtype, device=device)
    wide[:, 11 : 11 + layer["hidden"].shape[1]] = layer["hidden"]
    windowed = wide[:, 11 : 11 + layer["hidden"].shape[1]]
    for hidden in (windowed, layer["hidden"].T.contiguous().T):
        assert_close(moe_ops.fused_experts(**layer | {"hidden": hidden}), expected, layer_tolerance(dtype))


@pytest.mark.parametrize(("experts", "tokens"), [(7, 13), (91, 8)], ids=["with a plan", "without"])
def test_ranks_of_expert_parallel_sum_to_the_layer(monkeypatch, experts, tokens, dtype, device, poisoned):
    planned = watch_plans(monkeypatch)
    layer = make_layer(Case("", tokens=tokens, experts=experts, top_k=3, bias=True), dtype, device)
    owner = torch.arange(experts) % 2
    total = 0
    for rank in (0, 1):
        mine = torch.nonzero(owner == rank).flatten()
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        local = {name: layer[name][mine.to(device)] for name in ("w13", "w2", "bias13", "bias2")}
        total = total + moe_ops.fused_experts(**layer | local, expert_map=expert_map.to(device)).float()
    assert planned == [experts == 7] * 2
    assert_close(total, reference.fused_experts(**in_fp32(layer)), layer_tolerance(dtype))


def test_deterministic(dtype, device):
    layer = make_layer(Case("", tokens=40, experts=6, top_k=3), dtype, device)
    assert torch.equal(moe_ops.fused_experts(**layer), moe_ops.fused_experts(**layer))


@pytest.mark.usefixtures("products_in_order")
def test_bits_of_a_token_do_not_depend_on_the_others(dtype, device):
    """Within one tile size: more tokens, in another order."""
    layer = make_layer(Case("", tokens=30, experts=16, top_k=3), dtype, device)
    assert tile_rows(30, 16, 3) == tile_rows(7, 16, 3)
    whole = moe_ops.fused_experts(**layer)
    some = torch.randperm(30)[:7].to(device)
    part = {name: layer[name][some] for name in ("hidden", "topk_weights", "topk_ids")}
    assert torch.equal(moe_ops.fused_experts(**layer | part), whole[some])


@pytest.mark.parametrize("rows", TILE_ROWS)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "in row order"])
@pytest.mark.parametrize(("k", "n"), [(72, 40), (45, 33), (128, 64)])
def test_grouped_gemm(rows, gather, k, n, dtype, device):
    """Rows of the plan are written, each of them; rows without expert keep what they had."""
    ids = torch.randint(-1, 4, (45, 3), dtype=torch.int32)
    plan = moe_ops.routing_plan(ids.to(device), 4, rows)
    live = torch.arange(ids.numel(), device=device) < plan.starts[-1]
    x = draw(45 if gather else ids.numel(), k, dtype=dtype, device=device)
    if not gather:
        x[~live] = nan
    w, bias = draw(4, n, k, dtype=dtype, device=device, scale=k**-0.5), draw(4, n, dtype=dtype, device=device)
    weights = torch.rand(ids.shape, device=device)
    out = torch.full((ids.numel(), n), nan, dtype=dtype, device=device)
    config = moe_default(rows, 45, 4, 3, n, k, itemsize=dtype.itemsize)
    grouped_gemm(x, w, out, plan, config, gather=gather, bias=bias, weights=weights.flatten())
    expected = reference.grouped_gemm(
        x.float(), w.float(), plan, gather, bias=bias.float(), topk_weights=weights.float()
    )
    assert_close(out[live], expected[live], UNIT_ROUNDOFF.get(dtype, FP32))
    assert out[~live].isnan().all()
    ours = moe_ops.grouped_gemm(x, w, plan, gather, bias=bias, topk_weights=weights)
    assert torch.equal(ours[live], out[live])
    assert not ours[~live].any()
    plain = moe_ops.grouped_gemm(x, w, plan, gather)
    expected = reference.grouped_gemm(x.float(), w.float(), plan, gather)
    assert_close(plain, expected, UNIT_ROUNDOFF.get(dtype, FP32))


def test_grouped_gemm_of_no_tokens(dtype, device):
    plan = moe_ops.routing_plan(torch.empty(0, 2, dtype=torch.int32, device=device), 3, 16)
    w = draw(3, 24, 40, dtype=dtype, device=device)
    assert moe_ops.grouped_gemm(w[0, :0], w, plan).shape == (0, 24)


def test_gate_up_writes_the_rows_of_the_plan_only(dtype, device):
    ids = torch.randint(-1, 4, (20, 2), dtype=torch.int32).to(device)
    plan = moe_ops.routing_plan(ids, 4, 16)
    live = torch.arange(40, device=device) < plan.starts[-1]
    x, w13 = draw(20, 72, dtype=dtype, device=device), draw(4, 80, 72, dtype=dtype, device=device, scale=72**-0.5)
    out = torch.full((40, 40), nan, dtype=dtype, device=device)
    gate_up(x, w13, out, plan, moe_default(16, 20, 4, 2, 40, 72, 2, dtype.itemsize), activation="gelu")
    expected = reference.activate(reference.grouped_gemm(x.float(), w13.float(), plan, gather=True), "gelu")
    assert_close(out[live], expected[live], UNIT_ROUNDOFF.get(dtype, FP32))
    assert out[~live].isnan().all()


@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "in row order"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("block_m", [16, JOINED_ROWS])
def test_persistent_programs_of_gate_up_share_out_all_tiles(monkeypatch, block_m, interleaved, gather, dtype, device):
    """Bit for bit what a program a tile makes; with tiles that are full and not, and fewer tiles than programs."""
    launched = watch_launches(monkeypatch, gate_up_module, "gate_up_kernel")
    monkeypatch.setattr(gate_up_module, "multiprocessors", lambda device: 3)
    w13 = draw(4, 80, 72, dtype=dtype, device=device, scale=72**-0.5)
    expected = []
    for tokens in (130, 1):
        ids = torch.randint(-1, 3, (tokens, 2), dtype=torch.int32).to(device)  # the last expert has no tokens
        plan = moe_ops.routing_plan(ids, 4, block_m)
        x = draw(tokens if gather else 2 * tokens, 72, dtype=dtype, device=device)
        config = moe_default(block_m, tokens, 4, 2, 40, 72, 2, dtype.itemsize)
        programs = plan.tile_experts.shape[0] * -(-40 // config.block_n)
        expected += [((programs,), False), ((min(programs, 3),), True) if dtype.itemsize == 2 else ((programs,), False)]
        outs = [torch.full((2 * tokens, 40), nan, dtype=dtype, device=device) for _ in range(2)]
        for out, persistent in zip(outs, (False, True), strict=True):
            chosen = replace(config, group_m=3, persistent=persistent, tma_store=persistent)
            gate_up(x, w13, out, plan, chosen, interleaved=interleaved, gather=gather)
        assert torch.equal(outs[0].nan_to_num(7.0), outs[1].nan_to_num(7.0))
    assert [(grid, constants["PERSISTENT"]) for grid, constants in launched] == expected  # TMA reads no fp32 here


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@pytest.mark.parametrize("n", [40, 1100])
def test_combine_sums_in_the_order_of_k(top_k, n, dtype, device):
    """Bit for bit the fp32 sum of a loop over k; every row is written, rows without expert are not read."""
    ids = torch.randint(-1, 6, (17, top_k), dtype=torch.int32).to(device)
    ids[3] = -1
    plan = moe_ops.routing_plan(ids, 6, 16)
    y = draw(17 * top_k, n, dtype=dtype, device=device)
    y[plan.starts[-1] :] = nan
    out = torch.full((17, n), nan, dtype=dtype, device=device)
    combine(y, out, plan, 0.7)
    total = torch.zeros(17, n, device=device)
    for k in range(top_k):
        row = plan.rows.view(17, top_k)[:, k].long()
        total += torch.where(ids[:, k, None] >= 0, y[row].float(), 0)
    assert torch.equal(out, (torch.tensor(0.7, device=device) * total).to(dtype))
    assert not out[3].any()


ROUTINGS = {name: case for name, case in test_moe_routing.CASES.items() if case[0] > 0}
ROUTINGS["several chunks, some ids are -1"] = (700, 5, 300, "none too")
ROUTINGS["a chunk of 2048"] = (390, 5, 60, "none too")


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("ids_dtype", "mapped"), [(torch.int32, False), (torch.int64, True)])
def test_plan_is_that_of_torch(name, ids_dtype, mapped, device, poisoned):
    """Every array, bit for bit."""
    tokens, top_k, experts, draw_as = ROUTINGS[name]
    rng = np.random.default_rng()
    ids = torch.from_numpy(test_moe_routing.draw_ids(tokens, top_k, experts, draw_as, rng)).to(ids_dtype).to(device)
    expert_map, local = None, experts
    if mapped:
        local = (experts + 1) // 2
        expert_map = torch.full((experts,), -1, dtype=ids_dtype)
        expert_map[torch.randperm(experts)[:local]] = torch.arange(local, dtype=ids_dtype)
        expert_map = expert_map.to(device)
    for rows in (1, 16, 128):
        args = (ids, local, rows, expert_map)
        ours, expected = (test_moe_routing.arrays(plan(*args)) for plan in (routing_plan, moe_ops.routing_plan))
        for array, values in expected.items():
            assert ours[array].dtype == torch.int32
            assert torch.equal(ours[array], values), array


@pytest.mark.parametrize("tokens", [1, 30])
def test_ids_and_weights_of_any_stride(tokens, device):
    """One column of wider tensors, whose reshape keeps the stride."""
    layer = make_layer(Case("", tokens=tokens, experts=6, top_k=1), torch.float16, device)
    expected = reference.fused_experts(**in_fp32(layer))
    for name, other in (("topk_ids", 5 - layer["topk_ids"]), ("topk_weights", -layer["topk_weights"])):
        layer[name] = torch.cat([layer[name], other], 1)[:, :1]
        assert layer[name].stride(0) == 2
    assert_close(moe_ops.fused_experts(**layer), expected, layer_tolerance(torch.float16))
    plan = routing_plan(layer["topk_ids"], 6, 16)
    for name in ops.PLAN_ARRAYS:
        assert torch.equal(getattr(plan, name), getattr(moe_ops.routing_plan(layer["topk_ids"], 6, 16), name)), name


def test_plan_scans_more_chunks_than_a_step_takes(monkeypatch, device):
    monkeypatch.setattr("moe_ops.kernels.routing.SCAN_CHUNKS", 2)
    ids = torch.randint(-1, 30, (900, 6), dtype=torch.int32, device=device)
    ours, torchs = routing_plan(ids, 30, 16), moe_ops.routing_plan(ids, 30, 16)
    for name in ops.PLAN_ARRAYS:
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name


def test_bf16_on_the_cpu_takes_the_reference():
    layer = make_layer(Case("", bias=True), torch.bfloat16, "cpu")
    assert torch.equal(moe_ops.fused_experts(**layer), reference.fused_experts(**layer))


@pytest.mark.parametrize("launch", ["routing_plan", "gate_up", "grouped_gemm", "combine"])
def test_a_fault_names_the_op(launch, device, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("injected fault")

    monkeypatch.setattr(f"moe_ops.launches.{launch}", broken)
    counters.reset()
    with pytest.raises(KernelError, match=r"^fused_experts failed: RuntimeError: injected fault\n(.*\n)* *hidden: "):
        moe_ops.fused_experts(**make_layer(Case("plain"), torch.float16, device))
    snapshot = counters.snapshot()
    assert snapshot["error"] == {"fused_experts": {"KernelError": 1}}
    assert snapshot["hit"] == snapshot["fallback"] == {}


def test_without_the_interpreter_the_cpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr(library, "INTERPRET", False)
    layer = make_layer(Case("", left_out=0.2), torch.float16, "cpu")
    assert torch.equal(moe_ops.fused_experts(**layer), reference.fused_experts(**layer))
    plan = moe_ops.routing_plan(layer["topk_ids"], 5, 7)
    bias, weights = torch.randn(5, 80), layer["topk_weights"]
    args = (layer["hidden"], layer["w13"], plan, True)
    expected = reference.grouped_gemm(*args, bias=bias, topk_weights=weights)
    assert torch.equal(moe_ops.grouped_gemm(*args, bias=bias, topk_weights=weights), expected)


def test_schemas_and_fakes(device):
    layer = make_layer(Case("", bias=True), torch.float32, device)
    order = [a.name for a in torch.ops.moe_ops.fused_experts.default._schema.arguments]
    rest = {
        "activation": "silu",
        "gated": True,
        "interleaved": False,
        "swiglu_alpha": 1.7,
        "swiglu_limit": 7.0,
        "expert_map": None,
        "apply_router_weight_on_input": False,
        "routed_scaling": 1.0,
        **dict.fromkeys(("quant", "w13_scale", "w2_scale", "a1_scale", "a2_scale", "block_shape")),
        "per_token": False,
        "power_of_two_scales": False,
        "global_experts": 10,
    }
    args = tuple((layer | rest)[name] for name in order)
    test_utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moe_ops.fused_experts.default, args, test_utils=test_utils)
    out = torch.empty_like(layer["hidden"])
    for more in ((), tuple(room(Case(""), layer["hidden"]).values())):
        torch.library.opcheck(torch.ops.moe_ops.fused_experts_out.default, (out, *args, *more), test_utils=test_utils)
    plan = moe_ops.routing_plan(layer["topk_ids"], 5, 16)
    args = (layer["hidden"], layer["w13"], *ops._plan_args(plan), True, *[None] * 6)
    torch.library.opcheck(torch.ops.moe_ops.grouped_gemm.default, args, test_utils=test_utils)


def test_compiles_as_one_graph(device):
    layer = make_layer(Case("", options={"activation": "gelu"}), torch.float32, device)
    tensors = ("hidden", "topk_weights", "topk_ids")

    def model(hidden, topk_weights, topk_ids):
        given = {"hidden": 2 * hidden, "topk_weights": topk_weights, "topk_ids": topk_ids}
        return moe_ops.fused_experts(**layer | given) + hidden

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (13, 5):
        args = [layer[name][:tokens] for name in tensors]
        torch.testing.assert_close(compiled(*args), model(*args))


@pytest.mark.parametrize("alias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_out(alias, compiled, device):
    """Written and returned, in place of hidden too, and where a graph reads it afterwards."""
    layer = make_layer(Case("", left_out=0.2), torch.float32, device)
    expected = moe_ops.fused_experts(**layer)
    hidden = layer.pop("hidden")
    out = hidden if alias else torch.full_like(hidden, nan)

    def model(hidden, out):
        return moe_ops.fused_experts(hidden, **layer, out=out) + 1

    if compiled:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(hidden, out), expected + 1)
    torch.testing.assert_close(out, expected)
    if not compiled:
        assert moe_ops.fused_experts(hidden, **layer, out=out) is out


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda out: out.half(), TypeError, "out is torch.float16, hidden is torch.float32"),
        (lambda out: out[:-1], ValueError, r"out has shape \(12, 72\), .* \[13, 72\]"),
        (lambda out: out.T.contiguous().T, ValueError, "out has strides .* must be contiguous"),
        (lambda out: out[:1].expand(13, -1), ValueError, r"out has strides \(0, 1\), it must be contiguous"),
    ],
)
def test_bad_out_is_named(change, error, message, device):
    layer = make_layer(Case(""), torch.float32, device)
    with pytest.raises(error, match=message):
        moe_ops.fused_experts(**layer, out=change(layer["hidden"].clone()))


def room(case: Case, hidden: torch.Tensor, more: int = 0) -> dict[str, torch.Tensor]:
    """Memory for the intermediates, full of NaN."""
    sizes = {"h": case.inner, "y": case.hidden}
    rows = case.tokens * case.top_k
    return {name: torch.full_like(hidden[:1, :1].expand(rows * n + more, 1), nan)[:, 0] for name, n in sizes.items()}


@pytest.mark.parametrize("case", [Case("plain", left_out=0.2), WITHOUT_PLAN[0], Case("choice by choice", tokens=1)])
@pytest.mark.parametrize("compiled", [True, False])
def test_intermediates_in_memory_that_is_given(case, compiled, device):
    """The same bits; beyond what they need nothing is written, and nothing at all by a few tokens."""
    layer = make_layer(case, torch.float32, device)
    given = room(case, layer["hidden"], more=7)

    def model(given):
        return moe_ops.fused_experts(**layer, **given) + 1

    if compiled:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(model(given), moe_ops.fused_experts(**layer) + 1)
    tiled = not runs_direct(MoeLayer(case.experts, case.top_k, case.hidden, case.inner), case.tokens)
    for memory in given.values():
        assert memory[-7:].isnan().all()
        assert memory.isnan().all() != tiled


def test_one_of_the_intermediates_may_be_given(device):
    case = Case("")
    layer = make_layer(case, torch.float32, device)
    for name, memory in room(case, layer["hidden"]).items():
        assert torch.equal(moe_ops.fused_experts(**layer, **{name: memory}), moe_ops.fused_experts(**layer))
        assert not memory.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given, hidden: {"h": given["h"][1:]}, "h is torch.float32 of 1039 elements .* at least 1040: give"),
        (lambda given, hidden: {"y": given["y"].double()}, "y is torch.float64 of 1872 .* contiguous torch.float32"),
        (lambda given, hidden: {"y": given["y"].repeat(2)[::2]}, r"y is .* strides \(2,\)"),
        (lambda given, hidden: {"h": given["y"]}, "y overlaps h: give memory of its own"),
        (lambda given, hidden: {"out": given["y"][: hidden.numel()].view_as(hidden)}, "y overlaps out"),
    ],
)
def test_bad_memory_for_intermediates_is_named(change, message, device):
    case = Case("")
    layer = make_layer(case, torch.float32, device)
    given = room(case, layer["hidden"])
    with pytest.raises(ValueError, match=f"fused_experts: {message}"):
        moe_ops.fused_experts(**layer, **(given | change(given, layer["hidden"])))


def test_memory_for_intermediates_between_the_rows_of_hidden_is_named(device):
    case = Case("")
    layer = make_layer(case, torch.float32, device)
    needed = case.tokens * case.top_k * case.inner
    memory = torch.zeros(case.tokens, needed, device=device)
    layer["hidden"] = memory[:, : case.hidden].copy_(layer["hidden"])
    with pytest.raises(ValueError, match="fused_experts: h overlaps hidden"):
        moe_ops.fused_experts(**layer, h=memory.view(-1)[case.hidden :][:needed])


def test_cuda_graph_follows_its_ids(dtype, device):
    """No host sync, and a replay plans the ids of its own step."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = Case("", tokens=24, experts=8, top_k=3, left_out=0.2)
    layer = make_layer(case, dtype, device)
    moe_ops.fused_experts(**layer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_ops.fused_experts(**layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ops.fused_experts(**layer)
    for _ in range(3):
        other = make_layer(case, dtype, device)
        for name in ("hidden", "topk_weights", "topk_ids"):
            layer[name].copy_(other[name])
        graph.replay()
        assert torch.equal(out, moe_ops.fused_experts(**layer))
        assert_close(out, reference.fused_experts(**in_fp32(layer)), layer_tolerance(dtype))


def quantised(layer: dict) -> dict:
    return {"w13": layer["w13"].to(torch.float8_e4m3fn), "w2": layer["w2"].to(torch.float8_e4m3fn)}


SUPPORTED = "supported is one of float16, bfloat16, float32 for all of them"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (quantised, TypeError, "w13 is torch.float8_e4m3fn: give quant = fp8_w8a8, and the scales"),
        (lambda layer: {"w2": layer["w2"].to(torch.int8)}, TypeError, "w2 is torch.int8: give quant = int8_w8a8 or"),
        (lambda layer: {"w2": layer["w2"].int()}, TypeError, "w2 is torch.int32, expected a floating dtype"),
        (lambda layer: {"hidden": layer["hidden"].float()}, TypeError, f"hidden float32, w13 float16, .*{SUPPORTED}"),
        (lambda layer: {"w2": layer["w2"].mT.contiguous().mT}, ValueError, "w2 has strides .* must be contiguous"),
        (lambda layer: {"activation": "tanh"}, ValueError, "activation is 'tanh', expected one of silu"),
        (lambda layer: {"gated": False}, ValueError, r"w13 has shape .* \[5, 40, 72\]"),
        (lambda layer: {"topk_ids": layer["topk_ids"].float()}, TypeError, "topk_ids is torch.float32"),
    ],
)
@pytest.mark.parametrize("interpreter", [True, False])
def test_bad_input_of_the_layer_is_named(change, error, message, interpreter, device, monkeypatch):
    """The same error with kernels and without; it is counted."""
    monkeypatch.setattr(library, "INTERPRET", interpreter)
    layer = make_layer(Case(""), torch.float16, device)
    before = counters.snapshot()["error"].get("fused_experts", {}).get(error.__name__, 0)
    with pytest.raises(error, match=message):
        moe_ops.fused_experts(**layer | change(layer))
    assert counters.snapshot()["error"]["fused_experts"][error.__name__] == before + 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": torch.zeros(5, 39)}, ValueError, r"bias has shape \(5, 39\), .* \[5, 40\]"),
        ({"topk_weights": torch.zeros(13, 1)}, ValueError, r"topk_weights has shape \(13, 1\), .* \[13, 2\]"),
        ({"topk_weights": torch.zeros(13, 2).int()}, TypeError, "topk_weights is torch.int32"),
        ({"w": torch.zeros(5, 40, 72).half()}, TypeError, f"x float32, w float16; {SUPPORTED}"),
        ({"rows": 8}, ValueError, "the plan has tiles of 8 rows, the kernels take 16, 32, 64, 128"),
    ],
)
def test_bad_input_of_grouped_gemm_is_named(change, error, message, device):
    args = {"x": torch.zeros(26, 72), "w": torch.zeros(5, 40, 72), "rows": 16} | change
    plan = moe_ops.routing_plan(torch.randint(0, 5, (13, 2)).to(device), 5, args.pop("rows"))
    with pytest.raises(error, match=message):
        moe_ops.grouped_gemm(plan=plan, **{name: tensor.to(device) for name, tensor in args.items()})


SHAPES = {"qwen3-30b": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "gpt-oss": (32, 4, 2880, 2880)}


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_defaults_fit_shared_memory_and_the_tile(model, itemsize):
    """227 KiB is what a program may have on compute capability 9.0; block_k is one for all batches of a tile size."""
    experts, top_k, hidden, inner = SHAPES[model]
    block_k: dict[int, set[int]] = {}
    for tokens in (1, 2, 8, 64, 100, 512, 1024, 4096, 16384):
        rows = tile_rows(tokens, experts, top_k, itemsize)
        assert rows in TILE_ROWS
        for n, k, products in ((inner, hidden, 2), (hidden, inner, 1)):
            config = moe_default(rows, tokens, experts, top_k, n, k, products, itemsize)
            assert config.block_m == rows
            assert shared_memory(config, products, itemsize, k) <= 227 * 1024 - 1024
            block_k.setdefault((rows, products), set()).add(config.block_k)
    assert all(len(values) == 1 for values in block_k.values())
