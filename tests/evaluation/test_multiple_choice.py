"""Scoring of choices: log-likelihoods and metrics beside lm-evaluation-harness, borders, cuts, statistics."""

import json
import math
from pathlib import Path

import pytest
import scipy.stats
import torch
from small_variants import shake

import gpt
from attention_variants import latent
from evaluation import multiple_choice
from evaluation.multiple_choice import (
    Item,
    answer_items,
    compare,
    load,
    log_likelihoods,
    rows_of,
    standard_error,
)
from evaluation.published import read, with_examples
from evaluation.stdlib_suite import dull_baselines

FIXTURE = Path(__file__).parents[1] / "fixtures/harness"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
RULES = {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_bytes", "acc_mutual_info": "acc_mutual_info"}


@pytest.fixture(scope="module")
def model():
    return load(FIXTURE)


def task(name, n_shots=0):
    found = read(str(FIXTURE / f"{name}.jsonl"))
    return with_examples(found, found.items, n_shots)


def harness_log_p(name):
    """Return the log-likelihoods of each item's choices by the harness, and those behind nothing."""
    found = [[log_p for log_p, _ in item] for item in EXPECTED[name]["responses"]]
    return [(row[: len(row) // 2], row[len(row) // 2 :]) for row in found]


@pytest.mark.parametrize("name", ["hellaswag", "arc", "mmlu"])
def test_log_likelihoods_and_metrics_are_those_of_the_harness(name, model):
    answers = answer_items(*model, task(name).items, batch_size=5)
    for answer, (log_p, alone) in zip(answers, harness_log_p(name), strict=True):
        assert answer.log_p == pytest.approx(log_p, abs=1e-4)
        assert answer.log_p_alone == pytest.approx(alone, abs=1e-4)
    for rule in RULES:
        assert multiple_choice.accuracy(answers, rule)[0] == EXPECTED[name]["metrics"][rule]


def test_two_examples_in_front_give_the_harness_s_figure(model):
    # The harness puts the first two questions in front of themselves too, so only the last one compares.
    answer = answer_items(*model, task("mmlu", 2).items[2:])[0]
    assert answer.log_p == pytest.approx(harness_log_p("mmlu_two_shots")[2][0], abs=1e-4)
    assert answer.n_cut > 0


def test_where_a_token_spans_the_border_choices_are_scored_from_one_place(model):
    net, tokenizer = model
    items, theirs = [x._replace(delimiter="") for x in task("choices").items], harness_log_p("choices")
    answers = answer_items(net, tokenizer, items)
    # The first context ends in a space, which both move to the choice; both cut the third on the left.
    assert answers[0].log_p == pytest.approx(theirs[0][0], abs=1e-4)
    assert answers[2].log_p == pytest.approx(theirs[2][0], abs=1e-4) and answers[2].n_cut > 0

    # The second ends inside a token. The harness then scores, behind the context's own ids, the ids of the
    # joined text from that number on, which is no tokenisation of the text: both figures.
    joined = [tokenizer.encode(items[1].context + choice) for choice in items[1].choices]
    alone = tokenizer.encode(items[1].context)
    assert any(tokens[: len(alone)] != alone for tokens in joined)
    shared = min(multiple_choice.n_shared(alone, tokens) for tokens in joined)
    with torch.no_grad():
        for tokens, log_p in zip(joined, answers[1].log_p, strict=True):
            log_probabilities = net(torch.tensor([tokens]))[0].log_softmax(-1)
            right = log_probabilities[range(shared - 1, len(tokens) - 1), tokens[shared:]].sum().item()
            assert log_p == pytest.approx(right, abs=1e-4)
    assert answers[1].log_p != pytest.approx(theirs[1][0], abs=1e-1)


def test_a_word_is_right_if_greedy_decoding_writes_it_as_in_the_harness(model):
    net, tokenizer = model
    rows = [rows_of(tokenizer, x.context, [" " + x.choices[0]], 96)[0] for x in task("lambada").items]
    scores = log_likelihoods(net, rows, 2)
    theirs = [item[0] for item in EXPECTED["lambada"]["responses"]]
    assert [score.log_p for score in scores] == pytest.approx([log_p for log_p, _ in theirs], abs=1e-4)
    assert [score.is_greedy for score in scores] == [is_greedy for _, is_greedy in theirs]


def test_an_item_has_the_same_log_likelihoods_in_batches_of_any_size(model):
    items = [item for name in ("hellaswag", "arc", "choices") for item in task(name).items]
    whole, single = (answer_items(*model, items, batch_size=n) for n in (64, 1))
    for a, b in zip(whole, single, strict=True):
        assert a.log_p == pytest.approx(b.log_p, rel=1e-6, abs=1e-6) and a.picks == b.picks
        assert a.log_p_alone == pytest.approx(b.log_p_alone, rel=1e-6, abs=1e-6)


def test_the_choices_of_a_question_share_one_pass_over_its_context(model, monkeypatch):
    net, tokenizer = model
    seen, hidden = [], net.hidden

    def counted(tokens, **options):
        seen.append(tuple(tokens.shape))
        return hidden(tokens, **options)

    monkeypatch.setattr(net, "hidden", counted)
    items = task("arc").items[:1]
    together = answer_items(net, tokenizer, items, alone=False)
    length = len(tokenizer.encode(items[0].context))
    assert seen[0] == (1, length) and seen[1][0] == 4 and len(seen) == 2 and length > multiple_choice.SHARED
    # Continuations of one token are predicted by the context alone.
    seen.clear()
    log_likelihoods(net, [multiple_choice.Row([*range(40), token], 40, 0) for token in (1, 2, 3)], 16)
    assert seen == [(1, 40)]
    monkeypatch.setattr(multiple_choice, "SHARED", 10**9)
    apart = answer_items(net, tokenizer, items, alone=False)
    assert together[0].log_p == pytest.approx(apart[0].log_p, rel=1e-6)


def test_contexts_of_similar_length_share_one_pass_and_no_score_changes(model, monkeypatch):
    net, _ = model
    seen, hidden = [], net.hidden

    def counted(tokens, **options):
        seen.append(tuple(tokens.shape))
        return hidden(tokens, **options)

    monkeypatch.setattr(net, "hidden", counted)
    contexts = [[*range(40)], [*range(3, 46)], [*range(5, 65)]]
    ends = ([1, 2, 3], [4], [5, 6])
    rows = [multiple_choice.Row(context + end, len(context), 0) for context in contexts for end in ends]
    scores = log_likelihoods(net, rows, 16)
    # The two short contexts are cut to 40 tokens; what the longer one has more is read with each choice.
    assert seen == [(1, 60), (3, 2), (2, 40), (6, 5)]
    seen.clear()
    log_likelihoods(net, rows, 5)  # a batch has no room for the choices of two
    assert seen == [(1, 60), (3, 2), (1, 43), (3, 2), (1, 40), (3, 2)]
    monkeypatch.setattr(multiple_choice, "SHARED", 10**9)
    for score, apart in zip(scores, log_likelihoods(net, rows, 16), strict=True):
        assert score.log_p == pytest.approx(apart.log_p, rel=1e-6) and score[1:] == apart[1:]


@pytest.mark.parametrize("kind", ["latent attention", "a window of four"])
def test_other_decoders_share_a_context_and_no_score_changes(kind, monkeypatch):
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 32, "vocab_size": 61, "max_seq_len": 64}
    if kind == "latent attention":
        net = shake(latent.Model(latent.Config(**shape, kv_rank=8, d_nope=8, d_rope=4, d_value=8)))
    else:
        net = shake(gpt.GPT(gpt.Config(**shape, window=4)))
    rows = [
        multiple_choice.Row([*range(n), *end], n, 0) for n in (20, 22) for end in ([5, 6, 7], [8], [9, 10])
    ]
    together = log_likelihoods(net, rows, 16)
    monkeypatch.setattr(multiple_choice, "SHARED", 10**9)
    for score, apart in zip(together, log_likelihoods(net, rows, 16), strict=True):
        assert score.log_p == pytest.approx(apart.log_p, rel=1e-5) and score[1:] == apart[1:]


def test_each_rule_divides_by_its_own_length():
    picks = multiple_choice.pick(["é" * 4, "abcdef", "a"], [-8.0, -9.0, -4.0], [1, 3, 1], [-1.0, -9.5, -1.0])
    assert picks == {"acc": 2, "acc_norm": 1, "acc_bytes": 0, "acc_tokens": 1, "acc_mutual_info": 1}


def test_of_a_choice_longer_than_the_model_reads_the_end_is_scored_and_an_empty_one_is_refused(model):
    net, tokenizer = model
    (row,) = rows_of(tokenizer, "the", [" dog" * 200], 96)
    assert row.tokens == tokenizer.encode("the" + " dog" * 200)[-97:] and row.start == 1 and row.n_cut > 0
    with pytest.raises(ValueError, match="choice '' behind 'the': no token to score"):
        rows_of(tokenizer, "the", [""], 96)
    with pytest.raises(ValueError, match=r"choices \('dog', ''\) behind 'the': expected text in each"):
        answer_items(net, tokenizer, [Item("the", ("dog", ""), 0)])


def test_standard_errors_are_those_of_the_sample_and_of_clusters():
    values = [1.0, 0.0, 1.0, 1.0]
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values))
    assert math.isnan(standard_error([1.0]))
    # Twice the same items is no new evidence: within groups the error stays that of the four.
    twice, groups = values * 2, list("abcd") * 2
    assert standard_error(twice, groups) == pytest.approx(scipy.stats.sem(values))
    assert standard_error(twice) < standard_error(twice, groups)


def test_the_comparison_of_two_models_is_mcnemar_s():
    a, b = [1, 1, 1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1, 1, 1, 0, 1]
    difference, error, p = compare(a, b)
    assert difference == pytest.approx(0.4)
    assert error == pytest.approx(scipy.stats.sem([y - x for x, y in zip(a, b, strict=True)]))
    assert p == pytest.approx(scipy.stats.binomtest(1, 6).pvalue)
    assert compare(a, a)[2] == 1.0


def test_chance_and_the_dull_baselines_follow_from_the_items():
    items = [Item("the dog", ("a dog", "b"), 0), Item("cat", ("a", "bb", "cat c", "d"), 2)]
    assert multiple_choice.chance(items) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert dull_baselines(items) == {
        "same place": 0.5,
        "longest": 1.0,
        "most shared words": 1.0,
    }


def test_the_demonstration_shows_each_rule(capsys):
    multiple_choice.main([str(FIXTURE)])
    printed = capsys.readouterr().out
    assert all(f"\n{rule} " in printed for rule in multiple_choice.RULES) and "chance 0.25" in printed
