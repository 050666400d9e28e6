"""Processes beside a test that start at once: a new one takes four seconds to import torch."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
from conftest import leave_empty

# This process imports torch once, and is then forked.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "gpt", "matplotlib.pyplot", "pytest"])


class Forked:
    """A process beside the test that calls function(*arguments) and exits with the code that it returns."""

    def __init__(self, function: Callable[..., int], *arguments, environment: dict[str, str] | None = None):
        self.log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        job = (self.log.name, environment or {}, function, arguments)
        self.process = SERVER.Process(target=call, args=job, daemon=True)
        self.process.start()

    def said(self) -> str:
        """Return what is on stderr so far."""
        return Path(self.log.name).read_text()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, timeout=400) -> int:
        """Wait for the end and return the exit code. After `timeout` seconds, kill the process and raise
        TimeoutError."""
        self.process.join(timeout)
        if self.is_alive():
            self.process.kill()
            raise TimeoutError(self.said())
        return self.process.exitcode


def call(log: str, environment: dict[str, str], function: Callable[..., int], arguments: tuple) -> None:
    """Call a function with stderr in a file and without stdout, and exit with the code that it returns."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(environment)
    matplotlib.figure.Figure.savefig = leave_empty
    raise SystemExit(function(*arguments))
