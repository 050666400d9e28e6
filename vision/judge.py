"""A judge of drawn pictures: a small classifier, trained on real ones, that says what a picture shows.

A generated picture has no true pixels, but it has a caption. How often a classifier that has seen only real
pictures recognises what the caption names is a measure that needs no downloaded network. Beside it stands how
often the judge is right on the real held-out pictures, which a generator can hardly exceed, and how often by
chance. A judge does not see variety: a model that draws one good picture for each caption satisfies it.

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
JUDGED = ("character", "style")  # of the ways in which data/captions.py classifies


class Question(NamedTuple):
    """A question to a judge: the number of answers, those of the pictures to learn from, and held out."""

    name: str
    n: int
    train: Tensor
    held: Tensor


class Judge(nn.Module):
    """Convolutions, the mean and the largest value of each map, and an answer to each question."""

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
    """Return the questions that drawn sets answer for each picture, none for others."""
    ways = [way for way in held.part.classes if way.name in JUDGED]
    return [Question(w.name, len(w.prompts), answers(w, train), torch.tensor(w.answers)) for w in ways]


def answers(way: ZeroShot, rows: CaptionRows) -> Tensor:
    """Return the class (N,) of each picture by its caption, which is one of the prompts of its class."""
    number = {prompt: i for i, prompts in enumerate(way.prompts) for prompt in prompts}
    return torch.tensor([number[texts[0]] for texts in rows.part.captions])


def train(pictures: np.ndarray, questions: Sequence[Question], steps: int) -> Judge:
    """Return a judge trained on real pictures, uint8 (N, C, H, W). It is always the same one, and no random
    number of the caller is used."""
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
        """Return how often each answer is right in images (n, C, H, W), drawn by the captions of the held-out
        pictures with the numbers `chosen`."""
        found, places = self.judge(images.float()), torch.tensor(chosen)
        pairs = zip(found, self.questions, strict=True)
        return {q.name: (logits.argmax(1) == q.held[places]).float().mean().item() for logits, q in pairs}


def in_words(
    label: str, images: Tensor, true: Tensor | None, opinion: Opinion | None, chosen: Sequence[int]
) -> str:
    """Return a line of figures of images (n, C, H, W), drawn by the held-out captions with the numbers
    `chosen`: how often the judge recognises them, and how far they are from the true ones, where given."""
    line = [label]
    if opinion:
        line += [f"{what} {share:.1%}" for what, share in opinion.rights(images, chosen).items()]
    if true is not None:
        line.append(f"squared error {(images - true).square().mean():.4f}")
    return "  ".join(line)


TRAINED: dict[str, Opinion | None] = {}  # by the fingerprint of the data


def of(dataset: Dataset) -> Opinion | None:
    """Return the judge of a set that can be judged, None of others. It is trained when it is first needed."""
    if dataset.fingerprint not in TRAINED:
        is_captions = isinstance(dataset.train, CaptionRows)
        questions = tuple(questions_of(dataset.train, dataset.val)) if is_captions else ()
        images = dataset.train.part.images if questions else None
        TRAINED[dataset.fingerprint] = (
            Opinion(train(images, questions, STEPS), questions) if questions else None
        )
    return TRAINED[dataset.fingerprint]
