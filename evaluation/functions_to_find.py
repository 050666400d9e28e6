"""Functions to find: problems for generate_and_verify.py, each a few examples of a function of a list.

    [3 1 2] -> [2 1 3] ;  [5 0] -> [0 5] ;  [7 7 1 4] -> [4 1 7 7] ;            x[::-1]

The functions are expressions of the grammar `expressions.LISTS`, the inputs random lists of 2 to 5 digits.
The examples seldom determine a function, so a program is tested on more inputs, which the question does not
show. One function in eight is held out from training. Functions are told apart by their values on fixed
inputs, not by their texts, since many texts are the same function.

    python -m evaluation.functions_to_find        a few problems, and how often chance solves them
"""

import ast
import itertools
import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.expressions import LISTS, evaluate, parse
from evaluation.small_models import Vocabulary
from formats import command

N_EXAMPLES, N_HIDDEN = 3, 20  # inputs in a question, and of the tests
VOCABULARY = Vocabulary(
    ["[ ] -> ; - ? yes no", " ".join(map(str, range(100)))]
    + [rule.replace("{", " ").replace("}", " ") for rules in LISTS.rules.values() for rule in rules]
)

Value = int | list[int]


class Problem(NamedTuple):
    """A function to find: examples that the question shows, and inputs with outputs that test an answer."""

    program: str  # one that computes it
    examples: list[tuple[list[int], Value]]
    hidden: list[tuple[list[int], Value]]


def draw_input(generator: random.Random) -> list[int]:
    return [generator.randrange(10) for _ in range(generator.randint(2, 5))]


def output(tree: ast.expr, x: list[int]) -> Value | None:
    """Return the value of a program for an input, None if it has none, or one that is too large to be shown:
    more than 10 numbers, or one beyond 99.
    """
    try:
        value = evaluate(tree, {"x": x})
    except ValueError:
        return None
    numbers = value if isinstance(value, list) else [value]
    shown = len(numbers) <= 10 and all(isinstance(v, int) and abs(v) <= 99 for v in numbers)
    return value if shown else None


def draw_examples(tree: ast.expr, n: int, generator: random.Random) -> list[tuple[list[int], Value]] | None:
    """Return n inputs with their outputs; None for a program that has no value for two thirds of the
    inputs."""
    found = []
    for _ in range(3 * n):
        x = draw_input(generator)
        if (y := output(tree, x)) is not None:
            found.append((x, y))
            if len(found) == n:
                return found
    return None


PROBES = [draw_input(random.Random(i)) for i in range(12)]  # functions with equal values here count as equal


def draw_programs(n: int, generator: random.Random) -> tuple[dict[str, ast.expr], dict[str, ast.expr]]:
    """Return n programs with their trees, those of training and those of the test, one function in eight.

    All programs that compute the same function are in the same part; the test has only the first of them.
    Functions that lack a value for more than 3 of the 12 PROBES, or have fewer than 3 values, are left out.
    """
    training, test, known = {}, {}, set()
    while len(training) + len(test) < n:
        text = str(LISTS.draw(generator, generator.randint(2, 5)))
        if text in training or text in test:
            continue
        tree = parse(text)
        values = [str(output(tree, x)) for x in PROBES]
        if values.count("None") > 3 or len(set(values)) < 3:
            continue
        function = "|".join(values)
        if zlib.crc32(function.encode()) % 8:
            training[text] = tree
        elif function not in known:
            known.add(function)
            test[text] = tree
    return training, test


def draw_problem(text: str, tree: ast.expr, generator: random.Random) -> Problem | None:
    """Return a problem with the function of a program, None if its examples all have the same output, or it
    has too few values."""
    found = draw_examples(tree, N_EXAMPLES + N_HIDDEN, generator)
    if found is None or len({str(y) for _, y in found[:N_EXAMPLES]}) < 2:
        return None
    return Problem(text, found[:N_EXAMPLES], found[N_EXAMPLES:])


def question(examples: Sequence[tuple[list[int], Value]]) -> list[int]:
    """Return the tokens of examples, as in the header."""

    def shown(value: Value) -> str:
        return f"[ {' '.join(map(str, value))} ]" if isinstance(value, list) else str(value)

    return VOCABULARY.encode(" ".join(f"{shown(x)} -> {shown(y)} ;" for x, y in examples))


def draw_problems(programs: dict[str, ast.expr], n: int, generator: random.Random) -> list[Problem]:
    """Return up to n problems, each with another of these programs."""
    pairs = generator.sample(list(programs.items()), len(programs))
    made = (draw_problem(text, tree, generator) for text, tree in pairs)
    return list(itertools.islice(filter(None, made), n))


def solves(tree: ast.expr, examples: Sequence[tuple[list[int], Value]]) -> bool:
    """Return whether a program gives the outputs of examples."""
    return all(output(tree, x) == y for x, y in examples)


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Print a few problems, and how often chance solves them.").parse_args(argv)
    generator = random.Random(0)
    training, test = draw_programs(500, generator)
    print(f"{len(training)} programs for training, {len(test)} functions held out, such as")
    guesses = [parse(str(LISTS.draw(generator, generator.randint(2, 5)))) for _ in range(1000)]
    for problem in draw_problems(test, 5, generator):
        passing = [tree for tree in guesses if solves(tree, problem.examples)]
        right = sum(solves(tree, problem.hidden) for tree in passing)
        print(f"\n{problem.program}\n  {VOCABULARY.decode(question(problem.examples))}")
        print(f"  of 1,000 random programs {len(passing)} give these outputs, {right} also the hidden ones")


if __name__ == "__main__":
    command.run(main)
