"""Flash decoding: attention of few queries over many keys, as in generation, one token after another.

One program that goes through all keys would keep one multiprocessor busy and leave the others idle. So the
keys are split: each program attends to one part of them and stores (out_s, lse_s). A second kernel adds the
parts, each weighted with its share of the softmax's denominator:

    lse = log2 sum_s 2^lse_s              out = sum_s 2^(lse_s - lse) out_s

The queries of all heads that share their keys form one tile. So keys and values are read once, and reading
them is what decoding spends its time on.

Flash-Decoding for long-context inference (Dao, Haziza, Massa and Sizov 2023).
"""

import torch
from torch import Tensor

from kernels.backend import n_multiprocessors, on_device, tl, triton
from kernels.flash_attention import Keys, attend
from kernels.flash_tiles import Bias, Masks, arguments, as_rows, keys_of_row, keys_seen, packed

MIN_KEYS = 256  # per split: to read fewer takes less time than to start a program
MAX_ROWS = 64  # the most rows of a tile: queries times heads per key/value head
LOADED = 16384  # bytes of keys read at a time: with values, and the next of both, they fill AMD's 64 kB


@triton.jit
def split_kernel(
    q, k, v, part, part_lse, seqlens_k, doc_start, doc_end, T, S, H, window, scale, bias, reach,
    keys_per_split, const: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the keys, for the queries of all heads that share them."""
    BLOCK_M: tl.constexpr = const.BLOCK_M
    BLOCK_K: tl.constexpr = const.BLOCK_K
    masks = Masks(seqlens_k, doc_start, doc_end, T, S, window)
    G = H // const.GROUP
    bg, split = tl.program_id(0), tl.program_id(1)  # CUDA has room for 65,535 programs in the second only
    b, g = bg // G, bg % G
    n_keys, offset = keys_of_row(b, masks)

    # Row i GROUP + (h mod GROUP) of the tile is query i of head h. Of the keys that any of them sees, this
    # program takes those in its split.
    row = tl.arange(0, BLOCK_M)
    exists = row < T * const.GROUP
    i, h = tl.minimum(row // const.GROUP, T - 1), g * const.GROUP + row % const.GROUP
    low, high = keys_seen(i, offset, n_keys, masks, const)
    begin = tl.maximum(split * keys_per_split, tl.min(low) // const.BLOCK_N * const.BLOCK_N)
    end = tl.minimum((split + 1) * keys_per_split, tl.max(high))

    # Load the queries, and continue as in flash_attention.py.
    column = tl.arange(0, BLOCK_K)[None, :]
    mask = exists[:, None] & (column < const.K)
    at = b.to(tl.int64) * q.stride_b + i[:, None] * q.stride_t + h[:, None] * q.stride_h + column
    q_tile = tl.load(q.pointer + at, mask=mask, other=0.0)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    keys = Keys(k, v, n_keys, b, g, low, high, i + offset, h[:, None], Bias(bias, reach))
    acc, m, l = attend(acc, m, l, q_tile, keys, begin, end, scale, True, const)

    # A row that sees no key of this split gets weight 2^-inf = 0 in the sum.
    seen = l > 0
    out = ((split * tl.num_programs(0) // G + b).to(tl.int64) * T + i) * H + h  # of part (splits, B, T, H, K)
    tl.store(part + out[:, None] * const.K + column, acc / tl.where(seen, l, 1.0)[:, None], mask=mask)
    lse = tl.where(seen, m + tl.math.log2(tl.where(seen, l, 1.0)), -float("inf"))
    tl.store(part_lse + out, lse, mask=exists)


@triton.jit
def merge_kernel(
    part, part_lse, out, lse, n_splits, T, H,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row of (B, T, H)."""
    row, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_K)[None, :]
    exists = split < n_splits
    at = split * n_rows + row
    lse_s = tl.load(part_lse + at, mask=exists, other=-float("inf"))
    m = tl.max(lse_s, 0)
    m = tl.where(m == -float("inf"), 0.0, m)  # if no split has seen a key
    weight = tl.math.exp2(lse_s - m)
    total = tl.sum(weight, 0)
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    tile = tl.load(part + at[:, None] * K + column, mask=exists[:, None] & (column < K), other=0.0)
    result = tl.sum(tile * (weight / total)[:, None], 0)
    tl.store(
        out + row * K + tl.arange(0, BLOCK_K), result.to(out.dtype.element_ty), mask=tl.arange(0, BLOCK_K) < K
    )
    b, t, h = row // (T * H), row // H % T, row % H
    tl.store(lse + (b * H + h) * T + t, tl.where(seen, m + tl.math.log2(total), 0.0))


def applies(q: Tensor, k: Tensor) -> bool:
    """Return True if queries are few and keys many, which `forward` needs."""
    T, group = q.shape[1], q.shape[2] // max(k.shape[2], 1)
    return 0 < T * group <= MAX_ROWS and k.shape[1] > MIN_KEYS


def forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Return (out, lse), the same as `flash_attention.forward`, for shapes to which this `applies`."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(B, T, H, K), q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse

    q, k, v = packed(q), packed(k), packed(v)
    shared, const = arguments(q, k, *options)
    # Two programs for each multiprocessor: one computes while the other waits for memory.
    n_splits = min(triton.cdiv(S, MIN_KEYS), triton.cdiv(2 * n_multiprocessors(q.device), B * G))
    M = max(16, triton.next_power_of_2(T * H // G))
    N = min(64, max(16, LOADED // (const.BLOCK_K * q.element_size())))
    keys_per_split = triton.cdiv(triton.cdiv(S, n_splits), N) * N
    n_splits = triton.cdiv(S, keys_per_split)
    part = q.new_empty(n_splits, B, T, H, K, dtype=torch.float32)
    part_lse = q.new_empty(n_splits, B, T, H, dtype=torch.float32)
    with on_device(q):
        split_kernel[(B * G, n_splits)](
            *(as_rows(x, N, False) for x in (q, k, v)), part, part_lse, keys_per_split=keys_per_split,
            const=const._replace(TMA=False, BLOCK_M=M, BLOCK_N=N), num_warps=4, num_stages=2, **shared,
        )  # fmt: skip
        merge_kernel[(B * T * H,)](
            part, part_lse, out, lse, n_splits, T, H,
            K=K, BLOCK_K=const.BLOCK_K, BLOCK_SPLITS=triton.next_power_of_2(n_splits), num_warps=4,
        )  # fmt: skip
    return out, lse
