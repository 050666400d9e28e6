"""What a second process brings on a CPU: training tokens per second of two processes with one thread each,
beside one process with one thread.

    python -m results.parallel_speed --out results/parallel_speed.json

Both run `train.py --model gpt --benchmark`, in turn; the model, the batch and the text are the same. What the
processes have to tell each other is the gradients, as many of them however large the batch. The smaller batch
is train.py's own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from engine import cpu

ROOT = Path(__file__).parent.parent

FLAGS = "--model gpt --benchmark --batch-size"
BATCHES = 8, 32
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
SIDES = {"1 process": "", "2 processes, ddp": "ddp", "2 processes, fsdp": "fsdp"}


def tokens_per_second(mode: str, batch: int) -> float:
    starter = [*TORCHRUN.split(), "train.py"] if mode else ["train.py"]
    command = [sys.executable, *starter, *FLAGS.split(), str(batch), *(["--parallel", mode] if mode else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"speed +([\d,]+) tokens/s", said)[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    results = []
    for batch in BATCHES:
        figures = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, mode in SIDES.items():
                figures[side].append(tokens_per_second(mode, batch))
        print(f"batch of {batch}")
        for side, rates in figures.items():
            ratios = [ours / alone for ours, alone in zip(rates, figures["1 process"], strict=True)]
            row = {"batch": batch, "side": side, "tokens_per_second": statistics.median(rates)}
            row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            results.append(row)
            print(f"  {side:18} {row['tokens_per_second']:9,.0f} tokens/s   {row['ratio']:.2f}x", end="")
            print(f" ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    if args.out:
        machine = {"cpu": cpu.name(), "torch": torch.__version__}
        command = "python -m results.parallel_speed --out results/parallel_speed.json"
        args.out.write_text(
            json.dumps({"command": command, "flags": FLAGS, **machine, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
