"""What the benchmarks share: arguments; of ops the CSV, the processes that compile ahead, the progress bar."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ops_configs import tuning

RESULTS = Path(__file__).resolve().parent / "results"


def positive(kind):
    """An argparse type: a number of this kind above 0."""
    return _number(kind, lambda value: "" if value > 0 else "not above 0")


def between(kind, least: float, most: float = math.inf):
    """An argparse type: a number of this kind from least to most."""

    def wrong(value) -> str:
        if value > most:
            return f"above {most}"
        return "" if value >= least else f"not {least} or more"

    return _number(kind, wrong)


def _number(kind, wrong: Callable[..., str]):
    """An argparse type: a number of this kind; `wrong` says what it is that it must not be, if so."""

    def read(text: str):
        value = kind(text)
        if problem := wrong(value):
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    read.__name__ = kind.__name__  # argparse names it for what is no number
    return read


SEED = between(int, 0, 2**32 - 1)
"""An argparse type: a seed that numpy and torch take."""


def add_pace(parser: argparse.ArgumentParser) -> None:
    """Arguments of a long list of measurements: --workers, --time-limit and --resume."""
    add = parser.add_argument
    cores = min(16, os.cpu_count() or 1)
    add("--workers", type=between(int, 0), default=cores, help="processes that compile ahead; 0: none")
    add(
        "--time-limit", type=between(float, 0), default=math.inf, metavar="SECONDS", help="stop cleanly after this long"
    )
    add("--resume", action="store_true", help="leave out what the CSV already holds for this commit")


def git_commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short=12", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def now() -> str:
    """The time of a measurement, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def origin(gpu: str, commit: str) -> dict[str, str]:
    """The columns that say where a row of an op was measured, and when."""
    import torch  # here, for scripts that only watch servers or engines
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": gpu, **versions, "commit": commit, "date": now()}


def make_results(folder: Path) -> None:
    """Make the folder of --out before anything is measured.

    Raises:
        SystemExit: nothing can be written there.
    """
    try:
        tuning.writable(folder)
    except ValueError as error:
        raise SystemExit(f"--out: {error}") from error


def require(packages: Iterable[str]) -> None:
    """Look for what a later process needs before anything is written for it.

    Raises:
        SystemExit: this Python lacks a package.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise SystemExit(
                f"{sys.executable} has no {name}: install it there, or use the Python of an environment that has it"
            )


def read_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise SystemExit(f"no measurement in {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise SystemExit(f"{path} has other columns than this version writes: move it away")
        return list(reader)


def append_rows(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def spread_us(samples: list[float]) -> dict[str, str]:
    """The columns us, us_p10 and us_p90: median and deciles of CPU times."""
    deciles = statistics.quantiles(samples, n=10)
    return {"us": f"{deciles[4]:.1f}", "us_p10": f"{deciles[0]:.1f}", "us_p90": f"{deciles[8]:.1f}"}


def spread_table(title: str, case: tuple[str, ...], rows: list[dict[str, str]]) -> Table:
    """Rows of `spread_us`, with the columns that name a case and its variant."""
    result = Table(*case, title=title, title_justify="left")
    for name in ("variant", "median", "10 % to 90 %"):
        result.add_column(name, justify="right")
    for row in rows:
        cells = [str(row[name]) for name in (*case, "variant")]
        result.add_row(*cells, row["us"], f"{row['us_p10']} to {row['us_p90']}")
    return result


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def unusable_configs() -> Iterator[None]:
    """Pass over a config that does not compile or needs more than the GPU has; errors of the GPU itself go on."""
    try:
        yield
    except Exception as error:
        if "CUDA error" in str(error):
            raise


def run_ahead(
    job: Callable, jobs: list[tuple], workers: int, deadline: float, say: Callable[[str], None], least: int = 4
) -> None:
    """job(*arguments) for each of `jobs` in processes of their own, whose binaries stay in Triton's cache on disk.

    Nothing is lost when one fails: what it was to compile is compiled later. Fewer than `least` take no process.
    """
    if not workers or len(jobs) < least:
        return
    start = time.monotonic()
    say(f"compiling ahead: {len(jobs)} jobs in {workers} processes")
    failures = []
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures = [pool.submit(job, *arguments) for arguments in jobs]
        for future in as_completed(futures, timeout=max(deadline - start, 1) if math.isfinite(deadline) else None):
            if error := future.exception():
                failures.append(f"{type(error).__name__}: {error}")
    except (TimeoutError, BrokenProcessPool) as error:
        failures.append(type(error).__name__)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    say(
        f"compiled in {time.monotonic() - start:.0f} s"
        + (f"; {len(failures)} failed: {escape(failures[0])}" if failures else "")
    )
