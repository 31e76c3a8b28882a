"""The implementations that are compared: ours, and the hosts' LoRA kernels called as the hosts call them.

Each one has

    candidates(case)        the configs it may run with, the default first; None where there is nothing to choose
    bind(problem, config)   run(i), which adds the LoRA part of weight buffer i to problem.y
    tune(problem, measure)  the best config, for those that are swept; measure(run) gives microseconds

What a host does once a step (metadata) happens in `bind`; what it does in each layer (allocate and clear the
intermediate) in `run`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from problem import Problem
from shapes import Case

Run = Callable[[int], None]
Measure = Callable[[Run], float]

SWEEP_SIZE = 36
"""Configs tried of each of vLLM's two kernels."""


class Missing(Exception):
    """An implementation that cannot run here, with the reason."""


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, empty for one that is only on the path."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return ""


def require_triton_device() -> None:
    if not torch.cuda.is_available() and not interpreted():
        raise Missing("Triton kernels need a GPU, or TRITON_INTERPRET=1")


class Ours:
    name = "ours"
    swept = False

    def __init__(self) -> None:
        import lora_ops.launches

        self.lora_ops = lora_ops
        self.version = installed_version("serving-ops")

    def candidates(self, case: Case) -> list[None]:
        return [None]

    def bind(self, problem: Problem, config: None) -> Run:
        plan = self.lora_ops.LoraPlan(problem.case.tokens, problem.case.adapters, problem.device)
        plan.update(problem.slots.numpy())
        x, y, a, b = problem.x, problem.y, problem.lora_a, problem.lora_b

        def run(i: int) -> None:
            with self.lora_ops.launches.capturing_one_step():
                self.lora_ops.lora_linear(y, x, a[i], b[i], plan)

        return run


class Torch:
    """Adapter by adapter: gather rows, two matrix products a slice, add back."""

    name = "torch"
    swept = False
    version = torch.__version__

    def candidates(self, case: Case) -> list[None]:
        return [None]

    def bind(self, problem: Problem, config: None) -> Run:
        slots = problem.slots.to(problem.device)
        rows = {slot: (slots == slot).nonzero().squeeze(1) for slot in problem.active}
        x, a, b = problem.x, problem.lora_a, problem.lora_b
        slices = problem.y.split(problem.case.module.slices, dim=1)

        def run(i: int) -> None:
            for slot, slot_rows in rows.items():
                x_slot = x[slot_rows]
                for y, a_slice, b_slice in zip(slices, a[i], b[i], strict=True):
                    y.index_add_(0, slot_rows, x_slot @ a_slice[slot].T @ b_slice[slot].T)

        return run


class Vllm:
    """vLLM's lora_shrink and lora_expand with the configs that vLLM chooses itself.

    A config {"shrink": {...}, "expand": {...}} is given to the kernels where they look theirs up.
    """

    name = "vllm_default"
    swept = False

    def __init__(self) -> None:
        require_triton_device()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            folder = "vllm.lora.ops.triton_ops"
            self.modules = {op: importlib.import_module(f"{folder}.lora_{op}_op") for op in ("shrink", "expand")}
            self.meta = importlib.import_module(f"{folder}.lora_kernel_metadata").LoRAKernelMeta
            self.tables = importlib.import_module(f"{folder}.utils")
            torch_utils = importlib.import_module("vllm.utils.torch_utils")
        except (ImportError, AttributeError) as error:
            raise Missing(f"{type(error).__name__}: {error}") from error
        if not torch.cuda.is_available():
            torch_utils.PIN_MEMORY = False
        self.version = installed_version("vllm")

    def default_config(self, op: str, case: Case) -> dict:
        return self.tables.get_lora_op_configs(
            op,
            max_loras=case.adapters + 1,
            batch=case.tokens,
            hidden_size=case.module.k if op == "shrink" else max(case.module.slices),
            rank=case.rank,
            num_slices=len(case.module.slices),
            add_inputs=None if op == "shrink" else True,
        )

    def candidates(self, case: Case) -> list[dict]:
        return [{op: self.default_config(op, case) for op in self.modules}]

    @contextlib.contextmanager
    def using(self, config: dict) -> Iterator[None]:
        before = {op: self.modules[op].get_lora_op_configs for op in config}
        for op, value in config.items():
            self.modules[op].get_lora_op_configs = lambda *args, _value=value, **kwargs: _value
        try:
            yield
        finally:
            for op, original in before.items():
                self.modules[op].get_lora_op_configs = original

    def bind_ops(self, problem: Problem) -> dict[str, Callable[[int, dict], None]]:
        """The two halves, run(i, config) each, over one intermediate that the shrink allocates."""
        case = problem.case
        # vLLM keys these by address, and addresses come back when an earlier problem has been freed.
        self.tables._LORA_A_PTR_DICT.clear()
        self.tables._LORA_B_PTR_DICT.clear()
        meta = self.meta.make(case.adapters, case.tokens, problem.device)
        meta.prepare_tensors(problem.slots.to(problem.device))
        meta_args = meta.meta_args(case.tokens, specialize_active_lora=False)
        shape = (len(case.module.slices), case.tokens, case.rank)
        x, y, a, b = problem.x, problem.y, problem.lora_a, problem.lora_b
        buffer = torch.zeros(shape, dtype=torch.float32, device=problem.device)

        def shrink(i: int, config: dict) -> None:
            nonlocal buffer
            buffer = torch.empty(shape, dtype=torch.float32, device=problem.device)
            with self.using({"shrink": config}):
                self.modules["shrink"].lora_shrink(x, a[i], buffer, *meta_args, 1.0)

        def expand(i: int, config: dict) -> None:
            with self.using({"expand": config}):
                self.modules["expand"].lora_expand(buffer, b[i], y, *meta_args, offset_start=0, add_inputs=True)

        return {"shrink": shrink, "expand": expand}

    def bind(self, problem: Problem, config: dict) -> Run:
        ops = self.bind_ops(problem)

        def run(i: int) -> None:
            for op, call in ops.items():
                call(i, config[op])

        return run


