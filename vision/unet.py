"""The U-Net of DDPM: from a noisy image and its time to a prediction of the image's size.

    down     residual blocks at each resolution, then half the height and width; every feature map is kept
    middle   two residual blocks, with attention between them
    up       residual blocks, each of which also reads the last kept map and removes it; then double the size
    t        (sin, cos) of t at many frequencies -> MLP -> added in each residual block

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239, appendix B) took this network from PixelCNN++ and the
U-Net (Ronneberger et al. 2015, 1505.04597). The blocks are in vision/convolutions.py. At small resolutions
each residual block is followed by self-attention over all places. The last convolution, and the last layer of
each block, start at zero: a new model predicts zeros.

A model reads one of two kinds of conditions, or none:

    classes   a learned vector for each class is added to that of the time. Those of several classes are
              summed, so that an image may have one class or a set of words. The last row of the embedding
              stands for no class: guidance needs predictions without a condition
    texts     states of a text encoder, read by cross-attention (vision/spatial_transformer.py), as in Stable
              Diffusion 1

Instead of numbers of classes it may read vectors, which are added to that of the time as they are: the
decoder of DALL-E 2 (vision/unclip.py) makes them, and the states, of the embedding of an image.

The targets of the prediction are in vision/noise.py, the training is in vision/ddpm.py.

    python -m vision.unet                  print the sizes
    python train.py --model ddpm           train one to draw letters by their names

Shapes: B batch, C channels, h x w places, D width of the vector of a time, T text states, W classes of an
image.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import command
from formats import unet as formats_unet
from formats.config_values import check_values
from vision.convolutions import Attention, Double, Half, ResidualBlock, initialize
from vision.spatial_transformer import SpatialTransformer

KIND, TASK = "denoiser", "ddpm"


@dataclass(frozen=True)
class Config:
    channels: tuple[int, ...]  # at each resolution, from the full one
    attention: tuple[int, ...]  # 1 where the blocks of a resolution have attention, else 0
    n_layers: int = 2  # residual blocks at each resolution; one more on the way up
    n_channels: int = 3  # of the image
    n_out: int = 3  # of the prediction
    image_size: int = 32  # pixels, both ways
    n_classes: int = 0  # rows of the embedding of classes; 0: no classes
    class_vectors: bool = False  # whether a class is given as a vector (D,), not as a number
    d_text: int = 0  # width of a text's states; 0: no texts are read
    n_heads: int = 1  # of each attention
    d_head: int | None = None  # width of a head, which then gives the number of heads; without texts only
    n_groups: int = 32  # groups of channels in each group normalisation
    norm_eps: float = 1e-6
    cos_first: bool = False  # whether a time's cosines precede its sines
    freq_shift: int = 1  # 1: the frequencies end at 1 / 10,000, as in DDPM; 0: just above it
    padding: int = 0  # of halving, see convolutions.Half: 0 as in DDPM, 1 as in Stable Diffusion
    dropout: float = 0.0  # rate, in residual blocks
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("n_classes", "d_text", "freq_shift", "padding", "dropout")

    def __post_init__(self):
        check_values(self, padding=(0, 1))
        if len(self.channels) != len(self.attention) or not self.channels:
            sizes = f"channels {self.channels} with attention {self.attention}"
            raise ValueError(f"{sizes}: expected a number of each for every resolution")
        if self.class_vectors and self.n_classes:
            raise ValueError(f"n_classes {self.n_classes}: classes are vectors here; leave n_classes out")
        if self.d_head and self.d_text:
            raise ValueError(f"d_head {self.d_head}: a U-Net that reads texts has n_heads; leave d_head out")
        if self.channels[0] <= 2 * self.freq_shift:  # the steps between frequencies are 1 / (half - shift)
            raise ValueError(f"channels {self.channels}: expected more than {2 * self.freq_shift} at first")
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size}: expected a multiple of {self.factor}")
        for width in self.channels:
            if width % self.n_groups or width % self.heads(width) or width % 2:
                groups = f"n_groups {self.n_groups} and {self.heads(width)} heads"
                raise ValueError(f"channels {self.channels}: expected multiples of {groups}, and of 2")

    def heads(self, width: int) -> int:
        """Return the number of heads of an attention over `width` channels."""
        return max(1, width // self.d_head) if self.d_head else self.n_heads

    @property
    def factor(self) -> int:
        """Return the height of an image divided by that of the smallest feature map."""
        return 2 ** (len(self.channels) - 1)

    @property
    def d_time(self) -> int:
        """Return D, the width of the vector that a time becomes."""
        return 4 * self.channels[0]

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the embedding of classes: what a vocabulary is for a text model."""
        return self.n_classes

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one image."""
        return 1


SIZES = {
    "tiny": Config((16, 32, 64), (0, 0, 1), 1, 1, 1, 16, n_groups=8, norm_eps=1e-5),
    "ddpm-32": Config((128, 256, 256, 256), (0, 1, 0, 0), dropout=0.1),  # Ho et al. 2020, CIFAR-10
    "ddpm-256": Config((128, 128, 256, 256, 512, 512), (0, 0, 0, 0, 1, 0), image_size=256),
    "stable-diffusion-1": Config(
        (320, 640, 1280, 1280), (1, 1, 1, 0), n_channels=4, n_out=4, image_size=64, d_text=768, n_heads=8,
        norm_eps=1e-5, cos_first=True, freq_shift=0, padding=1,
    ),
}  # fmt: skip


# --- conditions


def time_embedding(t: Tensor, width: int, cos_first: bool = True, freq_shift: int = 0) -> Tensor:
    """Return sines and cosines (B, width), float32, of times t (B,) at width / 2 frequencies, which fall
    geometrically from 1 to 1 / 10,000; cos_first and freq_shift as in `Config`."""
    half = width // 2
    exponents = -math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t[:, None].float() * torch.exp(exponents / (half - freq_shift))  # rounded as in diffusers
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class TimeMLP(nn.Module):
    """Two linear layers, from the sines and cosines of a time to its vector (B, D)."""

    def __init__(self, d_in: int, d_time: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(d_in, d_time), nn.Linear(d_time, d_time)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


# --- the U-Net


class Level(nn.Module):
    """Residual blocks at one resolution, each with an attention after it or none.

    widths: the input and output channels of each residual block.
    """

    def __init__(self, config: Config, widths: list[tuple[int, int]], has_attention: bool):
        super().__init__()
        of_block = {"d_time": config.d_time, "eps": config.norm_eps, "dropout": config.dropout}
        self.resnets = nn.ModuleList(
            ResidualBlock(n_in, n_out, config.n_groups, **of_block) for n_in, n_out in widths
        )
        if has_attention:
            self.attentions = nn.ModuleList(attention_layer(config, n_out) for _, n_out in widths)

    def block(self, i: int, x: Tensor, time: Tensor, text: Tensor | None) -> Tensor:
        """Return the output (B, n_out, h, w) of residual block i, and of the attention after it if there is
        one, for x (B, n_in, h, w), the time's vector (B, D) and the states of a text (B, T, d_text)."""
        x = self.resnets[i](x, time)
        if not hasattr(self, "attentions") or i >= len(self.attentions):
            return x
        return self.attentions[i](x) if text is None else self.attentions[i](x, text)


