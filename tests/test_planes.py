"""Into how many planes the sum over K is split, and who adds them up."""

import random

import pytest

from lora_ops.config import CHUNKS_BATCH, PLANES_BATCH, num_planes, planes_of_group, planes_read, sums_planes
from ops_configs import lora, store

QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)


def sums(k: int, widths: tuple[int, ...], rank: int, rows: int) -> bool:
    planes = num_planes(k, len(widths), rank, rows)
    return sums_planes(planes, planes_of_group(k, rank, planes), widths, rank, rows)


@pytest.mark.parametrize(
    ("k", "widths", "rank", "summed_from"),
    [
        (25600, (5120,), 64, 1),  # 25 planes
        (25600, (5120,), 32, 17),  # which make no groups
        (12288, (4096,), 64, None),
        (4096, (7168, 7168), 64, 65),
        (14336, (4096,), 64, None),
        (14336, (4096,), 128, 17),  # 14 planes in each of two products
        (4096, (4096,), 64, None),
        (4096, (4096,), 128, 129),  # of few planes: for the wide tiles
        (4096, GATE_UP, 32, None),
        (4096, GATE_UP, 64, 33),
        (4096, GATE_UP, 128, 33),
        (4096, QKV, 64, None),
        (4096, QKV, 128, 129),  # fewer rows make few programs
    ],
)
def test_planes_are_added_up_once_where_programs_would_add_up_many(k, widths, rank, summed_from):
    for rows in range(1, store.SMALL_BATCH + 1):
        assert sums(k, widths, rank, rows) == (summed_from is not None and rows >= summed_from), rows


def test_of_large_batches_only_narrow_layers_of_few_planes_and_ranks_are_not_summed():
    for rows in (store.SMALL_BATCH + 1, CHUNKS_BATCH, PLANES_BATCH):
        assert [sums(4096, widths, 16, rows) for widths in ((4096,), QKV, GATE_UP)] == [False, False, True]
        assert [sums(4096, QKV, rank, rows) for rank in (64, 128)] == [False, True]
        assert [sums(14336, (4096,), rank, rows) for rank in (8, 32, 64)] == [True, True, False], "64: groups"
    assert not sums(4096, GATE_UP, 128, PLANES_BATCH + 1), "one plane"


def test_the_more_rows_and_slices_the_fewer_planes():
    """Chunks, groups of them, or one; ranks up to 32 have no groups."""
    rows = [store.SMALL_BATCH, CHUNKS_BATCH, PLANES_BATCH, PLANES_BATCH + 1]
    assert [num_planes(14336, 1, 64, count) for count in rows] == [14, 4, 4, 1]
    assert [num_planes(14336, 3, 64, count) for count in rows] == [14, 14, 4, 1]
    assert [num_planes(14336, 1, 32, count) for count in rows] == [14, 14, 14, 1]


def test_batches_of_a_bucket_do_what_was_compiled_for_it():
    for _ in range(300):
        k, rank = random.choice([512, 4096, 8192, 14336, 25600]), random.choice([8, 16, 64, 96, 128, 256])
        widths = random.choice([(4096,), QKV, GATE_UP, (7168, 7168), (25600, 25600)])
        rows = random.randint(1, 9000)
        bucket = store.row_bucket(rows)
        for slices in (1, 2, 3):
            assert num_planes(k, slices, rank, rows) == num_planes(k, slices, rank, bucket)
        assert planes_read(k, widths, rank, rows) == planes_read(k, widths, rank, bucket)


def test_a_shrink_of_many_ranks_has_the_warps_for_wide_tiles():
    for _ in range(200):
        k, slices, rank = 64 * random.randint(1, 400), random.randint(1, 3), random.randint(33, 160)
        config = lora.shrink_default(k, slices, rank, random.randint(65, store.SMALL_BATCH))
        assert config.num_warps == 4, (k, slices, rank)
        assert config.block_k >= 64, (k, slices, rank)


@pytest.mark.parametrize("rank", [32, 48, 64, 128])
def test_an_expand_of_many_planes_has_the_warps_to_add_them_up(rank):
    for rows in (1, 4, 16, 64, 512):
        assert lora.expand_default((5120,), rank, rows, 13).num_warps == 8
        assert lora.expand_default((5120,), rank, rows, 8).num_warps < 8
        assert lora.expand_default((5120,), 16, rows, 13).num_warps < 8
    assert lora.expand_default((5120,), 32, 64, 13).steps == 2, "added up once for both"
    narrow = lora.expand_default((24,), rank, 64, 13)
    assert (narrow.block_n, narrow.steps) == (32, 1), "no wider than the slice"
    assert lora.expand_default((2304,), 32, 64, 13).steps == 1, "no step beyond it"


@pytest.mark.parametrize(("widths", "rank", "rows"), [(GATE_UP, 128, 64), (QKV, 64, 256), ((4096,), 128, 64)])
def test_an_expand_of_complete_sums_has_the_warps_for_wide_tiles(widths, rank, rows):
    assert lora.expand_default(widths, rank, rows, 1).num_warps == 4
    assert lora.expand_default(widths, rank, rows, 4).num_warps < 4
    assert lora.expand_default(widths, rank, 16, 1) == lora.expand_default(widths, rank, 16, 4)
