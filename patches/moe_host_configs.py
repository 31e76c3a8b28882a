"""Tuned config files for the hosts' own fused MoE kernels, for people who do not patch.

vLLM reads    <VLLM_TUNED_CONFIG_FOLDER>/E=128,N=768,device_name=NVIDIA_H200[,dtype=..][,block_shape=[128,128]].json
SGLang reads  <SGLANG_MOE_CONFIG_DIR>/configs/triton_3_6_0/E=128,N=768,device_name=NVIDIA_H200[,dtype=..]
              [,block_shape=[128, 128]][,per_channel_quant=True][_down].json

Both hold {"tokens": config} and take the entry of the nearest number of tokens, however far: a file has an entry for
each of `configs.moe.TOKENS`, the host's own config where nothing was measured. E: experts on this device; N: the
intermediate size there. They differ: vLLM leaves the space out of block_shape, calls all of the H200 family
NVIDIA_H200, and skips a "triton_version" among the entries, which stops SGLang. SGLang's folder replaces its bundled
one, so those files are copied beside ours; its _down file is for the second half, and must have the other's
BLOCK_SIZE_M.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ops_configs.files import replacing
from ops_configs.moe import TOKENS
from ops_configs.tuning import compile_pool, locked, submit, writable

MARGIN = 0.03
"""An entry is the host's own config unless another one is faster by this fraction, measured again."""
GROUPS = (1, 16, 32, 64)
KEYS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")

Config = dict[str, Any]
Pair = tuple[tuple, tuple | None]
"""Configs of the first half and, where it has its own, of the second, as sorted items, so that a set can hold them."""


@dataclass(frozen=True)
class Sizes:
    """What is tuned: targets of `moe_ops.tuning.layers`, numbers of tokens, routing."""

    targets: list
    tokens: list[int]
    routing: str = "uniform"


def vllm_file(experts: int, intermediate: int, dtype: str | None, block_shape, gpu: str) -> str:
    """What vLLM calls the file of a layer; dtype: fp8_w8a8, int8_w8a16, float32, or None for half precision."""
    device = re.sub(r"[\s/]+", "_", gpu)
    if "H200" in device.split("_"):
        device = "NVIDIA_H200"
    name = f"E={experts},N={intermediate},device_name={device}" + (f",dtype={dtype}" if dtype else "")
    return name + (f",block_shape=[{block_shape[0]},{block_shape[1]}]" if block_shape else "") + ".json"


def sglang_file(
    experts: int, intermediate: int, dtype: str | None, block_shape, gpu: str, per_channel: bool, down: bool = False
) -> str:
    """What SGLang calls the file of a layer; dtype as above, or int8_w8a8."""
    name = f"E={experts},N={intermediate},device_name={gpu.replace(' ', '_')}" + (f",dtype={dtype}" if dtype else "")
    name += f",block_shape=[{block_shape[0]}, {block_shape[1]}]" if block_shape else ""
    return name + (",per_channel_quant=True" if per_channel else "") + ("_down" if down else "") + ".json"


def sglang_folder(folder: Path, triton_version: str) -> Path:
    """Where SGLang looks below SGLANG_MOE_CONFIG_DIR."""
    return folder / "configs" / f"triton_{triton_version.replace('.', '_')}"


def write_file(path: Path, entries: Mapping[int, Config], others: Mapping[int, Config] | None = None) -> None:
    """Write a file of either host; entries of other numbers of tokens stay, `others` are for those that it has not."""
    with locked(path.parent):
        entries = {**(others or {}), **(read_file(path) if path.exists() else {}), **entries}
        with replacing(path) as part:
            part.write_text(json.dumps({str(tokens): entries[tokens] for tokens in sorted(entries)}, indent=4) + "\n")


