"""What a run shows: its curves and samples on a page, and all that is needed to repeat it.

    loss.png       training and validation loss over tokens
    report.html    everything on one page that loads nothing: no network, no other file
    run.json       for each start and resume of the run: step, command, flags, config, environment

train.py makes them in the run's directory from its metrics.jsonl and samples.txt. Several runs in one
picture:

    python train.py --compare runs/a runs/b        a table; compare.html and compare.png
"""

import json
import math
import platform
import re
from html import escape
from pathlib import Path

import numpy as np
import torch

from engine import cpu, parallel
from engine.charts import HUES, Curve, chart, page, settled, table, usual
from engine.options import NO_EFFECT
from engine.progress import duration
from formats import atomic
from formats.quantities import short

ROWS = 20_000  # most steps that are read from metrics.jsonl, evenly spaced
SAMPLES = 20  # most earlier samples that are shown
CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
    "mfu": "MFU, the share of the device's peak",
}
NO_CURVE = {"step", "tokens", "seconds", "skipped"}


def describe_run(
    *,
    model: str,
    data: str,
    guess: str | None,
    n_params: int,
    n_active: int,
    n_trained: int,
    steps: int,
    tokens_per_step: int,
    epochs: float,
    flops: float,
    device: str,
    minutes: float,
    step: int,
) -> list[str]:
    """Return what is printed before a run: what is trained on what, and how long it takes.

    data: the data set and its size. guess: how good a trivial guess is, None if there is none. n_active:
    parameters that one token uses; n_trained: those that learn. flops: of the whole run. minutes: from `step`
    to the end on `device`.
    """
    part = ""
    if n_trained < n_params:
        part = f", {n_trained:,} of them trained ({n_trained / n_params:.2%})"
    elif n_active < n_params:
        part = f", {n_active:,} of them active"
    n_tokens = steps * tokens_per_step
    per_parameter = f", {n_tokens / n_params:.2f} tokens per parameter (Chinchilla: 20)"
    return [
        f"model  {model}, {n_params:,} parameters{part}",
        f"data   {data}",
        *([f"guess  {guess}"] if guess else []),
        f"run    {steps:,} steps of {tokens_per_step:,} tokens: {n_tokens:,}, {epochs:.2f} epochs",
        f"cost   {flops:.2e} FLOPs{per_parameter if n_trained == n_params else ''}",
        f"here   {device}, about {minutes:.1f} min from step {step}",
    ]


def environment() -> dict:
    """Return what a run's speed and the last bits of its numbers depend on besides its flags: strings,
    numbers, and None for what is missing."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": triton and triton.__version__,
        "system": platform.platform(),
        "cpu": cpu.name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
    }


def record_start(out: Path, start: dict, resumed: bool) -> None:
    """Append a start to run.json in `out`; replace the file unless the run was resumed.

    start: step; command, one line; flags, a dict with the defaults filled in; config, the model's, a dict;
    n_params; environment.
    """
    earlier = read_starts(out) if resumed else []
    with atomic.replace_file(out / "run.json") as new:
        new.write_text(json.dumps({"starts": [*earlier, start]}, indent=2, default=str) + "\n")


def read_starts(out: Path) -> list[dict]:
    """Return the starts in run.json, the latest last. If the file is missing or damaged, return none: no run
    should end because of that."""
    try:
        return json.loads((out / "run.json").read_text())["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def read_rows(out: Path) -> tuple[list[dict], list[dict]]:
    """Return (steps, evaluations) of metrics.jsonl: at most ROWS steps, every n-th up to the last one."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in lines if '"val_loss"' in line]
    steps = [line for line in lines if '"val_loss"' not in line]
    stride = 1 + len(steps) // ROWS
    return parsed(steps[(len(steps) - 1) % stride :: stride], "loss"), parsed(evaluations, "val_loss")


def parsed(lines: list[str], key: str) -> list[dict]:
    """Return the rows that have this key, a step and tokens (those of posttraining/classify.py have none)."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line: it is being written, or the run was killed
        if row.keys() >= {key, "step", "tokens"}:
            rows.append(row)
    return rows


def column(rows: list[dict], key: str) -> np.ndarray:
    """Return the values of a key (n,), NaN where a row has no finite number."""
    values = np.array([row.get(key) for row in rows], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def loss_title(evaluations: list[dict]) -> str:
    """Return "loss" with its unit, or without one where it is a sum of losses of different kinds."""
    several = any("val_mlm_loss" in row for row in evaluations)
    return "loss" if several else "loss (nats per token)"


def loss_curves(steps: list[dict], evaluations: list[dict], key: str = "loss") -> list[Curve]:
    """Return the curves of a metric in training and validation."""
    return [
        Curve("training", HUES[0], column(steps, "tokens"), column(steps, key)),
        Curve("validation", HUES[1], column(evaluations, "tokens"), column(evaluations, f"val_{key}"), True),
    ]


def draw_loss(out: Path) -> None:
    """Draw loss.png of the run in `out`: training and validation loss over tokens."""
    steps, evaluations = read_rows(out)
    pyplot, ticks = plotting()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes, loss_curves(steps, evaluations), ticks, width=1.2)
    axes.set(xlabel="tokens", ylabel=loss_title(evaluations))
    axes.legend()
    save_figure(figure, out / "loss.png")


def plotting():
    """Return matplotlib.pyplot without a display, and the formatter of ticks. Imported late: it is slow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    return pyplot, EngFormatter


