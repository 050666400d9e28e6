"""The KL autoencoder: an image becomes latents, a smaller map of few channels, and is rebuilt from them.

    m, ln s^2 = encoder(x)        ln s^2 clamped to -30 ... 20
    z = m + s n                   n ~ N(0, I)
    loss = sum over pixels |x - decoder(z)|^p + beta KL(N(m, s^2), N(0, I)),      the mean over images
    KL = 1/2 sum over latents of m^2 + s^2 - 1 - ln s^2

High-resolution image synthesis with latent diffusion models (Rombach et al. 2021, arXiv 2112.10752, section
3.1): a diffusion model then draws latents, which are many times fewer numbers than pixels. The autoencoder is
a variational one (vision/vae.py) with a small beta: for p = 2 the loss is, up to a constant, beta times the
negative ELBO with a Gaussian likelihood of variance beta / 2. Errors are summed over pixels and the KL over
latents, and only images are averaged: a mean over pixels would make the KL far too heavy.

With a small beta the variance of the latents is not 1, as diffusion expects. So latents are multiplied by
`scaling_factor`, 1 over their standard deviation, after encoding, and divided by it before decoding.
`to_latents` and `from_latents` do so; `encode` and `decode` do not. Latent diffusion measures the factor.

The published models were also trained with a perceptual loss, which needs a pretrained network, and with an
adversarial one; this file has neither. Parameters have the names of diffusers' AutoencoderKL.

    python -m vision.autoencoder_kl                                         print the sizes
    python train.py --model autoencoder_kl                                  letters
    python -m vision.autoencoder_kl runs/autoencoder_kl/model photo.png     draw images and what is rebuilt

Shapes: B images, C channels, H x W pixels, Z channels of latents, h x w places of latents, c channels inside.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.images import decode_all
from data.rows import Dataset, Row, stack
from engine import pictures
from engine.report import PICTURE
from formats import autoencoder_kl, command
from formats.config_values import check_values
from vision.classify_images import load_images
from vision.convolutions import Double, Half, Middle, ResidualBlock, block_macs, initialize, middle_macs

KIND, DATA = "autoencoder", "glyphs"
OPTIMIZER, BATCH_SIZE, STEPS = "adamw", 32, 500
LOSS, TOKEN_LOSS = "reconstruction and KL, per image", ""
LOWEST, HIGHEST = -30.0, 20.0  # between which ln s^2 is clamped, as in the published code
SAMPLE = 1_000  # images from which the mean image is computed
SHOWN = 12  # images of the picture


@dataclass(frozen=True)
class Config:
    channels: tuple[int, ...] = (128, 256, 512, 512)  # c at each resolution; each is half the one before
    n_blocks: int = 2  # residual blocks at each resolution; the decoder has one more
    n_groups: int = 32  # groups of channels in each group normalisation
    n_channels: int = 3  # C
    n_latent: int = 4  # Z
    image_size: int | tuple[int, ...] = 512  # of the training images in pixels: both ways, or (height, width)
    attention: bool = True  # whether there is attention at the lowest resolution
    quant_conv: bool = True  # a convolution of 1 x 1 after the encoder
    post_quant_conv: bool = True  # and one before the decoder
    scaling_factor: float = 0.18215  # of latents, see the header
    shift_factor: float = 0.0  # subtracted from latents before they are scaled
    power: int = 2  # p of the header; for training only
    beta: float = 0.01  # weight of the KL; for training only
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("beta", "shift_factor")

    def __post_init__(self):
        check_values(self, power=(1, 2))
        if not self.channels or any(c < 1 or c % self.n_groups for c in self.channels):
            raise ValueError(f"channels {self.channels}: expected multiples of n_groups {self.n_groups}")
        if len(self.size) != 2 or any(side < 1 or side % self.factor for side in self.size):
            raise ValueError(f"image_size {self.image_size}: expected multiples of {self.factor}")

    @property
    def factor(self) -> int:
        """Return the height of an image divided by that of its latents: 2 to the number of halvings."""
        return 2 ** (len(self.channels) - 1)

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return (Z, h, w)."""
        return (self.n_latent, *(side // self.factor for side in self.size))

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one image."""
        return 1


SIZES = {
    "tiny": Config((16, 32, 64), 1, 8, 1, image_size=32),
    "sd-f8": Config(),  # of Stable Diffusion 1 and 2: Rombach et al. 2021, section 4.3
    "sdxl-f8": Config(image_size=1024, scaling_factor=0.13025),  # Podell et al. 2023, arXiv 2307.01952
    "sd3-f8": Config(  # Esser et al. 2024, arXiv 2403.03206, with their published factors
        n_latent=16, image_size=1024, quant_conv=False, post_quant_conv=False, scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
}  # fmt: skip


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for the channels of a data set's images. seq_len is not used."""
    return replace(config, n_channels=dataset.train[0]["image"].shape[0])


class Level(nn.Module):
    """The residual blocks at one resolution, and after them a change of it: "down", "up", or "" for none."""

    def __init__(self, widths: list[tuple[int, int]], n_groups: int, change: str = ""):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(*width, n_groups) for width in widths)
        self.changes = {"down": "downsamplers", "up": "upsamplers"}.get(change, "")
        if change:
            kind = Half if change == "down" else Double
            setattr(self, self.changes, nn.ModuleList([kind(widths[-1][1])]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, c, h, w) for x, at half or twice its resolution after a change."""
        for block in self.resnets:
            x = block(x)
        return getattr(self, self.changes)[0](x) if self.changes else x


def widths(config: Config) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """Return the input and output channels of each residual block: for each level of the encoder, and for
    each level of the decoder, in the order of computation."""
    n, c = config.n_blocks, config.channels
    down, up, before = [], [], c[0]
    for own in c:
        down.append([(before, own)] + [(own, own)] * (n - 1))
        before = own
    for own in reversed(c):
        up.append([(before, own)] + [(own, own)] * n)
        before = own
    return down, up


class Encoder(nn.Module):
    """From images (B, C, H, W) to the mean and log variance of latents (B, 2 Z, h, w)."""

    def __init__(self, config: Config):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.n_groups
        down, _ = widths(config)
        changes = ["down"] * (len(down) - 1) + [""]
        self.conv_in = nn.Conv2d(config.n_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(level, groups, change) for level, change in zip(down, changes, strict=True)
        )
        self.mid_block = Middle(last, int(config.attention), groups, config.kernels)
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, 2 * config.n_latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """From latents (B, Z, h, w) to images (B, C, H, W)."""

    def __init__(self, config: Config):
        super().__init__()
        first, last, groups = config.channels[0], config.channels[-1], config.n_groups
        _, up = widths(config)
        changes = ["up"] * (len(up) - 1) + [""]
        self.conv_in = nn.Conv2d(config.n_latent, last, 3, padding=1)
        self.mid_block = Middle(last, int(config.attention), groups, config.kernels)
        self.up_blocks = nn.ModuleList(
            Level(level, groups, change) for level, change in zip(up, changes, strict=True)
        )
        self.conv_norm_out = nn.GroupNorm(groups, first, eps=1e-6)
        self.conv_out = nn.Conv2d(first, config.n_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(m, s^2), N(0, I)) in nats (B,), summed over the latents, for m and ln s^2 (B, ...)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """An encoder from images to Gaussians of latents, and a decoder from latents to images."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, Z = config, config.n_latent
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.quant_conv:
            self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1)
        if config.post_quant_conv:
            self.post_quant_conv = nn.Conv2d(Z, Z, 1)
        initialize(self)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and ln s^2, float32 (B, Z, h, w), of images (B, C, H, W) with pixels in [-1, 1]."""
        found = self.encoder(images)
        found = self.quant_conv(found) if self.config.quant_conv else found
        mean, log_variance = found.float().chunk(2, dim=1)
        return mean, log_variance.clamp(LOWEST, HIGHEST)

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, C, H, W), in the dtype of the weights and with pixels that may exceed [-1, 1],
        for latents z (B, Z, h, w)."""
        z = z.to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant_conv(z) if self.config.post_quant_conv else z)

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents (B, Z, h, w), which a diffusion model learns, of images (B, C, H, W).

        They are drawn from their Gaussians with the normal `noise` (B, Z, h, w); if it is None, they are the
        means.
        """
        mean, log_variance = self.encode(images)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """Return images (B, C, H, W) of scaled latents (B, Z, h, w). Pixels may exceed [-1, 1]."""
        return self.decode(latents / self.config.scaling_factor + self.config.shift_factor)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the header, and as metrics the mean squared error of a pixel and the KL in nats.

        batch: "images" (B, C, H, W) with pixels in [-1, 1], and normal "noise" (B, Z, h, w). Loss and KL are
        means over images.
        """
        images = batch["images"]
        mean, log_variance = self.encode(images)
        rebuilt = self.decode(mean + (0.5 * log_variance).exp() * batch["noise"]).float()
        error, nats = (rebuilt - images).abs(), kl(mean, log_variance)
        loss = (error**self.config.power).flatten(1).sum(1) + self.config.beta * nats
        return loss.mean(), {"mse": error.detach().square().mean(), "kl": nats.detach().mean()}

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of convolutions and matrix products, forward and backward, of one image of the
        config's size. seq_len is not used."""
        return 6 * n_macs(self.config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "AutoencoderKL":
        """Return diffusers' AutoencoderKL in a directory, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return autoencoder_kl.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as diffusers' AutoencoderKL into a directory."""
        autoencoder_kl.save(self, directory)


Model = AutoencoderKL


def n_macs(config: Config) -> int:
    """Return the multiplications of encoding and decoding one image of the config's size: those of each
    convolution at each place, and of the attention."""
    Z, C, c = config.n_latent, config.n_channels, config.channels
    places = [config.size[0] * config.size[1] // 4**i for i in range(len(c))]
    down, up = widths(config)
    total = 9 * c[0] * C * places[0] * 2 + 2 * middle_macs(c[-1], places[-1], config.attention)
    total += (9 * c[-1] * 3 * Z + 4 * Z**2 * config.quant_conv + Z**2 * config.post_quant_conv) * places[-1]
    for i, own in enumerate(c):
        blocks = [*down[i], *up[len(c) - 1 - i]]
        total += places[i] * sum(block_macs(*block) for block in blocks)
        # The encoder's halving computes at the smaller resolution, the decoder's doubling at the larger.
        if i + 1 < len(c):
            total += 9 * own**2 * places[i + 1] + 9 * c[i + 1] ** 2 * places[i]
    return total


# --- the task, see engine/contract.py


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images without their classes, with a trivial guess in one line: the error of the mean training
    image on held-out images."""
    found = load_images(args, config)
    every = -(-len(found.train) // SAMPLE)
    known = stack([found.train[i] for i in range(0, len(found.train), every)])["image"].float() / 127.5 - 1
    held = stack([found.val[i] for i in range(min(SAMPLE, len(found.val)))])["image"].float() / 127.5 - 1
    mse = (held - known.mean(0)).square().mean().item()
    return replace(found, labels=(), guess=f"the mean image has a squared error of {mse:.4f} per pixel")


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, H, W) with pixels in [-1, 1], and normal "noise" (B, Z, h, w)."""
    images = stack(rows)["image"].float() / 127.5 - 1
    return {"images": images, "noise": torch.randn(len(rows), *config.latent_shape, generator=generator)}


@torch.no_grad()
def draw(model: AutoencoderKL, images: Tensor, out: Path) -> float:
    """Write a picture of images (n, C, H, W) with pixels in [-1, 1], and below them the same images rebuilt
    from the means of their latents. Return the mean squared error of a pixel."""
    rebuilt = model.from_latents(model.to_latents(images))
    rows = [some / 2 + 0.5 for some in (images, rebuilt)]
    pictures.save(out, rows, labels=("original", "rebuilt"))
    return (rebuilt - images).square().mean().item()


@torch.no_grad()
def show(model: AutoencoderKL, dataset: Dataset, out: Path) -> str:
    """Write a picture of some held-out images and their reconstructions, and return two lines: the standard
    deviations of the latents, and the error of the reconstructions."""
    device, n = next(model.parameters()).device, min(SHOWN, len(dataset.val))
    rows = [dataset.val[i * len(dataset.val) // n] for i in range(n)]
    images = stack(rows)["image"].to(device).float() / 127.5 - 1
    mse = draw(model, images, out)
    mean, log_variance = model.encode(images)
    spread, own = mean.std().item(), (0.5 * log_variance).exp().mean().item()
    line = f"latents: {spread:.2f} standard deviation over images, {own:.2f} of each"
    return f"{line}\npicture.png: images, and as rebuilt, with a squared error of {mse:.4f} per pixel"


def print_sizes() -> None:
    """Print the parameters of each size, its latents, and the FLOPs of rebuilding an image."""
    print(f"{'size':8} {'parameters':>11} {'image':>6} {'latents':>14}  FLOPs")
    for name, config in SIZES.items():
        with torch.device("meta"):
            n = sum(p.numel() for p in AutoencoderKL(config).parameters())
        shape = " x ".join(map(str, config.latent_shape))
        print(f"{name:8} {n:11,} {config.image_size:6} {shape:>14}  {2 * n_macs(config):.2e}")


def main() -> None:
    parser = command.Parser(description="Rebuild images from their latents, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("images", nargs="*", type=command.path, help="files of images, which are cut to the model's size")
    add("--out", type=command.path, default=Path(), help="folder of picture.png (default: this one)")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes()
        return
    if not args.images:
        raise ValueError(f"{args.checkpoint}: expected files of images to rebuild after it, found none")
    model = AutoencoderKL.from_pretrained(args.checkpoint).float().eval()
    pixels = decode_all(args.images, (model.config.n_channels, *model.config.size))
    args.out.mkdir(parents=True, exist_ok=True)
    mse = draw(model, torch.from_numpy(pixels).float() / 127.5 - 1, args.out)
    print(f"{args.out / PICTURE}: images, and as rebuilt, with a squared error of {mse:.4f} per pixel")


if __name__ == "__main__":
    command.run(main)
