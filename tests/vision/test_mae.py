"""MAE against transformers (recorded), published counts, the order of its patches, and a small run."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file
from small_vit import SMALL, TOLERANCE, assert_gradients
from torch.utils.flop_counter import FlopCounterMode

from data.class_folders import Part
from data.images import as_dataset
from formats.open_model import open_model
from vision import mae, maskfeat
from vision.mae import MAE, Config
from vision.patches import patches_of
from vision.vit import SIZES, ViT

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENCODER = replace(SMALL, n_classes=0, positions="sincos")
DECODER = Config(n_patches=6, decoder_layers=1, decoder_heads=2, decoder_width=16, decoder_ff=20)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = MAE(ViT(replace(ENCODER, kernels="reference")), replace(DECODER, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ["vit-mae", "vit-mae-norm-pix"])
def test_with_given_noise_it_computes_what_transformers_computes_and_so_do_its_gradients(name):
    model, expected = (
        MAE.from_pretrained(FIXTURES / name),
        load_file(FIXTURES / name / "expected.safetensors"),
    )
    assert model.settings.norm_pix == (name == "vit-mae-norm-pix") and model.settings.n_visible == 3
    predicted, mask = model(expected["pixels"], expected["noise"])
    torch.testing.assert_close(predicted, expected["logits"], **TOLERANCE)
    assert torch.equal(mask, expected["mask"])
    # The pixels are normalised already.
    model.model.config = replace(model.config, mean=(0.0,), std=(1.0,))
    loss, _ = mae.loss(model, {"images": expected["pixels"], "noise": expected["noise"]})
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    renamed = {key.replace("gradient.vit.", "gradient.model.vit."): g for key, g in expected.items()}
    assert_gradients(model, renamed)


@pytest.mark.parametrize(
    "name, n_all, n_trained, n_encoder",
    [
        ("b-16", 111_907_840, 111_655_680, 85_798_656),
        ("l-16", 329_541_888, 329_239_296, 303_301_632),
        ("h-14", 657_074_508, 656_613_964, 630_764_800),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(name, n_all, n_trained, n_encoder):
    config = replace(SIZES[name], n_classes=0, positions="sincos")
    with torch.device("meta"):
        model = MAE(ViT(config), mae.settings(config))
    assert sum(p.numel() for p in model.parameters()) == n_trained
    assert sum(t.numel() for t in model.state_dict().values()) == n_all
    assert sum(t.numel() for t in model.model.state_dict().values()) == n_encoder


def test_what_is_predicted_is_in_order_of_row_column_and_channel():
    images = torch.arange(2.0 * 2 * 8 * 12).view(2, 2, 8, 12)
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, 6, 32)
    # The patch at row 0, column 1: its first numbers are both channels of its first pixel, then of the next.
    assert patches[0, 1, :4].tolist() == [images[0, c, 0, x].item() for x in (4, 5) for c in (0, 1)]
    assert torch.equal(mae.unpatchify(patches, ENCODER), images)
    assert not torch.equal(patches, patches_of(images, 4))


@pytest.mark.parametrize("task, words", [(mae, "error of 1.7500"), (maskfeat, "image one of 1.7500")])
def test_the_error_of_the_mean_image_is_of_pixels_divided_by_each_channel_s_std(task, words, monkeypatch):
    labels = np.array([-1])
    parts = (Part(np.full((1, 3, 8, 8), value, np.uint8), labels) for value in (0, 51))  # 51 is 0.2
    dataset = as_dataset(*parts, ())
    monkeypatch.setattr(task, "load_images", lambda args, config: dataset)
    args = Namespace(set=[])
    found = task.load_data(args, replace(SMALL, image_size=8, n_channels=3, std=(0.1, 0.2, 0.4))).guess
    assert words in found  # (2^2 + 1^2 + 0.5^2) / 3


def test_the_encoder_sees_visible_patches_alone():
    model, noise = small(mask_rate=0.5), torch.rand(2, 6)
    images = torch.rand(2, 2, 8, 12)
    predicted, mask = model(images, noise)
    assert mask.sum(1).tolist() == [3, 3] and torch.equal(mask.bool(), noise.argsort(1).argsort(1) >= 3)
    hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 32).contiguous(), ENCODER).bool()
    changed, _ = model(torch.where(hidden, torch.rand_like(images), images), noise)
    assert torch.equal(changed, predicted)
    changed, _ = model(torch.where(hidden, images, torch.rand_like(images)), noise)
    assert not torch.equal(changed, predicted)


def test_the_loss_is_the_mean_over_hidden_patches():
    for norm_pix in (False, True):
        model = small(mask_rate=0.5, norm_pix=norm_pix)
        batch = {"images": torch.rand(2, 2, 8, 12), "noise": torch.rand(2, 6)}
        loss, _ = mae.loss(model, batch)
        predicted, mask = model(model.model.normalized(batch["images"]), batch["noise"])
        errors = []
        for i in range(2):
            for n in range(6):
                row, column = divmod(n, 3)
                square = batch["images"][i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                true = (2 * square - 1).permute(1, 2, 0).flatten()
                if norm_pix:
                    true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
                if mask[i, n]:
                    errors.append((predicted[i, n] - true).square().mean())
        assert len(errors) == 6
        torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_a_rebuilt_image_keeps_what_is_visible():
    for norm_pix in (False, True):
        model = small(norm_pix=norm_pix)
        images, noise = torch.rand(2, 2, 8, 12), torch.rand(2, 6)
        masked, rebuilt = mae.rebuild(model, images, noise)
        visible = noise.argsort(1).argsort(1) == 0
        for image in (masked, rebuilt):
            same = (mae.patchify(image, 4) - mae.patchify(images, 4)).abs().amax(2) < 1e-6
            assert torch.equal(same, visible)
        assert (mae.patchify(masked, 4)[~visible] == 0.5).all()


def test_flops_are_those_of_the_matrix_products():
    model = small(mask_rate=0.5)
    with FlopCounterMode(display=False) as counter:
        mae.loss(model, {"images": torch.rand(3, 2, 8, 12), "noise": torch.rand(3, 6)})[0].backward()
    first = 2 * 3 * 32 * 2 * 16  # backward needs no gradient of the images, of which half is visible
    assert counter.get_total_flops() == 3 * (model.flops() - first)


def test_a_saved_model_is_read_back_and_opened_by_transformers(tmp_path):
    from transformers import ViTMAEForPreTraining

    torch.manual_seed(0)
    config = replace(ENCODER, image_size=8, norm_eps=1e-3)
    model = MAE(ViT(config), replace(DECODER, n_patches=4, mask_rate=0.5)).eval()
    images, noise = torch.randn(3, 2, 8, 8), torch.rand(3, 4)
    model.save_pretrained(tmp_path)
    again, theirs = open_model(tmp_path).eval(), ViTMAEForPreTraining.from_pretrained(tmp_path).eval()
    assert again.settings == model.settings and torch.equal(again(images, noise)[0], model(images, noise)[0])
    with torch.no_grad():
        torch.testing.assert_close(theirs(images, noise=noise).logits, model(images, noise)[0], **TOLERANCE)

    # The encoder alone, as a ViT.
    encoder = ViT.from_pretrained(tmp_path)
    assert torch.equal(encoder(images), model.model(images))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_ratio": 1.5}))
    with pytest.raises(ValueError, match=r"mask_rate 1.5: expected more than 0 and less than 1"):
        MAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mask_rate": 0.9}, "0 of 6 patches are visible; expected at least one"),
        ({"mask_rate": 1.0}, "expected more than 0 and less than 1"),
        ({"decoder_heads": 3}, "expected a multiple of the heads"),
    ],
)
def test_the_decoder_s_heads_need_not_divide_the_encoder_s_width():
    model = MAE(ViT(ENCODER), replace(DECODER, decoder_heads=3, decoder_width=24))  # the encoder's is 32
    assert model.predict(torch.rand(2, 2, 8, 12), torch.rand(2, 6), 3)[0].shape == (2, 3, 32)


def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(DECODER, **changes)


def test_a_run_leaves_pictures_and_an_encoder_to_fine_tune(tmp_path, few_glyphs):
    flags = ["--steps", "4", "--eval-every", "2", "--batch-size", "8", "--log-every", "1"]
    flags += ["--cache", str(tmp_path / "cache"), "--set", "n_layers=1"]
    ended = run_command("train.py", "--model", "mae", *flags, "--out", tmp_path / "mae")
    assert ended.code == 0, ended.err
    assert "the mean image has a squared error of 0." in ended.out and " of 8 images: 32" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "mae" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows if "loss" in row] == [8, 16, 24, 32]
    assert not any("perplexity" in row for row in rows)
    assert {path.name for path in (tmp_path / "mae" / "pictures").iterdir()} == {"0.png", "2.png", "4.png"}
    assert (tmp_path / "mae" / "report.html").read_text().count("data:image/png;base64,") == 3
    assert open_model(tmp_path / "mae" / "model").config.patch_size == 4  # by the task's own size

    # Resumed from the middle, it computes the same to the bit.
    half = [*flags, "--steps", "2", "--warmup", "0", "--schedule", "constant", "--out", tmp_path / "half"]
    assert run_command("train.py", "--model", "mae", *half).code == 0
    resumed = [*half, "--steps", "4", "--resume"]
    assert run_command("train.py", "--model", "mae", *resumed).code == 0
    whole = [*flags, "--warmup", "0", "--schedule", "constant", "--out", tmp_path / "whole"]
    assert run_command("train.py", "--model", "mae", *whole).code == 0
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("half", "whole")]
    assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())

    # A run that begins with a MAE has its decoder, too, unless it should have another shape.
    start = ["--model", "mae", "--init-from", tmp_path / "mae" / "model", *flags[:-2], "--steps", "1"]
    assert run_command("train.py", *start, "--out", tmp_path / "further").code == 0
    again = [json.loads(line) for line in (tmp_path / "further" / "metrics.jsonl").read_text().splitlines()]
    assert again[0]["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
    ended = run_command("train.py", *start, "--set", "decoder_layers=1", "--out", tmp_path / "shallow")
    assert ended.code == 0 and "add --set decoder_layers=2 to keep it (here: 1)" in ended.out

    # Its encoder learns to classify.
    fine = [
        "--model",
        "vit",
        "--init-from",
        tmp_path / "mae" / "model",
        *flags[:-2],
        "--out",
        tmp_path / "vit",
    ]
    ended = run_command("train.py", *fine)
    assert ended.code == 2 and "add --set n_classes=3 for a new classifier" in ended.err
    ended = run_command("train.py", *fine, "--set", "n_classes=3")
    assert ended.code == 0, ended.err
    assert open_model(tmp_path / "vit" / "model").config.labels == ("A", "b", "7")
