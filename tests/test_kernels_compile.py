"""Every Triton kernel compiled for an H200, by the launches that run it, on a machine that may have no GPU at all.

launches on CPU tensors -> Triton, told that there is a GPU of compute capability 9.0 -> ptxas, which its wheel brings

Nothing is launched, and no value is looked at. What the interpreter accepts and the compiler does not shows here: other
Python in a kernel, operands that do not fit together, more shared memory than there is, registers that spill.
"""

import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from tempfile import TemporaryDirectory

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import lora_ops.kernels.expand
import lora_ops.launches
import moe_ops.kernels
import moe_ops.launches
from lora_ops.config import num_planes
from moe_ops.reference import QUANTS
from ops_configs import files, lora, moe, store
from ops_configs.moe import LayerConfig, MoeConfig
from ops_patches.launch import Prepared
from ops_patches.library import INTERPRET

from .conftest import GPU

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

MAX_STACK = 128
"""Bytes that a thread may spill. Today's most with Triton 3.9 are 96, in the expand of rank 64 that adds up planes.
Triton 3.6, which brings another ptxas, spills none there, and up to 120 in the shrink of fp32."""
KNOWN_STACK = {
    ("int8 weights", "grouped_gemm_kernel"): 448,
    ("mixtral", "down_direct_kernel"): 256,
}
"""Kernels of a case that spill more. With Triton 3.9 and 3.6: 416 and 384 bytes, where persistent programs of 128 x 256
convert the weights first; 208 and none, of 56 unrolled steps."""


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. constants: as it was launched; stack: bytes that a thread spills; shared: bytes of a block."""

    name: str
    constants: dict
    ptx: str = field(repr=False)
    stack: int
    shared: int


class StandIn:
    """What Triton asks a driver before it compiles."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> object:
        return self  # kernels are kept by device: these are no other's

    def get_current_stream(self, device: object) -> int:
        return 0


class Compiler:
    """Compiles what is launched. functions: that were launched."""

    def __init__(self) -> None:
        self.functions: set[JITFunction] = set()
        self._run = JITFunction.run
        self._launched: list[tuple] = []

    def run(self, function: JITFunction, *args, grid, warmup, **kwargs):
        """In place of JITFunction.run."""
        self.functions.add(function)
        kernel = self._run(function, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, int)}
        self._launched.append((function.fn.__name__, constants, kernel))
        return kernel

    @contextlib.contextmanager
    def seeing(self, stand_in: StandIn):
        """Triton sees this device inside, with nothing compiled for it before."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "_active", stand_in)
            yield
        for function in self.functions:
            function.device_caches.pop(stand_in, None)

    @contextlib.contextmanager
    def kernels(self):
        """A list, which holds in the end what was launched inside, each kernel once.

        Compiled in threads: most of it releases the GIL. The mode is left without an error, for Triton 3.6 would not
        leave it with one.
        """
        self._launched, found = [], []
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield found
            done = [
                (*what, kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel)
                for *what, kernel in self._launched
            ]
        found += {kernel.hash: _examined(*what, kernel) for *what, kernel in done}.values()


def _examined(name: str, constants: dict, kernel) -> Kernel:
    (cubin,) = (path for path in kernel.metadata_group.values() if str(path).endswith(".cubin"))
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Kernel(name, constants, kernel.asm["ptx"], int(re.search(r"STACK:(\d+)", usage)[1]), kernel.metadata.shared)


@pytest.fixture(scope="module")
def compiler():
    """Triton sees an H200 that compiles and never launches, with nothing compiled before."""
    compiler = Compiler()
    with (
        pytest.MonkeyPatch.context() as patch,
        TemporaryDirectory() as folder,
        store.forgetting(),
        compiler.seeing(StandIn()),
    ):
        patch.setenv("TRITON_CACHE_DIR", folder)
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: compiler.run(*args, **kwargs))
        patch.setattr(Prepared, "__call__", Prepared.through_triton)
        for launches in (lora_ops.launches, moe_ops.launches):
            patch.setattr(launches, "_supports_pdl", lambda device: True)
        yield compiler


def check(kernels: list[Kernel], case: str = "", most_stack: int | None = MAX_STACK) -> None:
    """They fit into a multiprocessor and keep, but for little, to its registers; most_stack None: or not."""
    assert kernels
    large = [kernel for kernel in kernels if kernel.shared > files.MAX_SHARED_BYTES]
    assert not large, "\n".join(map(str, large))
    if most_stack is None:
        return
    spilled = [kernel for kernel in kernels if kernel.stack > KNOWN_STACK.get((case, kernel.name), most_stack)]
    assert not spilled, "\n".join(map(str, spilled))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory that nobody touches: it costs none."""
    return torch.empty(*shape, dtype=dtype)


