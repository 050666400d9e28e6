"""Ticks of logarithmic axes, and the mark of extrapolation."""

import math

import numpy as np
import pytest

from chinchilla import LAWS
from formats.figures import load_pyplot
from scaling import pictures


@pytest.mark.parametrize("factor", [1.05, 1.3, 2, 5, 12, 40, 150, 2e3, 1e6, 1e13, 1e30])
def test_ticks_of_any_axis_are_few_and_apart(factor):
    for low in np.geomspace(1.3e10, 1.2e11, 7):
        ticks = pictures.choose_ticks(low, low * factor)
        assert 2 < len(ticks) <= 7 and low * 0.99 <= ticks[0] and ticks[-1] <= low * factor * 1.01
        apart = np.diff(np.log(ticks)) / math.log(factor)
        assert apart.min() > 0.06  # a label takes 0.4 of the 5.5 inches of an axis


def test_the_frontier_is_dashed_and_shaded_where_it_is_extrapolated():
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots()
    pictures.plot_frontier(axes, LAWS["besiroglu"].law, (1e18, 1e22), 1e18, 1e24, "law")
    solid, dashed = axes.lines
    assert solid.get_linestyle() == "-" and solid.get_xdata()[[0, -1]] == pytest.approx([1e18, 1e22])
    assert dashed.get_linestyle() == "--" and dashed.get_xdata()[[0, -1]] == pytest.approx([1e22, 1e24])
    assert dashed.get_label() == "the same, extrapolated" and len(axes.patches) == 1
    pyplot.close(figure)
