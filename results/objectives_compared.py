"""One stack or two, and which objective? Table 2 of Raffel et al. 2019 in small: same FLOPs, three seeds.

    python -m results.objectives_compared --out results/objectives_compared.json

Four architectures, all made of the blocks of language/t5.py at width 128:

    encoder-decoder    3 layers read the input, where each token sees all others; 3 further layers write the
                       target
    shared stacks      the same, but encoder and decoder share the weights of their self-attention, MLPs and
                       norms; the decoder alone has cross attention
    prefix LM          3 layers read the input, where each token sees all others, and write the target behind
                       it (language/prefix_lm.py)
    causal LM          3 layers; each token sees only those before it, in the input too

Each is pretrained on the source text of Python's library with one of two objectives, until it has spent the
FLOPs of --budget (matrix products, forward and backward, cross attention included):

    denoising          T5's span corruption: the input is a text with gaps, the target what stood in the gaps
    LM                 the text is cut at a random place; the first part is the input, the second the target.
                       The causal LM has no input: it predicts the whole text

The learning rate is chosen from --rates by the held-out loss of the objective itself, in runs with a seed of
their own. Then every model is fine-tuned on two tasks, on each for the same few steps on the same batches
from the pretrained weights. The measure is nats per target token on held-out data:

    gaps               T5's span corruption, which favours the models that were pretrained by it
    docstrings         the first sentence of a function's docstring from its code, which is neither objective

The figures of every run are written to --out, a picture beside it, and a table is printed. All of it takes
about 40 minutes on two cores. A run that has ended is kept in --cache: the same command after an interruption
continues.
"""

import argparse
import math
import multiprocessing
import statistics
from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import data.text
from data.docstrings import stdlib_functions
from data.rows import Dataset, Loader, seed_of
from engine import cpu
from engine.optim import make_optimizers
from evaluation.small_runs import mean_and_range
from formats import command
from formats.figures import load_pyplot, save_figure
from formats.json_file import write_json
from kernels import linear_cross_entropy
from language import span_corruption
from language.prefix_lm import Behind, Prefix
from language.t5 import T5, Config
from results.keep import Ended

COMMAND = "python -m results.objectives_compared --out results/objectives_compared.json"
TOKENIZER = "bpe:1024"  # a small vocabulary, so that the head costs little beside the stacks
CONFIG = Config(3, 4, 128, 256, 1152, 32, mlp="geglu", scale_head=False, max_seq_len=128)
ARCHITECTURES = ("encoder-decoder", "shared stacks", "prefix LM", "causal LM")
OBJECTIVES = ("denoising", "LM")
MEASURES = ("gaps", "docstrings")
SEARCH_SEED = 1000  # of the runs that choose the learning rate
S, BATCH = 128, 8  # tokens of an input, rows of a batch
N = span_corruption.text_length(S)  # tokens of a text
LONGEST_SUMMARY = 40  # tokens
TUNING_RATE = 1e-3  # of fine-tuning

Batch = dict[str, Tensor]


class OneStack(T5):
    """A T5 without a decoder, whose one stack reads the input and then the target behind it.

    sees_prefix: True for a prefix LM, in which each token of the input sees all of the input; False for a
    causal LM.
    """

    def __init__(self, config: Config, sees_prefix: bool):
        super().__init__(config)
        self.decoder, self.sees_prefix = None, sees_prefix

    def loss(self, batch: Batch) -> tuple[Tensor, dict]:
        """Return the mean nats per target of "targets" (B, T) behind "tokens" (B, S); S may be 0."""
        tokens, targets = batch["tokens"], batch["targets"]
        n, zero = tokens.shape[1], tokens.new_zeros(())
        x = self.embed(torch.cat((tokens, self.shifted(targets)), 1), zero, self.encoder)  # (B, S + T, D)
        if self.sees_prefix:
            prefix = Prefix()
            self.encoder(x[:, :n], {}, prefix)
            hidden = self.encoder(x[:, n:], {"causal": True}, Behind(prefix))
        else:
            hidden = self.encoder(x, {"causal": True})[:, n:]
        return linear_cross_entropy(hidden.contiguous(), self.head_weight, targets.contiguous())[0], {}


