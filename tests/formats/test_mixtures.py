"""Mixtures of experts in Hugging Face layout: against transformers (recorded), and there and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of
from safetensors.torch import load_file, save_file

import moe
from formats import mixtures
from moe import SIZES, Config, MoEGPT

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = ["mixtral", "olmoe", "qwen3-moe", "dots1"]
SMALL = Config(2, 4, 32, 48, vocab_size=61, max_seq_len=32, n_kv_heads=2, n_experts=8, top_k=2, d_expert=16)
VARIANTS = {
    "mixtral": {},
    "mixtral with a window": {"window": 8, "d_head": 16, "tie_embeddings": False},
    "olmoe": {
        "qk_norm": "all", "renormalize": False, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "olmoe renormalised": {"qk_norm": "all", "n_kv_heads": None},
    "qwen3": {"qk_norm": True, "dense_layers": (1,), "d_head": 16},
    "qwen3 with a window": {"qk_norm": True, "window": 8, "renormalize": False, "tie_embeddings": False},
    "switch": {"qk_norm": True, "router": "switch", "top_k": 1, "renormalize": False},
    "dots1": {
        "qk_norm": True, "router": "sigmoid", "n_groups": 2, "top_groups": 1, "n_shared_experts": 2,
        "dense_layers": (0,), "routed_scale": 2.5, "aux_loss_coef": 0.0, "bias_update_rate": 0.001,
    },
    "dots1 with mixed windows": {
        "qk_norm": True, "router": "sigmoid", "n_shared_experts": 1, "window": 8, "full_layers": (1,),
        "renormalize": False, "aux_loss_coef": 0.0, "sequence_loss_coef": 0.0001, "bias_update_rate": 0.001,
    },
    "dots1 without shared experts": {
        "qk_norm": True, "router": "sigmoid", "d_head": 16, "bias_update_rate": 0.001,
    },
}  # fmt: skip
DEEPSEEK = {"n_shared_experts": 2, "dense_layers": (0,), "renormalize": False, "n_kv_heads": None}


def recorded(name):
    return MoEGPT.from_pretrained(FIXTURES / name).eval(), load_file(FIXTURES / name / "expected.safetensors")


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = MoEGPT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def config_of(hf, tmp_path):
    """Return the Config that this config.json describes."""
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return Config(**mixtures.read_config(tmp_path))


def value(config, field):
    """Return the value of a field, also where the Config leaves it out."""
    return {"n_kv_heads": config.G, "d_head": config.K, "d_expert": config.F}.get(
        field, getattr(config, field)
    )


# --- parity with transformers


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_transformers(name):
    assert_logits_recorded(*recorded(name))


@pytest.mark.parametrize("name", RECORDED)
def test_greedy_tokens_equal_transformers(name):
    """Three prompts of different lengths in one batch, decoded with a cache."""
    assert_greedy_recorded(*recorded(name))


@pytest.mark.parametrize("name", RECORDED)
def test_losses_equal_transformers(name):
    """transformers counts the tokens of all layers together, we take the mean of the layers' losses: the same
    only where one layer is sparse."""
    model, expected = recorded(name)
    tokens = expected["tokens"]
    batch = {"tokens": tokens, "targets": F.pad(tokens[:, 1:], (0, 1), value=-100)}
    coefficient = model.config.aux_loss_coef
    cross_entropy = expected["loss"] - coefficient * expected.get("aux_loss", torch.tensor(0.0))
    assert model.loss(batch)[0].item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    loss, metrics = model.train().loss(batch)
    if name == "dots1":
        balance = model.config.sequence_loss_coef * metrics["sequence_loss"]
    else:
        balance = coefficient * expected["aux_loss_per_layer"].mean()
        assert metrics["aux_loss"].item() == pytest.approx(
            expected["aux_loss_per_layer"].mean().item(), rel=1e-5
        )
    assert loss.item() == pytest.approx((cross_entropy + balance).item(), rel=1e-6)
    if name == "qwen3-moe":
        assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)


BLOCKS = {
    "deepseek_v3": replace(
        SMALL, router="sigmoid", n_experts=16, top_k=4, d_expert=6, n_groups=4, top_groups=2,
        n_shared_experts=2, routed_scale=2.5,
    ),
    "deepseek_v2": replace(SMALL, top_k=3, d_expert=8, n_shared_experts=2, renormalize=False),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_equal_transformers(name):
    stored = load_file(FIXTURES / "moe-blocks" / f"{name}.safetensors")
    x, output, error = (stored.pop(key) for key in ("input", "output", "output64_error"))
    layer, prefix = moe.MoE(BLOCKS[name]).eval(), "model.layers.0.mlp."
    expected = {prefix + key: w for key, w in layer.state_dict().items()}
    weights = mixtures.stack_experts(stored, expected)
    assert not stored  # everything has found its place
    layer.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items()})
    with torch.no_grad():
        assert (layer(x) - output).abs().max() < max(1e-5, 5 * error.item())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(tokens) - theirs.eval()(tokens).logits).abs().max()
    # weights of order one give logits of order ten: ten times the parity tolerance of logits of order one
    assert difference < 1e-4


def test_transformers_generates_our_greedy_tokens_from_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(eos_token_id=60)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.do_sample and theirs.generation_config.eos_token_id == 60
    prompt = torch.tensor([[3, 1, 4]])
    (expected,) = model.generate(prompt, 20, temperature=0)
    # Random weights may well end the text at once: go on.
    new = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 3:]
    assert new.tolist() == expected


def test_deepseek_moe_is_llama_with_the_layer_of_deepseek_v2(tmp_path):
    """transformers has no DeepseekForCausalLM; it has the two halves of it."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    model = small(**DEEPSEEK)
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["architectures"] == ["DeepseekForCausalLM"]
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf)).eval()
    llama.model.layers[1].mlp = DeepseekV2Moe(transformers.DeepseekV2Config(**hf))
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    gate, up, down = (
        torch.stack([weights.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(8)])
        for part in ("gate", "up", "down")
    )
    weights |= {f"{prefix}gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}down_proj": down}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    llama.load_state_dict(weights)
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens) - llama(tokens).logits).abs().max() < 1e-4


