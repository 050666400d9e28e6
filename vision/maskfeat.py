"""MaskFeat: hide patches of an image, and predict in which directions the edges in them run.

    loss = mean of (predicted - HOG)^2 over the F numbers of each hidden patch, and over hidden patches

Masked feature prediction (Wei et al. 2021, arXiv 2112.09133). What is rebuilt is no longer the pixels, as in
vision/mae.py, but histograms of oriented gradients (HOG, Dalal and Triggs 2005), which forget brightness and
contrast and keep shapes. There is no decoder: the encoder reads all places, with a learned mask token in
place of the embedding of a hidden patch, and one linear layer predicts. 40 percent are hidden, in blocks.

    gradient      Sobel's, of each channel, at each pixel: (g_x, g_y)
    direction     one of 9 bins of 20 degrees; opposite directions share one
    cell          a square of pixels: the lengths of its gradients are summed in the bins of their directions
    HOG           these 9 sums divided by the root of the sum of their squares

So a constant image has HOG 0, and a mirrored one has the bins in reverse order, except that exactly vertical
gradients stay in their bin. `target=pixels` rebuilds the pixels of the patches by the same network, to
compare the two targets alone (the paper's table 1).

    python train.py --model maskfeat                                                edges of hidden patches
    python train.py --model vit --init-from runs/maskfeat/model --set n_classes=62  then learn to read

Shapes: B batch, C channels, P patch size, N patches, D width, F = C x 9 x cells of a patch, the numbers of a
target.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Augmentation, augment
from data.baselines import MOST, pixels
from data.rows import Dataset, Row, stack
from engine import pictures
from engine.activations import Precision
from engine.settings import with_fields
from formats.config_values import check_values
from vision import mae, vit
from vision.classify_images import input_bytes, load_images
from vision.mae import patchify, unpatchify
from vision.patches import patches_of
from vision.vit import ViT

MODEL, DATA = "vit", "glyphs:dejavu"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 128, 1000
LOSS, TOKEN_LOSS = "squared error", ""
BINS = 9
STAMP = 8  # pixels of a cell in the picture
ASPECT = 0.3  # height divided by width of a hidden block, at least; 1 / ASPECT at most


@dataclass(frozen=True)
class Config(Augmentation):
    """The hidden patches, and what is predicted of them. The defaults are the paper's, for ViT-B/16."""

    warp: float = 0.0  # no other views of the images, since every epoch hides other patches
    grid: tuple[int, ...] = (14, 14)  # rows and columns of patches, of the model's config
    mask_rate: float = 0.4
    smallest: float = 16 / 196  # share of the patches that a hidden block has at least
    cell: int = 8  # pixels, both ways
    target: str = "hog"  # or "pixels"

    def __post_init__(self):
        check_values(self, target=("hog", "pixels"))
        if not 1 <= self.n_hidden < self.grid[0] * self.grid[1]:
            n = self.grid[0] * self.grid[1]
            raise ValueError(
                f"mask_rate {self.mask_rate}: {self.n_hidden} of {n} patches are hidden; expected at least "
                "one, and one visible"
            )

    @property
    def n_hidden(self) -> int:
        """Return the number of patches that are hidden: the share mask_rate, rounded down."""
        return int(self.grid[0] * self.grid[1] * self.mask_rate)


