"""How fast the kernels are on this GPU, how exact, and how much memory they take, beside PyTorch's own.

    python -m kernels.bench                                          all operations
    python -m kernels.bench attention --out results/kernels.json     one of them; figures and a picture kept
    python -m kernels.bench --compile-only                           what can be seen without a GPU

What is measured, and beside what, is in bench_cases.py. A row is one pass of one backend at one shape, all of
them in bfloat16 and on the same normal random numbers.

    pass        forward, as in training: keeping what backward needs; backward, alone; both, in one go
    ms          median of triton.testing.do_bench (the GPU's own clock; before every call its L2 cache is
                flushed) and over the rounds, in which the backends take turns, A B A B
    rate        work per time, where work is what the operation must do, whatever a backend does:
                attention_flops, rms_norm_bytes, cross_entropy_flops and grouped_matmul_flops in
                bench_cases.py, a cache's size for decoding
    limit       the rate as a share of what this device reaches in a bfloat16 matrix product of 8192 x 8192 x
                8192 (TFLOP/s), or copying 1 GiB, read and written (GB/s)
    speed-up    over the reference, plain PyTorch
    error       norm(x - exact) / norm(exact) of the results, and the largest of the gradients, exact being
                computed in float64 on the same inputs; of attention the last head of the last sequence counts
    extra MiB   most memory allocated at any moment of a call, beyond what was before it

A backend that cannot do something says why in its row.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from tqdm import tqdm

from kernels.backend import HAS_TRITON, INTERPRETED, triton
from kernels.bench import cases as bench_cases
from kernels.bench.cases import CASES, Case, normal, timed

MATMUL, COPY = 8192, 2**30
PER_MS = {"TFLOP/s": 1e9, "GB/s": 1e6}  # FLOPs and bytes that these are in a millisecond

COLUMNS = {  # the figures of a row: heading, width and format
    "ms": ("ms", 10, ".4f"),
    "rate": ("rate", 10, ",.1f"),
    "unit": ("", 8, "<7"),
    "of_limit": ("limit", 6, ".0%"),
    "speedup": ("speed-up", 9, ".2f"),
    "error": ("error", 9, ".1e"),
    "grad_error": ("gradients", 10, ".1e"),
    "extra_mib": ("extra MiB", 11, ",.1f"),
}
DRAWN = {  # of an operation's passes, these figures
    "attention": {"forward": ["rate"], "backward": ["rate"]},
    "rmsnorm": {"forward": ["rate"], "backward": ["rate"]},
    "cross_entropy": {"both": ["rate", "extra_mib"]},
    "grouped_matmul": {"forward": ["rate"], "backward": ["rate"]},
}
COLORS = {
    "plinth": "tab:red",
    "reference": "tab:gray",
    "loop": "tab:gray",
    "torch": "tab:blue",
    "F.rms_norm": "tab:blue",
    "F.grouped_mm": "tab:blue",
    "SDPA flash": "tab:blue",
    "SDPA cuDNN": "tab:green",
    "FlexAttention": "tab:purple",
    "compiled": "tab:purple",
}

Measured = list[tuple[Case, list[dict]]]  # each case with its rows


# --- measuring


def median_ms(run: Callable) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def extra_mib(run: Callable) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def dtype_name() -> str:
    return str(bench_cases.DTYPE).removeprefix("torch.")


def device_limits() -> dict[str, float]:
    a, b = normal(MATMUL, MATMUL), normal(MATMUL, MATMUL)
    source = torch.empty(COPY, dtype=torch.uint8, device=bench_cases.DEVICE).random_()
    target = torch.empty_like(source)
    product = min(median_ms(lambda: a @ b) for _ in range(5))
    copy = min(median_ms(lambda: target.copy_(source)) for _ in range(5))
    reached = {"TFLOP/s": 2 * MATMUL**3 / product, "GB/s": 2 * COPY / copy}
    return {unit: work / PER_MS[unit] for unit, work in reached.items()}


def measure(case: Case, limits: dict[str, float], rounds: int, bar: tqdm) -> list[dict]:
    """The rows of a case."""
    torch.compiler.reset()  # or it would refuse to compile for a ninth shape
    torch.manual_seed(0)
    inputs, gradients = case.inputs()
    try:
        exact = case.exact([case.compared(x) for x in inputs], [case.compared(dy) for dy in gradients])
    except torch.OutOfMemoryError:
        exact = [], []
    rows = []
    # A compiled backward pass may overwrite what was kept for it, unless it runs again, as when timed alone.
    with functorch_config.patch(donated_buffer="backward" not in case.work):
        for which in case.work:
            rows += measure_pass(case, which, inputs, gradients, exact, rounds, bar)
    for row in rows:
        if row["ms"]:
            row["rate"] = case.work[row["pass"]] / row["ms"] / PER_MS[case.unit]
            row["of_limit"] = row["rate"] / limits[case.unit]
    return rows


def measure_pass(case: Case, which: str, inputs, gradients, exact, rounds: int, bar: tqdm) -> list[dict]:
    in_training = list(case.work) != ["forward"]
    trials = []  # of each backend its row, the call to time, and the times
    for name, f in case.backends.items():
        bar.set_postfix_str(f"{case.operation} {words(case.shape)}, {which}, {name}")
        row = {"operation": case.operation, "shape": case.shape, "dtype": dtype_name(), "pass": which}
        row |= {"backend": name, "failed": None}
        row |= dict.fromkeys(COLUMNS) | {"unit": case.unit}  # a figure is None where there is none
        leaves = [x.detach().requires_grad_(in_training) for x in inputs]
        run = attempt(row, timed, which, f, leaves, gradients)
        row |= attempt(row, errors, case, run, exact) or {}
        row["extra_mib"] = attempt(row, extra_mib, run)
        trials.append((row, run, []))
    for _ in range(rounds):
        for row, run, times in trials:
            times.append(attempt(row, median_ms, run))
            bar.update()
    for row, _, times in trials:
        row["ms"] = None if row["failed"] else statistics.median(times)
    rows = [row for row, _, _ in trials]
    reference = next((row["ms"] for row in rows if row["backend"] == "reference"), None)
    for row in rows:
        if row["ms"] and reference:
            row["speedup"] = reference / row["ms"]
    return rows


def attempt(row: dict, f: Callable, *arguments) -> Any:
    """f(*arguments); None if it fails, which the row then says, or if something failed before."""
    if row["failed"]:
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return f(*arguments)
        except Exception as error:
            row["failed"] = reason(error, said)
    torch.cuda.empty_cache()
    return None


def reason(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """Why it failed, in one line."""
    why = str(error).strip() or type(error).__name__
    if "No available kernel" in why:  # SDPA's reasons come as warnings, among those of what is off
        texts = [str(warning.message).partition(" (Triggered")[0] for warning in said]
        reasons = [text for text in texts if "disabled" not in text and "not used" not in text]
        why = reasons[0] if reasons else why
    return textwrap.shorten(why.splitlines()[0], 100, placeholder=" ...")


def errors(case: Case, run: Callable, exact: tuple[list[Tensor], list[Tensor]]) -> dict[str, float | None]:
    """Of the results and of the gradients; None for what the pass leaves out or is not known exactly."""

    def largest(computed: list[Tensor], truth: list[Tensor]) -> float | None:
        if not computed or not truth:
            return None
        pairs = [(case.compared(x).double(), y) for x, y in zip(computed, truth, strict=True)]
        return max(((x - y).norm() / y.norm()).item() for x, y in pairs)

    results, gradients = run()
    exact_results, exact_gradients = exact
    return {"error": largest(results, exact_results), "grad_error": largest(gradients, exact_gradients)}


# --- what comes out


def words(shape: dict) -> str:
    return ", ".join(name if size is True else f"{name} {size}" for name, size in shape.items() if size)


def table(rows: list[dict]) -> str:
    """The rows of a case under its shape."""
    lines = [f"{rows[0]['operation']}, {rows[0]['dtype']}: {words(rows[0]['shape'])}"]
    headings = "".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS.values())
    lines.append(f"  {'pass':9}{'backend':13}{headings}")
    for row in rows:
        line = f"  {row['pass']:9}{row['backend']:13}"
        if row["failed"]:
            line += f"  {row['failed']}"
        else:
            for name, (_, width, form) in COLUMNS.items():
                cell = "" if row[name] is None else format(row[name], form)
                line += f"{cell:>{width}}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def save(out: Path, command: list[str], limits: dict[str, float], measured: Measured) -> None:
    git = shlex.join(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"])
    status, commit = subprocess.getstatusoutput(git)
    content = {
        "command": shlex.join(command),
        "commit": commit if status == 0 else None,
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "limits": limits,
        "results": [row for _, rows in measured for row in rows],
    }
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(out)


def panels(measured: Measured) -> dict[tuple[str, str, str, str], dict[str, dict]]:
    """Of the picture, one for each chart, pass and figure: (title, x axis, figure, unit); each is a line for
    every backend, from x to the figure."""
    found = {}
    for case, rows in measured:
        if case.chart is None:
            continue
        title, x_name, x = case.chart
        for row in rows:
            for figure in DRAWN[case.operation].get(row["pass"], []):
                panel = title.format(row["pass"]), x_name, figure, case.unit
                line = found.setdefault(panel, {}).setdefault(row["backend"], {})
                line[x] = row[figure] if row["ms"] else math.nan
    return found


def plot(out: Path, limits: dict[str, float], measured: Measured) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(measured)
    height = math.ceil(len(drawn) / 2)
    size = (12, 3.3 * height)
    picture, grid = pyplot.subplots(height, 2, figsize=size, layout="constrained", squeeze=False)
    for i, ((title, x_name, figure, unit), lines) in enumerate(drawn.items()):
        axes = grid.flat[i]
        xs = list(dict.fromkeys(x for line in lines.values() for x in line))  # each once, in this order
        for backend, line in lines.items():
            style = {"color": COLORS[backend], "linewidth": 2.2 if backend == "plinth" else 1.2}
            axes.plot([xs.index(x) for x in line], line.values(), "o-", markersize=4, label=backend, **style)
        if figure == "rate":
            style = {"color": "black", "linestyle": "--", "linewidth": 1}
            axes.axhline(limits[unit], label="limit of the device", **style)
        axes.set_xticks(range(len(xs)), xs)
        axes.set(title=title, xlabel=x_name, ylabel=unit if figure == "rate" else "extra MiB")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if i % 2 or i == len(drawn) - 1:  # the same lines left and right
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)
    for axes in grid.flat[len(drawn) :]:
        axes.remove()
    picture.suptitle(f"{device_name()}, {dtype_name()}")
    new = out.with_suffix(".png.new")
    picture.savefig(new, dpi=110, format="png")
    new.replace(out.with_suffix(".png"))
    pyplot.close(picture)


# --- the command line


def check(args: argparse.Namespace) -> None:
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected at least 1")
    if args.out and (args.out.suffix != ".json" or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out}: expected a name that ends in .json, in a directory that exists")
    if device_name() is None and not args.compile_only:
        without = "python -m kernels.bench --compile-only"
        raise ValueError(f"there is no GPU to measure; `{without}` shows what can be seen without one")
    if not HAS_TRITON:
        raise ValueError("the package triton is missing; install it")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, under which nothing is compiled; unset it")


def measure_all(args: argparse.Namespace, command: list[str], limits: dict[str, float]) -> None:
    """Every case of what is asked for, printed and saved as it is done: the rest may take long."""
    names = [args.operation] if args.operation else list(CASES)
    operations = [CASES[name]() for name in names]
    n_pairs = sum(len(case.work) * len(case.backends) for cases in operations for case in cases)
    measured = []
    options = {"unit": "timing", "smoothing": 0, "dynamic_ncols": True, "disable": None}  # None: in a log
    with tqdm(total=n_pairs * args.rounds, **options) as bar:
        for cases in operations:
            for case in cases:
                rows = measure(case, limits, args.rounds, bar)
                measured.append((case, rows))
                bar.write(table(rows))
                if args.out:
                    save(args.out, command, limits, measured)
            if args.out:
                plot(args.out, limits, measured)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("operation", nargs="?", choices=CASES, help="default: all of them")
    parser.add_argument("--compile-only", action="store_true", help="registers, spills ..., without a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each backend (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="rows as JSON, a picture in FILE.png")
    args = parser.parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.compile_only:
        from kernels.bench.machine_code import report

        report(args.operation, args.out)
        return 0
    limits = device_limits()
    print(f"{device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("limits: " + ", ".join(f"{limit:,.1f} {unit}" for unit, limit in limits.items()) + "\n", flush=True)
    try:
        measure_all(args, ["python", "-m", "kernels.bench", *argv], limits)
    except KeyboardInterrupt:
        print("interrupted; what was measured stands above", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
