"""The tool loop: what is executed, what goes back into the text, and what counts as the answer."""

import random

import pytest

from evaluation import tool_loop
from evaluation.expressions import evaluate
from evaluation.small_models import Answer
from evaluation.tool_loop import decode, draw_problem, encode, execute, last_number, tool_row, with_tool


def scripted(monkeypatch, replies: dict[str, str]) -> list[str]:
    """Make the model add these texts, by the end of the text that it reads; return the texts as they come."""
    read = []

    def answers(model, prompts, n, max_new, generator, temperature):
        read.extend(map(decode, prompts))
        added = [next(new for end, new in replies.items() if decode(p).endswith(end)) for p in prompts]
        return [[Answer(tuple(encode(text)), 0.0)] for text in added]

    monkeypatch.setattr(tool_loop, "answers", answers)
    return read


def test_the_value_of_the_written_expression_goes_back_into_the_text(monkeypatch):
    replies = {
        "and finds 5 :": "<< 7 + 5 -> 13 >> 13",
        "finds 6 :": "<< 7 + ( -> 13 >> 13",
        "finds 8 :": "15",
    }
    read = scripted(monkeypatch, replies | {">>": "12"})
    questions = [f"anna has 7 and finds {n} :" for n in (5, 6, 8)]
    texts = with_tool(None, questions, execute)
    # Its own 13 is dropped; an expression without a value, and none at all, end the loop.
    assert texts == [
        "anna has 7 and finds 5 : << 7 + 5 -> 12 >> 12",
        "anna has 7 and finds 6 : << 7 + (",
        "anna has 7 and finds 8 : 15",
    ]
    assert read[3:] == ["anna has 7 and finds 5 : << 7 + 5 -> 12 >>"]
    assert [last_number(text) for text in texts] == [12, None, 15]
    assert last_number("ben : - 5") is None and last_number("ben : << 13 - 5") is None
    assert "-> 22 >>" in with_tool(None, questions[:1], lambda expression: execute(expression) + 10)[0]


def test_training_texts_have_the_value_of_their_expression():
    generator = random.Random(0)
    for _ in range(100):
        problem = draw_problem(generator)
        read, written = tool_row(problem)
        assert decode(read) == problem.question and written[-1] == 0
        expression, value, answer = decode(written[:-1]).replace("<<", "").replace(">>", "->").split("->")
        assert int(value) == int(answer) == evaluate(expression.strip(), {}) == problem.value >= 0
        assert len(read) + len(written) < 80
    with pytest.raises(ValueError, match="expected a number"):
        execute("[v for v in range(3)]")


def test_the_command_prints_each_way_to_answer(monkeypatch, capsys):
    monkeypatch.setattr(tool_loop, "fit", lambda model, rows, steps: rows() and model.eval())
    tool_loop.main(["--steps", "1", "--problems", "3"])
    lines = capsys.readouterr().out.splitlines()
    ways = ["direct", "tool", "no tool", "wrong tool", "expression right", "wrong tool followed"]
    assert [line[:20].strip() for line in lines] == ways
