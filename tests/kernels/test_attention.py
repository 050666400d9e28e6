"""Attention against an independent definition in float64: a loop over queries that lists the keys each sees.

Without a GPU the Triton kernels run in the interpreter, in float32 and float16, because its products in
bfloat16 are wrong. Their error may be twice that of plain PyTorch in the same dtype, plus four roundings of a
value of order one, because the largest of a few small errors varies.
"""

import math
from functools import partial
from importlib import import_module
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._subclasses import FakeTensorMode

from kernels import attention, attention_cpu, flash_attention, flash_backward, flash_decoding, flash_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
LISTS = ("cu_seqlens", "seqlens_k")


def by_hand(q, k, v, causal=False, window=None, softcap=None, scale=None, cu_seqlens=None, seqlens_k=None):
    """Return the equation of kernels/attention.py in float64, one query at a time."""
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


def inputs(options, T=11, S=11, K=16, H=4, G=2, dtype=torch.float32, B=2):
    generator = torch.Generator().manual_seed(0)
    B = 1 if "cu_seqlens" in options else B
    q = torch.randn(B, T, H, K, generator=generator).to(DEVICE, dtype)
    k, v = torch.randn(2, B, S, G, K, generator=generator).to(DEVICE, dtype)
    tensors = {
        key: torch.tensor(options[key], dtype=torch.int32, device=DEVICE) for key in LISTS & options.keys()
    }
    return q, k, v, options | tensors


