"""Overlap: how much of a text is in another, by BLEU for translations and ROUGE-1 for summaries.

    BLEU      = min(1, exp(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4)        Papineni et al. 2002
    ROUGE-1   = 2 P R / (P + R)                                         Lin 2004, its F1

p_n is the share of the translations' n-grams that are in their references; an n-gram counts at most as often
as it occurs there. c and r are the lengths of all translations and of all references, in words. BLEU is a
figure of many sentences together: of a single one, p_4 is often 0. P is the share of the summary's words that
are in the reference, R that of the reference's words that are in the summary.

Both figures depend on how a text is cut into words. BLEU is that of sacrebleu (Post 2018) with its defaults:
the words of mteval-v13a, and "exp" smoothing, by which the first n without a common n-gram counts 1/2 of one,
the next 1/4. ROUGE is that of Google's rouge_score without stemming: words of the letters a to z and digits,
in lower case.

    python -m language.overlap
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from formats import command

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
SPLITS_13A = [
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # punctuation but for ' , - .
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # a full stop or comma that follows no digit
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),  # or that no digit follows
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
]


def words_13a(text: str) -> list[str]:
    """Return the words of a text as mteval-v13a divides it."""
    text = text.strip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in SPLITS_13A:
        text = pattern.sub(spaced, text)
    return text.split()


def n_grams(words: Sequence[str], n: int) -> Counter:
    """Return how often each sequence of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Return BLEU, 0 to 100, of translations with one reference each.

    Raises ValueError unless there are as many references as translations, and at least one.
    """
    if len(outputs) != len(references) or not outputs:
        found = f"{len(outputs)} translations and {len(references)} references"
        raise ValueError(f"bleu: {found}: expected one reference for each translation, and at least one")
    ours, theirs = ([words_13a(text) for text in side] for side in (outputs, references))
    log_precision, half = 0.0, 1.0
    for n in range(1, 5):
        pairs = [(n_grams(a, n), n_grams(b, n)) for a, b in zip(ours, theirs, strict=True)]
        common, total = sum((a & b).total() for a, b in pairs), sum(a.total() for a, _ in pairs)
        if not total or (n == 1 and not common):
            return 0.0
        if not common:
            half /= 2
        log_precision += math.log((common or half) / total) / 4
    c, r = sum(map(len, ours)), sum(map(len, theirs))
    return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(log_precision)


def words(text: str) -> list[str]:
    """Return the words of a text as rouge_score divides it."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f1(common: int, n_output: int, n_reference: int) -> float:
    """Return 2 P R / (P + R), 0 to 1, where P = common / n_output and R = common / n_reference."""
    return 2 * common / (n_output + n_reference) if common else 0.0


def rouge_1(output: str, reference: str) -> float:
    """Return the F1, 0 to 1, of the words that a summary and a reference have in common."""
    a, b = Counter(words(output)), Counter(words(reference))
    return f1((a & b).total(), a.total(), b.total())


def main() -> None:
    """Print both figures of the reference, of another wording, and of its words in another order."""
    reference = "A brown dog runs across the wet grass."
    for text in (reference, "A dog is running through wet grass.", "The grass runs across a brown dog."):
        print(f"BLEU {bleu([text], [reference]):5.1f}   ROUGE-1 {rouge_1(text, reference):.2f}   {text}")
    print(f"{'':28}{reference} (the reference)")


if __name__ == "__main__":
    command.run(main)
