"""Masked language modelling: some tokens of a text are hidden, and the model restores them.

    loss = -mean over chosen t of log p(x_t | corrupted row)

All maskings differ only in what is masked *together*. A masking is a partition of the row into units; units
are chosen at random until the budget, a rate times the length of the text, is spent; the tokens of the chosen
units are corrupted. The larger the units, the less a masked token can be guessed from its neighbours:

    each_token     every token alone                     BERT (Devlin et al. 2018)
    whole_words    all pieces of a word                  BERT's second release (2019), Cui et al. 2019
    entities       the words of a name or phrase         ERNIE (Sun et al. 2019)
    spans          some consecutive words, 3.8 a span    SpanBERT (Joshi et al. 2019)

    units = spans(whole_words(continues), generator)
    chosen = choose(units, maskable, n, generator)
    inputs = corrupt(tokens, chosen, mask_id, ordinary, generator, units)
    positions, targets = gather_masked(tokens, chosen, n)

`make_batch` is these steps, from windows of text to what an encoder of bert.py learns from. Masks are drawn
anew each time a row is read: RoBERTa's dynamic masking (Liu et al. 2019, section 4.1). Two other objectives
may be added to this loss: language/sentence_pairs.py and language/span_boundary.py.

    python -m language.masking                                  mask one sentence in each of the four ways
    python train.py --model bert --set masking=span             train with one of them

Units are int64 (B, T), counting up from 0 along each row.
Shapes: B rows, T tokens of a row, n masked tokens of a row, D model width, E embedding width, V vocabulary.
All randomness comes from the generator, a CPU one, so that the same state gives the same batch.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import data.text
from bert import BERT
from bert import Config as ModelConfig
from data.rows import Dataset, Row, stack
from data.tokenizer import Tokenizer
from data.wordpiece import WordPiece
from engine import contract
from formats import command
from formats.config_values import check_values
from language.encoder_inference import fill_every_tenth
from language.sentence_pairs import framed, in_two
from language.span_boundary import SpanBoundary, span_boundaries

MODEL = "bert"
TOKEN_LOSS = "mlm_loss"  # the nats per masked token, where the loss has other terms too
# Added to a tokenizer that lacks them, by their role.
SPECIAL_TOKENS = {
    "cls_token": "[CLS]",  # begins a row; its last hidden state stands for the whole text
    "sep_token": "[SEP]",  # ends each segment
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",  # not used here, but other programs pad with it
}


@dataclass(frozen=True)
class Config:
    masking: str = "token"  # units that are masked together: "token", "word", or "span" (SpanBERT)
    mask_rate: float = 0.15  # share of a row's text that is masked
    span_boundary: bool = False  # predict a masked token also from the ends of its span (SpanBERT)
    pair: str = "none"  # the objective on pairs of segments, which is the one that the model has a head for

    def __post_init__(self):
        check_values(self, masking=("token", "word", "span"))
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate {self.mask_rate}: expected between 0 and 1")

    def n_text(self, seq_len: int) -> int:
        """Return how many tokens of a row are text: all but [CLS] and the [SEP] of each segment."""
        return seq_len - (2 if self.pair == "none" else 3)

    def n_masked(self, seq_len: int) -> int:
        """Return how many tokens of a row of seq_len are masked, at most."""
        return max(1, round(self.mask_rate * self.n_text(seq_len)))


def each_token(tokens: Tensor) -> Tensor:
    """Return a unit for every token: (B, T) of tokens (B, T) (Devlin et al. 2018, section 3.1)."""
    return torch.arange(tokens.shape[1]).expand(tokens.shape)


def whole_words(continues: Tensor) -> Tensor:
    """Return words as units (B, T). continues (B, T), bool: the token continues the word of the one before.

    A row's first token always begins a word. BERT's second release (2019); Cui et al. 2019,
    arXiv:1906.08101, for Chinese.
    """
    begins = ~continues
    begins[:, 0] = True
    return begins.cumsum(1) - 1


def entities(words: Tensor, given: Tensor) -> Tensor:
    """Return units (B, T): given phrases and names, and words outside (ERNIE, Sun et al. 2019, section 3.2).

    given (B, T), int64: 0 outside, else a positive number, the same for consecutive tokens of one phrase. A
    phrase is a unit exactly as given; if it begins or ends within a word, the rest of that word is a unit.
    """
    before = given.roll(1, dims=1)  # column 0 gets the row's end, but it begins a unit in any case
    word_begins = words != words.roll(1, dims=1)
    begins = torch.where(given > 0, given != before, word_begins | (before > 0))
    return whole_words(~begins)


def spans(words: Tensor, generator: Generator, p: float = 0.2, longest: int = 10) -> Tensor:
    """Return units (B, T): spans of consecutive whole words (SpanBERT, Joshi et al. 2019, section 3.1).

    The length of a span in words is geometric, clipped: P(l) is proportional to (1 - p)^(l - 1) for l up to
    `longest`, with mean 3.8. SpanBERT draws starting points, passing over those already masked, and its spans
    may run into each other; here the row is cut into spans from end to end, so that they cannot overlap, and
    a span taken at random has the length drawn.

    Only a row's last span is cut short, by the row's end; a random offset would cut the first one too. It
    lowers the mean by the share 2.3 / T in a row of T words: 1.8 % at 128, 0.4 % at 512. A special token
    counts as a word here, and a span that meets one is shorter by it.
    """
    B, T = words.shape
    weights = (1 - p) ** torch.arange(longest)
    lengths = torch.multinomial(weights, B * T, replacement=True, generator=generator).view(B, T) + 1
    ends = lengths.cumsum(1).clamp(max=T)  # the word after each span; those past the row all fall on word T
    begins = torch.zeros(B, T + 1, dtype=torch.bool).scatter(1, ends, True)
    return begins.cumsum(1).gather(1, words)  # the span of each word, read by each token


def choose(units: Tensor, maskable: Tensor, n: int, generator: Generator) -> Tensor:
    """Return the tokens of units taken at random, at most n tokens a row: bool (B, T).

    maskable (B, T), bool: false for special tokens, which count in no unit and are never chosen. A unit is
    chosen whole or not at all. With units of one token, exactly n are chosen, or all if there are fewer. With
    larger ones a little of the budget may remain, and a row whose units all exceed n has none chosen.

    Units are taken in random order up to the first that does not fit; then the longest that still fits is
    taken until none does. BERT's code goes on in random order instead, which spends the rest of the budget on
    the shortest units: of spans drawn with a mean of 3.8 words, those that make up 15 % of 128 words then
    have 3.0. Taking the longest they have 3.4, just as SpanBERT's, whose last span is cut where the budget
    ends; in 512 words both have 3.7.

    The short pieces at a row's ends fit more often than the rest: spans mask the ends of 128 tokens up to a
    quarter more often, of 512 a twentieth. (SpanBERT masks a row's first word a third as often as others:
    only a span that starts there reaches it.)
    """
    B, T = units.shape
    order = torch.rand(B, T, generator=generator).argsort(1)
    sizes = torch.zeros(B, T, dtype=torch.int64).scatter_add(1, units, maskable.long()).gather(1, order)
    taken = sizes.cumsum(1) <= n
    while True:  # two or three times: little is left
        room = n - (sizes * taken).sum(1, keepdim=True)  # (B, 1)
        size, best = sizes.masked_fill(taken | (sizes > room), 0).max(1, keepdim=True)
        if not size.any():
            break
        taken |= (torch.arange(T) == best) & (size > 0)
    taken = torch.zeros_like(taken).scatter(1, order, taken)  # by unit, no longer by place in the order
    return taken.gather(1, units) & maskable


def corrupt(
    tokens: Tensor,
    chosen: Tensor,
    mask_id: int,
    ordinary: Tensor,
    generator: Generator,
    units: Tensor | None = None,
) -> Tensor:
    """Return inputs (B, T): of the chosen tokens, 80 % become mask_id, 10 % a random one of `ordinary` (ids,
    1-D), and 10 % stay as they are.

    The mask token does not occur when the model is used later. Because any token may have been replaced, the
    model has to represent all of them (Devlin et al. 2018, section 3.1). With units, one decision is made for
    each unit: a span is masked, replaced or kept as a whole (Joshi et al. 2019, section 3.1).
    """
    decision = torch.rand(tokens.shape, generator=generator)
    if units is not None:
        decision = decision.gather(1, units)
    random = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]
    corrupted = torch.where(decision < 0.9, random, tokens)
    corrupted = torch.where(decision < 0.8, mask_id, corrupted)
    return torch.where(chosen, corrupted, tokens)


def gather_masked(tokens: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return positions (B, n) of the chosen tokens, in order, and targets (B, n): the tokens (B, T) there.

    A row with fewer is filled with position 0 and target -100. The shape is fixed, so a model is compiled
    once, and its head, whose cost grows with the vocabulary, runs at these positions alone. Raises ValueError
    if a row has more than n.
    """
    B, T = tokens.shape
    count = chosen.sum(1, keepdim=True)  # (B, 1)
    if count.max() > n:
        raise ValueError(f"a row has {count.max()} chosen tokens: expected at most n = {n}")
    place = torch.where(chosen, chosen.cumsum(1) - 1, n)  # column n takes what is not chosen, and is dropped
    positions = torch.zeros(B, n + 1, dtype=torch.int64)
    positions = positions.scatter(1, place, torch.arange(T).expand(B, T))[:, :n]
    targets = torch.where(torch.arange(n) < count, tokens.gather(1, positions), -100)
    return positions, targets


