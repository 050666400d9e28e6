"""iGPT against transformers (recorded), published counts, sampling, guesses, and a small run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_of, run_command
from PIL import Image
from safetensors.torch import load_file
from small_vit import TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

from data.images import ImageRows
from data.palette import nearest
from formats.decoders import from_gpt2
from formats.open_model import open_model
from vision import igpt
from vision.igpt import SIZES, Config, ImageGPT, Palette

FIXTURE = Path(__file__).parents[1] / "fixtures" / "imagegpt"
GREYS = ((-1.0,), (0.0,), (1.0,))
SMALL = Config(2, 2, 16, 24, 4, 12, image_size=(3, 4), n_channels=1, palette=GREYS)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = ImageGPT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_it_computes_what_transformers_computes_and_so_do_its_gradients():
    model, expected = ImageGPT.from_pretrained(FIXTURE), load_file(FIXTURE / "expected.safetensors")
    config = model.config
    assert config.image_size == (4, 5) and config.n_channels == 3 and config.start == 11
    ids = expected["ids"]
    torch.testing.assert_close(model(ids), expected["logits"], **TOLERANCE)
    loss, _ = model.loss({"tokens": ids[:, :-1], "targets": ids[:, 1:]})
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    recorded = from_gpt2({n.removeprefix("gradient."): g for n, g in expected.items() if "gradient." in n})
    own = {name: p.grad for name, p in model.named_parameters()}
    assert own.keys() == recorded.keys() and len(own) == 2 * 14 + 4
    for name, gradient in recorded.items():
        torch.testing.assert_close(own[name], gradient, **TOLERANCE, msg=name)
    assert torch.equal(nearest(expected["pixels"], torch.tensor(config.palette)), expected["quantized"])


@pytest.mark.parametrize(
    "name, n_params, n_biases",
    [
        ("s", 76_682_240, 110_592),
        ("m", 455_489_536, 331_776),
        ("l", 1_362_914_304, 663_552),
        ("xl", 6_803_097_600, 1_658_880),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(name, n_params, n_biases):
    with torch.device("meta"):
        model = ImageGPT(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == n_params
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias")) == n_biases


def test_a_new_model_finds_all_colours_alike_and_flops_are_those_of_the_matrix_products():
    torch.manual_seed(0)
    model, ids = ImageGPT(replace(SMALL, kernels="reference")), torch.randint(3, (5, 12))
    with FlopCounterMode(display=False) as counter:
        loss, _ = model.loss({"tokens": igpt.inputs_of(ids, 3), "targets": ids})
        loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    # The counter sees whole attention matrices, of which half are behind the mask.
    hidden = 12 * 2 * 2 * 8 * sum(range(1, 13)) // 12
    whole = 12 * 2 * 2 * 8 * 12
    assert counter.get_total_flops() == 5 * 12 * (model.flops_per_token(12) - hidden + whole)


@pytest.mark.parametrize("colour", [False, True])
def test_a_saved_model_is_read_back_to_the_bit_and_opened_by_transformers(colour, tmp_path):
    from transformers import ImageGPTForCausalImageModeling

    palette = ((-1.0, 0.0, 0.5), (0.5, 1.0, -1.0), (0.25, 0.25, 0.25)) if colour else GREYS
    model = small(palette=palette, n_channels=3 if colour else 1, norm_eps=1e-3)
    model.save_pretrained(tmp_path)
    again, ids = open_model(tmp_path).eval(), torch.randint(3, (2, 12))
    inputs = igpt.inputs_of(ids, 3)
    assert again.config == model.config and torch.equal(again(inputs), model(inputs))
    theirs = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, model(inputs), **TOLERANCE)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content["size"] == {"height": 3, "width": 4} and all(len(c) == 3 for c in content["clusters"])


def test_what_is_not_implemented_or_does_not_fit_is_named(tmp_path):
    small().save_pretrained(tmp_path)
    for change, words in (
        ({"activation_function": "gelu"}, "activation_function 'gelu' is not implemented"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True is not implemented",
        ),
        ({"n_positions": 13}, "image_size"),
        ({"n_inner": None, "n_embd": {"a": 1}}, "config.json: a value is of a wrong kind"),
    ):
        copy = copy_of(tmp_path, tmp_path / "copy", **change)
        (copy / "preprocessor_config.json").write_bytes((tmp_path / "preprocessor_config.json").read_bytes())
        with pytest.raises(ValueError, match=words):
            ImageGPT.from_pretrained(copy)
    path = tmp_path / "preprocessor_config.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"clusters": content["clusters"][:2]}, "expected 3 lists of red, green and blue"),
        ({"clusters": [[0, 0]] * 3}, "expected 3 lists"),
        ({"size": "large"}, "expected a height and a width"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=words):
            ImageGPT.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        ImageGPT.from_pretrained(tmp_path)


def test_a_completion_keeps_what_is_given_and_draws_the_rest_from_the_model():
    model, generator = small(), torch.Generator().manual_seed(3)
    given = torch.tensor([[0, 1, 2, 0, 1]] * 4000)
    ids = igpt.complete(model, given, 1.0, generator)
    assert ids.shape == (4000, 12) and torch.equal(ids[:, :5], given) and ids.max() == 2
    p = model(igpt.inputs_of(ids, 3)).softmax(-1)
    # The sixth pixel has one distribution, the last one as many as there are images.
    drawn = ids[:, 5].bincount(minlength=3) / 4000
    torch.testing.assert_close(drawn, p[0, 5], rtol=0, atol=0.03)
    drawn = ids[:, 11].bincount(minlength=3) / 4000
    torch.testing.assert_close(drawn, p[:, 11].mean(0), rtol=0, atol=0.03)
    assert igpt.complete(model, given[:2, :0], 0.0, generator).shape == (2, 12)
    assert torch.equal(igpt.complete(model, ids[:2], 1.0, generator), ids[:2])


def test_features_are_means_over_the_pixels_of_each_layer():
    model, images = small(), torch.rand(3, 1, 3, 4)
    ids = model.normalized(images)
    assert ids.tolist() == (images.flatten(1) * 2).round().long().tolist()
    by_layer = model.features_by_layer(ids)
    assert len(by_layer) == 3 and torch.equal(model.features(ids), by_layer[1])
    x, inputs = 0, igpt.inputs_of(ids, 3)
    assert inputs[:, 0].tolist() == [3] * 3 and torch.equal(inputs[:, 1:], ids[:, :-1])
    x = model.model.embed_tokens(inputs) + model.model.embed_positions.weight
    torch.testing.assert_close(by_layer[0], x.mean(1))
    for layer in model.model.layers:
        x = layer(x, None, None, None)
    torch.testing.assert_close(by_layer[2], x.mean(1))
    torch.testing.assert_close(model.model.norm(x), model.hidden(inputs))


def test_guesses_are_cross_entropies_of_counts():
    rng = np.random.default_rng(0)
    images = np.where(rng.random((40, 1, 3, 4)) < np.linspace(0.1, 0.9, 12).reshape(3, 4), 255, 0).astype(
        np.uint8
    )
    parts = ImageRows(images[:30], np.zeros(30, int), True), ImageRows(images[30:], np.zeros(10, int), False)
    line = igpt.describe(*parts, Palette(((-1.0,), (1.0,))))
    on, held = (images[:30] > 0).reshape(30, 12).sum(0), (images[30:] > 0).reshape(10, 12)
    p = (on + 1) / 32
    at_place = -np.log(np.where(held, p, 1 - p)).mean()
    p = (on.sum() + 1) / 362
    everywhere = -np.log(np.where(held, p, 1 - p)).mean()
    assert f"loss of {math.log(2):.3f} nats per pixel, as often as they occur {everywhere:.3f}" in line
    assert line.endswith(f"as often as at each place {at_place:.3f}") and at_place < everywhere


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"norm": "layer"}, "norm layer: expected rms"),
        ({"image_size": (3, 5)}, "expected height and width"),
        ({"palette": GREYS[:2]}, "palette of 2 colours of 1 channels: expected 3 of 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


def flags(tmp_path, *more):
    small = ["--steps", "4", "--eval-every", "2", "--batch-size", "4", "--log-every", "1"]
    small += ["--cache", tmp_path / "cache", "--set", "n_layers=1", "d_model=32", "d_ff=32"]
    return ["train.py", "--model", "igpt", *small, "--out", tmp_path / "run", *more]


def test_a_run_counts_pixels_and_shows_completions_and_its_model_goes_on(tmp_path, few_glyphs):
    ended = run_command(*flags(tmp_path))
    assert ended.code == 0, ended.err
    assert "9 colours" not in ended.out and "8 colours alike have a loss of 2.079 nats per pixel" in ended.out
    assert "4 steps of 576 pixels: 2,304" in ended.out and "pixels/s" in ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val_loss"] == pytest.approx(math.log(8)) and rows[-1]["val_loss"] < 2.0
    assert rows[-1].keys() == {"step", "pixels", "val_loss"}
    picture = Image.open(tmp_path / "run" / "picture.png")
    assert picture.width > 6 * 64 and {p.name for p in (tmp_path / "run" / "pictures").iterdir()} >= {"0.png"}
    model = open_model(tmp_path / "run" / "model")
    assert len(model.config.palette) == 8 and model.config.n_channels == 1

    # Trained further it keeps its palette, and the commands read it.
    further = flags(tmp_path, "--init-from", tmp_path / "run" / "model", "--out", tmp_path / "further")
    further = [*further[: further.index("--set")], *further[further.index("--set") + 4 :]]
    ended = run_command(*further)
    assert ended.code == 0, ended.err
    assert open_model(tmp_path / "further" / "model").config.palette == model.config.palette
    ended = run_command("-m", "vision.igpt", tmp_path / "run" / "model", "--out", tmp_path)
    assert ended.code == 0 and (tmp_path / "picture.png").is_file(), ended.err
    probe = [
        "-m",
        "vision.igpt",
        tmp_path / "run" / "model",
        "--probe",
        "glyphs",
        "--cache",
        tmp_path / "cache",
    ]
    ended = run_command(*probe)
    assert ended.code == 0 and "layer 1" in ended.out and "embeddings" in ended.out, ended.err
    ended = run_command("-m", "evaluation.probe", tmp_path / "run" / "model", "--cache", tmp_path / "cache")
    assert ended.code == 0 and "random weights" in ended.out, ended.err
    assert "76,682,240" in run_command("-m", "vision.igpt").out


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seq-len", "100"], "--seq-len 100: an image has 144 pixels; leave it out"),
        (["--set", "norm=layer"], "norm layer: expected rms"),
        (["--document-mask"], "--document-mask: images have no documents"),
        (["--size", "s"], "different colours; expected at least 512, the palette; choose another --size"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(tmp_path, more, words, few_glyphs):
    ended = run_command(*flags(tmp_path, *more))
    line = ended.err.strip().splitlines()[-1]
    assert ended.code == 2 and line.startswith("error: ") and words in line, ended.err
