"""Which layers the MoE patches take: quantisation and activations as both hosts say them, and the reasons to leave."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moe_ops import launches
from ops_configs import store
from ops_patches import counters, moe_common, sglang_moe, vllm_moe
from ops_patches.moe_common import LeftToHost

E, N, K, I = 3, 8, 4, 4  # noqa: E741
HIDDEN = torch.zeros(2, K)
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def quantisation(quant, dtype, s13, s2, a1=None, per_token=False, block=None, hidden=HIDDEN) -> dict:
    w13, w2 = torch.zeros(E, N, K).to(dtype), torch.zeros(E, K, I).to(dtype)
    return moe_common.quantisation(hidden, w13, w2, quant, s13, s2, a1, None, per_token, block)


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_scales_of_tensors_and_channels_lose_dimensions_of_one(dims):
    ones = (1,) * dims
    found = quantisation("fp8_w8a8", FP8, torch.rand(E, *ones), torch.rand(E, K, *ones[:1]))
    assert found["w13_scale"].shape == (E,)
    assert found["w2_scale"].shape == (E, K)


def test_blocks_have_no_other_scales_of_activations():
    found = quantisation("int8_w8a8", INT8, torch.rand(E, 3, 2), torch.rand(E, 2, 2), torch.rand(1), block=[3, 2])
    assert found["block_shape"] == (3, 2)
    assert found["a1_scale"] is None
    assert found["per_token"] is False


def test_int8_tokens_with_scales_of_their_own_have_no_static_one():
    scales = torch.rand(E, N), torch.rand(E, K), torch.rand(1)
    assert quantisation("int8_w8a8", INT8, *scales, per_token=True)["a1_scale"] is None
    assert quantisation("int8_w8a8", INT8, *scales, per_token=False)["a1_scale"] is not None
    assert quantisation("fp8_w8a8", FP8, *scales, per_token=True)["a1_scale"] is not None


def test_layers_that_are_not_quantised_have_no_more_arguments():
    assert quantisation(None, torch.float32, None, None) == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"hidden": HIDDEN.double()}, "tokens in float64"),
        ({"dtype": torch.float16, "quant": None}, "weights in float16 and float16 for float32"),
        ({"dtype": torch.uint8, "quant": "int8_w8a16"}, "weights in uint8 and uint8 for int8_w8a16"),
        ({"dtype": torch.float8_e5m2}, "weights in float8_e5m2 and float8_e5m2 for fp8_w8a8"),
        ({"s13": None}, "w13_scale is missing"),
        ({"s2": torch.rand(E).half()}, "w2_scale in float16"),
        ({"s13": torch.rand(E, 2)}, r"w13_scale of shape \(3, 2\) for weights of shape \(3, 8, 4\)"),
        ({"block": [4, 4]}, r"w13_scale of shape \(3,\)"),
        ({"a1": torch.rand(2, 1)}, r"a1_scale of shape \(2, 1\)"),
        ({"quant": "int8_w8a16", "dtype": INT8, "block": [0, 4]}, "int8_w8a16 in groups"),
    ],
)
def test_what_the_kernels_do_not_take_is_left_with_a_reason(arguments, reason):
    layer = {"quant": "fp8_w8a8", "dtype": FP8, "s13": torch.rand(E), "s2": torch.rand(E)}
    with pytest.raises(LeftToHost, match=reason):
        quantisation(**(layer | arguments))


def test_flags_and_zero_points():
    assert moe_common.quant_of(False, False, False, False) is None
    assert moe_common.quant_of(False, True, False, False) == "int8_w8a8"
    with pytest.raises(LeftToHost, match="int4_w4a16"):
        moe_common.quant_of(False, False, False, True)
    with pytest.raises(LeftToHost, match="weights with zero points"):
        moe_common.no_zero_points(None, torch.zeros(1))


OAI = {"activation": "swiglu_oai", "swiglu_alpha": 1.5, "swiglu_limit": 2.0}


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (("silu",), {"activation": "silu"}),
        (("gelu_tanh", 2.0), {"activation": "gelu_tanh"}),
        (("relu2_no_mul",), {"activation": "relu2", "gated": False}),
        (("swigluoai", 9.0), OAI | {"interleaved": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}),
        (("swigluoai_uninterleave", 2.0, 1.5, 1.0), OAI),
        (("swigluoai_uninterleave", 2.0, 1.5, 0.0), None),
        (("silu", 7.0), None),
        (("relu2",), None),
        (("swiglustep",), None),
    ],
)
def test_activations_of_vllm(given, ours):
    if ours is None:
        with pytest.raises(LeftToHost):
            vllm_moe.activation_of(*given)
    else:
        assert vllm_moe.activation_of(*given) == ours


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (("silu", True, None, None, None, True, False), {"activation": "silu", "interleaved": False}),
        (("silu", True, None, None, None, True, True), {"activation": "silu", "interleaved": True}),
        (("silu", True, 1.5, 2.0, None, True, False), OAI | {"interleaved": True}),
        (("silu", True, 1.5, 2.0, None, False, False), OAI | {"interleaved": False}),
        (("relu2", False, None, None, None, True, False), {"activation": "relu2", "gated": False}),
        (("silu", True, None, 2.0, None, True, False), None),
        (("silu", True, None, None, 10.0, True, False), None),
        (("gelu", True, 1.5, 2.0, None, True, False), None),
        (("situ", True, None, None, None, True, False), None),
        (("gelu_tanh", False, None, None, None, True, False), None),
    ],
)
def test_activations_of_sglang(given, ours):
    if ours is None:
        with pytest.raises(LeftToHost):
            sglang_moe.activation_of(*given)
    else:
        assert sglang_moe.activation_of(*given) == ours


def test_a_layer_is_warmed_up_once(monkeypatch):
    warmed = []
    monkeypatch.setattr(moe_common, "_seen", {})
    monkeypatch.setattr(moe_common.moe_ops, "warmup_layer", lambda *a, **k: warmed.append(k), raising=False)
    monkeypatch.setattr(moe_common.moe_ops, "fused_experts", lambda *a, **k: k["out"], raising=False)

    def run(tokens: int, dtype=torch.float32, **layer) -> None:
        w13 = torch.zeros(E, 2 * I if layer["gated"] else I, K, dtype=dtype)
        w2, ids = torch.zeros(E, K, I, dtype=dtype), torch.zeros(tokens, 2, dtype=torch.int32)
        moe_common.run(torch.zeros(tokens, K, dtype=dtype), w13, w2, torch.ones(tokens, 2), ids, **layer)

    run(1, gated=True)
    run(7, gated=True)
    dtypes = {"dtype": torch.float32, "ids_dtype": torch.int32, "weights_dtype": torch.float32}
    assert warmed == [{**dtypes, "gated": True}]
    run(7, gated=False)
    run(7, torch.float16, gated=False)
    assert len(warmed) == 3


def test_a_bad_folder_of_launch_parameters_is_no_fallback(monkeypatch, tmp_path):
    monkeypatch.setattr(moe_common, "_seen", {})
    monkeypatch.setenv(store.CONFIG_DIR, str(tmp_path / "nowhere"))
    call = {"hidden": torch.zeros(1, K), "w13": torch.zeros(E, 2 * I, K), "w2": torch.zeros(E, K, I)}
    call |= {"topk_weights": torch.ones(1, 2), "topk_ids": torch.zeros(1, 2, dtype=torch.int32)}
    routed = moe_common.or_host(lambda **call: pytest.fail("the host's"), lambda **call: call)
    with pytest.raises(ValueError, match=store.CONFIG_DIR):
        routed(**call)


def test_forms_that_ours_refuse_stay_with_the_host(monkeypatch):
    """What our checks would raise for is the host's call, counted with what they say; errors of kernels are raised."""
    monkeypatch.setattr(moe_common, "_seen", {})
    counters.reset()
    w13, w2 = torch.randn(E, 2 * I, K), torch.randn(E, K, I)
    hidden, weights, ids = torch.randn(3, K), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    routed = moe_common.or_host(lambda **call: "the host's", lambda **call: call)
    call = {"hidden": hidden, "w13": w13, "w2": w2, "topk_weights": weights, "topk_ids": ids}
    assert isinstance(routed(**call), torch.Tensor)
    for change, reason in (
        ({"topk_ids": ids.to(torch.int16)}, "topk_ids is torch.int16"),
        ({"bias13": torch.zeros(E, 2 * I, dtype=torch.int32)}, "bias13 is torch.int32"),
        ({"bias2": torch.zeros(E, K + 1)}, "bias2 has shape"),
    ):
        for _ in range(2):
            assert routed(**call | change) == "the host's"
        ((found, count),) = counters.snapshot()["fallback"]["fused_experts"].items()
        assert reason in found
        assert count == 2
        counters.reset()

    def broken(*args, **options):
        raise RuntimeError("injected fault")

    monkeypatch.setattr(moe_common.moe_ops, "fused_experts", broken, raising=False)
    with pytest.raises(RuntimeError, match="injected fault"):
        routed(**call)


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_errors_of_compiling_are_raised_each_time(monkeypatch, error):
    """They are no reason to leave a layer to the host: nobody would see that a kernel does not compile."""

    def broken(*args, **options):
        raise error("injected fault")

    monkeypatch.setattr(moe_common, "_seen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launches, "compile_layer", broken)
    routed = moe_common.or_host(lambda **call: pytest.fail("the host's"), lambda **call: call)
    with FakeTensorMode(), torch.device("cuda"):
        call = {"hidden": torch.empty(3, K), "w13": torch.empty(E, 2 * I, K), "w2": torch.empty(E, K, I)}
        call |= {"topk_weights": torch.empty(3, 2), "topk_ids": torch.empty(3, 2, dtype=torch.int32)}
        for _ in range(2):
            with pytest.raises(error, match="injected fault"):
                routed(**call)


def test_a_layer_first_seen_in_a_capture_is_checked_and_not_compiled(monkeypatch):
    """On fake tensors of a GPU. What is not taken is the host's; nothing is filled, which would be in the graph."""
    monkeypatch.setattr(moe_common, "_seen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launches, "compile_layer", lambda *args, **options: pytest.fail("compiled"))
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: pytest.fail("filled"))
    monkeypatch.setattr(moe_common.moe_ops, "fused_experts", lambda *args, **options: "ours", raising=False)
    routed = moe_common.or_host(lambda **call: "the host's", lambda **call: call)
    with FakeTensorMode(), torch.device("cuda"):
        call = {"hidden": torch.empty(3, K), "w13": torch.empty(E, 2 * I, K), "w2": torch.empty(E, K, I)}
        call |= {"topk_weights": torch.empty(3, 2), "topk_ids": torch.empty(3, 2, dtype=torch.int32)}
        assert routed(**call) == "ours"
        assert routed(**call | {"bias2": torch.empty(E, K + 1)}) == "the host's"


def test_the_front_doors_of_both_hosts_need_neither():
    code = (
        "import sys, moe_ops; assert not {'torch', 'triton', 'vllm', 'sglang'} & set(sys.modules), sorted(sys.modules);"
        "moe_ops.patch_vllm, moe_ops.unpatch_vllm, moe_ops.patch_sglang, moe_ops.unpatch_sglang;"
        "assert list(moe_ops.status()) == ['vllm', 'sglang']; assert not {'vllm', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
