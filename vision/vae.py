"""VAE: an encoder and a decoder of images, trained by a lower bound on the likelihood.

    z ~ N(0, I),  x ~ p(x | z)                                 the decoder: how an image is made from a code z
    q(z | x) = N(mu(x), diag sigma(x)^2)                       the encoder: which codes may have made image x
    log p(x) >= E_q [log p(x | z)] - KL(q(z | x) || N(0, I))   the ELBO
    log p(x) >= E log (1/K sum_k p(x, z_k) / q(z_k | x))       IWAE-K, z_1 ... z_K ~ q(z | x)

Auto-encoding variational Bayes (Kingma and Welling 2013, arXiv 1312.6114; Rezende et al. 2014, 1401.4082),
and importance weighted autoencoders (Burda et al. 2015, 1509.00519). The first bound is the second with
K = 1, and the second rises with K, to log p(x) in the limit. The gap of the ELBO is KL(q(z | x) || p(z | x)):
q is a Gaussian with independent entries, but the true posterior p(z | x) is not.

Both terms of the ELBO are summed over their dimensions; the mean is over images alone. With a mean over N
pixels the KL would have N times its weight, and q(z | x) would become N(0, I) for every image. p(x | z) is a
Bernoulli distribution of each pixel, so pixels are binarised: those above one half are white, the others
black. Nats under another binarisation are not comparable.

A unit j of the code is active if its mean changes with the image: if the variance of mu_j over images is
above 0.01 (Burda et al., section 5.2). The other units are close to N(0, 1) for every image and hold almost
no information.

    python train.py --model vae                            codes of letters
    python train.py --model vae --set n_samples=10         trained by IWAE-10
    python -m vision.vae runs/vae/model                    draw images

Shapes: B batch, C channels, N values of an image, Z numbers of a code, K codes for each image.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset, Row, stack
from engine import pictures
from formats import command, native
from formats.config_values import check_values
from vision import drawing
from vision.drawing import fit  # noqa: F401, the trainer calls it

KIND, DATA = "variational autoencoder", "glyphs:all"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 128, 2000
LOSS, TOKEN_LOSS = "nats per image", ""
BOUNDS = (1, 10, 100)  # K of the bounds that an evaluation measures
MEASURED = 500  # held-out images, at most, on which the bounds are measured
ACTIVE = 0.01  # the variance of mu_j above which unit j is active
LOG_VARIANCES = (-30.0, 20.0)  # log sigma^2 is clamped between them, as in the code of latent diffusion


@dataclass(frozen=True)
class Config:
    width: int = 256  # of the hidden layers, two in the encoder and two in the decoder
    n_latents: int = 24  # Z
    n_samples: int = 1  # K of the bound that is trained
    image_size: tuple[int, ...] = (16, 16)  # height and width in pixels
    n_channels: int = 1
    max_seq_len = 1  # a row of the data is one image

    def __post_init__(self):
        check_values(self)
        if len(self.image_size) != 2:
            raise ValueError(f"image_size {self.image_size}: expected a height and a width")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def n_values(self) -> int:
        """Return N, the number of values of an image."""
        return self.n_channels * math.prod(self.image_size)


SIZES = {"tiny": Config(), "small": Config(width=1024, n_latents=64, image_size=(28, 28))}


class Sample(NamedTuple):
    """The terms of the bounds for K codes drawn from q(z | x) for each of B images."""

    logits: Tensor  # (B, K, N), of the probability that a pixel is white
    log_p: Tensor  # log p(x | z) in nats, (B, K)
    log_ratio: Tensor  # log p(z) / q(z | x) in nats, (B, K)
    kl: Tensor  # KL(q(z | x) || p(z)) in nats, (B,)


def kl_to_standard(mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mu, diag sigma^2) || N(0, I)) in nats, (B,), for mu and log sigma^2 (B, Z)."""
    return (mu.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def iwae(log_weights: Tensor) -> Tensor:
    """Return log (1/K sum_k w_k), (...), for the logarithms (..., K) of w_k = p(x, z_k) / q(z_k | x)."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


class VAE(nn.Module):
    """An encoder from images to Gaussians of codes and a decoder from codes to images, each with two hidden
    layers."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, W, N, Z = config, config.width, config.n_values, config.n_latents
        self.encoder = nn.Sequential(nn.Linear(N, W), nn.SiLU(), nn.Linear(W, W), nn.SiLU())
        self.to_code = nn.Linear(W, 2 * Z)
        self.decoder = nn.Sequential(nn.Linear(Z, W), nn.SiLU(), nn.Linear(W, W), nn.SiLU())
        self.decoder_pred = nn.Linear(W, N)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.xavier_normal_(p)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and log sigma^2, float32 (B, Z), of images (B, C, height, width) of zeros and ones."""
        mu, log_variance = self.to_code(self.encoder(x.flatten(1))).float().chunk(2, dim=1)
        return mu, log_variance.clamp(*LOG_VARIANCES)

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits (..., N) of the probabilities that pixels are white, for codes (..., Z)."""
        return self.decoder_pred(self.decoder(z)).float()

    def sample(self, x: Tensor, noise: Tensor) -> Sample:
        """Return the terms of the bounds for codes z = mu + sigma noise (the reparametrisation trick), for
        images (B, C, height, width) of zeros and ones and standard normal noise (B, K, Z)."""
        mu, log_variance = self.encode(x)
        z = mu[:, None] + (log_variance / 2).exp()[:, None] * noise
        # log N(z; 0, I) - log q(z | x): the factors 2 pi cancel, and (z - mu) / sigma is the noise.
        log_ratio = (noise.square() - z.square() + log_variance[:, None]).sum(-1) / 2
        logits = self.decode(z)  # (B, K, N)
        targets = x.flatten(1)[:, None].expand_as(logits)
        nats = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
        return Sample(logits, -nats, log_ratio, kl_to_standard(mu, log_variance))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return minus the bound with K codes, in nats per image, for "images" (B, C, height, width) and
        "noise" (B, K, Z); and as metrics the KL in nats and the squared error of a pixel's probability."""
        x, K = batch["images"], batch["noise"].shape[1]
        logits, log_p, log_ratio, kl = self.sample(x, batch["noise"])
        # With one code, take the KL in closed form. Only the likelihood is then estimated by sampling.
        bounds = log_p[:, 0] - kl if K == 1 else iwae(log_p + log_ratio)
        error = (logits.detach().sigmoid() - x.flatten(1)[:, None]).square().mean()
        return -bounds.mean(), {"kl": kl.detach().mean(), "squared_error": error}

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n new images (n, C, height, width), drawn from codes z ~ N(0, I): the probability that a
        pixel is white."""
        device = self.decoder_pred.weight.device
        z = torch.randn(n, self.config.n_latents, generator=generator, device=generator.device)
        return self.images(z.to(device))

    def images(self, z: Tensor) -> Tensor:
        """Return images (n, C, height, width) for codes (n, Z): the probability that a pixel is white."""
        return self.decode(z).sigmoid().unflatten(1, (self.config.n_channels, *self.config.image_size))

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one image; the decoder runs K
        times."""
        n = {name: p.numel() for name, p in self.named_parameters() if p.ndim == 2}
        decoded = sum(size for name, size in n.items() if name.startswith("decoder"))
        return 6 * (sum(n.values()) + (self.config.n_samples - 1) * decoded)

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save


Model = VAE


# --- the task


def binarized(images: Tensor) -> Tensor:
    """Return images of ones where the values in [0, 1] are above one half, and of zeros elsewhere."""
    return (images > 0.5).float()


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images, and a line with the figures of two guesses without a network."""
    return drawing.load_data(args, config, describe)


def describe(train: Tensor, held: Tensor) -> str:
    """Return one line for images (B, C, height, width) in [0, 1]: the nats of held-out images if each pixel
    is white as often as in training images, and the squared error of the mean training image."""
    known, held = binarized(train), binarized(held)
    mean = known.mean(0)
    p = (known.sum(0) + 0.5) / (len(known) + 1)
    nats = -(held * p.log() + (1 - held) * (1 - p).log()).flatten(1).sum(1).mean()
    error = (held - mean).square().mean()
    return (
        f"on held-out images, independent pixels need {nats:.1f} nats; the mean image has a squared error of "
        f"{error:.4f} per pixel"
    )


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width) of zeros and ones, and "noise" (B, K, Z) from N(0, 1)."""
    images = binarized(stack(rows)["image"].float() / 255)
    return {
        "images": images,
        "noise": torch.randn(len(rows), config.n_samples, config.n_latents, generator=generator),
    }


class Bounds(NamedTuple):
    """The bounds on log p(x), as means over images, and the number of active units of the codes."""

    nats: dict[int, float]  # lower bound in nats per image, by K
    n_active: int  # of Z


@torch.no_grad()
def measure(model: VAE, images: Tensor, seed: int = 0) -> Bounds:
    """Return the bounds for images (B, C, height, width) of zeros and ones, for each K of BOUNDS.

    Each image has 100 codes. They are split into groups of K, and the bound is the mean over groups. As all K
    use the same codes, by Jensen's inequality the measured bounds never fall as K grows.
    """
    generator, log_w = torch.Generator().manual_seed(seed), []
    for part in images.split(50):
        noise = torch.randn(len(part), max(BOUNDS), model.config.n_latents, generator=generator)
        drawn = model.sample(part, noise.to(part.device))
        log_w.append(drawn.log_p + drawn.log_ratio)
    log_w = torch.cat(log_w).double()  # (B, 100)
    nats = {K: iwae(log_w.unflatten(1, (-1, K))).mean().item() for K in BOUNDS}
    return Bounds(nats, int((model.encode(images)[0].var(0) > ACTIVE).sum()))


@torch.no_grad()
def show(model: VAE, dataset: Dataset, out: Path) -> str:
    """Write a picture of held-out images, their reconstructions, new images, and images on the straight line
    between two codes. Return a line with the bounds on held-out images."""
    device, n = model.decoder_pred.weight.device, drawing.SHOWN
    some = binarized(drawing.some(dataset.val, MEASURED)).to(device)
    shown = some[:: max(1, len(some) // n)][:n]
    mu = model.encode(shown)[0]
    share = torch.linspace(0, 1, n, device=device)[:, None]
    walk = (1 - share) * mu[0] + share * mu[-1]
    new = model.draw(2 * n, torch.Generator().manual_seed(0)).split(n)
    labels = ("original", "rebuilt", "new", "new", "a walk")
    pictures.save(out, [shown, model.images(mu), *new, model.images(walk)], labels=labels)

    found = measure(model, some)
    bounds = ", ".join(f"{'ELBO' if K == 1 else f'IWAE-{K}'} {nats:.2f}" for K, nats in found.nats.items())
    active = f"{found.n_active} of {model.config.n_latents} units active"
    return (
        "picture.png: held-out images, their reconstructions, new images, a walk between two codes\n"
        f"{bounds} nats on {len(some)} held-out images; {active}"
    )


if __name__ == "__main__":
    command.run(lambda: drawing.main(VAE))
