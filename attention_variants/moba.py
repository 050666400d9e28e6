"""Mixture of block attention: every query sees a few blocks of earlier keys, chosen by the means of blocks.

    score of block b     q . mean of the keys of block b
    keys that are seen   those of the query's own block up to itself, and of the n - 1 best blocks before it
    out                  softmax(q . keys / sqrt(K)) values, over the keys that are seen

MoBA (Lu et al. 2025, 2502.13189, section 2.2) is to attention what a mixture of experts is to an MLP: the
blocks of keys are the experts. Each head has its own choice for each query, by the keys after they are
rotated, and no gradient goes through the choice. There are no new parameters, so a layer can be changed
between full attention and this one at any time. The paper keeps full attention in the last layers for
fine-tuning; here `full_layers` names such layers.

The query's own block is one of the n and is always seen. It has no score, because its mean would contain
later keys. Of equal scores the earlier block wins. A query near the beginning sees fewer than n blocks.

Attention reads at most n N keys per query, however long the text is. The choice computes one product per
block before the query, so its cost per query grows as T / N.

    python -m attention_variants.moba                       the sizes
    python -m attention_variants.moba DIR --prompt "def "   continue a text
    python train.py --model moba                            train one

Shapes as in gpt.py: B batch, T queries, S keys, D model width, H heads, G key/value heads, K head width; N
keys of a block, n blocks that a query sees, t queries of a chunk.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt
from formats import command, native
from generate import KVCache, main
from gpt import GPT
from kernels.selected_attention import selected_attention, strongest

CHUNK = 1024  # t, queries that choose at a time: the scores of all blocks are in memory for these alone


@dataclass(frozen=True)
class Fields:
    """The fields of the attention, for the Config of a decoder, dense or with experts."""

    block_size: int = 16  # N, keys of a block
    n_selected: int = 4  # n, blocks that a query sees, its own included

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None:
            raise ValueError(f"window {self.window}: expected None; a query chooses the blocks that it sees")

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token: as in gpt.py for the keys that are seen, and for
        each block before the query's own 2 H K for its score, which has no backward pass."""
        ordinary = super().flops_per_token(seq_len)
        N, HK = self.block_size, self.n_heads * self.K
        n_sparse = len(set(range(self.n_layers)) - set(self.full_layers))
        every_key = 12 * HK * (seq_len * (seq_len + 1) // 2) // seq_len
        before = [p // N for p in range(seq_len)]  # blocks before that of each query
        seen = sum(p % N + 1 + min(self.n_selected - 1, b) * N for p, b in enumerate(before))
        return ordinary - n_sparse * (every_key - (12 * HK * seen + 2 * HK * sum(before)) // seq_len)


@dataclass(frozen=True)
class Config(Fields, gpt.Config):
    """The fields of gpt.py's Config and those of the blocks. full_layers have full attention."""


SIZES = {"tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True)}  # gpt.py's tiny


@torch.no_grad()
def choose(q: Tensor, k: Tensor, p: Tensor, block_size: int, n: int) -> Tensor:
    """Return the numbers (B, T, H, n) of the blocks of k (B, S, G, K) that each head of each query of q
    (B, T, H, K) sees; -1 where it sees fewer than n. If k has fewer than n blocks, n is their number. p: the
    positions (B, T) or (1, T) of the queries."""
    B, S, G, K = k.shape
    wide = torch.promote_types(k.dtype, torch.float32)
    # Zeros fill up the last block, which makes its mean wrong. No query sees this block unless it is its own,
    # which needs no score, so the mean is never used.
    means = F.pad(k.to(wide), (0, 0, 0, 0, 0, -S % block_size)).view(B, -1, block_size, G, K).mean(dim=2)
    n, chosen = min(n, means.shape[1]), []
    number = torch.arange(means.shape[1], device=k.device)
    for part, at in zip(q.split(CHUNK, dim=1), p.split(CHUNK, dim=1), strict=True):
        heads = part.unflatten(2, (G, -1)).to(wide)  # (B, t, G, H / G, K)
        scores = torch.einsum("btghk,bngk->btghn", heads, means).flatten(2, 3)  # (B, t, H, S / N)
        own = (at // block_size)[..., None, None]
        scores = scores.masked_fill(number > own, -math.inf).masked_fill(number == own, math.inf)
        chosen.append(strongest(scores, n))
    return torch.cat(chosen, dim=1)


class Attention(gpt.Attention):
    """gpt.py's attention, in which each query sees only the blocks that it chose."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.block_size, self.n_selected = config.block_size, config.n_selected

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). As in gpt.py, but `attend` takes the place of `attention`."""
        B, T, _ = x.shape
        q, k, v = self.heads(x, rotation)

        # In generation, keys and values of earlier tokens come from the cache. Documents packed in one row
        # have blocks of their own.
        if cache is not None:
            k, v, lengths = cache.store(self.layer, k, v, {})
            y = self.attend(q, k, v, **lengths)
        elif cu_seqlens is not None:
            parts = [(a, b) for a, b in pairwise(cu_seqlens.tolist()) if a < b]
            y = torch.cat([self.attend(*(z[:, a:b] for z in (q, k, v))) for a, b in parts], dim=1)
        else:
            y = self.attend(q, k, v)
        return self.o_proj(y.reshape(B, T, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor | None = None) -> Tensor:
        """Return the attention (B, T, H, K) of q (B, T, H, K) to the chosen blocks of k and v (B, S, G, K).
        The queries are the last T tokens of a row, which has seqlens_k (B,) tokens, or S if that is None."""
        T, S = q.shape[1], k.shape[1]
        end = torch.tensor([S], device=q.device) if seqlens_k is None else seqlens_k
        p = end[:, None] - T + torch.arange(T, device=q.device)  # (B or 1, T)
        blocks = choose(q, k, p, self.block_size, self.n_selected)
        return selected_attention(q, k, v, blocks, self.block_size, seqlens_k=seqlens_k, backend=self.backend)


class Block(gpt.Block):
    def attention(self, config: Config, layer: int) -> gpt.Attention:
        return (gpt.Attention if layer in config.full_layers else Attention)(config, layer)


class MoBA(GPT):
    """gpt.py's decoder with the attention above, saved natively: transformers has no such architecture."""

    block = Block
    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))


# --- for train.py: the task is gpt.py's

Model = MoBA
KIND = "decoder"
TASK = "gpt"
STEPS = 1200
separate_head = gpt.separate_head
show = gpt.show


if __name__ == "__main__":
    command.run(lambda: main(MoBA, SIZES))  # continue a text, or print the sizes
