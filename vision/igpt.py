"""iGPT: an image as a text of pixels, each predicted from those above it and to its left.

    p(x) = prod_i p(x_i | x_1 ... x_{i-1})        x_i: the colour of pixel i, line by line, one of a palette
    loss = -mean_i log p(x_i | x_<i)              in nats per pixel

Image GPT (Chen et al. 2020, Generative Pretraining from Pixels). The model is that of gpt.py, and nothing in
it is made for images: the learned positions have to find out that a pixel is next to the one above it.
Colours take the place of words. k-means finds 512 of them (section 2.1), which stand for the 16.7 million
colours of 24 bits. A start vector is in front of the first pixel; the head has a row for each colour, none
for the start.

It differs from gpt.py in two details of the authors' code: the norm subtracts no mean and has no bias, which
is RMSNorm; and GELU is x sigmoid(1.702 x).

To predict a pixel, the layers must gather what the image shows. So the means of a layer's hidden states over
all pixels are features of the image. The best are those of a layer in the middle: the last layers prepare the
next pixel (section 4.1, figure 2). `python -m evaluation.probe` measures the features of the layer in the
middle, `--probe` here those of every layer.

    python -m vision.igpt                                           print the sizes
    python train.py --model igpt                                    train one to write letters
    python -m vision.igpt runs/igpt/model                           write images: picture.png
    python -m vision.igpt runs/igpt/model a.png                     complete the lower half of images
    python -m vision.igpt runs/igpt/model --probe glyphs:fonts      classify by the features of each layer

Shapes: B batch, C channels, N pixels, Q colours of the palette, D model width, L layers.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from data.augment import Augmentation, augment
from data.baselines import logistic_regression
from data.images import decode_all, prepare
from data.palette import encode, k_means, paint
from data.rows import Dataset, Row, Rows, stack
from engine import activations, pictures
from engine.activations import Precision
from engine.report import PICTURE
from formats import command, image_decoders
from generate import print_sizes, read_prompts, sample
from vision.classify_images import load_images

KIND, DATA = "decoder of images", "glyphs:dejavu"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 32, 600
LOSS, TOKEN_LOSS = "nats per pixel", ""
SHOWN = 12  # images of the picture, in a row
MOST_PIXELS = 200_000  # of these images, for the palette
MOST = 2_000  # images of each part that colours are counted on, and of which the palette is made


@dataclass(frozen=True)
class Config(gpt.Config):
    """gpt.py's Config with the values that make it an iGPT, and what an image is."""

    vocab_size: int = 513  # Q + 1, the start included
    norm: str = "rms"
    norm_eps: float = 1e-5
    positions: str = "learned"
    mlp: str = "gelu"
    bias: bool = True  # the authors have none; Hugging Face's class has them, and zeros there
    tie_embeddings: bool = False
    image_size: tuple[int, ...] = (32, 32)  # height and width in pixels
    n_channels: int = 3
    palette: tuple[tuple[float, ...], ...] = ()  # Q colours, each of C numbers from -1 to 1

    def __post_init__(self):
        super().__post_init__()
        fixed = {"norm": "rms", "positions": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": False}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} {getattr(self, name)}: expected {value}, as every iGPT has it")
        if len(self.image_size) != 2 or math.prod(self.image_size) != self.max_seq_len:
            size = f"image_size {self.image_size} with max_seq_len {self.max_seq_len}"
            raise ValueError(f"{size}: expected height and width, whose product is the other")
        if self.palette and (len(self.palette), len(self.palette[0])) != (self.start, self.n_channels):
            raise ValueError(
                f"palette of {len(self.palette)} colours of {len(self.palette[0])} channels: expected "
                f"{self.start} of {self.n_channels}"
            )

    @property
    def start(self) -> int:
        """Return the id that stands in front of the first pixel, which is Q."""
        return self.vocab_size - 1

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.image_size

    @property
    def n_matmul_params(self) -> int:
        """Return `gpt.Config`'s number, without a row of the head for the start."""
        return super().n_matmul_params - self.d_model


SIZES = {
    "tiny": Config(4, 4, 96, 384, 9, 144, image_size=(12, 12), n_channels=1),
    "s": Config(24, 8, 512, 2048),  # table 1 of the paper, and its S
    "m": Config(36, 8, 1024, 4096),
    "l": Config(48, 16, 1536, 6144),
    "xl": Config(60, 64, 3072, 12288),
}


# --- the model


class MLP(nn.Module):
    """down(u sigmoid(1.702 u)) with u = up(x): an approximation of GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        u = self.up_proj(x)
        return self.down_proj(u * torch.sigmoid(1.702 * u))


class Block(gpt.Block):
    """A layer of gpt.py with the authors' form of GELU."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.mlp = MLP(config)


