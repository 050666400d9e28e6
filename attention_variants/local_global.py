"""Local and global attention: most layers see only the last tokens, a few see all of them (Gemma 2 and 3).

    query i sees the keys  j <= i                   in the layers of full_layers (global)
                           i - window < j <= i      in the others (local)

In generation a local layer keeps `window` keys and values per row, however long the text is. Gemma 3 has one
global layer in six, and its authors measured almost no loss of perplexity (Kamath et al. 2025, section 5.2).

Gemma differs from Llama, and so this file from gpt.py, in five more things:

    scores         q . k / sqrt(query_scale), where query_scale need not be the head width K. Gemma 2 also
                   caps the scores, at cap * tanh(scores / cap)
    positions      in Gemma 3 local and global layers have different rotary bases, 10,000 and 1,000,000
    norms          x / rms(x) * (1 + w), computed in float32 and rounded once; four per layer:
                   x = x + norm(attention(norm(x))),  x = x + norm(mlp(norm(x)))
    embeddings     times sqrt(D), a factor that is rounded to the dtype of the weights. The head is the same
                   matrix without the factor
    MLP            down(gelu(gate(x)) * up(x))

Gemma 2 (Riviere et al. 2024, section 2), Gemma 3 (Kamath et al. 2025, section 2).

    python -m attention_variants.local_global                       the sizes
    python -m attention_variants.local_global DIR --prompt "def "   continue a text
    python train.py --model local_global                            train one

Shapes as in gpt.py: B batch, T tokens, D model width, H heads, G key/value heads, K head width.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gpt
from formats import command
from generate import KVCache, main
from gpt import GPT, rope
from kernels import attention, gelu, products, rms_norm


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config, and those of Gemma. `mlp` must be "swiglu", which means a gated MLP; the
    gate's activation is a GELU here."""

    query_scale: float | None = None  # scores are divided by its square root; None: K
    attention_softcap: float | None = None  # c: scores become c * tanh(scores / c)
    # rope_theta of the local layers, without rope_scaling; None: theta and scaling of the global layers.
    local_theta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.norm, self.positions, self.mlp) != ("rms", "rope", "swiglu") or self.bias or self.qkv_bias:
            raise ValueError(
                f"norm {self.norm!r}, positions {self.positions!r}, mlp {self.mlp!r}, bias {self.bias}, "
                f"qkv_bias {self.qkv_bias}: expected 'rms', 'rope', 'swiglu', False, False"
            )
        if self.qk_norm == "all":
            raise ValueError("qk_norm 'all': expected True, a norm of each head, or False")


def every(n: int, n_layers: int) -> tuple[int, ...]:
    """Return the numbers n - 1, 2 n - 1, ... of every n-th of n_layers layers, counted from 0."""
    return tuple(range(n - 1, n_layers, n))


def gemma2(n_layers: int, n_heads: int, d_model: int, d_ff: int, **changes) -> Config:
    """Return the Config of a Gemma 2, in which every other layer is global."""
    shape = dict(vocab_size=256_000, max_seq_len=8192, d_head=256, window=4096)
    shape |= dict(attention_softcap=50.0, logit_softcap=30.0, eos_token_id=1)
    full = every(2, n_layers)
    return Config(n_layers, n_heads, d_model, d_ff, **shape | {"full_layers": full} | changes)


def gemma3(n_layers: int, n_heads: int, d_model: int, d_ff: int, **changes) -> Config:
    """Return the Config of a Gemma 3, in which every sixth layer is global."""
    shape = dict(vocab_size=262_144, max_seq_len=32_768, d_head=256, window=512, qk_norm=True)
    shape |= dict(rope_theta=1_000_000.0, local_theta=10_000.0, eos_token_id=1)
    full = every(6, n_layers)
    return Config(n_layers, n_heads, d_model, d_ff, **shape | {"full_layers": full} | changes)


# What the language models of Gemma 3 have from 4b on. The published models of these sizes also read images.
LONG = dict(
    vocab_size=262_208, max_seq_len=131_072, window=1024, rope_scaling={"rope_type": "linear", "factor": 8.0}
)

