"""Measure the kernels on this GPU: speed, error and memory, beside the reference and PyTorch's operations.

    python -m kernels.bench                                          all operations
    python -m kernels.bench attention --out results/kernels.json     one of them; save the figures and a chart
    python -m kernels.bench --compile-only                           registers, spills ..., without a GPU

kernels/bench/cases.py and long_rows.py list what is measured. A row of the table is one pass of one backend
at one shape; all backends of a shape get the same normal random numbers in bfloat16. The columns:

    pass        forward, as in training, where it keeps what backward needs; backward alone; both in one call
    ms          milliseconds of a call: the median of triton.testing.do_bench, which uses the GPU's own clock
                and empties its L2 cache before every call; then the median over the rounds, in which the
                backends take turns (A B A B ...)
    rate        work per time. Work is what the operation needs, however a backend computes it: the FLOPs or
                bytes of the functions named *_flops and *_bytes in cases.py and long_rows.py; for decoding,
                the bytes of the cache
    limit       the rate as a share of what this device reaches in a bfloat16 matrix product of 8192 x 8192 x
                8192 (TFLOP/s), or in copying 1 GiB, which is read and written (GB/s)
    speed-up    over the reference, plain PyTorch
    error       norm(x - exact) / norm(exact) of the results, where exact is computed in float64 from the same
                inputs; for attention of any kind, of the last head of the last sequence
    gradients   the same of the gradients, the largest of them
    extra MiB   the most memory allocated during a call, minus what was allocated before it

The row of a backend that fails shows the reason.
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
from kernels.bench import cases, long_rows
from kernels.bench.cases import Case, normal, timed

CASES = cases.CASES | long_rows.CASES
MATMUL, COPY = 8192, 2**30  # for the limits of the device: sides of a product, bytes of a copy
PER_MS = {"TFLOP/s": 1e9, "GB/s": 1e6}  # FLOPs per millisecond of one TFLOP/s, bytes of one GB/s

COLUMNS = {  # of the table: key of a row's figure, heading, width and format
    "ms": ("ms", 10, ".4f"),
    "rate": ("rate", 10, ",.1f"),
    "unit": ("", 8, "<7"),
    "of_limit": ("limit", 6, ".0%"),
    "speedup": ("speed-up", 9, ".2f"),
    "error": ("error", 9, ".1e"),
    "grad_error": ("gradients", 10, ".1e"),
    "extra_mib": ("extra MiB", 11, ",.1f"),
}
DRAWN = {  # figures in the chart, by operation and pass
    "attention": {"forward": ["rate"], "backward": ["rate"]},
    "linear_attention": {"forward": ["rate"], "backward": ["rate"]},
    "selected_attention": {"forward": ["rate"], "backward": ["rate"]},
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

Measured = list[tuple[Case, list[dict]]]  # each case, and its rows


# --- measuring


def median_ms(run: Callable) -> float:
    """Return the median time of a call on the GPU, in milliseconds."""
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def extra_mib(run: Callable) -> float:
    """Return the most memory allocated during a call, minus that before, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def dtype_name() -> str:
    return str(cases.DTYPE).removeprefix("torch.")


def device_limits() -> dict[str, float]:
    """Return what this device reaches in a large matrix product (TFLOP/s) and a large copy (GB/s)."""
    a, b = normal(MATMUL, MATMUL), normal(MATMUL, MATMUL)
    source = torch.empty(COPY, dtype=torch.uint8, device=cases.DEVICE).random_()
    target = torch.empty_like(source)
    product = min(median_ms(lambda: a @ b) for _ in range(5))
    copy = min(median_ms(lambda: target.copy_(source)) for _ in range(5))
    reached = {"TFLOP/s": 2 * MATMUL**3 / product, "GB/s": 2 * COPY / copy}
    return {unit: work / PER_MS[unit] for unit, work in reached.items()}


