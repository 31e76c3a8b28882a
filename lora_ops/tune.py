"""python -m lora_ops.tune: measure launch parameters for a model's LoRA layers on this machine's GPUs, and write them.

    python -m lora_ops.tune --model llama3-8b                     # or a folder with a config.json; --tp 1 2
    python -m lora_ops.tune --shape 4096:4096,1024,1024 --ranks 16 --tokens 64
    python -m lora_ops.tune --model qwen3-8b --dry-run            # what would be measured, and for how long
    python -m lora_ops.tune --model llama3-8b --write-vllm FOLDER # also files for vLLM's own LoRA kernels

Writes <out>/<GPU>/lora_*.json, to be used with LORA_OPS_CONFIG_DIR=<out> or lora_ops.use_configs(<out>), and
<out>/<GPU>/tune.csv with the analytic default beside the tuned config for every case. bgmv_*, sgmv_* and lora_* ops
run the same kernels and use the same entries. A run that was cut short goes on where it stopped (tune.jsonl there).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops_configs import files, store, tuning
from ops_configs.lora import ExpandConfig, ShrinkConfig
from ops_configs.tuning import metadata

from .config import MAX_RANK
from .tuning import decide
from .tuning.candidates import COUNT
from .tuning.layers import MODELS, Layer, model_layers, parse_shape
from .tuning.worker import STEPS, Settings, Unit, case_of, compile_jobs

RANKS = (8, 16, 32, 64, 128)
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
KINDS = {"lora_shrink": ShrinkConfig, "lora_expand": ExpandConfig}
KERNELS = Path(__file__).parent / "kernels"
COMPILE_S, MEASURE_S, VERIFY_S = 1.5, 0.02, 0.3
"""Of one kernel in one process, of one candidate, and of one case, roughly, for the estimate."""
SWEEP_SHARE = 0.75
"""Of the time limit; the rest is left for the second measurement."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed arguments, with `layers` and `ranks` filled in; exits with an error that says what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_ops.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[], help=f"{', '.join(MODELS)}, or a config.json or its folder")
    parser.add_argument("--shape", nargs="+", default=[], metavar="K:N0,N1", help="input size and widths of the slices")
    parser.add_argument("--k", type=int, help="input size of one layer, with --widths")
    parser.add_argument("--widths", help="widths of its slices: 4096,1024,1024")
    parser.add_argument("--tp", nargs="+", type=int, default=[1], help="tensor parallel sizes, for --model")
    parser.add_argument(
        "--ranks", nargs="+", type=int, help=f"default: --max-rank, and below it {' '.join(map(str, RANKS))}"
    )
    parser.add_argument("--max-rank", type=int, default=max(RANKS), help="of the server: vLLM runs all adapters at it")
    parser.add_argument("--max-loras", type=int, default=64, help="adapters in a batch at most")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(store.BUCKETS), help="row buckets to measure")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="fp16 and bf16 share the files")
    parser.add_argument("--gpu", default="0", help="all, or indices: 0,1")
    parser.add_argument("--out", type=Path, default=Path("lora_ops_configs"), help="folder of the files")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="MINUTES")
    tuning.add_compile_processes(parser)
    parser.add_argument(
        "--write-vllm", type=Path, metavar="FOLDER", help="tune vLLM's own kernels too, for vLLM to read"
    )
    parser.add_argument("--only-vllm", action="store_true", help="with --write-vllm: leave our kernels out")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    try:
        args.layers = chosen_layers(args)
    except ValueError as error:
        parser.error(str(error))
    args.ranks = sorted(set(args.ranks or [*(rank for rank in RANKS if rank < args.max_rank), args.max_rank]))
    if not all(1 <= rank <= MAX_RANK for rank in args.ranks):
        parser.error(f"ranks are {args.ranks}, expected some of 1 to {MAX_RANK}: see --ranks and --max-rank")
    if unknown := [n for n in args.tokens if n not in store.BUCKETS]:
        parser.error(f"--tokens {unknown}: there are {', '.join(map(str, store.BUCKETS))}")
    args.tokens = sorted(set(args.tokens))
    if args.max_loras < 1 or args.compile_processes < 1 or not args.time_limit > 0:
        parser.error("--max-loras, --compile-processes and --time-limit must be positive")
    if args.only_vllm and not args.write_vllm:
        parser.error("--only-vllm needs --write-vllm FOLDER")
    return args


