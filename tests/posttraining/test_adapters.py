"""Adapted layers against their equations in float64; models with adapters against themselves merged, mixed in
one batch, cached, in bfloat16 and compiled."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bert
import gpt
import moe
from language import masking
from lora import Config, apply
from posttraining import nf4
from posttraining.adapters import adapted_layers, set_adapter, use
from posttraining.merging import merge, unmerge

TINY = dict(n_layers=2, d_model=32, d_ff=48, vocab_size=96, max_seq_len=32)
GPT2 = {name: value for name, value in gpt.GPT2.items() if name != "eos_token_id"}
MODELS = {
    "gpt": (gpt.GPT, replace(gpt.SIZES["tiny"], **TINY)),
    "gpt, untied": (gpt.GPT, replace(gpt.SIZES["tiny"], **TINY, tie_embeddings=False)),
    "gpt2": (gpt.GPT, gpt.Config(2, 4, 32, 48, 96, 32, **GPT2)),
    "moe": (moe.MoEGPT, replace(moe.SIZES["tiny"], **TINY, d_expert=20, n_experts=6)),
    "bert": (bert.BERT, replace(bert.SIZES["tiny-bert"], **TINY)),
}
LORA = Config(r=4, alpha=6.0)
METHODS = {
    "lora": LORA,
    "rslora": replace(LORA, rank_stabilized=True),
    "pissa": replace(LORA, init="pissa"),
    "dora": replace(LORA, method="dora"),
    "ia3": Config(method="ia3"),
}
SCALES = dict.fromkeys(METHODS, 6 / 4) | {"rslora": 6 / 2}  # alpha / r, alpha / sqrt(r)
TOKENS = torch.randint(96, (5, 12), generator=torch.Generator().manual_seed(0))


def draw(module, seed=1, std=0.1):
    """Move every adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            for p in layer.adapters.parameters():
                p.add_(std * torch.randn(p.shape, generator=generator).to(p.dtype))


def base(name, quantized=False, **changes):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    config = replace(config, **changes)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and norms too
    return nf4.quantize(model) if quantized else model


def with_adapter(name, config, quantized=False):
    model = base(name, quantized)
    apply(model, config)
    draw(model)
    return model


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)


def off(a, b):
    return (a - b).abs().max().item()


# --- the layers, against their equations


def weight_by_definition(method, W, p, start, of_input=False):
    """W' (..., N, D) of W and the adapter's parameters p, and what the bias is multiplied by."""
    if method == "ia3":
        return W * p["ia3_l"], 1.0 if of_input else p["ia3_l"].squeeze(-1)
    changed = W + SCALES[method] * p["lora_B"] @ p["lora_A"]
    if method == "pissa":
        changed = changed - SCALES[method] * start["lora_B"] @ start["lora_A"]
    if method == "dora":
        length = changed.norm(dim=-1, keepdim=True).detach()
        changed = p["lora_magnitude_vector"][..., None] / length * changed
    return changed, 1.0


def moved(module, method, pattern):
    """Adapt a module of float64 layers, and move the adapters: {path: (adapted layer, its parameters at the
    start, and copies of them after, which learn)}."""
    apply(module, replace(METHODS[method], target_modules=pattern))
    module.double()
    layers = adapted_layers(module)
    starts = {
        path: {part: p.detach().clone() for part, p in layer.adapters["default"].named_parameters()}
        for path, layer in layers.items()
    }
    draw(module, std=0.3)
    return {
        path: (
            layer,
            starts[path],
            {part: p.detach().clone().requires_grad_() for part, p in adapter_of(layer)},
        )
        for path, layer in layers.items()
    }


def adapter_of(layer):
    return list(layer.adapters["default"].named_parameters())


