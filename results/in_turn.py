"""Measure the sides of a comparison in turn, A B A B ..., so that a slow minute of the machine slows all."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from engine import cpu


def opened_by(kind: type, ours: nn.Module) -> nn.Module:
    """Return the model that a class of transformers opens from what ours saves, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return kind.from_pretrained(folder).eval()


def rate(call: Callable, n_tokens: int, times: int = 1, clock: Callable = time.perf_counter) -> float:
    """Return how many tokens per second so many calls compute, of n_tokens each.

    clock: time.process_time where other programs use the processor too.
    """
    began = clock()
    for _ in range(times):
        call()
    return times * n_tokens / (clock() - began)


def one_thread() -> str:
    """Set one thread, and memory and products as train.py has them; return the setting by which PyTorch then
    multiplies float32 matrices."""
    cpu.keep_memory()
    torch.set_num_threads(1)
    cpu.multiply_by_onednn()
    return torch.get_float32_matmul_precision()


def measure_in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return for each side its figure in each round, such as tokens per second."""
    figures = {side: [] for side in sides}
    for _ in range(rounds):
        for side, measure in sides.items():
            figures[side].append(measure())
    return figures


def compared(figures: dict[str, list[float]], baseline: str, *, unit: str = "tokens", **labels) -> list[dict]:
    """Return a row for each side, and print it: the labels, the median of its tokens per second, or other
    units, and the median and range of its ratio to the baseline of the same round."""
    rows = []
    digits = 0 if unit == "tokens" else 1
    for side, rates in figures.items():
        ratios = [rate / other for rate, other in zip(rates, figures[baseline], strict=True)]
        row = labels | {"side": side, f"{unit}_per_second": statistics.median(rates)}
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row)
        print(f"  {side:18} {statistics.median(rates):9,.{digits}f} {unit}/s   {row['ratio']:.2f}x", end="")
        print(f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})", flush=True)
    return rows


def write_figures(
    path: Path, name: str, load: float, results: list[dict], peer: str = "transformers"
) -> None:
    """Write the rows of results/NAME.py to path, as JSON, with what they were measured on.

    load: the machine's load average before the measurement. peer: the package that was measured beside ours.
    """
    about = {"command": f"python -m results.{name} --out results/{name}.json", "cpu": cpu.name()}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {peer: version(peer), "load_average": load, "results": results}
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
