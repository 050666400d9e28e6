"""Linear attention with a decay: a state of fixed size takes the place of all earlier keys and values.

    S_t = exp(-r) S_(t-1) + k_t v_t^T        o_t = S_t^T q_t        r >= 0, the rate of decay of each head

There is no softmax and no scale: lightning attention (Qin et al. 2024) as in MiniMax-01 (2025, section 2.2).
`_reference` below computes all tokens in parallel, which costs O(T^2), and defines the result. With tokens
i, j = 0 ... T - 1, the state S_0 before the first, and * elementwise:

    o = ((Q K^T) * D) V,  D_ij = exp(-r (i - j)) for j <= i, else 0;    o_i += exp(-r (i + 1)) S_0^T q_i

`torch` and `triton` cost O(T c) with chunks of c tokens. They compute the tokens of a chunk in parallel, and
read all chunks before it from the state that these leave. `torch` is below, `triton` in linear_chunks.py. All
exponents are <= 0, so nothing overflows. The state that goes from chunk to chunk is in float32 at least:
rounded to bfloat16 after each chunk, its errors would add up.

Shapes: B batch, T tokens, H heads, K head width, c tokens of a chunk, N chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, library

from kernels.backend import choose, multiplies, refuse_second_derivative

WIDEST = 128  # head width of the kernels: a tile holds the whole state


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, K), like q, and the state (B, H, K, K) after the last token, for q, k and v
    (B, T, H, K).

    rates: (H,), the rates r, at least 0, in float32 or float64. state: (B, H, K, K), the state before the
    first token; None stands for zeros. To continue a text, as in generation, pass the state that the call
    before returned. Both states are in float32, or float64 for q in float64.
    chunk: tokens of a chunk of the backend "torch"; that of "triton" is in kernels/configs.py.

    backend: see kernels/backend.py; "triton" takes head widths up to 128 that are multiples of 8, in float16,
    bfloat16 or float32. In float16 a state above 65,504 becomes infinite where the kernels read it. "triton"
    has no second derivative, and no gradient of the rates.
    Raises ValueError if shapes, dtypes or options contradict each other or the backend cannot compute them.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, rates, state, chunk)
    backend = _choose(backend, q, v, rates)
    state = _no_state(k, v) if state is None else state
    with torch.autocast(q.device.type, enabled=False):  # it would round the state
        if backend == "reference" or q.numel() == 0:
            return _reference(q, k, v, rates, state)
        if backend == "torch":
            return _chunked(q, k, v, rates, state, chunk)
        return _triton(q, k, v, rates.float().contiguous(), state)


def _check(q, k, v, rates, state, chunk) -> None:
    """Raise ValueError if shapes, dtypes or options contradict each other."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"linear_attention: q, k and v have {q.ndim}, {k.ndim} and {v.ndim} dimensions: expected 4"
        )
    B, _, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"linear_attention: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v "
            f"{tuple(v.shape)} {v.dtype}: expected q, k and v (B, T, H, K) of one dtype"
        )
    if rates.shape != (H,) or rates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"linear_attention: rates {tuple(rates.shape)} {rates.dtype}: expected ({H},), a number for "
            "each head, in float32 or float64"
        )
    wide, shape = torch.promote_types(q.dtype, torch.float32), (B, H, K, v.shape[3])
    if state is not None and (state.shape != shape or state.dtype != wide):
        raise ValueError(
            f"linear_attention: state {tuple(state.shape)} {state.dtype}: expected {shape} in {wide}"
        )
    if chunk < 1:
        raise ValueError(f"linear_attention: chunk {chunk}: expected at least 1 token")


def _choose(backend: str, q: Tensor, v: Tensor, rates: Tensor) -> str:
    """Return the backend that runs. Raise ValueError if it does not exist or cannot compute this."""
    asked, chosen, K = backend, choose("linear_attention", backend, q), q.shape[3]
    fits = K <= WIDEST and K % 8 == 0 and v.shape[3] == K and q.dtype != torch.float64 and multiplies(q)
    # In float32 a tile takes more registers than a program has, so PyTorch's matrix products are faster.
    fast = fits and q.element_size() == 2 and not rates.requires_grad
    if asked == "auto" and chosen == "triton" and not fast:
        return "torch"
    if chosen == "triton" and not fits:
        raise ValueError(
            f"linear_attention: head widths {K} and {v.shape[3]} in {q.dtype}: backend 'triton' takes equal "
            f"multiples of 8 up to {WIDEST} in float16, bfloat16 or float32, and in Triton's interpreter no "
            "bfloat16; use 'torch' or 'reference'"
        )
    if chosen == "triton" and rates.requires_grad:
        raise ValueError(
            "linear_attention: backend 'triton' has no gradient of the rates; use 'torch' or 'reference'"
        )
    return chosen