@pytest.mark.parametrize("backend", ["reference", "torch", "auto", "triton"])
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
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    # float32 sums of eleven terms of order one: a few times 1e-7
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("T, S", [(1, 7), (3, 7), (1, 1), (7, 3)])
def test_queries_stand_at_the_last_keys(T, S, backend):
    """T differs from S, as in decoding; with T > S the first queries see no key and give zeros, not NaN."""
    for options in ({"causal": True}, {"causal": True, "window": 2}, {}):
        q, k, v, _ = inputs({}, T, S)
        q.requires_grad_()
        out = attention(q, k, v, **options, backend=backend)
        out.sum().backward()
        torch.testing.assert_close(out.double(), by_hand(q, k, v, **options), atol=2e-6, rtol=0)
        assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    q, k, v, _ = inputs({}, 64, 64, 8, dtype=dtype)
    expected = by_hand(q, k, v, causal=True)
    for backend in ("reference", "torch"):
        out = attention(q, k, v, causal=True, backend=backend)
        assert out.dtype == dtype
        # Scores, weights and output are each rounded once.
        assert (out.double() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


# --- the kernels


def assert_as_exact_as_plain(q, k, v, options, dout=None):
    """Check values and gradients of the kernels by the rule of the header, and return them."""
    results = []
    for backend, dtype in (("triton", q.dtype), ("reference", q.dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, **options, backend=backend)
        if dout is None:
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, q.dtype)
        out.backward(dout.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    eps = torch.finfo(q.dtype).eps
    for name, ours, plain, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (ours, plain))
        assert error <= 2 * allowed + 4 * eps * max(1, exact.abs().max()), (
            f"{name}: {error:.1e}, plain {allowed:.1e}"
        )
        assert ours.dtype == q.dtype
    return results[0]


SHAPE = ("B", "T", "S", "H", "G", "K", "dtype")
FEATURES = {
    "causal": {"causal": True},
    "window": {"window": 9},
    "softcap": {"softcap": 1.5},
    "documents": {"cu_seqlens": [0, 3, 3, 20, 35]},
    "lengths": {"seqlens_k": [18, 35], "B": 2},
    "T not S": {"T": 21},
    "multi-query": {"H": 3, "G": 1},
    "no groups": {"H": 2, "G": 2},
    "width 24": {"K": 24},
    "float16": {"dtype": torch.float16},
}
IMPOSSIBLE = {("documents", "lengths"), ("documents", "T not S"), ("multi-query", "no groups")}
PAIRS = [pair for pair in combinations(FEATURES, 2) if pair not in IMPOSSIBLE]


@pytest.mark.parametrize("names", [*((name,) for name in FEATURES), *PAIRS], ids=" + ".join)
def test_each_feature_alone_and_with_each_other(names):
    """T and S are several tiles long, and the last tile of each is not full."""
    wanted = {"B": 1, "T": 35, "S": 35, "H": 2, "G": 1}
    for name in names:
        wanted |= FEATURES[name]
    options = {key: wanted.pop(key) for key in list(wanted) if key not in SHAPE}
    q, k, v, options = inputs(options, **wanted)
    assert_as_exact_as_plain(q, k, v, options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    T, S = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    G, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    options = {"causal": data.draw(st.booleans()), "window": data.draw(st.none() | st.integers(1, 60))}
    if data.draw(st.booleans()):
        S = T
        cuts = data.draw(st.lists(st.integers(0, T), max_size=4))
        options["cu_seqlens"] = [0, *sorted(cuts), T]
    K = data.draw(st.sampled_from([8, 16, 40, 80, 96, 256]))
    q, k, v, options = inputs(options, T, S, K, G * group, G, B=1)
    assert_as_exact_as_plain(q, k, v, options)


@pytest.mark.parametrize("name", ["plain", "causal window", "softcap", "documents", "lengths"])
def test_tiles_through_tensor_descriptors(name, monkeypatch):
    """Tiles are loaded as on Hopper, which the interpreter can do too."""
    monkeypatch.setattr(flash_tiles, "uses_tma", lambda q: True)
    long = {"cu_seqlens": [0, 3, 3, 20, 35], "seqlens_k": [18, 35], "window": 9}
    options = {key: long.get(key, value) for key, value in CASES[name].items()}
    q, k, v, options = inputs(options, 35, 35, 24)
    assert_as_exact_as_plain(q, k, v, options)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "name", ["plain", "causal", "window", "causal window", "softcap", "lengths", "lengths window"]
)
def test_few_queries_over_many_keys(name, T, monkeypatch):
    """flash_decoding takes each row in several splits, and some of them see no key."""
    monkeypatch.setattr(flash_decoding, "MIN_KEYS", 16)
    monkeypatch.setattr(flash_decoding, "LOADED", 0)  # 16 keys
    options = {key: [19, 61] if key == "seqlens_k" else value for key, value in CASES[name].items()}
    q, k, v, options = inputs(options, T, 61)
    assert flash_decoding.applies(q, k)
    assert_as_exact_as_plain(q, k, v, options)


def test_a_cache_with_an_empty_row_gives_zeros(monkeypatch):
    monkeypatch.setattr(flash_decoding, "MIN_KEYS", 16)
    q, k, v, options = inputs({"seqlens_k": [0, 40]}, 1, 40)
    out = attention(q, k, v, **options, backend="triton")
    assert (out[0] == 0).all() and (out[1] != 0).all()


def test_many_rows_fit_the_grid_of_programs(monkeypatch):
    """CUDA takes 2^31 - 1 programs in the first dimension of a grid, and 65,535 in the second."""
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for kernel in ("split_kernel", "merge_kernel"):
        monkeypatch.setattr(flash_decoding, kernel, Recorded())
    q, k = torch.empty(40_000, 1, 8, 64, device="meta"), torch.empty(40_000, 300, 2, 64, device="meta")
    assert flash_decoding.applies(q, k)
    flash_decoding.forward(q, k, k, False, None, None, 0.1, None, None, None)
    assert grids == [(80_000, 1), (320_000,)]


def test_any_strides():
    """Views of one fused projection are read without a copy; layouts that do not fit are copied."""
    B, T, H, K = 2, 20, 2, 16
    fused = torch.randn(B, T, 3 * H * K, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    q, k, v = fused.view(B, T, 3 * H, K).split(H, dim=2)
    assert all(flash_tiles.packed(x) is x for x in (q, k, v))
    heads_first = torch.randn(B, H, T, K, device=DEVICE).transpose(1, 2)
    expanded = torch.randn(B, T, 1, K, device=DEVICE).expand(B, T, H, K)
    every_other = torch.randn(B, T, H, 2 * K, device=DEVICE)[..., ::2]
    for x in (heads_first, expanded, every_other):
        assert_as_exact_as_plain(q, x, v, {"causal": True}, dout=x)
        assert_as_exact_as_plain(
            x, k, x, {"causal": True}, dout=torch.ones((), device=DEVICE).expand(x.shape)
        )
    columns = torch.tensor([[5, 0], [17, 0]], device=DEVICE)
    for lengths in (columns[:, 0], columns[0, :1].expand(B)):
        assert_as_exact_as_plain(q, k, v, {"causal": True, "seqlens_k": lengths})


def test_every_element_is_written(monkeypatch):
    """Memory is filled with NaN when it is allocated."""

    def poisoned(*args, **kwargs):
        return new_empty(*args, **kwargs).fill_(math.nan)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x, x.shape))
    monkeypatch.setattr(flash_decoding, "MIN_KEYS", 16)
    for T, options in ((35, {"causal": True, "window": 3}), (50, {"causal": True}), (1, {"window": 2})):
        q, k, v, _ = inputs({}, T, 35)
        masks = options.get("causal", False), options.get("window"), None, 0.25, None, None
        kernels = flash_decoding if flash_decoding.applies(q, k) else flash_attention
        out, lse = kernels.forward(q, k, v, *masks)
        for x in (out, lse, *flash_backward.backward(q, q, k, v, out, lse, *masks)):
            assert x.isfinite().all()


