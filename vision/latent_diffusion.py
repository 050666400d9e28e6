"""Latent diffusion: a text encoder, a denoiser of latents that reads its states, and an autoencoder.

    z_0 = scale encoder(image)                 frozen, vision/autoencoder_kl.py
    z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps    noise on latents, vision/noise.py
    loss = mean of (unet(z_t, t, states of the text) - target)^2      target: v, eps or z_0
    image = decoder(z_0 / scale)

High-resolution image synthesis with latent diffusion models (Rombach et al. 2021, arXiv 2112.10752). Latents
are many times fewer numbers than pixels and leave out details that the eye hardly sees, so a denoiser of
latents costs a fraction of one of pixels. The parts are those of Stable Diffusion: the KL autoencoder, and
the U-Net of vision/unet.py, whose places attend to the states of CLIP's text tower (vision/clip_towers.py).
`scale` is 1 over the standard deviation of the training set's latents (appendix G), so that they have
variance 1, as the noise has.

The text tower is trained together with the U-Net, as in section 4.3.1 of the paper. With `--set
text_tower=DIR` it is that of a trained CLIP, and frozen, as in Stable Diffusion. A tenth of the training
texts is replaced by the empty text, so that the model also predicts without a text, as guidance needs.

The task that trains the model, and its data, are in vision/text_to_image.py.

    python -m vision.latent_diffusion                                print the sizes
    python train.py --model latent_diffusion                         letters from their names
    python -m vision.latent_diffusion runs/latent_diffusion/model --prompt "bold serif latin small letter g"

Shapes: B images, C channels, H x W pixels, Z channels of latents, h x w places, T tokens of a text.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data import captions
from data.rows import Dataset
from data.tokenizer import get_tokenizer
from formats import command, pipelines, schedules
from vision import autoencoder_kl, drawing, noise, unet
from vision.autoencoder_kl import AutoencoderKL
from vision.clip_towers import TextConfig, TextTower
from vision.unet import UNet

KIND, TASK = "latent diffusion", "text_to_image"
SAMPLER_STEPS = 25  # of DDIM
CHUNK = 64  # images that are encoded or decoded at once


@dataclass(frozen=True)
class Config(noise.Process):
    vae: autoencoder_kl.Config
    unet: unet.Config
    text: TextConfig
    target: str = "v"  # or "x0", or "eps", of the latents
    schedule: str = "cosine"  # or "linear", or "scaled_linear", see vision/noise.py
    n_steps: int = 1000  # time steps
    zero_terminal: bool = False  # whether the last z_t is pure noise
    drop: float = 0.1  # share of training texts that are replaced by the empty text
    autoencoder: str = ""  # directory of the autoencoder that a new model gets
    text_tower: str = ""  # directory of the CLIP whose text tower a new model gets; "": a new tower
    MAY_BE_ZERO = ("drop",)

    def __post_init__(self):
        super().__post_init__()
        if self.unet.d_text != self.text.d_model or self.unet.n_channels != self.vae.n_latent:
            read = f"{self.unet.d_text} wide states and {self.unet.n_channels} channels"
            given = f"texts have {self.text.d_model} wide ones, and latents {self.vae.n_latent} channels"
            raise ValueError(f"the U-Net reads {read}, but {given}")

    @property
    def size(self) -> tuple[int, ...]:
        """Return the height and width of an image in pixels."""
        return self.vae.size

    @property
    def n_channels(self) -> int:
        """Return C."""
        return self.vae.n_channels

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens of the text tower's vocabulary."""
        return self.text.vocab_size

    @property
    def max_seq_len(self) -> int:
        """Return T, the number of tokens of a text, with padding."""
        return self.text.max_seq_len


