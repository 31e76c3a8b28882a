"""What the tuners share: GPUs, a journal to go on from, and processes that compile and measure.

units -> one process a GPU, which compiles in a pool of further processes while it measures what is ready -> records
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import fcntl
import importlib
import json
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import store
from .files import MAX_SHARED_BYTES, gpu_folder, replacing

SOFTWARE = ("gpu", "triton", "torch", "kernels")
"""Metadata by which results of one run fit those of another."""
MAX_COMPILE_PROCESSES = 16
"""By default: each has a CUDA context on the GPU."""
END_S = 10.0
"""Seconds that the GPUs' processes get to end by themselves."""


def compile_processes() -> int:
    """How many processes compile by default: the CPUs that this process may use but two, within 1 and 16."""
    return min(max(len(os.sched_getaffinity(0)) - 2, 1), MAX_COMPILE_PROCESSES)


def add_compile_processes(parser: argparse.ArgumentParser) -> None:
    """The option of both tuners."""
    most = f"default: the CPUs but two, {MAX_COMPILE_PROCESSES} at most"
    parser.add_argument("--compile-processes", type=int, default=compile_processes(), help=most)


def same_software(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether entries of one run fit those of another, by metadata; GPUs that share a folder count as one."""
    names = [name for name in SOFTWARE if name != "gpu"]
    same_gpu = gpu_folder(old.get("gpu", "")) == gpu_folder(new["gpu"])
    return same_gpu and all(old.get(name) == new[name] for name in names)


def gpu_indices(text: str, count: int) -> list[int]:
    """Indices from "all" or "0,1".

    Raises:
        ValueError: no GPU, or one that is not there.
    """
    if count == 0:
        raise ValueError("no CUDA GPU is here: tuning needs one; --dry-run prints the plan without")
    if text == "all":
        return list(range(count))
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < count for part in parts):
        raise ValueError(f"--gpu {text!r}: give all, or some of {', '.join(map(str, range(count)))}")
    return sorted({int(part) for part in parts})


def main(
    args: argparse.Namespace,
    dry_run: Callable[[argparse.Namespace, Console], None],
    tune: Callable[[argparse.Namespace, list[int], Console], int],
) -> int:
    """What a tuner does with its arguments; returns the exit code. SIGTERM ends it as Ctrl-C does.

    dry_run: prints what would be measured; tune: measures on these GPUs, returns the exit code.
    """
    import torch

    console = Console()
    if args.dry_run:
        dry_run(args, console)
        return 0
    try:
        gpus = gpu_indices(args.gpu, torch.cuda.device_count())
    except ValueError as error:
        console.print(f"[red]{error}")
        return 2
    with _sigterm_raises():
        return tune(args, gpus, console)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def close(console: Console, folder: Path, paths: list[Path], started: float, done: int, cases: int) -> int:
    """Say where the files are and what is left to do; returns the exit code.

    folder: of the GPU; paths: the files written; started: on the clock of time.monotonic; done: of that many cases.
    """
    if not done:
        console.print("[red]the time limit left nothing measured twice: run the same command again to go on")
        return 1
    console.print(f"{len(paths)} files in {folder}; use them with {store.CONFIG_DIR}={folder.parent}", highlight=False)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", highlight=False)
    if done < cases:
        console.print(f"[yellow]{cases - done} of {cases} cases are left: run the same command again to go on")
    return 0


def gpu_name(gpus: list[int]) -> str:
    """The one name of these GPUs.

    Raises:
        ValueError: they differ.
    """
    import torch

    names = sorted({torch.cuda.get_device_name(gpu) for gpu in gpus})
    if len(names) > 1:
        raise ValueError(f"the GPUs differ: {', '.join(names)}: tune one kind at a time, with --gpu")
    return names[0]


def model_config(model: str, known: Iterable[str]) -> tuple[Path, dict]:
    """(path, content) of a model's config.json, given by its path or folder, with what text_config says in front.

    Args:
        known: names of models that need no file, for the message.

    Raises:
        ValueError: no such file, or no model's config.json.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--model {model!r} is neither a config.json, nor a folder with one, nor {', '.join(known)}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object: it is no model's config.json")
    text_config = config.get("text_config") or {}
    if not isinstance(text_config, dict):
        raise ValueError(f"{path}: text_config is {text_config!r}, expected an object")
    return path, config | text_config


def writable(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} is no folder for results: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} is no folder for results: it cannot be written")


def metadata(gpu: str, package: str) -> dict[str, str]:
    """What stands in every file that a package's tuner writes, but for the command."""
    import torch
    import triton

    return {
        "gpu": gpu,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "kernels": store.kernels_hash(package),
        "date": datetime.date.today().isoformat(),
    }


def sources_hash(package: str) -> str:
    """Hash of a package's Python sources and of this one's: what decides what is measured, and how."""
    return store.sources_hash(Path(importlib.import_module(package).__file__).parent, Path(__file__).parent)


