"""The probe of features: beside pixels and random weights, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from conftest import run_command

import gpt
from data import glyphs
from data.glyphs import Glyph
from data.images import prepare
from evaluation import probe
from vision import energy, mae
from vision.vit import SIZES, ViT

CONFIG = replace(SIZES["tiny"], n_layers=1, d_model=32, n_heads=2, n_classes=3)
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "STIXGeneral")


@pytest.fixture
def few_glyphs(monkeypatch):
    """Let every set of glyphs be three characters in five fonts, of which two are held out."""
    every = [Glyph(font, character) for font in FONTS for character in "Ab7"]
    monkeypatch.setattr(glyphs, "choose", lambda name: (every[:9], every[9:]))


def test_features_that_hold_the_label_are_found_and_others_are_not(few_glyphs, tmp_path):
    class Knows(torch.nn.Module):
        """An encoder whose features are the labels, noted in the first pixel."""

        config = CONFIG

        def __init__(self, config=None):
            super().__init__()

        normalized = staticmethod(lambda images: images)
        features = staticmethod(
            lambda images: torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).long(), 3).float()
        )

    dataset = prepare("glyphs", (32, 32), tmp_path)
    for rows in (dataset.train, dataset.val):
        rows.rows = rows.rows.copy()
        rows.rows[:, 0, 0, 0] = rows.labels
    found = probe.table(Knows(), dataset.train, dataset.val, 1, 0)
    assert found["trained"] == (1.0, 1.0) and found.keys() == {"trained", "random weights", "pixels"}
    assert all(0 <= figure <= 1 for pair in found.values() for figure in pair)

    torch.manual_seed(0)
    noise = probe.probe(
        torch.randn(90, 5), torch.arange(90) % 3, torch.randn(300, 5), torch.arange(300) % 3, 5
    )
    assert all(figure < 0.45 for figure in noise)


def test_the_command_measures_a_vit_and_the_encoder_of_a_mae(few_glyphs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = ViT(CONFIG)
    encoder.save_pretrained("vit")
    bare = ViT(replace(CONFIG, n_classes=0))
    mae.MAE(bare, replace(mae.settings(bare.config), decoder_layers=1)).save_pretrained("mae")
    for name in ("vit", "mae"):
        printed = run_command("-m", "evaluation.probe", name, "-k", "3")
        assert printed.code == 0, printed.err
        lines = printed.out.splitlines()
        assert "3 nearest" in lines[1] and [line.split()[0] for line in lines[2:]] == [
            "trained", "random", "pixels", "chance",
        ]  # fmt: skip
    assert lines[-1].split()[1:] == ["33.3%", "33.3%"]

    gpt.GPT(gpt.Config(1, 2, 16, 16, 40, 16)).save_pretrained("gpt")
    energy.Energy(energy.Config(width=2)).save_pretrained("energy")
    for words, expected in (
        (["gpt"], "gpt: has no features of images"),
        (["energy"], "energy: has no features of images"),
        (["vit", "-k", "0"], "-k 0: expected at least 1"),
        (["vit", "-k", "99"], "-k 99: there are only 9 images"),
    ):
        ended = run_command("-m", "evaluation.probe", *words)
        assert ended.code == 2 and expected in ended.err
