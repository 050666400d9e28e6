"""Colorization: given a picture in grey, predict its colours, as a distribution over them at each place.

    target   t_q = softmax over the 10 nearest bins q of -|ab - q|^2 / (2 * 5^2)        soft-encoded colour
    loss     -mean over places of w(nearest bin) sum over q of t_q log p_q
    colour   sum over q of q softmax(log p / T)_q                                       annealed mean

Colorful image colorization (Zhang et al. 2016, arXiv 1603.08511). In Lab (data/lab.py) the colour of a pixel
is its lightness L, the input here, and two numbers a and b, which are predicted. So any picture in colour is
its own label. The plane of a and b is divided into bins, squares of 10 x 10, of which those are used that
colours of the data fall into; q is the centre of a bin, and p_q the probability that is predicted for it.

A model that predicts a and b themselves, trained by squared error (`objective="l2"`), gives dull colours
where several are possible: of a ball that may be red or blue the best answer is the mean, a violet that no
ball has. A distribution over bins can hold both colours, and its mode, or its mean at a low temperature T, is
near one of them (section 2.1). Most places have dull colours, such as those of walls and skies, so rare
colours get a larger weight (section 2.2):

    w(q) = c / ((1 - rebalance) p(q) + rebalance / Q)

where p(q) are the frequencies of the bins in training, smoothed, and c makes the mean of w in training 1. The
network is a small one of convolutions. It predicts the colour of every second pixel of every second line.

    python train.py --model colorize                              landscapes with a ball of one of two colours
    python train.py --model colorize --set objective=l2 --out runs/grey       what squared error makes of it
    python -m vision.colorize runs/colorize/model photo.png

Shapes: B batch, H x W pixels, h x w = H / 2 x W / 2 places, D channels of the layers, Q bins.
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import landscapes
from data.images import decode_all
from data.lab import lab_to_rgb, rgb_to_lab
from data.rows import Dataset, Row, Rows, stack
from engine import pictures
from engine.report import PICTURE
from formats import command, native
from formats.config_values import check_values
from vision import drawing
from vision.classify_images import load_images

KIND, DATA = "colorizer", "landscapes"
OPTIMIZER, BATCH_SIZE, STEPS = "adamw", 32, 600
LOSS, TOKEN_LOSS = "weighted nats per place", ""
GRID = 10.0  # side of a bin
SIGMA, NEAREST = 5.0, 10  # standard deviation and bins of the soft encoding, from the authors' code
RANGE, MIDDLE = 110.0, 50.0  # a and b are divided by the first, the second is subtracted from L
IN_COLOUR = 5.0  # a picture without |a| or |b| above this is grey
STRIDE = 2  # pixels from one place to the next, both ways
SAMPLE = 1_000  # at most: pictures from which bins and baselines are computed
SHOWN = 12  # columns of the picture


@dataclass(frozen=True)
class Config:
    width: int = 48  # D
    dilations: tuple[int, ...] = (1, 2, 4)  # of the 3 x 3 convolutions after the first two
    image_size: int | tuple[int, ...] = 32  # pixels of the data, both ways, or (height, width)
    objective: str = "classes"  # or "l2": predict a and b themselves
    rebalance: float = 0.5  # the paper's lambda; 1: equal weights, 0: weights by the inverse frequency
    temperature: float = 0.38  # T of the annealed mean; 0: the mode, 1: the mean
    bins: tuple[tuple[float, ...], ...] = ()  # their centres (a, b); `fit` sets them
    frequencies: tuple[float, ...] = ()  # of the bins in training; `fit` sets them
    MAY_BE_ZERO = ("rebalance", "temperature")

    def __post_init__(self):
        check_values(self, objective=("classes", "l2"))
        if self.rebalance > 1:
            raise ValueError(f"rebalance {self.rebalance}: expected 0 to 1")
        if min(self.dilations, default=1) < 1:
            raise ValueError(f"dilations {self.dilations}: expected numbers of at least 1")
        if any(side % STRIDE for side in self.size):
            raise ValueError(f"image_size {self.image_size}: expected multiples of {STRIDE}")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of a picture in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def n_channels(self) -> int:
        """Return 3, since pictures in colour are learned from."""
        return 3

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one picture."""
        return 1


