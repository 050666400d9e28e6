"""Rows of runs that have ended: written after each run, read at the next start, also from older files."""

import json
from pathlib import Path

import pytest
import torch

from engine import cpu
from results import prompting_studies, tool_loop
from results.keep import Ended

RESULTS = Path(prompting_studies.__file__).parent


def test_rows_are_written_at_once_and_read_at_the_next_start(tmp_path):
    path = tmp_path / "figures.json"
    ended = Ended(path, {"steps": 3}, rows="seeds")
    assert not ended.has(seed=1)
    ended.add({"seed": 1, "curve": [(1, 0.1)], "by_n": {10: 0.3}})
    ended.add({"seed": 0})
    again = Ended(path, {"steps": 3}, rows="seeds")
    assert again.rows == ended.rows and [row["seed"] for row in again.rows] == [1, 0]
    assert again.find(seed=1) == {"seed": 1, "curve": [[1, 0.1]], "by_n": {"10": 0.3}}
    assert again.has(seed=0) and not again.has(seed=0, curve=1)
    assert json.loads(path.read_text()).keys() == {"cpu", "torch", "steps", "seeds"}


def test_rows_made_with_other_settings_are_refused_and_stay(tmp_path):
    path = tmp_path / "figures.json"
    Ended(path, {"steps": 3, "sizes": (1, 2)}).add({"seed": 0})
    assert Ended(path, {"steps": 3, "sizes": (1, 2)}, same=("steps", "sizes")).has(seed=0)
    with pytest.raises(ValueError, match=r"figures\.json holds rows made with steps 3, and this call has 4"):
        Ended(path, {"steps": 4}, same=("steps",))
    assert Ended(path, {"steps": 4}).has(seed=0)


@pytest.mark.parametrize(
    "text, named",
    [("{", "not JSON"), ("[1]", "found a list"), ('{"runs": []}', "holds no 'rows'")],
)
def test_a_file_that_holds_no_rows_is_named(text, named, tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=named) as raised:
        Ended(path)
    assert str(path) in str(raised.value) and path.read_text() == text


def test_rows_of_another_machine_keep_its_name(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text('{"cpu": "another CPU", "torch": "1.0", "rows": [{"seed": 0}]}')
    for seed in (1, 2):
        Ended(path).add({"seed": seed})
    known = json.loads(path.read_text())
    assert known["cpu"] == f"another CPU; {cpu.name()}" and known["torch"] == f"1.0; {torch.__version__}"
    assert [row["seed"] for row in known["rows"]] == [0, 1, 2]


@pytest.mark.parametrize(
    "name, rows, settings, key",
    [
        ("funsearch", "runs", {"evaluations": 10_000}, {"n": 5, "method": "random", "seed": 0}),
        ("scratchpad", "rows", {"steps": None}, {"seed": 2}),
        ("copying", "results", {"steps": 1000, "lr": 4e-3}, {"layers": "MoBA", "seed": 2}),
        ("curation", "runs", {"steps": 400, "texts": 160, "longest": 6000}, {"arm": "dirty", "seed": 2}),
        ("frontier", "runs", {}, {"method": "KTO", "beta": 0.5, "seed": 2}),
        ("tool_loop", "seeds", {"steps": 1000, "problems": 300}, {"seed": 2}),
    ],
)
def test_files_of_the_past_are_read(name, rows, settings, key):
    assert Ended(RESULTS / f"{name}.json", settings, rows=rows, same=settings).has(**key)


def test_the_tool_loop_continues_after_an_interruption(tmp_path, monkeypatch, capsys):
    made = []

    def study(seed, steps, problems, longer):
        if seed == 1 and len(made) == 1:
            raise KeyboardInterrupt
        made.append(seed)
        return {"direct": seed / 2}, []

    monkeypatch.setattr(tool_loop, "study", study)
    with pytest.raises(KeyboardInterrupt):
        tool_loop.main(["--out", str(tmp_path / "t.json")])
    made.append("again")
    tool_loop.main(["--out", str(tmp_path / "t.json")])
    assert made == [0, "again", 1, 2]
    assert "direct                  50.0% (0.0% to 100.0%)" in capsys.readouterr().out
