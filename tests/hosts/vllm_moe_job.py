"""Runs vLLM's real TritonExperts and fused_experts unpatched and patched on CPU tensors, kernels in the interpreter.

Prints one JSON object: for each case the largest difference, relative to the largest value, and what was counted.
Needs TRITON_INTERPRET=1, CUDA_VISIBLE_DEVICES="" and vLLM's GPU sources on PYTHONPATH.
"""

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace
from unittest import mock

import torch
import vllm.platforms
import vllm.utils.torch_utils
from vllm.platforms.interface import Platform, PlatformEnum


class CpuTensors(Platform):
    """An out-of-tree platform whose MoE layers run on the Triton experts."""

    _enum = PlatformEnum.OOT
    device_name = device_type = "cpu"
    dispatch_key = "CPU"

    def is_cuda_alike(self) -> bool:
        return True  # else vLLM refuses layers without gates

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False


vllm.platforms._current_platform = CpuTensors()
vllm.utils.torch_utils.PIN_MEMORY = False

import vllm.model_executor.layers.fused_moe.config as config  # noqa: E402
import vllm.model_executor.layers.fused_moe.experts.triton_moe as triton_moe  # noqa: E402
import vllm.model_executor.layers.fused_moe.fused_moe as fused_moe  # noqa: E402
import vllm.model_executor.layers.fused_moe.modular_kernel as mk  # noqa: E402
import vllm.model_executor.layers.fused_moe.utils as utils  # noqa: E402
from moe_layer import BLOCK, EXPERTS, HIDDEN, INNER, RandomLayer, align, compare  # noqa: E402
from vllm import _custom_ops  # noqa: E402
from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (  # noqa: E402
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.utils import deep_gemm  # noqa: E402
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager  # noqa: E402

import moe_ops  # noqa: E402
from moe_ops.reference import activate, quantize  # noqa: E402

CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "SPLIT_K": 1}


