"""Image embeddings from texts: the task that trains the prior of DALL-E 2, and the drawing of embeddings.

    loss = mean of (z - f(text states, text embedding, t, z_t))^2

Ramesh et al. 2022, arXiv 2204.06125, section 2.2. z is the CLIP embedding of the image with each entry
shifted and scaled to mean 0 and variance 1; f is vision/prior.py, and the noise in z_t that of
vision/noise.py. CLIP is frozen and not saved with the prior: `--set clip=DIR` names it. If the data are drawn
and no CLIP is named, the run first trains one on the same captions and keeps it below --cache.

A prior is measured by the cosine of a drawn embedding to the true one of a held-out image. Beside it stands
the cosine of the text's own embedding, which is what the decoder (vision/unclip.py) would be given without a
prior.

    python train.py --model prior
    python train.py --model prior --data captions.jsonl --set clip=DIR
    python -m vision.image_embeddings runs/prior/model --clip runs/clip/model        measure it

Shapes: B pairs, E width of embeddings, T tokens of a text.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import captions
from data.augment import Augmentation, augment
from data.rows import Dataset, Row, Rows, stack
from data.tokenizer import Tokenizer, get_tokenizer
from engine import parallel, trainable
from formats import command
from formats.open_model import check_concept
from vision import first_stage, noise, tower_flops
from vision.clip import CLIP, loss_bytes  # noqa: F401  loss_bytes is this task's, too
from vision.prior import SIZES, Config, Prior

MODEL, DATA = "prior", "glyphs"
OPTIMIZER, BATCH_SIZE, STEPS, EMA = "muon", 128, 600, 0.99
LOSS, TOKEN_LOSS = "squared error of whitened embeddings", ""
TIMES = 1000  # T of vision/noise.py, with the cosine schedule
STEPS_TO_DRAW = 25  # of DDIM
CLIP_STEPS = 600  # training steps of the CLIP that a run trains first
LIMIT = 10.0  # of the entries of a drawn z, which are in standard deviations
MOST = 2_000  # at most: training images for mean and standard deviation, and held-out pairs for the figures


class Read(NamedTuple):
    """The output of CLIP's text tower, as the prior reads it."""

    text: Tensor  # embeddings (B, E), times sqrt(E)
    states: Tensor  # of the tokens, (B, T, E)
    lengths: Tensor  # tokens without padding (B,)


class WithCLIP(nn.Module):
    """A prior, and the frozen CLIP whose embeddings it draws."""

    def __init__(self, model: Prior, clip: CLIP):
        super().__init__()
        self.model, self.config = model, model.config
        self.clip = clip.requires_grad_(False)
        self.alpha_bar = noise.schedule("cosine", TIMES)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Read:
        """Return what the prior reads of texts, tokens (B, T): the output of CLIP's text tower."""
        tower = self.clip.text_model
        states, places = tower.states(tokens), tower.places(tokens)
        last = states[torch.arange(len(states), device=states.device), places]
        text = F.normalize(self.clip.text_projection(last).float(), dim=1)
        return Read(text * math.sqrt(text.shape[1]), states, places + 1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, E), of length 1, of images (B, C, H, W) with pixels in [0, 1]."""
        return self.clip.encode_images(self.clip.normalized(images))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of predicted z for "images" (B, C, H, W), with "noise" (B, E) of
        times "t" (B,) and the texts "tokens" (B, T); and the mean cosine of predicted and true embeddings."""
        seen, t = self.embed_images(batch["images"]), batch["t"]
        z = self.model.whitened(seen)
        noisy = noise.q_sample(z, t, batch["noise"], self.alpha_bar)
        found = self.model(noisy, t, *self.read(batch["tokens"])).float()
        cosine = F.cosine_similarity(self.model.unwhitened(found.detach()), seen).mean()
        return (found - z).square().mean(), {"cosine": cosine}

    @torch.no_grad()
    def draw(
        self, tokens: Tensor, empty: Tensor, generator: torch.Generator, *, w: float = 1.0, n: int = 2
    ) -> Tensor:
        """Return image embeddings (B, E), of length 1, drawn for texts, tokens (B, T). For each text n are
        drawn, and the nearest to the text's embedding is kept (section 2.2, with n = 2).

        empty: tokens (1, T) of the empty text. w: the guidance, see `noise.guide`; 1: none.
        """
        B, E = len(tokens), self.config.d_embed
        texts, empties = self.read(tokens.repeat(n, 1)), self.read(empty.expand(n * B, -1))
        denoise = noise.guided(
            lambda z, t: self.model(z, t, *texts), lambda z, t: self.model(z, t, *empties), w
        )
        z = torch.randn(n * B, E, generator=generator).to(tokens.device)
        visited = noise.spaced(TIMES, STEPS_TO_DRAW)
        z = noise.sample(denoise, z, self.alpha_bar, visited, kind="x0", clip=LIMIT)
        drawn = F.normalize(self.model.unwhitened(z), dim=1).view(n, B, E)
        best = (drawn * texts.text[:B]).sum(2).argmax(0)
        return drawn[best, torch.arange(B, device=best.device)]


