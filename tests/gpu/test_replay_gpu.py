"""Launches made again on a GPU: the bits of a batch that launches by itself."""

import numpy as np
import pytest
import torch

import lora_ops.ops
import moe_ops.ops
from ops_patches import counters, recording
from tests.kernels import cases, test_moe_ops, test_moe_quant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

QUANTISED = test_moe_ops.Case("quantised", tokens=40, experts=12, top_k=3, hidden=96, inner=64)
MANY = test_moe_ops.Case("many choices", tokens=3000, experts=8, top_k=2, hidden=512, inner=256)
WIDE = test_moe_ops.Case("tiles of 128 rows", tokens=2000, experts=4, top_k=2, hidden=256, inner=2048)


@pytest.fixture
def replays(monkeypatch):
    """Batches that were made again, each as many launches."""
    made = []
    call = recording.Replay.__call__

    def counted(self, addresses):
        made.append(len(self._steps))
        call(self, addresses)

    monkeypatch.setattr(recording.Replay, "__call__", counted)
    return made


def by_itself(monkeypatch, function, *args, **options):
    """The result of a call whose launches are not made again."""
    with monkeypatch.context() as patch:
        for ops in (lora_ops.ops, moe_ops.ops):
            for name, value in list(vars(ops).items()):
                if hasattr(value, "__wrapped__") and (name.endswith("_kernels") or name == "_replayed_layer"):
                    patch.setattr(ops, name, value.__wrapped__)
        return function(*args, **options)


def check_moe(monkeypatch, replays, make) -> None:
    layers = [make() for _ in range(4)]
    expected = [by_itself(monkeypatch, moe_ops.fused_experts, **layer) for layer in layers]
    out = [torch.full_like(layer["hidden"], torch.nan) for layer in layers]
    for layer, result in zip(layers, out, strict=True):
        moe_ops.fused_experts(**layer, out=result)
    assert len(replays) >= len(layers) - 1
    for result, bits in zip(out, expected, strict=True):
        assert torch.equal(result, bits)
    in_place = layers[0]["hidden"].clone()
    for _ in range(2):
        in_place.copy_(layers[0]["hidden"])
        moe_ops.fused_experts(**layers[0] | {"hidden": in_place}, out=in_place)
        assert torch.equal(in_place, expected[0])


