"""Runs vLLM's real PunicaWrapperGPU and ours side by side on CPU tensors, kernels in Triton's interpreter.

Prints one JSON object: the largest differences, relative to the largest value, and the metadata of both.
Needs TRITON_INTERPRET=1, CUDA_VISIBLE_DEVICES="" and vLLM's GPU sources on PYTHONPATH.
"""

import contextlib
import importlib
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import vllm.platforms
import vllm.utils.torch_utils
from vllm.platforms.interface import Platform, PlatformEnum


class CpuTensors(Platform):
    """An out-of-tree platform whose LoRA runs on the GPU wrapper class."""

    _enum = PlatformEnum.OOT
    device_name = device_type = "cpu"
    dispatch_key = "CPU"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False


vllm.platforms._current_platform = CpuTensors()
vllm.utils.torch_utils.PIN_MEMORY = False

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # noqa: E402
from vllm.lora.layers.utils import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU  # noqa: E402
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper  # noqa: E402
from vllm.model_executor.layers.linear import QKVParallelLinear  # noqa: E402

import lora_ops  # noqa: E402
from lora_ops.kernels.expand import expand_kernel  # noqa: E402
from lora_ops.kernels.shrink import shrink_kernel  # noqa: E402
from lora_ops.tuning.layers import Layer  # noqa: E402
from lora_ops.tuning.measure import Bench  # noqa: E402
from ops_patches import counters, vllm_lora_configs  # noqa: E402

MAX_TOKENS, MAX_LORAS, VOCABULARY, RANK = 64, 4, 100, 8
SLOT_TO_ADAPTER = [11, None, 13, 14]
TOKENS = [11, 11, 0, 14, 13, 0, 13, 11, 14]
PROMPTS = [0, 11, 14, 13]
META = (
    "token_lora_mapping",
    "token_indices_sorted_by_lora_ids",
    "active_lora_ids",
    "num_tokens_per_lora",
    "lora_token_start_loc",
)
DTYPE = torch.float16


def few_splits(original):
    """The host's launch parameters, but for the 64 parts of K that its shrink has: the interpreter runs each."""

    def get_lora_op_configs(*args, **kwargs) -> dict:
        return original(*args, **kwargs) | {"split_k": 2}

    return get_lora_op_configs


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DTYPE)


def difference(results: list[torch.Tensor]) -> float:
    host, ours = (result.double() for result in results)
    return float((host - ours).abs().max() / host.abs().max())


def metadata(wrapper, tokens: int) -> dict:
    meta = wrapper.token_mapping_meta
    fields = {name: getattr(meta, name).tolist() for name in META}
    for name in META[:2]:
        fields[name] = fields[name][:tokens]
    fields["no_lora"] = bool(meta.no_lora_flag_cpu)
    fields["num_active"] = int(meta.num_active_loras_cpu)
    fields["token_slots"] = wrapper.token_lora_indices.tolist()
    offsets = wrapper._embeddings_indices
    fields["embedding_offsets"] = (offsets[1] if offsets.ndim == 2 else offsets)[:tokens].tolist()
    return fields


def launches_of(wrapper) -> int:
    """Launches of a layer, as a CUDA graph captures them: whatever the plan is, its replays follow later ones."""
    x, y = draw(MAX_TOKENS, 96), draw(MAX_TOKENS, 32)
    ops = [importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{name}_op") for name in ("shrink", "expand")]
    kernels = [ops[0]._lora_shrink_kernel, ops[1]._lora_expand_kernel, shrink_kernel, expand_kernel]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(mock.patch.object(kernel, "run")) for kernel in kernels]
        wrapper.add_lora_linear(y, x, (draw(MAX_LORAS, 1, RANK, 96),), (draw(MAX_LORAS, 1, 32, RANK),), 1.0, (32,))
    return sum(run.call_count for run in runs)