LORA = {
    "qkv": (4096, (4096, 1024, 1024)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
    "long": (25600, (5120,)),
    "wide": (5120, (8192, 1024, 1024)),
}
"""K and the widths of slices, of Llama-3-8B; of Qwen3-32B long is down, whose planes are enough for a kernel of their
own, and wide is qkv, whose planes make groups in large batches, too."""
SLOTS = 8


def lora_layer(layer: str, rank: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """y, x, lora_a, lora_b and h."""
    k, widths = LORA[layer]
    y, x = empty(rows, sum(widths), dtype=dtype), empty(rows, k, dtype=dtype)
    a = [empty(SLOTS, rank, k, dtype=dtype) for _ in widths]
    b = [empty(SLOTS, width, rank, dtype=dtype) for width in widths]
    return y, x, a, b, empty(len(widths), rows, rank, dtype=torch.float32)


def plan_tiles(rows: int):
    """Tiles of a plan of so many rows."""
    plan = lora_ops.LoraPlan(rows, SLOTS, "cpu")
    return lora_ops.launches.plan_tiles(plan.arena, (plan.max_tokens, plan.max_slots, 0), rows)


def run_lora(tensors: tuple, tiles) -> None:
    """All launches of a batch."""
    y, x, a, b, h = tensors
    lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, tiles)
    lora_ops.launches.run_shrink(x, a, h, 0.5, tiles)
    lora_ops.launches.run_expand(h, b, y, 0, False, tiles)
    lora_ops.launches.run_add(y, empty(*y.shape, dtype=y.dtype), tiles)


def compiled_shrink(compiler, layer: str, rank: int, rows: int, pdl: bool = False) -> Kernel:
    """The shrink of a batch, into the planes that it has."""
    _, x, a, _, _ = lora_layer(layer, rank, rows)
    planes = empty(num_planes(x.shape[1], len(a), rank, rows), len(a), rows, rank, dtype=torch.float32)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_planes(x, a, planes, 0.5, plan_tiles(rows), pdl=pdl)
    (kernel,) = kernels
    return kernel


def check_linear(compiler, layer: str, rank: int, rows: int, names: set[str]) -> None:
    """All launches of a batch compile; those of run_linear are `names`, each of which waits for the one before it."""
    with compiler.kernels() as kernels:
        run_lora(lora_layer(layer, rank, rows), plan_tiles(rows))
    check(kernels)
    linear = [kernel for kernel in kernels if kernel.constants.get("PDL")]
    assert {kernel.name for kernel in linear} == names
    assert all("griddepcontrol.wait" in kernel.ptx for kernel in linear)


@pytest.mark.parametrize("rows", [1, 64, 1000, 2000, 9000])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("layer", ["qkv", "down"])
def test_lora(compiler, layer, rank, rows):
    """Batches of tiles of 16 rows, and of 64; planes of chunks of K, of groups of chunks, and none (9000)."""
    summed = (layer, rank) == ("down", 16) and rows in (1000, 2000)  # 14 planes
    names = {"shrink_kernel", "expand_kernel"} | ({"sum_planes_kernel"} if summed else set())
    check_linear(compiler, layer, rank, rows, names)


@pytest.mark.parametrize(
    ("layer", "rank", "rows"), [("long", 64, 1), ("long", 64, 64), ("gate_up", 128, 1000), ("wide", 64, 1000)]
)
def test_lora_sums_planes(compiler, layer, rank, rows):
    check_linear(compiler, layer, rank, rows, {"shrink_kernel", "sum_planes_kernel", "expand_kernel"})


@pytest.mark.parametrize(
    ("layer", "rank", "rows"),
    [
        ("qkv", 64, 128),
        ("qkv", 128, 256),
        ("qkv", 512, 256),
        ("qkv", 128, 1024),
        ("down", 128, 4096),
        ("qkv", 16, 9000),
        ("gate_up", 128, 9000),
    ],
)
def test_lora_defaults_fit_into_99_kib(compiler, monkeypatch, layer, rank, rows):
    """The shared memory of compute capability 8.6, whose GPUs no file is for; the least that bf16 finds."""
    stand_in = StandIn()
    stand_in.capability = 86
    monkeypatch.setattr(lora_ops.launches, "_supports_pdl", lambda device: False)
    monkeypatch.setattr(lora, "shared_bytes", lambda device: 99 << 10)
    with store.forgetting(), compiler.seeing(stand_in), compiler.kernels() as kernels:
        run_lora(lora_layer(layer, rank, rows), plan_tiles(rows))
    assert {kernel.name for kernel in kernels} >= {"shrink_kernel", "expand_kernel"}
    large = [kernel for kernel in kernels if kernel.shared > 99 << 10]
    assert not large, "\n".join(map(str, large))


@pytest.mark.parametrize(("rows", "early"), [(64, True), (300, True), (600, False), (9000, False)])
def test_when_the_kernel_after_a_shrink_starts(compiler, rows, early):
    """Before the first product, or after the last."""
    ptx = compiled_shrink(compiler, "qkv", 64, rows, pdl=True).ptx
    starts = [found.start() for found in re.finditer(r"griddepcontrol\.launch_dependents", ptx)]
    products = [found.start() for found in re.finditer(r"mma\.(mma_async\.)?sync", ptx)]
    assert starts[0] < products[0] if early else starts[0] > products[-1]


def test_lora_beside(compiler):
    """What runs beside the layer itself: first of its stream, written, rows without adapter left alone."""
    y, x, a, b, _ = lora_layer("qkv", 16, 64)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, False, plan_tiles(64), first=True, zero_others=False)
        lora_ops.launches.run_add(y, empty(512, y.shape[1]), plan_tiles(64))
    check(kernels)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lora_dtypes(compiler, dtype):
    with compiler.kernels() as kernels:
        run_lora(lora_layer("qkv", 16, 300, getattr(torch, dtype)), plan_tiles(300))
    check(kernels, dtype)


