"""Files of tuned launch parameters: their names, their format, and how they are read and written.

    <folder>/NVIDIA_H200/lora_shrink,k=4096,slices=3.json           one file for each shape of a kernel
    <folder>/NVIDIA_H200/lora_expand,widths=4096+1024+1024.json

    {"gpu": "NVIDIA H200", "triton": "3.6.0", "torch": "2.11.0", "kernels": "<hash>", "date": ..., "command": ...,
     "entries": {"<rank>": {"<row bucket>": {"config": {"block_n": 16, ...}, "us": 9.1, "default_us": 10.2}}}}

"us" and "default_us" are microseconds of shrink and expand together, with this entry and with the analytic default of
the day in its place; they are equal where that default was measured and stayed. A config of null asks for today's
analytic default. fp16 and bf16 share the entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Entries = dict[tuple[int, int], Any]
"""(rank, row bucket) -> config, or None where the default stays."""

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


def expand_file(widths: Sequence[int]) -> str:
    """Name of the file for slices of B with `widths` output features."""
    return f"lora_expand,widths={'+'.join(map(str, widths))}.json"


@dataclass(frozen=True)
class ConfigFile:
    """A file as read: metadata, valid entries, measured entries as they stand, and what was wrong with the others."""

    metadata: Mapping[str, str]
    entries: Entries
    raw: Mapping[tuple[int, int], dict]
    problems: tuple[str, ...]


def shared_bytes(config: Any) -> int:
    """Shared memory that a config may need, at most: a step's two operands in each stage, 64 rows, 2-byte elements."""
    first, second = (getattr(config, field.name) for field in fields(config) if field.name.startswith("block_"))
    return 2 * config.num_stages * (first * second + 64 * (first + second))


def parse_config(value: object, kind: type) -> Any:
    """A `kind` dataclass from its JSON object.

    Raises:
        ValueError: unknown or missing fields, no positive integer, no power of two where one is needed, or too large.
    """
    names = [field.name for field in fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"config is {value!r}, expected exactly the fields {', '.join(names)}")
    for name, number in value.items():
        if type(number) is not int or not 1 <= number <= 1024:
            raise ValueError(f"{name} is {number!r}, expected an integer from 1 to 1024")
        if (name.startswith("block_") or name == "num_warps") and number & (number - 1):
            raise ValueError(f"{name} is {number}, expected a power of two")
        if name.startswith("block_") and number < 16:
            raise ValueError(f"{name} is {number}, expected at least the 16 that a tensor core takes")
        if name in ("num_warps", "num_stages", "steps") and number > 32:
            raise ValueError(f"{name} is {number}, expected at most 32")
    config = kind(**value)
    if (needed := shared_bytes(config)) > MAX_SHARED_BYTES:
        raise ValueError(f"it needs up to {needed} bytes of shared memory, a block has {MAX_SHARED_BYTES} at most")
    return config


def read(path: Path, kind: type, buckets: Sequence[int]) -> ConfigFile:
    """Read a file; whatever is wrong with it is a problem in the result, never an exception."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return ConfigFile({}, {}, {}, (f"{path}: {error}",))
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        return ConfigFile({}, {}, {}, (f'{path}: expected an object with "entries"',))
    metadata = {name: str(content[name]) for name in METADATA if name in content}
    entries: Entries = {}
    raw: dict[tuple[int, int], dict] = {}
    problems: list[str] = []
    for rank, row in content["entries"].items():
        for bucket, entry in row.items() if isinstance(row, dict) else [("", row)]:
            try:
                key = _key(rank, bucket, buckets)
                if not isinstance(entry, dict) or "config" not in entry:
                    raise ValueError('expected an object with "config"')
                entries[key] = None if entry["config"] is None else parse_config(entry["config"], kind)
                raw[key] = entry
            except ValueError as error:
                problems.append(f"{path}: entry for rank {rank}, rows {bucket}: {error}")
    return ConfigFile(metadata, entries, raw, tuple(problems))


def _key(rank: str, bucket: str, buckets: Sequence[int]) -> tuple[int, int]:
    if not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"rank {rank!r} is no positive integer")
    if not bucket.isdecimal() or int(bucket) not in buckets:
        raise ValueError(f"{bucket!r} is no row bucket, those are {', '.join(map(str, buckets))}")
    return int(rank), int(bucket)


def write(path: Path, metadata: Mapping[str, str], entries: Mapping[tuple[int, int], dict]) -> None:
    """Write a file, atomically.

    Args:
        metadata: every name of METADATA.
        entries: (rank, row bucket) -> {"config": object or None, "us", "default_us", ...}.
    """
    nested: dict[str, dict[str, dict]] = {}
    for (rank, bucket), entry in sorted(entries.items()):
        nested.setdefault(str(rank), {})[str(bucket)] = entry
    lines = [f"  {json.dumps(name)}: {json.dumps(metadata[name])}," for name in METADATA]
    ranks = []
    for rank, row in nested.items():
        cells = ",\n".join(f"      {json.dumps(bucket)}: {json.dumps(entry)}" for bucket, entry in row.items())
        ranks.append(f"    {json.dumps(rank)}: {{\n{cells}\n    }}")
    body = ",\n".join(ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("{\n" + "\n".join(lines) + f'\n  "entries": {{\n{body}\n  }}\n}}\n')
    part.replace(path)
