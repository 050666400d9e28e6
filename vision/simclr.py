"""SimCLR: two views of one image should be alike, and unlike the views of all other images.

    l(i, j) = -log exp(s_ij / tau) / sum over k != i of exp(s_ik / tau)        s_ij: cosine of z_i and z_j
    loss    = mean of l(i, j) over all M views i, where j is the other view of i's image

Contrastive learning of representations (Chen et al. 2020, arXiv 2002.05709; the loss is NT-Xent). Every image
of a batch is seen in two views. Given one, the model has to find the other among the M - 1 others: this is a
classification whose classes are the views of the batch, so it needs no labels. The model learns what two
views share, so the choice of the augmentation is the method. A character stays the same turned, thinner,
blurred or paler. Mirrored it may be another one: b and d. So here views are warped, blurred, faded and noisy,
and never mirrored, unlike the paper's crops and colours of photographs.

z = g(h) is the output of a small head, which is discarded after training. The features h before it are
better, since z must forget whatever differs between two views (section 4.2). The sum over k includes j and
leaves out only i itself. With several ranks it is over the views of all ranks, with gradients to all.

    python train.py --model simclr                       without labels, from the letters of twelve fonts
    python -m evaluation.probe runs/simclr/model         are the features of use in nine other fonts?

Shapes: B images of this rank, C channels, M views of all ranks (2 B with one rank), D width of h, Z width of
z.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Augmentation, augment
from data.rows import Dataset, Row, stack
from engine import parallel, pictures
from engine.activations import Precision
from formats.config_values import check_values
from vision import classify_images, vit
from vision.classify_images import load_images
from vision.vit import ViT

MODEL, DATA = "vit", "glyphs:dejavu"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 256, 600
LOSS, TOKEN_LOSS = "nats per view", ""
SHOWN = 12  # images of the picture


@dataclass(frozen=True)
class Config(Augmentation):
    """The loss, its head, and how the views differ."""

    warp: float = 1.5  # more than for a classifier: harder views teach more
    temperature: float = 0.2  # tau; the paper's is 0.1 for ImageNet and 0.5 for CIFAR-10
    width: int = 64  # Z
    blur: float = 1.5  # pixels, the largest standard deviation of the blur, which half of the views have
    fade: float = 0.5  # contrast that a view loses at most, a share
    noise: float = 0.15  # the largest standard deviation of noise added to pixels in [0, 1]
    MAY_BE_ZERO = ("warp", "blur", "fade", "noise")

    def __post_init__(self):
        check_values(self)
        if self.fade >= 1:
            raise ValueError(f"fade {self.fade}: expected less than 1, which leaves nothing to see")


def settings(config: vit.Config) -> Config:
    """Return the settings for any model."""
    return Config()


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Return images (B, C, height, width), each blurred by a Gaussian of its own sigma (B,) in pixels."""
    B, C, height, width = images.shape
    reach = 3
    squares = torch.arange(-reach, reach + 1).square()
    weights = torch.softmax(-squares / (2 * sigma.clamp(min=1e-2).square()[:, None]), dim=1)  # (B, 7)
    weights = weights.repeat_interleave(C, dim=0)[:, None]  # each channel of each image is a group
    x = F.pad(images.reshape(1, B * C, height, width), (reach,) * 4, mode="replicate")
    x = F.conv2d(x, weights[:, :, :, None], groups=B * C)
    return F.conv2d(x, weights[:, :, None], groups=B * C).view_as(images)


