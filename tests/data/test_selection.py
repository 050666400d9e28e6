"""Rules of selection: which documents stay is what the formulas say, and the same for every order."""

import numpy as np
import pytest

from data import selection

TEXTS = [f"document {i}" for i in range(20_000)]


def test_pareto_keeps_a_document_as_often_as_gpt_3s_line_of_numpy_does():
    # Brown et al. 2020, appendix A: keep if np.random.pareto(9) > 1 - score. The chance is (2 - score)^-9.
    uniform, generator = selection.draws(TEXTS, seed=0), np.random.default_rng(0)
    for score in (0.0, 0.5, 0.9, 1.0):
        chance = (2 - score) ** -9
        sigma = max(1e-9, (chance * (1 - chance) / len(TEXTS)) ** 0.5)
        ours = selection.kept("pareto=9", np.full(len(TEXTS), score), uniform).mean()
        numpys = (generator.pareto(9, len(TEXTS)) > 1 - score).mean()
        assert abs(ours - chance) < 4 * sigma and abs(numpys - chance) < 4 * sigma


def test_draws_of_pareto_are_the_inverse_of_its_distribution():
    uniform = np.array([0.0, 0.5, 0.999, 1 - 2.0**-53])
    found = selection.pareto(uniform, 9.0)
    assert np.allclose(1 - (1 + found) ** -9.0, uniform, rtol=0, atol=1e-15)  # P(X <= x) of Pareto(9)


def test_draws_are_uniform_and_depend_on_text_and_seed_alone():
    uniform = selection.draws(TEXTS, seed=0)
    assert np.array_equal(selection.draws(TEXTS[::-1], seed=0), uniform[::-1])
    assert not np.array_equal(selection.draws(TEXTS, seed=1), uniform)
    assert uniform.min() >= 0 and uniform.max() < 1
    # The largest distance of the distribution from a straight line, at the 1 % border of Kolmogorov.
    distance = np.abs(np.sort(uniform) - np.arange(len(TEXTS)) / len(TEXTS)).max()
    assert distance < 1.63 / len(TEXTS) ** 0.5


def test_thresholds_shares_and_thirds_keep_what_they_say():
    scores = np.array([0.3, np.nan, 0.1, 0.3, 0.9, 0.2, np.inf])

    def kept(rule: str) -> list[int]:
        return np.flatnonzero(selection.kept(rule, scores, np.zeros(7))).tolist()

    assert kept("least=0.3") == [0, 3, 4] and kept("most=0.3") == [0, 2, 3, 5]
    assert kept("top=0.4") == [0, 4]  # of the two with .3 the first
    assert kept("lowest=0.6") == [0, 2, 5] and kept("top=1") == [0, 2, 3, 4, 5]
    # Each document with a score is in one third.
    assert kept("head") == [2, 5] and kept("middle") == [0] and kept("tail") == [3, 4]


def test_reasons_name_the_rule():
    assert selection.reason("pareto=9", 0.1) == "not drawn, Pareto(9)"
    assert selection.reason("least=3", 2.0) == "score below 3"
    assert selection.reason("top=0.1", 2.0) == "not in the top 0.1 of scores"
    assert selection.reason("head", 2.0) == "not in the head of scores"
    assert selection.reason("head", float("nan")) == "no finite score"


@pytest.mark.parametrize(
    "rule, problem",
    [
        ("best", "expected pareto=ALPHA"),
        ("head=2", "expected pareto=ALPHA"),
        ("top", "expected pareto=ALPHA"),
        ("top=0", "a share above 0"),
        ("lowest=1.5", "a share above 0"),
        ("pareto=-1", "a number above 0"),
        ("least=nan", "a finite number"),
        ("most=much", "'much' is no number"),
    ],
)
def test_a_wrong_rule_is_refused(rule, problem):
    with pytest.raises(ValueError, match=problem):
        selection.parse(rule)


def test_pareto_refuses_scores_that_are_no_probabilities():
    with pytest.raises(ValueError, match="scores from 0 to 1, found 17"):
        selection.kept("pareto=9", np.array([0.5, 17.0]), np.zeros(2))
