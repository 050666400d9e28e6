"""Flow: an invertible network from images to noise, so that the likelihood is exact.

    log p(x) = log N(f(x); 0, I) + log |det df/dx|                     change of variables
    f: y_1 = x_1,  y_2 = x_2 exp(s(x_1)) + t(x_1)                      coupling; log |det| = sum of s(x_1)
    x_1 = y_1,  x_2 = (y_2 - t(y_1)) exp(-s(y_1))                      its inverse costs as much

RealNVP (Dinh et al. 2016, arXiv 1605.08803). f is a chain of couplings. In each, x_1 are the pixels on the
white squares of a checkerboard. They do not change, and from them s and t are computed, which scale and shift
the other pixels, x_2. In the next coupling the squares change places. s and t need not be invertible, so any
network can compute them. Here it has two hidden layers, and its last layer starts at 0, so that a new flow is
the identity. s is a tanh times a learned factor for each pixel, so that the scale stays within bounds.

Pixels have a few discrete levels, and a density on them could grow without limit. So they are dequantised
to x = (level + u) / L with u uniform in [0, 1). The mean log density of x is then a lower bound on the log
probability of the level (Theis et al. 2015, 1511.01844, section 3.1). A logit maps x to the real numbers
(RealNVP, section 4.1; its text has 1 - alpha in place of 1 - 2 alpha, its code is as here):

    p = alpha + (1 - 2 alpha) x,  y = log(p / (1 - p)),  log dy/dx = log(1 - 2 alpha) - log p - log(1 - p)

The loss is in bits per dimension of the levels: -(log2 p(x)) / N + log2 L. The second term accounts for the
division by L.

    python train.py --model flow                     letters of 8 x 8 pixels and 32 levels
    python -m vision.flow runs/flow/model            draw images

Shapes: B batch, C channels, N values of an image, L levels.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.rows import Dataset, Row, stack
from engine import pictures
from formats import command, native
from formats.config_values import check_values
from vision import drawing
from vision.drawing import fit  # noqa: F401, the trainer calls it

KIND, DATA = "flow", "glyphs:all"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 128, 1200
LOSS, TOKEN_LOSS = "bits per dimension", ""


@dataclass(frozen=True)
class Config:
    n_couplings: int = 8
    width: int = 192  # of the two hidden layers of each coupling
    n_levels: int = 32  # L of a pixel
    alpha: float = 0.05  # keeps p of the header within alpha ... 1 - alpha, where the logit is finite
    image_size: tuple[int, ...] = (8, 8)  # height and width in pixels
    n_channels: int = 1
    max_seq_len = 1  # a row of the data is one image

    def __post_init__(self):
        check_values(self)
        if not 2 <= self.n_levels <= 256:
            raise ValueError(f"n_levels {self.n_levels}: expected 2 to 256")
        if self.alpha >= 0.5:
            raise ValueError(f"alpha {self.alpha}: expected less than 0.5")
        if len(self.image_size) != 2 or math.prod(self.image_size) < 2:
            raise ValueError(f"image_size {self.image_size}: expected height and width, at least two pixels")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def n_values(self) -> int:
        """Return N, the number of values of an image."""
        return self.n_channels * math.prod(self.image_size)


SIZES = {"tiny": Config(), "small": Config(n_couplings=16, width=512, n_levels=256, image_size=(16, 16))}


# --- between levels and numbers


def dequantized(levels: Tensor, noise: Tensor, n_levels: int) -> Tensor:
    """Return x in [0, 1) for levels 0 ... n_levels - 1 and noise in [0, 1). Level i takes the interval from
    i / n_levels to (i + 1) / n_levels."""
    return (levels + noise) / n_levels


def to_logits(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the logits y (B, N) of the header and log |det dy/dx| (B,), for x (B, N) in [0, 1]."""
    p = alpha + (1 - 2 * alpha) * x
    log_p, log_q = p.log(), (-p).log1p()
    return log_p - log_q, (math.log(1 - 2 * alpha) - log_p - log_q).sum(1)


