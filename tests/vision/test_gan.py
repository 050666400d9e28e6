"""GAN: gradients of its two halves, the best discriminator, slopes that vanish, and small runs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from small_drawing import assert_resumed_equals_whole, doubled, flops_of
from small_gpt import refused

import train as train_py
from engine import contract
from formats.open_model import open_model
from vision import gan
from vision.gan import GAN, Config

SMALL = Config(width=4, n_latents=3, image_size=(4, 8), n_channels=2)


def small(**changes) -> GAN:
    torch.manual_seed(0)
    return GAN(Config(**vars(SMALL) | changes))


def batch_of(n=6, seed=1) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand(n, 2, 4, 8, generator=draws),
        "codes": torch.randn(n, 3, generator=draws),
    }


@pytest.mark.parametrize("objective", gan.OBJECTIVES)
def test_each_half_has_the_gradient_of_its_own_loss(objective):
    model, batch = doubled(small(objective=objective, gamma=0.7), batch_of())
    model.loss(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}

    # The two losses as they are written in the header, each with the gradient of one half alone.
    D, real, drawn = model.discriminator, 2 * batch["images"] - 1, model.generator(batch["codes"])
    real.requires_grad_()
    (slope,) = torch.autograd.grad(D(real).sum(), real, create_graph=True)
    of_d = -F.logsigmoid(D(real)).mean() - F.logsigmoid(-D(drawn)).mean()
    of_d = of_d + 0.35 * slope.square().sum((1, 2, 3)).mean()
    log_p = F.logsigmoid(-D(drawn)) if objective == "minimax" else -F.logsigmoid(D(drawn))
    for half, own in ((D, of_d), (model.generator, log_p.mean())):
        expected = torch.autograd.grad(own, list(half.parameters()), retain_graph=True)
        prefix = "discriminator" if half is D else "generator"
        for (name, _), g in zip(half.named_parameters(), expected, strict=True):
            assert g.abs().max() > 0 or name.endswith("bias")
            torch.testing.assert_close(found[f"{prefix}.{name}"], g, rtol=1e-12, atol=1e-14)


def test_gradients_without_r1_are_those_of_finite_differences():
    model, batch = doubled(small(gamma=0.0), batch_of())
    loss, metrics = model.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx((metrics["discriminator"] + metrics["generator"]).item())
    weight, eps = model.discriminator[0].weight, 1e-6
    with torch.no_grad():
        values = []
        for step in (eps, -eps):
            weight[0, 0, 1, 1] += step
            values.append(model.loss(batch)[1]["discriminator"].item())
            weight[0, 0, 1, 1] -= step
    # The generator's loss also depends on this weight, but only as on a constant.
    assert weight.grad[0, 0, 1, 1].item() == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-6)


def test_r1_is_the_squared_slope_of_a_known_discriminator():
    direction, images = torch.tensor([3.0, -4.0]), torch.rand(5, 2)
    logits, value = gan.r1(lambda x: x @ direction, images)
    assert value.item() == pytest.approx(25) and torch.equal(logits.detach(), images @ direction)
    # Of D = |x|^2 / 2 the slope is x; a value needs no gradient around it.
    with torch.no_grad():
        _, value = gan.r1(lambda x: x.square().sum(1) / 2, images)
    assert value.item() == pytest.approx(images.square().sum(1).mean().item()) and not value.requires_grad


def test_the_best_discriminator_of_a_discrete_game_is_p_over_p_plus_q():
    # Five states, with frequencies p and q of twenty samples each.
    real, drawn = (torch.tensor(n).double() for n in ([8, 6, 3, 2, 1], [1, 3, 4, 6, 6]))
    of_real, of_drawn = (torch.arange(5).repeat_interleave(n.long()) for n in (real, drawn))
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for _ in range(30):  # Newton's method: the loss is convex, and each state stands alone
        loss = gan.discriminator_loss(logits[of_real], logits[of_drawn])
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), logits)
        with torch.no_grad():
            logits -= slope / curvature
    p, q = real / 20, drawn / 20
    torch.testing.assert_close(logits.detach().sigmoid(), p / (p + q), rtol=1e-10, atol=0)
    m = (p + q) / 2
    jsd = ((p * (p / m).log() + q * (q / m).log()).sum() / 2).item()
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * jsd, rel=1e-10) and jsd > 0.1
    # Where both are equal it can only guess.
    same = gan.discriminator_loss(torch.zeros(4), torch.zeros(4))
    assert same.item() == pytest.approx(2 * math.log(2))
    assert gan.generator_loss(torch.zeros(4), "non_saturating").item() == pytest.approx(math.log(2))


def test_the_minimax_slope_vanishes_where_the_other_does_not():
    logits = torch.tensor([-14.0, -5.0, 0.0, 5.0], dtype=torch.float64, requires_grad=True)
    slopes = {}
    for objective in gan.OBJECTIVES:
        (slope,) = torch.autograd.grad(gan.generator_loss(logits, objective), logits)
        slopes[objective] = 4 * slope  # of each image, not of the mean
    torch.testing.assert_close(slopes["minimax"], -logits.detach().sigmoid(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes["non_saturating"], -(-logits).detach().sigmoid(), rtol=1e-12, atol=0)
    assert -slopes["minimax"][0] < 1e-6 and -slopes["non_saturating"][0] > 0.999
    # And so it is for the weights of a generator whose images a discriminator refuses.
    norms = {}
    for objective in gan.OBJECTIVES:
        model, batch = doubled(small(objective=objective), batch_of())
        torch.nn.init.constant_(model.discriminator[-2].bias, -14.0)
        model.loss(batch)[0].backward()
        norms[objective] = sum(p.grad.square().sum() for p in model.generator.parameters()).sqrt().item()
    assert norms["minimax"] < 1e-4 * norms["non_saturating"]


@torch.no_grad()
def test_new_networks_keep_the_variance_of_activations():
    torch.manual_seed(0)
    model = GAN(Config(width=64, n_latents=64))
    z = torch.randn(64, 64)
    before_tanh = model.generator[:-1](z)
    assert 0.5 < before_tanh[..., 4:-4, 4:-4].std() < 3  # padding makes the edges smaller
    images = torch.randn(64, 1, 16, 16)
    assert 0.5 < model.discriminator[:-2](images).square().mean().sqrt() < 3
    assert model.discriminator(images).shape == (64,)
    drawn = model.draw(3, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 1, 16, 16) and drawn.min() >= 0 and drawn.max() <= 1


def test_flops_are_those_of_the_matrix_products():
    model, batch = small(width=16), batch_of(2)
    total = flops_of(lambda: model.loss(batch)[0].backward())
    with torch.no_grad():
        codes = flops_of(lambda: model.generator[0](batch["codes"]))  # which need no gradient
        pixels = flops_of(lambda: model.discriminator[0](batch["images"]))  # nor do drawn ones of the first D
    expected = 2 * model.flops_per_token() - codes - pixels
    assert total == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": (6, 8)}, "image_size .6, 8.: expected multiples of 4 pixels for n_halvings=2"),
        (
            {"image_size": (8,)},
            "image_size .8,.: expected multiples of 4 .* n_halvings=2, height and",
        ),
        ({"image_size": (0, 8)}, "image_size .0, 8.: expected multiples of 4"),
        ({"objective": "hinge"}, "objective 'hinge': expected non_saturating or minimax"),
        ({"gamma": -1.0}, "gamma -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


def test_shards_of_the_weights_are_refused(tmp_path, capsys):
    line = refused(capsys, ["--model", "gan", "--parallel", "fsdp", "--out", str(tmp_path)], train_py.main)
    assert "--parallel" in line


def test_the_task_has_averages_and_adams_first_beta_is_zero():
    task = contract.read_task(gan, None)
    assert task.EMA == 0.999 and task.BETAS == (0.0, 0.99)


def test_killed_and_resumed_a_run_is_equal_to_the_bit(tmp_path):
    assert_resumed_equals_whole("gan", tmp_path, "width=4", "n_latents=3")


def test_a_run_learns_the_grey_of_images_and_its_model_draws(tmp_path, few_glyphs):
    flags = ["--steps", "150", "--eval-every", "150", "--batch-size", "9", "--lr", "2e-3", "--ema", "0.9"]
    flags += ["--set", "width=8", "n_latents=4", "image_size=(8,8)"]
    ended = run_command("train.py", "--model", "gan", *flags, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "the discriminator's loss is 1.386 nats" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"val_discriminator", "val_generator", "val_r1", "val_right"} <= rows[-1].keys()
    assert "no Fréchet distance: 6 images held out" in (tmp_path / "run" / "samples.txt").read_text()

    # A new generator draws a grey of one half everywhere; letters are white in the middle of black.
    model = open_model(tmp_path / "run" / "model")
    drawn = [model.draw(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])
    border = torch.cat([drawn[0][..., 0, :], drawn[0][..., -1, :]]).mean().item()
    assert border < 0.2 < drawn[0][..., 2:-2, 2:-2].mean().item()
    ended = run_command(
        "-m", "vision.gan", tmp_path / "run" / "model", "-n", "5", "--out", tmp_path / "g.png"
    )
    assert ended.code == 0 and "g.png: 5 images" in ended.out and (tmp_path / "g.png").is_file()
