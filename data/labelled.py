"""Labelled texts: what a classifier learns from.

{"text": "A waste of two hours.", "label": "bad"}          a line of a .jsonl file

or the same two fields in any other file of records (data/records.py), such as the columns of a .csv.
"""

from pathlib import Path

from data.records import RECORDS, read_records, refuse, suffix_of, text_in


def read_examples(path: Path, text_field: str = "text", label_field: str = "label") -> list[tuple[str, str]]:
    """Return (text, label) of the records of a file, each with these two fields.

    A label may be a string or a whole number. Raises ValueError naming the file and the record that is
    something else, or a file with fewer than two.
    """
    expected = f'expected records {{"{text_field}": ..., "{label_field}": ...}}'
    if suffix_of(path) not in RECORDS:
        raise ValueError(f"{path}: expected a file of records: {', '.join(RECORDS)}, also .gz")
    examples = []
    for place, record in read_records(path, str(path), refuse, (text_field, label_field)):
        text = text_in(record, text_field, place, refuse)
        if isinstance(record.get(label_field), int):
            record[label_field] = str(record[label_field])
        examples.append((text, text_in(record, label_field, place, refuse, "--label-field")))
    if len(examples) < 2:
        raise ValueError(f"{path}: {len(examples)} examples; {expected}, at least two")
    return examples
