"""Span corruption: parts of a text are cut out, and an encoder-decoder writes them (T5, Raffel et al. 2019).

    text      Thank you for inviting me to your party last week .
    input     Thank you <X> me to your party <Y> week .        each gap is one sentinel token
    target    <X> for inviting <Y> last                        each sentinel, and what was there

The loss is that of t5.py, over the target. The target is short, so a step is cheap: for a text of 568
tokens the encoder reads 512 and the decoder writes 114, with sentinels and end tokens. (In the paper's figure
2 one more sentinel ends the target; in its code, and here, the end token does.) Tables 3 to 7 of the paper
compare this with other ways to make an input and a target of a text:

    replace_spans      15 % of the tokens, in spans of mean length 3: T5's own ("random spans")
    replace_tokens     tokens chosen one by one ("i.i.d. noise, replace spans"); neighbours share a sentinel
    drop_tokens        tokens chosen one by one, and no sentinels ("i.i.d. noise, drop tokens")
    bert_style         90 % of the chosen tokens become a mask, 10 % a random token; the target is the text
    mass_style         all chosen tokens become a mask; the target is the text (simpler than Song et al. 2019)
    deshuffle          the input is the text in random order, the target is the text (Liu et al. 2019)
    prefix_lm          the text is cut at a random place: the input is the first part, the target the second

    python -m language.span_corruption                                each of them on one sentence
    python train.py --model t5 --set objective=deshuffle              train with one of them

All randomness comes from `generator`, on the CPU, so that the same state gives the same batch.
Shapes: B rows, N tokens of a text, S of an input, T of a target.
"""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import data.text
from data.rows import Dataset, Row, stack
from engine import contract
from engine.settings import with_fields
from formats import command
from formats.config_values import check_values

