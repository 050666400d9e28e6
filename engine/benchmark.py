"""How fast a run is, and where its time goes.

    MFU = tokens per second * FLOPs per token / dense bf16 peak of the device

Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B) counts what the model's equations ask for,
not what is computed a second time: it compares machines and implementations alike.

    python train.py --model gpt --benchmark     50 steps: tokens per second, MFU, memory, and the share of
                                                each part of a step
    python train.py --model gpt --profile       the operations that take longest, and a trace for a viewer
"""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from engine import parallel
from engine.run import Run

WARM_UP, STEPS = 5, 50

# Dense bf16 matmul peak in FLOP/s, by the name that CUDA gives the device. An unknown device shows no MFU
# rather than a guess.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200 data sheet (half of "with sparsity", here and below)
    "NVIDIA H200": 989e12,  # NVIDIA H200 data sheet
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA H100 data sheet, SXM
    "NVIDIA H100 NVL": 835e12,  # NVIDIA H100 NVL data sheet
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 data sheet
    "NVIDIA A100-SXM4-80GB": 312e12,  # NVIDIA A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,  # NVIDIA L40S data sheet
    "NVIDIA L4": 121e12,  # NVIDIA L4 data sheet
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada whitepaper, appendix A, float32 accumulation
    "NVIDIA GeForce RTX 3090": 71e12,  # NVIDIA GA102 whitepaper, table 9, float32 accumulation
    "AMD Instinct MI300X": 1307e12,  # AMD Instinct MI300X data sheet
}


def peak_flops(device: str) -> float | None:
    """FLOP/s, None for a device that is not in the table."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name()) if device == "cuda" else None


def mfu(run: Run, tokens_per_second: float) -> float | None:
    """The header's equation, for all processes together; None where the peak is not known."""
    peak = peak_flops(run.args.device)
    flops = tokens_per_second * run.model.flops_per_token(run.args.seq_len)
    return flops / (peak * parallel.n_processes()) if peak else None


class Clock:
    """Seconds between calls, under the name of each; with CUDA in the GPU's time, without waiting for it."""

    def __init__(self, device: str):
        self.device, self.marks = device, []

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """Summed by name; to be asked when the device has done all."""
        sums = defaultdict(float)
        for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False):
            sums[name] += before.elapsed_time(now) / 1e3 if self.device == "cuda" else now - before
        return dict(sums)


def measure(run: Run, update: Callable, log: Callable) -> dict:
    """Figures of STEPS steps as `train` makes them, logging included; evaluation and saving are not.

    update, log: train.py's `update` and `log_row`. Returns tokens_per_second, mfu, peak_memory in bytes (with
    CUDA that of these steps, else of the process until now), and shares of the time: "batch" until the data
    is there, "gradient" forward and backward, "update" clipping and optimizer, "rest" all else.
    """
    args, clock = run.args, Clock(run.args.device)
    for _ in range(WARM_UP):
        update(run)
    wait_for(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock("start")
    began = time.perf_counter()
    for i in range(1, STEPS + 1):
        loss, norm, lr, metrics = update(run, clock)
        if i % args.log_every == 0:
            log(run, loss, norm, lr, metrics, 1.0)
    clock("rest")
    wait_for(args.device)
    seconds = time.perf_counter() - began
    parts = clock.seconds()
    rate = STEPS * run.tokens_per_step / seconds
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:  # kB, but bytes on macOS
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return {
        "tokens_per_second": rate,
        "mfu": mfu(run, rate),
        "flops_per_second": rate * run.model.flops_per_token(args.seq_len),
        "peak_memory": memory,
        "shares": {name: part / sum(parts.values()) for name, part in parts.items()},
    }


def describe(figures: dict) -> str:
    """Of `measure`, for people."""
    of_peak = f"{figures['mfu']:.1%} MFU" if figures["mfu"] else "no MFU: peak unknown"
    shares = figures["shares"]
    outside = shares["batch"] + shares["rest"]
    rate, flops = figures["tokens_per_second"], figures["flops_per_second"]
    return (
        f"speed    {rate:,.0f} tokens/s, {flops:.3g} FLOP/s, {of_peak}\n"
        f"memory   {figures['peak_memory'] / 1e9:.2f} GB at most\n"
        f"time     {shares['gradient']:.1%} forward and backward, {shares['update']:.1%} clipping and "
        f"optimizer, {outside:.2%} outside ({shares['batch']:.2%} waiting for data)\n"
    )


def trace(run: Run, update: Callable, out: Path) -> str:
    """Record three steps, the first process's to out, for chrome://tracing or Perfetto; returns a table of
    the ten operations that take the most time of the device."""
    on_gpu = run.args.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, schedule=schedule(wait=WARM_UP, warmup=1, active=3)) as recorded:
        for _ in range(WARM_UP + 4):
            update(run)
            recorded.step()
    if run.is_first:
        out.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(out))
    of = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=of, row_limit=10, max_name_column_width=60)


def wait_for(device: str) -> None:
    """Until the device has done all that it was told."""
    if device != "cpu":
        getattr(torch, device).synchronize()
