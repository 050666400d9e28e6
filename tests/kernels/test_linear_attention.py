"""Linear attention against its recurrence in float64: token by token, with the state that the equation has.

Without a GPU the kernels run in Triton's interpreter, in chunks of 16 tokens and tiles of 16 x 16.
"""

import math

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

from attention_variants.linear import slopes
from kernels import linear_attention as module
from kernels import linear_chunks
from kernels.linear_attention import _triton, _triton_backward, linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # B, T, H, K, and whether there is a first state
    "whole chunks": (1, 32, 2, 16, True),
    "a last chunk of one token": (2, 33, 2, 16, True),
    "fewer tokens than a chunk": (1, 5, 2, 16, True),
    "one token": (2, 1, 2, 16, True),
    "no first state, several tiles": (1, 19, 2, 32, False),
    "a width that is no power of two": (1, 37, 1, 24, True),
    "a narrow head": (1, 20, 2, 8, True),
}
RATES = [0.0, 0.7]  # a head that never decays, and one that forgets fast


def inputs(B, T, H, K, given, dtype=torch.float32):
    """Return [q, k, v, state], rates, and the gradients of both results."""
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, K)] * 3 + [(B, H, K, K), (B, T, H, K), (B, H, K, K)]
    *qkv, state, do, dlast = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    leaves = [x.to(dtype) for x in qkv] + [state] * given
    return leaves, torch.tensor(RATES[:H], device=DEVICE), (do.to(dtype), dlast)


def by_recurrence(q, k, v, rates, state=None, shift=0):
    """Return the first equation of the header, token by token. shift: a mistake, how many times more a token
    has decayed than it should have when it is read."""
    B, T, H, K = q.shape
    state = q.new_zeros(B, H, K, K) if state is None else state
    decay, out = torch.exp(-rates)[:, None, None], []
    for t in range(T):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, None, :] @ (decay**shift * state))[:, :, 0])
    return torch.stack(out, 1), state


def run(function, leaves, rates, gradients, dtype=None, **options):
    """Return both results of a function, and the gradients of the leaves."""
    if dtype is not None:
        leaves, gradients = ([x.to(dtype) for x in y] for y in (leaves, gradients))
        rates = rates.to(dtype)
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = function(*leaves[:3], rates, *leaves[3:], **options)
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, gradients)]


def worst(ours, plain, exact, eps):
    """Return by how much the largest error exceeds what is allowed: twice that of plain PyTorch, plus a few
    roundings of the largest number. Above 1 it is wrong."""
    ratios = []
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        ratios.append(error / (2 * allowed + 4 * eps * c.abs().max()))
    return max(ratios)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "tensor descriptors"])
def test_values_and_all_gradients_are_those_of_the_recurrence(case, backend, monkeypatch):
    monkeypatch.setattr(linear_chunks, "uses_tma", lambda q: backend == "tensor descriptors")
    example = inputs(*case)
    name = "triton" if backend == "tensor descriptors" else backend
    exact = run(by_recurrence, *example, torch.float64)
    if name != "triton":
        ours = run(linear_attention, *example, torch.float64, chunk=7, backend=name)
        assert all((a - b).abs().max() < 1e-11 for a, b in zip(ours, exact, strict=True))
        return
    ours = run(linear_attention, *example, backend=name)
    plain = run(by_recurrence, *example, torch.float32)
    assert worst(ours, plain, exact, torch.finfo(torch.float32).eps) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_in_16_bits_the_errors_are_those_of_plain_pytorch(dtype):
    example = inputs(*CASES["a last chunk of one token"], dtype=dtype)
    ours, plain = (run(linear_attention, *example, backend=name) for name in ("triton", "torch"))
    exact = run(by_recurrence, *example, torch.float64)
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    assert worst(ours, plain, exact, torch.finfo(dtype).eps) <= 1


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_decay_that_is_off_by_one_position_is_seen(shift):
    """The comparison above fails by far where a token has decayed once too often, or not often enough."""
    example = inputs(*CASES["a last chunk of one token"])
    plain = run(by_recurrence, *example, torch.float32)
    exact = run(by_recurrence, *example, torch.float64)
    wrong = run(by_recurrence, *example, torch.float64, shift=shift)
    assert worst(wrong, plain, exact, torch.finfo(torch.float32).eps) > 1e4


def test_the_state_goes_from_call_to_call():
    """Two calls give what one gives, cut anywhere, and so do their gradients."""
    (q, k, v, state), rates, _ = inputs(1, 37, 2, 16, True)
    for cut in (1, 16, 30):
        leaves = [[x.detach().requires_grad_() for x in (q, k, v, state)] for _ in range(2)]
        whole = linear_attention(*leaves[0][:3], rates, leaves[0][3], backend="triton")
        q2, k2, v2, s2 = leaves[1]
        o1, s = linear_attention(q2[:, :cut], k2[:, :cut], v2[:, :cut], rates, s2, backend="triton")
        o2, s = linear_attention(q2[:, cut:], k2[:, cut:], v2[:, cut:], rates, s, backend="triton")
        parts = torch.cat([o1, o2], 1), s
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
        for out in (whole, parts):
            (out[0].sin().sum() + out[1].sin().sum()).backward()
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_changed_token_changes_no_output_before_it():
    """Not by a bit, and it changes its own."""
    (q, k, v), rates, _ = inputs(1, 37, 2, 16, False)
    rates = rates.clamp(min=0.05)
    before, _ = linear_attention(q, k, v, rates, backend="triton")
    for t in (0, 15, 16, 31, 36):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, t] += 1
        after, _ = linear_attention(*other, rates, backend="triton")
        assert torch.equal(after[:, :t], before[:, :t]) and (after[:, t] != before[:, t]).any(-1).all()