def draw(axes, curves: list[Curve], ticks: type, width: float) -> None:
    """Draw curves with lines of a width in points."""
    for curve in curves:
        style = "o-" if curve.dots else "-"
        axes.plot(curve.x, curve.y, style, label=curve.label, markersize=4, linewidth=width)
    axes.xaxis.set_major_formatter(ticks())
    axes.grid(alpha=0.3)


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and free it."""
    from matplotlib import pyplot

    with atomic.replace_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)


def figures(steps: list[dict], evaluations: list[dict]) -> dict[str, str]:
    """Return the figures of a run at its last row, by name."""
    found = {}
    if evaluations:
        losses = column(evaluations, "val_loss")
        found["validation loss"] = f"{losses[-1]:.4f}"
        found["best so far"] = f"{np.fmin.reduce(losses):.4f}"
        for key, value in evaluations[-1].items():
            if key not in ("val_loss", *NO_CURVE):
                name = key.replace("val_", "validation ").replace("_", " ")
                found[name] = short(math.nan if value is None else value, 4)
    if steps:
        last = steps[-1]
        found["training loss"] = f"{column(steps, 'loss')[-1]:.4f}"
        found["tokens per second"] = f"{last['tokens'] / last['seconds']:,.0f}"  # mean of the whole run
        if last["mfu"] is not None:
            found["MFU"] = f"{last['mfu']:.1%}"
    return found


def write(out: Path) -> None:
    """Write report.html of the run in `out`, from metrics.jsonl and, where they exist, samples.txt and
    run.json."""
    steps, evaluations = read_rows(out)
    starts = read_starts(out)
    title = out.resolve().name
    if starts:
        flags = starts[-1]["flags"]
        title = f"{flags['model']} {flags['size'] or flags['init_from']}"
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>\n"
        for label, value in figures(steps, evaluations).items()
    )
    parts = [
        f'<p class="lede">{summary(steps, evaluations, starts)}</p>\n<dl>\n{tiles}</dl>\n',
        f'<div class="charts">\n{charts(steps, evaluations)}</div>\n',
        samples(out),
        settings(starts),
    ]
    with atomic.replace_file(out / "report.html") as new:
        new.write_text(page(title, *parts), encoding="utf-8")


def summary(steps: list[dict], evaluations: list[dict], starts: list[dict]) -> str:
    """Return one line: size of the model, and how far the run is."""
    start = {"step": 0, "tokens": 0}
    last = max([*steps[-1:], *evaluations[-1:]], key=lambda row: row["step"], default=start)
    parts = [f"{starts[-1]['n_params']:,} parameters"] if starts else []
    parts.append(f"step {last['step']:,}" + (f" of {int(starts[-1]['flags']['steps']):,}" if starts else ""))
    parts.append(f"{short(last['tokens'])} tokens")
    if steps:
        parts.append(f"{duration(steps[-1]['seconds'])} of training")
        parts.append(f"{steps[-1]['skipped']:,} updates skipped")
    return ", ".join(parts)


def charts(steps: list[dict], evaluations: list[dict]) -> str:
    """Return the charts in HTML: the loss, the model's other metrics, and the course of the training."""
    curves = loss_curves(steps, evaluations)
    html = chart(loss_title(evaluations).capitalize(), curves, high=settled(curves), kind="wide")
    for key in steps[-1] if steps else ():
        if key not in ("loss", *CHARTS, *NO_CURVE):
            html += chart(key.replace("_", " ").capitalize(), loss_curves(steps, evaluations, key))
    for key, title in CHARTS.items():
        curve = Curve("at the end", HUES[2], column(steps, "tokens"), column(steps, key))
        html += chart(title, [curve], low=0.0, high=usual(curve.y))
    return html


