"""Masking: what each kind masks together, and how often, against the papers' figures.

A statistic of fixed seeds may differ from its expectation by 5 standard errors: a deviation that chance shows
once in two million draws, and a wrong rate always.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARD
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import bert
import train
from bert import BERT
from data.tokenizer import Tokenizer, train_bpe
from language import masking
from language.encoder_inference import fill_mask, sequence
from language.masking import (
    SPECIAL_TOKENS,
    Config,
    choose,
    corrupt,
    each_token,
    entities,
    flops_per_token,
    gather_masked,
    loss,
    make_batch,
    spans,
    split,
    whole_words,
    wrap,
)
from language.sentence_pairs import next_sentence

B, T = 2000, 128
MASK, ORDINARY = 4, torch.arange(5, 1005)
SMALL = bert.Config(2, 4, 32, 48, vocab_size=300, max_seq_len=32)
ALBERT = {"d_embedding": 16, "share_layers": True, "mlp": "gelu_tanh", "pair": "sop"}
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))


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


# --- batches


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 296).with_special_tokens(SPECIAL_TOKENS)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = BERT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def windows_of(tokens, **others):
    """Rows as a data set has them."""
    arrays = {"tokens": tokens, **others}
    return [{name: t[i].numpy() for name, t in arrays.items()} for i in range(len(tokens))]


def batch_of(tokenizer, n_rows=4, **settings):
    tokens = torch.randint(290, (n_rows, 33), generator=seeded(5))
    return tokens, make_batch(windows_of(tokens), Config(**settings), seeded(1), tokenizer)


def restored(batch):
    """The rows as they were before corruption."""
    rows = batch["tokens"].flatten().clone()
    kept = batch["targets"] >= 0
    rows[batch["positions"][kept]] = batch["targets"][kept]
    return rows.view(batch["tokens"].shape)


@pytest.mark.parametrize("masking", ["token", "word", "span"])
def test_rows_are_the_windows_between_cls_and_sep(masking, tokenizer):
    tokens, batch = batch_of(tokenizer, masking=masking)
    rows = restored(batch)
    assert rows.shape == (4, 32) and (rows[:, 0] == tokenizer.cls_id).all()
    assert (rows[:, -1] == tokenizer.sep_id).all()
    assert torch.equal(rows[:, 1:-1], tokens[:, :30])
    assert not torch.equal(batch["tokens"], rows)
    assert "segments" not in batch
    assert batch["targets"].shape == (4, round(0.15 * 30))


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_have_two_segments(pair, tokenizer):
    tokens, batch = batch_of(tokenizer, n_rows=64, pair=pair)
    rows, labels = restored(batch), batch["pair_labels"]
    assert labels.float().mean() == pytest.approx(0.5, abs=0.2)  # three standard errors of 64 tosses
    for row, segments, window, label in zip(rows, batch["segments"], tokens, labels, strict=True):
        ends = (row == tokenizer.sep_id).nonzero().flatten().tolist()
        assert len(ends) == 2 and ends[1] == 31
        assert segments.tolist() == [0] * (ends[0] + 1) + [1] * (31 - ends[0])
        a, b, text = row[1 : ends[0]], row[ends[0] + 1 : 31], window[:29]
        if pair == "sop" and label:
            assert torch.equal(torch.cat([b, a]), text)
        else:
            assert torch.equal(a, text[: len(a)])
            assert torch.equal(b, text[len(a) :]) == (label == 0)


def test_entities_are_masked_as_a_whole(tokenizer):
    entities = torch.zeros(4, 33, dtype=torch.int64)
    entities[:, 10:13] = 1
    rows = windows_of(torch.randint(290, (4, 33)), entities=entities)
    seen = set()
    for seed in range(40):
        batch = make_batch(rows, Config(mask_rate=0.2), seeded(seed), tokenizer)
        for i in range(4):
            chosen = batch["positions"][i][batch["targets"][i] >= 0] - 32 * i
            seen.add(len(set(chosen.tolist()) & {11, 12, 13}))  # one further for [CLS]
    assert seen == {0, 3}


def test_special_tokens_of_the_text_are_never_targets(tokenizer):
    tokens = torch.randint(290, (8, 33))
    tokens[:, ::2] = tokenizer.eot_id
    batch = make_batch(windows_of(tokens), Config(), seeded(), tokenizer)
    assert not torch.isin(batch["targets"], torch.tensor(list(tokenizer.special_tokens.values()))).any()


def test_rows_with_nothing_to_mask_are_refused(tokenizer):
    with pytest.raises(ValueError, match="all special tokens"):
        make_batch(windows_of(torch.full((2, 33), tokenizer.eot_id)), Config(), seeded(), tokenizer)
    with pytest.raises(ValueError, match="rows of 3 tokens"):
        make_batch(windows_of(torch.zeros(1, 4).long()), Config(), seeded(), tokenizer)


def test_a_batch_is_a_function_of_its_generator(tokenizer):
    for changes in ({"pair": "nsp"}, {"masking": "span", "span_boundary": True}):
        first, again = batch_of(tokenizer, **changes)[1], batch_of(tokenizer, **changes)[1]
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("settings", [{}, {"pair": "nsp"}, {"masking": "span", "span_boundary": True}])
def test_parts_of_a_batch_count_places_in_their_own_rows(settings, tokenizer):
    _, batch = batch_of(tokenizer, **settings)
    model = wrapped(**settings)
    parts = [split(batch, i, 2) for i in range(2)]
    assert all(part.keys() == batch.keys() for part in parts)
    for name in batch:
        moved = 64 if name in ("positions", "left", "right") else 0  # tokens in the first part
        assert torch.equal(torch.cat([parts[0][name], parts[1][name] + moved]), batch[name])
    shares = [(part["targets"] >= 0).sum() / (batch["targets"] >= 0).sum() for part in parts]
    mean = sum(share * loss(model, part)[0] for share, part in zip(shares, parts, strict=True))
    assert mean.item() == pytest.approx(loss(model, batch)[0].item(), rel=1e-5)


# --- the loss


def wrapped(**settings):
    """The small model with the heads that these settings ask for, its outputs depending on every weight."""
    pair = settings.get("pair", "none")
    model = wrap(small(pair=pair), Config(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("cls.span_boundary."):
                p.add_(0.2 * torch.randn_like(p))
    return model


def test_the_loss_on_masked_places_is_the_loss_on_all_with_the_others_ignored(tokenizer):
    model, (_, batch) = small(), batch_of(tokenizer)
    labels = torch.full((4 * 32,), -100)
    labels[batch["positions"].flatten()] = batch["targets"].flatten()
    everywhere = F.cross_entropy(model(batch["tokens"]).flatten(0, 1).double(), labels)
    assert loss(model, batch)[0].item() == pytest.approx(everywhere.item(), rel=1e-6)


def test_the_span_boundary_objective_reads_the_boundaries_alone(tokenizer):
    settings = {"masking": "span", "span_boundary": True}
    model, (_, batch) = wrapped(**settings), batch_of(tokenizer, **settings)
    hidden = model.hidden(batch["tokens"]).detach().requires_grad_()
    flat = hidden.flatten(0, 1)
    model.cls.span_boundary(flat[batch["left"]], flat[batch["right"]], batch["place"]).sum().backward()
    touched = hidden.grad.flatten(0, 1).abs().sum(-1) > 0
    kept = batch["targets"] >= 0
    boundaries = torch.cat([batch["left"][kept], batch["right"][kept]])
    assert touched[boundaries].all()
    assert not touched[batch["positions"][kept]].any()
    # The loss on tokens is that of the same weights without this head.
    _, metrics = loss(model, batch)
    plain = {name: batch[name] for name in ("tokens", "positions", "targets")}
    assert metrics["mlm_loss"].item() == pytest.approx(loss(model, plain)[0].item(), rel=1e-6)


@pytest.mark.parametrize(
    "changes, settings",
    [({}, {}), (bert.MODERN, {}), (ALBERT, {"pair": "sop"}), ({}, {"span_boundary": True})],
)
def test_loss_at_the_start_is_that_of_guessing(changes, settings, tokenizer):
    torch.manual_seed(0)
    config = Config(**settings)
    model = wrap(BERT(replace(SMALL, **changes)), config)
    rows = windows_of(torch.randint(290, (8, 33)))
    start, _ = loss(model, make_batch(rows, config, seeded(), tokenizer))
    guesses = math.log(300) * (1 + config.span_boundary) + math.log(2) * (config.pair != "none")
    assert start.item() == pytest.approx(guesses, abs=0.1)


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({}, {}),
        ({"pair": "nsp"}, {"pair": "nsp"}),
        (ALBERT, {"pair": "sop"}),
        ({}, {"masking": "span", "span_boundary": True}),
    ],
)
def test_flops_formula_counts_the_matrix_products(changes, settings, tokenizer):
    config, T = Config(**settings), 32
    model = wrap(small(kernels="reference", **changes), config)
    batch = make_batch(windows_of(torch.randint(290, (3, T + 1))), config, seeded(), tokenizer)
    with FlopCounterMode(display=False) as counter:
        loss(model, batch)[0].backward()
    assert flops_per_token(model, config, T) == pytest.approx(counter.get_total_flops() / (3 * T), rel=1e-3)


# --- settings


def test_the_pair_objective_is_the_one_that_the_model_has_a_head_for():
    assert masking.settings(replace(SMALL, pair="sop")) == Config(pair="sop")
    assert masking.settings(SMALL) == Config()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask_rate": 1.5}, "mask_rate 1.5: expected between 0 and 1"),
        ({"masking": "letter"}, "masking 'letter': expected token or word or span"),
    ],
)
def test_impossible_settings_say_why(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_a_model_is_wrapped_for_its_objectives(tmp_path):
    with pytest.raises(ValueError, match=r"no masked-language-model head; train.py --set mlm_head=True"):
        wrap(small(mlm_head=False), Config())
    # A pooler that no objective uses would never get a gradient.
    assert not any(p.requires_grad for p in wrap(small(), Config()).bert.pooler.parameters())
    assert all(p.requires_grad for p in wrap(small(pair="nsp"), Config(pair="nsp")).parameters())
    # The head for span boundaries is begun like all other matrices, and is not saved.
    model = wrap(BERT(SMALL), Config(masking="span", span_boundary=True))
    spread = model.cls.span_boundary.dense1.weight.std().item()
    assert spread == pytest.approx(
        model.bert.encoder.layer[0].intermediate.dense.weight.std().item(), rel=0.1
    )
    model.save_pretrained(tmp_path)
    assert set(BERT.from_pretrained(tmp_path).cls) == {"predictions"}


# --- training


def training_flags(tmp_path, out, **changes):
    text = tmp_path / "text.txt"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    text.write_text("".join(f"{word} " * 60 + "\n" for _ in range(8) for word in words))
    options = dict(
        model="bert",
        data=text,
        tokenizer="bpe:296",
        steps=6,
        batch_size=2,
        seq_len=32,
        log_every=1,
        schedule="constant",
    )
    options |= dict(eval_every=3, out=out, cache=tmp_path / "cache") | changes
    return [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", *str(value).split())
    ]


def test_training_learns_and_transformers_opens_the_result(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setitem(bert.SIZES, "tiny", replace(SMALL, **bert.MODERN, d_ff=64))
    out = tmp_path / "run"
    assert train.main(training_flags(tmp_path, out, steps=150, eval_every=50, lr=0.003, batch_size=8)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "val_loss" in row]
    assert evaluations[-1]["val_accuracy"] > 0.3 > 0.1 > evaluations[0]["val_accuracy"]
    assert "bits_per_byte" not in evaluations[-1]  # of a text of which a part is predicted
    assert "accuracy" in (out / "samples.txt").read_text() and "guessed" in (out / "samples.txt").read_text()

    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    model, tokenizer = BERT.from_pretrained(out / "model").eval(), Tokenizer.load(out / "model")
    text = "one one [MASK] one öne"
    ids = their_tokenizer(text).input_ids
    assert ids == sequence(tokenizer, text, model.config)
    with torch.no_grad():
        difference = (theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max()
    assert difference < 1e-5
    filled = transformers.pipeline("fill-mask", model=theirs, tokenizer=their_tokenizer)(text, top_k=1)
    assert filled[0]["score"] == pytest.approx(fill_mask(model, tokenizer, text, k=1)[0][0][1], rel=1e-4)


@pytest.mark.parametrize(
    "fields", ["pair=nsp", "pair=sop mask_rate=0.3 masking=word", "masking=span span_boundary=True"]
)
def test_every_objective_trains_and_resumes_exactly(fields, tmp_path, monkeypatch):
    monkeypatch.setitem(bert.SIZES, "tiny", SMALL)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(training_flags(tmp_path, whole, set=fields, steps=9)) == 0
    assert train.main([*training_flags(tmp_path, parts, set=fields, steps=6), "--save-every", "3"]) == 0
    again = [*training_flags(tmp_path, parts, set=fields, steps=9), "--save-every", "3", "--resume"]
    assert train.main(again) == 0
    a, b = (load_file(out / SHARD) for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_goes_on_from_a_checkpoint_and_may_add_an_objective(tokenizer, tmp_path):
    small().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    flags = training_flags(
        tmp_path, tmp_path / "run", init_from=tmp_path / "model", tokenizer=tmp_path / "model"
    )
    assert train.main([*flags, "--set", "pair=sop"]) == 0
    assert BERT.from_pretrained(tmp_path / "run" / "model").config.pair == "nsp"  # the same head


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"set": "nonsense=3"}, "--set nonsense=3: expected FIELD=VALUE with a field of n_layers"),
        ({"set": "mask_rate=2"}, "--set mask_rate=2: mask_rate 2: expected between 0 and 1"),
        ({"set": "kernels=triton"}, "--set kernels=triton: --tokenizer, --seq-len and --kernels decide this"),
        ({"set": "pre_norm=True"}, "no Hugging Face architecture has these features together"),
        ({"set": "n_heads=0"}, "n_heads 0: expected at least 1"),
        ({"set": "n_layers=one"}, "--set n_layers=one: expected a value such as 2"),
        ({"set": "pair=nsp", "document_mask": ""}, "--document-mask"),
        ({"seq_len": 3}, "rows of 3 tokens"),
    ],
)
def test_what_cannot_be_trained_says_why(changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bert.SIZES, "tiny", SMALL)
    assert train.main(training_flags(tmp_path, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and message in said
