"""GPT: a decoder-only transformer that predicts the next token.

    p(t_1 ... t_N) = prod_i p(t_i | t_1 ... t_{i-1})            loss = -mean_i log p(t_i | t_<i)

    x = embedding of the tokens t_1 ... t_T
    x = x + attention(norm(x)),  x = x + mlp(norm(x))           L times
    p(t_2 ... t_{T+1}) = softmax(norm(x) W_head)

One class is two generations of the same idea, told apart by a handful of Config fields:

    GPT-2 (Radford et al. 2019)     LayerNorm, learned positions, GELU, biases
    modern (Llama, Touvron 2023)    RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases; and
                                    QK-norm (Qwen3), sliding window (Mistral), logit soft-cap (Gemma 2)

Parameters have the names of Hugging Face's Llama; formats/decoders.py renames those of GPT-2.

    python gpt.py                                   the sizes: parameters and FLOPs per token
    python gpt.py runs/gpt/model --prompt "def "    continue a text
    python train.py --model gpt --size tiny         train one

Shapes: B batch, T tokens, D model width, H heads, G key/value heads, K head width, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_variants.longer_context import stretched
from formats.config_values import check_values
from generate import KVCache, StaticKVCache, generate, run, stream
from kernels import attention, gelu, linear_cross_entropy, products, rms_norm


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 50257
    max_seq_len: int = 1024  # tokens
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention; None: n_heads. G reads it
    d_head: int | None = None  # None: d_model / n_heads. K reads it
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn", ...}, as in HF's config
    mlp: str = "swiglu"  # or "gelu"
    bias: bool = False  # in every linear layer
    qkv_bias: bool = False  # only in the query, key and value projections (Qwen2)
    # RMSNorm of each head's queries and keys, which bounds the attention logits; "all": of all heads at once
    qk_norm: bool | str = False
    window: int | None = None  # a token sees the last `window` tokens, itself included
    full_layers: tuple[int, ...] = ()  # the layers without the window
    logit_softcap: float | None = None  # logits become c * tanh(logits / c)
    tie_embeddings: bool = True  # the head is the embedding matrix
    eos_token_id: int | tuple[int, ...] | None = None  # the token that ends a text
    kernels: str = "auto"  # which implementation of kernels/ to use, see kernels/backend.py

    def __post_init__(self):
        choices = {"norm": ("rms", "layer"), "positions": ("rope", "learned"), "mlp": ("swiglu", "gelu")}
        check_values(self, **choices, qk_norm=(False, True, "all"))
        if self.n_heads % self.G:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.G}")
        if self.K < 1 or (self.positions == "rope" and self.K % 2):
            raise ValueError(f"d_head {self.K}: rotary positions turn pairs of features, so it must be even")

    @property
    def G(self) -> int:  # key/value heads
        return self.n_kv_heads or self.n_heads

    @property
    def K(self) -> int:  # width of a head
        return self.d_head or self.d_model // self.n_heads

    def layer_window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, None if it sees everything."""
        return None if layer in self.full_layers else self.window

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights in all matrices that a token is multiplied by, the head included."""
        D, H, G, K = self.d_model, self.n_heads, self.G, self.K
        attn = D * (H + 2 * G) * K + H * K * D
        mlp = (3 if self.mlp == "swiglu" else 2) * D * self.d_ff
        return self.n_layers * (attn + mlp) + self.vocab_size * D

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token in a sequence of this length.

        A parameter costs 2 forward and 4 backward (gradients of inputs and of parameters). Attention costs
        4 H K forward per visible key (q . k, and probability times v), and twice that backward.
        """
        flops = 6 * self.n_matmul_params
        for layer in range(self.n_layers):
            w = min(self.layer_window(layer) or seq_len, seq_len)
            keys_seen = w * (w + 1) // 2 + (seq_len - w) * w  # summed over the queries of one sequence
            flops += 12 * self.n_heads * self.K * keys_seen // seq_len
        return flops


GPT2 = dict(norm="layer", norm_eps=1e-5, positions="learned", mlp="gelu", bias=True, eos_token_id=50256)
LLAMA = dict(norm_eps=1e-5, tie_embeddings=False)

