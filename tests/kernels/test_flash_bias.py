"""The bias of attention, against its definition in float64: one number per head and distance.

The rule for the kernels' errors is that of test_attention.py.
"""

import math

import pytest
import torch
from torch import library

from kernels import attention, attention_cpu, flash_bias, flash_decoding, flash_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 9},
    "causal window, scale": {"causal": True, "window": 20, "scale": 0.5},
    "documents": {"cu_seqlens": [0, 3, 3, 20, 35]},
    "causal documents": {"causal": True, "cu_seqlens": [0, 17, 35]},
    "lengths": {"seqlens_k": [18, 35]},
    "causal lengths": {"causal": True, "seqlens_k": [0, 35]},
    "fewer queries": {"T": 21},
    "more queries": {"T": 35, "S": 17, "causal": True},
    "no groups, width 24": {"H": 2, "G": 2, "K": 24},
}


def inputs(name, dtype=torch.float32, reach=12, T=35, S=35, H=2, G=1, K=16):
    """Return (q, k, v, bias) and the options of a mask."""
    options = dict(MASKS[name])
    T, S, H, G, K = (options.pop(x, y) for x, y in zip("TSHGK", (T, S, H, G, K), strict=True))
    generator = torch.Generator().manual_seed(0)
    B = 1 if "cu_seqlens" in options else 2
    q = torch.randn(B, T, H, K, generator=generator)
    k, v = torch.randn(2, B, S, G, K, generator=generator)
    bias = 2 * torch.randn(H, 2 * reach + 1, generator=generator)
    for key in ("cu_seqlens", "seqlens_k"):
        if key in options:
            options[key] = torch.tensor(options[key], dtype=torch.int32, device=DEVICE)
    return [x.to(DEVICE, dtype) for x in (q, k, v)] + [bias.to(DEVICE)], options


def by_hand(q, k, v, bias, *, causal=False, window=None, scale=None, cu_seqlens=None, seqlens_k=None):
    """Return the equation of kernels/attention.py in float64, with a bias, one score at a time."""
    (B, T, H, K), (S, G), reach = q.shape, k.shape[1:3], bias.shape[1] // 2
    starts = [] if cu_seqlens is None else cu_seqlens.tolist()
    document = [sum(j >= start for start in starts) for j in range(S)]
    seen, taken = torch.zeros(2, B, 1, T, S, dtype=torch.int64)
    for b in range(B):
        n_keys = S if seqlens_k is None else int(seqlens_k[b])
        for i in range(T):
            p = n_keys - T + i
            for j in range(n_keys):
                near = window is None or abs(j - p) < window
                same = cu_seqlens is None or document[j] == document[p]
                seen[b, 0, i, j] = (not causal or j <= p) and near and same
                taken[b, 0, i, j] = reach + max(-reach, min(reach, j - p))
    k, v = k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
    head = torch.arange(H)[:, None, None]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (scale or 1 / math.sqrt(K))
    scores = scores + bias[head, taken.to(q.device)]
    seen = seen.bool().to(q.device)
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    return torch.einsum("bhts,bshk->bthk", weights, v)


