"""The settings for CPUs change how fast products are, not what they are."""

import pytest
import torch

import cpu
from kernels import attention

matmul = torch.backends.mkldnn.matmul


@pytest.fixture
def tuned():
    before = matmul.fp32_precision
    cpu.multiply_by_onednn()
    yield
    matmul.fp32_precision = before


def test_products_are_still_those_of_float32(tuned):
    a, b = torch.randn(300, 500), torch.randn(500, 400)
    exact = a.double() @ b.double()
    # Rounding to bfloat16 would be an error of 3e-3.
    assert (a @ b - exact).norm() < 1e-6 * exact.norm()


def test_a_machine_that_would_round_keeps_its_products(monkeypatch):
    """AMX, played by rounding the operands as it would."""
    plain = torch.Tensor.__matmul__

    def rounding(a, b):
        low = matmul.fp32_precision == "bf16"
        return plain(a.bfloat16().float(), b.bfloat16().float()) if low else plain(a, b)

    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    cpu.multiply_by_onednn()
    chosen, matmul.fp32_precision = matmul.fp32_precision, before
    assert chosen == "ieee"


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients_stay_the_same(causal, tuned):
    shapes = ((2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, 16))  # grouped
    tuned_results = []
    for precision in ("bf16", "ieee"):
        matmul.fp32_precision = precision
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
        out = attention(q, k, v, causal=causal)
        (out * torch.randn_like(out)).sum().backward()
        tuned_results.append((out, q.grad, k.grad, v.grad))
        assert matmul.fp32_precision == precision
    for a, b in zip(*tuned_results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
