"""Prefix language modelling against the mask that defines it, and against a decoder and an encoder."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import rows_of
from small_gpt import SMALL, flags, refused
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gpt
import moe
from generate import generate
from gpt import GPT
from language import prefix_lm
from language.prefix_lm import PrefixModel, hidden_behind


def small(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SMALL, vocab_size=61, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def by_mask(model: GPT, P: int, monkeypatch) -> Tensor:
    """Return the hidden states of TOKENS in one pass, in which attention has the mask j <= i or j < P."""

    def masked(q, k, v, **_):
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = (j <= i) | (j < P)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "attention", masked)
        return model.hidden(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("P", [1, 5, 12])
def test_two_passes_are_one_pass_with_the_mask(P, positions, monkeypatch):
    model = small(positions=positions)
    expected = by_mask(model, P, monkeypatch)[:, P - 1 :]
    torch.testing.assert_close(
        hidden_behind(model, TOKENS[:, :P], TOKENS[:, P:]), expected, atol=2e-5, rtol=0
    )


@torch.no_grad()
def test_a_prefix_of_one_token_is_a_decoder():
    model = small()
    hidden = hidden_behind(model, TOKENS[:, :1], TOKENS[:, 1:])
    torch.testing.assert_close(hidden, model.hidden(TOKENS), atol=2e-5, rtol=0)


@torch.no_grad()
def test_no_target_reveals_itself():
    """A change of token t moves no prediction of a token up to t, but every later one."""
    model = small()
    before = hidden_behind(model, TOKENS[:, :5], TOKENS[:, 5:])
    for t in (5, 8):
        changed = TOKENS.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = hidden_behind(model, changed[:, :5], changed[:, 5:])
        moved = (after != before).any(-1).any(0)
        assert moved.tolist() == [i + 5 > t for i in range(8)]  # place i predicts token i + 5


def test_gradients_are_those_of_one_pass(monkeypatch):
    results = []
    for one_pass in (True, False):
        model = small()
        hidden = (
            by_mask(model, 5, monkeypatch)[:, 4:]
            if one_pass
            else hidden_behind(model, TOKENS[:, :5], TOKENS[:, 5:])
        )
        hidden.square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_blocks_that_are_computed_again_have_the_same_gradients():
    results = []
    for again in (False, True):
        model = small()
        for block in model.model.layers if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        hidden_behind(model, TOKENS[:, :5], TOKENS[:, 5:]).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_batch_has_one_length_of_prefix_and_its_loss_is_that_of_the_rest():
    rows, lengths, model = rows_of(TOKENS), set(), small()
    for seed in range(40):
        batch = prefix_lm.make_batch(rows, model.config, torch.Generator().manual_seed(seed), None)
        P = batch["prefix"].shape[1]
        lengths.add(P)
        assert torch.equal(torch.cat((batch["prefix"], batch["targets"]), 1), TOKENS)
        assert torch.equal(batch["targets"][:, :-1], batch["tokens"])
    assert lengths == set(range(1, 11))
    with torch.no_grad():
        logits = model.logits(hidden_behind(model, batch["prefix"], batch["tokens"]))
        expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        assert abs(prefix_lm.loss(model, batch)[0] - expected) < 1e-5


@torch.no_grad()
def test_generation_reads_prompts_of_different_lengths_from_both_sides():
    """Each greedy token is the likeliest by two passes over the prompt and what was written."""
    model, prompts = small(), [TOKENS[0, :4].tolist(), TOKENS[1, :9].tolist()]
    written = generate(PrefixModel(model), prompts, 8, temperature=0)
    for prompt, new in zip(prompts, written, strict=True):
        hidden = hidden_behind(model, torch.tensor([prompt]), torch.tensor([new[:-1]]))
        assert model.logits(hidden)[0].argmax(-1).tolist() == new


def test_a_mixture_with_balance_losses_is_refused_since_they_are_not_computed():
    config = moe.Config(1, 2, 16, 32, 61, 64, n_experts=4, top_k=2, d_expert=8)
    with pytest.raises(ValueError, match="no part of this task's loss; add --set aux_loss_coef=0"):
        prefix_lm.wrap(moe.MoEGPT(config), config)
    model = moe.MoEGPT(replace(config, aux_loss_coef=0.0))
    assert prefix_lm.wrap(model, model.config) is model


def test_windows_and_compiled_generation_are_refused():
    with pytest.raises(ValueError, match="window 4: a prefix is seen as a whole"):
        PrefixModel(small(window=4))
    with pytest.raises(ValueError, match="does not run compiled"):
        PrefixModel(small()).new_cache([3], 8, static=True)


def test_documents_of_their_own_are_refused(text, tmp_path, capsys):
    argv = flags(text, tmp_path / "run", model="prefix_lm", document_mask=True)
    assert "--document-mask: a prefix and what follows it are one row" in refused(capsys, argv)
