"""Images from embeddings: the loss, what a batch holds, what is compared, and a small run."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_clip import small_clip
from small_vit import shaken

import train as train_py
from data.tokenizer import get_tokenizer
from formats import command
from vision import embedding_to_image, noise, unet
from vision.embedding_to_image import WithCLIP, make_batch
from vision.prior import Config as PriorConfig
from vision.prior import Prior
from vision.unclip import Config, UnCLIP

UNET = unet.Config(
    (4, 8), (0, 1), 1, 1, 1, 4, class_vectors=True, d_text=6, n_heads=2, n_groups=2, norm_eps=1e-5,
    cos_first=True, freq_shift=0, padding=1, kernels="reference",
)  # fmt: skip
SMALL = Config(UNET, 16)


def small(**changes):
    torch.manual_seed(0)
    return WithCLIP(shaken(UnCLIP(replace(SMALL, **changes))), small_clip())


def batch(dropped=(False, False)):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 8, 8, generator=generator)
    eps = torch.randn(2, 1, 4, 4, generator=generator)
    return {"images": images, "noise": eps, "t": torch.tensor([10, 900]), "dropped": torch.tensor(dropped)}


@pytest.mark.parametrize("target", ["v", "x0", "eps"])
def test_the_loss_is_that_of_the_view_that_clip_sees(target):
    module, given = small(target=target), batch((False, True))
    value, metrics = module.loss(given)
    seen = module.clip.encode_images(module.clip.normalized(given["images"]))
    z = torch.stack((seen[0] * math.sqrt(16), module.model.null))  # the second is shown without
    x0 = 2 * given["images"].unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)) - 1
    share = noise.schedule()[given["t"]].float().view(2, 1, 1, 1)
    noisy = share.sqrt() * x0 + (1 - share).sqrt() * given["noise"]
    goal = {"v": share.sqrt() * given["noise"] - (1 - share).sqrt() * x0, "x0": x0, "eps": given["noise"]}
    found = module.model(noisy, given["t"], z)
    torch.testing.assert_close(value, (found - goal[target]).square().mean())
    assert metrics == {}


def test_the_null_row_learns_from_dropped_images_alone_and_clip_never():
    module = small()
    for dropped, learns in (((False, False), False), ((False, True), True)):
        module.zero_grad()
        module.loss(batch(dropped))[0].backward()
        gradient = module.model.null.grad
        assert bool(gradient is not None and gradient.any()) == learns
    assert not any(p.requires_grad for p in module.clip.parameters())
    # An image that is shown without its embedding leaves none of its content in z.
    given = batch((True, True))
    seen = []
    module.model.forward = lambda x, t, z: seen.append(z) or x
    module.loss(given)
    torch.testing.assert_close(seen[0], module.model.null.expand(2, -1))


def test_a_tenth_of_the_training_images_is_dropped_and_times_are_spread_over_all():
    rows = [
        {
            "image": torch.zeros(1, 8, 8, dtype=torch.uint8).numpy(),
            "tokens": torch.zeros(3, dtype=torch.int64).numpy(),
            "augment": torch.tensor(i < 400).numpy(),
        }
        for i in range(500)
    ]
    made = make_batch(rows, SMALL, torch.Generator().manual_seed(0), None)
    assert 0.06 < made["dropped"][:400].float().mean() < 0.15 and not made["dropped"][400:].any()
    assert made["t"].sort().values.diff().max() <= 3
    assert made["images"].shape == (500, 1, 8, 8) and made["noise"].shape == (500, 1, 4, 4)
    again = make_batch(rows, SMALL, torch.Generator().manual_seed(0), None)
    assert all(torch.equal(x, again[name]) for name, x in made.items())


# --- runs


@pytest.fixture
def clip_folder(tmp_path):
    small_clip(image_size=16, patch_size=8).save_pretrained(tmp_path / "clip")
    get_tokenizer("bytes").save(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.usefixtures("few_glyphs")
def test_a_run_is_resumed_to_the_bit_and_its_model_is_measured(tmp_path, clip_folder, capsys, monkeypatch):
    monkeypatch.setattr("vision.judge.STEPS", 2)
    monkeypatch.setattr("vision.unclip.SIZES", {"tiny": replace(SMALL, unet=replace(UNET, image_size=16))})

    def train(name, steps, *more):
        flags = ["--batch-size", "9", "--eval-every", "2", "--schedule", "constant", "--warmup", "0", *more]
        flags += ["--steps", str(steps), "--set", f"clip={clip_folder}", "--out", str(tmp_path / name)]
        assert train_py.main(["--model", "unclip", *flags]) == 0

    # Two steps, and then two more, give the weights of four; the evaluation leaves them as they are.
    train("whole", 4)
    train("parts", 2)
    train("parts", 4, "--resume")
    train("more", 1, "--init-from", str(tmp_path / "whole" / "model"))
    for part in ("decoder", "text_proj"):
        file = f"model/{part}/diffusion_pytorch_model.safetensors"
        one, two = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert len(one) > 5 and all(torch.equal(w, two[name]) for name, w in one.items())
    out = capsys.readouterr().out
    assert "the mean image has a squared error of" in out
    lines = (tmp_path / "whole" / "samples.txt").read_text().splitlines()
    for name in ("real", "its own, w = 1", "its text's, w = 1", "another's, w = 1"):
        assert sum(line.startswith(name) and "character" in line for line in lines) == 3
    with Image.open(
        tmp_path / "whole" / "picture.png"
    ) as picture:  # 6 held-out images, and 4 rows with labels
        assert picture.width > 6 * 70 + 6 and picture.height == 4 * 70 + 6

    # The command gives the figures of the last evaluation, and those of a prior beside them.
    Prior(PriorConfig(1, 2, 8, 16, 60)).save_pretrained(tmp_path / "prior")
    argv = [str(tmp_path / "whole" / "model"), "--clip", str(clip_folder)]
    embedding_to_image.main([*argv, "--prior", str(tmp_path / "prior")])
    table = capsys.readouterr().out.splitlines()
    known = {line for line in table if "w = 1" in line and "prior" not in line}
    assert len(known) == 3 and known <= set(lines)
    assert len(table) == 10 and sum(line.startswith("the prior's") for line in table) == 2


def test_mistakes_are_one_line(tmp_path, clip_folder, capsys):
    small_clip().save_pretrained(tmp_path / "smaller")
    get_tokenizer("bytes").save(tmp_path / "smaller")
    for flags, words in (
        (["--set", f"clip={tmp_path / 'none'}"], "none"),
        (["--set", f"clip={tmp_path / 'smaller'}"], "reads (8, 8) pixels: expected 16 or more, as are drawn"),
        (["--data", str(tmp_path)], f"--data {tmp_path}: name the directory of a CLIP, --set clip=DIR"),
    ):
        assert train_py.main(["--model", "unclip", *flags, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
    with pytest.raises(ValueError, match="reads the CLIP that it was trained with; name it"):
        embedding_to_image.wrap(UnCLIP(SMALL), SMALL)
    other = replace(SMALL, d_embed=8, clip=str(clip_folder))
    with pytest.raises(ValueError, match="16 wide embeddings, those of the model are 8 wide"):
        embedding_to_image.wrap(UnCLIP(other), other)
    UnCLIP(SMALL).save_pretrained(tmp_path / "m")
    assert command.exit_code(lambda: embedding_to_image.main([str(tmp_path / "m")])) == 2
    assert "name the CLIP that it was trained with, --clip DIR" in capsys.readouterr().err
