"""MaskFeat: histograms of oriented gradients by a loop and by identities, what is hidden, and a small run."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_command
from small_vit import SMALL
from torch.utils.flop_counter import FlopCounterMode

from data.images import ImageRows
from data.rows import Dataset
from formats.open_model import open_model
from vision import maskfeat
from vision.maskfeat import Config, MaskFeat, hog
from vision.vit import ViT

ENCODER = replace(SMALL, n_classes=0, kernels="reference")
SETTINGS = Config(grid=(2, 3), cell=2)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = MaskFeat(ViT(ENCODER), replace(SETTINGS, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def hog_by_a_loop(image, cell):
    """Return the histograms (9, rows, columns) of one channel, pixel by pixel with the authors' bins."""
    height, width = image.shape
    around = np.pad(image, 1, mode="reflect")
    sums = np.zeros((9, height // cell, width // cell))
    for y in range(height):
        for x in range(width):
            patch = around[y : y + 3, x : x + 3]
            g_x = (patch * [[1, 0, -1], [2, 0, -2], [1, 0, -1]]).sum()
            g_y = (patch * [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]).sum()
            degrees = math.degrees(math.atan2(g_x, g_y))
            sums[math.floor(degrees / 20) % 9, y // cell, x // cell] += math.hypot(g_x, g_y)
    return sums / np.maximum(np.sqrt((sums**2).sum(0)), 1e-12)


def test_histograms_are_those_of_a_loop_over_pixels():
    # In steps of 1 / 256, so that sums are exact and no gradient of 0 is rounded into the last bin.
    images = torch.randint(256, (2, 3, 16, 24)).double() / 256
    found = hog(images, 8)
    assert found.shape == (2, 3, 9, 2, 3)
    for i in range(2):
        for c in range(3):
            expected = torch.from_numpy(hog_by_a_loop(images[i, c].numpy(), 8))
            torch.testing.assert_close(found[i, c], expected)


def test_histograms_forget_brightness_and_contrast_and_turn_with_the_image():
    images = torch.rand(1, 2, 16, 16)
    found = hog(images, 4)
    torch.testing.assert_close(found.square().sum(2), torch.ones(1, 2, 4, 4))
    torch.testing.assert_close(hog(0.25 + images / 4, 4), found, rtol=1e-4, atol=1e-5)
    for level in (0.0, 0.1, 0.3, 1.0):
        assert (hog(torch.full((1, 1, 16, 16), level), 4) == 0).all()
    # A mirrored image has its cells mirrored and its bins in reverse order. At the left and the right border
    # g_x is 0, between two bins.
    mirrored = hog(images.flip(3), 4)[..., 1:-1]
    torch.testing.assert_close(mirrored, found.flip(2, 4)[..., 1:-1], rtol=1e-4, atol=1e-5)
    # An edge from left to right has a gradient across it: one bin in all cells that it meets.
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 6:, :] = 1
    filled = hog(edge, 4)[0, 0, :, 1, 1]
    assert filled.max() == 1 and (filled > 0).sum() == 1


def test_a_patch_has_its_histograms_in_order_of_channel_bin_row_and_column():
    images = torch.rand(2, 3, 32, 48)
    whole, patches = hog(images, 8), maskfeat.hog_of_patches(images, 16, 8)
    assert patches.shape == (2, 6, 108)  # the paper's number of targets
    # Patch 5 is in row 1, column 2. Its cells are those in rows 2 to 3 and columns 4 to 5.
    torch.testing.assert_close(patches[:, 5], whole[:, :, :, 2:4, 4:6].flatten(1))


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (8, 8), (1, 5)])
def test_hidden_patches_are_in_blocks_and_always_as_many(grid):
    settings = Config(grid=grid)
    generator = torch.Generator().manual_seed(0)
    masks = [maskfeat.hidden_blocks(settings, generator) for _ in range(50)]
    assert {int(mask.sum()) for mask in masks} == {int(grid[0] * grid[1] * 0.4)}
    assert len({tuple(mask.tolist()) for mask in masks}) > (4 if grid[0] == 1 else 30)
    if grid == (14, 14):
        # In blocks a hidden patch has a hidden one to its right more often than 40 percent.
        pictures = torch.stack(masks).view(-1, *grid)
        both = (pictures[:, :, 1:] & pictures[:, :, :-1]).sum() / pictures[:, :, :-1].sum()
        assert both > 0.7


