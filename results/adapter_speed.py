"""What does it cost to give each row of a batch its own adapter?

    python -m results.adapter_speed --out results/adapter_speed.json        two minutes

64 rows through gpt.py's 10m size with random weights, LoRA of rank 16 on all its linear layers, in float32:

    one        all rows with the same adapter
    64         each row with its own; with the time to gather their factors, in `use`
    one by one the same rows, each alone with its adapter, in a loop
    base       no adapter

for prompts of 32 and 128 tokens (the forward pass and the last token's logits), and for 32 tokens that are
generated after a prompt of 32, for which the factors are gathered once. The four are measured in turn. The
figures are the median and the range of the ratios to "one".
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine import cpu
from formats.atomic import replace_file
from gpt import GPT, SIZES
from lora import Config, apply
from posttraining.adapters import adapted_layers, use

ROWS = 64
NAMES = [f"user{i}" for i in range(ROWS)]


def build() -> GPT:
    """Return a model with random weights and 64 adapters."""
    torch.manual_seed(0)
    model = GPT(SIZES["10m"]).eval()
    for name in NAMES:
        apply(model, Config(), name)
    with torch.no_grad():  # so that the adapters change the outputs
        for layer in adapted_layers(model).values():
            for adapter in layer.adapters.values():
                adapter.lora_B.normal_(std=0.02)
    return model


def read(model: GPT, tokens: Tensor) -> Tensor:
    """Return the logits of the last tokens."""
    return model.logits(model.hidden(tokens)[:, -1])


def write(model: GPT, tokens: Tensor) -> Tensor:
    """Return 32 new tokens for each row."""
    return torch.tensor(model.generate(tokens, 32, temperature=0))


def ways(model: GPT, work: Callable, tokens: Tensor) -> dict[str, Callable]:
    """Return the functions that are compared, each of which does this work."""

    def with_adapters(names):
        with use(model, names):
            return work(model, tokens)

    def one_by_one():
        rows = []
        for name, row in zip(NAMES, tokens, strict=True):
            with use(model, name):
                rows.append(work(model, row[None]))
        return torch.cat(rows)

    return {
        "one": lambda: with_adapters(NAMES[0]),
        "64": lambda: with_adapters(NAMES),
        "one by one": one_by_one,
        "base": lambda: with_adapters(None),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="measurements of each side (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    model = build()
    results = []
    for what, work, T in (("read 32", read, 32), ("read 128", read, 128), ("write 32", write, 32)):
        tokens = torch.randint(model.config.vocab_size, (ROWS, T), generator=torch.Generator().manual_seed(T))
        timed = ways(model, work, tokens)
        mixed, alone = timed["64"](), timed["one by one"]()
        same = torch.equal(mixed, alone) if work is write else torch.allclose(mixed, alone, atol=1e-4)
        seconds = {name: [] for name in timed}
        for _ in range(args.rounds):
            for name, run in timed.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        for name in timed:
            ratios = [a / b for a, b in zip(seconds[name], seconds["one"], strict=True)]
            row = {"what": what, "adapters": name, "seconds": statistics.median(seconds[name])}
            row |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)], "same": same}
            results.append(row)
            spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"{what:9} {name:11} {row['seconds'] * 1e3:9.1f} ms {row['ratio']:6.2f}x {spread}")
        if not same:
            sys.exit(f"error: {what}: rows of a batch differ from the same rows alone")
    if args.out:
        about = {"command": "python -m results.adapter_speed --out results/adapter_speed.json"}
        about |= {"cpu": cpu.name(), "torch": torch.__version__}
        about |= {"threads": torch.get_num_threads()}
        with replace_file(args.out) as new:
            new.write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
