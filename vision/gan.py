"""GAN: a generator of images, trained against a discriminator that tells its images from real ones.

    z ~ N(0, I),  x = G(z)                                          how an image is drawn
    loss of D:  E_data softplus(-D(x)) + E_z softplus(D(G(z))) + gamma/2 E_data |dD/dx|^2
    loss of G:  E_z softplus(-D(G(z)))                              non-saturating
            or  -E_z softplus(D(G(z)))                              minimax: minus G's term in the loss of D

Generative adversarial nets (Goodfellow et al. 2014, arXiv 1406.2661). D(x) is the logit of "real", so that
-log sigmoid(D) = softplus(-D). For a fixed generator the best discriminator is sigmoid(D) = p / (p + q), with
the density p of the data and q of drawn images. Without R1, its loss is 2 ln 2 - 2 JSD(p, q). The
Jensen-Shannon divergence JSD is 0 where p = q; there the loss is 2 ln 2 = 1.386. A loss of D near 0 means
that D separates real and drawn images perfectly: the training has failed. No loss here measures how good
images are; vision/frechet.py does.

The two losses of G have the same fixed point (section 3 of the paper). Their derivatives with respect to the
logit of a drawn image are -sigmoid(D) for minimax and -sigmoid(-D) for non-saturating. Early in training D is
sure that drawn images are not real, D(G(z)) << 0. There the first derivative vanishes and the second is
nearly -1, so non-saturating is the default.

gamma is the weight of R1, the squared gradient of D at real images (Mescheder et al. 2018, 1801.04406,
equation 9). Without it the two networks may circle around the fixed point for ever; with it both converge
near that point. It takes the place of batch norm and spectral norm. Adam's beta_1 is 0, as in RMSProp, which
Mescheder et al. use. With 0.9 a prototype of this model drew a single letter (docs/generative.md).

The loss of a run is the sum of both losses, for one optimizer. Each network gets the gradient of its own loss
alone: drawn images are constants in the loss of D, and the weights of D are constants in the loss of G. AdamW
adapts the step of each weight by its own gradients, so the result is that of two optimizers that step at the
same time. Only --grad-clip differs: it clips the norm of both gradients together. Images are drawn with an
average of the weights over the last updates (--ema), as in Mescheder et al.

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
    n_halvings: int = 2  # of height and width: two make 4 x 4 of 16 x 16
    n_latents: int = 32  # Z
    objective: str = "non_saturating"  # of the generator; or "minimax"
    gamma: float = 1.0  # weight of R1
    image_size: tuple[int, ...] = (16, 16)  # height and width in pixels
    n_channels: int = 1
    max_seq_len = 1  # a row of the data is one image
    MAY_BE_ZERO = ("gamma",)

    def __post_init__(self):
        check_values(self, objective=OBJECTIVES)
        factor = 2**self.n_halvings
        if len(self.image_size) != 2 or any(side < 1 or side % factor for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size}: expected multiples of {factor} pixels for "
                f"n_halvings={self.n_halvings}, height and width"
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def smallest(self) -> tuple[int, int, int]:
        """Return the channels, height and width of the smallest feature maps."""
        height, width = (side // 2**self.n_halvings for side in self.image_size)
        return self.width * 2**self.n_halvings, height, width


SIZES = {"tiny": Config(), "small": Config(width=64, n_halvings=3, n_latents=64, image_size=(32, 32))}


# --- the two networks


def generator(config: Config) -> nn.Sequential:
    """Return G, a network from codes (B, Z) to images (B, C, H, W) with values from -1 to 1."""
    n = config.smallest[0]
    layers = [nn.Linear(config.n_latents, math.prod(config.smallest)), nn.Unflatten(1, config.smallest)]
    for _ in range(config.n_halvings):  # each doubles height and width
        layers += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1)]
        n //= 2
    last = nn.Conv2d(n, config.n_channels, 3, padding=1)
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE), last, nn.Tanh())


def discriminator(config: Config) -> nn.Sequential:
    """Return D, a network from images (B, C, H, W), with values from -1 to 1, to logits (B,) of "real"."""
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
            if isinstance(module, nn.ConvTranspose2d):  # each output adds up a quarter of the kernel
                fan_in = module.in_channels * math.prod(module.kernel_size) // math.prod(module.stride)
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (1 + SLOPE**2) / fan_in))
            nn.init.zeros_(module.bias)


# --- the losses


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Return D's loss in nats, without R1, for D's logits of real images and of drawn ones, each (B,)."""
    return F.softplus(-real).mean() + F.softplus(drawn).mean()


def generator_loss(drawn: Tensor, objective: str) -> Tensor:
    """Return G's loss in nats for D's logits (B,) of drawn images; objective: one of OBJECTIVES."""
    return -F.softplus(drawn).mean() if objective == "minimax" else F.softplus(-drawn).mean()


