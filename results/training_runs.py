"""Runs of train.py inside a script that makes many: each is made once, and continued after a break."""

import contextlib
import json
import sys
from pathlib import Path

import train
from engine.checkpoint import is_begun
from formats.atomic import replace_file


def trained(out: Path, *flags: str) -> Path:
    """Return the directory of the model that a run of train.py with these flags leaves in the folder `out`.

    A run that has ended is not repeated, and one that was interrupted continues from its checkpoint. What it
    prints is added to a file beside the folder, with the suffix .log.

    Raises ValueError if the run fails, if it is stopped before its last step (after which train.py ends with
    exit code 0, too), or if the run that has ended there had other flags; KeyboardInterrupt after Ctrl-C.
    """
    done, wanted = out / "done", " ".join(flags)
    if done.exists():
        ended = done.read_text(encoding="utf-8") or wanted  # an older file is empty
        if ended != wanted:
            raise ValueError(
                f"{out} holds a run with other flags, {ended!r}, and this call has {wanted!r}: remove it or "
                "name another folder"
            )
        return out / "model"
    argv = [*flags, "--out", str(out)]
    print("train.py", *argv, file=sys.stderr, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(f"{out}.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = train.main([*argv, *["--resume"] * is_begun(out)])
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise ValueError(f"{out}: the run failed; see {out}.log")
    n_steps = json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"][-1]["flags"]["steps"]
    if last_evaluation(out)["step"] < n_steps:
        raise ValueError(f"{out}: the run was interrupted; the same command goes on with it")
    with replace_file(done) as new:
        new.write_text(wanted, encoding="utf-8")
    return out / "model"


def last_evaluation(out: Path) -> dict:
    """Return the last row of held-out figures that the run in the folder `out` has logged."""
    return [row for row in logged(out) if "val_loss" in row][-1]


def seconds(out: Path) -> float:
    """Return the seconds that the steps of the run in the folder `out` have taken."""
    return max(row.get("seconds", 0) for row in logged(out))


def logged(out: Path) -> list[dict]:
    """Return the rows that the run in the folder `out` has logged."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run(out: Path, seed: int, *flags: str) -> dict:
    """Make a run of train.py with a seed in the folder `out`, by `trained`. Return its `last_evaluation`."""
    trained(out, *flags, "--seed", str(seed))
    return last_evaluation(out)
