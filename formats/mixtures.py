"""Mixtures of experts in Hugging Face's layout; formats/decoders.py has the dense decoders.

    MixtralForCausalLM      Mistral with experts: softmax router, a token's weights add up to 1; other names
    OlmoeForCausalLM        Llama with one QK-norm over all heads
    Qwen3MoeForCausalLM     Qwen3; any layers may be dense
    Dots1ForCausalLM        Qwen3 with DeepSeek-V3's sigmoid router and shared experts; the first layers dense
    DeepseekForCausalLM     Llama with shared experts (DeepSeekMoE); the first layers dense

A file has one matrix per expert, the model one tensor for all experts of a layer:

    in the file      mlp.experts.{e}.gate_proj.weight, .up_proj.weight (F, D), .down_proj.weight (D, F)
    Mixtral's        block_sparse_moe.experts.{e}.w1.weight, .w3.weight, .w2.weight
    stacked          mlp.experts.gate_up_proj (E, 2 F, D), .down_proj (E, D, F), as transformers 5 can write
    in the model     the same with .weight at the end, because each stack is a module

A model that is saved and loaded computes the same. Of the settings of training, config.json has the
coefficient of one balance loss; capacity factor, z-loss and the step of the bias have no place there.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from formats import config_json, decoders, safetensors_dir
from formats.config_json import checked, damage_named, flag, named_architecture, read_fields, whole_number
from formats.decoders import LLAMA_FIELDS
from formats.safetensors_dir import rename

FIELDS = {**LLAMA_FIELDS, "num_experts_per_tok": "top_k"}  # config.json: Config
QWEN3_FIELDS = {
    **FIELDS,
    "num_experts": "n_experts",
    "moe_intermediate_size": "d_expert",
    "norm_topk_prob": "renormalize",
    "router_aux_loss_coef": "aux_loss_coef",
}
DEEPSEEK_FIELDS = {
    **FIELDS,
    "n_routed_experts": "n_experts",
    "n_shared_experts": "n_shared_experts",
    "moe_intermediate_size": "d_expert",
    "norm_topk_prob": "renormalize",
}
TABLES = {
    "MixtralForCausalLM": {
        **FIELDS,
        "num_local_experts": "n_experts",
        "router_aux_loss_coef": "aux_loss_coef",
    },
    "OlmoeForCausalLM": {
        key: field for key, field in QWEN3_FIELDS.items() if field not in ("d_expert", "d_head")
    },
    "Qwen3MoeForCausalLM": QWEN3_FIELDS,
    "Dots1ForCausalLM": {
        **DEEPSEEK_FIELDS,
        "n_group": "n_groups",
        "topk_group": "top_groups",
        "routed_scaling_factor": "routed_scale",
    },
    "DeepseekForCausalLM": {key: field for key, field in DEEPSEEK_FIELDS.items() if field != "d_head"},
}
# The number of experts; transformers accepts each of these keys for each architecture.
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
REQUIRED = config_json.REQUIRED | {"n_experts", "top_k", "d_expert"}

# The fields that follow from the architecture, and the values of keys that config.json leaves out.
SOFTMAX = {**decoders.LLAMA_DEFAULTS, "router": "softmax", "renormalize": False}
DEFAULTS = {
    "MixtralForCausalLM": {
        **SOFTMAX, "renormalize": True, "n_experts": 8, "top_k": 2, "n_kv_heads": 8, "norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "aux_loss_coef": 0.001, "eos_token_id": 2,
    },
    "OlmoeForCausalLM": {
        **SOFTMAX, "qk_norm": "all", "n_experts": 64, "top_k": 8, "norm_eps": 1e-5, "aux_loss_coef": 0.01,
        "eos_token_id": 50279,
    },
    "Qwen3MoeForCausalLM": {
        **SOFTMAX, "qk_norm": True, "n_experts": 128, "top_k": 8, "d_expert": 768, "n_kv_heads": 4,
        "aux_loss_coef": 0.001,
    },
    "Dots1ForCausalLM": {
        **SOFTMAX, "router": "sigmoid", "qk_norm": True, "d_expert": 1408, "n_kv_heads": 32,
        "bias_update_rate": 0.001,  # DeepSeek-V3 (Liu et al. 2024, section 4.2); config.json does not say
    },
    "DeepseekForCausalLM": SOFTMAX,
}  # fmt: skip
MODEL_TYPES = {
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Dots1ForCausalLM": "dots1",
    "DeepseekForCausalLM": "deepseek",
}
LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")  # see formats/deepseek.py
# Keys of which only these values are implemented.
ONLY = decoders.ONLY | {"clip_qkv": (None,), "moe_layer_freq": (1,)}
ONLY_HERE = {
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {"sliding_window": (None,)},
    "Qwen3MoeForCausalLM": {},
    # Published files have the name of the method under both keys.
    "Dots1ForCausalLM": {"scoring_func": ("sigmoid", "noaux_tc"), "topk_method": ("noaux_tc",)},
    "DeepseekForCausalLM": {
        "scoring_func": ("softmax",), "topk_method": ("greedy",), "sliding_window": (None,),
    },
}  # fmt: skip
# Keys that do not change the logits; the jitter, like dropout, is off outside training.
INERT = config_json.INERT | {"output_router_logits", "router_jitter_noise", "auto_map", "ep_size"}
# Keys that `dense_layers`, `windows` and `balance` read, and Dots1's use_sliding_window, which has no effect.
READ_BELOW = {
    "MixtralForCausalLM": {"sliding_window"},
    "OlmoeForCausalLM": set(),
    "Qwen3MoeForCausalLM": {
        "mlp_only_layers", "decoder_sparse_step", "sliding_window", "use_sliding_window", "max_window_layers",
    },
    "Dots1ForCausalLM": {
        "first_k_dense_replace", "sliding_window", "max_window_layers", "layer_types", "use_sliding_window",
        "aux_loss_alpha", "seq_aux",
    },
    "DeepseekForCausalLM": {"first_k_dense_replace", "aux_loss_alpha", "seq_aux"},
}  # fmt: skip


def read_config(directory: str | Path) -> dict:
    """Return the fields of `moe.Config` for the mixture in directory.

    Raises ValueError for an architecture or a key that is not implemented, and for missing keys.
    """
    path, hf = config_json.read_config(directory)
    architecture = named_architecture(path, hf)
    if architecture in LATENT:
        raise ValueError(
            f"{path}: architecture {architecture!r} has multi-head latent attention; open it by python -m "
            f"attention_variants.deepseek {directory}"
        )
    if architecture in decoders.DEFAULTS:
        raise ValueError(
            f"{path}: architecture {architecture!r} is dense; make a mixture of experts of it: python -m "
            f"language.upcycle {directory} --experts 8 --out DIR"
        )
    if architecture not in TABLES:
        raise ValueError(f"{path}: architecture {architecture!r}: expected one of {', '.join(TABLES)}")

    with damage_named(path):
        fields = read_keys(path, hf, architecture)
        return decoders.ordinary_widths(fields) | decoders.end_of_text(directory, fields)


def read_keys(path: Path, hf: dict, architecture: str) -> dict:
    """Return the fields of `moe.Config` from hf, the content of the config.json at path."""
    # Give keys that transformers spells in several ways one spelling.
    table = TABLES[architecture]
    hf = decoders.flatten_rope(path, hf)
    experts_key = next(key for key, field in table.items() if field == "n_experts")
    hf = {experts_key if key in EXPERTS_KEYS else key: value for key, value in hf.items()}

    # Fields with a key of their own, then those that follow from several keys.
    only = ONLY | ONLY_HERE[architecture]
    inert = INERT | READ_BELOW[architecture]
    fields = read_fields(path, hf, table, DEFAULTS[architecture], only, inert, REQUIRED)
    # DeepSeek's code renormalises only several weights.
    if architecture == "DeepseekForCausalLM" and fields["top_k"] == 1:
        fields["renormalize"] = False
    fields["dense_layers"] = dense_layers(path, hf, fields["n_layers"])
    fields |= windows(path, hf, fields["n_layers"], architecture)
    fields |= balance(path, hf, fields, architecture)
    if fields.get("d_expert") == fields["d_ff"]:
        fields["d_expert"] = None
    return fields


def dense_layers(path: Path, hf: dict, n_layers: int) -> tuple[int, ...]:
    """Return the layers without experts: those of a list, all but every so many, or the first (DeepSeek)."""
    only = hf.get("mlp_only_layers") or ()
    step = whole_number(path, hf, "decoder_sparse_step", 1, least=1)
    first = whole_number(path, hf, "first_k_dense_replace", 0)
    return tuple(i for i in range(n_layers) if i in only or (i + 1) % step or i < first)


def windows(path: Path, hf: dict, n_layers: int, architecture: str) -> dict:
    """Return the fields `window` and `full_layers`; the latter are the layers without a window."""
    if architecture == "MixtralForCausalLM":
        return {"window": whole_number(path, hf, "sliding_window", None, "window", least=1)}
    window = whole_number(path, hf, "sliding_window", 4096, "window", least=1)
    if architecture == "Qwen3MoeForCausalLM" and flag(path, hf, "use_sliding_window") and window is not None:
        # Versions of transformers differ in whether the first max_window_layers have a window.
        if hf.get("max_window_layers"):
            raise ValueError(
                f"{path}: max_window_layers {hf['max_window_layers']} with use_sliding_window is not "
                "implemented; expected 0"
            )
        return {"window": window}
    if architecture == "Dots1ForCausalLM" and window is not None:
        kinds = hf.get("layer_types")
        if kinds is None:
            n_full = whole_number(path, hf, "max_window_layers", 62)
            kinds = ["full_attention" if i < n_full else "sliding_attention" for i in range(n_layers)]
        return decoders.window_fields(path, window, kinds, n_layers)
    return {"window": None}


def balance(path: Path, hf: dict, fields: dict, architecture: str) -> dict:
    """Return the coefficients of the balance losses: DeepSeek has one, and seq_aux names the loss it is of.

    DeepSeek's code adds up the losses of the layers, ours takes the mean.
    """
    if architecture not in ("Dots1ForCausalLM", "DeepseekForCausalLM"):
        return {}
    default = 0.0001 if architecture == "Dots1ForCausalLM" else 0.001
    alpha = checked(path, "aux_loss_alpha", "aux_loss_coef", hf.get("aux_loss_alpha", default))
    alpha *= fields["n_layers"] - len(fields["dense_layers"])
    if flag(path, {"seq_aux": True} | hf, "seq_aux"):
        return {"aux_loss_coef": 0.0, "sequence_loss_coef": alpha}
    # With an even load the loss of DeepSeek's code is 1, and that of moe.py is top_k.
    return {"aux_loss_coef": alpha / fields["top_k"]}


def architecture_of(config) -> str:
    """Return the Hugging Face architecture of a `moe.Config`.

    Raises ValueError where none has this combination of features.
    """
    # The features that tell the architectures apart.
    modern = (config.norm, config.positions, config.mlp, config.bias) == ("rms", "rope", "swiglu", False)
    modern = modern and not config.qkv_bias and config.logit_softcap is None
    softmax = modern and config.router in ("softmax", "switch") and config.routed_scale == 1.0
    softmax = softmax and config.n_groups == 1
    sigmoid = modern and config.router == "sigmoid"
    norm, unshared = config.qk_norm, config.n_shared_experts == 0
    all_sparse = not config.dense_layers
    dense_first = sorted(config.dense_layers) == list(range(len(config.dense_layers)))
    no_window = config.window is None
    one_window = no_window or not config.full_layers
    # Some architectures have no head_dim in config.json.
    whole_heads = config.K * config.n_heads == config.d_model
    # DeepSeek's code does not renormalise the weight of a single expert.
    agreed = config.top_k > 1 or not config.renormalize

    if softmax and norm is True and unshared and one_window:
        return "Qwen3MoeForCausalLM"
    if softmax and norm == "all" and unshared and all_sparse and no_window and whole_heads:
        return "OlmoeForCausalLM"
    if softmax and not norm and unshared and all_sparse and one_window and config.renormalize:
        return "MixtralForCausalLM"
    if softmax and not norm and dense_first and no_window and whole_heads and agreed:
        return "DeepseekForCausalLM"
    if sigmoid and norm is True and dense_first:
        return "Dots1ForCausalLM"

    decisive = ("router", "renormalize", "routed_scale", "qk_norm", "n_shared_experts", "dense_layers")
    decisive += (
        "n_groups",
        "window",
        "full_layers",
        "qkv_bias",
        "logit_softcap",
        "norm",
        "positions",
        "d_head",
    )
    values = ", ".join(f"{field} {getattr(config, field)!r}" for field in decisive)
    raise ValueError(
        f"no Hugging Face architecture has these features together, so it cannot be saved: {values}; shared "
        "experts come with router 'sigmoid' and qk_norm True, or with 'softmax' and False; a routed_scale "
        "other than 1.0 with 'sigmoid' alone"
    )


def moe_config(config) -> dict:
    """Return the content of config.json for a `moe.Config`, spelled so that transformers 4 and 5 read it.

    Raises ValueError where no Hugging Face architecture has this combination of features.
    """
    architecture = architecture_of(config)
    hf = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "torch_dtype": "float32"}

    # Fields that a Config may leave out are written with the values that follow from the others.
    fields = vars(config) | {"n_kv_heads": config.G, "d_head": config.K, "d_expert": config.F}
    hf |= {key: fields[field] for key, field in TABLES[architecture].items()}
    # Without these keys, transformers would use its own default tokens.
    hf |= {"hidden_act": "silu", "bos_token_id": None, "pad_token_id": None}
    if architecture != "MixtralForCausalLM":
        hf["attention_bias"] = False
    if architecture in ("MixtralForCausalLM", "OlmoeForCausalLM"):
        hf["intermediate_size"] = config.F

    # Windows, dense layers and balance losses, for which each family has its own keys.
    if architecture == "MixtralForCausalLM":
        hf["sliding_window"] = config.window
    if architecture == "Qwen3MoeForCausalLM":
        hf |= {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
        hf |= {"use_sliding_window": config.window is not None, "sliding_window": config.window}
    if architecture in ("Dots1ForCausalLM", "DeepseekForCausalLM"):
        hf |= {"first_k_dense_replace": len(config.dense_layers), "moe_layer_freq": 1}
        by_sequence = bool(config.sequence_loss_coef or not config.aux_loss_coef)
        coefficient = config.sequence_loss_coef if by_sequence else config.aux_loss_coef * config.top_k
        hf |= {"seq_aux": by_sequence, "aux_loss_alpha": coefficient / config.n_sparse_layers}
    if architecture == "DeepseekForCausalLM":
        hf |= {"scoring_func": "softmax", "n_shared_experts": config.n_shared_experts or None}
    if architecture == "Dots1ForCausalLM":
        full = config.full_layers if config.window else range(config.n_layers)
        layers = range(config.n_layers)
        hf |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "sliding_window": config.window}
        hf["layer_types"] = ["full_attention" if i in full else "sliding_attention" for i in layers]
    return hf


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `moe.Config`.

    Raises ValueError for tensors that are missing, unknown, or of another shape.
    """
    fields = read_config(directory)
    path, hf = config_json.read_config(directory)
    mixtral = named_architecture(path, hf) == "MixtralForCausalLM"
    # transformers 5 can also write one tensor for all experts of a layer: split it into those of the experts.
    with damage_named(Path(directory)):
        stored = split_experts(safetensors_dir.read_weights(directory), mixtral)
    safetensors_dir.tie(fields, stored, *decoders.EMBEDDING_AND_HEAD)

    # Leave out tensors that the model does not have.
    for name in list(stored):
        empty = ".shared_experts." in name and stored[name].numel() == 0  # see `save`
        if empty or name.endswith("rotary_emb.inv_freq"):
            del stored[name]

    return filled(lambda: kind(config_kind(**fields, kernels=kernels)), fields, stored, directory, mixtral)


