"""Span boundaries: the tokens around a masked span, which are themselves never masked."""

import pytest
import torch

from language.masking import choose, spans, whole_words
from language.span_boundary import span_boundaries

B, T = 2000, 128


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_span_boundaries():
    chosen = torch.tensor([[0, 1, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    left, right, place = span_boundaries(chosen)
    assert left[chosen].tolist() == [0, 0, 0, 4, 4, 4]
    assert right[chosen].tolist() == [4, 4, 4, 6, 7, 7]
    assert place.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 2, 0]]
    for end in (0, -1):
        touching = chosen.clone()
        touching[1, end] = True
        with pytest.raises(ValueError, match="special tokens at both ends"):
            span_boundaries(touching)


def test_span_boundaries_are_never_masked():
    continues = torch.rand(B, T, generator=seeded()) < 0.3
    maskable = torch.ones(B, T, dtype=torch.bool)
    for special in (0, 50, T - 1):  # [CLS] a [SEP] b [SEP]
        maskable[:, special] = False
        continues[:, special : special + 2] = False
    chosen = choose(spans(whole_words(continues), seeded(1)), maskable, 37, seeded())
    left, right, place = span_boundaries(chosen)
    assert not chosen.gather(1, left)[chosen].any() and not chosen.gather(1, right)[chosen].any()
    assert (place > 0).equal(chosen)
    run = chosen.long().cumsum(1)
    assert torch.equal((run - run.gather(1, left))[chosen], place[chosen])  # all chosen in between
