"""Tests of posttraining/online_dpo.py: which pairs count, the loss, and runs."""

import math
import re

import pytest
import small_gpt
import torch

import train
from posttraining import frontier, online_dpo
from posttraining.dpo import sequence_logps
from posttraining.online_dpo import Config
from posttraining.rollout import Reference


def test_a_tie_and_an_answer_without_a_score_do_not_count():
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0], [math.nan, 1.0]])
    order, counts = online_dpo.ranked(scores)
    assert order[:2].tolist() == [[1, 0], [0, 1]]
    assert counts.tolist() == [True, True, False, False]


def test_drawn_preferences_have_the_odds_of_the_difference_of_rewards():
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [math.nan, 1.0]]).repeat(4000, 1)
    order, counts = online_dpo.ranked(scores, torch.Generator().manual_seed(0))
    assert counts.view(-1, 4).all(0).tolist() == [True, True, True, False]
    assert torch.equal(order.sort(dim=1).values, torch.tensor([[0, 1]]).expand_as(order))
    first = (order[:, 0] == 0).view(-1, 4).double().mean(0)
    expected = [1 / (1 + math.exp(-d)) for d in (1, -2, 0)]
    assert first[:3].tolist() == pytest.approx(expected, abs=0.025)  # three standard errors


@pytest.fixture
def model():
    model = frontier.build_model()
    model.objective, model.reference = Config(), Reference(model)
    return model


def answers(n):
    tokens = torch.cat([torch.full((n, 1), 4), frontier.Chain().sample(n)], dim=1)
    return tokens, torch.arange(9).expand(n, 9) > 0


def test_the_loss_is_the_mean_over_the_pairs_that_count(model):
    torch.manual_seed(0)
    tokens, mask = answers(6)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    scores = torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0, math.nan])
    loss, metrics = online_dpo.loss_of(model, tokens, mask, scores)
    policy = sequence_logps(model(tokens), tokens, mask)
    reference = sequence_logps(model.reference.logits(tokens), tokens, mask)
    h = (policy[1] - reference[1]) - (policy[0] - reference[0])  # of the one pair that counts
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * h.item())), rel=1e-5)
    assert (metrics["ties"], metrics["unscored"]) == (1, 1)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_where_no_pair_counts_the_loss_and_its_gradient_are_0(model):
    tokens, mask = answers(4)
    loss, metrics = online_dpo.loss_of(model, tokens, mask, torch.ones(4))
    loss.backward()
    assert loss.item() == 0 and metrics["ties"] == 2
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def flags(out, steps, *more):
    words = f"--model online_dpo --steps {steps} --eval-every {steps} --log-every 1 --out {out}"
    return [*words.split(), "--cache", str(out.parent / "cache"), *more]


def test_on_the_chain_the_reward_rises_and_a_resumed_run_is_the_same(tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(flags(whole, 12)) == 0
    out = capsys.readouterr().out
    assert float(re.findall(r"^reward ([\d.]+) at KL", out, re.M)[-1]) > 2.1
    first = next(row for row in small_gpt.rows(whole) if "grad_norm" in row)
    assert first["kl"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)

    # Stop after half of the steps, as at a signal, and go on.
    with pytest.MonkeyPatch.context() as patch:
        steps = train.Run.steps

        def half(run):
            for step in steps(run):
                if step == 6:
                    raise train.Interrupted(15)
                yield step

        patch.setattr(train.Run, "steps", half)
        assert train.main(flags(halves, 12)) == 0
    assert train.main(flags(halves, 12, "--resume")) == 0
    assert small_gpt.same_run(whole, halves)
    assert not any("reference" in name for name in small_gpt.load_file(whole / small_gpt.SHARD))


@pytest.mark.parametrize("model", ["ppo", "online_dpo"])
def test_a_run_in_bfloat16_samples_and_learns(model, tmp_path, monkeypatch):
    """As on a GPU, where bfloat16 is the default."""
    monkeypatch.setattr(frontier, "value_of", lambda model: (2.0, 0.5))  # a second of work
    argv = flags(tmp_path / "run", 2, "--dtype", "bfloat16", "--batch-size", "2", "--set")
    argv[argv.index("online_dpo")] = model
    assert train.main([*argv, "samples=4" if model == "ppo" else "pairs=4"]) == 0
    steps = [row for row in small_gpt.rows(tmp_path / "run") if "grad_norm" in row]
    assert steps[0]["kl"] == 0.0 and steps[1]["kl"] != 0.0
    assert all(row["grad_norm"] > 0 for row in steps)


def test_a_run_without_a_model_to_start_from_is_refused(tmp_path, capsys):
    error = small_gpt.refused(capsys, flags(tmp_path / "run", 2, "--data", "stdlib"))
    assert "--data stdlib: needs --init-from DIR" in error
