"""Linear attention: a state of fixed size takes the place of all earlier keys and values.

    S_t = lambda S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        lambda = exp(-s), a decay for each head

There is no softmax, so the sum over earlier tokens can be kept as one K x K matrix per head. There are three
ways to compute the same o; they cost O(T^2), O(T c) and O(T):

    parallel     o = ((Q K^T) * M) V,  M_ij = exp(-s (i - j)) for j <= i, else 0;  * is elementwise
    chunked      inside a chunk of c tokens as in parallel; all chunks before it add to o through the state S
                 that they leave. For token i of the chunk, counted from 0:
                 o_i += exp(-s (i + 1)) S^T q_i,   S <- exp(-s c) S + sum_j exp(-s (c - 1 - j)) k_j v_j^T
    recurrent    the equation above, token by token, as in generation

All exponents are <= 0, so nothing overflows. The state is in float32 at least: rounded to bfloat16 after each
token, its errors would add up. Training is chunked; its time grows in proportion to T. The first two ways are
in kernels/linear_attention.py, with a kernel for GPUs; `recurrent` below is the third.

A state of fixed size cannot hold an arbitrary text. So some layers keep attention with a softmax: in
MiniMax-01 (2025, 2501.08313, section 2.2) every eighth layer. Its other layers are lightning attention (Qin
et al. 2024, 2401.04658):

    q, k, v = silu(W x)         out = W_o (sigmoid(W_g x) * norm(o))        norm: over all heads together

There are no rotary positions and no scale. In layer l of L, counted from 0, head h has the decay rate
s = 2^(-8 (h + 1) / H) (1 - l / (L - 1)). So heads remember for different times, and later layers for longer.

    python -m attention_variants.linear                       the sizes
    python -m attention_variants.linear DIR --prompt "def "   continue a text
    python train.py --model linear                            train one

Shapes: B batch, T tokens, D model width, H heads, K head width, c tokens of a chunk, N chunks.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from engine import optim
from formats import command, native
from generate import KVCache, main
from gpt import GPT, Norm
from kernels.linear_attention import linear_attention


@dataclass(frozen=True)
class Fields:
    """The fields of the attention, for the Config of a decoder, dense or with experts."""

    softmax_layers: tuple[int, ...] = ()  # MiniMax-01: every eighth
    chunk: int = 64  # tokens of a chunk in PyTorch; that of the kernel for GPUs is in kernels/configs.py

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None:
            raise ValueError(f"window {self.window}: expected None; linear layers have a decay instead")
        if self.full_layers:
            raise ValueError(f"full_layers {self.full_layers}: expected none; set softmax_layers instead")
        if beyond := [layer for layer in self.softmax_layers if layer >= self.n_layers]:
            raise ValueError(f"softmax_layers {beyond[0]}: expected 0 to {self.n_layers - 1}")

    @property
    def n_linear_layers(self) -> int:
        return self.n_layers - len(set(self.softmax_layers))

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights in all matrices that a token is multiplied by, the head included."""
        D, H, G, K = self.d_model, self.n_heads, self.G, self.K
        ordinary = D * (H + 2 * G) * K + H * K * D
        return super().n_matmul_params + self.n_linear_layers * (5 * D * H * K - ordinary)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token, as in gpt.py for the layers with softmax.

        The forward pass of a linear layer costs 4 H K for each key of the chunk that the token sees, and
        4 H K^2 for reading from the state and writing to it. Training costs three times the forward pass.
        """
        H, K, c = self.n_heads, self.K, min(self.chunk, seq_len)
        of_softmax = 12 * H * K * (seq_len + 1) // 2
        of_linear = 12 * H * K * (c + 1) // 2 + 12 * H * K * K
        n_softmax = self.n_layers - self.n_linear_layers
        return 6 * self.n_matmul_params + n_softmax * of_softmax + self.n_linear_layers * of_linear


@dataclass(frozen=True)
class Config(Fields, gpt.Config):
    """The fields of gpt.py's Config, which layers keep its attention, and the length of a chunk."""


SIZES = {
    # gpt.py's tiny, with three linear layers and one with softmax.
    "tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True, softmax_layers=(3,)),
}