def test_what_is_masked_is_not_read():
    """NaN in keys that no query sees does not reach the result, nor NaN scores outside the window."""
    q, k, v, _ = inputs({}, 64, 64)
    for x in (k, v):
        x[:, :16] = math.nan  # the last 16 queries, with a window of 20, begin at key 29
    for late in (slice(48, 64), slice(50, 64)):
        out = attention(q[:, late], k, v, causal=True, window=20, backend="triton")
        expected = by_hand(q[:, late], k.nan_to_num(), v.nan_to_num(), causal=True, window=20)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


POISON = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    "backend", ["reference", "torch", "triton", "tensor descriptors", "decoding", "compiled"]
)
@pytest.mark.parametrize("mask", [{}, {"causal": True, "window": 9}], ids=["all", "causal window"])
def test_keys_that_do_not_exist_count_for_nothing(mask, backend, monkeypatch):
    """Whatever a cache holds after the keys of a row, results and gradients are those of a shorter row."""
    monkeypatch.setattr(flash_tiles, "uses_tma", lambda q: backend == "tensor descriptors")
    if backend == "decoding":
        monkeypatch.setattr(flash_decoding, "MIN_KEYS", 16)
    T, S, lengths = 1 if backend == "decoding" else 20, 40, (0, 21, 40)
    q, k, v, options = inputs({"seqlens_k": lengths} | mask, T, S, B=3)
    assert flash_decoding.applies(q, k) == (backend == "decoding")
    for b, n in enumerate(lengths):
        for i, x in enumerate((k, v)):
            x[b, n:] = torch.tensor([POISON[(i + j) % 3] for j in range(S - n)], device=DEVICE)[:, None, None]
    run, name = attention, backend if backend in ("reference", "torch") else "triton"
    if backend == "compiled":
        torch._dynamo.reset()  # graphs of other tests count for the limit of graphs
        run, name = torch.compile(attention, fullgraph=True, backend="aot_eager"), "torch"

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves, **options, backend=name)
    out.square().sum().backward()
    for b, n in enumerate(lengths):
        exact = [x[b : b + 1].double().requires_grad_() for x in (q, k[:, :n], v[:, :n])]
        expected = attention(*exact, **mask, backend="reference")
        expected.square().sum().backward()
        torch.testing.assert_close(out[b : b + 1].double(), expected, atol=4e-6, rtol=0)
        for leaf, x in zip(leaves, exact, strict=True):
            ours = leaf.grad[b : b + 1].double()
            torch.testing.assert_close(ours[:, : x.shape[1]], x.grad, atol=2e-5, rtol=0)
            assert (ours[:, x.shape[1] :] == 0).all()


@pytest.mark.parametrize("poison", [0.0, 3e38, *POISON])
def test_rows_of_nearly_equal_lengths_take_one_call_unless_a_mask_could_not_hide_the_rest(poison):
    q, k, v, options = inputs({"seqlens_k": [35, 40, 38], "causal": True}, 2, 40, B=3)
    for b, n in enumerate(options["seqlens_k"].tolist()):
        k[b, n:] = v[b, n:] = poison
    assert attention_cpu.mask_is_faster(q, k, v, options["seqlens_k"].tolist()) == (poison == 0)
    expected = attention(q.double(), k.double(), v.double(), **options, backend="reference")
    out = attention(q, k, v, **options, backend="torch")
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


