"""Which parameters are updated by which rule, and how fast.

    AdamW    m, v = running means of g, g^2     w -= lr * (m / (sqrt(v) + eps) + weight_decay * w)
    Muon     M = running mean of the matrix G   W -= lr * (0.2 sqrt(max(shape)) ortho(M) + weight_decay * W)

AdamW (Loshchilov and Hutter 2019) treats each number alone. Muon (Jordan et al. 2024) treats a matrix as
one thing: it takes the nearest orthogonal matrix to the momentum, by a Newton-Schulz iteration, so that
every direction moves equally far. Both come from torch.optim; what is decided here is who gets which, and
the learning rate's course.
"""

import math
from argparse import Namespace

import torch
from torch import nn


def default_learning_rate(n_params: int) -> float:
    """A power law through GPT-3's peak rates: 6e-4 at 125M parameters, 1.2e-4 at 6.7B (Brown et al. 2020,
    table 2.1). Carried on below, it is close to the best for the tiny size too."""
    return 6e-4 * (125e6 / n_params) ** 0.4


def make_optimizers(model: nn.Module, args: Namespace) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), decaying matrices only; or Muon (Jordan et al. 2024) for the hidden
    matrices, with its update scaled to AdamW's so that one learning rate serves both (Liu et al. 2025).

    The stacked experts of moe.py stay with AdamW: torch's Muon takes nothing but matrices."""
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    factor_of = getattr(model, "lr_factor", lambda name: 1.0)
    decays = getattr(model, "decays", lambda name, p: p.ndim >= 2)
    muon, groups = [], {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if args.optimizer == "muon" and id(p) in hidden:
            muon.append(p)
        else:
            groups.setdefault((decays(name, p), factor_of(name)), []).append(p)
    if args.optimizer == "muon" and not muon:
        raise ValueError("--optimizer muon: it trains whole matrices, of which none learns here; use adamw")
    adamw = [
        {"params": params, "weight_decay": args.weight_decay if decayed else 0.0, "lr_factor": factor}
        for (decayed, factor), params in groups.items()
    ]
    fused = args.device in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(adamw, lr=args.lr, betas=(0.9, 0.95), fused=fused)] if adamw else []
    if muon:
        muon = [{"params": muon, "lr_factor": 1.0}]
        optimizers.append(
            torch.optim.Muon(muon, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def learning_rate(step: int, args: Namespace) -> float:
    """Linear warm-up; then cosine to a tenth (Hoffmann et al. 2022, appendix B), constant, or warm-up,
    stable, decay: constant until the last fifth, which falls linearly to zero (Hägele et al. 2024)."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.schedule == "cosine":
        return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    if args.schedule == "wsd":
        return args.lr * min(1.0, (1 - done) / 0.2)
    return args.lr
