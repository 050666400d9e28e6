"""Figures of several seeds: their line with a band."""

import pytest

from formats.figures import load_pyplot
from results import seeds


@pytest.mark.parametrize("style", [{}, {"drawstyle": "steps-post"}])
def test_the_band_reaches_from_the_smallest_to_the_largest_value(style):
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots()
    seeds.draw(axes, [10, 20], [[1, 2], [3, 8]], label="method", **style)
    (line,), (band,) = axes.lines, axes.collections
    assert list(line.get_ydata()) == [2, 5] and line.get_label() == "method"
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners >= {(10, 1), (10, 3), (20, 2), (20, 8)}
    assert ((20, 1) in corners) == bool(style)  # a step holds its value until the next
    pyplot.close(figure)
