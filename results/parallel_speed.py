"""Training tokens per second on a CPU: two processes with one thread each, beside one process with one
thread.

    python -m results.parallel_speed --out results/parallel_speed.json

All run `train.py --model gpt --benchmark`, in turn, with the same model, batch and text. The processes
exchange gradients, whose number does not depend on the batch. The smaller batch is the default of train.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from engine import cpu
from results.in_turn import compared, measure_in_turn

ROOT = Path(__file__).parent.parent

FLAGS = "--model gpt --benchmark --batch-size"
BATCHES = 8, 32  # rows
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
SIDES = {"1 process": "", "2 processes, ddp": "ddp", "2 processes, fsdp": "fsdp"}  # name: --parallel


def tokens_per_second(mode: str, batch: int) -> float:
    """Return the speed that train.py --benchmark prints, in one process, or in two with --parallel mode."""
    starter = [*TORCHRUN.split(), "train.py"] if mode else ["train.py"]
    command = [sys.executable, *starter, *FLAGS.split(), str(batch), *(["--parallel", mode] if mode else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"speed +([\d,]+) tokens/s", printed)[1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each side (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    results = []
    for batch in BATCHES:
        print(f"batch of {batch}")
        sides = {side: partial(tokens_per_second, mode, batch) for side, mode in SIDES.items()}
        results += compared(measure_in_turn(sides, args.rounds), "1 process", batch=batch)

    if args.out:
        machine = {"flags": FLAGS, "cpu": cpu.name(), "torch": torch.__version__}
        command = "python -m results.parallel_speed --out results/parallel_speed.json"
        args.out.write_text(
            json.dumps({"command": command, **machine, "results": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