def read_file(path: Path) -> dict[int, Config]:
    """tokens -> config, from a file of either host.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("expected an object of configs by number of tokens")
        content.pop("triton_version", None)
        entries = {int(tokens): config for tokens, config in content.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for tokens, config in entries.items():
        if not isinstance(config, dict) or not isinstance(config.get("BLOCK_SIZE_M"), int):
            raise ValueError(f"{path}: the config for {tokens} tokens lacks BLOCK_SIZE_M")
    return entries


def dtype_name(host: str, target) -> str | None:
    """What a host calls the dtype of a layer in the name of its file.

    Raises:
        ValueError: vLLM's int8_w8a8 layers read the unquantised layers' files; neither runs int8_w8a16 in blocks.
    """
    if target.dtype == "int8_w8a16" and target.layer.block_shape:
        raise ValueError(f"{host} runs no int8_w8a16 with scales of blocks: leave out --block-shape")
    if host == "vllm" and target.dtype == "int8_w8a8":
        raise ValueError("vLLM has no file of its own for int8_w8a8: it reads the unquantised layer's")
    return None if target.dtype in ("float16", "bfloat16") else target.dtype


def check(name: str, folder: Path, targets: list) -> None:
    """Look for what would end `write` before anything is measured.

    Raises:
        ValueError: the host is not installed, reads other files than its own, has no file for such a layer, or cannot
            read what stands in the folder; or the folder cannot be written.
    """
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--write-{name} measures {name}'s own kernel: {name} is not installed here")
    if os.environ.get(variable := HOSTS[name].variable):
        raise ValueError(f"{variable} is set: unset it, for what is not measured is to be {name}'s own config")
    for target in targets:
        dtype_name(name, target)
    writable(folder)
    for path in folder.rglob("E=*.json"):
        read_file(path)


def host_config(config) -> Config:
    """Our launch parameters under the hosts' names."""
    values = (config.block_m, config.block_n, config.block_k, config.group_m, config.num_warps, config.num_stages)
    return dict(zip(KEYS, values, strict=True))


def items(config: Config | None) -> tuple | None:
    return None if config is None else tuple(sorted(config.items()))


def pair_of(gate_up: Config, down: Config | None = None) -> Pair:
    return items(gate_up), items(down)


def candidates(target, tokens: int, itemsize: int, half: str = "gate_up", block_m: int | None = None) -> list[Config]:
    """Configs worth a measurement: ours, for the hosts' kernel, which computes gates and ups as one product."""
    from moe_ops.tuning.candidates import block_ms
    from moe_ops.tuning.candidates import candidates as ours

    layer = target.layer
    both = replace(layer, gated=False, intermediate=layer.products * layer.intermediate) if half == "gate_up" else layer
    sizes = [block_m] if block_m else block_ms(layer, tokens, itemsize)
    return [host_config(config) for m in sizes for config in ours(both, half, tokens, m, itemsize)]


class Vllm:
    """vLLM's fused_experts over our measurement's data. variable: by which it finds our files."""

    variable = "VLLM_TUNED_CONFIG_FOLDER"

    def __init__(self) -> None:
        folder = "vllm.model_executor.layers.fused_moe"
        self.package = importlib.import_module(folder)
        self.kernels = importlib.import_module(f"{folder}.fused_moe")
        self.quant = importlib.import_module(f"{folder}.config")
        self.activation = importlib.import_module(f"{folder}.activation").MoEActivation

    def default(self, target, tokens: int) -> Pair:
        """What vLLM would run: from its own files, or its heuristic."""
        layer, block = target.layer, target.layer.block_shape
        shapes = weight_shapes(layer)
        name = dtype_name("vllm", target)
        found = self.kernels.try_get_optimal_moe_config(*shapes, layer.top_k, name, tokens, block and list(block))
        return pair_of(found)

    def down_candidates(self, target, tokens: int, itemsize: int, best: Pair) -> list[Pair]:
        return []

    @contextmanager
    def using(self, pair: Pair) -> Iterator[None]:
        with self.package.override_config(dict(pair[0])):
            yield

    def run(self, batch, i: int) -> Any:
        (hidden, w13, w2, weights, ids), keywords = batch.arguments(i)
        experts_over_all = len(keywords["expert_map"]) if keywords["expert_map"] is not None else -1
        silu = self.activation.SILU if batch.bench.layer.gated else self.activation.SILU_NO_MUL
        return self.kernels.fused_experts(
            *(hidden, w13, w2, weights, ids),
            activation=silu,
            global_num_experts=experts_over_all,
            expert_map=keywords["expert_map"],
            quant_config=self._quant_config(batch.bench.layer, keywords),
        )

    def _quant_config(self, layer, keywords: dict) -> Any:
        if layer.quant is None:
            return None
        scales = {"w1_scale": keywords["w13_scale"], "w2_scale": keywords["w2_scale"]}
        if layer.quant == "int8_w8a16":
            return self.quant.int8_w8a16_moe_quant_config(**scales, w1_zp=None, w2_zp=None)
        block = layer.block_shape and list(layer.block_shape)
        per_channel = block is None
        return self.quant.fp8_w8a8_moe_quant_config(
            **scales, per_act_token_quant=per_channel, per_out_ch_quant=per_channel, block_shape=block
        )

    def paths(self, folder: Path, target, gpu: str) -> list[Path]:
        layer = target.layer
        name = vllm_file(layer.experts, layer.intermediate, dtype_name("vllm", target), layer.block_shape, gpu)
        return [folder / name]

    def prepare(self, folder: Path) -> None:
        """Nothing: vLLM asks its own files, too."""