def stand_ins() -> None:
    """What vLLM's C++ does, in torch."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name, activation in {"silu": "silu", "gelu_tanh": "gelu_tanh", "swigluoai": "swiglu_oai"}.items():
        library.define(f"{name}_and_mul(Tensor! out, Tensor x) -> ()")
        library.impl(f"{name}_and_mul", functools.partial(act_and_mul, activation), "CPU")
    library.define("silu_and_mul_with_clamp(Tensor! out, Tensor x, float limit, float alpha, float beta) -> ()")
    library.impl("silu_and_mul_with_clamp", clamped_swiglu, "CPU")
    stand_ins.library = library  # its ops live as long as it does

    def moe_sum(x, out, topk_ids=None, expert_map=None):
        out.copy_(x.float().sum(1))

    _custom_ops.moe_sum = moe_sum
    _custom_ops.scaled_fp8_quant = lambda x, scale=None, use_per_token_if_dynamic=False: quantize(
        x, "fp8_w8a8", scale, per_token=use_per_token_if_dynamic and scale is None
    )
    utils.per_token_group_quant_fp8 = lambda x, group, **layout: quantize(
        x, "fp8_w8a8", group=group, power_of_two_scales=deep_gemm.is_deep_gemm_e8m0_used()
    )
    utils.per_token_quant_int8 = lambda x: quantize(x, "int8_w8a8", per_token=True)
    for module in (fused_moe, triton_moe):
        module.try_get_optimal_moe_config = lambda *args, **kwargs: dict(CONFIG)
        module.moe_align_block_size = align


def act_and_mul(activation, out, x) -> None:
    out.copy_(activate(x.float(), activation, interleaved=activation == "swiglu_oai"))


def clamped_swiglu(out, x, limit, alpha, beta) -> None:
    gate, up = x.float().chunk(2, dim=1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    out.copy_(gate * torch.sigmoid(alpha * gate) * (up + beta))


def parallel(dp_size: int = 1, use_ep: bool = True):
    """Of one rank, or of one of several that send each other their tokens, experts shared out among them or not."""
    values = {field.name: 0 for field in dataclasses.fields(config.FusedMoEParallelConfig)}
    sizes = {name: 1 for name in values if name.endswith("_size")} | {"dp_size": dp_size}
    more = {"use_ep": use_ep and dp_size > 1, "all2all_backend": "naive", "enable_eplb": False}
    return config.FusedMoEParallelConfig(**(values | sizes | more))


class Layer(RandomLayer):
    """A random layer and vLLM's ways to call it. `swiglu` is for the quant config, the rest for RandomLayer."""

    def __init__(self, activation="silu", on_input=False, expert_map=None, swiglu=None, **layer) -> None:
        super().__init__(gated=not activation.endswith("no_mul"), **layer)
        self.activation = MoEActivation.from_str(activation)
        self.on_input, self.map = on_input, None
        if expert_map is not None:
            self.map = torch.tensor(expert_map, dtype=torch.int32)
            self.ids = torch.rand(len(self.ids), len(expert_map)).argsort(1)[:, : self.ids.shape[1]].int()
        biases, swiglu = {"w1_bias": self.b13, "w2_bias": self.b2}, swiglu or {}
        scales = {"w1_scale": self.s13, "w2_scale": self.s2}
        if self.quant == "int8_w8a16":
            self.quant_config = config.int8_w8a16_moe_quant_config(**scales)
        elif self.quant:
            scales |= {"a1_scale": self.a1, "a2_scale": self.a2, "per_act_token_quant": self.per_channel}
            if self.quant == "fp8_w8a8":
                self.quant_config = config.fp8_w8a8_moe_quant_config(**scales, block_shape=self.block)
            else:
                self.quant_config = config.int8_w8a8_moe_quant_config(**scales)
        else:
            self.quant_config = config.biased_moe_quant_config(**biases, **swiglu)
        experts = EXPERTS if self.map is None else len(self.map)
        self.moe_config = config.FusedMoEConfig(
            num_experts=experts,
            experts_per_token=self.ids.shape[1],
            hidden_dim=HIDDEN,
            intermediate_size=INNER,
            num_local_experts=EXPERTS,
            num_logical_experts=experts,
            activation=self.activation,
            device="cpu",
            routing_method=config.RoutingMethodType.Default,
            moe_parallel_config=parallel(),
            in_dtype=torch.float16,
        )

    def experts(self, kind=triton_moe.TritonExperts):
        return kind(self.moe_config, self.quant_config)

    def kernel(self, experts=None) -> torch.Tensor:
        """A modular kernel, as a layer of a model has it."""
        kernel = mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts or self.experts())
        arguments = (self.hidden.clone(), self.w13, self.w2, self.ids, self.weights, self.activation)
        return kernel.impl.apply(*arguments, -1 if self.map is None else len(self.map), self.map, self.on_input)

    def function(self) -> torch.Tensor:
        """fused_experts, as models bind it when they are imported."""
        arguments = (self.hidden, self.w13, self.w2, self.weights, self.ids, self.activation, self.on_input)
        return BOUND(*arguments, -1 if self.map is None else len(self.map), self.map, self.quant_config)


@contextlib.contextmanager
def with_deep_gemm():
    """As where DeepGEMM is installed, by whose default the scales of groups are powers of two."""
    there = {"is_deep_gemm_supported": lambda: True, "_lazy_init": lambda: None, "_fp8_gemm_nt_impl": object()}
    with mock.patch.multiple(deep_gemm, **there):
        deep_gemm.is_deep_gemm_e8m0_used.cache_clear()
        yield
    deep_gemm.is_deep_gemm_e8m0_used.cache_clear()


BOUND = fused_moe.fused_experts
SWIGLU = {"gemm1_alpha": 1.5, "gemm1_beta": 1.0, "gemm1_clamp_limit": 2.0}
MAP = [-1, 0, 1, -1, 2, 3, 4]
KERNEL = {
    "silu": Layer,
    "many experts a token": lambda: Layer(top_k=5),
    "gelu_tanh": lambda: Layer("gelu_tanh"),
    "not gated": lambda: Layer("relu2_no_mul"),
    "gpt-oss": lambda: Layer("swigluoai", biased=True),
    "gates first": lambda: Layer("swigluoai_uninterleave", swiglu=SWIGLU),
    "expert parallel": lambda: Layer(expert_map=MAP),
    "weights on the input": lambda: Layer(on_input=True, top_k=1),
    "fp8": lambda: Layer(quant="fp8_w8a8"),
    "fp8 static": lambda: Layer(quant="fp8_w8a8", static=True),
    "fp8 channels": lambda: Layer(quant="fp8_w8a8", per="channel"),
    "fp8 blocks": lambda: Layer(quant="fp8_w8a8", per=BLOCK),
    "int8 weights": lambda: Layer(quant="int8_w8a16", per="channel"),
}
FUNCTION = {
    "function": Layer,
    "function, expert parallel": lambda: Layer(expert_map=MAP),
    "function, weights on the input": lambda: Layer(on_input=True),
    "function, int8 channels": lambda: Layer(quant="int8_w8a8", per="channel"),  # TritonExperts refuses int8 in 0.26
    "function, fp8 blocks": lambda: Layer(quant="fp8_w8a8", per=BLOCK),
}


