"""Checkpoints of a run: what --resume needs, saved by any number of ranks and read by any other number.

A run's checkpoint/ is a directory of

    shard-*.safetensors  the weights, the optimizers' states, with --ema the averages; each rank writes its
                         shards of them
    state.json           the step, the flags of the run, the lengths of its logs
    checksums.json       SHA-256 of each of these

and checkpoint.previous/ beside it is the one before. Whenever a process dies, one of the two is undamaged. If
checkpoint/ is found damaged on resuming, it is renamed to checkpoint.damaged/. Beside them, model/ holds the
model in the layout that other programs read.

The shards are torch.distributed.checkpoint's, in its safetensors format: each records which part of a tensor
it holds, so that every rank can read its own part from whatever files hold it.
"""

import argparse
import ast
import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import parallel
from engine.settings import value_of
from formats.atomic import damage, replace_directory, sha256, sync

LOGS = ("metrics.jsonl", "samples.txt")


# --- directories of tensors


@contextmanager
def together(directory: Path, previous: Path) -> Iterator[Path]:
    """Replace a directory with one that all ranks fill: rank 0 creates it, and swaps it in when all are done.

    Raises OSError on every rank if any rank could not write.
    """
    is_first = parallel.rank() == 0
    with replace_directory(directory, previous=previous) if is_first else nullcontext() as new:
        new = parallel.broadcast(new)
        problem = None
        try:
            yield new
        except OSError as error:
            problem = f"process {parallel.rank()}: {error}" if parallel.world_size() > 1 else str(error)
        problems = [found for found in parallel.all_gather(problem) if found is not None]
        if problems:
            raise OSError(problems[0])
    parallel.barrier()


def write(run: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write run/checkpoint, keeping the one before it as run/checkpoint.previous. Called by all ranks.

    tensors: by name; of a DTensor each rank writes its shard. state: plain JSON. Raises OSError if the disk
    is full.
    """
    import torch.distributed.checkpoint as dcp  # takes as long to import as torch
    from torch.distributed.checkpoint.api import CheckpointException

    with together(run / "checkpoint", run / "checkpoint.previous") as new:
        writer = dcp.HuggingFaceStorageWriter(str(new), save_distributed=True)
        alone = parallel.world_size() == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that a single process saves
            try:
                dcp.save(tensors, storage_writer=writer, no_dist=alone)
            except CheckpointException as error:
                raise OSError(next(iter(error.failures.values()))[0]) from None

        # Each rank hashes the files that it has written.
        own = {path.name: sha256(path) for path in new.glob(f"shard-{parallel.rank() + 1:05}-*")}
        checksums = {name: digest for part in parallel.all_gather(own) for name, digest in part.items()}
        if parallel.rank() == 0:
            (new / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            checksums["state.json"] = sha256(new / "state.json")
            (new / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")


def read(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, or this rank's shards of them, from a checkpoint."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(directory))
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.world_size() == 1)


def names(directory: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint."""
    import torch.distributed.checkpoint as dcp

    return set(dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata)


def is_begun(run: Path) -> bool:
    """Return whether a run has a checkpoint. A kill while one is saved may leave the one before alone."""
    return any((run / name).exists() for name in ("checkpoint", "checkpoint.previous"))


def newest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict]:
    """Return the newest undamaged checkpoint of a run and its state; warn(message) names a damaged one.

    Raises ValueError if the run has no checkpoint, or none that is undamaged.
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
            raise ValueError(f"{run}: no checkpoint is undamaged: {problem}; start again with another --out")
        previous.rename(current)
    return current, json.loads((current / "state.json").read_text(encoding="utf-8"))


# --- the state of a run


def clear_logs(out: Path) -> None:
    """Make the logs of a new run, empty, and remove what an earlier run, which has saved no checkpoint, has
    left in out: its pictures, and the answers of its first evaluation."""
    for log in LOGS:
        (out / log).write_text("", encoding="utf-8")
    shutil.rmtree(out / "pictures", ignore_errors=True)
    for name in ("picture.png", "before.json"):
        (out / name).unlink(missing_ok=True)


def find(out: Path, flags: dict[str, str], free: set[str]) -> tuple[Path, dict]:
    """Return the checkpoint to resume from and its state.

    flags: of this command, all as strings. free: those that may differ. Raises ValueError if the run was
    started with other values of the rest, and for a state that lacks what `resume` reads.
    """

    def warn(problem: str) -> None:
        print(f"warning: {problem}; trying the checkpoint before it", file=sys.stderr)

    directory, state = parallel.on_rank_0(lambda: newest(out, warn))
    lacking = ", ".join(sorted({"config", "steps", "schedule_from"} - state.keys()))
    if lacking:
        raise ValueError(
            f"--resume: the run in {out} was saved by an older version, without {lacking}; "
            f"train its model further with --init-from {out}/model and another --out"
        )
    before = state["flags"]
    for flag in sorted(flags.keys() - free):
        # A checkpoint of an older version may lack a flag, which that version did not have.
        if flag in before and meaning(flag, before[flag]) != meaning(flag, flags[flag]):
            raise ValueError(
                f"--resume: the run in {out} was started with --{flag.replace('_', '-')} {before[flag]}, not "
                f"{flags[flag]}; its command was: {state['command']}"
            )
    n_before, n_now = (int(f["batch_size"]) * int(f["grad_accum"]) for f in (before, flags))
    if n_before != n_now:
        raise ValueError(
            f"--resume: the run in {out} was started with {n_before} sequences in an update, not "
            f"{n_now}; --batch-size and --grad-accum may change, but not their product"
        )
    return directory, state


def meaning(flag: str, text: str) -> Any:
    """Return what to compare of a recorded flag: its text, and of --set {field: value}, so that neither the
    order nor the spelling of numbers counts."""
    if flag != "set":
        return text
    values = {}
    for change in ast.literal_eval(text):  # a list of strings
        name, _, value = change.partition("=")
        values[name] = value_of(value)
    return values


def config_of(run) -> dict:
    """Return the Config of a run's model as JSON holds it, without `kernels`, which may change."""
    config = json.loads(json.dumps(asdict(run.model.config), default=str))
    return {name: value for name, value in config.items() if name != "kernels"}