class FastestLast:
    """In place of the clock of a GPU: runs each call, and says that each capture is faster than the one before."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, run, calls: int):
        for i in range(calls):
            run(i)
        self.captures += 1
        us = 100.0 / self.captures
        return lambda: us


def tuned() -> dict:
    """What the tuner makes of the host's kernels: their results over one of its batches, and the configs it chose."""
    report = {}
    bench = Bench(Layer(96, (32, 16)), RANK, MAX_LORAS, DTYPE, torch.device("cpu"), 0, cold_bytes=1 << 14, clock=False)
    batch = bench.batch(20)
    calls = vllm_lora_configs.Calls(batch)
    hidden = {"shrink": 96, "expand": 32}
    default = {op: vllm_lora_configs.default_config(op, MAX_LORAS, 20, hidden[op], RANK, 2) for op in hidden}
    default["shrink"] |= {"split_k": 2}
    for i in range(batch.copies(calls.plan)):
        calls.hidden.zero_()
        batch.y.zero_()
        out = batch.y.clone()
        for op in hidden:
            calls.run(op, default[op], i)
        batch.run(out, calls.plan, i)
        report.setdefault("difference", []).append(difference([batch.y, out]))
    for op in hidden:
        other = default[op] | {"marker": op}
        report[op] = vllm_lora_configs.best_of(FastestLast(), calls, op, [default[op], other])
    return report


