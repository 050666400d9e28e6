"""One model, many processes: data parallelism by PyTorch's own engine.

    gradient = mean over N processes r of the gradient of N * (share of the targets in r) * (loss of r)

    torchrun --nproc_per_node=8 train.py --model gpt --parallel ddp
    torchrun --nproc_per_node=8 train.py --model gpt --size llama3-8b --parallel fsdp --checkpoint-activations

    ddp     every process holds the whole model; gradients are averaged while the backward pass still runs
            (Li et al. 2020, PyTorch Distributed)
    fsdp    every process holds an N-th of each weight, gradient and optimizer state, and a block's weights
            are put together just before they are needed (ZeRO stage 3, Rajbhandari et al. 2020; FSDP, Zhao
            et al. 2023; here fully_shard, PyTorch's second one)

--batch-size counts the sequences of all processes: what is computed does not depend on how many there are.
Process r of N takes the r-th N-th of each batch, which each of them draws as a whole. Three things do depend
on N: dropout; the tokens among which the experts of a Switch and of expert choice are filled; and the weight
of losses other than that of the targets, where processes have unequally many targets.

With fsdp each process makes the whole model in the host's memory before it is shared out, and the first one
keeps a copy there, to show and to save. With one process everything here does nothing.
"""

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TIMEOUT = timedelta(minutes=30)  # the longest that one process may keep the others waiting


def rank() -> int:
    """The number of this process, 0 for the first and for the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(args: argparse.Namespace) -> None:
    """Join the processes that torchrun has started; nothing without --parallel.

    Raises ValueError where the two do not fit together.
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
    # Two engines in one group: what lies in the host's memory goes through gloo, also beside GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)


def end() -> None:
    """Part from the others, after success only: others that have failed would be waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether this process is the first of all to ask this: of an error that spreads, one word is enough."""
    if not dist.is_initialized():
        return True
    store = dist.distributed_c10d._get_default_store()
    return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1


def from_first(value):
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def ask_first(function: Callable):
    """What function returns in the first process, which alone calls it; in all. A ValueError too."""
    outcome = None
    if rank() == 0:
        try:
            outcome = function(), None
        except ValueError as error:
            outcome = None, str(error)
    value, problem = from_first(outcome)
    if problem is not None:
        raise ValueError(problem)
    return value


def gather_objects(value) -> list:
    """Every process's value, in all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    gather_objects(None)


@contextmanager
def first_on_each_machine() -> Iterator[bool]:
    """Enter in one process of each machine, which is given True, and when these are done in the rest."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield first
    if first:
        barrier()


def ask(flag: int) -> Callable[[], int]:
    """Begin to look for the largest flag of any process; the function returned waits for it."""
    if not dist.is_initialized():
        return lambda: flag
    largest = torch.tensor(flag)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(largest)

    return answer


def total(x: Tensor) -> Tensor:
    """The sum over the processes of x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Loss(nn.Module):
    """DDP takes care of what a forward method has used: this one is the model's loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a model is a pile of: those in its nn.ModuleLists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(dict.fromkeys(block for piled in lists for block in piled))


def prepare(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Callable, nn.Module | None]:
    """Move model to its device and share it out; returns what `last_of_update` needs, the loss to call, and
    the model to show and save: whole, and on the first process only.

    --checkpoint-activations: of each block only the input is kept for the backward pass, which computes the
    rest anew (Chen et al. 2016). --dtype bfloat16 with fsdp: weights are put together in bfloat16, that of
    moe.py's router too, and gradients added up in float32; the shares that the optimizer updates are float32
    all along.
    """
    whole = None
    if args.parallel == "fsdp" and rank() == 0:
        whole = copy.deepcopy(model)
        for module in whole.modules():
            if hasattr(module, "backend"):
                module.backend = "auto"  # it stays in the host's memory, where Triton's kernels cannot run
    # Where something is to happen between blocks, each of them is compiled alone.
    by_block = args.parallel == "fsdp" or args.checkpoint_activations
    for block in blocks(model):
        if args.compile and by_block:
            block.forward = torch.compile(block.forward)
        if args.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if args.parallel != "fsdp":
        model.to(args.device)
        engine, loss_of = model, model.loss
        if args.parallel == "ddp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that newer versions have another name for broadcast_buffers
                # Buffers are not the first process's business: moe.py adds up the loads of all.
                engine = DistributedDataParallel(
                    Loss(model), broadcast_buffers=False, gradient_as_bucket_view=True
                )
            loss_of = engine
        # The module itself stays as it is: what is saved must not carry the names that compiling adds.
        if args.compile and not by_block:
            loss_of = torch.compile(loss_of)
        return engine, loss_of, model if rank() == 0 else None

    mesh = init_device_mesh(args.device, (n_processes(),))
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    # The angles of rotary positions are inputs of the blocks, which 8 bits of mantissa would spoil.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")
    return model, model.loss, whole


def last_of_update(engine: nn.Module, is_last: bool) -> None:
    """Before the pass over a batch: gradients are added up where they are, and only with the last batch of
    an update over the processes."""
    if isinstance(engine, DistributedDataParallel):
        engine.require_backward_grad_sync = is_last
    elif isinstance(engine, FSDPModule):
        engine.set_requires_gradient_sync(is_last)


def as_tensor(x: Tensor) -> Tensor:
    """x in one piece on each process, if it was shared out."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def gather(model: nn.Module, whole: nn.Module | None) -> None:
    """Bring the model that is to be shown and saved up to date, if it is another than the one trained."""
    if whole is model or not isinstance(model, FSDPModule):
        return
    places = whole.state_dict() if whole is not None else {}
    for name, w in model.state_dict().items():
        w = as_tensor(w)
        if whole is not None:
            places[name].copy_(w)
