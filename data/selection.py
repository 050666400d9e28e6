r"""Rules of selection: which documents stay, by the score of each.

    pareto=ALPHA    Pareto(ALPHA) > 1 - score      drawn; GPT-3 with ALPHA 9 (Brown et al. 2020, appendix A)
    least=T         score >= T                     FineWeb-Edu keeps an educational score of 3 of 5 or more
    most=T          score <= T
    top=SHARE       the SHARE of all documents with the highest scores (DCLM: a tenth; Ask-LLM: 10 to 60 %)
    lowest=SHARE    the SHARE of all documents with the lowest scores, as of perplexity
    head            the third of all documents with the lowest scores
    middle, tail    the second and the last third (CCNet, Wenzek et al. 2019, arXiv:1911.00359, whose scores
                    are perplexities, so that its head is most like good text)

Pareto(a) is a random number as NumPy draws it, with P(Pareto(a) > x) = (1 + x)^-a. So a document with a score
in [0, 1] stays with probability (2 - score)^-a: with a = 9 that is 1 for a score of 1, .026 for .5 and .002
for 0. Nearly all documents of the highest scores stay, and a few of all others, for variety.

The number that is drawn for a document is a hash of its text and the seed. So it does not depend on the order
of the documents or the number of processes, and of equal texts `pareto` keeps all or none."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

RULES = ("pareto", "least", "most", "top", "lowest", "head", "middle", "tail")
SHARES = ("top", "lowest")
THIRDS = ("head", "middle", "tail")


def parse(text: str) -> tuple[str, float | None]:
    """Return the name and the number of a rule such as "top=0.1". Raises ValueError for another."""
    name, _, number = text.partition("=")
    expected = "pareto=ALPHA, least=T, most=T, top=SHARE, lowest=SHARE, head, middle or tail"
    if name not in RULES or bool(number) == (name in THIRDS):
        raise ValueError(f"rule {text!r}: expected {expected}")
    if name in THIRDS:
        return name, None
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"rule {text!r}: {number!r} is no number; expected {expected}") from None
    if not np.isfinite(value) or (name in SHARES and not 0 < value <= 1) or (name == "pareto" and value <= 0):
        share = "a share above 0, at most 1"
        within = {"top": share, "lowest": share, "pareto": "a number above 0"}
        raise ValueError(f"rule {text!r}: expected {within.get(name, 'a finite number')}")
    return name, value


def draws(texts: Iterable[str], seed: int) -> np.ndarray:
    """Return (n,) float64, a number in [0, 1) for each text, a hash of the text and the seed.

    Over different texts the numbers are uniformly distributed. seed: from 0 to 2^64 - 1.
    """
    # The upper 53 bits of a hash, as many as a float64 holds.
    key = seed.to_bytes(8, "little")
    hashes = [blake2b(text.encode(), digest_size=8, key=key).digest() for text in texts]
    return (np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(11)) * 2.0**-53


def pareto(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """Return draws (n,) from Pareto(alpha), distributed as those of numpy.random.pareto: the inverse of its
    distribution function at uniform (n,) in [0, 1)."""
    return np.expm1(-np.log1p(-uniform) / alpha)


def kept(rule: str, scores: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return (n,) bool, which documents stay. One whose score is not finite does not.

    scores: (n,) float64. uniform: (n,) float64, from `draws`. If not all documents of one score fit into a
    share or a third, the first ones come first. Raises ValueError for scores outside [0, 1] with `pareto`.
    """
    name, value = parse(rule)
    finite = np.isfinite(scores)
    if name == "pareto":
        outside = finite & ((scores < 0) | (scores > 1))
        if outside.any():
            raise ValueError(f"rule {rule}: expected scores from 0 to 1, found {scores[outside][0]:g}")
        return finite & (pareto(uniform, value) > 1 - np.where(finite, scores, 0))
    if name == "least":
        return finite & (scores >= value)
    if name == "most":
        return finite & (scores <= value)

    # The other rules sort the documents by their scores, and keep a part of that order.
    places = np.flatnonzero(finite)
    n = len(places)
    sign = -1 if name == "top" else 1
    order = np.argsort(sign * scores[places], kind="stable")
    if name in SHARES:
        chosen = order[: round(value * n)]
    else:
        third = THIRDS.index(name)
        chosen = order[round(n * third / 3) : round(n * (third + 1) / 3)]
    stays = np.zeros(len(scores), bool)
    stays[places[chosen]] = True
    return stays


def reason(rule: str, score: float) -> str:
    """Return the reason, for the report, why a document with this score does not stay."""
    name, value = parse(rule)
    if not np.isfinite(score):
        return "no finite score"
    if name == "pareto":
        return f"not drawn, Pareto({value:g})"
    if name in ("least", "most"):
        return f"score {'below' if name == 'least' else 'above'} {value:g}"
    share = f" {value:g}" if name in SHARES else ""
    return f"not in the {name}{share} of scores"
