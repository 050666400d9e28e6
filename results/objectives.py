"""What should an encoder be asked? Eight objectives on one corpus at equal compute, three seeds each.

    python results/objectives.py --out results/objectives.json        about an hour on two cores

Every run is the same small transformer (4 layers, width 128, rotary positions) on the standard library's
source text, 4,096 tokens in the vocabulary, rows of 128, and stops when it has spent the same matmul FLOPs
(`flops_per_token`, forward and backward): those of --steps updates of BERT's own objective. Two yardsticks:

    hidden token   how often the likeliest token is the right one on held-out text: at the places of one and
                   the same 15 percent masking for whatever was trained with masks; for the left-to-right
                   model at every place, from what stands before it
    module         accuracy of telling from 62 tokens which of twelve packages they were taken from, after
                   fine-tuning all weights and a new linear layer on the mean of the hidden states, on
                   modules whose labels were not seen

Writes the figures of every run and objectives.png beside them.
"""

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bert  # noqa: E402
import corpus  # noqa: E402
import data  # noqa: E402
import electra  # noqa: E402
import gpt  # noqa: E402
from optim import default_learning_rate, learning_rate, make_optimizers  # noqa: E402

T, BATCH = 128, 8
ENCODER = bert.Config(4, 4, 128, 256, **bert.MODERN | {"n_segments": 2})


class ElectraConfig(electra.Config):
    """With the blocks of all the others, which no ELECTRA that could be saved has."""

    __post_init__ = bert.Config.__post_init__


ELECTRA = ElectraConfig(4, 4, 128, 256, **bert.MODERN | {"n_segments": 2}, generator_size=0.5)
OBJECTIVES = {
    "masked, 15 %": (bert, ENCODER),
    "masked, 30 %": (bert, replace(ENCODER, mask_rate=0.3)),
    "whole words": (bert, replace(ENCODER, masking="word")),
    "spans": (bert, replace(ENCODER, masking="span")),
    "next sentence": (bert, replace(ENCODER, pair="nsp", pooler=True)),
    "sentence order": (bert, replace(ENCODER, pair="sop", pooler=True)),
    "ELECTRA": (electra, ELECTRA),
    "left to right": (gpt, gpt.Config(4, 4, 128, 256, norm="layer", norm_eps=1e-5)),
}
N_PACKAGES, TRAIN_WINDOWS, TEST_WINDOWS, WINDOW = 12, 100, 50, 62


def run(job: tuple[str, int, int, Path]) -> dict:
    """Train one objective with one seed, and measure."""
    name, seed, steps, cache = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    concept, config = OBJECTIVES[name]
    dataset = data.prepare("stdlib", "bpe:4096", cache, say=lambda _: None)
    tokenizer = dataset.tokenizer.with_special_tokens(bert.SPECIAL_TOKENS)
    model = concept.Model(config.fitted(tokenizer, T))
    budget = steps * ENCODER.fitted(tokenizer, T).flops_per_token(T)
    steps = round(budget / model.flops_per_token(T))
    lr = concept.LEARNING_RATE * default_learning_rate(sum(p.numel() for p in model.parameters()))
    args = dict(optimizer="adamw", lr=lr, warmup=steps // 20, steps=steps, schedule="cosine", device="cpu")
    args = SimpleNamespace(**args, weight_decay=0.1)
    (optimizer,) = make_optimizers(model, args)
    loader = data.Loader(dataset.train.tokens, T, seed)
    rows = torch.cat([*data.held_out_batches(dataset.val.tokens, T, 256)][:1])
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        draws = torch.Generator().manual_seed((seed << 32) + step)
        batch = concept.make_batch(loader.batch(step * BATCH, BATCH), model.config, draws, tokenizer)
        loss, _ = model.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * 6 // steps > step * 6 // steps:  # six times, the last at the end
            flops = (step + 1) * BATCH * T * model.flops_per_token(T)
            curve.append((flops, hidden_token_accuracy(model, concept, rows, tokenizer)))
    result = {"objective": name, "seed": seed, "steps": steps, "curve": curve}
    result["hidden_token"] = curve[-1][1]
    result["module"] = fine_tuned_accuracy(model, tokenizer, seed)
    print(f"{name:20} seed {seed}: {steps} steps, hidden token {result['hidden_token']}, module "
          f"{result['module']:.3f}", flush=True)  # fmt: skip
    return result


@torch.no_grad()
def hidden_token_accuracy(model: nn.Module, concept, rows: Tensor, tokenizer) -> float | None:
    """The first yardstick on held-out windows (n, T + 1); ELECTRA's encoder fills no masks."""
    if concept is electra:
        return None
    if concept is gpt:
        return (model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).float().mean().item()
    plain = replace(model.config, masking="token", mask_rate=0.15, pair="none", span_boundary=False)
    batch = bert.make_batch(rows, plain, torch.Generator().manual_seed(0), tokenizer)
    flat = model.hidden(batch["tokens"]).flatten(0, 1)
    return (model.logits(flat[batch["positions"]]).argmax(-1) == batch["targets"]).float().mean().item()


def windows(tokenizer) -> tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]:
    """(tokens, package number) to train on, and to test on, from different modules."""
    modules = {}
    for module, path in corpus.stdlib_files():
        if "." in module:
            modules.setdefault(module.partition(".")[0], []).append(tokenizer.encode(path.read_text("utf-8")))
    size = {package: sum(map(len, texts)) for package, texts in modules.items() if len(texts) >= 6}
    packages = sorted(size, key=size.get)[-N_PACKAGES:]
    draws = random.Random(0)
    parts = [], []
    for label, package in enumerate(packages):
        texts = modules[package]
        draws.shuffle(texts)
        cut = [[], []]  # windows of two thirds of the modules and of the rest, of no more use than wanted
        for i, text in enumerate(texts):
            cut[i % 3 == 2] += [text[j : j + WINDOW] for j in range(0, len(text) - WINDOW, WINDOW)]
        for part, found, n in zip(parts, cut, (TRAIN_WINDOWS, TEST_WINDOWS), strict=True):
            part += [(window, label) for window in draws.sample(found, min(n, len(found)))]
    return parts