def make_model(architecture: str) -> T5:
    """Return a new model of one of ARCHITECTURES."""
    if architecture in ("prefix LM", "causal LM"):
        return OneStack(CONFIG, sees_prefix=architecture == "prefix LM")
    model = T5(CONFIG)
    if architecture == "shared stacks":
        for ours, theirs in zip(model.decoder.block, model.encoder.block, strict=True):
            ours.layer[0], ours.layer[2] = theirs.layer[0], theirs.layer[1]  # without cross attention
    return model


def flops(architecture: str, S: int, T: int) -> int:
    """Return the FLOPs of training on one input of S tokens and its target of T, forward and backward."""
    if architecture in ("encoder-decoder", "shared stacks"):
        return 3 * CONFIG.flops(S, T)
    D, HK, L = CONFIG.d_model, CONFIG.n_heads * CONFIG.d_head, CONFIG.n_layers
    pairs = T * (T + 1) // 2 + S * T + (S * S if architecture == "prefix LM" else S * (S + 1) // 2)
    stack = 2 * (S + T) * L * (4 * D * HK + 3 * D * CONFIG.d_ff) + 4 * pairs * HK * L
    return 3 * (stack + 2 * T * D * CONFIG.vocab_size)


# --- what they learn from


@dataclass
class Examples:
    """Everything that the runs read."""

    dataset: Dataset  # texts of N tokens
    functions: tuple[Batch, Batch]  # sources (n, S) and summaries (n, T): to train on, held out

    def batch(self, rows: list, architecture: str, objective: str, generator: Generator) -> Batch:
        """Return inputs "tokens" (B, S) and "targets" (B, T) made of texts by one of OBJECTIVES."""
        if objective == "denoising":
            return span_corruption.make_batch(
                rows, span_corruption.Config(), generator, self.dataset.tokenizer
            )
        texts = torch.stack([torch.from_numpy(row["tokens"]).long() for row in rows])
        n = 0 if architecture == "causal LM" else int(torch.randint(1, N, (), generator=generator))
        return {"tokens": texts[:, :n], "targets": texts[:, n:]}


def load_examples(cache: Path) -> Examples:
    """Return the texts and the functions as tokens of one vocabulary."""
    corpus = data.text.prepare("stdlib", TOKENIZER, cache, notify=lambda _: None)
    dataset = data.text.as_rows(corpus, N - 1, only_whole=True)
    names = reversed(span_corruption.SENTINELS)
    dataset.tokenizer = dataset.tokenizer.with_special_tokens({"pad_token": "<pad>"}, names)
    assert dataset.tokenizer.n_vocab <= CONFIG.vocab_size
    return Examples(dataset, tuple(encoded(side, dataset.tokenizer) for side in stdlib_functions()))


def encoded(functions: list, tokenizer) -> Batch:
    """Return the sources of functions as "tokens" (n, S) and their summaries as "targets" (n, T).

    There is padding in front of a short source, which every model reads like other tokens, and -100 behind a
    short summary.
    """
    end = tokenizer.eot_id
    sources = [[*tokenizer.encode(one.source)[: S - 1], end] for one in functions]
    tokens = [[tokenizer.pad_id] * (S - len(source)) + source for source in sources]
    summaries = [[*tokenizer.encode(one.summary), end][:LONGEST_SUMMARY] for one in functions]
    targets = span_corruption.padded([torch.tensor(row) for row in summaries], -100)
    return {"tokens": torch.tensor(tokens), "targets": targets}


# --- a run


