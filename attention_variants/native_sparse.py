"""Native sparse attention: every query sees summaries of all tokens, a few blocks in full, and a window.

    out = g_1 compressed + g_2 selected + g_3 window        g = sigmoid(W_g x), for each token and head

NSA (Yuan et al. 2025, 2502.11089, sections 3.2 and 3.3). Each of the three branches is an attention with its
own projections to keys and values, so that what one branch learns does not disturb the others:

    compressed   attention to summaries. Summary i stands for the l tokens from i d on; its key and value are
                 phi of their keys and of their values. A query at t sees it if its last token is not later
                 than the query, i d + l - 1 <= t
    selected     attention to n blocks of l' tokens: the first, the last two, and those with the largest
                 importance. The importance of a block is the sum of the weights that the compressed attention
                 gives to the summaries that overlap the block, each times the overlap, over all heads that
                 share a key head: these heads make one choice
    window       attention to the last w tokens

    phi(x_0 ... x_{l-1}) = mean_j x_j + W_2 gelu(W_1 [x_0 + e_0 | ... | x_{l-1} + e_{l-1}])

with learned e_j. In the paper phi is an MLP without the mean. The mean is added here so that a new summary,
before any training, resembles its tokens. Keys are compressed before they are rotated; a summary is rotated
to the position of its first token. No gradient goes through the choice of blocks. It improves as the
compressed branch is trained, whose weights it uses.

A query sees about T / d summaries; the number of its other keys does not depend on T.

    python -m attention_variants.native_sparse                       the sizes
    python -m attention_variants.native_sparse DIR --prompt "def "   continue a text
    python train.py --model native_sparse                            train one

Shapes: B batch, T queries, S keys, D model width, H heads, G key/value heads, K head width, M summaries, l
tokens of a summary, d tokens from one summary to the next, l' tokens of a block, n selected blocks.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gpt
from engine import optim
from formats import command, native
from generate import KVCache, main
from gpt import GPT, rope, rotate
from kernels import attention, products
from kernels.selected_attention import selected_attention, strongest

FIRST, LATEST = 1, 2  # always selected: the first block, and the last two, of which one is the query's own
CHUNK = 1024  # queries whose weights of all summaries are in memory at a time


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config, and those of the summaries and blocks. window is the third branch's."""

    summary_size: int = 16  # l, tokens of a summary
    summary_stride: int = 8  # d, tokens from one summary to the next
    block_size: int = 16  # l', tokens of a selected block
    n_selected: int = 4  # n, blocks that a query selects
    window: int = 32  # w, tokens

    def __post_init__(self):
        super().__post_init__()
        if self.full_layers:
            raise ValueError(f"full_layers {self.full_layers}: expected none; every layer has a window")
        if self.qk_norm == "all":
            raise ValueError("qk_norm all: expected True or False; keys are normalised head by head")
        if self.summary_size % self.summary_stride or self.block_size % self.summary_stride:
            raise ValueError(
                f"summary_size {self.summary_size}, block_size {self.block_size}: expected multiples of "
                f"summary_stride {self.summary_stride}"
            )
        if self.n_selected < FIRST + LATEST:
            raise ValueError(
                f"n_selected {self.n_selected}: expected at least {FIRST + LATEST}: the first block and the "
                f"last {LATEST} are always selected"
            )

    def n_summaries(self, n_tokens: int) -> int:
        """Return how many summaries are complete after n_tokens tokens."""
        return max(0, (n_tokens - self.summary_size) // self.summary_stride + 1)

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights in all matrices that a token is multiplied by, the head included."""
        D, H, G, K = self.d_model, self.n_heads, self.G, self.K
        return super().n_matmul_params + self.n_layers * (D * 4 * G * K + D * 3 * H)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token: those of gpt.py with a window, of the attention
        to selected keys and to summaries, and of the MLPs that make the summaries of keys and of values."""
        l, G, K, N = self.summary_size, self.G, self.K, self.block_size
        seen = sum(p % N + 1 + min(self.n_selected - 1, p // N) * N for p in range(seq_len))
        seen += sum(map(self.n_summaries, range(1, seq_len + 1)))
        of_summaries = 6 * 2 * G * (l * K * K + K * K) * self.n_summaries(seq_len)
        of_keys = 12 * self.n_heads * K * seen
        return super().flops_per_token(seq_len) + self.n_layers * (of_keys + of_summaries) // seq_len


SIZES = {"tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True)}  # gpt.py's tiny


class Summary(nn.Module):
    """phi of the header: a network from the l keys, or the l values, of a summary to one."""

    def __init__(self, config: Config):
        super().__init__()
        K, self.size = config.K, config.summary_size
        self.embed_positions = nn.Embedding(self.size, K)  # e_j
        self.inner_proj = nn.Linear(self.size * K, K, bias=False)  # W_1
        self.outer_proj = nn.Linear(K, K, bias=False)  # W_2

    def forward(self, x: Tensor) -> Tensor:
        """Return the summaries (B, M, G, K) of x (B, M, l, G, K), the keys or values of their tokens."""
        x = x.transpose(2, 3)  # (B, M, G, l, K)
        inner = self.inner_proj((x + self.embed_positions.weight).flatten(3))
        return x.mean(dim=3) + self.outer_proj(F.gelu(inner))


def overlaps(size: int, stride: int, block_size: int) -> list[float]:
    """Return the length of the overlap, in strides, of a block with each summary that overlaps it. The first
    of these summaries begins size - stride tokens before the block. Example: 32, 16 and 64 tokens give
    1, 2, 2, 2, 1."""
    starts = range(stride - size, block_size, stride)
    return [(min(start + size, block_size) - max(start, 0)) / stride for start in starts]


def importance(weights: Tensor, n_blocks: int, size: int, stride: int, block_size: int) -> Tensor:
    """Return the importance (..., n_blocks) of each block: the sum of the weights (..., M) of the summaries
    that overlap it, each times the overlap of `overlaps`. size, stride and block_size are in tokens."""
    shares, step = overlaps(size, stride, block_size), block_size // stride
    before, length = size // stride - 1, (n_blocks - 1) * step + len(shares)
    padded = F.pad(weights, (before, max(0, length - before - weights.shape[-1])))
    parts = (w * padded[..., i:][..., ::step][..., :n_blocks] for i, w in enumerate(shares))
    return sum(parts)


def select(weights: Tensor, p: Tensor, n: int, block_size: int) -> Tensor:
    """Return the numbers (B, T, G, n) of the selected blocks: those that are always selected, and those with
    the largest weights (B, T, G, n_blocks). -1 stands where fewer than n blocks begin at or before the query.
    p: the positions (B, T) or (1, T) of the queries."""
    block, own = torch.arange(weights.shape[-1], device=p.device), (p // block_size)[..., None, None]
    always = (block < FIRST) | (block > own - LATEST)
    return strongest(weights.masked_fill(always, math.inf).masked_fill(block > own, -math.inf), n)


def compressed(q: Tensor, k: Tensor, v: Tensor, p: Tensor, n_blocks: int, config: Config):
    """Return the attention (B, T, H, K) of q (B, T, H, K) to the summaries k and v (B, M, G, K), and the
    numbers (B, T, G, n) of the selected blocks, of n_blocks in all. p: as for `select`."""
    M, G = k.shape[1:3]
    size, stride, block_size = config.summary_size, config.summary_stride, config.block_size
    complete = torch.arange(M, device=p.device) * stride + size - 1 <= p[..., None]  # (B or 1, T, M)
    unseen = ~complete[:, :, None, None]
    scores = torch.einsum("btghk,bmgk->btghm", q.unflatten(2, (G, -1)), k) / math.sqrt(q.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(unseen, -math.inf).softmax(dim=-1, dtype=wide)
    # The weights of the first queries, which see no summary, are 0 / 0 = NaN; they become 0.
    weights = weights.masked_fill(unseen, 0)
    out = torch.einsum("btghm,bmgk->btghk", weights.to(q.dtype), v).flatten(2, 3)
    with torch.no_grad():
        of_blocks = importance(weights.sum(dim=3), n_blocks, size, stride, block_size)  # (B, T, G, n_blocks)
        return out, select(of_blocks, p, config.n_selected, block_size)


class Attention(nn.Module):
    """The three branches, and the gates with which they are added."""

    same_input = ("q_proj", "k_proj", "v_proj", "gate_proj")  # see kernels/few_rows.py

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.G, config.K
        biased = config.bias or config.qkv_bias
        self.q_proj = nn.Linear(D, H * K, bias=biased)
        self.k_proj = nn.Linear(D, 3 * G * K, bias=biased)  # the keys of each branch
        self.v_proj = nn.Linear(D, 3 * G * K, bias=biased)
        self.gate_proj = nn.Linear(D, 3 * H, bias=biased)
        self.o_proj = nn.Linear(H * K, D, bias=config.bias)
        self.q_norm = gpt.Norm(K, config, "rms") if config.qk_norm else None
        self.k_norm = gpt.Norm(K, config, "rms") if config.qk_norm else None
        self.of_keys, self.of_values = Summary(config), Summary(config)
        self.config, self.layer, self.backend = config, layer, config.kernels

    def forward(self, x: Tensor, rotation, cache: "SparseCache | None", cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). rotation: from `rope`, None without rotary positions."""
        B, T, _ = x.shape
        q, k, v, gates = products(self, x)
        q = q.view(B, T, -1, self.config.K)  # (B, T, H, K)
        k, v = (y.view(B, T, 3, -1, self.config.K) for y in (k, v))  # (B, T, 3, G, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        # The keys of the first branch are rotated in `summaries`, after they are compressed.
        compressed_k, *others = k.unbind(dim=2)
        if rotation is not None:
            q, others = rotate(q, *rotation), [rotate(y, *rotation) for y in others]
        keys, values = (compressed_k, *others), v.unbind(dim=2)

        # In generation, a pass after the prompts has one token for each row. Documents packed in one row are
        # computed one by one. All other rows are computed from their first token on.
        if cache is not None and cache.filled:
            branches = self.next_token(q, keys, values, cache)
        elif cu_seqlens is not None:
            ends = [(a, b) for a, b in pairwise(cu_seqlens.tolist()) if a < b]
            cut = [(q[:, a:b], *([y[:, a:b] for y in z] for z in (keys, values))) for a, b in ends]
            branches = [torch.cat(y, dim=1) for y in zip(*(self.whole(*z) for z in cut), strict=True)]
        else:
            branches = self.whole(q, keys, values, cache)
        gates = torch.sigmoid(gates).view(B, T, 3, -1, 1)  # (B, T, 3, H, 1)
        y = (gates * torch.stack(branches, dim=2)).sum(dim=2)  # (B, T, H, K)
        return self.o_proj(y.reshape(B, T, -1))

    def summaries(self, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, M, G, K) of the summaries of k and v (B, M, l, G, K), the keys and
        values of their tokens. first: the positions of their first tokens, (M,) or (B, M)."""
        k, v, c = self.of_keys(k), self.of_values(v), self.config
        if c.positions == "rope":
            k = rotate(k, *rope(first, c.rope_theta, c.K, c.rope_scaling))
        return k, v

    def whole(self, q: Tensor, keys, values, cache: "SparseCache | None" = None) -> list[Tensor]:
        """Return the three branches, each (B, T, H, K), for rows from their first token on: q (B, T, H, K),
        keys and values (B, T, G, K) for each branch. A cache is filled with the keys and values."""
        c, T = self.config, q.shape[1]
        M, n_blocks = c.n_summaries(T), -(-T // c.block_size)
        at = torch.arange(M, device=q.device) * c.summary_stride
        index = at[:, None] + torch.arange(c.summary_size, device=q.device)  # (M, l)
        k, v = self.summaries(keys[0][:, index], values[0][:, index], at)
        if cache is not None:
            cache.fill_branches(self.layer, keys, values, k, v)

        # Only one chunk of queries has its weights of all summaries in memory. In training they are dropped
        # after the chunk, and computed again in the backward pass.
        p, parts = torch.arange(T, device=q.device)[None], []
        for start in range(0, T, CHUNK):
            chunk = slice(start, start + CHUNK)
            attend = partial(compressed, q[:, chunk], k, v, p[:, chunk], n_blocks, c)
            keeps = T > CHUNK and torch.is_grad_enabled()
            parts.append(checkpoint(attend, use_reentrant=False) if keeps else attend())
        first, blocks = (torch.cat(y, dim=1) for y in zip(*parts, strict=True))
        second = selected_attention(q, keys[1], values[1], blocks, c.block_size, backend=self.backend)
        third = attention(q, keys[2], values[2], causal=True, window=c.window, backend=self.backend)
        return [first, second, third]

    def next_token(self, q: Tensor, keys, values, cache: "SparseCache") -> list[Tensor]:
        """Return the three branches, each (B, 1, H, K), for one token after those in the cache, and store its
        keys and values there."""
        c = self.config
        p = torch.tensor(cache.lengths, device=q.device)[:, None]  # (B, 1)
        summaries = cache.summarise(self.layer, keys[0], values[0], self.summaries)
        k, v, lengths = cache.selected.append(self.layer, keys[1], values[1])
        first, blocks = compressed(q, *summaries, p, -(-k.shape[1] // c.block_size), c)
        options = {"seqlens_k": lengths, "backend": self.backend}
        second = selected_attention(q, k, v, blocks, c.block_size, **options)
        k, v, lengths = cache.append(self.layer, keys[2], values[2])
        third = attention(q, k, v, seqlens_k=lengths, backend=self.backend)
        return [first, second, third]


class SparseCache(KVCache):
    """The cache of the three branches. It holds all summaries of the first branch, and the keys and values of
    the last l tokens, from which the next summary is made; all keys and values of the second; and in the
    fields of KVCache itself the last `window` keys and values of the third."""

    def __init__(self, config: Config, lengths: list[int], max_len: int, like: Tensor):
        super().__init__(config, lengths, max_len, like)
        # The config of a cache with as many layers and key heads, and heads as wide. d_ff is not read.
        plain = gpt.Config(config.n_layers, config.G, config.G * config.K, 1, d_head=config.K)
        self.selected = KVCache(plain, lengths, max_len, like)
        self.latest = KVCache(replace(plain, window=config.summary_size), lengths, max_len, like)
        shape = len(lengths), config.n_summaries(max_len), config.G, config.K
        self.summary_keys, self.summary_values = (
            [like.new_zeros(shape) for _ in range(config.n_layers)] for _ in range(2)
        )
        self.config = config

    def fill_branches(self, layer: int, keys, values, k: Tensor, v: Tensor) -> None:
        """Store the prompts: keys and values (B, T, G, K) of each branch, and those of the summaries, k and v
        (B, M, G, K). In a row that is shorter than T some summaries are made of padding. Each is replaced
        when its last token has come, before a query sees it."""
        for cache, branch in ((self.latest, 0), (self.selected, 1), (self, 2)):
            cache.fill(layer, keys[branch], values[branch])
        self.summary_keys[layer][:, : k.shape[1]] = k
        self.summary_values[layer][:, : v.shape[1]] = v

    def summarise(self, layer: int, k: Tensor, v: Tensor, summaries) -> tuple[Tensor, Tensor]:
        """Store one token's key and value (B, 1, G, K), and return the keys and values (B, M, G, K) of all
        summaries so far. summaries: `Attention.summaries`, to make those that this token completes."""
        self.latest.append(layer, k, v)
        size, stride = self.config.summary_size, self.config.summary_stride
        rows = [b for b, n in enumerate(self.lengths) if n + 1 >= size and (n + 1) % stride == 0]
        if rows:
            # The tokens of the new summaries are those in the ring buffers; position p is in slot p mod l.
            first = torch.tensor([self.lengths[b] + 1 - size for b in rows], device=k.device)
            slots = (first[:, None] + torch.arange(size, device=k.device)) % size
            row = torch.tensor(rows, device=k.device)
            blocks = (x[layer][row[:, None], slots][:, None] for x in (self.latest.keys, self.latest.values))
            k, v = summaries(*blocks, first[:, None])
            for new, stored in ((k, self.summary_keys[layer]), (v, self.summary_values[layer])):
                stored[row, first // stride] = new[:, 0].to(stored.dtype)  # autocast may have changed it
        n = self.config.n_summaries(max(self.lengths) + 1)
        return self.summary_keys[layer][:, :n], self.summary_values[layer][:, :n]

    def advance(self) -> None:
        """Count the tokens of a pass in all three caches, as `KVCache.advance` does in one."""
        for cache in (self.selected, self.latest):
            cache.advance()
        super().advance()


def new_cache(model: nn.Module, lengths: list[int], max_len: int, static: bool = False) -> SparseCache:
    """Return an empty cache for prompts of these lengths, max_len tokens in all. Raises ValueError for a
    static one, which a compiled step needs."""
    if static:
        raise ValueError("native sparse attention has no cache for a compiled step; leave out --compile")
    return SparseCache(model.config, lengths, max_len, like=model.model.norm.weight)


class Block(gpt.Block):
    attention = Attention


class NativeSparse(GPT):
    """gpt.py's decoder with the attention above, saved natively: transformers has no such architecture."""

    block, new_cache = Block, new_cache
    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))


# --- for train.py: the task is gpt.py's

Model = NativeSparse
KIND = "decoder"
TASK = "gpt"
STEPS = 800
separate_head = gpt.separate_head
show = gpt.show


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of `optim.width_factors` for --mup. The matrices of a summary have factors of 1,
    since they do not grow with the model's width."""
    return (1.0, 1.0) if "inner_proj" in name or "outer_proj" in name else optim.width_factors(name, ratio)


if __name__ == "__main__":
    command.run(lambda: main(NativeSparse, SIZES))  # continue a text, or print the sizes
