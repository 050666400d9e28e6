"""Attention over selected blocks of keys: every query sees the keys of a few blocks, and no others.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over the keys j <= p_i in the blocks of query i

Block b holds the keys from b N to (b + 1) N - 1, and p_i = S - T + i is the position of query i, as in
kernels/attention.py. h = H / C heads share a choice of blocks. In mixture of block attention (Lu et al. 2025)
each head has its own choice, C = H. In native sparse attention (Yuan et al. 2025) the heads that share a key
head also share the choice, C = G. `strongest` makes a choice from scores.

`_reference` below is the equation with a mask, and defines the result. `torch` is the same for short rows.
For long rows it computes the scores of selected blocks alone, block by block: all queries that selected block
b, gathered in tiles of M, are multiplied by its keys in one product,

    s = scale q[rows] k_b^T    m_i = max_j s_ij    p_ij = exp(s_ij - m_i)    l_i = sum_j p_ij    o = p v_b

At the end the n parts of each query are added with their shares of the softmax, as in
kernels/flash_decoding.py. The gradient is computed as in FlashAttention: from the scores, which are computed
again, and lse, the logarithm of the softmax's denominator. Time and memory grow as T n N, and every run gives
the same bits. `triton` is in selected_blocks.py and selected_backward.py.

Shapes: B batch, T query length, S key length, H query heads, G key/value heads, C choices per token, h heads
of a choice, K head width, N keys of a block, n selected blocks, R tiles of M queries.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from kernels.attention import visible, without_missing
from kernels.backend import choose, multiplies, readable, refuse_second_derivative

DENSE = 1 << 20  # up to this many scores T S, attention with a mask is faster than block by block
TILE = 64  # queries of a tile
SEGMENT = 4096  # queries whose scores are in memory at a time


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the attention of q (B, T, H, K) over the selected blocks of k and v (B, S, G, K), like q.

    blocks: integers (B, T, C, n), in any order; C is a multiple of G, and H of C. A number below 0 selects
    nothing, and one that is there twice counts once. scale: 1 / sqrt(K) if None. seqlens_k: integers (B,), 0
    to S. Row b has only its first seqlens_k[b] keys, whatever k and v hold after them, and its queries are
    the last T of these. A query that sees no key gives zeros.

    backend: see kernels/backend.py; "triton" takes head widths up to 256 that are multiples of 8, in float16,
    bfloat16 or float32. Only "reference" has a second derivative.
    Raises ValueError if shapes, dtypes or options contradict each other or the backend cannot compute them;
    on a CPU also if the values of seqlens_k do not fit.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, blocks, block_size, scale, seqlens_k)
    chosen = _choose(backend, q)
    scale = scale or 1 / math.sqrt(q.shape[3])
    if chosen != "triton" and seqlens_k is not None:
        k, v = without_missing(k, v, seqlens_k)
    if chosen == "reference":
        return _reference(q, k, v, blocks, block_size, scale, seqlens_k)
    if chosen == "torch" and q.shape[1] * k.shape[1] <= DENSE:
        return _dense(q, k, v, blocks, block_size, scale, seqlens_k)
    return _operation(q, k, v, blocks, block_size, scale, seqlens_k, chosen)[0]


def _check(q, k, v, blocks, block_size, scale, seqlens_k) -> None:
    """Raise ValueError if shapes, dtypes or options contradict each other."""
    if [x.ndim for x in (q, k, v, blocks)] != [4] * 4:
        raise ValueError(
            f"selected_attention: q, k, v and blocks have {q.ndim}, {k.ndim}, {v.ndim} and {blocks.ndim} "
            "dimensions: expected 4"
        )
    (B, T, H, K), (S, G), C = q.shape, k.shape[1:3], blocks.shape[2]
    if not k.shape == v.shape == (B, S, G, K) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"selected_attention: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v "
            f"{tuple(v.shape)} {v.dtype}: expected q (B, T, H, K) and k, v (B, S, G, K) of one dtype"
        )
    if blocks.shape[:2] != (B, T) or blocks.is_floating_point() or not C or H % C or C % G:
        raise ValueError(
            f"selected_attention: blocks {tuple(blocks.shape)} {blocks.dtype}: expected integers "
            f"({B}, {T}, C, n), with C a multiple of {G} key heads and a divisor of {H} heads"
        )
    if block_size < 1:
        raise ValueError(f"selected_attention: block_size {block_size}: expected at least 1 key")
    if scale is not None and scale <= 0:
        raise ValueError(f"selected_attention: scale {scale}: expected above 0, or None for 1 / sqrt({K})")
    if seqlens_k is not None and (seqlens_k.shape != (B,) or seqlens_k.is_floating_point()):
        raise ValueError(
            f"selected_attention: seqlens_k {tuple(seqlens_k.shape)} {seqlens_k.dtype}: expected integers "
            f"({B},)"
        )
    if seqlens_k is not None and readable(seqlens_k) and not all(0 <= n <= S for n in seqlens_k.tolist()):
        raise ValueError(
            f"selected_attention: seqlens_k {seqlens_k.tolist()}: expected numbers from 0 to S = {S}"
        )


def _choose(backend: str, q: Tensor) -> str:
    """Return the backend that runs. Raise ValueError if it does not exist or cannot compute this."""
    chosen, K = choose("selected_attention", backend, q), q.shape[3]
    fits = K <= 256 and K % 8 == 0 and q.dtype != torch.float64 and multiplies(q)
    if chosen == "triton" and not fits and backend != "auto":
        raise ValueError(
            f"selected_attention: head width {K} in {q.dtype}: backend 'triton' takes multiples of 8 up to "
            "256 in float16, bfloat16 or float32, and in Triton's interpreter no bfloat16; use 'torch' or "
            "'reference'"
        )
    return chosen if fits or chosen == "reference" else "torch"


def strongest(scores: Tensor, n: int) -> Tensor:
    """Return the indices (..., n) of the n largest of scores (..., n_blocks), the largest first; of equal
    scores the earlier one. -1 stands where fewer than n scores are above -inf."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    order = order.masked_fill(values == -math.inf, -1)[..., :n]
    return F.pad(order, (0, n - order.shape[-1]), value=-1)


