"""Masking: what each kind masks together, and how often, against the papers' figures.

A statistic of fixed seeds may differ from its expectation by 5 standard errors: a deviation that chance shows
once in two million draws, and a wrong rate always.
"""

import math

import pytest
import torch

from language import masking
from language.masking import (
    choose,
    corrupt,
    each_token,
    entities,
    gather_masked,
    next_sentence,
    sentence_order,
    span_boundaries,
    spans,
    whole_words,
)

B, T = 2000, 128
MASK, ORDINARY = 4, torch.arange(5, 1005)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def text_rows(seed=0):
    """Tokens, which continue a word (three in ten), and which are text: [CLS] a [SEP] b [SEP]."""
    generator = seeded(seed)
    tokens = ORDINARY[torch.randint(len(ORDINARY), (B, T), generator=generator)]
    continues = torch.rand(B, T, generator=generator) < 0.3
    maskable = torch.ones(B, T, dtype=torch.bool)
    for special in (0, 50, T - 1):
        maskable[:, special] = False
        tokens[:, special] = 2
        continues[:, special : special + 2] = False
    return tokens, continues, maskable


def units_of(kind, tokens, continues):
    words = whole_words(continues)
    given = torch.zeros_like(tokens)
    given[:, 10:14], given[:, 14:16], given[:, 60:63] = 1, 2, 3
    ways = {
        "token": lambda: each_token(tokens),
        "word": lambda: words,
        "entity": lambda: entities(words, given),
        "span": lambda: spans(words, seeded(1)),
    }
    return ways[kind]()


def clipped_geometric(p=0.2, longest=10):
    return torch.tensor([p * (1 - p) ** (l - 1) / (1 - (1 - p) ** longest) for l in range(1, longest + 1)])


def lengths(units):
    """Tokens in each unit, (B, T), 0 where a row has no such unit."""
    return torch.zeros_like(units).scatter_add(1, units, torch.ones_like(units))


def within(value, expected, standard_error):
    assert abs(value - expected) < 5 * standard_error, f"{value} is not {expected}"


# --- units


def test_the_first_token_of_a_row_begins_a_word_whatever_it_is():
    continues = torch.tensor([[True, True, False, True], [False, False, True, False]])
    assert whole_words(continues).tolist() == [[0, 0, 1, 1], [0, 1, 1, 2]]
    assert continues[0, 0]  # the argument is left alone


def test_an_entity_is_one_unit_and_other_tokens_stay_in_their_words():
    words = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 5, 5, 6]])
    given = torch.tensor([[0, 0, 0, 7, 7, 2, 2, 0, 0, 0]])  # the second ends within word 5
    assert entities(words, given).tolist() == [[0, 1, 1, 2, 2, 3, 3, 4, 4, 5]]
    twice = torch.tensor([[3, 3, 0, 0, 0, 0, 0, 0, 3, 3]])  # one number at two places: two units
    assert entities(words, twice).tolist() == [[0, 0, 1, 2, 3, 4, 5, 5, 6, 6]]
    assert torch.equal(entities(words, torch.zeros_like(words)), words)


@pytest.mark.parametrize("kind", ["token", "word", "entity", "span"])
def test_units_count_up_from_zero_and_never_part_a_word(kind):
    tokens, continues, _ = text_rows()
    units = units_of(kind, tokens, continues)
    steps = units.diff(dim=1)
    assert units.dtype == torch.int64 and units.shape == (B, T)
    assert (units[:, 0] == 0).all() and ((steps == 0) | (steps == 1)).all()
    if kind in ("word", "span"):
        assert (steps[continues[:, 1:]] == 0).all()


def test_span_lengths_in_words_are_geometric_and_clipped():
    """But for the last span of each row, which the row's end cuts."""
    probabilities = clipped_geometric()
    mean = (probabilities * torch.arange(1, 11)).sum()
    assert mean == pytest.approx(3.797, abs=5e-4)  # "3.8" in the paper

    words = torch.arange(T).expand(B, T)
    units = spans(words, seeded())
    drawn = lengths(units)
    # The first ten spans of a row end by word 100 at the latest, so that none of them is cut. Those that end
    # at a given place would not do: which spans fit there depends on their lengths.
    drawn = drawn[:, :10]
    share = torch.bincount(drawn.flatten(), minlength=11)[1:] / drawn.numel()
    for l in range(10):
        within(share[l], probabilities[l], math.sqrt(probabilities[l] / drawn.numel()))
    within(
        drawn.float().mean(), mean, 2.56 / math.sqrt(drawn.numel())
    )  # 2.56: standard deviation of a length

    # All spans, the cut ones too: 2.3 / T lower.
    n_spans = (units[:, -1] + 1).float()
    within(T / n_spans.mean(), mean * (1 - 2.3 / T), 0.01)  # n_spans: 34.3 +- 3.9, its mean +- 0.087


