"""Cap sets: the greedy skeleton, the check, and the published set of 512 points."""

import itertools

import numpy as np
import pytest

from evaluation import cap_sets
from evaluation.cap_sets import (
    greedy,
    is_cap_set,
    points_of,
    priority_of,
    published_cap_set,
    size,
    third_points,
)


def has_line(points: np.ndarray) -> bool:
    """Return whether three of the points sum to 0, by trying all."""
    return any((sum(three) % 3 == 0).all() for three in itertools.combinations(points, 3))


def test_the_third_point_of_a_line_makes_its_sum_zero():
    points, third = points_of(3), third_points(3)
    total = points[:, None] + points[None] + points[third]
    assert (total % 3 == 0).all() and points[5].tolist() == [0, 1, 2]


def test_the_check_agrees_with_all_triples():
    generator = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        points = points_of(3)[generator.choice(27, 6, replace=False)]
        assert is_cap_set(points) != has_line(points)
        found.add(is_cap_set(points))
    assert found == {True, False}
    assert not is_cap_set(np.array([[0, 1], [0, 1]]))  # the same point twice


def test_greedy_sets_are_cap_sets_to_which_no_point_can_be_added():
    generator = np.random.default_rng(1)
    for n in (2, 3, 4):
        cap = greedy(n, generator.integers(0, 50, 3**n))
        assert is_cap_set(cap)
        for point in points_of(n):
            assert not is_cap_set(np.vstack([cap, point]))


def test_greedy_sizes_are_those_computed_elsewhere():
    assert [size("0", n) for n in range(1, 8)] == [2**n for n in range(1, 8)]
    squares = "sum(x[i] * x[i] for i in range(n)) % 3"
    assert [size(f"0 - {squares}", n) for n in range(2, 7)] == [4, 8, 18, 36, 73]
    assert [size(f"{squares} == 2", n) for n in range(2, 7)] == [4, 9, 18, 35, 71]


def test_the_published_512_points_are_a_cap_set_and_one_more_on_a_line_is_not():
    cap = published_cap_set()
    assert cap.shape == (512, 8) and is_cap_set(cap)
    assert not is_cap_set(np.vstack([cap, -(cap[3] + cap[77]) % 3]))


def test_a_priority_sees_each_point_by_its_coordinates():
    assert priority_of("3 * x[0] + x[-1]", 2).tolist() == list(range(9))
    assert priority_of("n", 2).tolist() == [2] * 9
    assert priority_of("x[0] % (x[1] - x[1])", 2).tolist() == [0] * 9
    for text in ("x", "x[5]", "y"):
        with pytest.raises(ValueError):
            priority_of(text, 2)
    with pytest.raises(ValueError, match="dimension 9: expected 1 to 8"):
        points_of(9)


def test_the_demonstration_prints_the_check(capsys):
    cap_sets.main([])
    printed = capsys.readouterr().out
    assert "512 points, a cap set" in printed and "one more on the line of two: not a cap set" in printed