@pytest.mark.parametrize(
    ("layer", "rank", "rows"), [("qkv", 32, 4000), ("gate_up", 64, 1), ("qkv", 128, 4000), ("gate_up", 128, 1000)]
)
def test_lora_sums_of_fp32_stay_in_registers(compiler, layer, rank, rows):
    """Where 2-byte elements have wide blocks."""
    y, x, a, b, _ = lora_layer(layer, rank, rows, torch.float32)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, plan_tiles(rows))
    check(kernels, "float32")


@pytest.mark.parametrize(
    ("rank", "rows", "summed"), [(64, 1, False), (128, 4, False), (64, 256, True), (128, 1000, True)]
)
def test_lora_of_wide_layers(compiler, rank, rows, summed):
    """Whose analytic launch parameters are others, and whose programs would read many planes."""
    names = {"shrink_kernel", "expand_kernel"} | ({"sum_planes_kernel"} if summed else set())
    check_linear(compiler, "gate_up", rank, rows, names)


@pytest.mark.parametrize(
    ("k", "stride"),
    [(2049, 2057), (2049, 2064), (2056, 2056)],
    ids=["rows begin anywhere", "rows end anywhere", "rows of x begin anywhere"],
)
@pytest.mark.parametrize("rows", [1, 3, 200, 5000])
@pytest.mark.parametrize(("rank", "slices"), [(64, 1), (128, 1), (128, 3)])
def test_shrink_of_unaligned_rows_does_not_spill(compiler, rank, slices, rows, k, stride):
    """Their elements are fetched one by one; what CUDA 13.0's ptxas made of such a kernel that spills was wrong."""
    x = empty(rows, stride)[:, :k]
    a = [empty(SLOTS, rank, stride)[:, :, :k]] * slices
    out = empty(num_planes(k, slices, rank, rows), slices, rows, rank, dtype=torch.float32)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_planes(x, a, out, 0.5, plan_tiles(rows))
    check(kernels, most_stack=0)


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("rows", [2000, 9000])
@pytest.mark.parametrize("layer", ["qkv", "gate_up", "down"])
def test_shrink_of_several_chunks_multiplies_while_it_loads(compiler, layer, rows, rank):
    """A step waits for the product of the step before, and for its own only where a chunk of K ends."""
    kernel = compiled_shrink(compiler, layer, rank, rows)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", kernel.ptx)
    assert waits.count("1") == 1, waits
    check([kernel], most_stack=0)


