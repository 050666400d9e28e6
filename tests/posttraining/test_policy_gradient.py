"""Estimators, advantages and losses: known values, identities, TRL's trainers, and nothing from padding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.open_model import open_model
from posttraining import policy_gradient
from posttraining.policy_gradient import (
    METHODS,
    adapted_coefficient,
    gae,
    group_advantages,
    in_equal_group,
    kl,
    kl_loss,
    policy_loss,
    ratios,
    token_rewards,
    token_weights,
    value_loss,
    whiten,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


ALL = torch.ones(1, 3, dtype=torch.bool)


def test_kl_estimators_have_the_known_bias_and_spread_for_two_normal_distributions():
    # pi = N(0, 1), ref = N(mu, 1): the true KL is mu^2 / 2. Quadrature over a fine grid takes expectations.
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p = (-(x**2) / 2).exp()
    p = p / p.sum()
    known = {0.1: ((20.0, 0), (1.418, 0.0025), (1.417, 0)), 1.0: ((2.0, 0), (1.732, 0.25), (1.695, 0))}
    for mu, figures in known.items():
        d = (-(x**2) + (x - mu) ** 2) / 2
        for kind, (spread, bias) in zip(("k1", "k2", "k3"), figures, strict=True):
            values = kl(d, kind)
            mean = (p * values).sum()
            std = (p * (values - mean).square()).sum().sqrt()
            true = mu**2 / 2
            assert (mean / true - 1).item() == pytest.approx(bias, abs=2e-4)
            assert (std / true).item() == pytest.approx(spread, abs=6e-4)
    assert (kl(d, "k2") >= 0).all() and (kl(d, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl(d, "k4")


def test_as_a_loss_k1_regularises_nothing_and_k2_and_k3_have_the_gradients_of_the_two_directions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    log_ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    log_pi = logits.log_softmax(0)
    pi, d = log_pi.exp(), log_pi - log_ref

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    expected = {kind: gradient((pi.detach() * kl(d, kind)).sum()) for kind in ("k1", "k2", "k3")}
    assert expected["k1"].abs().max() < 1e-12
    assert torch.allclose(expected["k2"], gradient((pi * d).sum()), atol=1e-12)
    assert torch.allclose(expected["k3"], gradient((log_ref.exp() * -d).sum()), atol=1e-12)
    # With the ratio pi / pi_old, whose value is 1, the loss of k3 has the gradient of KL(pi || ref).
    ratio = (log_pi - log_pi.detach()).exp()
    corrected = gradient((pi.detach() * ratio * kl(d, "k3")).sum())
    assert torch.allclose(corrected, gradient((pi * d).sum()), atol=1e-12)
    # In the reward, k1 times grad log pi is grad KL(pi || ref).
    score_function = gradient((pi.detach() * kl(d, "k1").detach() * log_pi).sum())
    assert torch.allclose(score_function, gradient((pi * d).sum()), atol=1e-12)


@pytest.mark.parametrize(
    "gamma, lam, advantages",
    [
        (1, 0.95, (0.3365, 0.67, 0.6)),
        (1, 1, (0.4, 0.7, 0.6)),
        (0.99, 0.95, (0.320012, 0.6603, 0.6)),
    ],
)
def test_gae_has_the_known_values_and_returns_are_advantages_and_values(gamma, lam, advantages):
    rewards, values = rows([-0.1, -0.2, 1]), rows([0.3, 0.1, 0.4])
    found, returns = gae(rewards, values, ALL, gamma, lam)
    assert torch.allclose(found, rows(advantages), atol=5e-7)
    assert torch.equal(returns, found + values)
    if lam == 1:
        assert torch.allclose(returns, rows([0.7, 0.8, 1]))  # rewards to go


def test_gae_counts_no_step_where_the_mask_is_false_before_within_and_after_a_completion():
    # Prompt, two tokens, three that a tool wrote, one token, padding. NaN would spread from any of them.
    mask = torch.tensor([[False, True, True, False, False, False, True, False]])
    nan = torch.nan
    rewards, values = rows([nan, -0.1, -0.2, nan, nan, nan, 1, nan]), rows([9, 0.3, 0.1, 9, nan, 9, 0.4, nan])
    found, returns = gae(rewards, values, mask, 0.99, 0.95)
    expected, targets = gae(rows([-0.1, -0.2, 1]), rows([0.3, 0.1, 0.4]), ALL, 0.99, 0.95)
    assert torch.equal(found[mask], expected[0]) and torch.equal(returns[mask], targets[0])
    assert (found[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_whitening_has_the_known_values_and_reads_nothing_outside_of_the_mask():
    x, mask = rows([1, 2, torch.nan, 3, 4]), torch.tensor([[True, True, False, True, True]])
    assert torch.allclose(whiten(x, mask)[mask], rows(-1.341641, -0.447214, 0.447214, 1.341641), atol=1e-6)
    assert torch.allclose(
        whiten(x, mask, correction=1)[mask], rows(-1.161895, -0.387298, 0.387298, 1.161895), atol=1e-6
    )
    kept = whiten(x, mask, shift_mean=False)
    assert torch.allclose(kept[mask], whiten(x, mask)[mask] + 2.5) and kept[0, 2] == 0


def test_the_score_is_on_the_last_token_that_was_sampled_and_the_penalty_on_all():
    d = rows([9, 0.5, -0.25, 9], [9, 9, 0.5, 1])
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    found = token_rewards(rows(3, 5), d, mask, 0.1)
    assert torch.allclose(found, rows([0, -0.05, 3.025, 0], [0, 0, -0.05, 4.9]))
    unscored = token_rewards(rows(torch.nan, 5), d, mask & torch.tensor([[False], [True]]), 0.1)
    assert (unscored[0] == 0).all() and unscored.isfinite().all()


def test_group_advantages_have_the_known_values():
    groups = torch.tensor([0, 0, 0, 0])
    one, two = rows(1, 0, 0, 0), rows(1, 0, 0, 1)
    a, b, third = 0.865875, 1.499700, 1 / 3
    assert torch.allclose(group_advantages(two, groups, "grpo"), rows(a, -a, -a, a), atol=1e-6)
    assert torch.allclose(group_advantages(one, groups, "grpo"), rows(b, *[-0.499900] * 3), atol=1e-6)
    assert torch.allclose(group_advantages(two, groups, "rloo"), rows(2, -2, -2, 2) / 3)
    assert torch.allclose(group_advantages(one, groups, "rloo"), rows(1, -third, -third, -third))
    assert torch.allclose(group_advantages(two, groups, "dr_grpo"), rows(0.5, -0.5, -0.5, 0.5))
    for rewards in (one, two):  # RLOO is n / (n - 1) (r - mean)
        centred = group_advantages(rewards, groups, "dr_grpo")
        assert torch.allclose(group_advantages(rewards, groups, "rloo"), centred * 4 / 3)
    with pytest.raises(ValueError, match="grpo, dr_grpo or rloo"):
        group_advantages(one, groups, "other")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_reward_that_is_not_finite_counts_for_nobody_and_equal_ones_give_exactly_0(kind):
    # Groups are found by their numbers, wherever the members stand.
    rewards = torch.tensor([0.1, 2, 0.1, torch.nan, 0.1, 1, torch.inf, 0.1, 4, torch.nan])
    groups = torch.tensor([7, 3, 7, 3, 7, 3, 3, 7, 5, 9])
    found = group_advantages(rewards, groups, kind)
    assert found.isfinite().all()
    assert (found[[0, 2, 4, 7]] == 0).all(), "0.1 is no binary fraction: its mean is another number"
    assert (found[[3, 6, 8, 9]] == 0).all(), "not finite, or alone"
    alone = group_advantages(torch.tensor([2.0, 1.0]), torch.tensor([3, 3]), kind)
    assert torch.equal(found[[1, 5]], alone) and alone[0] > 0
    assert in_equal_group(rewards, groups).tolist() == [
        True,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
    ]


def test_weights_of_tokens_are_the_four_means():
    mask = torch.tensor([[True, True, True, False], [False, True, False, False], [False] * 4])
    x = torch.tensor([[1.0, 2, 6, 50], [50, 4, 50, 50], [50] * 4])

    def mean(kind, **options):
        return (x * token_weights(mask, kind, **options)).sum().item()

    assert mean("grpo") == pytest.approx((3 + 4) / 2)
    assert mean("dapo") == mean("bnpo") == pytest.approx(13 / 4)
    assert mean("bnpo", n_parts=3) == pytest.approx((3 + 4 + 0) / 3)
    # Five rows in four parts make three micro-batches of 2, 2 and 1 rows; a mean has weights that sum to 1.
    assert token_weights(torch.ones(5, 2, dtype=torch.bool), "bnpo", n_parts=4).sum() == pytest.approx(1)
    assert mean("dr_grpo", longest=10) == pytest.approx(13 / 20)
    with pytest.raises(ValueError, match="expected grpo"):
        mean("mean")


def test_the_clipped_loss_and_its_gradient_are_those_of_the_equation():
    old = rows([-1, -2, -1, -0.5])
    new = (old + rows([0.5, -0.5, 0.5, -0.5])).requires_grad_()  # ratios 1.65 and 0.61
    advantages, mask = rows([1, 1, -1, -1]), torch.ones(1, 4, dtype=torch.bool)
    r = (new - old).exp().detach()
    loss = policy_loss(new, old, advantages, mask, 0.2)
    high, low = r[0, 0], r[0, 1]
    assert loss.item() == pytest.approx((-1.2 - low + high + 0.8).item() / 4, rel=1e-7)
    loss.backward()
    # No gradient where the ratio has moved far enough in the direction of the advantage.
    assert torch.allclose(new.grad, torch.stack([0 * low, -low, high, 0 * low])[None] / 4, atol=1e-7)
    higher = policy_loss(new, old, advantages, mask, 0.2, clip_high=0.28)
    assert (loss - higher).item() == pytest.approx(0.08 / 4, rel=1e-5)


def test_the_value_loss_takes_the_larger_of_the_two_errors_and_old_values_are_constants():
    old, returns = rows([0, 0, 0, 0]), rows([1, 1, -1, 0.1])
    values = rows([0.5, -0.5, 0.1, 0.5]).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    terms = [max(0.25, 0.64), max(2.25, 1.44), 1.21, max(0.16, 0.01)]
    loss = value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(sum(terms) / 8)
    loss.backward()
    assert torch.allclose(values.grad, rows([0, -1.5, 1.1, 0.4]) / 4)


def test_ratios_of_tokens_sequences_and_means():
    new, old = rows([1, 2, torch.nan], [0.5, 9, 9]), rows([0.5, 1, 3], [0, 0, 0])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.allclose(ratios(new, old, mask), rows([0.5, 1, 0], [0.5, 0, 0]).exp())
    assert torch.allclose(ratios(new, old, mask, "sequence"), rows([1.5] * 3, [0.5] * 3).exp())
    assert torch.allclose(ratios(new, old, mask, "mean"), rows([0.75] * 3, [0.5] * 3).exp())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_outside_of_the_mask_and_no_other_order_of_rows_changes_a_loss_or_its_gradient(method):
    generator = torch.Generator().manual_seed(0)
    row = METHODS[method]
    mask = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
    old, advantages = (torch.randn(2, 5, generator=generator) for _ in range(2))
    noise, junk = (torch.randn(2, 5, generator=generator) for _ in range(2))

    def loss_and_gradient(junk, order):
        new = torch.where(mask, old + 0.2 * noise, junk)[order].requires_grad_()
        parts = torch.where(mask, old, junk)[order], torch.where(mask, advantages, junk)[order], mask[order]
        weights = token_weights(mask[order], row.average, 6)
        options = {"clip_high": row.clip_high, "ratio": row.ratio, "weights": weights}
        loss = policy_loss(new, *parts, **options)
        loss = loss + kl_loss(new, parts[0], mask[order], weights)
        loss.backward()
        return loss, new.grad[torch.tensor(order).argsort()]

    expected = loss_and_gradient(torch.zeros(2, 5), [0, 1])
    for junk_there in (junk, 1e30 * junk, torch.full((2, 5), torch.nan)):
        found = loss_and_gradient(junk_there, [0, 1])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    swapped = loss_and_gradient(junk, [1, 0])
    assert torch.allclose(swapped[0], expected[0]) and torch.allclose(swapped[1], expected[1])
    assert (expected[1][~mask] == 0).all() and (expected[1][mask] != 0).any()


def test_the_adaptive_coefficient_moves_by_a_clipped_error():
    assert adapted_coefficient(0.15, 6.6, 6, 512) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000))
    assert adapted_coefficient(0.15, 60, 6, 512) == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    assert adapted_coefficient(0.15, -3, 6, 512) == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000))


# --- what TRL computes, see tests/fixtures/make_policy_gradient_fixture.py


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "policy_gradient" / "expected.safetensors")


@pytest.fixture(scope="module")
def batch(expected):
    """Return the batch of the fixture as our loop lays it out: tokens and mask."""
    from posttraining.rollout import laid_out

    lists = {}
    for name in ("prompt", "completion"):
        ids, lengths = expected[f"{name}s"].tolist(), expected[f"{name}_lengths"].tolist()
        lists[name] = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    return laid_out(lists["prompt"], lists["completion"])


def spread(values, mask, lengths):
    """Return values (B, C) of completions at the places (B, T) of their tokens."""
    found = torch.zeros(mask.shape)
    found[mask] = values[torch.arange(values.shape[1]) < lengths[:, None]]
    return found


@pytest.mark.parametrize("name", ["grpo", "corrected", "bnpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_losses_and_gradients_are_those_of_trl(name, expected, batch):
    tokens, mask = batch
    lengths = expected["completion_lengths"]
    model = open_model(FIXTURES / "llama")
    logps = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    at = spread(expected["logps"], mask, lengths)
    assert torch.allclose(torch.where(mask, logps, 0.0), at, atol=1e-5)

    old = at + spread(expected["old_noise"], mask, lengths)
    ref = at + spread(expected["ref_noise"], mask, lengths)
    row = METHODS.get(name, METHODS["grpo"])
    weights = token_weights(mask, "bnpo" if name == "bnpo" else row.average, 7)
    options = {"ratio": row.ratio, "weights": weights, "clip_high": row.clip_high}
    loss = policy_loss(logps, old, expected["advantages"][:, None], mask, 0.2, **options)
    if row.penalty == "loss":
        loss = loss + 0.1 * kl_loss(logps, ref, mask, weights, old if name == "corrected" else None)
    loss.backward()
    assert loss.item() == pytest.approx(expected[f"loss.{name}"].item(), abs=1e-5)
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    error = (gradient - expected[f"gradient.{name}"]).norm() / expected[f"gradient.{name}"].norm()
    assert error < 1e-4


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_advantages_are_those_of_trl_with_equal_groups_and_rewards_left_out(kind, expected):
    rewards = expected["rewards"]
    found = group_advantages(rewards, torch.arange(len(rewards)) // 4, kind)
    assert torch.allclose(found, expected[f"advantages.{kind}"], atol=1e-5)


def test_the_table_of_methods_names_kinds_that_exist():
    for name, row in METHODS.items():
        assert row.penalty in ("reward", "loss") and name in policy_gradient.__doc__
        token_weights(torch.ones(1, 2, dtype=torch.bool), row.average)
        ratios(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), row.ratio)
