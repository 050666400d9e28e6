"""Lists of the queries that selected each block, for the kernels of attention over selected blocks.

In kernels/selected_attention.py every token makes C choices of n blocks of keys each, and h heads share a
choice. An entry is one block of one choice: the tensor blocks (B, T, C, n) has E = B T C n entries, numbered
in its order. One list holds the entries that selected the same block of the same key head g in the same row b
of the batch. Its number is (b G + g) (n_blocks + 1) + block, where block n_blocks stands for none. Sorted by
list number, the entries of each list are beside each other. The lengths of the lists stay in the memory of
the GPU: to read them on the CPU would mean to wait for the GPU.

Shapes: B batch, T query length, S key length, G key heads, C choices per token, h heads of a choice,
n selected blocks, n_blocks blocks of keys in a row, K head width, E entries, R parts of lists.
"""

import math

import torch
from torch import Tensor


def cleaned(blocks: Tensor, block_size: int, S: int, seqlens_k: Tensor | None) -> tuple[Tensor, int]:
    """Return the blocks (B, T, C, n) as int32 in ascending order, and n_blocks, how many blocks a row has.

    An entry becomes n_blocks, which stands for no block, if it is below 0, repeats the entry before it, or is
    a block that begins after the position of the query.
    """
    T, n_blocks = blocks.shape[1], -(-S // block_size)
    end = torch.full((1,), S, device=blocks.device) if seqlens_k is None else seqlens_k.clamp(max=S)
    p = end[:, None] - T + torch.arange(T, device=blocks.device)  # (B or 1, T)
    blocks = blocks.long().sort(dim=-1).values
    repeated = torch.zeros_like(blocks, dtype=torch.bool)
    repeated[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    unseen = repeated | (blocks < 0) | (blocks * block_size > p[..., None, None])
    return blocks.masked_fill(unseen, n_blocks).int(), n_blocks


def lists_of(blocks: Tensor, n_blocks: int, G: int) -> tuple[Tensor, Tensor]:
    """Return order (E,), the entries of cleaned blocks (B, T, C, n) sorted by list number, and starts
    (B G (n_blocks + 1) + 1,): list i is order[starts[i] : starts[i + 1]]. Both are int32."""
    B, _, C, _ = blocks.shape
    b, c = (torch.arange(n, device=blocks.device) for n in (B, C))
    bg = b[:, None, None, None] * G + (c // (C // G))[:, None]  # (B, 1, C, 1)
    number, order = (bg * (n_blocks + 1) + blocks).flatten().sort(stable=True)
    every = torch.arange(B * G * (n_blocks + 1) + 1, device=blocks.device)
    return order.int(), torch.searchsorted(number, every).int()


def segments(starts: Tensor, n_blocks: int, E: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the lists into parts of at most `length` entries; return int32 owner (R,), begin (R,) and ends.

    owner: the number of each part's list, -1 for no part. begin: where the part begins in the order of
    `lists_of`. ends: for each list, how many parts it and the lists before it have. R is the most parts that
    E entries can make. The list of no block has no parts.
    """
    counts = (starts[1:] - starts[:-1]).view(-1, n_blocks + 1)
    n_parts = (counts + length - 1) // length
    n_parts[:, -1] = 0  # of the list of no block
    n_parts = n_parts.flatten()
    ends = n_parts.cumsum(0)
    part = torch.arange(E // length + len(ends), device=starts.device)
    owner = torch.searchsorted(ends, part, right=True)
    own = owner.clamp(max=len(ends) - 1)
    begin = starts[own] + (part - (ends - n_parts)[own]) * length
    return owner.masked_fill(owner == len(ends), -1).int(), begin.int(), ends.int()


def merged(parts: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return out, like q, and lse (B, T, H), in base 2, from the attention of each query to each of its n
    blocks, parts (B, T, C, n, h, K), and its lse (B, T, C, n, h): the mean of parts with weights 2^lse."""
    most = lse.amax(3, keepdim=True)
    share = torch.exp2(lse - most.masked_fill(most == -math.inf, 0))
    total = share.sum(3)  # (B, T, C, h)
    out = torch.einsum("btcnh,btcnhk->btchk", share / total.masked_fill(total == 0, 1)[:, :, :, None], parts)
    return out.reshape(q.shape).to(q.dtype), (most[:, :, :, 0] + total.log2()).reshape(q.shape[:3])