def watched(name: str, call, given: dict, reserved: dict):
    """The call, which notes under its name the power_of_two_scales that our layer is given, if any, and its memory."""
    fused_experts = moe_ops.fused_experts

    def ours(*args, power_of_two_scales=None, **options):
        given[name] = power_of_two_scales
        workspace = current_workspace_manager()._current_workspaces[0].untyped_storage().data_ptr()
        memory = {key: options.get(key) for key in ("h", "y", "out")}
        reserved[name] = [k for k, t in memory.items() if t is not None and t.untyped_storage().data_ptr() == workspace]
        return fused_experts(*args, power_of_two_scales=bool(power_of_two_scales), **options)

    def run() -> torch.Tensor:
        with mock.patch.object(moe_ops, "fused_experts", ours):
            return call()

    return run


class Subclass(triton_moe.TritonExperts):
    """Stands for the experts that unpack or emulate a format and leave the rest to TritonExperts."""


def with_adapters(layer: Layer):
    """Experts with LoRA adapters whose two parts change the intermediates."""
    experts = layer.experts()
    experts.set_lora_context(SimpleNamespace(aux_stream=None, original_hidden_states=None))

    def w13(context, *, y, **kwargs):
        y.add_(0.25)
        return None, None, None, None

    experts.apply_w13_lora = w13
    experts.apply_w2_lora = lambda context, *, y, **kwargs: y.mul_(2.0)
    return experts


class Outer(triton_moe.TritonExperts):
    """Stands for the experts that keep a TritonExperts for some batches and get their tokens quantised."""

    def __init__(self, inner) -> None:
        super().__init__(inner.moe_config, inner.quant_config)
        self.inner = inner

    def apply(self, *args, **kwargs) -> None:
        self.inner.apply(*args, **kwargs)


def main() -> None:
    stand_ins()
    torch.accelerator.empty_cache = lambda: None
    init_workspace_manager(torch.device("cpu"))
    calls = {name: make().kernel for name, make in KERNEL.items()}
    calls |= {name: make().function for name, make in FUNCTION.items()}
    calls["clamped silu"] = Layer(swiglu={"gemm1_clamp_limit": 0.5}).kernel
    calls["function, swiglustep"] = Layer("swiglustep").function
    layer = Layer()
    calls["subclass"] = lambda: layer.kernel(layer.experts(Subclass))
    calls["adapters"] = lambda: layer.kernel(with_adapters(layer))
    fp8 = Layer(quant="fp8_w8a8", per="channel")
    inner = fp8.experts()
    calls["fp8 adapters"] = lambda: fp8.kernel(with_adapters(fp8))
    calls["fp8 inside others"] = lambda: fp8.kernel(Outer(inner))
    for name in ("fp8", "fp8 blocks", "function, int8 channels", "function, fp8 blocks"):
        calls[f"{name}, DeepGEMM there"] = with_deep_gemm()(calls[name])
    given: dict = {}
    reserved: dict = {}
    pairs = {name: (call, watched(name, call, given, reserved)) for name, call in calls.items()}
    report: dict = {"cases": compare(moe_ops.patch_vllm, lambda: moe_ops.status()["vllm"], pairs)}
    report["power_of_two_scales"] = given
    report["in workspaces"] = reserved
    report["defers unpatched"] = fp8.experts().expects_unquantized_inputs
    with moe_ops.patch_vllm(strict=True):
        report["defers"] = fp8.experts().expects_unquantized_inputs
        fp8.moe_config.moe_parallel_config = parallel(dp_size=2)
        report["defers before an all-to-all"] = fp8.experts().expects_unquantized_inputs
        fp8.moe_config.moe_parallel_config = parallel(dp_size=2, use_ep=False)
        report["defers before an all-gather"] = fp8.experts().expects_unquantized_inputs
    print(json.dumps(report))


if __name__ == "__main__":
    main()
