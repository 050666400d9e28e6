"""Cases of attention whose time grows in proportion to T. cases.py explains what a case is.

    linear_attention      as in MiniMax-01's first layer, beside the reference and the chunks in PyTorch

Shapes: B batch, T tokens, H heads, K head width.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.bench import cases
from kernels.bench.cases import Case, normal
from kernels.linear_attention import linear_attention

LONGEST = 65536  # tokens of one row, beside the lengths of attention


def linear_attention_bytes(B: int, T: int, H: int, K: int, backward: bool) -> int:
    """Return the bytes that a pass reads and writes: forward q, k, v and o; backward q, k, v, the gradient of
    o and three gradients. A state of K x K numbers per head does not count."""
    return (7 if backward else 4) * B * T * H * K * cases.DTYPE.itemsize


def linear_attention_cases() -> list[Case]:
    shapes = [(cases.TOKENS // T, T) for T in cases.LENGTHS] + [(1, LONGEST)]
    return [linear_attention_case(B, T, cases.WIDTH // K, K) for K in cases.HEAD_WIDTHS for B, T in shapes]


def linear_attention_case(B: int, T: int, H: int, K: int) -> Case:
    rates = 2.0 ** (-8 * torch.arange(1, H + 1, device=cases.DEVICE) / H)

    def inputs():
        return [normal(B, T, H, K) for _ in range(3)], [normal(B, T, H, K)]

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
    return x[-1:, :, -1:]


CASES = {"linear_attention": linear_attention_cases}