def test_what_is_hidden_is_not_seen_and_alone_is_counted():
    for target in ("hog", "pixels"):
        model = small(target=target)
        images, mask = torch.rand(2, 2, 8, 12), torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
        value, _ = maskfeat.loss(model, {"images": images, "mask": mask})
        normalized = model.model.normalized(images)
        predicted, true = model(normalized, mask), model.target(normalized)
        assert predicted.shape == true.shape == (2, 6, 2 * 9 * 4 if target == "hog" else 32)
        errors = [(predicted[i, n] - true[i, n]).square().mean() for i, n in ((0, 1), (0, 4), (1, 0))]
        torch.testing.assert_close(value, torch.stack(errors).mean())

        hidden = maskfeat.unpatchify(mask[:, :, None].expand(-1, -1, 32).contiguous(), ENCODER).bool()
        changed = torch.where(hidden, torch.rand_like(images), images)
        assert torch.equal(model(model.model.normalized(changed), mask), predicted)
        assert not torch.allclose(model(normalized, ~mask), predicted)


def test_flops_are_those_of_the_matrix_products():
    model = small()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(3, 2, 8, 12), torch.rand(3, 6) < 0.5).sum().backward()
    first = 2 * 6 * 32 * 2 * 16  # backward needs no gradient of the images
    head = 2 * 32 * 72  # the class token, which the linear layer reads in vain
    assert 0 <= 3 * (model.flops() - first) - counter.get_total_flops() <= 3 * 3 * head


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mask_rate": 0.1}, "0 of 6 patches are hidden; expected at least one"),
        ({"mask_rate": 1.0}, "6 of 6 patches are hidden"),
        ({"target": "colours"}, "expected"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SETTINGS, **changes)
    with pytest.raises(ValueError, match="cell 3: expected a divisor of patch_size 4"):
        small(cell=3)
    assert maskfeat.settings(replace(ENCODER, image_size=15, patch_size=5)).cell == 5


def test_a_run_draws_edges_and_leaves_an_encoder(tmp_path, few_glyphs):
    flags = ["--steps", "2", "--eval-every", "2", "--batch-size", "8", "--cache", tmp_path / "cache"]
    flags = ["train.py", "--model", "maskfeat", *flags, "--out", tmp_path / "run"]
    ended = run_command(*flags, "--set", "n_layers=1", "target=hog")
    assert ended.code == 0, ended.err
    assert "the mean HOG of each place has a squared error of 0." in ended.out
    assert "the mean image one of 0." in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["val_loss"] < 10 for row in rows if "val_loss" in row)
    assert "6 of 16 patches hidden" in (tmp_path / "run" / "samples.txt").read_text()
    model = open_model(tmp_path / "run" / "model")
    assert type(model) is ViT and model.config.n_classes == 0
    pixels = run_command(*flags[:-1], tmp_path / "pixels", "--set", "n_layers=1", "target=pixels")
    assert pixels.code == 0 and "rebuilt" in (tmp_path / "pixels" / "samples.txt").read_text()


def test_the_guess_is_that_of_the_cells_that_are_asked_for(monkeypatch):
    images = torch.rand(6, 1, 16, 16)
    rows = ImageRows((images * 255).byte().numpy(), np.zeros(6, int), False)
    monkeypatch.setattr(maskfeat, "load_images", lambda *_: Dataset("n", None, rows, rows))
    config = replace(SMALL, image_size=16, patch_size=8, n_channels=1)
    exact = rows.rows / 255
    for cell in (4, 8):
        dataset = maskfeat.load_data(Namespace(set=[f"cell={cell}"]), config)
        histograms = maskfeat.hog_of_patches(torch.from_numpy(exact).float(), 8, cell)
        error = (histograms - histograms.mean(0)).square().mean()
        assert f"has a squared error of {error:.4f}," in dataset.guess
    with pytest.raises(ValueError, match="cell 3: expected a divisor of patch_size 8"):
        maskfeat.load_data(Namespace(set=["cell=3"]), config)
