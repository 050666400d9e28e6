"""What can each kind of attention copy? Seven small decoders learn to repeat a segment of random length.

    python -m results.copying --out results/copying.json          three seeds, about 20 minutes of one core

A row is a random segment of 12 to 32 tokens, repeated until the row has 64. From the second copy on, each
token is determined by those before it: find where the last few tokens occurred before, and predict the token
that followed. Only the first token of the second copy is not, because nothing shows that the segment has
ended; it is counted all the same, so the best possible accuracy is about 98 percent. The length of the
segment is random, so the position alone does not show where to look. The accuracy is the share of these
determined tokens that the model gives the largest probability, on rows that it was not trained on.

All decoders have two layers of width 64 with two heads. They are trained on the same rows, at the same
learning rate. The curves are drawn over FLOPs, because with native sparse attention, for its summaries and
three branches, a token costs 1.5 times as many as with softmax. What this does not show: whether another
learning rate, a larger state or more steps would help a kind that fails here.

Each run is written to --out when it ends. Runs that are in it already are not repeated.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from attention_variants import linear, moba, native_sparse
from formats import command
from results import seeds
from results.keep import Ended
from scaling.pictures import load_pyplot, save_figure

V, T, BATCH, SHORTEST, LONGEST = 64, 64, 32, 12, 32
EVERY, N_TEST = 50, 256  # steps between two tests, and their rows
SHAPE = dict(n_layers=2, n_heads=2, d_model=64, d_ff=176, vocab_size=V, max_seq_len=T)
BLOCKS = dict(block_size=4, n_selected=4)
KINDS = {  # by name, the model and its Config
    "softmax": (gpt.GPT, gpt.Config(**SHAPE)),
    "window 8, softmax": (gpt.GPT, gpt.Config(**SHAPE, window=8, full_layers=(1,))),
    "window 8": (gpt.GPT, gpt.Config(**SHAPE, window=8)),
    "MoBA": (moba.MoBA, moba.Config(**SHAPE, **BLOCKS)),
    "native sparse": (
        native_sparse.NativeSparse,
        native_sparse.Config(**SHAPE, **BLOCKS, summary_size=4, summary_stride=2, window=8),
    ),
    "linear": (linear.LinearGPT, linear.Config(**SHAPE, chunk=T)),
    "linear, softmax": (linear.LinearGPT, linear.Config(**SHAPE, chunk=T, softmax_layers=(1,))),
}


def make_batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return inputs and targets, each (n, T), of n rows. Tokens of the first copy of the segment are random,
    so as targets they are -100, which the loss leaves out."""
    length = torch.randint(SHORTEST, LONGEST + 1, (n, 1), generator=generator)
    segment = torch.randint(V, (n, LONGEST), generator=generator)
    row = segment.gather(1, torch.arange(T + 1) % length)  # (n, T + 1)
    targets = row[:, 1:].masked_fill(torch.arange(1, T + 1) < length, -100)
    return {"tokens": row[:, :-1], "targets": targets}


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the share of the determined tokens of N_TEST rows that the model finds likeliest."""
    batch = make_batch(N_TEST, torch.Generator().manual_seed(10**6))
    determined = batch["targets"] >= 0
    likeliest = model(batch["tokens"]).argmax(dim=-1)
    return (likeliest == batch["targets"])[determined].float().mean().item()


def learn(name: str, seed: int, steps: int, lr: float) -> dict:
    """Train a decoder of KINDS, and return a row: its accuracy after every EVERY steps, and what it costs."""
    kind, config = KINDS[name]
    torch.manual_seed(seed)
    model, generator = kind(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    curve, began = [], time.process_time()
    for step in range(1, steps + 1):
        batch = make_batch(BATCH, generator)
        logits = model(batch["tokens"])  # (BATCH, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % EVERY == 0 or step == steps:
            curve.append((step, accuracy(model)))
    row = {"layers": name, "seed": seed, "curve": curve, "seconds": time.process_time() - began}
    n_parameters = sum(p.numel() for p in model.parameters())
    return row | {"parameters": n_parameters, "flops_per_token": config.flops_per_token(T)}


def plot(rows: list[dict], path: Path) -> None:
    """Draw the mean accuracy of each kind over the FLOPs, and its range over the seeds."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["layers"] for row in rows):
        of = [row for row in rows if row["layers"] == name]
        curves = [row["curve"] for row in of]
        flops = [step * BATCH * T * of[0]["flops_per_token"] for step, _ in curves[0]]
        seeds.draw(axes, flops, [[100 * share for _, share in curve] for curve in curves], label=name)
    axes.axhline(100 / V, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="FLOPs", ylabel="copied tokens (%)", title="a segment of random length, repeated")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds to train (default: all)")
    add("--steps", type=command.count, default=1000, help="updates of a run (default %(default)s)")
    add("--seeds", type=command.count, default=3, help="runs of each kind (default %(default)s)")
    add("--lr", type=float, default=4e-3, help="learning rate (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the curves, JSON; a plot is beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = {
        "command": "python -m results.copying --out results/copying.json",
        "steps": args.steps,
        "lr": args.lr,
    }
    ended = Ended(args.out, about, rows="results", same=("steps", "lr"), indent=None)
    for seed in range(args.seeds):
        for name in args.kinds:
            if not ended.has(layers=name, seed=seed):
                row = learn(name, seed, args.steps, args.lr)
                print(f"{name:20} seed {seed}: {row['curve'][-1][1]:.1%}, {row['seconds']:.0f} s", flush=True)
                ended.add(row)
    plot(ended.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