@dataclass
class PairDataset(Dataset):
    """Images with captions, the directory of a CLIP, and the mean and standard deviation (E,) of its
    embeddings of these images."""

    clip: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class WithEmpty(Rows):
    """Rows of captions, each with the tokens of the empty text as "empty", int64 (T,)."""

    def __init__(self, rows: captions.CaptionRows, empty: np.ndarray):
        super().__init__(rows)
        self.empty = empty

    def __getitem__(self, i: int) -> Row:
        return self.rows[i] | {"empty": self.empty}


def open_clip(directory: str, kernels: str = "auto", *, d_embed: int | None = None) -> CLIP:
    """Return the CLIP in a directory, in float32.

    Raises ValueError for another model, for a SigLIP, for a CLIP whose text states have another width than
    its embeddings, as the prior reads both with one width, and for embeddings that are not d_embed wide
    (default: of any width).
    """
    check_concept(directory, CLIP)
    model = CLIP.from_pretrained(directory, kernels=kernels).float().eval()
    config = model.config
    if config.layout != "clip" or config.text_width != config.d_joint:
        sizes = f"layout {config.layout}, {config.text_width} wide texts, {config.d_joint} wide embeddings"
        raise ValueError(f"{directory}: {sizes}: expected a CLIP with one width of both")
    if d_embed not in (None, config.d_joint):
        widths = f"{config.d_joint} wide embeddings, those of the model are {d_embed} wide"
        raise ValueError(f"{directory}: {widths}; expected the CLIP that it was trained with")
    return model


def open_prior(directory: str, clip: str) -> WithCLIP:
    """Return the prior in a directory with the CLIP in the directory `clip`, in float32. Raises ValueError if
    they do not fit."""
    model = Prior.from_pretrained(directory).float().eval()
    model.config = replace(model.config, clip=clip)
    return wrap(model, model.config)


def of_texts(module: WithCLIP, texts: Sequence[str], *, w: float, seed: int) -> Tensor:
    """Return an image embedding (B, E), of length 1, drawn for each of B texts.

    w: the guidance; 1: none. seed: of the first noise.
    """
    tokenizer, T = get_tokenizer(module.config.clip), module.config.max_seq_len
    tokens, empty = (
        torch.from_numpy(captions.encode(some, tokenizer, T, T)[0]).long() for some in (texts, [""])
    )
    return module.draw(tokens, empty, torch.Generator().manual_seed(seed), w=w)


