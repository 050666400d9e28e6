"""MAE: hide three quarters of an image, and rebuild them from the rest.

    loss = mean over hidden patches of mean over their numbers of (predicted - true)^2

Masked autoencoder (He et al. 2021, arXiv 2111.06377). An image is so redundant that a few missing patches can
be filled in from their neighbours. With 75 percent missing, the model has to recognise what is there. Its two
halves are unequal. The encoder, a ViT that is kept after training, reads the visible patches alone, so it
does a quarter of the work. A small decoder reads the encoder's output, and a learned mask token at each
hidden place.

Which patches are hidden is random: each patch gets a random number ("noise"), and the n patches with the
smallest numbers are visible.

With `norm_pix` each true patch is standardised before the difference is taken (section 3). This gives better
features. The brightness and contrast of a patch are then not predicted, and pictures take them from the true
patch.

This file is what MAE adds to vision/vit.py. To train it, and to fine-tune its encoder:

    python train.py --model mae                                          rebuild characters of twelve fonts
    python train.py --model vit --init-from runs/mae/model --set n_classes=62       then learn to read them
    python -m vision.mae runs/mae/model photo.png                                   rebuild an image

Shapes: B batch, C channels, P patch size, N patches, D width of the encoder, W width of the decoder.
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
from data.images import decode_all
from data.rows import Dataset, Row, stack
from engine import pictures
from engine.activations import Precision
from engine.report import PICTURE
from formats import command, images, safetensors_dir
from formats.config_values import check_values
from vision import drawing, vit
from vision.classify_images import input_bytes, load_images
from vision.patches import patches_of, sin_cos, take
from vision.vit import ViT, run_layers

MODEL, SIZE, DATA = "vit", "tiny-4", "glyphs:dejavu"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 128, 1000
LOSS, TOKEN_LOSS = "squared error", ""
SHOWN = 12  # columns of the picture


@dataclass(frozen=True)
class Config(Augmentation):
    """The decoder, and how much is hidden. The defaults are the paper's, for ViT-B/16 and larger."""

    warp: float = (
        0.0  # no augmentation: each epoch hides other patches (table 1e of the paper: little is lost)
    )
    n_patches: int = 196  # N, of the model's config
    mask_rate: float = 0.75
    norm_pix: bool = False  # standardise each true patch
    decoder_layers: int = 8
    decoder_heads: int = 16
    decoder_width: int = 512  # W
    decoder_ff: int = 2048

    def __post_init__(self):
        check_values(self)
        if self.mask_rate >= 1:
            raise ValueError(f"mask_rate {self.mask_rate}: expected more than 0 and less than 1")
        if not 0 < self.n_visible < self.n_patches:
            raise ValueError(
                f"mask_rate {self.mask_rate}: {self.n_visible} of {self.n_patches} patches are visible; "
                "expected at least one, and one hidden"
            )
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            sizes = f"decoder_width {self.decoder_width} with decoder_heads {self.decoder_heads}"
            raise ValueError(f"{sizes}: expected a multiple of the heads, and of 4")

    @property
    def n_visible(self) -> int:
        """Return the number of visible patches, rounded down by the authors' formula: of 100 patches at a
        rate of 0.9 it is 9, since 1 - 0.9 is a little less than 0.1 in floating point."""
        return int(self.n_patches * (1 - self.mask_rate))


