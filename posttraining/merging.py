"""Merging: an adapter becomes part of the weights.

    g * (W (u * x) + s B A x) + c * b = W' x + b'       an adapted layer, in the letters of lora.py

    W' = g (W u + s B A)       b' = c b                 g multiplies the rows of W, u its columns

A merged model has ordinary layers only, so it is as fast as its base and can be saved like it. `unmerge` puts
the adapted layers back, which are kept in memory. After several merges it undoes the last one.

    merge(model, "french")
    model.save_pretrained("runs/merged")
    unmerge(model)
"""

from dataclasses import replace

import torch
from torch import nn

from posttraining.adapters import (
    Adapted,
    adapted_layers,
    adapter_names,
    check_exist,
    head_of_embedding,
    replace_layer,
    set_adapter,
)


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None) -> None:
    """Replace each adapted layer by an ordinary one that computes the same with the adapter of that name, or
    with the active one (None).

    The adapted layers are kept for `unmerge`, which costs their memory and restores the base to the bit. A
    base in 4 bits is merged into layers of full precision. Raises ValueError for an unknown name, and where a
    merged embedding would change a head that shares its matrix.
    """
    layers = adapted_layers(model)
    check_mergeable(layers, name)
    if name is not None:
        set_adapter(model, name)

    # What `unmerge` puts back is kept in __dict__, where it is not a submodule of the merged model.
    replaced = dict(layers)
    model.__dict__.setdefault("merges", []).append((model.config, replaced))

    # A head that shares the embedding matrix needs a matrix of its own if only one of the two has changed.
    tied = getattr(model.config, "tie_embeddings", False)
    if tied and not layers.keys().isdisjoint(("model.embed_tokens", "lm_head")):
        model.config = replace(model.config, tie_embeddings=False)
        if model.lm_head is None:
            model.lm_head = head_of_embedding(model.model.embed_tokens)
            replaced["lm_head"] = None

    for path, layer in layers.items():
        replace_layer(model, path, layer.merged())


def check_mergeable(layers: dict[str, Adapted], name: str | None) -> None:
    """Raise ValueError if the adapter of that name, or the active one (None), cannot be merged."""
    if not layers:
        raise ValueError("merge: this model has no adapters, or they are merged already")
    if any(layer.row_factors is not None for layer in layers.values()):
        raise ValueError("merge: the rows of a batch have different adapters; merge outside of `use`")
    check_exist(layers, [name])
    if name is None and all(layer.active is None for layer in layers.values()):
        raise ValueError(f"merge: no adapter is in use; name one of {', '.join(adapter_names(layers))}")
    words = layers.get("bert.embeddings.word_embeddings")
    if words is not None and (name or words.active) in words.adapters:
        raise ValueError("merge: the embeddings are adapted, but not the head that shares their matrix")


def unmerge(model: nn.Module) -> None:
    """Put the layers back that the last `merge` has replaced. Raises ValueError if nothing is merged."""
    if not model.__dict__.get("merges"):
        raise ValueError("unmerge: no adapter is merged into this model; call merge first")
    model.config, replaced = model.__dict__["merges"].pop()
    for path, layer in replaced.items():
        replace_layer(model, path, layer)
