"""DiT: a Transformer as the denoiser of diffusion, whose time and class act on the norms of every layer.

    c = MLP(sines and cosines of t) + the embedding of the class
    shift, scale, gate (attention), shift, scale, gate (MLP) = W silu(c) + b          in each block
    x = x + gate attention(norm(x) (1 + scale) + shift),    x = x + gate MLP(norm(x) (1 + scale) + shift)

Scalable diffusion models with Transformers (Peebles and Xie 2022, arXiv 2212.09748). A noisy image, or its
latents, is cut into patches as in vision/vit.py, and each token becomes a patch of the prediction. The paper
calls this "adaLN-Zero": W and b start at zero, and so does the last layer. So each block of a new model is
the identity, and the output of the model is exactly zero. The norms have no learned gain or bias of their
own.

The numbers of an input patch are ordered by channel, row and column, those of an output patch by row, column
and channel, as in the published models. These predict the noise and a variance, so they have two output
channels for each input channel. The last class stands for no class: guidance needs predictions without one.

Parameters have the names of diffusers' DiTTransformer2DModel, except that the embedding of times and classes
is one for all blocks. Sines and cosines are those of diffusers, whose lowest frequency is 1 / 10,000; in the
authors' code it is a little higher.

    python -m vision.dit                                       print the sizes
    python train.py --model dit                                letters from noise, as --model ddpm does

Shapes: B images, C channels, P patch size, N patches, D width, L layers, W classes of an image.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import command
from formats import dit as formats_dit
from formats.config_values import check_values
from kernels import attention, gelu
from vision.patches import patches_of, sin_cos
from vision.unet import TimeMLP, time_embedding

KIND, TASK = "denoiser", "ddpm"
FREQUENCIES = 256  # sines and cosines of a time


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    patch_size: int = 2  # pixels or latents, both ways
    n_channels: int = 4  # C
    n_out: int = 8  # channels of the prediction: C, or 2 C with a variance
    image_size: int = 32  # pixels or latents, both ways
    n_classes: int = 1001  # rows of the class embedding, the last for no class; 0: no classes
    norm_eps: float = 1e-6  # of the norm before the MLP; the other norms always have 1e-6
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("n_classes",)

    def __post_init__(self):
        check_values(self)
        if self.d_model % self.n_heads or self.d_model % 4:
            raise ValueError(f"d_model {self.d_model}: expected a multiple of 4 and of {self.n_heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size}: expected a multiple of {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of patches in a column and in a row of the image."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def n_patches(self) -> int:
        """Return N, the number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2

    @property
    def d_text(self) -> int:
        """Return 0: the model reads no states of a text."""
        return 0

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the class embedding: what a vocabulary is for a text model."""
        return self.n_classes

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one image."""
        return 1


