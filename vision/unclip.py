"""The decoder of DALL-E 2: an image drawn by diffusion from a CLIP embedding.

    p(image | text) = p(image | z, text) p(z | text)       z: CLIP's embedding of the image
    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                the image x_0 with noise eps, vision/noise.py
    loss = mean of (unet(x_t, t, z) - target)^2            target: x_0, v or eps

Hierarchical text-conditional image generation with CLIP latents (Ramesh et al. 2022, arXiv 2204.06125,
section 2.1). The first equation holds since z is a function of the image. The prior of vision/prior.py draws
an embedding z for a text, and the decoder here draws an image for z alone, as if z held all that the text
says of the image. This inverts CLIP's image tower, hence "unCLIP". From other noise the decoder draws another
image for the same z. So it can also draw variations of an image, which share what CLIP's embedding holds.

The network is the U-Net of vision/unet.py. It reads z twice, as in the paper:

    embedding of t + W_1 z                 one vector, which every residual block reads
    W_2 z as 4 tokens of context           every place of the image attends to them (cross-attention)

For a tenth of the training images z is replaced by a learned null row, so that the network also learns to
predict without z, and guidance can exaggerate what z changes. CLIP's embeddings have length 1; they are
multiplied by sqrt(E), so that their entries are about 1. The task that trains the decoder, and its measure,
are in vision/embedding_to_image.py.

Two parts of the paper are left out: its decoder also reads the text, except for half of the training images;
and two further networks enlarge its images of 64 x 64 pixels. In the default run here CLIP reads 32 x 32
pixels, and the decoder draws 16 x 16.

    python train.py --model unclip                                        letters from their embeddings
    python -m vision.unclip runs/unclip/model --prior runs/prior/model --clip DIR --prompt "bold letter g"
    python -m vision.unclip runs/unclip/model --clip DIR --image g.png    variations of an image

Shapes: B images, C channels, H x W pixels, E width of embeddings, N tokens of context, D width of the
embedding of a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.images import decode_all
from data.rows import Dataset
from engine import pictures
from formats import command, schedules
from formats import unclip as formats_unclip
from formats.safetensors_dir import assign
from vision import drawing, image_embeddings, noise, unet
from vision.clip import CLIP
from vision.unet import UNet

KIND, TASK = "decoder of image embeddings", "embedding_to_image"
SAMPLER_STEPS = 25  # of DDIM


@dataclass(frozen=True)
class Config(noise.Process):
    unet: unet.Config
    d_embed: int = 768  # E
    n_context: int = 4  # N
    target: str = "x0"  # or "v", or "eps"
    schedule: str = "cosine"  # or "linear", or "scaled_linear", see vision/noise.py
    n_steps: int = 1000  # time steps of the schedule
    zero_terminal: bool = False  # whether the last x_t is pure noise
    drop: float = 0.1  # share of the training images that are shown without z
    warp: float = 0.5  # of the training images, see data/augment.py
    clip: str = ""  # directory of the CLIP
    MAY_BE_ZERO = ("drop", "warp")

    def __post_init__(self):
        super().__post_init__()
        if not (self.unet.class_vectors and self.unet.d_text):
            raise ValueError(
                "a U-Net that reads no vectors and no context: expected class_vectors and d_text"
            )

    @property
    def max_seq_len(self) -> int:
        """Return 1: a row of the data is one image."""
        return 1


SIZES = {
    "tiny": Config(
        unet.Config(
            (16, 32, 64), (0, 0, 1), 1, 1, 1, 16, class_vectors=True, d_text=64, n_heads=4, n_groups=8,
            norm_eps=1e-5, cos_first=True, freq_shift=0, padding=1,
        ),
        96,
    ),
}  # fmt: skip


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for the channels and the CLIP of a data set, an `embedding_to_image.ImageDataset`.
    seq_len is not used."""
    C = dataset.train[0]["image"].shape[0]
    net = replace(config.unet, n_channels=C, n_out=C)
    return replace(config, unet=net, d_embed=dataset.d_embed, clip=dataset.clip)


