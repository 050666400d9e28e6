"""Layers that carry adapters: one frozen base model, and many small changes of it that can be switched.

    y = g * (W (u * x) + B A x) + c * b

Every method of lora.py sets some of the five factors A, B, g, u, c and leaves the others out. So one
function, `adapted`, computes this equation for all of them, whatever the layer is: a linear layer, an
embedding or the stacked matrices of moe.py's experts; with W in full precision or in 4 bits
(posttraining/nf4.py); with one adapter for the whole batch or another one for each row.

    with use(model, "french"): ...                one adapter for the whole batch; None: the base alone
    with use(model, ["french", None, ...]): ...   one for each row of a batch. Their factors are gathered, and
                                                  all rows are multiplied at once, as in S-LoRA (Sheng et al.
                                                  2023, section 5)

Shapes: B batch, T tokens, N outputs and D inputs of a layer, r rank, E experts, V vocabulary, M rows sorted
by expert.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import grouped_matmul
from moe import ExpertLinear
from posttraining import nf4


class Factors(NamedTuple):
    """The factors that turn W x + b into g * (W (u * x) + B A x) + c * b. None leaves a factor out.

    The dots in the shapes are E for stacked experts, or the rows of a batch that has several adapters.
    """

    A: Tensor | None = None  # (..., r, D)
    B: Tensor | None = None  # (..., N, r), multiplied by the scale s
    g: Tensor | None = None  # (..., N)
    u: Tensor | None = None  # (..., D)
    c: Tensor | None = None  # (..., N)


def adapted(
    x: Tensor,
    factors: Factors,
    base: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor] = F.linear,
    broadcast: Callable[[Tensor], Tensor] = lambda vector: vector,
    dropout: float = 0.0,
) -> Tensor:
    """Return g * (W (u * x) + B A x) + c * b for x (..., D), where base(x) is W x + b.

    multiply(x, matrix) multiplies x by A or B; broadcast(vector) gives g, u or c the shape in which they
    multiply x. Both depend on what the dots in the shapes of `Factors` are.
    """
    A, B, g, u, c = factors
    y = base(x if u is None else x * broadcast(u).to(x.dtype))  # W (u * x) + b

    # Scale by g and c as an addition of (g - 1) y, so that a scale of 1 adds an exact zero.
    if g is not None:
        y = y + (broadcast(g) - 1).to(y.dtype) * (y if bias is None else y - bias)
    if c is not None and bias is not None:
        y = y + (broadcast(c) - 1).to(y.dtype) * bias

    if A is not None:
        low_rank = multiply(multiply(F.dropout(x, dropout), A.to(x.dtype)), B.to(x.dtype))
        y = y + (low_rank if g is None else broadcast(g).to(y.dtype) * low_rank)
    return y


class Adapted(nn.Module):
    """A layer, `base_layer`, with adapters by name, of which one is active, none, or one for each row."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.row_factors: Factors | None = None  # takes the place of `active` within `use` of several names

    def base_weight(self) -> Tensor:
        """Return W (..., N, D)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def factors(self) -> Factors | None:
        """Return the factors of the active adapter, or None if it does not change this layer."""
        if self.active in self.adapters:
            return self.adapters[self.active].factors(self.base_weight)
        return None

    @property
    def dropout(self) -> float:
        return getattr(self.adapters[self.active], "dropout", 0.0) if self.training else 0.0

    def factors_of_rows(self, names: Sequence[str | None]) -> Factors:
        """Return the factors of one adapter for each row, A (rows, r, D) and so on, or None."""
        W = self.base_weight()
        N, D = W.shape
        distinct = list(dict.fromkeys(names))
        found = [self.adapters[n].factors(lambda: W) if n in self.adapters else Factors() for n in distinct]
        number = {name: i for i, name in enumerate(distinct)}
        index = torch.tensor([number[name] for name in names], device=W.device)

        # Rows without a factor get one that changes nothing, and smaller ranks are padded with zeros.
        rank = max((len(factors.A) for factors in found if factors.A is not None), default=0)
        neutral = {"A": W.new_zeros(0, D), "B": W.new_zeros(N, 0)}
        neutral |= {"g": W.new_ones(N), "u": W.new_ones(D), "c": W.new_ones(N)}
        of_rows = {}
        for letter, unchanged in neutral.items():
            tensors = [getattr(factors, letter) for factors in found]
            if all(t is None for t in tensors):
                continue
            tensors = [unchanged if t is None else t for t in tensors]
            if letter == "A":
                tensors = [F.pad(t, (0, 0, 0, rank - t.shape[0])) for t in tensors]
            elif letter == "B":
                tensors = [F.pad(t, (0, rank - t.shape[1])) for t in tensors]
            stacked = torch.stack(tensors)
            of_rows[letter] = stacked if len(distinct) == len(names) else stacked[index]
        return Factors(**of_rows)

    def merged_weight(self) -> Tensor:
        """Return W' = g (W u + B A), (..., N, D), in the dtype of W."""
        if self.row_factors is not None:
            raise ValueError(
                "the rows of a batch have different adapters, so this layer has no single weight; leave the "
                "`use` block, or name one adapter in it"
            )
        W = self.base_weight()
        A, B, g, u, _ = self.factors() or Factors()
        merged = W if u is None else W * u[..., None, :].to(W.dtype)
        if A is not None:
            merged = merged + (B @ A).to(W.dtype)
        return merged if g is None else merged * g[..., None].to(W.dtype)


