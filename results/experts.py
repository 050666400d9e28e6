"""What do experts buy? Dense and sparse models at equal compute, and experts with and without balance.

    python -m results.experts --out results/experts.json        an hour on two cores

Every run is gpt.py's tiny size or moe.py's, on the source text of the standard library with a vocabulary of
4,096 tokens, with three seeds. All runs of a part spend the same matmul FLOPs (`flops_per_token`, forward and
backward; of the experts, only those that a token uses count).

    models     as many FLOPs as --steps updates of the dense model: the dense model; the 2 best of 8 experts
               of half its MLP's width, with weights that add up to 1 or to 2; and DeepSeekMoE with as many
               parameters: each of the 8 experts is split in two, and of the 16 one is shared by all tokens,
               and a token uses the 3 best of the others. All mixtures have a sigmoid router and Switch's
               balance loss
    balance    as many FLOPs as --balance-steps updates: the 2 best of 8 without any balance, with each of the
               losses alone, and with DeepSeek-V3's bias, in steps of 0.001 as in the paper or, because the
               run is short, of 0.01

The load of an expert is its number of tokens, as a multiple of the mean; the table has the least and the
greatest of all layers. Loss and load at the end are those of 128 rows of held-out text; during the run, of
the first 32. The figures of every run are written to --out, and a plot beside it. Runs that are in it
already, from the same machine, are not repeated.
"""

import argparse
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import data.text
import gpt
import moe
from data.rows import Loader, Row
from engine import contract
from engine.optim import default_learning_rate, learning_rate, make_optimizers
from evaluation.small_runs import mean_and_range
from formats import command
from formats.figures import load_pyplot, save_figure
from language.expert_usage import usage
from results import seeds
from results.keep import Ended

BATCH = 8
DENSE = gpt.SIZES["tiny"]
FINE = moe.SIZES["tiny"]
PLAIN = replace(FINE, n_experts=8, n_shared_experts=0, top_k=2, d_expert=2 * FINE.d_expert, routed_scale=2.0)
MODELS = {
    "dense": (gpt, DENSE),
    "2 of 8, weights add up to 1": (moe, replace(PLAIN, routed_scale=1.0)),
    "2 of 8, weights add up to 2": (moe, PLAIN),
    "1 shared and 3 of 15": (moe, FINE),
}
ALONE = replace(PLAIN, aux_loss_coef=0.0)
SOFTMAX = replace(ALONE, router="softmax")
# The coefficient of DeepSeek-V3, where the losses of the layers, here four, add up.
SEQUENCE = {"sequence_loss_coef": 4 * 0.0001}
BALANCE = {
    "softmax, nothing": (moe, SOFTMAX),
    "softmax, z-loss": (moe, replace(SOFTMAX, z_loss_coef=0.001)),
    "softmax, Switch loss": (moe, replace(SOFTMAX, aux_loss_coef=0.01)),
    # Twice the coefficient, because this loss is 1 where the load is even and Switch's is k.
    "softmax, sequence loss": (moe, replace(SOFTMAX, sequence_loss_coef=0.02)),
    "sigmoid, nothing": (moe, ALONE),
    "sigmoid, bias": (moe, replace(ALONE, bias_update_rate=0.001)),
    "sigmoid, bias, sequence loss": (moe, replace(ALONE, bias_update_rate=0.001, **SEQUENCE)),
    "sigmoid, steps of 0.01, sequence loss": (moe, replace(ALONE, bias_update_rate=0.01, **SEQUENCE)),
}
PARTS = {"models": MODELS, "balance": BALANCE}
SAME = ("cpu", "torch", "steps", "balance_steps")  # of the runs in one file


