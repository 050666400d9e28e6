"""Which objective should an encoder learn? Eight of them on one corpus at equal compute, three seeds each.

    python -m results.objectives --out results/objectives.json        35 minutes on two cores

Every run is the same small transformer (4 layers, width 128, rotary positions) on the standard library's
source text, with 4,096 tokens in the vocabulary and rows of 128. It stops when it has spent the same FLOPs of
matrix products (`flops_per_token`, forward and backward): those of --steps updates of BERT's own objective.
Two measures:

    hidden token   how often the likeliest token is the right one on held-out text. For models trained with
                   masks: at the places of one and the same 15 percent masking. For the left-to-right model:
                   at every place, from the tokens before it
    token kind     accuracy of a linear classifier, on the frozen hidden states, of what each token of
                   held-out text is in Python: part of a comment or string, a keyword, a name that is defined,
                   called, an attribute ... Text that looks like code is in comments too, so this takes
                   context

Writes the figures of every run and objectives.png beside them.
"""

import argparse
import io
import json
import keyword
import multiprocessing
import statistics
import tokenize
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bert
import data.text
import gpt
from data import corpus
from data.rows import Dataset, Loader, Row, seed_of, stack
from engine import contract, cpu
from engine.optim import default_learning_rate, learning_rate, make_optimizers
from language import electra, masking

T, BATCH = 128, 8
BLOCKS = bert.MODERN | {"n_segments": 2}
ENCODER = bert.Config(4, 4, 128, 256, **BLOCKS)
# With the blocks of all the others. No ELECTRA that can be saved has these.
ELECTRA = electra.Config(4, 4, 128, 256, **BLOCKS, generator_size=0.5)
OBJECTIVES = {  # the model's file, its Config, and changes to its task's settings
    "masked, 15 %": ("bert", ENCODER, {}),
    "masked, 30 %": ("bert", ENCODER, {"mask_rate": 0.3}),
    "whole words": ("bert", ENCODER, {"masking": "word"}),
    "spans": ("bert", ENCODER, {"masking": "span"}),
    "next sentence": ("bert", replace(ENCODER, pair="nsp", pooler=True), {}),
    "sentence order": ("bert", replace(ENCODER, pair="sop", pooler=True), {}),
    "ELECTRA": ("electra", ELECTRA, {}),
    "left to right": ("gpt", gpt.Config(4, 4, 128, 256, norm="layer", norm_eps=1e-5), {}),
}
WINDOW, N_MODULES = 126, 20
KINDS = ["comment", "string", "number", "operator", "keyword", "definition", "call", "attribute", "name"]


def load_data(cache: Path) -> Dataset:
    """Return the rows that all objectives learn from, with the special tokens that some of them need."""
    text = data.text.prepare("stdlib", "bpe:4096", cache, notify=lambda _: None)
    dataset = data.text.as_rows(text, T)
    return replace(dataset, tokenizer=dataset.tokenizer.with_special_tokens(masking.SPECIAL_TOKENS))


def flops_of_bert(dataset: Dataset) -> int:
    """Return the FLOPs per token of BERT's own objective."""
    with torch.device("meta"):
        model = bert.BERT(bert.fit(ENCODER, dataset, T))
    return masking.flops_per_token(model, masking.Config(), T)