SIZES = {
    "tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True),
    "10m": Config(5, 6, 384, 1024, 4096, 512, qk_norm=True),
    "124m": Config(12, 12, 768, 2048, qk_norm=True),
    "350m": Config(24, 16, 1024, 2816, qk_norm=True),
    "774m": Config(36, 20, 1280, 3840, max_seq_len=2048, n_kv_heads=10, qk_norm=True),
    "1.3b": Config(24, 16, 2048, 6016, max_seq_len=2048, n_kv_heads=8, qk_norm=True),
    "gpt2": Config(12, 12, 768, 4 * 768, **GPT2),
    "gpt2-medium": Config(24, 16, 1024, 4 * 1024, **GPT2),
    "gpt2-large": Config(36, 20, 1280, 4 * 1280, **GPT2),
    "gpt2-xl": Config(48, 25, 1600, 4 * 1600, **GPT2),
    "llama2-7b": Config(32, 32, 4096, 11008, 32000, 4096, **LLAMA),
    "llama3-8b": Config(32, 32, 4096, 14336, 128256, 8192, 8, rope_theta=500_000.0, **LLAMA),
    "mistral-7b": Config(32, 32, 4096, 14336, 32000, 32768, 8, window=4096, **LLAMA),
}


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; kind "rms" or "layer"."""

    def __init__(self, width: int, config: Config, kind: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))  # filled by GPT.initialize
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.width, self.eps, self.kind, self.backend = width, config.norm_eps, kind, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps, backend=self.backend)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rope(positions: Tensor, theta: float, K: int, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 (..., T, 1, K), of the angles of rotary embedding at positions (..., T).

    Pair i of the K features at position p turns by p * theta^(-2i/K), so that q . k depends on the distance
    of the two positions alone (RoFormer, Su et al. 2021, section 3.2). scaling, as in Config.rope_scaling,
    slows pairs down, to reach further; see attention_variants/longer_context.py.
    """
    pairs = torch.arange(0, K, 2, device=positions.device).float()
    frequencies, factor = 1.0 / theta ** (pairs / K), 1.0  # (K / 2,)
    if scaling is not None:
        frequencies, factor = stretched(frequencies, theta, scaling)
    angles = positions[..., None].float() * frequencies  # (..., T, K / 2)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # (..., T, 1, K)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (a, b) = (x_i, x_{i + K/2}) of x (B, T, H, K) by the angles of `rope`, in float32: they
    become (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-b, a), dim=-1), sin).to(x.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v under a causal mask, for H heads of queries and G heads of keys and values,
    each of which serves H / G heads of queries (grouped-query attention, Ainslie et al. 2023)."""

    same_input = ("q_proj", "k_proj", "v_proj")  # see kernels/few_rows.py

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.G, config.K
        self.q_proj = nn.Linear(D, H * K, bias=config.bias or config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.bias or config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.bias or config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.bias)
        one_vector = config.qk_norm == "all"
        self.q_norm = Norm(H * K if one_vector else K, config, "rms") if config.qk_norm else None
        self.k_norm = Norm(G * K if one_vector else K, config, "rms") if config.qk_norm else None
        self.layer, self.d_head, self.window = layer, K, config.layer_window(layer)
        self.backend = config.kernels

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). rotation: from `rope`, None without rotary positions."""
        B, T, _ = x.shape
        q, k, v = self.heads(x, rotation)

        # In generation, keys and values of earlier tokens come from the cache, which holds visible ones only.
        mask = {"causal": True, "window": self.window, "cu_seqlens": cu_seqlens}
        if cache is not None:
            k, v, mask = cache.store(self.layer, k, v, mask)
        y = attention(q, k, v, **mask, backend=self.backend)  # (B, T, H, K)
        return self.o_proj(y.reshape(B, T, -1))

    def heads(self, x: Tensor, rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries (B, T, H, K), keys and values (B, T, G, K) of x (B, T, D), with queries and keys
        normalised (QK-norm) and rotated."""
        B, T, _ = x.shape
        q, k, v = products(self, x)

        # QK-norm over each head, or over all heads together.
        if self.q_norm is not None:
            q = self.q_norm(q.view(B, T, -1, self.q_norm.width))
            k = self.k_norm(k.view(B, T, -1, self.k_norm.width))
        q, k, v = (y.view(B, T, -1, self.d_head) for y in (q, k, v))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020), or GPT-2's down(gelu(up(x)))."""

    same_input = ("gate_proj", "up_proj")

    def __init__(self, config: Config):
        super().__init__()
        gated = config.mlp == "swiglu"
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if gated else None
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(gelu(self.up_proj(x)))
        gate, up = products(self, x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream. A variant replaces `attention`."""

    attention = Attention

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.d_model, config, config.norm)
        self.self_attn = self.attention(config, layer)
        self.post_attention_layernorm = Norm(config.d_model, config, config.norm)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The decoder. A variant replaces one of its classes, and names its other matrices in `matrices`."""

    block, norm, embedding = Block, Norm, nn.Embedding
    # The endings of the names of parameters that `initialize` draws from N(0, 0.02^2).
    matrices = ("_proj", "embed_tokens", "embed_positions", "lm_head")

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        learned = config.positions == "learned"
        self.model = nn.ModuleDict(
            {
                "embed_tokens": self.embedding(config.vocab_size, config.d_model),
                **({"embed_positions": nn.Embedding(config.max_seq_len, config.d_model)} if learned else {}),
                "layers": nn.ModuleList(self.block(config, layer) for layer in range(config.n_layers)),
                "norm": self.norm(config.d_model, config, config.norm),
            }
        )
        untied = not config.tie_embeddings
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if untied else None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw matrices from N(0, 0.02^2), and divide the two projections that write into the residual stream
        by sqrt(2 L), so that the sum of 2 L of them has the variance of one (GPT-2, Radford et al. 2019,
        section 2.3). Raises ValueError for a parameter that no rule names."""
        for name, p in self.named_parameters():
            name = name.removesuffix(".weight")
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("norm"):
                p.fill_(1.0)
            elif name.endswith(("o_proj", "down_proj")):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif name.endswith(self.matrices):
                p.normal_(std=0.02)
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to GPT.initialize")

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens=None) -> Tensor:
        """Return the normalised hidden states (B, T, D) of tokens (B, T), int64, or of embeddings (B, T, D).
        cache: of generation; the first pass fills it with the prompts, later ones add one token each.
        cu_seqlens, int32: where documents packed in one row begin, and its end: see `kernels.attention`."""
        # Positions (1, T), or (B, 1) where the rows of a cache differ in length.
        T, device = tokens.shape[1], tokens.device
        positions = torch.arange(T, device=device)[None] if cache is None else cache.positions(T, device)
        if cu_seqlens is not None:
            document = torch.bucketize(positions, cu_seqlens, right=True) - 1
            positions = positions - cu_seqlens[document]

        # Embeddings; learned positions are added, rotary ones turn queries and keys in every layer.
        x = tokens if tokens.is_floating_point() else self.model.embed_tokens(tokens)  # (B, T, D)
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions)
        rotation = self.rotation(positions)

        for block in self.model.layers:
            x = block(x, rotation, cache, cu_seqlens)
        if cache is not None:
            cache.advance()
        return self.model.norm(x)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin of `rope` at positions (B, T), which all blocks get; None without it."""
        c = self.config
        return rope(positions, c.rope_theta, c.K, c.rope_scaling) if c.positions == "rope" else None

    @property
    def head_weight(self) -> Tensor:
        """Return the matrix (V, D) of the head."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        logits = F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens=None) -> Tensor:
        """Return the logits (B, T, V) of the token after each of tokens (B, T); arguments as for `hidden`."""
        return self.logits(self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean nats per target, in float32, of a batch from `make_batch`, and no metrics. A target
        of -100 is not predicted. With --document-mask the batch has cu_seqlens. Large logits, (B T, V), are
        computed in chunks: see kernels/cross_entropy.py."""
        hidden = self.hidden(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))
        options = {"softcap": self.config.logit_softcap, "backend": self.config.kernels}
        loss, _z_loss = linear_cross_entropy(hidden, self.head_weight, batch["targets"], **options)
        return loss, {}

    def flops_per_token(self, seq_len: int) -> int:
        return self.config.flops_per_token(seq_len)

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> KVCache:
        """Return an empty cache for prompts of these lengths, max_len tokens in all; static: to compile."""
        kind = StaticKVCache if static else KVCache
        return kind(self.config, lengths, max_len, like=self.model.norm.weight)

    # Functions of generate.py with this model as their first argument.
    generate = generate
    stream = stream

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "GPT":
        """Load a Hugging Face directory: GPT-2, Llama, Mistral, Qwen2 or Qwen3, in the dtype it was saved in;
        ValueError naming what is missing, damaged, of another shape, or not implemented here."""
        from formats import decoders

        return decoders.load_decoder(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is."""
        from formats import decoders

        decoders.save_decoder(self, directory)


# --- what train.py looks up by name, see engine/contract.py: the model, and its task, the next token

Model = GPT
STEPS = 1300  # of the default run


def make_batch(rows: list[dict], config: Config, generator, tokenizer=None) -> dict[str, Tensor]:
    """Return inputs and the tokens that follow them, each int64 (B, T), of B rows {"tokens": (T + 1,)}."""
    tokens = torch.stack([torch.from_numpy(row["tokens"]) for row in rows])  # (B, T + 1)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def show(model: GPT, dataset, out: Path | None = None) -> str:
    """Return a text from nothing but the token that separates documents: the same draws at every call."""
    tokenizer = dataset.tokenizer
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(0)
    n_new = min(200, model.config.max_seq_len - 1)
    sample = model.generate([[tokenizer.eot_id]], n_new, temperature=0.8, top_p=0.95, generator=generator)
    return tokenizer.decode(sample[0])


def separate_head(model: GPT) -> None:
    """Give the model a head of its own, a copy of the embedding matrix, where the two are tied."""
    if model.lm_head is None:
        weight = nn.Parameter(model.head_weight.detach().clone())
        model.lm_head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        model.lm_head.weight, model.config = weight, replace(model.config, tie_embeddings=False)


if __name__ == "__main__":
    run(GPT, SIZES)  # continue a text, or print the sizes
