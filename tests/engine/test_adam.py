"""Adam against three steps by hand, torch.optim to the bit, and the identities of the paper."""

import math

import numpy as np
import pytest
import torch

from engine import adam

SHAPES = [(), (7,), (33, 17), (2, 3, 5)]


def pair(**options):
    """Return our optimizer and torch's for equal float64 tensors of odd shapes."""
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    theirs = [p.clone() for p in ours]
    return adam.AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, fused=False, **options)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.3}])
def test_a_hundred_steps_are_torchs_to_the_bit_in_float64(options):
    ours, theirs = pair(**options)
    params = theirs.param_groups[0]["params"]
    for step in range(100):
        for p, q in zip(ours.params, params, strict=True):
            p.grad = q.grad = torch.randn_like(p) * 10.0 ** (step % 5 - 2)
        ours.step()
        theirs.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.params, params, strict=True)), step


def test_a_parameter_without_a_gradient_makes_no_step_as_in_torch():
    ours, theirs = pair()
    params = theirs.param_groups[0]["params"]
    for step in range(6):
        for i, (p, q) in enumerate(zip(ours.params, params, strict=True)):
            p.grad = q.grad = torch.randn_like(p) if step >= i and step != 4 else None
        before = ours.params[0].clone()
        ours.step()
        theirs.step()
        assert torch.equal(before, ours.params[0]) == (step == 4)
        assert all(torch.equal(p, q) for p, q in zip(ours.params, params, strict=True)), step


def test_three_steps_are_those_by_hand():
    w = torch.tensor(0.5, dtype=torch.float64)
    optimizer = adam.AdamW([w], lr=0.1, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.2)
    x, m, v = 0.5, 0.0, 0.0
    for t, g in enumerate((2.0, -1.0, 0.5), 1):
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = x - 0.1 * 0.2 * x
        x -= 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-2)
        # The order of the roundings is another, so a few units in the last place.
        assert abs(w.item() - x) <= 4 * np.spacing(abs(x))


def test_the_first_step_is_the_sign_of_the_gradient():
    w = torch.zeros(3, dtype=torch.float64)
    w.grad = torch.tensor([1e-9, -3.0, 7e8], dtype=torch.float64)
    adam.AdamW([w], lr=0.25, eps=0.0, weight_decay=0.5).step()
    torch.testing.assert_close(w, torch.tensor([-0.25, 0.25, -0.25], dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_folded_form_of_the_paper_is_the_same_with_its_own_eps():
    """Section 2: without corrections, but lr sqrt(1 - beta2^t) / (1 - beta1^t) and eps sqrt(1 - beta2^t)."""
    torch.manual_seed(1)
    w = torch.randn(50, dtype=torch.float64)
    x, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    optimizer = adam.AdamW([w], lr=0.01, eps=1e-2, weight_decay=0.0)
    for t in range(1, 6):
        w.grad = torch.randn_like(w)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * w.grad, 0.999 * v + 0.001 * w.grad**2
        root = math.sqrt(1 - 0.999**t)
        x -= 0.01 * root / (1 - 0.9**t) * m / (v.sqrt() + 1e-2 * root)
        torch.testing.assert_close(w, x, rtol=1e-13, atol=1e-14)


def test_decay_shrinks_weights_alike_and_l2_those_of_small_gradients_more():
    decoupled, l2 = adam.decayed(l2=False), adam.decayed(l2=True)
    # (1 - 0.01 * 0.5)^400 = 0.135 for both, but for the noise of the steps: 0.143 and 0.085.
    assert decoupled == pytest.approx([0.135, 0.135], abs=0.1)
    assert abs(l2[0]) < 0.1 and l2[1] > 0.5  # -0.019 and 0.680


def test_the_command_prints_no_difference(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["adam"])
    assert adam.main() == 0
    assert "differ by 0.0" in capsys.readouterr().out
