"""Generate and verify: what each rule submits, the figures, and a verifier that learns."""

import random

import pytest

from evaluation import generate_and_verify
from evaluation.expressions import parse
from evaluation.functions_to_find import VOCABULARY, draw_examples, draw_programs, question
from evaluation.generate_and_verify import (
    RULES,
    Candidate,
    Problem,
    candidates,
    first_right,
    measure,
    share_solved,
    train_verifier,
    verify,
)
from evaluation.small_models import Answer, small_gpt

FOUND = draw_examples(parse("x[::-1]"), 23, random.Random(0))
# The examples do not tell x[::-1] from an expression that sorts.
PROBLEM = Problem("x[::-1]", [([3, 2], [2, 3]), ([5, 1], [1, 5])], FOUND)


def samples(counts: dict[str, tuple[int, float]]) -> list[Answer]:
    """Return samples: text -> (how often, log-probability)."""
    return [Answer(tuple(VOCABULARY.encode(text)), x) for text, (n, x) in counts.items() for _ in range(n)]


def submitted(rule: str, found: list[Candidate]) -> list[str]:
    return [c.text.replace(" ", "") for c in RULES[rule](found, random.Random(0))]


def test_programs_are_filtered_by_examples_and_clustered_by_what_they_compute():
    drawn = samples({
        "sorted(x)": (3, -1.0), "x[::-1]": (2, -2.0), "(x[::-1] + x[1:][1:][1:])[::-1][::-1]": (1, -5.0),
        "x[::-1][::-1][::-1]": (2, -3.0), "x": (9, -0.5), "x x": (5, -0.7), "len(x)": (1, -4.0),
    })  # fmt: skip
    generated = [x for x, _ in FOUND[:5]]
    found = candidates(PROBLEM, drawn, generated, {})
    assert sum(c.count for c in found) == 23 and len(found) == 7
    assert {c.text.replace(" ", "") for c in found if c.right} == {"x[::-1]", "x[::-1][::-1][::-1]"}
    assert submitted("likeliest", found)[:3] == ["x", "xx", "sorted(x)"]
    assert submitted("filter, likeliest", found)[:3] == ["sorted(x)", "x[::-1]", "x[::-1][::-1][::-1]"]
    # Two programs that reverse are one cluster of four samples, before the three samples that sort.
    assert submitted("filter, cluster", found)[:2] == ["x[::-1]", "sorted(x)"]
    assert submitted("cluster", found)[:2] == ["x", "x[::-1]"] and "xx" not in submitted("cluster", found)
    assert first_right(found, "filter, cluster", random.Random(0)) == 1
    assert first_right(found, "filter, likeliest", random.Random(0)) == 2


def test_random_submissions_are_drawn_like_samples():
    found = [Candidate("a", 9, 0.0, True, "", True), Candidate("b", 1, 0.0, True, "", False)]
    generator = random.Random(0)
    firsts = [RULES["random"](found, generator)[0].text for _ in range(2000)]
    assert firsts.count("a") / 2000 == pytest.approx(0.9, abs=0.02)


def test_the_figures_of_a_problem_use_the_first_k_samples():
    drawn = samples({"sorted(x)": (2, -1.0), "x[::-1]": (2, -2.0)})
    row = measure(PROBLEM, drawn, (2, 4), 0, {})
    assert row["right"] == 2 and row["passing"] == 4 and row["pass_at"][2] == pytest.approx(5 / 6)
    assert row["ranks"][2]["filter, cluster"] is None and row["ranks"][4]["filter, likeliest"] == 2
    assert share_solved([row], "filter, likeliest", 4, 1) == 0 and share_solved(
        [row], "filter, likeliest", 4, 10
    )


def test_a_verifier_learns_which_programs_are_right_and_from_shuffled_labels_it_does_not():
    # Right is a program that takes the length, whatever the question.
    read = question([([1, 2], 2)])
    programs = [tuple(VOCABULARY.encode(text)) for text in ("len(x)", "len(x[1:])", "sum(x)", "max(x)")]
    rows = [((read, list(program)), i < 2) for i, program in enumerate(programs)] * 8
    writer = small_gpt(VOCABULARY, 32, seed=0, layers=1, width=24)
    odds = verify(train_verifier(writer, rows, 50, seed=0, lr=1e-2), read, programs)
    assert min(odds[:2]) > 0.5 and max(odds[2:]) < -0.5
    shuffled = verify(train_verifier(writer, rows, 50, seed=0, shuffled=True, lr=1e-2), read, programs)
    assert max(map(abs, shuffled)) < max(map(abs, odds)) / 2
    with pytest.raises(ValueError, match="right and wrong programs"):
        train_verifier(writer, rows[:2], 1, seed=0)


def test_the_command_prints_each_rule_for_the_model_and_for_the_grammar(capsys, monkeypatch):
    few = draw_programs(150, random.Random(0))
    monkeypatch.setattr(generate_and_verify, "draw_programs", lambda n, generator: few)
    monkeypatch.setattr(generate_and_verify, "train_verifier", lambda writer, rows, *_: rows and writer)
    generate_and_verify.main(["--steps", "2", "--problems", "2", "--samples", "12", "--verifier-steps", "1"])
    printed = capsys.readouterr().out
    assert printed.count("filter, cluster") == 2 and printed.count("verifier") == 2
    assert "k = 12" in printed and "the filter removes" in printed
    for words, least in ((["--samples", "0"], 1), (["--verifier-steps", "-1"], 0)):
        with pytest.raises(SystemExit):
            generate_and_verify.main(words)
        assert f"{' '.join(words)}: expected at least {least}" in capsys.readouterr().err
