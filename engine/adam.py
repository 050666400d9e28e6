"""Adam: the optimizer's equations as code, torch.optim's to the bit (Kingma and Ba 2015, algorithm 1).

    g_t = gradient of the loss at w_{t-1}
    m_t = beta1 m_{t-1} + (1 - beta1) g_t            running mean of the gradient
    v_t = beta2 v_{t-1} + (1 - beta2) g_t^2          running mean of its square, number by number
    w_t = w_{t-1} - lr mhat / (sqrt(vhat) + eps)     mhat = m_t / (1 - beta1^t), vhat = v_t / (1 - beta2^t)

Dividing by sqrt(vhat) makes the step independent of the gradient's scale: where g stays the same, each number
moves by about lr in a step. m and v begin at 0, so that after t steps the weights (1 - beta) beta^i of the
gradients in them add up to 1 - beta^t only; mhat and vhat are divided by this sum. With eps = 0 the first
step is lr sign(g).

    AdamW      w <- w - lr weight_decay w, and then Adam's step   (Loshchilov and Hutter 2019, algorithm 2)
    L2         g <- g + weight_decay w, and then Adam's step

The two are the same for SGD without momentum, not for Adam: its division takes the scale out of the L2 term
too, so weights with large gradients shrink less. train.py trains with torch.optim.AdamW, whose fused kernel
makes one pass over memory. This file is the same computation, to be read. In float64 the two are equal to the
bit if torch computes one operation after the other as here (foreach=False, fused=False).

    python -m engine.adam        both from the same start, and what decay and L2 do to two weights
"""

import math

import torch
from torch import Tensor

from formats import command


class AdamW:
    """Adam with decoupled weight decay, for tensors of any shape and floating dtype.

    lr: size of a step. betas: the shares of the running means of g and g^2 that stay in a step. eps: added to
    the root, against division by 0. weight_decay: a step subtracts lr * weight_decay of each weight.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        self.n_steps = [0] * len(params)  # t of each parameter
        self.means = [torch.zeros_like(p) for p in params]  # m
        self.squares = [torch.zeros_like(p) for p in params]  # v

    @torch.no_grad()
    def step(self) -> None:
        """Make a step, in place, of each parameter w that has a gradient w.grad, and none of the others."""
        beta1, beta2 = self.betas
        for i, (w, m, v) in enumerate(zip(self.params, self.means, self.squares, strict=True)):
            if w.grad is None:
                continue
            self.n_steps[i] += 1
            g, t = w.grad, self.n_steps[i]
            w.mul_(1 - self.lr * self.weight_decay)

            # lerp is m + (1 - beta1) (g - m), and addcmul_ adds (1 - beta2) g g.
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

            # mhat is not computed: its division is made of the step size, which is a number, not a tensor.
            step_size = self.lr / (1 - beta1**t)
            root = v.sqrt() / math.sqrt(1 - beta2**t)  # sqrt(vhat)
            w.addcdiv_(m, root + self.eps, value=-step_size)


def minimize(optimizer, w: Tensor, n_steps: int) -> Tensor:
    """Return w = (x, y) after n_steps on Rosenbrock's function (1 - x)^2 + 100 (y - x^2)^2.

    Its minimum is at (1, 1). w: (2,), a leaf that requires a gradient and that the optimizer changes.
    """
    for _ in range(n_steps):
        x, y = w.unbind()
        w.grad = None
        ((1 - x) ** 2 + 100 * (y - x * x) ** 2).backward()
        optimizer.step()
    return w.detach()


def decayed(l2: bool, n_steps: int = 400) -> list[float]:
    """Return two weights after n_steps with weight decay (l2: as a term of the gradient) of strength 0.5.

    They begin at 1. Their gradients are random, of mean 0 and of standard deviation 0.1 and 10.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.ones(2, dtype=torch.float64)
    optimizer = AdamW([w], lr=0.01, weight_decay=0.0 if l2 else 0.5)
    for _ in range(n_steps):
        w.grad = torch.tensor([0.1, 10.0]) * torch.randn(2, generator=generator, dtype=torch.float64)
        if l2:
            w.grad += 0.5 * w
        optimizer.step()
    return w.tolist()


def main() -> int:
    command.Parser(description="Compare Adam's equations with torch.optim.AdamW.").parse_args()
    start = torch.tensor([-1.5, 2.0], dtype=torch.float64)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    options = {"lr": 0.05, "weight_decay": 0.0}
    a = minimize(AdamW([ours], **options), ours, 1000)
    b = minimize(torch.optim.AdamW([theirs], foreach=False, fused=False, **options), theirs, 1000)
    print(
        f"1000 steps from (-1.5, 2), least at (1, 1): {a.tolist()}, torch's differ by {(a - b).abs().max()}"
    )
    for name, l2 in (("decoupled decay", False), ("L2 in the gradient", True)):
        small, large = decayed(l2)
        print(f"{name}: a weight with gradients of 0.1 is {small:.3f}, one with 10 is {large:.3f}")
    return 0


if __name__ == "__main__":
    command.run(main)
