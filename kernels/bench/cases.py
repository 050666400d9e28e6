"""What the benchmark measures: each operation at the shapes it is measured at, beside its peers in PyTorch.

    python -m kernels.bench                                          how it is measured, and what comes out

A Case is one operation at one shape: inputs to draw, backends to time on them, the exact results to compare
with, and the work there is to do, in FLOPs or bytes. CASES, at the end, makes those of each operation:

    attention        the whole sequence, causal or not, with grouped heads or a window, beside PyTorch's SDPA
                     and FlexAttention; and decoding, a query per row over a cache of keys and values
    rmsnorm          with and without a residual, beside F.rms_norm and torch.compile of the reference
    cross_entropy    of a linear layer's logits, beside all of them in memory at once, PyTorch's own, and
                     torch.compile of an eighth of them at a time
    grouped_matmul   the first product of the experts of a mixture, beside a loop over them and F.grouped_mm
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention, visible
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_matmul import grouped_matmul
from kernels.rmsnorm import rms_norm

DEVICE, DTYPE = "cuda", torch.bfloat16
# Attention: head widths, heads times head width, tokens of a batch; lengths, and the longest of which the
# reference's T x T scores fit; lengths of a cache to decode from.
HEAD_WIDTHS, WIDTH, TOKENS = (64, 128), 2048, 16384
LENGTHS, SCORES_FIT = (512, 1024, 2048, 4096, 8192, 16384), 4096
CACHE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# RMSNorm: widths, and elements of x; the fewer ones take about as long to launch as to compute.
NORM_WIDTHS, NORM_SIZES = (768, 1024, 2048, 4096, 8192, 16384), (2**26, 2**23)
# Cross entropy: widths and vocabularies, as of GPT-2, TinyLlama and Llama 3.
VOCABULARIES = ((768, 50304), (2048, 32000), (4096, 128256))
# Grouped products: tokens; experts, how many of them a token goes through, width, and width of an expert's
# gate and up projection together, as of Mixtral 8x7B, OLMoE and Qwen3-30B-A3B.
ROUTED, EXPERTS = 4096, ((8, 2, 4096, 2 * 14336), (64, 8, 2048, 2 * 1024), (128, 8, 2048, 2 * 768))


@dataclass
class Case:
    """An operation at one shape, in some passes, by some backends."""

    operation: str
    shape: dict[str, int | bool | None]
    work: dict[str, float]  # of each pass, FLOPs or bytes
    unit: str  # TFLOP/s or GB/s
    inputs: Callable[[], tuple[list[Tensor], list[Tensor]]]  # the inputs; the gradients of the results
    exact: Callable  # of these, results and gradients of the inputs in float64
    backends: dict[str, Callable]  # each a function of the inputs
    chart: tuple[str, str, int | str] | None = None  # its title with the pass in braces, x axis, x
    compared: Callable[[Tensor], Tensor] = lambda x: x  # the part of inputs and results that errors are of


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def compiled(f: Callable) -> Callable:
    return torch.compile(f, dynamic=False, fullgraph=True)


def timed(which: str, f: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> Callable:
    """The call that is timed; it returns f's results and its inputs' gradients, [] for what it leaves out."""

    def results() -> list[Tensor]:
        out = f(*inputs)
        return [out] if isinstance(out, Tensor) else list(out)

    def both():
        out = results()
        return out, torch.autograd.grad(out, inputs, gradients)

    if which == "forward":
        return lambda: (results(), [])
    if which == "both":
        return both
    kept = results()
    return lambda: ([], torch.autograd.grad(kept, inputs, gradients, retain_graph=True))


def in_float64(f: Callable, inputs: list[Tensor], gradients: list[Tensor]):
    inputs = [x.double().requires_grad_() for x in inputs]
    return timed("both", f, inputs, [dy.double() for dy in gradients])()


# --- attention


def attention_flops(B: int, T: int, S: int, H: int, K: int, causal: bool, window: int | None) -> int:
    """Of the forward pass: two products of K multiply-adds for each pair of a query and a key it sees. The
    backward pass counts 2.5 times: it has five such products where this has two."""
    p = torch.arange(S - T, S)  # where the queries stand
    first, last = torch.zeros_like(p), torch.full_like(p, S - 1)
    if window is not None:
        first, last = (p - window + 1).clamp(min=0), (p + window - 1).clamp(max=S - 1)
    if causal:
        last = p
    return 4 * B * H * K * int((last - first + 1).sum())


def attention_cases() -> list[Case]:
    cases = []
    for K in HEAD_WIDTHS:
        H = WIDTH // K
        for causal in (True, False):
            cases += [attention_case(TOKENS // T, T, T, H, H, K, causal) for T in LENGTHS]
        T = SCORES_FIT
        cases.append(attention_case(TOKENS // T, T, T, H, H // 4, K, True))
        cases.append(attention_case(TOKENS // T, T, T, H, H, K, True, window=T // 4))
    for K in HEAD_WIDTHS:
        H = WIDTH // K
        cases += [attention_case(8, 1, S, H, H // 4, K, False) for S in CACHE_LENGTHS]
    return cases


def attention_case(
    B: int, T: int, S: int, H: int, G: int, K: int, causal: bool, window: int | None = None
) -> Case:
    if T == 1:  # decoding: hardly an operation per byte of the keys and values that are read
        work, unit = {"forward": 2 * B * S * G * K * DTYPE.itemsize}, "GB/s"
        chart = f"decoding, head width {K}", "keys in the cache", S
    else:
        flops = attention_flops(B, T, S, H, K, causal, window)
        work, unit = {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}, "TFLOP/s"
        plain = causal and G == H and window is None
        chart = (f"attention {{}}, causal, head width {K}", "tokens (T)", T) if plain else None

    def inputs():
        return [normal(B, T, H, K), normal(B, S, G, K), normal(B, S, G, K)], [normal(B, T, H, K)]

    mask = {"causal": causal, "window": window}
    reference = partial(attention, **mask, backend="reference")
    backends = {
        "plinth": partial(attention, **mask, backend="triton"),
        "reference": reference,
        "SDPA flash": heads_first(sdpa(SDPBackend.FLASH_ATTENTION, T, S, H != G, **mask)),
        "SDPA cuDNN": heads_first(sdpa(SDPBackend.CUDNN_ATTENTION, T, S, H != G, **mask)),
        "FlexAttention": heads_first(flex(T, S, H != G, **mask)),
    }
    if T > SCORES_FIT:
        del backends["reference"]

    def last_head(x: Tensor) -> Tensor:  # of the keys, with its queries; no head or sequence sees another
        return x[-1:, :, -(x.shape[2] // G) :]

    shape = {"T": T, "S": S, "B": B, "H": H, "G": G, "K": K, **mask}
    exact = partial(in_float64, reference)
    return Case("attention", shape, work, unit, inputs, exact, backends, chart, last_head)


def heads_first(f: Callable) -> Callable:
    """PyTorch names the axes (B, H, T, K); in memory nothing moves, and all backends read the same."""
    return lambda q, k, v: f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa(backend: SDPBackend, T: int, S: int, grouped: bool, causal: bool, window: int | None) -> Callable:
    @cache  # made at the first call, which is not timed
    def mask():
        return visible(T, S, torch.device(DEVICE), causal=causal, window=window) if window else None

    def run(q, k, v):
        options = {"attn_mask": mask(), "is_causal": causal and not window, "enable_gqa": grouped}
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def flex(T: int, S: int, grouped: bool, causal: bool, window: int | None) -> Callable:
    run = compiled(flex_attention)

    def seen(b, h, i, j):
        return i >= j if window is None else (i >= j) & (i - j < window)

    @cache
    def blocks():
        return create_block_mask(seen, None, None, T, S, device=DEVICE) if causal else None

    return lambda q, k, v: run(q, k, v, block_mask=blocks(), enable_gqa=grouped)


# --- RMSNorm


def rms_norm_bytes(n: int, residual: bool, backward: bool) -> int:
    """For n elements. Forward: x in, y out, with a residual also that in and the sum out. Backward: x and dy
    in, dx out, with a residual also the gradient of the sum in. Not counted are the weight, its gradient and
    the partial sums of it, and a number per row: little beside the rest."""
    plain = 3 if backward else 2
    return (4 if residual else plain) * n * DTYPE.itemsize


def rms_norm_cases() -> list[Case]:
    sizes = [(n, residual) for n in NORM_SIZES for residual in (False, True)]
    return [rms_norm_case(n, D, residual) for n, residual in sizes for D in NORM_WIDTHS]


def rms_norm_case(n: int, D: int, residual: bool) -> Case:
    rows = n // D

    def inputs():
        # F.rms_norm is a single kernel only if the weight has the dtype of x, so all are given it like that.
        x, weight, dy = normal(rows, D), 1 + 0.1 * normal(D), normal(rows, D)
        if residual:
            return [x, weight, normal(rows, D)], [dy, normal(rows, D)]
        return [x, weight], [dy]

    def norm(backend: str, x: Tensor, weight: Tensor, added: Tensor | None = None):
        return rms_norm(x, weight, residual=added, backend=backend)

    reference = partial(norm, "reference")
    backends = {
        "plinth": partial(norm, "triton"),
        "reference": reference,
        "F.rms_norm": partial(norm, "torch"),
        "compiled": compiled(reference),
    }
    work = {
        "forward": rms_norm_bytes(rows * D, residual, backward=False),
        "backward": rms_norm_bytes(rows * D, residual, backward=True),
    }
    shape = {"rows": rows, "D": D, "residual": residual}
    chart = None if residual else (f"RMSNorm {{}}, x of {n * DTYPE.itemsize / 2**20:.0f} MiB", "width", D)
    return Case("rmsnorm", shape, work, "GB/s", inputs, partial(in_float64, reference), backends, chart)


# --- cross entropy


def cross_entropy_flops(N: int, D: int, V: int) -> int:
    """Forward and backward: the logits, the gradient of hidden and that of the weight are a product each."""
    return 6 * N * D * V


def cross_entropy_cases() -> list[Case]:
    return [cross_entropy_case(TOKENS, D, V) for D, V in VOCABULARIES]


def cross_entropy_case(N: int, D: int, V: int) -> Case:
    targets = torch.randint(V, (N,), device=DEVICE)

    def inputs():
        return [normal(N, D), normal(V, D) / D**0.5], [torch.ones((), device=DEVICE)]

    def ours(backend: str, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend=backend)[0]

    backends = {
        "plinth": partial(ours, "triton"),
        "reference": partial(unfused, targets),
        "torch": partial(ours, "torch"),
        "compiled": compiled(partial(in_eight_chunks, targets)),
    }
    work, shape = {"both": cross_entropy_flops(N, D, V)}, {"N": N, "D": D, "V": V}
    exact = partial(exact_cross_entropy, targets)
    chart = "cross entropy, forward and backward", "width, vocabulary", f"{D}, {V}"
    return Case("cross_entropy", shape, work, "TFLOP/s", inputs, exact, backends, chart)


def unfused(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def in_eight_chunks(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits of an eighth of the tokens at a time, computed a second time for the backward pass."""

    def loss(h, t):
        return F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum")

    chunks = zip(hidden.chunk(8), targets.chunk(8), strict=True)
    return sum(checkpoint(loss, h, t, use_reentrant=False) for h, t in chunks) / len(targets)


