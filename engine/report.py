"""What a run shows: its curves and samples on a page, and all that is needed to repeat it.

    loss.png       training and validation loss over tokens, or images
    report.html    everything on one page that loads nothing: no network, no other file
    run.json       for each start and resume of the run: step, command, flags, config, environment

train.py makes them in the run's directory from its metrics.jsonl and samples.txt. engine/compare.py draws
several runs over each other.
"""

import base64
import json
import math
import platform
import re
import shutil
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import torch

from engine import cpu, parallel
from engine.charts import HUES, Curve, chart, page, settled, table, usual
from engine.progress import duration
from formats import atomic
from formats.quantities import short

ROWS = 20_000  # most steps that are read from metrics.jsonl, evenly spaced
SAMPLES = 20  # most earlier samples that are shown
PICTURE, PICTURES = "picture.png", "pictures"  # the last picture, and the folder with one of each evaluation
CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "rate": "{unit} per second",
    "mfu": "MFU, the share of the device's peak",
}
NO_CURVE = {"step", "count", "seconds", "skipped"}
SHARES = {"accuracy", "dropped", "mfu"}  # metrics that are shown in percent


def describe_run(
    *,
    model: str,
    data: str,
    guess: str | None,
    n_params: int,
    n_active: int,
    n_trained: int,
    steps: int,
    units_per_step: float,
    epochs: float,
    flops: float,
    device: str,
    minutes: float | None,
    step: int,
    unit: str = "tokens",
) -> list[str]:
    """Return what is printed before a run: what is trained on what, and how long it takes.

    data: the data set and its size. guess: how good a trivial guess is, None if there is none. n_active:
    parameters that one token uses; n_trained: those that learn. flops: of the whole run. minutes: from `step`
    to the end on `device`, None where nothing was timed. unit: what the data set is counted in.
    """
    part = ""
    if n_trained < n_params:
        part = f", {n_trained:,} of them trained ({n_trained / n_params:.2%})"
    elif n_active < n_params:
        part = f", {n_active:,} of them active"
    n_units = steps * units_per_step
    rule = " (Chinchilla: 20)" if unit == "tokens" else ""
    per_parameter = f", {n_units / n_params:.2f} {unit} per parameter{rule}"
    return [
        f"model  {model}, {n_params:,} parameters{part}",
        f"data   {data}",
        *([f"guess  {guess}"] if guess else []),
        f"run    {steps:,} steps of {units_per_step:,.10g} {unit}: {n_units:,.10g}, {epochs:.2f} epochs",
        f"cost   {flops:.2e} FLOPs{per_parameter if n_trained == n_params else ''}",
        f"here   {device}, {f'about {minutes:.1f} min ' if minutes is not None else ''}from step {step}",
    ]


def environment() -> dict:
    """Return the versions and the hardware on which a run's speed, and the last bits of its numbers, depend:
    strings, numbers, and None for what this machine does not have."""
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
        new.write_text(
            json.dumps({"starts": [*earlier, start]}, indent=2, default=str) + "\n", encoding="utf-8"
        )


def read_starts(out: Path) -> list[dict]:
    """Return the starts in run.json, the latest last. If the file is missing or damaged, return none: no run
    should end because of that."""
    try:
        return json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def read_rows(out: Path) -> tuple[list[dict], list[dict]]:
    """Return (steps, evaluations) of metrics.jsonl: at most ROWS steps, every n-th up to the last one.

    In both, "count" is how many tokens or images there were until then, and "rate" how many per second.
    """
    unit = unit_of(read_starts(out))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [line for line in lines if '"val_loss"' in line]
    steps = [line for line in lines if '"val_loss"' not in line]
    stride = 1 + len(steps) // ROWS
    steps = steps[(len(steps) - 1) % stride :: stride]
    return parsed(steps, "loss", unit), parsed(evaluations, "val_loss", unit)


def unit_of(starts: list[dict]) -> str:
    """Return what a run counts: "tokens" or, by its run.json, another unit such as "images"."""
    return starts[-1].get("unit", "tokens") if starts else "tokens"


def parsed(lines: list[str], key: str, unit: str) -> list[dict]:
    """Return the rows that have this key, a step and a number of units, with the names of `read_rows`.

    The runs of posttraining/classify.py count no units.
    """
    names = {unit: "count", f"{unit}_per_second": "rate"}
    rows = []
    for line in lines:
        try:
            row = {names.get(name, name): value for name, value in json.loads(line).items()}
        except ValueError:
            continue  # half a line: it is being written, or the run was killed
        if row.keys() >= {key, "step", "count"}:
            rows.append(row)
    return rows


