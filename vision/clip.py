"""CLIP: images and their captions in one space, so that any words are a classifier.

    x_i = image vector, y_i = text vector, both of length 1       exp(s): the inverse temperature, learned
    softmax    loss = mean over i of [CE(logits exp(s) x_i . y_j over j, target i)
                                    + CE(logits exp(s) y_i . x_j over j, target i)] / 2               CLIP
    sigmoid    loss = -mean over i of sum over j of log sigmoid(z_ij (exp(s) x_i . y_j + b))        SigLIP
               z_ij: 1 where i = j, else -1

Contrastive learning of images and words (Radford et al. 2021, arXiv 2103.00020). Each image of a batch has to
find its own caption among all captions of the batch, and each caption its image. So no images are labelled,
and the model can recognise whatever captions name: a class is a sentence, "a photo of a dog". SigLIP (Zhai et
al. 2023, arXiv 2303.15343) decides for each pair alone whether it belongs together, without a normalisation
over the batch. Two images with equal captions still count as pairs that do not belong together. The two
Transformers, called towers, are in clip_towers.py. zero_shot.py names and looks up images by a trained model.

CLIP's exp(s) begins at 1 / 0.07 and is held to at most 100 after each step (section 2.5 of its paper), and to
at least 1, as in OpenCLIP. SigLIP's begins at 10, with b = -10, and has no limits. s and b have no weight
decay. With several ranks the pairs of all ranks are compared, and gradients reach the vectors of all.

    python -m vision.clip                                          print the sizes
    python train.py --model clip                                   letters and their names
    python train.py --model clip --data scenes --out runs/scenes   two drawn objects, and where they are
    python -m vision.clip runs/clip/model --images photos --query "a red bicycle"     search a folder
    python -m vision.clip runs/clip/model --images photos --labels cat dog            classify a folder

Shapes: B images or texts of this rank, M of all ranks, C channels, T tokens, D image width, E joint width.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import captions
from data.augment import Augmentation, augment
from data.rows import Dataset, Row, stack
from data.tokenizer import get_tokenizer
from engine import parallel, pictures
from formats import clip as formats_clip
from formats import command
from formats.config_values import check_values
from vision import tower_flops, zero_shot
from vision.clip_towers import LAYOUTS, MLPS, TextConfig, TextTower, VisionConfig, VisionTower

KIND = "encoder of images and texts"


@dataclass(frozen=True)
class Config:
    """Fields named `text_...` belong to the text tower; the others to the image tower or to both."""

    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    text_layers: int
    text_heads: int
    text_width: int
    text_ff: int
    d_joint: int = 512  # E; with layout siglip it is d_model
    image_size: int = 224  # pixels, both ways
    patch_size: int = 32  # pixels, both ways
    n_channels: int = 3
    vocab_size: int = 49408
    max_seq_len: int = 77  # tokens
    eos_token_id: int = 49407  # the token that ends a text
    read_largest: bool = False  # see clip_towers.TextConfig
    layout: str = "clip"  # or "siglip", see clip_towers.py
    objective: str = "softmax"  # or "sigmoid", see the header
    mlp: str = "quick_gelu"  # or "gelu", or "gelu_tanh"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = VisionConfig.mean  # subtracted from pixels in [0, 1]
    std: tuple[float, ...] = VisionConfig.std
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("eos_token_id",)

    def __post_init__(self):
        check_values(self, layout=LAYOUTS, objective=("softmax", "sigmoid"), mlp=MLPS)
        if self.layout == "siglip" and self.d_joint != self.d_model:
            raise ValueError(f"d_joint {self.d_joint}: expected d_model {self.d_model} with layout siglip")
        if self.eos_token_id >= self.vocab_size and not (self.read_largest or self.layout == "siglip"):
            raise ValueError(f"eos_token_id {self.eos_token_id}: expected less than {self.vocab_size}")
        _ = self.vision, self.text  # to make both checks their values

    @property
    def shared(self) -> dict:
        """Return the fields whose values both towers have in common."""
        return {name: getattr(self, name) for name in ("layout", "mlp", "norm_eps", "kernels")}

    @property
    def vision(self) -> VisionConfig:
        """Return the image tower's config."""
        sizes = (self.n_layers, self.n_heads, self.d_model, self.d_ff)
        names = ("image_size", "patch_size", "n_channels", "mean", "std")
        return VisionConfig(*sizes, **self.shared, **{n: getattr(self, n) for n in names})

    @property
    def text(self) -> TextConfig:
        """Return the text tower's config."""
        sizes = (self.text_layers, self.text_heads, self.text_width, self.text_ff)
        names = ("vocab_size", "max_seq_len", "eos_token_id", "read_largest")
        return TextConfig(*sizes, **self.shared, **{n: getattr(self, n) for n in names}, d_out=self.d_joint)

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return (self.image_size,) * 2


