"""Pictures of matplotlib: written whole or not at all."""

import pytest

from formats.figures import load_pyplot, save_figure


def test_a_figure_is_saved_as_png_and_closed(rendered, tmp_path):
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(1, 1))
    axes.plot([0, 1], [0, 1])
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and not pyplot.fignum_exists(
        figure.number
    )


def test_a_figure_that_cannot_be_drawn_leaves_the_earlier_picture(rendered, tmp_path):
    (tmp_path / "a.png").write_bytes(b"earlier")
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(1, 1))
    axes.set_title("$\\frac{$")
    with pytest.raises(ValueError):
        save_figure(figure, tmp_path / "a.png")
    pyplot.close(figure)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"earlier")]
