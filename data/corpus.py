"""Corpora: finding text and cutting it into documents.

A language model learns from a corpus: a collection of texts in a fixed order. Its unit is the *document*, one
text with a beginning and an end of its own: a module, a page, a book. Here a document is a string of one
character or more, and a corpus is one of

    stdlib              the Python standard library's own source, on every machine: one document per module
    book.txt            a file: one document, or one per record if it is of records (data/records.py)
    texts/              a folder: its .txt, .md, .py and .jsonl files at any depth, except hidden ones
    "texts/**/*.csv"    a glob: the files that match
    https://...         a URL: a file that is downloaded once and kept
    shakespeare         the name of a public corpus (PUBLIC), whose checksum is verified

Any file may be compressed (.gz, .zst). Links are followed, and a file that several names lead to counts once.
Files are sorted by name, so the same text gives the same documents in the same order on every machine.

Text is UTF-8 without NUL bytes, or UTF-16 or UTF-32 with a byte order mark. Anything else (another encoding,
binary data, a record without the field that holds the text) is reported to the caller with the file and the
place; the caller decides whether to stop or to leave it out. A file that cannot be read (missing, a cut .gz)
is always an error.

    files = find_files("texts/", Path("cache"))
    for text in documents(files, on_bad_text=print): ...
"""

import glob
import hashlib
import os
import re
import sys
import sysconfig
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit

from data.records import RECORDS, check_is_file, decode, open_utf8, read_records, suffix_of, text_in
from formats.atomic import replace_file, sha256
from formats.progress import progress_bar

SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # the files of a folder that are read; each also with .gz or .zst
URL_CHARACTERS = ":/?#[]@!$&'()*+,;=%"  # besides letters and digits; others, such as é, are percent-encoded
LONGEST_NAME = 60  # characters of a URL's last part in the name of a file, which may have 255 bytes
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


def find_files(
    data: str,
    cache: Path,
    notify: Callable[[str], None] = lambda message: None,
    flag: str = "--data",
) -> Files:
    """Return the files of the corpus that --data names, in a fixed order.

    Downloads are kept in cache. notify is called with one line if files of a folder are left out. flag: the
    command line's flag for data, for errors. Raises ValueError naming `data` if there is no file or it cannot
    be downloaded.
    """
    # Names and URLs.
    if not data:
        raise ValueError(f"{flag} '': expected a file, folder, glob or URL, found an empty value")
    if data == "stdlib":
        files = stdlib_files()
        if not files:
            raise ValueError(
                f"{flag} stdlib: this Python has no source files; name a file or folder of text instead"
            )
        return files
    if data in PUBLIC:
        url, checksum = PUBLIC[data]
        return [(data, download(url, checksum, cache, flag))]
    if data.startswith(("http://", "https://")):
        return [(data, download(data, None, cache, flag))]

    # A folder, or one file.
    path = Path(data)
    if path.is_dir():
        return files_in(path, notify, flag)
    if path.exists():
        check_is_file(path, f"{flag} {data}")
        return [(path.name, path)]

    # A glob.
    matches = [Path(name) for name in expand(data) if os.path.isfile(name)]
    if not matches:
        known = ", ".join(["stdlib", *PUBLIC])
        raise ValueError(
            f"{flag} {data}: no such file or folder, no match as a glob, not a corpus ({known}) or URL"
        )
    return each_once([(match.as_posix(), match) for match in matches], Path(), notify)


def files_in(root: Path, notify: Callable[[str], None], flag: str) -> Files:
    """Return the files of text in a folder by their names in it; those of other kinds are counted."""
    found, others = [], Counter()
    for folder in folders_below(root):
        for name in os.listdir(folder):
            path = Path(folder, name)
            if name.startswith(".") or path.is_dir():
                continue
            if suffix_of(path) not in SUFFIXES:
                others[suffix_of(path) or "no suffix"] += 1
            elif not path.exists():
                raise ValueError(f"{path}: a link to {os.readlink(path)}, which does not exist; remove it")
            elif not path.is_file():
                others["no file"] += 1
            else:
                found.append((path.relative_to(root).as_posix(), path))

    # Name what is left out, and how it can be read.
    kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) + ", ..." * (len(others) > 5)
    readable = next((kind for kind in others if kind in RECORDS), None)
    advice = f"; a glob reads them: '{root.as_posix()}/**/*{readable}'" if readable else ""
    known = ", ".join(SUFFIXES)
    if not found:
        there = f"; there are {kinds}{advice}" if kinds else ""
        raise ValueError(f"{flag} {root}: no {known} file in this directory (nor with .gz){there}")
    if others:
        notify(f"left out: {others.total():,} files in {root} that are not {known} ({kinds}){advice}")
    return each_once(found, root, notify)