def filled(
    make: Callable[[], nn.Module],
    fields: dict,
    stored: dict[str, Tensor],
    directory: str | Path,
    mixtral: bool = False,
) -> nn.Module:
    """Return make() with exactly the stored weights, read from directory: one matrix for each expert.

    fields: those of the Config. mixtral: the names are Mixtral's. Raises ValueError as safetensors_dir.filled
    does.
    """
    model = safetensors_dir.build(make, fields, stored, directory)
    expected = model.state_dict()
    safetensors_dir.check_weights(split_experts(expected, mixtral), stored, directory)
    matrices = {name: w for name, w in stored.items() if not name.endswith(BIAS)}
    stored.update(safetensors_dir.in_one_dtype(matrices))
    model.load_state_dict(stack_experts(stored, expected, mixtral), assign=True)
    return model


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory.

    Each file is replaced only once the new one is complete.
    """
    hf = moe_config(model.config)
    weights = split_experts(model.state_dict(), hf["model_type"] == "mixtral")

    # Dots1 always has shared experts in transformers: write them with a width of zero.
    if hf["model_type"] == "dots1" and not model.config.n_shared_experts:
        for name, w in list(weights.items()):
            if name.endswith(".mlp.gate.weight"):
                shared = name.replace(".gate.weight", ".shared_experts.")
                D = w.shape[1]
                for part, shape in (("gate", (0, D)), ("up", (0, D)), ("down", (D, 0))):
                    weights[f"{shared}{part}_proj.weight"] = w.new_empty(shape)
    safetensors_dir.write_decoder(directory, hf, weights)


BIAS = "e_score_correction_bias"  # end of the names of the routers' biases
MIXTRAL_NAMES = {  # ours: Mixtral's
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.weight": ".w1.weight",
    ".up_proj.weight": ".w3.weight",
    ".down_proj.weight": ".w2.weight",
}


def split_experts(weights: dict[str, Tensor], mixtral: bool = False) -> dict[str, Tensor]:
    """Return weights under the names in a file: for each stack, views of the matrices of its experts."""
    theirs = {}
    for name, w in weights.items():
        stack, _, part = name.removesuffix(".weight").rpartition(".")
        stacked = stack.endswith(".experts")
        if stacked and part == "gate_up_proj":  # (E, 2 F, D)
            pieces = {}
            for e in range(len(w)):
                pieces[f"{stack}.{e}.gate_proj.weight"], pieces[f"{stack}.{e}.up_proj.weight"] = w[e].chunk(2)
        elif stacked and part == "down_proj":  # (E, D, F)
            pieces = {f"{stack}.{e}.down_proj.weight": w[e] for e in range(len(w))}
        else:
            pieces = {name: w}
        for piece, matrix in pieces.items():
            theirs[rename(piece, MIXTRAL_NAMES) if mixtral else piece] = matrix
    return theirs


def stack_experts(
    stored: dict[str, Tensor], expected: dict[str, Tensor], mixtral: bool = False
) -> dict[str, Tensor]:
    """Return the weights of a file, which `filled` has checked, with the names and shapes in expected.

    They are removed from `stored` one by one, so that memory holds one stack twice at most.
    """
    weights = {}
    for name, like in expected.items():
        pieces = list(split_experts({name: like}, mixtral))
        if name.endswith((".experts.gate_up_proj.weight", ".experts.down_proj.weight")):
            weights[name] = torch.empty(like.shape, dtype=stored[pieces[0]].dtype)
            for piece, view in split_experts({name: weights[name]}, mixtral).items():
                view.copy_(stored.pop(piece))
        else:
            weights[name] = stored.pop(pieces[0])
        # The bias stays in float32: its steps are too small for bfloat16.
        if name.endswith(BIAS):
            weights[name] = weights[name].float()
    return weights
