"""A run shown elsewhere while it goes on: `train.py --watch tensorboard wandb`, where these are installed.

    tensorboard    event files in OUT/tensorboard: tensorboard --logdir runs
    wandb          a run of the project plinth on wandb.ai, or with WANDB_MODE=offline files in OUT/wandb

Either is given the rows of metrics.jsonl, under the same names. A resumed run goes on in the same curves.
"""

import importlib
import math
from pathlib import Path

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check(names: list[str]) -> None:
    """ValueError for a name that is not known, or whose package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--watch {name}: expected {' or '.join(PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise ValueError(f"--watch {name}: the package is not installed; pip install {name}") from None


def watchers(names: list[str], out: Path, config: dict, resumed_at: int | None) -> list:
    """What is named, each with log(step, row), for rows of metrics.jsonl, and close(), for the end.

    config: what wandb keeps about the run. resumed_at: the step from which it goes on, None at the start.
    ValueError for a name that `check` refuses, and where wandb cannot begin."""
    check(names)
    known = {"tensorboard": TensorBoard, "wandb": WandB}
    return [known[name](out, config, resumed_at) for name in names]


def finite(row: dict) -> dict:
    """The numbers of a row that can be drawn, other than its step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class TensorBoard:
    def __init__(self, out: Path, config: dict, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is logged again, so it hides what it has from purge_step on. At
        # the start that is all: the rest of a run that did not come to its first checkpoint.
        purge = 0 if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def log(self, step: int, row: dict) -> None:
        for name, value in finite(row).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a resumed run does not log again what came before its checkpoint

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, out: Path, config: dict, resumed_at: int | None):
        import wandb

        id_file = out / "wandb.id"
        resumed = resumed_at is not None and id_file.is_file()
        known = id_file.read_text().strip() if resumed else None
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
        id_file.write_text(self.run.id + "\n")

    def log(self, step: int, row: dict) -> None:
        # After a crash wandb is past some steps that are made again, and leaves them out: they are the same.
        self.run.log(finite(row), step=step)

    def close(self) -> None:
        self.run.finish()
