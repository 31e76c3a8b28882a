"""Where tuned launch parameters are looked for, and what was found.

folder of `use_configs` > LORA_OPS_CONFIG_DIR > files shipped for this GPU > analytic default

Entry by entry: an exact entry (rank and row bucket) of any folder goes before a near one. Near is another rank of the
same padded size (the next larger first), then the nearest row bucket that runs tiles of the same size. Files are for
fp16 and bf16; fp32 runs the defaults. A config never changes a result, so a bad or missing file costs speed alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files

logger = logging.getLogger("lora_ops")

CONFIG_DIR = "LORA_OPS_CONFIG_DIR"
SHIPPED = Path(__file__).resolve().parent

SMALL_BATCH = 512
"""Batches of up to this many rows run tiles of 16 rows, larger ones tiles of 64; a config is for one of the two."""
BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def row_bucket(num_rows: int) -> int:
    """The number of rows whose config a batch of num_rows rows runs: the next larger bucket, the last one at most."""
    index = bisect_left(BUCKETS, num_rows)
    return BUCKETS[index] if index < len(BUCKETS) else BUCKETS[-1]


def padded(size: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(1 << max(size - 1, 0).bit_length(), 16)


@dataclass(frozen=True)
class Choice:
    """Where the config of a (file, rank, row bucket) comes from: source is the folder's origin, or "default"."""

    source: str
    reason: str
    path: str = ""


_explicit: Path | None = None
_kernels: Path | None = None
_caches: list[Callable[[], None]] = []
_choices: dict[tuple[str, int, int], Choice] = {}
_problems: dict[str, None] = {}
_warned = False


def cached(function: Callable) -> Callable:
    """functools.cache, emptied when the folders change."""
    function = functools.cache(function)
    _caches.append(function.cache_clear)
    return function


def forget() -> None:
    """Look everything up again."""
    global _warned
    for clear in _caches:
        clear()
    _choices.clear()
    _problems.clear()
    _warned = False


def use_configs(folder: str | os.PathLike | None) -> None:
    """Look for tuned files in `folder` first, in this process, for layers seen from now on; None: no longer.

    `folder` holds one folder for each GPU, as `python -m lora_ops.tune --out` writes it. Layers that ran before are
    compiled anew when they run again, so call it before a server starts.

    Raises:
        ValueError: no such folder.
    """
    global _explicit
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"use_configs: {os.fspath(folder)!r} is no folder: give what lora_ops.tune --out wrote")
    _explicit = None if folder is None else Path(folder).resolve()
    forget()


def register_kernels(folder: Path) -> None:
    """Name the folder of the kernels' sources, whose hash stands in the files."""
    global _kernels
    _kernels = folder


@functools.cache
def _sources_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def kernels_hash() -> str:
    """Hash of the registered kernels' sources; empty before `register_kernels`."""
    return _sources_hash(_kernels) if _kernels else ""


def user_folder() -> Path | None:
    """The folder that LORA_OPS_CONFIG_DIR names.

    Raises:
        ValueError: it is set to something that is no folder.
    """
    value = os.environ.get(CONFIG_DIR)
    if value is None:
        return None
    if not Path(value).is_dir():
        raise ValueError(
            f"{CONFIG_DIR}={value!r} is no folder: set it to the one that lora_ops.tune --out wrote, or unset it"
        )
    return Path(value).resolve()


def folders() -> list[tuple[str, Path]]:
    """(source, folder) in the order in which they are asked."""
    user = user_folder()
    found = [("use_configs", _explicit)] if _explicit else []
    found += [(CONFIG_DIR, user)] if user else []
    return [*found, ("shipped", SHIPPED)]


@cached
def _gpu(device: Any) -> str:
    """Name of a torch.device's GPU, empty for a CPU."""
    if device.type != "cuda":
        return ""
    import torch

    return torch.cuda.get_device_name(device)


@cached
def _read(path: Path, kind: type) -> files.ConfigFile:
    found = files.read(path, kind, BUCKETS)
    for problem in found.problems:
        if problem not in _problems:
            _problems[problem] = None
            logger.warning("lora_ops: %s: it is left out, which costs speed alone", problem)
    return found


