"""The CSV of the MoE benchmark: its columns, the tables made from it, and the plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_baselines import HOSTS, IMPLS
from rich.console import Console
from rich.table import Table

COLUMNS = [
    *("model", "experts", "top_k", "hidden", "intermediate", "tokens", "routing", "dtype", "impl", "config"),
    *("us", "us_min", "us_max", "tflops", "floor_us", "max_rel_err", "gpu", "torch", "triton", "host_version"),
    *("commit", "date", "tolerance", "experts_touched"),
]
CASE = ("model", "dtype", "routing", "tokens")
NO_LOSS = 0.98
"""A case in which ours is slower than this times a host is a loss."""
COLOURS = {
    "ours": "#1b6ca8",
    "vllm": "#d95f02",
    "vllm_tuned": "#f2a65a",
    "sglang": "#1b9e77",
    "sglang_tuned": "#8fd0b5",
    "triton_kernels": "#7570b3",
    "deepgemm": "#444444",
}

Row = dict[str, str]


@dataclass(frozen=True)
class Bar:
    """What is asked: the geometric mean of (time of the fastest of `impls`) / ours over the cases that `of` picks."""

    name: str
    asked: float
    of: Callable[[int], bool]
    dtype: str = "bf16"
    impls: tuple[str, ...] = HOSTS


BARS = (
    Bar("1 to 8 tokens", 1.25, lambda tokens: tokens <= 8),
    Bar("1 to 64 tokens", 1.05, lambda tokens: tokens <= 64),
    Bar("128 to 1024 tokens", 1.15, lambda tokens: 128 <= tokens <= 1024),
    Bar("2048 tokens and more", 1.25, lambda tokens: tokens >= 2048),
    Bar("1024 tokens and more", 1.2, lambda tokens: tokens >= 1024, "fp8"),
    Bar("all", 1.0, lambda tokens: True, "fp8", ("deepgemm",)),
    Bar("all", 1.0, lambda tokens: True, "bf16", ("triton_kernels",)),
)
WHOLE_OP_TFLOPS = {"qwen3-30b-a3b": 580, "mixtral-8x7b": 660}
"""At least, in bf16 at 16384 tokens."""


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is about: a later row with the same key replaces an earlier one in tables and plots."""
    return tuple(row[column] for column in (*CASE, "impl"))


def cell(row: Row | None) -> str:
    if row is None:
        return "-"
    error = float(row["max_rel_err"])
    if not error <= float(row["tolerance"]):
        return "[red]failed[/]" if math.isnan(error) else f"[red]wrong: {error:.2g}[/]"
    return f"{float(row['us']):.1f}" if row["us"] else f"[green]ok[/] {error:.1e}"


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The newest row of each implementation, by case."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[column] for column in CASE), {})[row["impl"]] = row
    return cases


def lead(impls: dict[str, Row], others: Iterable[str]) -> float:
    """Time of the fastest of `others` over ours, NaN where one of the two is missing."""
    times = [float(impls[name]["us"]) for name in others if name in impls and impls[name]["us"]]
    ours = impls.get("ours", {}).get("us")
    return min(times) / float(ours) if ours and times else math.nan


def coloured(ratio: float, asked: float) -> str:
    return "-" if math.isnan(ratio) else f"[{'green' if ratio >= asked else 'red'}]{ratio:.2f}[/]"


def results_table(rows: list[Row]) -> Table:
    """A line for each case; `lead` is the time of the faster host over ours, losses are red."""
    timed = any(row["us"] for row in rows)
    names = [name for name in IMPLS if any(row["impl"] == name for row in rows)]
    title = "MoE layer: " + ("us a call, each beside a green check" if timed else "checks only, no timing")
    table = Table(title=title, title_justify="left")
    for column in CASE:
        table.add_column(column)
    extra = ("floor", "ours / floor", "ours TFLOP/s", "lead", "ours spread", "ours error") if timed else ()
    for column in (*names, *extra):
        table.add_column(column, justify="right")
    section = None
    for case, impls in by_case(rows).items():
        if section not in (None, case[:3]):
            table.add_section()
        section = case[:3]
        line = [*case, *(cell(impls.get(name)) for name in names)]
        ours = impls.get("ours")
        if ours and ours["us"]:
            us, floor = float(ours["us"]), float(ours["floor_us"])
            line += [f"{floor:.1f}", f"{us / floor:.2f}", f"{float(ours['tflops']):.0f}"]
            line += [coloured(lead(impls, HOSTS), NO_LOSS)]
            line += [f"{float(ours['us_min']):.1f}-{float(ours['us_max']):.1f}", f"{float(ours['max_rel_err']):.1e}"]
        table.add_row(*line)
    return table


