"""MiniMax-01 against transformers (recorded) and the published counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of
from safetensors.torch import load_file
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained

from attention_variants.minimax import SIZES, Config, MiniMax
from formats.open_model import concept_of, open_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "minimax"
SMALL = Config(
    3, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, n_experts=4, softmax_layers=(1,), chunk=5,
    linear_alpha=1.5, softmax_beta=0.5, mlp_alpha=1.25,
)  # fmt: skip
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # follow from config.json


def recorded():
    return MiniMax.from_pretrained(FIXTURE).eval(), load_file(FIXTURE / "expected.safetensors")


def small(dtype=torch.float64):
    torch.manual_seed(0)
    return shake(MiniMax(SMALL).to(dtype))


def test_logits_equal_transformers():
    assert_logits_recorded(*recorded())


def test_greedy_tokens_equal_transformers():
    assert_greedy_recorded(*recorded())


@pytest.mark.parametrize("field", ["softmax", "linear", "mlp"])
def test_the_recorded_logits_notice_each_factor(field):
    model, expected = recorded()
    for name in (f"{field}_alpha", f"{field}_beta"):
        wrong = MiniMax(replace(model.config, **{name: 1.0})).eval()
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (wrong(expected["tokens"]) - expected["logits"]).abs().max() > 1e-3


def test_older_spellings_of_config_mean_the_same(tmp_path):
    (tmp_path / "config.json").write_text((FIXTURE / "config_v4.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((FIXTURE / "model.safetensors").read_bytes())
    older = {**json.loads((tmp_path / "config.json").read_text())}
    older["layer_types"] = ["linear_attention", "full_attention"]  # which transformers 4 had too
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert MiniMax.from_pretrained(tmp_path).config == recorded()[0].config


def test_saving_and_loading_returns_the_same_model(tmp_path):
    model, expected = recorded()
    model.save_pretrained(tmp_path)
    assert concept_of(tmp_path) == "attention_variants.minimax"
    again = open_model(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))


def test_transformers_opens_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(torch.float32)
    model.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.endswith(TABLES) for name in info["missing_keys"]) and not info["unexpected_keys"]
    with torch.no_grad():
        difference = (model(tokens_of(24)) - theirs.eval()(tokens_of(24)).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "expected MiniMaxForCausalLM"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"sliding_window": 8}, "sliding_window 8"),
        ({"rotary_dim": 4}, "rotary_dim 4 is not implemented"),
    ],
)
def test_config_features_we_lack_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MiniMax.from_pretrained(copy_of(FIXTURE, tmp_path, **changes))


@pytest.mark.parametrize(
    "changes", [{"renormalize": False}, {"dense_layers": (0,)}, {"qk_norm": True}], ids=str
)
def test_a_model_that_is_no_minimax_is_refused_before_anything_is_written(changes, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} .*: a MiniMax"):
        MiniMax(replace(SMALL, **changes)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_token_sees_only_earlier_ones_also_by_a_cache():
    assert cache_error(small(), 14, 7) < 1e-12
    assert first_changes(small(), 12, noise=1e-12) == list(range(12))


def test_parameter_counts_are_the_published_ones():
    """Layers of a kind are alike, so that one of each is enough."""
    c = SIZES["minimax-text-01"]
    with torch.device("meta"):
        model = MiniMax(replace(c, n_layers=2, softmax_layers=(1,)))
    linear, softmax = (sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    rest, idle = 2 * c.vocab_size * c.d_model + c.d_model, 80 * 30 * 3 * c.d_model * c.F
    assert c.softmax_layers == tuple(range(7, 80, 8))
    assert (70 * linear + 10 * softmax + rest) == 456_089_655_296
    assert (70 * linear + 10 * softmax + rest - idle) / 1e9 == pytest.approx(48.40, abs=0.005)


def test_the_page_has_what_tiny_costs():
    assert costs(MiniMax(SIZES["tiny"])) == documented_costs("minimax")


def test_it_trains_and_the_model_is_saved_as_a_minimax(tmp_path):
    directory = trained(tmp_path, "minimax")
    hf = json.loads((directory / "config.json").read_text())
    assert hf["architectures"] == ["MiniMaxForCausalLM"] and hf["layer_types"][3] == "full_attention"
