"""Keep the rows of runs that have ended, so that a comparison of many runs continues after an interruption.

    ended = Ended(path, {"steps": 300}, rows="seeds", same=("steps",))
    if not ended.has(seed=0):
        ended.add({"seed": 0, "loss": 1.25})

The file is JSON: what the rows were measured with, and the rows under a name. It is replaced after every run,
all or nothing. A .jsonl file holds the rows alone, one in a line, to which others are added.
"""

import json
from pathlib import Path

import torch

from engine import cpu
from formats.atomic import replace_file


class Ended:
    """The rows that a file holds, and those that are added to it."""

    def __init__(
        self, path: Path, about: dict | None = None, *, rows: str = "rows", same=(), indent: int | None = 1
    ):
        """Read the rows of the file, if there is one.

        about: what is written beside them, after the CPU and the version of PyTorch. rows: their name in the
        file. same: names in `about` whose values the file must have; with others its rows do not count.
        """
        self.path, self.name, self.indent, self.rows = path, rows, indent, []
        self.about = {"cpu": cpu.name(), "torch": torch.__version__} | (about or {})
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            self.rows = [json.loads(line) for line in text.splitlines()]
            return
        known = json.loads(text)
        if all(known.get(name) == self.about[name] for name in same):
            self.rows = known[rows]

    def find(self, **key) -> dict | None:
        """Return the first row with these values, None where there is none."""
        matching = (row for row in self.rows if all(row.get(name) == value for name, value in key.items()))
        return next(matching, None)

    def has(self, **key) -> bool:
        """Return True if there is a row with these values."""
        return self.find(**key) is not None

    def add(self, *rows: dict, order=None) -> None:
        """Add the rows of a run that has ended, and write the file. order: a key to sort all rows by."""
        # As they will be read: tuples become lists, and all keys strings.
        new = json.loads(json.dumps(rows))
        self.rows += new
        if order is not None:
            self.rows.sort(key=order)
        if self.path.suffix == ".jsonl":
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            return
        content = json.dumps(self.about | {self.name: self.rows}, indent=self.indent)
        with replace_file(self.path) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
