"""Embeddings of images from texts: what is read of a CLIP, how they are drawn, and a small run."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_clip import small_clip

import train as train_py
from data.tokenizer import get_tokenizer
from vision import image_embeddings, noise
from vision.image_embeddings import TIMES, WithCLIP, make_batch
from vision.prior import Config, Prior

SMALL = Config(1, 2, 8, 16, 6, kernels="reference")


@pytest.fixture
def module():
    torch.manual_seed(0)
    return WithCLIP(Prior(SMALL), small_clip())


TOKENS = torch.tensor([[4, 5, 6, 256, 256, 256], [7, 8, 9, 10, 11, 256]])
EMPTY = torch.tensor([[256] * 6])


def test_a_text_is_read_as_clip_reads_it_up_to_its_end(module):
    read = module.read(TOKENS)
    torch.testing.assert_close(read.text, module.clip.encode_texts(TOKENS) * 4)  # sqrt(16)
    assert read.lengths.tolist() == [4, 6] and read.states.shape == (2, 6, 16)
    tower = module.clip.text_model
    torch.testing.assert_close(read.states[torch.arange(2), read.lengths - 1], tower(TOKENS))
    assert not any(p.requires_grad for p in module.clip.parameters())


def test_the_loss_is_the_squared_error_of_whitened_embeddings(module):
    with torch.no_grad():
        module.model.clip_mean.add_(0.1), module.model.clip_std.mul_(0.5)
        module.model.proj_to_clip_embeddings.weight.normal_(std=0.3)
    images, eps, t = torch.rand(2, 1, 8, 8), torch.randn(2, 16), torch.tensor([0, 900])
    value, metrics = module.loss({"images": images, "tokens": TOKENS, "noise": eps, "t": t})
    seen = module.clip.encode_images(module.clip.normalized(images))
    z = (seen - 0.1) / 0.5
    share = noise.schedule("cosine", 1000)[t].float()[:, None]
    found = module.model(share.sqrt() * z + (1 - share).sqrt() * eps, t, *module.read(TOKENS))
    torch.testing.assert_close(value, (found - z).square().mean())
    torch.testing.assert_close(metrics["cosine"], F.cosine_similarity(found * 0.5 + 0.1, seen).mean())


class Oracle(Prior):
    """A prior that always predicts one embedding for texts of several tokens, another for the empty one."""

    def forward(self, z, t, text, states, lengths):
        one, other = torch.eye(16)[:2] * 4
        return torch.where((lengths > 1)[:, None], one, other).expand(len(z), 16)


def test_what_is_drawn_is_what_the_prior_predicts_with_guidance(module):
    module.model = Oracle(SMALL)
    generator = torch.Generator().manual_seed(0)
    drawn = module.draw(TOKENS, EMPTY, generator)
    torch.testing.assert_close(drawn, torch.eye(16)[:1].expand(2, 16))
    # u + w (c - u), with c = 4 e_1, u = 4 e_2, and length 1.
    drawn = module.draw(TOKENS, EMPTY, generator, w=2.0)
    expected = F.normalize(2 * torch.eye(16)[0] - torch.eye(16)[1], dim=0)
    torch.testing.assert_close(drawn, expected.expand(2, 16))


def test_of_two_draws_the_nearer_to_the_text_is_kept(module, monkeypatch):
    text = module.read(TOKENS).text / 4
    candidates = torch.stack((text[0], -text[1], -text[0], text[1]))  # n = 2 draws of B = 2
    monkeypatch.setattr(noise, "sample", lambda *_, **__: candidates)
    drawn = module.draw(TOKENS, EMPTY, torch.Generator())
    torch.testing.assert_close(drawn, text)


def test_a_tenth_of_the_texts_is_empty_and_times_are_spread_over_all(module):
    rows = [
        {
            "image": torch.zeros(1, 8, 8, dtype=torch.uint8).numpy(),
            "tokens": TOKENS[1].numpy(),
            "empty": EMPTY[0].numpy(),
            "augment": torch.tensor(i < 400).numpy(),
        }
        for i in range(500)
    ]
    batch = make_batch(rows, SMALL, torch.Generator().manual_seed(0), None)
    empty = (batch["tokens"] == 256).all(1)
    assert 0.06 < empty[:400].float().mean() < 0.15 and not empty[400:].any()
    assert batch["t"].sort().values.diff().max() <= 3
    assert batch["t"].min() < 3 and batch["t"].max() >= TIMES - 3
    assert batch["noise"].shape == (500, 16)


# --- runs


@pytest.fixture
def clip_folder(tmp_path):
    small_clip().save_pretrained(tmp_path / "clip")
    get_tokenizer("bytes").save(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.usefixtures("few_glyphs")
def test_a_run_measures_the_prior_beside_the_texts_embedding(tmp_path, clip_folder, capsys):
    flags = ["--steps", "30", "--eval-every", "30", "--batch-size", "9", "--set", f"clip={clip_folder}"]
    argv = ["--model", "prior", *flags, "n_layers=1", "--out", str(tmp_path / "run")]
    assert train_py.main(argv) == 0
    out = capsys.readouterr().out
    assert "a text's own embedding has a cosine of" in out
    lines = (tmp_path / "run" / "samples.txt").read_text().splitlines()
    assert sum("the text's embedding" in line for line in lines) == 2 and "drawn, w = 2" in "".join(lines)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "val_cosine" in row)
    assert after["val_loss"] < before["val_loss"]

    # The figures of the command are those of the run, by what is in the prior's file alone.
    model = Prior.from_pretrained(tmp_path / "run" / "model")
    assert model.config.mean == () and model.clip_std.shape == (1, 16) and (model.clip_std < 0.5).all()
    image_embeddings.main([str(tmp_path / "run" / "model"), "--clip", str(clip_folder)])
    table = capsys.readouterr().out.splitlines()[1:]
    assert len(table) == 5 and table == [line for line in lines if line][-5:]


def test_one_image_is_enough_to_learn_from(tmp_path, clip_folder):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    lines = "".join(json.dumps({"file_name": f"{name}.png", "text": name}) + "\n" for name in "ab")
    (tmp_path / "metadata.jsonl").write_text(lines)
    flags = f"--model prior --data {tmp_path} --steps 1 --batch-size 1 --out {tmp_path / 'run'}"
    assert train_py.main([*flags.split(), "--set", f"clip={clip_folder}", "n_layers=1"]) == 0
    model = Prior.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(model.clip_std, torch.full((1, 16), 1e-3))


def test_mistakes_are_one_line(tmp_path, clip_folder, capsys):
    small_clip(text_width=12).save_pretrained(tmp_path / "odd")
    for flags, words in (
        (["--set", f"clip={tmp_path / 'none'}"], "none"),
        (["--set", f"clip={tmp_path / 'odd'}"], "12 wide texts, 16 wide embeddings"),
        (["--data", str(tmp_path)], f"--data {tmp_path}: name the directory of a CLIP, --set clip=DIR"),
    ):
        assert train_py.main(["--model", "prior", *flags, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
    Prior(SMALL).save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match="reads the CLIP that it was trained with; name it"):
        image_embeddings.wrap(Prior(SMALL), SMALL)
    with pytest.raises(ValueError, match="16 wide embeddings, those of the model are 8 wide"):
        other = replace(SMALL, d_embed=8, clip=str(clip_folder))
        image_embeddings.wrap(Prior(other), other)
