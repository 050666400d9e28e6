"""BERT: an encoder that reads a text from both sides, and learns by filling in tokens that were masked.

    loss = -mean over masked i of log p(x_i | the corrupted text)

    h = norm(embedding of the token + of its position + of its segment)
    h = norm(h + attention(h)),  h = norm(h + mlp(h))           L times, without a causal mask
    p(x_i) = softmax(E transform(h_i) + b)                      E: the token embeddings

One class is five encoders, which differ in a few fields of Config:
    BERT (Devlin et al. 2018)        segments, a head for pairs of segments, norms after the sums
    RoBERTa (Liu et al. 2019)        no segments, no pair objective, new masks each time a row is read
    ALBERT (Lan et al. 2019)         narrow embeddings (V x E, E x D), one layer's weights used L times
    ELECTRA (Clark et al. 2020)      BERT with narrow embeddings; its objective is in language/electra.py
    ModernBERT (Warner et al. 2024)  norms before the layers, rotary positions, GeGLU, no biases; most layers
                                     attend only to neighbouring tokens

Masks and loss are in language/masking.py, uses of the encoder in language/encoder_inference.py. Texts are
packed end to end into one row, without padding. Parameters have the names of Hugging Face's BERT.

    python bert.py                                                     print the sizes
    python bert.py runs/bert/model --text "import [MASK]"              fill in a mask
    python train.py --model bert                                       train one

Shapes: B batch, T tokens, D model width, E embedding width, H heads, K head width, V vocabulary, L layers.
"""

import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.rows import Dataset
from formats import encoders, safetensors_dir
from formats.config_values import check_values
from gpt import rotate
from kernels import attention

TASK, KIND = "masking", "encoder"
STEPS = 4400
LEARNING_RATE = 0.25  # times the default rate of a decoder of this size; found on `tiny`


@dataclass(frozen=True)
class Config:
    n_layers: int
    n_heads: int
    d_model: int
    d_ff: int  # inner width of the MLP
    vocab_size: int = 30522
    max_seq_len: int = 512  # tokens
    d_embedding: int | None = None  # E, if narrower than d_model and then projected (ALBERT); None: d_model
    share_layers: bool = False  # use the weights of one layer L times (ALBERT)
    n_segments: int = 2  # 0: no segment embeddings
    positions: str = "learned"  # or "rope"
    position_offset: int = 0  # rows at the start of the position table that are never read (RoBERTa: 2)
    mlp: str = "gelu"  # or "gelu_tanh", its approximation (ALBERT), or "geglu" (Shazeer 2020)
    pre_norm: bool = False  # norms before the layers instead of after the sums
    bias: bool = True  # in linear layers and norms
    norm_eps: float = 1e-12
    rope_theta: float = 160_000.0  # of global layers
    window: int | None = None  # in local layers, a token attends to tokens at a distance below this
    global_every: int = 3  # with a window: layers 0, 3, 6 ... are global, the others local
    local_rope_theta: float = 10_000.0
    pooler: bool = True  # tanh(W h) of the first token, a summary of the text
    mlm_head: bool = True  # the masked-language-model head
    pair: str = "none"  # or a head for pairs of segments: "nsp", next sentence, or "sop", order (ALBERT)
    pad_token_id: int = 0
    tie_embeddings: bool = True  # the masked-language-model head multiplies by the embeddings
    kernels: str = "auto"  # backend of kernels/, see kernels/attention.py
    MAY_BE_ZERO = ("n_segments", "position_offset", "pad_token_id")

    def __post_init__(self):
        mlp, pair = ("gelu", "gelu_tanh", "geglu"), ("none", "nsp", "sop")
        check_values(self, positions=("learned", "rope"), mlp=mlp, pair=pair)
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.positions == "rope" and self.K % 2:
            raise ValueError(f"heads of width {self.K}: rotary positions turn pairs, so it must be even")
        if self.share_layers and self.pre_norm:
            raise ValueError("share_layers with pre_norm: layer 0 has no norm of its own to share")
        if self.pair != "none" and (not self.pooler or self.n_segments < 2):
            raise ValueError(f"pair {self.pair!r} needs pooler True and n_segments 2")

    @property
    def E(self) -> int:
        """Return the width of the embeddings."""
        return self.d_embedding or self.d_model

    @property
    def K(self) -> int:
        """Return the width of a head."""
        return self.d_model // self.n_heads

    def layer_window(self, layer: int) -> int | None:
        """Return the window of a layer, None if it is global."""
        return None if layer % self.global_every == 0 else self.window


