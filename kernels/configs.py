"""Tiles, warps and stages of the kernels: the defaults, the alternatives to time, and the winners of a GPU.

    queries, keys ...   the size of a tile: a larger one needs fewer bytes per operation, and more registers
    warps               of a program; on Hopper four warps multiply as one group, eight are two such groups
    stages              of the software pipeline: stages - 1 tiles are being loaded while one is computed
    tma                 True to load tiles through tensor descriptors, by the GPU's copy engine if it has one
    persistent          programs per multiprocessor that compute one tile after another, so that none has to
                        be started for a tile; 0 to start a program for each tile
    interleaved         True to compute the product of the next tile during the exponentials of this one
    specialized         True to let Triton give loads and products warps of their own, on Blackwell. On
                        Hopper, Triton 3.6 and 3.9 make the same machine code of this kernel without it

The defaults are the largest tiles found with which 16-bit inputs stay in registers, by the compiler's
figures: results/machine_code.json has registers, spills, shared memory and programs per multiprocessor of
every configuration here. CONFIGS are alternatives by name, the simplest first. `python -m results.gpu` times
them on a GPU, and tuned.json beside this file, where it exists, names the fastest for each key, which is a
head width, a width D of RMSNorm, a vocabulary V or a number of experts E:

    {"sm_90": {"attention_forward": {"64": name, "128": name}, ...}}

For an architecture without a measurement the kernels use the defaults.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kernels.backend import family

TUNED = Path(__file__).with_name("tuned.json")


class Attention(NamedTuple):
    """One kernel of attention: the forward pass, the gradients of k and v, or that of q.

    Only the forward pass has the last three fields.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = True
    persistent: int = 0  # programs per multiprocessor; 0: one per tile
    interleaved: bool = False
    specialized: bool = False


class Backward(NamedTuple):
    """Both kernels of the gradient of attention."""

    dkdv: Attention
    dq: Attention


class Linear(NamedTuple):
    """Linear attention, forward or backward: see kernels/linear_chunks.py."""

    chunk: int  # tokens
    columns: int  # a tile of the state has so many rows and columns
    warps: int
    stages: int
    tma: bool = True


class Norm(NamedTuple):
    """RMSNorm's backward pass. A tile has rows of at most `elements` numbers together, or one longer row."""

    elements: int = 2048
    per_warp: int = 512  # elements of a warp; a program has 4 to 16 warps
    stages: int = 3
    resident: int = 16  # warps on each multiprocessor


class CrossEntropy(NamedTuple):
    """Linear cross entropy: the logits that a program reads at a time, and the rows of a chunk."""

    block: int = 4096  # logits
    per_warp: int = 512  # logits of a warp
    rows: int = 0  # fewest rows of a chunk; 0: as many as cross_entropy.rows_per_chunk gives


