"""The prior of DALL-E 2: from the embedding of a text to the embedding of an image that the text describes.

    p(image | text) = p(image | z) p(z | text)             z: CLIP's embedding of the image
    z_t = sqrt(a_t) z + sqrt(1 - a_t) eps                  noise on it, as on pixels (vision/noise.py)
    loss = mean of (z - f(text states, text embedding, t, z_t))^2           f predicts z itself

Hierarchical text-conditional image generation with CLIP latents (Ramesh et al. 2022, arXiv 2204.06125,
section 2.2). The image whose embedding is nearest to that of a caption is mostly the right one, but all
embeddings of images lie in another region than those of texts. So a decoder (vision/unclip.py), which has
learned to make images of image embeddings, should not be given a text's embedding. The prior draws an image
embedding for the text.
f is a causal Transformer over a row of tokens: a state for each token of the text, the text's embedding, the
time, the noisy embedding, and a learned query, whose output is the prediction.

An embedding of length 1 and width E has entries of about 1 / sqrt(E), which noise of variance 1 would drown.
So z is the embedding minus `clip_mean`, divided by `clip_std`, the mean and the standard deviation of each
entry over the training set; and a text's embedding is multiplied by sqrt(E). A tenth of the training texts is
replaced by the empty text, so that f also predicts without a text, as guidance needs.

Parameters have the names of diffusers' PriorTransformer. The task that trains the prior, and the drawing of
embeddings, are in vision/image_embeddings.py.

    python -m vision.prior                                     print the sizes
    python train.py --model prior                              embeddings of letters from their names

Shapes: B pairs, E width of embeddings, T states of a text, S = T + 4 tokens, D model width, L layers.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import command
from formats import prior as formats_prior
from formats.config_values import check_values
from vision.dit import Attention, feed_forward
from vision.patches import take
from vision.unet import TimeMLP, time_embedding

TASK, KIND = "image_embeddings", "prior of image embeddings"


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_head: int  # width of a head
    d_embed: int = 768  # E, also the width of a text's states
    max_seq_len: int = 77  # T
    drop: float = 0.1  # share of training texts that are replaced by the empty text
    warp: float = 0.5  # of the training images, see data/augment.py
    clip: str = ""  # directory of the CLIP
    # Mean and standard deviation of the training images' embeddings: `fit` sets them, the weights hold them.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("drop", "warp")

    def __post_init__(self):
        check_values(self)
        if self.drop >= 1:
            raise ValueError(f"drop {self.drop}: expected less than 1")

    @property
    def d_model(self) -> int:
        """Return D."""
        return self.n_heads * self.d_head

    @property
    def vocab_size(self) -> int:
        """Return a number that no vocabulary exceeds: the tokens are those of CLIP, which checks them."""
        return 1 << 31


SIZES = {
    "tiny": Config(3, 4, 24, 96),
    "unclip": Config(20, 32, 64),  # section 2.2: 1 billion parameters; as in diffusers
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for texts of seq_len tokens and the embeddings of the CLIP of a data set, an
    `image_embeddings.PairDataset`."""
    found = {name: getattr(dataset, name) for name in ("clip", "mean", "std")}
    return replace(config, d_embed=len(dataset.mean), max_seq_len=seq_len, **found)


class Block(nn.Module):
    """One layer: causal attention and an MLP, each after a LayerNorm and added to its input."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm1, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn1, self.ff = Attention(config, causal=True), feed_forward(D)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, S, D) for x (B, S, D)."""
        x = x + self.attn1(self.norm1(x))
        up, _, down = self.ff.net
        return x + down(F.gelu(up.proj(self.norm3(x))))


