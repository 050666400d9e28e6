"""Progress in a log file, by a clock that the tests set, and on a terminal, which a pty plays."""

import io
import os
import pty
import re
import select
import sys
import termios
from contextlib import contextmanager

import pytest

from engine.progress import Progress, duration
from formats.progress import progress_bar


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The time that both files read."""
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


@contextmanager
def terminal(monkeypatch):
    """Within it stderr is a terminal. Gives a function that returns what was written there."""
    ours, theirs = pty.openpty()

    def written() -> str:
        stderr.flush()
        text = b""
        while select.select([ours], [], [], 0.5)[0]:  # it comes in pieces
            text += os.read(ours, 1 << 16)
        return text.decode()

    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield written
    os.close(ours)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_log_has_lines_at_once_then_every_half_minute_and_at_evaluations(clock, capsys):
    shown = Progress(1300, 0)
    shown.show(val="8.321")
    assert lines(capsys) == ["step 0/1300  val 8.321"]
    for step in range(1, 131):
        clock.now += 1.0
        shown.update(step)
        if step % 10 == 0:
            shown.show(loss=f"{9 - step / 100:.3f}", **{"tok/s": "2,048"})
    assert lines(capsys) == [
        "step 10/1300  val 8.321  loss 8.900  2,048 tok/s  21.5 min left",
        "step 40/1300  val 8.321  loss 8.700  2,048 tok/s  21 min left",
        "step 70/1300  val 8.321  loss 8.400  2,048 tok/s  20.5 min left",
        "step 100/1300  val 8.321  loss 8.100  2,048 tok/s  20 min left",
        "step 130/1300  val 8.321  loss 7.800  2,048 tok/s  19.5 min left",
    ]
    shown.show(val="7.654")
    assert lines(capsys) == ["step 130/1300  val 7.654  loss 7.700  2,048 tok/s  19.5 min left"]
    shown.close()
    assert lines(capsys) == []  # the last step has its line


def test_the_end_of_a_log_is_its_last_step(clock, capsys):
    shown = Progress(10, 4)
    shown.show(loss="2.5")
    clock.now += 3.0
    shown.update(10)
    shown.close()
    assert lines(capsys) == ["step 4/10  loss 2.5", "step 10/10  loss 2.5"]


def test_time_left_counts_the_steps_since_a_resume(clock, capsys):
    shown = Progress(1000, 900)
    clock.now += 50.0
    shown.update(950)
    shown.show(loss="2")
    assert lines(capsys) == ["step 950/1000  loss 2  50 s left"]


def test_other_ranks_show_nothing(capsys):
    shown = Progress(10, 0, enabled=False)
    shown.update(1)
    shown.show(loss="1", val="2")
    shown.note("text")
    shown.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_note_is_a_line(capsys):
    shown = Progress(10)
    shown.note("step 3: loss nan")
    assert capsys.readouterr().out == "step 3: loss nan\n"


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    with terminal(monkeypatch) as written:
        shown = Progress(10, 4)
        for step in range(5, 11):
            shown.update(step)
            shown.show(loss=f"{step}.5")
        shown.show(val="9.9")
        shown.close()
        text = written()
    assert "step 10/10" not in text
    states = re.findall(r"(\d+)/10 \[", text)
    assert states[0] == "4" and states[-1] == "10"
    assert "loss=10.5, val=9.9" in text


def test_a_bar_goes_by_the_monotonic_clock(clock, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
    with terminal(monkeypatch) as written:
        shown = Progress(10)
        clock.now += 65.0
        shown.update(5)
        shown.close()
        assert "5/10 [01:05<01:05" in written()


def test_bars_of_other_work_are_lines_in_a_log(clock, capsys):
    with progress_bar(desc="tokenise", total=100, unit="B") as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.update(1)
    found = lines(capsys)
    assert 3 <= len(found) <= 4 and all(line.startswith("tokenise: ") for line in found)
    assert "30/100 [00:30<01:10" in found[0] and "\r" not in "".join(found)


def test_short_work_leaves_no_line(clock, capsys):
    for _ in progress_bar(range(100), "counting words"):
        clock.now += 0.1
    assert lines(capsys) == []


def test_bars_of_other_work_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as written:
        assert list(progress_bar(iter(range(3)), "merge", total=3)) == [0, 1, 2]
        assert "merge: 100%" in written()


def test_durations_have_a_unit_of_their_size():
    assert [duration(s) for s in (5, 119, 120, 7200, 200_000)] == [
        "5 s",
        "119 s",
        "2 min",
        "2 h",
        "2.31 days",
    ]


def test_what_is_no_terminal_by_its_own_word(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Progress(3).show(loss="1")
    assert sys.stderr.getvalue() == "step 0/3  loss 1\n"
