"""Hugging Face checkpoints of encoders: BERT, RoBERTa, ALBERT, ELECTRA and ModernBERT.

All of them are read as a `bert.Config`. Our names of weights are BERT's, and the tables below translate those
of the other families:

    bert          BertModel, BertForMaskedLM, BertForPreTraining
    roberta       RobertaForMaskedLM: a single segment; its position table begins with unused rows
    albert        AlbertForPreTraining: narrow embeddings; all layers share one layer's weights
    electra       ElectraForMaskedLM, ElectraForPreTraining: narrow embeddings
    modernbert    ModernBertForMaskedLM: query, key and value in one matrix

The heads of a checkpoint are those whose tensors it has, whatever architecture it names: published files of
BERT name BertForMaskedLM and have the pair head too. formats/safetensors_dir.py reads and writes the files.
"""

from pathlib import Path

import torch
from torch import Tensor

from formats import config_json
from formats.config_json import checked, damage_named, read_fields, whole_number
from formats.safetensors_dir import inverse, read_weights, rename, split_qkv, tie, write

FIELDS = {  # config.json: Config
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_embeddings",
}
BERT_FIELDS = {**FIELDS, "type_vocab_size": "n_segments", "layer_norm_eps": "norm_eps"}
NARROW_FIELDS = {**BERT_FIELDS, "embedding_size": "d_embedding"}
MODERN_FIELDS = {**FIELDS, "norm_eps": "norm_eps"}
TABLES = {
    "bert": BERT_FIELDS,
    "roberta": BERT_FIELDS,
    "albert": NARROW_FIELDS,
    "electra": NARROW_FIELDS,
    "modernbert": MODERN_FIELDS,
}
MODERN = {"n_segments": 0, "positions": "rope", "mlp": "geglu", "pre_norm": True, "bias": False}
ELECTRA = {  # fields of every discriminator
    "positions": "learned", "position_offset": 0, "window": None, "share_layers": False, "pre_norm": False,
    "mlp": "gelu", "bias": True, "pooler": False, "mlm_head": False, "pair": "none",
}  # fmt: skip
# The fields that follow from the family, and the values of absent keys where Config's defaults differ.
DEFAULTS = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "albert": {"d_embedding": 128, "share_layers": True, "mlp": "gelu_tanh"},
    "electra": {"d_embedding": 128},
    "modernbert": {**MODERN, "norm_eps": 1e-5, "pad_token_id": 50283},
}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Keys of which only this value is implemented.
ONLY = {
    "hidden_activation": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "num_hidden_groups": (1,),
    "inner_group_num": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "norm_bias": (False,),
    "classifier_bias": (False,),
    "classifier_activation": ("gelu",),
    "decoder_bias": (True,),
}
# Keys that change neither hidden states nor logits.
INERT = config_json.INERT | {
    "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "classifier_dropout_prob",
    "embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "gradient_checkpointing", "eos_token_id",
    "cls_token_id", "sep_token_id", "classifier_pooling", "deterministic_flash_attn", "reference_compile",
    "repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index", "summary_last_dropout",
    "down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "layers_to_keep",
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "output_past",
}  # fmt: skip
# Keys of ModernBERT that `read_local` reads, and at the end two that have no effect in its files.
MODERN_KEYS = {
    "local_attention", "layer_types", "global_attn_every_n_layers", "rope_parameters", "global_rope_theta",
    "local_rope_theta", "layer_norm_eps", "position_embedding_type",
}  # fmt: skip

