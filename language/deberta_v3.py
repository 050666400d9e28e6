"""DeBERTa v3: ELECTRA's objective for DeBERTa. The discriminator reads the generator's embeddings.

    x'_i ~ p_generator(x_i | masked text) at the masked i,    x'_i = x_i elsewhere
    y_i  = 1 where x'_i differs from x_i, else 0
    loss = mean over masked i of -log p_generator(x_i | masked text)
           + 10 * mean over all i of -log p_discriminator(y_i | x')

    embeddings of the discriminator = stop_gradient(embeddings of the generator) + Delta

In ELECTRA both models train the same embeddings, in opposite directions: the generator's loss moves tokens of
similar meaning together, the discriminator's moves them apart. Here the discriminator reads the generator's
embeddings, but its gradient reaches Delta alone, which begins at 0 (gradient-disentangled embedding sharing;
He et al. 2021, arXiv:2111.09543, section 3.3).

The generator is a DeBERTa with its mask decoder, as wide as the discriminator and half as deep. The
discriminator has no absolute positions and no masked-language-model head; its logit that a token was replaced
is w . gelu(W norm(h_cls + h_i)). The weight 10 is that of the authors' code; the paper has 50. Their code
updates the generator first, then the discriminator, which reads the new embeddings. Here both are updated at
once: no parameter gets a gradient from both losses, so the gradients are the same at the same weights.

This file is only what v3 adds to language/deberta.py and language/electra.py.

    python -m language.deberta_v3                                                      print the sizes
    python -m language.deberta_v3 runs/deberta_v3/model --text "for i in banana(10):"  detect replaced tokens
    python train.py --model deberta_v3                                                 train one

Shapes: B batch, T tokens of a row, D model width, V vocabulary.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from bert import norm
from formats import command, disentangled_encoders, safetensors_dir
from formats.config_json import damage_named
from formats.disentangled_encoders import DISCRIMINATOR, EMBEDDING, POSITIONS
from language import deberta, electra, masking
from language.deberta import DeBERTa
from language.electra import Electra

STEPS = 1900
LEARNING_RATE = 0.25  # times the default rate of a decoder of this size, as for language/electra.py
TOKEN_LOSS = "mlm_loss"  # the metric with the nats per masked token; the loss has another term too


@dataclass(frozen=True)
class Config(deberta.Config):
    """The discriminator's config; the generator has fewer of the same layers."""

    absolute: str = "none"
    mlm_head: bool = False
    generator_size: float = 0.5  # its layers as a share of the discriminator's; 0: no generator
    disentangled: bool = True  # the discriminator reads the generator's embeddings too; False: only its own
    rtd_weight: float = 10.0  # weight of the discriminator's loss
    masking: str = "token"  # as in language/masking.py
    mask_rate: float = 0.15

    MAY_BE_ZERO = (*deberta.Config.MAY_BE_ZERO, "generator_size", "rtd_weight")

    def __post_init__(self):
        super().__post_init__()
        if self.generator_size > 1:
            raise ValueError(f"generator_size {self.generator_size}: expected 0 to 1")
        if self.mlm_head or self.absolute == "decoder":
            raise ValueError("mlm_head True or absolute 'decoder': the generator has these, not this model")
        electra.masks(self)  # raises ValueError for impossible settings

    def generator(self) -> deberta.Config | None:
        """Return the generator's config, or None."""
        if not self.generator_size:
            return None
        same = {field.name: getattr(self, field.name) for field in fields(deberta.Config)}
        same |= {"n_layers": max(1, round(self.generator_size * self.n_layers)), "mlm_head": True}
        return deberta.Config(**same | {"absolute": "decoder" if self.absolute == "none" else self.absolute})


def sized(name: str) -> Config:
    """Return the discriminator's config for a size of language/deberta.py."""
    shared = {field.name: getattr(deberta.SIZES[name], field.name) for field in fields(deberta.Config)}
    return Config(**shared | {"absolute": "none", "mlm_head": False})


KIND = "detector of replaced tokens"
SIZES = {name: sized(name) for name in deberta.SIZES if name == "tiny" or "v3-" in name}


class ReplacedTokenHead(nn.Module):
    """The discriminator's head: w . gelu(W norm(h_first + h_i))."""

    def __init__(self, config: Config):
        super().__init__()
        self.LayerNorm = norm(config.d_model, config)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.classifier = nn.Linear(config.d_model, 1)

    def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
        """Return logits (B, T) that a token was replaced. hidden: (B, T, D). first: the hidden state of the
        first token of its text, (B, 1, D), or (B, T, D) where a row has several texts."""
        return self.classifier(F.gelu(self.dense(self.LayerNorm(first + hidden)))).squeeze(-1)


