"""Functions to find: the problems of generate_and_verify.py. Each shows examples of a function of a list.

    [3 1 2] -> [2 1 3] ;  [5 0] -> [0 5] ;  [7 7 1 4] -> [4 1 7 7] ;            x[::-1]

The functions are expressions of the grammar `expressions.LISTS`, and the inputs are random lists of 2 to 5
digits. Many functions agree with the few examples, so a program is tested on hidden inputs, too. One function
in eight is held out from training. Two texts count as the same function if their values agree on 12 fixed
inputs, since many texts compute the same.

    python -m evaluation.functions_to_find        five problems, and how many random programs solve them
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

N_EXAMPLES, N_HIDDEN = 3, 20  # inputs in a question, and hidden ones
# Signs of questions, numbers, and the pieces of the grammar's rules without the braces around symbols.
VOCABULARY = Vocabulary(
    ["[ ] -> ; - ? yes no", " ".join(map(str, range(100)))]
    + [rule.replace("{", " ").replace("}", " ") for rules in LISTS.rules.values() for rule in rules]
)

Value = int | list[int]


class Problem(NamedTuple):
    """A function to find."""

    program: str  # one that computes it
    examples: list[tuple[list[int], Value]]  # (input, output) of the question
    hidden: list[tuple[list[int], Value]]  # (input, output) of the test


def draw_input(generator: random.Random) -> list[int]:
    """Return a random list of 2 to 5 digits."""
    return [generator.randrange(10) for _ in range(generator.randint(2, 5))]


def output(tree: ast.expr, x: list[int]) -> Value | None:
    """Return the value of a program for the input x, or None if there is none that a question can show: at
    most 10 numbers, each from -99 to 99."""
    try:
        value = evaluate(tree, {"x": x})
    except ValueError:
        return None
    numbers = value if isinstance(value, list) else [value]
    shown = len(numbers) <= 10 and all(isinstance(v, int) and abs(v) <= 99 for v in numbers)
    return value if shown else None


def draw_examples(tree: ast.expr, n: int, generator: random.Random) -> list[tuple[list[int], Value]] | None:
    """Return n random inputs with their outputs, or None if fewer than n of 3 n inputs have an output."""
    found = []
    for _ in range(3 * n):
        x = draw_input(generator)
        if (y := output(tree, x)) is not None:
            found.append((x, y))
            if len(found) == n:
                return found
    return None


PROBES = [draw_input(random.Random(i)) for i in range(12)]  # inputs on which functions are compared


def draw_programs(n: int, generator: random.Random) -> tuple[dict[str, ast.expr], dict[str, ast.expr]]:
    """Return n programs, those of training and those of the test, each as {text: syntax tree}.

    One function in eight is of the test, with the first program that computes it; training has all programs
    of its functions. Left out are functions without an output for more than 3 of the 12 PROBES, and those
    with fewer than 3 different outputs (none counts as one).
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
        # A hash that is the same in every process puts all programs of a function in the same part.
        function = "|".join(values)
        if zlib.crc32(function.encode()) % 8:
            training[text] = tree
        elif function not in known:
            known.add(function)
            test[text] = tree
    return training, test


def draw_problem(text: str, tree: ast.expr, generator: random.Random) -> Problem | None:
    """Return a problem about the function of a program, or None if all its examples have the same output, or
    if too few inputs have one."""
    found = draw_examples(tree, N_EXAMPLES + N_HIDDEN, generator)
    if found is None or len({str(y) for _, y in found[:N_EXAMPLES]}) < 2:
        return None
    return Problem(text, found[:N_EXAMPLES], found[N_EXAMPLES:])


def question(examples: Sequence[tuple[list[int], Value]]) -> list[int]:
    """Return the tokens of examples, in the form `[ 5 0 ] -> [ 0 5 ] ;`."""

    def shown(value: Value) -> str:
        return f"[ {' '.join(map(str, value))} ]" if isinstance(value, list) else str(value)

    return VOCABULARY.encode(" ".join(f"{shown(x)} -> {shown(y)} ;" for x, y in examples))


def draw_problems(programs: dict[str, ast.expr], n: int, generator: random.Random) -> list[Problem]:
    """Return up to n problems about different ones of these programs, in random order."""
    pairs = generator.sample(list(programs.items()), len(programs))
    made = (draw_problem(text, tree, generator) for text, tree in pairs)
    return list(itertools.islice(filter(None, made), n))


def solves(tree: ast.expr, examples: Sequence[tuple[list[int], Value]]) -> bool:
    """Return whether a program gives the outputs of all examples."""
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
