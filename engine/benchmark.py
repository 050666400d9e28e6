"""How fast a run is, and where its time goes.

    python train.py --model gpt --benchmark     50 steps: tokens per second, MFU, memory, and the share of
                                                each part of a step; on a GPU also how long it has no kernel
    python train.py --model gpt --profile       the operations that take longest, and a trace for a viewer

engine/device.py defines MFU, the model FLOPs utilisation. No peak is published for a CPU: there the FLOP/s
are divided by those of a product of two matrices, measured in the same process.
"""

import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from engine import parallel
from engine.device import mfu, wait_for
from engine.log import UpdateResult, row_of
from engine.optim import set_learning_rate, sharpness_aware
from engine.run import Run

WARM_UP, STEPS = 5, 50
SIDE = 1024  # rows and columns of the matrices of `product_flops`
PROFILED = 5  # updates of `kernel_times`


class Clock:
    """A stop watch: each call ends a part and gives it a name. On a GPU it records events and never waits."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, summed. To be called when the device has finished."""
        sums = defaultdict(float)
        for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False):
            sums[name] += before.elapsed_time(now) / 1e3 if self.device == "cuda" else now - before
        return dict(sums)


def run(args: Namespace, prepare: Callable, gradient: Callable, descend: Callable) -> str:
    """Return what --benchmark or --profile prints. Nothing is written except the trace, to --out.

    prepare: engine.run's. gradient, descend: train.py's two halves of an update.
    """
    trace_file = args.out / "trace.json"
    with prepared(args, prepare) as ready:
        if args.profile:
            text = f"{trace(ready, gradient, descend, trace_file)}\ntrace: {trace_file}\n"
        else:
            figures = measure(ready, gradient, descend)
            if args.device == "cuda":
                figures |= kernel_times(ready, gradient, descend)
            text = describe(figures)
    return text if parallel.rank() == 0 else ""


@contextmanager
def prepared(args: Namespace, prepare: Callable) -> Iterator[Run]:
    """Yield a run that is ready to be measured, in a directory that is removed afterwards."""
    with tempfile.TemporaryDirectory() as aside:
        args.out = Path(aside)
        run = prepare(args)
        args.steps = max(args.steps, WARM_UP + STEPS + PROFILED)  # no schedule ends before
        try:
            yield run
        finally:
            run.close()


def update(run: Run, gradient: Callable, descend: Callable, mark: Callable[[str], None]) -> tuple:
    """Make an update as train.py does, and call mark(name) after each part. Returns a tuple of the fields of
    log.UpdateResult."""
    lr = set_learning_rate(run.optimizers, run.step, run.args)
    mark("rest")
    parts = run.batches.next()
    mark("batch")
    loss, metrics = sharpness_aware(gradient, run, parts)
    mark("gradient")
    norm = descend(run)
    mark("update")
    return loss, norm, lr, metrics, parts[-1].n_targets


def measure(run: Run, gradient: Callable, descend: Callable) -> dict:
    """Return figures of STEPS updates, with their logging, without evaluation and saving.

    tokens_per_second    or images, or another unit of the data, whose name is in `unit`
    mfu                  None where the peak of the device is not known
    flops_per_second     of the model's equations
    product_flops        on a CPU, of all processes, see the function of that name; else None
    peak_memory          bytes: with CUDA of these steps, else of the process until now
    shares               of the time: "batch" waiting for data, "gradient" forward and backward, "update"
                         clipping and optimizer, "rest" all else
    """
    args, clock = run.args, Clock(run.args.device)
    for _ in range(WARM_UP):
        update(run, gradient, descend, lambda part: None)
    wait_for(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    # The measured updates.
    clock("start")
    began = time.perf_counter()
    for i in range(1, STEPS + 1):
        done = UpdateResult(*update(run, gradient, descend, clock))
        if i % args.log_every == 0:
            row_of(run, done, 1.0)
    clock("rest")
    wait_for(args.device)
    seconds = time.perf_counter() - began

    parts = clock.seconds()
    rate = STEPS * run.units_per_step / seconds
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:  # in kB, on macOS in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "tokens_per_second": rate,
        "unit": run.dataset.unit,
        "mfu": mfu(run, rate),
        "flops_per_second": rate * run.flops_per_token,
        "product_flops": product_flops(args.dtype) * parallel.world_size() if args.device == "cpu" else None,
        "peak_memory": memory,
        "shares": {name: part / sum(parts.values()) for name, part in parts.items()},
    }