SIZES = {
    # gpt.py's tiny, with three local layers and a global one.
    "tiny": Config(
        4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True, window=32, full_layers=(3,),
        rope_theta=100_000.0, local_theta=10_000.0,
    ),
    "gemma2-2b": gemma2(26, 8, 2304, 9216, n_kv_heads=4),
    "gemma2-9b": gemma2(42, 16, 3584, 14336, n_kv_heads=8),
    "gemma2-27b": gemma2(46, 32, 4608, 36864, n_kv_heads=16, d_head=128, query_scale=144.0),
    "gemma3-270m": gemma3(18, 4, 640, 2048, n_kv_heads=1),
    "gemma3-1b": gemma3(26, 4, 1152, 6912, n_kv_heads=1),
    "gemma3-4b": gemma3(34, 8, 2560, 10240, n_kv_heads=4, **LONG),
    "gemma3-12b": gemma3(48, 16, 3840, 15360, n_kv_heads=8, **LONG),
    "gemma3-27b": gemma3(62, 32, 5376, 21504, n_kv_heads=16, d_head=128, query_scale=168.0, **LONG),
}  # fmt: skip


class Norm(nn.Module):
    """RMSNorm with the factor 1 + w: w is 0 at the start, and weight decay pulls the factor towards 1."""

    kind = "rms of 1 + w"  # see kernels/few_rows.py

    def __init__(self, width: int, config: Config, kind: str = "rms"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))  # filled by LocalGlobal.initialize
        self.width, self.eps, self.backend = width, config.norm_eps, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        # Computed in float32 (float64 stays so) and rounded once. Llama also rounds x / rms(x), before the
        # product with the factor.
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = 1 + self.weight.to(wide)
        return rms_norm(x.to(wide), factor, self.eps, backend=self.backend).to(x.dtype)


class Embedding(nn.Embedding):
    """Token embeddings, multiplied by sqrt(D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        # The factor is rounded to the dtype of x, as in Gemma: in bfloat16 sqrt(3072) = 55.43 becomes 55.5.
        return x * torch.full((), math.sqrt(x.shape[-1]), dtype=x.dtype, device=x.device)


class Attention(gpt.Attention):
    """gpt.py's attention with another scale of the scores, a cap for them, and Gemma's norms."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config.K, config), Norm(config.K, config)
        self.scale = (config.query_scale or config.K) ** -0.5
        self.softcap = config.attention_softcap

    def forward(self, x: Tensor, rotations, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). rotations: from `LocalGlobal.rotation`."""
        B, T, _ = x.shape
        q, k, v = self.heads(x, rotations[self.window is not None])

        mask = {"causal": True, "window": self.window, "cu_seqlens": cu_seqlens}
        if cache is not None:
            k, v, mask = cache.store(self.layer, k, v, mask)
        y = attention(q, k, v, **mask, scale=self.scale, softcap=self.softcap, backend=self.backend)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(gpt.MLP):
    """down(gelu(gate(x)) * up(x)) (GEGLU, Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = products(self, x)
        return self.down_proj(gelu(gate) * up)


class Block(nn.Module):
    """Attention and an MLP, each between two norms, and added to the residual stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.d_model, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.d_model, config)
        self.pre_feedforward_layernorm = Norm(config.d_model, config)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = Norm(config.d_model, config)

    def forward(self, x: Tensor, rotations, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rotations, cache, cu_seqlens)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class LocalGlobal(GPT):
    """gpt.py's decoder with Gemma's blocks, norms and embeddings."""

    block, norm, embedding = Block, Norm, Embedding

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the matrices as gpt.py does, and set w of all norms to 0, so that their factor is 1."""
        super().initialize()
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.zero_()

    def rotation(self, positions: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return two pairs of cos and sin of `rope` at positions (B, T): of global and of local layers."""
        c = self.config
        of_global = rope(positions, c.rope_theta, c.K, c.rope_scaling)
        return of_global, of_global if c.local_theta is None else rope(positions, c.local_theta, c.K)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "LocalGlobal":
        """Load a Hugging Face directory of Gemma2ForCausalLM or Gemma3ForCausalLM, in the dtype it was saved
        in; ValueError naming what is missing, damaged, of another shape, or not implemented here."""
        from formats import gemma

        return gemma.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors as Gemma 3 with qk_norm, else as Gemma 2. Raises ValueError
        for a Config that neither describes."""
        from formats import gemma

        gemma.save(self, directory)


# --- for train.py: the task is gpt.py's

Model = LocalGlobal
KIND = "decoder"
TASK = "gpt"
STEPS = 1100
separate_head = gpt.separate_head
show = gpt.show


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Raise ValueError: with factors 1 + w a norm cannot be rescaled, as --mup needs."""
    raise ValueError(f"parameter {name}: width transfer has no rule for norms of 1 + w; leave out --mup")


if __name__ == "__main__":
    command.run(lambda: main(LocalGlobal, SIZES))  # continue a text, or print the sizes
