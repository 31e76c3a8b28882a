"""Routed experts (MoE): the layer and its grouped matrix product as Triton kernels, their routing plan, a reference.

    y = moe_ops.fused_experts(hidden, w13, w2, topk_weights, topk_ids)
    plan = moe_ops.routing_plan(topk_ids, num_experts, tile_rows=64)
    h = moe_ops.grouped_gemm(hidden, w, plan, gather=True)

fp16, bf16 and fp32, and weights in fp8 or int8. `moe_ops.reference` has the same functions in fp32 torch. They go
into serving engines by `moe_ops.patch_vllm()` and `moe_ops.patch_sglang()`.
The names below are imported on first use, so that `import moe_ops` stays light.
"""

from importlib import import_module

_HOME = {
    **dict.fromkeys(("RoutingPlan", "routing_plan"), "moe_ops.routing"),
    **dict.fromkeys(("fused_experts", "grouped_gemm", "quantize", "warmup_layer"), "moe_ops.ops"),
    **dict.fromkeys(("patch_sglang", "unpatch_sglang"), "ops_patches.sglang_moe"),
    **dict.fromkeys(("patch_vllm", "unpatch_vllm"), "ops_patches.vllm_moe"),
    "status": "ops_patches.moe_common",
    "use_configs": "ops_configs.store",
}
_SUBMODULES = ("ops", "reference", "routing")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)  # found by itself from now on
        return value
    if name in _SUBMODULES:
        return import_module(f"moe_ops.{name}")
    raise AttributeError(f"module 'moe_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
