"""What makes training on a CPU fast that PyTorch leaves to be asked for.

memory      every step allocates the same activations again: freed blocks are kept instead of being given
            back to the system, and are made of pages of 2 MB, not 4 kB, where the system has such
products    oneDNN multiplies matrices of float32 faster than MKL does on the CPUs of AMD

python results/train_speed.py nanoGPT       what this gains
"""

import ctypes
import os
import platform

import torch


def tune(*, products: bool = True) -> None:
    """Settings of this process. products: False leaves matrix products to MKL, as torch.compile wants it: the
    many small ones of attention, which MKL is better at, are taken out by kernels/attention.py otherwise."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at the first allocation
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, largest = -1, -3, 2**31 - 1
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, largest)
    if products and torch.backends.mkldnn.is_available():
        multiply_by_onednn()


def multiply_by_onednn() -> None:
    """Let oneDNN multiply matrices of float32, where it does so in float32.

    It is given them by being allowed to round to bfloat16. A CPU without matrix units (AMX) gains nothing by
    that, and none of this is seen to be done; where it is, all stays as it was."""
    matmul = torch.backends.mkldnn.matmul
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    matmul.fp32_precision = "ieee"
    exact = a @ b
    matmul.fp32_precision = "bf16"
    if (a @ b - exact).norm() > 1e-5 * exact.norm():  # in bfloat16 it would be 3e-3
        matmul.fp32_precision = "ieee"
