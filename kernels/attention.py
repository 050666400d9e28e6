"""Scaled dot-product attention: every query averages the values of the keys that it may see.

    out_i = sum_j softmax_j(scale * q_i . k_j + bias_(j - p_i)) v_j    over the keys j that query i may see

Attention Is All You Need (Vaswani et al. 2017, section 3.2.1). The equation has several backends, of which
kernels/backend.py explains the names. "reference" is the equation in plain PyTorch, `_reference` below, and
defines what the others must compute. "torch" is PyTorch's fused operation, or attention_cpu.py for short rows
on some CPUs. "triton" is flash_attention.py, or flash_decoding.py for few queries over many keys; the
gradients are in flash_backward.py and flash_bias.py.

Which keys a query may see: query i of T has the position p_i = S - T + i among the S keys. So a single new
query (T = 1) has the position of the last key: the causal mask is aligned to the bottom right corner.

    causal        j <= p_i
    window        |p_i - j| < window                      (sliding window; Mistral, Jiang et al. 2023)
    cu_seqlens    i and j lie in the same document        (several documents packed into one row)
    seqlens_k     j < n and p_i = n - T + i, with n = seqlens_k[row]    (a cache whose rows differ in length)

The bias is one number per head and distance r = j - p_i of key and query: a vector of 2 R + 1 numbers per
head, whose ends also hold for all distances below -R and above R. T5 encodes positions by such a bias (Raffel
et al. 2019, section 2.1). The gradient of a number of the bias is the sum of the gradients of the scores that
it was added to: for each distance, a diagonal of the matrix of scores.

Grouped-query attention (Ainslie et al. 2023): H / G query heads share one of the G key/value heads.

Shapes: B batch, T query length, S key length, H query heads, G key/value heads, K head width, R the largest
distance of the bias.
"""

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention_cpu
from kernels.backend import choose, multiplies, readable, refuse_second_derivative

LONG = 1 << 20  # from so many scores T S on, a CPU computes a causal window in blocks of queries
BLOCK = 128  # the fewest queries of such a block


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
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the attention of q (B, T, H, K) over k and v (B, S, G, K), like q; H is a multiple of G.

    causal: a query sees no later key. window: a query sees only the keys nearer than this many positions.
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, section 2). scale: 1 / sqrt(K) if None.
    cu_seqlens: int32 (n + 1,), 0 = first <= ... <= last = T, for a batch of one row with T = S. Document d
    holds the positions from cu_seqlens[d] to cu_seqlens[d + 1] - 1. seqlens_k: integers (B,), 0 to S. Row b
    has only its first seqlens_k[b] keys, whatever k and v hold after them, and its queries have the last T
    positions of these. bias: (H, 2 R + 1), finite, without softcap; bias[h, R + r] is added to the scores of
    head h at distance r, limited to -R and R. A query that sees no key gives zeros.

    backend: see kernels/backend.py; "triton" takes head widths K up to 256 that are multiples of 8. Only
    "reference" has a second derivative.
    Raises ValueError if shapes, dtypes or options contradict each other or the backend cannot compute them;
    on a CPU also if the values of cu_seqlens or seqlens_k do not fit. On a GPU, where a check would wait for
    the GPU, such values give wrong numbers.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, window, softcap, scale, cu_seqlens, seqlens_k)
    if bias is not None:
        _check_bias(bias, q, softcap)
    backend = _choose(backend, q, softcap)
    if backend == "reference":
        return _reference(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias)
    if backend == "torch":
        return _torch(q, k, v, causal, window, scale, cu_seqlens, seqlens_k, bias)
    scale = scale or 1 / math.sqrt(q.shape[3])
    return _triton(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias)[0]