B_TEXT, L_TEXT, H_TEXT = (12, 8, 512, 2048), (12, 12, 768, 3072), (24, 16, 1024, 4096)
LAION = {"mlp": "gelu"}  # Cherti et al. 2022, arXiv 2212.07143
SIGLIP = {"layout": "siglip", "objective": "sigmoid", "mlp": "gelu_tanh", "norm_eps": 1e-6, "eos_token_id": 1}
SIGLIP |= {"vocab_size": 32000, "max_seq_len": 64, "mean": (0.5,), "std": (0.5,)}
TINY = {"image_size": 32, "patch_size": 8, "n_channels": 1, "mean": (0.5,), "std": (0.5,)}
SIZES = {
    "tiny": Config(3, 4, 96, 384, 2, 4, 96, 384, 96, **TINY),
    "b-32": Config(12, 12, 768, 3072, *B_TEXT),  # Radford et al. 2021, table 20
    "b-16": Config(12, 12, 768, 3072, *B_TEXT, patch_size=16),
    "l-14": Config(24, 16, 1024, 4096, *L_TEXT, 768, patch_size=14),
    "l-14-336": Config(24, 16, 1024, 4096, *L_TEXT, 768, image_size=336, patch_size=14),
    "h-14": Config(32, 16, 1280, 5120, *H_TEXT, 1024, patch_size=14, **LAION),
    "g-14": Config(40, 16, 1408, 6144, *H_TEXT, 1024, patch_size=14, **LAION),
    "big-g-14": Config(48, 16, 1664, 8192, 32, 20, 1280, 5120, 1280, patch_size=14, **LAION),
    "siglip-b-16": Config(12, 12, 768, 3072, 12, 12, 768, 3072, 768, patch_size=16, **SIGLIP),
}
SCALES = (0.0, math.log(100))  # the limits of CLIP's s
START = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10)}  # of s, by the objective


class CLIP(nn.Module):
    """Both towers, the maps into the common space, and the temperature."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_model, self.text_model = VisionTower(config.vision), TextTower(config.text)
        if config.layout == "clip":
            self.visual_projection = nn.Linear(config.d_model, config.d_joint, bias=False)
            self.text_projection = nn.Linear(config.text_width, config.d_joint, bias=False)
            for linear in (self.visual_projection, self.text_projection):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        # s and b are vectors of length 1: FSDP shards no scalars, and vectors have no weight decay.
        self.logit_scale = nn.Parameter(torch.full((1,), START[config.objective]))
        if config.objective == "sigmoid":
            self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, height, width) with pixels in [0, 1] as the model reads them."""
        return self.vision_model.normalized(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the image tower's vector (B, D) of each normalized image, before the map into the common
        space. (`VisionTower.features` returns a vector for each patch.)"""
        return self.vision_model(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the vectors x (B, E), of length 1, of normalized images (B, C, height, width)."""
        x = self.vision_model(images)
        x = self.visual_projection(x) if self.config.layout == "clip" else x
        return F.normalize(x.float(), dim=1)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Return the vectors y (B, E), of length 1, of texts, tokens (B, T)."""
        y = self.text_model(tokens)
        y = self.text_projection(y) if self.config.layout == "clip" else y
        return F.normalize(y.float(), dim=1)

    def logits(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logits (B, M) of x (B, E) and y (M, E): exp(s) x . y, and plus b for sigmoid."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16's 8 bits are too few for 100 x . y
            logits = self.logit_scale.float().exp() * (x @ y.T)
            return logits + self.logit_bias.float() if self.config.objective == "sigmoid" else logits

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (B, M) of normalized images (B, C, height, width) with tokens (M, T)."""
        return self.logits(self.encode_images(images), self.encode_texts(tokens))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the header's loss in nats of "images" (B, C, height, width), with pixels in [0, 1], and
        "tokens" (B, T), their captions. "places": see `compare`.

        Metrics: "found", how often the likeliest caption of an image is its own, and "scale", exp(s).
        """
        x, y = self.encode_images(self.normalized(batch["images"])), self.encode_texts(batch["tokens"])
        loss, found = self.compare(x, y, batch.get("places"))
        return loss, {"found": found, "scale": self.logit_scale.detach().float().exp().mean()}

    def compare(self, x: Tensor, y: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of x and y (B, E), and how often the likeliest y of a row of x is its own.

        places (B,): the index of each row in the batch of all ranks, with which it is compared; None: compare
        these rows alone.
        """
        all_x, all_y = x, y
        if places is None:
            places = torch.arange(len(x), device=x.device)
        else:
            all_x, all_y = parallel.gather_with_gradient(x), parallel.gather_with_gradient(y)
        logits = self.logits(x, all_y)  # (B, M)
        if self.config.objective == "sigmoid":
            signs = 2.0 * F.one_hot(places, len(all_y)) - 1
            loss = -F.logsigmoid(signs * logits).sum(dim=1).mean()
        else:
            text_logits = self.logits(y, all_x)
            loss = (F.cross_entropy(logits, places) + F.cross_entropy(text_logits, places)) / 2
        return loss, (logits.argmax(dim=1) == places).float().mean()

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of matrix products, forward and backward, for one image with a caption of seq_len
        tokens. Left out are the logits: 6 M E for M captions, and for softmax as many for M images."""
        config = self.config
        maps = config.d_joint * (config.d_model + config.text_width) * (config.layout == "clip")
        return 6 * (tower_flops.n_macs(config.vision) + tower_flops.n_macs(config.text, seq_len) + maps)

    @classmethod
    def from_pretrained(cls, directory, *, kernels: str = "auto") -> "CLIP":
        """Return the CLIPModel or SiglipModel in a directory, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return formats_clip.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory) -> None:
        """Write a CLIPModel or a SiglipModel, or our native layout for what neither of them has."""
        formats_clip.save(self, directory)


