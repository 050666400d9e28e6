"""Measure one step of steps.py in this process, and save a row after every measurement.

    python -m results.gpu.measure STEP ...        __main__.py starts it, in a process for each step

The functions return the figures of a row. A measurement that fails has a row with the end of its traceback;
one that does not come back in time ends the process, and __main__.py starts another for the rest.
"""

import argparse
import csv
import faulthandler
import gc
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train
from engine import benchmark, parallel
from engine.options import parse_arguments
from engine.run import prepare
from kernels import configs
from kernels.bench import __main__ as bench
from kernels.bench import cases
from results import in_turn
from results.gpu import rows
from results.training_runs import logged

MAX_ERROR = 2e-2  # norm(x - exact) / norm(exact) in bfloat16 that passes; rounding is 2e-3 to 1e-2
OURS = "plinth"
THEIRS = ("SDPA flash", "SDPA cuDNN")
MAY_FAIL = {*THEIRS, "FlexAttention", "F.grouped_mm"}  # backends that do not take every shape and device


# --- 1. it runs at all


def limits(sizes) -> dict:
    """Return what the device reaches in a large matrix product and a large copy."""
    bench.MATMUL, bench.COPY = sizes.matmul, sizes.copied
    return bench.device_limits()


def once(make_case: Callable) -> dict:
    """Return the errors of our kernel, forward and backward, against float64."""
    case, *rest = drawn(make_case)
    return check_errors(errors_of(case, *rest, list(case.work)[-1]))


def drawn(make_case: Callable) -> tuple:
    """Return a case, its inputs, the gradients of its results, and its exact results and gradients."""
    torch.manual_seed(0)
    case = make_case()
    inputs, gradients = case.inputs()
    exact = case.exact([case.compared(x) for x in inputs], [case.compared(dy) for dy in gradients])
    return case, inputs, gradients, exact


def errors_of(case, inputs, gradients, exact, which: str) -> dict:
    """Return the errors of one pass of our kernel; a backward pass is run with its forward pass."""
    leaves = [x.detach().requires_grad_(which != "forward") for x in inputs]
    run = cases.timed("forward" if which == "forward" else "both", case.backends[OURS], leaves, gradients)
    return bench.errors(case, run, exact)


def check_errors(errors: dict) -> dict:
    """Return the errors; raise ArithmeticError where one is too large, or not a number."""
    wrong = {name: error for name, error in errors.items() if error is not None and not error < MAX_ERROR}
    if wrong:
        raise ArithmeticError(f"wrong results: {wrong}, expected less than {MAX_ERROR}")
    return errors


# --- 2. training


def flags_of(model: str, size_flags: tuple[str, ...], sizes, work: Path) -> list[str]:
    """Return the flags of train.py for a run on text."""
    flags = ["--model", model, *size_flags, "--device", sizes.device, "--data", sizes.data]
    flags += ["--bad-text", "skip", "--tokenizer", str(work / "tokenizer"), "--cache", str(work / "cache")]
    return flags


def image_flags(sizes, work: Path, model: str) -> list[str]:
    """Write pictures of noise in two classes, with captions, and return the flags of train.py for a run on
    them."""
    n, side = sizes.pictures
    rng, captions = np.random.default_rng(0), []
    for i in range(n):
        path = work / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path, compress_level=0)
        captions.append({"image": f"{path.parent.name}/{path.name}", "caption": f"noise, number {i}"})
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    (work / "pictures" / "metadata.jsonl").write_text(lines, encoding="utf-8")
    paths = ["--data", str(work / "pictures"), "--cache", str(work / "cache")]
    return ["--model", model, *dict(sizes.images)[model], "--device", sizes.device, *paths]


def train_speed(sizes, work: Path, model: str, size_flags: tuple[str, ...], kernels: str) -> dict:
    """Return the figures of `train.py --benchmark` on text: speed, MFU, memory, time between kernels."""
    return benchmarked([*flags_of(model, size_flags, sizes, work), "--kernels", kernels], sizes)


def image_speed(sizes, work: Path, model: str) -> dict:
    """Return the figures of `train_speed` on images."""
    return benchmarked(image_flags(sizes, work, model), sizes)


def benchmarked(flags: list[str], sizes) -> dict:
    """Return the figures of `train.py --benchmark` with these flags."""
    flags = [*flags, "--benchmark"]
    benchmark.WARM_UP, benchmark.STEPS, benchmark.PROFILED = sizes.updates
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high")  # as train.py does
    args = parse_arguments(flags)
    parallel.initialize(args)
    with benchmark.prepared(args, prepare) as run:
        figures = benchmark.measure(run, train.gradient, train.descend)
        figures |= benchmark.kernel_times(run, train.gradient, train.descend)
    figures["kernels"] = dict(list(figures["kernels"].items())[:12])
    return figures | {"command": f"python train.py {' '.join(flags)}"}


# --- 3. and 4. the kernels beside other ways to compute the same


