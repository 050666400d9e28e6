"""Figures: matplotlib's pyplot without a display, and pictures that are written whole or not at all.

pyplot = load_pyplot()
figure, axes = pyplot.subplots(layout="constrained")
save_figure(figure, Path("runs/loss.png"))
"""

from pathlib import Path

from formats import atomic


def load_pyplot():
    """Return matplotlib.pyplot, for pictures in files. The import takes long, so only drawing makes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG file, 120 dots per inch, and close it."""
    from matplotlib import pyplot

    with atomic.replace_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)
