"""Functions of Python's standard library, each with the summary that its docstring begins with.

    def islink(path):                                       Test whether a path is a symbolic link.
        try:
            st = os.lstat(path) ...

The source is that of a function or a method without its own docstring, its decorators and all comments, as
`ast.unparse` writes it. So a model cannot copy the summary from the text: it has to be guessed from the code.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from data.stdlib_questions import modules_by_side, summarise


class Summarised(NamedTuple):
    """A function or method, its source, and the first paragraph or sentence of its docstring."""

    name: str
    source: str
    summary: str


def summarised(source: str) -> Iterator[Summarised]:
    """Yield the functions and methods in a module's source whose docstrings begin with usable prose."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary, body = summarise(ast.get_docstring(node)), node.body[1:]
        if summary is None or not body:  # without a usable docstring, or with nothing else
            continue
        node.body, node.decorator_list = body, []
        yield Summarised(node.name, ast.unparse(node), summary)


def stdlib_functions() -> tuple[list[Summarised], list[Summarised]]:
    """Return functions of this Python's standard library: (to train on, held out).

    The sides are those of `data.stdlib_questions.modules_by_side`. No summary comes twice.
    """
    sides: tuple[list[Summarised], list[Summarised]] = ([], [])
    seen: set[str] = set()
    for is_held_out, _, source in modules_by_side():
        for function in summarised(source):
            if function.summary not in seen:
                seen.add(function.summary)
                sides[is_held_out].append(function)
    return sides
