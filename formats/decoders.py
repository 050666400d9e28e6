"""Hugging Face checkpoints of decoders: GPT-2, Llama, Mistral, Qwen2 and Qwen3.

The architectures differ in these parts, each of which is a field of `gpt.Config`:

    GPT2LMHeadModel       LayerNorm, learned positions, GELU, biases; other names of the weights
    LlamaForCausalLM      RMSNorm, rotary positions, SwiGLU
    MistralForCausalLM    Llama with a sliding window
    Qwen2ForCausalLM      Llama with biases on queries, keys and values
    Qwen3ForCausalLM      Llama with QK-norm

The tables below translate config.json to the fields of Config and back, see formats/config_json.py. The files
are read and written by formats/safetensors_dir.py.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.config_json import (
    INERT,
    checked,
    damage_named,
    flag,
    read_architecture,
    read_fields,
    whole_number,
)
from formats.json_file import read_json
from formats.safetensors_dir import (
    filled,
    inverse,
    read_weights,
    rename,
    split_qkv,
    tie,
    write_decoder,
)

LLAMA_FIELDS = {  # config.json: Config
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_embeddings",
    "eos_token_id": "eos_token_id",
}
GPT2_FIELDS = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "vocab_size": "vocab_size",
    "n_positions": "max_seq_len",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "eos_token_id": "eos_token_id",
}
GPT2_CONFIG = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "norm_eps": 1e-5}

# The fields that follow from the architecture, and the values of absent keys where Config's defaults differ.
LLAMA_DEFAULTS = {"tie_embeddings": False, "norm_eps": 1e-6, "rope_theta": 10_000.0}
DEFAULTS = {
    "GPT2LMHeadModel": {**GPT2_CONFIG, "tie_embeddings": True, "eos_token_id": 50256},
    "LlamaForCausalLM": {**LLAMA_DEFAULTS, "eos_token_id": 2},
    "MistralForCausalLM": {**LLAMA_DEFAULTS, "n_kv_heads": 8, "eos_token_id": 2},
    "Qwen2ForCausalLM": {**LLAMA_DEFAULTS, "qkv_bias": True},
    "Qwen3ForCausalLM": {**LLAMA_DEFAULTS, "qk_norm": True, "d_head": 128},
}
MODEL_TYPES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Keys of which only these values are implemented.
ONLY = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

# Keys that `read_window` reads.
WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}

# The needed and the optional settings of each kind of rope_scaling, see attention_variants/longer_context.py.
SCALINGS = {
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}  # fmt: skip

EMBEDDING_AND_HEAD = ("model.embed_tokens.weight", "lm_head.weight")
GPT2_NAMES = {  # GPT-2's names of weights: ours
    "wte.": "model.embed_tokens.",
    "wpe.": "model.embed_positions.",
    "h.": "model.layers.",
    "ln_f.": "model.norm.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}


def read_decoder_config(directory: str | Path) -> dict:
    """Return the fields of `gpt.Config` for the decoder in directory.

    Raises ValueError where no Config describes that decoder.
    """
    path, hf, architecture = read_architecture(directory, DEFAULTS)
    return decoder_fields(directory, path, hf, architecture)


def decoder_fields(directory: str | Path, path: Path, hf: dict, architecture: str) -> dict:
    """Return the fields of `gpt.Config` for hf, the content of the config.json at path, of this architecture.

    directory: of generation_config.json. Raises ValueError for what is missing, damaged or not implemented.
    """
    gpt2 = architecture == "GPT2LMHeadModel"
    table = GPT2_FIELDS if gpt2 else LLAMA_FIELDS
    with damage_named(path):
        hf = flatten_rope(path, hf)
        if gpt2 and hf.get("n_inner") is None:
            hf["n_inner"] = 4 * (hf.get("n_embd") or 0)
        inert = INERT | WINDOW_KEYS
        fields = read_fields(path, hf, table, DEFAULTS[architecture], ONLY, inert)
        fields |= read_window(path, hf, fields["n_layers"], architecture)
        return ordinary_widths(fields) | end_of_text(directory, fields)


def ordinary_widths(fields: dict) -> dict:
    """Return the fields with None for n_kv_heads and d_head where Config would derive the same values."""
    ordinary = {"n_kv_heads": fields["n_heads"], "d_head": fields["d_model"] // fields["n_heads"]}
    return fields | {name: None for name, value in ordinary.items() if fields.get(name) == value}


def read_window(path: Path, hf: dict, n_layers: int, architecture: str) -> dict:
    """Return the fields `window` and `full_layers`, which follow from other keys in each architecture.

    hf: the content of the config.json at path. Raises ValueError for keys that contradict each other.
    """
    qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    mistral = architecture == "MistralForCausalLM"
    kinds, window = hf.get("layer_types"), None
    if mistral or (qwen and flag(path, hf, "use_sliding_window")):
        window = whole_number(path, hf, "sliding_window", 4096, "window", least=1)
    if window is None:
        if (qwen or mistral) and "sliding_attention" in (kinds or ()):
            needed = "sliding_window, and in Qwen use_sliding_window true"
            raise ValueError(f"{path}: layer_types {kinds}: sliding_attention needs {needed}")
        return {"window": None}
    if kinds is None:  # in Qwen the first max_window_layers layers have no window
        n_full = whole_number(path, hf, "max_window_layers", 28) if qwen else 0
        kinds = ["full_attention" if i < n_full else "sliding_attention" for i in range(n_layers)]
    if mistral and "full_attention" in kinds:
        raise ValueError(f"{path}: layer_types {kinds}: all layers of a Mistral have its sliding_window")
    return window_fields(path, window, kinds, n_layers)


def window_fields(path: Path, window: int, kinds: list[str], n_layers: int) -> dict:
    """Return the fields `window` and `full_layers` for layers of these kinds (config.json's layer_types)."""
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{path}: layer_types {unknown.pop()!r} is not implemented; expected full_attention or "
            "sliding_attention"
        )
    if len(kinds) != n_layers:
        raise ValueError(f"{path}: layer_types has {len(kinds)} entries: expected {n_layers}, the layers")
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return {"window": window, "full_layers": full} if len(full) < n_layers else {"window": None}