def load_pairs(args: Namespace, config: Any) -> tuple[str, CLIP, list[captions.Part]]:
    """Return the directory of the CLIP that config.clip names, or else of one that is first trained on these
    captions; this CLIP; and images with captions, to learn from and held out, at the size that it reads.

    Raises ValueError for what `data.captions.read` refuses, and if no CLIP is named and none can be trained.
    """
    if not (config.clip or captions.is_drawn(args.data)):
        raise ValueError(f"--data {args.data}: name the directory of a CLIP, --set clip=DIR")
    what = "a CLIP learns these captions"
    clip = config.clip or first_stage.trained(args, "clip", args.data, CLIP_STEPS, what, "--set clip=DIR")
    model = open_clip(clip)
    with parallel.one_per_machine_first():
        options = {"channels": model.config.n_channels, "val": args.val, "bad": args.bad_text}
        return clip, model, captions.read(args.data, model.config.size, args.cache, **options)


def load_data(args: Namespace, config: Config) -> PairDataset:
    """Return images with captions as the CLIP reads them. args.seq_len is set to the length of the longest
    caption.

    Raises ValueError for what `data.captions.read` refuses, and if no CLIP is named and none can be trained.
    """
    clip, model, parts = load_pairs(args, config)
    own, tokenizer = model.config, get_tokenizer(clip)
    length = config.max_seq_len if args.init_from else None
    most = length or min(args.seq_len, own.max_seq_len)
    found = captions.as_dataset(parts, tokenizer, most, length)
    args.seq_len = found.train.tokens.shape[1]

    # The scale of embeddings, and the cosine between a text's embedding and that of its image.
    module = WithCLIP(Prior(replace(SIZES["tiny"], d_embed=own.d_joint)), model)
    known, held = (embeddings(module, rows) for rows in (found.train, found.val))
    cosine = F.cosine_similarity(held.texts, held.images).mean()
    guess = f"a text's own embedding has a cosine of {cosine:.3f} to its image's"
    std = known.images.std(0, correction=min(1, len(known.images) - 1))  # of one image, 0
    scales = {"mean": known.images.mean(0), "std": std.clamp(min=1e-3)}

    # Put the empty text into each row, since the model has no tokenizer to encode it.
    empty, _ = captions.encode([""], tokenizer, most, args.seq_len)
    found.train, found.val = (WithEmpty(rows, empty[0].astype(np.int64)) for rows in (found.train, found.val))
    scales = {name: tuple(values.tolist()) for name, values in scales.items()}
    return PairDataset(**vars(found) | {"guess": guess}, clip=clip, **scales)


class Embeddings(NamedTuple):
    """Embeddings of the images and of the texts of pairs, both (n, E) and of length 1."""

    images: Tensor
    texts: Tensor


def embeddings(module: WithCLIP, rows: Rows) -> Embeddings:
    """Return the embeddings of evenly spaced rows, at most MOST of them."""
    images, texts = [], []
    for batch in batches(rows, next(module.parameters()).device):
        images.append(module.embed_images(batch["image"].float() / 255))
        texts.append(F.normalize(module.read(batch["tokens"]).text, dim=1))
    return Embeddings(torch.cat(images), torch.cat(texts))