class Sglang:
    """SGLang's fused_experts over our measurement's data. variable: by which it finds our files."""

    variable = "SGLANG_MOE_CONFIG_DIR"

    def __init__(self) -> None:
        folder = "sglang.srt.layers.moe.moe_runner"
        context = importlib.import_module("sglang.srt.runtime_context").get_context()
        self.server_args = context.override_server_args().install()  # the defaults: without a server there are none
        self.kernels = importlib.import_module(f"{folder}.triton_utils.fused_moe")
        self.configs = importlib.import_module(f"{folder}.triton_utils.fused_moe_triton_config")
        self.runner_config = importlib.import_module(folder).MoeRunnerConfig
        answer_for_one_gpu(self.kernels)

    def default(self, target, tokens: int) -> Pair:
        """What SGLang would run: from its own files, or its heuristic."""
        layer, block = target.layer, target.layer.block_shape
        config, (down, _) = self.configs.try_get_optimal_moe_config(
            *weight_shapes(layer),
            layer.top_k,
            dtype_name("sglang", target),
            tokens,
            block_shape=block and list(block),
            per_channel_quant=per_channel(layer),
            return_down_config=True,
        )
        return pair_of(config, down)

    def down_candidates(self, target, tokens: int, itemsize: int, best: Pair) -> list[Pair]:
        """The second half's own configs for the tiles of the best first half, read through TMA or not."""
        first = dict(best[0])
        found = candidates(target, tokens, itemsize, "down", first["BLOCK_SIZE_M"])
        modes = (False,) if (target.layer.quant or "").startswith("int8") else (True, False)
        return [pair_of(first, {**config, "USE_TMA": tma}) for config in found for tma in modes]

    @contextmanager
    def using(self, pair: Pair) -> Iterator[None]:
        before = self.kernels.try_get_optimal_moe_config
        self.kernels.try_get_optimal_moe_config = lambda *args, **kwargs: (
            dict(pair[0]),
            (pair[1] and dict(pair[1]), None),
        )
        try:
            yield
        finally:
            self.kernels.try_get_optimal_moe_config = before

    def run(self, batch, i: int) -> Any:
        import torch

        (hidden, w13, w2, weights, ids), keywords = batch.arguments(i)
        layer = batch.bench.layer
        if keywords["expert_map"] is not None:
            ids = torch.where(ids < layer.experts, ids, -1)
        options: dict[str, Any] = {}
        if layer.quant:
            options = {f"use_{layer.quant}": True, "w1_scale": keywords["w13_scale"], "w2_scale": keywords["w2_scale"]}
            options |= {"per_channel_quant": per_channel(layer)}
            options |= {"block_shape": layer.block_shape and list(layer.block_shape)}
        runner = self.runner_config(
            num_experts=layer.global_experts or layer.experts,
            num_local_experts=layer.experts,
            top_k=layer.top_k,
            is_gated=layer.gated,
            inplace=False,
        )
        return self.kernels.fused_experts(hidden, w13, w2, (weights, ids, None), runner, **options)

    def paths(self, folder: Path, target, gpu: str) -> list[Path]:
        import triton

        layer, inner = target.layer, sglang_folder(folder, triton.__version__)
        sizes = layer.experts, layer.intermediate, dtype_name("sglang", target), layer.block_shape, gpu
        return [inner / sglang_file(*sizes, per_channel(layer), down) for down in (False, True)]

    def prepare(self, folder: Path) -> None:
        """SGLang asks one folder alone: put its own files there, beside ours."""
        bundled = Path(self.configs.__file__).parent / "configs"
        for source in bundled.glob("triton_*/*.json"):
            copy = folder / source.relative_to(bundled.parent)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)


