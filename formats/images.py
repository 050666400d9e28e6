"""Hugging Face checkpoints of models that read images: ViT, and MAE, which adds a decoder to it.

    ViTForImageClassification    an encoder with a classifier
    ViTModel                     an encoder without a classifier, with or without a pooler
    ViTMAEForPreTraining         an encoder with the decoder of vision/mae.py

Our names of weights are those in the files; only a ViTModel's lack the prefix "vit.". How pixels are
normalised is in preprocessor_config.json, or where transformers 5 has saved a processor of images and texts,
in its processor_config.json under "image_processor". Fixed position embeddings are marked by the key
"positions" of config.json, which transformers ignores. A model that none of these classes describes is saved
in the layout of formats/native.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from formats import config_json, native
from formats.config_json import (
    damage_named,
    named_architecture,
    read_architecture,
    read_config,
    read_fields,
)
from formats.json_file import read_json, write_json
from formats.safetensors_dir import filled, read_weights, write

CLASSIFIER, BARE, MAE = "ViTForImageClassification", "ViTModel", "ViTMAEForPreTraining"
CONCEPTS = {CLASSIFIER: "vision.vit", BARE: "vision.vit", MAE: "vision.mae"}
PREFIX = "vit."
FIELDS = {  # config.json: Config of vision/vit.py
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "n_channels",
    "qkv_bias": "qkv_bias",
    "layer_norm_eps": "norm_eps",
    "positions": "positions",
}
DECODER_FIELDS = {  # config.json: Config of vision/mae.py
    "decoder_num_hidden_layers": "decoder_layers",
    "decoder_num_attention_heads": "decoder_heads",
    "decoder_hidden_size": "decoder_width",
    "decoder_intermediate_size": "decoder_ff",
    "mask_ratio": "mask_rate",
    "norm_pix_loss": "norm_pix",
}
# The values of absent keys: transformers leaves out what is its default.
DEFAULTS = {
    "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "image_size": 224, "patch_size": 16,
    "n_channels": 3, "qkv_bias": True, "norm_eps": 1e-12,
}  # fmt: skip
DECODER_DEFAULTS = {
    "decoder_layers": 8, "decoder_heads": 16, "decoder_width": 512, "decoder_ff": 2048, "mask_rate": 0.75,
    "norm_pix": False,
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
ONLY = {
    "hidden_act": tuple(ACTIVATIONS),
    "pooler_act": ("tanh",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
INERT = config_json.INERT | {
    "hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "pooler_output_size",
}  # fmt: skip


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `vit.Config` for the model in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf, architecture = read_architecture(directory, CONCEPTS)

    # The fields in config.json and preprocessor_config.json.
    of_decoder = set(DECODER_FIELDS) if architecture == MAE else set()
    with damage_named(path):
        fields = read_fields(path, hf, FIELDS, DEFAULTS, ONLY, INERT | of_decoder, set())
        fields["mlp"] = ACTIVATIONS[hf.get("hidden_act", "gelu")]
    if architecture == MAE:
        fields["positions"] = hf.get("positions", "sincos")
    fields |= read_preprocessor(Path(directory))

    # Which tensors there are decides what the model returns.
    weights = read_weights(directory)
    if architecture == BARE:
        weights = {PREFIX + name: w for name, w in weights.items()}
    fields["readout"] = "pooler" if "vit.pooler.dense.weight" in weights else "class"
    return fields | read_classes(hf, weights), weights


def read_classes(hf: dict, weights: dict[str, Tensor]) -> dict:
    """Return the field "n_classes", the rows of the classifier among the weights, and "labels", the names of
    the classes in hf (config.json), if it names all of them."""
    n_classes = weights["classifier.bias"].numel() if "classifier.bias" in weights else 0
    names = hf.get("id2label") or {}
    if n_classes and isinstance(names, dict) and set(names) == {str(i) for i in range(n_classes)}:
        return {"n_classes": n_classes, "labels": tuple(str(names[str(i)]) for i in range(n_classes))}
    return {"n_classes": n_classes}


def read_preprocessor(directory: Path) -> dict[str, tuple[float, ...]]:
    """Return the fields "mean" and "std" of pixels in [0, 1] by the settings of the image processor, or {}
    without them. As in transformers, those in processor_config.json come first.

    Raises ValueError for a file that scales pixels to another range, and for values that are not finite or a
    deviation that is not above 0.
    """
    path = directory / "processor_config.json"
    hf = read_json(path).get("image_processor") if path.is_file() else None
    if hf is None:
        path = directory / "preprocessor_config.json"
        hf = read_json(path) if path.is_file() else None
    if hf is None:
        return {}
    if not isinstance(hf, dict):
        raise ValueError(f"{path}: image_processor {hf!r:.100}: expected an object")
    if not hf.get("do_rescale", True):
        raise ValueError(f"{path}: do_rescale false is not implemented; expected pixels from 0 to 1")
    factor = hf.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{path}: rescale_factor {factor!r:.100}: expected 1 / 255")
    if not hf.get("do_normalize", True):
        return {"mean": (0.0,), "std": (1.0,)}
    found = {"mean": hf.get("image_mean"), "std": hf.get("image_std")}
    for name, values in found.items():
        numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        if not numbers or not all(map(math.isfinite, values)):
            raise ValueError(f"{path}: image_{name} {values!r:.100}: expected a number for each channel")
    if min(found["std"], default=1) <= 0:
        raise ValueError(f"{path}: image_std {found['std']}: expected numbers above 0")
    return {name: tuple(float(value) for value in values) for name, values in found.items()}


def has_decoder(directory: str | Path) -> bool:
    """Return whether directory holds a ViTMAEForPreTraining."""
    return named_architecture(*read_config(directory)) == MAE


def read_decoder(directory: str | Path) -> dict:
    """Return the fields of `mae.Config` for a ViTMAEForPreTraining. Raises ValueError for another model."""
    path, hf, _ = read_architecture(directory, [MAE])
    own = {key: value for key, value in hf.items() if key in DECODER_FIELDS}
    with damage_named(path):
        return read_fields(path, own, DECODER_FIELDS, DECODER_DEFAULTS, {}, set(), set())


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory in their precision; config is of config_kind, a
    `vit.Config`. The decoder of an MAE is left out. Raises ValueError naming what is wrong."""
    if native.is_native(directory):
        return native.load(directory, kernels, kind)
    fields, weights = read(directory)
    weights = {name: w for name, w in weights.items() if not name.startswith("decoder.")}
    return filled(kind, config_kind, fields, weights, directory, kernels)