def flatten_rope(path: Path, hf: dict) -> dict:
    """Return hf with rotary positions as the two keys rope_theta and rope_scaling.

    transformers 5 writes both into rope_parameters, transformers 4 writes them as here. Raises ValueError for
    a kind of scaling that is not implemented.
    """
    hf = dict(hf)
    scaling, parameters = hf.pop("rope_scaling", None), hf.pop("rope_parameters", None)
    rope = dict(scaling or parameters or {})
    if "rope_theta" in rope:
        hf["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not implemented; expected 1.0")

    # The other keys are settings of the scaling, and must be those of its kind. An optional one that is null
    # counts as absent.
    if kind not in ("default", *SCALINGS):
        expected = ", ".join(["default", *SCALINGS])
        raise ValueError(f"{path}: rope_type {kind!r} is not implemented; expected {expected}")
    if kind != "default":
        needed, optional = SCALINGS[kind]
        rope = {key: value for key, value in rope.items() if value is not None or key not in optional}
        if missing := needed - rope.keys():
            raise ValueError(f"{path}: {min(missing)} of rope_type {kind!r} is missing")
        if unknown := rope.keys() - needed - optional:
            expected = f"expected {sorted(needed | optional)}"
            raise ValueError(f"{path}: {min(unknown)} of rope_type {kind!r} is not implemented; {expected}")
        if not isinstance(rope.get("truncate", True), bool):
            raise ValueError(f"{path}: truncate {rope['truncate']!r:.100}: expected true or false")
        for key, value in rope.items():
            is_number = isinstance(value, float | int) and not isinstance(value, bool)
            if key != "truncate" and not (is_number and 0 < value < math.inf):
                raise ValueError(f"{path}: {key} {value!r:.100}: expected a number above 0")
        if kind == "yarn" and rope["factor"] < 1:
            raise ValueError(f"{path}: factor {rope['factor']} of rope_type 'yarn': expected at least 1")
        hf["rope_scaling"] = {"rope_type": kind, **rope}
    return hf


def end_of_text(directory: str | Path, fields: dict) -> dict:
    """Return the field `eos_token_id`: that of generation_config.json if it has one, else that of fields."""
    path = Path(directory) / "generation_config.json"
    if path.is_file() and "eos_token_id" in (generation := read_json(path)):
        fields = {"eos_token_id": checked(path, "eos_token_id", "eos_token_id", generation["eos_token_id"])}
    ids = fields.get("eos_token_id")
    for i in ids if isinstance(ids, tuple) else ():
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(f"{path}: eos_token_id {ids!r:.100}: expected whole numbers")
    return {"eos_token_id": ids}


