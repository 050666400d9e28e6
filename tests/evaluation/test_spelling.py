"""Spelling: questions are right, held-out words are held out, and a space that moves costs what it should."""

import math
import random

import pytest
import torch

from data.tokenizer import get_tokenizer
from evaluation import spelling
from evaluation.small_runs import small_gpt

WORDS = ("parser", "error", "value", "input", "class", "banana", "module", "sorted", "print", "index") * 3


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the words of the library be few: reading all of it takes seconds."""
    words = {f"{word}{'abc'[i // 10]}"[:6]: 30 - i for i, word in enumerate(WORDS)}
    monkeypatch.setattr(spelling, "words", lambda: words)
    monkeypatch.setattr(spelling, "N_VOCAB", 300)
    spelling.tokenizer.cache_clear()
    yield
    spelling.tokenizer.cache_clear()


def test_the_questions_have_the_right_answers():
    draws = random.Random(0)
    asked = {name: question("parser", draws) for name, question in spelling.QUESTIONS.items()}
    assert asked["spell, word to letters"] == ("spell parser =", " p a r s e r")
    assert asked["reverse, word to word"] == ("turn parser =", " resrap")
    assert asked["reverse, word to letters"] == ("back parser =", " r e s r a p")
    assert asked["reverse, letters to letters"] == ("back p a r s e r =", " r e s r a p")
    answers = set()
    for _ in range(200):
        prompt, right = spelling.count("banana", "b a n a n a", draws)
        assert prompt.endswith(" in b a n a n a =") and "banana".count(prompt.split()[1]) == int(right)
        answers.add(right)
    assert answers == {" 0", " 1", " 2", " 3"}


def test_words_are_held_out_and_answers_alone_are_predicted():
    learned, held_out = spelling.split(0)
    assert sorted(learned + held_out) == sorted(spelling.words()) and not set(learned) & set(held_out)
    assert spelling.split(0)[1] != spelling.split(3)[1]
    pairs = [question(word, random.Random(0)) for word in learned for question in spelling.QUESTIONS.values()]
    batch = spelling.batch_of(pairs)
    for (prompt, right), tokens, targets in zip(pairs, batch["tokens"], batch["targets"], strict=True):
        assert spelling.tokenizer().decode(targets[targets >= 0].tolist()) == f"{right}\n"
        n = int((targets >= 0).int().argmax()) + 1
        assert spelling.tokenizer().decode(tokens[:n].tolist()) == prompt


def test_a_moved_space_is_no_longer_predicted():
    # A model that finds all bytes equally likely saves the nats of one byte.
    tokenizer = get_tokenizer("bytes")
    model = small_gpt(tokenizer.n_vocab, 64, 0, width=32).eval()
    torch.nn.init.zeros_(model.head_weight)
    nats = spelling.trailing_space(model, tokenizer, [("the end", " of"), ("a", " word")])
    one = math.log(tokenizer.n_vocab)
    assert nats["in the answer"] == pytest.approx(4 * one, rel=1e-5)
    assert nats["in the prompt"] == pytest.approx(3 * one, rel=1e-5)

    text = "word and " * 100
    places = spelling.borders(text, 5)
    assert len(places) == 5 and all(after in (" word", " and") for _, after in places)
    assert all(before + after in text and len(before) == spelling.N_BEFORE for before, after in places)


def test_the_command_prints_every_question_and_measures_a_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(spelling, "BATCH", 4)
    spelling.main(["--steps", "1"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*spelling.QUESTIONS, *spelling.COLUMNS))

    tokenizer = get_tokenizer("bytes")
    small_gpt(tokenizer.n_vocab, 32, 0, width=32).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    monkeypatch.setattr(spelling, "held_out_modules", lambda: [("m", "some words in a row " * 30)])
    monkeypatch.setattr(spelling, "N_BORDERS", 3)
    spelling.main(["--model", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in printed] == [
        ["space", "in", "the", "answer"], ["space", "in", "the", "prompt"],
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--seeds", "--steps"])
def test_flags_of_training_beside_a_trained_model_are_refused(flag, tmp_path):
    with pytest.raises(ValueError, match="leave out --seeds and --steps"):
        spelling.main(["--model", str(tmp_path), flag, "2"])
