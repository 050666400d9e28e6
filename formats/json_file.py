"""JSON files: read with errors that name the file, and replaced only once they are complete."""

import json
import math
from pathlib import Path

from formats.atomic import replace_file


def read_json(path: Path, expected: str = "a directory in Hugging Face layout") -> dict:
    """Return the object in a JSON file.

    expected: what the user should have named, for the error if there is no such file. Raises ValueError in
    that case, and if the content is damaged or is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); write or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def json_line(row: dict) -> str:
    """Return a row of a log as a line of JSON. NaN and infinities, which JSON lacks, become null."""
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(numbers, allow_nan=False) + "\n"


def write_json(path: Path, content: dict, indent: int = 2, end: str = "\n") -> None:
    """Write an object to a JSON file, which replaces the old one only once it is complete.

    indent: spaces per level. end: what follows the closing bracket.
    """
    with replace_file(path) as new:
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        new.write_text(text + end, encoding="utf-8")
