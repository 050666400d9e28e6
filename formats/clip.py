"""Hugging Face checkpoints of models that embed images and texts in one space: CLIP and SigLIP.

    CLIPModel, SiglipModel                      both towers, read and written
    CLIPVisionModel, SiglipVisionModel          the image tower alone, read: LLaVA starts from one
    CLIPVisionModelWithProjection               the image tower, read without its projection
    CLIPTextModel                               CLIP's text tower alone, read and written: Stable Diffusion's
    CLIPTextModelWithProjection                 CLIP's text tower, read without its projection

Our names of weights are those in the files. config.json has the settings of the towers as "text_config" and
"vision_config". Old files have them again as "text_config_dict" and "vision_config_dict"; where the two
differ, the second counts. How pixels are normalised is in preprocessor_config.json. CLIP's towers with
SigLIP's loss, and SigLIP's with CLIP's loss, have no class in transformers and are saved in the layout of
formats/native.py.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from formats import config_json, native
from formats.config_json import damage_named, read_architecture, read_fields, whole_number
from formats.images import every, read_preprocessor
from formats.json_file import write_json
from formats.safetensors_dir import filled, read_weights, write

CONCEPT = "vision.clip"
MODELS = {"CLIPModel": "clip", "SiglipModel": "siglip"}  # architecture: layout
TOWERS = {"CLIPVisionModel": "clip", "CLIPVisionModelWithProjection": "clip", "SiglipVisionModel": "siglip"}
TEXT_TOWERS = {"CLIPTextModel": "clip", "CLIPTextModelWithProjection": "clip"}
PREFIX, TEXT_PREFIX = "vision_model.", "text_model."
SHARED_FIELDS = {  # config.json: TowerConfig of vision/clip_towers.py
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "layer_norm_eps": "norm_eps",
}
VISION_FIELDS = SHARED_FIELDS | {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "n_channels",
}
TEXT_FIELDS = SHARED_FIELDS | {"vocab_size": "vocab_size", "max_position_embeddings": "max_seq_len"}
OF_TEXT = {  # TextConfig: Config of vision/clip.py
    "n_layers": "text_layers",
    "n_heads": "text_heads",
    "d_model": "text_width",
    "d_ff": "text_ff",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_seq_len",
}
OBJECTIVE = {"clip": "softmax", "siglip": "sigmoid"}
START = 2.6592  # ln(1 / 0.07), the value of logit_scale before training
# The default of eos_token_id, where a text is read. In old files of CLIP, OpenAI's among them, it is 2, and
# means that a text is read at its largest id (the field read_largest).
END, OLD_END = {"clip": 49407, "siglip": 1}, 2
# The values of absent keys: transformers leaves out what is its default.
VISION_DEFAULTS = {
    "clip": {
        "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "image_size": 224, "patch_size": 32,
        "n_channels": 3, "norm_eps": 1e-5,
    },
    "siglip": {
        "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "image_size": 224, "patch_size": 16,
        "n_channels": 3, "norm_eps": 1e-6,
    },
}  # fmt: skip
TEXT_DEFAULTS = {
    "clip": {
        "n_layers": 12, "n_heads": 8, "d_model": 512, "d_ff": 2048, "vocab_size": 49408, "max_seq_len": 77,
        "norm_eps": 1e-5,
    },
    "siglip": {
        "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "vocab_size": 32000, "max_seq_len": 64,
        "norm_eps": 1e-6,
    },
}  # fmt: skip
ACTIVATION = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}  # where config.json names none
MLPS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ONLY = {
    "hidden_act": tuple(MLPS),
    "vision_use_head": (True,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "tie_word_embeddings": (True, False),  # there is no head to tie
}
INERT = config_json.INERT | {
    "initializer_factor", "dropout", "eos_token_id", "projection_dim", "projection_size", "text_config",
    "vision_config", "text_config_dict", "vision_config_dict", "logit_scale_init_value",
}  # fmt: skip


def vision_fields(path: Path, hf: dict, layout: str) -> dict:
    """Return the fields of a `VisionConfig` for hf, the "vision_config" in the config.json at path.

    Raises ValueError for what is missing, damaged or not implemented.
    """
    return tower_fields(path, hf, layout, VISION_FIELDS, VISION_DEFAULTS[layout])


def tower_fields(path: Path, hf: dict, layout: str, table: dict[str, str], defaults: dict) -> dict:
    """Return the fields of a tower's Config for hf, its settings in the config.json at path.

    table: {key: field}. defaults: the values of absent keys. Raises ValueError as `vision_fields` does.
    """
    if not isinstance(hf, dict):
        raise ValueError(f"{path}: {str(hf)[:100]!r}: expected the settings of a tower")
    with damage_named(path):
        fields = read_fields(path, hf, table, defaults, ONLY, INERT, set())
        fields["mlp"] = MLPS[hf.get("hidden_act", ACTIVATION[layout])]
        if not isinstance(fields.get("image_size", 0), int):
            raise ValueError(f"image_size {fields['image_size']}: expected one number, as images are square")
    return fields | {"layout": layout}


def tower_settings(config: Any) -> dict:
    """Return the keys of config.json that describe a `VisionConfig` or `TextConfig`."""
    is_text = hasattr(config, "vocab_size")
    table = TEXT_FIELDS if is_text else VISION_FIELDS
    hf = {key: getattr(config, field) for key, field in table.items()}
    activation = next(name for name, kind in MLPS.items() if kind == config.mlp)
    kind = f"{config.layout}_{'text' if is_text else 'vision'}_model"
    return hf | {"hidden_act": activation, "attention_dropout": 0.0, "model_type": kind}


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `clip.Config` for the model in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf, architecture = read_architecture(directory, MODELS)
    layout = MODELS[architecture]
    with damage_named(path):  # checks the keys beside those of the towers
        read_fields(path, hf, {}, {}, ONLY, INERT, set())
    vision = vision_fields(path, part_of(path, hf, "vision"), layout)
    text_hf = part_of(path, hf, "text")
    text = tower_fields(path, text_hf, layout, TEXT_FIELDS, TEXT_DEFAULTS[layout])
    for field in ("mlp", "norm_eps"):
        if text[field] != vision[field]:
            both = f"{text[field]} of the text tower, {vision[field]} of the image tower"
            raise ValueError(f"{path}: {field} {both}: expected the same of both")

    # Where a text is read, and the width of the common space.
    end = whole_number(path, text_hf, "eos_token_id", END[layout])
    fields = (
        vision | {field: text[key] for key, field in OF_TEXT.items()} | read_preprocessor(Path(directory))
    )
    fields |= {"eos_token_id": end, "read_largest": layout == "clip" and end == OLD_END}
    width = whole_number(path, hf, "projection_dim", 512, least=1)
    fields["d_joint"] = width if layout == "clip" else fields["d_model"]
    fields["objective"] = OBJECTIVE[layout]

    weights = without_positions(read_weights(directory))
    if "logit_scale" in weights and not weights["logit_scale"].ndim:  # ours has the shape (1,)
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
    return fields, weights


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is a `clip.Config`.

    Raises ValueError naming what is wrong.
    """
    if native.is_native(directory):
        return native.load(directory, kernels, kind)
    fields, weights = read(directory)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a `clip.CLIP` as CLIPModel or SiglipModel, with its preprocessor_config.json.

    Two models that neither class describes are written in the layout of formats/native.py: one with the loss
    of the other class, and a CLIP whose texts end with the id 2, which transformers would not look for (see
    OLD_END).
    """
    config = model.config
    ends_as_old = config.layout == "clip" and config.eos_token_id == OLD_END and not config.read_largest
    if config.objective != OBJECTIVE[config.layout] or ends_as_old:
        native.save(model, directory)
        return
    text, vision = tower_settings(config.text) | ends_of_text(config), tower_settings(config.vision)
    weights = model.state_dict()
    architecture = next(name for name, layout in MODELS.items() if layout == config.layout)
    hf = {"architectures": [architecture], "model_type": config.layout}
    if config.layout == "clip":
        hf |= {"projection_dim": config.d_joint, "logit_scale_init_value": START}
        text, vision = (part | {"projection_dim": config.d_joint} for part in (text, vision))
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    else:
        text |= {"projection_size": config.d_joint}
    write(directory, hf | {"text_config": text, "vision_config": vision}, weights)
    write_preprocessor(config.vision, directory)


def read_tower_config(directory: str | Path) -> dict:
    """Return the fields of a `clip_towers.VisionConfig` for the image tower in directory, alone or in a model
    of both towers. Raises ValueError naming what is wrong."""
    path, hf, architecture = read_architecture(directory, TOWERS | MODELS)
    own = part_of(path, hf, "vision") if architecture in MODELS else hf
    return vision_fields(path, own, (TOWERS | MODELS)[architecture]) | read_preprocessor(Path(directory))


def load_tower(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights of the image tower in directory, alone or in a model of both.

    kind: `clip_towers.VisionTower`. config_kind: the class of its Config. Raises ValueError naming what is
    wrong.
    """
    weights = tower_weights(read_weights(directory), PREFIX)
    return filled(kind, config_kind, read_tower_config(directory), weights, directory, kernels)


