"""Attention over selected blocks against a loop over queries that lists the keys each sees, in float64.

Without a GPU the kernels run in Triton's interpreter, in tiles of 16 x 16.
"""

import math

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention, selected_backward, selected_blocks
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
    return module._operation(q, k, v, blocks, N, 1 / math.sqrt(q.shape[3]), seqlens_k, "torch")[0]


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


@pytest.mark.parametrize("scores", [1 << 20, -1], ids=["with a mask", "block by block"])
def test_keys_that_do_not_exist_are_not_read(scores, monkeypatch):
    monkeypatch.setattr(module, "DENSE", scores)
    q, k, v, blocks = inputs(*CASES["fewer queries than keys"])
    options = {"seqlens_k": torch.tensor([17, 15])}
    for backend in ("torch", "reference"):
        clean = run([q, k, v], blocks, 4, q.cos(), **options, backend=backend)
        dirty = [k.clone(), v.clone()]
        for x in dirty:
            x[1, -2:] = math.nan
        again = run([q, *dirty], blocks, 4, q.cos(), **options, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("B, n", [(0, 2), (2, 0)], ids=["no rows", "no blocks"])
def test_nothing_block_by_block_gives_zeros(B, n, monkeypatch):
    monkeypatch.setattr(module, "DENSE", -1)
    q, k, v, blocks = inputs(5, 5, 2, 1, 1, 4, n, B=B)
    for x in run([q, k, v], blocks, 4, q.cos(), backend="torch"):
        assert (x == 0).all()


def test_autocast_around_the_backward_pass_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "DENSE", -1)
    q, k, v, blocks = inputs(*CASES["each head chooses"], dtype=torch.bfloat16)
    expected = run([q, k, v], blocks, 3, q.cos())
    with torch.autocast("cpu", torch.bfloat16):
        found = run([q, k, v], blocks, 3, q.cos())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
    with pytest.raises(ValueError, match=r"head width 8 in torch\.float64: backend 'triton' takes"):
        selected_attention(q, k, v, blocks, 3, backend="triton")
    with pytest.raises(ValueError, match=r"head width 12 in torch\.float32"):
        q, k, v = (torch.cat((x, x[..., :4]), -1).float() for x in (q, k, v))
        selected_attention(q, k, v, blocks, 3, backend="triton")
    with pytest.raises(ValueError, match="seqlens_k"):
        selected_attention(q, k, v, blocks, 3, seqlens_k=torch.tensor([3]))
    for n in (-1, 14):
        with pytest.raises(ValueError, match=rf"seqlens_k \[3, {n}\]: expected numbers from 0 to S = 13"):
            selected_attention(q, k, v, blocks, 3, seqlens_k=torch.tensor([3, n]))
    with pytest.raises(ValueError, match="q, k, v and blocks have 3, 4, 4 and 4 dimensions"):
        selected_attention(q[0], k, v, blocks, 3)
    with pytest.raises(ValueError, match="scale 0"):
        selected_attention(q, k, v, blocks, 3, scale=0)


# --- in Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_CASES = {
    "each head chooses": (7, 7, 4, 2, 4, 3, 2),
    "fewer queries than keys": (3, 17, 4, 1, 2, 4, 3),
    "16 heads choose, a block is longer than a tile": (4, 21, 16, 1, 1, 19, 2),
    "3 heads choose together": (5, 9, 6, 2, 2, 4, 2),
}
WAYS = {"by query": 1, "by block": 1000}  # the fewest heads of a choice that are a tile of their own


def on_the_device(case, dtype=torch.float32):
    q, k, v, blocks = inputs(*case)
    return [x.to(DEVICE, dtype) for x in (q, k, v)], blocks.to(DEVICE)


