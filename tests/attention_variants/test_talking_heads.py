"""Talking heads against gpt.py, whose attention they are with identity matrices, and against themselves."""

from dataclasses import replace

import pytest
import torch
from small_variants import cache_error, costs, documented_costs, first_changes, shake, tokens_of, trained
from torch.utils.flop_counter import FlopCounterMode

from attention_variants.talking_heads import SIZES, Config, TalkingHeads
from formats.open_model import concept_of, open_model
from gpt import GPT

SMALL = Config(2, 4, 32, 24, vocab_size=61, max_seq_len=64, n_kv_heads=2, qk_norm=True)


def small(**changes):
    torch.manual_seed(0)
    return shake(TalkingHeads(replace(SMALL, **changes)).double())


@pytest.mark.parametrize("changes", [{}, {"window": 5, "full_layers": (1,)}], ids=["", "window"])
@torch.no_grad()
def test_identity_matrices_are_the_attention_of_gpt(changes):
    model = small(**changes)
    plain = GPT(model.config).double()
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if "_mix_proj" not in name})
    assert (model(tokens_of(12)) - plain(tokens_of(12))).abs().max() > 1e-2
    for block in model.model.layers:
        for layer in (block.self_attn.scores_mix_proj, block.self_attn.weights_mix_proj):
            layer.weight.copy_(torch.eye(4))
    packed = {"cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32)}
    for arguments in ({}, packed):
        tokens = tokens_of(12)[: 1 if arguments else 2]
        assert (model(tokens, **arguments) - plain(tokens, **arguments)).abs().max() < 1e-12


def test_a_new_model_is_ordinary_attention():
    for name, p in TalkingHeads(SMALL).named_parameters():
        assert "_mix_proj" not in name or torch.equal(p, torch.eye(4))


@torch.no_grad()
def test_heads_may_be_renamed():
    """A permutation of the heads, also of the rows and columns of both matrices, changes nothing."""
    model = small(n_kv_heads=4)
    layer, order = model.model.layers[0].self_attn, torch.tensor([2, 0, 3, 1])
    before = model(tokens_of(9))
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.weight.copy_(projection.weight.view(4, 8, 32)[order].reshape(32, 32))
    layer.o_proj.weight.copy_(layer.o_proj.weight.view(32, 4, 8)[:, order].reshape(32, 32))
    for mix in (layer.scores_mix_proj, layer.weights_mix_proj):
        mix.weight.copy_(mix.weight[order][:, order])
    assert (model(tokens_of(9)) - before).abs().max() < 1e-12


def test_a_changed_token_changes_no_logits_before_it():
    assert first_changes(small(), 12, noise=1e-12) == list(range(12))


@pytest.mark.parametrize("changes", [{}, {"window": 5}], ids=["", "window"])
def test_a_cache_gives_the_logits_of_a_full_pass(changes):
    assert cache_error(small(**changes), 14, 7) < 1e-12


def test_rows_of_different_lengths_are_continued_as_alone():
    model, prompts = small(), [[3, 1, 4], [1, 5, 9, 2, 6]]
    alone = [model.generate([prompt], 6, temperature=0)[0] for prompt in prompts]
    assert model.generate(prompts, 6, temperature=0) == alone


def test_flops_are_those_of_the_products_that_pytorch_counts():
    """But for masked scores, which need none."""
    model, T = TalkingHeads(SMALL), 16
    with FlopCounterMode(display=False) as counter:
        model(tokens_of(T)).sum().backward()
    c = model.config
    masked = 12 * c.n_layers * c.n_heads * (c.K + c.n_heads) * (T - (T + 1) / 2)
    assert c.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (2 * T) - masked, rel=1e-3)


def test_the_page_has_what_tiny_costs():
    assert costs(TalkingHeads(SIZES["tiny"])) == documented_costs("talking_heads")


def test_it_trains_and_is_opened_again(tmp_path):
    directory = trained(tmp_path, "talking_heads", mup=64, lr=0.003)
    assert concept_of(directory) == "attention_variants.talking_heads"
    mix = open_model(directory).model.layers[0].self_attn.scores_mix_proj.weight
    assert not torch.equal(mix, torch.eye(4)) and (mix - torch.eye(4)).abs().max() < 0.2
