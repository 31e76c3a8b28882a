"""Files of tuned launch parameters: which are found, in which order, and what a bad one does (it warns, no more)."""

import itertools
import json
import logging
import os
import random
import timeit
from dataclasses import asdict

import pytest
import torch
import triton
from rich.console import Console

from lora_ops import doctor
from lora_ops.config import CHUNKS_BATCH, PLANES_BATCH
from lora_ops.plan import SMALL_BATCH
from ops_configs import files, lora, store
from ops_configs.lora import ExpandConfig, ShrinkConfig, tile_rows_for
from ops_patches import state

from .conftest import GPU, properties

pytestmark = pytest.mark.usefixtures("one_gpu")

K, SLICES, WIDTHS = 4096, 3, (4096, 1024, 1024)
BF16, CUDA, CPU = torch.bfloat16, torch.device("cuda", 0), torch.device("cpu")
SHRINK, EXPAND = ShrinkConfig(64, 256, 8, 2), ExpandConfig(32, 16, 8, 1, 3)


def metadata(**changes):
    import triton

    here = {"gpu": GPU, "triton": triton.__version__, "torch": torch.__version__, "kernels": "", "date": "2026-01-01"}
    return {**here, "command": "python -m lora_ops.tune --shape 4096:4096", **changes}


def write(folder, config=SHRINK, rank=16, rows=64, name=None, **changes):
    """One entry in one file of that folder."""
    name = name or files.shrink_file(K, SLICES)
    path = folder / "NVIDIA_H200" / name
    entry = {"config": config and asdict(config), "us": 1.0, "default_us": 2.0}
    files.write(path, metadata(**changes), {(rank, rows): entry})
    return path


def shrink(rank=16, rows=64, dtype=BF16, device=CUDA):
    return lora.shrink_config(K, SLICES, rank, rows, dtype, device)


def default(rank=16, rows=64):
    return lora.shrink_default(K, SLICES, rank, store.row_bucket(rows))


def use(monkeypatch, folder):
    monkeypatch.setenv(store.CONFIG_DIR, str(folder))
    store.forget()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="lora_ops")
    return caplog


def test_a_bucket_holds_every_row_count_and_one_tile_size():
    for rows in [*range(1, 10000), *(random.randrange(1, 1 << 20) for _ in range(2000))]:
        bucket = store.row_bucket(rows)
        assert bucket in store.BUCKETS
        assert bucket >= rows or bucket == store.BUCKETS[-1]
        assert tile_rows_for(bucket) == tile_rows_for(rows)
        for most in (CHUNKS_BATCH, PLANES_BATCH):
            assert (bucket <= most) == (rows <= most)
        assert store.row_bucket(bucket) == bucket
    assert store.SMALL_BATCH == SMALL_BATCH
    assert lora.row_buckets() == store.BUCKETS


def test_a_row_count_never_gets_what_was_tuned_for_the_other_tile_size(monkeypatch, tmp_path):
    entries = {}
    for rows in random.sample(store.BUCKETS, 5):
        entries[16, rows] = {"config": asdict(ShrinkConfig(16, 64, 1, 2 if rows <= SMALL_BATCH else 3))}
    files.write(tmp_path / "NVIDIA_H200" / files.shrink_file(K, SLICES), metadata(), entries)
    use(monkeypatch, tmp_path)
    for rows in range(1, 9000, 7):
        config = shrink(16, rows)
        assert config == default(16, rows) or config.num_stages == (2 if rows <= SMALL_BATCH else 3)


def test_explicit_before_environment_before_shipped_before_default(monkeypatch, tmp_path):
    assert shrink() == default() != SHRINK
    configs = [ShrinkConfig(16, 64, warps, 5) for warps in (1, 2, 4)]
    names = ["shipped", "user", "explicit"]
    for name, config in zip(names, configs, strict=True):
        write(tmp_path / name, config)
    store.forget()
    assert shrink() == configs[0]
    use(monkeypatch, tmp_path / "user")
    assert shrink() == configs[1]
    store.use_configs(tmp_path / "explicit")
    assert shrink() == configs[2]
    (choice,) = store.choices()
    assert (choice["source"], choice["rows"], choice["reason"]) == ("use_configs", [64], "measured for it")
    assert choice["path"].startswith(str(tmp_path / "explicit"))
    store.use_configs(None)
    assert shrink() == configs[1]


