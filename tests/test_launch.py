"""Launches that pass Triton by: the same binary gets the same arguments, and none that it was not compiled for."""

import itertools

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler as triton_compiler
from triton.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import lora_ops.launches
import moe_ops.launches
from lora_ops.kernels.add import add, add_kernel
from ops_configs import files, store
from ops_patches.launch import Prepared, cdiv, kinds, power_of_two, prepared
from ops_patches.library import INTERPRET

from .test_kernels_compile import FP8_BLOCKS, HALF, StandIn, empty, lora_layer, moe_layer, plan_tiles, run_lora, written

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


class Launches(StandIn):
    """A driver that loads nothing and writes down what is launched: (kernel, warps, grid, arguments).

    early: whether each is set up under the tail of the launch before.
    """

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.early: list[bool] = []
        self.through_triton = 0
        self.utils = self

    def load_binary(self, name: str, kernel: bytes, shared: int, device: object) -> tuple:
        return name, name, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, src: object, metadata: object):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
            self.early.append(metadata.launch_pdl)
            self.seen.append((function, metadata.num_warps, (x, y, z), [described(a) for a in arguments]))

        return launch


def described(argument: object) -> object:
    """What is the same of an argument when a batch runs again, in memory of its own."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    if isinstance(argument, TensorDescriptor):
        return described(argument.base), list(argument.shape), list(argument.strides), list(argument.block_shape)
    if isinstance(argument, tuple):
        return tuple(described(a) for a in argument)
    return argument


@pytest.fixture
def launches(monkeypatch):
    """What is launched; nothing was before."""
    seen, run = Launches(), JITFunction.run
    functions = set()

    def counted(function, *args, **kwargs):
        functions.add(function)
        seen.through_triton += 1
        return run(function, *args, **kwargs)

    monkeypatch.setattr(driver, "_active", seen)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(triton_compiler, "max_shared_mem", lambda device: files.MAX_SHARED_BYTES)
    for module in (lora_ops.launches, moe_ops.launches):
        monkeypatch.setattr(module, "_supports_pdl", lambda device: True)
    prepared.cache_clear()
    with store.forgetting():
        yield seen
    prepared.cache_clear()
    for function in functions:
        function.device_caches.pop(seen, None)


def moe_batch(tokens: int, sizes: tuple = (64, 4, 512, 256), **options) -> None:
    (_, w13, w2, _, _), options = moe_layer(*sizes, **options)
    hidden = empty(tokens, sizes[2])
    routing = torch.zeros(tokens, sizes[1]), torch.zeros(tokens, sizes[1], dtype=torch.int32)
    moe_ops.launches.run_layer(torch.empty_like(hidden), hidden, w13, w2, *routing, **options)


def lora_batch(rows: int, layer: str = "qkv", rank: int = 16) -> None:
    y, x, a, b, _ = lora_layer(layer, rank, rows)
    lora_ops.launches.run_linear(y, x, a, b, 0.5, 0, True, plan_tiles(rows))
    lora_ops.launches.run_add(y, empty(*y.shape), plan_tiles(rows))


def lora_rows(rows: int) -> None:
    """bgmv and sgmv: a slot for each row, or for each segment of rows."""
    slots = torch.zeros(rows, dtype=torch.int64)
    for tiles in (
        lora_ops.launches.row_tiles(slots),
        lora_ops.launches.segment_tiles(slots[:8], slots[:8], slots[:8], 8, rows, rows),
    ):
        run_lora(lora_layer("down", 16, rows), tiles)


BATCHES = {
    "lora": lambda: lora_batch(300),
    "lora, rows and segments": lambda: lora_rows(40),
    "lora, planes": lambda: lora_batch(64, "long", 64),
    "moe, a few tokens": lambda: moe_batch(2),
    "moe, a few choices": lambda: moe_batch(12),
    "moe": lambda: moe_batch(2000),
    "moe, biases": lambda: moe_batch(300, activation="swiglu_oai", interleaved=True, bias=True),
    "moe, fp8 blocks": lambda: moe_batch(300, **FP8_BLOCKS),
    "moe, fp8": lambda: moe_batch(300, quant="fp8_w8a8"),
    "moe, fp8 blocks, a few tokens": lambda: moe_batch(2, **FP8_BLOCKS),
    "moe, int8 tokens": lambda: moe_batch(300, quant="int8_w8a8", channels=True, per_token=True),
    "moe, expert map": lambda: moe_batch(2000, expert_map=HALF),
    "moe, wide experts": lambda: moe_batch(4000, (8, 2, 512, 2048)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_again(launches, name):
    """A batch that runs again passes Triton by and launches what it did at first."""
    BATCHES[name]()
    first, launches.seen = launches.seen, []
    assert len(first) == launches.through_triton > 0
    BATCHES[name]()
    assert launches.through_triton == len(first)
    assert launches.seen == first


def test_every_kernel(launches):
    """A new kernel needs a batch above, too."""
    for batch in BATCHES.values():
        batch()
    assert {name for name, *_ in launches.seen} == written()


def test_other_arguments(launches):
    """Of another alignment or dtype, they come through Triton, which compiles for them; then they, too, pass it by."""
    y, delta, tiles = empty(300, 512), empty(300 * 512 + 8), plan_tiles(300)
    deltas = [delta[first : first + 300 * 512].view(300, 512) for first in (0, 8, 1, 2)]
    for other, new in ((deltas[0], 1), (deltas[1], 0), (deltas[2], 1), (deltas[3], 0), (deltas[0].float(), 1)):
        before = launches.through_triton
        add(y, other, tiles)
        assert launches.through_triton == before + new
    aligned, unaligned = (list(add_kernel.device_caches[launches][0].values())[i] for i in (0, 1))
    assert aligned.asm["ptx"] != unaligned.asm["ptx"]


def arguments() -> list:
    """Of all kinds that our kernels take."""
    memory = torch.empty(2048, dtype=torch.uint8)
    numbers = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 16, 2**40, 2**63]
    numbers += [-(2**31), -(2**31) - 1, -(2**31) - 16]
    dtypes = (torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8)
    tensors = [memory[first : first + 1024].view(dtype) for dtype in dtypes for first in (0, 8, 16)]
    tensors.append(torch.nn.Parameter(tensors[-1].float()))
    matrices = [tensor.view(16, -1) for tensor in tensors if tensor.dtype.itemsize == 2 and tensor.data_ptr() % 16 == 0]
    descriptors = [TensorDescriptor.from_tensor(m, block) for m in matrices for block in ([16, 16], [8, 16])]
    tuples = [(tensor, 0, number, 1) for tensor in tensors[:4] for number in (0, 1, 16, 17)]
    return [None, 0.5, 1.0, *numbers, *tensors, *descriptors, *tuples, (), (1, 1)]


def test_kinds():
    """Where Triton would compile for either of two arguments, their kinds differ."""

    backend = type(make_backend(GPUTarget("cuda", 90, 32)))

    def of_triton(argument: object) -> object:
        return triton.runtime.jit.native_specialize_impl(backend, argument, False, True, True)

    pairs = list(itertools.combinations([(of_triton(a), kinds((a,)), a) for a in arguments()], 2))
    assert sum(one[0] != other[0] for one, other in pairs) > 500
    for one, other in pairs:
        assert one[0] == other[0] or one[1] != other[1], f"{one[2]} and {other[2]}"


@pytest.mark.parametrize("argument", [True, "x", [1], 1j])
def test_unknown_kind(argument):
    with pytest.raises(TypeError, match="a launch takes tensors"):
        kinds((1, argument))


def test_sizes():
    for n in range(1, 300):
        assert power_of_two(n) == triton.next_power_of_2(n)
        for size in (1, 2, 7, 16):
            assert cdiv(n, size) == triton.cdiv(n, size)


def test_constants_come_last():
    """An argument behind a constant would come too late: an error before any launch."""

    @triton.jit
    def kernel(x, N: triton.language.constexpr, y):  # pragma: no cover
        pass

    with pytest.raises(KeyError, match="y"):
        Prepared(kernel, {"N": 1})
