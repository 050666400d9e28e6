"""Multi-head latent attention: one small latent vector per token holds the keys and values of all heads.

    c = norm(W_c x)   (R numbers)        k_r = rotate(W_r x)   (one key of K_r numbers for all heads)
    k = [W_uk c | k_r],  v = W_uv c      W_uk and W_uv differ from head to head
    q = [q_n | rotate(q_r)]              [q_n | q_r] = W_q x, or by a latent of queries: W_uq norm(W_cq x)
    out = W_o softmax(scale q . k) v     scale: 1 / sqrt(K), larger with YaRN

Generation keeps only [c | k_r] of each token: R + K_r numbers per layer, 576 in DeepSeek-V2 and V3, where
128 heads of ordinary keys and values would be 32,768. There are two ways to compute the same output:

    expanded     make k and v of all tokens, and attend: 2 (K + V) H FLOPs per query and key; for training
    absorbed     q_n . (W_uk c) = (W_uk^T q_n) . c: attend to the latents themselves, with [W_uk^T q_n | q_r]
                 as query, and apply W_uv to the weighted mean of c: 2 (2 R + K_r) H FLOPs, but a small cache
                 to read

A rotation between q_n and W_uk would depend on both positions, and W_uk^T could not be applied to the query
once. So only q_r and k_r are rotated.

The source is DeepSeek-V2 (2024, section 2.1). Its context is extended by YaRN (longer_context.py), which also
multiplies scores by a constant: see `growth_of_scores`.

    python -m attention_variants.latent                       the sizes
    python -m attention_variants.latent DIR --prompt "def "   continue a text
    python train.py --model latent                            train one; deepseek.py adds experts

Shapes: B batch, T queries, S keys, D model width, H heads, R width of the latent; K_n and K_r, widths of the
parts of a head's key without and with positions, K = K_n + K_r; V, width of a head's value.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from attention_variants.longer_context import magnitude
from engine import optim
from formats import command
from generate import KVCache, StaticKVCache, main
from gpt import GPT, Norm, rope, rotate
from kernels import attention


@dataclass(frozen=True)
class Fields:
    """The fields of the attention, for the Config of a decoder, dense or with experts."""

    kv_rank: int = 512  # R, width of the latent of keys and values
    q_rank: int | None = None  # width of the latent of queries; None: queries are made of x
    d_nope: int = 128  # K_n
    d_rope: int = 64  # K_r
    d_value: int = 128  # V

    def __post_init__(self):
        if self.d_nope % 2 or self.d_rope % 2:
            raise ValueError(f"d_nope {self.d_nope}, d_rope {self.d_rope}: expected even numbers")
        super().__post_init__()
        expected = {"n_kv_heads": (None, self.n_heads), "d_head": (None,), "qk_norm": (False,)}
        expected |= {"window": (None,), "bias": (False,), "qkv_bias": (False,), "positions": ("rope",)}
        for field, values in expected.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"{field} {getattr(self, field)!r}: latent attention has {values[0]!r} there"
                )

    @property
    def K(self) -> int:  # width of a head's queries and keys
        return self.d_nope + self.d_rope

    @property
    def n_attention_params(self) -> int:
        """Return the number of weights in the matrices of a layer's attention."""
        D, H, R = self.d_model, self.n_heads, self.kv_rank
        queries = D * H * self.K if self.q_rank is None else self.q_rank * (D + H * self.K)
        return queries + D * (R + self.d_rope) + R * H * (self.d_nope + self.d_value) + H * self.d_value * D

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights in all matrices that a token is multiplied by, the head included."""
        ordinary = 4 * self.d_model * self.n_heads * self.K  # as super() counts
        return super().n_matmul_params + self.n_layers * (self.n_attention_params - ordinary)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token, as in gpt.py. A visible key costs 2 H (K + V)
        forward, the expanded way."""
        keys_seen = (seq_len + 1) / 2  # mean over the queries
        of_scores = 6 * self.n_heads * (self.K + self.d_value) * keys_seen
        return 6 * self.n_matmul_params + int(self.n_layers * of_scores)


