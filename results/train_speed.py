"""Training tokens per second on this machine, beside nanoGPT's, of GPT-2-shaped models of the same shapes.

    git clone https://github.com/karpathy/nanoGPT
    python -m results.train_speed nanoGPT --out results/train_speed.json

Both sides run their own train.py as a whole, in turn, on the same bytes, with biases, no dropout and AdamW,
once without and once with torch.compile, which nanoGPT has on unless told otherwise; one figure is the median
over the steps of a run after the first five. GPT-2's GELU is the tanh form; nanoGPT computes the erf form,
which PyTorch runs twice as fast on a CPU. bfloat16 is ours alone: nanoGPT trains in float32 on a CPU.
"""

import argparse
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from data import corpus
from engine.report import environment
from gpt import GPT, GPT2, Config

ROOT = Path(__file__).parent.parent

SHAPES = {  # layers, heads, width, vocabulary, T, batch, steps
    "4 layers, width 128, GPT-2's 50,257 tokens": (4, 4, 128, 50257, 128, 16, 12),
    "6 layers, width 384 (10.8M), bytes": (6, 6, 384, 257, 256, 8, 16),
    "5 layers, width 384 (10.5M), 4,096 tokens": (5, 6, 384, 4096, 256, 8, 16),
}
WARM_UP = 5


def nanogpt(home: Path, shape: tuple, compiled: bool) -> float:
    n_layers, n_heads, d_model, vocab_size, T, batch, steps = shape
    (home / "data" / "plinth_bytes" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    options = dict(
        dataset="plinth_bytes", device="cpu", dtype="float32", compile=compiled, dropout=0.0, bias=True
    )
    options |= dict(n_layer=n_layers, n_head=n_heads, n_embd=d_model, block_size=T, batch_size=batch)
    options |= dict(gradient_accumulation_steps=1, max_iters=steps, log_interval=1, eval_interval=10**6)
    options |= dict(eval_iters=1, always_save_checkpoint=False)
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]
    said = subprocess.run(command, cwd=home, check=True, capture_output=True, text=True).stdout
    times = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .* time ([\d.]+)ms", said)]
    return batch * T / statistics.median(times[WARM_UP:])


def plinth(folder: Path, shape: tuple, compiled: bool, dtype: str) -> float:
    n_layers, n_heads, d_model, vocab_size, T, batch, steps = shape
    model = folder / f"{n_layers}-{d_model}-{vocab_size}"
    if not model.exists():
        gpt2 = GPT2 | {"eos_token_id": 256}
        GPT(Config(n_layers, n_heads, d_model, 4 * d_model, vocab_size, T, **gpt2)).save_pretrained(model)
    out = tempfile.mkdtemp(dir=folder)
    options = f"--model gpt --init-from {model} --tokenizer bytes --dtype {dtype} --batch-size {batch}"
    options += f" --steps {steps} --log-every 1 --eval-every {steps} --out {out} --cache {folder / 'cache'}"
    command = [sys.executable, ROOT / "train.py", *options.split(), "--data", folder / "text.txt"]
    command += ["--compile"] * compiled
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]
    return statistics.median([row["tokens_per_second"] for row in rows if "loss" in row][WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = corpus.stdlib_files()
        text = "".join(path.read_text() for _, path in files)[: 1 << 18]
        (folder / "text.txt").write_text(text)
        home = args.nanogpt / "data" / "plinth_bytes"
        home.mkdir(exist_ok=True)
        for split in ("train", "val"):
            np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(home / f"{split}.bin")
        sides = {
            "nanoGPT float32": partial(nanogpt, args.nanogpt),
            "plinth float32": partial(plinth, folder, dtype="float32"),
            "plinth bfloat16": partial(plinth, folder, dtype="bfloat16"),
        }
        results = []
        for (name, shape), compiled in product(SHAPES.items(), (False, True)):
            figures = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side, measure in sides.items():
                    figures[side].append(measure(shape=shape, compiled=compiled))
            peer = figures["nanoGPT float32"]
            print(f"{name}, T {shape[4]}, batch {shape[5]}{', compiled' if compiled else ''}")
            for side, rates in figures.items():
                ratios = [ours / theirs for ours, theirs in zip(rates, peer, strict=True)]
                row = {"shape": name, "compiled": compiled, "side": side}
                row |= {"tokens_per_second": statistics.median(rates), "ratio": statistics.median(ratios)}
                row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
                results.append(row)
                print(f"  {side:17} {row['tokens_per_second']:9,.0f} tokens/s   {row['ratio']:.2f}x", end="")
                print(f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})", flush=True)
    if args.out:
        machine = {key: environment()[key] for key in ("cpu", "threads", "torch")}
        machine |= {"capability": torch.backends.cpu.get_cpu_capability()}
        command = "python -m results.train_speed nanoGPT --out results/train_speed.json"
        args.out.write_text(json.dumps({"command": command, **machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
