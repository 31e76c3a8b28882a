"""Which layers a model has: from its config.json, by name, or as explicit shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ops_configs.tuning import model_config

MODELS = {
    "llama3-8b": {"hidden_size": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate_size": 14336},
    "llama3-70b": {"hidden_size": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "intermediate_size": 28672},
    "qwen3-8b": {"hidden_size": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate_size": 12288},
    "qwen3-32b": {"hidden_size": 5120, "heads": 64, "kv_heads": 8, "head_dim": 128, "intermediate_size": 25600},
}
"""Models known by name; intermediate_size 0: the MLP is made of experts, whose layers are not tuned here."""


@dataclass(frozen=True, order=True)
class Layer:
    """A linear layer with LoRA: x [M, k] -> slices of `widths` output features."""

    k: int
    widths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.k}:{','.join(map(str, self.widths))}"


def parse_shape(text: str) -> Layer:
    """A layer from "k:w0,w1,w2".

    Raises:
        ValueError: anything else.
    """
    k, _, widths = text.partition(":")
    numbers = [k, *widths.split(",")]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or len(numbers) > 4:
        raise ValueError(f"shape {text!r} is not K:N0[,N1[,N2]], such as 4096:4096,1024,1024")
    return Layer(int(k), tuple(map(int, numbers[1:])))


def model_sizes(model: str) -> dict[str, int]:
    """hidden_size, heads, kv_heads, head_dim and intermediate_size of a named model, or of a config.json or its folder.

    Raises:
        ValueError: no such model or file, a config that lacks sizes or has others than positive integers, or latent
            attention (MLA).
    """
    if model in MODELS:
        return MODELS[model]
    path, config = model_config(model, MODELS)
    if latent := [name for name in ("q_lora_rank", "kv_lora_rank") if config.get(name)]:
        raise ValueError(
            f"{path}: {latent[-1]} is {config[latent[-1]]!r}, so its attention is latent, without a qkv layer: give "
            "the shapes of its layers (vLLM's fused_qkv_a_proj, q_b_proj, o_proj, ...) with --shape K:N0,N1,..."
        )

    def size(name: str, default: int = 0) -> int:
        value = config.get(name) or default
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {name} is {config.get(name)!r}: give the shapes with --shape K:N0,N1,...")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    experts = any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return {
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": size("num_key_value_heads", heads),
        "head_dim": size("head_dim", hidden // heads),
        "intermediate_size": 0 if experts else size("intermediate_size"),
    }


def model_layers(model: str, tp: int = 1) -> dict[str, Layer]:
    """qkv, o, gate_up and down of a model, as one of tp GPUs sees them (LoRA weights sharded with the base layer).

    Raises:
        ValueError: an unknown model, or sizes that tp does not divide.
    """
    sizes = model_sizes(model)
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["heads"], sizes["kv_heads"]
    inter = sizes["intermediate_size"]
    if tp < 1 or heads % tp or inter % tp or max(kv_heads, tp) % min(kv_heads, tp):
        raise ValueError(
            f"--tp {tp} does not divide {model}: {heads} heads, {kv_heads} key-value heads, {inter} wide MLP"
        )
    q, kv = heads * sizes["head_dim"] // tp, max(kv_heads // tp, 1) * sizes["head_dim"]
    layers = {"qkv": Layer(hidden, (q, kv, kv)), "o": Layer(q, (hidden,))}
    if inter:
        layers |= {"gate_up": Layer(hidden, (inter // tp,) * 2), "down": Layer(inter // tp, (hidden,))}
    return layers
