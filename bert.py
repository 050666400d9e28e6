"""BERT: an encoder that sees a text from both sides, and learns by filling in what was masked.

    loss = -mean over masked i of log p(x_i | the corrupted text)

    h = embedding of the token + of its position + of its segment, normalised
    h = norm(h + attention(h)),  h = norm(h + mlp(h))           L times, no causal mask
    p(x_i) = softmax(E transform(h_i) + b)                      E the token embeddings, at masked i only

One class is five encoders, told apart by a handful of Config fields:

    BERT (Devlin et al. 2018)        segments and a pair objective, norms after the sums
    RoBERTa (Liu et al. 2019)        no segments, no pair objective, masks drawn anew each time
    ALBERT (Lan et al. 2019)         narrow embeddings (V x E, E x D), one layer's weights used L times
    ELECTRA (Clark et al. 2020)      BERT with narrow embeddings; its objective is in language/electra.py
    ModernBERT (Warner et al. 2024)  norms before the layers, rotary positions, GeGLU, no biases, most layers
                                     looking only at their neighbourhood

What is masked, and what is asked about pairs of segments, is in language/masking.py; what a trained one is for, in
language/encoder_inference.py. Texts of different lengths are laid end to end in one row, so nothing is ever padded. Parameters
carry the names of Hugging Face's BERT.

    python bert.py                                                     the sizes
    python bert.py runs/bert/model --text "import [MASK]"              fill in a mask
    python train.py --model bert                                       train one

Shapes: B batch, T tokens of a row, D model width, E embedding width, H heads, K head width, V vocabulary,
L layers, n masked tokens of a row.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import decoders, encoders
from gpt import rotate
from kernels import attention
from language import masking
from language.encoder_inference import fill_mask, fill_row


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 30522
    max_seq_len: int = 512  # tokens
    d_embedding: int | None = None  # E, narrower than d_model and then projected (ALBERT); None: d_model
    share_layers: bool = False  # one layer's weights serve all (ALBERT)
    n_segments: int = 2  # 0: no segment embeddings
    positions: str = "learned"  # or "rope"
    position_offset: int = 0  # rows of the position table that are never used (RoBERTa: 2)
    mlp: str = "gelu"  # or "gelu_tanh", its approximation (ALBERT), or "geglu" (Shazeer 2020)
    pre_norm: bool = False  # norms before the layers instead of after the sums
    bias: bool = True  # in linear layers and norms
    norm_eps: float = 1e-12
    rope_theta: float = 160_000.0
    window: int | None = None  # local layers see the tokens nearer than this
    global_every: int = 3  # with a window: layers 0, 3, 6 ... see everything
    local_rope_theta: float = 10_000.0
    pooler: bool = True  # tanh(W h) of the first token, for what is asked about the whole text
    mlm_head: bool = True
    pair: str = "none"  # or "nsp", next sentence (BERT), or "sop", sentence order (ALBERT)
    masking: str = "token"  # what is masked together: or "word", or "span" (SpanBERT)
    mask_rate: float = 0.15  # of the text's tokens
    span_boundary: bool = False  # predict a masked token also from what surrounds its span (SpanBERT)
    pad_token_id: int = 0
    kernels: str = "auto"  # the backend of kernels/, see kernels/attention.py

    def __post_init__(self):
        object.__setattr__(self, "d_embedding", self.d_embedding or self.d_model)
        choices = {
            "positions": ("learned", "rope"),
            "mlp": ("gelu", "gelu_tanh", "geglu"),
            "pair": ("none", "nsp", "sop"),
            "masking": ("token", "word", "span"),
        }
        for field, options in choices.items():
            if getattr(self, field) not in options:
                raise ValueError(f"{field} {getattr(self, field)!r}: expected {' or '.join(options)}")
        for field in ("n_layers", "n_heads", "d_model", "d_ff", "global_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)}: expected at least 1")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window {self.window!r}: expected at least 1, which lets a token see itself")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.positions == "rope" and self.d_model // self.n_heads % 2:
            width = self.d_model // self.n_heads
            raise ValueError(f"heads of width {width}: rotary positions turn pairs, so it must be even")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate {self.mask_rate}: expected between 0 and 1")
        if self.share_layers and self.pre_norm:
            raise ValueError("share_layers with pre_norm: layer 0 has no norm of its own to share")
        if self.pair != "none" and (not self.pooler or self.n_segments < 2):
            raise ValueError(f"pair {self.pair!r} needs pooler True and n_segments 2")

    def fitted(self, tokenizer: Tokenizer | WordPiece, max_seq_len: int) -> "Config":
        """The same model for this vocabulary and rows of this many tokens."""
        fields = {
            "vocab_size": tokenizer.n_vocab,
            "max_seq_len": max_seq_len,
            "pad_token_id": tokenizer.pad_id,
        }
        # RoBERTa's positions begin after the padding's id, which another tokenizer has elsewhere.
        offset = self.position_offset if self.position_offset == tokenizer.pad_id + 1 else 0
        return replace(self, **fields, position_offset=offset)

    def changed(self, **fields) -> "Config":
        """With other values; an embedding width that was left to follow d_model follows the new one."""
        follow = {"d_embedding": None} if self.d_embedding == self.d_model else {}
        return replace(self, **follow | fields)

    def layer_window(self, layer: int) -> int | None:
        return None if layer % self.global_every == 0 else self.window

    def n_text(self, seq_len: int) -> int:
        """Tokens of a row that are text: all but [CLS] and [SEP], of which a pair has two."""
        return seq_len - (2 if self.pair == "none" else 3)

    def n_masked(self, seq_len: int) -> int:
        """Tokens of a row that are masked, at most."""
        return max(1, round(self.mask_rate * self.n_text(seq_len)))

    @property
    def n_layer_params(self) -> tuple[int, int]:
        """Of one layer: numbers in its matrices, and in its biases and norms."""
        D, inner = self.d_model, self.d_ff * (2 if self.mlp == "geglu" else 1)
        matrices = 4 * D * D + D * inner + self.d_ff * D
        return matrices, 2 * D + (4 * D + inner + D + 2 * D) * self.bias

    @property
    def n_embedding_params(self) -> int:
        n_rows = self.vocab_size + self.n_segments
        n_rows += self.max_seq_len + self.position_offset if self.positions == "learned" else 0
        return (n_rows + (2 if self.bias else 1)) * self.d_embedding

    @property
    def n_encoder_params(self) -> int:
        """All parameters but those of the heads; the number that papers give."""
        D, E = self.d_model, self.d_embedding
        projection = (E + 1) * D if E != D else 0
        n_different = 1 if self.share_layers else self.n_layers
        # With pre_norm there is a norm at the end, and layer 0 has one less.
        layers = n_different * sum(self.n_layer_params)
        return self.n_embedding_params + projection + layers + (D + 1) * D * self.pooler

    @property
    def n_params(self) -> int:
        """All parameters; the output matrix is the embedding matrix."""
        D, E = self.d_model, self.d_embedding
        transform = D * E + (3 if self.bias else 1) * E
        boundary = (3 * D + 3) * D + (D + 3) * D + SpanBoundary.LONGEST * D + (D + 1) * E
        heads = self.mlm_head * (transform + self.vocab_size) + (self.pair != "none") * (2 * D + 2)
        return self.n_encoder_params + heads + self.span_boundary * boundary

    def flops_per_token(self, seq_len: int) -> int:
        """Matmul FLOPs of forward and backward per token of a row; the heads run on masked tokens only.

        6 per weight and token, as in gpt.py; attention 12 D per visible key.
        """
        D, E, T = self.d_model, self.d_embedding, seq_len
        flops = 6 * self.n_layers * self.n_layer_params[0] + (6 * E * D if E != D else 0)
        for layer in range(self.n_layers):
            w = min(self.layer_window(layer) or T, T)
            keys_seen = T * (2 * w - 1) - w * (w - 1)  # summed over the queries of a row
            flops += 12 * D * keys_seen // T
        per_mask = self.mlm_head * (D * E + self.vocab_size * E)
        per_mask += self.span_boundary * (3 * D * D + D * D + D * E + self.vocab_size * E)
        per_row = (self.pair != "none") * (D * D + 2 * D)
        return flops + 6 * (self.n_masked(T) * per_mask + per_row) // T


MODERN = dict(
    n_segments=0, positions="rope", mlp="geglu", pre_norm=True, bias=False, norm_eps=1e-5, pooler=False
)

SIZES = {
    "tiny": Config(4, 4, 128, 256, 4096, 128, **MODERN),
    "tiny-bert": Config(4, 4, 128, 512, 4096, 128, pooler=False),
    "bert-base": Config(12, 12, 768, 3072, pair="nsp"),
    "bert-large": Config(24, 16, 1024, 4096, pair="nsp"),
    "roberta-base": Config(
        12, 12, 768, 3072, 50265, n_segments=1, position_offset=2, norm_eps=1e-5, pooler=False, pad_token_id=1
    ),
    "albert-base": Config(
        12, 12, 768, 3072, 30000, d_embedding=128, share_layers=True, mlp="gelu_tanh", pair="sop"
    ),
    "modern-base": Config(22, 12, 768, 1152, 50368, 8192, window=65, pad_token_id=50283, **MODERN),
}

# What training adds to a tokenizer that lacks them, by their role.
SPECIAL_TOKENS = {
    "cls_token": "[CLS]",  # begins a row; its last hidden state stands for the whole
    "sep_token": "[SEP]",  # ends each segment
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",  # not used here, but others pad with it
}


def rope(positions: Tensor, theta: float, K: int) -> tuple[Tensor, Tensor]:
    """cos and sin (..., T, 1, K) of the angles of rotary embedding, see gpt.py."""
    frequencies = theta ** -(torch.arange(0, K, 2, device=positions.device).float() / K)  # (K / 2,)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def norm(width: int, config: Config) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def activation(x: Tensor, config: Config) -> Tensor:
    return F.gelu(x, approximate="tanh" if config.mlp == "gelu_tanh" else "none")


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.query = nn.Linear(D, D, bias=config.bias)
        self.key = nn.Linear(D, D, bias=config.bias)
        self.value = nn.Linear(D, D, bias=config.bias)
        self.n_heads, self.backend = config.n_heads, config.kernels

    def forward(self, x: Tensor, rotation, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
        B, T, D = x.shape
        q = self.query(x).view(B, T, self.n_heads, -1)  # (B, T, H, K)
        k = self.key(x).view(B, T, self.n_heads, -1)
        v = self.value(x).view(B, T, self.n_heads, -1)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = attention(q, k, v, window=window, cu_seqlens=cu_seqlens, backend=self.backend)
        return y.reshape(B, T, D)


class Block(nn.Module):
    """Attention and an MLP, each added to what it was given. Their norms stand after the sums, or, with
    pre_norm, before the layers, where gradients pass by them (Xiong et al. 2020)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, inner = config.d_model, config.d_ff * (2 if config.mlp == "geglu" else 1)
        # What enters layer 0 has just been normalised.
        attention_norm = nn.Identity() if config.pre_norm and layer == 0 else norm(D, config)
        attention_output = {"dense": nn.Linear(D, D, bias=config.bias), "LayerNorm": attention_norm}
        self.attention = nn.ModuleDict({"self": Attention(config), "output": nn.ModuleDict(attention_output)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, inner, bias=config.bias)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(config.d_ff, D, bias=config.bias), "LayerNorm": norm(D, config)}
        )
        self.config = config

    def mlp(self, x: Tensor) -> Tensor:
        x = self.intermediate.dense(x)
        if self.config.mlp == "geglu":
            x, gate = x.chunk(2, dim=-1)
            return self.output.dense(F.gelu(x) * gate)
        return self.output.dense(activation(x, self.config))

    def forward(self, x: Tensor, rotation, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
        attend, attention_output = self.attention.self, self.attention.output
        attention_norm, mlp_norm = attention_output.LayerNorm, self.output.LayerNorm
        if self.config.pre_norm:
            x = x + attention_output.dense(attend(attention_norm(x), rotation, window, cu_seqlens))
            return x + self.mlp(mlp_norm(x))
        x = attention_norm(x + attention_output.dense(attend(x, rotation, window, cu_seqlens)))
        return mlp_norm(x + self.mlp(x))


class MaskedLMHead(nn.Module):
    """softmax(E transform(h) + b): which token stands at a place, in the same space as the embeddings E."""

    def __init__(self, config: Config):
        super().__init__()
        D, E = config.d_model, config.d_embedding
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(D, E, bias=config.bias), "LayerNorm": norm(E, config)}
        )
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.config = config

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        x = self.transform.LayerNorm(activation(self.transform.dense(hidden), self.config))  # (..., E)
        return self.logits(x, embeddings)

    def logits(self, x: Tensor, embeddings: Tensor) -> Tensor:
        return F.linear(x, embeddings, self.bias)


