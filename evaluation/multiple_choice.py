"""Multiple choice: of several continuations of a text, which one is likeliest by a model?

    L_i = log p(choice_i | context) = sum of log p over the tokens of choice_i

    acc               argmax_i  L_i                            favours short choices: each token lowers L_i
    acc_norm          argmax_i  L_i / characters of choice_i   the usual figure of HellaSwag and ARC
    acc_bytes         argmax_i  L_i / UTF-8 bytes of choice_i
    acc_tokens        argmax_i  L_i / tokens of choice_i       (GPT-3, Brown et al. 2020, section 2.4)
    acc_mutual_info   argmax_i  L_i - log p(choice_i)          (also section 2.4, with "Answer: " as the
                                                               context of the second term; here it has none)

The same model has a different accuracy by each rule, so a figure needs the name of its rule. The names, but
for acc_tokens, are those of lm-evaluation-harness (Biderman et al. 2024, arXiv:2405.14782). As there, the
space in front of a choice is scored, but does not count in the choice's characters and bytes.

Context and choice are tokenised together, so one token may span the border between the two. An item's context
is therefore taken to end where the tokens of its choices begin to differ from those of the context alone, and
all later tokens are scored. So the sums of all choices begin at the same place of the text. (The harness
splits each row at the number of tokens that the context alone has.) A text that is longer than the model
reads loses its beginning, which may hold solved examples; such items are counted. Log-likelihoods are the
same for every batch size (to 1e-6): rows are padded on the right, and no position depends on later ones.

    python -m evaluation.multiple_choice runs/gpt/model       five small questions by each rule

Shapes: B rows of a batch, T tokens, C contexts, n scored positions, D model width, V vocabulary, G key and
value heads of width K.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from formats import command
from formats.progress import progress_bar
from generate import KVCache

SHARED = 8  # a context of at least this many tokens is read once for all its rows, a shorter one with each
SIMILAR = 8  # contexts that are read in one pass differ in length by at most this many tokens
RULES = ("acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mutual_info")


class Item(NamedTuple):
    """A context, and several continuations of it to choose from, of which one is right."""

    context: str
    choices: tuple[str, ...]
    gold: int  # the position of the right choice
    delimiter: str = " "  # between context and choice
    group: str = ""  # items of one group, such as those about one passage, are not independent
    about: str = ""  # a line in front of all solved examples, such as MMLU's about the subject


class Row(NamedTuple):
    """A sequence of tokens, of which those from position `start` on are scored."""

    tokens: list[int]
    start: int  # the position of the first token to score, at least 1
    n_cut: int  # tokens that were cut off on the left


class Score(NamedTuple):
    """The log-likelihood of the tokens of a row that are scored."""

    log_p: float  # sum over the scored tokens, in nats
    n_tokens: int
    is_greedy: bool  # each scored token is the likeliest one, so greedy decoding would write them


@dataclass(frozen=True)
class Answer:
    """The scores of an item's choices, and the choice that each rule picks."""

    item: Item
    log_p: list[float]  # of each choice, in nats
    n_tokens: list[int]  # of each choice
    log_p_alone: list[float]  # of each choice without a context; empty where it was not computed
    n_cut: int  # tokens cut off on the left of the longest row
    picks: dict[str, int] = field(default_factory=dict)  # {rule: position of a choice}

    def is_right(self, rule: str) -> bool:
        """Return whether a rule picks the right choice."""
        return self.picks[rule] == self.item.gold


# --- log-likelihoods


def rows_of(tokenizer, context: str, continuations: Sequence[str], max_len: int) -> list[Row]:
    """Return a row for each continuation of a context, all scored from the same place of the text.

    max_len: the number of tokens that the model reads; a row may have one more, which is only predicted. A
    longer row loses its beginning. If the continuation alone is longer, only its end is scored. Raises
    ValueError for a continuation without a token.
    """
    # White space at the end of the context belongs to the choice: tokens often begin with it.
    kept = context.rstrip()
    continuations = [context[len(kept) :] + text for text in continuations]
    # The first token of a row is not predicted, so a text without a context begins with a token of its own.
    begin = tokenizer.begin_ids or ([] if kept else [tokenizer.eot_id])
    encoded = [[*begin, *tokenizer.encode(kept + text)] for text in continuations]

    # Scoring starts behind the tokens that all rows share with the context alone. It never starts before the
    # second token.
    alone = [*begin, *tokenizer.encode(kept)]
    start = max(1, min(n_shared(alone, tokens) for tokens in encoded))

    rows = []
    for text, tokens in zip(continuations, encoded, strict=True):
        if len(tokens) <= start:
            raise ValueError(
                f"choice {text[:60]!r} behind {context[-40:]!r}: no token to score; expected text"
            )
        n_cut = max(0, len(tokens) - max_len - 1)
        rows.append(Row(tokens[n_cut:], max(start - n_cut, 1), n_cut))
    return rows