def chosen_layers(args: argparse.Namespace) -> dict[Layer, str]:
    """Layers to tune, each once, with the names that it goes by.

    Raises:
        ValueError: none, or a bad model or shape.
    """
    names: dict[Layer, list[str]] = {}
    for model in args.model:
        for tp in args.tp:
            for module, layer in model_layers(model, tp).items():
                label = Path(model).name + (f"-tp{tp}" if tp > 1 else "")
                names.setdefault(layer, []).append(f"{label} {module}")
    shapes = list(args.shape)
    if (args.k is None) != (args.widths is None):
        raise ValueError("--k and --widths belong together")
    if args.k is not None:
        shapes.append(f"{args.k}:{args.widths}")
    for shape in shapes:
        names.setdefault(parse_shape(shape), []).append("shape")
    if not names:
        raise ValueError("nothing to tune: give --model, --shape or --k with --widths")
    return {layer: ", ".join(found) for layer, found in names.items()}


def tune_command(shapes: Iterable[str], ranks: Iterable[int], args: argparse.Namespace) -> str:
    """The command that measures these layers at these ranks again."""
    words = ["python", "-m", "lora_ops.tune", "--shape", *shapes, "--ranks", *map(str, ranks)]
    return shlex.join([*words, "--max-loras", str(args.max_loras), "--dtype", args.dtype])


class Journal(tuning.Journal):
    """A journal of sweeps and second measurements."""

    def swept(self) -> dict[decide.Case, decide.Swept]:
        return {
            case_of(r, parse_shape): decide.Swept(r["shrink"], r["expand"], r["us"], r["default_us"])
            for r in self.records
            if r["stage"] == "sweep"
        }

    def verified(self, tuned: dict[decide.Key, decide.Config]) -> dict[decide.Case, decide.Verified]:
        """Verifications of exactly these configs."""
        found = {}
        for record in self.records:
            if record["stage"] == "verify":
                case = case_of(record, parse_shape)
                if [record["shrink"], record["expand"]] == [tuned.get(key) for key in case.keys]:
                    found[case] = decide.Verified({(s, e): us for s, e, us, _ in record["times"]})
        return found


def units_of(cases: Iterable[decide.Case], tuned: dict[decide.Key, decide.Config] | None = None) -> list[Unit]:
    """Cases grouped by layer and rank; for a verification with the configs of each case."""
    groups: dict[tuple[Layer, int], list[decide.Case]] = {}
    for case in cases:
        groups.setdefault((case.layer, case.rank), []).append(case)
    units = []
    for (layer, rank), group in groups.items():
        pairs = None
        if tuned is not None:
            configs = [[tuned.get(key) for key in case.keys] for case in group]
            pairs = tuple((s and ShrinkConfig(**s), e and ExpandConfig(**e)) for s, e in configs)
        units.append(Unit(layer, rank, tuple(case.tokens for case in group), pairs))
    return units


run_units = partial(tuning.run_units, STEPS)


def dry_run(args: argparse.Namespace, console: Console) -> None:
    """Print what would be measured, and for how long, on a GPU like an H200."""
    table = Table("layer", "K", "widths", title="Layers", title_justify="left")
    for layer, name in args.layers.items():
        table.add_row(name, str(layer.k), " + ".join(map(str, layer.widths)))
    console.print(table)
    units = units_of(all_cases(args))
    kernels = sum(
        sum(config is not None for config in pair)
        for unit in units
        for _, pairs in compile_jobs(unit)
        for pair in pairs
    )
    cases = sum(len(unit.tokens) for unit in units)
    compiling = kernels * COMPILE_S / args.compile_processes
    measuring = cases * ((2 * COUNT - 1) * MEASURE_S + VERIFY_S)
    console.print(f"ranks {' '.join(map(str, args.ranks))}; tokens {' '.join(map(str, args.tokens))}")
    console.print(
        f"{cases} cases, up to {COUNT} candidates for each of the two kernels, {kernels} kernels to compile\n"
        f"about {max(compiling, measuring) / 60 + 1:.0f} minutes on one GPU: {compiling / 60:.1f} of compiling in "
        f"{args.compile_processes} processes beside {measuring / 60:.1f} of measuring",
        highlight=False,
    )


def all_cases(args: argparse.Namespace) -> list[decide.Case]:
    return [decide.Case(layer, rank, n) for rank in args.ranks for layer in args.layers for n in args.tokens]


