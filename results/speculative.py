"""Speculative decoding: tokens per second with each kind of draft, beside the model alone.

    python -m results.speculative --out results/speculative.json       about 20 minutes of one core

Three models learn Python's library, byte by byte: "small", of eight layers of width 96 with three further
heads (language/multi_token.py), "large", of eight layers of width 320, and "draft", of one layer of width 96.
Small and large continue pieces of a file that none was trained on, one row at a time, alone and with guesses
of the next bytes, which they check in one pass. The guesses are made by

    draft      the model of this name
    heads      the model's own further heads, which only "small" has
    look-up    a copy of what followed when the last bytes occurred before

Each is measured with several numbers g of guesses per pass. All are measured in turn, so that a busy minute
of the machine slows all of them. A row has the tokens per pass that were counted, and as "formula" the
expected number (1 - a^(g+1)) / (1 - a), where a is the share of guesses that were accepted (Leviathan et al.
2023, equation 1). Time is processor time of one thread, because other programs used the machine too. Runs of
train.py in --work are not repeated, and rows in --out are kept.
"""

import statistics
import sysconfig
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data.tokenizer import get_tokenizer
from formats import command
from formats.open_model import open_model
from language.multi_token import Heads
from language.speculative import Counts, Draft, DraftModel, Lookup, expected_tokens, generate
from results.in_turn import measure_in_turn, median_and_range, rate
from results.keep import Ended
from results.training_runs import run

LIBRARY = Path(sysconfig.get_path("stdlib"))
HELD_OUT = LIBRARY / "textwrap.py"  # not among the files a to s of the training text
DATA = ["--data", f"{LIBRARY}/[a-s]*.py", "--val", str(HELD_OUT), "--tokenizer", "bytes"]
SHAPE = ["--seq-len", "128", "--batch-size", "16", "--eval-every", "1000", "--set"]
NARROW = ["d_model=96", "d_ff=256"]
RUNS = {
    "small": ["--model", "multi_token", "--steps", "300", *DATA, *SHAPE, *NARROW, "n_layers=8"],
    "large": ["--model", "gpt", "--steps", "300", *DATA, *SHAPE, "d_model=320", "d_ff=864", "n_layers=8"],
    "draft": ["--model", "gpt", "--steps", "1000", *DATA, *SHAPE, *NARROW, "n_layers=1"],
}
DRAFTS = {  # of each model, with their guesses per pass
    "small": {"draft": (1, 2, 4, 6), "heads": (1, 2, 3), "look-up": (2, 4, 8)},
    "large": {"draft": (1, 2, 3, 4, 6), "look-up": (2, 4, 8)},
}
PROMPT, NEW = 96, 128  # bytes


def prompts_of(directory: Path, n: int) -> list[list[int]]:
    """Return n pieces of the held-out file, each of PROMPT tokens (bytes), evenly spaced."""
    tokens = get_tokenizer(str(directory)).encode(HELD_OUT.read_text(encoding="utf-8"))
    return [tokens[i * len(tokens) // n :][:PROMPT] for i in range(n)]


def measure(
    model: nn.Module,
    sides: list[tuple[str, int]],
    drafts: dict[str, Draft],
    prompts: list[list[int]],
    temperature: float,
    rounds: int,
) -> list[dict]:
    """Return a row of figures for each side, which is the name of a draft and a number of guesses per pass.

    prompts: the tokens of each. rounds: measurements of each side. At temperature 0 a row also has the number
    of prompts that are continued as by the model alone.
    """
    counts = {side: Counts() for side in sides}
    texts: dict[tuple | str, list] = {}

    def alone() -> None:
        options = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        texts["alone"] = [model.generate([prompt], NEW, **options) for prompt in prompts]

    def guessed(side: tuple[str, int]) -> None:
        options = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        options |= {"n_drafts": side[1], "counts": counts[side]}
        texts[side] = [generate(model, drafts[side[0]], [prompt], NEW, **options) for prompt in prompts]

    # All sides in turn, after a first round that is not counted.
    calls = {"alone": alone} | {side: partial(guessed, side) for side in sides}
    for call in calls.values():
        call()
    n = len(prompts) * NEW
    timed = {side: partial(rate, call, n, clock=time.process_time) for side, call in calls.items()}
    figures = measure_in_turn(timed, rounds)

    rows = []
    for side in sides:
        ratios = [mine / plain for mine, plain in zip(figures[side], figures["alone"], strict=True)]
        a, found = counts[side].acceptance, counts[side].tokens_per_pass
        row = {"temperature": temperature, "draft": side[0], "n_drafts": side[1], "acceptance": round(a, 3)}
        row |= {"tokens_per_pass": round(found, 2), "formula": round(expected_tokens(a, side[1]), 2)}
        row |= {"tokens_per_second": round(statistics.median(figures[side]))}
        row |= {"alone": round(statistics.median(figures["alone"]))}
        row |= {name: round(ratio, 2) for name, ratio in median_and_range(ratios).items()}
        if temperature == 0:
            row["same_texts"] = sum(x == y for x, y in zip(texts[side], texts["alone"], strict=True))
        rows.append(row)
        print(row, flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures")
    work = Path("runs/speculative")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    add("--rounds", type=command.count, default=3, help="measurements of each side (default %(default)s)")
    add(
        "--prompts",
        type=command.count,
        default=3,
        help="pieces of the held-out file to continue (default %(default)s)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    # Train all.
    cache = ["--cache", str(args.work / "cache")]
    last = {name: run(args.work / name, 0, *flags, *cache) for name, flags in RUNS.items()}
    losses = {name: figures.get("val_next_token", figures["val_loss"]) for name, figures in last.items()}
    models = {name: open_model(args.work / name / "model").eval() for name in RUNS}
    drafts = {"draft": DraftModel(models["draft"]), "heads": Heads(models["small"])}
    drafts["look-up"] = Lookup(models["small"].config.vocab_size)

    # Measure.
    about = {"nats_per_byte": losses, "prompts": args.prompts, "rounds": args.rounds, "threads": 1}
    ended = Ended(args.out, about, same=("prompts", "rounds", "nats_per_byte"))
    prompts = prompts_of(args.work / "small" / "model", args.prompts)
    for name, guesses in DRAFTS.items():
        sides = [(draft, n) for draft, numbers in guesses.items() for n in numbers]
        for temperature in (0.0, 1.0):
            if not ended.has(model=name, temperature=temperature):
                rows = measure(models[name], sides, drafts, prompts, temperature, args.rounds)
                ended.add(*({"model": name} | row for row in rows))


if __name__ == "__main__":
    command.run(main)
