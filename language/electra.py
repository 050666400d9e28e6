"""ELECTRA: an encoder that learns to detect which tokens of a text were replaced.

    x'_i ~ p_generator(x_i | masked text) at the masked i,    x'_i = x_i elsewhere
    y_i  = 1 where x'_i differs from x_i, else 0
    loss = mean over masked i of -log p_generator(x_i | masked text)
           + 50 * mean over all i of -log p_discriminator(y_i | x')

ELECTRA (Clark et al. 2020, section 2). A small BERT, the generator, fills in the masks; the discriminator,
which is the encoder that one keeps, judges every token of the result. So a text gives T predictions to learn
from, where BERT has 0.15 T. A token that the generator gets right counts as original. This is no GAN: the
generator is trained to be right, not to deceive, and no gradient flows back through the tokens it draws.

Both read the same embeddings (section 3.2). The discriminator alone would train only those of the tokens in
its input, while the generator's softmax moves all of them at every step.

This file is only what ELECTRA adds to bert.py and language/masking.py.

    python -m language.electra                                                     print the sizes
    python -m language.electra runs/electra/model --text "for i in banana(10):"    detect replaced tokens
    python train.py --model electra                                                train one

Shapes: B batch, T tokens of a row, D model width, V vocabulary, n masked tokens of a row.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bert
from bert import BERT
from data.rows import Dataset, Row
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import command, encoders, safetensors_dir
from formats.config_json import damage_named
from language import masking
from language.encoder_inference import sequence

OPTIMIZER, STEPS = "muon", 3600
LEARNING_RATE = 0.25  # times the default rate of a decoder of this size; found on `tiny`
TOKEN_LOSS = "mlm_loss"  # the nats per masked token, where the loss has other terms too


@dataclass(frozen=True)
class Config(bert.Config):
    """The discriminator's config; the generator has the same layers, but narrower."""

    pooler: bool = False
    mlm_head: bool = False
    generator_size: float = 0.25  # its heads and widths as a share of the discriminator's; 0: no generator
    rtd_weight: float = 50.0  # of the discriminator's loss, which is small: a choice of 2, not of V tokens
    masking: str = "token"  # as in language/masking.py
    mask_rate: float = 0.15

    MAY_BE_ZERO = (*bert.Config.MAY_BE_ZERO, "generator_size", "rtd_weight")

    def __post_init__(self):
        super().__post_init__()
        if self.generator_size > 1:
            raise ValueError(f"generator_size {self.generator_size}: expected 0 to 1")
        masks(self)  # raises ValueError for impossible settings

    def generator(self) -> bert.Config | None:
        """Return the generator's config, with fewer heads of the same width (section 3.2), or None."""
        if not self.generator_size:
            return None
        n_heads = max(1, round(self.generator_size * self.n_heads))
        narrow = {
            "n_heads": n_heads,
            "d_model": self.d_model * n_heads // self.n_heads,
            "d_ff": self.d_ff * n_heads // self.n_heads,
            "d_embedding": self.E,
        }
        same = {field.name: getattr(self, field.name) for field in fields(bert.Config)}
        return bert.Config(**same | narrow | {"mlm_head": True})


def masks(config: Config) -> masking.Config:
    """Return the settings of language/masking.py for the generator's objective."""
    return masking.Config(config.masking, config.mask_rate)


KIND = "detector of replaced tokens"
SIZES = {  # all but tiny: Clark et al. 2020, table 6
    "tiny": Config(4, 4, 128, 512, 4096, 128, generator_size=0.5),
    "electra-small": Config(12, 4, 256, 1024, d_embedding=128),
    "electra-base": Config(12, 12, 768, 3072, generator_size=1 / 3),
    "electra-large": Config(24, 16, 1024, 4096, mask_rate=0.25),
}

NO_GENERATOR = (
    "this model came without a generator/ beside it: it detects, but nothing draws the tokens to train it "
    "on; train.py --set generator_size=0.25 begins with a new one"
)


