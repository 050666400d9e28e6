"""Naive Bayes: texts classified by counting words, the figure that any other classifier has to beat.

    p(label | text)  ~  p(label) * product over the words w of the text  p(w | label)

    p(w | label) = (how often w is in texts of the label + 1) / (words in texts of the label + vocabulary)

It is naive to treat words as independent of each other, and it works: on short texts it is hard to beat
without pretraining (Wang and Manning 2012, "Baselines and Bigrams", ACL). The added 1 is Laplace's: a word
that a label has not been seen with must not rule it out. Words that no label has been seen with count for
nothing.

    python -m posttraining.naive_bayes reviews.jsonl       accuracy on held-out texts, and the telling words

Shapes: C labels, V words of the vocabulary.
"""

import random
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from data.labelled import hold_out, read_examples
from formats import command

FEW = 50  # held-out texts; with fewer, the accuracy is imprecise


class NaiveBayes(NamedTuple):
    """The logarithms of the probabilities above."""

    labels: list[str]
    prior: np.ndarray  # log p(label), (C,)
    words: dict[str, np.ndarray]  # log p(word | label), (C,) for each of V words


def split_words(text: str) -> list[str]:
    """Return the words and the punctuation marks of a text, in small letters."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def fit(examples: list[tuple[str, str]]) -> NaiveBayes:
    """Return the probabilities by the counts in these (text, label)."""
    labels = sorted({label for _, label in examples})
    counts = {label: Counter() for label in labels}
    for text, label in examples:
        counts[label].update(split_words(text))
    vocabulary = set().union(*counts.values())

    of_labels = Counter(label for _, label in examples)
    prior = np.log([of_labels[label] / len(examples) for label in labels])
    totals = np.array([counts[label].total() + len(vocabulary) for label in labels])
    words = {word: np.log(np.array([counts[c][word] + 1 for c in labels]) / totals) for word in vocabulary}
    return NaiveBayes(labels, prior, words)


def predict(model: NaiveBayes, text: str) -> str:
    """Return the likeliest label of a text."""
    score = model.prior + sum(model.words.get(word, 0.0) for word in split_words(text))
    return model.labels[int(np.argmax(score))]


def accuracy(examples: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> float:
    """Return the share of held-out (text, label) that naive Bayes, fitted to the examples, predicts."""
    model = fit(examples)
    return sum(predict(model, text) == label for text, label in held_out) / len(held_out)


def simple_guesses(examples: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> list[str]:
    """Return lines with the numbers of texts, and how well two simple guesses do on those held out: the label
    that is most frequent in the examples, and naive Bayes fitted to them."""
    labels = ", ".join(sorted({label for _, label in examples}))
    most_frequent = Counter(label for _, label in examples).most_common(1)[0][0]
    most = sum(label == most_frequent for _, label in held_out) / len(held_out)
    few = f"; so few that each is {1 / len(held_out):.1%} of an accuracy" if len(held_out) < FEW else ""
    return [
        f"{len(examples):,} texts, {len(held_out):,} held out; labels {labels}{few}",
        f"always the most frequent label: {most:.1%} of the held out",
        f"naive Bayes on word counts: {accuracy(examples, held_out):.1%} of the held out",
    ]


def telling_words(model: NaiveBayes, n: int) -> dict[str, list[str]]:
    """Return for each label the n words that raise its probability most over the mean of the labels."""
    return {
        label: sorted(model.words, key=lambda word: (model.words[word].mean() - model.words[word][i], word))[
            :n
        ]
        for i, label in enumerate(model.labels)
    }


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Classify texts by counting words, and print the telling words.")
    add = parser.add_argument
    add("file", type=command.path, help="a file of labelled texts, see data/labelled.py")
    add("--val", type=command.path, metavar="FILE", help="held-out texts (default: a tenth of them)")
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field that holds the text (default %(default)s)",
    )
    add(
        "--label-field",
        default="label",
        metavar="NAME",
        help="the field that holds the label (default %(default)s)",
    )
    args = parser.parse_args(argv)
    fields = (args.text_field, args.label_field)
    examples = read_examples(args.file, *fields)
    if args.val is None:
        examples, held_out = hold_out(random.Random(0).sample(examples, len(examples)))
    else:
        held_out = read_examples(args.val, *fields)
    print(*simple_guesses(examples, held_out), sep="\n")
    for label, words in telling_words(fit(examples), 8).items():
        print(f"{label:12} {' '.join(words)}")


if __name__ == "__main__":
    command.run(main)
