"""`fused_experts` runs the launch parameters that the lookup finds, whatever valid ones those are."""

import random
from dataclasses import replace

import pytest
import torch

from moe_ops import fused_experts, launches, reference
from ops_configs import moe
from ops_configs.moe import LayerConfig, MoeConfig, MoeLayer

from .cases import assert_close
from .test_moe_ops import layer_tolerance


def random_config(block_m: int, permute: bool, down_as: str) -> LayerConfig:
    gate_up, down = (
        MoeConfig(block_m, random.choice((16, 32, 64)), random.choice((16, 32, 64)), 4, 2, random.choice((1, 3, 8)))
        for _ in range(2)
    )
    tma_store = random.choice((False, True))
    persistent = down_as == "persistent"
    return LayerConfig(
        replace(gate_up, permute=permute, tma_store=tma_store, persistent=persistent),
        replace(down, persistent=persistent, stationary="stationary" in down_as),
    )


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("permute", [False, True], ids=["gathered", "permuted"])
@pytest.mark.parametrize("down_as", ["a program a tile", "persistent", "stationary", "too long for stationary"])
@pytest.mark.parametrize("mapped", [False, True], ids=["all experts", "expert map"])
def test_the_kernels_get_what_was_found(monkeypatch, device, mapped, down_as, permute, block_m):
    """Tiles of 128 rows are full, more than half full, and less. Persistent are both halves, as by default."""
    experts, top_k, hidden, inner, tokens = 4, 2, 48, 40, random.randint(150, 220)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.float16)
    w13 = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.float16) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inner, device=device, dtype=torch.float16) * inner**-0.5
    ids = torch.rand(tokens, 6 if mapped else experts, device=device).argsort(1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, device=device)
    expert_map = torch.tensor([3, -1, 0, 1, -1, 2], device=device) if mapped else None
    config, asked, used = random_config(block_m, permute, down_as), [], {}

    def layer_config(layer, *batch):
        asked.append((layer, *batch))
        return config

    def watch(name, position):
        launch = getattr(launches, name)

        def watched(*args, **kwargs):
            used[name] = args[position]
            return launch(*args, **kwargs)

        monkeypatch.setattr(launches, name, watched)

    if down_as == "too long for stationary":
        monkeypatch.setattr(moe, "STATIONARY_STEPS", 0)
    monkeypatch.setattr(launches, "layer_config", layer_config)
    watch("gate_up", 4)
    watch("grouped_gemm", 4)
    watch("routing_plan", 2)
    out = fused_experts(x, w13, w2, weights, ids, expert_map=expert_map)
    layer = MoeLayer(experts, top_k, hidden, inner, global_experts=6 if mapped else None)
    assert asked == [(layer, tokens, torch.float16, x.device)]
    assert used == {"gate_up": config.gate_up, "grouped_gemm": config.down, "routing_plan": config.gate_up.block_m}
    expected = reference.fused_experts(x.float(), w13, w2, weights, ids, expert_map=expert_map)
    assert_close(out, expected, layer_tolerance(torch.float16))


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_host_says_how_many_experts_there_are_where_it_has_no_map(monkeypatch, device, tokens):
    """Those of other devices are -1 there."""
    experts, top_k, hidden, inner = 4, 2, 48, 40
    x = torch.randn(tokens, hidden, device=device, dtype=torch.float16)
    w13 = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.float16) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inner, device=device, dtype=torch.float16) * inner**-0.5
    ids = torch.rand(tokens, 12, device=device).argsort(1)[:, :top_k].int()
    ids[ids >= experts] = -1
    weights, asked = torch.rand(tokens, top_k, device=device), []

    def runs_direct(layer, tokens):
        asked.append(layer)
        return tokens == 1

    monkeypatch.setattr("moe_ops.launches.runs_direct", runs_direct)
    out = fused_experts(x, w13, w2, weights, ids, global_experts=12)
    assert asked == [MoeLayer(experts, top_k, hidden, inner, global_experts=12)]
    expected = reference.fused_experts(x.float(), w13, w2, weights, ids)
    assert_close(out, expected, layer_tolerance(torch.float16))
