"""Comparison of runs: their curves over each other, their results, and the flags in which they differ.

    python train.py --compare runs/a runs/b        a table; compare.html and compare.png

Two losses can be compared only if they are of the same predictions. Runs of the same task on the same
held-out tokens are compared in nats per token. If only their tokenizers differ, they are compared in bits per
byte of the same text. If the texts or the tasks differ, the losses are shown and not ranked.
"""

from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from engine.charts import HUES, Curve, chart, page, settled, table
from engine.options import NO_EFFECT
from engine.progress import duration
from engine.report import column, draw, formatted, read_rows, read_starts, unit_of
from formats import atomic
from formats.figures import load_pyplot, save_figure
from formats.quantities import short


def compare(directories: list[Path], out: Path = Path()) -> str:
    """Draw the curves of runs over each other, as compare.html and compare.png in `out`. Return what is to be
    printed: the results of each run, the flags in which they differ, and the paths of the pictures.

    Raises ValueError for fewer than two different directories, and for one that holds no run.
    """
    runs = read_runs(directories)
    starts = {name: read_starts(Path(name)) for name in runs}
    key, verdict = comparable(starts)
    results = results_of(runs, starts, key)
    flags = {name: started[-1]["flags"] for name, started in starts.items() if started}
    differing = differing_flags(flags)
    unknown = [f"{name}: no run.json, so its flags are not known" for name in runs if name not in flags]

    # The page and the picture.
    loss = partial(formatted, "loss")
    unit = " or ".join(sorted({unit_of(started) for started in starts.values()}))
    curves = comparison_curves(runs, unit)
    html = "".join(
        chart(f"{title} loss over {over}", lines, over=over, high=settled(lines), band=False, text=loss)
        for (title, over), lines in curves.items()
    )
    parts = [f'<p class="lede">{verdict}</p>\n<div class="charts">\n{html}</div>\n<h2>Results</h2>\n']
    parts.append(table(results, headed=True))
    if flags:
        parts.append(f"<h2>Flags in which they differ</h2>\n{table(differing)}")
    parts += [f"<p>{escape(line)}</p>\n" for line in unknown]
    out.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(out / "compare.html") as new:
        new.write_text(page("Runs compared", *parts), encoding="utf-8")
    draw_comparison(curves, out)

    printed = [aligned(results), verdict, *([aligned(differing)] if flags else ()), *unknown]
    return "\n\n".join([*printed, f"curves: {out / 'compare.html'}    {out / 'compare.png'}"])


def read_runs(directories: list[Path]) -> dict[str, tuple[list[dict], list[dict]]]:
    """Return (steps, evaluations) of each run by its directory. ValueError as from `compare`."""
    names = list(dict.fromkeys(str(directory) for directory in directories))
    if len(names) < 2:
        raise ValueError(f"--compare {' '.join(names)}: expected two different runs or more")
    runs = {}
    for name in names:
        logged = (Path(name) / "metrics.jsonl").is_file()
        runs[name] = read_rows(Path(name)) if logged else ([], [])
        if not any(runs[name]):
            raise ValueError(f"--compare {name}: expected the --out of a run, with rows in its metrics.jsonl")
    return runs


def comparable(starts: dict[str, list[dict]]) -> tuple[str | None, str]:
    """Return the metric in which the runs can be compared, None if there is none, and a sentence about it."""
    last = [started[-1] if started else {} for started in starts.values()]
    fingerprints, texts, tasks = (
        {start.get(name) for start in last} for name in ("fingerprint", "text", "task")
    )
    if None in fingerprints | tasks:
        return None, "A run has not recorded its held-out data: the losses may be of different texts."
    if len(tasks) > 1:
        return None, f"The tasks differ ({', '.join(sorted(tasks))}): their losses cannot be compared."
    if len(fingerprints) == 1:
        return "val_loss", "All runs have the same held-out data: lower is better."
    if len(texts) == 1 and not texts & {"", None}:
        return (
            "bits_per_byte",
            "The held-out text is the same and its tokens differ: compare bits per byte, not the losses.",
        )
    return None, "The held-out data differ: neither losses nor bits per byte can be compared."


