"""What is saved is saved whole: directories that are written aside, synced, checked and then swapped in.

Whatever moment a process dies at, what stood there before or what takes its place is there, and is whole;
checksums beside the files tell whether it still is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_directory(directory: str | Path, *, previous: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory to fill; on leaving, it is synced to disk and takes the place of `directory`.

    What stood there before is kept as `previous` if given, else removed, and stays in place if filling fails.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    new, old = (directory.with_name(directory.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in [*new.iterdir(), new]:
            sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    target = previous or old
    # The older one gives way only now that the new one is whole, so two good ones are never fewer than one.
    shutil.rmtree(target, ignore_errors=True)
    if directory.exists():
        directory.rename(target)
    new.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on leaving, it is synced and takes the place of `path` in one step.

    Its mode is what the umask says, whatever writes it: safetensors makes files that their owner alone can
    read, but a model may be served by another user.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.unlink(missing_ok=True)
        new.touch()
        mode = new.stat().st_mode
        yield new
        new.chmod(mode)
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or directory entry from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(directory: Path) -> None:
    checksums = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    (directory / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")


def damage(directory: Path) -> str | None:
    """What is wrong in a directory with checksums, naming the file, or None if every one of them holds."""
    try:
        checksums = json.loads((directory / "checksums.json").read_text())
    except (OSError, ValueError) as error:
        return f"{directory / 'checksums.json'} is missing or damaged ({type(error).__name__})"
    for name, expected in checksums.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != expected:
            return f"{path} is damaged (its checksum does not match)"
    return None
