"""Hugging Face checkpoints of models that read sounds: ASTForAudioClassification.

The encoder is that of formats/images.py, and its weights have the same names behind the prefix "ast.".
preprocessor_config.json holds the mean and the deviation by which log-mel values are normalised, and the rate
of the samples.
"""

from pathlib import Path

from torch import Tensor, nn

from formats import images
from formats.config_json import damage_named, read_architecture, read_fields
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
NAMES = {  # beginnings of names of weights: theirs, ours
    "audio_spectrogram_transformer.": "ast.",
    "classifier.dense.": "classifier.",
    "classifier.layernorm.": "head_norm.",
}
# The other settings of ASTFeatureExtractor, which computes the log-mel spectrogram of a sound.
EXTRACTOR = {"feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "padding_side": "right"}
EXTRACTOR |= {"padding_value": 0.0, "return_attention_mask": False, "do_normalize": True}


def read(directory: str | Path, rate: int) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `spectrogram.Config` for the model in directory, and its weights under our names.

    rate: samples per second, the only rate that is accepted. Raises ValueError naming what is missing,
    damaged, or not implemented.
    """
    path, hf, _ = read_architecture(directory, CONCEPTS)
    inert = images.INERT - set(FIELDS)
    with damage_named(path):
        fields = read_fields(path, hf, FIELDS, DEFAULTS, images.ONLY, inert, set())
        fields["mlp"] = images.ACTIVATIONS[hf.get("hidden_act", "gelu")]
    fields |= read_preprocessor(Path(directory), rate)
    weights = {rename(name, NAMES): w for name, w in read_weights(directory).items()}
    return fields | images.read_classes(hf, weights), weights


def read_preprocessor(directory: Path, rate: int) -> dict[str, float]:
    """Return the fields "mean" and "std" of log-mel values by preprocessor_config.json, or {} without it.

    Raises ValueError for a model of sounds at another rate (samples per second).
    """
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return {}
    hf = read_json(path)
    if hf.get("sampling_rate", rate) != rate:
        raise ValueError(f"{path}: sampling_rate {hf['sampling_rate']!r}: only {rate} is implemented")
    if not hf.get("do_normalize", True):
        return {"mean": 0.0, "std": 0.5}  # x stays as it is, since AST computes (x - mean) / (2 std)
    found = {name: hf[name] for name in ("mean", "std") if name in hf}
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} {value!r:.100}: expected a number")
    return {name: float(value) for name, value in found.items()}


def load(
    kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str, rate: int
) -> nn.Module:
    """Return kind(config) with the weights in directory in their precision; config is of config_kind, a
    `spectrogram.Config`. rate: see `read`. Raises ValueError naming what is wrong."""
    fields, weights = read(directory, rate)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save(model: nn.Module, directory: str | Path, labels: tuple[str, ...], rate: int) -> None:
    """Write a `spectrogram.AST`: config.json, model.safetensors and preprocessor_config.json.

    labels: the names of the classes. rate: samples per second of the sounds it reads.
    """
    config = model.config
    hf = {"architectures": [CLASSIFIER], "model_type": "audio-spectrogram-transformer"}
    hf |= {key: getattr(config, field) for key, field in FIELDS.items()} | images.activation(config)
    hf |= images.class_names(labels, config.n_classes)
    back = inverse(NAMES)
    write(directory, hf, {rename(name, back): w for name, w in model.state_dict().items()})
    content = EXTRACTOR | {"sampling_rate": rate, "num_mel_bins": config.n_mels}
    content |= {"max_length": config.n_frames, "mean": config.mean, "std": config.std}
    write_json(Path(directory) / "preprocessor_config.json", content)
