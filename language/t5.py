"""T5: an encoder in which every token of a text sees all others, and a decoder that writes another text.

    p(y_1 ... y_T | x) = prod_i p(y_i | y_1 ... y_{i-1}, x)         loss = -mean_i log p(y_i | y_<i, x)

    m = embedding of x;  m = m + attention(norm(m)),  m = m + mlp(norm(m))          L times: the memory
    y = embedding of (start, y_1 ... y_{T-1})
    y = y + causal attention(norm(y)),  y = y + attention from norm(y) to m,  y = y + mlp(norm(y))

Attention between the stacks, called cross attention, has queries from the decoder, and keys and values from
the memory. One class is three models:

    the original    Attention Is All You Need (Vaswani et al. 2017): LayerNorm after the sums, sinusoids,
                    embeddings times sqrt(D), scores times 1 / sqrt(K), biases in MLP and norms
    T5              Raffel et al. 2019: RMSNorm before layers and at the end, relative positions, no biases,
                    scores without 1 / sqrt(K); the head is the matrix of embeddings / sqrt(D)
    T5 1.1          the same with a gated MLP (GeGLU, Shazeer 2020) and a head of its own, not divided;
                    mT5 (Xue et al. 2020) is T5 1.1 in 101 languages

Relative positions: the score of query i and key j gets a learned number that depends on the bucket of j - i.
Near distances have a bucket each, far ones share: see `buckets`. So a text may be longer than in training.
The layers of a stack share one table; cross attention has none. Parameters are named as in Hugging Face's T5.

    python -m language.t5                                          print the sizes
    python -m language.t5 runs/t5/model --text "import <extra_id_0>" --beams 4
    python train.py --model t5                                     train one: language/span_corruption.py

Shapes: B batch, S input and T output tokens, D model width, H heads, K head width, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import command, encoder_decoders
from formats.config_values import check_values
from generate import KVCache
from gpt import Norm
from kernels import attention, gelu, linear_cross_entropy, products
from language import beam_search

TASK, KIND = "span_corruption", "encoder-decoder"


@dataclass(frozen=True)
class Config:
    n_layers: int  # of the encoder
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 32128
    d_head: int = 64  # n_heads * d_head need not be d_model
    n_decoder_layers: int | None = None  # None: n_layers
    mlp: str = "relu"  # or "geglu": gelu(wi_0 x) * (wi_1 x), with the tanh form
    original: bool = False  # the Transformer of 2017
    n_buckets: int = 32  # of relative positions
    max_distance: int = 128  # from here on, all distances share the last bucket
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the head is the embedding matrix
    scale_head: bool = True  # hidden states times 1 / sqrt(D) before the head
    max_seq_len: int = 512  # tokens of an input in training; the model itself has no limit
    pad_token_id: int = 0
    eos_token_id: int = 1
    start_token_id: int = 0  # the first token that the decoder reads
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("pad_token_id", "eos_token_id", "start_token_id")

    def __post_init__(self):
        check_values(self, mlp=("relu", "geglu"))
        if self.n_buckets % 4 or self.max_distance <= self.n_buckets // 2:
            raise ValueError(
                f"n_buckets {self.n_buckets}, max_distance {self.max_distance}: expected a multiple of 4, "
                "and a distance above half of it"
            )
        if self.original and (self.mlp != "relu" or not self.tie_embeddings or self.d_model % 2):
            raise ValueError("original True: the Transformer of 2017 has mlp relu, tied head, even d_model")

    @property
    def decoder(self) -> "Config":
        """Return the config whose n_layers are those of the decoder."""
        return replace(self, n_layers=self.n_decoder_layers or self.n_layers)

    G = property(lambda self: self.n_heads)  # for `KVCache` of generate.py, as are K and `layer_window`
    K = property(lambda self: self.d_head)
    positions = property(lambda self: "sinusoidal" if self.original else "relative")

    def layer_window(self, layer: int) -> None:
        """Return None: no layer has a window."""

    def flops(self, S: int, T: int) -> int:
        """Return the FLOPs of matrix products, forward, for an input of S tokens and an output of T.

        A weight costs 2 for each token that it multiplies; those of the keys and values of cross attention
        multiply the S input tokens. A pair of a query and a key costs 4 K in each head.
        """
        D, HK, L, L_d = self.d_model, self.n_heads * self.d_head, self.n_layers, self.decoder.n_layers
        mlp = (3 if self.mlp == "geglu" else 2) * D * self.d_ff
        encoder = 2 * S * L * (4 * D * HK + mlp) + 4 * S * S * HK * L
        decoder = 2 * T * L_d * (6 * D * HK + mlp) + 2 * S * L_d * 2 * D * HK
        pairs = T * (T + 1) // 2 + S * T  # of a query and a key that it sees: causal, then cross attention
        return encoder + decoder + 4 * pairs * HK * L_d + 2 * T * D * self.vocab_size


V11 = dict(mlp="geglu", tie_embeddings=False, scale_head=False)

SIZES = {
    "tiny": Config(2, 4, 128, 256, 4224, 32, mlp="geglu", scale_head=False, max_seq_len=256),
    "small": Config(6, 8, 512, 2048),
    "base": Config(12, 12, 768, 3072),
    "large": Config(24, 16, 1024, 4096),
    "3b": Config(24, 32, 1024, 16384, d_head=128),
    "11b": Config(24, 128, 1024, 65536, d_head=128),
    "1.1-small": Config(8, 6, 512, 1024, **V11),
    "1.1-base": Config(12, 12, 768, 2048, **V11),
    "1.1-large": Config(24, 16, 1024, 2816, **V11),
    "1.1-xl": Config(24, 32, 2048, 5120, **V11),
    "1.1-xxl": Config(24, 64, 4096, 10240, **V11),
    "transformer-base": Config(6, 8, 512, 2048, 37000, original=True),
    "transformer-big": Config(6, 16, 1024, 4096, 37000, original=True),
}
V11_SIZES = {name.removeprefix("1.1-"): config for name, config in SIZES.items() if name.startswith("1.1-")}
SIZES |= {f"mt5-{name}": replace(config, vocab_size=250112) for name, config in V11_SIZES.items()}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the vocabulary and special tokens of the data, for inputs of seq_len tokens."""
    tokenizer = dataset.tokenizer
    ids = dict(pad_token_id=tokenizer.pad_id, start_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eot_id)
    return replace(config, vocab_size=tokenizer.n_vocab, max_seq_len=seq_len, **ids)


