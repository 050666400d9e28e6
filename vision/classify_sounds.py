"""Classify sounds: the task that trains an AST to name what it hears.

    loss = -mean over sounds of log p(label | another take of the sound)

A sound to learn from is changed each time it is read: its loudness, and as in SpecAugment (Park et al. 2019)
a band of mels and a stretch of time are set to 0. Held-out sounds are read as they are. By default they are
chords that the instrument was never heard to play (data/notes.py). Beside the accuracy stand those of
classifiers without a network, and a picture shows what the model hears.

The filter bank is computed where batches are made, by the thread that prepares the next one.

    python train.py --model spectrogram                                     instruments
    python train.py --model spectrogram --data clips --set n_frames=498     a folder for each class, 5 s

Shapes: B batch, S samples, M mels.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.baselines import logistic_regression, nearest_neighbour
from data.rows import Dataset, Row, Rows, stack
from data.sounds import prepare
from engine import parallel
from engine.activations import Precision
from formats.config_values import check_values
from vision import spectrogram
from vision.classify_images import (  # noqa: F401  this task's, too
    check_pretrained,
    save,
    show_labels,
)

MODEL, DATA = "spectrogram", "notes"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 64, 600
LOSS, TOKEN_LOSS = "nats per sound", ""
SHOWN = (4, 6)  # rows and columns of the picture
MOST = 4_000, 1_000  # sounds to learn from and held out that baselines use
PART = 100  # sounds whose spectrograms are computed at once


@dataclass(frozen=True)
class Config:
    """Settings: what the model reads, and the largest changes of a sound."""

    model: spectrogram.Config
    frequency_mask: int  # mels
    time_mask: int  # frames
    gain: float = 6.0  # decibels, louder or less loud
    MAY_BE_ZERO = ("frequency_mask", "time_mask", "gain")

    def __post_init__(self):
        check_values(self, model=(self.model,))
        if self.frequency_mask > self.model.n_mels or self.time_mask > self.model.n_frames:
            masks = f"frequency_mask {self.frequency_mask}, time_mask {self.time_mask}"
            raise ValueError(f"{masks}: expected at most {self.model.n_mels} and {self.model.n_frames}")


def settings(config: spectrogram.Config) -> Config:
    """Return the authors' masks (section 3.1), 48 of 128 mels and 192 of 1024 frames, for any picture."""
    return Config(config, config.n_mels * 3 // 8, config.n_frames * 3 // 16)


def load_data(args: Namespace, config: spectrogram.Config) -> Dataset:
    """Return sounds with classes, and how well they are classified without a network.

    Raises ValueError for what `data.sounds.prepare` refuses, for sounds without classes, and for other
    classes than a pretrained model's.
    """
    if args.document_mask:
        raise ValueError("--document-mask: sounds have no documents; leave it out")
    with parallel.one_per_machine_first():
        options = {"val": args.val, "bad_sounds": args.bad_text}
        dataset = prepare(args.data, config.n_samples, spectrogram.RATE, args.cache, **options)
    n = len(dataset.labels)
    if n < 2:
        raise ValueError(f"--data {args.data}: {n} classes; expected a folder for each class")
    check_pretrained(args, config, n)
    return replace(dataset, guess=describe(dataset.train, dataset.val, n, config))


def pictures_of(rows: list[Row], config: spectrogram.Config) -> Tensor:
    """Return the spectrograms (B, frames, M) of rows, neither changed nor normalised."""
    batch = stack(rows)
    return spectrogram.spectrograms(batch["sound"].float() / 32768, batch["length"], config)


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: None
) -> dict[str, Tensor]:
    """Return "spectrograms" (B, frames, M), changed where a sound is to be learned from and not yet
    normalised, and "targets" (B,), labels."""
    # Five numbers for each sound: its loudness, and width and place of both masks.
    batch, u = stack(rows), torch.rand(len(rows), 5, generator=generator)
    chosen = batch["augment"]
    gains = 10 ** (torch.where(chosen, config.gain * (2 * u[:, 0] - 1), 0.0) / 20)
    waves = batch["sound"].float() / 32768 * gains[:, None]
    x = spectrogram.spectrograms(waves, batch["length"], config.model)

    # The masks, as the authors set them before normalising.
    _, n_frames, n_mels = x.shape
    hidden = stretch(n_frames, config.time_mask, u[:, 1], u[:, 2])[:, :, None]
    hidden = hidden | stretch(n_mels, config.frequency_mask, u[:, 3], u[:, 4])[:, None]
    return {"spectrograms": x.masked_fill(hidden & chosen[:, None, None], 0.0), "targets": batch["label"]}


