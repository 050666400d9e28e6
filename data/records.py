"""Text and records: reading text from files of the common formats.

    .jsonl .ndjson      a record is a JSON value on a line of its own
    .json               the records are the items of one array; or there is one on each line
    .csv .tsv           the first row names the columns, and each further row is a record
    .parquet            a record is a row (needs pyarrow)
    anything else       text without records

Suffixes may be in capitals, and any file may be compressed: .gz, or .zst (needs zstandard). Text is UTF-8, or
UTF-16 or UTF-32 with a byte order mark. Anything else, and a line that is not of the suffix's format, is
reported by calling on_bad with a message that names the file and the place; on_bad may raise an error to stop
the reading. A file that cannot be read (missing, a cut .gz) is always a ValueError.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # suffixes of files of records
WIDE = {  # byte order mark: encoding; those of UTF-32 first, since UTF-16's begins one of them
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
NOT_TEXT = {  # first bytes: a kind of file that is often taken for text
    b"PK\x03\x04": "a zip archive, as .docx and .xlsx are; unpack it",
    b"%PDF-": "a PDF; convert it to text",
    b"PAR1": "parquet; name it .parquet",
    b"BZh": "compressed by bzip2; unpack it, or use gzip",
    b"\xfd7zXZ": "compressed by xz; unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; name it .zst",
}
LONGEST_CELL = 1 << 30  # characters in a cell of a .csv

OnBad = Callable[[str], None]


def suffix_of(path: Path) -> str:
    """Return the suffix in small letters, without a .gz or .zst behind it: ".csv" for data.CSV.gz."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix


def check_is_file(path: Path, what: str) -> None:
    """Raise ValueError beginning with `what` for a pipe or a device, which cannot be read a second time."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        kind = "a pipe" if path.is_fifo() else "a device"
        raise ValueError(f"{what}: {kind}; expected a file, since text is read more than once")


def zstandard_for(path: Path) -> Any:
    """Return the package that reads and writes .zst. Raises ValueError naming the path if it is missing."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path}: .zst needs zstandard: pip install zstandard") from None
    return zstandard


def unpacked(path: Path) -> BinaryIO:
    """Open a file for reading as bytes, unpacked by its suffix, or by the first bytes of gzip."""
    if path.name.lower().endswith(".zst"):
        decompressor, file = zstandard_for(path).ZstdDecompressor(), open(path, "rb")  # noqa: SIM115
        # A file may hold several frames, one behind the other.
        stream = decompressor.stream_reader(file, read_across_frames=True)
        return io.BufferedReader(Unpacked(stream))
    with open(path, "rb") as file:
        is_packed = path.name.lower().endswith(".gz") or file.peek(2)[:2] == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_packed else open(path, "rb")


class Unpacked(io.RawIOBase):
    """The content of a .zst. Damage to it raises OSError in the place of the package's own ZstdError."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self.stream.readinto(buffer)
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise OSError(f"damaged .zst: {error}") from None

    def close(self) -> None:
        self.stream.close()
        super().close()


@contextmanager
def open_utf8(path: Path, name: str, on_bad: OnBad) -> Iterator[BinaryIO]:
    """Open a file of text or records for reading as bytes: unpacked, and UTF-16 turned into UTF-8.

    Raises ValueError if the file cannot be read, also while it is being read.
    """
    check_is_file(path, str(path))
    try:
        with unpacked(path) as file:
            head = file.peek(4)[:4]
            encoding = next((WIDE[mark] for mark in WIDE if head.startswith(mark)), None)
            if encoding is None:
                yield file
                return
            try:
                text = file.read().decode(encoding)
            except UnicodeDecodeError as error:
                on_bad(f"{name}: byte {error.start} is not {encoding}, which its byte order mark promises")
                text = ""
            yield io.BytesIO(text.encode())
    except (OSError, EOFError, zlib.error) as error:  # the last two for a cut or damaged .gz
        raise ValueError(f"{path}: cannot be read ({error})") from None


def decode(raw: bytes, name: str, offset: int, on_bad: OnBad) -> str | None:
    """Return the text of raw without its byte order mark; if it is no text, call on_bad and return None.

    name: the file's name. offset: the position of raw in the file, in bytes.
    """
    kind = next((f" ({kind})" for magic, kind in NOT_TEXT.items() if raw.startswith(magic)), "")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad(f"{name}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8{kind}")
        return None
    if "\0" in text:
        on_bad(f"{name}: byte {offset + raw.index(0)} is NUL: binary data, not text{kind}")
        return None
    return text.removeprefix("\ufeff")


def read_records(
    path: Path, name: str, on_bad: OnBad, fields: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of the records in a file with one of the suffixes RECORDS.

    The value is what JSON holds, and for a table a dict by column. fields: the columns that are needed, since
    parquet may hold many more; none given means all. Raises ValueError for a file that cannot be read.
    """
    suffix = suffix_of(path)
    with open_utf8(path, name, on_bad) as file:
        if suffix == ".parquet":
            yield from parquet_rows(file, name, fields)
        elif suffix in (".csv", ".tsv"):
            yield from table_rows(file, name, on_bad, commas=suffix == ".csv")
        else:
            yield from (json_items if suffix == ".json" else json_lines)(file, name, on_bad)


