"""Eight kinds of attention at equal training FLOPs: loss on text, loss by position, and retrieval.

    python -m results.attention_compared --out results/attention_compared.json

The models are decoders of two layers of width 64, which differ only in their attention:

    softmax             gpt.py, with two heads of keys and values, and QK-norm
    windows, softmax    the same; in the first layer a token sees the last 64 tokens
    MoBA                a query sees its own block of 32 keys, and 3 others that it chooses
    native sparse       summaries of 32 tokens every 16, 4 blocks of 32 keys, and a window of 64
    linear              lightning attention in both layers
    linear, softmax     the same in the first layer, softmax in the second
    latent              the keys and values of all heads are computed from 32 numbers; no QK-norm
    talking heads       softmax, with the heads mixed before and after it

There are two tasks. Within a task all models train for the same number of FLOPs, by their flops_per_token, so
that a kind which costs less per token reads more tokens:

    text      Rows of 512 tokens of Python's standard library, with a vocabulary of 1,024 byte pairs. Measured
              on held-out modules: bits per byte, and the loss by the position in the row, which falls with
              the position as long as a model makes use of the tokens further back. Four heads; Muon.
    needle    A row is random letters. At a random position among them is a key, and after it the answer, a
              letter. The last token is the same key again. Measured is the share of rows whose answer is the
              likeliest next token, in rows of 128, 256, 512 and 1,024 tokens. A guess is right once in 32
              rows. Two heads; blocks, summaries and windows a quarter as long; AdamW.

The needle is simpler than a search in text: a row has only one key, so that a model need not compare keys,
and the other letters are random. To learn it in seconds, training rows have 16 to 128 tokens and repeat the
same key and answer up to 16 times; all answers but the first are predicted. So a kind can learn it from
answers that are near, and is tested on one that is far.

These settings were chosen in trials of softmax alone, so that it learns each task within the budget: two
layers, since models of four read too little text within it; the optimizer of each task; batches of a single
row of text. The learning rate is 4e-3 everywhere. What this does not show: whether a kind would do better
with settings of its own, at a larger size or with more text, and how fast the kinds are: on a CPU their FLOPs
per second differ several times.

Each run is written to --out when it ends. Runs that are in it already are not repeated. Two pictures are
drawn beside it, NAME_text.png and NAME_needle.png.
"""

import argparse
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import count, pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import data.text
import gpt
from attention_variants import latent, linear, moba, native_sparse, talking_heads
from data.rows import Dataset, Loader
from engine.optim import make_optimizers
from formats import command
from formats.figures import load_pyplot, save_figure
from generate import KVCache
from results.keep import Ended
from results.seeds import draw, means

KINDS = (
    "softmax",
    "windows, softmax",
    "MoBA",
    "native sparse",
    "linear",
    "linear, softmax",
    "latent",
    "talking heads",
)
TASKS = ("text", "needle")
T, VOCABULARY, N_HELD_OUT = 512, 1024, 128  # tokens of a row of text, and rows to measure on
SHORTEST, LONGEST = 16, 128  # tokens of a training row with a needle
LENGTHS, N_TEST = (128, 256, 512, 1024), 256  # tokens of the test rows with a needle, and rows per length
LETTERS, KEYS, NEEDLE_TOKENS = 32, 32, 1024  # different letters, different keys, tokens of a batch
GROUPS = (0, 8, 16, 32, 64, 128, 256, T)  # the loss is averaged over the positions between two of these
WARMUP = 20  # steps

Batch = dict[str, Tensor]


