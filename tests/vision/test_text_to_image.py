"""Text to image: latents that are computed once, their scale, the batches, what learns, and a small run."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import train as train_py
from data.tokenizer import get_tokenizer
from formats.open_model import open_model
from vision import autoencoder_kl, first_stage, judge, text_to_image, unet
from vision.autoencoder_kl import AutoencoderKL
from vision.clip_towers import TextConfig, TextTower
from vision.latent_diffusion import Config, LatentDiffusion
from vision.text_to_image import LatentRows, make_batch

VAE = autoencoder_kl.Config((4, 8), 1, 2, n_channels=1, n_latent=3, image_size=8, kernels="reference")
UNET = unet.Config(
    (4, 8), (1, 0), 1, 3, 3, 4, d_text=12, n_heads=2, n_groups=2, norm_eps=1e-5, cos_first=True, freq_shift=0,
    padding=1, kernels="reference",
)  # fmt: skip
SMALL = Config(VAE, UNET, TextConfig(1, 2, 12, 14, kernels="reference", vocab_size=257, eos_token_id=256))


def small_vae(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(replace(VAE, **changes)).eval()


def test_latents_are_the_autoencoders_and_are_computed_once(tmp_path):
    vae = small_vae()
    images = np.random.default_rng(0).integers(0, 256, (70, 1, 8, 8), np.uint8)  # more than one chunk
    path = tmp_path / "cache" / "a.npy"
    table = text_to_image.moments(vae, images, path)
    mean, log_variance = vae.encode(torch.from_numpy(images).float() / 127.5 - 1)
    torch.testing.assert_close(torch.from_numpy(table[:, 0].copy()), mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(table[:, 1].copy()), (log_variance / 2).exp().detach(), rtol=1e-4, atol=1e-5
    )
    again = text_to_image.moments(None, images, path)  # no autoencoder is needed
    assert np.array_equal(again, table)


def test_scaled_latents_have_a_variance_of_one():
    generator = torch.Generator().manual_seed(5)
    mean, deviation = 3 * torch.randn(400, 2, 4, 4, generator=generator), torch.full((400, 2, 4, 4), 4.0)
    found = text_to_image.deviation_of(torch.stack((mean, deviation), 1).numpy())
    assert found == pytest.approx(5, rel=0.02)


def test_a_batch_draws_latents_anew_and_empties_a_tenth_of_the_texts_to_learn_from():
    tokens, empty = np.arange(3), np.full(3, 256)

    class Captions:
        def __len__(self):
            return 500

        def __getitem__(self, i):
            return {"image": np.zeros(1), "tokens": tokens, "augment": np.array(i < 400)}

    moments = np.zeros((500, 2, 3, 4, 4), np.float32)
    moments[:, 0], moments[:, 1] = 5, 2
    rows = LatentRows(Captions(), moments, empty)
    assert rows[3].keys() == {"tokens", "augment", "mean", "deviation", "empty"}
    batch = make_batch([rows[i] for i in range(500)], SMALL, torch.Generator().manual_seed(0), None)
    assert batch["latents"].mean().item() == pytest.approx(5, abs=0.05)
    assert batch["latents"].std().item() == pytest.approx(2, abs=0.05)
    assert batch["noise"].std().item() == pytest.approx(1, abs=0.02)
    assert abs((batch["noise"] * (batch["latents"] - 5)).mean()) < 0.05
    is_empty = (batch["tokens"] == 256).all(1)
    assert 0.06 < is_empty[:400].float().mean() < 0.15 and not is_empty[400:].any()
    assert batch["t"].sort().values.diff().max() <= 3


def test_images_are_rebuilt_in_chunks_and_their_error_is_that_of_all(monkeypatch):
    vae, sizes = small_vae(), []
    images = np.random.default_rng(0).integers(0, 256, (70, 1, 8, 8), np.uint8)
    table = np.random.default_rng(1).normal(size=(70, 2, 3, 4, 4)).astype(np.float32)
    with torch.no_grad():
        rebuilt = vae.decode(torch.from_numpy(table[:, 0])) / 2 + 0.5
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    expected = (rebuilt.numpy() - images / 255) ** 2
    assert text_to_image.error_of(vae, images, table) == pytest.approx(expected.mean(), rel=1e-5)
    assert sizes == [64, 6]


def test_the_autoencoder_is_frozen_and_a_trained_text_tower_too():
    model = text_to_image.wrap(LatentDiffusion(SMALL), SMALL)
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert all(p.requires_grad for p in [*model.unet.parameters(), *model.text_encoder.parameters()])
    model = text_to_image.wrap(model, replace(SMALL, text_tower="somewhere"))
    assert not any(p.requires_grad for p in model.text_encoder.parameters())


def test_an_autoencoder_of_glyphs_is_made_first_where_none_is_named(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(first_stage, "trained", lambda *arguments: made.append(arguments) or "there")
    assert text_to_image.of_glyphs(Namespace(data="glyphs:all", cache=tmp_path)) == "there"
    assert made[0][1:4] == ("autoencoder_kl", "glyphs:all", text_to_image.VAE_STEPS)
    with pytest.raises(ValueError, match=r"--data a\.jsonl: name the directory of an autoencoder, --set"):
        text_to_image.of_glyphs(Namespace(data="a.jsonl"))


def test_a_first_stage_that_was_killed_between_two_renames_goes_on(monkeypatch, tmp_path):
    args = Namespace(cache=tmp_path, seed=0, device="cpu", kernels="auto")
    out, started = tmp_path / "clip-glyphs-5-0", []
    (out / "checkpoint.previous").mkdir(parents=True)

    def end(command, env):
        started.append(command)
        (out / "checkpoint").mkdir()
        (out / "checkpoint" / "state.json").write_text('{"step": 5}')
        return Namespace(returncode=0)

    monkeypatch.setattr(first_stage.subprocess, "run", end)
    first_stage.trained(args, "clip", "glyphs", 5, "a CLIP learns captions", "--tower DIR")
    assert started[0][-1] == "--resume"


@pytest.mark.usefixtures("few_glyphs")
def test_a_run_draws_captions_and_goes_on_from_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "STEPS", 2)
    monkeypatch.setattr(text_to_image, "SAMPLER_STEPS", 2)
    small_vae(image_size=32, channels=(4, 4, 4)).save_pretrained(tmp_path / "vae")
    (tmp_path / "clip").mkdir()
    tower = replace(SMALL.text, d_model=96, d_ff=16, n_heads=4, max_seq_len=60)
    TextTower(tower).save_pretrained(tmp_path / "clip")
    get_tokenizer("bytes").save(tmp_path / "clip")
    common = ["--model", "latent_diffusion", "--cache", str(tmp_path / "cache"), "--batch-size", "4"]
    argv = [*common, "--steps", "4", "--eval-every", "4", "--set", f"autoencoder={tmp_path / 'vae'}"]
    argv += [f"text_tower={tmp_path / 'clip'}", "--out", str(tmp_path / "run")]
    assert train_py.main(argv) == 0
    assert "rebuilt from latents, images have a squared error of" in capsys.readouterr().out
    shown = (tmp_path / "run" / "samples.txt").read_text()
    assert "w = 2" in shown and "rebuilt" in shown and "character" in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] > 0

    # The model holds all parts; the frozen ones are those of the start.
    model = open_model(tmp_path / "run" / "model")
    own = {"vae": AutoencoderKL, "text_encoder": TextTower}
    for name, folder in (("vae", "vae"), ("text_encoder", "clip")):
        start = own[name].from_pretrained(tmp_path / folder).state_dict()
        for key, w in getattr(model, name).state_dict().items():
            assert torch.equal(w, start[key]), key
    assert model.config.max_seq_len == 60 and model.config.vae.scaling_factor != 0.18215

    # And is trained further, with the same latents. It has an autoencoder, so no other is taken.
    argv = [*common, "--steps", "1", "--init-from", str(tmp_path / "run" / "model")]
    assert train_py.main([*argv, "--set", "autoencoder=other", "--out", str(tmp_path / "other")]) == 2
    assert "autoencoder=other: the model in --init-from has its own" in capsys.readouterr().err
    assert train_py.main([*argv, "--out", str(tmp_path / "more")]) == 0
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 2
    more = open_model(tmp_path / "more" / "model")
    assert more.config.vae == model.config.vae