def units_of(
    rows: Tensor, config: Config, generator: Generator, tokenizer: Tokenizer | WordPiece, given: Tensor | None
) -> Tensor:
    """Return the units (B, T) of rows (B, T) for config.masking. given (B, T): as for `entities`, or None."""
    if config.masking == "token" and given is None:
        return each_token(rows)
    units = whole_words(torch.from_numpy(tokenizer.continues_word)[rows])
    if given is not None:
        units = entities(units, given)
    return spans(units, generator) if config.masking == "span" else units


def make_batch(
    rows: list[Row], config: Config, generator: Generator, tokenizer: Tokenizer | WordPiece
) -> dict[str, Tensor]:
    """Return a batch of B rows of T tokens, with [CLS] and [SEP], from B windows of text.

    rows: "tokens" (T + 1,), and "entities" (T + 1,) where there are some: the number of the phrase or entity
    that a token belongs to, 0 for none; each is masked as a unit (ERNIE, Sun et al. 2019). The batch:

        "tokens" (B, T)                         corrupted
        "positions", "targets" (B, n)           the masked places in the flattened rows, and the tokens that
                                                stood there; -100 where a row has fewer
        "segments" (B, T), "pair_labels" (B,)   with a pair objective
        "left", "right", "place" (B, n)         with span_boundary: see language/span_boundary.py

    Raises ValueError for rows that are too short, or that have nothing to mask.
    """
    windows, batch = stack(rows), {}
    B, T = windows["tokens"].shape[0], windows["tokens"].shape[1] - 1
    N, n = config.n_text(T), config.n_masked(T)
    if N < 2:
        raise ValueError(f"rows of {T} tokens leave {N} for text; expected a --seq-len of at least 8")

    # Make rows of the text: [CLS] a [SEP], or with a pair objective [CLS] a [SEP] b [SEP].
    text, cut, labels = in_two(windows["tokens"][:, :N], config.pair, generator)
    original, place = framed(text, cut, T, tokenizer)
    if labels is not None:
        batch = {"pair_labels": labels, "segments": (torch.arange(T) > cut[:, None] + 1).long()}

    # Choose what is masked.
    special = torch.from_numpy(tokenizer.is_special)  # (V,)
    maskable = ~special[original]  # (B, T)
    if not maskable.any():
        raise ValueError("no token of this batch may be masked: it is all special tokens; give more text")
    given = windows.get("entities")
    if given is not None:
        given = torch.zeros_like(original).scatter(1, place, given[:, :N])
    units = units_of(original, config, generator, tokenizer, given)
    chosen = choose(units, maskable, n, generator)

    # Corrupt it, and keep the tokens that stood there as targets.
    ordinary = (~special).nonzero().flatten()
    together = units if config.masking == "span" else None
    batch["tokens"] = corrupt(original, chosen, tokenizer.mask_id, ordinary, generator, together)
    positions, batch["targets"] = gather_masked(original, chosen, n)
    first = torch.arange(0, B * T, T)[:, None]  # (B, 1): where each row begins among all tokens
    batch["positions"] = first + positions
    if config.span_boundary:
        left, right, place = (x.gather(1, positions) for x in span_boundaries(chosen))
        batch |= {"left": first + left, "right": first + right, "place": place}
    return batch


