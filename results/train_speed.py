"""Tokens per second of training GPT-2 shapes on this machine, beside nanoGPT.

    git clone https://github.com/karpathy/nanoGPT
    python -m results.train_speed nanoGPT --out results/train_speed.json

Each side runs its own train.py, in turn, on the same bytes, with biases, AdamW and no dropout, without
torch.compile and with it (nanoGPT's default). The figure of a run is the median over its steps after the
first five. Two things differ: we compute GPT-2's GELU in its tanh form, nanoGPT in the erf form, which
PyTorch runs twice as fast on a CPU; and nanoGPT trains in float32 on a CPU, so bfloat16 is measured on our
side only.
"""

import argparse
import pickle
import re
import statistics
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import corpus
from engine import cpu
from formats import command
from formats.json_file import write_json
from gpt import GPT, GPT2, Config
from results.in_turn import compared, measure_in_turn, output_of
from results.training_runs import logged

ROOT = Path(__file__).parent.parent
COMMAND = "python -m results.train_speed nanoGPT --out results/train_speed.json"


class Shape(NamedTuple):
    """A model, the rows that it learns from, and the steps of a run."""

    n_layers: int
    n_heads: int
    d_model: int
    vocab_size: int
    T: int  # tokens of a row
    batch: int  # rows
    steps: int


SHAPES = {
    "4 layers, width 128, GPT-2's 50,257 tokens": Shape(4, 4, 128, 50257, 128, 16, 12),
    "6 layers, width 384 (10.8M), bytes": Shape(6, 6, 384, 257, 256, 8, 16),
    "5 layers, width 384 (10.5M), 4,096 tokens": Shape(5, 6, 384, 4096, 256, 8, 16),
}
WARM_UP = 5  # steps
BASELINE = "nanoGPT float32"


def write_texts(folder: Path, home: Path) -> None:
    """Write the same bytes for both sides: folder/text.txt, and nanoGPT's data set in `home`."""
    text = "".join(path.read_text(encoding="utf-8") for _, path in corpus.stdlib_files())[: 1 << 18]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    home.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(home / f"{split}.bin")


def nanogpt(home: Path, shape: Shape, compiled: bool) -> float:
    """Return the tokens per second of nanoGPT's train.py in its clone `home`."""
    meta = home / "data" / "plinth_bytes" / "meta.pkl"
    meta.write_bytes(pickle.dumps({"vocab_size": shape.vocab_size}))
    options = dict(dataset="plinth_bytes", device="cpu", dtype="float32", compile=compiled)
    options |= dict(dropout=0.0, bias=True, n_layer=shape.n_layers, n_head=shape.n_heads)
    options |= dict(n_embd=shape.d_model, block_size=shape.T, batch_size=shape.batch)
    options |= dict(gradient_accumulation_steps=1, max_iters=shape.steps, log_interval=1, eval_interval=10**6)
    options |= dict(eval_iters=1, always_save_checkpoint=False)
    line = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]
    log = output_of(line, cwd=home)
    times = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .* time ([\d.]+)ms", log)]
    return shape.batch * shape.T / statistics.median(times[WARM_UP:])


def plinth(folder: Path, shape: Shape, compiled: bool, dtype: str) -> float:
    """Return the tokens per second of our train.py; `folder` keeps the text and the untrained models."""
    model = folder / f"{shape.n_layers}-{shape.d_model}-{shape.vocab_size}"
    if not model.exists():
        sizes = (*shape[:3], 4 * shape.d_model, shape.vocab_size, shape.T)
        GPT(Config(*sizes, **GPT2 | {"eos_token_id": 256})).save_pretrained(model)
    out = Path(tempfile.mkdtemp(dir=folder))
    options = (
        f"--model gpt --tokenizer bytes --dtype {dtype} --batch-size {shape.batch} --steps {shape.steps}"
    )
    options += f" --log-every 1 --eval-every {shape.steps}"
    line = [sys.executable, ROOT / "train.py", *options.split(), "--init-from", model, "--out", out]
    line += ["--data", folder / "text.txt", "--cache", folder / "cache", *["--compile"] * compiled]
    output_of(line)
    return statistics.median([row["tokens_per_second"] for row in logged(out) if "loss" in row][WARM_UP:])


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("nanogpt", type=command.path, help="a clone of nanoGPT")
    add("--rounds", type=command.count, default=3, help="measurements of each side (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if not (args.nanogpt / "train.py").is_file():
        raise ValueError(f"{args.nanogpt}: expected a clone of nanoGPT, with its train.py")

    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(folder, args.nanogpt / "data" / "plinth_bytes")
        for (name, shape), compiled in product(SHAPES.items(), (False, True)):
            print(f"{name}, T {shape.T}, batch {shape.batch}{', compiled' if compiled else ''}")
            same = {"shape": shape, "compiled": compiled}
            sides = {
                BASELINE: partial(nanogpt, args.nanogpt, **same),
                "plinth float32": partial(plinth, folder, dtype="float32", **same),
                "plinth bfloat16": partial(plinth, folder, dtype="bfloat16", **same),
            }
            figures = measure_in_turn(sides, args.rounds)
            results += compared(figures, BASELINE, shape=name, compiled=compiled)

    if args.out:
        about = {"command": COMMAND, "cpu": cpu.name(), "threads": torch.get_num_threads()}
        about |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        write_json(args.out, about | {"results": results})


if __name__ == "__main__":
    command.run(main)