def attention_layer(config: Config, width: int) -> nn.Module:
    """Return a new self-attention over `width` channels, with cross-attention to a text if the model reads
    texts."""
    if config.d_text:
        return SpatialTransformer(width, config.d_text, config.n_heads, config.n_groups, config.kernels)
    return Attention(width, config.heads(width), config.n_groups, config.kernels, eps=config.norm_eps)


class UNet(nn.Module):
    """From a noisy image, its time and its condition to a prediction of the same size. Parameters have the
    names of diffusers' UNet2DModel and UNet2DConditionModel."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, n, widths = config, config.n_layers, config.channels
        self.conv_in = nn.Conv2d(config.n_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeMLP(widths[0], config.d_time)
        if config.n_classes:
            self.class_embedding = nn.Embedding(config.n_classes, config.d_time)

        # The way down. `kept`: the channels of the feature maps that the way up will read.
        self.down_blocks, kept, last = nn.ModuleList(), [widths[0]], len(widths) - 1
        for i, width in enumerate(widths):
            pairs = [(kept[-1], width), *[(width, width)] * (n - 1)]
            level = Level(config, pairs, bool(config.attention[i]))
            kept += [width] * n
            if i < last:
                level.downsamplers = nn.ModuleList([Half(width, config.padding)])
                kept.append(width)
            self.down_blocks.append(level)

        # The middle always has attention, between its two blocks.
        self.mid_block = Level(config, [(widths[-1], widths[-1])] * 2, False)
        self.mid_block.attentions = nn.ModuleList([attention_layer(config, widths[-1])])

        # The way up reads the kept maps in reverse order, one in each block.
        self.up_blocks, before = nn.ModuleList(), widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(n + 1):
                pairs.append((before + kept.pop(), width))
                before = width
            level = Level(config, pairs, bool(config.attention[i]))
            if i > 0:
                level.upsamplers = nn.ModuleList([Double(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(config.n_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.n_out, 3, padding=1)
        initialize(self)
        nn.init.zeros_(self.conv_out.weight)

    def condition(self, t: Tensor, classes: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the vector (B, D) of times t (B,) and classes, see `forward`."""
        of_time = time_embedding(t, self.config.channels[0], self.config.cos_first, self.config.freq_shift)
        vector = self.time_embedding(of_time.to(dtype))
        if self.config.class_vectors:
            if classes is None or classes.shape != vector.shape:
                given = "none" if classes is None else f"classes of {tuple(classes.shape)}"
                raise ValueError(f"{given}: expected vectors of {tuple(vector.shape)}")
            return vector + classes
        if not self.config.n_classes:
            return vector
        if classes is None:
            raise ValueError(f"this model has {self.config.n_classes} classes: expected those of each image")
        classes = classes.view(len(classes), -1)  # (B, W)
        rows = self.class_embedding(classes.clamp(min=0))  # (B, W, D)
        return vector + (rows * (classes >= 0)[:, :, None]).sum(dim=1)

    def forward(
        self, x: Tensor, t: Tensor, classes: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Return the prediction (B, n_out, h, w) for noisy images x (B, n_channels, h, w).

        t: times (B,). classes: one for each image (B,), or several (B, W), whose vectors are summed; -1 is
        padding; with class_vectors, vectors (B, D). A model without classes ignores them. text: states
        (B, T, d_text). Raises ValueError for a condition that is missing, for a text that the model cannot
        read, and for sizes that cannot be halved often enough.
        """
        if any(side % self.config.factor for side in x.shape[2:]):
            raise ValueError(f"images of {tuple(x.shape[2:])}: expected multiples of {self.config.factor}")
        if (text is None) == bool(self.config.d_text):
            d, given = self.config.d_text, "none" if text is None else tuple(text.shape)
            raise ValueError(f"states of a text: {given}; expected {f'(B, T, {d})' if d else 'none'}")
        time = self.condition(t, classes, x.dtype)

        # The way down keeps the first map and the output of each block and of each halving.
        x = self.conv_in(x)
        kept = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x, time, text)
                kept.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                kept.append(x)

        # The middle, and the way up, where each block reads one of the kept maps beside x.
        for i in range(2):
            x = self.mid_block.block(i, x, time, text)

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, torch.cat((x, kept.pop()), dim=1), time, text)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of convolutions and matrix products, forward and backward, of one image, with a
        text of one state if the model reads texts. seq_len is not used."""
        return 6 * n_macs(self)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "UNet":
        """Return the model in a directory with diffusers' UNet2DModel or UNet2DConditionModel, in the dtype
        of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return formats_unet.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write diffusers' UNet2DModel, or if it reads texts a UNet2DConditionModel, into a directory."""
        formats_unet.save(self, directory)


Model = UNet


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for the channels of a data set's images, and for its words or classes if it has any.
    seq_len is not used."""
    C = dataset.train[0]["image"].shape[0]
    n_classes = dataset.tokenizer.n_vocab if dataset.tokenizer is not None else 0
    return replace(config, n_channels=C, n_out=C, n_classes=n_classes)


def level_macs(level: Level, n_places: int, n_states: int) -> int:
    """Return the multiplications of a level for feature maps of n_places and texts of n_states."""
    total = 0
    for name, p in level.named_parameters():
        if p.ndim < 2:
            continue
        n_rows = n_places
        if name.endswith("time_emb_proj.weight"):
            n_rows = 1
        elif "attn2.to_k" in name or "attn2.to_v" in name:
            n_rows = n_states
        elif name.startswith("downsamplers"):
            n_rows = n_places // 4
        elif name.startswith("upsamplers"):
            n_rows = 4 * n_places
        total += n_rows * p.numel()
    # Attention also multiplies queries by keys, and weights by values.
    for inner in getattr(level, "attentions", ()):
        is_text = isinstance(inner, SpatialTransformer)
        width = (inner.norm if is_text else inner.group_norm).num_channels
        total += 2 * n_places * width * (n_places + n_states * is_text)
    return total


def n_macs(model: UNet, n_states: int = 1) -> int:
    """Return the multiplications of a forward pass over one image, with a text of n_states."""
    n_places, last = math.prod(model.config.size), len(model.down_blocks) - 1
    total = n_places * (model.conv_in.weight.numel() + model.conv_out.weight.numel())
    total += sum(p.numel() for p in model.time_embedding.parameters() if p.ndim == 2)
    for i, (down, up) in enumerate(zip(model.down_blocks, reversed(model.up_blocks), strict=True)):
        total += sum(level_macs(level, n_places // 4**i, n_states) for level in (down, up))
    return total + level_macs(model.mid_block, n_places // 4**last, n_states)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Print the sizes of the U-Net.")
    parser.parse_args(argv)
    print(f"{'size':20} {'parameters':>13} {'image':>6}  of a forward pass")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = UNet(config)
        n_params = sum(p.numel() for p in model.parameters())
        print(f"{name:20} {n_params:13,} {config.image_size:6}  {2 * n_macs(model, 77):.2e} FLOPs")


if __name__ == "__main__":
    command.run(main)