def column(rows: list[dict], key: str) -> np.ndarray:
    """Return the values of a key (n,), NaN where a row has no finite number."""
    values = np.array([row.get(key) for row in rows], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def loss_title(evaluations: list[dict], starts: list[dict]) -> str:
    """Return "loss" with what it measures, or without where it is a sum of losses of different kinds."""
    if any("val_reward" in row for row in evaluations):
        return "beta KL - reward"
    several = any("val_mlm_loss" in row for row in evaluations)
    measured = starts[-1].get("loss", "nats per token") if starts else "nats per token"
    return "loss" if several else f"loss ({measured})"


def loss_curves(steps: list[dict], evaluations: list[dict], key: str = "loss") -> list[Curve]:
    """Return the curves of a metric in training and validation."""
    return [
        Curve("training", HUES[0], column(steps, "count"), column(steps, key)),
        Curve("validation", HUES[1], column(evaluations, "count"), column(evaluations, f"val_{key}"), True),
    ]


def draw_loss(out: Path) -> None:
    """Draw loss.png of the run in `out`: training and validation loss over tokens, or images."""
    from formats.figures import load_pyplot, save_figure  # not at every import of train.py

    steps, evaluations = read_rows(out)
    starts = read_starts(out)
    figure, axes = load_pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes, loss_curves(steps, evaluations), width=1.2)
    axes.set(xlabel=unit_of(starts), ylabel=loss_title(evaluations, starts))
    axes.legend()
    save_figure(figure, out / "loss.png")


def draw(axes, curves: list[Curve], width: float) -> None:
    """Draw curves with lines of a width in points."""
    from matplotlib.ticker import EngFormatter

    for curve in curves:
        style = "o-" if curve.dots else "-"
        axes.plot(curve.x, curve.y, style, label=curve.label, markersize=4, linewidth=width)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)


def formatted(name: str, value: float) -> str:
    """Return a metric as it is written everywhere in a report: a share in percent, else four digits."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if name.removeprefix("val_") in SHARES:
        return f"{value:.1%}"
    if name == "rate":
        return f"{value:,.0f}"
    return f"{value:.4f}" if "loss" in name else short(value, 4)


def title_of(name: str) -> str:
    """Return a metric's name in words: "validation aux loss" for val_aux_loss."""
    return name.replace("val_", "validation ").replace("_", " ")


def figures(
    steps: list[dict], evaluations: list[dict], references: dict[str, str], unit: str
) -> list[tuple[str, ...]]:
    """Return (name, value, what to compare it with, or "") of the figures of a run at its last row.

    references: {metric: a value to compare it with, in words}, such as the value at chance. unit: what the
    run counts.
    """
    found = []
    if evaluations:
        losses, last = column(evaluations, "val_loss"), evaluations[-1]
        lowest = int(np.nanargmin(losses)) if np.isfinite(losses).any() else -1
        note = f"lowest {formatted('loss', losses[lowest])} at step {evaluations[lowest]['step']:,}"
        found.append(("validation loss", formatted("loss", losses[-1]), note if lowest >= 0 else ""))
        for name in last.keys() - NO_CURVE - {"val_loss"}:
            found.append((title_of(name), formatted(name, last[name]), reference(name, references)))
        found[1:] = sorted(found[1:])
    if steps:
        last = steps[-1]
        found.append(
            ("training loss", formatted("loss", column(steps, "loss")[-1]), "of the last logged step")
        )
        mean = formatted("rate", last["count"] / last["seconds"])
        found.append((f"{unit} per second", mean, "mean of the run"))
        if last["mfu"] is not None:
            found.append(("MFU", formatted("mfu", last["mfu"]), "at the last logged step"))
    return found


def reference(name: str, references: dict[str, str]) -> str:
    """Return the reference of a metric in training or validation, "" if there is none."""
    return references.get(name.removeprefix("val_"), "")