def bar_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """(what, model, asked, reached, worst case, cases) of each bar: all models together, then one by one."""
    cases = by_case(rows)
    for bar in BARS:
        found: dict[str, list[tuple[float, str]]] = {}
        for (model, dtype, routing, tokens), impls in cases.items():
            ratio = lead(impls, bar.impls)
            if dtype == bar.dtype and bar.of(int(tokens)) and not math.isnan(ratio):
                found.setdefault(model, []).append((ratio, f"{model} {tokens} {routing}"))
        everything = [pair for pairs in found.values() for pair in pairs]
        over = "faster host" if bar.impls == HOSTS else ", ".join(bar.impls)
        for model, pairs in {"all models": everything, **(found if len(found) > 1 else {})}.items():
            if pairs:
                mean = statistics.geometric_mean(ratio for ratio, _ in pairs)
                worst, where = min(pairs)
                what = f"{bar.dtype}, {bar.name}, over {over}" if model == "all models" else ""
                numbers = (f"{bar.asked:.2f}", coloured(mean, bar.asked), f"{coloured(worst, NO_LOSS)} {where}")
                yield what, model, *numbers, str(len(pairs))
    for model, asked in WHOLE_OP_TFLOPS.items():
        reached = [
            (float(impls["ours"]["tflops"]), routing)
            for (name, dtype, routing, tokens), impls in cases.items()
            if (name, dtype, tokens) == (model, "bf16", "16384") and impls.get("ours", {}).get("us")
        ]
        for tflops, routing in reached:
            colour = "green" if tflops >= asked else "red"
            yield f"TFLOP/s at 16384 tokens, {routing}", model, str(asked), f"[{colour}]{tflops:.0f}[/]", "", "1"


def bars_table(rows: list[Row]) -> Table:
    table = Table(title="asked and reached: time of the other over ours, geometric mean", title_justify="left")
    for column in ("", "model", "asked", "reached", "worst", "cases"):
        table.add_column(column, justify="right" if column in ("asked", "reached", "cases") else "left")
    for line in bar_lines(rows):
        if line[0] and table.row_count:
            table.add_section()
        table.add_row(*line)
    return table


def losses(rows: list[Row]) -> list[str]:
    """Cases in which a host is faster by more than NO_LOSS allows, the worst first."""
    found = []
    for case, impls in by_case(rows).items():
        ratio = lead(impls, HOSTS)
        if ratio < NO_LOSS:
            fastest = min((float(impls[name]["us"]), name) for name in HOSTS if name in impls and impls[name]["us"])
            found.append((ratio, f"{' '.join(case)}: {ratio:.2f} of {fastest[1]}"))
    return [text for _, text in sorted(found)]


def show(rows: list[Row], folder: Path | None, console: Console) -> None:
    """The tables, and with a folder of timed rows the plots."""
    rows = list({key_of(row): row for row in rows}.values())
    console.print(results_table(rows))
    if not any(row["us"] for row in rows):
        return
    console.print(bars_table(rows))
    if slower := losses(rows):
        console.print(f"[red]{len(slower)} cases slower than a host:[/] " + "; ".join(slower))
    if folder is None:
        return
    try:
        written = draw(rows, folder)
    except ImportError as error:
        console.print(f"[yellow]no plots:[/] {error}")
        return
    for plot in written:
        console.print(str(plot))


def curve(
    cases: dict[tuple[str, ...], dict[str, Row]], panel: tuple[str, str, str], impl: str, kind: str
) -> list[tuple[int, float]]:
    """(tokens, time over that of ours, or over the floor) of one implementation on a (model, dtype, routing)."""
    points = []
    for case, impls in cases.items():
        row, ours = impls.get(impl), impls.get("ours")
        if case[:3] != panel or not (row and row["us"]) or (kind == "lead" and not (ours and ours["us"])):
            continue
        below = ours["us"] if kind == "lead" else row["floor_us"]
        points.append((int(case[3]), float(row["us"]) / float(below)))
    return sorted(points)


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Two plots of each dtype: times of the others over ours, and all times over the floor; a panel for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = by_case(rows)
    written = []
    for dtype in dict.fromkeys(case[1] for case in cases):
        panels = list(dict.fromkeys((model, routing) for model, found, routing, _ in cases if found == dtype))
        models, routings = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
        gpu = next(row["gpu"] for row in rows)
        for kind, label in (("lead", "time / ours"), ("floor", "time / floor")):
            size = (4.6 * len(models), 3.6 * len(routings) + 0.6)
            figure, grid = plt.subplots(len(routings), len(models), figsize=size, squeeze=False, sharey=True)
            figure.suptitle(f"MoE layer, {gpu}, {dtype}: {label}")
            for model, routing in panels:
                axes = grid[routings.index(routing)][models.index(model)]
                axes.set(title=f"{model}, {routing}", xlabel="tokens", ylabel=label, xscale="log", yscale="log")
                axes.title.set_fontsize(9)
                axes.grid(alpha=0.3, which="both", linewidth=0.4)
                axes.axhline(1, color="black", linewidth=0.8)
                for impl in IMPLS:
                    line = curve(cases, (model, dtype, routing), impl, kind)
                    if line and (kind, impl) != ("lead", "ours"):
                        axes.plot(*zip(*line, strict=True), "-o", markersize=3, color=COLOURS[impl], label=impl)
            handles = {}
            for axes in figure.axes:
                handles |= {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
            if handles:
                figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
            figure.tight_layout(rect=(0, 0.05, 1, 1))
            path = folder / f"ops_moe_{kind}_{dtype}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            written.append(path)
    return written