def test_spans_of_other_parameters():
    words = torch.arange(T).expand(B, T)
    assert torch.equal(spans(words, seeded(), longest=1), words)
    drawn = lengths(spans(words, seeded(), p=0.5, longest=3))[:, :40]
    probabilities = clipped_geometric(0.5, 3)  # 4/7, 2/7, 1/7
    for l in range(3):
        within((drawn == l + 1).float().mean(), probabilities[l], math.sqrt(probabilities[l] / drawn.numel()))


# --- the choice


@pytest.mark.parametrize("rate", [0.15, 0.30])
@pytest.mark.parametrize("kind", ["token", "word", "entity", "span"])
def test_the_budget_is_spent_on_whole_units_of_text(kind, rate):
    tokens, continues, maskable = text_rows()
    units = units_of(kind, tokens, continues)
    n = round(rate * (T - 3))
    chosen = choose(units, maskable, n, seeded(2))
    count = chosen.sum(1)
    assert not (chosen & ~maskable).any()
    assert count.max() <= n
    if kind == "token":
        assert (count == n).all()
    assert count.float().mean() > 0.998 * n  # there is nearly always a unit for the rest

    size = torch.zeros_like(units).scatter_add(1, units, maskable.long())
    size_chosen = torch.zeros_like(units).scatter_add(1, units, chosen.long())
    assert ((size_chosen == 0) | (size_chosen == size)).all()  # whole or not at all
    left = size.masked_fill(size_chosen > 0, 0)
    room = (n - count)[:, None]
    assert not ((left > 0) & (left <= room)).any()  # nothing that would still fit


@pytest.mark.parametrize("kind", ["token", "word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.30])
def test_every_place_is_masked_equally_often(kind, rate):
    tokens, continues = torch.zeros(B, T, dtype=torch.int64), torch.rand(B, T, generator=seeded(3)) < 0.3
    everywhere = torch.ones(B, T, dtype=torch.bool)
    units = units_of(kind, tokens, continues)
    share = choose(units, everywhere, round(rate * T), seeded(2)).float().mean(0)
    expected = round(rate * T) / T
    error = 5 * math.sqrt(expected * (1 - expected) / B)
    # Short pieces at the two ends of a row are taken more often when the budget runs out.
    ends = 10 if kind == "span" else 1
    assert (share - expected)[ends:-ends].abs().max() < error
    assert (share / expected - 1).abs().max() < (0.25 if kind == "span" else 0.1) + error / expected


def test_chosen_spans_are_as_long_as_spanberts():
    """3.8 words drawn; the last of a row's budget is spent on what fits. Cutting the last span instead, as
    SpanBERT's code does, gives 3.37 in 128 words and 3.68 in 512 (simulated)."""
    for T, expected in ((128, 3.37), (512, 3.68)):
        words = torch.arange(T).expand(B, T)
        units = spans(words, seeded())
        chosen = choose(units, torch.ones(B, T, dtype=torch.bool), round(0.15 * T), seeded(1))
        n_spans = (torch.zeros_like(units).scatter_add(1, units, chosen.long()) > 0).sum()
        within(chosen.sum() / n_spans, expected, 2.6 / math.sqrt(n_spans) + 0.002)


def test_rows_with_little_to_mask():
    units = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]])
    maskable = torch.ones(4, 6, dtype=torch.bool)
    maskable[1, 2:], maskable[3] = False, False
    chosen = choose(units, maskable, 4, seeded())
    assert chosen[0].sum() == 0  # its one unit is too large
    assert chosen[1].tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]  # fewer than the budget: all of them
    assert 3 <= chosen[2].sum() <= 4  # 1 + 3, or 1 + 2
    assert chosen[3].sum() == 0
    assert not choose(units, maskable, 0, seeded()).any()


# --- corruption


def test_eighty_ten_ten():
    tokens, continues, maskable = text_rows()
    chosen = choose(each_token(tokens), maskable, 37, seeded(1))
    inputs = corrupt(tokens, chosen, MASK, ORDINARY, seeded(2))
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    n = chosen.sum().item()
    masked = (inputs == MASK)[chosen].float().mean()
    kept = (inputs == tokens)[chosen].float().mean()
    same_by_chance = 0.1 / len(ORDINARY)
    within(masked, 0.8, math.sqrt(0.8 * 0.2 / n))
    within(kept, 0.1 + same_by_chance, math.sqrt(0.1 * 0.9 / n))
    replaced = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert torch.isin(replaced, ORDINARY).all()
    # Uniform: the mean of ids 5 ... 1004, whose standard deviation is 1000 / sqrt(12).
    within(replaced.float().mean(), ORDINARY.float().mean(), 1000 / math.sqrt(12 * len(replaced)))


