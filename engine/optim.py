"""Optimizers: which rule updates each parameter, and with which learning rate.

    AdamW    m, v = running means of g, g^2     w -= lr * (m / (sqrt(v) + eps) + weight_decay * w)
             (both divided by 1 - beta^step, since they start at zero; engine/adam.py is its code)
    Muon     M = running mean of the matrix G   W -= lr * (0.2 sqrt(max(shape)) ortho(M) + weight_decay * W)

AdamW (Loshchilov and Hutter 2019) updates each number by itself. Muon (Jordan et al. 2024) updates a matrix
as a whole: it replaces the momentum M by the nearest orthogonal matrix, ortho(M), found by a Newton-Schulz
iteration, so that all singular values of the update are about 1. Both come from torch.optim, except for
Muon's products on a CPU. With either, SAM (Foret et al. 2021) replaces the gradient g by that at the point
nearby where the loss is largest:

    SAM      g <- gradient at w + rho g / |g|   then a step of the optimizer from w, not from that point

This file decides:

    rule              Muon for hidden matrices; AdamW for embeddings, head, norms and biases (Jordan et al.)
    momentum          AdamW's betas 0.9 and 0.95 (GPT-3, Brown et al. 2020, appendix B), or the task's BETAS;
                      Muon's momentum 0.95, Nesterov's
    weight decay      on matrices only, as in BERT's code (Devlin et al. 2018); 0.1 by default, as in GPT-3
    shared rate       an orthogonal A x B matrix has entries of size 1 / sqrt(max(A, B)) (root mean square),
                      and an update of AdamW has entries of 0.2 to 0.4. Muon's factor makes the two equal, so
                      one learning rate and one decay fit both rules (Liu et al. 2025, section 2.2)
    schedule          `learning_rate`, a function of the step
    width transfer    `transfer_width`, for a learning rate that was found at another width
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine import parallel

SAM_RHO = 0.05  # the radius of --optimizer sam (Foret et al. 2021, section 3)
HEADS = ("lm_head", "classifier", "decoder_pred")  # ends of the names of linear layers that are outputs


def learning_rate(step: int, args: Namespace) -> float:
    """Return the learning rate of a step: a linear warm-up to args.lr, and then what args.schedule names.

    "cosine": down to a tenth of args.lr (Hoffmann et al. 2022, appendix B). "constant": args.lr. "wsd"
    (warm-up, stable, decay): args.lr, and in the last fifth of the steps linearly to zero (Hägele et al.
    2024). The warm-up begins at step args.schedule_from, which is 0 except with --extend; the schedule ends
    at args.steps.
    """
    step, n_steps = step - args.schedule_from, args.steps - args.schedule_from
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, n_steps - args.warmup)
    if args.schedule == "cosine":
        return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    if args.schedule == "wsd":
        return args.lr * min(1.0, (1 - done) / 0.2)
    return args.lr


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, args: Namespace) -> float:
    """Set the learning rate of every group, with its factor, for a step. Return it without the factors."""
    lr = learning_rate(step, args)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["lr_factor"]
    return lr


def step_optimizers(optimizers: list[torch.optim.Optimizer], finite: Tensor) -> None:
    """Make one step of each optimizer if finite, a bool () on their device, is True. If it is False, weights
    and optimizer states keep every bit.

    The device makes the decision, so that the host need not wait for it. It waits for an AdamW that is not
    fused, whose steps are counted on the host. Muon needs memory for a copy of its matrices and momenta.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            step_muon(optimizer, finite)
        elif optimizer.param_groups[0]["fused"]:
            # A fused step that finds 1 in found_inf changes nothing: torch.amp.GradScaler skips steps so.
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif finite:
            optimizer.step()


def sharpness_aware(gradient: Callable, run: Any, parts: list) -> Any:
    """Call gradient(run, parts), which adds gradients to p.grad, and return its result. With --sam-rho, call
    it again at the worst point nearby, and leave in p.grad the gradient of that second call alone.

    SAM minimises the largest loss within a distance rho of the weights, to find minima that are flat (Foret
    et al. 2021, equation 1). To first order the largest loss is at w + rho g / |g|. The gradient is taken at
    that point, which is held fixed: the derivative of g by w is left out (equations 2 and 3). SAM costs a
    second forward and backward pass.

    |g| is the norm over all weights that learn, of the gradient of the whole update: of all its micro-batches
    on all ranks. (In the paper each accelerator has its own g, of its part of the batch.) Both calls use the
    same batches and the same dropout, which `gradient` seeds by the step. Clipping, weight decay and --ema
    come after, and depend on the second gradient alone.
    """
    result = gradient(run, parts)
    if run.args.sam_rho:
        with at_worst_point(run.model, run.args.sam_rho):
            gradient(run, parts)
    return result


