"""GELU against PyTorch's own in float64, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from kernels import gelu


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
    x = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30])
    with torch.no_grad():
        plain = gelu(x)
    x.requires_grad_()
    torch.testing.assert_close(gelu(x).detach(), plain)
    gelu(x[1:5]).sum().backward()
    assert x.grad.tolist() == [0, 0, 0.5, 0.5, 1, 0]
