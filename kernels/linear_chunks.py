"""Linear attention in Triton: the states between the chunks one after the other, then all chunks at once.

With the equations of linear_attention.py, for a chunk of tokens i, j = 0 ... c - 1 and the state S before it:

    states    S' = exp(-r c) S + sum_j exp(-r (c - 1 - j)) k_j v_j^T           S' goes to the next chunk
    output    o_i = exp(-r (i + 1)) S^T q_i + sum_(j <= i) exp(-r (i - j)) (q_i . k_j) v_j

The gradient has the same two passes. Let E be the gradient of S' and do that of o. E goes through the chunks
from the last to the first. Its equation is the first one with q for k, do for v, and exp(-r (i + 1)) for
exp(-r (c - 1 - j)):

    states    E' = exp(-r c) E + sum_i exp(-r (i + 1)) q_i do_i^T               E' goes to the chunk before
    output    dq_i = exp(-r (i + 1)) S do_i          + sum_(j <= i) exp(-r (i - j)) (do_i . v_j) k_j
              dk_j = exp(-r (c - 1 - j)) E v_j       + sum_(i >= j) exp(-r (i - j)) (do_i . v_j) q_i
              dv_j = exp(-r (c - 1 - j)) E^T k_j     + sum_(i >= j) exp(-r (i - j)) (q_i . k_j) do_i

Why two passes. One pass would read every tensor once, but compute all products of a head one after the
other, in B H programs. At T = 64k a batch often is one row of 16 to 64 heads, too few programs for the 132
multiprocessors of an H200. With two passes only one product per chunk waits for the chunk before it. The
first pass has a program for each tile of the state, of `columns` x `columns` numbers: (K / columns)^2 B H
programs. The second has one for each chunk and head: N B H programs. The price: k and v are read twice, and a
state of K x K numbers per chunk is written and read. With chunks of K tokens all states together are as large
as q. The backward pass computes the states again instead of keeping them.

The first pass adds up in float32. The states that the second reads have the dtype of the inputs, in which the
tensor cores multiply them. The chunks are those of Lightning Attention-2 (Qin et al. 2024); Mamba-2 (Dao and
Gu 2024, section 6) and flash-linear-attention also use two passes. There are no atomic additions, so every
run gives the same bits.

Shapes: B batch, T tokens, H heads, K head width, N chunks of c tokens (CHUNK; the last chunk may have fewer).
"""

from typing import NamedTuple

from torch import Tensor

from kernels import configs
from kernels.backend import architecture, block_width, on_device, precision, tl, triton
from kernels.flash_tiles import as_rows, packed, uses_tma


class Constants(NamedTuple):
    """The constants that are fixed when a kernel is compiled: one argument, of type tl.constexpr."""

    K: int  # head width
    BLOCK_K: int  # K rounded up to a power of two
    CHUNK: int  # tokens of a chunk
    COLUMNS: int  # rows and columns of a tile of the state
    PRECISION: str  # how float32 tiles are multiplied: see `backend.precision`
    TMA: bool  # True: tiles are loaded by the tensor memory accelerator


@triton.jit
def load(x, b, start, h, column, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, const: tl.constexpr):
    """Return x[b, start : start + ROWS, h, column : column + COLUMNS] of x (B, T, H, K), with zeros from row
    `end` and from column K on. x: from `as_rows`."""
    if const.TMA:
        tile = x.load([b, h, start, column]).reshape(ROWS, COLUMNS)
    else:
        i, j = start + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        row = x.pointer + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h
        tile = tl.load(row + i.to(tl.int64) * x.stride_t + j, mask=(i < end) & (j < const.K), other=0.0)
    return tile


