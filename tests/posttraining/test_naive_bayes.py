"""Naive Bayes by hand, on texts that words decide, and from a file; and the split that it shares."""

import json
from collections import Counter

import numpy as np
import pytest

from data.labelled import hold_out
from posttraining import naive_bayes

EXAMPLES = [("good good film", "+"), ("bad film", "-"), ("Bad, dull", "-")]


def test_the_probabilities_are_those_by_hand():
    model = naive_bayes.fit(EXAMPLES)
    assert model.labels == ["+", "-"]
    assert model.prior == pytest.approx(np.log([1 / 3, 2 / 3]))
    # The vocabulary: good, film, bad, a comma, dull. Texts of + have 3 words, those of - have 5.
    assert len(model.words) == 5
    assert model.words["good"] == pytest.approx(np.log([3 / 8, 1 / 10]))
    assert model.words["bad"] == pytest.approx(np.log([1 / 8, 3 / 10]))
    assert model.words[","] == pytest.approx(np.log([1 / 8, 2 / 10]))
    assert np.exp(sum(np.exp(p) for p in model.words.values())) == pytest.approx(np.exp(np.ones(2)))


def test_the_likeliest_label_is_predicted_and_new_words_count_for_nothing():
    model = naive_bayes.fit(EXAMPLES)
    assert naive_bayes.predict(model, "good") == "+"  # 1/3 * 3/8 against 2/3 * 1/10
    assert naive_bayes.predict(model, "unheard of") == "-"  # the more frequent label
    assert naive_bayes.predict(model, "") == "-"
    assert naive_bayes.telling_words(model, 1) == {"+": ["good"], "-": ["bad"]}
    assert naive_bayes.accuracy(EXAMPLES, [("good", "+"), ("good", "-")]) == 0.5


def test_scikit_learn_predicts_the_same():
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 6)) for _ in range(60)]
    examples = [(text, str(i % 3)) for i, text in enumerate(texts)]
    counts = [[text.split().count(word) for word in "abcdefgh"] for text in texts]
    theirs = sklearn.MultinomialNB().fit(counts, [label for _, label in examples])
    ours = naive_bayes.fit(examples)
    assert [naive_bayes.predict(ours, text) for text in texts] == theirs.predict(counts).tolist()


def test_a_tenth_is_held_out_but_no_label_loses_its_only_text():
    examples = [(str(i), "rare" if i < 2 else "often") for i in range(40)]
    train, held_out = hold_out(examples)
    assert [text for text, _ in held_out] == ["0", "2", "3", "4"]  # of the two rare ones only the first
    assert sorted(train + held_out) == sorted(examples) and Counter(dict(train).values()).keys()
    assert {label for _, label in train} == {"rare", "often"}


def test_the_most_frequent_label_is_that_of_the_examples_and_not_of_the_held_out_texts():
    held_out = [("good", "+")] * 3 + [("bad", "-")]
    assert "always the most frequent label: 25.0% of" in naive_bayes.simple_guesses(EXAMPLES, held_out)[1]


def test_the_command_prints_its_accuracy_beside_the_most_frequent_label(tmp_path, capsys):
    lines = [{"text": f"{i} {('good', 'bad')[i % 2]}", "label": "+-"[i % 2]} for i in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    naive_bayes.main([str(tmp_path / "x.jsonl")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("54 texts, 6 held out; labels +, -; so few that each is 16.7%")
    assert out[1].startswith("always the most frequent label: ")
    assert out[2] == "naive Bayes on word counts: 100.0% of the held out"
    assert out[3].split()[:2] == ["+", "good"] and out[4].split()[:2] == ["-", "bad"]
