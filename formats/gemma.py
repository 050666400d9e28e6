"""Hugging Face checkpoints of Gemma 2 and Gemma 3, the language models alone.

    Gemma2ForCausalLM    soft-caps of scores and logits; every other layer has a window
    Gemma3ForCausalLM    QK-norm; every sixth layer has no window; two bases of rotary positions, one for the
                         layers without a window (global) and one for those with a window (local)

Our names of weights are those in the files. The published Gemma 3 from 4 billion parameters on also reads
images: that is another architecture, Gemma3ForConditionalGeneration, which is not implemented.
"""

from pathlib import Path

from torch import nn

from formats.config_json import INERT, damage_named, read_architecture, read_fields, whole_number
from formats.decoders import (
    EMBEDDING_AND_HEAD,
    LLAMA_FIELDS,
    end_of_text,
    flatten_rope,
    ordinary_widths,
    window_fields,
    without_frequencies,
)
from formats.safetensors_dir import filled, read_weights, tie, write_decoder

CONCEPT = "attention_variants.local_global"
FIELDS = LLAMA_FIELDS | {  # config.json: Config
    "query_pre_attn_scalar": "query_scale",
    "final_logit_softcapping": "logit_softcap",
}
GEMMA2_FIELDS = FIELDS | {"attn_logit_softcapping": "attention_softcap"}
GEMMA3_FIELDS = FIELDS | {"rope_local_base_freq": "local_theta"}
TABLES = {"Gemma2ForCausalLM": GEMMA2_FIELDS, "Gemma3ForCausalLM": GEMMA3_FIELDS}
MODEL_TYPES = {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"}
ARCHITECTURES = tuple(TABLES)
# The fields that follow from the architecture, and the values of keys that config.json leaves out.
COMMON = {
    "n_kv_heads": 4, "d_head": 256, "norm_eps": 1e-6, "query_scale": 256.0, "tie_embeddings": True,
    "eos_token_id": 1,
}  # fmt: skip
DEFAULTS = {
    "Gemma2ForCausalLM": {
        **COMMON, "rope_theta": 10_000.0, "attention_softcap": 50.0, "logit_softcap": 30.0,
    },
    "Gemma3ForCausalLM": {
        **COMMON, "qk_norm": True, "rope_theta": 1_000_000.0, "local_theta": 10_000.0,
    },
}  # fmt: skip
ONLY = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "is_causal": (True,),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
}
# Three keys that transformers does not read (the first files have hidden_act as "gelu"), and those that
# `read_windows` reads.
INERT_KEYS = INERT | {
    "hidden_act", "cache_implementation", "sliding_window_size",
    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "layer_types",
}  # fmt: skip


def read_fields_of(directory: str | Path) -> dict:
    """Return the fields of `local_global.Config` for the model in directory.

    Raises ValueError for an architecture or a key that is not implemented, and for missing keys.
    """
    path, hf, architecture = read_architecture(directory, TABLES)
    is_gemma2 = architecture == "Gemma2ForCausalLM"
    with damage_named(path):
        hf = flatten_rope(path, hf) if is_gemma2 else two_ropes(path, hf)
        only = ONLY if is_gemma2 else ONLY | {"attn_logit_softcapping": (None,)}
        fields = read_fields(path, hf, TABLES[architecture], DEFAULTS[architecture], only, INERT_KEYS)
        fields |= read_windows(path, hf, fields["n_layers"], 2 if is_gemma2 else 6)

        # A value that the Config derives from other fields if it is None becomes None.
        if fields["query_scale"] == (fields["d_head"] or fields["d_model"] // fields["n_heads"]):
            fields["query_scale"] = None
        if fields.get("local_theta") == fields["rope_theta"] and not fields.get("rope_scaling"):
            fields["local_theta"] = None
        return ordinary_widths(fields) | end_of_text(directory, fields)


def two_ropes(path: Path, hf: dict) -> dict:
    """Return hf, the content of the config.json at path, with rotary positions as transformers 4 writes them.

    These are rope_theta and rope_scaling of the layers without a window, and rope_local_base_freq, the base
    of those with a window. transformers 5 writes a dict for each kind of layer instead.
    """
    hf = dict(hf)
    by_kind = hf.pop("rope_parameters", None) or {}
    if unknown := by_kind.keys() - {"full_attention", "sliding_attention"}:
        expected = "full_attention and sliding_attention"
        raise ValueError(f"{path}: rope_parameters {min(unknown)!r}: expected {expected}")
    if of_global := by_kind.get("full_attention"):
        hf["rope_parameters"] = of_global
    hf = flatten_rope(path, hf)
    if of_local := by_kind.get("sliding_attention"):
        local = flatten_rope(path, {"rope_parameters": of_local})
        if "rope_scaling" in local:
            raise ValueError(f"{path}: rope_type of sliding_attention is not implemented; expected 'default'")
        hf |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    return hf


def read_windows(path: Path, hf: dict, n_layers: int, default: int) -> dict:
    """Return the fields `window` and `full_layers`.

    default: the pattern where hf has none. With pattern n, each n-th layer has no window.
    """
    window = whole_number(path, hf, "sliding_window", 4096, "window", least=1)
    key = "sliding_window_pattern" if "sliding_window_pattern" in hf else "_sliding_window_pattern"
    pattern = whole_number(path, hf, key, default, least=1)
    names = ("full_attention", "sliding_attention")
    kinds = hf.get("layer_types") or [names[(i + 1) % pattern > 0] for i in range(n_layers)]
    if window is None and "sliding_attention" in kinds:
        raise ValueError(f"{path}: sliding_window null: expected a number, as layer_types have windows")
    return window_fields(path, window, kinds, n_layers) if window else {"window": None}


def hf_config(config) -> dict:
    """Return the content of config.json for a `local_global.Config`, spelled so that transformers 4 and 5
    read it. Raises ValueError where neither architecture has this combination of features."""
    is_gemma3 = bool(config.qk_norm)
    if is_gemma3 and config.attention_softcap is not None:
        raise ValueError(f"attention_softcap {config.attention_softcap}: Gemma 3, with qk_norm, has none")
    if not is_gemma3 and config.local_theta is not None:
        raise ValueError(f"local_theta {config.local_theta}: Gemma 2, without qk_norm, has one base")
    if is_gemma3 and config.rope_scaling and config.local_theta is None:
        raise ValueError("rope_scaling without local_theta: in Gemma 3 it is of the global layers alone")

    # Fields that are None in the Config are written with the values that follow from the others.
    architecture = "Gemma3ForCausalLM" if is_gemma3 else "Gemma2ForCausalLM"
    fields = vars(config) | {"n_kv_heads": config.G, "d_head": config.K}
    scale = config.query_scale or config.K
    fields["query_scale"] = int(scale) if scale == int(scale) else scale
    fields["local_theta"] = config.local_theta or config.rope_theta
    hf = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "torch_dtype": "float32"}
    hf |= {key: fields[field] for key, field in TABLES[architecture].items()}

    # The kind of each layer, and keys without which transformers would use its own defaults.
    full = config.full_layers if config.window else range(config.n_layers)
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(config.n_layers)]
    hf |= {"layer_types": kinds, "sliding_window": config.window or config.max_seq_len}
    hf |= {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
    return hf | {"bos_token_id": None, "pad_token_id": None}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `local_global.Config`.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    fields, weights = read_fields_of(directory), read_weights(directory)
    weights = without_frequencies(weights)
    tie(fields, weights, *EMBEDDING_AND_HEAD)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory, each replaced only once
    the new one is complete."""
    write_decoder(directory, hf_config(model.config), model.state_dict())
