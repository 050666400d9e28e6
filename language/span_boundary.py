"""Span boundaries: SpanBERT also predicts a masked token from the two tokens just outside its span.

    loss = -mean over masked i of log p(x_i | h_left, h_right, number of i in its span)

The two hidden states and the number are all that this head reads (Joshi et al. 2019, section 3.2), so those
states learn to sum a span up. It is an option of language/masking.py, `--set masking=span
span_boundary=True`. The head is for training alone, and is left out of what is saved.

Shapes: B rows, T tokens of a row, D model width, E embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Config, initialize


def span_boundaries(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each chosen token, the places just left and right of its span, and its number in the span.

    chosen: bool (B, T), the masked tokens. All three are int64 (B, T). Numbers count from 1, and are 0 where
    nothing is chosen. A span is a maximal run of chosen tokens, as in SpanBERT's code: where two units that
    are chosen touch, the boundary between them is masked and would tell nothing. Raises ValueError if a run
    reaches an end of its row; none does where rows begin with [CLS] and end with [SEP].
    """
    B, T = chosen.shape
    if chosen[:, 0].any() or chosen[:, -1].any():
        raise ValueError("a row's first or last token is chosen: expected special tokens at both ends")
    t = torch.arange(T).expand(B, T)
    left = t.masked_fill(chosen, 0).cummax(1).values  # the last place so far that is not chosen
    right = t.masked_fill(chosen, T - 1).flip(1).cummin(1).values.flip(1)
    return left, right, t - left


class SpanBoundary(nn.Module):
    """The head: two layers on the hidden states of both boundaries and an embedding of the number."""

    LONGEST = 32  # numbers that are told apart: a larger one has the embedding of this one

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.place = nn.Embedding(self.LONGEST, D)
        self.dense1, self.norm1 = nn.Linear(3 * D, D), nn.LayerNorm(D)
        self.dense2, self.norm2 = nn.Linear(D, D), nn.LayerNorm(D)
        self.dense3 = nn.Linear(D, config.E)
        initialize(self, config)

    def forward(self, left: Tensor, right: Tensor, place: Tensor) -> Tensor:
        """Return states (..., E) of masked tokens, in the space of the embeddings.

        left, right: hidden states (..., D) of the boundaries. place: int64 (...), the token's number, from 1.
        """
        place = self.place(place.clamp(1, self.LONGEST) - 1)  # (..., D)
        x = self.norm1(F.gelu(self.dense1(torch.cat((left, right, place), dim=-1))))
        return self.dense3(self.norm2(F.gelu(self.dense2(x))))
