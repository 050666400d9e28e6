"""Which objective should an encoder learn? Eight of them on one corpus at equal compute, three seeds each.

    python -m results.objectives --out results/objectives.json        35 minutes on two cores

Every run trains the same small transformer (4 layers, width 128, rotary positions) on the source text of
Python's library, with 4,096 tokens in the vocabulary and rows of 128. All objectives spend the same FLOPs of
matrix products (`flops_per_token`, forward and backward): those of --steps updates of BERT's own objective.
So an objective with more FLOPs per token makes fewer updates. Two measures, on held-out text:

    hidden token   the share of tokens that the model predicts rightly. Models trained with masks predict the
                   masked tokens of the same 15 percent masking; the left-to-right model predicts every token
                   from those before it. ELECTRA's encoder predicts no tokens and has no such figure
    token kind     the accuracy of a linear classifier that reads the frozen hidden states and names the kind
                   of each token in Python: part of a comment or string, a keyword, a name that is defined or
                   called, an attribute ... Comments contain code too, so a token alone does not show its kind

The figures of every run are written to --out, and a picture beside it.
"""

import argparse
import io
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
from engine.optim import default_learning_rate, make_optimizers, set_learning_rate
from evaluation.small_runs import mean_and_range
from formats import command
from formats.figures import load_pyplot, save_figure
from formats.json_file import write_json
from language import electra, masking
from results.seeds import draw

COMMAND = "python -m results.objectives --out results/objectives.json"
T, BATCH = 128, 8  # tokens of a row, rows of an update
BLOCKS = bert.MODERN | {"n_segments": 2}
ENCODER = bert.Config(4, 4, 128, 256, **BLOCKS)
# ELECTRA with the same blocks as all others. formats/ cannot save such an ELECTRA; here none is saved.
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
WINDOW, N_MODULES = 126, 20  # tokens of a window without [CLS] and [SEP]; held-out modules of the classifier
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
    """Train a model by one of OBJECTIVES, and return both measures.

    job: the objective, the seed, the updates of BERT's own objective, the folder of tokenised text.
    """
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
    args = Namespace(optimizer="adamw", lr=lr, weight_decay=0.1, steps=steps, device="cpu")
    args.warmup, args.schedule, args.schedule_from = steps // 20, "cosine", 0
    (optimizer,) = make_optimizers(model, args)
    loader = Loader(dataset.train, seed)
    held_out = [dataset.val[i] for i in range(min(256, len(dataset.val) - 1))]  # the last row may be shorter
    curve = []
    for step in range(steps):
        set_learning_rate([optimizer], step, args)
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
    figures = f"hidden token {result['hidden_token']}, token kind {result['token_kind']:.3f}"
    print(f"{name:20} seed {seed}: {steps} steps, {figures}", flush=True)
    return result


@torch.no_grad()
def hidden_token_accuracy(model: nn.Module, rows: list[Row], tokenizer) -> float | None:
    """Return the share of tokens of held-out rows that are predicted rightly; None for ELECTRA, whose encoder
    predicts no tokens."""
    if isinstance(model, electra.Electra):
        return None
    if isinstance(model, gpt.GPT):
        tokens = stack(rows)["tokens"]
        return (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).float().mean().item()
    batch = masking.make_batch(rows, masking.Config(), torch.Generator().manual_seed(0), tokenizer)
    flat = model.hidden(batch["tokens"]).flatten(0, 1)
    return (model.logits(flat[batch["positions"]]).argmax(-1) == batch["targets"]).float().mean().item()


def kinds_of_characters(text: str) -> list[str]:
    """Return the kind of token that each character of a Python source belongs to.

    It is one of KINDS, or "" for whitespace and, from Python 3.12 on, for the literal text of f-strings.
    """
    starts = [0]  # of the lines that tokenize counts: only a line feed ends one
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    kinds, before = [""] * len(text), ""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token, following in pairwise(tokens):
        of_type = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number"}
        kind = of_type.get(token.type)
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
        at, of_tokens = 0, []
        for token in ids:
            piece = tokenizer.token_bytes[token].decode()
            skipped = len(piece) - len(piece.lstrip())
            kind = kinds[at + skipped] if piece.strip() else ""
            of_tokens.append(KINDS.index(kind) if kind else -1)
            at += len(piece)
        for start in range(0, len(ids) - WINDOW, WINDOW):
            tokens.append(ids[start : start + WINDOW])
            labels.append(of_tokens[start : start + WINDOW])
    return torch.tensor(tokens), torch.tensor(labels)


def token_kind_accuracy(model: nn.Module, tokenizer) -> float:
    """Return the accuracy of a linear classifier that names the kinds of tokens from frozen hidden states.

    It is trained on every other stretch of ten windows, and tested on the rest.
    """
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
    """Draw the share of predicted tokens over FLOPs, and the classifier's accuracy by objective."""
    pyplot = load_pyplot()

    # Left: the mean over the seeds, and their range.
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("masked, 15 %", "masked, 30 %", "left to right"):
        curves = [r["curve"] for r in results if r["objective"] == name]
        flops = [x for x, _ in curves[0]]
        draw(left, flops, [[100 * y for _, y in curve] for curve in curves], label=name)
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
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--steps",
        type=command.count,
        default=1200,
        help="updates of BERT's own objective (default %(default)s)",
    )
    add("--seeds", type=command.count, default=3, help="runs of each objective (default %(default)s)")
    add("--jobs", type=command.count, default=2, help="runs at a time, one thread each (default %(default)s)")
    cache = Path("cache")
    add("--cache", type=command.path, default=cache, help="folder for tokenised text (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON, and a picture beside them")
    args = parser.parse_args(argv)

    # Tokenise once, before the processes start.
    data.text.prepare("stdlib", "bpe:4096", args.cache)
    jobs = [(name, seed, args.steps, args.cache) for seed in range(args.seeds) for name in OBJECTIVES]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = list(pool.imap(run, jobs, chunksize=1))

    # Print a row for each objective, and write the figures.
    print(f"{'objective':20} {'steps':>6} {'hidden token':>22} {'token kind':>22}")
    for name in OBJECTIVES:
        own = [r for r in results if r["objective"] == name]
        row = f"{name:20} {own[0]['steps']:6}"
        for key in ("hidden_token", "token_kind"):
            values = [r[key] for r in own]
            row += f" {'-' if None in values else mean_and_range(values, '.1%'):>22}"
        print(row)
    if args.out:
        about = {"command": COMMAND, "cpu": cpu.name(), "torch": torch.__version__}
        write_json(args.out, about | {"results": results}, indent=1)
        plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
