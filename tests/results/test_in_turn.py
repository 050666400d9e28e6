"""Sides that are measured in turn: their order, the ratio of each round, what is written, and memory."""

import json
import sys

import pytest
import torch

from results import in_turn


def test_sides_take_turns_and_rounds_to_warm_up_do_not_count():
    calls, numbers = [], iter(range(6))

    def side(name):
        return lambda: calls.append(name) or next(numbers)

    figures = in_turn.measure_in_turn({"a": side("a"), "b": side("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert figures == {"a": [2, 4], "b": [3, 5]}


def test_a_ratio_is_that_of_one_round(capsys):
    # In each round ours is twice as fast, though the machine was ten times as slow in the second.
    rows = in_turn.compared({"theirs": [100, 10], "ours": [200, 20]}, "theirs", shape="small")
    assert rows[1] == {
        "shape": "small",
        "side": "ours",
        "tokens_per_second": 110,
        "ratio": 2,
        "ratio_min": 2,
        "ratio_max": 2,
    }
    assert "2.00x (2.00 to 2.00)" in capsys.readouterr().out


def test_milliseconds_are_compared_round_by_round():
    row = in_turn.in_milliseconds([0.001, 0.010], [0.002, 0.040])
    assert row == {"ms": 5.5, "beside_ms": 21, "ratio": 3, "ratio_min": 2, "ratio_max": 4}
    assert in_turn.shown(row) == "3.00x (2.00 to 4.00)"


@pytest.mark.parametrize("peer", ["pytest", None])
def test_figures_are_written_with_the_machine(peer, tmp_path):
    in_turn.write_figures(tmp_path / "x.json", "x", 0.5, [{"ratio": 2}], peer)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["results"] == [{"ratio": 2}] and content["load_average"] == 0.5
    assert ("pytest" in content) == (peer is not None) and content["cpu"] and content["threads"]


def test_peak_memory_counts_what_is_held_at_one_time():
    def work():
        for _ in range(3):
            x = torch.empty(1000, 250)  # 1 MB
            del x
        kept = [torch.empty(1000, 250) for _ in range(2)]
        del kept

    assert in_turn.peak_memory(work) == 2_000_000


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--out", ""], ["--out", "."]])
def test_flags_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        in_turn.arguments("A comparison.", 3, flags)
    assert ended.value.code == 2 and "error: argument --" in capsys.readouterr().err
    assert in_turn.arguments("A comparison.", 3, []).rounds == 3


def test_the_rate_is_that_of_all_calls():
    times, calls = iter([10.0, 14.0]), []
    assert in_turn.rate(lambda: calls.append(0), 6, times=2, clock=lambda: next(times)) == 3
    assert len(calls) == 2


@pytest.mark.parametrize(
    "code, why",
    [
        ("raise RuntimeError('no data')", "RuntimeError: no data"),
        ("import sys; print('error: no file', file=sys.stderr); sys.exit('===')", "error: no file"),
        ("import sys; sys.exit(3)", "no message"),
    ],
)
def test_a_program_that_fails_says_why(code, why):
    assert in_turn.output_of([sys.executable, "-c", "print('done')"]) == "done\n"
    with pytest.raises(ValueError, match=rf"ended with exit code \d: {why}$"):
        in_turn.output_of([sys.executable, "-c", code])
