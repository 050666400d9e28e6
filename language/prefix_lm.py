"""Prefix language modelling: a decoder reads the beginning of a text from both sides, and writes the rest.

    x_1 ... x_P | x_{P+1} ... x_N           loss = -mean_{i > P} log p(x_i | x_1 ... x_{i-1})

In a decoder a token sees only those before it, in an encoder all. Here a token of the prefix sees the whole
prefix, and a later token all before it, prefix included: token i sees token j if j <= i or j <= P (Raffel et
al. 2019, section 3.2.1; Dong et al. 2019). One stack does the work of the two in language/t5.py.

No new attention is needed. The prefix passes through the decoder first, without a causal mask, and its keys
and values are kept. The rest passes second and attends to these keys and its own. Its causal mask is aligned
to the last key, so each token sees the whole prefix. Gradients flow through both passes. If the prefix were
empty, this would be a decoder, and with nothing behind the prefix an encoder.

    python train.py --model prefix_lm                                 a GPT that learns so
    python train.py --model moe --task prefix_lm --set aux_loss_coef=0 --out runs/prefix-moe

The balance losses of a mixture of experts are not computed, so their coefficients must be 0.

Shapes: B rows, N tokens of a row, P of its prefix, D model width.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import generate as decoding
from data.rows import Dataset, Row, stack
from engine import contract
from engine.settings import refuse_balance_losses
from kernels import linear_cross_entropy

MODEL = "gpt"


class Prefix:
    """The keys and values (B, P, G, K) of a prefix in each layer, from the first pass of training.

    It has the methods of `generate.KVCache` that a decoder calls, and so has `Behind`. What they return does
    not depend on when they are called, since --checkpoint-activations computes the blocks again.
    """

    def __init__(self):
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions (1, T) of the T tokens."""
        return torch.arange(T, device=device)[None]

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Keep k and v (B, P, G, K), and return them, to attend to, and the mask."""
        self.kept.setdefault(layer, (k, v))
        return k, v, mask | {"causal": False}

    def advance(self) -> None:
        """End the pass."""


class Behind(Prefix):
    """The second pass, of the tokens behind a prefix, which attend to its keys and values and their own."""

    def __init__(self, prefix: Prefix):
        self.kept, self.n = prefix.kept, prefix.kept[0][0].shape[1]  # n: the tokens of the prefix

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions (1, T) of the T tokens."""
        return torch.arange(self.n, self.n + T, device=device)[None]

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Return the keys and values to attend to, and the mask, for k and v (B, T, G, K)."""
        before_k, before_v = self.kept[layer]
        return torch.cat((before_k, k), 1), torch.cat((before_v, v), 1), mask


class PrefixCache(decoding.KVCache):
    """The cache of generation, with prompts in which each token sees the whole prompt."""

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        if self.filled:
            return super().store(layer, k, v, mask)
        self.fill(layer, k, v)
        lengths = None if self.uniform else torch.tensor(self.lengths, device=k.device)
        return k, v, mask | {"causal": False, "seqlens_k": lengths}


class PrefixModel(nn.Module):
    """A decoder as generate.py needs it, whose prompts are prefixes. Raises ValueError as `check`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        check(model)
        self.model, self.config = model, model.config

    def hidden(self, tokens: Tensor, *, cache: PrefixCache) -> Tensor:
        """Return the hidden states (B, T, D) of the next tokens (B, T), and add them to the cache."""
        return self.model.hidden(tokens, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        return self.model.logits(hidden)

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> PrefixCache:
        """Return an empty cache. Raises ValueError for a static one, which has no prefixes."""
        if static:
            raise ValueError("generate: a prefix language model does not run compiled; leave out compile")
        return PrefixCache(self.config, lengths, max_len, like=next(self.parameters()))


def check(model: nn.Module) -> None:
    """Raise ValueError for a model with a sliding window, which would hide parts of a prefix."""
    if model.config.window is not None:
        raise ValueError(f"window {model.config.window}: a prefix is seen as a whole; expected None")


def wrap(model: nn.Module, config) -> nn.Module:
    """Return the model itself. Raises ValueError as `check`, and for one with balance losses."""
    check(model)
    refuse_balance_losses(model.config)
    return model


def load_data(args: Namespace, config) -> Dataset:
    """Return rows of the text that --data names. Raises ValueError for --document-mask."""
    if args.document_mask:
        raise ValueError("--document-mask: a prefix and what follows it are one row; leave it out")
    return contract.load_text(args, config)


def make_batch(rows: list[Row], config, generator: Generator, tokenizer) -> dict[str, Tensor]:
    """Return a batch of B rows {"tokens": (N + 1,)}: "prefix" (B, P), "tokens" (B, N - P) behind it, and
    "targets" (B, N - P + 1): the token that follows the prefix, and that which follows each of "tokens".

    P is the same for all rows of a batch, and each number from 1 to N - 1 is equally likely.
    """
    tokens = stack(rows)["tokens"].long()
    N = tokens.shape[1] - 1
    P = int(torch.randint(1, N, (), generator=generator)) if N > 1 else 1
    return {"prefix": tokens[:, :P], "tokens": tokens[:, P:N], "targets": tokens[:, P:]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean nats per token behind the prefix, and no metrics. Raises ValueError as `check`."""
    check(model)
    hidden = hidden_behind(model, batch["prefix"], batch["tokens"])  # (B, N - P + 1, D)
    options = {"softcap": model.config.logit_softcap, "backend": model.config.kernels}
    return linear_cross_entropy(hidden, model.head_weight, batch["targets"].contiguous(), **options)[0], {}


def hidden_behind(model: nn.Module, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Return the hidden states (B, T + 1, D) of the last token of a prefix (B, P), and of tokens (B, T)."""
    read = Prefix()
    last = model.hidden(prefix, cache=read)[:, -1:]
    return torch.cat((last, model.hidden(tokens, cache=Behind(read))), dim=1) if tokens.shape[1] else last


def show(model: nn.Module, dataset, out: Path) -> str:
    """Return the beginning of the held-out text, and what the model writes behind it."""
    tokenizer, limit = dataset.tokenizer, model.config.max_seq_len
    prefix = dataset.val[0]["tokens"][: min(60, limit // 2)].tolist()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    options = {"temperature": 0.8, "top_p": 0.95, "generator": generator}
    n_new = min(120, limit - len(prefix) - 1)
    (new,) = decoding.generate(PrefixModel(model), [prefix], n_new, **options)
    return f"{tokenizer.decode(prefix)}|{tokenizer.decode(new)}"