def make_model(kind: str, task: str) -> nn.Module:
    """Return a new model of this kind for a task."""
    shape = dict(n_layers=2, d_model=64, d_ff=176)
    if task == "text":
        shape, unit, K = shape | dict(n_heads=4, vocab_size=VOCABULARY, max_seq_len=T), 32, 16
    else:
        shape, unit, K = shape | dict(n_heads=2, vocab_size=LETTERS + KEYS, max_seq_len=LONGEST), 8, 32
    grouped = shape | dict(n_kv_heads=2, qk_norm=True)
    blocks = dict(block_size=unit, n_selected=4)
    summaries = dict(summary_size=unit, summary_stride=unit // 2, window=2 * unit)
    match kind:
        case "softmax":
            return gpt.GPT(gpt.Config(**grouped))
        case "windows, softmax":
            return gpt.GPT(gpt.Config(**grouped, window=2 * unit, full_layers=(1,)))
        case "MoBA":
            return moba.MoBA(moba.Config(**grouped, **blocks))
        case "native sparse":
            return native_sparse.NativeSparse(native_sparse.Config(**grouped, **blocks, **summaries))
        case "linear":
            return linear.LinearGPT(linear.Config(**grouped))
        case "linear, softmax":
            return linear.LinearGPT(linear.Config(**grouped, softmax_layers=(1,)))
        case "latent":
            widths = dict(kv_rank=32, d_nope=K, d_rope=K // 2, d_value=K)
            return latent.LatentGPT(latent.Config(**shape, **widths))
        case "talking heads":
            return talking_heads.TalkingHeads(talking_heads.Config(**grouped))
    raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")


def cache_bytes(model: nn.Module, n_tokens: int) -> int:
    """Return the bytes of the tensors that generation keeps of one row of n_tokens tokens, in float32."""
    parts = vars(model.new_cache([1], n_tokens))
    parts = [parts, *(vars(part) for part in parts.values() if isinstance(part, KVCache))]
    lists = [value for part in parts for value in part.values() if isinstance(value, list)]
    # Latents are listed twice, as keys and as values.
    kept = {x.data_ptr(): x.nbytes for tensors in lists for x in tensors if isinstance(x, Tensor)}
    return sum(kept.values())


def train(model: nn.Module, batches: Iterator[Batch], budget: float, lr: float, optimizer: str) -> dict:
    """Train a model until it has spent budget FLOPs; return the FLOPs, tokens, steps and CPU seconds it took.

    batches: endless; {"tokens", "targets"}, each int64 (B, T), of any B and T. The rate rises to lr in WARMUP
    steps, and falls to a tenth of it as a cosine of the share of the budget that is spent.
    """
    options = Namespace(optimizer=optimizer, lr=lr, weight_decay=0.1, device="cpu")
    optimizers = make_optimizers(model, options)
    spent = n_tokens = step = 0
    began = time.process_time()
    while spent < budget:
        batch = next(batches)
        rate = lr * (0.55 + 0.45 * math.cos(math.pi * spent / budget)) * min(1.0, (step + 1) / WARMUP)
        model.loss(batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = rate * group["lr_factor"]
            one.step()
            one.zero_grad()
        spent += batch["tokens"].numel() * model.flops_per_token(batch["tokens"].shape[1])
        n_tokens, step = n_tokens + batch["tokens"].numel(), step + 1
    return {"flops": spent, "tokens": n_tokens, "steps": step, "seconds": time.process_time() - began}


# --- text


def of_text(dataset: Dataset, seed: int) -> Iterator[Batch]:
    """Yield batches of one row: with this few FLOPs many steps taught softmax more than large batches."""
    loader = Loader(dataset.train, seed)
    for step in count():
        yield gpt.make_batch(loader.read(step, 1), None, None)


@torch.no_grad()
def losses(model: nn.Module, dataset: Dataset) -> dict:
    """Return the bits per byte of N_HELD_OUT rows that lie evenly in the held-out text, and the mean nats per
    token in each of the GROUPS of positions. Position 0 predicts the second token of the row."""
    rows, sizes = dataset.val, torch.zeros(VOCABULARY, dtype=torch.int64)
    for token, text in dataset.tokenizer.token_bytes.items():
        sizes[token] = 0 if token == dataset.tokenizer.eot_id else len(text)
    chosen = [rows[i * len(rows) // N_HELD_OUT] for i in range(N_HELD_OUT)]
    nats, n_bytes = torch.zeros(T, dtype=torch.float64), 0
    for row in chosen:
        batch = gpt.make_batch([row], None, None)
        logits = model(batch["tokens"]).transpose(1, 2)  # (B, V, T)
        nats += F.cross_entropy(logits, batch["targets"], reduction="none").double().sum(dim=0)
        n_bytes += sizes[batch["targets"]].sum().item()
    by_position = [(nats[a:b].mean() / N_HELD_OUT).item() for a, b in pairwise(GROUPS)]
    return {"bits_per_byte": nats.sum().item() / math.log(2) / n_bytes, "by_position": by_position}


# --- needle


def make_needles(n: int, length: int, n_keys: int, generator: Generator) -> Batch:
    """Return n rows of random letters, each with one of the KEYS in n_keys places, the last place among them.

    After each place but the last stands the row's answer, a letter. Targets, int64 (n, length) like the
    tokens, are the answer at every place but the first, where it cannot be known, and -100 elsewhere.
    """
    key = torch.randint(LETTERS, LETTERS + KEYS, (n, 1), generator=generator)
    answer = torch.randint(LETTERS, (n, 1), generator=generator)
    row = torch.randint(LETTERS, (n, length), generator=generator)
    # Pairs of key and answer must not overlap: draw places without room for the answers, then make room.
    m = n_keys - 1
    places = torch.rand(n, length - 1 - m, generator=generator).argsort(dim=1)[:, :m].sort(dim=1)[0]
    places = places + torch.arange(m)
    row.scatter_(1, places + 1, answer.expand(n, m))
    places = F.pad(places, (0, 1), value=length - 1)
    row.scatter_(1, places, key.expand(n, n_keys))
    targets = torch.full_like(row, -100).scatter(1, places[:, 1:], answer.expand(n, m))
    return {"tokens": row, "targets": targets}


def of_needles(seed: int) -> Iterator[Batch]:
    """Yield batches of NEEDLE_TOKENS tokens or fewer, whose lengths are drawn evenly on a logarithmic scale,
    with the key 2 to 16 times in a row, or less often in short rows: many answers teach more than one."""
    generator = Generator().manual_seed(seed)
    while True:
        share = torch.rand((), generator=generator).item()
        length = round(SHORTEST * (LONGEST / SHORTEST) ** share)
        n_keys = int(torch.randint(2, min(16, length // 4) + 1, (), generator=generator))
        yield make_needles(NEEDLE_TOKENS // length, length, n_keys, generator)


@torch.no_grad()
def found(model: nn.Module, length: int) -> float:
    """Return the share of N_TEST rows of `length` tokens whose answer is the likeliest next token."""
    batch = make_needles(N_TEST, length, 2, Generator().manual_seed(10**6 + length))
    n_rows = max(1, 4096 // length)
    parts = zip(batch["tokens"].split(n_rows), batch["targets"][:, -1].split(n_rows), strict=True)
    right = (model.logits(model.hidden(x)[:, -1]).argmax(dim=-1) == y for x, y in parts)
    return torch.cat(list(right)).float().mean().item()


# --- the comparison


def measure(kind: str, task: str, seed: int, budget: float, lr: float, dataset: Dataset | None) -> dict:
    """Train a kind on a task for budget FLOPs, and return its figures. dataset: that of the task "text"."""
    torch.manual_seed(seed)
    model = make_model(kind, task)
    row = {"parameters": sum(p.numel() for p in model.parameters())}
    if task == "text":
        row |= {"flops_per_token": model.flops_per_token(T), "cache_bytes": cache_bytes(model, T)}
        row |= train(model, of_text(dataset, seed), budget, lr, "muon")
        return row | losses(model.eval(), dataset)
    row |= train(model, of_needles(seed), budget, lr, "adamw")
    return row | {"found": {length: found(model.eval(), length) for length in LENGTHS}}


def spread(values: list[float], form: str) -> str:
    """Return the mean of values and their range, each in a format such as ".3f"."""
    mean, low, high = (format(v, form) for v in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def tables(rows: list[dict]) -> str:
    """Return both tables in Markdown, with the number of seeds of each kind."""
    head = (
        "kind | parameters | FLOPs per token | cache, bytes per token | tokens read | bits per byte | seeds"
    )
    lines = [f"| {head} |", "|---" * 7 + "|"]
    for kind, runs in by_kind(rows, "text").items():
        first, values = runs[0], spread([row["bits_per_byte"] for row in runs], ".3f")
        sizes = f"{first['parameters']:,} | {first['flops_per_token']:,} | {first['cache_bytes'] / T:,.0f}"
        lines.append(f"| {kind} | {sizes} | {first['tokens']:,} | {values} | {len(runs)} |")
    lines += ["", "| kind | " + " | ".join(f"{n:,} tokens" for n in LENGTHS) + " | seeds |", "|---" * 6 + "|"]
    for kind, runs in by_kind(rows, "needle").items():
        shares = (spread([100 * row["found"][str(n)] for row in runs], ".0f") for n in LENGTHS)
        lines.append(f"| {kind} | {' | '.join(shares)} | {len(runs)} |")
    return "\n".join(lines)


def by_kind(rows: list[dict], task: str) -> dict[str, list[dict]]:
    """Return the rows of a task for each kind that has any, in the order of KINDS."""
    kinds = {kind: [row for row in rows if (row["task"], row["kind"]) == (task, kind)] for kind in KINDS}
    return {kind: runs for kind, runs in kinds.items() if runs}


def plot_text(rows: list[dict], path: Path) -> None:
    """Draw the loss by position, and its difference from that of softmax with the same seed; mean and range
    over the seeds."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    x = [(a + b) / 2 for a, b in pairwise(GROUPS)]
    of_softmax = {row["seed"]: row["by_position"] for row in by_kind(rows, "text").get("softmax", [])}
    for kind, runs in by_kind(rows, "text").items():
        (line,) = left.plot(x, means([row["by_position"] for row in runs]), "o-", markersize=3, label=kind)
        pairs = [(row["by_position"], of_softmax[row["seed"]]) for row in runs if row["seed"] in of_softmax]
        if pairs:
            curves = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
            draw(right, x, curves, 0.15, marker="o", markersize=3, label=kind, color=line.get_color())
    for axis, title in ((left, "loss"), (right, "loss above that of softmax")):
        axis.set(xscale="log", xlabel="position in the row, tokens", ylabel="nats per token", title=title)
        axis.grid(alpha=0.3)
    left.legend(fontsize="small")
    save_figure(figure, path)


def plot_needles(rows: list[dict], path: Path) -> None:
    """Draw the share of rows answered by the length of a row; mean and range over the seeds."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for kind, runs in by_kind(rows, "needle").items():
        found = [[100 * row["found"][str(n)] for n in LENGTHS] for row in runs]
        draw(axis, LENGTHS, found, 0.15, marker="o", markersize=3, label=kind)
    axis.axhline(100 / LETTERS, color="grey", linestyle=":", label="guess")
    axis.axvline(LONGEST, color="grey", linewidth=1)
    axis.set(xscale="log", xlabel=f"tokens of a row; trained up to {LONGEST}", ylabel="rows answered (%)")
    axis.set_xticks(LENGTHS, LENGTHS)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=TASKS, default=TASKS, help="tasks (default: both)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of attention (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    add("--text-flops", type=float, default=6e11, help="FLOPs of a run on text (default %(default)g)")
    add("--text-lr", type=float, default=4e-3, help="learning rate on text (default %(default)s)")
    add("--needle-flops", type=float, default=4e11, help="FLOPs of a run on needles (default %(default)g)")
    add("--needle-lr", type=float, default=4e-3, help="learning rate on needles (default %(default)s)")
    add(
        "--cache", type=command.path, default=Path("cache"), help="folder of the tokens (default %(default)s)"
    )
    add("--out", type=command.new_file, required=True, help="file of the figures, JSON; pictures beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {task: (getattr(args, f"{task}_flops"), getattr(args, f"{task}_lr")) for task in TASKS}
    ended = Ended(args.out, indent=None)
    dataset = None
    if "text" in args.parts:
        corpus = data.text.prepare("stdlib", f"bpe:{VOCABULARY}", args.cache, notify=lambda _: None)
        dataset = data.text.as_rows(corpus, T, only_whole=True)
    for seed, task, kind in product(args.seeds, args.parts, args.kinds):
        budget, lr = settings[task]
        run = {"task": task, "kind": kind, "seed": seed, "budget": budget, "lr": lr}
        if not ended.has(**run):
            row = run | measure(kind, task, seed, budget, lr, dataset)
            ended.add(row)
            result = row.get("bits_per_byte") or list(row["found"].values())
            print(f"{task:6} {kind:16} seed {seed}: {result}, {row['seconds']:.0f} s", flush=True)
    rows = [row for row in ended.rows if (row["budget"], row["lr"]) == settings[row["task"]]]
    print(tables(rows))
    for task, plot in (("text", plot_text), ("needle", plot_needles)):
        if by_kind(rows, task):
            plot(rows, args.out.with_name(f"{args.out.stem}_{task}.png"))


if __name__ == "__main__":
    command.run(main)
