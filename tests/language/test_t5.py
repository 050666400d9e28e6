"""T5 against transformers (recorded), the original against the layers of torch, and the published figures."""

import math
from dataclasses import replace

import pytest
import torch
from small_t5 import OLD, SMALL, V11, recorded, small
from torch import nn

from formats.open_model import open_model
from language.t5 import SIZES, T5, buckets, sinusoids

RECORDED = ["t5", "t5-v1_1", "t5-v1_1-v5"]


def example(B=2, S=13, T=7):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, 61, (B, S), generator=generator), torch.randint(
        2, 61, (B, T), generator=generator
    )


# --- parity


@pytest.mark.parametrize("name", RECORDED)
def test_logits_loss_and_gradients_equal_transformers(name):
    """One input is padded, and the end of one output is not predicted."""
    model, expected = recorded(name)
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())  # the reference's own float32 noise
    logits = model(expected["tokens"], expected["targets"], expected["lengths"])
    assert (logits - expected["logits"]).abs().max() < tolerance

    loss, _ = model.loss({key: expected[key] for key in ("tokens", "targets", "lengths")})
    assert abs(loss - expected["loss"]) < tolerance
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for key, theirs in expected.items():
        if key.startswith("gradients."):
            name = key.removeprefix("gradients.").replace(".block.0.layer.0.SelfAttention.rel", ".rel")
            assert (gradients[name] - theirs).abs().max() < 2e-5 * max(1, theirs.abs().max()), name


def test_the_layouts_of_1_1_are_one_model():
    hub, saved = (recorded(name)[0] for name in ("t5-v1_1", "t5-v1_1-v5"))
    assert hub.config == saved.config
    assert hub.config.tie_embeddings is False and hub.config.scale_head is False
    assert recorded("t5")[0].config.tie_embeddings and recorded("t5")[0].config.scale_head


def torch_original(model: T5, tokens, inputs, lengths):
    """Return the decoder's hidden states by the layers of torch.nn, with the weights of an original model."""
    c = model.config

    def attention_of(theirs, ours):
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.zero_(), theirs.out_proj.weight.copy_(ours.o.weight), theirs.out_proj.bias.zero_()

    def run(stack, kind, x, *memory, **masks):
        for block in stack.block:
            layer = kind(
                c.d_model, c.n_heads, c.d_ff, 0.0, layer_norm_eps=c.norm_eps, batch_first=True
            ).eval()
            attention_of(layer.self_attn, block.layer[0].SelfAttention)
            if memory:
                attention_of(layer.multihead_attn, block.layer[1].EncDecAttention)
            layer.linear1.load_state_dict(block.layer[-1].DenseReluDense.wi.state_dict())
            layer.linear2.load_state_dict(block.layer[-1].DenseReluDense.wo.state_dict())
            for i, part in enumerate(block.layer):
                getattr(layer, f"norm{i + 1}").load_state_dict(part.layer_norm.state_dict())
            x = layer(x, *memory, **masks)
        return x

    def embed(tokens):
        T, D = tokens.shape[1], c.d_model
        table = [
            [(math.cos if i % 2 else math.sin)(p / 10000 ** ((i - i % 2) / D)) for i in range(D)]
            for p in range(T)
        ]
        return model.shared.weight[tokens] * math.sqrt(D) + torch.tensor(table)

    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    memory = run(model.encoder, nn.TransformerEncoderLayer, embed(tokens), src_key_padding_mask=padding)
    causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).triu(1)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": padding}
    return run(model.decoder, nn.TransformerDecoderLayer, embed(inputs), memory, **masks)


@torch.no_grad()
def test_the_original_equals_the_layers_of_torch():
    model, (tokens, targets), lengths = small(**OLD), example(), torch.tensor([13, 8])
    expected = torch_original(model, tokens, model.shifted(targets), lengths)
    assert (model.hidden(tokens, targets, lengths) - expected).abs().max() < 1e-5
    logits = model(tokens, targets, lengths)
    assert (logits - expected @ model.shared.weight.T).abs().max() < 1e-4  # logits of order ten


# --- published figures


@pytest.mark.parametrize(
    "name, count",
    {
        "small": 60_506_624, "base": 222_903_552, "large": 737_668_096, "3b": 2_851_598_336,
        "11b": 11_307_321_344, "1.1-small": 76_961_152, "1.1-base": 247_577_856, "1.1-large": 783_150_080,
        "1.1-xl": 2_849_757_184, "1.1-xxl": 11_135_332_352, "mt5-small": 300_176_768,
        "mt5-base": 582_401_280, "mt5-large": 1_229_581_312, "mt5-xl": 3_742_619_648,
        "mt5-xxl": 12_921_057_280, "transformer-base": 44_101_632 + 18_944_000,
    }.items(),
)  # fmt: skip
def test_published_sizes_have_their_numbers_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in T5(SIZES[name]).parameters()) == count


@pytest.mark.parametrize("name, gflops", [("small", 35.34), ("base", 141.74), ("large", 480.75)])
def test_flops_of_an_example(name, gflops):
    assert SIZES[name].flops(512, 114) / 1e9 == pytest.approx(gflops, abs=0.02)


