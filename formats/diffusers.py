"""Directories of diffusers, each with one model or one schedule: what all of its models share.

    config.json                                "_class_name", and the arguments of that class
    diffusion_pytorch_model.safetensors        the weights, under our names unless a table says more

A pipeline is a directory with one of these for each part, such as vae/, unet/ and scheduler/, beside
model_index.json, which names the class of each (formats/pipelines.py).
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from formats.config_json import damage_named, named_architecture, read_config, read_fields
from formats.json_file import write_json
from formats.safetensors_dir import filled, read_weights, write_tensors

CONCEPTS = {  # _class_name: the concept file that reads it
    "AutoencoderKL": "vision.autoencoder_kl",
    "DiTTransformer2DModel": "vision.dit",
    "PriorTransformer": "vision.prior",
    "UNet2DModel": "vision.unet",
    "UNet2DConditionModel": "vision.unet",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INERT = {"_class_name", "_diffusers_version", "_name_or_path", "dropout"}


def fields_of(
    directory: str | Path, class_name: str, table: dict[str, str], defaults: dict, only: dict, inert: set[str]
) -> tuple[Path, dict, dict]:
    """Return the path of config.json, its content, and the fields of a Config that it describes.

    The tables are those of `config_json.read_fields`. Raises ValueError for another class, and as that does.
    """
    path, hf = read_config(directory)
    if named_architecture(path, hf) != class_name:
        raise ValueError(f"{path}: class {named_architecture(path, hf)!r}: expected {class_name}")
    with damage_named(path):
        return path, hf, read_fields(path, hf, table, defaults, only, INERT | inert, set())


def load(
    kind: type[nn.Module], config_kind: Any, directory: str | Path, kernels: str, fields: dict, weights=None
) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is of config_kind.

    weights: under our names; None: as they are stored. Raises ValueError naming what is wrong.
    """
    stored = read_weights(directory) if weights is None else weights
    return filled(kind, config_kind, fields, stored, directory, kernels)


def write(directory: str | Path, class_name: str, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write config.json and the weights, each replaced only once the new one is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, weights)
    write_json(directory / "config.json", {"_class_name": class_name} | hf)
