"""DDPM: images from noise, by a network that has learned to remove noise.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps              t: uniform, eps: normal noise, a_t: a schedule
    loss = mean of (model(x_t, t, words) - target)^2     target: x_0, v or eps

Denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239). The network learns to predict the
image that a noisy one was made from. A sampler begins with noise alone and at each step removes a little of
it, according to this prediction. The schedules and the samplers are in vision/noise.py; the network is the
U-Net of vision/unet.py, or another denoiser such as vision/dit.py.

The paper predicts eps. At large t, eps is nearly equal to x_t, so this loss is small even where nothing is
known of the image. The errors of v (Salimans and Ho 2022, 2202.00512) and of x_0 are large there, so they
teach what x_0 looks like. x_0 is the default here: at this size it draws the best letters of the three
(results/ddpm.py).

A tenth of the training images are shown without any of their words. So one network learns to predict with
words (c) and without them (u), and sampling exaggerates the difference by the guidance w: u + w (c - u) (Ho
and Salimans 2022, 2207.12598). Images are drawn with an average of the weights over the last updates (--ema),
as in the paper.

    python train.py --model ddpm                                     letters from their names
    python -m vision.ddpm runs/ddpm/model --prompt "bold italic serif latin small letter g" --out g.png
    python train.py --model ddpm --data photos --size ddpm-32        a folder of images, or one for each class

Shapes: B images, C channels, h x w pixels, W words of an image, T time steps.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.augment import Augmentation, augment
from data.rows import Dataset, Row, stack
from engine import pictures
from formats import command, schedules
from formats.open_model import open_model
from vision import conditions, drawing, judge, noise
from vision.conditions import Words
from vision.unet import UNet

MODEL, DATA = "unet", "glyphs"
OPTIMIZER, BATCH_SIZE, STEPS, EMA = "adamw", 64, 2000, 0.999
LEARNING_RATE = 0.4  # times the optimizer's default
LOSS, TOKEN_LOSS = "squared error", ""
GUIDANCE = (1.0, 2.0)  # of the images that an evaluation draws
SAMPLER_STEPS = 25  # of DDIM, for these images
SHOWN = 12  # of these images in a row of the picture
MOST_DRAWN = 256  # of these images at most, for the judge


@dataclass(frozen=True)
class Config(noise.Process, Augmentation):
    """The target, the schedule of the noise, and how often the words are left out."""

    warp: float = 0.0
    target: str = "x0"  # or "v", or "eps"
    schedule: str = "cosine"  # or "linear", or "scaled_linear", see vision/noise.py
    n_steps: int = 1000  # T
    zero_terminal: bool = False  # whether the last x_t is pure noise
    drop: float = 0.1  # share of the training images that are shown without their words
    MAY_BE_ZERO = ("warp", "drop")


class Diffusion(nn.Module):
    """A denoiser with the settings of its training: the schedule of the noise and the target."""

    def __init__(self, model: nn.Module, settings: Config):
        super().__init__()
        self.model, self.config, self.settings = model, model.config, settings
        self.alpha_bar = settings.alpha_bar  # no buffer: it has to stay float64

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean squared error, a scalar, for a batch of `make_batch`."""
        kind, t, eps = self.settings.target, batch["t"], batch["noise"]
        x0 = 2 * batch["images"] - 1
        x = noise.q_sample(x0, t, eps, self.alpha_bar)
        # A published model may return a variance in further channels, which this loss does not train.
        output = self.model(x, t, batch.get("classes"))[:, : x.shape[1]]
        return (output.float() - noise.target(kind, x0, eps, t, self.alpha_bar)).square().mean()

    @torch.no_grad()
    def draw(
        self,
        classes: Tensor | None,
        n: int,
        *,
        guidance: float = 1.0,
        rescale: float = 0.0,
        steps: int = SAMPLER_STEPS,
        eta: float = 0.0,
        seed: int = 0,
    ) -> Tensor:
        """Return n images (n, C, h, w) with pixels in [0, 1].

        classes: the words or the class of each image (n, W), -1 for padding; None if the model reads none.
        guidance and rescale: see `noise.guide`. steps: of the sampler. eta: 0 for DDIM, 1 for DDPM. The first
        noise is drawn on the CPU with this seed, so that with eta = 0 all devices draw the same images, up to
        rounding. Raises ValueError for more steps than the schedule has.
        """
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, self.config.n_channels, *self.config.size, generator=generator).to(device)
        denoise = self.model
        if classes is not None:
            classes = classes.to(device)
            none = conditions.nothing(classes, self.config.n_classes - 1)
            denoise = noise.guided_at_once(self.model, classes, none, guidance, rescale)

        return (self.settings.draw(denoise, x, steps, eta, seed + 1, clip=1.0) + 1) / 2

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model, and its schedule as diffusers' scheduler_config.json."""
        self.model.save_pretrained(directory)
        # Diffusers' DDPMPipeline runs a U-Net without conditions only.
        is_plain = isinstance(self.model, UNet) and not self.config.n_classes
        schedules.write(directory, **self.settings.process, pipeline=is_plain)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Diffusion":
        """Return the model in a directory with its schedule. Raises ValueError if one of them is missing."""
        return cls(open_model(directory), Config(**schedules.read(directory)))


# --- the task, see engine/contract.py


def settings(config: Any) -> Config:
    """Return the default settings of the task: x_0, and the cosine schedule."""
    return Config()


