"""Translation: an encoder-decoder reads a text and writes it in another language.

    loss = -mean_i [(1 - e) log p(y_i | y_<i, x) + e / V sum_v log p(v | y_<i, x)]

This is what the Transformer was made for (Vaswani et al. 2017). With e > 0 the target is smoothed: the right
token has the probability 1 - e + e / V, every other one e / V (section 5.4, e = 0.1). The model then learns
less extreme probabilities: perplexity is worse and BLEU better. The held-out loss is not smoothed. Both
languages share one vocabulary, learned from the pairs.

The sum over the vocabulary needs no second pass over the logits x = W h of a hidden state h, because the log
of the softmax's denominator cancels:

    smoothed loss - loss = e (x_y - mean_v x_v) = e h . (W_y - mean_v W_v)

Without --data the pairs are dates: "Tuesday, 3 March 1987" and "1987-03-03". Nothing is downloaded.

    python train.py --model t5 --task translate                                    dates into ISO form
    python train.py --model t5 --task translate --data pairs.tsv --out runs/de-en  source, tab, target
    python -m language.translate runs/de-en/model --text "Ein Hund schläft."
    python -m language.translate runs/de-en/model --score test.tsv --beams 4       BLEU

A run draws attention.png, the cross attention of one held-out sentence: which words of the source the decoder
reads as it writes each word.

Shapes: B pairs, S tokens of a source, T of a target, D model width, H heads, K head width, V vocabulary.
"""

import argparse
import datetime
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data import text_pairs
from data.rows import Dataset
from data.text import bpe_size
from data.text_pairs import Pair
from data.tokenizer import get_tokenizer, train_bpe
from formats import command
from formats.figures import load_pyplot, save_figure
from kernels import linear_cross_entropy
from language.beam_search import longest_output
from language.overlap import bleu

MODEL = "t5"
DATA = "dates"
OPTIMIZER, STEPS = "muon", 3000
N_SHOWN, N_SCORED = 5, 200  # held-out pairs
make_batch = text_pairs.make_batch


@dataclass(frozen=True)
class Config:
    label_smoothing: float = 0.1  # e; 0: the target is not smoothed

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing}: expected 0 to less than 1")


def settings(model_config) -> Config:
    """Return the default settings, for any model."""
    return Config()


def wrap(model: nn.Module, config: Config) -> nn.Module:
    """Return the model itself, with the task's Config as its attribute `objective`, which `loss` reads."""
    model.objective = config
    return model


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean nats per target that is not -100, smoothed in training, and no metrics."""
    hidden = model.scaled(model.hidden(batch["tokens"], batch["targets"], batch.get("lengths")))
    weight, targets = model.head_weight, batch["targets"].contiguous()
    nats = linear_cross_entropy(hidden, weight, targets, backend=model.config.kernels)[0]
    smoothing = model.objective.label_smoothing
    if model.training and smoothing:
        nats = nats + smoothing * above_mean(hidden, weight, targets)
    return nats, {}


def above_mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return how far the logits of the targets are above the mean logit: the mean of x_y - mean_v x_v over
    the targets y (B, T) that are not -100. hidden: h, (B, T, D). weight: W, (V, D)."""
    predicted = targets >= 0
    right = weight[targets.clamp(min=0)] - weight.mean(0)  # (B, T, D)
    return (hidden * right).sum(-1)[predicted].mean()


# --- pairs


MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
DAYS = [datetime.date(2000, 1, 3 + day).strftime("%A") for day in range(7)]


def spellings(date: datetime.date) -> list[str]:
    """Return some ways to write a date."""
    day, month, year, of_week = date.day, MONTHS[date.month - 1], date.year, DAYS[date.weekday()]
    return [
        f"{of_week}, {day} {month} {year}", f"{month} {day}, {year}", f"{day}.{date.month}.{year}",
        f"{day} {month[:3]} {year}", f"{of_week[:3]} {month[:3]} {day} {year}", f"{month} {year}, the {day}.",
    ]  # fmt: skip


def dates(n: int = 20_000, n_held_out: int = 500) -> tuple[list[Pair], list[Pair]]:
    """Return n pairs of a date and its ISO form to train on, and others held out, of other dates."""
    draws, first = random.Random(0), datetime.date(1900, 1, 1).toordinal()
    days = [datetime.date.fromordinal(first + i) for i in draws.sample(range(73_000), n + n_held_out)]
    pairs = [Pair(draws.choice(spellings(day)), day.isoformat()) for day in days]
    return pairs[:n], pairs[n:]


def load_data(args: argparse.Namespace, model_config) -> Dataset:
    """Return the pairs of --data, tokenised with one vocabulary for both languages.

    Raises ValueError for --document-mask and for --data that is no file of pairs.
    """
    if args.document_mask:
        raise ValueError("--document-mask: a pair is one text and its translation; leave it out")
    if args.data == DATA:
        (train, held_out), counts = dates(), Counter()
    elif not Path(args.data).is_file():
        raise ValueError(f"--data {args.data}: no such file; {text_pairs.EXPECTED}, or leave --data out")
    else:
        train, held_out, counts = text_pairs.read(args.data, args.val, args.bad_text, print)
    size = bpe_size(args.tokenizer)
    texts = [text for pair in train for text in pair]
    tokenizer = get_tokenizer(args.tokenizer) if size is None else train_bpe(texts, size)
    tokenizer = tokenizer.with_special_tokens({"pad_token": "<pad>"})
    return text_pairs.as_dataset(train, held_out, tokenizer, args.seq_len, counts)


# --- translations of a trained model


