"""Prepare on the processor, while the GPU already works, what later steps would wait for.

    python -m results.gpu.ahead data       a tokenizer and a tokenised corpus, without a download
    python -m results.gpu.ahead kernels    all kinds of attention, compiled into Triton's cache

Both are started by __main__.py. Compilation needs only the name of a GPU: kernels/bench/machine_code.py
compiles the kernels that a function would launch, and launches none. So here are functions that would launch
each kernel with the constants that it has in the measurements.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from data.corpus import documents, find_files
from data.text import prepare
from data.tokenizer import Tokenizer, train_bpe
from formats.atomic import replace_directory
from formats.tokenizer_json import END_OF_TEXT
from kernels import (
    configs,
    flash_attention,
    flash_backward,
    linear_chunks,
    selected_backward,
    selected_blocks,
)
from kernels.bench import machine_code
from kernels.bench.long_rows import choices_and_groups
from results.gpu.steps import FULL, TOY, Sizes


def prepare_data(sizes: Sizes, work: Path) -> None:
    """Learn a tokenizer and tokenise the corpus.

    The vocabulary is as large as GPT-2's, and so is the model's head. But to learn so many tokens would take
    a minute, so fewer are learned: the end of a text has the last id, and the ids between are not used.
    """
    texts = documents(find_files("stdlib" if sizes is FULL else sizes.data, work), on_bad_text=print)
    learned = train_bpe(texts, sizes.n_learned)
    with replace_directory(work / "tokenizer") as new:
        Tokenizer(learned.ranks, learned.pattern, {END_OF_TEXT: sizes.vocab_size - 1}).save(new)
    prepare(sizes.data, str(work / "tokenizer"), work / "cache", bad_text="skip")


def attention(K: int, H: int, causal: bool, group: int, backward: bool) -> None:
    """Launch a pass of softmax attention.

    The lengths are others than in the measurements, but multiples of 16 as well, which Triton compiles in.
    """
    q = torch.zeros(1, 256, H, K, dtype=torch.bfloat16)
    k, lse = torch.zeros(1, 256, H // group, K, dtype=torch.bfloat16), torch.zeros(1, H, 256)
    options = (causal, None, None, K**-0.5, None, None)
    if backward:
        flash_backward.backward(q, q, k, k, q, lse, *options)
    else:
        flash_attention.forward(q, k, k, *options)


def linear(K: int, H: int, backward: bool) -> None:
    """Launch a pass of linear attention. The number of chunks is a multiple of 16, as in the measurements."""
    x, state = torch.zeros(1, 1024, H, K, dtype=torch.bfloat16), torch.zeros(1, H, K, K)
    if backward:
        linear_chunks.backward(x, state, x, x, x, torch.zeros(H), state)
    else:
        linear_chunks.forward(x, x, x, torch.zeros(H), state)


def selected(K: int, H: int, heads: int, N: int, n: int, backward: bool) -> None:
    """Launch a pass of attention over n selected blocks of N keys. heads: how many heads share a choice.

    The number of blocks is a multiple of 16, as in the measurements with the longest rows.
    """
    (C, G), T = choices_and_groups(H, heads), 16 * N
    q, k = torch.zeros(1, T, H, K, dtype=torch.bfloat16), torch.zeros(1, T, G, K, dtype=torch.bfloat16)
    blocks = torch.zeros(1, T, C, n, dtype=torch.int64)
    if backward:
        selected_backward.backward(q, q, k, k, blocks, q, torch.zeros(1, T, H), N, K**-0.5, None)
    else:
        selected_blocks.forward(q, k, k, blocks, N, K**-0.5, None)


def configured(operation: str, name: str, job: partial) -> None:
    """Call the job under a configuration, as in tuning."""
    with configs.timed(operation, configs.CONFIGS[operation][name]):
        job()


def jobs_of(sizes: Sizes, is_long: bool) -> list[partial]:
    """Return the calls whose kernels are compiled ahead: those of the measurements, then those of tuning.

    is_long: those of attention whose time grows in proportion to T, or else those of softmax attention.
    """
    measured, tuned = [], []
    for K, backward in product(reversed(sizes.head_widths), (False, True)):
        H = sizes.width // K
        if is_long:
            ways = {"linear_attention": partial(linear, K, H, backward)}
            for way, kind in zip(("selected", "gathered"), sizes.selected, strict=True):
                ways[f"{way}_attention"] = partial(selected, K, H, *kind, backward)
        else:
            ways = {"attention": partial(attention, K, H, True, 1, backward)}
            measured += [
                partial(attention, K, H, causal, group, backward) for causal, group in ((False, 1), (True, 4))
            ]
        measured += ways.values()
        for way, job in ways.items():
            operation = f"{way}_{'backward' if backward else 'forward'}"
            tuned += [partial(configured, operation, name, job) for name in configs.names(operation, K)]
    return measured + tuned


def compile_job(target: str, job: partial) -> None:
    """Compile the kernels that a job would launch."""
    os.nice(10)  # the measurements come first
    machine_code.compiled_for(target, job)


def compile_kernels(sizes: Sizes, target: str) -> None:
    """Compile the kernels of all jobs for a GPU such as "sm_90", in several processes.

    A failure is only printed: where the kernel is measured, it fails again, in its row.
    """
    most = 1 if sizes is TOY else None
    jobs = [job for is_long in (False, True) for job in jobs_of(sizes, is_long)[:most]]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) // 2), get_context("spawn")) as pool:
        done = [pool.submit(compile_job, target, job) for job in jobs]
        for job, future in zip(jobs, done, strict=True):
            error = future.exception()
            print(f"compiled ahead: {job.args}: {error or 'done'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "kernels"), help="what to prepare")
    parser.add_argument("--work", type=Path, required=True, help="folder for the data")
    parser.add_argument("--toy", action="store_true", help="prepare for toy sizes on the CPU")
    args = parser.parse_args()
    sizes = TOY if args.toy else FULL
    if args.what == "data":
        prepare_data(sizes, args.work)
    else:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        compile_kernels(sizes, "sm_{}{}".format(*capability))


if __name__ == "__main__":
    main()
