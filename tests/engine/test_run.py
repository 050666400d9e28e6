"""Runs that go on: to the end of their schedule after a crash, by a second schedule, or not to the end; and
the models that are kept on the way."""

import argparse
import itertools
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_gpt import die_in, flags, forked, prepared, refused, rows, same_run

import train
from engine import checkpoint, log, optim
from engine.report import read_starts
from engine.run import Interrupted, check_saving


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
        checkpoint.continue_schedule(args, state | {"step": 4}, {"steps": "None"})
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
    # The losses of steps 2 and 3 are higher, and end the run.
    assert kept == dict.fromkeys((0, 1), out / "best")
    assert "stopped at step 3: 2 evaluations, no lower loss" in capsys.readouterr().out
    assert sorted(path.name for path in (out / "models").iterdir()) == ["step-2", "step-3"]
    best, last, two = (
        load_file(out / name / "model.safetensors") for name in ("best", "model", "models/step-2")
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert any(not torch.equal(two[name], last[name]) for name in two)
    three = load_file(out / "models" / "step-3" / "model.safetensors")
    assert all(torch.equal(three[name], last[name]) for name in last)


def test_a_resumed_run_may_have_less_patience_than_it_has_waited_already(text, tmp_path, monkeypatch, capsys):
    losses = itertools.chain([5.0, 3.0], itertools.repeat(4.0))
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: real(run) | {"val_loss": next(losses)})
    out, every = tmp_path / "run", dict(eval_every=1, save_every=1)
    assert train.main(flags(text, out, steps=8, patience=3, **every)) == 0
    assert "stopped at step 4: 3 evaluations, no lower loss" in capsys.readouterr().out
    assert train.main(flags(text, out, steps=8, patience=2, resume=True, **every)) == 0
    assert "stopped at step 5: 4 evaluations, no lower loss" in capsys.readouterr().out


def stop_evaluation(monkeypatch, losses) -> list[int]:
    """Let evaluations find these losses, and a signal stop one where the loss is None. Return the list that
    gets the steps at which a model is kept in best/."""
    real, real_save, kept = train.evaluate, log.save_model, []

    def evaluate(run):
        loss = next(losses)
        if loss is None:
            raise Interrupted(signal.SIGTERM)
        return real(run) | {"val_loss": loss}

    def save_model(run, path):
        kept.append(run.step)
        real_save(run, path)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(log, "save_model", save_model)
    return kept


def test_an_evaluation_that_was_stopped_keeps_the_best_model_when_it_is_made(text, tmp_path, monkeypatch):
    kept = stop_evaluation(monkeypatch, iter([5.0, 3.0, None, 2.0, 4.0]))
    options = dict(steps=3, eval_every=1, keep_best=True)
    assert train.main(flags(text, tmp_path / "run", **options)) == 0  # a signal comes in step 2
    assert kept == [0, 1]
    assert train.main(flags(text, tmp_path / "run", resume=True, **options)) == 0
    assert kept == [0, 1, 2]


def test_an_evaluation_that_was_stopped_may_end_patience_when_it_is_made(text, tmp_path, monkeypatch, capsys):
    stop_evaluation(monkeypatch, iter([5.0, 6.0, None, 6.0, 6.0]))
    options = dict(steps=4, eval_every=1, patience=2)
    assert train.main(flags(text, tmp_path / "run", **options)) == 0
    assert train.main(flags(text, tmp_path / "run", resume=True, **options)) == 0
    assert "stopped at step 2: 2 evaluations, no lower loss" in capsys.readouterr().out


def test_an_extended_run_has_the_rate_and_the_schedule_of_the_first_unless_it_names_others(text, tmp_path):
    out, first = tmp_path / "run", dict(lr=0.01, schedule="constant", warmup=0)
    assert train.main(flags(text, out, **first)) == 0
    assert train.main(flags(text, out, steps=None, warmup=0, extend=2)) == 0
    assert [row["lr"] for row in rows(out) if "lr" in row] == [0.01] * 8
    assert train.main(flags(text, out, steps=None, extend=2, **first | {"lr": 0.02})) == 0
    assert [row["lr"] for row in rows(out) if "lr" in row][8:] == [0.02] * 2


def test_an_extended_run_goes_on_with_its_starts_and_with_the_curves_of_watchers(text, tmp_path, monkeypatch):
    out, resumed_at = tmp_path / "run", []
    monkeypatch.setattr(log.watch, "watchers", lambda names, out, config, step: resumed_at.append(step) or [])
    assert train.main(flags(text, out)) == 0
    assert train.main(flags(text, out, steps=None, extend=2)) == 0
    assert [start["step"] for start in read_starts(out)] == [0, 6] and resumed_at == [None, 6]


def test_fewer_steps_than_are_made_are_refused(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "run", schedule="constant")) == 0
    again = flags(text, tmp_path / "run", schedule="constant", steps=4, resume=True)
    assert "--steps 4: the run in" in refused(capsys, again)


def test_a_new_run_removes_the_first_answers_of_an_earlier_one(text, tmp_path):
    """An earlier run that was killed before its first checkpoint leaves them in --out."""
    first = tmp_path / "run" / "before.json"
    first.parent.mkdir()
    first.write_text('["an answer"]')
    assert train.main(flags(text, tmp_path / "run", steps=2)) == 0
    assert not first.exists()


def test_half_a_model_that_a_killed_process_has_left_is_no_kept_model(text, tmp_path):
    (tmp_path / "run" / "models" / "step-1.new").mkdir(parents=True)
    assert train.main(flags(text, tmp_path / "run", steps=2, save_every=1, keep_models=1)) == 0
    assert [path.name for path in checkpoint.kept_models(tmp_path / "run")] == ["step-2"]


def test_the_room_that_a_run_needs_on_the_disk_counts_frozen_weights_too(text, tmp_path, monkeypatch):
    run = prepared(text, tmp_path / "run", train="head", keep_best=True, keep_models=4)
    try:
        n, trained = run.sizes.n_params, run.sizes.n_trained
        assert trained < n / 4
        # Three checkpoints of all weights and two moments of those that learn, and six models.
        needed = 4 * (3 * (n + 2 * trained) + 6 * n)
        for free in (needed, needed - 1):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: argparse.Namespace(free=free))
            if free == needed:
                check_saving(run, is_new=False)
        with pytest.raises(ValueError, match="GB needed"):
            check_saving(run, is_new=False)
    finally:
        run.close()


def test_both_passes_of_sam_are_in_the_time_that_is_announced(text, tmp_path, monkeypatch, capsys):
    minutes_for = {}
    monkeypatch.setattr(log, "time", argparse.Namespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(
        log.report, "describe_run", lambda minutes, **_: minutes_for.update({rho: minutes}) or []
    )
    for rho in (0.0, 0.05):
        run = prepared(text, tmp_path / f"{rho}", sam_rho=rho, steps=60, eval_every=60)
        log.time_and_announce(run)
        run.close()
    # A pass takes a second; an evaluation is the same with and without SAM.
    assert minutes_for[0.05] - minutes_for[0.0] == pytest.approx(1.0)
