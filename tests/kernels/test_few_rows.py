"""A model arranged for steps of few rows computes the same, and leaves the model as it was."""

import pytest
import torch
from test_gpt import small

from kernels import few_rows
from kernels.few_rows import Product, SmallNorm, arrange
from kernels.rmsnorm import rms_norm

CONFIGS = {
    "tied head": {},
    "norms of queries and keys": {"qk_norm": True},
    "norms of all heads": {"qk_norm": "all", "window": 5},
    "separate head": {"tie_embeddings": False},
    "biases": {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True},
}


@pytest.fixture(autouse=True, params=["Intel", "another CPU"])
def cpu(request, monkeypatch):
    """Take small matrices for large ones, on a CPU of either kind. Return which."""
    monkeypatch.setattr(few_rows, "is_intel_with_mkl", lambda: request.param == "Intel")
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "STEPS", 12)
    return request.param


def layout(model):
    return [(name, p.data_ptr(), p.stride(), p.clone()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_arranged_model_has_the_same_logits_and_tokens(name, n_rows, monkeypatch):
    model = small(**CONFIGS[name])
    before, tokens = layout(model), torch.randint(61, (n_rows, 1), generator=torch.Generator().manual_seed(0))
    arranged = arrange(model, n_rows, 64)
    found = {name.split(".", 3)[-1] for name, layer in arranged.named_modules() if isinstance(layer, Product)}
    mlp = "mlp.joined" if model.config.mlp == "swiglu" else "mlp.up_proj"
    assert found == {"lm_head", "self_attn.joined", "self_attn.o_proj", mlp, "mlp.down_proj"}
    torch.testing.assert_close(arranged(tokens), model(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(arranged(tokens.T), model(tokens.T), atol=1e-5, rtol=0)

    # Through generate, beside the model as it is.
    found = model.generate(tokens, 12, temperature=0)
    monkeypatch.setattr(few_rows, "arrange", lambda model, *_: model)
    assert found == model.generate(tokens, 12, temperature=0)
    for (*where, values), (*where_before, values_before) in zip(layout(model), before, strict=True):
        assert where == where_before and torch.equal(values, values_before)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_an_arranged_model_takes_at_most_one_more_copy_of_the_weights(n_rows, cpu):
    model = small()
    own = {p.data_ptr() for p in model.parameters()}
    weights = [layer.weight for layer in arrange(model, n_rows, 64).modules() if isinstance(layer, Product)]
    blocked = n_rows > 1 and torch.backends.mkldnn.is_available() and cpu != "Intel"
    assert all(weight.is_mkldnn == blocked for weight in weights)
    copied = [weight for weight in weights if blocked or weight.data_ptr() not in own]
    by_columns = [weight.stride() == (1, len(weight)) for weight in weights if not blocked]
    assert all(by_columns) if n_rows > 1 else blocked or all(w.stride() == (1, len(w)) for w in copied)
    assert copied and sum(w.numel() for w in copied) < sum(p.numel() for p in model.parameters())


def test_without_onednn_the_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(few_rows, "is_intel_with_mkl", lambda: False)
    layer, x = torch.nn.Linear(8, 5), torch.randn(3, 8)
    product = Product([layer.weight], [layer.bias], 3)
    assert product.weight.data_ptr() == layer.weight.data_ptr() and torch.equal(product(x), layer(x))


def test_the_copies_of_norms_and_joined_biases_are_exact():
    x, weight = torch.randn(3, 1, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None], torch.randn(8)
    expected = rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(SmallNorm(weight, 1e-5)(x).double(), expected, atol=1e-6, rtol=1e-6)
    layers = [torch.nn.Linear(8, n) for n in (3, 5)]
    for n_rows in (1, 3, 20):
        product = Product([y.weight for y in layers], [y.bias for y in layers], n_rows)
        rows = torch.randn(n_rows, 1, 8)
        torch.testing.assert_close(product(rows), torch.cat([y(rows) for y in layers], -1))


def test_layers_that_are_not_plain_are_not_joined():
    """As in a model with adapters, whose layers add something to the product."""

    class Adapted(torch.nn.Linear):
        pass

    model = small()
    attention = model.model.layers[0].self_attn
    attention.k_proj = Adapted(*attention.k_proj.weight.shape[::-1], bias=False)
    arranged, tokens = arrange(model, 1, 64), torch.tensor([[3, 4, 5]])
    first, second = (block.self_attn for block in arranged.model.layers[:2])
    assert not hasattr(first, "joined") and isinstance(first.k_proj, Adapted) and second.joined.sizes
    with torch.no_grad():
        torch.testing.assert_close(arranged(tokens), model(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_layers_of_which_only_some_have_a_bias_are_not_joined():
    model = small()
    attention = model.model.layers[0].self_attn
    attention.v_proj = torch.nn.Linear(*attention.v_proj.weight.shape[::-1], bias=True)
    arranged, tokens = arrange(model, 1, 64), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(arranged(tokens), model(tokens), atol=1e-5, rtol=0)


def test_a_model_that_gains_nothing_stays_as_it_is():
    model = small()
    assert arrange(model, 1, 11) is model  # too few tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert arrange(model, 1, 64) is model
    model = small().double()
    assert arrange(model, 1, 64) is model


def test_indices_are_drawn_with_their_probabilities_and_never_one_of_probability_0():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    found = few_rows.draw(p.repeat_interleave(40_000, dim=0), generator).view(2, -1)
    counts = torch.stack([row.bincount(minlength=6) for row in found]) / 40_000
    assert torch.allclose(counts, p, atol=0.0075) and not counts[p == 0].any()  # three standard errors
    again = few_rows.draw(p, torch.Generator().manual_seed(0))
    assert again.shape == (2, 1) and torch.equal(again, few_rows.draw(p, torch.Generator().manual_seed(0)))


def test_large_matrices_are_not_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: compiled.append(mode) or f)
    model = small()
    for rows in ([[1, 2]], [[1, 2], [3, 4]]):
        expected = model.generate(rows, 5, temperature=0)
        assert model.generate(rows, 5, temperature=0, compile=True) == expected
    assert not compiled
    monkeypatch.setattr(few_rows, "LARGE", 1600)  # only the embedding is as large
    model.generate([[1, 2], [3, 4]], 5, temperature=0, compile=True)
    assert len(compiled) == 1
