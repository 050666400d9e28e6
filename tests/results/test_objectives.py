"""The kinds of tokens that the linear classifier of results/objectives.py names."""

from itertools import groupby
from operator import itemgetter

from results.objectives import kinds_of_characters


def test_each_character_has_the_kind_of_its_token():
    # A form feed ends a line for str.splitlines, but not for Python.
    source = "def f(a):  # of\x0ca page\n    return a.b(1, 'c')\n"
    pairs = zip(kinds_of_characters(source), source, strict=True)
    runs = [(kind, "".join(char for _, char in run)) for kind, run in groupby(pairs, itemgetter(0))]
    assert [run for run in runs if run[0]] == [
        ("keyword", "def"),
        ("definition", "f"),
        ("operator", "("),
        ("name", "a"),
        ("operator", "):"),
        ("comment", "# of\x0ca page"),
        ("keyword", "return"),
        ("name", "a"),
        ("operator", "."),
        ("call", "b"),
        ("operator", "("),
        ("number", "1"),
        ("operator", ","),
        ("string", "'c'"),
        ("operator", ")"),
    ]
