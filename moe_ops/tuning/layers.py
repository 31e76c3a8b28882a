"""Which MoE layer a model has, and in which dtype: by name, or from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ops_configs.moe import QUANTS, MoeLayer
from ops_configs.tuning import model_config

from .. import checks

DTYPES = ("float16", "bfloat16", "float32", *QUANTS)
MODELS = {
    "qwen3-30b-a3b": MoeLayer(128, 8, 2048, 768),
    "qwen3-235b-a22b": MoeLayer(128, 8, 4096, 1536),
    "mixtral-8x7b": MoeLayer(8, 2, 4096, 14336),
    "deepseek-v3": MoeLayer(256, 8, 7168, 2048, quant="fp8_w8a8", block_shape=(128, 128)),
    "gpt-oss-20b": MoeLayer(32, 4, 2880, 2880),
    "qwen1.5-moe": MoeLayer(60, 4, 2048, 1408),
    "glm-4.5-air": MoeLayer(128, 8, 4096, 1408),
    "qwen3-next": MoeLayer(512, 10, 2048, 512),
}
"""Models known by name, in the dtype that they come in: bfloat16 where nothing else is said."""
FIELDS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k"),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "intermediate_size"),
}
"""Names in a config.json, the first one that is there counts."""


@dataclass(frozen=True)
class Target:
    """What is tuned: a layer, and the dtype of its hidden states."""

    layer: MoeLayer
    hidden_dtype: str = "bfloat16"

    @property
    def dtype(self) -> str:
        """One of DTYPES, as the files are named."""
        return self.layer.quant or self.hidden_dtype


def quantisation(config: Mapping) -> tuple[str | None, tuple[int, int] | None]:
    """(quant, block_shape) from the quantization_config of a config.json; (None, None) without one.

    Raises:
        ValueError: a method whose kernels are not ours, or nothing that is one.
    """
    found = _object(config, "quantization_config")
    method = found.get("quant_method")
    blocks = _blocks(found, "weight_block_size")
    if not found:
        return None, None
    if method in ("fp8", "w8a8_fp8"):
        return "fp8_w8a8", blocks
    if method in ("int8", "w8a8_int8", "blockwise_int8"):
        return "int8_w8a8", blocks
    if method == "compressed-tensors":
        groups = _object(found, "config_groups")
        for name in groups:
            group = _object(groups, name)
            weights, inputs = _object(group, "weights"), _object(group, "input_activations")
            kinds = {"float": "fp8", "int": "int8"} if weights.get("num_bits") == 8 else {}
            kind = kinds.get(str(weights.get("type")))
            quant = kind and f"{kind}_{'w8a8' if inputs else 'w8a16'}"
            if quant in QUANTS:
                blocks = _blocks(weights, "block_structure") if weights.get("strategy") == "block" else None
                if weights.get("strategy") == "block" and not blocks:
                    raise ValueError("strategy is 'block' without block_structure, such as [128, 128]")
                return quant, blocks
    raise ValueError(
        f"quantisation {method!r} is none of {', '.join(QUANTS)}: its experts run on other kernels; "
        "give --dtype bfloat16 to tune the unquantised layer"
    )


def _object(found: Mapping, name: str) -> Mapping:
    """An object of a config.json, empty where it is missing or null."""
    value = found.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}, expected an object")
    return value


def _blocks(found: Mapping, name: str) -> tuple[int, int] | None:
    """[n, k] of the blocks that share a scale."""
    sizes = found.get(name)
    if not sizes:
        return None
    if not isinstance(sizes, list) or [type(size) for size in sizes] != [int, int]:
        raise ValueError(f"{name} is {sizes!r}, expected two sizes such as [128, 128]")
    return tuple(sizes)


def model_target(
    model: str,
    dtype: str = "auto",
    block_shape: tuple[int, int] | None = None,
    given: Mapping[str, int] = MappingProxyType({}),
) -> Target:
    """The MoE layer of a named model, or of a config.json or its folder.

    Args:
        dtype: one of DTYPES; "auto": as the model comes.
        block_shape: of the scales, in place of the model's.
        given: sizes of FIELDS, in place of the model's, or where a config.json lacks them.

    Raises:
        ValueError: no such model or file, or a config that lacks sizes or has an unknown quantisation.
    """
    if model in MODELS:
        layer, hidden_dtype = replace(MODELS[model], **given), "bfloat16"
    else:
        layer, hidden_dtype = _read(model, dtype == "auto", given)
    return target(layer, hidden_dtype if dtype == "auto" and layer.quant is None else dtype, block_shape)


def target(layer: MoeLayer, dtype: str = "auto", block_shape: tuple[int, int] | None = None) -> Target:
    """A layer in a dtype of DTYPES; "auto": the layer's own.

    Raises:
        ValueError: a block shape for weights that are not quantised, or one that no kernel takes.
    """
    if dtype != "auto":
        quant = dtype if dtype in QUANTS else None
        layer = replace(layer, quant=quant, block_shape=layer.block_shape if quant == layer.quant else None)
    if block_shape:
        if layer.quant is None:
            raise ValueError("--block-shape is for quantised weights: give --dtype too")
        layer = replace(layer, block_shape=block_shape)
    if layer.block_shape:
        checks.blocks_of_scales("tune", layer.block_shape)
    return Target(layer, "bfloat16" if layer.quant or dtype == "auto" else dtype)


def _read(model: str, auto: bool, given: Mapping[str, int]) -> tuple[MoeLayer, str]:
    path, config = model_config(model, MODELS)
    sizes = {
        size: next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
        for size, names in FIELDS.items()
    } | given
    if missing := [FIELDS[size][0] for size, value in sizes.items() if value is None]:
        raise ValueError(f"{path} has no MoE layer, or lacks {', '.join(missing)}: give the sizes as options")
    try:
        quant, block_shape = quantisation(config) if auto else (None, None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    hidden_dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    gated = (config.get("mlp_hidden_act") or config.get("hidden_act")) != "relu2"
    layer = MoeLayer(**sizes, gated=gated, quant=quant, block_shape=block_shape)
    return layer, hidden_dtype if hidden_dtype in DTYPES else "bfloat16"


def sharded(layer: MoeLayer, tp: int = 1, ep: int = 1) -> MoeLayer:
    """The layer as one of tp x ep GPUs sees it: tp cuts the intermediate size, ep the experts.

    Raises:
        ValueError: sizes that no layer has, or that tp or ep do not divide; ep of a layer that is one GPU's already.
    """
    sizes = (tp, ep, layer.experts, layer.top_k, layer.hidden, layer.intermediate)
    if min(sizes) < 1 or layer.top_k > (layer.global_experts or layer.experts):
        raise ValueError(f"{layer.name}, hidden size {layer.hidden}, --tp {tp} --ep {ep}: no layer has such sizes")
    if layer.intermediate % tp or layer.experts % ep:
        raise ValueError(
            f"--tp {tp} --ep {ep} do not divide {layer.experts} experts of intermediate size {layer.intermediate}"
        )
    if ep > 1 and layer.global_experts:
        raise ValueError(
            f"--ep {ep} of {layer.name}: it names one GPU's {layer.experts} of {layer.global_experts} experts already; "
            "leave --ep out, or name the layer with all its experts"
        )
    return replace(
        layer,
        experts=layer.experts // ep,
        intermediate=layer.intermediate // tp,
        global_experts=layer.experts if ep > 1 else layer.global_experts,
    )