def test_folders_overlay_entry_by_entry(monkeypatch, tmp_path):
    write(tmp_path / "shipped", SHRINK, rank=16, rows=64)
    other = ShrinkConfig(16, 64, 1, 6)
    write(tmp_path / "user", other, rank=16, rows=128)
    use(monkeypatch, tmp_path / "user")
    assert shrink(16, 64) == SHRINK  # exact in the shipped file, near in the user's
    assert shrink(16, 100) == other
    assert shrink(16, 4) == other  # near in both


def test_an_entry_of_null_keeps_the_default_and_stops_the_search(monkeypatch, tmp_path):
    write(tmp_path / "shipped", SHRINK)
    write(tmp_path / "user", None)
    use(monkeypatch, tmp_path / "user")
    assert shrink() == default()
    assert "asks for it" in store.choices()[0]["reason"]


def test_ranks_of_one_padded_size_share():
    entries = {(rank, 64): SHRINK for rank in (16, 24, 64)}
    for rank, expected in {8: 16, 16: 16, 12: 16, 17: 24, 32: 24, 33: 64, 64: 64, 65: None, 128: None}.items():
        assert store.nearest(entries, rank, 64) == (expected and (expected, 64))
    assert store.nearest({(16, 32): SHRINK, (16, 256): SHRINK}, 16, 64) == (16, 32)
    assert store.nearest({(16, 512): SHRINK}, 16, 1024) is None


def test_the_expand_has_its_own_files(monkeypatch, tmp_path):
    write(tmp_path, EXPAND, name=files.expand_file(WIDTHS, 4))
    use(monkeypatch, tmp_path)
    assert lora.expand_config(WIDTHS, 16, 64, BF16, CUDA, 4) == EXPAND
    assert lora.expand_config((4096, 1024), 16, 64, BF16, CUDA, 4) != EXPAND
    assert lora.expand_config(WIDTHS, 16, 64, BF16, CUDA, 1) != EXPAND


def test_without_a_gpu_and_in_fp32_defaults_run(monkeypatch, tmp_path):
    write(tmp_path)
    use(monkeypatch, tmp_path)
    assert shrink(device=CPU) == default()
    assert shrink(dtype=torch.float32) == default()
    assert shrink(dtype=torch.float16) == SHRINK
    assert {choice["reason"] for choice in store.choices()} == {"measured for it"}  # of the latest call


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100_SXM4_80GB"),
    ],
)
def test_folder_of_a_gpu(name, folder):
    assert files.gpu_folder(name) == folder


BAD = {
    "no object": 7,
    "no config": {"us": 1.0},
    "unknown field": {"config": {**asdict(SHRINK), "block_m": 16}},
    "missing field": {"config": {"block_n": 16}},
    "no power of two": {"config": {**asdict(SHRINK), "block_n": 48}},
    "text": {"config": {**asdict(SHRINK), "num_warps": "4"}},
    "true": {"config": {**asdict(SHRINK), "num_warps": True}},
    "negative": {"config": {**asdict(SHRINK), "num_stages": -1}},
    "too small": {"config": {**asdict(SHRINK), "block_k": 8}},
    "too many warps": {"config": {**asdict(SHRINK), "num_warps": 64}},
    "more than a GPU holds": {"config": asdict(ShrinkConfig(256, 512, 8, 4))},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_a_bad_entry_is_left_out_and_named(monkeypatch, tmp_path, warnings, entry):
    path = write(tmp_path)
    content = json.loads(path.read_text())
    content["entries"]["16"]["128"] = entry
    path.write_text(json.dumps(content))
    use(monkeypatch, tmp_path)
    assert shrink(16, 64) == SHRINK  # its neighbours stand
    assert shrink(16, 128) == SHRINK  # the nearest
    (problem,) = store.problems()
    assert str(path) in problem
    assert "rank 16, rows 128" in problem
    assert len(warnings.records) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": 3}', "", '{"entries": {"16": {"63": {}}, "x": 1}}'])
def test_a_broken_file_is_a_miss(monkeypatch, tmp_path, warnings, text):
    write(tmp_path).write_text(text)
    use(monkeypatch, tmp_path)
    assert shrink() == default()
    assert store.problems()
    (file,) = [f for f in store.available(GPU, lora.KINDS) if str(tmp_path) in f["path"]]
    assert file["problems"]
    assert file["entries"] == 0


def test_an_expand_of_far_more_rows_is_no_stand_in(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path)
    entries = {(16, rows): {"config": asdict(EXPAND)} for rows in (64, 8192)}
    files.write(tmp_path / "NVIDIA_H200" / files.expand_file(WIDTHS, 1), metadata(), entries)
    found = {rows: lora.expand_config(WIDTHS, 16, rows, BF16, CUDA, 1) == EXPAND for rows in store.BUCKETS}
    assert [rows for rows in store.BUCKETS if found[rows]] == [32, 64, 128, 4096, 8192]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lora_expand,widths=4096.json", files.expand_file((4096,), 4)),
        ("lora_expand,widths=4096,1024,planes=4.json", files.expand_file((4096, 1024), 4)),
        ("lora_expand,widths=4096,planes=4 (1).json", files.expand_file((4096,), 4)),
        ("lora_shrink,k=4096.json", files.shrink_file(4096, 1)),
        ("lora_shrink,slices=1,k=4096.json", files.shrink_file(4096, 1)),
        ("lora_shrink,k=4096,slices=1 (1).json", files.shrink_file(4096, 1)),
    ],
)
def test_a_file_that_no_launch_reads_is_a_problem(monkeypatch, tmp_path, name, near):
    use(monkeypatch, tmp_path)
    config = EXPAND if "expand" in name else SHRINK
    problems = {}
    for each in (name, near):
        path = write(tmp_path, config, name=each)
        problems[each] = [f["problems"] for f in store.available(GPU, lora.KINDS) if f["path"] == str(path)]
    assert problems[near] == [[]]
    ((problem,),) = problems[name]
    assert problem.startswith(f"{path.parent / name}: no launch reads a file of this name, but such as lora_")


