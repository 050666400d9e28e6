"""Settings that make training on a CPU faster, and that PyTorch does not choose by itself.

    keep_memory           Every step allocates the same activations again. Keep freed memory instead of
                          returning it to the system, and use pages of 2 MB instead of 4 kB where the system
                          has them.
    multiply_by_onednn    Multiply float32 matrices by oneDNN, which is faster than MKL on CPUs of AMD.

train.py makes both settings; results/train_speed.py measures their effect. `crowded` finds out whether other
processes take the cores.
"""

import ctypes
import os
import platform
import re
from pathlib import Path

import torch

# `crowded` is true from this load average per core on, if each thread gets at most this share of a core. On a
# quiet machine the load average is that of the run itself, at most 1 per core and a little for the data.
CROWDED, ENOUGH = 1.5, 0.6


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


def crowded(seconds: float, cpu_seconds: float) -> str | None:
    """Return advice if other processes take the cores that this one computes on, else None.

    seconds, cpu_seconds: the time that passed, and the CPU time that this process got in it. OpenMP's threads
    wait for one another at the end of every operation, so one thread without a core delays all.
    """
    n_cores, n_threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    n_used = cpu_seconds / seconds
    if load < CROWDED * n_cores or n_used > ENOUGH * min(n_threads, n_cores):
        return None
    return (
        f"slow: other processes use the cores (load average {load:.1f} on {n_cores} cores; the {n_threads} "
        f"threads of this run got {n_used:.1f} of them). Faster meanwhile: OMP_NUM_THREADS=1 or "
        "OMP_WAIT_POLICY=passive before the command, and --resume"
    )
