"""Our subclass of vLLM's PunicaWrapperGPU; vLLM resolves it by name (see vllm_lora.py).

The host's own metadata, which its fused-MoE LoRA methods and its classification heads read, are views of our plans: one
copy a step fills both.
"""

from __future__ import annotations

import bisect

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.layers.linear import QKVParallelLinear

from lora_ops.ops import linear_beside
from ops_patches import counters

from .vllm_punica import PlannedLora, check_slices, flat_rows

MOE_REASON = "fused-MoE LoRA stays with vLLM's kernels"


class LoraOpsPunicaWrapperGPU(PlannedLora, PunicaWrapperGPU):
    """PunicaWrapperGPU whose LoRA layers run on lora_ops; fused-MoE LoRA stays the host's and is counted."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs) -> None:
        PunicaWrapperGPU.__init__(self, max_num_batched_tokens, max_batches, device, **kwargs)
        self._make_plans(max_num_batched_tokens, self.max_loras, device)
        self.plan.expect_any_step()  # graphs of vision encoders are captured before their first mapping
        meta = self.token_mapping_meta
        meta.token_lora_mapping = self.plan.section("token_slots")
        meta.token_indices_sorted_by_lora_ids = self.plan.section("order")
        meta.active_lora_ids = self.plan.section("active_slots")
        meta.num_tokens_per_lora = self.plan.section("tokens_per_slot")
        meta.lora_token_start_loc = self.plan.section("slot_starts")
        self._no_lora, self._num_active = meta.no_lora_flag_cpu.numpy(), meta.num_active_loras_cpu.numpy()
        self._token_lora_indices = self.plan.section("token_slots")
        self._sampler_indices = self.sampler_plan.section("token_slots")
        offsets = self.plan.section("offsets")
        self._embeddings_indices = offsets.unsqueeze(0).expand(2, -1) if self._embeddings_indices.ndim == 2 else offsets

    def update_metadata(self, mapping, lora_index_to_id, max_loras: int, vocab_size: int, **kwargs) -> None:
        """Plan the step on the CPU and send it with one copy, without a sync."""
        self.is_prefill = mapping.is_prefill
        self._update_plans(mapping, lora_index_to_id, vocab_size)
        self.indices_len[:2] = self.plan.num_tokens, self._sampler_slots.size
        groups, counts = self.plan.num_groups, self.token_mapping_meta.captured_lora_counts
        active = self.plan.num_active > 0
        larger = bisect.bisect_left(counts, groups)
        if larger < len(counts):
            groups = counts[larger]
        self._no_lora[0] = not active
        self._num_active[0] = groups if active else 0

    def moe_lora_align_block_size(self, *args, **kwargs):
        counters.fallback("moe_lora_align_block_size", MOE_REASON)
        return PunicaWrapperGPU.moe_lora_align_block_size(self, *args, **kwargs)

    def add_lora_fused_moe(self, *args, **kwargs) -> None:
        counters.fallback("add_lora_fused_moe", MOE_REASON)
        PunicaWrapperGPU.add_lora_fused_moe(self, *args, **kwargs)


def apply_beside(layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """BaseLinearLayerWithLoRA._apply_sync, with the LoRA part beside the base GEMM where torch.compile traces it."""
    if not torch.compiler.is_compiling() or x.ndim != 2:
        return type(layer)._apply_sync(layer, x, bias)
    check_slices("apply_beside", layer.lora_b_stacked, layer.output_slices)
    return linear_beside(
        lambda: layer._get_quant_method().apply(layer.base_layer, x, bias),
        flat_rows(x),
        layer.lora_a_stacked,
        layer.lora_b_stacked,
        layer.punica_wrapper.plan,
        in_place=isinstance(layer.base_layer, QKVParallelLinear),
    )