def buckets(distance: Tensor, n: int, longest: int, both_sides: bool) -> Tensor:
    """Return the bucket, 0 to n - 1, of each distance j - i from a query i to a key j.

    both_sides: keys after the query have the upper half of the buckets; otherwise, in a decoder, all keys
    after it are in bucket 0. Of the m buckets of a side, distances d below m / 2 have one each; for larger d
    the bucket grows with log d, up to `longest` (Raffel et al. 2019, section 2.1), rounded as in their code.
    """
    side = torch.zeros_like(distance)
    if both_sides:
        n //= 2
        side, d = (distance > 0).long() * n, distance.abs()
    else:
        d = (-distance).clamp(min=0)
    exact = n // 2
    grown = torch.log(d.clamp(min=1).float() / exact) / math.log(longest / exact) * (n - exact)
    far = (exact + grown.long()).clamp(max=n - 1)
    return side + torch.where(d < exact, d, far)


def sinusoids(start: Tensor, T: int, D: int) -> Tensor:
    """Return (..., T, D) for the T positions from start (...) on: feature 2 i of position p is
    sin(p / 10000^(2 i / D)), feature 2 i + 1 its cosine (Vaswani et al. 2017, section 3.5)."""
    p = start[..., None, None] + torch.arange(T, device=start.device)[:, None]  # (..., T, 1)
    angles = p * 10000.0 ** (-torch.arange(0, D, 2, device=start.device) / D)  # (..., T, D / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Attention of H heads of width K. same_input: layers that kernels/few_rows.py may join."""

    def __init__(self, config: Config, same_input: tuple[str, ...] = ()):
        super().__init__()
        D, inner = config.d_model, config.n_heads * config.d_head
        self.q, self.k, self.v = (nn.Linear(D, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, D, bias=False)
        self.same_input, self.K, self.backend = same_input, config.d_head, config.kernels
        self.scale = 1 / math.sqrt(config.d_head) if config.original else 1.0

    def heads(self, x: Tensor) -> Tensor:
        """Return x (B, T, H K) as (B, T, H, K)."""
        return x.view(*x.shape[:2], -1, self.K)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, S, H, K) of x (B, S, D)."""
        return self.heads(self.k(x)), self.heads(self.v(x))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
        """Return (B, T, D) of queries q (B, T, H K), to k and v (B, S, H, K)."""
        y = attention(self.heads(q), k, v, scale=self.scale, backend=self.backend, **mask)
        return self.o(y.flatten(2))  # (B, T, H, K) -> (B, T, D)


class MLP(nn.Module):
    """wo(relu(wi(x))), or wo(gelu(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gated = config.mlp == "geglu"
        self.same_input = ("wi_0", "wi_1") if self.gated else ("wi",)
        for name in self.same_input:
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=config.original))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=config.original)

    def forward(self, x: Tensor) -> Tensor:
        inner, *factor = products(self, x)
        return self.wo(gelu(inner) * factor[0] if self.gated else F.relu(inner))