# What the families change in Config.
ROBERTA = dict(n_segments=1, position_offset=2, norm_eps=1e-5, pooler=False, pad_token_id=1)
ALBERT = dict(d_embedding=128, share_layers=True, mlp="gelu_tanh", pair="sop")
MODERN = dict(
    n_segments=0, positions="rope", mlp="geglu", pre_norm=True, bias=False, norm_eps=1e-5, pooler=False
)
BASE = (12, 12, 768, 3072)

SIZES = {
    "tiny": Config(4, 4, 128, 256, 4096, 128, **MODERN),
    "tiny-bert": Config(4, 4, 128, 512, 4096, 128, pooler=False),
    "bert-base": Config(*BASE, pair="nsp"),
    "bert-large": Config(24, 16, 1024, 4096, pair="nsp"),
    "roberta-base": Config(*BASE, 50265, **ROBERTA),
    "albert-base": Config(*BASE, 30000, **ALBERT),
    "modern-base": Config(22, 12, 768, 1152, 50368, 8192, window=65, pad_token_id=50283, **MODERN),
}


def fit(config: Config, dataset: Dataset, seq_len: int) -> Config:
    """Return the config with the vocabulary of dataset.tokenizer, for rows of seq_len tokens."""
    V, pad_id = dataset.tokenizer.n_vocab, dataset.tokenizer.pad_id
    # RoBERTa's positions begin after the id of padding. Where that is another id, there is no offset.
    offset = config.position_offset if config.position_offset == pad_id + 1 else 0
    return replace(config, vocab_size=V, max_seq_len=seq_len, pad_token_id=pad_id, position_offset=offset)


