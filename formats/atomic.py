"""Atomic files and directories: written beside the old ones, synced to disk, then renamed.

Whenever a process dies, either the old file or the new one is in place, and complete. Replacing a directory
takes two renames; a process that dies between them leaves both versions complete under other names, see
`replace_directory`. Checksums beside the files show later whether they are still intact.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # no space on the disk, none in a user's quota


@contextmanager
def names_full_disk(path: Path) -> Iterator[None]:
    """Make errors about a full disk name this path: errors from writing to an open file name none."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        raise OSError(error.errno, f"the disk is full ({error.strerror})", str(path)) from None


@contextmanager
def replace_directory(directory: str | Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory to fill; afterwards it is synced to disk and replaces `directory`.

    The old directory is moved to `previous` if that is given, else it is removed. If an error is raised while
    the new one is filled, the new one is removed and the old one stays in place. If the process dies between
    the two renames, the old one is at `previous`, or else at "NAME.old", and the new one at "NAME.new".
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new, old = (directory.with_name(directory.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        with names_full_disk(directory):
            yield new
            for path in [*new.rglob("*"), new]:
                sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    target = previous or old
    # The version before the old one is removed only now that the new one is complete, so that at every moment
    # there is a complete one.
    shutil.rmtree(target, ignore_errors=True)
    if directory.exists():
        directory.rename(target)
    new.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; afterwards that file is synced to disk and replaces `path` in one step.

    The folder of `path` is made if there is none. The file gets the permissions that the umask gives any new
    file: safetensors would write one that only its owner can read, but another user may run the model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        new.touch()
        mode = new.stat().st_mode
        with names_full_disk(path):
            yield new
            new.chmod(mode)
            sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file, or the entries of a directory, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: Path) -> None:
    """Write the SHA-256 of all files in directory to checksums.json."""
    checksums = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    (directory / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")


def damage(directory: Path) -> str | None:
    """Return a sentence that names a file in directory that is missing or whose SHA-256 is not the one in
    checksums.json, or None if all are intact."""
    try:
        checksums = json.loads((directory / "checksums.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{directory / 'checksums.json'} is missing or damaged ({type(error).__name__})"
    if not isinstance(checksums, dict):
        return f"{directory / 'checksums.json'} is damaged (it is no JSON object)"
    for name, expected in checksums.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != expected:
            return f"{path} is damaged (its checksum does not match)"
    return None
