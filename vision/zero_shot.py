"""Zero-shot: what a model of images and texts can do without further training.

A trained CLIP (vision/clip.py) maps images and texts to vectors of length 1 in one space. They are used, and
measured, in three ways:

    classify    A class is described by prompts, "a photo of a dog", "a drawing of a dog". Its vector is the
                mean of theirs, made of length 1 again. An image is of the class with the nearest vector.
    retrieve    Find the text nearest to an image, or the image nearest to a text. Recall@1 is the share of
                the held-out images whose nearest text is their own caption, and the reverse.
    compare     Is an image nearer to its caption than to one with the same words in another order? Chance is
                one half.

The mean over prompts is from Radford et al. 2021 (section 3.1.4). A model with high recall may fail at the
third: to find an image among a thousand, the words of its caption are enough, in any order (Yuksekgonul et
al. 2022, arXiv 2210.01936).

Shapes: N images, M texts, C channels, H x W pixels, E width of the common space.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.captions import CaptionRows, encode
from data.class_folders import class_folders, existing_folder, files_in
from data.images import KIND, decode

BATCH = 256  # images or texts in one forward pass
MOST = 2_000  # at most: held-out images that are looked up among each other


class Figure(NamedTuple):
    """A measured share, and the share to compare it with."""

    right: float  # of the answers that are right
    chance: float  # of the answers of a random guess


@torch.no_grad()
def encode_images(model: nn.Module, images: np.ndarray) -> Tensor:
    """Return the vectors (N, E) of images, uint8 (N, C, H, W). Raises ValueError if there are no images."""
    if not len(images):
        raise ValueError("no images: expected at least one")
    device, found = next(model.parameters()).device, []
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(np.array(images[start : start + BATCH])).to(device).float() / 255
        found.append(model.encode_images(model.normalized(pixels)))
    return torch.cat(found)


@torch.no_grad()
def encode_texts(model: nn.Module, tokenizer, texts: Sequence[str]) -> Tensor:
    """Return the vectors (M, E) of texts. Raises ValueError if there are no texts."""
    if not texts:
        raise ValueError("no texts: expected at least one")
    config = model.config
    # SigLIP reads the last place of a row, so that all rows are padded to one length.
    length = config.max_seq_len if config.layout == "siglip" else None
    tokens, _ = encode(texts, tokenizer, config.max_seq_len, length)
    rows = torch.from_numpy(tokens).long().to(next(model.parameters()).device)
    return torch.cat([model.encode_texts(part) for part in rows.split(BATCH)])


def encode_classes(model: nn.Module, tokenizer, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return the vectors (classes, E) of classes, each of which is described by one or more prompts."""
    # A prompt of several classes is encoded once.
    texts = list(dict.fromkeys(text for some in prompts for text in some))
    place = {text: i for i, text in enumerate(texts)}
    vectors = encode_texts(model, tokenizer, texts)
    means = [vectors[[place[text] for text in some]].mean(dim=0) for some in prompts]
    return F.normalize(torch.stack(means), dim=1)