def rope(positions: Tensor, theta: float, head_width: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (..., T, 1, K), of rotary embedding as gpt.rope does, but for the last bit."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angles = positions[..., None].float() * frequencies  # (..., T, K / 2)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def norm(width: int, config: Config) -> nn.LayerNorm:
    """Return a LayerNorm of this width."""
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def dense_and_norm(n_in: int, n_out: int, config: Config) -> nn.ModuleDict:
    """Return a linear layer and the norm that goes with its output, under BERT's names."""
    dense = nn.Linear(n_in, n_out, bias=config.bias)
    return nn.ModuleDict({"dense": dense, "LayerNorm": norm(n_out, config)})


@torch.no_grad()
def initialize(module: nn.Module, config: Config) -> None:
    """Draw the module's parameters: N(0, 0.02^2), and biases 0, as in BERT. Raises ValueError without a rule.

    Matrices of other widths than BERT's 768 are scaled so that their products have the same variance.
    Otherwise a narrow model takes long to learn more than the mean of its tokens. With pre_norm, the matrices
    that write into the residual stream are divided by sqrt(2 L), as in gpt.py.
    """
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1 and "norm" in name.lower():
            p.fill_(1.0)
        elif "embeddings." in name:
            p.normal_(std=0.02)
        elif p.ndim == 2:
            p.normal_(std=0.02 * math.sqrt(768 / config.d_model))
            if config.pre_norm and name.endswith("output.dense.weight"):
                p.div_(math.sqrt(2 * config.n_layers))
        else:
            raise ValueError(f"parameter {name}: no rule of initialisation; add one to bert.initialize")


class Attention(nn.Module):
    """Attention of all tokens of a text, or of the tokens within a window, to each other."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.query = nn.Linear(D, D, bias=config.bias)
        self.key = nn.Linear(D, D, bias=config.bias)
        self.value = nn.Linear(D, D, bias=config.bias)
        self.n_heads, self.backend = config.n_heads, config.kernels

    def forward(self, x: Tensor, rotation, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the mixed values (B, T, D) of x (B, T, D). rotation: cos and sin from `rope`, or None."""
        B, T, D = x.shape
        q = self.query(x).view(B, T, self.n_heads, -1)  # (B, T, H, K)
        k = self.key(x).view(B, T, self.n_heads, -1)  # (B, T, H, K)
        v = self.value(x).view(B, T, self.n_heads, -1)  # (B, T, H, K)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = attention(q, k, v, window=window, cu_seqlens=cu_seqlens, backend=self.backend)
        return y.reshape(B, T, D)


class Block(nn.Module):
    """One layer: attention and an MLP, each added to its input. The norms stand after the sums; with pre_norm
    they stand before attention and MLP, where gradients flow past them (Xiong et al. 2020)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, inner = config.d_model, config.d_ff * (2 if config.mlp == "geglu" else 1)
        attention_output = dense_and_norm(D, D, config)
        if config.pre_norm and layer == 0:  # the input of layer 0 has just been normalised
            attention_output["LayerNorm"] = nn.Identity()
        self.attention = nn.ModuleDict({"self": Attention(config), "output": attention_output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, inner, bias=config.bias)})
        self.output = dense_and_norm(config.d_ff, D, config)
        self.gated, self.pre_norm = config.mlp == "geglu", config.pre_norm
        self.activation = nn.GELU("tanh" if config.mlp == "gelu_tanh" else "none")

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP's output (B, T, D) for x (B, T, D)."""
        x = self.intermediate.dense(x)  # (B, T, inner)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.output.dense(self.activation(x) * gate)
        return self.output.dense(self.activation(x))

    def forward(self, x: Tensor, rotation, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the layer's output (B, T, D) for x (B, T, D); arguments as for `Attention.forward`."""
        attend, attention_output = self.attention.self, self.attention.output
        attention_norm, mlp_norm = attention_output.LayerNorm, self.output.LayerNorm
        if self.pre_norm:
            x = x + attention_output.dense(attend(attention_norm(x), rotation, window, cu_seqlens))
            return x + self.mlp(mlp_norm(x))
        x = attention_norm(x + attention_output.dense(attend(x, rotation, window, cu_seqlens)))
        return mlp_norm(x + self.mlp(x))


class MaskedLMHead(nn.Module):
    """softmax(E transform(h) + b): which token stands at a place. E: the embeddings, or decoder's matrix."""

    def __init__(self, config: Config):
        super().__init__()
        self.transform = dense_and_norm(config.d_model, config.E, config)
        self.activation = nn.GELU("tanh" if config.mlp == "gelu_tanh" else "none")
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.decoder = None if config.tie_embeddings else nn.Linear(config.E, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D). embeddings: the matrix E (V, E)."""
        x = self.transform.LayerNorm(self.activation(self.transform.dense(hidden)))  # (..., E)
        return F.linear(x, embeddings, self.bias)


class BERT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, E = config.d_model, config.E
        # Embeddings, which are added up and then normalised.
        embeddings = {"word_embeddings": nn.Embedding(config.vocab_size, E), "LayerNorm": norm(E, config)}
        if config.positions == "learned":
            n_positions = config.max_seq_len + config.position_offset
            embeddings["position_embeddings"] = nn.Embedding(n_positions, E)
        if config.n_segments:
            embeddings["token_type_embeddings"] = nn.Embedding(config.n_segments, E)
        # The layers, and what stands before and after them.
        n_different = 1 if config.share_layers else config.n_layers
        layers = nn.ModuleList(Block(config, layer) for layer in range(n_different))
        encoder = {"embeddings": nn.ModuleDict(embeddings), "encoder": nn.ModuleDict({"layer": layers})}
        if E != D:
            encoder["embeddings_project"] = nn.Linear(E, D)
        if config.pre_norm:
            encoder["final_norm"] = norm(D, config)
        if config.pooler:
            encoder["pooler"] = nn.ModuleDict({"dense": nn.Linear(D, D)})
        self.bert, self.cls = nn.ModuleDict(encoder), nn.ModuleDict()
        if config.mlm_head:
            self.cls["predictions"] = MaskedLMHead(config)
        if config.pair != "none":
            self.cls["seq_relationship"] = nn.Linear(D, 2)
        initialize(self, config)

    @property
    def embeddings(self) -> nn.ModuleDict:
        """Return the embeddings of tokens, positions and segments."""
        return self.bert.embeddings

    @property
    def embedding_weight(self) -> Tensor:
        """Return the embeddings of all tokens, (V, E)."""
        return self.embeddings.word_embeddings.weight

    @property
    def head_weight(self) -> Tensor:
        """Return the matrix E (V, E) of the masked-language-model head."""
        return self.embedding_weight if self.config.tie_embeddings else self.cls.predictions.decoder.weight

    def positions(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the position (1, T) of each token in its text. Raises ValueError for a text that is too
        long; packed texts are not checked on a GPU, for the host would have to wait for their lengths."""
        T = longest = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cu_seqlens is not None:
            text = torch.bucketize(positions, cu_seqlens, right=True) - 1
            positions = positions - cu_seqlens[text]
            on_host = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
            longest = int(cu_seqlens.diff().max()) if on_host else 0
        if longest > (limit := self.config.max_seq_len):
            raise ValueError(f"a text of {longest} tokens: this model reads at most {limit}")
        return positions

    def embed_tokens(self, tokens: Tensor, segments: Tensor | None, positions: Tensor) -> Tensor:
        """Return the input (B, T, D) of the first layer."""
        config, embeddings = self.config, self.embeddings
        x = embeddings.word_embeddings(tokens)  # (B, T, E)
        if config.n_segments:
            segments = torch.zeros_like(tokens) if segments is None else segments
            x = x + embeddings.token_type_embeddings(segments)
        if config.positions == "learned":
            x = x + embeddings.position_embeddings(positions + config.position_offset)
        x = embeddings.LayerNorm(x)
        return x if config.d_model == config.E else self.bert.embeddings_project(x)

    def hidden(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states (B, T, D) of tokens (B, T), int64.

        segments: 0 or 1 for each token (B, T); None: all 0. cu_seqlens: where texts packed into one row begin
        and end, see `language.encoder_inference.pack`. Raises ValueError for a text longer than max_seq_len.
        """
        config = self.config
        positions = self.positions(tokens, cu_seqlens)
        x = self.embed_tokens(tokens, segments, positions)
        # Global and local layers have rotary positions of different bases.
        global_rotation = local_rotation = None
        if config.positions == "rope":
            global_rotation = rope(positions, config.rope_theta, config.K)
            if config.window is not None:
                local_rotation = rope(positions, config.local_rope_theta, config.K)
        layers = self.bert.encoder.layer
        for i in range(config.n_layers):
            window = config.layer_window(i)
            rotation = global_rotation if window is None else local_rotation
            x = layers[i % len(layers)](x, rotation, window, cu_seqlens)
        return self.bert.final_norm(x) if config.pre_norm else x

    def pooled(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return tanh(W h) of the first token of each text: (B, D), or one row per packed text."""
        first = hidden[:, 0] if cu_seqlens is None else hidden[0, cu_seqlens[:-1]]
        return torch.tanh(self.bert.pooler.dense(first))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D); ValueError for a model without this head."""
        if not self.config.mlm_head:
            advice = "load a checkpoint that has one (BertForMaskedLM ...), or use embed"
            raise ValueError(f"this model has no masked-language-model head to fill masks with; {advice}")
        return self.cls.predictions(hidden, self.head_weight)

    head_input = hidden  # what the head for tokens reads; language/deberta.py has a decoder in between

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V) at every place; arguments as for `hidden`."""
        return self.logits(self.head_input(tokens, segments, cu_seqlens=cu_seqlens))

    def flops_per_token(self, seq_len: int, n_predicted: int | None = None) -> int:
        """Return the FLOPs of matrix products, forward and backward, per token of a row of seq_len tokens.

        They are 6 per weight, as in gpt.py, and 12 D per key that a query attends to. The head for tokens
        runs at n_predicted places of a row (None: at all), the head for pairs once a row.
        """
        config, T = self.config, seq_len
        D, E, V = config.d_model, config.E, config.vocab_size
        # The matrices of the layers, and the projection of narrow embeddings.
        inner = config.d_ff * (2 if config.mlp == "geglu" else 1)
        per_layer = 4 * D * D + D * inner + config.d_ff * D
        flops = 6 * config.n_layers * per_layer + (6 * E * D if E != D else 0)
        # Attention: the keys that the queries of a row attend to, summed over the row.
        for layer in range(config.n_layers):
            w = min(config.layer_window(layer) or T, T)
            n_keys = T * (2 * w - 1) - w * (w - 1)
            flops += 12 * D * n_keys // T
        per_place = config.mlm_head * (D * E + V * E)
        per_row = (config.pair != "none") * (D * D + 2 * D)
        return flops + 6 * ((T if n_predicted is None else n_predicted) * per_place + per_row) // T

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "BERT":
        """Return the model in a Hugging Face directory, in its precision; ValueError names what is wrong."""
        fields, weights = encoders.read(directory)
        fields["kernels"] = kernels
        model = safetensors_dir.build(lambda: cls(Config(**fields)), fields, weights, directory)
        safetensors_dir.assign(model, weights, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, as the Hugging Face architecture that this config is."""
        encoders.save(self.config, self.state_dict(), directory)


Model = BERT

if __name__ == "__main__":
    # The command is in language/, whose files import this one: print the sizes, or fill in masks.
    importlib.import_module("language.encoder_inference").main()