def load_data(args: Namespace, config: Any) -> Dataset:
    """Return images, with a trivial guess in one line: the error of the mean image as prediction of each x_0.

    It is computed on at most a thousand training images.
    """
    dataset = conditions.load(args, config)
    rows = [dataset.train[i] for i in range(0, len(dataset.train), -(-len(dataset.train) // 1000))]
    images = 2 * stack(rows)["image"].float() / 255 - 1
    spread = (images - images.mean(0)).square().mean().item()
    return replace(dataset, guess=f"the mean image has a squared error of {spread:.3f} as x_0")


def wrap(model: nn.Module, config: Config) -> Diffusion:
    """Return the model with the settings of its training."""
    return Diffusion(model, config)


def unwrap(module: Diffusion) -> nn.Module:
    """Return the denoiser."""
    return module.model


def restore(module: Diffusion, directory: str) -> None:
    """Raise ValueError if the model in a directory was trained with another schedule or target."""
    if not (Path(directory) / schedules.FILE).is_file():
        return
    for name, value in schedules.read(directory).items():
        own = getattr(module.settings, name)
        if own != value:
            raise ValueError(f"--set {name}={own}: the model in {directory} has {name}={value}; give that")


def classes_of(batch: dict[str, Tensor]) -> Tensor:
    """Return the words or the class (B, W) of each row of a batch; a class is a row with W = 1."""
    return batch["tokens"] if "tokens" in batch else batch["label"][:, None]


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, words: Words | None
) -> dict[str, Tensor]:
    """Return "images" (B, C, h, w) with pixels in [0, 1], normal "noise" of the same shape, times "t" (B,),
    and "classes" (B, W) if the data have words or classes. The times are those of `noise.even_times`.
    """
    batch = stack(rows)
    n = len(rows)
    images = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    found = {"images": images, "t": noise.even_times(n, config.n_steps, generator)}
    found["noise"] = torch.randn(images.shape, generator=generator)
    if words is not None:
        classes = classes_of(batch)
        none = conditions.nothing(classes, words.none)
        dropped = batch["augment"] & (torch.rand(n, generator=generator) < config.drop)
        found["classes"] = torch.where(dropped[:, None], none, classes)
    return found


def loss(module: Diffusion, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error of the target, for a batch of `make_batch`, and no other metrics."""
    return module(batch), {}


def save(module: Diffusion, dataset: Dataset, directory: Path) -> None:
    """Write the model and its schedule into a directory."""
    module.save_pretrained(directory)


def flops_per_token(module: Diffusion, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image: those of the denoiser."""
    return module.model.flops_per_token(seq_len)


def show(module: Diffusion, dataset: Dataset, out: Path) -> str:
    """Draw images for held-out captions, whose images the model has not seen, below these images. Return how
    often a classifier of real images (vision/judge.py) recognises them. Without captions, draw some images.
    """
    val = dataset.val
    if dataset.tokenizer is None:
        images = module.draw(None, 3 * SHOWN)
        pictures.save(out, images.split(SHOWN))
        return f"picture.png: drawn from noise, by {SAMPLER_STEPS} steps of DDIM"

    # Draw as many as the judge classifies, or without a judge those of the picture.
    opinion = judge.of(dataset)
    most = MOST_DRAWN if opinion else SHOWN
    chosen = list(range(0, len(val), -(-len(val) // most)))
    batch = stack([val[i] for i in chosen])
    true, classes = batch["image"].float() / 255, classes_of(batch)
    drawn = {w: module.draw(classes, len(chosen), guidance=w).cpu() for w in GUIDANCE}

    # The picture, and below it the figures.
    n_shown = min(SHOWN, len(chosen))
    shown = [i * len(chosen) // n_shown for i in range(n_shown)]
    labels = ("real", *(f"w = {w:g}" for w in GUIDANCE))
    pictures.save(out, [images[shown] for images in (true, *drawn.values())], labels=labels)
    lines = [f"picture.png: real, and drawn with guidance {', '.join(f'{w:g}' for w in GUIDANCE)}"]
    lines.append(judge.in_words("real  ", true, None, opinion, chosen))
    for w, images in drawn.items():
        lines.append(judge.in_words(f"{f'w = {w:g}':6}", images, true, opinion, chosen))
    return "\n".join(lines)


# --- the command


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Draw images by a trained model.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a model, such as runs/ddpm/model")
    add("--prompt", nargs="+", default=[], help="words, or a class, of each row of images (default: none)")
    add("--rescale", type=float, default=0.0, help="0 to 1: less contrast at a large w (default %(default)s)")
    drawing.add_sampling(parser)
    args = parser.parse_args(argv)
    drawing.check_sampling(args)
    if not 0 <= args.rescale <= 1:
        raise ValueError(f"--rescale {args.rescale}: expected a number from 0 to 1")

    # The words are checked before the weights are read.
    words = conditions.read_words(args.checkpoint)
    if args.prompt and words is None:
        raise ValueError(f"--prompt {args.prompt[0]!r}: {args.checkpoint} draws without words; leave it out")
    numbers = [words.encode(prompt) for prompt in args.prompt] if words else []
    numbers = numbers or ([[words.none]] if words else [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = Diffusion.from_pretrained(args.checkpoint).float().to(device).eval()
    classes, n = None, args.n
    if numbers:
        width = max(map(len, numbers))
        rows = [[*row, *[-1] * (width - len(row))] for row in numbers]
        classes, n = torch.tensor(rows).repeat_interleave(args.n, 0), args.n * len(rows)
    how = {"guidance": args.guidance, "rescale": args.rescale, "steps": args.steps, "eta": args.eta}
    images = module.draw(classes, n, **how, seed=args.seed).cpu()
    drawing.save_rows(images, args)


if __name__ == "__main__":
    command.run(main)
