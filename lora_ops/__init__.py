"""Multi-LoRA shrink and expand kernels, and the front doors of the patch that puts them into vLLM.

    import lora_ops
    lora_ops.patch_vllm()

The names below are imported on first use, so that `import lora_ops` stays light.
"""

from importlib import import_module

_HOME = {
    "LoraPlan": "lora_ops.plan",
    **dict.fromkeys(
        (
            "bgmv_expand",
            "bgmv_expand_slice",
            "bgmv_shrink",
            "linear_beside",
            "lora_expand",
            "lora_linear",
            "lora_shrink",
            "sgmv_expand",
            "sgmv_expand_slice",
            "sgmv_shrink",
            "warmup",
        ),
        "lora_ops.ops",
    ),
    "KernelError": "ops_patches.debug",
    "use_configs": "ops_configs.store",
    **dict.fromkeys(("patch_vllm", "status", "unpatch_vllm"), "ops_patches.vllm_lora"),
}
_SUBMODULES = ("plan", "ops", "reference")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return import_module(f"lora_ops.{name}")
    raise AttributeError(f"module 'lora_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
