"""Tests of posttraining/dpo.py: unit values, identities, converged losses, which tokens count, and runs."""

import math

import pytest
import torch

from posttraining import dpo

# One pair: log-probabilities of policy and reference, lengths 4 and 5; h = 1.5.
PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, -11.0, -11.5)]
LENGTHS = [torch.tensor([4.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)]
OWN = PAIR[:2]
R = PAIR[0] - PAIR[2]

UNIT_VALUES = {
    "dpo": (dpo.dpo_loss(*PAIR, 0.1), 0.620957),
    "conservative": (dpo.dpo_loss(*PAIR, 0.1, 0.1), 0.635957),
    "robust": (dpo.robust_dpo_loss(*PAIR, 0.1, 0.1), 0.602207),
    "hinge": (dpo.hinge_loss(*PAIR, 0.1), 0.85),
    "ipo of sums": (dpo.ipo_loss(*PAIR, 0.1), 12.25),
    "ipo of means": (dpo.ipo_mean_loss(*PAIR, *LENGTHS, 0.1), 21.6225),
    "simpo": (dpo.simpo_loss(*OWN, *LENGTHS, 2.0, 1.0), 1.463282),
    "orpo": (dpo.orpo_loss(*OWN, *LENGTHS, 0.1), 2.574937),
    "log odds": (dpo.log_odds(OWN[0] / 4) - dpo.log_odds(OWN[1] / 5), -0.109449),
    "kto desirable": (dpo.kto_loss(PAIR[0], PAIR[2], torch.tensor([True]), 0.0, 0.1), 0.475021),
    "kto undesirable": (dpo.kto_loss(PAIR[1], PAIR[3], torch.tensor([False]), 0.0, 0.1), 0.487503),
    "kto desirable, z": (dpo.kto_loss(PAIR[0], PAIR[2], torch.tensor([True]), 0.4, 0.1), 0.485004),
    "kto undesirable, z": (dpo.kto_loss(PAIR[1], PAIR[3], torch.tensor([False]), 0.4, 0.1), 0.477515),
}


@pytest.mark.parametrize("name", UNIT_VALUES)
def test_a_loss_has_its_unit_value(name):
    value, expected = UNIT_VALUES[name]
    assert value.shape == (1,) and value.item() == pytest.approx(expected, abs=6e-7)


def test_the_gradient_of_dpo_is_beta_times_how_wrong_the_pair_is():
    chosen, rejected = (x.clone().requires_grad_() for x in OWN)
    dpo.dpo_loss(chosen, rejected, *PAIR[2:], 0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.0462570, abs=5e-8)
    assert rejected.grad.item() == -chosen.grad.item()


def test_where_policy_and_reference_are_equal_each_loss_has_its_known_value():
    p = torch.tensor([[-3.0, -7.0]], dtype=torch.float64)
    n = torch.tensor([[2, 5]])
    expected = {"dpo": math.log(2), "conservative": math.log(2), "ipo": 25.0, "ipo_mean": 25.0, "hinge": 1.0}
    for method, value in expected.items():
        loss = dpo.pair_losses(p, p, n, dpo.Config(method=method))
        assert loss.item() == pytest.approx(value, rel=1e-12), method
    for desirable in (True, False):
        loss = dpo.kto_loss(p[:, 0], p[:, 0], torch.tensor([desirable]), dpo.kto_z(p[:, 1], p[:, 1]))
        assert loss.item() == 0.5


def converged(loss, p: float) -> float:
    """Return the h at which p * loss(h) + (1 - p) * loss(-h) is least, by Newton's method."""
    h, zero = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
    for _ in range(30):
        total = (p * loss(h, zero, zero, zero) + (1 - p) * loss(zero, h, zero, zero)).sum()
        (gradient,) = torch.autograd.grad(total, h, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), h)
        with torch.no_grad():
            h -= (gradient / curvature).clamp(-1, 1)
    return h.item()


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_converged_dpo_recovers_the_log_odds_of_the_preference(p):
    beta = 0.5
    h = converged(lambda *pair: dpo.dpo_loss(*pair, beta), p)
    assert beta * h == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    h = converged(lambda *pair: dpo.ipo_loss(*pair, beta), p)
    assert beta * h == pytest.approx((2 * p - 1) / 2, abs=1e-9)


def test_where_all_labels_agree_ipo_and_conservative_dpo_stay_finite():
    assert 0.5 * converged(lambda *pair: dpo.ipo_loss(*pair, 0.5), 1.0) == pytest.approx(0.5)
    h = converged(lambda *pair: dpo.dpo_loss(*pair, 0.5, 0.1), 1.0)
    assert 0.5 * h == pytest.approx(math.log(0.9 / 0.1), abs=1e-6)


