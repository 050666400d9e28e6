"""The rows that are measured: one file, FOLDER/rows.json, rewritten in one step after every measurement.

A row has the step, the name, the figures, `failed` (None, or the last lines of what went wrong), and how it
was made: command, commit, device, versions, time.
"""

import importlib.util
import json
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from formats.atomic import replace_file
from kernels.backend import HAS_TRITON, triton

NOT_ENDED = "did not end"
ROOT = Path(__file__).parents[2]


def read(folder: Path) -> list[dict]:
    """Return the rows in a folder, none if there is no file."""
    path = folder / "rows.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def of_device(folder: Path) -> list[dict]:
    """Return the rows in a folder that were measured on this device."""
    return [row for row in read(folder) if row["device"] == device()]


def write(folder: Path, rows: list[dict]) -> None:
    """Write the rows of a folder, all or nothing."""
    with replace_file(folder / "rows.json") as new:
        new.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def key(row: dict) -> tuple[str, str, str]:
    """Return what names the measurement of a row: its step, its name and the device."""
    return row["step"], row["name"], row["device"]


def add(folder: Path, row: dict) -> None:
    """Add a row to those in a folder, in the place of an older one of the same measurement."""
    rows = {key(old): old for old in read(folder)}
    write(folder, list((rows | {key(row): row}).values()))


def now() -> str:
    """Return the time in UTC, as text that sorts by time."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def device() -> str:
    """Return the name of the device that is measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, in Triton's interpreter"


@cache
def commit() -> str | None:
    """Return the commit of the working tree, None outside a clone."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def new(step: str, name: str, of_commit: str | None) -> dict:
    """Return a row of a measurement that has begun. of_commit: the commit where there is no clone."""
    return {
        "step": step,
        "name": name,
        "failed": NOT_ENDED,
        "command": f"python -m results.gpu {step}",
        "commit": of_commit or commit(),
        "device": device(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "time": now(),
    }


def remaining(measurements: list, step: str, folder: Path, began: str, again: bool) -> list:
    """Return what is left to do of a step's measurements: those without a row, then those whose rows failed
    before `began`; with `again` all but those tried since."""
    rows = {key(row): row for row in read(folder)}
    untried, earlier = [], []
    for measurement in measurements:
        row = rows.get((step, measurement.name, device()))
        if row is None:
            untried.append(measurement)
        elif row["time"] < began and (again or row["failed"]):
            earlier.append(measurement)
    return untried + earlier


def last_lines(text: str, n: int = 6) -> str:
    """Return the last lines of a text that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-n:])


def is_installed(module: str) -> bool:
    """Return True if a module can be imported."""
    return importlib.util.find_spec(module) is not None