def journal_settings(meta: Mapping[str, str], package: str) -> dict[str, str]:
    """What a package's records depend on, before the run's own settings: `metadata`, and the sources."""
    return {key: meta[key] for key in SOFTWARE} | {"sources": sources_hash(package)}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other tuner reads and replaces files of a folder; without effect where its file system has no locks.

    It waits for itself if it is entered twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((folder / ".lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Journal:
    """Records of a run, in a file that a later run goes on from; records of other software or settings are ignored."""

    def __init__(self, path: Path, settings: dict, resume: bool) -> None:
        self.path, self.settings = path, settings
        self.records: list[dict] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        if path.exists():
            text = path.read_text()
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the run was killed while it wrote
                    continue
                if record.pop("settings", None) == settings:
                    self.records.append(record)
            if text and not text.endswith("\n"):
                with path.open("a") as file:
                    file.write("\n")  # the next record gets a line of its own

    def add(self, record: dict) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps({"settings": self.settings, **record}) + "\n")


@dataclass(frozen=True)
class Steps:
    """What a tuner does with its units; functions of a module, for they run in other processes.

    jobs: (unit, settings, shared memory of a block in bytes) -> hashable arguments of `compile`, for each job.
    compile: (settings, index of the GPU, *job). What does not compile fails again, with its error, in `measure`.
    measure: (unit, settings, torch.device, shared memory of a block) -> records, one for each of unit.cases.

    Settings have compile_processes, and deadline on the clock of time.monotonic, which is that of the whole machine.
    """

    jobs: Callable[[Any, Any, int], Iterable[tuple]]
    compile: Callable[..., None]
    measure: Callable[..., Iterator[dict]]


def write_table(path: Path, columns: Sequence[str], key: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write rows as CSV; a row of a file with these columns stays unless a new one has the same values of `key`."""
    places = [columns.index(name) for name in key]

    def by_key(rows: Iterable[Sequence]) -> dict[tuple, list[str]]:
        rows = [[str(value) for value in row] for row in rows]
        return {tuple(row[place] for place in places): row for row in rows}

    found = by_key(rows)
    with locked(path.parent):
        with contextlib.suppress(OSError), path.open(newline="") as file:
            header, *old = [*csv.reader(file)] or [[]]
            if header == list(columns):
                found = by_key(row for row in old if len(row) == len(columns)) | found
        with replacing(path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *found.values()])


def most_shared(device: int) -> int:
    """Shared memory that a program of a GPU can have, bytes."""
    import torch

    return min(torch.cuda.get_device_properties(device).shared_memory_per_block_optin, MAX_SHARED_BYTES)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, killed or not."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def compile_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile; what they have not begun is given up at the end, and all if this process is killed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, function: Callable, *args: Any) -> Future:
    """pool.submit; a future that failed with BrokenProcessPool if a process of the pool has died."""
    try:
        return pool.submit(function, *args)
    except BrokenProcessPool as error:
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def _wait(futures: list[Future]) -> None:
    for future in futures:
        try:
            future.result()
        except BrokenProcessPool:  # a process died, of memory mostly: this one compiles for itself
            return


def work(steps: Steps, device: int, units: list, settings: Any, results, stop) -> None:
    """Body of a GPU's process, which ends when the tuner's main process does.

    Args:
        results: queue that gets ("record", dict) for each case, ("error", text) at most once, and ("done", device).
        stop: event after which no further case is begun.
    """
    _end_with_parent()
    try:
        _work(steps, device, units, settings, results, stop)
    except BaseException:
        results.put(("error", traceback.format_exc()))
    results.put(("done", device))


def _work(steps: Steps, device: int, units: list, settings: Any, results, stop) -> None:
    import torch

    torch.cuda.set_device(device)
    shared = most_shared(device)
    with compile_pool(settings.compile_processes) as pool:
        submitted: dict[tuple, Future] = {}
        futures = []
        for unit in units:
            jobs = list(steps.jobs(unit, settings, shared))
            for job in jobs:
                if job not in submitted:
                    submitted[job] = submit(pool, steps.compile, settings, device, *job)
            futures.append([submitted[job] for job in jobs])
        for unit, compiled in zip(units, futures, strict=True):
            if time.monotonic() > settings.deadline:
                break
            _wait(compiled)
            for record in steps.measure(unit, settings, torch.device("cuda", device), shared):
                results.put(("record", record))
                if stop.is_set():
                    return


def _end(processes: list, stop) -> None:
    """End the GPUs' processes: each after the case that it is at, or by force after END_S seconds."""
    stop.set()
    deadline = time.monotonic() + END_S
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join()


def run_units(
    steps: Steps, units: list, gpus: list[int], settings: Any, journal: Journal, console: Console, title: str
) -> None:
    """Measure units, one process a GPU; each record goes to the journal as it comes. None is left when it raises.

    Raises:
        RuntimeError: a process failed; what was measured until then is in the journal.
    """
    context = multiprocessing.get_context("spawn")
    results, stop = context.Queue(), context.Event()
    shares = [units[i :: len(gpus)] for i in range(len(gpus))]
    processes = [
        context.Process(target=work, args=(steps, gpu, share, settings, results, stop))
        for gpu, share in zip(gpus, shares, strict=True)
        if share
    ]
    errors: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task(title, total=sum(unit.cases for unit in units))
            for process in processes:
                process.start()
            running = len(processes)
            while running:
                try:
                    kind, payload = results.get(timeout=5)
                except queue.Empty:
                    if all(process.exitcode is not None for process in processes):
                        errors.append("a GPU's process was killed: is its memory used by others?")
                        break
                    continue
                if kind == "record":
                    journal.add(payload)
                    progress.advance(task)
                elif kind == "error":
                    errors.append(payload)
                    stop.set()
                else:
                    running -= 1
    finally:
        _end([process for process in processes if process.pid], stop)
    if errors:
        raise RuntimeError(errors[0])
