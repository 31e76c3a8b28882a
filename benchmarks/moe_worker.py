"""A second process for a host whose packages do not go with the first one's: it measures on the same GPU, in turn.

    with Worker(site, log) as worker:
        loaded, missing = worker.load(["sglang"])
        worker.compile_ahead(cases, loaded, workers=8, seconds=60)
        measurement = worker.measure(case, "sglang", seed=0, sweep_seconds=4)

The process runs this file with the packages of the folder `site` before all others. Requests and answers are JSON, one
a line; whatever else it prints goes to the log. It makes the inputs itself, from the same seed: they are the same.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from baselines import Missing
from moe_measure import Measurement, case_from
from moe_shapes import Case

TAIL_LINES = 8


class WorkerError(RuntimeError):
    """The second process ended, or a request of it failed; the message has the end of its log."""


def search_path(site: Path, path: str) -> str:
    """PYTHONPATH of the second process: `site`, this folder, and what `path` has beside folders of engines."""
    kept = [entry for entry in path.split(os.pathsep) if entry and not Path(entry, "vllm").is_dir()]
    return os.pathsep.join([str(site), str(Path(__file__).resolve().parent), *kept])


class Worker:
    """The first process's end."""

    def __init__(self, site: Path, log: Path) -> None:
        if not Path(site, "sglang").is_dir():
            raise Missing(f"{site} holds no folder sglang")
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"PYTHONPATH": search_path(site, os.environ.get("PYTHONPATH", ""))}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, what: str, *arguments):
        """The answer to one request.

        Raises:
            WorkerError: the process has ended, or the request failed.
        """
        try:
            self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the second process ended with {self.process.wait()}: {self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; the log is {self.log}")
        return answer["result"]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def load(self, names: list[str]) -> tuple[list[str], dict[str, str]]:
        return tuple(self.ask("load", names))

    def compile_ahead(self, cases: list[Case], names: list[str], workers: int, seconds: float) -> None:
        self.ask("compile", [asdict(case) for case in cases], names, workers, seconds)

    def measure(self, case: Case, name: str, seed: int, sweep_seconds: float) -> Measurement:
        return Measurement(**self.ask("measure", asdict(case), name, seed, sweep_seconds))


def answer(request: list) -> object:
    """The second process's end."""
    import moe_measure

    what, *arguments = request
    if what == "load":
        return moe_measure.load_all(*arguments)
    if what == "compile":
        cases, names, workers, seconds = arguments
        deadline = time.monotonic() + seconds if math.isfinite(seconds) else math.inf
        return moe_measure.compile_ahead([case_from(c) for c in cases], names, workers, deadline, print)
    if what == "measure":
        case, *others = arguments
        return asdict(moe_measure.measure(case_from(case), *others))
    raise ValueError(f"unknown request {what!r}")


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a host prints must not stand between the answers
    for line in sys.stdin:
        try:
            reply = {"result": answer(json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
