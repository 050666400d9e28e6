"""Small runs: the training loop and the command of the studies of prompting, which train small GPTs.

    for step in range(steps):   a new batch, drawn from (seed, step) alone; AdamW, warm-up and cosine

Every step draws new examples, and a test draws its own from another stream of random numbers, so most studies
need no further held-out set. The studies are in_context.py, scratchpad.py, spelling.py and injection.py;
results/prompting_studies.py makes their figures with three seeds.

Shapes: B examples, T tokens of an example.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from data.rows import seed_of
from engine.optim import make_optimizers, set_learning_rate
from formats import command
from formats.progress import progress_bar
from gpt import GPT, Config

IGNORED = -100  # a target that is not predicted


def small_gpt(n_vocab: int, n_tokens: int, seed: int, *, n_layers: int = 2, width: int = 64) -> GPT:
    """Return a new decoder: rotary positions, heads of width 32, QK-norm."""
    torch.manual_seed(seed)
    shape = {"n_heads": max(1, width // 32), "d_model": width, "d_ff": 2 * width, "qk_norm": True}
    return GPT(Config(n_layers, **shape, vocab_size=n_vocab, max_seq_len=n_tokens))


def train(
    model: GPT,
    batch_of: Callable[[Generator], dict[str, Tensor]],
    steps: int,
    seed: int,
    *,
    rate: float = 3e-3,
    watch: Callable[[int], None] | None = None,
    loss_of: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> None:
    """Train a model in place on the batches {"tokens": (B, T), "targets": (B, T)} that batch_of draws.

    rate: the highest learning rate. watch(step) is called before each step and after the last one. loss_of
    returns the loss of a batch, in place of the model's own.
    """
    settings = {"schedule": "cosine", "schedule_from": 0, "steps": steps, "warmup": min(20, steps // 5)}
    args = Namespace(optimizer="adamw", lr=rate, weight_decay=0.1, device="cpu", **settings)
    optimizers = make_optimizers(model, args)
    for step in progress_bar(range(steps), "steps", leave=False):
        if watch:
            watch(step)
        batch = batch_of(Generator().manual_seed(seed_of(seed, step)))
        loss = loss_of(batch) if loss_of else model.loss(batch)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizers, step, args)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    if watch:
        watch(steps)


def next_token_batch(rows: Tensor, learned: Tensor | None = None) -> dict[str, Tensor]:
    """Return inputs and targets, int64 (B, T - 1), of rows (B, T). learned: bool (B, T), the tokens that are
    targets; by default all but the first."""
    targets = rows[:, 1:]
    if learned is not None:
        targets = targets.masked_fill(~learned[:, 1:], IGNORED)
    return {"tokens": rows[:, :-1], "targets": targets.contiguous()}


def stream(seed: int) -> Generator:
    """Return the random generator of a test, whose draws no training step of a study has, with any seed."""
    return Generator().manual_seed(seed_of(seed, 10_000_000))


def mean_and_range(values: Iterable[float], form: str = ".1%") -> str:
    """Return the mean as text, and if there are several values, the smallest and the largest in brackets."""
    values = list(values)
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def of(rows: Sequence[dict], **wanted) -> list[dict]:
    """Return the rows that have all of these values, given as field=value."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def run_study(
    description: str,
    study: Callable[[int, int | None], list[dict]],
    table: Callable[[list[dict]], str],
    argv: list[str] | None,
    of_model: Callable[[Path], str] | None = None,
) -> None:
    """Run the command of a study: train its models with one seed or several, and print the table.

    study(seed, steps) returns the rows of one seed; steps is None for its default. of_model, which a study
    may have, returns the figures of a trained model in a directory, as text; the flag is --model.
    """
    parser = command.Parser(description=description)
    add = parser.add_argument
    add("--seeds", type=int, help="runs of each model (default 1)")
    add("--steps", type=int, help="steps of each run (default: those of the published figures)")
    if of_model:
        add("--model", type=command.path, help="measure this decoder instead of training small ones")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if of_model and args.model:
        if args.seeds or args.steps:
            raise ValueError("--model is measured as it is: leave out --seeds and --steps of a training")
        print(of_model(args.model))
        return
    rows: list[dict] = []
    for seed in range(args.seeds or 1):
        rows += study(seed, args.steps)
    print(table(rows))
