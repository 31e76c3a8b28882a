"""Where tuned launch parameters are looked for, and what was found.

folder of `use_configs` > LORA_OPS_CONFIG_DIR > files shipped for this GPU > analytic default

Entry by entry: an exact entry (rank or MoE layer, and bucket) of any folder goes before a near one. For LoRA, near is
another rank of the same padded size (the next larger first), then the nearest row bucket that runs tiles of the same
size, of an expand one of up to twice or half the rows; configs/moe.py says what it is for MoE layers. LoRA's files are
for fp16 and bf16; fp32 runs the defaults. A bad or missing file, or an entry that does not fit the GPU's shared memory,
costs speed alone; a folder without any file is an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files

CONFIG_DIR = "LORA_OPS_CONFIG_DIR"
SHIPPED = Path(__file__).resolve().parent

SMALL_BATCH = 512
"""Batches of up to this many rows run small tiles (LoRA: of 16 rows, or wide ones of 64 where few adapters have many
rows), larger ones large tiles; a config is for one of the two."""
BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The next larger bucket, the last one at most."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]


def row_bucket(num_rows: int) -> int:
    """The number of rows whose config a batch of num_rows rows runs."""
    return bucket_of(num_rows, BUCKETS)


def padded(size: int) -> int:
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(1 << max(size - 1, 0).bit_length(), 16)


@dataclass(frozen=True)
class Kind:
    """A kind of files. package: of the kernels; prefix: how a name begins; read: reads a file of this kind."""

    package: str
    prefix: str
    read: Callable[[Path], files.ConfigFile]


@dataclass(frozen=True)
class Choice:
    """Where the config of a (file, group, bucket) comes from: source is the folder's origin, or "default"."""

    source: str
    reason: str
    path: str = ""


_explicit: Path | None = None
_kernels: dict[str, Path] = {}
_caches: list[Callable[[], None]] = []
_choices: dict[tuple[str, Any, int], Choice] = {}
_problems: dict[str, None] = {}
_warned: set[str] = set()


def when_forgotten(clear: Callable[[], None]) -> None:
    """Call `clear` whenever the folders change: something was kept that may follow from them."""
    _caches.append(clear)


def cached(function: Callable) -> Callable:
    """functools.cache, emptied when the folders change."""
    function = functools.cache(function)
    when_forgotten(function.cache_clear)
    return function


@cached
def shared_bytes(device) -> int:
    """Bytes of shared memory that a block may ask for on a torch.device."""
    if device.type != "cuda":
        return files.MAX_SHARED_BYTES
    import torch

    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def forget() -> None:
    """Look everything up again."""
    for clear in _caches:
        clear()
    _choices.clear()
    _problems.clear()
    _warned.clear()


def use_configs(folder: str | os.PathLike | None) -> None:
    """Look for tuned files in `folder` first, in this process, for layers seen from now on; None: no longer.

    `folder` holds one folder for each GPU, as `python -m lora_ops.tune --out` and `python -m moe_ops.tune --out` write
    it. Layers that ran before are compiled anew when they run again, so call it before a server starts.

    Raises:
        ValueError: no such folder, or none that a tuner's --out wrote; the one of before stays.
    """
    global _explicit
    _explicit = None if folder is None else _checked("use_configs: ", os.fspath(folder))
    forget()


def register_kernels(package: str, folder: Path) -> None:
    """Name the folder of a package's kernels, whose hash stands in the files."""
    _kernels[package] = folder


