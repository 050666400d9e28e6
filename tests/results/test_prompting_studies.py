"""The script of the studies of prompting: seeds that are in the file are kept, and pictures are drawn."""

import json

import pytest

from evaluation import in_context, scratchpad
from results import prompting_studies


@pytest.mark.usefixtures("rendered")
def test_seeds_in_the_file_are_kept_and_others_are_made(tmp_path, monkeypatch, capsys):
    made = []

    def study(seed, steps):
        made.append((seed, steps))
        kinds = [(kind, n) for n in (2, 12) for kind in scratchpad.KINDS]
        return [{"seed": seed, "kind": kind, "swaps": n, "right": 0.5} for kind, n in kinds]

    monkeypatch.setattr(scratchpad, "study", study)
    for seeds in ("1", "3", "3"):
        prompting_studies.main(["scratchpad", "--seeds", seeds, "--out", str(tmp_path)])
    assert made == [(0, None), (1, None), (2, None)]
    rows = json.loads((tmp_path / "scratchpad.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0] * 10 + [1] * 10 + [2] * 10
    assert (tmp_path / "scratchpad.png").stat().st_size > 5000
    assert "50.0% (50.0% to 50.0%)" in capsys.readouterr().out

    # A file of other steps is refused, and stays.
    with pytest.raises(ValueError, match="made with steps None, and this call has 7"):
        prompting_studies.main(["scratchpad", "--seeds", "1", "--steps", "7", "--out", str(tmp_path)])
    assert len(made) == 3 and json.loads((tmp_path / "scratchpad.json").read_text())["rows"] == rows


@pytest.mark.usefixtures("rendered")
def test_in_context_learning_is_drawn_from_what_the_file_holds(tmp_path, monkeypatch, capsys):
    for name, value in (("N_TEST", 4), ("BATCH", 2), ("T", 12)):
        monkeypatch.setattr(in_context, name, value)
    prompting_studies.run("in_context", 1, 1, tmp_path)
    prompting_studies.run("in_context", 2, 1, tmp_path)  # the first seed from the file, and a new one
    assert (tmp_path / "in_context.png").stat().st_size > 5000
    assert "Bayes" in capsys.readouterr().out


def test_a_study_that_there_is_not_is_named_before_any_other_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scratchpad, "study", lambda *_: pytest.fail("a study has begun"))
    with pytest.raises(SystemExit) as ended:
        prompting_studies.main(["scratchpad", "speling", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "error: speling: expected one of" in capsys.readouterr().err