@pytest.mark.parametrize("rows", [1, 3, 64, 200, 5000])
@pytest.mark.parametrize(("rank", "width"), [(128, 4095), (65, 4096), (33, 4095)])
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float32])
def test_expand_of_unaligned_rows_does_not_spill(compiler, y_dtype, slices, rank, width, rows):
    b, y = [empty(SLOTS, width, rank)] * slices, empty(rows, width * slices, dtype=y_dtype)
    with compiler.kernels() as kernels:
        for planes in {1, num_planes(4096, slices, rank, rows)}:
            h = empty(planes, slices, rows, rank, dtype=torch.float32)
            lora_ops.launches.run_expand(h, b, y, 0, True, plan_tiles(rows))
    check(kernels, most_stack=0)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_expand_of_aligned_rows_fetches_16_bytes(compiler, rank):
    """Rows of eight ranks are of 16 bytes."""
    y, _, _, b, h = lora_layer("down", rank, 64)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_expand(h, b, y, 0, True, plan_tiles(64))
    (kernel,) = kernels
    assert kernel.constants["BLOCK_N"] == 256
    assert "ld.global.b16" not in kernel.ptx


@pytest.mark.parametrize("rows", [1, 64, 9000])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("layer", ["qkv", "gate_up", "down"])
def test_shrink_of_aligned_rows_fetches_16_bytes(compiler, layer, rank, rows):
    """Also in blocks of the columns of several slices."""
    kernel = compiled_shrink(compiler, layer, rank, rows)
    assert "cp.async.cg.shared.global" in kernel.ptx
    assert "ld.global.b16" not in kernel.ptx


@pytest.mark.parametrize(
    ("layer", "rank"), [("qkv", 128), ("down", 128), ("gate_up", 128), ("qkv", 256), ("gate_up", 512)]
)
def test_lora_holds_wide_tiles_without_spilling(compiler, layer, rank):
    y, x, a, b, _ = lora_layer(layer, rank, 256)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, plan_tiles(256))
    wide = {kernel.name: kernel.ptx for kernel in kernels if kernel.constants.get("WIDE")}
    waits = {name: ptx.count("griddepcontrol.wait") for name, ptx in wide.items()}
    assert waits["shrink_kernel"] == 3, "each way through a kernel waits for the one before it"
    assert wide["expand_kernel"].count("griddepcontrol.launch_dependents") == 3, "wide tiles, few rows, others"
    assert waits["expand_kernel"] in (4, 5), "each way with work, and one or two without"
    check(kernels, most_stack=0)


def test_lora_of_few_rows_holds_no_wide_tiles(compiler):
    y, x, a, b, _ = lora_layer("gate_up", 128, 64)
    with compiler.kernels() as kernels:
        lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, plan_tiles(64))
    assert {kernel.name for kernel in kernels} == {"shrink_kernel", "sum_planes_kernel", "expand_kernel"}
    assert not any(kernel.constants.get("WIDE") for kernel in kernels)


@pytest.mark.parametrize("rank", [16, 64])
def test_lora_shipped(compiler, rank, monkeypatch):
    """The launch parameters that are shipped for an H200, which were measured, spilling or not."""
    monkeypatch.delenv(store.CONFIG_DIR, raising=False)
    monkeypatch.setattr(store, "_gpu", lambda device: GPU)
    with compiler.kernels() as kernels, store.forgetting():
        for rows in store.BUCKETS:
            y, x, a, b, _ = lora_layer("qkv", rank, rows)
            lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, plan_tiles(rows))
        assert {choice["source"] for choice in store.choices()} >= {"shipped"}
    check(kernels, most_stack=None)


@pytest.mark.parametrize("rows", [1, 300, 2000])
def test_lora_rows_and_segments(compiler, rows):
    """bgmv has a slot for each row, sgmv one for each segment of rows."""
    tensors = lora_layer("down", 16, rows)
    slots = torch.zeros(max(rows, SLOTS), dtype=torch.int64)
    tiles = lora_ops.launches.row_tiles(slots[:rows])
    segments = lora_ops.launches.segment_tiles(slots[:SLOTS], slots[:SLOTS], slots[:SLOTS], SLOTS, rows, rows)
    with compiler.kernels() as kernels:
        run_lora(tensors, tiles)
        run_lora(tensors, segments)
    check(kernels)
    assert len({kernel.constants["TILES"] for kernel in kernels}) == 2


