"""Planted dirt in the library's text: what each stage of data/clean.py finds of it, and what else it takes.

    python -m results.dirty_text --out results/dirty_text.json      ten seconds of one core

The text is modules of Python's own library, each cut to 20,000 characters. Dirt is planted in it, and each
document has a label:

    exact copies          of whole modules
    near copies           with some lines dropped and new ones added, so that the Jaccard similarity J to the
                          original (of shingles, data/near_duplicates.py) is from .4 to 1
    a licence             of 78 words, at the head of half of the modules
    junk                  base64, minified code, shuffled characters, one line 200 times, generated tables
    test items            in modules: questions of 30 words or 6, word by word, or with other words between
                          (paraphrased)

Counted are: the documents of each label, "clean" among them, that each stage removes; the near copies that it
finds, beside the number that the S-curve of its hashes lets it expect; and the licences that are cut, which
are all but the first.
"""

import argparse
import base64
import json
import random
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from data import clean, near_duplicates
from data.corpus import stdlib_files
from engine import cpu
from formats import command
from formats.json_file import write_json

LONGEST = 20_000  # characters of a module
LICENCE = "\n".join(
    f"# {line}"
    for line in (
        "Permission to use, copy and change this plinth and what stands upon it is granted to everybody,",
        "for any purpose and without a fee, as long as these lines stay at the head of every copy of it.",
        "The masons give no warranty of any kind that the column will stand, and are not liable for what",
        "falls down when it does not, whether by wind, by frost, or by a reader who leans too far over it.",
    )
)
NOUNS = "heron lantern quarry saffron glacier trumpet orchard barge cinder thimble walnut anvil".split()  # noqa: SIM905


def near_copy(text: str, share: float, generator: random.Random) -> str:
    """Return a text with this share of its lines dropped and as many new ones added."""
    lines = [line for line in text.split("\n") if generator.random() > share]
    for _ in range(round(share * len(lines))):
        a, b, c = generator.choices(NOUNS, k=3)
        lines.insert(generator.randrange(len(lines) + 1), f"    {a}_{b} = {c}(self.{b}, {a})")
    return "\n".join(lines)


def junk(kind: str, text: str, generator: random.Random) -> str:
    """Return text of a kind that no model should learn from. text: what is minified or shuffled."""
    if kind == "base64":
        return base64.b64encode(generator.randbytes(3000)).decode()
    if kind == "minified":
        return ";".join(line.strip() for line in text.split("\n"))
    if kind == "shuffled":
        return "".join(generator.sample(text, len(text)))
    if kind == "one line":
        return f"{generator.choice(NOUNS)} = {generator.choice(NOUNS)}\n" * 200
    return "\n".join(", ".join(f"0x{generator.randrange(1 << 16):04x}" for _ in range(8)) for _ in range(100))


def item(generator: random.Random, n: int) -> str:
    """Return a question of n random words."""
    return " ".join(f"{generator.choice(NOUNS)}{generator.choice('abcdefgh')}" for _ in range(n))


