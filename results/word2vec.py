"""Analogies of word vectors, three seeds: CBOW with either gradient, skip-gram, and counted vectors.

    python -m results.word2vec --out results/word2vec.json

All read the same words of Python's library; word2vec makes 15 passes with one thread. "CBOW, undivided" has
the gradient of the authors' program and of gensim (language/word2vec.py). A question gives the words a, b and
c, and asks for the word that is to c as b is to a. Each accuracy stands beside that of answering with the
nearest word to c, which ignores a and b.

The vectors of each run are kept in --work, so that an interrupted study goes on, and the figures are written
to --out. The picture beside it shows nouns and their plurals: the first two principal components of the
vectors of --picture, seed 0.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from engine import cpu
from evaluation.small_runs import mean_and_range
from formats import command, word_vectors
from formats.atomic import replace_file
from formats.json_file import write_json
from language.analogies import PAIRS, accuracy, all_questions, neighbours
from language.ppmi import svd_vectors
from language.word2vec import Config, train
from language.word_corpus import WordCorpus, read_corpus

KINDS = {
    "CBOW": Config(lr=0.15),
    "CBOW, undivided": Config(undivided=True, lr=0.05),
    "skip-gram": Config("skip_gram", lr=0.025),
}
COUNTED = "PPMI and SVD"
DRAWN = 12  # pairs in the picture


def run(kind: str, seed: int, corpus: WordCorpus, work: Path) -> dict:
    """Return the figures of a run of one of KINDS or of COUNTED.

    Its vectors, and its loss and time, are files in the folder `work`; they are made if they are not there.
    """
    vectors = work / f"{kind.replace(', ', '_').replace(' ', '_').lower()}_{seed}.bin"
    facts = vectors.with_suffix(".json")
    if not facts.exists():
        began, losses = time.process_time(), []
        if kind == COUNTED:
            found = svd_vectors(corpus, seed=seed)
        else:
            found = train(corpus, KINDS[kind], seed, watch=lambda epochs, nats, _: losses.append(nats)).input
        seconds = time.process_time() - began
        word_vectors.write(vectors, corpus.words, found.numpy())
        known = {"cpu_seconds": round(seconds, 1), "loss": losses[-1] if losses else None}
        write_json(facts, known)
    words, found = word_vectors.read(vectors)
    row = {"kind": kind, "seed": seed} | json.loads(facts.read_text(encoding="utf-8"))
    for name, pairs in PAIRS.items():
        row[name] = accuracy(words, found, all_questions(pairs))._asdict()
    row["neighbours"] = {
        word: neighbours(words, found, word, 6) for word in ("encode", "json", "width", "thread")
    }
    return row | {"vectors": vectors.name}


def picture(words: list[str], vectors: np.ndarray, path: Path) -> None:
    """Draw the vectors of nouns and of their plurals, in the plane of their first principal components."""
    from matplotlib.figure import Figure

    index = {word: i for i, word in enumerate(words)}
    pairs = [pair for pair in PAIRS["plural"] if all(word in index for word in pair)][:DRAWN]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shown = unit[[index[word] for pair in pairs for word in pair]]
    centred = shown - shown.mean(0)
    _, s, axes = np.linalg.svd(centred, full_matrices=False)
    xy = (centred @ axes[:2].T).reshape(-1, 2, 2)  # (pairs, singular or plural, axis)
    share = (s[:2] ** 2).sum() / (s**2).sum()

    figure = Figure((8, 6), layout="constrained")
    ax = figure.subplots()
    for (one, many), (a, b) in zip(pairs, xy, strict=True):
        ax.annotate("", b, a, arrowprops={"arrowstyle": "->", "color": "0.6"})
        ax.annotate(one, a, color="tab:blue", ha="center", va="center")
        ax.annotate(many, b, color="tab:red", ha="center", va="center")
    ax.set_xlim(xy[..., 0].min() - 0.15, xy[..., 0].max() + 0.15)
    ax.set_ylim(xy[..., 1].min() - 0.08, xy[..., 1].max() + 0.08)
    ax.set_title(f"nouns and plurals: two principal components, {share:.0%} of the variance")
    with replace_file(path) as new:
        figure.savefig(new, dpi=110, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=command.count, default=3, help="runs of each kind (default %(default)s)")
    work, every = Path("runs/word2vec_study"), [*KINDS, COUNTED]
    add("--work", type=command.path, default=work, help="folder of the vectors (default %(default)s)")
    add("--kinds", nargs="+", default=every, choices=every, help="kinds of vectors (default: all)")
    add("--picture", choices=every, help="whose vectors are drawn (default: the first of --kinds)")
    add("--out", type=command.new_file, help="write the figures as JSON here, and the picture beside it")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    drawn = args.picture or args.kinds[0]
    if drawn not in args.kinds:
        raise ValueError(f"--picture {drawn!r}: expected one of --kinds, {', '.join(args.kinds)}")
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    corpus, load = read_corpus("stdlib"), os.getloadavg()[0]
    runs = [(kind, seed) for seed in range(args.seeds) for kind in args.kinds]
    rows = [run(kind, seed, corpus, args.work) for kind, seed in runs]

    for kind in args.kinds:
        print(kind)
        for name in PAIRS:
            own = [row[name] for row in rows if row["kind"] == kind]
            right, alone = (mean_and_range([row[key] for row in own], ".1%") for key in ("right", "control"))
            print(f"  {name:12}  {right}   c alone {alone}")
    if args.out:
        about = {"command": shlex.join(["python", "-m", "results.word2vec", *argv]), "cpu": cpu.name()}
        about |= {"load_average": load, "words": len(corpus), "vocabulary": len(corpus.words)}
        about |= {"settings": {kind: asdict(config) for kind, config in KINDS.items()}, "rows": rows}
        write_json(args.out, about, indent=1)
        first = next(row for row in rows if row["kind"] == drawn)
        picture(*word_vectors.read(args.work / first["vectors"]), args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