def load_text_tower(
    kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str
) -> nn.Module:
    """Return kind(config) with the weights of the text tower in directory, alone or in a CLIP.

    kind: `clip_towers.TextTower`. config_kind: the class of its Config. Raises ValueError naming what is
    wrong.
    """
    path, hf, architecture = read_architecture(directory, [*TEXT_TOWERS, "CLIPModel"])
    own = part_of(path, hf, "text") if architecture in MODELS else hf
    fields = tower_fields(path, own, "clip", TEXT_FIELDS, TEXT_DEFAULTS["clip"])
    end = whole_number(path, own, "eos_token_id", END["clip"])
    fields |= {"eos_token_id": end, "read_largest": end == OLD_END}
    weights = tower_weights(read_weights(directory), TEXT_PREFIX)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save_text_tower(tower: nn.Module, directory: str | Path) -> None:
    """Write a `clip_towers.TextTower` in CLIP's layout as CLIPTextModel."""
    hf = tower_settings(tower.config) | {"architectures": ["CLIPTextModel"]} | ends_of_text(tower.config)
    write(directory, hf, {TEXT_PREFIX + name: w for name, w in tower.state_dict().items()})


def ends_of_text(config: Any) -> dict:
    """Return the keys of config.json for the ids at the ends of a text; config has the field read_largest."""
    end = OLD_END if config.read_largest else config.eos_token_id
    return {"eos_token_id": end, "bos_token_id": None, "pad_token_id": end}


