#!/usr/bin/env python3
"""CPU time of a step's LoRA metadata: update_metadata of vLLM's punica wrapper and of ours, for decode steps.

    python benchmarks/step_metadata.py                       # 1 to 256 requests over 32 adapters
    python benchmarks/step_metadata.py --requests 256 --adapters 8 --slots 128

`changed`: other requests have other adapters in each step; `same`: those of the step before, for which vLLM skips the
call since its mapping is the same. Nothing waits for the GPU in between, as in a server. Needs a GPU and vLLM. Rows go
to benchmarks/results/<GPU>/step_metadata.csv.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from running import RESULTS, append_rows, git_commit, origin, positive, progress_bar, spread_table, spread_us

COLUMNS = ["requests", "adapters", "slots", "steps", "variant", "us", "us_p10", "us_p90"]
COLUMNS += ["host_version", "gpu", "torch", "triton", "commit", "date"]
MAX_TOKENS, VOCABULARY = 8192, 128256
STEPS, WARM_UP = 2000, 200
MAPPINGS = 64
"""That take turns where steps change."""


def wrappers(slots: int) -> dict:
    """Both wrappers as vLLM builds them, by variant."""
    from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

    import lora_ops

    config = SimpleNamespace(max_loras=slots, specialize_active_lora=False)

    def build():
        return get_punica_wrapper(MAX_TOKENS, 256, torch.device("cuda"), lora_config=config)

    with lora_ops.patch_vllm(strict=True):
        patched = build()
    return {"stock": build(), "patched": patched}


def step_us(wrapper, mappings: list, slot_to_adapter: list[int | None]) -> list[float]:
    """Microseconds of each call, over the mappings in turn."""
    samples = []
    for step in range(WARM_UP + STEPS):
        mapping = mappings[step % len(mappings)]
        start = time.perf_counter()
        wrapper.update_metadata(mapping, slot_to_adapter, len(slot_to_adapter) + 1, VOCABULARY)
        samples.append((time.perf_counter() - start) * 1e6)
        if step % 50 == 49:  # a server's steps take milliseconds: copies do not pile up
            torch.cuda.synchronize()
    return samples[WARM_UP:]


def table(rows: list[dict[str, str]]) -> Table:
    return spread_table("us of CPU time a step", ("requests", "adapters", "slots", "steps"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", nargs="+", type=positive(int), default=[1, 16, 64, 256], help="of a step, each one token")
    add("--adapters", type=positive(int), default=32, help="in use; default: 32")
    add("--slots", type=positive(int), help="default: as many as adapters")
    add("--out", type=Path, help="folder of the CSV; default: benchmarks/results/<GPU>")
    add("--commit", default=git_commit(), help="to write into the rows; default: git's")
    options = parser.parse_args(argv)
    slots = options.slots or options.adapters
    if slots < options.adapters:
        parser.error(f"{options.adapters} adapters do not fit into {slots} slots")
    if not torch.cuda.is_available():
        raise SystemExit("this measures the copy to a GPU, too, and torch sees none here")
    from vllm.lora.layers.utils import LoRAMapping

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    gpu = torch.cuda.get_device_name()
    path = (options.out or RESULTS / gpu.replace(" ", "_")) / "step_metadata.csv"
    slot_to_adapter = [*range(1, options.adapters + 1), *[None] * (slots - options.adapters)]
    generator = random.Random(0)
    rows: list[dict[str, str]] = []
    both = wrappers(slots)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=4 * len(options.requests))
        for requests in options.requests:
            drawn = [tuple(generator.choices(range(1, options.adapters + 1), k=requests)) for _ in range(MAPPINGS)]
            mappings = [LoRAMapping(ids, ids, is_prefill=False) for ids in drawn]
            for steps, chosen in (("changed", mappings), ("same", mappings[:1])):
                for variant, wrapper in both.items():
                    progress.update(task, description=f"{requests} requests, {steps}, {variant}")
                    us = spread_us(step_us(wrapper, chosen, slot_to_adapter))
                    case = {"requests": requests, "adapters": options.adapters, "slots": slots, "steps": steps}
                    where = {"host_version": version("vllm"), **origin(gpu, options.commit)}
                    rows.append(case | {"variant": variant} | us | where)
                    progress.advance(task)
    append_rows(path, COLUMNS, rows)
    console.print(table(rows))
    console.print(f"rows: {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
