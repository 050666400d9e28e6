"""MiniMax-01: the hybrid of linear.py in the mixture of experts of moe.py, with another residual stream.

    x = norm(x),  x = alpha x + beta attention(x)
    x = norm(x),  x = alpha x + beta experts(x)

The residual stream is normalised itself, as in DeepNorm (Wang et al. 2022): a post-norm, written here as the
norm of the next sublayer. Each norm would shrink what earlier layers wrote; alpha = (2 L)^(1/4), with L
layers, makes them weigh more, and is DeepNorm's value for a decoder.

After seven linear layers comes one with softmax and rotary positions. A token uses 2 of 32 experts (MiniMax
2025, sections 2.1 and 2.2). The published weights belong to a model that rotates half of the features of each
head (rotary_dim 64 of 128 in its config.json). transformers' MiniMaxForCausalLM rotates all of them, whatever
that key is, and so does this file; formats/minimax.py refuses a config.json that has the key.

    python -m attention_variants.minimax                       the sizes
    python -m attention_variants.minimax DIR --prompt "def "   continue a text
    python train.py --model minimax                            train one
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import moe
from attention_variants import linear
from attention_variants.linear import LinearAttention
from formats import command, minimax
from generate import main
from moe import MoEGPT


@dataclass(frozen=True)
class Config(linear.Fields, moe.Config):
    """The fields of moe.py's Config and of linear.py's, and the factors alpha and beta of each kind of
    sublayer: attention with softmax, linear attention, experts."""

    softmax_alpha: float = 1.0
    softmax_beta: float = 1.0
    linear_alpha: float = 1.0
    linear_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0


ALPHA = 3.5565588200778455  # (2 * 80) ** 0.25
SIZES = {
    # Mixtral's router, three linear layers and one with softmax; alpha is about (2 * 4) ** 0.25.
    "tiny": Config(
        4, 4, 128, 176, 4096, 256, n_kv_heads=2, n_experts=8, softmax_layers=(3,), softmax_alpha=1.7,
        linear_alpha=1.7, mlp_alpha=1.7,
    ),
    "minimax-text-01": Config(
        80, 64, 6144, 9216, 200_064, 10_240_000, 8, 128, norm_eps=1e-5, rope_theta=1e7, tie_embeddings=False,
        n_experts=32, top_k=2, softmax_layers=tuple(range(7, 80, 8)), chunk=256, aux_loss_coef=0.001,
        softmax_alpha=ALPHA, linear_alpha=ALPHA, mlp_alpha=ALPHA,
    ),
}  # fmt: skip


class Block(moe.Block):
    """Attention and experts, on a residual stream that is normalised before each of them."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.of_attention = config.softmax_alpha, config.softmax_beta
        self.of_mlp = config.mlp_alpha, config.mlp_beta
        if layer not in config.softmax_layers:
            self.self_attn = LinearAttention(config, layer)
            self.of_attention = config.linear_alpha, config.linear_beta

    def forward(self, x: Tensor, rotation, cache, cu_seqlens: Tensor | None) -> Tensor:
        x, (alpha, beta) = self.input_layernorm(x), self.of_attention
        x = alpha * x + beta * self.self_attn(x, rotation, cache, cu_seqlens)
        x, (alpha, beta) = self.post_attention_layernorm(x), self.of_mlp
        return alpha * x + beta * self.mlp(x)


class MiniMax(MoEGPT):
    """moe.py's decoder with the blocks above."""

    block, new_cache = Block, linear.new_cache
    matrices = (*MoEGPT.matrices, "output_gate")

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "MiniMax":
        """Load a Hugging Face directory of MiniMaxForCausalLM; ValueError naming what is missing, damaged, of
        another shape, or not implemented here."""
        return minimax.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors. Raises ValueError for a Config that is no MiniMax."""
        minimax.save(self, directory)


# --- for train.py: the task is gpt.py's, the rest moe.py's

Model = MiniMax
KIND = "decoder"
TASK = "gpt"
STEPS = 900
separate_head = moe.separate_head
show = moe.show
after_step = moe.after_step
references = moe.references
recomputation = moe.recomputation
n_active_params = moe.n_active_params
mlp_bytes = moe.mlp_bytes
width_factors = linear.width_factors


if __name__ == "__main__":
    command.run(lambda: main(MiniMax, SIZES))  # continue a text, or print the sizes
