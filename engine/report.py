"""What a run shows of itself: its curves, what it wrote, and all that is needed to do it again.

    loss.png       training and validation loss over tokens
    report.html    everything on one page, which needs no network and no other file
    run.json       how the run was started and resumed: step, command, flags, config, environment of each time

`train.py` has them made in the run's directory, out of its metrics.jsonl and samples.txt. Two runs or more,
over each other:

    python train.py --compare runs/a runs/b        a table, and compare.html and compare.png
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
from formats import atomic
from formats.numbers import short

ROWS = 20_000  # of the steps in metrics.jsonl, the most that are read, evenly spaced
SAMPLES = 20  # the most of the earlier ones that are shown
CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
    "mfu": "MFU, the share of the device's peak",
}
NO_CURVE = {"step", "tokens", "seconds", "skipped"}
# Flags that change nothing of what a run computes.
NO_DIFFERENCE = {"out", "resume", "watch", "compare", "cache", "log_every", "save_every", "eval_every"}


def environment() -> dict:
    """What a run's speed, and the last bits of its numbers, depend on besides its flags: strings, counts, and
    None for what is not there."""
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
    """Add a start to run.json in `out`, or begin the file anew if it is the first.

    start: step; command, one line; flags, a dict with the defaults filled in; config, the model's, a dict;
    n_params; environment.
    """
    earlier = read_starts(out) if resumed else []
    with atomic.replace_file(out / "run.json") as new:
        new.write_text(json.dumps({"starts": [*earlier, start]}, indent=2, default=str) + "\n")


def read_starts(out: Path) -> list[dict]:
    """Those in run.json, the last one last; none if it is missing or damaged, for which no run should end."""
    try:
        return json.loads((out / "run.json").read_text())["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def read_rows(out: Path) -> tuple[list[dict], list[dict]]:
    """(steps, evaluations) in metrics.jsonl; of more than ROWS steps every so many, up to the last."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in lines if '"val_loss"' in line]
    steps = [line for line in lines if '"val_loss"' not in line]
    stride = 1 + len(steps) // ROWS
    return parsed(steps[(len(steps) - 1) % stride :: stride], "loss"), parsed(evaluations, "val_loss")


def parsed(lines: list[str], key: str) -> list[dict]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line: the run is writing it, or was killed
        if row.keys() >= {key, "step", "tokens"}:  # posttraining/classify.py's rows have no tokens
            rows.append(row)
    return rows


