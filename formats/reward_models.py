"""Hugging Face checkpoints of reward models: decoders that return one number for a text.

    LlamaForSequenceClassification      the decoder of LlamaForCausalLM without its head, and `score` (1, D)

GPT-2, Mistral, Qwen2 and Qwen3 (formats/decoders.py) have such classes too. `score` is applied to the state
of the last token of a text. transformers takes for it the last token that is not pad_token_id, so a text must
not end with that token. Without pad_token_id, transformers accepts one text at a time.

The layer `score` has no bias in transformers. Ours is saved as the key "reward_bias" of config.json, which
transformers ignores; the differences of scores, by which texts are compared, do not depend on it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats import decoders
from formats.config_json import damage_named, read_architecture, whole_number
from formats.safetensors_dir import read_weights, write

ENDING = "ForSequenceClassification"
CLASSES = {  # architecture of the reward model: architecture of its decoder
    name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + ENDING: name for name in decoders.DEFAULTS
}
SCORE = "score.weight"


class Saved(NamedTuple):
    """The content of a reward model's directory."""

    fields: dict[str, Any]  # of gpt.Config
    weights: dict[str, Tensor]  # of the decoder under our names, and SCORE (1, D)
    pad_token_id: int | None
    bias: float  # added to the product with SCORE


def read(directory: str | Path) -> Saved:
    """Return the reward model in directory.

    Raises ValueError naming what is missing, damaged or not implemented, such as several labels.
    """
    path, hf, architecture = read_architecture(directory, CLASSES)
    labels = hf.get("id2label") or {"0": "", "1": ""}  # without the key, transformers has two labels
    if not isinstance(labels, dict) or len(labels) != 1:
        raise ValueError(f"{path}: id2label {labels!s:.80}: expected 1 label, the reward")
    bias = hf.pop("reward_bias", 0.0)
    if isinstance(bias, bool) or not isinstance(bias, float | int):
        raise ValueError(f"{path}: reward_bias {bias!r:.100}: expected a number")
    fields = decoders.decoder_fields(directory, path, hf, CLASSES[architecture])
    with damage_named(path):
        pad = whole_number(path, hf, "pad_token_id", None) if hf.get("pad_token_id") is not None else None

    weights = read_weights(directory)
    score = weights.pop(SCORE, None)
    if score is None or score.shape != (1, fields["d_model"]):
        found = "is missing" if score is None else f"has shape {tuple(score.shape)}"
        raise ValueError(f"{directory}: {SCORE} {found}; expected (1, {fields['d_model']})")
    with damage_named(Path(directory)):
        weights = decoders.our_names(fields, weights)
    fields["tie_embeddings"] = True  # there is no head
    return Saved(fields, weights | {SCORE: score}, pad, float(bias))


def save(
    config: Any,
    weights: dict[str, Tensor],
    directory: str | Path,
    pad_token_id: int | None = None,
    bias: float = 0.0,
) -> None:
    """Write a reward model: config.json and model.safetensors.

    config: of the decoder, a `gpt.Config`. weights, pad_token_id, bias: as in `Saved`. Raises ValueError
    where no Hugging Face architecture has this combination of features.
    """
    hf = decoders.decoder_config(config)
    classes = {decoder: name for name, decoder in CLASSES.items()}
    hf["architectures"] = [classes[hf["architectures"][0]]]
    hf |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": pad_token_id}
    hf["reward_bias"] = bias
    score, rest = weights[SCORE], {name: w for name, w in weights.items() if name != SCORE}
    if hf["model_type"] == "gpt2":
        rest = decoders.to_gpt2(rest)
    write(directory, hf, rest | {SCORE: score.to(torch.float32)})
