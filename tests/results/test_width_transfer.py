"""The study of width transfer: a run from beginning to end, its best learning rate, and what a file holds."""

import json
import math

import pytest

from results import width_transfer


def test_a_run_with_width_transfer_returns_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(width_transfer, "BATCH", 1)
    assert 4 < width_transfer.run(64, 128, 2.0**-8, seed=0, steps=2, cache=tmp_path) < 7  # log(257) is 5.5


def test_the_lowest_point_is_that_of_the_parabola():
    losses = {lr: (math.log2(lr) + 8.25) ** 2 for lr in width_transfer.RATES}
    assert width_transfer.lowest(losses) == pytest.approx(2**-8.25)


def test_runs_of_other_steps_are_refused(tmp_path):
    out, machine = tmp_path / "out.json", {"cpu": "a", "steps": 3}
    out.write_text(json.dumps(machine | {"results": [{"loss": 1.0}]}))
    assert width_transfer.saved_results(out, machine) == [{"loss": 1.0}]
    with pytest.raises(ValueError, match="of another machine or other steps"):
        width_transfer.saved_results(out, machine | {"steps": 4})
