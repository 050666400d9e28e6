"""GAN: a generator that learns from a classifier, which learns to tell its images from real ones.

    z ~ N(0, I),  x = G(z)                                          how an image is made
    D:  E_data softplus(-D(x)) + E_z softplus(D(G(z))) + gamma/2 E_data |dD/dx|^2
    G:  E_z softplus(-D(G(z)))                                      non-saturating
    G:  -E_z softplus(D(G(z)))                                      minimax, the same game as D's

Generative adversarial nets (Goodfellow et al. 2014, arXiv 1406.2661). D is the logit of "real":
-log sigmoid(D) = softplus(-D). For a fixed generator the best discriminator is sigmoid(D) = p / (p + q), for
the density p of the data and q of drawn images, and its loss is 2 ln 2 - 2 JSD(p, q): 2 ln 2 = 1.386 where
both are equal. A loss of D that falls to 0 is failure, since then G learns nothing; and no loss here measures
how good images are. vision/frechet.py does.

Two losses for G have the same fixed point (section 3 of the paper). Their slopes by the logit of a drawn
image are -sigmoid(D) for minimax and -sigmoid(-D) for the other. At the start, D is sure that drawn images
are not real, D(G(z)) << 0. There the first slope vanishes and the second is nearly -1, so the second is the
default.

gamma weighs R1, the squared slope of D at real images (Mescheder et al. 2018, 1801.04406, equation 9).
Without it the two networks may circle around the fixed point for ever; with it both converge near that point.
It takes the place of batch norm and of spectral norm. Adam's beta_1 is 0, as in RMSProp, which they use: with
0.9, this size draws one image only.

There is one loss, the sum of both, and one optimizer, whose gradients are those of two: D's term reads drawn
images as constants, and G's term reads the weights of D as constants. AdamW adapts each number alone, so this
is what two optimizers do that step at the same time, but for --grad-clip, which clips one norm of both. What
draws is an average of the weights over the last updates (--ema), as in Mescheder et al.

    python train.py --model gan                                letters, 16 x 16
    python train.py --model gan --set objective=minimax --out runs/minimax
    python -m vision.gan runs/gan/model --out g.png            draw images

Shapes: B batch, C channels, H x W pixels, Z numbers of a code.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from data.rows import Dataset, Row, stack
from engine import pictures
from formats import command, native
from formats.config_values import check_values
from vision import drawing, frechet
from vision.drawing import fit  # noqa: F401, the trainer calls it

KIND, DATA = "adversarial network", "glyphs:all"
OPTIMIZER, BETAS, BATCH_SIZE, STEPS, EMA, LEARNING_RATE = "adamw", (0.0, 0.99), 64, 2000, 0.999, 0.16
LOSS, TOKEN_LOSS = "nats per image, of both networks", ""
OBJECTIVES = ("non_saturating", "minimax")
SLOPE = 0.2  # of the leaky ReLU below zero


@dataclass(frozen=True)
class Config:
    width: int = 32  # channels at the full size of an image; each halving of the size doubles them
    n_halvings: int = 2  # down to 4 x 4 places of an image of 16 x 16
    n_latents: int = 32  # Z
    objective: str = "non_saturating"  # of the generator; or "minimax"
    gamma: float = 1.0  # weight of R1
    image_size: tuple[int, ...] = (16, 16)  # height and width in pixels; for data only
    n_channels: int = 1
    max_seq_len = 1  # a row of the data is one image
    MAY_BE_ZERO = ("gamma",)

    def __post_init__(self):
        check_values(self, objective=OBJECTIVES)
        if any(side % 2**self.n_halvings for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size}: expected multiples of {2**self.n_halvings} pixels for "
                f"n_halvings={self.n_halvings}"
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def smallest(self) -> tuple[int, int, int]:
        """Return the channels, height and width where the image is smallest."""
        height, width = (side // 2**self.n_halvings for side in self.image_size)
        return self.width * 2**self.n_halvings, height, width


SIZES = {"tiny": Config(), "small": Config(width=64, n_halvings=3, n_latents=64, image_size=(32, 32))}


# --- the two networks


def generator(config: Config) -> nn.Sequential:
    """Return G: codes (B, Z) to images (B, C, H, W) with values from -1 to 1."""
    n = config.smallest[0]
    layers = [nn.Linear(config.n_latents, math.prod(config.smallest)), nn.Unflatten(1, config.smallest)]
    for _ in range(config.n_halvings):  # each doubles height and width
        layers += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1)]
        n //= 2
    last = nn.Conv2d(n, config.n_channels, 3, padding=1)
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE), last, nn.Tanh())


def discriminator(config: Config) -> nn.Sequential:
    """Return D: images (B, C, H, W) with values from -1 to 1 to the logits (B,) of "real"."""
    n = config.width
    layers = [nn.Conv2d(config.n_channels, n, 3, padding=1), nn.LeakyReLU(SLOPE)]
    for _ in range(config.n_halvings):  # each halves height and width
        layers += [nn.Conv2d(n, 2 * n, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        n *= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(config.smallest), 1), nn.Flatten(0))


def initialize(network: nn.Module) -> None:
    """Draw the weights of linear and convolutional layers so that activations keep their variance through
    leaky ReLUs (He et al. 2015, 1502.01852). Biases are 0."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):  # an output pixel is reached by a quarter of 4 x 4
                fan_in = module.in_channels * math.prod(module.kernel_size) // math.prod(module.stride)
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (1 + SLOPE**2) / fan_in))
            nn.init.zeros_(module.bias)


