"""Energy: the exact variance of Langevin's chain, mixtures that are learned, the buffer, and small runs."""

import json
import math

import pytest
import torch
from conftest import run_command
from small_drawing import assert_resumed_equals_whole, doubled, flops_of
from small_gpt import refused
from torch import nn

import train as train_py
from formats.open_model import open_model
from vision import energy
from vision.energy import Chains, Config, Energy

SMALL = Config(width=4, n_chains=10, n_steps=3, image_size=(4, 8), n_channels=2)


def chains(**changes) -> Chains:
    torch.manual_seed(0)
    return energy.wrap(Energy(Config(**vars(SMALL) | changes)), None)


def rows(n=4):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 2, 4, 8), generator=draws, dtype=torch.uint8)
    return [{"image": image.numpy()} for image in images]


def batch_of(config=SMALL, n=4, seed=0) -> dict[str, torch.Tensor]:
    return energy.make_batch(rows(n), config, torch.Generator().manual_seed(seed), None)


@pytest.mark.parametrize("step", [0.02, 0.125, 0.5])
def test_the_variance_of_a_gaussian_is_that_of_the_chain_in_discrete_steps(step):
    # x <- (1 - s) x + sqrt(2 s) n: the variance is 1 / (1 - s / 2), and 1 only for small steps.
    n, draws = 40_000, torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=draws, dtype=torch.float64) * 3 + 5
    energy_of = lambda x: x.square() / 2  # noqa: E731
    x = energy.langevin(energy_of, x, int(8 / step), step, math.sqrt(2 * step), generator=draws)
    expected = 1 / (1 - step / 2)
    # The relative deviation of a variance of n numbers is sqrt(2 / n).
    assert x.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))
    assert abs(x.mean().item()) < 4 * math.sqrt(expected / n) + 5 * math.exp(-8)
    if step == 0.5:
        assert abs(x.var().item() - 1) > 0.25


def test_temperature_is_half_of_the_squared_noise_over_the_step():
    n, draws = 40_000, torch.Generator().manual_seed(0)
    stiffness, step, noise = 4.0, 0.02, 0.1
    T = noise**2 / (2 * step)
    x = torch.zeros(n, dtype=torch.float64)
    x = energy.langevin(lambda x: stiffness * x.square() / 2, x, 150, step, noise, generator=draws)
    expected = T / stiffness / (1 - step * stiffness / 2)
    assert x.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))


def test_slopes_are_clipped_and_chains_stay_within_bounds():
    x = torch.tensor([[3.0, -0.5]])
    found = energy.langevin(lambda x: x.square().sum(1), x, 1, 1.0, 0.0, most_slope=0.25)
    assert found.tolist() == [[2.75, -0.25]]
    found = energy.langevin(lambda x: -10 * x.sum(1), x, 2, 1.0, 0.0, bound=4.0)
    assert found.tolist() == [[4.0, 4.0]] and not found.requires_grad


