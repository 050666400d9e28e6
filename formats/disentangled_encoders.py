"""Hugging Face checkpoints of DeBERTa v1, v2 and v3.

Our names of weights are those of v2. v1 has one matrix for queries, keys and values, whose rows are
interleaved head by head (q, k, v of head 0, then of head 1); only queries and values have a bias.

There are two kinds of masked-language-model heads, which read different states:

    cls.predictions.*          written by transformers with "legacy": true. It reads the encoder's last states
    lm_predictions.lm_head.*   in the published files. It reads the states of the enhanced mask decoder, which
                               adds absolute positions, deberta.embeddings.position_embeddings.weight

With "legacy": false transformers opens the second kind, but it has no mask decoder: there the head reads the
last states, and positions are neither read nor written. So a file that has this head and no positions is read
in that way. Published discriminators of v3 have mask_predictions.*, the head of language/deberta_v3.py.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from formats import config_json
from formats.config_json import damage_named, flag, read_fields
from formats.encoders import BERT_FIELDS
from formats.safetensors_dir import assign, build, inverse, read_weights, rename, tie, weight_files, write

CLASSES = {"deberta": "Deberta", "deberta-v2": "DebertaV2"}  # model_type: how its architectures begin
ARCHITECTURES = ("none", "Model", "ForMaskedLM")  # how they end
# Keys of which only this value is implemented.
ONLY = {
    "hidden_act": ("gelu",),
    "relative_attention": (True,),
    "talking_head": (False,),
    "z_steps": (0, 1),
    "conv_groups": (1,),
    "quantization_config": (None,),
}
# Keys of v2, and the values that mean what v1 does.
ONLY_V1 = {
    "position_buckets": (-1, 0),
    "share_att_key": (False,),
    "norm_rel_ebd": ("none",),
    "conv_kernel_size": (0,),
}
# Keys that `read_keys` reads itself.
OWN = {
    "max_relative_positions", "position_buckets", "share_att_key", "norm_rel_ebd", "pos_att_type",
    "position_biased_input", "conv_kernel_size", "conv_act", "attention_head_size", "embedding_size",
}  # fmt: skip
# Keys that change neither hidden states nor logits, and OWN. Only classifiers have a pooler.
INERT = config_json.INERT | OWN | {
    "attention_probs_dropout_prob", "hidden_dropout_prob", "pooler_dropout", "pooler_hidden_act",
    "pooler_hidden_size", "pooler_size_per_head", "legacy", "padding_idx", "eos_token_id", "cls_dropout",
    "classifier_dropout", "summary_last_dropout",
}  # fmt: skip
NORMS = {"none": False, "layer_norm": True}  # norm_rel_ebd: norm_table

# Parts of names of weights: v1's, ours.
V1_NAMES = {".pos_q_proj.": ".pos_query_proj.", ".pos_proj.": ".pos_key_proj."}
# The second kind of head: the beginnings of its names, and ours.
DECODER_HEAD = {
    "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    "lm_predictions.lm_head.bias": "cls.predictions.bias",
}
PREFIX = "deberta."  # of all names but those of heads
POSITIONS = "deberta.embeddings.position_embeddings.weight"
DISCRIMINATOR = "mask_predictions."
EMBEDDING, OWN_HEAD = "deberta.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `deberta.Config` for the model in directory, and its weights under our names.

    The weights of a discriminator's head, DISCRIMINATOR, are among them. Raises ValueError naming what is
    missing, damaged, or not implemented.
    """
    path, hf = config_json.read_config(directory)
    if str(hf.get("model_type")) not in CLASSES:
        raise ValueError(f"{path}: model_type {hf.get('model_type')!r:.100}: expected {' or '.join(CLASSES)}")
    with damage_named(path):
        fields = read_keys(path, hf)
    stored = {name: w for name, w in read_weights(directory).items() if not name.endswith("position_ids")}
    if not any(name.startswith(PREFIX) for name in stored):  # a file without heads
        stored = {PREFIX + name: w for name, w in stored.items()}

    # The kind of the head, and where absolute positions are added: to the input, in the decoder, or nowhere.
    released = any(name.startswith("lm_predictions.") for name in stored)
    if released and any(name.startswith("cls.predictions.") for name in stored):
        raise ValueError(f"{directory}: has both lm_predictions and cls.predictions; expected one of the two")
    weights = {rename(name, DECODER_HEAD): w for name, w in stored.items()}
    if fields["absolute"] != "input":
        fields["absolute"] = "decoder" if released and POSITIONS in weights else "none"
        if fields["absolute"] == "none":
            weights.pop(POSITIONS, None)

    # A head that is not the embedding has a bias under two names: the second counts, as in transformers.
    if "cls.predictions.decoder.bias" in weights:
        weights["cls.predictions.bias"] = weights.pop("cls.predictions.decoder.bias")
    tie(fields, weights, EMBEDDING, OWN_HEAD)
    fields["mlm_head"] = "cls.predictions.bias" in weights
    if released or not fields["mlm_head"]:
        fields["tie_embeddings"] = True
    return fields, split(weights, fields["n_heads"], directory) if fields["original"] else weights


