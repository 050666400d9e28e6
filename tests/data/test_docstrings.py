"""Functions and their summaries: the summary is in no source, and no summary comes twice."""

from data import docstrings
from data.docstrings import stdlib_functions, summarised

SOURCE = '''
@decorated
def is_link(path):
    """Test whether a path is a link. It may be broken.

    More of this.
    """
    return look(path)  # a comment


class Reader:
    def read_all(self):
        """Return everything that is in the file."""
        return self.file.read()

    def empty(self):
        """Return nothing, and have no code at all."""

    def plain(self):
        return 1
'''


def test_functions_and_methods_with_code_and_prose_are_found():
    found = list(summarised(SOURCE))
    assert [one.name for one in found] == ["is_link", "read_all"]
    assert found[0].source == "def is_link(path):\n    return look(path)"
    assert found[0].summary == "Test whether a path is a link. It may be broken."


def test_no_summary_is_on_both_sides(monkeypatch):
    modules = [(False, "a", SOURCE), (True, "b", SOURCE.replace("everything", "a part"))]
    monkeypatch.setattr(docstrings, "modules_by_side", lambda: modules)
    train, held_out = stdlib_functions()
    assert [one.name for one in train] == ["is_link", "read_all"]
    assert [one.summary for one in held_out] == ["Return a part that is in the file."]