def main() -> None:
    configs = {
        name: SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=name == "specialized")
        for name in ("specialized", "plain")
    }

    def build() -> dict:
        return {n: get_punica_wrapper(MAX_TOKENS, 16, torch.device("cpu"), lora_config=c) for n, c in configs.items()}

    with lora_ops.patch_vllm(strict=True):
        patched = build()
        set_mapping = BaseLinearLayerWithLoRA.set_mapping
    stock = build()
    assert type(stock["plain"]) is PunicaWrapperGPU
    both = host, ours = stock["plain"], patched["plain"]

    report = {"class": type(ours).__name__, "metadata": {name: {} for name in configs}, "difference": {}}
    report["launches before a mapping"] = [launches_of(wrapper) for wrapper in both]
    for name, tokens, prompts in (
        ("no adapter", [0] * 5, [0, 0]),
        ("one token", [14], [14]),
        ("mixed", TOKENS, PROMPTS),
    ):
        mapping = LoRAMapping(tokens, prompts, is_prefill=True)
        for mode in configs:
            pair = (stock[mode], patched[mode])
            for wrapper in pair:
                wrapper.update_metadata(mapping, SLOT_TO_ADAPTER, MAX_LORAS + 1, VOCABULARY)
            report["metadata"][mode][name] = [metadata(wrapper, len(tokens)) for wrapper in pair]

    rows, widths, k = len(TOKENS), (32, 16, 16), 96
    x = draw(rows, k)
    a = tuple(draw(MAX_LORAS, 1, RANK, k, scale=k**-0.5) for _ in widths)
    b = tuple(draw(MAX_LORAS, 1, n, RANK) for n in widths)
    y = draw(rows, sum(widths))

    def compare(name: str, run) -> None:
        results = []
        for wrapper in both:
            out = y.clone()
            returned = run(wrapper, out)
            results.append(out if returned is None else returned)
        report["difference"][name] = difference(results)

    def linear(wrapper, out, **kwargs):
        wrapper.add_lora_linear(out, x, a, b, 0.5, widths, **kwargs)

    def write_linear(wrapper, out):
        out.zero_()  # as vLLM does before it runs LoRA on a stream of its own
        linear(wrapper, out, add_inputs=False)

    def strided(wrapper, out):
        """vLLM 0.26.0 does not take them, 0.33.0 copies."""
        wrapper.add_lora_linear(out, x.T.contiguous().T if wrapper is ours else x, a, b, 0.5, widths)

    def shrink(wrapper, out):
        h = torch.zeros(len(widths), rows, RANK)
        wrapper.add_shrink(h, x, a, 1.0)
        return h

    def sharded(wrapper, out):
        """Fully sharded: a shard of the ranks is shrunk, the gathered buffer is expanded into a column window."""
        h = torch.cat([shrink_shard(wrapper, shard) for shard in range(2)], dim=-1)
        wrapper.add_expand(out, h[:1], (b[1],), (16,), offset_start=24, add_input=True)

    def shrink_shard(wrapper, shard):
        h = torch.zeros(len(widths), rows, RANK // 2)
        part = slice(shard * RANK // 2, (shard + 1) * RANK // 2)
        wrapper.add_shrink(h, x, tuple(w[:, :, part].contiguous() for w in a), 1.0)
        return h

    def embedding(wrapper, out):
        hidden = out[:, :32].contiguous()
        wrapper.add_lora_embedding(hidden, x[:, :RANK].contiguous(), b[0], add_input=True)
        return hidden

    def logits(wrapper, out):
        sampled = out[: len(PROMPTS), :32].contiguous()
        wrapper.add_lora_logits(sampled, x[: len(PROMPTS)], a[0], b[0], 1.0)
        return sampled

    def full_linear(wrapper, out):
        sampled = out[: len(PROMPTS), :RANK].contiguous()
        enabled = torch.tensor([True, False, True, False])
        bias = torch.ones(MAX_LORAS, RANK, dtype=DTYPE)
        wrapper.apply_lora_full_linear(sampled, x[: len(PROMPTS)], a[0], bias, enabled)
        return sampled

    def beside(wrapper, out, base_layer=None):
        """The layer's own method: the host's adds in place, ours runs beside the base GEMM while it is traced."""
        layer = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
        torch.nn.Module.__init__(layer)
        layer._enable_aux_cuda_stream = False
        layer.base_layer = base_layer or SimpleNamespace()
        layer.base_layer.quant_method = SimpleNamespace(apply=lambda base, x, bias: out + bias)
        layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices = a, b, widths
        set_mapping(layer, wrapper)
        report.setdefault("apply", []).append(layer._apply_sync.__func__.__name__)
        with (
            mock.patch.object(torch.compiler, "is_compiling", return_value=wrapper is ours),
            mock.patch("ops_patches.vllm_punica_gpu.linear_beside", wraps=lora_ops.linear_beside) as call,
        ):
            result = layer.apply(x, torch.ones(1, dtype=DTYPE))
        if wrapper is ours:
            report.setdefault("in_place", []).append(call.call_args.kwargs["in_place"])
        return result

    def beside_qkv(wrapper, out):
        """A layer whose outputs part ways after the sum, which ours makes in place."""
        base_layer = QKVParallelLinear.__new__(QKVParallelLinear)
        torch.nn.Module.__init__(base_layer)
        return beside(wrapper, out, base_layer)

    shrink_op = importlib.import_module("vllm.lora.ops.triton_ops.lora_shrink_op")
    shrink_op.get_lora_op_configs = few_splits(shrink_op.get_lora_op_configs)
    compare("linear", linear)
    compare("beside", beside)
    compare("beside, q k v", beside_qkv)
    compare("linear, written", write_linear)
    compare("linear of strided columns", strided)
    compare("shrink", shrink)
    compare("fully sharded", sharded)
    compare("embedding", embedding)
    compare("logits", logits)
    if hasattr(host, "apply_lora_full_linear"):
        compare("full linear", full_linear)
    report["counters"] = counters.snapshot()
    report["tuned"] = tuned()

    try:
        ours.update_metadata(LoRAMapping([99], [99], is_prefill=True), SLOT_TO_ADAPTER, MAX_LORAS + 1, VOCABULARY)
    except ValueError as error:
        report["unknown adapter"] = str(error)
    np.testing.assert_array_equal(ours.plan.token_slots, [0, 0, -1, 3, 2, -1, 2, 0, 3])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