def test_a_mixture_of_two_gaussians_is_learned():
    """The density of a grid of the plane is known exactly, so the KL to the data's is."""
    torch.manual_seed(0)
    centres, sigma = torch.tensor([[-1.2, 0.0], [1.2, 0.6]]), 0.4
    net = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    energy_of = lambda x: net(x)[:, 0]  # noqa: E731
    line = torch.linspace(-3, 3, 121)
    grid = torch.cartesian_prod(line, line)
    log_cell = 2 * math.log(6 / 120)

    def log_p_true(x):
        squares = torch.cdist(x, centres).square() / (2 * sigma**2)
        return torch.logsumexp(-squares, 1) - math.log(2 * 2 * math.pi * sigma**2)

    @torch.no_grad()
    def kl():
        log_p = -energy_of(grid)
        log_p = log_p - log_p.logsumexp(0) - log_cell
        true = log_p_true(grid)
        return (true.exp() * (true - log_p)).sum().item() * math.exp(log_cell)

    before, places = kl(), 6 * torch.rand(400, 2) - 3
    optimizer = torch.optim.Adam(net.parameters(), 4e-3, betas=(0.0, 0.99))
    for _ in range(250):
        data = centres[torch.randint(2, (400,))] + sigma * torch.randn(400, 2)
        # At T = 1: the step is half of the squared noise.
        places = energy.langevin(energy_of, places, 15, 0.02, 0.2, bound=3.0)
        energy.contrast(energy_of(data), energy_of(places), 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 1.5 and kl() < 0.1
    # Chains that begin anew find both modes, by about the same share.
    ended = energy.langevin(energy_of, 6 * torch.rand(1000, 2) - 3, 400, 0.02, 0.2, bound=3.0)
    assert 0.3 < (ended[:, 0] > 0).float().mean().item() < 0.7


def test_the_gradient_is_that_of_the_data_less_that_of_samples_as_constants():
    module, batch = doubled(chains(), batch_of())
    module.train()
    torch.manual_seed(3)
    found, metrics = energy.loss(module, batch)
    found.backward()
    energy.after_step(module, torch.tensor(True))
    samples = module.images[batch["chosen"]]  # where the loss has left them
    assert not samples.requires_grad
    of_data, of_samples = module.model(batch["images"]), module.model(samples)
    expected = of_data.mean() - of_samples.mean()
    expected = expected + 0.1 * (of_data.pow(2).mean() + of_samples.pow(2).mean())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["of_data"].item() == pytest.approx(of_data.mean().item())
    gradients = torch.autograd.grad(expected, list(module.model.parameters()))
    for p, g in zip(module.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-14)


def test_chosen_chains_walk_on_and_others_stay():
    module, batch = chains(), batch_of()
    batch["is_new"] = torch.tensor([False, True, False, False])
    before = module.images.clone()
    assert len(batch["chosen"].unique()) == 4
    torch.manual_seed(5)
    ended = module.advance(batch["chosen"], batch["is_new"], batch["fresh"])
    start = before[batch["chosen"]]
    start[1] = batch["fresh"][1]
    torch.manual_seed(5)
    assert torch.equal(ended, module.model.walk(start, 3))
    assert torch.equal(module.images, before) and not torch.equal(ended, start)
    energy.after_step(module, torch.tensor(True))
    assert torch.equal(module.images[batch["chosen"]], ended)
    others = torch.ones(10, dtype=torch.bool).index_fill(0, batch["chosen"], False)
    assert torch.equal(module.images[others], before[others])
    # An update that is left out, and an evaluation, leave the chains as they are.
    still = module.images.clone()
    module.advance(batch["chosen"], batch["is_new"], torch.full_like(batch["fresh"], math.nan))
    energy.after_step(module, torch.tensor(False))
    energy.loss(module.eval(), batch)
    energy.after_step(module, torch.tensor(True))
    assert torch.equal(module.images, still)


def test_a_twentieth_of_the_chains_begins_anew():
    config = Config(n_chains=5000, image_size=(4, 8), n_channels=2)
    batch = energy.make_batch(rows(2) * 2000, config, torch.Generator().manual_seed(0), None)
    assert 0.04 < batch["is_new"].float().mean() < 0.06
    assert batch["images"].abs().max() <= 1 and batch["fresh"].abs().max() <= 1
    noise = batch["images"][0::2] - batch["images"][0]
    assert 0.005 < noise[1:].std() < 0.02  # of two independent draws, clipped where pixels are -1 or 1
    with pytest.raises(ValueError, match="--batch-size 4: expected at most n_chains=3"):
        batch_of(Config(**vars(SMALL) | {"n_chains": 3}))


def test_drawing_is_a_function_of_the_seed():
    model = chains(n_drawing_steps=4).model
    drawn = [model.draw(3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (3, 2, 4, 8) and drawn[0].min() >= 0 and drawn[0].max() <= 1
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:]) and not drawn[0].requires_grad


def test_flops_are_those_of_the_matrix_products():
    module, batch = chains(width=8), batch_of(n=2)
    module.train()
    total = flops_of(lambda: energy.loss(module, batch)[0].backward())
    first = 2 * flops_of(lambda: module.model.layers[0](batch["images"]))  # data and samples need no gradient
    assert total == 2 * module.model.flops_per_token() - first


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": (6, 8)}, "image_size .6, 8.: expected multiples of 4 pixels"),
        ({"image_size": (8, 8, 8)}, "image_size .8, 8, 8.: expected multiples of 4 pixels, height and width"),
        ({"restart": 1.5}, "restart 1.5: expected at most 1"),
        ({"n_chains": 0}, "n_chains 0: expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


def test_the_buffer_of_chains_makes_a_resumed_run_equal_to_the_bit(tmp_path):
    small = ["width=4", "n_chains=6", "n_steps=2", "n_drawing_steps=2", "restart=0.3"]
    assert_resumed_equals_whole("energy", tmp_path, *small)


def test_a_run_learns_the_grey_of_images_and_its_model_draws(tmp_path, few_glyphs):
    flags = ["--steps", "60", "--eval-every", "60", "--batch-size", "9", "--lr", "2e-3", "--ema", "0"]
    small = ["width=8", "n_chains=36", "n_steps=10", "n_drawing_steps=60", "image_size=(8,8)"]
    ended = run_command("train.py", "--model", "energy", *flags, "--out", tmp_path / "run", "--set", *small)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"val_of_data", "val_of_samples"} <= rows[-1].keys()

    # Chains begin with a grey of one half; letters are white in the middle of black.
    model = open_model(tmp_path / "run" / "model")
    drawn = model.draw(64, torch.Generator().manual_seed(0))
    border = torch.cat([drawn[..., 0, :], drawn[..., -1, :]]).mean().item()
    assert border < 0.25 < drawn[..., 2:-2, 2:-2].mean().item()
    picture = ["-n", "5", "--out", tmp_path / "e.png"]
    ended = run_command("-m", "vision.energy", tmp_path / "run" / "model", *picture)
    assert ended.code == 0 and "e.png: 5 images" in ended.out and (tmp_path / "e.png").is_file()


def test_several_processes_are_refused(tmp_path, capsys):
    flags = ["--model", "energy", "--parallel", "ddp", "--out", str(tmp_path)]
    assert "--parallel ddp" in refused(capsys, flags, train_py.main)