class Block(nn.Module):
    """One layer: self attention, in a decoder also cross attention, and an MLP, each added to its input."""

    def __init__(self, config: Config, layer: int, is_decoder: bool):
        super().__init__()
        cross = {"EncDecAttention": Attention(config)} if is_decoder else {}
        parts = {"SelfAttention": Attention(config, ("q", "k", "v")), **cross, "DenseReluDense": MLP(config)}
        kind = "layer" if config.original else "rms"
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": Norm(config.d_model, config, kind)})
            for name, part in parts.items()
        )
        self.number, self.post_norm = layer, config.original

    def add(self, x: Tensor, norm: Norm, f) -> Tensor:
        """Return x + f(norm(x)), or in the original norm(x + f(x))."""
        return norm(x + f(x)) if self.post_norm else x + f(norm(x))

    def forward(self, x: Tensor, mask: dict, cache: KVCache | None, memory=None, memory_mask=None) -> Tensor:
        """Return (B, T, D) of x (B, T, D). mask: the options of self attention. memory, in a decoder: that of
        the encoder (B, S, D), or `T5.cross` of it; memory_mask: the options of cross attention."""

        def attend(y: Tensor) -> Tensor:
            own, its_mask = self.layer[0].SelfAttention, mask
            q, k, v = products(own, y)
            k, v = own.heads(k), own.heads(v)
            if cache is not None:
                k, v, its_mask = cache.store(self.number, k, v, mask)
                its_mask = its_mask | {"bias": mask.get("bias")}
            return own(q, k, v, **its_mask)

        x = self.add(x, self.layer[0].layer_norm, attend)
        if memory is not None:
            cross = self.layer[1].EncDecAttention
            k, v = cross.keys_values(memory) if isinstance(memory, Tensor) else memory[self.number]
            x = self.add(x, self.layer[1].layer_norm, lambda y: cross(cross.q(y), k, v, **memory_mask))
        return self.add(x, self.layer[-1].layer_norm, self.layer[-1].DenseReluDense)


class Stack(nn.Module):
    """The encoder, or the decoder: L layers, and the table of relative positions that they share."""

    def __init__(self, config: Config, is_decoder: bool):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.block = nn.ModuleList(Block(config, i, is_decoder) for i in range(config.n_layers))
        self.final_layer_norm = None if config.original else Norm(config.d_model, config, "rms")
        table = None if config.original else nn.Embedding(config.n_buckets, config.n_heads)
        self.relative_attention_bias = table

    def bias(self, reach: int = 0) -> Tensor | None:
        """Return the bias (H, 2 R + 1) of self attention at distances -R to R, or None. It is constant beyond
        max_distance, so R is that, or reach if larger: attention then needs only a slice."""
        if self.relative_attention_bias is None:
            return None
        config, table = self.config, self.relative_attention_bias.weight
        R = max(reach, config.max_distance)
        distance = torch.arange(-R, R + 1, device=table.device)
        return table[buckets(distance, config.n_buckets, config.max_distance, not self.is_decoder)].T

    def forward(self, x: Tensor, mask: dict, cache: KVCache | None = None, bias=None, **memory) -> Tensor:
        """Return the last states (B, T, D) of embeddings x (B, T, D). bias: `bias()`; memory: see `Block`."""
        mask = mask | {"bias": self.bias() if bias is None else bias}
        for block in self.block:
            x = block(x, mask, cache, **memory)
        return x if self.final_layer_norm is None else self.final_layer_norm(x)