def test_every_invalid_key_is_named(tmp_path):
    path = write(tmp_path)
    content = json.loads(path.read_text())
    content["entries"] = {"0": {"64": {}}, "16": {"65": {}}, "r": {"64": {}}}
    path.write_text(json.dumps(content))
    assert len(files.read(path, ShrinkConfig, store.BUCKETS).problems) == 3


@pytest.mark.parametrize("change", [{"triton": "0.1"}, {"torch": "0.1"}, {"gpu": "NVIDIA A10"}, {"kernels": "abc"}])
def test_a_mismatch_is_one_warning_with_the_command(monkeypatch, tmp_path, warnings, change):
    monkeypatch.setattr(store, "_kernels", {"lora_ops": tmp_path})
    matching = {"kernels": store.kernels_hash("lora_ops")} | change
    write(tmp_path, **matching)
    write(tmp_path, EXPAND, name=files.expand_file(WIDTHS, 4), **matching)
    use(monkeypatch, tmp_path)
    assert shrink() == SHRINK
    assert lora.expand_config(WIDTHS, 16, 64, BF16, CUDA, 4) == EXPAND
    (record,) = warnings.records
    assert "python -m lora_ops.tune --shape 4096:4096" in record.getMessage()
    assert next(iter(change.values())).replace(" ", "_") in record.getMessage()


def test_a_file_of_this_software_warns_of_nothing(monkeypatch, tmp_path, warnings):
    (tmp_path / "kernel.py").write_text("x")
    monkeypatch.setattr(store, "_kernels", {"lora_ops": tmp_path})
    write(tmp_path, kernels=store.kernels_hash("lora_ops"), torch=torch.__version__.partition("+")[0] + "+cu129")
    use(monkeypatch, tmp_path)
    monkeypatch.setattr(triton, "__version__", triton.__version__ + "+gitc817b9b6")
    assert shrink() == SHRINK
    assert not warnings.records


def test_a_folder_that_cannot_be_read_is_an_error(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match=rf"{store.CONFIG_DIR}=.* is no folder that can be read \(Permission denied\)"):
        shrink()


def test_a_bad_folder_is_an_error_before_any_launch(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=store.CONFIG_DIR):
        shrink()
    with pytest.raises(ValueError, match=store.CONFIG_DIR):
        shrink(device=CPU)
    with pytest.raises(ValueError, match="no folder"):
        store.use_configs(tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["GPU's folder", "parent", "empty", "other files", ""])
