"""Mixing: how often each source of a corpus is read, and in which order the documents of all sources come.

    epochs of source i = weight_i x budget / size_i          budget: bytes of the mixture; size_i: of source i
    weight_i proportional to size_i^alpha                    if weights are not given (temperature sampling)

A source with a large weight may be read several times, one with a small weight only in part. GPT-3 read
Wikipedia 3.4 times and its Common Crawl .44 times (Brown et al. 2020, table 2.2). With alpha = 1 sources keep
their shares of the bytes, with alpha = 0 all have the same share; .3 to .7 is in use for languages (Conneau
et al. 2020, arXiv:1911.02116). Up to four epochs of the same text are nearly as good as new text, and each
further one adds less (Muennighoff et al. 2023, arXiv:2305.16264).

The share of a source is weight x budget. It is filled with whole documents: with as many whole epochs of the
source as fit, and then with the first documents of a random order, up to and including the one that reaches
the share. So each document comes floor(epochs) or floor(epochs) + 1 times, and a source exceeds its share by
less than a document."""

import math
from dataclasses import dataclass

import numpy as np

MOST_EPOCHS = 4  # up to which repeated text is nearly as good as new text


@dataclass
class Drawn:
    """The m documents of a mixture: their numbers in order, and by source what was drawn."""

    order: np.ndarray  # (m,) int64, numbers of documents in the order in which they are read
    sources: dict[str, dict]  # name: {"weight", "size", "bytes", "documents", "epochs"}; bytes: those drawn


def parse_weights(words: list[str], sources: list[str]) -> dict[str, float]:
    """Return the weight of each source from words such as "web=0.8"; their sum is 1.

    Raises ValueError unless each source is named once, by a number from 0 on, and one is above 0.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name not in sources or name in found:
            twice = "is there twice" if name in found else f"expected one of {', '.join(sources)}"
            raise ValueError(f"--mix {word}: the source {name!r}: {twice}, as in {sources[0]}=0.5")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--mix {word}: {number!r} is no number") from None
        if not 0 <= found[name] < float("inf"):
            raise ValueError(f"--mix {word}: expected a number from 0 on")
    missing = [name for name in sources if name not in found]
    if missing:
        raise ValueError(f"--mix: no weight for {', '.join(missing)}; name it, with 0 to leave it out")
    total = sum(found.values())
    if not total:
        raise ValueError("--mix: all weights are 0; expected one above it")
    return {name: found[name] / total for name in sources}


def by_temperature(sizes: dict[str, int], alpha: float) -> dict[str, float]:
    """Return weights in proportion to size^alpha, with the sum 1; 0 for a source without text.

    sizes: bytes by name, at least one above 0.
    """
    powers = {name: size**alpha if size else 0.0 for name, size in sizes.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def draw_source(sizes: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Return (m,) int64, numbers of documents of one source: whole epochs, and a random part of another.

    sizes: (n,) bytes of its documents, with a sum above 0. budget: bytes to fill.
    """
    total = int(sizes.sum())
    n_epochs = budget // total
    some = generator.permutation(len(sizes))
    left = budget - n_epochs * total
    n_more = int(np.searchsorted(np.cumsum(sizes[some]), left)) + 1 if left > 0 else 0
    return np.concatenate([np.tile(np.arange(len(sizes)), n_epochs), some[:n_more]]).astype(np.int64)


def draw(
    source_of: np.ndarray,
    sizes: np.ndarray,
    names: list[str],
    weights: dict[str, float],
    budget: int,
    seed: int,
) -> Drawn:
    """Return the documents of a mixture of `budget` bytes, in an order drawn from the seed.

    source_of: (n,) the number in `names` of the source of each document. sizes: (n,) bytes of each.
    weights: by name, with the sum 1. Raises ValueError if a source with a weight has no documents.
    """
    generator, chosen, report = np.random.default_rng(seed), [], {}
    for number, name in enumerate(names):
        places = np.flatnonzero(source_of == number)
        size = int(sizes[places].sum())
        if weights[name] and not size:
            raise ValueError(f"--mix {name}={weights[name]:.3g}: no document of it is left; give it weight 0")
        picked = places[:0]
        if weights[name]:
            # Round, so that 0.07 * 100, which is a little more than 7 in float64, does not become 8 bytes.
            share = math.ceil(round(weights[name] * budget, 6))
            picked = places[draw_source(sizes[places], share, generator)]
        n_bytes = int(sizes[picked].sum())
        report[name] = {"weight": weights[name], "size": size, "bytes": n_bytes, "documents": len(picked)}
        report[name]["epochs"] = n_bytes / size if size else 0.0
        chosen.append(picked)
    return Drawn(generator.permutation(np.concatenate(chosen)), report)
