#!/usr/bin/env python3
"""Check and time the LoRA ops of a layer (shrink and expand) beside vLLM's and SGLang's kernels, torch, and the floor.

    python benchmarks/ops_speed.py                       # the whole grid
    python benchmarks/ops_speed.py --quick               # a dozen cases
    python benchmarks/ops_speed.py --module qkv --rank 16 --tokens 64 --impl ours vllm_tuned
    python benchmarks/ops_speed.py --report              # the table and the plots again, from the CSV
    python benchmarks/ops_speed.py --moe --help          # the MoE layers instead: see moe_speed.py

Every implementation runs on the same random inputs and is compared with the fp32 reference; a speed is only taken,
printed and stored after its check is green. Times are those of CUDA graphs that rotate over enough weights to find them
outside the L2 cache (cold), or use the same ones again (hot). Rows go to benchmarks/results/<GPU>/ops_lora.csv as they
come.

Without a GPU it checks small shapes and takes no times: in plain torch, or with TRITON_INTERPRET=1 the Triton kernels
themselves.
Exit status: 0 if every check passed, 1 if not.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from baselines import IMPLS, Missing, interpreted
from problem import DTYPES, Problem, make_problem, max_rel_error, reference, tolerance
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from running import (
    RESULTS,
    SEED,
    add_pace,
    append_rows,
    between,
    git_commit,
    make_results,
    origin,
    positive,
    progress_bar,
    read_rows,
    run_ahead,
    unusable_configs,
)
from shapes import DISTRIBUTIONS, GRID, MODELS, QUICK_GRID, TINY_GRID, Case, floor_us
from timing import COLD_BYTES, H200_CEILINGS, Timing, capture, graph_time, measured_ceilings

from lora_ops.config import MAX_RANK

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GPU = torch.cuda.get_device_name() if ON_GPU else ""
CACHES = ("cold", "hot")
CASE_COLUMNS = ["model", "module", "rank", "tokens", "adapters", "distribution", "dtype"]
COLUMNS = [
    *("module", "slices", "k", "n", "rank", "tokens", "adapters", "distribution", "dtype", "cache", "impl", "config"),
    *("us", "us_min", "us_max", "floor_us", "max_rel_err", "gpu", "torch", "triton", "host_version", "commit", "date"),
    *("model", "tolerance"),
]


@dataclass(frozen=True)
class Result:
    """One implementation on one case. `timings` is empty unless the check is green and there is a GPU."""

    case: Case
    impl: str
    version: str
    error: float
    config: dict | None
    timings: dict[str, Timing]
    floor_us: float
    failure: str = ""

    @property
    def green(self) -> bool:
        return self.error <= tolerance(self.case.dtype)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--moe", action="store_true", help="routed-experts layers, with options of their own: --moe --help")
    add("--quick", action="store_true", help="rank 16 and (tokens, adapters) (1, 1), (64, 32), (8192, 8) only")
    add("--model", choices=MODELS, help="default: llama3-8b on a GPU, tiny without")
    add("--module", nargs="+", choices=("qkv", "o", "gate_up", "down"), metavar="NAME", help="qkv, o, gate_up, down")
    add("--rank", nargs="+", type=between(int, 1, MAX_RANK), help="default: 16 64")
    add(
        "--tokens", nargs="+", type=positive(int), help="these token counts of the grid; with --adapters: their product"
    )
    add(
        "--adapters",
        nargs="+",
        type=positive(int),
        help="these adapter counts of the grid; with --tokens: their product",
    )
    add("--impl", nargs="+", choices=IMPLS, default=list(IMPLS), metavar="NAME", help=", ".join(IMPLS))
    add("--dtype", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, fp16 without")
    add("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    add("--distribution", nargs="+", choices=DISTRIBUTIONS, default=["uniform"], help="of requests over adapters")
    add("--none-fraction", type=float, default=0.0, help="share of requests without an adapter (rows of -1)")
    add("--seed", type=SEED, default=0)
    add("--sweep-seconds", type=positive(float), default=8.0, help="most time for one sweep of a host's configs")
    add_pace(parser)
    add(
        "--out",
        type=Path,
        help="folder of the CSV and the plots; default: benchmarks/results/<GPU>, none without a GPU",
    )
    add("--commit", help="commit to write into the rows; default: git's")
    add("--report", action="store_true", help="only print the table and draw the plots, from the CSV")
    options = parser.parse_args(argv)
    if not 0 <= options.none_fraction <= 1:
        parser.error(f"--none-fraction is a share from 0 to 1, got {options.none_fraction}")
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    tokens, adapters = options.tokens, options.adapters
    if tokens and adapters:
        grid = [(t, a) for t in tokens for a in adapters]
    else:
        grid = TINY_GRID if not ON_GPU else QUICK_GRID if options.quick else GRID
        grid = [(t, a) for t, a in grid if t in (tokens or [t]) and a in (adapters or [a])]
    return [
        Case(model, module, rank, tokens, adapters, dtype, distribution, options.none_fraction)
        for model in [options.model or ("llama3-8b" if ON_GPU else "tiny")]
        for dtype in options.dtype or ["bf16" if ON_GPU else "fp16"]
        for distribution in options.distribution
        for module in MODELS[model]
        if module.name in (options.module or [module.name])
        for rank in options.rank or ([16] if options.quick else [16, 64])
        for tokens, adapters in grid
    ]


@functools.cache
def load(name: str):
    return IMPLS[name]()


def load_all(names: Iterable[str]) -> tuple[list, dict[str, str]]:
    """The implementations that can run here, and why the others cannot."""
    loaded, missing = [], {}
    for name in names:
        try:
            impl = load(name)
            if impl.swept and not ON_GPU:
                raise Missing("a sweep needs a GPU")
            loaded.append(impl)
        except Missing as reason:
            missing[name] = str(reason)
    return loaded, missing


# Compiling ahead: each worker process runs its share once, and leaves the binaries in Triton's cache on disk.


def compile_jobs(cases: list[Case], impls: list) -> list[tuple[str, Case, list]]:
    """(implementation, case, configs) to run once each, so that every kernel of the cases is compiled.

    Triton specialises on sizes of 1 and multiples of 16, so that other token counts of the same config share a binary.
    """
    jobs, seen = [], set()
    for case in cases:
        for impl in impls:
            fresh = []
            for config in impl.candidates(case):
                size = 1 if case.tokens == 1 else case.tokens % 16 == 0
                key = (impl.name, case.module, case.rank, case.dtype, size, json.dumps(config))
                if key not in seen:
                    seen.add(key)
                    fresh.append(config)
            small = replace(case, adapters=min(case.adapters, 2))
            jobs += [(impl.name, small, fresh[i : i + 6]) for i in range(0, len(fresh), 6)]
    return jobs


def compile_job(name: str, case: Case, configs: list) -> None:
    impl = load(name)
    problem = make_problem(case, DEVICE, cold_bytes=0, seed=0)
    for config in configs:
        with unusable_configs():
            impl.bind(problem, config)(0)
    if ON_GPU:
        torch.cuda.synchronize()


def compile_ahead(cases: list[Case], impls: list, workers: int, deadline: float, say: Callable[[str], None]) -> None:
    jobs = compile_jobs(cases, [impl for impl in impls if impl.name != "torch"])
    run_ahead(compile_job, jobs, workers, deadline, say)


def check(run: Callable[[int], None], problem: Problem, expected: torch.Tensor) -> float:
    """Error of one call; on a GPU of its replay from a CUDA graph, which is what gets timed."""
    for i in range(problem.copies):
        problem.reset()
        run(i)
    if problem.device.type == "cuda":
        graph = capture(run, copies=1)
        problem.reset()
        graph.replay()
    return max_rel_error(problem.y, expected, problem)


def sweep(impl, problem: Problem, seconds: float) -> dict:
    """The fastest config on cold weights; what is not tried when the time is over does not count."""
    end = time.monotonic() + seconds
    tried = 0

    def measure(run: Callable[[int], None]) -> float:
        nonlocal tried
        if time.monotonic() > end:
            return math.inf
        tried += 1
        us = math.inf
        with unusable_configs():
            run(0)
            us = graph_time(run, problem.copies, replays=3, graph_us=0).us_min
        return us

    return impl.tune(problem, measure) | {"tried": tried}


def run_case(case: Case, impls: list, options: argparse.Namespace, ceilings: tuple[float, float]) -> Iterable[Result]:
    problem = make_problem(case, DEVICE, COLD_BYTES if ON_GPU else 0, options.seed)
    expected = reference(problem)
    floor = floor_us(case, problem.slots.numpy(), *ceilings)
    for impl in impls:
        config, timings, error, failure = impl.candidates(case)[0], {}, math.nan, ""
        try:
            if impl.swept:
                config = sweep(impl, problem, options.sweep_seconds)
            run = impl.bind(problem, config)
            error = check(run, problem, expected)
            if ON_GPU and error <= tolerance(case.dtype):
                for cache in options.cache:
                    copies = problem.copies if cache == "cold" else 1
                    timings[cache] = graph_time(run, copies, problem.reset)
        except Exception as exception:
            if impl.name == "ours" or "CUDA error" in str(exception):
                raise
            error, timings, failure = math.nan, {}, f"{type(exception).__name__}: {exception}"
        yield Result(case, impl.name, impl.version, error, config, timings, floor, failure)


def case_columns(case: Case, impl: str) -> dict[str, str]:
    columns = {
        "model": case.model,
        "module": case.module.name,
        "slices": "+".join(map(str, case.module.slices)),
        "k": case.module.k,
        "n": case.module.n,
        "rank": case.rank,
        "tokens": case.tokens,
        "adapters": case.adapters,
        "distribution": case.distribution_label,
        "dtype": case.dtype,
        "impl": impl,
    }
    return {name: str(value) for name, value in columns.items()}


def rows_of(result: Result, caches: list[str], commit: str) -> list[dict[str, str]]:
    """The CSV rows of a result, one for each cache state; times stand empty where none was taken."""
    shared = case_columns(result.case, result.impl) | {
        "config": json.dumps(result.config, sort_keys=True) if result.config else "",
        "floor_us": f"{result.floor_us:.3f}",
        "max_rel_err": f"{result.error:.3g}",
        "tolerance": f"{tolerance(result.case.dtype):.3g}",
        "host_version": result.version,
        **origin(GPU, commit),
    }
    rows = []
    for cache in caches:
        timing = result.timings.get(cache) if result.green else None
        times = {name: f"{getattr(timing, name):.3f}" if timing else "" for name in ("us", "us_min", "us_max")}
        rows.append(shared | {"cache": cache} | times)
    return rows


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """What a row is about: a later row with the same key replaces an earlier one in tables and plots."""
    return tuple(row[column] for column in (*CASE_COLUMNS, "impl", "cache"))


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    error = float(row["max_rel_err"])
    if not error <= float(row["tolerance"]):
        return "[red]failed[/]" if math.isnan(error) else f"[red]wrong: {error:.2g}[/]"
    return f"{float(row['us']):.1f}" if row["us"] else f"[green]ok[/] {error:.1e}"


def results_table(rows: list[dict[str, str]]) -> Table:
    """A line for each case and cache state; `lead` is the time of the fastest other implementation over ours."""
    timed = any(row["us"] for row in rows)
    names = [name for name in IMPLS if any(row["impl"] == name for row in rows)]
    title = "LoRA shrink + expand: " + ("us a call, each beside a green check" if timed else "checks only, no timing")
    table = Table(title=title, title_justify="left")
    settings = ["module", "rank", "tokens", "adapters", "distribution", "dtype", *(["cache"] if timed else [])]
    for column in settings:
        table.add_column(column)
    for column in (*names, *(("floor", "ours / floor", "lead", "ours spread", "ours error") if timed else ())):
        table.add_column(column, justify="right")
    lines: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[column] for column in (*CASE_COLUMNS, "cache")), {})[row["impl"]] = row
    section = None
    for by_impl in lines.values():
        first = next(iter(by_impl.values()))
        if section not in (None, (first["module"], first["rank"])):
            table.add_section()
        section = (first["module"], first["rank"])
        line = [first[column] for column in settings]
        line += [cell(by_impl.get(name)) for name in names]
        ours = by_impl.get("ours")
        if ours and ours["us"]:
            us, floor = float(ours["us"]), float(ours["floor_us"])
            others = [float(row["us"]) for row in by_impl.values() if row is not ours and row["us"]]
            lead = min(others) / us if others else math.nan
            line += [f"{floor:.1f}", f"{us / floor:.1f}" if floor else "-"]
            line += [f"[{'green' if lead >= 1 else 'red'}]{lead:.2f}[/]" if others else "-"]
            line += [f"{float(ours['us_min']):.1f}-{float(ours['us_max']):.1f}", f"{float(ours['max_rel_err']):.1e}"]
        table.add_row(*line)
    return table


def measure_all(
    cases: list[Case],
    impls: list,
    options: argparse.Namespace,
    ceilings: tuple[float, float],
    path: Path | None,
    console: Console,
    deadline: float,
) -> tuple[list[dict[str, str]], int]:
    """Rows of all cases, stored as they come, and how many checks were red."""
    commit = options.commit or git_commit()
    stored = read_rows(path, COLUMNS) if path and path.exists() else []
    done = {key_of(row) for row in stored if row["commit"] == commit and row["us"]}
    all_rows, red = [], 0
    start = time.monotonic()

    def wanted(case: Case, impl) -> bool:
        keys = (key_of(case_columns(case, impl.name) | {"cache": cache}) for cache in options.cache)
        return not (options.resume and done.issuperset(keys))

    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            if time.monotonic() > deadline:
                console.print(f"[yellow]time limit: {number - 1} of {len(cases)} cases done[/]")
                break
            progress.update(task, description=str(case))
            line = ""
            for result in run_case(case, [impl for impl in impls if wanted(case, impl)], options, ceilings):
                rows = rows_of(result, options.cache, commit)
                all_rows += rows
                if path:
                    append_rows(path, COLUMNS, rows)
                line += f"  {result.impl} {cell(rows[0])}"
                if not result.green:
                    red += 1
                    console.print(
                        f"[red]{case} {result.impl}:[/] {escape(result.failure) or f'wrong by {result.error:.3g}'}"
                    )
            if ON_GPU:
                torch.cuda.empty_cache()
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{number}/{len(cases)} {time.monotonic() - start:.0f} s  {case} {line}")
    return all_rows, red


def report(rows: list[dict[str, str]], folder: Path | None, console: Console) -> None:
    """The table, and with a folder of timed rows the plots."""
    console.print(results_table(rows))
    if folder is None or not any(row["us"] for row in rows):
        return
    try:
        from plots import draw
    except ImportError as error:
        console.print(f"[yellow]no plots:[/] {error}")
        return
    for plot in draw(folder):
        console.print(plot)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--moe" in argv:
        import moe_speed

        return moe_speed.main([word for word in argv if word != "--moe"])
    options = parse(argv)
    start = time.monotonic()
    deadline = start + options.time_limit
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty(), highlight=False)
    out = options.out
    if out is None and ON_GPU:
        out = RESULTS / GPU.replace(" ", "_")
    path = out / "ops_lora.csv" if out else None
    if options.report:
        if path is None:
            raise SystemExit("--report needs --out, the folder of the CSV, where there is no GPU")
        report(list({key_of(row): row for row in read_rows(path, COLUMNS)}.values()), out, console)
        return 0

    if out:
        make_results(out)
    cases = choose_cases(options)
    if not cases:
        raise SystemExit("no case of the grid has these --tokens and --adapters: give both, for their product")
    impls, missing = load_all(options.impl)
    for name, reason in missing.items():
        console.print(f"[yellow]{name} is missing:[/] {escape(reason)}")
    if not impls:
        raise SystemExit("none of --impl is there to be checked")
    for dtype in sorted({case.dtype for case in cases}):
        console.print(f"check, {dtype}: each row's error against fp32 <= {tolerance(dtype):.2g} of the row's norm")
    ceilings = H200_CEILINGS
    torch.set_float32_matmul_precision("highest")
    if ON_GPU:
        compile_ahead(cases, impls, options.workers, deadline, console.print)
        measured = measured_ceilings()
        console.print(f"{GPU}: copy {measured[0] / 1e12:.2f} TB/s, bf16 product {measured[1] / 1e12:.0f} TFLOP/s")
        ceilings = H200_CEILINGS if "H200" in GPU else measured
    else:
        options.cache = [""]
        how = "the Triton interpreter" if interpreted() else "plain torch (TRITON_INTERPRET=1 runs the Triton kernels)"
        console.print(f"No GPU: checks only, in {how}. Nothing is timed.")

    rows, red = measure_all(cases, impls, options, ceilings, path, console, deadline)
    report(rows, out, console)
    checks = len(rows) // len(options.cache)
    console.print(f"{checks - red} checks passed, {red} failed, {time.monotonic() - start:.0f} s")
    if path:
        console.print(f"rows: {path}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