class ImageGPT(gpt.GPT):
    """The decoder of gpt.py, on colours."""

    block = Block

    def __init__(self, config: Config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.start, bias=False)
        nn.init.zeros_(self.lm_head.weight)  # as the authors do: a new model finds all colours equally likely

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, height, width) with pixels in [0, 1] as the model reads them: ids (B, N)."""
        return encode(images, self.config.palette)

    def features_by_layer(self, ids: Tensor) -> list[Tensor]:
        """Return the mean hidden states (B, D) over the pixels with ids (B, N): of the embeddings, and after
        each of the L layers."""
        x = self.model.embed_tokens(inputs_of(ids, self.config.start)) + self.model.embed_positions.weight
        found = [x.mean(dim=1)]
        for block in self.model.layers:
            x = block(x, None, None, None)
            found.append(x.mean(dim=1))
        return found

    def features(self, ids: Tensor) -> Tensor:
        """Return the features (B, D) after the layer in the middle."""
        return self.features_by_layer(ids)[(self.config.n_layers + 1) // 2]

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "ImageGPT":
        """Return the ImageGPTForCausalImageModeling in a directory, in its precision.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return image_decoders.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an ImageGPTForCausalImageModeling with its palette."""
        image_decoders.save(self, directory)


Model = ImageGPT


def mlp_bytes(block: nn.Module, config: Config, precision: Precision) -> tuple[int, int]:
    """Return the bytes per token that the MLP keeps for backward, and those of gradients that exist at once.

    Kept are its input, u, the sigmoid and the product of the two; see `engine.activations.mlp_bytes`.
    """
    D, F, e = config.d_model, config.d_ff, precision.e
    return (D + 3 * F) * e, 3 * F * e


def inputs_of(ids: Tensor, start: int) -> Tensor:
    """Return the ids (B, N) that are read to predict ids (B, N): the start, then all of them but the last."""
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1)


@torch.inference_mode()
def complete(model: ImageGPT, given: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return ids (B, N) that begin with those given (B, n), n >= 0; the model draws the others."""
    config = model.config
    first = torch.full((len(given), 1), config.start, device=given.device)
    n_new, drawn = config.max_seq_len - given.shape[1], [given]
    if not n_new:
        return given
    hidden, cache = read_prompts(model, torch.cat((first, given), dim=1).tolist(), n_new, static=False)
    for i in range(n_new):
        drawn.append(sample(model.logits(hidden).float(), temperature, generator=generator))
        if i + 1 < n_new:
            hidden = model.hidden(drawn[-1], cache=cache)[:, 0]
    return torch.cat(drawn, dim=1)


# --- the task


class Palette(NamedTuple):
    """The colours of the ids, in the place of a tokenizer. The model saves them."""

    colours: tuple[tuple[float, ...], ...]

    @property
    def n_vocab(self) -> int:
        return len(self.colours) + 1


@dataclass(frozen=True)
class Settings(Augmentation):
    """Other views of images to learn from: by default none, since a warped edge has colours of its own."""

    warp: float = 0.0


def settings(config: Config) -> Settings:
    """Return the settings of the augmentation."""
    return Settings()


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images without their classes, the palette, and how well counts of colours predict pixels.

    Raises ValueError for what `data.images.prepare` refuses, and for images with too few colours.
    """
    if args.seq_len != config.max_seq_len:
        raise ValueError(f"--seq-len {args.seq_len}: an image has {config.max_seq_len} pixels; leave it out")
    dataset = load_images(args, config)

    # The palette is that of a trained model, or made of pixels of evenly spaced images to learn from.
    if config.palette:
        palette = Palette(config.palette)
    else:
        rows = dataset.train
        some = stack([rows[i] for i in range(0, len(rows), -(-len(rows) // MOST))])["image"].float() / 255
        pixels = 2 * some.flatten(2).transpose(1, 2).flatten(0, 1) - 1  # (M, C)
        pixels = pixels[:: -(-len(pixels) // MOST_PIXELS)]
        try:
            colours = k_means(pixels, config.start)
        except ValueError as error:
            raise ValueError(f"--data {args.data}: {error}, the palette; choose another --size") from None
        palette = Palette(tuple(map(tuple, colours.tolist())))
    guess = describe(dataset.train, dataset.val, palette)
    return replace(dataset, tokenizer=palette, unit="pixels", labels=(), guess=guess)


def describe(train: Rows, held: Rows, palette: Palette) -> str:
    """Return one line: the loss on held-out images of guesses that read no other pixel."""
    ids = []
    for rows in (train, held):
        some = [rows[i] for i in range(0, len(rows), -(-len(rows) // MOST))]
        ids.append(encode(stack(some)["image"].float() / 255, palette.colours))
    Q = len(palette.colours)

    def loss(counts: Tensor) -> float:
        """Return the mean nats of held-out pixels by counts (N or 1, Q) of the colours at a place."""
        log_p = ((counts + 1) / (counts + 1).sum(1, keepdim=True)).log().expand(ids[1].shape[1], -1)
        return -log_p.T.gather(0, ids[1]).mean().item()

    at_place = F.one_hot(ids[0], Q).sum(0).double()  # (N, Q)
    everywhere = at_place.sum(0, keepdim=True)
    return (
        f"on held-out images, {Q} colours alike have a loss of {math.log(Q):.3f} nats per pixel, as often as "
        f"they occur {loss(everywhere):.3f}, as often as at each place {loss(at_place):.3f}"
    )


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for images of this size, and their palette."""
    C, height, width = dataset.train[0]["image"].shape
    sizes = {"image_size": (height, width), "max_seq_len": height * width, "n_channels": C}
    palette = dataset.tokenizer
    return replace(config, **sizes, vocab_size=palette.n_vocab, palette=palette.colours)


