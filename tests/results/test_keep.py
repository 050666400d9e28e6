"""Rows of runs that have ended: written after each run, read at the next start, also from older files."""

import json
from pathlib import Path

import pytest

from results import prompting_studies, tool_loop
from results.keep import Ended

RESULTS = Path(prompting_studies.__file__).parent


def test_rows_are_written_at_once_and_read_at_the_next_start(tmp_path):
    path = tmp_path / "figures.json"
    ended = Ended(path, {"steps": 3}, rows="seeds")
    assert not ended.has(seed=1)
    ended.add({"seed": 1, "curve": [(1, 0.1)], "by_n": {10: 0.3}})
    ended.add({"seed": 0}, order=lambda row: row["seed"])
    again = Ended(path, {"steps": 3}, rows="seeds")
    assert again.rows == ended.rows and [row["seed"] for row in again.rows] == [0, 1]
    assert again.find(seed=1) == {"seed": 1, "curve": [[1, 0.1]], "by_n": {"10": 0.3}}
    assert again.has(seed=0) and not again.has(seed=0, curve=1)
    assert json.loads(path.read_text()).keys() == {"cpu", "torch", "steps", "seeds"}


def test_rows_made_with_other_settings_do_not_count(tmp_path):
    path = tmp_path / "figures.json"
    Ended(path, {"steps": 3}).add({"seed": 0})
    assert Ended(path, {"steps": 3}, same=("steps",)).has(seed=0)
    assert not Ended(path, {"steps": 4}, same=("steps",)).rows
    assert Ended(path, {"steps": 4}).has(seed=0)


def test_lines_are_added_to_a_jsonl_file_and_those_in_it_stay(tmp_path):
    path = tmp_path / "ended.jsonl"
    path.write_text('{"rate": 0.1,   "seed": 0}\n')
    ended = Ended(path)
    ended.add({"rate": 0.1, "seed": 1})
    assert path.read_text() == '{"rate": 0.1,   "seed": 0}\n{"rate": 0.1, "seed": 1}\n'
    assert ended.has(rate=0.1, seed=0) and Ended(path).has(rate=0.1, seed=1)


@pytest.mark.parametrize(
    "name, rows, settings, key",
    [
        ("funsearch", "runs", {}, {"n": 5, "method": "random", "seed": 0}),
        ("scratchpad", "rows", {"steps": None}, {"seed": 2}),
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
