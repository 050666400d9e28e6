"""Directories of models in the layout of diffusers: the code that all of its models share.

    config.json                                "_class_name", and the arguments of that class
    diffusion_pytorch_model.safetensors        the weights

A pipeline is a directory with such a folder for each of its parts, as vae/ and unet/, and model_index.json,
which names the class of each part (formats/pipelines.py). The noise schedule has a file of its own
(formats/schedules.py).
"""

from pathlib import Path

from torch import Tensor

from formats.config_json import damage_named, named_architecture, read_config, read_fields
from formats.json_file import write_json
from formats.safetensors_dir import write_tensors

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
    """Return the path of config.json in directory, its content, and the fields of a Config that it describes.

    table, defaults, only, inert: as in `config_json.read_fields`. Raises ValueError for another class than
    class_name, and as `read_fields` does.
    """
    path, hf = read_config(directory)
    if named_architecture(path, hf) != class_name:
        raise ValueError(f"{path}: class {named_architecture(path, hf)!r}: expected {class_name}")
    with damage_named(path):
        return path, hf, read_fields(path, hf, table, defaults, only, INERT | inert, set())


def write(directory: str | Path, class_name: str, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write config.json with the content hf, and the weights. Each file is replaced once it is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, weights)
    write_json(directory / "config.json", {"_class_name": class_name} | hf)
