"""Attention against an independent float64 definition: a loop over queries, listing the keys each sees."""

import math

import pytest
import torch

from kernels import attention

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "causal window": {"causal": True, "window": 4},
    "scale": {"causal": True, "scale": 0.3},
    "softcap": {"causal": True, "softcap": 2.0},
    "documents": {"causal": True, "cu_seqlens": [0, 1, 5, 5, 11]},
    "documents window": {"window": 2, "cu_seqlens": [0, 4, 11]},
    "lengths": {"causal": True, "seqlens_k": [3, 11]},
    "lengths window": {"causal": True, "window": 3, "seqlens_k": [2, 9]},
}


def by_hand(q, k, v, causal=False, window=None, softcap=None, scale=None, cu_seqlens=None, seqlens_k=None):
    """The equation of kernels/attention.py, one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        n_keys = S if seqlens_k is None else int(seqlens_k[b])
        for i in range(T):
            p = n_keys - T + i
            keys = [j for j in range(n_keys) if not causal or j <= p]
            keys = [j for j in keys if window is None or abs(p - j) < window]
            if cu_seqlens is not None:
                document = [sum(j >= start for start in cu_seqlens.tolist()) for j in range(S)]
                keys = [j for j in keys if document[j] == document[p]]
            for h in range(H) if keys else ():
                g = h // (H // G)
                scores = k[b, keys, g] @ q[b, i, h] * (scale or 1 / math.sqrt(K))
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, i, h] = scores.softmax(0) @ v[b, keys, g]
    return out


def inputs(options, T=11, S=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    B = 1 if "cu_seqlens" in options else 2
    q = torch.randn(B, T, 4, 8, generator=generator).to(dtype)
    k, v = torch.randn(2, B, S, 2, 8, generator=generator).to(dtype)
    tensors = {key: torch.tensor(value, dtype=torch.int32) for key, value in options.items() if key in LISTS}
    return q, k, v, options | tensors


LISTS = ("cu_seqlens", "seqlens_k")


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name, backend):
    q, k, v, options = inputs(CASES[name])
    if backend == "torch" and "softcap" in options:
        with pytest.raises(ValueError, match="softcap"):
            attention(q, k, v, **options, backend=backend)
        return
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, expected = attention(*ours, **options, backend=backend), by_hand(*exact, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    # float32 sums of eleven terms of order one: a few times 1e-7
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("T, S", [(1, 7), (3, 7), (1, 1), (7, 3)])
def test_queries_stand_at_the_last_keys(T, S, backend):
    """T != S, as in decoding; with T > S the first queries see nothing and give zeros, not NaN."""
    for options in ({"causal": True}, {"causal": True, "window": 2}, {}):
        q, k, v, _ = inputs({}, T, S)
        q.requires_grad_()
        out = attention(q, k, v, **options, backend=backend)
        out.sum().backward()
        torch.testing.assert_close(out.double(), by_hand(q, k, v, **options), atol=2e-6, rtol=0)
        assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    q, k, v, _ = inputs({}, 64, 64, dtype)
    expected = by_hand(q, k, v, causal=True)
    for backend in ("reference", "torch"):
        out = attention(q, k, v, causal=True, backend=backend)
        assert out.dtype == dtype
        # scores, weights and output are each rounded once
        assert (out.double() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "tritn"}, "tritn"),
        ({"backend": "triton"}, "not built"),
        ({"window": 0}, "window 0"),
        ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, "one packed row"),
    ],
)
def test_impossible_choices_say_why(change, message):
    q, k, v, _ = inputs({})
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **change)


def test_shapes_that_do_not_fit_say_so():
    q, k, v, _ = inputs({})
    with pytest.raises(ValueError, match="multiple of G"):
        attention(q[:, :, :3], k, v)