def run(function, leaves, options, dtype):
    """Return the results of a function of (q, k, v, bias), and the gradients."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves[:3]] + [
        leaves[3].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    ]
    out = function(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def attend(backend):
    return lambda q, k, v, bias, **options: attention(q, k, v, bias=bias, **options, backend=backend)


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_of_the_reference_equal_the_definition(name):
    leaves, options = inputs(name)
    ours = run(attend("reference"), leaves, options, torch.float64)
    for a, b in zip(ours, run(by_hand, leaves, options, torch.float64), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "batched", "triton", "tensor descriptors"])
@pytest.mark.parametrize("name", MASKS)
def test_every_backend_is_as_exact_as_the_reference(name, backend, monkeypatch):
    leaves, options = inputs(name)
    if backend == "batched":  # attention_cpu.py, in several blocks of queries
        monkeypatch.setattr(attention_cpu, "applies", lambda q, k: q.shape[1] > 1)
        monkeypatch.setattr(attention_cpu, "BLOCK", 8)
    monkeypatch.setattr(flash_tiles, "uses_tma", lambda q: backend == "tensor descriptors")
    kind = "torch" if backend in ("torch", "batched") else "triton"
    ours = run(attend(kind), leaves, options, q32 := torch.float32)
    plain, exact = (run(attend("reference"), leaves, options, dtype) for dtype in (q32, torch.float64))
    eps = torch.finfo(q32).eps
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dbias"), ours, plain, exact, strict=True):
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        assert error <= 2 * allowed + 4 * eps * max(1, c.abs().max()), f"{name}: {error:.1e}, {allowed:.1e}"


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"seqlens_k": [0, 61]}, {"window": 30}], ids=["all", "lengths", "window"]
)
def test_few_queries_over_many_keys_have_the_biases_of_their_own_positions(T, options, monkeypatch):
    """Each head of a group reads its own row, in flash_decoding too."""
    monkeypatch.setattr(flash_decoding, "MIN_KEYS", 16)
    monkeypatch.setattr(flash_decoding, "LOADED", 0)  # 16 keys
    monkeypatch.setitem(MASKS, "few", {"T": T, "S": 61, "causal": True, **options})
    leaves, options = inputs("few")
    assert flash_decoding.applies(*leaves[:2])
    out = attention(*leaves[:3], bias=leaves[3], **options, backend="triton")
    exact = attention(*(x.double() for x in leaves[:3]), bias=leaves[3], **options, backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=4e-6, rtol=0)


def test_a_tile_with_large_biases_and_few_queries_gives_no_nan():
    """Rows of a tile behind the last query have scores of 0; with a bias of 90 they overflow float16."""
    (q, k, v, bias), _ = inputs("causal", torch.float16, T=5, S=5)
    q, bias = -q.abs() - 9, bias + 90
    leaves = [x.requires_grad_() for x in (q, k.abs(), v, bias)]
    out = attention(*leaves[:3], bias=bias, causal=True, backend="triton")
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, *(leaf.grad for leaf in leaves)))


def test_a_bias_far_below_zero_beyond_a_distance_is_a_window():
    (q, k, v, bias), _ = inputs("all")
    near = torch.full_like(bias, -1e4)
    near[:, 8:17] = 0  # distances -4 to 4
    for backend in ("reference", "torch", "triton"):
        out = attention(q, k, v, bias=near, backend=backend)
        torch.testing.assert_close(out, attention(q, k, v, window=5, backend="reference"), atol=2e-6, rtol=0)


def test_every_run_gives_the_same_bits():
    leaves, options = inputs("window")
    first, second = (run(attend("triton"), leaves, options, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_frozen_bias_costs_no_gradient(monkeypatch):
    monkeypatch.setattr(flash_bias, "gradient", lambda *_: pytest.fail("computed"))
    (q, k, v, bias), _ = inputs("causal")
    q.requires_grad_()
    attention(q, k, v, bias=bias, causal=True, backend="triton").sum().backward()
    assert q.grad.isfinite().all()


def test_memory_is_linear_in_the_length(peak_memory):
    """Neither pass of the kernels has a matrix of biases."""

    def peak(T):
        leaves = [x.requires_grad_() for x in inputs("causal", T=T, S=T)[0]]
        return peak_memory(
            lambda: attention(*leaves[:3], bias=leaves[3], causal=True, backend="triton").sum().backward()
        )

    assert peak(64) < 2.1 * peak(32)


def test_the_operations_keep_their_contracts():
    (q, k, v, bias), _ = inputs("causal", T=9, S=9)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    options = (True, None, None, 0.25, None, None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.plinth.attention.default, (*leaves[:3], *options, bias), test_utils=checks)
    heads = [
        x.detach().transpose(1, 2).flatten(0, 1) for x in (q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))
    ]
    by_distance = torch.randn(2, 17, device=DEVICE).requires_grad_()
    heads = [x.requires_grad_() for x in heads]
    library.opcheck(torch.ops.plinth.attention_all_heads.default, (*heads, True, 0.3, by_distance))


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 24), {}, r"bias \(2, 24\): expected \(2, 2 R \+ 1\), with R at least 1"),
        ((4, 25), {}, r"bias \(4, 25\): expected \(2, 2 R"),
        ((2, 1), {}, "R at least 1"),
        ((2, 25), {"softcap": 30.0}, "a bias and a softcap do not go together"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(shape, options, message):
    (q, k, v, _), _ = inputs("all")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, bias=torch.zeros(shape, device=DEVICE), **options)


def test_a_bias_of_whole_numbers_is_refused():
    (q, k, v, _), _ = inputs("all")
    with pytest.raises(ValueError, match=r"torch.int64 on .*: expected floating-point numbers"):
        attention(q, k, v, bias=torch.zeros(2, 25, dtype=torch.int64, device=DEVICE))
