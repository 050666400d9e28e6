"""The usage of a mixture's experts: how even their load is, and which tokens each of them gets.

    load of an expert   its number of tokens, as a multiple of the mean of its layer; 1 for all is balance
    router entropy      of a token's probabilities of the experts, averaged over the tokens: log E nats where
                        all are equal, 0 where one expert has all
    share of a token    how many of a token's occurrences go to the expert

`show` is what train.py prints of moe.py's models at every evaluation, with the loads in experts.png.

Shapes: B rows, T tokens of a row, E experts, L sparse layers.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gpt
from data.tokenizer import Tokenizer
from formats.figures import load_pyplot, save_figure

BARS = " ▁▂▃▄▅▆▇█"
N_ROWS = 16  # of held-out text
N_SHOWN = 8  # experts, and tokens of each
MIN_USES = 8  # occurrences of a token, below which its share means little


class Usage(NamedTuple):
    """Statistics of the L sparse layers of a model on some text."""

    layers: list[int]  # the numbers of the sparse layers
    loads: Tensor  # (L, E) float32, tokens of each expert
    entropy: Tensor  # (L,) nats
    dropped: float | None  # of a Switch: the share of the tokens that it would drop in training
    seen: Counter  # occurrences of each token id
    chosen: Counter  # occurrences of each (expert, token id) in the middle layer


@torch.no_grad()
def usage(model: nn.Module, tokens: Tensor) -> Usage:
    """Return the usage of the experts of a `moe.MoEGPT` in evaluation, on rows of tokens (B, T), int64."""
    model.keep_routings()
    model.hidden(tokens)
    routings = model.take_routings()

    # Statistics of each layer.
    loads = torch.stack([routing.load() for routing in routings])
    entropy = torch.stack([torch.special.entr(r.probs).sum(dim=-1).mean() for r in routings])
    dropped = None
    if model.config.router == "switch":
        dropped = model.dropped(loads, tokens.numel()).item()

    # Count tokens and experts together, in one layer.
    ids, middle = tokens.flatten(), routings[len(routings) // 2]
    chosen = Counter(zip(middle.experts.tolist(), ids[middle.tokens].tolist(), strict=True))
    layers = [i for i in range(model.config.n_layers) if i not in model.config.dense_layers]
    return Usage(layers, loads, entropy, dropped, Counter(ids.tolist()), chosen)


def report(used: Usage, tokenizer: Tokenizer) -> str:
    """Return a line for each layer, with a bar for each expert, and the tokens of the middle layer's experts.

    A bar has half of its greatest height at the mean load, and all of it from twice the mean on.
    """
    # The load of each layer.
    lines, highest = [], math.log(used.loads.shape[1])
    for layer, load, entropy in zip(used.layers, used.loads, used.entropy, strict=True):
        share = load / load.mean()
        bar = "".join(BARS[min(8, math.ceil(4 * x))] for x in share.tolist())
        text = f"load {share.min():.2f} to {share.max():.2f} of the mean, router entropy {entropy:.2f}"
        lines.append(f"layer {layer:2} |{bar}| {text} of {highest:.2f} nats")
    if used.dropped is not None:
        lines.append(f"training on this would drop {used.dropped:.1%} of the tokens")

    # The tokens of which an expert gets the highest share.
    middle = used.layers[len(used.layers) // 2]
    lines.append(f"layer {middle}: the tokens that an expert gets most of")
    for expert in range(min(N_SHOWN, used.loads.shape[1])):
        uses = {token: n for (e, token), n in used.chosen.items() if e == expert}
        often = [(n / used.seen[t], n, t) for t, n in uses.items() if used.seen[t] >= MIN_USES]
        best = sorted(often, reverse=True)[:N_SHOWN]
        text = "  ".join(f"{tokenizer.decode([t])!r} {share:.0%}" for share, _, t in best)
        lines.append(f"expert {expert}: {text}")
    return "\n".join(lines)


def draw(used: Usage, path: Path) -> None:
    """Write a heat map of the load of each expert in each layer to path, as PNG."""
    # A cell is an expert of a layer: white at the mean load, red above, blue below.
    share = (used.loads / used.loads.mean(dim=1, keepdim=True)).tolist()
    L, E = used.loads.shape
    size = (2.5 + min(10, 0.55 * E), 1.3 + 0.4 * L)
    figure, axes = load_pyplot().subplots(figsize=size, layout="constrained")
    image = axes.imshow(share, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title="load of an expert over the mean of its layer")
    axes.set_yticks(range(L), used.layers)

    # Up to 16 columns are wide enough for figures.
    if E <= 16:
        axes.set_xticks(range(E))
        for row, of_layer in enumerate(share):
            for expert, x in enumerate(of_layer):
                colour = "white" if abs(x - 1) > 0.6 else "black"
                axes.text(expert, row, f"{x:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, extend="max")
    save_figure(figure, path)


def show(model: nn.Module, dataset, out: Path | None = None) -> str:
    """Return the usage on the first rows of the held-out text, then a text as gpt.py shows one.

    out: the directory for experts.png, or None for no picture.
    """
    tokens = torch.from_numpy(dataset.val.tokens[: N_ROWS * dataset.val.seq_len].astype("int64"))
    T = min(model.config.max_seq_len, max(1, len(tokens) // N_ROWS))
    rows = tokens[: len(tokens) // T * T].view(-1, T)
    used = usage(model, rows.to(model.head_weight.device))
    if out is not None:
        draw(used, out / "experts.png")
    return f"{report(used, dataset.tokenizer)}\n\n{gpt.show(model, dataset)}"