def tower_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights of a tower under its own names, from the file of that tower or of both.

    prefix: of its names in a file that also has other weights, such as a projection or the other tower.
    """
    weights = without_positions(weights)
    if any(name.startswith(prefix) for name in weights):
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return weights


def without_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the numbers 0, 1, 2 ... of positions, which old files hold, too."""
    return {name: w for name, w in weights.items() if not name.endswith(".position_ids")}


def part_of(path: Path, hf: dict, name: str) -> dict:
    """Return the settings of the tower "text" or "vision" in hf, the content of the config.json at path."""
    found = (hf.get(f"{name}_config") or {}, hf.get(f"{name}_config_dict") or {})
    for settings in found:
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: {name}_config {str(settings)[:100]!r}: expected an object")
    return found[0] | found[1]


def write_preprocessor(config: Any, directory: str | Path) -> None:
    """Write preprocessor_config.json of a `VisionConfig`: the size of images, and how pixels are normalised.

    CLIP's processor scales an image until its shorter side fits, and cuts out the middle; SigLIP's stretches
    it to a square. Our models read images in the first way (data/images.py), so that is written for both.
    """
    side, n = config.image_size, config.n_channels
    size = {"height": side, "width": side}
    content = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": 3}
    content |= {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": size}
    content |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": n == 3}
    content |= {"do_normalize": True, "image_mean": every(config.mean, n), "image_std": every(config.std, n)}
    write_json(Path(directory) / "preprocessor_config.json", content)
