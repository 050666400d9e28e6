"""Prompt injection: the training has no attack, attacks are what they are named, both sides are counted."""

import random

import pytest
import torch

from evaluation import injection
from evaluation.injection import ATTACKS, FREE, ID, INSTRUCTIONS, RESERVED, STOP, TYPED, VOCABULARY, answer
from evaluation.small_runs import IGNORED, small_gpt


def test_the_instructions_do_what_they_say():
    data = ["c", "a", "h"]
    expected = {"copy": ["c", "a", "h"], "reverse": ["h", "a", "c"], "first": ["c"], "last": ["h"]}
    expected["next"] = ["d", "b", "a"]
    assert {name: answer(name, data) for name in INSTRUCTIONS} == expected


def test_training_holds_every_form_and_no_instruction_in_the_data_of_delimiters():
    draws, seen = random.Random(0), set()
    for _ in range(2000):
        for asked, right in injection.training_row(draws):
            words = [word for word in asked if word in injection.WORDINGS]
            last = next(name for name, (wordings, _) in INSTRUCTIONS.items() if words[-1] in wordings)
            letters = [word for word in asked if word in injection.LETTERS]
            assert right == answer(last, letters)  # the last instruction counts
            form = asked[0] if asked[0] in (TYPED[0], RESERVED[0]) else "free"
            if form != "free":
                assert len(words) == 1 and asked[1] == words[0] and asked[2] in (TYPED[1], RESERVED[1])
            seen.add((form, len(words), "no" in asked))
    assert seen == {(TYPED[0], 1, False), (RESERVED[0], 1, False), ("free", 1, False), ("free", 2, False),
                    ("free", 2, True)}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_changes_the_data_alone_and_types_no_reserved_token(attack):
    for delimiters in (FREE, TYPED, RESERVED):
        for asked, right, injected in injection.attacked(attack, delimiters, 50, random.Random(1)):
            assert right != injected and len(asked) + len(injected) < injection.N_TOKENS
            assert [word for word in asked if word in RESERVED] == [w for w in delimiters if w in RESERVED]
            trusted = asked[0] if delimiters == FREE else asked[1]
            at = asked.index(trusted) + (1 if delimiters == FREE else 2)
            data = asked[at:-1]
            own = [word for word in data if word in injection.WORDINGS]
            assert len(own) == 1
            name = next(name for name, (words, _) in INSTRUCTIONS.items() if own[0] in words)
            assert own[0] == INSTRUCTIONS[name][0][attack == "other wording"]
            if attack != "completion":
                letters = [word for word in data if word in injection.LETTERS]
                assert injected == answer(name, letters)
                place = data.index(own[0])
                assert {"in front": place == 0, "in the middle": 0 < place < len(data) - 1}.get(
                    attack, place == len(data) - 1
                )
                assert ("no" in data) == (attack == "correction")


def test_answers_and_stops_are_predicted_and_nothing_else():
    turns = [(["first", "a", "b", "="], ["a"]), (["copy", "c", "="], ["c"])]
    batch = injection.rows([turns, turns[:1]])
    words = [[VOCABULARY[t] if t != IGNORED else "-" for t in row] for row in batch["targets"].tolist()]
    assert words[0] == ["-", "-", "-", "a", STOP, "-", "-", "-", "c", STOP]
    assert words[1] == ["-", "-", "-", "a", STOP, "-", "-", "-", "-", "-"]

    model = small_gpt(len(VOCABULARY), injection.N_TOKENS, 0)
    logits = model(batch["tokens"]).log_softmax(-1)
    assert injection.log_p(model, batch)[1].item() == pytest.approx(
        (logits[1, 3, ID["a"]] + logits[1, 4, ID[STOP]]).item(), abs=1e-5
    )


class Obedient:
    """A model that follows one instruction of a prompt, the first or the last, with the letters behind it or
    before it."""

    def __init__(self, which):
        self.which = which

    def generate(self, prompts, n_new, temperature, stop):
        found = []
        for tokens in prompts:
            words = [VOCABULARY[token] for token in tokens]
            word = [w for w in words if w in injection.WORDINGS][self.which]
            name = next(name for name, (wordings, _) in INSTRUCTIONS.items() if word in wordings)
            own = [w for w in words if w in injection.LETTERS]
            found.append([ID[w] for w in (*answer(name, own), STOP)])
        return found


def test_following_the_first_instruction_is_right_and_following_the_last_is_injected(monkeypatch):
    monkeypatch.setattr(injection, "N_TEST", 40)
    for which, expected in ((0, "right"), (-1, "injected")):
        figures = injection.measure(Obedient(which), TYPED, seed=0)
        assert figures["utility"] == 1
        for attack in ("at the end", "other wording", "in the middle", "in front", "correction"):
            assert figures[expected][attack] == 1
            assert figures["injected" if expected == "right" else "right"][attack] == 0


def test_tuning_leaves_the_base_alone_and_dpo_prefers_the_right_answer(monkeypatch):
    monkeypatch.setattr(injection, "BATCH", 8)
    monkeypatch.setattr(injection, "DPO_RATE", 2e-2)
    base = small_gpt(len(VOCABULARY), injection.N_TOKENS, 0, width=32)
    before = [p.clone() for p in base.parameters()]
    tests = injection.attacked("at the end", RESERVED, 8, random.Random(9))
    monkeypatch.setattr(injection, "attacked", lambda *arguments: tests)
    model = injection.aligned(base, 0, 12)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    sides = [injection.rows([[(test[0], test[side])] for test in tests]) for side in (1, 2)]
    with torch.no_grad():
        margins = [[injection.log_p(m, side) for side in sides] for m in (base, model)]
    assert (margins[1][0] - margins[1][1]).mean() > (margins[0][0] - margins[0][1]).mean() + 1


def test_every_second_row_of_struq_is_attacked_and_answered_rightly(monkeypatch):
    batches = []
    monkeypatch.setattr(injection, "train", lambda model, batch_of, *a, **k: batches.append(
        batch_of(torch.Generator().manual_seed(0))
    ))  # fmt: skip
    base = small_gpt(len(VOCABULARY), injection.N_TOKENS, 0, width=32)
    for attacks, share in (((), 0.0), (("at the end",), 0.5)):
        injection.tuned(base, 0, attacks, 1)
        n = [sum(VOCABULARY[t] in injection.WORDINGS for t in row) for row in batches[-1]["tokens"].tolist()]
        assert sum(k == 2 for k in n) / len(n) == share and set(n) <= {1, 2}


def test_the_command_prints_every_defence_and_attack(monkeypatch, capsys):
    monkeypatch.setattr(injection, "N_TEST", 4)
    monkeypatch.setattr(injection, "BATCH", 4)
    injection.main(["--steps", "1"])
    printed = capsys.readouterr().out
    names = ("nothing", "typed delimiters", "reserved delimiters", "tuned, no attacks", "StruQ", "SecAlign")
    assert all(name in printed for name in (*names, *ATTACKS, "injected / right"))