AT_ONCE = {  # rows or documents that one call computes, with what a mask hides between them
    "documents": {"cu_seqlens": [0, 3, 3, 20, 35]},
    "causal documents": {"cu_seqlens": [0, 1, 12, 35], "causal": True},
    "lengths": {"seqlens_k": [18, 35, 1]},
    "fewer queries": {"seqlens_k": [18, 35, 30], "T": 7},
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", AT_ONCE)
def test_rows_at_once_give_what_a_call_for_each_row_gives(name, has_bias, monkeypatch):
    options = dict(AT_ONCE[name])
    if has_bias and "seqlens_k" in options:
        pytest.skip("a bias counts distances from the end of each row: one call for each")
    T, B = options.pop("T", 35), len(options.get("seqlens_k", [0]))
    q, k, v, options = inputs(options, T, 35, B=B, H=4, G=2)
    leaves = [q, k, v] + ([torch.randn(4, 71)] if has_bias else [])
    found, decisions, decide = [], [], attention_cpu.at_once_is_faster
    for rule in (lambda *shapes: decisions.append(decide(*shapes)) or decisions[-1], lambda *shapes: False):
        monkeypatch.setattr(attention_cpu, "at_once_is_faster", rule)
        of_run = [x.clone().requires_grad_() for x in leaves]
        bias = {"bias": of_run[3]} if has_bias else {}
        out = attention(*of_run[:3], **options, **bias, backend="torch")
        out.square().sum().backward()
        found.append([out, *(x.grad for x in of_run)])
    assert decisions == [True]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)  # float32, sums over 35 keys


def test_autocast_around_the_backward_pass_of_short_rows_changes_nothing(monkeypatch):
    monkeypatch.setattr(attention_cpu, "onednn_multiplies", lambda: True)
    inputs_on_cpu, grads = [x.cpu() for x in inputs({}, 20, 20)[:3]], []
    assert attention_cpu.applies(*inputs_on_cpu[:2])
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs_on_cpu]
        out = attention(*leaves, causal=True, backend="torch")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out.backward(inputs_on_cpu[0])
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_large_magnitudes():
    q, k, v, _ = inputs({}, 20, 20)
    out = attention(300 * q, 300 * k, v, causal=True, backend="triton")  # scores of order 1e5
    exact = attention(300 * q.double(), 300 * k.double(), v.double(), causal=True, backend="reference")
    # Scores of 1e5 have errors of 1e-2 in float32, and weights of nearly equal scores errors of a percent.
    assert (out.double() - exact).abs().max() < 0.05 and out.isfinite().all()


def test_every_run_gives_the_same_bits():
    q, k, v, _ = inputs({}, 35, 35)
    first, second = (
        [attention(*leaves, causal=True, backend="triton"), *leaves]
        for leaves in ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
    )
    for run in (first, second):
        run[0].square().sum().backward()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(first[1:], second[1:], strict=True))


def test_memory_is_linear_in_the_length(peak_memory):
    """The most memory allocated at once in forward and backward, gradients included."""

    def peak(T, backend):
        leaves = [x.requires_grad_() for x in inputs({}, T, T, H=2, G=1)[:3]]
        return peak_memory(lambda: attention(*leaves, causal=True, backend=backend).sum().backward())

    assert peak(160, "triton") < 2.1 * peak(80, "triton")
    assert peak(160, "reference") > 3 * peak(80, "reference")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_nothing_in_nothing_out(backend):
    for shape in ({"T": 0, "S": 0}, {"T": 3, "S": 0}, {"B": 0}, {"B": 0, "lengths": []}, {"documents": [0]}):
        lists = {"seqlens_k": shape.pop("lengths", None), "cu_seqlens": shape.pop("documents", None)}
        options = {key: values for key, values in lists.items() if values is not None}
        shape |= {"T": 0, "S": 0} if "cu_seqlens" in options else {}
        q, k, v, options = inputs(options, **shape)
        q.requires_grad_()
        out = attention(q, k, v, **options, backend=backend)
        out.sum().backward()
        assert out.shape == q.shape and (out == 0).all() and (q.grad == 0).all()


# --- the registered operation


def test_the_operation_keeps_its_contract():
    q, k, v, _ = inputs({}, 9, 9, H=2)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, True, 4, None, 0.25, None, None)
    library.opcheck(torch.ops.plinth.attention.default, arguments)
    documents = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    arguments = (q[:1], k[:1], v[:1], True, None, 30.0, 0.25, documents, None)
    library.opcheck(torch.ops.plinth.attention.default, arguments)


