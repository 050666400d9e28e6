"""Speculative decoding: a cheap draft guesses several tokens, and the model checks all of them in one pass.

    x_i ~ q_i,  i = 1 ... g     the draft's guesses, each drawn from its distribution at that place
    p_1 ... p_{g+1}             the model's, there and at the next place, from one pass over the guesses
    accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), one after the other
    at the first refusal draw from (p_i - q_i)+, normalised; if all are accepted, draw one more from p_{g+1}

The text has exactly the distribution of the model's own, whatever the draft is: token x is a guess that is
accepted with probability min(p(x), q(x)), and comes from a refusal with the rest, p(x) - min(p(x), q(x))
(Leviathan et al. 2023, section 2.3 and appendix A.1; Chen et al. 2023). At temperature 0 it is the text of
the model alone, except where rounding decides between two logits that are almost equal. If guesses are
accepted independently with probability a, a pass yields on average

    (1 - a^(g+1)) / (1 - a)        tokens, at the cost of one pass of the model and g of the draft

A pass over a few tokens takes hardly longer than over one, because both wait for the weights. The drafts:

    DraftModel    a smaller model with the same vocabulary
    Lookup        copies what followed the last few tokens when they occurred before: for texts that repeat
                  themselves (prompt look-up, Saxena 2023)
    Heads         the model's own further heads: see multi_token.py

    python -m language.speculative runs/10m/model --draft runs/gpt/model --prompt "def "
    python -m language.speculative runs/gpt/model --lookup --prompt "def "

Shapes: B rows, T tokens of a pass, g guesses, D model width, V vocabulary.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import generate as decoding
from formats import command
from kernels import few_rows
from language.rewinding import Rewindable

# --- drafts


class Proposal(NamedTuple):
    """The guesses of a draft, for one pass of the model."""

    tokens: Tensor  # int64 (B, g)
    q: Tensor  # (B, g, V), the probabilities from which they were drawn
    counts: Tensor  # int64 (B,), how many of a row's tokens are guesses; those after them are padding


class Draft(Protocol):
    """The functions that a draft must have."""

    vocab_size: int

    def target(self, model: nn.Module) -> "Rewindable":
        """Return the model with a cache that can go back. The draft may add to it what its guesses need."""

    def begin(self, prompts: list[list[int]], n_new: int, target: nn.Module) -> None:
        """Read the prompts. n_new: tokens that may follow, guesses included. target: has read the prompts."""

    def propose(self, texts: list[list[int]], n: int, law: Callable, generator: Generator | None) -> Proposal:
        """Return at most n guesses of what follows each text. law: from logits (..., V) to probabilities."""


class DraftModel:
    """The draft is a smaller and so faster model of the same vocabulary."""

    target = staticmethod(Rewindable)

    def __init__(self, model: nn.Module):
        self.model, self.vocab_size = model, model.config.vocab_size

    def begin(self, prompts: list[list[int]], n_new: int, target: nn.Module) -> None:
        self.faster = few_rows.arrange(Rewindable(self.model), len(prompts), n_new)
        hidden, self.cache = decoding.read_prompts(self.faster, prompts, n_new, static=False)
        self.device = hidden.device

    def propose(self, texts: list[list[int]], n: int, law: Callable, generator: Generator | None) -> Proposal:
        # The draft has not read the last token of each text. Where all its guesses were accepted it has not
        # read the last guess either, because it drew that one in its last pass.
        cache = self.cache
        read = [min(n, len(text) - 1) for n, text in zip(cache.lengths, texts, strict=True)]
        missing = max(len(text) - n for n, text in zip(read, texts, strict=True))
        cache.go_back([len(text) - missing for text in texts])
        tokens = torch.tensor([text[-missing:] for text in texts], device=self.device)
        guesses, q = [], []
        for _ in range(n):
            hidden = self.faster.hidden(tokens, cache=cache)[:, -1]  # (B, D)
            q.append(law(self.faster.logits(hidden)))
            tokens = few_rows.draw(q[-1], generator)
            guesses.append(tokens)
        return Proposal(torch.cat(guesses, 1), torch.stack(q, 1), torch.full_like(tokens[:, 0], n))


class Lookup:
    """The draft copies the tokens that followed when the last tokens of the text occurred in it before."""

    target = staticmethod(Rewindable)

    def __init__(self, vocab_size: int, longest: int = 3):
        """longest: last tokens that are looked up. If they did not occur, fewer are tried, down to one."""
        self.vocab_size, self.longest = vocab_size, longest

    def begin(self, prompts: list[list[int]], n_new: int, target: nn.Module) -> None:
        self.device = next(target.parameters()).device
        # For each row the place after the latest occurrence of each n-gram, and how many tokens were read.
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        self.n_read = [1] * len(prompts)

    def propose(self, texts: list[list[int]], n: int, law: Callable, generator: Generator | None) -> Proposal:
        found = [self.copy(row, text, n) for row, text in enumerate(texts)]
        counts, width = [len(guess) for guess in found], max(map(len, found))
        tokens = torch.tensor([guess + [0] * (width - len(guess)) for guess in found], device=self.device)
        tokens = tokens.long().view(len(texts), width)
        q = F.one_hot(tokens, self.vocab_size).float()  # a copy is drawn with probability 1
        return Proposal(tokens, q, torch.tensor(counts, device=self.device))

    def copy(self, row: int, text: list[int], n: int) -> list[int]:
        """Return the n tokens that followed the end of the text where it last occurred before, or none."""
        places, sizes = self.places[row], range(self.longest, 0, -1)
        for end in range(self.n_read[row], len(text)):
            places.update({tuple(text[end - size : end]): end for size in sizes if size <= end})
        self.n_read[row] = len(text)
        place = next((places[end] for size in sizes if (end := tuple(text[-size:])) in places), None)
        if place is None:
            return []
        # A copy that reaches the end of the text goes on with the tokens that it has copied.
        guess = list(text)
        for i in range(place, place + n):
            guess.append(guess[i])
        return guess[len(text) :]


# --- the law: the probabilities from which a token is drawn


def law(logits: Tensor, temperature: float, **cuts) -> Tensor:
    """Return the probabilities (..., V) with which `generate.sample` draws tokens, from logits (..., V).

    cuts: top_k, top_p and min_p, as in `generate.likely`. Raises ValueError for logits that are not finite.
    """
    rows = logits.flatten(0, -2).float()
    decoding.check_finite(rows)
    if temperature < 1e-30:
        return F.one_hot(rows.argmax(dim=-1), rows.shape[-1]).float().view(logits.shape)
    return decoding.likely(rows, temperature, **cuts).view(logits.shape)


def accept(p: Tensor, proposal: Proposal, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return how many guesses of each row are accepted, int64 (B,), and the token after them, int64 (B, 1).

    p: (B, g + 1, V), the model's probabilities at the places of the guesses, and at the next place.
    """
    tokens, q, counts = proposal
    B, g = tokens.shape
    of_p, of_q = (x.gather(2, tokens[:, :, None])[:, :, 0] for x in (p[:, :g], q))  # (B, g)
    u = torch.rand(B, g, dtype=torch.float64, device=p.device, generator=generator)
    passed = (u * of_q < of_p) & (torch.arange(g, device=p.device) < counts[:, None])
    n = passed.long().cumprod(dim=1).sum(dim=1)  # (B,), up to the first refusal

    # The token after them is drawn from (p - q)+ if the next guess was refused, else from p. Where p and q
    # are equal up to rounding, (p - q)+ may be 0 everywhere: then too it is drawn from p.
    rows = torch.arange(B, device=p.device)
    p_behind, refused = p[rows, n], n < counts
    q_behind = F.pad(q, (0, 0, 0, 1))[rows, n] * refused[:, None]
    rest = (p_behind - q_behind).clamp(min=0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p_behind)
    return n, few_rows.draw(rest, generator)