class T5(nn.Module):
    """The encoder-decoder: an encoder, a decoder, the embeddings that both read, and the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder, self.decoder = Stack(config, False), Stack(config.decoder, True)
        untied = not config.tie_embeddings
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if untied else None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw matrices from N(0, s^2) with s = 1 / sqrt(width of the input); queries of T5 get the factor
        1 / sqrt(K) besides, which the scores lack. Raises ValueError for a parameter without a rule.

        T5 draws embeddings from N(0, 1) for Adafactor, whose steps are in proportion to the weights. AdamW's
        are not: embeddings so large would hardly move. Here s is 1 / sqrt(D) for them.
        """
        D, K = self.config.d_model, self.config.d_head
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "layer_norm" in name:
                p.fill_(1.0)
            elif name.endswith(("shared.weight", "lm_head.weight", "relative_attention_bias.weight")):
                p.normal_(std=D**-0.5)
            elif name.endswith(".q.weight") and not self.config.original:
                p.normal_(std=(D * K) ** -0.5)
            elif p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                raise ValueError(f"parameter {name}: no rule of initialisation; add one to T5.initialize")

    def embed(self, tokens: Tensor, start: Tensor, stack: Stack) -> Tensor:
        """Return the input (B, T, D) of a stack for tokens (B, T), the first at `start`, () or (B,)."""
        x, config = self.shared(tokens), self.config
        if config.original:
            x = x * math.sqrt(config.d_model) + sinusoids(start, tokens.shape[1], config.d_model).to(x.dtype)
        return x

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, D) of inputs tokens (B, S), int64.

        lengths (B,): how many tokens of each row are input; what follows is padding, which nothing else sees.
        """
        B, S = tokens.shape
        x, mask = self.embed(tokens, tokens.new_zeros(()), self.encoder), {}
        if lengths is not None:
            # Pack them into one row of 2 B documents: the tokens of each input, and its padding.
            starts = S * torch.arange(B, device=tokens.device)
            ends = torch.stack((starts, starts + lengths), 1).flatten()
            mask = {"cu_seqlens": torch.cat((ends, ends.new_tensor([B * S]))).int()}
            x = x.view(1, B * S, -1)
        return self.encoder(x, mask).view(B, S, -1)

    def cross(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values (B, S, H, K) of the memory (B, S, D) in each layer of the decoder."""
        return [block.layer[1].EncDecAttention.keys_values(memory) for block in self.decoder.block]

    def decode(self, tokens: Tensor, memory, lengths=None, cache: KVCache | None = None, bias=None) -> Tensor:
        """Return the hidden states (B, T, D) of the decoder for its tokens (B, T). memory: (B, S, D), or
        `cross` of it; lengths: as for `encode`; cache: see generate.py; bias: see `Stack.bias`."""
        T, mask = tokens.shape[1], {"seqlens_k": lengths}
        start = tokens.new_zeros(()) if cache is None else cache.positions(T, tokens.device)[:, 0]
        x = self.embed(tokens, start, self.decoder)
        return self.decoder(x, {"causal": True}, cache, bias, memory=memory, memory_mask=mask)

    @property
    def head_weight(self) -> Tensor:
        """Return the matrix (V, D) of the head."""
        return (self.shared if self.lm_head is None else self.lm_head).weight

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return hidden states (..., D) as the head multiplies them: in T5 1.0 times 1 / sqrt(D)."""
        is_scaled = self.config.scale_head and not self.config.original
        return hidden * self.config.d_model**-0.5 if is_scaled else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D) of the decoder."""
        hidden = self.scaled(hidden)
        return F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)

    def shifted(self, targets: Tensor) -> Tensor:
        """Return what the decoder reads to predict targets (B, T): the start token, then all but the last.
        A target of -100, which is not predicted, is read as padding."""
        start = targets.new_full((len(targets), 1), self.config.start_token_id)
        before = torch.cat((start, targets[:, :-1]), dim=1)
        return before.masked_fill(before < 0, self.config.pad_token_id)

    def hidden(self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) from which targets (B, T) are predicted; see `encode`."""
        return self.decode(self.shifted(targets), self.encode(tokens, lengths), lengths)

    def forward(self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of targets (B, T), each given those before it and the tokens (B, S)."""
        return self.logits(self.hidden(tokens, targets, lengths))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean nats per target that is not -100, and no metrics. batch: "tokens" (B, S), "targets"
        (B, T), and "lengths" (B,) where inputs are padded."""
        hidden = self.scaled(self.hidden(batch["tokens"], batch["targets"], batch.get("lengths")))
        targets = batch["targets"].contiguous()
        return linear_cross_entropy(hidden, self.head_weight, targets, backend=self.config.kernels)[0], {}

    def flops_per_token(self, seq_len: int, n_targets: int | None = None) -> int:
        """Return the FLOPs of training, forward and backward, per token of an input of seq_len tokens whose
        output has n_targets (None: seq_len)."""
        return 3 * self.config.flops(seq_len, seq_len if n_targets is None else n_targets) // seq_len

    # Functions of language/beam_search.py with this model as their first argument.
    generate = beam_search.generate
    beam_search = beam_search.beam_search

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "T5":
        """Return the model in a directory: T5 or mT5 of Hugging Face, or an original Transformer of ours."""
        return encoder_decoders.load(cls, Config, directory, kernels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as Hugging Face's T5, or an original Transformer in our own layout."""
        encoder_decoders.save(self, directory)


Model = T5

if __name__ == "__main__":
    command.run(lambda: beam_search.main(T5, SIZES))  # print the sizes, or write the output for a text
