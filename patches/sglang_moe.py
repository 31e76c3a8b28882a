"""The patch table of SGLang's MoE layers on Triton.

Every layer, fused or called by a model itself, ends in `fused_experts_impl`, which the opaque custom ops
sglang::inplace_fused_experts and sglang::outplace_fused_experts look up when they run: a graph of torch.compile holds
the op alone, and the function that `FusedOpPool` keeps in its dict needs no change. Layers with LoRA adapters go
through `TritonRunnerCore.run` instead. SGLang's HookRegistry is not used: it has no undo, and a target that is missing
is no error there.
"""

import logging

import torch

from ops_configs import store
from ops_patches import moe_common
from ops_patches.engine import Contract, Handle, Patch, PatchSet
from ops_patches.moe_common import LeftToHost

logger = logging.getLogger("lora_ops")

VERSIONS = ">=0.5.17,<0.5.24"
FUSED_MOE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"
RUNNER = "sglang.srt.layers.moe.moe_runner.triton"

GATED = ("silu", "gelu", "gelu_tanh")
UNGATED = ("silu", "gelu", "relu2")


def platform() -> str:
    """ "cuda", also for out-of-tree platforms, or the name of another platform of SGLang, whose experts are others."""
    from sglang.srt.utils import is_cpu, is_hip, is_musa, is_npu, is_xpu

    others = {"cpu": is_cpu, "hip": is_hip, "musa": is_musa, "npu": is_npu, "xpu": is_xpu}
    return next((name for name, is_it in others.items() if is_it()), "cuda")


def _all_experts(local: int) -> int | None:
    """Experts of all ranks of SGLang's expert parallelism; None where its groups are not set up."""
    from sglang.srt.runtime_context import get_parallel

    try:
        return local * get_parallel().moe_ep_size
    except (RuntimeError, ValueError, AssertionError):
        return None


def activation_of(
    activation: str,
    is_gated: bool,
    gemm1_alpha: float | None,
    gemm1_limit: float | None,
    swiglu_limit: float | None,
    gate_up_interleaved: bool,
    fuse_swiglu_interleaved: bool,
) -> dict:
    """The arguments of ours for an activation of SGLang.

    Raises:
        LeftToHost: an activation that our kernels do not have.
    """
    if not is_gated and activation in UNGATED:
        return {"activation": activation, "gated": False}
    if not is_gated or activation not in GATED:
        raise LeftToHost(f"activation {activation}, {'gated' if is_gated else 'not gated'}")
    if gemm1_alpha is not None and gemm1_limit is not None and activation == "silu":
        return {
            "activation": "swiglu_oai",
            "interleaved": gate_up_interleaved,
            "swiglu_alpha": gemm1_alpha,
            "swiglu_limit": gemm1_limit,
        }
    if (gemm1_alpha, gemm1_limit, swiglu_limit) != (None, None, None):
        raise LeftToHost(f"{activation} with a clamp")
    return {"activation": activation, "interleaved": fuse_swiglu_interleaved}


def from_function(
    hidden_states,
    w1,
    w2,
    topk_weights,
    topk_ids,
    b1=None,
    b2=None,
    inplace=False,
    activation="silu",
    is_gated=True,
    apply_router_weight_on_input=False,
    use_fp8_w8a8=False,
    use_int8_w8a8=False,
    use_int8_w8a16=False,
    use_int4_w4a16=False,
    per_channel_quant=False,
    w1_scale=None,
    w2_scale=None,
    w1_zp=None,
    w2_zp=None,
    a1_scale=None,
    a2_scale=None,
    block_shape=None,
    no_combine=False,
    routed_scaling_factor=None,
    gemm1_alpha=None,
    gemm1_limit=None,
    filter_expert=True,
    swiglu_limit=None,
    gate_up_interleaved=True,
    a1_q=None,
    fuse_swiglu_interleaved=False,
    defer_sum=False,
    no_combine_keep_router_weight=False,
) -> dict:
    """Arguments of ours from those of `fused_experts_impl` (the last three are not in every version).

    Ids of -1 are experts of other ranks: of layers that may have such (filter_expert), each rank has as many experts.
    Quantised tokens that come beside the others (a1_q) are not needed.

    Raises:
        LeftToHost: the call is not one for our kernels.
    """
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled

    if is_batch_invariant_mode_enabled():
        raise LeftToHost("batch-invariant mode: the rows of a tile depend on the batch")
    if no_combine or defer_sum:
        raise LeftToHost("the experts' outputs are not summed up")
    if b1 is not None and apply_router_weight_on_input:
        raise LeftToHost("bias with routed weights on the input")
    moe_common.no_zero_points(w1_zp, w2_zp)
    quant = moe_common.quant_of(use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16)
    padding = w1.shape[2] - hidden_states.shape[1]
    if padding:  # SGLANG_MOE_PADDING: columns beyond K, against bank conflicts
        w1, w2 = w1[..., :-padding], w2[..., :-padding]
    if a1_q is not None:
        a1_scale = None  # of the quantised tokens
    scales = (w1_scale, w2_scale, a1_scale, a2_scale, per_channel_quant, block_shape)
    return {
        "hidden": hidden_states,
        "w13": w1,
        "w2": w2,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "bias13": b1,
        "bias2": b2,
        "apply_router_weight_on_input": apply_router_weight_on_input,
        "global_experts": _all_experts(w1.shape[0]) if filter_expert else None,
        "routed_scaling": 1.0 if routed_scaling_factor is None else routed_scaling_factor,
        **activation_of(
            activation,
            is_gated,
            gemm1_alpha,
            gemm1_limit,
            swiglu_limit,
            gate_up_interleaved,
            fuse_swiglu_interleaved,
        ),
        **moe_common.quantisation(hidden_states, w1, w2, quant, *scales),
        "out": hidden_states if inplace else _output(hidden_states),
    }