def test_one_decision_for_each_unit():
    tokens, continues, maskable = text_rows()
    units = units_of("span", tokens, continues)
    chosen = choose(units, maskable, 37, seeded(1))
    inputs = corrupt(tokens, chosen, MASK, ORDINARY, seeded(2), units)
    outcomes = torch.where(inputs == MASK, 0, torch.where(inputs == tokens, 2, 1))
    by_chance = (0.1 * chosen.sum() / len(ORDINARY)).item()
    lowest = torch.full_like(units, 3).scatter_reduce(1, units, outcomes.masked_fill(~chosen, 3), "amin")
    highest = torch.full_like(units, -1).scatter_reduce(1, units, outcomes.masked_fill(~chosen, -1), "amax")
    is_chosen = highest >= 0
    mixed = is_chosen & (lowest != highest)
    # A random token that happens to be the right one looks kept; nothing else may mix.
    assert not (mixed & (lowest == 0)).any() and mixed.sum() <= by_chance + 5 * math.sqrt(by_chance)
    n = is_chosen.sum().item()
    within((lowest[is_chosen] == 0).float().mean(), 0.8, math.sqrt(0.8 * 0.2 / n))
    within((highest[is_chosen] == 2).float().mean(), 0.1, math.sqrt(0.1 * 0.9 / n) + 1e-4)

    alone = corrupt(tokens, chosen, MASK, ORDINARY, seeded(2))
    hidden = torch.zeros_like(units).scatter_add(1, units, (alone == MASK).long())
    size = torch.zeros_like(units).scatter_add(1, units, chosen.long())
    assert ((hidden > 0) & (hidden < size)).any()  # without units, the tokens of a span differ


# --- what the model and its heads are given


def test_gather_masked():
    tokens = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
    chosen = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    positions, targets = gather_masked(tokens, chosen, 2)
    assert positions.tolist() == [[1, 3], [2, 0], [0, 0]]
    assert targets.tolist() == [[12, 14], [23, -100], [-100, -100]]
    assert positions.dtype == targets.dtype == torch.int64
    assert gather_masked(tokens, chosen, 3)[1].tolist() == [
        [12, 14, -100],
        [23, -100, -100],
        [-100, -100, -100],
    ]
    with pytest.raises(ValueError, match="2 chosen tokens: expected at most n = 1"):
        gather_masked(tokens, chosen, 1)


def test_gathered_positions_are_the_chosen_ones():
    tokens, continues, maskable = text_rows()
    chosen = choose(whole_words(continues), maskable, 19, seeded())
    positions, targets = gather_masked(tokens, chosen, 19)
    filled = targets != -100
    again = torch.zeros(B, T, dtype=torch.int64).scatter_add(1, positions, filled.long())
    assert torch.equal(again, chosen.long())
    assert torch.equal(targets[filled], tokens.gather(1, positions)[filled])
    assert (positions.diff(dim=1)[filled[:, 1:]] > 0).all()


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
    tokens, continues, maskable = text_rows()
    chosen = choose(units_of("span", tokens, continues), maskable, 37, seeded())
    left, right, place = span_boundaries(chosen)
    assert not chosen.gather(1, left)[chosen].any() and not chosen.gather(1, right)[chosen].any()
    assert (place > 0).equal(chosen)
    run = chosen.long().cumsum(1)
    assert torch.equal((run - run.gather(1, left))[chosen], place[chosen])  # all chosen in between


# --- pairs


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


# --- the generator


def a_batch(generator):
    tokens, continues, maskable = text_rows()
    tokens, labels = next_sentence(tokens, torch.full((B,), 50), generator)
    units = spans(whole_words(continues), generator)
    chosen = choose(units, maskable, 19, generator)
    return chosen, corrupt(tokens, chosen, MASK, ORDINARY, generator, units), labels


def test_a_batch_is_a_function_of_the_generators_state():
    torch.manual_seed(1)
    first = a_batch(seeded(5))
    torch.manual_seed(2)  # nothing is drawn from the global generator
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, a_batch(seeded(5)), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_the_next_draw_masks_other_tokens():
    """Dynamic masking: two independent choices of 19 in 125 share a fraction 19 / 125 of their tokens."""
    generator = seeded(5)
    first, second = a_batch(generator)[0], a_batch(generator)[0]
    shared = (first & second).sum() / first.sum()
    within(shared, 19 / 125, 4 / 19 / math.sqrt(B))  # 4: standard deviation of a row's shared tokens


def test_the_demonstration_runs(capsys):
    masking.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["each_token", "whole_words", "entities", "spans"]
    assert all(line.count(" _") == 5 for line in lines)
