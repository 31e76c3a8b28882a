"""Synthetic Llama, Qwen3 and Qwen3-MoE checkpoints, tokenizers and LoRA adapters: random weights in real file formats.

    write_tokenizer(folder, vocab_size)        tokenizer.json, tokenizer_config.json
    write_config(folder, shape)                config.json and the tokenizer: enough for `--load-format dummy`
    write_model(folder, shape)                 the same with model-*.safetensors and their index
    write_adapter(folder, shape, rank=8, ...)  adapter_config.json, adapter_model.safetensors (PEFT)

Linear weights are drawn with a variance of 1 / fan_in, so that activations keep their scale from layer to layer, and an
adapter's `strength` is the size of its update relative to the base layer's output: 0.5 changes greedy tokens at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

from lora_ops.tuning import layers as lora_layers
from moe_ops.tuning import layers as moe_layers

CORPUS = Path(__file__).resolve().parent.parent / "LICENSE"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama or Qwen3 model; counts and element numbers throughout. `head_dim` defaults to hidden / heads.

    With `experts` each layer has that many experts of size `intermediate`, `top_k` of them for a token, and a router.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_length: int = 2048
    head_dim: int = 0
    architecture: str = "llama"
    experts: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden // self.heads)

    def linear(self, module: str) -> tuple[int, int]:
        """(out_features, in_features) of a module named as in the checkpoint, without its path."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
            "gate": (self.experts, self.hidden),
            "embed_tokens": (self.vocab, self.hidden),
            "lm_head": (self.vocab, self.hidden),
        }[module]

    def path(self, layer: int, module: str) -> str:
        """Name of a layer's module in the checkpoint."""
        return f"model.layers.{layer}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}"

    def modules(self, layer: int) -> dict[str, str]:
        """Name in the checkpoint and kind of every linear module of a layer; the router is the module `gate`."""
        if not self.experts:
            return {self.path(layer, module): module for module in (*ATTENTION, *MLP)}
        found = {self.path(layer, module): module for module in (*ATTENTION, "gate")}
        for expert in range(self.experts):
            found |= {self.path(layer, f"experts.{expert}.{module}"): module for module in MLP}
        return found


TINY = LlamaShape(hidden=256, intermediate=704, layers=2, heads=4, kv_heads=2, vocab=512)


def _llama(name: str, layers: int, vocab: int, architecture: str = "llama") -> LlamaShape:
    """A model whose layers the LoRA tuner knows."""
    sizes = lora_layers.MODELS[name]
    return LlamaShape(
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=layers,
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        vocab=vocab,
        max_length=8192,
        head_dim=sizes["head_dim"],
        architecture=architecture,
    )


