"""The U-Nets of diffusers' directories: UNet2DModel, and UNet2DConditionModel, which reads texts.

Our names of weights are theirs, but for those of attention in files from before 2023. The levels of the two
ways are named by "down_block_types" and "up_block_types", of which only mirrored ones are implemented: as
DDPM's, its successors' and Stable Diffusion 1's are.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from formats import config_json, diffusers
from formats.config_json import damage_named, named_architecture, read_config
from formats.safetensors_dir import filled, read_weights, rename

PLAIN, TEXT = "UNet2DModel", "UNet2DConditionModel"
FIELDS = {  # config.json: Config of vision/unet.py
    "block_out_channels": "channels",
    "layers_per_block": "n_layers",
    "in_channels": "n_channels",
    "out_channels": "n_out",
    "norm_num_groups": "n_groups",
    "norm_eps": "norm_eps",
    "flip_sin_to_cos": "cos_first",
    "freq_shift": "freq_shift",
    "downsample_padding": "padding",
    "dropout": "dropout",
    "num_class_embeds": "n_classes",
}
TEXT_FIELDS = FIELDS | {"cross_attention_dim": "d_text", "attention_head_dim": "n_heads"}
PLAIN_FIELDS = FIELDS | {"attention_head_dim": "d_head"}
# The values of absent keys, and the levels (down, up) of each class.
DEFAULTS = {
    "n_layers": 2, "n_groups": 32, "norm_eps": 1e-5, "cos_first": True, "freq_shift": 0, "padding": 1,
    "dropout": 0.0, "n_classes": 0,
}  # fmt: skip
OF_CLASS = {
    PLAIN: DEFAULTS | {"n_channels": 3, "n_out": 3, "channels": (224, 448, 672, 896), "d_head": 8},
    TEXT: DEFAULTS
    | {"n_channels": 4, "n_out": 4, "channels": (320, 640, 1280, 1280), "d_text": 1280, "n_heads": 8},
}
BLOCKS = {  # with attention, without
    PLAIN: (("AttnDownBlock2D", "DownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")),
    TEXT: (("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")),
}
LEVELS = {PLAIN: (0, 1, 1, 1), TEXT: (1, 1, 1, 0)}  # of an absent key: 1 with attention
MIDDLE = {PLAIN: "UNetMidBlock2D", TEXT: "UNetMidBlock2DCrossAttn"}
VECTORS = "identity"  # "class_embed_type" where the labels of classes are vectors, and added as they are
ONLY = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1, 1.0),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1, 1.0),
    "add_attention": (True,),
    "mid_block_type": tuple(MIDDLE.values()),
    "transformer_layers_per_block": (1,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "addition_embed_type_num_heads": (64,),
    "class_embed_type": (None, VECTORS),
}
INERT = {"sample_size", "down_block_types", "up_block_types", "num_train_timesteps", "upcast_attention"}
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `unet.Config` for the model in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf = read_config(directory)
    kind = named_architecture(path, hf)
    if kind not in BLOCKS:
        raise ValueError(f"{path}: class {kind!r}: expected {PLAIN} or {TEXT}")
    table = TEXT_FIELDS if kind == TEXT else PLAIN_FIELDS
    only = ONLY | {"mid_block_type": (MIDDLE[kind],)}
    with damage_named(path):
        fields = config_json.read_fields(
            path, hf, table, OF_CLASS[kind], only, diffusers.INERT | INERT, set()
        )
        fields["class_vectors"] = hf.get("class_embed_type") == VECTORS
        fields["attention"] = levels(path, hf, kind)
        fields["image_size"] = side(path, hf, 2 ** (len(fields["channels"]) - 1))
    if kind == PLAIN and "num_class_embeds" not in hf:
        fields["n_classes"] = 0
    weights = {rename(name, OLD): w for name, w in read_weights(directory).items()}
    return fields, weights


def side(path: Path, hf: dict, factor: int) -> int:
    """Return the height of images in hf, the config.json at path; where it names none, the smallest."""
    given = hf.get("sample_size")
    if isinstance(given, list) and len(set(given)) == 1:
        given = given[0]
    return factor if given is None else config_json.checked(path, "sample_size", "", given)


def levels(path: Path, hf: dict, kind: str) -> tuple[int, ...]:
    """Return for each level whether it has attention, 1 or 0. Raises ValueError for other blocks, and where
    the way up is not the way down reversed."""
    found = []
    for key, (with_it, without) in zip(("down_block_types", "up_block_types"), BLOCKS[kind], strict=True):
        names = hf.get(key)
        if names is None:
            found.append(LEVELS[kind])
            continue
        if not isinstance(names, list) or not set(names) <= {with_it, without}:
            raise ValueError(
                f"{path}: {key} {names!r:.200} is not implemented; expected {with_it}, {without}"
            )
        ordered = names if key.startswith("down") else reversed(names)
        found.append(tuple(int(name == with_it) for name in ordered))
    if found[0] != found[1]:
        raise ValueError(f"{path}: up_block_types: expected those of down_block_types, in reverse order")
    return found[0]


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is a `unet.Config`.

    Raises ValueError naming what is wrong.
    """
    fields, weights = read(directory)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a `unet.UNet` as UNet2DModel, or as UNet2DConditionModel where it reads texts."""
    diffusers.write(directory, *described(model.config), model.state_dict())


def described(config: Any) -> tuple[str, dict]:
    """Return the class of a `unet.Config`, and the content of its config.json."""
    kind = TEXT if config.d_text else PLAIN
    table = TEXT_FIELDS if kind == TEXT else PLAIN_FIELDS
    hf = {key: getattr(config, field) for key, field in table.items()}
    hf |= {"sample_size": config.image_size, "act_fn": "silu", "num_class_embeds": config.n_classes or None}
    hf["class_embed_type"] = VECTORS if config.class_vectors else None
    if kind == PLAIN and config.d_head is None and config.n_heads > 1:  # null means one head
        raise ValueError(f"n_heads {config.n_heads}: {PLAIN} has heads of one width; set d_head instead")
    down, up = BLOCKS[kind]
    hf["down_block_types"] = [down[1 - has] for has in config.attention]
    hf["up_block_types"] = [up[1 - has] for has in reversed(config.attention)]
    return kind, hf