def recall(similarities: Tensor, answers: Sequence[str]) -> Figure:
    """Return recall@1 by similarities (n, n): the share of the rows whose largest entry is in a right column.

    Row i and column i belong together, and answers[i] is their caption. A column with the same caption is
    also right, for the model and for a random guess.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(answers))}
    own = torch.tensor([number[text] for text in answers], device=similarities.device)
    found = own[similarities.argmax(dim=1)]
    chance = sum(count**2 for count in Counter(answers).values()) / len(answers) ** 2
    return Figure((found == own).float().mean().item(), chance)


def against(similarities: Tensor, wrong: Tensor, is_other: Tensor) -> Figure:
    """Return how often an image is nearer to its caption, by similarities (N,), than to a wrong caption, by
    the similarities `wrong` (N,). A tie counts one half.

    is_other, bool (N,): false where the wrong caption is the image's own; these images are left out.
    """
    right = (similarities > wrong).float() + (similarities == wrong).float() / 2
    return Figure(right[is_other].mean().item(), 0.5)


def measure(model: nn.Module, tokenizer, rows: CaptionRows) -> dict[str, Figure]:
    """Return the figures of a model on held-out images with captions, by their names: recall@1 from image to
    text and back, and those that the data set defines.

    A set (data/captions.py) may have groups of images that are looked up among each other; swaps, which are
    wrong captions of its images; and classifications, with the prompts of their classes.
    """
    part, figures = rows.part, {}
    groups = part.groups or {"": range(min(MOST, len(part.images)))}
    captions = [texts[0] for texts in part.captions]
    x, y = encode_images(model, part.images), encode_texts(model, tokenizer, captions)
    wrong = [(swap, encode_texts(model, tokenizer, swap.wrong)) for swap in part.swaps]

    # In each group, retrieval, and captions against wrong ones.
    for group, places in groups.items():
        of = f", {group}" if group else ""
        similarities = x[places] @ y[places].T
        own = [captions[i] for i in places]
        figures[f"recall@1, image to text{of}"] = recall(similarities, own)
        figures[f"recall@1, text to image{of}"] = recall(similarities.T, own)
        for swap, z in wrong:
            is_other = torch.tensor([swap.wrong[i] != captions[i] for i in places], device=x.device)
            if is_other.any():
                both = ((x[places] * vectors[places]).sum(1) for vectors in (y, z))
                figures[f"against {swap.name}{of}"] = against(*both, is_other)

    # Classification.
    for way, prompts, answers in part.classes:
        predicted = (x @ encode_classes(model, tokenizer, prompts).T).argmax(dim=1).cpu()
        right = (predicted == torch.tensor(answers)).float().mean().item()
        figures[f"zero-shot {way}"] = Figure(right, 1 / len(prompts))
    return figures


def in_words(figures: dict[str, Figure]) -> str:
    """Return the figures of `measure` as text, one on each line."""
    return "\n".join(f"{right:6.1%} {of} (chance {chance:.1%})" for of, (right, chance) in figures.items())


# --- folders of images


def encode_files(model: nn.Module, paths: Sequence[Path]) -> tuple[list[Path], Tensor]:
    """Return the paths of image files and their vectors (N, E). Files that cannot be read are left out, and
    named on stderr. Raises ValueError if no file is left."""
    config, kept, vectors = model.config, [], []
    for start in range(0, len(paths), BATCH):
        pixels = []
        for path in paths[start : start + BATCH]:
            try:
                conversions = Counter()  # counts what `decode` converted; it is not printed here
                pixels.append(decode(path, (config.n_channels, *config.size), conversions))
                kept.append(path)
            except ValueError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if pixels:
            vectors.append(encode_images(model, np.stack(pixels)))
    if not kept:
        raise ValueError(f"{len(paths)} images, of which none can be read")
    return kept, torch.cat(vectors)


def images_in(folder: str) -> list[Path]:
    """Return the paths of the images in a folder and in the folders inside it. Raises ValueError if there are
    no images."""
    paths = files_in(existing_folder(folder, "--images", KIND), KIND, deep=True)
    if not paths:
        raise ValueError(f"--images {folder}: no images; expected files of {' '.join(KIND.suffixes)}")
    return paths


@torch.no_grad()
def search(model: nn.Module, tokenizer, folder: str, query: str, n: int) -> list[tuple[float, Path]]:
    """Return the n images in a folder that are nearest to a text, with the cosines of their vectors and the
    text's, the nearest first."""
    paths, x = encode_files(model, images_in(folder))
    cosines, places = (x @ encode_texts(model, tokenizer, [query])[0]).topk(min(n, len(paths)))
    return [(cosine, paths[i]) for cosine, i in zip(cosines.tolist(), places.tolist(), strict=True)]


def classes_in(folder: str, labels: Sequence[str]) -> tuple[list[str], dict[Path, str]]:
    """Return the labels, by default the names of the folders inside, and the true label of each image, which
    is that of its folder; of no image if the labels are not the names of the folders.

    Raises ValueError for less than two labels.
    """
    names, truth = list(labels), {}
    inside = {p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not labels or set(labels) == inside:
        members, found = class_folders(Path(folder), KIND)
        names, truth = names or found, {path: found[i] for path, i in members if found}
    if len(names) < 2:
        raise ValueError(f"--images {folder}: {len(names)} classes; add --labels, or a folder for each class")
    return names, truth


@torch.no_grad()
def classify(
    model: nn.Module, tokenizer, folder: str, labels: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], Figure | None]:
    """Return a line for each image in a folder, with its three likeliest labels and their probabilities. Also
    return how often the likeliest label is right, or None if no true label is known, see `classes_in`.

    templates: prompts in which "{}" stands for a label. Raises ValueError for less than two labels.
    """
    names, truth = classes_in(folder, labels)
    kept, x = encode_files(model, images_in(folder))
    prompts = [[template.replace("{}", label) for template in templates] for label in names]
    logits = model.logits(x, encode_classes(model, tokenizer, prompts))
    # SigLIP's probabilities are independent of each other, and their sum is not 1.
    probabilities = logits.sigmoid() if model.config.objective == "sigmoid" else logits.softmax(dim=1)

    lines, is_right = [], []
    for path, row in zip(kept, probabilities, strict=True):
        best = row.topk(min(3, len(names)))
        likeliest = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        lines.append(f"{path}: " + ", ".join(f"{names[i]} {p:.1%}" for p, i in likeliest))
        if path in truth:
            is_right.append(truth[path] == names[best.indices[0]])
    return lines, Figure(sum(is_right) / len(is_right), 1 / len(names)) if is_right else None
