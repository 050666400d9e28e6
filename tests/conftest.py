"""Settings and helpers of all tests. Without a GPU, Triton's kernels run in its interpreter, and tests marked
`gpu` are left out.

    REHEARSE_GPU=1 python -m pytest -m gpu tests/kernels     runs these in the interpreter, at small shapes
"""

import contextlib
import gc
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# Small tensors are computed faster by one thread than by several that wait for each other. Both variables are
# read when torch and triton are imported, also by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# The processes that tests start find the project from any directory.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])

import matplotlib.figure
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def prepare_interpreter():
    """Let Triton's interpreter replace the functions of triton.language once. By itself it lists and replaces
    them at every launch, and at every call in a kernel: a third of the time of kernels on small tensors."""
    with contextlib.suppress(ImportError):  # There is no Triton on every platform.
        from triton.runtime import interpreter

        replace, replaced = interpreter._patch_lang, set()

        def replace_once(fn):
            if id(fn.__globals__) not in replaced:
                replace(fn)
                replaced.add(id(fn.__globals__))
            return SimpleNamespace(restore=lambda: None)

        interpreter._patch_lang = replace_once


if not torch.cuda.is_available():
    prepare_interpreter()


# The files that take longest. They begin first, so that none is left when all others have ended; by itself
# pytest-xdist begins with the files that have most tests.
LONGEST = (
    "results/test_gpu.py",
    "kernels/test_attention.py",
    "tests/test_readme.py",
    "engine/test_checkpoint.py",
    "tests/test_train.py",
    "kernels/test_machine_code.py",
    "engine/test_parallel.py",
    "kernels/test_grouped_matmul.py",
    "kernels/test_configs.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False


def rank(item) -> int:
    """Return the place of a test's file among the longest, or their number."""
    places = [i for i, name in enumerate(LONGEST) if item.nodeid.partition("::")[0].endswith(name)]
    return places[0] if places else len(LONGEST)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=rank)
    if torch.cuda.is_available():
        return
    for item in items:
        if not item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            continue
        if os.environ.get("REHEARSE_GPU") != "1":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif torch.bfloat16 in getattr(item, "callspec", item).__dict__.get("params", {}).values():
            item.add_marker(pytest.mark.skip(reason="the interpreter multiplies bfloat16 wrongly"))


ROOT = Path(__file__).parents[1]
SHARD = "checkpoint/shard-00001-model-00001-of-00001.safetensors"  # of a run in one process


class Ended(NamedTuple):
    """What a command leaves: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run_command(*words) -> Ended:
    """Run the command `python WORDS`, a file or -m and a module of ours, without input and in this process: a
    new process takes four seconds to import torch."""
    is_module = words[0] == "-m"
    name, *arguments = map(str, words[is_module:])
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # of modules imported before
    ):
        patch.setattr("sys.argv", [name, *arguments])
        patch.setattr("sys.stdin", io.StringIO())
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, out.getvalue(), err.getvalue())


class Beside(subprocess.Popen):
    """A process that runs beside the test. Its stderr goes to a file: a process stops as soon as a pipe that
    is not read is full."""

    def __init__(self, command, env):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        super().__init__(command, env=env, stdout=subprocess.DEVNULL, stderr=self.log)

    def said(self) -> str:
        """Return what is on stderr so far."""
        self.log.seek(0)
        return self.log.read()

    def end(self, timeout=400) -> int:
        """Wait for the end and return the exit code. After `timeout` seconds, kill the process and raise
        TimeoutExpired."""
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def rows_of(tokens):
    """Return rows of text as a task's make_batch takes them, from tokens (B, T + 1)."""
    return [{"tokens": row.numpy()} for row in tokens]


def assert_logits_recorded(model, expected):
    """The model's logits are those that transformers gave, within the noise of float32."""
    with torch.no_grad():
        logits = model(expected["tokens"])
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())  # the reference's own float32 noise
    assert (logits - expected["logits"]).abs().max() < tolerance


def assert_greedy_recorded(model, expected):
    """The model continues the prompts, of several lengths in one batch, with the tokens of transformers."""
    lengths = expected["prompt_lengths"].tolist()
    prompts = [row[:n].tolist() for row, n in zip(expected["prompts"], lengths, strict=True)]
    n_new = expected["greedy"].shape[1]
    assert model.generate(prompts, n_new, temperature=0) == expected["greedy"].tolist()


def copy_of(directory, to, **changes):
    """Copy a checkpoint to the directory `to`, with other values in its config.json, and return `to`."""
    to.mkdir(exist_ok=True)
    hf = json.loads((directory / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(hf))
    (to / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return to


def leave_empty(figure, file, **options):
    """Write an empty file in place of a picture. This is Figure.savefig in all tests but those of pictures.

    A run draws its loss at every evaluation: 0.2 seconds to render it, longer than most runs of tests train.
    """
    if isinstance(file, str | Path):
        Path(file).touch()


@pytest.fixture(autouse=True, scope="session")
def savefig():
    """Leave pictures empty, and return matplotlib's own function that writes one."""
    original = matplotlib.figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", leave_empty)
        yield original


@pytest.fixture
def rendered(savefig, monkeypatch):
    """Render pictures, for a test that looks at one."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)


@pytest.fixture(autouse=True)
def same_products():
    """Restore the precision of matrix products, which a run changes."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Return the path of a text to train on; the size "tiny" of gpt.py becomes that of small_gpt.py."""
    import small_gpt  # imports much, which not all tests need

    import gpt

    monkeypatch.setitem(gpt.SIZES, "tiny", small_gpt.SMALL)
    return small_gpt.write_text(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def ray():
    """Return Ray, and end its cluster after the tests of a file; skip them where it is not installed."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the cluster's processes
        yield ray
    ray.shutdown()


@pytest.fixture
def a_gpu_itself():
    """Skip a test in a rehearsal (REHEARSE_GPU=1) if it needs more of a GPU than the interpreter has."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU itself")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let models keep for backward what the kernels keep on a GPU, see kept.py."""
    from kept import use_gpu_operations

    use_gpu_operations(monkeypatch)


@pytest.fixture
def peak_memory():
    """Return a function that calls another one and returns the most bytes that were allocated at once."""

    def peak(function) -> int:
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            return torch.cuda.max_memory_allocated() - before
        # Garbage of earlier tests must not be freed, and so subtracted, while the events are recorded.
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            function()
        alive = most = 0
        allocations = [e for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(allocations, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        return most

    return peak