def measure(case: Case, limits: dict[str, float], rounds: int, bar: tqdm) -> list[dict]:
    """Return the rows of a case: one for each pass and backend.

    limits: from `device_limits`. rounds: how often each backend is timed.
    """
    torch.compiler.reset()  # torch.compile stops compiling a function after eight shapes
    torch.manual_seed(0)
    inputs, gradients = case.inputs()
    try:
        exact = case.exact([case.compared(x) for x in inputs], [case.compared(dy) for dy in gradients])
    except torch.OutOfMemoryError:
        exact = [], []

    # A backward pass that torch.compile made may overwrite what forward kept for it. Where backward is timed
    # alone it must not, because it runs many times on the same tensors.
    rows = []
    with functorch_config.patch(donated_buffer="backward" not in case.work):
        for which in case.work:
            rows += measure_pass(case, which, inputs, gradients, exact, rounds, bar)

    for row in rows:
        if row["ms"]:
            row["rate"] = case.work[row["pass"]] / row["ms"] / PER_MS[case.unit]
            row["of_limit"] = row["rate"] / limits[case.unit]
    return rows


def measure_pass(case: Case, which: str, inputs, gradients, exact, rounds: int, bar: tqdm) -> list[dict]:
    """Return the rows of one pass of a case, one for each backend, without rate and limit."""
    in_training = list(case.work) != ["forward"]

    # Each backend's row, with its errors and memory, and the call to time.
    trials = []  # (row, call, times)
    for name, f in case.backends.items():
        bar.set_postfix_str(f"{case.operation} {words(case.shape)}, {which}, {name}")
        row = {"operation": case.operation, "shape": case.shape, "dtype": dtype_name(), "pass": which}
        row |= {"backend": name, "failed": None}
        row |= dict.fromkeys(COLUMNS) | {"unit": case.unit}  # None: not measured
        leaves = [x.detach().requires_grad_(in_training) for x in inputs]
        run = attempt(row, timed, which, f, leaves, gradients)
        row |= attempt(row, errors, case, run, exact) or {}
        row["extra_mib"] = attempt(row, extra_mib, run)
        trials.append((row, run, []))

    # The backends take turns, so that a change of the GPU's clock affects all of them.
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
    """Return f(*arguments). If it fails, set row["failed"] to the reason; in a failed row return None."""
    if row["failed"]:
        return None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return f(*arguments)
        except Exception as error:
            row["failed"] = reason(error, warned)
    torch.cuda.empty_cache()
    return None


def reason(error: Exception, warned: list[warnings.WarningMessage]) -> str:
    """Return why a call failed, in one line."""
    why = str(error).strip() or type(error).__name__
    # SDPA warns of the reason, and of all kernels that were switched off.
    if "No available kernel" in why:
        texts = [str(warning.message).partition(" (Triggered")[0] for warning in warned]
        reasons = [text for text in texts if "disabled" not in text and "not used" not in text]
        why = reasons[0] if reasons else why
    return textwrap.shorten(why.splitlines()[0], 100, placeholder=" ...")


def errors(case: Case, run: Callable, exact: tuple[list[Tensor], list[Tensor]]) -> dict[str, float | None]:
    """Return the errors of results and gradients; None where the pass, or `exact`, does not have them."""

    def largest(computed: list[Tensor], truth: list[Tensor]) -> float | None:
        if not computed or not truth:
            return None
        pairs = [(case.compared(x).double(), y) for x, y in zip(computed, truth, strict=True)]
        return max(((x - y).norm() / y.norm()).item() for x, y in pairs)

    results, gradients = run()
    exact_results, exact_gradients = exact
    return {"error": largest(results, exact_results), "grad_error": largest(gradients, exact_gradients)}


# --- the table, the JSON file and the chart


def words(shape: dict) -> str:
    """Return a shape as text, as in "T 512, H 32, causal"."""
    return ", ".join(name if size is True else f"{name} {size}" for name, size in shape.items() if size)


