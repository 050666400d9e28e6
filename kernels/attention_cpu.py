"""Attention of short rows on a CPU where oneDNN multiplies float32 matrices: one product for all heads.

PyTorch's own attention multiplies the small matrices of one head at a time. oneDNN, which engine/cpu.py turns
on because it is faster at the large products of a model, is several times slower at such small ones. So here
one batched product takes all N = B H heads, for BLOCK queries at a time:

    p   = softmax(scale q k^T + bias)         out = p v
    dv  = p^T dout                            ds  = p (dp - sum_j p_j dp_j),  dp = dout v^T
    dq  = scale ds k                          dk  = scale ds^T q              dbias = sums of ds's diagonals

The weights p are kept for the backward pass. They take O(T S) memory, so PyTorch's own operation computes
rows of more than SHORT keys. With a causal mask a block of queries leaves out the keys after its last query,
so that about half of the scores are never computed.

Inputs in bfloat16 or float16 are converted to float32 first: oneDNN is slower at these products in bfloat16.

Which library multiplies is a setting of PyTorch, for the whole process: see `onednn_multiplies`.

Shapes: B batch, T query length, S key length, H query heads, G key/value heads, K head width, N = B H.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, library

from kernels.backend import refuse_second_derivative, transformed

SHORT = 768  # the largest number of keys for which the weights are kept
BLOCK = 128  # queries per block


def onednn_multiplies() -> bool:
    """Return True if PyTorch gives float32 matrix products on a CPU to oneDNN.

    PyTorch does so after torch.set_float32_matmul_precision("medium"), which engine/cpu.py calls where oneDNN
    still computes in float32. This one setting of PyTorch decides how fast the products below are, so it is
    read here directly: a second switch of our own could contradict it.
    """
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


# torch.compile cannot trace the setting; with this mark it takes the value at the time of compiling as a
# constant. torch.compiler.assume_constant_result would set the mark too, but importing it takes 2 seconds.
onednn_multiplies._dynamo_marked_constant = True


def applies(q: Tensor, k: Tensor) -> bool:
    """Return True if `attend` computes the same as PyTorch's own attention in less time, for q (B, T, H, K)
    and k (B, S, G, K)."""
    return q.shape[1] > 1 and k.shape[1] <= SHORT and _possible(q) and onednn_multiplies()


def _possible(q: Tensor) -> bool:
    """Return True if `attend` computes for q the same as PyTorch's own attention."""
    return q.device.type == "cpu" and q.dtype != torch.float64 and not transformed()


def at_once_is_faster(q: Tensor, shapes: list[tuple[int, int]], T: int, S: int) -> bool:
    """Return True if one call of `attend` for all rows, each padded to T queries and S keys, takes less time
    than a call for each. shapes: the queries and keys of each row without padding. q: (B, T, H, K).

    As measured, forward and backward: a call takes as long as 200,000 multiplications of numbers or more.
    Rows of more than BLOCK keys gain nothing.
    """
    more = len(shapes) * T * S - sum(t * s for t, s in shapes)  # scores of the padding
    worth = len(shapes) > 1 and more * q.shape[2] * q.shape[3] <= 200_000 * len(shapes)
    return worth and S <= BLOCK and _possible(q)


