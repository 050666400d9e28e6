"""Hugging Face checkpoints of DeepSeek-V2 and V3: latent attention, with or without experts.

    DeepseekV2ForCausalLM    softmax router, top-k of all experts (V2-Lite) or of the best groups
    DeepseekV3ForCausalLM    sigmoid router with a bias, top-k of the best groups

A model whose layers are all dense, by first_k_dense_replace, is read by attention_variants/latent.py, any
other by attention_variants/deepseek.py. Experts are stored as in formats/mixtures.py. The published V3 has
one more layer after the last, which predicts the token after the next; it is left out.
"""

from pathlib import Path

from torch import Tensor, nn

from formats import config_json, decoders, mixtures, safetensors_dir
from formats.config_json import (
    damage_named,
    named_architecture,
    read_architecture,
    read_config,
    read_fields,
    whole_number,
)

DENSE, SPARSE = "attention_variants.latent", "attention_variants.deepseek"  # the concept files
ATTENTION = {  # config.json: Config
    "kv_lora_rank": "kv_rank",
    "q_lora_rank": "q_rank",
    "qk_nope_head_dim": "d_nope",
    "qk_rope_head_dim": "d_rope",
    "v_head_dim": "d_value",
}
LLAMA = {key: field for key, field in decoders.LLAMA_FIELDS.items() if field != "d_head"}
EXPERTS = {
    **{key: field for key, field in mixtures.DEEPSEEK_FIELDS.items() if key not in decoders.LLAMA_FIELDS},
    "n_group": "n_groups",
    "topk_group": "top_groups",
    "routed_scaling_factor": "routed_scale",
}
FIELDS = LLAMA | ATTENTION | EXPERTS
ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
MODEL_TYPES = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}
# The fields that follow from the architecture, and the values of keys that config.json leaves out.
COMMON = {
    **decoders.LLAMA_DEFAULTS, "kv_rank": 512, "q_rank": 1536, "d_nope": 128, "d_rope": 64, "d_value": 128,
}  # fmt: skip
DEFAULTS = {
    "DeepseekV2ForCausalLM": {
        **COMMON, "router": "softmax", "renormalize": False, "n_experts": 64, "n_shared_experts": 2,
        "d_expert": 1407, "eos_token_id": 2,
    },
    "DeepseekV3ForCausalLM": {
        **COMMON, "router": "sigmoid", "renormalize": True, "n_experts": 256, "n_shared_experts": 1,
        "top_k": 8, "d_expert": 2048, "n_groups": 8, "top_groups": 4, "routed_scale": 2.5, "n_kv_heads": 128,
        "bias_update_rate": 0.001,  # DeepSeek-V3 (Liu et al. 2024, section 4.2); config.json does not say
        "eos_token_id": 1,
    },
}  # fmt: skip
# The other name of n_routed_experts in transformers.
ALIAS = {"DeepseekV2ForCausalLM": "num_experts", "DeepseekV3ForCausalLM": "num_local_experts"}
FIRST_DENSE = {"DeepseekV2ForCausalLM": 0, "DeepseekV3ForCausalLM": 3}
# topk_method of V2: whether the experts are chosen from the best groups only.
METHODS = {"greedy": False, "group_limited_greedy": True}
# Keys of which only these values are implemented.
ONLY = {key: values for key, values in decoders.ONLY.items() if key != "rope_interleaved"} | {
    "moe_layer_freq": (1,), "num_attention_layers": (None,),
}  # fmt: skip
ONLY_HERE = {
    "DeepseekV2ForCausalLM": {"norm_topk_prob": (False, None), "scoring_func": ("softmax",)},
    "DeepseekV3ForCausalLM": {
        "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "rope_interleave": (True,),
    },
}  # fmt: skip
# Keys that do not change the logits, and those that functions below read. head_dim follows from other keys.
INERT = mixtures.INERT | {
    "head_dim", "qk_head_dim", "first_k_dense_replace", "aux_loss_alpha", "seq_aux", "topk_method",
    "num_nextn_predict_layers", "num_mtp_layers",
}  # fmt: skip


def concept_of(path: Path, hf: dict) -> str:
    """Return the concept file that reads the model of hf, the content of the config.json at path."""
    with damage_named(path):
        n_layers = whole_number(path, hf, "num_hidden_layers", 1)
        return DENSE if first_dense(path, hf) >= n_layers else SPARSE


def first_dense(path: Path, hf: dict) -> int:
    """Return the number of layers without experts, which are the first ones."""
    default = FIRST_DENSE[named_architecture(path, hf)]
    return whole_number(path, hf, "first_k_dense_replace", default)


def read_fields_of(directory: str | Path) -> dict:
    """Return the fields of `latent.Config` or `deepseek.Config` for the model in directory.

    Raises ValueError for an architecture or a key that is not implemented, and for missing keys.
    """
    path, hf, architecture = read_architecture(directory, ARCHITECTURES)
    is_dense = concept_of(path, hf) == DENSE
    with damage_named(path):
        # Keys that transformers spells in several ways get one spelling.
        hf = decoders.flatten_rope(path, hf)
        hf = {"n_routed_experts" if key == ALIAS[architecture] else key: value for key, value in hf.items()}
        only, table = ONLY | ONLY_HERE[architecture], dict(FIELDS)
        if "norm_topk_prob" in only:
            del table["norm_topk_prob"]
        required = config_json.REQUIRED if is_dense else mixtures.REQUIRED
        fields = read_fields(path, hf, table, DEFAULTS[architecture], only, INERT, required)
        fields = decoders.ordinary_widths(fields) | decoders.end_of_text(directory, fields)
        if is_dense:
            of_experts = DEFAULTS["DeepseekV3ForCausalLM"].keys() | set(EXPERTS.values())
            of_experts -= COMMON.keys() | set(LLAMA.values())
            return {field: value for field, value in fields.items() if field not in of_experts | {"d_head"}}
        return sparse_fields(path, hf, fields, architecture)


