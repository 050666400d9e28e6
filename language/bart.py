"""BART and PEGASUS: encoder-decoders with absolute positions, pretrained to restore texts or write sentences.

    BART       LayerNorm after the sums:   x = LN(x + f(x))         embeddings  LN(E[token] + P[position + 2])
    PEGASUS    LayerNorm before layers:    x = x + f(LN(x))         embeddings  sqrt(D) E[token] + P[position]
               and one at the end of each stack

f is attention or an MLP, E the table of the tokens, P that of the positions.

Both are the encoder-decoder of t5.py, and this file subclasses its classes. All matrices have biases, scores
are divided by sqrt(K), the head is the embedding matrix, and `final_logits_bias` is added to the logits (in
the published models it is 0). MLPs have gelu in BART, relu in PEGASUS. There are no relative positions, so a
text is at most max_seq_len tokens long.

    BART       Lewis et al. 2019, arXiv:1910.13461. It learns to restore a damaged text:
               language/denoising.py. Its decoder starts with the end token. P is learned, and its first two
               rows are never used: its authors' library, fairseq, counts positions from pad_token_id + 1 = 2
    PEGASUS    Zhang et al. 2019, arXiv:1912.08777. It learns to write the sentences that are missing in a
               text: language/pegasus.py. Its decoder starts with the padding token. P has all sines, then all
               cosines: P[p] = [sin(p w_0), sin(p w_1) ... cos(p w_0), cos(p w_1) ...], w_i = 10000^(-2 i / D)

    python -m language.bart                                           print the sizes
    python -m language.bart runs/bart/model --text "..." --beams 4    write
    python train.py --model bart                                      train one: language/denoising.py

Shapes: B batch, S input tokens, T output tokens, D model width, H heads, K head width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import bart, command
from formats.bart import Decoding
from formats.config_values import check_values
from gpt import Norm
from language import beam_search as writing
from language import t5

TASK, KIND = "denoising", "encoder-decoder"


@dataclass(frozen=True)
class Config:
    n_layers: int  # of the encoder
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 50265
    max_seq_len: int = 1024  # tokens of an input or an output
    n_decoder_layers: int | None = None  # None: n_layers
    pegasus: bool = False  # norms before layers, sinusoids, embeddings that are not normalised
    mlp: str = "gelu"  # or "relu"
    scale_embedding: bool = False  # embeddings times sqrt(D)
    norm_eps: float = 1e-5
    pad_token_id: int = 1
    eos_token_id: int = 2
    start_token_id: int = 2  # the first token that the decoder reads
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("pad_token_id", "eos_token_id", "start_token_id")

    def __post_init__(self):
        check_values(self, mlp=("gelu", "relu"))
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model {self.d_model}: expected an even multiple of n_heads {self.n_heads}")

    # Fields that the classes of t5.py read.
    original = property(lambda self: True)  # scores are scaled as in the original Transformer
    d_head = property(lambda self: self.d_model // self.n_heads)
    positions = property(lambda self: "absolute")  # `BART.length` checks that there are enough
    G, K = t5.Config.G, t5.Config.K
    decoder = t5.Config.decoder
    layer_window = t5.Config.layer_window
    flops = t5.Config.flops

    def sinusoids(self) -> Tensor:
        """Return the table P of PEGASUS, (max_seq_len, D) float32."""
        frequencies = 10000.0 ** (-torch.arange(0, self.d_model, 2, dtype=torch.float64) / self.d_model)
        angles = torch.arange(self.max_seq_len, dtype=torch.float64)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1).float()


PEGASUS = dict(pegasus=True, mlp="relu", scale_embedding=True)

SIZES = {
    "tiny": Config(2, 4, 128, 512, 4224, 128),
    "base": Config(6, 12, 768, 3072),
    "large": Config(12, 16, 1024, 4096),
    "pegasus-tiny": Config(2, 4, 128, 512, 4224, 128, **PEGASUS),
    "pegasus-large": Config(
        16, 16, 1024, 4096, 96103, pad_token_id=0, eos_token_id=1, start_token_id=0, **PEGASUS
    ),
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the vocabulary and special tokens of the data, for texts of seq_len tokens."""
    pad, end = dataset.tokenizer.pad_id, dataset.tokenizer.eot_id
    ids = dict(pad_token_id=pad, eos_token_id=end, start_token_id=pad if config.pegasus else end)
    return replace(config, vocab_size=dataset.tokenizer.n_vocab, max_seq_len=seq_len, **ids)


class Attention(t5.Attention):
    """Attention of H heads of width K, with biases."""

    def __init__(self, config: Config, same_input: tuple[str, ...] = ()):
        super().__init__(config, same_input)
        D = config.d_model
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))