def test_it_compiles_as_one_graph():
    def layer(q, k, v):
        return attention(q * 2, k, v, causal=True, backend="triton").square().sum()

    q, k, v, _ = inputs({}, 9, 9, H=2)
    grads = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_numbers_of_queries_and_keys_may_both_vary_in_one_graph():
    """As a prefix language model and a cache vary them: after the second call torch.compile has symbols for
    them, and T == S then is one too."""
    torch._dynamo.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for T, S in ((5, 11), (6, 12), (7, 13), (8, 8)):
        for options in ({"causal": True}, {"causal": True, "window": 4}):
            q, k, v, _ = inputs({}, T, S)
            expected = attention(q, k, v, **options, backend="reference")
            out = run(q, k, v, **options, backend="torch")
            torch.testing.assert_close(out, expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_autocast(backend):
    """Autocast computes in the lower precision, and gradients have the dtype of the inputs."""
    q, k, v, _ = inputs({}, 9, 9)
    q.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = attention(q, k, v, causal=True, backend=backend)
    out.float().sum().backward()
    assert out.dtype == torch.float16 and q.grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), by_hand(q, k, v, causal=True), atol=4e-3, rtol=0)


# --- errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "tritn"}, "tritn"),
        ({"window": 0}, "window 0"),
        ({"scale": -1.0}, "scale -1"),
        ({"softcap": 0.0}, "softcap 0.0"),
        ({"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)}, "one packed row"),
    ],
)
def test_impossible_choices_say_why(change, message):
    q, k, v, _ = inputs({})
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **change)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    "values", [[0, 5, 8], [3, 5, 11], [0, 10, 5, 11], [0, 12], [-1, 11], [0], [], [[0, 11]], [0.0, 11.0]]
)
def test_documents_that_do_not_fill_the_row_are_refused(values, backend):
    q, k, v, _ = (x.cpu() if x is not None else x for x in (*inputs({}, B=1)[:3], None))
    with pytest.raises(ValueError, match=r"attention: cu_seqlens .*: expected (ascending|integers)"):
        attention(q, k, v, cu_seqlens=torch.tensor(values), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("values", [[3, 12], [-1, 3], [3], [3, 4, 5], [[3], [4]], [3.0, 4.0], [True, True]])
def test_lengths_that_do_not_fit_the_cache_are_refused(values, backend):
    q, k, v = (x.cpu() for x in inputs({})[:3])
    with pytest.raises(
        ValueError, match=r"attention: seqlens_k .*: expected (numbers from 0 to S = 11|integers \(2,\))"
    ):
        attention(q, k, v, seqlens_k=torch.tensor(values), backend=backend)


@pytest.mark.parametrize(
    "name, values", [("cu_seqlens", [[3, 5], [0, 90], [9, 2, 11]]), ("seqlens_k", [[-5], [99]])]
)
def test_the_kernels_read_nothing_else_whatever_the_lengths(name, values):
    """On a GPU they are not checked. Around q, k and v there are NaN, and every result is finite."""
    T, options = 11, {"cu_seqlens": None, "seqlens_k": None}
    memory = torch.full((3 * T, 6, 16), math.nan, device=DEVICE)
    q, k, v = (memory[None, T : 2 * T, 2 * i : 2 * i + 2] for i in range(3))
    memory[T : 2 * T] = torch.randn(T, 6, 16, generator=torch.Generator().manual_seed(0))
    for wrong in values:
        masks = options | {name: torch.tensor(wrong, device=DEVICE)}
        options_in_order = True, None, None, 0.25, masks["cu_seqlens"], masks["seqlens_k"]
        out, lse = flash_attention.forward(q, k, v, *options_in_order)
        grads = flash_backward.backward(q, q, k, v, out, lse, *options_in_order)
        assert all(x.isfinite().all() for x in (out, lse, *grads)), wrong


def test_no_lengths_are_read_on_a_gpu():
    """Tensors without contents stand for those of a GPU, for whose values a check would wait."""
    with FakeTensorMode():
        q = torch.empty(1, 11, 2, 16, device="cuda")
        ends, one = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (3, 1))
        check = partial(import_module("kernels.attention")._check, q, q, q, None, None, None)
        check(ends, None)
        check(None, one)
        with pytest.raises(ValueError, match=r"on cpu: expected integers .* on cuda"):
            check(None, torch.tensor([3]))


def test_shapes_that_do_not_fit_say_so():
    q, k, v, _ = inputs({})
    with pytest.raises(ValueError, match="multiple of G"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="one float dtype"):
        attention(q, k.half(), v)
    for not_fitting in ((q[0], k, v), (q, k[0], v[0]), (q, k[:, :, :0], v[:, :, :0]), (q, k, v[:, :5])):
        with pytest.raises(ValueError, match=r"expected q \(B, T, H, K\)"):
            attention(*not_fitting)
    with pytest.raises(ValueError, match=r"expected q \(B, T, H, K\)"):
        attention(q[..., :0], k[..., :0], v[..., :0])
    with pytest.raises(ValueError, match="float dtype"):
        attention(q.long(), k.long(), v.long(), backend="reference")
    for x in (q[..., :12], q.double()):
        with pytest.raises(ValueError, match="head width"):
            attention(x, x, x, backend="triton")


