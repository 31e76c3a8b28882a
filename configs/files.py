"""Files of tuned launch parameters: their names, their format, and how they are read and written.

    <folder>/NVIDIA_H200/lora_shrink,k=4096,slices=3.json           one file for each shape of a kernel
    <folder>/NVIDIA_H200/lora_expand,widths=4096+1024+1024,planes=4.json
    <folder>/NVIDIA_H200/grouped_gemm_config_2048_bfloat16.json     MoE layers of a hidden size: see configs/moe.py

    {"gpu": "NVIDIA H200", "triton": "3.6.0", "torch": "2.11.0", "kernels": "<hash>", "date": ..., "command": ...,
     "entries": {"<rank>": {"<row bucket>": {"config": {"block_n": 16, ...}, "us": 9.1, "default_us": 10.2}}}}

"us" and "default_us" are microseconds of shrink and expand together, with this entry and with the analytic default of
the day in its place; they are equal where that default was measured and stayed. Of 17 to 512 rows they are the
geometric mean of batches of all adapters and of one (before November 27, 2026, of 65 to 512 rows and the arithmetic
one), of 64 rows or more for each of more than eight adapters that of eight sequences and of all adapters (before
November 29 of eight sequences alone). The date is that of a file's newest entry; tune_lora.csv has those of all. A
config of null asks for today's analytic default. fp16 and bf16 share the entries. Files of MoE layers have the name of
a layer in place of the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

Key = tuple[Any, int]
"""(rank, row bucket), or (name of a MoE layer, token bucket)."""
Entries = dict[Key, Any]
"""Key -> config, or None where the default stays."""

PATTERNS = ("lora_*.json", "grouped_gemm_config_*.json")
"""Of the names of all files."""
METADATA = ("gpu", "triton", "torch", "kernels", "date", "command")
MAX_SHARED_BYTES = 227 << 10
"""Shared memory of a block, at most, on any GPU so far."""


def gpu_folder(device_name: str) -> str:
    """The folder of a GPU: its name with underscores; every member of the H200 family is NVIDIA_H200."""
    words = device_name.replace("-", " ").split()
    return "NVIDIA_H200" if "H200" in words else "_".join(words)


def shrink_file(k: int, slices: int) -> str:
    """Name of the file for x [*, k] and `slices` slices of A."""
    return f"lora_shrink,k={k},slices={slices}.json"


def expand_file(widths: Sequence[int], planes: int) -> str:
    """Name of the file for slices of B with `widths` output features and so many planes of h."""
    return f"lora_expand,widths={'+'.join(map(str, widths))},planes={planes}.json"


def unread(path: Path, example: str) -> str:
    """The problem of a file whose name no launch looks up, beside the name of one that it does."""
    return f"{path}: no launch reads a file of this name, but such as {example}: rename it, or tune again and delete it"


@dataclass(frozen=True)
class ConfigFile:
    """A file as read: metadata, valid entries, measured entries as they stand, and what was wrong with the others."""

    metadata: Mapping[str, str]
    entries: Entries
    raw: Mapping[Key, dict]
    problems: tuple[str, ...]


def shared_bytes(config: Any, rows: int = 64) -> int:
    """Shared memory that a config of a LoRA kernel may need, at most, with tiles of `rows` and 2-byte elements, y too.

    Of a shrink what its stages multiply. Of an expand B in its stages, h and y, or h in fp32 before them.
    """
    n, stages = config.block_n, config.num_stages
    if hasattr(config, "block_k"):
        return 2 * stages * config.block_k * (rows + n)
    r = config.block_r
    return 2 * max(stages * r * n + rows * (r + n), r * (n + 2 * rows))


def parse_fields(value: object, kind: type) -> Any:
    """A `kind` dataclass of integers and booleans from its JSON object; fields with a default may be left out.

    Raises:
        ValueError: unknown or missing fields, no positive integer, no power of two where one is needed, or too large.
    """
    names = {field.name: field.default for field in fields(kind)}
    needed = {name for name, default in names.items() if default is MISSING}
    if not isinstance(value, dict) or not needed <= set(value) <= set(names):
        raise ValueError(f"config is {value!r}, expected exactly the fields {', '.join(names)}")
    for name, number in value.items():
        default = names[name]
        if type(number) is type(default) and number == default:
            continue
        if type(default) is bool:
            if type(number) is not bool:
                raise ValueError(f"{name} is {number!r}, expected true or false")
            continue
        if type(number) is not int or not 1 <= number <= 1024:
            raise ValueError(f"{name} is {number!r}, expected an integer from 1 to 1024")
        if (name.startswith("block_") or name == "num_warps") and number & (number - 1):
            raise ValueError(f"{name} is {number}, expected a power of two")
        if name.startswith("block_") and number < 16:
            raise ValueError(f"{name} is {number}, expected at least the 16 that a tensor core takes")
        if name in ("num_warps", "num_stages", "steps") and number > 32:
            raise ValueError(f"{name} is {number}, expected at most 32")
    return kind(**value)


def fits(needed: int) -> None:
    """ValueError unless a block of some GPU has that many bytes of shared memory."""
    if needed > MAX_SHARED_BYTES:
        raise ValueError(f"it needs up to {needed} bytes of shared memory, a block has {MAX_SHARED_BYTES} at most")


def parse_config(value: object, kind: type) -> Any:
    """A config of a LoRA kernel from its JSON object.

    Raises:
        ValueError: see `parse_fields`; or it needs more shared memory than any GPU has.
    """
    config = parse_fields(value, kind)
    fits(shared_bytes(config))
    return config


def read(path: Path, kind: type, buckets: Sequence[int]) -> ConfigFile:
    """Read a file of a LoRA kernel; whatever is wrong with it is a problem in the result, never an exception."""

    def parse(rank: str, entry: dict) -> tuple[int, Any]:
        if not rank.isdecimal() or int(rank) < 1:
            raise ValueError(f"rank {rank!r} is no positive integer")
        if "config" not in entry:
            raise ValueError('expected an object with "config"')
        return int(rank), None if entry["config"] is None else parse_config(entry["config"], kind)

    return read_entries(path, buckets, parse, "rank {}, rows {}")


def read_entries(
    path: Path, buckets: Sequence[int], parse: Callable[[str, dict], tuple[Any, Any]], where: str
) -> ConfigFile:
    """Read a file; whatever is wrong with it is a problem in the result, never an exception.

    Args:
        buckets: that an entry may be for.
        parse: name of a group of entries, and an entry -> the group, and its config; ValueError for a bad one.
        where: names an entry in a problem, by its group and bucket.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        return ConfigFile({}, {}, {}, (f"{path}: {error}",))
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        return ConfigFile({}, {}, {}, (f'{path}: expected an object with "entries"',))
    metadata = {name: str(content[name]) for name in METADATA if name in content}
    entries: Entries = {}
    raw: dict[Key, dict] = {}
    problems: list[str] = []
    for group, row in content["entries"].items():
        for bucket, entry in row.items() if isinstance(row, dict) else [("", row)]:
            try:
                if not bucket.isdecimal() or int(bucket) not in buckets:
                    raise ValueError(f"{bucket!r} is no bucket, those are {', '.join(map(str, buckets))}")
                if not isinstance(entry, dict):
                    raise ValueError("expected an object")
                parsed, config = parse(group, entry)
                entries[parsed, int(bucket)] = config
                raw[parsed, int(bucket)] = entry
            except ValueError as error:
                problems.append(f"{path}: entry for {where.format(group, bucket)}: {error}")
    return ConfigFile(metadata, entries, raw, tuple(problems))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces `path` in one step when all is written: a reader meets no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    yield part
    part.replace(path)


def write(path: Path, metadata: Mapping[str, str], entries: Mapping[Key, dict]) -> None:
    """Write a file, atomically.

    Args:
        metadata: every name of METADATA.
        entries: key -> entry as it is to stand in the file: {"config": object or None, "us", "default_us", ...}.
    """
    nested: dict[str, dict[str, dict]] = {}
    for (group, bucket), entry in sorted(entries.items()):
        nested.setdefault(str(group), {})[str(bucket)] = entry
    lines = [f"  {json.dumps(name)}: {json.dumps(metadata[name])}," for name in METADATA]
    groups = []
    for group, row in nested.items():
        cells = ",\n".join(f"      {json.dumps(bucket)}: {json.dumps(entry)}" for bucket, entry in row.items())
        groups.append(f"    {json.dumps(group)}: {{\n{cells}\n    }}")
    body = ",\n".join(groups)
    with replacing(path) as part:
        part.write_text("{\n" + "\n".join(lines) + f'\n  "entries": {{\n{body}\n  }}\n}}\n')