def read_keys(path: Path, hf: dict) -> dict:
    """Return the fields of `deberta.Config` except for those of the head. hf: the content of the config.json
    at path. Raises ValueError for what is not implemented."""
    original = hf["model_type"] == "deberta"
    only = ONLY | ONLY_V1 if original else ONLY
    defaults = {"pad_token_id": 0, "n_segments": 0, "norm_eps": 1e-7, "max_seq_len": 512}
    hf = {"relative_attention": False} | hf
    fields = read_fields(path, hf, BERT_FIELDS, defaults, only, INERT - only.keys())
    D, H = fields["d_model"], fields["n_heads"]

    def expect(key: str, expected: str, right: bool) -> None:
        if not right:
            raise ValueError(f"{path}: {key} {hf.get(key)!r:.100} is not implemented; expected {expected}")

    # The terms of attention, as a list or a string such as "c2p|p2c".
    terms = hf.get("pos_att_type") or []
    terms = [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else terms
    expect("pos_att_type", "c2p, p2c or both", len(terms) == len(set(terms) & {"c2p", "p2c"}) > 0)
    expect("embedding_size", f"{D}, the hidden_size", hf.get("embedding_size", D) == D)
    expect("attention_head_size", f"{D // H}", original or hf.get("attention_head_size", D // H) == D // H)

    # The table of distances. Its default length is the largest number of tokens.
    defaults = {"max_relative_positions": -1, "position_buckets": -1, "conv_kernel_size": 0}
    longest, n_buckets, width = (integer(path, hf, key, default) for key, default in defaults.items())
    to_input = flag(path, {"position_biased_input": True} | hf, "position_biased_input")
    norm = hf.get("norm_rel_ebd", "none")
    expect("norm_rel_ebd", " or ".join(NORMS), norm in NORMS)
    fields |= {
        "max_distance": longest if longest > 0 else fields["max_seq_len"],
        "n_buckets": n_buckets if n_buckets > 0 else None,
        "share_keys": flag(path, hf, "share_att_key"),
        "norm_table": NORMS[norm],
        "conv_width": max(width, 0),
        "original": original,
        "c2p": "c2p" in terms,
        "p2c": "p2c" in terms,
        "absolute": "input" if to_input else "",
    }
    expect("conv_act", "gelu", width <= 0 or hf.get("conv_act", "tanh") == "gelu")
    return fields


def integer(path: Path, hf: dict, key: str, default: int) -> int:
    """Return the value of a key, which may be negative. Raises ValueError for anything but a whole number."""
    value = hf.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{path}: {key} {value!r:.100}: expected a whole number")
    return value


def split(weights: dict[str, Tensor], H: int, directory: str | Path) -> dict[str, Tensor]:
    """Return weights of v1, read from directory, under our names: queries, keys and values of H heads apart.

    Raises ValueError for a joint matrix whose number of rows is no multiple of 3 H.
    """
    apart = {}
    for name, w in weights.items():
        name = rename(name, V1_NAMES)
        if name.endswith(".in_proj.weight"):
            if w.ndim != 2 or len(w) % (3 * H):
                raise ValueError(
                    f"{directory}: {name} has shape {tuple(w.shape)}: expected rows for {H} heads"
                )
            parts = w.unflatten(0, (H, 3, -1)).unbind(1)  # q, k, v, each (H, K, D)
            for part, piece in zip(("query", "key", "value"), parts, strict=True):
                apart[name.replace("in_proj", f"{part}_proj")] = piece.flatten(0, 1).contiguous()
        elif name.endswith((".q_bias", ".v_bias")):
            part = "query" if name.endswith(".q_bias") else "value"
            apart[f"{name[: -len('q_bias')]}{part}_proj.bias"] = w
        else:
            apart[name] = w
    return apart


def joined(weights: dict[str, Tensor], H: int) -> dict[str, Tensor]:
    """Return weights of a v1 with H heads under the names of v1: the inverse of `split`."""
    theirs = {}
    for name, w in weights.items():
        layer, _, part = name.rpartition("attention.self.")
        if part == "query_proj.weight":
            names = (f"{layer}attention.self.{other}_proj.weight" for other in ("query", "key", "value"))
            parts = [weights[other].unflatten(0, (H, -1)) for other in names]  # 3 of (H, K, D)
            theirs[f"{layer}attention.self.in_proj.weight"] = torch.stack(parts, 1).flatten(0, 2)
        elif part in ("query_proj.bias", "value_proj.bias"):
            theirs[f"{layer}attention.self.{part[0]}_bias"] = w
        elif part not in ("key_proj.weight", "value_proj.weight"):
            theirs[rename(name, inverse(V1_NAMES))] = w
    return theirs


def concept_of(directory: str | Path) -> str:
    """Return the concept file that reads the DeBERTa in directory: v3's for a discriminator.

    A file that is missing or damaged is ignored here, since opening the model will name it.
    """
    names = []
    with suppress(SafetensorError, OSError):
        for path in weight_files(Path(directory)):
            with safe_open(path, framework="pt") as file:
                names += file.keys()
    is_discriminator = any(name.startswith(DISCRIMINATOR) for name in names)
    return "language.deberta_v3" if is_discriminator else "language.deberta"


def load(kind: type[nn.Module], config_kind: type, directory: str | Path) -> nn.Module:
    """Return kind(config) with the weights in directory, in their precision; config is of config_kind, a
    `deberta.Config`. The head of a discriminator is left out. Raises ValueError naming what is wrong."""
    fields, weights = read(directory)
    weights = {name: w for name, w in weights.items() if not name.startswith(DISCRIMINATOR)}
    model = build(lambda: kind(config_kind(**fields)), fields, weights, directory)
    assign(model, weights, directory)
    return model


def config_of(config: Any, head: str) -> dict:
    """Return the content of config.json for a `deberta.Config`, spelled so that transformers 4 and 5 read it.

    head: the end of the architecture's name, such as "ForMaskedLM".
    """
    family = "deberta" if config.original else "deberta-v2"
    hf = {"architectures": [CLASSES[family] + head], "model_type": family}
    hf |= {key: vars(config)[field] for key, field in BERT_FIELDS.items()}
    hf |= {
        "hidden_act": "gelu",
        "relative_attention": True,
        "max_relative_positions": config.max_distance,
        "pos_att_type": "|".join(term for term in ("c2p", "p2c") if getattr(config, term)),
        "position_biased_input": config.absolute == "input",
        "legacy": config.absolute != "decoder",
    }
    if not config.original:
        norms = {ours: theirs for theirs, ours in NORMS.items()}
        hf |= {"position_buckets": config.n_buckets or -1, "share_att_key": config.share_keys}
        hf |= {"norm_rel_ebd": norms[config.norm_table]}
    if config.conv_width:
        hf |= {"conv_kernel_size": config.conv_width, "conv_act": "gelu"}
    # language/deberta.py has no dropout. Without its keys, transformers would use 0.1 in further training.
    return hf | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def save(config: Any, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Write config.json of a `deberta.Config`, and model.safetensors. weights: under our names.

    Each file is replaced only once the new one is complete.
    """
    discriminates = any(name.startswith(DISCRIMINATOR) for name in weights)
    if config.absolute == "decoder":  # the names of the published files
        weights = {rename(name, inverse(DECODER_HEAD)): w for name, w in weights.items()}
    if config.original:
        weights = joined(weights, config.n_heads)
    if not (config.mlm_head or discriminates):
        weights = {name.removeprefix(PREFIX): w for name, w in weights.items()}
    # A head that is not the embedding has its bias under a second name, too.
    if OWN_HEAD in weights:
        weights |= {"cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone()}
    write(directory, config_of(config, "ForMaskedLM" if config.mlm_head else "Model"), weights)
