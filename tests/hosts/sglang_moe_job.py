"""Runs SGLang's real MoE runner unpatched and patched on CPU tensors, kernels in Triton's interpreter.

Prints one JSON object: for each case the largest difference, relative to the largest value, and what was counted; and
the layers that our launch parameters were looked up for.
Needs TRITON_INTERPRET=1, TORCHDYNAMO_DISABLE=1, CUDA_VISIBLE_DEVICES="" and SGLang's sources on PYTHONPATH.
"""

import contextlib
import copy
import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from types import SimpleNamespace
from unittest import mock

import torch

ABSENT = ("orjson", "torchvision", "torchcodec", "sgl_kernel", "flash_attn", "IPython", "cuda", "pynvml", "deep_gemm")
NOT_NEEDED = (  # parts of SGLang that want more than its Python sources
    "sglang.kernels.jit",
    "sglang.srt.configs",
    "sglang.srt.layers.deep_gemm_wrapper",
    "sglang.srt.layers.moe.moe_runner.deep_gemm",
    "sglang.srt.layers.quantization",
    "sglang.srt.managers",
    "sglang.srt.server_args",
    "sglang.srt.state_capturer",
)


class Stub(types.ModuleType):
    """A module that has every name."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for what SGLang imports and these tests do not need; for nobody else but SGLang."""

    def find_spec(self, name, path, target=None):
        if name.startswith(NOT_NEEDED) or (name.startswith(ABSENT) and self._for_sglang()):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def _for_sglang(self) -> bool:
        frame = sys._getframe(2)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return "/sglang/" in frame.f_code.co_filename

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module) -> None:
        pass


sys.meta_path.insert(0, Stubs())

from sglang.srt.utils import common  # noqa: E402

register = common.sglang_lib.impl
common.sglang_lib.impl = lambda name, function, key, **more: register(
    name, function, "CPU" if key == "CUDA" else key, **more
)

import sglang.kernels.ops.moe.fused_moe_triton_kernels as kernels  # noqa: E402
import sglang.srt.distributed  # noqa: E402
import sglang.srt.distributed.device_communicators.pynccl_allocator as allocator  # noqa: E402
import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as fused_moe  # noqa: E402
from moe_layer import BLOCK, EXPERTS, HIDDEN, INNER, RandomLayer, align, compare  # noqa: E402
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig  # noqa: E402
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool  # noqa: E402
from sglang.srt.layers.moe.moe_runner.triton import (  # noqa: E402
    TritonMoeQuantInfo,
    TritonRunnerCore,
    pre_permute_standard_to_triton,
)
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput  # noqa: E402
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402
from sglang.srt.lora.lora_moe_runners import LoRAHooks  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402

import moe_ops  # noqa: E402
from moe_ops import reference  # noqa: E402
from moe_ops.tuning.layers import Target  # noqa: E402
from moe_ops.tuning.measure import Bench  # noqa: E402
from ops_configs import store  # noqa: E402
from ops_configs.moe import MoeLayer  # noqa: E402
from ops_patches import moe_host_configs  # noqa: E402

RANKS = 3
"""Over which expert-parallel layers are spread."""
CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "num_warps": 4}


