"""Our subclass of vLLM's PunicaWrapperCPU; vLLM resolves it by name (see vllm_lora.py)."""

from __future__ import annotations

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from .vllm_punica import PlannedLora


class LoraOpsPunicaWrapperCPU(PlannedLora, PunicaWrapperCPU):
    """PunicaWrapperCPU whose LoRA layers run on the CPU path of lora_ops."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs) -> None:
        PunicaWrapperCPU.__init__(self, max_num_batched_tokens, max_batches, device, **kwargs)
        self._make_plans(max_num_batched_tokens, kwargs["lora_config"].max_loras, device)

    def update_metadata(self, mapping, lora_index_to_id, max_loras: int, vocab_size: int, **kwargs) -> None:
        """Keep the host's own metadata (LoRA embeddings read it), and plan the step."""
        PunicaWrapperCPU.update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._update_plans(mapping, lora_index_to_id, vocab_size)

    def _operands(self, x: torch.Tensor, *weights) -> tuple:
        """In fp32, as the host's ops compute, where `--lora-dtype` is another than the model's."""
        x, *weights = PlannedLora._operands(self, x, *weights)
        if x.dtype != weights[0][0].dtype:
            x, *weights = x.float(), *([weight.float() for weight in slices] for slices in weights)
        return x, *weights