def write(out: Path) -> None:
    """Write report.html of the run in `out`, from metrics.jsonl and, where they exist, samples.txt and
    run.json."""
    steps, evaluations = read_rows(out)
    starts = read_starts(out)
    title = out.resolve().name
    if starts:
        flags = starts[-1]["flags"]
        title = f"{flags['model']} {flags['size'] or flags['init_from'] or flags.get('base')}"
    references = starts[-1].get("references", {}) if starts else {}
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd><dd class=note>{escape(note)}</dd></div>\n"
        for label, value, note in figures(steps, evaluations, references, unit_of(starts))
    )
    parts = [
        f'<p class="lede">{summary(steps, evaluations, starts)}</p>\n{data_of(starts)}<dl>\n{tiles}</dl>\n',
        f'<div class="charts">\n{charts(steps, evaluations, references, starts)}</div>\n',
        samples(out),
        settings(starts),
    ]
    with atomic.replace_file(out / "report.html") as new:
        new.write_text(page(title, *parts), encoding="utf-8")


def summary(steps: list[dict], evaluations: list[dict], starts: list[dict]) -> str:
    """Return one line: the number of parameters, and how much of the run is done."""
    start = {"step": 0, "count": 0}
    last = max([*steps[-1:], *evaluations[-1:]], key=lambda row: row["step"], default=start)
    parts = [f"{starts[-1]['n_params']:,} parameters"] if starts else []
    parts.append(f"step {last['step']:,}" + (f" of {int(starts[-1]['flags']['steps']):,}" if starts else ""))
    parts.append(f"{short(last['count'])} {unit_of(starts)}")
    if starts and "flops_per_token" in starts[-1]:
        parts.append(f"{short(last['count'] * starts[-1]['flops_per_token'])} FLOPs")
    if steps:
        parts.append(f"{duration(steps[-1]['seconds'])} of training")
        parts.append(f"{steps[-1]['skipped']:,} updates skipped")
    return ", ".join(parts)


def data_of(starts: list[dict]) -> str:
    """Return the data of a run and a trivial guess, in HTML; "" for a run that has not recorded them."""
    found = starts[-1] if starts else {}
    lines = {"Data": found.get("data"), "A trivial guess": found.get("guess")}
    text = "<br>\n".join(f"{name}: {escape(line)}." for name, line in lines.items() if line)
    return f"<p>{text}</p>\n" if text else ""


def charts(steps: list[dict], evaluations: list[dict], references: dict[str, str], starts: list[dict]) -> str:
    """Return the charts in HTML: the loss, the model's other metrics, and the course of the training."""
    curves, over = loss_curves(steps, evaluations), unit_of(starts)
    title, written_loss = loss_title(evaluations, starts).capitalize(), partial(formatted, "loss")
    html = chart(title, curves, over=over, high=settled(curves), kind="wide", text=written_loss)
    for key in steps[-1] if steps else ():
        if key not in ("loss", *CHARTS, *NO_CURVE):
            note = reference(key, references)
            title = title_of(key).capitalize() + (f" ({note})" if note else "")
            lines = loss_curves(steps, evaluations, key)
            html += chart(title, lines, over=over, text=partial(formatted, key))
    for key, title in CHARTS.items():
        curve = Curve("at the end", HUES[2], column(steps, "count"), column(steps, key))
        title = title.format(unit=over.capitalize())
        html += chart(title, [curve], over=over, low=0.0, high=usual(curve.y), text=partial(formatted, key))
    return html


def samples(out: Path) -> str:
    """Return samples.txt in HTML, with the pictures of the same steps: the last sample, and some earlier ones
    folded up, the latest first."""
    if not (out / "samples.txt").is_file():
        return ""
    text = (out / "samples.txt").read_text(encoding="utf-8", errors="replace")
    _, *parts = re.split(r"^=== (step \d+.*)\n", text, flags=re.MULTILINE)
    shown = [
        (escape(heading), f"{picture(out, heading)}<pre>{escape(sample.rstrip())}</pre>")
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


def keep_picture(out: Path, step: int) -> None:
    """Copy the picture that a task has drawn, if there is one, to pictures/ under the number of its step."""
    if (out / PICTURE).is_file():
        (out / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(out / PICTURE, out / PICTURES / f"{step}.png")


def picture(out: Path, heading: str) -> str:
    """Return the picture of the step that a heading of samples.txt names, inside an HTML tag, or ""."""
    step = re.match(r"step (\d+)", heading)
    path = out / PICTURES / f"{step[1]}.png" if step else out
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="picture" alt="picture of step {step[1]}" src="data:image/png;base64,{content}">'


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
