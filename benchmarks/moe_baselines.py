"""The implementations of an MoE layer that are compared: ours, and the hosts' fused MoE called as the hosts call it.

Each one has

    unsuited(case)                 why it cannot run the case, "" if it can
    candidates(case)               the configs it may run with, the default first; None: it chooses by itself
    bind(problem, config)          run(i) -> [M, H], the whole layer on set i: plan, products, activation, sum
    label(problem, config)         what the CSV's column `config` says

A `swept` one takes the best of its candidates. `host` names the host whose packages it needs ("" for ours).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
from collections.abc import Callable
from dataclasses import asdict

import torch
from baselines import Missing, installed_version
from moe_problem import FP8, Problem, layer_arguments
from moe_shapes import BLOCK, Case, Layer

from ops_patches.moe_host_configs import answer_for_one_gpu

Run = Callable[[int], torch.Tensor]
SWEEP_SIZE = 40
"""Configs of a host's kernel that a sweep tries, at most."""
SHARED_MEMORY = 227 << 10


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise Missing("needs a GPU: its routing and activation are CUDA code")


def prepare_vllm() -> None:
    """Settings that vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Scales of activations may have any value, as everyone else's; vLLM's default rounds them to powers of two.
    os.environ.setdefault("VLLM_USE_DEEP_GEMM_E8M0", "0")


def import_all(*names: str) -> list:
    """The modules, or Missing with the reason."""
    try:
        return [importlib.import_module(name) for name in names]
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Missing(f"{type(error).__name__}: {error}") from error


class Ours:
    name = "ours"
    host = ""
    swept = False

    def __init__(self) -> None:
        import moe_ops
        from ops_configs import moe

        self.moe_ops, self.configs = moe_ops, moe
        self.version = installed_version("serving-ops")

    def unsuited(self, case: Case) -> str:
        return ""

    def candidates(self, case: Case) -> list[None]:
        return [None]

    def label(self, problem: Problem, config: None) -> dict:
        case, layer = problem.case, problem.case.layer
        quant = {"quant": "fp8_w8a8", "block_shape": BLOCK} if case.dtype == "fp8" else {}
        sizes = (layer.experts, layer.top_k, layer.hidden, layer.intermediate)
        known = self.configs.MoeLayer(*sizes, **quant)
        dtype = problem.hidden[0].dtype
        chosen = self.configs.layer_config(known, case.tokens, dtype, problem.device)
        analytic = self.configs.layer_default(known, self.configs.token_bucket(case.tokens), known.itemsize(dtype))
        return {"source": "default" if chosen == analytic else "tuned file"} | asdict(chosen)

    def bind(self, problem: Problem, config: None) -> Run:
        w, arguments = problem.weights, layer_arguments(problem)

        def run(i: int) -> torch.Tensor:
            return self.moe_ops.fused_experts(
                problem.hidden[i], w.w13, w.w2, problem.topk_weights[i], problem.topk_ids[i], **arguments
            )

        return run


def sample_configs(case: Case) -> list[dict]:
    """Launch parameters of the hosts' Triton kernel (both use the same names): a fixed sample that fits the case."""
    per_expert = case.tokens * case.layer.top_k / case.layer.experts
    itemsize = 1 if case.dtype == "fp8" else 2
    few, many = per_expert <= 8, per_expert > 64
    block_m = (16,) if few else (64, 128) if many else (16, 32, 64)
    block_n = (32, 64, 128) if few else (128, 256) if many else (64, 128)
    if case.dtype == "fp8":
        block_n = (64, 128)
    block_k = (128,) if case.dtype == "fp8" else (64, 128)
    groups = (1, 16) if many else (1,)
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    configs = []
    for values in itertools.product(block_m, block_n, block_k, groups, (4, 8), (2, 3, 4)):
        m, n, k, _, warps, stages = values
        sums = m * n / (32 * warps)  # registers of a thread
        if (m + n) * k * itemsize * stages <= SHARED_MEMORY and 4 <= sums <= 128:
            configs.append(dict(zip(names, values, strict=True)))
    return random.Random(0).sample(configs, min(SWEEP_SIZE, len(configs)))