def compared(sizes, make_case: Callable, theirs: tuple[str, ...] = THEIRS) -> dict:
    """Return the rows of kernels/bench for a case: all backends, but of attention only ours and `theirs`."""
    case = make_case()
    if case.operation == "attention":
        case.backends = {name: f for name, f in case.backends.items() if name in (OURS, *theirs)}
    with tqdm(disable=True) as bar:
        results = bench.measure(case, known_limits(sizes), sizes.rounds, bar)
    print(bench.table(results))
    failed = [row for row in results if row["failed"] and row["backend"] not in MAY_FAIL]
    if failed:
        raise RuntimeError(f"{failed[0]['backend']}, {failed[0]['pass']}: {failed[0]['failed']}")
    return {"results": results}


@cache
def known_limits(sizes) -> dict:
    """Return `limits`, measured once in this process."""
    return limits(sizes)


# --- 5. the tests


def tests(sizes, seconds: float = 110) -> dict:
    """Return how many of the tests for a GPU pass within these seconds, and the names of those that fail."""
    files = sizes.tests or [
        str(p) for p in Path("tests").rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8")
    ]
    # Compilation takes most of the time, so the tests share the processors where pytest-xdist is installed.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--maxfail", "10", "-p", "no:cacheprovider"]
    command += ["-n", "12"] * (rows.is_installed("xdist") and not sizes.tests)
    command += ["--timeout", "60"] * rows.is_installed("pytest_timeout")
    with tempfile.TemporaryFile("w+") as output:
        pytest = subprocess.Popen([*command, *files], stdout=output, stderr=subprocess.STDOUT)
        try:
            code = pytest.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.terminate()
            code = None  # not ended
        output.seek(0)
        text = output.read()
    print(text)
    figures = outcomes(text) | {"ended": code is not None}
    if code not in (0, None):
        raise RuntimeError(f"pytest ended with {code}: {json.dumps(figures)}")
    return figures


def outcomes(text: str) -> dict:
    """Return how many tests passed, failed and were skipped, and the names of those that failed, from what
    pytest -v prints, also where it was ended before its summary."""
    found = {}
    for line in text.splitlines():
        outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        name = re.search(r"\S+\.py::.*?(?=$| PASSED| FAILED| ERROR| SKIPPED| - )", line)
        if outcome and name:
            found.setdefault(name[0], outcome[0])
    counts = {word: list(found.values()).count(word.upper()) for word in ("passed", "skipped")}
    failed = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    return counts | {"n_failed": len(failed), "tests_that_failed": failed}


# --- 6. configurations of kernels


@cache
def drawn_once(make_case: Callable) -> tuple:
    """Return `drawn` of a case, computed once for all configurations in this process."""
    return drawn(make_case)


def configuration(operation: str, key: str, name: str, which: str, make_case: Callable) -> dict:
    """Return the time of one pass of an operation under a named configuration of its kernel."""
    case, inputs, gradients, exact = drawn_once(make_case)
    with configs.timed(operation, configs.CONFIGS[operation][name]):
        errors = check_errors(errors_of(case, inputs, gradients, exact, which))
        leaves = [x.detach().requires_grad_(which != "forward") for x in inputs]
        run = cases.timed(which, case.backends[OURS], leaves, gradients)
        ms = min(bench.median_ms(run) for _ in range(3))
    rate = case.work[which] / ms / bench.PER_MS[case.unit]
    return {
        "operation": operation,
        "key": key,
        "config": name,
        "ms": ms,
        "rate": rate,
        "unit": case.unit,
    } | errors


# --- 7. learning and decoding


def learning(sizes, work: Path, optimizer: str) -> dict:
    """Return the losses after the same tokens, and the speed with everything that a run does."""
    flags = [*flags_of("gpt", sizes.gpt, sizes, work), "--optimizer", optimizer]
    flags += ["--steps", str(sizes.learning_steps), "--eval-every", str(sizes.learning_steps)]
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(dir=work) as out:
        code = train.main([*flags, "--out", out])
        if code != 0:
            raise RuntimeError(f"train.py ended with {code}")
        log = logged(Path(out))
    steps, evaluations = [row for row in log if "loss" in row], [row for row in log if "val_loss" in row]
    return {
        "val_loss": evaluations[-1]["val_loss"],
        "bits_per_byte": evaluations[-1].get("bits_per_byte"),
        "first_val_loss": evaluations[0]["val_loss"],
        "losses": {row["step"]: row["loss"] for row in steps},
        "tokens": evaluations[-1]["tokens"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "command": f"python train.py {' '.join(flags)}",
    }


def decoding(sizes, batch: int) -> dict:
    """Return new tokens per second of greedy decoding, prefill included, beside transformers' generate with a
    static cache, which it compiles; and the share of tokens on which the two agree."""
    from gpt import SIZES
    from results.decode_speed import PROMPT, both_models

    torch.compiler.reset()
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    ours, theirs = (model.to(sizes.device, dtype) for model in both_models(SIZES[sizes.decoder]))
    n = sizes.new_tokens
    prompts = torch.randint(ours.config.vocab_size, (batch, PROMPT), device=sizes.device)
    options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompts), "cache_implementation": "static"}
    sides = {
        "transformers": lambda: theirs.generate(prompts, **options)[:, PROMPT:].tolist(),
        "plinth": lambda: ours.generate(prompts, n, temperature=0, compile=True),
        "plinth, CUDA graphs": lambda: ours.generate(prompts, n, temperature=0, compile="reduce-overhead"),
    }

    # The first calls compile. In bfloat16 two tokens may be almost equally likely, and after another choice
    # two texts differ.
    tokens = {side: generate() for side, generate in sides.items()}
    same = {
        side: statistics.mean(a == b for x, y in zip(tokens["transformers"], found, strict=True)
                              for a, b in zip(x, y, strict=True))
        for side, found in tokens.items()
    }  # fmt: skip
    # Each call returns a list, so it waits for the device.
    timed = {side: partial(in_turn.rate, generate, batch * n) for side, generate in sides.items()}
    figures = in_turn.measure_in_turn(timed, sizes.rounds + 1)
    return {"results": in_turn.compared(figures, "transformers", batch=batch), "same_tokens": same}