def _check(q, k, v, window, softcap, scale, cu_seqlens, seqlens_k) -> None:
    """Raise ValueError if shapes, dtypes or options contradict each other."""
    B, T, H, K = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    n_rows, S, G, width = k.shape if k.dim() == 4 else (0, 0, 0, 0)
    if k.shape != v.shape or (n_rows, width) != (B, K) or K == 0 or G == 0 or H % G:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected q (B, T, H, K) "
            "and k, v (B, S, G, K), with H a multiple of G"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one float dtype")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap {softcap}: expected above 0, or None for no soft-cap")
    if scale is not None and scale <= 0:
        raise ValueError(f"attention: scale {scale}: expected above 0, or None for 1 / sqrt({K})")
    if window is not None and window < 1:
        raise ValueError(f"attention: window {window}: expected at least 1, so that a query sees itself")
    if cu_seqlens is not None and (B != 1 or T != S or seqlens_k is not None):
        raise ValueError(
            f"attention: B {B}, T {T}, S {S}: cu_seqlens needs one packed row, B = 1 and T = S, no seqlens_k"
        )
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, max(1, cu_seqlens.numel()), q.device)
        if readable(cu_seqlens):
            ends = cu_seqlens.tolist()
            if ends != sorted(ends) or [ends[0], ends[-1]] != [0, T]:
                raise ValueError(f"attention: cu_seqlens {ends}: expected ascending from 0 to T = {T}")
    if seqlens_k is not None:
        _check_integers("seqlens_k", seqlens_k, B, q.device)
        if readable(seqlens_k) and not all(0 <= n <= S for n in seqlens_k.tolist()):
            raise ValueError(f"attention: seqlens_k {seqlens_k.tolist()}: expected numbers from 0 to S = {S}")


def _check_bias(bias: Tensor, q: Tensor, softcap: float | None) -> None:
    """Raise ValueError unless bias has one number per head and distance, fits q, and there is no softcap."""
    shape, H = tuple(bias.shape), q.shape[2]
    if len(shape) != 2 or shape[0] != H or shape[1] < 3 or shape[1] % 2 == 0:
        raise ValueError(f"attention: bias {shape}: expected ({H}, 2 R + 1), with R at least 1")
    if not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(
            f"attention: bias {bias.dtype} on {bias.device}: expected floating-point numbers on {q.device}"
        )
    if softcap is not None:
        raise ValueError("attention: a bias and a softcap do not go together; leave out one of them")


def _check_integers(name: str, x: Tensor, n: int, device: torch.device) -> None:
    """Raise ValueError unless x is n integers on the device."""
    shape = tuple(x.shape)
    if shape != (n,) or x.is_floating_point() or x.dtype == torch.bool or x.device != device:
        raise ValueError(
            f"attention: {name} {shape} {x.dtype} on {x.device}: expected integers ({n},) on {device}"
        )


def _choose(backend: str, q: Tensor, softcap: float | None) -> str:
    """Return the backend that runs. Raise ValueError if it does not exist or cannot compute this."""
    fits_triton = q.shape[3] <= 256 and q.shape[3] % 8 == 0 and q.dtype != torch.float64 and multiplies(q)
    chosen = choose("attention", backend, q)
    if backend == "auto":
        # In float32 a tile takes more registers than a program has, so PyTorch's own operation runs.
        if chosen == "triton" and (not fits_triton or (q.dtype == torch.float32 and softcap is None)):
            chosen = "torch"
        return "reference" if chosen == "torch" and softcap is not None else chosen
    if chosen == "torch" and softcap is not None:
        raise ValueError("attention: backend 'torch' has no softcap; use 'auto' or 'reference'")
    if chosen == "triton" and not multiplies(q):
        raise ValueError(
            "attention: backend 'triton' takes no bfloat16 in Triton's interpreter, which multiplies it "
            "wrongly; use float32, 'torch' or 'reference'"
        )
    if chosen == "triton" and not fits_triton:
        raise ValueError(
            f"attention: head width {q.shape[3]} in {q.dtype}: backend 'triton' takes multiples of 8 up to "
            "256, in float16, bfloat16 or float32; use 'torch' or 'reference'"
        )
    return chosen


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
    """Return the mask at the top of this file: bool (T, S), or (B, 1, T, S) with seqlens_k, True where query
    i sees key j."""
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


def bias_by_distance(bias: Tensor, T: int, S: int) -> Tensor:
    """Return (H, T + S - 1) from bias (H, 2 R + 1): the numbers at the distances -(S - 1) to T - 1, which are
    all that S keys have from the queries of the last T positions."""
    reach = bias.shape[1] // 2
    if max(S, T) <= reach + 1:
        return bias[:, reach + 1 - S : reach + T]
    distance = torch.arange(1 - S, T, device=bias.device)
    return bias[:, distance.clamp(-reach, reach) + reach]


