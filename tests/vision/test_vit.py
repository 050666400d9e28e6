"""ViT against transformers (recorded), published counts of parameters, and against itself."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image
from safetensors.torch import load_file
from small_vit import SMALL, TOLERANCE, assert_gradients
from torch.utils.flop_counter import FlopCounterMode

from data.images import decode
from formats.open_model import open_model
from vision import vit
from vision.patches import sin_cos
from vision.vit import SIZES, ViT

FIXTURES = Path(__file__).parents[1] / "fixtures"


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = ViT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def hidden(model, images):
    """Return norm(z) of all tokens, (B, 1 + N, D)."""
    return model.vit.layernorm(model.encode(*model.vit.embeddings(images)))


def test_a_classifier_computes_what_transformers_computes_and_so_do_its_gradients():
    model, expected = (
        ViT.from_pretrained(FIXTURES / "vit"),
        load_file(FIXTURES / "vit" / "expected.safetensors"),
    )
    assert model.config.size == (8, 12) and model.config.norm_eps == 1e-5 and model.config.readout == "class"
    logits = model(expected["pixels"])
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits, expected["labels"])
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    assert_gradients(model, expected)


def test_a_model_with_a_pooler_and_without_qkv_bias_computes_what_transformers_computes():
    folder = FIXTURES / "vit-model"
    model, expected = ViT.from_pretrained(folder), load_file(folder / "expected.safetensors")
    assert model.config.readout == "pooler" and model.config.n_classes == 0 and not model.config.qkv_bias
    torch.testing.assert_close(hidden(model, expected["pixels"]), expected["hidden"], **TOLERANCE)
    pooled = model(expected["pixels"])
    torch.testing.assert_close(pooled, expected["pooled"], **TOLERANCE)
    (pooled * torch.tensor([2, 0, 4])[:, None]).sum().backward()
    assert_gradients(model, expected, "vit.")
    # Images of another size, whose positions are interpolated.
    torch.testing.assert_close(hidden(model, expected["larger"]), expected["larger_hidden"], **TOLERANCE)


@pytest.mark.parametrize(
    "name, at_224, at_384",
    [
        ("ti-16", 5_717_416, 5_790_376),
        ("s-16", 22_050_664, 22_196_584),
        ("s-32", 22_878_952, 22_915_432),
        ("b-16", 86_567_656, 86_859_496),
        ("b-32", 88_224_232, 88_297_192),
        ("l-16", 304_326_632, 304_715_752),
        ("l-32", 306_535_400, 306_632_680),
        ("h-14", 632_045_800, None),
        ("giant-14", 1_012_611_432, None),
        ("gigantic-14", 1_844_440_680, None),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(name, at_224, at_384):
    for size, expected in ((224, at_224), (384, at_384)):
        if expected is not None:
            with torch.device("meta"):
                model = ViT(replace(SIZES[name], image_size=size))
            assert sum(p.numel() for p in model.parameters()) == expected


def test_flops_are_those_of_the_matrix_products():
    assert round(vit.n_macs(SIZES["b-16"]) / 1e9, 3) == 17.564  # torchvision's table
    assert round(vit.n_macs(replace(SIZES["b-32"], image_size=384)) / 1e9, 2) == 13.04
    model, images = small(kernels="reference"), torch.randn(3, 2, 8, 12)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    # Backward needs no gradient of the images.
    first = 2 * 6 * 32 * 2 * 16
    assert counter.get_total_flops() == 3 * (model.flops_per_token(1) - first)


def test_fixed_positions_have_the_printed_values():
    positions = sin_cos((2, 2), 8)[0]
    assert not positions[0].any()
    along = [0.841471, 0.01, 0.540302, 0.99995]
    torch.testing.assert_close(positions[2], torch.tensor([*along, 0, 0, 1, 1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(positions[3], torch.tensor([0, 0, 1, 1, *along]), rtol=0, atol=1e-6)
    assert positions.shape == (5, 8)
    # Any grid, also one that is not the config's.
    model = small(positions="sincos")
    assert "vit.embeddings.position_embeddings" not in dict(model.named_parameters())
    assert torch.equal(model.vit.embeddings.positions((3, 5)), sin_cos((3, 5), 32))


def test_a_patch_is_read_in_order_of_channel_row_and_column_as_a_convolution_does():
    model, images = small(), torch.randn(3, 2, 8, 12)
    projection = model.vit.embeddings.patch_embeddings.projection
    expected = projection(images).flatten(2).transpose(1, 2)
    _, patches = model.vit.embeddings(images)
    torch.testing.assert_close(patches - model.vit.embeddings.position_embeddings[:, 1:], expected)


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({}, "ViTForImageClassification"),
        ({"positions": "sincos", "mean": (0.1, 0.2), "std": (0.3, 0.4)}, "ViTForImageClassification"),
        ({"n_classes": 0, "labels": ()}, "ViTModel"),
        ({"n_classes": 0, "readout": "pooler", "mlp": "gelu_tanh"}, "ViTModel"),
        ({"readout": "mean"}, "plinth.vision.vit"),
        ({"readout": "pooler"}, "plinth.vision.vit"),
    ],
)
def test_a_saved_model_is_read_back_to_the_bit(changes, architecture, tmp_path):
    model, images = small(**changes), torch.randn(3, 2, 8, 12)
    names = ("a", "b", "c", "d", "e")[: model.config.n_classes]
    model.save_pretrained(tmp_path, names)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    again = open_model(tmp_path).eval()
    assert torch.equal(again(images), model(images)) and again.config.labels == names
    expected = replace(model.config, labels=names)
    for name in ("mean", "std"):  # a file has a number for each channel
        values = getattr(expected, name)
        own = "Model" in architecture or "Image" in architecture
        expected = replace(expected, **{name: values * 2 if own and len(values) == 1 else values})
    assert again.config == expected


def test_transformers_opens_what_is_saved_and_computes_the_same(tmp_path):
    from transformers import ViTForImageClassification

    model, images = small(image_size=8, norm_eps=1e-3), torch.randn(3, 2, 8, 8)
    model.save_pretrained(tmp_path, ("a", "b", "c", "d", "e"))
    theirs = ViTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, model(images), **TOLERANCE)
    assert theirs.config.id2label[2] == "c"
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content["image_mean"] == [0.5, 0.5] and content["size"] == {"height": 8, "width": 8}


@pytest.mark.parametrize("readout", ["class", "pooler", "mean"])
def test_the_classifier_reads_the_class_token_or_the_mean_of_the_patches(readout):
    model, images = small(readout=readout), torch.randn(3, 2, 8, 12)
    z = model.encode(*model.vit.embeddings(images))
    read = z[:, 1:].mean(1) if readout == "mean" else z[:, 0]
    read = model.vit.layernorm(read)
    if readout == "pooler":
        read = torch.tanh(model.vit.pooler.dense(read))
    torch.testing.assert_close(model(images), model.classifier(read))


def test_pixels_are_normalised_by_mean_and_std_of_the_config():
    model, images = small(mean=(0.25, 0.5), std=(0.5, 0.25)), torch.rand(1, 2, 8, 12)
    expected = torch.stack(((images[0, 0] - 0.25) / 0.5, (images[0, 1] - 0.5) / 0.25))
    torch.testing.assert_close(model.normalized(images)[0], expected)


def test_a_new_model_guesses_all_classes_alike():
    torch.manual_seed(0)
    model = ViT(SMALL)
    batch = {"images": torch.rand(4, 2, 8, 12), "targets": torch.tensor([0, 1, 2, 4])}
    loss, metrics = model.loss(batch)
    assert loss.item() == pytest.approx(math.log(5)) and metrics["accuracy"] == 0.25


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 5}, "multiples of the patch"),
        ({"image_size": (8, 8, 8)}, "expected one or two sides"),
        ({"n_heads": 3}, "not a multiple of n_heads"),
        ({"positions": "sincos", "d_model": 30, "n_heads": 2}, "need a multiple of 4"),
        ({"mean": (1.0, 2.0, 3.0)}, "one number, or one per channel"),
        ({"readout": "last"}, "expected class or pooler or mean"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


def test_a_field_of_config_json_that_is_not_implemented_is_named(tmp_path):
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"use_mask_token": True}, "use_mask_token True is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not implemented"),
        ({"image_size": "large"}, "image_size 'large': expected a whole number"),
        ({"patch_size": 5}, "multiples of the patch"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            ViT.from_pretrained(tmp_path)


def test_pixels_that_are_normalised_in_another_way_are_refused(tmp_path):
    small().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"do_rescale": False}, "do_rescale false is not implemented"),
        ({"rescale_factor": 1}, "rescale_factor 1: expected 1 / 255"),
        ({"image_mean": None}, "image_mean None: expected a number for each channel"),
        ({"image_mean": [math.nan]}, "image_mean .nan.: expected a number"),
        ({"image_std": [0]}, "image_std .0.: expected numbers above 0"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            ViT.from_pretrained(tmp_path)


def test_the_command_prints_the_sizes_and_classifies_images(tmp_path):
    printed = run_command("-m", "vision.vit").out
    assert "86,567,656" in printed and "tiny" in printed
    model = small(n_channels=3, image_size=8).to(torch.bfloat16)  # the command computes in float32
    model.save_pretrained(tmp_path / "model", ("ant", "bee", "cat", "dog", "eel"))
    model = model.float()
    Image.fromarray(np.full((9, 9, 3), 200, np.uint8)).save(tmp_path / "a.png")
    ended = run_command("-m", "vision.vit", tmp_path / "model", tmp_path / "a.png")
    pixels = torch.from_numpy(decode(tmp_path / "a.png", (3, 8, 8), Counter())) / 255
    best = model(model.normalized(pixels[None])).argmax()
    assert f"a.png: {('ant', 'bee', 'cat', 'dog', 'eel')[best]} " in ended.out
    ended = run_command("-m", "vision.vit", tmp_path / "model", tmp_path / "b.png")
    assert ended.code == 2 and "b.png" in ended.err
    ended = run_command("-m", "vision.vit", tmp_path / "model")
    assert ended.code == 2 and "no images to classify" in ended.err
