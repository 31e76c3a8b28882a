"""python -m moe_ops.tune: measure launch parameters for a model's MoE layer on this machine's GPUs, and write them.

    python -m moe_ops.tune --model qwen3-30b-a3b                  # or a folder with a config.json; --tp 1 2 --ep 4
    python -m moe_ops.tune --hidden-size 2048 --experts 60 --intermediate-size 1408 --topk 4 --batch-size 1 64
    python -m moe_ops.tune --model deepseek-v3 --tp 8 --dry-run   # what would be measured, and for how long
    python -m moe_ops.tune --model mixtral-8x7b --no-tune         # the analytic default's times alone
    python -m moe_ops.tune --model qwen3-30b-a3b --write-vllm A --write-sglang B   # the hosts' own kernels, too

Writes <out>/<GPU>/grouped_gemm_config_<hidden>_<dtype>.json, to be used with LORA_OPS_CONFIG_DIR=<out> or
moe_ops.use_configs(<out>), and <out>/<GPU>/tune_moe.csv with the analytic default beside the tuned config for every
case. A run that was cut short goes on where it stopped (tune_moe.jsonl there).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops_configs import files, moe, store, tuning
from ops_configs.moe import TOKENS, parse_layer
from ops_configs.tuning import Journal, metadata

from .tuning import candidates
from .tuning.layers import DTYPES, MODELS, Target, model_target, sharded, target
from .tuning.worker import MARGIN, STEPS, Settings, Unit, config_of, identity, jobs, kept

KERNELS = Path(__file__).parent / "kernels"
COMPILE_S, MEASURE_S, VERIFY_S = 1.0, 0.012, 1.5
"""Of one kernel in one process, of one candidate beside its calls, and of one second measurement, for the estimate."""
SWEEP_SHARE = 0.7
"""Of the time limit; the rest is left for the second measurement."""

run_units = partial(tuning.run_units, STEPS)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed arguments, with `targets` filled in; exits with an error that says what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_ops.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[], help=f"{', '.join(MODELS)}, or a config.json or its folder")
    parser.add_argument("--hidden-size", type=int, help="in place of the model's, as are the next three")
    parser.add_argument("--intermediate-size", type=int, help="of an expert")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--topk", type=int, help="experts of a token")
    parser.add_argument("--layer", nargs="+", default=[], metavar="NAME", help="layers as the files name them")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as the model comes")
    parser.add_argument("--block-shape", metavar="N,K", help="of the blocks of a weight that share a scale: 128,128")
    parser.add_argument("--tp", nargs="+", type=int, default=[1], help="tensor parallel sizes")
    parser.add_argument("--ep", nargs="+", type=int, default=[1], help="expert parallel sizes")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(TOKENS), help="token buckets to measure")
    parser.add_argument("--routing", choices=["uniform", "zipf"], default="uniform", help="popularity of the experts")
    parser.add_argument("--no-tune", action="store_true", help="measure the analytic default, write no file")
    parser.add_argument("--gpu", default="0", help="all, or indices: 0,1")
    parser.add_argument("--out", type=Path, default=Path("moe_ops_configs"), help="folder of the files")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="MINUTES")
    tuning.add_compile_processes(parser)
    parser.add_argument("--write-vllm", type=Path, metavar="FOLDER", help="tune vLLM's own kernel too, for it to read")
    parser.add_argument("--write-sglang", type=Path, metavar="FOLDER", help="tune SGLang's own kernel too")
    parser.add_argument("--only-hosts", action="store_true", help="with --write-*: leave our kernels out")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    try:
        args.targets = chosen_targets(args)
    except ValueError as error:
        parser.error(str(error))
    if unknown := [n for n in args.batch_size if n not in TOKENS]:
        parser.error(f"--batch-size {unknown}: there are {', '.join(map(str, TOKENS))}")
    args.batch_size = sorted(set(args.batch_size))
    if args.compile_processes < 1 or not args.time_limit > 0:
        parser.error("--compile-processes and --time-limit must be positive")
    if args.only_hosts and not (args.write_vllm or args.write_sglang):
        parser.error("--only-hosts needs --write-vllm FOLDER or --write-sglang FOLDER")
    return args


def chosen_targets(args: argparse.Namespace) -> dict[Target, str]:
    """What to tune, each once, with the names that it goes by.

    Raises:
        ValueError: nothing, or a bad model, layer or size.
    """
    block_shape = None
    if args.block_shape:
        parts = args.block_shape.split(",")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--block-shape {args.block_shape!r} is not N,K, such as 128,128")
        block_shape = int(parts[0]), int(parts[1])
    given = {
        "hidden": args.hidden_size,
        "intermediate": args.intermediate_size,
        "experts": args.experts,
        "top_k": args.topk,
    }
    given = {size: value for size, value in given.items() if value is not None}
    found: list[tuple[str, Target]] = []
    for model in args.model:
        found.append((Path(model).name, model_target(model, args.dtype, block_shape, given)))
    if args.layer:
        if args.model or set(given) != {"hidden"}:
            raise ValueError("--layer needs --hidden-size, and neither --model nor other sizes")
        layers = [parse_layer(name, args.hidden_size) for name in args.layer]
        found += [(layer.name, target(layer, args.dtype, block_shape)) for layer in layers]
    elif given and not args.model:
        if len(given) < 4:
            raise ValueError("without --model give --hidden-size, --intermediate-size, --experts and --topk")
        found.append(("layer", target(moe.MoeLayer(**given), args.dtype, block_shape)))
    if not found:
        raise ValueError("nothing to tune: give --model, or the sizes of a layer")
    names: dict[Target, list[str]] = {}
    for (name, what), tp, ep in itertools.product(found, args.tp, args.ep):
        shard = replace(what, layer=sharded(what.layer, tp, ep))
        label = name + (f"-tp{tp}" if tp > 1 else "") + (f"-ep{ep}" if ep > 1 else "")
        names.setdefault(shard, []).append(label)
    return {what: ", ".join(labels) for what, labels in names.items()}


def tune_command(
    hidden: int, dtype: str, block_shape: Iterable[int] | None, layers: Iterable[str], routing: str
) -> str:
    """The command that measures these layers again."""
    words = ["python", "-m", "moe_ops.tune", "--hidden-size", str(hidden), "--dtype", dtype, "--layer", *layers]
    if block_shape:
        words += ["--block-shape", ",".join(map(str, block_shape))]
    return shlex.join([*words, "--routing", routing])


def case_of(record: Mapping) -> tuple:
    """What a record is of, hashable."""
    block = record["block_shape"]
    return record["hidden"], record["dtype"], block and tuple(block), record["layer"], record["tokens"]


def case_of_unit(unit: Unit) -> tuple:
    return case_of(identity("", unit))


def records_of(journal: Journal, stage: str) -> dict[tuple, dict]:
    """The last record of each case."""
    return {case_of(record): record for record in journal.records if record["stage"] == stage}


def verified_records(journal: Journal, swept: Mapping[tuple, dict]) -> dict[tuple, dict]:
    """Second measurements that began with what the sweep found."""
    return {
        case: record
        for case, record in records_of(journal, "verify").items()
        if case in swept and record["start"] == swept[case]["config"]
    }


def dry_run(args: argparse.Namespace, console: Console) -> None:
    """Print what would be measured, and for how long, on a GPU like an H200."""
    table = Table("layer", "experts", "top_k", "hidden", "intermediate", "dtype", title="Layers", title_justify="left")
    for what, name in args.targets.items():
        layer = what.layer
        experts = f"{layer.experts} of {layer.global_experts}" if layer.global_experts else str(layer.experts)
        blocks = f" {layer.block_shape[0]} x {layer.block_shape[1]}" if layer.block_shape else ""
        sizes = layer.top_k, layer.hidden, layer.intermediate, what.dtype + blocks
        table.add_row(name, experts, *map(str, sizes))
    console.print(table)
    settings = Settings(args.routing, args.compile_processes, math.inf, 0, not args.no_tune)
    kernels, count, measuring = set(), 0, 0.0
    for unit in all_units(args):
        if args.no_tune:
            continue
        kernels |= set(jobs(unit, settings, files.MAX_SHARED_BYTES))
        default = unit.default(files.MAX_SHARED_BYTES)
        us = sum(
            candidates.model_us(unit.target.layer, half, unit.tokens, getattr(default, half), unit.itemsize)
            for half in candidates.HALVES
        )
        found = sum(
            len(configs) for lists in unit.candidates(files.MAX_SHARED_BYTES).values() for configs in lists.values()
        )
        count += found
        measuring += found * (MEASURE_S + 5e-6 * max(us, 300)) + VERIFY_S
    cases = len(args.targets) * len(args.batch_size)
    refined = cases * 2 * len(candidates.HALVES)
    compiling = (len(kernels) + refined) * COMPILE_S / args.compile_processes
    console.print(f"tokens {' '.join(map(str, args.batch_size))}; routing {args.routing}", highlight=False)
    console.print(
        f"{cases} cases, {count} candidates, {len(kernels)} kernels to compile for the sweep\n"
        f"about {(compiling + measuring) / 60 + 0.5:.1f} minutes on one GPU: up to {compiling / 60:.1f} of compiling "
        f"in {args.compile_processes} processes, beside {measuring / 60:.1f} of measuring",
        highlight=False,
    )


def all_units(args: argparse.Namespace) -> list[Unit]:
    return [Unit(what, tokens) for what in args.targets for tokens in args.batch_size]


def write_files(
    folder: Path, verified: Iterable[dict], units: Mapping[tuple, Unit], meta: dict, routing: str, shared: int
) -> list[Path]:
    """Write entries; those of other layers and buckets that stand in a file from the same software stay."""
    found: dict[Path, dict[tuple[str, int], dict]] = {}
    of_file: dict[Path, Target] = {}
    for record in verified:
        unit = units[case_of(record)]
        path = folder / moe.file_name(record["hidden"], record["dtype"], record["block_shape"])
        of_file[path] = unit.target
        if kept(record):
            entry = moe.entry(config_of(record["config"]), record["us"], record["default_us"])
        else:
            entry = moe.entry(unit.default(shared), record["default_us"], record["default_us"])
        found.setdefault(path, {})[record["layer"], record["tokens"]] = entry
    with tuning.locked(folder):
        for path, new in found.items():
            old = moe.read(path) if path.exists() else None
            same = old and tuning.same_software(old.metadata, meta)
            entries = {**(old.raw if same else {}), **new}
            layer = of_file[path].layer
            names = sorted({name for name, _ in entries})
            command = tune_command(layer.hidden, of_file[path].dtype, layer.block_shape, names, routing)
            files.write(path, meta | {"command": command}, entries)
    return list(found)


def report(
    folder: Path, args: argparse.Namespace, rows: Iterable[dict], meta: dict[str, str], console: Console
) -> None:
    """Print and store every case: the analytic default beside what was kept; without tuned times the default alone."""
    names = {case_of_unit(unit): args.targets[unit.target] for unit in all_units(args)}
    case = ("model", "layer", "hidden", "dtype", "block", "tokens")
    columns = [*case, "default_us", "tuned_us", "gain", "gate_up", "down", "routing", *meta]
    table = Table(*columns[:9], title="Analytic default and tuned", title_justify="left")
    ratios, stored = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for record in sorted(rows, key=lambda record: (record["hidden"], record["layer"], record["tokens"])):
        default_us = record.get("default_us", record["us"])
        keep = "default_us" in record and kept(record)
        us = record["us"] if keep else default_us
        block = "x".join(map(str, record["block_shape"] or ()))
        row = [names[case_of(record)], record["layer"], record["hidden"], record["dtype"], block, record["tokens"]]
        row = [*map(str, row), f"{default_us:.2f}", f"{us:.2f}", f"{default_us / us:.3f}"]
        configs = [json.dumps(record["config"][half]) if keep else "" for half in candidates.HALVES]
        stored.append([*row, *configs, args.routing, *meta.values()])
        table.add_row(*row)
        ratios.append(default_us / us)
    tuning.write_table(folder / "tune_moe.csv", columns, (*case, "routing"), stored)
    console.print(table)
    if not args.no_tune:
        console.print(
            f"analytic default over tuned: {statistics.geometric_mean(ratios):.3f} geometric mean of {len(ratios)} "
            f"cases, {max(ratios):.3f} at most; entries kept are at least {MARGIN:.0%} faster",
            highlight=False,
        )


def tune(args: argparse.Namespace, gpus: list[int], console: Console) -> int:
    """Sweep, measure again, write; returns the exit code."""
    started = time.monotonic()
    limit = args.time_limit * 60
    try:
        name = tuning.gpu_name(gpus)
        folder = args.out / files.gpu_folder(name)
        tuning.writable(folder)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}")
        return 1
    meta = metadata(name, "moe_ops")
    same = tuning.journal_settings(meta, "moe_ops")
    journal = Journal(folder / "tune_moe.jsonl", {**same, "routing": args.routing}, args.resume)
    units = {case_of_unit(unit): unit for unit in all_units(args)}

    def settings(share: float) -> Settings:
        processes = max(args.compile_processes // len(gpus), 1)
        return Settings(args.routing, processes, started + share * limit, os.getpid(), not args.no_tune)

    if args.no_tune:
        if todo := [unit for case, unit in units.items() if case not in records_of(journal, "default")]:
            run_units(todo, gpus, settings(1.0), journal, console, "measure")
        found = {case: record for case, record in records_of(journal, "default").items() if case in units}
        report(folder, args, found.values(), meta, console)
        return 0
    if todo := [unit for case, unit in units.items() if case not in records_of(journal, "sweep")]:
        run_units(todo, gpus, settings(SWEEP_SHARE), journal, console, "sweep")
    swept = {case: record for case, record in records_of(journal, "sweep").items() if case in units}
    done = verified_records(journal, swept)
    if todo := [replace(units[case], start=config_of(swept[case]["config"])) for case in swept if case not in done]:
        run_units(todo, gpus, settings(1.0), journal, console, "measure again")
    verified = verified_records(journal, swept)
    paths = []
    if verified:
        shared = tuning.most_shared(gpus[0])
        paths = write_files(folder, verified.values(), units, meta, args.routing, shared)
        report(folder, args, verified.values(), meta, console)
    return tuning.close(console, folder, paths, started, len(verified), len(units))


def tune_all(args: argparse.Namespace, gpus: list[int], console: Console) -> int:
    """Tune our kernels, then the hosts' own, as the arguments say; returns the exit code."""
    store.register_kernels("moe_ops", KERNELS)
    hosts = import_module("ops_patches.moe_host_configs")
    sizes = hosts.Sizes(list(args.targets), args.batch_size, args.routing)
    wanted = {host: folder for host in hosts.HOSTS if (folder := getattr(args, f"write_{host}"))}
    try:
        for host, folder in wanted.items():
            hosts.check(host, folder, sizes.targets)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}")
        return 2
    code = 0 if args.only_hosts else tune(args, gpus, console)
    for host, folder in wanted.items():
        hosts.write(host, folder, sizes, gpus[0], args.compile_processes, console)
    return code


def main(argv: list[str] | None = None) -> int:
    return tuning.main(arguments(argv), dry_run, tune_all)


if __name__ == "__main__":
    sys.exit(main())
