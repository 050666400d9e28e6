"""Energy: a network that computes the energy of an image, and Markov chains that draw images of low energy.

    p(x) = exp(-E(x) / T) / Z                         Z, an integral over all images, is never computed
    x <- x - s dE/dx + r N(0, I)                      a step of Langevin dynamics; T = r^2 / (2 s)
    -T d log p(x) / dw = dE(x)/dw - <dE/dw>           < > is the mean over samples of p, w a weight
    loss = mean of E(data) - E(samples) + alpha (E(data)^2 + E(samples)^2)

Implicit generation and modeling with energy based models (Du and Mordatch 2019, arXiv 1903.08689). Samples
are drawn by chains of Langevin dynamics: steps downhill, with noise. After many small steps the images of a
chain are samples of p, whatever it began with. Samples are constants in the loss: its gradient lowers the
energy of the data and raises that of the samples, until both are equal on average.

Chains that began anew in each update would be too short. So they persist (Tieleman 2008; Du and Mordatch,
section 3.3): a buffer holds the images that chains have reached. An update takes some of these chains, moves
them on by n_steps, and puts them back; one in twenty begins anew from uniform noise. The buffer belongs to
the state of the training, so a checkpoint holds it, and resuming is exact. The saved model is the energy
alone, without chains: `draw` begins with noise.

Step and noise are those of a low temperature, T = 1.25e-6, as in the code of the paper. At T = 1 a step of
s = 10 would have noise of r = sqrt(2 s) = 4.5, but pixels are from -1 to 1. The model is the same at any T,
since T only scales the energy. But at this T the steps are large beside the width of the minima, so chains
are closer to gradient descent than to exact samples of p. `langevin` itself is exact up to the size of its
steps: for E = x^2 / 2 and T = 1 the variance of a chain is 1 / (1 - s / 2), not 1.

alpha keeps energies near 0; their difference does not change if a constant is added to all (section 3.4 of
the paper). There is no batch norm, with which the energy of an image would depend on other images. Swish
(SiLU) is smooth, and so dE/dx is smooth too.

    python train.py --model energy                             letters, 16 x 16
    python -m vision.energy runs/energy/model --out e.png      draw images

Shapes: B batch, C channels, H x W pixels, M chains.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.rows import Dataset, Row, stack
from engine import pictures
from formats import command, native
from formats.config_values import check_values
from vision import drawing, frechet
from vision.drawing import fit  # noqa: F401, the trainer calls it

KIND, DATA = "energy model", "glyphs:all"
OPTIMIZER, BETAS, BATCH_SIZE, STEPS, EMA, LEARNING_RATE = "adamw", (0.0, 0.99), 64, 1200, 0.99, 0.1
LOSS, TOKEN_LOSS = "energy of data minus that of samples", ""


@dataclass(frozen=True)
class Config:
    width: int = 32  # channels of the first layer
    n_chains: int = 4096  # M, in the buffer
    n_steps: int = 20  # of each chain in an update
    n_drawing_steps: int = 200  # of each chain in `draw`, from noise
    step_size: float = 10.0  # s, for pixels from -1 to 1
    noise: float = 0.005  # r
    most_slope: float = 0.03  # dE/dx is clipped to this, at each pixel
    restart: float = 0.05  # share of the chains of an update that begin anew
    alpha: float = 0.1  # weight of the squared energies in the loss
    data_noise: float = 0.01  # added to real images, so that p is not a set of peaks at the levels of pixels
    image_size: tuple[int, ...] = (16, 16)  # height and width in pixels
    n_channels: int = 1
    max_seq_len = 1  # a row of the data is one image
    MAY_BE_ZERO = ("restart", "alpha", "data_noise", "noise")

    def __post_init__(self):
        check_values(self)
        if len(self.image_size) != 2 or any(side < 1 or side % 4 for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size}: expected multiples of 4 pixels, height and width"
            )
        if self.restart > 1:
            raise ValueError(f"restart {self.restart}: expected at most 1")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the channels, height and width of an image."""
        return self.n_channels, *self.image_size