def split(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """Return the i-th of n equal parts of a batch, with places counted in the rows of this part."""
    first = batch["tokens"].numel() // n * i
    part = {name: t.chunk(n)[i] for name, t in batch.items()}
    return part | {name: part[name] - first for name in part.keys() & {"positions", "left", "right"}}


def wrap(model: BERT, config: Config) -> BERT:
    """Return the model, with a head for span boundaries where config has the objective.

    The head is left out of what is saved. Raises ValueError for a model without the head for tokens.
    """
    if not model.config.mlm_head:
        raise ValueError(
            "this checkpoint has no masked-language-model head; train.py --set mlm_head=True adds a new one"
        )
    if config.span_boundary:
        model.cls["span_boundary"] = SpanBoundary(model.config)
    if model.config.pooler and config.pair == "none":
        model.bert.pooler.requires_grad_(False)  # no loss depends on it, and ddp would wait for its gradient
    return model


def loss(model: BERT, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean nats per masked token, plus those of the other objectives in the batch, and metrics."""
    hidden = model.head_input(batch["tokens"], batch.get("segments"), cu_seqlens=batch.get("cu_seqlens"))
    targets = batch["targets"]  # (B, n)

    # Masked tokens. The head runs at the masked places alone: 15 percent of the work at all places.
    flat = hidden.flatten(0, 1)  # (B T, D)
    logits = model.logits(flat[batch["positions"]]).float()  # (B, n, V)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    metrics = {"accuracy": (logits.argmax(-1) == targets).sum() / (targets >= 0).sum()}
    if "left" in batch or "pair_labels" in batch:
        metrics["mlm_loss"] = total.detach()

    # The same tokens from the boundaries of their spans, by the same output matrix.
    if "left" in batch:
        x = model.cls.span_boundary(flat[batch["left"]], flat[batch["right"]], batch["place"])  # (B, n, E)
        logits = F.linear(x, model.head_weight, model.cls.predictions.bias).float()
        total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    # The pair of segments, from the first token of each row.
    if "pair_labels" in batch:
        pooled = model.pooled(hidden, batch.get("cu_seqlens"))  # (B, D)
        pair_logits = model.cls.seq_relationship(pooled).float()  # (B, 2)
        total = total + F.cross_entropy(pair_logits, batch["pair_labels"])
        metrics["pair_accuracy"] = (pair_logits.argmax(-1) == batch["pair_labels"]).float().mean()
    return total, metrics


def flops_per_token(model: BERT, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one token of a row of seq_len, forward and backward, see bert.py."""
    n = config.n_masked(seq_len)
    flops = model.flops_per_token(seq_len, n)
    if config.span_boundary:
        D, E, V = model.config.d_model, model.config.E, model.config.vocab_size
        flops += 6 * n * (3 * D * D + D * D + D * E + V * E) // seq_len
    return flops


def loss_bytes(
    model: BERT, config: Config, n: int, seq_len: int, precision: tuple[int, int, bool]
) -> dict[str, int]:
    """Return the memory of the heads for n tokens in rows of seq_len, as the fields of engine.memory.Loss.

    Forward keeps a log-softmax at each masked place, of which backward makes two more, and the inputs of the
    norms of embeddings and head. precision: (e, r, autocast) of engine/activations.py.
    """
    e, r, autocast = precision
    D, E, V = model.config.d_model, model.config.E, model.config.vocab_size
    n_logits = n // seq_len * config.n_masked(seq_len) * V * (1 + config.span_boundary)
    kept = 4 * n_logits + n * r * (E + D * model.config.pre_norm) + V * E * e * autocast
    n_head = V * E * any(p.requires_grad for p in model.cls.parameters())
    return {"kept": kept, "temporary": 8 * n_logits, "head": n_head, "tied": 2 * n_head}


def settings(model_config: ModelConfig) -> Config:
    """Return the default settings for a model: its pair objective is the one that it has a head for."""
    return Config(pair=model_config.pair)


def load_data(args: Namespace, model_config: ModelConfig) -> Dataset:
    """Return rows of the text of --data, and its tokenizer with SPECIAL_TOKENS.

    Of the held-out text only whole rows are kept: a shorter one might have no room for special tokens. Raises
    ValueError if there are none, and for --document-mask with a pair objective.
    """
    if args.document_mask and model_config.pair != "none":
        pair = model_config.pair
        raise ValueError(
            f"--document-mask separates what the pair objective {pair} joins; leave out one of them"
        )
    dataset = data.text.as_rows(contract.load_corpus(args), args.seq_len, only_whole=True)
    return replace(dataset, tokenizer=dataset.tokenizer.with_special_tokens(SPECIAL_TOKENS))


def show(model: BERT, dataset: Dataset, out: Path) -> str:
    """Return the beginning of the held-out text with every tenth token masked, and the best guesses there."""
    text = dataset.val.tokens[: min(80, model.config.max_seq_len - 2)].tolist()
    return fill_every_tenth(model, dataset.tokenizer, text)


def main() -> None:
    pieces = (
        "[CLS] the un ##sink ##able ship left south ##ampton for new york city on the ten ##th of april [SEP]"
    )
    pieces = pieces.split()
    continues = torch.tensor([[piece.startswith("##") for piece in pieces]])
    maskable = torch.tensor([[not piece.startswith("[") for piece in pieces]])
    given = torch.tensor([[0] * 10 + [1] * 3 + [0] + [2] * 5 + [0]])  # new york city, the tenth of april
    generator = torch.Generator().manual_seed(4)
    words = whole_words(continues)
    ways = {
        "each_token": each_token(words),
        "whole_words": words,
        "entities": entities(words, given),
        "spans": spans(words, generator),
    }
    for name, units in ways.items():
        chosen = choose(units, maskable, 5, generator)[0].tolist()
        row = ("_" * len(piece) if hidden else piece for piece, hidden in zip(pieces, chosen, strict=True))
        print(f"{name:12}", *row)


if __name__ == "__main__":
    command.run(main)
