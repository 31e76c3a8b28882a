"""Launch parameters of the MoE kernels: tuned ones from files, and analytic defaults from the sizes of a layer.

block_m is the rows of a tile, with a routing plan or without: one value for both halves of a layer. A row's bits depend
on block_m and block_k. Of the analytic defaults, block_k follows from block_m, the dtype and the layer, so that they
are the same for all batches of one tile size; tuned ones may differ from bucket to bucket.

Files are named grouped_gemm_config_<hidden>_<dtype>[_block<n>x<k>].json; dtype is float16, bfloat16, float32, fp8_w8a8,
int8_w8a8 or int8_w8a16, block the scale blocks of quantised weights. fp16 runs bf16's entries where it has none.

    "entries": {"experts=128,intermediate=768,top_k=8": {"64": {"gate_up": {"block_m": 16, "block_n": 64, ...},
                                                                "down": {...}, "us": 311.2, "default_us": 325.0}}}

"us" and "default_us" are microseconds of the whole layer, with this entry and with the analytic default of the day.
Halves of null ask for today's analytic default. An expert-parallel layer has its experts on this device as experts, and
",global_experts=256" behind; a layer without ups has ",ungated". Where a token bucket is missing, the nearest one
stands in whose analytic tiles are of the same size; and for a layer without an expert map, an expert-parallel one that
has as many experts on a device.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import files
from .store import Kind, bucket_of, cached, find, forgetting, padded, shared_bytes

TOKENS = tuple(1 << i for i in range(15))
"""Buckets of token counts, 1 to 16384."""
QUANTS = ("fp8_w8a8", "int8_w8a8", "int8_w8a16")
TILE_ROWS = (16, 32, 64, 128)
"""Rows of a tile that the kernels take."""
MIN_PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H200."""
DIRECT_TOKENS, DIRECT_EXPERTS = 4, 6
"""Tokens of a batch that runs choice by choice, at most, and experts for each of its choices, at least, but for a lone
token: where choices share an expert, a tile reads it once. Measured on an H200."""
DIRECT_BLOCK_K, DIRECT_STEPS = 512, 64
"""Elements of K that such a program reads at a time, and such steps over all experts of a token, at most."""
DIRECT_CHUNK, DIRECT_ELEMENTS = 16, 2048
"""Elements of K that share an fp8 scale in such a program, at least: what a thread reads at once; and at most, of all
experts of a token together: more do not fit its registers."""
PLANLESS_CHOICES, PLANLESS_ROWS = 256, 16
"""Choices of a batch whose tiles find their rows without a plan, at most, and rows of such a tile: with more, programs
look at more choices, and more of them begin no tile. Measured on an H100."""
STATIONARY_STEPS = 4
"""Blocks of K that a stationary program keeps, at most."""
TMA_STORE_ROWS = 1024
"""Rows of an expert from which on copied rows' outputs are worth leaving through TMA (measured on an H200), and
persistent programs are worth the half of a half-full tile that others do not multiply (measured on an H100)."""
PERMUTE_COLUMNS = 2048
"""Intermediate size from which on tiles of 128 rows are worth a copy of the rows in order: measured on an H200."""


