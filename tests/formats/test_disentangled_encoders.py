"""Directories of DeBERTa that are spelled in other ways, or damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import disentangled_encoders
from formats.open_model import concept_of, open_model
from language.deberta import DeBERTa

FIXTURES = Path(__file__).parents[1] / "fixtures"


def changed(tmp_path, name, keys, weights=lambda w: w):
    """Return a copy of a fixture with these keys of config.json (None: without), and changed weights."""
    hf = json.loads((FIXTURES / name / "config.json").read_text()) | keys
    hf = {key: value for key, value in hf.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(weights(load_file(FIXTURES / name / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["deberta-v1", "deberta-released"])
def test_matrices_of_v1_are_split_head_by_head_and_joined_again(name):
    stored = load_file(FIXTURES / name / "model.safetensors")
    ours = disentangled_encoders.split(stored, 3, name)
    layer = "deberta.encoder.layer.1.attention.self"
    # Row 5 of the queries is row 1 of head 1, whose queries begin at row 12: after 3 matrices of 4 rows.
    assert torch.equal(ours[f"{layer}.query_proj.weight"][5], stored[f"{layer}.in_proj.weight"][13])
    assert torch.equal(ours[f"{layer}.value_proj.weight"][5], stored[f"{layer}.in_proj.weight"][21])
    again = disentangled_encoders.joined(ours, 3)
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize("terms", ["c2p|p2c", "P2C | c2p", ["p2c", "c2p"]])
def test_terms_are_a_string_or_a_list(terms, tmp_path):
    fields, _ = disentangled_encoders.read(changed(tmp_path, "deberta-v3", {"pos_att_type": terms}))
    assert fields["c2p"] is fields["p2c"] is True


def test_the_layout_of_the_head_decides_whether_there_is_a_mask_decoder(tmp_path):
    assert open_model(FIXTURES / "deberta-released").config.absolute == "decoder"

    def renamed(weights):
        names = disentangled_encoders.DECODER_HEAD
        return {disentangled_encoders.rename(name, names): w for name, w in weights.items()}

    # A table of positions beside the head of transformers is not read by anything.
    model = open_model(changed(tmp_path, "deberta-released", {}, renamed))
    assert model.config.absolute == "none" and "position_embeddings" not in model.deberta.embeddings


def test_a_file_without_heads_has_no_prefix(tmp_path):
    def bare(weights):
        kept = {name: w for name, w in weights.items() if name.startswith("deberta.")}
        return {name.removeprefix("deberta."): w for name, w in kept.items()}

    found = changed(tmp_path, "deberta-v3", {"architectures": ["DebertaV2Model"]}, bare)
    assert not open_model(found).config.mlm_head
    with pytest.raises(ValueError, match="no masked-language-model head to fill masks with"):
        open_model(found)(torch.ones(1, 3, dtype=torch.int64))


def test_two_heads_and_matrices_of_other_heads_are_refused(tmp_path):
    def both(weights):
        return weights | {"cls.predictions.bias": torch.zeros(41)}

    with pytest.raises(ValueError, match=r"has both lm_predictions and cls\.predictions"):
        open_model(changed(tmp_path, "deberta-released", {}, both))
    with pytest.raises(ValueError, match=r"in_proj\.weight has shape \(35, 12\): expected rows for 3 heads"):
        open_model(changed(tmp_path, "deberta-v1", {}, without_a_row))


def without_a_row(weights):
    return {name: w[:-1].clone() if name.endswith("in_proj.weight") else w for name, w in weights.items()}


@pytest.mark.parametrize(
    "name, keys, message",
    [
        (
            "deberta-v3",
            {"pos_att_type": "c2p|p2p"},
            "pos_att_type 'c2p|p2p' is not implemented; expected c2p",
        ),
        ("deberta-v3", {"pos_att_type": None}, "pos_att_type None is not implemented"),
        ("deberta-v3", {"relative_attention": None}, "relative_attention False is not implemented"),
        ("deberta-v3", {"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd 'batch_norm' is not implemented"),
        ("deberta-v3", {"position_buckets": "8"}, "position_buckets '8': expected a whole number"),
        ("deberta-v3", {"embedding_size": 6}, "embedding_size 6 is not implemented; expected 12"),
        ("deberta-v3", {"attention_head_size": 8}, "attention_head_size 8 is not implemented; expected 4"),
        ("deberta-v3", {"hidden_act": "relu"}, "hidden_act 'relu' is not implemented"),
        ("deberta-v2", {"conv_act": None}, "conv_act None is not implemented; expected gelu"),
        ("deberta-v2", {"conv_kernel_size": 2}, "conv_width 2: expected an odd number"),
        ("deberta-v1", {"share_att_key": True}, "share_att_key True is not implemented"),
        ("deberta-v1", {"talking_head": True}, "talking_head True is not implemented"),
        ("deberta-v1", {"unheard_of": 1}, "unheard_of 1 is not implemented"),
        ("deberta-v1", {"hidden_size": None}, "hidden_size missing"),
        ("deberta-v1", {"model_type": "bert"}, "model_type 'bert': expected deberta or deberta-v2"),
        ("deberta-v1", {"model_type": ["deberta"]}, "model_type ['deberta']: expected deberta or deberta-v2"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_name(name, keys, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        DeBERTa.from_pretrained(changed(tmp_path, name, keys))
    assert message in str(raised.value) and str(tmp_path / "config.json") in str(raised.value)


def test_a_classifier_is_refused_and_damage_is_named(tmp_path):
    directory = changed(tmp_path, "deberta-v3", {"architectures": ["DebertaV2ForSequenceClassification"]})
    with pytest.raises(
        ValueError, match=r"'DebertaV2ForSequenceClassification': expected one of .*DebertaV2ForM"
    ):
        open_model(directory)
    changed(tmp_path, "deberta-v3", {})
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert concept_of(tmp_path) == "language.deberta"
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        open_model(tmp_path)
