#!/usr/bin/env python3
"""CPU time of a layer's call outside CUDA graphs: vLLM's own LoRA and MoE layers, and patched.

    python benchmarks/launch_time.py                  # Llama-3-8B's qkv and down, Qwen3-30B-A3B's experts
    python benchmarks/launch_time.py --tokens 600 --profile

Prompts and steps larger than vLLM's largest CUDA graph (512 tokens by default) launch every layer from Python: where a
layer takes the CPU longer than the GPU, the GPU waits. Called are add_lora_linear of vLLM's punica wrapper, and
fused_experts_impl, in turns; a call is timed until it returns, and the GPU is waited for after it. Needs a GPU and
vLLM. Rows go to benchmarks/results/<GPU>/launch_time.csv.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from running import RESULTS, append_rows, git_commit, origin, positive, progress_bar, spread_table, spread_us

COLUMNS = ["model", "layer", "tokens", "variant", "us", "us_p10", "us_p90"]
COLUMNS += ["host_version", "gpu", "torch", "triton", "commit", "date"]
CALLS, WARM_UP = 300, 20
ADAPTERS, RANK = 32, 16
Call = Callable[[], object]


@functools.cache
def lora_wrappers() -> dict:
    """Both wrappers of vLLM, by variant: vLLM is patched for them once, before there are any."""
    from step_metadata import wrappers

    return wrappers(ADAPTERS)


def lora_calls(module: str, tokens: int) -> dict[str, Call]:
    """Of both wrappers of vLLM, by variant; each adapter has as many tokens."""
    from shapes import MODELS
    from vllm.lora.layers.utils import LoRAMapping

    linear = next(m for m in MODELS["llama3-8b"] if m.name == module)
    on_gpu = {"dtype": torch.bfloat16, "device": "cuda"}
    x, y = torch.randn(tokens, linear.k, **on_gpu), torch.zeros(tokens, linear.n, **on_gpu)
    a = tuple(torch.randn(ADAPTERS, 1, RANK, linear.k, **on_gpu) for _ in linear.slices)
    b = tuple(torch.randn(ADAPTERS, 1, n, RANK, **on_gpu) for n in linear.slices)
    ids = tuple(1 + token * ADAPTERS // tokens for token in range(tokens))
    slots = list(range(1, ADAPTERS + 1))
    wrappers = lora_wrappers()
    for wrapper in wrappers.values():
        wrapper.update_metadata(LoRAMapping(ids, tuple(slots), is_prefill=True), slots, ADAPTERS + 1, 128256)
    arguments = (y, x, a, b, 1.0, linear.slices)
    return {name: functools.partial(wrapper.add_lora_linear, *arguments) for name, wrapper in wrappers.items()}


def moe_calls(model: str, tokens: int) -> dict[str, Call]:
    """Of vLLM's fused_experts_impl, which the patch replaces, by variant."""
    from moe_baselines import Vllm
    from moe_problem import make_problem
    from moe_shapes import LAYERS, Case

    import moe_ops

    problem = make_problem(Case(LAYERS[model], tokens, "uniform", "bf16"), "cuda", seed=0, blank=True)
    kernels, w = Vllm().kernels, problem.weights
    arguments = (problem.hidden[0], w.w13, w.w2, problem.topk_weights[0], problem.topk_ids[0])
    stock = kernels.fused_experts_impl
    with moe_ops.patch_vllm(strict=True):
        patched = kernels.fused_experts_impl
    return {name: functools.partial(call, *arguments) for name, call in (("stock", stock), ("patched", patched))}


def call_us(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds until each call returns. They take turns, for a machine's CPU is not as fast all the time."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
    return {name: values[WARM_UP:] for name, values in samples.items()}


def print_profile(call: Call) -> None:
    """Where the Python of a call spends its time."""
    profile = cProfile.Profile()
    for _ in range(CALLS):
        profile.enable()
        call()
        profile.disable()
        torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def table(rows: list[dict[str, str]]) -> Table:
    return spread_table("us of CPU time a call", ("model", "layer", "tokens"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", nargs="+", type=positive(int), default=[600, 2048], help="of a call; default: 600 2048")
    add("--profile", action="store_true", help="print where the Python of each call spends its time, too")
    add("--out", type=Path, help="folder of the CSV; default: benchmarks/results/<GPU>")
    add("--commit", default=git_commit(), help="to write into the rows; default: git's")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("this measures launches on a GPU, and torch sees none here")

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    gpu = torch.cuda.get_device_name()
    path = (options.out or RESULTS / gpu.replace(" ", "_")) / "launch_time.csv"
    layers = [("llama3-8b", module, lora_calls, module) for module in ("qkv", "down")]
    layers += [("qwen3-30b-a3b", "fused_experts_impl", moe_calls, "qwen3-30b-a3b")]
    rows: list[dict[str, str]] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(layers) * len(options.tokens))
        for model, layer, calls_of, argument in layers:
            for tokens in options.tokens:
                progress.update(task, description=f"{model} {layer}, {tokens} tokens")
                calls = calls_of(argument, tokens)
                where = {"host_version": version("vllm"), **origin(gpu, options.commit)}
                for variant, samples in call_us(calls).items():
                    case = {"model": model, "layer": layer, "tokens": tokens, "variant": variant}
                    rows.append(case | spread_us(samples) | where)
                    if options.profile:
                        progress.console.print(f"\n{model} {layer}, {tokens} tokens, {variant}:")
                        print_profile(calls[variant])
                progress.advance(task)
    append_rows(path, COLUMNS, rows)
    console.print(table(rows))
    console.print(f"rows: {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