def test_a_folder_that_holds_no_files_of_gpus_is_an_error(monkeypatch, tmp_path, place):
    """Such as one a level too deep, or too shallow; the empty path is not the current folder."""
    tuned = tmp_path / "parent" / "tuned"
    write(tuned)
    monkeypatch.chdir(tuned)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other files" / "model").mkdir(parents=True)
    (tmp_path / "other files" / "model" / "config.json").write_text("{}")
    folder = str({"GPU's folder": tuned / "NVIDIA_H200", "": ""}.get(place, tmp_path / place))
    use(monkeypatch, folder)
    said = "no folder that can be read" if not folder else "no tuned files .* in folders of GPUs, such as NVIDIA_H200"
    for name, call in ((f"{store.CONFIG_DIR}=", shrink), ("use_configs: ", lambda: store.use_configs(folder))):
        with pytest.raises(ValueError, match=f"{name}{folder!r}.* {said}"):
            call()


def test_a_folder_of_files_for_other_gpus_is_none_of_errors(monkeypatch, tmp_path):
    write(tmp_path).parent.rename(tmp_path / "NVIDIA_L4")
    use(monkeypatch, tmp_path)
    store.use_configs(tmp_path)
    assert shrink() == default()


def test_pinned_configs_are_those_of_one_bucket(monkeypatch, tmp_path):
    write(tmp_path, ShrinkConfig(16, 64, 1, 6))
    use(monkeypatch, tmp_path)
    with lora.pinned(64, SHRINK, None):
        assert shrink(16, 60) == SHRINK
        assert shrink(16, 128) == ShrinkConfig(16, 64, 1, 6)
        assert lora.expand_config(WIDTHS, 16, 64, BF16, CUDA, 4) == lora.expand_default(WIDTHS, 16, 64, 4)
        assert lora.row_buckets() == ()
    assert shrink(16, 60) == ShrinkConfig(16, 64, 1, 6)