class ReplacedTokenHead(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dense_prediction = nn.Linear(config.d_model, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (...) that a token was replaced, of hidden states (..., D)."""
        return self.dense_prediction(F.gelu(self.dense(hidden))).squeeze(-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return a token (...) from the softmax of logits (..., V) for each number (...) in [0, 1).

    It is the first token at which the running sum of the probabilities exceeds the number.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    # Rounding leaves the last sum a little off 1.
    uniform = uniform * cumulative[..., -1]
    token = torch.searchsorted(cumulative, uniform[..., None], right=True).squeeze(-1)
    # With logits of NaN the search ends past the last token. The index stays valid, and the loss is NaN.
    return token.clamp(max=logits.shape[-1] - 1)


class Discriminator(BERT):
    def __init__(self, config: Config):
        super().__init__(config)
        self.discriminator_predictions = ReplacedTokenHead(config)
        bert.initialize(self, config)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T) that each of tokens (B, T) was replaced; arguments as for `BERT.hidden`."""
        return self.discriminator_predictions(self.hidden(tokens, segments, cu_seqlens=cu_seqlens))


class Generator(BERT):
    """A BERT that reads the embeddings of another model, which alone holds and saves them."""

    def __init__(self, config: bert.Config, embeddings: nn.ModuleDict):
        super().__init__(config)
        del self.bert["embeddings"]
        self.shared = (embeddings,)  # a module in a tuple is not registered a second time

    @property
    def embeddings(self) -> nn.ModuleDict:
        """Return the shared embeddings."""
        return self.shared[0]


def with_generator(config: Config, size: float, fields: dict, beside: Path) -> Config:
    """Return a discriminator's config with generator_size = size, at most 1.

    fields: those of the generator in the directory beside. Raises ValueError unless they are those that
    follow from the discriminator's and the size.
    """
    config = replace(config, generator_size=min(1.0, size))
    for field, expected in vars(config.generator()).items():
        found = fields.get(field, expected)
        if found != expected:
            raise ValueError(f"{beside}: {field} {found}, not the {expected} that {beside.parent} calls for")
    return config


class Electra(nn.Module):
    """A discriminator, and in training the generator that draws the tokens it judges."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.discriminator = Discriminator(config)
        self.generator = None
        if config.generator_size:
            self.generator = Generator(config.generator(), self.discriminator.embeddings)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the discriminator's logits (B, T) that each of tokens (B, T) was replaced."""
        return self.discriminator(tokens, segments, cu_seqlens=cu_seqlens)

    def guess(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the generator's logits (..., V) at positions (...) of the flattened tokens (B, T).

        Raises ValueError for a model that came without a generator.
        """
        if self.generator is None:
            raise ValueError(NO_GENERATOR)
        hidden = self.generator.head_input(tokens, cu_seqlens=cu_seqlens)  # (B, T, D of the generator)
        return self.generator.logits(hidden.flatten(0, 1)[positions]).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the header's loss on a batch from `make_batch`, and metrics.

        "accuracy" is the generator's at the masked places; "rtd_accuracy" the discriminator's at all places,
        where the constant answer "original" would reach 1 - "replaced". Raises ValueError as `guess` does.
        """
        # The generator's loss at the masked places.
        tokens, positions, targets = batch["tokens"], batch["positions"], batch["targets"]
        cu_seqlens = batch.get("cu_seqlens")
        logits = self.guess(tokens, positions, cu_seqlens)  # (B, n, V)
        mlm_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        # Fill in what it draws there. A row with fewer than n masks has the position 0, with the target -100,
        # in place of those that are missing; the token at 0 stays.
        masked = targets >= 0  # (B, n)
        drawn = draw(logits.detach(), batch["uniform"])  # (B, n)
        flat = tokens.flatten()  # (B T,)
        filled = flat.index_put((positions,), torch.where(masked, drawn, flat[positions]))
        replaced = torch.zeros_like(flat, dtype=torch.bool)
        replaced = replaced.index_put((positions,), masked & (drawn != targets))

        # The discriminator's loss at all places.
        rtd_logits = self(filled.view_as(tokens), cu_seqlens=cu_seqlens).float().flatten()  # (B T,)
        rtd_loss = F.binary_cross_entropy_with_logits(rtd_logits, replaced.float())
        metrics = {
            "accuracy": (logits.argmax(-1) == targets).sum() / masked.sum(),
            "mlm_loss": mlm_loss.detach(),
            "rtd_loss": rtd_loss.detach(),
            "rtd_accuracy": ((rtd_logits > 0) == replaced).float().mean(),
            "replaced": replaced.float().mean(),
        }
        return mlm_loss + self.config.rtd_weight * rtd_loss, metrics

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of training both, forward and backward, per token of a row, as in bert.py."""
        D = self.config.d_model
        flops = self.discriminator.flops_per_token(seq_len) + 6 * (D * D + D)
        if self.generator is None:
            return flops
        return flops + self.generator.flops_per_token(seq_len, masks(self.config).n_masked(seq_len))

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "Electra":
        """Return the ElectraForPreTraining of a directory, with the ElectraForMaskedLM in generator/ if any.

        Raises ValueError as `BERT.from_pretrained` does, and for two that were not trained together.
        """
        # The discriminator.
        described, weights = encoders.read(directory)
        if "discriminator_predictions.dense.weight" not in weights:
            raise ValueError(
                f"{directory}: has no discriminator_predictions; expected an ElectraForPreTraining, with its "
                "ElectraForMaskedLM in generator/ (python bert.py reads that one, and other encoders)"
            )
        with damage_named(Path(directory) / "config.json"):
            config = Config(**described, kernels=kernels, generator_size=0.0)
            encoders.check_electra(config)

        # The generator's config, which follows from the discriminator's and its size.
        beside = Path(directory) / "generator"
        if beside.is_dir():
            generator_fields, generator_weights = encoders.read(beside)
            size = generator_fields["n_heads"] / config.n_heads
            config = with_generator(config, size, generator_fields, beside)

        # The weights. Both files hold the embeddings, which must be the same.
        model = safetensors_dir.build(lambda: cls(config), described, weights, directory)
        safetensors_dir.assign(model.discriminator, weights, directory)
        if model.generator is None:
            return model
        for name in weights:
            if not name.startswith("bert.embeddings.") or name not in generator_weights:
                continue
            if not torch.equal(generator_weights.pop(name).float(), weights[name].float()):
                raise ValueError(
                    f"{beside}: {name} is not that of {directory}; they were not trained together"
                )
        safetensors_dir.assign(model.generator, generator_weights, beside)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the discriminator as ElectraForPreTraining, and the generator to generator/ in the directory.

        The generator is an ElectraForMaskedLM with its own copy of the embeddings. Raises ValueError for a
        config that these cannot describe.
        """
        encoders.check_electra(self.config)
        weights = self.discriminator.state_dict()
        encoders.save(self.config, weights, directory, "electra", "ForPreTraining")
        if self.generator is None:
            return
        shared = {name: w for name, w in weights.items() if name.startswith("bert.embeddings.")}
        weights, config = shared | self.generator.state_dict(), self.generator.config
        encoders.save(config, weights, Path(directory) / "generator", "electra", "ForMaskedLM")


Model = Electra
fit, load_data, split = bert.fit, masking.load_data, masking.split


def make_batch(
    rows: list[Row], config: Config, generator: torch.Generator, tokenizer: Tokenizer | WordPiece
) -> dict[str, Tensor]:
    """Return the batch of `masking.make_batch` with all chosen tokens masked, and "uniform" (B, n).

    The authors' code leaves 15 percent of the chosen tokens as they are; the paper masks all (section 2). The
    generator's tokens are drawn by "uniform", numbers in [0, 1), so the loss is a function of the batch.
    Raises ValueError as `masking.make_batch` does, and for a model without a generator.
    """
    if not config.generator_size:
        raise ValueError(NO_GENERATOR)
    batch = masking.make_batch(rows, masks(config), generator, tokenizer)
    chosen = batch["positions"][batch["targets"] >= 0]
    batch["tokens"].view(-1)[chosen] = tokenizer.mask_id
    return batch | {"uniform": torch.rand(batch["targets"].shape, generator=generator)}


def loss_bytes(
    model: Electra, config: Config, n: int, seq_len: int, precision: tuple[int, int, bool]
) -> dict[str, int]:
    """Return the memory of both heads, as `masking.loss_bytes`.

    The discriminator has one logit per token, which is little; it keeps the input of its embeddings' norm.
    """
    kept = n * precision[1] * config.E
    if model.generator is None:
        return {"kept": kept}
    generator = masking.loss_bytes(model.generator, masks(config), n, seq_len, precision)
    return generator | {"kept": generator["kept"] + kept}


@torch.no_grad()
def detect(model: Electra, row: list[int]) -> list[float]:
    """Return the probability that each token of a row, [CLS] and [SEP] included, was replaced."""
    tokens = torch.tensor([row], device=model.discriminator.embedding_weight.device)
    return model(tokens)[0].float().sigmoid().tolist()


@torch.no_grad()
def show(model: Electra, dataset: Dataset, out: Path) -> str:
    """Return the beginning of the held-out text with every tenth token drawn by the generator, always by the
    same random numbers, and which tokens the discriminator takes for replaced."""
    # Mask every tenth token, and let the generator draw one there.
    tokenizer, device = dataset.tokenizer, model.discriminator.embedding_weight.device
    text = dataset.val.tokens[: min(80, model.config.max_seq_len - 2)].tolist()
    chosen = [i + 1 for i, token in enumerate(text) if i % 10 == 5 and not tokenizer.is_special[token]]
    row = torch.tensor([tokenizer.cls_id, *text, tokenizer.sep_id], device=device)
    places = torch.tensor(chosen, dtype=torch.int64, device=device)
    logits = model.guess(row.index_fill(0, places, tokenizer.mask_id)[None], places)
    uniform = torch.rand(len(chosen), generator=torch.Generator().manual_seed(0))
    was, now = row.tolist(), row.index_put((places,), draw(logits, uniform.to(device))).tolist()
    p = detect(model, now)

    # One line for each of them, and one for all other tokens.
    lines = [tokenizer.decode(now[1:-1]), ""]
    for i in chosen:
        drawn = "drawn as it was" if was[i] == now[i] else f"replaced by {tokenizer.decode([now[i]])!r}"
        change = f"{tokenizer.decode([was[i]])!r} {drawn}"
        lines.append(f"{change:44} judged replaced: {p[i]:.0%}")
    others = [i for i in range(1, len(now) - 1) if i not in chosen]
    wrong = [repr(tokenizer.decode([now[i]])) for i in others if p[i] > 0.5]
    examples = f": {' '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}" if wrong else ""
    lines.append(f"{len(wrong)} of the {len(others)} other tokens judged replaced{examples}")
    return "\n".join(lines)


def print_sizes(kind: type[Electra], sizes: dict) -> None:
    """Print the parameters of each size of a model, and the FLOPs per token of training it."""
    print(f"{'size':14} {'encoder':>12} {'in training':>12} {'layers':>6} {'width':>6}", end="")
    print(f" {'generator':>9} {'FLOPs/token':>12}")
    for name, config in sizes.items():
        with torch.device("meta"):
            model = kind(config)
        parts = (model, model.discriminator, model.discriminator.discriminator_predictions)
        n_params, n_both, n_head = (sum(p.numel() for p in part.parameters()) for part in parts)
        flops = model.flops_per_token(config.max_seq_len)
        print(
            f"{name:14} {n_both - n_head:12,} {n_params:12,} {config.n_layers:6} {config.d_model:6} ", end=""
        )
        print(f"{model.generator.config.d_model:9} {flops:12.3e}")


def main(kind: type[Electra] = Electra, sizes: dict = SIZES) -> None:
    """Print the sizes of a model of class kind, or with a text how likely each token of it was replaced."""
    parser = command.Parser(description="Detect replaced tokens in a text, or print the sizes.")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=command.filled,
        help="directory in Hugging Face layout (default: print the sizes)",
    )
    parser.add_argument("--text", help="the text to judge")
    args = parser.parse_args()
    if args.checkpoint is None:
        print_sizes(kind, sizes)
        return
    if args.text is None:
        raise ValueError("--text is missing; give the text to judge, such as 'for i in banana(10):'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(args.checkpoint).to(device).eval()
    tokenizer = get_tokenizer(args.checkpoint)
    row = sequence(tokenizer, args.text, model.config)
    for token, p in list(zip(row, detect(model, row), strict=True))[1:-1]:
        print(f"{tokenizer.decode([token])!r:20} {p:6.1%} {'#' * round(40 * p)}")


if __name__ == "__main__":
    command.run(main)
