"""The family tree of models that draw images, as a picture: what of the density each of them computes.

    python -m results.family_tree --out results/family_tree.png

From left to right: what is known of p(x), the family, its file, and the loss that is minimised. Diffusion is
on two branches, because its loss is both a weighted bound on the likelihood and the error of an estimated
score. An energy model is on two as well: it has an energy, and its chain follows the score. The equations are
those of docs/generative.md.
"""

from pathlib import Path

from formats import command
from formats.figures import load_pyplot, save_figure

KNOWN = {  # what is known of the density: its height in the picture
    "the likelihood": 5.5,
    "a bound on it": 3.7,
    "the score, its slope\n" r"$\nabla_x \log p(x)$": 2.3,
    "an energy: $p(x)$\nbut for a constant": 1.0,
    "nothing but samples:\nan adversary": 0.0,
}
FAMILIES = [  # name, what is minimised, file, its branches
    ("autoregressive", r"$-\sum_i \log p(x_i \,|\, x_{<i})$", "igpt.py", (0,)),
    (
        "normalising flow",
        r"$-\log \mathcal{N}(f(x)) - \log |\det \partial f / \partial x|$",
        "flow.py",
        (0,),
    ),
    (
        "variational autoencoder",
        r"$E_q[-\log p(x | z)] + KL(q(z|x) \,\|\, \mathcal{N}(0, I))$",
        "vae.py",
        (1,),
    ),
    (
        "diffusion",
        r"$E \| v_\theta(x_t, t) - (\sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x_0) \|^2$",
        "ddpm.py, dit.py",
        (1, 2),
    ),
    ("energy model", r"$E(x) - E(x^-)$, with $x^-$ of Langevin's chain", "energy.py", (2, 3)),
    (
        "adversarial network",
        r"$D$: $-\log \sigma(D(x)) - \log \sigma(-D(G(z)))$;  $G$: $-\log \sigma(D(G(z)))$",
        "gan.py",
        (4,),
    ),
]
ROOT, BRANCHES, LEAVES = 0.0, 2.0, 4.5  # places of the columns from left to right
EDGE, INK, QUIET = "#9aa3ad", "#22252a", "#5b6570"
HUES = ("#2a6fb0", "#4c8c4a", "#8a6d1d", "#b0562a", "#8b3a8b")  # of the branches


def draw(path: Path) -> None:
    """Write the picture as a PNG."""
    import matplotlib

    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(12, 5), layout="constrained")
    heights, places = list(KNOWN.values()), [6.0, 5.0, 4.0, 2.9, 1.6, 0.0]
    middle = sum(heights) / len(heights)

    def edge(x: float, y: float, to_x: float, to_y: float, hue: str) -> None:
        bend = (x + to_x) / 2
        curve = matplotlib.path.Path([(x, y), (bend, y), (bend, to_y), (to_x, to_y)], [1, 4, 4, 4])
        axes.add_patch(
            matplotlib.patches.PathPatch(curve, fill=False, edgecolor=hue, linewidth=1.6, zorder=0)
        )

    # The root, and what is known of the density.
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "linewidth": 1.4}
    for (name, y), hue in zip(KNOWN.items(), HUES, strict=True):
        edge(ROOT, middle, BRANCHES, y, EDGE)
        axes.text(BRANCHES, y, name, ha="center", va="center", color=INK, bbox=box | {"edgecolor": hue})
    title = "draw new $x$\nas from $p(x)$"
    axes.text(ROOT, middle, title, ha="center", va="center", color=INK, bbox=box | {"edgecolor": INK})

    # The families, what each minimises, and its file.
    for (name, loss, file, branches), y in zip(FAMILIES, places, strict=True):
        for i in branches:
            edge(BRANCHES, heights[i], LEAVES - 0.08, y, HUES[i])
        axes.text(LEAVES, y + 0.04, name, va="bottom", color=INK, weight="bold")
        axes.text(LEAVES, y - 0.04, file, va="top", color=QUIET, family="monospace", size=9)
        axes.text(LEAVES + 2.1, y, loss, va="center", color=INK, size=11)
    axes.text(LEAVES + 2.1, 6.6, "what is minimised", color=QUIET, va="center")
    axes.text(LEAVES, 6.6, "family", color=QUIET, va="center")
    axes.text(BRANCHES, 6.6, "what is known of p", color=QUIET, va="center", ha="center")
    axes.set(xlim=(-0.7, 10.6), ylim=(-0.6, 6.9))
    axes.axis("off")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    path = Path("results/family_tree.png")
    parser.add_argument("--out", type=command.new_file, default=path, help="picture (default %(default)s)")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    command.run(main)
