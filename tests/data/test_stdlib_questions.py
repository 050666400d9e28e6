"""Questions about the standard library: how they are made, and that training and held-out ones differ."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data import stdlib_questions
from data.conversations import check

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_questions.stdlib_conversations()


def test_stdlib_is_divided_by_package(stdlib):
    train, held_out = stdlib
    assert len(train) > 5000 and len(held_out) > 150
    for side in stdlib:
        for messages in side:
            check(messages)

    def named(side):
        """The packages of the full names that are answers."""
        kinds = ("function", "class", "method")
        asked = tuple(f"{ask} {kind} of" for ask in ("Which", "Name the") for kind in kinds)
        answers = [c[1]["content"] for c in side if c[0]["content"].startswith(asked)]
        return {name.partition(".")[0] for name in answers}

    in_train, in_held_out = named(train), named(held_out)
    assert {"textwrap", "argparse"} <= in_train and in_held_out
    assert all(package in sys.stdlib_module_names for package in in_held_out)
    assert max(in_train) < min(in_held_out)  # which pretraining on the corpus "stdlib" holds out too

    asked = [{c[0]["content"] for c in side} for side in stdlib]
    assert not asked[0] & asked[1]
    assert len(asked[0]) == len(train) and len(asked[1]) == len(held_out)
    summaries = [{c[1]["content"] for c in side if c[1]["content"].endswith(".")} for side in stdlib]
    assert summaries[1] and not summaries[0] & summaries[1]


def test_questions_are_the_same_in_every_process():
    """Also where Python's own hash of strings differs."""
    source = inspect.getsource(textwrap)
    found = stdlib_questions.definitions("textwrap", source)
    here = [stdlib_questions.ask(definition) for definition in found]
    code = (
        "import inspect, json, textwrap\nfrom data import stdlib_questions as questions\n"
        "found = questions.definitions('textwrap', inspect.getsource(textwrap))\n"
        "print(json.dumps([questions.ask(definition) for definition in found]))"
    )
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert json.loads(there) == here and len(here) > 3


def test_questions_about_a_definition():
    source = '''
def wrap(text, width: int = 70, *more, strict=False, **options) -> str:
    """Wrap a text into
    lines.

    More about it."""

class Wrapper(Base):
    """An object that wraps texts."""

    def __init__(self, width=70): ...

    @classmethod
    def of(cls, other): "Make a wrapper like another one."

    @staticmethod
    def plain(text, /): "Say whether a text is plain."

    @property
    def width(self): "The width of all the lines."

    def _hidden(self): "This one is nobody's business."

def silent(x): ...
'''
    found = list(stdlib_questions.definitions("text", source))
    assert [(d.kind, d.owner, d.name) for d in found] == [
        ("function", "text", "wrap"),
        ("class", "text", "Wrapper"),
        ("method", "text.Wrapper", "of"),
        ("method", "text.Wrapper", "plain"),
    ]
    assert found[0].summary == "Wrap a text into lines."
    assert [d.signature for d in found[1:]] == ["width=70", "other", "text, /"]
    conversations = stdlib_questions.ask(found[0])
    said = [message["content"] for messages in conversations for message in messages]
    answers = said[1::2]
    call = "text.wrap(text, width=70, *more, strict=False, **options)"
    assert {"Wrap a text into lines.", "text.wrap", call} <= set(answers)
    assert "text, width, *more, strict, **options" in answers
    assert (answers[-1], "width in" in said[-2] or "is width" in said[-2]) in [("70", True), ("False", False)]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return  the\nanswer to it", "Return the answer to it."),
        ("Return the first. " + "And more of it " * 20, None),
        ("Return the answer to all. " + "And more of it " * 20, "Return the answer to all."),
        ("dedent(text) -> the text, dedented", None),
        ("Short one.", None),
        ("Arguments of this function:", None),
        (None, None),
    ],
)
def test_summaries(docstring, expected):
    assert stdlib_questions.summarise(docstring) == expected