def run(job: tuple[str, int, int, Path]) -> dict:
    """Train one objective with one seed, and measure."""
    name, seed, steps, cache = job
    torch.set_num_threads(1)
    dataset = load_data(cache)
    kind, config, changes = OBJECTIVES[name]
    model_file = contract.read(contract.ModelFile, contract.find(kind))
    task = contract.read_task(contract.find(kind), None)
    torch.manual_seed(seed)
    model = model_file.Model(model_file.fit(config, dataset, T))
    settings = replace(task.settings(model.config), **changes)
    model = task.wrap(model, settings)

    # As many steps as the budget allows, at the learning rate that the model's file has for its size.
    cost = task.flops_per_token(model, settings, T)
    steps = round(steps * flops_of_bert(dataset) / cost)
    lr = task.LEARNING_RATE * default_learning_rate(sum(p.numel() for p in model.parameters()))
    args = dict(optimizer="adamw", lr=lr, warmup=steps // 20, steps=steps, schedule="cosine", device="cpu")
    args["schedule_from"] = 0
    args = Namespace(**args, weight_decay=0.1)
    (optimizer,) = make_optimizers(model, args)
    loader = Loader(dataset.train, seed)
    held_out = [dataset.val[i] for i in range(min(256, len(dataset.val) - 1))]  # whole rows
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        draws = torch.Generator().manual_seed(seed_of(seed, step))
        batch = task.make_batch(loader.read(step * BATCH, BATCH), settings, draws, dataset.tokenizer)
        loss, _ = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * 6 // steps > step * 6 // steps:  # six times, the last at the end
            flops = (step + 1) * BATCH * T * cost
            curve.append((flops, hidden_token_accuracy(model, held_out, dataset.tokenizer)))

    result = {"objective": name, "seed": seed, "steps": steps, "curve": curve}
    result["hidden_token"] = curve[-1][1]
    result["token_kind"] = token_kind_accuracy(model, dataset.tokenizer)
    print(f"{name:20} seed {seed}: {steps} steps, hidden token {result['hidden_token']}, token kind "
          f"{result['token_kind']:.3f}", flush=True)  # fmt: skip
    return result


@torch.no_grad()
def hidden_token_accuracy(model: nn.Module, rows: list[Row], tokenizer) -> float | None:
    """Return the first measure on held-out rows; None for ELECTRA, whose encoder fills no masks."""
    if isinstance(model, electra.Electra):
        return None
    if isinstance(model, gpt.GPT):
        tokens = stack(rows)["tokens"]
        return (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).float().mean().item()
    batch = masking.make_batch(rows, masking.Config(), torch.Generator().manual_seed(0), tokenizer)
    flat = model.hidden(batch["tokens"]).flatten(0, 1)
    return (model.logits(flat[batch["positions"]]).argmax(-1) == batch["targets"]).float().mean().item()


def kinds_of_characters(text: str) -> list[str]:
    """Return the kind of token that each character of a Python source belongs to, "" for whitespace."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds, before = [""] * len(text), ""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, following in pairwise(tokens):
        kind = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number"}.get(
            token.type
        )
        if token.type == tokenize.OP:
            kind = "operator"
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "keyword"
        elif token.type == tokenize.NAME:
            kind = "definition" if before in ("def", "class") else "attribute" if before == "." else "name"
            if kind != "definition" and following.string == "(":
                kind = "call"
        first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
        if kind is not None:
            kinds[first:last] = [kind] * (last - first)
            before = token.string
    return kinds


def labelled_windows(tokenizer) -> tuple[Tensor, Tensor]:
    """Return windows of tokens (n, WINDOW) of the held-out modules, and the kind (n, WINDOW) of each token.

    The kind is that of the token's first character other than whitespace, -1 where there is none.
    """
    tokens, labels = [], []
    for _, path in corpus.stdlib_files()[-N_MODULES:]:
        text = path.read_text("utf-8")
        if not text.isascii():  # a token's bytes would not be characters
            continue
        kinds, ids = kinds_of_characters(text), tokenizer.encode(text)
        at, of = 0, []
        for token in ids:
            piece = tokenizer.token_bytes[token].decode()
            skipped = len(piece) - len(piece.lstrip())
            kind = kinds[at + skipped] if piece.strip() else ""
            of.append(KINDS.index(kind) if kind else -1)
            at += len(piece)
        for start in range(0, len(ids) - WINDOW, WINDOW):
            tokens.append(ids[start : start + WINDOW])
            labels.append(of[start : start + WINDOW])
    return torch.tensor(tokens), torch.tensor(labels)


def token_kind_accuracy(model: nn.Module, tokenizer) -> float:
    """Return the second measure: a linear classifier is trained on every other stretch of ten windows, and
    tested on the rest."""
    # The hidden states of all windows.
    torch.manual_seed(0)
    encoder = model.discriminator if isinstance(model, electra.Electra) else model
    tokens, labels = labelled_windows(tokenizer)
    ends = [torch.full((len(tokens), 1), i) for i in (tokenizer.cls_id, tokenizer.sep_id)]
    rows = torch.cat([ends[0], tokens, ends[1]], dim=1)
    with torch.no_grad():
        hidden = torch.cat([encoder.hidden(part)[:, 1:-1] for part in rows.split(64)])  # (n, WINDOW, D)

    # One half of the tokens that have a kind for training, the other for the test.
    trained = torch.arange(len(tokens)) // 10 % 2 == 0
    parts = []
    for chosen in (trained, ~trained):
        known = labels[chosen] >= 0
        parts.append((hidden[chosen][known], labels[chosen][known]))
    (x, y), (x_test, y_test) = parts

    # The classifier, on normalised features.
    mean, std = x.mean(0), x.std(0)
    probe = nn.Linear(x.shape[1], len(KINDS))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(200):
        loss = F.cross_entropy(probe((x - mean) / std), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return (probe((x_test - mean) / std).argmax(-1) == y_test).float().mean().item()


def plot(results: list[dict], path: Path) -> None:
    """Draw accuracy over FLOPs, and the probe's accuracy by objective."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Left: the mean over the seeds, and their range.
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

    # Right: a dot for each seed, and a bar for their mean.
    names = list(OBJECTIVES)[::-1]
    for y, name in enumerate(names):
        accuracies = [100 * r["token_kind"] for r in results if r["objective"] == name]
        right.plot(accuracies, [y] * len(accuracies), "o", color="C0", alpha=0.5)
        right.plot(statistics.mean(accuracies), y, "|", color="C0", markersize=16)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="kind of token recognised by a linear probe (%)", title="what the hidden states tell")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1200, help="updates of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one thread each (default %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="folder for tokenised text (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON, and a plot beside them")
    args = parser.parse_args()
    # Tokenise once, before the processes start.
    data.text.prepare("stdlib", "bpe:4096", args.cache)
    jobs = [(name, seed, args.steps, args.cache) for seed in range(args.seeds) for name in OBJECTIVES]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = list(pool.imap(run, jobs, chunksize=1))

    # Print a row for each objective, and write the figures.
    print(f"{'objective':20} {'steps':>6} {'hidden token':>22} {'token kind':>22}")
    for name in OBJECTIVES:
        of = [r for r in results if r["objective"] == name]
        row = f"{name:20} {of[0]['steps']:6}"
        for key in ("hidden_token", "token_kind"):
            values = [r[key] for r in of]
            if None in values:
                row += f" {'-':>22}"
            else:
                row += f" {statistics.mean(values):8.1%} ({min(values):.1%}-{max(values):.1%})"
        print(row)
    if args.out:
        machine = {"cpu": cpu.name(), "torch": torch.__version__}
        command = "python -m results.objectives --out results/objectives.json"
        args.out.write_text(
            json.dumps({"command": command, **machine, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
        plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
