"""The prior of DALL-E 2 against diffusers (recorded), its size, what its query sees, and its FLOPs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_vit import TOLERANCE, assert_gradients, assert_same_weights, shaken
from torch.utils.flop_counter import FlopCounterMode

from formats.diffusers import WEIGHTS
from formats.open_model import open_model
from vision.prior import SIZES, Config, Prior

FOLDER = Path(__file__).parents[1] / "fixtures" / "prior"
SMALL = Config(2, 2, 6, 8, 5, kernels="reference")


def small(**changes):
    torch.manual_seed(0)
    return shaken(Prior(replace(SMALL, **changes)))


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    z, text, states = (torch.randn(n, *shape, generator=generator) for shape in ((8,), (8,), (5, 8)))
    return z, torch.tensor([0, 7, 640])[:n], text, states, torch.tensor([3, 5, 1])[:n]


def test_outputs_and_gradients_are_those_of_diffusers():
    expected = load_file(FOLDER / "expected.safetensors")
    model = open_model(FOLDER)
    assert type(model) is Prior and model.config.d_model == 12
    z, t, text, states = (expected[name] for name in ("z", "t", "text", "states"))
    output = model(z, t, text, states, expected["mask"].sum(1))
    torch.testing.assert_close(output, expected["output"], **TOLERANCE)
    torch.testing.assert_close(model.unwhitened(output), expected["unwhitened"], **TOLERANCE)
    loss = (output - expected["target"]).square().mean()
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    assert_gradients(model, expected)


def test_a_written_model_has_the_same_files_as_diffusers_writes(tmp_path):
    open_model(FOLDER).save_pretrained(tmp_path)
    assert_same_weights(tmp_path, FOLDER, WEIGHTS)
    content, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, FOLDER))
    assert all(content[key] == value for key, value in theirs.items() if key[:1] != "_")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"norm_in_type": "layer"}, "norm_in_type 'layer' is not implemented"),
        ({"clip_embed_dim": 9}, "clip_embed_dim 9 is not implemented; expected 8"),
        ({"num_embeddings": 6}, "positional_embedding has shape"),
        ({"num_layers": 3}, "transformer_blocks.2.* is missing"),
    ],
)
def test_what_cannot_be_read_is_named(change, words, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=words):
        open_model(folder)


def test_the_published_prior_has_its_number_of_parameters():
    with torch.device("meta"):
        model = Prior(SIZES["unclip"])
    # diffusers counts the mean and the deviation of embeddings, too.
    assert sum(w.numel() for w in model.state_dict().values()) == 1_022_030_080


def test_padding_is_not_seen_and_everything_before_it_is():
    model, (z, t, text, states, lengths) = small(), inputs()
    before = model(z, t, text, states, lengths)
    other = states.clone()
    other[0, 3:], other[2, 1:] = 9.0, -9.0  # behind the ends
    assert torch.equal(model(z, t, text, other, lengths), before)
    other = states.clone()
    other[1, 4] = 9.0  # the last one of a text without padding
    found = model(z, t, text, other, lengths)
    assert torch.equal(found[[0, 2]], before[[0, 2]]) and (found[1] - before[1]).abs().max() > 0.01
    for i, x in enumerate((z, t, text)):
        arguments = [z, t, text, states, lengths]
        arguments[i] = x + 1
        assert (model(*arguments) - before).abs().max() > 1e-3


def test_a_new_prior_predicts_the_mean_embedding():
    torch.manual_seed(0)
    mean, std = (0.5, -1.0, *[0.0] * 6), (2.0, 0.1, *[1.0] * 6)
    model = Prior(replace(SMALL, mean=mean, std=std))
    found = model.unwhitened(model(*inputs()))
    torch.testing.assert_close(found, torch.tensor(mean).expand(3, 8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(model.unwhitened(model.whitened(x)), x)
    torch.testing.assert_close(
        model.whitened(x)[:, :2], (x - torch.tensor(mean))[:, :2] / torch.tensor(std)[:2]
    )


def test_flops_are_those_of_the_matrix_products():
    model, arguments = small(), inputs()
    with FlopCounterMode(display=False) as counter:
        model(*arguments).sum().backward()
    # Backward needs no gradients of the inputs: states, embedding and noisy embedding, and the times' sines.
    first = 2 * 3 * ((5 + 2) * 8 * 12 + 12 * 12)
    assert counter.get_total_flops() == 3 * model.flops_per_token() - first


def test_texts_of_another_length_and_rates_that_make_no_sense_are_refused():
    model, (z, t, text, states, lengths) = small(), inputs()
    with pytest.raises(ValueError, match="4 states of a text: expected 5"):
        model(z, t, text, states[:, :4], lengths)
    with pytest.raises(ValueError, match=r"drop 1\.0: expected less than 1"):
        replace(SMALL, drop=1.0)