LLAMA3_8B = _llama("llama3-8b", layers=32, vocab=128256)
TINY_MOE = LlamaShape(
    hidden=256,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    vocab=512,
    architecture="qwen3_moe",
    experts=8,
    top_k=2,
)
_EXPERTS = moe_layers.MODELS["qwen3-30b-a3b"]
QWEN3_30B_A3B = LlamaShape(
    hidden=_EXPERTS.hidden,
    intermediate=_EXPERTS.intermediate,
    layers=48,
    heads=32,
    kv_heads=4,
    vocab=151936,
    max_length=8192,
    head_dim=128,
    architecture="qwen3_moe",
    experts=_EXPERTS.experts,
    top_k=_EXPERTS.top_k,
)
SHAPES = {
    "tiny": TINY,
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": _llama("llama3-70b", layers=80, vocab=128256),
    "qwen3-8b": _llama("qwen3-8b", layers=36, vocab=151936, architecture="qwen3"),
    "qwen3-32b": _llama("qwen3-32b", layers=64, vocab=151936, architecture="qwen3"),
    "tiny-moe": TINY_MOE,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on this repository's licence text and pad it to `vocab_size` entries.

    What the text has no merges for is filled with entries that no text encodes to, so that every token id a model of
    random weights may emit can be decoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(CORPUS)], trainer)
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab.update({f"<filler{i}>": i for i in range(len(vocab), vocab_size)})
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def write_config(folder: Path, shape: LlamaShape, dtype: torch.dtype = torch.float32) -> None:
    """Write all of a checkpoint but its weights: the configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config_class, name = {
        "llama": (LlamaConfig, "LlamaForCausalLM"),
        "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
        "qwen3_moe": (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    }[shape.architecture]
    experts = {}
    if shape.experts:
        experts = {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
        }
    config = config_class(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype=dtype,
        architectures=[name],
        **experts,
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab)


def write_model(
    folder: Path, shape: LlamaShape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> None:
    """Write a checkpoint with its tokenizer, one safetensors file per layer; `device` draws the numbers."""
    write_config(folder, shape, dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def linear(module: str) -> torch.Tensor:
        out_features, in_features = shape.linear(module)
        weight = torch.randn(out_features, in_features, generator=generator, device=device)
        return (weight / in_features**0.5).to(dtype).cpu()

    def norm(size: int = shape.hidden) -> torch.Tensor:
        return torch.ones(size, dtype=dtype)

    index = {}

    def save(part: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{part:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(shape.layers):
        tensors = {f"{path}.weight": linear(module) for path, module in shape.modules(layer).items()}
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = norm()
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = norm()
        if shape.architecture != "llama":
            for name in ("q_norm", "k_norm"):
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = norm(shape.head_dim)
        save(layer, tensors)
    outer = {
        # Embeddings of unit variance: the first layer sees the scale that the norms give to the others.
        "model.embed_tokens.weight": linear("embed_tokens") * shape.hidden**0.5,
        "model.norm.weight": norm(),
        "lm_head.weight": linear("lm_head"),
    }
    save(shape.layers, outer)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))


def write_adapter(
    folder: Path,
    shape: LlamaShape,
    rank: int = 8,
    targets: tuple[str, ...] = ATTENTION + MLP,
    seed: int = 0,
    strength: float = 0.5,
    dtype: torch.dtype = torch.float32,
    pool: torch.Tensor | None = None,
) -> None:
    """Write a PEFT LoRA adapter with lora_alpha = 2 * rank, so that a forgotten scaling of 2 shows.

    `targets` may hold any of ATTENTION, MLP and VOCABULARY. `strength` is the update's size relative to base output.
    `pool`, float32 [many] of unit variance, makes it fast: each tensor is cut from it at a random place.

    Raises:
        ValueError: the pool is smaller than a tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    scaling = 2

    def draw(rows: int, columns: int, std: float) -> torch.Tensor:
        if pool is None:
            numbers = torch.randn(rows, columns, generator=generator)
        else:
            spare = pool.numel() - rows * columns
            if spare < 0:
                raise ValueError(f"a pool of {pool.numel()} numbers is too small for a tensor of {rows} x {columns}")
            start = int(torch.randint(spare + 1, (), generator=generator))
            numbers = pool[start : start + rows * columns].view(rows, columns)
        return (numbers * std).to(dtype)

    tensors = {}

    def add(path: str, module: str) -> None:
        out_features, in_features = shape.linear(module)
        std_b = strength / scaling / rank**0.5
        if module == "embed_tokens":  # a lookup: rows of A are picked by token id, and B gives the hidden size
            tensors[f"base_model.model.{path}.lora_embedding_A"] = draw(rank, shape.vocab, 1.0)
            tensors[f"base_model.model.{path}.lora_embedding_B"] = draw(shape.hidden, rank, std_b)
        else:
            tensors[f"base_model.model.{path}.lora_A.weight"] = draw(rank, in_features, in_features**-0.5)
            tensors[f"base_model.model.{path}.lora_B.weight"] = draw(out_features, rank, std_b)

    for module in targets:
        if module == "lm_head":
            add("lm_head", module)
        elif module == "embed_tokens":
            add("model.embed_tokens", module)
        else:
            for layer in range(shape.layers):
                add(shape.path(layer, module), module)

    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
