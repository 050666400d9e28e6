"""How fast is a training step of vision/clip.py beside CLIPModel of transformers, with the same weights?

    python -m results.clip_speed --out results/clip_speed.json          some minutes

Both sides compute the contrastive loss of the same batch in float32, its gradients, and a step of fused
AdamW. transformers reads the weights that ours writes, and both losses are compared before any timing. Each
image and each caption has as many tokens on both sides. The steps are made in turn in one process with one
thread, and the first of each is not counted. Pairs per second are by processor time of this process, which
other programs on the machine lengthen little.

Ours computes less: the last layer of each tower computes only the token that is read. Besides, its queries,
keys and values are one product, and the activation's gradient is computed in place.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from engine import cpu
from formats import command
from results.in_turn import arguments, compared, measure_in_turn, opened_by, rate, write_figures
from results.peers import require
from vision.clip import CLIP, SIZES, Config

WIDE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "d_ff": 1536, "image_size": 64, "n_channels": 3}
WIDE |= {"text_layers": 4, "text_heads": 4, "text_width": 256, "text_ff": 1024, "d_joint": 256}
SHAPES = {  # the model, pairs of a batch, tokens of a caption
    "tiny": (replace(SIZES["tiny"], vocab_size=512, eos_token_id=511), 256, 9),
    "6 layers, width 384": (replace(SIZES["tiny"], **WIDE, vocab_size=4096, eos_token_id=4095), 32, 16),
}


def batch_of(config: Config, n: int, n_tokens: int) -> dict[str, Tensor]:
    """Return a batch of n random pairs."""
    tokens = torch.randint(0, config.eos_token_id, (n, n_tokens))
    tokens[:, -1] = config.eos_token_id
    return {"images": torch.rand(n, config.n_channels, *config.size), "tokens": tokens}


def sides_of(ours: CLIP, batch: dict[str, Tensor]) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Return both models, each with a function that returns its loss of the batch."""
    from transformers import CLIPModel

    theirs = opened_by(CLIPModel, ours).train()
    pixels = ours.normalized(batch["images"])
    arguments = {"input_ids": batch["tokens"], "pixel_values": pixels, "return_loss": True}
    return {
        "vision/clip.py": (
            ours,
            lambda: ours.compare(ours.encode_images(pixels), ours.encode_texts(batch["tokens"]))[0],
        ),
        "transformers": (theirs, lambda: theirs(**arguments).loss),
    }


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that makes a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 9, argv)
    require("transformers")
    torch.set_num_threads(1)
    cpu.multiply_by_onednn()  # for both sides: it is a setting of the process
    load, results = os.getloadavg()[0], []
    for name, (config, n, n_tokens) in SHAPES.items():
        torch.manual_seed(0)
        ours = CLIP(config).train()
        sides = sides_of(ours, batch_of(config, n, n_tokens))
        torch.testing.assert_close(*(loss() for _, loss in sides.values()), rtol=1e-5, atol=1e-5)
        print(f"{name}: batches of {n} pairs")
        timed = {
            side: partial(rate, step_of(model, loss), n, clock=time.process_time)
            for side, (model, loss) in sides.items()
        }
        figures = measure_in_turn(timed, args.rounds, warm_up=1)
        results += compared(figures, "transformers", unit="pairs", shape=name, batch=n)
    if args.out:
        write_figures(args.out, "clip_speed", load, results)


if __name__ == "__main__":
    command.run(main)
