#!/usr/bin/env python3
"""A patched vLLM under mixed traffic while its adapters come, go and change: are the answers, memory and speed stable?

    python benchmarks/soak.py --minutes 5                              # 24 adapters in 4 slots
    python benchmarks/soak.py --minutes 1 --slots 24 --cpu-slots 32    # every adapter in every batch
    python benchmarks/soak.py --model tiny --minutes 0.5 --concurrency 16 --swaps 10    # on a CPU

Writes a random Llama (8B shapes, few layers) and more sets of adapter weights than there are adapters, starts a patched
engine with fewer slots than adapters, and then:

    alone     asks the probe of each set of weights and of the base model, one at a time, in an idle engine
    noise     asks base-model probes among as many base-model requests: what the batch alone changes (the yardstick)
    loaded    asks --concurrency probes at once, over all adapters
    warm-up   the traffic below, unjudged, for a tenth of the time; then the idle engine's memory is read, and its
              speed: tokens/s of the same --concurrency requests each time, over as many adapters as there are slots
    soak      mixed traffic for --minutes: random lengths and adapters, every ninth request without one, every
              twentieth aborted; --swaps times a second an adapter's weights are replaced: in place, under a new id, or,
              while its requests run, under a new name and removed beneath them; two probes a second among it all
    alone     again, after the traffic has drained, and the idle engine's memory and speed again

A probe is a fixed prompt whose continuation is forced, so that log-probs are compared along the same prefix: of the
prompt (prompt_logprobs) and of the forced tokens, before they are forced.

Faults, each printed, any of which makes the exit status 1:
    - log-probs of probes differ from those alone by more than three times the noise (root mean square over the probes
      of a window; errors along one request are correlated, and adapters add roundings of their own)
    - one probe differs by more than a third of the least distance between two sets of weights: wrong weights
    - an error or a fallback in our counters, a worker that is not patched, an exception, an unfinished request
    - memory grew from idle to idle: allocated on the GPU by more than 16 MiB; tensors alive by those of two adapters;
      or the worker's resident memory by more than 64 MiB, what its cache of adapters holds, and what the host loses by
      itself: safetensors keeps something of each tensor that it reads (see LOST_KIB)
    - after the warm-up a kernel was compiled, our table of compiled layers grew, or more than 16 files stayed open
    - the speed fell by more than --slack. (Windows differ: their tokens/s depend on which adapters hold the slots while
      others wait, and on how long replaced ones took to read. The table shows both.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import vllm_agreement
from running import SEED, between, git_commit, make_results, now, positive, require
from serving_server import LORA_RANKS, lora_rank

PROBE_PROMPT, PROBE_STEPS = 24, 12
PROBES_PER_S = 2.0
NOISE_PROBES = 12
SPEED_ROUNDS = 3
"""Of the same requests; the fastest counts, for adapters enter their slots in the first."""
LORA_FREE, ABORTED = 1 / 9, 1 / 20
QUIET = 2
"""Adapters that get probes but no traffic, so that they are replaced in place and under a new id."""

AGREES = vllm_agreement.AGREES
WRONG_WEIGHTS = 1 / 3
"""A probe further off than this part of the least distance between two sets of weights has the wrong ones."""
FP32_NOISE = 1e-5
"""Least yardstick: log-probs of about 10 in fp32, summed over a few hundred terms."""
ALLOCATED_MIB, RESIDENT_MIB, OPEN_FILES = 16, 64, 16
LOST_KIB = 0.3
"""Of resident memory for each tensor of an adapter that is loaded. Unpatched vLLM on a CPU (--variant stock): 57 MiB in
7105 loads of 28 tensors; tracemalloc finds the objects in safetensors' get_tensor."""


# What is asked, and what came back


@dataclass
class Adapter:
    """A name that clients use; `weights` is the set of weights behind it, `id` what vLLM knows it by."""

    name: str
    id: int
    weights: int


