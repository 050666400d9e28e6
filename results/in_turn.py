"""Measure the sides of a comparison in turn, A B A B ..., so that a slow minute of the machine slows all."""

import argparse
import gc
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from engine import cpu
from formats import command
from formats.json_file import write_json


def arguments(doc: str, rounds: int, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags of a script that compares: --rounds, and --out, the file for the figures or None.

    doc: the script's docstring, for --help. rounds: the default.
    """
    parser = command.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=command.count, default=rounds, help="rounds of measurement (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures to this file, as JSON")
    return parser.parse_args(argv)


def opened_by(kind: type, ours: nn.Module) -> nn.Module:
    """Return the model that a class of transformers opens from what ours saves, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return kind.from_pretrained(folder).eval()


def seconds(call: Callable, clock: Callable = time.perf_counter) -> float:
    """Return the seconds that a function takes.

    clock: time.process_time where other programs use the processor too.
    """
    began = clock()
    call()
    return clock() - began


def rate(call: Callable, n_tokens: int, times: int = 1, clock: Callable = time.perf_counter) -> float:
    """Return the tokens per second of a function that computes n_tokens, called `times` times. clock: as in
    `seconds`."""

    def calls() -> None:
        for _ in range(times):
            call()

    return times * n_tokens / seconds(calls, clock)


def output_of(line: list, **options) -> str:
    """Return what a program prints. Raises ValueError, with its error or the last line of it, if it fails.

    line: the program and its arguments. options: of subprocess.run, such as cwd.
    """
    done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        lines = (done.stderr.strip() or "no message").splitlines()
        why = next((text for text in lines if text.startswith("error: ")), lines[-1])
        raise ValueError(f"{' '.join(map(str, line))} ended with exit code {done.returncode}: {why}")
    return done.stdout


def peak_memory(call: Callable) -> int:
    """Return the most bytes that a function holds on the CPU at any one time, by PyTorch's profiler."""
    gc.collect()  # else memory that was allocated before could be freed, and so subtracted, during the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def one_thread() -> str:
    """Set one thread, and memory and matrix products as train.py does. Return PyTorch's name of the precision
    in which float32 matrices are then multiplied."""
    cpu.keep_memory()
    torch.set_num_threads(1)
    cpu.multiply_by_onednn()
    return torch.get_float32_matmul_precision()


def measure_in_turn(
    sides: dict[str, Callable[[], float]], rounds: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Return the figures of each side, one for each round.

    sides: for each a function that measures once and returns the figure, such as tokens per second. warm_up:
    rounds before the others, whose figures are left out.
    """
    figures = {side: [] for side in sides}
    for _ in range(warm_up + rounds):
        for side, measure in sides.items():
            figures[side].append(measure())
    return {side: of_side[warm_up:] for side, of_side in figures.items()}


def median_and_range(ratios: list[float]) -> dict[str, float]:
    """Return the columns of a row for the ratios of all rounds."""
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def shown(row: dict) -> str:
    """Return the ratio in a row as text, such as "1.91x (1.76 to 1.94)"."""
    return f"{row['ratio']:.2f}x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def in_milliseconds(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the columns of a row for two sides, from the seconds of each in every round: the median of both
    in milliseconds, and how many times as fast as theirs ours is."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    medians = {"ms": 1e3 * statistics.median(ours), "beside_ms": 1e3 * statistics.median(theirs)}
    return medians | median_and_range(ratios)


def compared(figures: dict[str, list[float]], baseline: str, *, unit: str = "tokens", **labels) -> list[dict]:
    """Return a row for each side, and print it: the labels, the median of its tokens (or other units) per
    second, and the median and range of its ratio to the baseline of the same round.

    figures: units per second of each side in each round, as `measure_in_turn` returns them.
    """
    rows = []
    digits = 0 if unit == "tokens" else 1
    for side, rates in figures.items():
        row = labels | {"side": side, f"{unit}_per_second": statistics.median(rates)}
        row |= median_and_range([rate / other for rate, other in zip(rates, figures[baseline], strict=True)])
        rows.append(row)
        per_second = f"{row[f'{unit}_per_second']:9,.{digits}f} {unit}/s"
        print(f"  {side:18} {per_second}   {shown(row)}", flush=True)
    return rows


def write_figures(
    path: Path, name: str, load: float, results: list[dict], peer: str | None = "transformers"
) -> None:
    """Write the rows of results/NAME.py to path, as JSON, with what they were measured on.

    load: the machine's load average before the measurement. peer: the package that was measured beside ours,
    None where there is none.
    """
    about = {"command": f"python -m results.{name} --out results/{name}.json", "cpu": cpu.name()}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {"capability": torch.backends.cpu.get_cpu_capability()}  # instructions that PyTorch uses
    about |= {peer: version(peer)} if peer else {}
    write_json(path, about | {"load_average": load, "results": results})