class VllmTuned(Vllm):
    """The same kernels with the best config of a sweep over vLLM's default and a fixed random sample."""

    name = "vllm_tuned"
    swept = True

    def candidates(self, case: Case) -> list[dict]:
        samples = {op: [self.default_config(op, case), *sample_configs(op, case)] for op in self.modules}
        return [
            {op: sample[i % len(sample)] for op, sample in samples.items()}
            for i in range(max(len(sample) for sample in samples.values()))
        ]

    def tune(self, problem: Problem, measure: Measure) -> dict:
        """Shrink and expand are swept apart: their launches do not overlap."""
        candidates = self.candidates(problem.case)
        best = {}
        for op, call in self.bind_ops(problem).items():
            for i in range(problem.copies):
                call(i, candidates[0][op])
            configs = [candidate[op] for candidate in candidates]
            times = [measure(functools.partial(call, config=config)) for config in configs]
            best[op] = configs[times.index(min(times))]
        return best


def sample_configs(op: str, case: Case) -> list[dict]:
    """What the tuner of vLLM's kernels would try too, and as many as fit SWEEP_SIZE beside the default."""
    from ops_patches import vllm_lora_configs

    return vllm_lora_configs.sample_configs(
        op, case.module.k, case.rank, case.tokens, case.adapters, count=SWEEP_SIZE - 1
    )


class SglangCsgmv:
    """SGLang's chunked sgmv kernels over the segments that its backend makes.

    The kernel files are loaded by path from the folder that holds `sglang` (environment variable OPS_SPEED_SGLANG_SITE,
    else the import path), with stand-ins for the three names they take from the server: so they run beside a vLLM whose
    packages SGLang cannot use.
    """

    name = "sglang_csgmv"
    swept = False
    chunk_sizes = (16,)
    """`--max-lora-chunk-size` of the server; 16 is its default."""

    def __init__(self) -> None:
        require_triton_device()
        site = sglang_site()
        package = sgmv_package(site) or SGMV_PACKAGES[0]
        folder = site / package.replace(".", "/")
        names = ("lora_tuning_config", "chunked_sgmv_shrink", "chunked_sgmv_expand")
        if absent := [name for name in names if not (folder / f"{name}.py").exists()]:
            raise Missing(f"{folder} lacks {', '.join(absent)}")
        with sglang_stand_ins(package):
            environ = site / "sglang/srt/environ.py"
            if environ.exists():
                load_file("sglang.srt.environ", environ)
            modules = [load_file(f"{package}.{name}", folder / f"{name}.py") for name in names]
        self.configs, shrink, expand = modules
        self.shrink = shrink.chunked_sgmv_lora_shrink_forward
        self.expand = expand.chunked_sgmv_lora_expand_forward
        info = next(site.glob("sglang-*.dist-info"), None)
        self.version = info.name.removeprefix("sglang-").removesuffix(".dist-info") if info else ""

    def candidates(self, case: Case) -> list[dict]:
        return [self.config(case, max_chunk) for max_chunk in self.chunk_sizes]

    def config(self, case: Case, max_chunk: int) -> dict:
        """The rows of a segment, and the launch parameters that SGLang looks up for them."""
        slices, chunk = len(case.module.slices), chunk_size(case.tokens, max_chunk)
        shrink = self.configs.get_lora_shrink_config(case.module.k, case.rank, slices, chunk)
        expand = self.configs.get_lora_expand_config(case.module.n, case.rank, slices, chunk)
        return {"max_lora_chunk_size": max_chunk, "chunk_size": chunk, "shrink": shrink, "expand": expand}

    def bind(self, problem: Problem, config: dict) -> Run:
        slices, y = problem.case.module.slices, problem.y
        info = csgmv_batch_info(problem, config["chunk_size"])
        offsets = torch.tensor([0, *itertools.accumulate(slices)], dtype=torch.int32, device=problem.device)
        weights = problem.pack()

        def run(i: int) -> None:
            a, b = weights[i]
            h = self.shrink(problem.x, a, info, len(slices))
            self.expand(h, b, info, offsets, max(slices), y)

        return run

    def tune(self, problem: Problem, measure: Measure) -> dict:
        return min(self.candidates(problem.case), key=lambda config: measure(self.bind(problem, config)))