WIDTHS = {"s": (12, 6, 384), "b": (12, 12, 768), "l": (24, 16, 1024), "xl": (28, 16, 1152)}
SIZES = {
    "tiny": Config(4, 4, 128, 4, 1, 1, 16, 2),
    **{f"{name}-{P}": Config(*sizes, P) for name, sizes in WIDTHS.items() for P in (2, 4, 8)},  # table 1
    "xl-2-512": Config(*WIDTHS["xl"], 2, image_size=64),  # section 5.1
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for the channels of a data set's images, and for its words or classes if it has any.
    seq_len is not used."""
    C = dataset.train[0]["image"].shape[0]
    n_classes = dataset.tokenizer.n_vocab if dataset.tokenizer is not None else 0
    return replace(config, n_channels=C, n_out=C, n_classes=n_classes)


class Attention(nn.Module):
    """Multi-head self-attention, over all tokens or, if causal, over a token and those before it."""

    def __init__(self, config: Any, causal: bool = False):
        super().__init__()
        D, self.causal = config.d_model, causal
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.n_heads, self.backend = config.n_heads, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output (B, N, D) for x (B, N, D)."""
        q, k, v = (f(x).unflatten(2, (self.n_heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attention(q, k, v, causal=self.causal, backend=self.backend).flatten(2))


def feed_forward(D: int) -> nn.ModuleDict:
    """Return the two linear layers of an MLP of width D, with 4 D hidden units, under diffusers' names. The
    identity stands where diffusers has a dropout."""
    layers = [nn.ModuleDict({"proj": nn.Linear(D, 4 * D)}), nn.Identity(), nn.Linear(4 * D, D)]
    return nn.ModuleDict({"net": nn.ModuleList(layers)})


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return norm(x) (1 + scale) + shift, (B, N, D), for x (B, N, D) and shift and scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One layer: attention and an MLP, whose shift, scale and gate are linear maps of the condition."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(D, 6 * D)})
        self.attn1 = Attention(config)
        self.ff = feed_forward(D)
        self.norm_eps = config.norm_eps

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """Return the layer's output (B, N, D) for x (B, N, D) and active = silu(c) (B, D)."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.norm1.linear(active).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn1(modulated(x, shift, scale))
        up, _, down = self.ff.net
        inner = gelu(up.proj(modulated(x, shift_2, scale_2, self.norm_eps)))  # the tanh form
        return x + gate_2[:, None] * down(inner)


class DiT(nn.Module):
    """From a noisy image, its time and its class to a prediction of the image's size."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D, P = config, config.d_model, config.patch_size
        # A convolution only for its parameters' names and shapes: `forward` multiplies patches by its weight.
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(config.n_channels, D, P, P)})
        self.emb = nn.ModuleDict({"timestep_embedder": TimeMLP(FREQUENCIES, D)})
        if config.n_classes:
            table = nn.Embedding(config.n_classes, D)
            self.emb["class_embedder"] = nn.ModuleDict({"embedding_table": table})
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.proj_out_1, self.proj_out_2 = nn.Linear(D, 2 * D), nn.Linear(D, P * P * config.n_out)
        # No file holds the positions. They are computed even if the model is built on the meta device.
        with torch.device("cpu"):
            self.register_buffer("positions", sin_cos(config.grid, D)[:, 1:], persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the parameters as the published code does. Raises ValueError for a parameter without a rule.

        Matrices follow Glorot's rule, the embeddings of times and classes N(0, 0.02^2). Biases, modulations
        and the last layer are 0.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias") or name.startswith("proj_out") or ".norm1.linear." in name:
                p.zero_()
            elif name.startswith("emb."):
                p.normal_(std=0.02)
            elif name.endswith("weight") and p.ndim in (2, 4):
                nn.init.xavier_uniform_(p.view(len(p), -1))
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to DiT.initialize")

    def condition(self, t: Tensor, classes: Tensor | None) -> Tensor:
        """Return c (B, D) of the header for times t (B,) and classes.

        classes: one for each image (B,), or several (B, W), whose embeddings are summed; -1 is padding. A
        model without classes ignores them. Raises ValueError if classes are missing.
        """
        sines = time_embedding(t, FREQUENCIES, cos_first=True, freq_shift=1)
        c = self.emb.timestep_embedder(sines.to(self.proj_out_1.weight.dtype))
        if not self.config.n_classes:
            return c
        if classes is None:
            raise ValueError(f"this model has {self.config.n_classes} classes: expected those of each image")
        classes = classes.view(len(classes), -1)  # (B, W)
        rows = self.emb.class_embedder.embedding_table(classes.clamp(min=0))  # (B, W, D)
        return c + (rows * (classes >= 0)[:, :, None]).sum(dim=1)

    def forward(
        self, x: Tensor, t: Tensor, classes: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Return the prediction (B, n_out, height, width) for noisy images x (B, C, height, width).

        t: times (B,). classes: see `condition`. text: always None, since a DiT reads no texts. Raises
        ValueError for a text, and for another size than the config's.
        """
        if x.shape[2:] != self.config.size:
            raise ValueError(f"images of {tuple(x.shape[2:])}: expected {self.config.size}")
        if text is not None:
            raise ValueError(f"states of a text: {tuple(text.shape)}; expected none, a DiT reads no texts")
        P, proj = self.config.patch_size, self.pos_embed.proj
        active = F.silu(self.condition(t, classes))
        x = F.linear(patches_of(x, P), proj.weight.flatten(1), proj.bias) + self.positions  # (B, N, D)
        for block in self.transformer_blocks:
            x = block(x, active)
        shift, scale = self.proj_out_1(active).chunk(2, dim=1)
        x = self.proj_out_2(modulated(x, shift, scale))  # (B, N, P P n_out)

        # Put the patches, each ordered by row, column and channel, together as the image.
        B, rows, columns = len(x), *self.config.grid
        x = x.view(B, rows, columns, P, P, self.config.n_out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, self.config.n_out, rows * P, columns * P)

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one image. seq_len is not used."""
        return 6 * n_macs(self.config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "DiT":
        """Return the DiT in a directory with diffusers' DiTTransformer2DModel, or, if it has no classes, in
        our native layout.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return formats_dit.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write diffusers' DiTTransformer2DModel, or, if the model has no classes, our native layout."""
        formats_dit.save(self, directory)


Model = DiT


def n_macs(config: Config) -> int:
    """Return the multiplications of a forward pass over one image; the paper calls these Gflops.

    They are L (12 N D^2 + 2 N^2 D + 6 D^2) for the blocks with their modulation, N D P^2 (C + n_out) for the
    patches in and out, and 3 D^2 + 256 D for the last modulation and the embedding of the time.
    """
    N, D, P = config.n_patches, config.d_model, config.patch_size
    layer = 12 * N * D * D + 2 * N * N * D + 6 * D * D
    patches = N * D * P * P * (config.n_channels + config.n_out)
    return config.n_layers * layer + patches + 3 * D * D + FREQUENCIES * D


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the sizes of DiT.")
    parser.parse_args(argv)
    print(f"{'size':9} {'parameters':>12} {'image':>6} {'patches':>8}  multiplications of a forward pass")
    for name, config in SIZES.items():
        with torch.device("meta"):
            n = sum(p.numel() for p in DiT(config).parameters())
        print(f"{name:9} {n:12,} {config.image_size:6} {config.n_patches:8}  {n_macs(config) / 1e9:.3f}e9")


if __name__ == "__main__":
    command.run(main)
