"""The operations a transformer spends its time in, each beside its plain PyTorch definition."""

from kernels.attention import attention
from kernels.gelu import gelu
from kernels.rmsnorm import rms_norm

__all__ = ["attention", "gelu", "rms_norm"]
