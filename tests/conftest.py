"""Without a GPU, Triton's kernels run in its interpreter, and tests marked `gpu` are left out.

REHEARSE_GPU=1 python -m pytest -m gpu tests/kernels     runs these in the interpreter, at small shapes
"""

import gc
import json
import os
import subprocess
import tempfile
from pathlib import Path

# Small tensors are computed faster by one thread than by several that wait for each other. Both variables are
# read when torch and triton are imported, also by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# The processes that tests start find the project from any directory.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if not item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            continue
        if os.environ.get("REHEARSE_GPU") != "1":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif torch.bfloat16 in getattr(item, "callspec", item).__dict__.get("params", {}).values():
            item.add_marker(pytest.mark.skip(reason="the interpreter multiplies bfloat16 wrongly"))


SHARD = "checkpoint/shard-00001-model-00001-of-00001.safetensors"  # of a run in one process


class Beside(subprocess.Popen):
    """A process that runs beside the test. What it says on stderr goes to a file: a pipe that nobody reads
    fills up, and stops it."""

    def __init__(self, command, env):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        super().__init__(command, env=env, stdout=subprocess.DEVNULL, stderr=self.log)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self, timeout=400) -> int:
        """Its exit code; if it does not end, an error and its end."""
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def rows_of(tokens):
    """Rows of text as a task's make_batch takes them, of tokens (B, T + 1)."""
    return [{"tokens": row.numpy()} for row in tokens]


def copy_of(directory, to, **changes):
    """A checkpoint with other values in its config.json."""
    to.mkdir(exist_ok=True)
    hf = json.loads((directory / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(hf))
    (to / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return to


@pytest.fixture(autouse=True)
def same_products():
    """What a run asks of matrix products ends with its test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def a_gpu_itself():
    """Skip a test in a rehearsal (REHEARSE_GPU=1) if it needs more of a GPU than the interpreter has."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU itself")


@pytest.fixture
def peak_memory():
    """A function that calls another and returns the bytes alive at once of what that allocated."""

    def peak(function) -> int:
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            return torch.cuda.max_memory_allocated() - before
        gc.collect()  # what others leave behind must not be freed, and subtracted, in between
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            function()
        alive = most = 0
        allocations = [e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(allocations, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    return peak