# --- what train.py looks up by name, see engine/contract.py: the model, and its task

Model = CLIP
DATA, OPTIMIZER, BATCH_SIZE, STEPS = "glyphs", "muon", 256, 600
LOSS, TOKEN_LOSS = "nats per pair", ""
SHOWN = 12  # images of the picture


@torch.no_grad()
def after_step(model: CLIP, finite: Tensor) -> None:
    """Clamp CLIP's s to between ln 1 and ln 100. The parameter is clamped, and not its value in the forward
    pass, where its gradient would be zero outside of these limits, so that it could not come back."""
    if model.config.objective == "softmax":
        parallel.local(model.logit_scale).clamp_(*SCALES)


@dataclass(frozen=True)
class Settings(Augmentation):
    """The augmentation of images to learn from."""

    warp: float = 0.5  # without it, the 1,172 glyphs of the default run are learned by heart


def settings(config: Config) -> Settings:
    """Return the settings of the augmentation."""
    return Settings()


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return images with captions, with a line about a random guess. args.seq_len is set to the length of the
    longest caption.

    Raises ValueError for what `data.captions.read` refuses, for a batch of one pair, which cannot be compared
    with others, and for --document-mask, which is about text.
    """
    if args.document_mask:
        raise ValueError("--document-mask: captions are rows of their own; leave it out")
    if args.batch_size < 2:
        raise ValueError(f"--batch-size {args.batch_size}: expected at least 2, since pairs are compared")
    with parallel.one_per_machine_first():
        options = {"channels": config.n_channels if args.init_from else None, "val": args.val}
        parts = captions.read(args.data, config.size, args.cache, bad=args.bad_text, **options)
    tokenizer = captions.choose_tokenizer(args.tokenizer, parts)
    # SigLIP reads the last place, so all rows have one length: a trained model's own, or else --seq-len.
    length = config.max_seq_len if args.init_from else args.seq_len
    length = length if config.layout == "siglip" else None
    dataset = captions.as_dataset(parts, tokenizer, args.seq_len, length)
    args.seq_len = dataset.train.tokens.shape[1]

    # The loss of equal logits. For sigmoid it depends on them, and is the least at a probability of 1 / n.
    n = args.batch_size
    loss = math.log(n) + (config.objective == "sigmoid") * (n - 1) * math.log(n / (n - 1))
    guess = f"a guess finds a caption among {n} in {1 / n:.2%}, with a loss of {loss:.3f}"
    return replace(dataset, guess=guess)


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for this data's channels and vocabulary, and with SigLIP's towers for texts padded to
    seq_len. If the number of channels changes, all get the average of the config's means, and of its stds."""
    C, tokenizer = dataset.train[0]["image"].shape[0], dataset.tokenizer
    changes = {"vocab_size": tokenizer.n_vocab, "eos_token_id": tokenizer.eot_id, "read_largest": False}
    if config.n_channels != C:
        changes |= {name: (sum(x) / len(x),) for name in ("mean", "std") for x in [getattr(config, name)]}
    if config.layout == "siglip":
        changes["max_seq_len"] = seq_len
    return replace(config, n_channels=C, **changes)


def make_batch(rows: list[Row], config: Settings, generator: torch.Generator, tokenizer) -> dict[str, Tensor]:
    """Return "images" (B, C, height, width), augmented, with pixels in [0, 1], and "tokens" (B, T)."""
    batch = stack(rows)
    pixels = augment(batch["image"].float() / 255, batch["augment"], config, generator)
    return {"images": pixels, "tokens": batch["tokens"]}