@dataclass
class Counts:
    """Counts of passes, tokens and accepted guesses, over all rows."""

    passes: int = 0  # passes of the model after the prompts; one over B unfinished rows counts B times
    tokens: int = 0  # tokens that these passes gave
    tested: int = 0  # guesses that were accepted, or the first of their pass to be refused
    accepted: int = 0  # guesses

    def add(self, accepted: Tensor, given: Tensor, new: list[list[int]]) -> None:
        """Add a pass in which `accepted` (B,) of the `given` (B,) guesses were, and rows got new tokens."""
        for k, g, tokens in zip(accepted.tolist(), given.tolist(), new, strict=True):
            if tokens:
                self.passes, self.tokens = self.passes + 1, self.tokens + len(tokens)
                self.accepted, self.tested = self.accepted + k, self.tested + min(k + 1, g)

    @property
    def acceptance(self) -> float:
        """Return the share of accepted guesses among those tested: a in the header."""
        return self.accepted / max(1, self.tested)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)


def expected_tokens(a: float, g: int) -> float:
    """Return the tokens per pass with g guesses that are accepted with probability a: see the header."""
    return float(sum(a**i for i in range(g + 1)))


def penalised(logits: Tensor, texts: list[list[int]], guesses: Tensor, penalty: float) -> Tensor:
    """Return logits (B, g + 1, V), penalised at each place for the tokens of the text and guesses before."""
    if penalty == 1.0:
        return logits
    seen = decoding.tokens_in(texts, logits.shape[-1], logits.device)
    places = [seen]
    for guess in guesses.unbind(dim=1):
        places.append(places[-1].scatter(1, guess[:, None], True))
    return decoding.penalise(logits, torch.stack(places, dim=1), penalty)