def stretch(n: int, most: int, width: Tensor, place: Tensor) -> Tensor:
    """Return bool (B, n), true in one stretch of at most `most` places; width, place: (B,), from 0 to 1."""
    widths = (width * (most + 1)).long()[:, None]
    begins = (place[:, None] * (n - widths + 1)).long()
    places = torch.arange(n)
    return (places >= begins) & (places < begins + widths)


def describe(train: Rows, held: Rows, n_classes: int, config: spectrogram.Config) -> str:
    """Return one line: how often chance and classifiers without a network are right on held-out sounds.

    They read the spectrogram's mean over time, or the whole of it.
    """
    pictures, labels = [], []
    for rows, most in zip((train, held), MOST, strict=True):
        some = [rows[i] for i in range(0, len(rows), -(-len(rows) // most))]
        parts = [pictures_of(some[i : i + PART], config) for i in range(0, len(some), PART)]
        pictures.append(torch.cat(parts))
        labels.append(torch.tensor([int(row["label"]) for row in some]))
    means = [x.mean(dim=1) for x in pictures]
    linear = logistic_regression(means[0], labels[0], means[1])
    nearest = nearest_neighbour(pictures[0].flatten(1), labels[0], pictures[1].flatten(1))
    right = [(predicted == labels[1]).float().mean() for predicted in (linear, nearest)]
    return (
        f"on held-out sounds, chance is right for {1 / n_classes:.1%}, logistic regression on the mean "
        f"spectrum for {right[0]:.1%}, the nearest spectrogram for {right[1]:.1%}"
    )


def tokens_per_row(model: spectrogram.AST, config: Config, seq_len: int) -> list[int]:
    """Return how many tokens a sound has in the model's layers."""
    return [2 + model.config.n_patches]


def loss_bytes(
    model: spectrogram.AST, config: Config, n: int, seq_len: int, precision: Precision
) -> dict[str, int]:
    """Return the memory of n sounds outside the layers, as the fields of engine.activations.Loss."""
    (e, r, _), own = precision, model.config
    D, T = own.d_model, 2 + own.n_patches
    inputs = own.n_frames * own.n_mels * (4 + e)
    return {"inputs": n * inputs, "kept": n * (T * D * r + 8 * own.n_classes)}


@torch.no_grad()
def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Draw the spectrograms of some held-out sounds with the labels that the model gives them, green where
    they are right, and return the most frequent confusions among all, or a thousand."""
    val, device, config = dataset.val, next(model.parameters()).device, model.config
    rows = [val[i] for i in range(0, len(val), -(-len(val) // 1000))]
    predicted, pictures = [], []
    for start in range(0, len(rows), PART):
        x = pictures_of(rows[start : start + PART], config)
        predicted += model(model.normalized(x.to(device))).argmax(-1).tolist()
        pictures.append(x)

    # Low frequencies lie at the bottom. Black is the logarithm of FLOOR, white is 5, as of loud sounds.
    images = torch.cat(pictures).transpose(1, 2).flip(1)[:, None]  # (n, 1, M, frames)
    floor = math.log(spectrogram.FLOOR)
    images = ((images - floor) / (5 - floor)).clamp(0, 1)
    targets = [int(row["label"]) for row in rows]
    return show_labels(images, predicted, targets, dataset.labels, out, SHOWN)
