"""Every key of config.json, as it is, missing, null and changed: equal logits to transformers, or refused."""

import json
import warnings
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from formats.open_model import open_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
}  # fmt: skip
ENCODER = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True}
# {a name: (the class of the model, its settings)}. Some families are here twice, with and without windows.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": ("Qwen2ForCausalLM", {**LLAMA, **WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 6}),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        {**LLAMA, **WINDOW, "head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_experts_per_tok": 2, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", {**LLAMA, **EXPERTS, "num_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**LLAMA, **EXPERTS, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8}
        | {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "dots1": (
        "Dots1ForCausalLM",
        {**LLAMA, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 8}
        | {"first_k_dense_replace": 1, "head_dim": 4, "n_group": 2, "topk_group": 1}
        | {"routed_scaling_factor": 1.5, "sliding_window": 5, "max_window_layers": 1},
    ),
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", {**ENCODER, "type_vocab_size": 1}),
    "albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 8}),
    "electra": ("ElectraForMaskedLM", {**ENCODER, "embedding_size": 8}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2}
        | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
    ),
}  # fmt: skip
# Keys that no class has as a field of its own, but which stand in files: of transformers 4, or of all models.
MORE = {
    "rope_theta": (10_000.0, 500.0), "rope_scaling": (None, {"type": "linear", "factor": 2.0}),
    "head_dim": (4, 8), "sliding_window": (None, 5), "max_window_layers": (28, 0), "n_ctx": (64, 32),
    "layer_types": (None, ["full_attention", "sliding_attention"]), "is_causal": (True, False),
    "is_decoder": (False, True), "tie_word_embeddings": (True, False), "position_embedding_type":
    ("absolute", "relative_key"), "use_bfloat16": (False, True), "torchscript": (False, True),
    "pruned_heads": ({}, {"0": [1]}), "n_special": (0, 0), "gradient_checkpointing": (False, True),
    "predict_special_tokens": (True, False), "output_past": (True, False), "tokenizer_class": ("A", "B"),
    "unsloth_fixed": (True, False), "unsloth_version": ("2024.9", ""), "max_sequence_length": (64, 32),
    "do_sample": (False, True), "num_beams": (1, 4), "temperature": (1.0, 0.6), "bad_words_ids": (None, [[3]]),
    "partial_rotary_factor": (1.0, 0.5), "global_rope_theta": (160_000.0, 100.0), "attention_chunk_size":
    (None, 4), "local_rope_theta": (10_000.0, 100.0), "num_local_experts": (4, 3), "num_experts": (4, 3),
    "final_logit_softcapping": (None, 5.0), "per_layer_config": (None, {"0": {}}),
}  # fmt: skip
CHANGED = {
    "hidden_act": "gelu_new", "activation_function": "gelu", "hidden_activation": "relu", "n_inner": 20,
    "layer_types": ["full_attention", "sliding_attention"], "mlp_only_layers": [1], "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "architectures": None,
    "sliding_window": 3, "max_window_layers": 0, "clip_qkv": 0.1, "head_dim": 8, "problem_type": "regression",
    "classifier_pooling": "mean", "rms_norm_eps": 0.1, "layer_norm_eps": 0.1, "layer_norm_epsilon": 0.1,
    "norm_eps": 0.1, "summary_type": "first", "n_shared_experts": 2, "id2label": {"0": "a"}, "label2id": {"a": 0},
    "local_attention": 4, "pad_token_id": 5, "transformers_version": "4.40.0", "pretraining_tp": 2,
}  # fmt: skip
MISSING = object()


def changed(key, value):
    """Return another value of a key than this one."""
    if key in CHANGED:
        return CHANGED[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value + 0.5
    return 3 if value is None else f"other {value}"


def theirs(kind, hf, weights, tokens):
    """Return the logits of transformers' model for the content of a config.json, None where there is none.

    A head that is stored beside the embedding is used, as transformers 5 does, whatever the config says.
    """
    try:
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            config = kind.config_class.from_dict(json.loads(json.dumps(hf)))
            model = kind(config)
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.clone())
            model.load_state_dict(weights)
            return model.eval()(tokens).logits
    except Exception:  # its ways to refuse are many
        return None


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Return a family's model class, its config.json, its weights, logits and a directory that holds them."""
    name, settings = FAMILIES[request.param]
    kind, directory = getattr(transformers, name), tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = kind.config_class(**settings)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    hf = {"architectures": [name], "model_type": config.model_type, **settings}
    tokens = torch.randint(6, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return kind, hf, weights, tokens, directory


def values_of(kind, hf):
    """Yield (key, value) for all keys of a class's config: at the default, missing, null and changed."""
    defaults = kind.config_class(**{key: value for key, value in hf.items() if key != "architectures"})
    known = {field.name: getattr(defaults, field.name) for field in fields(kind.config_class)}
    known = {key: value for key, value in known.items() if not isinstance(value, torch.dtype)}
    for key, value in known.items():
        yield from ((key, value), (key, MISSING), (key, None), (key, changed(key, hf.get(key, value))))
    for key, values in MORE.items():
        yield from ((key, value) for value in (*values, None))


@torch.no_grad()
def test_every_key_gives_the_logits_of_transformers_or_is_refused_by_name(family):
    kind, original, weights, tokens, directory = family
    offenders, compared, cache = [], 0, {}
    for key, value in values_of(kind, original):
        hf = {name: old for name, old in original.items() if name != key}
        hf |= {} if value is MISSING else {key: value}
        (directory / "config.json").write_text(json.dumps(hf))
        try:
            model = open_model(directory).eval()
        except ValueError as error:
            if str(directory) not in str(error) or "\n" in str(error):
                offenders.append(f"{key} {value!r}: {error}")
            elif (
                key not in str(error)
                and "has shape" not in str(error)
                and theirs(kind, hf, weights, tokens) is not None
            ):
                offenders.append(f"{key} {value!r}: refused without its name: {error}")
            continue
        expected = theirs(kind, hf, weights, tokens)
        if expected is None:
            offenders.append(f"{key} {value!r}: opened, but not by transformers")
            continue
        compared += 1
        difference = (model(tokens) - expected).abs().max().item()
        if not difference < 1e-4:
            offenders.append(f"{key} {value!r}: logits differ by {difference:.2g}")
    assert not offenders, "\n".join(["", *offenders])
    assert compared > 40