def stand_ins() -> None:
    """What SGLang asks of its server and of its CUDA kernels."""
    fused_moe.get_exec = lambda: SimpleNamespace(moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False))
    fused_moe.get_tp_group = sglang.srt.distributed.get_tp_group = lambda: None
    fused_moe.get_parallel = lambda: SimpleNamespace(tp_group=None)
    fused_moe.is_allocation_symmetric = sglang.srt.layers.dp_attention.is_allocation_symmetric = lambda: False
    fused_moe.use_symmetric_memory = allocator.use_symmetric_memory = no_symmetric_memory
    fused_moe.try_get_optimal_moe_config = lambda *args, **kwargs: (dict(CONFIG), (None, None))
    fused_moe.moe_align_block_size = align
    fused_moe._has_vllm_ops = False
    fused_moe.is_arch_support_pdl = kernels.is_arch_support_pdl = lambda: False
    fused_moe.padding_size = kernels.padding_size = 0

    def grouped(quant):
        return lambda x, group: reference.quantize(x, quant, group=group)

    kernels.scaled_fp8_quant = lambda x, scale, use_per_token_if_dynamic: reference.quantize(
        x, "fp8_w8a8", scale, per_token=use_per_token_if_dynamic and scale is None
    )
    kernels.per_token_group_quant_fp8 = grouped("fp8_w8a8")
    kernels.per_token_quant_int8 = lambda x: reference.quantize(x, "int8_w8a8", per_token=True)
    kernels.per_token_group_quant_int8 = grouped("int8_w8a8")


@contextlib.contextmanager
def no_symmetric_memory(group_coordinator, disabled=False):
    assert disabled
    yield


class Layer(RandomLayer):
    """A random layer and SGLang's ways to call it. `config` is for its MoeRunnerConfig, the rest for RandomLayer."""

    def __init__(self, config=None, **layer) -> None:
        super().__init__(**layer)
        sizes = {"num_experts": EXPERTS, "num_local_experts": layer.get("local", EXPERTS)}
        defaults = {"top_k": self.ids.shape[1], "is_gated": layer.get("gated", True), "inplace": False}
        self.config = MoeRunnerConfig(**(sizes | defaults | {"activation": "silu"} | (config or {})))
        self.info = {
            "b13": self.b13,
            "b2": self.b2,
            "per_channel_quant": self.per_channel,
            "w13_scale": self.s13,
            "w2_scale": self.s2,
            "a13_scale": self.a1,
            "a2_scale": self.a2,
            "block_shape": self.block,
        }
        if self.quant:
            self.info[f"use_{self.quant}"] = True

    def _arguments(self):
        topk = StandardTopKOutput(self.weights, self.ids, None)
        dispatched = StandardDispatchOutput(self.hidden.clone(), None, topk)
        return dispatched, TritonMoeQuantInfo(w13_weight=self.w13, w2_weight=self.w2, **self.info)

    def fused(self) -> torch.Tensor:
        """The function that every layer's runner keeps from FusedOpPool."""
        kernels.padding_size = fused_moe.padding_size = self.w13.shape[2] - HIDDEN
        return FUSED_FUNCTION(*self._arguments(), self.config).hidden_states

    def runner(self, hooks) -> torch.Tensor:
        """TritonRunnerCore, as layers with LoRA adapters run."""
        dispatched, info = self._arguments()
        state: dict = {}
        runner_input = pre_permute_standard_to_triton(dispatched, info, self.config, state)
        return TritonRunnerCore(self.config).run(runner_input, info, state, hooks).hidden_states

    def quantised_once(self) -> torch.Tensor:
        """fused_experts with tokens that come quantised, too."""
        q, scale = reference.quantize(self.hidden, self.quant, group=BLOCK[1])
        scales = {"w1_scale": self.s13, "w2_scale": self.s2, "a1_scale": scale, "a1_q": q}
        topk = StandardTopKOutput(self.weights, self.ids, None)
        arguments = (self.hidden, self.w13, self.w2, topk, self.config)
        return fused_moe.fused_experts(*arguments, use_fp8_w8a8=True, block_shape=self.block, **scales)


FUSED_FUNCTION = FusedOpPool.get_fused_func("none", "triton")  # taken before the patch, as a dict keeps it

