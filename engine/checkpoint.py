"""What --resume needs: the training state, saved by any number of processes and read by any other number.

A run's checkpoint/ is a directory of

    shard-*.safetensors  the weights and the optimizers' state; each process writes what it holds of them
    state.json           the step, the flags of the run, the lengths of its logs
    checksums.json       SHA-256 of each of these

and `checkpoint.previous` beside it is the one before. Whatever moment a process dies at, one of them is
whole. One that is found damaged on resuming is set aside as `checkpoint.damaged`.

The shards are torch.distributed.checkpoint's, in its safetensors format: each says which part of a tensor it
has, so that every process can read its own part from whatever files hold it.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from engine import parallel
from formats.atomic import damage, replace_directory, sha256


@contextmanager
def together(directory: Path, previous: Path) -> Iterator[Path]:
    """`replace_directory` for all processes at once: the first one makes the empty directory, and swaps it in
    when every one has filled its part. Raises OSError in all of them if any could not fill it."""
    is_first = parallel.rank() == 0
    with replace_directory(directory, previous=previous) if is_first else nullcontext() as new:
        new = parallel.from_first(new)
        problem = None
        try:
            yield new
        except OSError as error:
            problem = f"process {parallel.rank()}: {error}" if parallel.n_processes() > 1 else str(error)
        problems = [found for found in parallel.gather_objects(problem) if found is not None]
        if problems:
            raise OSError(problems[0])
    parallel.barrier()


def save(run: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write run/checkpoint, keeping the one before it as run/checkpoint.previous. Called by all processes.

    tensors: by name; of a DTensor each process writes its part. state: plain JSON. Raises OSError if the
    disk is full.
    """
    with together(run / "checkpoint", run / "checkpoint.previous") as new:
        writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)
        alone = parallel.n_processes() == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process alone is meant
            try:
                dcp.save(tensors, storage_writer=writer, no_dist=alone)
            except CheckpointException as error:
                raise OSError(next(iter(error.failures.values()))[0]) from None
        # Each process reads back what it has written itself.
        mine = {path.name: sha256(path) for path in new.glob(f"shard-{parallel.rank() + 1:05}-*")}
        checksums = {name: digest for part in parallel.gather_objects(mine) for name, digest in part.items()}
        if parallel.rank() == 0:
            (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            checksums["state.json"] = sha256(new / "state.json")
            (new / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")


def load(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, or the parts of them that this process has, from a checkpoint's shards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.n_processes() == 1)


def names(directory: Path) -> set[str]:
    """Of the tensors in a checkpoint."""
    return set(dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata)


def newest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict]:
    """The newest undamaged checkpoint of a run and its state; warn(message) names a damaged one.

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
    return current, json.loads((current / "state.json").read_text())
