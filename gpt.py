"""GPT: a decoder-only transformer that predicts the next token.

    p(x_1 ... x_T) = prod_t p(x_t | x_1 ... x_{t-1})            loss = -mean_t log p(x_t | x_<t)

    h = embedding of x_1 ... x_{T-1}
    h = h + attention(norm(h)),  h = h + mlp(norm(h))           L times
    p(next) = softmax(norm(h) W_head)

One class is two generations of the same idea, chosen by a handful of Config fields:

    GPT-2 (Radford et al. 2019)     LayerNorm, learned positions, GELU, biases
    modern (Llama, Touvron 2023)    RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases; and
                                    QK-norm (Qwen3), sliding window (Mistral), logit soft-cap (Gemma 2)

Parameters carry the names of Hugging Face's Llama, so that checkpoints load without a table of names.

    python gpt.py                                   the sizes: parameters and FLOPs per token
    python gpt.py runs/gpt/model --prompt "def "    continue a text
    python train.py --model gpt --size tiny         train one

Shapes: B batch, T query length, S key length, D model width, H heads, G key/value heads, K head width,
V vocabulary, L layers.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import Tokenizer, get_tokenizer
from formats import decoders
from generate import KVCache, StaticKVCache, generate, stream
from kernels import attention, gelu, linear_cross_entropy, rms_norm


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 50257
    max_seq_len: int = 1024  # tokens
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention; None: n_heads
    d_head: int | None = None  # None: d_model / n_heads
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    positions: str = "rope"  # or "learned"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = (
        None  # {"rope_type": "linear" | "llama3", "factor": ...}, as Hugging Face writes it
    )
    mlp: str = "swiglu"  # or "gelu"
    bias: bool = False  # in every linear layer
    qkv_bias: bool = False  # only in the query, key and value projections (Qwen2)
    # RMSNorm on each head's queries and keys, which bounds attention logits; "all": on all heads as one
    qk_norm: bool | str = False
    window: int | None = None  # a token sees the last `window` tokens, itself included
    full_layers: tuple[int, ...] = ()  # layers that see everything although there is a window
    logit_softcap: float | None = None  # logits become c * tanh(logits / c)
    tie_embeddings: bool = True  # the head is the embedding matrix
    eos_token_id: int | tuple[int, ...] | None = None  # ends a text
    kernels: str = "auto"  # the backend of kernels/, see kernels/attention.py

    def __post_init__(self):
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "d_head", self.d_head or self.d_model // self.n_heads)
        choices = {"norm": ("rms", "layer"), "positions": ("rope", "learned"), "mlp": ("swiglu", "gelu")}
        choices["qk_norm"] = (False, True, "all")
        for field, options in choices.items():
            if getattr(self, field) not in options:
                raise ValueError(
                    f"{field} {getattr(self, field)!r}: expected {' or '.join(map(str, options))}"
                )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.positions == "rope" and self.d_head % 2:
            raise ValueError(f"d_head {self.d_head}: rotary positions turn pairs, so it must be even")

    def fitted(self, tokenizer: Tokenizer, max_seq_len: int) -> "Config":
        """The same model for this vocabulary and rows of this many tokens."""
        return replace(
            self, vocab_size=tokenizer.n_vocab, max_seq_len=max_seq_len, eos_token_id=tokenizer.eot_id
        )

    def changed(self, **fields) -> "Config":
        """With other values; widths that were left to follow from others follow from the new ones."""
        follow = {"d_head": None} if self.d_head == self.d_model // self.n_heads else {}
        follow |= {"n_kv_heads": None} if self.n_kv_heads == self.n_heads else {}
        return replace(self, **follow | fields)

    def layer_window(self, layer: int) -> int | None:
        return None if layer in self.full_layers else self.window

    @property
    def n_matmul_params(self) -> int:
        """Weights that every token is multiplied with: all matrices but the embedding look-ups."""
        D, H, G, K = self.d_model, self.n_heads, self.n_kv_heads, self.d_head
        attn = D * (H + 2 * G) * K + H * K * D
        mlp = (3 if self.mlp == "swiglu" else 2) * D * self.d_ff
        return self.n_layers * (attn + mlp) + self.vocab_size * D

    @property
    def n_params(self) -> int:
        """All parameters; a tied head is counted once."""
        D, H, G, K = self.d_model, self.n_heads, self.n_kv_heads, self.d_head
        biases = (H + 2 * G) * K * (self.bias or self.qkv_bias)
        biases += (D + D + self.d_ff * (2 if self.mlp == "swiglu" else 1)) * self.bias
        norm = D * (2 if self.norm == "layer" else 1)
        embeddings = 0 if self.tie_embeddings else self.vocab_size * D
        embeddings += self.max_seq_len * D if self.positions == "learned" else 0
        qk_norm = {False: 0, True: 2 * K, "all": (H + G) * K}[self.qk_norm]
        per_layer = biases + 2 * norm + qk_norm
        return self.n_matmul_params + self.n_layers * per_layer + norm + embeddings

    def flops_per_token(self, seq_len: int) -> int:
        """Matmul FLOPs of forward and backward per token at this sequence length; masked scores not counted.

        2 per weight forward, twice that backward (gradients of inputs and of weights): 6 per weight.
        Attention multiplies a query with each key it sees and each weight with a value: 4 H K per visible
        key, times 3.
        """
        flops = 6 * self.n_matmul_params
        for layer in range(self.n_layers):
            w = min(self.layer_window(layer) or seq_len, seq_len)
            keys_seen = w * (w + 1) // 2 + (seq_len - w) * w  # summed over the queries of one sequence
            flops += 12 * self.n_heads * self.d_head * keys_seen // seq_len
        return flops


GPT2 = dict(norm="layer", norm_eps=1e-5, positions="learned", mlp="gelu", bias=True, eos_token_id=50256)

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
    "llama2-7b": Config(32, 32, 4096, 11008, 32000, 4096, norm_eps=1e-5, tie_embeddings=False),
    "llama3-8b": Config(
        32, 32, 4096, 14336, 128256, 8192, 8, norm_eps=1e-5, rope_theta=500_000.0, tie_embeddings=False
    ),
    "mistral-7b": Config(
        32, 32, 4096, 14336, 32000, 32768, 8, norm_eps=1e-5, window=4096, tie_embeddings=False
    ),
}


class Norm(nn.Module):
    def __init__(self, width: int, config: Config, kind: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None
        self.width, self.eps, self.kind, self.backend = width, config.norm_eps, kind, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps, backend=self.backend)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rope(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (..., T, K / 2), of the angles by which rotary embedding turns each pair of
    features.

    Pair i at position p turns by p * theta^(-2i/K), so that q . k depends on the distance of the two
    positions alone (RoFormer, Su et al. 2021, section 3.2). Scaling stretches the longest wavelengths to
    reach further: all alike ("linear", Chen et al. 2023), or only those longer than the original context
    ("llama3").
    """
    K = config.d_head
    pairs = torch.arange(0, K, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (pairs / K)  # (K / 2,)
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling is not None:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wavelength, left as it is
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    angles = positions[..., None].float() * frequencies  # (..., T, K / 2)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + K/2}) of x (B, T, H, K) by the angles of `rope`, computing in float32.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-b, a), dim=-1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
        self.q_proj = nn.Linear(D, H * K, bias=config.bias or config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.bias or config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.bias or config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.bias)
        heads_at_once = config.qk_norm == "all"
        self.q_norm = Norm(H * K if heads_at_once else K, config, "rms") if config.qk_norm else None
        self.k_norm = Norm(G * K if heads_at_once else K, config, "rms") if config.qk_norm else None
        self.layer, self.d_head, self.window = layer, K, config.layer_window(layer)
        self.backend = config.kernels

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None:
            q = self.q_norm(q.view(B, T, -1, self.q_norm.width))
            k = self.k_norm(k.view(B, T, -1, self.k_norm.width))
        q = q.view(B, T, -1, self.d_head)  # (B, T, H, K)
        k = k.view(B, T, -1, self.d_head)  # (B, T, G, K)
        v = v.view(B, T, -1, self.d_head)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None and cache.filled:
            # The cache holds just what the new token may see, so there is nothing left to mask.
            k, v, seqlens_k = cache.append(self.layer, k, v)
            y = attention(q, k, v, seqlens_k=seqlens_k, backend=self.backend)
        else:
            if cache is not None:
                cache.fill(self.layer, k, v)
            y = attention(
                q, k, v, causal=True, window=self.window, cu_seqlens=cu_seqlens, backend=self.backend
            )
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020), or GPT-2's down(gelu(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        gated = config.mlp == "swiglu"
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if gated else None
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(gelu(self.up_proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.d_model, config, config.norm)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.d_model, config, config.norm)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    block = Block

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        learned = config.positions == "learned"
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.d_model),
                **({"embed_positions": nn.Embedding(config.max_seq_len, config.d_model)} if learned else {}),
                "layers": nn.ModuleList(self.block(config, layer) for layer in range(config.n_layers)),
                "norm": Norm(config.d_model, config, config.norm),
            }
        )
        untied = not config.tie_embeddings
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if untied else None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's: N(0, 0.02^2), and the two projections that write into the residual stream scaled down by
        sqrt(2 L), so that the sum of 2 L of them has the variance of one (Radford et al. 2019, section
        2.3)."""
        for name, p in self.named_parameters():
            name = name.removesuffix(".weight")
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("norm"):
                p.fill_(1.0)
            elif name.endswith(("o_proj", "down_proj")):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layers))
            # "gate" is the router of moe.py
            elif name.endswith(("_proj", "embed_tokens", "embed_positions", "lm_head", "gate")):
                p.normal_(std=0.02)
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to GPT.initialize")

    def hidden(
        self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Normalised hidden states (B, T, D) of tokens (B, T), int64.

        cache: filled with the prompts on its first pass, one token at a time after. cu_seqlens: see
        `kernels.attention`; positions then count from the start of each document.
        """
        T = tokens.shape[1]
        if cache is not None:
            positions = cache.positions(T, tokens.device)
        else:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cu_seqlens is not None:
            document = torch.bucketize(positions, cu_seqlens, right=True) - 1
            positions = positions - cu_seqlens[document]
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        rotation = None
        if self.config.positions == "rope":
            rotation = rope(positions, self.config)
        else:
            x = x + self.model.embed_positions(positions)
        for block in self.model.layers:
            x = block(x, rotation, cache, cu_seqlens)
        if cache is not None:
            cache.advance()
        return self.model.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., D)."""
        tied = self.lm_head is None
        logits = F.linear(hidden, self.head_weight) if tied else self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of tokens (B, T); arguments as for `hidden`."""
        return self.logits(self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean nats per target, in float32, of a batch from `make_batch`, optionally with cu_seqlens; where
        targets are -100, nothing is asked."""
        hidden = self.hidden(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))
        loss, _ = linear_cross_entropy(
            hidden,
            self.head_weight,
            batch["targets"],
            softcap=self.config.logit_softcap,
            backend=self.config.kernels,
        )
        return loss, {"targets": (batch["targets"] >= 0).sum()}

    def flops_per_token(self, seq_len: int) -> int:
        return self.config.flops_per_token(seq_len)

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> KVCache:
        """An empty cache for prompts of these lengths, with room for max_len tokens; static: to compile."""
        cache = StaticKVCache if static else KVCache
        return cache(self.config, lengths, max_len, like=self.model.norm.weight)

    # Functions of generate.py with this model as their first argument.
    generate = generate
    stream = stream

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "GPT":
        """Load a Hugging Face directory: GPT-2, Llama, Mistral, Qwen2 or Qwen3, in the precision it was
        saved in.

        Raises ValueError naming what is missing, damaged, of another shape, or not implemented here.
        """
        config = Config(**decoders.read_decoder_config(directory), kernels=kernels)
        with torch.device("meta"):
            model = cls(config)
        decoders.load_decoder_weights(model, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is."""
        decoders.save_decoder(self, directory)


Model = GPT
STEPS = 1300
LEARNING_RATE = 1.0
SPECIAL_TOKENS = {}  # none but the end of text, which every tokenizer has


def make_batch(
    tokens: Tensor, config: Config, generator: torch.Generator, tokenizer: Tokenizer | None = None
) -> dict[str, Tensor]:
    """Windows of T + 1 tokens (B, T + 1) to inputs and the tokens that follow them, each (B, T)."""
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


@torch.no_grad()
def perplexity(model: GPT, tokens: Tensor, stride: int) -> float:
    """exp(mean nats) of tokens (N,), read through windows of max_seq_len that move on by `stride`.

    Each window predicts only the tokens that no window before it has, so that a smaller stride gives them
    more context and costs more passes (the sliding-window figures of GPT-2, Radford et al. 2019, section
    3.1).
    """
    context = model.config.max_seq_len
    if not 1 <= stride <= context or tokens.numel() < 2:
        raise ValueError(
            f"perplexity: stride {stride}, {tokens.numel()} tokens: expected 1 to {context}, and 2 tokens"
        )
    nats, scored = 0.0, 1  # the first token has no context to be predicted from
    for start in range(0, tokens.numel() - 1, stride):
        targets = tokens[start + 1 : start + context + 1]
        n_new = start + 1 + targets.numel() - scored
        logits = model(tokens[None, start : start + targets.numel()])[0, -n_new:]  # (n_new, V)
        nats += F.cross_entropy(logits.double(), targets[-n_new:], reduction="sum").item()
        scored += n_new
        if scored == tokens.numel():
            break
    return math.exp(nats / (scored - 1))


def show(
    model: GPT, tokenizer: Tokenizer, held_out: Tensor | None = None, directory: Path | None = None
) -> str:
    """A text from nothing but the token that separates documents, the same draw at every call."""
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(0)
    n_new = min(200, model.config.max_seq_len - 1)
    sample = model.generate([[tokenizer.eot_id]], n_new, temperature=0.8, top_p=0.95, generator=generator)
    return tokenizer.decode(sample[0])


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", help="directory in Hugging Face layout; without it, the sizes"
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-k", type=int, help="draw only from the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="only from the likeliest of this joint probability"
    )
    parser.add_argument(
        "--min-p", type=float, help="only from tokens at least this fraction as likely as the best"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def continue_text(model_class: type[GPT], args: argparse.Namespace) -> None:
    """Print the prompt and what the checkpoint's model makes of it, as it comes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_class.from_pretrained(args.checkpoint).to(device).eval()
    tokenizer = get_tokenizer(args.checkpoint)
    tokens = tokenizer.encode(args.prompt) or [tokenizer.eot_id]
    options = {
        key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    generator = torch.Generator(device).manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    stop = tokenizer.eot_id
    steps = model.stream([tokens], args.max_new_tokens, stop=stop, generator=generator, **options)
    print_as_it_comes(steps, tokenizer, stop)


def print_as_it_comes(steps: Iterator[list[int]], tokenizer: Tokenizer, stop: int) -> str:
    """Print the text of the one row that steps, from `stream`, continues; returns it."""
    new, printed = [], ""
    for (token,) in steps:
        if token == stop:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span several tokens
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
    return printed


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of a parameter's initial values and of AdamW's learning rate for width transfer with
    ratio r = base width / width (muP: Tensor Programs V, Yang et al. 2022, tables 3 and 8). For moe.py too.

        embeddings, norms, biases    1          1
        hidden matrices              sqrt(r)    r    outputs are sums over the width. At the start their terms
                                                     are independent; what is learned points in one direction
        router                       r          r    an output: the number of experts does not grow
        final norm                   r          r    in place of the multiplier r of the logits in table 8

    The final norm is equivalent to that multiplier: the logits are W (r g x), where g starts at 1, and since
    AdamW's steps do not depend on the scale of the gradient, a learning rate of r for r g is a learning rate
    of 1 for g. So the head, which may be the embedding matrix, stays as it is. Attention keeps its
    1 / sqrt(K), because a wider model has more heads and no wider ones.

    Raises ValueError for a parameter without a rule.
    """
    kind = name.removesuffix(".weight")
    if kind.startswith("model.norm") or kind.endswith(".gate"):
        return ratio, ratio
    if kind.endswith("_proj"):
        return math.sqrt(ratio), ratio
    if kind.endswith(("embed_tokens", "embed_positions", "lm_head", "norm", "bias")):
        return 1.0, 1.0
    raise ValueError(f"parameter {name}: width transfer has no rule for it; add one to gpt.width_factors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a trained model, or print the sizes.")
    add_sampling_flags(parser)
    args = parser.parse_args()
    if args.checkpoint is not None:
        continue_text(GPT, args)
        return
    print(f"{'size':12} {'parameters':>15} {'layers':>6} {'width':>6} {'context':>8} {'FLOPs/token':>12}")
    for name, c in SIZES.items():
        flops = c.flops_per_token(c.max_seq_len)
        print(f"{name:12} {c.n_params:15,} {c.n_layers:6} {c.d_model:6} {c.max_seq_len:8} {flops:12.3e}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
