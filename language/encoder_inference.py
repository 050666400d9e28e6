"""What a trained encoder is for: filling in a mask, turning texts into vectors, scoring a sentence.

    fill_mask            softmax of the logits at the mask
    embed                mean of a text's hidden states, scaled to length 1: near texts mean near things
    pseudo_perplexity    exp(-mean log p(x_i | all others)), each token masked in turn

Each takes a model of bert.py and a tokenizer. Texts of different lengths are laid end to end in one row
(`pack`), and attention is kept inside each, so nothing is padded and no text changes another's result.

    model, tokenizer = BERT.from_pretrained("runs/bert/model"), get_tokenizer("runs/bert/model")
    fill_mask(model, tokenizer, "import [MASK]")
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from data.wordpiece import WordPiece


def sequence(tokenizer: Tokenizer | WordPiece, text: str, config, cut_at: int | None = None) -> list[int]:
    """[CLS] text [SEP], where the text may hold [MASK], cut to cut_at tokens in all, if that is given.

    Raises ValueError if it is longer than the model reads.
    """
    mask = tokenizer.roles.get("mask_token")
    ids = tokenizer.encode(text, allowed_special={mask} if mask else frozenset())
    ids = ids if cut_at is None else ids[: max(0, cut_at - 2)]
    if len(ids) + 2 > config.max_seq_len:
        raise ValueError(
            f"{text[:40]!r}... has {len(ids)} tokens: this model reads at most {config.max_seq_len - 2}"
        )
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_vocab} tokens, the model {config.vocab_size}: not made together"
        )
    return [tokenizer.cls_id, *ids, tokenizer.sep_id]


def pack(rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids of several texts as one row (1, N) without padding, and its cu_seqlens, int32 (n + 1,)."""
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    tokens = torch.tensor([token for row in rows for token in row])[None]
    return tokens.to(device), ends.int().to(device)


@torch.no_grad()
def fill_mask(
    model: nn.Module, tokenizer: Tokenizer | WordPiece, text: str, k: int = 5
) -> list[list[tuple[str, float]]]:
    """For each mask token in the text, the k likeliest tokens with their probabilities, best first.

    Raises ValueError for a text without a mask or longer than the model reads, or a model without the head.
    """
    row = sequence(tokenizer, text, model.config)
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k {k}: expected 1 to {model.config.vocab_size}")
    if tokenizer.mask_id not in row:
        raise ValueError(f"no {tokenizer.roles['mask_token']} in {text[:60]!r}; put one where to guess")
    return fill_row(model, tokenizer, row, k)


def fill_row(
    model: nn.Module, tokenizer: Tokenizer | WordPiece, row: list[int], k: int
) -> list[list[tuple[str, float]]]:
    """`fill_mask` for a row of token ids."""
    masks = [i for i, token in enumerate(row) if token == tokenizer.mask_id]
    hidden = model.hidden(torch.tensor([row], device=model.embedding_weight.device))
    best = model.logits(hidden[0, masks]).float().softmax(-1).topk(k)  # (masks, k)
    return [
        [(tokenizer.decode([token]), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def embed(
    model: nn.Module,
    tokenizer: Tokenizer | WordPiece,
    texts: list[str],
    *,
    cut_at: int | None = None,
    tokens_per_pass: int = 8192,
) -> Tensor:
    """One vector of length 1 for each text, float32 (n, D): the mean of its tokens' last hidden states.

    As sentence-transformers has it, [CLS] and [SEP] count. The dot product of two is their cosine
    similarity. cut_at: the longest texts are cut to this many tokens. Raises ValueError for a text longer
    than the model reads.
    """
    rows = [sequence(tokenizer, text, model.config, cut_at) for text in texts]
    device = model.embedding_weight.device
    vectors = torch.empty(len(rows), model.config.d_model, device=device)
    start = 0
    while start < len(rows):
        stop, n_tokens = start + 1, len(rows[start])
        while stop < len(rows) and n_tokens + len(rows[stop]) <= tokens_per_pass:
            n_tokens += len(rows[stop])
            stop += 1
        tokens, cu_seqlens = pack(rows[start:stop], device)
        hidden = model.hidden(tokens, cu_seqlens=cu_seqlens)[0].float()  # (n_tokens, D)
        vectors[start:stop] = torch.segment_reduce(hidden, "mean", lengths=cu_seqlens.diff().long())
        start = stop
    return F.normalize(vectors, dim=1)


@torch.no_grad()
def pseudo_perplexity(
    model: nn.Module, tokenizer: Tokenizer | WordPiece, text: str, *, rows_per_pass: int = 64
) -> float:
    """exp of the mean nats of each token when it alone is masked (Salazar et al. 2020, section 2.1).

    It serves to rank texts, as perplexity does, but is no probability: each token is told all the others.
    Raises ValueError for a text without tokens or longer than the model reads.
    """
    row = torch.tensor(sequence(tokenizer, text, model.config))
    places = torch.arange(1, len(row) - 1)
    if not len(places):
        raise ValueError("pseudo_perplexity: a text without tokens; give at least one word")
    device = model.embedding_weight.device
    nats = 0.0
    for masked in places.split(rows_per_pass):
        rows = row.repeat(len(masked), 1)  # (n, T), each with another token masked
        each = torch.arange(len(masked))
        rows[each, masked] = tokenizer.mask_id
        logits = model.logits(model.hidden(rows.to(device))[each, masked])
        nats += F.cross_entropy(logits.double(), row[masked].to(device), reduction="sum").item()
    return math.exp(nats / len(places))