@dataclass
class Probe:
    """A request with a known answer. `weights` None: the base model."""

    weights: int | None
    logprobs: list[float] = field(default_factory=list)

    def rms(self, alone: list[float]) -> float:
        return float(np.sqrt(np.mean(np.square(np.subtract(self.logprobs, alone)))))


@dataclass
class Window:
    """What happened in a stretch of the soak, and where its time went.

    Tokens are prompt and generated tokens of finished requests.
    """

    seconds: float = 0.0
    tokens: int = 0
    finished: int = 0
    aborted: int = 0
    swaps: int = 0
    activations: int = 0
    steps: int = 0
    replacing_s: float = 0.0  # of seconds; adapters wait for the step in flight, are read, and are put into a slot
    activating_s: float = 0.0  # in the worker, which puts adapters into slots: these, and those that requests need
    errors: list[float] = field(default_factory=list)  # rms of each probe
    allocated_mib: float = 0.0
    reserved_mib: float = 0.0
    resident_mib: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.errors)))) if self.errors else 0.0


def look_inside(worker) -> dict:
    """Runs in the worker: memory in MiB, what is compiled, and how often an adapter was put into a slot."""
    import resource
    from pathlib import Path

    import torch

    manager = worker.model_runner.lora_manager._adapter_manager
    if not hasattr(manager, "activations"):
        manager.activations, manager.activating_s, activate = 0, 0.0, manager.activate_adapter

        def activate_adapter(*args, **kwargs):
            start = time.perf_counter()
            activated = activate(*args, **kwargs)
            manager.activating_s += time.perf_counter() - start
            manager.activations += bool(activated)
            return activated

        manager.activate_adapter = activate_adapter

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("lora_ops.")]
    gpu = torch.cuda.is_available()
    return {
        "resident_mib": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20,
        "allocated_mib": torch.cuda.memory_allocated() / 2**20 if gpu else 0.0,
        "reserved_mib": torch.cuda.memory_reserved() / 2**20 if gpu else 0.0,
        "compiled kernels": vllm_agreement.compiled_kernels(worker),
        "compiled layers": sum(len(getattr(module, "_compiled", ())) for module in ours),
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "activations": manager.activations,
        "activating_s": manager.activating_s,
    }


def at_rest(worker) -> dict:
    """Runs in an idle worker: look_inside, without what waits to be collected or given back to the system."""
    import contextlib
    import ctypes
    import gc

    import torch

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return look_inside(worker) | {"live tensors": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())}


