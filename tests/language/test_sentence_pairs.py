"""Pairs of segments: which are joined, how often, and where their tokens come to stand."""

import math

import torch

from language.sentence_pairs import next_sentence, sentence_order

B = 2000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def within(value, expected, standard_error):
    assert abs(value - expected) < 5 * standard_error, f"{value} is not {expected}"


def numbered_rows(N=40):
    """Every token says where it is from: row * N + place."""
    return torch.arange(B * N).view(B, N), torch.randint(1, N, (B,), generator=seeded(9))


def test_next_sentence():
    rows, cut = numbered_rows()
    new, labels = next_sentence(rows, cut, seeded())
    within(labels.float().mean(), 0.5, 0.5 / math.sqrt(B))
    first = torch.arange(40) < cut[:, None]
    assert torch.equal(new[first], rows[first])
    assert torch.equal(new[labels == 0], rows[labels == 0])
    assert torch.equal(new % 40, rows % 40)  # the same places
    other = new[:, -1] // 40
    assert (new // 40 == other[:, None])[~first].all()  # one row
    assert (other != torch.arange(B))[labels == 1].all()  # another one


def test_next_sentence_draws_every_other_row():
    rows, cut = torch.arange(4)[:, None].expand(4, 2), torch.ones(4, dtype=torch.int64)
    new = [next_sentence(rows, cut, seeded(seed))[0] for seed in range(100)]
    seen = {(i, batch[i, 1].item()) for batch in new for i in range(4)}
    assert len(seen) == 16
    two, labels = next_sentence(rows[:2], cut[:2], seeded())
    assert torch.equal(two[:, 1], torch.tensor([0, 1]) ^ labels)
    for seed in range(5):  # alone, there is no other
        assert torch.equal(next_sentence(rows[:1], cut[:1], seeded(seed))[0], rows[:1])


def test_sentence_order():
    rows, cut = numbered_rows()
    new, new_cut, labels = sentence_order(rows, cut, seeded())
    within(labels.float().mean(), 0.5, 0.5 / math.sqrt(B))
    for i in range(100):
        a, b = rows[i, : cut[i]], rows[i, cut[i] :]
        expected = (b, a) if labels[i] else (a, b)
        assert torch.equal(new[i], torch.cat(expected)) and new_cut[i] == len(expected[0])
