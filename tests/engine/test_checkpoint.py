"""Checkpoints: neither a kill nor a full disk nor damage spoils a run, which resumes to the bit."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARD
from safetensors.torch import load_file
from small_gpt import (
    SMALL,
    die_in,
    flags,
    forked,
    prepared,
    refused,
    rows,
    same_run,
    slow_down,
    write_text,
)

import gpt
import train
from engine import checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that returns the directory of an uninterrupted run. It makes each run only once."""
    folder, made = tmp_path_factory.mktemp("uninterrupted"), {}
    text = write_text(folder / "text.txt")

    def run(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            assert train.main(flags(text, folder / str(len(made)), **options)) == 0
            made[key] = folder / str(len(made))
        return made[key]

    return run


def wait_for(path, process, text):
    """Wait until a process has written a text to a file."""
    deadline = time.monotonic() + 400
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive(), process.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_four_hundred_steps_with_two_kills_equal_an_uninterrupted_run(text, tmp_path):
    config = replace(SMALL, n_layers=1)

    def start(out, **changes):
        options = dict(steps=400, batch_size=1, eval_every=100, save_every=45, log_every=5)
        return forked(flags(text, tmp_path / out, optimizer="muon", **options | changes), config)

    whole = start("whole")
    for kill_at in (80, 290):
        process = start("killed", resume=kill_at == 290)
        wait_for(tmp_path / "killed" / "metrics.jsonl", process, f'"step": {kill_at}')
        process.send_signal(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
    process = start("killed", resume=True)
    assert process.end() == 0 and whole.end() == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "function, n", [("save", 2), ("sync", 7), ("rename", 2), ("rename", 3), ("rename", 5)]
)
def test_kill_while_saving(function, n, text, uninterrupted, tmp_path):
    """Half a file, between files, before and between the renames: the run resumes as if nothing was."""
    out, options = tmp_path / "killed", dict(steps=12, eval_every=12, save_every=3)
    process = forked(flags(text, out, **options), prepare=die_in, arguments=(function, n))
    assert process.end() == -signal.SIGKILL, process.said()
    assert train.main(flags(text, out, resume=True, **options)) == 0
    assert same_run(uninterrupted(**options), out)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_and_nothing_is_lost(number, code, text, uninterrupted, tmp_path):
    out, options = tmp_path / "run", dict(steps=40, eval_every=40, save_every=40)
    process = forked(flags(text, out, **options), prepare=slow_down, arguments=(0.2,))
    wait_for(out / "metrics.jsonl", process, '"step": 5')
    process.send_signal(number)
    assert process.end() == code
    assert "saved; go on with --resume" in process.said()
    step = json.loads((out / "checkpoint" / "state.json").read_text())["step"]
    assert 5 <= step < 40 and (out / "model" / "model.safetensors").exists()
    assert train.main(flags(text, out, resume=True, **options)) == 0
    assert same_run(uninterrupted(**options), out)


@pytest.mark.parametrize("step, log_every", [(0, 1), (3, 1), (3, 5), (6, 1)])
def test_sigterm_does_not_wait_for_the_end_of_an_evaluation(
    step, log_every, text, uninterrupted, tmp_path, monkeypatch
):
    out, original, passes = tmp_path / "run", gpt.GPT.loss, []

    def loss(self, batch):
        passes.append(self.training)
        if not self.training and passes.count(True) == 3 + step and passes[-2]:  # three passes are timed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(gpt.GPT, "loss", loss)
    assert train.main(flags(text, out, log_every=log_every)) == 0
    assert passes[-3]  # the evaluation ended with its second batch
    assert [row["step"] for row in rows(out) if "val_loss" in row] == list(range(0, step, 3))
    monkeypatch.setattr(gpt.GPT, "loss", original)
    assert train.main(flags(text, out, log_every=log_every, resume=True)) == 0
    assert same_run(uninterrupted(log_every=log_every), out)


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(text, uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        options = dict(steps=40, eval_every=40, save_every=20)
        process = forked(flags(text, disk / "run", **options), prepare=slow_down, arguments=(0.2,))
        wait_for(disk / "run" / "metrics.jsonl", process, '"step": 22')
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert process.end() == 1
        (error,) = re.findall("error: .*", process.said())
        assert "No space left" in error and "disk/run/checkpoint" in error
        (disk / "filler").unlink()
        assert train.main(flags(text, disk / "run", resume=True, **options)) == 0
        assert same_run(uninterrupted(**options), disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_runs_in_one_directory_are_refused(text, tmp_path, capsys):
    first = prepared(text, tmp_path / "run")
    assert "another run is writing to it" in refused(capsys, flags(text, tmp_path / "run"))
    assert "another run is writing to it" in refused(capsys, flags(text, tmp_path / "run", resume=True))
    first.close()
    assert train.main(flags(text, tmp_path / "run")) == 0


def flip(path):
    """Change one byte in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", [Path(SHARD).name, "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-5])])
@pytest.mark.usefixtures("text")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    name, harm, uninterrupted, tmp_path, capsys
):
    whole = uninterrupted(save_every=2)
    shutil.copytree(whole, tmp_path / "harmed")
    harm(tmp_path / "harmed" / "checkpoint" / name)
    again = flags(whole.parent / "text.txt", tmp_path / "harmed", save_every=2, resume=True)
    assert train.main(again) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert str(tmp_path / "harmed" / "checkpoint") in warning
    assert name in warning or name == "checksums.json"  # a flipped checksum accuses the file it is of
    assert same_run(whole, tmp_path / "harmed")
    for run in ("checkpoint", "checkpoint.previous"):
        harm(tmp_path / "harmed" / run / name)
    assert train.main(again) == 2
    assert "no checkpoint is undamaged" in capsys.readouterr().err


def test_a_longer_run_can_follow_a_finished_one(text, uninterrupted, tmp_path):
    assert train.main(flags(text, tmp_path / "run", schedule="constant")) == 0
    assert train.main(flags(text, tmp_path / "run", schedule="constant", steps=9, resume=True)) == 0
    whole = uninterrupted(schedule="constant", steps=9)
    x, y = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", whole))
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_resuming_another_run_than_was_started_is_refused(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "run")) == 0
    for changes, word in (({"size": "10m"}, "--size tiny, not 10m"), ({"seq_len": 8}, "--seq-len 16, not 8")):
        error = refused(capsys, flags(text, tmp_path / "run", resume=True, **changes))
        assert word in error and "its command was" in error
    text.write_text(text.read_text().replace("line", "LINE"))
    assert "has changed" in refused(capsys, flags(text, tmp_path / "run", resume=True))


def test_a_state_of_an_older_version_is_refused_by_what_it_lacks(monkeypatch):
    old = {"flags": {}, "config": {}, "steps": 3}
    monkeypatch.setattr(checkpoint, "newest", lambda out, warn: (out, old))
    with pytest.raises(ValueError, match=r"older version, without schedule_from; .*--init-from run/model"):
        checkpoint.find(Path("run"), {}, set())


def test_a_run_resumes_after_its_files_have_moved(text, tmp_path, monkeypatch, capsys):
    """What is compared is the text, its tokenizer and the fields of --set, not how they are written."""
    options = ["--set", "rope_theta=5000", "norm_eps=1e-5"]
    assert train.main([*flags(text, tmp_path / "whole"), *options]) == 0
    assert train.main([*flags(text, tmp_path / "run", steps=3, schedule="constant"), *options]) == 0
    assert train.main([*flags(text, tmp_path / "same", schedule="constant"), *options]) == 0
    (tmp_path / "moved").mkdir()
    moved = text.rename(tmp_path / "moved" / "renamed.txt")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    again = ["--set", "norm_eps=0.00001", "rope_theta=5000.0"]
    argv = flags(moved, tmp_path / "run", schedule="constant", resume=True, cache=cache)
    here = [*argv[:2], "--data", "moved", "--tokenizer", str(tmp_path / "whole" / "model"), *argv[6:], *again]
    assert train.main(here) == 0
    same_run(tmp_path / "same", tmp_path / "run")

    other = [*argv, "--set", "norm_eps=1e-5", "rope_theta=6000"]
    assert "was started with --set" in refused(capsys, other)
    assert "has changed" in refused(capsys, [*argv, *again, "--tokenizer", "bpe:300"])
    assert "has changed" in refused(capsys, [*argv, *again, "--val", str(tmp_path / "run" / "samples.txt")])


def test_a_model_that_has_moved_may_be_named_anew_and_another_one_not(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "base")) == 0
    model = tmp_path / "base" / "model"
    start = dict(init_from=model, tokenizer=None, schedule="constant")
    assert train.main(flags(text, tmp_path / "run", steps=3, **start)) == 0
    assert train.main(flags(text, tmp_path / "same", **start)) == 0
    start |= dict(init_from=model.rename(tmp_path / "moved"), resume=True)
    assert train.main(flags(text, tmp_path / "run", **start)) == 0
    same_run(tmp_path / "same", tmp_path / "run")
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert "has rope_theta 20000.0, the run was" in refused(capsys, flags(text, tmp_path / "run", **start))