# --- the model


class Projection(nn.Module):
    """The maps W_1 and W_2 from an embedding to what the U-Net reads. Parameters have the names of diffusers'
    UnCLIPTextProjModel, of which this is the part that reads the image's embedding."""

    def __init__(self, d_embed: int, d_time: int, d_text: int, n_context: int):
        super().__init__()
        self.n_context = n_context
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(d_embed))  # the null row
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(d_embed, d_time)
        self.clip_extra_context_tokens_proj = nn.Linear(d_embed, n_context * d_text)
        for name, p in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(p, std=1 / math.sqrt(d_embed))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector (B, D) and the tokens of context (B, N, d_text) for z (B, E)."""
        vector = self.clip_image_embeddings_project_to_time_embeddings(z)
        tokens = self.clip_extra_context_tokens_proj(z).unflatten(1, (-1, self.n_context))  # (B, d_text, N)
        return vector, tokens.transpose(1, 2)


class UnCLIP(nn.Module):
    """The decoder: a U-Net, and the projection of the embeddings that it reads."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, net = config, config.unet
        self.decoder = UNet(net)
        self.text_proj = Projection(config.d_embed, net.d_time, net.d_text, config.n_context)

    @property
    def null(self) -> Tensor:
        """Return the learned row (E,) that takes the place of z where there is none."""
        return self.text_proj.learned_classifier_free_guidance_embeddings

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Return the prediction (B, C, H, W) for noisy images x (B, C, H, W) at times t (B,) with z (B, E),
        embeddings times sqrt(E) or null rows."""
        vector, tokens = self.text_proj(z)
        return self.decoder(x, t, vector, tokens)

    @torch.no_grad()
    def draw(
        self,
        embeddings: Tensor,
        *,
        guidance: float = 1.0,
        steps: int = SAMPLER_STEPS,
        eta: float = 0.0,
        seed: int = 0,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return an image (B, C, H, W), with pixels in [0, 1], for each of embeddings (B, E) of length 1.

        guidance: w of `noise.guide`; 1: none. steps: of the sampler. eta: 0 for DDIM, 1 for DDPM. seed: of
        all noise. x: the noise (B, C, H, W) to begin with; if it is None, it is drawn on the CPU. Raises
        ValueError for more steps than the schedule has.
        """
        B, device, net = len(embeddings), self.null.device, self.config.unet
        if x is None:
            x = torch.randn(B, net.n_channels, *net.size, generator=torch.Generator().manual_seed(seed))
        z = (embeddings * math.sqrt(self.config.d_embed)).to(device)
        denoise = noise.guided_at_once(self, z, self.null.expand_as(z), guidance)
        return (self.config.draw(denoise, x.to(device), steps, eta, seed + 1, clip=1.0) + 1) / 2

    def flops_per_token(self, seq_len: int = 1) -> int:
        """Return the FLOPs of matrix products and convolutions, forward and backward, for one image, without
        those of CLIP. seq_len is not used."""
        layers = [p.numel() for p in self.text_proj.parameters() if p.ndim == 2]
        return 6 * (unet.n_macs(self.decoder, self.config.n_context) + sum(layers))

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "UnCLIP":
        """Return the decoder in a directory, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        directory = Path(directory)
        decoder = UNet.from_pretrained(directory / formats_unclip.DECODER, kernels=kernels)
        fields, weights = formats_unclip.read(directory)
        process = schedules.read(directory / formats_unclip.SCHEDULER)
        with torch.device("meta"):
            model = cls(Config(decoder.config, **fields, **process))
        assign(model.text_proj, weights, directory / formats_unclip.PROJECTION)
        model.decoder = decoder
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the decoder into a directory, in folders that classes of diffusers open, see
        formats/unclip.py."""
        directory, config = Path(directory), self.config
        self.decoder.save_pretrained(directory / formats_unclip.DECODER)
        (directory / formats_unclip.SCHEDULER).mkdir(parents=True, exist_ok=True)
        schedules.write(directory / formats_unclip.SCHEDULER, **config.process, pipeline=False)
        sizes = {"n_context": config.n_context, "d_embed": config.d_embed}
        formats_unclip.write(directory, self.text_proj, sizes, config.unet.d_time, config.unet.d_text)


