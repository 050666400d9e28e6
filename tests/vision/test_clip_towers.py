"""The towers of CLIP and SigLIP against transformers (recorded): hidden states, other sizes, files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

from vision import tower_flops
from vision.clip_towers import TextConfig, TextTower, VisionConfig, VisionTower

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {"image_size": 12, "patch_size": 4, "n_channels": 2, "mean": (0.5,), "std": (0.5,)}


def small(layout):
    return VisionTower(VisionConfig(2, 2, 16, 24, layout, kernels="reference", **SMALL))


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_hidden_states_of_every_layer_are_those_of_transformers(layout):
    expected = load_file(FIXTURES / layout / "expected.safetensors")
    tower = VisionTower.from_pretrained(FIXTURES / layout)
    for i, hidden in enumerate(expected["hidden"]):
        for layer in (i, i - 3):
            found = tower.features(expected["pixels"], layer, keep_class=True)
            torch.testing.assert_close(found, hidden, **TOLERANCE)
    without = tower.features(expected["pixels"])  # layer -2
    assert without.shape == (4, 9, 16)
    torch.testing.assert_close(without, expected["hidden"][-2][:, -9:], **TOLERANCE)
    with pytest.raises(IndexError, match="layer 3: expected -3 to 2"):
        tower.features(expected["pixels"], 3)


def test_features_of_a_layer_do_not_depend_on_those_behind_it():
    tower = small("clip")
    pixels = torch.rand(2, 2, 12, 12)
    before = tower.features(pixels)
    for p in [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]:
        p.data.add_(1.0)
    assert torch.equal(tower.features(pixels), before)


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_positions_of_another_size_are_interpolated(layout):
    tower = small(layout)
    n_first = int(layout == "clip")
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[n_first:] = 0.25
    wide = tower.positions((2, 5))
    assert wide.shape == (n_first + 10, 16)
    torch.testing.assert_close(wide[n_first:], torch.full((10, 16), 0.25))
    assert torch.equal(wide[:n_first], tower.embeddings.position_embedding.weight[:n_first])
    assert tower(torch.rand(2, 2, 8, 20)).shape == (2, 16)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_a_tower_alone_is_read_from_the_files_of_both_classes(kind, tmp_path):
    # The first has no prefix, the second has one and a projection, and old files have a buffer of positions.
    hf = json.loads((FIXTURES / "clip" / "config.json").read_text())
    weights = load_file(FIXTURES / "clip" / "model.safetensors")
    kept = {name: w for name, w in weights.items() if name.startswith("vision_model.")}
    kept["vision_model.embeddings.position_ids"] = torch.arange(10)[None].float()
    if kind == "CLIPVisionModel":
        kept = {name.removeprefix("vision_model."): w for name, w in kept.items()}
    else:
        kept["visual_projection.weight"] = weights["visual_projection.weight"]
    (tmp_path / "config.json").write_text(json.dumps(hf["vision_config"] | {"architectures": [kind]}))
    save_file(kept, tmp_path / "model.safetensors")
    alone, whole = VisionTower.from_pretrained(tmp_path), VisionTower.from_pretrained(FIXTURES / "clip")
    pixels = torch.rand(1, 3, 13, 13)
    torch.testing.assert_close(alone(pixels), whole(pixels), **TOLERANCE)
    assert alone.config == whole.config


def test_what_is_not_implemented_is_named(tmp_path):
    shutil.copytree(FIXTURES / "siglip", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    hf = json.loads(path.read_text())
    for part, key, value in (
        ("vision_config", "vision_use_head", False),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "image_size", [8, 12]),
    ):
        path.write_text(json.dumps(hf | {part: hf[part] | {key: value}}))
        with pytest.raises(ValueError, match=key):
            VisionTower.from_pretrained(tmp_path / "m")
    path.write_text(json.dumps({"architectures": ["ViTModel"]}))
    with pytest.raises(ValueError, match="architecture 'ViTModel': expected one of CLIPVisionModel"):
        VisionTower.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="image_size 3: expected at least patch_size 4"):
        VisionConfig(1, 1, 4, 4, image_size=3, patch_size=4)


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_flops_are_those_of_the_matrix_products(layout):
    tower = small(layout)
    text = TextTower(
        TextConfig(2, 2, 16, 24, layout, kernels="reference", max_seq_len=7, eos_token_id=0, d_out=16)
    )
    with FlopCounterMode(display=False) as counter:
        tower(torch.rand(5, 2, 12, 12))
    once = 2 * 16 * 16 * (layout == "siglip")  # the probe's query is one for all images
    assert counter.get_total_flops() == 5 * 2 * tower_flops.n_macs(tower.config) + once
    with FlopCounterMode(display=False) as counter:
        text(torch.zeros(5, 7, dtype=torch.long))
    assert counter.get_total_flops() == 5 * 2 * tower_flops.n_macs(text.config)


def test_a_text_is_read_at_the_first_of_its_ends_or_at_the_largest_id():
    config = TextConfig(1, 1, 4, 4, vocab_size=9, max_seq_len=5, eos_token_id=6)
    tokens = torch.tensor([[1, 6, 8, 6, 6], [1, 2, 3, 4, 6]])
    assert TextTower(config).places(tokens).tolist() == [1, 4]
    assert TextTower(replace(config, read_largest=True)).places(tokens).tolist() == [2, 4]


def test_a_causal_text_tower_needs_no_mask_for_padding():
    tower = TextTower(TextConfig(2, 2, 16, 24, vocab_size=9, max_seq_len=6, eos_token_id=6))
    short, padded = torch.tensor([[1, 2, 6]]), torch.tensor([[1, 2, 6, 3, 8, 6]])
    torch.testing.assert_close(tower(short), tower(padded))


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_images_of_a_wrong_kind_and_long_texts_are_refused_and_pixels_get_the_dtype_of_the_model(layout):
    tower = small(layout)
    with pytest.raises(ValueError, match="images of 3 x 12 pixels: expected at least 4 x 4, a patch"):
        tower(torch.rand(1, 2, 3, 12))
    with pytest.raises(ValueError, match=r"images of torch.uint8: expected floating point"):
        tower.normalized(torch.zeros(1, 2, 12, 12, dtype=torch.uint8))
    text = TextTower(TextConfig(1, 1, 4, 4, layout, vocab_size=9, max_seq_len=5, eos_token_id=6))
    with pytest.raises(ValueError, match="texts of 6 tokens: expected at most 5"):
        text(torch.full((1, 6), 6))
    assert tower.bfloat16()(torch.rand(1, 2, 12, 12)).dtype == torch.bfloat16
