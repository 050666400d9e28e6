"""Who sees whom: which tokens reach which, in one layer of each kind of attention.

    python -m results.who_sees_whom --out results/who_sees_whom.png

Row i of a panel is the token that reads, column j the token that is read. The darker a cell, the larger is
the derivative of the layer's output at i by its input at j, on a logarithmic scale; white is exactly zero.
The derivatives are those of the models' own code, with random weights and random inputs of 64 tokens. All
layers have two heads. Where each head chooses blocks for itself (MoBA), a cell is white if neither of them
sees it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import gpt
from attention_variants import latent, linear, local_global, moba, native_sparse, talking_heads
from formats import command
from formats.figures import load_pyplot, save_figure

T = 64
SHAPE = dict(n_layers=2, n_heads=2, d_model=64, d_ff=64, vocab_size=64, max_seq_len=T)
BLOCKS = dict(block_size=8, n_selected=3)
LATENT = dict(kv_rank=16, d_nope=32, d_rope=16, d_value=32)
SPARSE = BLOCKS | dict(summary_size=8, summary_stride=4, window=12)
LOCAL_GLOBAL = local_global.Config(**SHAPE, window=12, full_layers=(1,))
LAYERS = {  # a title, the class and the Config of a model, and which of its two layers is drawn
    "softmax": (gpt.GPT, gpt.Config(**SHAPE), 0),
    "talking heads": (talking_heads.TalkingHeads, talking_heads.Config(**SHAPE), 0),
    "latent attention": (latent.LatentGPT, latent.Config(**SHAPE, **LATENT), 0),
    "linear, with decay": (linear.LinearGPT, linear.Config(**SHAPE, chunk=16), 0),
    "local layer, window 12": (local_global.LocalGlobal, LOCAL_GLOBAL, 0),
    "its global layer": (local_global.LocalGlobal, LOCAL_GLOBAL, 1),
    "MoBA, 3 blocks of 8": (moba.MoBA, moba.Config(**SHAPE, **BLOCKS), 0),
    "native sparse attention": (native_sparse.NativeSparse, native_sparse.Config(**SHAPE, **SPARSE), 0),
}


def influence(model: nn.Module, layer: int) -> Tensor:
    """Return (T, T), float64: how much the input at j of a layer's attention changes its output at i.

    It is the norm of the derivative of the output at i, projected to one random direction, by the input at j.
    """
    # The layer's further arguments, such as rotary angles, are those that the model gives it.
    model, given = model.double().eval(), []
    attention = model.model.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: given.extend(args))
    model(torch.randint(SHAPE["vocab_size"], (1, T)))
    hook.remove()

    x = torch.randn(1, T, SHAPE["d_model"], dtype=torch.float64, requires_grad=True)
    output = attention(x, *given[1:])[0] @ torch.randn(SHAPE["d_model"], dtype=torch.float64)
    rows = [torch.autograd.grad(output[i], x, retain_graph=True)[0][0].norm(dim=1) for i in range(T)]
    return torch.stack(rows)


def made(name: str) -> tuple[nn.Module, int]:
    """Return the model of one of LAYERS, always with the same weights, and which layer is drawn."""
    model, config, layer = LAYERS[name]
    torch.manual_seed(0)
    return model(config), layer


def draw(tables: dict[str, Tensor], path: Path) -> None:
    """Write a picture with a panel for each table (T, T)."""
    from matplotlib.colors import LogNorm

    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 4, figsize=(10, 5.4), layout="constrained", sharex=True, sharey=True)
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=True):
        largest = table.max().item()
        shown = table.masked_fill(table == 0, float("nan"))
        image = axis.imshow(shown, cmap="viridis_r", norm=LogNorm(largest / 1000, largest))
        axis.set_title(name, fontsize=10)
        axis.set_xticks([0, 16, 32, 48, 63])
        axis.set_yticks([0, 16, 32, 48, 63])
    figure.supxlabel("token that is read")
    figure.supylabel("token that reads")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[])
    bar.set_label("influence, each panel's own scale, 1 : 1000")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=command.new_file, required=True, help="picture to write, a PNG")
    args = parser.parse_args(argv)
    draw({name: influence(*made(name)) for name in LAYERS}, args.out)


if __name__ == "__main__":
    command.run(main)