Model = UnCLIP


def reduced(images: Tensor, size: Sequence[int]) -> Tensor:
    """Return images (B, C, height, width) at a smaller size (rows, columns) of pixels, each of which is the
    mean over its area."""
    return F.adaptive_avg_pool2d(images, tuple(size))


def print_sizes() -> None:
    """Print the parameters of each size and of its parts."""
    print(f"{'size':8} {'parameters':>10} {'U-Net':>8} {'projection':>10}  image  FLOPs of a prediction")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = UnCLIP(config)
        n, net, rest = (
            sum(p.numel() for p in part.parameters()) for part in (model, model.decoder, model.text_proj)
        )
        flops = model.flops_per_token() / 3
        print(f"{name:8} {n:10,} {net:8,} {rest:10,}  {config.unet.image_size:5}  {flops:.2e}")


def read_image(path: Path, clip: CLIP) -> Tensor:
    """Return the image in a file, (1, C, height, width), at CLIP's size and with pixels in [0, 1]. Raises
    ValueError for a file that is damaged or no image."""
    shape = (clip.config.n_channels, *clip.config.size)
    return torch.from_numpy(decode_all([path], shape)).float() / 255


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Draw images of texts, and variations of images, or print the sizes.")
    add = parser.add_argument
    add(
        "checkpoint", nargs="?", type=command.filled, help="directory of a decoder (default: print the sizes)"
    )
    add("--clip", type=command.filled, metavar="DIR", help="the CLIP that the decoder was trained with")
    add(
        "--image",
        nargs="+",
        type=command.path,
        default=[],
        help="files of images; a row of variations of each",
    )
    add("--prompt", nargs="+", default=[], help="texts; a row of images for each; needs --prior")
    add("--prior", type=command.filled, metavar="DIR", help="a prior that was trained with the same CLIP")
    add("--prior-guidance", type=float, default=1.0, help="w of the prior; 1: none (default %(default)s)")
    drawing.add_sampling(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        print_sizes()
        return
    if args.clip is None or bool(args.prompt) != bool(args.prior) or not (args.prompt or args.image):
        what = "--prompt TEXT with --prior DIR, or --image FILE, or both"
        raise ValueError(f"{args.checkpoint}: expected --clip DIR, the CLIP of its training, and {what}")
    drawing.check_sampling(args)

    # Of each image one embedding for its row of variations; for each text as many as images are drawn.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UnCLIP.from_pretrained(args.checkpoint).float().to(device).eval()
    clip = image_embeddings.open_clip(args.clip, d_embed=model.config.d_embed)
    originals, embeddings = [], []
    for path in args.image:
        seen = read_image(path, clip)
        originals.append([reduced(seen, model.config.unet.size)[0]])
        embeddings.append(clip.encode_images(clip.normalized(seen)).detach().expand(args.n, -1))
    if args.prompt:
        prior = image_embeddings.open_prior(args.prior, args.clip)
        texts = [text for text in args.prompt for _ in range(args.n)]
        embeddings.append(image_embeddings.of_texts(prior, texts, w=args.prior_guidance, seed=args.seed))

    how = {"guidance": args.guidance, "steps": args.steps, "eta": args.eta, "seed": args.seed}
    images = model.draw(torch.cat(embeddings), **how).cpu()
    # A row of variations begins with the original image.
    originals += [[]] * len(args.prompt)
    rows = [[*original, *row] for original, row in zip(originals, images.split(args.n), strict=True)]
    pictures.save(args.out.parent, rows, name=args.out.name)
    print(f"{args.out}: {len(images)} images of {args.steps} steps")


if __name__ == "__main__":
    command.run(main)