@contextmanager
def at_worst_point(model: nn.Module, rho: float) -> Iterator[None]:
    """Within the context a model has the weights w + rho g / |g| and no gradients; after it, w to the bit.

    g: p.grad of all parameters that have one; of sharded ones |g| is the norm over all shards. Floating-point
    buffers that the passes change, such as the loads that moe.py counts, get their values back too. If g is
    not finite, the gradient at this point is not finite either, so that the step is left out. The host does
    not wait for the device.
    """
    # Copy the weights, because adding and subtracting the same number does not give back the same bits.
    learning = [p for p in model.parameters() if p.grad is not None]
    kept = [parallel.local(p).detach() for p in learning]
    kept += [b for b in model.buffers() if b.is_floating_point()]
    copies = [tensor.clone() for tensor in kept]

    with torch.no_grad():
        norm = parallel.unshard(nn.utils.get_total_norm([p.grad for p in learning]))
        scale = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a gradient of 0 moves nothing
        for p in learning:
            parallel.local(p).add_(parallel.local(p.grad) * scale)
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)


class Muon(torch.optim.Muon):
    """torch's Muon, on a CPU with its Newton-Schulz iteration in float32.

    On a GPU it is torch's own, in bfloat16. Most CPUs have no instructions for that: a product of 128 x 128
    matrices took 20 times as long as in float32 (AMD EPYC, one core), and a step longer than the gradient.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Make one step as torch's Muon does with Nesterov's momentum and its factor "match_rms_adamw"."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            if any(p.device.type != "cpu" for p in learning):
                super().step(closure)
                return
            for p in learning:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalized(p.grad.lerp(momentum, group["momentum"]), group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalized(matrix: Tensor, group: dict) -> Tensor:
    """Return nearly the orthogonal matrix that is nearest to a matrix, of the same shape.

    The Newton-Schulz iteration is X <- a X + (b A + c A A) X with A = X X^T. It maps each singular value s to
    a s + b s^3 + c s^5, and brings all of them near 1. group: Muon's, with a, b, c, the number of iterations
    and eps.
    """
    # A = X X^T is smaller if X has more columns than rows.
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=group["eps"])  # so that no singular value is above 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@torch.no_grad()
def step_muon(optimizer: torch.optim.Muon, finite: Tensor) -> None:
    """Make one step of Muon, and undo it if finite is False: torch's Muon itself cannot skip a step."""
    # Copy the weights and momenta. Before its first step Muon has no momenta: they are zero.
    tensors = []
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if "momentum_buffer" not in optimizer.state[p]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        tensors += [p, optimizer.state[p]["momentum_buffer"]]
    before = [tensor.clone() for tensor in tensors]

    optimizer.step()

    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


