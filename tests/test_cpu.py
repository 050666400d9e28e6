"""The settings for CPUs change how fast products are, not what they are."""

import pytest
import torch

import cpu
from kernels import attention
from kernels.attention import SHORT


@pytest.fixture
def tuned():
    cpu.multiply_by_onednn()


def test_products_are_still_those_of_float32(tuned):
    a, b = torch.randn(300, 500), torch.randn(500, 400)
    exact = a.double() @ b.double()
    # Rounding to bfloat16 would be an error of 3e-3.
    assert (a @ b - exact).norm() < 1e-6 * exact.norm()


def test_a_machine_that_would_round_keeps_its_products(monkeypatch):
    """AMX, played by rounding the operands as it would."""
    plain, before = torch.Tensor.__matmul__, torch.get_float32_matmul_precision()

    def rounding(a, b):
        low = torch.get_float32_matmul_precision() == "medium"
        return plain(a.bfloat16().float(), b.bfloat16().float()) if low else plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    cpu.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    "T, S, causal", [(300, 300, True), (40, 40, True), (150, 200, False), (3, 800, False)]
)
def test_attention_and_its_gradients_stay_the_same(T, S, causal):
    shapes = ((2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16))  # grouped
    results = []
    cpu.multiply_by_onednn()
    tuned = torch.get_float32_matmul_precision()
    if tuned != "medium":
        pytest.skip("oneDNN would round on this CPU, and is not asked")
    for precision in (tuned, "highest"):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
        out = attention(q, k, v, causal=causal, scale=0.3)
        (out * torch.randn(out.shape)).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
        by_all_heads = "_AllHeads" in out.grad_fn.next_functions[0][0].name()
        assert by_all_heads == (precision == tuned and S <= SHORT)
        assert torch.get_float32_matmul_precision() == precision
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
