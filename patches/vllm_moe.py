"""The patch table of vLLM's MoE layers on Triton: `TritonExperts`, and the `fused_experts` function.

Both are called inside an opaque custom op (vllm::moe_forward, vllm::fused_experts) which looks them up when it runs: a
graph of torch.compile, fresh or from a cache, holds the op alone and is right with and without the patch.
"""

import logging

import torch

from ops_configs import store
from ops_patches import moe_common
from ops_patches.engine import Contract, Handle, Patch, PatchSet
from ops_patches.moe_common import LeftToHost

logger = logging.getLogger("lora_ops")

VERSIONS = ">=0.26.0,<0.34"
FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
TRITON_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts"

POINTWISE = ("silu", "gelu", "gelu_tanh")
UNGATED = {f"{name}_no_mul": name for name in (*POINTWISE, "relu2")}


def platform() -> str:
    """ "cuda", also for out-of-tree platforms, or the name of another platform of vLLM, whose experts are others."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() or current_platform.is_out_of_tree():
        return "cuda"
    return type(current_platform).__name__


def activation_of(name: str, clamp: float | None = None, alpha: float = 1.0, beta: float = 0.0) -> dict:
    """The arguments of ours for an activation of vLLM, by the value of its MoEActivation.

    clamp, alpha, beta: of the layer; only silu and swigluoai_uninterleave look at them.

    Raises:
        LeftToHost: an activation that our kernels do not have.
    """
    if name == "silu" and clamp is not None:
        raise LeftToHost("silu with a clamp")
    if name in POINTWISE:
        return {"activation": name}
    if name in UNGATED:
        return {"activation": UNGATED[name], "gated": False}
    if name == "swigluoai":
        return {"activation": "swiglu_oai", "interleaved": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    if name == "swigluoai_uninterleave" and clamp is not None and beta == 1.0:
        return {"activation": "swiglu_oai", "swiglu_alpha": alpha, "swiglu_limit": clamp}
    raise LeftToHost(f"activation {name}")


def _batch_invariant() -> None:
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT:
        raise LeftToHost("VLLM_BATCH_INVARIANT: the rows of a tile depend on the batch")


def _quantisation(hidden, w13, w2, quant: str | None, *scales) -> dict:
    """`moe_common.quantisation`, and the format of the scales that vLLM gives to groups of fp8 activations.

    With DeepGEMM on the machine they are powers of two, by default, on whichever backend the layer runs: vLLM's
    per_token_group_quant_fp8 asks the same function.

    Raises:
        LeftToHost: dtypes, devices or shapes of scales that our kernels do not take.
    """
    arguments = moe_common.quantisation(hidden, w13, w2, quant, *scales)
    if quant == "fp8_w8a8" and arguments["block_shape"] is not None:
        from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

        arguments["power_of_two_scales"] = is_deep_gemm_e8m0_used()
    return arguments


def from_function(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    activation="silu",
    apply_router_weight_on_input=False,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    ocp_mx_scheme=None,
    per_channel_quant=False,
    global_num_experts=-1,
    expert_map=None,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    w1_bias=None,
    w2_bias=None,
) -> dict:
    """Arguments of ours from those of `fused_experts_impl`, which quantises the tokens itself.

    Raises:
        LeftToHost: the call is not one for our kernels.
    """
    _batch_invariant()
    if ocp_mx_scheme is not None:
        raise LeftToHost(ocp_mx_scheme)
    moe_common.no_zero_points(w1_zp, w2_zp)
    if w1_bias is not None and apply_router_weight_on_input:
        raise LeftToHost("bias with routed weights on the input")
    quant = moe_common.quant_of(use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16)
    scales = (w1_scale, w2_scale, a1_scale, a2_scale, per_channel_quant, block_shape)
    return {
        "hidden": hidden_states,
        "w13": w1,
        "w2": w2,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "bias13": w1_bias,
        "bias2": w2_bias,
        "expert_map": expert_map,
        "apply_router_weight_on_input": apply_router_weight_on_input,
        **activation_of(activation),
        **_quantisation(hidden_states, w1, w2, quant, *scales),
    }


def from_experts(
    self,
    output,
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    activation,
    global_num_experts,
    expert_map,
    a1q_scale,
    a2_scale,
    workspace13,
    workspace2,
    expert_tokens_meta,
    apply_router_weight_on_input,
) -> dict:
    """Arguments of ours from those of `TritonExperts.apply`, which gets its tokens as `prepare` left them.

    Raises:
        LeftToHost: the call is not one for our kernels.
    """
    if a1q_scale is not None and _is_plain(self):  # first: what is left to the host asks `expects_unquantized_inputs`
        self._moe_ops_quantised_before = True
    _batch_invariant()
    if not _is_plain(self):
        raise LeftToHost("LoRA adapters on the experts" if self._lora_context is not None else type(self).__name__)
    if a1q_scale is not None:
        raise LeftToHost("tokens that come quantised")
    if getattr(self, "post_gemm2_hook", None) is not None:
        raise LeftToHost("a hook after the second GEMM")
    config = self.quant_config
    moe_common.no_zero_points(config.w1_zp, config.w2_zp)
    quant = moe_common.quant_of(config.use_fp8_w8a8, config.use_int8_w8a8, config.use_int8_w8a16, config.use_int4_w4a16)
    scales = (config.w1_scale, config.w2_scale, config.a1_scale, a2_scale)
    return {
        "hidden": hidden_states,
        "w13": w1,
        "w2": w2,
        # `prepare` has multiplied the tokens by them already
        "topk_weights": torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights,
        "topk_ids": topk_ids,
        "bias13": config.w1_bias,
        "bias2": config.w2_bias,
        "expert_map": expert_map,
        "out": output,
        "h": _room(workspace13, output, topk_ids.numel() * w2.shape[2]),
        "y": _room(workspace2, output, topk_ids.numel() * w2.shape[1]),
        **activation_of(activation.value, *_clamped_swiglu(self)),
        **_quantisation(hidden_states, w1, w2, quant, *scales, config.per_act_token_quant, config.block_shape),
    }


def _room(workspace: torch.Tensor, output: torch.Tensor, elements: int) -> torch.Tensor | None:
    """What of a workspace is free for so many elements, if it is enough: vLLM may have put the output at its start.

    It begins at 16 bytes, as the memory does that the layer's kernels were compiled for.
    """
    free = workspace.view(-1)
    if free.data_ptr() == output.data_ptr():
        free = free[output.numel() :]
    fits = free.dtype == output.dtype and free.numel() >= elements and free.data_ptr() % 16 == 0
    return free if fits else None


def _is_plain(experts) -> bool:
    """Whether these are Triton experts and no more: no subclass that unpacks or emulates a format, no LoRA adapters."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return type(experts) is TritonExperts and experts._lora_context is None


