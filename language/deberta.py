"""DeBERTa: an encoder whose attention keeps apart what a token is and how far away it stands.

    A_ij = (q_i . k_j  +  q_i . Kr[i - j]  +  k_j . Qr[i - j]) / sqrt(3 K)
            content,      content to           position to
                          position (c2p)       content (p2c)

Kr and Qr are projections of one table, which has an embedding for each distance and which all layers share.
With only one of c2p and p2c the scale is 1 / sqrt(2 K). The rest is a layer of BERT. The paper has j - i in
the third term; its code, and so every published model, has i - j in both.

    v1    He et al. 2020, arXiv:2006.03654: a row of the table per distance, own projections for Kr and Qr
    v2    the same authors' code of 2021: far distances share rows (`buckets`), the table is normalised, Kr
          and Qr are made by the projections of keys and queries; the largest models add a convolution
    v3    He et al. 2021, arXiv:2111.09543: v2 without the convolution, trained by language/deberta_v3.py

Absolute positions enter only at the end, in the enhanced mask decoder (section 3.2 of the first paper). Let X
be the input of the last layer, P the embeddings of positions, and E those of tokens:

    z = X + P;   twice, with the weights of the last layer:  z = layer(queries z, keys and values X)
    p(x_i) = softmax(E transform(z_i) + b)

The scores need q_i . Kr[i - j] for all i and j. These are in one product, (T, 2T), of the queries with the
rows of all distances in order: row i of it is read from column T - i on (`skew`). No tensor is (T, T, K).

    python -m language.deberta                                          print the sizes
    python -m language.deberta runs/deberta/model --text "import [MASK]"
    python train.py --model deberta                                     train one: language/masking.py

Shapes: B batch, T tokens of a row, D model width, H heads, K head width, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import BERT, MaskedLMHead, dense_and_norm, norm
from data.rows import Dataset
from engine import activations
from formats import command, disentangled_encoders
from formats.config_values import check_values
from language import encoder_inference

TASK, KIND = "masking", "encoder"
STEPS = 2700
LEARNING_RATE = 0.25  # times the default rate of a decoder of this size, as for bert.py


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 128100
    max_seq_len: int = 512  # tokens
    max_distance: int = 512  # tokens; all distances from here on share a row of the table
    n_buckets: int | None = 256  # rows of the table for each direction; None: one per distance
    share_keys: bool = True  # Kr and Qr are made by the projections of keys and queries
    norm_table: bool = True  # LayerNorm of the table
    conv_width: int = 0  # tokens that the convolution reads, an odd number; 0: no convolution
    original: bool = False  # the layers of v1: no bias for keys and Kr
    c2p: bool = True  # content to position
    p2c: bool = True  # position to content
    absolute: str = "decoder"  # where positions enter: "decoder"; "input", as in BERT; or "none"
    n_segments: int = 0  # 0: no segment embeddings
    norm_eps: float = 1e-7
    mlm_head: bool = True  # the masked-language-model head
    tie_embeddings: bool = True  # that head multiplies by the embeddings
    pad_token_id: int = 0
    MAY_BE_ZERO = ("n_segments", "conv_width", "pad_token_id")

    # Fields of bert.Config that the parts of bert.py read. They are the same in every DeBERTa.
    mlp, bias, pre_norm, pooler, pair = "gelu", True, False, False, "none"

    def __post_init__(self):
        check_values(self, absolute=("decoder", "input", "none"))
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_buckets and not 1 <= self.n_buckets // 2 < self.max_distance - 1:
            raise ValueError(
                f"n_buckets {self.n_buckets}: expected 2 to {2 * self.max_distance - 3}, or None"
            )
        if self.conv_width and self.conv_width % 2 == 0:
            raise ValueError(f"conv_width {self.conv_width}: expected an odd number of tokens, or 0")
        if not (self.c2p or self.p2c):
            raise ValueError("c2p False and p2c False: no term has a distance; leave one of them True")
        if self.original and (self.n_buckets or self.share_keys or self.norm_table or self.conv_width):
            raise ValueError(
                "original True: needs n_buckets None, share_keys, norm_table False, conv_width 0"
            )
        if not self.tie_embeddings and self.absolute == "decoder":
            raise ValueError("tie_embeddings False needs absolute 'input' or 'none'")

    E = property(lambda self: self.d_model)  # the width of the embeddings
    K = property(lambda self: self.d_model // self.n_heads)
    has_decoder = property(lambda self: self.absolute == "decoder" and self.mlm_head)


V1 = dict(n_buckets=None, share_keys=False, norm_table=False, original=True)
BASE, LARGE, XL = (12, 12, 768, 3072), (24, 16, 1024, 4096), (24, 24, 1536, 6144)

SIZES = {
    "tiny": Config(4, 4, 128, 256, 4096, 128, max_distance=128, n_buckets=64),
    "base": Config(*BASE, 50265, **V1),
    "large": Config(*LARGE, 50265, **V1),
    "xlarge": Config(48, *LARGE[1:], 50265, **V1),
    "v2-xlarge": Config(*XL, conv_width=3),
    "v2-xxlarge": Config(48, *XL[1:], conv_width=3),
    "v3-xsmall": Config(12, 6, 384, 1536),
    "v3-small": Config(6, *BASE[1:]),
    "v3-base": Config(*BASE),
    "v3-large": Config(*LARGE),
    "mdeberta-v3-base": Config(*BASE, 251000),
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the vocabulary of dataset.tokenizer, for rows of seq_len tokens."""
    tokenizer = dataset.tokenizer
    return replace(config, vocab_size=tokenizer.n_vocab, max_seq_len=seq_len, pad_token_id=tokenizer.pad_id)