def assert_same_gradients(y, expected, x, own_x, layers):
    """Compare those of x and of all adapters' parameters. 1e-10: sums of some tens of float64 products."""
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    expected.backward(dy)
    if x is not None:
        torch.testing.assert_close(x.grad, own_x.grad, rtol=1e-10, atol=1e-10)
    for layer, _, own in layers.values():
        for part, p in adapter_of(layer):
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(p.grad, own[part].grad, rtol=1e-10, atol=1e-10, msg=part)
        assert layer.base_weight().grad is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "method, path", [*((method, "k_proj") for method in METHODS), ("ia3", "mlp.down_proj")]
)
def test_linear_equals_its_definition(method, path, bias):
    torch.manual_seed(0)
    places = {"k_proj": nn.Linear(12, 7, bias=bias)}
    places["mlp"] = nn.ModuleDict({"down_proj": nn.Linear(12, 7, bias=bias)})
    module = nn.ModuleDict(places).double()
    layers = moved(module, method, path)
    ((found, (layer, start, own)),) = layers.items()
    assert found == path
    W, b = layer.base_layer.weight, layer.base_layer.bias
    x = torch.randn(3, 5, 12, dtype=torch.float64).requires_grad_()
    own_x = x.detach().clone().requires_grad_()
    changed, factor = weight_by_definition(method, W, own, start, path == "mlp.down_proj")
    expected = F.linear(own_x, changed, None if b is None else b * factor)
    assert off(expected, F.linear(x, W, b)) > 0.1
    assert_same_gradients(layer(x), expected, x, own_x, layers)


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa"])
def test_embedding_equals_its_definition(method):
    torch.manual_seed(0)
    layers = moved(nn.ModuleDict({"embed_tokens": nn.Embedding(20, 8)}).double(), method, "embed_tokens")
    layer, start, own = layers["embed_tokens"]
    W = layer.base_layer.weight  # (V, D), of which the transposed is adapted
    tokens = torch.tensor([[3, 19, 3], [0, 7, 8]])
    expected = F.embedding(tokens, weight_by_definition(method, W.mT, own, start)[0].mT)
    assert off(expected, F.embedding(tokens, W)) > 0.1
    assert_same_gradients(layer(tokens), expected, None, None, layers)


@pytest.mark.parametrize("method", METHODS)
def test_stacked_experts_equal_a_loop_over_them(method):
    torch.manual_seed(0)
    experts = moe.Experts(MODELS["moe"][1])
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    stacks = experts.gate_up_proj, experts.down_proj
    gate_up_proj, down_proj = (stack.weight.detach().double() for stack in stacks)
    module = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}).double()
    layers = moved(module, method, "gate_up_proj|down_proj")
    x = torch.randn(13, 32, dtype=torch.float64).requires_grad_()
    own_x = x.detach().clone().requires_grad_()
    offsets = torch.tensor([4, 4, 5, 9, 11, 13], dtype=torch.int32)  # the second has no rows

    def changed(name, W):
        _, start, own = layers[f"mlp.experts.{name}"]
        return weight_by_definition(method, W, own, start, name == "down_proj")[0]

    gate_up_proj, down_proj = changed("gate_up_proj", gate_up_proj), changed("down_proj", down_proj)
    outputs, first = [], 0
    for e, last in enumerate(offsets.tolist()):
        gate, up = F.linear(own_x[first:last], gate_up_proj[e]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down_proj[e]))
        first = last
    assert_same_gradients(module.mlp.experts(x, offsets), torch.cat(outputs), x, own_x, layers)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14)])
def test_pissa_begins_with_the_largest_part_of_the_weight(shape):
    torch.manual_seed(0)
    config = replace(moe.SIZES["tiny"], d_model=14, d_expert=9, n_experts=3, n_heads=1, n_kv_heads=1, top_k=1)
    if len(shape) == 3:
        module = nn.ModuleDict({"experts": moe.Experts(config)})
        path = "experts.gate_up_proj"
        nn.init.normal_(module.experts.gate_up_proj.weight)
    else:
        module, path = nn.ModuleDict({"o_proj": nn.Linear(*shape)}), "o_proj"
    apply(module, replace(METHODS["pissa"], target_modules=path))
    layer = adapted_layers(module)[path]
    adapter, W = layer.adapters["default"], layer.base_weight().detach().double()
    part = SCALES["pissa"] * (adapter.lora_B @ adapter.lora_A).detach().double()
    left = torch.linalg.svdvals(W - part)
    # Eckart and Young 1936: no other matrix of rank r leaves so little. 1e-5: a float32 decomposition.
    assert off(left[..., :-4], torch.linalg.svdvals(W)[..., 4:]) < 1e-5
    assert left[..., -4:].abs().max() < 1e-5
    # Both hold half of each direction, as in equations 2 and 3 of the paper.
    norms_A, norms_B = adapter.lora_A.norm(dim=-1), adapter.lora_B.norm(dim=-2)
    torch.testing.assert_close(norms_A, norms_B, rtol=1e-4, atol=0)


