"""What is saved is saved whole: directories that are written aside, synced, checked and then swapped in.

A training checkpoint is a directory of

    model.safetensors    the weights
    state.pt             the optimizers' state and the random generators' (read with weights_only=True)
    state.json           the step, the flags of the run, the lengths of its logs
    checksums.json       SHA-256 of each of these

and `checkpoint.previous` beside it is the one before. Whatever moment the process dies at, one of them is
whole. One that is found damaged on resuming is set aside as `checkpoint.damaged`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


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
    """Yield a path to write to; on leaving, it is synced and takes the place of `path` in one step."""
    new = path.with_name(path.name + ".new")
    try:
        yield new
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


def save(run: Path, weights: dict[str, Tensor], tensors: dict, state: dict) -> None:
    """Write run/checkpoint, keeping the one before it as run/checkpoint.previous.

    weights: the model's state_dict. tensors: nested dicts and lists of tensors and numbers. state: plain
    JSON.
    """
    with replace_directory(run / "checkpoint", previous=run / "checkpoint.previous") as new:
        save_file(
            {name: w.detach().cpu().contiguous() for name, w in weights.items()}, new / "model.safetensors"
        )
        torch.save(tensors, new / "state.pt")
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        write_checksums(new)


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


def load(run: Path, warn) -> tuple[dict[str, Tensor], dict, dict]:
    """(weights, tensors, state) of the newest undamaged checkpoint of a run; warn(message) names a damaged
    one.

    Raises ValueError if the run has no checkpoint, or none that is whole.
    """
    current, previous = run / "checkpoint", run / "checkpoint.previous"
    if not current.is_dir() and not previous.is_dir():
        raise ValueError(f"{run}: no checkpoint to resume from; leave out --resume to start")
    problem = damage(current) if current.is_dir() else None
    if problem is not None:
        warn(problem)
        shutil.rmtree(run / "checkpoint.damaged", ignore_errors=True)
        current.rename(run / "checkpoint.damaged")
    if not current.is_dir():
        # The older one takes its place, so that the next save keeps it until there is a newer one.
        problem = damage(previous) if previous.is_dir() else problem
        if problem is not None:
            raise ValueError(f"{run}: no checkpoint is whole: {problem}; start again with another --out")
        previous.rename(current)
    weights = load_file(current / "model.safetensors")
    tensors = torch.load(current / "state.pt", map_location="cpu", weights_only=True)
    return weights, tensors, json.loads((current / "state.json").read_text())
