"""diffusers' PriorTransformer, read and written: the prior of DALL-E 2, as in UnCLIPPipeline.

Our names of weights are theirs. The mean and the deviation of image embeddings, "clip_mean" and "clip_std",
are among the weights.
"""

from pathlib import Path

from torch import nn

from formats import diffusers
from formats.config_json import whole_number
from formats.safetensors_dir import filled, read_weights

CLASS = "PriorTransformer"
FIELDS = {  # config.json: Config of vision/prior.py
    "num_attention_heads": "n_heads",
    "attention_head_dim": "d_head",
    "num_layers": "n_layers",
    "embedding_dim": "d_embed",
    "num_embeddings": "max_seq_len",
}
DEFAULTS = {"n_heads": 32, "d_head": 64, "n_layers": 20, "d_embed": 768, "max_seq_len": 77}  # diffusers'
ONLY = {
    "additional_embeddings": (4,),
    "time_embed_act_fn": ("silu",),
    "norm_in_type": (None,),
    "embedding_proj_norm_type": (None,),
    "encoder_hid_proj_type": ("linear",),
    "added_emb_type": ("prd",),
}
WIDTHS = {"time_embed_dim": "d_model", "embedding_proj_dim": "d_embed", "clip_embed_dim": "d_embed"}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `prior.Config`.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    inert = {*WIDTHS, "dropout"}
    path, hf, fields = diffusers.fields_of(directory, CLASS, FIELDS, DEFAULTS, ONLY, inert)
    values = fields | {"d_model": fields["n_heads"] * fields["d_head"]}
    for key, field in WIDTHS.items():  # null means the same width
        if hf.get(key) is not None and whole_number(path, hf, key, None) != values[field]:
            raise ValueError(f"{path}: {key} {hf[key]} is not implemented; expected {values[field]}")
    return filled(kind, config_kind, fields, read_weights(directory), directory, kernels)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a `prior.Prior` as diffusers' class."""
    config = model.config
    hf = {key: getattr(config, field) for key, field in FIELDS.items()}
    hf |= {key: values[0] for key, values in ONLY.items()} | dict.fromkeys(WIDTHS)
    diffusers.write(directory, CLASS, hf | {"dropout": 0.0}, model.state_dict())