@triton.jit
def store(x, tile, bh, start, T, H, const: tl.constexpr):
    """Store a tile (CHUNK, BLOCK_K) to x[b, start :, h] of a contiguous x (B, T, H, K); bh: b H + h."""
    i, j = start + tl.arange(0, const.CHUNK)[:, None], tl.arange(0, const.BLOCK_K)[None, :]
    row = ((bh // H).to(tl.int64) * T + i) * H + bh % H
    tl.store(x + row * const.K + j, tile.to(x.dtype.element_ty), mask=(i < T) & (j < const.K))


@triton.jit
def decays(rate, CHUNK: tl.constexpr):
    """Return (CHUNK, CHUNK): exp(-r (i - j)) for j <= i, else 0."""
    distance = tl.arange(0, CHUNK)[:, None] - tl.arange(0, CHUNK)[None, :]
    return tl.where(distance >= 0, tl.exp(-rate * tl.maximum(distance, 0)), 0.0)


@triton.jit
def states_kernel(k, v, rates, first, states, last, T, H, N, REVERSED: tl.constexpr, const: tl.constexpr):
    """Compute one tile of the states S before the chunks of one head, and of the state `last` after them,
    from the state `first`. With REVERSED, k and v are q and do, and the states are E, from the last chunk to
    the first.

    first, last: (B, H, K, K). states: (B, H, N K, K), the states of the N chunks below each other.
    """
    COLUMNS: tl.constexpr = const.COLUMNS
    CHUNK: tl.constexpr = const.CHUNK
    K: tl.constexpr = const.K
    n_columns: tl.constexpr = const.BLOCK_K // COLUMNS
    tile, bh = tl.program_id(0) % (n_columns * n_columns), tl.program_id(0) // (n_columns * n_columns)
    b, h = bh // H, bh % H
    row, column = tile // n_columns * COLUMNS, tile % n_columns * COLUMNS
    i, j = row + tl.arange(0, COLUMNS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    at, inside = i * K + j, (i < K) & (j < K)
    rate = tl.load(rates + h)
    state = tl.load(first + bh.to(tl.int64) * K * K + at, mask=inside, other=0.0)

    for step in range(0, N):
        n = N - 1 - step if REVERSED else step
        place = (bh.to(tl.int64) * N + n) * K * K
        tl.store(states + place + at, state.to(states.dtype.element_ty), mask=inside)
        # In the last chunk, tokens after the end are loaded as zeros. Their distance is clamped, so that its
        # power of exp(-r) is finite.
        length = tl.minimum(CHUNK, T - n * CHUNK)
        token = tl.arange(0, CHUNK)
        distance = token + 1 if REVERSED else tl.maximum(length - 1 - token, 0)
        k_tile = load(k, b, n * CHUNK, h, row, T, CHUNK, COLUMNS, const)
        v_tile = load(v, b, n * CHUNK, h, column, T, CHUNK, COLUMNS, const)
        decayed = (k_tile * tl.exp(-rate * distance)[:, None]).to(v_tile.dtype)
        state = tl.dot(decayed.T, v_tile, state * tl.exp(-rate * length), input_precision=const.PRECISION)
    tl.store(last + bh.to(tl.int64) * K * K + at, state, mask=inside)


@triton.jit
def output_kernel(q, k, v, rates, states, out, T, H, N, const: tl.constexpr):
    """Compute o of one chunk of one head. states: S before every chunk, (B, H, N K, K)."""
    CHUNK: tl.constexpr = const.CHUNK
    BLOCK_K: tl.constexpr = const.BLOCK_K
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    b, h, start = bh // H, bh % H, n * CHUNK
    rate = tl.load(rates + h)
    q_tile = load(q, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    k_tile = load(k, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    v_tile = load(v, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    state = load(states, b, n * const.K, h, 0, (n + 1) * const.K, BLOCK_K, BLOCK_K, const)
    from_start = tl.exp(-rate * (tl.arange(0, CHUNK) + 1))[:, None]
    scores = tl.dot(q_tile, k_tile.T, input_precision=const.PRECISION) * decays(rate, CHUNK)
    o = tl.dot(q_tile, state, input_precision=const.PRECISION) * from_start
    o = tl.dot(scores.to(v_tile.dtype), v_tile, o, input_precision=const.PRECISION)
    store(out, o, bh, start, T, H, const)


@triton.jit
def gradient_kernel(
    q, k, v, do, rates, states, ends, dq, dk, dv, T, H, N, const: tl.constexpr
):  # fmt: skip
    """Compute dq, dk and dv of one chunk of one head. states, ends: S before and E after every chunk, each
    (B, H, N K, K)."""
    CHUNK: tl.constexpr = const.CHUNK
    BLOCK_K: tl.constexpr = const.BLOCK_K
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    b, h, start = bh // H, bh % H, n * CHUNK
    rate, token = tl.load(rates + h), tl.arange(0, CHUNK)
    from_start = tl.exp(-rate * (token + 1))[:, None]
    to_end = tl.exp(-rate * tl.maximum(tl.minimum(CHUNK, T - start) - 1 - token, 0))[:, None]
    first, end = n * const.K, (n + 1) * const.K  # rows of the state

    v_tile = load(v, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    do_tile = load(do, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    k_tile = load(k, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    state = load(states, b, first, h, 0, end, BLOCK_K, BLOCK_K, const)
    ds = tl.dot(do_tile, v_tile.T, input_precision=const.PRECISION) * decays(rate, CHUNK)
    ds = ds.to(v_tile.dtype)
    acc = tl.dot(do_tile, state.T, input_precision=const.PRECISION) * from_start
    store(dq, tl.dot(ds, k_tile, acc, input_precision=const.PRECISION), bh, start, T, H, const)

    q_tile = load(q, b, start, h, 0, T, CHUNK, BLOCK_K, const)
    state = load(ends, b, first, h, 0, end, BLOCK_K, BLOCK_K, const)
    acc = tl.dot(v_tile, state.T, input_precision=const.PRECISION) * to_end
    store(dk, tl.dot(ds.T, q_tile, acc, input_precision=const.PRECISION), bh, start, T, H, const)

    scores = tl.dot(q_tile, k_tile.T, input_precision=const.PRECISION) * decays(rate, CHUNK)
    acc = tl.dot(k_tile, state, input_precision=const.PRECISION) * to_end
    acc = tl.dot(scores.to(do_tile.dtype).T, do_tile, acc, input_precision=const.PRECISION)
    store(dv, acc, bh, start, T, H, const)


# --- on the host


def configured(q: Tensor, operation: str) -> tuple[Constants, dict]:
    """Return the constants of the kernels and the options of their launch. operation:
    "linear_attention_forward" or "linear_attention_backward"."""
    K, BLOCK_K = q.shape[3], block_width(q.shape[3])
    config = configs.linear(operation, architecture(q), K, q.element_size())
    # TMA would read rows of the next state where the width is no power of two.
    tma = config.tma and uses_tma(q) and K == BLOCK_K
    const = Constants(K, BLOCK_K, config.chunk, min(config.columns, BLOCK_K), precision(q), tma)
    return const, dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


def states_of(k, v, rates, first, const, launch, reversed_=False) -> tuple[Tensor, Tensor]:
    """Run `states_kernel`: return the states (B, H, N K, K) before the N chunks, in the dtype of k, and the
    state after the last, (B, H, K, K) like `first`."""
    B, T, H, K = k.shape
    N = triton.cdiv(T, const.CHUNK)
    states, last = k.new_empty(B, H, N * K, K), first.new_empty(first.shape)
    tiles = [as_rows(x, const.CHUNK, const.TMA, const.COLUMNS) for x in (k, v)]
    programs = (const.BLOCK_K // const.COLUMNS) ** 2 * B * H
    states_kernel[(programs,)](
        *tiles, rates, first.contiguous(), states, last, T, H, N, REVERSED=reversed_, const=const, **launch
    )
    return states, last


def as_state_rows(states: Tensor, const: Constants):
    """Return states (B, H, N K, K) as `load` needs them, to load one state at a time."""
    return as_rows(states.transpose(1, 2), const.BLOCK_K, const.TMA)


def forward(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, K) of `linear_attention`, like q, and the last state, float32 (B, H, K, K)."""
    B, T, H, _ = q.shape
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out, state.clone()
    q, k, v = packed(q), packed(k), packed(v)
    const, launch = configured(q, "linear_attention_forward")
    N = triton.cdiv(T, const.CHUNK)
    with on_device(q):
        states, last = states_of(k, v, rates, state, const, launch)
        rows = [as_rows(x, const.CHUNK, const.TMA) for x in (q, k, v)]
        of_states = as_state_rows(states, const)
        output_kernel[(N * B * H,)](*rows, rates, of_states, out, T, H, N, const=const, **launch)
    return out, last


def backward(
    do: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dstate), like q, k, v and state, from the gradients do and dlast of the two results
    of `forward`."""
    B, T, H, _ = q.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv, dlast.clone()
    q, k, v, do = packed(q), packed(k), packed(v), packed(do)
    const, launch = configured(q, "linear_attention_backward")
    N = triton.cdiv(T, const.CHUNK)
    with on_device(q):
        states, _ = states_of(k, v, rates, state, const, launch)
        ends, dstate = states_of(q, do, rates, dlast, const, launch, reversed_=True)
        rows = [as_rows(x, const.CHUNK, const.TMA) for x in (q, k, v, do)]
        of_states = [as_state_rows(x, const) for x in (states, ends)]
        gradient_kernel[(N * B * H,)](
            *rows, rates, *of_states, dq, dk, dv, T, H, N, const=const, **launch
        )  # fmt: skip
    return dq, dk, dv, dstate
