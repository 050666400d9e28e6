"""What forward keeps for backward, and operations that keep on a CPU what the kernels keep on a GPU."""

import torch
import torch.nn.functional as F

import gpt
from kernels import cross_entropy
from vision import vit


class RMSNorm(torch.autograd.Function):
    """Keeps the same tensors as kernels/rmsnorm.py, see test_the_fused_kernels_keep_what_is_estimated."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (h * r * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        n, dy = x.float() * r, dy.float()
        g = dy * weight
        dx = g.sub_(n * (g * n).mean(-1, keepdim=True)).mul_(r).to(x.dtype)
        return dx, (n * dy).flatten(0, -2).sum(0).to(weight.dtype), None


def attention(q, k, v, *, causal=False, window=None, cu_seqlens=None, backend="auto"):
    """Attention without the CPU path of kernels/attention.py."""
    heads = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, K)
    return F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)


def use_gpu_operations(monkeypatch) -> None:
    """Let models use operations that keep what the kernels keep on a GPU."""
    rows = cross_entropy.rows_per_chunk
    monkeypatch.setattr(gpt, "attention", attention)
    monkeypatch.setattr(vit, "attention", attention)
    monkeypatch.setattr(gpt, "rms_norm", lambda x, w, eps, backend: RMSNorm.apply(x, w, eps))
    monkeypatch.setattr(gpt, "gelu", lambda x: F.gelu(x, approximate="tanh"))
    monkeypatch.setattr(cross_entropy, "rows_per_chunk", lambda N, D, V, _: rows(N, D, V, "cuda"))
    monkeypatch.setattr(cross_entropy, "IN_CACHE", 0)


def kept_by_forward(loss, module, tensors=(), dtype="float32") -> int:
    """Return the bytes that autograd keeps of a loss, and those of tensors, without the module's parameters.
    Each piece of memory is counted once. loss: a function of no arguments."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x  # held, so that its address stays its own
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        loss()
    for x in tensors:
        pack(x)
    return sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in own)
