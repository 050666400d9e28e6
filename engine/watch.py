"""Send a run's metrics to TensorBoard or Weights & Biases: `train.py --watch tensorboard wandb`.

    tensorboard    writes event files to OUT/tensorboard; see them with `tensorboard --logdir runs`
    wandb          logs to a run of the project plinth on wandb.ai, or with WANDB_MODE=offline to OUT/wandb

Both get the rows of metrics.jsonl, under the same names. A resumed run continues the same curves. The
packages are optional.
"""

import importlib
import math
from pathlib import Path

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(names: list[str]) -> None:
    """Raise ValueError for a name that is not one of PACKAGES, or whose package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--watch {name}: expected {' or '.join(PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise ValueError(f"--watch {name}: the package is not installed; pip install {name}") from None


def watchers(names: list[str], out: Path, config: dict, resumed_at: int | None) -> list:
    """Return a watcher for each name, with log(step, row) for rows of metrics.jsonl, and close().

    config: wandb keeps it with the run. resumed_at: the step from which the run continues, None at the start.
    Raises ValueError for a name that `check` refuses, and if wandb cannot start.
    """
    check(names)
    known = {"tensorboard": TensorBoard, "wandb": WandB}
    return [known[name](out, config, resumed_at) for name in names]


def finite(row: dict) -> dict:
    """Return the finite numbers of a row, without its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class TensorBoard:
    """Writes rows to event files in out/tensorboard."""

    def __init__(self, out: Path, config: dict, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint are logged again, so TensorBoard must hide those it has from purge_step
        # on. At the start it hides everything: an earlier run may have ended before its first checkpoint.
        purge = 0 if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def log(self, step: int, row: dict) -> None:
        for name, value in finite(row).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # rows before a checkpoint must be on disk: a resumed run does not repeat them

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Sends rows to wandb.ai. The id of the run is kept in out/wandb.id."""

    def __init__(self, out: Path, config: dict, resumed_at: int | None):
        import wandb

        # Continue the run whose id was saved, if this run was resumed.
        id_file = out / "wandb.id"
        resumed = resumed_at is not None and id_file.is_file()
        known = id_file.read_text(encoding="utf-8").strip() if resumed else None
        try:
            self.run = wandb.init(
                resume="allow",
                project="plinth",
                name=out.resolve().name,
                dir=str(out),
                config=config,
                id=known,
            )
        except wandb.Error as error:
            problem = str(error).rstrip(".")
            raise ValueError(f"--watch wandb: {problem}; or set WANDB_MODE=offline") from None
        id_file.write_text(self.run.id + "\n", encoding="utf-8")

    def log(self, step: int, row: dict) -> None:
        # After a crash some steps are computed again. wandb ignores those that it has; their rows are the
        # same.
        self.run.log(finite(row), step=step)

    def close(self) -> None:
        self.run.finish()