@dataclass(frozen=True)
class Config(Fields, gpt.Config):
    """The fields of gpt.py's Config and those of the latent. `Fields` refuses n_kv_heads, d_head and others
    of ordinary attention."""


SIZES = {
    # gpt.py's tiny with a latent of 32 numbers: its cache is 48 numbers per token and layer, not 128.
    "tiny": Config(4, 4, 128, 352, 4096, 256, kv_rank=32, d_nope=32, d_rope=16, d_value=32),
}


def growth_of_scores(scaling: dict | None) -> float:
    """Return the factor by which YaRN makes DeepSeek's scale of scores larger: the square of `magnitude` with
    the weight mscale_all_dim; 1 without YaRN or without that weight."""
    is_yarn = scaling is not None and scaling.get("rope_type") == "yarn"
    weight = scaling.get("mscale_all_dim") if is_yarn else None
    return magnitude(scaling["factor"], weight) ** 2 if weight else 1.0


def halves(x: Tensor) -> Tensor:
    """Return x (..., K) with its even features before its odd ones. In the checkpoints the two features that
    turn as a pair are neighbours; `gpt.rotate` expects them half a width apart. Scores stay the same, because
    queries and keys are reordered alike."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


class Expansion(nn.Linear):
    """The matrices W_uk and W_uv of all heads. It is a class of its own so that kernels/few_rows.py, which
    copies the weights of nn.Linear into another layout, leaves it alone: `absorbed` reads the weight."""


class LatentAttention(nn.Module):
    """The equations of the header: expanded in training and for prompts, absorbed for the tokens after."""

    def __init__(self, config: Fields, layer: int):
        super().__init__()
        D, H, K, R = config.d_model, config.n_heads, config.K, config.kv_rank
        # The norms of the latents have eps 1e-6 in all DeepSeek models, whatever rms_norm_eps is.
        of_latents = replace(config, norm_eps=1e-6)
        if config.q_rank is None:
            self.q_proj = nn.Linear(D, H * K, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_rank, bias=False)
            self.q_a_layernorm = Norm(config.q_rank, of_latents, "rms")
            self.q_b_proj = nn.Linear(config.q_rank, H * K, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, R + config.d_rope, bias=False)
        self.kv_a_layernorm = Norm(R, of_latents, "rms")
        self.kv_b_proj = Expansion(R, H * (config.d_nope + config.d_value), bias=False)
        self.o_proj = nn.Linear(H * config.d_value, D, bias=False)

        self.layer, self.n_heads, self.rank, self.backend = layer, H, R, config.kernels
        self.widths, self.d_value = [config.d_nope, config.d_rope], config.d_value
        self.scale = K**-0.5 * growth_of_scores(config.rope_scaling)

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). rotation: cos and sin for K_r features."""
        B, T, _ = x.shape
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_n, q_r = q.view(B, T, self.n_heads, -1).split(self.widths, dim=-1)  # (B, T, H, K_n), (B, T, H, K_r)
        c, k_r = self.kv_a_proj_with_mqa(x).split([self.rank, self.widths[1]], dim=-1)
        c, q_r = self.kv_a_layernorm(c), rotate(halves(q_r), *rotation)
        k_r = rotate(halves(k_r)[:, :, None], *rotation)  # (B, T, 1, K_r)

        # In generation, latents of earlier tokens come from the cache, which stores them as keys and values.
        latent = torch.cat((c[:, :, None], k_r), dim=-1)  # (B, T, 1, R + K_r)
        mask, attend = {"causal": True, "cu_seqlens": cu_seqlens}, self.expanded
        if cache is not None:
            attend = self.absorbed if cache.filled else self.expanded
            latent, _, mask = cache.store(self.layer, latent, latent, mask)
        return self.o_proj(attend(q_n, q_r, latent, mask).reshape(B, T, -1))

    def expanded(self, q_n: Tensor, q_r: Tensor, latent: Tensor, mask: dict) -> Tensor:
        """Return the attention (B, T, H, V) of q_n (B, T, H, K_n) and q_r (B, T, H, K_r) to the keys and
        values that the heads make of latent (B, S, 1, R + K_r). mask: as in `kernels.attention`."""
        B, S, H = *latent.shape[:2], self.n_heads
        c, k_r = latent.split([self.rank, self.widths[1]], dim=-1)
        made = self.kv_b_proj(c).view(B, S, H, -1)
        k_n, v = made.split([self.widths[0], self.d_value], dim=-1)
        q, k = torch.cat((q_n, q_r), dim=-1), torch.cat((k_n, k_r.expand(-1, -1, H, -1)), dim=-1)

        # The kernel takes one width for all. Zeros at the end of q and k change no score, and those at the
        # end of v only add zeros to the output, which are cut off.
        width = max(k.shape[-1], self.d_value)
        q, k, v = (F.pad(y, (0, width - y.shape[-1])) for y in (q, k, v))
        return attention(q, k, v, **mask, scale=self.scale, backend=self.backend)[..., : self.d_value]

    def absorbed(self, q_n: Tensor, q_r: Tensor, latent: Tensor, mask: dict) -> Tensor:
        """Return the same as `expanded`, with the latents as keys and values, one of each for all heads."""
        w = self.expansion().view(self.n_heads, -1, self.rank)  # (H, K_n + V, R)
        w_uk, w_uv = w.split([self.widths[0], self.d_value], dim=1)
        q = torch.cat((torch.einsum("bthk,hkr->bthr", q_n, w_uk), q_r), dim=-1)  # (B, T, H, R + K_r)
        # The weighted mean of the latents, without its last K_r numbers, which come from k_r.
        mean = attention(q, latent, latent, **mask, scale=self.scale, backend=self.backend)[..., : self.rank]
        return torch.einsum("bthr,hvr->bthv", mean, w_uv)

    def expansion(self) -> Tensor:
        """Return the matrix (H (K_n + V), R) of kv_b_proj. Where an adapter or a quantised layer has taken
        its place, the columns are what that layer computes from the unit vectors."""
        if type(self.kv_b_proj) is Expansion:
            return self.kv_b_proj.weight
        like = self.kv_a_layernorm.weight
        return self.kv_b_proj(torch.eye(self.rank, dtype=like.dtype, device=like.device)).T


