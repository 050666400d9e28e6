"""The operations a transformer spends its time in, each beside its plain PyTorch definition."""

from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.gelu import gelu
from kernels.rmsnorm import rms_norm

__all__ = ["attention", "gelu", "linear_cross_entropy", "rms_norm"]
