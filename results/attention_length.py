"""Time and memory of four kinds of attention over the length of the text, forward and backward, on a CPU.

    python -m results.attention_length --out results/attention_length.json          three minutes

    softmax         PyTorch's fused causal attention, as `kernels.attention` calls it
    linear          attention of attention_variants/linear.py in chunks, by kernels/linear_attention.py
    MoBA            the choice of blocks by attention_variants/moba.py, and attention to 8 blocks of 64 keys
    native sparse   all branches of attention_variants/native_sparse.py without its projections, in the sizes
                    of the paper (Yuan et al. 2025, section 4.1), but 8 blocks of 64 keys instead of 16, and a
                    window of 256 instead of 512

One row of T tokens, four heads of width 64, in float32, with one thread. Queries and keys are random, so
neighbouring queries choose different blocks, which is the slowest case. Seconds are processor time of this
process, which other programs on the machine lengthen little. Each length is measured --rounds times, the
kinds in turn, and the median is written. Memory is the most that tensors take at a time beyond the inputs, by
PyTorch's profiler.

Each figure is written to --out when it is measured. Figures that are in it already are not measured again,
and those of another machine are refused.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attention_variants import linear, moba, native_sparse
from formats import command
from formats.figures import load_pyplot, save_figure
from kernels import attention
from kernels.linear_attention import linear_attention
from kernels.selected_attention import selected_attention
from results.in_turn import measure_in_turn, peak_memory
from results.keep import Ended

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
H, K, BLOCK, N = 4, 64, 64, 8
SPARSE = native_sparse.Config(
    1, H, H * K, 1, 1, summary_size=32, summary_stride=16, block_size=BLOCK, n_selected=N, window=256
)


def of_moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return MoBA's attention (1, T, H, K) of q, k and v (1, T, H, K)."""
    positions = torch.arange(q.shape[1])[None]
    return selected_attention(q, k, v, moba.choose(q, k, positions, BLOCK, N), BLOCK)


def of_native_sparse(layer: native_sparse.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the sum of the three branches (1, T, H, K), which here share their keys and values (1, T, H,
    K)."""
    return sum(layer.whole(q, [k] * 3, [v] * 3))


def kinds() -> dict[str, Callable]:
    """Return the functions that are measured, by name. Each takes q, k and v, all (1, T, H, K)."""
    decays = linear.slopes(H, 0, 2, like=torch.zeros(1))  # of the first of two layers
    layer = native_sparse.Attention(SPARSE, 0)
    return {
        "softmax": partial(attention, causal=True, backend="torch"),
        "linear": lambda q, k, v: linear_attention(q, k, v, decays, backend="torch")[0],
        "MoBA": of_moba,
        "native sparse": partial(of_native_sparse, layer),
    }


def inputs(T: int) -> list[Tensor]:
    """Return random q, k and v, each (1, T, H, K), float32."""
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(1, T, H, K, generator=generator).requires_grad_() for _ in range(3)]


def seconds(f: Callable, T: int) -> tuple[float, float]:
    """Return the seconds of processor time of a forward pass of f, and of the backward pass after it."""
    leaves = inputs(T)
    began = time.process_time()
    out = f(*leaves)
    between = time.process_time()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return between - began, time.process_time() - between


def n_bytes(f: Callable, T: int) -> int:
    """Return the most bytes that a forward and a backward pass hold at any one time, beyond the inputs."""
    leaves = inputs(T)

    def passes() -> None:
        out = f(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return peak_memory(passes)


def plot(rows: list[dict], path: Path) -> None:
    """Draw the seconds, forward and backward, and the memory over the length."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["T"])
        lengths = [row["T"] for row in of]
        left.loglog(lengths, [row["forward"] + row["backward"] for row in of], "o-", label=kind)
        right.loglog(lengths, [row["bytes"] / 2**20 for row in of], "o-", label=kind)
    left.set(xlabel="tokens", ylabel="seconds", title="forward and backward, one thread")
    right.set(xlabel="tokens", ylabel="MiB", title="memory besides the inputs")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xticks(LENGTHS, map(str, LENGTHS))
        axes.minorticks_off()
    save_figure(figure, path)


def report(rows: list[dict]) -> None:
    """Print a table, the growth of each kind's seconds from 1,024 to 16,384 tokens, and how many times as
    fast as softmax attention linear attention is at each length."""
    total = {(row["kind"], row["T"]): row["forward"] + row["backward"] for row in rows}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = [row for row in rows if row["kind"] == kind]
        cells = [f"{total[kind, row['T']]:8.3f} s {row['bytes'] / 2**20:6.0f} MiB" for row in of]
        print(f"{kind:14}", *cells, end="")
        if (kind, 1024) in total and (kind, 16384) in total:
            print(f"   1k to 16k: {total[kind, 16384] / total[kind, 1024]:.1f}x", end="")
        print()
    for T in LENGTHS:
        if ("softmax", T) in total and ("linear", T) in total:
            print(f"T {T}: softmax / linear = {total['softmax', T] / total['linear', T]:.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--lengths",
        type=command.count,
        nargs="+",
        default=list(LENGTHS),
        help="tokens of a row (default: 512, 1024 and so on to 16384)",
    )
    add("--rounds", type=command.count, default=3, help="rounds of measurement (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON; a plot is beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shown = "python -m results.attention_length --out results/attention_length.json"
    about = {"command": shown, "threads": 1, "heads": H, "width": K}
    ended = Ended(args.out, about, rows="results", same=("cpu", "torch", "threads", "heads", "width"))
    functions = kinds()
    for T in args.lengths:
        missing = {kind: f for kind, f in functions.items() if not ended.has(kind=kind, T=T)}
        # The first call of a function does more than others. In the seconds of a long row this is lost, so
        # only short ones have a round to warm up.
        sides = {kind: partial(seconds, f, T) for kind, f in missing.items()}
        for kind, times in measure_in_turn(sides, args.rounds, warm_up=T < 4096).items():
            forward, backward = (statistics.median(of_pass) for of_pass in zip(*times, strict=True))
            row = {"kind": kind, "T": T, "forward": forward, "backward": backward}
            row |= {"rounds": args.rounds, "bytes": n_bytes(functions[kind], T)}
            ended.add(row)
            print(f"{kind:14} T {T:6} {row['forward']:.3f} {row['backward']:.3f} s", flush=True)
    report(ended.rows)
    plot(ended.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