def from_logits(y: Tensor, alpha: float) -> Tensor:
    """Return x (B, N) for logits y (B, N): the inverse of `to_logits`. Values outside [0, 1] are clamped."""
    return ((y.sigmoid() - alpha) / (1 - 2 * alpha)).clamp(0, 1)


def bits_per_dimension(log_density: Tensor, n_values: int, n_levels: int) -> Tensor:
    """Return the bits per dimension of the levels (B,), for the log density (B,) in nats of x in [0, 1]^N."""
    return -log_density / (n_values * math.log(2)) + math.log2(n_levels)


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) in nats (B,) for z (B, N)."""
    return -(z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) / 2


# --- the model


class Coupling(nn.Module):
    """One coupling: half of the pixels stay as they are, and a network that reads them scales and shifts the
    other half. Couplings with an even and an odd number `layer` have opposite halves."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        height, width = config.image_size
        squares = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == layer % 2
        stays = squares.expand(config.n_channels, -1, -1).flatten()
        self.register_buffer("stays", stays.nonzero()[:, 0], persistent=False)
        self.register_buffer("moves", (~stays).nonzero()[:, 0], persistent=False)
        n_stay, n_move, W = len(self.stays), len(self.moves), config.width
        self.hidden = nn.Sequential(nn.Linear(n_stay, W), nn.SiLU(), nn.Linear(W, W), nn.SiLU())
        self.decoder_pred = nn.Linear(W, 2 * n_move)
        self.bound = nn.Parameter(torch.ones(n_move))

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and t, each (B, n_move), for x (B, N), of which only the values that stay are read."""
        s, t = self.decoder_pred(self.hidden(x[:, self.stays])).to(x.dtype).chunk(2, dim=1)
        return self.bound * s.tanh(), t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (B, N) and log |det dy/dx| (B,) for x (B, N)."""
        s, t = self.scale_and_shift(x)
        return x.index_copy(1, self.moves, x[:, self.moves] * s.exp() + t), s.sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x (B, N) from which `forward` computes y (B, N)."""
        s, t = self.scale_and_shift(y)
        return y.index_copy(1, self.moves, (y[:, self.moves] - t) * (-s).exp())


class Flow(nn.Module):
    """A chain of couplings, from the logits of images to noise."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.couplings = nn.ModuleList(Coupling(config, i) for i in range(config.n_couplings))
        for name, p in self.named_parameters():
            if name.endswith("bias") or ".decoder_pred." in name:
                nn.init.zeros_(p)
            elif not name.endswith("bound"):
                nn.init.xavier_normal_(p)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (B, N) and log |det dz/dy| (B,) for logits y (B, N)."""
        total = y.new_zeros(len(y))
        for coupling in self.couplings:
            y, log_det = coupling(y)
            total = total + log_det
        return y, total

    def inverse(self, z: Tensor) -> Tensor:
        """Return the logits y (B, N) from which `forward` computes z (B, N)."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)
        return z

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats (B,) for x (B, N) in [0, 1]."""
        y, log_det_logit = to_logits(x, self.config.alpha)
        z, log_det = self(y)
        return log_normal(z) + log_det + log_det_logit

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean bits per dimension, and no metrics, for "levels" 0 ... L - 1 and the "noise" in
        [0, 1) that dequantises them, each (B, C, height, width)."""
        c = self.config
        x = dequantized(batch["levels"], batch["noise"], c.n_levels).flatten(1)
        return bits_per_dimension(self.log_density(x), c.n_values, c.n_levels).mean(), {}

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n new images (n, C, height, width), drawn from z ~ N(0, I), with values in [0, 1]."""
        z = torch.randn(n, self.config.n_values, generator=generator, device=generator.device)
        return self.images(z.to(self.couplings[0].bound.device))

    def images(self, z: Tensor) -> Tensor:
        """Return images (n, C, height, width) for z (n, N): their levels divided by the highest level."""
        c = self.config
        x = from_logits(self.inverse(z), c.alpha).unflatten(1, (c.n_channels, *c.image_size))
        return (x * c.n_levels).floor().clamp(max=c.n_levels - 1) / (c.n_levels - 1)

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one image: 6 per weight."""
        return 6 * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save


