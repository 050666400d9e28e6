"""Pairs of segments: how two pieces of text belong together, the second question of BERT and ALBERT.

    loss = -mean over rows of log p(label | h_[CLS])            one row: [CLS] a [SEP] b [SEP]

    next_sentence     does b follow a in the text, or is it from another row?     BERT (Devlin et al. 2018)
    sentence_order    does a come before b, or b before a?                        ALBERT (Lan et al. 2019)

`in_two` cuts rows of text at random and makes the pairs; `framed` puts the special tokens around segments.
language/masking.py builds its batches of both, and adds this loss to its own for a model with a head for it.

Shapes: B rows, N tokens of text in a row, T tokens of a row with its special tokens. All randomness comes
from the generator, a CPU one, so that the same state gives the same pairs.
"""

import torch
from torch import Generator, Tensor

from data.tokenizer import Tokenizer
from data.wordpiece import WordPiece


def next_sentence(rows: Tensor, cut: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return new rows (B, N) and labels (B,): 0 if the second segment follows the first, 1 if it is random.

    rows (B, N): text without special tokens, cut before place cut (B,), in 1..N-1. With probability 1/2 the
    second segment becomes the same places of another row, each equally likely (Devlin et al. 2018, section
    3.1, task 2). A single row has no other to take from: it stays as it is, with label 0.
    """
    B, N = rows.shape
    labels = torch.randint(2, (B,), generator=generator) * (B > 1)
    other = (torch.arange(B) + torch.randint(1, max(B, 2), (B,), generator=generator)) % B
    replaced = (torch.arange(N) >= cut[:, None]) & (labels[:, None] == 1)  # (B, N)
    return torch.where(replaced, rows[other], rows), labels


def sentence_order(rows: Tensor, cut: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return new rows (B, N), their new cut (B,), and labels (B,): 0 in order, 1 swapped.

    rows and cut as for `next_sentence`. With probability 1/2 the segments change places. Both are from the
    same text, so the topic is no help, by which most of BERT's random pairs can be told (ALBERT, Lan et al.
    2019, section 3.1).
    """
    B, N = rows.shape
    labels = torch.randint(2, (B,), generator=generator)
    source = (torch.arange(N) + (cut * labels)[:, None]) % N  # if swapped, the row is rotated left by cut
    return rows.gather(1, source), torch.where(labels == 1, N - cut, cut), labels


def in_two(text: Tensor, pair: str, generator: Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return text (B, N) cut in two at random for the objective `pair`, its cut (B,), and labels (B,).

    pair: "nsp" (next sentence), "sop" (sentence order) or "none". With "none" there is one segment: the text
    is as it was, cut at its end, and the labels are None.
    """
    B, N = text.shape
    if pair == "none":
        return text, torch.full((B,), N), None
    cut = torch.randint(1, N, (B,), generator=generator)
    if pair == "nsp":
        text, labels = next_sentence(text, cut, generator)
        return text, cut, labels
    return sentence_order(text, cut, generator)


def framed(text: Tensor, cut: Tensor, T: int, tokenizer: Tokenizer | WordPiece) -> tuple[Tensor, Tensor]:
    """Return rows (B, T), [CLS] a [SEP] b [SEP], of text (B, N) cut before place cut (B,).

    The second tensor (B, N) is the place of each token of the text in its row. A text that is cut at its end
    has no second segment: [CLS] a [SEP].
    """
    B, N = text.shape
    place = torch.arange(N) + 1 + (torch.arange(N) >= cut[:, None])  # (B, N)
    rows = torch.full((B, T), tokenizer.sep_id).scatter(1, place, text)
    rows[:, 0] = tokenizer.cls_id
    return rows, place
