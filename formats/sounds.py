"""Hugging Face checkpoints of models that read sounds: ASTForAudioClassification.

Names of weights are those of formats/images.py behind another prefix, but for the classifier's. How log-mel
numbers are normalised is in preprocessor_config.json, beside the rate of the samples.
"""

from pathlib import Path

from torch import Tensor, nn

from formats import images
from formats.config_json import damage_named, named_architecture, read_config, read_fields
from formats.json_file import read_json, write_json
from formats.safetensors_dir import filled, inverse, read_weights, rename, write

CLASSIFIER = "ASTForAudioClassification"
CONCEPTS = {CLASSIFIER: "vision.spectrogram"}
FIELDS = {  # config.json: Config of vision/spectrogram.py
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "max_length": "n_frames",
    "num_mel_bins": "n_mels",
    "patch_size": "patch_size",
    "frequency_stride": "mel_stride",
    "time_stride": "frame_stride",
    "qkv_bias": "qkv_bias",
    "layer_norm_eps": "norm_eps",
}
# The values of absent keys: transformers leaves out what is its default.
DEFAULTS = {
    "n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 3072, "n_frames": 1024, "n_mels": 128,
    "patch_size": 16, "mel_stride": 10, "frame_stride": 10, "qkv_bias": True, "norm_eps": 1e-12,
}  # fmt: skip
NAMES = {  # the beginnings of names of tensors: theirs, ours; in an order that can be undone
    "audio_spectrogram_transformer.": "ast.",
    "classifier.dense.": "classifier.",
    "classifier.layernorm.": "head_norm.",
}
# How ASTFeatureExtractor makes numbers of a sound, beside "mean" and "std".
EXTRACTOR = {"feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "padding_side": "right"}
EXTRACTOR |= {"padding_value": 0.0, "return_attention_mask": False, "do_normalize": True}


def read(directory: str | Path, rate: int) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `spectrogram.Config` for the model in directory, and its weights under our names.

    rate: of the samples that the model must read. Raises ValueError naming what is missing, damaged, or not
    implemented.
    """
    path, hf = read_config(directory)
    architecture = named_architecture(path, hf)
    if architecture not in CONCEPTS:
        raise ValueError(f"{path}: architecture {architecture!r}: expected {CLASSIFIER}")
    inert = images.INERT - set(FIELDS)
    with damage_named(path):
        fields = read_fields(path, hf, FIELDS, DEFAULTS, images.ONLY, inert, set())
        fields["mlp"] = images.ACTIVATIONS[hf.get("hidden_act", "gelu")]
    fields |= read_preprocessor(Path(directory), rate)
    weights = {rename(name, NAMES): w for name, w in read_weights(directory).items()}
    return fields | images.read_classes(hf, weights), weights


def read_preprocessor(directory: Path, rate: int) -> dict[str, float]:
    """Return the fields "mean" and "std" by preprocessor_config.json, none where there is no such file.

    Raises ValueError for sounds at another rate.
    """
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return {}
    hf = read_json(path)
    if hf.get("sampling_rate", rate) != rate:
        raise ValueError(f"{path}: sampling_rate {hf['sampling_rate']!r}: only {rate} is implemented")
    if not hf.get("do_normalize", True):
        return {"mean": 0.0, "std": 0.5}  # the difference is divided by twice this
    found = {name: hf[name] for name in ("mean", "std") if name in hf}
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} {value!r:.100}: expected a number")
    return {name: float(value) for name, value in found.items()}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str, rate: int):
    """Return kind(config) with the weights in directory, in their precision. ValueError for what is wrong."""
    fields, weights = read(directory, rate)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save(model: nn.Module, directory: str | Path, labels: tuple[str, ...], rate: int) -> None:
    """Write a `spectrogram.AST`: config.json, model.safetensors and preprocessor_config.json.

    labels: the names of the classes.
    """
    config = model.config
    hf = {"architectures": [CLASSIFIER], "model_type": "audio-spectrogram-transformer"}
    hf |= {key: getattr(config, field) for key, field in FIELDS.items()} | images.activation(config)
    hf |= images.class_names(labels, config.n_classes)
    back = inverse(NAMES)
    write(directory, hf, {rename(name, back): w for name, w in model.state_dict().items()})
    content = EXTRACTOR | {
        "sampling_rate": rate,
        "num_mel_bins": config.n_mels,
        "max_length": config.n_frames,
    }
    content |= {"mean": config.mean, "std": config.std}
    write_json(Path(directory) / "preprocessor_config.json", content)
