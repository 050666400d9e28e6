"""Corpora: finding text and cutting it into documents.

A language model learns from a corpus: a collection of texts in a fixed order. Its unit is the *document*, one
text with a beginning and an end of its own: a module, a page, a book. Here a document is a string of one
character or more, and a corpus is one of

    stdlib              the Python standard library's own source, on every machine: one document per module
    book.txt            a file: one document, or one per line if it is .jsonl ({"text": "..."} on each)
    texts/              a folder: its .txt, .md, .py and .jsonl files at any depth, except hidden ones
    "texts/**/*.md"     a glob: the files that match
    https://...         a URL: a file that is downloaded once and kept
    shakespeare         the name of a public corpus (PUBLIC), whose checksum is verified

Any file may be compressed (.gz). Files are sorted by name, so the same text gives the same documents in the
same order on every machine.

Text is UTF-8 without NUL bytes. Anything else (another encoding, binary data, a line of .jsonl that is not an
object with a "text") is reported to the caller with the file and the byte; the caller decides whether to stop
or to leave it out. A file that cannot be read (missing, a cut .gz) is always an error.

    files = find_files("texts/", Path("cache"))
    for text in documents(files, on_bad_text=print): ...
"""

import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path

from formats.atomic import sha256
from formats.progress import progress_bar

SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # the files of a folder that are read; each also with .gz
PUBLIC = {  # name: (URL, SHA-256 of the file)
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}

Files = list[tuple[str, Path]]  # (name in the corpus, path)


def stdlib_files() -> Files:
    """Return the standard library's source files by module name, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        module = path.relative_to(root).with_suffix("").parts
        in_stdlib = module[0] in sys.stdlib_module_names  # site-packages is in the same folder
        is_generated = module[0] in ("encodings", "pydoc_data") or module == ("html", "entities")
        is_test = not {"test", "tests", "idle_test"}.isdisjoint(module)
        if in_stdlib and not is_generated and not is_test:
            files.append((".".join(module), path))
    return sorted(files)


def find_files(data: str, cache: Path) -> Files:
    """Return the files of the corpus that --data names, in a fixed order.

    Downloads are kept in cache. Raises ValueError naming `data` if there is no file or it cannot be
    downloaded.
    """
    # Names and URLs.
    if data == "stdlib":
        files = stdlib_files()
        if not files:
            raise ValueError(
                "--data stdlib: this Python has no source files; name a file or folder of text instead"
            )
        return files
    if data in PUBLIC:
        url, checksum = PUBLIC[data]
        return [(data, download(url, checksum, cache))]
    if data.startswith(("http://", "https://")):
        return [(data, download(data, None, cache))]

    # A folder, or one file.
    path = Path(data)
    if path.is_dir():
        files = []
        for found in path.rglob("*"):
            name = found.relative_to(path)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if not is_hidden and name.name.removesuffix(".gz").endswith(SUFFIXES) and found.is_file():
                files.append((name.as_posix(), found))
        if not files:
            raise ValueError(f"--data {data}: no {', '.join(SUFFIXES)} file in this directory (nor with .gz)")
        return sorted(files)
    if path.is_file():
        return [(path.name, path)]

    # A glob.
    matches = sorted(Path(name) for name in glob.glob(data, recursive=True) if Path(name).is_file())
    if not matches:
        known = ", ".join(["stdlib", *PUBLIC])
        raise ValueError(
            f"--data {data}: no such file or folder, no match as a glob, not a corpus ({known}) or URL"
        )
    return [(match.as_posix(), match) for match in matches]


def download(url: str, checksum: str | None, cache: Path) -> Path:
    """Return the path of the file at url, downloaded into cache/downloads unless it is there already.

    checksum: its SHA-256 in hexadecimal, or None to accept any file. Raises ValueError if the file cannot be
    downloaded, or if its checksum differs; then the file is removed.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rstrip('/').split('/')[-1]}"
    path = cache / "downloads" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(name + ".partial")
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
                size = int(response.headers.get("Content-Length", 0)) or None
                with progress_bar(total=size, unit="B", unit_scale=True, desc="download") as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                if size is not None and file.tell() != size:
                    raise OSError(f"received {file.tell()} of {size} bytes")
        except (OSError, HTTPException) as error:
            raise ValueError(f"--data {url}: cannot be downloaded ({error})") from None
        os.replace(partial, path)
    if checksum is not None and sha256(path) != checksum:
        path.unlink()
        raise ValueError(f"--data {url}: the download's SHA-256 is not {checksum}; it was removed, try again")
    return path


def documents(files: Files, on_bad_text: Callable[[str], None]) -> Iterator[str]:
    """Yield the documents of the files in order: one per file, or one per line of .jsonl.

    Empty documents are left out. So is anything that is not text: on_bad_text is called with a message that
    names its file and byte offset, and may raise an error instead. Raises ValueError for a file that cannot
    be read.
    """
    for name, path in files:
        open_bytes = gzip.open if path.suffix == ".gz" else open
        try:
            with open_bytes(path, "rb") as file:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    offset = 0
                    for line in file:
                        text = decode_json(line, name, offset, on_bad_text) if line.strip() else None
                        if text:
                            yield text
                        offset += len(line)
                else:
                    text = decode(file.read(), name, 0, on_bad_text)
                    if text:
                        yield text
        except (OSError, EOFError, zlib.error) as error:  # the last two for a cut or damaged .gz
            raise ValueError(f"{path}: cannot be read ({error})") from None


def decode(raw: bytes, name: str, offset: int, on_bad_text: Callable[[str], None]) -> str | None:
    """Return the text of raw without its byte order mark; if it is no text, call on_bad_text, return None.

    name: the file's name. offset: the position of raw in the file, in bytes.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad_text(f"{name}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8")
        return None
    if "\0" in text:
        on_bad_text(f"{name}: byte {offset + raw.index(0)} is NUL: binary data, not text")
        return None
    return text.removeprefix("\ufeff")


def decode_json(line: bytes, name: str, offset: int, on_bad_text: Callable[[str], None]) -> str | None:
    """Return the "text" of a line of .jsonl; if there is no such text, call on_bad_text and return None."""
    decoded = decode(line, name, offset, on_bad_text)
    if decoded is None:
        return None
    try:
        text = json.loads(decoded)["text"]
        text.encode()  # escapes can spell half a surrogate pair, which has no UTF-8
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = None
    if text is None or "\0" in text:
        on_bad_text(f'{name}: the line at byte {offset} is not an object with a "text" of valid characters')
        return None
    return text