def selected_keys(blocks: Tensor, block_size: int, S: int, seqlens_k: Tensor | None = None) -> Tensor:
    """Return the mask bool (B, C, T, S) of blocks (B, T, C, n): True where a query sees a key."""
    B, T, C, _ = blocks.shape
    n_blocks = -(-S // block_size)
    # Numbers that select nothing go to one more block, which is then cut off.
    index = torch.where((blocks < 0) | (blocks >= n_blocks), n_blocks, blocks).long()
    chosen = torch.zeros(B, T, C, n_blocks + 1, dtype=torch.bool, device=blocks.device)
    chosen = chosen.scatter(-1, index, True)[..., :n_blocks].transpose(1, 2)  # (B, C, T, n_blocks)
    chosen = chosen.repeat_interleave(block_size, dim=-1)[..., :S]
    return chosen & visible(T, S, blocks.device, causal=True, window=None, seqlens_k=seqlens_k)


def _reference(q, k, v, blocks, block_size, scale, seqlens_k):
    H, G, S = q.shape[2], k.shape[2], k.shape[1]
    mask = selected_keys(blocks, block_size, S, seqlens_k).repeat_interleave(H // blocks.shape[2], dim=1)
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))  # (B, S, H, K)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    # The softmax is in float32 at least. The weights of a query that sees no key are NaN; they become 0.
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1, dtype=wide)
    weights = weights.masked_fill(~mask, 0).to(q.dtype)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def _dense(q, k, v, blocks, block_size, scale, seqlens_k):
    """Return the result of `_reference`, computed by PyTorch's fused attention with a mask."""
    H, G, S = q.shape[2], k.shape[2], k.shape[1]
    mask = selected_keys(blocks, block_size, S, seqlens_k).repeat_interleave(H // blocks.shape[2], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=G != H)
    return out.transpose(1, 2)


# --- block by block in PyTorch


class Tiles(NamedTuple):
    """The queries of each block, in tiles of M; the last tile is empty."""

    rows: Tensor  # (R, M), the query of each row, or T for an empty row
    block: Tensor  # (R,), the block of each tile
    parts: Tensor  # (T, n), for each query and each of its blocks the row, from 0 to R M - 1


def _tiles(blocks: Tensor, n_blocks: int) -> Tiles:
    """Return the tiles of one choice for each of T queries, blocks (T, n)."""
    (T, n), device = blocks.shape, blocks.device
    # A block that is there twice counts once.
    blocks = blocks.long().sort(dim=-1).values
    is_new = F.pad(blocks[:, 1:] != blocks[:, :-1], (1, 0), value=True)
    rows, slots = (is_new & (blocks >= 0) & (blocks < n_blocks)).nonzero(as_tuple=True)

    # Sort by block, and give every block as many tiles as it needs. place: the row of each part.
    block, order = blocks[rows, slots].sort(stable=True)
    rows, slots = rows[order], slots[order]
    counts = torch.bincount(block, minlength=n_blocks)
    n_tiles = (counts + TILE - 1) // TILE
    first_tile, first = n_tiles.cumsum(0) - n_tiles, counts.cumsum(0) - counts
    place = first_tile[block] * TILE + torch.arange(len(block), device=device) - first[block]

    # A part that does not exist is in the last tile, which is empty.
    tiles = torch.full((int(n_tiles.sum()) + 1, TILE), T, device=device)
    tiles.view(-1)[place] = rows
    parts = torch.full((T, n), tiles.numel() - 1, device=device)
    parts[rows, slots] = place
    block = torch.arange(n_blocks, device=device).repeat_interleave(n_tiles)
    return Tiles(tiles, F.pad(block, (0, 1)), parts)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index]. On a CPU this is several times as fast as the brackets."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _scores(q: Tensor, k: Tensor, tiles: Tiles, first: int, scale: float) -> Tensor:
    """Return the scores (R, M h, N) of q (T + 1, h, K) and the blocks k (n_blocks, N, K). The last row of q
    is zeros, for the empty rows of tiles. first: the position of the first query."""
    N, h = k.shape[1], q.shape[1]
    scores = _at(q, tiles.rows).flatten(1, 2) @ _at(k, tiles.block).mT
    j = tiles.block[:, None] * N + torch.arange(N, device=q.device)  # (R, N)
    p = torch.where(tiles.rows == len(q) - 1, -1, tiles.rows + first)  # (R, M)
    unseen = j[:, None, None] > p[:, :, None, None]  # (R, M, 1, N)
    scores.mul_(scale).unflatten(1, (-1, h)).masked_fill_(unseen, -math.inf)
    return scores


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, first: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (T, h, K) and lse (T, h), for arguments as of `_scores`."""
    h, K = q.shape[1:]
    scores = _scores(q, k, tiles, first, scale)
    m = scores.amax(-1, keepdim=True)
    p = scores.sub_(m.masked_fill(m == -math.inf, 0)).exp_()
    parts = _at((p @ _at(v, tiles.block)).view(-1, h, K), tiles.parts)  # (T, n, h, K)
    l, m = (_at(x.reshape(-1, h), tiles.parts) for x in (p.sum(-1), m))  # (T, n, h)

    # Add the parts, each with its share of the softmax.
    most = m.amax(1)
    most = most.masked_fill(most == -math.inf, 0)
    share = torch.exp(m - most[:, None])
    total = (share * l).sum(1)
    out = torch.einsum("tnhk,tnh->thk", parts, share) / total.masked_fill(total == 0, 1)[..., None]
    return out, most + total.log()


def _pairs(q: Tensor, k: Tensor, blocks: Tensor, block_size: int, seqlens_k: Tensor | None):
    """Yield for each row b, each choice and each segment of SEGMENT queries: b, the slice of the queries, the
    slice of the heads that share the choice, their key head, the Tiles, and the position of the first query.
    """
    (B, T, H), (S, G), C = q.shape[:3], k.shape[1:3], blocks.shape[2]
    lengths = [S] * B if seqlens_k is None else seqlens_k.tolist()
    for b, n_keys in enumerate(lengths):
        for c in range(C):
            heads = slice(c * H // C, (c + 1) * H // C)
            for start in range(0, T, SEGMENT):
                queries = slice(start, min(start + SEGMENT, T))
                tiles = _tiles(blocks[b, queries, c], -(-S // block_size))
                yield b, queries, heads, c * G // C, tiles, n_keys - T + start


def _in_blocks(x: Tensor, block_size: int, wide: torch.dtype) -> Tensor:
    """Return x (B, S, G, K) as (B, G, n_blocks, N, K), with zeros after the last key."""
    B, S, G, K = x.shape
    x = F.pad(x.transpose(1, 2).to(wide), (0, 0, 0, -S % block_size))
    return x.reshape(B, G, -1, block_size, K)


def _with_empty_row(x: Tensor, wide: torch.dtype) -> Tensor:
    """Return x (T, h, K) with a row of zeros after it."""
    return F.pad(x.to(wide), (0, 0, 0, 0, 0, 1))


def _by_block(q, k, v, blocks, block_size, scale, seqlens_k) -> tuple[Tensor, Tensor]:
    """Return out, like q, and lse (B, T, H), in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)
    in_blocks = [_in_blocks(x, block_size, wide) for x in (k, v)]
    for b, queries, heads, g, tiles, first in _pairs(q, k, blocks, block_size, seqlens_k):
        part = _with_empty_row(q[b, queries, heads], wide)
        keys, values = (x[b, g] for x in in_blocks)
        out[b, queries, heads], lse[b, queries, heads] = _attend(part, keys, values, tiles, first, scale)
    return out, lse