def pretrain(model: T5, examples: Examples, job: Namespace) -> tuple[int, list[tuple[float, float]]]:
    """Train until the FLOPs of the budget are spent. Return the number of steps, and the held-out loss at
    four points of the budget, as (FLOPs, loss)."""
    loader, optimizer = Loader(examples.dataset.train, job.seed), adamw(model, job.rate)
    kind, spent, step, curve = (job.architecture, job.objective), 0, 0, []
    while spent < job.budget:
        draws = Generator().manual_seed(seed_of(job.seed, step))
        batch = examples.batch(loader.read(step * BATCH, BATCH), *kind, draws)
        # A cosine over the budget, after a warm-up in its first twentieth.
        done = spent / job.budget
        descend(model, optimizer, batch, job.rate * min(20 * done + 0.01, (1 + math.cos(math.pi * done)) / 2))
        n, T = batch["tokens"].shape[1], batch["targets"].shape[1]
        before, spent, step = spent, spent + BATCH * flops(job.architecture, n, T), step + 1
        if int(4 * spent / job.budget) > int(4 * before / job.budget):
            curve.append((spent, held_out_loss(model, held_out_texts(examples, *kind))))
    return step, curve


def tune(model: T5, examples: Examples, measure: str, steps: int, seed: int) -> float:
    """Fine-tune on one of MEASURES, and return its held-out loss. The weights are then put back."""
    kept = {name: w.clone() for name, w in model.state_dict().items()}
    optimizer, draws = adamw(model, TUNING_RATE), Generator().manual_seed(seed)
    loader, functions = Loader(examples.dataset.train, seed + 1), examples.functions[0]
    for step in range(steps):
        if measure == "gaps":
            rows = loader.read(step * BATCH, BATCH)
            batch = examples.batch(rows, "", "denoising", draws)
        else:
            chosen = torch.randint(len(functions["tokens"]), (BATCH,), generator=draws)
            batch = {name: t[chosen] for name, t in functions.items()}
        descend(model, optimizer, batch, TUNING_RATE * min(1.0, (step + 1) / 10, (steps - step) / steps * 2))
    if measure == "gaps":
        loss = held_out_loss(model, held_out_texts(examples, "", "denoising"))
    else:
        loss = held_out_loss(model, [examples.functions[1]])
    model.load_state_dict(kept)
    return loss


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return make_optimizers(model, Namespace(optimizer="adamw", lr=rate, weight_decay=0.1, device="cpu"))[0]


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> None:
    """Make one update of the weights at this learning rate, with the gradient's norm clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.loss(batch)[0].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def held_out_texts(examples: Examples, architecture: str, objective: str) -> list[Batch]:
    """Return batches of 128 held-out texts, the same at every call."""
    val, draws = examples.dataset.val, Generator().manual_seed(0)
    groups = [[val[i] for i in range(at, min(at + 32, len(val)))] for at in range(0, min(128, len(val)), 32)]
    return [examples.batch(rows, architecture, objective, draws) for rows in groups]


@torch.no_grad()
def held_out_loss(model: T5, batches: list[Batch]) -> float:
    """Return the mean nats per target of all batches."""
    counts = [int((batch["targets"] >= 0).sum()) for batch in batches]
    losses = [model.loss(batch)[0].item() for batch in batches]
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


_examples: Examples  # of this process, loaded once


def start_process(cache: Path) -> None:
    """Set up a process that makes runs: one thread, and the data in memory."""
    global _examples
    torch.set_num_threads(1)
    _examples = load_examples(cache)


def run_all(pool, jobs: list[Namespace], ended: Path) -> list[dict]:
    """Return the results of all jobs. A job that ends becomes a row of the file `ended`, and a job that is
    there does not run again."""
    kept = Ended(ended)
    todo = [job for job in jobs if not kept.has(**vars(job))]
    for result in pool.imap_unordered(run, todo):
        kept.add(result)
    return [kept.find(**vars(job)) for job in jobs]


def run(job: Namespace) -> dict:
    """Train one architecture with one objective, and measure; in the search for a rate, only train."""
    torch.manual_seed(job.seed)
    model = make_model(job.architecture)
    n_params = sum(p.numel() for p in model.parameters())
    steps, curve = pretrain(model, _examples, job)
    result = vars(job) | {"n_params": n_params, "steps": steps, "curve": curve}
    if job.seed != SEARCH_SEED:
        result |= {measure: tune(model, _examples, measure, job.tuning, job.seed) for measure in MEASURES}
    figures = [f"{name} {result[name]:.3f}" for name in MEASURES if name in result]
    name = f"{job.architecture:16} {job.objective:10} rate {job.rate:g} seed {job.seed}"
    print(f"{name}: {steps} steps, own loss {curve[-1][1]:.3f}", *figures, sep=", ", flush=True)
    return result


# --- all runs


def best_rates(results: list[dict]) -> dict[tuple[str, str], float]:
    """Return the learning rate with the lowest loss of the objective itself, by (architecture, objective)."""
    by_loss = sorted(results, key=lambda r: r["curve"][-1][1], reverse=True)
    return {
        (r["architecture"], r["objective"]): r["rate"] for r in by_loss
    }  # the lowest comes last, and stays


def table(results: list[dict]) -> str:
    """Return a table in Markdown: the mean over the seeds, and their range."""
    head = f"| {'architecture':16} | objective | parameters | learning rate | steps |"
    lines = [head + " gaps | docstrings |", "|---|---|---|---|---|---|---|"]
    for objective, architecture in product(OBJECTIVES, ARCHITECTURES):
        own = [r for r in results if (r["architecture"], r["objective"]) == (architecture, objective)]
        first, cells = own[0], [mean_and_range([r[measure] for r in own], ".3f") for measure in MEASURES]
        lines.append(
            f"| {architecture:16} | {objective} | {first['n_params'] / 1e6:.2f}M | {first['rate']:g} | "
            f"{first['steps']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Draw both measures: a dot for each seed, and a bar for their mean."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    names = [*product(OBJECTIVES, ARCHITECTURES)][::-1]
    for axes, measure in zip(panels, MEASURES, strict=True):
        for y, (objective, architecture) in enumerate(names):
            own = [r for r in results if (r["architecture"], r["objective"]) == (architecture, objective)]
            values, color = [r[measure] for r in own], f"C{OBJECTIVES.index(objective)}"
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
            axes.plot(statistics.mean(values), y, "|", color=color, markersize=16)
        axes.set_yticks(range(len(names)), [f"{b}, {a}" for a, b in names])
        axes.set(xlabel="nats per token", title=f"{measure}, after fine-tuning")
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", type=float, default=2e12, help="FLOPs of a run's pretraining (default %(default)g)")
    add(
        "--tuning",
        type=command.count,
        default=100,
        help="steps of fine-tuning on each task (default %(default)s)",
    )
    add("--seeds", type=command.count, default=3, help="runs of each combination (default %(default)s)")
    add("--rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3],
        help="learning rates to choose from (default 0.0015 0.003 0.006)")  # fmt: skip
    add("--jobs", type=command.count, default=2, help="runs at a time, one thread each (default %(default)s)")
    cache = Path("cache")
    add("--cache", type=command.path, default=cache, help="folder of tokenised text (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON, and a picture beside them")
    args = parser.parse_args(argv)
    data.text.prepare("stdlib", TOKENIZER, args.cache)  # once, before the processes start

    def job(pair: tuple[str, str], rate: float, seed: int) -> Namespace:
        fixed = {"budget": args.budget, "tuning": args.tuning}
        return Namespace(architecture=pair[0], objective=pair[1], rate=rate, seed=seed, **fixed)

    pairs = [*product(ARCHITECTURES, OBJECTIVES)]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(args.jobs, start_process, (args.cache,)) as pool:
        search = [job(pair, rate, SEARCH_SEED) for rate in args.rates for pair in pairs]
        ended = args.cache / "objectives_compared.json"
        searched = run_all(pool, search, ended) if len(args.rates) > 1 else []
        rates = best_rates(searched) or {pair: args.rates[0] for pair in pairs}
        jobs = [job(pair, rates[pair], seed) for seed in range(args.seeds) for pair in pairs]
        results = run_all(pool, jobs, ended)

    print(table(results))
    if args.out:
        about = {"command": COMMAND, "cpu": cpu.name(), "torch": torch.__version__, "budget": args.budget}
        write_json(args.out, about | {"search": searched, "results": results}, indent=1)
        plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