def default_learning_rate(n_params: int) -> float:
    """Return the peak learning rate by a power law of the number of parameters.

    It goes through two points of GPT-3: 6e-4 at 125M parameters and 1.2e-4 at 6.7B (Brown et al. 2020, table
    2.1). Extrapolated down, it is close to the best rate of the size "tiny" too.
    """
    return 6e-4 * (125e6 / n_params) ** 0.4


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of a parameter's initial values and of AdamW's learning rate for width transfer with
    ratio r = base width / width (muP: Tensor Programs V, Yang et al. 2022, tables 3 and 8). For gpt.py and
    moe.py.

                                     initial    learning rate
        embeddings, norms, biases    1          1
        hidden matrices              sqrt(r)    r    outputs are sums over the width. At the start their terms
                                                     are independent; what is learned points in one direction
        router                       r          r    an output: the number of experts does not grow
        final norm                   r          r    in place of the multiplier r of the logits in table 8

    The factors of the final norm have the effect of that multiplier. The logits are W (r g x), where g starts
    at 1, and since AdamW's steps do not depend on the scale of the gradient, a learning rate of r for r g is
    a learning rate of 1 for g. So the head, which may be the embedding matrix, needs no factor. Attention
    keeps its 1 / sqrt(K), because a wider model has more heads, not wider ones.

    Raises ValueError for a parameter without a rule.
    """
    kind = name.removesuffix(".weight")
    if kind.startswith("model.norm") or kind.endswith(".gate"):
        return ratio, ratio
    if kind.endswith("_proj"):
        return math.sqrt(ratio), ratio
    if kind.endswith(("embed_tokens", "embed_positions", "lm_head", "norm", "bias")):
        return 1.0, 1.0
    raise ValueError(f"parameter {name}: width transfer has no rule for it; --mup works with decoders only")


def width_ratio(model: nn.Module, base_width: int) -> float:
    """Return base width / width of a model. Raises ValueError for a model without a d_model."""
    if not hasattr(model.config, "d_model"):
        raise ValueError(f"--mup {base_width}: this model has no d_model; --mup works with decoders only")
    return base_width / model.config.d_model


def lr_factor(name: str) -> float:
    """Return 1, the same factor of the learning rate for all parameters; an adapter's file may have another
    function."""
    return 1.0


def decays(name: str, p: nn.Parameter) -> bool:
    """Return True for tensors of 2 or more dimensions: norms and biases have no weight decay. An adapter's
    file may have another function."""
    return p.ndim >= 2


@torch.no_grad()
def transfer_width(
    model: nn.Module, base_width: int, width_factors: Callable[[str, float], tuple[float, float]]
) -> None:
    """Rescale the fresh weights of a model in place, so that the best learning rate of a model with
    d_model = base_width is the best for this one too; `make_optimizers` needs args.mup = base_width as well.

    The two models must have the same depth and head width; the numbers of heads, d_ff and d_expert must be
    in proportion to d_model. width_factors: the model file's function (name, base width / width) -> (factor
    of the initial values, factor of AdamW's learning rate). Raises ValueError for a parameter without a rule.
    """
    ratio = width_ratio(model, base_width)
    for name, p in model.named_parameters():
        p.mul_(width_factors(name, ratio)[0])


def make_optimizers(
    model: nn.Module,
    args: Namespace,
    *,
    width_factors: Callable[[str, float], tuple[float, float]] = width_factors,
    lr_factor: Callable[[str], float] = lr_factor,
    decays: Callable[[str, nn.Parameter], bool] = decays,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """Return AdamW, and with args.optimizer "muon" also Muon for the hidden matrices. Each parameter group
    has an "lr_factor": its learning rate as a multiple of the scheduled one.

    lr_factor and decays come from an adapter's file, width_factors from the model's file, and AdamW's betas
    from the task's. Stacked experts (3-dimensional) stay with AdamW, because torch's Muon takes matrices
    only.

    With args.mup (the base width) AdamW's factors are those of width_factors. Muon's is sqrt(r), with
    r = base width / width: an update's spectral norm should be proportional to sqrt(fan-out / fan-in), the
    same at all widths (Yang et al. 2023, A Spectral Condition for Feature Learning), but that of
    sqrt(max(shape)) ortho(M) grows as the square root of the width. The decay is divided by the factor, so
    that weights shrink equally fast at every width; otherwise learning rates do not transfer in long runs
    ("independent" decay: Wortsman et al. 2023, section 3.2.2; Kosson et al. 2025, Weight Decay may matter
    more than muP).

    Raises ValueError if args.optimizer is "muon" and no hidden matrix learns.
    """
    # A head's outputs are logits or pixels, not hidden states.
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(HEADS)
    }
    base_width = getattr(args, "mup", None)
    ratio = 1.0 if base_width is None else width_ratio(model, base_width)

    # Sort the parameters that learn: Muon's, and those of AdamW by their settings.
    muon, groups = [], {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        of_width = 1.0 if base_width is None else width_factors(name, ratio)[1]
        if args.optimizer == "muon" and id(p) in hidden:
            muon.append(p)
        else:
            groups.setdefault((decays(name, p), lr_factor(name), of_width), []).append(p)
    if args.optimizer == "muon" and not muon:
        raise ValueError("--optimizer muon: it trains hidden matrices, and none learns here; use adamw")

    # Of Muon's matrices one group; the decay is divided by the factor, see above.
    optimizers = [make_adamw(groups, args, betas)] if groups else []
    if muon:
        factor = math.sqrt(ratio)
        group = {"params": muon, "weight_decay": args.weight_decay / factor, "lr_factor": factor}
        optimizers.append(Muon([group], lr=args.lr, adjust_lr_fn="match_rms_adamw"))

    # Check that nothing is left out or updated twice.
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    learning = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(learning), "each parameter that learns belongs to exactly one group"
    return optimizers


def make_adamw(
    groups: dict[tuple[bool, float, float], list[nn.Parameter]], args: Namespace, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return AdamW with a group for each (has decay, factor of the learning rate, factor of the width)."""
    described = [
        {
            "params": params,
            "weight_decay": args.weight_decay / of_width if decayed else 0.0,
            "lr_factor": factor * of_width,
        }
        for (decayed, factor, of_width), params in groups.items()
    ]
    return torch.optim.AdamW(described, lr=args.lr, betas=betas, fused=args.device in ("cpu", "cuda"))