class Vllm:
    """vLLM's fused_experts with the config that it chooses itself."""

    name = "vllm"
    host = "vllm"
    swept = False
    folder = "vllm.model_executor.layers.fused_moe"

    def __init__(self) -> None:
        require_gpu()
        prepare_vllm()
        self.package, self.kernels, self.quant, activation = import_all(
            self.folder, f"{self.folder}.fused_moe", f"{self.folder}.config", f"{self.folder}.activation"
        )
        self.activations = {
            "silu": activation.MoEActivation.SILU,
            "swiglu_oai": activation.MoEActivation.SWIGLUOAI,
        }
        self.version = installed_version("vllm")

    def unsuited(self, case: Case) -> str:
        return ""

    def tuned(self, case: Case) -> bool:
        """Whether vLLM has a tuned file for the layer on this GPU."""
        fp8 = case.dtype == "fp8"
        blocks = BLOCK if fp8 else (None, None)
        layer = case.layer
        found = self.kernels.get_moe_configs(layer.experts, layer.intermediate, "fp8_w8a8" if fp8 else None, *blocks)
        return found is not None

    def default_config(self, case: Case) -> dict:
        layer, fp8 = case.layer, case.dtype == "fp8"
        return dict(
            self.kernels.try_get_optimal_moe_config(
                (layer.experts, 2 * layer.intermediate, layer.hidden),
                (layer.experts, layer.hidden, layer.intermediate),
                layer.top_k,
                "fp8_w8a8" if fp8 else None,
                case.tokens,
                block_shape=list(BLOCK) if fp8 else None,
            )
        )

    def candidates(self, case: Case) -> list[dict]:
        return [self.default_config(case)]

    def label(self, problem: Problem, config: dict) -> dict:
        source = "sweep" if self.swept else "tuned file" if self.tuned(problem.case) else "default"
        return {"source": source} | config

    def quant_config(self, problem: Problem):
        w = problem.weights
        if problem.case.dtype == "fp8":
            return self.quant.fp8_w8a8_moe_quant_config(
                w1_scale=w.w13_scale, w2_scale=w.w2_scale, w1_bias=w.bias13, w2_bias=w.bias2, block_shape=list(BLOCK)
            )
        return self.quant.biased_moe_quant_config(w.bias13, w.bias2)

    def bind(self, problem: Problem, config: dict) -> Run:
        w, quant = problem.weights, self.quant_config(problem)
        activation = self.activations[problem.case.layer.activation]

        def run(i: int) -> torch.Tensor:
            with self.package.override_config(config):
                return self.kernels.fused_experts(
                    problem.hidden[i],
                    w.w13,
                    w.w2,
                    problem.topk_weights[i],
                    problem.topk_ids[i],
                    activation=activation,
                    quant_config=quant,
                )

        return run


class VllmTuned(Vllm):
    """The same with the best config of a sweep, for layers that vLLM has no tuned file for."""

    name = "vllm_tuned"
    swept = True

    def unsuited(self, case: Case) -> str:
        return "vllm runs its tuned file" if self.tuned(case) else ""

    def candidates(self, case: Case) -> list[dict]:
        return [self.default_config(case), *sample_configs(case)]