def n_shared(a: list[int], b: list[int]) -> int:
    """Return the number of equal ids at the beginning of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class SharedContext:
    """Keys and values of C contexts, with which several continuations of each are read in one pass.

    It takes the place of `generate.KVCache` for two forward passes. The first reads the contexts (C, T) and
    keeps their keys and values. The second reads the continuations (B, T), each of which attends to its own
    context and to itself.
    """

    filled = False  # both passes are computed as that of prompts, not as steps of one token

    def __init__(self, context_of: Tensor):
        """context_of: the number (B,) of the context that each continuation follows."""
        self.context_of = context_of
        self.keys: dict[int, Tensor] = {}  # (C, T, G, K) by layer
        self.values: dict[int, Tensor] = {}
        self.length = 0

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions (1, T) of the next T tokens; all contexts have the same length."""
        return torch.arange(self.length, self.length + T, device=device)[None]

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Return the keys, values and mask by which a layer attends; keep those of the first pass."""
        if self.length == 0:
            self.keys[layer], self.values[layer] = k, v
            return k, v, mask
        # The causal mask needs no change: where `kernels.attention` has more keys than queries, the queries
        # stand at the last positions.
        context_k = self.keys[layer][self.context_of]  # (B, length of the contexts, G, K)
        context_v = self.values[layer][self.context_of]
        return torch.cat((context_k, k), dim=1), torch.cat((context_v, v), dim=1), mask

    def advance(self) -> None:
        """End a pass: what comes next stands behind the contexts."""
        self.length = self.keys[0].shape[1]


def hidden_behind(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Return the hidden states (n, D) that predict each row's scored tokens, reading each context once.

    All contexts are cut to the length of the shortest, and what stands behind the cut is read with each row.
    So the pass over the contexts has no padding, and needs no mask for it.
    """
    device = next(model.parameters()).device
    contexts = list(dict.fromkeys(tuple(row.tokens[: row.start]) for row in rows))
    number = {context: i for i, context in enumerate(contexts)}
    context_of = torch.tensor([number[tuple(row.tokens[: row.start])] for row in rows], device=device)
    cache, cut = SharedContext(context_of), min(map(len, contexts))
    read = torch.tensor([context[:cut] for context in contexts], device=device)  # (C, T)
    last = model.hidden(read, cache=cache)[context_of, -1:]  # (B, 1, D), predicts the first token behind

    inputs = [row.tokens[cut:-1] for row in rows]
    T = max(map(len, inputs))
    if T > 0:
        padded = torch.tensor([row + [0] * (T - len(row)) for row in inputs], device=device)  # (B, T)
        last = torch.cat((last, model.hidden(padded, cache=cache)), dim=1)  # (B, 1 + T, D)
    return [h[row.start - cut : len(row.tokens) - cut] for h, row in zip(last, rows, strict=True)]


