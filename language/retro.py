"""RETRO: a decoder that also reads passages retrieved from a large text (Borgeaud et al. 2022, 2112.04426).

    C_u    chunk u of the text, m tokens                 N_u    its k neighbours: passages of r = 2 m tokens,
                                                                each a chunk like C_u and its continuation
    E_u = encoder(N_u, given the states of C_u)          attention in both directions
    x = x + attention(norm(x));  in some layers x = x + CCA(norm(x), E);  x = x + mlp(norm(x))

CCA is chunked cross attention (section 2.4, equation 5). Counted from 1, the tokens u m ... u m + m - 1
attend to all k r states of E_u: the last token of chunk u, and all but the last of chunk u + 1. The first
m - 1 tokens of a text have no neighbours yet, and CCA adds nothing to them.

    tokens    1 ... m-1  |  m ... 2m-1  |  2m ... 3m-1  |  ...
    attend    nothing    |  E_1         |  E_2          |  ...

N_u is chosen by all tokens of C_u. If a token before the last of C_u read N_u, it would get information about
the tokens that it has to predict. The last token may read it, since it predicts the first token of C_{u+1}.

The model learns to copy from the neighbours, and most of the gain is in chunks that overlap with them
(results/retro.py measures bits per byte by overlap). It can also look up facts that it was not trained on.
That is the default task: a new fact is a new line of the text that is searched.

RETROfit (section 4.2): --init-from a trained gpt.py freezes it, and trains the encoder and CCA alone. Without
neighbours such a model is equal to that gpt.py to the bit; with them it is at the start, since CCA's last
matrix is 0 then.

The decoder is gpt.py's. Differences from the paper: neighbours are found by TF-IDF (retrieval.py), not by
BERT; positions are rotary, those of a chunk and of its neighbours from 0 on, so that a continuation begins at
m; the encoder has the decoder's width and embeddings.

    python train.py --model retro                                       look up facts never seen
    python train.py --model retro --data stdlib --size text             the standard library's own source
    python train.py --model retro --init-from runs/gpt/model --data stdlib --out runs/retrofit
    python -m language.retro runs/retro/model --prompt "..."            continue a text; without it the sizes

Shapes: B rows, T tokens, U whole chunks in T, m tokens of a chunk, k neighbours, r = 2 m tokens of each, D
model width, H heads, G key/value heads, K head width.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt
from formats import command, native
from generate import KVCache
from generate import main as decoder_main
from gpt import GPT, MLP, Norm, rope, rotate
from kernels import attention, linear_cross_entropy
from language import retro_rows
from language.retrieval import Index

DATABASE = "database"  # the folder beside the weights with the text to retrieve from


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config, and those of retrieval and the encoder."""

    chunk: int = 64  # m, tokens
    n_neighbours: int = 2  # k
    retrieval_layers: tuple[int, ...] = (1, 3)  # the layers with CCA; paper: 6, 9, 12 ... counted from 1
    encoder_layers: int = 2
    retrofit: bool = False  # the decoder is frozen, and the new layers alone learn

    def __post_init__(self):
        super().__post_init__()
        layers = self.retrieval_layers
        if (
            not layers
            or list(layers) != sorted(set(layers))
            or not 0 <= layers[0] <= layers[-1] < self.n_layers
        ):
            raise ValueError(
                f"retrieval_layers {layers}: expected ascending numbers, from 0 to {self.n_layers - 1}"
            )
        for name, least in (("chunk", 3), ("n_neighbours", 1), ("encoder_layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")

    def flops_per_token(self, seq_len: int) -> int:
        """Return the FLOPs of the matrix products of training on one token, as gpt.py does, with those of CCA
        and of the encoder, which reads k r tokens for m of the decoder."""
        D, H, G, K, m = self.d_model, self.n_heads, self.G, self.K, self.chunk
        n_encoded = 2 * m * self.n_neighbours  # tokens of the encoder per chunk
        queries, keys = 2 * D * H * K, 2 * D * G * K  # weights of the projections of each side
        mlp = (3 if self.mlp == "swiglu" else 2) * D * self.d_ff
        # Attention costs 4 H K forward per pair of a query and a key, and twice that backward.
        encoder = self.encoder_layers * (6 * (queries + keys + mlp) + 12 * H * K * 2 * m)
        encoder += 6 * queries + 12 * H * K * m  # the first layer reads the chunk
        per_chunk = n_encoded * encoder + m * 6 * keys
        cross = m * (6 * queries + 12 * H * K * n_encoded) + n_encoded * 6 * keys
        return super().flops_per_token(seq_len) + (per_chunk + len(self.retrieval_layers) * cross) // m


ONE = dict(chunk=16, n_neighbours=1, retrieval_layers=(1,), encoder_layers=1)
SIZES = {
    # To copy, a head must attend by position alone: biases, and angles that distinguish 32 places.
    "tiny": Config(2, 2, 64, 176, 257, 64, rope_theta=10.0, qkv_bias=True, **ONE),
    "text": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True, chunk=32),  # gpt.py's tiny
    # The shapes of Borgeaud et al. 2022, table 2, whose encoders are narrower. Without embeddings they
    # count 172M, 425M, 1451M and 7532M parameters.
    "172m": Config(12, 16, 896, 3584, 32000, 2048, mlp="gelu", d_head=64, retrieval_layers=(5, 8, 11)),
    "425m": Config(12, 12, 1536, 6144, 32000, 2048, mlp="gelu", retrieval_layers=(5, 8, 11)),
    "1.5b": Config(24, 16, 2048, 8192, 32000, 2048, mlp="gelu", retrieval_layers=tuple(range(5, 24, 3))),
    "7.5b": Config(32, 32, 4096, 16384, 32000, 2048, mlp="gelu", retrieval_layers=tuple(range(5, 32, 3))),
}


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with queries of one sequence and keys and values of another, without a mask.
    Both have rotary positions. With qk_norm the queries and keys of each head have RMSNorm."""

    def __init__(self, config: Config):
        super().__init__()
        D, H, G, K = config.d_model, config.n_heads, config.G, config.K
        bias = config.bias or config.qkv_bias
        self.q_proj = nn.Linear(D, H * K, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(D, G * K, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(H * K, D, bias=config.bias)
        self.q_norm, self.k_norm = (Norm(K, config, "rms") if config.qk_norm else None for _ in range(2))
        self.d_head, self.theta, self.backend = K, config.rope_theta, config.kernels

    def forward(self, x: Tensor, context: Tensor, at: Tensor, context_at: Tensor) -> Tensor:
        """Return (B, T, D) of x (B, T, D) and context (B, S, D), at the positions (T,) and (S,)."""
        (B, T, _), S, K = x.shape, context.shape[1], self.d_head
        q = self.q_proj(x).view(B, T, -1, K)
        k, v = (project(context).view(B, S, -1, K) for project in (self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, *rope(at[None], self.theta, K))
        k = rotate(k, *rope(context_at[None], self.theta, K))
        return self.o_proj(attention(q, k, v, backend=self.backend).reshape(B, T, -1))


class EncoderLayer(nn.Module):
    """Attention within a neighbour in both directions, in the first layer also to the chunk, and an MLP."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, kind = config.d_model, config.norm
        self.input_layernorm = Norm(D, config, kind)
        self.self_attn = CrossAttention(config)
        self.cross_layernorm = Norm(D, config, kind) if layer == 0 else None
        self.cross_attn = CrossAttention(config) if layer == 0 else None
        self.post_attention_layernorm = Norm(D, config, kind)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Return the states (n, k, r, D) after x (n, k, r, D), of the k neighbours of n chunks, whose own
        states (n, m, D) are the decoder's."""
        (n, k, r, D), m = x.shape, states.shape[1]
        at = torch.arange(r, device=x.device)
        h = self.input_layernorm(x).view(n * k, r, D)
        x = x + self.self_attn(h, h, at, at).view(n, k, r, D)
        if self.cross_attn is not None:
            h = self.cross_layernorm(x).view(n, k * r, D)
            x = x + self.cross_attn(h, states, at.repeat(k), at[:m]).view(n, k, r, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    """The encoder (section 2.4), which reads each neighbour by itself, and the chunk that it is for."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_layers))
        self.states_norm = Norm(config.d_model, config, config.norm)
        self.norm = Norm(config.d_model, config, config.norm)

    def forward(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Return E (B, U, k r, D) of the embeddings of neighbours (B, U, k, r, D), given the decoder's
        states (B, U, m, D) of the chunks."""
        (B, U, k, r, D) = embedded.shape
        x, states = embedded.flatten(0, 1), self.states_norm(states).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, states)
        return self.norm(x).view(B, U, k * r, D)


