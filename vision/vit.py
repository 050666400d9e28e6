"""ViT: an image is cut into patches, and a Transformer reads them like the tokens of a text.

    z = [class; E x_1; ...; E x_N] + positions                 x_i: the C P P numbers of a patch
    z = z + attention(norm(z)),  z = z + mlp(norm(z))          L times, every token attends to every other
    p(label | image) = softmax(W norm(z)_class + b)

Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929). Only the patches are made for images. That
neighbouring pixels belong together is built into a convolution; a ViT has to learn it, in its positions. From
millions of images it does. A thousand images are too few, unless they are augmented, as in
vision/classify_images.py, the task that trains a ViT.

The classifier reads one of three vectors (`readout`):
    class     norm(z) of a learned class token (section 3.1)
    pooler    tanh of a linear map of the same, the paper's head in pre-training (section 3.1)
    mean      norm of the mean of the patches, without the class token (as MAE is fine-tuned, He et al. 2021)

Positions are learned, or fixed sines and cosines of row and column (vision/patches.py). Parameters have the
names of Hugging Face's files.

    python -m vision.vit                                   print the sizes
    python -m vision.vit runs/vit/model photo.png          classify images
    python train.py --model vit                            train one to read letters in unseen fonts

Shapes: B batch, C channels, P patch size, N patches, T = 1 + N tokens, D model width, F inner width of the
MLP, H heads, K head width, L layers.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.images import decode
from data.rows import Dataset
from formats import command, images
from formats.config_values import check_values
from kernels import attention
from vision.patches import patches_of, resample, sin_cos, take

TASK, KIND = "classify_images", "image encoder"


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # F
    image_size: int | tuple[int, ...] = 224  # pixels, both ways, or (height, width)
    patch_size: int = 16  # pixels, both ways
    n_channels: int = 3
    n_classes: int = 1000  # 0: no classifier, the model returns features
    readout: str = "class"  # or "pooler" or "mean", see the header
    positions: str = "learned"  # or "sincos", which are fixed
    mlp: str = "gelu"  # or "gelu_tanh", its approximation
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = (0.5,)  # subtracted from pixels in [0, 1]; for all channels, or for each
    std: tuple[float, ...] = (0.5,)  # by which the difference is divided
    labels: tuple[str, ...] = ()  # the names of the classes, if they are known
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("n_classes",)

    def __post_init__(self):
        check_values(
            self,
            readout=("class", "pooler", "mean"),
            positions=("learned", "sincos"),
            mlp=("gelu", "gelu_tanh"),
        )
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if len(self.size) != 2 or min(self.size) < 1 or any(side % self.patch_size for side in self.size):
            sides = f"image_size {self.image_size} with patch_size {self.patch_size}"
            raise ValueError(f"{sides}: expected one or two sides that are multiples of the patch")
        if self.positions == "sincos" and self.d_model % 4:
            raise ValueError(f"d_model {self.d_model}: sines of rows and columns need a multiple of 4")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.n_channels):
                raise ValueError(f"{name} {getattr(self, name)}: expected one number, or one per channel")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the numbers of rows and columns of patches."""
        return tuple(side // self.patch_size for side in self.size)

    @property
    def n_patches(self) -> int:
        """Return N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one image."""
        return 1


TI, S, B, L = (12, 3, 192, 768), (12, 6, 384, 1536), (12, 12, 768, 3072), (24, 16, 1024, 4096)
SIZES = {
    "tiny": Config(4, 4, 128, 256, 32, 8, 1, 62),
    "tiny-4": Config(4, 4, 128, 256, 32, 4, 1, 62),  # patches of 4 pixels, for vision/mae.py
    "ti-16": Config(*TI),  # Touvron et al. 2020, table 1
    "s-16": Config(*S),
    "s-32": Config(*S, patch_size=32),  # Steiner et al. 2021
    "b-16": Config(*B),  # Dosovitskiy et al. 2020, table 1
    "b-32": Config(*B, patch_size=32),
    "l-16": Config(*L),
    "l-32": Config(*L, patch_size=32),
    "h-14": Config(32, 16, 1280, 5120, patch_size=14),
    "giant-14": Config(40, 16, 1408, 6144, patch_size=14),  # g and G: Zhai et al. 2021, table 2
    "gigantic-14": Config(48, 16, 1664, 8192, patch_size=14),
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the size, the channels and the classes of a data set's images."""
    C, height, width = dataset.train[0]["image"].shape
    size = height if height == width else (height, width)
    n = len(dataset.labels)
    return replace(config, image_size=size, n_channels=C, n_classes=n, labels=dataset.labels)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draw the module's parameters as MAE's code does: matrices by Glorot's rule, the class token and learned
    positions N(0, 0.02^2), biases 0. The classifier is 0, as in ViT's code.

    Raises ValueError for a parameter without a rule.
    """
    for name, p in module.named_parameters():
        if name.endswith("bias") or name.startswith("classifier"):
            p.zero_()
        elif p.ndim == 1 and "norm" in name:
            p.fill_(1.0)
        elif name.endswith(("_token", "position_embeddings")):
            p.normal_(std=0.02)
        elif name.endswith("weight") and p.ndim in (2, 4):  # a patch's embedding is a matrix (D, C P P), too
            nn.init.xavier_uniform_(p.view(len(p), -1))
        else:
            raise ValueError(f"parameter {name}: no rule of initialisation; add one to vit.initialize")


class Embeddings(nn.Module):
    """The class token and the patches, with their positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D = config, config.d_model
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        if config.positions == "learned":
            self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.n_patches, D))
        else:
            self.register_buffer("position_embeddings", sin_cos(config.grid, D))
        # A convolution by name and shape only: its patches do not overlap, so it is a product of matrices.
        projection = nn.Conv2d(config.n_channels, D, config.patch_size, config.patch_size)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """Return the positions (1, 1 + N, D) for a grid of patches, interpolated or computed anew if it is
        not the config's."""
        if grid == self.config.grid:
            return self.position_embeddings
        if self.config.positions == "sincos":
            return sin_cos(grid, self.config.d_model).to(self.position_embeddings)
        return resample(self.position_embeddings, self.config.grid, grid)

    def forward(self, images: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the class token (B, 1, D) and the patches (B, N, D) of normalized images (B, C, height,
        width), with their positions; with places (B, n), only the patches at these places (B, n, D)."""
        P, projection = self.config.patch_size, self.patch_embeddings.projection
        positions = self.positions((images.shape[2] // P, images.shape[3] // P))
        pixels, patch_positions = patches_of(images, P), positions[:, 1:]
        if places is not None:
            pixels, patch_positions = take(pixels, places), F.embedding(places, patch_positions[0])
        x = F.linear(pixels, projection.weight.flatten(1), projection.bias)  # (B, N or n, D)
        class_token = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return class_token, x + patch_positions


class Attention(nn.Module):
    """Attention of every token of an image to all of them."""

    def __init__(self, config: Config):
        super().__init__()
        D, bias = config.d_model, config.qkv_bias
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(D, D, bias=bias) for name in names})
        self.output = nn.ModuleDict({"dense": nn.Linear(D, D)})
        self.n_heads, self.backend = config.n_heads, config.kernels

    def forward(self, x: Tensor, n: int) -> Tensor:
        """Return the output (B, n, D) at the first n tokens of x (B, T, D), which attend to all T."""
        maps = self.attention
        flat = maps.query(x[:, :n]), maps.key(x), maps.value(x)
        q, k, v = (y.unflatten(2, (self.n_heads, -1)) for y in flat)  # (B, n or T, H, K)
        return self.output.dense(attention(q, k, v, backend=self.backend).flatten(2))


class Block(nn.Module):
    """One layer: attention and an MLP, each added to its input, with the norms before them."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.layernorm_before = nn.LayerNorm(D, eps=config.norm_eps)
        self.attention = Attention(config)
        self.layernorm_after = nn.LayerNorm(D, eps=config.norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, config.d_ff)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.d_ff, D)})
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"

    def forward(self, x: Tensor, n: int | None = None) -> Tensor:
        """Return the layer's output (B, n, D) at the first n tokens of x (B, T, D), by default at all. The
        other tokens are only attended to."""
        n = x.shape[1] if n is None else n
        x = x[:, :n] + self.attention(self.layernorm_before(x), n)
        inner = F.gelu(self.intermediate.dense(self.layernorm_after(x)), approximate=self.approximate)
        return x + self.output.dense(inner)


