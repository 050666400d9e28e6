"""Words per second of language/word2vec.py beside gensim's, on one core.

    python -m results.word2vec_speed --out results/word2vec_speed.json      needs gensim 4.4

Both get the same words of Python's library with the same settings (100 numbers, window 5, 5 negatives or a
tree, subsampling at 1e-3, one worker thread or one thread of PyTorch), in documents of at most 10,000 words,
since gensim drops what is behind them. An epoch of each side in turn, --rounds times, in CPU time of the
process; the words are those of the text, before subsampling. Building the vocabulary is not measured.
"""

import json
import os
import time
from pathlib import Path

import gensim
import numpy as np
import torch
from gensim.models import Word2Vec

from data.corpus import documents, find_files
from engine import cpu
from formats import command
from formats.atomic import replace_file
from language.word2vec import Config, train
from language.word_corpus import encode, words_of
from results.in_turn import compared, measure_in_turn

COMMAND = "python -m results.word2vec_speed --out results/word2vec_speed.json"
LONGEST = 10_000  # words of a document that gensim reads
KINDS = [("cbow", False), ("skip_gram", False), ("cbow", True), ("skip_gram", True)]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=400_000, help="words of the text (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default %(default)s)")
    parser.add_argument("--out", type=command.path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]

    # The modules of the library, in an order that is not that of their names.
    modules = [words_of(text) for text in documents(find_files("stdlib", Path("cache")), print)]
    texts, n = [], 0
    for i in np.random.default_rng(0).permutation(len(modules)):
        texts += [modules[i][j : j + LONGEST] for j in range(0, len(modules[i]), LONGEST)]
        n += len(modules[i])
        if n >= args.words:
            break
    corpus = encode(texts, 5)

    def rate(call) -> float:
        began = time.process_time()
        call()
        return len(corpus) / (time.process_time() - began)

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
            "ours": lambda config=config: rate(lambda: train(corpus, config)),
            "gensim": lambda peer=peer: rate(lambda: peer.train(texts, total_examples=len(texts), epochs=1)),
        }
        print(architecture, "hierarchical softmax" if hierarchical else "negative sampling")
        figures = measure_in_turn(sides, args.rounds)
        labels = {"architecture": architecture, "hierarchical": hierarchical}
        rows += compared(figures, "gensim", unit="words", **labels)
        # After each kind, so that an interruption leaves what was measured.
        if args.out:
            about = {"command": f"{COMMAND} --words {args.words} --rounds {args.rounds}"}
            about |= {"cpu": cpu.name(), "threads": 1, "load_average": load, "torch": torch.__version__}
            about |= {
                "gensim": gensim.__version__,
                "words": len(corpus),
                "rounds": args.rounds,
                "results": rows,
            }
            with replace_file(args.out) as new:
                new.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
