"""What a masked language model is asked: which tokens to restore, and how two pieces of text belong together.

    loss = -mean over chosen t of log p(x_t | corrupted row)

All maskings differ only in what is masked *together*. A masking is a partition of the row into units; units
are chosen at random until the budget, a rate times the length of the text, is spent; what is chosen is
corrupted. The larger the units, the less a masked token can be guessed from its own neighbouring pieces:

    each_token     every token alone                     BERT (Devlin et al. 2018)
    whole_words    all pieces of a word                  BERT's second release (2019), Cui et al. 2019
    entities       the words of a name or phrase         ERNIE (Sun et al. 2019)
    spans          some consecutive words, 3.8 a span    SpanBERT (Joshi et al. 2019)

    units = spans(whole_words(continues), generator)
    chosen = choose(units, maskable, n, generator)
    inputs = corrupt(tokens, chosen, mask_id, ordinary, generator, units)
    positions, targets = gather_masked(tokens, chosen, n)

`make_batch` at the end is these steps, from windows of text to what a model of bert.py is trained on.

Drawn anew each time a row is seen, it is RoBERTa's dynamic masking (Liu et al. 2019, section 4.1).
`next_sentence` (BERT) and `sentence_order` (ALBERT) ask the other question, about a pair of segments.

    python -m language.masking        one sentence, masked in each of the four ways

Units are int64 (B, T), counting up from 0 along each row: B rows of T tokens. All randomness comes from the
generator, a CPU one, so that the same state gives the same batch.
"""

import torch
from torch import Generator, Tensor

from data.tokenizer import Tokenizer
from data.wordpiece import WordPiece


def each_token(tokens: Tensor) -> Tensor:
    """Units (B, T) of tokens (B, T): every token is its own (Devlin et al. 2018, section 3.1)."""
    return torch.arange(tokens.shape[1]).expand(tokens.shape)


def whole_words(continues: Tensor) -> Tensor:
    """Units (B, T): words. continues (B, T), bool: the token continues the word of the token before it.

    A row's first token begins a word whatever it is. BERT's second release (2019); Cui et al. 2019,
    arXiv:1906.08101, for Chinese.
    """
    begins = ~continues
    begins[:, 0] = True
    return begins.cumsum(1) - 1


def entities(words: Tensor, given: Tensor) -> Tensor:
    """Units (B, T): given phrases and names, and words outside of them (ERNIE, Sun et al. 2019, section 3.2).

    given (B, T), int64: 0 outside, else a positive number, the same for consecutive tokens of one phrase. A
    phrase is cut out exactly as given; if it begins or ends within a word, the rest of that word is a unit.
    """
    before = given.roll(1, dims=1)  # that of column 0 is the row's end, but a row's first token begins anyway
    word_begins = words != words.roll(1, dims=1)
    begins = torch.where(given > 0, given != before, word_begins | (before > 0))
    return whole_words(~begins)


def spans(words: Tensor, generator: Generator, p: float = 0.2, longest: int = 10) -> Tensor:
    """Units (B, T): whole words joined to consecutive spans (SpanBERT, Joshi et al. 2019, section 3.1).

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
    """Whole units at random, with at most n tokens a row: bool (B, T).

    maskable (B, T), bool: false for special tokens, which count in no unit and are never chosen. With units
    of one token, exactly n are chosen, or all if there are fewer; else the last tokens of the budget may
    remain unspent, and a row whose units are all larger than n is left as it is.

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
    """Inputs (B, T): of the chosen tokens, 80 % become mask_id, 10 % a random one of `ordinary` (ids, 1-D),
    and 10 % stay as they are.

    The mask never occurs when the model is used; a token that may be wrong or right without a sign keeps the
    model representing all of them (Devlin et al. 2018, section 3.1). With units, one decision for each unit:
    a span is masked, replaced or kept as a whole (Joshi et al. 2019, section 3.1).
    """
    decision = torch.rand(tokens.shape, generator=generator)
    if units is not None:
        decision = decision.gather(1, units)
    random = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]
    corrupted = torch.where(decision < 0.9, random, tokens)
    corrupted = torch.where(decision < 0.8, mask_id, corrupted)
    return torch.where(chosen, corrupted, tokens)


