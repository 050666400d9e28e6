"""Estimate the memory that a training run needs on each GPU, before it is started.

    python train.py --model gpt --size llama3-8b --batch-size 8 --parallel fsdp --dry-run 8

    weights      4 bytes per parameter: float32, whatever --dtype is
    gradients    4 bytes per parameter that learns
    optimizer    8 bytes per parameter that learns, AdamW's two moments; with Muon 4, see engine/optim.py
    averages     4 bytes per parameter that learns, with --ema
    inputs       of images and sounds: the batch in float32, and the patches that its embeddings read
    activations  what forward keeps for backward, see engine/activations.py; with autocast also a copy of each
                 matrix in 16 bits; with --checkpoint-activations the input of each block, and the rest of one

With AdamW the first three rows add up to 16 bytes per parameter, as for Adam in mixed precision with ZeRO
(Rajbhandari et al. 2020, section 3.1). ZeRO keeps gradients and a copy of the weights in 16 bits; here
gradients are float32, and a copy is made when it is needed. With --parallel fsdp each of N processes holds
ceil(rows / N) rows of every parameter, gradient, moment and average, and all weights of the block that it
computes.

During backward, gradients replace activations block by block, so the peak is the maximum over five moments:
at the loss, in the last block, in the first block, at the embeddings, in the optimizer's update. With ddp, or
between the batches of --grad-accum, all gradients exist all the time (with fsdp between batches: unsharded).

The estimate is for the kernels in kernels/. With --compile it is an upper bound, because torch.compile
computes cheap activations again.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from engine import activations
from engine.activations import Loss, Precision, reached_by_backward, stacks, unpacked_bytes
from engine.contract import resolve
from engine.optim import make_optimizers
from engine.options import check_arguments, fill_defaults
from engine.run import choose_weights, configure
from engine.settings import task_settings
from engine.trainable import count, flops_per_token

MOMENTS = ("loss", "last block", "first block", "embeddings", "update")
GPUS = (24, 40, 80, 141, 192)  # GB
USABLE = 0.9  # share of a GPU's memory; the rest is for what the estimate leaves out


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, or in one process."""

    parts: dict[str, tuple[int, ...]]  # one number for each of MOMENTS

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def total(self) -> int:
        return max(self.totals)


class Block(NamedTuple):
    """Bytes of one block in backward, for all tokens of a batch."""

    input: int  # what --checkpoint-activations keeps
    copies: int  # autocast's copies of its matrices
    kept: int  # all that forward keeps, with the copies
    backward: int  # gradients of activations, and a 4-bit weight that is unpacked


def estimate(
    model: nn.Module,
    args: Namespace,
    n_processes: int = 1,
    *,
    config: Any = None,
    mlp_bytes: Callable[[nn.Module, Any, Precision], tuple[int, int]] = activations.mlp_bytes,
    adapter_bytes: Callable[[nn.Module, Any, Precision], int] = activations.adapter_bytes,
    tokens_per_row: Callable[[nn.Module, Any, int], list[int]] = activations.tokens_per_row,
    loss_bytes: Callable[[nn.Module, Any, int, int, Precision], dict[str, int]] = activations.loss_bytes,
) -> Estimate:
    """Return what one of n_processes needs to train a model, which may be on torch.device("meta").

    args: the flags of train.py. config: the task's, for tokens_per_row and loss_bytes. The four functions are
    described in engine/activations.py. Raises ValueError as `check` does.
    """
    check(args, n_processes)
    n_rows, fsdp, low = args.batch_size // n_processes, args.parallel == "fsdp", args.dtype == "bfloat16"
    parameters = list(model.parameters())
    r = 2 if fsdp and low else parameters[0].element_size()  # adapters may have a base in 16 bits
    precision = Precision(2 if low else 4, r, low and not fsdp)

    weights, gradients, states, copies = training_state(model, args, n_processes if fsdp else 1)
    loss = Loss(**loss_bytes(model, config, n_rows * args.seq_len, args.seq_len, precision))
    found = stacks(model)
    blocks = [
        block_bytes(block, stack.owner.config, n_rows * tokens, precision, mlp_bytes, adapter_bytes)
        for stack, tokens in zip(found, tokens_per_row(model, config, args.seq_len), strict=True)
        for block in reached_by_backward(stack)
    ]

    # Forward keeps everything. With --checkpoint-activations it keeps the inputs of blocks, backward computes
    # one block at a time again, and autocast's copies exist until forward has ended.
    at_loss, again, released = sum(block.kept for block in blocks), 0, 0
    if args.checkpoint_activations:
        at_loss, released = sum(block.input for block in blocks), sum(block.copies for block in blocks)
        again = max((b.kept for b in blocks), default=0) - max((b.input for b in blocks), default=0)

    # Gradients remain between the batches of an update, with FSDP unsharded. DDP has buffers for all of them.
    remaining = 0
    if args.parallel == "ddp" or args.grad_accum > 1:
        remaining = 4 * count(parameters)[1] if fsdp else gradients
    in_last = remaining or (0 if fsdp else 4 * loss.head)
    later = max(remaining, gradients)
    backward, at_end = max((b.backward for b in blocks), default=0), 0 if fsdp else 4 * loss.tied

    parts = {
        "weights": (weights,) * 5,
        "gradients": (remaining + loss.ready, in_last, later, later, gradients),
        "optimizer states": (states,) * 5,
        **({"averages": (gradients,) * 5} if args.ema else {}),
        **({"copies of SAM": (gradients,) * 4 + (0,)} if args.sam_rho else {}),
        **({"inputs": (loss.inputs,) * 4 + (0,)} if loss.inputs else {}),
        "activations": (at_loss + loss.kept, at_loss + again, blocks[0].kept if blocks else 0, 0, 0),
        "temporary": (loss.temporary + released, backward, backward, at_end, copies),
    }
    if fsdp:
        every_block = [block for stack in found for block in stack.blocks]
        parts["unsharded"] = unsharded_bytes(parameters, every_block, loss, precision.e)
    return Estimate(parts)


