"""What our GPU and CPU punica wrappers share: plans from vLLM's mapping, and the LoRA methods over our ops.

vLLM traces these methods with torch.compile: they only reshape and call one custom op each. The plan's buffers never
move, so they are constants of the traced graph; what changes from step to step is inside them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import lora_ops.ops  # noqa: F401 (registers torch.ops.lora_ops)
from lora_ops.plan import NO_ADAPTER, LoraPlan, plan_args
from ops_patches import counters, state


@functools.lru_cache(maxsize=8)
def _slots_by_adapter(slot_to_adapter: tuple[int | None, ...]) -> dict[int, int]:
    """The slot of each adapter that one holds, and none of 0 = no adapter."""
    return {adapter: slot for slot, adapter in enumerate(slot_to_adapter) if adapter is not None} | {0: NO_ADAPTER}


def slots_of(adapter_ids: Sequence[int], slot_to_adapter: Sequence[int | None]) -> np.ndarray:
    """Slot of each token from its adapter id (0 = no adapter) and the adapter of each slot (None = free), int32.

    Raises:
        ValueError: an adapter id that no slot holds.
    """
    slots = _slots_by_adapter(tuple(slot_to_adapter))
    try:
        return np.fromiter(map(slots.__getitem__, adapter_ids), np.int32, len(adapter_ids))
    except KeyError:
        unknown = sorted({int(adapter) for adapter in adapter_ids} - slots.keys())
        raise ValueError(
            f"tokens use adapters {unknown}, but the slots hold {slot_to_adapter}: activate them first"
        ) from None


class PlannedLora:
    """LoRA methods of a punica wrapper that run on a plan. Mixed in before the host's wrapper class."""

    plan: LoraPlan
    sampler_plan: LoraPlan

    def _make_plans(self, max_num_batched_tokens: int, max_loras: int, device: torch.device | str) -> None:
        self.plan = LoraPlan(max_num_batched_tokens, max_loras, device, has_offsets=True)
        self.sampler_plan = LoraPlan(max_num_batched_tokens, max_loras, device)
        self._sampler_slots = np.empty(0, dtype=np.int32)
        self._plans_sampler = False

    def _update_plans(self, mapping: Any, slot_to_adapter: Sequence[int | None], vocab_size: int) -> None:
        """Plan of the tokens, with the row offset of each token's LoRA embedding; plan of the sampled positions."""
        slots = slots_of(mapping.index_mapping, slot_to_adapter)
        self.plan.update(slots, vocab_size)
        if mapping.prompt_mapping == mapping.index_mapping:  # decode: every token is sampled
            self._sampler_slots = slots
        else:
            self._sampler_slots = slots_of(mapping.prompt_mapping, slot_to_adapter)
        if self._plans_sampler:
            self.sampler_plan.update(self._sampler_slots)
        counters.hit("update_metadata")
        state.publish()

    def _sampled(self) -> LoraPlan:
        """Plan of the sampled positions: built each step once the model has turned out to need it."""
        if not self._plans_sampler:
            self._plans_sampler = True
            self.sampler_plan.update(self._sampler_slots)
        return self.sampler_plan

    def _operands(self, x: torch.Tensor, *weights: Sequence[torch.Tensor]) -> tuple:
        """x [..., K] as [rows, K], and the weights of all slices as lists."""
        return flat_rows(x), *map(list, weights)

    def add_shrink(self, y, x, lora_a_stacked, scale: float, **kwargs) -> None:
        """y[s] = scale * A_s x for each slice s; y fp32 [S, M, R], zero for rows without adapter."""
        torch.ops.lora_ops.lora_shrink(*self._operands(x, lora_a_stacked), y, *plan_args(self.plan), scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs,
    ) -> None:
        """y[:, columns of slice s] (+)= B_s x[s], slices side by side from offset_start; x [S, M, R]."""
        check_slices("add_expand", lora_b_stacked, output_slices)
        y = y.view(-1, y.shape[-1])
        torch.ops.lora_ops.lora_expand(x, list(lora_b_stacked), y, *plan_args(self.plan), offset_start, add_inputs)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs
    ) -> None:
        """y (+)= B x, with x [M, R] the rows of lora_a that the tokens picked."""
        torch.ops.lora_ops.lora_expand(x.unsqueeze(0), [lora_b_stacked], y, *plan_args(self.plan), 0, add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        add_inputs: bool = True,
        **kwargs,
    ) -> None:
        """y[:, columns of slice s] (+)= scale * B_s A_s x for all slices of a layer."""
        if buffer is not None:
            raise ValueError("add_lora_linear makes its own buffer: call it without one")
        check_slices("add_lora_linear", lora_b_stacked, output_slices)
        torch.ops.lora_ops.lora_linear(
            y.view(-1, y.shape[-1]),
            *self._operands(x, lora_a_stacked, lora_b_stacked),
            *plan_args(self.plan),
            scale,
            0,
            add_inputs,
        )

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        """y += scale * B A x for the sampled positions."""
        if buffer is not None:
            raise ValueError("add_lora_logits makes its own buffer: call it without one")
        operands = self._operands(x, [lora_a_stacked], [lora_b_stacked])
        y = y.view(-1, y.shape[-1])
        torch.ops.lora_ops.lora_linear(y, *operands, *plan_args(self._sampled()), scale, 0, True)

    def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled) -> None:
        """y = W[slot] x + bias for the sampled positions whose adapter replaces the whole layer (classifier heads)."""
        adapter_y = torch.empty((1, x.size(0), weight_stacked.size(-2)), dtype=torch.float32, device=x.device)
        operands = self._operands(x, [weight_stacked])
        torch.ops.lora_ops.lora_shrink(*operands, adapter_y, *plan_args(self._sampled()), 1.0)
        y.copy_(self._select_full_linear_output(y, adapter_y[0], bias_stacked, module_enabled))


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [rows, K]; only columns that are strided are copied, as vLLM copies them."""
    x = x.view(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def check_slices(method: str, lora_b_stacked: Sequence[torch.Tensor], output_slices: Sequence[int]) -> None:
    """Raises ValueError unless the slices have the widths that the layer says."""
    widths = [b.shape[-2] for b in lora_b_stacked]
    if widths != list(output_slices):
        raise ValueError(f"{method}: lora_b has slices of {widths} columns, output_slices says {list(output_slices)}")