def sparse_fields(path: Path, hf: dict, fields: dict, architecture: str) -> dict:
    """Return the fields of `deepseek.Config`: those in fields, and those that follow from several keys of hf,
    the content of the config.json at path."""
    n_dense, n_layers = first_dense(path, hf), fields["n_layers"]
    fields = fields | {"d_head": None, "dense_layers": tuple(range(n_dense))}
    if architecture == "DeepseekV2ForCausalLM":
        method = hf.get("topk_method", "greedy")
        if method not in METHODS:
            raise ValueError(f"{path}: topk_method {method!r:.100}: expected one of {', '.join(METHODS)}")
        if not METHODS[method]:
            fields |= {"n_groups": 1, "top_groups": 1}
    if fields.get("n_groups", 1) == fields.get("top_groups", 1):  # all groups, so that they have no effect
        fields |= {"n_groups": 1, "top_groups": 1}

    # DeepSeek's code adds up the balance losses of the layers, ours takes their mean.
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    alpha = hf.get("aux_loss_alpha", 0.0001 if is_v3 else 0.001) * (n_layers - n_dense)
    if hf.get("seq_aux", True):
        return fields | {"aux_loss_coef": 0.0, "sequence_loss_coef": alpha}
    return fields | {"aux_loss_coef": alpha / fields["top_k"]}


def hf_config(config) -> dict:
    """Return the content of config.json for a `latent.Config` or a `deepseek.Config`, spelled so that
    transformers 4 and 5 read it. Raises ValueError for a Config that neither architecture describes."""
    is_sparse = hasattr(config, "n_experts")
    architecture = "DeepseekV2ForCausalLM"
    if is_sparse:
        architecture = sparse_architecture(config)
    hf = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], "torch_dtype": "float32"}
    fields = vars(config) | {"n_kv_heads": config.n_heads}
    hf |= {key: fields[field] for key, field in (LLAMA | ATTENTION).items()}
    hf |= {"hidden_act": "silu", "attention_bias": False, "bos_token_id": None, "pad_token_id": None}
    if not is_sparse:
        return hf | {
            "first_k_dense_replace": config.n_layers,
            "num_experts_per_tok": 1,
            "n_routed_experts": 2,
        }

    hf |= {key: fields[field] for key, field in EXPERTS.items()} | {"moe_intermediate_size": config.F}
    hf |= {"first_k_dense_replace": len(config.dense_layers), "moe_layer_freq": 1}
    by_sequence = bool(config.sequence_loss_coef or not config.aux_loss_coef)
    coefficient = config.sequence_loss_coef if by_sequence else config.aux_loss_coef * config.top_k
    hf |= {"seq_aux": by_sequence, "aux_loss_alpha": coefficient / config.n_sparse_layers}
    if architecture == "DeepseekV3ForCausalLM":
        return hf | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
    method = "group_limited_greedy" if config.n_groups > 1 else "greedy"
    return hf | {"scoring_func": "softmax", "topk_method": method}


def sparse_architecture(config) -> str:
    """Return the architecture of a `deepseek.Config`. Raises ValueError for one that neither describes."""
    n_dense, router = len(config.dense_layers), config.router
    mistakes = [
        (router not in ("softmax", "sigmoid"), f"router {router!r}: expected 'softmax' or 'sigmoid'"),
        (router == "softmax" and config.renormalize, "renormalize True: expected False with softmax"),
        (not config.n_shared_experts, "n_shared_experts 0: expected at least 1"),
        (sorted(config.dense_layers) != list(range(n_dense)),
         f"dense_layers {config.dense_layers}: expected the first ones"),
    ]  # fmt: skip
    for is_wrong, message in mistakes:
        if is_wrong:
            raise ValueError(f"no Hugging Face architecture describes this model: {message}")
    return "DeepseekV3ForCausalLM" if router == "sigmoid" else "DeepseekV2ForCausalLM"


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `latent.Config` or a
    `deepseek.Config`. Raises ValueError for tensors that are missing, unknown, or of another shape."""
    fields = read_fields_of(directory)
    with damage_named(Path(directory)):
        stored = mixtures.split_experts(safetensors_dir.read_weights(directory))
    stored = without_next_layers(directory, fields["n_layers"], stored)
    safetensors_dir.tie(fields, stored, *decoders.EMBEDDING_AND_HEAD)
    return mixtures.filled(lambda: kind(config_kind(**fields, kernels=kernels)), fields, stored, directory)


def without_next_layers(
    directory: str | Path, n_layers: int, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights without those of the layers that predict later tokens, which stand after the last
    of n_layers layers, and without the frequencies of rotary positions, which old files hold, too."""
    path, hf = read_config(directory)
    n_next = whole_number(path, hf, "num_nextn_predict_layers", 0)  # 1 in V3; a damaged file may have any
    left_out = tuple(f"model.layers.{n_layers + i}." for i in range(min(n_next, 8)))
    weights = decoders.without_frequencies(weights)
    return {name: w for name, w in weights.items() if not name.startswith(left_out)}


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory, each replaced only once
    the new one is complete."""
    hf = hf_config(model.config)
    safetensors_dir.write_decoder(directory, hf, mixtures.split_experts(model.state_dict()))
