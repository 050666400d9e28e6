"""Latent attention against transformers (recorded), against gpt.py, and its two ways against each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of
from safetensors.torch import load_file
from small_gpt import flags, refused, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained
from torch.utils.flop_counter import FlopCounterMode

import gpt
from attention_variants import latent
from attention_variants.latent import SIZES, Config, LatentAttention, LatentGPT
from attention_variants.longer_context import yarn_factor
from formats.open_model import concept_of, open_model
from kernels import few_rows
from lora import Config as Adapter
from lora import apply

FIXTURES = Path(__file__).parents[1] / "fixtures"
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 1,
    "beta_slow": 0.1, "mscale": 0.5, "mscale_all_dim": 1.3,
}  # fmt: skip
SMALL = Config(
    2,
    4,
    32,
    24,
    vocab_size=61,
    max_seq_len=64,
    kv_rank=20,
    d_nope=10,
    d_rope=12,
    d_value=14,
    rope_theta=100.0,
)
VARIANTS = {
    "queries of x": {},
    "queries of a latent": {"q_rank": 18, "tie_embeddings": False},
    "yarn": {"rope_scaling": YARN},
    "values wider than keys": {"d_value": 26, "q_rank": 18, "rope_scaling": YARN},
}


def recorded():
    directory = FIXTURES / "deepseek-dense"
    return LatentGPT.from_pretrained(directory).eval(), load_file(directory / "expected.safetensors")


def small(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return shake(LatentGPT(replace(SMALL, **changes)).to(dtype))


# --- parity with transformers


def test_logits_equal_transformers():
    assert_logits_recorded(*recorded())


def test_greedy_tokens_equal_transformers():
    """Three prompts of different lengths in one batch; the new tokens are computed the absorbed way."""
    assert_greedy_recorded(*recorded())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"mscale_all_dim": 1.0},
        {"mscale": 1.0},
        {"beta_fast": 0.3},
        {"beta_slow": 0.3},
    ],
    ids=str,
)
def test_the_recorded_logits_notice_each_part_of_yarn(changes):
    model, expected = recorded()
    scaling = changes.get("rope_scaling", model.config.rope_scaling | changes)
    wrong = LatentGPT(replace(model.config, rope_scaling=scaling)).eval()
    wrong.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (wrong(expected["tokens"]) - expected["logits"]).abs().max() > 1e-3


def test_older_spellings_of_config_mean_the_same(tmp_path):
    v4 = json.loads((FIXTURES / "deepseek-dense" / "config_v4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(v4))
    weights = (FIXTURES / "deepseek-dense" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert LatentGPT.from_pretrained(tmp_path).config == recorded()[0].config


def test_saving_and_loading_returns_the_same_model(tmp_path):
    model, expected = recorded()
    model.save_pretrained(tmp_path)
    assert concept_of(tmp_path) == "attention_variants.latent"
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "expected one of DeepseekV2ForCausalLM"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
            "original_max_position_embeddings of rope_type 'yarn' is missing",
        ),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate 1: expected true or false"),
        ({"rope_parameters": YARN | {"ramp": 2.0}}, "ramp of rope_type 'yarn' is not implemented"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "factor 0.5 of rope_type 'yarn': expected at least 1"),
        ({"rope_parameters": YARN | {"beta_fast": "1"}}, "beta_fast '1': expected a number"),
        ({"num_key_value_heads": 2}, "n_kv_heads 2"),
        ({"qk_rope_head_dim": 11}, "d_rope 11"),
        ({"kv_lora_rank": 12}, "shape"),
    ],
)
def test_config_features_we_lack_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LatentGPT.from_pretrained(copy_of(FIXTURES / "deepseek-dense", tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_kv_heads": 2}, "n_kv_heads 2"),
        ({"d_head": 16}, "d_head 16"),
        ({"qk_norm": True}, "qk_norm True"),
        ({"window": 8}, "window 8"),
        ({"d_rope": 3}, "d_rope 3"),
        ({"d_nope": 3}, "d_nope 3"),
    ],
)
def test_a_config_that_a_latent_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# --- special cases


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_absorbed_is_expanded(name):
    """To the rounding of float64, also where all queries are computed so."""
    layer = small(torch.float64, **VARIANTS[name]).model.layers[0].self_attn
    q_n, q_r, c = torch.randn(2, 9, 4, 10), torch.randn(2, 9, 4, 12), torch.randn(2, 9, 1, 32)
    arguments = [x.double() for x in (q_n, q_r, c)] + [{"causal": True}]
    expanded, absorbed = layer.expanded(*arguments), layer.absorbed(*arguments)
    assert expanded.shape == absorbed.shape == (2, 9, 4, layer.d_value)
    assert (expanded - absorbed).abs().max() < 1e-12 and expanded.std() > 0.1


@torch.no_grad()
def test_latents_as_large_as_all_heads_are_the_attention_of_gpt():
    """Where c is x without its norm, K_r = 0 and positions are zero: ordinary keys and values of x."""
    config = gpt.Config(1, 4, 32, 24, 61)
    theirs = gpt.Attention(config, 0).double()
    ours = LatentAttention(replace(SMALL, kv_rank=32, d_nope=8, d_rope=2, d_value=8), 0).double()
    ours.kv_a_layernorm = torch.nn.Identity()
    ours.kv_a_proj_with_mqa.weight.copy_(torch.cat((torch.eye(32), torch.zeros(2, 32))))
    k, v = (layer.weight.view(4, 8, 32) for layer in (theirs.k_proj, theirs.v_proj))
    ours.kv_b_proj.weight.copy_(torch.cat((k, v), dim=1).reshape(64, 32))
    q = torch.cat((theirs.q_proj.weight.view(4, 8, 32), torch.zeros(4, 2, 32)), dim=1)
    ours.q_proj.weight.copy_(q.reshape(40, 32))
    ours.o_proj.load_state_dict(theirs.o_proj.state_dict())
    ours.scale = 8**-0.5
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    rotation = gpt.rope(torch.zeros(1, 12), 100.0, 2)
    assert (ours(x, rotation, None, None) - theirs(x, None, None, None)).abs().max() < 1e-12


def test_scores_grow_as_deepseek_scales_them():
    """By 1.874 in V3 and 1.590 in V2, whose context grew 40 times."""
    for mscale, expected in ((1.0, 1.874), (0.707, 1.590)):
        scaling = {**YARN, "factor": 40.0, "mscale": mscale, "mscale_all_dim": mscale}
        angles, scores = yarn_factor(scaling), latent.growth_of_scores(scaling)
        assert angles == 1.0 and scores == pytest.approx(expected, abs=5e-4)
        layer = LatentAttention(replace(SMALL, rope_scaling=scaling), 0)
        assert layer.scale == pytest.approx(22**-0.5 * scores)


def test_yarn_with_factor_1_changes_nothing():
    scaling, positions = YARN | {"factor": 1.0}, torch.arange(5)
    torch.testing.assert_close(gpt.rope(positions, 100.0, 12, scaling), gpt.rope(positions, 100.0, 12))
    assert latent.growth_of_scores(scaling) == 1.0


# --- who sees whom


def test_a_changed_token_changes_no_logits_before_it():
    assert first_changes(small(torch.float64), 16) == list(range(16))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_gives_the_logits_of_a_full_pass(name):
    assert cache_error(small(torch.float64, **VARIANTS[name]), 16, 7) < 1e-12


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_holds_the_latent_alone(static):
    cache = small().new_cache([3, 5], 16, static=static)
    assert [keys.shape for keys in cache.keys] == [(2, 16, 1, 32)] * 2  # R + K_r
    assert all(keys is values for keys, values in zip(cache.keys, cache.values, strict=True))


def test_a_static_cache_gives_the_same_tokens():
    model, prompts = small(), [[3, 1, 4], [1, 5, 9, 2, 6]]
    lengths, caches = [len(row) for row in prompts], []
    padded = torch.tensor([row + row[-1:] * (5 - len(row)) for row in prompts])
    with torch.no_grad():
        for static in (False, True):
            cache = model.new_cache(lengths, 8, static=static)
            model(padded, cache=cache)
            caches.append(model(torch.tensor([[7], [8]]), cache=cache))
    torch.testing.assert_close(*caches)


def test_documents_in_one_row_do_not_see_each_other():
    model, tokens = small(torch.float64), tokens_of(12)[:1]
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
        apart = torch.cat((model(tokens[:, :5]), model(tokens[:, 5:])), dim=1)
    assert (packed - apart).abs().max() < 1e-12


def test_rearranged_for_few_rows_it_generates_the_same():
    model = small()
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    short, long = (model.generate(prompts, n, temperature=0) for n in (8, few_rows.STEPS))
    assert [row[:8] for row in long] == short  # the longer one is rearranged


def test_an_adapter_of_the_expansion_works_in_both_ways():
    model = small(torch.float64)
    apply(model, Adapter(r=2, target_modules="kv_b_proj"))
    with torch.no_grad():
        before = model(tokens_of(9))
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        assert (model(tokens_of(9)) - before).abs().max() > 1e-3
    assert cache_error(model, 9, 4) < 1e-12


# --- cost, training


def test_flops_are_those_of_the_products_that_pytorch_counts():
    """But for masked scores, which need none, and the zeros that make values as wide as keys."""
    model, T = LatentGPT(replace(SMALL, q_rank=18, kernels="reference")), 16
    with FlopCounterMode(display=False) as counter:
        model(tokens_of(T)).sum().backward()
    c = model.config
    of_layers = 6 * c.n_layers * c.n_heads
    masked, padded = of_layers * (c.K + c.d_value) * (T - (T + 1) / 2), of_layers * (c.K - c.d_value) * T
    counted = counter.get_total_flops() / (2 * T)
    assert c.flops_per_token(T) == pytest.approx(counted - masked - padded, rel=1e-6)


def test_the_page_has_what_tiny_costs():
    assert costs(LatentGPT(SIZES["tiny"])) == documented_costs("latent")


def test_it_trains_and_the_model_is_saved_as_a_deepseek(tmp_path):
    directory = trained(tmp_path, "latent", mup=64, lr=0.003)
    hf = json.loads((directory / "config.json").read_text())
    assert hf["architectures"] == ["DeepseekV2ForCausalLM"]
    assert open_model(directory).config.kv_rank == 32


def test_a_setting_that_makes_no_sense_is_one_line(tmp_path, capsys):
    argv = flags(write_text(tmp_path / "text.txt"), tmp_path / "run", model="latent")
    assert "d_rope 3" in refused(capsys, [*argv, "--set", "d_rope=3"])