@torch.no_grad()
def test_nothing_overflows_at_any_rate():
    """Of heads whose tokens are forgotten at once, every token reads itself."""
    (q, k, v), _, _ = inputs(1, 50, 2, 16, False)
    out, state = linear_attention(q, k, v, torch.tensor([90.0, 1e5], device=DEVICE), backend="triton")
    assert state.isfinite().all()
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-5, rtol=1e-5)


def test_the_layer_of_minimax_and_any_strides():
    """q, k and v are parts of one tensor, as a layer makes them, and are read where they are."""
    x = 0.3 * torch.randn(2, 21, 4, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rates = slopes(4, 1, 8, like=x)
    results = []
    for backend in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        out, _ = linear_attention(*leaf.chunk(3, dim=-1), rates, backend=backend)
        out.sin().sum().backward()
        results.append((out.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_no_tokens(backend):
    leaves, rates, gradients = inputs(2, 0, 2, 16, True)
    out, last, *_, dstate = run(linear_attention, leaves, rates, gradients, backend=backend)
    assert out.shape == (2, 0, 2, 16) and torch.equal(last, leaves[3]) and torch.equal(dstate, gradients[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_rows(backend):
    leaves, rates, gradients = inputs(0, 3, 2, 16, True)
    out, last, *_ = run(linear_attention, leaves, rates, gradients, backend=backend)
    assert out.shape == (0, 3, 2, 16) and last.shape == (0, 2, 16, 16)


def test_backend_torch_has_gradients_of_the_rates_and_second_derivatives():
    generator, rates = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.3]).double().requires_grad_()
    q, k, v = (torch.randn(1, 5, 2, 4, generator=generator).double() for _ in range(3))
    found = []
    for backend in ("reference", "torch"):
        out, _ = linear_attention(q, k, v, rates, chunk=2, backend=backend)
        (first,) = torch.autograd.grad(out.sin().sum(), rates, create_graph=True)
        found.append(torch.stack([first, *torch.autograd.grad(first.square().sum(), rates)]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_every_element_is_written_and_every_run_gives_the_same_bits():
    example = inputs(*CASES["a width that is no power of two"])
    first = run(linear_attention, *example, backend="triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        again = run(linear_attention, *example, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_registered_operations():
    """Check the schema, fake tensors, and gradients traced with unknown sizes."""
    (q, k, v, state), rates, (do, dlast) = inputs(1, 5, 2, 16, True)
    library.opcheck(_triton_backward, (do, dlast, q, k, v, rates, state))
    library.opcheck(_triton, (*(x.requires_grad_() for x in (q, k, v)), rates, state.requires_grad_()))


def test_compiled_in_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    example = inputs(1, 18, 2, 16, True)
    results = [run(f, *example, backend="triton") for f in (linear_attention, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_rounds_the_inputs_and_not_the_state():
    (q, k, v, state), rates, _ = inputs(1, 20, 2, 16, True)
    for backend in ("reference", "torch"):
        with torch.autocast(DEVICE, torch.bfloat16):
            out, last = linear_attention(q, k, v, rates, state, backend=backend)
        rounded = [x.bfloat16() for x in (q, k, v)]
        expected = linear_attention(*rounded, rates, state, backend=backend)
        assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
        assert torch.equal(out, expected[0]) and torch.equal(last, expected[1])


def test_auto_takes_pytorch_s_products_on_a_gpu_for_rates_that_learn(monkeypatch):
    """The kernel has no gradient of the rates."""
    monkeypatch.setattr(module, "choose", lambda operation, backend, x: "triton")  # as on a GPU
    (q, k, v), rates, _ = inputs(1, 5, 2, 16, False, torch.float16)
    chosen = [module._choose("auto", q, v, r) for r in (rates, rates.clone().requires_grad_())]
    assert chosen == ["triton", "torch"]


def test_what_does_not_fit_is_refused():
    (q, k, v, state), rates, _ = inputs(1, 5, 2, 16, True)

    def error(match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            linear_attention(*arguments, **options)

    error(r"expected q, k and v \(B, T, H, K\)", q, k[:, :4], v, rates)
    error("q, k and v have 3, 4 and 4 dimensions: expected 4", q[0], k, v, rates)
    error("of one dtype", q, k.half(), v, rates)
    error(r"rates \(1,\) .*expected \(2,\)", q, k, v, rates[:1])
    error(r"rates \(2,\) torch\.float16", q, k, v, rates.half())
    error(r"state \(1, 2, 16, 16\) torch\.float16: expected", q, k, v, rates, state.half())
    error("chunk 0", q, k, v, rates, chunk=0)
    error("cuda-magic", q, k, v, rates, backend="cuda-magic")
    error("no gradient of the rates", q, k, v, rates.clone().requires_grad_(), backend="triton")
    wide = [x.repeat(1, 1, 1, 9) for x in (q, k, v)]
    error(r"head widths 144 and 144 in torch\.float32", *wide, rates, backend="triton")
    error("in torch.float64", *(x.double() for x in (q, k, v)), rates, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128] if DEVICE == "cuda" else [16])
def test_long_rows(K):
    """Of 4,001 tokens on a GPU; a few in a rehearsal. The errors are those of the chunked way in PyTorch."""
    T, dtype = (4001, torch.bfloat16) if DEVICE == "cuda" else (40, torch.float16)
    example = inputs(1, T, 2, K, True, dtype=dtype)
    example = [x / math.sqrt(K) for x in example[0][:3]] + example[0][3:], *example[1:]
    ours, plain = (run(linear_attention, *example, backend=name) for name in ("triton", "torch"))
    exact = run(linear_attention, *example, torch.float64, backend="torch")
    assert worst(ours, plain, exact, torch.finfo(dtype).eps) <= 1
