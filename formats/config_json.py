"""config.json: the settings of a model in Hugging Face's layout, translated into the fields of a Config.

Each family has a table {key of config.json: field of the Config}, and the values of keys that the file leaves
out. `read_fields` goes through all keys of a file. A key that is in no table might change what the model
computes, so it is an error that names it: a checkpoint that is read only in part gives a wrong model that
looks like a right one. Ignored are only the keys in INERT, and unknown keys whose value is null, false, {} or
[], because such a value switches nothing on.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.json_file import read_json

# The fields without which no Config of a transformer can be made.
REQUIRED = {"n_layers", "n_heads", "d_model", "d_ff", "vocab_size", "max_seq_len"}
# Fields whose values are not whole numbers, with the types of these values. "flag": see `flag`.
KINDS = {
    "norm_eps": (float, int), "rope_theta": (float, int), "rope_scaling": (dict,), "tie_embeddings": (bool,),
    "eos_token_id": (int, list), "aux_loss_coef": (float, int), "renormalize": (bool,),
    "routed_scale": (float, int), "flag": (bool,), "image_size": (int, list), "qkv_bias": (bool,),
    "positions": (str,), "mask_rate": (float, int), "norm_pix": (bool,), "query_scale": (float, int),
    "logit_softcap": (float, int), "attention_softcap": (float, int), "local_theta": (float, int),
    "softmax_alpha": (float, int), "softmax_beta": (float, int), "linear_alpha": (float, int),
    "linear_beta": (float, int), "mlp_alpha": (float, int), "mlp_beta": (float, int),
    "channels": (list,), "scaling_factor": (float, int), "shift_factor": (float, int), "quant_conv": (bool,),
    "post_quant_conv": (bool,), "attention": (bool,), "cos_first": (bool,),
    "dropout": (float, int),
}  # fmt: skip
MOST_LAYERS = 100_000  # more would take minutes to build, before the weights show that there are fewer
# Whole numbers that may be 0; "" stands for a key that is no field, see `whole_number`.
MAY_BE_ZERO = {"n_segments", "n_shared_experts", "pad_token_id", "start_token_id", "freq_shift", ""}
MAY_BE_ZERO |= {"padding", "dropout"}
# Fields that may be null, with the value that null means.
NULL = {
    "n_kv_heads": None, "d_head": None, "d_ff": None, "rope_scaling": None, "eos_token_id": None,
    "n_shared_experts": 0, "window": None, "pad_token_id": 0, "n_groups": 1, "top_groups": 1,
    "logit_softcap": None, "attention_softcap": None, "q_rank": None, "shift_factor": 0.0, "n_classes": 0,
}  # fmt: skip
# Keys that do not change the logits: bookkeeping, initialisation, dropout, which acts in training only, what
# is returned beside the logits, how `generate` draws, and marks that training programs leave behind.
INERT = {
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype",
    "dtype", "use_cache", "bos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "is_llama_config",
    "transformers.js_config", "n_special", "predict_special_tokens", "gradient_checkpointing", "output_past",
    "tokenizer_class", "use_bfloat16", "torchscript", "pruned_heads", "unsloth_fixed", "unsloth_version",
    "max_sequence_length", "finetuning_task", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "_commit_hash", "tf_legacy_loss", "prefix",
    "sep_token_id", "cls_token_id", "decoder_start_token_id", "cross_attention_hidden_size",
    "tie_encoder_decoder",
    # Of `generate`: transformers drops these from a config.json.
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "max_time", "penalty_alpha", "renormalize_logits", "force_words_ids",
    "constraints",
}  # fmt: skip


def read_config(directory: str | Path) -> tuple[Path, dict]:
    """Return the path of the config.json in directory, and its content. Raises ValueError as `read_json`."""
    path = Path(directory) / "config.json"
    return path, read_json(path)


def named_architecture(path: Path, hf: dict) -> str:
    """Return the first architecture that hf, the content of the config.json at path, names, else "none".

    Files of diffusers name one, as "_class_name"."""
    named = hf.get("architectures") or [hf.get("_class_name", "none")]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(f"{path}: architectures {named!r:.100}: expected a list of names")
    return named[0]


def read_architecture(directory: str | Path, known: Collection[str]) -> tuple[Path, dict, str]:
    """Return the path of the config.json in directory, its content, and the architecture that it names.

    Raises ValueError if that is not one of the known ones.
    """
    path, hf = read_config(directory)
    architecture = named_architecture(path, hf)
    if architecture not in known:
        expected = ("one of " if len(known) > 1 else "") + ", ".join(known)
        raise ValueError(f"{path}: architecture {architecture!r}: expected {expected}")
    return path, hf, architecture


def read_fields(
    path: Path,
    hf: dict,
    table: dict[str, str],
    defaults: dict,
    only: dict[str, tuple],
    inert: set[str],
    required: set[str] = REQUIRED,
) -> dict:
    """Return the fields of a Config that hf, the content of the config.json at path, describes.

    table:    {key of config.json: field of the Config}
    defaults: the fields that hold where config.json has no such key
    only:     {key: the values that are implemented}, of keys that are no field
    inert:    keys that do not change what the model computes

    Raises ValueError for any other key, unless its value switches nothing on; for a value of another type
    than its field has; and for a required field that has no value.
    """
    fields = dict(defaults)
    for key, value in hf.items():
        if key in table:
            fields[table[key]] = checked(path, key, table[key], value)
        elif key in only:
            if value not in only[key]:
                expected = " or ".join(map(repr, only[key]))
                raise ValueError(f"{path}: {key} {value!r:.200} is not implemented; expected {expected}")
        elif key not in inert and not (value is None or value is False or value == {} or value == []):
            raise ValueError(
                f"{path}: {key} {value!r:.200} is not implemented; remove the key only if it has no effect"
            )
    missing = [key for key, field in table.items() if field in required and fields.get(field) is None]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    return fields


def checked(path: Path, key: str, field: str, value: Any) -> Any:
    """Return the value of a key for the field of a Config: the meaning of null, and a tuple for a list.

    Raises ValueError for a value of another type than the field has, and for a number out of its range.
    """
    if value is None and field in NULL:
        return NULL[field]
    if value is None:
        raise ValueError(f"{path}: {key} missing (null)")
    kinds = KINDS.get(field, (int,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            dict: "an object",
            str: "a string",
            list: "a list",
        }
        raise ValueError(f"{path}: {key} {value!r:.100}: expected {names[kinds[0]]}")
    if kinds == (int,) and value < 1 and (value < 0 or field not in MAY_BE_ZERO):
        raise ValueError(f"{path}: {key} {value}: expected at least {int(field not in MAY_BE_ZERO)}")
    if field == "n_layers" and value > MOST_LAYERS:
        raise ValueError(f"{path}: {key} {value}: expected at most {MOST_LAYERS}")
    return tuple(value) if isinstance(value, list) else value


def whole_number(path: Path, hf: dict, key: str, default: int | None, field: str = "", least: int = 0) -> Any:
    """Return the whole number of a key that is in no table, or its default.

    field: the one whose rules `checked` applies. Raises ValueError for another value, and for one below
    `least`.
    """
    value = checked(path, key, field, hf.get(key, default))
    if value is not None and value < least:
        raise ValueError(f"{path}: {key} {value}: expected at least {least}")
    return value


def flag(path: Path, hf: dict, key: str) -> bool:
    """Return the truth value of a key that is in no table, False without that key. Raises ValueError for
    another value."""
    return checked(path, key, "flag", hf.get(key, False))


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn an error that values of the file at path cause, also in a Config, into a ValueError that begins
    with the path."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}") else f"{path}: {text}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        kind, text = type(error).__name__, str(error).partition("\n")[0]
        raise ValueError(f"{path}: a value is of a wrong kind or size ({kind}: {text})") from None