# --- the game


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Return D's loss in nats, without R1, for its logits of real images and of drawn ones, each (B,)."""
    return F.softplus(-real).mean() + F.softplus(drawn).mean()


def generator_loss(drawn: Tensor, objective: str) -> Tensor:
    """Return G's loss in nats for D's logits (B,) of drawn images, by one of OBJECTIVES."""
    return -F.softplus(drawn).mean() if objective == "minimax" else F.softplus(-drawn).mean()


def r1(judged: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (B,) of images (B, C, H, W), and R1 (), the mean of |dD/dx|^2.

    The gradient of R1 by D's weights is taken through the gradient by images. In an evaluation, which takes
    no gradients, the first one is taken all the same, and nothing is kept for a second.
    """
    learns = torch.is_grad_enabled()
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = judged(images)
        (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=learns, retain_graph=learns)
    return logits, slope.square().flatten(1).sum(1).mean()


def macs(network: nn.Module, places: list[int]) -> int:
    """Return the multiplications of a network for one image, with the number of places of each layer."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    return sum(w.numel() * n for w, n in zip(weights, places, strict=True))


class GAN(nn.Module):
    """A generator and its discriminator."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.generator, self.discriminator = generator(config), discriminator(config)
        initialize(self)

    def judged_by_constants(self, images: Tensor) -> Tensor:
        """Return D's logits (B,), through which gradients reach the images and not D's weights."""
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, weights, (images,))

    @torch.compiler.disable  # which cannot take the gradient of a gradient
    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both losses in nats of "images" (B, C, H, W) in [0, 1] and "codes" (B, Z), and as
        metrics each loss, R1, and how often D is right. Each half of the weights has gradients by its own
        loss alone."""
        c, drawn = self.config, self.generator(batch["codes"])
        real_logits, slope = r1(self.discriminator, 2 * batch["images"] - 1)
        logits = self.discriminator(drawn.detach())
        of_d = discriminator_loss(real_logits, logits)
        of_g = generator_loss(self.judged_by_constants(drawn), c.objective)
        right = torch.cat((real_logits > 0, logits < 0)).float().mean()
        metrics = {"discriminator": of_d, "generator": of_g, "r1": slope, "right": right}
        loss = of_d + c.gamma / 2 * slope + of_g
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n new images (n, C, H, W) with values in [0, 1]."""
        z = torch.randn(n, self.config.n_latents, generator=generator, device=generator.device)
        return self.images(z.to(self.generator[0].weight.device))

    def images(self, z: Tensor) -> Tensor:
        """Return the images (n, C, H, W) of codes (n, Z), with values in [0, 1]."""
        return (self.generator(z).float() + 1) / 2

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one real and one drawn image.

        G takes 3 passes: forward, and backward by weights and by inputs. D takes 11: with real images 2 for
        the logits and their slope, and 4 backward; with drawn ones 3, and 2 without gradients of weights.
        """
        steps = [math.prod(self.config.smallest[1:]) * 4**i for i in range(self.config.n_halvings)]
        all_pixels = math.prod(self.config.image_size)
        g = macs(self.generator, [1, *steps, all_pixels])
        d = macs(self.discriminator, [all_pixels, *reversed(steps), 1])
        return 2 * (3 * g + 11 * d)

    from_pretrained = classmethod(lambda cls, directory, *, kernels="auto": native.load(directory, kernels))
    save_pretrained = native.save


Model = GAN


# --- the task


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images, whose classes are for the judge of vision/frechet.py alone. ValueError for --parallel
    fsdp, whose shards of D's weights cannot be read as constants."""
    if args.parallel == "fsdp":
        raise ValueError("--parallel fsdp: the discriminator needs all of its weights; expected none or ddp")
    return drawing.load_data(args, config, describe)


def describe(train: Tensor, held: Tensor) -> str:
    """Return one line: the losses where drawn images cannot be told from real ones."""
    d, g = 2 * math.log(2), math.log(2)
    return (
        f"where drawn images are as real ones, the discriminator's loss is {d:.3f} nats and the generator's "
        f"{g:.3f}; neither says how good images are"
    )


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, H, W) with values in [0, 1], and "codes" (B, Z) from N(0, 1)."""
    codes = torch.randn(len(rows), config.n_latents, generator=generator)
    return {"images": stack(rows)["image"].float() / 255, "codes": codes}


@torch.no_grad()
def show(model: GAN, dataset: Dataset, out: Path) -> str:
    """Draw held-out images, new ones, and a walk from one code to another; return how far new images are from
    real ones."""
    n, draws = drawing.SHOWN, torch.Generator().manual_seed(0)
    new = drawing.in_rows(model.draw(3 * n, draws))
    ends = torch.randn(2, model.config.n_latents, generator=draws)
    angle = torch.linspace(0, math.pi / 2, n)[:, None]
    walk = (angle.cos() * ends[0] + angle.sin() * ends[1]).to(model.generator[0].weight.device)
    pictures.save(out, [list(drawing.some(dataset.val, n)), *new, list(model.images(walk))])
    found = frechet.in_words(dataset, partial(frechet.drawn, model))
    return f"picture.png: held-out images, new images, a walk between two codes\n{found}"


if __name__ == "__main__":
    command.run(lambda: drawing.main(GAN))
