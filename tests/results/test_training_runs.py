"""Runs inside a script: an ended one is not repeated, an interrupted one is continued."""

import os
import shutil
import signal

import pytest

import train
from results.training_runs import last_evaluation, trained

TINY = ["--model", "gpt", "--set", "n_layers=1", "n_heads=2", "n_kv_heads=2", "d_model=16", "d_ff=16"]
TINY += ["--tokenizer", "bytes", "--seq-len", "16", "--batch-size", "2", "--steps", "6", "--device", "cpu"]


@pytest.fixture
def flags(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n\n" * 60, encoding="utf-8")
    return [*TINY, "--data", str(text), "--cache", str(tmp_path / "cache")]


def test_a_run_is_made_once_and_then_not_again(flags, tmp_path, monkeypatch):
    model = trained(tmp_path / "run", *flags)
    assert (model / "model.safetensors").is_file()
    assert last_evaluation(tmp_path / "run")["step"] == 6
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("a second run"))
    assert trained(tmp_path / "run", *flags) == model
    with pytest.raises(ValueError, match=r"run holds a run with other flags, .*--steps 6"):
        trained(tmp_path / "run", *[{"6": "7"}.get(flag, flag) for flag in flags])
    (tmp_path / "run" / "done").write_text("")  # as before the flags were kept
    assert trained(tmp_path / "run", *flags) == model


def test_a_run_that_is_stopped_is_not_taken_for_ended_and_goes_on(flags, tmp_path, monkeypatch):
    update = train.update

    def stop(run, *args, **options):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, *args, **options)

    monkeypatch.setattr(train, "update", stop)
    with pytest.raises(ValueError, match="interrupted"):
        trained(tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "done").exists()
    monkeypatch.setattr(train, "update", update)
    trained(tmp_path / "run", *flags)
    assert last_evaluation(tmp_path / "run")["step"] == 6


def test_a_run_that_fails_says_where_its_log_is(flags, tmp_path):
    with pytest.raises(ValueError, match=r"run: the run failed; see .*run\.log"):
        trained(tmp_path / "run", *flags, "--resume")


def test_a_run_that_was_killed_between_two_checkpoints_goes_on(flags, tmp_path):
    trained(tmp_path / "run", *flags)
    out = tmp_path / "run"
    (out / "done").unlink()
    shutil.rmtree(out / "checkpoint")  # what is left is checkpoint.previous
    trained(out, *flags)
    assert "there is a run in it" not in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_ctrl_c_in_a_run_ends_the_script_as_ctrl_c_does(flags, tmp_path, monkeypatch):
    update = train.update

    def interrupt(run, *args, **options):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run, *args, **options)

    monkeypatch.setattr(train, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", *flags)
    monkeypatch.setattr(train, "update", update)
    trained(tmp_path / "run", *flags)
    assert last_evaluation(tmp_path / "run")["step"] == 6
