"""Mixture of block attention against full attention, a choice by hand, and itself."""

from dataclasses import dataclass, replace

import pytest
import torch
from small_gpt import flags, refused, write_text
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained
from torch.utils.flop_counter import FlopCounterMode

import moe
from attention_variants import moba
from attention_variants.moba import SIZES, Config, MoBA, choose
from formats.open_model import concept_of, open_model
from gpt import GPT
from kernels import attention
from kernels.selected_attention import selected_keys

SMALL = Config(
    2, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, qk_norm=True, block_size=3, n_selected=2
)


def small(**changes):
    torch.manual_seed(0)
    return shake(MoBA(replace(SMALL, **changes)).double())


def inputs(T, B=2, K=8):
    generator = torch.Generator().manual_seed(T)
    return (torch.randn(B, T, n, K, dtype=torch.float64, generator=generator) for n in (4, 2, 2))


@pytest.mark.parametrize(
    "changes", [{"n_selected": 5}, {"n_selected": 99}, {"block_size": 14, "n_selected": 1}]
)
@torch.no_grad()
def test_to_choose_all_blocks_is_full_attention(changes):
    model = small(**changes)
    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    assert (model(tokens_of(14)) - plain(tokens_of(14))).abs().max() < 1e-12
    assert (small()(tokens_of(14)) - plain(tokens_of(14))).abs().max() > 1e-2


@torch.no_grad()
def test_full_layers_are_those_of_gpt():
    model = small(full_layers=(0, 1))
    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens_of(14)), plain(tokens_of(14)))


def test_blocks_of_one_key_chosen_by_recency_are_a_window():
    q, k, v = inputs(9)
    p = torch.arange(9)
    latest = (p[:, None] - torch.arange(3)).clamp(min=-1)[None, :, None].expand(2, -1, 4, -1)
    out = moba.selected_attention(q, k, v, latest, 1)
    assert (out - attention(q, k, v, causal=True, window=3)).abs().max() < 1e-12


def test_a_head_chooses_its_own_block_and_those_with_the_best_means():
    """By hand, one query and head at a time."""
    (q, k, _), N, n = inputs(11), 3, 3
    chosen = choose(q, k, torch.arange(11)[None], N, n)
    for b in range(2):
        for i in range(11):
            for h in range(4):
                means = [k[b, s * N : s * N + N, h // 2].mean(0) for s in range(i // N)]
                best = sorted(range(i // N), key=lambda s: -(q[b, i, h] @ means[s]).item())
                expected = {i // N, *best[: n - 1]}
                found = chosen[b, i, h].tolist()
                assert set(found) - {-1} == expected and found.count(-1) == n - len(expected)


def test_of_equal_scores_the_earlier_block_wins():
    q, k = torch.zeros(1, 12, 4, 8), torch.randn(1, 12, 2, 8)
    assert choose(q, k, torch.arange(12)[None], 2, 3)[0, :, 0].tolist()[-1] == [5, 0, 1]


def test_a_choice_in_parts_is_the_same(monkeypatch):
    q, k, _ = inputs(13)
    p = torch.arange(13)[None]
    whole = choose(q, k, p, 2, 3)
    monkeypatch.setattr(moba, "CHUNK", 4)
    assert torch.equal(choose(q, k, p, 2, 3), whole)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_changed_token_changes_no_logits_before_it(n):
    """At every position of a block, and to the last bit."""
    assert first_changes(small(n_selected=n), 13) == list(range(13))


@pytest.mark.parametrize(
    "changes", [{}, {"full_layers": (1,)}, {"n_selected": 1}], ids=["", "hybrid", "own block"]
)
def test_a_cache_gives_the_logits_of_a_full_pass(changes):
    assert cache_error(small(**changes), 14, 7) < 1e-12


def test_rows_of_different_lengths_are_continued_as_alone():
    model, prompts = small(), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]]
    alone = [model.generate([prompt], 8, temperature=0)[0] for prompt in prompts]
    assert model.generate(prompts, 8, temperature=0) == alone


def test_slots_after_the_last_token_are_not_seen():
    """As in the cache of a compiled step, which always has all its slots."""
    layer, (q, k, v) = small().model.layers[0].self_attn, inputs(12)
    expected = layer.attend(q, k, v)[:, -1:]
    k, v = (torch.cat((x, torch.full_like(x[:, :5], 3.0)), dim=1) for x in (k, v))
    found = layer.attend(q[:, -1:], k, v, seqlens_k=torch.tensor([12, 12]))
    assert (found - expected).abs().max() < 1e-12


@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other():
    model, tokens = small(), tokens_of(12)[:1]
    packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 5, 12], dtype=torch.int32))
    apart = torch.cat((model(tokens[:, :5]), model(tokens[:, 5:])), dim=1)
    assert (packed - apart).abs().max() < 1e-12


@torch.no_grad()
def test_it_works_among_experts():
    """The attention takes the place of that of moe.py, where with all blocks nothing changes."""

    @dataclass(frozen=True)
    class Config(moba.Fields, moe.Config):
        pass

    class Block(moe.Block):
        attention = moba.Attention

    class Model(moe.MoEGPT):
        block = Block

    config = Config(2, 4, 32, 24, 61, 64, n_kv_heads=2, n_experts=4, block_size=3, n_selected=9)
    model = shake(Model(config).double())
    plain = moe.MoEGPT(config).double().eval()
    plain.load_state_dict(model.state_dict())
    assert (model(tokens_of(12)) - plain(tokens_of(12))).abs().max() < 1e-12


def test_flops_are_those_of_the_keys_that_are_seen():
    """Everything else is what PyTorch counts of full attention."""
    model, T = MoBA(replace(SMALL, kernels="reference", full_layers=(0, 1))), 16
    with FlopCounterMode(display=False) as counter:
        model(tokens_of(T)).sum().backward()
    c = model.config
    q, k, _ = inputs(T)
    seen = selected_keys(choose(q, k, torch.arange(T)[None], 3, 2), 3, T).sum().item() / (2 * 4)
    scored = sum(p // 3 for p in range(T))
    per_key, per_block = 12 * c.n_heads * c.K, 2 * c.n_heads * c.K
    full = counter.get_total_flops() / (2 * T) - c.n_layers * per_key * T
    assert SMALL.flops_per_token(T) == pytest.approx(
        full + c.n_layers * (per_key * seen + per_block * scored) / T, rel=1e-3
    )


def test_flops_count_no_full_layer_that_the_model_does_not_have():
    assert replace(SMALL, full_layers=(0, 7)).flops_per_token(16) == replace(
        SMALL, full_layers=(0,)
    ).flops_per_token(16)


def test_what_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="window 8"):
        replace(SMALL, window=8)
    with pytest.raises(ValueError, match="block_size 0: expected at least 1"):
        replace(SMALL, block_size=0)


def test_the_page_has_what_tiny_costs():
    assert costs(MoBA(SIZES["tiny"])) == documented_costs("moba")


def test_it_trains_and_is_opened_again(tmp_path):
    directory = trained(tmp_path, "moba", mup=64, lr=0.003)
    assert concept_of(directory) == "attention_variants.moba"
    assert open_model(directory).config.n_selected == 4


def test_a_setting_that_makes_no_sense_is_one_line(tmp_path, capsys):
    argv = flags(write_text(tmp_path / "text.txt"), tmp_path / "run", model="moba")
    assert "n_selected 0" in refused(capsys, [*argv, "--set", "n_selected=0"])
