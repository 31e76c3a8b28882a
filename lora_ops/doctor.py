"""python -m lora_ops.doctor [--json]: what is installed, whether the patch would fit, and what patched processes did.

Exit code 0 when nothing is wrong, 1 when something is; the last lines say what. Works with no host and no GPU.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops_configs import lora, moe, store
from ops_patches import debug, state
from ops_patches.engine import PREFIXES, UNPATCHED, PatchSet
from ops_patches.sglang_moe import SGLANG_MOE
from ops_patches.vllm_lora import VLLM_LORA
from ops_patches.vllm_moe import VLLM_MOE

PATCHES = (VLLM_LORA, VLLM_MOE, SGLANG_MOE)
DISTRIBUTIONS = ("serving-ops", "torch", "triton", "numba", *VLLM_LORA.hosts, *SGLANG_MOE.hosts, "transformers", "peft")
STATUS_FIELDS = {"host", "version", "patched", "reasons", "targets", "never_fired", "counters"}
"""Of `PatchSet.status`, that are read here."""
VARIABLES = {
    VLLM_LORA.env: "1: patch vLLM's LoRA layers, also in the processes it starts; 0 or unset: do not",
    VLLM_MOE.env: "1: patch vLLM's MoE layers, also in the processes it starts; 0 or unset: do not",
    SGLANG_MOE.env: "1: patch SGLang's MoE layers, also in the processes it starts; 0 or unset: do not",
    state.STATUS_DIR: "folder of the status files of patched processes",
    VLLM_LORA.allowlist: "vLLM's list of plugins to load; unset: all of them",
    SGLANG_MOE.allowlist: "SGLang's list of plugins to load; unset or empty: all of them",
    store.CONFIG_DIR: "folder of tuned launch parameters, asked before the shipped ones",
    debug.VARIABLE: "1: wait for each kernel, so that an error names the one that failed; slow",
    "TRITON_INTERPRET": "1: Triton kernels run in its interpreter, slowly, and not on the GPU",
    "LORA_OPS_HOST_SOURCES": "for the tests alone: folder of the hosts' sources",
}


def installed() -> dict[str, str | None]:
    """Version of each distribution that matters, None when it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def gpus() -> list[dict[str, str]]:
    """Name, memory, compute capability and driver of each GPU; empty without nvidia-smi. Touches no CUDA state."""
    fields = ("name", "memory.total", "compute_cap", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]  # warnings may stand among them
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def environment() -> list[dict[str, str | None]]:
    """Each environment variable that matters: name, value, meaning and what is wrong with it."""
    found = {
        name: {"name": name, "value": os.environ.get(name), "meaning": meaning, "problem": None}
        for name, meaning in VARIABLES.items()
    }
    for name in sorted(os.environ):
        if name.startswith(PREFIXES) and name not in VARIABLES:
            known = ", ".join(variable for variable in VARIABLES if variable.startswith(PREFIXES))
            problem = f"{name} is not known: there are {known}"
            found[name] = {"name": name, "value": os.environ[name], "meaning": "", "problem": problem}
    checks = {patches.env: patches.requested for patches in PATCHES}
    checks |= {store.CONFIG_DIR: store.user_folder, debug.VARIABLE: debug.enabled}
    for variable, check in checks.items():
        try:
            check()
        except ValueError as exc:
            found[variable]["problem"] = str(exc)
    folder = state.directory()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        wrong = "cannot be written" if there.is_dir() else "is no folder"
        found[state.STATUS_DIR]["problem"] = f"{there} {wrong}: set {state.STATUS_DIR} to a folder of yours"
    return list(found.values())


def fit(patches: PatchSet) -> dict:
    """Whether the patch would fit the installed host, and reach its worker processes. Imports the host."""
    if not any(installed()[name] for name in patches.hosts):
        return {"installed": False, "misfits": [], "unreached_children": []}
    with contextlib.redirect_stdout(sys.stderr):  # hosts log on import
        misfits = patches.verify()
    return {"installed": True, "misfits": misfits, "unreached_children": patches.unreached_children()}


def status_files() -> tuple[list[dict], list[str]]:
    """The statuses of live processes, and what is wrong with other files of the folder."""
    found, problems = [], []
    for path, status in state.files():
        if status is not None and all(_is_status(status[patches.key]) for patches in PATCHES if patches.key in status):
            found.append(status)
        else:
            another = f"remove it, or set {state.STATUS_DIR} to another folder"
            problems.append(f"{path} is no status file of this version of the library: {another}")
    return found, problems


def _is_status(status: object) -> bool:
    return isinstance(status, dict) and status.keys() >= STATUS_FIELDS


def process_problems(processes: list[dict], name: str) -> list[str]:
    """What is wrong in the patched processes of a host: refusals, errors, and targets that never fired in any."""
    problems = []
    patched: dict[str, int] = {}
    for process in processes:
        status = process.get(name, {})
        if status.get("patched") is False and status["reasons"] != [UNPATCHED]:
            problems.append(f"process {process['pid']} runs {name} unpatched: {'; '.join(status['reasons'])}")
        for op, errors in status.get("counters", {}).get("error", {}).items():
            problems.append(f"process {process['pid']}: {op} raised {_counts(errors)}")
        if status.get("patched"):
            for target, fired in status["targets"].items():
                if fired or target in status["never_fired"]:
                    patched[target] = patched.get(target, 0) + fired
    problems += [f"{target} is patched but has fired in no process" for target, fired in patched.items() if not fired]
    return problems


