"""What is measured on a GPU, the most important first.

`steps` returns the list: each step runs in a process of its own, and each of its measurements gives one row.
FULL are the sizes on a GPU. TOY are those of the rehearsal, which runs the same code on a CPU and the kernels
in Triton's interpreter.

Shapes: B batch, T query length, S key length, H heads, G key/value heads, K head width, D model width,
V vocabulary, E experts, M rows of a product.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kernels import configs
from kernels.bench import cases, long_rows
from results.gpu import measure


class Measurement(NamedTuple):
    """A measurement, which gives one row."""

    name: str
    seconds: float  # expected, with compilation; twice as long is the limit
    call: Callable[[], dict]  # returns the figures


@dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements."""

    device: str
    data: str  # the corpus to train on, as for train.py --data
    n_learned: int  # tokens that the tokenizer learns
    vocab_size: int
    gpt: tuple[str, ...]  # flags of train.py
    bert: tuple[str, ...]
    moe: tuple[str, ...]
    images: tuple[tuple[str, tuple[str, ...]], ...]  # models of images, each with its flags
    pictures: tuple[int, int]  # how many to train on, and their height and width
    updates: tuple[int, int, int]  # to warm up, measured, profiled
    learning_steps: int
    matmul: int  # sides of the product that is the limit of the device
    copied: int  # bytes of the copy that is the other
    width: int  # heads times head width, in attention
    tokens: int  # of a batch, in attention
    head_widths: tuple[int, ...]
    lengths: tuple[int, ...]  # T
    long: int  # T of one long row, in linear attention and of selected blocks
    selected: tuple[tuple[int, int, int], ...]  # heads that choose together, keys of a block, blocks
    cache_lengths: tuple[int, ...]  # S, in decoding
    norms: tuple[tuple[int, int], ...]  # elements, D
    vocabularies: tuple[tuple[int, int, int], ...]  # tokens, D, V
    experts: tuple[tuple[int, int, int, int], ...]  # E, M, D, width of an expert's output
    decoder: str  # size of gpt.py
    new_tokens: int
    batches: tuple[int, int]  # in decoding
    configurations: int | None  # of an operation, in tuning; None: all
    rounds: int  # how often the sides of a comparison take turns
    tests: tuple[str, ...]  # files with tests for a GPU, or parts of them; (): all of them


def source_of(package: str) -> str:
    """Return the folder of an installed package, whose source text is a corpus that needs no download."""
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent) if spec else "stdlib"


BF16 = ("--dtype", "bfloat16", "--compile")
TINY = ("--dtype", "float32", "--no-compile", "--batch-size", "2", "--size", "tiny")
ONE_LAYER = (*TINY, "--set", "n_layers=1")
FULL = Sizes(
    device="cuda",
    data=source_of("transformers"),
    n_learned=16384,
    vocab_size=50257,
    gpt=("--size", "124m", "--seq-len", "1024", "--batch-size", "64", *BF16),
    bert=("--size", "roberta-base", "--seq-len", "512", "--batch-size", "128", *BF16),
    moe=("--size", "switch-base-8-like", "--seq-len", "512", "--batch-size", "128", *BF16),
    images=(
        *(
            (name, ("--size", "b-16", "--batch-size", "128", *BF16))
            for name in ("vit", "mae", "simclr", "clip")
        ),
        ("unet", ("--size", "ddpm-32", "--batch-size", "128", *BF16)),
        ("dit", ("--size", "b-4", "--batch-size", "256", *BF16)),
    ),
    pictures=(256, 224),
    updates=(5, 40, 5),
    learning_steps=200,
    matmul=8192,
    copied=2**30,
    width=2048,
    tokens=16384,
    head_widths=(64, 128),
    lengths=(1024, 4096, 16384),
    long=65536,
    selected=long_rows.KINDS,
    cache_lengths=(4096, 65536),
    norms=((2**26, 4096), (2**26, 768)),
    vocabularies=((16384, 768, 50304),),
    experts=((8, 8192, 4096, 2 * 14336), (64, 32768, 2048, 2 * 1024)),
    decoder="124m",
    new_tokens=256,
    batches=(1, 32),
    configurations=None,
    rounds=2,
    tests=(),
)
TOY = Sizes(
    device="cpu",
    data="scaling/plan.py",
    n_learned=300,
    vocab_size=400,
    gpt=(*ONE_LAYER, "--seq-len", "16"),
    bert=(*ONE_LAYER, "--seq-len", "16"),
    moe=(*ONE_LAYER, "--seq-len", "16"),
    images=(
        *((name, ONE_LAYER) for name in ("vit", "mae", "simclr", "clip", "dit")),
        ("unet", TINY),
    ),
    pictures=(8, 32),
    updates=(1, 1, 1),
    learning_steps=2,
    matmul=64,
    copied=1024,
    width=64,
    tokens=8,
    head_widths=(16,),
    lengths=(4, 8),
    long=24,
    selected=((16, 4, 3), (1, 4, 2)),
    cache_lengths=(300,),
    norms=((192, 24),),
    vocabularies=((16, 16, 40),),
    experts=((4, 32, 16, 24),),
    decoder="tiny",
    new_tokens=4,
    batches=(1, 2),
    configurations=2,
    rounds=1,
    tests=("tests/kernels/test_rmsnorm.py::test_large",),
)