def product_flops(dtype: str) -> float:
    """Return the FLOP/s of this process in a product of two square matrices on the CPU, the best of ten."""
    a, b = torch.randn(2, SIDE, SIDE).to(getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(seconds)


def kernel_times(run: Run, gradient: Callable, descend: Callable) -> dict:
    """Return figures of the kernels of PROFILED updates. On a CPU they are those of PyTorch's operations.

    idle: the share of the time, from the first kernel to the end of the last, in which none runs because the
    device waits for the host. kernels: each kernel's share of the sum of their times, the largest first.
    """
    on_gpu = run.args.device == "cuda"
    kind, activity = (
        (DeviceType.CUDA, ProfilerActivity.CUDA) if on_gpu else (DeviceType.CPU, ProfilerActivity.CPU)
    )
    with profile(activities=[activity]) as recorded:
        for _ in range(PROFILED):
            update(run, gradient, descend, lambda part: None)
        wait_for(run.args.device)

    # Annotations, such as that of an optimizer's step, are spans of time on the device but no kernels.
    events = recorded.profiler.kineto_results.events()
    kernels = [e for e in events if e.device_type() == kind and not e.is_user_annotation()]
    seconds = Counter()
    for event in kernels:
        seconds[event.name()] += event.duration_ns() / 1e9
    total = sum(seconds.values())
    return {
        "idle": idle_share([(e.start_ns(), e.start_ns() + e.duration_ns()) for e in kernels]),
        "kernels": {name: part / total for name, part in seconds.most_common()},
    }


def idle_share(intervals: list[tuple[int, int]]) -> float:
    """Return the share of the time from the first start to the last end that lies in no interval."""
    intervals = sorted(intervals)
    idle, end = 0, intervals[0][1]
    for start, stop in intervals:
        idle += max(0, start - end)
        end = max(end, stop)
    return idle / (end - intervals[0][0])


def describe(figures: dict) -> str:
    """Return the figures of `measure`, and those of `kernel_times` if they are there, as text."""
    shares = figures["shares"]
    outside = shares["batch"] + shares["rest"]
    rate, flops, product = (
        figures[name] for name in ("tokens_per_second", "flops_per_second", "product_flops")
    )
    of_peak = f"{figures['mfu']:.1%} MFU" if figures["mfu"] else "no MFU: peak unknown"
    if product:
        of_peak = f"{flops / product:.1%} of the {product:.3g} FLOP/s of a matrix product here"
    gaps = f"gaps     {figures['idle']:.1%} of the time without a kernel\n" if "idle" in figures else ""
    return (
        f"speed    {rate:,.0f} {figures['unit']}/s, {flops:.3g} FLOP/s, {of_peak}\n"
        f"memory   {figures['peak_memory'] / 1e9:.2f} GB at most\n"
        f"time     {shares['gradient']:.1%} forward and backward, {shares['update']:.1%} clipping and "
        f"optimizer, {outside:.2%} outside ({shares['batch']:.2%} waiting for data)\n{gaps}"
    )


def trace(run: Run, gradient: Callable, descend: Callable, out: Path) -> str:
    """Record three steps, those of rank 0 to out, for chrome://tracing or Perfetto.

    Returns a table of the ten operations that take the most time of the device.
    """
    on_gpu = run.args.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, schedule=schedule(wait=WARM_UP, warmup=1, active=3)) as recorded:
        for _ in range(WARM_UP + 4):
            update(run, gradient, descend, lambda part: None)
            recorded.step()
    if run.is_first:
        out.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(out))
    of = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=of, row_limit=10, max_name_column_width=60)
