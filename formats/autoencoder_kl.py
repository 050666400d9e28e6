"""diffusers' AutoencoderKL, read and written: the autoencoder of Stable Diffusion.

Our names of weights are theirs. Files from before 2023 name the attention's matrices query, key, value and
proj_attn, and hold them as convolutions of one pixel.
"""

from pathlib import Path

from torch import Tensor, nn

from formats import diffusers
from formats.safetensors_dir import filled, read_weights, rename

CLASS = "AutoencoderKL"
FIELDS = {  # config.json: Config of vision/autoencoder_kl.py
    "in_channels": "n_channels",
    "block_out_channels": "channels",
    "layers_per_block": "n_blocks",
    "latent_channels": "n_latent",
    "norm_num_groups": "n_groups",
    "sample_size": "image_size",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
    "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
    "mid_block_add_attention": "attention",
}
DEFAULTS = {  # the values of absent keys: diffusers'
    "n_channels": 3, "channels": (64,), "n_blocks": 1, "n_latent": 4, "n_groups": 32, "image_size": 32,
    "scaling_factor": 0.18215, "shift_factor": 0.0, "quant_conv": True, "post_quant_conv": True,
    "attention": True,
}  # fmt: skip
ONLY = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, an
    `autoencoder_kl.Config`. Raises ValueError naming what is missing, damaged or not implemented."""
    own = {"out_channels", "down_block_types", "up_block_types", "force_upcast"}
    path, hf, fields = diffusers.fields_of(directory, CLASS, FIELDS, DEFAULTS, ONLY, own)
    n = len(fields["channels"])
    for key, expected in (("down_block_types", [DOWN] * n), ("up_block_types", [UP] * n)):
        if hf.get(key, [expected[0]]) != expected:
            raise ValueError(f"{path}: {key} {hf.get(key)!r:.200}: expected {n} times {expected[0]}")
    if hf.get("out_channels", 3) != fields["n_channels"]:
        both = f"{fields['n_channels']} channels in, {hf.get('out_channels', 3)!r:.20} out"
        raise ValueError(f"{path}: {both}: expected as many, since what is rebuilt is the input")
    weights = {new_name(name): as_matrix(name, w) for name, w in read_weights(directory).items()}
    return filled(kind, config_kind, fields, weights, directory, kernels)


def new_name(name: str) -> str:
    """Return the name that the attention's matrices have in new files."""
    return rename(name, OLD) if ".attentions." in name else name


def as_matrix(name: str, w: Tensor) -> Tensor:
    """Return a matrix of the attention that is stored as a convolution of one pixel as the matrix it is."""
    return w.flatten(1) if ".attentions." in name and w.ndim == 4 else w


def save(model: nn.Module, directory: str | Path) -> None:
    """Write an `autoencoder_kl.AutoencoderKL` as diffusers' class of that name."""
    config = model.config
    hf = {key: getattr(config, field) for key, field in FIELDS.items()}
    hf["shift_factor"] = config.shift_factor or None
    n = len(config.channels)
    hf |= {"out_channels": config.n_channels, "act_fn": "silu", "force_upcast": True}
    hf |= {"down_block_types": [DOWN] * n, "up_block_types": [UP] * n}
    diffusers.write(directory, CLASS, hf, model.state_dict())
