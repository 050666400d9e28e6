"""The two towers of CLIP and SigLIP: a Transformer for images, and one for their captions.

    image    z = [class; W x_1; ...; W x_N] + positions    x_i: the numbers of a patch; W (D, C P P)
    text     z = embeddings of the tokens t_1 ... t_T + positions
    both     z = z + attention(norm(z)),  z = z + mlp(norm(z))      L times

From z each tower makes one vector for the image or the text. CLIP's and SigLIP's towers have the same blocks,
and differ in all else. This is the `layout`:

    clip     Radford et al. 2021 (arXiv 2103.00020, section 2.4). Image: the patches have no bias, there is a
             norm before the blocks, and the class token is read. Text: a token attends to itself and those
             before it, and the token that ends the text is read.
    siglip   Zhai et al. 2023 (arXiv 2303.15343). Image: there is no class token; a learned query, the probe,
             attends to all patches. Text: tokens attend to all, also to padding, and the last one is read.

vision/clip.py trains both towers together. LLaVA reads the hidden states of the image tower before its last
block, see `VisionTower.features`. Parameters have the names of Hugging Face's files.

Shapes: B batch, C channels, P patch size, N patches, T tokens, D model width, F inner width of the MLP,
H heads, K head width, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import clip
from formats.config_values import check_values
from kernels import attention, gelu, quick_gelu
from vision.patches import patches_of, resample

LAYOUTS = ("clip", "siglip")
MLPS = ("quick_gelu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class TowerConfig:
    """The fields that both towers have."""

    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # F
    layout: str = "clip"  # or "siglip"
    mlp: str = "quick_gelu"  # x sigmoid(1.702 x); or "gelu", or "gelu_tanh", its approximation
    norm_eps: float = 1e-5
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py

    def __post_init__(self):
        check_values(self, layout=LAYOUTS, mlp=MLPS)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower."""

    image_size: int = 224  # pixels, both ways
    patch_size: int = 32  # pixels, both ways
    n_channels: int = 3
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # subtracted from pixels in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)  # by which the difference is divided

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size}: expected at least patch_size {self.patch_size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.n_channels):
                given = getattr(self, name)
                raise ValueError(f"{name} {given}: expected one number, or one for each channel")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches. Pixels beyond whole patches are not read."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def n_patches(self) -> int:
        """Return N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens that the blocks read: N, and with CLIP's layout the class token."""
        return self.n_patches + (self.layout == "clip")


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower."""

    vocab_size: int = 49408
    max_seq_len: int = 77  # tokens
    eos_token_id: int = 49407  # the token that ends a text; with layout clip its first place is read
    # Instead read the place of the largest id, as OpenAI's code does: in its vocabulary the end of a text has
    # the largest id. Files from before 2023 mean this by an eos_token_id of 2, which is otherwise not used.
    read_largest: bool = False
    d_out: int = 512  # width of what SigLIP's text tower returns
    MAY_BE_ZERO = ("eos_token_id",)


def joined(linears: Sequence[nn.Linear], x: Tensor, n_heads: int) -> Sequence[Tensor]:
    """Return the output (B, T, H, K) of each of several linear layers from D to D for x (B, T, D), by one
    product with their concatenated matrices; by one product each if an adapter has replaced a layer."""
    B, T, D = x.shape
    if any(type(linear) is not nn.Linear for linear in linears):
        return [linear(x).view(B, T, n_heads, -1) for linear in linears]
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).view(B, T, len(linears), n_heads, -1).unbind(2)


class Attention(nn.Module):
    """Attention of tokens to all tokens, or if causal to themselves and those before them."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        D = config.d_model
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.n_heads, self.causal, self.backend = config.n_heads, causal, config.kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, T, D) for x (B, T, D)."""
        q, k, v = joined((self.q_proj, self.k_proj, self.v_proj), x, self.n_heads)  # (B, T, H, K)
        y = attention(q, k, v, causal=self.causal, backend=self.backend)
        return self.out_proj(y.reshape(x.shape))

    def at(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the output (B, D) at one place (B,) of each row of x (B, T, D)."""
        B, T, D = x.shape
        q = self.q_proj(x[torch.arange(B, device=x.device), places]).view(B, self.n_heads, -1)  # (B, H, K)
        k, v = joined((self.k_proj, self.v_proj), x, self.n_heads)  # (B, T, H, K)
        scores = torch.einsum("bhk,bthk->bht", q, k).float() / math.sqrt(q.shape[-1])
        if self.causal:
            behind = torch.arange(T, device=x.device) > places[:, None]
            scores = scores.masked_fill(behind[:, None], float("-inf"))
        y = torch.einsum("bht,bthk->bhk", scores.softmax(dim=-1).to(v.dtype), v)
        return self.out_proj(y.reshape(B, D))


class MLP(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.d_model, config.d_ff), nn.Linear(config.d_ff, config.d_model)
        self.kind = config.mlp

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc1(x)
        if self.kind == "quick_gelu":
            return self.fc2(quick_gelu(u))
        return self.fc2(gelu(u) if self.kind == "gelu_tanh" else F.gelu(u))


