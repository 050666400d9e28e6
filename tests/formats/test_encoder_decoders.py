"""Directories of T5 that are spelled in other ways, or damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import encoder_decoders

FIXTURES = Path(__file__).parents[1] / "fixtures"


def changed(tmp_path, keys, weights=lambda w: w, name="t5"):
    """Return a copy of a fixture with these keys of config.json (None: without), and changed weights."""
    hf = json.loads((FIXTURES / name / "config.json").read_text()) | keys
    hf = {key: value for key, value in hf.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(weights(load_file(FIXTURES / name / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "keys, scaled",
    [
        ({"tie_word_embeddings": None, "scale_decoder_outputs": None}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
def test_the_scale_of_the_head_has_three_spellings(keys, scaled, tmp_path):
    fields, _ = encoder_decoders.read(changed(tmp_path, keys))
    assert fields["scale_head"] is scaled and fields["tie_embeddings"] is True


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": False}, {"feed_forward_proj": None}])
def test_the_head_of_an_mt5_has_no_scale(keys, tmp_path):
    """transformers 5 writes tie_word_embeddings true for it, and scales nothing."""
    mt5 = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "tie_word_embeddings": True}
    gated = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}
    mt5 |= gated | {"scale_decoder_outputs": None}
    fields, _ = encoder_decoders.read(changed(tmp_path, mt5 | keys))
    assert fields["scale_head"] is False and fields["mlp"] == "geglu"


def test_a_head_in_the_file_that_equals_the_embedding_is_tied(tmp_path):
    def with_copy(weights):
        return weights | {"lm_head.weight": weights["shared.weight"].clone()}

    fields, weights = encoder_decoders.read(changed(tmp_path, {}, with_copy))
    assert fields["tie_embeddings"] is True and "lm_head.weight" not in weights


def test_embeddings_are_found_under_their_other_names(tmp_path):
    """As in MADLAD-400, whose files have no shared.weight."""

    def moved(weights):
        one = weights.pop("shared.weight")
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return weights | {name: one.clone() for name in names}

    shared = load_file(FIXTURES / "t5" / "model.safetensors")["shared.weight"]
    assert torch.equal(encoder_decoders.read(changed(tmp_path, {}, moved))[1]["shared.weight"], shared)


def test_stacks_with_different_embeddings_are_refused(tmp_path):
    def different(weights):
        return weights | {"decoder.embed_tokens.weight": weights["shared.weight"] + 1}

    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight differs from the other embeddings"):
        encoder_decoders.read(changed(tmp_path, {}, different))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not implemented"),
        (
            {"architectures": ["T5EncoderModel"]},
            "'T5EncoderModel': expected one of T5ForConditionalGeneration",
        ),
        ({"is_decoder": True}, "is_decoder True is not implemented"),
        ({"d_model": None}, "d_model missing"),
        ({"num_experts": 8}, "num_experts 8 is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_name(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        encoder_decoders.read(changed(tmp_path, keys))


def test_a_decoder_of_the_same_depth_needs_no_key(tmp_path):
    fields, _ = encoder_decoders.read(changed(tmp_path, {"num_decoder_layers": None}, name="t5-v1_1"))
    assert fields["n_decoder_layers"] is None if "n_decoder_layers" in fields else True
