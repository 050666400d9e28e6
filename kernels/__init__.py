"""The operations a transformer spends its time in, each beside its plain PyTorch definition."""

from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.few_rows import products
from kernels.gelu import gelu, quick_gelu
from kernels.grouped_matmul import grouped_matmul
from kernels.rmsnorm import rms_norm

__all__ = [
    "attention",
    "gelu",
    "grouped_matmul",
    "linear_cross_entropy",
    "products",
    "quick_gelu",
    "rms_norm",
]