def results_of(runs: dict, starts: dict, key: str | None) -> list[tuple[str, ...]]:
    """Return a table of the runs' sizes and results, its first row the headings.

    key: the metric whose lowest value is shown, or None for no such column; it is from `comparable`."""
    unit = " or ".join(sorted({unit_of(started) for started in starts.values()}))
    rows = [["run", "parameters", unit, "time", f"{unit}/s", "validation loss", "bits per byte"]]
    if key is not None:
        rows[0].append(f"lowest {'loss' if key == 'val_loss' else 'bits'}")
    for name, (steps, evaluations) in runs.items():
        row = [name, f"{starts[name][-1]['n_params']:,}" if starts[name] else "-"]
        row.append(short(max(last["count"] for last in (*steps[-1:], *evaluations[-1:]))))
        row.append(duration(steps[-1]["seconds"]) if steps else "-")
        rate = steps[-1]["count"] / steps[-1]["seconds"] if steps else None
        row.append(formatted("rate", rate) if steps else "-")
        for metric in ("val_loss", "bits_per_byte"):
            known = [found[metric] for found in evaluations if metric in found]
            row.append(formatted("loss", known[-1]) if known else "-")
        if key is not None:
            values = column([found for found in evaluations if key in found], key)
            row.append(formatted("loss", np.fmin.reduce(values)) if len(values) else "-")
        rows.append(row)
    return [tuple(row) for row in rows]


def differing_flags(flags: dict[str, dict]) -> list[tuple[str, ...]]:
    """Return a table of the flags that are not the same in all runs, without those of NO_EFFECT, which change
    no number that a run computes."""
    rows = [("flag", *flags)]
    for flag in sorted(set().union(*flags.values()) - NO_EFFECT):
        values = [given.get(flag, "-") for given in flags.values()]
        values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(values)) > 1:
            rows.append((f"--{flag.replace('_', '-')}", *values))
    return rows if len(rows) > 1 else [("no flag differs",)]


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Return a table as lines of text, the first column flush left and the others flush right."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def seconds_of(rows: list[dict], steps: list[dict]) -> np.ndarray:
    """Return the seconds of training before each row, (n,). Rows of evaluations do not hold them, so they are
    interpolated between the rows of steps."""
    known = [{"step": 0, "seconds": 0.0}, *steps]
    return np.interp(column(rows, "step"), column(known, "step"), column(known, "seconds"))


def comparison_curves(runs: dict, unit: str) -> dict[tuple[str, str], list[Curve]]:
    """Return the curves of each chart by (kind of loss, what it is over: the runs' unit, or seconds)."""
    charts = {}
    for title, key in (("Validation", "val_loss"), ("Training", "loss")):
        for over in (unit, "seconds"):
            charts[title, over] = []
            for i, (name, (steps, evaluations)) in enumerate(runs.items()):
                rows = evaluations if key == "val_loss" else steps
                x = column(rows, "count") if over == unit else seconds_of(rows, steps)
                hue = HUES[i % len(HUES)]
                charts[title, over].append(Curve(name, hue, x, column(rows, key), key == "val_loss"))
    return charts


def draw_comparison(curves: dict[tuple[str, str], list[Curve]], out: Path) -> None:
    """Draw the charts of compare.html as compare.png."""
    figure, axes = load_pyplot().subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ((title, over), lines), axis in zip(curves.items(), axes.flat, strict=True):
        draw(axis, lines, width=1)
        axis.set(xlabel=over, ylabel=f"{title.lower()} loss")
        axis.set_ylim(top=settled(lines))
    axes[0, 0].legend(fontsize="small")
    save_figure(figure, out / "compare.png")