def _clamped_swiglu(experts) -> tuple[float | None, float, float]:
    """(clamp, alpha, beta) of the layer. vLLM 0.28 has put them into one object."""
    config = getattr(experts, "activation_config", None)
    if config is not None:
        return config.clamp_limit, config.alpha, config.beta
    return experts.gemm1_clamp_limit, experts.gemm1_alpha, experts.gemm1_beta


def _defer_quantisation(original):
    """Our kernels quantise the tokens themselves, and so does `TritonExperts.apply` when this property says so.

    Not before an all-to-all or an all-gather, which send fewer bytes of quantised tokens, and not for experts inside
    others (the small batches of DeepGEMM's and CUTLASS's) that quantise for them: `from_experts` marks those.
    """

    def expects_unquantized_inputs(self) -> bool:
        if original(self):
            return True
        defers = _is_plain(self) and self.quant_dtype is not None and "_moe_ops_quantised_before" not in vars(self)
        parallel = self.moe_config.moe_parallel_config
        return defers and parallel.dp_size == 1 and not parallel.use_all2all_kernels

    return expects_unquantized_inputs


_OBSOLETE = "vLLM lets a plugin register a MoE backend."

PATCHES = (
    Patch(
        target=f"{TRITON_EXPERTS}.apply",
        platform="cuda",
        signature=(
            "(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, "
            "a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input)"
        ),
        versions=VERSIONS,
        replacement=lambda original: moe_common.or_host(original, from_experts),
        why=(
            "The experts of every MoE layer that runs on vLLM's Triton backend, under tensor and expert parallelism, "
            "quantised or not: one call a layer, inside the opaque op vllm::moe_forward."
        ),
        obsolete_when=_OBSOLETE,
        only_when="the MoE backend is Triton",
    ),
    Patch(
        target=f"{TRITON_EXPERTS}.expects_unquantized_inputs",
        platform="cuda",
        signature="(self)",
        versions=VERSIONS,
        replacement=_defer_quantisation,
        why="Lets fp8 and int8 layers hand over their tokens unquantised: our kernels quantise them.",
        obsolete_when=_OBSOLETE,
        only_when="the MoE backend is Triton",
    ),
    Patch(
        target=f"{FUSED_MOE}:fused_experts_impl",
        platform="cuda",
        signature=(
            "(hidden_states, w1, w2, topk_weights, topk_ids, activation='silu', apply_router_weight_on_input=False, "
            "use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, ocp_mx_scheme=None, "
            "per_channel_quant=False, global_num_experts=-1, expert_map=None, w1_scale=None, w2_scale=None, "
            "w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None, w1_bias=None, w2_bias=None)"
        ),
        versions=VERSIONS,
        replacement=lambda original: moe_common.or_host(original, from_function),
        why=(
            "The models that call fused_experts themselves bind it, or its op, when they are imported; all of them end "
            "here, looked up at each call by the op vllm::fused_experts."
        ),
        obsolete_when="No model calls fused_experts itself.",
        only_when="a model calls fused_experts itself",
    ),
)

