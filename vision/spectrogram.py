"""AST: a sound becomes a picture of its frequencies over time, and a Vision Transformer reads this picture.

    x[t, m] = ln(sum over f of |FFT(frame t)[f]|^2 filter[f, m])    log-mel numbers, see `filter_bank`
    z = [class; distillation; E patch_1; ...] + positions           then the layers of vision/vit.py
    p(label | sound) = softmax(W norm((norm(z)_class + norm(z)_distillation) / 2) + b)

Audio Spectrogram Transformer (Gong et al. 2021, arXiv 2104.01778). The picture, the spectrogram, is cut into
patches of 16 x 16 that overlap by 6 in both directions (section 2.1), so that what lies on the edge of one
patch is in the middle of another. There are two tokens before the patches, since the authors began with the
weights of DeiT, which has a class token and a distillation token. Here both are trained by the same loss.

The log-mel numbers are those of Kaldi's filter bank, as the authors use it. Frames of 25 ms begin every 10
ms; the first begins with the sound. The mean of a frame's samples is subtracted from each, and then from each
sample 0.97 of the one before it (pre-emphasis). The frame is weighted by a symmetric Hann window. The filters
are triangles, evenly spaced on the mel scale 1127 ln(1 + f / 700) from 20 Hz to half the sampling rate.
Samples lie between -1 and 1; Kaldi's own programs read whole numbers of 16 bits.

Two customs of the authors are kept, since trained models rely on them. The numbers are normalised by *twice*
their standard deviation. And where a sound is shorter than the picture, the rest of the picture is 0 before
it is normalised; 0 is louder than silence.

    python -m vision.spectrogram                                    print the sizes
    python -m vision.spectrogram runs/spectrogram/model dog.wav     classify sounds
    python train.py --model spectrogram                             train one to name instruments

Shapes: B batch, S samples, M mel filters, N patches, D model width.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from data.sounds import decode
from formats import command, sounds
from formats.config_values import check_values
from vision import vit

TASK, KIND = "classify_sounds", "sound encoder"
RATE = 16_000  # samples a second, of all models
FRAME, HOP = 400, 160  # samples of a frame, and from the start of one to that of the next
FFT = 512  # samples that are transformed: those of a frame, and zeros
PREEMPHASIS = 0.97
LOWEST = 20.0  # Hz, where the first filter begins
FLOOR = 2.0**-23  # the least power, so that its logarithm is finite: float32's epsilon, as in Kaldi


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    n_frames: int = 1024  # one every 10 ms; longer sounds are cut
    n_mels: int = 128  # M
    patch_size: int = 16  # of frames, and of mel filters
    frame_stride: int = 10  # from one patch to the next
    mel_stride: int = 10
    n_classes: int = 527
    mlp: str = "gelu"  # or "gelu_tanh", its approximation
    qkv_bias: bool = True
    norm_eps: float = 1e-12
    mean: float = -4.2677393  # of the log-mel numbers of AudioSet, from the authors' code
    std: float = 4.5689974  # their standard deviation
    labels: tuple[str, ...] = ()  # the names of the classes, if they are known
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py

    def __post_init__(self):
        if not (isinstance(self.mean, float) and math.isfinite(self.mean)):
            raise ValueError(f"mean {self.mean!r}: expected a number")
        check_values(self, mlp=("gelu", "gelu_tanh"), mean=(self.mean,))
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.patch_size > min(self.n_frames, self.n_mels):
            sides = f"n_frames {self.n_frames} and n_mels {self.n_mels}"
            raise ValueError(f"patch_size {self.patch_size}: larger than {sides}; expected at most these")

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of patches along the mel filters and along the frames."""
        mels = (self.n_mels - self.patch_size) // self.mel_stride + 1
        return mels, (self.n_frames - self.patch_size) // self.frame_stride + 1

    @property
    def n_patches(self) -> int:
        """Return N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def n_samples(self) -> int:
        """Return how many samples the model reads at most."""
        return FRAME + HOP * (self.n_frames - 1)

    @property
    def seconds(self) -> float:
        """Return how much sound the model reads at most."""
        return self.n_samples / RATE

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one sound."""
        return 1


