"""The directory of a saved model: config.json, and model.safetensors with the weights.

Hugging Face's libraries use this layout, and so does formats/native.py. Large models have several files of
weights, which model.safetensors.index.json lists. This file holds what all families of models share:

    reading    read_weights -> rename (their names to ours) -> check_weights or assign
    writing    write, or write_decoder for models that generate text
    config     read_fields translates config.json into the fields of a Config

Weights are read from safetensors only: unlike a pickle, such a file cannot run code.
"""

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.atomic import replace_file
from formats.json_file import read_json, write_json

# The fields without which no Config of a transformer can be made.
REQUIRED = {"n_layers", "n_heads", "d_model", "d_ff", "vocab_size", "max_seq_len"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and its metadata.

    Raises ValueError if there is no such file or if it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights in safetensors format")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, which replaces the old one only once it is complete.

    Raises OSError if the file cannot be written, as on a full disk.
    """
    tensors = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    with replace_file(path) as new:
        try:
            save_file(tensors, new, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))  # the system's, which only the message holds
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from None


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Return all tensors of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises ValueError naming a file that is missing or damaged.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (directory / files[0]).is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    weights = {}
    for file in files:
        path = directory / file
        if path.parent != directory:
            raise ValueError(f"{index}: names {file!r}; expected a file in the same directory")
        weights |= read_tensors(path)[0]
    return weights


def write(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors, and config.json with the content hf and the dtype of the weights.

    Each file is replaced only once the new one is complete. Raises ValueError for weights that are not
    floating-point numbers.
    """
    for name, w in weights.items():
        if not w.is_floating_point():
            raise ValueError(
                f"{name} is {w.dtype}: expected floating-point weights; a model in 4 bits cannot be saved"
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", weights)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(directory / "config.json", hf | {"torch_dtype": dtype})


def write_decoder(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write a model that generates text: `write`, and generation_config.json beside the model.

    That file makes sampling the default of transformers' `generate`, and eos_token_id the end of a text.
    Without it, transformers takes the likeliest token, and its server ignores the temperature of a request. A
    client can still have the likeliest token, by a temperature of 0 or by do_sample=False.
    """
    write(directory, hf, weights)
    generation = {"do_sample": True, "eos_token_id": hf["eos_token_id"]}
    write_json(Path(directory) / "generation_config.json", generation)


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], directory: str | Path) -> None:
    """Raise ValueError unless weights, read from directory, have the names and shapes of expected."""
    for problem, names in (
        ("is missing", expected.keys() - weights.keys()),
        ("has no place in this architecture", weights.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{directory}: {min(names)} {problem} ({len(names)} such tensors)")
    for name, w in weights.items():
        if w.shape != expected[name].shape:
            shapes = f"{tuple(w.shape)}, config.json says {tuple(expected[name].shape)}"
            raise ValueError(f"{directory}: {name} has shape {shapes}")


def assign(model: nn.Module, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Make weights, read from directory, the parameters of a model that was built on the meta device.

    Raises ValueError unless names and shapes are those of the model.
    """
    check_weights(model.state_dict(), weights, directory)
    model.load_state_dict(weights, assign=True)


def rename(name: str, table: dict[str, str]) -> str:
    """Return a tensor's name after the replacements {old: new} of table, in its order.

    An `old` that begins with a dot may stand anywhere in the name; any other must be its beginning. Only the
    first occurrence is replaced.
    """
    for old, new in table.items():
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name


def inverse(table: dict[str, str]) -> dict[str, str]:
    """Return the table that undoes the renaming of a table."""
    return {new: old for old, new in table.items()}


def read_fields(
    path: Path,
    hf: dict,
    table: dict[str, str],
    defaults: dict,
    only: dict[str, tuple],
    inert: set[str],
    required: set[str] = REQUIRED,
) -> dict:
    """Return the fields of a Config that hf, the content of the config.json at path, describes.

    table:    {key of config.json: field of the Config}
    defaults: the fields that hold where config.json says nothing
    only:     {key: the values that are implemented}, of keys that are no field
    inert:    keys that do not change what the model computes

    Raises ValueError for any other key, because a model read without it would silently compute something
    else, and for a required field that has no value.
    """
    fields = dict(defaults)
    for key, value in hf.items():
        if key in table:
            if value is not None:
                fields[table[key]] = tuple(value) if isinstance(value, list) else value
        elif key in only:
            if value not in only[key]:
                expected = " or ".join(map(repr, only[key]))
                raise ValueError(f"{path}: {key} {value!r} is not implemented; expected {expected}")
        elif key not in inert:
            raise ValueError(
                f"{path}: {key} {value!r} is not implemented; remove the key only if it has no effect"
            )
    missing = [key for key, field in table.items() if field in required - fields.keys()]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    return fields