def samples(out: Path) -> str:
    """Return samples.txt in HTML: the last sample, and some earlier ones folded up, the latest first."""
    if not (out / "samples.txt").is_file():
        return ""
    text = (out / "samples.txt").read_text(encoding="utf-8", errors="replace")
    _, *parts = re.split(r"^=== (step \d+.*)\n", text, flags=re.MULTILINE)
    shown = [
        (escape(heading), f"<pre>{escape(sample.rstrip())}</pre>")
        for heading, sample in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not shown:
        return ""
    heading, sample = shown.pop()
    html = f"<h2>Sample at {heading}</h2>\n{sample}\n"
    for i in np.linspace(len(shown) - 1, 0, min(len(shown), SAMPLES)).astype(int):
        heading, sample = shown[i]
        html += f"<details><summary>{heading}</summary>{sample}</details>\n"
    if len(shown) > SAMPLES:
        html += f"<p>These are {SAMPLES} of {len(shown):,} earlier ones; samples.txt has all.</p>\n"
    return html


def settings(starts: list[dict]) -> str:
    """Return config, flags and starts of a run in HTML; the last start is unfolded."""
    if not starts:
        return ""
    tables = (("Model", starts[-1]["config"]), ("Flags", starts[-1]["flags"]))
    both = "".join(f"<div><h2>{of}</h2>\n{table(list(t.items()))}</div>\n" for of, t in tables)
    html = f'<div class="columns">\n{both}</div>\n<h2>Started</h2>\n'
    for start in starts:
        how = f"<pre>{escape(start['command'])}</pre>\n{table(list(start['environment'].items()))}"
        opened = " open" if start is starts[-1] else ""
        html += f"<details{opened}><summary>from step {start['step']:,}</summary>\n{how}</details>\n"
    return html


# --- comparison of runs


def compare(directories: list[Path], out: Path = Path()) -> str:
    """Draw the curves of runs over each other, as compare.html and compare.png in `out`. Return what is to be
    printed: the results of each run, the flags in which they differ, and the paths of the pictures.

    Raises ValueError for fewer than two different directories, and for one that holds no run.
    """
    runs = read_runs(directories)
    starts = {name: read_starts(Path(name)) for name in runs}
    results = results_of(runs, starts)
    flags = {name: started[-1]["flags"] for name, started in starts.items() if started}
    differing = differing_flags(flags)
    unknown = [f"{name}: no run.json, so its flags are not known" for name in runs if name not in flags]

    # The page and the picture.
    curves = comparison_curves(runs)
    html = "".join(
        chart(f"{title} loss over {over}", lines, over=over, high=settled(lines), band=False)
        for (title, over), lines in curves.items()
    )
    parts = [f'<div class="charts">\n{html}</div>\n<h2>Results</h2>\n', table(results)]
    if flags:
        parts.append(f"<h2>Flags in which they differ</h2>\n{table(differing)}")
    parts += [f"<p>{escape(line)}</p>\n" for line in unknown]
    out.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(out / "compare.html") as new:
        new.write_text(page("Runs compared", *parts), encoding="utf-8")
    draw_comparison(curves, out)

    printed = [aligned(results), *([aligned(differing)] if flags else ()), *unknown]
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


def results_of(runs: dict, starts: dict) -> list[tuple[str, ...]]:
    """Return a table of the runs' sizes and results, its first row the headings."""
    rows = [("run", "parameters", "tokens", "time", "tokens/s", "validation loss", "best")]
    for name, (steps, evaluations) in runs.items():
        n_params = f"{starts[name][-1]['n_params']:,}" if starts[name] else "-"
        tokens = short(max(row["tokens"] for row in (*steps[-1:], *evaluations[-1:])))
        time = duration(steps[-1]["seconds"]) if steps else "-"
        found = figures(steps, evaluations)
        wanted = ("tokens per second", "validation loss", "best so far")
        rows.append((name, n_params, tokens, time, *(found.get(key, "-") for key in wanted)))
    return rows


def differing_flags(flags: dict[str, dict]) -> list[tuple[str, ...]]:
    """Return a table of the flags that are not the same in all runs, without those that compute nothing
    else."""
    rows = [("flag", *flags)]
    for flag in sorted(set().union(*flags.values()) - NO_EFFECT):
        values = [str(given.get(flag, "-")) for given in flags.values()]
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
    """Return the seconds of training (n,) before each row. Rows of evaluations do not hold them: interpolate
    between those of steps."""
    known = [{"step": 0, "seconds": 0.0}, *steps]
    return np.interp(column(rows, "step"), column(known, "step"), column(known, "seconds"))


def comparison_curves(runs: dict) -> dict[tuple[str, str], list[Curve]]:
    """Return the curves of each chart by (kind of loss, what it is over)."""
    charts = {}
    for title, key in (("Validation", "val_loss"), ("Training", "loss")):
        for over in ("tokens", "seconds"):
            charts[title, over] = []
            for i, (name, (steps, evaluations)) in enumerate(runs.items()):
                rows = evaluations if key == "val_loss" else steps
                x = column(rows, "tokens") if over == "tokens" else seconds_of(rows, steps)
                hue = HUES[i % len(HUES)]
                charts[title, over].append(Curve(name, hue, x, column(rows, key), key == "val_loss"))
    return charts


def draw_comparison(curves: dict[tuple[str, str], list[Curve]], out: Path) -> None:
    """Draw the charts of compare.html as compare.png."""
    pyplot, ticks = plotting()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ((title, over), lines), axis in zip(curves.items(), axes.flat, strict=True):
        draw(axis, lines, ticks, width=1)
        axis.set(xlabel=over, ylabel=f"{title.lower()} loss")
        axis.set_ylim(top=settled(lines))
    axes[0, 0].legend(fontsize="small")
    save_figure(figure, out / "compare.png")
