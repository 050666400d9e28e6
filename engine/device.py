"""The device of a run: which one it is, what arithmetic it has, and how fast it is at best.

    MFU = tokens per second * FLOPs per token / dense bf16 peak of the device

Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B) counts the operations of the model's
equations, and not those of activations that are computed a second time. So it compares implementations as
well as machines.
"""

import argparse
import platform

import torch

from engine import parallel

# Dense bf16 matmul peak in FLOP/s, by the name that CUDA gives the device. An unknown device shows no MFU
# rather than a guess.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200 data sheet (half of "with sparsity", here and below)
    "NVIDIA H200": 989e12,  # NVIDIA H200 data sheet
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA H100 data sheet, SXM
    "NVIDIA H100 NVL": 835e12,  # NVIDIA H100 NVL data sheet
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 data sheet
    "NVIDIA A100-SXM4-80GB": 312e12,  # NVIDIA A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,  # NVIDIA L40S data sheet
    "NVIDIA L4": 121e12,  # NVIDIA L4 data sheet
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada whitepaper, appendix A, float32 accumulation
    "NVIDIA GeForce RTX 3090": 71e12,  # NVIDIA GA102 whitepaper, table 9, float32 accumulation
    "AMD Instinct MI300X": 1307e12,  # AMD Instinct MI300X data sheet
}


def peak_flops(device: str) -> float | None:
    """Return the peak in FLOP/s, None for a device that is not in the table."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name()) if device == "cuda" else None


def mfu(run, units_per_second: float) -> float | None:
    """Return the MFU of all ranks together, None where the peak is not known."""
    peak = peak_flops(run.args.device)
    flops = units_per_second * run.flops_per_token
    return flops / (peak * parallel.world_size()) if peak else None


def choose_device(args: argparse.Namespace) -> None:
    """Fill in --device, --dtype and --compile; ValueError for what this machine does not have."""
    if args.device is None:
        args.device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[args.device]:
        raise ValueError(
            f"--device {args.device}: this machine has none; leave the flag out for the best it has"
        )
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device == "cuda" and has_bfloat16("cuda") else "float32"
    if args.dtype == "bfloat16" and not has_bfloat16(args.device):
        raise ValueError(
            f"--dtype bfloat16: this {args.device} has no bfloat16 arithmetic; use --dtype float32"
        )
    if args.parallel != "none" and args.device == "mps":
        raise ValueError(f"--parallel {args.parallel}: not on mps; add --device cpu")
    from kernels import backend  # with Triton, which takes half a second to import

    backend.choose(f"--kernels {args.kernels}", args.kernels, torch.empty(0, device=args.device))
    if args.compile is None:
        args.compile = args.device == "cuda"


def has_bfloat16(device: str) -> bool:
    """Return whether the hardware multiplies bfloat16: PyTorch's emulation of it is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def wait_for(device: str) -> None:
    """Wait until the device has finished."""
    if device != "cpu":
        getattr(torch, device).synchronize()
