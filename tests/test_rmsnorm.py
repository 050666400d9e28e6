"""RMSNorm against its definition in float64, and its gradient against the formula in the file's header."""

import pytest
import torch

from kernels import rms_norm


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (3 * torch.randn(5, 7, 48, generator=generator).to(dtype) for _ in range(3))
    return x, residual, 1 + 0.3 * torch.randn(48, generator=generator).to(dtype), dy


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_value_and_gradient_equal_the_equations(backend):
    x, _, weight, dy = inputs()
    x.requires_grad_(), weight.requires_grad_()
    y = rms_norm(x, weight, 1e-3, backend=backend)
    y.backward(dy)
    X, W, DY = (t.detach().double() for t in (x, weight, dy))
    r = (X.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    n, g = X * r, DY * W
    # float32 rounding of sums over 48 features (and, for the weight, 35 rows) of order one to ten
    torch.testing.assert_close(y.double(), n * W, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(
        x.grad.double(), r * (g - n * (g * n).mean(-1, keepdim=True)), atol=5e-6, rtol=1e-6
    )
    torch.testing.assert_close(weight.grad.double(), (DY * n).sum((0, 1)), atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_residual_is_added_first_and_returned(backend):
    x, residual, weight, _ = inputs()
    y, h = rms_norm(x, weight, residual=residual, backend=backend)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_statistics_are_float32(dtype, backend):
    """A row whose squares overflow float16, and long enough for a 16-bit sum to stall."""
    x = torch.full((2, 8192), 300.0).to(dtype)
    y = rms_norm(x, torch.ones(8192), backend=backend)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), torch.ones(2, 8192), atol=torch.finfo(dtype).eps, rtol=0)


def test_bad_arguments_say_why():
    x, _, weight, _ = inputs()
    with pytest.raises(ValueError, match=r"expected \(48,\)"):
        rms_norm(x, weight[:-1])
    with pytest.raises(ValueError, match="cuda-magic"):
        rms_norm(x, weight, backend="cuda-magic")
    with pytest.raises(ValueError, match="not built"):
        rms_norm(x, weight, backend="triton")
