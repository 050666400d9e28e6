"""Hugging Face checkpoints of MiniMax-01, MiniMaxForCausalLM: layers with linear and with softmax attention.

The experts have Mixtral's names, see formats/mixtures.py. Two weights of linear attention have other names:

    in the file     self_attn.norm, self_attn.out_proj
    in the model    self_attn.out_norm, self_attn.o_proj

Files may also hold tables of decays. They follow from config.json, so they are neither read nor written. The
layers with softmax rotate all features of a head by their positions, as transformers does; the published
weights are of a model that rotates half of them (see attention_variants/minimax.py).
"""

from pathlib import Path

from torch import Tensor, nn

from formats import config_json, decoders, mixtures, safetensors_dir
from formats.config_json import damage_named, read_architecture, read_fields

ARCHITECTURE, CONCEPT = "MiniMaxForCausalLM", "attention_variants.minimax"
FACTORS = {  # config.json: Config
    f"{theirs}_{factor}_factor": f"{ours}_{factor}"
    for theirs, ours in (("full_attn", "softmax"), ("linear_attn", "linear"), ("mlp", "mlp"))
    for factor in ("alpha", "beta")
}
FIELDS = {**mixtures.TABLES["MixtralForCausalLM"], **FACTORS, "block_size": "chunk"}
DEFAULTS = {
    **mixtures.DEFAULTS["MixtralForCausalLM"], "chunk": 256, **dict.fromkeys(FACTORS.values(), 1.0),
}  # fmt: skip
ONLY = mixtures.ONLY | {"sliding_window": (None,)}
INERT = mixtures.INERT | {"layer_types"}
KINDS = ("linear_attention", "full_attention")
NAMES = {".self_attn.out_norm.": ".self_attn.norm.", ".self_attn.o_proj.": ".self_attn.out_proj."}
DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # ends of the names of these tables


def read_fields_of(directory: str | Path) -> dict:
    """Return the fields of `minimax.Config` for the model in directory.

    Raises ValueError for an architecture or a key that is not implemented, and for missing keys.
    """
    path, hf, _ = read_architecture(directory, [ARCHITECTURE])
    with damage_named(path):
        hf = decoders.flatten_rope(path, hf)
        hf = {"num_local_experts" if key == "num_experts" else key: value for key, value in hf.items()}
        fields = read_fields(path, hf, FIELDS, DEFAULTS, ONLY, INERT, mixtures.REQUIRED - {"d_expert"})

        # Without a list, the two kinds alternate, and the first layer has softmax attention.
        n_layers = fields["n_layers"]
        kinds = hf.get("layer_types") or [KINDS[(i + 1) % 2] for i in range(n_layers)]
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"{path}: layer_types {min(unknown)!r}: expected {' or '.join(KINDS)}")
        if len(kinds) != n_layers:
            raise ValueError(f"{path}: layer_types has {len(kinds)} entries: expected {n_layers}, the layers")
        fields["softmax_layers"] = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
        return decoders.ordinary_widths(fields) | decoders.end_of_text(directory, fields)


def hf_config(config) -> dict:
    """Return the content of config.json for a `minimax.Config`. Raises ValueError for any but a MiniMax's."""
    expected = {
        "router": "softmax", "renormalize": True, "n_shared_experts": 0, "dense_layers": (), "n_groups": 1,
        "routed_scale": 1.0, "qk_norm": False, "qkv_bias": False, "positions": "rope", "norm": "rms",
        "logit_softcap": None,
    }  # fmt: skip
    for field, value in expected.items():
        if getattr(config, field) != value:
            given = getattr(config, field)
            raise ValueError(f"{field} {given!r}: a MiniMax, as which it would be saved, has {value!r}")
    fields = vars(config) | {"n_kv_heads": config.G, "d_head": config.K, "d_ff": config.F}
    hf = {"architectures": [ARCHITECTURE], "model_type": "minimax", "torch_dtype": "float32"}
    hf |= {key: fields[field] for key, field in FIELDS.items()}
    hf["layer_types"] = [KINDS[i in config.softmax_layers] for i in range(config.n_layers)]
    return hf | {"hidden_act": "silu", "sliding_window": None, "bos_token_id": None, "pad_token_id": None}


def renamed(weights: dict[str, Tensor], config, table: dict[str, str]) -> dict[str, Tensor]:
    """Return the weights with the names in the layers with linear attention changed by a table."""
    linear = tuple(f"model.layers.{i}." for i in range(config.n_layers) if i not in config.softmax_layers)
    rename = safetensors_dir.rename
    return {rename(name, table) if name.startswith(linear) else name: w for name, w in weights.items()}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, a `minimax.Config`.

    Raises ValueError for tensors that are missing, unknown, or of another shape.
    """
    fields = read_fields_of(directory)
    stored = decoders.without_frequencies(safetensors_dir.read_weights(directory))
    with damage_named(Path(directory)):
        stored = mixtures.split_experts(stored, mixtral=True)
    stored = {
        name: w for name, w in decoders.without_frequencies(stored).items() if not name.endswith(DECAYS)
    }
    safetensors_dir.tie(fields, stored, *decoders.EMBEDDING_AND_HEAD)
    with damage_named(config_json.read_config(directory)[0]):
        config = config_kind(**fields, kernels=kernels)
    stored = renamed(stored, config, safetensors_dir.inverse(NAMES)) if config.n_linear_layers else stored
    return mixtures.filled(lambda: kind(config), fields, stored, directory, mixtral=True)


def save(model: nn.Module, directory: str | Path) -> None:
    """Write model.safetensors, config.json and generation_config.json to directory, each replaced only once
    the new one is complete."""
    hf = hf_config(model.config)
    weights = mixtures.split_experts(model.state_dict(), mixtral=True)
    if model.config.n_linear_layers:
        weights = renamed(weights, model.config, NAMES)
    safetensors_dir.write_decoder(directory, hf, weights)