class AdaptedLinear(Adapted):
    """A linear layer with adapters."""

    @property
    def weight(self) -> Tensor:
        """W' (N, D), for gpt.py, where the loss takes the head's weight instead of calling the layer."""
        return self.merged_weight()

    def forward(self, x: Tensor) -> Tensor:
        if self.row_factors is not None:
            n_rows = len(next(t for t in self.row_factors if t is not None))
            check_rows(n_rows, x.shape[:-1])
            by_row = x.reshape(n_rows, -1, x.shape[-1])  # (B, T, D), also of (B, D)
            y = adapted(
                by_row, self.row_factors, self.base_layer, self.bias, multiply_rows, lambda v: v[:, None]
            )
            return y.view(*x.shape[:-1], -1)
        factors = self.factors()
        if factors is None:
            return self.base_layer(x)
        return adapted(x, factors, self.base_layer, self.bias, dropout=self.dropout)

    def merged(self) -> nn.Linear:
        """Return an ordinary linear layer with weight W' and bias c * b."""
        W = self.merged_weight()
        plain = nn.Linear(W.shape[1], W.shape[0], bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(W.contiguous(), requires_grad=False)
        if self.bias is not None:
            c = (self.factors() or Factors()).c
            bias = self.bias if c is None else self.bias * c.to(self.bias.dtype)
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain


class AdaptedEmbedding(Adapted):
    """An embedding with adapters: it is the linear layer W (D, V) of one-hot x, so A (r, V) is a look-up and
    B (D, r) a product. Only these two factors can adapt it."""

    bias = None

    def base_weight(self) -> Tensor:
        return self.base_layer.weight.mT

    @property
    def weight(self) -> Tensor:
        """The base's (V, D). A head that shares this matrix is not adapted with the embedding, as in PEFT."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base_layer(tokens)
        if self.row_factors is not None:
            A, B = self.row_factors[:2]
            check_rows(len(A), tokens.shape)
            row = torch.arange(len(A), device=tokens.device)[:, None]
            return y + multiply_rows(A.mT[row, tokens], B).to(y.dtype)  # A.mT[row, tokens]: (B, T, r)
        factors = self.factors()
        if factors is None:
            return y
        return y + F.linear(F.embedding(tokens, factors.A.mT), factors.B).to(y.dtype)

    def merged(self) -> nn.Embedding:
        """Return an ordinary embedding with the transpose of W'."""
        W = self.merged_weight().mT
        plain = nn.Embedding(*W.shape, device="meta")
        plain.weight = nn.Parameter(W.contiguous(), requires_grad=False)
        return plain


class AdaptedExpertLinear(Adapted):
    """The matrices (E, N, D) of moe.py's experts with adapters: each expert has its own A and B."""

    bias = None

    def factors_of_rows(self, names: Sequence[str | None]) -> Factors:
        if any(name in self.adapters for name in names):
            raise ValueError(
                "adapters of experts cannot be mixed in one batch, because experts receive tokens without "
                "their row; use one adapter for the whole batch"
            )
        return Factors()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return (M, N) of x (M, D), in which the rows of expert e end at offsets[e]."""
        base = partial(self.base_layer, offsets=offsets)
        factors = self.factors()
        if factors is None:
            return base(x)
        expert = torch.bucketize(torch.arange(len(x), device=x.device), offsets, right=True)  # (M,)
        multiply = partial(grouped_matmul, offsets=offsets, backend=self.base_layer.backend)
        return adapted(x, factors, base, None, multiply, lambda v: v[expert], self.dropout)

    def merged(self) -> ExpertLinear:
        """Return an ordinary ExpertLinear with the weight W'."""
        W = self.merged_weight()
        E, N, D = W.shape
        with torch.device("meta"):
            plain = ExpertLinear(E, D, N, self.base_layer.backend)
        plain.weight = nn.Parameter(W.contiguous(), requires_grad=False)
        return plain


def multiply_rows(x: Tensor, matrices: Tensor) -> Tensor:
    """Return the products (B, T, N) of each row of x (B, T, D) with its own matrix of (B, N, D)."""
    return torch.bmm(x, matrices.mT.to(x.dtype))


def check_rows(n_rows: int, shape: torch.Size) -> None:
    """Raise ValueError unless a batch of that shape, (B, T) or (B,), has n_rows rows."""
    if shape[0] != n_rows:
        raise ValueError(
            f"adapters for {n_rows} rows, but a batch of shape {tuple(shape)}; give one for each row"
        )


WRAPPERS = {
    nn.Linear: AdaptedLinear,
    nn.Embedding: AdaptedEmbedding,
    ExpertLinear: AdaptedExpertLinear,
    nf4.QuantizedLinear: AdaptedLinear,
    nf4.QuantizedEmbedding: AdaptedEmbedding,
    nf4.QuantizedExpertLinear: AdaptedExpertLinear,
}


def layers_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each layer that is adapted or can be."""
    for name, child in module.named_children():
        if isinstance(child, (Adapted, *WRAPPERS)):
            yield prefix + name, child
        else:
            yield from layers_of(child, f"{prefix}{name}.")


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the layers that have adapters, by their paths in the model."""
    return {path: layer for path, layer in layers_of(model) if isinstance(layer, Adapted)}


def adaptable_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return all layers that can have adapters, by their paths in the model. Those that have none yet come in
    a new wrapper, which is not part of the model until `replace_layer` puts it there."""
    layers = dict(layers_of(model))
    embedding = layers.get("model.embed_tokens")
    if getattr(model, "lm_head", 0) is None and embedding is not None:  # a decoder with a tied head
        layers["lm_head"] = head_of_embedding(embedding)
    for path, layer in layers.items():
        if not isinstance(layer, Adapted):
            wrapper = next(wrapper for kind, wrapper in WRAPPERS.items() if isinstance(layer, kind))
            layers[path] = wrapper(layer).train(model.training)
    return layers


def replace_layer(model: nn.Module, path: str, layer: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def head_of_embedding(embedding: nn.Module) -> nn.Module:
    """Return a linear layer that shares the matrix (V, D) of an embedding, but not its adapters."""
    if isinstance(embedding, AdaptedEmbedding):
        embedding = embedding.base_layer
    if isinstance(embedding, nf4.QuantizedEmbedding):
        return nf4.QuantizedLinear.sharing(embedding)
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = embedding.weight
    return head


def matching(layers: dict[str, Adapted], pattern: str) -> list[str]:
    """Return the paths of layers that the pattern matches, as described at lora.Config.target_modules.

    Raises ValueError for a pattern that matches none or is not a regular expression.
    """
    if pattern == "all-linear":
        heads = ("lm_head", "cls.", "bert.pooler.")
        linear = [path for path, layer in layers.items() if not isinstance(layer, AdaptedEmbedding)]
        return [path for path in linear if not path.startswith(heads)]
    try:
        found = [path for path in layers if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    except re.error as error:
        raise ValueError(f"target_modules {pattern!r}: not a regular expression ({error})") from None
    if not found:
        ends = " | ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise ValueError(f"target_modules {pattern!r}: matches no layer; expected some of {ends}")
    return found


def adapter_names(layers: dict[str, Adapted]) -> list[str]:
    """Return the names of all adapters in these layers, the oldest first."""
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


def check_name(model: nn.Module, name: str) -> None:
    """Raise ValueError unless a new adapter can have this name: that of a submodule of nn.ModuleDict."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}: expected one without dots, that no method has")
    if name in adapter_names(adapted_layers(model)):
        raise ValueError(f"adapter name {name!r}: there is one of that name; choose another")


