"""Three LoRA adapters on a real vLLM engine, unpatched against patched: the same tokens, and who computed them.

    make demo

Writes a small Llama checkpoint with a tokenizer and three PEFT adapters, and runs four engines, each in a process of
its own: unpatched and patched, with the engine core in the process that calls vLLM and in one of its own. Ends with 1
if anything is not as it should be: the patch did not fire, another wrapper class ran, tokens differ, an adapter has no
effect.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations
from pathlib import Path

import synthetic
import torch
from engine_job import Job, compare, run_job
from rich.console import Console
from rich.pretty import Pretty
from rich.table import Table

OURS = "ops_patches.vllm_punica_"
PLACES = {"in process": False, "own process": True}
PROMPTS = ("You may reproduce and distribute copies of the Work", "The licence applies to", "Contributor", "a")
# Largest difference of a log-prob that rounding explains: float32 sums of a few hundred terms in another order, or
# bfloat16 activations (8 bits) through two layers. A choice between tokens closer than that is a tie in bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def write_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Write the model and three adapters of different rank and targets; returns their paths."""
    shape = synthetic.TINY
    synthetic.write_model(folder / "model", shape, dtype)
    everything = synthetic.ATTENTION + synthetic.MLP
    synthetic.write_adapter(folder / "all-r8", shape, rank=8, targets=everything, seed=1, dtype=dtype)
    synthetic.write_adapter(folder / "qv-r16", shape, rank=16, targets=("q_proj", "v_proj"), seed=2, dtype=dtype)
    synthetic.write_adapter(
        folder / "all-vocab-r5", shape, rank=5, targets=everything + synthetic.VOCABULARY, seed=3, dtype=dtype
    )
    return str(folder / "model"), {name: str(folder / name) for name in ("all-r8", "qv-r16", "all-vocab-r5")}


def by_adapter(result: dict) -> dict[str | None, list[dict]]:
    """The requests of a result, grouped by adapter; None is the base model."""
    groups: dict[str | None, list[dict]] = {}
    for request in result["requests"]:
        groups.setdefault(request["adapter"], []).append(request)
    return groups


def faults_of_run(result: dict, patched: bool, own_process: bool) -> list[str]:
    """What is wrong with who computed a result."""
    faults = []
    worker, status = result["worker"], result["worker"]["status"]
    ours = [wrapper.startswith(OURS) for wrapper in worker["wrappers"]]
    if not ours or any(running != patched for running in ours):
        faults.append(f"the {'patched' if patched else 'unpatched'} worker runs {worker['wrappers']}")
    if (worker["pid"] != result["pid"]) != own_process:
        faults.append("the engine core did not run where it was asked to")
    counters = status["counters"] if status else {"fallback": {}, "error": {}}
    if patched and not hits(result):
        faults.append("our kernels were never called in the worker")
    if not patched and hits(result):
        faults.append(f"our kernels were called {hits(result)} times in the unpatched worker")
    if patched and (status is None or not status["patched"]):
        faults.append(f"the worker is not patched: {status and status['reasons']}")
    if patched and status and status["never_fired"]:
        faults.append(f"never called by vLLM: {status['never_fired']}")
    faults += [f"{kind} in the worker: {counters[kind]}" for kind in ("fallback", "error") if counters[kind]]
    return faults


def near_tie(dtype: str) -> float:
    """How much less likely than the best another token may be without its choice being a fault: float32 allows none."""
    return TOLERANCE[dtype] if dtype == "bfloat16" else 0.0


def faults_of_tokens(unpatched: dict, patched: dict, dtype: str) -> list[str]:
    """What is wrong with the answers of a patched engine, and with the adapters as a test of it."""
    tolerance, tie = TOLERANCE[dtype], near_tie(dtype)
    faults = []
    expected, got = by_adapter(unpatched), by_adapter(patched)
    for adapter in expected:
        for a, b in zip(expected[adapter], got[adapter], strict=True):
            agreement = compare(a, b, tie)
            if not agreement.equal and not agreement.tie:
                faults.append(
                    f"{adapter or 'base'}: tokens differ from position {agreement.tokens} on: {a['prompt']!r}"
                )
            if not agreement.logprob_error <= tolerance:
                faults.append(
                    f"{adapter or 'base'}: a log-prob differs by {agreement.logprob_error:.2g}: {a['prompt']!r}"
                )
    for result in (expected, got):
        for one, other in combinations(result, 2):
            if [r["tokens"] for r in result[one]] == [r["tokens"] for r in result[other]]:
                faults.append(f"{one or 'base'} and {other or 'base'} give the same tokens: the adapters prove nothing")
    return faults