def column(rows: list[dict], key: str) -> np.ndarray:
    """(n,): NaN where a row has no finite number."""
    values = np.array([row.get(key) for row in rows], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def loss_title(evaluations: list[dict]) -> str:
    several = any("val_mlm_loss" in row for row in evaluations)  # losses added up, not nats of a token
    return "loss" if several else "loss (nats per token)"


def plot(out: Path) -> None:
    """loss.png of the run in `out`: training and validation loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    steps, evaluations = read_rows(out)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in loss_curves(steps, evaluations):
        style = "o-" if curve.dots else "-"
        axes.plot(curve.x, curve.y, style, label=curve.label, markersize=4, linewidth=1.2)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="tokens", ylabel=loss_title(evaluations))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic.replace_file(out / "loss.png") as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)


def loss_curves(steps: list[dict], evaluations: list[dict], key: str = "loss") -> list[Curve]:
    return [
        Curve("training", HUES[0], column(steps, "tokens"), column(steps, key)),
        Curve("validation", HUES[1], column(evaluations, "tokens"), column(evaluations, f"val_{key}"), True),
    ]


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def figures(steps: list[dict], evaluations: list[dict]) -> dict[str, str]:
    """Where a run stands, by name."""
    found = {}
    if evaluations:
        losses = column(evaluations, "val_loss")
        found["validation loss"] = f"{losses[-1]:.4f}"
        found["best so far"] = f"{np.fmin.reduce(losses):.4f}"
        for key, value in evaluations[-1].items():
            if key not in ("val_loss", *NO_CURVE):
                found[key.replace("val_", "validation ").replace("_", " ")] = short(value, 4)
    if steps:
        last = steps[-1]
        found["training loss"] = f"{last['loss']:.4f}"
        found["tokens per second"] = f"{last['tokens'] / last['seconds']:,.0f}"  # of the whole run
        if last["mfu"] is not None:
            found["MFU"] = f"{last['mfu']:.1%}"
    return found


def samples(out: Path) -> str:
    """What samples.txt has, in HTML: the last, and folded up some earlier ones, the latest first."""
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


def write(out: Path) -> None:
    """report.html of the run in `out`: of metrics.jsonl and, if there are, samples.txt and run.json."""
    steps, evaluations = read_rows(out)
    starts = read_starts(out)
    flags = starts[-1]["flags"] if starts else {}
    title = f"{flags['model']} {flags['size'] or flags['init_from']}" if starts else out.resolve().name

    last = max(
        [*steps[-1:], *evaluations[-1:]], key=lambda row: row["step"], default={"step": 0, "tokens": 0}
    )
    told = [f"{starts[-1]['n_params']:,} parameters"] if starts else []
    told.append(f"step {last['step']:,}" + (f" of {int(flags['steps']):,}" if starts else ""))
    told.append(f"{short(last['tokens'])} tokens")
    if steps:
        told.append(f"{duration(steps[-1]['seconds'])} of training")
        told.append(f"{steps[-1]['skipped']:,} updates skipped")
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>\n"
        for label, value in figures(steps, evaluations).items()
    )

    curves = loss_curves(steps, evaluations)
    charts = chart(loss_title(evaluations).capitalize(), curves, high=settled(curves), kind="wide")
    for key in steps[-1] if steps else ():
        if key not in ("loss", *CHARTS, *NO_CURVE):  # what this model measures besides
            charts += chart(key.replace("_", " ").capitalize(), loss_curves(steps, evaluations, key))
    for key, measured in CHARTS.items():
        curve = Curve("at the end", HUES[2], column(steps, "tokens"), column(steps, key))
        charts += chart(measured, [curve], low=0.0, high=usual(curve.y))

    parts = [
        f'<p class="lede">{", ".join(told)}</p>\n<dl>\n{tiles}</dl>\n<div class="charts">\n{charts}</div>\n'
    ]
    parts.append(samples(out))
    if starts:
        tables = (("Model", starts[-1]["config"]), ("Flags", flags))
        both = "".join(f"<div><h2>{of}</h2>\n{table(list(t.items()))}</div>\n" for of, t in tables)
        parts.append(f'<div class="columns">\n{both}</div>\n<h2>Started</h2>\n')
    for start in starts:
        how = f"<pre>{escape(start['command'])}</pre>\n{table(list(start['environment'].items()))}"
        opened = " open" if start is starts[-1] else ""
        parts.append(f"<details{opened}><summary>from step {start['step']:,}</summary>\n{how}</details>\n")
    with atomic.replace_file(out / "report.html") as new:
        new.write_text(page(title, *parts), encoding="utf-8")


def seconds_of(rows: list[dict], steps: list[dict]) -> np.ndarray:
    """(n,): the seconds of training before each row, which evaluations do not know themselves."""
    known = [{"step": 0, "seconds": 0.0}, *steps]
    return np.interp(column(rows, "step"), column(known, "step"), column(known, "seconds"))


def compare(directories: list[Path], out: Path = Path()) -> str:
    """Draw runs over each other, as compare.html and compare.png in `out`, and return what is to be printed:
    what came of each, the flags in which they differ, and where the pictures are.

    Raises ValueError for fewer than two different directories, and for one that holds no run.
    """
    names = list(dict.fromkeys(str(directory) for directory in directories))
    if len(names) < 2:
        raise ValueError(f"--compare {' '.join(names)}: expected two different runs or more")
    runs = {}
    for name in names:
        logged = (Path(name) / "metrics.jsonl").is_file()
        runs[name] = read_rows(Path(name)) if logged else ([], [])
        if not any(runs[name]):
            raise ValueError(f"--compare {name}: expected the --out of a run, with rows in its metrics.jsonl")
    starts = {name: read_starts(Path(name)) for name in names}
    results = results_of(runs, starts)
    flags = {name: begun[-1]["flags"] for name, begun in starts.items() if begun}
    differing = differing_flags(flags)
    unknown = [f"{name}: without run.json its flags are not known" for name in runs if name not in flags]

    curves = overlaid(runs)
    charts = [
        chart(f"{title} loss over {over}", lines, over=over, high=settled(lines), band=False)
        for (title, over), lines in curves.items()
    ]
    parts = [f'<div class="charts">\n{"".join(charts)}</div>\n<h2>Results</h2>\n', table(results)]
    if flags:
        parts.append(f"<h2>Flags in which they differ</h2>\n{table(differing)}")
    parts += [f"<p>{escape(line)}</p>\n" for line in unknown]
    out.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(out / "compare.html") as new:
        new.write_text(page("Runs compared", *parts), encoding="utf-8")
    plot_overlaid(curves, out)

    told = [aligned(results), *([aligned(differing)] if flags else ()), *unknown]
    return "\n\n".join([*told, f"curves: {out / 'compare.html'}    {out / 'compare.png'}"])


def results_of(runs: dict, starts: dict) -> list[tuple[str, ...]]:
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
    rows = [("flag", *flags)]
    for flag in sorted(set().union(*flags.values()) - NO_DIFFERENCE):
        values = [str(given.get(flag, "-")) for given in flags.values()]
        if len(set(values)) > 1:
            rows.append((f"--{flag.replace('_', '-')}", *values))
    return rows if len(rows) > 1 else [("no flag differs",)]


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Lines of text, the first column flush left and the others flush right."""
    widths = [max(len(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def overlaid(runs: dict) -> dict[tuple[str, str], list[Curve]]:
    """The curves of each chart, by what it shows and over what."""
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


def plot_overlaid(curves: dict[tuple[str, str], list[Curve]], out: Path) -> None:
    """compare.png: the same charts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ((title, over), lines), axis in zip(curves.items(), axes.flat, strict=True):
        for curve in lines:
            style = "o-" if curve.dots else "-"
            axis.plot(curve.x, curve.y, style, label=curve.label, markersize=4, linewidth=1)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.set(xlabel=over, ylabel=f"{title.lower()} loss")
        axis.set_ylim(top=settled(lines))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    with atomic.replace_file(out / "compare.png") as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)
