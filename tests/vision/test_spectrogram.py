"""AST and its filter bank against transformers and torchaudio (recorded), published counts, a small run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_of, run_command
from safetensors.torch import load_file
from small_vit import TOLERANCE, assert_gradients
from torch.utils.flop_counter import FlopCounterMode

from data import notes
from data.notes import Note, write_wav
from formats.open_model import open_model
from vision import classify_sounds, spectrogram
from vision.spectrogram import AST, SIZES, Config

AST_FIXTURE = Path(__file__).parents[1] / "fixtures" / "ast"
SMALL = Config(1, 2, 8, 12, n_frames=30, n_mels=20, patch_size=8, mel_stride=5, frame_stride=6, n_classes=3)


@pytest.fixture(scope="module")
def expected():
    return load_file(AST_FIXTURE / "expected.safetensors")


def test_a_classifier_computes_what_transformers_computes_and_so_do_its_gradients(expected):
    model = AST.from_pretrained(AST_FIXTURE)
    config = model.config
    assert (config.n_frames, config.n_mels, config.mel_stride, config.frame_stride) == (30, 20, 5, 6)
    assert config.grid == (3, 4) and config.norm_eps == 1e-5
    logits = model(expected["spectrograms"])
    torch.testing.assert_close(logits, expected["logits"], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits, expected["labels"])
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    names = {name: theirs for theirs, name in spectrogram.sounds.NAMES.items()}
    own = {name: p for name, p in model.named_parameters()}
    assert len(own) == 43
    for name, p in own.items():
        assert torch.isfinite(p.grad).all(), name
    renamed = {
        f"gradient.{spectrogram.sounds.rename(key.removeprefix('gradient.'), spectrogram.sounds.NAMES)}": g
        for key, g in expected.items()
        if key.startswith("gradient.")
    }
    assert names and len(renamed) == len(own)
    assert_gradients(model, renamed)


def test_the_filter_bank_is_that_of_transformers_and_of_torchaudio(expected):
    wave, theirs = expected["wave"], expected["fbank"]
    for dtype, tolerance in ((torch.float64, 2e-6), (torch.float32, 1e-4)):
        ours = spectrogram.filter_bank(wave.to(dtype)[None], 24)[0].float()
        assert ours.shape == (36, 24) and (ours - theirs[:36]).abs().max() < tolerance
        assert (ours - expected["torchaudio"]).abs().max() < 1e-4
    # With zeros behind the end, as in the extractor.
    config = replace(SMALL, n_frames=40, n_mels=24)
    padded = torch.nn.functional.pad(wave, (0, config.n_samples - len(wave)))[None]
    whole = spectrogram.spectrograms(padded, torch.tensor([len(wave)]), config)[0]
    assert not whole[36:].any() and (whole - theirs).abs().max() < 1e-4
    cut = spectrogram.spectrograms(wave[None], torch.tensor([len(wave)]), replace(config, n_frames=20))[0]
    assert torch.equal(cut, whole[:20])
    # Silence is the least value; 0 is louder, also after normalising (section 3 of the authors' code).
    model = AST(SMALL)
    silent = spectrogram.filter_bank(torch.zeros(1, 800), 24)
    assert (silent == np.float32(np.log(2.0**-23))).all()
    assert model.normalized(torch.zeros(1)).item() == pytest.approx(0.467, abs=1e-3)
    assert model.normalized(silent).max().item() == pytest.approx(-1.28, abs=0.01)


@pytest.mark.parametrize(
    "name, n_params, n_tokens",
    [
        ("audioset", 86_594_063, 1214),
        ("speech-commands", 85_395_491, 146),
        ("esc-50", 85_757_234, 602),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters_and_tokens(name, n_params, n_tokens):
    with torch.device("meta"):
        model = AST(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == n_params and 2 + SIZES[name].n_patches == n_tokens


def test_flops_are_those_of_the_matrix_products_in_one_second_of_sound():
    torch.manual_seed(0)
    model, x = AST(replace(SMALL, kernels="reference")), torch.randn(3, 30, 20)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    first = 2 * SMALL.n_patches * 8 * 64  # backward needs no gradient of the picture
    unread = SMALL.n_patches * (2 * 8 * 8 + 2 * 8 * SMALL.d_ff + 2 * (2 + SMALL.n_patches) * 8)
    flops = 6 * (spectrogram.n_macs(SMALL) - unread)  # the last layer computes the two tokens in front alone
    assert counter.get_total_flops() == 3 * (flops - first)
    assert (
        model.flops_per_token(1) == round(flops / SMALL.seconds)
        and SMALL.seconds == (400 + 29 * 160) / 16_000
    )


def test_a_saved_model_is_read_back_to_the_bit_and_opened_by_transformers(tmp_path):
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    model, x = AST(replace(SMALL, norm_eps=1e-3, mean=-3.5, std=2.0)), torch.randn(2, 30, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.save_pretrained(tmp_path, ("cat", "dog", "eel"))
        again = open_model(tmp_path)
        assert torch.equal(again(x), model(x))
        assert again.config == replace(model.config, labels=("cat", "dog", "eel"))
        theirs = ASTForAudioClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(x).logits, model(x), **TOLERANCE)
    assert theirs.config.id2label[1] == "dog"
    extractor = ASTFeatureExtractor.from_pretrained(tmp_path)
    assert (extractor.max_length, extractor.num_mel_bins, extractor.mean, extractor.std) == (
        30,
        20,
        -3.5,
        2.0,
    )


def test_a_field_or_a_rate_that_is_not_implemented_is_named(tmp_path):
    AST(SMALL).save_pretrained(tmp_path)
    for change, words in (
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not implemented"),
        ({"patch_size": [8, 4]}, "patch_size .*expected a whole number"),
        ({"patch_size": 25}, "patch_size 25: larger than"),
    ):
        with pytest.raises(ValueError, match=words):
            AST.from_pretrained(copy_of(tmp_path, tmp_path / "copy", **change))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": 8000}))
    with pytest.raises(ValueError, match="sampling_rate 8000: only 16000 is implemented"):
        AST.from_pretrained(tmp_path)


def flags(tmp_path, *more):
    small = ["--steps", "4", "--eval-every", "2", "--batch-size", "4", "--log-every", "1"]
    small += ["--cache", tmp_path / "cache", "--set", "n_layers=1", "d_model=32", "d_ff=32", "n_frames=50"]
    return ["train.py", "--model", "spectrogram", *small, "--out", tmp_path / "run", *more]


def test_a_run_counts_seconds_of_sound_and_shows_a_picture_of_its_labels(tmp_path, few_notes):
    ended = run_command(*flags(tmp_path))
    assert ended.code == 0, ended.err
    seconds = (400 + 49 * 160) / 16_000
    assert "12 sounds of 0.52 s at 16,000 Hz to learn from, 12 held out, 6 classes" in ended.out
    assert f"4 steps of {4 * seconds:g} seconds-of-sound" in ended.out and "seconds-of-sound/s" in ended.err
    assert "logistic regression on the mean spectrum for" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1].keys() == {"step", "seconds-of-sound", "val_loss", "val_accuracy"}
    assert rows[-1]["seconds-of-sound"] == pytest.approx(4 * 4 * seconds)
    start = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]
    assert start["unit"] == "seconds-of-sound" and start["flags"]["optimizer"] == "muon"
    assert {path.name for path in (tmp_path / "run" / "pictures").iterdir()} == {"0.png", "2.png", "4.png"}
    assert "of 12 right; most often taken" in (tmp_path / "run" / "samples.txt").read_text()
    assert open_model(tmp_path / "run" / "model").config.labels == notes.INSTRUMENTS

    # The model learns other classes, with a new classifier on its other weights.
    for name, pitch in (("high", 60), ("low", 45)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            sound = notes.render(Note("organ", "major", pitch, i), 16_000, 16_000)
            write_wav(tmp_path / "set" / name / f"{i}.wav", sound, 16_000)
    more = ["--data", tmp_path / "set", "--init-from", tmp_path / "run" / "model", "--out", tmp_path / "fine"]
    short = [*flags(tmp_path)[:11], "--cache", tmp_path / "cache", *more]
    ended = run_command(*short)
    assert ended.code == 2 and "6 classes, " in ended.err and "add --set n_classes=2" in ended.err
    ended = run_command(*short, "--set", "n_classes=2", "--lr", "0")
    assert ended.code == 0, ended.err
    fine, first = (open_model(tmp_path / run / "model") for run in ("fine", "run"))
    assert fine.config.labels == ("high", "low") and fine.classifier.weight.shape == (2, 32)
    assert torch.equal(fine.ast.layernorm.weight, first.ast.layernorm.weight)

    # The command classifies files.
    write_wav(tmp_path / "a.wav", notes.render(Note("saw", "minor", 60), 20_000, 16_000), 16_000)
    ended = run_command("-m", "vision.spectrogram", tmp_path / "run" / "model", tmp_path / "a.wav")
    assert ended.code == 0 and "%, " in ended.out and "longer than 0.52 s (beginning kept)" in ended.out
    assert "86,594,063" in run_command("-m", "vision.spectrogram").out
    ended = run_command("-m", "vision.spectrogram", tmp_path / "run" / "model")
    assert ended.code == 2 and "no sounds to classify" in ended.err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data", "nowhere"], "--data nowhere: not found; expected notes, or a folder of sounds"),
        (["--document-mask"], "--document-mask: sounds have no documents"),
        (["--set", "time_mask=99"], "time_mask 99: expected at most"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(tmp_path, more, words, few_notes):
    ended = run_command(*flags(tmp_path, *more))
    line = ended.err.strip().splitlines()[-1]
    assert ended.code == 2 and line.startswith("error: ") and words in line, ended.err


def test_a_batch_masks_a_band_and_a_stretch_of_what_is_learned_from(few_notes, tmp_path):
    config = replace(SMALL, n_mels=64, n_frames=98, patch_size=16)
    dataset = classify_sounds.prepare("notes", config.n_samples, 16_000, tmp_path)
    settings = classify_sounds.settings(config)
    assert (settings.frequency_mask, settings.time_mask) == (24, 18)
    rows = [dataset.train[0], dataset.val[0]]

    def batch(seed):
        return classify_sounds.make_batch(rows, settings, torch.Generator().manual_seed(seed), None)[
            "spectrograms"
        ]

    plain = classify_sounds.pictures_of(rows, config)
    assert torch.equal(batch(0), batch(0)) and torch.equal(batch(5)[1], plain[1])
    widths = []
    for seed in range(40):
        x = batch(seed)[0]
        hidden = [(x == 0).all(dim).nonzero().flatten() for dim in (0, 1)]  # mels, frames
        for places in hidden:
            assert len(places) == 0 or len(places) == places[-1] - places[0] + 1
        widths.append([len(places) for places in hidden])
        # Elsewhere all numbers are higher or lower alike, but for those near the floor.
        loud = (x != 0) & (plain[0] > -8)
        gain = (x - plain[0])[loud]
        assert gain.std() < 0.01 and gain.abs().max() < 6 / 20 * np.log(100) + 0.01
    assert np.max(widths, axis=0).tolist() <= [24, 18] and np.max(widths, axis=0).min() > 10