def _output(hidden: torch.Tensor) -> torch.Tensor:
    """An output where SGLang wants it: in symmetric memory, if its all-reduce takes it from there."""
    from sglang.srt.distributed import get_tp_group
    from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
    from sglang.srt.layers.dp_attention import is_allocation_symmetric

    with use_symmetric_memory(get_tp_group(), disabled=not is_allocation_symmetric()):
        return torch.empty_like(hidden)


def _run_without_adapters(original):
    """Layers with LoRA adapters: ours for the batches in which no request has one."""

    def run(self, runner_input, quant_info, running_state, hooks=None):
        if hooks is not None and (hooks.after_gate_up is not None or hooks.after_down is not None):
            moe_common.leave("LoRA adapters on the experts")
            return original(self, runner_input, quant_info, running_state, hooks)
        from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerOutput

        def host(*args, **kwargs):
            return original(self, runner_input, quant_info, running_state, hooks).hidden_states

        routed_experts = moe_common.or_host(host, from_runner)
        return TritonRunnerOutput(hidden_states=routed_experts(runner_input, quant_info, self.config))

    return run


def from_runner(runner_input, quant_info, config) -> dict:
    """Arguments of ours from a TritonRunnerInput, TritonMoeQuantInfo and MoeRunnerConfig.

    Raises:
        LeftToHost: the call is not one for our kernels.
    """
    if quant_info.use_mxfp8:
        raise LeftToHost("mxfp8")
    return from_function(
        runner_input.hidden_states,
        quant_info.w13_weight,
        quant_info.w2_weight,
        runner_input.topk_weights,
        runner_input.topk_ids,
        quant_info.b13,
        quant_info.b2,
        config.inplace,
        config.activation,
        config.is_gated,
        config.apply_router_weight_on_input,
        quant_info.use_fp8_w8a8,
        quant_info.use_int8_w8a8,
        quant_info.use_int8_w8a16,
        quant_info.use_int4_w4a16,
        quant_info.per_channel_quant,
        quant_info.w13_scale,
        quant_info.w2_scale,
        quant_info.w13_zp,
        quant_info.w2_zp,
        quant_info.a13_scale,
        quant_info.a2_scale,
        quant_info.block_shape,
        config.no_combine,
        config.routed_scaling_factor,
        config.gemm1_alpha,
        config.gemm1_clamp_limit,
        config.num_experts != config.num_local_experts,
        swiglu_limit=config.swiglu_limit,
        fuse_swiglu_interleaved=getattr(quant_info, "fuse_swiglu_interleaved", False),
    )


_SINCE_18 = ", fuse_swiglu_interleaved=False"
_SINCE_23 = f"{_SINCE_18}, defer_sum=False, no_combine_keep_router_weight=False"


def _function_row(versions: str, more: str = "") -> Patch:
    return Patch(
        target=f"{FUSED_MOE}:fused_experts_impl",
        signature=(
            "(hidden_states, w1, w2, topk_weights, topk_ids, b1=None, b2=None, inplace=False, activation='silu', "
            "is_gated=True, apply_router_weight_on_input=False, use_fp8_w8a8=False, use_int8_w8a8=False, "
            "use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, w1_scale=None, w2_scale=None, "
            "w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None, block_shape=None, no_combine=False, "
            "routed_scaling_factor=None, gemm1_alpha=None, gemm1_limit=None, filter_expert=True, swiglu_limit=None, "
            f"gate_up_interleaved=True, a1_q=None{more})"
        ),
        versions=versions,
        platform="cuda",
        replacement=lambda original: moe_common.or_host(original, from_function),
        why=(
            "Every MoE layer of SGLang's Triton backend and every model that calls fused_moe or fused_experts itself, "
            "quantised or not, under tensor and expert parallelism, ends in this call, before anything is launched."
        ),
        obsolete_when="SGLang lets a plugin register a MoE runner backend for every layer.",
        only_when="the MoE runner backend is triton",
    )


PATCHES = (
    _function_row(">=0.5.17,<0.5.18"),
    _function_row(">=0.5.18,<0.5.23", _SINCE_18),
    _function_row(">=0.5.23,<0.5.24", _SINCE_23),
    Patch(
        target=f"{RUNNER}:TritonRunnerCore.run",
        signature="(self, runner_input, quant_info, running_state, hooks=None)",
        versions=VERSIONS,
        platform="cuda",
        replacement=_run_without_adapters,
        why=(
            "Layers with LoRA adapters: batches without one run on our kernels, the others stay SGLang's, whose hooks "
            "add to the intermediates. CUDA graphs are captured with the hooks."
        ),
        obsolete_when="The LoRA hooks of SGLang's MoE layers take expert-sorted intermediates.",
        only_when="the experts have LoRA adapters",
    ),
)