def hidden_of_batch(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Return the hidden states (n, D) that predict each row's scored tokens, reading each row as a whole."""
    device, T = next(model.parameters()).device, max(len(row.tokens) - 1 for row in rows)
    padded = [row.tokens[:-1] + [0] * (T + 1 - len(row.tokens)) for row in rows]
    hidden = model.hidden(torch.tensor(padded, device=device))  # (B, T, D)
    return [h[row.start - 1 : len(row.tokens) - 1] for h, row in zip(hidden, rows, strict=True)]


@torch.no_grad()
def log_likelihoods(model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Score]:
    """Return the score of each row. Logits are computed only at the positions that are scored.

    The context of several rows, such as the choices of an item, is read once, and contexts of similar length
    are read in one pass. All other rows are read in padded batches of similar length.
    """
    # Group the rows by their context. A row whose context is short has a group of its own, by a key that no
    # context has; so has every row of a model whose cache SharedContext cannot replace.
    can_share = type(model.new_cache([1], 1)) is KVCache
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        shared = can_share and row.start >= SHARED
        by_context.setdefault(tuple(row.tokens[: row.start]) if shared else (-1, index), []).append(index)

    # Each batch is a function that computes hidden states, and the indices of its rows.
    groups = [members for members in by_context.values() if len(members) > 1]
    single = [members[0] for members in by_context.values() if len(members) == 1]
    single.sort(key=lambda index: -len(rows[index].tokens))
    batches = [(hidden_behind, members) for members in joined(groups, rows, batch_size)]
    starts = range(0, len(single), batch_size)
    batches += [(hidden_of_batch, single[first : first + batch_size]) for first in starts]

    scores: dict[int, Score] = {}
    for hidden_states, members in progress_bar(batches, "scoring", leave=False):
        batch = [rows[index] for index in members]
        logits = model.logits(torch.cat(hidden_states(model, batch))).float()  # (n, V), n of the whole batch
        targets = [token for row in batch for token in row.tokens[row.start :]]
        log_p, greedy = score_targets(logits, torch.tensor(targets, device=logits.device))
        lengths = [len(row.tokens) - row.start for row in batch]
        for index, values, flags in zip(members, log_p.split(lengths), greedy.split(lengths), strict=True):
            scores[index] = Score(values.double().sum().item(), len(values), bool(flags.all()))
    return [scores[index] for index in range(len(rows))]


def joined(groups: list[list[int]], rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Return batches of rows, each made of groups whose contexts differ by at most SIMILAR tokens.

    groups: the indices of the rows with the same context. A group is not divided, so a single one may be
    larger than batch_size. Groups whose longest rows are about equal come together: there is little padding.
    """
    batches: list[list[int]] = []
    for members in sorted(groups, key=lambda members: -max(len(rows[i].tokens) for i in members)):
        larger = [*batches[-1], *members] if batches else []
        starts = [rows[i].start for i in larger]
        if larger and max(starts) - min(starts) <= SIMILAR and len(larger) <= batch_size:
            batches[-1] = larger
        else:
            batches.append(list(members))
    return batches


def score_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p (n,) of the targets (n,) by logits (n, V), and bool (n,): is the target the likeliest?"""
    log_p = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return log_p, logits.argmax(-1) == targets


# --- picking a choice


def answer_items(
    model: nn.Module, tokenizer, items: Sequence[Item], batch_size: int = 16, alone: bool = True
) -> list[Answer]:
    """Return the answer of a model to each item.

    alone: also score the choices without a context. Raises ValueError for an empty choice.
    """
    # The rows of an item: each choice with the context, and without one.
    in_context, out_of_context, max_len = [], [], model.config.max_seq_len
    for item in items:
        if "" in item.choices:
            raise ValueError(f"choices {item.choices} behind {item.context[-40:]!r}: expected text in each")
        texts = [item.delimiter + choice for choice in item.choices]
        in_context.append(rows_of(tokenizer, item.context, texts, max_len))
        out_of_context.append(rows_of(tokenizer, "", texts, max_len) if alone else [])

    # The rows of all items are scored together, which makes the best batches. The scores have their order.
    pairs = list(zip(in_context, out_of_context, strict=True))
    rows = [row for pair in pairs for part in pair for row in part]
    scores = iter(log_likelihoods(model, rows, batch_size))
    answers = []
    for item, (own, alone_rows) in zip(items, pairs, strict=True):
        found, log_p_alone = [next(scores) for _ in own], [next(scores).log_p for _ in alone_rows]
        n_cut = max(row.n_cut for row in own)
        log_p, n_tokens = [score.log_p for score in found], [score.n_tokens for score in found]
        picks = pick(item.choices, log_p, n_tokens, log_p_alone)
        answers.append(Answer(item, log_p, n_tokens, log_p_alone, n_cut, picks))
    return answers


def pick(
    choices: Sequence[str], log_p: list[float], n_tokens: list[int], log_p_alone: list[float]
) -> dict[str, int]:
    """Return {rule: the position of the choice that it picks}; of equally good choices the first.

    log_p, n_tokens, log_p_alone: of each choice, as in Answer. If log_p_alone is empty, the rule
    acc_mutual_info is missing.
    """
    values = {
        "acc": log_p,
        "acc_norm": [x / len(text) for x, text in zip(log_p, choices, strict=True)],
        "acc_bytes": [x / len(text.encode()) for x, text in zip(log_p, choices, strict=True)],
        "acc_tokens": [x / n for x, n in zip(log_p, n_tokens, strict=True)],
    }
    if log_p_alone:
        values["acc_mutual_info"] = [x - y for x, y in zip(log_p, log_p_alone, strict=True)]
    return {rule: max(range(len(x)), key=x.__getitem__) for rule, x in values.items()}


# --- figures


def standard_error(values: Sequence[float], groups: Sequence[str] = ()) -> float:
    """Return the standard error of the mean, sample standard deviation / sqrt(n); nan for one value or group.

    groups: the group of each value. The deviations from the mean are first summed within each group, so
    values of a group may depend on each other (cluster-robust). A value of group "" is a group by itself.
    """
    n, mean = len(values), sum(values) / len(values)
    sums: dict[str | int, float] = defaultdict(float)
    for i, value in enumerate(values):
        sums[(groups[i] if groups else "") or i] += value - mean
    if len(sums) < 2:
        return math.nan
    return math.sqrt(sum(x * x for x in sums.values()) * len(sums) / (len(sums) - 1)) / n


def accuracy(answers: Sequence[Answer], rule: str) -> tuple[float, float]:
    """Return the share of right answers by a rule, and its standard error."""
    right = [float(answer.is_right(rule)) for answer in answers]
    return sum(right) / len(right), standard_error(right, [answer.item.group for answer in answers])


def compare(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of b - a over the same items, its standard error, and McNemar's exact p-value.

    a, b: 1 for a right answer, else 0. The p-value is for the null hypothesis that both models are equally
    good: each item that only one of them has right is then a toss of a fair coin, and the other items do
    not count (McNemar 1947).
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    # The probability of a result at least as uneven as k heads among n tosses, on either side.
    n, k = sum(d != 0 for d in differences), sum(d > 0 for d in differences)
    tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1))
    p = min(1.0, 2 * tail / 2**n)
    return sum(differences) / len(differences), standard_error(differences), p


def chance(items: Sequence[Item]) -> float:
    """Return the expected accuracy of random choices: the mean over items of 1 / number of choices."""
    return sum(1 / len(item.choices) for item in items) / len(items)


# --- a model, and the command


def load(directory: str | Path) -> tuple[nn.Module, Any]:
    """Return the model in a directory, in float32 and on the GPU if there is one, and its tokenizer.

    Raises ValueError for a model that does not predict the next token, and for a tokenizer with more tokens
    than the model has.
    """
    from data.tokenizer import get_tokenizer
    from formats.open_model import open_model

    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: no such directory; expected that of a model")
    tokenizer = get_tokenizer(str(directory))
    model = open_model(directory).float().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(model, "new_cache"):
        raise ValueError(f"{directory}: expected a decoder, which predicts the next token")
    if tokenizer.n_vocab > model.config.vocab_size:
        sizes = f"{tokenizer.n_vocab} tokens, the model has {model.config.vocab_size}"
        raise ValueError(f"{directory}: the tokenizer has {sizes}; they do not belong together")
    return model, tokenizer


EXAMPLES = [
    Item("import", ("os", "return", "True", "])"), 0),
    Item("def __init__(self, name):\n        self.name =", ("name", "import", "except KeyError", "["), 0),
    Item("for i in", ("range(10):", "a b c:", "import os:", "), ("), 0),
    Item("try:\n    x = d[key]\nexcept", ("KeyError:", "for:", "x = d:", "self, name:"), 0),
    Item('"""Return the number of', ("bytes read.", "raise.", "== 0:", "def."), 0),
]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Answer five small questions about Python by each rule.")
    parser.add_argument("model", type=command.path, help="directory of a decoder, or of an adapter")
    model, tokenizer = load(parser.parse_args(argv).model)
    answers = answer_items(model, tokenizer, EXAMPLES)
    for answer in answers:
        print(f"\n{answer.item.context}")
        for i, choice in enumerate(answer.item.choices):
            rules = ", ".join(rule for rule in RULES if answer.picks[rule] == i)
            print(f"  {answer.log_p[i]:8.2f} nats, {answer.n_tokens[i]} tokens  {choice:20} {rules}")
    print()
    for rule in RULES:
        value, error = accuracy(answers, rule)
        print(f"{rule:16} {value:.2f} ± {error:.2f}   (chance {chance(EXAMPLES):.2f})")


if __name__ == "__main__":
    command.run(main)
