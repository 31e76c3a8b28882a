"""The CSV of benchmarks/serving_vllm.py and serving_sglang.py, its table and its plots."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.table import Table

from ops_configs.files import replacing

LOAD = ["concurrency", "request_rate", "input_len", "output_len"]
SERVER = ["variant", "tp", "max_loras", "max_rank"]
TRAFFIC = ["adapters", "rank", "distribution"]
TIMES = ["ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms", "itl_ms", "itl_p99_ms"]
PLACE = ["model", "tp", "gpu", "versions"]
"""What two rows must share before their speeds may be compared."""
KEY = ["model", *SERVER, *TRAFFIC, *LOAD, "gpu", "versions"]
COLUMNS = ["model", *TRAFFIC, *LOAD, "variant", "output_tok_s", "input_tok_s", *TIMES, "retention"]
COLUMNS += ["tp", "max_loras", "max_rank", "requests", "duration_s", "start_s", "gpu", "versions", "commit", "date"]
TEXT = ["model", "distribution", "variant", "gpu", "versions", "commit", "date"]

COLOURS = {"base": "#888888", "stock": "#d95f02", "patched": "#1b6ca8"}
STYLES = {"uniform": "-", "zipf": "--", "one": ":", "none": "-."}


def read(path: Path) -> pd.DataFrame:
    """The rows so far, none where there is no file; columns as in COLUMNS.

    Raises:
        SystemExit: the file is not one of ours.
    """
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values={"retention": [""]})
    except ValueError as error:  # empty, no text or no table
        raise SystemExit(f"{path} cannot be read: {error}: move it away, or choose another --out") from error
    if missing := set(COLUMNS) - set(rows.columns):
        raise SystemExit(
            f"{path} lacks the columns {', '.join(sorted(missing))}: move it away, or choose another --out"
        )
    return rows[COLUMNS]


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of each measurement, whatever the commit."""
    return rows.drop_duplicates(KEY, keep="last")


def with_retention(rows: pd.DataFrame) -> pd.DataFrame:
    """`retention`: output tokens a second over those of the newest base row at the same load; empty where none is."""
    base = rows[rows["variant"] == "base"].drop_duplicates(PLACE + LOAD, keep="last")
    base = base.set_index(PLACE + LOAD)["output_tok_s"]
    found = base.reindex(pd.MultiIndex.from_frame(rows[PLACE + LOAD])).to_numpy(dtype=float)
    return rows.assign(retention=(rows["output_tok_s"].astype(float) / found).round(4))


def append(path: Path, row: dict) -> None:
    """Add a row and write the file anew, so that rows measured before their base get their retention too."""
    row = pd.DataFrame([row]).reindex(columns=COLUMNS)
    old = read(path)
    rows = with_retention(pd.concat([old, row], ignore_index=True) if len(old) else row)
    with replacing(path) as part:
        rows.to_csv(part, index=False, float_format="%.6g")


def table(rows: pd.DataFrame, title: str) -> Table:
    """Newest rows side by side: those of one load stand together, base first."""
    result = Table(title=title, title_justify="left")
    for name in ("load", "adapters", "variant", "max_loras"):
        result.add_column(name, justify="left" if name != "max_loras" else "right")
    for name in ("output tok/s", "input tok/s", "retention", "TTFT ms", "p99", "TPOT ms", "p99", "ITL ms", "p99"):
        result.add_column(name, justify="right")
    rows = newest(rows)
    rows = rows.assign(order=rows["variant"].map({name: i for i, name in enumerate(COLOURS)}))
    rows = rows.sort_values(["model", "tp", *LOAD, *TRAFFIC, "max_loras", "order"], kind="stable")
    for load, group in rows.groupby(["model", "tp", *LOAD], sort=False):
        model, tp, concurrency, rate, input_len, output_len = load
        at = f"{rate:g}/s" if concurrency == float("inf") else f"{concurrency:g} at once"
        name = f"{model} tp {tp}, {at}, {input_len}+{output_len}"
        for row in group.to_dict("records"):
            traffic = f"{row['distribution']} {row['adapters']} x r{row['rank']}" if row["adapters"] else "none"
            colour = {"patched": "bold", "base": "dim"}.get(row["variant"], "")
            cells = [name, traffic, row["variant"], str(row["max_loras"] or "-")]
            cells += [f"{row[column]:,.0f}" for column in ("output_tok_s", "input_tok_s")]
            cells.append("-" if pd.isna(row["retention"]) else f"{row['retention']:.1%}")
            result.add_row(*cells, *(f"{row[time]:,.2f}" for time in TIMES), style=colour)
            name = ""
        result.add_section()
    return result