def folders_below(root: str | Path) -> Iterator[str]:
    """Yield the path of a folder and of those in it at any depth, except hidden ones.

    Links are followed, after all that is no link: each real folder comes once, if possible by its own name.
    """
    folders, links, seen = [str(root)], [], set()
    while folders or links:
        folder = (folders or links).pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        yield folder
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            if os.path.isdir(entry.path) and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(entry.path)


def expand(pattern: str) -> list[str]:
    """Return the paths that match a glob, in which ** stands for any folders, each real one once."""
    head, *tail = re.split(r"(?<![^/\\])\*\*(?:[/\\]+|$)", pattern, maxsplit=1)
    if not tail:
        return glob.glob(pattern)
    found = []
    for start in glob.glob(head) if head else [""]:
        for folder in folders_below(start or "."):
            inside = os.path.relpath(folder, start or ".")
            place = start if inside == "." else os.path.join(start, inside)
            found += expand(os.path.join(glob.escape(place), tail[0] or "*"))
    return found


def each_once(files: Files, root: Path, notify: Callable[[str], None]) -> Files:
    """Return the files sorted by name, each real file under one name only: if possible one that is no link.

    root: the folder in which the names are. notify is called with one line if names are left out.
    """
    own = os.path.realpath(root)
    real = {name: os.path.realpath(path) for name, path in files}

    def is_link(name: str, path: Path) -> tuple[bool, bool]:
        """Return whether the file is a link, and whether it or a folder above it is one."""
        return path.is_symlink(), real[name] != os.path.join(own, name)

    links_last = sorted(files, key=lambda file: (is_link(*file), file))
    first = {real[name]: (name, path) for name, path in reversed(links_last)}
    if len(first) < len(files):
        notify(f"left out: {len(files) - len(first):,} of {len(files):,} names, links to files that are read")
    return sorted(first.values())


def download(url: str, checksum: str | None, cache: Path, flag: str = "--data") -> Path:
    """Return the path of the file at url, downloaded into cache/downloads unless it is there already.

    checksum: its SHA-256 in hexadecimal, or None to accept any file. flag: as for `find_files`. Raises
    ValueError if the file cannot be downloaded, or if its checksum differs; then the file is removed.
    """
    try:
        last = urlsplit(url).path.rstrip("/").split("/")[-1]
    except ValueError as error:
        raise ValueError(f"{flag} {url}: not a URL ({error})") from None
    path = cache / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{last[-LONGEST_NAME:]}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                replace_file(path) as new,
                urllib.request.urlopen(quote(url, safe=URL_CHARACTERS), timeout=30) as response,
                open(new, "wb") as file,
            ):
                size = int(response.headers.get("Content-Length", 0)) or None
                with progress_bar(total=size, unit="B", unit_scale=True, desc="download") as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                if size is not None and file.tell() != size:
                    raise OSError(f"received {file.tell()} of {size} bytes")
        except (OSError, HTTPException) as error:
            raise ValueError(f"{flag} {url}: cannot be downloaded ({error})") from None
    if checksum is not None and sha256(path) != checksum:
        path.unlink()
        raise ValueError(f"{flag} {url}: the download's SHA-256 is not {checksum}; it was removed, try again")
    return path


def documents(files: Files, on_bad_text: Callable[[str], None], text_field: str = "text") -> Iterator[str]:
    """Yield the documents of the files in order: one per file, or one per record, from its text_field.

    Empty documents are left out. So is anything that is not text: on_bad_text is called with a message that
    names its file and place, and may raise an error instead. Raises ValueError for a file that cannot be
    read.
    """
    for name, path in files:
        if suffix_of(path) in RECORDS:
            for place, value in read_records(path, name, on_bad_text, (text_field,)):
                text = text_in(value, text_field, place, on_bad_text)
                if text:
                    yield text
        else:
            with open_utf8(path, name, on_bad_text) as file:
                text = decode(file.read(), name, 0, on_bad_text)
            if text:
                yield text