def architecture_of(config) -> str:
    """Return the Hugging Face architecture of a `gpt.Config`.

    Raises ValueError where no architecture has this combination of features.
    """
    modern = (config.norm, config.positions, config.mlp, config.bias) == ("rms", "rope", "swiglu", False)
    gpt2 = (config.norm, config.positions, config.mlp, config.bias) == ("layer", "learned", "gelu", True)
    plain = not config.qk_norm and not config.qkv_bias
    all_heads = config.n_kv_heads in (None, config.n_heads)
    ordinary_heads = config.d_head is None or config.d_head * config.n_heads == config.d_model

    architecture = None
    if gpt2 and plain and config.window is None and all_heads:
        architecture = "GPT2LMHeadModel"
    elif modern and config.qk_norm is True and not config.qkv_bias:
        architecture = "Qwen3ForCausalLM"
    elif modern and config.qkv_bias and not config.qk_norm and ordinary_heads:
        architecture = "Qwen2ForCausalLM"
    elif modern and plain and config.window is not None and not config.full_layers:
        architecture = "MistralForCausalLM"
    elif modern and plain and config.window is None:
        architecture = "LlamaForCausalLM"
    if architecture is None or config.logit_softcap is not None:
        raise ValueError(
            f"no Hugging Face architecture has these features together, so it cannot be saved: {config}"
        )
    return architecture


def decoder_config(config) -> dict:
    """Return the content of config.json for a `gpt.Config`, spelled so that transformers 4 and 5 read it.

    Raises ValueError where no Hugging Face architecture has this combination of features.
    """
    architecture = architecture_of(config)
    gpt2 = architecture == "GPT2LMHeadModel"
    hf = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "torch_dtype": "float32"}

    # Fields that a Config may leave out are written with the values that follow from the others.
    fields = vars(config) | {
        "n_kv_heads": config.n_kv_heads or config.n_heads,
        "d_head": config.d_head or config.d_model // config.n_heads,
    }
    hf |= {key: fields[field] for key, field in (GPT2_FIELDS if gpt2 else LLAMA_FIELDS).items()}
    hf["bos_token_id"] = None  # without this key, transformers would use its own default

    if gpt2:
        # Our models have no dropout. Without its keys, transformers would use 0.1 in further training.
        hf |= {"activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        hf["n_ctx"] = config.max_seq_len  # the older name of n_positions, which llama.cpp and MLX read
        return hf

    # The window, and for Qwen also which layers have it.
    hf |= {"hidden_act": "silu", "attention_bias": False}
    if architecture != "LlamaForCausalLM":
        hf["sliding_window"] = config.window
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        full = config.full_layers if config.window else range(config.n_layers)
        layers = range(config.n_layers)
        hf["use_sliding_window"] = config.window is not None
        hf["layer_types"] = ["full_attention" if i in full else "sliding_attention" for i in layers]
    if architecture == "Qwen2ForCausalLM":
        del hf["head_dim"], hf["attention_bias"]  # Qwen2 does not have these keys
    return hf


def load_decoder(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `gpt.Config`.

    Raises ValueError unless the tensors are exactly those of the model.
    """
    fields, weights = read_decoder_config(directory), read_weights(directory)
    with damage_named(Path(directory)):
        weights = our_names(fields, weights)
    tie(fields, weights, *EMBEDDING_AND_HEAD)
    return filled(kind, config_kind, fields, weights, directory, kernels)


def our_names(fields: dict, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a decoder with these fields of `gpt.Config` under our names."""
    if fields.get("positions") == "learned":
        weights = from_gpt2(weights)
    return without_frequencies(weights)


def without_frequencies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the frequencies of rotary positions, which old files hold, too: they follow
    from config.json."""
    return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def save_decoder(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory.

    Each file is replaced only once the new one is complete.
    """
    hf = decoder_config(model.config)
    weights = model.state_dict()
    if hf["model_type"] == "gpt2":
        weights = to_gpt2(weights)
    write_decoder(directory, hf, weights)


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return GPT-2's weights under our names.

    GPT-2 stores its matrices as (in, out), and queries, keys and values as one matrix. Raises ValueError,
    which does not name the file, if that matrix cannot be divided by three.
    """
    ours = {}
    for name, w in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old files hold too
        if w.ndim == 2 and ".c_" in name:
            w = w.T
        name = rename(name, GPT2_NAMES)
        if ".attn.c_attn." in name:
            for part, piece in zip("qkv", split_qkv(name, w), strict=True):
                ours[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = piece
        else:
            ours[name] = w.contiguous()
    return ours


def to_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under GPT-2's names, in its layout: the inverse of `from_gpt2`."""
    theirs = {}
    for name, w in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            w = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.c_attn.")
        name = rename(name, inverse(GPT2_NAMES))
        if w.ndim == 2 and ".c_" in name:
            w = w.T.contiguous()
        theirs[name if name == "lm_head.weight" else f"transformer.{name}"] = w
    return theirs
