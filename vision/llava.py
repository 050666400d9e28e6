"""LLaVA: a language model that reads images. Features of image patches take the place of token embeddings.

    f_1 ... f_N = hidden states of an image's patches before the last block of a frozen image tower (CLIP's)
    h_i = W_2 gelu(W_1 f_i + b_1) + b_2                         the projector: h_i is as wide as an embedding
    x   = embeddings of the tokens t_1 ... t_T, with h_i in the place of the i-th image token
    p(t_{j+1} | t_1 ... t_j, image) = softmax of the logits of gpt.py's decoder at place j of x

Visual instruction tuning (Liu et al. 2023, arXiv 2304.08485). The projector of two layers is from LLaVA 1.5
(Liu et al. 2023, arXiv 2310.03744). The tower is that of vision/clip_towers.py and the language model that of
gpt.py, both unchanged. The class token of a CLIP tower is left out, unless `keep_class` is set.

A text has one "<image>" for each image. In a row of tokens this becomes N image tokens, equal numbers that
keep the places of h_1 ... h_N. A row holds one image or none.

vision/visual_instruct.py trains the model in two stages: first the projector alone, on captions, then the
projector and the language model, on conversations. The tower stays frozen.

    python -m vision.llava                                                  print the sizes
    python train.py --model llava                                           train one about drawn scenes
    python -m vision.llava runs/llava/model photo.png "What shape is the red object?"

Shapes: B rows, T tokens, N image tokens of an image, C channels, D width of the language model, V vocabulary.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generate
import gpt
from data.images import decode
from data.rows import Dataset
from data.tokenizer import get_tokenizer
from formats import command, llava
from formats.chat_template import IMAGE, ImageTokens, encode, end_id, prompt_tokens, with_images
from formats.clip import read_tower_config
from formats.config_json import damage_named
from formats.decoders import read_decoder_config
from gpt import GPT
from vision.clip_towers import VisionConfig, VisionTower
from vision.tower_flops import n_macs

TASK, KIND = "visual_instruct", "language model that reads images"


@dataclass(frozen=True)
class Config:
    vision: VisionConfig
    text: gpt.Config
    image_token: int = 32000  # the id of the image tokens
    feature_layer: int = -2  # of the tower's L + 1 hidden states: -2 is before its last block
    keep_class: bool = False  # keep a CLIP tower's class token, too ("full" in config.json)
    projector_bias: bool = True
    # The directories from which a new model copies weights; "": its weights are drawn at random.
    tower: str = ""  # of a CLIP or SigLIP, for the image tower
    language: str = ""  # of a decoder, for the language model

    def __post_init__(self):
        L, layer = self.vision.n_layers, self.feature_layer
        if not -L - 1 <= layer <= L:
            raise ValueError(f"feature_layer {layer}: expected {-L - 1} to {L}, as the tower has {L} layers")
        if not 0 <= self.image_token < self.text.vocab_size:
            given = f"image_token {self.image_token}"
            raise ValueError(f"{given}: expected an id of the vocabulary, below {self.text.vocab_size}")
        if self.vision.layout == "siglip" and not self.keep_class:
            raise ValueError("keep_class False: expected True, as a SigLIP tower has no class token to drop")

    @property
    def n_image_tokens(self) -> int:
        """Return N: the number of patches of an image, plus 1 if the class token is kept."""
        return self.vision.n_tokens if self.keep_class else self.vision.n_patches

    @property
    def image_tokens(self) -> ImageTokens:
        """Return the id and the number of the tokens that an image becomes in a conversation."""
        return ImageTokens(self.image_token, self.n_image_tokens)

    @property
    def max_seq_len(self) -> int:
        """Return how many tokens the language model reads at most, those of an image included."""
        if self.language:
            return read_decoder_config(self.language)["max_seq_len"]
        return self.text.max_seq_len

    @property
    def vocab_size(self) -> int:
        """Return the language model's number of tokens V."""
        return self.text.vocab_size

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        """Return the ids of the tokens that end a text."""
        return self.text.eos_token_id

    @property
    def tower_macs(self) -> int:
        """Return the multiplications for the features of an image: of its patches, and of the blocks before
        feature_layer."""
        # A block that computes all tokens costs what one more block adds to a tower.
        vision = self.vision
        block = n_macs(replace(vision, n_layers=vision.n_layers + 1)) - n_macs(vision)
        patches = vision.n_patches * vision.d_model * vision.n_channels * vision.patch_size**2
        n_blocks = self.feature_layer % (vision.n_layers + 1)
        return patches + n_blocks * block

    @property
    def projector_macs(self) -> int:
        """Return the multiplications of the projector for one image."""
        return self.n_image_tokens * (self.vision.d_model + self.text.d_model) * self.text.d_model


