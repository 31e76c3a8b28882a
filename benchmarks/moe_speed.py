"""Check and time whole MoE layers beside vLLM's and SGLang's fused MoE, triton_kernels, DeepGEMM, and the floor.

    python benchmarks/ops_speed.py --moe --sglang-site FOLDER    # the whole grid; FOLDER holds SGLang's packages
    python benchmarks/ops_speed.py --moe --quick                 # three token counts a layer, no sweeps
    python benchmarks/ops_speed.py --moe --model qwen3-30b-a3b --tokens 1 4096 --impl ours vllm sglang
    python benchmarks/ops_speed.py --moe --report                # the tables and the plots again, from the CSV

A call is all of the layer: routing plan, both products with their activation, the sum. vLLM and SGLang want different
versions of shared packages: this process runs with vLLM's, a second one on the same GPU with SGLang's, and they take
turns case by case. Every implementation runs on the same random inputs and is compared with the fp32 reference on up to
32 tokens; a speed is only taken, printed and stored after its check is green. Times are those of CUDA graphs that
rotate over sets of tokens and experts, so that weights come from outside the L2 cache. `vllm` and `sglang` run the
config that the host chooses, from its tuned file for this GPU where it has one; `_tuned` ones, where it has none, the
best of a sweep. Files of our own tuner for them count as theirs: name them with VLLM_TUNED_CONFIG_FOLDER and
SGLANG_MOE_CONFIG_DIR. Rows go to benchmarks/results/<GPU>/ops_moe.csv as they come.

Without a GPU it checks tiny layers and takes no times: in plain torch, or with TRITON_INTERPRET=1 the Triton kernels
themselves.
Exit status: 0 if every check passed, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import moe_measure
import moe_report
import torch
from baselines import Missing, interpreted
from moe_baselines import IMPLS
from moe_measure import Measurement
from moe_problem import DTYPES, tolerance
from moe_report import COLUMNS
from moe_shapes import GRID, LAYERS, QUICK_TOKENS, ROUTINGS, TINY_TOKENS, TOKENS, Case, floor_us
from moe_worker import Worker, WorkerError
from rich.console import Console
from rich.markup import escape
from running import RESULTS, SEED, add_pace, append_rows, git_commit, origin, positive, progress_bar, read_rows
from timing import H200_CEILINGS, measured_ceilings

ON_GPU = torch.cuda.is_available()
GPU = torch.cuda.get_device_name() if ON_GPU else ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ops_speed.py --moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"tokens {QUICK_TOKENS}, uniform routing, bf16, nothing swept")
    add("--model", nargs="+", choices=LAYERS, metavar="NAME", help=", ".join(LAYERS))
    add("--tokens", nargs="+", type=positive(int), help="default: powers of two from 1 to 16384")
    add("--routing", nargs="+", choices=ROUTINGS, help="default: both; of tokens over experts")
    add("--dtype", nargs="+", choices=DTYPES, help="fp8: block fp8 weights. Default: bf16, and fp8 for DeepSeek-V3")
    add("--impl", nargs="+", choices=IMPLS, metavar="NAME", help=", ".join(IMPLS))
    add("--seed", type=SEED, default=0)
    add(
        "--sglang-site",
        type=Path,
        default=os.environ.get("OPS_SPEED_SGLANG_SITE"),
        help="folder with SGLang's packages, for a second process; default: OPS_SPEED_SGLANG_SITE, else none",
    )
    add("--sweep-seconds", type=positive(float), default=6.0, help="most time for one sweep of a host's configs")
    add_pace(parser)
    add("--out", type=Path, help="folder of the CSV and plots; default: benchmarks/results/<GPU>, none without a GPU")
    add("--commit", help="commit to write into the rows; default: git's")
    add("--report", action="store_true", help="only print the tables and draw the plots, from the CSV")
    options = parser.parse_args(argv)
    if options.impl is None:
        options.impl = [name for name, impl in IMPLS.items() if not (options.quick and impl.swept)]
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """Cases that share weights stand together."""
    grid = GRID if ON_GPU else (("tiny", "fp16"), ("tiny-swiglu", "fp16"))
    models = options.model or list(dict.fromkeys(model for model, _ in grid))
    usual = ["bf16" if ON_GPU else "fp16"]
    pairs = [
        (model, dtype)
        for model in models
        for dtype in options.dtype or [dtype for name, dtype in grid if name == model] or usual
        if options.model or (model, dtype) in grid
    ]
    if options.quick and not options.dtype:
        pairs = [(model, dtype) for model, dtype in pairs if dtype != "fp8"]
    tokens = options.tokens or (TINY_TOKENS if not ON_GPU else QUICK_TOKENS if options.quick else TOKENS)
    routings = options.routing or (ROUTINGS[:1] if options.quick else ROUTINGS)
    return [Case(LAYERS[m], t, routing, dtype) for m, dtype in pairs for routing in routings for t in tokens]


class Runner:
    """Whoever runs an implementation: this process, or the second one for SGLang's."""

    def __init__(self, options: argparse.Namespace, worker: Worker | None) -> None:
        self.options, self.worker = options, worker

    def remote(self, name: str) -> bool:
        return self.worker is not None and IMPLS[name].host == "sglang"

    def split(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Names of this process and of the second one."""
        names = list(names)
        return [n for n in names if not self.remote(n)], [n for n in names if self.remote(n)]

    def load(self, names: list[str]) -> tuple[list[str], dict[str, str]]:
        """Both processes import their hosts at the same time."""
        here, there = self.split(names)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(self.worker.load, there) if there else None
            loaded, missing = moe_measure.load_all(here)
            try:
                more, absent = second.result() if second else ([], {})
            except WorkerError as error:
                more, absent = [], dict.fromkeys(there, str(error))
        return [name for name in names if name in {*loaded, *more}], missing | absent

    def compile_ahead(self, cases: list[Case], names: list[str], deadline: float, say) -> None:
        here, there = self.split(names)
        workers = self.options.workers // 2 if here and there else self.options.workers
        with ThreadPoolExecutor(1) as pool:
            seconds = deadline - time.monotonic()
            second = pool.submit(self.worker.compile_ahead, cases, there, workers, seconds) if there else None
            moe_measure.compile_ahead(cases, here, workers, deadline, say)
            if second and (error := second.exception()):
                say(f"[yellow]SGLang's kernels were not compiled ahead:[/] {escape(str(error))}")

    def measure(self, case: Case, name: str) -> Measurement:
        arguments = (case, name, self.options.seed, self.options.sweep_seconds)
        if not self.remote(name):
            return moe_measure.measure(*arguments)
        try:
            return self.worker.measure(*arguments)
        except WorkerError as error:
            return Measurement(name, "", math.nan, failure=str(error))


def case_columns(case: Case, impl: str) -> dict[str, str]:
    layer = case.layer
    columns = {name: getattr(layer, name) for name in ("model", "experts", "top_k", "hidden", "intermediate")}
    columns |= {"tokens": case.tokens, "routing": case.routing, "dtype": case.dtype, "impl": impl}
    return {name: str(value) for name, value in columns.items()}


def row_of(case: Case, found: Measurement, touched: float, ceilings: tuple[float, float], commit: str) -> dict:
    """The CSV row of a measurement; times stand empty where none was taken."""
    times = dict.fromkeys(("us", "us_min", "us_max", "tflops"), "")
    if not math.isnan(found.us):
        times = {name: f"{getattr(found, name):.3f}" for name in ("us", "us_min", "us_max")}
        times["tflops"] = f"{case.flops / found.us / 1e6:.1f}"
    return case_columns(case, found.impl) | {
        "config": json.dumps(found.config, sort_keys=True) if found.config else "",
        **times,
        "floor_us": f"{floor_us(case, touched, *ceilings):.3f}",
        "max_rel_err": f"{found.error:.3g}",
        "host_version": found.version,
        **origin(GPU, commit),
        "tolerance": f"{tolerance(case.dtype):.3g}",
        "experts_touched": f"{touched:.1f}",
    }


def measure_all(
    cases: list[Case],
    names: list[str],
    runner: Runner,
    options: argparse.Namespace,
    ceilings: tuple[float, float],
    path: Path | None,
    console: Console,
    deadline: float,
) -> tuple[list[dict[str, str]], int]:
    """Rows of all cases, stored as they come, and how many checks were red."""
    commit = options.commit or git_commit()
    stored = read_rows(path, COLUMNS) if path and path.exists() else []
    done = {moe_report.key_of(row) for row in stored if row["commit"] == commit and row["us"]}
    rows, red, start = [], 0, time.monotonic()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            if time.monotonic() > deadline:
                console.print(f"[yellow]time limit: {number - 1} of {len(cases)} cases done[/]")
                break
            progress.update(task, description=str(case))
            wanted = [n for n in names if not options.resume or moe_report.key_of(case_columns(case, n)) not in done]
            touched = moe_measure.checked_problem(case, options.seed)[0].touched() if wanted else math.nan
            line = ""
            for name in wanted:
                found = runner.measure(case, name)
                if found.failure.startswith("not run"):
                    continue
                row = row_of(case, found, touched, ceilings, commit)
                rows.append(row)
                if path:
                    append_rows(path, COLUMNS, [row])
                line += f"  {name} {moe_report.cell(row)}"
                if not found.error <= tolerance(case.dtype):
                    red += 1
                    console.print(f"[red]{case} {name}:[/] {escape(found.failure) or f'wrong by {found.error:.3g}'}")
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{number}/{len(cases)} {time.monotonic() - start:.0f} s  {case} {line}")
    return rows, red


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    start = time.monotonic()
    deadline = start + options.time_limit
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty(), highlight=False)
    out = options.out or (RESULTS / GPU.replace(" ", "_") if ON_GPU else None)
    path = out / "ops_moe.csv" if out else None
    if options.report:
        if path is None:
            raise SystemExit("--report needs --out, the folder of the CSV, where there is no GPU")
        moe_report.show(read_rows(path, COLUMNS), out, console)
        return 0

    cases = choose_cases(options)
    if not cases:
        raise SystemExit("no layer of the grid has such a --dtype: name one with --model")
    with ExitStack() as stack:
        worker, missing = None, {}
        wanted = options.impl
        if options.sglang_site and any(IMPLS[name].host == "sglang" for name in wanted):
            log = Path(tempfile.gettempdir(), "ops_moe_sglang.log")
            try:
                worker = stack.enter_context(Worker(options.sglang_site, log))
            except Missing as reason:
                missing = {name: str(reason) for name in wanted if IMPLS[name].host == "sglang"}
        runner = Runner(options, worker)
        names, absent = runner.load([name for name in wanted if name not in missing])
        for name, reason in (missing | absent).items():
            console.print(f"[yellow]{name} is missing:[/] {escape(reason)}")
        if not names:
            raise SystemExit("none of --impl is there to be checked")
        for dtype in sorted({case.dtype for case in cases}):
            limit = tolerance(dtype)
            console.print(f"check, {dtype}: error of each checked row against fp32 <= {limit:.2g} of the row's norm")
        ceilings = H200_CEILINGS
        if ON_GPU:
            runner.compile_ahead(cases, names, deadline, console.print)
            measured = measured_ceilings()
            torch.cuda.empty_cache()
            console.print(f"{GPU}: copy {measured[0] / 1e12:.2f} TB/s, bf16 product {measured[1] / 1e12:.0f} TFLOP/s")
            ceilings = H200_CEILINGS if "H200" in GPU else measured
        else:
            how = "the Triton interpreter" if interpreted() else "plain torch (TRITON_INTERPRET=1: the Triton kernels)"
            console.print(f"No GPU: checks only, in {how}. Nothing is timed.")
        rows, red = measure_all(cases, names, runner, options, ceilings, path, console, deadline)

    moe_report.show(rows, out, console)
    console.print(f"{len(rows) - red} checks passed, {red} failed, {time.monotonic() - start:.0f} s")
    if path:
        console.print(f"rows: {path}")
    return 1 if red else 0
