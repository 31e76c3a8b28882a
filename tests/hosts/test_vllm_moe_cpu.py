"""The reference of the routed-experts layer against vLLM's own CPU kernel of it."""

import pytest
import torch

from moe_ops.reference import fused_experts
from tests.kernels.cases import assert_close, tolerance

pytestmark = pytest.mark.host

TOKENS, HIDDEN, INNER, EXPERTS = 13, 64, 96, 5
ACTIVATIONS = {
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "swigluoai": {"activation": "swiglu_oai", "interleaved": True},
}


def both(dtype: torch.dtype, top_k: int, act: str, on_input: bool, biased: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(vLLM's, ours) on the same random layer. vLLM's kernel overwrites the routed weights it does not use."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    hidden = 4 * torch.randn(TOKENS, HIDDEN)
    ids = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :top_k].int().contiguous()
    weights = torch.rand(TOKENS, top_k)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN).mul(HIDDEN**-0.5).to(dtype)
    w2 = torch.randn(EXPERTS, HIDDEN, INNER).mul(INNER**-0.5).to(dtype)
    bias13, bias2 = (torch.randn(EXPERTS, n).to(dtype) if biased else None for n in (2 * INNER, HIDDEN))
    packed = (cpu_prepack_moe_weight(w, "vec") for w in (w13, w2))
    theirs_in = (hidden * weights if on_input else hidden).to(dtype)
    theirs = cpu_fused_moe(theirs_in, *packed, bias13, bias2, weights.clone(), ids, act, "vec", on_input)
    ours = fused_experts(
        hidden.to(dtype),
        w13,
        w2,
        weights,
        ids,
        bias13=bias13,
        bias2=bias2,
        apply_router_weight_on_input=on_input,
        **ACTIVATIONS[act],
    )
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_agrees_with_vllms_kernel(act, dtype):
    theirs, ours = both(dtype, 3, act, on_input=False, biased=True)
    assert_close(theirs, ours, tolerance(dtype))


def test_agrees_with_vllms_routed_weight_on_the_input():
    theirs, ours = both(torch.float32, 1, "silu", on_input=True, biased=False)
    assert_close(theirs, ours, tolerance(torch.float32))
