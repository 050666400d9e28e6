"""Talking heads: two small matrices let the heads of attention mix, before and after the softmax.

    scores_h   = sum_g  P_l[h, g]  q_g . k_g / sqrt(K)      a head's scores mix those of all heads
    weights_h  = sum_g  P_w[h, g]  softmax(scores_g)        and so do its weights; softmax over keys
    out_h      = sum_j  weights_h[j] v_h[j]                 j: the keys

In ordinary attention each head computes its output without the others (Shazeer et al. 2020). P_l mixes
the logits, P_w the weights; both are H x H, and each layer has its own. They begin as the identity, with
which this is ordinary attention. The mask is applied after P_l: entries of P_l that are 0 or negative would
turn -inf into NaN or +inf.

A mixture needs the scores of all heads at once, so no fused kernel computes it: memory grows as H T^2.

    python -m attention_variants.talking_heads                       the sizes
    python -m attention_variants.talking_heads DIR --prompt "def "   continue a text
    python train.py --model talking_heads                            train one

Shapes as in gpt.py: B batch, T queries, S keys, D model width, H heads, G key/value heads, K head width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gpt
from engine import optim
from formats import command, native
from generate import KVCache, main
from gpt import GPT
from kernels.attention import visible


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config."""

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token: those of gpt.py, and those of the two mixtures.
        For each visible key the mixtures cost 4 H^2 forward, while q . k and the sum of values cost 4 H K."""
        ordinary = super().flops_per_token(seq_len)
        of_keys = ordinary - 6 * self.n_matmul_params
        return ordinary + of_keys * self.n_heads // self.K


SIZES = {"tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True)}  # gpt.py's tiny


class Attention(gpt.Attention):
    """gpt.py's attention, with the matrices P_l and P_w between the heads."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        H = config.n_heads
        self.scores_mix_proj = nn.Linear(H, H, bias=False)  # P_l
        self.weights_mix_proj = nn.Linear(H, H, bias=False)  # P_w

    def forward(self, x: Tensor, rotation, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). As in gpt.py, but `talk` takes the place of `attention`."""
        B, T, _ = x.shape
        q, k, v = self.heads(x, rotation)

        mask = {"causal": True, "window": self.window, "cu_seqlens": cu_seqlens}
        if cache is not None:
            k, v, mask = cache.store(self.layer, k, v, mask)
        y = self.talk(q, k, v, **mask)  # (B, T, H, K)
        return self.o_proj(y.reshape(B, T, -1))

    def talk(self, q: Tensor, k: Tensor, v: Tensor, causal=False, window=None, **lengths) -> Tensor:
        """Return the output (B, T, H, K) of the three equations above for q (B, T, H, K) and k, v
        (B, S, G, K). causal, window and lengths are the mask, as in `kernels.attention`."""
        T, H, S, G = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        k, v = (y.repeat_interleave(H // G, dim=2) for y in (k, v))  # (B, S, H, K)
        scores = torch.einsum("bthk,bshk->btsh", q, k) / math.sqrt(self.d_head)
        scores = self.scores_mix_proj(scores)

        # The mask is (T, S), or (B, 1, T, S) where rows differ in length. The softmax is in float32 at least.
        seen = visible(T, S, q.device, causal=causal, window=window, **lengths)
        seen = (seen if seen.ndim == 2 else seen[:, 0])[..., None]
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=2, dtype=wide).to(q.dtype)
        return torch.einsum("btsh,bshk->bthk", self.weights_mix_proj(weights), v)


class Block(gpt.Block):
    attention = Attention


class TalkingHeads(GPT):
    """gpt.py's decoder with talking heads, saved natively: Hugging Face has no such architecture."""

    block = Block
    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the matrices as gpt.py does, and make P_l and P_w the identity: no head mixes with another."""
        super().initialize()
        for block in self.model.layers:
            nn.init.eye_(block.self_attn.scores_mix_proj.weight)
            nn.init.eye_(block.self_attn.weights_mix_proj.weight)


# --- for train.py: the task is gpt.py's

Model = TalkingHeads
KIND = "decoder"
TASK = "gpt"
STEPS = 800
separate_head = gpt.separate_head
show = gpt.show


def width_factors(name: str, ratio: float) -> tuple[float, float]:
    """Return the factors of `optim.width_factors`, but keep the identity at the start."""
    return (1.0, ratio) if "_mix_proj" in name else optim.width_factors(name, ratio)


if __name__ == "__main__":
    command.run(lambda: main(TalkingHeads, SIZES))  # continue a text, or print the sizes