class Sglang:
    """SGLang's fused_experts with the configs that it chooses itself, `_down` included."""

    name = "sglang"
    host = "sglang"
    swept = False
    folder = "sglang.srt.layers.moe.moe_runner"

    def __init__(self) -> None:
        require_gpu()
        tools = f"{self.folder}.triton_utils"
        try:
            context = importlib.import_module("sglang.srt.runtime_context").get_context()
            self.server_args = context.override_server_args().install()  # what the kernels ask of the server: defaults
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            raise Missing(f"{type(error).__name__}: {error}") from error
        self.package, self.kernels, self.configs, runner = import_all(
            tools, f"{tools}.fused_moe", f"{tools}.fused_moe_triton_config", self.folder
        )
        self.runner_config = runner.MoeRunnerConfig
        answer_for_one_gpu(self.kernels)
        self.compiled_for: Layer | None = None
        self.version = installed_version("sglang")

    def unsuited(self, case: Case) -> str:
        return ""

    def lookup(self, case: Case, down: bool = False) -> dict | None:
        """Entries of the tuned file for the layer on this GPU, None without one."""
        fp8, layer = case.dtype == "fp8", case.layer
        blocks = BLOCK if fp8 else (0, 0)
        return self.configs.get_moe_configs(
            layer.experts, layer.intermediate, "fp8_w8a8" if fp8 else None, *blocks, down_moe=down
        )

    def default_config(self, case: Case) -> tuple[dict, dict | None]:
        """Configs of gate_up and of down; the second None: as the first."""
        layer, fp8 = case.layer, case.dtype == "fp8"
        config, (down, _) = self.configs.try_get_optimal_moe_config(
            (layer.experts, 2 * layer.intermediate, layer.hidden),
            (layer.experts, layer.hidden, layer.intermediate),
            layer.top_k,
            "fp8_w8a8" if fp8 else None,
            case.tokens,
            block_shape=list(BLOCK) if fp8 else None,
            return_down_config=True,
        )
        return config, down

    def candidates(self, case: Case) -> list[dict | None]:
        return [None]

    def label(self, problem: Problem, config: dict | None) -> dict:
        if config is not None:
            return {"source": "sweep"} | config
        gate_up, down = self.default_config(problem.case)
        source = "tuned file" if self.lookup(problem.case) else "default"
        return {"source": source} | gate_up | ({"down": down} if down and down != gate_up else {})

    def bind(self, problem: Problem, config: dict | None) -> Run:
        layer, w = problem.case.layer, problem.weights
        if layer != self.compiled_for:  # a server has one layer: what torch.compile made for another must not count
            torch._dynamo.reset()
            self.compiled_for = layer
        swiglu = {} if layer.activation == "silu" else {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
        runner_config = self.runner_config(
            num_experts=layer.experts,
            num_local_experts=layer.experts,
            top_k=layer.top_k,
            activation="silu",
            is_gated=True,
            inplace=False,
            **swiglu,
        )
        arguments: dict = {"b1": w.bias13, "b2": w.bias2}
        if problem.case.dtype == "fp8":
            arguments |= {"use_fp8_w8a8": True, "w1_scale": w.w13_scale, "w2_scale": w.w2_scale}
            arguments |= {"block_shape": list(BLOCK)}

        def run(i: int) -> torch.Tensor:
            using = contextlib.nullcontext() if config is None else self.package.override_config(dict(config))
            with using:
                return self.kernels.fused_experts(
                    problem.hidden[i],
                    w.w13,
                    w.w2,
                    (problem.topk_weights[i], problem.topk_ids[i], None),
                    runner_config,
                    **arguments,
                )

        return run


class SglangTuned(Sglang):
    """The same with the best config of a sweep, one for both halves, for layers that SGLang has no tuned file for."""

    name = "sglang_tuned"
    swept = True

    def unsuited(self, case: Case) -> str:
        return "sglang runs its tuned file" if self.lookup(case) else ""

    def candidates(self, case: Case) -> list[dict | None]:
        return [None, *sample_configs(case)]


class TritonKernels:
    """matmul_ogs of triton_kernels, which vLLM's wheel brings and calls like this for gpt-oss.

    Its activation is gpt-oss's clamped SwiGLU on interleaved columns, fused into the first product. With alpha 1, no
    clamp and -1 as bias of the ups it is SiLU: gate * sigmoid(gate) * ((up - 1) + 1), all in fp32.
    """

    name = "triton_kernels"
    host = "vllm"
    swept = False
    no_clamp = 1e30

    def __init__(self) -> None:
        require_gpu()
        prepare_vllm()
        folder = "vllm.model_executor.layers.fused_moe"
        self.experts, self.quant = import_all(f"{folder}.experts.gpt_oss_triton_kernels_moe", f"{folder}.config")
        if not hasattr(self.experts, "matmul_ogs"):
            raise Missing("vLLM could not import triton_kernels: run with VLLM_LOGGING_LEVEL=WARNING for its reason")
        self.version = installed_version("vllm")

    def unsuited(self, case: Case) -> str:
        return "" if case.dtype == "bf16" else "vLLM calls it with bf16 hidden and weights alone, or mxfp4"

    def candidates(self, case: Case) -> list[None]:
        return [None]

    def label(self, problem: Problem, config: None) -> dict | None:
        return None

    def bind(self, problem: Problem, config: None) -> Run:
        layer, w = problem.case.layer, problem.weights
        if layer.activation == "silu":
            w13 = w.w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            bias13 = torch.zeros(layer.experts, 2 * layer.intermediate, device=problem.device)
            bias13[:, 1::2] = -1
            bias2, alpha, limit = None, 1.0, self.no_clamp
        else:
            w13, bias13, bias2, alpha, limit = w.w13, w.bias13.float(), w.bias2.float(), 1.702, 7.0
        quant = self.quant.biased_moe_quant_config(bias13, bias2)
        w13, w2 = w13.transpose(1, 2), w.w2.transpose(1, 2)

        def run(i: int) -> torch.Tensor:
            hidden = problem.hidden[i]
            plan = self.experts.make_routing_data(problem.topk_ids[i], problem.topk_weights[i], layer.experts)
            out = torch.empty_like(hidden)
            return self.experts.triton_kernel_fused_experts(
                out,
                hidden,
                w13,
                w2,
                *plan,
                topk=layer.top_k,
                quant_config=quant,
                swiglu_alpha=alpha,
                swiglu_limit=limit,
            )

        return run


class DeepGemm:
    """DeepGEMM's grouped products as vLLM's DeepGemmExperts calls them: quantised, permuted and summed around them."""

    name = "deepgemm"
    host = "vllm"
    swept = False

    def __init__(self) -> None:
        require_gpu()
        prepare_vllm()
        self.gemm, self.utils, self.fp8 = import_all(
            "vllm.utils.deep_gemm",
            "vllm.model_executor.layers.fused_moe.deep_gemm_utils",
            "vllm.model_executor.layers.quantization.utils.fp8_utils",
        )
        if not self.gemm.is_deep_gemm_supported():
            raise Missing("vLLM finds no DeepGEMM for this GPU")
        self.version = installed_version("vllm")

    def unsuited(self, case: Case) -> str:
        layer = case.layer
        if case.dtype != "fp8" or layer.activation != "silu":
            return "fp8 with SiLU alone"
        if any(size % 128 for size in (layer.hidden, layer.intermediate)) or layer.hidden % min(layer.hidden, 1024):
            return "sizes must be multiples of 128, hidden above 1024 of 1024"
        return ""

    def candidates(self, case: Case) -> list[None]:
        return [None]

    def label(self, problem: Problem, config: None) -> dict | None:
        return None

    def bind(self, problem: Problem, config: None) -> Run:
        layer, w, group = problem.case.layer, problem.weights, BLOCK[1]
        align = self.gemm.get_mk_alignment_for_contiguous_layout()[0]

        def run(i: int) -> torch.Tensor:
            x, ids = problem.hidden[i], problem.topk_ids[i]
            rows, align_used = self.utils.compute_aligned_M_and_alignment(
                *ids.shape, local_num_experts=layer.experts, alignment=align, expert_tokens_meta=None
            )
            q, q_scale = self.fp8.per_token_group_quant_fp8(x, group)
            sorted_q, sorted_scale, experts, places, align_used = self.utils.deepgemm_moe_permute(
                aq=q,
                aq_scale=q_scale,
                topk_ids=ids,
                local_num_experts=layer.experts,
                expert_map=None,
                expert_tokens_meta=None,
            )
            with self.gemm.mk_alignment_scope(align_used):
                gate_up = x.new_empty(rows, 2 * layer.intermediate)
                product = self.gemm.m_grouped_fp8_gemm_nt_contiguous
                product((sorted_q, sorted_scale), (w.w13, w.w13_scale), gate_up, experts)
                h = torch.empty(rows, layer.intermediate, dtype=FP8, device=x.device)
                h, h_scale = self.fp8.silu_mul_per_token_group_quant_fp8_colmajor(
                    input=gate_up, output=h, use_ue8m0=False, group_size=group
                )
                y = x.new_empty(rows, layer.hidden)
                product((h, h_scale), (w.w2, w.w2_scale), y, experts)
            out = torch.empty_like(x)
            self.utils.deepgemm_unpermute_and_reduce(
                a=y,
                topk_ids=ids,
                topk_weights=problem.topk_weights[i],
                inv_perm=places,
                expert_map=None,
                output=out,
            )
            return out

        return run


IMPLS = {impl.name: impl for impl in (Ours, Vllm, VllmTuned, Sglang, SglangTuned, TritonKernels, DeepGemm)}
HOSTS = ("vllm", "vllm_tuned", "sglang", "sglang_tuned")
"""The hosts' own paths, whose fastest is what ours is compared with."""