def buckets(distance: Tensor, n: int | None, longest: int) -> Tensor:
    """Return the bucket of each distance i - j of a query i from a key j, with the sign of the distance.

    The absolute distances up to n / 2 have a bucket each. Beyond, the bucket grows with the logarithm of the
    distance, to n - 1 at longest - 1, and is rounded up (T5 rounds down). n None: the distance itself.
    """
    if n is None:
        return distance
    half = n // 2
    d = distance.abs().clamp(min=half).double()
    far = half + torch.ceil((d / half).log() / math.log((longest - 1) / half) * (half - 1))
    return torch.where(distance.abs() <= half, distance, distance.sign() * far.long())


def rows_of_distances(T: int, config: Config) -> Tensor:
    """Return the row of the table for each of the distances T, T - 1, ..., 1 - T: int64 (2T,).

    The table has 2 s rows: row s is of distance 0, rows behind it are of positive distances, rows before it
    of negative ones. Distances beyond the table have its first or its last row.
    """
    s = config.n_buckets or config.max_distance
    distance = torch.arange(T, -T, -1)
    return (buckets(distance, config.n_buckets, config.max_distance) + s).clamp(0, 2 * s - 1)


def skew(x: Tensor) -> Tensor:
    """Return y (..., T, T), a view of x (..., T, 2T), with y[i, j] = x[i, T + j - i].

    Row i of y begins at column T - i of row i of x: 2T - 1 numbers behind the beginning of row i - 1.
    """
    T = x.shape[-2]
    return x.flatten(-2)[..., T:].unflatten(-1, (T, 2 * T - 1))[..., :T]


class Attention(nn.Module):
    """Disentangled attention (He et al. 2020, section 3.1)."""

    def __init__(self, config: Config):
        super().__init__()
        D, biased, own = config.d_model, not config.original, not config.share_keys
        self.query_proj, self.value_proj = nn.Linear(D, D), nn.Linear(D, D)
        self.key_proj = nn.Linear(D, D, bias=biased)
        self.pos_key_proj = nn.Linear(D, D, bias=biased) if own and config.c2p else None
        self.pos_query_proj = nn.Linear(D, D) if own and config.p2c else None
        self.config = config
        self.scale = 1 / math.sqrt((1 + config.c2p + config.p2c) * config.K)

    def heads(self, x: Tensor) -> Tensor:
        """Return x (..., T, D) as (..., H, T, K)."""
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(-3, -2)

    def forward(self, z: Tensor, x: Tensor, relative: Tensor, padding: Tensor | None) -> Tensor:
        """Return the mixed values (B, T, D), for queries from z, of keys and values from x, both (B, T, D).

        relative: the embeddings of the distances T ... 1 - T, (2T, D). padding: True for keys to leave out,
        (B, 1, 1, T); None: all are read.
        """
        q = self.heads(self.query_proj(z)) * self.scale  # (B, H, T, K)
        k, v = self.heads(self.key_proj(x)), self.heads(self.value_proj(x))  # (B, H, T, K)
        scores = q @ k.mT  # (B, H, T, T)
        if self.config.c2p:
            keys = self.heads((self.pos_key_proj or self.key_proj)(relative))  # (H, 2T, K)
            scores = scores + skew(q @ keys.mT)  # column T + j - i of row i is distance i - j
        if self.config.p2c:
            queries = self.heads((self.pos_query_proj or self.query_proj)(relative))  # (H, 2T, K)
            queries = queries.flip(-2).roll(1, -2)  # distance T (not used), then 1 - T ... T - 1
            # Row j belongs to key j here, and its column T + i - j to distance i - j.
            scores = scores + skew(k @ (self.scale * queries).mT).mT
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, H, T, K) -> (B, T, D)