def find(name: str, kind: type, rank: int, bucket: int, dtype: Any, device: Any) -> Any:
    """The tuned config of a shape's file, or None where the analytic default is to be used; remembers the choice.

    Args:
        name: of the file, see `files.shrink_file`.
        kind: dataclass of the config.
        rank, bucket: what is asked for.
        dtype, device: torch.dtype of the weights and torch.device of the launch.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder.
    """
    asked = folders()
    if (gpu := _gpu(device)) == "":
        return _choose(name, rank, bucket, Choice("default", "no GPU"))
    if dtype.itemsize != 2:
        return _choose(name, rank, bucket, Choice("default", f"files are for fp16 and bf16, not {dtype}"))
    found = []
    for source, folder in asked:
        path = folder / files.gpu_folder(gpu) / name
        if path.exists():
            found.append((source, path, _read(path, kind)))
    for exact in (True, False):
        for source, path, file in found:
            key = (rank, bucket) if exact else nearest(file.entries, rank, bucket)
            if key in file.entries:
                _warn_of_mismatch(file.metadata, gpu, path)
                reason = "measured for it" if exact else f"measured for rank {key[0]}, {key[1]} rows"
                if file.entries[key] is None:
                    return _choose(name, rank, bucket, Choice("default", f"{reason}: nothing faster", str(path)))
                return _choose(name, rank, bucket, Choice(source, reason, str(path)), file.entries[key])
    where = "no file" if not found else "no fitting entry in the file"
    return _choose(name, rank, bucket, Choice("default", f"{where} for {files.gpu_folder(gpu)}"))


def _choose(name: str, rank: int, bucket: int, choice: Choice, config: Any = None) -> Any:
    _choices[name, rank, bucket] = choice
    return config


def nearest(entries: files.Entries, rank: int, bucket: int) -> tuple[int, int] | None:
    """The entry that stands in for (rank, bucket): see the module's docstring. None where there is none."""
    fitting = [
        (other_rank, rows)
        for other_rank, rows in entries
        if padded(other_rank) == padded(rank) and (rows <= SMALL_BATCH) == (bucket <= SMALL_BATCH)
    ]

    def distance(key: tuple[int, int]) -> tuple:
        other_rank, rows = key
        ratio = max(rows, bucket) / min(rows, bucket)
        return other_rank < rank, abs(other_rank - rank), ratio, -rows

    return min(fitting, key=distance, default=None)


def _warn_of_mismatch(metadata: dict[str, str], gpu: str, path: Path) -> None:
    global _warned
    if _warned:
        return
    import torch
    import triton

    here = {
        "gpu": files.gpu_folder(gpu),
        "triton": triton.__version__,
        "torch": torch.__version__.partition("+")[0],
        "kernels": kernels_hash(),
    }
    there = {name: metadata.get(name, "unknown").partition("+")[0] for name in here}
    there["gpu"] = files.gpu_folder(there["gpu"])
    differs = [f"{name} {there[name]}, here {here[name]}" for name in here if here[name] and there[name] != here[name]]
    if differs:
        _warned = True
        command = metadata.get("command", "python -m lora_ops.tune --help")
        logger.warning(
            "lora_ops: %s was tuned with %s. Results are the same, the speed may be less. "
            "To tune again: %s --out FOLDER, and set %s=FOLDER",
            *(path, "; ".join(differs), command, CONFIG_DIR),
        )


def choices() -> list[dict]:
    """Which file each layer shape seen in this process got its config from, and why, as plain data."""
    rows: dict[tuple, list[int]] = {}
    for (name, rank, bucket), choice in sorted(_choices.items()):
        rows.setdefault((name, rank, choice), []).append(bucket)
    return [
        {"shape": name.removesuffix(".json"), "rank": rank, "rows": buckets, **vars(choice)}
        for (name, rank, choice), buckets in rows.items()
    ]


def problems() -> list[str]:
    """Entries and files that were left out in this process, each with its reason."""
    return list(_problems)


def available(gpu: str, kinds: dict[str, type]) -> list[dict]:
    """The files that fit a GPU, in the order in which they are asked, as plain data.

    Args:
        gpu: name of the device.
        kinds: beginning of a file's name -> dataclass of its configs.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder.
    """
    rows = []
    for source, folder in folders():
        for path in sorted((folder / files.gpu_folder(gpu)).glob("*.json")):
            kind = next((kind for start, kind in kinds.items() if path.name.startswith(start)), None)
            if kind:
                file = files.read(path, kind, BUCKETS)
                ranks = sorted({rank for rank, _ in file.entries})
                row = {"source": source, "path": str(path), "ranks": ranks, "entries": len(file.entries)}
                rows.append(row | {"metadata": dict(file.metadata), "problems": list(file.problems)})
    return rows


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Look everything up anew inside, and again afterwards."""
    forget()
    try:
        yield
    finally:
        forget()