CONTRACTS = (
    Contract(
        f"{TRITON_EXPERTS}.__init__",
        VERSIONS,
        "We read what it is given.",
        signature="(self, moe_config, quant_config)",
        platform="cuda",
    ),
    Contract(
        TRITON_EXPERTS,
        VERSIONS,
        "Properties and attributes that we read.",
        fields=("_lora_context", "quant_dtype", "apply"),
        platform="cuda",
    ),
    Contract(
        f"{TRITON_EXPERTS}.__init__",
        ">=0.26.0,<0.28",
        "Limit and factors of a clamped SwiGLU.",
        assigns=("gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta"),
        platform="cuda",
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts.__init__",
        ">=0.28.0,<0.34",
        "Limit and factors of a clamped SwiGLU.",
        assigns=("activation_config",),
        platform="cuda",
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEQuantConfig",
        VERSIONS,
        "How the layer is quantised.",
        fields=("_a1", "_a2", "_w1", "_w2"),
        platform="cuda",
    ),
    Contract(
        "vllm.utils.deep_gemm:is_deep_gemm_e8m0_used",
        VERSIONS,
        "Whether the scales of groups of fp8 activations are powers of two.",
        signature="()",
        platform="cuda",
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelModularImpl._fused_experts",
        VERSIONS,
        "Calls apply by name, so that the replacement of the class is seen.",
        platform="cuda",
    ),
    Contract(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelModularImpl._allocate_buffers",
        VERSIONS,
        "Puts the output at the start of workspace13, or elsewhere: our intermediates lie in the workspaces, too.",
        signature=(
            "(self, out_dtype, device, M_chunk, M_full, N, K, top_k, global_num_experts, local_num_experts, "
            "expert_tokens_meta, activation)"
        ),
        platform="cuda",
    ),
    Contract(
        "vllm.platforms:current_platform", VERSIONS, "Tells CUDA from the others.", fields=("is_cuda", "is_out_of_tree")
    ),
)

VLLM_MOE = PatchSet(
    name="vllm",
    key="vllm_moe",
    hosts={"vllm": VERSIONS},
    env="MOE_OPS_VLLM",
    entry_point=("vllm.general_plugins", "moe_ops"),
    allowlist="VLLM_PLUGINS",
    copied="VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY",
    platform=platform,
    patches=PATCHES,
    contracts=CONTRACTS,
    before=(
        "vllm.v1.engine.core_client:EngineCoreClient",
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernel",
    ),
    extras=lambda: {"configs": store.choices()},
)


def patch_vllm(strict: bool = False) -> Handle:
    """Run vLLM's MoE layers on our kernels, in this process and in those it starts; also a context manager.

    Call it before an engine is built. Does nothing when patched already. Sets MOE_OPS_VLLM=1 for child processes (0
    there only keeps the entry point from patching, not this call). When the installed vLLM does not fit, one warning
    lists every reason and vLLM stays as it was. Layers that vLLM runs on another backend than Triton stay there.

    Args:
        strict: raise PatchError (a RuntimeError) instead of that warning.

    Raises:
        PatchError: an engine is already built in this process.
        ValueError: MOE_OPS_VLLM is neither 0 nor 1.
    """
    return VLLM_MOE.patch(strict)


def unpatch_vllm() -> None:
    """Restore vLLM for engines built from now on, and MOE_OPS_VLLM as it was. Does nothing when not patched.

    Raises:
        PatchError: someone has patched over our replacement; nothing is undone.
    """
    VLLM_MOE.unpatch()


def plugin() -> None:
    """Entry point that vLLM runs in each of its processes: patches if MOE_OPS_VLLM is 1.

    A vLLM that does not fit is a warning. Raises ValueError, which stops vLLM, when MOE_OPS_VLLM is neither 0 nor 1.
    """
    VLLM_MOE.patch_if_requested()
