"""Cases of attention whose time grows in proportion to T. cases.py explains what a case is.

    linear_attention      with the rates of MiniMax-01's first layer
    selected_attention    over 16 blocks of 64 keys, with one choice for 16 heads, as in native sparse
                          attention: the query's own block, the first block, and random ones; and over 3
                          blocks of 512 keys, with a choice for each head, as in mixture of block attention:
                          the own block and random ones

Each kernel is timed beside the backends "reference" and "torch".

Shapes: B batch, T tokens, H heads, G key/value heads, C choices per token, n blocks of N keys, K head width.
"""

import math
from functools import partial

import torch
from torch import Tensor

from kernels.bench import cases
from kernels.bench.cases import Case, normal
from kernels.linear_attention import linear_attention
from kernels.selected_attention import selected_attention, strongest

LONGEST = 65536  # tokens of one row, in addition to cases.LENGTHS
# Selected attention: heads of a choice, keys N of a block, selected blocks n.
KINDS = ((16, 64, 16), (1, 512, 3))


def linear_attention_bytes(B: int, T: int, H: int, K: int, backward: bool) -> int:
    """Return the bytes that a pass reads and writes: forward q, k, v and o; backward q, k, v, the gradient of
    o and three gradients. The states of K x K numbers per head are left out."""
    return (7 if backward else 4) * B * T * H * K * cases.DTYPE.itemsize


def linear_attention_cases() -> list[Case]:
    """Return the cases of linear attention, for each head width and length."""
    shapes = [(cases.TOKENS // T, T) for T in cases.LENGTHS] + [(1, LONGEST)]
    return [linear_attention_case(B, T, cases.WIDTH // K, K) for K in cases.HEAD_WIDTHS for B, T in shapes]


def linear_attention_case(B: int, T: int, H: int, K: int) -> Case:
    """Return the case of linear attention for these shapes."""
    rates = 2.0 ** (-8 * torch.arange(1, H + 1, device=cases.DEVICE) / H)

    def inputs():
        return [normal(B, T, H, K) for _ in range(3)], [normal(B, T, H, K)]

    # The error is measured on the last head alone, which has the last rate.
    def ours(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, rates[-q.shape[2] :], backend=backend)[0]

    backends = {
        "plinth": partial(ours, "triton"),
        "reference": partial(ours, "reference"),
        "torch": partial(ours, "torch"),
    }
    if T > cases.SCORES_FIT:
        del backends["reference"]
    work = {
        which: linear_attention_bytes(B, T, H, K, which == "backward") for which in ("forward", "backward")
    }
    work["both"] = work["forward"] + work["backward"]
    exact = partial(cases.in_float64, partial(ours, "torch"))
    chart = (f"linear attention {{}}, head width {K}", "tokens (T)", T)
    shape = {"T": T, "B": B, "H": H, "K": K}
    # Heads and sequences are independent, so one head is enough to find the error.
    return Case("linear_attention", shape, work, "GB/s", inputs, exact, backends, chart, last_head)


def last_head(x: Tensor) -> Tensor:
    """Return the last head of the last row of x (B, T, H, K): (1, T, 1, K)."""
    return x[-1:, :, -1:]


# --- attention over selected blocks


def selected_attention_cases() -> list[Case]:
    """Return the cases of attention over selected blocks, for each head width, length and kind."""
    found = []
    for K in cases.HEAD_WIDTHS:
        H, shapes = cases.WIDTH // K, [(cases.TOKENS // T, T) for T in cases.LENGTHS] + [(1, LONGEST)]
        for B, T in shapes:
            found += [selected_attention_case(B, T, H, K, *kind) for kind in KINDS]
    return found


def random_blocks(B: int, T: int, C: int, N: int, n: int, with_first: bool) -> Tensor:
    """Return blocks (B, T, C, n): the query's own block, with_first also the first, random ones before the
    own, and -1 where there are fewer than n."""
    number, p = torch.arange(-(-T // N), device=cases.DEVICE), torch.arange(T, device=cases.DEVICE)
    own = (p // N)[:, None, None]  # (T, 1, 1)
    always = (number == own) | (with_first & (number == 0))
    rows = []
    for _ in range(B):
        scores = torch.rand(T, C, len(number), device=cases.DEVICE)
        rows.append(strongest(scores.masked_fill(always, 2).masked_fill(number > own, -math.inf), n))
    return torch.stack(rows)


def choices_and_groups(H: int, heads: int) -> tuple[int, int]:
    """Return C and G for H heads, of which so many share a choice."""
    C = max(1, H // heads)
    return C, C if heads > 1 else max(1, H // 4)


def selected_attention_case(B: int, T: int, H: int, K: int, heads: int, N: int, n: int) -> Case:
    """Return the case of attention over n selected blocks of N keys; heads: how many share a choice."""
    C, G = choices_and_groups(H, heads)
    heads = H // C
    blocks = random_blocks(B, T, C, N, n, with_first=heads > 1)
    # A query sees its own block up to itself, and all keys of the others.
    seen = (blocks >= 0).sum().item() * N - sum(N - 1 - p % N for p in range(T)) * B * C
    flops = 4 * K * heads * seen

    def inputs():
        return [normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K)], [normal(B, T, H, K)]

    # The error is measured on the last key head of the last row, which has the last choices.
    def ours(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = blocks[-q.shape[0] :, :, -(q.shape[2] // heads) :]
        return selected_attention(q, k, v, own, N, backend=backend)

    def last_group(x: Tensor) -> Tensor:
        return x[-1:, :, -(x.shape[2] // G) :]

    backends = {name: partial(ours, name) for name in ("triton", "reference", "torch")}
    backends = {"plinth": backends.pop("triton"), **backends}
    if T > cases.SCORES_FIT:
        del backends["reference"]
    work = {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}
    exact = partial(cases.in_float64, partial(ours, "torch"))
    shape = {"T": T, "B": B, "H": H, "G": G, "C": C, "N": N, "n": n, "K": K}
    chart = (f"{n} blocks of {N}, {{}}, head width {K}", "tokens (T)", T)
    return Case("selected_attention", shape, work, "TFLOP/s", inputs, exact, backends, chart, last_group)


CASES = {"linear_attention": linear_attention_cases, "selected_attention": selected_attention_cases}
