"""What the LoRA kernels fix for every GPU: their limits and the order in which a row is summed."""

MAX_RANK = 512
MAX_SLICES = 3
"""Slices that one launch takes; a layer with more takes several."""
PLANES_BATCH = 4096
"""Batches of up to this many rows split K over programs; larger ones have tiles enough to fill a GPU."""


def chunk_k(k: int) -> int:
    """Elements of K that are summed before the partial sums are added up: the split of split-K.

    A function of the layer alone, never of the batch, so that a row's bits are those of any batch. More chunks are more
    programs for a small batch, and more planes for the expand to read.
    """
    return 512 if k < 4096 else 1024
