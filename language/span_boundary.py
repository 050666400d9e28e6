"""Span boundaries: SpanBERT predicts a masked token also from the two tokens just outside its span.

    loss = -mean over masked i of log p(x_i | h_left, h_right, place of i in its span)

The two tokens and the place are all that this head reads (Joshi et al. 2019, section 3.2), so the ends of a
span learn to sum it up. It is an option of language/masking.py, `--set masking=span span_boundary=True`. The
head is for training alone, and is left out of what is saved.

Shapes: B rows, T tokens of a row, D model width, E embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Config, initialize


def span_boundaries(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions left and right of the masked span of each chosen token, and its place in the span.

    All are int64 (B, T); the place counts from 1, and is 0 where nothing is chosen. A span is a maximal run
    of chosen tokens, as in SpanBERT's code: where two chosen units touch, the boundary between them is masked
    and would tell nothing. A run can therefore be longer than a unit. Raises ValueError if a run reaches the
    row's end; none does where rows begin with [CLS] and end with [SEP].
    """
    B, T = chosen.shape
    if chosen[:, 0].any() or chosen[:, -1].any():
        raise ValueError("a row's first or last token is chosen: expected special tokens at both ends")
    t = torch.arange(T).expand(B, T)
    left = t.masked_fill(chosen, 0).cummax(1).values  # the last position so far that is not chosen
    right = t.masked_fill(chosen, T - 1).flip(1).cummin(1).values.flip(1)
    return left, right, t - left


class SpanBoundary(nn.Module):
    """The head: two layers on the hidden states of both boundaries and an embedding of the place."""

    LONGEST = 32  # places that are told apart; adjacent spans count as one

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.place = nn.Embedding(self.LONGEST, D)
        self.dense1, self.norm1 = nn.Linear(3 * D, D), nn.LayerNorm(D)
        self.dense2, self.norm2 = nn.Linear(D, D), nn.LayerNorm(D)
        self.dense3 = nn.Linear(D, config.E)
        initialize(self, config)

    def forward(self, left: Tensor, right: Tensor, place: Tensor) -> Tensor:
        """Return states (..., E), in the space of the embeddings, of the tokens at these places.

        left, right: hidden states (..., D) of the boundaries. place: int64 (...), counted from 1.
        """
        place = self.place(place.clamp(1, self.LONGEST) - 1)  # (..., D)
        x = self.norm1(F.gelu(self.dense1(torch.cat((left, right, place), dim=-1))))
        return self.dense3(self.norm2(F.gelu(self.dense2(x))))