class Block(gpt.Block):
    attention = LatentAttention


def rotation(model: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (B, T, 1, K_r) at positions (B, T), for the features that are rotated."""
    c = model.config
    return rope(positions, c.rope_theta, c.d_rope, c.rope_scaling)


def new_cache(model: nn.Module, lengths: list[int], max_len: int, static: bool = False) -> KVCache:
    """Return an empty cache of latents, for prompts of these lengths, max_len tokens in all; static: for a
    compiled step."""
    c, kind = model.config, StaticKVCache if static else KVCache
    # It is the cache of a decoder with one key head of this width, whose values are its keys.
    width = c.kv_rank + c.d_rope
    shape = gpt.Config(c.n_layers, 1, width, 1, positions="learned")
    cache = kind(shape, lengths, max_len, like=model.model.norm.weight)
    cache.values = cache.keys
    return cache


class LatentGPT(GPT):
    """gpt.py's decoder with latent attention."""

    block = Block
    matrices = (*GPT.matrices, "_with_mqa")
    rotation, new_cache = rotation, new_cache

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "LatentGPT":
        """Load a Hugging Face directory of DeepseekV2ForCausalLM or DeepseekV3ForCausalLM without experts;
        ValueError naming what is missing, damaged, of another shape, or not implemented here."""
        from formats import deepseek

        return deepseek.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as a DeepseekV2ForCausalLM without experts."""
        from formats import deepseek

        deepseek.save(self, directory)


# --- for train.py: the task is gpt.py's

Model = LatentGPT
KIND = "decoder"
TASK = "gpt"
STEPS = 1200
separate_head = gpt.separate_head
show = gpt.show


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of `optim.width_factors` for --mup, in which kv_a_proj_with_mqa is a hidden matrix.
    The factors assume that the ranks grow in proportion to d_model."""
    return optim.width_factors(name.replace("_with_mqa", ""), ratio)


if __name__ == "__main__":
    command.run(lambda: main(LatentGPT, SIZES))  # continue a text, or print the sizes