def settings(config: vit.Config) -> Config:
    """Return the settings with the paper's decoder, or for an encoder narrower than 512 with a decoder of two
    layers of half its width."""
    D, N = config.d_model, config.n_patches
    if D >= 512:
        return Config(n_patches=N)
    return Config(n_patches=N, decoder_layers=2, decoder_heads=4, decoder_width=D // 2, decoder_ff=2 * D)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return the patches (B, N, P P C) of images (B, C, height, width) as the decoder predicts them: the
    numbers of a patch are in order of row, column and channel, not in that of `patches_of`."""
    x = patches_of(images, patch_size)  # (B, N, C P P)
    return x.unflatten(2, (-1, patch_size**2)).transpose(2, 3).flatten(2)


def unpatchify(patches: Tensor, config: vit.Config) -> Tensor:
    """Return the images (B, C, height, width) of patches (B, N, P P C): the inverse of `patchify`."""
    (rows, columns), P = config.grid, config.patch_size
    x = patches.view(len(patches), rows, columns, P, P, config.n_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), config.n_channels, rows * P, columns * P)


def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation (B, N, 1) of each of patches (B, N, P P C), by which
    norm_pix standardises them. 1e-6 is added to the unbiased variance, as in the authors' code."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class MAE(nn.Module):
    """A ViT, and the decoder that rebuilds the hidden patches."""

    def __init__(self, encoder: ViT, settings: Config):
        super().__init__()
        self.model, self.config, self.settings = encoder, encoder.config, settings
        config, W = encoder.config, settings.decoder_width
        if settings.n_patches != config.n_patches:
            raise ValueError(f"n_patches {settings.n_patches}: expected {config.n_patches}, as the model has")
        # A classifier or a pooler of a trained model is not used here, so it does not learn.
        for name, p in encoder.named_parameters():
            if name.startswith(("classifier.", "vit.pooler.")):
                p.requires_grad_(False)
        sizes = {"n_layers": settings.decoder_layers, "n_heads": settings.decoder_heads}
        narrow = replace(config, **sizes, d_model=W, d_ff=settings.decoder_ff)
        layers = nn.ModuleList(vit.Block(narrow) for _ in range(narrow.n_layers))
        self.decoder = nn.Module()
        self.decoder.config = narrow
        self.decoder.mask_token = nn.Parameter(torch.empty(1, 1, W))
        self.decoder.register_buffer("decoder_pos_embed", sin_cos(config.grid, W))
        self.decoder.decoder_embed = nn.Linear(config.d_model, W)
        self.decoder.decoder_encoder = nn.ModuleDict({"layer": layers})
        self.decoder.decoder_norm = nn.LayerNorm(W, eps=config.norm_eps)
        self.decoder.decoder_pred = nn.Linear(W, config.patch_size**2 * config.n_channels)
        vit.initialize(self.decoder)

    def predict(self, images: Tensor, noise: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return n predicted patches (B, n, P P C) of each of the normalized images, and their places (B, n).

        noise (B, N) decides which: the n patches with the largest numbers, the largest first. So they are
        first the hidden patches, and where n is larger, then the visible ones.
        """
        # The encoder reads the visible patches.
        order, n_hidden = noise.argsort(dim=1, descending=True), noise.shape[1] - self.settings.n_visible
        embeddings = self.model.vit.embeddings(images, order[:, n_hidden:])
        z = self.model.vit.layernorm(self.model.encode(*embeddings))  # (B, 1 + n_visible, D)

        # The decoder reads its output, and mask tokens at the hidden places. The order of its tokens does not
        # matter, since each has its position. Its last layer computes only the patches that are returned.
        decoder = self.decoder
        x = decoder.decoder_embed(z)
        hidden = decoder.mask_token.expand(len(x), n_hidden, -1).to(x.dtype)
        of_class, of_patches = decoder.decoder_pos_embed.split((1, noise.shape[1]), dim=1)
        x = torch.cat((hidden, x[:, 1:], x[:, :1]), dim=1)
        positions = F.embedding(order, of_patches[0])  # (B, N, W)
        x = x + torch.cat((positions, of_class.expand(len(x), -1, -1)), dim=1)
        x = run_layers(decoder.decoder_encoder.layer, x, n)
        return decoder.decoder_pred(decoder.decoder_norm(x)), order[:, :n]

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted patches (B, N, P P C) of normalized images, and mask (B, N): 1 where hidden.

        noise: (B, N); the patches with its smallest numbers are visible.
        """
        N = noise.shape[1]
        predicted, places = self.predict(images, noise, N)
        restore = places.argsort(dim=1)
        return take(predicted, restore), (restore < N - self.settings.n_visible).float()

    def target(self, images: Tensor) -> Tensor:
        """Return the true patches (B, N, P P C) of normalized images, with norm_pix standardised."""
        patches = patchify(images, self.config.patch_size)
        if not self.settings.norm_pix:
            return patches
        mean, std = statistics(patches)
        return (patches - mean) / std

    def flops(self) -> int:
        """Return the FLOPs of matrix products, forward and backward, for one image, of which only the visible
        patches are embedded, and only the hidden ones predicted."""
        config, s = self.config, self.settings
        n, n_hidden = s.n_visible, s.n_patches - s.n_visible
        W, numbers = s.decoder_width, config.patch_size**2 * config.n_channels
        encoder = vit.n_macs(replace(config, n_classes=0, readout="class"), n)
        layers = vit.layer_macs(self.decoder.config, 1 + s.n_patches, n_hidden)
        return 6 * (encoder + (1 + n) * config.d_model * W + layers + n_hidden * W * numbers)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "MAE":
        """Return the ViTMAEForPreTraining in a directory. Raises ValueError naming what is wrong."""
        described, weights = images.read(directory)

        def make() -> MAE:
            encoder = ViT(vit.Config(**described, kernels=kernels))
            own = images.read_decoder(directory)
            return cls(encoder, Config(n_patches=encoder.config.n_patches, **own))

        model = safetensors_dir.build(make, described, weights, directory)
        weights = {f"model.{name}" if name.startswith("vit.") else name: w for name, w in weights.items()}
        safetensors_dir.assign(model, weights, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a ViTMAEForPreTraining."""
        weights = {name.removeprefix("model."): w for name, w in self.state_dict().items()}
        kept = {name: w for name, w in weights.items() if not name.startswith(("classifier.", "vit.pooler."))}
        images.save_mae(self.config, self.settings, kept, directory)


Model = MAE


def wrap(model: ViT, config: Config) -> MAE:
    """Return the model with a new decoder."""
    return MAE(model, config)


def unwrap(module: MAE) -> ViT:
    """Return the encoder."""
    return module.model


def restore(module: MAE, directory: str) -> None:
    """Copy the decoder in directory into the module. Where it has another shape, print that, and keep the new
    decoder. A directory without a decoder, such as a classifier's, changes nothing."""
    if not images.has_decoder(directory):
        return
    saved = MAE.from_pretrained(directory)
    for name in ("decoder_layers", "decoder_heads", "decoder_width", "decoder_ff"):
        own, given = getattr(module.settings, name), getattr(saved.settings, name)
        if own != given:
            print(
                f"the decoder in {directory} is left out: add --set {name}={given} to keep it (here: {own})"
            )
            return
    module.decoder.load_state_dict(saved.decoder.state_dict())


def load_data(args: Namespace, config: vit.Config) -> Dataset:
    """Return images without their classes, and as a guess the error of the mean image, of normalized pixels.

    Raises ValueError for what `data.images.prepare` refuses.
    """
    dataset = load_images(args, config)
    (train, _), (held, _) = (
        pixels(rows, most) for rows, most in zip((dataset.train, dataset.val), MOST, strict=True)
    )
    std = torch.tensor(config.std).repeat_interleave(train.shape[1] // len(config.std))  # (C height width,)
    error = ((held - train.mean(0)) / std).square().mean()
    guess = f"the mean image has a squared error of {error:.4f} on held-out images (norm_pix: about 1)"
    return replace(dataset, labels=(), guess=guess)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width), augmented, with pixels in [0, 1], and "noise" (B, N)."""
    batch = stack(rows)
    images = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    return {"images": images, "noise": torch.rand(len(images), config.n_patches, generator=generator)}


def loss(module: MAE, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error of the hidden patches of a batch from `make_batch`, and no metrics."""
    images, settings = module.model.normalized(batch["images"]), module.settings
    n_hidden = settings.n_patches - settings.n_visible
    predicted, places = module.predict(images, batch["noise"], n_hidden)
    return (predicted.float() - take(module.target(images), places)).square().mean(), {}


def tokens_per_row(module: MAE, config: Config, seq_len: int) -> list[int]:
    """Return how many tokens of an image the encoder reads, and how many the decoder."""
    return [1 + config.n_visible, 1 + config.n_patches]


def loss_bytes(module: MAE, config: Config, n: int, seq_len: int, precision: Precision) -> dict[str, int]:
    """Return the memory that n images take outside the layers, as the fields of engine.activations.Loss."""
    (e, r, _), own, W = precision, module.config, config.decoder_width
    n_pixels = own.n_channels * math.prod(own.size)
    visible, all_tokens = 1 + config.n_visible, 1 + config.n_patches
    # The last norms of encoder and decoder, the linear layers before and after the decoder's, and the
    # differences that the loss squares.
    kept = own.d_model * visible * (r + e) + W * all_tokens * (r + e) + 4 * n_pixels
    return {"inputs": input_bytes(own, n, e), "kept": n * kept, "temporary": n * 3 * 4 * n_pixels}


def save(module: MAE, dataset: Dataset, directory: Path) -> None:
    """Write the encoder and the decoder."""
    module.save_pretrained(directory)


def flops_per_token(module: MAE, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image."""
    return module.flops()


@torch.no_grad()
def rebuild(module: MAE, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (B, C, height, width), with pixels in [0, 1], twice: with grey in the place of the hidden
    patches, and with the patches that the model predicts there. With norm_pix a predicted patch gets the true
    patch's mean and standard deviation."""
    config = module.config
    predicted, mask = module(module.model.normalized(images), noise)
    if module.settings.norm_pix:
        mean, std = statistics(patchify(module.model.normalized(images), config.patch_size))
        predicted = predicted * std + mean
    mean, std = (images.new_tensor(getattr(config, name))[:, None, None] for name in ("mean", "std"))
    rebuilt = unpatchify(predicted, config) * std + mean
    is_hidden = unpatchify(mask[:, :, None].expand_as(predicted), config).bool()  # (B, C, height, width)
    return torch.where(is_hidden, 0.5, images), torch.where(is_hidden, rebuilt, images)


def draw(module: MAE, images: Tensor, out: Path) -> None:
    """Draw images (B, C, height, width), with pixels in [0, 1], in three rows: original, masked and rebuilt.
    The masks are the same in each call."""
    device, generator = next(module.parameters()).device, torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), module.config.n_patches, generator=generator).to(device)
    masked, rebuilt = rebuild(module, images.to(device), noise)
    pictures.save(out, [images, masked, rebuilt], labels=("original", "masked", "rebuilt"))


def show(module: MAE, dataset: Dataset, out: Path) -> str:
    """Draw some held-out images, evenly spaced: original, masked and rebuilt."""
    draw(module, drawing.some(dataset.val, SHOWN), out)
    settings = module.settings
    hidden = settings.n_patches - settings.n_visible
    return f"picture.png: original, with {hidden} of {settings.n_patches} patches hidden, rebuilt"


def main() -> None:
    parser = command.Parser(description="Hide patches of images, and rebuild them.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a ViTMAEForPreTraining")
    add("images", nargs="+", type=command.path, help="files of images")
    add("--out", type=command.path, default=Path(), help="folder for picture.png (default: the current one)")
    args = parser.parse_args()
    model = MAE.from_pretrained(args.checkpoint).eval().float()
    shape = (model.config.n_channels, *model.config.size)
    draw(model, torch.from_numpy(decode_all(args.images, shape)).float() / 255, args.out)
    print(f"{args.out / PICTURE}: original, masked, rebuilt")


if __name__ == "__main__":
    command.run(main)
