"""Which parameters are updated by which rule, and how fast.

    AdamW    m, v = running means of g, g^2     w -= lr * (m / (sqrt(v) + eps) + weight_decay * w)
    Muon     M = running mean of the matrix G   W -= lr * (0.2 sqrt(max(shape)) ortho(M) + weight_decay * W)

AdamW (Loshchilov and Hutter 2019) treats each number alone. Muon (Jordan et al. 2024) treats a matrix as
one thing: it takes the nearest orthogonal matrix to the momentum, by a Newton-Schulz iteration, so that
every direction moves equally far. Both come from torch.optim; what is decided here is who gets which, and
how fast each learns:

    who         Muon the hidden matrices; AdamW embeddings, head, norms and biases (Jordan et al. 2024)
    momentum    AdamW 0.9 and 0.95 (GPT-3, Brown et al. 2020, appendix B); Muon Nesterov's, 0.95
    decay       of matrices only, as in BERT's code (Devlin et al. 2018); 0.1 by default, as in GPT-3
    one rate    the numbers in an orthogonal matrix A x B are 1 / sqrt(max(A, B)) large (root mean square),
                those in an update of AdamW 0.2 to 0.4; hence Muon's factor, with which the same learning
                rate and decay serve both (Liu et al. 2025, section 2.2)
    course      `learning_rate`, a function of the step
    width       `transfer_width`, for a learning rate that was found at another width
"""

import math
from argparse import Namespace

import torch
from torch import Tensor, nn


def default_learning_rate(n_params: int) -> float:
    """A power law through GPT-3's peak rates: 6e-4 at 125M parameters, 1.2e-4 at 6.7B (Brown et al. 2020,
    table 2.1). Carried on below, it is close to the best for the tiny size too."""
    return 6e-4 * (125e6 / n_params) ** 0.4


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """How width changes a parameter of gpt.py or moe.py: the factors of its initial values and of AdamW's
    learning rate, for ratio r = base width / width (muP: Tensor Programs V, Yang et al. 2022, tables 3, 8).

        embeddings, norms, biases    1          1
        hidden matrices              sqrt(r)    r    outputs are sums over the width: of independent terms at
                                                     the start, but what is learned all points one way
        router                       r          r    an output: as many experts at any width
        final norm                   r          r    in place of table 8's multiplier r of the logits

    The last is the same thing: the logits are W (r g x), where g starts at 1, and as AdamW's steps do not
    depend on the gradient's scale, r times the learning rate for r g is the learning rate itself for g. So
    the head, which may be the embeddings, stays as it is. Attention keeps its 1 / sqrt(K), because a wider
    model has more heads and not wider ones.

    ValueError for a parameter of another model file.
    """
    if not name.startswith(("model.", "lm_head.")):
        raise ValueError(f"parameter {name}: width transfer has no rule for it; it serves gpt.py and moe.py")
    name = name.removesuffix(".weight")
    if name.startswith("model.norm") or name.endswith(".gate"):
        return ratio, ratio
    if name.endswith("_proj"):
        return math.sqrt(ratio), ratio
    return 1.0, 1.0


@torch.no_grad()
def transfer_width(model: nn.Module, base_width: int) -> None:
    """Rescale, in place, the fresh weights of a model, so that a learning rate that was found for one of
    d_model = base_width is as good for it, with args.mup in `make_optimizers`.

    Both must have the same depth and head width, and numbers of heads, d_ff and d_expert in proportion to
    d_model. ValueError as from `width_factors`.
    """
    for name, p in model.named_parameters():
        p.mul_(width_factors(name, base_width / model.config.d_model)[0])


def make_optimizers(model: nn.Module, args: Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, and with args.optimizer "muon" Muon for the hidden matrices; each group of parameters has its
    "lr_factor", by which the learning rate is multiplied.

    The stacked experts of moe.py stay with AdamW: torch's Muon takes nothing but matrices.

    With args.mup, a d_model, factors follow from the width. Those of AdamW are in `width_factors`. For Muon
    it is sqrt(r): an update's spectral norm should be as sqrt(fan-out / fan-in), the same at all widths (Yang
    et al. 2023, A Spectral Condition for Feature Learning), and that of sqrt(max(shape)) ortho(M) grows as
    the square root of the width. The factor is taken out of the decay, so that weights shrink as fast at
    every width, without which learning rates do not transfer in long runs ("independent" decay: Wortsman et
    al. 2023, section 3.2.2; Kosson et al. 2025, Weight Decay may matter more than muP).
    """
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    factor_of = getattr(model, "lr_factor", lambda name: 1.0)
    decays = getattr(model, "decays", lambda name, p: p.ndim >= 2)
    base_width = getattr(args, "mup", None)
    ratio = 1.0 if base_width is None else base_width / model.config.d_model
    muon, groups = [], {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        of_width = 1.0 if base_width is None else width_factors(name, ratio)[1]
        if args.optimizer == "muon" and id(p) in hidden:
            muon.append(p)
        else:
            groups.setdefault((decays(name, p), factor_of(name), of_width), []).append(p)
    if args.optimizer == "muon" and not muon:
        raise ValueError("--optimizer muon: it trains whole matrices, of which none learns here; use adamw")
    adamw = [
        {
            "params": params,
            "weight_decay": args.weight_decay / of_width if decayed else 0.0,
            "lr_factor": factor * of_width,
        }
        for (decayed, factor, of_width), params in groups.items()
    ]
    fused = args.device in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(adamw, lr=args.lr, betas=(0.9, 0.95), fused=fused)] if adamw else []
    if muon:
        factor = math.sqrt(ratio)
        group = {"params": muon, "weight_decay": args.weight_decay / factor, "lr_factor": factor}
        optimizers.append(torch.optim.Muon([group], lr=args.lr, adjust_lr_fn="match_rms_adamw"))
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


def step(optimizers: list[torch.optim.Optimizer], finite: Tensor) -> None:
    """One step of each where finite, a bool () on their device, is True; else weights and states stay as they
    are, to the bit. The device decides that by itself, so the host need not wait for it, except where AdamW
    is not fused, as it then counts its steps on the host. Muon needs room for a copy of its matrices and
    momenta."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            step_muon(optimizer, finite)
        elif optimizer.param_groups[0]["fused"]:
            # These attributes are how torch.amp.GradScaler has a fused step left out.
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif finite:
            optimizer.step()


@torch.no_grad()
def step_muon(optimizer: torch.optim.Muon, finite: Tensor) -> None:
    """`step` of Muon, which has no way of its own to leave one out: what was there before is put back."""
    tensors = []
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if "momentum_buffer" not in optimizer.state[p]:  # as Muon itself would begin
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        tensors += [p, optimizer.state[p]["momentum_buffer"]]
    before = [tensor.clone() for tensor in tensors]
    optimizer.step()
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))
