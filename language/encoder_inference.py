"""Uses of a trained encoder: it fills in masks, turns texts into vectors, and scores sentences.

    fill_mask            softmax of the logits at the mask
    embed                mean of a text's hidden states, scaled to length 1; texts of similar meaning are near
    pseudo_perplexity    exp(-mean log p(x_i | all others)), each token masked in turn

Each takes a model of bert.py and its tokenizer. Texts of different lengths are packed end to end into one
row (`pack`), and each token attends to its own text alone: nothing is padded, and the result for a text
does not depend on the others.

    model, tokenizer = BERT.from_pretrained("runs/bert/model"), get_tokenizer("runs/bert/model")
    fill_mask(model, tokenizer, "import [MASK]")

    python bert.py runs/bert/model --text "import [MASK]"      the same

Shapes: T tokens of a text, N tokens of n packed texts, D model width.
"""

import argparse
import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bert
from bert import BERT
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import command


def sequence(
    tokenizer: Tokenizer | WordPiece, text: str, config: bert.Config, cut_at: int | None = None
) -> list[int]:
    """Return the token ids of [CLS] text [SEP]. The text may hold [MASK].

    cut_at: cut the text so that there are at most this many tokens in all. Raises ValueError for a text that
    is longer than the model reads, and for a tokenizer with more tokens than the model.
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
    """Return the token ids of n texts as one row (1, N) without padding, and cu_seqlens, int32 (n + 1,).

    Text i is tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1 of the row.
    """
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    tokens = torch.tensor([token for row in rows for token in row])[None]
    return tokens.to(device), ends.int().to(device)


@torch.no_grad()
def fill_mask(
    model: BERT, tokenizer: Tokenizer | WordPiece, text: str, k: int = 5
) -> list[list[tuple[str, float]]]:
    """Return, for each mask token in the text, the k likeliest tokens with their probabilities, best first.

    Raises ValueError for a text without a mask or longer than the model reads, and for a model without the
    head.
    """
    row = sequence(tokenizer, text, model.config)
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k {k}: expected 1 to {model.config.vocab_size}")
    if tokenizer.mask_id not in row:
        raise ValueError(f"no {tokenizer.roles['mask_token']} in {text[:60]!r}; put one where to guess")
    return fill_row(model, tokenizer, row, k)


def fill_row(
    model: BERT, tokenizer: Tokenizer | WordPiece, row: list[int], k: int
) -> list[list[tuple[str, float]]]:
    """Return, for each mask in a row of token ids, the k likeliest tokens with their probabilities."""
    masks = [i for i, token in enumerate(row) if token == tokenizer.mask_id]
    hidden = model.head_input(torch.tensor([row], device=model.embedding_weight.device))  # (1, T, D)
    best = model.logits(hidden[0, masks]).float().softmax(-1).topk(k)  # (masks, k)
    return [
        [(tokenizer.decode([token]), p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def fill_every_tenth(model: BERT, tokenizer: Tokenizer | WordPiece, text: list[int]) -> str:
    """Return a text of token ids with every tenth token masked, and for each its three likeliest tokens."""
    masked = [i for i, token in enumerate(text) if i % 10 == 5 and not tokenizer.is_special[token]]
    row = [tokenizer.mask_id if i in masked else token for i, token in enumerate(text)]
    guesses = fill_row(model, tokenizer, [tokenizer.cls_id, *row, tokenizer.sep_id], k=3)
    lines = [tokenizer.decode(row), ""]
    for i, best in zip(masked, guesses, strict=True):
        likeliest = "   ".join(f"{token!r} {p:.0%}" for token, p in best)
        lines.append(f"{tokenizer.decode([text[i]])!r:16} guessed {likeliest}")
    return "\n".join(lines)


@torch.no_grad()
def embed(
    model: BERT,
    tokenizer: Tokenizer | WordPiece,
    texts: list[str],
    *,
    cut_at: int | None = None,
    tokens_per_pass: int = 8192,
) -> Tensor:
    """Return one vector of length 1 for each text, float32 (n, D): the mean of its last hidden states.

    [CLS] and [SEP] count, as in sentence-transformers. The dot product of two vectors is their cosine
    similarity. cut_at: cut longer texts to this many tokens. Raises ValueError for a text longer than the
    model reads.
    """
    rows = [sequence(tokenizer, text, model.config, cut_at) for text in texts]
    device = model.embedding_weight.device
    vectors = torch.empty(len(rows), model.config.d_model, device=device)
    start = 0
    while start < len(rows):
        # Take as many texts as fit into one pass, at least one.
        stop, n_tokens = start + 1, len(rows[start])
        while stop < len(rows) and n_tokens + len(rows[stop]) <= tokens_per_pass:
            n_tokens += len(rows[stop])
            stop += 1
        # Average the hidden states of each.
        tokens, cu_seqlens = pack(rows[start:stop], device)
        hidden = model.hidden(tokens, cu_seqlens=cu_seqlens)[0].float()  # (N, D)
        vectors[start:stop] = torch.segment_reduce(hidden, "mean", lengths=cu_seqlens.diff().long())
        start = stop
    return F.normalize(vectors, dim=1)


@torch.no_grad()
def pseudo_perplexity(
    model: BERT, tokenizer: Tokenizer | WordPiece, text: str, *, rows_per_pass: int = 64
) -> float:
    """Return exp of the mean nats of each token when it alone is masked (Salazar et al. 2020, section 2.1).

    It ranks texts, as perplexity does, but does not follow from a probability of the text: each token is
    predicted from all the others. Raises ValueError for a text without tokens or longer than the model reads.
    """
    row = torch.tensor(sequence(tokenizer, text, model.config))  # (T,)
    places = torch.arange(1, len(row) - 1)
    if not len(places):
        raise ValueError("pseudo_perplexity: a text without tokens; give at least one word")
    device = model.embedding_weight.device
    nats = 0.0
    for masked in places.split(rows_per_pass):
        rows = row.repeat(len(masked), 1)  # (len(masked), T), another token masked in each
        each = torch.arange(len(masked))
        rows[each, masked] = tokenizer.mask_id
        logits = model.logits(model.head_input(rows.to(device))[each, masked])
        nats += F.cross_entropy(logits.double(), row[masked].to(device), reduction="sum").item()
    return math.exp(nats / len(places))


def print_sizes(kind: type[nn.Module], sizes: dict) -> None:
    """Print the parameters of a model's sizes, and the FLOPs per token of training them by masking."""
    task = importlib.import_module(f"language.{bert.TASK}")
    columns = (
        f"{'encoder':>12} {'with heads':>12} {'layers':>6} {'width':>6} {'context':>8} {'FLOPs/token':>12}"
    )
    print(f"{'size':12} {columns}")
    for name, config in sizes.items():
        with torch.device("meta"):
            model = kind(config)
        n_params, n_heads = (sum(p.numel() for p in part.parameters()) for part in (model, model.cls))
        flops = task.flops_per_token(model, task.settings(config), config.max_seq_len)
        print(
            f"{name:12} {n_params - n_heads:12,} {n_params:12,} {config.n_layers:6} {config.d_model:6} ",
            end="",
        )
        print(f"{config.max_seq_len:8} {flops:12.3e}")