def fine_tuned_accuracy(model: nn.Module, tokenizer, seed: int, epochs: int = 5, lr: float = 5e-4) -> float:
    """The second yardstick."""
    torch.manual_seed(seed)
    encoder = model.discriminator if hasattr(model, "discriminator") else model
    head = nn.Linear(128, N_PACKAGES)
    train, test = windows(tokenizer)

    def logits(examples) -> Tensor:
        rows = [[tokenizer.cls_id, *tokens, tokenizer.sep_id] for tokens, _ in examples]
        return head(encoder.hidden(torch.tensor(rows)).mean(1))

    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    n_steps = epochs * (len(train) // 32)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
    draws = random.Random(seed)
    for _ in range(epochs):
        draws.shuffle(train)
        for start in range(0, len(train) - 31, 32):
            examples = train[start : start + 32]
            loss = F.cross_entropy(logits(examples), torch.tensor([label for _, label in examples]))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        predicted = torch.cat([logits(test[i : i + 100]).argmax(-1) for i in range(0, len(test), 100)])
    return (predicted == torch.tensor([label for _, label in test])).float().mean().item()


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("masked, 15 %", "masked, 30 %", "left to right"):
        curves = [r["curve"] for r in results if r["objective"] == name]
        flops = [x for x, _ in curves[0]]
        accuracies = list(zip(*([100 * y for _, y in curve] for curve in curves), strict=True))
        (line,) = left.plot(flops, [statistics.mean(a) for a in accuracies], label=name)
        left.fill_between(flops, *zip(*((min(a), max(a)) for a in accuracies), strict=True),
                          color=line.get_color(), alpha=0.2)  # fmt: skip
    left.set(xlabel="FLOPs", ylabel="hidden token predicted (%)", title="one side or both")
    left.legend()
    names = list(OBJECTIVES)[::-1]
    for y, name in enumerate(names):
        accuracies = [100 * r["module"] for r in results if r["objective"] == name]
        right.plot(accuracies, [y] * len(accuracies), "o", color="C0", alpha=0.5)
        right.plot(statistics.mean(accuracies), y, "|", color="C0", markersize=16)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="module recognised after fine-tuning (%)", title="what the encoder is good for")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a plot beside them")
    args = parser.parse_args()
    data.prepare("stdlib", "bpe:4096", args.cache)
    jobs = [(name, seed, args.steps, args.cache) for seed in range(args.seeds) for name in OBJECTIVES]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = list(pool.imap(run, jobs, chunksize=1))
    print(f"{'objective':20} {'steps':>6} {'hidden token':>22} {'module':>22}")
    for name in OBJECTIVES:
        of = [r for r in results if r["objective"] == name]
        row = f"{name:20} {of[0]['steps']:6}"
        for key in ("hidden_token", "module"):
            values = [r[key] for r in of]
            if None in values:
                row += f" {'-':>22}"
            else:
                row += f" {statistics.mean(values):8.1%} ({min(values):.1%}-{max(values):.1%})"
        print(row)
    if args.out:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        command = f"python results/objectives.py --steps {args.steps} --out {args.out}"
        args.out.write_text(json.dumps({"command": command, **machine, "results": results}, indent=1) + "\n")
        plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
