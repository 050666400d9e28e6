"""The settings for CPUs change the speed of products and not their values."""

import pytest
import torch
from torch import library

from engine import cpu
from kernels import attention
from kernels.attention_cpu import SHORT


def onednn() -> str:
    """Make oneDNN multiply, and return the precision that PyTorch then has; skip the test on CPUs with
    AMX."""
    cpu.multiply_by_onednn()
    if torch.get_float32_matmul_precision() != "medium":
        pytest.skip("oneDNN rounds on this CPU, so it is not used")
    return "medium"


def test_products_are_still_those_of_float32():
    cpu.multiply_by_onednn()
    a, b = torch.randn(300, 500), torch.randn(500, 400)
    exact = a.double() @ b.double()
    # Rounding to bfloat16 would be an error of 3e-3.
    assert (a @ b - exact).norm() < 1e-6 * exact.norm()


def test_a_machine_that_would_round_keeps_its_products(monkeypatch):
    """A CPU with AMX, simulated by rounding the operands to bfloat16."""
    plain, before = torch.Tensor.__matmul__, torch.get_float32_matmul_precision()

    def rounding(a, b):
        low = torch.get_float32_matmul_precision() == "medium"
        return plain(a.bfloat16().float(), b.bfloat16().float()) if low else plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    cpu.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == before


def operations(out):
    """Return the names of the nodes of autograd's graph of out."""
    found, ahead = set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [node for node, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "T, S, causal", [(300, 300, True), (40, 40, True), (150, 200, False), (3, 800, False)]
)
def test_attention_and_its_gradients_stay_the_same(T, S, causal, compiled):
    shapes = ((2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16))  # grouped
    function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    results = []
    for precision in (onednn(), "highest"):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
        out = function(q, k, v, causal=causal, scale=0.3)
        (out * torch.randn(out.shape)).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
        if not compiled:
            by_all_heads = any("attention_all_heads" in name for name in operations(out))
            assert by_all_heads == (precision != "highest" and S <= SHORT)
        assert torch.get_float32_matmul_precision() == precision
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_computes_in_float32(autocast):
    onednn()
    q, k, v = (3 * torch.randn(2, 200, 2, 16).bfloat16() for _ in range(3))
    exact = attention(*(x.double() for x in (q, k, v)), causal=True, backend="reference")
    if autocast:
        q, k, v = (x.float() for x in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, of the result alone; scores in bfloat16 would be an error of 1e-2.
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=2**-8)


def test_the_operation_is_one_that_torch_compile_can_trace():
    q, k, v = (torch.randn(2, 150, 8, requires_grad=True) for _ in range(3))
    library.opcheck(torch.ops.plinth.attention_all_heads, (q, k, v, True, 0.3))


def test_compiled_it_takes_rows_of_any_length():
    onednn()
    torch.compiler.reset()  # compilations by other tests count too
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for T, stance in (
        (300, "default"),
        (40, "default"),
        (129, "fail_on_recompile"),
        (700, "fail_on_recompile"),
    ):
        q = torch.randn(2, T, 2, 16, requires_grad=True)
        with torch.compiler.set_stance(stance):
            out = compiled(q, q, q, causal=True)
        torch.testing.assert_close(out, attention(q, q, q, causal=True))
        out.sum().backward()


@pytest.mark.parametrize(
    "load, cpu_seconds, crowded",
    [
        (2.0, 2.0, False),  # a quiet machine: the run alone
        (2.0, 0.5, False),  # threads that wait passively
        (9.0, 2.0, False),  # others wait, and this run does not
        (9.0, 0.8, True),
    ],
)
def test_crowded_cores_are_found_where_others_want_them_and_this_run_lacks_them(
    load, cpu_seconds, crowded, monkeypatch
):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    advice = cpu.crowded(1.0, cpu_seconds)
    assert (advice is not None) == crowded
    if crowded:
        assert "load average 9.0 on 2 cores; the 2 threads of this run got 0.8 of them" in advice
        assert "OMP_NUM_THREADS=1" in advice and "OMP_WAIT_POLICY=passive" in advice
        assert "\n" not in advice
