"""Drawing images beside diffusers' pipeline: the same weights, the same noise, the same steps of DDIM.

    python -m results.sampling_speed --out results/sampling_speed.json        (needs diffusers 0.42.1)

An untrained U-Net that predicts v (vision/ddpm.py) is saved as a DDPMPipeline and opened by diffusers, which
draws with its DDIMPipeline; the time does not depend on the weights. Both draw the same images (checked:
pixels in [0, 1] differ by at most 1e-4). One thread, float32. The sides are measured in turn (A B A B ...),
in processor time, so that other programs count for little. Which library multiplies float32 matrices is one
setting of a process (engine/cpu.py). Our commands choose oneDNN on a CPU where that does not round, so
diffusers is measured with both: with PyTorch's default, and with oneDNN.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from formats import command
from results.in_turn import compared, measure_in_turn, one_thread, rate, write_figures
from results.peers import require
from vision import ddpm, unet

SHAPES = {  # the size of the U-Net, images that are drawn at once, and steps
    "tiny, one image": ("tiny", 1, 25),
    "tiny, 64 images": ("tiny", 64, 25),
    "ddpm-32, one image": ("ddpm-32", 1, 5),
    "ddpm-32, 8 images": ("ddpm-32", 8, 5),
}


def pipelines(size: str, n: int, steps: int) -> tuple[Callable, Callable]:
    """Return two functions that draw n images (n, H, W, C) in [0, 1] with one U-Net: ours, and diffusers'."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = ddpm.Diffusion(unet.UNet(replace(unet.SIZES[size], n_classes=0)), ddpm.Config()).eval()
    torch.nn.init.normal_(model.model.conv_out.weight, std=0.02)  # not zeros, as at the start of training
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = diffusers.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    scheduler = diffusers.DDIMScheduler.from_config(opened.scheduler.config, set_alpha_to_one=True)
    pipeline = diffusers.DDIMPipeline(unet=opened.unet.eval(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def theirs():
        generator = torch.Generator().manual_seed(0)
        options = {"generator": generator, "num_inference_steps": steps, "output_type": "np"}
        options |= {"eta": 0.0, "use_clipped_model_output": True}
        return pipeline(batch_size=n, **options).images

    def ours():
        return model.draw(None, n, steps=steps, seed=0).permute(0, 2, 3, 1).numpy()

    return ours, theirs


def with_precision(draw: Callable, precision: str) -> None:
    """Draw with a setting of PyTorch for products in float32."""
    torch.set_float32_matmul_precision(precision)
    draw()


def measure(name: str, rounds: int, onednn: str) -> list[dict]:
    """Return the rows of one of SHAPES. Raises ValueError if the two sides do not draw the same.

    onednn: PyTorch's setting of precision by which oneDNN multiplies.
    """
    size, n, steps = SHAPES[name]
    ours, theirs = pipelines(size, n, steps)
    difference = abs(ours() - theirs()).max()
    if difference > 1e-4:
        raise ValueError(f"{name}: the images differ by up to {difference}")
    sides = {
        "diffusers": partial(with_precision, theirs, "highest"),
        "diffusers, oneDNN": partial(with_precision, theirs, onednn),
        "plinth": partial(with_precision, ours, onednn),
    }
    print(f"{name}, {steps} steps of DDIM; images differ by up to {difference:.0e}")
    timed = {side: partial(rate, draw, n, 1, time.process_time) for side, draw in sides.items()}
    labels = {"model": name, "steps": steps, "difference": float(difference)}
    return compared(measure_in_turn(timed, rounds), "diffusers", unit="images", **labels)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=command.count, default=7, help="measurements of each side (default %(default)s)")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="what is drawn (default: all)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("diffusers", "diffusers==0.42.1")

    load = os.getloadavg()[0]
    onednn, results = one_thread(), []
    for name in args.shapes:
        results += measure(name, args.rounds, onednn)
        if args.out:
            write_figures(args.out, "sampling_speed", load, results, peer="diffusers")


if __name__ == "__main__":
    command.run(main)
