"""Checkpoints as the ecosystem keeps them: a directory with config.json and model.safetensors.

The decoder families differ less than their names suggest. With Config's fields as the common language:

    GPT2LMHeadModel       LayerNorm, learned positions, GELU, biases; its own names of weights
    LlamaForCausalLM      RMSNorm, rotary positions, SwiGLU
    MistralForCausalLM    Llama with a sliding window
    Qwen2ForCausalLM      Llama with biases on queries, keys and values
    Qwen3ForCausalLM      Llama with QK-norm

The tables below translate config.json both ways. A key that would change what the model computes and that
is not in them is an error that names it: a checkpoint read half is a wrong model that looks like a right
one.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.atomic import replace_file

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
REQUIRED = {"n_layers", "n_heads", "d_model", "d_ff", "vocab_size", "max_seq_len"}
GPT2_CONFIG = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "norm_eps": 1e-5}

# What a key means when config.json leaves it out, where that is not Config's own default.
LLAMA_DEFAULTS = {"tie_embeddings": False, "norm_eps": 1e-6, "rope_theta": 10_000.0}
DEFAULTS = {
    "GPT2LMHeadModel": {**GPT2_CONFIG, "tie_embeddings": True},
    "LlamaForCausalLM": LLAMA_DEFAULTS,
    "MistralForCausalLM": {**LLAMA_DEFAULTS, "n_kv_heads": 8, "window": 4096},
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
# Keys with one value that we implement.
ONLY = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}
# Keys that do not change the logits: bookkeeping, initialisation, and dropout, which is off outside training.
INERT = {
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype",
    "dtype", "use_cache", "bos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "max_length", "is_llama_config",
    "transformers.js_config",
}  # fmt: skip


def read_decoder_config(directory: str | Path) -> dict:
    """The fields of `gpt.Config` for the decoder in directory; ValueError where no Config describes it."""
    path = Path(directory) / "config.json"
    hf = read_json(path)
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture not in DEFAULTS:
        raise ValueError(f"{path}: architecture {architecture!r}: expected one of {', '.join(DEFAULTS)}")
    gpt2 = architecture == "GPT2LMHeadModel"
    table = GPT2_FIELDS if gpt2 else LLAMA_FIELDS
    hf = flatten_rope(path, hf)
    if gpt2 and hf.get("n_inner") is None:
        hf["n_inner"] = 4 * (hf.get("n_embd") or 0)
    fields = read_fields(path, hf, table, DEFAULTS[architecture], ONLY, INERT | WINDOW_KEYS)
    return fields | _windows(path, hf, fields, architecture)


def read_fields(
    path: Path, hf: dict, table: dict, defaults: dict, only: dict, inert: set, required: set = REQUIRED
) -> dict:
    """defaults, and over them the fields that hf, the content of path, gives by table.

    Raises ValueError for a key that is in none of table, only and inert, and for a required field that has no
    value.
    """
    fields = dict(defaults)
    for key, value in hf.items():
        if key in table:
            if value is not None:
                fields[table[key]] = tuple(value) if isinstance(value, list) else value
        elif key in only:
            if value not in only[key]:
                raise ValueError(f"{path}: {key} {value!r} is not implemented; expected {only[key][0]!r}")
        elif key not in inert:
            raise ValueError(
                f"{path}: {key} {value!r} is not implemented; remove the key only if it has no effect"
            )
    missing = [key for key, field in table.items() if field in required - fields.keys()]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    return fields


WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def _windows(path: Path, hf: dict, fields: dict, architecture: str) -> dict:
    """The window and the layers without one, of which each family has its own spelling."""
    qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    window = hf.get("sliding_window", fields.get("window"))
    if window is None or (qwen and not hf.get("use_sliding_window", False)):
        return {"window": None}
    if not qwen and architecture != "MistralForCausalLM":
        return {"window": None}
    kinds = hf.get("layer_types")
    if kinds is None:  # Qwen: the first max_window_layers layers see everything
        n_full = hf.get("max_window_layers", 0) if qwen else 0
        kinds = ["full_attention"] * n_full + ["sliding_attention"] * (fields["n_layers"] - n_full)
    return window_fields(path, window, kinds)


def window_fields(path: Path, window: int, kinds: list[str]) -> dict:
    """The fields for layers of these kinds, as layer_types names them."""
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{path}: layer type {unknown.pop()!r} is not implemented; expected full or sliding_attention"
        )
    return {
        "window": window,
        "full_layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    }


def flatten_rope(path: Path, hf: dict) -> dict:
    """One spelling for both: rope_parameters (transformers 5), rope_theta and rope_scaling (4)."""
    hf = dict(hf)
    rope = {**(hf.pop("rope_scaling", None) or {}), **(hf.pop("rope_parameters", None) or {})}
    if "rope_theta" in rope:
        hf["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not implemented; expected 1.0")
    needed = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in needed:
        raise ValueError(f"{path}: rope_type {kind!r} is not implemented; expected {', '.join(needed)}")
    if kind != "default":
        if rope.keys() != needed[kind]:
            raise ValueError(
                f"{path}: rope_type {kind!r} with {sorted(rope)}: expected {sorted(needed[kind])}"
            )
        hf["rope_scaling"] = {"rope_type": kind, **rope}
    return hf


def decoder_config(config) -> dict:
    """config.json for a `gpt.Config`, spelled so that transformers 4 and 5 read it.

    Raises ValueError where no Hugging Face architecture has this combination of features.
    """
    modern = (config.norm, config.positions, config.mlp, config.bias) == ("rms", "rope", "swiglu", False)
    gpt2 = (config.norm, config.positions, config.mlp, config.bias) == ("layer", "learned", "gelu", True)
    plain = not config.qk_norm and not config.qkv_bias
    if gpt2 and plain and config.window is None and config.n_kv_heads == config.n_heads:
        architecture = "GPT2LMHeadModel"
    elif modern and config.qk_norm is True and not config.qkv_bias:
        architecture = "Qwen3ForCausalLM"
    elif (
        modern and config.qkv_bias and not config.qk_norm and config.d_head * config.n_heads == config.d_model
    ):
        architecture = "Qwen2ForCausalLM"
    elif modern and plain and config.window is not None and not config.full_layers:
        architecture = "MistralForCausalLM"
    elif modern and plain and config.window is None:
        architecture = "LlamaForCausalLM"
    else:
        architecture = None
    if architecture is None or config.logit_softcap is not None:
        raise ValueError(
            f"no Hugging Face architecture has these features together, so it cannot be saved: {config}"
        )
    hf = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "torch_dtype": "float32"}
    for key, field in (GPT2_FIELDS if gpt2 else LLAMA_FIELDS).items():
        hf[key] = getattr(config, field)
    hf["bos_token_id"] = None  # left out, transformers would put a token of its own there
    if gpt2:
        # What is generated from is what was trained: no dropout in either.
        hf |= {"activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        hf["n_ctx"] = config.max_seq_len  # the older name of n_positions, which llama.cpp and MLX read
        return hf
    hf |= {"hidden_act": "silu", "attention_bias": False}
    if architecture != "LlamaForCausalLM":
        hf["sliding_window"] = config.window
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        full = config.full_layers if config.window else range(config.n_layers)
        layers = range(config.n_layers)
        hf["use_sliding_window"] = config.window is not None
        hf["layer_types"] = ["full_attention" if i in full else "sliding_attention" for i in layers]
    if architecture == "Qwen2ForCausalLM":
        del hf["head_dim"], hf["attention_bias"]  # Qwen2 knows neither
    return hf


def load_decoder_weights(model: nn.Module, directory: str | Path) -> None:
    """Give model, built on the meta device, the weights in directory; ValueError unless all fit."""
    weights = read_weights(directory)
    if model.config.positions == "learned":
        weights = _from_gpt2(weights)
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}  # derived
    assign(model, weights, directory)


def save_decoder(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory, each replaced only once
    the new one is whole."""
    hf = decoder_config(model.config)
    weights = model.state_dict()
    if hf["model_type"] == "gpt2":
        weights = _to_gpt2(weights)
    write_decoder(directory, hf, weights)


