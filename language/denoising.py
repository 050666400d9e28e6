"""Denoising: a text is damaged, and an encoder-decoder writes it as it was (BART, Lewis et al. 2019).

    text      a b c d e . f g h . i j .
    permuted  i j . a b c d e . f g h .        the sentences in random order
    input     i _ . a _ d e . _ f g h .        a mask in the place of each span; the last span has no tokens
    target    a b c d e . f g h . i j .        the whole text

These are the two kinds of noise of the published models (section 2.2): text infilling removes 30 % of the
tokens, in spans whose lengths have the Poisson distribution of mean 3; sentence permutation comes before it.
A mask does not show how many tokens it replaces; it may be none. The decoder writes the whole text, not only
what is missing: about five times as many tokens as T5's decoder for the same text
(language/span_corruption.py). In source code a line is a sentence.

    python -m language.denoising                       a sentence, damaged
    python train.py --model bart                       train a BART with it
    python train.py --model t5 --task denoising        or any other encoder-decoder

All randomness comes from the generator, a CPU one, so that the same state gives the same batch.
Shapes: B rows, N tokens of a text, S of an input.
"""

import difflib
import math
import re
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import data.text
from data.rows import Dataset, Row, stack
from engine import contract
from formats import command
from language.span_corruption import padded

MODEL = "bart"
OPTIMIZER, STEPS = "muon", 1200


@dataclass(frozen=True)
class Config:
    noise_rate: float = 0.3  # share of the tokens that masks replace
    mean_span: float = 3.0  # mean number of tokens that a mask replaces
    permute: bool = True  # permute the sentences too

    def __post_init__(self):
        if not 0 < self.noise_rate < 1:
            raise ValueError(f"noise_rate {self.noise_rate}: expected between 0 and 1")
        if not 0.01 <= self.mean_span < math.inf:  # with smaller ones nearly all draws are spans of no tokens
            raise ValueError(f"mean_span {self.mean_span}: expected at least 0.01")


def span_lengths(n: int, mean: float, generator: Generator) -> Tensor:
    """Return lengths (k,), int64, that add up to n: Poisson draws, of which the last is shortened.

    Spans of no tokens are among them, but only so many that k <= n: masks never lengthen a text.
    """
    lengths = torch.empty(0, dtype=torch.int64)
    while lengths.sum() < n:
        more = torch.poisson(torch.full((n,), mean), generator=generator).long()
        lengths = torch.cat((lengths, more))
    last = int((lengths.cumsum(0) < n).sum())
    lengths = lengths[: last + 1].clone()
    lengths[last] -= lengths.sum() - n
    empty = (lengths == 0).cumsum(0) * (lengths == 0)  # 1, 2, 3 ... at spans of no tokens, 0 at others
    return lengths[empty <= n - int((lengths > 0).sum())]


def infill(
    tokens: Tensor, generator: Generator, mask_id: int, rate: float = 0.3, mean_span: float = 3.0
) -> Tensor:
    """Return tokens (N,) with a mask in the place of each span: (N - n + k,) for n tokens in k spans.

    Every way to place the spans is equally likely; they do not overlap, but may be neighbours.
    """
    N, n = len(tokens), math.ceil(rate * len(tokens))
    lengths = span_lengths(n, mean_span, generator)
    # An item of the result is a token that stays, which covers 1 token of the text, or a mask.
    n_items = N - n + len(lengths)
    masks = torch.randperm(n_items, generator=generator)[: len(lengths)]
    covered = torch.ones(n_items, dtype=torch.int64)
    covered[masks] = lengths
    first = covered.cumsum(0) - covered  # the place in the text where an item begins
    result = tokens[first.clamp(max=N - 1)]  # an empty span at the end begins at N, behind the text
    result[masks] = mask_id
    return result


def permute(tokens: Tensor, ends: Tensor, generator: Generator) -> Tensor:
    """Return the sentences of tokens (N,) in random order. ends, bool (N,): True for the last token of each.

    Tokens behind the last end are a sentence too.
    """
    number = ends.cumsum(0) - ends.long()  # the number of each token's sentence
    place = torch.randperm(int(number[-1]) + 1, generator=generator)
    return tokens[place[number].argsort(stable=True)]


# --- the task


def settings(model_config) -> Config:
    """Return the default settings, for any model."""
    return Config()


