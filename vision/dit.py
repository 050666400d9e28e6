"""DiT: a Transformer as the denoiser of diffusion. Time and class steer every layer by its norms.

    c = MLP(sines and cosines of t) + the row of the class
    shift, scale, gate (attention), shift, scale, gate (MLP) = W silu(c) + b          in each block
    x = x + gate attention(norm(x) (1 + scale) + shift),    x = x + gate MLP(norm(x) (1 + scale) + shift)

Scalable diffusion models with Transformers (Peebles and Xie 2022, arXiv 2212.09748). A noisy image, or its
latents, is cut into patches as in vision/vit.py, and each token becomes a patch of the prediction. "adaLN-
zero": W and b start at zero, and so does the last layer. So each block of a new model is the identity, and
its output is exactly zero. Norms have no gains of their own.

The patches that are read are in order of channel, row and column, those that are written in order of row,
column and channel: two orders in one model, as published. Published models predict the noise and a variance,
so they have two output channels for each channel. The last class stands for none, which guidance needs.

Parameters have the names of diffusers' DiTTransformer2DModel, but for the embedder of times and classes: one
for all blocks. Sines and cosines are diffusers', whose lowest frequency is 1 / 10,000; that of the authors'
code is a little higher.

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
    n_classes: int = 1001  # rows of the classes' matrix, the last one for none; 0: no classes
    norm_eps: float = 1e-6  # of the norm before the MLP; the others have 1e-6 as published
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
        """Return how many patches are above each other, and side by side."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def n_patches(self) -> int:
        """Return N."""
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2

    @property
    def d_text(self) -> int:
        """Return 0: states of a text are not read."""
        return 0

    @property
    def vocab_size(self) -> int:
        """Return the number of rows that conditions have."""
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
    """Return the config for images of these channels, and conditions of these words, if there are any."""
    C = dataset.train[0]["image"].shape[0]
    n_classes = dataset.tokenizer.n_vocab if dataset.tokenizer is not None else 0
    return replace(config, n_channels=C, n_out=C, n_classes=n_classes)


class Attention(nn.Module):
    """Attention of every token to all of them, or to those before it."""

    def __init__(self, config: Any, causal: bool = False):
        super().__init__()
        D, self.causal = config.d_model, causal
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.n_heads, self.backend = config.n_heads, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed values (B, N, D) of x (B, N, D)."""
        q, k, v = (f(x).unflatten(2, (self.n_heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attention(q, k, v, causal=self.causal, backend=self.backend).flatten(2))


def feed_forward(D: int) -> nn.ModuleDict:
    """Return the two matrices of an MLP of width D, 4 D inside, by their names in the files."""
    layers = [nn.ModuleDict({"proj": nn.Linear(D, 4 * D)}), nn.Identity(), nn.Linear(4 * D, D)]
    return nn.ModuleDict({"net": nn.ModuleList(layers)})


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return norm(x) (1 + scale) + shift of x (B, N, D), for shift and scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One layer: attention and an MLP, each normalised and gated by the condition."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(D, 6 * D)})
        self.attn1 = Attention(config)
        self.ff = feed_forward(D)
        self.norm_eps = config.norm_eps

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the layer's output (B, N, D) for x (B, N, D) and silu of the condition (B, D)."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.norm1.linear(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn1(modulated(x, shift, scale))
        up, _, down = self.ff.net
        inner = gelu(up.proj(modulated(x, shift_2, scale_2, self.norm_eps)))  # its approximation by tanh
        return x + gate_2[:, None] * down(inner)


class DiT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, D, P = config, config.d_model, config.patch_size
        # A convolution by name and shape only, as in vision/vit.py.
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(config.n_channels, D, P, P)})
        self.emb = nn.ModuleDict({"timestep_embedder": TimeMLP(FREQUENCIES, D)})
        if config.n_classes:
            table = nn.Embedding(config.n_classes, D)
            self.emb["class_embedder"] = nn.ModuleDict({"embedding_table": table})
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.proj_out_1, self.proj_out_2 = nn.Linear(D, 2 * D), nn.Linear(D, P * P * config.n_out)
        # They are computed, not read: so also where a model to be read is built without numbers.
        with torch.device("cpu"):
            self.register_buffer("positions", sin_cos(config.grid, D)[:, 1:], persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the parameters as the published code does: matrices by Glorot's rule, the embedder N(0,
        0.02^2), biases 0; modulations and the last layer 0. Raises ValueError for one without a rule."""
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
        """Return c (B, D) of times t (B,) and classes (B,), or several to be summed (B, W), where -1 stands
        for none and is left out. Raises ValueError for classes that are missing."""
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

        t: times (B,). classes: see `condition`. text: None, see d_text. Raises ValueError for another size
        than the config's.
        """
        if x.shape[2:] != self.config.size or text is not None:
            raise ValueError(f"images of {tuple(x.shape[2:])}: expected {self.config.size}, without texts")
        P, proj = self.config.patch_size, self.pos_embed.proj
        c = F.silu(self.condition(t, classes))
        x = F.linear(patches_of(x, P), proj.weight.flatten(1), proj.bias) + self.positions  # (B, N, D)
        for block in self.transformer_blocks:
            x = block(x, c)
        shift, scale = self.proj_out_1(c).chunk(2, dim=1)
        x = self.proj_out_2(modulated(x, shift, scale))  # (B, N, P P n_out)

        # From rows of patches, in order of row, column and channel, to the image.
        B, rows, columns = len(x), *self.config.grid
        x = x.view(B, rows, columns, P, P, self.config.n_out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, self.config.n_out, rows * P, columns * P)

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, of one image: three times forward's."""
        return 6 * n_macs(self.config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "DiT":
        """Return the DiTTransformer2DModel in a directory, or one without classes in our native layout.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return formats_dit.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a DiTTransformer2DModel, or without classes our native layout."""
        formats_dit.save(self, directory)


Model = DiT


def n_macs(config: Config) -> int:
    """Return the multiplications of a forward pass over one image; the paper calls these Gflops.

    They are L (12 N D^2 + 2 N^2 D + 6 D^2) + N D P^2 (C + n_out) + 3 D^2 + 256 D: blocks with their
    modulation, patches in and out, the last modulation, and the embedder of times.
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
