"""VAE: the bounds beside a likelihood that is exact, their order, active units, and a small run."""

import json
import math

import pytest
import torch
from conftest import run_command
from small_vit import shaken
from torch.utils.flop_counter import FlopCounterMode

from formats.open_model import open_model
from vision import vae
from vision.vae import VAE, Config

SMALL = Config(width=16, n_latents=1, image_size=(3, 4))


def small(**changes) -> VAE:
    """Return a model with weights that are far from their start, so that codes matter."""
    torch.manual_seed(0)
    return shaken(VAE(Config(**vars(SMALL) | changes)), 0.3)


def images(n: int = 6) -> torch.Tensor:
    return (torch.rand(n, 1, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()


def test_the_kl_is_the_closed_form_summed_over_units():
    mu, log_variance = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    assert vae.kl_to_standard(mu, log_variance)[0].item() == pytest.approx(2 * 0.57436, abs=1e-4)
    assert vae.kl_to_standard(mu, log_variance)[1] == 0


@torch.no_grad()
def test_the_gap_of_the_elbo_is_the_kl_to_the_true_posterior():
    model, x = small().double(), images().double()
    # With a code of one number, log p(x) is an integral over a line.
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)[:, 0]
    pixels = torch.distributions.Bernoulli(logits=model.decode(z).double())
    joint = torch.stack([pixels.log_prob(image.flatten()).sum(1) for image in x]) + prior  # (B, grid)
    step = (z[1] - z[0]).log()
    exact = torch.logsumexp(joint, 1) + step
    mu, log_variance = (value.double() for value in model.encode(x))
    log_q = torch.distributions.Normal(mu, (log_variance / 2).exp()).log_prob(z[:, 0])
    elbo = (log_q.exp() * (joint - log_q)).sum(1) * step.exp()
    gap = (log_q.exp() * (log_q - (joint - exact[:, None]))).sum(1) * step.exp()
    torch.testing.assert_close(exact - elbo, gap, rtol=0, atol=1e-4)  # float32
    assert (gap > 1e-3).all()

    # The loss is minus the ELBO, and the bounds rise to the exact likelihood.
    noise = torch.randn(len(x), 8000, 1, generator=torch.Generator().manual_seed(0)).double()
    drawn = model.sample(x, noise)
    log_w = drawn.log_p + drawn.log_ratio
    assert ((log_w.mean(1) - elbo).abs() < 4 * log_w.std(1) / 8000**0.5).all()
    one_each = {"images": x.repeat_interleave(8000, 0), "noise": noise.flatten(0, 1)[:, None]}
    assert model.loss(one_each)[0].item() == pytest.approx(-elbo.mean().item(), abs=0.1)
    torch.testing.assert_close(vae.iwae(log_w), exact, rtol=0, atol=0.02)
    assert model.loss({"images": x, "noise": noise})[0].item() == pytest.approx(
        -exact.mean().item(), abs=0.02
    )


@torch.no_grad()
def test_bounds_are_ordered_by_the_number_of_codes():
    found = vae.measure(small(n_latents=3), images(20)).nats
    assert found[1] < found[10] < found[100] < 0


@torch.no_grad()
def test_bounds_are_equal_and_exact_where_the_encoder_finds_the_posterior():
    model = small()
    for p in (*model.to_code.parameters(), *model.decoder_pred.parameters()):
        p.zero_()  # no pixel depends on the code, whose posterior is then the prior
    found = vae.measure(model, images())
    assert found.nats == pytest.approx({K: -12 * math.log(2) for K in (1, 10, 100)}, abs=1e-4)
    assert found.n_active == 0
    value, metrics = model.loss({"images": images(), "noise": torch.randn(6, 1, 1)})
    assert value.item() == pytest.approx(12 * math.log(2)) and metrics["squared_error"] == 0.25


@torch.no_grad()
def test_a_unit_is_active_where_its_mean_changes_with_the_image():
    model = small(n_latents=4)
    model.to_code.weight[[0, 2]] = 0.0  # the means of two of four units
    assert vae.measure(model, images(20)).n_active == 2


def test_flops_are_those_of_the_matrix_products():
    model = small(n_latents=3, n_samples=5)
    with FlopCounterMode(display=False) as counter:
        model.loss({"images": images(2), "noise": torch.randn(2, 5, 3)})[0].backward()
    first = 2 * model.encoder[0].weight.numel()  # the images need no gradient
    assert counter.get_total_flops() == 2 * (model.flops_per_token() - first)


def test_baselines_are_counts_of_each_pixel():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.2, 1.0]]).view(4, 1, 1, 2)
    p = [3.5 / 5, 1.5 / 5]
    held = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    nats = -(math.log(p[0]) + math.log(1 - p[1]))
    error = (0.25**2 + 0.25**2) / 2
    assert f"need {nats:.1f} nats" in vae.describe(train, held)
    assert f"error of {error:.4f}" in vae.describe(train, held)


def test_a_run_learns_and_its_model_draws(tmp_path, few_glyphs):
    flags = ["--steps", "60", "--eval-every", "60", "--batch-size", "9", "--lr", "1e-2"]
    flags += ["--set", "width=32", "n_latents=4", "image_size=(8,8)"]
    ended = run_command("train.py", "--model", "vae", *flags, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "independent pixels need" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val_kl" in row)
    assert after["val_loss"] < 0.8 * before["val_loss"] and after["val_kl"] > 0.1
    assert "IWAE-100" in (tmp_path / "run" / "samples.txt").read_text()

    model = open_model(tmp_path / "run" / "model")
    drawn = [model.draw(3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (3, 1, 8, 8) and torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])
    ended = run_command("-m", "vision.vae", tmp_path / "run" / "model", "-n", "5", "--out", tmp_path)
    assert ended.code == 0 and "picture.png: 5 images" in ended.out
    ended = run_command("-m", "vision.vae", tmp_path / "run" / "model", "-n", "0")
    assert ended.code == 2 and "-n 0: expected at least 1 image" in ended.err


def test_a_size_that_is_no_height_and_width_is_refused():
    with pytest.raises(ValueError, match="expected a height and a width"):
        vae.Config(image_size=(8,))
