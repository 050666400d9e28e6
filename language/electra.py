"""ELECTRA: an encoder that learns by telling which tokens of a text were replaced.

    x'_i ~ p_generator(x_i | masked text) at the masked i,    x'_i = x_i elsewhere
    loss = mean over masked i of -log p_generator(x_i | masked text)
           + 50 * mean over all i of -log p_discriminator(whether x'_i = x_i | x')

ELECTRA (Clark et al. 2020, section 2). A small BERT, the generator, fills in the masks; the discriminator,
the encoder one keeps, judges every token of the result, so each text asks it T questions where BERT asks
0.15 T. What the generator happens to get right counts as original. This is no GAN: the generator learns to
be right, not to fool, and no gradient flows back through the tokens it draws.

Both read the same embeddings (section 3.2): the discriminator alone would train only those of the tokens it
sees, while the generator's softmax moves all of them at every step.

This file is only what that adds to bert.py.

    python -m language.electra                                                     the sizes
    python -m language.electra runs/electra/model --text "for i in banana(10):"    which tokens look replaced
    python train.py --model electra                                       train one

Shapes: B batch, T tokens of a row, D model width, V vocabulary, n masked tokens of a row.
"""

import argparse
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bert
from bert import BERT
from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import decoders, encoders
from language import masking
from language.encoder_inference import sequence


@dataclass(frozen=True)
class Config(bert.Config):
    """Of the discriminator; the generator is the same but narrower."""

    pooler: bool = False
    mlm_head: bool = False
    generator_size: float = 0.25  # its heads and widths as a share of the discriminator's; 0: no generator
    rtd_weight: float = 50.0  # of the discriminator's loss, which is far smaller: yes or no, not a token of V

    def __post_init__(self):
        # A checkpoint has no other: it would be saved as a model that it is not.
        only = dict(positions="learned", position_offset=0, window=None, share_layers=False, pre_norm=False)
        only |= dict(mlp="gelu", bias=True, pooler=False, mlm_head=False, pair="none", span_boundary=False)
        for field, value in only.items():
            if getattr(self, field) != value:
                raise ValueError(f"{field} {getattr(self, field)!r}: an ELECTRA has {value!r}")
        if self.n_segments < 1:
            raise ValueError(f"n_segments {self.n_segments}: an ELECTRA has at least 1")
        if not 0 <= self.generator_size <= 1:
            raise ValueError(f"generator_size {self.generator_size}: expected 0 to 1")
        super().__post_init__()

    def generator(self) -> bert.Config | None:
        """With as many layers, but fewer heads of the same width (section 3.2); None if there is none."""
        if not self.generator_size:
            return None
        n_heads = max(1, round(self.generator_size * self.n_heads))
        narrow = {
            "n_heads": n_heads,
            "d_model": self.d_model * n_heads // self.n_heads,
            "d_ff": self.d_ff * n_heads // self.n_heads,
        }
        same = {field.name: getattr(self, field.name) for field in fields(bert.Config)}
        return bert.Config(**same | narrow | {"mlm_head": True})

    @property
    def n_params(self) -> int:
        """Of both; the embeddings, which they share, count once."""
        D, generator = self.d_model, self.generator()
        own = generator.n_params - self.n_embedding_params if generator else 0
        return super().n_params + (D + 1) * (D + 1) + own

    def flops_per_token(self, seq_len: int) -> int:
        """Of both, forward and backward, as in bert.py."""
        D, generator = self.d_model, self.generator()
        flops = super().flops_per_token(seq_len) + 6 * (D * D + D)
        return flops + (generator.flops_per_token(seq_len) if generator else 0)


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
        """Logits (...) that a token was replaced, of hidden states (..., D)."""
        return self.dense_prediction(F.gelu(self.dense(hidden))).squeeze(-1)