# --- at the start


EMBEDDINGS = r"q_proj|query|embed_tokens|embed_positions|word_embeddings|lm_head"
STARTS = {method: replace(config, dropout=0.5) for method, config in METHODS.items() if method != "ia3"}
STARTS["ia3"] = METHODS["ia3"]
STARTS |= {f"{m} of embeddings": replace(METHODS[m], target_modules=EMBEDDINGS) for m in ("lora", "pissa")}


@pytest.mark.parametrize("quantized", [False, True], ids=["", "nf4"])
@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("name", MODELS)
def test_at_the_start_nothing_changes(name, method, quantized):
    """To the bit, and in training too: what dropout leaves of x is multiplied by zeros."""
    model = base(name, quantized)
    expected = logits(model)
    apply(model, STARTS[method])
    assert adapted_layers(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.train()), expected)
    draw(model)
    assert off(logits(model.eval()), expected) > 1e-3


def test_dropout_is_of_training_alone():
    model = with_adapter("gpt", replace(LORA, dropout=0.5))
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert off(first, second) > 1e-3 and off(first, expected) > 1e-3


# --- merged


TARGETS = {
    "its own": None,
    "embedding": "embed_tokens|embed_positions",
    "head": "lm_head",
    "embedding and head": "q_proj|embed_tokens|lm_head",
}
MERGED = [(name, method, "its own") for name in MODELS for method in METHODS]
MERGED += [
    (name, "lora", targets)
    for name in ("gpt", "gpt, untied", "gpt2")
    for targets in ("embedding", "head", "embedding and head")
]
MERGED += [("moe", "pissa", "embedding and head"), ("gpt", "dora", "head"), ("gpt2", "ia3", "head")]


def weights(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


@pytest.mark.parametrize("name, method, targets", MERGED)
def test_merged_is_an_ordinary_model_and_unmerged_the_same_as_before(name, method, targets, tmp_path):
    plain = base(name)
    model = with_adapter(name, replace(METHODS[method], target_modules=TARGETS[targets]))
    expected, before, config = logits(model), weights(model), model.config
    assert off(expected, logits(plain)) > 1e-3
    merge(model)
    assert off(logits(model), expected) < 1e-5  # float32, logits of about 1
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
    if name != "bert":
        assert model.loss(batch)[0].item() == pytest.approx(
            F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item(), abs=1e-5
        )
    ordinary = type(model)(model.config)
    assert model.state_dict().keys() == ordinary.state_dict().keys()
    assert not adapted_layers(model)
    assert type(model.model if name != "bert" else model.bert) is nn.ModuleDict
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    unmerge(model)
    assert torch.equal(logits(model), expected) and model.config is config
    assert_equal_weights(weights(model), before)
    with use(model, None):
        assert torch.equal(logits(model), logits(plain))
    merge(model)  # and once more
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_base_in_4_bits_is_merged_too(name, method):
    model = with_adapter(name, METHODS[method], quantized=True)
    expected, before = logits(model), weights(model)
    merge(model)
    assert off(logits(model), expected) < 1e-5
    kinds = {type(module) for module in model.modules()}
    stacks = name == "moe" and METHODS[method].method == "lora"  # the others leave them out by default
    assert moe.ExpertLinear in kinds if stacks else nn.Linear in kinds
    unmerge(model)
    assert torch.equal(logits(model), expected)
    assert_equal_weights(weights(model), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "moe"])
def test_a_base_in_bfloat16_is_merged_in_bfloat16(name, method):
    """And near what it is in float32: bfloat16 has 8 bits, an error of 0.4 percent in each weight."""
    model = with_adapter(name, METHODS[method])
    expected = logits(model)
    with torch.no_grad():
        for module_name, p in model.named_parameters():
            if ".adapters." not in module_name:
                p.data = p.data.bfloat16()
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # A router may choose another expert where two are nearly as good, so most logits, not all.
    near = (logits(model).float() - expected).abs() < 0.1 * expected.std()
    assert near.float().mean() > 0.9


