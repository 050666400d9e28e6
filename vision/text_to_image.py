"""Text to image: the task that trains latent diffusion on images with captions.

    once         image -> mean and standard deviation of its latents
    each batch   latents drawn from these Gaussians, noise, times, tokens of the captions

The autoencoder is frozen, so the Gaussians of the latents do not change: they are computed once and kept
below --cache. The scale of latents is measured on the training images (vision/latent_diffusion.py). The
autoencoder is that of `--set autoencoder=DIR`; if the data are glyphs and none is named, the run first trains
one on their images.

An evaluation draws images for held-out captions, whose images the model has not seen. Their picture also
shows these images, and what the autoencoder rebuilds of them, which is the best that a denoiser of its
latents can do. For glyphs the evaluation reports how often a classifier of real images recognises the drawn
ones (vision/judge.py).

    python train.py --model latent_diffusion
    python train.py --model latent_diffusion --data captions.jsonl --set autoencoder=DIR text_tower=CLIP

Shapes: B images, C channels, Z channels of latents, h x w places, T tokens of a text.
"""

import hashlib
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import captions
from data.rows import Dataset, Row, Rows, stack
from data.tokenizer import Tokenizer, get_tokenizer
from engine import parallel, pictures
from formats import atomic, pipelines, safetensors_dir
from vision import autoencoder_kl, first_stage, judge, noise
from vision.autoencoder_kl import AutoencoderKL
from vision.clip import loss_bytes  # noqa: F401  engine/contract.py finds it here
from vision.clip_towers import TextTower
from vision.latent_diffusion import CHUNK, SAMPLER_STEPS, Config, LatentDiffusion

MODEL, DATA = "latent_diffusion", "glyphs"
OPTIMIZER, BATCH_SIZE, STEPS, EMA = "adamw", 64, 600, 0.99
LOSS, TOKEN_LOSS = "squared error", ""
VAE_STEPS = 300  # training steps of the autoencoder that a run trains first
GUIDANCE = (1.0, 2.0)  # of the images that an evaluation draws
SHOWN, MOST_DRAWN = 12, 256  # images in a row of the picture; at most for the judge
MOST = 1_000  # images at most by which the scale of latents is measured


class LatentRows(Rows):
    """Rows of captions with the mean and the standard deviation of each image's latents, and the empty text.

    moments: float32 (images, 2, Z, h, w), perhaps memory-mapped. empty: tokens of the empty text, int64 (T,).
    """

    def __init__(self, rows: captions.CaptionRows, moments: np.ndarray, empty: np.ndarray):
        super().__init__(rows)
        self.moments, self.empty = moments, empty

    def __getitem__(self, i: int) -> Row:
        row = {name: x for name, x in self.rows[i].items() if name != "image"}
        mean, deviation = np.array(self.moments[i % len(self.rows)])
        return row | {"mean": mean, "deviation": deviation, "empty": self.empty}


@dataclass
class LatentDataset(Dataset):
    """Captions with the latents of their images."""

    vae: autoencoder_kl.Config | None = None  # the autoencoder's config, with the scale of these latents
    autoencoder: str = ""  # the autoencoder's directory
    pairs: Dataset | None = None  # the captions with the images themselves


def load_data(args: Namespace, config: Config) -> LatentDataset:
    """Return captions with the latents of their images.

    args.seq_len is set to the length of the longest caption, or with a trained text tower to the length that
    it reads, as in Stable Diffusion. Raises ValueError for what `data.captions.read` refuses, if no
    autoencoder is named and none is trained, and if one is named for a model that has its own.
    """
    if args.init_from and config.autoencoder:
        raise ValueError(
            f"--set autoencoder={config.autoencoder}: the model in --init-from has its own; leave it out"
        )
    directory = Path(args.init_from) / "vae" if args.init_from else config.autoencoder or of_glyphs(args)
    vae = AutoencoderKL.from_pretrained(directory).float().eval()
    if len(set(vae.config.size)) > 1:
        raise ValueError(f"{directory}: images of {vae.config.size}: expected square ones")
    with parallel.one_per_machine_first():
        options = {"channels": vae.config.n_channels, "val": args.val, "bad": args.bad_text}
        parts = captions.read(args.data, vae.config.size, args.cache, **options)

    # The texts, and the tokenizer, which may be trained on them.
    length = None
    if args.init_from:
        tokenizer, length = get_tokenizer(str(Path(args.init_from) / pipelines.TOKENIZER)), config.max_seq_len
    elif config.text_tower:
        tokenizer = get_tokenizer(config.text_tower)
        length = TextTower.from_pretrained(config.text_tower).config.max_seq_len
    else:
        tokenizer = captions.choose_tokenizer(args.tokenizer, parts)
    most = length or args.seq_len
    pairs = captions.as_dataset(parts, tokenizer, most, length)
    args.seq_len = pairs.train.tokens.shape[1]
    empty = captions.encode([""], tokenizer, most, args.seq_len)[0][0].astype(np.int64)

    # The latents, their scale, and the error of images that are rebuilt from them.
    made_of = f"{pairs.fingerprint} {safetensors_dir.fingerprint(vae)}"
    name = f"latents-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    train, val = (moments(vae, part.images, args.cache / f"{name}-{i}.npy") for i, part in enumerate(parts))
    scaled = replace(vae.config, scaling_factor=1 / deviation_of(train), shift_factor=0.0)
    error = error_of(vae, parts[1].images, val)
    fields = vars(pairs) | {"guess": f"rebuilt from latents, images have a squared error of {error:.4f}"}
    fields |= {"train": LatentRows(pairs.train, train, empty), "val": LatentRows(pairs.val, val, empty)}
    fields |= {"fingerprint": name, "vae": scaled, "autoencoder": str(directory), "pairs": pairs}
    return LatentDataset(**fields)