class Engine:
    """A patched engine: requests go in one by one, adapters change while they run."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from synthetic import ATTENTION, MLP
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        self._sampling, self._lora_request = SamplingParams, LoRARequest
        self._final = RequestOutputKind.FINAL_ONLY
        self.options = options
        self.vocab = shape(options).vocab
        self.rng = random.Random(options.seed)
        model, self.folders = checkpoint(options)
        arguments = {
            "model": str(model),
            "dtype": dtype(options),
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": options.concurrency,
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,  # an answer from the cache would prove nothing
            "gpu_memory_utilization": options.memory,
            "enforce_eager": options.eager,
            "seed": 0,
            "enable_lora": True,
            "max_loras": options.slots,
            "max_cpu_loras": options.cpu_slots,
            "max_lora_rank": lora_rank(options.rank),
            "lora_target_modules": [*ATTENTION, *MLP],
        }
        if torch.cuda.is_available() and options.variant == "patched":
            # a kernel that compiles while it serves stops the engine: vLLM has its own for one log-prob a token
            arguments["jit_monitor_mode"] = "error"
        start = time.perf_counter()
        self.llm = LLM(**arguments)
        self.ready_s = time.perf_counter() - start
        self.core = self.llm.llm_engine
        self.adapters = [Adapter(f"adapter{i}", i + 1, i) for i in range(options.adapters)]
        self._ids = itertools.count(options.adapters + 1)
        self._requests = itertools.count()
        self.running: dict[str, tuple[str | None, Probe | None, int]] = {}  # adapter's name, probe, tokens
        self.in_flight: Counter[str | None] = Counter()

    def worker(self, ask=look_inside) -> dict:
        (inside,) = self.llm.collective_rpc(ask)
        return inside

    def lora_request(self, adapter: Adapter, **kwargs):
        return self._lora_request(adapter.name, adapter.id, str(self.folders[adapter.weights]), **kwargs)

    def add(self, adapter: Adapter | None, prompt: list[int], probe: Probe | None = None, **settings) -> str:
        """Send a request."""
        name = adapter.name if adapter else None
        params = self._sampling(temperature=0, ignore_eos=True, detokenize=False, output_kind=self._final, **settings)
        lora_request = self.lora_request(adapter) if adapter else None
        request = str(next(self._requests))
        self.core.add_request(request, {"prompt_token_ids": prompt}, params, lora_request=lora_request)
        self.running[request] = (name, probe, len(prompt) + params.max_tokens)
        self.in_flight[name] += 1
        return request

    def add_probe(self, adapter: Adapter | None, variant: int = 0) -> Probe:
        """Send a probe to an adapter, or to the base model; `variant` picks its prompt."""
        rng = random.Random(variant)
        prompt = [rng.randrange(2, self.vocab) for _ in range(PROBE_PROMPT)]
        forced = rng.randrange(2, self.vocab)
        probe = Probe(adapter.weights if adapter else None)
        sampling = {"max_tokens": PROBE_STEPS, "logprobs": 1, "prompt_logprobs": 1, "allowed_token_ids": [forced]}
        self.add(adapter, prompt, probe, **sampling)
        return probe

    def add_traffic(self, adapters: list[Adapter]) -> str:
        adapter = None if self.rng.random() < LORA_FREE or not adapters else self.rng.choice(adapters)
        tokens = self.options.longest_prompt ** self.rng.uniform(0.2, 1)  # short prompts as likely as long ones
        prompt = [self.rng.randrange(2, self.vocab) for _ in range(int(tokens))]
        return self.add(adapter, prompt, max_tokens=self.rng.randint(1, self.options.longest_answer))

    def abort(self, request: str) -> None:
        self.core.abort_request([request])
        self._forget(request)

    def _forget(self, request: str) -> tuple[str | None, Probe | None, int]:
        name, probe, tokens = self.running.pop(request)
        self.in_flight[name] -= 1
        return name, probe, tokens

    def step(self) -> Iterator[tuple[Probe | None, int]]:
        """One step of the engine: (probe or None, tokens) of each request that it finished.

        Raises:
            RuntimeError: a request ended early.
        """
        for output in self.core.step():
            if not output.finished or output.request_id not in self.running:  # the last words of an aborted one
                continue
            name, probe, expected = self._forget(output.request_id)
            answer = output.outputs[0]
            tokens = len(output.prompt_token_ids) + len(answer.token_ids)
            if tokens != expected or answer.finish_reason != "length":
                raise RuntimeError(
                    f"a request of {name or 'the base model'} ended with {tokens} of {expected} tokens: "
                    f"{answer.finish_reason}"
                )
            if probe:
                prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
                forced = zip(answer.token_ids, answer.logprobs, strict=True)
                probe.logprobs = [found[token].logprob for token, found in (*prompt, *forced)]
            yield probe, tokens

    def drain(self) -> None:
        while self.running:
            list(self.step())

    def alone(self) -> dict[int | None, list[float]]:
        """Answers of each set of weights and of the base model (None), one at a time; through fresh adapters."""
        from rich.progress import track

        answers = {}
        weights = [None, *range(len(self.folders))]
        for w in track(weights, "alone", console=console(), disable=not sys.stderr.isatty()):
            adapter = None if w is None else Adapter(f"alone{w}", next(self._ids), w)
            probe = self.add_probe(adapter)
            self.drain()
            answers[w] = probe.logprobs
            if adapter:
                self.core.remove_lora(adapter.id)
        return answers

    def loaded(self) -> list[Probe]:
        """As many probes at once as the engine takes, over all adapters and the base model."""
        targets = itertools.cycle([None, *self.adapters])
        probes = [self.add_probe(adapter) for adapter in itertools.islice(targets, self.options.concurrency)]
        self.drain()
        return probes

    def noise(self) -> float:
        """Root mean square by which base-model log-probs alone differ from those in a full batch of such requests."""

        def ask(full: bool) -> np.ndarray:
            probes = []
            for variant in range(NOISE_PROBES):
                probes.append(self.add_probe(None, variant))
                if not full:
                    self.drain()
            for _ in range(self.options.concurrency - NOISE_PROBES if full else 0):
                self.add_traffic([])
            self.drain()
            return np.array([probe.logprobs for probe in probes])

        return max(FP32_NOISE, float(np.sqrt(np.mean((ask(False) - ask(True)) ** 2))))

    def speed(self) -> float:
        """Tokens/s of requests that are the same at every call, over adapters that all fit into the slots."""
        best, rng = 0.0, self.rng
        for _ in range(SPEED_ROUNDS):
            self.rng = random.Random(self.options.seed)
            for _ in range(self.options.concurrency):
                self.add_traffic(self.adapters[: self.options.slots])
            start, tokens = time.perf_counter(), 0
            while self.running:
                tokens += sum(finished for _, finished in self.step())
            best = max(best, tokens / (time.perf_counter() - start))
        self.rng = rng
        return best

    def replace_weights(self) -> None:
        """Put unused weights behind a random adapter's name.

        Without requests in flight: in place, or under a new id. With: under a new name, and the old one is removed
        while its requests still run. (vLLM tells requests of one step apart by the adapter's name.)
        """
        used = {adapter.weights for adapter in self.adapters}
        weights = self.rng.choice([w for w in range(len(self.folders)) if w not in used])
        index = self.rng.randrange(len(self.adapters))
        old = self.adapters[index]
        if self.in_flight[old.name] == 0 and self.rng.random() < 0.5:
            new = replace(old, weights=weights)
            self.core.add_lora(self.lora_request(new, load_inplace=True))
        else:
            fresh = next(self._ids)
            name = old.name if self.in_flight[old.name] == 0 else f"{old.name.split('@')[0]}@{fresh}"
            new = Adapter(name, fresh, weights)
            self.core.remove_lora(old.id)
            self.core.add_lora(self.lora_request(new))
        self.adapters[index] = new

    def soak(self, seconds: float, window_s: float, alone: dict[int | None, list[float]], what: str) -> list[Window]:
        """Mixed traffic, probes and replaced weights for a while; then the traffic drains."""
        from rich.progress import Progress

        start = now = time.perf_counter()
        window_start, last_swap, last_probe = start, start, start
        windows, current = [], Window()
        before = self.worker()
        abortable: dict[str, float] = {}
        with Progress(console=console(), disable=not sys.stderr.isatty(), transient=True) as progress:
            task = progress.add_task(what, total=seconds)
            while now - start < seconds:
                while len(self.running) < self.options.concurrency:
                    request = self.add_traffic(self.adapters[:-QUIET])
                    if self.rng.random() < ABORTED:
                        abortable[request] = now + self.rng.expovariate(2.0)
                for probe, tokens in self.step():
                    current.tokens += tokens
                    current.finished += 1
                    if probe:
                        current.errors.append(probe.rms(alone[probe.weights]))
                current.steps += 1
                now = time.perf_counter()
                for request in [r for r, due in abortable.items() if due <= now]:
                    del abortable[request]
                    if request in self.running:
                        self.abort(request)
                        current.aborted += 1
                if now - last_swap >= 1 / self.options.swaps:
                    began = time.perf_counter()
                    self.replace_weights()
                    current.replacing_s += time.perf_counter() - began
                    current.swaps += 1
                    last_swap = max(last_swap + 1 / self.options.swaps, now - 1)  # make up for a second, no more
                if now - last_probe >= 1 / PROBES_PER_S:
                    self.add_probe(self.rng.choice([None, *self.adapters]))
                    last_probe = now
                if now - window_start >= window_s:
                    before = self._close(current, now - window_start, before)
                    windows.append(current)
                    current, window_start = Window(), time.perf_counter()
                    progress.update(task, completed=now - start)
            if now - window_start >= window_s / 2 or not windows:
                self._close(current, now - window_start, before)
                windows.append(current)
        self.drain()
        return windows

    def _close(self, window: Window, seconds: float, before: dict) -> dict:
        """Fill in what the worker knows of a window that began with `before`, and return what it says now."""
        inside = self.worker()
        window.seconds, window.activations = seconds, inside["activations"] - before["activations"]
        window.activating_s = inside["activating_s"] - before["activating_s"]
        for name in ("allocated_mib", "reserved_mib", "resident_mib"):
            setattr(window, name, inside[name])
        return inside


# Verdict


@dataclass(frozen=True)
class Check:
    """A line of the verdict: it holds where `found` is at most `limit`; NaN never does."""

    what: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.found <= self.limit


def apart(answers: dict[int | None, list[float]]) -> float:
    """Least root mean square between the probe's log-probs with two sets of weights, or with one and none."""
    pairs = itertools.combinations(answers.values(), 2)
    return min(float(np.sqrt(np.mean(np.subtract(a, b) ** 2))) for a, b in pairs)


def checks(report: dict, options: argparse.Namespace, adapter_mib: float) -> list[Check]:
    """What has to hold. `adapter_mib`: size of an adapter in memory."""
    from synthetic import ATTENTION, MLP

    alone, again = report["alone"], report["again"]
    pooled, single = AGREES * report["noise"], WRONG_WEIGHTS * apart(alone)
    loaded = [probe.rms(alone[probe.weights]) for probe in report["loaded"]]
    drift = [Probe(w, again[w]).rms(alone[w]) for w in alone]
    windows = report["windows"]
    soaked = [error for window in windows for error in window.errors]

    def rms(errors: list[float]) -> float:
        return float(np.sqrt(np.mean(np.square(errors)))) if errors else float("nan")

    before, after = report["idle"], report["idle_after"]
    tensors = 2 * len(ATTENTION + MLP) * shape(options).layers  # of an adapter
    loads = after["activations"] - before["activations"]
    resident = RESIDENT_MIB + options.cpu_slots * adapter_mib + loads * tensors * LOST_KIB / 1024
    found = [
        Check("noise against the least distance of two adapters", 2 * pooled, single),
        Check(f"{len(loaded)} probes at once against alone, rms", rms(loaded), pooled),
        Check("  the worst of them", max(loaded), single),
        Check(f"{len(soaked)} probes in the soak against alone, rms", rms(soaked), pooled),
        Check("  the worst window", max((w.rms for w in windows if w.errors), default=float("nan")), pooled),
        Check("  the worst of them", max(soaked, default=float("nan")), single),
        Check("alone after the soak against before, rms", rms(drift), pooled),
        Check(
            "allocated on the GPU, idle to idle, MiB", after["allocated_mib"] - before["allocated_mib"], ALLOCATED_MIB
        ),
        Check("resident memory, idle to idle, MiB", after["resident_mib"] - before["resident_mib"], resident),
    ]
    limits = {"live tensors": 2 * tensors, "compiled kernels": 0, "compiled layers": 0, "open files": OPEN_FILES}
    found += [Check(f"new {name}", after[name] - before[name], limit) for name, limit in limits.items()]
    lost = 1 - report["speed_after"] / report["speed"]
    found.append(Check("tokens/s of the same requests lost, idle to idle", lost, options.slack))
    return found


def show(report: dict, found: list[Check], faults: list[str]) -> None:
    from rich.table import Table

    table = Table(title="soak", title_justify="left")
    columns = ("s", "tokens/s", "steps", "replacing s", "activating s", "finished", "aborted", "replaced")
    for column in (*columns, "into slots", "probes", "rms", "worst", "allocated MiB", "reserved MiB", "resident MiB"):
        table.add_column(column, justify="right")
    for w in report["windows"]:
        speed = (f"{w.seconds:.0f}", f"{w.tokens_per_s:,.0f}", str(w.steps))
        spent = (f"{w.replacing_s:.1f}", f"{w.activating_s:.1f}")
        counts = (w.finished, w.aborted, w.swaps, w.activations, len(w.errors))
        errors = (f"{w.rms:.1e}", f"{max(w.errors, default=0):.1e}")
        memory = (w.allocated_mib, w.reserved_mib, w.resident_mib)
        table.add_row(*speed, *spent, *map(str, counts), *errors, *(f"{m:,.0f}" for m in memory))
    console().print(table)
    table = Table(title="checks", title_justify="left")
    for column in ("what", "found", "limit", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for c in found:
        verdict = "[green]holds[/]" if c.holds else "[red]does not hold[/]"
        table.add_row(c.what, f"{c.found:.3g}", f"{c.limit:.3g}", verdict)
    console().print(table)
    same = sum(report["alone"][w] == report["again"][w] for w in report["alone"])
    console().print(
        f"noise {report['noise']:.1e}; alone before and after: {same} of {len(report['alone'])} answers have the same "
        f"bits; {sum(w.swaps for w in report['windows'])} adapters replaced, "
        f"{sum(w.activations for w in report['windows'])} put into slots; {report['speed']:,.0f} tokens/s before and "
        f"{report['speed_after']:,.0f} after"
    )
    for fault in faults:
        console().print(f"[red]{fault}[/]")
    console().print("[green]no faults[/]" if not faults else f"[red]{len(faults)} faults[/]")


# Running


def console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 170, highlight=False)


def shape(options: argparse.Namespace):
    found = vllm_agreement.shapes()[options.model]
    return replace(found, layers=options.layers, vocab=32000) if options.model == "llama3-8b" else found


def dtype(options: argparse.Namespace) -> str:
    return "float32" if options.model == "tiny" else "bfloat16"


def checkpoint(options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Folders of the model and of all sets of adapter weights."""
    folder = options.work / f"{options.model}_{shape(options).layers}"
    sets = options.adapters + max(2, options.adapters // 2)
    return folder / "model", [folder / f"weights{i}_rank{options.rank}" for i in range(sets)]


def write_checkpoint(options: argparse.Namespace) -> None:
    """Write what is missing of the model and the adapters."""
    import torch
    from rich.progress import track
    from synthetic import write_adapter, write_model

    model, folders = checkpoint(options)
    precision = getattr(torch, dtype(options))
    if not (model / "model.safetensors.index.json").exists():
        write_model(model, shape(options), precision, device="cuda" if torch.cuda.is_available() else "cpu")
    for seed, folder in enumerate(track(folders, "adapters", disable=not sys.stderr.isatty())):
        if not (folder / "adapter_config.json").exists():
            write_adapter(folder, shape(options), options.rank, seed=seed, dtype=precision)


def run(options: argparse.Namespace) -> dict:
    """Everything from the engine's start to its last probe."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {text}", flush=True)

    engine = Engine(options)
    engine.worker()  # begins to count activations
    say(f"ready after {engine.ready_s:.0f} s")
    report: dict = {"alone": engine.alone()}
    report["noise"] = engine.noise()
    report["loaded"] = engine.loaded()
    say("answers alone and loaded taken")
    seconds = 60 * options.minutes
    window = min(60.0, seconds / 4)
    engine.soak(max(5.0, seconds / 10), window, report["alone"], "warm-up")
    report["idle"], report["speed"] = engine.worker(at_rest), engine.speed()
    say("warm")
    report["windows"] = engine.soak(seconds, window, report["alone"], "soak")
    report["idle_after"], report["speed_after"] = engine.worker(at_rest), engine.speed()
    report["again"] = engine.alone()
    say("soaked")
    return report | {"workers": engine.llm.collective_rpc(vllm_agreement.look_inside)}


def write_json(path: Path, report: dict, found: list[Check], faults: list[str], options: argparse.Namespace) -> None:
    import torch
    import vllm

    document = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "date": now(),
        "noise": report["noise"],
        "idle": report["idle"],
        "idle_after": report["idle_after"],
        "speed": report["speed"],
        "speed_after": report["speed_after"],
        "windows": [asdict(w) | {"tokens_per_s": w.tokens_per_s, "rms": w.rms} for w in report["windows"]],
        "checks": [asdict(c) | {"holds": c.holds} for c in found],
        "workers": report["workers"],
        "faults": faults,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=positive(float), default=5.0, help="length of the soak")
    add("--model", default="llama3-8b", choices=("tiny", "small", "llama3-8b"))
    add("--variant", default="patched", choices=("patched", "stock"), help="stock: vLLM as it is, to compare with")
    add("--layers", type=positive(int), default=8, help="layers of llama3-8b")
    add("--adapters", type=int, default=24)
    add("--rank", type=between(int, 1, LORA_RANKS[-1]), default=16)
    add("--slots", type=positive(int), default=4, help="max_loras")
    add("--cpu-slots", type=int, default=8, help="max_cpu_loras")
    add("--concurrency", type=int, default=256, help="requests in flight")
    add("--swaps", type=positive(float), default=10.0, help="adapters replaced a second")
    add("--longest-prompt", type=int, default=1024, help="tokens")
    add("--longest-answer", type=int, default=128, help="tokens")
    add("--slack", type=float, default=0.1, help="part of the speed before that may be lost after")
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    add("--memory", type=positive(float), default=0.6, help="gpu_memory_utilization")
    add("--seed", type=SEED, default=0)
    add("--work", type=Path, default=Path(tempfile.gettempdir(), "soak"), help="folder of the checkpoint")
    add("--out", type=Path, help="JSON file of the results")
    add("--commit", default=git_commit(), help="commit to write into the results; default: git's")
    options = parser.parse_args(argv)
    if options.adapters <= QUIET:
        parser.error(f"--adapters must be more than {QUIET}, got {options.adapters}")
    if options.concurrency < NOISE_PROBES:
        parser.error(f"--concurrency must be at least {NOISE_PROBES}, got {options.concurrency}")
    if options.cpu_slots < options.slots:
        parser.error(f"--cpu-slots {options.cpu_slots} is less than --slots {options.slots}")
    if options.longest_prompt < 2 or not 1 <= options.longest_answer <= 2048 - options.longest_prompt:
        parser.error("--longest-prompt and --longest-answer must fit into 2048 tokens together")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.out:
        make_results(options.out.parent)
    require(["vllm"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the engine's process ends, too
    here = Path(__file__).resolve()
    # in a process of its own, which frees the GPU
    write = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import soak; "
    subprocess.run([sys.executable, "-c", f"{write}soak.write_checkpoint(soak.parse({argv!r}))"], check=True)
    os.environ.pop("LORA_OPS_VLLM", None)
    os.environ.update(vllm_agreement.environment(options.variant, argparse.Namespace(tp=1)))
    try:
        report = run(options)
    except Exception:
        traceback.print_exc()
        console().print("[red]the engine failed[/]")
        return 1
    weights = checkpoint(options)[1][0] / "adapter_model.safetensors"
    found = checks(report, options, weights.stat().st_size / 2**20)
    faults = [f"{c.what.strip()}: {c.found:.3g}, limit {c.limit:.3g}" for c in found if not c.holds]
    faults += vllm_agreement.faults_of_workers(options.variant, report)
    show(report, found, faults)
    if options.out:
        write_json(options.out, report, found, faults, options)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