def test_merge_takes_the_named_adapter():
    model = with_adapter("gpt", LORA)
    apply(model, replace(METHODS["dora"], target_modules="up_proj"), "other")
    draw(model, 2)
    expected = {}
    for name in ("default", "other"):
        with use(model, name):
            expected[name] = logits(model)
    assert off(expected["default"], expected["other"]) > 1e-3
    for name in ("default", "other"):
        merge(model, name)
        assert off(logits(model), expected[name]) < 1e-5
        unmerge(model)
        assert torch.equal(logits(model), expected[name])
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter is in use; name one of default, other"):
        merge(model)
    assert torch.equal(logits(model), logits(base("gpt")))


def test_what_cannot_be_merged_or_unmerged():
    model = base("gpt")
    with pytest.raises(ValueError, match="merge: this model has no adapters"):
        merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        unmerge(model)
    apply(model, LORA)
    with pytest.raises(ValueError, match="unmerge"):
        unmerge(model)
    with pytest.raises(ValueError, match="no adapter 'french'; there are default"):
        merge(model, "french")
    with use(model, ["default", None]), pytest.raises(ValueError, match="rows"):
        merge(model)
    merge(model)
    with pytest.raises(ValueError, match="merged already"):
        merge(model)
    unmerge(model)
    with pytest.raises(ValueError, match="unmerge"):
        unmerge(model)


@pytest.mark.parametrize("name", ["gpt", "gpt, untied", "moe", "bert"])
def test_unmerge_undoes_the_last_of_two_merges(name):
    model = with_adapter(name, LORA)
    first = logits(model)
    merge(model)
    apply(model, replace(LORA, target_modules="q_proj" if name != "bert" else "query"), "second")
    draw(model, 2)
    second, config = logits(model), model.config
    assert off(second, first) > 1e-3
    merge(model)
    unmerge(model)
    assert torch.equal(logits(model), second) and model.config is config
    unmerge(model)
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="unmerge"):
        unmerge(model)


def test_a_merge_that_is_refused_changes_nothing():
    """An encoder's head has the embeddings' matrix, which then cannot be merged alone."""
    model = with_adapter("bert", LORA)
    apply(model, replace(LORA, target_modules="word_embeddings|query"), "embeddings")
    draw(model, 2)
    set_adapter(model, "default")
    expected = logits(model)
    with pytest.raises(ValueError, match="the embeddings are adapted, but not the head"):
        merge(model, "embeddings")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="unmerge"):
        unmerge(model)


# --- in use


def test_use_returns_to_what_was_before():
    model = with_adapter("gpt", LORA)
    apply(model, replace(METHODS["ia3"]), "other")
    draw(model, 2, std=0.3)
    plain = logits(base("gpt"))
    other = logits(model)
    with use(model, "default"):
        default = logits(model)
        with use(model, None):
            assert torch.equal(logits(model), plain)
            with use(model, "other"):
                assert torch.equal(logits(model), other)
        assert torch.equal(logits(model), default)
    assert off(default, other) > 1e-2 and off(default, plain) > 1e-2
    assert torch.equal(logits(model), other)
    with pytest.raises(KeyError), use(model, "default"):
        raise KeyError
    assert torch.equal(logits(model), other)
    with pytest.raises(KeyError), use(model, ["default", None]):
        raise KeyError
    assert torch.equal(logits(model), other)
    for wrong in ("french", ["default", "french"]):
        with (
            pytest.raises(ValueError, match="no adapter 'french'; there are default, other"),
            use(model, wrong),
        ):
            pass
    with pytest.raises(ValueError, match="no adapter is named; give one name"), use(model, []):
        pass  # it would compute the base alone, for a batch of any size
    assert torch.equal(logits(model), other)


def test_use_within_a_mixed_batch():
    model = with_adapter("gpt", LORA)
    with use(model, "default"):
        one = logits(model)
    with use(model, ["default", None, "default", None, None]):
        mixed = logits(model)
        for names, expected in (("default", one), (None, logits(base("gpt")))):
            with use(model, names):
                assert torch.equal(logits(model), expected)
        with use(model, [None, None, None, None, "default"]):
            assert off(logits(model)[4], one[4]) < 1e-5
        assert torch.equal(logits(model), mixed)
    assert torch.equal(logits(model), one)