def of_glyphs(args: Namespace) -> str:
    """Return the directory of an autoencoder of glyphs, which is trained if there is none yet below --cache.

    Raises ValueError if the data are no glyphs.
    """
    if args.data.partition(":")[0] != "glyphs":
        raise ValueError(f"--data {args.data}: name the directory of an autoencoder, --set autoencoder=DIR")
    what = "an autoencoder learns the images"
    return first_stage.trained(args, "autoencoder_kl", args.data, VAE_STEPS, what, "--set autoencoder=DIR")


@torch.no_grad()
def moments(vae: AutoencoderKL, images: np.ndarray, path: Path) -> np.ndarray:
    """Return the means and standard deviations of the latents of images, float32 (n, 2, Z, h, w).

    images: uint8 (n, C, H, W). The result is memory-mapped from the file at path. One process of each
    machine writes it if it does not exist.
    """
    with parallel.one_per_machine_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replace_file(path) as new:
                shape = (len(images), 2, *vae.config.latent_shape)
                table = np.lib.format.open_memmap(new, "w+", np.float32, shape)
                for start in range(0, len(images), CHUNK):
                    pixels = torch.from_numpy(np.array(images[start : start + CHUNK])).float() / 127.5 - 1
                    mean, log_variance = vae.encode(pixels)
                    table[start : start + CHUNK] = torch.stack((mean, (log_variance / 2).exp()), 1).numpy()
                table.flush()
                del table
    return np.load(path, mmap_mode="r")


def deviation_of(table: np.ndarray) -> float:
    """Return the standard deviation of all numbers of latents, drawn for at most MOST images.

    table: the means and standard deviations of the latents (n, 2, Z, h, w).
    """
    some = torch.from_numpy(table[:: -(-len(table) // MOST)].copy())
    generator = torch.Generator().manual_seed(0)
    return (some[:, 0] + some[:, 1] * torch.randn(some[:, 0].shape, generator=generator)).std().item()


@torch.no_grad()
def error_of(vae: AutoencoderKL, images: np.ndarray, table: np.ndarray) -> float:
    """Return the mean squared error of a pixel in [0, 1] of at most MOST_DRAWN images rebuilt from latents.

    images: uint8 (n, C, H, W). table: (n, 2, Z, h, w), whose means are the latents.
    """
    step = -(-len(images) // MOST_DRAWN)
    means, true = (torch.from_numpy(np.array(some[::step])) for some in (table[:, 0], images))
    rebuilt = torch.cat([vae.decode(some) for some in means.split(CHUNK)]) / 2 + 0.5
    return (rebuilt - true / 255).square().mean().item()


def wrap(model: LatentDiffusion, config: Config) -> LatentDiffusion:
    """Return the model with its autoencoder frozen, and its text tower too if that is a trained CLIP's."""
    model.vae.requires_grad_(False)
    model.text_encoder.requires_grad_(not config.text_tower)
    return model


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """Return "latents" (B, Z, h, w), drawn from their Gaussians and not yet scaled, normal "noise" of the
    same shape, times "t" (B,) of `noise.even_times`, and "tokens" (B, T) of the captions.

    In training rows a share of config.drop of the captions is replaced by the empty text.
    """
    batch, n = stack(rows), len(rows)
    draws = torch.randn(2, *batch["mean"].shape, generator=generator)
    dropped = batch["augment"] & (torch.rand(n, generator=generator) < config.drop)
    return {
        "latents": batch["mean"] + batch["deviation"] * draws[0],
        "noise": draws[1],
        "t": noise.even_times(n, config.n_steps, generator),
        "tokens": torch.where(dropped[:, None], batch["empty"], batch["tokens"]),
    }


def save_tokenizer(dataset: LatentDataset, directory: Path) -> None:
    """Write the tokenizer into its folder of the pipeline in a directory."""
    (directory / pipelines.TOKENIZER).mkdir(parents=True, exist_ok=True)
    dataset.tokenizer.save(directory / pipelines.TOKENIZER)


def show(model: LatentDiffusion, dataset: LatentDataset, out: Path) -> str:
    """Draw images for held-out captions with each guidance, below the true images and those rebuilt from
    their latents. Return the squared errors to the true images, and for glyphs how often a judge recognises
    them."""
    # Choose as many as the judge classifies, or without a judge those of the picture.
    images, opinion = dataset.pairs.val.part.images, judge.of(dataset.pairs)
    n = len(images)
    chosen = list(range(0, n, -(-n // (MOST_DRAWN if opinion else SHOWN))))
    batch = stack([dataset.val[i] for i in chosen])
    true = torch.from_numpy(np.array(images[chosen])).float() / 255
    with torch.no_grad():
        rebuilt = [model.vae.decode(z.to(model.device)).cpu() for z in batch["mean"].split(CHUNK)]
    drawn = {"real": true, "rebuilt": (torch.cat(rebuilt) / 2 + 0.5).clamp(0, 1)}
    for w in GUIDANCE:
        how = {"guidance": w, "steps": SAMPLER_STEPS}
        drawn[f"w = {w:g}"] = model.draw(batch["tokens"], batch["empty"][:1], **how).cpu()

    # The picture, and below it the figures.
    n_shown = min(SHOWN, len(chosen))
    shown = [i * len(chosen) // n_shown for i in range(n_shown)]
    pictures.save(out, [some[shown] for some in drawn.values()], labels=list(drawn))
    lines = [f"picture.png: {', '.join(drawn)}, by {SAMPLER_STEPS} steps of DDIM"]
    lines += [judge.in_words(f"{name:8}", some, true, opinion, chosen) for name, some in drawn.items()]
    return "\n".join(lines)