class SpanBoundary(nn.Module):
    """SpanBERT's second opinion (Joshi et al. 2019, section 3.2): what a masked token is, told from the two
    tokens just outside its span and its place in there alone. So the ends of a span learn to sum it up."""

    LONGEST = 32  # places told apart; adjacent spans count as one

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.place = nn.Embedding(self.LONGEST, D)
        self.dense1, self.norm1 = nn.Linear(3 * D, D), nn.LayerNorm(D)
        self.dense2, self.norm2 = nn.Linear(D, D), nn.LayerNorm(D)
        self.dense3 = nn.Linear(D, config.d_embedding)

    def forward(self, left: Tensor, right: Tensor, place: Tensor) -> Tensor:
        """(..., E) of the boundaries' hidden states (..., D) and places (...), counted from 1."""
        place = self.place(place.clamp(1, self.LONGEST) - 1)
        x = self.norm1(F.gelu(self.dense1(torch.cat((left, right, place), dim=-1))))
        return self.dense3(self.norm2(F.gelu(self.dense2(x))))


class BERT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, E = config.d_model, config.d_embedding
        n_different = 1 if config.share_layers else config.n_layers
        embeddings = {"word_embeddings": nn.Embedding(config.vocab_size, E), "LayerNorm": norm(E, config)}
        if config.positions == "learned":
            n_positions = config.max_seq_len + config.position_offset
            embeddings["position_embeddings"] = nn.Embedding(n_positions, E)
        if config.n_segments:
            embeddings["token_type_embeddings"] = nn.Embedding(config.n_segments, E)
        encoder = {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict(
                {"layer": nn.ModuleList(Block(config, layer) for layer in range(n_different))}
            ),
        }
        if E != D:
            encoder["embeddings_project"] = nn.Linear(E, D)
        if config.pre_norm:
            encoder["final_norm"] = norm(D, config)
        if config.pooler:
            encoder["pooler"] = nn.ModuleDict({"dense": nn.Linear(D, D)})
        self.bert = nn.ModuleDict(encoder)
        heads = {}
        if config.mlm_head:
            heads["predictions"] = MaskedLMHead(config)
        if config.pair != "none":
            heads["seq_relationship"] = nn.Linear(D, 2)
        if config.span_boundary:
            heads["span_boundary"] = SpanBoundary(config)
        self.cls = nn.ModuleDict(heads)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """N(0, 0.02^2), biases 0, as BERT's, but the matrices of other widths than BERT's 768 scaled so that
        their products have the same variance: a narrow model would else take long to see beyond the mean of
        its tokens. With pre_norm, what writes into the residual stream is scaled down by sqrt(2 L), as in
        gpt.py."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim == 1:  # of norms
                p.fill_(1.0)
            elif "embeddings." in name:
                p.normal_(std=0.02)
            else:
                p.normal_(std=0.02 * math.sqrt(768 / self.config.d_model))
                if self.config.pre_norm and name.endswith("output.dense.weight"):
                    p.div_(math.sqrt(2 * self.config.n_layers))

    def hidden(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        embeddings: nn.ModuleDict | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of tokens (B, T), int64, in segments 0 or 1 (B, T), all 0 if None.

        cu_seqlens: the texts packed into one row, see `fill.pack`; positions count from each one's start.
        embeddings: those of another model, to share (ELECTRA); None: this one's.
        Raises ValueError for a row longer than the model's positions.
        """
        config, T = self.config, tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        longest = T
        if cu_seqlens is not None:
            text = torch.bucketize(positions, cu_seqlens, right=True) - 1
            positions = positions - cu_seqlens[text]
            # A GPU would have to be waited for.
            known = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
            longest = int(cu_seqlens.diff().max()) if known else 0
        if longest > config.max_seq_len:
            raise ValueError(f"a text of {longest} tokens: this model reads at most {config.max_seq_len}")
        embeddings = self.bert.embeddings if embeddings is None else embeddings
        x = embeddings.word_embeddings(tokens)  # (B, T, E)
        if config.n_segments:
            x = x + embeddings.token_type_embeddings(
                torch.zeros_like(tokens) if segments is None else segments
            )
        rotations = {None: None, config.window: None}
        if config.positions == "learned":
            x = x + embeddings.position_embeddings(positions + config.position_offset)
        else:
            K = config.d_model // config.n_heads
            rotations[config.window] = rope(positions, config.local_rope_theta, K)
            rotations[None] = rope(positions, config.rope_theta, K)
        x = embeddings.LayerNorm(x)
        if config.d_embedding != config.d_model:
            x = self.bert.embeddings_project(x)  # (B, T, D)
        layers = self.bert.encoder.layer
        for i in range(config.n_layers):
            window = config.layer_window(i)
            x = layers[i % len(layers)](x, rotations[window], window, cu_seqlens)
        return self.bert.final_norm(x) if config.pre_norm else x

    def pooled(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """tanh(W h) of each text's first token: (B, D), or one row for each text packed."""
        first = hidden[:, 0] if cu_seqlens is None else hidden[0, cu_seqlens[:-1]]
        return torch.tanh(self.bert.pooler.dense(first))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V): which token stands at a place, of hidden states (..., D).

        Raises ValueError if the checkpoint came without this head.
        """
        if not self.config.mlm_head:
            raise ValueError(
                "this model has no masked-language-model head, so it cannot fill masks; load a checkpoint "
                "that has one (BertForMaskedLM ...), or use embed"
            )
        return self.cls.predictions(hidden, self.embedding_weight)

    @property
    def embedding_weight(self) -> Tensor:
        """(V, E)."""
        return self.bert.embeddings.word_embeddings.weight

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) at every place; arguments as for `hidden`."""
        return self.logits(self.hidden(tokens, segments, cu_seqlens=cu_seqlens))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean nats per masked token, plus those of the other objectives if there are any, of a batch from
        `make_batch`. The head sees the masked places alone: 15 percent of the work on all."""
        hidden = self.hidden(batch["tokens"], batch.get("segments"), cu_seqlens=batch.get("cu_seqlens"))
        targets = batch["targets"]  # (B, n)
        flat = hidden.flatten(0, 1)  # (B T, D)
        logits = self.logits(flat[batch["positions"]]).float()  # (B, n, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        n_targets = (targets >= 0).sum()
        metrics = {"targets": n_targets, "accuracy": (logits.argmax(-1) == targets).sum() / n_targets}
        if self.config.span_boundary:
            metrics["mlm_loss"] = loss.detach()
            x = self.cls.span_boundary(flat[batch["left"]], flat[batch["right"]], batch["place"])
            logits = self.cls.predictions.logits(x, self.embedding_weight).float()
            loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.config.pair != "none":
            metrics["mlm_loss"] = metrics.get("mlm_loss", loss.detach())
            pooled = self.pooled(hidden, batch.get("cu_seqlens"))
            pair_logits = self.cls.seq_relationship(pooled).float()  # (B, 2)
            loss = loss + F.cross_entropy(pair_logits, batch["pair_labels"])
            metrics["pair_accuracy"] = (pair_logits.argmax(-1) == batch["pair_labels"]).float().mean()
        return loss, metrics

    def flops_per_token(self, seq_len: int) -> int:
        return self.config.flops_per_token(seq_len)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "BERT":
        """Load a Hugging Face directory: BertModel, BertForMaskedLM, BertForPreTraining, RobertaForMaskedLM,
        AlbertForPreTraining, ElectraForMaskedLM or ModernBertForMaskedLM, in the precision it was saved in.

        Raises ValueError naming what is missing, damaged, of another shape, or not implemented here.
        """
        fields, weights = encoders.read(directory)
        with torch.device("meta"):
            model = cls(Config(**fields, kernels=kernels))
        decoders.assign(model, weights, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is.

        The span boundary head is left out: it served training, and no architecture has it.
        """
        encoders.save(self.config, self.state_dict(), directory)


