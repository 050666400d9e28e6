"""What `python -m kernels.bench` measures: each operation at some shapes, beside other ways to compute it.

A Case is one operation at one shape: inputs to draw, backends to time on them, the exact results to compare
with, and the work of each pass in FLOPs or bytes. CASES, at the end, lists the operations (long_rows.py has
two more):

    attention        of whole sequences, causal or not, with grouped heads or a window, beside PyTorch's SDPA
                     and FlexAttention; and in decoding, one query per row over a cache of keys and values
    rmsnorm          with and without a residual, beside F.rms_norm and torch.compile of the reference
    cross_entropy    of the logits of a linear layer, beside the same with all logits in memory at once,
                     beside the backend "torch", and beside torch.compile of an eighth of the tokens at a time
    grouped_matmul   the first product of the experts of a mixture, beside a loop over them and F.grouped_mm

Shapes: B batch, T query length, S key length, H heads, G key/value heads, K head width, D model width,
V vocabulary, E experts, N tokens, or columns of a product, M rows of a product.
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
# Attention: head widths, heads times head width, and tokens of a batch; lengths T, and the longest whose
# T x T scores fit into memory in the reference; lengths of the cache in decoding.
HEAD_WIDTHS, WIDTH, TOKENS = (64, 128), 2048, 16384
LENGTHS, SCORES_FIT = (512, 1024, 2048, 4096, 8192, 16384), 4096
CACHE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# RMSNorm: widths, and elements of x. The smaller x takes about as long to launch as to compute.
NORM_WIDTHS, NORM_SIZES = (768, 1024, 2048, 4096, 8192, 16384), (2**26, 2**23)
# Cross entropy: width and vocabulary of GPT-2, TinyLlama and Llama 3.
VOCABULARIES = ((768, 50304), (2048, 32000), (4096, 128256))
# Grouped products: tokens; then of Mixtral 8x7B, OLMoE and Qwen3-30B-A3B the experts, experts per token,
# width, and the width of an expert's gate and up projections together.
ROUTED, EXPERTS = 4096, ((8, 2, 4096, 2 * 14336), (64, 8, 2048, 2 * 1024), (128, 8, 2048, 2 * 768))


@dataclass
class Case:
    """An operation at one shape, with the passes and the backends to measure."""

    operation: str
    shape: dict[str, int | bool | None]
    work: dict[str, float]  # FLOPs or bytes of each pass
    unit: str  # TFLOP/s or GB/s
    inputs: Callable[[], tuple[list[Tensor], list[Tensor]]]  # draws inputs, and gradients of the results
    exact: Callable  # of both: the results, and the gradients of the inputs, in float64
    backends: dict[str, Callable]  # functions of the inputs
    chart: tuple[str, str, int | str] | None = None  # title, with {} for the pass; name of the x axis; x
    compared: Callable[[Tensor], Tensor] = lambda x: x  # the part of a tensor that errors are computed from


def normal(*shape: int) -> Tensor:
    """Return normal random numbers of DTYPE on DEVICE."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def compiled(f: Callable) -> Callable:
    """Return f compiled for one shape, in one graph."""
    return torch.compile(f, dynamic=False, fullgraph=True)