def gather_masked(tokens: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Positions (B, n) of the chosen tokens, in order, and the tokens there before corruption, the targets.

    A row with fewer is filled with position 0 and target -100. The shape is fixed, so a model is compiled
    once, and its head, whose cost is the vocabulary's size, runs on these positions alone. Raises ValueError
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


def span_boundaries(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right positions just outside the masked span of each chosen token, and its place in the span.

    All int64 (B, T); the place counts from 1, and is 0 where nothing is chosen. SpanBERT predicts a token
    also from these three alone (Joshi et al. 2019, section 3.2). A span here is a maximal run of chosen
    tokens, as in SpanBERT's code: where two chosen units touch, the boundary between them is masked and would
    tell nothing. A run can therefore be longer than a unit. Raises ValueError if a run meets the row's end;
    none does where rows begin with [CLS] and end with [SEP].
    """
    B, T = chosen.shape
    if chosen[:, 0].any() or chosen[:, -1].any():
        raise ValueError("a row's first or last token is chosen: expected special tokens at both ends")
    t = torch.arange(T).expand(B, T)
    left = t.masked_fill(chosen, 0).cummax(1).values  # the last position so far that is not chosen
    right = t.masked_fill(chosen, T - 1).flip(1).cummin(1).values.flip(1)
    return left, right, t - left


def next_sentence(rows: Tensor, cut: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Does the second segment follow the first? New rows (B, N), labels (B,): 0 it does, 1 it is random.

    rows (B, N): text without special tokens, divided before position cut (B,), in 1..N-1. With probability
    1/2 the second segment becomes the same places of another row, each equally likely (Devlin et al. 2018,
    section 3.1, task 2). A single row has no other to take from: it stays as it is.
    """
    B, N = rows.shape
    labels = torch.randint(2, (B,), generator=generator) * (B > 1)
    other = (torch.arange(B) + torch.randint(1, max(B, 2), (B,), generator=generator)) % B
    replaced = (torch.arange(N) >= cut[:, None]) & (labels[:, None] == 1)  # (B, N)
    return torch.where(replaced, rows[other], rows), labels


def sentence_order(rows: Tensor, cut: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which segment comes first? New rows (B, N), new cut (B,), labels (B,): 0 in order, 1 swapped.

    rows and cut as for `next_sentence`. With probability 1/2 the segments change places. Both are from the
    same text, so the topic, which gives most of BERT's random pairs away, is no help (ALBERT, Lan et al.
    2019, section 3.1).
    """
    B, N = rows.shape
    labels = torch.randint(2, (B,), generator=generator)
    source = (torch.arange(N) + (cut * labels)[:, None]) % N  # swapped: the row turned left by cut
    return rows.gather(1, source), torch.where(labels == 1, N - cut, cut), labels


def part_of(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """The i-th of n equal parts of a batch from `make_batch`: its rows, and the places counted in them."""
    first = batch["tokens"].numel() // n * i
    part = {name: t.chunk(n)[i] for name, t in batch.items()}
    return part | {name: part[name] - first for name in part.keys() & {"positions", "left", "right"}}


def make_batch(
    tokens: Tensor,
    config,
    generator: Generator,
    tokenizer: Tokenizer | WordPiece,
    given: Tensor | None = None,
) -> dict[str, Tensor]:
    """Windows of T + 1 tokens (B, T + 1) to rows of T with [CLS] and [SEP], and what config, a `bert.Config`,
    asks about them.

    "tokens" (B, T) corrupted, "positions" (B, n) of the masked ones in the flattened rows, "targets" (B, n)
    what stood there, -100 where a row has fewer. With a pair objective the text is cut in two at random:
    "segments" (B, T) and "pair_labels" (B,). given: int64 (B, T + 1), the number of the phrase or entity
    that a token belongs to, 0 for none; each is masked as a whole (ERNIE, Sun et al. 2019).
    Raises ValueError for windows with no text that may be masked, or too short for a pair, and for a config
    without the head that would be asked.
    """
    if not config.mlm_head:
        raise ValueError(
            "this checkpoint has no masked-language-model head; train.py --set mlm_head=True adds a new one"
        )
    B, T = tokens.shape[0], tokens.shape[1] - 1
    N, n = config.n_text(T), config.n_masked(T)
    if N < 2:
        raise ValueError(f"rows of {T} tokens leave {N} for text; expected a --seq-len of at least 8")
    text, batch = tokens[:, :N], {}
    cut = torch.full((B,), N)
    if config.pair != "none":
        cut = torch.randint(1, N, (B,), generator=generator)
        if config.pair == "nsp":
            text, batch["pair_labels"] = next_sentence(text, cut, generator)
        else:
            text, cut, batch["pair_labels"] = sentence_order(text, cut, generator)

    place = torch.arange(N) + 1 + (torch.arange(N) >= cut[:, None])  # (B, N): where the text comes to stand
    rows = torch.full((B, T), tokenizer.sep_id).scatter(1, place, text)
    rows[:, 0] = tokenizer.cls_id
    if config.pair != "none":
        batch["segments"] = (torch.arange(T) > cut[:, None] + 1).long()

    special = torch.from_numpy(tokenizer.is_special)  # (V,)
    maskable = ~special[rows]
    if not maskable.any():
        raise ValueError("no token of this batch may be masked: it is all special tokens; give more text")
    units = each_token(rows)
    if config.masking != "token" or given is not None:
        units = whole_words(torch.from_numpy(tokenizer.continues_word)[rows])
    if given is not None:
        units = entities(units, torch.zeros_like(rows).scatter(1, place, given[:, :N]))
    if config.masking == "span":
        units = spans(units, generator)
    chosen = choose(units, maskable, n, generator)
    ordinary = (~special).nonzero().flatten()
    together = units if config.masking == "span" else None
    batch["tokens"] = corrupt(rows, chosen, tokenizer.mask_id, ordinary, generator, together)
    positions, batch["targets"] = gather_masked(rows, chosen, n)
    first = torch.arange(0, B * T, T)[:, None]  # of each row among all tokens
    batch["positions"] = first + positions
    if config.span_boundary:
        left, right, place = (x.gather(1, positions) for x in span_boundaries(chosen))
        batch |= {"left": first + left, "right": first + right, "place": place}
    return batch


def loss_bytes(model, config, n: int, seq_len: int, precision: tuple[int, int, bool]) -> dict[str, int]:
    """Return the memory of the heads for n tokens in rows of seq_len, as the fields of engine.memory.Loss.

    Forward keeps a log-softmax at each masked place, of which backward makes two more, and the inputs of the
    norms of embeddings and head. precision: (e, r, autocast) of engine/memory.py.
    """
    e, r, autocast = precision
    D, V = model.config.d_model, model.config.vocab_size
    E = model.config.d_embedding or D
    n_logits = n // seq_len * config.n_masked(seq_len) * V * (1 + config.span_boundary)
    kept = 4 * n_logits + n * r * (E + D * model.config.pre_norm) + V * E * e * autocast
    n_head = V * E * any(p.requires_grad for p in model.cls.parameters())
    return {"kept": kept, "temporary": 8 * n_logits, "head": n_head, "tied": 2 * n_head}


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
    main()