L14 = VisionConfig(24, 16, 1024, 4096, image_size=336, patch_size=14)
VICUNA = replace(gpt.SIZES["llama2-7b"], vocab_size=32064, eos_token_id=2)
SIZES = {
    "tiny": Config(
        VisionConfig(3, 4, 96, 384, image_size=32, patch_size=8),
        gpt.Config(3, 4, 96, 256, 512, 64, tie_embeddings=False),
        image_token=511,
    ),
    "llava-1.5-7b": Config(L14, VICUNA),
    "llava-1.5-13b": Config(L14, replace(VICUNA, n_layers=40, n_heads=40, d_model=5120, d_ff=13824)),
}


def with_tower(config: Config, tower: str) -> Config:
    """Return the config with the image tower in the directory `tower`, or if that is "random" with a tower of
    the config's size and random weights. Raises ValueError for a directory without a tower."""
    if tower == "random":
        return replace(config, tower="")
    with damage_named(Path(tower) / "config.json"):
        vision = VisionConfig(**read_tower_config(tower), kernels=config.vision.kernels)
    keep_class = config.keep_class or vision.layout == "siglip"
    return replace(config, vision=vision, keep_class=keep_class, tower=tower)


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config for this vocabulary, with the sizes of the image tower and the language model whose
    weights a new model copies.

    dataset: a `visual_instruct.TalkDataset`. Raises ValueError for directories that do not hold these.
    """
    tokenizer = dataset.tokenizer
    config, text = with_tower(config, dataset.tower), config.text
    if config.language:
        with damage_named(Path(config.language) / "config.json"):
            text = gpt.Config(**read_decoder_config(config.language), kernels=text.kernels)
    text = replace(text, vocab_size=max(tokenizer.n_vocab, text.vocab_size if config.language else 0))
    text = replace(text, eos_token_id=tokenizer.eot_id, max_seq_len=max(seq_len, text.max_seq_len))
    image_token = tokenizer.special_tokens[IMAGE]
    return replace(config, text=text, image_token=image_token)


def check_image_tokens(found: list[int], images: Tensor | None, image: ImageTokens) -> None:
    """Raise ValueError unless each row holds the image tokens of one image, or no image tokens.

    found: how many each row holds. images: one for each row, or None, if no row may hold image tokens.
    """
    if images is not None and len(images) != len(found):
        raise ValueError(f"{len(images)} images, {len(found)} rows of tokens: expected one for each row")
    for row, n in enumerate(found):
        if n not in ((0,) if images is None else (0, image.n)):
            of = "it has no image" if images is None else f"its image has {image.n} features"
            raise ValueError(f"row {row} holds {n} image tokens (id {image.id}), but {of}")


def spliced(x: Tensor, is_image: Tensor, features: Tensor) -> Tensor:
    """Return embeddings x (B, T, D) with features (B, N, D) in the places where is_image, bool (B, T), is
    true: in each row the i-th feature in the i-th of these places. If a row has no such places, its features
    are not used."""
    place = (is_image.cumsum(dim=1) - 1).clamp(0, features.shape[1] - 1)  # (B, T): which of the N
    seen = features.gather(1, place[..., None].expand(-1, -1, features.shape[2]))
    return torch.where(is_image[..., None], seen.to(x.dtype), x)


class Prompted(nn.Module):
    """A model for generate.py: the language model, and the projected features of its prompts' images."""

    def __init__(self, language_model: GPT, image_token: int, features: Tensor | None):
        super().__init__()
        self.language_model, self.config = language_model, language_model.config
        self.image_token, self.features = image_token, features  # features: (B, N, D)
        self.new_cache, self.logits = language_model.new_cache, language_model.logits

    def hidden(self, tokens: Tensor, *, cache: generate.KVCache) -> Tensor:
        """Return the hidden states (B, T, D) of tokens (B, T). In the first call, whose cache is empty, these
        are the prompts, whose image tokens get the features; later they are one new token for each prompt."""
        if self.features is not None and not cache.filled:
            x = self.language_model.model.embed_tokens(tokens)
            tokens = spliced(x, tokens == self.image_token, self.features)
        return self.language_model.hidden(tokens, cache=cache)