def answer_for_one_gpu(fused_moe: ModuleType) -> None:
    """Answer what SGLang's fused_moe asks of its tensor-parallel group: its size, for which no group has to be made."""
    group = SimpleNamespace(world_size=1)
    fused_moe.get_tp_group = lambda: group  # 0.5.17
    fused_moe.get_parallel = lambda: SimpleNamespace(tp_group=group)  # 0.5.22 and later


HOSTS = {"vllm": Vllm, "sglang": Sglang}


@functools.cache
def _host(name: str):
    return HOSTS[name]()


def per_channel(layer) -> bool:
    """Whether a layer's weights have a scale for each output channel, as our measurement makes them."""
    return layer.quant is not None and layer.block_shape is None


def weight_shapes(layer) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of w13 and w2."""
    rows = layer.products * layer.intermediate
    return (layer.experts, rows, layer.hidden), (layer.experts, layer.hidden, layer.intermediate)


def _compile(name: str, target, tokens: int, pair: Pair, device: int) -> None:
    """In a process of the pool: run a pair on a small batch, whose kernels are those of `tokens` tokens."""
    import torch

    with suppress(Exception):  # fails again, with its error, where it is measured
        torch.cuda.set_device(device)
        batch = _small(target, min(tokens, 16), device)
        with _host(name).using(pair):
            _host(name).run(batch, 0)


@functools.lru_cache(2)
def _small(target, tokens: int, device: int):
    import torch

    from moe_ops.tuning.measure import Bench

    layer = replace(target.layer, experts=target.layer.top_k, global_experts=None)
    return Bench(replace(target, layer=layer), torch.device("cuda", device), clock=False).batch(tokens)


class Timer:
    """Times pairs on a batch, after the pool has compiled them."""

    def __init__(self, host, batch, compile_all: Callable[[list[Pair]], None], default: Pair) -> None:
        from ops_configs.clock import GRAPH_US

        self.host, self.batch, self.compile_all = host, batch, compile_all
        self.calls = 1
        self.calls = max(1, min(round(GRAPH_US / self.time(default)), 16))

    def time(self, pair: Pair, best_us: float = float("inf"), replays: int = 3) -> float:
        """Median microseconds a call; infinite where the pair does not fit the GPU."""
        from ops_configs.clock import LOSER, too_large

        try:
            with self.host.using(pair):
                replay = self.batch.bench.clock.capture(lambda i: self.host.run(self.batch, i), self.calls)
        except Exception as error:
            if not too_large(error):
                raise
            return float("inf")
        first = replay()
        return (
            first if first > LOSER * best_us else sorted([first, *(replay() for _ in range(replays - 1))])[replays // 2]
        )

    def best_of(self, start: Pair, found: list[Pair]) -> tuple[Pair, float]:
        """The fastest pair, and its us; the best few are measured again."""
        self.compile_all(found)
        times = {start: self.time(start, replays=7)}
        for pair in found:
            if pair not in times:
                times[pair] = self.time(pair, min(times.values()))
        again = {pair: self.time(pair, replays=7) for pair in sorted(times, key=times.get)[:4]}
        best = min(again, key=again.get)
        return best, again[best]


def tune_case(host, timer: Timer, target, tokens: int, itemsize: int, default: Pair) -> tuple[Pair, float, float]:
    """The best pair of a layer and number of tokens, its us, and the host's own config's us."""
    best, _ = timer.best_of(default, [pair_of(config) for config in candidates(target, tokens, itemsize)])
    first = dict(best[0])
    groups = [pair_of({**first, "GROUP_SIZE_M": group}) for group in GROUPS] if first["BLOCK_SIZE_M"] >= 64 else []
    best, us = timer.best_of(best, groups)
    if found := host.down_candidates(target, tokens, itemsize, best):
        both, both_us = timer.best_of(best, found)
        best = both if both_us <= (1 - MARGIN) * us else best
    us, default_us = (timer.time(pair, replays=11) for pair in (best, default))
    return (best, us, default_us) if us <= (1 - MARGIN) * default_us else (default, default_us, default_us)


def write(name: str, folder: Path, sizes: Sizes, device: int, processes: int, console) -> None:
    """Sweep a host's fused MoE kernel on one GPU, and write its files; name: one of HOSTS, see `check`.

    A number of tokens that fails ends it; what was measured before stands in the files, and for the others what the
    host runs there.
    """
    import torch
    from rich.progress import Progress

    from moe_ops.tuning.measure import Bench

    host = _host(name)
    torch.cuda.set_device(device)
    gpu = torch.cuda.get_device_name(device)
    with compile_pool(processes) as pool, Progress(console=console) as progress:
        task = progress.add_task(f"{name}'s kernel", total=len(sizes.targets) * len(sizes.tokens))
        for target in sizes.targets:
            bench = None  # frees the weights before the next ones are made
            bench = Bench(target, torch.device("cuda", device))
            itemsize = target.layer.itemsize(bench.dtype)
            found: dict[int, Pair] = {}
            saved = [0.0, 0.0]
            try:
                for tokens in sizes.tokens:

                    def compile_all(pairs: list[Pair], target=target, tokens=tokens) -> None:
                        wait([submit(pool, _compile, name, target, tokens, pair, device) for pair in pairs])

                    default = host.default(target, tokens)
                    timer = Timer(host, bench.batch(tokens, sizes.routing), compile_all, default)
                    found[tokens], us, default_us = tune_case(host, timer, target, tokens, itemsize, default)
                    saved = [saved[0] + us, saved[1] + default_us]
                    progress.advance(task)
            finally:
                for path in write_entries(host, folder, target, gpu, found) if found else []:
                    ratio = saved[1] / saved[0]
                    console.print(f"{path}: {ratio:.2f} times as fast as {name}'s own in sum", highlight=False)
    host.prepare(folder)
    console.print(f"for {name} as it is: {host.variable}={folder}", highlight=False)


def write_entries(host, folder: Path, target, gpu: str, found: Mapping[int, Pair]) -> list[Path]:
    """Write the pairs of a layer, by number of tokens; a file for the second half only where one has its own config."""
    pairs = {tokens: host.default(target, tokens) for tokens in TOKENS if tokens not in found} | dict(found)
    first = {tokens: dict(pair[0]) for tokens, pair in pairs.items()}
    path, *down = host.paths(folder, target, gpu)
    write_file(path, {tokens: first[tokens] for tokens in found}, first)
    if not down or not (down[0].exists() or any(pair[1] for pair in pairs.values())):
        return [path]
    before = read_file(down[0]) if down[0].exists() else {}
    second = {}
    for tokens, config in read_file(path).items():  # the second half has the first one's tiles, whoever wrote it
        kept = before.get(tokens, {})
        if tokens not in found and kept.get("BLOCK_SIZE_M") == config["BLOCK_SIZE_M"]:
            second[tokens] = kept
        elif config == first.get(tokens):
            second[tokens] = dict(pairs[tokens][1] or config)
        else:
            second[tokens] = config
    write_file(down[0], second)
    return [path, down[0]]
