"""Layers that carry adapters: one base, and beside it as many small changes of it as there are tasks.

    y = g * (W (u * x) + B A x) + c * b

Every method of lora.py comes down to some of these five factors, so they are applied in one place, `adapted`,
whatever the layer: a linear one, an embedding, or moe.py's stacks of experts; with W in full precision or in
4 bits; with the same factors for a whole batch, or with others for each row.

    use(model, "french")              within it, the model works with this adapter; None: the base alone
    use(model, ["french", None, ...]) one for each row of the batch. A row's factors are gathered and all rows
                                      multiplied at once, as in S-LoRA (Sheng et al. 2023, section 5)
    merge(model), unmerge(model)      W' = g (W u + B A) in place of W, and back

Shapes: B batch, T tokens, N outputs and D inputs of a layer, r rank, E experts, V vocabulary.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe
from kernels import grouped_matmul
from posttraining import nf4


class Factors(NamedTuple):
    """What an adapter does to a layer W x + b: it becomes g * (W (u * x) + B A x) + c * b. None: nothing."""

    A: Tensor | None = None  # (..., r, D); the dots: E of stacked experts, or one for each row of a batch
    B: Tensor | None = None  # (..., N, r), with s in it
    g: Tensor | None = None  # (..., N)
    u: Tensor | None = None  # (..., D)
    c: Tensor | None = None  # (..., N)


def adapted(
    x: Tensor,
    factors: Factors,
    base: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    multiply: Callable[[Tensor, Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """g * (W (u * x) + B A x) + c * b, where base(x) is W x + b, for x (..., D).

    multiply(x, w) is the product of x with its w; spread(v) brings scales to the rows of x. Written so that
    an adapter at its start adds exact zeros.
    """
    A, B, g, u, c = factors
    y = base(x if u is None else x * spread(u).to(x.dtype))
    if g is not None:
        y = y + (spread(g) - 1).to(y.dtype) * (y if bias is None else y - bias)
    if c is not None and bias is not None:
        y = y + (spread(c) - 1).to(y.dtype) * bias
    if A is not None:
        low_rank = multiply(multiply(F.dropout(x, dropout), A.to(x.dtype)), B.to(x.dtype))
        y = y + (low_rank if g is None else spread(g).to(y.dtype) * low_rank)
    return y


def same(v: Tensor) -> Tensor:
    return v


class Adapted(nn.Module):
    """A layer, `base_layer`, and the adapters it may be used with, by name."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.rows: Factors | None = None  # of each row of a batch; then `active` does not count

    def base_weight(self) -> Tensor:
        """W (..., N, D)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def factors(self) -> Factors | None:
        if self.active in self.adapters:
            return self.adapters[self.active].factors(self.base_weight)
        return None

    @property
    def dropout(self) -> float:
        return getattr(self.adapters[self.active], "dropout", 0.0) if self.training else 0.0

    def merged_weight(self) -> Tensor:
        """W' (..., N, D), in the dtype of W; its bias is `merged_bias`."""
        if self.rows is not None:
            raise ValueError(
                "this layer's weight is asked for as one, but the rows of a batch have different"
            )
        W = self.base_weight()
        A, B, g, u, _ = self.factors() or Factors()
        merged = W if u is None else W * u[..., None, :].to(W.dtype)
        if A is not None:
            merged = merged + (B @ A).to(W.dtype)
        return merged if g is None else merged * g[..., None].to(W.dtype)

    def merged_bias(self) -> Tensor | None:
        _, _, _, _, c = self.factors() or Factors()
        return self.bias if c is None or self.bias is None else self.bias * c.to(self.bias.dtype)

    def stack(self, names: Sequence[str | None]) -> Factors:
        """The factors of one adapter for each row (rows, ...), smaller ranks filled up with zeros."""
        W = self.base_weight()
        distinct = list(dict.fromkeys(names))
        found = [self.adapters[n].factors(lambda: W) if n in self.adapters else Factors() for n in distinct]
        number = {name: i for i, name in enumerate(distinct)}
        index = torch.tensor([number[name] for name in names], device=W.device)
        r = max((f.A.shape[0] for f in found if f.A is not None), default=0)

        def rows(part: str, nothing: Tensor) -> Tensor | None:
            tensors = [getattr(f, part) for f in found]
            if all(t is None for t in tensors):
                return None
            tensors = [nothing if t is None else t for t in tensors]
            if part == "A":
                tensors = [F.pad(t, (0, 0, 0, r - t.shape[0])) for t in tensors]
            elif part == "B":
                tensors = [F.pad(t, (0, r - t.shape[1])) for t in tensors]
            stacked = torch.stack(tensors)
            return stacked if len(distinct) == len(names) else stacked[index]

        N, D = W.shape
        nothing = {"A": W.new_zeros(0, D), "B": W.new_zeros(N, 0), "g": W.new_ones(N), "u": W.new_ones(D)}
        return Factors(**{part: rows(part, t) for part, t in (nothing | {"c": nothing["g"]}).items()})


