"""Functions of Python's standard library, and what their docstrings begin with: texts, each with its summary.

    def islink(path):                                       Test whether a path is a symbolic link.
        try:
            st = os.lstat(path) ...

The source is that of a function or a method without its docstring, decorators and comments, in the form that
`ast.unparse` gives it. So the summary is nowhere in the text, and has to be guessed from the code.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from data.stdlib_questions import modules_by_side, summarise


class Summarised(NamedTuple):
    """A function, and the first sentence or paragraph of its docstring."""

    name: str
    source: str
    summary: str


def summarised(source: str) -> Iterator[Summarised]:
    """Yield the functions and methods in a module's source whose docstrings begin with usable prose."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary, body = summarise(ast.get_docstring(node)), node.body[1:]
        if summary is None or not body:  # a docstring alone has no code
            continue
        node.body, node.decorator_list = body, []
        yield Summarised(node.name, ast.unparse(node), summary)


def stdlib_functions() -> tuple[list[Summarised], list[Summarised]]:
    """Return functions of this Python's standard library: (to train on, held out), see `modules_by_side`.

    No summary comes twice.
    """
    sides: tuple[list[Summarised], list[Summarised]] = ([], [])
    seen: set[str] = set()
    for is_held_out, _, source in modules_by_side():
        for function in summarised(source):
            if function.summary not in seen:
                seen.add(function.summary)
                sides[is_held_out].append(function)
    return sides
