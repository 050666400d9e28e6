"""Embedding to image: the task that trains the decoder of DALL-E 2, and its measure.

    z = CLIP's embedding of the image, times sqrt(E); for a tenth of the training images the null row
    loss = mean of (unet(x_t, t, z) - target)^2

Ramesh et al. 2022, arXiv 2204.06125, section 2.1; the network is vision/unclip.py. CLIP is frozen and not
saved with the decoder: `--set clip=DIR` names it. If the data are drawn and no CLIP is named, the run first
trains one on the same captions and keeps it below --cache; a run of the prior (vision/image_embeddings.py)
uses the same. The loss computes z from the augmented image, so that z belongs to the very pixels that are
drawn. CLIP reads this image at its own size, and x_0 is the image at the decoder's size.

The decoder is measured by how often a classifier of real images (vision/judge.py) recognises the images that
it draws for held-out ones: from their own embeddings, from those that a prior draws for their captions, from
the captions' own embeddings in the place of an image's, and from other images' embeddings, as a control.

    python train.py --model unclip
    python -m vision.embedding_to_image runs/unclip/model --prior runs/prior/model --clip DIR     measure it

Shapes: B images, C channels, H x W pixels of a drawn image, E width of embeddings.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import captions
from data.augment import Augmentation, augment
from data.rows import Dataset, Row, stack
from data.tokenizer import get_tokenizer
from engine import pictures, trainable
from formats import command
from vision import image_embeddings, judge, noise, tower_flops
from vision.clip import CLIP
from vision.unclip import Config, UnCLIP, reduced

MODEL, DATA = "unclip", "glyphs"
OPTIMIZER, BATCH_SIZE, STEPS, EMA, LEARNING_RATE = "adamw", 64, 2000, 0.999, 0.4
LOSS, TOKEN_LOSS = "squared error", ""
GUIDANCE = (1.0, 2.0)  # of the images that are measured
SHOWN = 12  # images in a row of the picture
MOST_DRAWN = 256  # at most: images that are drawn for the judge


@dataclass
class ImageDataset(Dataset):
    """Images with captions at the size that CLIP reads."""

    clip: str = ""  # directory of the CLIP
    d_embed: int = 0  # E
    small: Dataset | None = None  # of drawn sets: the same images at the decoder's size, for the judge


def load_data(args: Namespace, config: Config) -> ImageDataset:
    """Return images with captions, with a line about a trivial guess: the error of predicting the mean image
    as each x_0, computed on about a thousand training images.

    Raises ValueError as `image_embeddings.load_pairs`, and if CLIP reads smaller images than are drawn.
    """
    clip, own, parts = image_embeddings.load_pairs(args, config)
    size, d_embed = config.unet.size, own.config.d_joint
    if size[0] > min(own.config.size):
        raise ValueError(f"{clip}: reads {own.config.size} pixels: expected {size[0]} or more, as are drawn")
    of_tokens = (get_tokenizer(clip), own.config.max_seq_len)
    found, small = captions.as_dataset(parts, *of_tokens), None
    if captions.is_drawn(args.data):
        pixels = [reduced(torch.from_numpy(part.images) / 255, size) for part in parts]
        bytes_ = [(255 * some).round().byte().numpy() for some in pixels]
        pairs = zip(parts, bytes_, strict=True)
        small = captions.as_dataset([replace(part, images=some) for part, some in pairs], *of_tokens)
    rows = [found.train[i] for i in range(0, len(found.train), -(-len(found.train) // 1000))]
    images = 2 * reduced(stack(rows)["image"].float() / 255, size) - 1
    spread = (images - images.mean(0)).square().mean().item()
    guess = f"the mean image has a squared error of {spread:.3f} as x_0"
    fields = vars(found) | {"tokenizer": None, "guess": guess}  # the decoder reads no text
    return ImageDataset(**fields, clip=clip, d_embed=d_embed, small=small)


class WithCLIP(nn.Module):
    """A decoder, and the frozen CLIP whose embeddings it reads."""

    def __init__(self, model: UnCLIP, clip: CLIP):
        super().__init__()
        self.model, self.config = model, model.config
        self.clip = clip.requires_grad_(False)
        self.alpha_bar = model.config.alpha_bar  # no buffer: it has to stay float64

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, E), of length 1, of images as CLIP reads them, with pixels in [0, 1]."""
        return self.clip.encode_images(self.clip.normalized(images))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the predicted target, and no metrics, for "images" as CLIP reads
        them, "noise" (B, C, H, W) and times "t" (B,). Where "dropped", bool (B,), z is the null row."""
        t, eps, kind = batch["t"], batch["noise"], self.config.target
        z = self.embed_images(batch["images"]) * math.sqrt(self.config.d_embed)
        z = torch.where(batch["dropped"][:, None], self.model.null, z)
        x0 = 2 * reduced(batch["images"], self.config.unet.size) - 1
        found = self.model(noise.q_sample(x0, t, eps, self.alpha_bar), t, z).float()
        return (found - noise.target(kind, x0, eps, t, self.alpha_bar)).square().mean(), {}


def wrap(model: UnCLIP, config: Config) -> WithCLIP:
    """Return the decoder with its CLIP. Raises ValueError if none is named, or one with embeddings of another
    width."""
    directory = model.config.clip
    if not directory:
        raise ValueError("a trained decoder reads the CLIP that it was trained with; name it, --set clip=DIR")
    return WithCLIP(model, image_embeddings.open_clip(directory, d_embed=model.config.d_embed))


def unwrap(module: WithCLIP) -> UnCLIP:
    """Return the decoder."""
    return module.model


def make_batch(rows: list[Row], config: Config, generator: torch.Generator, _: Any) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width) of the size that CLIP reads, augmented, with pixels in [0, 1];
    normal "noise" (B, C, H, W); times "t" (B,) of `noise.even_times`; and "dropped", bool (B,), which is true
    for a random share, config.drop, of the training rows."""
    batch, n = stack(rows), len(rows)
    images = augment(batch["image"].float() / 255, batch["augment"], Augmentation(config.warp), generator)
    dropped = batch["augment"] & (torch.rand(n, generator=generator) < config.drop)
    t = noise.even_times(n, config.n_steps, generator)
    eps = torch.randn(n, images.shape[1], *config.unet.size, generator=generator)
    return {"images": images, "noise": eps, "t": t, "dropped": dropped}