def of_each(x: Tensor, w: Tensor) -> Tensor:
    """The product of each row of x (B, T, D) with its own w (B, N, D)."""
    return torch.bmm(x, w.mT.to(x.dtype))


def check_rows(n: int, shape: torch.Size) -> None:
    """ValueError unless a batch of that shape, (B, T) or (B,), is one of n rows."""
    if shape[0] != n:
        raise ValueError(f"adapters for {n} rows, but a batch of shape {tuple(shape)}; give one for each row")


class AdaptedLinear(Adapted):
    @property
    def weight(self) -> Tensor:
        """W' (N, D): what gpt.py multiplies with where it takes the head's weight into the loss."""
        return self.merged_weight()

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            n = len(next(t for t in self.rows if t is not None))
            check_rows(n, x.shape[:-1])
            by_row = x.reshape(n, -1, x.shape[-1])  # (B, T, D), also of (B, D)
            y = adapted(by_row, self.rows, self.base_layer, self.bias, of_each, lambda v: v[:, None])
            return y.view(*x.shape[:-1], -1)
        factors = self.factors()
        if factors is None:
            return self.base_layer(x)
        return adapted(x, factors, self.base_layer, self.bias, F.linear, same, self.dropout)


class AdaptedEmbedding(Adapted):
    """An embedding is the linear layer W (D, V) of one-hot x, so A (r, V) is a look-up and B (D, r) a
    product; only these two can adapt it."""

    bias = None

    def base_weight(self) -> Tensor:
        return self.base_layer.weight.mT

    @property
    def weight(self) -> Tensor:
        """The base's (V, D): a head that shares the matrix is not adapted with the embeddings, as in PEFT."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base_layer(tokens)
        if self.rows is not None:
            A, B = self.rows[:2]
            check_rows(len(A), tokens.shape)
            row = torch.arange(len(A), device=tokens.device)[:, None]
            return y + of_each(A.mT[row, tokens], B).to(y.dtype)  # A.mT[...]: (B, T, r)
        factors = self.factors()
        if factors is None:
            return y
        return y + F.linear(F.embedding(tokens, factors.A.mT), factors.B).to(y.dtype)


class AdaptedStack(Adapted):
    """One of the two stacks of matrices (E, N, D) of moe.py's experts, each with its own A and B."""

    bias = None

    def __init__(self, experts: nn.Module, name: str):
        super().__init__(None)
        self.__dict__["experts"] = experts  # not a child: AdaptedExperts has it
        self.name = name

    def base_weight(self) -> Tensor:
        return getattr(self.experts, self.name)

    def stack(self, names: Sequence[str | None]) -> Factors:
        if any(name in self.adapters for name in names):
            raise ValueError(
                "adapters of experts cannot be mixed in one batch: a token's row is not known there"
            )
        return Factors()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As moe.py's experts: the rows of expert e in x (M, D) end at offsets[e]."""
        base = partial(self.experts.product, self.name, offsets=offsets)
        factors = None if self.rows is not None else self.factors()
        if factors is None:
            return base(x)
        expert = torch.bucketize(torch.arange(len(x), device=x.device), offsets, right=True)  # (M,)
        multiply = partial(grouped_matmul, offsets=offsets, backend=self.experts.backend)
        return adapted(x, factors, base, None, multiply, lambda v: v[expert], self.dropout)