# {a family's name: ours}, replaced in this order (see `safetensors_dir.rename`).
NAMES = {
    "bert": {},
    "roberta": {
        "roberta.": "bert.",
        "lm_head.dense.": "cls.predictions.transform.dense.",
        "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
        "lm_head.bias": "cls.predictions.bias",
        "lm_head.decoder.": "cls.predictions.decoder.",
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in.": "bert.embeddings_project.",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.": "bert.encoder.layer.0.",
        "albert.pooler.": "bert.pooler.dense.",
        "albert.": "bert.",
        ".attention.query.": ".attention.self.query.",
        ".attention.key.": ".attention.self.key.",
        ".attention.value.": ".attention.self.value.",
        ".attention.dense.": ".attention.output.dense.",
        ".attention.LayerNorm.": ".attention.output.LayerNorm.",
        ".0.ffn.": ".0.intermediate.dense.",
        ".0.ffn_output.": ".0.output.dense.",
        ".0.full_layer_layer_norm.": ".0.output.LayerNorm.",
        "sop_classifier.classifier.": "cls.seq_relationship.",
        "predictions.bias": "cls.predictions.bias",
        "predictions.decoder.": "cls.predictions.decoder.",
        "predictions.dense.": "cls.predictions.transform.dense.",
        "predictions.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    },
    "electra": {
        "electra.": "bert.",
        "generator_predictions.dense.": "cls.predictions.transform.dense.",
        "generator_predictions.LayerNorm.": "cls.predictions.transform.LayerNorm.",
        "generator_lm_head.bias": "cls.predictions.bias",
        "generator_lm_head.weight": "cls.predictions.decoder.weight",
    },
    "modernbert": {
        "model.embeddings.tok_embeddings.": "bert.embeddings.word_embeddings.",
        "model.embeddings.norm.": "bert.embeddings.LayerNorm.",
        "model.final_norm.": "bert.final_norm.",
        "model.layers.": "bert.encoder.layer.",
        ".attn.Wo.": ".attention.output.dense.",
        ".attn_norm.": ".attention.output.LayerNorm.",
        ".mlp.Wi.": ".intermediate.dense.",
        ".mlp.Wo.": ".output.dense.",
        ".mlp_norm.": ".output.LayerNorm.",
        "head.dense.": "cls.predictions.transform.dense.",
        "head.norm.": "cls.predictions.transform.LayerNorm.",
        "decoder.bias": "cls.predictions.bias",
        "decoder.weight": "cls.predictions.decoder.weight",
    },
}
# What the names of a family's architectures begin with.
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "albert": "Albert",
    "electra": "Electra",
    "modernbert": "ModernBert",
}
# In a model with heads, the names of all other tensors begin with this prefix.
PREFIXES = {
    "bert": "bert.",
    "roberta": "roberta.",
    "albert": "albert.",
    "electra": "electra.",
    "modernbert": "model.",
}
# In classifiers of RoBERTa and ELECTRA, the pooler is part of the classifier.
CLASSIFIER_NAMES = {"classifier.out_proj.": "classifier.", "classifier.dense.": "bert.pooler.dense."}
# Ends of the names of constants, which a file may hold or leave out.
CONSTANTS = ("position_ids", "token_type_ids")
EMBEDDING_AND_HEAD = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `bert.Config` for the encoder in directory, and its weights under our names.

    Raises ValueError naming what is missing, damaged, or not described by any Config.
    """
    # In a file without heads (BertModel ...) names have no prefix.
    family, fields = read_config(directory)
    stored = read_weights(directory)
    prefix = PREFIXES[family]
    bare = not any(name.startswith(prefix) for name in stored)
    names = NAMES[family]
    if "classifier.out_proj.weight" in stored:
        names = CLASSIFIER_NAMES | names
        # Old files of RoBERTa also hold a pooler, which this classifier does not use.
        stored = {name: w for name, w in stored.items() if not name.startswith(f"{prefix}pooler.")}

    # Rename the tensors.
    weights = {}
    for name, w in stored.items():
        if name.endswith(CONSTANTS):
            continue
        name = prefix + name if bare else name
        # In BERT's first files, from TensorFlow, the weight and bias of a norm are called gamma and beta.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = rename(name, names)
        if name.endswith(".attn.Wqkv.weight"):
            with damage_named(Path(directory)):
                pieces = split_qkv(name, w)
            for part, piece in zip(("query", "key", "value"), pieces, strict=True):
                weights[name.replace("attn.Wqkv", f"attention.self.{part}")] = piece
        else:
            weights[name] = w

    # Files that hold the head's bias under both of its names mean the second one, where the two differ.
    if "cls.predictions.decoder.bias" in weights:
        weights["cls.predictions.bias"] = weights.pop("cls.predictions.decoder.bias")
    tie(fields, weights, *EMBEDDING_AND_HEAD)

    # The heads are those whose tensors there are.
    fields["pooler"] = "bert.pooler.dense.weight" in weights
    fields["mlm_head"] = "cls.predictions.bias" in weights
    if not fields["mlm_head"]:
        weights.pop(EMBEDDING_AND_HEAD[1], None)
        fields["tie_embeddings"] = True
    elif family in ("roberta", "electra") and fields.get("mlp") == "gelu_tanh":
        raise ValueError(
            f"{directory}: hidden_act gelu_new: not implemented beside the masked-language-model head, "
            f"which has the exact GELU in {CLASSES[family]}"
        )
    if "cls.seq_relationship.weight" in weights:
        fields["pair"] = "sop" if family == "albert" else "nsp"
    return fields, weights


def read_config(directory: str | Path) -> tuple[str, dict]:
    """Return the family of the encoder in directory, and the fields of `bert.Config` except for its heads.

    Raises ValueError for a family or a key of config.json that is not implemented.
    """
    path, hf = config_json.read_config(directory)
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in TABLES:
        raise ValueError(f"{path}: model_type {family!r:.100}: expected one of {', '.join(TABLES)}")
    with damage_named(path):
        return family, read_keys(path, hf, family)


def read_keys(path: Path, hf: dict, family: str) -> dict:
    """Return the fields of `bert.Config` except for those of heads, see `read_config`.

    hf: the content of the config.json at path. family: one of those in TABLES.
    """
    # In files of ModernBERT some keys of the other families have no effect.
    modern = family == "modernbert"
    only = {key: values for key, values in ONLY.items() if not modern or key not in MODERN_KEYS}
    only |= {} if modern else {"hidden_act": tuple(ACTIVATIONS)}
    inert = INERT | (MODERN_KEYS if modern else set())
    fields = read_fields(path, hf, TABLES[family], DEFAULTS[family], only, inert)

    if "hidden_act" in hf and not modern:
        fields["mlp"] = ACTIVATIONS[hf["hidden_act"]]
    if family == "roberta":
        if hf.get("pad_token_id", 1) is None:
            raise ValueError(
                f"{path}: pad_token_id null: expected a whole number, after which positions begin"
            )
        fields["position_offset"] = fields["pad_token_id"] + 1
        fields["max_seq_len"] -= fields["position_offset"]
    return fields | (read_local(path, hf, fields["n_layers"]) if modern else {})


def read_local(path: Path, hf: dict, n_layers: int) -> dict:
    """Return the fields of ModernBERT's window and of its two rotary bases, from keys of transformers 4 or 5.

    Raises ValueError where layers with and without a window do not alternate regularly.
    """
    # Every k-th layer, from the first, has no window.
    every = whole_number(path, hf, "global_attn_every_n_layers", 3, least=1)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(n_layers)
    ]
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    every = full[1] if len(full) > 1 else n_layers
    others = set(kinds) - {"full_attention", "sliding_attention"}
    if others or len(kinds) != n_layers or full != list(range(0, n_layers, every)):
        raise ValueError(
            f"{path}: layer_types {kinds}: expected full_attention in every k-th layer from the first, of "
            f"{n_layers} layers"
        )

    # Layers with a window have a rotary base of their own.
    rope = hf.get("rope_parameters") or {}
    thetas = {}
    for kind, key, default in (("full", "global", 160_000.0), ("sliding", "local", 10_000.0)):
        parameters = rope.get(f"{kind}_attention") or {}
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"{path}: rope_type {parameters['rope_type']!r} is not implemented; expected 'default'"
            )
        key = f"{key}_rope_theta"
        thetas[key] = checked(path, key, "rope_theta", parameters.get("rope_theta", hf.get(key, default)))
    # A token attends to local_attention / 2 tokens on either side, and to itself.
    local = whole_number(path, hf, "local_attention", 128)
    return {
        "window": local // 2 + 1 if len(full) < n_layers else None,
        "global_every": every if len(full) < n_layers else 3,
        "rope_theta": thetas["global_rope_theta"],
        "local_rope_theta": thetas["local_rope_theta"],
    }


def family_of(config) -> str:
    """Return the family that a `bert.Config` belongs to.

    Raises ValueError where no Hugging Face architecture has this combination of features.
    """
    style = {field: getattr(config, field) for field in MODERN}
    classic = {"positions": "learned", "pre_norm": False, "bias": True}
    narrow = config.d_embedding not in (None, config.d_model)
    if style == MODERN and not narrow and not config.share_layers and not config.pooler:
        return "modernbert"

    # The older families share one style of layers, and differ in embeddings and positions.
    ordinary = config.mlp != "geglu" and config.n_segments > 0 and config.window is None
    if style | classic == style and ordinary:
        if config.position_offset:
            plain = not narrow and not config.share_layers and config.pair == "none"
            if plain and config.position_offset == config.pad_token_id + 1:
                return "roberta"
        elif config.share_layers:
            if narrow:
                return "albert"
        elif not narrow:
            return "bert"
        elif not config.pooler:
            return "electra"
    raise ValueError(
        f"no Hugging Face architecture has these features together, so it cannot be saved: {config}"
    )


def check_electra(config) -> None:
    """Raise ValueError for the config of a discriminator that an ElectraForPreTraining cannot describe."""
    for field, value in ELECTRA.items():
        if getattr(config, field) != value:
            raise ValueError(f"{field} {getattr(config, field)!r}: an ELECTRA has {value!r}")
    if config.n_segments < 1:
        raise ValueError(f"n_segments {config.n_segments}: an ELECTRA has at least 1")


def encoder_config(config, family: str, head: str) -> dict:
    """Return the content of config.json for a `bert.Config`, spelled so that transformers 4 and 5 read it.

    head: the end of the architecture's name, such as "ForMaskedLM".
    """
    hf = {"architectures": [CLASSES[family] + head], "model_type": family}
    fields = vars(config) | {"d_embedding": config.d_embedding or config.d_model}
    hf |= {key: fields[field] for key, field in TABLES[family].items()}
    hf |= {"bos_token_id": None, "eos_token_id": None}
    if family == "modernbert":
        local = config.window is not None
        hf |= {
            "hidden_activation": "gelu",
            "local_attention": 2 * (config.window - 1) if local else 128,
            "global_attn_every_n_layers": config.global_every if local else 1,
            "global_rope_theta": config.rope_theta,
            "local_rope_theta": config.local_rope_theta,
            "cls_token_id": None,
            "sep_token_id": None,
        }
        return hf
    hf["hidden_act"] = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp]
    # bert.py has no dropout. Without its keys, transformers would use 0.1 in further training.
    hf |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "roberta":
        hf["max_position_embeddings"] += config.position_offset
    return hf


def save(
    config,
    weights: dict[str, Tensor],
    directory: str | Path,
    family: str | None = None,
    head: str | None = None,
    **more,
) -> None:
    """Write config.json, and model.safetensors with the weights, which have our names.

    family: one of those in TABLES. head: the end of the architecture's name, such as "ForMaskedLM". Both
    follow from the config if they are None. more: further keys of config.json. Each file is replaced only
    once the new one is complete. Raises ValueError where no Hugging Face architecture has these features
    together.
    """
    family = family or family_of(config)
    if head is None:
        head = "ForPreTraining" if config.pair != "none" else "ForMaskedLM" if config.mlm_head else "Model"
    hf = encoder_config(config, family, head) | more
    write(directory, hf, to_hf(weights, family, head))


def to_hf(weights: dict[str, Tensor], family: str, head: str) -> dict[str, Tensor]:
    """Return our weights under the names of the family, without their prefix if the model has no head.

    The head on span boundaries is left out, since it is used in training only and no architecture has it.
    """
    names = NAMES[family]
    if head == "ForSequenceClassification" and family in ("roberta", "electra"):
        names = CLASSIFIER_NAMES | names
    theirs = {}
    for name, w in weights.items():
        if name.startswith("cls.span_boundary."):
            continue
        if family == "modernbert" and ".attention.self." in name:
            if ".query." not in name:
                continue
            w = torch.cat(
                [weights[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            )
            name = name.replace(".attention.self.query.", ".attn.Wqkv.")
        name = rename(name, inverse(names))
        if head == "Model":
            name = name.removeprefix(PREFIXES[family])
        theirs[name] = w
    # In these families, files with an untied head have its bias under a second name too.
    untied = head != "Model" and "cls.predictions.decoder.weight" in weights
    if untied and family in ("bert", "roberta", "albert"):
        name = rename("cls.predictions.decoder.bias", inverse(names))
        theirs[name] = weights["cls.predictions.bias"].clone()
    return theirs