def config_files(gpu_names: list[str]) -> list[dict]:
    """The files of tuned launch parameters that fit these GPUs, in the order in which they are asked."""
    kinds = (*lora.KINDS, *moe.KINDS)
    try:
        return [file for gpu in dict.fromkeys(gpu_names) for file in store.available(gpu, kinds)]
    except ValueError:  # the variable's own problem
        return []


def examine() -> dict:
    """Everything that the doctor knows, as plain data; "problems" lists what is wrong."""
    found_gpus = gpus()
    processes, foreign_files = status_files()
    report = {
        "installed": installed(),
        "gpus": found_gpus,
        "environment": environment(),
        "fit": {patches.key: fit(patches) for patches in PATCHES},
        "configs": config_files([gpu["name"] for gpu in found_gpus]),
        "status_folder": str(state.directory()),
        "processes": processes,
    }
    problems = [variable["problem"] for variable in report["environment"] if variable["problem"]]
    problems += foreign_files
    for name, found in report["fit"].items():
        problems += [f"{name} cannot be patched: {reason}" for reason in found["misfits"]]
        problems += [f"{name}'s worker processes would stay unpatched: {r}" for r in found["unreached_children"]]
        problems += process_problems(report["processes"], name)
    problems += [f"{problem}: it is left out" for file in report["configs"] for problem in file["problems"]]
    return report | {"problems": list(dict.fromkeys(problems))}


def show(report: dict, console: Console) -> None:
    """Print a report as tables."""
    table = Table("software", "version", title="Installed", title_justify="left")
    for name, version in report["installed"].items():
        table.add_row(name, version or "[dim]not installed")
    for gpu in report["gpus"] or [{"name": "[dim]none found"}]:
        table.add_row("GPU", ", ".join(gpu.values()))
    console.print(table)

    table = Table("variable", "value", "meaning", title="Environment", title_justify="left")
    for variable in report["environment"]:
        value = "[dim]not set" if variable["value"] is None else escape(repr(variable["value"]))
        table.add_row(variable["name"], f"[red]{value}" if variable["problem"] else value, variable["meaning"])
    console.print(table)

    table = Table("patch", "fits", "worker processes follow", title="Patch", title_justify="left")
    for name, found in report["fit"].items():
        if found["installed"]:
            table.add_row(name, _yes(not found["misfits"]), _yes(not found["unreached_children"]))
        else:
            table.add_row(name, "[dim]not installed", "")
    console.print(table)

    show_configs(report, console)

    columns = ("pid", "patch", "host", "patched", "fired", "hit", "fallback", "error")
    table = Table(*columns, title=f"Processes (status files in {report['status_folder']})", title_justify="left")
    for process in report["processes"]:
        for name in report["fit"]:
            if name in process:
                table.add_row(*_process_row(process["pid"], name, process[name]))
    if not table.rows:
        table.add_row("[dim]none", *[""] * (len(columns) - 1))
    console.print(table)

    for problem in report["problems"]:
        console.print(f"[red]problem:[/] {escape(problem)}", soft_wrap=True)
    if not report["problems"]:
        console.print("[green]nothing is wrong")


def show_configs(report: dict, console: Console) -> None:
    """Which launch parameters processes run with, and why; where none has run yet, the files that would be asked."""
    used = []
    for process in report["processes"]:
        statuses = [process[name] for name in report["fit"] if name in process]  # all have the choices of the process
        used += [(process["pid"], choice) for choice in (statuses[-1].get("configs", []) if statuses else [])]
    if used:
        title = "Launch parameters in use"
        table = Table("pid", "shape", "rank", "rows", "from", "why", title=title, title_justify="left")
        for pid, choice in used:
            rows = " ".join(map(str, choice["rows"]))
            source = choice["path"] if choice["source"] != "default" else "analytic default"
            table.add_row(str(pid), choice["shape"], str(choice["rank"]), rows, escape(source), choice["reason"])
    else:
        title = "Files of launch parameters for these GPUs; without one, analytic defaults"
        table = Table("file", "found by", "ranks", "entries", "triton", title=title, title_justify="left")
        for file in report["configs"]:
            ranks = " ".join(map(str, file["ranks"]))
            triton = file["metadata"].get("triton", "?")
            table.add_row(escape(file["path"]), file["source"], ranks, str(file["entries"]), triton)
        if not table.rows:
            table.add_row("[dim]none", *[""] * 4)
    console.print(table)


def _process_row(pid: int, name: str, status: dict) -> list[str]:
    counts = status["counters"]
    fallbacks = [f"{op} {_counts(reasons)}" for op, reasons in counts["fallback"].items()]
    errors = [f"{op} {_counts(types)}" for op, types in counts["error"].items()]
    fired = [f"{target.rpartition('.')[2]} {count}" for target, count in status["targets"].items()]
    host = f"{status['host'] or name} {status['version'] or ''}"
    hits = [f"{op} {count}" for op, count in counts["hit"].items()]
    cells = (escape("\n".join(lines)) for lines in (fired, hits, fallbacks, errors))
    return [str(pid), name, host, _yes(status["patched"]), *cells]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {detail}" for detail, count in counts.items())


def _yes(value: bool) -> str:
    return "[green]yes" if value else "[red]no"


def main(module: str = "lora_ops.doctor") -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console(highlight=False))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
