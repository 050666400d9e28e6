"""Averages of weights: their formula, what a run evaluates, saves and resumes, and what is refused."""

import json
import signal

import pytest
import torch
from conftest import SHARD
from safetensors.torch import load_file
from small_gpt import die_in, flags, forked, prepared, refused, rows, same_run
from torch import nn

import train
from engine.averages import Averages
from formats.atomic import write_checksums
from formats.open_model import open_model


def test_an_average_is_the_sum_of_all_weights_by_their_shares():
    model, decay = nn.Linear(3, 2), 0.4
    model.bias.requires_grad_(False)
    averages, seen = Averages(model, decay), [model.weight.detach().clone()]
    assert averages.tensors.keys() == {"weight"}
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.normal_()
        averages.update(torch.tensor(True), step)
        seen.append(model.weight.detach().clone())
    # The decays of the first updates are smaller: 2/11, 3/12, 4/13, ... up to 0.4.
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, 8)]
    assert decays[:2] == [2 / 11, 3 / 12] and decays[-1] == decay
    expected = seen[0]
    for d, w in zip(decays, seen[1:], strict=True):
        expected = d * expected + (1 - d) * w
    torch.testing.assert_close(averages.tensors["weight"], expected)

    # An update that is left out changes no bit of it.
    before = averages.tensors["weight"].clone()
    with torch.no_grad():
        model.weight.normal_()
    averages.update(torch.tensor(False), 8)
    assert torch.equal(averages.tensors["weight"], before)


def test_in_place_the_model_has_the_averages_and_then_its_weights_again():
    model = nn.Linear(3, 2)
    averages = Averages(model, 0.9)
    held, average = model.weight, averages.tensors["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), averages.in_place():
        assert model.weight is held and torch.equal(model.weight, average)
        raise KeyError
    assert torch.equal(model.weight, own) and torch.equal(averages.tensors["weight"], average)


def test_a_run_evaluates_and_saves_averages_and_trains_the_same_weights(text, tmp_path):
    for out, more in (("plain", {}), ("averaged", {"ema": 0.5})):
        assert train.main(flags(text, tmp_path / out, keep_best=True, **more)) == 0
    plain, averaged = (rows(tmp_path / out) for out in ("plain", "averaged"))
    for a, b in zip(plain, averaged, strict=True):
        assert a.get("loss") == b.get("loss") and a.get("grad_norm") == b.get("grad_norm")
        assert "val_loss" not in a or (a["val_loss"] == b["val_loss"]) == (a["step"] == 0)

    # model/ and best/ hold the averages of checkpoint/, whose weights are those of the plain run.
    state = load_file(tmp_path / "averaged" / SHARD)
    of_plain = load_file(tmp_path / "plain" / SHARD)
    assert all(torch.equal(state[name], w) for name, w in of_plain.items())
    for folder in ("model", "best"):
        weights = load_file(tmp_path / "averaged" / folder / "model.safetensors")
        assert all(torch.equal(w, state[f"average.{name}"]) for name, w in weights.items())
        assert not all(torch.equal(w, state[f"model.{name}"]) for name, w in weights.items())
    run = prepared(text, tmp_path / "again", init_from=tmp_path / "averaged" / "model", tokenizer=None)
    assert train.evaluate(run)["val_loss"] == averaged[-1]["val_loss"]
    run.close()


def test_killed_and_resumed_the_averages_are_equal_to_the_bit(text, tmp_path):
    options = dict(steps=12, eval_every=4, save_every=3, ema=0.9, optimizer="muon")
    process = forked(flags(text, tmp_path / "killed", **options), prepare=die_in, arguments=("save", 3))
    assert process.end() == -signal.SIGKILL, process.said()
    assert train.main(flags(text, tmp_path / "killed", resume=True, **options)) == 0
    assert train.main(flags(text, tmp_path / "whole", **options)) == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")
    assert any(name.startswith("average.") for name in load_file(tmp_path / "killed" / SHARD))


def test_an_adapter_is_averaged_too(text, tmp_path):
    assert train.main(flags(text, tmp_path / "base")) == 0
    lora = dict(init_from=tmp_path / "base" / "model", adapter="lora", tokenizer=None, ema=0.5)
    assert train.main(flags(text, tmp_path / "run", **lora)) == 0
    state = load_file(tmp_path / "run" / SHARD)
    names = [name for name in state if name.startswith("average.")]
    assert names and all(".adapters." in name for name in names)
    model = open_model(tmp_path / "run" / "model")
    own = dict(model.named_parameters())
    for name in names:
        assert torch.equal(own[name.removeprefix("average.")], state[name])


def test_a_run_is_resumed_with_the_same_average_only(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "run", ema=0.5)) == 0
    error = refused(capsys, flags(text, tmp_path / "run", resume=True))
    assert "was started with --ema 0.5, not None" in error
    # A run of a version without the flag.
    assert train.main(flags(text, tmp_path / "old")) == 0
    path = tmp_path / "old" / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    del state["flags"]["ema"]
    path.write_text(json.dumps(state))
    (path.parent / "checksums.json").unlink()
    write_checksums(path.parent)
    assert "has no tensor average." in refused(capsys, flags(text, tmp_path / "old", resume=True, ema=0.5))


@pytest.mark.parametrize("value", ["1", "-0.5", "nan"])
def test_a_decay_that_is_no_share_is_refused(value, text, tmp_path, capsys):
    error = refused(capsys, flags(text, tmp_path / "run", ema=value))
    assert "--ema" in error and "expected 0, for none, or less than 1" in error


def test_a_task_with_a_loop_of_its_own_is_refused(text, tmp_path, capsys):
    error = refused(capsys, ["--model", "ppo", "--ema", "0.9", "--out", str(tmp_path / "run")])
    assert error.endswith("--ema: posttraining.ppo has a loop of its own, which averages no weights")


def test_a_dry_run_counts_the_averages(text, tmp_path, capsys):
    totals = []
    for more in ([], ["--ema", "0.99"]):
        assert train.main(["--model", "gpt", "--size", "124m", "--dry-run", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        totals.append(next(float(line.split()[-1]) for line in lines if line.startswith("together")))
        found = [line.split() for line in lines if line.startswith("averages")]
        assert len(found) == bool(more)
    assert totals[1] - totals[0] == pytest.approx(float(found[0][1]), abs=0.011)