@pytest.mark.parametrize("case", [*test_moe_ops.CASES, MANY, WIDE], ids=str)
def test_moe(monkeypatch, replays, case):
    """Rows of these cases that TMA takes and that it does not, with a plan and without, choice by choice."""
    check_moe(monkeypatch, replays, lambda: test_moe_ops.make_layer(case, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("scheme", test_moe_quant.SCHEMES)
@pytest.mark.parametrize("inference", [False, True])
def test_quantised_moe(monkeypatch, replays, scheme, inference):
    with torch.inference_mode(inference):
        check_moe(
            monkeypatch, replays, lambda: test_moe_quant.make_quantised(QUANTISED, scheme, torch.bfloat16, "cuda")
        )


def test_ids_in_a_larger_tensor(monkeypatch, replays):
    """They are copied first: such a batch runs each time."""
    layer = test_moe_ops.make_layer(MANY, torch.bfloat16, "cuda")
    layer["topk_ids"] = torch.nn.functional.pad(layer["topk_ids"], (0, 1))[:, :-1]
    expected = by_itself(monkeypatch, moe_ops.fused_experts, **layer)
    for _ in range(3):
        assert torch.equal(moe_ops.fused_experts(**layer), expected)
    assert replays == []


LORA = [
    cases.Case(40, 256, (128, 64, 64), 16, 5, "decode"),
    cases.Case(700, 256, (128, 64, 64), 16, 5, "many rows"),
    cases.Case(64, 25600, (512,), 64, 5, "planes that a kernel sums"),
    cases.Case(40, 256, (32,) * 7, 16, 5, "more slices than a launch takes"),
]


@pytest.mark.parametrize("case", LORA, ids=lambda case: case.why if hasattr(case, "why") else str(case))
@pytest.mark.parametrize("how", ["linear", "halves", "beside", "beside, in place"])
def test_lora(monkeypatch, replays, case, how):
    def run(layer, y):
        weights = layer.lora_a, layer.lora_b, layer.plan
        if how == "linear":
            lora_ops.lora_linear(y, layer.x, *weights)
        elif how == "halves":
            h = torch.full((len(case.widths), case.tokens, case.rank), torch.nan, device="cuda")
            lora_ops.lora_shrink(layer.x, layer.lora_a, h, layer.plan)
            lora_ops.lora_expand(h, layer.lora_b, y, layer.plan)
        else:
            return lora_ops.linear_beside(lambda: y, layer.x, *weights, in_place=how != "beside")
        return y

    layers = [cases.make_layer(case, torch.bfloat16, "cuda") for _ in range(4)]
    starts = [layer.y[:, : sum(case.widths)] for layer in layers]
    expected = [by_itself(monkeypatch, run, layer, y.clone()) for layer, y in zip(layers, starts, strict=True)]
    got = [run(layer, y.clone()) for layer, y in zip(layers, starts, strict=True)]
    torch.cuda.synchronize()
    assert len(replays) >= len(layers) - 1
    for result, bits in zip(got, expected, strict=True):
        assert torch.equal(result, bits)


def test_a_plan_of_other_tokens(monkeypatch, replays):
    """Of one plan, updated between the calls: the tiles that are launched are those of the step."""
    layer = cases.make_layer(cases.Case(700, 256, (128,), 16, 5, "steps"), torch.bfloat16, "cuda")
    rng = np.random.default_rng()
    for tokens in (700, 3, 700, 650, 0, 3, 700):
        layer.plan.update(rng.integers(-1, 5, tokens))
        arguments = layer.x, layer.lora_a, layer.lora_b, layer.plan
        ours, expected = layer.y[:, :128].clone(), layer.y[:, :128].clone()
        by_itself(monkeypatch, lora_ops.lora_linear, expected, *arguments)
        lora_ops.lora_linear(ours, *arguments)
        assert torch.equal(ours, expected)
    assert len(replays) >= 3


def test_in_a_cuda_graph(monkeypatch, replays):
    """Made again while a graph is captured, for tensors whose contents change between its replays."""
    layers = [test_moe_ops.make_layer(MANY, torch.bfloat16, "cuda") for _ in range(3)]
    moe_ops.fused_experts(**layers[0])
    fixed = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in layers[0].items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ops.fused_experts(**fixed)
    assert len(replays) > 0
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, torch.Tensor):
                fixed[name].copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, by_itself(monkeypatch, moe_ops.fused_experts, **layer))


def test_lora_in_a_cuda_graph(monkeypatch, replays):
    """Of a plan that is updated between the graph's replays."""
    layer = cases.make_layer(cases.Case(40, 256, (128, 64), 16, 5, "decode"), torch.bfloat16, "cuda")
    arguments = layer.x, layer.lora_a, layer.lora_b, layer.plan
    start = layer.y[:, :192].clone()
    y = start.clone()
    lora_ops.lora_linear(y, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_ops.lora_linear(y, *arguments)
    assert len(replays) > 0
    for _ in range(3):
        layer.plan.update(np.random.default_rng().integers(-1, 5, 40))
        y.copy_(start)
        graph.replay()
        expected = start.clone()
        by_itself(monkeypatch, lora_ops.lora_linear, expected, *arguments)
        assert torch.equal(y, expected)


def test_bad_input_is_refused_each_time(replays):
    layer = test_moe_ops.make_layer(QUANTISED, torch.bfloat16, "cuda")
    moe_ops.fused_experts(**layer)
    counters.reset()
    for _ in range(2):
        with pytest.raises(TypeError, match="hidden"):
            moe_ops.fused_experts(**layer | {"hidden": layer["hidden"].half()})
    assert counters.snapshot()["error"] == {"fused_experts": {"TypeError": 2}}
    moe_ops.fused_experts(**layer)
    assert len(replays) == 1
