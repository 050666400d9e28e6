"""How much memory a training run needs on each GPU, told before it is started.

    weights      4 bytes a parameter: float32, whatever --dtype is
    gradients    4 bytes a parameter that learns
    optimizer    8 bytes, AdamW's two moments; 4 where Muon has one, see engine/optim.py

That is what ZeRO counts as 16 bytes for Adam in mixed precision (Rajbhandari et al. 2020, section 3.1): its
copies in 16 bits are made here as they are needed. With --parallel fsdp each of N processes has of every
parameter ceil(rows / N) rows, with their gradients and moments, and of the block at work all the weights.

    activations  what the forward pass keeps for the backward pass

Per token a block keeps these numbers, of e bytes in products (float32 4, bfloat16 2) and of r bytes in the
stream between the blocks (4; 2 with fsdp in bfloat16):

    2 D r               what its two norms are given
    D e                 what q, k and v are made of; under autocast 3 D e, a copy for each
    (H + G) K e         q and k before their norms, with qk_norm
    2 (H + G) K e       q, k, v, and the output of attention, which its projection is given
    4 H                 the logarithm of each softmax's denominator
    D e                 what the MLP is given; under autocast 2 D e for gate and up
    2 F e or 4 F e      x and gelu(x); or of gated MLPs gate, up, act(gate) and the product

and in place of the last two, in a sparse layer of moe.py with k of E experts for a token:

    4 D + 4 E + 32 k    what the router is given, its scores, and who goes where
    k (2 D e + 4 D)     rows for the experts and rows from them, and those times the router's weights
    4 k F e             inside the experts; a shared expert keeps what an MLP of its width does

For GPT-2 with fsdp in bfloat16 that is 32 D + 4 H bytes: Korthikanti et al.'s 34 D (2022, section 4.1) less
the masks of two dropouts, which are not here, and without their 5 H T of scores, which fused attention does
not keep. Autocast also keeps a copy in 16 bits of each matrix. Adapters of lora.py keep what is between A and
B, or the outputs that they scale; below all that learns nothing is kept. --checkpoint-activations leaves D r
of each block, and the rest of one at a time.

Block by block, backward puts gradients in the place of activations. So not all is there at once, and what
counts is the worst of five moments: forward has ended at the loss; backward is in the last block; it is in
the first; it has come to the embeddings; the optimizer updates the weights. With ddp, or between the batches
of --grad-accum, gradients are there all the time; with fsdp between batches not an N-th but whole.

    python train.py --model gpt --size llama3-8b --batch-size 8 --parallel fsdp --dry-run 8

It is an estimate for the kernels of this package, from above where torch.compile keeps less, since it
computes again what is cheap, and for IA3. What is less than a percent is left out: statistics of norms,
angles of rotary positions.

Shapes: D model width, H heads, G key/value heads, K head width, F inner width of the MLP, V vocabulary.
"""

import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from bert import BERT
from engine.optim import make_optimizers
from kernels.cross_entropy import rows_per_chunk
from moe import MoE
from posttraining.nf4 import NF4

MOMENTS = ("loss", "last block", "first block", "embeddings", "update")
GPUS = (24, 40, 80, 141, 192)  # GB
USABLE = 0.9  # of them: the rest is for what is not in the plan


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU, or in one process."""

    parts: dict[str, tuple[int, ...]]  # each at all of MOMENTS

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.parts.values(), strict=True)))

    @property
    def total(self) -> int:
        return max(self.totals)


class Precision(NamedTuple):
    e: int  # bytes of a number that is multiplied by a weight
    r: int  # bytes of a number between blocks
    autocast: bool


class Loss(NamedTuple):
    """Bytes, from the last block's output to the loss."""

    kept: int
    temporary: int
    ready: int  # the head's gradient, where the forward pass leaves it
    head: int  # numbers in that gradient; 0 where the head does not learn
    sums: int  # numbers in its gradient as the embeddings, if it is tied to them, and in the sum of the two


