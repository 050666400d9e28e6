"""Open any saved model: the files in its directory name the class that reads it.

adapter_config.json              an adapter: open its base, then put the adapter in
config.json, "architectures"     the concept file whose `Model.from_pretrained` reads the directory
model_index.json                 latent diffusion, of which each part has a folder

model = open_model("runs/gpt/model")
"""

import importlib
from pathlib import Path

from torch import nn

from formats import (
    bart,
    clip,
    decoders,
    deepseek,
    diffusers,
    disentangled_encoders,
    encoder_decoders,
    encoders,
    gemma,
    image_decoders,
    images,
    llava,
    minimax,
    mixtures,
    native,
    pipelines,
    reward_models,
    sounds,
)
from formats.config_json import named_architecture, read_config
from formats.json_file import read_json


def open_model(directory: str | Path, *, base: str | Path | None = None, kernels: str = "auto") -> nn.Module:
    """Return the model in directory, of any kind that `concept_of` finds, or a base with its adapter.

    base: the directory of an adapter's base, if not the one that adapter_config.json names. kernels: the
    backend of kernels/.

    Raises ValueError for an architecture that is not implemented, and for files that are missing, damaged, or
    do not fit.
    """
    if is_adapter(directory):
        model = open_model(base_of(directory, base), kernels=kernels)
        importlib.import_module("lora").load_adapter(model, directory)
        return model
    concept = importlib.import_module(concept_of(directory))
    return concept.Model.from_pretrained(directory, kernels=kernels)


def concept_of(directory: str | Path, *, base: str | Path | None = None) -> str:
    """Return the name of the concept file whose Model reads directory, as "gpt" or "posttraining.classify".

    For an adapter it is that of its base. Raises ValueError as `open_model` does.
    """
    if is_adapter(directory):
        return concept_of(base_of(directory, base))
    if pipelines.is_pipeline(directory):
        return pipelines.CONCEPT

    path, hf = read_config(directory)
    architecture = named_architecture(path, hf)
    if architecture in decoders.DEFAULTS:
        return "gpt"
    if architecture in mixtures.TABLES:
        return "moe"
    if architecture in gemma.ARCHITECTURES:
        return gemma.CONCEPT
    if architecture == minimax.ARCHITECTURE:
        return minimax.CONCEPT
    if architecture in deepseek.ARCHITECTURES:
        return deepseek.concept_of(path, hf)
    if architecture in encoder_decoders.ARCHITECTURES:
        return encoder_decoders.CONCEPT
    by_name = images.CONCEPTS | sounds.CONCEPTS | diffusers.CONCEPTS
    if architecture in by_name:
        return by_name[architecture]
    if architecture in clip.MODELS:
        return clip.CONCEPT
    if architecture == image_decoders.ARCHITECTURE:
        return image_decoders.CONCEPT
    if architecture == llava.ARCHITECTURE:
        return llava.CONCEPT
    if architecture in bart.ARCHITECTURES:
        return bart.CONCEPT
    if architecture in reward_models.CLASSES:
        return "posttraining.reward"
    if architecture.startswith(native.PREFIX):
        return native.find(path, architecture).__name__

    # The heads of an encoder follow from its tensors, but two kinds of head have concept files of their own.
    if str(hf.get("model_type")) in encoders.TABLES:
        if architecture.endswith("ForSequenceClassification"):
            return "posttraining.classify"
        return "language.electra" if architecture == "ElectraForPreTraining" else "bert"
    # The heads of a DeBERTa follow from its tensors too: published files name no architecture.
    is_deberta = str(hf.get("model_type")) in disentangled_encoders.CLASSES
    if is_deberta and architecture.endswith(disentangled_encoders.ARCHITECTURES):
        return disentangled_encoders.concept_of(directory)

    known = [*decoders.DEFAULTS, *mixtures.TABLES, *encoder_decoders.ARCHITECTURES, *bart.ARCHITECTURES]
    known += [*gemma.ARCHITECTURES, *deepseek.ARCHITECTURES, *clip.MODELS, llava.ARCHITECTURE]
    known += [minimax.ARCHITECTURE, *images.CONCEPTS, *sounds.CONCEPTS, image_decoders.ARCHITECTURE]
    known += [*diffusers.CONCEPTS]
    known += [f"{name}..." for name in encoders.CLASSES.values()]
    known += [f"{name}ForMaskedLM" for name in disentangled_encoders.CLASSES.values()]
    raise ValueError(
        f"{path}: architecture {architecture!r}: expected one of {', '.join(known)}, or {native.PREFIX!r} "
        "and the name of a concept file"
    )


def check_concept(directory: str | Path, kind: type[nn.Module]) -> None:
    """Raise ValueError, which names the right command, unless directory holds a model of the class `kind`."""
    own = native.module_name(kind)
    concept = "lora" if is_adapter(directory) else concept_of(directory)
    if concept != own:
        command = f"-m {concept}" if "." in concept else f"{concept}.py"
        raise ValueError(f"{directory}: no model of {own}.py; open it by python {command} {directory}")


def is_adapter(directory: str | Path) -> bool:
    """Return whether directory holds an adapter in PEFT's layout."""
    return (Path(directory) / "adapter_config.json").is_file()


def base_of(directory: str | Path, base: str | Path | None) -> Path:
    """Return the directory of an adapter's base: `base` if given, else what adapter_config.json names.

    Raises ValueError if there is no such directory.
    """
    named = base or read_json(Path(directory) / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str | Path) or not named or not Path(named).is_dir():
        raise ValueError(
            f"{directory}: an adapter of {str(named)!r}, which is no directory here; name that model's "
            "directory by --base"
        )
    return Path(named)