def batches(rows: Rows, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield evenly spaced rows, at most MOST, in batches of 256."""
    chosen = range(0, len(rows), -(-len(rows) // MOST))
    for start in range(0, len(chosen), 256):
        batch = stack([rows[i] for i in chosen[start : start + 256]])
        yield {name: x.to(device) for name, x in batch.items()}


def wrap(model: Prior, config: Config) -> WithCLIP:
    """Return the prior with its CLIP. Raises ValueError if none is named, or one with embeddings of another
    width."""
    directory = model.config.clip
    if not directory:
        raise ValueError("a trained prior reads the CLIP that it was trained with; name it, --set clip=DIR")
    return WithCLIP(model, open_clip(directory, config.kernels, d_embed=model.config.d_embed))


def unwrap(module: WithCLIP) -> Prior:
    """Return the prior."""
    return module.model


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """Return "images" (B, C, H, W), augmented, with pixels in [0, 1], "tokens" (B, T) of the captions, of
    which a share of config.drop is replaced by the empty text in training rows, normal "noise" (B, E), and
    times "t" (B,) of `noise.even_times`."""
    batch, n = stack(rows), len(rows)
    pixels = augment(batch["image"].float() / 255, batch["augment"], Augmentation(config.warp), generator)
    dropped = batch["augment"] & (torch.rand(n, generator=generator) < config.drop)
    tokens = torch.where(dropped[:, None], batch["empty"], batch["tokens"])
    t = noise.even_times(n, TIMES, generator)
    eps = torch.randn(n, config.d_embed, generator=generator)
    return {"images": pixels, "tokens": tokens, "noise": eps, "t": t}


def save(module: WithCLIP, dataset: Dataset, directory: Path) -> None:
    """Write the prior into a directory, without the CLIP."""
    module.model.save_pretrained(directory)


def flops_per_token(module: WithCLIP, config: Config, seq_len: int) -> int:
    """Return the FLOPs of training on one pair: the prior forward and backward, and both towers of CLIP
    forward only."""
    own = module.clip.config
    towers = tower_flops.n_macs(own.vision) + tower_flops.n_macs(own.text, config.max_seq_len)
    # The engine subtracts the gradients of frozen matrices, so those of CLIP are added here.
    return module.model.flops_per_token() + 2 * towers + trainable.frozen_flops(module.clip)


@torch.no_grad()
def figures(module: WithCLIP, rows: Rows, guidance: tuple[float, ...] = (1.0, 2.0)) -> str:
    """Return a table for held-out pairs. Its rows are the text's own embedding, embeddings that were drawn
    with each guidance, and those drawn for another text. Its columns are the mean cosine to the embedding of
    the true image, and how often the true image is the nearest of all."""
    true = embeddings(module, rows)
    ways = {"the text's embedding": true.texts}
    for w in guidance:
        generator, device = torch.Generator().manual_seed(0), true.images.device
        drawn = [module.draw(b["tokens"], b["empty"][:1], generator, w=w) for b in batches(rows, device)]
        ways[f"drawn, w = {w:g}"] = torch.cat(drawn)
    ways["drawn for another"] = ways[f"drawn, w = {guidance[0]:g}"].roll(1, 0)
    lines = [f"{len(true.images)} held-out pairs      cosine  nearest image is its own"]
    own = torch.arange(len(true.images), device=true.images.device)
    for name, found in ways.items():
        cosine = (found * true.images).sum(1).mean().item()
        right = ((found @ true.images.T).argmax(1) == own).float().mean().item()
        lines.append(f"{name:24} {cosine:6.3f}  {right:6.1%}")
    return "\n".join(lines)


def show(module: WithCLIP, dataset: Dataset, out: Path) -> str:
    """Return the table of `figures` for the held-out pairs; no picture is drawn."""
    return figures(module, dataset.val)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Measure a prior on held-out pairs.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a prior")
    add("--clip", type=command.filled, metavar="DIR", help="the CLIP that the prior was trained with")
    add("--data", default=DATA, help="images with captions, as for train.py --data (default %(default)s)")
    add("--cache", type=command.path, default=Path("cache"), help="folder for pixels (default %(default)s)")
    args = parser.parse_args(argv)
    if args.clip is None:
        raise ValueError(f"{args.checkpoint}: name the CLIP that it was trained with, --clip DIR")
    module = open_prior(args.checkpoint, args.clip)
    names = {"data": args.data, "val": None, "bad_text": "refuse", "cache": args.cache}
    options = Namespace(**names, init_from=args.checkpoint, seq_len=module.config.max_seq_len)
    dataset = load_data(options, module.config)
    print(dataset.guess, figures(module, dataset.val), sep="\n")


if __name__ == "__main__":
    command.run(main)
