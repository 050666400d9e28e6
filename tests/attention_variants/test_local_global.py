"""Gemma's local and global layers against transformers (recorded), gpt.py, and themselves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of
from safetensors.torch import load_file
from small_gpt import flags, refused, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained

import gpt
from attention_variants.local_global import SIZES, Attention, Config, LocalGlobal, Norm
from formats.open_model import concept_of, open_model
from kernels import few_rows

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = ["gemma2", "gemma3"]
SMALL = Config(
    3, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, d_head=16, query_scale=9.0, window=5,
    full_layers=(1,), qk_norm=True, rope_theta=1000.0, local_theta=100.0,
)  # fmt: skip
GEMMA2 = {"qk_norm": False, "local_theta": None, "attention_softcap": 3.0, "logit_softcap": 4.0}


def recorded(name):
    return LocalGlobal.from_pretrained(FIXTURES / name).eval(), load_file(
        FIXTURES / name / "expected.safetensors"
    )


def small(dtype=torch.float32, **changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    return shake(LocalGlobal(replace(SMALL, **changes)).to(dtype))


# --- parity with transformers


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_transformers(name):
    assert_logits_recorded(*recorded(name))


@pytest.mark.parametrize("name", RECORDED)
def test_greedy_tokens_equal_transformers(name):
    """Three prompts of different lengths in one batch; the windows are passed several times over."""
    assert_greedy_recorded(*recorded(name))


MISTAKES = {
    "a window one too small": {"window": 7},
    "a window one too large": {"window": 9},
    "scores over sqrt(K)": {"query_scale": 16.0},
    "the same base in all layers": {"local_theta": None},
    "scaled positions in local layers": {"rope_scaling": None},
    "no cap of the scores": {"attention_softcap": None},
    "no cap of the logits": {"logit_softcap": None},
    "global layers one further": {"full_layers": (0,)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_recorded_logits_notice_each_likely_mistake(mistake):
    differences = []
    for name in RECORDED:
        model, expected = recorded(name)
        wrong = LocalGlobal(replace(model.config, **MISTAKES[mistake])).eval()
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            differences.append((wrong(expected["tokens"]) - expected["logits"]).abs().max().item())
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", RECORDED)
def test_older_spellings_of_config_mean_the_same(name, tmp_path):
    v4 = json.loads((FIXTURES / name / "config_v4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(v4))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / name / "model.safetensors").read_bytes())
    assert LocalGlobal.from_pretrained(tmp_path).config == recorded(name)[0].config


@pytest.mark.parametrize("name", RECORDED)
def test_saving_and_loading_returns_the_same_model(name, tmp_path):
    model, expected = recorded(name)
    model.save_pretrained(tmp_path)
    assert concept_of(tmp_path) == "attention_variants.local_global"
    again = open_model(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "query_scale": None, "logit_softcap": 4.0},
        {"window": None, "full_layers": (), "tie_embeddings": False},
        GEMMA2,
    ],
    ids=["gemma3", "gemma3 scaled", "gemma3 all global", "gemma2"],
)
def test_transformers_opens_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**changes)
    model.save_pretrained(tmp_path)
    options = {"output_loading_info": True, "attn_implementation": "eager"}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = (model(tokens_of(24)) - theirs.eval()(tokens_of(24)).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma3", {"architectures": ["LlamaForCausalLM"]}, "expected one of Gemma2ForCausalLM"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not implemented"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters 'chunked_attention'"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "rope_type of sliding_attention is not implemented"),
        ("gemma3", {"sliding_window": None}, "sliding_window null"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    ],
)  # fmt: skip
def test_config_features_we_lack_are_named(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LocalGlobal.from_pretrained(copy_of(FIXTURES / name, tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_softcap": 3.0}, "attention_softcap 3.0: Gemma 3"),
        ({"qk_norm": False}, "local_theta 100.0: Gemma 2"),
        (
            {"local_theta": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "without local_theta",
        ),
    ],
)
def test_a_model_that_is_no_gemma_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(**changes).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field, value", [("mlp", "gelu"), ("qk_norm", "all"), ("bias", True)])
def test_a_config_that_gemma_does_not_have_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} {value!r}"):
        replace(SMALL, **{field: value})


# --- special cases


@torch.no_grad()
def test_one_kind_of_layer_and_a_scale_of_k_is_the_attention_of_gpt():
    """Also with the norms, whose factor 1 + w is then 1."""
    for full_layers in ((), (0, 1, 2)):
        changes = {"query_scale": None, "local_theta": None, "full_layers": full_layers}
        config = replace(SMALL, **changes)
        ours, theirs = Attention(config, 0).double(), gpt.Attention(config, 0).double()
        ours.q_norm.weight.zero_(), ours.k_norm.weight.zero_()
        theirs.load_state_dict(ours.state_dict())
        theirs.q_norm.weight.fill_(1.0), theirs.k_norm.weight.fill_(1.0)
        x = torch.randn(2, 12, 32, dtype=torch.float64)
        rotation = gpt.rope(torch.arange(12)[None], 1000.0, 16)
        difference = ours(x, (rotation, rotation), None, None) - theirs(x, rotation, None, None)
        assert difference.abs().max() < 1e-12


@torch.no_grad()
def test_windows_as_long_as_the_text_are_global_layers():
    model, same_base = small(torch.float64, window=24), {"local_theta": None}
    a, b = (
        LocalGlobal(replace(model.config, **same_base, **changes)).double().eval()
        for changes in ({}, {"window": None, "full_layers": ()})
    )
    a.load_state_dict(model.state_dict()), b.load_state_dict(model.state_dict())
    assert (a(tokens_of(24)) - b(tokens_of(24))).abs().max() < 1e-12
    assert (a(tokens_of(25)) - b(tokens_of(25))).abs().max() > 1e-6  # one token further they differ


@torch.no_grad()
def test_a_high_cap_is_none():
    capped = small(torch.float64, **GEMMA2 | {"attention_softcap": 1e7, "logit_softcap": 1e9})
    free = small(torch.float64, **GEMMA2 | {"attention_softcap": None, "logit_softcap": None})
    assert (capped(tokens_of(12)) - free(tokens_of(12))).abs().max() < 1e-9


@torch.no_grad()
def test_the_factor_of_the_embeddings_may_move_into_the_matrix_and_out_of_the_head():
    model = small(torch.float64)
    moved = LocalGlobal(replace(model.config, tie_embeddings=False)).double().eval()
    weights = model.state_dict()
    embeddings = weights["model.embed_tokens.weight"]
    moved.load_state_dict(weights | {"lm_head.weight": embeddings})
    moved.model.embed_tokens.weight.mul_(32**0.5)
    moved.model.embed_tokens.__class__ = torch.nn.Embedding
    assert (model(tokens_of(12)) - moved(tokens_of(12))).abs().max() < 1e-12


def test_the_factor_of_the_embeddings_is_rounded_to_the_dtype_of_the_weights():
    model = LocalGlobal(replace(SMALL, n_heads=3, n_kv_heads=1, d_model=48))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        exact = model.model.embed_tokens(tokens_of(1))
        rounded = model.bfloat16().model.embed_tokens(tokens_of(1))
    assert exact.unique().item() == pytest.approx(48**0.5, rel=1e-6) and rounded.unique().item() == 6.9375


def test_a_norm_rounds_once():
    norm = Norm(64, SMALL).bfloat16()
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        norm.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        assert torch.equal(norm(x), (wide * (1 + norm.weight.float())).bfloat16())
        assert not torch.equal(norm(x), wide.bfloat16() * (1 + norm.weight))  # as Llama rounds


def test_at_the_start_all_norms_multiply_by_one():
    norms = [module for module in LocalGlobal(SMALL).modules() if isinstance(module, Norm)]
    assert len(norms) == 3 * 6 + 1 and all((norm.weight == 0).all() for norm in norms)


# --- who sees whom


@torch.no_grad()
def test_a_token_sees_exactly_its_window_in_local_layers():
    """The gradient of the last token's output reaches `window` tokens, of which it is one itself."""
    for window in (1, 4, 5):
        layer = Attention(replace(SMALL, window=window), 0).double()
        layer.q_norm.weight.zero_(), layer.k_norm.weight.zero_()
        x = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            rotation = gpt.rope(torch.arange(12)[None], 100.0, 16)
            layer(x, (rotation, rotation), None, None)[0, -1].square().sum().backward()
        seen = x.grad[0].abs().sum(-1) > 0
        assert seen.tolist() == [False] * (12 - window) + [True] * window