def run_layers(layers: nn.ModuleList, x: Tensor, n: int | None = None) -> Tensor:
    """Return the output (B, n, D) of a stack of blocks for x (B, T, D), at the first n tokens, by default at
    all. The last block computes no other tokens."""
    for layer in layers[:-1]:
        x = layer(x)
    return layers[-1](x, n)


def layer_macs(config: Any, T: int, n_read: int | None = None) -> int:
    """Return the multiplications of a config's L blocks for T tokens: L (T (4 D^2 + 2 D F) + 2 T^2 D).

    n_read: how many tokens are read after the last block, by default all. Those that are not read save
    (T - n_read) (2 D^2 + 2 D F + 2 T D), as the last block computes only their keys and values.
    """
    D, F = config.d_model, config.d_ff
    layer = T * (4 * D * D + 2 * D * F) + 2 * T * T * D
    left_out = 0 if n_read is None else (T - n_read) * (2 * D * D + 2 * D * F + 2 * T * D)
    return config.n_layers * layer - left_out


def n_macs(config: Config, n: int | None = None, n_read: int | None = None) -> int:
    """Return the multiplications of one forward pass that reads n of the N patches, by default all.

    They are those of `layer_macs` for 1 + n tokens, n D C P^2 of the patches and D for each class; a pooler
    adds D^2. Papers often call these FLOPs. n_read: see `layer_macs`.
    """
    D, n = config.d_model, config.n_patches if n is None else n
    patches = n * D * config.n_channels * config.patch_size**2
    pooler = D * D * (config.readout == "pooler")
    return layer_macs(config, 1 + n, n_read) + patches + pooler + D * config.n_classes