def continue_schedule(args: argparse.Namespace, state: dict, flags: dict[str, str]) -> None:
    """Set args.steps and args.schedule_from of a resumed run: the last and the first step of the schedule of
    the learning rate.

    They stay as they were, but with --extend a second schedule follows the first. Where this command names no
    --lr or --schedule for it, args gets those of the first one, and so does flags, this command's as strings.
    Raises ValueError for an --extend before the end, for another --steps, under which the schedule would
    jump, unless it is constant, and for fewer steps than are made.
    """
    end, before = state["steps"], state["flags"]
    if args.extend:
        if state["step"] < end:
            raise ValueError(
                f"--extend {args.extend}: the run in {args.out} is at step {state['step']} of {end}; finish "
                "it first, with --resume"
            )
        args.schedule_from, args.steps = state["step"], state["step"] + args.extend
        args.schedule = args.schedule or before["schedule"]
        if args.lr is None and before["lr"] != "None":
            args.lr = float(before["lr"])
        flags.update(lr=str(args.lr), schedule=args.schedule)
        return
    args.schedule_from = state["schedule_from"]
    if flags["steps"] == "None":  # it was not typed
        args.steps = end
    elif args.steps != end and args.schedule != "constant":
        raise ValueError(
            f"--resume: the learning rate of the run in {args.out} is scheduled to step {end}, not "
            f"{args.steps}; leave out --steps to finish it, and add steps to a finished run by --extend"
        )
    elif args.steps < state["step"]:
        raise ValueError(
            f"--steps {args.steps}: the run in {args.out} has made {state['step']} steps; give more, or "
            "leave it out"
        )


