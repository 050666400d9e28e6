"""Latent diffusion against diffusers' pipeline (recorded), its parts, its FLOPs, and its command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_vit import TOLERANCE, shaken
from torch.utils.flop_counter import FlopCounterMode

from data.tokenizer import get_tokenizer
from formats.open_model import open_model
from vision import autoencoder_kl, latent_diffusion, noise, unet
from vision.clip_towers import TextConfig
from vision.latent_diffusion import SIZES, Config, LatentDiffusion

FOLDER = Path(__file__).parents[1] / "fixtures" / "latent-diffusion"
VAE = autoencoder_kl.Config(
    (4, 4), 1, 2, n_channels=1, n_latent=2, image_size=8, scaling_factor=0.5, kernels="reference"
)
UNET = unet.Config(
    (4, 8), (1, 0), 1, 2, 2, 4, d_text=12, n_heads=2, n_groups=2, norm_eps=1e-5, cos_first=True, freq_shift=0,
    padding=1, kernels="reference",
)  # fmt: skip
SMALL = Config(
    VAE, UNET, TextConfig(1, 2, 12, 14, kernels="reference", vocab_size=257, max_seq_len=30, eos_token_id=256)
)


def small(**changes):
    torch.manual_seed(0)
    return shaken(LatentDiffusion(replace(SMALL, **changes)), 0.1)


def test_a_pipeline_draws_the_images_that_diffusers_draws():
    expected = load_file(FOLDER / "expected.safetensors")
    model = open_model(FOLDER)
    assert type(model) is LatentDiffusion
    assert model.config.process == {
        "target": "v", "schedule": "scaled_linear", "n_steps": 1000, "zero_terminal": False,
    }  # fmt: skip
    states = model.text_encoder.states(expected["tokens"])
    torch.testing.assert_close(states, expected["states"], **TOLERANCE)
    how = {"guidance": 1.5, "steps": 5, "x": expected["x"]}
    images = model.draw(expected["tokens"], expected["empty"], **how)
    # diffusers' tables are float32, which is 2e-5 in an image.
    torch.testing.assert_close(images, expected["images"], rtol=0, atol=5e-5)
    without = model.draw(expected["tokens"], expected["empty"], **how | {"guidance": 1.0})
    assert (without - images).abs().max() > 0.01


def test_a_written_pipeline_has_the_parts_and_opens_again(tmp_path):
    model = open_model(FOLDER)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "vae", "unet", "text_encoder", "scheduler", "model_index.json",
    }  # fmt: skip
    again = open_model(tmp_path)
    assert again.config == model.config
    state = model.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in again.state_dict().items())
    for part in ("vae", "unet"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        written, stored = load_file(tmp_path / file), load_file(FOLDER / file)
        assert written.keys() == stored.keys()
    written = load_file(tmp_path / "text_encoder" / "model.safetensors")
    # Published files have the prefix, those of transformers 5 have none; it reads both.
    stored = load_file(FOLDER / "text_encoder" / "model.safetensors")
    assert written.keys() == {f"text_model.{name}" for name in stored}
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is False  # latents have no bounds


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "class 'FluxPipeline': expected StableDiff"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae 'AutoencoderTiny' is not impl"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not"),
        ("unet/config.json", {"cross_attention_dim": 10}, "shape"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "layers.1.* is missing"),
    ],
)
def test_what_cannot_be_read_is_named(file, change, words, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=words):
        open_model(folder)


def test_stable_diffusion_has_its_number_of_parameters():
    with torch.device("meta"):
        model = LatentDiffusion(SIZES["stable-diffusion-1"])
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts == {"vae": 83_653_863, "unet": 859_520_964, "text_encoder": 123_060_480}
    assert sum(parts.values()) == 1_066_235_307


@pytest.mark.parametrize("target", ["v", "x0", "eps"])
def test_the_loss_is_that_of_scaled_latents(target):
    model = small(target=target)
    generator = torch.Generator().manual_seed(1)
    latents, eps = torch.randn(2, 2, 2, 4, 4, generator=generator)
    t, tokens = torch.tensor([10, 900]), torch.randint(0, 256, (2, 30), generator=generator)
    value, _ = model.loss({"latents": latents, "noise": eps, "t": t, "tokens": tokens})
    z, share = 0.5 * latents, noise.schedule("cosine")[t].float().view(2, 1, 1, 1)
    found = model.unet(share.sqrt() * z + (1 - share).sqrt() * eps, t, text=model.text_encoder.states(tokens))
    goals = {"v": share.sqrt() * eps - (1 - share).sqrt() * z, "x0": z, "eps": eps}
    torch.testing.assert_close(value, (found - goals[target]).square().mean())


def test_drawn_latents_are_unscaled_before_they_are_decoded(monkeypatch):
    model, z = small(), torch.randn(2, 2, 4, 4)
    monkeypatch.setattr(noise, "sample", lambda *_, **__: z)
    images = model.draw(torch.zeros(2, 30, dtype=torch.long), None)
    torch.testing.assert_close(images, (model.vae.decode(z / 0.5) / 2 + 0.5).clamp(0, 1))


def test_flops_are_those_of_the_unet_and_the_text_tower():
    model, B, T = small(), 2, 30
    t, tokens = torch.tensor([1, 2]), torch.zeros(B, T, dtype=torch.long)
    batch = {"latents": torch.randn(B, 2, 4, 4), "noise": torch.randn(B, 2, 4, 4), "t": t, "tokens": tokens}
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)[0].backward()
    # Backward needs no gradient of the noisy latents, and none of the times' sines.
    net = model.unet
    first = 2 * B * (16 * net.conv_in.weight.numel() + net.time_embedding.linear_1.weight.numel())
    assert counter.get_total_flops() == B * model.flops_per_token(T) - first


def test_parts_that_do_not_fit_are_refused():
    for changes, words in (
        ({"unet": replace(UNET, d_text=10)}, "reads 10 wide states and 2 channels, but texts have 12 wide"),
        ({"vae": replace(VAE, n_latent=3)}, "and latents 3 channels"),
        ({"drop": 1.0}, "drop 1"),
        ({"target": "y"}, "target 'y': expected v or x0 or eps"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **changes)


def test_the_command_draws_prompts_into_a_file(tmp_path, capsys):
    small().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer").mkdir()
    get_tokenizer("bytes").save(tmp_path / "m" / "tokenizer")
    argv = [str(tmp_path / "m"), "--prompt", "one", "two", "--n", "3", "--steps", "2"]
    latent_diffusion.main([*argv, "--out", str(tmp_path / "new" / "g.png")])
    assert "6 images of 2 steps" in capsys.readouterr().out and (tmp_path / "new" / "g.png").exists()
    with pytest.raises(ValueError, match="expected --prompt TEXT"):
        latent_diffusion.main([str(tmp_path / "m")])