class Product(NamedTuple):
    """A tile of a grouped product. Its sum reads `line` bytes of every row and column at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    line: int = 128  # bytes: 64 numbers of 16 bits
    together: int = 8  # tiles of rows whose programs run side by side


class Grouped(NamedTuple):
    """The grouped product of long groups, and the gradient of its matrices."""

    product: Product
    weight: Product


Config = Attention | Backward | Linear | Norm | CrossEntropy | Grouped

# --- the defaults

# Attention, by the largest head width: queries, keys, warps and stages of the forward pass, of dk and dv, and
# of dq. Float32 uses the entry of twice its head width. Its tiles fit the registers in TF32 only.
ATTENTION = {
    "Hopper": {  # and data-centre Blackwell: over 200 kB of shared memory
        64: ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        256: ((128, 32, 8, 2), (16, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 16, 8, 1), (16, 16, 8, 1), (64, 16, 8, 1)),
    },
    "NVIDIA": {  # every other: at most 99 kB, which the smallest chips have
        64: ((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1)),
        512: ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "AMD": {  # 64 kB, and 512 registers
        64: ((128, 64, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1)),
        128: ((128, 32, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1)),
        256: ((64, 32, 4, 1), (16, 64, 8, 1), (32, 32, 4, 1)),
        512: ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "interpreter": {512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))},
}
# Linear attention, by the bytes of a number: chunk, columns, warps and stages of the forward pass, and of the
# backward pass.
LINEAR = {
    "Hopper": {2: ((64, 64, 4, 3), (64, 64, 4, 3)), 4: ((32, 32, 4, 2), (16, 32, 8, 1, False))},
    "NVIDIA": {2: ((64, 64, 8, 2), (64, 64, 8, 2)), 4: ((32, 32, 4, 1), (16, 32, 8, 1))},
    "AMD": {2: ((64, 64, 4, 1), (64, 64, 4, 1)), 4: ((32, 32, 4, 1), (16, 32, 8, 1))},
    "interpreter": {2: ((16, 16, 4, 1), (16, 16, 4, 1)), 4: ((16, 16, 4, 1), (16, 16, 4, 1))},
}
# Attention over selected blocks, like ATTENTION. "Queries" are the rows of a tile: gathered heads of queries.
SELECTED = {
    "Hopper": {
        64: ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2)),
        256: ((64, 32, 4, 2), (16, 64, 8, 2), (64, 32, 4, 2)),
        512: ((64, 16, 8, 1), (16, 16, 8, 1), (64, 16, 8, 1)),
    },
    **{name: ATTENTION[name] for name in ("NVIDIA", "AMD", "interpreter")},
}
# Grouped products, by the smallest average number of rows per group: rows, columns, warps and stages (and
# line); then the same of the gradient of the matrices. A tile of 128 x 256 reads a quarter less from the L2
# cache per operation than one of 128 x 128, and the speed of that cache limits Hopper.
GROUPED = {
    "Hopper": ({128: (128, 256, 8, 3), 32: (64, 128, 4, 4), 0: (16, 64, 4, 4)}, (128, 256, 8, 3)),
    "NVIDIA": ({128: (128, 128, 8, 3), 32: (64, 128, 4, 3), 0: (16, 64, 4, 4)}, (128, 128, 8, 3)),
    "narrow": ({128: (128, 64, 8, 3), 32: (64, 64, 4, 3), 0: (16, 64, 4, 4)}, (128, 64, 8, 3)),
    "AMD": ({128: (128, 128, 8, 2), 32: (64, 128, 4, 2), 0: (16, 64, 4, 2)}, (128, 128, 8, 2)),
    "interpreter": ({0: (16, 16, 4, 1, 32)}, (16, 16, 4, 1, 32)),
}
# Float32, which may need three products in TF32, takes more registers and so uses smaller tiles.
GROUPED_FLOAT32 = {"Hopper": "NVIDIA", "NVIDIA": "narrow"}
LONG_GROUPS = 128  # rows of a group, on average, from which on a tuned configuration applies

# --- the alternatives

CONFIGS: dict[str, dict[str, Config]] = {
    "attention_forward": {
        "128x64": Attention(128, 64, 8, 3),
        "128x64, 2 stages": Attention(128, 64, 8, 2),
        "128x64, 4 stages": Attention(128, 64, 8, 4),
        "128x128": Attention(128, 128, 8, 2),
        "128x128, 3 stages": Attention(128, 128, 8, 3),
        "64x64, 4 warps": Attention(64, 64, 4, 3),
        "64x128, 4 warps": Attention(64, 128, 4, 2),
        "128x64, pointers": Attention(128, 64, 8, 3, tma=False),
        "128x64, persistent": Attention(128, 64, 8, 3, persistent=1),
        "128x64, two persistent": Attention(128, 64, 8, 3, persistent=2),
        "128x128, persistent": Attention(128, 128, 8, 2, persistent=1),
        "128x64, interleaved": Attention(128, 64, 8, 3, interleaved=True),
        "128x128, interleaved": Attention(128, 128, 8, 2, interleaved=True),
        "128x64, persistent, interleaved": Attention(128, 64, 8, 3, persistent=1, interleaved=True),
        "128x64, specialized": Attention(128, 64, 8, 3, specialized=True),
    },
    "attention_backward": {
        "64x128 and 128x64": Backward(Attention(64, 128, 8, 2), Attention(128, 64, 8, 2)),
        "32x128 and 128x64": Backward(Attention(32, 128, 8, 2), Attention(128, 64, 8, 2)),
        "32x128, 3 stages": Backward(Attention(32, 128, 8, 3), Attention(128, 64, 8, 3)),
        "32x128 and 64x64": Backward(Attention(32, 128, 8, 2), Attention(64, 64, 4, 2)),
        "32x64, 4 warps": Backward(Attention(32, 64, 4, 2), Attention(64, 64, 4, 2)),
        "64x64 and 64x64": Backward(Attention(64, 64, 4, 2), Attention(64, 64, 4, 2)),
        "64x64, 8 warps": Backward(Attention(64, 64, 8, 3), Attention(64, 64, 4, 3)),
        "64x128 and 128x128": Backward(Attention(64, 128, 8, 2), Attention(128, 128, 8, 1)),
        "32x128, pointers": Backward(
            Attention(32, 128, 8, 2, tma=False), Attention(128, 64, 8, 2, tma=False)
        ),
    },
    "linear_attention_forward": {
        "chunks of 64": Linear(64, 64, 4, 3),
        "chunks of 64, 8 warps": Linear(64, 64, 8, 3),
        "chunks of 64, pointers": Linear(64, 64, 4, 3, tma=False),
        "chunks of 64, states of 32": Linear(64, 32, 4, 3),
        "chunks of 64, 2 stages": Linear(64, 64, 4, 2),
        "chunks of 128": Linear(128, 64, 8, 3),
        "chunks of 128, 2 stages": Linear(128, 64, 8, 2),
        "chunks of 128, pointers": Linear(128, 64, 8, 3, tma=False),
    },
    "linear_attention_backward": {
        "chunks of 64": Linear(64, 64, 4, 3),
        "chunks of 64, 8 warps": Linear(64, 64, 8, 3),
        "chunks of 64, pointers": Linear(64, 64, 4, 3, tma=False),
        "chunks of 64, states of 32": Linear(64, 32, 4, 3),
        "chunks of 64, 2 stages": Linear(64, 64, 4, 2),
        "chunks of 128": Linear(128, 64, 8, 3),
    },
    # Attention over selected blocks, by query: tiles of 16 rows, except for dk and dv.
    "selected_attention_forward": {
        "64 keys": Attention(16, 64, 4, 3),
        "64 keys, 2 stages": Attention(16, 64, 4, 2),
        "64 keys, 4 stages": Attention(16, 64, 4, 4),
        "64 keys, 2 warps": Attention(16, 64, 2, 3),
        "64 keys, 8 warps": Attention(16, 64, 8, 3),
        "32 keys, 2 warps": Attention(16, 32, 2, 4),
        "64 keys, pointers": Attention(16, 64, 4, 3, tma=False),
    },
    "selected_attention_backward": {
        "64x64, 8 warps": Backward(Attention(64, 64, 8, 2), Attention(16, 64, 4, 2)),
        "64x64, 4 warps": Backward(Attention(64, 64, 4, 2), Attention(16, 64, 4, 3)),
        "32x64, 4 warps": Backward(Attention(32, 64, 4, 2), Attention(16, 64, 4, 2)),
        "32x64, 8 warps": Backward(Attention(32, 64, 8, 2), Attention(16, 64, 4, 3)),
        "64x64, 3 stages": Backward(Attention(64, 64, 8, 3), Attention(16, 64, 4, 3)),
        "64x64, pointers": Backward(Attention(64, 64, 8, 2, tma=False), Attention(16, 64, 4, 2, tma=False)),
    },
    # Attention over selected blocks, by block: tiles of gathered queries.
    "gathered_attention_forward": {
        "128x64": Attention(128, 64, 8, 3),
        "128x64, 2 stages": Attention(128, 64, 8, 2),
        "128x128": Attention(128, 128, 8, 2),
        "64x64, 4 warps": Attention(64, 64, 4, 3),
        "64x128, 4 warps": Attention(64, 128, 4, 2),
        "128x64, pointers": Attention(128, 64, 8, 3, tma=False),
    },
    "gathered_attention_backward": {
        "64x64 and 128x64": Backward(Attention(64, 64, 8, 2), Attention(128, 64, 8, 2)),
        "64x128 and 128x64": Backward(Attention(64, 128, 8, 2), Attention(128, 64, 8, 2)),
        "32x128 and 128x64": Backward(Attention(32, 128, 8, 2), Attention(128, 64, 8, 2)),
        "64x64 and 64x64": Backward(Attention(64, 64, 4, 2), Attention(64, 64, 4, 2)),
        "32x64 and 64x64": Backward(Attention(32, 64, 4, 2), Attention(64, 64, 4, 2)),
        "64x64, pointers": Backward(Attention(64, 64, 8, 2, tma=False), Attention(128, 64, 8, 2, tma=False)),
    },
    "rms_norm_backward": {
        "2048 elements": Norm(),
        "4096 elements": Norm(elements=4096),
        "1024 elements": Norm(elements=1024),
        "32 warps resident": Norm(resident=32),
        "256 a warp": Norm(per_warp=256),
        "256 a warp, 32 resident": Norm(per_warp=256, resident=32),
        "1024 a warp": Norm(per_warp=1024),
        "not pipelined": Norm(stages=1),
    },
    "linear_cross_entropy": {
        "4096 logits": CrossEntropy(),
        "8192 logits": CrossEntropy(block=8192),
        "2048 logits": CrossEntropy(block=2048),
        "4096 logits, 256 a warp": CrossEntropy(per_warp=256),
        "8192 logits, 1024 a warp": CrossEntropy(block=8192, per_warp=1024),
        "chunks of 2048": CrossEntropy(rows=2048),
        "chunks of 4096": CrossEntropy(rows=4096),
    },
    "grouped_matmul": {
        "128x256": Grouped(Product(128, 256, 8, 3), Product(128, 256, 8, 3)),
        "128x256, 4 stages": Grouped(Product(128, 256, 8, 4), Product(128, 256, 8, 4)),
        "128x256, narrow": Grouped(Product(128, 256, 8, 4, line=64), Product(128, 256, 8, 4, line=64)),
        "128x128": Grouped(Product(128, 128, 8, 3), Product(128, 128, 8, 3)),
        "128x128, 4 stages": Grouped(Product(128, 128, 8, 4), Product(128, 128, 8, 4)),
        "128x128, 4 warps": Grouped(Product(128, 128, 4, 4), Product(128, 128, 4, 4)),
        "128x256, 16 together": Grouped(
            Product(128, 256, 8, 3, together=16), Product(128, 256, 8, 3, together=16)
        ),
        "256x128": Grouped(Product(256, 128, 8, 3), Product(256, 128, 8, 3)),
    },
}
# Head widths at which a configuration is not timed on Hopper: it spills registers, or fewer of its programs
# fit a multiprocessor than it wants, or its machine code is that of another configuration.
NOT_ON_HOPPER = {
    "attention_forward: 128x128, interleaved": (128,),
    "attention_forward: 128x64, two persistent": (128,),
    "attention_forward: 128x64, specialized": (64, 128),
    "attention_backward: 64x128 and 128x64": (128,),
    "attention_backward: 64x64 and 64x64": (128,),
    "attention_backward: 64x128 and 128x128": (128,),
    "linear_attention_backward: chunks of 128": (128,),
    "selected_attention_backward: 64x64, 4 warps": (128,),
}

# --- which one runs

_timed: dict[str, Config] = {}


@contextmanager
def timed(operation: str, config: Config) -> Iterator[None]:
    """Let the kernels of an operation run with this configuration at any shape, within the context."""
    _timed[operation] = config
    try:
        yield
    finally:
        del _timed[operation]


def names(operation: str, key: int | str) -> list[str]:
    """Return the names of the configurations to time on Hopper for a key of tuned.json, a head width say."""
    without = {name for name, keys in NOT_ON_HOPPER.items() if int(key) in keys}
    return [name for name in CONFIGS[operation] if f"{operation}: {name}" not in without]


@cache
def _tuned() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.exists() else {}


def chosen(operation: str, arch: str, key: int, element_size: int = 2) -> Config | None:
    """Return the configuration being timed or, for 16-bit inputs, the measured one; None without either.

    The measured one is that of the smallest measured key that is at least `key`, since the tiles for a wider
    head fit a narrower one too. Raises ValueError if tuned.json has a name that is not in CONFIGS.
    """
    if operation in _timed:
        return _timed[operation]
    measured = _tuned().get(arch, {}).get(operation, {}) if element_size == 2 else {}
    larger = [int(k) for k in measured if int(k) >= key]
    if not larger:
        return None
    name = measured[str(min(larger))]
    if name not in CONFIGS[operation]:
        raise ValueError(f"{TUNED}: {operation}: {name!r} is not in kernels/configs.py; measure again")
    return CONFIGS[operation][name]


def attention(arch: str, K: int, element_size: int) -> tuple[Attention, Attention, Attention]:
    """Return the configurations of the forward pass, of dk and dv, and of dq, at head width K."""
    table, width = ATTENTION[family(arch)], K * max(1, element_size // 2)
    forward, dkdv, dq = (Attention(*tile) for tile in table[min(limit for limit in table if width <= limit)])
    forward = chosen("attention_forward", arch, width, element_size) or forward
    backward = chosen("attention_backward", arch, width, element_size) or Backward(dkdv, dq)
    return forward, *backward


def selected(arch: str, K: int, element_size: int, by_query: bool) -> tuple[Attention, Attention, Attention]:
    """Return the configurations of attention over selected blocks: forward, dk and dv, and dq."""
    table, width = SELECTED[family(arch)], K * max(1, element_size // 2)
    forward, dkdv, dq = (Attention(*tile) for tile in table[min(limit for limit in table if width <= limit)])
    if by_query:  # a tile has the heads that share a choice, most often 16, which are few for more warps
        forward, dq = (tile._replace(queries=16, warps=4) for tile in (forward, dq))
    name = "selected_attention" if by_query else "gathered_attention"
    forward = chosen(f"{name}_forward", arch, width, element_size) or forward
    backward = chosen(f"{name}_backward", arch, width, element_size) or Backward(dkdv, dq)
    return forward, *backward


def linear(operation: str, arch: str, K: int, element_size: int) -> Linear:
    """Return the configuration of linear_attention_forward or linear_attention_backward at head width K."""
    forward, backward = LINEAR[family(arch)][element_size]
    default = forward if operation == "linear_attention_forward" else backward
    return chosen(operation, arch, K, element_size) or Linear(*default)


def grouped(arch: str, E: int, rows: float, element_size: int) -> Grouped:
    """Return the configuration of grouped products of E groups of `rows` rows on average."""
    name = family(arch)
    products, weight = GROUPED[GROUPED_FLOAT32.get(name, name) if element_size == 4 else name]
    product = products[max(least for least in products if least <= rows)]
    default = Grouped(Product(*product), Product(*weight))
    found = chosen("grouped_matmul", arch, E, element_size) or default
    short = rows < LONG_GROUPS and "grouped_matmul" not in _timed
    return found._replace(product=default.product) if short else found
