"""The reference of the routed-experts layer against transformers' layers, its own parts, and its definition."""

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_ops import routing_plan
from moe_ops.reference import ACTIVATIONS, POINTWISE, activate, fused_experts, grouped_gemm
from tests.kernels.cases import assert_close

FP32 = 1e-5
HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 40, 24, 7, 3, 33

QWEN3 = Qwen3MoeConfig(
    hidden_size=HIDDEN,
    moe_intermediate_size=INNER,
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    norm_topk_prob=True,
    experts_implementation="eager",
)
MIXTRAL = MixtralConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    experts_implementation="eager",
)
GPT_OSS = GptOssConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_experts_per_tok=4,
    experts_implementation="eager",
)


def random_block(block: torch.nn.Module) -> torch.nn.Module:
    """The block with weights that keep the size of what passes through them; biases of the same size."""
    for name, parameter in block.named_parameters():
        scale = 1.0 if name.endswith("bias") else HIDDEN**-0.5
        parameter.data.normal_(std=scale)
    return block.eval()


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    """Arguments of a fp32 layer."""
    return {
        "hidden": torch.randn(TOKENS, HIDDEN),
        "w13": torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5,
        "w2": torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5,
        "topk_weights": torch.rand(TOKENS, TOP_K),
        "topk_ids": torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K],
    }


@pytest.fixture
def biases() -> dict[str, torch.Tensor]:
    return {"bias13": torch.randn(EXPERTS, 2 * INNER), "bias2": torch.randn(EXPERTS, HIDDEN)}


@pytest.mark.parametrize(("block", "config"), [(Qwen3MoeSparseMoeBlock, QWEN3), (MixtralSparseMoeBlock, MIXTRAL)])
@torch.no_grad()
def test_agrees_with_a_sparse_block_of_transformers(block, config):
    block = random_block(block(config))
    hidden = torch.randn(3, 11, HIDDEN)
    _, weights, ids = block.gate(hidden.view(-1, HIDDEN))
    ours = fused_experts(hidden.view(-1, HIDDEN), block.experts.gate_up_proj, block.experts.down_proj, weights, ids)
    assert_close(ours, block(hidden).view(-1, HIDDEN), FP32)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "side by side"])
@torch.no_grad()
def test_agrees_with_gpt_oss_of_transformers(interleaved):
    """Inputs are large enough that gates and ups reach the clamp."""
    block = random_block(GptOssMLP(GPT_OSS))
    hidden = 8 * torch.randn(3, 11, HIDDEN)
    _, weights, ids = block.router(hidden.view(-1, HIDDEN))
    experts = block.experts
    w13, bias13 = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    if not interleaved:
        w13, bias13 = (torch.cat([tensor[:, ::2], tensor[:, 1::2]], dim=1) for tensor in (w13, bias13))
    ours = fused_experts(
        hidden.view(-1, HIDDEN),
        w13,
        experts.down_proj.transpose(1, 2),
        weights,
        ids,
        activation="swiglu_oai",
        interleaved=interleaved,
        bias13=bias13,
        bias2=experts.down_proj_bias,
    )
    assert_close(ours, block(hidden)[0].view(-1, HIDDEN), FP32)