def timed(which: str, f: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> Callable:
    """Return the call to time, of the pass `which`: "forward", "backward" or "both".

    It returns the results of f and the gradients of its inputs, each [] if the pass does not compute them.
    gradients: those of the results.
    """

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
    """Return the results of f and the gradients of its inputs, computed in float64."""
    inputs = [x.double().requires_grad_() for x in inputs]
    return timed("both", f, inputs, [dy.double() for dy in gradients])()


# --- attention


def attention_flops(B: int, T: int, S: int, H: int, K: int, causal: bool, window: int | None) -> int:
    """Return the FLOPs of the forward pass: two products of K multiply-adds per query and key that it sees.

    The backward pass has five such products, so it counts 2.5 times.
    """
    p = torch.arange(S - T, S)  # the positions of the queries
    first, last = torch.zeros_like(p), torch.full_like(p, S - 1)
    if window is not None:
        first, last = (p - window + 1).clamp(min=0), (p + window - 1).clamp(max=S - 1)
    if causal:
        last = p
    return 4 * B * H * K * int((last - first + 1).sum())


def attention_cases() -> list[Case]:
    """Return the cases of attention: whole sequences, then decoding, for each head width."""
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
    """Return the case of attention for these shapes; T = 1 is decoding."""
    # In decoding the time goes into reading keys and values: work is their bytes.
    if T == 1:
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

    # Heads and sequences are independent, so one key head with its queries is enough to find the error.
    def last_head(x: Tensor) -> Tensor:
        return x[-1:, :, -(x.shape[2] // G) :]

    shape = {"T": T, "S": S, "B": B, "H": H, "G": G, "K": K, **mask}
    exact = partial(in_float64, reference)
    return Case("attention", shape, work, unit, inputs, exact, backends, chart, last_head)


def heads_first(f: Callable) -> Callable:
    """Return f, which takes (B, H, T, K), as a function of (B, T, H, K); nothing moves in memory."""
    return lambda q, k, v: f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def sdpa(backend: SDPBackend, T: int, S: int, grouped: bool, causal: bool, window: int | None) -> Callable:
    """Return PyTorch's scaled_dot_product_attention with one of its backends."""

    @cache  # computed in the first call, which is not timed
    def mask():
        return visible(T, S, torch.device(DEVICE), causal=causal, window=window) if window else None

    def run(q, k, v):
        options = {"attn_mask": mask(), "is_causal": causal and not window, "enable_gqa": grouped}
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def flex(T: int, S: int, grouped: bool, causal: bool, window: int | None) -> Callable:
    """Return PyTorch's FlexAttention, compiled. A window must be causal."""
    run = compiled(flex_attention)

    def seen(b, h, i, j):
        return i >= j if window is None else (i >= j) & (i - j < window)

    @cache
    def blocks():
        return create_block_mask(seen, None, None, T, S, device=DEVICE) if causal else None

    return lambda q, k, v: run(q, k, v, block_mask=blocks(), enable_gqa=grouped)


# --- RMSNorm


def rms_norm_bytes(n: int, residual: bool, backward: bool) -> int:
    """Return the bytes that a pass over n elements reads and writes.

    Forward: x is read and y written; with a residual, it is read and the sum written, too. Backward: x and dy
    are read and dx written; with a residual, the gradient of the sum is read, too. The weight, its gradient
    with the partial sums, and one number per row are few beside these and are left out.
    """
    plain = 3 if backward else 2
    return (4 if residual else plain) * n * DTYPE.itemsize


def rms_norm_cases() -> list[Case]:
    """Return the cases of RMSNorm, for each size, with and without a residual, and each width."""
    sizes = [(n, residual) for n in NORM_SIZES for residual in (False, True)]
    return [rms_norm_case(n, D, residual) for n, residual in sizes for D in NORM_WIDTHS]


def rms_norm_case(n: int, D: int, residual: bool) -> Case:
    """Return the case of RMSNorm of x with n elements in rows of D."""
    rows = n // D

    def inputs():
        # F.rms_norm is a single kernel only if the weight has the dtype of x, so it has for every backend.
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
    """Return the FLOPs of forward and backward: three products, of the logits and of the two gradients."""
    return 6 * N * D * V


def cross_entropy_cases() -> list[Case]:
    """Return the cases of cross entropy, for each width and vocabulary."""
    return [cross_entropy_case(TOKENS, D, V) for D, V in VOCABULARIES]


def cross_entropy_case(N: int, D: int, V: int) -> Case:
    """Return the case of cross entropy for these shapes, with random targets."""
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
    """Return the mean cross entropy from all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def in_eight_chunks(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the mean cross entropy from the logits of an eighth of the tokens at a time.

    They are not kept: backward computes them again.
    """

    def loss(h, t):
        return F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum")

    chunks = zip(hidden.chunk(8), targets.chunk(8), strict=True)
    return sum(checkpoint(loss, h, t, use_reentrant=False) for h, t in chunks) / len(targets)


def exact_cross_entropy(targets: Tensor, inputs: list[Tensor], gradients: list[Tensor]):
    """Return the loss and its gradients in float64, in chunks, since few GPUs have memory for all logits."""
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
    """Return the FLOPs of the forward pass, for any sizes of groups. Backward has two such products."""
    return 2 * M * D * N


def grouped_matmul_cases() -> list[Case]:
    """Return the cases of grouped products, one for each of EXPERTS."""
    return [grouped_matmul_case(E, k * ROUTED, D, N) for E, k, D, N in EXPERTS]


def grouped_matmul_case(E: int, M: int, D: int, N: int) -> Case:
    """Return the case of M rows of width D times the matrices (N, D) of E groups."""
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
    """Return the sizes of E groups with M rows in total, as uneven as a router makes them.

    The largest has 2 to 5 times as many rows as the average group, the smallest a third or less.
    """
    generator = torch.Generator().manual_seed(0)
    popularity = (torch.randn(E, generator=generator) / 2).exp()
    rows = torch.multinomial(popularity, M, replacement=True, generator=generator)
    return torch.bincount(rows, minlength=E).tolist()


def one_by_one(sizes: list[int], x: Tensor, w: Tensor) -> Tensor:
    """Return the grouped product by a loop. `sizes` is on the CPU, so that nothing waits for the GPU."""
    return torch.cat([torch.mm(x_e, w_e.T) for x_e, w_e in zip(x.split(sizes), w.unbind(), strict=True)])


CASES = {
    "attention": attention_cases,
    "rmsnorm": rms_norm_cases,
    "cross_entropy": cross_entropy_cases,
    "grouped_matmul": grouped_matmul_cases,
}
