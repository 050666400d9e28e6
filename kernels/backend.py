"""Which implementation of an operation runs, and on what.

The names a caller may give as `backend`:

    reference    plain PyTorch, the definition: any device, any float dtype
    torch        the library's own fused operation
    triton       the kernels of this package: on a GPU, or on a CPU one program after the other in Triton's
                 interpreter, which TRITON_INTERPRET=1 turns on (very slow, for tests)
    auto         the fastest of them for what is asked
"""

import os
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # there is none for macOS; kernels are then defined, but never run
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl, TensorDescriptor = SimpleNamespace(constexpr=None), None

HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("auto", "triton", "torch", "reference")


def choose(operation: str, backend: str, x: Tensor) -> str:
    """The backend for an operation on tensors like x; "auto" is Triton on a GPU, else PyTorch's own.

    Raises ValueError for an unknown backend, and where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if x.is_cuda and HAS_TRITON else "torch"
    if backend == "triton" and not (HAS_TRITON and (x.is_cuda or INTERPRETED)):
        missing = "a GPU" if HAS_TRITON else "the package triton"
        raise ValueError(f"{operation}: backend 'triton' needs {missing}; use 'auto', 'torch' or 'reference'")
    return backend


def architecture(x: Tensor) -> str:
    """Of the device that kernels on x run on: "sm_90", "gfx942" ..., or "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    return _architecture(x.device.index)


@cache
def _architecture(device: int | None) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@cache
def n_multiprocessors(device: torch.device) -> int:
    """That run programs side by side; an H200's where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def on_device(x: Tensor):
    """Context in which Triton launches on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
