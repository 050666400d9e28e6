"""Which implementation of an operation runs, and the properties of the device on which kernels depend.

The names that a caller may give as `backend`:

    reference    plain PyTorch, which defines the result: any device, any float dtype
    torch        PyTorch's own fused operation
    triton       the kernels of this package: on a GPU, or, with TRITON_INTERPRET=1, on a CPU in Triton's
                 interpreter, which runs one program after the other (very slow, for tests)
    auto         the fastest of them for the operation, the device and the dtype; under the transforms of
                 torch.func (grad, vmap, jvp ...) the reference, which alone supports them all
"""

import os
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # as on macOS: the kernels are defined there too, but never run
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl, TensorDescriptor = SimpleNamespace(constexpr=None), None

HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("auto", "triton", "torch", "reference")
# Architectures whose tables of tiles have a name of their own; see `family` for the others.
FAMILIES = {"sm_90": "Hopper", "sm_100": "Hopper", "sm_103": "Hopper", "interpreter": "interpreter"}


def choose(operation: str, backend: str, x: Tensor) -> str:
    """Return the backend for an operation on tensors like x; "auto" is Triton on a GPU, else PyTorch's own.

    Under a transform of torch.func, "auto" is the reference. Raises ValueError for an unknown backend, and
    for "triton" where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "auto" and transformed():
        return "reference"
    if backend == "auto":
        return "triton" if x.is_cuda and HAS_TRITON else "torch"
    if backend == "triton" and not (HAS_TRITON and (x.is_cuda or INTERPRETED)):
        missing = "a GPU" if HAS_TRITON else "the package triton"
        raise ValueError(f"{operation}: backend 'triton' needs {missing}; use 'auto', 'torch' or 'reference'")
    if backend == "triton":
        refuse_transforms(operation, backend)
    return backend


def transformed() -> bool:
    """Return True under a transform of torch.func (grad, vmap ...) or in forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(operation: str, backend: str) -> None:
    """Raise ValueError under a transform of torch.func, for which registered operations have no rules."""
    if transformed():
        raise ValueError(
            f"{operation}: backend {backend!r} does not run under torch.func or in forward-mode "
            'differentiation; use backend="reference"'
        )


def refuse_second_derivative(operation: str, backward) -> None:
    """Make it an error with a clear message to differentiate `backward`, the gradient of an operation."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f'{operation}: this backend has no second derivative; use backend="reference", which has one'
        )

    backward.register_autograd(refuse)


def readable(x: Tensor) -> bool:
    """Return True if the values of x can be checked: on a CPU, without waiting, and not while tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def architecture(x: Tensor) -> str:
    """Return the architecture of the device that runs kernels on x: "sm_90", "gfx942", "interpreter" ..."""
    if INTERPRETED:
        return "interpreter"
    return _architecture(x.device.index)


@cache
def _architecture(device: int | None) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def family(arch: str) -> str:
    """Return which table of tiles an architecture uses: "Hopper", "NVIDIA", "AMD" or "interpreter"."""
    return FAMILIES.get(arch, "NVIDIA" if arch.startswith("sm_") else "AMD")


def precision(x: Tensor) -> str:
    """Return how the kernels multiply float32 tiles, following torch.set_float32_matmul_precision.

    On NVIDIA GPUs even "highest" is a sum of three products in TF32, almost as exact as float32: tiles of
    exact float32 products, which use no tensor cores, would not fit the registers.
    """
    if not architecture(x).startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def block_width(K: int) -> int:
    """Return the width of a tile for rows of width K: a power of two, at least 16, which tl.dot needs."""
    return max(16, triton.next_power_of_2(K))


@cache
def n_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; without a GPU, how many an H200 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def multiplies(x: Tensor) -> bool:
    """Return True if tl.dot multiplies the dtype of x: Triton's interpreter computes garbage in bfloat16."""
    return not (INTERPRETED and x.dtype == torch.bfloat16)


def on_device(x: Tensor):
    """Return a context in which Triton launches kernels on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