BOTH_SIDES = [8, 12, 16, 23, 32, 46, 64, 91]  # where each bucket from 8 on begins, of 32 up to 128
ONE_SIDE = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def test_buckets_are_those_of_the_published_code():
    d = torch.arange(-300, 301)
    near = {True: 8, False: 16}
    for both_sides, starts in ((True, BOTH_SIDES), (False, ONE_SIDE)):
        found = buckets(d, 32, 128, both_sides)
        for r, bucket in zip(d.tolist(), found.tolist(), strict=True):
            n = abs(r) if both_sides else max(-r, 0)
            expected = (
                n if n < near[both_sides] else near[both_sides] - 1 + sum(n >= start for start in starts)
            )
            assert bucket == expected + 16 * (both_sides and r > 0), r
    assert 16 not in buckets(d, 32, 128, True)  # distance 0 counts as before


# --- identities


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, V11, OLD], ids=["1.0", "1.1", "original"])
def test_padding_of_the_input_changes_nothing(changes):
    model, (tokens, targets) = small(**changes), example()
    plain = model(tokens, targets)
    lengths = torch.tensor([13, 13])
    for value in (0, 5):
        padded = torch.cat((tokens, torch.full((2, 4), value)), dim=1)
        torch.testing.assert_close(model(padded, targets, lengths), plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_targets_that_are_not_predicted_count_for_nothing():
    model, (tokens, targets) = small(), example()
    ignored = torch.cat((targets, torch.full((2, 3), -100)), dim=1)
    losses = [model.loss({"tokens": tokens, "targets": t})[0] for t in (targets, ignored)]
    assert abs(losses[0] - losses[1]) < 1e-6


@torch.no_grad()
def test_the_decoder_sees_no_later_target_and_the_whole_input():
    model, (tokens, targets) = small(), example()
    before = model(tokens, targets)
    changed = targets.clone()
    changed[:, 3] = 1
    after = model(tokens, changed)
    assert torch.equal(before[:, :4], after[:, :4]) and (before[:, 4] != after[:, 4]).any()
    changed = tokens.clone()
    changed[:, -1] = 1
    assert (model(changed, targets)[:, 0] != before[:, 0]).any()


def test_kernels_of_both_kinds_give_the_same_loss_and_gradients():
    (tokens, targets), lengths, results = example(), torch.tensor([13, 8]), []
    for backend in ("torch", "triton"):
        model = small(kernels=backend, n_heads=1, d_head=8, n_layers=1, n_decoder_layers=1)
        loss, _ = model.loss({"tokens": tokens, "targets": targets, "lengths": lengths})
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_sinusoids_continue_where_a_cache_ends():
    whole = sinusoids(torch.zeros((), dtype=torch.int64), 9, 8)
    assert torch.equal(sinusoids(torch.tensor([4]), 5, 8)[0], whole[4:])


# --- directories


@pytest.mark.parametrize("changes", [{}, V11, {"scale_head": False}], ids=["1.0", "1.1", "tied, not scaled"])
def test_transformers_opens_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, (tokens, targets) = small(**changes), example()
    model.save_pretrained(tmp_path)
    kind = transformers.T5ForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = (
            (model(tokens, targets) - theirs.eval()(input_ids=tokens, labels=targets).logits).abs().max()
        )
    assert difference < 1e-4  # logits of order ten


@pytest.mark.parametrize("changes", [{}, V11, OLD], ids=["1.0", "1.1", "original"])
def test_saving_and_opening_returns_the_same_model(changes, tmp_path):
    model = small(max_seq_len=77, **changes)
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_parameter_without_a_rule_of_initialisation_is_refused():
    model = small()
    model.temperature = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="parameter temperature: no rule"):
        model.initialize()


def test_the_scale_of_scores_is_in_the_initial_queries():
    torch.manual_seed(0)
    model = T5(replace(SIZES["small"], n_layers=1, n_decoder_layers=1, vocab_size=500))
    own = model.requires_grad_(False).encoder.block[0].layer[0].SelfAttention
    assert own.q.weight.std() == pytest.approx((512 * 64) ** -0.5, rel=0.02)
    assert own.k.weight.std() == pytest.approx(512**-0.5, rel=0.02)
    assert model.shared.weight.std() == pytest.approx(512**-0.5, rel=0.02)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_buckets": 6}, "n_buckets 6, max_distance 16: expected a multiple of 4"),
        ({"max_distance": 4}, "max_distance 4"),
        ({"original": True, "mlp": "geglu"}, "the Transformer of 2017 has mlp relu"),
        ({"mlp": "swiglu"}, "mlp 'swiglu': expected relu or geglu"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_bias_that_reaches_further_is_the_same_bias():
    stack = small().decoder
    near, far = stack.bias(), stack.bias(reach=40)
    distance = torch.arange(-40, 41).clamp(-16, 16)
    assert near.shape == (4, 33) and torch.equal(far, near[:, distance + 16])
