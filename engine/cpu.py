"""Settings that make training on a CPU faster, and that PyTorch does not choose by itself.

    memory      Every step allocates the same activations again. Keep freed memory instead of returning it to
                the system, and use pages of 2 MB instead of 4 kB where the system has them.
    products    Multiply float32 matrices by oneDNN, which is faster than MKL on CPUs of AMD.

train.py makes both; results/train_speed.py measures their effect.
"""

import ctypes
import os
import platform
import re
from pathlib import Path

import torch


def name() -> str:
    """Return the CPU's name, with its family and model: on rented machines the name may be just "AMD
    EPYC"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # Linux, where Python's platform has the architecture only
        fields = dict(re.findall(r"(\w[^\t:]*)\s*: (.*)", cpuinfo.read_text(encoding="utf-8")))
        if fields.keys() >= {"model name", "cpu family", "model"}:
            return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"
    return platform.processor() or platform.machine()


def keep_memory() -> None:
    """Turn on large pages, and make glibc keep freed memory. Call this before much is allocated."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads this at its first allocation
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, largest = -1, -3, 2**31 - 1
        libc = ctypes.CDLL(None)
        # Older versions of glibc accept at most 32 MB. Setting it also ends glibc's own adaptation of it.
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
            libc.mallopt(M_TRIM_THRESHOLD, largest)


def multiply_by_onednn() -> None:
    """Let oneDNN multiply float32 matrices, if it does not round them.

    PyTorch sends float32 products to oneDNN only if rounding to bfloat16 is allowed ("medium"). oneDNN
    really rounds only on CPUs with AMX; a test product detects this, and then the setting is undone. oneDNN
    is slow at many small products, of which kernels/attention.py makes few.
    """
    if not torch.backends.mkldnn.is_available():
        return
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("highest")
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    if (a @ b - exact).norm() > 1e-5 * exact.norm():  # rounding makes an error of 3e-3
        torch.set_float32_matmul_precision(before)