SIZES = {"tiny": Config(), "small": Config(width=128, dilations=(1, 1, 2, 2, 4, 4), image_size=64)}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the bins that this data's colours fall into, and their frequencies."""
    ab = sample(dataset.train)[:, 1:].movedim(1, 3).reshape(-1, 2)
    centres, counts = (ab / GRID).round().unique(dim=0, return_counts=True)
    bins = tuple(tuple(centre) for centre in (centres * GRID).tolist())
    return replace(config, bins=bins, frequencies=tuple((counts / counts.sum()).tolist()))


def sample(rows: Rows) -> Tensor:
    """Return pictures in Lab at the places that are predicted, (n, 3, h, w), of all rows or of at most
    SAMPLE evenly spaced ones."""
    step = -(-len(rows) // SAMPLE)
    images = stack([rows[i] for i in range(0, len(rows), step)])["image"].float() / 255
    return rgb_to_lab(images[..., ::STRIDE, ::STRIDE])


def class_weights(frequencies: Tensor, centres: Tensor, rebalance: float) -> Tensor:
    """Return w (Q,) of bins with these frequencies (Q,) and centres (Q, 2), see the header."""
    near = torch.exp(-torch.cdist(centres, centres).square() / (2 * SIGMA**2))  # (Q, Q)
    smooth = (near / near.sum(0)) @ frequencies  # each bin's share is spread over its neighbours
    w = 1 / ((1 - rebalance) * smooth + rebalance / max(1, len(frequencies)))
    return w / (w * frequencies).sum()


class Model(nn.Module):
    """Convolutions that read the lightness and predict logits of bins, or a and b."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D, Q = config, config.width, len(config.bins)
        layers = [nn.Conv2d(1, D // 2, 3, padding=1), nn.Conv2d(D // 2, D, 3, stride=STRIDE, padding=1)]
        layers += [nn.Conv2d(D, D, 3, padding=d, dilation=d) for d in config.dilations]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(D, 2 if config.objective == "l2" else Q, 1)
        centres, frequencies = torch.tensor(config.bins).view(Q, 2), torch.tensor(config.frequencies)
        self.register_buffer("centres", centres, persistent=False)
        weights = class_weights(frequencies, centres, config.rebalance)
        self.register_buffer("weights", weights, persistent=False)
        # Weights as in He et al. 2015, since each ReLU halves the variance. The head is 0, so that a new
        # model predicts equal logits, or grey.
        for name, p in self.named_parameters():
            if name.startswith("head.") or name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.kaiming_normal_(p, nonlinearity="relu")

    def forward(self, lightness: Tensor) -> Tensor:
        """Return the logits (B, Q, h, w), or with objective l2 a and b divided by 110 (B, 2, h, w), for L
        (B, 1, H, W) from 0 to 100."""
        x = (lightness - MIDDLE) / 100
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)

    def soft_targets(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Return t of the header (n, Q) for colours (n, 2), and the nearest bin (n,) of each."""
        square = torch.cdist(ab, self.centres).square()  # (n, Q)
        near, which = square.topk(min(NEAREST, square.shape[1]), largest=False)
        shares = torch.softmax(-near / (2 * SIGMA**2), dim=1)
        return torch.zeros_like(square).scatter(1, which, shares), which[:, 0]

    def colours(self, output: Tensor, temperature: float | None = None) -> Tensor:
        """Return a and b (B, 2, h, w) for what `forward` returns: the annealed mean at a temperature, by
        default the config's, or at 0 the mode. With objective l2 the temperature is not used."""
        if self.config.objective == "l2":
            return output * RANGE
        T = self.config.temperature if temperature is None else temperature
        if T == 0:
            return self.centres[output.argmax(1)].movedim(3, 1)
        shares = torch.softmax(output.float() / T, dim=1)
        return (shares[:, :, None] * self.centres[:, :, None, None]).sum(1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the header's loss of "images" (B, 3, H, W), sRGB in [0, 1], or with objective l2 the mean
        squared error of a and b divided by 110; and "distance", the mean distance of the colours that
        `colours` returns from the true ones, in the plane of a and b."""
        lab = rgb_to_lab(batch["images"])
        ab = lab[:, 1:, ::STRIDE, ::STRIDE]  # (B, 2, h, w)
        output = self(lab[:, :1]).float()
        metrics = {"distance": (self.colours(output.detach()) - ab).norm(dim=1).mean()}
        if self.config.objective == "l2":
            return (output - ab / RANGE).square().mean(), metrics
        logits = output.movedim(1, 3).flatten(0, 2)  # (n, Q), n = B h w
        targets, nearest = self.soft_targets(ab.movedim(1, 3).flatten(0, 2))
        nats = F.cross_entropy(logits, targets, reduction="none")
        return (self.weights[nearest] * nats).mean(), metrics

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of convolutions, forward and backward, for one picture. seq_len is not used."""
        height, width = self.config.size
        n_places = height * width // STRIDE**2
        macs = self.layers[0].weight.numel() * height * width
        macs += sum(layer.weight.numel() for layer in (*self.layers[1:], self.head)) * n_places
        return 6 * macs

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save


@dataclass
class ColourDataset(Dataset):
    """Pictures in colour, and whether they are those of data/landscapes.py, each of which has a ball."""

    has_balls: bool = False


class InColour(Rows):
    """Rows of images without those that are grey."""

    def __init__(self, images: Rows):
        kept = [i for i in range(len(images)) if is_in_colour(images[i]["image"])]
        super().__init__(kept)
        self.images = images

    def __getitem__(self, i: int) -> Row:
        return self.images[self.rows[i % len(self.rows)]]


def is_in_colour(image) -> bool:
    """Return whether an image, uint8 (3, H, W), has a place with |a| or |b| above IN_COLOUR."""
    return bool(rgb_to_lab(torch.from_numpy(image)[None] / 255)[:, 1:].abs().max() > IN_COLOUR)


def load_data(args: Namespace, config: Config) -> ColourDataset:
    """Return images in colour without their classes, with a line about how far trivial guesses are from
    their colours.

    Raises ValueError if no image is in colour, and for what `data.images.prepare` refuses.
    """
    found = load_images(args, config)
    if len(found.train[0]["image"]) != 3:
        raise ValueError(f"--data {args.data}: images in grey; expected colours, such as --data landscapes")
    train, val = InColour(found.train), InColour(found.val)
    if not (len(train) and len(val)):
        raise ValueError(f"--data {args.data}: no image in colour to learn from, or held out")
    n_grey = len(found.train) + len(found.val) - len(train) - len(val)
    summary = found.summary + f", without {n_grey:,} in grey" * (n_grey > 0)

    grey, by_lightness = baselines(sample(train), sample(val))
    guess = f"grey is {grey:.1f} from held-out colours, the mean colour of each lightness {by_lightness:.1f}"
    fields = vars(found) | {"train": train, "val": val, "labels": (), "summary": summary, "guess": guess}
    return ColourDataset(**fields, has_balls=args.data == "landscapes")


def baselines(known: Tensor, held: Tensor) -> tuple[float, float]:
    """Return how far two guesses are from the colours of held-out pictures, in the mean: grey, and the mean
    colour of the training pictures at this lightness.

    known, held: training and held-out pictures in Lab, (n, 3, h, w). Lightness is rounded to steps of 2.
    """
    steps = [(lab[:, 0].flatten() / 2).long().clamp(0, 49) for lab in (known, held)]
    colours = [lab[:, 1:].movedim(1, 3).reshape(-1, 2) for lab in (known, held)]
    sums = torch.zeros(50, 2).index_add_(0, steps[0], colours[0])
    means = sums / steps[0].bincount(minlength=50).clamp(min=1)[:, None]
    errors = colours[1], colours[1] - means[steps[1]]
    return tuple(error.norm(dim=1).mean().item() for error in errors)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "images" (B, 3, H, W), sRGB in [0, 1]. Those to learn from are mirrored with probability 1/2."""
    batch = stack(rows)
    images = batch["image"].float() / 255
    mirrored = batch["augment"] & (torch.rand(len(rows), generator=generator) < 0.5)
    return {"images": torch.where(mirrored[:, None, None, None], images.flip(3), images)}


class Answer(NamedTuple):
    """Predicted colours of balls, by two means over their places."""

    chroma: float  # distance from grey
    distance: float  # from the nearer of the two colours that a ball may have


def on_balls(ab: Tensor, true: Tensor) -> Answer | None:
    """Return the Answer of predicted colours ab (B, 2, h, w) at the places where the true colours
    (B, 2, h, w) are those of a ball of data/landscapes.py, or None if there are no such places."""
    balls = torch.tensor(list(landscapes.BALLS.values()), device=ab.device)[:, 1:].float()
    where = torch.cdist(true.movedim(1, 3).flatten(0, 2), balls).amin(1) < 5
    if not where.any():
        return None
    colours = ab.float().movedim(1, 3).flatten(0, 2)[where]
    return Answer(colours.norm(dim=1).mean().item(), torch.cdist(colours, balls).amin(1).mean().item())


def painted(lightness: Tensor, ab: Tensor) -> Tensor:
    """Return images (B, 3, H, W), sRGB in [0, 1], of L (B, 1, H, W) and of a and b (B, 2, h, w), which are
    enlarged bilinearly."""
    ab = F.interpolate(ab, size=lightness.shape[2:], mode="bilinear", align_corners=False)
    return lab_to_rgb(torch.cat((lightness, ab), dim=1)).clamp(0, 1)


def coloured(model: Model, lightness: Tensor) -> dict[str, Tensor]:
    """Return the colours (B, 2, h, w) that a model predicts for L (B, 1, H, W), by their name: with classes
    the mean, the annealed mean and the mode."""
    output, T = model(lightness), model.config.temperature
    if model.config.objective == "l2":
        return {"squared error": model.colours(output)}
    ways = {"mean": 1.0, f"annealed mean ({T})": T, "mode": 0.0}
    return {name: model.colours(output, temperature) for name, temperature in ways.items()}


@torch.no_grad()
def rows_of_pictures(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Return images (B, 3, H, W), sRGB in [0, 1], by their name: in grey, as the model colours them, and as
    they are."""
    lightness = rgb_to_lab(images)[:, :1]
    grey = {"grey": torch.zeros_like(images[:, :2])}
    found = {name: painted(lightness, ab) for name, ab in (grey | coloured(model, lightness)).items()}
    return found | {"true": images}


@torch.no_grad()
def show(model: Model, dataset: ColourDataset, out: Path) -> str:
    """Draw some held-out pictures, evenly spaced: in grey, coloured, and as they are. Of landscapes, return
    which colours the balls of up to 200 get."""
    device = next(model.parameters()).device
    drawn = rows_of_pictures(model, drawing.some(dataset.val, SHOWN).to(device))
    pictures.save(out, list(drawn.values()), labels=list(drawn))
    lines = [f"picture.png: {', '.join(drawn)}"]
    if not dataset.has_balls:
        return lines[0]

    batch = stack([dataset.val[i] for i in range(min(200, len(dataset.val)))])["image"].to(device) / 255
    lab = rgb_to_lab(batch)
    true = lab[:, 1:, ::STRIDE, ::STRIDE]
    colours = {f"by the {name}": ab for name, ab in coloured(model, lab[:, :1]).items()}
    for name, ab in (colours | {"as they are": true}).items():
        if answer := on_balls(ab, true):
            distance = f"{answer.distance:.1f} from the nearer colour"
            lines.append(f"balls {name}: {answer.chroma:.1f} from grey, {distance}")
    return "\n".join(lines)


def main() -> None:
    parser = command.Parser(description="Colour images.")
    add = parser.add_argument
    add("checkpoint", type=command.filled, help="directory of a model")
    add("images", nargs="+", type=command.path, help="files of images")
    add("--out", type=command.path, default=Path(), help="folder for picture.png (default: the current one)")
    args = parser.parse_args()
    model = Model.from_pretrained(args.checkpoint).eval().float()
    shape = (3, *model.config.size)
    images = torch.from_numpy(decode_all(args.images, shape))
    drawn = rows_of_pictures(model, images.float() / 255)
    pictures.save(args.out, list(drawn.values()), labels=list(drawn))
    print(f"{args.out / PICTURE}: {', '.join(drawn)}")


if __name__ == "__main__":
    command.run(main)
