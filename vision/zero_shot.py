"""What a model of images and texts is good for without further training: naming, and looking up.

    classify    a class is described by prompts, "a photo of a dog", "a drawing of a dog"; its vector is the
                mean of theirs, made of length 1 again, and an image is of the class with the nearest vector
    retrieve    the text nearest to an image, and the image nearest to a text; recall@1 is the share of the
                held-out images whose nearest text is their own caption, and the reverse
    tell apart  the right caption from one with the same words in another order; chance is one half

Prompt ensembles: Radford et al. 2021, section 3.1.4. A model with high recall may fail at the third: to find
an image among a thousand, the words of its caption are enough, in any order (Yuksekgonul et al. 2022, arXiv
2210.01936).

Shapes: N images, M texts, E width of the common space.
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

BATCH = 256  # images or texts
MOST = 2_000  # held-out images that are looked up among each other


class Figure(NamedTuple):
    """A share of right answers, and that of chance."""

    right: float
    chance: float


@torch.no_grad()
def of_images(model: nn.Module, images: np.ndarray) -> Tensor:
    """Return the vectors (N, E) of images, uint8 (N, C, H, W). Raises ValueError for none."""
    if not len(images):
        raise ValueError("no images: expected at least one")
    device, found = next(model.parameters()).device, []
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(np.array(images[start : start + BATCH])).to(device).float() / 255
        found.append(model.of_images(model.normalized(pixels)))
    return torch.cat(found)


@torch.no_grad()
def of_texts(model: nn.Module, tokenizer, texts: Sequence[str]) -> Tensor:
    """Return the vectors (M, E) of texts. Raises ValueError for none."""
    if not texts:
        raise ValueError("no texts: expected at least one")
    config = model.config
    length = config.max_seq_len if config.layout == "siglip" else None  # SigLIP reads the last place
    tokens, _ = encode(texts, tokenizer, config.max_seq_len, length)
    rows = torch.from_numpy(tokens).long().to(next(model.parameters()).device)
    return torch.cat([model.of_texts(part) for part in rows.split(BATCH)])


def of_classes(model: nn.Module, tokenizer, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return the vectors (classes, E) of classes that are described by one or more prompts each."""
    texts = list(dict.fromkeys(text for some in prompts for text in some))
    place = {text: i for i, text in enumerate(texts)}
    vectors = of_texts(model, tokenizer, texts)
    means = [vectors[[place[text] for text in some]].mean(dim=0) for some in prompts]
    return F.normalize(torch.stack(means), dim=1)


def recall(similarities: Tensor, answers: Sequence[str]) -> Figure:
    """Return recall@1 of rows among columns (n, n), of which the i-th belong together.

    answers: the caption of each. Where several are the same, each of them is right, also by chance.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(answers))}
    own = torch.tensor([number[text] for text in answers], device=similarities.device)
    found = own[similarities.argmax(dim=1)]
    chance = sum(count**2 for count in Counter(answers).values()) / len(answers) ** 2
    return Figure((found == own).float().mean().item(), chance)


def against(similarities: Tensor, wrong: Tensor, is_other: Tensor) -> Figure:
    """Return how often an image is nearer to its caption than to a wrong one, from both similarities (N,).

    Left out are pairs of equal captions, where is_other (N,) is false. A tie of others counts one half.
    """
    right = (similarities > wrong).float() + (similarities == wrong).float() / 2
    return Figure(right[is_other].mean().item(), 0.5)


def measure(model: nn.Module, tokenizer, rows: CaptionRows) -> dict[str, Figure]:
    """Return the figures of a model on held-out images: recall@1 both ways, and the tests of their set.

    The set (data/captions.py) may have groups of images that are looked up among each other, swaps, which are
    wrong captions of the images, and classes, which are described by prompts.
    """
    part, figures = rows.part, {}
    groups = part.groups or {"": range(min(MOST, len(part.images)))}
    captions = [texts[0] for texts in part.captions]
    x, y = of_images(model, part.images), of_texts(model, tokenizer, captions)
    wrong = [(swap, of_texts(model, tokenizer, swap.wrong)) for swap in part.swaps]

    # Retrieval, and captions against wrong ones.
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
        predicted = (x @ of_classes(model, tokenizer, prompts).T).argmax(dim=1).cpu()
        right = (predicted == torch.tensor(answers)).float().mean().item()
        figures[f"zero-shot {way}"] = Figure(right, 1 / len(prompts))
    return figures


def in_words(figures: dict[str, Figure]) -> str:
    """Return figures as text, one on each line."""
    return "\n".join(f"{right:6.1%} {of} (chance {chance:.1%})" for of, (right, chance) in figures.items())


# --- folders of images


def of_files(model: nn.Module, paths: Sequence[Path]) -> tuple[list[Path], Tensor]:
    """Return the paths of image files and their vectors (N, E), without those that cannot be read, which are
    named on stderr. Raises ValueError if none is left."""
    config, kept, vectors = model.config, [], []
    for start in range(0, len(paths), BATCH):
        pixels = []
        for path in paths[start : start + BATCH]:
            try:
                conversions = Counter()  # of what `decode` had to convert, which is not printed here
                pixels.append(decode(path, (config.n_channels, *config.size), conversions))
                kept.append(path)
            except ValueError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if pixels:
            vectors.append(of_images(model, np.stack(pixels)))
    if not kept:
        raise ValueError(f"{len(paths)} images, of which none can be read")
    return kept, torch.cat(vectors)


def images_in(folder: str) -> list[Path]:
    """Return the images in a folder and the folders inside it. Raises ValueError if there are none."""
    paths = files_in(existing_folder(folder, "--images", KIND), KIND, deep=True)
    if not paths:
        raise ValueError(f"--images {folder}: no images; expected files of {' '.join(KIND.suffixes)}")
    return paths


@torch.no_grad()
def search(model: nn.Module, tokenizer, folder: str, query: str, n: int) -> list[tuple[float, Path]]:
    """Return the n images in a folder that are nearest to a text, with their cosines, the nearest first."""
    paths, x = of_files(model, images_in(folder))
    cosines, places = (x @ of_texts(model, tokenizer, [query])[0]).topk(min(n, len(paths)))
    return [(cosine, paths[i]) for cosine, i in zip(cosines.tolist(), places.tolist(), strict=True)]


def classes_in(folder: str, labels: Sequence[str]) -> tuple[list[str], dict[Path, str]]:
    """Return the labels, by default the names of the folders inside, and the label of each image where they
    are these names, in any order. Raises ValueError where there are no two labels."""
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
    return the share that is right of the images with a known label, see `classes_in`, or None without any.

    templates: prompts in which "{}" stands for a label. Raises ValueError where there are no two labels.
    """
    names, truth = classes_in(folder, labels)
    kept, x = of_files(model, images_in(folder))
    prompts = [[template.replace("{}", label) for template in templates] for label in names]
    logits = model.logits(x, of_classes(model, tokenizer, prompts))
    # SigLIP's are independent of each other, and need not have the sum 1.
    probabilities = logits.sigmoid() if model.config.objective == "sigmoid" else logits.softmax(dim=1)

    lines, is_right = [], []
    for path, row in zip(kept, probabilities, strict=True):
        best = row.topk(min(3, len(names)))
        likeliest = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        lines.append(f"{path}: " + ", ".join(f"{names[i]} {p:.1%}" for p, i in likeliest))
        if path in truth:
            is_right.append(truth[path] == names[best.indices[0]])
    return lines, Figure(sum(is_right) / len(is_right), 1 / len(names)) if is_right else None
