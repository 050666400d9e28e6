"""Our own layout, for models that no Hugging Face class describes.

    config.json          {"architectures": ["plinth.attention_variants.latent"], "config": {...}, ...}
    model.safetensors    the weights, under our own names

The architecture is "plinth." and the dotted name of the concept file. That file has `Model`, and `SIZES` with
one or more Configs; "config" in config.json holds the fields of such a Config. A model class needs one line
for each direction:

    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))
    save_pretrained = native.save

JSON has no tuples: it stores a tuple as an array, and every array becomes a tuple when it is read. So a
Config with a list in it cannot be saved.
"""

import importlib
import json
import sys
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from formats.config_json import damage_named, named_architecture, read_config
from formats.json_file import write_json
from formats.safetensors_dir import check_weights, read_weights, write_tensors

PREFIX = "plinth."
ROOT = Path(__file__).parents[1]


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors and config.json to directory, each replaced only once the new one is complete.

    A field `kernels` of the Config is saved as "auto", since the choice depends on the machine. Raises
    ValueError for a Config that would not be the same after reading, and for parameters that are not
    floating-point numbers.
    """
    module, config = module_name(type(model)), with_kernels(model.config, "auto")

    # Refuse what could not be read again, before anything is written.
    try:
        again = make_config(type(config), json.loads(json.dumps(asdict(config))))
    except TypeError as error:
        raise ValueError(f"{module}: {config} cannot be written as JSON ({error})") from None
    if again != config:
        raise ValueError(
            f"{module}: JSON would change {config} to {again}; expected numbers, strings, None, and tuples, "
            "dicts and dataclasses of these"
        )
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            raise ValueError(f"{name} is {p.dtype}: expected floating-point weights")

    weights = unshared(model)
    dtype = next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32)
    content = {
        "architectures": [PREFIX + module],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "config": asdict(config),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", weights)
    write_json(directory / "config.json", content)


def is_native(directory: str | Path) -> bool:
    """Return whether the config.json in directory names a concept file.

    Raises ValueError for one that is missing or damaged.
    """
    return named_architecture(*read_config(directory)).startswith(PREFIX)


def load(directory: str | Path, kernels: str = "auto", kind: type | None = None) -> nn.Module:
    """Return the model in directory, in the precision it was saved in.

    kernels: the value of the Config's field of that name, if it has one. kind: the class of the model, or one
    that it extends; None for any. Raises ValueError naming what is missing, damaged or unknown, and for a
    model of another kind.
    """
    path, content = read_config(directory)
    module, stored = find(path, named_architecture(path, content)), content.get("config") or {}
    if not (getattr(module, "SIZES", None) and hasattr(module, "Model")):
        raise ValueError(f"{path}: {module.__name__} has no Model and SIZES; expected a model's concept file")
    if kind is not None and module_name(kind) not in {base.__module__ for base in module.Model.__mro__}:
        raise ValueError(f"{path}: a model of {module.__name__}; expected one of {module_name(kind)}")
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: config {stored!r:.100}: expected an object")
    config_class = type(next(iter(module.SIZES.values())))
    # The initial values are replaced below, so drawing them leaves the random numbers of the caller alone.
    with damage_named(path), torch.random.fork_rng(devices=[]):
        model = module.Model(with_kernels(make_config(config_class, stored), kernels))

    # Only the data of parameters is replaced, so that modules that share a parameter still share it.
    weights = read_weights(directory)
    places = unshared(model)
    check_weights(places, weights, directory)
    for name, place in places.items():
        place.data = weights[name]
    return model


def find(path: Path, architecture: str) -> ModuleType:
    """Import the concept file of an architecture that the config.json at path names.

    It must be NAME.py or FOLDER/NAME.py, in the project or in the current directory, because a downloaded
    model must not import arbitrary modules. Raises ValueError for any other name.
    """
    name = architecture.removeprefix(PREFIX)
    parts = name.split(".")
    is_name = name != architecture and len(parts) <= 2 and all(map(str.isidentifier, parts))
    file = f"{'/'.join(parts)}.py"
    if not is_name or not any((root / file).is_file() for root in (ROOT, Path())):
        raise ValueError(
            f"{path}: architecture {architecture!r}: expected {PREFIX!r} and the name of a concept file, "
            f"such as {PREFIX}gpt or {PREFIX}vision.vit"
        )
    return importlib.import_module(name)


def module_name(model_class: type) -> str:
    """Return the dotted name of a class's module, also where Python was started with that file and calls it
    "__main__"."""
    if model_class.__module__ != "__main__":
        return model_class.__module__
    main = sys.modules["__main__"]
    return main.__spec__.name if main.__spec__ else Path(main.__file__).stem


def make_config(config_class: type, stored: dict) -> typing.Any:
    """Return the Config with these fields from JSON; a field that is a Config itself is made likewise.

    Raises ValueError for a field that the Config does not have.
    """
    unknown = stored.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise ValueError(f"{config_class.__module__}.{config_class.__name__} has no field {min(unknown)!r}")
    hints = typing.get_type_hints(config_class)
    values = {}
    for field, value in stored.items():
        kinds = (hints[field], *typing.get_args(hints[field]))  # `Inner | None` has the arguments Inner, None
        inner = next(filter(is_dataclass, kinds), None)
        is_config = inner is not None and isinstance(value, dict)
        values[field] = make_config(inner, value) if is_config else to_tuples(value)
    return config_class(**values)


def to_tuples(value: typing.Any) -> typing.Any:
    """Return a value from JSON with a tuple in the place of each list."""
    if isinstance(value, list):
        return tuple(map(to_tuples, value))
    if isinstance(value, dict):
        return {key: to_tuples(item) for key, item in value.items()}
    return value


def with_kernels(config: typing.Any, kernels: str) -> typing.Any:
    """Return the Config with this value of `kernels`, if it has such a field, and Configs in it likewise."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    changes = {name: with_kernels(value, kernels) for name, value in values.items() if is_dataclass(value)}
    return replace(config, **changes, **({"kernels": kernels} if "kernels" in values else {}))


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model, each tensor under the first of its names."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: w for name, w in state.items() if first.setdefault(id(w), name) == name}
