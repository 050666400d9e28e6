"""The frontier is exact: its table, best-of-n and values of models, against sums over all sequences."""

import itertools
import math

import pytest
import torch
from conftest import run_command

import bert
from bert import BERT
from formats.open_model import open_model
from posttraining import frontier
from posttraining.frontier import Chain

# Computed with another program: reward and KL of the optimum by beta, and of the best of n samples.
OPTIMA = {
    math.inf: (2, 0),
    4: (2.723492, 0.094100),
    2: (3.598135, 0.424502),
    1: (5.384317, 1.752026),
    0.5: (7.253710, 4.365888),
    0.25: (7.917811, 6.114551),
    0.125: (7.998545, 6.510988),
}
BEST = {2: (2.87604, 0.17979), 4: (3.72389, 0.61317), 8: (4.49220, 1.16798), 16: (5.17615, 1.78314)}
BEST |= {64: (6.31332, 3.08308)}


def all_sequences(chain: Chain) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all S^T sequences (N, T), and their log-probabilities (N,) under the chain."""
    tokens = torch.tensor(list(itertools.product(range(chain.S), repeat=chain.T)))
    before = torch.cat([torch.full((len(tokens), 1), chain.begin), tokens[:, :-1]], dim=1)
    return tokens, chain.probs.log()[before, tokens].sum(dim=1)


def perturbed(scale: float, seed: int = 0):
    """Return the model of the chain with noise on all its weights: another policy."""
    model, generator = frontier.build_model(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("beta", OPTIMA)
def test_the_optimum_at_each_beta_is_the_one_of_the_published_table(beta):
    assert frontier.optimum(beta) == pytest.approx(OPTIMA[beta], abs=6e-7)


def test_the_optimum_is_the_reference_tilted_by_the_reward():
    chain, beta = Chain(S=3, T=5), 0.7
    tokens, log_p = all_sequences(chain)
    rewards = chain.reward(tokens)
    log_best = (log_p + rewards / beta).log_softmax(dim=0)
    reward, kl = (log_best.exp() * rewards).sum(), (log_best.exp() * (log_best - log_p)).sum()
    assert frontier.optimum(beta, chain) == pytest.approx((reward.item(), kl.item()), rel=1e-12)


@pytest.mark.parametrize("n", BEST)
def test_best_of_n_is_the_one_of_the_published_table_and_below_the_bound_and_the_frontier(n):
    reward, kl = frontier.best_of_n(n)
    assert (reward, kl) == pytest.approx(BEST[n], abs=6e-6)
    assert 0.012 < math.log(n) - (n - 1) / n - kl < 0.092
    assert reward < frontier.reward_at(kl)


def test_the_most_reward_at_a_kl_is_the_optimum_of_the_beta_that_has_it():
    for beta in (2, 1, 0.5):
        reward, kl = frontier.optimum(beta)
        assert frontier.reward_at(kl) == pytest.approx(reward, abs=1e-9)
        assert frontier.share_of_gain(reward, kl) == pytest.approx(1, abs=1e-9)
    assert frontier.reward_at(100.0) == pytest.approx(8, abs=1e-6)


def test_the_model_of_the_chain_is_the_chain_and_its_blocks_can_learn():
    model = frontier.build_model()
    reward, kl = frontier.value_of(model)
    assert reward == pytest.approx(2, abs=1e-6) and 0 <= kl < 1e-4
    model(torch.tensor([[4, 0, 3, 1]])).log_softmax(-1)[..., 3].sum().backward()
    assert all(block.self_attn.o_proj.weight.grad.abs().sum() > 0 for block in model.model.layers)


def test_the_value_of_a_model_is_the_sum_over_all_its_sequences():
    chain, model = Chain(), perturbed(0.02)
    tokens, log_ref = all_sequences(chain)
    inputs = torch.cat([torch.full((len(tokens), 1), chain.begin), tokens[:, :-1]], dim=1)
    firsts = inputs[:: chain.S]  # sequences that differ in the last token alone have the same logits
    with torch.no_grad():
        log_p = torch.cat(
            [model(part)[..., : chain.S].double().log_softmax(-1) for part in firsts.split(4096)]
        )
    log_p = log_p.repeat_interleave(chain.S, dim=0).gather(2, tokens[..., None])[..., 0].sum(dim=1)
    reward, kl = (log_p.exp() * chain.reward(tokens)).sum(), (log_p.exp() * (log_p - log_ref)).sum()
    found = frontier.value_of(model)
    assert found == pytest.approx((reward.item(), kl.item()), abs=1e-5) and kl > 0.01
    assert found[0] < frontier.reward_at(found[1])


def test_a_model_that_writes_begin_and_one_without_it_have_no_value():
    model = frontier.build_model()
    with torch.no_grad():
        model.lm_head.weight[4] = model.lm_head.weight[3]
    with pytest.raises(ValueError, match="other tokens than the 4 states"):
        frontier.value_of(model)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        frontier.value_of(model, Chain(S=5))


def test_a_model_that_is_no_decoder_has_no_policy(tmp_path):
    BERT(bert.Config(1, 2, 16, 32, 40, 8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a BERT has no policy of the chain; expected a decoder"):
        frontier.main([str(tmp_path)])


def test_what_is_written_outside_of_the_chain_is_measured_and_does_not_count():
    model = frontier.build_model()
    reward, kl, outside = frontier.exact_value(model)
    assert outside < 1e-9
    with torch.no_grad():  # BEGIN is 0.01 times as likely as state 3, after any token
        hidden = model.hidden(torch.arange(5)[:, None])[:, 0].double()
        logits = hidden @ model.lm_head.weight[3].double() + math.log(0.01)
        model.lm_head.weight[4] = (torch.linalg.pinv(hidden) @ logits).float()
    found = frontier.exact_value(model)
    # 0.01 p(3) at each of eight tokens, where p(3) is a quarter on average
    assert found.outside == pytest.approx(8 * 0.01 / 4, rel=0.05)
    assert found[:2] == pytest.approx((reward, kl), abs=1e-5)


def test_samples_follow_the_chain_and_are_the_same_for_a_seed():
    chain = Chain()
    tokens = chain.sample(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, chain.sample(20_000, torch.Generator().manual_seed(1)))
    assert chain.reward(tokens).mean().item() == pytest.approx(2, abs=0.05)  # five standard errors
    after = tokens[:, 1:][tokens[:, :-1] == 2].bincount(minlength=4) / (tokens[:, :-1] == 2).sum()
    assert torch.allclose(after.double(), chain.probs[2], atol=0.01)
    assert chain.reward(torch.tensor([[3, 0, 3, 1, 2, 0, 1, 3]])).tolist() == [3]


def test_the_reference_model_is_made_once_and_made_again_where_it_is_damaged(tmp_path):
    directory = frontier.reference_model(tmp_path)
    path = tmp_path / "chain" / "model.safetensors"
    weights, made = path.read_bytes(), path.stat().st_mtime_ns
    assert frontier.reference_model(tmp_path) == directory and path.stat().st_mtime_ns == made
    path.write_bytes(weights[:100])
    assert frontier.reference_model(tmp_path) == directory and path.read_bytes() == weights
    assert frontier.value_of(open_model(directory))[1] < 1e-4


@pytest.mark.usefixtures("rendered")
def test_the_command_prints_the_table_and_draws_models_under_the_frontier(tmp_path):
    directory = frontier.reference_model(tmp_path)
    done = run_command("-m", "posttraining.frontier", directory, "--out", tmp_path / "figure.png")
    assert done.code == 0 and "5.384317  1.752026" in done.out and f"{directory}: reward 2.0000" in done.out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    refused = run_command("-m", "posttraining.frontier", "--out", tmp_path / "figure.txt")
    assert refused.code == 2 and "figure.txt" in refused.err


def test_a_beta_of_nothing_is_refused():
    for beta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="expected a number above 0"):
            frontier.optimum(beta)
