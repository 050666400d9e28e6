"""Parts: files with some megabytes of documents each, which stages of cleaning read and write one by one.

    folder/part-00000.jsonl      a document on each line: {"place": ..., "text": ..., "record": {...}}
    folder/counts-00000.json     what happened to the documents of that part; it is written last

So memory holds one part, and after an interruption only the parts without counts are made again. `each` does
the work for all parts: in this process, in several, or on a Ray cluster whose machines share the folder.
"""

import gzip
import io
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data.records import zstandard_for
from formats.atomic import replace_file
from formats.progress import progress_bar

PART_BYTES = 16 << 20  # of text in a part
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
ENGINES = ("local", "ray")
RAY_STORE_BYTES = (
    100 << 20
)  # of memory that a cluster here shares: documents go through files, not through it

Document = dict[str, Any]  # "place": where it came from; "text"; "record": its other fields


def part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.jsonl"


def counts_of(folder: Path, number: int) -> Path:
    return folder / f"counts-{number:05}.json"


def n_parts(folder: Path) -> int:
    return len(list(folder.glob("part-*.jsonl")))


def as_line(row: dict) -> str:
    """Return a row as a line of JSON. NaN and infinities, which JSON lacks, become null; other values that it
    lacks, such as dates, become strings."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in line or "Infinity" in line:  # perhaps in a text only
        row = json.loads(line, parse_constant=lambda name: None)
        line = json.dumps(row, ensure_ascii=False)
    # Lone surrogates cannot be written as UTF-8: such a row is written with escapes.
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line + "\n"


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as lines of JSON to a file, all or nothing."""
    with replace_file(path) as new, open(new, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(as_line, rows))


def read_lines(path: Path) -> Iterator[dict]:
    """Yield the rows of a file that `write_lines` wrote."""
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


class Documents:
    """The documents of all parts of a folder by their number, of which few are in memory."""

    def __init__(self, folder: Path):
        self.folder, self.starts = folder, []  # the bytes at which the lines of each part begin
        for number in range(n_parts(folder)):
            with open(part(folder, number), "rb") as file:
                lengths = np.fromiter(map(len, file), np.int64)
            self.starts.append(np.cumsum(lengths) - lengths)
        # The number of the first document of each part, and at the end the number of all documents.
        self.first = [0, *np.cumsum([len(starts) for starts in self.starts]).tolist()]

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, i: int) -> Document:
        number = bisect_right(self.first, i) - 1
        with open(part(self.folder, number), "rb") as file:
            file.seek(int(self.starts[number][i - self.first[number]]))
            return json.loads(file.readline())

    def in_order(self) -> Iterator[Document]:
        for number in range(len(self.first) - 1):
            yield from read_lines(part(self.folder, number))


def each(work: Callable[[int], None], n: int, what: str, engine: str, workers: int) -> None:
    """Call work(0) ... work(n - 1), which read and write files. what: the label of the progress bar.

    engine: "local" with so many processes (workers), or "ray" with the cluster that the environment names, or
    one here. Raises ValueError if Ray is missing.
    """
    bar = partial(progress_bar, total=n, desc=what, unit="part")
    if engine == "ray":
        for _ in bar(on_ray(work, n, workers)):
            pass
    elif workers == 1:
        for i in bar(range(n)):
            work(i)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for _ in bar(pool.map(work, range(n))):
                pass


def on_ray(work: Callable[[int], None], n: int, workers: int) -> Iterator[None]:
    """Yield after each of work(0) ... work(n - 1), which are tasks of a Ray cluster. Raises their errors."""
    ray, folder = ray_for(workers), os.getcwd()

    @ray.remote
    def task(number: int) -> None:
        os.chdir(folder)  # relative paths mean the same on every machine
        work(number)

    for done in [task.remote(number) for number in range(n)]:
        try:
            yield ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the error itself, without the trace of the worker in its message


def ray_for(workers: int) -> Any:
    """Return the package of Ray, connected to the cluster of RAY_ADDRESS, or to one that it starts here."""
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install ray") from None
    if not ray.is_initialized():
        here = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": RAY_STORE_BYTES}
        here = {} if os.environ.get("RAY_ADDRESS") else here
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    return ray


def write_records(path: Path, records: list[dict]) -> None:
    """Write records to a file in the format of its suffix, one of FORMATS, all or nothing.

    The same records give the same bytes. Raises ValueError if a package is missing.
    """
    with replace_file(path) as new:
        if path.suffix == ".parquet":
            write_parquet(path, new, records)
            return
        raw = "".join(map(as_line, records)).encode()
        if path.suffix == ".gz":
            packed = io.BytesIO()
            with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:  # no time, no name
                file.write(raw)
            raw = packed.getvalue()
        elif path.suffix == ".zst":
            raw = zstandard_for(path).ZstdCompressor().compress(raw)
        new.write_bytes(raw)


def write_parquet(path: Path, new: Path, records: list[dict]) -> None:
    """Write records to the file `new` as parquet, with a column for each field that any of them has.

    path: the file of the messages. Raises ValueError without pyarrow, and for a field with values of several
    types, or with one that parquet lacks, such as an integer of more than 64 bits.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: writing parquet needs pyarrow: pip install pyarrow") from None
    # `Table.from_pylist` would take the fields of the first record alone.
    fields = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in fields}
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), new)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(
            f"{path}: fields do not fit into columns ({str(error)[:200]}); write --format jsonl"
        ) from None