class Block(gpt.Block):
    """gpt.py's block, in the retrieval layers with CCA between its two parts."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        has_cross = layer in config.retrieval_layers
        self.cross_layernorm = Norm(config.d_model, config, config.norm) if has_cross else None
        self.cross_attn = CrossAttention(config) if has_cross else None
        self.chunk, self.layer = config.chunk, layer

    def forward(self, x: Tensor, rotation, cache, cu_seqlens=None, encode=None) -> Tensor:
        """Return (B, T, D) of x (B, T, D).

        encode: function of the states after the attention and of the layer's number. It returns E
        (B, U, k r, D) and the place of the first token of x among the m tokens that attend to the first of
        these E, which is 1 - m at the start of a text. None: nothing is retrieved.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, cu_seqlens)
        if encode is not None and self.cross_attn is not None:
            encoded, place = encode(x, self.layer)
            if encoded is not None:
                x = x + self.chunked(self.cross_layernorm(x), encoded, place)
        return x + self.mlp(self.post_attention_layernorm(x))

    def chunked(self, x: Tensor, encoded: Tensor, place: int) -> Tensor:
        """Return CCA (B, T, D) of x (B, T, D): the first -place tokens get 0, and of the others each m in
        turn attend to the next of encoded (B, U, k r, D), beginning at the given place of the first m."""
        (B, T, D), (_, U, n, _), m = x.shape, encoded.shape, self.chunk
        before, into = max(0, -place), max(0, place)  # tokens without neighbours, and earlier ones of E_1
        rest = F.pad(x[:, before:], (0, 0, into, U * m - into - (T - before)))  # (B, U m, D)
        # Positions begin at 0 in a chunk and in its neighbours: the m tokens are at m - 1 ... 2 m - 2.
        at = torch.arange(m, device=x.device) + m - 1
        places = torch.arange(2 * m, device=x.device).repeat(n // (2 * m))  # the same in all neighbours
        y = self.cross_attn(rest.view(B * U, m, D), encoded.flatten(0, 1), at, places)
        y = y.view(B, U * m, D)[:, into : into + T - before]
        return F.pad(y, (0, 0, before, 0))


class RetroCache(KVCache):
    """The cache of texts of one length, with the last E, and tokens and states of the unfinished chunk."""

    def __init__(self, config: Config, lengths: list[int], max_len: int, like: Tensor, index: Index):
        if len(set(lengths)) > 1:
            raise ValueError(f"prompts of {lengths} tokens: with retrieval they must have one length")
        super().__init__(config, lengths, max_len, like)
        self.m, self.k, self.index = config.chunk, config.n_neighbours, index
        self.n_read, self.tokens, self.states, self.encoded = 0, None, None, None

    def encode(self, x: Tensor, tokens: Tensor, encoder) -> tuple[Tensor | None, int]:
        """Return what a Block's `encode` does, for the prompts (B, T), or later the next token (B, 1), and
        their states x. Retrieve for each chunk that they complete. encoder: (neighbours, states) -> E."""
        m, done = self.m, self.n_read
        tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1)
        states = x if self.states is None else torch.cat((self.states, x), dim=1)
        B, U = len(tokens), tokens.shape[1] // m
        whole, encoded = U * m, [] if self.encoded is None else [self.encoded]
        if U:
            queries = tokens[:, :whole].reshape(B * U, m).cpu().numpy()
            found = [torch.from_numpy(self.index.neighbours(query, self.k)) for query in queries]
            neighbours = torch.stack(found).view(B, U, self.k, 2 * m).to(x.device)
            encoded.append(encoder(neighbours, states[:, :whole].reshape(B, U, m, -1)))
        self.n_read += x.shape[1]
        self.tokens, self.states = tokens[:, whole:], states[:, whole:]
        if not encoded:
            return None, 0
        encoded = torch.cat(encoded, dim=1)
        self.encoded = encoded[:, -1:]
        # The prompts begin with m - 1 tokens that attend to nothing; a later token attends to the last E.
        return (encoded, 1 - m) if done == 0 else (self.encoded, (done - (m - 1)) % m)