def config_of(config: Any) -> dict:
    """Return the keys of config.json that describe a `vit.Config`, for transformers 4 and 5."""
    size = config.image_size
    fields = vars(config) | {"image_size": list(size) if isinstance(size, tuple) else size}
    hf = {key: fields[field] for key, field in FIELDS.items()}
    if config.positions == "learned":
        del hf["positions"]
    return hf | activation(config)


def activation(config: Any) -> dict:
    """Return the keys of config.json for the activation and for dropout.

    Our models have no dropout. Without its keys, transformers 4 would use its own in further training.
    """
    name = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.mlp]
    return {"hidden_act": name, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def class_names(labels: tuple[str, ...], n_classes: int) -> dict:
    """Return the keys of config.json for the names of n_classes classes: labels, or if there are not as many,
    LABEL_0, LABEL_1 and so on."""
    names = labels if len(labels) == n_classes else [f"LABEL_{i}" for i in range(n_classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def save(model: nn.Module, directory: str | Path, labels: tuple[str, ...]) -> None:
    """Write a `vit.ViT`: config.json, model.safetensors and preprocessor_config.json.

    labels: the names of the classes. A model whose readout no class of transformers has is written in the
    layout of formats/native.py.
    """
    config = model.config
    bare = config.n_classes == 0
    if config.readout == "mean" or (config.readout == "pooler" and not bare):
        model.config = replace(config, labels=tuple(labels))
        try:
            native.save(model, directory)
        finally:
            model.config = config
        return
    hf = {"architectures": [BARE if bare else CLASSIFIER], "model_type": "vit", **config_of(config)}
    weights = model.state_dict()
    if bare:
        weights = {name.removeprefix(PREFIX): w for name, w in weights.items()}
    else:
        hf |= class_names(labels, config.n_classes)
    write(directory, hf, weights)
    write_preprocessor(config, directory)


def save_mae(config: Any, decoder: Any, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Write a ViTMAEForPreTraining, and its preprocessor_config.json.

    config: of the encoder, a `vit.Config`. decoder: a `mae.Config`. weights: of both, under our names.
    """
    hf = {"architectures": [MAE], "model_type": "vit_mae", **config_of(config)}
    hf |= {key: getattr(decoder, field) for key, field in DECODER_FIELDS.items()}
    hf["positions"] = config.positions
    write(directory, hf, weights)
    write_preprocessor(config, directory)


def write_preprocessor(config: Any, directory: str | Path) -> None:
    """Write preprocessor_config.json of a `vit.Config`: the size of images, and how pixels are normalised."""
    height, width = config.size
    n = config.n_channels
    content = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3}
    content |= {"size": {"height": height, "width": width}, "do_rescale": True, "rescale_factor": 1 / 255}
    content |= {"do_normalize": True, "image_mean": every(config.mean, n), "image_std": every(config.std, n)}
    write_json(Path(directory) / "preprocessor_config.json", content)


def every(values: tuple[float, ...], n: int) -> list[float]:
    """Return a value for each of n channels; values has as many, or one that holds for all."""
    return list(values) * (n if len(values) == 1 else 1)