def sources_hash(*folders: Path) -> str:
    """Hash of the Python sources in these folders and below."""
    digest = hashlib.sha256()
    for folder in folders:
        for source in sorted(folder.rglob("*.py")):
            digest.update(str(source.relative_to(folder)).encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


_hash_once = functools.cache(sources_hash)


def kernels_hash(package: str) -> str:
    """Hash of the sources of a package's kernels; empty before `register_kernels`."""
    return _hash_once(_kernels[package]) if package in _kernels else ""


def _checked(name: str, value: str) -> Path:
    """The folder of tuned files that was given as `value`, under a name for the message.

    Raises:
        ValueError: no folder, or none that has files in folders of GPUs.
    """
    try:
        os.scandir(value).close()
    except OSError as error:
        raise ValueError(
            f"{name}{value!r} is no folder that can be read ({error.strerror}): give the one that a tuner's --out wrote"
        ) from error
    folder = Path(value).resolve()
    if not any(path for pattern in files.PATTERNS for path in folder.glob(f"*/{pattern}")):
        raise ValueError(
            f"{name}{value!r} has no tuned files ({', '.join(files.PATTERNS)}) in folders of GPUs, such as "
            f"{files.gpu_folder('NVIDIA H200')}: give the folder that a tuner's --out wrote, which holds those"
        )
    return folder


def user_folder() -> Path | None:
    """The folder that LORA_OPS_CONFIG_DIR names.

    Raises:
        ValueError: it is set to something that is no folder, or none that a tuner's --out wrote.
    """
    value = os.environ.get(CONFIG_DIR)
    return None if value is None else _checked(f"{CONFIG_DIR}=", value)


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
def _read(path: Path, kind: Kind) -> files.ConfigFile:
    found = kind.read(path)
    for problem in found.problems:
        _leave_out(kind.package, problem)
    return found


def _leave_out(package: str, problem: str) -> None:
    if problem not in _problems:
        _problems[problem] = None
        logger = logging.getLogger(package)
        logger.warning("%s: %s: it is left out, which costs speed alone", package, problem)


def find(
    kind: Kind,
    names: Sequence[str],
    group: Any,
    bucket: int,
    device: Any,
    near: Callable[[files.Entries, Any, int], files.Key | None],
    needed: Callable[[Any], int],
    unfit: str = "",
) -> Any:
    """The tuned config of a shape's file, or None where the analytic default is to be used; remembers the choice.

    Args:
        kind, names: of the files that may hold it, the first one before the others.
        group, bucket: of the entry: see `files.Key`.
        device: torch.device of the launch.
        near: which of a file's entries stands in for the one that is missing, if any.
        needed: bytes of shared memory that a config needs; one of more than the GPU has is left out.
        unfit: why no file can be for this call.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
    """
    asked = folders()
    key = names[0], group, bucket
    if (gpu := _gpu(device)) == "":
        return _choose(key, Choice("default", "no GPU"))
    if unfit:
        return _choose(key, Choice("default", unfit))
    found = []
    for source, folder in asked:
        for name in names:
            path = folder / files.gpu_folder(gpu) / name
            if path.exists():
                found.append((source, path, _read(path, kind)))
    for exact in (True, False):
        for source, path, file in found:
            entry = (group, bucket) if exact else near(file.entries, group, bucket)
            if entry in file.entries:
                _warn_of_mismatch(kind.package, file.metadata, gpu, path)
                reason = "measured for it" if exact else f"measured for {_where(*entry)}"
                if (config := file.entries[entry]) is None:
                    return _choose(key, Choice("default", f"{reason}: the entry asks for it", str(path)))
                size, most = needed(config), shared_bytes(device)
                if size <= most:
                    return _choose(key, Choice(source, reason, str(path)), config)
                problem = f"it needs up to {size} bytes of shared memory, a block of this {gpu} has {most}"
                _leave_out(kind.package, f"{path}: entry for {_where(*entry)}: {problem}")
    where = "no file" if not found else "no fitting entry in the file"
    return _choose(key, Choice("default", f"{where} for {files.gpu_folder(gpu)}"))


def _where(group: Any, bucket: int) -> str:
    return f"rank {group}, {bucket} rows" if isinstance(group, int) else f"{group}, {bucket} tokens"


def _choose(key: tuple[str, Any, int], choice: Choice, config: Any = None) -> Any:
    _choices[key] = choice
    return config


def nearest(entries: files.Entries, rank: int, bucket: int) -> tuple[int, int] | None:
    """LoRA's entry that stands in for (rank, bucket): see the module's docstring. None where there is none."""
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


def _warn_of_mismatch(package: str, metadata: Mapping[str, str], gpu: str, path: Path) -> None:
    if package in _warned:
        return
    import torch
    import triton

    here = {
        "gpu": files.gpu_folder(gpu),
        "triton": triton.__version__.partition("+")[0],
        "torch": torch.__version__.partition("+")[0],
        "kernels": kernels_hash(package),
    }
    there = {name: metadata.get(name, "unknown").partition("+")[0] for name in here}
    there["gpu"] = files.gpu_folder(there["gpu"])
    differs = [f"{name} {there[name]}, here {here[name]}" for name in here if here[name] and there[name] != here[name]]
    if differs:
        _warned.add(package)
        command = metadata.get("command", f"python -m {package}.tune --help")
        logging.getLogger(package).warning(
            "%s: %s was tuned with %s. Results are right, the speed may be less. "
            "To tune again: %s --out FOLDER, and set %s=FOLDER",
            *(package, path, "; ".join(differs), command, CONFIG_DIR),
        )


def choices() -> list[dict]:
    """Which file each layer shape seen in this process got its config from, and why, as plain data.

    rank: of a LoRA layer; rows: row buckets, or token buckets of a MoE layer, whose name is part of the shape.
    """
    found: dict[tuple, list[int]] = {}
    for (name, group, bucket), choice in sorted(_choices.items(), key=lambda item: tuple(map(str, item[0][:2]))):
        found.setdefault((name.removesuffix(".json"), group, choice), []).append(bucket)
    rows = []
    for (shape, group, choice), buckets in found.items():
        shape, rank = (shape, group) if isinstance(group, int) else (f"{shape}, {group}", "")
        rows.append({"shape": shape, "rank": rank, "rows": sorted(buckets), **vars(choice)})
    return rows


def problems() -> list[str]:
    """Entries and files that were left out in this process, each with its reason."""
    return list(_problems)


def available(gpu: str, kinds: Sequence[Kind]) -> list[dict]:
    """The files that fit a GPU, in the order in which they are asked, as plain data.

    Args:
        gpu: name of the device.
        kinds: of files.

    Raises:
        ValueError: LORA_OPS_CONFIG_DIR is no folder of tuned files.
    """
    rows = []
    for source, folder in folders():
        for path in sorted((folder / files.gpu_folder(gpu)).glob("*.json")):
            kind = next((kind for kind in kinds if path.name.startswith(kind.prefix)), None)
            if kind:
                file = kind.read(path)
                ranks = sorted({rank for rank, _ in file.entries if isinstance(rank, int)})
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