class Block(nn.Module):
    """One layer: attention and an MLP, each added to its input, with the norms before them."""

    def __init__(self, config: TowerConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config, causal)
        self.layer_norm2 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Return the layer's output (B, T, D) for x (B, T, D), or with places (B,) the output (B, D) at one
        place of each row: more is not needed of the last layer where one token is read."""
        inner = self.layer_norm1(x)
        if places is None:
            x = x + self.self_attn(inner)
        else:
            x = x[torch.arange(len(x), device=x.device), places] + self.self_attn.at(inner, places)
        return x + self.mlp(self.layer_norm2(x))


def blocks(config: TowerConfig, causal: bool = False) -> nn.ModuleDict:
    """Return the L blocks of a tower."""
    return nn.ModuleDict({"layers": nn.ModuleList(Block(config, causal) for _ in range(config.n_layers))})


class Probe(nn.Module):
    """SigLIP's pooling: a learned query attends to all patches, and an MLP of the result is added to it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.d_model
        self.probe = nn.Parameter(torch.empty(1, 1, D))
        # Only the parameters of this module are used, for their names and shapes.
        self.attention = nn.MultiheadAttention(D, config.n_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(D, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.backend = config.kernels

    def forward(self, z: Tensor) -> Tensor:
        """Return one vector (B, D) for z (B, N, D)."""
        mha, (B, N, D) = self.attention, z.shape
        query, key_value = mha.in_proj_weight.split((D, 2 * D))
        query_bias, key_value_bias = mha.in_proj_bias.split((D, 2 * D))
        q = F.linear(self.probe, query, query_bias).view(1, 1, mha.num_heads, -1)  # (1, 1, H, K)
        q = q.expand(B, -1, -1, -1)  # (B, 1, H, K)
        k_v = F.linear(z, key_value, key_value_bias).view(B, N, 2, mha.num_heads, -1)
        k, v = k_v.unbind(2)  # (B, N, H, K)
        found = mha.out_proj(attention(q, k, v, backend=self.backend).reshape(B, D))
        return found + self.mlp(self.layernorm(found))


class VisionTower(nn.Module):
    """The Transformer of images: it returns hidden states of patches, or one vector for each image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config, D, is_clip = config, config.d_model, config.layout == "clip"
        P = config.patch_size
        parts: dict[str, nn.Module] = {
            "patch_embedding": nn.Conv2d(config.n_channels, D, P, P, bias=not is_clip)
        }
        self.embeddings = nn.ModuleDict(parts | {"position_embedding": nn.Embedding(config.n_tokens, D)})
        if is_clip:
            self.embeddings.class_embedding = nn.Parameter(torch.empty(D))
            self.pre_layrnorm = nn.LayerNorm(D, eps=config.norm_eps)  # spelled as in the files
        self.encoder = blocks(config)
        self.post_layernorm = nn.LayerNorm(D, eps=config.norm_eps)
        if not is_clip:
            self.head = Probe(config)
        initialize(self)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "VisionTower":
        """Return the image tower in a directory, alone or of a whole model, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return clip.load_tower(cls, VisionConfig, directory, kernels)

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, height, width) with pixels in [0, 1] as the tower reads them.

        Raises ValueError for whole numbers, in which the mean would be rounded to 0.
        """
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: expected floating point, with pixels in [0, 1]")
        mean, std = (images.new_tensor(getattr(self.config, name))[:, None, None] for name in ("mean", "std"))
        return (images - mean) / std

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions (T, D) for a grid of patches, interpolated if it is not the config's."""
        own = self.embeddings.position_embedding.weight
        if grid == self.config.grid:
            return own
        if self.config.layout == "clip":
            return resample(own[None], self.config.grid, grid)[0]
        # `resample` expects a row for the class token in front: add one, and remove it.
        return resample(F.pad(own, (0, 0, 1, 0))[None], self.config.grid, grid)[0, 1:]

    def embed(self, images: Tensor) -> Tensor:
        """Return z (B, T, D) before the first block, of normalized images (B, C, height, width).

        Raises ValueError for images that are smaller than a patch.
        """
        P, patches = self.config.patch_size, self.embeddings.patch_embedding
        height, width = images.shape[2:]
        grid = (height // P, width // P)
        if 0 in grid:
            raise ValueError(f"images of {height} x {width} pixels: expected at least {P} x {P}, a patch")
        images = images.to(patches.weight.dtype)  # pixels are float32, also for a model in bfloat16
        x = patches_of(images[:, :, : grid[0] * P, : grid[1] * P], P)  # (B, N, C P P)
        x = F.linear(x, patches.weight.flatten(1), patches.bias)
        if self.config.layout == "siglip":
            return x + self.positions(grid)
        first = self.embeddings.class_embedding.expand(len(x), 1, -1)
        return self.pre_layrnorm(torch.cat((first, x), dim=1) + self.positions(grid))

    def features(self, images: Tensor, layer: int = -2, keep_class: bool = False) -> Tensor:
        """Return the hidden states (B, N, D) of normalized images between two layers, without a norm.

        layer: an index into the L + 1 hidden states: 0 is before the first block, -2 before the last, and -1
        or L after the last. Later blocks are not computed. keep_class: return CLIP's class token, too, before
        the patches: (B, 1 + N, D). Raises IndexError for a layer that does not exist.
        """
        n_layers = self.config.n_layers
        if not -n_layers - 1 <= layer <= n_layers:
            raise IndexError(f"layer {layer}: expected {-n_layers - 1} to {n_layers}")
        z = self.embed(images)
        for block in self.encoder.layers[: layer % (n_layers + 1)]:
            z = block(z)
        return z if keep_class or self.config.layout == "siglip" else z[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        """Return one vector (B, D) for each of the normalized images (B, C, height, width)."""
        if self.config.layout == "siglip":
            return self.head(self.post_layernorm(self.features(images, layer=-1)))
        z = self.features(images, layer=-2, keep_class=True)
        first = torch.zeros(len(z), dtype=torch.long, device=z.device)
        return self.post_layernorm(self.encoder.layers[-1](z, first))


class TextTower(nn.Module):
    """The Transformer of texts: it returns hidden states of tokens, or one vector for each text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config, D, is_clip = config, config.d_model, config.layout == "clip"
        rows = {"token_embedding": config.vocab_size, "position_embedding": config.max_seq_len}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(n, D) for name, n in rows.items()})
        self.encoder = blocks(config, causal=is_clip)
        self.final_layer_norm = nn.LayerNorm(D, eps=config.norm_eps)
        if not is_clip:
            self.head = nn.Linear(D, config.d_out)
        initialize(self)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "TextTower":
        """Return the text tower in a directory, alone or of a CLIP, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return clip.load_text_tower(cls, TextConfig, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a CLIPTextModel."""
        clip.save_text_tower(self, directory)

    def places(self, tokens: Tensor) -> Tensor:
        """Return the place (B,) in each row of tokens (B, T) that CLIP reads: that of the token that ends it.

        Raises ValueError for a row without this token, but only on a CPU: a check would make a GPU wait.
        """
        if self.config.read_largest:
            return tokens.argmax(dim=1)
        is_end = tokens == self.config.eos_token_id
        is_checked = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_checked and not is_end.any(dim=1).all():
            raise ValueError(f"a text has no token {self.config.eos_token_id}, which ends it and is read")
        return is_end.int().argmax(dim=1)  # the first of several

    def embed(self, tokens: Tensor) -> Tensor:
        """Return z (B, T, D) before the first block. Raises ValueError for rows longer than max_seq_len."""
        T, most = tokens.shape[1], self.config.max_seq_len
        if most < T:
            raise ValueError(f"texts of {T} tokens: expected at most {most}, max_seq_len")
        positions = self.embeddings.position_embedding.weight[:T]
        return self.embeddings.token_embedding(tokens) + positions

    def states(self, tokens: Tensor) -> Tensor:
        """Return the hidden states (B, T, D) of tokens (B, T) after the last block and its norm. A caller
        leaves out those of CLIP's padding, unless its model was trained with them, as Stable Diffusion."""
        z = self.embed(tokens)
        for block in self.encoder.layers:
            z = block(z)
        return self.final_layer_norm(z)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector (B, D), for siglip (B, d_out), for each row of tokens (B, T). Rows are padded on
        the right, for siglip to the length that the model was trained with."""
        z = self.embed(tokens)
        *earlier, last = self.encoder.layers
        for block in earlier:
            z = block(z)
        if self.config.layout == "siglip":
            return self.head(self.final_layer_norm(last(z)[:, -1]))
        return self.final_layer_norm(last(z, self.places(tokens)))


@torch.no_grad()
def initialize(tower: VisionTower | TextTower) -> None:
    """Draw the tower's weights from normal distributions, as OpenAI's code does for text; biases are 0.

    Standard deviations: 1 / sqrt(2 D) of an MLP's first layer; 1 / sqrt(2 L D) of the last layers of MLPs and
    attention, which keeps the sum of these 2 L layers' outputs in bounds; 0.02 of tokens and 0.01 of their
    positions; 1 / sqrt(C P P) of patches; 1 / sqrt(D) of all else. Raises ValueError for a parameter without
    a rule.
    """
    D, residual = tower.config.d_model, math.sqrt(2 * tower.config.n_layers)
    is_text = isinstance(tower, TextTower)
    for name, p in tower.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1 and "norm" in name:
            p.fill_(1.0)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            p.normal_(std=1 / math.sqrt(D) / residual)
        elif name.endswith("fc1.weight"):
            p.normal_(std=1 / math.sqrt(2 * D))
        elif name.endswith(("_proj.weight", "in_proj_weight", "probe", "class_embedding", "head.weight")):
            p.normal_(std=1 / math.sqrt(D))
        elif name.endswith("patch_embedding.weight"):
            p.normal_(std=1 / math.sqrt(p[0].numel()))
        elif name.endswith("token_embedding.weight"):
            p.normal_(std=0.02)
        elif name.endswith("position_embedding.weight"):
            p.normal_(std=0.01 if is_text else 1 / math.sqrt(D))
        else:
            raise ValueError(
                f"parameter {name}: no rule of initialisation; add one to clip_towers.initialize"
            )