def mask_is_faster(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> bool:
    """Return True if one call of PyTorch's attention for all rows, with a mask over the keys after the end of
    each, is possible and takes less time than a call for each row. lengths: the keys of each row.

    A call takes as long as about 40,000 multiplications of numbers.
    """
    T, S, width = q.shape[1], k.shape[1], q.shape[2] * q.shape[3]
    least = min(lengths, default=0)
    if least < T or (len(lengths) * S - sum(lengths)) * T * width > 40_000 * len(lengths):
        return False
    # Masked keys enter the products too: NaN, or numbers so large that scores overflow, would reach the sum.
    return least == S or all(bool(x[:, least:].abs().amax() < 1e10) for x in (k, v))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the attention of q (B, T, H, K) over k and v (B, S, G, K), like q.

    causal: only with T = S. bias: None, or (H, T + S - 1), from `attention.bias_by_distance`. lengths: None,
    or (B,), each at least 1: row b sees only its first lengths[b] keys, and the others have to be finite.
    """
    B, H, dtype, n_shared = q.shape[0], q.shape[2], q.dtype, q.shape[2] // k.shape[2]
    if n_shared > 1:
        k, v = (x.repeat_interleave(n_shared, dim=2) for x in (k, v))  # (B, S, H, K)
    heads = (x.transpose(1, 2).flatten(0, 1).float() for x in (q, k, v))  # (B H, T or S, K)
    hidden = None
    if lengths is not None:
        missing = torch.arange(k.shape[1], device=q.device) >= lengths[:, None]
        hidden = torch.zeros_like(missing, dtype=torch.float32).masked_fill(missing, -math.inf)
    out, _ = _all_heads(*heads, causal, scale, None if bias is None else bias.float(), hidden)
    return out.to(dtype).unflatten(0, (B, H)).transpose(1, 2)  # (B, T, H, K)


def attend_documents(q, k, v, sizes: list[int], causal: bool, scale: float, bias=None) -> Tensor:
    """Return the attention, like q, within documents that lie one after another in q (1, T, H, K) and in k
    and v (1, T, G, K). One call of `attend` computes all, each padded to the length L of the longest.

    sizes: the tokens of each document, T in total. bias: None, or (H, 2 L - 1), as for `attend`.
    """
    lengths = torch.tensor([n for n in sizes if n])
    ends, L = lengths.cumsum(0), int(lengths.max())
    exists = torch.arange(L) < lengths[:, None]  # (N, L)
    index = (torch.arange(L) + (ends - lengths)[:, None]).where(exists, 0)

    def rows(x: Tensor) -> Tensor:
        x = x[0].flatten(1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])  # (N, L, H, K)
        return x.masked_fill(~exists[..., None, None], 0)

    out = attend(rows(q), rows(k), rows(v), causal, scale, bias, lengths)
    return out.flatten(0, 1).index_select(0, exists.flatten().nonzero().flatten())[None]


def _n_weights(T: int, S: int, causal: bool) -> int:
    """Return how many weights `_blocks` needs for one head."""
    n_whole, rest = T // BLOCK, T % BLOCK
    return BLOCK * BLOCK * n_whole * (n_whole + 1) // 2 + rest * T if causal else T * S


def _blocks(weights: Tensor, q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each block of queries, the keys that it sees, and its part of weights as (N, queries, keys).

    A causal block sees the keys up to its last query. The caller masks those after each query's own position.
    """
    (N, T, _), S, end = q.shape, k.shape[1], 0
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        shape = N, stop - start, stop if causal else S
        begin, end = end, end + math.prod(shape)
        yield slice(start, stop), slice(0, shape[2]), weights[begin:end].view(shape)


def toeplitz(by_distance: Tensor, T: int, S: int) -> Tensor:
    """Return matrices (H, T, S) from by_distance (H, T + S - 1): row i is the S numbers from T - 1 - i on, so
    that each diagonal holds one number."""
    return by_distance.unfold(1, S, 1).flip(1)


def _diagonal_sums(matrices: Tensor) -> Tensor:
    """Return (H, T + S - 1), sums along the diagonals of matrices (H, T, S): the gradient of `toeplitz`."""
    H, T, S = matrices.shape
    return torch.ops.aten.unfold_backward(matrices.flip(1), [H, T + S - 1], 1, S, 1)


def _distances(rows: slice, seen: slice, T: int) -> slice:
    """Return which of the T + S - 1 distances a block of queries and the keys that it sees have."""
    return slice(T - rows.stop, T - rows.start + seen.stop - 1)


@library.custom_op("plinth::attention_all_heads", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _all_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention of q (N, T, K) over k and v (N, S, K) in float32, and the weights, flat, as
    `_blocks` divides them. hidden: None, or (B, S), 0 where a row sees the key and -inf elsewhere."""
    N, T, _ = q.shape
    out, weights = torch.empty_like(q), q.new_empty(N * _n_weights(T, k.shape[1], causal))
    q, later = q * scale, torch.full((BLOCK, BLOCK), -math.inf).triu(1)
    for rows, seen, p in _blocks(weights, q, k, causal):
        torch.bmm(q[:, rows], k[:, seen].mT, out=p)
        if bias is not None:
            p.unflatten(0, (-1, len(bias))).add_(toeplitz(bias[:, _distances(rows, seen, T)], *p.shape[1:]))
        if hidden is not None:
            p.view(len(hidden), -1, p.shape[2]).add_(hidden[:, None, seen])
        if causal:
            # The last keys of a block are its own queries: a square with later keys above the diagonal.
            n = p.shape[1]
            p[:, :, rows] += later[:n, :n]
        torch.softmax(p, dim=-1, out=p)
        torch.bmm(p, v[:, seen], out=out[:, rows])
    return out, weights


@_all_heads.register_fake
def _(q, k, v, causal, scale, bias=None, hidden=None):
    return torch.empty_like(q), q.new_empty(q.shape[0] * _n_weights(q.shape[1], k.shape[1], causal))


@library.custom_op("plinth::attention_all_heads_backward", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _all_heads_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    causal: bool,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias), like q, k, v and bias, from the gradient of out and the weights of
    `_all_heads`. Without a bias, dbias is empty."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbias = q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    for rows, seen, p in _blocks(weights, q, k, causal):
        dv[:, seen].baddbmm_(p.mT, dout[:, rows])
        dp = dout[:, rows] @ v[:, seen].mT
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp))
        torch.bmm(dscores, k[:, seen], out=dq[:, rows])
        dk[:, seen].baddbmm_(dscores.mT, q[:, rows])
        if bias is not None:
            all_rows = dscores.unflatten(0, (-1, len(bias))).sum(0)  # (H, queries, keys)
            dbias[:, _distances(rows, seen, q.shape[1])] += _diagonal_sums(all_rows)
    return dq.mul_(scale), dk.mul_(scale), dv, dbias


@_all_heads_backward.register_fake
def _(dout, q, k, v, weights, causal, scale, bias=None):
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _save(ctx, inputs, output):
    *qkv, ctx.causal, ctx.scale, bias, _ = inputs
    ctx.save_for_backward(*qkv, output[1], bias)
    ctx.set_materialize_grads(False)  # the weights get no gradient: pass None, not a tensor of zeros


def _backward(ctx, dout, _):
    *saved, bias = ctx.saved_tensors
    dq, dk, dv, dbias = _all_heads_backward(dout, *saved, ctx.causal, ctx.scale, bias)
    return dq, dk, dv, None, None, None if bias is None else dbias, None


_all_heads.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("attention", _all_heads_backward)
