"""A judge of drawn pictures: a small classifier, trained on real ones, that recognises what a picture shows.

There is no single right picture for a caption, so pixels cannot be compared. The measure here is how often a
classifier, trained on real pictures only, recognises what the caption names. It needs no downloaded network.
The same classifier's accuracy on the real held-out pictures is the figure to compare with: a generator can
hardly exceed it. The measure does not include variety: one good picture for each caption is enough.

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Augmentation, augment
from data.captions import CaptionRows, ZeroShot
from data.rows import Dataset, seed_of

STEPS, BATCH_SIZE, RATE = 200, 128, 3e-3
WIDTHS = (32, 64, 128)
JUDGED = ("character", "style")  # the classifications of data/captions.py that the judge learns


class Question(NamedTuple):
    """A classification that a judge learns, such as that by character."""

    name: str
    n: int  # classes
    train: Tensor  # int64 (pictures,), the class of each training picture
    held: Tensor  # and of each held-out one


class Judge(nn.Module):
    """Three convolutions, means of the feature maps in 4 x 4 parts of the picture, a hidden layer, and a
    linear classifier for each question."""

    def __init__(self, n_channels: int, questions: Sequence[Question]):
        super().__init__()
        widths = (n_channels, *WIDTHS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in zip(widths, WIDTHS, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.hidden = nn.Linear(16 * WIDTHS[-1], 256)
        self.heads = nn.ModuleList(nn.Linear(256, question.n) for question in questions)

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer (B, 256) for images (B, C, H, W) in [0, 1]."""
        x = 2 * images - 1
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            x = F.max_pool2d(x, 2) if i < 2 else x
        return F.relu(self.hidden(F.adaptive_avg_pool2d(x, 4).flatten(1)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits (B, n) of each question for images (B, C, H, W) in [0, 1]."""
        x = self.features(images)
        return [head(F.dropout(x, 0.3, self.training)) for head in self.heads]


def questions_of(train: CaptionRows, held: CaptionRows) -> list[Question]:
    """Return the questions of JUDGED that these captions answer: for sets that data/captions.py draws, all or
    some of them, and none for others."""
    ways = [way for way in held.part.classes if way.name in JUDGED]
    return [Question(w.name, len(w.prompts), answers(w, train), torch.tensor(w.answers)) for w in ways]


def answers(way: ZeroShot, rows: CaptionRows) -> Tensor:
    """Return the class of each picture, int64 (pictures,): the class that has its caption as a prompt."""
    number = {prompt: i for i, prompts in enumerate(way.prompts) for prompt in prompts}
    return torch.tensor([number[texts[0]] for texts in rows.part.captions])


def train(pictures: np.ndarray, questions: Sequence[Question], steps: int) -> Judge:
    """Return a judge trained on real pictures, uint8 (n, C, H, W). The same pictures give the same judge, and
    the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        judge = Judge(pictures.shape[1], questions)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        for i in range(steps):
            generator = torch.Generator().manual_seed(seed_of(0, i))
            chosen = torch.randint(len(pictures), (BATCH_SIZE,), generator=generator)
            images = torch.from_numpy(pictures[chosen.numpy()]).float() / 255
            images = augment(images, torch.ones(BATCH_SIZE, dtype=torch.bool), Augmentation(0.5), generator)
            losses = [
                F.cross_entropy(logits, question.train[chosen])
                for logits, question in zip(judge(images), questions, strict=True)
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


class Opinion(NamedTuple):
    """A trained judge, and the questions that it answers."""

    judge: Judge
    questions: tuple[Question, ...]

    @torch.no_grad()
    def rights(self, images: Tensor, chosen: Sequence[int]) -> dict[str, float]:
        """Return by question the share of images (n, C, H, W) that the judge classifies as their captions
        say. chosen: the indices of the held-out pictures whose captions they were drawn for."""
        pairs = zip(self.judge(images.float()), self.questions, strict=True)
        true = torch.tensor(chosen)
        return {q.name: (logits.argmax(1) == q.held[true]).float().mean().item() for logits, q in pairs}


def in_words(
    label: str, images: Tensor, true: Tensor | None, opinion: Opinion | None, chosen: Sequence[int]
) -> str:
    """Return a line of figures for images (n, C, H, W): after the label how often the judge recognises them,
    if there is one, and their mean squared error, if `true` images are given.

    chosen: the indices of the held-out pictures whose captions the images were drawn for.
    """
    line = [label]
    if opinion:
        line += [f"{what} {share:.1%}" for what, share in opinion.rights(images, chosen).items()]
    if true is not None:
        line.append(f"squared error {(images - true).square().mean():.4f}")
    return "  ".join(line)


TRAINED: dict[str, Opinion | None] = {}  # by the fingerprint of the data


def of(dataset: Dataset) -> Opinion | None:
    """Return the judge for a data set, or None if no question of JUDGED is about it. It is trained at the
    first call and kept for the later ones."""
    if dataset.fingerprint not in TRAINED:
        is_captions = isinstance(dataset.train, CaptionRows)
        questions = tuple(questions_of(dataset.train, dataset.val)) if is_captions else ()
        images = dataset.train.part.images if questions else None
        TRAINED[dataset.fingerprint] = (
            Opinion(train(images, questions, STEPS), questions) if questions else None
        )
    return TRAINED[dataset.fingerprint]
