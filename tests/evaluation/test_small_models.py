"""Small models: their vocabulary, what they are trained on, and many answers to one prompt."""

import pytest
import torch

from evaluation import small_models
from evaluation.small_models import Vocabulary, answers, make_batch, small_gpt

WORDS = Vocabulary(["sum(x[::-1]) == 12 -> [1:]"])


@pytest.fixture(scope="module")
def model():
    return small_gpt(WORDS, 32, seed=0, layers=1, width=24).eval()


def test_a_text_is_its_pieces_and_an_unknown_one_is_refused():
    assert WORDS.pieces == ["<end>", "sum(", "x", "[::-1]", ")", "==", "12", "->", "[1:]"]
    assert WORDS.decode(WORDS.encode("sum(x) == 12")) == "sum( x ) == 12"
    with pytest.raises(ValueError, match="'13' of 'x == 13': not in the vocabulary"):
        WORDS.encode("x == 13")


def test_only_what_is_written_is_a_target():
    batch = make_batch([([1, 2, 3], [4, 0]), ([5], [6])])
    assert batch["tokens"].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-100, -100, 4, 0], [6, -100, -100, -100]]


def test_the_probability_of_an_answer_is_that_of_its_tokens_in_one_pass(model):
    prompts = [[1, 2], [3, 4, 5, 6, 7], [8]]
    found = answers(model, prompts, 20, 6, torch.Generator().manual_seed(0), temperature=0.7)
    assert [len(part) for part in found] == [20, 20, 20]
    lengths = set()
    for prompt, part in zip(prompts, found, strict=True):
        for answer in part:
            whole = [*prompt, *answer.tokens, *([0] if len(answer.tokens) < 6 else [])]
            log_p = model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
            expected = sum(log_p[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))
            assert answer.log_p == pytest.approx(expected, abs=1e-4)
            lengths.add(len(answer.tokens))
    assert len(lengths) > 3  # some end early


def test_greedy_answers_are_those_of_generate(model):
    prompts = [[1, 2], [3, 4, 5, 6, 7]]
    found = answers(model, prompts, 2, 8, torch.Generator(), temperature=0)
    expected = model.generate(prompts, 8, temperature=0.0, stop=0)
    for part, tokens in zip(found, expected, strict=True):
        assert [list(answer.tokens) for answer in part] == 2 * [[t for t in tokens if t]]


def test_training_lowers_the_loss_and_returns_it(model):
    rows = [([2, n], [n, 0]) for n in range(1, 9)]
    learner = small_gpt(WORDS, 8, seed=0, layers=1, width=24)
    with torch.no_grad():
        before = learner.loss(make_batch(rows))[0].item()
    after = small_models.fit(learner, lambda: rows, 80, lr=1e-2)
    assert before > 2 and after < 0.2 and not learner.training
    (found,) = answers(learner, [[2, 5]], 1, 3, torch.Generator(), temperature=0)
    assert found[0].tokens == (5,)


def test_the_demonstration_prints_answers(monkeypatch, capsys):
    monkeypatch.setattr(small_models, "fit", lambda model, rows, steps: float(bool(rows())))
    small_models.main([])
    assert capsys.readouterr().out.count("of 5 answers right") == 3
