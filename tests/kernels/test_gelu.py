"""GELU against PyTorch's own in float64, and quick GELU against its equation: value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from kernels import gelu, quick_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient(dtype):
    x = torch.linspace(-40, 40, 4001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    dy = torch.randn(4001, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, expected = gelu(x), F.gelu(exact, approximate="tanh")
    y.backward(dy)
    expected.backward(dy.double())
    # A few roundings of values as large as x.
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, atol=rounding, rtol=rounding)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=8 * rounding, rtol=rounding)


def test_without_gradients_and_where_it_overflows():
    x = torch.tensor([-1e30, -1e15, -100.0, -0.0, 0.0, 100.0, 1e15, 1e30])
    with torch.no_grad():
        plain = gelu(x)
    x.requires_grad_()
    torch.testing.assert_close(gelu(x).detach(), plain)
    gelu(x[1:7]).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quick_gelu_is_its_equation_and_so_are_both_derivatives(dtype):
    x = torch.linspace(-30, 30, 3001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = quick_gelu(x), exact * torch.sigmoid(1.702 * exact)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, atol=rounding, rtol=rounding)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (expected_first,) = torch.autograd.grad(expected.sum(), exact, create_graph=True)
    torch.testing.assert_close(first.double(), expected_first, atol=8 * rounding, rtol=8 * rounding)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected_second,) = torch.autograd.grad(expected_first.sum(), exact)
    torch.testing.assert_close(second.double(), expected_second, atol=32 * rounding, rtol=32 * rounding)
    # Without a second derivative the gradient is computed in place.
    quick_gelu(x).sum().backward()
    torch.testing.assert_close(x.grad, first.detach(), atol=8 * rounding, rtol=8 * rounding)
    with torch.no_grad():
        torch.testing.assert_close(quick_gelu(x), y)
