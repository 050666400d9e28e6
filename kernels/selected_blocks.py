"""Attention over selected blocks in Triton: a program reads only the blocks that its queries selected.

The equation is that of selected_attention.py. A row is one head of one query; the h = H / C heads that share
a choice are rows beside each other. A program multiplies a tile of rows with the keys of a block, and tensor
cores multiply at least 16 rows at a time. There are two ways to fill a tile:

    by query    the h heads of one choice are a tile, which goes through the n blocks of the choice with the
                online softmax of flash_attention.py. This is used for h >= 8, as in native sparse attention
                (16 heads)
    by block    the rows of all queries that selected the same block are gathered to tiles. Each tile reads
                its block once, and writes its part of every row; the n parts of a row are added at the end
                with their shares of the softmax, as in flash_decoding.py. This is used for h < 8, as in
                mixture of block attention (one head). The parts take n times the memory of the result in
                float32

How many queries selected a block is in the memory of the GPU, and to read it on the CPU means to wait. So as
many programs start as any choices could need, and a program without a tile ends at once. There are no atomic
additions, so every run gives the same bits. selected_backward.py computes the gradient.

Native sparse attention (Yuan et al. 2025, section 3.4); MoBA (Lu et al. 2025, algorithm 1).

Shapes: B batch, T query length, S key length, H query heads, G key heads, C choices per token, h heads of a
choice, n selected blocks, N keys of a block, E = B T C n entries, R parts of lists, K head width. An entry is
one of the n blocks of one choice: entry e belongs to choice e // n.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import block_lists, configs
from kernels.backend import architecture, block_width, on_device, precision, tl, triton
from kernels.flash_tiles import as_rows, load_rows, packed, uses_tma

FEW_HEADS = 8  # heads of a choice; with fewer, tiles are filled by block


class Constants(NamedTuple):
    """The constants that are fixed when a kernel is compiled: one argument, of type tl.constexpr."""

    K: int  # head width
    BLOCK_K: int  # K rounded up to a power of two
    PRECISION: str  # how float32 tiles are multiplied: see `backend.precision`
    TMA: bool  # True: keys and values are loaded by the tensor memory accelerator
    LENGTHS: bool  # True: rows of the batch may have fewer keys than S
    HEADS: int  # h
    PAD: int  # h, rounded up to a power of two, or by query to the rows of a tile
    SELECTED: int  # n
    KEYS: int  # N
    BLOCK_M: int  # rows of a tile
    BLOCK_N: int  # keys of a tile
    BY_QUERY: bool


class Sizes(NamedTuple):
    """The sizes of a call. seqlens_k: how many keys each row of the batch has, (B,), or None for S."""

    T: Any
    S: Any
    C: Any
    G: Any
    n_blocks: Any
    seqlens_k: Any


class Tile(NamedTuple):
    """A tile of rows, and which keys it is multiplied by."""

    entry: Any  # (BLOCK_M,), the entry of each row; by query the first of the choice
    row: Any  # (BLOCK_M,), the row among all B T H
    exists: Any  # (BLOCK_M,), False where the tile has no more rows
    p: Any  # (BLOCK_M,), the position of the query; -1 where there is no row
    b: Any  # row of the batch
    g: Any  # key head
    n_keys: Any  # keys of row b of the batch
    block: Any  # by block: the block of all rows


@triton.jit
def tile_at(entry, head, exists, bg, block, sizes, const: tl.constexpr):
    """Return the Tile of the rows (entry, head), each (BLOCK_M,), of key head g in row b of the batch; bg:
    b G + g."""
    b, g = bg // sizes.G, bg % sizes.G
    n_keys = sizes.S
    if const.LENGTHS:
        n_keys = tl.minimum(tl.load(sizes.seqlens_k + b).to(tl.int32), n_keys)
    choice = entry // const.SELECTED
    p = tl.where(exists, n_keys - sizes.T + choice // sizes.C % sizes.T, -1)
    return Tile(entry, choice.to(tl.int64) * const.HEADS + head, exists, p, b, g, n_keys, block)


@triton.jit
def gathered(order, begin, end, number, sizes, const: tl.constexpr):
    """Return the Tile of the entries order[begin:end], as far as they fit. number: that of their list."""
    i, head = begin + tl.arange(0, const.BLOCK_M) // const.PAD, tl.arange(0, const.BLOCK_M) % const.PAD
    exists = (i < end) & (head < const.HEADS)
    entry = tl.load(order + i, mask=exists, other=0)
    bg, block = number // (sizes.n_blocks + 1), number % (sizes.n_blocks + 1)
    return tile_at(entry, head, exists, bg, block, sizes, const)


@triton.jit
def tile_of_program(lists, sizes, const: tl.constexpr):
    """Return the Tile of this program, and how many blocks it reads."""
    program = tl.program_id(0)
    if const.BY_QUERY:
        head = tl.arange(0, const.BLOCK_M)
        b, c = program // (sizes.T * sizes.C), program % sizes.C
        bg = b * sizes.G + c // (sizes.C // sizes.G)
        entry = head * 0 + program * const.SELECTED  # the same for all heads
        tile = tile_at(entry, head, head < const.HEADS, bg, 0, sizes, const)
        n_read = const.SELECTED + 0 * program  # a scalar tensor, as in the other branch
    else:
        number = tl.load(lists.owner + program)
        begin = tl.load(lists.begin + program)
        end = tl.minimum(begin + const.BLOCK_M // const.PAD, tl.load(lists.starts + number + 1))
        end = tl.where(number < 0, 0, end)
        tile = gathered(lists.order, begin, end, tl.maximum(number, 0), sizes, const)
        n_read = tl.where(number < 0, 0, 1)  # more programs start than there are tiles
    return tile, n_read


@triton.jit
def keys_of_step(step, tile, blocks, const: tl.constexpr):
    """Return the first key of a step through the blocks of a tile, and the key after the last of its block.
    An entry that selects nothing is block n_blocks, which begins after the last key: none of it is read.

    blocks: from `block_lists.cleaned`.
    """
    per_block: tl.constexpr = (const.KEYS + const.BLOCK_N - 1) // const.BLOCK_N
    block = tile.block
    if const.BY_QUERY:
        block = tl.load(blocks + tl.program_id(0) * const.SELECTED + step // per_block)
    end = tl.minimum((block + 1) * const.KEYS, tile.n_keys)
    return block * const.KEYS + step % per_block * const.BLOCK_N, end


@triton.jit
def load_keys(x, b, g, start, end, const: tl.constexpr):
    """Return the keys or values from `start` on, (BLOCK_N, BLOCK_K), with zeros from the key `end` on, where
    memory may hold NaN."""
    tile = load_rows(x, b, start, g, end, const.BLOCK_N, False, const)
    if const.TMA and const.LENGTHS:
        tile = tl.where(start + tl.arange(0, const.BLOCK_N)[:, None] < end, tile, 0.0)
    return tile


@triton.jit
def load_queries(x, tile, const: tl.constexpr):
    """Return the rows (BLOCK_M, BLOCK_K) of a Tile from a contiguous x (B, T, H, K)."""
    column = tl.arange(0, const.BLOCK_K)[None, :]
    mask = tile.exists[:, None] & (column < const.K)
    return tl.load(x + tile.row[:, None] * const.K + column, mask=mask, other=0.0)


@triton.jit
def store_part(x, values, tile, const: tl.constexpr):
    """Store values (BLOCK_M, BLOCK_K) to the rows of x (B, T, H, K) or, by block, to its parts (E, h, K)."""
    row, column = place_of(tile, const)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
    mask = tile.exists[:, None] & (column < const.K)
    tl.store(x + row * const.K + column, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def place_of(tile, const: tl.constexpr):
    """Return where the rows of a tile are stored, (BLOCK_M,): in B T H rows or, by block, in E h parts."""
    if const.BY_QUERY:
        place = tile.row
    else:
        head = tl.arange(0, const.BLOCK_M) % const.PAD
        place = tile.entry.to(tl.int64) * const.HEADS + head
    return place


class Lists(NamedTuple):
    """The entries by block; see block_lists.py."""

    order: Any  # (E,)
    starts: Any  # (B G (n_blocks + 1) + 1,)
    owner: Any  # (R,)
    begin: Any  # (R,)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, blocks, order, starts, owner, begin, seqlens_k, T, S, C, G, n_blocks, scale,
    const: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of one tile of rows or, by block, its part of them. The arguments from `order` to
    `begin` are those of Lists, then those of Sizes."""
    BLOCK_M: tl.constexpr = const.BLOCK_M
    BLOCK_K: tl.constexpr = const.BLOCK_K
    sizes = Sizes(T, S, C, G, n_blocks, seqlens_k)
    tile, n_read = tile_of_program(Lists(order, starts, owner, begin), sizes, const)
    q_tile = load_queries(q, tile, const)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(0, n_read * tl.cdiv(const.KEYS, const.BLOCK_N)):
        start, end = keys_of_step(step, tile, blocks, const)
        j = start + tl.arange(0, const.BLOCK_N)[None, :]
        k_tile = load_keys(k, tile.b, tile.g, start, end, const)
        # The scores are in base 2: the number is log2(e).
        s = tl.dot(q_tile, k_tile.T, input_precision=const.PRECISION) * (scale * 1.4426950408889634)
        s = tl.where((j <= tile.p[:, None]) & (j < end), s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen yet: -inf - -inf would be NaN
        weights = tl.math.exp2(s - base[:, None])
        correction = tl.math.exp2(m - base)
        l = l * correction + tl.sum(weights, 1)
        v_tile = load_keys(v, tile.b, tile.g, start, end, const)
        acc *= correction[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=const.PRECISION)
        m = m_new

    # A row that sees no key has l = 0: its result is 0, and its lse -inf.
    some = tl.where(l > 0, l, 1.0)
    store_part(out, acc / some[:, None], tile, const)
    tl.store(lse + place_of(tile, const), m + tl.math.log2(some), mask=tile.exists)


# --- on the host


def shared_arguments(q: Tensor, k: Tensor, blocks: Tensor, block_size: int, scale: float, seqlens_k):
    """Return the blocks from `block_lists.cleaned`, and the arguments and the constants of all kernels, the
    latter still without tiles."""
    (T, H, K), (S, G), (C, n) = q.shape[1:], k.shape[1:3], blocks.shape[2:]
    blocks, n_blocks = block_lists.cleaned(blocks, block_size, S, seqlens_k)
    if seqlens_k is not None:
        seqlens_k = seqlens_k.contiguous()
    sizes = dict(seqlens_k=seqlens_k, T=T, S=S, C=C, G=G, n_blocks=n_blocks, scale=scale)
    const = Constants(
        K, block_width(K), precision(q), uses_tma(q), seqlens_k is not None, H // C,
        triton.next_power_of_2(H // C), n, block_size, 0, 0, False,
    )  # fmt: skip
    return blocks.contiguous(), sizes | {"enable_fp_fusion": True}, const


def configured(const: Constants, config: configs.Attention, by_query: bool) -> tuple[Constants, dict]:
    """Return the constants with the tiles of a configuration, and the options of the launch."""
    rows = max(16, const.PAD) if by_query else max(config.queries, const.PAD)
    const = const._replace(
        PAD=rows if by_query else const.PAD, BLOCK_M=rows, TMA=const.TMA and config.tma, BY_QUERY=by_query,
        BLOCK_N=min(config.keys, block_width(const.KEYS)),
    )  # fmt: skip
    return const, dict(num_warps=config.warps, num_stages=config.stages)


def programs_of(blocks: Tensor, G: int, n_blocks: int, const: Constants) -> tuple[int, tuple]:
    """Return how many programs compute tiles of rows, and their arguments blocks, order, starts, owner and
    begin. By query all but blocks are None."""
    if const.BY_QUERY:
        return blocks.numel() // const.SELECTED, (blocks, *[None] * 4)
    order, starts = block_lists.lists_of(blocks, n_blocks, G)
    owner, begin, _ = block_lists.segments(starts, n_blocks, len(order), const.BLOCK_M // const.PAD)
    return len(owner), (blocks, order, starts, owner, begin)


def by_query(q: Tensor, blocks: Tensor) -> bool:
    """Return True if tiles are filled by query, False if by block."""
    return q.shape[2] // blocks.shape[2] >= FEW_HEADS


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float, seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out (B, T, H, K) of `selected_attention`, like q, and lse (B, T, H), float32, in base 2."""
    B, T, H, K = q.shape
    q, k, v, direct = q.contiguous(), packed(k), packed(v), by_query(q, blocks)
    blocks, sizes, const = shared_arguments(q, k, blocks, block_size, scale, seqlens_k)
    const, launch = configured(
        const, configs.selected(architecture(q), K, q.element_size(), direct)[0], direct
    )
    programs, walk = programs_of(blocks, k.shape[2], sizes["n_blocks"], const)
    if direct:
        out, lse = q.new_empty(q.shape), q.new_empty(B, T, H, dtype=torch.float32)
    else:  # no program writes the parts of entries that select nothing: their share of the softmax is 0
        out = q.new_zeros(*blocks.shape, H // blocks.shape[2], K, dtype=torch.float32)
        lse = q.new_full(out.shape[:-1], -math.inf, dtype=torch.float32)
    with on_device(q):
        keys = [as_rows(x, const.BLOCK_N, const.TMA) for x in (k, v)]
        forward_kernel[(programs,)](q, *keys, out, lse, *walk, const=const, **launch, **sizes)
    return (out, lse) if direct else block_lists.merged(out, lse, q)
