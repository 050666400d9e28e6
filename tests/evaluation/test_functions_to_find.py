"""Functions to find: examples belong to their program, and a held-out function is no training function."""

import random

from evaluation import functions_to_find
from evaluation.expressions import evaluate, parse
from evaluation.functions_to_find import VOCABULARY, draw_problems, draw_programs, output, question, solves

TRAINING, TEST = draw_programs(400, random.Random(0))


def test_held_out_functions_are_different_and_none_is_that_of_a_training_program():
    def values(text):
        return tuple(str(output(parse(text), x)) for x in functions_to_find.PROBES)

    held_out = [values(text) for text in TEST]
    assert len(TRAINING) + len(TEST) == 400 and len(TEST) > 20
    assert len(set(held_out)) == len(held_out) and not set(held_out) & {values(text) for text in TRAINING}


def test_a_problem_has_the_outputs_of_its_program_and_a_question_shows_them():
    problems = draw_problems(TEST, 10, random.Random(1))
    assert len({problem.program for problem in problems}) == 10
    for problem in problems:
        assert len(problem.examples) == 3 and len(problem.hidden) == 20
        for x, y in problem.examples + problem.hidden:
            assert evaluate(problem.program, {"x": x}) == y
        assert solves(parse(problem.program), problem.examples) and not solves(parse("9"), problem.examples)
        shown = VOCABULARY.decode(question(problem.examples))
        x, y = problem.examples[0]
        assert shown.startswith(f"[ {' '.join(map(str, x))} ] ->") and shown.count(";") == 3


def test_values_that_a_question_cannot_show_are_none():
    x = [9, 9]
    texts = ("x * 2", "sum(x) * 9", "x + x + x + x + x + x", "[v - 200 for v in x]", "x[7]", "[x for v in x]")
    assert [output(parse(text), x) for text in texts] == [None] * 6
    assert output(parse("x[0] - 99"), x) == -90


def test_the_demonstration_shows_how_seldom_chance_finds_a_function(capsys):
    functions_to_find.main([])
    assert capsys.readouterr().out.count("of 1,000 random programs") == 5