def run(job: tuple[str, str, int, int, Path]) -> dict:
    """Train one model with one seed, and return a row with its losses and loads.

    job: the part, the name of the model, the seed, updates of the dense model that cost as much, the folder
    for tokenised text.
    """
    # The model. All models have the same data and the same learning rate.
    part, name, seed, steps, cache = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    concept, config = PARTS[part][name]
    T = config.max_seq_len
    dataset = data.text.as_rows(data.text.prepare("stdlib", "bpe:4096", cache, notify=lambda _: None), T)
    model = concept.Model(contract.fit(config, dataset, T))
    dense = contract.fit(DENSE, dataset, T)
    steps = round(steps * dense.flops_per_token(T) / model.flops_per_token(T))
    with torch.device("meta"):
        n_dense = sum(p.numel() for p in gpt.GPT(dense).parameters())
    lr = default_learning_rate(n_dense)
    args = dict(optimizer="adamw", lr=lr, warmup=steps // 20, steps=steps, schedule="cosine", device="cpu")
    args["schedule_from"] = 0
    args = SimpleNamespace(**args, weight_decay=0.1)
    (optimizer,) = make_optimizers(model, args)
    loader = Loader(dataset.train, seed)
    rows = [dataset.val[i] for i in range(128)]

    # Train, and measure before the first step and eleven times during the run.
    curve = [measure(model, rows[:32], 0)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        batch = gpt.make_batch(loader.read(step * BATCH, BATCH), model.config, None)
        loss, _ = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if concept is moe:
            moe.after_step(model)
        model.zero_grad()
        flops = (step + 1) * BATCH * T * model.flops_per_token(T)
        if step + 1 < steps and (step + 1) * 12 // steps > step * 12 // steps:
            curve.append(measure(model, rows[:32], flops))
    last = measure(model, rows, flops)
    load = f", load {last['least']:.2f} to {last['most']:.2f}" if "most" in last else ""
    print(f"{part:8} {name:38} seed {seed}: {steps} steps, loss {last['loss']:.4f}{load}", flush=True)
    return {"part": part, "name": name, "seed": seed, "steps": steps, "curve": curve, "last": last}


@torch.no_grad()
def measure(model: nn.Module, rows: list[Row], flops: int) -> dict:
    """Return the loss on held-out rows of T + 1 tokens, and the least and greatest load of an expert."""
    model.eval()
    total, loads = 0.0, 0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        batch = gpt.make_batch(part, model.config, None)
        loss, _ = model.loss(batch)
        total += len(part) * loss.item()
        if isinstance(model, moe.MoEGPT):
            loads = loads + usage(model, batch["tokens"]).loads
    model.train()
    point = {"flops": flops, "loss": total / len(rows)}
    if isinstance(model, moe.MoEGPT):
        share = loads / loads.mean(dim=1, keepdim=True)
        point |= {"least": share.min().item(), "most": share.max().item()}
    return point


def draw_lines(axes, results: list[dict], part: str, key: str) -> None:
    """Draw a figure of a part's runs over FLOPs: the mean over the seeds as a line, their range as a band."""
    for name in PARTS[part]:
        curves = [r["curve"] for r in results if (r["part"], r["name"]) == (part, name)]
        if curves:
            flops = [point["flops"] for point in curves[0]]
            seeds.draw(axes, flops, [[point[key] for point in curve] for curve in curves], label=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def plot(results: list[dict], path: Path) -> None:
    """Draw the loss of the models, and the load of the busiest expert, over FLOPs."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_lines(left, results, "models", "loss")
    low = min(point["loss"] for r in results if r["part"] == "models" for point in r["curve"])
    left.set(xlabel="FLOPs", ylabel="validation loss (nats per token)", ylim=(low - 0.1, low + 1.5))
    left.set_title("equal compute, dense and sparse", fontsize=10)
    draw_lines(right, results, "balance", "most")
    right.axhline(2, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="FLOPs", ylabel="load of the busiest expert, over the mean", ylim=(1, 5.5))
    right.set_title("what keeps eight experts in balance", fontsize=10)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cache = parser.add_argument, Path("cache")
    add("--steps", type=command.count, default=800, help="updates of a run (default %(default)s)")
    of_balance = "updates of a run that shows the balance (default %(default)s)"
    add("--balance-steps", type=command.count, default=250, help=of_balance)
    add("--seeds", type=command.count, default=3, help="runs of each model (default %(default)s)")
    add("--jobs", type=command.count, default=2, help="runs at a time, one thread each (default %(default)s)")
    add("--cache", type=command.path, default=cache, help="folder for tokenised text (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON; a plot is beside it")
    args = parser.parse_args(argv)
    about = {"command": "python -m results.experts --out results/experts.json"}
    about |= {"steps": args.steps, "balance_steps": args.balance_steps}
    ended = Ended(args.out, about, rows="results", same=SAME)

    # The runs that are not in --out yet.
    data.text.prepare("stdlib", "bpe:4096", args.cache)
    steps = {"models": args.steps, "balance": args.balance_steps}
    models = [(part, name) for part in PARTS for name in PARTS[part]]
    jobs = [
        (part, name, seed, steps[part], args.cache)
        for seed in range(args.seeds)
        for part, name in models
        if not ended.has(part=part, name=name, seed=seed)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for result in pool.imap(run, jobs):
            ended.add(result)
            plot(ended.rows, args.out.with_suffix(".png"))
    print_table(ended.rows)


def print_table(results: list[dict]) -> None:
    """Print the loss and the loads of each model at the end: the mean and the range over the seeds."""
    print(f"{'':47} {'validation loss':>26} {'least load':>21} {'greatest load':>21}")
    for part, name in dict.fromkeys((r["part"], r["name"]) for r in results):
        last = [r["last"] for r in results if (r["part"], r["name"]) == (part, name)]
        row = f"{part:8} {name:38} {mean_and_range([point['loss'] for point in last], '.4f'):>26}"
        for key in ("least", "most") if "most" in last[0] else ():
            row += f" {mean_and_range([point[key] for point in last], '.2f'):>21}"
        print(row)


if __name__ == "__main__":
    command.run(main)