# --- there and back


@pytest.mark.parametrize("name", RECORDED)
def test_saving_writes_the_file_that_was_read(name, tmp_path):
    model, expected = recorded(name)
    model.save_pretrained(tmp_path / "deep" / "er")
    again = MoEGPT.from_pretrained(tmp_path / "deep" / "er").eval()
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))
    theirs = load_file(FIXTURES / name / "model.safetensors")
    ours = load_file(tmp_path / "deep" / "er" / "model.safetensors")
    assert ours.keys() == theirs.keys()  # a tensor for each expert, under the published names
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    hf = json.loads((tmp_path / "deep" / "er" / "config.json").read_text())
    assert hf["architectures"] == json.loads((FIXTURES / name / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("changes", [*VARIANTS.values(), DEEPSEEK], ids=[*VARIANTS, "deepseek"])
def test_loading_returns_the_model_that_was_saved(changes, tmp_path):
    model = small(**changes)
    model.save_pretrained(tmp_path)
    again = MoEGPT.from_pretrained(tmp_path).eval()
    same = model.config
    if not same.dense_layers and same.router != "sigmoid" and same.qk_norm is not True:
        same = replace(
            same, d_ff=same.F, d_expert=None
        )  # Mixtral and OLMoE have no d_ff, which no layer uses
    if same.router == "switch":
        same = replace(same, router="softmax")  # which it is, outside training
    assert again.config == same
    tokens = torch.randint(61, (2, 24))
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", RECORDED)
def test_transformers_4_spelling_of_config_means_the_same(name, tmp_path):
    v4 = json.loads((FIXTURES / name / "config_v4.json").read_text())
    assert config_of(v4, tmp_path) == recorded(name)[0].config


def test_experts_spread_over_several_files_load(tmp_path):
    copy_of(FIXTURES / "mixtral", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{i % 3}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: w for name, w in weights.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, expected = recorded("mixtral")
    assert torch.equal(MoEGPT.from_pretrained(tmp_path)(expected["tokens"]), model(expected["tokens"]))


@pytest.mark.parametrize("name", RECORDED)
def test_stacked_experts_load_too(name, tmp_path):
    """As transformers 5 writes them with save_original_format=False."""
    model, expected = recorded(name)
    copy_of(FIXTURES / name, tmp_path)
    stacks = (".experts.gate_up_proj.weight", ".experts.down_proj.weight")
    weights = {
        name.removesuffix(".weight") if name.endswith(stacks) else name: w
        for name, w in model.state_dict().items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(MoEGPT.from_pretrained(tmp_path)(expected["tokens"]), model(expected["tokens"]))


def test_half_precision_files_keep_it_but_for_the_bias(tmp_path):
    copy_of(FIXTURES / "dots1", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, tmp_path / "model.safetensors")
    state = MoEGPT.from_pretrained(tmp_path).state_dict()
    floats = [name for name, w in state.items() if w.dtype == torch.float32]
    assert floats == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert all(w.dtype == torch.bfloat16 for name, w in state.items() if name not in floats)


@pytest.mark.parametrize("name", RECORDED)
def test_a_loaded_model_trains(name):
    model, expected = recorded(name)
    model.train().loss({"tokens": expected["tokens"], "targets": expected["tokens"]})[0].backward()
    assert all(p.grad is not None for p in model.parameters())
    moe.after_step(model)


# --- what config.json means

PUBLISHED = {
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek-moe-16b": {
        "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
        "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
        "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 102400,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_sizes(name, tmp_path):
    config = config_of(PUBLISHED[name], tmp_path)
    assert replace(config, eos_token_id=None) == replace(
        SIZES[name], z_loss_coef=0.0
    )  # it is not in the files


@pytest.mark.parametrize(
    "name, fields",
    [
        ("mixtral", {"n_experts": 8, "top_k": 2, "n_kv_heads": 8, "rope_theta": 1e6, "norm_eps": 1e-5,
                     "window": None, "aux_loss_coef": 0.001, "renormalize": True}),
        ("olmoe", {"n_experts": 64, "top_k": 8, "n_kv_heads": 16, "rope_theta": 1e4, "norm_eps": 1e-5,
                   "aux_loss_coef": 0.01, "renormalize": False, "qk_norm": "all"}),
        ("qwen3-moe", {"n_experts": 128, "top_k": 8, "d_expert": 768, "n_kv_heads": 4, "d_head": 4,
                       "norm_eps": 1e-6, "window": None, "aux_loss_coef": 0.001, "renormalize": False}),
        ("dots1", {"n_experts": 8, "top_k": 2, "d_expert": 1408, "n_kv_heads": 32, "renormalize": False,
                   "n_groups": 1, "top_groups": 1, "routed_scale": 1.0, "n_shared_experts": 0, "window": None,
                   "dense_layers": (), "aux_loss_coef": 0.0, "sequence_loss_coef": 2 * 0.0001,
                   "bias_update_rate": 0.001}),
        ("deepseek", {"n_kv_heads": 16, "renormalize": False, "n_shared_experts": 0, "dense_layers": (),
                      "aux_loss_coef": 0.0, "sequence_loss_coef": 2 * 0.001}),
    ],
)  # fmt: skip
def test_what_config_json_leaves_out_is_what_transformers_takes(name, fields, tmp_path):
    architecture = next(a for a, kind in mixtures.MODEL_TYPES.items() if kind == name.replace("-", "_"))
    n_heads = 32 if name == "dots1" else 16
    hf = {"architectures": [architecture], "num_hidden_layers": 2, "num_attention_heads": n_heads}
    hf |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 61, "max_position_embeddings": 64}
    if name in ("dots1", "deepseek"):
        hf |= {"n_routed_experts": 8, "num_experts_per_tok": 2}
    if name == "deepseek":
        hf["moe_intermediate_size"] = 16
    config = config_of(hf, tmp_path)
    assert {field: value(config, field) for field in fields} == fields


@pytest.mark.parametrize(
    "name, changes, fields",
    [
        ("qwen3-moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2}, {"dense_layers": (0, 2, 4)}),
        ("qwen3-moe", {"num_hidden_layers": 6, "mlp_only_layers": [0, 5]}, {"dense_layers": (0, 5)}),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 8}, {"window": 8, "full_layers": ()}),
        ("mixtral", {"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ("dots1", {"n_group": None, "topk_group": None}, {"n_groups": 1, "top_groups": 1}),
        ("dots1", {"layer_types": None, "max_window_layers": 62}, {"window": None}),
        (
            "dots1",
            {"aux_loss_alpha": 0.5, "seq_aux": True},
            {"sequence_loss_coef": 0.5, "aux_loss_coef": 0.0},
        ),
        ("dots1", {"aux_loss_alpha": 0.6, "seq_aux": False}, {"aux_loss_coef": 0.6 / 3}),
        ("dots1", {"scoring_func": "noaux_tc", "topk_method": "noaux_tc"}, {"router": "sigmoid"}),
    ],
)
def test_keys_with_a_meaning_of_their_own(name, changes, fields, tmp_path):
    hf = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    config = config_of(hf, tmp_path)
    assert {field: value(config, field) for field in fields} == fields


def test_deepseeks_code_renormalises_several_weights_only(tmp_path):
    hf = PUBLISHED["deepseek-moe-16b"] | {"norm_topk_prob": True}
    assert config_of(hf, tmp_path).renormalize
    assert not config_of(hf | {"num_experts_per_tok": 1}, tmp_path).renormalize


# --- errors


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "expert_choice", "renormalize": False},
        {"logit_softcap": 30.0},
        {"qkv_bias": True},
        {"routed_scale": 2.0},
        {"qk_norm": True, "n_shared_experts": 1},
        {"qk_norm": True, "window": 8, "full_layers": (0,)},
        {"qk_norm": "all", "window": 8},
        {"qk_norm": "all", "dense_layers": (0,)},
        {"qk_norm": "all", "d_head": 16},
        {"dense_layers": (1,)},
        {"n_shared_experts": 1, "window": 8},
        {"n_shared_experts": 1, "d_head": 16},
        {"n_shared_experts": 1, "top_k": 1},
        {"router": "sigmoid"},
        {"router": "sigmoid", "qk_norm": "all"},
        {"router": "sigmoid", "qk_norm": True, "dense_layers": (1,)},
    ],
)
def test_a_model_no_architecture_describes_is_refused_before_anything_is_written(changes, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        small(**changes).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "mixtral",
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "'DeepseekV3ForCausalLM'.* latent attention",
        ),
        (
            "mixtral",
            {"architectures": ["DeepseekV2ForCausalLM"]},
            "latent attention; open it by python -m attention_variants.deepseek",
        ),
        (
            "mixtral",
            {"architectures": ["LlamaForCausalLM"]},
            "'LlamaForCausalLM' is dense; .*: python -m language.upcycle .* --experts 8",
        ),
        (
            "mixtral",
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "'Qwen2MoeForCausalLM': expected one of Mixtral",
        ),
        ("mixtral", {"hidden_act": "gelu"}, r"config\.json: hidden_act 'gelu'"),
        ("mixtral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not implemented"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mixtral", {"hidden_size": None}, "hidden_size missing"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmoe", {"sliding_window": 8}, "sliding_window 8"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("qwen3-moe", {"attention_bias": True}, "attention_bias True"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size 8"),
        (
            "qwen3-moe",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers 1",
        ),
        ("dots1", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("dots1", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("dots1", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("dots1", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("dots1", {"n_routed_experts": None}, "n_routed_experts missing"),
        ("dots1", {"first_k_dense_replace": 2}, "dense_layers"),
        ("dots1", {"n_routed_experts": 16}, r"mlp\.gate\..* has shape \(12"),
        ("dots1", {"n_shared_experts": None}, "shared_experts.* has no place"),
        ("dots1", {"aux_loss_alpha": "0.1"}, "aux_loss_alpha '0.1': expected a number"),
        ("dots1", {"seq_aux": "no"}, "seq_aux 'no': expected true or false"),
        ("dots1", {"moe_intermediate_size": 6}, r"has shape \(.*config\.json says"),
        ("mixtral", {"num_local_experts": 7}, r"block_sparse_moe\.experts\.7\.w1\.weight has no place"),
        ("mixtral", {"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ("mixtral", {"intermediate_size": 16}, r"block_sparse_moe\.experts\.\d\.w\d\.weight has shape"),
    ],
)
def test_config_features_we_lack_are_named(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MoEGPT.from_pretrained(copy_of(FIXTURES / name, tmp_path, **changes))


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        MoEGPT.from_pretrained(tmp_path / "nowhere")
    copy_of(FIXTURES / "mixtral", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    whole, weights = file.read_bytes(), load_file(file)
    w = weights.pop(name)
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"{tmp_path}: {name} is missing \(1 such tensors\)"):
        MoEGPT.from_pretrained(tmp_path)
    save_file(weights | {name: w[:-1]}, file)
    with pytest.raises(ValueError, match=rf"{name} has shape \(11, 32\), config\.json says \(12, 32\)"):
        MoEGPT.from_pretrained(tmp_path)
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        MoEGPT.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        MoEGPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        MoEGPT.from_pretrained(tmp_path)