class Discriminator(BERT):
    def __init__(self, config: Config):
        super().__init__(config)
        self.discriminator_predictions = ReplacedTokenHead(config)
        self.initialize()

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T) that each of tokens (B, T) was replaced; arguments as for `BERT.hidden`."""
        return self.discriminator_predictions(self.hidden(tokens, segments, cu_seqlens=cu_seqlens))


class Electra(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.discriminator = Discriminator(config)
        self.generator = BERT(config.generator()) if config.generator_size else None
        if self.generator is not None:
            del self.generator.bert["embeddings"]  # the discriminator's serve both

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The discriminator's logits (B, T) that each of tokens (B, T) was replaced."""
        return self.discriminator(tokens, segments, cu_seqlens=cu_seqlens)

    def guess(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The generator's logits (..., V) at positions (...) of the flattened tokens (B, T).

        Raises ValueError for a model that came without a generator.
        """
        if self.generator is None:
            raise ValueError(NO_GENERATOR)
        shared = self.discriminator.bert.embeddings
        hidden = self.generator.hidden(tokens, cu_seqlens=cu_seqlens, embeddings=shared)
        head = self.generator.cls.predictions
        return head(hidden.flatten(0, 1)[positions], self.discriminator.embedding_weight).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The header's loss on a batch from `make_batch`; ValueError as from `guess`.

        metrics: "accuracy" is the generator's at the masked places; "rtd_accuracy" the discriminator's at all
        places, where always saying "original" would reach 1 - "replaced".
        """
        tokens, positions, targets = batch["tokens"], batch["positions"], batch["targets"]
        cu_seqlens = batch.get("cu_seqlens")
        logits = self.guess(tokens, positions, cu_seqlens)  # (B, n, V)
        mlm_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        masked = targets >= 0  # not where a row has fewer than n
        drawn = draw(logits.detach(), batch["uniform"])  # (B, n)
        flat = tokens.flatten()  # (B T,)
        filled = flat.index_put((positions,), torch.where(masked, drawn, flat[positions]))
        replaced = torch.zeros_like(flat, dtype=torch.bool)
        replaced = replaced.index_put((positions,), masked & (drawn != targets))

        rtd_logits = self(filled.view_as(tokens), cu_seqlens=cu_seqlens).float().flatten()  # (B T,)
        rtd_loss = F.binary_cross_entropy_with_logits(rtd_logits, replaced.float())
        n_targets = masked.sum()
        metrics = {
            "targets": n_targets,
            "accuracy": (logits.argmax(-1) == targets).sum() / n_targets,
            "mlm_loss": mlm_loss.detach(),
            "rtd_loss": rtd_loss.detach(),
            "rtd_accuracy": ((rtd_logits > 0) == replaced).float().mean(),
            "replaced": replaced.float().mean(),
        }
        return mlm_loss + self.config.rtd_weight * rtd_loss, metrics

    def flops_per_token(self, seq_len: int) -> int:
        return self.config.flops_per_token(seq_len)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "Electra":
        """Load an ElectraForPreTraining, with the ElectraForMaskedLM in its directory generator/ if there is
        one. ValueError as from `BERT.from_pretrained`, and where the two were not trained together."""
        described, weights = encoders.read(directory)
        if "discriminator_predictions.dense.weight" not in weights:
            raise ValueError(
                f"{directory}: has no discriminator_predictions; expected an ElectraForPreTraining, with its "
                "ElectraForMaskedLM in generator/ (python bert.py reads that one, and other encoders)"
            )
        config = Config(**described, kernels=kernels, generator_size=0.0)
        beside = Path(directory) / "generator"
        if beside.is_dir():
            generator_fields, generator_weights = encoders.read(beside)
            config = replace(config, generator_size=min(1.0, generator_fields["n_heads"] / config.n_heads))
            for field, expected in vars(config.generator()).items():
                found = generator_fields.get(field, expected)
                if found != expected:
                    raise ValueError(
                        f"{beside}: {field} {found}, not the {expected} that {directory} calls for"
                    )
        with torch.device("meta"):
            model = cls(config)
        decoders.assign(model.discriminator, weights, directory)
        if model.generator is None:
            return model
        for name in weights:
            if not name.startswith("bert.embeddings.") or name not in generator_weights:
                continue
            if not torch.equal(generator_weights.pop(name).float(), weights[name].float()):
                raise ValueError(
                    f"{beside}: {name} is not that of {directory}; they were not trained together"
                )
        decoders.assign(model.generator, generator_weights, beside)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the discriminator, as ElectraForPreTraining, and to generator/ in there the generator, as
        ElectraForMaskedLM with its own copy of the embeddings."""
        weights = self.discriminator.state_dict()
        encoders.save(self.config, weights, directory, "electra", "ForPreTraining")
        if self.generator is None:
            return
        shared = {name: w for name, w in weights.items() if name.startswith("bert.embeddings.")}
        weights, config = shared | self.generator.state_dict(), self.generator.config
        encoders.save(config, weights, Path(directory) / "generator", "electra", "ForMaskedLM")


Model = Electra
SPECIAL_TOKENS = bert.SPECIAL_TOKENS
STEPS = 3600
LEARNING_RATE = 0.25


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token (...) from the softmax of logits (..., V) for each number (...) in [0, 1): where the running
    sum of the probabilities first exceeds it."""
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = uniform * cumulative[..., -1]  # which rounding leaves a little off 1
    token = torch.searchsorted(cumulative, uniform[..., None], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)  # NaN exceeds nothing: the loss shall be NaN, not an error


part_of = bert.part_of


def make_batch(
    tokens: Tensor, config: Config, generator: torch.Generator, tokenizer: Tokenizer | WordPiece
) -> dict[str, Tensor]:
    """`bert.make_batch`, and "uniform" (B, n), the numbers in [0, 1) that the generator's tokens are drawn
    by, so that a batch decides everything.

    All that was chosen becomes [MASK] (section 2); the authors' code leaves 15 percent of it as it is.
    Raises ValueError as that does, and if there is no generator.
    """
    if not config.generator_size:
        raise ValueError(NO_GENERATOR)
    batch = bert.make_batch(tokens, config.generator(), generator, tokenizer)
    chosen = batch["positions"][batch["targets"] >= 0]
    batch["tokens"].view(-1)[chosen] = tokenizer.mask_id
    return batch | {"uniform": torch.rand(batch["targets"].shape, generator=generator)}


def loss_bytes(
    model: Electra, config: Config, n: int, seq_len: int, precision: tuple[int, int, bool]
) -> dict[str, int]:
    """Return the memory of both heads as in `masking.loss_bytes`. The discriminator has one logit per token,
    which is little; it also keeps the input of its embeddings' norm."""
    needs = {"kept": n * precision[1] * (config.d_embedding or config.d_model)}
    if model.generator is None:
        return needs
    generator = masking.loss_bytes(model.generator, config.generator(), n, seq_len, precision)
    return generator | {"kept": generator["kept"] + needs["kept"]}


@torch.no_grad()
def detect(model: Electra, row: list[int]) -> list[float]:
    """The probability that each token of a row, [CLS] and [SEP] included, was replaced."""
    tokens = torch.tensor([row], device=model.discriminator.embedding_weight.device)
    return model(tokens)[0].float().sigmoid().tolist()


@torch.no_grad()
def show(
    model: Electra, tokenizer: Tokenizer | WordPiece, held_out: Tensor, directory: Path | None = None
) -> str:
    """The beginning of the held-out text (n,) with every tenth token drawn by the generator, always by the
    same numbers, and which tokens the discriminator takes for replaced."""
    device = model.discriminator.embedding_weight.device
    text = held_out[: min(80, model.config.max_seq_len - 2)].tolist()
    chosen = [i + 1 for i, token in enumerate(text) if i % 10 == 5 and not tokenizer.is_special[token]]
    row = torch.tensor([tokenizer.cls_id, *text, tokenizer.sep_id], device=device)
    places = torch.tensor(chosen, dtype=torch.int64, device=device)
    logits = model.guess(row.index_fill(0, places, tokenizer.mask_id)[None], places)
    uniform = torch.rand(len(chosen), generator=torch.Generator().manual_seed(0))
    was, now = row.tolist(), row.index_put((places,), draw(logits, uniform.to(device))).tolist()
    p = detect(model, now)

    lines = [tokenizer.decode(now[1:-1]), ""]
    for i in chosen:
        told = f"{tokenizer.decode([was[i]])!r} "
        told += "drawn as it was" if was[i] == now[i] else f"replaced by {tokenizer.decode([now[i]])!r}"
        lines.append(f"{told:44} judged replaced: {p[i]:.0%}")
    others = [i for i in range(1, len(now) - 1) if i not in chosen]
    wrong = [repr(tokenizer.decode([now[i]])) for i in others if p[i] > 0.5]
    named = f": {' '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}" if wrong else ""
    lines.append(f"{len(wrong)} of the {len(others)} other tokens judged replaced{named}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell which tokens look replaced, or print the sizes.")
    parser.add_argument(
        "checkpoint", nargs="?", help="directory in Hugging Face layout; without it, the sizes"
    )
    parser.add_argument("--text", help="the text to judge")
    args = parser.parse_args()
    if args.checkpoint is None:
        print(f"{'size':14} {'encoder':>12} {'in training':>12} {'layers':>6} {'width':>6}", end="")
        print(f" {'generator':>9} {'FLOPs/token':>12}")
        for name, c in SIZES.items():
            flops = c.flops_per_token(c.max_seq_len)
            print(
                f"{name:14} {c.n_encoder_params:12,} {c.n_params:12,} {c.n_layers:6} {c.d_model:6} ", end=""
            )
            print(f"{c.generator().d_model:9} {flops:12.3e}")
        return
    if args.text is None:
        raise ValueError("--text is missing; give the text to judge, such as 'for i in banana(10):'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Electra.from_pretrained(args.checkpoint).to(device).eval()
    tokenizer = get_tokenizer(args.checkpoint)
    row = sequence(tokenizer, args.text, model.config)
    for token, p in list(zip(row, detect(model, row), strict=True))[1:-1]:
        print(f"{tokenizer.decode([token])!r:20} {p:6.1%} {'#' * round(40 * p)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
