"""Runs that go on: to the end of their schedule after a crash, by a second schedule, or not to the end; and
the models that are kept on the way."""

import argparse
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_gpt import die_in, flags, forked, rows, same_run

import train
from engine import checkpoint, log, optim


def test_a_crashed_run_ends_where_it_would_have_ended(text, tmp_path):
    crashed = forked(flags(text, tmp_path / "run"), prepare=die_in, arguments=("save", 2))
    assert crashed.end() == -signal.SIGKILL
    assert train.main(flags(text, tmp_path / "run", steps=None, resume=True)) == 0
    train.main(flags(text, tmp_path / "whole"))
    assert same_run(tmp_path / "whole", tmp_path / "run")


def test_another_end_would_make_the_learning_rate_jump_and_is_refused(text, tmp_path, capsys):
    train.main(flags(text, tmp_path / "run"))
    assert train.main(flags(text, tmp_path / "run", steps=9, resume=True)) == 2
    error = capsys.readouterr().err
    assert "is scheduled to step 6, not 9" in error and "--extend" in error


def test_extending_a_finished_run_adds_a_second_schedule(text, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(flags(text, out, warmup=2))
    assert train.main(flags(text, out, steps=None, warmup=1, extend=5)) == 0
    rates = [row["lr"] for row in rows(out) if "lr" in row]
    peak = max(rates)
    one = argparse.Namespace(steps=6, warmup=2, lr=peak, schedule="cosine", schedule_from=0)
    two = argparse.Namespace(steps=11, warmup=1, lr=peak, schedule="cosine", schedule_from=6)
    expected = [optim.learning_rate(i, one) for i in range(6)] + [
        optim.learning_rate(i, two) for i in range(6, 11)
    ]
    assert rates == pytest.approx(expected) and two.lr == pytest.approx(expected[6])
    # A run that is extended is resumed to the end of its second schedule.
    assert train.main(flags(text, out, steps=None, warmup=1, resume=True)) == 0
    assert [row["lr"] for row in rows(out) if "lr" in row] == rates


def test_only_a_finished_run_is_extended(text, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(flags(text, out))
    state = json.loads((out / "checkpoint" / "state.json").read_text())
    args = argparse.Namespace(extend=3, out=out, steps=6, schedule="cosine")
    with pytest.raises(ValueError, match="is at step 4 of 6; finish it first"):
        checkpoint.continue_schedule(args, state | {"step": 4}, given=False)
    assert train.main(flags(text, out, steps=9, extend=3)) == 2
    assert "--extend 3 and --steps 9" in capsys.readouterr().err


def test_the_best_model_and_the_last_ones_are_kept_beside_the_last(text, tmp_path, monkeypatch, capsys):
    losses = iter([5.0, 3.0, 4.0, 4.0, 2.0, 2.5])
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: real(run) | {"val_loss": next(losses)})
    kept = {}
    real_save = log.save_model
    monkeypatch.setattr(
        log, "save_model", lambda run, path: (kept.update({run.step: path}), real_save(run, path))
    )
    out, every = tmp_path / "run", dict(eval_every=1, save_every=1, keep_best=True, keep_models=2)
    assert train.main(flags(text, out, steps=8, patience=2, **every)) == 0
    assert kept == {1: out / "best"}  # the losses of steps 2 and 3 are higher, and end the run
    assert "stopped at step 3: 2 evaluations, no lower loss" in capsys.readouterr().out
    assert sorted(path.name for path in (out / "models").iterdir()) == ["step-2", "step-3"]
    best, last, two = (
        load_file(out / name / "model.safetensors") for name in ("best", "model", "models/step-2")
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert any(not torch.equal(two[name], last[name]) for name in two)
    three = load_file(out / "models" / "step-3" / "model.safetensors")
    assert all(torch.equal(three[name], last[name]) for name in last)
