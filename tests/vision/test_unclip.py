"""The decoder of DALL-E 2 against diffusers (recorded), its two readings of an embedding, and its command."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_clip import CLIP_CONFIG, small_clip
from small_vit import TOLERANCE, assert_gradients, assert_same_weights, shaken
from torch.utils.flop_counter import FlopCounterMode

from data.tokenizer import get_tokenizer
from formats import command
from formats.diffusers import WEIGHTS
from formats.open_model import open_model
from vision import noise, prior, unclip, unet
from vision.unclip import Config, UnCLIP, reduced

FOLDER = Path(__file__).parents[1] / "fixtures" / "unclip"
UNET = unet.Config(
    (4, 8), (0, 1), 1, 1, 1, 4, class_vectors=True, d_text=6, n_heads=2, n_groups=2, norm_eps=1e-5,
    cos_first=True, freq_shift=0, padding=1, kernels="reference",
)  # fmt: skip
SMALL = Config(UNET, CLIP_CONFIG.d_joint, 3)


def small(**changes):
    torch.manual_seed(0)
    return shaken(UnCLIP(replace(SMALL, **changes)))


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, *shape, generator=generator) for shape in ((1, 4, 4), (16,)))
    return x, torch.tensor([7, 640])[:n], z


# --- against diffusers


def test_outputs_and_gradients_are_those_of_diffusers():
    expected = load_file(FOLDER / "expected.safetensors")
    model = open_model(FOLDER)
    assert type(model) is UnCLIP and model.config.d_embed == 10 and model.config.n_context == 3
    output = model(expected["x"], expected["t"], expected["z"])
    torch.testing.assert_close(output, expected["output"], **TOLERANCE)
    loss = (output - expected["target"]).square().mean()
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    of_text = ("text_proj.embedding_proj", "text_proj.encoder_hidden", "text_proj.text_encoder")
    known = {
        name: g for name, g in expected.items() if not name.removeprefix("gradient.").startswith(of_text)
    }
    assert_gradients(model, known)


def test_images_are_those_that_diffusers_draws_with_guidance():
    expected = load_file(FOLDER / "expected.safetensors")
    model, z = open_model(FOLDER), expected["z"] / math.sqrt(10)
    images = model.draw(z, guidance=1.5, steps=5, x=expected["x"])
    # diffusers' tables are float32. The difference is 4e-7, and 0.04 with another null row.
    torch.testing.assert_close(images, expected["images"], rtol=0, atol=1e-5)
    assert (model.draw(z, steps=5, x=expected["x"]) - images).abs().max() > 0.01


def test_a_written_decoder_has_the_files_that_diffusers_writes(tmp_path):
    open_model(FOLDER).save_pretrained(tmp_path)
    for part in ("decoder", "text_proj"):
        assert_same_weights(tmp_path / part, FOLDER / part, WEIGHTS)
        ours, theirs = (json.loads((f / part / "config.json").read_text()) for f in (tmp_path, FOLDER))
        assert all(theirs[key] == value for key, value in ours.items() if not key.startswith("_d"))
    again = open_model(tmp_path)
    assert again.config == open_model(FOLDER).config
    assert all(torch.equal(w, again.state_dict()[key]) for key, w in open_model(FOLDER).state_dict().items())


def test_what_cannot_be_read_is_named(tmp_path):
    for part, change, words in (
        ("decoder", {"class_embed_type": "projection"}, "class_embed_type 'projection' is not implemented"),
        ("decoder", {"class_embed_type": None}, "expected class_vectors and d_text"),
        ("text_proj", {"_class_name": "ImageProjection"}, "class 'ImageProjection': expected UnCLIPText"),
        ("text_proj", {"clip_extra_context_tokens": 2}, "clip_extra_context_tokens_proj.* has shape"),
        ("text_proj", {"clip_embeddings_dim": 9}, "has shape"),
    ):
        folder = shutil.copytree(FOLDER, tmp_path / f"{part}-{words[:9]}-{next(iter(change))}")
        content = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            open_model(folder)
    folder = shutil.copytree(FOLDER, tmp_path / "reads-texts")
    weights = load_file(folder / "text_proj" / WEIGHTS)
    weights["embedding_proj.weight"][0, 0] = 1
    save_file(weights, folder / "text_proj" / WEIGHTS)
    with pytest.raises(ValueError, match=r"embedding_proj.weight is not 0: a decoder that reads texts"):
        open_model(folder)


# --- the two readings


@pytest.mark.parametrize("silent", ["time_embeddings", "context"])
def test_the_embedding_reaches_the_network_by_the_vector_and_by_the_tokens(silent):
    model, (x, t, z) = small(), inputs()
    layers = {
        "context": model.text_proj.clip_extra_context_tokens_proj,
        "time_embeddings": model.text_proj.clip_image_embeddings_project_to_time_embeddings,
    }
    z.requires_grad_()
    model(x, t, z).square().mean().backward()
    assert all(layer.weight.grad.abs().max() > 1e-5 for layer in layers.values())
    # With one of the two silenced, the output still depends on z; with both, it does not.
    with torch.no_grad():
        layers.pop(silent).weight.zero_()
        assert (model(x, t, z) - model(x, t, z + 1)).abs().max() > 1e-3
        layers.popitem()[1].weight.zero_()
        assert torch.equal(model(x, t, z), model(x, t, z + 1))


def test_each_token_of_context_has_rows_of_its_own():
    model, (_, _, z) = small(), inputs()
    _, tokens = model.text_proj(z)
    layer = model.text_proj.clip_extra_context_tokens_proj
    # As in diffusers, token n is made by the rows n, n + N, n + 2 N ...
    for n in range(3):
        torch.testing.assert_close(tokens[:, n], z @ layer.weight[n::3].T + layer.bias[n::3])


def test_a_new_decoder_predicts_zeros_and_all_its_weights_learn_soon():
    torch.manual_seed(0)
    model, (x, t, z) = UnCLIP(SMALL), inputs()
    assert not model(x, t, z).any()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):  # zeros in the last layers hold back what is behind them
        optimizer.zero_grad()
        given = torch.stack((model.null, z[1]))
        (model(x, t, given) - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# --- drawing


def test_guidance_of_one_is_no_guidance_and_others_start_from_the_null_row():
    model, (x, _, z) = small(), inputs()
    embeddings = z / z.norm(dim=1, keepdim=True)
    plain = model.draw(embeddings, x=x, steps=3)
    scaled = embeddings * 4  # sqrt(16)

    def by_hand(w):
        denoise = lambda x, t: noise.guide(model(x, t, scaled), model(x, t, model.null.expand(2, -1)), w)  # noqa: E731
        how = {"kind": "x0", "clip": 1.0}
        drawn = noise.sample(denoise, x, noise.schedule(), noise.spaced(1000, 3), **how)
        return (drawn.detach() + 1) / 2

    torch.testing.assert_close(plain, by_hand(1.0), **TOLERANCE)
    guided = model.draw(embeddings, guidance=3.0, x=x, steps=3)
    torch.testing.assert_close(guided, by_hand(3.0), **TOLERANCE)
    assert (guided - plain).abs().max() > 1e-3
    # Without an embedding, all images are those of the null row.
    torch.testing.assert_close(
        model.draw(embeddings, guidance=0.0, x=x, steps=3),
        model.draw(model.null.detach().expand(2, -1) / 4, x=x, steps=3),
        **TOLERANCE,
    )


def test_the_same_seed_draws_the_same_image_and_another_seed_a_variation():
    model, (_, _, z) = small(), inputs()
    one, same, other = (model.draw(z[:1] / 4, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and (one - other).abs().max() > 0.01
    assert one.shape == (1, 1, 4, 4) and one.min() >= 0 and one.max() <= 1


def test_a_smaller_image_has_the_means_of_areas():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert reduced(images, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(reduced(images, (4, 4)), images)


def test_flops_are_those_of_the_matrix_products():
    model, (x, t, z) = small(), inputs(1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, z)
    assert counter.get_total_flops() == model.flops_per_token() / 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": 1.0}, "drop 1"),
        ({"target": "y"}, "target 'y': expected v or x0 or eps"),
        ({"unet": replace(UNET, d_text=0)}, "expected class_vectors and d_text"),
        ({"unet": replace(UNET, class_vectors=False)}, "expected class_vectors and d_text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


# --- the command


@pytest.fixture
def folders(tmp_path):
    small_clip().save_pretrained(tmp_path / "clip")
    get_tokenizer("bytes").save(tmp_path / "clip")
    small().save_pretrained(tmp_path / "m")
    prior.Prior(prior.Config(1, 2, 8, 16, 12)).save_pretrained(tmp_path / "prior")
    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    return tmp_path


def test_the_command_draws_a_row_for_each_image_and_each_text(folders, capsys):
    argv = [str(folders / "m"), "--clip", str(folders / "clip"), "--n", "3", "--steps", "2"]
    argv += [
        "--image",
        str(folders / "grey.png"),
        "--prompt",
        "one",
        "two",
        "--prior",
        str(folders / "prior"),
    ]
    unclip.main([*argv, "--out", str(folders / "o.png")])
    assert "9 images of 2 steps" in capsys.readouterr().out
    with Image.open(folders / "o.png") as picture:  # the image itself stands before its variations
        assert picture.size == (4 * 70 + 6, 3 * 70 + 6)


def test_without_a_checkpoint_the_command_prints_the_sizes(capsys):
    unclip.main([])
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "tiny"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "g"], "expected --clip DIR"),
        (["--clip", "clip", "--prompt", "g"], "--prompt TEXT with --prior DIR"),
        (["--clip", "clip"], "or --image FILE"),
        (["--clip", "clip", "--image", "grey.png", "--n", "0"], "--n 0"),
        (["--clip", "clip", "--image", "grey.png", "--out", "o.gif"], "ends in .png"),
        (["--clip", "clip", "--image", "grey.png", "--steps", "2000"], "2000 steps of a sampler"),
        (["--clip", "clip", "--image", "none.png"], "none.png: cannot be opened"),
        (["--clip", "m", "--image", "grey.png"], "m: no model of vision.clip.py"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flags, words, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert command.exit_code(lambda: unclip.main(["m", *flags])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_clip_of_another_width_is_refused(folders):
    other = replace(SMALL, d_embed=8)
    UnCLIP(other).save_pretrained(folders / "other")
    argv = [str(folders / "other"), "--clip", str(folders / "clip"), "--image", str(folders / "grey.png")]
    with pytest.raises(ValueError, match="16 wide embeddings, those of the model are 8 wide"):
        unclip.main(argv)
