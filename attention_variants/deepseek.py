"""DeepSeek-V2 and V3: the latent attention of latent.py in the mixture of experts of moe.py.

    V2    softmax router. In the large model (236B parameters) a token first chooses groups of experts, by the
          best score in each, and then experts of these groups
    V3    sigmoid router with a bias that balances the experts. Groups are chosen by the sum of their two best
          scores

In both, the first layers are dense, and some experts are shared by all tokens. DeepSeek-V2 (2024, section 2),
DeepSeek-V3 (2024, section 2.1).

    python -m attention_variants.deepseek                       the sizes
    python -m attention_variants.deepseek DIR --prompt "def "   continue a text
    python train.py --model deepseek                            train one
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import moe
from attention_variants import latent
from attention_variants.latent import LatentAttention
from formats import command, deepseek
from generate import main
from moe import MoEGPT


@dataclass(frozen=True)
class Config(latent.Fields, moe.Config):
    """The fields of moe.py's Config and those of latent.py's attention."""


def yarn(mscale: float) -> dict:
    """Return the rope_scaling that extends 4,096 tokens to 163,840 by YaRN. mscale: see `latent.yarn`."""
    return dict(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
        mscale=mscale, mscale_all_dim=mscale,
    )  # fmt: skip


V2 = dict(
    vocab_size=102_400, max_seq_len=163_840, tie_embeddings=False, rope_scaling=yarn(0.707), top_k=6,
    n_shared_experts=2, dense_layers=(0,), renormalize=False, aux_loss_coef=0.0, eos_token_id=100_001,
)  # fmt: skip
# sequence_loss_coef is the coefficient of one layer, times the number of layers with experts: the papers add
# up the losses of the layers, and moe.py takes their mean.
SIZES = {
    # The experts of moe.py's tiny, with a first layer that is dense, and the latent of latent.py's tiny.
    "tiny": Config(
        4, 4, 128, 352, 4096, 256, n_experts=15, top_k=3, d_expert=88, n_shared_experts=1, router="sigmoid",
        dense_layers=(0,), routed_scale=3.0, kv_rank=32, d_nope=32, d_rope=16, d_value=32,
    ),
    "deepseek-v2-lite": Config(
        27, 16, 2048, 10944, n_experts=64, d_expert=1408, sequence_loss_coef=26 * 0.001, **V2
    ),
    "deepseek-v2": Config(
        60, 128, 5120, 12288, q_rank=1536, n_experts=160, d_expert=1536, n_groups=8, top_groups=3,
        routed_scale=16.0, sequence_loss_coef=59 * 0.001, **V2,
    ),
    "deepseek-v3": Config(
        61, 128, 7168, 18432, 129_280, 163_840, q_rank=1536, rope_scaling=yarn(1.0), tie_embeddings=False,
        n_experts=256, top_k=8, d_expert=2048, n_shared_experts=1, dense_layers=(0, 1, 2), router="sigmoid",
        n_groups=8, top_groups=4, routed_scale=2.5, aux_loss_coef=0.0, sequence_loss_coef=58 * 0.0001,
        bias_update_rate=0.001, eos_token_id=1,
    ),
}  # fmt: skip


class Block(moe.Block):
    attention = LatentAttention


class DeepSeek(MoEGPT):
    """moe.py's decoder with latent attention."""

    block = Block
    matrices = (*MoEGPT.matrices, "_with_mqa")
    rotation, new_cache = latent.rotation, latent.new_cache

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "DeepSeek":
        """Load a Hugging Face directory of DeepseekV2ForCausalLM or DeepseekV3ForCausalLM; ValueError naming
        what is missing, damaged, of another shape, or not implemented here."""
        model = deepseek.load(cls, Config, directory, kernels)
        for layer in model.sparse_layers:
            if model.config.router == "sigmoid":  # checkpoints do not have the counts of tokens per expert
                layer.gate.load = torch.zeros_like(layer.gate.e_score_correction_bias)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, with a sigmoid router as DeepSeek-V3, else as V2. Raises
        ValueError for a Config that neither describes."""
        deepseek.save(self, directory)


# --- for train.py: the task is gpt.py's, the rest moe.py's

Model = DeepSeek
KIND = "decoder"
TASK = "gpt"
STEPS = 1100
separate_head = moe.separate_head
show = moe.show
after_step = moe.after_step
references = moe.references
recomputation = moe.recomputation
n_active_params = moe.n_active_params
mlp_bytes = moe.mlp_bytes
width_factors = latent.width_factors


if __name__ == "__main__":
    command.run(lambda: main(DeepSeek, SIZES))  # continue a text, or print the sizes