class ViT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        parts = {"embeddings": Embeddings(config), "encoder": nn.ModuleDict({"layer": layers})}
        parts["layernorm"] = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        if config.readout == "pooler":
            parts["pooler"] = nn.ModuleDict({"dense": nn.Linear(config.d_model, config.d_model)})
        self.vit = nn.ModuleDict(parts)
        if config.n_classes:
            self.classifier = nn.Linear(config.d_model, config.n_classes)
        initialize(self)

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, height, width) with pixels in [0, 1] as the model reads them: minus the mean
        of the config, and divided by its std."""
        mean, std = (images.new_tensor(getattr(self.config, name))[:, None, None] for name in ("mean", "std"))
        return (images - mean) / std

    def encode(self, class_token: Tensor, patches: Tensor, n: int | None = None) -> Tensor:
        """Return z (B, n, D) after the last layer, before the norm, for embeddings of the class token
        (B, 1, D) and patches (B, N, D), at the first n of these 1 + N tokens, by default at all."""
        return run_layers(self.vit.encoder.layer, torch.cat((class_token, patches), dim=1), n)

    def features(self, images: Tensor) -> Tensor:
        """Return the vectors (B, D) that the classifier reads, see the header, of normalized images
        (B, C, height, width), whose sides are multiples of the patch size."""
        embeddings = self.vit.embeddings(images)
        if self.config.readout == "mean":
            return self.vit.layernorm(self.encode(*embeddings)[:, 1:].mean(dim=1))
        class_token = self.vit.layernorm(self.encode(*embeddings, 1)[:, 0])
        if self.config.readout == "pooler":
            return torch.tanh(self.vit.pooler.dense(class_token))
        return class_token

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of normalized images, or their features (B, D) if the config has no
        classes."""
        features = self.features(images)
        return self.classifier(features) if self.config.n_classes else features

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross-entropy in nats of "images" (B, C, height, width), with pixels in [0, 1], and
        "targets" (B,), their labels; and the accuracy."""
        logits = self(self.normalized(batch["images"])).float()
        accuracy = (logits.argmax(-1) == batch["targets"]).float().mean()
        return F.cross_entropy(logits, batch["targets"]), {"accuracy": accuracy}

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, for one image: two for a multiplication
        forward, and four backward. seq_len is not used."""
        return 6 * n_macs(self.config, n_read=None if self.config.readout == "mean" else 1)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "ViT":
        """Return the ViT in a directory, in the dtype of its weights; of a ViTMAEForPreTraining the encoder.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return images.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path, labels: tuple[str, ...] | None = None) -> None:
        """Write a ViTForImageClassification, a ViTModel if there is no classifier, or our native layout for a
        readout that neither has. labels: the names of the classes, by default the config's."""
        images.save(self, directory, self.config.labels if labels is None else labels)


Model = ViT


def print_sizes() -> None:
    """Print the parameters of each size, and the FLOPs of reading one image and of training on it."""
    print(f"{'size':12} {'parameters':>13} {'image':>6} {'patch':>6} {'tokens':>6}  forward  training")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = ViT(config)
        n_params = sum(p.numel() for p in model.parameters())
        sizes = f"{config.size[0]:6} {config.patch_size:6} {1 + config.n_patches:6}"
        flops = 2 * n_macs(config)
        print(f"{name:12} {n_params:13,} {sizes}  {flops:.2e} {3 * flops:.2e} FLOPs")


def likeliest(logits: Tensor, config: Config) -> str:
    """Return the three likeliest classes by logits (classes,), with their probabilities."""
    names = config.labels or [str(i) for i in range(config.n_classes)]
    best = logits.softmax(-1).topk(min(3, config.n_classes))
    return ", ".join(f"{names[i]} {p:.1%}" for p, i in zip(*(t.tolist() for t in best), strict=True))


def main() -> None:
    parser = command.Parser(description="Classify images, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("images", nargs="*", type=command.path, help="files of images")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes()
        return
    if not args.images:
        raise ValueError(f"{args.checkpoint}: no images to classify; add their files after it")
    model = ViT.from_pretrained(args.checkpoint).eval().float()
    config = model.config
    if not config.n_classes:
        raise ValueError(f"{args.checkpoint}: no classifier; train one by --init-from, --set n_classes=N")
    for path in args.images:
        pixels = torch.from_numpy(decode(path, (config.n_channels, *config.size), Counter())) / 255
        with torch.no_grad():
            logits = model(model.normalized(pixels[None]))[0]
        print(f"{path}: {likeliest(logits, config)}")


if __name__ == "__main__":
    command.run(main)