def split(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """Return the i-th of n equal parts of a batch, and "places" (B,): the indices of its rows in the batch,
    which `CLIP.compare` needs. The number of rows is a multiple of n, which engine/options.py checks."""
    places = torch.arange(len(batch["images"]))
    return {name: x.chunk(n)[i] for name, x in {**batch, "places": places}.items()}


def loss_bytes(*_) -> dict[str, int]:
    """Raise ValueError, since --dry-run can only plan the memory of models with one stack of layers."""
    raise ValueError("--dry-run: not yet planned for images with texts; --benchmark measures the memory")


@torch.no_grad()
def show(model: CLIP, dataset: Dataset, out: Path) -> str:
    """Draw the similarities of some held-out images with their captions. Return these captions, after the
    figures of `zero_shot.measure` for all held-out images."""
    val = dataset.val
    n = min(SHOWN, len(val))
    chosen = [i * len(val) // n for i in range(n)]
    images = np.stack([val.part.images[i] for i in chosen])
    texts = [val.part.captions[i][0] for i in chosen]
    x, y = zero_shot.encode_images(model, images), zero_shot.encode_texts(model, dataset.tokenizer, texts)
    similarity = (x @ y.T).cpu()  # (n, n)

    # A row of the picture holds an image and squares that show its similarity with each caption, from black
    # for the smallest of the row to white for the largest.
    low = similarity.amin(dim=1, keepdim=True)
    shades = (similarity - low) / (similarity.amax(dim=1, keepdim=True) - low).clamp(min=1e-6)
    square = torch.ones(1, *images.shape[2:])
    pixels = torch.from_numpy(images).float() / 255
    lines = [[pixels[i], *(square * shade for shade in shades[i])] for i in range(n)]
    numbers = [[str(i + 1), *(str(j + 1) for j in range(n))] for i in range(n)]
    pictures.save(out, lines, numbers)
    listed = "\n".join(f"{i + 1:3} {text}" for i, text in enumerate(texts))
    figures = zero_shot.in_words(zero_shot.measure(model, dataset.tokenizer, val))
    return f"{figures}\n\npicture.png: the similarity of images with these captions\n{listed}"


# --- the command


def print_sizes() -> None:
    """Print the parameters of each size, and the FLOPs of a forward pass over an image and over a text."""
    print(f"{'size':12} {'parameters':>13} {'image':>6} {'patch':>6} {'text':>6}  of image  of text")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = CLIP(config)
        n_params = sum(p.numel() for p in model.parameters())
        sizes = f"{config.image_size:6} {config.patch_size:6} {config.max_seq_len:6}"
        flops = (2 * tower_flops.n_macs(part) for part in (config.vision, config.text))
        print(f"{name:12} {n_params:13,} {sizes}  {' '.join(f'{n:.2e}' for n in flops)} FLOPs")


def main() -> None:
    parser = command.Parser(description="Search or classify a folder of images by words, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("--images", type=command.filled, metavar="FOLDER", help="images, also in folders inside this one")
    add("--query", type=command.filled, metavar="TEXT", help="print the images nearest to this text")
    add("--top", type=int, default=5, help="images to print for --query (default %(default)s)")
    add("--labels", nargs="+", default=[], help="classes of the images (default: the folders' names)")
    add(
        "--templates",
        nargs="+",
        default=["a photo of a {}."],
        help="prompts for labels, which {} stands for; their vectors are averaged (default: one)",
    )
    args = parser.parse_args()
    if args.checkpoint is None:
        if args.images or args.query or args.labels:
            raise ValueError("no model: expected its directory, such as runs/clip/model, before these flags")
        print_sizes()
        return
    if args.images is None or args.top < 1 or (args.query and args.labels):
        raise ValueError("expected --images FOLDER, with --query TEXT and --top of at least 1, or --labels")
    if odd := [template for template in args.templates if "{}" not in template]:
        raise ValueError(f"--templates {odd[0]!r}: expected {{}} in the place of the label")
    zero_shot.images_in(args.images)  # an empty folder is refused before the model is read
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CLIP.from_pretrained(args.checkpoint).float().to(device).eval()
    tokenizer = get_tokenizer(args.checkpoint)
    if args.query:
        for cosine, path in zero_shot.search(model, tokenizer, args.images, args.query, args.top):
            print(f"{cosine:.3f} {path}")
        return
    lines, figure = zero_shot.classify(model, tokenizer, args.images, args.labels, args.templates)
    print("\n".join(lines))
    if figure is not None:
        print(f"{figure.right:.1%} right (chance {figure.chance:.1%})")


if __name__ == "__main__":
    command.run(main)
