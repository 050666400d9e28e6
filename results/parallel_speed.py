"""Tokens per second of training on a CPU in two processes, beside one process; each has one thread.

    python -m results.parallel_speed --out results/parallel_speed.json

All run `train.py --model gpt --benchmark`, in turn, with the same model, batch and text. The batch is divided
among the processes. What they exchange (gradients, and with fsdp weights) does not depend on its size, so a
larger batch gains more. The smaller one is the default of train.py.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path

import torch

from engine import cpu
from formats import command
from formats.json_file import write_json
from results.in_turn import arguments, compared, measure_in_turn, output_of

ROOT = Path(__file__).parent.parent
COMMAND = "python -m results.parallel_speed --out results/parallel_speed.json"
FLAGS = "--model gpt --benchmark --batch-size"
BATCHES = 8, 32  # rows
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
SIDES = {"1 process": "", "2 processes, ddp": "ddp", "2 processes, fsdp": "fsdp"}  # name: --parallel


def tokens_per_second(mode: str, batch: int) -> float:
    """Return the speed that train.py --benchmark prints, in one process, or in two with --parallel mode."""
    starter = [*TORCHRUN.split(), "train.py"] if mode else ["train.py"]
    line = [sys.executable, *starter, *FLAGS.split(), str(batch), *(["--parallel", mode] if mode else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = output_of(line, cwd=ROOT, env=env)
    return float(re.search(r"speed +([\d,]+) tokens/s", printed)[1].replace(",", ""))


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 3, argv)
    results = []
    for batch in BATCHES:
        print(f"batch of {batch}")
        sides = {side: partial(tokens_per_second, mode, batch) for side, mode in SIDES.items()}
        results += compared(measure_in_turn(sides, args.rounds), "1 process", batch=batch)

    if args.out:
        about = {"command": COMMAND, "flags": FLAGS, "cpu": cpu.name(), "torch": torch.__version__}
        write_json(args.out, about | {"results": results})


if __name__ == "__main__":
    command.run(main)
