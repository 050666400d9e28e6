"""BLEU and ROUGE-1 against sacrebleu and rouge_score (recorded)."""

import json
from pathlib import Path

import pytest

from language.overlap import bleu, main, rouge_1

CORPORA = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "overlap" / "expected.json").read_text("utf-8")
)


@pytest.mark.parametrize("i", range(len(CORPORA)))
def test_both_figures_are_those_of_the_published_packages(i):
    corpus = CORPORA[i]
    assert bleu(corpus["outputs"], corpus["references"]) == pytest.approx(corpus["bleu"], abs=1e-9)
    found = list(map(rouge_1, corpus["outputs"], corpus["references"]))
    assert found == pytest.approx(corpus["rouge_1"], abs=1e-12)


def test_the_recorded_corpora_are_not_trivial():
    scores = [corpus["bleu"] for corpus in CORPORA]
    assert sum(0 < score < 99 for score in scores) >= 4 and 0.0 in scores


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(
        ValueError, match="2 translations and 1 references: expected one reference for each translation"
    ):
        bleu(["a", "b"], ["a"])


def test_the_demonstration_prints_the_reference_as_perfect(capsys):
    main()
    assert capsys.readouterr().out.startswith("BLEU 100.0   ROUGE-1 1.00")