def save(module: WithCLIP, dataset: Dataset, directory: Path) -> None:
    """Write the decoder into a directory, without the CLIP."""
    module.model.save_pretrained(directory)


def flops_per_token(module: WithCLIP, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one image: of the decoder forward and backward, and of CLIP's image
    tower forward only."""
    tower = tower_flops.n_macs(module.clip.config.vision)
    # The engine subtracts the gradients of frozen matrices, so those of CLIP are added here.
    return module.model.flops_per_token() + 2 * tower + trainable.frozen_flops(module.clip)


# --- what is drawn, and its measure


@torch.no_grad()
def compare(
    module: WithCLIP,
    dataset: ImageDataset,
    prior: Tensor | None = None,
    guidance: Sequence[float] = GUIDANCE,
) -> tuple[list[int], dict[str, Tensor]]:
    """Return the indices of n evenly spaced held-out images, and rows of images (n, C, H, W) by their names:
    the real images, and the drawn ones for each guidance and each kind of embedding. These are the images'
    own embeddings; those that a prior drew for their captions; those of their captions, in the place of an
    image's; and those of other images.

    prior (M, E): embeddings of length 1 that a prior has drawn for all M held-out captions, or None.
    """
    n, device = len(dataset.val), module.model.null.device
    chosen = list(range(0, n, -(-n // (MOST_DRAWN if dataset.small else SHOWN))))
    batch = stack([dataset.val[i] for i in chosen])
    true = batch["image"].float().to(device) / 255
    own = module.embed_images(true)
    ways = {"its own": own}
    if prior is not None:
        ways["the prior's"] = prior[chosen]
    ways |= {
        "its text's": module.clip.encode_texts(batch["tokens"].to(device)),
        "another's": own.roll(len(own) // 2, 0),  # those of images half of the row further on
    }
    rows = {"real": reduced(true, module.config.unet.size).cpu()}
    for name, embeddings in ways.items():
        for w in guidance:
            rows[f"{name}, w = {w:g}"] = module.model.draw(embeddings, guidance=w).cpu()
    return chosen, rows


def in_words(dataset: ImageDataset, chosen: Sequence[int], rows: dict[str, Tensor]) -> str:
    """Return a line for each row of `compare`: for drawn sets how often a judge recognises its images, and
    the mean squared difference between their pixels and those of the real images."""
    opinion, true = judge.of(dataset.small) if dataset.small else None, rows["real"]
    lines = [judge.in_words(f"{name:20}", images, true, opinion, chosen) for name, images in rows.items()]
    return "\n".join([f"{len(chosen)} held-out images, drawn from the embedding:", *lines])


def show(module: WithCLIP, dataset: ImageDataset, out: Path) -> str:
    """Draw rows of held-out images: the real ones, and those that the decoder draws from each kind of
    embedding without guidance, see `compare`. Return how often a judge recognises them."""
    chosen, rows = compare(module, dataset, guidance=GUIDANCE[:1])
    n_shown = min(SHOWN, len(chosen))
    shown = [i * len(chosen) // n_shown for i in range(n_shown)]
    pictures.save(out, [images[shown] for images in rows.values()], labels=list(rows))
    return f"picture.png: {'; '.join(rows)}\n{in_words(dataset, chosen, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Measure a decoder of image embeddings on held-out images.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a decoder")
    add("--clip", type=command.filled, metavar="DIR", help="the CLIP that the decoder was trained with")
    add("--prior", type=command.filled, metavar="DIR", help="a prior of the same CLIP (default: none)")
    add("--prior-guidance", type=float, default=1.0, help="w of the prior; 1: none (default %(default)s)")
    add("--data", default=DATA, help="images with captions, as for train.py --data (default %(default)s)")
    add("--cache", type=command.path, default=Path("cache"), help="folder for pixels (default %(default)s)")
    args = parser.parse_args(argv)
    if args.clip is None:
        raise ValueError(f"{args.checkpoint}: name the CLIP that it was trained with, --clip DIR")
    model = UnCLIP.from_pretrained(args.checkpoint).float().eval()
    model.config = replace(model.config, clip=args.clip)
    module = wrap(model, model.config)
    prior = image_embeddings.open_prior(args.prior, args.clip) if args.prior else None
    options = Namespace(data=args.data, val=None, bad_text="refuse", cache=args.cache)
    dataset = load_data(options, model.config)
    drawn = None
    if prior is not None:
        texts = [texts[0] for texts in dataset.val.part.captions]
        drawn = image_embeddings.of_texts(prior, texts, w=args.prior_guidance, seed=0)
    print(in_words(dataset, *compare(module, dataset, drawn)))


if __name__ == "__main__":
    command.run(main)