def translations(
    model: nn.Module,
    sources: Sequence[list[int]],
    longest: int,
    n_beams: int = 1,
    length_penalty: float = 1.0,
) -> Iterator[list[int]]:
    """Yield the translation of each source, tokens without the end token, of at most `longest` tokens."""
    end = model.config.eos_token_id
    for start in range(0, len(sources), 32):
        rows = sources[start : start + 32]
        if n_beams > 1:
            options = {"n_beams": n_beams, "length_penalty": length_penalty}
            outputs = model.beam_search(rows, longest, **options)
        else:
            outputs = model.generate(rows, longest, temperature=0)
        yield from ([token for token in output if token != end] for output in outputs)


@torch.no_grad()
def cross_attention(model: nn.Module, source: list[int], target: list[int]) -> list[Tensor]:
    """Return for each layer the weights of cross attention (T, S), the mean of the heads, as the model reads
    one source and writes its target. The decoder must be built like that of t5.py."""
    device = model.head_weight.device
    tokens, targets = (torch.tensor([row], device=device) for row in (source, target))
    found = []

    def weights(module: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k, _ = args
        scores = torch.einsum("bthk,bshk->bhts", module.heads(q), k) * module.scale
        found.append(scores.float().softmax(-1)[0].mean(0).cpu())

    crosses = [block.layer[1].EncDecAttention for block in model.decoder.block]
    hooks = [cross.register_forward_pre_hook(weights, with_kwargs=True) for cross in crosses]
    try:
        model.hidden(tokens, targets)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def label(text: str) -> str:
    """Return a token as a label of matplotlib, in which a dollar sign would begin a formula."""
    return "".join(c if c.isprintable() else " " for c in text).strip().replace("$", r"\$")


def draw(weights: list[Tensor], source: list[str], target: list[str], path: Path) -> None:
    """Write the picture of cross attention, a panel for each layer, to path, as PNG.

    weights: (T, S) for each layer; source, target: the labels of the S and T tokens.
    """
    size = (1.5 + 0.22 * len(source) * len(weights), 1.5 + 0.22 * len(target))  # inches
    figure, panels = load_pyplot().subplots(
        1, len(weights), figsize=size, layout="constrained", squeeze=False
    )
    for layer, (axes, of_layer) in enumerate(zip(panels[0], weights, strict=True)):
        axes.imshow(of_layer.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(source)), source, rotation=90, fontsize=7)
        axes.set_yticks(range(len(target)), target if layer == 0 else [], fontsize=7)
        axes.set_title(f"layer {layer}", fontsize=8)
    with warnings.catch_warnings(action="ignore"):  # characters without a glyph
        save_figure(figure, path)


def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return translations of held-out sources, and the BLEU of 200 beside that of copying the sources.

    Draws the cross attention of the first one as attention.png, if the decoder is built like that of t5.py.
    """
    tokenizer, val = dataset.tokenizer, dataset.val
    pairs = [text_pairs.sides_of(val[i]) for i in range(min(N_SCORED, len(val)))]
    longest = longest_output(model, 2 * max(len(target) for _, target in pairs))
    outputs = list(translations(model, [source for source, _ in pairs], longest))
    sources, targets = ([tokenizer.decode(side[:-1]) for side in both] for both in zip(*pairs, strict=True))
    written = list(map(tokenizer.decode, outputs))

    if hasattr(model, "decoder") and hasattr(model.decoder, "block"):
        source, output = pairs[0][0], [*outputs[0], tokenizer.eot_id][:longest]
        labels = [[label(tokenizer.decode([token])) for token in row] for row in (source, output)]
        draw(cross_attention(model, source, output), *labels, out / "attention.png")
    same = sum(a == b for a, b in zip(written, targets, strict=True)) / len(pairs)
    lines = [
        f"BLEU {bleu(written, targets):.2f} of {len(pairs)} held-out texts, {same:.1%} equal to theirs; the "
        f"sources as they are: BLEU {bleu(sources, targets):.2f}"
    ]
    for i in range(min(N_SHOWN, len(pairs))):
        lines += ["", sources[i], f"    {written[i]}"]
        lines += [f"    was {targets[i]}"] if written[i] != targets[i] else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Translate a text, or score the translations of a file of pairs.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="the directory of a model of this task")
    add("--text", type=command.filled, help="the text to translate")
    add("--score", type=command.path, metavar="FILE", help="pairs whose targets are compared, by BLEU")
    add("--max-new-tokens", type=int, default=100, help="tokens of a translation at most (default 100)")
    add("--beams", type=int, default=1, help="beam search with so many beams (default 1: none)")
    add("--length-penalty", type=float, default=1.0, help="0 prefers short ones (default 1; with --beams)")
    args = parser.parse_args(argv)
    if args.beams < 1:
        raise ValueError(f"--beams {args.beams}: expected at least 1")
    if (args.text is None) == (args.score is None):
        raise ValueError("expected one of --text, a text to translate, and --score, a file of pairs")

    from formats.open_model import open_model

    pairs = [Pair(args.text, "")] if args.score is None else text_pairs.read_pairs(args.score)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = open_model(args.checkpoint).to(device).eval(), get_tokenizer(args.checkpoint)
    if not hasattr(model, "beam_search"):
        raise ValueError(f"{args.checkpoint}: expected an encoder-decoder, as --model t5 --task translate")
    sources = [[*tokenizer.encode(pair.source), model.config.eos_token_id] for pair in pairs]
    options = (args.max_new_tokens, args.beams, args.length_penalty)
    outputs = [tokenizer.decode(output) for output in translations(model, sources, *options)]
    print(*outputs, sep="\n")
    if args.score is not None:
        print(f"BLEU {bleu(outputs, [pair.target for pair in pairs]):.2f} of {len(pairs):,} texts")


if __name__ == "__main__":
    command.run(main)