def table(rows: list[dict]) -> str:
    """Return the rows of a case as text, under its shape."""
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
    """Write all rows so far as JSON, in a new file that then replaces the old one."""
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
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(out)


def panels(measured: Measured) -> dict[tuple[str, str, str, str], dict[str, dict]]:
    """Return the panels of the chart: {(title, name of the x axis, figure, unit): {backend: {x: value}}}."""
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
    """Draw all rows so far, two panels side by side, to the file `out` with the suffix .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(measured)
    height = math.ceil(len(drawn) / 2)
    size = (12, 3.3 * height)
    picture, grid = pyplot.subplots(height, 2, figsize=size, layout="constrained", squeeze=False)
    for i, ((title, x_name, figure, unit), lines) in enumerate(drawn.items()):
        # One line for each backend, at evenly spaced x.
        axes = grid.flat[i]
        xs = list(dict.fromkeys(x for line in lines.values() for x in line))  # each once, in order
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
        if i % 2 or i == len(drawn) - 1:  # one legend for both panels of a row
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)

    # An empty panel is left over if their number is odd.
    for axes in grid.flat[len(drawn) :]:
        axes.remove()
    picture.suptitle(f"{device_name()}, {dtype_name()}")
    new = out.with_suffix(".png.new")
    picture.savefig(new, dpi=110, format="png")
    new.replace(out.with_suffix(".png"))
    pyplot.close(picture)


# --- the command line


def check(args: argparse.Namespace) -> None:
    """Raise ValueError if the flags are wrong or something that is needed is missing."""
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected at least 1")
    if args.target and not args.compile_only:
        raise ValueError("--target names what --compile-only compiles for; add that, or leave --target out")
    if args.out and (args.out.suffix != ".json" or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out}: expected a name that ends in .json, in a directory that exists")
    if device_name() is None and not args.compile_only:
        without = "python -m kernels.bench --compile-only"
        raise ValueError(f"there is no GPU to measure; `{without}` shows what can be seen without one")
    if not HAS_TRITON:
        raise ValueError("the package triton is missing; install it")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")


def measure_all(args: argparse.Namespace, command: list[str], limits: dict[str, float]) -> None:
    """Measure every case of the chosen operations, and print and save the rows of each case at once."""
    names = [args.operation] if args.operation else list(CASES)
    operations = [CASES[name]() for name in names]
    n_pairs = sum(len(case.work) * len(case.backends) for group in operations for case in group)
    measured = []
    # disable=None leaves the bar out where there is no terminal.
    options = {"unit": "timing", "smoothing": 0, "dynamic_ncols": True, "disable": None}
    with tqdm(total=n_pairs * args.rounds, **options) as bar:
        for group in operations:
            for case in group:
                rows = measure(case, limits, args.rounds, bar)
                measured.append((case, rows))
                bar.write(table(rows))
                if args.out:
                    save(args.out, command, limits, measured)
            if args.out:
                plot(args.out, limits, measured)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 after a mistake in its flags, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("operation", nargs="?", choices=CASES, help="what to measure (default: all)")
    parser.add_argument(
        "--compile-only", action="store_true", help="compile and show registers, spills ...; needs no GPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each backend is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="save rows as JSON, a chart as FILE.png"
    )
    parser.add_argument(
        "--target", action="append", metavar="sm_90", help="with --compile-only: compile for this one alone"
    )
    args = parser.parse_args(argv)
    try:
        check(args)
        if args.compile_only:
            from kernels.bench.machine_code import TARGETS, report

            report(args.operation, args.out, tuple(args.target or TARGETS))
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limits = device_limits()
    print(f"{device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("limits: " + ", ".join(f"{limit:,.1f} {unit}" for unit, limit in limits.items()) + "\n", flush=True)
    try:
        measure_all(args, ["python", "-m", "kernels.bench", *argv], limits)
    except KeyboardInterrupt:
        print("interrupted; the rows above are complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