MODEL = "t5"
OPTIMIZER, STEPS = "muon", 1600
N_SENTINELS = 100
SENTINELS = [f"<extra_id_{i}>" for i in range(N_SENTINELS)]  # in T5 the first has the last id
OBJECTIVES = (
    "replace_spans", "replace_tokens", "drop_tokens", "bert_style", "mass_style", "deshuffle", "prefix_lm",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    objective: str = "replace_spans"
    noise_rate: float = 0.15  # share of a text's tokens that are cut out
    mean_span: float = 3.0  # tokens per span

    def __post_init__(self):
        check_values(self, objective=OBJECTIVES)
        if not 0 < self.noise_rate < 1:
            raise ValueError(f"noise_rate {self.noise_rate}: expected between 0 and 1")
        if self.mean_span < 1:
            raise ValueError(f"mean_span {self.mean_span}: expected at least 1")


def n_noise(n: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return how many of n tokens are cut out, and in how many spans, each at least 1.

    Halves are rounded to even, as in T5's code. At least as many tokens remain as there are spans. Raises
    ValueError for n below 2.
    """
    if n < 2:
        raise ValueError(f"span corruption: a text of {n} tokens: expected at least 2, of which one remains")
    noise = min(max(round(n * rate), 1), n - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, n - noise)


def corrupted_lengths(n: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Return the lengths (S, T) of input and target of a text of n tokens, with the end token of each."""
    noise, n_spans = n_noise(n, rate, mean_span)
    return n - noise + n_spans + 1, noise + n_spans + 1


def text_length(S: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
    """Return the most tokens of a text whose input has S tokens at most: 568 for 512. Raises ValueError where
    no text is short enough."""
    n = 2
    if corrupted_lengths(n, rate, mean_span)[0] > S:
        raise ValueError(f"span corruption: inputs of {S} tokens: expected at least 3")
    while corrupted_lengths(n + 1, rate, mean_span)[0] <= S:
        n += 1
    return n


def expected_lengths(n: int, config: Config) -> tuple[int, int]:
    """Return the mean lengths (S, T) of input and target of a text of n tokens, with end tokens."""
    noise, n_gaps = round(n * config.noise_rate), expected_gaps(n, config)
    match config.objective:
        case "replace_spans":
            return corrupted_lengths(n, config.noise_rate, config.mean_span)
        case "replace_tokens":
            return n - noise + n_gaps + 1, noise + n_gaps + 1
        case "drop_tokens":
            return n - noise + 1, noise + 1
        case "prefix_lm":
            return n // 2 + 1, n - n // 2 + 1
    return n + 1, n + 1


def expected_gaps(n: int, config: Config) -> int:
    """Return the mean number of gaps with a sentinel in a text of n tokens, 0 for objectives without them."""
    if config.objective == "replace_spans":
        return n_noise(n, config.noise_rate, config.mean_span)[1]
    independent = round(n * config.noise_rate * (1 - config.noise_rate))  # chosen, after one that is not
    return max(1, independent) if config.objective == "replace_tokens" else 0


def composition(total: int, n: int, generator: Generator) -> Tensor:
    """Return n lengths of at least 1 that add up to total, (n,): each way to divide it is equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: n - 1].sort().values + 1
    ends = torch.cat((cuts.new_zeros(1), cuts, cuts.new_tensor([total])))
    return ends.diff()


def spans(n: int, generator: Generator, rate: float = 0.15, mean_span: float = 3.0) -> Tensor:
    """Return which of n tokens are cut out, bool (n,): spans that stay and spans that are cut out, in turn.

    A text begins with a span that stays and ends with one that is cut out: the first token is never cut out,
    and the last always is (t5/data/preprocessors.py, random_spans_noise_mask).
    """
    noise, n_spans = n_noise(n, rate, mean_span)
    lengths = torch.stack(
        (composition(n - noise, n_spans, generator), composition(noise, n_spans, generator)), dim=1
    )  # (spans, 2): tokens that stay, tokens that are cut out
    return (torch.arange(2 * n_spans) % 2 == 1).repeat_interleave(lengths.flatten())


def single_tokens(n: int, generator: Generator, rate: float = 0.15) -> Tensor:
    """Return which of n tokens are cut out, bool (n,): each with the probability rate, but at least one."""
    draws = torch.rand(n, generator=generator)
    return draws <= max(rate, float(draws.min()))


def marks(gone: Tensor, sentinels: Tensor) -> Tensor:
    """Return (N,): sentinels[i] where the i-th run of gone tokens, bool (N,), begins, and -1 elsewhere.

    Raises ValueError for more runs than there are sentinels.
    """
    begins = gone & ~torch.cat((gone.new_zeros(1), gone[:-1]))
    run = begins.cumsum(0) - 1
    if run[-1] >= len(sentinels):
        raise ValueError(f"span corruption: {run[-1] + 1} gaps in a text: expected at most {len(sentinels)}")
    return torch.where(begins, sentinels[run.clamp(min=0)], -1)


def replace_noise(tokens: Tensor, gone: Tensor, sentinels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (input, target) of tokens (N,), of which gone, bool (N,), are cut out.

    The i-th gap of the input is sentinels[i]; the target has, gap by gap, this sentinel and the tokens.
    """
    mark = marks(gone, sentinels)
    text = torch.where(mark >= 0, mark, tokens)[(mark >= 0) | ~gone]
    target = torch.stack((mark, torch.where(gone, tokens, -1)), dim=1).flatten()  # (N, 2) -> (2 N,)
    return text, target[target >= 0]


def gaps(target: list[int], sentinels: set[int]) -> dict[int, list[int]]:
    """Return {sentinel: the tokens behind it} of a target. Tokens before the first sentinel are left out."""
    found: dict[int, list[int]] = {}
    last = None
    for token in target:
        if token in sentinels:
            last = found.setdefault(token, [])
        elif last is not None:
            last.append(token)
    return found


def restore(text: list[int], target: list[int], sentinels: set[int]) -> list[int]:
    """Return the tokens of an input with each sentinel replaced by the tokens that the target has for it."""
    found = gaps(target, sentinels)
    return [t for token in text for t in (found.get(token, []) if token in sentinels else [token])]


def drop_noise(tokens: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return (input, target): the tokens (N,) that stay, and those that are gone."""
    return tokens[~gone], tokens[gone]


def mask_noise(
    tokens: Tensor, gone: Tensor, mask_id: int, ordinary: Tensor, generator: Generator, random: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return (input, target): tokens (N,) in which each that is gone became mask_id or, with the probability
    `random`, one of `ordinary` (ids, 1-D); and the tokens themselves."""
    other = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]
    is_random = torch.rand(tokens.shape, generator=generator) < random
    return torch.where(gone, torch.where(is_random, other, mask_id), tokens), tokens


def deshuffle(tokens: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return (input, target): tokens (N,) in random order, and in their own."""
    return tokens[torch.randperm(len(tokens), generator=generator)], tokens


def prefix_lm(tokens: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return (input, target): the first 1 to N - 1 tokens, each number equally likely, and the rest."""
    n = int(torch.randint(1, len(tokens), (), generator=generator))
    return tokens[:n], tokens[n:]


def corrupt(
    tokens: Tensor, config: Config, generator: Generator, sentinels: Tensor, ordinary: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (input, target) of tokens (N,), N at least 2, by config.objective, both without an end token.

    ordinary: the ids that may take the place of a token in "bert_style". The mask is the first sentinel.
    """
    rate, name, n = config.noise_rate, config.objective, len(tokens)
    if name == "replace_spans":
        return replace_noise(tokens, spans(n, generator, rate, config.mean_span), sentinels)
    if name == "deshuffle":
        return deshuffle(tokens, generator)
    if name == "prefix_lm":
        return prefix_lm(tokens, generator)
    gone = single_tokens(n, generator, rate)
    if name == "replace_tokens":
        return replace_noise(tokens, gone, sentinels)
    if name == "drop_tokens":
        return drop_noise(tokens, gone)
    random = 0.1 if name == "bert_style" else 0.0
    return mask_noise(tokens, gone, int(sentinels[0]), ordinary, generator, random)


# --- the task of t5.py


def sentinel_ids(tokenizer) -> Tensor:
    """Return the ids of the sentinels, the first gap's first, (100,). Raises ValueError if there are none."""
    missing = [name for name in SENTINELS if name not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"the tokenizer has no {missing[0]}; expected {SENTINELS[0]} to {SENTINELS[-1]}")
    return torch.tensor([tokenizer.special_tokens[name] for name in SENTINELS])


def padded(rows: list[Tensor], value: int) -> Tensor:
    """Return rows (n_i,) as one tensor (B, largest n), with the value behind those that are shorter."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def make_batch(rows: list[Row], config: Config, generator: Generator, tokenizer) -> dict[str, Tensor]:
    """Return a batch of B texts {"tokens": (N,)}: "tokens" (B, S), inputs, and "targets" (B, T), -100 behind
    the end of a shorter one; "lengths" (B,), of the inputs, where they differ."""
    end, special = torch.tensor([tokenizer.eot_id]), torch.from_numpy(tokenizer.is_special)
    sentinels, ordinary = sentinel_ids(tokenizer), (~special).nonzero().flatten()
    pairs = [corrupt(text, config, generator, sentinels, ordinary) for text in stack(rows)["tokens"].long()]
    inputs, targets = ([torch.cat((part, end)) for part in side] for side in zip(*pairs, strict=True))
    batch = {"tokens": padded(inputs, tokenizer.pad_id), "targets": padded(targets, -100)}
    lengths = torch.tensor([len(row) for row in inputs])
    return batch if lengths.min() == lengths.max() else batch | {"lengths": lengths}


def settings(model_config) -> Config:
    """Return the default settings, for any model."""
    return Config()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the model's own loss: mean nats per token of the targets."""
    return model.loss(batch)


def flops_per_token(model: nn.Module, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on a text, input and target, divided by seq_len."""
    S, T = expected_lengths(text_length(seq_len), config)
    return model.flops_per_token(S, T) * S // seq_len


def load_data(args: Namespace, model_config) -> Dataset:
    """Return texts of --data whose inputs have --seq-len tokens by T5's own objective, and the tokenizer with
    a padding token and 100 sentinels, of which the first has the last id, as in T5.

    A text is a window of the corpus, in which an end token separates documents. Raises ValueError for
    --document-mask, for --seq-len below 3, for more gaps than sentinels, and where an input or a target may
    be longer than a model with absolute positions reads (BART).
    """
    if args.document_mask:
        raise ValueError(
            "--document-mask: an input and its target are one text; leave it out with --model t5"
        )
    n, config = text_length(args.seq_len), with_fields(Config(), args.set)
    n_gaps = expected_gaps(n, config)
    if config.objective == "replace_tokens":
        n_gaps += round(6 * n_gaps**0.5)  # fewer than one text in a million has more
    if n_gaps > N_SENTINELS:
        raise ValueError(
            f"--seq-len {args.seq_len}: up to {n_gaps} gaps in a text with objective={config.objective} and "
            f"noise_rate={config.noise_rate}, and there are {N_SENTINELS} sentinels; lower one of them"
        )
    # A model with absolute positions reads and writes at most --seq-len tokens.
    longest = n + 1  # the text and its end token
    if config.objective == "replace_spans":
        longest = max(corrupted_lengths(n, config.noise_rate, config.mean_span))
    if getattr(model_config, "positions", None) == "absolute" and longest > args.seq_len:
        raise ValueError(
            f"--set objective={config.objective} noise_rate={config.noise_rate}: up to {longest} tokens of a "
            f"text of {n}, and this model reads at most --seq-len {args.seq_len}; use --model t5"
        )
    dataset = data.text.as_rows(contract.load_corpus(args), n - 1, only_whole=True)
    tokenizer = dataset.tokenizer.with_special_tokens({"pad_token": "<pad>"}, reversed(SENTINELS))
    return replace(dataset, tokenizer=tokenizer)


def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return the share of the gaps of 16 held-out texts that the model fills right, beside the share that is
    right with the commonest gap of 256 training texts in all of them; and the first text with its gaps.

    The gaps are those of T5's own objective, also for a model that was trained with another one.
    """
    tokenizer, generator = dataset.tokenizer, torch.Generator().manual_seed(0)
    sentinels = sentinel_ids(tokenizer)
    known = set(sentinels.tolist())

    def cut(rows, n: int) -> list[tuple[list[int], list[int]]]:
        """Return (input, target) of the first n texts."""
        texts = [torch.from_numpy(rows[i]["tokens"]).long() for i in range(min(n, len(rows)))]
        pairs = [replace_noise(text, spans(len(text), generator), sentinels) for text in texts]
        return [(text.tolist(), target.tolist()) for text, target in pairs]

    # The commonest gap, and what the model writes.
    seen = Counter(
        tuple(gap) for _, target in cut(dataset.train, 256) for gap in gaps(target, known).values()
    )
    common = list(seen.most_common(1)[0][0])
    pairs = cut(dataset.val, 16)
    inputs = [[*text, tokenizer.eot_id] for text, _ in pairs]
    longest = max(len(target) for _, target in pairs) + 1
    outputs = [gaps(output, known) for output in model.generate(inputs, longest, temperature=0)]

    # Count the gaps that are right, and write the first text with its gaps.
    truths, end = [gaps(target, known) for _, target in pairs], tokenizer.eot_id
    filled = [
        {mark: [t for t in output.get(mark, []) if t != end] for mark in truth}
        for output, truth in zip(outputs, truths, strict=True)
    ]
    n_gaps = sum(map(len, truths))
    right = sum(one[mark] == truth[mark] for one, truth in zip(filled, truths, strict=True) for mark in truth)
    trivial = sum(gap == common for truth in truths for gap in truth.values())
    lines = [
        f"{right / n_gaps:.1%} of {n_gaps} gaps are right; with {tokenizer.decode(common)!r}, the commonest "
        f"gap of the training texts, in all of them it would be {trivial / n_gaps:.1%}",
        "",
    ]
    for mark, gap in truths[0].items():
        guess, truth = (repr(tokenizer.decode(tokens)) for tokens in (filled[0][mark], gap))
        lines.append(f"{tokenizer.decode([mark])}  {guess}" + ("" if guess == truth else f"  was  {truth}"))
    return "\n".join([*lines, "", tokenizer.decode(inputs[0][:-1])])


def main() -> None:
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    names = [*words, "<X>", "<Y>", "<Z>", "<W>", "apple"]
    tokens, sentinels = torch.arange(len(words)), torch.arange(len(words), len(words) + 4)
    for name in OBJECTIVES:
        generator = torch.Generator().manual_seed(2)
        config = Config(name, noise_rate=0.3, mean_span=1.5)
        text, target = corrupt(tokens, config, generator, sentinels, torch.tensor([len(names) - 1]))
        print(f"{name:15} ", *(names[t] for t in text), "\n                ", *(names[t] for t in target))


if __name__ == "__main__":
    command.run(main)