@pytest.mark.parametrize(
    ("name", "theirs"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu2", "relu2")]
)
def test_activations(name, theirs):
    h = 3 * torch.randn(17, 2 * INNER)
    gate, up = h[:, :INNER], h[:, INNER:]
    expected = ACT2FN[theirs](gate) * up
    assert_close(activate(h, name), expected, FP32)
    assert_close(activate(torch.stack([gate, up], dim=2).flatten(1), name, interleaved=True), expected, FP32)
    assert_close(activate(h, name, gated=False), ACT2FN[theirs](h), FP32)


def test_every_activation_is_tested():
    assert set(POINTWISE) == {"silu", "gelu", "gelu_tanh", "relu2"}
    assert set(ACTIVATIONS) == {*POINTWISE, "swiglu_oai"}


def test_swiglu_takes_its_slope_and_limit():
    gate, up = 3 * torch.randn(2, 17, INNER)
    ours = activate(torch.cat([gate, up], dim=1), "swiglu_oai", swiglu_alpha=0.5, swiglu_limit=2.0)
    low_gate = torch.minimum(gate, torch.tensor(2.0))
    assert_close(ours, low_gate / (1 + torch.exp(-0.5 * low_gate)) * (up.clip(-2, 2) + 1), FP32)


def test_ungated_experts(layer):
    layer["w13"] = layer["w13"][:, :INNER]
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for weight, expert in zip(layer["topk_weights"][token], layer["topk_ids"][token], strict=True):
            h = torch.relu(layer["w13"][expert] @ layer["hidden"][token]) ** 2
            expected[token] += weight * (layer["w2"][expert] @ h)
    assert_close(fused_experts(**layer, activation="relu2", gated=False), expected, FP32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(layer, biases, dtype):
    small = {name: t if name.startswith("topk") else t.to(dtype) for name, t in (layer | biases).items()}
    exact = fused_experts(**{name: t if name == "topk_ids" else t.float() for name, t in small.items()})
    ours = fused_experts(**small)
    assert ours.dtype == dtype
    assert torch.equal(ours, exact.to(dtype))


def test_routed_scaling(layer):
    assert_close(fused_experts(**layer, routed_scaling=2.5), 2.5 * fused_experts(**layer), FP32)


def test_routed_weight_on_the_input(layer, biases):
    """A weighted input of an unweighted expert; bias2 is not weighted."""
    bias2 = biases["bias2"]
    ours = fused_experts(**layer, bias2=bias2, apply_router_weight_on_input=True)
    expected = torch.zeros(TOKENS, HIDDEN)
    for k in range(TOP_K):
        weight, ids = layer["topk_weights"][:, k : k + 1], layer["topk_ids"][:, k : k + 1]
        arguments = layer | {"hidden": layer["hidden"] * weight, "topk_weights": torch.ones_like(weight)}
        expected += fused_experts(**arguments | {"topk_ids": ids}, bias2=bias2)
    assert_close(ours, expected, FP32)


def test_a_token_may_choose_an_expert_twice(layer):
    layer["topk_ids"][:, 1] = layer["topk_ids"][:, 0]
    once = {name: layer[name][:, 1:] for name in ("topk_weights", "topk_ids")}
    once["topk_weights"] = once["topk_weights"].clone()
    once["topk_weights"][:, 0] += layer["topk_weights"][:, 0]
    assert_close(fused_experts(**layer), fused_experts(**layer | once), FP32)


def test_an_id_of_minus_one_contributes_nothing(layer, biases):
    left_out = torch.rand(TOKENS, TOP_K) < 0.4
    left_out[0] = True
    weightless = fused_experts(**layer | {"topk_weights": layer["topk_weights"].masked_fill(left_out, 0)}, **biases)
    layer["topk_ids"] = layer["topk_ids"].masked_fill(left_out, -1)
    layer["topk_weights"] = layer["topk_weights"].masked_fill(left_out, torch.nan)
    ours = fused_experts(**layer, **biases)
    assert_close(ours, weightless, FP32)
    assert not ours[0].any()


def test_ranks_of_expert_parallel_sum_to_the_layer(layer, biases):
    total = torch.zeros(TOKENS, HIDDEN)
    owner = torch.arange(EXPERTS) % 2
    for rank in (0, 1):
        mine = torch.nonzero(owner == rank).flatten()
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        local = {name: (layer | biases)[name][mine] for name in ("w13", "w2", "bias13", "bias2")}
        total += fused_experts(**layer | local, expert_map=expert_map)
    assert_close(total, fused_experts(**layer, **biases), FP32)


def test_no_tokens(layer):
    for name in ("hidden", "topk_weights", "topk_ids"):
        layer[name] = layer[name][:0]
    assert fused_experts(**layer).shape == (0, HIDDEN)
    plan = routing_plan(layer["topk_ids"], EXPERTS, 16)
    assert grouped_gemm(layer["hidden"], layer["w13"], plan, gather=True).shape == (0, 2 * INNER)


def test_grouped_gemm_reads_rows_or_tokens(layer):
    ids = layer["topk_ids"].masked_fill(torch.rand(TOKENS, TOP_K) < 0.2, -1)
    plan = routing_plan(ids, EXPERTS, 16)
    row_experts = ids.flatten()[plan.choices.long()]
    x, w = layer["hidden"], layer["w13"]
    expected = torch.einsum("rnk,rk->rn", w[row_experts.clamp(min=0)], x[plan.tokens.long()])
    expected[row_experts == -1] = 0
    assert_close(grouped_gemm(x, w, plan, gather=True), expected, FP32)
    rows = x[plan.tokens.long()].clone()
    rows[row_experts == -1] = torch.nan
    assert_close(grouped_gemm(rows, w, plan), expected, FP32)


def test_grouped_gemm_rounds_once(layer):
    plan = routing_plan(layer["topk_ids"], EXPERTS, 16)
    x, w = layer["hidden"].bfloat16(), layer["w13"].bfloat16()
    ours = grouped_gemm(x, w, plan, gather=True)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, grouped_gemm(x.float(), w.float(), plan, gather=True).bfloat16())


@pytest.mark.parametrize("tile_rows", [1, 16])
def test_layer_from_a_plan(layer, tile_rows):
    """Two grouped products in row order, then each token sums its rows: what the plan is for."""
    ids = layer["topk_ids"].masked_fill(torch.rand(TOKENS, TOP_K) < 0.2, -1)
    plan = routing_plan(ids, EXPERTS, tile_rows)
    h = grouped_gemm(layer["hidden"], layer["w13"], plan, gather=True)
    y = grouped_gemm(activate(h), layer["w2"], plan)
    of_tokens = y[plan.rows.long()].view(TOKENS, TOP_K, HIDDEN)
    ours = (of_tokens * layer["topk_weights"][..., None]).sum(1)
    assert_close(ours, fused_experts(**layer | {"topk_ids": ids}), FP32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(TOKENS)}, ValueError, r"hidden has shape \(33,\), expected \[tokens, H\]"),
        ({"hidden": torch.zeros(TOKENS, HIDDEN).int()}, TypeError, "hidden is torch.int32, expected a floating dtype"),
        ({"hidden": torch.zeros(TOKENS + 1, HIDDEN)}, ValueError, r"topk_ids has shape \(33, 3\), .* \[34, any\]"),
        ({"w2": torch.zeros(EXPERTS, HIDDEN + 1, INNER)}, ValueError, r"w2 has shape .* \[any, 40, any\]"),
        ({"w13": torch.zeros(EXPERTS, INNER, HIDDEN)}, ValueError, r"w13 has shape .* \[7, 48, 40\]"),
        ({"gated": False, "activation": "relu2"}, ValueError, r"w13 has shape .* \[7, 24, 40\]"),
        ({"topk_weights": torch.ones(TOKENS, 1)}, ValueError, r"topk_weights has shape .* \[33, 3\]"),
        ({"topk_weights": torch.ones(TOKENS, TOP_K).int()}, TypeError, "topk_weights is torch.int32"),
        ({"topk_ids": torch.zeros(TOKENS, TOP_K)}, TypeError, "topk_ids is torch.float32, expected int32 or int64"),
        ({"topk_ids": torch.full((TOKENS, TOP_K), EXPERTS)}, ValueError, r"topk_ids spans 7\.\.7, .* 0\.\.6"),
        ({"expert_map": torch.arange(EXPERTS + 1)}, ValueError, r"expert_map spans 0\.\.7"),
        ({"bias13": torch.zeros(EXPERTS, INNER)}, ValueError, r"bias13 has shape .* \[7, 48\]"),
        ({"bias2": torch.zeros(EXPERTS, INNER)}, ValueError, r"bias2 has shape .* \[7, 40\]"),
        ({"bias2": torch.zeros(EXPERTS, HIDDEN, device="meta")}, ValueError, "bias2 is on meta, .* on cpu"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh', expected one of silu, gelu"),
        (
            {"bias13": torch.zeros(EXPERTS, 2 * INNER), "apply_router_weight_on_input": True},
            ValueError,
            "leave out bias13 or apply_router_weight_on_input",
        ),
    ],
)
def test_bad_input_of_the_layer_is_named(layer, changes, error, message):
    with pytest.raises(error, match=message):
        fused_experts(**layer | changes)


