r"""Rules of selection: which documents stay, by a score of each.

    pareto=ALPHA    Pareto(ALPHA) > 1 - score      drawn; GPT-3 with ALPHA 9 (Brown et al. 2020, appendix A)
    least=T         score >= T                     FineWeb-Edu keeps an educational score of 3 of 5 or more
    most=T          score <= T
    top=SHARE       the SHARE of all documents with the highest scores (DCLM: a tenth; Ask-LLM: 10 to 60 %)
    lowest=SHARE    the SHARE of all documents with the lowest scores, as of perplexity
    head            the third of all documents with the lowest scores; middle, tail: the two others (CCNet,
                    Wenzek et al. 2019, arXiv:1911.00359, whose scores are perplexities: the head reads best)

Pareto(a) is NumPy's, with P(Pareto(a) > x) = (1 + x)^-a. So a document with a score in [0, 1] stays with
probability (2 - score)^-a: 1 for a score of 1, .026 for .5, .002 for 0 with a = 9. Nearly all of what the
classifier likes stays, and a little of everything else, so that the text keeps its variety.

The draw of a document is a hash of its text: it is the same for every order of the documents and every
number of processes, and a copy has the fate of its original."""

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
    """Return (n,) float64, numbers in [0, 1) that are uniform over texts, and a function of text and seed."""
    key = seed.to_bytes(8, "little")
    hashes = [blake2b(text.encode(), digest_size=8, key=key).digest() for text in texts]
    return (np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(11)) * 2.0**-53


def pareto(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """Return (n,) Pareto(alpha) as numpy.random.pareto draws them, from uniform (n,) in [0, 1)."""
    return np.expm1(-np.log1p(-uniform) / alpha)


def kept(rule: str, scores: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return (n,) bool, which documents stay. A score that is not finite does not.

    scores: (n,) float64. uniform: (n,) numbers of `draws`. Of equal scores at the border of a share, the
    first documents stay. Raises ValueError for scores outside [0, 1] with `pareto`.
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

    # The others keep a part of the documents in the order of their scores.
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
    """Return the reason for which a document with this score does not stay."""
    name, value = parse(rule)
    if not np.isfinite(score):
        return "no finite score"
    if name == "pareto":
        return f"not drawn, Pareto({value:g})"
    if name in ("least", "most"):
        return f"score {'below' if name == 'least' else 'above'} {value:g}"
    share = f" {value:g}" if name in SHARES else ""
    return f"not in the {name}{share} of scores"