def test_the_doctor_shows_files_and_what_is_wrong_with_them(monkeypatch, tmp_path, capsys):
    path = write(tmp_path)
    content = json.loads(path.read_text())
    content["entries"]["8"] = {"64": {"config": {}}}
    path.write_text(json.dumps(content))
    use(monkeypatch, tmp_path)
    monkeypatch.setenv(state.STATUS_DIR, str(tmp_path / "status"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": GPU}])
    monkeypatch.setattr(doctor, "fit", lambda patches: {"installed": False, "misfits": [], "unreached_children": []})
    report = doctor.examine()
    (file,) = report["configs"]
    assert (file["source"], file["ranks"], file["entries"]) == (store.CONFIG_DIR, [16], 1)
    (problem,) = (problem for problem in report["problems"] if str(path) in problem)
    assert "rank 8, rows 64" in problem
    doctor.show(report, Console())
    assert str(path) in capsys.readouterr().out
    use(monkeypatch, tmp_path / "nowhere")
    assert any(store.CONFIG_DIR in problem for problem in doctor.examine()["problems"])


def test_the_doctor_shows_what_processes_use(monkeypatch, tmp_path, capsys):
    write(tmp_path)
    use(monkeypatch, tmp_path)
    shrink()
    monkeypatch.setenv("COLUMNS", "300")
    process = {"pid": 7, "vllm": {"configs": store.choices()}}
    doctor.show_configs({"processes": [process], "fit": {"vllm": {}}, "configs": []}, Console())
    shown = capsys.readouterr().out
    assert "lora_shrink,k=4096,slices=3" in shown
    assert str(tmp_path) in shown


def test_a_lookup_costs_little():
    shrink()
    assert min(timeit.repeat(shrink, number=2000, repeat=5)) / 2000 < 5e-6


def test_what_is_written_is_read(tmp_path):
    entries = {
        (rank, rows): {"config": random.choice([None, asdict(SHRINK)]), "us": random.random(), "default_us": 1.0}
        for rank in (8, 128)
        for rows in random.sample(store.BUCKETS, 4)
    }
    path = tmp_path / "a" / "b.json"
    files.write(path, metadata(), entries)
    file = files.read(path, ShrinkConfig, store.BUCKETS)
    assert file.raw == entries
    assert file.problems == ()
    assert file.entries == {key: entry["config"] and SHRINK for key, entry in entries.items()}
    assert set(file.metadata) == set(files.METADATA)


def test_every_shipped_file_is_valid_and_complete(monkeypatch):
    monkeypatch.undo()
    kinds = {"lora_shrink": ShrinkConfig, "lora_expand": ExpandConfig}
    for path in store.SHIPPED.glob("*/lora_*.json"):
        kind = next(kind for start, kind in kinds.items() if path.name.startswith(start))
        file = files.read(path, kind, store.BUCKETS)
        assert file.problems == ()
        assert set(file.metadata) == set(files.METADATA)
        assert files.gpu_folder(file.metadata["gpu"]) == path.parent.name
        for entry in file.raw.values():
            assert entry["us"] == entry["default_us"] or entry["us"] <= 0.97 * entry["default_us"] + 0.01


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("rank", [8, 64, 128, 512])
def test_defaults_fit_the_shared_memory_of_smaller_gpus(monkeypatch, kib, rank):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(kib << 10))
    for rows in store.BUCKETS:
        tile = tile_rows_for(rows)
        shrink = lora.shrink_config(14336, 2, rank, rows, torch.float32, CUDA)
        expand = lora.expand_config((28672, 4096), rank, rows, torch.float32, CUDA, 4)
        assert 4 * shrink.num_stages * (tile + shrink.block_n) * shrink.block_k <= kib << 10
        assert 4 * expand.num_stages * (tile + expand.block_n) * expand.block_r <= kib << 10
        assert shrink.num_stages >= 2 <= expand.num_stages
        assert min(shrink.block_k, expand.block_r) >= min(16, rank)
        shrink = lora.shrink_config(14336, 2, rank, rows, BF16, CUDA)
        default = lora.shrink_default(14336, 2, rank, rows)
        expand = lora.expand_config((28672, 4096), rank, rows, BF16, CUDA, 4)
        needed = 2 * default.num_stages * (tile + default.block_n) * default.block_k
        assert 2 * shrink.num_stages * (tile + shrink.block_n) * shrink.block_k <= kib << 10
        assert (shrink == default) == (needed <= kib << 10)
        assert shrink.num_stages >= 2
        assert tile < 64 or files.shared_bytes(expand) <= 99 << 10  # which is of 64 rows


def test_an_entry_that_does_not_fit_the_gpu_is_left_out_and_named(monkeypatch, tmp_path, warnings):
    """Of a file from a larger GPU. Tiles of few rows take less, and the default does not change."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties(99 << 10))
    use(monkeypatch, tmp_path)
    large = ExpandConfig(256, 64, 8, 3, 1)
    entries = {(16, rows): {"config": asdict(SHRINK)} for rows in (64, 1024)}
    path = tmp_path / "NVIDIA_H200" / files.shrink_file(K, SLICES)
    files.write(path, metadata(kernels=""), entries)
    expands = write(tmp_path, large, rank=64, rows=1024, name=files.expand_file(WIDTHS, 1))
    assert [files.shared_bytes(SHRINK, rows) for rows in (16, 64)] == [81920, 131072]
    assert shrink(rows=64) == SHRINK
    default_of = {}
    for rows in (1024, 2048):  # measured, and near
        default_of[rows] = lora.fitted(default(rows=rows), rows, 2, 99 << 10)
        assert shrink(rows=rows) == default_of[rows] != SHRINK
    assert lora.expand_config(WIDTHS, 64, 1024, BF16, CUDA, 1) == lora.expand_default(WIDTHS, 64, 1024, 1)
    first, second = store.problems()
    assert f"{path}: entry for rank 16, 1024 rows: it needs up to 131072 bytes of shared memory" in first
    assert f"a block of this {GPU} has {99 << 10}" in first
    assert f"{expands}: entry for rank 64, 1024 rows: it needs up to {files.shared_bytes(large)}" in second
    assert len([r for r in warnings.records if "left out, which costs speed alone" in r.getMessage()]) == 2
    reasons = {choice["reason"] for choice in store.choices() if choice["source"] == "default"}
    assert reasons == {"no fitting entry in the file for NVIDIA_H200"}


@pytest.mark.parametrize("kib", [99, 163, 227])
def test_defaults_that_a_tuner_wrote_fit_its_gpu(kib):
    """They stand in the files as they were measured, and are to be read there."""
    for rank, rows, planes in itertools.product((8, 16, 32, 64, 128, 512), store.BUCKETS, (1, 4, 8, 25)):
        shrink = lora.fitted(lora.shrink_default(14336, 2, rank, rows), rows, 2, kib << 10)
        for config in (shrink, lora.expand_default((28672, 4096), rank, rows, planes)):
            assert files.shared_bytes(config, tile_rows_for(rows)) <= kib << 10