def check(args: Namespace, n_processes: int) -> None:
    """Raise ValueError for a batch that n_processes cannot share, for several without --parallel, and for
    --kernels reference, which keeps scores and logits."""
    if args.parallel == "none" and n_processes > 1:
        raise ValueError(f"{n_processes} processes: add --parallel ddp or --parallel fsdp")
    if args.batch_size % n_processes:
        raise ValueError(
            f"--batch-size {args.batch_size}: expected a multiple of the {n_processes} processes"
        )
    if args.kernels == "reference":
        raise ValueError("--kernels reference: for tests only, its memory is not estimated; use auto")


def training_state(model: nn.Module, args: Namespace, n_shards: int) -> tuple[int, int, int, int]:
    """Return the bytes of weights and buffers, gradients, optimizer states, and copies that Muon's step makes
    (`optim.step_muon`), of the rank with the most rows."""
    shards = {
        p: math.ceil(p.shape[0] / n_shards) * (p.numel() // p.shape[0]) * p.element_size()
        for p in model.parameters()
    }
    weights = sum(shards.values()) + sum(b.numel() * b.element_size() for b in model.buffers())
    gradients = sum(size for p, size in shards.items() if p.requires_grad)
    states = copies = 0
    settings = Namespace(**vars(args) | {"lr": 0.0, "mup": None, "device": "meta"})
    for optimizer in make_optimizers(model, settings):
        updated = sum(shards[p] for group in optimizer.param_groups for p in group["params"])
        is_muon = isinstance(optimizer, torch.optim.Muon)
        states += updated * (1 if is_muon else 2)
        copies += updated * 2 * is_muon
    return weights, gradients, states, copies


def block_bytes(
    block: nn.Module, config: Any, n: int, precision: Precision, mlp_bytes: Callable, adapter_bytes: Callable
) -> Block:
    """Return what one block needs for n tokens."""
    e, r, autocast = precision
    matrices = [p for p in block.parameters() if p.ndim > 1 and p.dtype == torch.float32]
    copies = e * count(matrices)[0] if autocast else 0
    in_mlp, mlp_gradients = mlp_bytes(block, config, precision)
    kept = activations.attention_bytes(config, precision) + in_mlp + adapter_bytes(block, config, precision)
    gradients = 2 * config.d_model * r + mlp_gradients
    unpacked = unpacked_bytes(block.buffers())
    return Block(n * config.d_model * r, copies, n * kept + copies, n * gradients + unpacked)


def unsharded_bytes(
    parameters: list[nn.Parameter], blocks: list[nn.Module], loss: Loss, e: int
) -> tuple[int, ...]:
    """Return the bytes that FSDP holds unsharded at each of MOMENTS.

    Weights outside the blocks stay until backward has ended. In a block there are its own weights, those of
    the next block, which are gathered meanwhile, its gradient, and the gradient of the block before in
    float32, which is being reduced. (That is a block in the middle; the first and the last have fewer.)
    """
    inside = {p for block in blocks for p in block.parameters()}
    root, root_learns = count(p for p in parameters if p not in inside)
    block, block_learns = max(count(block.parameters()) for block in blocks)
    in_block = e * (root + loss.head + 2 * block) + (e + 4) * block_learns
    at_end = max(e * (root + root_learns + loss.tied), (e + 4) * root_learns)
    return e * root, in_block, in_block, at_end, 0


def describe(model: nn.Module, args: Namespace, n_processes: int = 1, **functions) -> str:
    """Return the estimate as text, and if it fits no GPU, the flags that would reduce it. Arguments and
    errors are those of `estimate`."""
    estimated = estimate(model, args, n_processes, **functions)
    of_stacks = functions.get("tokens_per_row", activations.tokens_per_row)
    tokens = dict.fromkeys(of_stacks(model, functions.get("config"), args.seq_len))
    at_once = f"{args.batch_size // n_processes} x {' and '.join(f'{n:,}' for n in tokens)} tokens at once"
    flags = f"--parallel {args.parallel} --dtype {args.dtype} --optimizer {args.optimizer}"

    # The table: a row for each part, a column for each moment.
    lines = ["planned for GPUs (CUDA or ROCm); this machine needs none"]
    lines += [f"GPU 1 of {n_processes}, {at_once}, {flags}", ""]
    lines.append(f"{'GB':18}" + "".join(f"{moment:>13}" for moment in MOMENTS))
    for name, sizes in (*estimated.parts.items(), ("together", estimated.totals)):
        lines.append(f"{name:18}" + "".join(f"{size / 1e9:13.2f}" for size in sizes))

    # The peak, and the GPUs that are large enough for it.
    peak = MOMENTS[estimated.totals.index(estimated.total)]
    fits = ", ".join(str(size) for size in GPUS if estimated.total <= USABLE * size * 1e9)
    lines += ["", f"the most   {estimated.total / 1e9:.2f} GB, at: {peak}"]
    lines.append(f"fits       {f'a GPU of {fits} GB' if fits else 'no GPU'}; a tenth is left for the rest:")
    lines.append("           CUDA itself (about 0.5 GB), buffers of NCCL, fragments of free memory")
    if not fits:
        lines += advice(model, args, n_processes, estimated.total, **functions)
    return "\n".join(lines)


def advice(model: nn.Module, args: Namespace, n_processes: int, total: int, **functions) -> list[str]:
    """Return a line for each change of flags that would reduce the total."""
    rows = args.batch_size // n_processes
    more = 2 * n_processes if args.parallel == "fsdp" else max(8, n_processes)
    changes = [{"checkpoint_activations": True}, {"dtype": "bfloat16"}]
    changes.append({"parallel": "fsdp", "batch_size": rows * more, "dry_run": more})
    if rows % 2 == 0:
        changes.append({"batch_size": rows // 2 * n_processes, "grad_accum": 2 * args.grad_accum})

    lines = []
    for change in changes:
        changed = Namespace(**vars(args) | change)
        reduced = estimate(model, changed, change.get("dry_run", n_processes), **functions).total
        if reduced < total:
            flags = " ".join(
                f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}")
                for flag, value in change.items()
            )
            lines.append(f"{reduced / 1e9:9.2f} GB with {flags}")
    return lines


def plan(args: Namespace) -> str:
    """Return what --dry-run prints: the memory that the run would need on GPUs, which need not be there.

    A new model is made without memory for its weights; a pretrained one, such as an adapter's base, is read
    from disk. The vocabulary or the classes are those of --size, whatever the data has, and --dtype is by
    default that of a GPU. Raises ValueError for flags that do not fit, and for a model whose layers read no
    tokens.
    """
    check_arguments(args)
    concept = resolve(args)
    fill_defaults(args, concept)
    args.dtype = args.dtype or "bfloat16"
    model, config = configure(concept, args)
    if config.max_seq_len == 1 and concept.task.tokens_per_row is None:
        raise ValueError(
            f"--dry-run: plans layers of tokens, and {args.model} has others; --benchmark measures its memory"
        )
    if model is None:
        with torch.device("meta"):
            model = concept.model_file.Model(config)
    adapter_config, _ = choose_weights(concept, model, args)
    settings = task_settings(concept, model.config, args.set)
    with torch.device("meta"):
        model = concept.task.wrap(model, settings)

    # Functions of the concept's files take the place of those in engine/activations.py.
    functions = {"mlp_bytes": concept.model_file.mlp_bytes, "loss_bytes": concept.task.loss_bytes}
    functions["tokens_per_row"] = concept.task.tokens_per_row
    if concept.adapter is not None:
        functions["adapter_bytes"] = concept.adapter.adapter_bytes
    of_concept = {name: function for name, function in functions.items() if function is not None}
    described = describe(model, args, args.dry_run, config=settings, **of_concept)

    # The FLOPs: divided by the FLOP/s that a GPU reaches, they are the time of a run.
    n_params, n_trained = count(model.parameters())
    flops = flops_per_token(concept, model, settings, adapter_config, args.seq_len) * (1 + bool(args.sam_rho))
    unit = "token" if model.config.max_seq_len > 1 else "image (or second of sound)"
    rate = f"{1e12 / flops:,.0f} a second for each TFLOP/s"
    return (
        f"{described}\nmodel      {n_params:,} parameters, {n_trained:,} of which learn\n"
        f"work       {flops:.2e} FLOPs for each {unit}, forward and backward: {rate}"
    )
