"""What makes training on a CPU fast that PyTorch leaves to be asked for.

    memory      every step allocates the same activations again: freed blocks are kept instead of being given
                back to the system, and are made of pages of 2 MB, not 4 kB, where the system has such
    products    oneDNN multiplies matrices of float32 faster than MKL does on the CPUs of AMD

train.py asks for both; results/train_speed.py measures what comes of it.
"""

import ctypes
import os
import platform
import re
from pathlib import Path

import torch


def name() -> str:
    """Maker, family and model: what a cloud rents out may be called "AMD EPYC" and no more."""
    described = Path("/proc/cpuinfo")
    if described.is_file():  # Linux, where platform knows no more than the architecture
        said = dict(re.findall(r"(\w[^\t:]*)\s*: (.*)", described.read_text()))
        if said.keys() >= {"model name", "cpu family", "model"}:
            return f"{said['model name']}, family {said['cpu family']}, model {said['model']}"
    return platform.processor() or platform.machine()


def keep_memory() -> None:
    """Ask for large pages, and have glibc keep what is freed. To be called before much is allocated."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, largest = -1, -3, 2**31 - 1
        libc = ctypes.CDLL(None)
        # Older ones take no more than 32 MB; and any call ends the threshold's own growth up to there.
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
            libc.mallopt(M_TRIM_THRESHOLD, largest)


def multiply_by_onednn() -> None:
    """Let oneDNN multiply matrices of float32, where it does so in float32.

    It is given them by being allowed to round to bfloat16, which it does only on CPUs with matrix units
    (AMX). Where a product shows that it does, all stays as it was. Of many small products, which it is slow
    at, kernels/attention.py makes few."""
    if not torch.backends.mkldnn.is_available():
        return
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    if (a @ b - exact).norm() > 1e-5 * exact.norm():  # in bfloat16 it would be 3e-3
        torch.set_float32_matmul_precision(before)