class Prior(nn.Module):
    """From a noisy image embedding, its time and a text to the image embedding without noise."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D, E = config, config.d_model, config.d_embed
        self.time_embedding = TimeMLP(D, D)
        self.proj_in, self.embedding_proj, self.encoder_hidden_states_proj = (
            nn.Linear(E, D) for _ in range(3)
        )
        self.positional_embedding = nn.Parameter(torch.empty(1, config.max_seq_len + 4, D))
        self.prd_embedding = nn.Parameter(torch.empty(1, 1, D))  # the query
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_out, self.proj_to_clip_embeddings = nn.LayerNorm(D), nn.Linear(D, E)
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(getattr(config, name) or (default,)).expand(E)
            self.register_buffer(f"clip_{name}", values.clone()[None])
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the parameters. Matrices keep the variance of their input, and those whose output is added to
        x are divided by sqrt(2 L), since there are 2 L of them. Positions and the query are N(0, 0.02^2). The
        last layer is 0, so a new prior predicts z = 0, the mean embedding.

        Raises ValueError for a parameter without a rule.
        """
        residual = math.sqrt(2 * self.config.n_layers)
        for name, p in self.named_parameters():
            if name.endswith("bias") or name.startswith("proj_to_clip_embeddings"):
                p.zero_()
            elif name.endswith("embedding"):
                p.normal_(std=0.02)
            elif "norm" in name:
                p.fill_(1.0)
            elif name.endswith("weight") and p.ndim == 2:
                is_residual = name.endswith(("to_out.0.weight", "net.2.weight"))
                p.normal_(std=1 / math.sqrt(p.shape[1]) / (residual if is_residual else 1))
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to Prior.initialize")

    def forward(self, z: Tensor, t: Tensor, text: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        """Return the predicted z (B, E) for noisy z (B, E) at times t (B,).

        text: embeddings of the texts, times sqrt(E), (B, E). states: of their tokens (B, T, E); the first
        `lengths` (B,) are of the text, the others padding. Raises ValueError for another T than the config's.
        """
        T, D = self.config.max_seq_len, self.config.d_model
        if states.shape[1] != T:
            raise ValueError(f"{states.shape[1]} states of a text: expected {T}, as in training")
        sines = time_embedding(t, D, cos_first=True, freq_shift=0).to(z.dtype)
        four = (self.embedding_proj(text), self.time_embedding(sines), self.proj_in(z))
        four = torch.stack((*four, self.prd_embedding[0].expand(len(z), D)), dim=1)  # (B, 4, D)
        x = torch.cat((self.encoder_hidden_states_proj(states), four), dim=1) + self.positional_embedding

        # Move the padding behind the query, where causal attention does not reach it: of the S tokens first
        # come the first `lengths`, then the last four, then the padding.
        places, lengths = torch.arange(T + 4, device=z.device), lengths[:, None]
        after = torch.where(places < lengths + 4, places - lengths + T, places - 4)
        x = take(x, torch.where(places < lengths, places, after))
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_to_clip_embeddings(self.norm_out(take(x, lengths + 3)[:, 0]))

    def whitened(self, embeddings: Tensor) -> Tensor:
        """Return z (B, E), image embeddings (B, E) that are shifted and scaled to mean 0 and variance 1."""
        return (embeddings - self.clip_mean) / self.clip_std

    def unwhitened(self, z: Tensor) -> Tensor:
        """Return the image embeddings (B, E) for z (B, E), as diffusers' post_process_latents does."""
        return z * self.clip_std + self.clip_mean

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one pair. seq_len is not used."""
        return 6 * n_macs(self.config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "Prior":
        """Return the prior in a directory with diffusers' PriorTransformer, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return formats_prior.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the prior as diffusers' PriorTransformer into a directory."""
        formats_prior.save(self, directory)


Model = Prior


def n_macs(config: Config) -> int:
    """Return the multiplications of one forward pass: L (12 S D^2 + 2 S^2 D) + (T + 3) E D + 2 D^2."""
    S, D, E = config.max_seq_len + 4, config.d_model, config.d_embed
    return config.n_layers * (12 * S * D * D + 2 * S * S * D) + (S - 1) * E * D + 2 * D * D


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the sizes of the prior.")
    parser.parse_args(argv)
    print(f"{'size':8} {'parameters':>13} {'width':>6} {'tokens':>6}  FLOPs")
    for name, config in SIZES.items():
        with torch.device("meta"):
            n = sum(p.numel() for p in Prior(config).parameters())
        print(f"{name:8} {n:13,} {config.d_model:6} {config.max_seq_len + 4:6}  {2 * n_macs(config):.2e}")


if __name__ == "__main__":
    command.run(main)
