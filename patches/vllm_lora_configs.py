"""Tuned config files for vLLM's own LoRA kernels, for people who do not patch: VLLM_TUNED_CONFIG_FOLDER=<folder>.

vLLM reads <GPU>_SHRINK.json and <GPU>_EXPAND_TRUE.json (add_inputs), with spaces and dashes of the GPU's name as
underscores, and looks up [max_loras + 1][slices][tokens][k][n]; k is the hidden size of a shrink and the rank of an
expand, n the other one. Every level but the slices takes the nearest key; slices that are missing are a KeyError, so
those that no layer has hold vLLM's defaults.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ops_configs.files import replacing
from ops_configs.store import padded
from ops_configs.tuning import compile_pool, locked, submit, writable

TRITON_OPS = "vllm.lora.ops.triton_ops"
MAX_SLICES = 6
"""Numbers of slices that a file has keys for."""
CANDIDATES = 24
MARGIN = 0.03
PREFILL_TOKENS = 1024

Config = dict[str, int | None]
Key = tuple[int, int, int, int]
"""(slices, tokens, k, n) of an entry."""


@dataclass(frozen=True)
class Sizes:
    """What is tuned: (K, widths) of each layer, ranks, tokens of a batch, the server's max_loras, name of the dtype."""

    layers: list[tuple[int, tuple[int, ...]]]
    ranks: list[int]
    tokens: list[int]
    max_loras: int
    dtype: str


