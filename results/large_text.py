"""Cleaning a large text: the memory and the time of data/clean.py, and what it finds of what was planted.

    python -m results.large_text --out results/large_text.json                 1 GB, about half an hour
    python -m results.large_text --out results/large_text.json --bytes 4e7     a first try

The text is made of words of Python's own library, drawn by how often they occur there, in sentences and
paragraphs. A document has 2,000 to 6,000 characters. At random, 15 of 100 documents are special:

    5 of 100    an exact copy of one of RECENT earlier documents
    5 of 100    a near copy of one of them, in which every hundredth word is exchanged
    5 of 100    a document that ends with a passage of 60 words, the same in all

All others are unlike each other, so the stages of data/clean.py have a known result: `exact` and `near`
remove as many documents as there are copies, and `substrings` shortens all documents with the passage but the
first. The peak of memory is the largest resident set of the process, as Linux counts it (`VmHWM`). The text
is written to the folder --work, and removed in the end with what was made of it.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

import regex

from data.corpus import documents, stdlib_files
from engine import cpu
from formats import command
from formats.json_file import read_json, write_json
from formats.progress import progress_bar

STAGES = ("rules", "exact", "near", "substrings")
SHARE = 0.05  # of the documents, for each of the three special kinds
RECENT = 2_000  # documents that are kept to be copied
CHANGED = 100  # words of a near copy, of which one is exchanged
STATUS = Path("/proc/self/status")  # of Linux, which has the peak of memory
# What the process runs. `ru_maxrss` would count the process that started it, too.
MEASURED = """
import json, re, sys, time
from data import clean

clean.main(sys.argv[1:])
kilobytes = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps({"CPU minutes": time.process_time() / 60, "peak MB": int(kilobytes) * 1024 / 1e6}))
"""


class Words:
    """Random text of words of Python's library, drawn by how often they occur in it."""

    def __init__(self, seed: int):
        self.generator = random.Random(seed)
        texts = (text for _, text in zip(range(300), documents(stdlib_files(), print), strict=False))
        counts = Counter(word for text in texts for word in regex.findall(r"\b[a-z]+\b", text.lower()))
        self.words, occurrences = zip(*counts.most_common(20_000), strict=True)
        self.cumulative = list(accumulate(occurrences))

    def draw(self, n: int) -> list[str]:
        """Return n words."""
        return self.generator.choices(self.words, cum_weights=self.cumulative, k=n)

    def sentence(self) -> str:
        """Return a sentence of 8 to 20 words."""
        return " ".join(self.draw(self.generator.randint(8, 20))).capitalize() + "."

    def document(self) -> str:
        """Return paragraphs of 2 to 6 sentences, together 2,000 to 6,000 characters or a few more."""
        size, paragraphs = self.generator.randint(2_000, 6_000), []
        while sum(map(len, paragraphs)) < size:
            paragraphs.append(" ".join(self.sentence() for _ in range(self.generator.randint(2, 6))))
        return "\n".join(paragraphs)

    def near_copy(self, text: str) -> str:
        """Return a text in which every CHANGED-th word is another one."""
        words = text.split(" ")
        for i in range(CHANGED // 2, len(words), CHANGED):
            words[i] = self.draw(1)[0] + "ly"
        return " ".join(words)


def write_text(path: Path, n_bytes: int, seed: int) -> Counter:
    """Write documents as .jsonl, n_bytes of text or a few more, and return how many have each label.

    All characters are ASCII, so each is a byte.
    """
    words, recent, planted = Words(seed), [], Counter()
    passage = " ".join(words.draw(60))
    written = 0
    with path.open("w", encoding="utf-8") as file, progress_bar(total=n_bytes, desc="write", unit="B") as bar:
        while written < n_bytes:
            kind = (
                words.generator.random() // SHARE if recent else 3
            )  # 0 to 19, of which 0, 1 and 2 are special
            if kind == 0:
                label, text = "exact copies", words.generator.choice(recent)
            elif kind == 1:
                label, text = "near copies", words.near_copy(words.generator.choice(recent))
            else:
                label, text = "others", words.document()
                if kind == 2:
                    label, text = "with the passage", f"{text}\n{passage}"
                elif len(recent) < RECENT:
                    recent.append(text)
                else:
                    recent[words.generator.randrange(RECENT)] = text
            file.write(json.dumps({"text": text}) + "\n")
            planted[label] += 1
            written += len(text)
            bar.update(len(text))
    return planted


def clean(text: Path, out: Path, workers: int) -> dict:
    """Clean a file in a process of its own, and return its report, minutes, CPU minutes, and peak in MB."""
    flags = ["--out", str(out), "--stages", *STAGES, "--workers", str(workers)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(text), *flags], check=True, text=True, stdout=subprocess.PIPE
    )
    minutes, found = (time.perf_counter() - start) / 60, json.loads(done.stdout.splitlines()[-1])
    return {"minutes": minutes} | found | {"report": read_json(out / "report.json")}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON")
    add("--bytes", type=float, default=1e9, help="bytes of the text (default 1e9)")
    work = Path("runs/large_text")
    add("--work", type=command.path, default=work, help="folder for the text (default %(default)s)")
    add("--workers", type=command.count, default=1, help="processes of data.clean (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the text (default %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.bytes < math.inf:
        raise ValueError(f"--bytes {args.bytes:g}: expected at least 1")
    if not STATUS.is_file():
        raise ValueError(f"there is no {STATUS}, by which the peak of memory is measured; expected Linux")

    # The folder may hold other files, which stay.
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as own:
        planted = write_text(Path(own) / "text.jsonl", int(args.bytes), args.seed)
        found = clean(Path(own) / "text.jsonl", Path(own) / "cleaned", args.workers)
    write_json(args.out, {"cpu": cpu.name(), "workers": args.workers, "planted": planted} | found)
    if not any(args.work.iterdir()):
        args.work.rmdir()


if __name__ == "__main__":
    command.run(main)