def steps(sizes: Sizes, work: Path) -> dict[str, list[Measurement]]:
    """Return the measurements of each step, in order. work: a folder for temporary files."""
    train = partial(measure.train_speed, sizes, work)
    compared = partial(measure.compared, sizes)
    shapes = attention_cases(sizes)
    return {
        # 1. It runs at all.
        "limits": [Measurement("matrix product and copy", 8, partial(measure.limits, sizes))],
        "kernels": [
            Measurement(name, 8, partial(measure.once, case)) for name, case in small_cases(sizes).items()
        ],
        # 2. The main job.
        "training": [
            Measurement("gpt, --kernels auto", 75, partial(train, "gpt", sizes.gpt, "auto")),
            Measurement("gpt, --kernels torch", 65, partial(train, "gpt", sizes.gpt, "torch")),
        ],
        # 3. Attention, and 4. the other operations.
        "attention": [Measurement(name, 8, partial(compared, case)) for name, case in shapes.items()],
        "operations": [
            Measurement(name, 8, partial(compared, case)) for name, case in other_cases(sizes).items()
        ],
        # 5. Correct, all of it.
        "tests": [Measurement("pytest -m gpu", 120, partial(measure.tests, sizes))],
        # 6. Tune.
        "tuning": tuning(tuned_cases(sizes), sizes),
        # 7. Learning and decoding.
        "learning": [
            Measurement(name, 90, partial(measure.learning, sizes, work, name)) for name in ("adamw", "muon")
        ],
        "decoding": [
            Measurement(f"batch {B}", 90, partial(measure.decoding, sizes, B)) for B in sizes.batches
        ],
        # 8. Profile. The three largest costs of a training step are in the rows of "training".
        "profile": [Measurement("ncu, attention forward", 60, partial(measure.counters, sizes))],
        # If time is left.
        "long rows": [
            Measurement(name, 8, partial(compared, case)) for name, case in long_cases(sizes).items()
        ],
        "more tuning": tuning(long_tuned_cases(sizes), sizes),
        "more training": [
            Measurement("gpt, --kernels triton", 75, partial(train, "gpt", sizes.gpt, "triton")),
            Measurement("bert, --kernels auto", 75, partial(train, "bert", sizes.bert, "auto")),
            Measurement("moe, --kernels auto", 90, partial(train, "moe", sizes.moe, "auto")),
            *(
                Measurement(f"{model}, images", 60, partial(measure.image_speed, sizes, work, model))
                for model, _ in sizes.images
            ),
        ],
        "flex": [
            Measurement(name, 25, partial(compared, case, theirs=("FlexAttention",)))
            for name, case in shapes.items()
            if f"T {sizes.lengths[1]}" in name
        ],
    }


