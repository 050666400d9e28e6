r"""A classifier of quality: logistic regression on hashed words and pairs of words.

    x_j = n_j / ||n||                         n_j: how often words or pairs with hash j are in the document
    p(good | x) = sigmoid(w . x + b)          the score
    loss = mean_i -log p(label_i | x_i) + weight_decay / 2 ||w||^2

The classifier learns to distinguish text that is known to be good from other text, such as a crawl of the
web; the documents of the crawl that it takes for good ones are kept. GPT-3's distinguished WebText, books and
Wikipedia from raw Common Crawl, by logistic regression on hashed words as here (Brown et al. 2020,
arXiv:2005.14165, appendix A). FineWeb-Edu's learned educational value from labels of a language model (Penedo
et al. 2024, arXiv:2406.17557, section 4), and DCLM's is fastText (Li et al. 2024, arXiv:2406.11794).

    python -m data.quality_classifier --good wiki.jsonl --other crawl.jsonl --out quality
    python -m data.curate crawl.jsonl --out good --stage classifier=quality pareto=9

A classifier uses whatever differs between the two sides: topic, length and language as well as quality. So at
most the same number of words of each document is read, a twentieth of both sides is held out to measure it,
and the words with the largest weights are printed: read them before you trust the score.

Words are those of data/near_duplicates.py: without case, accents and punctuation, and 0 for each number.

Shapes: n documents, k features of all documents together, F hashes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data.corpus import documents, find_files
from data.near_duplicates import n_grams, words_of
from data.records import refuse
from formats import command
from formats.atomic import replace_directory
from formats.json_file import read_json, write_json
from formats.progress import progress_bar

FEATURES = 1 << 18  # hashes
WORDS = 500  # of the beginning of a document, which are read
WEIGHT_DECAY = 1e-4
HELD_OUT = 20  # every 20th document of both sides
KIND = "plinth.data.quality_classifier"


class Features(NamedTuple):
    """The features of n documents, those of one document after those of another."""

    hashes: np.ndarray  # (k,) int64, j, 0 to F - 1
    values: np.ndarray  # (k,) float64, x_j
    starts: np.ndarray  # (n,) int64, the first feature of each document, which has at least one


def features(texts: Iterable[str], n_words: int = WORDS, n_features: int = FEATURES) -> Features:
    """Return the features x of texts: counts of the hashes of words and pairs of neighbouring words, divided
    by their norm in each text.

    Only the first n_words words of a text count. A text without words has one feature, of hash 0 and value 0.
    """
    hashes, values = [], []
    for text in texts:
        words = words_of(text)[:n_words]
        both = np.concatenate([n_grams(words, 1), n_grams(words, 2)]) % np.uint64(n_features)
        found, counts = np.unique(both.astype(np.int64), return_counts=True)
        if not len(found):
            found, counts = np.zeros(1, np.int64), np.zeros(1)
        hashes.append(found)
        values.append(counts / max(np.linalg.norm(counts), 1e-300))
    lengths = np.array([len(found) for found in hashes], np.int64)
    none, no_values = np.zeros(0, np.int64), np.zeros(0)
    return Features(
        np.concatenate([none, *hashes]), np.concatenate([no_values, *values]), np.cumsum(lengths) - lengths
    )


class Classifier:
    """The weights w (F,) float64, the bias b, and the number of words of a document that are read."""

    def __init__(self, weights: np.ndarray, bias: float = 0.0, n_words: int = WORDS):
        self.weights, self.bias, self.n_words = weights, bias, n_words

    def logits(self, x: Features) -> np.ndarray:
        """Return (n,) w . x + b."""
        if not len(x.starts):
            return np.zeros(0)
        return np.add.reduceat(self.weights[x.hashes] * x.values, x.starts) + self.bias

    def scores(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n,) float64, p(good) of each text."""
        logits = self.logits(features(texts, self.n_words, len(self.weights)))
        return np.exp(-np.logaddexp(0, -logits))

    def save(self, directory: Path) -> None:
        """Write config.json and model.safetensors, all or nothing."""
        with replace_directory(directory) as new:
            write_json(new / "config.json", {"kind": KIND, "n_words": self.n_words})
            save_file({"weights": self.weights, "bias": np.array([self.bias])}, new / "model.safetensors")

    @classmethod
    def load(cls, directory: Path) -> "Classifier":
        """Return the classifier in a directory. Raises ValueError if there is none, or if it is damaged."""
        directory, program = Path(directory), "python -m data.quality_classifier"
        if not is_classifier(directory):
            raise ValueError(f"{directory}: no classifier of quality; make one by {program}")
        try:
            tensors = load_file(directory / "model.safetensors")
            n_words = int(read_json(directory / "config.json")["n_words"])
            return cls(tensors["weights"], float(tensors["bias"][0]), n_words)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{directory}: damaged ({error}); make it again by {program}") from None