def line(axes, rows: pd.DataFrame, x: str, y: str, label: str, variant: str, style: str = "-") -> None:
    rows = rows.sort_values(x)
    axes.plot(rows[x], rows[y], style, marker="o", markersize=4, color=COLOURS[variant], label=label)


def axes_of(title: str, x: str, y: str, ticks):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5))
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log")
    axes.title.set_fontsize(10)
    ticks = sorted(set(ticks))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3, linewidth=0.4)
    return figure, axes


def save(figure, axes, path: Path) -> Path:
    import matplotlib.pyplot as plt

    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw(path: Path) -> list[Path]:
    """Write the plots beside the CSV: retention by concurrency, TPOT by number of adapters and by rank; without LoRA
    output tokens/s and TPOT by concurrency.

    One of each kind for every model and tp (and adapters, rank, max_loras or load) that has two points or more.
    """
    rows = newest(read(path))
    closed = rows[rows["concurrency"] != float("inf")]
    written = []
    for (model, tp, gpu), part in closed.groupby(["model", "tp", "gpu"], sort=False):
        about, stem = f"{gpu}, {model}, tp {tp}", f"{path.stem}_{model}_tp{tp}"
        with_lora = part[(part["variant"] != "base") & (part["max_loras"] > 0)]
        adapted = with_lora[with_lora["adapters"] > 0]

        plain = part[part["max_loras"] == 0]
        for (tokens_in, tokens_out), same in plain.groupby(["input_len", "output_len"]):
            if same["variant"].nunique() < 2 or same["concurrency"].nunique() < 2:
                continue
            for column, label in (("output_tok_s", "output tokens/s"), ("tpot_ms", "ms per output token, median")):
                title = f"{about}: {tokens_in} + {tokens_out} tokens"
                figure, axes = axes_of(title, "requests at once", label, same["concurrency"])
                for variant, points in same.groupby("variant"):
                    line(axes, points, "concurrency", column, variant, variant)
                name = f"{stem}_{column.removesuffix('_ms')}_{tokens_in}+{tokens_out}.png"
                written.append(save(figure, axes, path.parent / name))

        for (adapters, rank, slots, tokens_in, tokens_out), same in adapted.dropna(subset=["retention"]).groupby(
            ["adapters", "rank", "max_loras", "input_len", "output_len"]
        ):
            if same["concurrency"].nunique() < 2:
                continue
            idle = with_lora[
                (with_lora["adapters"] == 0)
                & (with_lora["max_loras"] == slots)
                & (with_lora["input_len"] == tokens_in)
                & (with_lora["output_len"] == tokens_out)
            ]
            title = f"{about}: {adapters} adapters of rank {rank}, max_loras {slots}, {tokens_in} + {tokens_out} tokens"
            figure, axes = axes_of(title, "requests at once", "retention of output tokens/s", same["concurrency"])
            for (variant, distribution), points in pd.concat([same, idle]).groupby(["variant", "distribution"]):
                points = points.drop_duplicates("concurrency", keep="last")
                line(
                    axes,
                    points,
                    "concurrency",
                    "retention",
                    f"{variant}, {distribution}",
                    variant,
                    STYLES[distribution],
                )
            axes.axhline(1, color=COLOURS["base"], linewidth=1)
            name = f"{stem}_retention_{adapters}x{rank}_slots{slots}_{tokens_in}+{tokens_out}.png"
            written.append(save(figure, axes, path.parent / name))

        uniform = adapted[adapted["distribution"] == "uniform"]
        curves = (("adapters", ["rank", "max_loras", "max_rank"]), ("rank", ["adapters", "max_loras"]))
        for x, fixed in curves:
            for setting, same in uniform.groupby([*fixed, *LOAD]):
                if same[x].nunique() < 2:
                    continue
                values = dict(zip([*fixed, *LOAD], setting, strict=True))
                said = ", ".join(f"{name} {values[name]}" for name in fixed)
                title = f"{about}: {said}, {values['concurrency']:g} at once"
                figure, axes = axes_of(title, x, "ms per output token, median", same[x])
                for variant, points in same.groupby("variant"):
                    # A server that fits the rank, where another has room for more.
                    points = points.sort_values("max_rank").drop_duplicates(x, keep="first")
                    line(axes, points, x, "tpot_ms", variant, variant)
                at_load = (part[LOAD] == pd.Series({name: values[name] for name in LOAD})).all(axis=1)
                for value in part[at_load & (part["variant"] == "base")]["tpot_ms"].tail(1):
                    axes.axhline(value, color=COLOURS["base"], label="base")
                what = "_".join(f"{name}{values[name]}" for name in fixed)
                load = f"c{values['concurrency']:g}_{values['input_len']}+{values['output_len']}"
                written.append(save(figure, axes, path.parent / f"{stem}_tpot_by_{x}_{what}_{load}.png"))
    return written