def attention_case(sizes: Sizes, K: int, T: int, causal: bool = True, group: int = 1) -> Callable:
    """Return a function that makes a case of attention, with H / G = group."""
    H = sizes.width // K
    return partial(cases.attention_case, sizes.tokens // T, T, T, H, H // group, K, causal)


def attention_cases(sizes: Sizes) -> dict[str, Callable]:
    """Return cases of attention over whole rows, by name, the largest first."""
    found = {}
    for K in reversed(sizes.head_widths):
        for causal in (True, False):
            for T in reversed(sizes.lengths):
                name = f"width {K}, T {T}, {'causal' if causal else 'full'}"
                found[name] = attention_case(sizes, K, T, causal)
        T = sizes.lengths[1]
        found[f"width {K}, T {T}, causal, groups of 4"] = attention_case(sizes, K, T, group=4)
    return found


def decoding_case(sizes: Sizes, K: int, S: int) -> Callable:
    """Return a function that makes a case of one query for each of 8 rows, over S cached keys."""
    H = sizes.width // K
    return partial(cases.attention_case, 8, 1, S, H, H // 4, K, False)


def linear_case(sizes: Sizes, K: int, T: int) -> Callable:
    """Return a function that makes a case of linear attention."""
    return partial(long_rows.linear_attention_case, max(1, sizes.tokens // T), T, sizes.width // K, K)


def selected_cases(sizes: Sizes, K: int, T: int) -> dict[str, Callable]:
    """Return a case for the heads that choose blocks together, and for each head that chooses alone."""
    B, H = max(1, sizes.tokens // T), sizes.width // K
    make = long_rows.selected_attention_case
    return {
        f"{n} blocks of {N}, width {K}, T {T}": partial(make, B, T, H, K, heads, N, n)
        for heads, N, n in sizes.selected
    }


def small_cases(sizes: Sizes) -> dict[str, Callable]:
    """Return a case of every kernel, with all that it can do."""
    K, T = sizes.head_widths[-1], sizes.lengths[0]
    n, D = sizes.norms[-1]
    return {
        **{f"attention, width {K}": attention_case(sizes, K, T, group=4) for K in sizes.head_widths},
        "decoding": decoding_case(sizes, K, sizes.cache_lengths[0]),
        "linear attention": linear_case(sizes, K, sizes.lengths[1]),
        **selected_cases(sizes, K, sizes.lengths[1]),
        "RMSNorm": partial(cases.rms_norm_case, n, D, True),
        "cross entropy": partial(cases.cross_entropy_case, *sizes.vocabularies[0]),
        "grouped product": partial(cases.grouped_matmul_case, *sizes.experts[-1]),
    }


def other_cases(sizes: Sizes) -> dict[str, Callable]:
    """Return cases of the operations other than attention over whole rows."""
    found = {}
    for n, D in sizes.norms:
        for residual in (False, True):
            name = f"RMSNorm, D {D}{', residual' * residual}"
            found[name] = partial(cases.rms_norm_case, n, D, residual)
    for N, D, V in sizes.vocabularies:
        found[f"cross entropy, D {D}, V {V}"] = partial(cases.cross_entropy_case, N, D, V)
    for E, M, D, N in sizes.experts:
        found[f"grouped product, E {E}, D {D}"] = partial(cases.grouped_matmul_case, E, M, D, N)
    for K in sizes.head_widths:
        for S in sizes.cache_lengths:
            found[f"decoding, width {K}, S {S}"] = decoding_case(sizes, K, S)
    return found


def long_cases(sizes: Sizes) -> dict[str, Callable]:
    """Return cases of attention whose time grows in proportion to T."""
    found = {}
    for K in reversed(sizes.head_widths):
        for T in (sizes.lengths[1], sizes.long):
            found[f"linear attention, width {K}, T {T}"] = linear_case(sizes, K, T)
            found |= selected_cases(sizes, K, T)
    return found


def tuned_cases(sizes: Sizes) -> dict[tuple[str, int], tuple[str, Callable]]:
    """Return the pass and the case by which the configuration of an operation is chosen, for each key of
    kernels/tuned.json: head width, D, V or E."""
    found = {}
    for K in reversed(sizes.head_widths):
        case = attention_case(sizes, K, sizes.lengths[-1])
        found["attention_forward", K] = "forward", case
        found["attention_backward", K] = "backward", case
    for n, D in sizes.norms:
        found["rms_norm_backward", D] = "backward", partial(cases.rms_norm_case, n, D, True)
    for N, D, V in sizes.vocabularies:
        found["linear_cross_entropy", V] = "both", partial(cases.cross_entropy_case, N, D, V)
    for E, M, D, N in sizes.experts:
        found["grouped_matmul", E] = "both", partial(cases.grouped_matmul_case, E, M, D, N)
    return found


def long_tuned_cases(sizes: Sizes) -> dict[tuple[str, int], tuple[str, Callable]]:
    """Return the same as `tuned_cases` for attention whose time grows in proportion to T, by head width."""
    found = {}
    for K in reversed(sizes.head_widths):
        linear = linear_case(sizes, K, sizes.lengths[-1])
        found["linear_attention_forward", K] = "forward", linear
        found["linear_attention_backward", K] = "backward", linear
        selected = selected_cases(sizes, K, sizes.lengths[-1]).values()
        for way, of_blocks in zip(("selected", "gathered"), selected, strict=True):
            found[f"{way}_attention_forward", K] = "forward", of_blocks
            found[f"{way}_attention_backward", K] = "backward", of_blocks
    return found


def tuning(found: dict, sizes: Sizes) -> list[Measurement]:
    """Return a measurement for every named configuration of the cases of `tuned_cases`."""
    return [
        Measurement(
            f"{operation} {key}: {name}",
            3,
            partial(measure.configuration, operation, str(key), name, which, case),
        )
        for (operation, key), (which, case) in found.items()
        for name in configs.names(operation, key)[: sizes.configurations]
    ]
