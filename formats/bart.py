"""Hugging Face checkpoints of BART and PEGASUS: config.json, names of weights, generation_config.json.

generation_config.json has the defaults of `generate`: the number of beams, the length penalty, and the tokens
that are forced or forbidden. They are read into `Decoding`; a key that is not implemented is an error that
names it. In checkpoints from before 2023 there is no such file, and the keys are in config.json.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.config_json import INERT, damage_named, flag, read_architecture, read_config, read_fields
from formats.json_file import read_json, write_json
from formats.safetensors_dir import assign, build, inverse, read_weights, rename, write

ARCHITECTURES = ("BartForConditionalGeneration", "PegasusForConditionalGeneration")
CONCEPT = "language.bart"
FIELDS = {  # config.json: Config
    "encoder_layers": "n_layers",
    "decoder_layers": "n_decoder_layers",
    "encoder_attention_heads": "n_heads",
    "d_model": "d_model",
    "encoder_ffn_dim": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
    "decoder_start_token_id": "start_token_id",
}
# Keys of the decoder, and those of the encoder that must have the same value.
TWINS = {"decoder_attention_heads": "encoder_attention_heads", "decoder_ffn_dim": "encoder_ffn_dim"}
INERT_KEYS = INERT | {
    "dropout", "activation_dropout", "attention_dropout", "classifier_dropout", "classif_dropout", "init_std",
    "encoder_layerdrop", "decoder_layerdrop", "num_hidden_layers", "extra_pos_embeddings", "save_step",
    "force_bos_token_to_be_generated",  # now forced_bos_token_id
}  # fmt: skip
REQUIRED = set(FIELDS.values())
# Names of weights: theirs, ours, which are those of language/t5.py.
NAMES = {
    "model.": "",
    "encoder.layer_norm.": "encoder.final_layer_norm.",
    "decoder.layer_norm.": "decoder.final_layer_norm.",
    ".layers.": ".block.",
    ".self_attn_layer_norm.": ".layer.0.layer_norm.",
    ".encoder_attn_layer_norm.": ".layer.1.layer_norm.",
    ".self_attn.": ".layer.0.SelfAttention.",
    ".encoder_attn.": ".layer.1.EncDecAttention.",
}
PROJECTIONS = {f".{name}_proj.": f".{name}." for name in ("q", "k", "v")} | {".out_proj.": ".o."}
# A layer's MLP and its norm, the last of the layer's parts: theirs, ours.
OF_MLP = {"fc1": "DenseReluDense.wi", "fc2": "DenseReluDense.wo", "final_layer_norm": "layer_norm"}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Decoding:
    """The defaults of a checkpoint for beam search, see language/beam_search.py."""

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False  # end as soon as num_beams outputs have ended
    no_repeat_ngram_size: int = 0  # no sequence of this many tokens is written twice; 0: no such limit
    min_length: int = 0  # tokens before which no output ends, the start token included
    max_length: int = 0  # tokens of an output, the start token included; 0: not given
    forced_bos_token_id: int | None = None  # the first token behind the start token
    forced_eos_token_id: int | None = None  # the last token of an output of full length


# Keys of generation_config.json that change nothing, and values with which other keys change nothing.
INERT_GENERATION = {
    "_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "use_cache",
}  # fmt: skip
NEUTRAL = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_return_sequences": 1,
           "num_beam_groups": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
           "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0,
           "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0, "remove_invalid_values": False,
           "renormalize_logits": False, "output_scores": False, "output_attentions": False,
           "output_hidden_states": False, "return_dict_in_generate": False}  # fmt: skip


def ours(name: str) -> str:
    """Return our name of a tensor of theirs."""
    name = rename(rename(name, NAMES), PROJECTIONS)
    place, _, rest = name.partition(".block.")
    if rest:
        number, _, inner = rest.partition(".")
        module, _, kind = inner.rpartition(".")
        if module in OF_MLP:
            return f"{place}.block.{number}.layer.{1 if place == 'encoder' else 2}.{OF_MLP[module]}.{kind}"
    return name


def theirs(name: str) -> str:
    """Return their name of a tensor of ours."""
    place, _, rest = name.partition(".block.")
    if rest:
        number, _, inner = rest.partition(".")
        _, layer, inner = inner.split(".", 2)
        module, _, kind = inner.rpartition(".")
        if layer == ("1" if place == "encoder" else "2"):
            return f"model.{place}.layers.{number}.{inverse(OF_MLP)[module]}.{kind}"
    names = {new: old for old, new in NAMES.items() if new}
    name = rename(rename(name, inverse(PROJECTIONS)), names)
    return name if name == "final_logits_bias" else f"model.{name}"


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `bart.Config` for the model in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf, architecture = read_architecture(directory, ARCHITECTURES)
    with damage_named(path):
        fields = read_keys(path, hf, architecture == ARCHITECTURES[1])
    weights = {ours(name): w for name, w in read_weights(directory).items()}

    # The embeddings may be stored under up to four names.
    for name, w in [(name, weights.pop(name)) for name in COPIES if name in weights]:
        if not torch.equal(weights.setdefault("shared.weight", w), w):
            raise ValueError(
                f"{directory}: {name} differs from shared.weight; both stacks and the head share it"
            )
    like = weights.get("shared.weight", torch.zeros(()))
    weights.setdefault("final_logits_bias", like.new_zeros(1, fields["vocab_size"]))
    return fields, weights


def read_keys(path: Path, hf: dict, pegasus: bool) -> dict:
    """Return the fields of `bart.Config`.

    hf: the content of the config.json at path. Raises ValueError for what is missing or not implemented.
    """
    hf = dict(hf)
    for twin, first in TWINS.items():
        if hf.pop(twin, hf.get(first)) != hf.get(first):
            raise ValueError(f"{path}: {twin} is not {first}; expected stacks of the same width")
    mlp = hf.pop("activation_function", "gelu")
    if mlp not in ("gelu", "relu"):
        raise ValueError(
            f"{path}: activation_function {mlp!r:.100} is not implemented; expected gelu or relu"
        )
    scaled = flag(path, hf, "scale_embedding")
    hf.pop("scale_embedding", None)
    # Older files have keys for what distinguishes the two families.
    only = {"is_encoder_decoder": (True,), "tie_word_embeddings": (True,), "is_decoder": (False,)}
    only |= {
        key: (pegasus,) for key in ("normalize_before", "add_final_layer_norm", "static_position_embeddings")
    }
    only |= {
        "normalize_embedding": (not pegasus,),
        "add_bias_logits": (False,),
        "quantization_config": (None,),
    }
    if hf.get("decoder_layers") is None:
        hf["decoder_layers"] = hf.get("encoder_layers")
    defaults = {"pad_token_id": 0, "eos_token_id": 1, "start_token_id": 0} if pegasus else {}
    defaults = defaults or {"pad_token_id": 1, "eos_token_id": 2, "start_token_id": 2}
    fields = read_fields(path, hf, FIELDS, defaults, only, INERT_KEYS - set(FIELDS), REQUIRED)
    if fields["n_decoder_layers"] == fields["n_layers"]:
        fields["n_decoder_layers"] = None
    return fields | {"mlp": mlp, "scale_embedding": scaled, "pegasus": pegasus}


def read_decoding(directory: str | Path) -> Decoding:
    """Return the defaults of beam search in directory.

    Raises ValueError naming a key of generation_config.json that is not implemented, or a wrong value.
    """
    path = Path(directory) / "generation_config.json"
    is_own = path.is_file()
    content = read_json(path) if is_own else read_config(directory)[1]
    known = Decoding.__dataclass_fields__
    found = {key: content[key] for key in known if content.get(key) is not None}
    for key, value in content.items():
        is_neutral = value is None or value == NEUTRAL.get(key, ...)
        if is_own and key not in known and key not in INERT_GENERATION and not is_neutral:
            raise ValueError(f"{path}: {key} {value!r:.100} is not implemented; remove it to decode without")
    for key, value in found.items():
        kinds = (bool,) if key == "early_stopping" else (int, float) if key == "length_penalty" else (int,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{path}: {key} {value!r:.100}: expected {kinds[0].__name__}")
        if not math.isfinite(value):
            raise ValueError(f"{path}: {key} {value}: expected a finite number")
        least = 1 if key == "num_beams" else 0
        if key != "length_penalty" and value < least:
            raise ValueError(f"{path}: {key} {value}: expected at least {least}")
    return Decoding(**found)


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is of config_kind, a
    `bart.Config`. Raises ValueError naming what is missing, damaged or not implemented."""
    fields, weights = read(directory)
    model = build(lambda: kind(config_kind(**fields, kernels=kernels)), fields, weights, directory)
    # Files of PEGASUS may leave out the sinusoids.
    for name in model.state_dict():
        if name.endswith("embed_positions.weight") and fields["pegasus"] and name not in weights:
            weights[name] = config_kind(**fields).sinusoids().to(weights["shared.weight"].dtype)
    assign(model, weights, directory)
    model.has_bias = bool(model.final_logits_bias.any())
    model.decoding = read_decoding(directory)
    return model


def config_of(config: Any) -> dict:
    """Return the content of config.json for a `bart.Config`."""
    fields = vars(config) | {"n_decoder_layers": config.n_decoder_layers or config.n_layers}
    architecture = ARCHITECTURES[config.pegasus]
    kind = "pegasus" if config.pegasus else "bart"
    hf = {"architectures": [architecture], "model_type": kind, "is_encoder_decoder": True}
    hf |= {key: fields[field] for key, field in FIELDS.items()}
    hf |= {twin: hf[first] for twin, first in TWINS.items()}
    hf |= {"activation_function": config.mlp, "scale_embedding": config.scale_embedding}
    # language/bart.py has no dropout. Without its keys, transformers would use its own in further training.
    hf |= {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    return hf | {"tie_word_embeddings": True, "forced_eos_token_id": None}


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory.

    Each file is replaced only once the new one is complete.
    """
    hf = config_of(model.config)
    write(directory, hf, {theirs(name): w for name, w in model.state_dict().items()})
    content = {key: hf[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    changed = {k: v for k, v in vars(model.decoding).items() if v != vars(Decoding())[k]}
    write_json(Path(directory) / "generation_config.json", content | changed)