Model = Flow


# --- the task


def to_levels(images: Tensor, n_levels: int) -> Tensor:
    """Return the levels 0 ... n_levels - 1, as floats, of images with the values k / 255."""
    return ((images * 255).round() * n_levels / 256).floor()


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images, and a line with the bits per dimension of densities without a network."""
    return drawing.load_data(args, config, lambda train, held: describe(train, held, config))


def densities(train: Tensor, held: Tensor, config: Config) -> dict[str, float]:
    """Return the bits per dimension of held-out images under three densities without a network, by name.

    "alike": all levels are equally likely. "each pixel": a level has the probability of its frequency at this
    pixel in training images, with half a count added. "Gaussian": the logits have a Gaussian distribution
    with the mean and covariance of training images. train, held: images (B, C, height, width) in [0, 1].
    """
    L = config.n_levels
    train, held = (to_levels(images, L).flatten(1) for images in (train, held))
    counts = torch.full((train.shape[1], L), 0.5)  # (N, L)
    counts.scatter_add_(1, train.T.long(), torch.ones_like(train.T))
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    independent = -log_p.T.gather(0, held.long()).mean()

    # No flow whose f is linear in the logits has a higher likelihood on training images than this Gaussian.
    generator, logits = torch.Generator().manual_seed(0), []
    for levels in (train, held):
        noise = torch.rand(levels.shape, generator=generator)
        logits.append([part.double() for part in to_logits(dequantized(levels, noise, L), config.alpha)])
    (known, _), (y, log_det) = logits
    # Of few images the covariance is singular, and of one image it has no unbiased estimate.
    covariance = known.T.cov(correction=min(1, len(known) - 1)) + 1e-4 * torch.eye(known.shape[1])
    gaussian = torch.distributions.MultivariateNormal(known.mean(0), covariance)
    bits = bits_per_dimension(gaussian.log_prob(y) + log_det, y.shape[1], L).mean()
    return {"alike": math.log2(L), "each pixel": independent.item(), "Gaussian": bits.item()}


def describe(train: Tensor, held: Tensor, config: Config) -> str:
    """Return one line: the bits per dimension of `densities`."""
    bits = densities(train, held, config)
    return (
        f"on held-out images, {config.n_levels} equally likely levels have {bits['alike']:.3f} bits per "
        f"dimension, their frequencies at each pixel {bits['each pixel']:.3f}, a Gaussian of all pixels "
        f"together {bits['Gaussian']:.3f}"
    )


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "levels" (B, C, height, width) and "noise" of that shape, uniform in [0, 1)."""
    levels = to_levels(stack(rows)["image"].float() / 255, config.n_levels)
    return {"levels": levels, "noise": torch.rand(levels.shape, generator=generator)}


@torch.no_grad()
def show(model: Flow, dataset: Dataset, out: Path) -> str:
    """Write a picture of held-out images, new images, and images on the straight line between the z of two
    images. Return a line with the largest error of logits that are computed back from their z."""
    c, device, n = model.config, model.couplings[0].bound.device, drawing.SHOWN
    some = drawing.some(dataset.val, n).to(device)
    levels = to_levels(some, c.n_levels)
    y, _ = to_logits(dequantized(levels, 0.5, c.n_levels).flatten(1), c.alpha)
    z, _ = model(y)
    error = (model.inverse(z) - y).abs().max().item()
    share = torch.linspace(0, 1, n, device=device)[:, None]
    walk = model.images((1 - share) * z[0] + share * z[-1])
    new = model.draw(2 * n, torch.Generator().manual_seed(0)).split(n)
    rows = [levels / (c.n_levels - 1), *new, walk]
    pictures.save(out, rows, labels=("real", "new", "new", "a walk"))
    return (
        "picture.png: held-out images, new images, a walk between two images\n"
        f"logits found again from z to {error:.1e}"
    )


if __name__ == "__main__":
    command.run(lambda: drawing.main(Flow))
