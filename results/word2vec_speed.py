"""Words per second of language/word2vec.py beside gensim's, on one core.

    python -m results.word2vec_speed --out results/word2vec_speed.json      needs gensim 4.4

Both read the same words of Python's library with the same settings: vectors of 100 numbers, a window of 5
words, 5 negatives or hierarchical softmax, subsampling at 1e-3, one thread. Documents have at most 10,000
words, since gensim drops the rest of a longer one. The sides take turns, --rounds times; each measurement is
an epoch, in CPU time of the process. The words are those of the text, before subsampling. Building the
vocabulary is not measured.
"""

import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from data.corpus import documents, find_files
from engine import cpu
from formats import command
from formats.json_file import write_json
from language.word2vec import Config, train
from language.word_corpus import encode, words_of
from results.in_turn import compared, measure_in_turn, rate
from results.peers import require

COMMAND = "python -m results.word2vec_speed --out results/word2vec_speed.json"
LONGEST = 10_000  # words of a document that gensim reads
# The architectures, and whether the output is a hierarchical softmax.
KINDS = [("cbow", False), ("skip_gram", False), ("cbow", True), ("skip_gram", True)]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--words", type=command.count, default=400_000, help="words of the text (default %(default)s)")
    add("--rounds", type=command.count, default=5, help="measurements of each side (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("gensim")
    from gensim.models import Word2Vec

    torch.set_num_threads(1)
    load = os.getloadavg()[0]

    # The modules of the library in a random order, until there are enough words.
    modules = [words_of(text) for text in documents(find_files("stdlib", Path("cache")), print)]
    texts, n = [], 0
    for i in np.random.default_rng(0).permutation(len(modules)):
        texts += [modules[i][j : j + LONGEST] for j in range(0, len(modules[i]), LONGEST)]
        n += len(modules[i])
        if n >= args.words:
            break
    corpus = encode(texts, 5)

    rows = []
    for architecture, hierarchical in KINDS:
        lr = 0.05 if architecture == "cbow" else 0.025
        config = Config(architecture, hierarchical, undivided=architecture == "cbow", epochs=1, lr=lr)
        peer = Word2Vec(
            sg=int(architecture == "skip_gram"), hs=int(hierarchical), negative=0 if hierarchical else 5,
            vector_size=100, window=5, min_count=5, sample=1e-3, alpha=lr, workers=1, seed=1,
        )  # fmt: skip
        peer.build_vocab(texts)
        sides = {
            "ours": partial(train, corpus, config),
            "gensim": partial(peer.train, texts, total_examples=len(texts), epochs=1),
        }
        timed = {
            side: partial(rate, call, len(corpus), clock=time.process_time) for side, call in sides.items()
        }
        print(architecture, "hierarchical softmax" if hierarchical else "negative sampling")
        figures = measure_in_turn(timed, args.rounds)
        labels = {"architecture": architecture, "hierarchical": hierarchical}
        rows += compared(figures, "gensim", unit="words", **labels)
        # After each kind, so that an interruption leaves what was measured.
        if args.out:
            about = {"command": f"{COMMAND} --words {args.words} --rounds {args.rounds}"}
            about |= {"cpu": cpu.name(), "threads": 1, "load_average": load, "torch": torch.__version__}
            about |= {"gensim": version("gensim"), "words": len(corpus), "rounds": args.rounds}
            write_json(args.out, about | {"results": rows}, indent=1)


if __name__ == "__main__":
    command.run(main)