def run(leaves, blocks, N, dout, **options):
    """Return the result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = selected_attention(*leaves, blocks, N, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_as_exact_as_pytorch(leaves, blocks, N, **options):
    """The errors are at most twice those of plain PyTorch, plus a few roundings of the largest number."""
    dout = leaves[0].cos()
    ours, plain = (run(leaves, blocks, N, dout, **options, backend=b) for b in ("triton", "reference"))
    exact = [x.double() for x in leaves], blocks, N, dout.double()
    exact = run(*exact, **options, backend="reference")
    eps = torch.finfo(dout.dtype).eps
    for a, b, c in zip(ours, plain, exact, strict=True):
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        assert a.dtype == dout.dtype and error <= 2 * allowed + 4 * eps * max(1, c.abs().max())


@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
@pytest.mark.parametrize("shorter", [False, True], ids=["", "rows of different lengths"])
@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_compute_values_and_gradients(case, shorter, way, monkeypatch):
    """With lists in several parts, and with lengths also through tensor descriptors."""
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    monkeypatch.setattr(selected_backward, "SEGMENT", 48)
    monkeypatch.setattr(selected_blocks, "uses_tma", lambda q: shorter)
    leaves, blocks = on_the_device(case)
    lengths = torch.tensor([case[1], case[1] - 2], device=DEVICE) if shorter else None
    assert_as_exact_as_pytorch(leaves, blocks, case[5], seqlens_k=lengths)


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_after_the_last_key_is_not_read(way, monkeypatch):
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    monkeypatch.setattr(selected_blocks, "uses_tma", lambda q: True)
    case = KERNEL_CASES["fewer queries than keys"]
    leaves, blocks = on_the_device(case)
    options = {"seqlens_k": torch.tensor([17, 15], device=DEVICE), "backend": "triton"}
    clean = run(leaves, blocks, case[5], leaves[0].cos(), **options)
    for x in leaves[1:]:
        x[1, -2:] = math.nan
    again = run(leaves, blocks, case[5], leaves[0].cos(), **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    assert all((x[1, -2:] == 0).all() for x in again[2:])


@pytest.mark.parametrize("way", WAYS)
def test_lengths_in_any_strides(way, monkeypatch):
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    leaves, blocks = on_the_device(KERNEL_CASES["fewer queries than keys"])
    columns = torch.tensor([[15, 0], [7, 0]], device=DEVICE)
    for lengths in (columns[:, 0], columns[0, :1].expand(2)):
        assert_as_exact_as_pytorch(leaves, blocks, 4, seqlens_k=lengths)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_the_kernels_in_16_bits(way, dtype, monkeypatch):
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    leaves, blocks = on_the_device(KERNEL_CASES["3 heads choose together"], dtype)
    assert_as_exact_as_pytorch(leaves, blocks, 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_key_changes_nothing_before_it_nor_where_it_is_not_chosen(way, monkeypatch):
    """Not by a bit. A query that chose nothing gives zeros and no gradient."""
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    (q, k, v), blocks = on_the_device((12, 12, 2, 1, 1, 4, 2))
    blocks[:, 5] = -1
    dout = q.cos()
    before = run([q, k, v], blocks, 4, dout, backend="triton")
    assert (before[0][:, 5] == 0).all() and (before[1][:, 5] == 0).all()
    p = torch.arange(12, device=DEVICE)
    for j in (0, 7, 11):
        other = [x.clone() for x in (k, v)]
        for x in other:
            x[:, j] += 1
        after = selected_attention(q, *other, blocks, 4, backend="triton")
        sees = (blocks[:, :, 0] == j // 4).any(-1) & (p >= j)  # (B, T)
        assert ((after != before[0]).flatten(2).any(-1) == sees).all()


@pytest.mark.parametrize("way", WAYS)
def test_every_element_is_written_and_every_run_gives_the_same_bits(way, monkeypatch):
    monkeypatch.setattr(selected_blocks, "FEW_HEADS", WAYS[way])
    leaves, blocks = on_the_device(KERNEL_CASES["fewer queries than keys"])
    first = run(leaves, blocks, 4, leaves[0].cos(), backend="triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        again = run(leaves, blocks, 4, leaves[0].cos(), backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("heads", [1, 8])
def test_memory_of_the_kernels_grows_as_the_text(heads):
    largest = []
    for T in (64, 128):
        (q, k, v), _ = on_the_device((T, T, 8, 1, 8 // heads, 8, 2))
        own = torch.arange(T, device=DEVICE)[None, :, None, None] // 8
        blocks = (own - torch.arange(2, device=DEVICE)).expand(1, T, 8 // heads, 2)
        q, k, v = q[:1], k[:1], v[:1]
        with Largest() as found:
            out, lse = selected_blocks.forward(q, k, v, blocks, 8, 0.3, None)
            selected_backward.backward(out, q, k, v, blocks, out, lse, 8, 0.3, None)
        largest.append(found.n)
    assert largest[1] < 2.2 * largest[0]


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 5, 0)], ids=["no queries", "no blocks"])
def test_the_kernels_of_nothing(shape):
    T, S, n = shape
    (q, k, v), blocks = on_the_device((T, S, 2, 1, 1, 4, n))
    for x in run([q, k, v], blocks, 4, q, backend="triton"):
        assert (x == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_registered_operations(backend):
    """Check the schema, fake tensors, and gradients traced with unknown sizes."""
    (q, k, v), blocks = on_the_device((5, 5, 2, 1, 1, 4, 2))
    out, lse = module._operation(q, k, v, blocks, 4, 0.3, None, backend)
    library.opcheck(module._operation_backward, (out, q, k, v, blocks, out, lse, 4, 0.3, None, backend))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    library.opcheck(module._operation, (*leaves, blocks, 4, 0.3, None, backend))


def test_compiled_in_one_graph():
    torch.compiler.reset()
    leaves, blocks = on_the_device((9, 9, 2, 1, 1, 4, 2))
    attend = torch.compile(selected_attention, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    results = []
    for f in (selected_attention, attend):
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        out = f(q, k, v, blocks, 4, backend="triton")
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Heads, choices, keys of a block, blocks and tokens, as in native sparse attention and in MoBA.
SETTINGS = (
    [(32, 2, 64, 16, 3000), (8, 8, 512, 3, 3000)]
    if DEVICE == "cuda"
    else [(8, 1, 4, 2, 12), (2, 2, 4, 2, 12)]
)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("K", [64, 128] if DEVICE == "cuda" else [16])
def test_long_rows(setting, K):
    """Of 3,000 tokens on a GPU; of 12 in a rehearsal."""
    H, C, N, n, T = setting
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    q, k, v, blocks = inputs(T, T, H, 2 if C > 1 else 1, C, N, n, B=1, K=K, dtype=torch.float32)
    assert_as_exact_as_pytorch([x.to(DEVICE, dtype) for x in (q, k, v)], blocks.to(DEVICE), N)