Model = BERT
make_batch, part_of = masking.make_batch, masking.part_of
STEPS = 4400
LEARNING_RATE = 0.25  # of a decoder's of the same size: what trains the tiny size best


@torch.no_grad()
def show(
    model: BERT, tokenizer: Tokenizer | WordPiece, held_out: Tensor, directory: Path | None = None
) -> str:
    """The beginning of the held-out text (n,) with every tenth token masked, and the best guesses there."""
    text = held_out[: min(80, model.config.max_seq_len - 2)].tolist()
    masked = [i for i, token in enumerate(text) if i % 10 == 5 and not tokenizer.is_special[token]]
    row = [tokenizer.mask_id if i in masked else token for i, token in enumerate(text)]
    guesses = fill_row(model, tokenizer, [tokenizer.cls_id, *row, tokenizer.sep_id], k=3)
    lines = [tokenizer.decode(row), ""]
    for i, best in zip(masked, guesses, strict=True):
        told = "   ".join(f"{token!r} {p:.0%}" for token, p in best)
        lines.append(f"{tokenizer.decode([text[i]])!r:16} guessed {told}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in masks with a trained model, or print the sizes.")
    parser.add_argument(
        "checkpoint", nargs="?", help="directory in Hugging Face layout; without it, the sizes"
    )
    parser.add_argument("--text", help="with [MASK], or the tokenizer's own mask token, where to guess")
    parser.add_argument("--k", type=int, default=5, help="guesses for each mask (default 5)")
    args = parser.parse_args()
    if args.checkpoint is None:
        print(
            f"{'size':12} {'encoder':>12} {'with heads':>12} {'layers':>6} {'width':>6} {'context':>8}",
            end="",
        )
        print(f" {'FLOPs/token':>12}")
        for name, c in SIZES.items():
            flops = c.flops_per_token(c.max_seq_len)
            print(
                f"{name:12} {c.n_encoder_params:12,} {c.n_params:12,} {c.n_layers:6} {c.d_model:6} ", end=""
            )
            print(f"{c.max_seq_len:8} {flops:12.3e}")
        return
    if args.text is None:
        raise ValueError("--text is missing; give a text with a mask in it, such as 'import [MASK]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BERT.from_pretrained(args.checkpoint).to(device).eval()
    tokenizer = get_tokenizer(args.checkpoint)
    for best in fill_mask(model, tokenizer, args.text, args.k):
        print("   ".join(f"{token!r} {p:.1%}" for token, p in best))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