TEXT = TextConfig(2, 4, 96, 384)
L14_TEXT = TextConfig(12, 12, 768, 3072)  # of CLIP's l-14
SIZES = {
    "tiny": Config(
        autoencoder_kl.SIZES["tiny"],
        unet.Config(
            (48, 96), (1, 1), 1, 4, 4, 8, d_text=96, n_heads=4, n_groups=8, norm_eps=1e-5, cos_first=True,
            freq_shift=0, padding=1,
        ),
        TEXT,
    ),
    "stable-diffusion-1": Config(
        autoencoder_kl.SIZES["sd-f8"], unet.SIZES["stable-diffusion-1"], L14_TEXT, "eps", "scaled_linear"
    ),
}  # fmt: skip


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for the autoencoder and the vocabulary of a `text_to_image.LatentDataset`.

    Texts have seq_len tokens, or with a trained text tower as many as it reads.
    """
    vae, tokenizer, text = dataset.vae, dataset.tokenizer, config.text
    if config.text_tower:
        text = TextTower.from_pretrained(config.text_tower).config
    else:
        text = replace(text, vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eot_id, max_seq_len=seq_len)
    Z, side, _ = vae.latent_shape
    net = replace(config.unet, n_channels=Z, n_out=Z, image_size=side, d_text=text.d_model)
    return replace(config, vae=vae, unet=net, text=text, autoencoder=dataset.autoencoder)


class LatentDiffusion(nn.Module):
    """The autoencoder, the U-Net and the text encoder, under the names of diffusers'
    StableDiffusionPipeline."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vae, self.unet = AutoencoderKL(config.vae), UNet(config.unet)
        self.text_encoder = TextTower(config.text)
        if config.autoencoder:
            self.vae.load_state_dict(AutoencoderKL.from_pretrained(config.autoencoder).state_dict())
        if config.text_tower:
            own = TextTower.from_pretrained(config.text_tower)
            self.text_encoder.load_state_dict(own.state_dict())
        self.alpha_bar = config.alpha_bar

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the target, and no metrics.

        batch: "latents" (B, Z, h, w), not yet scaled, "noise" (B, Z, h, w) and times "t" (B,) of the noise,
        and the texts as "tokens" (B, T).
        """
        vae, t, eps = self.config.vae, batch["t"], batch["noise"]
        z = (batch["latents"] - vae.shift_factor) * vae.scaling_factor
        noisy = noise.q_sample(z, t, eps, self.alpha_bar)
        found = self.unet(noisy, t, text=self.text_encoder.states(batch["tokens"])).float()
        return (found - noise.target(self.config.target, z, eps, t, self.alpha_bar)).square().mean(), {}

    @torch.no_grad()
    def draw(
        self,
        tokens: Tensor,
        empty: Tensor,
        *,
        guidance: float = 1.0,
        steps: int = SAMPLER_STEPS,
        eta: float = 0.0,
        seed: int = 0,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return an image (B, C, H, W), with pixels in [0, 1], for each text of tokens (B, T).

        empty: tokens (1, T) of the empty text, which guidance other than 1 needs. guidance: w of
        `noise.guide`. steps: of the sampler. eta: 0 for DDIM, 1 for DDPM. x: the first noise (B, Z, h, w); if
        it is None, it is drawn on the CPU with this seed.
        """
        B, device, config = len(tokens), self.device, self.config
        if x is None:
            x = torch.randn(B, *config.vae.latent_shape, generator=torch.Generator().manual_seed(seed))
        states = self.text_encoder.states(tokens.to(device))
        without = states if guidance == 1 else self.text_encoder.states(empty.to(device)).expand_as(states)
        predict = lambda x, t, text: self.unet(x, t, text=text)  # noqa: E731
        denoise = noise.guided_at_once(predict, states, without, guidance)
        z = config.draw(denoise, x.to(device), steps, eta, seed + 1)
        images = torch.cat([self.vae.from_latents(some) for some in z.split(CHUNK)])
        return (images / 2 + 0.5).clamp(0, 1)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.unet.conv_in.weight.device

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of training the U-Net and the text tower on one image with a text of seq_len
        tokens. Its latents are computed before training."""
        of_text = text_macs(self.config.text, seq_len)
        return 6 * (unet.n_macs(self.unet, seq_len) + of_text)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "LatentDiffusion":
        """Return the model in a directory with diffusers' StableDiffusionPipeline, in the dtype of its
        weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        directory = Path(directory)
        pipelines.check(directory)
        kinds = {"vae": AutoencoderKL, "unet": UNet, "text_encoder": TextTower}
        parts = {
            name: kind.from_pretrained(directory / name, kernels=kernels) for name, kind in kinds.items()
        }
        # Build the model without storage, on the meta device, then put in the parts and a real schedule.
        configs = (parts[name].config for name in kinds)
        with torch.device("meta"):
            model = cls(Config(*configs, **schedules.read(directory / pipelines.SCHEDULER)))
        for name, part in parts.items():
            setattr(model, name, part)
        model.alpha_bar = model.config.alpha_bar
        return model

    def save_pretrained(self, directory: str | Path, has_tokenizer: bool = True) -> None:
        """Write diffusers' StableDiffusionPipeline into a directory, without its tokenizer, which belongs to
        the data. has_tokenizer: whether the caller writes a tokenizer into the same directory."""
        directory = Path(directory)
        for name in pipelines.PARTS:
            getattr(self, name).save_pretrained(directory / name)
        process = self.config.process
        (directory / pipelines.SCHEDULER).mkdir(parents=True, exist_ok=True)
        schedules.write(directory / pipelines.SCHEDULER, **process, pipeline=False, clip=False)
        pipelines.write_index(directory, has_tokenizer)


Model = LatentDiffusion


def text_macs(config: TextConfig, seq_len: int) -> int:
    """Return the multiplications of a text tower for the states of a text: L (T (4 D^2 + 2 D F) + 2 T^2 D),
    with L layers of width D, F hidden units and T = seq_len."""
    T, D = seq_len, config.d_model
    return config.n_layers * (T * (4 * D * D + 2 * D * config.d_ff) + 2 * T * T * D)


def print_sizes() -> None:
    """Print the parameters of each size and of its parts."""
    print(f"{'size':20} {'parameters':>13} {'autoencoder':>11} {'U-Net':>11} {'text tower':>11}  latents")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = LatentDiffusion(config)
        parts = (model, model.vae, model.unet, model.text_encoder)
        n, vae, net, text = (sum(p.numel() for p in part.parameters()) for part in parts)
        shape = " x ".join(map(str, config.vae.latent_shape))
        print(f"{name:20} {n:13,} {vae:11,} {net:11,} {text:11,}  {shape}")


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Draw images by their descriptions, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("--prompt", nargs="+", default=[], help="the text of each row of images")
    drawing.add_sampling(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        print_sizes()
        return
    drawing.check_sampling(args)
    if not args.prompt:
        raise ValueError(f"{args.checkpoint}: expected --prompt TEXT")
    tokenizer = get_tokenizer(str(Path(args.checkpoint) / pipelines.TOKENIZER))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LatentDiffusion.from_pretrained(args.checkpoint).float().to(device).eval()
    T = model.config.max_seq_len
    tokens, empty = (
        torch.from_numpy(captions.encode(texts, tokenizer, T, T)[0]).long() for texts in (args.prompt, [""])
    )
    how = {"guidance": args.guidance, "steps": args.steps, "eta": args.eta, "seed": args.seed}
    images = model.draw(tokens.repeat_interleave(args.n, 0), empty, **how).cpu()
    drawing.save_rows(images, args)


if __name__ == "__main__":
    command.run(main)