def line_ends(tokenizer) -> Tensor:
    """Return (n_vocab,) bool: the tokens with a line break in them."""
    ends = torch.zeros(tokenizer.n_vocab, dtype=torch.bool)
    ends[[i for i, token in tokenizer.token_bytes.items() if b"\n" in token]] = True
    return ends


def damaged(text: Tensor, config: Config, generator: Generator, tokenizer, ends: Tensor) -> Tensor:
    """Return the input (S,) for a text (N,), without an end token. ends: from `line_ends`."""
    if config.permute:
        text = permute(text, ends[text], generator)
    return infill(text, generator, tokenizer.mask_id, config.noise_rate, config.mean_span)


def make_batch(rows: list[Row], config: Config, generator: Generator, tokenizer) -> dict[str, Tensor]:
    """Return a batch of B texts {"tokens": (N,)}: "tokens" (B, S), the inputs, and "targets" (B, N + 1), the
    texts, each with an end token; and where inputs differ in length, "lengths" (B,)."""
    end, ends, texts = torch.tensor([tokenizer.eot_id]), line_ends(tokenizer), stack(rows)["tokens"].long()
    inputs = [torch.cat((damaged(text, config, generator, tokenizer, ends), end)) for text in texts]
    targets = torch.cat((texts, end.expand(len(texts), 1)), dim=1)
    batch = {"tokens": padded(inputs, tokenizer.pad_id), "targets": targets}
    lengths = torch.tensor([len(row) for row in inputs])
    return batch if lengths.min() == lengths.max() else batch | {"lengths": lengths}


def flops_per_token(model: nn.Module, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on a text, input and target, divided by seq_len."""
    n_spans = config.noise_rate * seq_len / config.mean_span
    S = max(1, round(seq_len - config.noise_rate * seq_len + n_spans))
    return model.flops_per_token(S, seq_len) * S // seq_len


def load_data(args: Namespace, model_config) -> Dataset:
    """Return texts of --data, of --seq-len tokens with the end token that `make_batch` adds, and the
    tokenizer with a mask and a padding token.

    Raises ValueError for --document-mask, and for --seq-len below 4.
    """
    if args.document_mask:
        raise ValueError("--document-mask: an input and its target are one text; leave it out")
    if args.seq_len < 4:
        raise ValueError(f"--seq-len {args.seq_len}: expected at least 4 tokens of a text")
    # A row of `as_rows` has one token more than its argument.
    dataset = data.text.as_rows(contract.load_corpus(args), args.seq_len - 2, only_whole=True)
    names = {"pad_token": "<pad>", "mask_token": "<mask>"}
    return replace(dataset, tokenizer=dataset.tokenizer.with_special_tokens(names))


def likeness(a: list[int], b: list[int]) -> float:
    """Return the share, 0 to 1, of the tokens of two texts that are in stretches common to both."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return the mean `likeness` of 8 held-out texts to what the model restored of them, and to the damaged
    inputs; and the first of them, damaged and restored. The damage is that of the default Config."""
    tokenizer, generator, val = dataset.tokenizer, torch.Generator().manual_seed(0), dataset.val
    ends = line_ends(tokenizer)
    texts = [torch.from_numpy(val[i]["tokens"]).long() for i in range(min(8, len(val)))]
    inputs = [damaged(text, Config(), generator, tokenizer, ends).tolist() for text in texts]
    rows = [[*row, tokenizer.eot_id] for row in inputs]
    outputs = model.generate(rows, len(texts[0]) + 1, temperature=0)
    restored, before = (
        sum(likeness(row, text.tolist()) for row, text in zip(side, texts, strict=True)) / len(texts)
        for side in (outputs, inputs)
    )
    written = [token for token in outputs[0] if token != tokenizer.eot_id]
    return "\n".join(
        [
            f"{restored:.1%} of the restored tokens are as in the originals; of the damaged, {before:.1%}",
            "\n--- damaged", tokenizer.decode(inputs[0]), "\n--- restored", tokenizer.decode(written),
        ]
    )  # fmt: skip


def main() -> None:
    words = re.findall(r"\S+", "Thank you for coming . We had a good time last week . Come again !")
    names, generator = [*words, "_"], torch.Generator().manual_seed(3)
    tokens = torch.arange(len(words))
    ends = torch.tensor([word in ".!" for word in words])
    permuted = permute(tokens, ends, generator)
    texts = (tokens, permuted, infill(permuted, generator, len(words)))
    for name, text in zip(("text", "permuted", "input"), texts, strict=True):
        print(f"{name:9}", *(names[token] for token in text))


if __name__ == "__main__":
    command.run(main)
