"""What the experts of a mixture are used for: how even their load is, and which tokens each of them likes.

    load of an expert   the tokens it gets, as a multiple of the mean of its layer; 1 everywhere is balance
    router entropy      of the scores of a token, mean over the tokens: log E where the router has no opinion,
                        0 where one expert has all the weight
    liking              the share of a token's occurrences that go to the expert

moe.py's `show`: train.py prints it at every evaluation, and keeps the picture as experts.png.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gpt
from data.tokenizer import Tokenizer
from formats.atomic import replace_file

BARS = " ▁▂▃▄▅▆▇█"
N_SHOWN = 8  # experts, and the tokens that each of them likes
MIN_USES = 8  # of a token, before its share means anything


class Usage(NamedTuple):
    """Of the L sparse layers of a model."""

    layers: list[int]
    loads: Tensor  # (L, E) float32, tokens
    entropy: Tensor  # (L,) nats
    dropped: float | None  # of a Switch: the share of the tokens that training on as many would drop
    seen: Counter  # how often each token id came
    chosen: Counter  # how often which (expert, token id) met in the middle one of the layers


@torch.no_grad()
def usage(model: nn.Module, tokens: Tensor) -> Usage:
    """How a `moe.MoEGPT` in evaluation routes rows of tokens (B, T), int64."""
    routings = model.record_routings()
    model.hidden(tokens)
    loads = torch.stack([routing.load() for routing in routings])
    entropy = torch.stack([torch.special.entr(r.probs).sum(dim=-1).mean() for r in routings])
    dropped = None
    if model.config.router == "switch":
        dropped = model.dropped(loads, tokens.numel()).item()
    ids, middle = tokens.flatten(), routings[len(routings) // 2]
    chosen = Counter(zip(middle.experts.tolist(), ids[middle.tokens].tolist(), strict=True))
    layers = [i for i in range(model.config.n_layers) if i not in model.config.dense_layers]
    return Usage(layers, loads, entropy, dropped, Counter(ids.tolist()), chosen)


def report(used: Usage, tokenizer: Tokenizer) -> str:
    """A line for each layer, with a bar for each expert, half as high as bars get at the mean load; then what
    the experts of the middle layer like."""
    lines, highest = [], math.log(used.loads.shape[1])
    for layer, load, entropy in zip(used.layers, used.loads, used.entropy, strict=True):
        share = load / load.mean()
        bar = "".join(BARS[min(8, math.ceil(4 * x))] for x in share.tolist())
        told = f"load {share.min():.2f} to {share.max():.2f} of the mean, router entropy {entropy:.2f}"
        lines.append(f"layer {layer:2} |{bar}| {told} of {highest:.2f} nats")
    if used.dropped is not None:
        lines.append(f"training on this would drop {used.dropped:.1%} of the tokens")
    middle = used.layers[len(used.layers) // 2]
    lines.append(f"layer {middle}: the tokens that an expert gets most of")
    for expert in range(min(N_SHOWN, used.loads.shape[1])):
        uses = {token: n for (e, token), n in used.chosen.items() if e == expert}
        often = [(n / used.seen[t], n, t) for t, n in uses.items() if used.seen[t] >= MIN_USES]
        best = sorted(often, reverse=True)[:N_SHOWN]
        told = "  ".join(f"{tokenizer.decode([t])!r} {share:.0%}" for share, _, t in best)
        lines.append(f"expert {expert}: {told}")
    return "\n".join(lines)


def draw(used: Usage, path: Path) -> None:
    """A heat map: the load of each expert in each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = (used.loads / used.loads.mean(dim=1, keepdim=True)).tolist()
    L, E = used.loads.shape
    size = (2.5 + min(10, 0.55 * E), 1.3 + 0.4 * L)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(share, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title="load of an expert over the mean of its layer")
    axes.set_yticks(range(L), used.layers)
    if E <= 16:  # room for figures
        axes.set_xticks(range(E))
        for row, of_layer in enumerate(share):
            for expert, x in enumerate(of_layer):
                colour = "white" if abs(x - 1) > 0.6 else "black"
                axes.text(expert, row, f"{x:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, extend="max")
    with replace_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)


def show(model: nn.Module, tokenizer: Tokenizer, held_out: Tensor, directory: Path | None = None) -> str:
    """A text, as gpt.py shows one, and the usage on 16 rows of the held-out text (n,), which experts.png in
    directory draws."""
    T = min(model.config.max_seq_len, max(1, held_out.numel() // 16))
    rows = held_out[: held_out.numel() // T * T].view(-1, T)
    used = usage(model, rows.to(model.head_weight.device))
    if directory is not None:
        draw(used, directory / "experts.png")
    return f"{report(used, tokenizer)}\n\n{gpt.show(model, tokenizer)}"
