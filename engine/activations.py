"""What forward keeps for backward in each block and at the loss: the activations in engine/memory.py.

A block keeps, in bytes per token, with e bytes per number in matrix products (float32 4, bfloat16 2) and r
per number between blocks (4; with fsdp in bfloat16 2):

    2 D r                     inputs of the two norms
    D e                       input of the query, key and value projections (under autocast 3 copies)
    2 (H + G) K e             queries, keys, values, and the output of attention
    (H + G) K e               queries and keys before their norms, with qk_norm
    4 H                       log-sum-exp of each query's scores
    D e                       input of the MLP (under autocast 2 copies, if it is SwiGLU)
    2 F e or 4 F e            inside the MLP: x, gelu(x); or gated: gate, up, act(gate), product

For GPT-2 with fsdp in bfloat16 the sum is 32 D + 4 H: the 34 D of Korthikanti et al. (2022, section 4.1)
without the masks of two dropouts, and without their 5 H T for attention scores, which fused attention does
not keep.

The functions below are for attention, a dense MLP and a decoder's loss. The files of other models, tasks and
adapters define their own under the same names:

    model      mlp_bytes(block, config, precision) -> (kept, gradients)
    task       tokens_per_row(model, config, seq_len) -> a number for each stack of blocks
               loss_bytes(model, config, n, seq_len, precision) -> fields of `Loss`
    adapter    adapter_bytes(block, config, precision) -> kept

Statistics of norms and angles of rotary positions are left out: together they are less than a percent.

Shapes: D model width, H heads, G key/value heads, K head width, F inner width of the MLP, V vocabulary.
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.trainable import count
from kernels.cross_entropy import rows_per_chunk


class Precision(NamedTuple):
    e: int  # bytes of a number in a matrix product
    r: int  # bytes of a number between blocks
    autocast: bool


class Stack(NamedTuple):
    owner: nn.Module  # the model or part of a model that has the blocks and their config
    blocks: list[nn.Module]  # in order of use; a block whose weights are used L times is there L times


class Loss(NamedTuple):
    """Memory from the last block's output to the loss: bytes, and sizes of gradients in numbers."""

    kept: int = 0  # bytes that forward keeps
    inputs: int = 0  # bytes of the batch, and of what the embeddings keep of it, until backward has ended
    temporary: int = 0  # bytes that exist only while the loss is computed
    ready: int = 0  # bytes of the head's gradient where forward computes it already
    head: int = 0  # size of the head's gradient; 0 if the head does not learn
    tied: int = 0  # size of the gradients that are summed, if the head is tied to the embeddings; else 0


def unpacked_bytes(buffers: Iterable[Tensor]) -> int:
    """Return the bytes of the largest packed weight in float32, which it becomes for its product. A packed
    weight is a buffer of uint8 with two 4-bit codes in a byte."""
    return 4 * max((2 * b.numel() for b in buffers if b.dtype == torch.uint8), default=0)


def stacks(model: nn.Module) -> list[Stack]:
    """Return the model's stacks of blocks, the members of its outermost nn.ModuleLists, each with the
    innermost module around it that has a config."""
    found = []

    def look(module: nn.Module, owner: nn.Module) -> None:
        if isinstance(module, nn.ModuleList):
            # Fewer blocks than layers share their weights (ALBERT).
            times = getattr(owner.config, "n_layers", len(module)) // max(1, len(module))
            found.append(Stack(owner, list(module) * max(1, times)))
            return
        owner = module if hasattr(module, "config") else owner
        for child in module.children():
            look(child, owner)

    look(model, model)
    return found


def outside_blocks(stack: Stack) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of a stack's owner that are registered before its blocks, such as embeddings, and
    those after, such as the head."""
    inside = {p for block in stack.blocks for p in block.parameters()}
    parameters = list(stack.owner.parameters())
    before = list(takewhile(lambda p: p not in inside, parameters))
    return before, [p for p in parameters[len(before) :] if p not in inside]


def reached_by_backward(stack: Stack) -> list[nn.Module]:
    """Return the blocks that backward goes through: those from the lowest parameter that learns upwards."""
    before, _ = outside_blocks(stack)
    if count(before)[1]:
        return stack.blocks
    learning = [i for i, block in enumerate(stack.blocks) if count(block.parameters())[1]]
    return stack.blocks[learning[0] :] if learning else []


def attention_bytes(config: Any, precision: Precision) -> int:
    """Return the bytes per token that a block keeps outside of its MLP: the first five rows of the header."""
    e, r, autocast = precision
    D, H = config.d_model, config.n_heads
    G, K = getattr(config, "n_kv_heads", None) or H, getattr(config, "d_head", None) or D // H
    before_norms = (H + G) * K * e if getattr(config, "qk_norm", False) else 0
    return 2 * D * r + D * e * (3 if autocast else 1) + 2 * (H + G) * K * e + before_norms + 4 * H


def mlp_bytes(block: nn.Module, config: Any, precision: Precision) -> tuple[int, int]:
    """Return the bytes per token that a block's MLP keeps for backward, and those of the gradients of its
    activations that exist at once. This is a dense MLP; a model file with others defines its own."""
    e, _, autocast = precision
    D, F, gated = config.d_model, config.d_ff, not config.mlp.startswith("gelu")
    copies = 2 if autocast and config.mlp == "swiglu" else 1
    return copies * D * e + (4 if gated else 2) * F * e, 2 * F * e


def adapter_bytes(block: nn.Module, config: Any, precision: Precision) -> int:
    """Return the bytes per token that adapters in a block keep for backward: none, without adapters."""
    return 0


def tokens_per_row(model: nn.Module, config: Any, seq_len: int) -> list[int]:
    """Return how many tokens of a row go through each stack of blocks: all of them. A task whose rows are no
    tokens, such as images, defines its own. config: the task's."""
    return [seq_len] * len(stacks(model))


def loss_bytes(model: nn.Module, config: Any, n: int, seq_len: int, precision: Precision) -> dict[str, int]:
    """Return the fields of `Loss` for n tokens in rows of seq_len. This is a decoder's loss, computed in
    chunks (kernels/cross_entropy.py), whose forward pass leaves the gradients of hidden states and head. A
    task with another loss defines its own. config: the task's."""
    e, r, autocast = precision
    stack = stacks(model)[0]
    D, V = stack.owner.config.d_model, stack.owner.config.vocab_size

    # The head has V rows, and so has the B of an adapter on it. With none after the blocks, it is tied.
    before, after = ([p for p in part if p.shape[:1] == (V,)] for part in outside_blocks(stack))
    learns = any(p.requires_grad for p in after or before)
    n_head = V * D * learns

    packed = {b for block in stack.blocks for b in block.buffers()}
    unpacked = unpacked_bytes(b for b in stack.owner.buffers() if b not in packed)
    chunk = rows_per_chunk(n, D, V, "cuda") * V * e + V * D * e * autocast + unpacked
    return {
        "kept": n * D * (r + e),
        "temporary": n * D * e + max(chunk, 4 * n_head),
        "ready": 4 * n_head,
        "head": n_head,
        "tied": 0 if after else n_head,
    }