ATTENTION = r"[qkvo]_proj|query|key|value|attention\.output\.dense"
ROWS = ["lora", "ia3", None, "dora", "embeddings"]


def mixture(name, quantized=False):
    """Adapters of several methods, ranks and places, none of them of the experts."""
    model = base(name, quantized)
    mlp = "shared_experts.*" if name == "moe" else r"mlp\..*|(intermediate|output)\.dense"
    head = "cls.*" if name == "bert" else "lm_head"
    configs = {
        "lora": replace(LORA, target_modules=ATTENTION),
        "ia3": replace(METHODS["ia3"], target_modules=rf"k_proj|v_proj|key|value|{mlp}"),
        "dora": replace(METHODS["dora"], r=2, target_modules=rf"v_proj|value|{mlp}"),
        "embeddings": replace(METHODS["pissa"], r=3, target_modules=f"embed_tokens|word_embeddings|{head}"),
    }
    for adapter, config in configs.items():
        apply(model, config, adapter)
    draw(model, std=0.2)
    for layer in adapted_layers(model).values():
        layer.adapters.requires_grad_(True)  # not the last one's alone
    return model


def alone(model, names, function):
    """Return the outputs of a function of each row, with its adapter alone."""
    outputs = []
    for i, name in enumerate(names):
        with use(model, name):
            outputs.append(function(i))
    return outputs


@pytest.mark.parametrize("quantized", [False, True], ids=["", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_mixed_batch_equals_it_alone(name, quantized):
    model = mixture(name, quantized)
    rows = torch.cat(alone(model, ROWS, lambda i: logits(model, TOKENS[i : i + 1])))
    with use(model, ROWS):
        mixed = logits(model)
    assert off(mixed, rows) < 1e-5
    with use(model, None):
        plain = logits(model)
    changed = (mixed - plain).abs().amax(dim=(1, 2)) > 1e-2
    assert changed.tolist() == [name is not None for name in ROWS]
    with use(model, ROWS[:1]):  # one row
        assert off(logits(model, TOKENS[:1]), rows[:1]) < 1e-5
    with use(model, [None] * 5):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", ["gpt", "gpt, untied", "gpt2", "moe"])
def test_a_mixed_batch_generates_what_each_row_does_alone(name):
    model = mixture(name)
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, (3, 12, 7, 1, 12), strict=True)]
    options = dict(max_new_tokens=12, temperature=0)
    expected = alone(model, ROWS, lambda i: model.generate([prompts[i]], **options)[0])
    with use(model, ROWS):
        assert model.generate(prompts, **options) == expected
    with use(model, None):
        assert sum(a != b for a, b in zip(model.generate(prompts, **options), expected, strict=True)) >= 2


def gradients(model):
    """{(adapter, layer and part): gradient}, and forget them."""
    found = {}
    for path, layer in adapted_layers(model).items():
        for name, adapter in layer.adapters.items():
            for part, p in adapter.named_parameters():
                if p.grad is not None:
                    found[name, f"{path}.{part}"] = p.grad
                p.grad = None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(name):
    """And go to their adapters alone; rows of one adapter add up."""
    model = mixture(name)
    names = [*ROWS[:4], "lora"]
    dy = torch.randn(5, 12, 96, generator=torch.Generator().manual_seed(3))
    for i, row in enumerate(names):
        if row is not None:
            with use(model, names):
                (model(TOKENS)[i] * dy[i]).sum().backward()
            nonzero = {adapter for (adapter, _), grad in gradients(model).items() if grad.any()}
            assert nonzero == {row}
            with use(model, row):
                (model(TOKENS[i : i + 1])[0] * dy[i]).sum().backward()
            assert {adapter for adapter, _ in gradients(model)} == {row}
    for i, row in enumerate(names):
        if row is not None:
            with use(model, row):
                (model(TOKENS[i : i + 1])[0] * dy[i]).sum().backward()
    expected = gradients(model)
    with use(model, names):
        (model(TOKENS) * dy).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():  # float32 sums of 12 to 60 tokens
        assert off(found[key], grad) <= 1e-5 * max(1.0, grad.abs().max().item()), key