def save_tokenizer(dataset: Dataset, directory: Path) -> None:
    """Write nothing: the palette is part of the model."""


def make_batch(
    rows: list[Row], config: Settings, generator: torch.Generator, palette: Palette
) -> dict[str, Tensor]:
    """Return "tokens" (B, N), the start and all pixels but the last, and "targets" (B, N), all pixels."""
    batch = stack(rows)
    images = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    ids = encode(images, palette.colours)
    return {"tokens": inputs_of(ids, len(palette.colours)), "targets": ids}


def loss_bytes(
    model: ImageGPT, config: Settings, n: int, seq_len: int, precision: Precision
) -> dict[str, int]:
    """Return the memory of a decoder's loss; the head shares nothing with the embeddings."""
    return activations.loss_bytes(model, config, n, seq_len, precision) | {"tied": 0}


def examples(model: ImageGPT, images: Tensor, out: Path, seed: int = 0) -> None:
    """Write a picture of four rows: images (B, C, height, width) in the colours of the palette, their upper
    half, its completion, and as many images that are drawn from nothing."""
    config, generator = model.config, torch.Generator(images.device).manual_seed(seed)
    ids, of_images = encode(images, config.palette), (config.palette, config.image_size)
    height, width = config.image_size
    upper = ids[:, : height // 2 * width]
    completed = paint(complete(model, upper, 1.0, generator), *of_images)
    new = paint(complete(model, ids[:, :0], 1.0, generator), *of_images)
    given = paint(ids, *of_images)
    masked = given.clone()
    masked[:, :, height // 2 :] = 0.5
    labels = ("original", "upper half", "completed", "new")
    pictures.save(out, (given, masked, completed, new), labels=labels)


def show(model: ImageGPT, dataset: Dataset, out: Path) -> str:
    """Draw some held-out images, evenly spaced, their completion, and images from nothing."""
    n = min(SHOWN, len(dataset.val))
    rows = [dataset.val[i * len(dataset.val) // n] for i in range(n)]
    images = stack(rows)["image"].float() / 255
    examples(model, images.to(model.model.norm.weight.device), out)
    return "picture.png: held-out images, their upper half, completed by draws; images drawn from nothing"


# --- the command


@torch.no_grad()
def probe(model: ImageGPT, dataset: Dataset) -> list[float]:
    """Return how often logistic regression on the features of each layer is right on held-out images."""
    parts, labels = [], []
    for rows in (dataset.train, dataset.val):
        batches = [
            [rows[i] for i in range(start, min(start + 200, len(rows)))] for start in range(0, len(rows), 200)
        ]
        images = [stack(batch)["image"].float() / 255 for batch in batches]
        by_layer = [model.features_by_layer(model.normalized(x)) for x in images]
        parts.append([torch.cat(layer) for layer in zip(*by_layer, strict=True)])
        labels.append(torch.tensor([int(row["label"]) for batch in batches for row in batch]))
    found = []
    for train, held in zip(*parts, strict=True):
        predicted = logistic_regression(train, labels[0], held)
        found.append((predicted == labels[1]).float().mean().item())
    return found


def main() -> None:
    parser = command.Parser(description="Write or complete images, measure features, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("images", nargs="*", type=command.path, help="files of images, to complete (default: glyphs)")
    add("--probe", metavar="DATA", help="images as for --data, to classify by the features of each layer")
    add("--cache", type=command.path, default=Path("cache"), help="folder for pixels (default %(default)s)")
    add("--seed", type=int, default=0, help="start of the random draws (default %(default)s)")
    add("--out", type=command.path, default=Path(), help="folder for picture.png (default: the current one)")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes(ImageGPT, SIZES)
        return
    model = ImageGPT.from_pretrained(args.checkpoint).eval().float()
    config = model.config
    if args.probe:
        dataset = prepare(args.probe, config.size, args.cache, channels=config.n_channels)
        if len(dataset.labels) < 2:
            raise ValueError(f"--probe {args.probe}: no classes; expected a folder for each class")
        print(dataset.summary)
        for layer, right in enumerate(probe(model, dataset)):
            print(
                f"{'embeddings' if layer == 0 else f'layer {layer}':10} {right:6.1%} right on held-out images"
            )
        return

    # Complete the images, or held-out letters.
    shape = (config.n_channels, *config.size)
    if args.images:
        images = decode_all(args.images, shape)
    else:
        val = prepare("glyphs", config.size, args.cache, channels=config.n_channels).val
        images = np.stack([val[i * len(val) // SHOWN]["image"] for i in range(SHOWN)])
    examples(model, torch.from_numpy(images).float() / 255, args.out, args.seed)
    print(f"{args.out / PICTURE}: images, their upper half, completed by draws; images drawn from nothing")


if __name__ == "__main__":
    command.run(main)