def resume(run, directory: Path, state: dict) -> None:
    """Bring an engine.run.Run to the step of a checkpoint.

    Raises ValueError if the base, the model's Config or the data are not those with which it was started.
    """
    if state.get("base") != run.base_fingerprint:
        raise ValueError(
            f"--resume: the weights in {run.concept.base or run.args.init_from} have changed since the run "
            "was started"
        )
    if state["dataset"] != run.dataset.fingerprint:
        raise ValueError(
            f"--resume: the content of --data {run.args.data}, or the tokenizer, has changed since the run "
            f"was started; its command was: {state['command']}"
        )
    now = config_of(run)
    for name, value in state["config"].items():
        if name in now and now[name] != value:
            where = run.args.init_from or run.args.base
            raise ValueError(
                f"--resume: the model in {where} has {name} {now[name]}, the run was started with {value}"
            )
    saved = names(directory)
    missing = [name for name in tensors_of(run) if name not in saved]
    if missing:
        raise ValueError(
            f"--resume: the checkpoint in {directory} is of an older version and has no tensor {missing[0]}; "
            f"start another run with --init-from {run.args.out / 'model'}"
        )

    # Optimizers create their states in the first step. Here they are created under the checkpoint's names.
    for optimizer in run.optimizers:
        for name, p in named(run.model, optimizer):
            prefix = f"optimizer.{name}."
            for key in (full.removeprefix(prefix) for full in saved if full.startswith(prefix)):
                # A fused AdamW counts its steps on the device.
                device = p.device if optimizer.param_groups[0].get("fused") else "cpu"
                state_of = optimizer.state[p]
                state_of[key] = torch.zeros((), device=device) if key == "step" else torch.zeros_like(p)
    read(directory, tensors_of(run))
    run.step, run.seconds = state["step"], state["seconds"]
    run.skipped[0] = state["skipped"]

    # Rows that were logged after the checkpoint will be computed and logged again.
    if parallel.rank() == 0:
        for name, size in state["logs"].items():
            os.truncate(run.args.out / name, size)


def save(run) -> None:
    """Write checkpoint/ and model/ of an engine.run.Run, each completely or not at all.

    Raises OSError if the disk has no room for them.
    """
    out, state = run.args.out, {}
    if parallel.rank() == 0:
        for log in LOGS:
            sync(out / log)
        state = {
            "step": run.step,
            "steps": run.args.steps,
            "schedule_from": run.args.schedule_from,
            "seconds": run.seconds,
            "skipped": run.n_skipped,
            "dataset": run.dataset.fingerprint,
            "flags": run.flags,
            "config": config_of(run),
            "command": command(),
            "base": run.base_fingerprint,
            "logs": {log: (out / log).stat().st_size for log in LOGS},
        }
    write(out, tensors_of(run), state)
    kept = [out / "models" / f"step-{run.step}"] if run.args.keep_models else []
    save_model(run, out / "model", *kept)
    if kept and parallel.rank() == 0:
        for old in kept_models(out)[: -run.args.keep_models]:
            shutil.rmtree(old)


def save_model(run, *directories: Path) -> None:
    """Write the model of an engine.run.Run, with --ema its averages, to directories, each completely or not
    at all. Called by all ranks."""
    with run.averaged():
        parallel.update_unsharded(run.model, run.unsharded)
        if parallel.rank() == 0:
            for directory in directories:
                directory.parent.mkdir(exist_ok=True)
                with replace_directory(directory) as new:
                    run.save_model(new)
    parallel.barrier()


def kept_models(out: Path) -> list[Path]:
    """Return the directories that --keep-models has written, in the order of their steps, without those that
    a killed process has left half-written, such as step-9.new."""
    found = (path for path in (out / "models").glob("step-*") if not path.suffix)
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def last_saved(out: Path) -> str:
    """Return a sentence that names the directory with the last good state of a run."""
    for where in (out / "checkpoint", out / "checkpoint.previous"):
        if where.is_dir():
            return f"the last good state is in {where}; go on with --resume"
    return "nothing is saved yet"


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of an optimizer with their names in the model."""
    its_own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in its_own]


def tensors_of(run) -> dict[str, Tensor]:
    """Return everything that training changes, by name: this rank's shards of weights, of the optimizers'
    states and, with --ema, of averages."""
    tensors = {f"model.{name}": w for name, w in run.state_dict().items()}
    for optimizer in run.optimizers:
        for name, p in named(run.model, optimizer):
            tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state[p].items()}
    if run.averages is not None:
        tensors |= {f"average.{name}": t for name, t in run.averages.tensors.items()}
    return tensors


def command() -> str:
    """Return the command line, always beginning with `python`."""
    return shlex.join(["python", *sys.argv])
