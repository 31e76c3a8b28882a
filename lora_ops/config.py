"""What the LoRA kernels fix for every GPU: their limits, and the order and the places in which a row is summed."""

from ops_configs.lora import TILE_ROWS
from ops_configs.store import SMALL_BATCH, row_bucket

MAX_RANK = 512
MAX_SLICES = 3
"""Slices that one launch takes; a layer with more takes several."""
CHUNKS_BATCH = 1024
"""Batches of up to this many rows give each chunk of K of several slices to a program of its own, those of up to
SMALL_BATCH rows each chunk of one slice; larger ones each group of chunks.

Measured on an H100 with 1024 rows of eight adapters, in turns, each with its best launch parameters, us, chunks ->
groups. One slice, K = 14336, rank 64 37.8 -> 36.4, rank 128 51.0 -> 46.1; K = 25600, 55.6 -> 51.8 and 76.4 -> 66.4; K =
7168, 32.0 -> 30.6 and 40.7 -> 40.3; K = 8192, 26.9 -> 27.0 and 37.5 -> 37.3. Three slices, K = 8192, rank 64 31.0 ->
33.8, rank 128 53.3 -> 50.7; K = 5120, 39.5 -> 44.0 and 63.0 -> 62.9.
"""
PLANES_BATCH = 4096
"""Batches of up to this many rows split K over programs; larger ones have tiles enough to fill a GPU."""
MAX_GROUPS = 4
"""Groups that the chunks of K make at most, from rank 33 on."""

SUMMED_PLANES = 17
SUMMED_ROWS = 128
SUMMED_BYTES = 110_000
SUMMED_PROGRAMS = 700
SUMMED_WIDTH = 10_000
"""When a kernel of its own adds up the planes between shrink and expand: see `sums_planes`.

Measured on an H100, in turns, us, by the expand -> by the kernel. Up to 512 rows: K = 25600 (25 planes), rank 64, 256
tokens of one adapter 16.0 -> 14.3, of 64 adapters 112.5 -> 101.4, rank 32 15.8 -> 12.8 and 60.6 -> 58.3; K = 14336 (14
planes), rank 64 13.5 -> 13.7 and 65.1 -> 64.5, rank 128 (28) 16.1 -> 17.1 and 122.5 -> 117.1. Gate and up, 256 tokens:
Llama-3-8B's, rank 128 47.1 -> 25.3 and 264 -> 234, half of it (115 KB), rank 64 17.4 -> 16.4 and 89.8 -> 79.2; its qkv,
rank 64 (49 KB) 11.4 -> 12.0 and 74.9 -> 71.9, rank 128 (197 KB) 18.4 -> 15.6 and 123.8 -> 117.3, but 64 tokens of one
adapter (192 programs) 10.8 -> 13.5. Of 600 to 2048 rows the layers for which it is taken need 0.95 of the time in the
mean of 164 cases, 0.77 to 1.11 (rank 16, K = 7168); the others would need 1.03.

Rank 128 of one slice on an H200, 1 to 64 adapters of 64 slots, each way with the better of its launch parameters, by
the kernel over by the expand, mean: with 512 rows 0.79 (K = 1024) to 0.96 (K = 7168, N = 4096), with 256 0.89 (K =
2048, N = 8192) to 1.03, with 128 rows 0.94 to 1.12.
"""


def chunk_k(k: int) -> int:
    """Elements of K that are summed before the partial sums are added up: the split of split-K.

    A function of the layer alone, never of the batch, so that a row's bits are those of any batch. More chunks are more
    programs for a small batch, and more planes for the expand to read.
    """
    return 512 if k < 4096 else 1024


def group_chunks(k: int, rank: int) -> int:
    """Consecutive chunks that are added up to a group's sum, before the groups' sums are; the last may have fewer.

    Of the layer alone, too. So a plane may hold a chunk, a group or all of K, with the same bits in the end. One chunk
    a group up to rank 32, where a reader's registers hold what it loads of all chunks at once.
    """
    return 1 if rank <= 32 else -(-k // (MAX_GROUPS * chunk_k(k)))


def num_planes(k: int, slices: int, rank: int, num_rows: int) -> int:
    """Planes that the sum over K is split into: the fewer, the more programs the rows of a batch make."""
    if num_rows > PLANES_BATCH or k == 0:
        return 1
    chunks = -(-k // chunk_k(k))
    most = SMALL_BATCH if slices == 1 else CHUNKS_BATCH
    return chunks if num_rows <= most else -(-chunks // group_chunks(k, rank))


def planes_of_group(k: int, rank: int, planes: int) -> int:
    """How many of `planes` planes make a group, for their reader."""
    return group_chunks(k, rank) if planes == -(-k // chunk_k(k)) else 1


def sums_planes(planes: int, group: int, widths: tuple[int, ...], rank: int, num_rows: int) -> bool:
    """Whether a kernel of its own adds up the planes; if not, each program of the expand does.

    In batches of up to SMALL_BATCH rows it does where a program would add up SUMMED_PLANES of them, counting those of
    each product in batches of more than 16 rows; of up to 16 rows only if they make groups. Of more than SUMMED_ROWS
    rows it does for ranks above 64 of one slice, whose wide tiles then fit into registers. Of more than 16 rows it
    also does for ranks above 32 and several slices, if programs would read SUMMED_BYTES of planes for each row and are
    at least SUMMED_PROGRAMS: less takes no longer than the kernel. In larger batches only narrow layers of few planes
    and ranks do without it.
    """
    num_rows = row_bucket(num_rows)  # batches of a bucket run what was compiled for it
    if planes == 1:
        return False
    if num_rows > SMALL_BATCH:
        return planes > MAX_GROUPS or rank > 64 or sum(widths) >= SUMMED_WIDTH
    if num_rows <= TILE_ROWS[0]:
        return group > 1 and planes >= SUMMED_PLANES
    products = -(-rank // 64)  # of a program, one after another
    if planes * products >= SUMMED_PLANES:
        return True
    if rank > 64 and len(widths) == 1 and num_rows > SUMMED_ROWS:
        return True
    runs = sum(-(-width // 128) for width in widths)  # of columns, one a program
    many = planes * runs * rank * products * 4 >= SUMMED_BYTES and num_rows * runs >= SUMMED_PROGRAMS * TILE_ROWS[0]
    return rank > 32 and len(widths) > 1 and many


def planes_read(k: int, widths: tuple[int, ...], rank: int, num_rows: int) -> int:
    """Planes that the expand of a layer reads and adds up; 1: complete sums."""
    planes = num_planes(k, len(widths), rank, num_rows)
    return 1 if sums_planes(planes, planes_of_group(k, rank, planes), widths, rank, num_rows) else planes
