"""Gradients of language/backprop.py beside those of torch.autograd, in float64."""

import numpy as np
import pytest
import torch

from language import backprop
from language.backprop import MLP, Adam, Tensor, cross_entropy

# Each operation as a function of two arrays of shapes that broadcast, written once for both libraries.
UNARY = {
    "exp": lambda x: x.exp(),
    "log": lambda x: (x * x + 0.5).log(),
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "power": lambda x: (x * x + 0.5) ** 0.5,
    "negative": lambda x: -x,
}
BINARY = {
    "sum": lambda x, y: x + y,
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "quotient": lambda x, y: x / (y * y + 1.0),
}


def random_graph(draw, leaves):
    """Return the mean of a random expression of leaves (3, 4), each of which it may use many times."""
    found = list(leaves)
    for _ in range(12):
        x, y = (found[draw.integers(len(found))] for _ in range(2))
        operation = draw.integers(5)
        if operation == 0:
            found.append(UNARY[draw.choice(list(UNARY))](x).tanh())
        elif operation == 1:
            found.append(BINARY[draw.choice(list(BINARY))](x, y).tanh())
        elif operation == 2:
            found.append((x @ y.reshape(4, 3) @ x).tanh())
        elif operation == 3:
            rows = draw.integers(3, size=3)  # a row may be taken twice
            found.append(x[rows] + y)
        else:
            axis = int(draw.integers(2))
            total = x.sum(axis) if isinstance(x, Tensor) else x.sum(axis, keepdim=True)
            found.append((total * y).tanh())
    return sum(found[1:], found[0]).sum() * (1 / 12)


@pytest.mark.parametrize("seed", range(40))
def test_gradients_of_random_graphs_are_those_of_autograd(seed):
    values = np.random.default_rng(seed).normal(size=(3, 3, 4))
    ours = [Tensor(value) for value in values]
    theirs = [torch.tensor(value, requires_grad=True) for value in values]
    loss = random_graph(np.random.default_rng(seed + 1000), ours)
    expected = random_graph(np.random.default_rng(seed + 1000), theirs)
    assert float(loss.value) == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        grad = np.zeros((3, 4)) if b.grad is None else b.grad.numpy()
        own = np.zeros((3, 4)) if a.grad is None else a.grad
        np.testing.assert_allclose(own, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shapes", [((4,), (3, 4)), ((3, 1), (1, 4)), ((), (3, 4)), ((2, 1, 4), (3, 1))])
@pytest.mark.parametrize("name", BINARY)
def test_gradients_of_what_is_repeated_are_summed(name, shapes):
    draw = np.random.default_rng(0)
    values = [draw.normal(size=shape) for shape in shapes]
    ours = [Tensor(value) for value in values]
    theirs = [torch.tensor(value, requires_grad=True) for value in values]
    BINARY[name](*ours).sum().backward()
    BINARY[name](*theirs).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.shape == a.value.shape
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)


def test_products_of_many_matrices_at_a_time():
    draw = np.random.default_rng(0)
    values = [draw.normal(size=shape) for shape in ((5, 2, 3), (3, 4))]
    ours, theirs = [Tensor(v) for v in values], [torch.tensor(v, requires_grad=True) for v in values]
    (ours[0] @ ours[1]).tanh().sum().backward()
    (theirs[0] @ theirs[1]).tanh().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)


def test_a_chain_of_many_operations_needs_no_recursion():
    x = y = Tensor(1.0)
    for _ in range(5000):
        y = y * 1.0001
    y.backward()
    assert x.grad == pytest.approx(1.0001**5000)


def test_a_second_backward_pass_begins_at_zero():
    x = Tensor(3.0)
    for _ in range(2):
        (x * x).backward()
        assert x.grad == 6


def test_only_one_number_has_a_backward_pass():
    with pytest.raises(ValueError, match=r"backward: shape \(2,\): expected one number"):
        Tensor([1.0, 2.0]).backward()


def test_a_network_learns_as_in_torch():
    """Loss, gradients and ten steps of Adam."""
    draw = np.random.default_rng(1)
    points, labels = draw.normal(size=(20, 2)), draw.integers(3, size=20)
    ours = MLP([2, 8, 3])
    theirs = [torch.tensor(p.value, requires_grad=True) for p in ours.parameters]
    optimizer, expected = Adam(ours.parameters, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    for _ in range(10):
        w1, w2, b1, b2 = theirs
        logits = (torch.tensor(points) @ w1 + b1).tanh() @ w2 + b2
        their_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        expected.zero_grad()
        their_loss.backward()
        loss = cross_entropy(ours(points), labels)
        loss.backward()
        assert float(loss.value) == pytest.approx(their_loss.item(), rel=1e-12)
        for a, b in zip(ours.parameters, theirs, strict=True):
            np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-9, atol=1e-14)
        optimizer.step()
        expected.step()
    for a, b in zip(ours.parameters, theirs, strict=True):
        np.testing.assert_allclose(a.value, b.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_large_logits_do_not_overflow():
    loss = cross_entropy(Tensor([[1e4, 0.0]]), np.array([1]))
    loss.backward()
    assert float(loss.value) == 1e4


def test_the_spirals_are_learned_by_a_hidden_layer_and_not_without(capsys):
    points, labels = backprop.spirals(100)
    assert backprop.learn(MLP([2, 32, 32, 2]), points, labels, steps=200) > 0.95
    assert backprop.learn(MLP([2, 2]), points, labels, steps=200) < 0.75
    assert not capsys.readouterr().out


def test_numbers_and_arrays_may_stand_on_either_side_as_in_torch():
    array = np.random.default_rng(2).normal(size=(3, 3)) + 3.0
    for expression in (
        lambda x, a: 2 * x + 1 + x * 3,
        lambda x, a: 1 - x,
        lambda x, a: 1.5 / (x * x + 1),
        lambda x, a: a + x * a - a,
        lambda x, a: a - a * x,
        lambda x, a: a / (2 + x * x),
        lambda x, a: (x @ a) * (a @ x),
    ):
        x = Tensor(array - 3.5)
        y = torch.tensor(array - 3.5, requires_grad=True)
        ours, theirs = expression(x, array).sum(), expression(y, torch.tensor(array)).sum()
        ours.backward()
        theirs.backward()
        assert float(ours.value) == pytest.approx(theirs.item(), rel=1e-12)
        np.testing.assert_allclose(x.grad, y.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_the_power_zero_has_the_gradient_zero_also_at_zero():
    x = Tensor([0.0, 2.0])
    (x**0).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]


def test_adam_leaves_the_callers_array_and_parameters_outside_of_the_loss_alone():
    mine = np.array([1.0, 2.0])
    used, unused = Tensor(mine), Tensor([3.0])
    optimizer = Adam([used, unused], lr=0.1)
    (used * used).sum().backward()
    optimizer.step()
    assert mine.tolist() == [1.0, 2.0] and unused.value.tolist() == [3.0]
    np.testing.assert_allclose(used.value, [0.9, 1.9], rtol=1e-6)
