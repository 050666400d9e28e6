"""MinHash signatures per second: those of data/near_duplicates.py beside datasketch.

    python -m results.minhash_speed --out results/minhash_speed.json      needs datasketch==2.0.0

The texts are modules of Python's own library. A signature has 112 hashes, the smallest of a text's shingles
(runs of five words) in 112 random orders. Two comparisons, of CPU time:

    from words     both get the words of each text. datasketch hashes each shingle as bytes, as its users do
    from hashes    both get a hash of 32 bits for each shingle, so that only the 112 orders are measured

The sides take turns, --rounds times; each computes the signatures of all texts.
"""

import json
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version

import numpy as np

from data import near_duplicates as near
from data.corpus import stdlib_files
from engine import cpu
from formats import command
from formats.json_file import write_json
from results.in_turn import measure_in_turn, rate
from results.peers import require

K = near.BANDS * near.ROWS  # hashes of a signature


def ours_from_words(texts: list[list[str]]) -> None:
    signatures = near.Signatures()
    for words in texts:
        signatures.of(np.unique(near.n_grams(words, near.SHINGLE)))


def theirs_from_words(texts: list[list[str]]) -> None:
    import datasketch

    for words in texts:
        runs = {" ".join(words[i : i + near.SHINGLE]).encode() for i in range(len(words) - near.SHINGLE + 1)}
        datasketch.MinHash(K).update_batch(runs)


def ours_from_hashes(texts: list[np.ndarray]) -> None:
    signatures = near.Signatures()
    for hashes in texts:
        signatures.of(hashes)


def theirs_from_hashes(texts: list[np.ndarray]) -> None:
    import datasketch

    for hashes in texts:
        datasketch.MinHash(K, hashfunc=int).update_batch((hashes >> np.uint64(32)).tolist())


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--texts", type=command.count, default=60, help="modules of the library (default %(default)s)")
    add("--rounds", type=command.count, default=5, help="measurements of each side (default %(default)s)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("datasketch", "datasketch==2.0.0")

    # The texts as both comparisons get them: lists of words, and the different shingles' hashes.
    words = [near.words_of(path.read_text(encoding="utf-8")) for _, path in stdlib_files()[: args.texts]]
    words = [some for some in words if len(some) >= near.SHINGLE]
    hashes = [np.unique(near.n_grams(some, near.SHINGLE)) for some in words]
    n = sum(map(len, hashes))

    figures = {"command": "python -m results.minhash_speed --out results/minhash_speed.json"}
    figures |= {"cpu": cpu.name(), "python": platform.python_version(), "numpy": np.__version__}
    figures |= {"datasketch": version("datasketch"), "texts": len(words), "shingles": n, "hashes": K}
    for name, ours, theirs, texts in (
        ("from words", ours_from_words, theirs_from_words, words),
        ("from hashes", ours_from_hashes, theirs_from_hashes, hashes),
    ):
        sides = {"ours": partial(ours, texts), "datasketch": partial(theirs, texts)}
        timed = {side: partial(rate, call, n, clock=time.process_time) for side, call in sides.items()}
        rates = measure_in_turn(timed, args.rounds)
        ratios = [a / b for a, b in zip(rates["ours"], rates["datasketch"], strict=True)]
        row = {f"{side}, shingles per second": statistics.median(found) for side, found in rates.items()}
        figures[name] = row | {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    print(json.dumps(figures, indent=1))
    if args.out:
        write_json(args.out, figures, indent=1)


if __name__ == "__main__":
    command.run(main)