@dataclass(frozen=True)
class MoeConfig:
    """Launch parameters of a grouped GEMM.

    block_m: rows of a tile; block_n: columns of a program, of gates and ups each; block_k: elements of K a step;
    num_warps, num_stages: as Triton takes them; group_m: tiles that walk the columns together;
    persistent (of gate_up in tiles of 128 rows only): one program a multiprocessor walks all tiles and fetches one
    while it stores another;
    stationary (down only): a program keeps the rows of its tile and walks the columns, for a short k;
    permute (gate_up only): rows are copied into the order of the plan first, so that a tile reads them as one block;
    tma_store (gate_up only; down's persistent and stationary programs always do): the output leaves through TMA.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int
    persistent: bool = False
    stationary: bool = False
    permute: bool = False
    tma_store: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """Launch parameters of both halves of a layer; they share block_m."""

    gate_up: MoeConfig
    down: MoeConfig


@dataclass(frozen=True)
class MoeLayer:
    """What launch parameters of a layer depend on.

    experts: on this device; top_k: experts of a token; hidden, intermediate: sizes H and I; gated: it has ups; quant:
    None or one of QUANTS; block_shape: (n, k) of the blocks that share a scale; global_experts: that the router chooses
    from, where they are more than those on this device.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool = True
    quant: str | None = None
    block_shape: tuple[int, int] | None = None
    global_experts: int | None = None

    @property
    def name(self) -> str:
        """How a file names the layer."""
        name = f"experts={self.experts},intermediate={self.intermediate},top_k={self.top_k}"
        if (self.global_experts or self.experts) != self.experts:
            name += f",global_experts={self.global_experts}"
        return name if self.gated else f"{name},ungated"

    @property
    def products(self) -> int:
        """Products that a program of the first half computes: of gates and ups, or one."""
        return 2 if self.gated else 1

    def itemsize(self, dtype) -> int:
        """Bytes of an element of the products, for hidden of a torch.dtype."""
        return 1 if self.quant in ("fp8_w8a8", "int8_w8a8") else dtype.itemsize


NAME = re.compile(r"experts=(\d+),intermediate=(\d+),top_k=(\d+)(?:,global_experts=(\d+))?(,ungated)?")


def parse_layer(
    name: str, hidden: int, quant: str | None = None, block_shape: tuple[int, int] | None = None
) -> MoeLayer:
    """The layer that `MoeLayer.name` names.

    Raises:
        ValueError: any other text, or sizes that no layer has.
    """
    if not (match := NAME.fullmatch(name)):
        raise ValueError(f"layer {name!r} is not such as experts=128,intermediate=768,top_k=8")
    experts, intermediate, top_k, routed = (int(size or 0) for size in match.groups()[:4])
    if not (intermediate > 0 and 1 <= top_k <= (routed or experts) and experts > 0) or 0 < routed <= experts:
        raise ValueError(f"layer {name!r}: no layer has such sizes")
    return MoeLayer(experts, top_k, hidden, intermediate, not match[5], quant, block_shape, routed or None)


def file_name(hidden: int, dtype: str, block_shape: Sequence[int] | None = None) -> str:
    """Name of the file for layers of a hidden size, and a dtype or one of QUANTS."""
    block = f"_block{block_shape[0]}x{block_shape[1]}" if block_shape else ""
    return f"grouped_gemm_config_{hidden}_{dtype}{block}.json"


FILE_NAME = re.compile(
    rf"grouped_gemm_config_(\d+)_(float16|bfloat16|float32|{'|'.join(QUANTS)})(?:_block(\d+)x(\d+))?\.json"
)


def check(config: LayerConfig, layer: MoeLayer, itemsize: int) -> None:
    """ValueError unless the kernels take these launch parameters for a layer with elements of itemsize bytes."""
    if config.gate_up.block_m != config.down.block_m:
        raise ValueError(f"block_m is {config.gate_up.block_m} and {config.down.block_m}: both halves share the tiles")
    if config.gate_up.stationary or config.down.permute or config.down.tma_store:
        raise ValueError("stationary is for down, permute and tma_store are for gate_up")
    if config.gate_up.persistent and not may_persist("gate_up", config.gate_up.block_m):
        raise ValueError(f"persistent programs of gate_up have tiles of 128 rows, here of {config.gate_up.block_m}")
    if config.down.persistent and config.down.stationary:
        raise ValueError("down is either persistent or stationary")
    if config.down.stationary and not stationary_fits(layer.intermediate, config.down.block_k, layer.block_shape):
        raise ValueError(f"stationary is for up to {STATIONARY_STEPS} blocks of k, here of {config.down.block_k}")
    if config.gate_up.block_m not in TILE_ROWS:
        raise ValueError(f"block_m is {config.gate_up.block_m}, expected one of {', '.join(map(str, TILE_ROWS))}")
    for half in (config.gate_up, config.down):
        if itemsize == 1 and half.block_k < 32:
            raise ValueError(f"block_k is {half.block_k}, expected at least the 32 of 8-bit products")
        if half.block_n > 256 or half.block_k > 256:
            raise ValueError(f"a block is {half.block_n} x {half.block_k}, TMA takes 256 at most")
    files.fits(needed(layer, itemsize, config))