def view(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Return a random view of each of images (B, C, height, width), with pixels in [0, 1]."""
    everyone = torch.ones(len(images), dtype=torch.bool)
    x = augment(images, everyone, config, generator)
    # Draw four numbers for each image, and noise, whatever the settings are.
    u = torch.rand(4, len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    x = blurred(x, config.blur * (2 * u[0] - 1).clamp(min=0).flatten()) if config.blur else x
    # Less contrast, at some level of brightness.
    contrast = 1 - config.fade * u[1]
    x = contrast * x + (1 - contrast) * u[2]
    return (x + config.noise * u[3] * noise).clamp(0, 1)


def nt_xent(z: Tensor, others: Tensor, places: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean loss of views, and the share of them whose most similar view is the right one.

    z: the views (B, 2, Z) of this rank, which are others[places]. others: all views (M / 2, 2, Z). Vectors
    are normalized here, so their lengths do not matter.
    """
    rows, columns = (F.normalize(x.float().flatten(0, 1), dim=1) for x in (z, others))
    with torch.autocast(z.device.type, enabled=False):  # cosines of 8 bits, divided by tau, are too rough
        similarity = rows @ columns.T / temperature  # (2 B, M)
    own = torch.stack((2 * places, 2 * places + 1), dim=1).flatten()
    itself = F.one_hot(own, len(columns)).bool()
    logits = similarity.masked_fill(itself, float("-inf"))
    targets = own ^ 1  # views 2 i and 2 i + 1 are of one image
    return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean()


class SimCLR(nn.Module):
    """An encoder, and the head that is discarded after training."""

    def __init__(self, encoder: ViT, settings: Config):
        super().__init__()
        self.model, self.config, self.settings = encoder, encoder.config, settings
        # The classifier of a trained model has no part in this.
        for name, p in encoder.named_parameters():
            if name.startswith("classifier."):
                p.requires_grad_(False)
        D = encoder.config.d_model
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, settings.width))
        vit.initialize(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Return z (B, Z) of normalized images (B, C, height, width)."""
        return self.head(self.model.features(images))

    def flops(self) -> int:
        """Return the FLOPs of matrix products, forward and backward, of both views of one image, without the
        similarities, which are 6 M Z more for each view."""
        D = self.config.d_model
        return 2 * (
            self.model.flops_per_token() + 6 * (D * D + D * self.settings.width - D * self.config.n_classes)
        )


def wrap(model: ViT, config: Config) -> SimCLR:
    """Return the model with a new head."""
    return SimCLR(model, config)


def unwrap(module: SimCLR) -> ViT:
    """Return the encoder."""
    return module.model


def load_data(args: Namespace, config: vit.Config) -> Dataset:
    """Return images without their classes. Raises ValueError for what `data.images.prepare` refuses, and for
    a batch of one image, which has no others."""
    if args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size}: expected at least 2, since images are compared")
    dataset = load_images(args, config)
    n = 2 * args.batch_size - 1
    guess = f"a random guess finds the other view in {1 / n:.2%}, with a loss of {math.log(n):.3f}"
    return replace(dataset, labels=(), guess=guess)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "views" (B, 2, C, height, width), also of held-out images, with pixels in [0, 1]."""
    images = stack(rows)["image"].float() / 255
    return {"views": torch.stack([view(images, config, generator) for _ in range(2)], dim=1)}


def split(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """Return the i-th of n equal parts of a batch, with the "places" (B,) of its images in the batch.

    With places, `loss` compares the views of a part with those of all parts; without, with each other.
    """
    places = torch.arange(len(batch["views"]))
    return {name: x.chunk(n)[i] for name, x in {**batch, "places": places}.items()}


def loss(module: SimCLR, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the header's loss of a batch, and how often the most similar view is the right one."""
    images = module.model.normalized(batch["views"].flatten(0, 1))
    z = module(images).unflatten(0, (-1, 2))
    if "places" in batch:
        others, places = parallel.gather_with_gradient(z), batch["places"]
    else:
        others, places = z, torch.arange(len(z), device=z.device)
    value, found = nt_xent(z, others, places, module.settings.temperature)
    return value, {"found": found}


def tokens_per_row(module: SimCLR, config: Config, seq_len: int) -> list[int]:
    """Return how many tokens the encoder reads of both views of an image."""
    return [2 * (1 + module.config.n_patches)]


def loss_bytes(module: SimCLR, config: Config, n: int, seq_len: int, precision: Precision) -> dict[str, int]:
    """Return the memory of n images outside the layers, as the fields of engine.activations.Loss.

    The similarities to views of other ranks are left out.
    """
    of_views = classify_images.loss_bytes(module.model, config, 2 * n, seq_len, precision)
    n_similarities = (2 * n) ** 2
    return of_views | {
        "kept": of_views["kept"] + 5 * n_similarities,  # a log-softmax, and where a view meets itself
        "temporary": 8 * n_similarities,
    }


def save(module: SimCLR, dataset: Dataset, directory: Path) -> None:
    """Write the encoder alone."""
    module.model.save_pretrained(directory)


def flops_per_token(module: SimCLR, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image."""
    return module.flops()


@torch.no_grad()
def show(module: SimCLR, dataset: Dataset, out: Path) -> str:
    """Draw two views of some held-out images, and the similarities of the first with the second views as a
    matrix of squares: white on the diagonal where each view finds its own image."""
    n = min(SHOWN, len(dataset.val))
    rows = [dataset.val[i * len(dataset.val) // n] for i in range(n)]
    views = make_batch(rows, module.settings, torch.Generator().manual_seed(0), None)["views"]
    device = next(module.parameters()).device
    z = module(module.model.normalized(views.flatten(0, 1).to(device))).float()
    z = F.normalize(z, dim=1).unflatten(0, (n, 2))
    similarity = (z[:, 0] @ z[:, 1].T).cpu()  # (n, n)

    # Each row of the picture: a first view, and its similarity to each of the second views above.
    square = torch.ones(1, *views.shape[3:])
    lines = [[0.5 * square, *views[:, 1]]]
    lines += [[views[i, 0], *(square * s.clamp(0, 1) for s in similarity[i])] for i in range(n)]
    pictures.save(out, lines)
    right = int((similarity.argmax(1) == torch.arange(n)).sum())
    return f"picture.png: {right} of {n} views are most similar to the other view of their image"