def moe_layer(
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ids_dtype: torch.dtype = torch.int32,
    channels: bool = False,
    bias: bool = False,
    **options,
) -> tuple[tuple, dict]:
    """Arguments of `launches.compile_layer`. channels: of the scales; bias: both halves have one."""
    options = {**moe_ops.fused_experts.__kwdefaults__, **options}
    del options["out"]
    rows = 2 * inner if options["gated"] else inner
    weights = {"w13": (experts, rows, hidden), "w2": (experts, hidden, inner)}
    quant, block = options["quant"], options["block_shape"]
    for name, (_, n, k) in weights.items() if quant else ():
        shape = (experts, n) if channels else (experts,)
        if block:
            shape = (experts, -(-n // block[0]), -(-k // block[1]))
        options[f"{name}_scale"] = empty(*shape, dtype=torch.float32)
    if bias:
        options |= {"bias13": empty(experts, rows, dtype=dtype), "bias2": empty(experts, hidden, dtype=dtype)}
    w13, w2 = (empty(*shape, dtype=QUANTS[quant] if quant else dtype) for shape in weights.values())
    routing = torch.zeros(1, top_k), torch.zeros(1, top_k, dtype=ids_dtype)
    return (empty(1, hidden, dtype=dtype), w13, w2, *routing), options


HALF = (torch.arange(128) - 64).clamp(min=-1)
"""An expert map: 64 of 128 experts are here."""
GPT_OSS = {"activation": "swiglu_oai", "interleaved": True, "bias": True}
QWEN, DEEPSEEK, MIXTRAL = (128, 8, 2048, 768), (256, 8, 7168, 256), (8, 2, 4096, 14336)
"""Experts, top_k, hidden and intermediate size, of Qwen3-30B-A3B, DeepSeek-V3 (TP 8) and Mixtral."""
FP8_BLOCKS = {"quant": "fp8_w8a8", "block_shape": (128, 128)}
INT8_CHANNELS = {"quant": "int8_w8a8", "channels": True, "per_token": True}
INT8_WEIGHTS = {"quant": "int8_w8a16", "channels": True}
STATIC = {"quant": "fp8_w8a8", **{name: torch.ones(QWEN[0]) for name in ("a1_scale", "a2_scale")}}

LAYERS = {
    "qwen": (QWEN, {}),
    "mixtral": (MIXTRAL, {}),
    "expert parallel": ((64, *QWEN[1:]), {"expert_map": HALF, "ids_dtype": torch.int64}),
    "gpt-oss": ((32, 4, 2880, 2880), GPT_OSS),
    "fp8 blocks": (DEEPSEEK, FP8_BLOCKS),
    "fp8 blocks, more steps": ((512, 10, 2048, 512), FP8_BLOCKS | GPT_OSS),
    "fp8 blocks, most experts": ((64, 16, 2048, 512), FP8_BLOCKS),
    "fp8 blocks, powers of two": (DEEPSEEK, FP8_BLOCKS | {"power_of_two_scales": True}),
    "fp8 tensor": (MIXTRAL, {"quant": "fp8_w8a8"}),
    "int8 channel and token": (QWEN, INT8_CHANNELS),
    "int8 weights": (QWEN, INT8_WEIGHTS),
}


def run_layer(name: str) -> None:
    sizes, options = LAYERS[name]
    arguments, options = moe_layer(*sizes, **options)
    moe_ops.launches.compile_layer(*arguments, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_moe_layer(compiler, name):
    """What a layer runs, with analytic launch parameters, in batches of any size; and plans of one chunk and more."""
    with compiler.kernels() as kernels:
        run_layer(name)
    check(kernels, name)
    assert {kernel.name for kernel in kernels} >= {"place_kernel", "count_kernel", "scan_kernel", "combine_kernel"}
    products = [kernel for kernel in kernels if kernel.name in ("gate_up_kernel", "grouped_gemm_kernel")]
    assert {kernel.constants["BLOCK_M"] for kernel in products} >= {16, 64}
    for kernel in products:
        assert "griddepcontrol.wait" in kernel.ptx
        assert "cp.async.bulk.tensor" in kernel.ptx, f"{kernel} reads nothing through TMA"
        if kernel.constants["BLOCK_M"] >= 64:
            assert "wgmma" in kernel.ptx, f"{kernel} does not run on the tensor cores of compute capability 9.0"
        if kernel.constants.get("JOINED"):
            columns = {int(n) for n in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k", kernel.ptx)}
            assert 2 * kernel.constants["BLOCK_N"] in columns, f"{kernel}: gates and ups are not one product"


CHOICE_BY_CHOICE = ["qwen", "fp8 blocks", "fp8 blocks, more steps", "fp8 blocks, most experts"]


@pytest.mark.parametrize("name", [*CHOICE_BY_CHOICE, "fp8 blocks, powers of two"])
def test_moe_choice_by_choice(compiler, name):
    """Weights are read 16 bytes at a time, all of a step before any is used; of fp8 scales, one for each 16 bytes."""
    sizes, options = LAYERS[name]
    arguments, options = moe_layer(*sizes, **options)
    del options["global_experts"]
    with compiler.kernels() as kernels:
        moe_ops.launches.run_direct(torch.empty_like(arguments[0]), *arguments, **options)
    assert {kernel.name for kernel in kernels} == {"gate_up_direct_kernel", "down_direct_kernel"}
    for kernel in kernels:
        wide = len(re.findall(r"ld\.global\.v4\.b32", kernel.ptx))
        assert wide >= kernel.constants["BLOCK_N"]
        assert not re.search(r"ld\.global\.b8", kernel.ptx), kernel
    down = next(kernel for kernel in kernels if kernel.name == "down_direct_kernel")
    before_wait = down.ptx.partition("griddepcontrol.wait")[0]
    assert ("v4.b32" in before_wait) == bool(options["quant"]), "weights of fp8 are under way before h is there"


SMALL = LayerConfig(MoeConfig(16, 32, 128, 4, 3, 1), MoeConfig(16, 32, 128, 4, 3, 1))
MIDDLE = LayerConfig(MoeConfig(64, 64, 64, 4, 3, 8), MoeConfig(64, 128, 64, 4, 3, 8))
LARGE = LayerConfig(MoeConfig(128, 128, 64, 8, 3, 8), MoeConfig(128, 128, 64, 8, 3, 8))


def changed(config: LayerConfig, *, gate_up: tuple[str, ...] = (), down: tuple[str, ...] = ()) -> LayerConfig:
    """The config with these switches on."""
    return LayerConfig(
        replace(config.gate_up, **dict.fromkeys(gate_up, True)), replace(config.down, **dict.fromkeys(down, True))
    )


SHORT = (32, 8, 2048, 256)
"""A layer whose k of down a stationary program keeps."""
CONFIGS = {
    "permute, tma_store, persistent": (
        changed(LARGE, gate_up=("permute", "tma_store", "persistent"), down=("persistent",)),
        SHORT,
        {"apply_router_weight_on_input": True, "activation": "gelu"},
    ),
    "tma_store, gathered": (changed(LARGE, gate_up=("tma_store",)), SHORT, {"activation": "gelu_tanh"}),
    "permute, biases, stationary": (
        changed(SMALL, gate_up=("permute", "tma_store"), down=("stationary",)),
        SHORT,
        GPT_OSS,
    ),
    "ungated, persistent, tiles of 64 rows": (
        changed(MIDDLE, gate_up=("permute",), down=("persistent",)),
        SHORT,
        {"gated": False, "activation": "relu2"},
    ),
    "fp8 blocks, persistent, tma_store": (
        changed(MIDDLE, gate_up=("tma_store",), down=("persistent",)),
        SHORT,
        FP8_BLOCKS,
    ),
    "int8 channel and token, stationary, tiles of 128 rows": (
        changed(LARGE, gate_up=("tma_store",), down=("stationary",)),
        SHORT,
        INT8_CHANNELS,
    ),
    "fp8 blocks, the first half's output quantised by it": (
        LayerConfig(MoeConfig(64, 128, 128, 8, 2, 8), MIDDLE.down),
        SHORT,
        FP8_BLOCKS,
    ),
    "fp8 blocks, powers of two, the first half's output quantised by it": (
        LayerConfig(MoeConfig(64, 128, 128, 8, 2, 8), MIDDLE.down),
        SHORT,
        FP8_BLOCKS | {"power_of_two_scales": True},
    ),
    "fp8 static for each expert": (SMALL, QWEN, STATIC),
    "int8 blocks": (SMALL, SHORT, {"quant": "int8_w8a8", "block_shape": (128, 128)}),
    "int8 weights in groups": (SMALL, SHORT, {"quant": "int8_w8a16", "block_shape": (1, 128)}),
    "float16, rows that TMA does not take": (SMALL, (8, 2, 1037, 205), {"dtype": torch.float16}),
    "float32": (
        LayerConfig(MoeConfig(16, 32, 32, 4, 2, 8), MoeConfig(16, 64, 32, 4, 2, 8)),
        SHORT,
        {"dtype": torch.float32},
    ),
}


SOME_WITHOUT_PLAN = ("int8 blocks", "int8 weights in groups", "float16, rows that TMA does not take", "float32")
"""Layers of CONFIGS of which a few choices run without a plan."""


def run_config(name: str) -> None:
    """With a plan, and without where batches may run so."""
    config, sizes, options = CONFIGS[name]
    (hidden, *arguments), options = moe_layer(*sizes, **options)
    layer = moe_ops.launches.layer_of(arguments[1], sizes[1], **options)
    moe.check(config, layer, layer.itemsize(hidden.dtype))
    del options["global_experts"]
    for planned in (True, False)[: 1 + moe.runs_without_plan(layer, config, tokens=1)]:
        moe_ops.launches.run_tiles(torch.empty_like(hidden), hidden, *arguments, config, planned, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_moe_config(compiler, name):
    """Launch parameters that a file may hold and the analytic ones seldom or never do, and rarer kinds of layers."""
    config, *_ = CONFIGS[name]
    with compiler.kernels() as kernels:
        run_config(name)
    check(kernels)
    ways = sum(kernel.name == "gate_up_kernel" for kernel in kernels)
    assert ways == (2 if name in SOME_WITHOUT_PLAN else 1)
    launched = {kernel.name: kernel for kernel in kernels}
    down = launched["stationary_kernel" if config.down.stationary else "grouped_gemm_kernel"]
    _, (*_, hidden, inner), options = CONFIGS[name]
    itemsize = 1 if "w8a8" in options.get("quant", "") else 2
    gate_up, products = launched["gate_up_kernel"], 2 if options.get("gated", True) else 1
    for half, kernel, k, count in ((config.gate_up, gate_up, hidden, products), (config.down, down, inner, 1)):
        if kernel.constants.get("OUT_TMA") and (half.persistent or half.stationary):
            counted = moe.shared_memory(half, count, itemsize, k)
            assert counted - 1024 <= kernel.shared <= counted + 1024, "what launch parameters are refused by"
    assert launched["gate_up_kernel"].constants["OUT_TMA"] == config.gate_up.tma_store
    assert launched["gate_up_kernel"].constants["PERSISTENT"] == config.gate_up.persistent
    assert ("permute_kernel" in launched) == config.gate_up.permute
    assert ("stationary_kernel" in launched) == config.down.stationary
    if not config.down.stationary:
        assert launched["grouped_gemm_kernel"].constants["PERSISTENT"] == config.down.persistent


@pytest.mark.parametrize(("block_n", "block_r"), [(128, 512), (64, 512), (256, 256), (128, 256), (256, 64)], ids=str)
def test_what_an_expand_is_refused_by(compiler, block_n, block_r):
    """Of the shared memory that it takes: with one stage its rows of h, in fp32, count."""
    config = lora.ExpandConfig(block_n, block_r, 4, num_stages=1, steps=1)
    y, _, _, b, h = lora_layer("down", 512, 1024)
    with compiler.kernels() as kernels:
        lora_ops.kernels.expand.expand(h.unsqueeze(0), b, y, plan_tiles(1024), 0, True, config)
    (kernel,) = kernels
    assert kernel.shared <= files.shared_bytes(config)
    if kernel.shared > files.MAX_SHARED_BYTES:
        with pytest.raises(ValueError, match="shared memory"):
            files.parse_config(asdict(config), lora.ExpandConfig)
    assert (kernel.shared > files.MAX_SHARED_BYTES) == ((block_n, block_r) == (128, 512))


def written() -> set[str]:
    """Names of all kernels."""
    names = set()
    for package in (lora_ops.kernels, moe_ops.kernels):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            names |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return names


def test_no_kernel_is_left_out(compiler):
    """A new kernel needs a case above, too."""
    with compiler.kernels() as kernels:
        run_lora(lora_layer("down", 16, 64), plan_tiles(64))
        for name in ("qwen", "fp8 tensor"):
            run_layer(name)
        for name in CONFIGS:
            run_config(name)
    assert written() == {kernel.name for kernel in kernels}