def first_of(tokens: list[int], n: int, stops: set[int]) -> list[int]:
    """Return the first n tokens at most, up to the first stop token, itself included."""
    end = next((i for i, token in enumerate(tokens) if token in stops), n - 1)
    return tokens[: min(n, end + 1)]


def check(model: nn.Module, draft: Draft, n_drafts: int) -> None:
    """Raise ValueError for a draft of another vocabulary, and for fewer than one guess per pass."""
    V = model.config.vocab_size
    if draft.vocab_size != V:
        raise ValueError(
            f"speculative decoding: the draft has a vocabulary of {draft.vocab_size} tokens, the model one "
            f"of {V}; expected the same tokens with the same numbers"
        )
    if n_drafts < 1:
        raise ValueError(f"speculative decoding: {n_drafts} drafts per pass: expected at least 1")


def no_guesses(B: int, V: int, device: torch.device) -> Proposal:
    """Return a proposal without guesses, g = 0."""
    counts = torch.zeros(B, dtype=torch.int64, device=device)
    return Proposal(counts[:, None][:, :0], torch.zeros(B, 0, V, device=device), counts)


@torch.inference_mode()
def stream(
    model: nn.Module,
    draft: Draft,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    n_drafts: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] | None = None,
    generator: Generator | None = None,
    counts: Counts | None = None,
) -> Iterator[list[list[int]]]:
    """Continue the prompts: yield the new tokens of each row, pass by pass, none for a row that has ended.

    n_drafts: guesses per pass, g. counts: the object to which each pass is added. The other options are those
    of `generate.stream`; the repetition penalty applies to the model alone, as a draft may have any law.
    Raises ValueError as there, and for a draft of another vocabulary and a cache that cannot go back.
    """
    texts = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    decoding._check(model, texts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    check(model, draft, n_drafts)
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    of_logits = partial(law, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = counts or Counts()

    # Read the prompts. The first tokens are drawn without guesses.
    target = few_rows.arrange(draft.target(model), len(texts) * (n_drafts + 1), max_new_tokens)
    hidden, cache = decoding.read_prompts(target, texts, max_new_tokens + n_drafts, static=False)
    draft.begin(texts, max_new_tokens + n_drafts, target)
    hidden, room = hidden[:, None], [max_new_tokens] * len(texts)  # (B, 1, D); tokens that may still come
    nothing = proposal = no_guesses(len(texts), model.config.vocab_size, hidden.device)

    for step in itertools.count():
        # Compare the guesses with the model.
        logits = penalised(target.logits(hidden), texts, proposal.tokens, repetition_penalty)
        n, token = accept(of_logits(logits), proposal, generator)
        found = zip(proposal.tokens.tolist(), n.tolist(), token.tolist(), room, strict=True)
        new = [first_of(guesses[:k] + last, left, stops) for guesses, k, last, left in found]
        if step:
            counts.add(n, proposal.counts, new)
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        room = [0 if stops & {*more} else left - len(more) for left, more in zip(room, new, strict=True)]
        yield new
        if not any(room):
            return

        # Go back to the accepted tokens, and read the last of them with the next guesses.
        cache.go_back([len(text) - 1 for text in texts])
        g = min(n_drafts, max(room) - 1)
        proposal = draft.propose(texts, g, of_logits, generator) if g else nothing
        last = torch.tensor([text[-1:] for text in texts], device=hidden.device)
        hidden = target.hidden(torch.cat((last, proposal.tokens), dim=1), cache=cache)


def generate(
    model: nn.Module, draft: Draft, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """Return the new tokens of each prompt, with its stop token if one was drawn; options as for `stream`."""
    new: list[list[int]] = [[] for _ in tokens]
    for step in stream(model, draft, tokens, max_new_tokens, **options):
        for row, more in zip(new, step, strict=True):
            row += more
    return new


# --- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(description="Continue a text by speculative decoding, and compare its speed.")
    decoding.add_sampling_flags(parser)
    parser.add_argument(
        "--draft", type=command.filled, help="directory of a smaller model of the same tokens"
    )
    parser.add_argument("--lookup", action="store_true", help="guess what followed the last tokens before")
    parser.add_argument("--n-drafts", type=int, default=4, help="guesses per pass of the model (default 4)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Open the model and the draft, and continue a text."""
    args = parse_arguments(argv)
    if args.checkpoint is None:
        raise ValueError("no checkpoint: name its directory, such as runs/gpt/model")
    if bool(args.draft) == args.lookup:
        raise ValueError("expected one draft: --draft DIR, a smaller model, or --lookup, the text itself")
    model = open_decoder(args.checkpoint)
    if args.lookup:
        return compare(model, Lookup(model.config.vocab_size), args)
    same_tokens(args.checkpoint, args.draft)
    compare(model, DraftModel(open_decoder(args.draft)), args)


def open_decoder(directory: str) -> nn.Module:
    """Return the decoder in a directory, on the GPU if there is one. Raises ValueError for no decoder."""
    from formats.open_model import open_model

    model = open_model(directory)
    if not hasattr(model, "stream"):
        raise ValueError(f"{directory}: {type(model).__name__} is no decoder; expected one such as gpt.py's")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def same_tokens(model: str, draft: str) -> None:
    """Raise ValueError unless the tokenizers in both directories encode a sample text to the same tokens."""
    from data.tokenizer import get_tokenizer

    ours, theirs = get_tokenizer(model), get_tokenizer(draft)
    text = f"{__doc__}\n\tdéjà vu, 東京"
    if ours.n_vocab != theirs.n_vocab or ours.encode(text) != theirs.encode(text):
        raise ValueError(
            f"{draft} has a tokenizer of {theirs.n_vocab} tokens, {model} another one of {ours.n_vocab}; "
            "expected a draft that was trained with the same tokens"
        )


def compare(model: nn.Module, draft: Draft, args: argparse.Namespace) -> None:
    """Print the continuation of args.prompt, and on stderr the speed with the draft and without."""
    from data.tokenizer import get_tokenizer

    if args.compile:
        raise ValueError("--compile: passes over several tokens are not compiled; leave it out")
    tokenizer, device = get_tokenizer(args.checkpoint), next(model.parameters()).device
    tokens = [*tokenizer.begin_ids, *tokenizer.encode(args.prompt)] or [tokenizer.eot_id]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(args, name) for name in names}
    options["stop"], n_new = decoding.end_tokens(model, tokenizer), args.max_new_tokens

    # With the draft, printed as it comes.
    counts, taken, began = Counts(), [], time.perf_counter()
    options["generator"] = Generator(device).manual_seed(args.seed)
    steps = stream(model, draft, [tokens], n_new, n_drafts=args.n_drafts, counts=counts, **options)
    print(args.prompt, end="", flush=True)
    each = ([token] for (new,) in steps for token in new)
    decoding.print_stream((taken.append(one) or one for one in each), tokenizer, options["stop"], tokens)
    rate = len(taken) / (time.perf_counter() - began)

    # The model alone, without printing.
    began, options["generator"] = time.perf_counter(), Generator(device).manual_seed(args.seed)
    (alone,) = model.generate([tokens], n_new, **options)
    rate_alone = len(alone) / (time.perf_counter() - began)
    print(
        f"{len(taken)} tokens, {rate:.0f} tokens/s with the draft, {rate_alone:.0f} tokens/s without\n"
        f"{counts.accepted} of {counts.tested} guesses accepted ({counts.acceptance:.0%}), "
        f"{counts.tokens_per_pass:.2f} tokens per pass of the model",
        file=sys.stderr,
    )


if __name__ == "__main__":
    command.run(main)