def sample_configs(op: str, k: int, rank: int, tokens: int, adapters: int, count: int) -> list[Config]:
    """At most `count` configs of vLLM's "shrink" or "expand", a fixed random sample of those without needless work.

    None has a tile above an adapter's rows or the rank, or a split without a block of K.
    """
    ranks, rows = padded(rank), padded(-(-tokens // adapters))
    space: dict[str, object] = {"block_m": [m for m in (16, 32, 64, 128) if m <= rows]}
    if op == "shrink":
        splits = (1, 4, 8, 16, 32) if tokens < PREFILL_TOKENS else (1, 2, 4, 8)
        space |= {"block_n": [n for n in (16, 32, 64) if n <= ranks], "block_k": (32, 64, 128, 256), "split_k": splits}
        space |= {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4), "group_size_m": (8,)}
    else:
        space |= {"block_n": (32, 64, 128, 256), "block_k": [size for size in (16, 32, 64) if size <= ranks]}
        space |= {"num_warps": (2, 4, 8), "num_stages": (2, 3)}
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    grid = [config for config in grid if config["block_k"] * config.get("split_k", 1) <= max(k, 256)]
    sample = random.Random(0).sample(grid, min(count, len(grid)))
    return [{**config, "num_ctas": 1, "max_nreg": None} for config in sample]


def file_name(gpu: str, op: str) -> str:
    """What vLLM calls the file of "shrink" or "expand" (with add_inputs) for torch's name of a GPU."""
    name = gpu.replace(" ", "_").replace("-", "_")
    return f"{name}_SHRINK.json" if op == "shrink" else f"{name}_EXPAND_TRUE.json"


def nested(
    entries: dict[Key, Config], max_loras: int, default: Callable[[int, int], Config], content: dict | None = None
) -> dict:
    """Entries as vLLM's files nest them.

    Args:
        entries: at least one.
        max_loras: of the server.
        default: (slices, tokens) -> vLLM's own config, for the numbers of slices that have no entry.
        content: of a file, to which the entries are added.
    """
    content = {} if content is None else content
    by_slices = content.setdefault(str(max_loras + 1), {})
    for (slices, tokens, k, n), config in sorted(entries.items()):
        by_slices.setdefault(str(slices), {}).setdefault(str(tokens), {}).setdefault(str(k), {})[str(n)] = config
    _, _, some_k, some_n = next(iter(entries))
    for slices in range(1, MAX_SLICES + 1):
        if str(slices) not in by_slices:
            tokens_found = sorted({key[1] for key in entries})
            by_slices[str(slices)] = {str(t): {str(some_k): {str(some_n): default(slices, t)}} for t in tokens_found}
    return content


def read_file(path: Path) -> dict:
    """Content of a file, nothing where there is none.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    level = [content]
    for name in ("max_loras + 1", "slices", "tokens", "k", "n"):
        if not all(isinstance(value, dict) for value in level):
            raise ValueError(f"{path}: expected objects by {name}")
        level = [inner for value in level for inner in value.values()]
    return content


def write_file(
    folder: Path, gpu: str, op: str, entries: dict[Key, Config], max_loras: int, default: Callable[[int, int], Config]
) -> Path:
    """Write entries where vLLM looks for them, see `nested`; others that stand in the file stay."""
    path = folder / file_name(gpu, op)
    with locked(folder):
        content = nested(entries, max_loras, default, read_file(path))
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")
    return path


def check(folder: Path) -> None:
    """Look for what would end `write` before anything is measured.

    Raises:
        ImportError: vLLM is not here, or has no such modules.
        ValueError: the folder cannot be written, or vLLM could not read what stands there.
    """
    kernels()
    writable(folder)
    for path in [*folder.glob("*_SHRINK.json"), *folder.glob("*_EXPAND_TRUE.json")]:
        read_file(path)


@functools.cache
def kernels() -> SimpleNamespace:
    """vLLM's modules: shrink, expand, meta (LoRAKernelMeta) and tables (its utils).

    Raises:
        ImportError: vLLM is not here, or has no such modules.
    """
    modules = {op: importlib.import_module(f"{TRITON_OPS}.lora_{op}_op") for op in ("shrink", "expand")}
    meta = importlib.import_module(f"{TRITON_OPS}.lora_kernel_metadata").LoRAKernelMeta
    return SimpleNamespace(**modules, meta=meta, tables=importlib.import_module(f"{TRITON_OPS}.utils"))


@contextmanager
def using(op: str, config: Config) -> Iterator[None]:
    """vLLM's kernel of `op` runs with `config` inside."""
    module = getattr(kernels(), op)
    before = module.get_lora_op_configs
    module.get_lora_op_configs = lambda *args, **kwargs: config
    try:
        yield
    finally:
        module.get_lora_op_configs = before


def default_config(op: str, max_loras: int, tokens: int, hidden: int, rank: int, slices: int) -> Config:
    """vLLM's choice where no file is set."""
    tables = kernels().tables
    original = tables.load_lora_op_config
    tables.load_lora_op_config = lambda *args: None
    try:
        lookup = tables.get_lora_op_configs.__wrapped__  # past its cache
        return dict(lookup(op, max_loras + 1, tokens, hidden, rank, slices, None if op == "shrink" else True))
    finally:
        tables.load_lora_op_config = original


class Calls:
    """vLLM's shrink and expand over a batch of our measurement."""

    def __init__(self, batch) -> None:
        import torch

        bench = batch.bench
        host = kernels()
        host.tables._LORA_A_PTR_DICT.clear()  # keyed by addresses, which come back
        host.tables._LORA_B_PTR_DICT.clear()
        self.plan = batch.plans[0]  # of all adapters
        meta = host.meta.make(bench.max_loras, batch.tokens, bench.device)
        meta.prepare_tensors(self.plan.token_slots)
        self.meta = meta.meta_args(batch.tokens, specialize_active_lora=False)
        shape = (len(bench.layer.widths), batch.tokens, bench.rank)
        self.hidden = torch.zeros(shape, dtype=torch.float32, device=bench.device)
        self.batch = batch

    def run(self, op: str, config: Config, i: int) -> None:
        a, b = self.batch.weights(self.plan, i)
        with using(op, config):
            if op == "shrink":
                kernels().shrink.lora_shrink(self.batch.x, a, self.hidden, *self.meta, 1.0)
            else:
                kernels().expand.lora_expand(self.hidden, b, self.batch.y, *self.meta, offset_start=0, add_inputs=True)


def _key(op: str, layer, rank: int, tokens: int) -> Key:
    slices, widest = len(layer.widths), max(layer.widths)
    return (slices, tokens, layer.k, rank) if op == "shrink" else (slices, tokens, rank, widest)


def _candidates(op: str, layer, rank: int, tokens: int, max_loras: int) -> list[Config]:
    from lora_ops.tuning.measure import num_adapters

    hidden = layer.k if op == "shrink" else max(layer.widths)
    default = default_config(op, max_loras, tokens, hidden, rank, len(layer.widths))
    adapters = num_adapters(tokens, max_loras)
    return [default, *sample_configs(op, layer.k, rank, tokens, adapters, CANDIDATES)]


def _compile(layer, rank: int, tokens: int, max_loras: int, dtype: str, device: int) -> None:
    """In a process of the pool: compile all candidates of both kernels on a small batch that specialises alike.

    What fails fails again, with its error, where it is measured.
    """
    import torch

    from lora_ops.tuning.measure import Bench

    with suppress(Exception):
        torch.cuda.set_device(device)
        cuda = torch.device("cuda", device)
        bench = Bench(layer, rank, 1, getattr(torch, dtype), cuda, 0, cold_bytes=0, clock=False)
        calls = Calls(bench.batch(min(tokens, 16)))
        for op in ("shrink", "expand"):
            for config in _candidates(op, layer, rank, tokens, max_loras):
                with suppress(Exception):
                    calls.run(op, config, 0)
        torch.cuda.synchronize()


def best_of(clock, calls: Calls, op: str, candidates: list[Config]) -> tuple[Config, float, float]:
    """The fastest config, its us and the default's (candidates[0]); the default unless faster by MARGIN twice."""
    from lora_ops.tuning.measure import GRAPH_US, LOSER, too_large

    for i in range(calls.batch.copies(calls.plan)):
        calls.run(op, candidates[0], i)  # makes the tables of addresses, which a capture must not
    us = clock.capture(functools.partial(calls.run, op, candidates[0]), 2)()
    count = max(2, min(round(GRAPH_US / us), calls.batch.max_calls))

    def measure(config: Config, best: float, replays: int = 4) -> float:
        replay = clock.capture(functools.partial(calls.run, op, config), count)
        first = replay()
        return first if first > LOSER * best else sorted([first, *(replay() for _ in range(replays))])[replays // 2]

    times: list[tuple[float, int]] = []
    for i, config in enumerate(candidates):
        try:
            times.append((measure(config, min(times)[0] if times else us), i))
        except Exception as error:
            if not too_large(error):
                raise
    winner = candidates[min(times)[1]]
    default_us, winner_us = (measure(config, float("inf"), 8) for config in (candidates[0], winner))
    if winner_us > (1 - MARGIN) * default_us:
        return candidates[0], default_us, default_us
    return winner, winner_us, default_us


def write(folder: Path, sizes: Sizes, device: int, processes: int, console) -> None:
    """Sweep vLLM's two kernels over all sizes on one GPU, and write the files.

    Raises:
        ImportError: vLLM is not installed.
    """
    import torch
    from rich.progress import Progress

    from lora_ops.tuning.layers import Layer
    from lora_ops.tuning.measure import Bench

    kernels()
    torch.cuda.set_device(device)
    cuda = torch.device("cuda", device)
    layers = [Layer(k, widths) for k, widths in sizes.layers]
    jobs = [(layer, rank, tokens) for rank in sizes.ranks for layer in layers for tokens in sizes.tokens]
    found: dict[str, dict[Key, Config]] = {"shrink": {}, "expand": {}}
    saved: dict[str, list[float]] = {"shrink": [0.0, 0.0], "expand": [0.0, 0.0]}
    with compile_pool(processes) as pool, Progress(console=console) as progress:
        common = (sizes.max_loras, sizes.dtype, device)
        compiled = [submit(pool, _compile, *job, *common) for job in jobs]
        task = progress.add_task("vLLM's kernels", total=len(jobs))
        bench = None
        for (layer, rank, tokens), future in zip(jobs, compiled, strict=True):
            with suppress(BrokenProcessPool):
                future.result()
            if bench is None or (bench.layer, bench.rank) != (layer, rank):
                bench = None  # frees the weights before the next ones are made
                bench = Bench(layer, rank, sizes.max_loras, getattr(torch, sizes.dtype), cuda, seed=0)
            calls = Calls(bench.batch(tokens))
            for op, entries in found.items():
                key = _key(op, layer, rank, tokens)
                if key not in entries:
                    candidates = _candidates(op, layer, rank, tokens, sizes.max_loras)
                    entries[key], us, default_us = best_of(bench.clock, calls, op, candidates)
                    saved[op][0] += us
                    saved[op][1] += default_us
            progress.advance(task)
    for op, entries in found.items():
        rank = sizes.ranks[0]

        def default(slices: int, tokens: int, op: str = op, rank: int = rank) -> Config:
            return default_config(op, sizes.max_loras, tokens, layers[0].k, rank, slices)

        path = write_file(folder, torch.cuda.get_device_name(device), op, entries, sizes.max_loras, default)
        us, default_us = saved[op]
        console.print(f"{path}: {len(entries)} entries, {default_us / us:.2f} times as fast as vLLM's defaults in sum")
    console.print(f"for vLLM servers with max_loras {sizes.max_loras}: VLLM_TUNED_CONFIG_FOLDER={folder}")
