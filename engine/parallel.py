"""One model, many processes: data parallelism by PyTorch's own implementations.

    gradient = mean over the N ranks r of the gradient of N * (share of the targets on r) * (loss of r)

    torchrun --nproc_per_node=8 train.py --model gpt --parallel ddp
    torchrun --nproc_per_node=8 train.py --model gpt --size llama3-8b --parallel fsdp --checkpoint-activations

    ddp     every rank holds all of the model; gradients are averaged while the backward pass still runs
            (Li et al. 2020, PyTorch Distributed)
    fsdp    every rank holds a shard, an N-th of each weight, gradient and optimizer state, and a block's
            weights are gathered just before they are needed (ZeRO stage 3, Rajbhandari et al. 2020; FSDP,
            Zhao et al. 2023; here fully_shard, PyTorch's second implementation)

--batch-size counts the sequences of all ranks, so the update does not depend on the world size N. Every rank
draws the same batch, and rank r takes the r-th of its N equal parts. Three things do depend on N: dropout;
the tokens that compete for the places of an expert, in a Switch and in expert choice; and the weight of
losses that are not means over targets, such as a mixture's balance loss, if the ranks have unequally many
targets.

With fsdp each rank makes the unsharded model in the host's memory first, and rank 0 keeps a copy there, to
show and to save. In a single process the functions that communicate return at once.
"""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TIMEOUT = timedelta(minutes=30)  # the longest that one rank may keep the others waiting


def rank() -> int:
    """Return the number of this process, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def initialize(args: argparse.Namespace) -> None:
    """Join the process group that torchrun has started; do nothing without --parallel.

    Raises ValueError where torchrun and --parallel do not fit together.
    """
    n = int(os.environ.get("WORLD_SIZE", 0))
    if args.parallel == "none" and n > 1:
        raise ValueError(f"torchrun has started {n} processes: add --parallel ddp or --parallel fsdp")
    if args.parallel == "none" or dist.is_initialized():
        return
    if n == 0:
        raise ValueError(f"--parallel {args.parallel}: start it as torchrun --nproc_per_node=N train.py ...")
    on_gpu = args.device in (None, "cuda") and torch.cuda.is_available()
    if on_gpu:
        n_gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local >= n_gpus:
            raise ValueError(f"--nproc_per_node: there are {n_gpus} GPUs, and none for process {local}")
        torch.cuda.set_device(local)
    # Two backends in one group: tensors in the host's memory go through gloo, also beside GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)


def shut_down() -> None:
    """Leave the process group. Called after success only, because it waits for ranks that have failed."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Return True on the first rank that calls this and False on all others, to print an error once.

    If the store of the process group cannot be reached, the process that holds it has ended: return False.
    """
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except dist.DistNetworkError:
        return False


def print_error(problem: str) -> None:
    """Print an error that ends the run, once, although every rank may meet it."""
    if first_to_fail():
        print(f"error: {problem}", file=sys.stderr)


def broadcast(value):
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_rank_0(function: Callable):
    """Call a function on rank 0 alone, and return its result, or raise its ValueError, on every rank."""
    outcome = None
    if rank() == 0:
        try:
            outcome = function(), None
        except ValueError as error:
            outcome = None, str(error)
    value, problem = broadcast(outcome)
    if problem is not None:
        raise ValueError(problem)
    return value


def all_gather(value) -> list:
    """Return the values of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank has called this."""
    all_gather(None)


@contextmanager
def one_per_machine_first() -> Iterator[bool]:
    """Run the body on one rank of each machine, which gets True, and then on the others, which get False."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield first
    if first:
        barrier()


def max_over_ranks_async(value: int) -> Callable[[], int]:
    """Start an all-reduce (max) of an integer. Call the function returned to wait for the result."""
    if not dist.is_initialized():
        return lambda: value
    largest = torch.tensor(value)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)

    def wait() -> int:
        work.wait()
        return int(largest)

    return wait


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum x over the ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class GatherWithGradient(torch.autograd.Function):
    """The concatenation of the ranks' tensors. Every rank's loss depends on the tensor of each rank, so its
    gradient is the sum of what the ranks' losses contribute."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous()).chunk(world_size())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Return the tensors x (n, ...) of all ranks, of equal shapes, one after the other. In one process it is
    x itself.

    With the mean of the ranks' gradients, the gradients are those of the mean of the ranks' losses.
    """
    return GatherWithGradient.apply(x) if dist.is_initialized() else x


