"""Every key of config.json, as it is, missing, null and changed: equal logits to transformers, or refused."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import decoders, deepseek, disentangled_encoders, encoder_decoders, encoders, gemma, mixtures
from formats.config_json import read_fields
from formats.decoders import LLAMA_FIELDS
from formats.open_model import concept_of, open_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
}  # fmt: skip
ENCODER = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
}  # fmt: skip
DISENTANGLED = {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True}
FINE = {**EXPERTS, "moe_intermediate_size": 8, "head_dim": 4}
GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 5}
LATENT = LLAMA | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
# {a name: (the class of the model, its settings)}. Qwen is here with and without windows.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": ("Qwen2ForCausalLM", LLAMA | WINDOW | {"max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 6}),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        LLAMA | WINDOW | {"head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", LLAMA | EXPERTS | {"num_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        LLAMA | FINE | {"num_experts": 4, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "dots1": (
        "Dots1ForCausalLM",
        LLAMA | FINE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 2, "routed_scaling_factor": 1.5, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | GEMMA),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | GEMMA),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        LATENT | {"q_lora_rank": None},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        LATENT | {"q_lora_rank": 6, "num_mtp_layers": 0},
    ),
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER | {"type_vocab_size": 1}),
    "albert": ("AlbertForMaskedLM", ENCODER | {"embedding_size": 8}),
    "electra": ("ElectraForMaskedLM", ENCODER | {"embedding_size": 8}),
    "modernbert": (
        "ModernBertForMaskedLM",
        ENCODER | {"local_attention": 6, "global_attn_every_n_layers": 2, "eos_token_id": 2}
        | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta": ("DebertaForMaskedLM", ENCODER | DISENTANGLED),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        ENCODER | DISENTANGLED | {"position_buckets": 8, "share_att_key": True}
        | {"norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}  # fmt: skip
# Keys that few classes have as a field, but which stand in files: of transformers 4, or of other programs.
MORE = {
    "rope_theta": (10_000.0, 500.0), "rope_scaling": (None, {"type": "linear", "factor": 2.0}),
    "head_dim": (4, 8), "sliding_window": (None, 5), "max_window_layers": (28, 0), "n_ctx": (64, 32),
    "layer_types": (None, ["full_attention", "sliding_attention"]), "is_causal": (True, False),
    "is_decoder": (False, True), "tie_word_embeddings": (True, False), "use_bfloat16": (False, True),
    "position_embedding_type": ("absolute", "relative_key"), "torchscript": (False, True), "n_special": (0,),
    "pruned_heads": ({}, {"0": [1]}), "gradient_checkpointing": (False, True), "output_past": (True, False),
    "predict_special_tokens": (True, False), "tokenizer_class": ("A", "B"), "unsloth_fixed": (True, False),
    "unsloth_version": ("2024.9", ""), "max_sequence_length": (64, 32), "do_sample": (False, True),
    "num_beams": (1, 4), "temperature": (1.0, 0.6), "bad_words_ids": (None, [[3]]), "num_experts": (4, 3),
    "partial_rotary_factor": (1.0, 0.5), "global_rope_theta": (160_000.0, 100.0), "num_local_experts": (4, 3),
    "attention_chunk_size": (None, 4), "local_rope_theta": (10_000.0, 100.0), "per_layer_config": (None,),
    "position_buckets": (8, -1, "8"), "share_att_key": (True, False), "norm_rel_ebd": ("layer_norm", "none"),
    "conv_kernel_size": (3, 0, 2), "conv_act": ("gelu", "tanh"), "attention_head_size": (4, 8),
    "embedding_size": (16, 8), "talking_head": (False, True), "conv_groups": (1, 2), "z_steps": (0, 2),
    "final_logit_softcapping": (None, 5.0), "use_sliding_window": (False, True), "logits_mup": ({}, []),
}  # fmt: skip
CHANGED = {
    "hidden_act": "gelu_new", "activation_function": "gelu", "hidden_activation": "relu", "n_inner": 20,
    "layer_types": ["full_attention", "sliding_attention"], "mlp_only_layers": [1], "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "clip_qkv": 0.1, "head_dim": 8,
    "sliding_window": 3, "max_window_layers": 0, "problem_type": "regression", "label2id": {"a": 0},
    "classifier_pooling": "mean", "rms_norm_eps": 0.1, "layer_norm_eps": 0.1, "layer_norm_epsilon": 0.1,
    "norm_eps": 0.1, "summary_type": "first", "n_shared_experts": 2, "id2label": {"0": "a"},
    "local_attention": 4, "transformers_version": "4.40.0", "summary_activation": "tanh",
    "pos_att_type": ["p2c"], "max_relative_positions": 9, "final_logit_softcapping": 3.0,
}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "moe_intermediate_size")
# What a refusal may name instead of a key: the field that it becomes, or its other name.
INSTEAD = LLAMA_FIELDS | {"num_experts_per_tok": "top_k", "num_experts": "experts"}
# Keys whose null transformers accepts in config.json, and fails at in the forward pass. Here it means 1.
NULL_IS_ONE = ("n_group", "topk_group")
READERS = {
    "gpt": decoders.read_decoder_config,
    "moe": mixtures.read_config,
    "attention_variants.deepseek": deepseek.read_fields_of,
    "attention_variants.local_global": gemma.read_fields_of,
    "bert": encoders.read_config,
    "language.deberta": lambda directory: disentangled_encoders.read(directory)[0],
    "language.t5": lambda directory: encoder_decoders.read(directory)[0],
}
MISSING = object()


@pytest.fixture
def undrawn(monkeypatch):
    """Set new parameters to zero: drawing them takes most of the time of building small models."""
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda self, *_, **__: self.zero_())


def theirs(kind, hf, weights, tokens):
    """Return the logits of transformers' model for the content of a config.json, None where there is none.

    A head that is stored beside the embedding is used, whatever config.json says, as in its from_pretrained.
    """
    try:
        config = kind.config_class.from_dict(json.loads(json.dumps(hf)))
        if any(getattr(config, size, 0) > 128 for size in SIZES):
            return None  # the weights do not fit
        model = kind(config).eval()
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.load_state_dict(weights)
        labels = {"labels": tokens[:, :9].contiguous()} if config.is_encoder_decoder else {}
        return model(tokens, **labels, return_dict=True).logits
    except Exception:  # its ways to refuse are many
        return None


def ours(model, tokens):
    """Return our logits, of an encoder-decoder those of the first tokens as its output."""
    return model(tokens, tokens[:, :9]) if hasattr(model, "decoder") else model(tokens)


def write(directory, hf):
    """Write a config.json, and return its directory."""
    (directory / "config.json").write_text(json.dumps(hf))
    return directory


def changed(key, value):
    """Return another value of a key than this one."""
    if key in CHANGED:
        return CHANGED[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value + 0.5
    return 3 if value is None else f"other {value}"


def variants(kind, original):
    """Yield (key, value, config.json) for all keys of a class: at the default, missing, null and changed."""
    defaults = kind.config_class(**original)
    known = {field.name: getattr(defaults, field.name) for field in fields(kind.config_class)}
    values = {
        key: (value, MISSING, None, changed(key, original.get(key, value))) for key, value in known.items()
    }
    values = {key: (*MORE[key], MISSING, None) for key in MORE} | values
    seen = []
    for key in values.keys() - {"architectures", "model_type"}:
        for value in values[key]:
            hf = {name: old for name, old in original.items() if name != key}
            hf |= {} if value is MISSING else {key: value}
            if hf not in seen:
                yield key, value, hf
                seen.append(hf)


def effective(changes, original, logits_of, before):
    """Return those of (key, value) that change transformers' logits. They are tried together, and in halves
    if that makes a difference or is refused. What it refuses alone has no logits to compare."""
    removed = {key for key, value in changes if value is MISSING}
    hf = {key: value for key, value in original.items() if key not in removed}
    logits = logits_of(hf | {key: value for key, value in changes if value is not MISSING})
    if logits is not None and (logits - before).abs().max() < 1e-4:
        return []
    if len(changes) == 1:
        return [] if logits is None else changes
    half = len(changes) // 2
    return [
        found
        for part in (changes[:half], changes[half:])
        for found in effective(part, original, logits_of, before)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_key_gives_the_logits_of_transformers_or_is_refused_by_name(family, tmp_path, undrawn):
    # A model whose outputs depend visibly on every weight; its head is not its embedding.
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    places = kind(kind.config_class(**settings)).state_dict()
    weights = {name: 0.3 * torch.randn_like(w) + (w.ndim == 1) for name, w in places.items()}
    for name_of_copy in weights.keys() & encoder_decoders.COPIES:
        weights[name_of_copy] = weights["shared.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    original = {"architectures": [name], "model_type": kind.config_class.model_type, **settings}
    tokens = torch.randint(6, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    read = READERS[concept_of(write(tmp_path, original))]
    fields_before, before = read(tmp_path), theirs(kind, original, weights, tokens)
    assert (ours(open_model(tmp_path).eval(), tokens) - before).abs().max() < 1e-4

    offenders, compared, ignored = [], 0, {}
    for key, value, hf in variants(kind, original):
        write(tmp_path, hf)
        try:
            if read(tmp_path) == fields_before:
                ignored.setdefault(key, []).append(value)
                continue
            model = open_model(tmp_path).eval()
        except ValueError as error:
            # Shapes that do not fit the weights are named as such.
            named = any(name in str(error) for name in (key, INSTEAD.get(key, key), "has shape"))
            if str(tmp_path) not in str(error) or not (named or theirs(kind, hf, weights, tokens) is None):
                offenders.append(f"{key} {value!r}: {error}")
            continue
        expected = theirs(kind, hf, weights, tokens)
        compared += 1
        if expected is None and value is None and key in NULL_IS_ONE:
            continue
        # What only transformers refuses must have no effect here.
        if not (ours(model, tokens) - (before if expected is None else expected)).abs().max() < 1e-4:
            offenders.append(f"{key} {value!r}: {'opened here only' if expected is None else 'other logits'}")

    # What has no effect here must have none there.
    for i in range(4):
        changes = [(key, values[i]) for key, values in ignored.items() if len(values) > i]
        found = (
            effective(changes, original, lambda hf: theirs(kind, hf, weights, tokens), before)
            if changes
            else []
        )
        offenders += [f"{key} {value!r}: has an effect in transformers alone" for key, value in found]
    assert not offenders, "\n".join(["", *offenders])
    # Most keys of DeBERTa v1 that have an effect change the shapes of its weights.
    assert compared >= (2 if family == "deberta" else 3) and len(ignored) > 40


def test_fields_of_a_config_are_translated_or_refused():
    arguments = {"table": {"depth": "n_layers", "sizes": "widths"}, "defaults": {"bias": True, "n_layers": 1}}
    arguments |= {"only": {"act": ("gelu", "silu")}, "inert": {"dropout"}, "required": {"widths"}}
    hf = {"sizes": 3, "act": "silu", "dropout": 0.1}
    expected = {"bias": True, "n_layers": 1, "widths": 3}
    assert read_fields("config.json", hf, **arguments) == expected
    for changes, message in (
        ({"act": "relu"}, "config.json: act 'relu' is not implemented; expected 'gelu' or 'silu'"),
        ({"new": 3}, "config.json: new 3 is not implemented; remove the key only if it has no effect"),
        ({"sizes": None}, "config.json: sizes missing (null)"),
    ):
        with pytest.raises(ValueError) as raised:
            read_fields("config.json", hf | changes, **arguments)
        assert str(raised.value) == message


def differing(model, tokens, directory):
    """Return by how much logits differ from those of transformers' own from_pretrained."""
    reference = type(model).from_pretrained(directory).eval()
    return (open_model(directory).eval()(tokens) - reference(tokens).logits).abs().max().item()


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen3-moe", "mixtral", "bert", "roberta", "albert", "electra", "modernbert"]
)
@torch.no_grad()
def test_a_head_that_is_stored_beside_a_tied_config_is_used(family, tmp_path):
    """As in transformers 5, also where a file holds the head alone, and again in what we save."""
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {id(p): name for name, p in model.named_parameters()}
    embedding = names[id(model.get_input_embeddings().weight)]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tokens = torch.randint(6, 64, (2, 24), generator=torch.Generator().manual_seed(1))

    # A head of its own, and a bias under its second name that differs from the first.
    own = {f"{head}.weight": stored[embedding] + torch.randn(64, stored[embedding].shape[1])}
    if family in ("bert", "roberta", "albert"):
        own[f"{head}.bias"] = torch.randn(64)
    save_file(stored | own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = open_model(tmp_path)
    assert not ours.config.tie_embeddings and differing(model, tokens, tmp_path) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert open_model(tmp_path / "again").config == ours.config
    assert differing(model, tokens, tmp_path / "again") < 1e-5

    # The same matrix under the head's name alone, and under both names.
    head_alone = {name: w for name, w in stored.items() if name != embedding}
    head_alone[f"{head}.weight"] = stored[embedding]
    for weights in (head_alone, head_alone | {embedding: stored[embedding].clone()}):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert open_model(tmp_path).config.tie_embeddings and differing(model, tokens, tmp_path) < 1e-5
