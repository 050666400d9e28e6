"""Hugging Face checkpoints of language models that read images: LlavaForConditionalGeneration.

config.json contains the config.json of the image tower as "vision_config" (formats/clip.py) and that of the
language model as "text_config" (formats/decoders.py). Weights are named in three ways, all of which are read:

    vision_tower.vision_model.*, language_model.model.*, language_model.lm_head.*    the published files
    vision_tower.*, language_model.model.*, language_model.lm_head.*                 written by transformers 5
    model.vision_tower.*, model.language_model.*, lm_head.*                          its names in memory

Our names, which are also written, are the second. Beside the weights are the files of a processor, by which
transformers computes how many tokens an image takes: patch_size, vision_feature_select_strategy (whether the
class token is left out), and whether the tower has that token.
"""

from pathlib import Path

from torch import Tensor, nn

from formats import clip, config_json
from formats.config_json import damage_named, read_architecture, read_fields
from formats.decoders import (
    MODEL_TYPES,
    architecture_of,
    decoder_config,
    decoder_fields,
    without_frequencies,
)
from formats.images import read_preprocessor
from formats.json_file import write_json
from formats.safetensors_dir import assign, build, read_weights, rename, tie, write

ARCHITECTURE, CONCEPT = "LlavaForConditionalGeneration", "vision.llava"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
ONLY = {"projector_hidden_act": ("gelu",), "is_encoder_decoder": (False,), "quantization_config": (None,)}
INERT = config_json.INERT | {
    "vision_config", "text_config", "image_token_index", "image_token_id", "vision_feature_layer",
    "vision_feature_select_strategy", "image_seq_length", "tie_word_embeddings", "eos_token_id",
    "ignore_index", "vocab_size", "multimodal_projector_bias",
}  # fmt: skip
# model_type of the tower: its layout, see formats/clip.py.
LAYOUTS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
# The tower of a config.json without "vision_config", and the values of keys that a "text_config" leaves out:
# transformers 4 does not write what is its default.
TOWER_DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
LLAMA_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
    "max_position_embeddings": 32768,
}  # fmt: skip
TEXT_DEFAULTS = {  # model_type of the language model: its defaults
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | {"intermediate_size": 14336, "max_position_embeddings": 131072},
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS,
}
NAMES = {  # the other names of weights: ours
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.",
}
# model_type of the language model: its architecture.
TYPES = {model_type: name for name, model_type in MODEL_TYPES.items() if model_type != "gpt2"}


def read(directory: str | Path) -> tuple[dict, dict, dict]:
    """Return the fields of `llava.Config`, and of the configs of its tower and of its language model.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf, _ = read_architecture(directory, [ARCHITECTURE])
    with damage_named(path):
        fields = read_fields(path, hf, {}, {}, ONLY, INERT, set()) | read_choices(path, hf)

    # The tower.
    tower = part(path, hf, "vision_config", TOWER_DEFAULTS)
    kind = tower.get("model_type", "clip_vision_model")
    if kind not in LAYOUTS:
        raise ValueError(f"{path}: a tower {kind!r}: expected {' or '.join(LAYOUTS)}")
    tower.pop("vocab_size", None)  # left behind in published files
    vision = clip.vision_fields(path, tower, LAYOUTS[kind]) | read_preprocessor(Path(directory))

    # The language model.
    decoder = part(path, hf, "text_config", {})
    kind = decoder.get("model_type", "llama")
    if kind not in TYPES:
        raise ValueError(f"{path}: a language model {kind!r}: expected {', '.join(TYPES)}")
    decoder = TEXT_DEFAULTS[kind] | decoder
    if hf.get("tie_word_embeddings"):
        decoder["tie_word_embeddings"] = True
    return fields, vision, decoder_fields(directory, path, decoder, TYPES[kind])


def part(path: Path, hf: dict, key: str, defaults: dict) -> dict:
    """Return the settings under a key of hf, the content of the config.json at path, or else defaults."""
    found = hf.get(key) or defaults
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {key} {str(found)[:100]!r}: expected an object")
    return dict(found)


def read_choices(path: Path, hf: dict) -> dict:
    """Return the fields of `llava.Config` itself, without the Configs of the tower and the language model."""
    image_token = hf.get("image_token_index", hf.get("image_token_id", 32000))
    layer, strategy = hf.get("vision_feature_layer", -2), hf.get("vision_feature_select_strategy", "default")
    for key, value in (("image_token_index", image_token), ("vision_feature_layer", layer)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{path}: {key} {value!r:.100}: expected one whole number")
    if strategy not in ("default", "full"):
        given = f"vision_feature_select_strategy {strategy!r:.100}"
        raise ValueError(f"{path}: {given}: expected 'default' or 'full'")
    bias = config_json.flag(path, {"multimodal_projector_bias": True} | hf, "multimodal_projector_bias")
    choices = {"image_token": image_token, "feature_layer": layer, "keep_class": strategy == "full"}
    return choices | {"projector_bias": bias}


def load(kind: type[nn.Module], config_kinds: tuple, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory, which may be named in any of the three ways.

    config_kinds: `llava.Config`, and the classes of the Configs of the tower and of the language model.
    Raises ValueError naming what is missing, damaged or not implemented.
    """
    config_kind, vision_kind, text_kind = config_kinds
    fields, vision, text = read(directory)
    weights = our_names(read_weights(directory))
    tie(text, weights, EMBEDDING, HEAD)

    def make() -> nn.Module:
        parts = {"vision": vision_kind(**vision, kernels=kernels), "text": text_kind(**text, kernels=kernels)}
        return kind(config_kind(**parts, **fields))

    n_layers = {"n_layers": vision["n_layers"] + text["n_layers"]}
    model = build(make, n_layers, weights, directory)
    assign(model, weights, directory)
    return model


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with names of any of the three kinds under ours, without the constants in old files."""
    weights = without_frequencies(clip.without_positions(weights))
    return {rename(name, NAMES): w for name, w in weights.items()}


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a `llava.LLaVA`: the model, generation_config.json, and the files of its processor.

    Raises ValueError for a language model in GPT-2's layout, or one that no architecture describes.
    """
    config, directory = model.config, Path(directory)
    if architecture_of(config.text) not in TYPES.values():
        raise ValueError(f"a language model in GPT-2's layout cannot be saved as {ARCHITECTURE}")
    strategy = "full" if config.keep_class else "default"
    text = decoder_config(config.text)
    hf = {"architectures": [ARCHITECTURE], "model_type": "llava"}
    hf |= {"vision_config": clip.tower_settings(config.vision), "text_config": text}
    hf |= {"image_token_index": config.image_token, "image_seq_length": config.n_image_tokens}
    hf |= {"vision_feature_layer": config.feature_layer, "vision_feature_select_strategy": strategy}
    hf |= {"multimodal_projector_bias": config.projector_bias, "projector_hidden_act": "gelu"}
    write(directory, hf | {"tie_word_embeddings": config.text.tie_embeddings}, model.state_dict())
    generation = {"do_sample": True, "eos_token_id": text["eos_token_id"]}
    write_json(directory / "generation_config.json", generation)

    # The processor: how pixels are normalised, and what an image becomes.
    clip.write_preprocessor(config.vision, directory)
    processor = {"processor_class": "LlavaProcessor", "image_token": "<image>"}
    processor |= {"patch_size": config.vision.patch_size, "vision_feature_select_strategy": strategy}
    processor["num_additional_image_tokens"] = int(config.vision.layout == "clip")
    write_json(directory / "processor_config.json", processor)