# --- on a GPU; a rehearsal has one head width


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("K", [16, 64, 80, 128, 256] if DEVICE == "cuda" else [16])
@pytest.mark.parametrize(
    "names", [(), *((name,) for name in FEATURES if name not in ("width 24", "float16"))]
)
def test_on_a_gpu(names, K, dtype):
    """Large tiles, lengths that are no multiple of them, every dtype."""
    S = 1111 if DEVICE == "cuda" else 37
    wanted = {"T": S, "S": S, "H": 8 if DEVICE == "cuda" else 2, "G": 2, "K": K, "dtype": dtype}
    for name in names:
        wanted |= FEATURES[name]
    wanted["T"] = S * 2 // 3 if "T not S" in names else S
    options = {key: wanted.pop(key) for key in list(wanted) if key not in SHAPE}
    long = {"window": S // 4, "cu_seqlens": [0, 3, 3, S // 2, S], "seqlens_k": [S // 2, S]}
    options = {key: long.get(key, value) for key, value in options.items()}
    q, k, v, options = inputs(options, **wanted)
    assert_as_exact_as_plain(q, k, v, options)


@pytest.mark.gpu
def test_long_on_a_gpu():
    """The last rows of a long sequence equal attention of these rows alone, in float64 and in decoding."""
    T, H, dtype = (8192, 64, torch.bfloat16) if DEVICE == "cuda" else (300, 2, torch.float16)
    q, k, v, _ = inputs({}, T, T, 64, H, H, dtype)
    out = attention(q, k, v, causal=True, backend="triton")
    last = attention(q[:, -100:].double(), k.double(), v.double(), causal=True, backend="reference")
    assert (out[:, -100:].double() - last).norm() / last.norm() < 4 * torch.finfo(dtype).eps
    assert flash_decoding.applies(q[:, -1:], k)
    tokens = attention(q[:, -1:], k, v, causal=True, backend="triton")
    assert (tokens.double() - last[:, -1:]).norm() / last[:, -1:].norm() < 4 * torch.finfo(dtype).eps


def test_queries_before_the_first_key_give_zeros_in_blocks_too(monkeypatch):
    """With more queries than keys, whole blocks of queries lie before the first key."""
    q, (k, v) = torch.randn(1, 60, 1, 8), torch.randn(2, 1, 20, 1, 8)
    expected = attention(q, k, v, causal=True, window=3, backend="reference")
    module = import_module("kernels.attention")
    monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(module, "BLOCK", 5)
    out = attention(q, k, v, causal=True, window=3, backend="torch")
    assert (out[:, :40] == 0).all() and (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("options", [{"window": 3}, {"window": 4, "seqlens_k": [1, 3]}], ids=["", "lengths"])
def test_a_window_wider_than_the_keys_still_hides_them_from_queries_far_before(options, backend):
    q, k, v, options = inputs(options, T=9, S=3)
    out = attention(q, k, v, **options, backend=backend)
    torch.testing.assert_close(out.double(), by_hand(q, k, v, **options), atol=1e-5, rtol=0)


@pytest.mark.parametrize("T, window", [(30, 3), (30, 7), (9, 4)])
def test_a_window_in_blocks_of_queries_is_the_same(T, window, monkeypatch):
    """As a CPU computes it for long rows, also of fewer queries than keys, and with a bias."""
    module = import_module("kernels.attention")
    q = torch.randn(2, T, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 30, 2, 8, dtype=torch.float64)
    bias = torch.randn(4, 9, dtype=torch.float64)
    expected = [attention(q, k, v, causal=True, window=window, bias=b) for b in (None, bias)]
    monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(module, "BLOCK", 4)
    longest, real = [], module._torch
    monkeypatch.setattr(module, "_torch", lambda *a: (longest.append(a[1].shape[1]), real(*a))[1])
    for b, exact in zip((None, bias), expected, strict=True):
        out = attention(q, k, v, causal=True, window=window, bias=b)
        assert (out - exact).abs().max() < 1e-12
    assert sorted(longest)[-3] < 2 * max(window, 4)  # all but the two calls with all keys
