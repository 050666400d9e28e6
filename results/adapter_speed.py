"""What does it cost to give each row of a batch its own adapter?

    python -m results.adapter_speed --out results/adapter_speed.json        two minutes

A batch of 64 rows goes through gpt.py's size 10m with random weights, in float32. There are 64 adapters, LoRA
of rank 16 on all linear layers. Four ways are measured in turn:

    one           all rows with the same adapter
    64            each row with its own adapter
    one by one    each row alone with its own adapter, in a loop
    base          no adapter

Each does three kinds of work: prompts of 32 and of 128 tokens (the forward pass and the logits of the last
tokens), and 32 tokens generated after a prompt of 32. The time of the second way includes gathering the
adapters' factors (`use`), once for each piece of work. Figures are the median seconds, and the median and
range of their ratio to "one".
"""

import os
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from formats import command
from gpt import GPT, SIZES
from lora import Config, apply
from posttraining.adapters import adapted_layers, use
from results.in_turn import arguments, measure_in_turn, seconds, write_figures

ROWS = 64
NAMES = [f"user{i}" for i in range(ROWS)]


def build() -> GPT:
    """Return a model with random weights and 64 adapters."""
    torch.manual_seed(0)
    model = GPT(SIZES["10m"]).eval()
    for name in NAMES:
        apply(model, Config(), name)
    with torch.no_grad():  # lora_B begins as 0, with which adapters would not change the outputs
        for layer in adapted_layers(model).values():
            for adapter in layer.adapters.values():
                adapter.lora_B.normal_(std=0.02)
    return model


def read(model: GPT, tokens: Tensor) -> Tensor:
    """Return the logits (B, V) of the last of tokens (B, T)."""
    return model.logits(model.hidden(tokens)[:, -1])


def write(model: GPT, tokens: Tensor) -> Tensor:
    """Return 32 new tokens (B, 32) for each row of tokens (B, T)."""
    return torch.tensor(model.generate(tokens, 32, temperature=0))


def ways(model: GPT, work: Callable, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
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
def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 7, argv)
    load, model, results = os.getloadavg()[0], build(), []
    for what, work, T in (("read 32", read, 32), ("read 128", read, 128), ("write 32", write, 32)):
        tokens = torch.randint(model.config.vocab_size, (ROWS, T), generator=torch.Generator().manual_seed(T))
        functions = ways(model, work, tokens)
        mixed, alone = functions["64"](), functions["one by one"]()
        same = torch.equal(mixed, alone) if work is write else torch.allclose(mixed, alone, atol=1e-4)
        if not same:
            raise ValueError(f"{what}: the rows of a batch differ from the same rows alone")
        times = measure_in_turn({way: partial(seconds, f) for way, f in functions.items()}, args.rounds)
        for way, of_way in times.items():
            ratios = [a / b for a, b in zip(of_way, times["one"], strict=True)]
            row = {"what": what, "adapters": way, "seconds": statistics.median(of_way)}
            row |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)], "same": same}
            results.append(row)
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{what:9} {way:11} {row['seconds'] * 1e3:9.1f} ms {row['ratio']:6.2f}x {spread}")
    if args.out:
        write_figures(args.out, "adapter_speed", load, results, peer=None)


if __name__ == "__main__":
    command.run(main)