def check_exist(layers: dict[str, Adapted], names: Sequence[str | None]) -> None:
    """Raise ValueError unless there are names, and each but None is that of an adapter in these layers."""
    if not names:
        raise ValueError("no adapter is named; give one name, or one for each row of a batch")
    existing = adapter_names(layers)
    for name in names:
        if name is not None and name not in existing:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(existing) or 'none'}")


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Use the adapter of that name from now on, or the base alone (None).

    Raises ValueError if there is no such adapter.
    """
    layers = adapted_layers(model)
    check_exist(layers, [name])
    for layer in layers.values():
        layer.active = name


@contextmanager
def use(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Use an adapter within this block, none (None), or with a sequence of names one for each row of a batch.

    A sequence takes the memory of one adapter per row, allows one backward pass to its adapters, and leaves
    out their dropout. A compiled model compiles again for each single name, but only once for all sequences
    of one length. Raises ValueError for an unknown name, for no names, and for a sequence of several names if
    experts are adapted.
    """
    layers = adapted_layers(model)
    before = [(layer.active, layer.row_factors) for layer in layers.values()]
    if names is not None and not isinstance(names, str) and len(set(names)) == 1:
        names = names[0]
    one = names is None or isinstance(names, str)
    check_exist(layers, [names] if one else names)
    try:
        for layer in layers.values():
            if one:
                layer.active, layer.row_factors = names, None
                continue
            factors = layer.factors_of_rows(names)
            layer.active = None
            layer.row_factors = factors if any(t is not None for t in factors) else None
        yield
    finally:
        for layer, state in zip(layers.values(), before, strict=True):
            layer.active, layer.row_factors = state