class MLP(t5.MLP):
    """wo(gelu(wi(x))), with the exact gelu, or with relu."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.activation = F.gelu if config.mlp == "gelu" else F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.activation(self.wi(x)))


class Block(t5.Block):
    """One layer: self attention, in a decoder cross attention, and an MLP."""

    def __init__(self, config: Config, layer: int, is_decoder: bool):
        nn.Module.__init__(self)
        cross = {"EncDecAttention": Attention(config)} if is_decoder else {}
        parts = {"SelfAttention": Attention(config, ("q", "k", "v")), **cross, "DenseReluDense": MLP(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": Norm(config.d_model, config, "layer")})
            for name, part in parts.items()
        )
        self.number, self.post_norm = layer, not config.pegasus


class Stack(t5.Stack):
    """The encoder, or the decoder, with its own table of positions."""

    def __init__(self, config: Config, is_decoder: bool):
        nn.Module.__init__(self)
        self.config, self.is_decoder, D = config, is_decoder, config.d_model
        self.relative_attention_bias = None
        self.offset = 0 if config.pegasus else 2  # rows of the table that are never used
        self.embed_positions = nn.Embedding(config.max_seq_len + self.offset, D)
        self.embed_positions.weight.requires_grad_(not config.pegasus)
        self.layernorm_embedding = None if config.pegasus else Norm(D, config, "layer")
        self.block = nn.ModuleList(Block(config, i, is_decoder) for i in range(config.n_layers))
        self.final_layer_norm = Norm(D, config, "layer") if config.pegasus else None


class BART(t5.T5):
    """BART or PEGASUS: an encoder, a decoder, and the embeddings of tokens, which are also the head."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        self.config = config
        # As in the published code, the embedding of padding gets no gradient as an input of the stacks, not
        # even in PEGASUS, whose decoder starts with it.
        self.shared = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.encoder, self.decoder = Stack(config, False), Stack(config.decoder, True)
        self.lm_head = None
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.has_bias = False  # True for a buffer that is not zero; formats/bart.py sets it
        self.decoding = Decoding()
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw matrices and embeddings from N(0, 0.02^2), compute sinusoids, and set biases to 0, norms to 1.

        Raises ValueError for a parameter without a rule.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1.0)
            elif not p.requires_grad:
                p.copy_(self.config.sinusoids())
            elif p.ndim == 2:
                p.normal_(std=0.02)
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to BART.initialize")

    def embed(self, tokens: Tensor, start: Tensor, stack: Stack) -> Tensor:
        """Return the input (B, T, D) of a stack for tokens (B, T).

        start: the position of the first token, () for all rows or (B,). Raises ValueError for more tokens
        than there are positions.
        """
        n, limit = tokens.shape[1], self.config.max_seq_len
        if n > limit:
            raise ValueError(f"{n} tokens: this model reads and writes at most {limit}")
        scale = math.sqrt(self.config.d_model) if self.config.scale_embedding else 1.0
        positions = start[..., None] + torch.arange(n, device=tokens.device) + stack.offset
        x = self.shared(tokens) * scale + stack.embed_positions(positions)
        return x if stack.layernorm_embedding is None else stack.layernorm_embedding(x)

    @property
    def head_weight(self) -> Tensor:
        """Return the matrix (V, D) of the head. With a bias it is (V, D + 1), the bias in its last column,
        since the kernels of the loss take no bias; `scaled` appends the 1 that it is multiplied by."""
        weight = self.shared.weight
        return torch.cat((weight, self.final_logits_bias.T.to(weight.dtype)), 1) if self.has_bias else weight

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return hidden states (..., D) as the head multiplies them: for a bias, with a 1 at the end."""
        return F.pad(hidden, (0, 1), value=1.0) if self.has_bias else hidden

    def generate(
        self, inputs: Tensor | Sequence[Sequence[int]], max_new_tokens: int | None = None, **options
    ) -> list[list[int]]:
        """Return the output of each input, as `beam_search.generate`; the default length is the checkpoint's.

        Where the checkpoint has `rules`, temperature must be 0, which takes the likeliest token that they
        allow. Raises ValueError for other temperatures and options with such a checkpoint.
        """
        if self.rules == writing.Rules():
            return writing.generate(self, inputs, self.length(max_new_tokens), **options)
        options.pop("generator", None)  # nothing is drawn
        if options.pop("temperature", 1.0) != 0 or options:
            raise ValueError(f"generate: {self.rules}: only with temperature 0 alone, or beam_search")
        return self.beam_search(inputs, max_new_tokens, n_beams=1, early_stopping=True)

    def beam_search(
        self, inputs: Tensor | Sequence[Sequence[int]], max_new_tokens: int | None = None, **options
    ) -> list[list[int]]:
        """Return the best output found for each input. options: as for language/beam_search.py; those of the
        checkpoint (`decoding`) are the defaults."""
        defaults = {
            "n_beams": self.decoding.num_beams,
            "length_penalty": self.decoding.length_penalty,
            "early_stopping": self.decoding.early_stopping,
            "rules": self.rules,
        }
        return writing.beam_search(self, inputs, self.length(max_new_tokens), **defaults | options)

    @property
    def rules(self) -> writing.Rules:
        """Return the checkpoint's rules for outputs, such as forced tokens: see language/beam_search.py."""
        return writing.Rules(
            **{name: getattr(self.decoding, name) for name in writing.Rules.__dataclass_fields__}
        )

    def length(self, max_new_tokens: int | None) -> int:
        """Return the largest number of tokens of an output: max_new_tokens, or that of the checkpoint.

        Raises ValueError for more than there are positions, and where neither is given.
        """
        limit, n = self.config.max_seq_len, max_new_tokens
        if n is None and self.decoding.max_length:
            n = self.decoding.max_length - 1  # without the start token
        if n is None or not 0 < n <= limit:
            raise ValueError(f"generate: max_new_tokens {n}: expected 1 to {limit}, the model's positions")
        return n

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "BART":
        """Return the BART or PEGASUS in a directory of Hugging Face."""
        return bart.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as Hugging Face's BART or PEGASUS."""
        bart.save(self, directory)


Model = BART

if __name__ == "__main__":
    command.run(lambda: writing.main(BART, SIZES))  # print the sizes, or write the output for a text