def needed(layer: MoeLayer, itemsize: int, config: LayerConfig) -> int:
    """Bytes of shared memory that a program takes of either half of a layer with elements of itemsize bytes."""
    gate_up = shared_memory(config.gate_up, layer.products, itemsize, layer.hidden)
    return max(gate_up, shared_memory(config.down, 1, itemsize, layer.intermediate))


def read(path: Path) -> files.ConfigFile:
    """Read a file; whatever is wrong with it is a problem in the result, never an exception."""
    if not (match := FILE_NAME.fullmatch(path.name)):
        return files.ConfigFile({}, {}, {}, (files.unread(path, file_name(2048, "bfloat16")),))
    itemsize = {"float32": 4, "fp8_w8a8": 1, "int8_w8a8": 1}.get(match[2], 2)
    block_shape = (int(match[3]), int(match[4])) if match[3] else None

    def parse(name: str, entry: dict) -> tuple[str, LayerConfig | None]:
        layer = parse_layer(name, int(match[1]), block_shape=block_shape)
        halves = [entry.get(half, {}) for half in ("gate_up", "down")]
        if halves == [None, None]:
            return layer.name, None
        config = LayerConfig(*(files.parse_fields(half, MoeConfig) for half in halves))
        check(config, layer, itemsize)
        return layer.name, config

    return files.read_entries(path, TOKENS, parse, "layer {}, {} tokens")


FILES = Kind("moe_ops", "grouped_gemm_config_", read)
KINDS = (FILES,)


def entry(config: LayerConfig, us: float, default_us: float) -> dict:
    """An entry as a file holds it."""
    return {**asdict(config), "us": round(us, 2), "default_us": round(default_us, 2)}


def token_bucket(tokens: int) -> int:
    """The number of tokens whose config a batch of that many tokens runs."""
    return bucket_of(tokens, TOKENS)


def tile_rows(tokens: int, experts: int, top_k: int, itemsize: int = 2) -> int:
    """Rows of a tile for a batch: small while experts get few rows each, large where the products dominate."""
    rows_per_expert = tokens * top_k / experts
    if rows_per_expert <= 8:
        return 16
    return 64 if rows_per_expert <= 24 or itemsize != 2 else 128