def run(arguments: argparse.Namespace, kind: type[nn.Module], sizes: dict) -> None:
    """Print the sizes, or with a checkpoint the likeliest tokens at each mask. Raises ValueError."""
    if arguments.checkpoint is None:
        print_sizes(kind, sizes)
        return
    if arguments.text is None:
        raise ValueError("--text is missing; give a text with a mask in it, such as 'import [MASK]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(arguments.checkpoint).to(device).eval()
    tokenizer = get_tokenizer(arguments.checkpoint)
    for best in fill_mask(model, tokenizer, arguments.text, arguments.k):
        print("   ".join(f"{token!r} {p:.1%}" for token, p in best))


def main(kind: type[nn.Module] = BERT, sizes: dict = bert.SIZES) -> None:
    """Run the command `python bert.py`, or that of another encoder, of class `kind`. A mistake in its
    arguments ends it with one line and exit code 2."""
    parser = command.Parser(description="Fill in masks with a trained model, or print the sizes.")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=command.filled,
        help="directory in Hugging Face layout (default: print the sizes)",
    )
    parser.add_argument("--text", help="a text with [MASK] in it, or with the tokenizer's own mask token")
    parser.add_argument("--k", type=int, default=5, help="number of guesses for each mask (default 5)")
    command.run(lambda: run(parser.parse_args(), kind, sizes))


if __name__ == "__main__":
    main()
