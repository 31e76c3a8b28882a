"""What the LoRA kernels fix for every GPU: their limits and the order in which a row is summed."""

MAX_RANK = 512
MAX_SLICES = 3
"""Slices that one launch takes; a layer with more takes several."""
CHUNKS_BATCH = 1024
"""Batches of up to this many rows give each chunk of K to a program of its own, larger ones each group of chunks.

Measured on an H200 with K = 14336: at 1024 rows, rank 64, groups leave too few programs (40.1 us, chunks 30.9); at 2048
rows, rank 128, chunks are too many planes to read (94.9 us, groups 66.2).
"""
PLANES_BATCH = 4096
"""Batches of up to this many rows split K over programs; larger ones have tiles enough to fill a GPU."""
MAX_GROUPS = 4
"""Groups that the chunks of K make at most, from rank 33 on."""

SUMMED_PLANES = 17
"""From so many planes on, where they make groups, a kernel of its own adds them up between shrink and expand.

Below, each program of the expand does: in batches of more than 16 rows once for each of its products, which count so
many times. Measured on an H100, K = 25600 (25 planes), rank 64: 256 tokens of one adapter 27.5 -> 18.6 us, of 64
adapters 115.3 -> 100.3; K = 14336 (14 planes), rank 64: 12.8 -> 12.8 and 62.5 -> 64.0, rank 128: 25.5 -> 24.1 and
121.1 -> 115.2.
"""
SUMMED_BYTES = 100_000
"""It also does for layers of several slices in batches of more than 16 rows, if the expand's programs read as many
bytes of planes for each row. Measured on an H100: gate_up of Llama-3-8B, rank 128, 256 tokens of 32 adapters 141.7 ->
121.7 us, 1024 of 8 97.3 -> 91.1; qkv of rank 64, whose programs would read 50,000, 35.0 -> 36.5.
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
