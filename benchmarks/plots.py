"""Plots from ops_lora.csv: how much faster ours is than each other implementation, and every time over the floor."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

SETTING = ["model", "dtype", "distribution", "cache"]
CASE = ["module", "rank", "tokens", "adapters"]
COLOURS = {
    "ours": "#1b6ca8",
    "vllm_default": "#d95f02",
    "vllm_tuned": "#f2a65a",
    "sglang_csgmv": "#1b9e77",
    "sglang_tuned": "#8fd0b5",
    "torch": "#888888",
}


def newest_times(path: Path) -> pd.DataFrame:
    """The last stored time of each implementation on each case."""
    rows = pd.read_csv(path).dropna(subset=["us"])
    return rows.drop_duplicates([*SETTING, *CASE, "impl"], keep="last")


def panels(table: pd.DataFrame, title: str, label: str):
    """A figure with a row for each rank and a column for each module; yields (axes, rows of that panel)."""
    ranks, modules = sorted(table["rank"].unique()), list(table["module"].unique())
    size = (5.2 * len(modules), 3.6 * len(ranks))
    figure, grid = plt.subplots(
        len(ranks), len(modules), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    figure.suptitle(title)
    parts = []
    for i, rank in enumerate(ranks):
        for j, module in enumerate(modules):
            axes = grid[i][j]
            part = table[(table["rank"] == rank) & (table["module"] == module)]
            part = part.pivot_table(index=["tokens", "adapters"], columns="impl", values="value").sort_index()
            axes.set_title(f"{module}, rank {rank}", fontsize=10)
            axes.set_yscale("log")
            axes.set_xticks(range(len(part)), [f"{t}/{a}" for t, a in part.index], rotation=60, fontsize=8)
            axes.grid(axis="y", alpha=0.3, which="both", linewidth=0.4)
            if j == 0:
                axes.set_ylabel(label)
            if i == len(ranks) - 1:
                axes.set_xlabel("tokens / adapters")
            parts.append((axes, part))
    return figure, parts


def save(figure, parts, path: Path) -> Path:
    handles = {label: h for axes, _ in parts for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw(folder: Path) -> list[Path]:
    """Write the plots of folder/ops_lora.csv beside it, one pair for each model, dtype, distribution and cache state.

    Raises:
        FileNotFoundError: there is no CSV in the folder.
    """
    table = newest_times(folder / "ops_lora.csv")
    written = []
    for setting, rows in table.groupby(SETTING, sort=False):
        name = "_".join(setting)
        title = f"LoRA shrink + expand, {rows['gpu'].iloc[-1]}, {', '.join(setting)}"

        ours = rows[rows["impl"] == "ours"].set_index(CASE)["us"]
        others = rows[rows["impl"] != "ours"].set_index(CASE)
        lead = others.assign(value=others["us"] / ours.reindex(others.index)).dropna(subset=["value"]).reset_index()
        if len(lead):
            figure, parts = panels(lead, f"{title}: time over ours", "time / ours")
            for axes, part in parts:
                impls = [impl for impl in COLOURS if impl in part]
                for i, impl in enumerate(impls):
                    places = [x + (i - (len(impls) - 1) / 2) * 0.8 / len(impls) for x in range(len(part))]
                    axes.bar(places, part[impl], 0.8 / len(impls), color=COLOURS[impl], label=impl)
                axes.axhline(1, color=COLOURS["ours"], linewidth=1.2)
            written.append(save(figure, parts, folder / f"ops_lora_lead_{name}.png"))

        over_floor = rows[rows["floor_us"] > 0].assign(value=rows["us"] / rows["floor_us"])
        figure, parts = panels(over_floor, f"{title}: time over the floor", "time / floor")
        for axes, part in parts:
            for impl in (impl for impl in COLOURS if impl in part):
                axes.plot(range(len(part)), part[impl], marker="o", markersize=3, color=COLOURS[impl], label=impl)
            axes.axhline(1, color="black", linewidth=0.8)
        written.append(save(figure, parts, folder / f"ops_lora_floor_{name}.png"))
    return written
