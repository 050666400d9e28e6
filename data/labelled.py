"""Labelled texts: what a classifier learns from.

{"text": "A waste of two hours.", "label": "bad"}          one line of a .jsonl or .jsonl.gz file
"""

import gzip
import json
import zlib
from pathlib import Path


def read_examples(path: Path) -> list[tuple[str, str]]:
    """Return (text, label) of the lines of a .jsonl[.gz] file, each an object with these two fields.

    Raises ValueError naming the file and the line that is something else, or a file with fewer than two.
    """
    expected = 'expected lines of {"text": ..., "label": ...}'
    try:
        raw = path.read_bytes()
        content = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {expected}") from None
    examples = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            text, label = example["text"], example["label"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: {line[:60]!r}: {expected}") from None
        if not isinstance(text, str) or not isinstance(label, str | int):
            raise ValueError(f"{path}, line {number}: {line[:60]!r}: {expected}, both of them strings")
        examples.append((text, str(label)))
    if len(examples) < 2:
        raise ValueError(f"{path}: {len(examples)} examples; {expected}, at least two")
    return examples