def share(p: nn.Parameter, n: int) -> int:
    """Bytes of the first process's rows of p, which n share."""
    return math.ceil(p.shape[0] / n) * (p.numel() // p.shape[0]) * p.element_size()


def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers they are, and how many of them learn."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(learns for _, learns in sizes)


def is_sparse(block: nn.Module) -> bool:
    return isinstance(getattr(block, "mlp", None), MoE)


def kept_per_token(block: nn.Module, config, precision: Precision) -> int:
    """Bytes that a block of gpt.py, moe.py or bert.py keeps per token: the tables above, term by term."""
    e, r, autocast = precision
    D, H, F = config.d_model, config.n_heads, config.d_ff
    G, K = getattr(config, "n_kv_heads", H), getattr(config, "d_head", D // H)
    kept = 2 * D * r + D * e * (3 if autocast else 1) + 2 * (H + G) * K * e + 4 * H
    if getattr(config, "qk_norm", False):
        kept += (H + G) * K * e
    given = D * e * (2 if autocast and config.mlp == "swiglu" else 1)
    if is_sparse(block):
        k, E, F, n_shared = config.top_k, config.n_experts, config.d_expert, config.n_shared_experts
        kept += 4 * D + 4 * E + 32 * k + k * (2 * D * e + 4 * D) + 4 * k * F * e
        if n_shared:  # in float32 they are given the very numbers that the router is
            kept += 4 * n_shared * F * e + (given if e == 2 else 0)
    else:
        kept += given + (2 if config.mlp.startswith("gelu") else 4) * F * e
    for name, p in block.named_parameters():  # of adapters
        rows = config.top_k if p.ndim == 3 else 1  # stacked experts have k rows for a token
        if name.endswith("lora_A"):
            kept += rows * p.shape[-2] * e
        elif name.endswith("lora_magnitude_vector"):  # g (W x) and g (B A x)
            kept += rows * 2 * p.shape[-1] * e
        elif name.endswith("ia3_l"):
            kept += rows * max(p.shape[-2:]) * e
    return kept


def copied(block: nn.Module, precision: Precision) -> int:
    """Bytes of autocast's copies of a block's matrices."""
    if not precision.autocast:
        return 0
    return precision.e * count(p for p in block.parameters() if p.ndim > 1 and p.dtype == torch.float32)[0]


def gradients_per_token(block: nn.Module, config, precision: Precision) -> int:
    """Bytes of the gradients of activations that are there at once: two of the stream, two in the MLP."""
    e, r, _ = precision
    in_mlp = 2 * config.d_ff * e
    if is_sparse(block):
        in_mlp = config.top_k * (2 * config.d_expert * e + config.d_model * (4 + e))
    return 2 * config.d_model * r + in_mlp


def unpacked(module: nn.Module) -> int:
    """Bytes of the largest matrix that posttraining/nf4.py has in 4 bits, which becomes float32 for its product."""
    return 4 * max((packed.numel() for packed in module.modules() if isinstance(packed, NF4)), default=0)


def loss_needs(model: nn.Module, n: int, seq_len: int, precision: Precision) -> Loss:
    """For n tokens in rows of seq_len."""
    e, r, autocast = precision
    config, V = model.config, model.config.vocab_size
    if isinstance(model, BERT):
        # Kept: a log-softmax at each masked place, of which backward makes two more, and two norms' inputs.
        n_logits = n // seq_len * config.n_masked(seq_len) * V * (config.mlm_head + config.span_boundary)
        n_head = V * config.d_embedding * config.mlm_head
        kept = 4 * n_logits + n * r * (config.d_embedding + config.d_model * config.pre_norm)
        learns = any(p.requires_grad for p in model.cls.parameters())
        return Loss(kept + n_head * e * autocast, 8 * n_logits, 0, n_head * learns, 2 * n_head * learns)
    # See kernels/cross_entropy.py: forward already computes the gradients of the hidden states and the head.
    D = config.d_model
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    n_head = V * D * any(p.requires_grad for p in head.parameters())
    chunk = rows_per_chunk(n, D, V, "cuda") * V * e + V * D * e * autocast + unpacked(head)
    sums = n_head if model.lm_head is None else 0  # added in place
    return Loss(n * D * (r + e), n * D * e + max(chunk, 4 * n_head), 4 * n_head, n_head, sums)


def piles(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each pile of blocks, in the order of use, and the module that has it and its Config; language/electra.py has two
    of them."""
    if hasattr(model, "base_model"):  # lora.py
        return piles(model.base_model)
    if hasattr(model, "discriminator"):
        return piles(model.discriminator) + (piles(model.generator) if model.generator is not None else [])
    blocks = model.bert.encoder.layer if isinstance(model, BERT) else model.model.layers
    return [(model, [blocks[i % len(blocks)] for i in range(model.config.n_layers)])]


def passed_back(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """The blocks that backward goes through: from the lowest on in which something learns, or below it."""
    if any(p.requires_grad for name, p in model.named_parameters() if "embed" in name):
        return blocks
    lowest = [i for i, block in enumerate(blocks) if count(block.parameters())[1]]
    return blocks[lowest[0] :] if lowest else []


def plan(model: nn.Module, args: Namespace, n_processes: int = 1) -> Plan:
    """What one of n_processes needs to train model, which may be made under torch.device("meta").

    args: train.py's, of which batch_size, grad_accum, seq_len, dtype, optimizer, parallel, kernels and
    checkpoint_activations count. Raises ValueError for a batch that n_processes cannot share, for several
    without --parallel, and for --kernels reference, which keeps scores and logits.
    """
    if args.parallel == "none" and n_processes > 1:
        raise ValueError(f"{n_processes} processes: add --parallel ddp or --parallel fsdp")
    if args.batch_size % n_processes:
        raise ValueError(
            f"--batch-size {args.batch_size}: expected a multiple of the {n_processes} processes"
        )
    if args.kernels == "reference":
        raise ValueError("--kernels reference: it is no way to train, and there is no plan for it; use auto")
    fsdp, low = args.parallel == "fsdp", args.dtype == "bfloat16"
    n = args.batch_size // n_processes * args.seq_len  # tokens
    parameters = list(model.parameters())
    r = 2 if fsdp and low else parameters[0].element_size()  # lora.py's base may be in 16 bits
    precision = Precision(2 if low else 4, r, low and not fsdp)

    shares = {p: share(p, n_processes if fsdp else 1) for p in parameters}
    weights = sum(shares.values()) + sum(b.numel() * b.element_size() for b in model.buffers())
    gradients = sum(size for p, size in shares.items() if p.requires_grad)
    states = set_aside = 0
    for optimizer in make_optimizers(model, Namespace(**vars(args) | {"lr": 0.0, "device": "meta"})):
        updated = sum(shares[p] for group in optimizer.param_groups for p in group["params"])
        is_muon = isinstance(optimizer, torch.optim.Muon)
        states += updated * (1 if is_muon else 2)
        set_aside += updated * 2 * is_muon  # weights and momenta as they were, see optim.step_muon

    blocks, kept, given, copies, in_block, losses = [], [], [], [], [], []
    for owner, pile in piles(model):
        blocks += pile
        losses.append(loss_needs(owner, n, args.seq_len, precision))
        for block in passed_back(owner, pile):
            given.append(n * owner.config.d_model * r)
            copies.append(copied(block, precision))
            kept.append(n * kept_per_token(block, owner.config, precision) + copies[-1])
            in_block.append(n * gradients_per_token(block, owner.config, precision) + unpacked(block))
    loss = Loss(*map(sum, zip(*losses, strict=True)))
    at_loss, again, let_go = sum(kept), 0, 0
    if args.checkpoint_activations:  # autocast's copies go when forward has ended
        at_loss, again, let_go = sum(given), max(kept, default=0) - max(given, default=0), sum(copies)

    # Gradients stay between the batches of an update, with FSDP whole; DDP has room for them all the time.
    stay = 0
    if args.parallel == "ddp" or args.grad_accum > 1:
        stay = 4 * count(parameters)[1] if fsdp else gradients
    in_last = stay or (0 if fsdp else 4 * loss.head)
    backward, at_end = max(in_block, default=0), 0 if fsdp else 4 * loss.sums
    passed = max(stay, gradients)
    parts = {
        "weights": (weights,) * 5,
        "gradients": (stay + loss.ready, in_last, passed, passed, gradients),
        "optimizer states": (states,) * 5,
        "activations": (at_loss + loss.kept, at_loss + again, kept[0] if kept else 0, 0, 0),
        "temporary": (loss.temporary + let_go, backward, backward, at_end, set_aside),
    }
    if fsdp:
        parts["whole for a while"] = put_together(parameters, blocks, loss, precision.e)
    return Plan(parts)


def put_together(parameters, blocks: list[nn.Module], loss: Loss, e: int) -> tuple[int, ...]:
    """What FSDP has whole, at each of MOMENTS. The weights outside the blocks are there until backward ends.
    In a block there are also its own and, on their way, the next one's; its gradient; and in float32 the
    gradient of the block before, which is being added up over the processes. (That is a block in the middle;
    the last has none before it, and the first no next one.)"""
    inside = {p for block in blocks for p in block.parameters()}
    root, root_learns = count(p for p in parameters if p not in inside)
    block, block_learns = max(count(block.parameters()) for block in blocks)
    in_block = e * (root + loss.head + 2 * block) + (e + 4) * block_learns
    at_end = max(e * (root + root_learns + loss.sums), (e + 4) * root_learns)
    return e * root, in_block, in_block, at_end, 0


def report(model: nn.Module, args: Namespace, n_processes: int = 1) -> str:
    """The plan as text; where it fits no GPU, also what would help. Arguments and errors as for `plan`."""
    planned = plan(model, args, n_processes)
    at_once = f"{args.batch_size // n_processes} x {args.seq_len:,} tokens at once"
    flags = f"--parallel {args.parallel} --dtype {args.dtype} --optimizer {args.optimizer}"
    lines = [f"GPU 1 of {n_processes}, {at_once}, {flags}", ""]
    lines.append(f"{'GB':18}" + "".join(f"{moment:>13}" for moment in MOMENTS))
    for name, sizes in (*planned.parts.items(), ("together", planned.totals)):
        lines.append(f"{name:18}" + "".join(f"{size / 1e9:13.2f}" for size in sizes))
    most = MOMENTS[planned.totals.index(planned.total)]
    fits = ", ".join(str(size) for size in GPUS if planned.total <= USABLE * size * 1e9)
    lines += ["", f"the most   {planned.total / 1e9:.2f} GB, at: {most}"]
    lines.append(
        f"fits       {f'a GPU of {fits} GB' if fits else 'no GPU'}, with a tenth left for what is not here:"
    )
    lines.append("           CUDA itself (about 0.5 GB), buffers of NCCL, fragments of free memory")
    if not fits:
        lines += advice(model, args, n_processes, planned.total)
    return "\n".join(lines)


def advice(model: nn.Module, args: Namespace, n_processes: int, total: int) -> list[str]:
    """A line for each change of flags that would bring the total down."""
    rows = args.batch_size // n_processes
    more = 2 * n_processes if args.parallel == "fsdp" else max(8, n_processes)
    changes = [{"checkpoint_activations": True}, {"dtype": "bfloat16"}]
    changes.append({"parallel": "fsdp", "batch_size": rows * more, "dry_run": more})
    if rows % 2 == 0:
        changes.append({"batch_size": rows // 2 * n_processes, "grad_accum": 2 * args.grad_accum})
    lines = []
    for change in changes:
        changed = plan(model, Namespace(**vars(args) | change), change.get("dry_run", n_processes)).total
        if changed < total:
            flags = [
                f"--{flag.replace('_', '-')} {'' if value is True else value}"
                for flag, value in change.items()
            ]
            lines.append(f"{changed / 1e9:9.2f} GB with {' '.join(flags)}".rstrip())
    return lines
