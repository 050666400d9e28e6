"""Expressions: their values are Python's own, and nothing else can be executed."""

import random

import numpy as np
import pytest

from evaluation import expressions
from evaluation.expressions import LISTS, Grammar, Tree, evaluate, parse

BUILTINS = {name: getattr(__builtins__, name, None) or __builtins__[name] for name in expressions.FUNCTIONS}

REFUSED = """
().__class__;x.sort;open(1);eval(x);__import__(x);import os;'text';1.5;None;max;unknown;1 if;x = 1
2 ** 9;1 << 9;9 / 3;[9, 9];{x};(lambda: 1)();(y := 1);x if 1 else x;x and x;not x;await x
f(x);max(x, 1);sorted(x, key=len);[a for a in x for b in x];[a for a, b in x]
""".strip()  # fmt: skip
BEYOND = """
9 * 999999999;sum([v * 99999999 for v in x]);x + x + x + x + x + x + x;range(999);x * 3;x - x;sum(x) + x
[[[[v for a in x] for b in x] for c in x] for v in x];max([v for v in x if v > 99]);1 % 0
x[99];sum(3);min(range(0));[v for v in 3];3[0];x[x]
""".strip()
REFUSED, BEYOND = (texts.replace("\n", ";").split(";") for texts in (REFUSED, BEYOND))


def test_drawn_and_changed_expressions_have_the_values_that_python_gives_them():
    generator, compared = random.Random(0), 0
    tree = LISTS.draw(generator, 5)
    for _ in range(300):
        x = [generator.randrange(10) for _ in range(5)]
        try:
            expected = eval(str(tree), {"__builtins__": {}}, BUILTINS | {"x": x})
        except (ValueError, IndexError):  # of an empty list
            with pytest.raises(ValueError):
                evaluate(str(tree), {"x": x})
        else:
            assert evaluate(str(tree), {"x": x}) == expected, str(tree)
            compared += 1
        tree = LISTS.change(LISTS.draw(generator, 5), tree, generator)
    assert compared > 250


def test_what_the_language_lacks_is_refused():
    for text in [*REFUSED, "", "(" * 150, "x[" * 40, "x\0", "-" * 190 + "1 +", "1" * 300]:
        with pytest.raises(ValueError, match="expression"):
            evaluate(text, {"x": [1, 2]})


def test_limits_and_errors_end_in_one_kind_of_exception():
    for text in [*BEYOND, "x" + " + 1" * 60]:
        with pytest.raises(ValueError):
            evaluate(text, {"x": list(range(12))})


def test_an_expression_of_arrays_is_evaluated_for_all_of_them_at_once():
    x = [np.array([0, 1, 2]), np.array([2, 2, 1])]
    assert evaluate("sum(x[i] * (x[i] == 2) for i in range(n))", {"x": x, "n": 2}).tolist() == [2, 2, 2]


def test_a_change_is_one_subtree_of_the_same_symbol_and_keeps_the_rest():
    generator = random.Random(1)
    for _ in range(200):
        tree, other = LISTS.draw(generator, 5), LISTS.draw(generator, 4)
        index = generator.randrange(sum(1 for _ in tree.subtrees()))
        old = list(tree.subtrees())[index]
        new = LISTS.draw(generator, 3, old.symbol)
        changed = tree.replaced(index, new)
        assert list(changed.subtrees())[index] == new
        assert str(changed).count(str(new)) >= 1 and changed.replaced(index, old) == tree
        parse(str(LISTS.change(tree, other, generator)))


def test_drawn_trees_are_not_deeper_than_required_and_use_every_rule():
    grammar = Grammar({"a": "{b} | f({a}) | f({a})", "b": "x | y"}, "a")
    assert grammar.height == {"a": 2, "b": 1}

    def depth(tree: Tree) -> int:
        return 1 + max(map(depth, tree.children), default=0)

    generator = random.Random(0)
    drawn = [grammar.draw(generator, 4) for _ in range(200)]
    assert {depth(tree) for tree in drawn} == {2, 3, 4}
    assert {rule for tree in drawn for rule in (t.rule for t in tree.subtrees())} == {
        "{b}",
        "f({a})",
        "x",
        "y",
    }
    assert depth(grammar.draw(generator, 0)) == 2


def test_the_demonstration_refuses_what_is_no_expression(capsys):
    expressions.main([])
    assert capsys.readouterr().out.count("not in the language") == 5