def r1(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return D's logits (B,) of images (B, C, H, W), and R1 (), the mean of |dD/dx|^2.

    R1 can be differentiated by D's weights. Under torch.no_grad, as in an evaluation, dD/dx is computed all
    the same, but no graph is kept to differentiate it.
    """
    learns = torch.is_grad_enabled()
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = discriminator(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=learns, retain_graph=learns)
    return logits, gradient.square().flatten(1).sum(1).mean()


def macs(network: nn.Module, places: list[int]) -> int:
    """Return the multiplications of a network for one image. places: for each layer, how many positions of an
    image its weights are applied at."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    return sum(w.numel() * n for w, n in zip(weights, places, strict=True))


class GAN(nn.Module):
    """A generator and its discriminator."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.generator, self.discriminator = generator(config), discriminator(config)
        initialize(self)

    def frozen_discriminator(self, images: Tensor) -> Tensor:
        """Return D's logits (B,) of images (B, C, H, W). Gradients reach the images, but not D's weights."""
        weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, weights, (images,))

    @torch.compiler.disable  # torch.compile cannot take the gradient of a gradient
    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both losses in nats for "images" (B, C, H, W) in [0, 1] and "codes" (B, Z), and
        as metrics each loss, R1, and the accuracy of D ("right"). Each network gets gradients of its own loss
        alone."""
        c, drawn = self.config, self.generator(batch["codes"])
        real_logits, penalty = r1(self.discriminator, 2 * batch["images"] - 1)
        logits = self.discriminator(drawn.detach())
        d_loss = discriminator_loss(real_logits, logits)
        g_loss = generator_loss(self.frozen_discriminator(drawn), c.objective)
        right = torch.cat((real_logits > 0, logits < 0)).float().mean()
        metrics = {"discriminator": d_loss, "generator": g_loss, "r1": penalty, "right": right}
        loss = d_loss + c.gamma / 2 * penalty + g_loss
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

        G computes 3 products per weight: forward, and backward for weights and for inputs. D computes 11. Of
        these 6 are for the real image: 2 for its logit and dD/dx, and 4 for the gradients of both. 3 are for
        the drawn image in D's own loss, and 2 in the loss of G, without gradients of D's weights.
        """
        steps = [math.prod(self.config.smallest[1:]) * 4**i for i in range(self.config.n_halvings)]
        all_pixels = math.prod(self.config.image_size)
        g = macs(self.generator, [1, *steps, all_pixels])
        d = macs(self.discriminator, [all_pixels, *reversed(steps), 1])
        return 2 * (3 * g + 11 * d)

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save


Model = GAN


# --- the task


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images with their classes, which only vision/frechet.py reads. Raises ValueError for --parallel
    fsdp: the loss of G needs all weights of D, and not a shard of them."""
    if args.parallel == "fsdp":
        raise ValueError("--parallel fsdp: the discriminator needs all of its weights; expected none or ddp")
    return drawing.load_data(args, config, describe)


def describe(train: Tensor, held: Tensor) -> str:
    """Return one line: the losses where drawn images cannot be told from real ones, whatever the images."""
    d, g = 2 * math.log(2), math.log(2)
    return (
        f"where drawn images are distributed as real ones, the discriminator's loss is {d:.3f} nats and the "
        f"generator's {g:.3f}; neither says how good images are"
    )


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, H, W) with values in [0, 1], and "codes" (B, Z) from N(0, 1)."""
    codes = torch.randn(len(rows), config.n_latents, generator=generator)
    return {"images": stack(rows)["image"].float() / 255, "codes": codes}


@torch.no_grad()
def show(model: GAN, dataset: Dataset, out: Path) -> str:
    """Write a picture of held-out images, new images, and images on an arc from one code to another. Return
    lines of figures that compare new images with real ones."""
    n, draws = drawing.SHOWN, torch.Generator().manual_seed(0)
    new = model.draw(3 * n, draws).split(n)
    ends = torch.randn(2, model.config.n_latents, generator=draws)
    angle = torch.linspace(0, math.pi / 2, n)[:, None]
    walk = (angle.cos() * ends[0] + angle.sin() * ends[1]).to(model.generator[0].weight.device)
    rows = [drawing.some(dataset.val, n), *new, model.images(walk)]
    pictures.save(out, rows, labels=("real", "new", "new", "new", "a walk"))
    found = frechet.in_words(dataset, partial(frechet.drawn, model))
    return f"picture.png: held-out images, new images, a walk between two codes\n{found}"


if __name__ == "__main__":
    command.run(lambda: drawing.main(GAN))
