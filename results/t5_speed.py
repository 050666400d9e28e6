"""T5 beside transformers' on this machine, both with the same random weights: greedy outputs, and training.

    python -m results.t5_speed --out results/t5_speed.json        (needs transformers)

Both compute in float32, and are measured in turn (A B A B ...). Two measurements:

    outputs     greedy decoding of the same random inputs, the encoder included; the tokens are equal
                (checked). Sizes that gain by it (kernels/few_rows.py) are also measured with the step of one
                token compiled; compiling takes half a minute and is not measured
    training    forward, backward and a step of PyTorch's AdamW on the same batch, without dropout; the losses
                are equal (checked)
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch

from engine import cpu
from formats import command
from kernels import few_rows
from language.t5 import SIZES, T5, Config
from results.in_turn import compared, measure_in_turn, opened_by, rate, write_figures
from results.peers import require

SHAPES = {"tiny": SIZES["tiny"], "t5-small": SIZES["small"]}
INPUT, NEW = 32, 64  # tokens of a row
BATCH, S, T = 16, 256, 64  # of a step of training: rows, and tokens of their inputs and outputs


def both_models(config: Config):
    """Return our model with random weights, and the same one as transformers opens it."""
    import transformers

    torch.manual_seed(0)
    ours = T5(config).eval()
    return ours, opened_by(transformers.T5ForConditionalGeneration, ours)


def writers(ours: T5, theirs, batch: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return for each side a function that writes outputs of NEW tokens for the same random inputs."""
    inputs = torch.randint(2, ours.config.vocab_size, (batch, INPUT))
    options = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": NEW,
        "attention_mask": torch.ones_like(inputs),
    }
    theirs.generation_config.eos_token_id = None  # so that no output ends early
    sides = {
        "transformers": lambda: theirs.generate(inputs, **options)[:, 1:].tolist(),
        "plinth": lambda: ours.generate(inputs, NEW, temperature=0, stop=()),
    }
    if few_rows.gains_by_compiling(ours):
        sides["plinth, compiled"] = lambda: ours.generate(inputs, NEW, temperature=0, stop=(), compile=True)
    return sides


def steps(ours: T5, theirs) -> dict[str, Callable[[], float]]:
    """Return for each side a function that makes a step on the same batch, and returns its loss."""
    tokens, targets = (torch.randint(2, ours.config.vocab_size, (BATCH, n)) for n in (S, T))

    def step(model, loss) -> float:
        value = loss()
        value.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()
        return value.item()

    optimizers = {model: torch.optim.AdamW(model.parameters()) for model in (ours, theirs)}
    losses = {
        theirs: lambda: theirs(input_ids=tokens, labels=targets).loss,
        ours: lambda: ours.loss({"tokens": tokens, "targets": targets})[0],
    }
    return {
        "transformers": partial(step, theirs, losses[theirs]),
        "plinth": partial(step, ours, losses[ours]),
    }


def measure(name: str, rounds: int) -> list[dict]:
    """Return the rows of one of SHAPES. Raises ValueError if the two sides do not compute the same."""
    ours, theirs = both_models(SHAPES[name])
    rows = []
    for batch in (1, 8):
        sides = writers(ours, theirs, batch)
        first, *others = (write() for write in sides.values())
        if any(tokens != first for tokens in others):
            raise ValueError(f"{name}, batch {batch}: the tokens differ")
        print(f"{name}, outputs of {NEW} tokens, batch {batch}")
        timed = {side: partial(rate, write, batch * NEW) for side, write in sides.items()}
        figures = measure_in_turn(timed, rounds)
        rows += compared(figures, "transformers", shape=name, what="outputs", batch=batch)
    if name == "tiny":
        cpu.multiply_by_onednn()  # as train.py does; the other side has it too
        sides = steps(ours, theirs)
        losses = [step() for step in sides.values()]
        if abs(losses[0] - losses[1]) > 1e-4:
            raise ValueError(f"{name}: the losses differ: {losses}")
        print(f"{name}, training on {BATCH} rows of {S} and {T} tokens")
        timed = {side: partial(rate, step, BATCH * (S + T), 3) for side, step in sides.items()}
        figures = measure_in_turn(timed, rounds)
        rows += compared(figures, "transformers", shape=name, what="training", batch=BATCH)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=command.count, default=7, help="measurements of each side (default %(default)s)")
    add("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES), help="sizes of T5 (default: all)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("transformers")

    load = os.getloadavg()[0]
    cpu.keep_memory()
    results = [row for name in args.sizes for row in measure(name, args.rounds)]
    if args.out:
        write_figures(args.out, "t5_speed", load, results)


if __name__ == "__main__":
    command.run(main)
