"""The kinds of tokens that the linear classifier of results/objectives.py names."""

from results.objectives import kinds_of_characters

SOURCE = "def f(a):  # of\x0ca page\n    return a.b(1, 'c')\n"


def test_each_character_has_the_kind_of_its_token():
    # A form feed ends a line for str.splitlines, but not for Python.
    found = kinds_of_characters(SOURCE)
    words = ["def", "f", "(", "# of\x0ca page", "return", "b", "1", "'c'"]
    kinds = ["keyword", "definition", "operator", "comment", "keyword", "call", "number", "string"]
    for word, kind in zip(words, kinds, strict=True):
        at = SOURCE.index(word, SOURCE.index("return") if word == "b" else 0)
        assert found[at : at + len(word)] == [kind] * len(word), word
    assert {kind for kind, char in zip(found, SOURCE, strict=True) if char in " \n"} == {"", "comment"}