CONTRACTS = (
    *(
        Contract(target, VERSIONS, why, signature=signature, platform="cuda")
        for target, signature, why in (
            ("sglang.srt.batch_invariant_ops:is_batch_invariant_mode_enabled", "()", "Such calls stay SGLang's."),
            ("sglang.srt.runtime_context:get_parallel", "()", "Says how many ranks share the experts."),
            ("sglang.srt.layers.dp_attention:is_allocation_symmetric", "()", "Says where the output belongs."),
            ("sglang.srt.distributed:get_tp_group", "()", "Its symmetric memory holds the output."),
            (
                "sglang.srt.distributed.device_communicators.pynccl_allocator:use_symmetric_memory",
                "(group_coordinator, disabled=False)",
                "Allocates the output.",
            ),
            (
                f"{FUSED_MOE}:inplace_fused_experts",
                "",
                "The custom op that calls fused_experts_impl and declares what it writes.",
            ),
            (f"{FUSED_MOE}:outplace_fused_experts", "", "The same for a new output."),
        )
    ),
    Contract(
        f"{RUNNER}:TritonMoeQuantInfo",
        VERSIONS,
        "How the layer is quantised.",
        fields=(
            *("w13_weight", "w2_weight", "b13", "b2", "use_mxfp8", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16"),
            *("use_int4_w4a16", "per_channel_quant", "w13_scale", "w2_scale", "w13_zp", "w2_zp", "a13_scale"),
            *("a2_scale", "block_shape"),
        ),
        platform="cuda",
    ),
    Contract(
        "sglang.srt.layers.moe.moe_runner.base:MoeRunnerConfig",
        VERSIONS,
        "What the layer is.",
        fields=(
            *("inplace", "activation", "is_gated", "apply_router_weight_on_input", "no_combine"),
            *("routed_scaling_factor", "gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "gate_up_interleaved"),
            *("num_experts", "num_local_experts"),
        ),
        platform="cuda",
    ),
    Contract(
        f"{RUNNER}:TritonRunnerInput",
        VERSIONS,
        "Tokens and routing.",
        fields=("hidden_states", "topk_weights", "topk_ids"),
        platform="cuda",
    ),
    Contract(f"{RUNNER}:TritonRunnerOutput", VERSIONS, "What run returns.", fields=("hidden_states",), platform="cuda"),
    Contract(
        "sglang.srt.lora.lora_moe_runners:LoRAHooks",
        VERSIONS,
        "Says whether a batch has adapters.",
        fields=("after_gate_up", "after_down"),
        platform="cuda",
    ),
)


def plugins_listed(value: str) -> set[str] | None:
    """The names in SGLANG_PLUGINS, as SGLang reads it: an empty value is none at all, spaces do not count."""
    return {name.strip() for name in value.split(",")} if value else None


SGLANG_MOE = PatchSet(
    name="sglang",
    key="sglang_moe",
    hosts={"sglang": VERSIONS},
    env="MOE_OPS_SGLANG",
    entry_point=("sglang.srt.plugins", "moe_ops"),
    allowlist="SGLANG_PLUGINS",
    listed=plugins_listed,
    platform=platform,
    patches=PATCHES,
    contracts=CONTRACTS,
    before=(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager",
        "sglang.srt.model_executor.model_runner:ModelRunner",
    ),
    extras=lambda: {"configs": store.choices()},
)


def patch_sglang(strict: bool = False) -> Handle:
    """Run SGLang's MoE layers on our kernels, in this process and in those it starts; also a context manager.

    Call it before an engine is built. Does nothing when patched already. Sets MOE_OPS_SGLANG=1 for child processes (0
    there only keeps the entry point from patching, not this call). When the installed SGLang does not fit, one warning
    lists every reason and SGLang stays as it was. Layers that SGLang runs on another backend than Triton stay there.

    Args:
        strict: raise PatchError (a RuntimeError) instead of that warning.

    Raises:
        PatchError: an engine is already built in this process.
        ValueError: MOE_OPS_SGLANG is neither 0 nor 1.
    """
    return SGLANG_MOE.patch(strict)


def unpatch_sglang() -> None:
    """Restore SGLang for engines built from now on, and MOE_OPS_SGLANG as it was. Does nothing when not patched.

    Raises:
        PatchError: someone has patched over our replacement; nothing is undone.
    """
    SGLANG_MOE.unpatch()


def plugin() -> None:
    """Entry point that SGLang runs in each of its processes: patches if MOE_OPS_SGLANG is 1.

    A SGLang that does not fit is a warning: SGLang would log an exception and go on. Raises ValueError, which SGLang
    logs as an error, when MOE_OPS_SGLANG is neither 0 nor 1.
    """
    SGLANG_MOE.patch_if_requested()