class Retro(GPT):
    """The decoder with neighbours. Generation finds them in `index`; if that is None, there are none."""

    block = Block
    save_pretrained = native.save

    def __init__(self, config: Config):
        super().__init__(config)
        self.encoder, self.index = Encoder(config), None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights as gpt.py does, but set CCA's last matrices to 0, so that it adds nothing yet."""
        super().initialize()
        for block in self.model.layers:
            if block.cross_attn is not None:
                block.cross_attn.o_proj.weight.zero_()

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        cu_seqlens=None,
        neighbours: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised hidden states (B, T, D) of tokens (B, T).

        neighbours: int64 (B, U, k, r), of the whole chunks of tokens; None without retrieval. A RetroCache
        retrieves by itself. Raises ValueError for neighbours of another shape, and for cu_seqlens.
        """
        if cu_seqlens is not None:
            raise ValueError("--document-mask: neighbours belong to chunks of whole rows; leave it out")
        (B, T), c = tokens.shape, self.config
        if neighbours is not None and neighbours.shape[:2] + neighbours.shape[3:] != (
            B,
            T // c.chunk,
            2 * c.chunk,
        ):
            expected = f"({B}, {T // c.chunk}, k, {2 * c.chunk})"
            raise ValueError(
                f"neighbours {tuple(neighbours.shape)}: expected {expected} for {B} x {T} tokens"
            )

        # The first layer with CCA computes E from its states; the others use the same E.
        found = None

        def encode(x: Tensor, layer: int) -> tuple[Tensor | None, int]:
            nonlocal found
            if layer == c.retrieval_layers[0]:
                found = self.encode(x, tokens, neighbours, cache)
            return found

        retrieves = isinstance(cache, RetroCache) or (neighbours is not None and neighbours.shape[1] > 0)
        at = torch.arange(T, device=tokens.device)[None]
        positions = at if cache is None else cache.positions(T, tokens.device)
        x = self.model.embed_tokens(tokens)
        if c.positions == "learned":
            x = x + self.model.embed_positions(positions)
        rotation = self.rotation(positions)
        for block in self.model.layers:
            x = block(x, rotation, cache, None, encode if retrieves else None)
        if cache is not None:
            cache.advance()
        return self.model.norm(x)

    def encode(self, x, tokens, neighbours, cache) -> tuple[Tensor | None, int]:
        """Return E (B, U, k r, D) and the place of the first token, as `Block.forward` needs them."""

        def encoder(neighbours: Tensor, states: Tensor) -> Tensor:
            return self.encoder(self.model.embed_tokens(neighbours), states)

        if neighbours is None:
            return cache.encode(x, tokens, encoder)
        (B, T, D), m = x.shape, self.config.chunk
        states = x[:, : T // m * m].reshape(B, T // m, m, D)
        return encoder(neighbours, states), 1 - m

    def forward(self, tokens: Tensor, *, cache=None, cu_seqlens=None, neighbours=None) -> Tensor:
        """Return the logits (B, T, V) of the token after each of tokens (B, T); arguments as for `hidden`."""
        return self.logits(self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens, neighbours=neighbours))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean nats per target of a batch of `make_batch`, and no metrics."""
        hidden = self.hidden(batch["tokens"], **{n: batch.get(n) for n in ("cu_seqlens", "neighbours")})
        options = {"softcap": self.config.logit_softcap, "backend": self.config.kernels}
        return linear_cross_entropy(hidden, self.head_weight, batch["targets"], **options)[0], {}

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> KVCache:
        """Return an empty cache; with an index one that retrieves at the end of each chunk. Raises ValueError
        then for prompts of several lengths, and for a compiled step (static)."""
        if self.index is None:
            return super().new_cache(lengths, max_len, static)
        if static:
            raise ValueError("compile: a step that retrieves is not compiled; leave it out")
        return RetroCache(self.config, lengths, max_len, self.model.norm.weight, self.index)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, kernels: str = "auto") -> "Retro":
        """Return the Retro in a directory, with its index if there is one; or of a model of gpt.py the Retro
        that is to be retrofitted, with CCA in every second layer."""
        if native.is_native(directory):
            model = native.load(directory, kernels, cls)
            if (Path(directory) / DATABASE).is_dir():
                model.index = Index.open(Path(directory) / DATABASE)
            return model
        base = GPT.from_pretrained(directory, kernels=kernels)
        values = {field.name: getattr(base.config, field.name) for field in fields(gpt.Config)}
        layers = tuple(range(1, base.config.n_layers, 2)) or (0,)
        model = cls(Config(**values, retrieval_layers=layers, retrofit=True)).to(base.model.norm.weight.dtype)
        model.load_state_dict(base.state_dict(), strict=False)
        return model


# --- what train.py looks up by name, see engine/contract.py: the model, and its task

Model = Retro
DATA, STEPS, BATCH_SIZE = "facts", 600, 16
LEARNING_RATE = 0.25  # times the default rate of a decoder of this size: with 1 the loss rises again
load_data, show = retro_rows.load_data, retro_rows.show


def make_batch(rows: list[dict], config: Config, generator, tokenizer=None) -> dict[str, Tensor]:
    """Return "tokens" and "targets" (B, T), and "neighbours" (B, U, k, r) of B rows of retro_rows.py."""
    return retro_rows.batch_of(rows)


def wrap(model: Retro, config: Config) -> Retro:
    """Return the model; of a retrofitted one only the encoder and CCA learn."""
    for name, p in model.named_parameters():
        if config.retrofit and not (name.startswith("encoder.") or ".cross_" in name):
            p.requires_grad_(False)
    return model


def save(model: Retro, dataset, directory: Path) -> None:
    """Write the model, and beside it the text to retrieve from with its index."""
    model.save_pretrained(directory)
    dataset.train.index.save(Path(directory) / DATABASE)


if __name__ == "__main__":
    command.run(partial(decoder_main, Retro, SIZES))
