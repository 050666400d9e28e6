"""Questions and answers about Python's standard library, made from its own source.

    What does textwrap.dedent do?             Remove any common leading whitespace from every line in `text`.
    How is textwrap.dedent called?            textwrap.dedent(text)
    Which function of textwrap is meant? ...  textwrap.dedent

Every Python has this source, so posttraining/instruct.py needs no download. The answers are docstrings and
signatures; `ask` has the questions.

    python -m posttraining.instruct           print the number of conversations, and some of them
"""

import ast
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.conversations import Conversation
from data.corpus import documents, find_files
from data.text import held_out_from

INTERNAL = ("idlelib", "lib2to3", "turtledemo")  # packages of the standard library that are programs
LONGEST_SUMMARY, LONGEST_SIGNATURE = 200, 120  # characters


class Definition(NamedTuple):
    """A public function, method or class."""

    kind: str
    owner: str  # the module or class that it belongs to
    name: str
    signature: str | None  # the parameters as in the source, without annotations; None if it is unknown
    parameters: list[str]  # their names, with the stars of *args and **kwargs
    defaults: dict[str, str]  # {parameter: its default as in the source}
    summary: str


def summarise(docstring: str | None) -> str | None:
    """Return the first paragraph of a docstring, or its first sentence if the paragraph is long.

    Returns None unless that is prose: a capitalised word, more words, an end that a sentence may have, and 20
    to LONGEST_SUMMARY characters.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring or "")[0].split())
    if len(paragraph) > LONGEST_SUMMARY:
        paragraph = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    if not re.fullmatch(r"[A-Z][a-z]*'?[a-z]* .*[\w.!)`'\"]", paragraph) or " -> " in paragraph:
        return None
    if not 20 <= len(paragraph) <= LONGEST_SUMMARY or ">>>" in paragraph:
        return None
    return paragraph if paragraph.endswith((".", "!")) else f"{paragraph}."


def define(
    kind: str, owner: str, node: ast.FunctionDef | ast.ClassDef, function: ast.FunctionDef | None
) -> Definition | None:
    """Return the definition of a node, or None if it is private or has no usable docstring.

    function: the function that a call runs, whose annotations are dropped; for a class its __init__, or None.
    """
    summary = summarise(ast.get_docstring(node))
    if summary is None or node.name.startswith("_"):
        return None
    if function is None:
        return Definition(kind, owner, node.name, None, [], {}, summary)

    # Drop the first parameter of methods, `self` or `cls`, and the annotations.
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if kind != "function" and "staticmethod" not in decorators and positional:
        (args.posonlyargs or args.args).pop(0)
        positional = positional[1:]
    for arg in ast.walk(args):
        if isinstance(arg, ast.arg):
            arg.annotation = None

    # Collect the names and the defaults. The list of positional defaults belongs to the last parameters.
    names = [arg.arg for arg in positional]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    pairs = [*zip(positional[::-1], args.defaults[::-1], strict=False)]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    defaults = {arg.arg: ast.unparse(default) for arg, default in pairs if default is not None}
    return Definition(kind, owner, node.name, ast.unparse(args), names, defaults, summary)


def definitions(module: str, source: str) -> Iterator[Definition]:
    """Yield the public functions, classes and methods in a module's source that have usable docstrings.

    Properties are left out, since they are not called.
    """
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(source).body:
        found = []
        if isinstance(node, functions):
            found.append(define("function", module, node, node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [method for method in node.body if isinstance(method, functions)]
            init = next((method for method in methods if method.name == "__init__"), None)
            found.append(define("class", module, node, init))
            for method in methods:
                decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
                if decorators <= {"classmethod", "staticmethod"}:
                    found.append(define("method", f"{module}.{node.name}", method, method))
        yield from (definition for definition in found if definition is not None)


def pick(phrasings: list[str], key: str) -> str:
    """Return one of the phrasings, by a hash of the key that is the same in every process."""
    return phrasings[zlib.crc32(key.encode()) % len(phrasings)]


def ask(d: Definition) -> list[Conversation]:
    """Return the conversations about a definition, two to five of them.

    The answers about purpose and call must be memorised, or guessed from the name. Questions about parameters
    and defaults contain the answer, so a small model learns these, too.
    """
    # The purpose, in both directions.
    full = f"{d.owner}.{d.name}"
    does = [f"What does {full} do?", f"What is the {d.kind} {full} for?", f"Explain {full} in a sentence."]
    which = [f"Which {d.kind} of {d.owner} is meant? {d.summary}"]
    which += [f"Name the {d.kind} of {d.owner} with this description: {d.summary}"]
    asked = [[pick(does, full), d.summary], [pick(which, full), full]]

    # The signature: how to call it, and what can be read in it.
    if d.signature is not None and len(d.signature) <= LONGEST_SIGNATURE:
        line, call = f"`{d.name}({d.signature})`", f"{full}({d.signature})"
        if pick(["together", "apart", "apart"], call) == "together":
            asked[0] += [pick(["And how is it called?", "What is its signature?"], full), call]
        else:
            how = [f"How is {full} called?", f"What is the signature of {full}?", f"Show a call of {full}."]
            asked.append([pick(how, full), call])
        if d.parameters:
            what = [f"What are the parameters of {line}?", f"Which parameters does {line} have?"]
            what += [f"List the parameters: {line}"]
            asked.append([pick(what, full), ", ".join(d.parameters)])
        if d.defaults:
            name = pick(list(d.defaults), full)
            what = [
                f"What is the default of {name} in {line}?",
                f"{line}: what is {name} if it is not given?",
            ]
            asked.append([pick(what, full), d.defaults[name]])
    return [
        [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        for contents in asked
    ]


def modules_by_side() -> Iterator[tuple[bool, str, str]]:
    """Yield (is held out, name, source) of the public modules of this Python's standard library.

    The modules held out are those that `data.text.prepare` holds out of the corpus "stdlib", the last by
    name. A package is on one side only: if the border is inside of a package, its modules before the border
    are left out.
    """
    # Read the modules, and find the first one that is held out.
    modules, sizes = [], []
    for name, path in find_files("stdlib", Path("cache")):
        for text in documents([(name, path)], on_bad_text=lambda problem: None):
            modules.append((name.removesuffix(".__init__"), text))
            sizes.append(len(text.encode()))
    border = held_out_from(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    n_train = int(np.searchsorted(starts, border))
    held_out_packages = {name.partition(".")[0] for name, _ in modules[n_train:]}

    for i, (module, source) in enumerate(modules):
        package = module.partition(".")[0]
        is_public = not any(part.startswith("_") for part in module.split("."))
        if is_public and package not in INTERNAL and (i >= n_train or package not in held_out_packages):
            yield i >= n_train, module, source


def stdlib_conversations() -> tuple[list[Conversation], list[Conversation]]:
    """Return conversations about this Python's standard library: (to train on, held out).

    They are made from signatures and docstrings, which are read from the source without running it. A base
    model that was pretrained on the corpus "stdlib" has seen neither the questions that are held out nor the
    text with the answers, see `modules_by_side`. No question and no summary is on both sides; answers of a
    word or two, which the question itself contains, may be.
    """
    # Ask about the definitions of each module, leaving out repeated summaries and questions.
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    seen: set[str] = set()
    for is_held_out, module, source in modules_by_side():
        for definition in definitions(module, source):
            if definition.summary in seen:
                continue
            seen.add(definition.summary)
            for conversation in ask(definition):
                question = conversation[0]["content"]
                if question not in seen:
                    seen.add(question)
                    sides[is_held_out].append(conversation)
    return sides