def _by_block_backward(dout, q, k, v, blocks, out, lse, block_size, scale, seqlens_k):
    """Return (dq, dk, dv), like q, k and v."""
    wide, S = lse.dtype, k.shape[1]
    dq = q.new_empty(q.shape)
    keys, values = (_in_blocks(x, block_size, wide) for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    delta = torch.einsum("bthk,bthk->bth", dout.to(wide), out.to(wide))
    for b, queries, heads, g, tiles, first in _pairs(q, k, blocks, block_size, seqlens_k):
        q_part, dout_part = (_with_empty_row(x[b, queries, heads], wide) for x in (q, dout))
        # lse is -inf for a query that sees no key, whose scores are all -inf.
        base = lse[b, queries, heads].masked_fill(lse[b, queries, heads] == -math.inf, 0)
        base, d = (
            _at(F.pad(x, (0, 0, 0, 1)), tiles.rows).flatten(1)[..., None]  # (R, M h, 1)
            for x in (base, delta[b, queries, heads])
        )

        # The softmax again, and the equations of kernels/flash_backward.py.
        p = _scores(q_part, keys[b, g], tiles, first, scale).sub_(base).exp_()  # (R, M h, N)
        qs, do = (_at(x, tiles.rows).flatten(1, 2) for x in (q_part, dout_part))  # (R, M h, K)
        ds = (do @ _at(values[b, g], tiles.block).mT).sub_(d).mul_(p)
        dv[b, g].index_add_(0, tiles.block, p.mT @ do)
        dk[b, g].index_add_(0, tiles.block, ds.mT @ qs)
        parts = (ds @ _at(keys[b, g], tiles.block)).view(-1, *q_part.shape[1:])
        dq[b, queries, heads] = (scale * _at(parts, tiles.parts).sum(1)).to(q.dtype)
    dk, dv = (x.flatten(2, 3)[:, :, :S].transpose(1, 2) for x in (dk.mul_(scale), dv))
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


# --- the operation


@library.custom_op("plinth::selected_attention", mutates_args=())
def _operation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    scale: float,
    seqlens_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out, like q, and lse (B, T, H) in float32 at least; lse is in base e by the backend "torch", and
    in base 2 by "triton"."""
    if q.numel() == 0 or k.numel() == 0 or blocks.numel() == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -math.inf, dtype=wide)
    if backend == "triton":
        from kernels import selected_blocks  # imported only where Triton runs

        return selected_blocks.forward(q, k, v, blocks, block_size, scale, seqlens_k)
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        return _by_block(q, k, v, blocks, block_size, scale, seqlens_k)


@_operation.register_fake
def _(q, k, v, blocks, block_size, scale, seqlens_k, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@library.custom_op("plinth::selected_attention_backward", mutates_args=())
def _operation_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    seqlens_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), like q, k and v, from the gradient of out and the results of `_operation`."""
    if q.numel() == 0 or k.numel() == 0 or blocks.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    arguments = dout, q, k, v, blocks, out, lse, block_size, scale, seqlens_k
    if backend == "triton":
        from kernels import selected_backward

        return selected_backward.backward(*arguments)
    with torch.autocast(q.device.type, enabled=False):
        return _by_block_backward(*arguments)


@_operation_backward.register_fake
def _(dout, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, blocks, ctx.block_size, ctx.scale, seqlens_k, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, blocks, *output, seqlens_k)
    ctx.set_materialize_grads(False)  # lse gets no gradient: pass None, not a tensor of zeros


def _backward(ctx, dout, _):
    *saved, seqlens_k = ctx.saved_tensors
    grads = _operation_backward(dout, *saved, ctx.block_size, ctx.scale, seqlens_k, ctx.backend)
    return *grads, *[None] * 5


_operation.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("selected_attention", _operation_backward)
