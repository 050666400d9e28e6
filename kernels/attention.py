"""Scaled dot-product attention: every query looks at the keys it may see and averages their values.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over the keys j that query i may see

Attention Is All You Need (Vaswani et al. 2017, section 3.2.1). `reference` below is this equation in plain
PyTorch and defines what every other backend must compute; `torch` runs the library's fused operation, or for
short rows on a CPU the blocks of `_all_heads`; `triton` is flash_attention.py with flash_backward.py, and
flash_decoding.py where queries are few and keys many.

Which keys are seen. Query i of T stands at position p = S - T + i of the S keys, so that a single new query
(T = 1) stands at the last key: the causal mask is aligned to the bottom right corner.

    causal        j <= p
    window        |p - j| < window                        (sliding window; Mistral, Jiang et al. 2023)
    cu_seqlens    i and j lie in the same document        (several documents packed into one row)
    seqlens_k     j < seqlens_k[row], and p counts from there (a cache that rows fill to their own lengths)

Grouped-query attention (Ainslie et al. 2023): H query heads share G key/value heads, H / G queries each.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import flash_attention, flash_backward, flash_decoding
from kernels.backend import choose

SHORT, BLOCK = 768, 128  # keys and queries, see `_all_heads`


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of q (B, T, H, K) over k and v (B, S, G, K), H divisible by G; returns (B, T, H, K) like q.

    causal: a query sees no later key. window: it sees only keys nearer than this many positions. softcap:
    scores become softcap * tanh(score / softcap) (Gemma 2, section 2). scale: 1 / sqrt(K) if None.
    cu_seqlens: int32 (n + 1,), 0 = first < ... < last = T: document d is positions cu_seqlens[d] up to
    cu_seqlens[d + 1] of the one row (B = 1, T = S). seqlens_k: integers (B,): only the first seqlens_k[b]
    keys of row b exist, and its queries are the last T of them. A query that may see no key gives zeros.

    backend: as in kernels/backend.py; "triton" takes head widths K up to 256 that are multiples of 8.
    Raises ValueError where shapes, dtypes or options do not fit each other or the backend.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K or H % G:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (B, T, H, K) "
            "and twice (B, S, G, K) with H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one dtype")
    if scale is not None and scale <= 0:
        raise ValueError(f"attention: scale {scale}: expected above 0, or None for 1 / sqrt({K})")
    if window is not None and window < 1:
        raise ValueError(f"attention: window {window}: expected at least 1, which lets a query see itself")
    if cu_seqlens is not None and (B != 1 or T != S or seqlens_k is not None):
        raise ValueError(
            f"attention: cu_seqlens needs one packed row (B 1, T = S, no seqlens_k), not B {B}, T {T}, S {S}"
        )
    fits_triton = K <= 256 and K % 8 == 0 and q.dtype != torch.float64
    asked, backend = backend, choose("attention", backend, q)
    if asked == "auto":
        # Float32 tiles leave Triton too few registers.
        if backend == "triton" and (not fits_triton or (q.dtype == torch.float32 and softcap is None)):
            backend = "torch"
        if backend == "torch" and softcap is not None:
            backend = "reference"
    if backend == "torch" and softcap is not None:
        raise ValueError("attention: backend 'torch' has no softcap; use 'auto' or 'reference'")
    if backend == "reference":
        return _reference(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k)
    if backend == "torch":
        return _torch(q, k, v, causal, window, scale, cu_seqlens, seqlens_k)
    if not fits_triton:
        raise ValueError(
            f"attention: head width {K} in {q.dtype}: backend 'triton' takes multiples of 8 up to 256, in "
            "float16, bfloat16 or float32; use 'torch' or 'reference'"
        )
    scale = scale or 1 / math.sqrt(K)
    return _triton(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k)[0]


def visible(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> Tensor:
    """The mask of the header: bool, True where query i sees key j; (T, S), or (B, 1, T, S) with seqlens_k."""
    j = torch.arange(S, device=device)
    n_keys = torch.tensor(S, device=device) if seqlens_k is None else seqlens_k.view(-1, 1, 1, 1)
    p = n_keys - T + torch.arange(T, device=device)[:, None]  # (T, 1) or (B, 1, T, 1)
    mask = (j < n_keys).expand_as(p - j)
    if causal:
        mask = mask & (j <= p)
    if window is not None:
        mask = mask & ((p - j).abs() < window)
    if cu_seqlens is not None:
        document = torch.bucketize(j, cu_seqlens, right=True)
        mask = mask & (document[:, None] == document)
    return mask


def _reference(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k):
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    k = k.repeat_interleave(H // G, dim=2)  # (B, S, H, K): each key head serves H / G query heads
    v = v.repeat_interleave(H // G, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (scale or 1 / math.sqrt(K))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(T, S, q.device, causal=causal, window=window, cu_seqlens=cu_seqlens, seqlens_k=seqlens_k)
    # Low precision keeps float32 statistics, as every backend does. A row that sees nothing would be 0 / 0.
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1, dtype=wide)
    weights = weights.masked_fill(~mask, 0).to(q.dtype)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def _torch(q, k, v, causal, window, scale, cu_seqlens, seqlens_k):
    B, T, H, K = q.shape
    S = k.shape[1]
    if window is not None and window >= S:
        window = None  # as far as any query can look, so the fast causal path applies
    if cu_seqlens is not None:
        # One call per document never touches the T x T scores between documents.
        parts = [
            _torch(q[:, a:b], k[:, a:b], v[:, a:b], causal, window, scale, None, None)
            for a, b in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=1)
    # PyTorch's own causal flag aligns to the top left corner, so it serves only T = S. The only query of a
    # decoding step is the last, which sees every key.
    square_causal = causal and T == S and T > 1 and window is None and seqlens_k is None
    sees_all = window is None and seqlens_k is None and (not causal or T == 1)
    mask = None
    if not square_causal and not sees_all:
        mask = visible(T, S, q.device, causal=causal, window=window, seqlens_k=seqlens_k)
    short = mask is None and T > 1 and S <= SHORT
    if short and q.device.type == "cpu" and q.dtype != torch.float64 and _by_onednn():
        dtype, n_shared = q.dtype, H // k.shape[2]
        if n_shared > 1:
            k, v = (x.repeat_interleave(n_shared, dim=2) for x in (k, v))
        heads = (x.transpose(1, 2).flatten(0, 1).float() for x in (q, k, v))  # (B H, T or S, K)
        out, _ = _all_heads(*heads, square_causal, scale or 1 / math.sqrt(K))
        return out.to(dtype).unflatten(0, (B, H)).transpose(1, 2)
    with _fastest_first(q):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, T, K)
            k.transpose(1, 2),  # (B, G, S, K)
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=square_causal,
            scale=scale,
            enable_gqa=k.shape[2] != H,
        )
    return out.transpose(1, 2)  # (B, T, H, K)


@torch.compiler.assume_constant_result
def _by_onednn() -> bool:
    """Whether engine/cpu.py has set oneDNN to multiply matrices of float32."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def _n_weights(T: int, S: int, causal: bool) -> int:
    n_whole, rest = T // BLOCK, T % BLOCK
    return BLOCK * BLOCK * n_whole * (n_whole + 1) // 2 + rest * T if causal else T * S