def slopes(n_heads: int, layer: int, n_layers: int, like: Tensor) -> Tensor:
    """Return the decay rates s of the heads of a layer, (H,), on the device of `like`, and in its dtype or
    float32 if that is wider. The two constants of 1e-5 are MiniMax-01's: without them the last layer would
    not decay at all."""
    wide = torch.promote_types(like.dtype, torch.float32)
    of_heads = 2.0 ** (-8 * torch.arange(1, n_heads + 1, dtype=wide, device=like.device) / n_heads)
    return of_heads * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, K), computed token by token, and the state (B, H, K, K) after the last token, for q,
    k and v (B, T, H, K) and decay rates s (H,). state: before the first token, in float32 at least; None for
    zeros."""
    (B, _, H, K), wide = k.shape, torch.promote_types(k.dtype, torch.float32)
    state = k.new_zeros(B, H, K, v.shape[-1], dtype=wide) if state is None else state
    decay, outputs = torch.exp(-s).to(state.dtype)[:, None, None], []
    for t in range(q.shape[1]):
        written = torch.einsum("bhk,bhv->bhkv", k[:, t].to(state.dtype), v[:, t].to(state.dtype))
        state = decay * state + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].to(state.dtype), state))
    return torch.stack(outputs, dim=1).to(q.dtype), state


class LinearAttention(nn.Module):
    """MiniMax-01's linear layer: chunked for many tokens, recurrent for one."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, K = config.d_model, config.n_heads, config.K
        self.qkv_proj = nn.Linear(D, 3 * H * K, bias=False)  # q, k and v of each head, head after head
        self.output_gate = nn.Linear(D, H * K, bias=False)
        self.out_norm = Norm(H * K, replace(config, norm_eps=1e-6), "rms")  # 1e-6 at any rms_norm_eps
        self.o_proj = nn.Linear(H * K, D, bias=False)
        self.layer, self.n_heads, self.n_layers = layer, H, config.n_layers
        self.options = {"chunk": config.chunk, "backend": config.kernels}  # of linear_attention

    def forward(self, x: Tensor, rotation, cache, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). rotation is not used: positions act through the decay alone."""
        B, T, _ = x.shape
        q, k, v = F.silu(self.qkv_proj(x)).view(B, T, self.n_heads, -1).chunk(3, dim=-1)  # (B, T, H, K)
        s = slopes(self.n_heads, self.layer, self.n_layers, like=q)
        # Autocast would round the state. Documents packed in one row have states of their own.
        with torch.autocast(x.device.type, enabled=False):
            if cache is not None:
                o = cache.attend(self.layer, q, k, v, s, self.options)
            elif cu_seqlens is not None:
                parts = [(a, b) for a, b in pairwise(cu_seqlens.tolist()) if a < b]
                cut = [[y[:, a:b] for y in (q, k, v)] for a, b in parts]
                o = torch.cat([linear_attention(*y, s, **self.options)[0] for y in cut], dim=1)
            else:
                o, _ = linear_attention(q, k, v, s, **self.options)
        o = self.out_norm(o.reshape(B, T, -1))
        return self.o_proj(torch.sigmoid(self.output_gate(x)) * o)


class HybridCache(KVCache):
    """Keys and values of the layers with softmax, and a state (B, H, K, K) of each linear layer.

    Unlike keys and values, a state cannot be cut back to fewer tokens.
    """

    def __init__(self, config: Config, lengths: list[int], max_len: int, like: Tensor):
        super().__init__(config, lengths, max_len, like)
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = (len(lengths), config.n_heads, config.K, config.K)
        linear = set(range(config.n_layers)) - set(config.softmax_layers)
        self.states = [
            like.new_zeros(shape, dtype=wide) if i in linear else None for i in range(config.n_layers)
        ]
        for i in linear:
            self.keys[i] = self.values[i] = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, s: Tensor, options: dict) -> Tensor:
        """Return o (B, T, H, K) of the prompts, or of one token of each row after them, and update the state
        of the layer. options: of `linear_attention`."""
        if self.filled:
            out, self.states[layer] = recurrent(q, k, v, s, self.states[layer])
            return out
        if self.uniform:
            out, self.states[layer] = linear_attention(q, k, v, s, **options)
            return out
        # Prompts of different lengths are padded on the right. Compute each alone, so that the padding does
        # not enter its state.
        rows = [
            linear_attention(*(y[b : b + 1, :n] for y in (q, k, v)), s, **options)
            for b, n in enumerate(self.lengths)
        ]
        self.states[layer] = torch.cat([state for _, state in rows])
        return torch.cat([F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1])) for out, _ in rows])


class Block(gpt.Block):
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        if layer not in config.softmax_layers:
            self.self_attn = LinearAttention(config, layer)


def new_cache(model: nn.Module, lengths: list[int], max_len: int, static: bool = False) -> HybridCache:
    """Return an empty cache for prompts of these lengths, max_len tokens in all. Raises ValueError for a
    static one, which a compiled step needs."""
    if static:
        raise ValueError("linear attention has no cache for a compiled step; leave out --compile")
    return HybridCache(model.config, lengths, max_len, like=model.model.norm.weight)


class LinearGPT(GPT):
    """gpt.py's decoder with linear attention in all but the softmax_layers, saved natively."""

    block, new_cache = Block, new_cache
    matrices = (*GPT.matrices, "output_gate")
    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))


# --- for train.py: the task is gpt.py's

Model = LinearGPT
KIND = "decoder"
TASK = "gpt"
STEPS = 1000
separate_head = gpt.separate_head
show = gpt.show


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of `optim.width_factors` for --mup, in which output_gate is a hidden matrix."""
    return optim.width_factors(name.replace("output_gate", "output_gate_proj"), ratio)


if __name__ == "__main__":
    command.run(lambda: main(LinearGPT, SIZES))  # continue a text, or print the sizes
