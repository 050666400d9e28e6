"""diffusers' DiTTransformer2DModel, read and written.

There, each block has an embedder of times and classes of its own, and all are equal: diffusers made its files
from ones with a single embedder, as DiT has. A model trained further there has several, and is not read.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from formats import diffusers, native
from formats.config_json import whole_number
from formats.safetensors_dir import filled, read_weights

CLASS = "DiTTransformer2DModel"
FIELDS = {  # config.json: Config of vision/dit.py
    "num_attention_heads": "n_heads",
    "in_channels": "n_channels",
    "num_layers": "n_layers",
    "sample_size": "image_size",
    "patch_size": "patch_size",
    "norm_eps": "norm_eps",
}
DEFAULTS = {  # the values of absent keys: diffusers'
    "n_heads": 16, "n_channels": 4, "n_layers": 28, "image_size": 32, "patch_size": 2, "norm_eps": 1e-5,
}  # fmt: skip
ONLY = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "attention_bias": (True,),
}
INERT = {
    "attention_head_dim", "num_embeds_ada_norm", "out_channels", "norm_num_groups", "upcast_attention",
    "dropout",
}  # fmt: skip
OURS, FIRST = "emb.", "transformer_blocks.0.norm1.emb."  # the embedder's names here, and there


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `dit.Config`.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    if native.is_native(directory):
        return native.load(directory, kernels, kind)
    path, hf, fields = diffusers.fields_of(directory, CLASS, FIELDS, DEFAULTS, ONLY, INERT)
    fields["d_model"] = fields["n_heads"] * whole_number(path, hf, "attention_head_dim", 72, least=1)
    fields["n_classes"] = 1 + whole_number(path, hf, "num_embeds_ada_norm", 1000, least=1)
    n_out = hf.get("out_channels") or fields["n_channels"]
    fields["n_out"] = whole_number(path, {"out_channels": n_out}, "out_channels", None, least=1)
    weights = with_one_embedder(directory, read_weights(directory))
    return filled(kind, config_kind, fields, weights, directory, kernels)


def with_one_embedder(directory: str | Path, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the embedder of the first block as that of all.

    Raises ValueError where another block's is different.
    """
    weights = {name: w for name, w in stored.items() if ".norm1.emb." not in name}
    for name in stored.keys() - weights.keys():
        own = name.rpartition(".norm1.emb.")[2]
        first = stored.get(FIRST + own)
        if first is None or not torch.equal(stored[name], first):
            raise ValueError(
                f"{directory}: {name} is not that of the first block; expected one embedder of times and "
                "classes for all blocks, as DiT has"
            )
        weights[OURS + own] = first
    return weights


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a `dit.DiT` as diffusers' class, or without classes, which that needs, in our native layout."""
    config, weights = model.config, model.state_dict()
    if config.n_classes < 2:
        native.save(model, directory)
        return
    hf = {key: getattr(config, field) for key, field in FIELDS.items()}
    hf |= {"attention_head_dim": config.d_model // config.n_heads, "out_channels": config.n_out}
    hf |= {"num_embeds_ada_norm": config.n_classes - 1, "activation_fn": "gelu-approximate"}
    hf |= {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True}
    embedder = {name: weights.pop(name) for name in list(weights) if name.startswith(OURS)}
    for i in range(config.n_layers):
        own = f"transformer_blocks.{i}.norm1.emb."
        weights |= {own + name.removeprefix(OURS): w.clone() for name, w in embedder.items()}
    diffusers.write(directory, CLASS, hf, weights)