def json_lines(file: BinaryIO, name: str, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each line that is not empty."""
    offset = 0
    for number, line in enumerate(file, 1):
        text = decode(line, f"{name}, line {number}", offset, on_bad)
        place = f"{name}, line {number}: byte {offset}"
        offset += len(line)
        if not text or not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            on_bad(f"{place}: {text[:60]!r} is not JSON ({error})")
        else:
            yield place, value


def json_items(file: BinaryIO, name: str, on_bad: OnBad) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of the items of an array. A file of several values has one on each line."""
    raw = file.read()
    text = decode(raw, name, 0, on_bad)
    if not text or not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) == "Extra data":  # behind the first value
            yield from json_lines(io.BytesIO(raw), name, on_bad)
        else:
            on_bad(f"{name}: {text[:60]!r} is not JSON ({error})")
        return
    items = content if isinstance(content, list) else [content]
    yield from ((f"{name}, item {number}", item) for number, item in enumerate(items, 1))


def table_rows(file: BinaryIO, name: str, on_bad: OnBad, commas: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place, {column: cell}) of the rows of a .csv, or of a .tsv; the first row names the columns.

    A row with more or fewer cells than there are columns is reported: a comma or a quotation mark is then
    where none was meant.
    """
    # Bytes that are no UTF-8 become lone surrogates, which are reported where a cell is used. The byte order
    # mark is taken off here, since a quotation mark behind it would not begin a cell.
    lines = (
        line.decode("utf-8", "surrogateescape").removeprefix("" if i else "\ufeff")
        for i, line in enumerate(file)
    )
    if not commas:
        lines = list(lines)
    options = {"strict": True} if commas else {"delimiter": "\t", **tab_options(lines)}
    columns: list[str] = []
    for line, row in rows_of(lines, name, on_bad, options):
        place = f"{name}, line {line}"
        if not columns:
            columns = row
            if len(set(columns)) < len(columns):
                on_bad(f"{place}: two columns of the same name in {', '.join(columns)}")
                return
        elif len(row) != len(columns):
            on_bad(f"{place}: {len(row)} cells, but {len(columns)} columns: {', '.join(columns)}")
        else:
            yield place, dict(zip(columns, row, strict=True))


def rows_of(lines: Any, name: str, on_bad: OnBad, options: dict) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of each row that is not empty."""
    # A setting of the whole process. The default of 128 kB is less than a document may have.
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(lines, **options)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            on_bad(f"{name}, line {first}: {error}")
            continue
        if row is None:
            return
        if row:
            yield first, row


def tab_options(lines: list[str]) -> dict:
    """Return the options of csv.reader for a .tsv: with quoting if the whole table fits it, else without.

    Spreadsheets quote cells that hold tabs. Most other tables have no quoting, but stray quotation marks,
    with which rows get an error or different numbers of cells.
    """
    quoted = {"strict": True, "quoting": csv.QUOTE_MINIMAL}
    problems: list[str] = []
    rows = [row for _, row in rows_of(lines, "", problems.append, {"delimiter": "\t", **quoted})]
    if problems or len({len(row) for row in rows}) > 1:
        return {"quoting": csv.QUOTE_NONE}
    return quoted


def parquet_rows(file: BinaryIO, name: str, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield (place, {column: value}) of the rows.

    Raises ValueError if pyarrow is not installed, or if the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        is_there = set(fields) <= set(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(1024, columns=list(fields) if fields and is_there else None):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read as parquet ({error})") from None


def converted(path: Path, what: str, expected: str, convert: Callable[[Any], Any], on_bad: OnBad) -> list:
    """Return convert(value) for each record of a file. convert raises ValueError for a record it refuses.

    what, expected: what the file holds and the forms of a record, for messages. on_bad is called with a
    message for a refused record, and may raise an error; otherwise the record is left out. Raises ValueError
    for a file that cannot be read, or without such records.
    """
    if suffix_of(path) not in RECORDS:
        raise ValueError(f"{path}: expected a file of {what}: {', '.join(RECORDS)}, also .gz")
    found = []
    for place, record in read_records(path, str(path), on_bad):
        try:
            found.append(convert(record))
        except ValueError as error:
            on_bad(f"{place}: {error}")
    if not found:
        raise ValueError(f"{path}: has no {what}; {expected}")
    return found


def refuse(problem: str) -> NoReturn:
    """Raise ValueError: the on_bad of readers that stop at the first problem."""
    raise ValueError(problem)


def text_in(value: Any, field: str, place: str, on_bad: OnBad, flag: str = "--text-field") -> str | None:
    """Return the string in a field of a record; if there is none, call on_bad and return None.

    flag: of the command line, by which the user names the field.
    """
    if not isinstance(value, dict):
        on_bad(f"{place}: {value!r:.60}: expected an object with a field {field!r}")
        return None
    if field not in value:
        known = ", ".join(map(repr, value)) or "none"
        on_bad(f"{place}: no field {field!r}, it has {known:.300}; name one of these by {flag}")
        return None
    text = value[field]
    if not isinstance(text, str):
        on_bad(f"{place}: {field!r} is {text!r:.60}; expected a string")
        return None
    return text if is_valid(text, f"{place}: {field!r}", on_bad) else None


def is_valid(text: str, place: str, on_bad: OnBad) -> bool:
    """Return whether a string of a record is text: UTF-8 without NUL. If it is not, call on_bad."""
    try:
        text.encode()  # escapes can spell half a surrogate pair, which has no UTF-8
    except UnicodeEncodeError as error:
        on_bad(f"{place}: character {error.start} is not valid in UTF-8")
        return False
    if "\0" in text:
        on_bad(f"{place}: character {text.index(chr(0))} is NUL: binary data, not text")
        return False
    return True
