"""The cost of training an adapter, per token: FLOPs and memory.

6 FLOPs per weight    of A and B: forward, gradient of the inputs, gradient of the weights
4 FLOPs per weight    of a frozen matrix, which has no gradient of its own
"""

import re
from typing import Any

from torch import nn

from posttraining.nf4 import NF4

# Parts of an adapter that are multiplied with x; A0 and B0 are the start of PiSSA.
MATRICES_A, MATRICES_B = ("lora_A", "A0"), ("lora_B", "B0")
# Embeddings are looked up, and not multiplied with.
TABLES = re.compile(r"(embed_tokens|embed_positions|_embeddings)\b")
# The heads of an encoder see only the masked tokens, so the cost of their frozen matrices is left out.
FEW_TOKENS = ("cls.", "bert.pooler.")


def flops_per_token(model: nn.Module, config: Any, full: int) -> int:
    """Return the matmul FLOPs of forward and backward per token of a model with adapters.

    config: of the adapter. full: the FLOPs if all weights of the base were trained. (The gradients of inputs
    below the lowest adapter are counted too, although backward does not compute them.)
    """
    # All matrices by path: parameters, PiSSA's buffers, weights in 4 bits, and a head that is the embedding.
    tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {path: w for path, w in model.named_buffers(remove_duplicate=False) if ".adapters." in path}
    modules = model.named_modules(remove_duplicate=False)
    tensors |= {path: module for path, module in modules if isinstance(module, NF4)}
    if getattr(model, "lm_head", 0) is None:
        tensors["lm_head"] = model.model.embed_tokens.weight

    flops = full
    for path, w in tensors.items():
        layer, _, part = path.partition(".adapters.")
        n = w.numel() if len(w.shape) > 1 else 0
        if len(w.shape) == 3:  # stacked experts: a token is multiplied with the matrices of top_k of them
            n = n * model.config.top_k // model.config.n_experts
        is_table = TABLES.search(layer)
        if part.endswith(MATRICES_B) or (part.endswith(MATRICES_A) and not is_table):
            flops += 6 * n
        elif not part and not is_table and not path.startswith(FEW_TOKENS):
            flops -= 2 * n
    return flops


def adapter_bytes(block: nn.Module, config: Any, precision: tuple[int, int, bool]) -> int:
    """Return the bytes per token that the adapters in a block of the base keep for backward.

    They keep A x, or the outputs that they scale. config: of the base. precision: (e, r, autocast) of
    engine/activations.py. For IA3 this is an upper bound.
    """
    kept = 0
    for name, p in block.named_parameters():
        rows = config.top_k if p.ndim == 3 else 1  # a token has a row in each of its experts
        if name.endswith("lora_A"):
            kept += rows * p.shape[-2]
        elif name.endswith("lora_magnitude_vector"):  # g (W x) and g (B A x)
            kept += rows * 2 * p.shape[-1]
        elif name.endswith("ia3_l"):
            kept += rows * max(p.shape[-2:])
    return kept * precision[0]