SIZES = {"tiny": Config(), "small": Config(width=96, n_steps=40, image_size=(32, 32))}


# --- the chain and the loss, for any energy


def langevin(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    n_steps: int,
    step_size: float,
    noise: float,
    *,
    most_slope: float = math.inf,
    bound: float = math.inf,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the states (B, ...) of chains that begin at x (B, ...), after n_steps of Langevin dynamics with
    step_size s and noise r. The result has no gradient.

    energy: a function from (B, ...) to (B,). most_slope: each number of dE/dx is clipped to plus or minus
    this. bound: x is clamped to [-bound, bound]. generator: draws the noise, on its own device; PyTorch's
    default generator if None.
    """
    device = x.device if generator is None else generator.device
    for _ in range(n_steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(x).sum(), x)
        draws = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        x = x.detach() - step_size * slope.clamp(-most_slope, most_slope) + noise * draws
        x = x.clamp(-bound, bound)
    return x


def contrast(of_data: Tensor, of_samples: Tensor, alpha: float) -> Tensor:
    """Return the loss () of the header for the energies of data and of samples, each (B,)."""
    size = (of_data.square() + of_samples.square()).mean()
    return of_data.mean() - of_samples.mean() + alpha * size


# --- the model


class Energy(nn.Module):
    """Three convolutions, of which two halve the image, and a linear layer to the energy."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, W = config, config.width
        height, width = (side // 4 for side in config.image_size)
        self.layers = nn.Sequential(
            nn.Conv2d(config.n_channels, W, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(W, 2 * W, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * W, 4 * W, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.decoder_pred = nn.Linear(4 * W * height * width, 1)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.kaiming_normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies (B,) of images (B, C, H, W) with values from -1 to 1."""
        return self.decoder_pred(self.layers(x)).float()[:, 0]

    def walk(self, x: Tensor, n_steps: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the images (B, C, H, W) of chains that begin with images x (B, C, H, W), after n_steps."""
        c = self.config
        options = {"most_slope": c.most_slope, "bound": 1.0, "generator": generator}
        return langevin(self, x, n_steps, c.step_size, c.noise, **options)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n new images (n, C, H, W) with values in [0, 1], by chains that begin with uniform noise."""
        x = 2 * torch.rand(n, *self.config.shape, generator=generator, device=generator.device) - 1
        x = x.to(self.decoder_pred.weight.device)
        return (self.walk(x, self.config.n_drawing_steps, generator) + 1) / 2

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products of one image and its chain. Each step of the chain has 2
        products per weight, forward and backward to the image. The loss has 3 for the image and 3 for the
        sample: forward, and backward for weights and for inputs."""
        height, width = (side // 4 for side in self.config.image_size)
        places = [4 * height * width, height * width, height * width, 1]
        weights = [p for p in self.parameters() if p.ndim > 1]
        macs = sum(w.numel() * n for w, n in zip(weights, places, strict=True))
        return 2 * (2 * self.config.n_steps + 6) * macs

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save


Model = Energy


class Chains(nn.Module):
    """An energy, and the buffer of its chains, which is saved in checkpoints only."""

    def __init__(self, model: Energy):
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("images", 2 * torch.rand(model.config.n_chains, *model.config.shape) - 1)
        self.ended: list[tuple[Tensor, Tensor]] = []  # numbers of the chains of an update, their new images

    def advance(self, chosen: Tensor, is_new: Tensor, fresh: Tensor) -> Tensor:
        """Move on the chains with the numbers chosen, int64 (B,), by n_steps and return their images
        (B, C, H, W). Chains with is_new, bool (B,), begin anew with the images fresh (B, C, H, W). The buffer
        is not changed here but in `after_step`."""
        start = torch.where(is_new[:, None, None, None], fresh, self.images[chosen])
        ended = self.model.walk(start, self.config.n_steps)
        self.ended.append((chosen, ended.to(self.images.dtype)))
        return ended


@torch.no_grad()
def after_step(module: Chains, finite: Tensor) -> None:
    """Put the chains of an update back into the buffer. finite: bool (), False if the update was left out,
    and then the buffer stays as it is.

    `loss` does not do this, since it is also computed without an update, to time it before the first one.
    """
    for chosen, ended in module.ended:
        module.images[chosen] = torch.where(finite, ended, module.images[chosen])
    module.ended.clear()


# --- the task


def wrap(model: Energy, config: Config) -> Chains:
    """Return the energy with a buffer of new chains, which begin with uniform noise."""
    return Chains(model)


def unwrap(module: Chains) -> Energy:
    """Return the energy without its chains."""
    return module.model


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images with their classes, which only vision/frechet.py reads. Raises ValueError for --parallel:
    each process would have its own chains, and a checkpoint holds those of one process."""
    if args.parallel != "none":
        raise ValueError(f"--parallel {args.parallel}: the chains belong to one process; leave it out")
    return drawing.load_data(args, config, describe)


def describe(train: Tensor, held: Tensor) -> str:
    """Return one line: the loss where samples are distributed as the data, whatever the images."""
    return "where samples are distributed as the data, the loss is 0; it does not say how good images are"


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, H, W) from -1 to 1 with a little noise, and the arguments of `Chains.advance`:
    "chosen" (B,), the numbers of B different chains, "is_new" (B,), and "fresh" (B, C, H, W), uniform noise.

    Raises ValueError for more rows than there are chains.
    """
    n, images = len(rows), 2 * stack(rows)["image"].float() / 255 - 1
    if n > config.n_chains:
        raise ValueError(f"--batch-size {n}: expected at most n_chains={config.n_chains}")
    images = images + config.data_noise * torch.randn(images.shape, generator=generator)
    return {
        "images": images.clamp(-1, 1),
        "chosen": torch.randperm(config.n_chains, generator=generator)[:n],
        "is_new": torch.rand(n, generator=generator) < config.restart,
        "fresh": 2 * torch.rand(images.shape, generator=generator) - 1,
    }


@torch.compiler.disable  # the chains take gradients inside of the loss, which torch.compile cannot
def loss(module: Chains, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the header for a batch of `make_batch`, and as metrics the mean energies of data and
    of samples. In an evaluation the samples are the chains as they are: it does not move them."""
    chosen = batch["chosen"]
    if module.training:
        samples = module.advance(chosen, batch["is_new"], batch["fresh"])
    else:
        samples = module.images[chosen]
    of_data, of_samples = module.model(batch["images"]), module.model(samples)
    metrics = {"of_data": of_data.detach().mean(), "of_samples": of_samples.detach().mean()}
    return contrast(of_data, of_samples, module.config.alpha), metrics


def save(module: Chains, dataset: Dataset, directory: Path) -> None:
    """Write the energy, without the chains."""
    module.model.save_pretrained(directory)


def flops_per_token(module: Chains, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image: those of the energy."""
    return module.model.flops_per_token(seq_len)


def show(module: Chains, dataset: Dataset, out: Path) -> str:
    """Write a picture of held-out images, new images, and chains of the buffer. Return lines of figures that
    compare chains with real images. `python -m vision.frechet` compares new images, which takes minutes."""
    n = drawing.SHOWN
    new = module.model.draw(3 * n, torch.Generator().manual_seed(0)).split(n)
    chains = (module.images + 1) / 2
    labels = ("real", "new", "new", "new", "chains")
    pictures.save(out, [drawing.some(dataset.val, n), *new, chains[:n]], labels=labels)
    found = frechet.in_words(dataset, lambda most: chains[:most], "chains")
    return f"picture.png: held-out images, three rows of new images, chains of the buffer\n{found}"


if __name__ == "__main__":
    command.run(lambda: drawing.main(Energy))