def plant(texts: list[str], seed: int) -> tuple[list[dict], list[dict]]:
    """Return records {"id", "text", "label", ...}, in which copies come after their originals, and the test
    items {"question"}."""
    generator = random.Random(seed)
    records, items, n = [], [], len(texts)
    # The modules: every second one with the licence, every twelfth with an item, the others clean.
    for i, text in enumerate(texts):
        record = {"label": "clean", "text": text}
        if i % 2:
            record = {"label": "licence", "text": f"{LICENCE}\n{text}"}
        if i % 12 == 4:
            kind = ("30 words", "6 words", "paraphrased")[i // 12 % 3]
            question = item(generator, 6 if kind == "6 words" else 30)
            spelt = question
            if kind == "paraphrased":
                spelt = " ".join(word + " indeed" * (j % 5 == 0) for j, word in enumerate(question.split()))
            record = {"label": f"item, {kind}", "text": f"{text}\n# {spelt}\n"}
            items.append({"question": question})
        records.append(record)
    generator.shuffle(records)

    # Copies of a quarter of as many modules, a third of them exact, and junk.
    sources = generator.sample([row for row in records if row["label"] == "clean"], n // 4)
    for row in sources[: n // 12]:
        records.append({"label": "exact copy", "text": row["text"]})
    for row in sources[n // 12 :]:
        text = near_copy(row["text"], generator.uniform(0.002, 0.12), generator)
        sets = near_duplicates.shingles(row["text"]), near_duplicates.shingles(text)
        records.append({"label": "near copy", "text": text, "similarity": near_duplicates.jaccard(*sets)})
    for i, kind in enumerate(["base64", "minified", "shuffled", "one line", "table"] * (n // 40)):
        records.append({"label": f"junk, {kind}", "text": junk(kind, texts[i], generator)})
    return [{"id": i} | row for i, row in enumerate(records)], items


def measure(texts: list[str], seed: int) -> dict:
    """Return what the stages find of the dirt that is planted from this seed, and what else they take."""
    records, items = plant(texts, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        for name, rows in (("dirty", records), ("items", items)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
        argv = [f"{folder}/dirty.jsonl", "--out", str(out), "--preset", "code", "--keep-rejected"]
        argv += ["--stages", "rules", "exact", "near", "substrings", "--against", f"{folder}/items.jsonl"]
        with redirect_stdout(None):
            clean.main(argv)
        gone = [
            json.loads(line)
            for path in sorted((out / "rejected").glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
    return figures(records, gone)


def figures(records: list[dict], gone: list[dict]) -> dict:
    """Return how many documents of each label each stage removed, the near copies found and expected, and the
    licences cut.

    records: all documents, as `plant` returns them. gone: the records of --keep-rejected.
    """
    planted = Counter(row["label"] for row in records)
    taken = {stage: Counter() for stage in ("rules", "exact", "near", "substrings", "decontaminate")}
    for row in gone:
        if row["stage"] != "substrings" or row["reason"].startswith("nothing but"):
            taken[row["stage"]][row["record"]["label"]] += 1

    # The near copies that earlier stages left, and the mean and standard deviation of how many are found.
    before = {row["record"]["id"] for row in gone if row["stage"] in ("rules", "exact")}
    left = [row for row in records if row["label"] == "near copy" and row["id"] not in before]
    alike = [row for row in left if row["similarity"] >= near_duplicates.SIMILARITY]
    chances = np.array([near_duplicates.s_curve(row["similarity"]) for row in alike])
    ids = {row["record"]["id"] for row in gone if row["stage"] == "near"}
    near = {"near copies": len(left), "of J from .75": len(alike)}
    near |= {"found of these": sum(row["id"] in ids for row in alike), "expected": float(chances.sum())}
    near |= {"sigma": float(np.sqrt((chances * (1 - chances)).sum()))}
    near["found below .75"] = sum(row["id"] in ids for row in left) - near["found of these"]

    # The licences that are cut. The first stays.
    pieces = [row for row in gone if row["stage"] == "substrings"]
    licences = sum("without a fee, as long as these lines" in row["text"] for row in pieces)
    n_reached = sum(row["label"] == "licence" and row["id"] not in before | ids for row in records)
    cut = {"licences": licences, "of": n_reached - 1, "bytes in all": sum(len(row["text"]) for row in pieces)}
    return {
        "planted": dict(planted),
        "taken": {k: dict(v) for k, v in taken.items()},
        "near": near,
        "cut": cut,
    }


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--texts", type=command.count, default=360, help="modules of the library (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the dirt (default %(default)s)")
    parser.add_argument("--out", type=command.new_file, required=True, help="file for the figures, JSON")
    args = parser.parse_args(argv)
    texts = [Path(path).read_text(encoding="utf-8")[:LONGEST] for _, path in stdlib_files()]
    texts = [text for text in texts if len(text) > 1000][: args.texts]
    found = {"cpu": cpu.name(), "texts": len(texts), "seed": args.seed} | measure(texts, args.seed)
    write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    command.run(main)
