"""Keep the rows of runs that have ended, so that a comparison of many runs continues after an interruption.

    ended = Ended(path, {"steps": 300}, rows="seeds", same=("steps",))
    if not ended.has(seed=0):
        ended.add({"seed": 0, "loss": 1.25})

The file is a JSON object: what the rows were made with, and the rows under a name. It is replaced after every
run, all or nothing.
"""

import json
from pathlib import Path

import torch

from engine import cpu
from formats.json_file import read_json, write_json


def machines(known: dict) -> dict[str, str]:
    """Return this machine's CPU and version of PyTorch, after those that a file names, whose figures stay."""
    here = {"cpu": cpu.name(), "torch": torch.__version__}
    earlier = {name: known.get(name, value).split("; ") for name, value in here.items()}
    return {name: "; ".join(dict.fromkeys([*earlier[name], value])) for name, value in here.items()}


class Ended:
    """The rows that a file holds, and those that are added to it."""

    def __init__(
        self, path: Path, about: dict | None = None, *, rows: str = "rows", same=(), indent: int | None = 1
    ):
        """Read the rows of the file, if there is one.

        about: what is written beside the rows, after the CPU and the version of PyTorch. rows: their name in
        the file. same: names in `about` whose values the file must have, because rows made with others cannot
        be compared. indent: spaces by which the JSON is indented; None writes one line.

        Raises ValueError if the file is damaged, has no such rows, or was made with other values of `same`.
        """
        self.path, self.name, self.indent, self.rows = path, rows, indent, []
        # All is kept as it will be read: tuples become lists, and all keys strings.
        self.about = json.loads(json.dumps(machines({}) | (about or {})))
        if not path.exists():
            return
        known = read_json(path, "a file of figures")
        for name in same:
            if known.get(name) != self.about[name]:
                raise ValueError(
                    f"{path} holds rows made with {name} {known.get(name)!r}, and this call has "
                    f"{self.about[name]!r}: name another file, or remove this one"
                )
        if rows not in known:
            raise ValueError(f"{path} holds no {rows!r}: it is of another script; name another file")
        self.rows = known[rows]
        self.about |= machines(known)

    def find(self, **key) -> dict | None:
        """Return the first row with these values, None where there is none."""
        matching = (row for row in self.rows if all(row.get(name) == value for name, value in key.items()))
        return next(matching, None)

    def has(self, **key) -> bool:
        """Return True if there is a row with these values."""
        return self.find(**key) is not None

    def add(self, *rows: dict) -> None:
        """Add the rows of a run that has ended, and write the file."""
        self.rows += json.loads(json.dumps(rows))
        write_json(self.path, self.about | {self.name: self.rows}, indent=self.indent)