def test_the_expectation_of_robust_dpo_over_flipped_labels_is_dpo():
    flipped = [PAIR[1], PAIR[0], PAIR[3], PAIR[2]]
    mean = 0.8 * dpo.robust_dpo_loss(*PAIR, 0.1, 0.2) + 0.2 * dpo.robust_dpo_loss(*flipped, 0.1, 0.2)
    assert mean.item() == pytest.approx(dpo.dpo_loss(*PAIR, 0.1).item(), rel=1e-12)


@pytest.mark.parametrize(
    "beta, expected", [(1.0, (1.350056, 0.322834, 1.027222)), (0.5, (1.764107, 0.915475, 1.306369))]
)
def test_dpo_on_all_pairs_finds_the_optimum_under_a_kl_penalty(beta, expected):
    # A bandit of three arms; labels of all pairs by sigmoid(r_a - r_b), weights by the reference.
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.arange(3.0, dtype=torch.float64)
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=60, tolerance_grad=1e-10)
    a, b = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T

    def closure():
        optimizer.zero_grad()
        logp, r = logits.log_softmax(0), ref.log()
        losses = dpo.dpo_loss(logp[a], logp[b], r[a], r[b], beta)
        loss = (ref[a] * ref[b] * torch.sigmoid(reward[a] - reward[b]) * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p = logits.detach().softmax(0)
    kl = (p * (p / ref).log()).sum().item()
    found = ((p @ reward).item(), kl, (p @ reward).item() - beta * kl)
    assert found == pytest.approx(expected, abs=2e-6)
    assert p.tolist() == pytest.approx((ref.log() + reward / beta).softmax(0).tolist(), abs=1e-6)
    if beta == 1.0:
        assert p.tolist() == pytest.approx([0.179000, 0.291944, 0.529056], abs=1e-6)


def test_only_masked_tokens_count_and_never_by_their_value():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    tokens[0, 4] = tokens[1, 2] = 0  # inside an answer, the id that pads elsewhere
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    logps = logits.double().log_softmax(-1)
    expected = [sum(logps[i, t - 1, tokens[i, t]] for t in range(1, 6) if mask[i, t]) for i in range(2)]
    assert dpo.sequence_logps(logits, tokens, mask).tolist() == pytest.approx([float(x) for x in expected])
    assert dpo.n_predicted(mask).tolist() == [3, 2]


def test_the_first_token_counts_neither_in_the_sum_nor_in_the_length():
    # A row that was cut from the left begins with a token of the answer, which nothing predicts.
    logits, tokens = torch.randn(1, 4, 5), torch.randint(5, (1, 4))
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert dpo.n_predicted(mask).item() == 3
    logps = logits[0, :-1].log_softmax(-1)
    expected = sum(logps[t, tokens[0, t + 1]] for t in range(3)).item()
    assert dpo.sequence_logps(logits, tokens, mask).item() == pytest.approx(expected, abs=1e-5)


def test_padding_changes_neither_loss_nor_gradient_by_a_bit():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    tokens, logits = torch.randint(5, (2, 6)), torch.randn(2, 6, 5)
    found = []
    for change in (0, 1):
        x = logits.clone()
        x[:, 4:] += change * 7
        x.requires_grad_()
        changed = tokens.clone()
        changed[:, 4:] = changed[:, 4:] * (1 - change)
        total = dpo.sequence_logps(x, changed, mask)
        total.sum().backward()
        found.append((total.detach(), x.grad[:, :3], x.grad[:, 3:]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not found[1][2].any()


def test_a_prompt_in_the_sum_leaves_dpo_and_changes_means():
    # The prompt adds the same log-probability and length to both answers.
    prompt, n = -6.0, 3
    with_prompt = [x + prompt for x in OWN] + [x + prompt for x in PAIR[2:]]
    longer = [x + n for x in LENGTHS]
    assert dpo.dpo_loss(*with_prompt).item() == pytest.approx(dpo.dpo_loss(*PAIR).item(), rel=1e-12)
    assert dpo.ipo_mean_loss(*with_prompt, *longer).item() != pytest.approx(21.6225, rel=0.01)
    assert dpo.simpo_loss(*with_prompt[:2], *longer).item() != pytest.approx(1.463282, rel=0.01)


def test_z_is_never_negative_and_has_no_gradient():
    policy = torch.tensor([-4.0, -6.0], requires_grad=True)
    z = dpo.kto_z(policy, torch.tensor([-5.0, -6.5]))
    assert z.item() == 0.75 and not z.requires_grad
    assert dpo.kto_z(policy, torch.tensor([-1.0, -1.0])).item() == 0


def test_a_certain_answer_has_finite_log_odds():
    logp = torch.tensor([0.0, -1e-9, -1.0], requires_grad=True)
    odds = dpo.log_odds(logp)
    odds.sum().backward()
    assert odds.isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"beta": 0.0}, "beta 0.0: expected a number above 0"),
        ({"beta": -1.0}, "beta -1.0: expected a number above 0"),
        ({"method": "ppo"}, "method 'ppo': expected dpo or conservative"),
        ({"smoothing": 0.5}, "smoothing 0.5: expected less than 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        dpo.Config(**values)
