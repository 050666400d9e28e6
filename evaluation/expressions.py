"""Expressions: one-line programs of a small language, which are safe to run in this process.

    evaluate("sorted(x)[::-1]", {"x": [3, 1, 2]})                     [3, 2, 1]
    evaluate("().__class__", {})                                      ValueError

Other programs that a model wrote are run in a process without rights (sandbox.py), which takes a tenth of a
second. Expressions, of which a study runs thousands, need no process, since Python does not execute them:
Python's parser makes the syntax tree, and `evaluate` computes its value node by node.

    what it has      integers, lists of integers, comparisons, slices, six functions, loops over a list
    what it lacks    attributes, strings, imports, assignments, calls of anything else. `evaluate` has no rule
                     for these nodes of the syntax tree, so an expression can reach nothing but its variables
    how long         at most STEPS nodes are evaluated; there is no recursion, and a loop ends with its list
    how large        at most LONGEST characters, integers up to LARGEST, lists of MOST items; no powers

A Grammar draws expressions, and changes them as genetic programming does (Koza 1992): a subtree is replaced
by a new one, or by one of another expression.

    python -m evaluation.expressions        draw expressions, change them, evaluate them, and refuse some
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from formats import command

LONGEST, LARGEST, MOST, STEPS = 200, 10**9, 64, 20_000  # the limits of the header

# --- evaluation

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
}
FUNCTIONS: dict[str, Callable] = {
    "sorted": sorted,
    "sum": sum,
    "max": max,
    "min": min,
    "len": len,
    "range": lambda n: list(range(min(n, MOST + 1))),  # MOST + 1 items are refused by `bounded`
}


def parse(text: str) -> ast.expr:
    """Return the syntax tree of an expression. Raises ValueError for text that is no expression of Python,
    and for more than LONGEST characters."""
    if len(text) > LONGEST:
        raise ValueError(f"expression {text[:40]!r}...: more than {LONGEST} characters")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"expression {text!r}: expected an expression of Python") from None


def evaluate(program: str | ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of an expression, or of its syntax tree.

    names: the values of its variables, which are integers and lists. They may be numpy arrays of integers,
    too: then the value is an array, whose items have no limit. Raises ValueError for what the language lacks,
    for an error such as the maximum of an empty list, and beyond a limit.
    """
    tree = parse(program) if isinstance(program, str) else program
    try:
        return value_of(tree, names, [STEPS])
    except (TypeError, ArithmeticError, IndexError, RecursionError) as error:
        raise ValueError(f"expression {ast.unparse(tree)}: {error}") from None


