"""What the serving benchmarks send: which adapters, at which load, and the host's own client that sends it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serving_server import HOST, VLLM, Server, tail

DISTRIBUTIONS = ("uniform", "zipf", "one", "none")


class ClientError(RuntimeError):
    """A client run failed; the message says how, and where its log is."""


@dataclass(frozen=True)
class Traffic:
    """Which adapters the requests use: `adapters` of rank `rank`; distribution "none" is requests without adapter.

    `adapters` and `rank` are 0 with "none". "one": all requests go to the last of them.
    """

    adapters: int = 0
    rank: int = 0
    distribution: str = "none"

    def __str__(self) -> str:
        return f"{self.distribution} {self.adapters} x rank {self.rank}" if self.adapters else "no adapter"

    def names(self) -> list[str]:
        return [adapter_name(i, self.rank) for i in range(self.adapters)]


@dataclass(frozen=True)
class Load:
    """How the requests come: `concurrency` at once at most, `request_rate` a second; inf is no limit. Tokens."""

    concurrency: float
    request_rate: float
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.request_rate:g} requests/s" if math.isinf(self.concurrency) else f"{self.concurrency:g} at once"

    def requests(self, rounds: int, seconds: float) -> int:
        """How many to send: `rounds` for each place, or what comes within `seconds`."""
        if math.isinf(self.concurrency):
            return max(8, round(self.request_rate * seconds))
        return max(8, round(self.concurrency) * rounds)


def adapter_name(number: int, rank: int) -> str:
    return f"adapter{number}_rank{rank}"


def assignment(traffic: Traffic, requests: int, seed: int = 0) -> list[str]:
    """The adapter of each request, the same for every variant; empty without adapters.

    uniform: each as often as the others, in random order; zipf: the k-th with a probability of 1 / k.

    Raises:
        ValueError: unknown distribution.
    """
    rng, n = np.random.default_rng(seed), traffic.adapters
    if traffic.distribution == "none":
        return []
    if traffic.distribution == "uniform":
        picks = rng.permutation(np.arange(requests) % n)
    elif traffic.distribution == "zipf":
        weights = 1 / np.arange(1, n + 1)
        picks = rng.choice(n, size=requests, p=weights / weights.sum())
    elif traffic.distribution == "one":
        picks = np.full(requests, n - 1)
    else:
        raise ValueError(f"unknown distribution {traffic.distribution!r}: use one of {', '.join(DISTRIBUTIONS)}")
    return [adapter_name(int(i), traffic.rank) for i in picks]


def client_command(model: Path, port: int, traffic: Traffic, load: Load, requests: int, result: Path) -> list[str]:
    command = [sys.executable, *VLLM, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"]
    command += ["--host", HOST, "--port", str(port), "--model", str(model), "--tokenizer", str(model)]
    command += ["--dataset-name", "random", "--random-input-len", str(load.input_len)]
    command += ["--random-output-len", str(load.output_len), "--ignore-eos", "--temperature", "0", "--seed", "0"]
    command += ["--num-prompts", str(requests), "--request-rate", str(load.request_rate), "--disable-tqdm"]
    if not math.isinf(load.concurrency):
        command += ["--max-concurrency", str(round(load.concurrency))]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    if names := assignment(traffic, requests):
        # One name for each request: round robin over them gives every variant the same requests.
        command += ["--lora-assignment", "round-robin", "--lora-modules", *names]
    return command


def measured(result: dict, requests: int, output_len: int) -> dict[str, float]:
    """The columns of a result of either client: tokens a second, medians and 99th percentiles in ms.

    input_tok_s is the prefill's where one token is generated for each request.

    Raises:
        ClientError: requests failed, or answers are shorter than asked for.
    """
    if result["completed"] != requests:
        raise ClientError(f"{requests - result['completed']} of {requests} requests failed")
    if result["total_output_tokens"] != requests * output_len:
        raise ClientError(f"{result['total_output_tokens']} tokens came for {requests} requests of {output_len}")
    columns = {"output_tok_s": result["output_throughput"], "duration_s": result["duration"]}
    columns["input_tok_s"] = result["total_input_tokens"] / result["duration"]
    for metric in ("ttft", "tpot", "itl"):
        columns |= {f"{metric}_ms": result[f"median_{metric}_ms"], f"{metric}_p99_ms": result[f"p99_{metric}_ms"]}
    return columns


def run_client(
    server: Server,
    model: Path,
    traffic: Traffic,
    load: Load,
    requests: int,
    env: dict[str, str],
    timeout: float,
    name: str = "vllm bench serve",
    command_of=client_command,
) -> dict[str, float]:
    """Run a client once, vLLM's unless told otherwise; returns the columns of `measured`.

    Args:
        name: of the client, for messages.
        command_of: makes its command, with the arguments of `client_command`.

    Raises:
        ClientError: it failed, or requests did. It may take `timeout` s. ServerError: the server ended.
    """
    log = server.log.with_suffix(".client.log")
    result = server.log.with_suffix(".client.json")
    result.unlink(missing_ok=True)
    command = command_of(model, server.port, traffic, load, requests, result)
    what = f"`{name}`, {traffic}, {load}, against the {server.setting} server"
    with log.open("w") as out:
        try:
            done = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise ClientError(
                f"{what} took more than {timeout:.0f} s; the last lines of {log}:\n{tail(log)}"
            ) from error
    server.alive()
    if done.returncode or not result.exists():
        raise ClientError(f"{what} ended with {done.returncode}; the last lines of {log}:\n{tail(log)}")
    try:
        return measured(json.loads(result.read_text()), requests, load.output_len)
    except ClientError as error:
        raise ClientError(f"{what}: {error}; the last lines of {log}:\n{tail(log)}") from error