class LLaVA(nn.Module):
    """An image tower, a projector and a decoder. Parameters have the names of Hugging Face's files."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, D, bias = config, config.text.d_model, config.projector_bias
        self.vision_tower = VisionTower(config.vision)
        layers = {"linear_1": nn.Linear(config.vision.d_model, D, bias), "linear_2": nn.Linear(D, D, bias)}
        self.multi_modal_projector = nn.ModuleDict(layers)
        self.language_model = GPT(config.text)
        self.blind = False  # True: features are 0, so that answers are made from the text alone
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the projector's weights, so that for features of variance 1 its outputs are about as large as
        embeddings; and copy the weights of the tower and the language model that the config names."""
        first, second = self.multi_modal_projector.values()
        first.weight.normal_(std=1 / math.sqrt(first.in_features))
        second.weight.normal_(std=0.02 / math.sqrt(second.in_features))
        for layer in (first, second):
            if layer.bias is not None:
                layer.bias.zero_()
        if self.config.tower:
            self.vision_tower.load_state_dict(VisionTower.from_pretrained(self.config.tower).state_dict())
        if self.config.language:
            own = self.language_model.state_dict()
            for name, w in GPT.from_pretrained(self.config.language).state_dict().items():
                own[name][: len(w)].copy_(w)
                # Where the model has more tokens, or more learned positions, new rows are the mean row.
                own[name][len(w) :] = w.mean(dim=0)

    def see(self, images: Tensor) -> Tensor:
        """Return the projected features h (B, N, D) of normalized images (B, C, H, W)."""
        config, projector = self.config, self.multi_modal_projector
        features = self.vision_tower.features(images, config.feature_layer, config.keep_class)
        if self.blind:
            features = torch.zeros_like(features)
        return projector.linear_2(F.gelu(projector.linear_1(features)))

    def embed(self, tokens: Tensor, images: Tensor | None) -> Tensor:
        """Return the embeddings (B, T, D) of tokens (B, T), with the projected features of normalized images
        (B, C, H, W) in the places of image tokens."""
        x = self.language_model.model.embed_tokens(tokens)
        return x if images is None else spliced(x, tokens == self.config.image_token, self.see(images))

    def forward(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each of tokens (B, T).

        images: normalized, (B, C, H, W), one for each row; for a row without image tokens any. Raises
        ValueError for rows with another number of image tokens than an image has features.
        """
        is_image = tokens == self.config.image_token
        check_image_tokens(is_image.sum(dim=1).tolist(), images, self.config.image_tokens)
        return self.language_model(self.embed(tokens, images))

    def normalized(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) with pixels in [0, 1] as the tower reads them."""
        return self.vision_tower.normalized(images)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross-entropy in nats per target, and no metrics, for "tokens" and "targets" (B, T)
        and "images" (B, C, H, W) with pixels in [0, 1]. Targets of -100 are left out."""
        x = self.embed(batch["tokens"], self.normalized(batch["images"]))
        return self.language_model.loss({"tokens": x, "targets": batch["targets"]})

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of matrix products, forward and backward, for a row of seq_len tokens with an
        image, since a run counts images and not tokens."""
        config = self.config
        of_image = 6 * (config.tower_macs + config.projector_macs)
        return seq_len * config.text.flops_per_token(seq_len) + of_image

    @torch.inference_mode()
    def prompted(self, tokens: list[list[int]], images: Tensor | None) -> Prompted:
        """Return the model by which generate.py continues prompts with these images, as in `forward`."""
        device = self.multi_modal_projector.linear_1.weight.device
        found = [row.count(self.config.image_token) for row in tokens]
        check_image_tokens(found, images, self.config.image_tokens)
        features = None if images is None else self.see(images.to(device))
        return Prompted(self.language_model, self.config.image_token, features)

    def stream(self, tokens: list[list[int]], max_new_tokens: int, images: Tensor | None = None, **options):
        """Yield a token for each prompt at each step: see `generate.stream`, and `forward` for images."""
        return generate.stream(self.prompted(tokens, images), tokens, max_new_tokens, **options)

    def generate(self, tokens: list[list[int]], max_new_tokens: int, images: Tensor | None = None, **options):
        """Return the new tokens of each prompt: see `generate.generate`, and `forward` for images."""
        return generate.generate(self.prompted(tokens, images), tokens, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "LLaVA":
        """Return the LlavaForConditionalGeneration in a directory, in the dtype of its weights.

        Raises ValueError naming what is missing, damaged or not implemented.
        """
        return llava.load(cls, (Config, VisionConfig, gpt.Config), directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a LlavaForConditionalGeneration, with the files of its processor."""
        llava.save(self, directory)


Model = LLaVA


def print_sizes() -> None:
    """Print for each size the parameters, also of its parts, the pixels of an image and its image tokens."""
    print(f"{'size':14} {'parameters':>15} {'tower':>12} {'projector':>11} {'image':>6} {'tokens':>6}")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = LLaVA(config)
        parts = (model, model.vision_tower, model.multi_modal_projector)
        n, tower, projector = (sum(p.numel() for p in part.parameters()) for part in parts)
        image = f"{config.vision.image_size:6} {config.n_image_tokens:6}"
        print(f"{name:14} {n:15,} {tower:12,} {projector:11,} {image}")


def prompt_of(question: str, is_raw: bool, tokenizer, image: ImageTokens) -> list[int]:
    """Return the tokens of the prompt that asks a question about an image. "<image>" in the question is where
    the image is; without it the image is before the question.

    is_raw: the question is the whole prompt, in the model's own template, such as "USER: <image>\\nWhat is
    this? ASSISTANT:" of the published LLaVA 1.5.
    """
    text = question if IMAGE in question else f"{IMAGE}\n{question}"
    if not is_raw:
        return prompt_tokens([{"role": "user", "content": text}], tokenizer, image)
    pieces = [(token, False) for token in tokenizer.begin_ids]
    return encode(with_images(iter([*pieces, (text, False)]), image), tokenizer)[0]


def main() -> None:
    parser = command.Parser(description="Answer a question about an image, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="directory of a model (default: print the sizes)")
    add("image", nargs="?", type=command.path, help="file of an image")
    add("question", nargs="?", help='what is asked; "<image>" is where the image is (default: in front)')
    add("--raw", action="store_true", help="the question is the whole prompt, in the model's own template")
    add("--max-new-tokens", type=int, default=100, help="longest answer, in tokens (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default %(default)s)")
    add("--seed", type=int, default=0, help="start of the random draws (default %(default)s)")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes()
        return
    if not (args.image and args.question):
        raise ValueError(f"{args.checkpoint}: expected a file of an image and a question after it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LLaVA.from_pretrained(args.checkpoint).float().to(device).eval()
    tokenizer, vision = get_tokenizer(args.checkpoint), model.config.vision
    shape = (vision.n_channels, vision.image_size, vision.image_size)
    # An image that is not square gets a border, as in training, and nothing of it is cut off.
    conversions = Counter()  # counts what `decode` converted; it is not printed here
    pixels = torch.from_numpy(decode(args.image, shape, conversions, border=True))[None].float() / 255
    prompt = prompt_of(args.question, args.raw, tokenizer, model.config.image_tokens)
    stop = [end_id(tokenizer), *generate.end_tokens(model, tokenizer)]
    options = {"images": model.normalized(pixels.to(device)), "temperature": args.temperature, "stop": stop}
    options["generator"] = torch.Generator(device).manual_seed(args.seed)
    generate.print_stream(model.stream([prompt], args.max_new_tokens, **options), tokenizer, stop)


if __name__ == "__main__":
    command.run(main)
