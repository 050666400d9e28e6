"""What TensorBoard and Weights & Biases receive, with stand-ins for their packages that record the calls."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from engine import watch

ROW = {
    "step": 3,
    "tokens": 300,
    "loss": 2.5,
    "grad_norm": math.nan,
    "mfu": None,
    "seconds": math.inf,
    "skipped": 0,
}
SENT = {"tokens": 300, "loss": 2.5, "skipped": 0}


@pytest.fixture
def tensorboard(monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            calls.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.calls = []

    def init(**options):
        module.calls.append(options)
        return SimpleNamespace(
            id=options["id"] or f"new{len(module.calls)}",
            log=lambda row, step: module.calls.append((row, step)),
            finish=lambda: module.calls.append("finish"),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_gets_the_finite_numbers(tmp_path, tensorboard):
    (watcher,) = watch.watchers(["tensorboard"], tmp_path, {}, None)
    watcher.log(3, ROW)
    watcher.close()
    scalars = [(name, value, 3) for name, value in SENT.items()]
    assert tensorboard == [(str(tmp_path / "tensorboard"), 0), *scalars, "flush", "close"]


def test_tensorboard_hides_rows_that_are_logged_again(tmp_path, tensorboard):
    watch.watchers(["tensorboard"], tmp_path, {}, 20)
    assert tensorboard == [(str(tmp_path / "tensorboard"), 21)]  # step 20 was logged before it was saved


def test_wandb_gets_the_finite_numbers_and_the_config(tmp_path, wandb):
    (watcher,) = watch.watchers(["wandb"], tmp_path / ".", {"lr": 0.1}, None)
    watcher.log(3, ROW)
    watcher.close()
    options = wandb.calls[0]
    assert options["project"] == "plinth" and options["dir"] == str(tmp_path)
    assert options["name"] == tmp_path.name and options["config"] == {"lr": 0.1}
    assert wandb.calls[1:] == [(SENT, 3), "finish"]


def test_wandb_goes_on_in_the_same_run_when_resumed_and_only_then(tmp_path, wandb):
    for resumed_at in (None, 0, None):
        watch.watchers(["wandb"], tmp_path, {}, resumed_at)
    assert [(options["id"], options["resume"]) for options in wandb.calls] == [
        (None, "allow"),
        ("new1", "allow"),
        (None, "allow"),
    ]
    assert (tmp_path / "wandb.id").read_text() == "new3\n"
    (tmp_path / "wandb.id").unlink()
    watch.watchers(["wandb"], tmp_path, {}, 20)  # --watch was added on resuming
    assert wandb.calls[-1]["id"] is None


def test_an_error_of_wandb_is_one_line(tmp_path, wandb):
    def init(**options):
        raise wandb.Error("No API key configured.")

    wandb.init = init
    with pytest.raises(ValueError, match="--watch wandb: No API key configured; or set WANDB_MODE=offline"):
        watch.watchers(["wandb"], tmp_path, {}, None)


def test_both_at_once(tmp_path, tensorboard, wandb):
    names = [
        type(watcher).__name__ for watcher in watch.watchers(["tensorboard", "wandb"], tmp_path, {}, None)
    ]
    assert names == ["TensorBoard", "WandB"] and watch.watchers([], tmp_path, {}, None) == []


def test_missing_and_unknown_packages_are_refused_before_anything_starts(tmp_path, tensorboard, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="--watch wandb: the package is not installed; pip install wandb"):
        watch.watchers(["tensorboard", "wandb"], tmp_path, {}, None)
    assert tensorboard == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="not installed; pip install tensorboard"):
        watch.check(["tensorboard"])
    with pytest.raises(ValueError, match="--watch mlflow: expected tensorboard or wandb"):
        watch.check(["mlflow"])
