#!/usr/bin/env python3
"""What the power limit leaves of a large MoE layer's speed: its kernels and cuBLAS, after a pause and without one.

    python benchmarks/power.py                                            # Qwen3-30B-A3B and Mixtral, 16384 tokens
    python benchmarks/power.py --model deepseek-v3-tp8 --tokens 2048 8192

For each layer two dense products of cuBLAS, with as many multiplications as the layer's two halves have, and the layer
itself, once its result agrees with the fp32 reference. `burst`: one call after a pause, the clock high; `sustained`:
back to back for more than a second, the clock as low as the power limit asks. The sustained speed of cuBLAS is what no
kernel for the same products gets far beyond, whatever the datasheet says. Rows go to
benchmarks/results/<GPU>/power.csv.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moe_measure import check, checked_problem, load
from moe_problem import tolerance
from moe_shapes import LAYERS, Case
from rich.console import Console
from rich.table import Table
from running import RESULTS, append_rows, git_commit, origin, positive, progress_bar, read_rows
from timing import capture, replay_us

COLUMNS = ["what", "rows", "k", "n", "burst_us", "burst_tflops", "sustained_us", "sustained_tflops", "mhz", "watts"]
COLUMNS += ["gpu", "torch", "triton", "commit", "date"]
PAUSE_S, BURSTS = 0.15, 5
LAUNCH_CYCLES = 400_000
"""That the GPU waits before a burst, while the burst is launched."""
SUSTAINED_US = 1.2e6
SAMPLE_MS = 50
SETTLE_S = 0.3
"""After which the clock has come down; samples before do not count."""


class Sampler:
    """Clock (MHz) and power (W) of the GPU, as nvidia-smi tells them meanwhile; nothing where there is none."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []
        command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
        command += ["-lms", str(SAMPLE_MS), "-i", f"GPU-{torch.cuda.get_device_properties().uuid}"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if (sample := parse(line)) is not None:
                self.samples.append((time.monotonic(), *sample))

    def mean(self, start: float, end: float) -> tuple[float, float] | None:
        """Mean clock and power between two times of the monotonic clock."""
        found = [sample[1:] for sample in self.samples if start <= sample[0] <= end]
        return tuple(map(statistics.mean, zip(*found, strict=True))) if found else None

    def close(self) -> None:
        if self._process:
            self._process.terminate()


def parse(line: str) -> tuple[float, float] | None:
    """(MHz, W) of a line of nvidia-smi; None of one that has no such numbers."""
    try:
        mhz, watts = map(float, line.split(","))
    except ValueError:
        return None
    return mhz, watts


def measure(run: Callable[[int], object], sampler: Sampler) -> dict[str, float | str]:
    """burst_us and sustained_us of run(0), and clock and power of the latter."""
    run(0)
    torch.cuda.synchronize()
    graph = capture(run, copies=1)
    replay_us(graph)
    bursts = []
    for _ in range(BURSTS):
        time.sleep(PAUSE_S)
        torch.cuda._sleep(LAUNCH_CYCLES)
        bursts.append(replay_us(graph))
    burst = statistics.median(bursts)

    calls = max(3, round(SUSTAINED_US / burst))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.monotonic()
    for _ in range(calls // 4):
        graph.replay()
    start.record()
    for _ in range(calls):
        graph.replay()
    end.record()
    end.synchronize()
    clock = sampler.mean(begin + SETTLE_S, time.monotonic())
    found = {"burst_us": burst, "sustained_us": start.elapsed_time(end) * 1e3 / calls}
    return found | dict(zip(("mhz", "watts"), clock or ("", ""), strict=True))


def dense(rows: int, k: int, n: int) -> Callable[[int], object]:
    """cuBLAS: [rows, k] @ [n, k].T in bf16, random numbers."""
    x, w = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (rows, n))
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    return lambda _: torch.mm(x, w.T, out=out)


def layer(case: Case) -> Callable[[int], object]:
    """Our layer, after its check.

    Raises:
        SystemExit: it is wrong.
    """
    problem, expected = checked_problem(case, 0)
    run = load("ours").bind(problem, None)
    error = check(run, problem, expected)
    if not error <= tolerance(case.dtype):
        raise SystemExit(f"{case}: wrong by {error:.3g} of a row's norm, no speed is shown")
    return run


def jobs(case: Case) -> list[tuple[str, tuple[int, int, int], int, Callable[[], Callable[[int], object]]]]:
    """(what, (rows, k, n), floating-point operations, what makes the call) for the rows of a layer."""
    sizes, choices = case.layer, case.tokens * case.layer.top_k
    up, down = (choices, sizes.hidden, 2 * sizes.intermediate), (choices, sizes.intermediate, sizes.hidden)
    return [
        ("cublas, as gate_up", up, 2 * up[0] * up[1] * up[2], lambda: dense(*up)),
        ("cublas, as down", down, 2 * down[0] * down[1] * down[2], lambda: dense(*down)),
        (f"layer {case}", (case.tokens, sizes.hidden, sizes.intermediate), case.flops, lambda: layer(case)),
    ]


def table(rows: list[dict[str, str]]) -> Table:
    result = Table("what", "rows", "k", "n", title="TFLOP/s after a pause and without one", title_justify="left")
    for name in ("burst", "sustained", "MHz", "W"):
        result.add_column(name, justify="right")
    for row in rows:
        numbers = (row["burst_tflops"], row["sustained_tflops"], row["mhz"], row["watts"])
        cells = [f"{float(number):.0f}" if number not in ("", None) else "-" for number in numbers]
        result.add_row(row["what"], *(str(row[name]) for name in ("rows", "k", "n")), *cells)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name in LAYERS if not name.startswith("tiny")]
    add = parser.add_argument
    add("--model", nargs="+", choices=models, default=["qwen3-30b-a3b", "mixtral-8x7b"], help=", ".join(models))
    add("--tokens", nargs="+", type=positive(int), default=[16384])
    add("--out", type=Path, help="folder of the CSV; default: benchmarks/results/<GPU>")
    add("--report", action="store_true", help="only the table, from --out")
    add("--commit", default=git_commit(), help="to write into the rows; default: git's")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if options.report:
        if options.out is None:
            parser.error("--report needs --out, the folder of the CSV")
        console.print(table(read_rows(options.out / "power.csv", COLUMNS)))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch sees none here")

    gpu = torch.cuda.get_device_name()
    path = (options.out or RESULTS / gpu.replace(" ", "_")) / "power.csv"
    cases = [Case(LAYERS[model], tokens) for model in options.model for tokens in options.tokens]
    rows: list[dict] = []
    sampler = Sampler()
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=3 * len(cases))
            for what, sizes, flops, make in (job for case in cases for job in jobs(case)):
                progress.update(task, description=what)
                found = measure(make(), sampler)
                row = dict(zip(COLUMNS, (what, *sizes), strict=False)) | origin(gpu, options.commit)
                for name in ("burst", "sustained"):
                    row[f"{name}_us"] = f"{found[f'{name}_us']:.1f}"
                    row[f"{name}_tflops"] = f"{flops / found[f'{name}_us'] / 1e6:.1f}"
                row |= {name: found[name] and f"{found[name]:.0f}" for name in ("mhz", "watts")}
                rows.append(row)
                append_rows(path, COLUMNS, [row])
                torch.cuda.empty_cache()
                progress.advance(task)
    finally:
        sampler.close()
    console.print(table(rows))
    console.print(f"rows: {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
