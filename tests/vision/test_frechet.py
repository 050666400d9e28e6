"""Fréchet: its closed forms, manifolds of known points, letters, and figures of images that are known."""

from dataclasses import replace

import pytest
import torch
from conftest import run_command

from data.rows import Dataset, Rows
from vision import frechet, judge, latent_diffusion
from vision.vae import VAE, Config


def covariance(seed, n=6):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(n, dtype=torch.float64)


def test_the_distance_of_gaussians_with_independent_numbers_is_a_sum():
    m1, m2 = torch.tensor([[1.0, 2.0, -1.0], [0.0, 2.0, 3.0]], dtype=torch.float64)
    s1, s2 = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 0.5]], dtype=torch.float64)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    found = frechet.gaussian_distance(m1, s1.square().diag(), m2, s2.square().diag())
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_the_distance_of_any_gaussians_is_that_by_the_root_of_the_product():
    m1, m2, c1, c2 = torch.zeros(6).double(), torch.ones(6).double(), covariance(0), covariance(1)
    # C_1 C_2 is not symmetric, so its root is taken here by its own eigenvectors.
    values, vectors = torch.linalg.eig(c1 @ c2)
    root = (vectors * values.sqrt()) @ torch.linalg.inv(vectors)
    torch.testing.assert_close((root @ root).real, c1 @ c2, rtol=1e-9, atol=1e-9)
    expected = 6 + (c1 + c2 - 2 * root.real).trace().item()
    assert frechet.gaussian_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-10)
    assert frechet.gaussian_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-10)
    assert frechet.gaussian_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-10)


def test_samples_of_two_gaussians_are_as_far_apart_as_the_gaussians():
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20_000, 3, generator=draws) for _ in range(2))
    a, b = a * torch.tensor([1.0, 2.0, 3.0]), b + torch.tensor([2.0, 0.0, 0.0])
    assert frechet.distance(a, b) == pytest.approx(4 + 1 + 4, rel=0.03)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_counts_points_in_balls_that_reach_to_the_third_neighbour():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    assert frechet.radii(real).tolist() == [3, 2, 2, 3, 9]
    points = torch.tensor([[-2.5], [-3.5], [0.5], [18.5], [19.5]])
    assert frechet.within(points, real).tolist() == [True, False, True, True, False]


def test_letters_are_shown_without_accents():
    assert [frechet.letter_of(label) for label in ("e", "ế", "Ä", "й", "cats")] == [
        "e",
        "e",
        "A",
        "и",
        "cats",
    ]


def dataset(n_train=60, n_val=40) -> Dataset:
    """Return images of three kinds: white at the top, in the middle, or at the bottom, with noise."""
    draws = torch.Generator().manual_seed(0)

    def rows(n):
        labels = torch.randint(3, (n,), generator=draws)
        images = torch.randint(0, 60, (n, 1, 12, 12), generator=draws, dtype=torch.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 4 * label : 4 * label + 4] += 190
        return Rows([{"image": i.numpy(), "label": k.numpy()} for i, k in zip(images, labels, strict=True)])

    return Dataset(f"three kinds {n_train}", None, rows(n_train), rows(n_val), labels=("é", "e", "b"))


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.setattr(judge, "STEPS", 40)
    monkeypatch.setattr(judge, "BATCH_SIZE", 32)
    return frechet.Measure(dataset())


def test_real_images_are_near_and_images_of_one_kind_miss_modes(measure):
    assert measure.right > 0.9
    found = measure.baselines()
    assert found["real"].distance < 0.1 * found["pixels mixed"].distance
    assert found["real"].precision > 0.8 and found["real"].recall > 0.8 and found["real"].letters == 2
    assert found["pixels mixed"].recall < 0.2
    # One kind alone: precise, but other modes are missing.
    one = measure.real[measure.real[:, 0, 10, 6] > 0.7]
    of_one = measure(one)
    assert of_one.precision > 0.8 and of_one.recall < 0.5 and of_one.letters == 1
    assert of_one.distance > 3 * found["real"].distance
    assert measure(measure.held).distance == pytest.approx(0, abs=1e-3)


def test_few_images_and_images_without_classes_are_not_measured(monkeypatch):
    def never(n):
        raise AssertionError("nothing needs to be drawn")

    found = frechet.in_words(dataset(), never)
    assert found.startswith("no Fréchet distance: 40 images held out, 60 to learn from; expected at least")
    monkeypatch.setattr(frechet, "LEAST", 30)
    monkeypatch.setattr(judge, "STEPS", 2)
    first, *lines = frechet.in_words(dataset(61), lambda n: torch.rand(n, 1, 12, 12)).splitlines()
    assert first.startswith("a judge of letters, right about ") and first.endswith("of 40 held-out images:")
    assert [line.split("Fréchet")[0].strip() for line in lines] == ["real", "pixels mixed", "drawn"]
    without = dataset(62)
    without.labels = ()
    assert frechet.of(without) is None


def test_the_command_measures_models_that_draw(tmp_path, few_glyphs, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(frechet, "in_words", lambda dataset, draw: measured.append(draw(5)) or "figures")
    VAE(Config(width=8, n_latents=2, image_size=(8, 8))).save_pretrained(tmp_path / "vae")
    flags = ["--data", "glyphs", "--cache", str(tmp_path / "cache")]
    frechet.main([str(tmp_path / "vae"), *flags])
    assert measured[0].shape == (5, 1, 8, 8) and "figures" in capsys.readouterr().out
    from vision.vit import SIZES, ViT

    ViT(SIZES["tiny"]).save_pretrained(tmp_path / "vit", ())
    ended = run_command("-m", "vision.frechet", tmp_path / "vit", *flags)
    assert ended.code == 2 and "expected a model that draws images without words" in ended.err


def test_a_model_that_draws_from_words_is_refused(tmp_path):
    config = latent_diffusion.SIZES["tiny"]
    text = replace(config.text, vocab_size=61, eos_token_id=60)
    latent_diffusion.LatentDiffusion(replace(config, text=text)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model that draws images without words"):
        frechet.main([str(tmp_path), "--data", "glyphs"])