class AdaptedExperts(moe.Experts):
    """moe.py's experts, with adapters beside each of their products."""

    def __init__(self, base_layer: moe.Experts):
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.gate_up_proj = AdaptedStack(base_layer, "gate_up_proj")
        self.down_proj = AdaptedStack(base_layer, "down_proj")

    def product(self, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        return getattr(self, name)(x, offsets)


LINEAR = (nn.Linear, nf4.QuantizedLinear)
EMBEDDING = (nn.Embedding, nf4.QuantizedEmbedding)


def base_of(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, Adapted) else layer


def head_of_embedding(embedding: nn.Module, copy: bool = False) -> nn.Module:
    """The linear layer with the matrix (V, D) of an embedding, shared or copied."""
    if isinstance(embedding, nf4.QuantizedEmbedding):
        return nf4.QuantizedLinear.sharing(embedding)
    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    head.weight = nn.Parameter(embedding.weight.detach().clone()) if copy else embedding.weight
    return head


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted, by the names they have without adapters: those that are already
    (`Adapted`), linear layers, embeddings, and of moe.Experts the two stacks, each with their module."""
    found = {}

    def look(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            name = f"{path}{name}"
            if isinstance(child, moe.Experts):
                for stack in ("gate_up_proj", "down_proj"):
                    found[f"{name}.{stack}"] = (
                        getattr(child, stack) if isinstance(child, AdaptedExperts) else child
                    )
            elif isinstance(child, (Adapted, *LINEAR, *EMBEDDING)):
                found[name] = child
            else:
                look(child, f"{name}.")

    look(model, "")
    if getattr(model, "lm_head", 0) is None:  # gpt.py, the head tied to the embeddings
        found["lm_head"] = head_of_embedding(base_of(found["model.embed_tokens"]))
    return found


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    return {path: layer for path, layer in adaptable_layers(model).items() if isinstance(layer, Adapted)}


def replace_layer(model: nn.Module, path: str, layer: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def matching(layers: dict[str, nn.Module], pattern: str) -> list[str]:
    """The names of `adaptable_layers` that a pattern matches, see Config.target_modules.

    Raises ValueError for a pattern that matches none or is no regular expression."""
    if pattern == "all-linear":
        beside = ("lm_head", "cls.", "bert.pooler.")
        embeddings = [p for p, layer in layers.items() if isinstance(base_of(layer), EMBEDDING)]
        return [p for p in layers if not p.startswith(beside) and p not in embeddings]
    try:
        found = [path for path in layers if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    except re.error as error:
        raise ValueError(f"target_modules {pattern!r}: not a regular expression ({error})") from None
    if not found:
        ends = " | ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise ValueError(f"target_modules {pattern!r}: matches no layer; expected some of {ends}")
    return found


def weight_shape(layer: nn.Module, path: str) -> torch.Size:
    if isinstance(layer, Adapted):
        return layer.base_weight().shape
    if isinstance(layer, moe.Experts):
        return getattr(layer, path.rpartition(".")[2]).shape
    return layer.weight.mT.shape if isinstance(layer, EMBEDDING) else layer.weight.shape


def adapt_layer(model: nn.Module, path: str, layer: nn.Module) -> Adapted:
    """The layer of that name, one of `adaptable_layers`, put into an `Adapted` unless it is in one."""
    if isinstance(layer, Adapted):
        return layer
    if isinstance(layer, moe.Experts):
        experts, _, name = path.rpartition(".")
        if model.get_submodule(experts) is layer:
            replace_layer(model, experts, AdaptedExperts(layer).train(model.training))
        return getattr(model.get_submodule(experts), name)
    wrapped = (AdaptedEmbedding if isinstance(layer, EMBEDDING) else AdaptedLinear)(layer)
    replace_layer(model, path, wrapped.train(model.training))
    return wrapped


def adapter_names(model: nn.Module) -> list[str]:
    return names_in(adapted_layers(model))


def names_in(layers: dict[str, Adapted]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Use the adapter of that name from now on; None: the base alone. ValueError if there is none."""
    layers = adapted_layers(model)
    check_known(layers, [name])
    for layer in layers.values():
        layer.active = name


def check_known(layers: dict[str, Adapted], names: Sequence[str | None]) -> None:
    known = names_in(layers)
    unknown = [name for name in names if name is not None and name not in known]
    if unknown:
        raise ValueError(f"no adapter {unknown[0]!r}; there are {', '.join(known) or 'none'}")


@contextmanager
def use(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Within it, the model works with the adapter of that name, with none (None), or, given a sequence, with
    one for each row of its batches, in products of the whole batch.

    A sequence takes the memory of an adapter for each row. Gradients flow to its adapters for one backward
    pass. A compiled model compiles anew for each name, for other sequences of the same length it does not.
    Raises ValueError for an unknown name, and for a sequence of several if experts are adapted.
    """
    layers = adapted_layers(model)
    before = [(layer.active, layer.rows) for layer in layers.values()]
    if names is not None and not isinstance(names, str) and len(set(names)) == 1:
        names = names[0]
    one = names is None or isinstance(names, str)
    check_known(layers, [names] if one else names)
    try:
        for layer in layers.values():
            if one:
                layer.active, layer.rows = names, None
            else:
                factors = layer.stack(names)
                layer.active = None
                layer.rows = factors if any(t is not None for t in factors) else None
        yield
    finally:
        for layer, state in zip(layers.values(), before, strict=True):
            layer.active, layer.rows = state


def untie(model: nn.Module, copy: bool) -> None:
    """Give a GPT whose head is the embedding matrix a head of its own, with the base's matrix."""
    model.lm_head = head_of_embedding(base_of(model.model.embed_tokens), copy)
    model.config = replace(model.config, tie_embeddings=False)


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None) -> None:
    """Put the adapter of that name (None: the one in use) into the weights: each adapted layer is replaced by
    an ordinary one of the same shape, so that the model is as fast as its base and can be saved as one.

    The adapted layers are kept aside for `unmerge`, with the base's weights untouched in them: that costs
    memory, and gives the base back to the bit. A base in 4 bits is merged into layers of full precision.
    Raises ValueError for an unknown name, and where a merged embedding would change a head tied to it.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("merge: this model has no adapters, or they are merged already")
    if any(layer.rows is not None for layer in layers.values()):
        raise ValueError("merge: the rows of a batch have different adapters; do it outside of `use`")
    check_known(layers, [name])
    if name is None and all(layer.active is None for layer in layers.values()):
        raise ValueError(f"merge: no adapter is in use; name one of {', '.join(names_in(layers))}")
    words = layers.get("bert.embeddings.word_embeddings")
    merged_config = model.config
    if getattr(model.config, "tie_embeddings", False) and (
        "model.embed_tokens" in layers or "lm_head" in layers
    ):
        merged_config = replace(model.config, tie_embeddings=False)
    elif words is not None and (name or words.active) in words.adapters:
        raise ValueError("merge: the embeddings are adapted, but not the head that shares their matrix")
    if name is not None:
        set_adapter(model, name)
    model.__dict__["unmerged_config"] = model.config
    if merged_config is not model.config and model.lm_head is None:
        untie(model, copy=False)
        model.lm_head.__dict__["unmerged"] = None
    model.config = merged_config
    for path, layer in layers.items():
        if isinstance(layer, AdaptedStack):
            continue
        W = nn.Parameter(layer.merged_weight().contiguous(), requires_grad=False)
        if isinstance(layer, AdaptedEmbedding):
            W = nn.Parameter(W.mT.contiguous(), requires_grad=False)
            plain = nn.Embedding(*W.shape, device="meta")
        else:
            plain = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None, device="meta")
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.merged_bias(), requires_grad=False)
        plain.weight = W
        plain.__dict__["unmerged"] = layer
        replace_layer(model, path, plain)
    for path, module in [(p, m) for p, m in model.named_modules() if isinstance(m, AdaptedExperts)]:
        plain = moe.Experts.__new__(moe.Experts)
        nn.Module.__init__(plain)
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(module, name).merged_weight().contiguous()
            setattr(plain, name, nn.Parameter(stack, requires_grad=False))
        plain.backend = module.base_layer.backend
        plain.__dict__["unmerged"] = module
        replace_layer(model, path, plain)


def unmerge(model: nn.Module) -> None:
    """Take the adapters out of the weights again; see `merge`. ValueError if none are in them."""
    if "unmerged_config" not in model.__dict__:
        raise ValueError("unmerge: no adapter is merged into this model; call merge first")
    for path, module in list(model.named_modules()):
        if "unmerged" in module.__dict__:
            replace_layer(model, path, module.unmerged)
    model.config = model.__dict__.pop("unmerged_config")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a sample of the weights of a model without adapters, which tells one base from another. It
    stays the same in bfloat16."""
    digest = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        flat = w.detach().flatten()
        picks = torch.linspace(0, len(flat) - 1, min(len(flat), 64), dtype=torch.float64).long()
        sample = flat[picks.to(flat.device)].bfloat16().cpu()
        digest.update(f"{name} {tuple(w.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
