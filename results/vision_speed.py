"""A step of training of ViT and MAE beside transformers', with the same weights, images and shapes.

    python -m results.vision_speed --out results/vision_speed.json        (needs transformers)

A step is forward, backward and PyTorch's AdamW, in float32 on one thread. The losses are equal (checked). The
sides are measured in turn (A B A B ...), in processor time, so that other programs count for little. Which
library multiplies float32 matrices is one setting of a process (engine/cpu.py). train.py chooses oneDNN on a
CPU where that does not round, so transformers is measured with both: with PyTorch's default, and with oneDNN.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from formats import command
from results.in_turn import compared, measure_in_turn, one_thread, opened_by, rate, write_figures
from results.peers import require
from vision import mae, vit

SHAPES = {  # the Config of the ViT, and images of a step
    "vit tiny": (vit.SIZES["tiny"], 128),
    "vit ti-16": (vit.SIZES["ti-16"], 8),
    "mae tiny-4": (vit.SIZES["tiny-4"], 64),
    "mae ti-16": (replace(vit.SIZES["ti-16"], positions="sincos", n_classes=0), 8),
}
SECONDS = 1.0  # of processor time of a measurement, about, so that a small model makes many steps in it


def classifiers(config: vit.Config, n: int) -> tuple[nn.Module, Callable, nn.Module, Callable]:
    """Return our ViT and a function of its loss on n random images, and transformers' two."""
    import transformers

    ours = vit.ViT(config)
    nn.init.normal_(ours.classifier.weight, std=0.02)  # with zeros most gradients would be zeros, too
    theirs = opened_by(transformers.ViTForImageClassification, ours).train()
    images, labels = torch.rand(n, config.n_channels, *config.size), torch.arange(n) % config.n_classes
    pixels = ours.normalized(images)
    return (
        ours,
        lambda: ours.loss({"images": images, "targets": labels})[0],
        theirs,
        lambda: theirs(pixel_values=pixels, labels=labels).loss,
    )


def autoencoders(config: vit.Config, n: int) -> tuple[nn.Module, Callable, nn.Module, Callable]:
    """Return our MAE and a function of its loss on n random images and masks, and transformers' two."""
    import transformers

    config = replace(config, n_classes=0, positions="sincos")
    ours = mae.MAE(vit.ViT(config), mae.settings(config))
    theirs = opened_by(transformers.ViTMAEForPreTraining, ours).train()
    images, noise = torch.rand(n, config.n_channels, *config.size), torch.rand(n, config.n_patches)
    pixels = ours.model.normalized(images)
    return (
        ours,
        lambda: mae.loss(ours, {"images": images, "noise": noise})[0],
        theirs,
        lambda: theirs(pixel_values=pixels, noise=noise).loss,
    )


def step(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, precision: str):
    """Make a step with a setting of PyTorch for products in float32, and return its loss."""
    torch.set_float32_matmul_precision(precision)
    value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def measure(name: str, rounds: int, onednn: str) -> list[dict]:
    """Return the rows of one of SHAPES. Raises ValueError if the two sides do not compute the same.

    onednn: PyTorch's setting of precision by which oneDNN multiplies.
    """
    torch.manual_seed(0)
    config, n = SHAPES[name]
    kind = classifiers if name.startswith("vit") else autoencoders
    ours, our_loss, theirs, their_loss = kind(config, n)
    own, other = (torch.optim.AdamW(model.parameters()) for model in (ours, theirs))
    sides = {
        "transformers": partial(step, theirs, their_loss, other, "highest"),
        "transformers, oneDNN": partial(step, theirs, their_loss, other, onednn),
        "plinth": partial(step, ours, our_loss, own, onednn),
    }

    # Compare the losses of new models, and find out how many steps fill a measurement.
    losses = [loss().item() for loss in (our_loss, their_loss)]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise ValueError(f"{name}: the losses differ: {losses}")
    for warm_up in sides.values():
        warm_up()
    began = time.process_time()
    sides["plinth"]()
    times = max(1, round(SECONDS / (time.process_time() - began)))

    print(f"{name}, training on {n} images of {config.size[0]} x {config.size[1]}, {times} steps at once")
    timed = {side: partial(rate, of, n, times, time.process_time) for side, of in sides.items()}
    labels = {"model": name, "images": n, "parameters": sum(p.numel() for p in ours.parameters())}
    return compared(measure_in_turn(timed, rounds), "transformers", unit="images", **labels)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=command.count, default=7, help="measurements of each side (default %(default)s)")
    add("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="what is trained (default: all)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("transformers")

    load = os.getloadavg()[0]
    onednn, results = one_thread(), []
    for name in args.models:
        results += measure(name, args.rounds, onednn)
        if args.out:
            write_figures(args.out, "vision_speed", load, results)


if __name__ == "__main__":
    command.run(main)
