"""GELU, the activation of GPT-2, in its tanh form.

    gelu(x) = x * (1 + tanh(u)) / 2 = x * sigmoid(2 u),        2 u = x * (a + b x^2)
    a = 2 sqrt(2 / pi),  b = 0.044715 a

Gaussian Error Linear Units (Hendrycks and Gimpel 2016, section 2). The gradient, with s = sigmoid(2 u):

    dx = dy * (s + x * s * (1 - s) * (a + 3 b x^2))

PyTorch's own operation computes a tanh in the forward pass and again in the backward pass. In a small GPT-2
on a CPU, only the matrix products take longer. The sigmoid takes less time there, and it is kept for the
backward pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import transformed

A = 2 * math.sqrt(2 / math.pi)
B = 0.044715 * A
QUICK = 1.702  # so that x sigmoid(1.702 x) is close to GELU


def gelu(x: Tensor) -> Tensor:
    """Return the GELU of x, of any shape and float dtype.

    Training in float32 on a CPU uses the equations above, which keep one more tensor than PyTorch's own
    operation does. Everything else, second derivatives and torch.func too, uses PyTorch's.
    """
    if _by_hand(x):
        return _GELU.apply(x)
    return F.gelu(x, approximate="tanh")


def _by_hand(x: Tensor) -> bool:
    """Return True in training in float32 on a CPU, neither compiled nor under torch.func."""
    learns = x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled()
    return learns and not torch.compiler.is_compiling() and not transformed()


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        s = torch.addcmul(x.new_tensor(A), x, x, value=B).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True: a gradient that has derivatives itself
            return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
        slope = torch.addcmul(x.new_tensor(A), x, x, value=3 * B)
        # s (1 - s) is 0 for large x, so it comes before the power of x, which may overflow.
        return torch.addcmul(s, s, s, value=-1).mul_(x).mul_(slope).add_(s).mul_(dy)


def quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x) of x, of any shape and float dtype: the first approximation of GELU in the
    paper, which CLIP uses.

    Its gradient is dy (s + 1.702 x s (1 - s)), s the sigmoid. Training in float32 on a CPU computes that in
    place, in half as many passes over memory as automatic differentiation.
    """
    if _by_hand(x):
        return _QuickGELU.apply(x)
    return x * torch.sigmoid(QUICK * x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        s = (QUICK * x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True: a gradient that has derivatives itself
            s = torch.sigmoid(QUICK * x)
            return dy * (s + QUICK * x * s * (1 - s))
        slope = torch.addcmul(s, s, s, value=-1).mul_(x)  # x s (1 - s)
        return torch.add(s, slope, alpha=QUICK).mul_(dy)