def test_a_changed_token_changes_no_logits_before_it():
    assert first_changes(small(torch.float64), 16) == list(range(16))


@pytest.mark.parametrize("changes", [{}, GEMMA2], ids=["gemma3", "gemma2"])
def test_a_cache_gives_the_logits_of_a_full_pass(changes):
    model = small(torch.float64, **changes)
    assert cache_error(model, 20, 7) < 1e-12
    cache = model.new_cache([7, 7], 20)
    assert [keys.shape[1] for keys in cache.keys] == [5, 20, 5]  # a local layer keeps its window


def test_rearranged_for_few_rows_it_computes_the_same():
    model = small()
    arranged = few_rows.arrange(model, 2, 100)
    assert arranged is not model
    with torch.no_grad():
        assert (arranged.hidden(tokens_of(9)) - model.hidden(tokens_of(9))).abs().max() < 1e-4


# --- sizes, cost, training

PUBLISHED = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}


def test_parameter_counts_are_the_published_ones():
    for size, published in PUBLISHED.items():
        config = replace(SIZES[size], n_layers=1)  # the layers are alike
        with torch.device("meta"):
            model = LocalGlobal(config)
        of_layer = sum(p.numel() for p in model.model.layers.parameters())
        rest = sum(p.numel() for p in model.parameters()) - of_layer
        assert rest + SIZES[size].n_layers * of_layer == published


def test_the_page_has_what_tiny_costs():
    assert costs(LocalGlobal(SIZES["tiny"])) == documented_costs("local_global")
    assert costs(gpt.GPT(gpt.SIZES["tiny"])) == documented_costs("gpt")


def test_one_layer_in_six_or_two_is_global():
    assert SIZES["gemma3-1b"].full_layers == (5, 11, 17, 23)
    assert SIZES["gemma2-2b"].full_layers == tuple(range(1, 26, 2))


def test_it_trains_and_the_model_is_saved_as_a_gemma(tmp_path):
    directory = trained(tmp_path, "local_global")
    hf = json.loads((directory / "config.json").read_text())
    assert hf["architectures"] == ["Gemma3ForCausalLM"]
    assert open_model(directory).config.window == 32


def test_width_transfer_is_refused(tmp_path, capsys):
    argv = flags(write_text(tmp_path / "text.txt"), tmp_path / "run", model="local_global", mup=64, lr=0.001)
    assert "leave out --mup" in refused(capsys, argv)
