"""Flow: the determinant beside autograd's, the inverse, densities that integrate to one, and a small run."""

import json
import math

import pytest
import torch
from conftest import run_command
from small_vit import shaken
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from formats.open_model import open_model
from vision import flow
from vision.flow import Config, Flow

SMALL = Config(n_couplings=4, width=16, n_levels=8, image_size=(3, 3), n_channels=2)


def small(**changes) -> Flow:
    """Return a flow whose weights are far from its start, the identity."""
    torch.manual_seed(0)
    return shaken(Flow(Config(**vars(SMALL) | changes)))


def test_a_new_flow_is_the_identity():
    y = torch.randn(3, 18)
    z, log_det = Flow(SMALL)(y)
    assert torch.equal(z, y) and (log_det == 0).all()


def test_the_determinant_is_that_of_autograds_jacobian():
    model, x = small(), torch.rand(2, 18, generator=torch.Generator().manual_seed(0))

    def whole(one):  # (N,) -> (N,): the logit and the couplings
        return model(flow.to_logits(one[None], 0.05)[0])[0][0]

    for i in range(2):
        z = whole(x[i])
        expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(whole, x[i])).logabsdet
        found = model.log_density(x[i : i + 1])[0] - torch.distributions.Normal(0, 1).log_prob(z).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_inverse_finds_logits_and_pixels_again():
    model = small()
    y = torch.randn(64, 18, generator=torch.Generator().manual_seed(0))
    z, _ = model(y)
    assert (z - y).abs().max() > 0.5
    assert (model.inverse(z) - y).abs().max() < 1e-5
    exact = small().double()
    assert (exact.inverse(exact(y.double())[0]) - y).abs().max() < 1e-12
    x = torch.rand(64, 18)
    assert (flow.from_logits(flow.to_logits(x, 0.05)[0], 0.05) - x).abs().max() < 1e-5
    # Levels come back as the values of an image: each over the highest.
    levels = torch.arange(8.0).repeat(3, 6)[:, :18]
    y, _ = flow.to_logits(flow.dequantized(levels, 0.5, 8), 0.05)
    assert torch.equal(model.images(model(y)[0]).flatten(1), levels / 7)


def test_each_half_of_the_checkerboard_stays_in_turn():
    first, second = small().couplings[:2]
    assert first.stays.tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]  # two channels of 3 x 3
    assert first.stays.tolist() == second.moves.tolist() and first.moves.tolist() == second.stays.tolist()


@torch.no_grad()
def test_the_density_of_two_pixels_integrates_to_one():
    model = small(image_size=(1, 2), n_channels=1)
    n = 400
    line = (torch.arange(n) + 0.5) / n
    grid = torch.cartesian_prod(line, line)
    total = model.log_density(grid).exp().mean().item()
    z = model(flow.to_logits(grid, 0.05)[0])[0]
    assert z.shape == (n * n, 2)
    # Part of the mass lies outside, where the logit of alpha ends: what `from_logits` moves to the ends.
    y = model.inverse(torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)))
    inside = ((y.sigmoid() > 0.05) & (y.sigmoid() < 0.95)).all(1).float().mean().item()
    assert total == pytest.approx(inside, abs=0.01) and 0.3 < inside < 1


@torch.no_grad()
def test_bits_per_dimension_count_levels():
    # A uniform density of x in [0, 1]^N needs log2 L bits for each level, whatever they are.
    assert flow.bits_per_dimension(torch.zeros(3), 18, 32).tolist() == [5, 5, 5]
    # The log of the density is in nats, and that of x scaled to [0, 1].
    assert flow.bits_per_dimension(torch.tensor([18 * math.log(4.0)]), 18, 32).item() == pytest.approx(3)
    images = torch.arange(256).float() / 255
    levels = flow.to_levels(images, 32)
    assert levels.long().bincount().tolist() == [8] * 32
    x = flow.dequantized(levels, torch.rand(256), 32)
    assert x.min() >= 0 and x.max() < 1 and torch.equal((x * 32).floor(), levels)
    model = small()
    batch = {"levels": torch.randint(8, (5, 2, 3, 3)).float(), "noise": torch.rand(5, 2, 3, 3)}
    expected = -model.log_density(((batch["levels"] + batch["noise"]) / 8).flatten(1)).mean() / math.log(2)
    torch.testing.assert_close(model.loss(batch)[0], expected / 18 + 3)