def test_an_encoder_takes_a_mixed_batch_of_masks():
    """The head of its loss sees the masked places alone."""
    model = mixture("bert")
    names = ["lora", "dora", None, "embeddings", "ia3"]
    positions = torch.tensor([[1, 5, 9]]) + 12 * torch.arange(5)[:, None]
    targets = TOKENS.flatten()[positions]
    losses = alone(
        model,
        names,
        lambda i: masking.loss(
            model, {"tokens": TOKENS[i : i + 1], "targets": targets[i : i + 1], "positions": positions[:1]}
        )[0].item(),
    )
    with use(model, names):
        loss, _ = masking.loss(model, {"tokens": TOKENS, "targets": targets, "positions": positions})
    assert loss.item() == pytest.approx(sum(losses) / 5, abs=1e-5)


def test_a_batch_of_another_number_of_rows_is_refused():
    model = mixture("gpt")
    with use(model, ROWS):
        for tokens in (TOKENS[:4], TOKENS[:1], TOKENS.reshape(1, -1)):  # the last: packed rows
            with pytest.raises(ValueError, match="adapters for 5 rows, but a batch of shape"):
                model(tokens)
        with pytest.raises(ValueError, match="adapters for 5 rows"):
            model.generate([[1, 2], [3]], 2)
        with pytest.raises(ValueError, match="rows of a batch"):  # the head's weight is one for all there
            model.loss({"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]})
    assert logits(model, TOKENS[:2]).isfinite().all()


@pytest.mark.parametrize(
    "name, targets", [("gpt", "lm_head"), ("moe", "shared_experts.*")], ids=["head", "shared experts"]
)
def test_no_rows_are_mixed_up_where_few_layers_are_adapted(name, targets):
    """Neither may take 2 of 4 rows for one: where the head is asked for the last places, nor where the rows
    of the batch have been laid end to end."""
    model = with_adapter(name, replace(LORA, target_modules=targets))
    with use(model, ["default", None]), pytest.raises(ValueError, match="adapters for 2 rows"):
        model.generate(TOKENS[:4], 2)


def test_experts_are_not_mixed():
    model = with_adapter("moe", LORA)
    expected = logits(model)
    with pytest.raises(ValueError, match="experts cannot be mixed"), use(model, ["default", None] * 2):
        pass
    assert torch.equal(logits(model), expected)
    apply(model, replace(LORA, target_modules="q_proj"), "other")
    with use(model, [None, "other", None, "other", None]):  # there are some, but not in use
        assert torch.equal(logits(model)[0], logits(base("moe"))[0])


# --- in other ways


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name, method):
    """In the dtype that the base has there, and no further from float32 than twice as much as the base."""
    model = with_adapter(name, METHODS[method])
    relative = []
    for adapter in (None, "default"):
        with use(model, adapter):
            expected = logits(model)
            with torch.autocast("cpu", torch.bfloat16):
                found = logits(model)
        relative.append(((found.float() - expected).norm() / expected.norm()).item())
        assert found.dtype == torch.bfloat16 and found.isfinite().all()
    # A token whose router has two experts nearly alike may get another one of them.
    assert relative[1] < (0.3 if name == "moe" else max(0.02, 2 * relative[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS).float().square().mean().backward()
    for layer in adapted_layers(model).values():
        for p in layer.adapters.parameters():
            assert p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_under_autocast(name):
    model = mixture(name)
    with use(model, ROWS):
        expected = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < (0.3 if name == "moe" else 0.03)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_in_bfloat16_runs_without_autocast(method):
    """Samples in training and the answers of lora.py are computed so."""
    model = with_adapter("gpt2", METHODS[method])
    expected = logits(model)
    model.to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        layer.adapters.float()
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05
    with use(model, ["default", None, None, None, "default"]):
        assert logits(model).dtype == torch.bfloat16


def test_compiled_equals_eager():
    model = base("gpt", n_layers=1)
    apply(model, METHODS["dora"])
    draw(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        y = forward(TOKENS)
        y.square().mean().backward()
        results.append((y, gradients(model)))
    (y, grads), (found, found_grads) = results
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
    assert grads.keys() == found_grads.keys() and grads
    for key, grad in grads.items():
        torch.testing.assert_close(found_grads[key], grad, rtol=1e-4, atol=1e-6)
    with use(model, None):  # what was compiled for the adapter must not be used here
        assert off(logits(compiled), logits(model)) < 1e-5
        assert off(logits(model), y) > 1e-3
