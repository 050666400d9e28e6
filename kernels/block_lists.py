"""Who chose which block: the lists by which the kernels of selected attention find their queries.

An entry is one of the n blocks of one choice: there are E = B T C n, numbered as in blocks (B, T, C, n).
Sorted by key, which is the row of the batch, the key head and the block in one number, the entries of each
block stand beside each other. The GPU is never waited for: how long the lists are stays in its memory.

Shapes: B batch, T query length, S key length, G key heads, C choices per token, h heads of a choice,
n selected blocks, K head width.
"""

import math

import torch
from torch import Tensor


def cleaned(blocks: Tensor, block_size: int, S: int, seqlens_k: Tensor | None) -> tuple[Tensor, int]:
    """Return the blocks (B, T, C, n) as int32 in ascending order, and their number n_blocks, which also
    stands for one that selects nothing, that is there twice, or that begins after the query."""
    T, n_blocks = blocks.shape[1], -(-S // block_size)
    end = torch.full((1,), S, device=blocks.device) if seqlens_k is None else seqlens_k.clamp(max=S)
    p = end[:, None] - T + torch.arange(T, device=blocks.device)  # (B or 1, T)
    blocks = blocks.long().sort(dim=-1).values
    twice = torch.zeros_like(blocks, dtype=torch.bool)
    twice[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    unseen = twice | (blocks < 0) | (blocks * block_size > p[..., None, None])
    return blocks.masked_fill(unseen, n_blocks).int(), n_blocks


def lists_of(blocks: Tensor, n_blocks: int, G: int) -> tuple[Tensor, Tensor]:
    """Return order (E,), the entries sorted by row of the batch, key head and block, and starts, where those
    of each of these B G (n_blocks + 1) keys begin."""
    B, _, C, _ = blocks.shape
    b, c = (torch.arange(n, device=blocks.device) for n in (B, C))
    bg = b[:, None, None, None] * G + (c // (C // G))[:, None]  # (B, 1, C, 1)
    key, order = (bg * (n_blocks + 1) + blocks).flatten().sort(stable=True)
    every = torch.arange(B * G * (n_blocks + 1) + 1, device=blocks.device)
    return order.int(), torch.searchsorted(key, every).int()


def segments(starts: Tensor, n_blocks: int, E: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return owner (R,) and begin (R,), the key and the first entry of every part of at most `length` entries
    of a list, -1 for no part, and ends, the parts up to the last of each key. R is the most there can be."""
    counts = (starts[1:] - starts[:-1]).view(-1, n_blocks + 1)
    n_parts = (counts + length - 1) // length
    n_parts[:, -1] = 0  # of what selects nothing
    n_parts = n_parts.flatten()
    ends = n_parts.cumsum(0)
    part = torch.arange(E // length + len(ends), device=starts.device)
    owner = torch.searchsorted(ends, part, right=True)
    own = owner.clamp(max=len(ends) - 1)
    begin = starts[own] + (part - (ends - n_parts)[own]) * length
    return owner.masked_fill(owner == len(ends), -1).int(), begin.int(), ends.int()


def merged(parts: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return out, like q, and lse (B, T, H) of the parts (B, T, C, n, h, K) and their lse (B, T, C, n, h)."""
    most = lse.amax(3, keepdim=True)
    share = torch.exp2(lse - most.masked_fill(most == -math.inf, 0))
    total = share.sum(3)  # (B, T, C, h)
    out = torch.einsum("btcnh,btcnhk->btchk", share / total.masked_fill(total == 0, 1)[:, :, :, None], parts)
    return out.reshape(q.shape).to(q.dtype), (most[:, :, :, 0] + total.log2()).reshape(q.shape[:3])
