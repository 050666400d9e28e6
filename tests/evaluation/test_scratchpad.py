"""Scratchpad: the games have no short cut, each kind is what it says, the measures follow a known reader."""

from itertools import product

import pytest
import torch
from torch import Generator

from evaluation import scratchpad
from evaluation.scratchpad import CUP, EQUALS, FILLER, KINDS, QUESTION, SWAPS, places, rows_of


def games(kind, n=4, n_games=300, seed=0):
    return rows_of(kind, n, n_games, Generator().manual_seed(seed))


def simulated(swaps, start=0):
    """Return where the ball is after each swap."""
    found, ball = [], start
    for i in swaps:
        a, b = SWAPS[i]
        ball = b if ball == a else a if ball == b else ball
        found.append(ball)
    return found


def test_the_places_are_those_of_a_simulation():
    swaps = torch.tensor([*product(range(3), repeat=4)])
    assert places(swaps).tolist() == [simulated(row) for row in swaps.tolist()]
    assert places(swaps, 2).tolist() == [simulated(row, 2) for row in swaps.tolist()]


def test_whoever_misses_a_single_swap_can_only_guess():
    swaps = torch.tensor([*product(range(3), repeat=4)])
    last = places(swaps)[:, -1]
    for missed in range(4):
        others = [i for i in range(4) if i != missed]
        for seen in product(range(3), repeat=3):
            some = last[(swaps[:, others] == torch.tensor(seen)).all(1)]
            assert sorted(some.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_right_answer_and_differs_only_in_between(kind):
    rows, n = games(kind), 4
    assert rows.shape[1] == scratchpad.n_tokens(kind, n)
    swaps, between = rows[:, :n], rows[:, n + 1 : -2]
    right = places(swaps)
    assert (rows[:, n] == QUESTION).all() and (rows[:, -2] == EQUALS).all()
    assert torch.equal(rows[:, -1], CUP + right[:, -1])
    if kind == "scratchpad":
        assert torch.equal(between, CUP + right)
    elif kind == "filler":
        assert (between == FILLER).all() and between.shape[1] == n
    elif kind == "wrong scratchpads":  # each place is right as often as by chance
        assert between.shape[1] == n and ((between - CUP == right).double().mean() - 1 / 3).abs() < 0.06
    else:
        assert between.shape[1] == 0


@pytest.mark.parametrize("n", scratchpad.LENGTHS)
def test_equal_tokens_are_equal(n):
    tokens = {k: scratchpad.n_steps(k, n, 300) * scratchpad.n_tokens(k, n) for k in KINDS}
    assert tokens["scratchpad"] <= tokens["direct, equal tokens"] < 1.01 * tokens["scratchpad"]
    assert tokens["filler"] == tokens["wrong scratchpads"] == tokens["scratchpad"] > tokens["direct"]


class Reader:
    """A model that goes on from what is written (follows="scratchpad"), or from the swaps alone."""

    def __init__(self, n, follows):
        self.n, self.follows = n, follows

    def generate(self, begun, n_new, temperature):
        return [self.go_on(row, n_new) for row in begun]

    def go_on(self, row, n_new):
        swaps, written = row[: self.n], row[self.n + 1 :]
        right = [CUP + place for place in simulated(swaps)]
        while len(written) < self.n:
            i = len(written)
            start = written[-1] - CUP if written else 0
            written.append(CUP + simulated([swaps[i]], start)[0])
        answer = written[-1] if self.follows == "scratchpad" else right[-1]
        return [*written, EQUALS, answer][-n_new:]


@pytest.mark.parametrize("follows", ["scratchpad", "swaps"])
def test_a_changed_scratchpad_shows_what_the_answer_follows(follows):
    reader = Reader(6, follows)
    assert scratchpad.accuracy(reader, "scratchpad", 6, Generator().manual_seed(0)) == 1
    shares = scratchpad.changed(reader, 6, Generator().manual_seed(0))
    other = {"scratchpad": "swaps", "swaps": "scratchpad"}[follows]
    assert shares[f"follows the {follows}"] == 1 and shares[f"follows the {other}"] == 0


def test_the_command_trains_every_kind_and_only_on_what_follows_the_question(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(scratchpad, "N_TEST", 8)
    monkeypatch.setattr(scratchpad, "BATCH", 4)
    monkeypatch.setattr(scratchpad, "train", lambda model, batch_of, steps, seed: seen.append(
        (steps, batch_of(Generator().manual_seed(0)))
    ))  # fmt: skip
    scratchpad.main(["--steps", "2"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS) and printed.count("follows the scratchpad") == 2
    assert len(seen) == 3 * len(scratchpad.EVERYWHERE) + len(KINDS)
    for _, batch in seen:
        question = (batch["tokens"] == QUESTION).int().argmax(1)
        first = (batch["targets"] >= 0).int().argmax(1)
        assert torch.equal(first, question) and (batch["targets"][:, -1] >= CUP).all()
