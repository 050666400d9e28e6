"""SimCLR: the loss by its closed forms and on two ranks, the views, and a small run."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import run_command
from forks import Forked
from small_vit import SMALL
from torch.utils.flop_counter import FlopCounterMode

from engine import parallel
from formats.open_model import open_model
from vision import simclr
from vision.simclr import Config, SimCLR, nt_xent
from vision.vit import ViT

ENCODER = replace(SMALL, n_classes=0, kernels="reference")


def small():
    torch.manual_seed(0)
    return SimCLR(ViT(ENCODER), Config(width=8))


def value(z, temperature=0.5):
    return nt_xent(z, z, torch.arange(len(z)), temperature)[0]


def test_the_loss_has_its_closed_forms():
    # Two images, equal views, different images at right angles: -ln(e^2 / (e^2 + 2)).
    z = torch.eye(2)[:, None].expand(2, 2, 2)
    assert value(z).item() == pytest.approx(0.239545, abs=1e-6)
    assert value(z).item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 2)), abs=1e-6)
    # All views equal: one of 2 B - 1 at random.
    assert value(torch.ones(5, 2, 3)).item() == pytest.approx(math.log(9), abs=1e-6)
    # The lengths of z do not matter.
    z = torch.randn(4, 2, 8)
    torch.testing.assert_close(value(z * torch.rand(4, 2, 1).add(0.1)), value(z))
    # Nor does autocast, whose 8 bits would be too few for cosines.
    expected = value(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value(z), expected)


def test_the_loss_is_that_of_a_loop_over_views_and_none_is_compared_with_itself():
    z = torch.randn(3, 2, 8, dtype=torch.float64)
    views = [z[i, j] / z[i, j].norm() for i in range(3) for j in range(2)]
    terms = []
    for i, a in enumerate(views):
        e = [math.exp(a @ b / 0.2) for b in views]
        terms.append(-math.log(e[i ^ 1] / (sum(e) - e[i])))
    assert value(z, 0.2).item() == pytest.approx(sum(terms) / 6, rel=1e-5)
    # So a view's similarity to itself has no gradient: at the closed form's optimum it vanishes.
    z = torch.eye(2)[:, None].repeat(1, 2, 1).requires_grad_()
    value(z).backward()
    assert z.grad.abs().max() < 0.5 and (z.grad * z).sum().abs() < 1e-6


def train_on(rank: int, n: int, out: str) -> int:
    """Write the mean gradient of n ranks, each with its part of one batch, and the mean of their losses."""
    group = {"init_method": f"file://{out}/group-{n}", "rank": rank, "world_size": n}
    if n > 1:
        dist.init_process_group("gloo", **group)
    module = small()
    batch = {"views": torch.rand(4, 2, 2, 8, 12, generator=torch.Generator().manual_seed(1))}
    part = simclr.split(batch, rank, n) if n > 1 else batch
    loss, metrics = simclr.loss(module, part)
    loss.backward()
    mean = {name: parallel.all_reduce_sum(p.grad) / n for name, p in module.named_parameters()}
    mean["loss"] = parallel.all_reduce_sum(loss.detach()) / n
    mean["found"] = parallel.all_reduce_sum(metrics["found"]) / n
    # What is not split, such as the last rows held out, is compared with itself on every rank.
    torch.testing.assert_close(simclr.loss(module, batch)[0], mean["loss"])
    if rank == 0:
        torch.save(mean, f"{out}/{n}.pt")
    if n > 1:
        dist.destroy_process_group()
    return 0


def test_two_ranks_compute_the_loss_and_the_gradients_of_one(tmp_path):
    ranks = [Forked(train_on, rank, 2, str(tmp_path)) for rank in range(2)]
    train_on(0, 1, str(tmp_path))
    for rank in ranks:
        assert rank.end() == 0, rank.said()
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert one.keys() == two.keys() and one["loss"] > 0.5
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_views_differ_by_the_settings_alone_and_are_a_function_of_the_generator():
    images = torch.zeros(3, 2, 16, 16)
    images[:, :, 4:12, 6:10] = 1

    def view(seed=0, **settings):
        return simclr.view(images, Config(**settings), torch.Generator().manual_seed(seed))

    none = {"warp": 0.0, "blur": 0.0, "fade": 0.0, "noise": 0.0}
    assert torch.equal(view(**none), images) and torch.equal(view(), view())
    assert not torch.equal(view(), view(1)) and view().min() >= 0 and view().max() <= 1
    for name in none:
        alone = view(**{**none, name: getattr(Config(), name)})
        assert not torch.equal(alone, images), name
    # A blur keeps the mean, and is a convolution with a Gaussian.
    point = torch.zeros(2, 1, 9, 9)
    point[:, :, 4, 4] = 1
    blurred = simclr.blurred(point, torch.tensor([0.0, 1.0]))
    assert torch.equal(blurred[0], point[0])
    assert blurred[1].sum().item() == pytest.approx(1, abs=1e-5)
    assert (blurred[1, 0, 4, 5] / blurred[1, 0, 4, 4]).item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    channels_last = torch.rand(2, 9, 9, 3).permute(0, 3, 1, 2)
    sigma = torch.tensor([0.5, 1.0])
    found = simclr.blurred(channels_last, sigma)
    assert torch.equal(found, simclr.blurred(channels_last.contiguous(), sigma))


def test_flops_are_those_of_the_matrix_products():
    model = small()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(4, 2, 8, 12)).sum().backward()
    first = 2 * 6 * 32 * 2 * 16  # backward needs no gradient of the images
    assert 2 * model.flops() - 4 * first == counter.get_total_flops()


def test_what_makes_no_sense_is_refused(tmp_path, few_glyphs):
    with pytest.raises(ValueError, match=r"fade 1.0: expected less than 1"):
        Config(fade=1.0)
    ended = run_command("train.py", "--model", "simclr", "--batch-size", "1", "--out", tmp_path / "run")
    assert ended.code == 2 and "--batch-size 1: expected at least 2" in ended.err


def test_a_run_learns_to_find_the_other_view_and_leaves_an_encoder(tmp_path, few_glyphs):
    flags = ["--steps", "60", "--eval-every", "60", "--batch-size", "9", "--cache", tmp_path / "cache"]
    flags += ["--set", "n_layers=1", "d_model=32", "d_ff=32", "warp=0.2", "noise=0.05", "blur=0"]
    ended = run_command("train.py", "--model", "simclr", *flags, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "a random guess finds the other view in 5.88%, with a loss of 2.833" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val_found" in row)
    assert after["val_loss"] < 0.7 * before["val_loss"] and after["val_found"] > 0.6
    assert "of 6 views are most similar" in (tmp_path / "run" / "samples.txt").read_text()
    model = open_model(tmp_path / "run" / "model")
    assert type(model) is ViT and model.config.n_classes == 0
