"""A model arranged for products of few rows computes the same, and leaves the model as it was."""

import pytest
import torch
from test_gpt import small

from kernels import few_rows
from kernels.few_rows import Wide, arrange

CONFIGS = {
    "tied head": {},
    "separate head": {"tie_embeddings": False},
    "biases": {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True},
}


@pytest.fixture(autouse=True)
def small_matrices_are_large(monkeypatch):
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "STEPS", 12)


def layout(model):
    return [(name, p.data_ptr(), p.stride(), p.clone()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_arranged_model_has_the_same_logits_and_tokens(name, n_rows, monkeypatch):
    model = small(**CONFIGS[name])
    before, tokens = layout(model), torch.randint(61, (n_rows, 1), generator=torch.Generator().manual_seed(0))
    arranged = arrange(model, n_rows, 64)
    wide = {name for name, layer in arranged.named_modules() if isinstance(layer, Wide)}
    assert "lm_head" in wide and "model.layers.0.mlp.up_proj" in wide
    torch.testing.assert_close(arranged(tokens), model(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(arranged(tokens.T), model(tokens.T), atol=1e-5, rtol=0)

    # Through generate, beside the model as it is.
    found = model.generate(tokens, 12, temperature=0)
    monkeypatch.setattr(few_rows, "arrange", lambda model, *_: model)
    assert found == model.generate(tokens, 12, temperature=0)
    for (*where, values), (*where_before, values_before) in zip(layout(model), before, strict=True):
        assert where == where_before and torch.equal(values, values_before)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_an_arranged_model_takes_at_most_one_more_copy_of_the_weights(n_rows):
    model = small()
    arranged, own = arrange(model, n_rows, 64), {p.data_ptr() for p in model.parameters()}
    copied = {p.data_ptr(): p for p in arranged.parameters() if p.data_ptr() not in own}
    if n_rows > 1:
        assert not copied
    else:
        assert copied and all(p.stride() == (1, len(p)) for p in copied.values())
        assert sum(p.numel() for p in copied.values()) < sum(p.numel() for p in model.parameters())


def test_a_model_that_gains_nothing_stays_as_it_is(monkeypatch):
    model = small()
    assert arrange(model, 1, 11) is model  # too few tokens
    model = small().double()
    assert arrange(model, 1, 64) is model
    monkeypatch.setattr(few_rows, "LARGE", 1 << 18)
    model = small()
    assert arrange(model, 1, 64) is model
