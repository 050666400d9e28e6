"""DeepSeek-V2 and V3 against transformers (recorded) and the published counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of
from safetensors.torch import load_file, save_file
from small_gpt import flags, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of

import train
from attention_variants import deepseek
from attention_variants.deepseek import SIZES, Config, DeepSeek
from formats.open_model import concept_of, open_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = ["deepseek-v2", "deepseek-v3"]
SMALL = Config(
    2, 4, 32, 24, vocab_size=61, max_seq_len=64, kv_rank=20, d_nope=10, d_rope=12, d_value=14, n_experts=8,
    top_k=2, d_expert=8, n_shared_experts=1, dense_layers=(0,), renormalize=False,
)  # fmt: skip
VARIANTS = {
    "v2-lite": {},
    "v2": {"q_rank": 18, "n_groups": 4, "top_groups": 2, "routed_scale": 2.0, "aux_loss_coef": 0.02},
    "v3": {
        "q_rank": 18, "router": "sigmoid", "n_groups": 4, "top_groups": 2, "renormalize": True,
        "aux_loss_coef": 0.0, "sequence_loss_coef": 0.0001, "bias_update_rate": 0.001, "routed_scale": 2.5,
        "tie_embeddings": False,
    },
}  # fmt: skip


def recorded(name):
    return DeepSeek.from_pretrained(FIXTURES / name).eval(), load_file(
        FIXTURES / name / "expected.safetensors"
    )


def small(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return shake(DeepSeek(replace(SMALL, **changes)).to(dtype))


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_transformers(name):
    assert_logits_recorded(*recorded(name))


@pytest.mark.parametrize("name", RECORDED)
def test_greedy_tokens_equal_transformers(name):
    assert_greedy_recorded(*recorded(name))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("deepseek-v2", {"n_groups": 1, "top_groups": 1}),
        ("deepseek-v2", {"routed_scale": 1.0}),
        ("deepseek-v3", {"renormalize": False}),
        ("deepseek-v3", {"n_groups": 1, "top_groups": 1}),
    ],
)
def test_the_recorded_logits_notice_each_part_of_the_routers(name, changes):
    model, expected = recorded(name)
    wrong = DeepSeek(replace(model.config, **changes)).eval()
    wrong.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (wrong(expected["tokens"]) - expected["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RECORDED)
def test_older_spellings_of_config_mean_the_same(name, tmp_path):
    v4 = json.loads((FIXTURES / name / "config_v4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(v4))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / name / "model.safetensors").read_bytes())
    ours, older = recorded(name)[0].config, DeepSeek.from_pretrained(tmp_path).config
    coefficient = {"sequence_loss_coef": ours.sequence_loss_coef}  # which only the older file has
    assert replace(older, **coefficient) == ours and older.sequence_loss_coef == 0.001


@pytest.mark.parametrize("name", RECORDED)
def test_saving_and_loading_returns_the_same_model(name, tmp_path):
    model, expected = recorded(name)
    model.save_pretrained(tmp_path)
    assert concept_of(tmp_path) == "attention_variants.deepseek"
    again = open_model(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = (model(tokens_of(24)) - theirs.eval()(tokens_of(24)).logits).abs().max()
    assert difference < 1e-4
    assert open_model(tmp_path).config == model.config


def test_the_layer_that_predicts_the_token_after_the_next_is_left_out(tmp_path):
    directory = copy_of(FIXTURES / "deepseek-v3", tmp_path, num_nextn_predict_layers=1)
    weights = load_file(directory / "model.safetensors")
    extra = {f"model.layers.2.{name}": torch.ones(3) for name in ("enorm.weight", "self_attn.o_proj.weight")}
    save_file(weights | extra, directory / "model.safetensors")
    model, expected = recorded("deepseek-v3")
    assert torch.equal(
        DeepSeek.from_pretrained(directory).eval()(expected["tokens"]), model(expected["tokens"])
    )
    copy_of(directory, tmp_path / "none", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"model.layers.2.* has no place"):
        DeepSeek.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc': expected one of greedy"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ],
)
def test_config_features_we_lack_are_named(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DeepSeek.from_pretrained(copy_of(FIXTURES / name, tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"renormalize": True}, "renormalize True"),
        ({"n_shared_experts": 0}, "n_shared_experts 0"),
        ({"dense_layers": (1,)}, "dense_layers"),
        ({"router": "switch", "top_k": 1}, "router 'switch'"),
    ],
)
def test_a_model_that_is_no_deepseek_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(**changes).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_a_token_sees_only_earlier_ones_also_by_a_cache(name):
    model = small(torch.float64, **VARIANTS[name])
    assert cache_error(model, 16, 7) < 1e-12
    assert first_changes(model, 12, noise=1e-12) == list(range(12))


PUBLISHED = {  # all, and those that one token uses
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    """Layers of a kind are alike, so that one of each is enough."""
    c = SIZES[size]
    with torch.device("meta"):
        model = DeepSeek(replace(c, n_layers=2, dense_layers=(0,)))
    n_dense, counts = len(c.dense_layers), []
    idle = c.n_experts - c.top_k
    for n_experts_less in (0, idle):
        dense, sparse = (sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
        sparse -= n_experts_less * 3 * c.d_model * c.F
        rest = 2 * c.vocab_size * c.d_model + c.d_model
        counts.append(rest + n_dense * dense + (c.n_layers - n_dense) * sparse)
    assert tuple(counts) == PUBLISHED[size]
    matrices = deepseek.n_active_params(model) - c.vocab_size * c.d_model  # without the embedding
    assert 0 < matrices - model.config.n_matmul_params < 0.001 * matrices  # what is left are norms


def test_the_cache_of_a_token_is_the_published_one():
    """30.4, 67.5 and 68.6 KiB in bfloat16."""
    for size, kib in (("deepseek-v2-lite", 30.4), ("deepseek-v2", 67.5), ("deepseek-v3", 68.6)):
        c = SIZES[size]
        assert 2 * c.n_layers * (c.kv_rank + c.d_rope) / 1024 == pytest.approx(kib, abs=0.05)


def test_the_page_has_what_tiny_costs():
    assert costs(DeepSeek(SIZES["tiny"])) == documented_costs("deepseek")


def test_it_trains_and_the_model_is_saved_as_a_deepseek(tmp_path):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    assert train.main(flags(text, out, model="deepseek", steps=5)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] and "max_load" in rows[-2]
    hf = json.loads((out / "model" / "config.json").read_text())
    assert hf["architectures"] == ["DeepseekV3ForCausalLM"]
    assert concept_of(out / "model") == "attention_variants.deepseek"