def _no_state(k: Tensor, v: Tensor) -> Tensor:
    """Return the state before the first token: zeros (B, H, K, K), in float32 at least."""
    B, _, H, K = k.shape
    return k.new_zeros(B, H, K, v.shape[-1], dtype=torch.promote_types(k.dtype, torch.float32))


def _decays(rates: Tensor, n: int) -> Tensor:
    """Return D (H, n, n) of the header for n tokens."""
    i = torch.arange(n, device=rates.device)
    distance = i[:, None] - i
    return torch.exp(-rates[:, None, None] * distance.clamp(min=0)) * (distance >= 0)


def _reference(q, k, v, rates, state):
    T, wide = q.shape[1], state.dtype
    i = torch.arange(T, device=q.device)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * _decays(rates, T).to(q.dtype)
    inside = torch.einsum("bhij,bjhv->bihv", scores, v)
    since = torch.exp(-rates[:, None] * (i + 1)).to(wide)  # (H, T)
    earlier = torch.einsum("bihk,hi,bhkv->bihv", q.to(wide), since, state)
    to_end = torch.exp(-rates[:, None] * (T - 1 - i)).to(wide)
    written = torch.einsum("bjhk,hj,bjhv->bhkv", k.to(wide), to_end, v.to(wide))
    return inside + earlier.to(q.dtype), torch.exp(-rates * T).to(wide)[:, None, None] * state + written


def _chunked(q, k, v, rates, state, chunk):
    B, T, H, K = q.shape
    c = min(chunk, T)
    n = -(-T // c)
    # Put zeros before the first token, so that all chunks are full: they add nothing to a state.
    missing = n * c - T
    q, k, v = (F.pad(x, (0, 0, 0, 0, missing, 0)).view(B, n, c, H, -1) for x in (q, k, v))
    j = torch.arange(c, device=q.device)
    wide = state.dtype

    # Compute what each chunk adds to the state, and then the state before each chunk, in the only loop. A
    # given state does not decay during the zeros of the first chunk.
    to_end = torch.exp(-rates[:, None] * (c - 1 - j)).to(wide)  # (H, c)
    added = torch.einsum("bnjhk,hj,bnjhv->nbhkv", k.to(wide), to_end, v.to(wide))
    before = []
    # Take the parts by unbind: the gradient of each added[i] would be as large as all of added.
    for i, of_chunk in enumerate(added.unbind()):
        before.append(state)
        length = c - missing if i == 0 else c
        state = torch.exp(-rates * length).to(wide)[:, None, None] * state + of_chunk

    # Add what comes from inside each chunk and what comes from the state before it.
    scores = torch.einsum("bnihk,bnjhk->bnhij", q, k) * _decays(rates, c).to(q.dtype)
    inside = torch.einsum("bnhij,bnjhv->bnihv", scores, v)
    since = torch.stack([(j + 1 - missing).clamp(min=0)] + [j + 1] * (n - 1))  # (N, c)
    from_start = torch.exp(-rates[:, None, None] * since).to(wide)  # (H, N, c)
    earlier = torch.einsum("bnihk,hni,nbhkv->bnihv", q.to(wide), from_start, torch.stack(before))
    out = inside + earlier.to(q.dtype)
    return out.reshape(B, n * c, H, -1)[:, missing:], state


@library.custom_op("plinth::linear_attention", mutates_args=())
def _triton(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return o, like q, and the last state, like state: see `linear_attention`."""
    from kernels import linear_chunks  # imported only where Triton runs

    return linear_chunks.forward(q, k, v, rates, state)


@_triton.register_fake
def _(q, k, v, rates, state):
    return q.new_empty(q.shape), state.new_empty(state.shape)


@library.custom_op("plinth::linear_attention_backward", mutates_args=())
def _triton_backward(
    do: Tensor | None,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dstate), like q, k, v and state, from the gradients of o and of the last state."""
    from kernels import linear_chunks

    do = torch.zeros_like(q) if do is None else do
    dlast = torch.zeros_like(state) if dlast is None else dlast
    return linear_chunks.backward(do, dlast, q, k, v, rates, state)


@_triton_backward.register_fake
def _(do, dlast, q, k, v, rates, state):
    return *(x.new_empty(x.shape) for x in (q, k, v)), state.new_empty(state.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)  # most often the last state gets no gradient


def _backward(ctx, do, dlast):
    dq, dk, dv, dstate = _triton_backward(do, dlast, *ctx.saved_tensors)
    return dq, dk, dv, None, dstate


_triton.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("linear_attention", _triton_backward)
