"""The table of default runs: every command is one that train.py has, and a line is the mean of its seeds."""

from argparse import Namespace

import pytest

from engine import contract
from results import defaults
from results.defaults import RUNS, in_a_table

ROW = {"name": "vae", "command": "python train.py --model vae", "minutes": 2.0, "guess": "a | b"}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_names_a_model_and_a_task_that_there_are(name, tmp_path):
    flags = dict(zip(RUNS[name][::2], RUNS[name][1::2], strict=True))
    args = {
        "cache": tmp_path,
        "task": None,
        "adapter": None,
        "base": None,
        "init_from": None,
        "data": None,
        "size": None,
    }
    args |= {key.removeprefix("--"): value for key, value in flags.items()} | {"train": "all"}
    assert contract.resolve(Namespace(**args)).task.STEPS > 0


def test_a_line_has_the_mean_and_the_range_of_its_seeds_and_no_cell_is_broken():
    rows = [ROW | {"seed": i, "held out": {"val_loss": loss}} for i, loss in enumerate((1.0, 2.5))]
    head, _, line = in_a_table(rows).splitlines()
    assert line == "| `python train.py --model vae` | 2.0 | loss 1.75 (1 to 2.5) | 2 | a \\| b |"
    assert head.count("|") == line.replace("\\|", "").count("|")


def test_one_seed_has_no_range():
    line = in_a_table([ROW | {"seed": 0, "held out": {"val_loss": 1.0, "val_accuracy": 0.5}}]).splitlines()[2]
    assert "| loss 1; accuracy 0.5 | 1 |" in line


def test_a_table_of_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no rows in .*nothing\.json"):
        defaults.main(["--out", str(tmp_path / "nothing.json"), "--table"])
