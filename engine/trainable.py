"""Which weights learn: `--train all`, `head` or `last:N`, the classical ways to fine-tune a part of a model.

    all       every weight
    head      what follows the blocks: the last norm and the head, or an encoder's heads
    last:N    the same, and the last N blocks

Embeddings stay as they are, and so does a head that is the embedding matrix. But with `head`, such a head of
a decoder first becomes a copy of the matrix, which learns.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from engine.parallel import blocks

# Factors of the learning rate by which fewer weights learn. Each is near the best of three rates on `tiny`
# (results/adapters.json).
LEARNING_RATE = {"all": 1.0, "head": 1.0, "last": 6.0}


def parse(train: str) -> tuple[str, int]:
    """Return ("all", 0), ("head", 0) or ("last", N); ValueError for another value of --train."""
    found = re.fullmatch(r"(all|head)|(last):([1-9]\d*)", train)
    if found is None:
        raise ValueError(f"--train {train}: expected all, head, or last:N with the number of blocks")
    return (found[1], 0) if found[1] else (found[2], int(found[3]))


def freeze(model: nn.Module, train: str) -> None:
    """Let only the parameters that --train names learn, in place. ValueError where there are none."""
    part, n = parse(train)
    if part == "all":
        return
    stack = blocks(model)
    if n > len(stack):
        raise ValueError(f"--train {train}: this model has {len(stack)} blocks")
    in_blocks = {id(p) for block in stack for p in block.parameters()}
    in_last = {id(p) for block in stack[len(stack) - n :] for p in block.parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    in_tables = {id(table.weight) for table in tables}  # T5's embeddings are called "shared"
    for name, p in model.named_parameters():
        above = id(p) not in in_blocks | in_tables and "embed" not in name
        p.requires_grad_(above or id(p) in in_last)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--train {train}: this model has nothing above its blocks that could learn")


def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return how many numbers the parameters have, and how many of these learn."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(learns for _, learns in sizes)


def beside(module: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a module's state dict that are not in its model's, such as a value head's."""
    # Tensors are compared as objects, because the shards of FSDP have no address: their data_ptr() is 0.
    inner = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    own = module.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in own.items() if id(tensor) not in inner}


def frozen_flops(model: nn.Module) -> int:
    """Return the FLOPs per token that training saves on frozen weights, whose gradients it does not compute:
    2 per weight.

    Counted are the matrices of linear layers. A head that is the embedding matrix is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return 2 * sum(layer.weight.numel() for layer in layers if not layer.weight.requires_grad)


def flops_per_token(concept: Any, model: nn.Module, settings: Any, adapter_config: Any, seq_len: int) -> int:
    """Return the FLOPs of training on one token, or image, without the gradients of frozen weights.

    concept: a contract.Concept. settings and adapter_config: the Configs of its task and its adapter.
    """
    full = concept.task.flops_per_token(model, settings, seq_len)
    if concept.adapter is not None:
        return concept.adapter.flops_per_token(model, adapter_config, full)
    return full - frozen_flops(model)
