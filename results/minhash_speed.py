"""MinHash signatures per second: those of data/near_duplicates.py beside datasketch.

    python -m results.minhash_speed --out results/minhash_speed.json      needs datasketch==2.0.0

The texts are modules of Python's own library. Signatures have 112 hashes. Two comparisons, of CPU time:

    from words     both get the words of each text; datasketch the runs of five as bytes, as its users do
    from hashes    both get a hash of 32 bits for each run of five: what is left are the 112 orders

Each side computes all texts in turn, --rounds times.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import datasketch
import numpy as np

from data import near_duplicates as near
from data.corpus import stdlib_files
from engine import cpu
from formats import command
from formats.atomic import replace_file
from results.in_turn import measure_in_turn

K = near.BANDS * near.ROWS


def ours_from_words(texts: list[list[str]]) -> None:
    signatures = near.Signatures()
    for words in texts:
        signatures.of(np.unique(near.n_grams(words, near.SHINGLE)))


def theirs_from_words(texts: list[list[str]]) -> None:
    for words in texts:
        runs = {" ".join(words[i : i + near.SHINGLE]).encode() for i in range(len(words) - near.SHINGLE + 1)}
        datasketch.MinHash(K).update_batch(runs)


def ours_from_hashes(texts: list[np.ndarray]) -> None:
    signatures = near.Signatures()
    for hashes in texts:
        signatures.of(hashes)


def theirs_from_hashes(texts: list[np.ndarray]) -> None:
    for hashes in texts:
        datasketch.MinHash(K, hashfunc=int).update_batch((hashes >> np.uint64(32)).tolist())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=60, help="modules of the library (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default %(default)s)")
    parser.add_argument("--out", type=command.path, help="write the figures as JSON")
    args = parser.parse_args(argv)

    words = [
        near.words_of(Path(path).read_text(encoding="utf-8")) for _, path in stdlib_files()[: args.texts]
    ]
    words = [some for some in words if len(some) >= near.SHINGLE]
    hashes = [np.unique(near.n_grams(some, near.SHINGLE)) for some in words]
    n = sum(map(len, hashes))

    def rate(side, texts) -> float:
        began = time.process_time()
        side(texts)
        return n / (time.process_time() - began)

    figures = {"command": "python -m results.minhash_speed --out results/minhash_speed.json"}
    figures |= {"cpu": cpu.name(), "python": platform.python_version(), "numpy": np.__version__}
    figures |= {"datasketch": version("datasketch"), "texts": len(words), "shingles": n, "hashes": K}
    for name, ours, theirs, texts in (
        ("from words", ours_from_words, theirs_from_words, words),
        ("from hashes", ours_from_hashes, theirs_from_hashes, hashes),
    ):
        sides = {
            "ours": lambda f=ours, t=texts: rate(f, t),
            "datasketch": lambda f=theirs, t=texts: rate(f, t),
        }
        rates = measure_in_turn(sides, args.rounds)
        ratios = [a / b for a, b in zip(rates["ours"], rates["datasketch"], strict=True)]
        row = {f"{side}, shingles per second": statistics.median(found) for side, found in rates.items()}
        figures[name] = row | {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    print(json.dumps(figures, indent=1))
    if args.out:
        with replace_file(args.out) as new:
            new.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
