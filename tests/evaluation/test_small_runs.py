"""Small runs: the loop learns and repeats itself, and the tables say mean and range."""

import torch
from torch import Generator

from evaluation.small_runs import IGNORED, mean_and_range, next_token_batch, of, small_gpt, stream, train


def copies(draws: Generator):
    """Return rows of a random half and the same half again; the second is predicted."""
    half = torch.randint(8, (16, 4), generator=draws)
    rows = torch.cat((half, half), 1)
    return next_token_batch(rows, (torch.arange(8) >= 4).expand_as(rows))


def test_a_run_learns_and_is_the_same_for_the_same_seed():
    watched, models = [], []
    for seed in (0, 0, 1):
        model = small_gpt(8, 8, seed, n_layers=1, width=32)

        def watch(step, model=model):
            watched.append(step)
            assert all(p.grad is None for p in model.parameters())  # no gradient is left of the step before

        train(model, copies, 30, seed, rate=1e-2, watch=watch)
        models.append(model.eval())
    assert watched == [*range(31)] * 3
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    fresh, batch = small_gpt(8, 8, 0, n_layers=1, width=32), copies(stream(0))
    with torch.no_grad():
        assert models[0].loss(batch)[0] < fresh.loss(batch)[0] - 0.1


def test_only_the_learned_tokens_are_targets():
    batch = next_token_batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]]))
    assert batch["tokens"].tolist() == [[1, 2, 3]] and batch["targets"].tolist() == [[IGNORED, 3, 4]]
    assert next_token_batch(torch.tensor([[1, 2, 3]]))["targets"].tolist() == [[2, 3]]


def test_a_test_draws_other_numbers_than_the_steps_of_training():
    first = [torch.rand(3, generator=Generator().manual_seed(step)) for step in range(200)]
    assert not any(torch.equal(torch.rand(3, generator=stream(0)), row) for row in first)
    assert not torch.equal(torch.rand(3, generator=stream(0)), torch.rand(3, generator=stream(1)))


def test_tables_have_the_mean_and_the_range_of_several_seeds():
    assert mean_and_range([0.5]) == "50.0%"
    assert mean_and_range(iter([0.1, 0.2, 0.6])) == "30.0% (10.0% to 60.0%)"
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 2, "b": 2}]
    assert of(rows, a=1, b=2) == rows[:1] and of(rows, b=2) == [rows[0], rows[2]]