BASE = (12, 12, 768, 3072)
SIZES = {
    "tiny": Config(3, 4, 96, 192, n_frames=98, n_mels=64, n_classes=6),
    "audioset": Config(*BASE),  # the three of section 3
    "speech-commands": Config(*BASE, n_frames=128, n_classes=35),
    "esc-50": Config(*BASE, n_frames=512, n_classes=50),
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for sounds of these classes."""
    return replace(config, n_classes=len(dataset.labels), labels=dataset.labels)


def mel(frequency: Tensor) -> Tensor:
    """Return frequencies in Hz as mels, by Kaldi's formula."""
    return 1127 * (1 + frequency / 700).log()


@cache
def mel_filters(n_mels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weight of each of the FFT's frequencies in each filter, (FFT / 2 + 1, M): triangles with
    straight sides on the mel scale. If there are many filters, the lowest may be so narrow that no frequency
    lies in them; their log-mel numbers are always the logarithm of FLOOR."""
    low, high = mel(torch.tensor([LOWEST, RATE / 2], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, n_mels + 2, dtype=torch.float64)
    mels = mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * RATE / FFT)[:, None]
    widths = edges.diff()
    up, down = (mels - edges[:-2]) / widths[:-1], (edges[2:] - mels) / widths[1:]
    return torch.minimum(up, down).clamp(min=0).to(device, dtype)


def filter_bank(waves: Tensor, n_mels: int) -> Tensor:
    """Return the log-mel numbers (B, 1 + (S - 400) // 160, M) of sounds (B, S) with samples between -1 and 1.
    A sound has at least one frame, 400 samples."""
    frames = waves.unfold(-1, FRAME, HOP)  # (B, frames, FRAME)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    window = torch.hann_window(FRAME, periodic=False, dtype=waves.dtype, device=waves.device)
    spectrum = torch.fft.rfft((frames - PREEMPHASIS * before) * window, FFT)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, frames, FFT / 2 + 1)
    return (power @ mel_filters(n_mels, waves.dtype, waves.device)).clamp(min=FLOOR).log()


def n_frames_of(lengths: Tensor) -> Tensor:
    """Return how many whole frames there are in sounds of `lengths` samples, int64 of any shape."""
    return torch.div(lengths - FRAME, HOP, rounding_mode="floor").clamp(min=-1) + 1


def spectrograms(waves: Tensor, lengths: Tensor, config: Config) -> Tensor:
    """Return the log-mel numbers (B, config.n_frames, M), not normalised, of sounds (B, S).

    lengths (B,): how many samples of each row belong to the sound; the others are padding. Frames that reach
    beyond the end of the sound are 0.
    """
    x = filter_bank(waves[:, : config.n_samples], config.n_mels)
    x = F.pad(x, (0, 0, 0, config.n_frames - x.shape[1]))
    inside = torch.arange(config.n_frames, device=x.device) < n_frames_of(lengths)[:, None]
    return torch.where(inside[:, :, None], x, 0.0)


class Embeddings(nn.Module):
    """The class token, the distillation token and the patches, with their positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D = config, config.d_model
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.distillation_token = nn.Parameter(torch.empty(1, 1, D))
        self.position_embeddings = nn.Parameter(torch.empty(1, 2 + config.n_patches, D))
        strides = (config.mel_stride, config.frame_stride)
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(1, D, config.patch_size, strides)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (B, 2 + N, D) of the two tokens and of the patches of normalized spectrograms
        (B, frames, M). Patches of the same frequencies are together, those of the lowest first."""
        picture = x.transpose(1, 2)[:, None]  # (B, 1, M, frames)
        patches = self.patch_embeddings.projection(picture).flatten(2).transpose(1, 2)  # (B, N, D)
        first = torch.cat((self.cls_token, self.distillation_token), dim=1).expand(len(x), -1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embeddings


class AST(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        layers = nn.ModuleList(vit.Block(config) for _ in range(config.n_layers))
        parts = {"embeddings": Embeddings(config), "encoder": nn.ModuleDict({"layer": layers})}
        parts["layernorm"] = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ast = nn.ModuleDict(parts)
        self.head_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.classifier = nn.Linear(config.d_model, config.n_classes)
        vit.initialize(self)

    def normalized(self, x: Tensor) -> Tensor:
        """Return log-mel numbers of any shape as the model reads them: minus the config's mean, and divided
        by twice its std."""
        return (x - self.config.mean) / (2 * self.config.std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of normalized spectrograms (B, frames, M)."""
        z = vit.run_layers(
            self.ast.encoder.layer, self.ast.embeddings(x), 2
        )  # (B, 2, D), without the patches
        return self.classifier(self.head_norm(self.ast.layernorm(z).mean(dim=1)))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross-entropy in nats of "spectrograms" (B, frames, M), not normalised, and
        "targets" (B,), their labels; and the accuracy."""
        logits = self(self.normalized(batch["spectrograms"])).float()
        accuracy = (logits.argmax(-1) == batch["targets"]).float().mean()
        return F.cross_entropy(logits, batch["targets"]), {"accuracy": accuracy}

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products, forward and backward, for one second of sound, the unit that a
        run counts. seq_len is not used."""
        return round(6 * n_macs(self.config, n_read=2) / self.config.seconds)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "AST":
        """Return the ASTForAudioClassification in a directory, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return sounds.load(cls, Config, directory, kernels, RATE)

    def save_pretrained(self, directory: str | Path, labels: tuple[str, ...] | None = None) -> None:
        """Write an ASTForAudioClassification. labels: the names of the classes, by default the config's."""
        sounds.save(self, directory, self.config.labels if labels is None else labels, RATE)


Model = AST


def n_macs(config: Config, n_read: int | None = None) -> int:
    """Return the multiplications of one forward pass, without those of the filter bank: those of
    `vit.layer_macs` for 2 + N tokens, N D P^2 of the patches of size P, and D for each class."""
    D, N = config.d_model, config.n_patches
    patches = N * D * config.patch_size**2
    return vit.layer_macs(config, 2 + N, n_read) + patches + D * config.n_classes


def print_sizes() -> None:
    """Print the parameters of each size, and the FLOPs of one sound, forward and in training."""
    print(f"{'size':16} {'parameters':>11} {'seconds':>7} {'mels':>5} {'tokens':>6}  forward  training")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = AST(config)
        n_params = sum(p.numel() for p in model.parameters())
        sizes = f"{config.seconds:7.2f} {config.n_mels:5} {2 + config.n_patches:6}"
        flops = 2 * n_macs(config)
        print(f"{name:16} {n_params:11,} {sizes}  {flops:.2e} {3 * flops:.2e} FLOPs")


def main() -> None:
    parser = command.Parser(description="Classify sounds, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("sounds", nargs="*", type=command.path, help="files of sounds")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes()
        return
    if not args.sounds:
        raise ValueError(f"{args.checkpoint}: no sounds to classify; add their files after it")
    model = AST.from_pretrained(args.checkpoint).eval().float()
    config = model.config
    for path in args.sounds:
        counts = Counter()
        wave = torch.from_numpy(decode(path, config.n_samples, RATE, counts))[None] / 32768
        with torch.no_grad():
            x = spectrograms(wave, torch.tensor([wave.shape[1]]), config)
            logits = model(model.normalized(x))[0]
        print(f"{path}: {vit.likeliest(logits, config)}{''.join(f'; {note}' for note in counts)}")


if __name__ == "__main__":
    command.run(main)
