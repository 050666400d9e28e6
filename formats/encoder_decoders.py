"""Hugging Face checkpoints of encoder-decoders: T5 1.0, T5 1.1 and mT5.

Our names of weights are those in the files, except for the table of relative positions of a stack, which in
the files belongs to the first layer of that stack. Two facts about the head are read as follows:

    is its input scaled by D^-0.5?           scale_decoder_outputs, or without that key tie_word_embeddings
    has it a matrix besides the embedding?   yes if there is an lm_head.weight that differs from the embedding

Published files have no scale_decoder_outputs. In T5 1.0, whose head is the embedding with a scaled input,
tie_word_embeddings is true or absent; in T5 1.1, whose head is a matrix of its own without the scale, it is
false. transformers 5 always writes true, and scale_decoder_outputs beside it. It scales no mT5 and writes no
such key for one, so an mT5 is read without the scale whatever its file says. What is written here, where mT5
is a T5 1.1, means the same in transformers 4 and 5.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats import native
from formats.config_json import INERT, damage_named, flag, read_architecture, read_fields
from formats.json_file import write_json
from formats.safetensors_dir import filled, inverse, read_weights, rename, tie, write

ARCHITECTURES = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "T5WithLMHeadModel")
CONCEPT = "language.t5"
FIELDS = {  # config.json: Config
    "num_layers": "n_layers",
    "num_decoder_layers": "n_decoder_layers",
    "num_heads": "n_heads",
    "d_model": "d_model",
    "d_kv": "d_head",
    "d_ff": "d_ff",
    "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "n_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
    "feed_forward_proj": "mlp",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
    "decoder_start_token_id": "start_token_id",
    "n_positions": "max_seq_len",
}
REQUIRED = {"n_layers", "n_heads", "d_model", "d_ff", "d_head", "vocab_size"}
MLPS = {"relu": "relu", "gated-gelu": "geglu"}  # feed_forward_proj: mlp
ONLY = {
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "is_causal": (None,),
    "quantization_config": (None,),
}
INERT_KEYS = INERT | {
    "dropout_rate", "classifier_dropout", "initializer_factor", "scale_decoder_outputs",
    "tie_word_embeddings",
}  # fmt: skip
NAMES = {".block.0.layer.0.SelfAttention.relative_attention_bias.": ".relative_attention_bias."}
EMBEDDING_AND_HEAD = ("shared.weight", "lm_head.weight")
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `t5.Config` for the model in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not implemented.
    """
    path, hf, architecture = read_architecture(directory, ARCHITECTURES)
    with damage_named(path):
        fields = read_keys(path, hf, architecture == ARCHITECTURES[1])
    weights = {rename(name, NAMES): w for name, w in read_weights(directory).items()}

    # The embedding may be stored under up to three names.
    copies = {name: weights.pop(name) for name in COPIES if name in weights}
    for name, w in copies.items():
        one = weights.setdefault(EMBEDDING_AND_HEAD[0], w)
        if not torch.equal(one, w):
            raise ValueError(
                f"{directory}: {name} differs from the other embeddings; both stacks must share them"
            )
    fields["tie_embeddings"] = True
    tie(fields, weights, *EMBEDDING_AND_HEAD)
    return fields, weights


def read_keys(path: Path, hf: dict, is_mt5: bool) -> dict:
    """Return the fields of `t5.Config` except for `tie_embeddings`.

    hf: the content of the config.json at path. Raises ValueError for what is missing or not implemented.
    """
    hf = dict(hf)
    mlp = hf.pop("feed_forward_proj", "gated-gelu" if is_mt5 else "relu")
    if mlp not in MLPS:
        raise ValueError(
            f"{path}: feed_forward_proj {mlp!r:.100} is not implemented; expected {' or '.join(MLPS)}"
        )
    gated = mlp == "gated-gelu"
    only = ONLY | {"dense_act_fn": ("gelu_new" if gated else "relu",), "is_gated_act": (gated,)}
    if hf.get("num_decoder_layers") is None:
        hf.pop("num_decoder_layers", None)
    defaults = {"max_seq_len": 512, "d_head": 64, "n_buckets": 32, "max_distance": 128, "norm_eps": 1e-6}
    defaults |= {"pad_token_id": 0, "eos_token_id": 1, "start_token_id": 0}
    fields = read_fields(path, hf, FIELDS, defaults, only, INERT_KEYS - set(FIELDS), REQUIRED)
    scaled = "scale_decoder_outputs" if "scale_decoder_outputs" in hf else "tie_word_embeddings"
    fields["scale_head"] = flag(path, {scaled: True} | hf, scaled) and not is_mt5
    if fields.get("n_decoder_layers") == fields["n_layers"]:
        fields["n_decoder_layers"] = None
    return fields | {"mlp": MLPS[mlp]}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is of config_kind, a
    `t5.Config`. Raises ValueError naming what is wrong."""
    if native.is_native(directory):
        return native.load(directory, kernels, kind)
    fields, weights = read(directory)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def config_of(config: Any) -> dict:
    """Return the content of config.json for a `t5.Config`, spelled so that transformers 4 and 5 read it."""
    fields = vars(config) | {"n_decoder_layers": config.n_decoder_layers or config.n_layers}
    hf = {"architectures": [ARCHITECTURES[0]], "model_type": "t5", "is_encoder_decoder": True}
    hf |= {key: fields[field] for key, field in FIELDS.items()}
    hf["feed_forward_proj"] = {ours: theirs for theirs, ours in MLPS.items()}[config.mlp]
    hf |= {"tie_word_embeddings": config.scale_head, "scale_decoder_outputs": config.scale_head}
    # language/t5.py has no dropout. Without this key, transformers would use 0.1 in further training.
    return hf | {"dropout_rate": 0.0}


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory.

    Each file is replaced only once the new one is complete. The Transformer of 2017 (`original` in the
    Config), which no Hugging Face architecture describes, is written in the layout of formats/native.py.
    """
    config = model.config
    if config.original:
        native.save(model, directory)
        return
    weights = {rename(name, inverse(NAMES)): w for name, w in model.state_dict().items()}
    # Without the scale, transformers 4 expects a head of its own: a copy of the embedding.
    if config.tie_embeddings and not config.scale_head:
        weights["lm_head.weight"] = weights["shared.weight"].clone()
    hf = config_of(config)
    write(directory, hf, weights)
    content = {key: hf[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    write_json(Path(directory) / "generation_config.json", content)