def runs_direct(layer: MoeLayer, tokens: int) -> bool:
    """Whether a batch runs choice by choice, without a plan; it then has no launch parameters to choose."""
    steps = layer.top_k * -(-layer.intermediate // DIRECT_BLOCK_K)
    experts = layer.global_experts or layer.experts
    alone = tokens == 1 or (tokens <= DIRECT_TOKENS and DIRECT_EXPERTS * tokens * layer.top_k <= experts)
    return alone and steps <= DIRECT_STEPS and (layer.quant is None or _direct_blocks(layer))


def _direct_blocks(layer: MoeLayer) -> bool:
    """Whether a quantised layer may run choice by choice: in fp8 blocks, of which a step of K has whole groups."""
    group = layer.block_shape[1] if layer.quant == "fp8_w8a8" and layer.block_shape else 0
    return DIRECT_CHUNK <= group <= DIRECT_ELEMENTS // padded(layer.top_k) and group & (group - 1) == 0


def runs_without_plan(layer: MoeLayer, config: LayerConfig, tokens: int) -> bool:
    """Whether the tiles of a batch find their rows by themselves; else a launch makes a plan of them."""
    by_row = layer.quant in (None, "int8_w8a16") or layer.block_shape is not None  # no scale is of several rows of x
    small = config.gate_up.block_m == PLANLESS_ROWS and not config.gate_up.permute
    return by_row and small and tokens * layer.top_k <= min(layer.experts, PLANLESS_CHOICES)


def shared_memory(config: MoeConfig, products: int, itemsize: int, k: int) -> int:
    """Bytes of shared memory that a program takes; k: columns of x.

    Operands, and the output of one that stores it through TMA while it reads the next one's operands.
    """
    out = 2 * config.block_m * config.block_n if config.stationary or config.persistent else 0
    if config.stationary:
        whole = -(-k // config.block_k) * config.block_k * itemsize
        return (config.block_m + config.num_stages * config.block_n) * whole + out
    step = (config.block_m + products * config.block_n) * config.block_k * itemsize
    return step * config.num_stages + out


def moe_default(
    block_m: int, tokens: int, experts: int, top_k: int, n: int, k: int, products: int = 1, itemsize: int = 2
) -> MoeConfig:
    """Launch parameters of a grouped GEMM where no tuned ones are known.

    Args:
        block_m: rows of a tile, one of TILE_ROWS.
        tokens, experts, top_k: of the batch and the layer.
        n: columns of the output; k: columns of x.
        products: 2 when a program computes gates and ups, else 1.
        itemsize: bytes of an element.
    """
    if itemsize > 2:  # products on CUDA cores: operands and sums live in registers
        block_n = 32 if block_m == 128 else 64 // products
        return MoeConfig(block_m, min(block_n, padded(n)), min(32, padded(k)), 8 if block_m >= 64 else 4, 2, 8)
    if itemsize == 1 and block_m >= 64:  # registers hold the sums twice: in all, and of the step
        num_warps = 8 if block_m >= 128 else 4
        return MoeConfig(block_m, min(128 // products, padded(n)), min(128, max(32, padded(k))), num_warps, 4, 8)
    if itemsize == 2 and block_m >= 128:
        return MoeConfig(block_m, min(256 // products, padded(n)), min(64, padded(k)), 8, 4 if products == 2 else 3, 8)
    if itemsize == 2 and block_m == 64:
        return MoeConfig(block_m, min(128 // products, padded(n)), min(64, padded(k)), 4, 4, 1)
    if itemsize == 2 and block_m == 32:
        return MoeConfig(block_m, 64, min(256 // products, padded(k)), 4, 3, 1)
    tiles = min(tokens * top_k, experts)
    block_n = (64 if itemsize == 2 else 128) // products
    while block_n > 16 and tiles * -(-n // block_n) < MIN_PROGRAMS:
        block_n //= 2
    if itemsize == 2:
        return MoeConfig(block_m, min(block_n, padded(n)), min(256, padded(k)), 4, 3, 1)
    return MoeConfig(block_m, min(block_n, padded(n)), min(128, max(32, padded(k))), 4, 4, 1)


def layer_default(
    layer: MoeLayer,
    tokens: int,
    itemsize: int = 2,
    block_m: int | None = None,
    shared: int = files.MAX_SHARED_BYTES,
) -> LayerConfig:
    """Launch parameters of a layer where no tuned ones are known.

    Args:
        layer, tokens: the layer, and how many tokens a batch has.
        itemsize: bytes of an element.
        block_m: rows of a tile, else `tile_rows`.
        shared: bytes of shared memory that a block may have.
    """
    block_m = block_m or tile_rows(tokens, layer.global_experts or layer.experts, layer.top_k, itemsize)
    batch = (block_m, tokens, layer.experts, layer.top_k)
    first = moe_default(*batch, layer.intermediate, layer.hidden, products=layer.products, itemsize=itemsize)
    second = moe_default(*batch, layer.hidden, layer.intermediate, itemsize=itemsize)
    if itemsize == 2 and block_m == 128:  # copying rows pays off where many columns are made of each
        permute = layer.quant is None and layer.intermediate >= PERMUTE_COLUMNS
        many = tokens * layer.top_k >= TMA_STORE_ROWS * (layer.global_experts or layer.experts)
        second = replace(second, persistent=persistent_fits(shared))
        first = replace(first, permute=permute, tma_store=permute and many)
        if first.tma_store and second.persistent:  # of so many rows few tiles are half full
            first = replace(first, persistent=True, num_stages=3)
    if itemsize == 1 and block_m >= 64 and stationary_fits(layer.intermediate, second.block_k, layer.block_shape):
        second = replace(second, block_n=64, num_warps=4, num_stages=3, group_m=1, stationary=True)
    return LayerConfig(
        fitted(first, layer.products, itemsize, layer.hidden, shared),
        fitted(second, 1, itemsize, layer.intermediate, shared),
    )


def stationary_fits(k: int, block_k: int, block_shape: Sequence[int] | None = None) -> bool:
    """Whether a stationary program keeps k columns: STATIONARY_STEPS steps at most, each within a block of scales."""
    step = math.gcd(block_k, block_shape[1]) if block_shape else block_k
    return k <= STATIONARY_STEPS * step


def persistent_fits(shared: int) -> bool:
    """Whether programs are persistent with that many bytes of shared memory: it pays off with the most alone."""
    return shared >= files.MAX_SHARED_BYTES


def may_persist(half: str, block_m: int) -> bool:
    """Whether programs of a half, gate_up or down, may be persistent in tiles of block_m rows."""
    return half == "down" or block_m == 128


def fitted(config: MoeConfig, products: int, itemsize: int, k: int, shared: int) -> MoeConfig:
    """The config with fewer stages, then smaller blocks, so that a GPU with `shared` bytes of shared memory runs it."""
    while shared_memory(config, products, itemsize, k) > shared:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_k > 32:
            config = replace(config, block_k=config.block_k // 2)
        else:
            break
    return config


_pinned: tuple[LayerConfig | None] | None = None


@contextlib.contextmanager
def pinned(config: LayerConfig | None) -> Iterator[None]:
    """For the tuner: layers run this config inside, None = the analytic default."""
    global _pinned
    _pinned = (config,)
    try:
        with forgetting():
            yield
    finally:
        _pinned = None


def layer_config(layer: MoeLayer, tokens: int, dtype, device) -> LayerConfig:
    """Launch parameters of a layer for hidden [tokens, H] of a torch.dtype on a torch.device, tuned or analytic.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
    """
    return _layer_config(layer, token_bucket(tokens), dtype, device)


@cached
def _layer_config(layer: MoeLayer, bucket: int, dtype, device) -> LayerConfig:
    itemsize = layer.itemsize(dtype)
    tuned = _pinned[0] if _pinned else _find(layer, bucket, dtype, device, itemsize)
    return tuned or layer_default(layer, bucket, itemsize, shared=shared_bytes(device))


def _find(layer: MoeLayer, bucket: int, dtype, device, itemsize: int) -> LayerConfig | None:
    hidden = str(dtype).removeprefix("torch.")
    dtypes = [layer.quant] if layer.quant else [hidden, "bfloat16"] if hidden == "float16" else [hidden]
    names = [file_name(layer.hidden, name, layer.block_shape) for name in dtypes]
    unfit = f"files of {layer.quant} are for fp16 and bf16" if layer.quant and dtype.itemsize > 2 else ""
    near, needs = functools.partial(nearest, layer, itemsize), functools.partial(needed, layer, itemsize)
    return find(FILES, names, layer.name, bucket, device, near, needs, unfit)


def nearest(layer: MoeLayer, itemsize: int, entries: files.Entries, name: str, bucket: int) -> tuple[str, int] | None:
    """The entry that stands in for (name of the layer, bucket), or None: see the module's docstring."""

    def rows(tokens: int) -> int:
        return tile_rows(tokens, layer.global_experts or layer.experts, layer.top_k, itemsize)

    def same(other: str) -> bool:
        return name in (other, replace(parse_layer(other, 0), global_experts=None).name)

    fitting = [key for key in entries if same(key[0]) and rows(key[1]) == rows(bucket)]
    return min(fitting, key=lambda key: (max(key[1], bucket) / min(key[1], bucket), -key[1]), default=None)
