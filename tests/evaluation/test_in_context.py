"""In-context learning: the predictors are optimal for what they see, and the measures count what they say."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Generator

from evaluation import in_context
from evaluation.in_context import PREDICTORS, T, V, bayes, draw_chains, nats, one_match, reordered
from evaluation.small_runs import small_gpt


def chains(n=200, seed=0, alpha=1.0):
    return draw_chains(n, Generator().manual_seed(seed), alpha)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_product_of_bayes_predictions_is_the_closed_form_of_dirichlet_and_multinomial(alpha):
    symbols = chains(5)[0]
    found = bayes(symbols, alpha).gather(-1, symbols[:, 1:, None]).log().sum((1, 2))
    for row, value in zip(symbols.tolist(), found.tolist(), strict=True):
        # p(x) = prod_a Gamma(V alpha) / Gamma(V alpha + n_a) prod_b Gamma(alpha + n_ab) / Gamma(alpha)
        counts = [[0] * V for _ in range(V)]
        for a, b in pairwise(row):
            counts[a][b] += 1
        expected = sum(
            math.lgamma(V * alpha)
            - math.lgamma(V * alpha + sum(n))
            + sum(math.lgamma(alpha + k) - math.lgamma(alpha) for k in n)
            for n in counts
        )
        assert value == pytest.approx(expected, abs=1e-9)


def test_predictors_agree_with_their_definitions_one_symbol_after_another():
    symbols = chains(4)[0]
    single, matched = in_context.unigram(symbols), one_match(symbols)
    for i, row in enumerate(symbols.tolist()):
        for t in (0, 1, 7, T - 1):
            seen = row[: t + 1]
            assert single[i, t].tolist() == pytest.approx(
                [(seen.count(b) + 1) / (t + 1 + V) for b in range(V)]
            )
            earlier = [j for j in range(t) if seen[j] == seen[t]]
            weights = [1.0] * V
            if earlier:
                weights[row[earlier[-1] + 1]] += 1
            assert matched[i, t].tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert all(torch.allclose(p(symbols).sum(-1), torch.ones(4, T).double()) for p in PREDICTORS.values())


def test_the_optimum_is_that_of_the_published_task_and_no_predictor_beats_it():
    symbols, true = chains(1500)
    loss = {name: nats(p(symbols), true).mean().item() for name, p in PREDICTORS.items()}
    assert loss["uniform"] == pytest.approx(math.log(3))
    assert loss["Bayes"] == pytest.approx(0.8796, abs=0.01) and loss["unigram"] == pytest.approx(
        1.0019, abs=0.01
    )
    assert min(loss, key=loss.get) == "Bayes"

    # A loss above the optimum is the mean KL, for every predictor.
    best = bayes(symbols)
    for name, p in PREDICTORS.items():
        kl = (best * (best / p(symbols)).log()).sum(-1).mean().item()
        assert loss[name] - loss["Bayes"] == pytest.approx(kl, abs=0.01), name

    # For chains of another prior, Bayes with that prior is better than with 1.
    symbols, true = chains(1000, alpha=0.3)
    assert nats(bayes(symbols, 0.3), true).mean() < nats(bayes(symbols), true).mean() - 0.01


def test_chains_are_drawn_from_their_own_distributions_and_the_same_each_time():
    symbols, true = chains(2000)
    assert torch.equal(symbols, chains(2000)[0]) and not torch.equal(symbols, chains(2000, seed=1)[0])
    # Where a symbol has probability p, it comes in a share p of the cases.
    for least, most in ((0.0, 0.2), (0.4, 0.6), (0.8, 1.0)):
        p = true[..., 0]
        some = (p >= least) & (p <= most)
        assert (symbols[:, 1:] == 0)[some].double().mean() == pytest.approx(p[some].mean().item(), abs=0.01)


def test_reordering_keeps_the_symbols_and_the_last_two_in_their_places():
    symbols = chains()[0]
    other = reordered(symbols, Generator().manual_seed(1))
    assert torch.equal(other[:, -2:], symbols[:, -2:]) and not torch.equal(other, symbols)
    assert torch.equal(other.sort(1).values, symbols.sort(1).values)


def test_attention_weights_are_those_that_the_layer_uses(monkeypatch):
    model, symbols = small_gpt(V, T, seed=0, width=32), chains(2)[0]
    layer, inputs = model.model.layers[-1].self_attn, []
    layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments))
    outputs = []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    with torch.no_grad():
        model(symbols[:, :-1])
        weights = in_context.attention_of(layer, *inputs[0][:2])
        values = layer.v_proj(inputs[0][0]).view(2, T, -1, layer.d_head)
        expected = layer.o_proj(torch.einsum("bhts,bshk->bthk", weights, values).flatten(2))
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-6)

    # Uniform attention has on followers the share that followers are.
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    monkeypatch.setattr(in_context, "attention_of", lambda *arguments: even.expand(2, 1, T, T))
    on_followers, followers = in_context.induction(model, symbols)
    assert on_followers == pytest.approx(followers, abs=1e-6)
    pairs = [
        sum(row[j - 1] == row[t] for j in range(1, t)) / (t + 1)
        for row in symbols.tolist()
        for t in range(T // 2, T)
    ]
    assert followers == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_the_command_prints_every_predictor_and_both_depths(monkeypatch, capsys):
    for name, value in (("N_TEST", 8), ("BATCH", 2), ("T", 12)):
        monkeypatch.setattr(in_context, name, value)
    in_context.main(["--steps", "1", "--seeds", "2"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in (*PREDICTORS, "GPT, 1 layer", "GPT, 2 layers"))
    assert printed.count("chains of alpha") == 6 and printed.count(" to ") > 10
    with pytest.raises(ValueError, match="--steps 0: expected at least 1"):
        in_context.main(["--steps", "0"])