def test_a_flow_that_learns_reaches_the_entropy_of_a_gaussian():
    torch.manual_seed(0)
    model = Flow(Config(n_couplings=2, width=8, image_size=(1, 2)))
    covariance = torch.tensor([[1.0, 1.2], [1.2, 2.0]])
    data = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), covariance)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(200):
        z, log_det = model(data.sample((256,)))
        (-flow.log_normal(z) - log_det).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = data.sample((20_000,))
    with torch.no_grad():
        z, log_det = model(y)
    gap = (data.log_prob(y) - flow.log_normal(z) - log_det).mean().item()  # KL in nats
    assert -0.01 < gap < 0.03
    torch.testing.assert_close(z.T.cov(), torch.eye(2), atol=0.15, rtol=0)


def test_baselines_are_those_of_their_definitions():
    torch.manual_seed(0)
    train, held = (torch.randint(256, (n, 1, 1, 2)).float() / 255 for n in (4000, 1000))
    text = flow.describe(train, held, Config(n_levels=8))
    uniform, independent, gaussian = (float(word) for word in text.replace(",", "").split() if "." in word)
    assert uniform == 3 and independent == pytest.approx(3, abs=0.02)
    # The logit of a uniform x has a density that is close to a Gaussian's but is not one.
    assert 3 < gaussian < 3.1
    same = train.expand(-1, -1, 1, 2)
    assert "Gaussian of all pixels together" in flow.describe(same, held, Config(n_levels=8))


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.n = max(self.n, out.numel() if torch.is_tensor(out) else 0)
        return out


def test_levels_are_counted_in_memory_that_does_not_grow_with_images_times_levels():
    images, sizes = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for L in (8, 256):
        with Largest() as found:
            flow.densities(images, images[:10], Config(n_levels=L, image_size=(4, 4)))
        sizes.append(found.n)
    assert sizes == [400 * 16, 400 * 16]


def test_densities_of_a_single_image_are_finite():
    """A folder of two images has one to learn from."""
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = flow.densities(images[:1], images[1:], Config(n_levels=8, image_size=(4, 4)))
    assert all(math.isfinite(bits) for bits in found.values())


def test_flops_are_those_of_the_matrix_products():
    model = small()
    with FlopCounterMode(display=False) as counter:
        model.loss({"levels": torch.zeros(2, 2, 3, 3), "noise": torch.rand(2, 2, 3, 3)})[0].backward()
    first = 2 * model.couplings[0].hidden[0].weight.numel()  # the pixels need no gradient
    assert counter.get_total_flops() == 2 * (model.flops_per_token() - first)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_levels": 1}, "n_levels 1: expected 2 to 256"),
        ({"alpha": 0.5}, "alpha 0.5: expected less than 0.5"),
        ({"image_size": (1, 1)}, "at least two pixels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


def test_a_run_learns_and_its_model_draws(tmp_path, few_glyphs):
    flags = ["--steps", "40", "--eval-every", "40", "--batch-size", "9", "--lr", "1e-2"]
    flags += ["--set", "width=32", "n_couplings=4", "image_size=(6,6)"]
    ended = run_command("train.py", "--model", "flow", *flags, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "32 equally likely levels have 5.000 bits per dimension" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["val_loss"] for row in rows if "val_loss" in row)
    assert after < 0.9 * before
    assert "logits found again from z to" in (tmp_path / "run" / "samples.txt").read_text()
    drawn = open_model(tmp_path / "run" / "model").draw(3, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 1, 6, 6) and drawn.min() >= 0 and drawn.max() <= 1
    ended = run_command("-m", "vision.flow", tmp_path / "run" / "model", "--out", tmp_path)
    assert ended.code == 0 and "picture.png: 48 images" in ended.out


def test_a_size_that_is_no_height_and_width_is_refused():
    with pytest.raises(ValueError, match="expected height and width"):
        flow.Config(image_size=(8,))
