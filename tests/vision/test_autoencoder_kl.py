"""The KL autoencoder against diffusers (recorded), closed forms of its loss, and a small run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import TOLERANCE, assert_gradients, assert_same_weights, shaken
from torch.utils.flop_counter import FlopCounterMode

import train as train_py
from formats.diffusers import WEIGHTS
from formats.open_model import open_model
from vision import autoencoder_kl
from vision.autoencoder_kl import SIZES, AutoencoderKL, Config

FOLDER = Path(__file__).parents[1] / "fixtures" / "autoencoder-kl"
SMALL = Config((4, 8), 1, 2, n_channels=1, n_latent=3, image_size=(8, 12), kernels="reference")


def small(**changes):
    torch.manual_seed(0)
    return shaken(AutoencoderKL(replace(SMALL, **changes)), 0.1)


def batch_of(n=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, 8, 12, generator=generator) * 2 - 1
    return {"images": images, "noise": torch.randn(n, 3, 4, 6, generator=generator)}


# --- against diffusers


def test_moments_images_loss_and_gradients_are_those_of_diffusers():
    expected = load_file(FOLDER / "expected.safetensors")
    model = open_model(FOLDER)
    assert type(model) is AutoencoderKL and model.config.channels == (4, 6)
    pixels, noise = expected["pixels"], expected["noise"]
    mean, log_variance = model.encode(pixels)
    torch.testing.assert_close(torch.cat((mean, log_variance), 1), expected["moments"], **TOLERANCE)
    rebuilt = model.decode(mean + (log_variance / 2).exp() * noise)
    torch.testing.assert_close(rebuilt, expected["rebuilt"], **TOLERANCE)
    model.config = replace(model.config, beta=0.1)
    loss, metrics = model.loss({"images": pixels, "noise": noise})
    torch.testing.assert_close(loss / 100, expected["loss"], **TOLERANCE)
    torch.testing.assert_close(metrics["mse"], (pixels - rebuilt).square().mean())
    (loss / 100).backward()
    assert_gradients(model, expected)


def test_a_written_model_has_the_same_files_as_diffusers_writes(tmp_path):
    model = open_model(FOLDER)
    model.save_pretrained(tmp_path)
    assert_same_weights(tmp_path, FOLDER, WEIGHTS)
    content, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, FOLDER))
    assert {k: content.get(k) for k in theirs if k[:1] != "_"} == {
        k: v for k, v in theirs.items() if k[:1] != "_"
    }
    assert content["_class_name"] == "AutoencoderKL"


def test_old_files_with_convolutions_in_place_of_the_matrices_are_read(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "old")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, w in load_file(FOLDER / WEIGHTS).items():
        found = next((ours for ours in new if f".{ours}." in name), None)
        is_matrix = found and name.endswith("weight")
        old[name.replace(found, new[found]) if found else name] = (
            w[:, :, None, None].contiguous() if is_matrix else w
        )
    save_file(old, folder / WEIGHTS)
    expected = load_file(FOLDER / "expected.safetensors")
    mean, _ = open_model(folder).encode(expected["pixels"])
    torch.testing.assert_close(mean, expected["moments"][:, :3], **TOLERANCE)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDown.*expected 2 times DownEncoder"),
        ({"out_channels": 5}, "2 channels in, 5 out"),
        ({"latents_mean": [0.1]}, r"latents_mean \[0.1\] is not implemented"),
        ({"block_out_channels": [4, 5]}, "channels .*expected multiples of n_groups 2"),
        ({"block_out_channels": 8}, "block_out_channels 8: expected a list"),
        ({"something_new": 3}, "something_new 3 is not implemented"),
        ({"layers_per_block": 2}, "resnets"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    ],
)
def test_what_cannot_be_read_is_named(change, words, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=words):
        open_model(folder)


def test_the_published_autoencoder_has_its_number_of_parameters():
    with torch.device("meta"):
        model = AutoencoderKL(SIZES["sd-f8"])
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts == {"encoder": 34163592, "decoder": 49490179, "quant_conv": 72, "post_quant_conv": 20}
    assert sum(parts.values()) == 83_653_863


# --- the loss


def test_the_kl_is_its_closed_form_and_summed_over_latents():
    one = autoencoder_kl.kl(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert one.item() == pytest.approx(0.57436, abs=1e-5)
    mean, log_variance = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(autoencoder_kl.kl(mean, log_variance), expected.flatten(1).sum(1))


def test_the_loss_is_a_sum_over_pixels_and_latents_and_the_mean_over_images():
    for power in (1, 2):
        model, batch = small(power=power, beta=0.3), batch_of()
        total, _ = model.loss(batch)
        each = [model.loss({k: t[i : i + 1] for k, t in batch.items()})[0] for i in range(2)]
        torch.testing.assert_close(total, torch.stack(each).mean())
        mean, log_variance = model.encode(batch["images"])
        rebuilt = model.decode(mean + (log_variance / 2).exp() * batch["noise"])
        expected = sum(abs(d) ** power for d in (rebuilt - batch["images"])[0].flatten().tolist())
        expected += 0.3 * autoencoder_kl.kl(mean, log_variance)[0].item()
        assert each[0].item() == pytest.approx(expected, rel=1e-4)


def test_the_logarithm_of_the_variance_is_clamped():
    model = small()
    with torch.no_grad():
        model.quant_conv.bias[3:] = torch.tensor([1e4, -1e4, 0.0])
    _, log_variance = model.encode(batch_of()["images"])
    assert log_variance[:, 0].eq(20).all() and log_variance[:, 1].eq(-30).all()


def test_latents_are_scaled_after_encoding_and_back_before_decoding():
    model, images = small(scaling_factor=0.5, shift_factor=0.2), batch_of()["images"]
    mean, _ = model.encode(images)
    latents = model.to_latents(images)
    torch.testing.assert_close(latents, (mean - 0.2) * 0.5)
    torch.testing.assert_close(model.from_latents(latents), model.decode(mean))
    noise = batch_of()["noise"]
    assert not torch.equal(model.to_latents(images, noise), latents)


def test_a_new_model_begins_without_residual_blocks():
    torch.manual_seed(0)
    model = AutoencoderKL(SMALL)
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(model.encoder.mid_block(x), x)


def test_latents_of_a_model_in_bfloat16_are_decoded():
    model, images = small().bfloat16(), batch_of()["images"].bfloat16()
    rebuilt = model.from_latents(model.to_latents(images))
    assert rebuilt.dtype == torch.bfloat16 and rebuilt.shape == images.shape


@pytest.mark.parametrize("attention", [True, False])
def test_flops_are_those_of_convolutions_and_products(attention):
    model, batch = small(attention=attention), batch_of()
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)[0].backward()
    first = 2 * 2 * model.encoder.conv_in.weight.numel() * 8 * 12  # images need no gradient
    assert counter.get_total_flops() == 2 * model.flops_per_token() - first


def test_settings_that_make_no_sense_are_refused():
    for changes, words in (
        ({"channels": (4, 7)}, r"channels \(4, 7\): expected multiples of n_groups 2"),
        ({"image_size": 9}, "image_size 9: expected multiples of 2"),
        ({"power": 3}, "power 3: expected 1 or 2"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **changes)


# --- a run


@pytest.mark.usefixtures("few_glyphs")
def test_a_run_rebuilds_glyphs_and_its_model_rebuilds_a_file(tmp_path, monkeypatch, capsys):
    flags = ["--steps", "30", "--eval-every", "30", "--batch-size", "9", "--set", "channels=(8,8,8)"]
    argv = ["--model", "autoencoder_kl", *flags, "--out", str(tmp_path / "run")]
    assert train_py.main(argv) == 0
    out = capsys.readouterr().out
    assert "the mean image has a squared error of" in out and "standard deviation over images" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val_mse" in row)
    assert after["val_mse"] < 0.5 * before["val_mse"] and after["val_kl"] > 0
    picture = tmp_path / "run" / "picture.png"
    assert picture.exists()

    argv = ["autoencoder_kl", str(tmp_path / "run" / "model"), str(picture), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    autoencoder_kl.main()
    assert "as rebuilt, with a squared error" in capsys.readouterr().out
    assert (tmp_path / "picture.png").exists()