def value_of(node: ast.expr | None, names: dict[str, Any], left: list[int]) -> Any:
    """Return the value of a node. left: a list of one number, how many nodes of the expression may still be
    evaluated, which every call lowers by 1."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"expression: more than {STEPS} steps")
    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Constant(value=int(value)):
            return bounded(value)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in OPERATORS:
            a, b = value_of(a, names, left), value_of(b, names, left)
            if isinstance(a, list) != isinstance(b, list) or (
                isinstance(a, list) and not isinstance(op, ast.Add)
            ):
                raise ValueError(f"expression {ast.unparse(node)}: expected two numbers, or the sum of lists")
            return bounded(OPERATORS[type(op)](a, b))
        case ast.UnaryOp(op=ast.USub(), operand=a):
            return -value_of(a, names, left)
        case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in COMPARISONS:
            return COMPARISONS[type(op)](value_of(a, names, left), value_of(b, names, left)) * 1
        case ast.Subscript(value=a, slice=ast.Slice(lower=lower, upper=upper, step=step)):
            bounds = [None if x is None else value_of(x, names, left) for x in (lower, upper, step)]
            return items_of(value_of(a, names, left))[slice(*bounds)]
        case ast.Subscript(value=a, slice=index):
            return items_of(value_of(a, names, left))[value_of(index, names, left)]
        case ast.Call(func=ast.Name(id=name), args=[a], keywords=[]) if name in FUNCTIONS:
            return bounded(FUNCTIONS[name](value_of(a, names, left)))
        case ast.ListComp(elt=a, generators=[loop]) | ast.GeneratorExp(elt=a, generators=[loop]):
            return list(looped(a, loop, names, left))
    raise ValueError(f"expression {ast.unparse(node)}: not in the language")


def looped(element: ast.expr, loop: ast.comprehension, names: dict, left: list[int]) -> Iterator:
    """Yield the value of an element for each item that a loop, `for v in ... if ...`, gives."""
    if not isinstance(loop.target, ast.Name) or len(loop.ifs) > 1:
        raise ValueError("expression: expected one name to loop over, and one condition at most")
    for item in items_of(value_of(loop.iter, names, left)):
        inner = names | {loop.target.id: item}
        if all(value_of(test, inner, left) for test in loop.ifs):
            yield value_of(element, inner, left)


def items_of(value: Any) -> list:
    """Return the value if it is a list. Raises ValueError for any other."""
    if not isinstance(value, list):
        raise ValueError("expression: expected a list")
    return value


def bounded(value: Any) -> Any:
    """Return the value if it is within the limits. Raises ValueError for an integer or a list beyond."""
    too_large = isinstance(value, int) and abs(value) > LARGEST
    if too_large or (isinstance(value, list) and len(value) > MOST):
        raise ValueError(f"expression: expected integers up to {LARGEST}, and lists of at most {MOST} items")
    return value


# --- grammars

HOLE = re.compile(r"\{(\w+)\}")


class Tree(NamedTuple):
    """An expression, as the tree of the rules of a grammar that made it."""

    symbol: str  # what the rule is for
    rule: str  # a text with {symbol} for each child
    children: tuple["Tree", ...] = ()

    def __str__(self) -> str:
        children = iter(self.children)
        return HOLE.sub(lambda _: str(next(children)), self.rule)

    def subtrees(self) -> Iterator["Tree"]:
        """Yield this tree, and all below it."""
        yield self
        for child in self.children:
            yield from child.subtrees()

    def replaced(self, index: int, new: "Tree") -> "Tree":
        """Return the tree with another one in place of the subtree that comes at this index."""
        if index == 0:
            return new
        children, index = list(self.children), index - 1
        for i, child in enumerate(children):
            n = sum(1 for _ in child.subtrees())
            if index < n:
                children[i] = child.replaced(index, new)
                break
            index -= n
        return self._replace(children=tuple(children))


class Grammar:
    """The rules by which expressions are made.

    rules: the alternatives of each symbol, as {"number": "x | ({number} + {number})", ...}, in which {number}
    stands for any expression of this symbol. An alternative that stands twice is drawn twice as often. start:
    the symbol of whole expressions.
    """

    def __init__(self, rules: dict[str, str], start: str):
        self.rules = {symbol: alternatives.split(" | ") for symbol, alternatives in rules.items()}
        self.start = start
        self.holes = {rule: tuple(HOLE.findall(rule)) for texts in self.rules.values() for rule in texts}
        # The height of the smallest tree of each symbol. After k rounds all heights up to k are known.
        height: dict[str, int] = {}
        for _ in rules:
            for symbol, texts in self.rules.items():
                known = [max((height[s] for s in self.holes[rule]), default=0)
                         for rule in texts if height.keys() >= set(self.holes[rule])]  # fmt: skip
                if known:
                    height[symbol] = 1 + min(known)
        self.height = height
        # For each rule the least height that leaves room for all of its children.
        self.below = {rule: max((height[s] for s in holes), default=0) for rule, holes in self.holes.items()}

    def draw(self, generator: random.Random, depth: int, symbol: str | None = None) -> Tree:
        """Return a random tree of at most this depth, or, if no tree is so low, of the least depth."""
        symbol = symbol or self.start
        depth = max(depth, self.height[symbol])
        rule = generator.choice([rule for rule in self.rules[symbol] if self.below[rule] < depth])
        return Tree(symbol, rule, tuple(self.draw(generator, depth - 1, s) for s in self.holes[rule]))

    def change(self, tree: Tree, other: Tree, generator: random.Random, depth: int = 3) -> Tree:
        """Return the tree with one subtree changed: half of the time to a part of the other tree (crossover),
        else to a new one of at most this depth (mutation)."""
        index, old = generator.choice(list(enumerate(tree.subtrees())))
        parts = [part for part in other.subtrees() if part.symbol == old.symbol]
        if parts and generator.random() < 0.5:
            return tree.replaced(index, generator.choice(parts))
        return tree.replaced(index, self.draw(generator, depth, old.symbol))


# Functions that map a list x of small numbers to a list or to a number.
LISTS = Grammar(
    {
        "program": "{list} | {number}",
        "list": "x | sorted({list}) | {list}[::-1] | {list}[1:] | {list}[:-1] | ({list} + {list})"
        + 2 * " | [{item} for v in {list}] | [v for v in {list} if {test}]",
        "number": "sum({list}) | max({list}) | min({list}) | len({list}) | {list}[0] | {list}[-1]"
        " | ({number} + {number}) | ({number} - {number}) | {number} * {digit}",
        "item": "v + {digit} | v * {digit} | {digit} - v | v % {digit} | v * v",
        "test": "v > {digit} | v < {digit} | v != {digit} | v % 2 == 0 | v % 2 == 1 | v % 3 == 0",
        "digit": "1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9",
    },
    "program",
)


def main(argv: list[str] | None = None) -> None:
    command.Parser(description="Draw expressions, change them, run them, and refuse some.").parse_args(argv)
    generator, x = random.Random(0), [3, 1, 4, 1, 5]
    tree = LISTS.draw(generator, 5)
    for _ in range(8):
        try:
            print(f"{tree!s:60} of {x} is {evaluate(str(tree), {'x': x})}")
        except ValueError as error:
            print(error)
        tree = LISTS.change(tree, LISTS.draw(generator, 4), generator)
    for text in ("().__class__", "open(x)", "9 ** 9 ** 9", "[x for x in x] * 10", "'a' + 'b'", "lambda: x"):
        try:
            print(evaluate(text, {"x": x}))
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    command.run(main)