def _blocks(weights: Tensor, q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys that one or another of them may see, and their part of the weights, (N, queries,
    keys)."""
    (N, T, _), S, end = q.shape, k.shape[1], 0
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        shape = N, stop - start, stop if causal else S
        begin, end = end, end + math.prod(shape)
        yield slice(start, stop), slice(0, shape[2]), weights[begin:end].view(shape)


@library.custom_op("plinth::attention_all_heads", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _all_heads(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q (N, T, K) over k and v (N, S, K), N = B H, in float32, by blocks of queries with one
    product for all N: oneDNN is several times slower at the small ones, of single heads, that PyTorch's own
    operation asks it for, and still slower at those in bfloat16. Also returns the weights, for the backward
    pass; long rows would have too many."""
    N, T, _ = q.shape
    out, weights = torch.empty_like(q), q.new_empty(N * _n_weights(T, k.shape[1], causal))
    q, later = q * scale, torch.full((BLOCK, BLOCK), -math.inf).triu(1)
    for rows, seen, p in _blocks(weights, q, k, causal):
        torch.bmm(q[:, rows], k[:, seen].mT, out=p)
        if causal:
            n = p.shape[1]
            p[:, :, rows] += later[:n, :n]
        torch.softmax(p, dim=-1, out=p)
        torch.bmm(p, v[:, seen], out=out[:, rows])
    return out, weights


@_all_heads.register_fake
def _(q, k, v, causal, scale):
    return torch.empty_like(q), q.new_empty(q.shape[0] * _n_weights(q.shape[1], k.shape[1], causal))


@library.custom_op("plinth::attention_all_heads_backward", mutates_args=())
def _all_heads_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen, p in _blocks(weights, q, k, causal):
        dv[:, seen].baddbmm_(p.mT, dout[:, rows])
        dp = dout[:, rows] @ v[:, seen].mT
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp))
        torch.bmm(dscores, k[:, seen], out=dq[:, rows])
        dk[:, seen].baddbmm_(dscores.mT, q[:, rows])
    return dq.mul_(scale), dk.mul_(scale), dv


@_all_heads_backward.register_fake
def _(dout, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_all_heads(ctx, inputs, output):
    *qkv, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*qkv, output[1])
    ctx.set_materialize_grads(False)  # of the weights, whose gradient nobody asks for


def _backward_all_heads(ctx, dout, _):
    return *_all_heads_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_all_heads.register_autograd(_backward_all_heads, setup_context=_save_all_heads)


def _fastest_first(q: Tensor):
    # From Hopper on cuDNN's attention is the faster one, but PyTorch's own order puts FlashAttention-2 first.
    if q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0):
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
    return nullcontext()


@library.custom_op("plinth::attention", mutates_args=())
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    cu_seqlens: Tensor | None,
    seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernels; lse float32 (B, H, T) in base 2, for the backward pass."""
    kernels = flash_decoding if flash_decoding.applies(q, k) else flash_attention
    return kernels.forward(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k)


@_triton.register_fake
def _(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k):
    B, T, H, K = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@library.custom_op("plinth::attention_backward", mutates_args=())
def _triton_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    cu_seqlens: Tensor | None,
    seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return flash_backward.backward(
        dout, q, k, v, out, lse, causal, window, softcap, scale, cu_seqlens, seqlens_k
    )


@_triton_backward.register_fake
def _(dout, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.options, cu_seqlens, seqlens_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seqlens_k)
    ctx.set_materialize_grads(False)  # of lse, whose gradient nobody asks for


def _backward(ctx, dout, _):
    *saved, cu_seqlens, seqlens_k = ctx.saved_tensors
    return *_triton_backward(dout, *saved, *ctx.options, cu_seqlens, seqlens_k), *[None] * 6


_triton.register_autograd(_backward, setup_context=_save)