def exact_cross_entropy(targets: Tensor, inputs: list[Tensor], gradients: list[Tensor]):
    """In chunks as well: few GPUs hold all logits in float64. The one gradient is 1."""
    hidden, weight = (x.double().requires_grad_() for x in inputs)
    total = 0
    for i in range(0, len(targets), 1024):
        part = slice(i, i + 1024)
        loss = F.cross_entropy(F.linear(hidden[part], weight), targets[part], reduction="sum") / len(targets)
        loss.backward()
        total += loss.detach()
    return [total], [hidden.grad, weight.grad]


# --- grouped matrix product


def grouped_matmul_flops(M: int, D: int, N: int) -> int:
    """Of the forward pass, whatever the sizes of the groups. The backward pass has two such products."""
    return 2 * M * D * N


def grouped_matmul_cases() -> list[Case]:
    return [grouped_matmul_case(E, k * ROUTED, D, N) for E, k, D, N in EXPERTS]


def grouped_matmul_case(E: int, M: int, D: int, N: int) -> Case:
    sizes = uneven_sizes(E, M)
    offsets = torch.tensor(sizes, device=DEVICE).cumsum(0).int()

    def inputs():
        return [normal(M, D), normal(E, N, D) / D**0.5], [normal(M, N)]

    def ours(backend: str, x: Tensor, w: Tensor) -> Tensor:
        return grouped_matmul(x, w, offsets, backend=backend)

    backends = {
        "plinth": partial(ours, "triton"),
        "loop": partial(one_by_one, sizes),
        "F.grouped_mm": lambda x, w: F.grouped_mm(x, w.mT, offs=offsets),
    }
    flops = grouped_matmul_flops(M, D, N)
    work = {"forward": flops, "backward": 2 * flops, "both": 3 * flops}
    shape = {"E": E, "M": M, "D": D, "N": N}
    exact = partial(in_float64, partial(ours, "reference"))
    chart = "grouped product {}", "experts, width", f"{E}, {D}"
    return Case("grouped_matmul", shape, work, "TFLOP/s", inputs, exact, backends, chart)


def uneven_sizes(E: int, M: int) -> list[int]:
    """Of E groups of M rows in all. No router balances them perfectly: here the largest has 2 to 5 times as
    many rows as the average group, the smallest a third or less."""
    generator = torch.Generator().manual_seed(0)
    popularity = (torch.randn(E, generator=generator) / 2).exp()
    rows = torch.multinomial(popularity, M, replacement=True, generator=generator)
    return torch.bincount(rows, minlength=E).tolist()


def one_by_one(sizes: list[int], x: Tensor, w: Tensor) -> Tensor:
    """The sizes are told on the CPU, so the loop need not wait for the GPU."""
    return torch.cat([torch.mm(x_e, w_e.T) for x_e, w_e in zip(x.split(sizes), w.unbind(), strict=True)])


CASES = {
    "attention": attention_cases,
    "rmsnorm": rms_norm_cases,
    "cross_entropy": cross_entropy_cases,
    "grouped_matmul": grouped_matmul_cases,
}
