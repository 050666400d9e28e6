"""Shared by the kernels of flash attention: how they load tiles, which keys a query sees, their arguments.

With every mask of kernels/attention.py query i sees one interval of keys, [low_i, high_i), and both ends grow
with i. So a tile of queries sees the keys from low of its first query to high of its last: keys outside are
never read. Between low of its last query and high of its first, every query sees every key: these tiles of
keys need no mask.

Kernels take their run-time arguments one by one; the functions that they call, which Triton inlines, take
them in the groups below. Names in capitals are constants of the compiled kernel, or letters of shapes.

Shapes: B batch, T query length, S key length, H query heads, G key/value heads, K head width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import configs
from kernels.backend import TensorDescriptor, architecture, block_width, precision, tl, triton


class Rows(NamedTuple):
    """A tensor (B, T, H, K) in a kernel that uses pointers instead of tensor descriptors."""

    pointer: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any


class Constants(NamedTuple):
    """The constants that are fixed when a kernel is compiled: one argument, of type tl.constexpr."""

    K: int  # head width
    BLOCK_K: int  # the same, rounded up to a power of two
    GROUP: int = 1  # query heads per key/value head
    CAUSAL: bool = False
    WINDOWED: bool = False
    SOFTCAP: float | None = None
    PRECISION: str = "ieee"  # of products of float32 tiles
    LENGTHS: bool = False  # rows have fewer keys than S
    TMA: bool = False  # tiles are loaded through tensor descriptors
    BLOCK_M: int = 0  # queries per tile
    BLOCK_N: int = 0  # keys per tile
    PERSISTENT: bool = False  # these three are explained in configs.py
    INTERLEAVED: bool = False
    SPECIALIZED: bool = False
    BIASED: bool = False  # the scores have a bias


class Masks(NamedTuple):
    """The keys that the queries see; the tensors are None where their mask is not used."""

    seqlens_k: Any  # (B,), how many keys of each row exist
    doc_start: Any  # (T,), where the document of each position begins
    doc_end: Any  # (T,), where it ends
    n_queries: Any  # T
    n_keys: Any  # S
    window: Any


class Bias(NamedTuple):
    """The bias of the scores: see `with_bias`. Both are None where there is none."""

    table: Any  # (H, 2 R + 1), float32
    reach: Any  # R


@triton.jit
def load_rows(x, b, start, h, T, ROWS: tl.constexpr, INSIDE: tl.constexpr, const: tl.constexpr):
    """Return x[b, start : start + ROWS, h] as (ROWS, BLOCK_K), with zeros after row T and column K.

    INSIDE: no row of the tile comes after row T.
    """
    if const.TMA:
        tile = x.load([b, h, start, 0]).reshape(ROWS, const.BLOCK_K)
    else:
        t, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
        row = x.pointer + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
        pointers = row + t.to(tl.int64) * x.stride_t + column
        if INSIDE and const.K == const.BLOCK_K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(t < T) & (column < const.K), other=0.0)
    return tile


@triton.jit
def store_rows(x, tile, b, start, h, T, ROWS: tl.constexpr, const: tl.constexpr):
    """Store a tile (ROWS, BLOCK_K) to x[b, start : start + ROWS, h], except after row T and column K."""
    t, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
    row = x.pointer + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
    pointers = row + t.to(tl.int64) * x.stride_t + column
    tl.store(pointers, tile.to(x.pointer.dtype.element_ty), mask=(t < T) & (column < const.K))


@triton.jit
def keys_of_row(b, masks):
    """Return how many keys row b has, and the position of its first query."""
    n_keys = masks.n_keys
    if masks.seqlens_k is not None:
        # Limited to S: a wrong length gives wrong numbers, but no wrong addresses.
        n_keys = tl.minimum(tl.load(masks.seqlens_k + b).to(tl.int32), n_keys)
    return n_keys, n_keys - masks.n_queries


@triton.jit
def keys_seen(i, offset, n_keys, masks, const: tl.constexpr):
    """Return the interval [low, high) of keys that query i sees, in a row of n_keys keys."""
    p = i + offset  # its position
    low, high = p * 0, p * 0 + n_keys
    if const.WINDOWED:
        low = tl.maximum(p - masks.window + 1, 0)
    if const.CAUSAL:
        high = tl.minimum(p + 1, n_keys)
    elif const.WINDOWED:
        high = tl.minimum(p + masks.window, n_keys)
    if masks.doc_start is not None:
        low, high = (
            tl.maximum(low, tl.load(masks.doc_start + i)),
            tl.minimum(high, tl.load(masks.doc_end + i)),
        )
    return low, tl.maximum(high, 0)


@triton.jit
def with_bias(qk, distance, h, bias, scale):
    """Return (s, c): s * c is log2(e) (scale qk + bias[h, R + r]), the score in base 2, with r the distance
    j - p of key and query, limited to -R and R. h: a head, or the head of each row.

    A tile reads its biases by their distances, from the cache: the T x S biases are nowhere in memory.
    """
    r = tl.minimum(tl.maximum(distance, -bias.reach), bias.reach)
    value = tl.load(bias.table + (h * (2 * bias.reach + 1) + bias.reach + r))
    return (qk * scale + value) * 1.4426950408889634, 1.0


# --- on the host


def tiles(q: Tensor) -> tuple[configs.Attention, configs.Attention, configs.Attention]:
    """Return the configurations of the forward pass, of dk and dv, and of dq, for inputs like q."""
    return configs.attention(architecture(q), q.shape[3], q.element_size())


def configured(const: Constants, config: configs.Attention) -> tuple[Constants, dict]:
    """Return the constants with the tiles of a configuration, and the options with which to launch it."""
    const = const._replace(
        BLOCK_M=config.queries, BLOCK_N=config.keys, TMA=const.TMA and config.tma,
        PERSISTENT=config.persistent > 0, INTERLEAVED=config.interleaved, SPECIALIZED=config.specialized,
    )  # fmt: skip
    return const, dict(num_warps=config.warps, num_stages=config.stages)


def uses_tma(q: Tensor) -> bool:
    """Return True if tiles are loaded by the tensor memory accelerator (TMA) of Hopper and later GPUs.

    It copies whole tiles and saves the registers that hold addresses.
    """
    arch = architecture(q)
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def packed(x: Tensor) -> Tensor:
    """Return x, or a copy if its layout does not fit the kernels.

    They need rows without gaps, and, for TMA, every other stride a positive multiple of 16 bytes.
    """
    steps = [step * x.element_size() for step, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if fits else x.contiguous()


def as_rows(x: Tensor, n_rows: int, tma: bool, n_columns: int | None = None) -> "Rows | TensorDescriptor":
    """Return x (B, T, H, K), packed, as `load_rows` takes it: with tma a tensor descriptor of tiles of n_rows
    rows and n_columns columns (None: all), else a pointer with strides."""
    B, T, H, K = x.shape
    # A dimension of size 1 may have any stride, also one that TMA does not take.
    strides = [step if n > 1 else K for step, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    if not tma:
        return Rows(x, *strides)
    # Heads come before rows: a tile then is the last two dimensions, which TMA copies in one piece.
    strides = [strides[0], strides[2], strides[1], 1]
    return TensorDescriptor(x, [B, H, T, K], strides, [1, 1, n_rows, n_columns or block_width(K)])


def arguments(
    q, k, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias=None
) -> tuple[dict, Constants]:
    """Return the keyword arguments that all kernels of a call take, and their constants, which have no tile
    sizes yet: see `configured`. The options are those of `kernels.attention`."""
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    doc_start = doc_end = None
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(T, device=q.device), cu_seqlens[1:-1], right=True)
        doc_start, doc_end = cu_seqlens[document], cu_seqlens[document + 1]  # of each position, (T,)
    if seqlens_k is not None:
        seqlens_k = seqlens_k.contiguous()
    windowed = window is not None and window < max(T, S)
    shared = dict(seqlens_k=seqlens_k, doc_start=doc_start, doc_end=doc_end, T=T, S=S, H=H, scale=scale)
    shared |= dict(window=window if windowed else 0, enable_fp_fusion=True, bias=None, reach=None)
    const = Constants(
        K, block_width(K), H // G, causal, windowed, softcap, precision(q), seqlens_k is not None, uses_tma(q)
    )
    if bias is not None:
        shared |= dict(bias=bias.float().contiguous(), reach=bias.shape[1] // 2)
        const = const._replace(BIASED=True)
    return shared, const