# --- 8. profile


def counters(sizes) -> dict:
    """Return Nsight Compute's metrics of attention's forward kernel. A rehearsal runs its program without
    it."""
    K, T = sizes.head_widths[-1], sizes.lengths[-1]
    call = f"attention_forward({sizes.device!r}, {K}, {T}, {sizes.width})"
    program = f"from results.gpu.measure import attention_forward; {call}"
    command = [sys.executable, "-c", program]
    if sizes.device == "cuda":
        sections = "SpeedOfLight LaunchStats Occupancy WarpStateStats SchedulerStats InstructionStats "
        sections += "ComputeWorkloadAnalysis MemoryWorkloadAnalysis"
        ncu = [shutil.which("ncu") or "ncu", "--clock-control", "none", "--csv", "--page", "details"]
        ncu += ["--kernel-name", "regex:forward_kernel", "--launch-skip", "2", "--launch-count", "1"]
        command = [*ncu, *(word for name in sections.split() for word in ("--section", name)), *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
    return {"command": " ".join(command), "metrics": metrics_of(done.stdout)}


def attention_forward(device: str, K: int, T: int, width: int) -> None:
    """Call attention's forward kernel three times: the third is profiled."""
    from kernels import attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, T, width // K, K, device=device, dtype=dtype) for _ in range(3))
    for _ in range(3):
        attention(q, k, v, causal=True, backend="triton")


def metrics_of(text: str) -> dict[str, str]:
    """Return the metrics in the CSV that ncu prints among its messages."""
    table = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    return {f"{row['Metric Name']} ({row['Metric Unit']})": row["Metric Value"] for row in table
            if row.get("Metric Name")}  # fmt: skip


# --- the process of a step


def rehearse_on_cpu() -> None:
    """Make kernels/bench run on the CPU: in float32, with the host's clock, and with nothing compiled."""

    def milliseconds(run: Callable) -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3

    cases.DEVICE, cases.DTYPE, cases.compiled = "cpu", torch.float32, lambda f: f
    bench.median_ms, bench.extra_mib = milliseconds, lambda run: 0.0


def limit(seconds: float) -> float:
    """Return the seconds after which a measurement is ended that is expected to take these seconds. The first
    of a process imports much, and a rehearsal may share its processor with others."""
    return 15 + 2 * seconds if torch.cuda.is_available() else 600


def measure(step: str, item, args: argparse.Namespace) -> dict:
    """Make a measurement and return its row.

    The row is saved before the measurement, too, as one that did not end: if the process ends, it stays so.
    """
    row = rows.new(step, item.name, args.commit)
    rows.add(args.out, row)
    faulthandler.dump_traceback_later(min(limit(item.seconds), args.until - time.time()), exit=True)
    began = time.perf_counter()
    try:
        row |= item.call() | {"failed": None}
    except Exception:
        row["failed"] = rows.last_lines(traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()
    rows.add(args.out, row | {"seconds": round(time.perf_counter() - began, 1)})
    print(f"{item.name}: {row['failed'] or 'done'}", flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    from results.gpu import steps

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("step", help="the step, by its name in steps.py")
    add("--out", type=Path, required=True, help="folder for the rows")
    add("--work", type=Path, required=True, help="folder of what ahead.py has prepared")
    add("--began", required=True, help="when the whole command began, as rows.now returns it")
    add("--until", type=float, required=True, help="when all must have ended, in seconds as time.time")
    add("--commit", help="the commit that is measured, where there is no clone")
    add("--again", action="store_true", help="measure also what has been measured before")
    add("--toy", action="store_true", help="run at toy sizes on the CPU")
    args = parser.parse_args(argv)
    if args.toy:
        rehearse_on_cpu()
    items = steps.steps(steps.TOY if args.toy else steps.FULL, args.work)[args.step]
    for item in rows.remaining(items, args.step, args.out, args.began, args.again):
        if time.time() + item.seconds > args.until:
            continue
        row = measure(args.step, item, args)
        gc.collect()
        if row["failed"] and not args.toy:
            torch.cuda.synchronize()  # raises after an illegal access, after which no kernel runs here
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
