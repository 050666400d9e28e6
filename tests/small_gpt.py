"""A GPT small enough for a test, its runs in this process, and runs in processes that tests may kill."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from conftest import SHARD
from forks import Forked
from safetensors.torch import load_file

import gpt
import train
from formats import atomic

TIMES = ("seconds", "tokens_per_second")
SMALL = gpt.Config(2, 4, 32, 64, max_seq_len=64, n_kv_heads=2, qk_norm=True)


def write_text(path: Path) -> Path:
    """Write a text to train on, of which 8 batches of two rows are held out."""
    path.write_text("".join(f"line {i} of the text, {i * i % 97} and so on\n" for i in range(160)))
    return path


def flags(text, out, **changes):
    """Return the flags of a run small enough for a test. Every flag can be changed; None leaves it out."""
    small = dict(
        model="gpt",
        data=text,
        tokenizer="bytes",
        steps=6,
        batch_size=2,
        seq_len=16,
        eval_every=3,
        log_every=1,
    )
    small |= dict(out=out, cache=text.parent / "cache") | changes
    argv = []
    for name, value in small.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            argv += [flag] if value is True else [flag, str(value)]
    return argv


def prepared(text, out, **changes):
    """Return the Run of these flags, before its first step."""
    return train.prepare(train.parse_arguments(flags(text, out, **changes)))


def rows(out):
    """Return the rows of metrics.jsonl without the times, which differ from run to run."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def same_run(a, b):
    """Return True if weights, metrics and samples of two runs are equal to the bit; raise AssertionError if
    not."""
    weights = next((a / "model").glob("*.safetensors")).name
    for part in (f"model/{weights}", SHARD):
        x, y = (load_file(out / part) for out in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert rows(a) == rows(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    return True


def refused(capsys, argv, main=train.main):
    """Return the one line that a mistake ends in. Nothing else may be printed, and the exit code is 2."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def forked(argv, config=SMALL, prepare=None, arguments=()) -> Forked:
    """Start a run in a process of its own, in which prepare(*arguments) is called first."""
    return Forked(run_small, argv, config, prepare, arguments)


def run_small(argv, config, prepare, arguments) -> int:
    gpt.SIZES["tiny"] = config
    if prepare:
        prepare(*arguments)
    return train.main(argv)


def slow_down(seconds: float) -> None:
    """Let every update take longer, so that a signal from outside comes before the last one."""
    update = train.update

    def slow(run):
        time.sleep(seconds)
        return update(run)

    train.update = slow


def die_in(point: str, n: int) -> None:
    """Send SIGKILL to this process at the n-th call of a function that saves a checkpoint: after half a shard
    ("save"), before a file is synchronised with the disk ("sync"), or before a directory is renamed."""
    owner = {"save": dcp, "rename": Path, "sync": atomic}[point]
    original, calls = getattr(owner, point), []

    def fatal(*args, **kwargs):
        if point == "save" or "/checkpoint" in str(args[0]):
            calls.append(1)
        if len(calls) == n:
            if point == "save":
                original(*args, **kwargs)
                for path in kwargs["storage_writer"].path.glob("shard-*"):
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, point, fatal)