@pytest.mark.parametrize("options", [{"activation": "swiglu_oai"}, {"interleaved": True}])
def test_what_needs_a_gate_is_named(options):
    with pytest.raises(ValueError, match="need gated=True"):
        activate(torch.zeros(2, INNER), gated=False, **options)


@pytest.mark.parametrize(
    ("x", "w", "gather", "error", "message"),
    [
        ((TOKENS, HIDDEN), (EXPERTS, INNER, HIDDEN), False, ValueError, r"x has shape .* \[rows, K\] = \[99, any\]"),
        ((99, HIDDEN), (EXPERTS, INNER, HIDDEN), True, ValueError, r"x has shape .* \[tokens, K\] = \[33, any\]"),
        ((99, HIDDEN), (EXPERTS + 1, INNER, HIDDEN), False, ValueError, r"w has shape .* \[7, any, 40\]"),
        ((99, HIDDEN), (EXPERTS, INNER, HIDDEN + 1), False, ValueError, r"w has shape .* \[7, any, 40\]"),
    ],
)
def test_bad_input_of_grouped_gemm_is_named(layer, x, w, gather, error, message):
    plan = routing_plan(layer["topk_ids"], EXPERTS, 16)
    with pytest.raises(error, match=message):
        grouped_gemm(torch.zeros(x), torch.zeros(w), plan, gather)