def settings(config: vit.Config) -> Config:
    """Return the paper's settings: four cells in each patch, or one where its side is an odd number."""
    P = config.patch_size
    return Config(grid=config.grid, cell=P if P % 2 else P // 2)


def check_cell(cell: int, patch_size: int) -> None:
    """Raise ValueError for cells that do not divide a patch."""
    if patch_size % cell:
        raise ValueError(f"cell {cell}: expected a divisor of patch_size {patch_size}")


def hog(images: Tensor, cell: int) -> Tensor:
    """Return the histograms (B, C, 9, height / cell, width / cell) of images (B, C, height, width), as the
    authors compute them: unsigned directions, each gradient in one bin, no blocks of cells."""
    # Sobel's gradients. Differences come first, so that those of equal pixels are exactly 0.
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across, down = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    g_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    g_y = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]

    # Their lengths, in the bins of their directions. The authors' angle is atan2(g_x, g_y).
    direction = (torch.atan2(g_x, g_y) / math.pi * BINS).floor().long() % BINS
    votes = F.one_hot(direction, BINS).movedim(-1, 2) * (g_x.square() + g_y.square()).sqrt().unsqueeze(2)

    # Sums of cells.
    B, C, _, height, width = votes.shape
    sums = votes.view(B, C, BINS, height // cell, cell, width // cell, cell).sum((4, 6))
    return F.normalize(sums, dim=2)


def hog_of_patches(images: Tensor, patch_size: int, cell: int) -> Tensor:
    """Return the histograms (B, N, F) of each patch, in order of channel, bin, row and column of the cell."""
    return patches_of(hog(images, cell).flatten(1, 2), patch_size // cell)


def hidden_blocks(config: Config, generator: torch.Generator) -> Tensor:
    """Return a random mask of the patches of an image, bool (N,), True for the n_hidden hidden ones.

    They are rectangles at random places, as in BEiT (Bao et al. 2021, arXiv 2106.08254, algorithm 1). If
    after 40 draws fewer are hidden, single patches are added.
    """
    rows, columns = config.grid
    mask, left = torch.zeros(rows, columns, dtype=torch.bool), config.n_hidden
    for u in torch.rand(40, 4, generator=generator).tolist():
        # Draw an area, a ratio of height and width, and a place.
        smallest = min(max(1.0, config.smallest * rows * columns), left)
        area = smallest + u[0] * (left - smallest)
        aspect = ASPECT ** (2 * u[1] - 1)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, start = int(u[2] * (rows - height + 1)), int(u[3] * (columns - width + 1))
        block = mask[top : top + height, start : start + width]
        new = height * width - int(block.sum())
        if new <= left:
            block.fill_(True)
            left -= new
        if left == 0:
            break
    mask = mask.flatten()
    visible = (~mask).nonzero().flatten()
    mask[visible[torch.randperm(len(visible), generator=generator)[:left]]] = True
    return mask


class MaskFeat(nn.Module):
    """A ViT, its mask token, and the linear layer that predicts."""

    def __init__(self, encoder: ViT, settings: Config):
        super().__init__()
        self.model, self.config, self.settings = encoder, encoder.config, settings
        config = encoder.config
        if settings.grid != config.grid:
            raise ValueError(f"grid {settings.grid}: expected {config.grid}, as the model has")
        check_cell(settings.cell, config.patch_size)
        # The classifier and the pooler of a trained model have no part in this.
        for name, p in encoder.named_parameters():
            if name.startswith(("classifier.", "vit.pooler.")):
                p.requires_grad_(False)
        self.decoder = nn.Module()
        self.decoder.mask_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.decoder.decoder_pred = nn.Linear(config.d_model, self.n_numbers)
        vit.initialize(self.decoder)

    @property
    def n_numbers(self) -> int:
        """Return F, or the number of pixels of a patch."""
        config, cell = self.config, self.settings.cell
        if self.settings.target == "pixels":
            return config.n_channels * config.patch_size**2
        return config.n_channels * BINS * (config.patch_size // cell) ** 2

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the predicted targets (B, N, F) of normalized images, of which the patches in mask, bool
        (B, N), are hidden."""
        embeddings = self.model.vit.embeddings
        first, patches = embeddings(images)
        # A hidden patch has its position, and the mask token in place of its content.
        hidden = self.decoder.mask_token + embeddings.positions(self.config.grid)[:, 1:]
        z = self.model.encode(first, torch.where(mask[:, :, None], hidden.to(patches.dtype), patches))
        return self.decoder.decoder_pred(self.model.vit.layernorm(z))[:, 1:]

    def target(self, images: Tensor) -> Tensor:
        """Return the targets (B, N, F) of normalized images (B, C, height, width)."""
        if self.settings.target == "pixels":
            return patchify(images, self.config.patch_size)
        return hog_of_patches(images, self.config.patch_size, self.settings.cell)

    def flops(self) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one image."""
        config = replace(self.config, n_classes=0, readout="class")
        T = 1 + config.n_patches
        return 6 * (vit.n_macs(config) + T * config.d_model * self.n_numbers)


def wrap(model: ViT, config: Config) -> MaskFeat:
    """Return the model with a new mask token and linear layer."""
    return MaskFeat(model, config)


def unwrap(module: MaskFeat) -> ViT:
    """Return the encoder."""
    return module.model


def load_data(args: Namespace, config: vit.Config) -> Dataset:
    """Return images without their classes, with trivial guesses: the errors of the mean HOG of each place and
    of the mean image.

    Raises ValueError for what `data.images.prepare` refuses, and for a cell that does not divide a patch.
    """
    dataset = load_images(args, config)
    config = vit.fit(config, dataset, 1)
    cell = with_fields(settings(config), args.set).cell
    check_cell(cell, config.patch_size)
    # The HOG and the normalized pixels of some training images and of some held-out ones.
    parts = []
    for rows, most in zip((dataset.train, dataset.val), MOST, strict=True):
        images = pixels(rows, most)[0].unflatten(1, (config.n_channels, *config.size))
        hogs = hog_of_patches(images, config.patch_size, cell)
        parts.append((hogs, images / images.new_tensor(config.std)[:, None, None]))
    errors = [(held - train.mean(0)).square().mean() for train, held in zip(*parts, strict=True)]
    guess = (
        f"on held-out images the mean HOG of each place has a squared error of {errors[0]:.4f}, the mean "
        f"image one of {errors[1]:.4f}"
    )
    return replace(dataset, labels=(), guess=guess)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width) with pixels in [0, 1], and "mask" (B, N), True where hidden."""
    batch = stack(rows)
    images = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    return {"images": images, "mask": torch.stack([hidden_blocks(config, generator) for _ in rows])}


def loss(module: MaskFeat, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the header's loss of a batch from `make_batch`, and no other metrics."""
    images, mask = module.model.normalized(batch["images"]), batch["mask"]
    error = (module(images, mask).float() - module.target(images)).square().mean(dim=2)  # (B, N)
    return (error * mask).sum() / mask.sum(), {}


def tokens_per_row(module: MaskFeat, config: Config, seq_len: int) -> list[int]:
    """Return how many tokens of an image the encoder reads: all."""
    return [1 + module.config.n_patches]


def loss_bytes(
    module: MaskFeat, config: Config, n: int, seq_len: int, precision: Precision
) -> dict[str, int]:
    """Return the memory of n images outside the layers, as the fields of engine.activations.Loss."""
    (e, r, _), own = precision, module.config
    n_pixels, N = own.n_channels * math.prod(own.size), own.n_patches
    kept = own.d_model * (1 + N) * (r + e) + 4 * N * module.n_numbers
    # While HOG is computed, each pixel has an int64 and up to two float32 for each bin: 16 bytes.
    temporary = n_pixels * BINS * 16 if config.target == "hog" else 3 * 4 * n_pixels
    return {"inputs": input_bytes(own, n, e), "kept": n * kept, "temporary": n * temporary}


def save(module: MaskFeat, dataset: Dataset, directory: Path) -> None:
    """Write the encoder alone, as a ViT: no architecture of transformers has the rest."""
    module.model.save_pretrained(directory)


def flops_per_token(module: MaskFeat, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image."""
    return module.flops()


def drawn(histograms: Tensor) -> Tensor:
    """Return pictures (B, C, 8 rows, 8 columns) of histograms (B, C, 9, rows, columns): in each cell a line
    for each bin, along the edges of that direction, as bright as the bin is full."""
    angle = (torch.arange(BINS) + 0.5) * (math.pi / BINS)
    place = torch.arange(STAMP) - (STAMP - 1) / 2
    off_line = angle.sin()[:, None, None] * place + angle.cos()[:, None, None] * place[:, None]
    lines = (1 - off_line.abs()).clamp(min=0)  # (9, 8, 8)
    cells = torch.einsum("bckrs,kyx->bcrysx", histograms.clamp(0, 1).cpu(), lines)
    return cells.flatten(4, 5).flatten(2, 3).clamp(max=1)


@torch.no_grad()
def show(module: MaskFeat, dataset: Dataset, out: Path) -> str:
    """Draw some held-out images, evenly spaced: original, masked, its edges, and these as predicted."""
    n, config, s = min(mae.SHOWN, len(dataset.val)), module.config, module.settings
    rows = [dataset.val[i * len(dataset.val) // n] for i in range(n)]
    batch = make_batch(rows, s, torch.Generator().manual_seed(0), None)
    device = next(module.parameters()).device
    images, mask = batch["images"].to(device), batch["mask"].to(device)
    target = module.target(module.model.normalized(images))
    predicted = module(module.model.normalized(images), mask).float()
    predicted = torch.where(mask[:, :, None], predicted, target)
    hidden = torch.where(mask[:, :, None], 0.5, patchify(images, config.patch_size))
    masked = unpatchify(hidden, config)
    what = f"{s.n_hidden} of {config.n_patches} patches hidden"
    if s.target == "pixels":
        mean, std = (images.new_tensor(getattr(config, name))[:, None, None] for name in ("mean", "std"))
        rebuilt = unpatchify(predicted, config) * std + mean
        pictures.save(out, [images, masked, rebuilt], labels=("original", "masked", "rebuilt"))
        return f"picture.png: original, with {what}, rebuilt"

    # Histograms of patches become those of the image again; images are enlarged to the same size.
    per_patch = config.patch_size // s.cell
    places = replace(config, patch_size=per_patch, n_channels=config.n_channels * BINS)
    places = replace(
        places, image_size=tuple(side // s.cell for side in config.size), mean=(0.5,), std=(0.5,)
    )
    edges = []
    for numbers in (target, predicted):
        in_order = numbers.unflatten(2, (-1, per_patch**2)).transpose(2, 3).flatten(2)
        edges.append(drawn(unpatchify(in_order, places).unflatten(1, (config.n_channels, BINS))))
    size = tuple(edges[0].shape[2:])
    images, masked = (F.interpolate(x.cpu(), size=size, mode="nearest") for x in (images, masked))
    labels = ("original", "masked", "its edges", "predicted")
    pictures.save(out, [images, masked, *edges], labels=labels)
    return f"picture.png: original, with {what}, the directions of its edges, as predicted"