class Discriminator(DeBERTa):
    """The encoder that is kept: it reads the generator's embeddings plus Delta."""

    def __init__(self, config: Config, generator: DeBERTa | None):
        super().__init__(config)
        self.discriminator_predictions = ReplacedTokenHead(config)
        self.initialize()
        # In a tuple the generator is not a submodule, so its parameters are not counted or saved here too.
        self.shared = (generator if config.disentangled else None,)
        if self.shared[0] is not None:
            nn.init.zeros_(self.deberta.embeddings.word_embeddings.weight)  # Delta

    @property
    def embedding_weight(self) -> Tensor:
        """Return the embeddings of all tokens, (V, D): those of the generator plus Delta."""
        own, generator = self.deberta.embeddings.word_embeddings.weight, self.shared[0]
        return own if generator is None else own + generator.embedding_weight.detach()

    def embed_words(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of tokens (B, T), before anything is added to them."""
        own, generator = super().embed_words(tokens), self.shared[0]
        return own if generator is None else own + F.embedding(tokens, generator.embedding_weight.detach())

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T) that each of tokens (B, T) was replaced; arguments as for `BERT.hidden`."""
        hidden = self.hidden(tokens, segments, cu_seqlens=cu_seqlens)
        first = hidden[:, :1]  # (B, 1, D)
        if cu_seqlens is not None:
            first = hidden[:, cu_seqlens[:-1]].repeat_interleave(cu_seqlens.diff(), dim=1)  # (1, N, D)
        return self.discriminator_predictions(hidden, first)


class DeBERTaV3(Electra):
    """A discriminator, and in training the generator that draws the tokens it judges."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        self.config = config
        self.generator = DeBERTa(config.generator()) if config.generator_size else None
        self.discriminator = Discriminator(config, self.generator)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "DeBERTaV3":
        """Return the discriminator of a directory, with the DebertaV2ForMaskedLM in generator/ if any.

        A directory holds the sum of the generator's embeddings and Delta, so Delta is right to the rounding
        of this sum. Raises ValueError naming what is wrong, and for two that were not trained together.
        """
        # The discriminator. Published files have the head of a generator too, which is left out.
        found, weights = disentangled_encoders.read(directory)
        if f"{DISCRIMINATOR}classifier.weight" not in weights:
            raise ValueError(
                f"{directory}: has no {DISCRIMINATOR}classifier.weight; expected a discriminator of DeBERTa "
                "v3 (python -m language.deberta reads other DeBERTas)"
            )
        found |= {"mlm_head": False, "tie_embeddings": True, "generator_size": 0.0}
        if found["absolute"] == "decoder":
            found["absolute"] = "none"
            del weights[POSITIONS]
        weights = {
            name.replace(DISCRIMINATOR, "discriminator_predictions."): w
            for name, w in weights.items()
            if not name.startswith("cls.")
        }
        with damage_named(Path(directory) / "config.json"):
            config = Config(**found)

        # The generator's config, which follows from the discriminator's and its depth.
        beside = Path(directory) / "generator"
        if beside.is_dir():
            beside_found, beside_weights = disentangled_encoders.read(beside)
            size = beside_found["n_layers"] / config.n_layers
            config = electra.with_generator(config, size, beside_found, beside)

        # The weights. What the discriminator adds to the generator's embeddings is Delta.
        model = safetensors_dir.build(lambda: cls(config), found, weights, directory)
        if model.generator is not None:
            safetensors_dir.assign(model.generator, beside_weights, beside)
            weights[EMBEDDING] = weights[EMBEDDING] - beside_weights[EMBEDDING]
        safetensors_dir.assign(model.discriminator, weights, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the discriminator, whose encoder transformers opens as DebertaV2Model, and to generator/ in
        the directory the generator, a DebertaV2ForMaskedLM."""
        weights = self.discriminator.state_dict() | {EMBEDDING: self.discriminator.embedding_weight.detach()}
        weights = {
            name.replace("discriminator_predictions.", DISCRIMINATOR): w for name, w in weights.items()
        }
        disentangled_encoders.save(self.config, weights, directory)
        if self.generator is not None:
            self.generator.save_pretrained(Path(directory) / "generator")


Model = DeBERTaV3
fit, mlp_bytes = deberta.fit, deberta.mlp_bytes
make_batch, loss_bytes, show = electra.make_batch, electra.loss_bytes, electra.show
load_data, split = masking.load_data, masking.split

if __name__ == "__main__":
    command.run(lambda: electra.main(DeBERTaV3, SIZES))  # print the sizes, or detect replaced tokens