def bias_of_scores(bias: Tensor, T: int, S: int, seqlens_k: Tensor | None = None) -> Tensor:
    """Return the bias of all scores: (1, H, T, S), or (B, H, T, S) with seqlens_k.

    It has four dimensions because with three PyTorch's operation is not fused on a CPU.
    """
    if T * S == 0:
        return bias.new_zeros(1, len(bias), T, S)
    if seqlens_k is None:
        return attention_cpu.toeplitz(bias_by_distance(bias, T, S), T, S)[None]
    reach = bias.shape[1] // 2
    p = seqlens_k.view(-1, 1, 1) - T + torch.arange(T, device=bias.device)[:, None]  # (B, T, 1)
    distance = torch.arange(S, device=bias.device) - p  # (B, T, S)
    return bias[:, distance.clamp(-reach, reach) + reach].transpose(0, 1)


def without_missing(k: Tensor, v: Tensor, seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v (B, S, G, K) with zeros from key seqlens_k[b] on in row b: memory there may hold NaN,
    and a weight of 0 times NaN is NaN."""
    missing = torch.arange(k.shape[1], device=k.device) >= seqlens_k[:, None]  # (B, S)
    return tuple(x.masked_fill(missing[:, :, None, None], 0) for x in (k, v))


def _reference(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias):
    B, T, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if seqlens_k is not None:
        k, v = without_missing(k, v, seqlens_k)
    k = k.repeat_interleave(H // G, dim=2)  # (B, S, H, K): H / G query heads share a key head
    v = v.repeat_interleave(H // G, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (scale or 1 / math.sqrt(K))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias_of_scores(bias, T, S, seqlens_k)
    mask = visible(T, S, q.device, causal=causal, window=window, cu_seqlens=cu_seqlens, seqlens_k=seqlens_k)
    # The softmax is in float32 at least, as in every backend.
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1, dtype=wide)
    # The weights of a query that sees no key are 0 / 0 = NaN; they become 0.
    weights = weights.masked_fill(~mask, 0).to(q.dtype)
    return torch.einsum("bhts,bshk->bthk", weights, v)


def _torch(q, k, v, causal, window, scale, cu_seqlens, seqlens_k, bias):
    T, K, S = q.shape[1], q.shape[3], k.shape[1]
    scale = scale or 1 / math.sqrt(K)
    if cu_seqlens is not None:
        return _documents(q, k, v, causal, window, scale, cu_seqlens, bias)
    # Rows of different lengths: a call for each row reads no key after its end. Where such keys are few, one
    # call for all rows takes less time: that of attention_cpu.py, or PyTorch's with a mask.
    if seqlens_k is not None and readable(seqlens_k):
        lengths = seqlens_k.tolist()
        no_mask = not causal and window is None and bias is None and min(lengths, default=0) > 0
        if no_mask and T > 1 and attention_cpu.at_once_is_faster(q, [(T, n) for n in lengths], T, S):
            k, v = without_missing(k, v, seqlens_k)
            return attention_cpu.attend(q, k, v, False, scale, lengths=seqlens_k)
        if lengths and not attention_cpu.mask_is_faster(q, k, v, lengths):
            rows = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
            rest = causal, window, scale, None, None, bias
            return torch.cat([_torch(q, k[:, :n], v[:, :n], *rest) for q, k, v, n in rows])
    elif seqlens_k is not None:
        k, v = without_missing(k, v, seqlens_k)

    # Make a mask only where one is needed, as PyTorch's operation is faster without one. Its own causal flag
    # is aligned to the top left corner, so it is right only if T = S. A single query has the last position
    # and sees every key.
    if window is not None and window >= max(T, S):
        window = None  # no key is that far from any query
    few_seen = causal and window is not None and 4 * max(window, BLOCK) <= S
    if few_seen and seqlens_k is None and q.device.type == "cpu" and T * S >= LONG:
        return _windows(q, k, v, window, scale, bias)
    square_causal = causal and T == S and T > 1 and window is None and seqlens_k is None
    sees_all = window is None and seqlens_k is None and (not causal or T == 1)
    mask = None
    if not square_causal and not sees_all:
        mask = visible(T, S, q.device, causal=causal, window=window, seqlens_k=seqlens_k)

    if mask is None and attention_cpu.applies(q, k):
        by_distance = None if bias is None else bias_by_distance(bias, T, S)
        return attention_cpu.attend(q, k, v, square_causal, scale, by_distance)
    if bias is not None:
        # PyTorch's operation takes one tensor that is added to the scores: the bias, and -inf for the mask.
        if square_causal:
            mask = visible(T, S, q.device, causal=True, window=None)
        scores_bias = bias_of_scores(bias, T, S, seqlens_k).to(q.dtype)
        mask = scores_bias if mask is None else scores_bias.masked_fill(~mask, -math.inf)
    with _fastest_first(q):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, T, K)
            k.transpose(1, 2),  # (B, G, S, K)
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and T > 1 and mask is None,  # under torch.compile T == S may be a symbol
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return out.transpose(1, 2)  # (B, T, H, K)


def _documents(q, k, v, causal, window, scale, cu_seqlens, bias):
    """Return attention within each document. A call for each document never computes the scores between
    different ones. One call for all takes less time where they are short and of similar lengths."""
    sizes = [b - a for a, b in pairwise(cu_seqlens.tolist())] or [0]  # a row without documents has T = 0
    if window is None and readable(cu_seqlens):
        longest = max(sizes)
        if attention_cpu.at_once_is_faster(q, [(n, n) for n in sizes if n], longest, longest):
            by_distance = None if bias is None else bias_by_distance(bias, longest, longest)
            return attention_cpu.attend_documents(q, k, v, sizes, causal, scale, by_distance)
    # Split all at once: autograd would make the gradient of each slice as large as the whole tensor.
    documents = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
    parts = [_torch(*document, causal, window, scale, None, None, bias) for document in documents]
    return torch.cat(parts, dim=1)


def _windows(q, k, v, window, scale, bias):
    """Return causal attention with a window, a block of queries at a time, each with only the keys that it
    sees: a mask of all scores would take memory in proportion to T S, and scores outside the window time."""
    T, S, n = q.shape[1], k.shape[1], max(window, BLOCK)
    parts, rest = [], (True, window, scale, None, None, bias)
    for start in range(0, T, n):
        end = min(start + n, T)
        # With T > S the first queries have negative positions and see no key.
        seen = slice(max(0, S - T + start - window + 1), max(0, S - T + end))
        parts.append(_torch(q[:, start:end], k[:, seen], v[:, seen], *rest))
    return torch.cat(parts, dim=1)


def _fastest_first(q: Tensor):
    """Return a context in which PyTorch prefers its fastest attention for the device of q."""
    # PyTorch's own order begins with FlashAttention-2. On Hopper and later GPUs cuDNN's attention is faster
    # (Shah et al. 2024, figure 5).
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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out and, for the backward pass, the logarithm in base 2 of the softmax's denominator, lse:
    float32 (B, H, T)."""
    from kernels import flash_attention, flash_decoding  # imported only where they run

    kernels = flash_decoding if flash_decoding.applies(q, k) else flash_attention
    return kernels.forward(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias)


@_triton.register_fake
def _(q, k, v, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias=None):
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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, from that of out, dout, and the results of the forward pass."""
    from kernels import flash_backward

    return flash_backward.backward(
        dout, q, k, v, out, lse, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias
    )


@_triton_backward.register_fake
def _(dout, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@library.custom_op("plinth::attention_bias_gradient", mutates_args=())
def _bias_gradient(
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
    bias: Tensor,
) -> Tensor:
    """Return the gradient of the bias, in its own dtype."""
    from kernels import flash_bias

    return flash_bias.gradient(
        dout, q, k, v, out, lse, causal, window, softcap, scale, cu_seqlens, seqlens_k, bias
    ).to(bias.dtype)


@_bias_gradient.register_fake
def _(*arguments):
    return torch.empty_like(arguments[-1])


def _save(ctx, inputs, output):
    q, k, v, *ctx.options, cu_seqlens, seqlens_k, bias = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, seqlens_k, bias)
    ctx.set_materialize_grads(False)  # lse gets no gradient: pass None, not a tensor of zeros


def _backward(ctx, dout, _):
    *saved, cu_seqlens, seqlens_k, bias = ctx.saved_tensors
    arguments = (dout, *saved, *ctx.options, cu_seqlens, seqlens_k, bias)
    dbias = _bias_gradient(*arguments) if bias is not None and ctx.needs_input_grad[-1] else None
    return *_triton_backward(*arguments), *[None] * 6, dbias


_triton.register_autograd(_backward, setup_context=_save)
refuse_second_derivative("attention", _triton_backward)
refuse_second_derivative("attention", _bias_gradient)