class Block(nn.Module):
    """One layer of BERT, with its norms after the sums, and disentangled attention."""

    def __init__(self, config: Config):
        super().__init__()
        D, inner = config.d_model, config.d_ff
        self.attention = nn.ModuleDict({"self": Attention(config), "output": dense_and_norm(D, D, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, inner)})
        self.output = dense_and_norm(inner, D, config)

    def forward(self, z: Tensor, x: Tensor, relative: Tensor, padding: Tensor | None) -> Tensor:
        """Return the layer's output (B, T, D) for z (B, T, D); arguments as for `Attention.forward`."""
        attend, output = self.attention.self, self.attention.output
        z = output.LayerNorm(z + output.dense(attend(z, x, relative, padding)))
        return self.output.LayerNorm(z + self.output.dense(F.gelu(self.intermediate.dense(z))))


class Convolution(nn.Module):
    """The convolution of v2: norm(x + gelu(conv(embeddings))), where x is the output of the first layer."""

    def __init__(self, config: Config):
        super().__init__()
        D, width = config.d_model, config.conv_width
        self.conv = nn.Conv1d(D, D, width, padding=width // 2)
        self.LayerNorm = norm(D, config)

    def forward(self, embeddings: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
        """Return the input (B, T, D) of the second layer. embeddings: the input of the first, (B, T, D). real
        (B, T, 1): False for padding, whose output is 0; None: no padding."""
        local = self.conv(embeddings.mT).mT  # (B, T, D)
        local = local if real is None else local * real
        x = self.LayerNorm(x + F.gelu(local))
        return x if real is None else x * real


class DeBERTa(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D = config.d_model
        # Embeddings, which are added up and then normalised.
        embeddings = {"word_embeddings": nn.Embedding(config.vocab_size, D), "LayerNorm": norm(D, config)}
        if config.absolute != "none":
            embeddings["position_embeddings"] = nn.Embedding(config.max_seq_len, D)
        if config.n_segments:
            embeddings["token_type_embeddings"] = nn.Embedding(config.n_segments, D)
        # The layers, and the table of distances.
        encoder = {"layer": nn.ModuleList(Block(config) for _ in range(config.n_layers))}
        encoder["rel_embeddings"] = nn.Embedding(2 * (config.n_buckets or config.max_distance), D)
        if config.norm_table:
            encoder["LayerNorm"] = norm(D, config)
        if config.conv_width:
            encoder["conv"] = Convolution(config)
        parts = {"embeddings": nn.ModuleDict(embeddings), "encoder": nn.ModuleDict(encoder)}
        self.deberta, self.cls = nn.ModuleDict(parts), nn.ModuleDict()
        if config.mlm_head:
            self.cls["predictions"] = MaskedLMHead(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the parameters as in bert.py: N(0, 0.02^2), matrices of other widths than 768 scaled so that
        their products have the same variance, biases 0. Raises ValueError for one without a rule."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim == 1 and "LayerNorm" in name:
                p.fill_(1.0)
            elif "embeddings." in name:
                p.normal_(std=0.02)
            elif p.ndim == 2 or ".conv." in name:
                p.normal_(std=0.02 * math.sqrt(768 / self.config.d_model))
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to initialize")

    @property
    def embedding_weight(self) -> Tensor:
        """Return the embeddings of all tokens, (V, D)."""
        return self.deberta.embeddings.word_embeddings.weight

    @property
    def head_weight(self) -> Tensor:
        """Return the matrix (V, D) of the masked-language-model head."""
        return self.embedding_weight if self.config.tie_embeddings else self.cls.predictions.decoder.weight

    def embed_words(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of tokens (B, T), before anything is added to them."""
        return self.deberta.embeddings.word_embeddings(tokens)

    def embed(self, tokens: Tensor, segments: Tensor | None, real: Tensor | None) -> Tensor:
        """Return the input (B, T, D) of the first layer, 0 where real (B, T, 1) is False."""
        config, embeddings = self.config, self.deberta.embeddings
        x = self.embed_words(tokens)
        if config.absolute == "input":
            x = x + embeddings.position_embeddings.weight[: tokens.shape[1]]
        if config.n_segments:
            segments = torch.zeros_like(tokens) if segments is None else segments
            x = x + embeddings.token_type_embeddings(segments)
        x = embeddings.LayerNorm(x)
        return x if real is None else x * real

    def encode(self, tokens: Tensor, segments: Tensor | None, lengths: Tensor | None, decode: bool) -> Tensor:
        """Return the last hidden states (B, T, D) of tokens (B, T); with decode those of the mask decoder.

        lengths (B,): how many tokens of each row are real; behind them is padding, which no token reads.
        Raises ValueError for rows longer than max_seq_len.
        """
        T, config, encoder = tokens.shape[1], self.config, self.deberta.encoder
        if config.max_seq_len < T:
            raise ValueError(f"a text of {T} tokens: this model reads at most {config.max_seq_len}")
        real = padding = None
        if lengths is not None:
            real = torch.arange(T, device=tokens.device)[:, None] < lengths[:, None, None]  # (B, T, 1)
            padding = ~real[:, None].mT  # (B, 1, 1, T)

        # The embeddings of the distances in a row, which all layers share.
        table = encoder.rel_embeddings.weight
        table = encoder.LayerNorm(table) if config.norm_table else table
        relative = table[rows_of_distances(T, config).to(table.device)]  # (2T, D)

        # The layers; the convolution stands beside the first one. The decoder replaces the last one.
        x = embeddings = self.embed(tokens, segments, real)
        for i, layer in enumerate(encoder.layer[:-1] if decode else encoder.layer):
            x = layer(x, x, relative, padding)
            if i == 0 and config.conv_width:
                x = encoder.conv(embeddings, x, real)
        if not decode:
            return x

        # The mask decoder: the last layer twice, with queries that have positions.
        z = x + self.deberta.embeddings.position_embeddings.weight[:T]
        for _ in range(2):
            z = encoder.layer[-1](z, x, relative, padding)
        return z

    def run(self, tokens: Tensor, segments: Tensor | None, cu_seqlens: Tensor | None, decode: bool) -> Tensor:
        """Return the output of `encode`. Texts that are packed into one row, (1, N), get a row each, with
        padding: attention needs a matrix of scores for each, and the convolution must not mix two texts."""
        if cu_seqlens is None:
            return self.encode(tokens, segments, None, decode)
        lengths = cu_seqlens.diff()
        real = torch.arange(int(lengths.max()), device=tokens.device) < lengths[:, None]  # (n, longest)
        rows = [t if t is None else real.long().masked_scatter(real, t) for t in (tokens, segments)]
        return self.encode(*rows, lengths, decode)[real].view(*tokens.shape, -1)

    def hidden(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states (B, T, D) of tokens (B, T), int64; arguments as for `BERT.hidden`."""
        return self.run(tokens, segments, cu_seqlens, False)

    def head_input(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return what the masked-language-model head reads: the output (B, T, D) of the mask decoder, or in a
        model without one the last hidden states."""
        return self.run(tokens, segments, cu_seqlens, self.config.has_decoder)

    # Functions of bert.py with this model as their first argument.
    logits, forward = BERT.logits, BERT.forward

    def flops_per_token(self, seq_len: int, n_predicted: int | None = None) -> int:
        """Return the FLOPs of matrix products, forward and backward, per token of a row of seq_len tokens.

        They are counted as in bert.py. Each of c2p and p2c is a product with 2T rows and costs as much as
        content to content and the sums of values together. The decoder is one layer more. Left out are the
        projections of the table, once a layer and batch. The head runs at n_predicted places (None: all).
        """
        config, T = self.config, seq_len
        D, F = config.d_model, config.d_ff
        per_layer = 6 * (4 * D * D + 2 * D * F) + 12 * T * D * (1 + config.c2p + config.p2c)
        flops = (config.n_layers + config.has_decoder) * per_layer + 6 * config.conv_width * D * D
        per_place = config.mlm_head * (D * D + D * config.vocab_size)
        return flops + 6 * (T if n_predicted is None else n_predicted) * per_place // T

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "DeBERTa":
        """Return the model in a directory of Hugging Face, in its precision; ValueError names what is wrong.

        kernels: not used, there is no kernel in this model. The head of a discriminator is left out.
        """
        return disentangled_encoders.load(cls, Config, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors as Hugging Face's DeBERTa v1 or v2."""
        disentangled_encoders.save(self.config, self.state_dict(), directory)


Model = DeBERTa


def mlp_bytes(block: Block, config: Config, precision: activations.Precision) -> tuple[int, int]:
    """Return the bytes of `activations.mlp_bytes`, and those of the scores, which no kernel recomputes."""
    kept, gradients = activations.mlp_bytes(block, config, precision)
    per_score = precision.e + 4 * precision.autocast  # float32 of the softmax, and what the product reads
    scores = config.n_heads * config.max_seq_len
    return kept + scores * per_score, gradients + 8 * scores


if __name__ == "__main__":
    command.run(lambda: encoder_inference.main(DeBERTa, SIZES))  # print the sizes, or fill in masks