def is_classifier(directory: Path) -> bool:
    """Return whether a directory holds what `Classifier.save` writes, by its config.json."""
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("kind") == KIND


def loss_and_gradient(
    classifier: Classifier, x: Features, labels: np.ndarray, weight_decay: float
) -> tuple[float, np.ndarray, float]:
    """Return the loss, and its gradients by the weights (F,) and by the bias.

    labels: (n,) float64, 1 for good documents and 0 for others.
    """
    # -log p(label | x) is log(1 + e^z) - label z, with the logit z = w . x + b.
    logits, w = classifier.logits(x), classifier.weights
    loss = np.mean(np.logaddexp(0, logits) - labels * logits) + weight_decay / 2 * w @ w
    error = (np.exp(-np.logaddexp(0, -logits)) - labels) / len(labels)  # (n,) d loss / d logits
    of_each = np.repeat(error, np.diff(x.starts, append=len(x.hashes)))  # (k,)
    gradient = np.bincount(x.hashes, of_each * x.values, minlength=len(w)) + weight_decay * w
    return float(loss), gradient, float(error.sum())


def fit(
    x: Features,
    labels: np.ndarray,
    weight_decay: float = WEIGHT_DECAY,
    n_words: int = WORDS,
    n_features: int = FEATURES,
) -> Classifier:
    """Return the classifier of the lowest loss, found by L-BFGS. The loss is convex, so there is one minimum.

    labels: as for `loss_and_gradient`. Raises ValueError unless there are documents of both labels.
    """
    import torch  # here, since it is slow to import, and scores do not need it

    if len(set(labels.tolist())) < 2:
        raise ValueError(f"{len(labels)} documents of one kind: expected good ones and others")
    classifier = Classifier(np.zeros(n_features), 0.0, n_words)
    parameters = torch.zeros(n_features + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    # The gradient is ours, so torch's parameters are only a vector that L-BFGS changes.
    def closure() -> float:
        values = parameters.detach().numpy()
        classifier.weights, classifier.bias = values[:-1], float(values[-1])
        loss, by_weights, by_bias = loss_and_gradient(classifier, x, labels, weight_decay)
        parameters.grad = torch.from_numpy(np.append(by_weights, by_bias))
        return loss

    optimizer.step(closure)
    values = parameters.detach().numpy()
    return Classifier(values[:-1].copy(), float(values[-1]), n_words)


def heaviest(classifier: Classifier, texts: Iterable[str], n: int = 12) -> tuple[list[str], list[str]]:
    """Return the n words or pairs of the largest weights, and the n of the smallest, each the largest in
    magnitude first.

    texts: where to look for words with these hashes; of several with the same hash, the most frequent one is
    named. A hash that no word of the texts has is left out, and so may fewer be returned.
    """
    order = np.argsort(classifier.weights, kind="stable")
    wanted = {int(i): Counter() for i in (*order[:n], *order[-n:])}
    F = np.uint64(len(classifier.weights))
    for text in texts:
        words = words_of(text)[: classifier.n_words]
        for size in (1, 2):
            for i, found in enumerate((n_grams(words, size) % F).tolist()):
                if found in wanted:
                    wanted[found][" ".join(words[i : i + size])] += 1
    named = [(i, wanted[i].most_common(1)[0][0]) for i in wanted if wanted[i]]
    ranked = [name for _, name in sorted(named, key=lambda pair: -classifier.weights[pair[0]])]
    n_good = sum(classifier.weights[i] > 0 for i, _ in named)
    return ranked[:n_good][:n], ranked[n_good:][::-1][:n]


def read_side(names: list[str], flag: str, text_field: str) -> Iterator[str]:
    """Yield the documents of the files, folders and globs that a flag names."""
    files = [file for name in names for file in find_files(name, Path("cache"), print, flag=flag)]
    return progress_bar(documents(files, refuse, text_field), f"read {flag}", unit="doc")


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Learn to tell good text from other text.")
    add = parser.add_argument
    add(
        "--good",
        nargs="+",
        type=command.filled,
        required=True,
        help="text that is known to be good, as --data of train.py",
    )
    add("--other", nargs="+", type=command.filled, required=True, help="text such as that to choose from")
    add("--out", type=command.path, required=True, help="folder for the classifier")
    add("--text-field", default="text", help="field of a record that holds the text (default %(default)s)")
    add("--words", type=int, default=WORDS, help="words of a document that are read (default %(default)s)")
    add(
        "--weight-decay",
        type=float,
        default=WEIGHT_DECAY,
        help="factor of ||w||^2 / 2 in the loss (default %(default)g)",
    )
    args = parser.parse_args(argv)
    if args.words < 1:
        raise ValueError(f"--words {args.words}: expected at least 1")
    if not 0 < args.weight_decay < math.inf:
        raise ValueError(f"--weight-decay {args.weight_decay}: expected a finite number above 0")
    is_new = not args.out.exists() or (args.out.is_dir() and not any(args.out.iterdir()))
    if not is_new and not is_classifier(args.out):
        raise ValueError(f"--out {args.out}: holds something else than a classifier; name a new folder")

    # Every 20th document of both sides is held out.
    sides = [list(read_side(getattr(args, name), f"--{name}", args.text_field)) for name in ("good", "other")]
    for name, texts in zip(("good", "other"), sides, strict=True):
        if len(texts) < HELD_OUT:
            raise ValueError(f"--{name}: {len(texts)} documents; expected at least {HELD_OUT}")
    held_out = [text for texts in sides for text in texts[::HELD_OUT]]
    held_labels = np.repeat([1.0, 0.0], [len(texts[::HELD_OUT]) for texts in sides])
    rest = [[text for i, text in enumerate(texts) if i % HELD_OUT] for texts in sides]
    labels = np.repeat([1.0, 0.0], [len(texts) for texts in rest])

    # Fit the rest, and measure on what is held out: right answers, and pairs of a good document and another
    # of which the good one has the higher score.
    x = features((text for texts in rest for text in texts), args.words)
    classifier = fit(x, labels, args.weight_decay, args.words)
    classifier.save(args.out)
    scores = classifier.scores(held_out)
    pairs = scores[held_labels == 1][:, None] - scores[held_labels == 0][None]  # (good, other)
    for_good, against = heaviest(classifier, (text for texts in rest for text in texts))
    print(f"documents        {len(rest[0]):,} good, {len(rest[1]):,} others, {len(held_out):,} held out")
    print(f"held out         {np.mean((scores > 0.5) == held_labels):.1%} right, "
          f"{np.mean((pairs > 0) + 0.5 * (pairs == 0)):.1%} of pairs in order (a guess: 50%)")  # fmt: skip
    print(f"for good text    {', '.join(for_good)}")
    print(f"against it       {', '.join(against)}")


if __name__ == "__main__":
    command.run(main)