class Objective(nn.Module):
    """A model and the loss of its task as one module, whose forward pass is what DDP and FSDP hook into."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.model, batch)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, in order: the members of its outermost nn.ModuleLists. In place
    of a member without a forward pass of its own, such as a level of a U-Net, there are the blocks in it."""
    found: dict[nn.Module, None] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList) and type(child).forward is not nn.Module.forward:
                found[child] = None
            else:
                look(child)

    look(model)
    return list(found)


def distribute(
    objective: Objective,
    args: argparse.Namespace,
    recomputation: Callable[[nn.Module], AbstractContextManager] = nullcontext,
) -> tuple[nn.Module, Callable, nn.Module | None]:
    """Move an objective to its device and, with --parallel, onto the ranks.

    Returns the module that exchanges gradients (see `sync_gradients`), the loss to call in training, and
    the unsharded model to show and to save, which is None on all ranks but 0.

    --checkpoint-activations keeps only the input of each block for the backward pass, which computes the
    rest anew (Chen et al. 2016), in the context recomputation(block). --dtype bfloat16 with fsdp gathers
    weights in bfloat16, that of moe.py's router too, and sums gradients in float32; the shards that the
    optimizer updates are float32 throughout.
    """
    model, unsharded = objective.model, None
    if args.parallel == "fsdp" and rank() == 0:
        unsharded = copy.deepcopy(model)
        for module in unsharded.modules():
            if hasattr(module, "backend"):
                module.backend = "auto"  # this copy stays in the host's memory, where Triton cannot run

    # FSDP and activation checkpointing act between blocks, so there each block is compiled alone.
    by_block = args.parallel == "fsdp" or args.checkpoint_activations
    for block in blocks(model):
        if args.compile and by_block:
            block.forward = torch.compile(block.forward)
        if args.checkpoint_activations:
            contexts = partial(lambda block: (nullcontext(), recomputation(block)), block)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    if args.parallel == "fsdp":
        shard(objective, args)
        return objective, objective, unsharded

    objective.to(args.device)
    synced_module, loss = objective, objective.forward
    if args.parallel == "ddp":
        with warnings.catch_warnings():
            # Newer versions of PyTorch warn that broadcast_buffers has another name. Buffers are not
            # broadcast from rank 0, because moe.py sums its load counters over the ranks.
            warnings.simplefilter("ignore")
            synced_module = loss = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    # Compiling a module in place would give its parameters other names in what is saved.
    if args.compile and not by_block:
        loss = torch.compile(loss)
    return synced_module, loss, model if rank() == 0 else None


def shard(objective: Objective, args: argparse.Namespace) -> None:
    """Shard every block, and then the rest of the objective, over the ranks (FSDP)."""
    # These imports take as long as that of torch, so only runs that shard make them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(args.device, (world_size(),))
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    # Inputs of blocks are not cast: they hold the angles of rotary positions, which need more than 8 bits.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks(objective.model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def sync_gradients(synced_module: nn.Module, enabled: bool) -> None:
    """Set, before a forward and backward pass, whether its gradients are exchanged between the ranks.

    Those of several batches of one update are summed locally, and exchanged with the last batch only. In one
    process this does nothing.
    """
    if isinstance(synced_module, DistributedDataParallel):
        synced_module.require_backward_grad_sync = enabled
    elif hasattr(synced_module, "set_requires_gradient_sync"):  # FSDP's
        synced_module.set_requires_gradient_sync(enabled)


def unshard(x: Tensor) -> Tensor:
    """Return x itself, or if it is sharded the unsharded tensor, on every rank."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Tensor) -> Tensor:
    """Return x itself, or if it is sharded this rank's shard, which shares its memory."""
    return x.to_local() if is_sharded(x) else x


def is_sharded(x: Tensor) -> bool:
    """Return whether x is a DTensor, of which this rank has a shard."""
    return hasattr(x, "full_tensor")


@torch.no_grad()
def update_unsharded(model: nn.Module, unsharded: nn.Module | None) -> None:
    """Copy the weights of a sharded model into the unsharded copy on rank 0. Called by all ranks."""
    if unsharded is model or not any(is_sharded(p) for p in model.parameters()):
        return
    copies = unsharded.state_dict() if unsharded is not None else {}
    for name, w in model.state_dict().items():
        w = unshard(w)
        if unsharded is not None:
            copies[name].copy_(w)