class SglangTuned(SglangCsgmv):
    """The same with the best of the chunk sizes that the server lets its user choose."""

    name = "sglang_tuned"
    swept = True
    chunk_sizes = (16, 32, 64, 128)


def chunk_size(tokens: int, max_chunk: int) -> int:
    """Rows of a segment, as SGLang's backend chooses them."""
    return min(max_chunk, 128 if tokens >= 256 else 32 if tokens >= 64 else 16)


def csgmv_batch_info(problem: Problem, chunk: int) -> types.SimpleNamespace:
    """Rows sorted by adapter and cut into segments of at most `chunk` rows; rank 0 stands for 'no adapter'.

    The grid has exactly the segments of this batch. The server's captured decode graphs launch one for each request of
    the largest batch instead, so that these times are the least that it reaches there.
    """
    adapters = problem.case.adapters
    slots = torch.where(problem.slots < 0, adapters, problem.slots)
    order = torch.argsort(slots, stable=True)
    lengths, segment_slots = [], []
    for slot, rows in zip(*(t.tolist() for t in torch.unique(slots, return_counts=True)), strict=True):
        for first in range(0, rows, chunk):
            lengths.append(min(chunk, rows - first))
            segment_slots.append(slot)

    def int32(data) -> torch.Tensor:
        return torch.as_tensor(data).to(device=problem.device, dtype=torch.int32)

    return types.SimpleNamespace(
        use_cuda_graph=False,
        bs=problem.case.tokens,
        num_segments=len(lengths),
        max_len=chunk,
        seg_indptr=int32([0, *itertools.accumulate(lengths)]),
        weight_indices=int32(segment_slots),
        lora_ranks=int32([problem.case.rank] * adapters + [0]),
        scalings=torch.ones(adapters + 1, dtype=torch.float32, device=problem.device),
        permutation=int32(order),
    )


SGMV_PACKAGES = ("sglang.kernels.ops.lora.dense", "sglang.kernels.ops.gemm")
"""Of csgmv's kernels: of SGLang 0.5.22 and later, and of 0.5.17."""


def sgmv_package(site: Path) -> str:
    """That of SGMV_PACKAGES which holds the kernels in a folder of packages; empty if none does."""
    found = (name for name in SGMV_PACKAGES if (site / name.replace(".", "/") / "chunked_sgmv_shrink.py").exists())
    return next(found, "")


def sglang_site() -> Path:
    if site := os.environ.get("OPS_SPEED_SGLANG_SITE"):
        return Path(site)
    for entry in sys.path:
        if sgmv_package(Path(entry)):
            return Path(entry)
    raise Missing("no sglang on the import path: set OPS_SPEED_SGLANG_SITE to the folder that holds it")


def load_file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def sglang_stand_ins(package: str) -> Iterator[None]:
    """Modules named like SGLang's with what the kernel files of `package` import: no cache over Triton's own, and the
    GPU's name."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sglang"}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("sglang.srt.lora", *itertools.accumulate(package.split("."), "{}.{}".format), "sglang.srt")
    modules = ("sglang.srt.utils", "sglang.srt.lora.utils", "sglang.srt.debug_utils.cuda_coredump")
    stand_ins = {name: types.ModuleType(name) for name in (*packages, *modules)}
    stand_ins["sglang.srt.utils"].cached_triton_kernel = lambda key: lambda kernel: kernel
    stand_ins["sglang.srt.utils"].get_device_name = lambda: device
    stand_ins["sglang.srt.lora.utils"].LoRABatchInfo = types.SimpleNamespace
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            del sys.modules[name]
        sys.modules.update(before)


IMPLS = {impl.name: impl for impl in (Ours, Vllm, VllmTuned, SglangCsgmv, SglangTuned, Torch)}