def assign(model: nn.Module, weights: dict[str, Tensor], directory: str | Path) -> None:
    """Give model, built on the meta device, these weights from directory; ValueError unless all fit."""
    check_weights(model.state_dict(), weights, directory)
    model.load_state_dict(weights, assign=True)


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], directory: str | Path) -> None:
    """ValueError unless weights, from directory, have the names and shapes of expected."""
    for problem, names in (
        ("is missing", expected.keys() - weights.keys()),
        ("has no place in this architecture", weights.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{directory}: {min(names)} {problem} ({len(names)} such tensors)")
    for name, w in weights.items():
        if w.shape != expected[name].shape:
            shapes = f"{tuple(w.shape)}, config.json says {tuple(expected[name].shape)}"
            raise ValueError(f"{directory}: {name} has shape {shapes}")


def write_decoder(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """`write`, and generation_config.json beside it: text is drawn, and hf's eos_token_id ends it.

    Without that file transformers takes the likeliest token, and its server passes over the temperature that
    a client asks for; with it, a client still gets the likeliest by a temperature of 0, or do_sample=False.
    """
    write(directory, hf, weights)
    generation = {"do_sample": True, "eos_token_id": hf["eos_token_id"]}
    with replace_file(Path(directory) / "generation_config.json") as new:
        new.write_text(json.dumps(generation, indent=2) + "\n")


def write(directory: str | Path, hf: dict, weights: dict[str, Tensor]) -> None:
    """Write weights and hf, to which their dtype is added, to directory, each file replaced whole. ValueError
    for weights that are no floating-point numbers."""
    for name, w in weights.items():
        if not w.is_floating_point():
            raise ValueError(f"{name} is {w.dtype}: weights in 4 bits cannot be saved as a model")
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    hf["torch_dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / "model.safetensors") as new:
        save_file(weights, new, metadata={"format": "pt"})
    with replace_file(directory / "config.json") as new:
        new.write_text(json.dumps(hf, indent=2) + "\n")


GPT2_NAMES = {  # GPT-2: ours
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


def _from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's names to ours. Its matrices are stored (in, out); query, key and value are one matrix."""
    ours = {}
    for name, w in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old files carry the causal mask along
        if w.ndim == 2 and ".c_" in name:
            w = w.T
        for theirs, our in GPT2_NAMES.items():
            name = our + name[len(theirs) :] if name.startswith(theirs) else name.replace(theirs, our, 1)
        if ".attn.c_attn." in name:
            for part, piece in zip("qkv", w.chunk(3), strict=True):
                ours[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = piece.contiguous()
        else:
            ours[name] = w.contiguous()
    return ours


def _to_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = {}
    for name, w in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            w = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.c_attn.")
        for their, our in GPT2_NAMES.items():
            name = their + name[len(our) :] if name.startswith(our) else name.replace(our, their, 1)
        if w.ndim == 2 and ".c_" in name:
            w = w.T.contiguous()
        theirs[name if name == "lm_head.weight" else f"transformer.{name}"] = w
    return theirs


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file if there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a directory in Hugging Face layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (directory / files[0]).is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    weights = {}
    for file in files:
        path = directory / file
        if path.parent != directory or not path.is_file():
            raise ValueError(f"{path}: no such file; expected weights in safetensors format")
        try:
            with safe_open(path, framework="pt") as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None
    return weights
