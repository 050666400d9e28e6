"""Labelled texts: what a classifier learns from.

    {"text": "A waste of two hours.", "label": "bad"}          a line of a .jsonl file

or the same two fields in any other file of records (data/records.py), such as the columns of a .csv.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NoReturn

from data.records import RECORDS, read_records, suffix_of, text_in


def read_examples(path: Path, text_field: str = "text", label_field: str = "label") -> list[tuple[str, str]]:
    """Return the (text, label) of each record of a file.

    A label may be a string or a whole number, which becomes a string. Raises ValueError for a record without
    these two fields, and for a file with fewer than two records.
    """
    expected = f'expected {{"{text_field}": a string, "{label_field}": a string or a whole number}}'

    def on_bad(problem: str) -> NoReturn:
        raise ValueError(f"{problem}; {expected}")

    if suffix_of(path) not in RECORDS:
        raise ValueError(f"{path}: expected a file of records: {', '.join(RECORDS)}, also .gz")
    examples = []
    for place, record in read_records(path, str(path), on_bad, (text_field, label_field)):
        text = text_in(record, text_field, place, on_bad)
        if isinstance(record.get(label_field), int):
            record[label_field] = str(record[label_field])
        examples.append((text, text_in(record, label_field, place, on_bad, "--label-field")))
    if len(examples) < 2:
        raise ValueError(f"{path}: {len(examples)} examples; {expected}, at least two")
    return examples


def hold_out(
    shuffled: list[tuple[str, str]],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (examples to train on, examples to hold out), of (text, label) in random order.

    Held out is a tenth, the first examples, but never the last one that is left of a label. Raises ValueError
    if no example can be held out.
    """
    left, held_out, examples = Counter(label for _, label in shuffled), [], []
    for text, label in shuffled:
        is_held_out = len(held_out) < math.ceil(len(shuffled) / 10) and left[label] > 1
        left[label] -= is_held_out
        (held_out if is_held_out else examples).append((text, label))
    if not held_out:
        raise ValueError(f"{len(shuffled)} texts, each of another label; expected several texts of a label")
    return examples, held_out