def write_files(folder: Path, found: dict[str, dict], meta: dict[str, str], args: argparse.Namespace) -> list[Path]:
    """Write entries; entries of other ranks or rows that stand in a file from the same software stay."""
    with tuning.locked(folder):
        for name, new in found.items():
            path = folder / name
            kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
            old = files.read(path, kind, store.BUCKETS) if path.exists() else None
            same = old and tuning.same_software(old.metadata, meta)
            entries = {**(old.raw if same else {}), **new}
            shapes = sorted({entry["layer"] for entry in entries.values() if "layer" in entry})
            command = tune_command(shapes, sorted({rank for rank, _ in entries}), args)
            files.write(path, meta | {"command": command}, entries)
    return [folder / name for name in found]


def report(
    folder: Path,
    args: argparse.Namespace,
    verified: dict[decide.Case, decide.Verified],
    tuned: dict[decide.Key, decide.Config],
    on: set[decide.Key],
    meta: dict[str, str],
    console: Console,
) -> None:
    """Print and store every case: the analytic default beside what was kept, and their worst ratio."""
    names = ("layer", "k", "widths", "rank", "tokens")
    columns = [*names, "default_us", "tuned_us", "gain", "shrink", "expand", *meta]
    table = Table(*columns[:8], title="Analytic default and tuned", title_justify="left")
    worst, ratios, stored = (0.0, ""), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for case, result in sorted(verified.items(), key=lambda item: item[0]):
        default_us, us = decide.final_us(case, result, on)
        name = args.layers.get(case.layer, "")
        widths = "+".join(map(str, case.layer.widths))
        row = [name, case.layer.k, widths, case.rank, case.tokens, f"{default_us:.2f}", f"{us:.2f}"]
        row.append(f"{default_us / us:.3f}")
        configs = [json.dumps(tuned[key]) if key in on else "" for key in case.keys]
        stored.append([*row, *configs, *meta.values()])
        table.add_row(*map(str, row))
        ratios.append(default_us / us)
        worst = max(worst, (default_us / us, f"{name} rank {case.rank}, {case.tokens} tokens"))
    tuning.write_table(folder / "tune.csv", columns, names, stored)
    console.print(table)
    mean = statistics.geometric_mean(ratios)
    console.print(
        f"analytic default over tuned: {mean:.3f} geometric mean of {len(ratios)} cases, {worst[0]:.3f} at worst "
        f"({worst[1]}); {len(on)} entries kept, at least {decide.MARGIN:.0%} faster each",
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
    meta = metadata(name, "lora_ops")
    same = tuning.journal_settings(meta, "lora_ops")
    journal = Journal(folder / "tune.jsonl", {**same, "max_loras": args.max_loras, "dtype": args.dtype}, args.resume)

    def settings(share: float) -> Settings:
        processes = max(args.compile_processes // len(gpus), 1)
        return Settings(args.max_loras, DTYPES[args.dtype], processes, started + share * limit, seed=os.getpid())

    cases = all_cases(args)
    if todo := [case for case in cases if case not in journal.swept()]:
        run_units(units_of(todo), gpus, settings(SWEEP_SHARE), journal, console, "sweep")
    swept = {case: result for case, result in journal.swept().items() if case in set(cases)}
    tuned = decide.merge(swept)
    if todo := [case for case in swept if case not in journal.verified(tuned)]:
        run_units(units_of(todo, tuned), gpus, settings(1.0), journal, console, "measure again")
    verified = {case: result for case, result in journal.verified(tuned).items() if case in swept}
    paths = []
    if verified:
        on = decide.kept(verified, tuned)
        paths = write_files(folder, decide.entries(verified, tuned, on, tuning.most_shared(gpus[0])), meta, args)
        report(folder, args, verified, tuned, on, meta, console)
    return tuning.close(console, folder, paths, started, len(verified), len(cases))


def tune_all(args: argparse.Namespace, gpus: list[int], console: Console) -> int:
    """Tune our kernels, then vLLM's own, as the arguments say; returns the exit code."""
    store.register_kernels("lora_ops", KERNELS)
    if args.write_vllm:
        hosts = import_module("ops_patches.vllm_lora_configs")
        try:
            hosts.check(args.write_vllm)
        except (ImportError, ValueError) as error:
            console.print(f"[red]--write-vllm: {escape(str(error))}")
            return 2
    code = 0 if args.only_vllm else tune(args, gpus, console)
    if args.write_vllm:
        layers = [(layer.k, layer.widths) for layer in args.layers]
        sizes = hosts.Sizes(layers, args.ranks, args.tokens, args.max_loras, DTYPES[args.dtype])
        hosts.write(args.write_vllm, sizes, gpus[0], args.compile_processes, console)
    return code


def main(argv: list[str] | None = None) -> int:
    return tuning.main(arguments(argv), dry_run, tune_all)


if __name__ == "__main__":
    sys.exit(main())