CASES = {
    "silu": Layer,
    "in place": lambda: Layer({"inplace": True}),
    "gelu": lambda: Layer({"activation": "gelu"}),
    "not gated": lambda: Layer({"activation": "relu2"}, gated=False),
    "gpt-oss": lambda: Layer({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, biased=True),
    "gates first": lambda: Layer({"gemm1_alpha": 1.5, "gemm1_clamp_limit": 2.0, "gate_up_interleaved": False}),
    "scaled": lambda: Layer({"routed_scaling_factor": 2.5}),
    "expert parallel": lambda: Layer(local=3),
    "weights on the input": lambda: Layer({"apply_router_weight_on_input": True}),
    "fp8": lambda: Layer(quant="fp8_w8a8"),
    "fp8 padded": lambda: Layer(quant="fp8_w8a8", padding=16),
    "fp8 static": lambda: Layer(quant="fp8_w8a8", static=True),
    "fp8 channels": lambda: Layer(quant="fp8_w8a8", per="channel"),
    "fp8 blocks": lambda: Layer(quant="fp8_w8a8", per=BLOCK),
    "int8 channels": lambda: Layer(quant="int8_w8a8", per="channel"),
    "int8 weights": lambda: Layer(quant="int8_w8a16", per="channel"),
}
LEFT = {
    "no combine": lambda: Layer({"no_combine": True}),
    "clamped silu": lambda: Layer({"gemm1_clamp_limit": 0.5}),
}


def hooks_that_add() -> LoRAHooks:
    """LoRA hooks that change both intermediates."""

    def after_gate_up(hidden, gate_up, weights, ids) -> None:
        gate_up.add_(0.25)

    def after_down(inner, down, weights, ids) -> None:
        down.mul_(2.0)

    return LoRAHooks(after_gate_up, after_down)


TUNED = {"fp16": {}, "fp8 blocks": {"quant": "fp8_w8a8", "block_shape": BLOCK}, "int8 weights": {"quant": "int8_w8a16"}}


def tuned() -> dict[str, float]:
    """Root mean square of what SGLang gives over a batch of its tuner from our reference, relative to the largest."""
    fused_moe.get_parallel = get_parallel  # SGLang's own, of no server
    with mock.patch("sglang.srt.runtime_context.get_context"):  # server arguments are a stub here
        host, found = moe_host_configs.Sglang(), {}
    for name, more in TUNED.items():
        layer = MoeLayer(EXPERTS, 2, HIDDEN, INNER, **more)
        batch = Bench(Target(layer, "float16"), torch.device("cpu"), clock=False).batch(5)
        with host.using(moe_host_configs.pair_of(CONFIG)):
            out = host.run(batch, 0).double()
        positional, keywords = batch.arguments(0)
        expected = reference.fused_experts(*positional, **keywords).double()
        found[name] = float((out - expected).square().mean().sqrt() / expected.abs().max())
    return found


def main() -> None:
    stand_ins()
    calls = {name: (make().fused,) * 2 for name, make in (CASES | LEFT).items()}
    layer = Layer(top_k=3, local=3)
    for name, hooks in (("adapters", hooks_that_add()), ("adapters, none in the batch", LoRAHooks())):
        calls[name] = (functools.partial(layer.runner, hooks),) * 2
    calls["fp8 quantised once"] = (Layer(quant="fp8_w8a8", per=BLOCK).quantised_once,) * 2
    if "fuse_swiglu_interleaved" in inspect.signature(fused_moe.fused_experts).parameters:
        layer = Layer()
        interleaved = copy.copy(layer)
        interleaved.w13 = layer.w13.unflatten(1, (2, INNER)).transpose(1, 2).flatten(1, 2)  # gate, up, gate, up, ...
        interleaved.info = layer.info | {"fuse_swiglu_interleaved": True}
        calls["interleaved at load"] = (layer.fused, interleaved.fused)
    with get_parallel().override(moe_ep_size=RANKS):
        cases = compare(moe_ops.patch_sglang, lambda: moe_ops.status()["sglang"], calls)
    layers = [choice["shape"] for choice in store.choices()]
    print(json.dumps({"cases": cases, "layers": layers, "tuned": tuned()}))


if __name__ == "__main__":
    main()