def table(results: dict[tuple[str, bool], dict], dtype: str) -> Table:
    """One row per place of the engine core and adapter."""
    view = Table(title=f"same prompts, greedy, {dtype}: patched against unpatched")
    columns = ("engine core", "adapter", "prompts", "tokens equal", "max |Δ log-prob|", "unlike base", "unlike others")
    for column in columns:
        view.add_column(column)
    for place in PLACES:
        expected, got = by_adapter(results[place, False]), by_adapter(results[place, True])
        for adapter, requests in got.items():
            pairs = zip(expected[adapter], requests, strict=True)
            agreements = [compare(a, b, near_tie(dtype)) for a, b in pairs]
            equal, tokens = sum(a.tokens for a in agreements), sum(len(r["tokens"]) for r in requests)
            ties = sum(a.tie for a in agreements)
            if equal == tokens:
                same = f"[green]{equal}/{tokens}"
            elif all(a.equal or a.tie for a in agreements):
                same = f"[yellow]{equal}/{tokens}, {ties} near-tie{'s' * (ties > 1)}"
            else:
                same = f"[red]{equal}/{tokens}"

            def unlike(others: list[dict], requests: list[dict] = requests) -> int:
                return sum(a["tokens"] != b["tokens"] for a, b in zip(requests, others, strict=True))

            others = [unlike(got[name]) for name in got if name not in (adapter, None)]
            view.add_row(
                place,
                adapter or "(base)",
                str(len(requests)),
                same,
                f"{max(a.logprob_error for a in agreements):.1e}",
                "" if adapter is None else f"{unlike(got[None])}/{len(requests)}",
                "" if adapter is None else f"{min(others)}/{len(requests)}",
            )
        view.add_section()
    return view


def hits(result: dict) -> int:
    """How often our kernels were called in a result's worker."""
    status = result["worker"]["status"]
    return sum(n for op, n in status["counters"]["hit"].items() if op.startswith("lora_")) if status else 0


def describe_run(console: Console, name: str, result: dict) -> None:
    """Print where an engine ran, what it ran and how long it took."""
    worker = result["worker"]
    process = "another process" if worker["pid"] != result["pid"] else "the calling process"
    wrappers = ", ".join(wrapper.rsplit(".", 1)[1] for wrapper in worker["wrappers"])
    console.print(
        f"{name}: vLLM {result['vllm']}, start {result['start_s']:.1f} s, requests {result['generate_s']:.1f} s, "
        f"worker pid {worker['pid']} ({process}) runs {wrappers}, calls of our kernels: {hits(result)}",
        highlight=False,
    )


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo/checkpoint"), help="where the checkpoint is written")
    folder = parser.parse_args().folder.resolve()
    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 120)
    gpu = torch.cuda.is_available()
    dtype = "bfloat16" if gpu else "float32"
    model, adapters = write_checkpoint(folder, getattr(torch, dtype))
    console.print(f"wrote a Llama checkpoint and {len(adapters)} adapters to {folder}", soft_wrap=True)
    requests = [[prompt, adapter] for prompt in PROMPTS for adapter in (None, *adapters)]
    engine = {"enforce_eager": False, "gpu_memory_utilization": 0.3} if gpu else {}

    runs = {
        (place, patched): Job(
            model,
            adapters,
            requests,
            patch="call" if patched else "none",
            own_process=own_process,
            dtype=dtype,
            engine=engine,
        )
        for place, own_process in PLACES.items()
        for patched in (False, True)
    }
    results, faults = {}, []
    # On the CPU most of a start is imports, on one core; on one GPU two starts disturb each other's memory profile.
    with (
        ThreadPoolExecutor(1 if gpu else 2) as pool,
        console.status(f"{len(runs)} engines, {len(requests)} requests each"),
    ):
        pending = {pool.submit(run_job, job): run for run, job in runs.items()}
        for future in as_completed(pending):
            place, patched = run = pending[future]
            result = results[run] = future.result()
            name = f"{'patched' if patched else 'unpatched'}, {place}"
            describe_run(console, f"{len(results)}/{len(runs)} {name}", result)
            faults += [f"{name}: {fault}" for fault in faults_of_run(result, patched, PLACES[place])]
    for place in PLACES:
        faults += [f"{place}: {f}" for f in faults_of_tokens(results[place, False], results[place, True], dtype)]

    console.print(table(results, dtype))
    console.print("status() of the patched worker that runs in its own process:")
    console.print(Pretty(results["own process", True]["worker"]["status"], expand_all=False))
    for fault in faults:
        console.print(f"[bold red]WRONG: {fault}", soft_wrap=True)
    answers = "every answer is the same" if dtype == "float32" else "answers part at near-ties of bfloat16 at most"
    verdict = "[bold red]FAILED" if faults else f"[bold green]OK: {answers}, and our kernels computed them"
    console.print(f"{verdict}[/] ({time.perf_counter() - start:.0f} s)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
