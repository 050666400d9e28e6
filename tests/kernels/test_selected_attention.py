"""Attention over selected blocks against a loop over queries that lists the keys each sees, in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention
from kernels import selected_attention as module
from kernels.selected_attention import selected_attention, strongest

CASES = {  # T, S, heads, key heads, choices, keys of a block, selected blocks
    "each head chooses": (13, 13, 4, 2, 4, 3, 2),
    "the heads of a key head choose": (11, 11, 4, 2, 2, 4, 3),
    "fewer queries than keys": (5, 17, 4, 1, 2, 4, 3),
    "more blocks than there are": (9, 9, 2, 2, 2, 2, 8),
}


def inputs(T, S, H, G, C, N, n, B=2, K=8, dtype=torch.float64):
    """Return q, k, v and blocks, of which some are below 0, twice there, or after the query."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(B, *shape, K, dtype=dtype, generator=generator) for shape in ((T, H), (S, G), (S, G))
    )
    blocks = torch.randint(-1, -(-S // N) + 1, (B, T, C, n), generator=generator)
    return q, k, v, blocks


def by_hand(q, k, v, blocks, N, lengths=None):
    """Return the equation of the file's header, one query and head at a time."""
    (B, T, H, K), (S, G), C = q.shape, k.shape[1:3], blocks.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        n_keys = S if lengths is None else int(lengths[b])
        for i in range(T):
            for h in range(H):
                chosen = blocks[b, i, h // (H // C)].tolist()
                keys = [j for j in range(n_keys) if j // N in chosen and j <= n_keys - T + i]
                if keys:
                    scores = k[b, keys, h // (H // G)] @ q[b, i, h] / math.sqrt(K)
                    out[b, i, h] = scores.softmax(0) @ v[b, keys, h // (H // G)]
    return out


def by_block(q, k, v, blocks, N, seqlens_k=None):
    return module._by_block(q, k, v, blocks, N, 1 / math.sqrt(q.shape[3]), seqlens_k)[0]


def dense(q, k, v, blocks, N, seqlens_k=None):
    return module._dense(q, k, v, blocks, N, 1 / math.sqrt(q.shape[3]), seqlens_k)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("shorter", [False, True], ids=["", "rows of different lengths"])
def test_every_way_gives_the_equation_and_its_gradients(case, shorter, monkeypatch):
    monkeypatch.setattr(module, "TILE", 2)
    monkeypatch.setattr(module, "SEGMENT", 6)
    q, k, v, blocks = inputs(*case)
    lengths = torch.tensor([case[1], case[1] - 2]) if shorter else None
    expected, exact = by_hand(q, k, v, blocks, case[5], lengths), None
    for way in (
        lambda *x, seqlens_k: selected_attention(*x, seqlens_k=seqlens_k, backend="reference"),
        dense,
        by_block,
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = way(*leaves, blocks, case[5], seqlens_k=lengths)
        assert (out - expected).abs().max() < 1e-12
        found = torch.autograd.grad(out, leaves, expected.cos())
        exact = exact or found
        assert all((x - y).abs().max() < 1e-12 for x, y in zip(found, exact, strict=True))


def test_all_blocks_are_full_attention():
    q, k, v, _ = inputs(*CASES["fewer queries than keys"])
    every = torch.arange(5).expand(2, 5, 2, 5)
    expected = attention(q, k, v, causal=True, backend="reference")
    for way in (dense, by_block):
        assert (way(q, k, v, every, 4) - expected).abs().max() < 1e-12


def test_a_query_that_selects_nothing_gives_zeros_and_no_gradient():
    q, k, v, blocks = inputs(*CASES["each head chooses"])
    blocks[:, 4] = -1
    for way in (dense, by_block):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = way(*leaves, blocks, 3)
        out.sum().backward()
        assert (out[:, 4] == 0).all() and (leaves[0].grad[:, 4] == 0).all()
        assert all(x.grad.isfinite().all() for x in leaves)


def test_bfloat16_is_summed_in_float32():
    q, k, v, blocks = inputs(40, 40, 2, 1, 2, 4, 9)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact = by_hand(q.double(), k.double(), v.double(), blocks, 4)
    out = by_block(q, k, v, blocks, 4)
    assert out.dtype == torch.bfloat16 and (out.double() - exact).abs().max() < 0.01


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.n = max(
                self.n, x.untyped_storage().nbytes() // x.element_size() if torch.is_tensor(x) else 0
            )
        return out


def test_no_tensor_grows_faster_than_the_text(monkeypatch):
    """Of 512 keys the largest tensor is smaller than T T scores, and twice as many make it twice as large."""
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "DENSE", 0)
    largest = []
    for T in (512, 1024, 2048):
        q, k, v, _ = inputs(T, T, 2, 1, 2, 16, 3, B=1, K=4, dtype=torch.float32)
        blocks = torch.stack([torch.arange(T) // 16 - i for i in range(3)], dim=-1)[None, :, None].expand(
            1, T, 2, 3
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with Largest() as found:
            selected_attention(*leaves, blocks, 16).sum().backward()
        largest.append(found.n)
    assert largest[0] < 512 * 512 / 2
    assert largest[1] < 2.2 * largest[0] and largest[2] < 2.2 * largest[1]


def test_of_equal_scores_the_first_is_taken_and_no_minus_infinity():
    scores = torch.tensor([[1.0, 3.0, 3.0, -math.inf], [-math.inf] * 4, [math.inf, 1, math.inf, 2]])
    assert strongest(scores, 2).tolist() == [[1, 2], [-1, -1], [0, 2]]
    assert strongest(scores, 5).tolist()[0] == [1, 2, 0, -1, -1]


def test_what_does_not_fit_is_refused():
    q, k, v, blocks = inputs(*CASES["each head chooses"])
    for wrong, message in (
        ((q, k[:1], v, blocks, 3), "expected q"),
        ((q, k, v, blocks.double(), 3), "expected integers"),
        ((q, k, v, blocks[:, :, :1], 3), "C a multiple of 2 key heads"),
        ((q, k, v, blocks, 0), "block_size 0"),
    ):
        with pytest.raises(ValueError, match=message):
            selected_attention(*wrong)
    with pytest.raises(ValueError, match="there is no kernel in Triton"):
        selected_attention(q, k, v, blocks, 3, backend="triton")
    with pytest.raises(ValueError, match="seqlens_k"):
        selected_attention(q, k, v, blocks, 3, seqlens_k=torch.tensor([3]))
    with pytest.raises(ValueError, match="scale 0"):
        selected_attention(q, k, v, blocks, 3, scale=0)
